"""Who is asked next, and whose ad wins: facts in, decisions out."""

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vastproxy.flow.waterfall import Start, Waterfall


def started(waterfall: Waterfall, now: float = 0.0) -> list[Start]:
    """Give all that are to be started *now*."""
    found = []
    while (start := waterfall.next(now)) is not None:
        found.append(start)
    return found


# --- One after the other ------------------------------------------------------------------------


def test_first_has_an_ad() -> None:
    """The first one is started alone, and with its ad it is over."""
    waterfall = Waterfall([None, None])
    begun = started(waterfall)
    waterfall.ended(0, ad=True)

    assert [Start(0)] == begun
    assert (0, True) == (waterfall.winner, waterfall.over)
    assert [] == started(waterfall)
    assert not waterfall.staggers


def test_next_where_one_has_none() -> None:
    """Who ends without an ad is followed by the next, at once."""
    waterfall = Waterfall([None, None, None])
    assert [Start(0)] == started(waterfall)
    waterfall.ended(0, ad=False)
    assert [Start(1)] == started(waterfall)
    waterfall.ended(1, ad=True)

    assert 1 == waterfall.winner


def test_nobody_has_an_ad() -> None:
    """When all have ended without an ad, it is over, and nobody has won."""
    waterfall = Waterfall([None, 1.0])
    for at in range(2):
        assert [Start(at)] == started(waterfall)
        assert not waterfall.over
        waterfall.ended(at, ad=False)

    assert (None, True) == (waterfall.winner, waterfall.over)


def test_nobody_to_ask() -> None:
    """Without upstreams it is over before it begins."""
    waterfall = Waterfall([])

    assert [] == started(waterfall)
    assert waterfall.over


# --- At one time --------------------------------------------------------------------------------


def test_next_where_one_takes_long() -> None:
    """When its soft limit passes, the next is started, and it is said whose limit it was."""
    waterfall = Waterfall([0.3, None])
    assert [Start(0)] == started(waterfall, 10.0)
    assert 10.3 == waterfall.wakes_at
    assert [] == started(waterfall, 10.2)
    assert [Start(1, late=0)] == started(waterfall, 10.3)

    assert waterfall.wakes_at is None
    assert waterfall.staggers
    assert not waterfall.over


@pytest.mark.parametrize("winner", [0, 1])
def test_first_to_have_an_ad_wins(winner: int) -> None:
    """Of two under way the one wins that has an ad first; nobody waits for the one before it."""
    waterfall = Waterfall([0.3, None])
    started(waterfall, 0.0)
    started(waterfall, 0.3)
    waterfall.ended(winner, ad=True)

    assert (winner, True) == (waterfall.winner, waterfall.over)


def test_two_at_the_same_moment() -> None:
    """Of two that have an ad, the first in the order wins."""
    waterfall = Waterfall([0.3, None])
    started(waterfall, 0.0)
    started(waterfall, 0.3)
    waterfall.ended(1, ad=True)
    waterfall.ended(0, ad=True)

    assert 0 == waterfall.winner


def test_overtaken_one_starts_nobody() -> None:
    """Who was overtaken and ends without an ad starts nobody; the last one started does."""
    waterfall = Waterfall([0.3, None, None])
    started(waterfall, 0.0)
    started(waterfall, 0.3)
    waterfall.ended(0, ad=False)
    assert [] == started(waterfall, 0.4)
    waterfall.ended(1, ad=False)

    assert [Start(2)] == started(waterfall, 0.5)


def test_all_under_way() -> None:
    """Each soft limit starts one more; the last one's own starts nobody and wakes nobody."""
    waterfall = Waterfall([0.3, 0.1, 0.1])
    begun = [started(waterfall, now) for now in (0.0, 0.3, 0.4, 9.0)]

    assert [[Start(0)], [Start(1, late=0)], [Start(2, late=1)], []] == begun
    assert waterfall.wakes_at is None


def test_end_takes_its_limit_along() -> None:
    """Who ends before its soft limit wakes nobody later; the next one has a limit of its own."""
    waterfall = Waterfall([0.3, 0.2, None])
    started(waterfall, 0.0)
    waterfall.ended(0, ad=False)
    assert waterfall.wakes_at is None
    assert [Start(1)] == started(waterfall, 0.1)

    assert 0.1 + 0.2 == waterfall.wakes_at


def test_limit_of_the_last_is_none() -> None:
    """A soft limit of the last one alone makes nothing run at one time."""
    assert not Waterfall([None, None, 0.3]).staggers
    assert not Waterfall([0.3]).staggers
    assert Waterfall([None, 0.3, None]).staggers


def test_repr() -> None:
    """Who looks at it sees who runs."""
    waterfall = Waterfall([0.3, None])
    started(waterfall)

    assert "<Waterfall of 2, running: [0], winner: None>" == repr(waterfall)


# --- Any course of things -----------------------------------------------------------------------


@dataclass(frozen=True)
class One:
    """An upstream: its soft limit, how long it takes, and whether it has an ad then."""

    soft: int | None
    takes: int
    ad: bool


@dataclass
class Told:
    """What came of a run."""

    starts: list[tuple[int, int]] = field(default_factory=list)
    """Who was started, and when."""
    late: list[int] = field(default_factory=list)
    winner: int | None = None


def run(ones: list[One]) -> Told:
    """Drive a waterfall by a clock that jumps from one event to the next."""
    waterfall = Waterfall([each.soft for each in ones])
    told = Told()
    ends: dict[int, int] = {}
    now = 0
    while not waterfall.over:
        for start in started(waterfall, now):
            told.starts.append((start.at, now))
            told.late += [] if start.late is None else [start.late]
            ends[start.at] = now + ones[start.at].takes
        wakes = [] if waterfall.wakes_at is None else [int(waterfall.wakes_at)]
        now = min([*ends.values(), *wakes])
        for at in [at for at, when in ends.items() if when == now]:
            del ends[at]
            waterfall.ended(at, ad=ones[at].ad)
    told.winner = waterfall.winner
    return told


def expected(ones: list[One]) -> Told:
    """Say the same by the rules, without a clock."""
    told = Told()
    never = 10**9
    begins, won, ads = 0, never, []
    for at, one in enumerate(ones):
        if begins == never or (begins >= won and at):
            break
        told.starts.append((at, begins))
        ends = begins + one.takes
        if one.ad:
            ads.append((ends, at))
            won = min(won, ends)
        soft = never if one.soft is None else begins + one.soft
        following = min(never if one.ad else ends, soft)
        if following == soft and soft < won and (one.ad or soft < ends) and at + 1 < len(ones):
            told.late.append(at)
        begins = following
    told.winner = min(ads)[1] if ads else None
    return told


ONES = st.builds(One, st.none() | st.integers(1, 5), st.integers(0, 12), st.booleans())


@given(st.lists(ONES, max_size=6))
@example([One(3, 3, ad=False), One(None, 1, ad=True)])
@example([One(1, 9, ad=True), One(None, 1, ad=False), One(None, 1, ad=True)])
def test_any_course(ones: list[One]) -> None:
    """
    Whatever the limits, times and ads: all start in their order and when they should, nobody
    starts after somebody has won, and the first ad there is wins.
    """
    assert expected(ones) == run(ones)
