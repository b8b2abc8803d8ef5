"""A rate: what comes through in a second, whoever asks how."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.valkey import valkey_server
from vastproxy.errors import StateAwayError
from vastproxy.observe.tasks import Tasks
from vastproxy.upstream.limiter import MAX_UNASKED, LocalRate, RateLimiter, SharedRate
from vastproxy.upstream.sharing import RedisExtras


class Clock:
    """A clock that stands still but for those who sleep by it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        """Give the time."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Note the time, and go on at once."""
        self.slept.append(round(seconds, 6))


def a_limiter(rate: float, burst: int | None = None, **more: float) -> tuple[RateLimiter, Clock]:
    """Build a limiter, and the clock that it goes by."""
    clock = Clock()
    return RateLimiter(rate, burst, clock=clock, sleep=clock.sleep, **more), clock  # type: ignore[arg-type]


def test_burst_and_then_the_rate() -> None:
    """After a pause a burst comes through at once, and from then on one in each interval."""
    limiter, clock = a_limiter(10, 3)
    assert [True] * 3 + [False] * 2 == [limiter.try_acquire() for _ in range(5)]
    clock.now += 0.1
    assert [True, False] == [limiter.try_acquire() for _ in range(2)]
    clock.now += 0.35

    assert [True, True, True, False] == [limiter.try_acquire() for _ in range(4)]


def test_pause_is_not_saved_up() -> None:
    """However long nothing came, no more than the burst may come at once."""
    limiter, clock = a_limiter(10, 3)
    limiter.try_acquire()
    clock.now += 3600

    assert 3 == sum(limiter.try_acquire() for _ in range(10))


@pytest.mark.parametrize(("rate", "burst"), [(100.0, 100), (2.5, 2), (0.1, 1)])
def test_burst_is_a_second_where_unsaid(rate: float, burst: int) -> None:
    """Unless said otherwise, what may come in a second may come at once; one thing always."""
    limiter, _ = a_limiter(rate)

    assert burst == sum(limiter.try_acquire() for _ in range(200))


def test_refusal_takes_nothing() -> None:
    """Who is refused does not put off those behind."""
    limiter, clock = a_limiter(1, 1)
    limiter.try_acquire()
    for _ in range(100):
        limiter.try_acquire()
    clock.now += 1

    assert limiter.try_acquire()


@given(
    rate=st.floats(0.1, 1000),
    burst=st.integers(1, 50),
    steps=st.lists(st.floats(0, 1), max_size=100),
)
def test_rate_is_never_passed(rate: float, burst: int, steps: list[float]) -> None:
    """In no stretch of time do more come through than the burst and the rate make."""
    limiter, clock = a_limiter(rate, burst)
    times = []
    for step in steps:
        clock.now += step
        if limiter.try_acquire():
            times.append(clock.now)

    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= burst + (times[last] - begin) * rate + 1e-3


def test_keys_are_apart() -> None:
    """Each key has its own rate."""
    limiter, _ = a_limiter(1, 1)

    assert [True, True, False] == [limiter.try_acquire(each) for each in ("a", "b", "a")]


def test_keys_are_bounded() -> None:
    """Of too many keys the longest unused are forgotten; being refused is a use."""
    limiter, _ = a_limiter(1, 1, max_keys=2)
    for each in ("a", "b", "a", "c"):
        limiter.try_acquire(each)

    assert 2 == len(limiter._due)
    assert [False, False, True] == [limiter.try_acquire(each) for each in ("a", "c", "b")]


async def test_waiting_is_in_order() -> None:
    """Those who wait come one interval after the other, in the order in which they asked."""
    limiter, clock = a_limiter(4, 2)
    for _ in range(5):
        await limiter.acquire()

    assert [0.25, 0.5, 0.75] == clock.slept


async def test_nobody_waits_in_vain() -> None:
    """Whose turn does not come in time is told at once, and takes no turn of others."""
    limiter, clock = a_limiter(2, 1, timeout=1.0)
    for _ in range(3):
        await limiter.acquire()
    with pytest.raises(TimeoutError, match="no turn within 1 s at 2 a second"):
        await limiter.acquire()
    with pytest.raises(TimeoutError, match="within 0"):
        await limiter.acquire(timeout=0)
    await limiter.acquire(timeout=1.5)

    assert [0.5, 1.0, 1.5] == clock.slept
    assert "<RateLimiter 2/s, burst 1, keys: 1, refused: 2>" == repr(limiter)


async def test_block_waits_for_its_turn() -> None:
    """As a context manager, the limiter waits before the block; its turn is not given back."""
    limiter, clock = a_limiter(1, 1)
    for _ in range(2):
        async with limiter:
            pass

    assert [1.0] == clock.slept


async def test_real_time() -> None:
    """With the clocks of the machine, waiting takes as long as it should."""
    limiter = RateLimiter(200, 1)
    clock = asyncio.get_running_loop().time
    began = clock()
    for _ in range(4):
        await limiter.acquire()

    assert 0.014 < clock() - began < 2


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 1e10])
def test_nonsense_is_no_rate(rate: float) -> None:
    """A rate that lets nothing through, or everything, is refused."""
    with pytest.raises(ValueError, match="no rate"):
        RateLimiter(rate)


def test_burst_lets_something_through() -> None:
    """A burst of nothing is refused."""
    with pytest.raises(ValueError, match="write 1 or more"):
        RateLimiter(1, 0)


# --- Rates of ad requests ------------------------------------------------------------------------


async def test_local_rate_refuses_at_once() -> None:
    """A rate of one process gives a turn now, or none, and counts those that got none."""
    clock = Clock()
    rate = LocalRate(10, 2, clock=clock)
    first = [await rate.take() for _ in range(4)]
    clock.now += 0.1

    assert [True, True, False, False] == first
    assert [True, False] == [await rate.take() for _ in range(2)]
    assert (10, 2, 3, False) == (rate.rate, rate.burst, rate.refused, rate.shared)
    assert "<LocalRate 10/s, burst 2, refused: 3>" == repr(rate)


@dataclass(frozen=True)
class Told:
    """What the turns of a test say."""

    turns: int
    wait: float


class Scripted:
    """Turns that a test counts out, holds back, and takes away."""

    def __init__(self, left: int = 0) -> None:
        """Begin with *left* turns, after which the next is due in *wait* seconds."""
        self.there = True
        self.left = left
        self.wait = 0.0
        self.asked: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.closed = False
        self.mistake = False

    async def take(self, count: int) -> Told:
        """Give as many as there are, when the gate is open."""
        self.asked.append(count)
        await self.gate.wait()
        if self.mistake:
            raise ZeroDivisionError
        if not self.there:
            raise StateAwayError("gone")
        turns = min(count, self.left)
        self.left -= turns
        return Told(turns, self.wait if not self.left else 0.0)

    def close(self) -> None:
        """Be told that nobody asks any more."""
        self.closed = True


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    """Give an owner of tasks."""
    async with Tasks("test") as owner:
        yield owner


def a_shared_rate(
    turns: Scripted, tasks: Tasks, burst: int = 2, random: Callable[[], float] = lambda: 0.5
) -> tuple[SharedRate, Clock]:
    """Build a rate of ten a second that *turns* count, and the clock that it goes by."""
    clock = Clock()
    limits = RateLimiter(10, burst, clock=clock)
    return SharedRate(limits, turns, spawn=tasks.spawn, clock=clock, random=random), clock


async def test_those_who_ask_together_are_one_call(tasks: Tasks) -> None:
    """While a call is under way the others gather, and go out with the next one, in order."""
    turns = Scripted(60)
    rate, _ = a_shared_rate(turns, tasks)
    granted = await asyncio.gather(*(rate.take() for _ in range(100)))

    assert [True] * 60 + [False] * 40 == granted
    assert 100 == sum(turns.asked)
    assert len(turns.asked) <= 2
    assert (40, True) == (rate.refused, rate.shared)


async def test_nobody_asks_for_what_is_not_yet_due(tasks: Tasks) -> None:
    """When it is told that the next turn is due later, all are refused at once until then."""
    turns = Scripted()
    turns.wait = 0.07
    rate, clock = a_shared_rate(turns, tasks)
    refused = [await rate.take() for _ in range(50)]
    clock.now += 0.08
    turns.left = 5

    assert [False] * 50 == refused
    assert await rate.take()
    assert [1, 1] == turns.asked


async def test_who_has_the_last_turn_steps_back(tasks: Tasks) -> None:
    """After the last turn this instance lets others go first, for a part of an interval."""
    turns = Scripted(1)
    turns.wait = 0.1
    rate, clock = a_shared_rate(turns, tasks)
    assert await rate.take()
    turns.left = 9
    clock.now += 0.149
    assert not await rate.take()
    clock.now += 0.002

    assert await rate.take()


async def test_burst_of_one_steps_back_for_nobody(tasks: Tasks) -> None:
    """Where a late turn cannot be made up for, none is taken late on purpose."""
    turns = Scripted(1)
    turns.wait = 0.1
    rate, clock = a_shared_rate(turns, tasks, burst=1)
    assert await rate.take()
    turns.left = 9
    clock.now += 0.101

    assert await rate.take()


async def test_long_waits_are_not_believed(tasks: Tasks) -> None:
    """However long no turn is due, it is asked again after a second: turns may be counted anew."""
    turns = Scripted()
    turns.wait = 3600
    rate, clock = a_shared_rate(turns, tasks)
    assert not await rate.take()
    turns.left = 1
    clock.now += MAX_UNASKED + 0.001

    assert await rate.take()


async def test_who_goes_takes_no_turn(tasks: Tasks) -> None:
    """A request that is cut off before its call goes out leaves its turn to the next."""
    turns = Scripted(2)
    turns.gate.clear()
    rate, _ = a_shared_rate(turns, tasks)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(rate.take()) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gone, late = (group.create_task(rate.take()) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        turns.left = 4
        turns.gate.set()

    assert [True] * 4 == [each.result() for each in (*asking, late)]
    assert gone.cancelled()
    assert [3, 1] == turns.asked


async def test_alone_while_the_count_is_away(tasks: Tasks) -> None:
    """Without others the whole rate is let through here, and nobody asks until they are back."""
    turns = Scripted(9)
    rate, clock = a_shared_rate(turns, tasks)
    turns.there = False
    alone = [await rate.take() for _ in range(4)]
    clock.now += 0.1
    assert "<SharedRate 10/s, burst 2, refused: 2, here alone, as Redis is away>" == repr(rate)

    assert [True, True, False, False] == alone
    assert await rate.take()
    assert [] == turns.asked
    turns.there = True
    assert await rate.take()
    assert [1] == turns.asked
    assert "<SharedRate 10/s, burst 2, refused: 2, shared>" == repr(rate)


async def test_call_that_fails_is_made_up_for_here(tasks: Tasks) -> None:
    """Those whose call fails, and those behind them, take their turns here at once."""
    turns = Scripted(9)
    turns.gate.clear()
    rate, _ = a_shared_rate(turns, tasks)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(rate.take()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking += [group.create_task(rate.take()) for _ in range(2)]
        await asyncio.sleep(0)
        turns.there = False
        turns.gate.set()

    assert [True, True, False, False] == [each.result() for each in asking]
    assert [2] == turns.asked


async def test_nobody_waits_for_ever(tasks: Tasks, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after a mistake of ours each request has its answer, and the next one asks again."""
    turns = Scripted(9)
    rate, _ = a_shared_rate(turns, tasks)
    turns.mistake = True
    assert await rate.take()
    turns.mistake = False
    assert await rate.take()

    assert [1, 1] == turns.asked
    assert "ZeroDivisionError" in "".join(capsys.readouterr())


async def test_closed_rate_closes_its_turns(tasks: Tasks) -> None:
    """A rate that is not in use any more tells those who count its turns."""
    turns = Scripted()
    rate, _ = a_shared_rate(turns, tasks)
    rate.close()

    assert turns.closed


# --- Shared for real -----------------------------------------------------------------------------


async def drive(rate: SharedRate, seconds: float, every: float) -> list[float]:
    """Ask for a turn each *every* seconds; give when there was one, from the beginning."""
    loop = asyncio.get_running_loop()
    began, asked, granted = loop.time(), 0, list[float]()

    async def _one() -> None:
        if await rate.take():
            granted.append(loop.time() - began)

    async with asyncio.TaskGroup() as group:
        while (now := loop.time() - began) < seconds:
            while asked * every <= now:
                asked += 1
                group.create_task(_one())
            await asyncio.sleep(every)
    return granted


async def test_two_instances_share_a_rate() -> None:
    """Asked ten times too often, two instances let through the rate in sum, evenly."""
    seconds, per_second, burst = 2.5, 100, 10
    with valkey_server() as valkey:
        url = f"{valkey.url}?socket_timeout=10"
        async with (
            RedisExtras(url, timeout=2.0) as ada,
            RedisExtras(url, timeout=2.0) as bob,
        ):
            rates = [each.rate("main", per_second, burst) for each in (ada, bob)]
            granted = await asyncio.gather(*(drive(each, seconds, 0.002) for each in rates))

    total = seconds * per_second + burst
    assert total * 0.95 <= sum(map(len, granted)) <= total * 1.05
    assert min(map(len, granted)) > total / 4
    # After the burst each half of a second has its half of the rate.
    halves = [int(at * 2) for each in granted for at in each]
    assert all(abs(halves.count(each) - per_second / 2) <= 2 * burst for each in (1, 2, 3))


async def test_shared_rate_outlives_its_server() -> None:
    """When the server is killed requests go on at once, at the same rate, and share it again."""
    with valkey_server() as valkey:
        async with RedisExtras(valkey.url, timeout=0.5) as extras:
            rate = extras.rate("main", 1000, 5)
            assert await rate.take()
            valkey.kill()
            began = time.monotonic()
            alone = [await rate.take() for _ in range(50)]
            waited = time.monotonic() - began
            assert "away" in repr(rate)
            valkey.restart()
            async with asyncio.timeout(10):
                while "away" in repr(rate):  # noqa: ASYNC110 - nobody sets an event
                    await asyncio.sleep(0.005)
            await rate.take()

            assert sum(alone) >= 5
            assert waited < 0.5
            assert 1 == valkey.call("EXISTS", "vp:r:main")
