"""Small items of an account: what is left of them after a change. Redis has a script for it."""

from collections.abc import Mapping

from vastproxy.state.base import MAX_ITEM_BYTES, MAX_ITEMS


def with_changes(items: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Give *items* after *changes*, within the limits; the longest unchanged first."""
    left = dict(items)
    for name, value in changes.items():
        left.pop(name, None)
        if value is not None:
            left[name] = value
    while len(left) > MAX_ITEMS or _size(left) > MAX_ITEM_BYTES:
        del left[next(iter(left))]
    return left


def _size(items: Mapping[str, str]) -> int:
    return sum(_bytes(name) + _bytes(value) for name, value in items.items())


def _bytes(text: str) -> int:
    # Half a character, as broken input has it, is kept as it is.
    return len(text.encode("utf-8", "surrogatepass"))
