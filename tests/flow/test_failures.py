"""How often upstreams failed: counted in the background, and for no ad request to wait."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from structlog.testing import capture_logs

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.flow.failures import MAX_CAMPAIGNS, FailureCounts, errors_key
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend


class Counting(InMemoryBackend):
    """Counts its calls, and can be broken."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.written = asyncio.Event()
        self.problem: StateBackendError | None = None

    async def increment(self, key: str, amount: int = 1) -> int:
        """Take note, and add, unless there is a problem."""
        if self.problem is not None:
            raise self.problem
        self.calls.append((key, amount))
        self.written.set()
        return await super().increment(key, amount)


@dataclass
class Place:
    """A state, and what counts in it."""

    backend: Counting
    state: GuardedState
    counts: FailureCounts


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    """Open a state that is written to at once."""
    backend = Counting()
    async with GuardedState(backend) as state:
        yield Place(backend, state, FailureCounts(state, every=0.0))


async def test_failures_are_written_together(place: Place) -> None:
    """What is counted at one time is written in one call for each campaign."""
    for _ in range(3):
        place.counts.add("spring")
    place.counts.add("autumn", 2)
    place.counts.add("winter", 0)
    assert "<FailureCounts waiting: {'spring': 3, 'autumn': 2}>" == repr(place.counts)
    await place.backend.written.wait()
    await place.counts.flush()

    assert {("errors:spring", 3), ("errors:autumn", 2)} == set(place.backend.calls)


async def test_counting_goes_on(place: Place) -> None:
    """What is counted after a write is written as well."""
    for expected in (1, 2):
        place.backend.written.clear()
        place.counts.add("spring")
        await place.backend.written.wait()

        assert expected == await place.backend.get_count(errors_key("spring"))


async def test_written_at_the_end() -> None:
    """What waits when the state is closed is written before."""
    backend = Counting()
    async with GuardedState(backend) as state:
        counts = FailureCounts(state, every=3600)
        counts.add("spring")
        await asyncio.sleep(0)
        assert [] == backend.calls

    assert [("errors:spring", 1)] == backend.calls


@pytest.mark.parametrize("problem", [StateAwayError("away"), StateBackendError("full")])
async def test_counts_wait_for_the_state(problem: StateBackendError) -> None:
    """While nothing can be written counts wait, and that is said once."""
    backend = Counting()
    async with GuardedState(backend) as state:
        counts = FailureCounts(state, every=3600)
        counts.add("spring")
        backend.problem = problem
        with capture_logs() as logs:
            await counts.flush()
            counts.add("spring")
            await counts.flush()
        backend.problem = None
        state.available = True
        await counts.flush()

    said = [each for each in logs if each["event"] == "failures.not_counted"]
    assert [1] == [each["waiting"] for each in said]
    assert [("errors:spring", 2)] == [each for each in backend.calls if "errors" in each[0]]


async def test_few_campaigns_wait() -> None:
    """Whoever makes up campaigns fills no memory: a bounded number of them waits."""
    backend = Counting()
    async with GuardedState(backend) as state:
        counts = FailureCounts(state, every=3600)
        for number in range(MAX_CAMPAIGNS + 10):
            counts.add(f"c{number}")
        counts.add("c0")
        await asyncio.sleep(0)

    assert MAX_CAMPAIGNS == len(backend.calls)
    assert ("errors:c0", 2) in backend.calls
