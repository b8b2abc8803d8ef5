"""An ad server that is no more than its answers, and somebody who hears what guards tell."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from vastproxy.errors import UpstreamError, UpstreamRefusedError
from vastproxy.model import HopReply
from vastproxy.observe.trace import Trace
from vastproxy.upstream.guard import Call, Guard

GOOD = HopReply(200, (), b"")
BAD = HopReply(500, (), b"")


@dataclass
class Scripted:
    """Answers what it is told, one after the other, and the last for ever."""

    answers: list[HopReply | Exception]
    asked: int = 0
    waiting: int = 0
    go: asyncio.Event | None = None
    trace: Trace = field(default_factory=Trace)

    async def get(self) -> HopReply:
        """Answer a call."""
        self.asked += 1
        if self.go is not None:
            self.waiting += 1
            await self.go.wait()
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, *, fair: bool = True, made_up: bool = False) -> Call:
        """Give a call of it."""
        return Call(self.get, self.trace, lambda: fair, made_up)


@dataclass
class Told:
    """Hears what guards tell."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    changes: list[tuple[str, str, str]] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def upstream_called(self, upstream: str, result: str, seconds: float | None) -> None:
        """Hear of a call."""
        assert (seconds is None) == (result in {"breaker", "rate_limit", "busy"})
        self.calls.append((upstream, result))

    def breaker_changed(self, upstream: str, old: str, new: str) -> None:
        """Hear of a change."""
        self.changes.append((upstream, old, new))

    def retried(self, upstream: str) -> None:
        """Hear of a repetition."""
        self.again.append(upstream)


async def failures(guard: Guard, server: Scripted, number: int) -> None:
    """Ask for *number* ad requests, and pass over what comes of it."""
    for _ in range(number):
        server.trace.blamed.clear()
        try:
            await guard.ask(server.call())
        except UpstreamError:
            continue


async def by(ask: Callable[[], Awaitable[object]]) -> str:
    """Say by what a call is refused."""
    with pytest.raises(UpstreamRefusedError) as caught:
        await ask()
    return caught.value.by
