"""
Answers that are kept for a while, in memory.

Rule 1: it is bounded in bytes. What has expired goes first, then what was longest unused.
Rule 2: what is not there is fetched once, however many ask for it at the same time.
Rule 3: failures and empty answers are not kept. Who waited for a fetch that failed is told so; who
waited for one whose caller went away fetches for himself.

What may be kept, and under which key, is the caller's to say. An answer that was filled for one
viewer, or paid for, is nobody else's; and who serves from here still counts caps and budgets.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from cachetools import TTLCache

T = TypeVar("T", bound="str | bytes")
V = TypeVar("V")

TTL = 300.0
"""Seconds."""

MAX_BYTES = 64 * 1024 * 1024

OVERHEAD = 300
"""Bytes that an entry takes besides its key and its value, about."""


class Flights(Generic[V]):
    """
    What is being fetched just now, under its keys: who comes later waits for what comes of it.

    A key has one *flight* at a time. It is cancelled where the one who fetches goes away, and then
    one of those who wait may take over.
    """

    def __init__(self) -> None:
        self._under_way: dict[str, asyncio.Future[V]] = {}

    def under_way(self, key: str) -> "asyncio.Future[V] | None":
        """
        Give what is fetched for *key*; None for nothing.

        Wait for it by :func:`asyncio.wait`, so that who goes away takes nobody along.
        """
        return self._under_way.get(key)

    async def lead(self, key: str, fetch: Callable[[], Awaitable[V]]) -> V:
        """Fetch for *key*, for all who come meanwhile; what *fetch* raises is raised to all."""
        flight: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._under_way[key] = flight
        try:
            value = await fetch()
        except BaseException as error:
            self._land(key, flight)
            _fail(flight, error)
            del flight  # what it holds now has a traceback, and that has this frame
            raise
        self._land(key, flight)
        flight.set_result(value)
        return value

    def _land(self, key: str, flight: "asyncio.Future[V]") -> None:
        if self._under_way.get(key) is flight:
            del self._under_way[key]

    def clear(self) -> None:
        """Let nobody wait any more who does not yet."""
        self._under_way.clear()

    def __len__(self) -> int:
        return len(self._under_way)

    def __repr__(self) -> str:
        return f"<Flights {len(self)} under way>"


class ResponseCache(Generic[T]):
    """
    Keeps answers, texts or bytes, for *ttl_seconds*; all of them take *max_bytes* at the most.

    *clock* gives seconds.
    """

    def __init__(
        self,
        ttl_seconds: float = TTL,
        max_bytes: int = MAX_BYTES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if ttl_seconds <= 0 or max_bytes <= 0:
            raise ValueError(
                f"{ttl_seconds} s and {max_bytes} bytes keep nothing (write more than 0 of both)"
            )
        self._ttl = ttl_seconds
        self._kept: TTLCache[str, tuple[T, int]] = TTLCache(
            max_bytes, ttl_seconds, timer=clock, getsizeof=_size
        )
        self._flights = Flights[T | None]()
        self._cleared = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> T | None:
        """Give what is kept under *key*; None for nothing."""
        found = self._kept.get(key)
        return found[0] if found is not None else None

    def put(self, key: str, value: T) -> bool:
        """Keep *value* under *key*; False where it is empty, or larger than the whole cache."""
        size = OVERHEAD + _bytes(key) + _bytes(value)
        if not value or size > self._kept.maxsize:
            return False
        self._kept[key] = value, size
        return True

    def clear(self) -> None:
        """Forget everything, and do not keep what is being fetched just now."""
        self._kept.clear()
        self._flights.clear()
        self._cleared += 1

    async def get_or_fetch(self, key: str, fetch: Callable[[], Awaitable[T | None]]) -> T | None:
        """Give what is kept under *key*, or what *fetch* gives; what *fetch* raises is raised."""
        while True:
            kept = self.get(key)
            if kept is not None:
                self.hits += 1
                return kept
            flight = self._flights.under_way(key)
            if flight is None:
                self.misses += 1
                return await self._flights.lead(key, lambda: self._fetch(key, fetch))
            await asyncio.wait([flight])
            if not flight.cancelled():
                self.hits += flight.exception() is None
                return flight.result()

    async def _fetch(self, key: str, fetch: Callable[[], Awaitable[T | None]]) -> T | None:
        cleared = self._cleared
        value = await fetch()
        if value and cleared == self._cleared:
            self.put(key, value)
        return value

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return (
            f"<ResponseCache {len(self._kept)} answers, {self._kept.currsize:g} of "
            f"{self._kept.maxsize:g} bytes, {self._ttl:g} s, hits: {self.hits}, "
            f"misses: {self.misses}>"
        )


def _fail(flight: "asyncio.Future[V]", error: BaseException) -> None:
    """Tell those who wait; of a caller that went away, no more than that."""
    if isinstance(error, Exception):
        flight.set_exception(error)
        flight.exception()  # where nobody waits, asyncio shall not complain
    else:
        flight.cancel()


def _size(entry: tuple[object, int]) -> int:
    return entry[1]


def _bytes(text: str | bytes) -> int:
    return len(text.encode("utf-8", "replace") if isinstance(text, str) else text)
