"""
How often something may be done: a rate, not a number of things at once.

The generic cell rate algorithm (GCRA; ITU-T I.371, Annex A): of each key one point in time is kept,
at which its next cell would be due if all came evenly. What comes earlier than that, by more than
the burst allows, has to wait. A queue of tokens and somebody who refills it are not needed.

Rule 1: times are integers, in nanoseconds: ten tenths are one.
Rule 2: between looking and changing there is no ``await``.
Rule 3: who waits has his turn from the moment he asked; a turn is not given to another when he
goes. So the rate is never passed, and waiting is in order.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Self

NANOSECONDS = 1_000_000_000

MAX_KEYS = 10_000
"""Keys that are remembered: a megabyte or two."""

MAX_WAIT = 1.0
"""Seconds that somebody waits for his turn: as long as a hop may take."""


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
        self._interval = round(NANOSECONDS / rate)
        self._tolerance = (self.burst - 1) * self._interval
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
        self._due[key] = due + self._interval
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
