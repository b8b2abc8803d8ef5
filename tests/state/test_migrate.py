"""A database comes to the tables of this version by itself, once, and never by guessing."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.support.postgres import Postgres, postgres_server
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state import migrate as module
from vastproxy.state.database import DatabaseBackend
from vastproxy.state.migrate import TABLES, is_current, migrate, open_engine, place_of
from vastproxy.state.tables import METADATA

NEWER = """
revision = "9999"
down_revision = "0001"


def upgrade():
    pass
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """Run one server for all tests of this file."""
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state.db"
    running: Postgres = request.getfixturevalue("server")
    return running.new_database()


@asynccontextmanager
async def an_engine(url: str) -> AsyncIterator[AsyncEngine]:
    """Open an engine of its own."""
    engine = open_engine(place_of(url), connections=1)
    try:
        yield engine
    finally:
        await engine.dispose()


async def run(url: str, statement: str) -> None:
    """Run one *statement* apart from everything."""
    async with an_engine(url) as engine, engine.begin() as connection:
        await connection.execute(text(statement))


@pytest.fixture
def later_scripts(tmp_path: Path) -> Path:
    """Give the scripts of a version to come."""
    scripts = tmp_path / "migrations"
    shutil.copytree(module.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "9999_later.py").write_text(NEWER)
    return scripts


async def test_empty_database_is_migrated_once(url: str) -> None:
    """An empty database gets all tables; a second time changes nothing."""
    before = await is_current(url)
    first, second = await migrate(url), await migrate(url)

    assert not before
    assert ("", "0001") == first
    assert ("0001", "0001") == second
    assert await is_current(url)


async def test_migrations_make_the_tables_of_the_code(url: str) -> None:
    """What the scripts make is what the statements are written for, to the last column."""
    await migrate(url)

    def _differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, METADATA))

    async with an_engine(url) as engine, engine.connect() as connection:
        found = await connection.run_sync(_differences)
        checks = await connection.run_sync(_checks)

    assert [] == found
    assert TABLES == set(METADATA.tables)
    assert {each.name for table in METADATA.tables.values() for each in table.constraints
            if str(each.name).startswith("ck_")} == checks  # fmt: skip


def _checks(connection: Connection) -> set[str | None]:
    look = inspect(connection)
    return {each["name"] for table in TABLES for each in look.get_check_constraints(table)}


async def test_four_processes_start_on_an_empty_database(url: str) -> None:
    """Four backends that meet an empty database at once all find it usable, and it is migrated."""
    backends = [DatabaseBackend(url) for _ in range(4)]
    try:
        await asyncio.gather(*(each.ping() for each in backends))
        counts = [await each.increment("all") for each in backends]
    finally:
        for each in backends:
            await each.close()

    assert [1, 2, 3, 4] == counts
    assert await is_current(url)


async def test_outdated_database_is_refused(
    url: str, later_scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of an older version are left alone until the operator migrates them."""
    await migrate(url)
    monkeypatch.setattr(module, "SCRIPTS", later_scripts)

    async with DatabaseBackend(url) as backend:
        with pytest.raises(StateBackendError, match=r"older version \(run `vastproxy migrate`\)"):
            await backend.ping()
        assert not await is_current(url)
        assert ("0001", "9999") == await migrate(url)
        await backend.ping()


async def test_newer_database_is_refused(
    url: str, later_scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of a newer version are neither used nor touched."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "SCRIPTS", later_scripts)
        await migrate(url)

    async with DatabaseBackend(url) as backend:
        with pytest.raises(StateBackendError, match="newer version"):
            await backend.ping()
    with pytest.raises(StateBackendError, match="newer version"):
        await migrate(url)


async def test_tables_of_others_are_refused(url: str) -> None:
    """A database with a table of such a name, and no revision, is somebody else's."""
    await run(url, "CREATE TABLE operations (surgeon text)")

    async with DatabaseBackend(url) as backend:
        with pytest.raises(StateBackendError, match="that vastproxy did not make"):
            await backend.ping()
    with pytest.raises(StateBackendError, match="that vastproxy did not make"):
        await migrate(url)


async def test_ready_database_is_asked_shortly(url: str) -> None:
    """After the first success a ping does not look at the tables again."""
    async with DatabaseBackend(url) as backend:
        await backend.ping()
        await run(url, "DROP TABLE alembic_version")
        await backend.ping()

        assert "ready" in repr(backend)


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("mysql://u:hidden@h/d", StateBackendError, "mysql:// is no database"),
        ("postgresql://u:hidden@[::1/d", StateBackendError, "no URL of a database"),
        ("sqlite://", StateBackendError, "needs a file"),
        ("sqlite:///:memory:", StateBackendError, "needs a file"),
        ("sqlite:////nowhere/at/all.db", StateAwayError, "no such directory: '/nowhere/at'"),
        ("postgres://u:hidden@127.0.0.1:1/d", StateAwayError, "postgresql 127.0.0.1:1/d: "),
        ("postgresql+asyncpg://u:hidden@127.0.0.1:1/d", StateAwayError, "127.0.0.1:1/d: "),
    ],
)
async def test_messages_name_the_place_but_no_password(
    url: str, kind: type[StateBackendError], message: str
) -> None:
    """Whoever reads a message learns which database it is about, and no secret."""
    with pytest.raises(StateBackendError) as caught:
        await is_current(url)

    assert kind is type(caught.value)
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value)


async def test_wrong_names_are_no_outage(server: Postgres) -> None:
    """A server that refuses user or database is there: waiting will not help."""
    for url in (f"{server.url}_missing", server.url.replace("postgres@", "nobody:hidden@")):
        with pytest.raises(StateBackendError, match="does not exist") as caught:
            await is_current(url)

        assert StateBackendError is type(caught.value)
        assert "hidden" not in str(caught.value)


async def test_stopped_server_is_away_within_its_time(server: Postgres) -> None:
    """A server that takes connections and says nothing counts as away after a second."""
    server.pause()
    try:
        with pytest.raises(StateAwayError, match="no answer in time"):
            await asyncio.wait_for(is_current(server.url), 10)
    finally:
        server.resume()


@pytest.mark.parametrize(
    ("scheme", "driver"),
    [
        ("postgres", "postgresql+asyncpg"),
        ("postgresql", "postgresql+asyncpg"),
        ("postgresql+psycopg", "postgresql+psycopg"),
    ],
)
def test_schemes_choose_the_driver(scheme: str, driver: str) -> None:
    """Operators write the scheme they know, or name the driver."""
    assert driver == place_of(f"{scheme}://u:p@h/d").url.drivername


def test_sslmode_is_understood() -> None:
    """The word of libpq's URLs is put into the driver's."""
    url = place_of("postgresql://u@h/d?sslmode=verify-full").url

    assert {"ssl": "verify-full"} == dict(url.query)


def test_missing_driver_says_what_to_install() -> None:
    """Without SQLAlchemy the message names the extra to install."""
    program = (
        "import sys; sys.modules['sqlalchemy'] = None\n"
        "from vastproxy.errors import StateBackendError\n"
        "try:\n    import vastproxy.state.database\n"
        "except StateBackendError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout  # noqa: S603

    assert b"install vastproxy[database]" in said


def test_driver_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that a URL names, and nobody installed, is told by its name."""
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(StateBackendError, match=r"needs psycopg \(install psycopg\)"):
        DatabaseBackend("postgresql+psycopg://h/d")
