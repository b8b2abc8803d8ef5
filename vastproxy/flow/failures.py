"""
How often upstreams failed, for the campaigns that they were asked for.

Rule 1: no ad request waits for it. What is counted is written about once a second, in one task.
Rule 2: it is a figure for people, no money. A write whose answer was lost is made again, and may
count twice.
Rule 3: while the state is away counts wait, for a bounded number of campaigns.
"""

import asyncio

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.state.guard import GuardedState

EVERY = 1.0
"""Seconds between two writes."""

MAX_CAMPAIGNS = 1000
"""Whose counts may wait. A configuration has some dozens; a program may make up any number."""


def errors_key(campaign: str) -> str:
    """Name the counter of *campaign* in the state."""
    return f"errors:{campaign}"


class FailureCounts:
    """Counts failures, and writes them to *state* every so many seconds."""

    def __init__(self, state: GuardedState, every: float = EVERY) -> None:
        self._state = state
        self._every = every
        self._waiting: dict[str, int] = {}
        self._is_running = False
        self._has_said_so = False
        """Whether it was logged that nothing can be written."""
        self._log = structlog.get_logger("vastproxy.state")

    def add(self, campaign: str, number: int = 1) -> None:
        """Count *number* failures for *campaign*."""
        if not number:
            return
        if campaign not in self._waiting and len(self._waiting) >= MAX_CAMPAIGNS:
            return
        self._waiting[campaign] = self._waiting.get(campaign, 0) + number
        if not self._is_running:
            self._is_running = True
            self._state.spawn(self._run(), "failures")

    async def _run(self) -> None:
        try:
            while self._waiting:
                await asyncio.sleep(self._every)
                await self.flush()
        except asyncio.CancelledError:
            # The state ends what runs in its background before it is closed.
            await self.flush()
            raise
        finally:
            self._is_running = False

    async def flush(self) -> None:
        """Write what waits, if the state takes it."""
        for campaign in list(self._waiting):
            number = self._waiting[campaign]
            writing = self._state.backend.increment(errors_key(campaign), number)
            try:
                await self._state.in_time(writing)
            except StateBackendError as error:
                self._say_so(error)
                return
            self._has_said_so = False
            self._waiting[campaign] -= number
            if not self._waiting[campaign]:
                del self._waiting[campaign]

    def _say_so(self, error: StateBackendError) -> None:
        if not self._has_said_so:
            self._has_said_so = True
            waiting = sum(self._waiting.values())
            self._log.warning("failures.not_counted", waiting=waiting, problem=str(error))

    def __repr__(self) -> str:
        return f"<FailureCounts waiting: {self._waiting}>"
