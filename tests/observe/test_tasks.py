"""Background tasks are named, waited for, cancelled at the end, and never fail in silence."""

import asyncio

import pytest
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


async def test_what_tasks_start_is_waited_for() -> None:
    """Waiting goes on while what ends starts something else."""
    done: list[int] = []
    async with Tasks("t") as tasks:

        async def work(left: int) -> None:
            """Start the next one, and end."""
            await asyncio.sleep(0)
            done.append(left)
            if left:
                tasks.spawn(work(left - 1), "work")

        tasks.spawn(work(3), "work")
        idle = await tasks.wait_idle(5.0)

    assert idle
    assert [3, 2, 1, 0] == done


async def test_waiting_gives_up_on_an_endless_chain() -> None:
    """Tasks that start tasks for ever are not waited for beyond the time."""
    async with Tasks("t") as tasks:

        async def work() -> None:
            """Start another."""
            await asyncio.sleep(0.001)
            tasks.spawn(work(), "work")

        tasks.spawn(work(), "work")
        assert not await tasks.wait_idle(0.02)


async def test_spawned_task_is_given() -> None:
    """Who starts a task may wait for it, and have what it gives."""

    async def work() -> int:
        """Give a number."""
        return 7

    async with Tasks("t") as tasks:
        task = tasks.spawn(work(), "work")

        assert 7 == await task
        assert "t: work" == task.get_name()


async def test_finished_work_gives_what_it_gives() -> None:
    """What is done to its end gives its result to who waits, and its error, and logs nothing."""

    async def work(error: Exception | None) -> str:
        """End."""
        if error:
            raise error
        return "done"

    with capture_logs() as logs:
        async with Tasks("t") as tasks:
            assert "done" == await tasks.finish(work(None), "work")
            with pytest.raises(LookupError, match="lost"):
                await tasks.finish(work(LookupError("lost")), "work")
            assert 0 == len(tasks)

    assert [] == logs


async def test_work_goes_on_without_who_asked() -> None:
    """Where the caller is cut off the work goes on, and is waited for like any other."""
    done: list[str] = []
    started, gate = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        """Wait for the gate."""
        started.set()
        await gate.wait()
        done.append("done")

    async with Tasks("t") as tasks:
        async with asyncio.TaskGroup() as group:
            caller = group.create_task(tasks.finish(work(), "work"))
            await started.wait()
            caller.cancel()
        running = len(tasks)
        gate.set()
        idle = await tasks.wait_idle(5.0)

    assert caller.cancelled()
    assert (1, True, ["done"]) == (running, idle, done)


async def test_failure_that_nobody_waits_for_is_logged() -> None:
    """Work that fails after its caller was cut off is logged, once."""
    started, gate = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        """Wait for the gate, and fail."""
        started.set()
        await gate.wait()
        raise LookupError("lost")

    with capture_logs() as logs:
        async with Tasks("t") as tasks:
            async with asyncio.TaskGroup() as group:
                caller = group.create_task(tasks.finish(work(), "bad"))
                await started.wait()
                caller.cancel()
            gate.set()
            await tasks.wait_idle(5.0)

    assert [("task.failed", "t: bad")] == [(each["event"], each["task"]) for each in logs]


async def test_repr_tells_how_many_run() -> None:
    """A collection of tasks says its name and how many run."""
    async with Tasks("reports") as tasks:
        tasks.spawn(asyncio.sleep(0), "one")
        assert "<Tasks reports, running: 1>" == repr(tasks)


async def test_no_time_is_one_turn() -> None:
    """Without any time to wait, what is ready ends all the same."""

    async def work() -> None:
        """End at once."""

    async with Tasks("t") as tasks:
        tasks.spawn(work(), "work")
        await tasks.wait_idle(0)

        assert 0 == len(tasks)
