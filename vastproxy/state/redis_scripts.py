"""
The scripts that Redis runs: how holds are written for them, and what their replies mean.

``scripts/account.lua`` says the same from the other side. Nothing here waits for a server.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Any, Self

from vastproxy.state.base import Booking, Claim, Hold, Level, Verdict
from vastproxy.state.redis_servers import Call

_BOOKINGS: tuple[Booking, ...] = ("booked", "late", "again")


@dataclass(frozen=True, slots=True)
class Script:
    """One script."""

    source: str
    digest: str
    """The name under which a server knows it."""

    @classmethod
    def load(cls, *names: str) -> Self:
        """Make one script of the files *names*."""
        folder = files("vastproxy.state") / "scripts"
        source = "\n".join([(folder / f"{name}.lua").read_text("utf-8") for name in names])
        # Redis names scripts by this digest; nothing is protected by it.
        return cls(source, sha1(source.encode(), usedforsecurity=False).hexdigest())

    def call(self, keys: Sequence[str], *arguments: object) -> Call:
        """Give the command that runs this, and the one that brings it along."""
        rest = (len(keys), *keys, *arguments)
        return Call(keys[0], ("EVALSHA", self.digest, *rest), ("EVAL", self.source, *rest))


@dataclass(frozen=True, slots=True)
class Scripts:
    """All scripts."""

    reserve: Script
    confirm: Script
    void: Script
    levels: Script
    count: Script
    spend: Script
    read_items: Script
    write_items: Script

    @classmethod
    def load(cls) -> Self:
        """Read all of them."""
        decisions = ("reserve", "confirm", "void", "levels")
        return cls(
            *[Script.load("account", each) for each in decisions],
            *[Script.load(each) for each in ("count", "spend", "read_items", "write_items")],
        )

    def all(self) -> list[Script]:
        """Give all of them."""
        return [getattr(self, name) for name in self.__slots__]


# --- Holds ---------------------------------------------------------------------------------------


def written(holds: Sequence[Hold]) -> bytes:
    """Write *holds* as ``account.lua`` reads them."""
    calendars: dict[tuple[int, ...], int] = {}
    rows = [
        (
            each.operation,
            each.ttl_ms,
            each.keep_ms,
            each.lease,
            [_claim(claim, calendars) for claim in each.claims],
        )
        for each in holds
    ]
    # Calendars are long, and mostly the same for all claims: each is told once.
    text = json.dumps([list(calendars), rows], ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _claim(claim: Claim, calendars: dict[tuple[int, ...], int]) -> tuple[object, ...]:
    window = claim.window
    span = window.ms
    if window.kind == "calendar":
        span = calendars.setdefault(window.bounds, len(calendars) + 1)
    limit = False if claim.limit is None else claim.limit
    return (claim.key, claim.amount, limit, window.kind[0], span, claim.enforced)


# --- Replies -------------------------------------------------------------------------------------
#
# They raise anything for a reply that cannot be: redis_node.read says so in our own terms.


def rows_of(reply: object, *, count: int) -> list[object]:
    """Read a list of *count* replies."""
    if not isinstance(reply, list) or len(reply) != count:
        raise TypeError
    return reply


def verdict_of(reply: Any) -> Verdict:  # noqa: ANN401 - read() checks it
    """Read what ``reserve.lua`` says of a hold."""
    granted, *places = (int(each) for each in reply)
    if granted:
        return Verdict(granted=True, over=tuple(places))
    return Verdict(granted=False, refused=places[0] if places else None)


def booking_of(reply: Any) -> Booking:  # noqa: ANN401 - read() checks it
    """Read what ``confirm.lua`` says of a hold."""
    booking: Booking = _BOOKINGS[reply]
    return booking


def level_of(reply: Any) -> Level:  # noqa: ANN401 - read() checks it
    """Read what ``levels.lua`` says of a claim."""
    counted, reserved = reply
    return Level(int(counted), int(reserved))


def keys_of(reply: Any) -> list[str]:  # noqa: ANN401 - read() checks it
    """Read the fields of an account's counters."""
    # A counter has two fields, `c|<key>` and `r|<key>`, or one of them.
    return list(dict.fromkeys([each[2:].decode("utf-8", "surrogatepass") for each in reply]))


def items_of(reply: Any) -> dict[str, str]:  # noqa: ANN401 - read() checks it
    """Read what ``read_items.lua`` gives, in the order of writing."""
    words = [each.decode("utf-8", "surrogatepass") for each in reply]
    found = [
        (name, *text.split(" ", 1)) for name, text in zip(words[::2], words[1::2], strict=True)
    ]
    found.sort(key=lambda item: int(item[1]))
    return {name: value for name, _, value in found}
