"""Background tasks with an owner: referenced, named, and waited for at the end."""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

T = TypeVar("T")


class Tasks:
    """
    Owns tasks that outlive the code that started them.

    Leaving the context cancels what still runs. A task that fails is logged at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: set[asyncio.Task[Any]] = set()
        self._log = structlog.get_logger("vastproxy.tasks")

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start *work* under *name*."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}: {name}")
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, work: Coroutine[Any, Any, T], name: str) -> T:
        """Do *work* to its end, also where the caller is cut off; give what it gives."""
        task = asyncio.get_running_loop().create_task(work, name=f"{self._name}: {name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Now nobody else would hear of a failure.
            task.add_done_callback(self._ended)
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("task.failed", task=task.get_name(), exc_info=error)

    async def wait_idle(self, timeout: float) -> bool:  # noqa: ASYNC109 - it gives up, not fails
        """Wait until nothing runs, for *timeout* seconds at most; False if something still does."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout
        # What ends may have started something: a report, or an answer that is written elsewhere.
        while self._running:
            left = ends - loop.time()
            await asyncio.wait(self._running, timeout=max(0.0, left))
            if left <= 0:
                break
        return not self._running

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in tuple(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def __len__(self) -> int:
        return len(self._running)

    def __repr__(self) -> str:
        return f"<Tasks {self._name}, running: {len(self._running)}>"
