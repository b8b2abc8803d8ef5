"""
What a circuit breaker counts, and by which rules it opens.

Rule 1: the window is a ring of buckets: to count a call, and to forget old ones, takes no search.
Rule 2: pybreaker opens when a counter reaches a limit. Each rule of ours is told by that counter.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, cast

from pybreaker import CircuitBreakerStorage

State = Literal["closed", "open", "half-open"]
Mode = Literal["enforce", "shadow"]
"""``shadow``: everything is counted and told, and nobody is refused."""
Outcome = Literal["ok", "failed", "neutral"]
"""``neutral``: a call that says nothing about the ad server."""

BUCKETS: Final = 10
"""Parts of the window: a call is forgotten between nine tenths of it and the whole."""
SLACK: Final = 1e-9
"""Calls: in floats 0.07 * 100 is more than 7, and seven of a hundred are 7 %."""


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When a breaker opens, and for how long. Times are in seconds, rates from 0 to 1."""

    mode: Mode = "enforce"
    fail_max: int = 5
    """Failures in a row that open it."""
    failure_rate: float = 0.5
    """Share of failures that opens it, from *min_calls* within *window* on."""
    min_calls: int = 20
    window: float = 10.0
    slow_call: float | None = None
    """From when on a call is slow; None: none is."""
    slow_call_rate: float = 0.5
    """Share of slow calls that opens it, likewise."""
    reset_timeout: float = 60.0
    """How long it stays open before a probe goes out."""
    max_reset_timeout: float = 300.0
    """What that grows to, before the jitter; never less than *reset_timeout*."""
    success_threshold: int = 2
    """Good probes that close it."""

    def __post_init__(self) -> None:
        for name in ("failure_rate", "slow_call_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is no share (write 0.5 for half)")
        for name in ("fail_max", "min_calls", "success_threshold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too few (write 1 or more)")
        for name in ("window", "slow_call", "reset_timeout", "max_reset_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name}: {seconds} is no time (write seconds above 0)")


@dataclass(slots=True)
class Counts:
    """Calls of one part of the window, or of all."""

    calls: int = 0
    failures: int = 0
    slow: int = 0
    cut_off: int = 0
    """Slow calls that were neutral: slow for certain, and no calls otherwise."""


class Window:
    """Counts the calls of the last *seconds*; *now* is when it begins."""

    def __init__(self, seconds: float, now: float) -> None:
        self.total = Counts()
        self._width = seconds / BUCKETS
        self._ring = [Counts() for _ in range(BUCKETS)]
        self._at = 0
        self._ends = now + self._width

    def add(self, now: float, outcome: Outcome, *, slow: bool) -> None:
        """Count a call that ended."""
        if now >= self._ends:
            self.turn(now)
        for each in (self._ring[self._at], self.total):
            if outcome == "neutral":
                each.cut_off += slow
            else:
                each.calls += 1
                each.failures += outcome == "failed"
            each.slow += slow

    def turn(self, now: float) -> None:
        """Forget what is too old."""
        parts = int((now - self._ends) / self._width) + 1 if now >= self._ends else 0
        for _ in range(min(parts, BUCKETS)):
            self._at = (self._at + 1) % BUCKETS
            old, self._ring[self._at] = self._ring[self._at], Counts()
            self.total.calls -= old.calls
            self.total.failures -= old.failures
            self.total.slow -= old.slow
            self.total.cut_off -= old.cut_off
        self._ends += parts * self._width

    def clear(self) -> None:
        """Forget all."""
        self._ring = [Counts() for _ in range(BUCKETS)]
        self.total = Counts()


class Facts(CircuitBreakerStorage):
    """
    What pybreaker asks for: the state, and counts that follow rules of ours.

    It opens when ``counter`` reaches ``fail_max``, so each rule of *settings* is told by that.
    """

    def __init__(self, settings: BreakerSettings, now: float) -> None:
        super().__init__("vastproxy")
        self.current: State = "closed"
        self.epoch = 0
        self.in_a_row = 0
        self.window = Window(settings.window, now)
        self._settings = settings
        self._good = 0

    def broken_rule(self) -> Literal["", "in_a_row", "failures", "slow"]:
        """Say which rule opens the breaker; empty while none does."""
        settings, total = self._settings, self.window.total
        if self.in_a_row >= settings.fail_max:
            return "in_a_row"
        if _is_share(total.failures, total.calls, settings.failure_rate, settings.min_calls):
            return "failures"
        timed = total.calls + total.cut_off
        if _is_share(total.slow, timed, settings.slow_call_rate, settings.min_calls):
            return "slow"
        return ""

    @property
    def counter(self) -> int:
        """As many as pybreaker needs to open, or fewer."""
        return self._settings.fail_max if self.broken_rule() else 0

    def increment_counter(self) -> None:
        """Count a failure."""
        self.in_a_row += 1

    def reset_counter(self) -> None:
        """Forget failures: pybreaker asks for that after a good probe, and when it closes."""
        self.in_a_row = 0
        self.window.clear()

    @property
    def success_counter(self) -> int:
        """Good probes."""
        return self._good

    def increment_success_counter(self) -> None:
        """Count a good probe."""
        self._good += 1

    def reset_success_counter(self) -> None:
        """Forget good probes."""
        self._good = 0

    @property
    def state(self) -> str:
        """The state that pybreaker is in."""
        return self.current

    @state.setter
    def state(self, state: str) -> None:
        self.current = cast("State", state)
        self.epoch += 1

    @property
    def opened_at(self) -> None:
        """Nothing: the wall clock's word is not taken."""

    @opened_at.setter
    def opened_at(self, _: object) -> None:
        """Take no date."""


def _is_share(part: int, whole: int, rate: float, least: int) -> bool:
    # Nothing is a share of nothing, even where one call is enough.
    return part > 0 and whole >= least and part >= rate * whole - SLACK
