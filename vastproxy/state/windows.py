"""
Windows of frequency caps as text, and the calendars behind them.

The text stands at the beginning of a counter's key, so that a key goes with one window for ever,
and whoever finds a key (in a token, a journal, a database) knows which window it has:

    ``r3600000|/vast/preroll|``      rolling, one hour
    ``f60000|/vast/preroll|``        fixed, one minute from the first
    ``cday Europe/Berlin|launch|``   the days of a calendar
    ``l|launch|advertiser acme``     for ever; what stands last is whom or what it counts

Nothing here does I/O but for the time zone database, which is read once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import blake2s
from typing import Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from vastproxy.errors import StateBackendError
from vastproxy.state.base import MONEY_KEY, Claim, Window

Period = Literal["hour", "day", "week", "month"]

AHEAD = {"hour": 200, "day": 40, "week": 8, "month": 4}
"""Periods behind the current one that a window names: a beacon may come so much later."""
HOUR = 3600
LONGEST_SUBJECT = 40
"""Characters of a subject that are kept as they are; a longer one is kept as a hash."""

_CODE = re.compile(r"(?:r([0-9]{1,15})|f([0-9]{1,15})|c(hour|day|week|month) ([A-Za-z0-9_+/-]+)|l)")


@dataclass(frozen=True, slots=True)
class Span:
    """A window as the configuration has it: without the time."""

    kind: Literal["rolling", "fixed", "calendar", "lifetime"] = "lifetime"
    ms: int = 0
    period: Period = "day"
    time_zone: str = "UTC"

    @property
    def code(self) -> str:
        """The same as text."""
        match self.kind:
            case "rolling":
                return f"r{self.ms}"
            case "fixed":
                return f"f{self.ms}"
            case "calendar":
                return f"c{self.period} {self.time_zone}"
            case "lifetime":
                return "l"

    @classmethod
    def parse(cls, code: str) -> Self:
        """Read what :attr:`code` gave; StateBackendError for anything else."""
        found = _CODE.fullmatch(code)
        if not found:
            raise StateBackendError(f"{code[:40]!r} is no window")
        if found[1]:
            return cls("rolling", int(found[1]))
        if found[2]:
            return cls("fixed", int(found[2]))
        if found[3]:
            period: Period = found[3]  # type: ignore[assignment]  # the pattern knows the four
            return cls("calendar", period=period, time_zone=found[4])
        return cls()

    def at(self, now: int) -> Window:
        """Give the window as it is around *now*, in Unix milliseconds."""
        if self.kind != "calendar":
            return Window(self.kind, self.ms)
        # The same for all requests of a minute: bounds lie far around now.
        return Window("calendar", bounds=_bounds(self.period, self.time_zone, now // 60_000))

    def __str__(self) -> str:
        match self.kind:
            case "rolling":
                return f"within {self.ms / 1000:g} s"
            case "fixed":
                return f"in {self.ms / 1000:g} s from the first"
            case "calendar":
                return f"in a {self.period} ({self.time_zone})"
            case "lifetime":
                return "ever"


def counter_key(span: Span, scope: str, subject: str = "") -> str:
    """
    Name the counter of *scope* (a cap's name, or its route) for *subject*, with *span*.

    Of a *subject* with a blank, what stands before it says what is counted by, and stays.
    """
    by, blank, whose = subject.partition(" ")
    if not blank:
        by, whose = "", subject
    return f"{span.code}|{scope}|{by}{blank}{_bounded(whose)}"


def _bounded(subject: str) -> str:
    """Give *subject* as it is, or a hash of it: a key is taken apart at its last bar."""
    plain = subject.isascii() and subject.isprintable() and "|" not in subject
    if plain and len(subject) <= LONGEST_SUBJECT:
        return subject
    return f"#{blake2s(subject.encode('utf-8', 'replace'), digest_size=12).hexdigest()}"


def span_of(key: str) -> Span:
    """Give the window that *key* begins with."""
    return Span() if key == MONEY_KEY else Span.parse(key.partition("|")[0])


def told(key: str) -> tuple[Span, str, str]:
    """Take a *key* apart: window, scope, subject."""
    code, _, rest = key.partition("|")
    scope, _, subject = rest.rpartition("|")
    return Span.parse(code), scope, subject


def claim_of(key: str, amount: int, now: int) -> Claim:
    """Make the claim that confirms *amount* on *key* at *now*."""
    return Claim(key, amount, window=span_of(key).at(now))


@lru_cache(maxsize=256)
def _bounds(period: Period, time_zone: str, minute: int) -> tuple[int, ...]:
    """Give when periods begin, from two before the current one on, in Unix milliseconds."""
    try:
        local = datetime.fromtimestamp(minute * 60, ZoneInfo(time_zone))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        # OSError: a directory of zones, such as "America".
        raise StateBackendError(f"{time_zone!r} is no time zone") from None
    if period == "hour":
        begin = minute * 60 - local.minute * 60
        return tuple((begin + at * HOUR) * 1000 for at in range(-2, AHEAD["hour"]))
    step = _STEPS[period]
    begin_of = local.replace(hour=0, minute=0, tzinfo=None)
    starts = [step(begin_of, at) for at in range(-2, AHEAD[period])]
    zone = ZoneInfo(time_zone)
    return tuple(int(each.replace(tzinfo=zone).timestamp() * 1000) for each in starts)


def _day(today: datetime, at: int) -> datetime:
    return today + timedelta(days=at)


def _week(today: datetime, at: int) -> datetime:
    """Give a Monday, on which weeks begin (ISO 8601)."""
    return today - timedelta(days=today.weekday()) + timedelta(weeks=at)


def _month(today: datetime, at: int) -> datetime:
    years, month = divmod(today.month - 1 + at, 12)
    return today.replace(year=today.year + years, month=month + 1, day=1)


_STEPS: dict[str, Callable[[datetime, int], datetime]] = {
    "day": _day,
    "week": _week,
    "month": _month,
}
