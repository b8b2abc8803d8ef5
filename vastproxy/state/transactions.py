"""
Transactions that end, whoever waits for them.

Rule 1: a caller may give up at any moment: its transaction goes on to its end, for some seconds at
most, on a connection that nobody else gets until then. So no lock and no connection is left over.
Rule 2: who waits is always told: also that nothing comes, because the database was closed.
Rule 3: a lock of another process costs what it lasts, and no longer: where SQLite would sleep for
100 ms, it is asked every other millisecond.
"""

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.observe.tasks import Tasks

# First of these: it says what to install where SQLAlchemy is missing.
from vastproxy.state.migrate import Place, is_locked, mapped_errors, open_engine  # isort: split

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import Executable

from vastproxy.state.tables import Rows

CONNECTIONS = 5
"""Of one process to PostgreSQL: transactions are short, and its default limit is 100."""

QUEUE_WITHIN = 5.0
"""Seconds that a call waits for one of them, as SQLite for its lock; callers have less patience."""

BUSY_MS = 3
"""Milliseconds that SQLite itself waits for its lock: it looks after one, and after three."""

LOCKED_PAUSE = 0.001
"""Seconds until it is asked again."""

CLOSE_WITHIN = 3.0
"""Seconds that calls which are under way get when the database is closed."""

T = TypeVar("T")


class Transactions:
    """
    The connections to the database at *place*, and what is done on them.

    Where nothing else is said, methods raise StateBackendError.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        # SQLite has one writer: who waits for it here is served in turn.
        self._connections = CONNECTIONS if place.is_postgres else 1
        self._slots = asyncio.Semaphore(self._connections)
        self.engine = open_engine(place, connections=self._connections, busy_ms=BUSY_MS)
        # One statement is a transaction by itself: that saves the two around it.
        alone: dict[str, Any] = (
            {"isolation_level": "AUTOCOMMIT"} if place.is_postgres else {"single_statement": True}
        )
        self._alone = self.engine.execution_options(**alone)
        self._tasks = Tasks("database")
        self._is_closed = False

    async def ask(self, statement: Executable, asked: Mapping[str, object]) -> Rows:
        """Say one *statement*, a transaction by itself; give its rows."""
        return await self.job(lambda: self.say(statement, asked))

    async def transact(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Do *work* in one transaction."""

        async def transaction() -> T:
            async with self.engine.begin() as connection:
                return await work(connection)

        return await self.job(transaction)

    async def warm(self, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        """Do *work* on all connections at the same time, and undo it."""

        async def undone() -> None:
            async with self.engine.connect() as connection:
                await work(connection)
                await connection.rollback()

        await asyncio.gather(*[self.job(undone) for _ in range(self._connections)])

    async def say(self, statement: Executable, asked: Mapping[str, object]) -> Rows:
        """Say one *statement* as a part of a job. Raises what drivers raise."""
        async with self._alone.connect() as connection:
            result = await connection.execute(statement, asked)
            return result.all() if result.returns_rows else []

    async def job(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do *work* to its end, whether or not the caller waits for it."""
        await self._wait_slot()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tasks.spawn(self._settle(work, done), "transaction")
        return await done

    async def _wait_slot(self) -> None:
        """Wait until a connection may be used."""
        try:
            async with asyncio.timeout(QUEUE_WITHIN):
                await self._slots.acquire()
        except TimeoutError:
            busy = f"state: {self._place}: all {self._connections} connections are in use"
            raise StateAwayError(busy) from None
        if self._is_closed:
            # A task that is cancelled before it begins tells nobody.
            self._slots.release()
            raise StateAwayError(f"state: {self._place}: closed")

    async def _settle(
        self, work: Callable[[], Coroutine[Any, Any, T]], done: "asyncio.Future[T]"
    ) -> None:
        try:
            with mapped_errors(self._place):
                result = await _unlocked(work)
            if not done.done():
                done.set_result(result)
        except StateBackendError as error:
            _fail(done, error)
        except asyncio.CancelledError:
            _fail(done, StateAwayError(f"state: {self._place}: closed meanwhile"))
            raise
        except BaseException as error:
            _fail(done, error)
            raise
        finally:
            self._slots.release()

    async def wait_idle(self) -> None:
        """Wait until nothing is under way; that is a matter of seconds."""
        await self._tasks.wait_idle(QUEUE_WITHIN + CLOSE_WITHIN)

    async def close(self) -> None:
        """Let what is under way end, and release the connections."""
        self._is_closed = True
        await self._tasks.wait_idle(CLOSE_WITHIN)
        async with self._tasks:
            pass
        await self.engine.dispose()

    @property
    def under_way(self) -> int:
        """How many there are now."""
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"<Transactions {self._place}, under way: {self.under_way}>"


async def _unlocked(work: Callable[[], Awaitable[T]]) -> T:
    """Do *work*, as soon as no other process has SQLite's lock: then it has changed nothing."""
    until = time.monotonic() + QUEUE_WITHIN
    while True:
        try:
            return await work()
        except (DBAPIError, sqlite3.Error) as error:
            # The latter comes out of the opening of a connection as it is.
            if not is_locked(error) or time.monotonic() >= until:
                raise
        await asyncio.sleep(LOCKED_PAUSE)


def _fail(done: "asyncio.Future[T]", error: BaseException) -> None:
    """Give *error* to who waits, if anybody still does."""
    if not done.done():
        done.set_exception(error)
        # Nobody may be left to look at it: that is no mistake.
        done.exception()
