"""A rate: what comes through in a second, whoever asks how."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.upstream.limiter import RateLimiter


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
