"""State in memory: bounded, swept, and with a clock that does not jump."""

import time

import pytest
import structlog

from tests.support.ledger_check import stepped_clock
from tests.support.state_model import (
    Clock,
    Player,
    a_campaign,
    a_hold,
    a_script,
    a_viewer,
    confirm,
    level,
    reserve,
)
from vastproxy.state.base import Account, Claim, Level, StateBackend, Window, money
from vastproxy.state.memory import InMemoryBackend

MINUTE = Claim("ads", window=Window("rolling", 60_000))
FEW = 10


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands until a test moves it."""
    return Clock()


@pytest.fixture
def small(clock: Clock) -> InMemoryBackend:
    """Make a backend that remembers ten of everything."""
    return InMemoryBackend(clock=clock, max_accounts=FEW, max_settled=FEW)


def _size(backend: InMemoryBackend) -> int:
    """Count all that a backend keeps, of whatever kind."""
    settled = (backend._confirmed, backend._voided)
    found = [*vars(backend).values(), *[each._ends for each in settled]]
    inside = [value for value in found if isinstance(value, dict | list)]
    return sum(len(each) for each in (*inside, *settled))


@pytest.mark.parametrize("seed", range(30, 230))
async def test_memory_says_what_the_model_says(clock: Clock, seed: int) -> None:
    """Whatever is done, in whatever order and with whatever pauses, memory is as the model."""
    await Player(InMemoryBackend(clock=clock), clock).play(a_script(seed))


async def test_least_recently_used_viewer_goes_first(small: InMemoryBackend) -> None:
    """Where there are too many viewers, the one that was longest not used is forgotten."""
    viewers = [a_viewer() for _ in range(FEW + 1)]
    for each in viewers[:FEW]:
        await confirm(small, a_hold(each))

    await confirm(small, a_hold(viewers[0]))
    await confirm(small, a_hold(viewers[FEW]))

    levels = [(await level(small, each)).counted for each in viewers]
    assert [2, 0] + [1] * (FEW - 1) == levels


async def test_expired_viewer_goes_before_all_others(small: InMemoryBackend, clock: Clock) -> None:
    """A viewer whose counts are over makes room, though it was used last."""
    viewers = [a_viewer() for _ in range(FEW + 1)]
    for each in viewers[1:FEW]:
        await confirm(small, a_hold(each, keep_ms=1))
    await confirm(small, a_hold(viewers[0], MINUTE, keep_ms=1))
    clock.move(60_061)

    await confirm(small, a_hold(viewers[FEW]))

    assert [1] * FEW == [(await level(small, each)).counted for each in viewers[1:]]
    assert 0 == small.forgotten


async def test_money_is_never_forgotten(small: InMemoryBackend) -> None:
    """A campaign stays, however many viewers and campaigns come after it."""
    campaigns = [a_campaign() for _ in range(FEW)]
    for each in campaigns:
        await confirm(small, a_hold(each, money(3)))
    for _ in range(5 * FEW):
        await confirm(small, a_hold(a_viewer()))

    assert [Level(3)] * FEW == [await level(small, each) for each in campaigns]


async def test_oldest_operation_is_forgotten_first(small: InMemoryBackend) -> None:
    """Beyond its bound the oldest settled operation is forgotten, and the others are known."""
    campaign = a_campaign()
    holds = [a_hold(campaign) for _ in range(FEW + 1)]

    await small.confirm(holds)

    assert ["again"] * FEW == await small.confirm(holds[1:])
    assert 1 == small.forgotten
    assert "late" == await confirm(small, holds[0])


async def test_voids_do_not_push_out_confirmations(small: InMemoryBackend) -> None:
    """However many requests find no ad, an ad that was counted is known as such."""
    shown = a_hold(a_campaign())
    await confirm(small, shown)

    await small.void([a_hold(a_viewer()) for _ in range(5 * FEW)])

    assert "again" == await confirm(small, shown)


async def test_settled_in_the_order_of_their_ends_are_dropped(
    small: InMemoryBackend, clock: Clock
) -> None:
    """What is remembered no more makes room, also of an account that was forgotten meanwhile."""
    gone, viewer = a_viewer(), a_viewer()
    await small.confirm([a_hold(gone, keep_ms=1_000) for _ in range(FEW)])
    await small.forget(gone)
    await small.confirm([a_hold(viewer, keep_ms=1_000) for _ in range(FEW)])
    assert 0 == small.forgotten
    clock.move(1_000)
    last = [a_hold(viewer) for _ in range(FEW)]
    await small.confirm(last)

    assert ["again"] * FEW == await small.confirm(last)
    assert 0 == small.forgotten


async def test_forgetting_is_quick_among_many() -> None:
    """To forget a viewer takes about as long among 100,000 settled operations as among none."""
    full = InMemoryBackend()
    await full.confirm([a_hold(a_campaign()) for _ in range(10)])
    crowd = Account("campaign", "crowd")
    await full.confirm([a_hold(crowd, operation=f"{at}") for at in range(100_000)])

    alone = min([await _forget_seconds(InMemoryBackend()) for _ in range(5)])
    assert min([await _forget_seconds(full) for _ in range(5)]) < 10 * alone + 0.001


async def _forget_seconds(backend: StateBackend) -> float:
    viewer = a_viewer()
    await confirm(backend, a_hold(viewer))
    began = time.perf_counter()
    assert await backend.forget(viewer)
    return time.perf_counter() - began


async def test_expired_plain_counter_goes_first(small: InMemoryBackend, clock: Clock) -> None:
    """Beyond the bound a plain counter goes that has expired, else the one not used longest."""
    for at in range(FEW):
        await small.increment(str(at))
    await small.set_expiry("5", 1)
    clock.move(1_000)

    await small.increment("new")
    await small.increment("newer")

    counts = [await small.get_count(str(at)) for at in range(FEW)]
    assert [0, 1, 1, 1, 1, 0, 1, 1, 1, 1] == counts
    assert 1 == small.forgotten


async def test_forgetting_is_told_once_in_a_thousand(small: InMemoryBackend) -> None:
    """A full store warns of what it drops, and not at every request."""
    with structlog.testing.capture_logs() as logs:
        for _ in range(FEW + 1_002):
            await confirm(small, a_hold(a_viewer(), keep_ms=1))

    told = [each for each in logs if each["event"] == "state.full"]
    assert {"warning"} == {each["log_level"] for each in told}
    assert 2 <= len(told) <= 4


async def test_all_is_bounded(small: InMemoryBackend, clock: Clock) -> None:
    """Whatever a thousand viewers do, no more is kept than a few times the bound."""
    claims = Claim("life"), MINUTE
    for at in range(1_000):
        viewer = a_viewer()
        await reserve(small, a_hold(viewer, *claims, keep_ms=100))
        await confirm(small, a_hold(viewer, *claims, keep_ms=100))
        await small.void([a_hold(viewer, keep_ms=100)])
        await small.write_items(viewer, {"a": str(at)}, 3_600)
        await small.increment(viewer.name)
        clock.move(1)

    assert _size(small) <= 8 * FEW


async def test_refusals_are_bounded(small: InMemoryBackend) -> None:
    """A cap that refuses every viewer keeps nothing of them."""
    for _ in range(1_000):
        await reserve(small, a_hold(a_viewer(), Claim("ads", limit=0)))

    assert _size(small) <= 4 * FEW


async def test_forgotten_accounts_leave_nothing(small: InMemoryBackend) -> None:
    """An account that comes and is forgotten again and again leaves nothing behind."""
    viewer = a_viewer()
    for _ in range(1_000):
        await confirm(small, a_hold(viewer))
        await small.forget(viewer)

    assert _size(small) <= 4 * FEW


async def test_counters_of_one_viewer_are_bounded(clock: Clock) -> None:
    """Of a viewer who sees a thousand creatives, the counters that are over do not stay."""
    backend, viewer = InMemoryBackend(clock=clock), a_viewer()
    await confirm(backend, a_hold(viewer, Claim("for ever")))
    await reserve(backend, a_hold(viewer, Claim("held"), ttl_ms=10_000_000))
    for at in range(1_000):
        claim = Claim(f"creative {at}", window=Window("fixed", 1_000))
        await confirm(backend, a_hold(viewer, claim))
        clock.move(100)

    assert len(await backend.keys(viewer)) <= 100
    assert Level(1) == await level(backend, viewer, Claim("for ever"))
    assert Level(0, 1) == await level(backend, viewer, Claim("held"))
    last = Claim("creative 999", window=Window("fixed", 1_000))
    assert Level(1) == await level(backend, viewer, last)


async def test_reservations_made_and_settled_are_bounded(clock: Clock) -> None:
    """A busy campaign keeps what waits, and not a trace of all that was settled meanwhile."""
    backend, campaign = InMemoryBackend(clock=clock, max_settled=FEW), a_campaign()
    for _ in range(1_000):
        hold = a_hold(campaign, keep_ms=1)
        await reserve(backend, hold)
        await confirm(backend, hold)
        clock.move(1)

    (book,) = backend._books.values()
    assert 0 == len(book.held)
    assert len(book.due) <= 4 * FEW


async def test_sweep_tells_what_it_dropped(small: InMemoryBackend, clock: Clock) -> None:
    """A sweep drops the accounts whose time is over, and tells how many there were."""
    for _ in range(3):
        await confirm(small, a_hold(a_viewer(), MINUTE))
    await confirm(small, a_hold(a_viewer()))
    clock.move(59_999)
    assert 0 == await small.sweep()
    clock.move(62)

    assert 3 == await small.sweep()
    assert 0 == await small.sweep()


async def test_crowded_campaign_stays_quick() -> None:
    """A reservation takes about as long where ten thousand others are waiting as where none is."""
    backend, crowded = InMemoryBackend(), a_campaign()
    await backend.reserve([a_hold(crowded) for _ in range(10_000)])

    alone = min([await _seconds(backend, a_campaign()) for _ in range(5)])
    assert min([await _seconds(backend, crowded) for _ in range(5)]) < 10 * alone + 0.005


async def _seconds(backend: StateBackend, campaign: Account) -> float:
    began = time.perf_counter()
    await backend.reserve([a_hold(campaign) for _ in range(50)])
    return time.perf_counter() - began


async def test_clock_does_not_jump() -> None:
    """A clock of the machine that steps by an hour moves nothing in memory."""
    backend, viewer = InMemoryBackend(), a_viewer()
    await confirm(backend, a_hold(viewer, MINUTE))

    for seconds in (3_600.0, -3_600.0):
        with stepped_clock(seconds):
            assert Level(1) == await level(backend, viewer, MINUTE)


async def test_repr_says_how_full_it_is(small: InMemoryBackend) -> None:
    """What a person sees of it are numbers, and no viewer."""
    for _ in range(FEW + 2):
        await confirm(small, a_hold(a_viewer()))

    assert "<InMemoryBackend accounts: 10, forgotten: 4>" == repr(small)
