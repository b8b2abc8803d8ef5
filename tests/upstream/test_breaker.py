"""
A circuit breaker: what opens it, who is let through, and what closes it.

The traps are those of pybreaker used by itself under asyncio.
"""

import asyncio
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, cast

import pybreaker
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from vastproxy.errors import UpstreamRefusedError
from vastproxy.observe.trace import BreakerChange
from vastproxy.upstream.breaker import Ticket, UpstreamBreaker
from vastproxy.upstream.window import BreakerSettings, Outcome, State

NO_RULE = 10_000
"""More calls than a test makes: as ``min_calls`` or ``fail_max`` it leaves a rule out."""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Give the time."""
        return self.now


class Heard(list[BreakerChange]):
    """Takes down what it is told, and gives it as text."""

    def texts(self) -> list[str]:
        """Give all that was told."""
        return [str(each) for each in self]


@dataclass
class Driven:
    """A breaker, the clock that it goes by, and who listens to it."""

    breaker: UpstreamBreaker
    clock: Clock
    heard: Heard

    def call(self, outcome: Outcome = "ok", seconds: float = 0.0, **more: Any) -> str:
        """Make a call that ends so, at once; say the state after it, or that it was refused."""
        try:
            ticket = self.breaker.admit()
        except UpstreamRefusedError:
            return "refused"
        self.breaker.settle(ticket, outcome, seconds=seconds, **more)
        return self.breaker.state

    def calls(self, letters: str) -> list[str]:
        """Make a call for each letter: o is ok, f failed, n neutral."""
        outcomes: dict[str, Outcome] = {"o": "ok", "f": "failed", "n": "neutral"}
        return [self.call(outcomes[each]) for each in letters]

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.now += seconds

    def refusal(self) -> str:
        """Say why a call is refused now."""
        with pytest.raises(UpstreamRefusedError) as caught:
            self.breaker.admit()
        assert "breaker" == caught.value.by
        return caught.value.reason

    def told(self, *names: str) -> Any:
        """Give what is told under *names*, one within the other."""
        value: Any = self.breaker.told()
        for each in names:
            value = value[each]
        return value

    def window(self) -> float:
        """Give the seconds until the next probe."""
        return cast("float", self.told("retry_in_seconds"))

    def fail_a_probe(self, **more: Any) -> float:
        """Wait for the probe, let it fail, and give the seconds until the next."""
        self.wait(self.window() + 0.001)
        assert "open" == self.call("failed", **more)
        return round(self.window(), 2)


def a_breaker(random: Callable[[], float] = lambda: 0.5, **changes: Any) -> Driven:
    """Build a breaker without jitter, with the usual settings but for *changes*."""
    clock, heard = Clock(), Heard()
    breaker = UpstreamBreaker(
        "main", BreakerSettings(**changes), clock=clock, random=random, listener=heard.append
    )
    return Driven(breaker, clock, heard)


def an_open_breaker(random: Callable[[], float] = lambda: 0.5, **changes: Any) -> Driven:
    """Build one that has just opened."""
    driven = a_breaker(random, **{"fail_max": 1, **changes})
    assert "open" == driven.call("failed")
    return driven


def a_half_open_breaker(**changes: Any) -> Driven:
    """Build one that waits for its next probe in the state half-open."""
    driven = an_open_breaker(**changes)
    driven.wait(61)
    assert "half-open" == driven.call("neutral")
    return driven


# --- What opens it -------------------------------------------------------------------------------


def test_failures_in_a_row() -> None:
    """The fifth failure in a row opens it, and who asks then is told why and for how long."""
    driven = a_breaker()
    assert ["closed"] * 4 + ["open", "refused"] == driven.calls("ffffff")
    driven.wait(12)

    assert (
        "the breaker is open since 12 s: 5 failures in a row; the next probe is in 48 s"
        == driven.refusal()
    )
    assert ["main closed->open: 5 failures in a row"] == driven.heard.texts()


def test_last_failure_is_told() -> None:
    """The reason for which it opened names what the last failure was, not at any length."""
    driven = a_breaker(fail_max=2)
    driven.call("failed", reason="no answer")
    driven.call("failed", reason="HTTP status 503" + "!" * 1000)

    reason = driven.told("reason")
    assert reason.startswith("2 failures in a row, the last: HTTP status 503!")
    assert len(reason) < 300


def test_success_begins_a_new_row() -> None:
    """Failures with a success between them are not in a row, however many there are."""
    driven = a_breaker(min_calls=NO_RULE)

    assert {"closed"} == set(driven.calls("ffffo" * 100))
    assert 0 == driven.told("failures_in_a_row")


def test_neutral_does_not_break_a_row() -> None:
    """A neutral call between failures is as if it had not been made."""
    driven = a_breaker()

    assert "open" == driven.calls("ffnnfnfnf")[-1]


def test_row_may_be_slow() -> None:
    """Failures in a row open it at any distance: so it is with an upstream that is asked seldom."""
    driven = a_breaker()
    for _ in range(5):
        driven.wait(3600)
        driven.call("failed")

    assert "open" == driven.breaker.state


def test_failure_rate() -> None:
    """Half of twenty calls that failed within the window open it, and not one call sooner."""
    driven = a_breaker()

    assert ["closed"] * 19 + ["open"] == driven.calls("of" * 10)
    assert "10 of 20 calls failed within 10 s" == driven.told("reason")


def test_failure_rate_is_met_by_a_success() -> None:
    """The rule looks at every call that is counted: it may be a good one that makes them enough."""
    driven = a_breaker()

    assert ["closed"] * 19 + ["open"] == driven.calls("fo" * 10)


def test_below_the_failure_rate() -> None:
    """One failure in five is no reason to open, however long it goes on."""
    driven = a_breaker()

    assert {"closed"} == set(driven.calls("foooo" * 200))


def test_rates_are_exact() -> None:
    """Seven of a hundred are 7 %, though 0.07 * 100 is more than 7 for a computer."""
    for percent in range(1, 101):
        driven = a_breaker(fail_max=NO_RULE, min_calls=100, failure_rate=percent / 100)
        one_less = a_breaker(fail_max=NO_RULE, min_calls=100, failure_rate=percent / 100)
        states = driven.calls("f" * (percent - 1) + "o" * (100 - percent) + "f")

        assert ["closed"] * 99 + ["open"] == states
        assert "closed" == one_less.calls("f" * (percent - 1) + "o" * (101 - percent))[-1]


def test_window_slides() -> None:
    """What is older than the window is not counted: the tenth part of it that is too old goes."""
    driven = a_breaker(fail_max=NO_RULE, min_calls=4)
    driven.calls("fff")
    driven.wait(9)
    assert 3 == driven.told("window", "failures")
    driven.wait(1)
    assert 0 == driven.told("window", "failures")

    assert ["closed"] * 3 == driven.calls("fff")
    driven.wait(9.5)
    assert ["open"] == driven.calls("f")


@given(
    calls=st.lists(
        st.tuples(st.integers(0, 12) | st.sampled_from([36, 39, 40, 44, 4000]), st.booleans())
    )
)
def test_window_is_ten_parts(calls: list[tuple[int, bool]]) -> None:
    """What ended in this tenth of the window, or in the nine before, is counted, and no other."""
    driven = a_breaker(fail_max=NO_RULE, min_calls=NO_RULE)
    ended: list[tuple[int, bool]] = []
    for quarters, failed in calls:
        driven.wait(quarters / 4)
        second = int(driven.clock.now - 1000.0)
        ended.append((second, failed))
        driven.call("failed" if failed else "ok")
        recent = [each for at, each in ended if second - at < 10]

        assert len(recent) == driven.told("window", "calls")
        assert sum(recent) == driven.told("window", "failures")


def test_window_after_a_long_time() -> None:
    """However long nobody asked, the window is empty and goes on."""
    driven = a_breaker(fail_max=NO_RULE)
    driven.calls("ffo")
    driven.wait(1e7)
    driven.calls("o")

    expected = {"seconds": 10.0, "calls": 1, "failures": 0, "slow": 0, "cut_off": 0}
    assert expected == driven.told("window")


def test_slow_calls() -> None:
    """Half of twenty calls that took too long open it, though all of them were answered."""
    driven = a_breaker(slow_call=2.0)
    states = [driven.call("ok", seconds) for seconds in (1.9, 2.0) * 10]

    assert ["closed"] * 19 + ["open"] == states
    assert "10 of 20 calls took 2 s or longer within 10 s" == driven.told("reason")


def test_no_call_is_slow() -> None:
    """Without a limit no call is slow."""
    driven = a_breaker()

    assert "closed" == [driven.call("ok", 1000.0) for _ in range(100)][-1]
    assert 0 == driven.told("window", "slow")


def test_hanging_primary() -> None:
    """Calls that were cut off only after the limit are slow for certain, and nothing else."""
    driven = a_breaker(slow_call=0.3)
    for _ in range(19):
        driven.call("neutral", 0.3)
    window = {"seconds": 10.0, "calls": 0, "failures": 0, "slow": 19, "cut_off": 19}
    assert window == driven.told("window")
    assert 0 == driven.told("failures_in_a_row")

    assert "open" == driven.call("neutral", 0.3)
    assert "20 of 20 calls took 300 ms or longer within 10 s" == driven.told("reason")


def test_cut_off_calls_are_no_successes() -> None:
    """Slow neutral calls neither thin out a failure rate nor break a row of failures."""
    driven = a_breaker(slow_call=1.0, slow_call_rate=1.0, fail_max=3, min_calls=NO_RULE)
    driven.calls("ff")
    driven.call("neutral", 5.0)

    assert "open" == driven.call("failed")


def test_slow_failure_counts_twice() -> None:
    """A failure that took too long is a failure, and slow."""
    driven = a_breaker(slow_call=1.0)
    driven.call("failed", 1.5)

    window = {"seconds": 10.0, "calls": 1, "failures": 1, "slow": 1, "cut_off": 0}
    assert window == driven.told("window")


def test_ten_thousand_neutral_calls() -> None:
    """Neutral calls leave it closed, with nothing counted."""
    driven = a_breaker(fail_max=1, min_calls=1, slow_call=1.0)
    driven.calls("n" * 10_000)

    assert "closed" == driven.breaker.state
    window = {"seconds": 10.0, "calls": 0, "failures": 0, "slow": 0, "cut_off": 0}
    assert window == driven.told("window")


# --- How long it stays open ----------------------------------------------------------------------


def test_windows_grow() -> None:
    """The first three windows in a row are alike, each one after that is twice the one before."""
    driven = an_open_breaker()
    windows = [round(driven.window(), 2), *(driven.fail_a_probe() for _ in range(7))]

    assert [60.0, 60.0, 60.0, 120.0, 240.0, 300.0, 300.0, 300.0] == windows
    assert 300.0 == driven.told("reset_timeout")


def test_windows_never_end_to_grow_in_number() -> None:
    """An ad server that is gone for good is probed for ever."""
    driven = an_open_breaker(max_reset_timeout=61.0)

    assert [61.0] * 2000 == [driven.fail_a_probe() for _ in range(2002)][2:]


def test_closing_ends_the_back_off() -> None:
    """After it was closed the windows begin anew."""
    driven = an_open_breaker()
    for _ in range(5):
        driven.fail_a_probe()
    driven.wait(301)
    assert ["half-open", "closed"] == driven.calls("oo")
    assert 60.0 == driven.told("reset_timeout")
    driven.call("failed")

    assert [60.0] * 3 == [driven.window(), driven.fail_a_probe(), driven.fail_a_probe()]


@given(draw=st.floats(0.0, 1.0, exclude_max=True))
def test_jitter(draw: float) -> None:
    """A window is shorter or longer than it is told, by a tenth at the most."""
    driven = an_open_breaker(lambda: draw)

    assert 60 * (0.9 + 0.2 * draw) == pytest.approx(driven.window(), abs=0.001)


def test_longest_time_is_never_below_the_usual() -> None:
    """Where only the usual time is written, and is longer than the longest, it holds."""
    driven = an_open_breaker(reset_timeout=600.0)

    assert [600.0] * 5 == [driven.window(), *(driven.fail_a_probe() for _ in range(4))]


def test_retry_after() -> None:
    """An ad server that asks to be left alone is, also if it said so before the last failure."""
    driven = a_breaker(fail_max=2)
    driven.call("failed", retry_after=120.0)
    driven.wait(10)
    driven.call("failed")

    assert 110.0 == driven.window()


def test_longest_retry_after() -> None:
    """Of several times that the ad server asked for the one that ends last holds."""
    driven = a_breaker(fail_max=3, reset_timeout=1.0)
    driven.call("failed", retry_after=5.0)
    driven.call("failed", retry_after=9.0)
    driven.call("failed", retry_after=2.0)

    assert 9.0 == driven.window()


def test_retry_after_of_any_length() -> None:
    """A few seconds hold as well, where they are more than the usual time."""
    driven = a_breaker(fail_max=1, reset_timeout=1.0)
    driven.call("failed", retry_after=1.5)

    assert 1.5 == driven.window()


def test_retry_after_is_no_order() -> None:
    """It is left alone no longer than the longest time, whatever it asked for."""
    for asked in (301.0, 1e12, float("inf")):
        driven = an_open_breaker()
        assert 300.0 == driven.fail_a_probe(retry_after=asked)


def test_short_retry_after() -> None:
    """A shorter time than the usual, or nonsense, changes nothing."""
    for asked in (0.0, 1.0, -100.0, float("nan"), float("-inf")):
        driven = an_open_breaker()
        assert 60.0 == driven.fail_a_probe(retry_after=asked)


def test_jitter_does_not_shorten_retry_after() -> None:
    """The time that the ad server asked for is waited for in full."""
    driven = a_breaker(lambda: 0.0, fail_max=1)
    driven.call("failed", retry_after=60.0)

    assert 60.0 == driven.window()


def test_retry_after_is_forgotten() -> None:
    """What was asked for before it was closed holds no longer, nor what is over."""
    driven = a_breaker(fail_max=1)
    driven.call("failed", retry_after=300.0)
    driven.breaker.close("by hand")
    driven.call("failed")
    assert 60.0 == driven.window()

    driven = a_breaker(fail_max=2)
    driven.call("failed", retry_after=100.0)
    driven.wait(200)
    driven.call("failed")
    assert 60.0 == driven.window()


# --- Probes --------------------------------------------------------------------------------------


def test_recovery() -> None:
    """After the window one call at a time goes out, and two good ones close it."""
    driven = an_open_breaker()
    driven.wait(59.9)
    assert "the next probe is in 100 ms" in driven.refusal()
    driven.wait(0.1)
    probe = driven.breaker.admit()
    assert probe.probe
    driven.wait(2)
    assert (
        "the breaker is half-open since 2 s: after 60 s a probe goes out; a probe is under way"
        == driven.refusal()
    )
    assert () == driven.breaker.settle(probe, "ok")
    assert "closed" == driven.call("ok")

    assert [
        "main closed->open: 1 failure in a row",
        "main open->half-open: after 60 s a probe goes out",
        "main half-open->closed: 2 good probes",
    ] == driven.heard.texts()


def test_changes_are_given() -> None:
    """Who caused a change is given it: on admission with the ticket, on settlement as its value."""
    driven = a_breaker(fail_max=1, success_threshold=1)
    opened = driven.breaker.settle(driven.breaker.admit(), "failed")
    driven.wait(60)
    probe = driven.breaker.admit()
    closed = driven.breaker.settle(probe, "ok")

    assert list(driven.heard) == [*opened, *probe.changes, *closed]
    assert ["open", "half-open", "closed"] == [each.new for each in driven.heard]


def test_state_stays_open_while_nobody_asks() -> None:
    """Time alone does not change the state: the call that comes is the probe."""
    driven = an_open_breaker()
    driven.wait(1000)

    assert "open" == driven.breaker.state
    assert 0.0 == driven.window()


def test_failed_probe() -> None:
    """A probe that fails opens it again, and says so."""
    driven = an_open_breaker()
    driven.wait(60)

    assert "open" == driven.call("failed", reason="HTTP status 500")
    assert "the probe failed: HTTP status 500" == driven.told("reason")
    assert 2 == driven.told("failures_in_a_row")
    assert "refused" == driven.call()


def test_failed_second_probe() -> None:
    """Good probes count only in a row: one that fails opens it again, after all."""
    driven = an_open_breaker(success_threshold=3)
    driven.wait(60)
    assert ["half-open", "half-open", "open"] == driven.calls("oof")
    driven.wait(60)

    assert ["half-open", "half-open", "closed"] == driven.calls("ooo")


@pytest.mark.parametrize("outcome", ["ok", "neutral"])
def test_slow_probe(outcome: Outcome) -> None:
    """A probe that took too long has failed, also if it was cut off for a quicker fallback."""
    driven = an_open_breaker(slow_call=0.5)
    driven.wait(60)

    assert "open" == driven.call(outcome, 0.5)
    assert "the probe took 500 ms" == driven.told("reason")


def test_neutral_probe() -> None:
    """A neutral probe decides nothing, and the next call is the probe."""
    driven = an_open_breaker()
    driven.wait(60)

    assert ["half-open"] * 100 == driven.calls("n" * 100)
    assert not driven.told("probing")
    assert driven.breaker.admit().probe


def test_permission_to_probe() -> None:
    """Where another instance is to probe, none goes out from here, and it stays open."""
    driven = an_open_breaker()
    asked: list[int] = []

    def may_probe() -> bool:
        asked.append(1)
        return False

    driven.breaker.may_probe = may_probe
    driven.wait(59)
    driven.refusal()
    assert [] == asked

    driven.wait(1)
    assert driven.refusal().endswith("; the next probe is another instance's")
    assert [1] == asked
    assert "open" == driven.breaker.state
    assert repr(driven.breaker)
    assert driven.told()
    assert [1] == asked


def test_old_failures_are_gone_after_recovery() -> None:
    """A breaker that has closed counts from nothing: one failure does not open it again."""
    driven = a_breaker(fail_max=2, reset_timeout=1.0, window=600.0, min_calls=2)
    driven.calls("ff")
    driven.wait(1)

    assert ["half-open", "closed", "closed"] == driven.calls("oof")


# --- Tickets -------------------------------------------------------------------------------------


def test_stragglers() -> None:
    """Calls that began before it opened change nothing when they fail after it."""
    driven = a_breaker()
    tickets = [driven.breaker.admit() for _ in range(105)]
    for each in tickets[:5]:
        driven.breaker.settle(each, "failed")
    before = driven.told()
    for each in tickets[5:]:
        driven.breaker.settle(each, "failed", retry_after=300.0)

    assert before == driven.told()
    assert 1 == len(driven.heard)
    driven.wait(60)
    assert "half-open" == driven.call()


def test_stragglers_at_half_open() -> None:
    """Old calls neither open nor close it while it is half-open, nor end a probe of others."""
    driven = a_breaker(fail_max=1)
    old = [driven.breaker.admit() for _ in range(10)]
    driven.call("failed")
    driven.wait(60)
    stale_probe = driven.breaker.admit()
    driven.breaker.close("by hand")
    driven.call("failed")
    driven.wait(60)
    probe = driven.breaker.admit()
    for each in [*old, stale_probe]:
        driven.breaker.settle(each, "failed")

    assert probe.probe
    assert "half-open" == driven.breaker.state
    assert driven.refusal().endswith("a probe is under way")


def test_settled_twice() -> None:
    """Of several settlements of one ticket the first counts."""
    driven = a_breaker(fail_max=2)
    ticket = driven.breaker.admit()
    for _ in range(10):
        driven.breaker.settle(ticket, "failed")
    assert 1 == driven.told("failures_in_a_row")

    driven = a_half_open_breaker()
    probe = driven.breaker.admit()
    driven.breaker.settle(probe, "neutral")
    assert driven.breaker.admit().probe
    driven.breaker.settle(probe, "ok")
    assert driven.told("probing")


# --- Watching only -------------------------------------------------------------------------------


def test_shadow() -> None:
    """In shadow all calls go out, and those that would have been refused know it."""
    driven = a_breaker(mode="shadow")
    driven.calls("fffff")
    driven.wait(1)
    ticket = driven.breaker.admit()

    assert ticket.refused
    assert (
        "the breaker is open since 1 s: 5 failures in a row; the next probe is in 59 s"
        == ticket.reason
    )
    assert not ticket.probe


def test_shadow_counts_nothing_while_open() -> None:
    """What would not have been asked says nothing: neither good nor bad calls move the breaker."""
    driven = an_open_breaker(mode="shadow")
    before = driven.told()
    driven.calls("of" * 100)

    assert before == driven.told()


def test_shadow_probes() -> None:
    """After the window one call is the probe in shadow, too, and the others are not."""
    driven = an_open_breaker(mode="shadow", success_threshold=1)
    driven.wait(60)
    probe, other = driven.breaker.admit(), driven.breaker.admit()
    assert (True, False) == (probe.probe, probe.refused)
    assert (False, True) == (other.probe, other.refused)
    driven.breaker.settle(other, "failed")
    driven.breaker.settle(probe, "ok")

    assert ["open", "half-open", "closed"] == [each.new for each in driven.heard]


# --- By hand -------------------------------------------------------------------------------------


def test_held_open() -> None:
    """Opened by hand it stays open, whatever time passes, until it is closed by hand."""
    driven = a_breaker()
    changes = driven.breaker.open("maintenance until Monday")
    driven.wait(1e6)

    assert driven.refusal().endswith(
        ": maintenance until Monday; it stays so until somebody closes it"
    )
    assert (True, None) == (driven.told("held"), driven.told("retry_in_seconds"))
    changes += driven.breaker.close("Monday")
    assert "closed" == driven.call()
    assert not driven.breaker.held
    assert [
        "main closed->open: maintenance until Monday",
        "main open->closed: Monday",
    ] == driven.heard.texts()
    assert list(changes) == driven.heard


def test_opened_for_a_time() -> None:
    """Opened for some seconds it probes after exactly these."""
    driven = a_breaker(lambda: 0.9, fail_max=NO_RULE)
    driven.breaker.open("2 of 3 instances say so", 30.0)
    assert not driven.breaker.held
    driven.wait(29.9)
    assert "refused" == driven.call()
    driven.wait(0.2)

    assert "half-open" == driven.call()


def test_held_is_stronger() -> None:
    """What somebody holds open is not opened for a time only, nor is it when it is open already."""
    driven = an_open_breaker()
    assert () == driven.breaker.open("by hand")
    assert () == driven.breaker.open("another instance", 1.0)
    driven.wait(1000)

    assert driven.refusal().endswith("by hand; it stays so until somebody closes it")
    assert 1 == len(driven.heard)


def test_opened_for_another_time() -> None:
    """What is open already may be opened for a longer or shorter time, without a change."""
    driven = an_open_breaker()

    assert () == driven.breaker.open("another instance", 7.0)
    assert 7.0 == driven.window()


def test_opened_while_probing() -> None:
    """A probe that is under way does not close what is opened meanwhile."""
    driven = a_half_open_breaker(success_threshold=1)
    probe = driven.breaker.admit()
    driven.breaker.open("by hand")
    driven.breaker.settle(probe, "ok")

    assert "open" == driven.breaker.state


def test_closing_what_is_closed() -> None:
    """It stays as it is, and nobody is told."""
    driven = a_breaker(fail_max=2)
    driven.call("failed")

    assert () == driven.breaker.close("by hand")
    assert "" == driven.told("reason")
    assert "open" == driven.call("failed")


def test_reset() -> None:
    """After a reset nothing is left: no failures, no back-off, no calls that are under way."""
    driven = an_open_breaker(min_calls=2)
    for _ in range(5):
        driven.fail_a_probe(retry_after=300.0)
    assert ("open", "closed") == tuple(
        each for change in driven.breaker.reset() for each in (change.old, change.new)
    )
    driven.call("failed")
    assert 60.0 == driven.window()

    driven = a_breaker(fail_max=2, min_calls=2)
    under_way = driven.breaker.admit()
    driven.call("failed", retry_after=300.0)
    assert () == driven.breaker.reset()
    driven.breaker.settle(under_way, "failed")
    fresh = a_breaker(fail_max=2, min_calls=2)
    assert fresh.told() == driven.told()


def test_listeners() -> None:
    """Each listener is told once, when the change is complete: the state that it sees is new."""
    driven = a_breaker(fail_max=1, success_threshold=1)
    seen: list[State] = []
    driven.breaker.add_listener(lambda change: seen.append(driven.breaker.state))  # noqa: ARG005
    driven.call("failed")
    driven.wait(60)
    driven.call("ok")

    assert ["open", "half-open", "closed"] == seen
    assert ["open", "half-open", "closed"] == [each.new for each in driven.heard]


def test_listener_that_goes() -> None:
    """Who listens no more is told nothing; to go twice does no harm."""
    driven = a_breaker(fail_max=1)
    more = Heard()
    hear = more.append
    driven.breaker.add_listener(hear)
    driven.call("failed")
    driven.breaker.remove_listener(hear)
    driven.breaker.remove_listener(hear)
    driven.breaker.close("by hand")

    assert 1 == len(more)
    assert 2 == len(driven.heard)


def test_listener_that_turns_it() -> None:
    """A listener may turn the breaker: what it does holds."""
    driven = a_breaker(fail_max=1)

    def close(change: BreakerChange) -> None:
        if change.new == "half-open":
            driven.breaker.close("it looks better")

    driven.breaker.add_listener(close)
    driven.call("failed")
    driven.wait(60)
    probe = driven.breaker.admit()
    assert () == driven.breaker.settle(probe, "failed")

    assert "closed" == driven.breaker.state
    assert not driven.told("probing")
    assert ["open", "half-open", "closed"] == [each.new for each in driven.heard]


# --- For people ----------------------------------------------------------------------------------


def test_told() -> None:
    """All that there is to say is JSON."""
    driven = a_breaker(slow_call=2.0)
    driven.call("failed", 3.0)
    driven.wait(1.5)
    told = json.loads(json.dumps(driven.told()))
    driven.calls("ffff")
    driven.wait(1)
    opened = driven.told()

    expected = {
        "state": "closed",
        "since_seconds": 1.5,
        "reason": "",
        "held": False,
        "mode": "enforce",
        "failures_in_a_row": 1,
        "window": {"seconds": 10.0, "calls": 1, "failures": 1, "slow": 1, "cut_off": 0},
        "retry_in_seconds": None,
        "reset_timeout": 60.0,
        "probing": False,
    }
    assert expected == told
    assert ("open", 1.0, 59.0) == (
        opened["state"],
        opened["since_seconds"],
        opened["retry_in_seconds"],
    )


def test_repr() -> None:
    """It says how it is, and why."""
    driven = a_breaker(fail_max=2, mode="shadow")
    assert "<Breaker main closed, 0 failures, shadow>" == repr(driven.breaker)
    driven.calls("ff")
    driven.wait(3)
    assert "<Breaker main open since 3 s: 2 failures in a row, shadow>" == repr(driven.breaker)
    driven.breaker.open("by hand")
    assert "<Breaker main open since 3 s: by hand, held, shadow>" == repr(driven.breaker)

    driven = an_open_breaker()
    driven.wait(60)
    ticket = driven.breaker.admit()
    assert "half-open since 0 s: after 60 s a probe goes out, probing>" in repr(driven.breaker)
    assert "<Ticket probe, epoch 2>" == repr(ticket)
    driven.breaker.settle(ticket, "neutral")
    assert "<Ticket probe, epoch 2, settled>" == repr(ticket)


def test_looking_asks_for_no_probe() -> None:
    """Nobody is asked whether a probe may go out because somebody looks at the breaker."""
    driven = an_open_breaker()
    driven.wait(61)
    asked: list[None] = []
    driven.breaker.may_probe = lambda: bool(asked.append(None))

    assert "open" == driven.breaker.told()["state"]
    assert repr(driven.breaker).startswith("<Breaker main open since 61 s: ")
    assert [] == asked


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"failure_rate": 0}, "failure_rate: 0 is no share (write 0.5 for half)"),
        ({"slow_call_rate": 50}, "slow_call_rate: 50 is no share (write 0.5 for half)"),
        ({"fail_max": 0}, "fail_max: 0 is too few (write 1 or more)"),
        ({"min_calls": 0}, "min_calls: 0 is too few (write 1 or more)"),
        ({"success_threshold": 0}, "success_threshold: 0 is too few (write 1 or more)"),
        ({"window": 0.0}, "window: 0.0 is no time (write seconds above 0)"),
        ({"slow_call": -1.0}, "slow_call: -1.0 is no time (write seconds above 0)"),
        ({"reset_timeout": float("nan")}, "reset_timeout: nan is no time"),
        ({"max_reset_timeout": float("inf")}, "max_reset_timeout: inf is no time"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], says: str) -> None:
    """Settings that make no sense are refused, with what to write instead."""
    with pytest.raises(ValueError, match=re.escape(says)):
        BreakerSettings(**wrong)


# --- The traps of pybreaker under asyncio --------------------------------------------------------


async def guarded(breaker: UpstreamBreaker, call: Callable[[], Any]) -> Any:
    """Make *call* behind *breaker*, as it is meant to be used: settle in any case."""
    ticket = breaker.admit()
    outcome: Outcome = "neutral"
    try:
        answer = await call()
        outcome = "ok"
    except OSError:
        outcome = "failed"
        raise
    finally:
        breaker.settle(ticket, outcome)
    return answer


async def broken() -> None:
    """Be a call that fails when it is awaited."""
    await asyncio.sleep(0)
    raise ConnectionResetError("reset")


async def hanging() -> None:
    """Be a call that is never answered."""
    await asyncio.Event().wait()


async def test_trap_coroutine_functions() -> None:
    """A coroutine function fails when it is awaited, and that is counted: as the error it was."""
    driven = a_breaker()
    caught = []
    for _ in range(6):
        try:
            await guarded(driven.breaker, broken)
        except (ConnectionResetError, UpstreamRefusedError) as error:
            caught.append(type(error))

    # The fifth is not replaced by an error of pybreaker's, though it is the one that opens it.
    assert [ConnectionResetError] * 5 + [UpstreamRefusedError] == caught


async def test_trap_lock() -> None:
    """Nothing is held while a call is under way: another thread is served meanwhile."""
    driven = a_breaker()
    ticket = driven.breaker.admit()
    served: list[str] = []
    thread = threading.Thread(target=lambda: served.append(driven.call("failed")), daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, 10.0)
    driven.breaker.settle(ticket, "ok")

    assert ["closed"] == served


@pytest.mark.parametrize("outcome", ["ok", "failed"])
async def test_trap_herd(outcome: Outcome) -> None:
    """Of 500 who come at the end of the window one is let through, good or bad as it may be."""
    driven = an_open_breaker()
    driven.wait(60)
    sent, go = 0, asyncio.Event()

    async def call() -> None:
        """Answer, or fail, when all have come."""
        nonlocal sent
        sent += 1
        await go.wait()
        if outcome == "failed":
            raise ConnectionResetError

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_quietly(driven.breaker, call)) for _ in range(500)]
        await asyncio.sleep(0)
        refused = sum(each.done() for each in tasks)
        go.set()

    assert (1, 499) == (sent, refused)
    assert 499 == sum(each.result() == "UpstreamRefusedError" for each in tasks)
    assert ("half-open" if outcome == "ok" else "open") == driven.breaker.state
    assert 1 == sum(each.new == "half-open" for each in driven.heard)


async def _quietly(breaker: UpstreamBreaker, call: Callable[[], Any]) -> str:
    try:
        await guarded(breaker, call)
    except (ConnectionResetError, UpstreamRefusedError) as error:
        return type(error).__name__
    return ""


async def test_trap_late_failures() -> None:
    """100 calls in flight that fail one after the other open it once, each with its own error."""
    driven = a_breaker()

    async def late(seconds: int) -> None:
        """Fail after *seconds*."""
        for _ in range(seconds):
            await asyncio.sleep(0)
        driven.clock.now = max(driven.clock.now, 1000.0 + seconds)
        raise ConnectionResetError

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_quietly(driven.breaker, lambda n=each: late(n)))  # type: ignore[misc]
            for each in range(100)
        ]

    assert {"ConnectionResetError"} == {each.result() for each in tasks}
    assert ["open"] == [each.new for each in driven.heard]
    # It opened with the fifth, four seconds on, and is open since.
    assert 95.0 == driven.told("since_seconds")


async def test_trap_cancelled_calls() -> None:
    """10,000 calls that are cut off leave it closed, with nothing counted."""
    driven = a_breaker(fail_max=1, min_calls=1)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(guarded(driven.breaker, hanging)) for _ in range(10_000)]
        await asyncio.sleep(0)
        for each in tasks:
            each.cancel()

    assert 10_000 == sum(each.cancelled() for each in tasks)
    assert [] == driven.heard
    assert a_breaker(fail_max=1, min_calls=1).told() == driven.told()


async def test_trap_cancelled_probe() -> None:
    """A probe that is cut off neither closes nor opens it, and gives its place back."""
    driven = an_open_breaker(success_threshold=1)
    driven.wait(60)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(guarded(driven.breaker, hanging))
        await asyncio.sleep(0)
        assert driven.told("probing")
        task.cancel()

    assert "half-open" == driven.breaker.state
    assert not driven.told("probing")
    assert driven.breaker.admit().probe


async def test_trap_outer_timeout() -> None:
    """A time-out around a call is a TimeoutError, also where the next failure would open it."""
    driven = a_breaker(fail_max=1)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await guarded(driven.breaker, hanging)

    assert "closed" == driven.breaker.state


def test_trap_every_other_call() -> None:
    """Every other call that fails opens it, though no two are in a row."""
    driven = a_breaker()
    states = driven.calls("of" * 500)

    assert 20 == states.index("refused")
    assert 1 == len(driven.heard)


def test_trap_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of the wall clock, by a day forth or back, change nothing."""
    driven = an_open_breaker(max_reset_timeout=60.0)
    for days in (1, -1, 10_000):

        class Stepped(datetime):
            by = timedelta(days=days)

            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime(2026, 11, 23, tzinfo=tz or UTC) + cls.by

        monkeypatch.setattr(pybreaker, "datetime", Stepped)
        assert "refused" == driven.call()
        assert 60.0 == driven.window()
        assert 60.0 == driven.fail_a_probe()
    driven.wait(driven.window())

    assert "half-open" == driven.call()


# --- Against a model -----------------------------------------------------------------------------

SETTINGS = BreakerSettings(
    fail_max=3,
    min_calls=4,
    slow_call=2.0,
    reset_timeout=8.0,
    max_reset_timeout=32.0,
    success_threshold=2,
)


@dataclass
class Counted:
    """A call that the model remembers."""

    part: int
    """The second in which it ended: the window's parts are seconds."""
    outcome: Outcome
    slow: bool


class Model:
    """What the breaker promises, slow and plain: it keeps all, and goes through it each time."""

    def __init__(self, now: float) -> None:
        self.began = self.now = self.until = self.left_alone = now
        self.state: State = "closed"
        self.life = 0
        """Counts changes of the state."""
        self.calls: list[Counted] = []
        self.row = self.good = self.openings = 0
        self.held = self.probing = False

    def part(self) -> int:
        """Give the second that it is in."""
        return int(self.now - self.began)

    def turn(self, state: State) -> None:
        """Go into another state."""
        self.state, self.probing, self.good = state, False, 0
        self.life += 1
        if state == "closed":
            self.calls, self.row, self.openings = [], 0, 0
            self.held, self.left_alone = False, self.now

    def recent(self) -> list[Counted]:
        """Give the calls within the window."""
        return [each for each in self.calls if self.part() - each.part < 10]

    def trip(self) -> None:
        """Open by a rule."""
        self.turn("open")
        self.openings += 1
        length = min(32.0, 8.0 * 2 ** max(0, self.openings - 3))
        self.until = self.now + max(length, min(32.0, self.left_alone - self.now))

    def has_reason(self) -> bool:
        """Whether a rule says that it opens."""
        counted = [each for each in self.recent() if each.outcome != "neutral"]
        failed = sum(each.outcome == "failed" for each in counted)
        slow, timed = sum(each.slow for each in self.recent()), len(self.recent())
        return (
            self.row >= 3
            or (len(counted) >= 4 and 2 * failed >= len(counted))
            or (timed >= 4 and 2 * slow >= timed)
        )

    def admits(self, *, may_probe: bool) -> bool:
        """Whether a call goes out now; at the end of the window it is the probe."""
        if self.state == "open" and not self.held and self.now >= self.until and may_probe:
            self.turn("half-open")
        if self.state == "half-open" and not self.probing:
            self.probing = True
            return True
        return self.state == "closed"

    def settle(self, outcome: Outcome, seconds: float, retry_after: float | None) -> None:
        """Take the outcome of a call of this state."""
        slow = seconds >= 2.0
        self.probing = False
        if outcome == "failed" and retry_after:
            self.left_alone = max(self.left_alone, self.now + retry_after)
        if outcome == "neutral" and not slow:
            return
        if self.state == "half-open":
            self.settle_probe(good=outcome == "ok" and not slow)
            return
        self.calls.append(Counted(self.part(), outcome, slow))
        if outcome != "neutral":
            self.row = self.row + 1 if outcome == "failed" else 0
        if self.has_reason():
            self.trip()

    def settle_probe(self, *, good: bool) -> None:
        """Take the outcome of a probe."""
        if good:
            self.row, self.calls = 0, []
            self.good += 1
            if self.good == 2:
                self.turn("closed")
        else:
            self.row += 1
            self.trip()


@dataclass
class Asked:
    """A ticket, and the model's state when it was given."""

    ticket: Ticket
    life: int
    probe: bool


class BreakerMachine(RuleBasedStateMachine):
    """Does anything in any order, with the breaker and with the model."""

    tickets: Bundle[Asked] = Bundle("tickets")

    @initialize(shadow=st.booleans())
    def begin(self, shadow: bool) -> None:  # noqa: FBT001 - hypothesis passes it by name
        """Begin with a closed breaker."""
        self.clock, self.heard = Clock(), Heard()
        mode: Any = "shadow" if shadow else "enforce"
        self.breaker = UpstreamBreaker(
            "main",
            replace(SETTINGS, mode=mode),
            clock=self.clock,
            random=lambda: 0.5,
            listener=self.heard.append,
        )
        self.lease = True
        self.breaker.may_probe = lambda: self.lease
        self.model = Model(self.clock.now)
        self.open_probes: list[Asked] = []

    @rule(quarters=st.integers(1, 16) | st.sampled_from([32, 60, 160]))
    def wait(self, quarters: int) -> None:
        """Let time pass, in steps that floats hold exactly."""
        self.clock.now += quarters / 4
        self.model.now = self.clock.now

    @rule(target=tickets)
    def ask(self) -> Asked:
        """Ask for admission."""
        admitted = self.model.admits(may_probe=self.lease)
        ticket = None
        try:
            ticket = self.breaker.admit()
        except UpstreamRefusedError:
            assert "enforce" == self.breaker.settings.mode
        assert admitted == (ticket is not None and not ticket.refused)
        if ticket is None:
            # As good as one that is settled: nothing may come of it.
            return Asked(_spent(), -1, probe=False)
        probe = admitted and self.model.state == "half-open"
        assert probe == ticket.probe
        asked = Asked(ticket, self.model.life if admitted else -1, probe)
        if probe:
            self.open_probes.append(asked)
        return asked

    @rule(
        asked=tickets,
        outcome=st.sampled_from(["ok", "ok", "failed", "failed", "neutral"]),
        seconds=st.sampled_from([0.0, 1.9, 2.0, 9.0]),
        retry_after=st.sampled_from([None, None, 5.0, 20.0, 1000.0]),
    )
    def settle(
        self, asked: Asked, outcome: Outcome, seconds: float, retry_after: float | None
    ) -> None:
        """Settle a ticket: a new one, an old one, or one that is settled."""
        if asked.life == self.model.life and not asked.ticket.settled:
            self.model.settle(outcome, seconds, retry_after)
        before = len(self.heard)
        given = self.breaker.settle(asked.ticket, outcome, seconds=seconds, retry_after=retry_after)
        assert self.heard[before:] == list(given)
        self.open_probes = [each for each in self.open_probes if each is not asked]

    @rule(
        outcome=st.sampled_from(["ok", "ok", "ok", "failed", "neutral"]),
        seconds=st.sampled_from([0.0, 0.0, 2.0]),
    )
    def call(self, outcome: Outcome, seconds: float) -> None:
        """Make a call that ends at once."""
        self.settle(self.ask(), outcome, seconds, None)

    @rule(outcome=st.sampled_from(["ok", "ok", "failed"]))
    def call_in_time(self, outcome: Outcome) -> None:
        """Make a call that is not slow."""
        self.settle(self.ask(), outcome, 0.0, None)

    @rule(what=st.sampled_from(["open", "open for", "close", "reset", "hand over"]))
    def turn(self, what: str) -> None:
        """Do something by hand, or as another instance does."""
        match what:
            case "open":
                self.open(None)
            case "open for":
                self.open(30.0)
            case "close":
                self.close()
            case "reset":
                self.reset()
            case _:
                # Another instance probes, or this one again.
                self.lease = not self.lease

    def open(self, seconds: float | None) -> None:
        """Open it by hand, or for another instance."""
        self.breaker.open("by hand", seconds)
        if self.model.held and seconds is not None:
            return
        self.model.held = seconds is None
        if seconds is not None:
            self.model.until = self.model.now + seconds
        if self.model.state != "open":
            self.model.turn("open")

    def close(self) -> None:
        """Close it."""
        self.breaker.close("by hand")
        if self.model.state != "closed":
            self.model.turn("closed")

    def reset(self) -> None:
        """Reset it."""
        self.breaker.reset()
        self.model.turn("closed")

    @invariant()
    def is_as_the_model_says(self) -> None:
        """What the breaker tells of itself is what the model comes to."""
        told, model = self.breaker.told(), self.model
        recent = model.recent()
        counted = [each for each in recent if each.outcome != "neutral"]
        assert model.state == self.breaker.state == told["state"]
        assert model.row == told["failures_in_a_row"]
        assert model.held == told["held"]
        assert model.probing == told["probing"]
        window = {
            "seconds": 10.0,
            "calls": len(counted),
            "failures": sum(each.outcome == "failed" for each in counted),
            "slow": sum(each.slow for each in recent),
            "cut_off": len(recent) - len(counted),
        }
        assert window == told["window"]
        waiting = model.state == "open" and not model.held
        left = max(0.0, model.until - model.now) if waiting else None
        assert left == told["retry_in_seconds"]

    @invariant()
    def one_probe_at_most(self) -> None:
        """Of the probes that are under way at most one is of the present state."""
        assert sum(each.life == self.model.life for each in self.open_probes) <= 1

    @invariant()
    def changes_are_a_chain(self) -> None:
        """Each change begins where the one before ended, and none leads nowhere."""
        states = ["closed", *(each.new for each in self.heard)]
        assert states[:-1] == [each.old for each in self.heard]
        assert all(old != new for old, new in pairwise(states))
        assert states[-1] == self.breaker.state


def _spent() -> Ticket:
    ticket = Ticket(-1)
    ticket.settled = True
    return ticket


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
