"""The arithmetic of counters: which confirmations count now, and what a reservation takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.state_model import Clock, Model, a_hold, a_viewer
from vastproxy.state.base import Claim, Level, Verdict, Window
from vastproxy.state.ledger import (
    FOR_EVER,
    Counter,
    drawn,
    judged,
    kept,
    level,
    period,
    repeated,
)

NOW = 1_800_000_000_000
"""Unix milliseconds; a multiple of all lengths below."""

BOUNDS = tuple(NOW + each for each in range(-1_000_000, 1_000_000, 10_000))

WINDOWS = (
    Window("rolling", 10_000),
    Window("rolling", 999),
    Window("rolling", 86_400_000),
    Window("fixed", 7_000),
    Window("calendar", bounds=BOUNDS),
    Window(),
)


def test_new_counter_has_counted_nothing() -> None:
    """Nothing counts before something was counted, whatever the window."""
    assert [0] * len(WINDOWS) == [Counter().live(each, NOW) for each in WINDOWS]


@pytest.mark.parametrize("window", WINDOWS)
def test_what_is_added_counts_at_once(window: Window) -> None:
    """What was added at this moment counts at this moment, all of it."""
    counter = Counter()

    counter.add(window, 2, NOW)
    counter.add(window, 3, NOW)

    assert 5 == counter.live(window, NOW)


def test_pieces_of_rolling_windows_are_thousandths() -> None:
    """A rolling window keeps a piece for each thousandth, and drops those that are over."""
    window, counter = Window("rolling", 10_000), Counter()

    for at in range(0, 30_000, 5):
        counter.add(window, 1, NOW + at)

    assert 1_001 == len(counter.pieces)
    assert {2} == set(counter.pieces.values())


def test_short_rolling_windows_have_pieces_of_a_millisecond() -> None:
    """No piece is shorter than a millisecond."""
    window, counter = Window("rolling", 10), Counter()

    counter.add(window, 1, NOW)

    assert {NOW: 1} == counter.pieces
    assert [1, 0] == [counter.live(window, NOW + each) for each in (10, 11)]


@pytest.mark.parametrize("window", WINDOWS[:-1])
def test_nothing_counts_from_the_end_on(window: Window) -> None:
    """The end that a counter tells is the first millisecond at which nothing counts."""
    counter = Counter()
    counter.add(window, 1, NOW + 1_234)
    ends = counter.ends(window, NOW + 1_234)

    assert [1, 0] == [counter.live(window, each) for each in (ends - 1, ends)]


def test_lifetime_has_no_end() -> None:
    """What counts for ever has the end of all times as its end."""
    assert FOR_EVER == Counter(count=1).ends(Window(), NOW)


def test_period_is_the_last_bound_that_has_passed() -> None:
    """A calendar's period began at the last bound, itself included, that is not ahead."""
    window = Window("calendar", bounds=(10, 20, 35))

    assert [10, 10, 20, 20, 35, 35] == [period(window, at) for at in (10, 19, 20, 34, 35, 99)]


def test_time_before_all_bounds_belongs_to_the_first_period() -> None:
    """Where the clock stands before all bounds, the first of them is the nearest."""
    assert 10 == period(Window("calendar", bounds=(10, 20)), 3)


def test_calendar_behind_its_last_bound_ends_now() -> None:
    """Where no bound is ahead, a count is not kept: there is no telling for how long."""
    window, counter = Window("calendar", bounds=(10, 20)), Counter()
    counter.add(window, 1, 25)

    assert 25 == counter.ends(window, 25)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    window=st.sampled_from(WINDOWS),
    steps=st.lists(
        st.tuples(st.sampled_from([0, 1, 9, 999, 1_000, 6_999, 7_000, 10_009]), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    ),
)
def test_counters_count_as_the_model(window: Window, steps: list[tuple[int, int]]) -> None:
    """At every moment a counter has what going through all confirmations gives."""
    clock, counter, viewer = Clock(), Counter(), a_viewer()
    clock.now = NOW
    model, claim = Model(clock), Claim("ads", window=window)
    for pause, amount in steps:
        clock.move(pause)

        assert model.level(viewer, claim).counted == counter.live(window, clock.now)
        counter.add(window, amount, clock.now)
        model.confirm(a_hold(viewer, Claim("ads", amount, window=window)))


def test_room_is_what_is_neither_counted_nor_reserved() -> None:
    """A claim has room up to its limit, and not a unit beyond."""
    counters = {"ads": Counter(count=3, held=4)}
    holds = [a_hold(a_viewer(), Claim("ads", each, 10)) for each in (3, 4)]

    assert Verdict(granted=True) == judged(holds[0], counters, NOW)
    assert Verdict(granted=False, refused=0) == judged(holds[1], counters, NOW)


def test_verdict_names_the_first_enforced_claim_without_room() -> None:
    """Of claims without room the first that is enforced refuses, and none else is told."""
    claims = (
        Claim("a", limit=0, enforced=False),
        Claim("b"),
        Claim("c", limit=0),
        Claim("d", limit=0),
    )

    assert Verdict(granted=False, refused=2) == judged(a_hold(a_viewer(), *claims), {}, NOW)


def test_kept_is_what_is_not_over() -> None:
    """A granted hold reserves its claims, but for those that had no room."""
    hold = a_hold(a_viewer(), Claim("a", 2), Claim("b", 3, 1, enforced=False), Claim("c", 0))
    verdict = judged(hold, {}, NOW)

    assert Verdict(granted=True, over=(1,)) == verdict
    assert {"a": 2, "c": 0} == kept(hold, verdict)
    assert verdict == repeated(hold, kept(hold, verdict))


def test_level_of_no_counter_is_nothing() -> None:
    """On a counter that is not there nothing stands; on another, what counts and is reserved."""
    claim = Claim("ads", window=Window("fixed", 10))

    assert Level() == level(None, claim, NOW)
    assert Level(2, 1) == level(Counter(2, NOW, held=1), claim, NOW + 9)
    assert Level(0, 1) == level(Counter(2, NOW, held=1), claim, NOW + 10)


@pytest.mark.parametrize(
    ("lease", "taken", "covered"),
    [
        ({"a": 5, "b": 5}, {"a": 2, "b": 3}, True),
        ({"a": 2, "b": 3}, {"a": 2, "b": 3}, True),
        ({"a": 1, "b": 5}, {"a": 1, "b": 3}, False),
        ({"a": 5}, {"a": 2}, False),
        ({}, {}, False),
    ],
)
def test_lease_gives_what_it_has(
    lease: dict[str, int],
    taken: dict[str, int],
    covered: bool,  # noqa: FBT001
) -> None:
    """A lease gives up to what it has left of each counter, and says whether that was enough."""
    hold = a_hold(a_viewer(), Claim("a", 2), Claim("b", 3))

    found, enough = drawn(lease, hold)

    assert taken == {key: amount for key, amount in found.items() if amount}
    assert covered == enough
