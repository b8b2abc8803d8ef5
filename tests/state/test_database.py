"""The SQL backend under concurrency, faults and impatient callers; conformance has its meaning."""

import asyncio
import os
import random
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event, text

from tests.support.postgres import Postgres, postgres_server
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state import database as module
from vastproxy.state import transactions
from vastproxy.state.base import Account, Claim, Hold, Level, StateBackend, Window, money
from vastproxy.state.database import DatabaseBackend

SPRING = Account("campaign", "spring")
SUMMER = Account("campaign", "summer")

WORKER = """
import asyncio, sys
from vastproxy.state.base import Account, Hold, money
from vastproxy.state.database import DatabaseBackend

async def main(url, name):
    async with DatabaseBackend(url) as backend:
        await backend.ping()
        holds = [Hold(Account("campaign", "spring"), f"{name}-{at}", (money(10, 1000),))
                 for at in range(40)]
        shared = Hold(Account("campaign", "shared"), "everybody's", (money(7),))
        found = await asyncio.gather(*(backend.reserve([each]) for each in holds))
        print(sum(verdict.granted for verdict, in found), *await backend.confirm([shared]))

asyncio.run(main(*sys.argv[1:]))
"""
"""One of several processes at one limit; prints how much it got, and the shared booking."""


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
async def backends(url: str, count: int) -> AsyncIterator[list[DatabaseBackend]]:
    """Open so many backends, each with connections of its own, over one database."""
    opened = [DatabaseBackend(url) for _ in range(count)]
    try:
        for each in opened:
            await each.ping()
        yield opened
    finally:
        for each in opened:
            await each.close()


async def answer(backend: DatabaseBackend, statement: str) -> int:
    """Give the number that *statement* finds, apart from all calls."""
    async with backend._transactions.engine.begin() as connection:
        return int((await connection.execute(text(statement))).scalar_one() or 0)


async def in_the_ledger(backend: DatabaseBackend) -> int:
    """Give the sum of what the operations of all campaigns booked."""
    booked = "SELECT sum(booked) FROM operations WHERE account LIKE 'campaign %'"
    return await answer(backend, booked)


async def spent(backend: DatabaseBackend) -> int:
    """Give the sum of what all campaigns spent."""
    return await answer(backend, "SELECT sum(spent) FROM budget_tracking")


def a_hold(operation: str, *, limit: int | None = None, account: Account = SPRING) -> Hold:
    """Make a hold of ten."""
    if account.kind == "campaign":
        return Hold(account, operation, (money(10, limit),))
    return Hold(account, operation, (Claim("hour", 10, limit, Window("rolling", 3_600_000)),))


# --- Concurrency ------------------------------------------------------------------------------


@pytest.mark.parametrize("account", [SPRING, Account("viewer", "v")])
async def test_two_backends_meet_one_limit_exactly(url: str, account: Account) -> None:
    """Of 120 that come at once over two pools, just those get room for whom there is room."""
    async with backends(url, 2) as pair:
        calls = [
            pair[at % 2].reserve([a_hold(f"{at}", limit=500, account=account)]) for at in range(120)
        ]
        verdicts = await asyncio.gather(*calls)
        (level,) = await pair[0].levels(account, a_hold("x", account=account).claims)

    assert 50 == sum(each.granted for (each,) in verdicts)
    assert Level(0, 500) == level


def test_four_processes_meet_one_limit_exactly(url: str) -> None:
    """Four processes that start on an empty database share 100 places, and book one id once."""
    names = ("north", "east", "south", "west")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, url, name], stdout=subprocess.PIPE)  # noqa: S603
        for name in names
    ]
    said = [each.communicate(timeout=60)[0].split() for each in workers]

    assert [0] * 4 == [each.returncode for each in workers]
    assert 100 == sum(int(count) for count, _ in said)
    assert [b"again"] * 3 + [b"late"] == sorted(booking for _, booking in said)


async def test_same_operation_at_the_same_time_counts_once(url: str) -> None:
    """Whatever comes together under one id is reserved once and booked once."""
    hold = a_hold("impression", limit=10)
    async with backends(url, 2) as pair:
        reserved = await asyncio.gather(*(pair[at % 2].reserve([hold]) for at in range(20)))
        booked = await asyncio.gather(*(pair[at % 2].confirm([hold]) for at in range(20)))

        assert all(verdict.granted for (verdict,) in reserved)
        assert ["again"] * 19 + ["booked"] == sorted(booking for (booking,) in booked)
        assert 10 == await spent(pair[0]) == await in_the_ledger(pair[0])


async def test_overlapping_accounts_do_not_lock_in_a_circle(url: str) -> None:
    """Calls over the same accounts in different orders wait for each other, and all end."""
    accounts = [Account("viewer", f"{at}") for at in range(4)]
    accounts += [Account("campaign", f"{at}") for at in range(4)]
    draw = random.Random(7)
    async with backends(url, 2) as pair:

        async def _one(at: int) -> None:
            holds = [a_hold(f"{at}", account=each) for each in draw.sample(accounts, 5)]
            await pair[at % 2].reserve(holds)
            await pair[1 - at % 2].confirm(list(reversed(holds)))

        await asyncio.gather(*(_one(at) for at in range(60)))

        assert await spent(pair[0]) == await in_the_ledger(pair[0]) > 0
        assert 0 == await answer(pair[0], "SELECT sum(reserved) FROM budget_tracking")
        assert 0 == await answer(pair[0], "SELECT sum(held) FROM frequency_caps")
        assert 3000 == await answer(pair[0], "SELECT sum(booked) FROM operations")


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize("accounts", [(SPRING,), (SPRING, Account("viewer", "v"))])
async def test_number_of_statements_does_not_grow(
    url: str, accounts: Sequence[Account], limit: int | None
) -> None:
    """200 holds take as many statements as 20: nobody waits longer for the locks they hold."""
    statements: list[str] = []

    def _count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    async with backends(url, 1) as (backend,):
        event.listen(backend._transactions.engine.sync_engine, "before_cursor_execute", _count)
        numbers = []
        for size in (20, 200):
            for each in accounts:
                await backend.forget(each)
            owners = [accounts[at % len(accounts)] for at in range(size)]
            holds = [a_hold(f"{size} {at}", limit=limit, account=owner)
                     for at, owner in enumerate(owners)]  # fmt: skip
            for call in (backend.reserve, backend.confirm, backend.void):
                statements.clear()
                await call(holds)
                numbers.append(len(statements))

    assert numbers[:3] == numbers[3:]
    assert max(numbers) <= 9


async def test_one_statement_writes_all(server: Postgres) -> None:
    """A round trip costs everybody who waits for the lock: what changed goes out in one."""
    statements: list[str] = []

    def _count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    async with backends(server.new_database(), 1) as (backend,):
        event.listen(backend._transactions.engine.sync_engine, "before_cursor_execute", _count)
        await backend.confirm([a_hold("a"), a_hold("b", account=Account("viewer", "v"))])

    # Two kinds of locks, what lapsed, operations, counters; and all that changed.
    assert 6 == len(statements)


# --- The first request ------------------------------------------------------------------------


async def test_after_a_ping_no_request_is_the_first(server: Postgres) -> None:
    """A ping opens every connection, and prepares on each all that requests say."""
    async with backends(server.new_database(), 1) as (backend,):
        before = await _prepared(backend)
        await _all_that_requests_ask(backend)
        after = await _prepared(backend)

    assert transactions.CONNECTIONS == len(before)
    assert before == after


async def _prepared(backend: DatabaseBackend) -> list[int]:
    """Give how many statements are prepared on each connection that is open."""
    pool = backend._transactions.engine.pool
    asked = text("SELECT count(*) FROM pg_prepared_statements WHERE statement NOT LIKE '%pg_prep%'")
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(backend._transactions.engine.connect())
            for _ in range(pool.checkedin())  # type: ignore[attr-defined]
        ]
        return sorted([(await each.execute(asked)).scalar_one() for each in opened])


async def test_after_a_ping_no_statement_is_made(url: str) -> None:
    """The text of a statement is made once, and not while a request waits for it."""
    async with backends(url, 1) as (backend,):
        made = backend._transactions.engine.sync_engine._compiled_cache
        assert made is not None
        before = len(made)
        await _all_that_requests_ask(backend)

        assert before == len(made)


async def _all_that_requests_ask(backend: DatabaseBackend) -> None:
    """Ask, several times at once, what a request and its beacon do."""
    for turn in range(8):
        holds = [a_hold(f"{turn}"), a_hold(f"{turn}", account=Account("viewer", f"{turn}"))]
        await backend.reserve(holds[:1])
        await backend.reserve(holds)
        await backend.confirm(holds)
        await backend.void(holds)
        for each in holds:
            await backend.levels(each.account, each.claims)
        await backend.write_items(holds[1].account, {"a": "b"}, 1)
        await backend.read_items(holds[1].account)


async def test_ping_leaves_nothing_behind(url: str) -> None:
    """What it says to be ready is about nobody, and undone."""
    async with backends(url, 1) as (backend,):
        await backend.ping()

        for table in ("viewer_items", "operations", "frequency_caps", "budget_tracking"):
            assert 0 == await answer(backend, f"SELECT count(*) FROM {table}")  # noqa: S608


async def test_lock_costs_what_it_lasts(tmp_path: Path) -> None:
    """Who waits for another process's lock goes on when it is free, and not up to 0.1 s later."""
    path = tmp_path / "state.db"
    async with backends(f"sqlite:///{path}", 1) as (backend,):
        took = [await _after_the_lock(backend, path, f"{at}") for at in range(3)]

    assert min(took) < 0.04


async def _after_the_lock(backend: DatabaseBackend, path: Path, operation: str) -> float:
    """Give the seconds from the end of a lock to that of a call which has waited for it."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        async with asyncio.TaskGroup() as group:
            call = group.create_task(backend.confirm([a_hold(operation)]))
            # SQLite by itself looks after 228 and after 328 ms.
            await asyncio.sleep(0.24)
            assert not call.done()
            other.execute("ROLLBACK")
            began = time.monotonic()
        return time.monotonic() - began
    finally:
        other.close()


# --- Callers who give up ------------------------------------------------------------------------


async def test_cancelled_calls_neither_lose_nor_double(url: str) -> None:
    """Calls that are given up after 2 to 8 ms, and repeated, add up to what the ledger says."""
    draw = random.Random(3)
    async with backends(url, 2) as pair:

        async def _persist(at: int) -> None:
            hold = a_hold(f"{at}", limit=400)
            for attempt in range(40):
                patience = draw.uniform(0.002, 0.008) if attempt < 4 else 5
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        (verdict,) = await pair[draw.randrange(2)].reserve([hold])
                        if verdict.granted:
                            await pair[draw.randrange(2)].confirm([hold])
                        return

        await asyncio.gather(*(_persist(at) for at in range(60)))
        for each in pair:
            await each.flush()

        assert 400 == await spent(pair[0]) == await in_the_ledger(pair[0])
        assert 0 == await answer(pair[0], "SELECT reserved FROM budget_tracking")
        assert [0, 0] == [each._transactions.engine.pool.checkedout() for each in pair]  # type: ignore[attr-defined]


async def test_stopped_server_costs_the_caller_no_more_than_it_waits(server: Postgres) -> None:
    """Who waits 50 ms for a server that hangs gets on after 50 ms, and later all is clean."""
    async with backends(server.new_database(), 1) as (backend,):
        await backend.reserve([a_hold("before")])
        server.pause()
        began = time.monotonic()
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await backend.reserve([a_hold("during"), a_hold("as well", account=SUMMER)])
            took = time.monotonic() - began
            with pytest.raises(StateAwayError, match="no answer in time"):
                await backend.get_count("x")
        finally:
            server.resume()
        await backend.flush()
        verdicts = await backend.reserve([a_hold("during"), a_hold("as well", account=SUMMER)])

        assert took < 0.5
        assert all(each.granted for each in verdicts)
        assert 30 == await answer(backend, "SELECT sum(reserved) FROM budget_tracking")
        assert 0 == await answer(
            backend, "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in trans%'"
        )


async def test_connections_in_use_are_waited_for_only_so_long(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all connections hang, further calls are told so instead of piling up."""
    monkeypatch.setattr(transactions, "QUEUE_WITHIN", 0.05)
    async with backends(server.new_database(), 1) as (backend,):
        server.pause()
        try:
            calls = [backend.get_count("x") for _ in range(transactions.CONNECTIONS + 1)]
            found = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            server.resume()

    assert all(isinstance(each, StateAwayError) for each in found)
    assert "all 5 connections are in use" in str(found[-1])


async def test_closing_tells_who_still_waits(
    server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that is under way when the backend is closed fails as one whose outcome is open."""
    monkeypatch.setattr(transactions, "CLOSE_WITHIN", 0.01)
    async with backends(server.new_database(), 1) as (backend,):
        server.pause()
        try:
            async with asyncio.TaskGroup() as group:
                call = group.create_task(_error_of(backend))
                await asyncio.sleep(0)
                await backend.close()
        finally:
            server.resume()

    assert "closed meanwhile" in call.result()


async def test_closed_backend_asks_nothing(url: str) -> None:
    """Who comes after the end is told so, and opens no connection that nobody would close."""
    async with backends(url, 1) as (backend,):
        await backend.close()
        with pytest.raises(StateAwayError, match="closed"):
            await backend.get_count("x")

        assert 0 == backend._transactions.engine.pool.checkedin()  # type: ignore[attr-defined]


@pytest.mark.parametrize("turns", range(4))
async def test_everybody_is_told_when_it_closes(
    url: str, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """Also who comes at the very moment when what is under way is broken off."""
    monkeypatch.setattr(transactions, "CLOSE_WITHIN", 0)
    async with backends(url, 1) as (backend,):
        calls = [_outcome(backend, turn) for turn in range(8) for _ in range(3)]
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            made = [group.create_task(each) for each in calls]
            for _ in range(turns):
                await asyncio.sleep(0)
            await backend.close()

    assert {0, "closed"} >= {each.result() for each in made}
    assert "closed" == made[-1].result()


async def _outcome(backend: DatabaseBackend, turns: int) -> int | str:
    """Call after so many *turns* of the event loop; give what came of it."""
    for _ in range(turns):
        await asyncio.sleep(0)
    try:
        return await backend.get_count("x")
    except StateAwayError as error:
        return "closed" if "closed" in str(error) else str(error)


async def _error_of(backend: DatabaseBackend) -> str:
    with pytest.raises(StateAwayError) as caught:
        await backend.get_count("x")
    return str(caught.value)


# --- Faults ---------------------------------------------------------------------------------


async def test_terminated_connections_neither_lose_nor_double(server: Postgres) -> None:
    """Connections cut by the administrator fail as away; repeated calls add up."""
    url = server.new_database()
    cut = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    errors: list[StateBackendError] = []
    async with backends(url, 1) as (backend,):

        async def _persist(at: int) -> None:
            hold = a_hold(f"{at}", limit=300)
            for _ in range(100):
                try:
                    (verdict,) = await backend.reserve([hold])
                    if verdict.granted:
                        await backend.confirm([hold])
                except StateBackendError as error:
                    errors.append(error)
                else:
                    return

        async with asyncio.TaskGroup() as group:
            for at in range(100):
                group.create_task(_persist(at))
            for _ in range(4):
                await asyncio.to_thread(server.query, cut, url)

        assert {StateAwayError} == {type(each) for each in errors}
        assert 300 == await spent(backend) == await in_the_ledger(backend)
        assert 0 == await answer(backend, "SELECT reserved FROM budget_tracking")


async def test_restarted_server_is_found_again() -> None:
    """A server that was killed is away, by name and without password; what it booked is there."""
    with postgres_server() as server:
        async with backends(server.url.replace("postgres@", "postgres:hidden@"), 1) as (backend,):
            await backend.confirm([a_hold("shown")])
            server.kill()
            with pytest.raises(StateAwayError, match=rf"127.0.0.1:{server.port}/") as broken:
                await backend.confirm([a_hold("shown")])
            with pytest.raises(StateAwayError) as refused:
                await backend.ping()
            server.restart()

            assert "hidden" not in f"{broken.value} {refused.value} {backend!r}"
            assert ["again"] == await backend.confirm([a_hold("shown")])
            assert 10 == await spent(backend)


async def test_locked_file_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another process keeps locked is away, not broken."""
    monkeypatch.setattr(transactions, "QUEUE_WITHIN", 0.03)
    path = tmp_path / "state.db"
    async with backends(f"sqlite:///{path}", 1) as (backend,):
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            with pytest.raises(StateAwayError, match="database is locked"):
                await backend.confirm([a_hold("shown")])
            with pytest.raises(StateAwayError, match="database is locked"):
                await backend.increment("x")
        finally:
            other.close()

        assert ["late"] == await backend.confirm([a_hold("shown")])


async def test_wrong_table_is_no_outage(url: str) -> None:
    """What waiting cannot mend is refused, not away."""
    async with backends(url, 1) as (backend,):
        async with backend._transactions.engine.begin() as connection:
            await connection.execute(text("DROP TABLE viewer_items"))
        with pytest.raises(StateBackendError, match="viewer_items") as caught:
            await backend.read_items(Account("viewer", "v"))

    assert StateBackendError is type(caught.value)


async def test_name_that_is_no_text_is_refused(url: str) -> None:
    """Half a character, as broken input has it, is a mistake of the caller, and told as one."""
    async with backends(url, 1) as (backend,):
        with pytest.raises(StateBackendError):
            await backend.increment("half \ud83d")


async def test_item_that_is_no_text_is_kept(url: str) -> None:
    """Half a character in a value comes out as it went in."""
    async with backends(url, 1) as (backend,):
        await backend.write_items(Account("viewer", "v"), {"half": "\ud83d"}, 1)

        assert {"half": "\ud83d"} == await backend.read_items(Account("viewer", "v"))


async def test_keys_are_those_of_the_account(url: str) -> None:
    """An account's counters can be found without knowing them."""
    viewer = Account("viewer", SPRING.name)
    async with backends(url, 1) as (backend,):
        await backend.confirm([a_hold("a"), a_hold("b", account=viewer)])
        await backend.increment("plain")

        assert ["spent"] == await backend.keys(SPRING)
        assert ["hour"] == await backend.keys(viewer)
        assert [] == await backend.keys(SUMMER)


async def test_window_of_money_is_refused(url: str) -> None:
    """A campaign's money has no window here, and a hold that asks for one is told so."""
    hold = Hold(SPRING, "day", (replace(money(1), window=Window("fixed", 1000)),))

    async with backends(url, 1) as (backend,):
        for call in (backend.reserve, backend.confirm, backend.void):
            with pytest.raises(StateBackendError, match="leave the window out"):
                await call([hold])


# --- What is kept -----------------------------------------------------------------------------


async def test_sweep_deletes_what_expired(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody comes back for goes, in small steps; money and what still counts stay."""
    monkeypatch.setattr(module, "SWEEP_ROWS", 3)
    monkeypatch.setattr(module, "SWEEP_ACCOUNTS", 3)
    now = [1_000_000]
    viewers = [Account("viewer", f"{at}") for at in range(10)]
    backend = DatabaseBackend(url, clock=lambda: now[0])
    async with backend:
        await backend.ping()
        await backend.reserve([a_hold("lapsing", account=each) for each in viewers])
        await backend.confirm([a_hold("shown", account=each) for each in viewers[:5]])
        await backend.confirm([a_hold("paid")])
        await backend.increment("plain")
        await backend.set_expiry("plain", 1)
        for each in viewers:
            await backend.write_items(each, {"a": "b"}, 1)
        fresh = await backend.sweep()
        now[0] += 600_001
        lapsed = await backend.sweep()
        now[0] += 10 * 86_400_000
        rest = await backend.sweep()

        assert 0 == fresh
        # Ten reservations, ten rows of items, a plain count, and five counters with nothing left.
        assert 10 + 10 + 1 + 5 == lapsed
        assert 5 + 6 == rest
        assert 0 == await answer(backend, "SELECT count(*) FROM operations")
        assert 0 == await answer(backend, "SELECT count(*) FROM frequency_caps")
        assert 10 == await spent(backend)


async def test_sweep_goes_on_until_nothing_is_left(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small its steps are: also counters on which something was reserved that lapsed."""
    monkeypatch.setattr(module, "SWEEP_ROWS", 1)
    monkeypatch.setattr(module, "SWEEP_ACCOUNTS", 1)
    now = [1_000_000]
    async with DatabaseBackend(url, clock=lambda: now[0]) as backend:
        await backend.ping()
        await backend.reserve([a_hold("a", account=Account("viewer", f"{at}")) for at in range(25)])
        now[0] += 86_400_000

        assert 25 + 25 == await backend.sweep()
        assert 0 == await answer(backend, "SELECT count(*) FROM frequency_caps")
        assert 0 == await backend.sweep()


async def test_sweep_ends_in_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one sweep has no time for, later ones delete."""
    monkeypatch.setattr(module, "SWEEP_WITHIN", 0)
    monkeypatch.setattr(module, "SWEEP_ACCOUNTS", 4)
    now = [1_000_000]
    async with DatabaseBackend(url, clock=lambda: now[0]) as backend:
        await backend.ping()
        await backend.reserve([a_hold("a", account=Account("viewer", f"{at}")) for at in range(10)])
        now[0] += 86_400_000

        # Each time reservations, and then the counters that have none any more.
        assert [8, 8, 4, 0] == [await backend.sweep() for _ in range(4)]


async def test_forgetting_a_viewer_leaves_the_campaign_of_that_name(url: str) -> None:
    """Accounts of two kinds may have one name, and nothing else in common."""
    viewer = Account("viewer", SPRING.name)
    async with backends(url, 1) as (backend,):
        await backend.confirm([a_hold("a"), a_hold("b", account=viewer)])

        assert await backend.forget(viewer)
        assert not await backend.forget(viewer)
        assert 10 == await spent(backend)


async def test_late_money_is_told_apart(url: str) -> None:
    """What was confirmed without room stands in its own column too."""
    async with backends(url, 1) as (backend,):
        await backend.reserve([a_hold("kept", limit=10)])
        booked = await backend.confirm([a_hold("kept"), a_hold("late")])

        assert ["booked", "late"] == booked
        assert 20 == await spent(backend)
        assert 10 == await answer(backend, "SELECT late FROM budget_tracking")


async def test_file_stands_where_the_url_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slashes begin a path from the working directory, four one from the root."""
    monkeypatch.chdir(tmp_path)
    async with backends("sqlite:///caps.db", 1) as (relative,):
        await relative.increment("x")
    async with backends(f"sqlite:///{tmp_path}/caps.db", 1) as (absolute,):
        assert 1 == await absolute.get_count("x")

    assert os.path.exists(tmp_path / "caps.db")  # noqa: ASYNC240, PTH110 - nothing else runs here
    assert isinstance(absolute, StateBackend)


def test_repr_tells_the_place_and_no_password() -> None:
    """The person at three in the morning sees which database it is, and whether it was reached."""
    backend = DatabaseBackend("postgresql://u:hidden@db.example:5433/state")

    assert (
        "<DatabaseBackend postgresql db.example:5433/state not looked at yet, calls under way: 0>"
        == repr(backend)
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [("nowhere/state.db", "there is no directory"), ("", "is a directory (name a file in it)")],
)
async def test_file_that_cannot_be(tmp_path: Path, name: str, advice: str) -> None:
    """A file for which there is no place is a mistake, and no outage that passes."""
    with pytest.raises(StateBackendError, match=re.escape(advice)):
        DatabaseBackend(f"sqlite:///{tmp_path}/{name}".rstrip("/"))
