"""
What ad requests ask Redis or Valkey in passing: turns of a shared rate, answers that are kept.

Rule 1: an ad request can do without. It waits for ``timeout`` at the most, not counting the time in
which this process itself was busy; and while the server is away it does not wait at all.
Rule 2: while it is away, one task asks now and then whether it is back. It is back when it answers
in time, over a connection that is open.
Rule 3: each use is judged by itself: in a cluster one may be away and another not, and an answer
too large for the network is no reason to count turns here.

Keys, with the default prefix: ``vp:r:<name>`` turns of a rate, ``vp:a:<key>`` an answer.
"""

import asyncio
import time
from dataclasses import dataclass

import structlog

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.observe.tasks import Tasks
from vastproxy.state.patience import patient
from vastproxy.state.redis_node import read
from vastproxy.state.redis_scripts import Script
from vastproxy.state.redis_servers import Call, Servers

FIRST_LOOK = 0.1
LAST_LOOK = 1.0
"""Seconds between looks whether the server is back: from the second to the slowest."""
STEADY = 10.0
"""Seconds that it must have been there for its going to be worth a line in the log, and a look at
once: a server that answers now and then would fill the log, and keep requests waiting."""

MAX_VALUE = 2 * 1024 * 1024 + 64 * 1024
"""Bytes of an answer: as many as the body of a hop may have, and what is told of it."""
PUTS = 4
"""Answers that are written at one time; who reads shall find a free connection."""
MAX_PUTS = 64
"""Answers that wait for that; more are not written. Others will come."""

NANOSECONDS = 1_000_000_000


class Reach:
    """
    Asks *servers* about *what*, in time or not at all.

    *timeout* is in seconds. *pause* is how many seconds nobody asks, at the least, when an answer
    has not come in time; 0 lets the first look be made at once.
    """

    def __init__(
        self, what: str, servers: Servers, tasks: Tasks, *, timeout: float, pause: float = 0.0
    ) -> None:
        self.what = what
        self.there = True
        """Whether it is worth asking."""
        self._servers = servers
        self._tasks = tasks
        self._timeout = timeout
        self._least_pause = pause
        self._pause = pause
        self._back = time.monotonic() - STEADY
        """Since when it is there."""
        self._closed = False
        self._log = structlog.get_logger("vastproxy.state")

    async def ask(self, call: Call, look: Call) -> object:
        """
        Give the reply to *call*.

        Raises StateBackendError where there is none in time; then *look*, which must do no harm,
        is sent now and then until that is answered.
        """
        if not self.there:
            raise StateAwayError(f"Redis is away ({self.what})")
        try:
            async with patient(self._timeout):
                return (await self._servers.ask([call]))[0]
        except (TimeoutError, StateBackendError) as error:
            problem = str(error) or f"no answer in {self._timeout * 1000:.0f} ms"
        self._goes_away(problem, look)
        raise StateAwayError(problem)

    def _goes_away(self, problem: str, look: Call) -> None:
        if not self.there:
            return
        self.there = False
        now = time.monotonic()
        steady = now - self._back >= STEADY
        if steady:
            self._pause = self._least_pause
            self._log.warning("redis.away", what=self.what, problem=problem)
        self._tasks.spawn(self._look(look, now, telling=steady), f"look ({self.what})")

    async def _look(self, call: Call, since: float, *, telling: bool) -> None:
        """Wait until the server is back."""
        while not self._closed:
            await asyncio.sleep(self._pause)
            self._pause = min(max(self._pause * 2, FIRST_LOOK), LAST_LOOK)
            if await self._answers(call):
                break
        if self._closed:
            return
        self.there = True
        self._back = time.monotonic()
        if telling:
            away = round(self._back - since, 3)
            self._log.warning("redis.back", what=self.what, away_seconds=away)

    async def _answers(self, call: Call) -> bool:
        try:
            # That of a new connection takes longer than an ad request would wait.
            await self._servers.ask([call])
            async with patient(self._timeout):
                await self._servers.ask([call])
        except (TimeoutError, StateBackendError):
            return False
        return True

    def close(self) -> None:
        """Ask no more, and look no more."""
        self.there, self._closed = False, True

    def __repr__(self) -> str:
        return f"<Reach {self.what}, {'there' if self.there else 'away'}>"


# --- Turns ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """What came of asking for turns."""

    turns: int
    wait: float
    """Seconds until there is another one; 0 where there may be one now."""


class RedisTurns:
    """
    Turns of a rate that is counted in Redis, under *key*.

    *interval* is in nanoseconds, and *burst* how many may be taken at once after a pause.
    """

    def __init__(self, reach: Reach, key: str, interval: int, burst: int) -> None:
        self._reach = reach
        self._key = key
        self._limits = (interval, burst)
        self._script = Script.load("turns")

    @property
    def there(self) -> bool:
        """Whether it is worth asking."""
        return self._reach.there

    async def take(self, count: int) -> Granted:
        """Take up to *count* turns. Raises StateBackendError where that cannot be told in time."""
        reply = await self._reach.ask(self._asked(count), self._asked(0))
        return read(_granted, reply)

    def _asked(self, count: int) -> Call:
        return self._script.call([self._key], *self._limits, count)

    def close(self) -> None:
        """Ask no more."""
        self._reach.close()

    def __repr__(self) -> str:
        return f"<RedisTurns {self._key}, {self._reach!r}>"


def _granted(reply: object) -> Granted:
    if not isinstance(reply, list) or len(reply) != len(Granted.__slots__):
        raise TypeError
    turns, wait = reply
    return Granted(int(turns), int(wait) / NANOSECONDS)


# --- Answers -------------------------------------------------------------------------------------


class RedisStore:
    """Answers that other instances may use too. What cannot be asked is not there."""

    def __init__(self, reach: Reach, servers: Servers, *, prefix: str = "vp:") -> None:
        self._reach = reach
        self._servers = servers
        self._prefix = f"{prefix}a:"
        self._turns = asyncio.Semaphore(PUTS)
        self._putting = 0
        self._log = structlog.get_logger("vastproxy.state")

    async def get(self, key: str) -> bytes | None:
        """Give what is kept under *key*; None for nothing, and where it cannot be told in time."""
        if not self._reach.there:
            return None
        name = self._prefix + key
        try:
            value = await self._reach.ask(Call(name, ("GET", name)), Call(name, ("EXISTS", name)))
        except StateBackendError:
            return None
        return value if isinstance(value, bytes) else None

    async def put(self, key: str, value: bytes, seconds: float) -> None:
        """Keep *value* under *key* for some *seconds*, if that is possible now."""
        milliseconds = int(seconds * 1000)
        possible = self._reach.there and self._putting < MAX_PUTS
        if not possible or milliseconds < 1 or len(value) > MAX_VALUE:
            return
        name = self._prefix + key
        self._putting += 1
        try:
            async with self._turns:
                await self._servers.ask([Call(name, ("SET", name, value, "PX", milliseconds))])
        except StateBackendError as error:
            # No proof of absence: a server that is full still answers who reads.
            self._log.debug("redis.not_kept", problem=str(error))
        finally:
            self._putting -= 1

    def __repr__(self) -> str:
        return f"<RedisStore {self._reach!r}, being written: {self._putting}>"
