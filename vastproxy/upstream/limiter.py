"""
How often something may be done: a rate, not a number of things at once.

The generic cell rate algorithm (GCRA; ITU-T I.371, Annex A): of each key one point in time is kept,
at which its next cell would be due if all came evenly. What comes earlier than that, by more than
the burst allows, has to wait. A queue of tokens and somebody who refills it are not needed.

Rule 1: times are integers, in nanoseconds: ten tenths are one.
Rule 2: between looking and changing there is no ``await``.
Rule 3: who waits has his turn from the moment he asked; a turn is not given to another when he
goes. So the rate is never passed, and waiting is in order.
Rule 4: ad requests do not wait for a turn: there is one now, or none (:class:`Rate`). Where several
instances share a rate, each takes its turns from where they are counted; while that is away, it
lets through the whole rate by itself.
"""

import asyncio
import math
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, Self

from vastproxy.errors import StateBackendError

NANOSECONDS = 1_000_000_000

MAX_KEYS = 10_000
"""Keys that are remembered: a megabyte or two."""

MAX_WAIT = 1.0
"""Seconds that somebody waits for his turn: as long as a hop may take."""

MAX_UNASKED = 1.0
"""Seconds for which it is believed that others have left no turn: what counted them may be gone."""


class RateLimiter:
    """
    Lets through *rate* things a second, for each key.

    *burst* is how many may come at once after a pause; None: as many as in one second, one at the
    least. *timeout* is how long :meth:`acquire` waits, in seconds. *clock* gives seconds, *sleep*
    waits for some. Of more than *max_keys* the longest unused are forgotten, and begin anew.
    """

    def __init__(
        self,
        rate: float,
        burst: int | None = None,
        *,
        timeout: float = MAX_WAIT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        max_keys: int = MAX_KEYS,
    ) -> None:
        if not (math.isfinite(rate) and 0 < rate <= NANOSECONDS):
            raise ValueError(f"{rate} is no rate (write how many a second: 100, or 0.5)")
        self.rate = rate
        self.burst = max(1, int(rate)) if burst is None else burst
        if self.burst < 1:
            raise ValueError(f"a burst of {burst} lets nothing through (write 1 or more)")
        self.interval = round(NANOSECONDS / rate)
        """Nanoseconds between two turns."""
        self._tolerance = (self.burst - 1) * self.interval
        self._timeout = timeout
        self._clock = clock
        self._sleep = sleep
        self._max_keys = max_keys
        self._due: OrderedDict[str, int] = OrderedDict()
        self.refused = 0
        """How often there was no room, or not in time."""

    def try_acquire(self, key: str = "") -> bool:
        """Take a turn of *key* now; False, and nothing is taken, where it is not yet due."""
        return self._take(key, 0) is not None

    async def acquire(self, key: str = "", timeout: float | None = None) -> None:  # noqa: ASYNC109 - known beforehand
        """
        Take a turn of *key*, and wait until it is due.

        Raises TimeoutError, at once, where that is later than in *timeout* seconds; None is the
        limiter's own.
        """
        patience = self._timeout if timeout is None else timeout
        wait = self._take(key, patience)
        if wait is None:
            raise TimeoutError(f"no turn within {patience:g} s at {self.rate:g} a second")
        if wait:
            await self._sleep(wait / NANOSECONDS)

    def _take(self, key: str, patience: float) -> int | None:
        """Take a turn that is due within *patience* seconds; give the nanoseconds until then."""
        now = int(self._clock() * NANOSECONDS)
        due = max(now, self._due.get(key, now))
        if key in self._due:
            self._due.move_to_end(key)
        wait = max(0, due - self._tolerance - now)
        if wait > patience * NANOSECONDS:
            self.refused += 1
            return None
        self._due[key] = due + self.interval
        if len(self._due) > self._max_keys:
            self._due.popitem(last=False)
        return wait

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing to give back: a turn is taken for good."""

    def __repr__(self) -> str:
        return (
            f"<RateLimiter {self.rate:g}/s, burst {self.burst}, keys: {len(self._due)}, "
            f"refused: {self.refused}>"
        )


# --- For ad requests -----------------------------------------------------------------------------


class Rate(Protocol):
    """How often an upstream may be asked."""

    rate: float
    """Turns a second."""
    burst: int
    """Turns that may be taken at once after a pause."""
    refused: int
    """How often there was none."""
    shared: bool
    """Whether other instances take their turns from the same rate."""

    async def take(self) -> bool:
        """Take a turn now; False where there is none. Nobody waits for one."""


class LocalRate:
    """A rate of this process alone: *rate* turns a second, *burst* at once after a pause."""

    shared = False

    def __init__(
        self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limiter = RateLimiter(rate, burst, clock=clock, max_keys=1)
        self.rate = rate
        self.burst = burst
        self.refused = 0

    async def take(self) -> bool:
        """Take a turn now; False where there is none."""
        granted = self._limiter.try_acquire()
        self.refused += not granted
        return granted

    def __repr__(self) -> str:
        return f"<LocalRate {_in_words(self)}>"


class Granted(Protocol):
    """What came of asking for turns."""

    @property
    def turns(self) -> int:
        """How many there were."""

    @property
    def wait(self) -> float:
        """Seconds until there is another one; 0 where there may be one now."""


class Turns(Protocol):
    """Where the turns of several instances are counted. None of its calls takes long."""

    @property
    def there(self) -> bool:
        """Whether it is worth asking."""

    async def take(self, count: int) -> Granted:
        """Take up to *count* turns. Raises StateBackendError where that cannot be told in time."""

    def close(self) -> None:
        """Ask no more."""


class SharedRate:
    """
    A rate that several instances share: *limits* say how high it is, *turns* count it.

    While *turns* are away, *limits* are this instance's own. *spawn* starts a task, *clock* gives
    seconds, and *random* numbers from 0 to 1. Who asks while a call is under way goes along with
    the next one; so he waits for two calls at the most.
    """

    shared = True

    def __init__(
        self,
        limits: RateLimiter,
        turns: Turns,
        *,
        spawn: Callable[[Coroutine[Any, Any, None], str], object],
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.rate = limits.rate
        self.burst = limits.burst
        self.refused = 0
        self._limits = limits
        self._turns = turns
        self._spawn = spawn
        self._clock = clock
        self._random = random
        self._none_before = -math.inf
        """Until then nobody need ask: there is no turn, or the next one is for others."""
        self._waiting: list[asyncio.Future[bool | None]] = []
        self._asking = False

    async def take(self) -> bool:
        """Take a turn now; False where there is none."""
        granted = await self._asked() if self._turns.there else None
        if granted is None:
            granted = self._limits.try_acquire()
        self.refused += not granted
        return granted

    async def _asked(self) -> bool | None:
        """Tell whether there is a turn; None where that cannot be told in time."""
        if self._clock() < self._none_before:
            return False
        answer: asyncio.Future[bool | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        if not self._asking:
            self._asking = True
            self._spawn(self._ask(), "turns")
        return await answer

    async def _ask(self) -> None:
        batch: list[asyncio.Future[bool | None]] = []
        try:
            while self._waiting and self._turns.there:
                batch, self._waiting = self._waiting, []
                await self._ask_for([each for each in batch if not each.done()])
        finally:
            # Also where the task ends, or fails by a mistake of ours: nobody waits for ever.
            self._asking = False
            left, self._waiting = [*batch, *self._waiting], []
            _tell(left, [None] * len(left))

    async def _ask_for(self, batch: Sequence[asyncio.Future[bool | None]]) -> None:
        """Take a turn for each of *batch*: who asked first has the first one."""
        if not batch:
            return
        asked_at = self._clock()
        try:
            granted = await self._turns.take(len(batch))
        except StateBackendError:
            _tell(batch, [None] * len(batch))
            return
        # From before the call, since nobody knows when in its course the turns were counted.
        self._none_before = asked_at + min(self._step_back(granted), MAX_UNASKED)
        _tell(batch, [at < granted.turns for at in range(len(batch))])

    def _step_back(self, granted: Granted) -> float:
        """
        Give the seconds in which nobody asks.

        Who had the last turn there was lets others go first: instances that ask in step would else
        go on as they began, one with all turns and one with none. No turn is lost by that, as those
        that are late may be made up for; but for a burst of one.
        """
        interval = self._limits.interval / NANOSECONDS
        if not (granted.wait and granted.turns) or self.burst == 1:
            return granted.wait
        return granted.wait + interval * self._random()

    def close(self) -> None:
        """Take turns of nobody else any more: this is no longer in use."""
        self._turns.close()

    def __repr__(self) -> str:
        how = "shared" if self._turns.there else "here alone, as Redis is away"
        return f"<SharedRate {_in_words(self)}, {how}>"


def _in_words(rate: Rate) -> str:
    return f"{rate.rate:g}/s, burst {rate.burst}, refused: {rate.refused}"


def _tell(batch: Sequence[asyncio.Future[bool | None]], answers: Sequence[bool | None]) -> None:
    for waiting, answer in zip(batch, answers, strict=True):
        if not waiting.done():
            waiting.set_result(answer)
