"""Bundle calls of one kind: what is asked while one is under way goes out together, next."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state.base import Hold

T = TypeVar("T")
R = TypeVar("R")

MAX_BATCH = 500
"""Holds in one call."""
MAX_WAITING = 20 * MAX_BATCH
"""Holds that wait for a call of one kind. That is twenty calls, and each takes its time-out at the
most: so nobody waits much longer than twenty time-outs (a second, where that is 50 ms)."""


class Owner(Protocol):
    """Whose calls are bundled: the guard of a state."""

    @property
    def available(self) -> bool:
        """Whether calls may be made."""

    async def in_time(self, call: Awaitable[R]) -> R:
        """Wait for *call*, but not for ever."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Start *work*."""


class Lane(Generic[T]):
    """Calls of one kind: what is asked while one is under way goes out together, next."""

    def __init__(self, state: Owner, call: Callable[[Sequence[Hold]], Awaitable[list[T]]]) -> None:
        self._state = state
        self._call = call
        self._waiting: list[tuple[Sequence[Hold], asyncio.Future[list[T]]]] = []
        self._holds = 0
        """Of all that wait."""
        self._running = False

    async def ask(self, holds: Sequence[Hold]) -> list[T]:
        """Give what the call gives for *holds*, which may travel with others'."""
        if not self._state.available:
            raise StateAwayError("the state backend is away")
        if self._waiting and self._holds + len(holds) > MAX_WAITING:
            raise StateAwayError("too many calls wait for the state backend")
        answer: asyncio.Future[list[T]] = asyncio.get_running_loop().create_future()
        self._waiting.append((holds, answer))
        self._holds += len(holds)
        if not self._running:
            self._running = True
            self._state.spawn(self._run(), "lane")
        return await answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._send(self._batch())
        finally:
            self._running = False
            waiting, self._waiting, self._holds = self._waiting, [], 0
            _break_off(waiting)

    def _batch(self) -> list[tuple[Sequence[Hold], asyncio.Future[list[T]]]]:
        taken, count = 0, 0
        for holds, _ in self._waiting:
            if taken and count + len(holds) > MAX_BATCH:
                break
            taken += 1
            count += len(holds)
        self._holds -= count
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    async def _send(self, batch: list[tuple[Sequence[Hold], asyncio.Future[list[T]]]]) -> None:
        # Who has gone meanwhile is left out: a viewer that closed the connection reserves nothing.
        batch = [each for each in batch if not each[1].done()]
        holds = [hold for each, _ in batch for hold in each]
        try:
            results = await self._state.in_time(self._call(holds)) if holds else []
            at = 0
            for each, answer in batch:
                if not answer.done():
                    answer.set_result(results[at : at + len(each)])
                at += len(each)
        except StateBackendError as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(type(error)(str(error)))
        finally:
            # Where the task ends, or fails by a mistake of ours, nobody waits for ever.
            _break_off(batch)


def _break_off(batch: Sequence[tuple[Sequence[Hold], asyncio.Future[Any]]]) -> None:
    """Tell those of *batch* who still wait that nothing comes."""
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(StateAwayError("the call was broken off"))
