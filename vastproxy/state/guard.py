"""
Between the requests and a state backend that may be slow, or away.

Rule 1: a call takes at most ``timeout``, not counting the time in which this process itself was
busy. When that passes, the backend is taken to be away: everybody who waits is told at once, and
nobody asks again.
Rule 2: while it is away, one task asks whether it is back. It is back when it answers, and has
taken what the journal kept.
Rule 3: calls that are asked for at the same time go out together: two hundred reservations for one
viewer are one call, not a queue of two hundred.
Rule 4: what was shown is counted, sooner or later, once: a confirmation that could not be written
goes to the journal.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import structlog

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.observe.tasks import Tasks
from vastproxy.state.base import Account, Booking, Claim, Hold, Level, StateBackend, Verdict
from vastproxy.state.journal import Journal
from vastproxy.state.lanes import Lane
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.patience import MAX_PATIENCE, patient

T = TypeVar("T")

TURNS = 5
"""Calls that are not bundled and under way at one time: as many as SQL has connections."""
FIRST_LOOK = 0.1
LAST_LOOK = 1.0
"""Seconds between looks whether the backend is back: from the second to the slowest. The first is
made at once, as caps are open until then, and it may have been a false alarm."""
STEADY = 10.0
"""Seconds that it must have been back for the first look to be made at once again: a server that
answers a look, and is too slow for requests, would make each of them wait."""
LOOK_TIMEOUT = 2.0
"""Seconds that a look, and the writing of a part of the journal, may take."""
SETTLED_AT_ONCE = 500
"""Entries of the journal in one call."""
SWEEP_EVERY = 60.0
"""Seconds between two sweeps of what has expired; up to a quarter more, so that many processes do
not sweep together."""


PROBE = "vastproxy:probe"
"""A plain counter that is written to see whether anything can be."""


@dataclass(frozen=True, slots=True)
class Telling:
    """Who hears what happens to the state: metrics."""

    there: Callable[[bool], None] = lambda _: None
    """Called when the backend goes, with False, and when it is back, with True."""
    failed: Callable[[], None] = lambda: None
    """Called for each call that failed."""
    waiting: Callable[[int], None] = lambda _: None
    """Called with the number of entries in the journal when it changes."""


class GuardedState:
    """
    The state as requests see it.

    *backend* does the work; *timeout* is in seconds; *journal* keeps what cannot be written;
    *local* says that the backend never waits for anybody, so that calls need not be bundled;
    *telling* hears what happens.
    """

    def __init__(
        self,
        backend: StateBackend,
        *,
        timeout: float = 0.05,
        journal: Journal | None = None,
        local: bool = False,
        telling: "Telling | None" = None,
    ) -> None:
        self.backend = backend
        # An empty journal is false, as an empty list is.
        self.journal = Journal() if journal is None else journal
        self.available = True
        """Whether requests may ask."""
        self._timeout = timeout
        self._local = local
        self._settling = asyncio.Lock()
        self._to_flush = False
        """Whether a task waits for its turn to write the journal."""
        self._pause = 0.0
        """Seconds until the next look, while it is away."""
        self._back = -STEADY
        """When it came back, on the monotonic clock."""
        self._telling = telling or Telling()
        self._tasks = Tasks("state")
        self._log = structlog.get_logger("vastproxy.state")
        self._reserving = Lane[Verdict](self, backend.reserve)
        self._confirming = Lane[Booking](self, backend.confirm)
        self._looking = Lane[list[Level]](self, self._look_at)
        self._meanwhile = InMemoryBackend()
        """Counts for caps while the backend is away; forgotten when it is back."""
        self._turns = asyncio.Semaphore(TURNS)

    # --- What requests ask ----------------------------------------------------------------------

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*. Raises StateAwayError, or StateBackendError."""
        if self._local:
            return await self.backend.reserve(holds)
        return await self._reserving.ask(holds)

    async def reserve_meanwhile(self, holds: Sequence[Hold]) -> list[Verdict]:
        """
        Reserve each of *holds* in this process alone: for what could not be asked.

        So a cap lets its limit through once more for each process, and not everything.
        """
        return await self._meanwhile.reserve(holds)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking | Literal["deferred"]]:
        """Count each of *holds*, now or, where that cannot be, later (``deferred``)."""
        try:
            if self._local:
                return list(await self.backend.confirm(holds))
            return list(await self._confirming.ask(holds))
        except StateBackendError:
            await self._defer(holds)
            return ["deferred"] * len(holds)
        except asyncio.CancelledError:
            # What was shown was shown, whether or not its player still waits.
            await self._defer(holds)
            raise

    async def _defer(self, holds: Sequence[Hold]) -> None:
        """Count *holds* later; what caps count, here until then."""
        await self._meanwhile.confirm([each for each in holds if each.account.kind == "viewer"])
        await self.journal.add(holds)
        self._telling.waiting(len(self.journal))
        if self.available and not self._to_flush:
            # It answers, so it refused something that travelled along, has too much to do, or is
            # back already.
            self._to_flush = True
            self.spawn(self.flush(), "journal")

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*; where that cannot be, their time will."""
        if not self.available:
            await self._meanwhile.void(holds)
        elif holds:
            try:
                await self._in_turn(lambda: self.backend.void(holds))
            except StateBackendError as error:
                self._log.debug("state.void_failed", problem=str(error))

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*."""
        if self._local:
            return await self.backend.levels(account, claims)
        [found] = await self._looking.ask([Hold(account, "look", tuple(claims))])
        return found

    async def _look_at(self, looks: Sequence[Hold]) -> list[list[Level]]:
        """Ask each question of *looks* once: at one campaign hundreds may look at one time."""
        asked = dict.fromkeys((each.account, each.claims) for each in looks)
        found = await asyncio.gather(*(self.backend.levels(*each) for each in asked))
        answers = dict(zip(asked, found, strict=True))
        return [answers[each.account, each.claims] for each in looks]

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""
        return await self._in_turn(lambda: self.backend.read_items(account))

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items of *account*."""
        await self._in_turn(lambda: self.backend.write_items(account, changes, seconds))

    async def _in_turn(self, call: Callable[[], Awaitable[T]]) -> T:
        """
        Make a *call* in its turn, or at once where the backend never waits for anybody.

        Waiting for that is no proof against the backend: two hundred calls at one time take long,
        however quick each is. If it goes away meanwhile, those who wait are told at once.
        """
        if self._local:
            return await call()
        try:
            async with asyncio.timeout(self._timeout * MAX_PATIENCE):
                await self._turns.acquire()
        except TimeoutError:
            raise StateAwayError("too many calls wait for the state backend") from None
        try:
            if not self.available:
                raise StateAwayError("the state backend is away")
            return await self.in_time(call())
        finally:
            self._turns.release()

    # --- Away and back --------------------------------------------------------------------------

    async def in_time(self, call: Awaitable[T]) -> T:
        """Wait for *call*, but no longer than the timeout; what goes wrong is StateAwayError."""
        if not self.available:
            if asyncio.iscoroutine(call):
                call.close()
            raise StateAwayError("the state backend is away")
        try:
            async with patient(self._timeout):
                return await call
        except TimeoutError:
            self.goes_away(f"no answer in {self._timeout * 1000:g} ms")
            raise StateAwayError(f"no answer in {self._timeout * 1000:g} ms") from None
        except StateAwayError as error:
            self.goes_away(str(error))
            raise
        except StateBackendError as error:
            self._telling.failed()
            self._log.error("state.failed", problem=str(error))
            raise

    def goes_away(self, problem: str) -> None:
        """Take it that the backend is away, and begin to look for its return."""
        self._telling.failed()
        if not self.available:
            return
        self.available = False
        self._log.warning("state.away", problem=problem, backend=repr(self.backend))
        self._telling.there(False)  # noqa: FBT003 - whether it is
        self._tasks.spawn(self._look(time.monotonic()), "look")

    async def _look(self, since: float) -> None:
        """Wait until the backend is back and has taken the journal."""
        if since - self._back > STEADY:
            self._pause = 0.0
        while True:
            await asyncio.sleep(self._pause)
            self._pause = min(max(self._pause * 2, FIRST_LOOK), LAST_LOOK)
            # Results, not exceptions: if this loop ended, the state would never come back.
            [settled] = await asyncio.gather(self._looked(), return_exceptions=True)
            if isinstance(settled, int):
                break
            if isinstance(settled, StateBackendError | OSError):  # a TimeoutError is one
                problem = str(settled) or f"no answer in {LOOK_TIMEOUT:g} s"
                self._log.debug("state.still_away", problem=problem)
            else:
                self._log.error("state.look_failed", exc_info=settled)
        self.available = True
        self._meanwhile = InMemoryBackend()
        self._back = time.monotonic()
        away = round(time.monotonic() - since, 3)
        self._log.warning("state.back", away_seconds=away, settled=settled)
        self._telling.there(True)  # noqa: FBT003 - whether it is

    async def _looked(self) -> int:
        """See whether the backend is back, and write the journal; give how many entries."""
        async with asyncio.timeout(LOOK_TIMEOUT):
            await self.backend.ping()
        return await self._settle()

    async def _settle(self) -> int:
        """Write the journal; give how many entries that were."""
        count = 0
        async with self._settling:
            self._to_flush = False
            while holds := self.journal.oldest(SETTLED_AT_ONCE):
                async with asyncio.timeout(LOOK_TIMEOUT):
                    await self._write(holds)
                self.journal.settled(len(holds))
                self._telling.waiting(len(self.journal))
                count += len(holds)
        return count

    async def _write(self, holds: Sequence[Hold]) -> None:
        """Write *holds*; one that the backend will not take at all must not keep the others."""
        try:
            await self.backend.confirm(holds)
        except StateAwayError:
            raise
        except StateBackendError as error:
            if len(holds) > 1:
                # By halves: one among five hundred is found in twenty calls.
                await self._write(holds[: len(holds) // 2])
                await self._write(holds[len(holds) // 2 :])
                return
            await self._see_that_it_writes()
            lost = f"{holds[0].account} {[(c.key, c.amount) for c in holds[0].claims]}"
            self._log.error("state.refused", problem=str(error), entry=lost)

    async def _see_that_it_writes(self) -> None:
        """Raise StateAwayError if the backend takes nothing at all: it is full, or read only."""
        try:
            await self.backend.increment(PROBE)
            await self.backend.set_expiry(PROBE, SWEEP_EVERY)
        except StateBackendError as error:
            raise StateAwayError(f"it takes no writes: {error}") from None

    async def flush(self) -> None:
        """Write what the journal keeps, if the backend is there."""
        if not self.available:
            return
        try:
            await self._settle()
            await self.backend.flush()
        except (StateBackendError, OSError) as error:
            self.goes_away(str(error) or "the journal could not be written in time")

    # --- Life -----------------------------------------------------------------------------------

    async def open(self) -> None:
        """See whether the backend is there; if not, requests are served without it meanwhile."""
        try:
            async with asyncio.timeout(LOOK_TIMEOUT):
                await self._looked()
        except (StateAwayError, TimeoutError) as error:
            self.goes_away(str(error) or f"no answer in {LOOK_TIMEOUT:g} s")

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            await self._tasks.__aenter__()
            await self.backend.__aenter__()
            opened.push_async_exit(self)
            await self.open()
            opened.pop_all()
        self._tasks.spawn(self._sweep_regularly(), "sweep")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        if len(self.journal):
            try:
                async with asyncio.timeout(LOOK_TIMEOUT):
                    await self._settle()
            except (StateBackendError, OSError) as error:
                self._log.warning("state.not_settled", problem=str(error))
        self.journal.close()
        await self.backend.__aexit__(None, None, None)

    async def stop(self) -> None:
        """End what runs in the background; the backend stays open, as it may be somebody else's."""
        await self._tasks.__aexit__(None, None, None)

    async def _sweep_regularly(self) -> None:
        """Have expired rows deleted, now and then, while the backend is there."""
        while True:
            await asyncio.sleep(SWEEP_EVERY * random.uniform(1, 1.25))  # noqa: S311 - no secret
            if not self.available:
                continue
            try:
                swept = await self.backend.sweep()
            except StateBackendError as error:
                # A sweep may take longer than a request would wait: it is no proof of absence.
                self._log.warning("state.sweep_failed", problem=str(error))
            else:
                self._log.debug("state.swept", rows=swept)

    def spawn(self, work: Any, name: str) -> None:  # noqa: ANN401 - a coroutine
        """Start *work* that ends with this object."""
        self._tasks.spawn(work, name)

    def __repr__(self) -> str:
        there = "available" if self.available else "away"
        return f"<GuardedState {there}, {self.backend!r}, {self.journal!r}>"
