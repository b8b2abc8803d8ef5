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
from dataclasses import dataclass, field
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

MAX_HOPS_IN_FLIGHT = 1000
"""Calls of all sites together; beyond it a hop fails at once, and is nobody's fault."""

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
    made_up: bool = False
    """Whether a stranger named the host."""


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
    """How many calls are under way."""

    now: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What a guard remembers of its calls."""

    crowd: Crowd = field(default_factory=Crowd)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    calls: Counter[str] = field(default_factory=Counter)
    """By what came of them."""


class Guard:
    """
    What stands around the calls called *name*.

    *telling* hears of each. *hops* counts the calls of all sites, and says that this is one of
    them: they are told under one name, HOPS. *record* is that of the guard in whose place this one
    comes.
    """

    def __init__(  # noqa: PLR0913 - all of them what a guard is made of
        self,
        name: str,
        settings: GuardSettings,
        *,
        rate: Rate | None = None,
        breaker: UpstreamBreaker | None = None,
        telling: Telling | None = None,
        hops: Crowd | None = None,
        record: Record | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.rate = rate
        self.breaker = breaker
        if breaker is None and settings.breaker is not None:
            self.breaker = UpstreamBreaker(name, settings.breaker)
        self._telling: Telling = Silence() if telling is None else telling
        self.label = name if hops is None else HOPS
        """What numbers call it."""
        self._hops = Crowd() if hops is None else hops
        self._retries = RetryBudget(settings.retry_share)
        # Calls that are under way outlive a reload, and are as many as before.
        self.record = Record() if record is None else record
        self._crowd = self.record.crowd
        self.calls = self.record.calls
        """By what came of them."""

    @property
    def in_flight(self) -> int:
        """How many calls are under way."""
        return self._crowd.now

    async def ask(self, call: Call) -> HopReply:
        """
        Make *call*, if it may be made; again, where nothing was sent and the budget allows.

        Raises UpstreamRefusedError where it may not be made, and what the call raises.
        """
        try:
            return await self._ask(call, again=False)
        except UpstreamConnectError as error:
            failure = error
        for _ in range(self.settings.attempts):
            if not self._may_repeat(failure, call):
                break
            self.calls["retried"] += 1
            self._telling.retried(self.label)
            try:
                return await self._ask(call, again=True)
            except UpstreamRefusedError:
                break  # the failure says more
            except UpstreamConnectError as error:
                failure = error
        try:
            raise failure
        finally:
            del failure  # its traceback has this frame

    def _may_repeat(self, error: UpstreamConnectError, call: Call) -> bool:
        if error.local or not call.fair() or self._refuses():
            return False
        return self._retries.spend()

    def _refuses(self) -> bool:
        """Whether the breaker would refuse a call, as far as can be said without asking it."""
        return self.breaker is not None and self.breaker.leaves_alone()

    async def _ask(self, call: Call, *, again: bool) -> HopReply:
        self._check_room()
        # Counted before anything is waited for: else a crowd passes the bound meanwhile.
        self._crowd.now += 1
        self._hops.now += 1
        try:
            if not self._refuses():
                await self._take_turn()
            fair = call.fair()
            ticket = self._admit(call.trace)
            if not again:
                self._retries.save()
            return await self._make(call, ticket, fair=fair)
        finally:
            self._crowd.now -= 1
            self._hops.now -= 1

    async def _make(self, call: Call, ticket: Ticket | None, *, fair: bool) -> HopReply:
        began = perf_counter()
        judged = NEUTRAL
        try:
            reply = await call.make()
            judged = of_reply(reply, time.time())
        except BaseException as error:
            judged = of_error(error, fair=fair, made_up=call.made_up)
            raise
        finally:
            self._settle(ticket, self._once(judged, call.trace), perf_counter() - began, call.trace)
        return reply

    def _once(self, judged: Judgement, trace: Trace) -> Judgement:
        """Take one failure of a site for an ad request, and no more: a pod may name it often."""
        if judged.outcome != "failed" or self.label != HOPS:
            return judged
        if self.name in trace.blamed:
            return NEUTRAL
        trace.blamed.add(self.name)
        return judged

    def _check_room(self) -> None:
        most = self.settings.max_in_flight
        if self._crowd.now >= most:
            problem = f"{most} calls of {self.name} are under way"
        elif self._hops.now >= MAX_HOPS_IN_FLIGHT and self.label == HOPS:
            problem = f"{MAX_HOPS_IN_FLIGHT} calls of hops are under way"
        else:
            return
        self._refuse("busy")
        raise UpstreamRefusedError(problem, by="busy", of=self.name)

    async def _take_turn(self) -> None:
        if self.rate is not None and not await self.rate.take():
            self._refuse("rate_limit")
            what = f"{self.name} may be asked {how_often(self.rate.rate)}"
            raise UpstreamRefusedError(what, by="rate_limit", of=self.name)

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
            self.record.seconds.append(seconds)
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
            "latency_ms": latencies(self.record.seconds),
        }

    def __repr__(self) -> str:
        return f"<Guard {self.name}, in flight: {self.in_flight}, {self.breaker!r}, {self.rate!r}>"


_TOLD = ("ok", "failed", "neutral", "retried", "breaker", "rate_limit", "busy")


def how_often(rate: float) -> str:
    """Give *rate*, in times a second, as a person would say it."""
    if rate == 1:
        return "once a second"
    # No exponents: there may be a million a second.
    number = f"{round(rate if rate > 1 else 1 / rate, 2):.10g}"
    return f"{number} times a second" if rate > 1 else f"once in {number} s"


def latencies(seconds: Iterable[float]) -> dict[str, float] | None:
    """Give the median, the 90th and the 99th percentile of *seconds*, in ms; None for none."""
    values = sorted(seconds)
    if not values:
        return None
    # The nearest rank: a thousand sites are told at once, and nobody wants more.
    last = len(values) - 1
    p50, p90, p99 = (round(values[round(last * at)] * 1000, 1) for at in (0.5, 0.9, 0.99))
    return {"p50": p50, "p90": p90, "p99": p99, "calls": len(values)}
