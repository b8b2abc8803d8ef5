"""The things that were asked for last, made when they are asked for first."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """
    Keeps what *make* makes of a key, for the *limit* keys that were asked for last.

    *dropped* hears of each that has to go. An open breaker goes like any other: names that
    strangers make up may not fill the memory.
    """

    def __init__(
        self,
        make: Callable[[str], T],
        limit: int = 1000,
        *,
        dropped: Callable[[T], None] = lambda _: None,
    ) -> None:
        self._make = make
        self._limit = limit
        self._dropped = dropped
        self._kept: OrderedDict[str, T] = OrderedDict()

    def of(self, key: str) -> T:
        """Give what is kept for *key*, made now if it is new."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = self._make(key)
        if len(self._kept) > self._limit:
            self._dropped(self._kept.popitem(last=False)[1])
        return made

    def items(self) -> tuple[tuple[str, T], ...]:
        """Give what is kept, with its key: the longest unused first."""
        return tuple(self._kept.items())

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<Recent {len(self._kept)} of {self._limit}>"
