"""
What stands around the HTTP calls of one ad server: a bound, a rate, a circuit breaker.

Rule 1: the order is bound, rate, breaker, call. None of them waits: who is refused is told at once,
and the next upstream is asked.
Rule 2: every call is settled, also one that is cut off.
Rule 3: a call goes out again only where nothing was sent, within a budget and in time.
"""

import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, Protocol

from vastproxy.errors import UpstreamConnectError, UpstreamRefusedError
from vastproxy.model import HopReply
from vastproxy.observe.trace import Trace
from vastproxy.upstream.blame import NEUTRAL, Judgement, of_error, of_reply
from vastproxy.upstream.breaker import Ticket, UpstreamBreaker
from vastproxy.upstream.limiter import LocalRate, Rate
from vastproxy.upstream.window import BreakerSettings

HOPS = "(hops)"
"""What numbers call all the sites that the configuration does not name, together."""

KEPT_CALLS = 512
"""Of a guard: the newest, for their times."""

MAX_SAVED_RETRIES = 10.0
"""Retries that a quiet time lets grow."""

Result = Literal["ok", "failed", "neutral", "breaker", "rate_limit", "busy"]


@dataclass(frozen=True, slots=True)
class RateSettings:
    """How often an upstream is asked."""

    rate: float
    """Calls a second."""
    burst: int
    shared: bool = False


def local_rate(_: str, settings: RateSettings) -> Rate:
    """Make a limiter for this process alone."""
    return LocalRate(settings.rate, settings.burst)


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """What stands around the calls of one place. The default lets everything through."""

    breaker: BreakerSettings | None = None
    """None: there is none."""
    rate: RateSettings | None = None
    max_in_flight: int = 1_000_000
    attempts: int = 0
    """How often a call may go out again when nothing was sent."""
    retry_share: float = 0.1
    """How many of its calls may be such repetitions."""
    about: str = ""
    """What it leads to, for people; a change of it begins anew."""
    share_quorum: int = 0
    """How many instances must agree that it is down; 0: each decides for itself."""


class Telling(Protocol):
    """Who hears what guards do: metrics, and the log."""

    def upstream_called(self, upstream: str, result: Result, seconds: float | None) -> None:
        """Count a call, or that there was none."""

    def breaker_changed(self, upstream: str, old: str, new: str) -> None:
        """Take note of a breaker's state."""

    def retried(self, upstream: str) -> None:
        """Count a call that went out again."""


class Silence:
    """Nobody hears anything."""

    def upstream_called(self, upstream: str, result: Result, seconds: float | None) -> None:
        """Say nothing."""

    def breaker_changed(self, upstream: str, old: str, new: str) -> None:
        """Say nothing."""

    def retried(self, upstream: str) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call, ready to be made."""

    make: Callable[[], Awaitable[HopReply]]
    trace: Trace
    fair: Callable[[], bool]
    """Tells, before it is made, whether it has a fair time to be answered."""


class RetryBudget:
    """
    How many repetitions may be made: *share* of the calls, so that an outage is not made worse.

    After Finagle's retry budgets: each call puts a share of a retry aside, each retry takes one.
    """

    __slots__ = ("_saved", "_share")

    def __init__(self, share: float) -> None:
        self._share = share
        self._saved = 1.0 if share else 0.0

    def save(self) -> None:
        """Take note of a call that is no repetition."""
        self._saved = min(MAX_SAVED_RETRIES, self._saved + self._share)

    def spend(self) -> bool:
        """Take a retry, if there is one."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True

    def __repr__(self) -> str:
        return f"<RetryBudget {self._saved:.1f} left>"


@dataclass(slots=True)
class Crowd:
    """How many calls are under way, of several guards together."""

    most: int
    now: int = 0


class Guard:
    """
    What stands around the calls called *name*.

    *telling* hears of each. *crowd* is what it shares with other guards, all of which are told
    under one name: HOPS.
    """

    def __init__(
        self,
        name: str,
        settings: GuardSettings,
        *,
        rate: Rate | None = None,
        breaker: UpstreamBreaker | None = None,
        telling: Telling | None = None,
        crowd: "Crowd | None" = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.rate = rate
        self.breaker = breaker
        if breaker is None and settings.breaker is not None:
            self.breaker = UpstreamBreaker(name, settings.breaker)
        self._telling: Telling = Silence() if telling is None else telling
        self.label = HOPS if crowd else name
        """What numbers call it."""
        self._crowd = crowd or Crowd(settings.max_in_flight)
        self._retries = RetryBudget(settings.retry_share)
        self._seconds: deque[float] = deque(maxlen=KEPT_CALLS)
        self.calls: Counter[str] = Counter()
        """By what came of them."""
        self.in_flight = 0

    async def ask(self, call: Call) -> HopReply:
        """
        Make *call*, if it may be made; again, where nothing was sent and the budget allows.

        Raises UpstreamRefusedError where it may not be made, and what the call raises.
        """
        self._retries.save()
        for _ in range(self.settings.attempts):
            try:
                return await self._ask(call)
            except UpstreamConnectError as error:
                if error.local or not call.fair() or not self._retries.spend():
                    raise
                self.calls["retried"] += 1
                self._telling.retried(self.label)
                if self._is_refused():
                    raise
        return await self._ask(call)

    def _is_refused(self) -> bool:
        """Whether a repetition would be refused: then the failure itself says more."""
        return self.breaker is not None and self.breaker.state == "open"

    async def _ask(self, call: Call) -> HopReply:
        self._check_room()
        await self._take_turn()
        fair = call.fair()
        ticket = self._admit(call.trace)
        self.in_flight += 1
        self._crowd.now += 1
        began = perf_counter()
        judged = NEUTRAL
        try:
            reply = await call.make()
            judged = of_reply(reply, time.time())
        except BaseException as error:
            judged = of_error(error, fair=fair)
            raise
        finally:
            self.in_flight -= 1
            self._crowd.now -= 1
            self._settle(ticket, judged, perf_counter() - began, call.trace)
        return reply

    def _check_room(self) -> None:
        most = self.settings.max_in_flight
        if self.in_flight < most and self._crowd.now < self._crowd.most:
            return
        self._refuse("busy")
        here = self.in_flight >= most
        number, whose = (most, self.name) if here else (self._crowd.most, "hops together")
        raise UpstreamRefusedError(f"{number} calls of {whose} are under way", by="busy")

    async def _take_turn(self) -> None:
        if self.rate is not None and not await self.rate.take():
            self._refuse("rate_limit")
            what = f"{self.name} may be asked {self.rate.rate:g} times a second"
            raise UpstreamRefusedError(what, by="rate_limit")

    def _admit(self, trace: Trace) -> Ticket | None:
        if self.breaker is None:
            return None
        try:
            ticket = self.breaker.admit()
        except UpstreamRefusedError:
            self._refuse("breaker")
            raise
        if ticket.changes:
            trace.changes.extend(ticket.changes)
        if ticket.refused:
            trace.shadowed.append(f"{self.name}: {ticket.reason}")
        return ticket

    def _refuse(self, by: Literal["breaker", "rate_limit", "busy"]) -> None:
        self.calls[by] += 1
        self._telling.upstream_called(self.label, by, None)

    def _settle(
        self, ticket: Ticket | None, judged: Judgement, seconds: float, trace: Trace
    ) -> None:
        self.calls[judged.outcome] += 1
        if judged.outcome != "neutral":
            self._seconds.append(seconds)
        self._telling.upstream_called(self.label, judged.outcome, seconds)
        if ticket is None or self.breaker is None:
            return
        changes = self.breaker.settle(
            ticket,
            judged.outcome,
            seconds=seconds,
            reason=judged.reason,
            retry_after=judged.retry_after,
        )
        if changes:
            trace.changes.extend(changes)

    def told(self) -> dict[str, object]:
        """Say all there is to say, in values that JSON knows."""
        rate = self.rate
        return {
            "name": self.name,
            "endpoint": self.settings.about,
            "breaker": None if self.breaker is None else self.breaker.told(),
            "rate_limit": None
            if rate is None
            else {
                "rate": rate.rate,
                "burst": rate.burst,
                "shared": rate.shared,
                "refused": rate.refused,
            },
            "in_flight": self.in_flight,
            "max_in_flight": self.settings.max_in_flight,
            "calls": {each: self.calls[each] for each in _TOLD},
            "latency_ms": latencies(self._seconds),
        }

    def __repr__(self) -> str:
        return f"<Guard {self.name}, in flight: {self.in_flight}, {self.breaker!r}, {self.rate!r}>"


_TOLD = ("ok", "failed", "neutral", "retried", "breaker", "rate_limit", "busy")


def latencies(seconds: Iterable[float]) -> dict[str, float] | None:
    """Give the median, the 90th and the 99th percentile of *seconds*, in ms; None for none."""
    values = sorted(seconds)
    if not values:
        return None
    # The nearest rank: a thousand sites are told at once, and nobody wants more.
    last = len(values) - 1
    p50, p90, p99 = (round(values[round(last * at)] * 1000, 1) for at in (0.5, 0.9, 0.99))
    return {"p50": p50, "p90": p90, "p99": p99, "calls": len(values)}
