"""
What was counted survives the end of any process, and nothing is counted beyond a limit.

Workers that reserve, confirm and void are killed, or the server is; then the books that the workers
kept are compared with the backend. Runs are short here; ``python -m tests.support.ledger_check``
makes longer ones. Backends and workers that must not pass are run through the same audit.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.ledger_check import Findings, Run, run_and_audit, stepped_clock
from tests.support.postgres import Postgres, postgres_server
from tests.support.state_model import a_campaign, a_hold, a_viewer, confirm, level, reserve
from tests.support.valkey import Valkey, valkey_server
from vastproxy.state.base import Account, Claim, Level, StateBackend, Window, money
from vastproxy.state.database import DatabaseBackend
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.redis import RedisBackend

HOUR = 3_600.0
ALWAYS = ("--appendonly", "yes", "--appendfsync", "always")
PATIENT = "?socket_timeout=10"
"""A busy machine is no reason to fail."""
NEVER = ("--appendonly", "no", "--save", "")

TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND random() < 0.5
"""


@contextmanager
def _sqlite(directory: Path) -> Iterator[str]:
    yield f"sqlite:///{directory / 'state.db'}"


@contextmanager
def _postgresql(_directory: Path) -> Iterator[str]:
    with postgres_server() as server:
        yield server.new_database()


@contextmanager
def _valkey(_directory: Path) -> Iterator[str]:
    with valkey_server() as server:
        yield server.url + PATIENT


STORES = {"sqlite": _sqlite, "postgresql": _postgresql, "valkey": _valkey}


@pytest.fixture
def books(tmp_path: Path) -> str:
    """Give an empty directory for the books of workers."""
    directory = tmp_path / "books"
    directory.mkdir()
    return str(directory)


def _faults(findings: dict[str, Findings]) -> list[str]:
    return [f"{name}: {each}" for name, found in findings.items() for each in found.faults]


@pytest.mark.parametrize("store", STORES)
async def test_killed_workers_break_nothing(tmp_path: Path, books: str, store: str) -> None:
    """Whenever a worker is killed, the limit holds, all that was acknowledged is counted, once."""
    with STORES[store](tmp_path) as url:
        run = Run(url, books, seconds=5.6, limit=100, kill_every=0.7)
        most, findings = await run_and_audit(run)

    assert [] == _faults(findings)
    assert most <= run.limit
    assert 0 < findings["small"].refused
    assert run.limit / 2 < findings["small"].spent
    assert run.limit / 2 < findings["open"].acks


def _kill_valkey(server: Valkey, pauses: tuple[float, ...]) -> Callable[[], None]:
    def _kill() -> None:
        for each in pauses:
            time.sleep(each)
            server.restart()

    return _kill


async def test_killed_valkey_loses_nothing_acknowledged(books: str) -> None:
    """A Valkey that writes always is killed three times, and knows all that it acknowledged."""
    with valkey_server(*ALWAYS) as server:
        run = Run(server.url + PATIENT, books, seconds=4.5)
        most, findings = await run_and_audit(run, _kill_valkey(server, (1.2, 0.8, 0.8)))

    assert [] == _faults(findings)
    assert most <= run.limit
    assert 200 < findings["open"].acks


async def test_killed_postgres_loses_nothing_acknowledged(books: str) -> None:
    """A PostgreSQL with its usual commits is killed twice, and knows all that it acknowledged."""
    with postgres_server(durable=True) as server:

        def _kill() -> None:
            for each in (1.5, 1.0):
                time.sleep(each)
                server.kill()
                server.start()

        run = Run(server.new_database(), books, seconds=5, limit=50, processes=2)
        most, findings = await run_and_audit(run, _kill)

    assert [] == _faults(findings)
    assert most <= run.limit
    assert 30 < findings["open"].acks


ADDS_UP = Findings(
    limit=10, refused=1, intents=10, acks=9, spent=10, counted=10, lost=0, reserved=0
)


def test_books_that_add_up_have_no_faults() -> None:
    """What was acknowledged was spent, once; what was not may have been."""
    assert [] == ADDS_UP.faults
    assert [] == replace(ADDS_UP, spent=9, counted=9).faults


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"limit": 9}, "over-serve 1"),
        ({"spent": 8, "counted": 8}, "spent 8, of 9 acknowledged"),
        ({"spent": 11, "counted": 11, "limit": None}, "spent 11, of 10 attempted"),
        ({"counted": 9}, "spent 10, in 9 operations"),
        ({"lost": 1}, "acknowledged and lost 1"),
        ({"reserved": 1}, "reserved for ever 1"),
    ],
)
def test_audit_says_what_does_not_add_up(wrong: dict[str, Any], said: str) -> None:
    """Each rule of the books is told by itself where it is broken."""
    assert [said] == replace(ADDS_UP, **wrong).faults


async def test_audit_notices_what_a_server_lost(books: str) -> None:
    """A Valkey that writes nothing down does not pass: what it acknowledged is lost."""
    with valkey_server(*NEVER) as server:
        run = Run(server.url + PATIENT, books, seconds=2.5)
        _, findings = await run_and_audit(run, _kill_valkey(server, (1.2,)))

    assert 0 < findings["open"].lost
    assert any("lost" in each for each in findings["open"].faults)
    assert any("acknowledged" in each for each in findings["open"].faults)


async def test_audit_notices_reading_before_writing(books: str) -> None:
    """Workers that look first and then add do not pass: they serve beyond the limit."""
    with valkey_server() as server:
        run = Run(server.url + PATIENT, books, seconds=2, naive=True)
        _, findings = await run_and_audit(run)

    assert 0 < findings["small"].over_serve
    assert any("over-serve" in each for each in findings["small"].faults)


def _disturb(server: Postgres) -> Callable[[], None]:
    """End half of the connections, four times; then end the server, and start it again."""

    def _terminate() -> None:
        for _ in range(4):
            time.sleep(0.3 + 0.2 * random.random())
            server.query(TERMINATE)
        server.kill()
        server.start()

    return _terminate


async def test_impatience_and_lost_connections_break_nothing(books: str) -> None:
    """Calls given up after milliseconds, ended connections, a restart: what is spent adds up."""
    with postgres_server() as server:
        run = Run(server.new_database(), books, seconds=4, processes=2, impatient=True)
        most, findings = await run_and_audit(run, _disturb(server))

    assert [] == _faults(findings)
    assert most <= run.limit
    assert 50 < findings["open"].acks


# --- Clocks that step ----------------------------------------------------------------------------

HOURLY = Claim("hourly", limit=1, window=Window("rolling", 600_000))
FIRST = Claim("first", limit=1, window=Window("fixed", 600_000))
MOST = (HOURLY, FIRST)


class Before:
    """What is done before the clock steps, and looked at afterwards."""

    def __init__(self, backend: StateBackend) -> None:
        self._backend = backend
        self._viewer: Account = a_viewer()
        self._campaign: Account = a_campaign()
        self._shown = a_hold(self._viewer, *MOST)
        self._held = a_hold(self._campaign, money(5, 5))

    def __repr__(self) -> str:
        return f"<Before {self._viewer}>"

    async def prepare(self) -> None:
        """Count, reserve and write, for minutes."""
        await self._backend.ping()
        assert "late" == await confirm(self._backend, self._shown)
        assert (await reserve(self._backend, self._held)).granted
        await self._backend.write_items(self._viewer, {"a": "1"}, 600)
        await self._backend.increment(self._viewer.name)
        await self._backend.set_expiry(self._viewer.name, 600)

    async def look(self) -> None:
        """Nothing has ended; AssertionError where something has."""
        backend, viewer = self._backend, self._viewer
        for each in MOST:
            assert not (await reserve(backend, a_hold(viewer, each))).granted
        assert [Level(1), Level(1)] == await backend.levels(viewer, MOST)
        assert "again" == await confirm(backend, self._shown)
        assert not (await reserve(backend, a_hold(self._campaign, money(1, 5)))).granted
        assert Level(0, 5) == await level(backend, self._campaign)
        assert {"a": "1"} == await backend.read_items(viewer)
        assert 1 == await backend.get_count(viewer.name)


async def _step(backend: StateBackend, seconds: float) -> None:
    async with backend:
        before = Before(backend)
        await before.prepare()
        await before.look()
        with stepped_clock(seconds):
            await before.look()
        await before.look()


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_clock_of_the_process_does_not_matter(seconds: float) -> None:
    """A clock of the process that steps by an hour, and back, changes no verdict."""
    await _step(InMemoryBackend(), seconds)
    with valkey_server() as server:
        await _step(RedisBackend(server.url + PATIENT), seconds)
    with postgres_server() as server:
        await _step(DatabaseBackend(server.new_database()), seconds)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
async def test_clock_of_the_process_does_not_matter_to_sqlite(
    tmp_path: Path, seconds: float
) -> None:
    """SQLite has no clock but the machine's, and does not follow the steps that it makes."""
    await _step(DatabaseBackend(f"sqlite:///{tmp_path / 'state.db'}"), seconds)


async def test_clock_that_steps_is_noticed() -> None:
    """A backend that goes by the clock of the process does not pass."""
    with pytest.raises(AssertionError):
        await _step(InMemoryBackend(clock=lambda: int(time.time() * 1000)), HOUR)
