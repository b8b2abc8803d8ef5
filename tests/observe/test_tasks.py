"""Background tasks are named, waited for, cancelled at the end, and never fail in silence."""

import asyncio

from structlog.testing import capture_logs

from vastproxy.observe.tasks import Tasks


async def test_tasks_are_waited_for() -> None:
    """Waiting until nothing runs ends as soon as the last task has."""
    done: list[int] = []
    gate = asyncio.Event()

    async def work(number: int) -> None:
        """Wait for the gate."""
        await gate.wait()
        done.append(number)

    async with Tasks("t") as tasks:
        for number in range(3):
            tasks.spawn(work(number), "work")
        assert 3 == len(tasks)
        gate.set()
        idle = await tasks.wait_idle(5.0)

    assert idle
    assert [0, 1, 2] == done
    assert 0 == len(tasks)


async def test_waiting_gives_up() -> None:
    """Waiting ends when its time is over, and says that something still runs."""
    async with Tasks("t") as tasks:
        tasks.spawn(asyncio.Event().wait(), "for ever")
        idle = await tasks.wait_idle(0.01)

    assert not idle


async def test_nothing_to_wait_for() -> None:
    """Without tasks there is nothing to wait for."""
    async with Tasks("t") as tasks:
        assert await tasks.wait_idle(0.0)


async def test_leaving_cancels_what_runs() -> None:
    """Leaving the context cancels what runs, and waits until it has ended."""
    ended: list[str] = []
    started = asyncio.Event()

    async def work() -> None:
        """Wait for ever."""
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cancelled")

    with capture_logs() as logs:
        async with Tasks("t") as tasks:
            tasks.spawn(work(), "work")
            await started.wait()

    assert ["cancelled"] == ended
    assert 0 == len(tasks)
    assert [] == logs


async def test_failure_is_logged_at_once() -> None:
    """A task that fails is logged by its name, with the error, and disturbs no other."""

    async def failing() -> None:
        """Fail."""
        raise LookupError("lost")

    with capture_logs() as logs:
        async with Tasks("t") as tasks:
            tasks.spawn(failing(), "bad")
            tasks.spawn(asyncio.sleep(0), "good")
            await tasks.wait_idle(5.0)

    assert [("task.failed", "error", "t: bad")] == [
        (each["event"], each["log_level"], each["task"]) for each in logs
    ]
    assert isinstance(logs[0]["exc_info"], LookupError)


async def test_repr_tells_how_many_run() -> None:
    """A collection of tasks says its name and how many run."""
    async with Tasks("reports") as tasks:
        tasks.spawn(asyncio.sleep(0), "one")
        assert "<Tasks reports, running: 1>" == repr(tasks)
