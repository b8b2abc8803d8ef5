"""
How a database is reached, and how it comes to the tables of this version.

The scripts in ``migrations/`` are part of the package: an installed vastproxy needs no alembic.ini.
Processes that start together migrate one after the other, under one lock.
"""

import contextlib
import errno
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from vastproxy.errors import StateAwayError, StateBackendError

try:
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection, event, inspect, text
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import (
        ArgumentError,
        DBAPIError,
        InterfaceError,
        OperationalError,
        SQLAlchemyError,
    )
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
except ModuleNotFoundError as missing:
    raise StateBackendError(
        f"a state in a SQL database needs {missing.name} (install vastproxy[database])"
    ) from missing

SCRIPTS = Path(__file__).parent / "migrations"

DRIVERS: Mapping[str, str] = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "postgresql+psycopg": "postgresql+psycopg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}
"""Which driver speaks for a URL's scheme."""

CONNECT_WITHIN = 2.0
"""Seconds until a server must take a connection; callers have less patience, and need no more."""

ANSWER_WITHIN = 3.0
"""Seconds until it must answer a statement, other people's locks included."""

MIGRATE_WITHIN = 600.0
"""Seconds that one statement of a migration may take: an index over a day's operations."""

BUSY_MS = 5_000
"""Milliseconds that SQLite waits for a lock of another process, by itself: it sleeps for longer and
longer, up to 100 ms at a time, and what is free meanwhile it does not see."""

LOCK = 0x7661737470726F78
"""PostgreSQL's advisory lock of a migration: ``vastprox`` in ASCII."""

AWAY = ("08", "57P", "53", "55P03", "25P03", "XX000")
"""
Beginnings of SQLSTATEs of a server that is away or too busy: PostgreSQL, appendix A. Classes 08
(connection), 57P (shutdown, terminated) and 53 (no resources), lock_not_available,
idle_in_transaction_session_timeout; internal_error is what poolers answer without a server.
"""

BUSY = (
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR),
)
"""Primary result codes of SQLite: https://www.sqlite.org/rescode.html; a disk that is full or
broken too, which somebody will mend."""

Standing = Literal["empty", "outdated", "current", "newer", "foreign"]
"""What a database is to this version; ``foreign`` has our tables, and no revision."""

TABLES = frozenset({"frequency_caps", "budget_tracking", "operations", "viewer_items"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a database is."""

    url: URL

    @property
    def is_postgres(self) -> bool:
        """Whether it is PostgreSQL's; SQLite's otherwise."""
        return self.url.get_backend_name() == "postgresql"

    def check(self) -> None:
        """Raise StateBackendError where no database could ever be: a mistake, and no outage."""
        if self.is_postgres:
            return
        path = Path(self.url.database or "")
        if path.is_dir():
            raise StateBackendError(f"state: {path} is a directory (name a file in it)")
        if not path.parent.is_dir():
            raise StateBackendError(
                f"state: {path}: there is no directory {path.parent} (make it, or name another)"
            )

    def __str__(self) -> str:
        """Name it in messages: without user and password."""
        name = self.url.get_backend_name()
        if not self.is_postgres:
            return f"{name} {self.url.database}"
        hosts = self.url.host or ", ".join(self.url.normalized_query.get("host", ("localhost",)))
        port = f":{self.url.port}" if self.url.port else ""
        return f"{name} {hosts}{port}/{self.url.database or ''}"


def place_of(url: str) -> Place:
    """Read *url* as operators write it. Raises StateBackendError, which does not repeat it."""
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        raise StateBackendError("state: no URL of a database (write postgresql://…)") from None
    driver = DRIVERS.get(found.drivername)
    if driver is None:
        raise StateBackendError(
            f"state: {found.drivername}:// is no database that state can be kept in"
            " (write postgresql://user:password@host/name or sqlite:////path/to/file.db)"
        )
    found = found.set(drivername=driver)
    if driver.startswith("sqlite") and found.database in {None, "", ":memory:"}:
        raise StateBackendError("state: sqlite:// needs a file (write sqlite:///caps.db)")
    return Place(_libpq_words(found) if driver.endswith("asyncpg") else found)


def _libpq_words(url: URL) -> URL:
    """Say ``sslmode``, which operators know from libpq, in asyncpg's word."""
    if "sslmode" not in url.query:
        return url
    return url.difference_update_query(["sslmode"]).update_query_dict({"ssl": url.query["sslmode"]})


def open_engine(
    place: Place, *, connections: int, within: float = ANSWER_WITHIN, busy_ms: int = BUSY_MS
) -> AsyncEngine:
    """
    Make an engine of so many *connections*, without connecting.

    A statement may take *within* seconds, and wait *busy_ms* for SQLite's lock. Statements of
    PostgreSQL are prepared under names that occur once: PgBouncer (1.21, with
    max_prepared_statements) may hand a server connection to another client. Before an older one
    write ``?prepared_statement_cache_size=0``.
    """
    try:
        engine = create_async_engine(
            place.url,
            pool_size=connections,
            max_overflow=0,
            pool_timeout=within,
            # A broken connection shows itself; to ask before each use costs a round trip.
            pool_pre_ping=False,
            hide_parameters=True,
            connect_args=_arguments(place.url, within, busy_ms),
        )
    except ModuleNotFoundError as missing:
        what = "psycopg" if missing.name == "psycopg" else "vastproxy[database]"
        raise StateBackendError(
            f"state: {place}: needs {missing.name} (install {what})"
        ) from missing
    if not place.is_postgres:
        event.listen(engine.sync_engine, "do_connect", _look_for_directory)
        event.listen(engine.sync_engine, "connect", _set_up)
        event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _arguments(url: URL, within: float, busy_ms: int) -> dict[str, Any]:
    match url.drivername:
        case "postgresql+asyncpg":
            return {
                "timeout": CONNECT_WITHIN,
                "command_timeout": within,
                "prepared_statement_name_func": lambda: f"vastproxy_{uuid4()}",
            }
        case "postgresql+psycopg":
            # Whole seconds, and two at least: libpq, section Parameter Key Words.
            return {"connect_timeout": 2, "prepare_threshold": None}
        case _:
            return {"timeout": busy_ms / 1000}


def _look_for_directory(_: object, __: object, arguments: list[Any], ___: object) -> None:
    """
    Raise FileNotFoundError where the directory of SQLite's file is missing.

    SQLite would only say that it cannot open the file, and its driver leaves a thread behind.
    """
    directory = Path(arguments[0]).absolute().parent
    if not directory.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such directory", str(directory))


def _set_up(connection: Any, _: object) -> None:  # noqa: ANN401 - drivers have no common type
    """
    Prepare a connection of SQLite.

    WAL with synchronous NORMAL: what is committed survives the end of any process; the loss of
    power may take the last commits, never their order (https://www.sqlite.org/wal.html).
    """
    # The driver begins no transactions by itself: _begin does.
    connection.isolation_level = None
    cursor = connection.cursor()
    for statement in (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = NORMAL",
    ):
        cursor.execute(statement)
    cursor.close()


def _begin(connection: Connection) -> None:
    """Take SQLite's lock at once: who reads first and writes then may be refused in between."""
    if not connection.get_execution_options().get("single_statement"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextlib.contextmanager
def mapped_errors(place: Place) -> Iterator[None]:
    """Turn what drivers raise into StateAwayError, or, of a server that answers, its parent."""
    try:
        yield
    # OSError has TimeoutError in it; SQLite's own error comes out of _set_up as it is; half a
    # character cannot be sent at all.
    except (SQLAlchemyError, OSError, sqlite3.Error, UnicodeError) as error:
        kind = StateAwayError if is_away(error) else StateBackendError
        raise kind(f"state: {place}: {_told(error)}") from None


def is_away(error: Exception) -> bool:
    """Whether *error* says that there is no server, none in time, or one that is too busy."""
    if isinstance(error, OSError | PoolTimeoutError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    cause = _cause(error)
    if isinstance(cause, sqlite3.Error):
        # Extended result codes have the primary one in their lowest byte.
        return getattr(cause, "sqlite_errorcode", 0) & 0xFF in BUSY
    code = getattr(cause, "sqlstate", None)
    if code is None:
        # No word of a server: psycopg could not connect, asyncpg's connection was gone.
        return isinstance(error, OperationalError | InterfaceError)
    return str(code).startswith(AWAY)


def is_locked(error: Exception) -> bool:
    """Whether another process has SQLite's lock, so that nothing was done."""
    return getattr(_cause(error), "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def _cause(error: BaseException) -> BaseException:
    """Give the driver's own error."""
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def _told(error: BaseException) -> str:
    """Give one line about *error*, without statements and their parameters."""
    cause = _cause(error)
    lines = str(cause).strip().splitlines()
    # SQLAlchemy sets the driver's class before its words: <class 'asyncpg....Error'>: words
    words = re.sub(r"^<class '[^']*'>: ", "", lines[0]) if lines else "no answer in time"
    # ... and raises its own from the driver's, which has the name to look for.
    own = cause if isinstance(cause, OSError) else cause.__cause__ or cause
    return f"{words} ({type(own).__name__})"


# --- Migrations ---------------------------------------------------------------------------------


async def migrate(url: str) -> tuple[str, str]:
    """
    Bring the database at *url* to the tables of this version.

    Gives the revision before, empty for a new database, and after. Raises StateBackendError,
    also for a database of a newer version.
    """
    place = place_of(url)
    engine = open_engine(place, connections=1, within=MIGRATE_WITHIN)
    try:
        with mapped_errors(place):
            async with engine.begin() as connection:
                return await connection.run_sync(_upgrade, place)
    finally:
        await engine.dispose()


async def is_current(url: str) -> bool:
    """Whether the database at *url* has the tables of this version."""
    place = place_of(url)
    engine = open_engine(place, connections=1)
    try:
        with mapped_errors(place):
            return await standing(engine) == "current"
    finally:
        await engine.dispose()


async def standing(engine: AsyncEngine) -> Standing:
    """Tell what the database of *engine* is to this version. Raises what drivers raise."""
    async with engine.connect() as connection:
        return await connection.run_sync(_standing)


def check_standing(found: Standing, place: Place) -> None:
    """Raise StateBackendError where this version cannot use, or fill, a database as *found*."""
    match found:
        case "outdated":
            raise StateBackendError(
                f"state: {place}: its tables are of an older version (run `vastproxy migrate`)"
            )
        case "newer":
            raise StateBackendError(
                f"state: {place}: its tables are of a newer version (run that one, or name another"
                " database)"
            )
        case "foreign":
            raise StateBackendError(
                f"state: {place}: it has tables of these names that vastproxy did not make"
                " (name another database)"
            )
        case "empty" | "current":
            return


def _upgrade(connection: Connection, place: Place) -> tuple[str, str]:
    if place.is_postgres:
        # Until the end of the transaction, which holds all of the migration.
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    found = _standing(connection)
    if found != "outdated":
        check_standing(found, place)
    before = _revision(connection) or ""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return before, _revision(connection) or ""


def _standing(connection: Connection) -> Standing:
    revision, scripts = _revision(connection), ScriptDirectory(str(SCRIPTS))
    if revision is None:
        if not TABLES & set(inspect(connection).get_table_names()):
            return "empty"
        # Another process may have made them between the two looks.
        revision = _revision(connection)
        if revision is None:
            return "foreign"
    if revision == scripts.get_current_head():
        return "current"
    known = {each.revision for each in scripts.walk_revisions()}
    return "outdated" if revision in known else "newer"


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
