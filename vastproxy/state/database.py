"""
State in PostgreSQL, or in a file of SQLite.

Rule 1: a call is one transaction, and says a number of statements that does not grow with its list.
Rule 2: what is decided from what was read is decided under the locks of all its accounts, which
are taken first, in one order. The arithmetic is that of :mod:`vastproxy.state.ledger`.
Rule 3: a caller may give up at any moment: its transaction goes on to its end, for some seconds at
most, on a connection that nobody else gets until then. So no lock and no connection is left over.
Rule 4: what has been acknowledged survives the end of any process; of PostgreSQL (with its
synchronous_commit) also the loss of power.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Self, TypeVar

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.observe.tasks import Tasks
from vastproxy.state.base import (
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    MONEY_KEY,
    Account,
    Booking,
    Claim,
    Hold,
    Level,
    Verdict,
    campaign_of,
    check_hold,
    micros,
    units,
)
from vastproxy.state.ledger import Counter, drawn, judged, kept, level, repeated

# First of these: it says what to install where SQLAlchemy is missing.
from vastproxy.state.migrate import (  # isort: split
    check_standing,
    mapped_errors,
    migrate,
    open_engine,
    place_of,
    standing,
)

from sqlalchemy import Row
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import Executable

from vastproxy.state.tables import COUNTED, HELD, VOID, statements

CONNECTIONS = 5
"""Of one process to PostgreSQL: transactions are short, and its default limit is 100."""

QUEUE_WITHIN = 5.0
"""Seconds that a call waits for one of them, as SQLite for its lock; callers have less patience."""

SWEEP_ROWS = 1_000
"""Rows that one statement of a sweep deletes at most, so that none holds locks for long."""

SWEEP_ACCOUNTS = 100
"""Accounts whose lapsed reservations are taken off in one transaction."""

SWEEP_ROUNDS = 20
"""Statements of one sweep over one table at most; the rest is for the next."""

CLOSE_WITHIN = 3.0
"""Seconds that calls which are under way get when the backend is closed."""

T = TypeVar("T")
Rows = Sequence[Row[Any]]


class DatabaseBackend:
    """
    The backend of ``postgresql://`` and ``sqlite:///``.

    *url* is written as operators do. *clock* gives Unix milliseconds; None: the server's clock,
    and for SQLite the machine's at the start, and the monotonic one from then on.
    """

    def __init__(self, url: str, *, clock: Callable[[], int] | None = None) -> None:
        self._url = url
        self._place = place_of(url)
        is_postgres = self._place.is_postgres
        self._clock = clock or (None if is_postgres else _steady_time())
        # SQLite has one writer: who waits for it here is served in turn.
        self._connections = CONNECTIONS if is_postgres else 1
        self._slots = asyncio.Semaphore(self._connections)
        self._engine = open_engine(self._place, connections=self._connections)
        # One statement is a transaction by itself: that saves the two around it.
        alone: dict[str, Any] = (
            {"isolation_level": "AUTOCOMMIT"} if is_postgres else {"single_statement": True}
        )
        self._alone = self._engine.execution_options(**alone)
        self._says = statements(self._place.url.get_backend_name())
        self._tasks = Tasks("database")
        self._is_ready = False

    # --- Plain counters -------------------------------------------------------------------------

    async def get_count(self, key: str) -> int:
        """Give the count of *key*."""
        return await self._number(self._says.get_count, name=key, now=self._now())

    async def increment(self, key: str, amount: int = 1) -> int:
        """Add *amount* to *key*, and give the new count."""
        return await self._number(self._says.increment, name=key, amount=amount, now=self._now())

    async def set_expiry(self, key: str, seconds: float) -> None:
        """Let the count of *key* vanish in *seconds*."""
        ms = int(seconds * 1000)
        await self._ask(self._says.set_expiry, name=key, ms=ms, now=self._now())

    async def get_spend(self, key: str) -> Decimal:
        """Give what was spent on *key*."""
        campaign = campaign_of(key).name
        return units(await self._number(self._says.get_spend, campaign=campaign))

    async def add_spend(self, key: str, amount: Decimal | float | str) -> Decimal:
        """Add *amount* to *key*, and give the new total."""
        campaign, more = campaign_of(key).name, micros(amount)
        return units(
            await self._number(
                self._says.add_spend, campaign=campaign, amount=more, now=self._now()
            )
        )

    # --- Operations -----------------------------------------------------------------------------

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*, wholly or not at all."""
        _check(holds)
        if self._place.is_postgres and _is_simple(holds) and await self._reserve_money(holds):
            return [Verdict(granted=True) for _ in holds]
        return await self._changed(holds, lambda page: [page.reserve(each) for each in holds])

    async def _reserve_money(self, holds: Sequence[Hold]) -> bool:
        """Reserve *holds* of one campaign in one statement; False if that cannot decide."""
        account = holds[0].account
        limits = [each.limit for hold in holds for each in hold.claims if each.limit is not None]
        rows = [
            {"operation": each.operation, "ttl": each.ttl_ms, "amounts": _json(_amounts(each))}
            for each in holds
        ]
        asked = {
            "owner": str(account),
            "campaign": account.name,
            "total": sum(each.amount for hold in holds for each in hold.claims),
            "room": min(limits, default=2**63 - 1),
            "rows": _json(rows),
            "now": self._now(),
        }

        async def work() -> bool:
            try:
                return bool((await self._alone_said(self._says.reserve_money, asked))[0][0])
            except IntegrityError:
                # Somebody reserved under one of these ids while the row's lock was waited for.
                return False

        return await self._job(work)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count the claims of each of *holds*."""
        _check(holds)
        return await self._changed(holds, lambda page: [page.confirm(each) for each in holds])

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*."""
        _check(holds)

        def change(page: _Page) -> None:
            for each in holds:
                page.void(each)

        await self._changed(holds, change)

    async def _changed(self, holds: Sequence[Hold], change: Callable[["_Page"], T]) -> T:
        """Make a *change* under the locks of the accounts of *holds*."""
        accounts = {each.account for each in holds}

        async def work(connection: AsyncConnection) -> T:
            page = await self._read(connection, accounts, holds)
            made = change(page)
            await self._write(connection, page)
            return made

        return await self._transact(work)

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*."""
        asked: dict[str, Any] = {"owner": str(account), "now": self._now()}
        if account.kind == "campaign":
            rows = await self._ask(self._says.campaign_levels, campaign=account.name, **asked)
        else:
            keys = _json([{"key": each.key} for each in claims])
            rows = await self._ask(self._says.viewer_levels, rows=keys, **asked)
        counters: dict[str, Counter] = {}
        for row in rows:
            counter = counters.setdefault(row.key, Counter())
            counter.count += row.counted
            counter.began += row.began
            counter.held += row.held
            counter.pieces |= _pieces(row.pieces)
        now = rows[0].now if rows else 0
        return [level(counters.get(each.key), each, now) for each in claims]

    async def keys(self, account: Account) -> list[str]:
        """Give the keys of the counters of *account*."""
        if account.kind == "campaign":
            found = await self._ask(self._says.get_spend, campaign=account.name)
            return [MONEY_KEY] if found else []
        return [row.key for row in await self._ask(self._says.keys, owner=str(account))]

    async def forget(self, account: Account) -> bool:
        """Remove all that is kept of *account*."""
        is_viewer = account.kind == "viewer"
        names = {"owner": str(account), "campaign": None if is_viewer else account.name}

        async def work(connection: AsyncConnection) -> bool:
            if is_viewer:
                await self._lock(connection, {account})
            removed = 0
            for each in self._says.forgets:
                removed += (await connection.execute(each, names)).rowcount
            return removed > 0

        return await self._transact(work)

    # --- Small items ----------------------------------------------------------------------------

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""
        rows = await self._ask(self._says.read_items, owner=str(account), now=self._now())
        return _read_json(rows[0][0]) if rows else {}

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items, each by itself."""

        async def work(connection: AsyncConnection) -> None:
            asked = {"owner": str(account), "now": self._now()}
            row = (await connection.execute(self._says.lock_items, asked)).one()
            items = _read_json(row[0]) if row.expires_at > row.now else {}
            changed = {
                "owner": str(account),
                "changed": _json(_with_changes(items, changes)),
                "ends": row.now + int(seconds * 1000),
            }
            await connection.execute(self._says.put_items, changed)

        await self._transact(work)

    # --- One transaction ------------------------------------------------------------------------

    async def _read(
        self, connection: AsyncConnection, accounts: set[Account], holds: Sequence[Hold]
    ) -> "_Page":
        """Lock *accounts*, and read what *holds* need of them."""
        now, budgets = await self._lock(connection, accounts)
        page = _Page(now)
        for row in budgets:
            page.put_budget(row)
        lapsed, page.dropped = await self._take_lapsed(connection, accounts, now)
        operations = await connection.execute(
            self._says.load_operations, {"rows": _json(_operations_of(holds))}
        )
        for row in operations:
            page.put_operation(row)
        if keys := page.counters_of(holds, lapsed):
            counters = await connection.execute(self._says.load_counters, {"rows": _json(keys)})
            for row in counters:
                page.put_counter(row)
        page.reap(lapsed)
        return page

    async def _lock(self, connection: AsyncConnection, accounts: set[Account]) -> tuple[int, Rows]:
        """Lock *accounts*; give the time from then on, and the rows of those that are campaigns."""
        now = self._now()
        locks = sorted(_lock_of(each) for each in accounts if each.kind == "viewer")
        names = sorted(each.name for each in accounts if each.kind == "campaign")
        locked: list[Row[Any]] = []
        if locks and self._place.is_postgres:
            asked = {"rows": _json([{"lock": each} for each in locks]), "now": now}
            locked += await connection.execute(self._says.lock_viewers, asked)
        if names:
            asked = {"rows": _json([{"campaign_id": each} for each in names]), "now": now}
            locked += await connection.execute(self._says.lock_campaigns, asked)
        times = [row.now for row in locked]
        return max(times, default=now or 0), locked[len(locked) - len(names) :]

    async def _take_lapsed(
        self, connection: AsyncConnection, accounts: set[Account], now: int
    ) -> tuple[Rows, int]:
        """Delete what lapsed of *accounts*; give what it held, and how many operations it was."""
        asked = {"rows": _json([{"account": str(each)} for each in accounts]), "now": now}
        lapsed = (await connection.execute(self._says.lapsed, asked)).all()
        if not lapsed:
            return lapsed, 0
        return lapsed, (await connection.execute(self._says.drop_lapsed, asked)).rowcount

    async def _write(self, connection: AsyncConnection, page: "_Page") -> None:
        for statement, rows in (
            (self._says.put_operations, page.changed_operations()),
            (self._says.put_counters, page.changed_counters()),
            (self._says.put_budgets, page.changed_budgets()),
        ):
            if rows:
                await connection.execute(statement, {"rows": _json(rows)})

    # --- Ways to the database -------------------------------------------------------------------

    def _now(self) -> int | None:
        """Give the time of the clock; None where it is the server's, which is asked by it."""
        return None if self._clock is None else self._clock()

    async def _number(self, statement: Executable, **asked: object) -> int:
        rows = await self._ask(statement, **asked)
        return int(rows[0][0]) if rows else 0

    async def _ask(self, statement: Executable, **asked: object) -> Rows:
        """Say one *statement*, a transaction by itself; give its rows."""
        return await self._job(lambda: self._alone_said(statement, asked))

    async def _alone_said(self, statement: Executable, asked: Mapping[str, object]) -> Rows:
        async with self._alone.connect() as connection:
            result = await connection.execute(statement, asked)
            return result.all() if result.returns_rows else []

    async def _transact(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Do *work* in one transaction."""

        async def transaction() -> T:
            async with self._engine.begin() as connection:
                return await work(connection)

        return await self._job(transaction)

    async def _job(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do *work* to its end, whether or not the caller waits for it."""
        try:
            async with asyncio.timeout(QUEUE_WITHIN):
                await self._slots.acquire()
        except TimeoutError:
            busy = f"state: {self._place}: all {self._connections} connections are in use"
            raise StateAwayError(busy) from None
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tasks.spawn(self._settle(work, done), "transaction")
        return await done

    async def _settle(
        self, work: Callable[[], Coroutine[Any, Any, T]], done: "asyncio.Future[T]"
    ) -> None:
        try:
            with mapped_errors(self._place):
                result = await work()
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

    # --- Life -----------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Return when no transaction is under way."""
        await self._tasks.wait_idle(QUEUE_WITHIN + CLOSE_WITHIN)

    async def sweep(self) -> int:
        """Delete what has expired, in small steps; tell how many rows."""
        deleted = await self._sweep_lapsed()
        for statement in self._says.sweeps:
            for _ in range(SWEEP_ROUNDS):
                rows = await self._sweep(statement)
                deleted += rows
                if rows < SWEEP_ROWS:
                    break
        return deleted

    async def _sweep(self, statement: Executable) -> int:
        async def work(connection: AsyncConnection) -> int:
            asked = {"limit": SWEEP_ROWS, "now": self._now()}
            return (await connection.execute(statement, asked)).rowcount

        return await self._transact(work)

    async def _sweep_lapsed(self) -> int:
        """Take off lapsed reservations of viewers who do not come back."""
        deleted = 0
        for _ in range(SWEEP_ROUNDS):
            found = await self._ask(self._says.lapsing, limit=SWEEP_ACCOUNTS, now=self._now())
            if not found:
                break
            deleted += await self._reap({_account(row.account) for row in found})
        return deleted

    async def _reap(self, accounts: set[Account]) -> int:
        async def work(connection: AsyncConnection) -> int:
            page = await self._read(connection, accounts, ())
            await self._write(connection, page)
            return page.dropped

        return await self._transact(work)

    async def ping(self) -> None:
        """Return if the database can be used now; create its tables where it is empty."""
        if self._is_ready:
            await self._ask(self._says.ping)
            return
        found = await self._job(lambda: standing(self._engine))
        check_standing(found, self._place)
        if found == "empty":
            await migrate(self._url)
        self._is_ready = True

    async def close(self) -> None:
        """Let calls that are under way end, and release the connections."""
        await self._tasks.wait_idle(CLOSE_WITHIN)
        async with self._tasks:
            pass
        await self._engine.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        ready = "ready" if self._is_ready else "not looked at yet"
        return f"<DatabaseBackend {self._place} {ready}, calls under way: {len(self._tasks)}>"


@dataclass(slots=True)
class _Operation:
    status: str
    amounts: dict[str, int] = field(default_factory=dict)
    held_until: int = 0
    kept_until: int = 0
    booked: int = 0
    booked_at: int = 0


class _Page:
    """What one transaction has locked and read, and what it changes: the ledger's open page."""

    def __init__(self, now: int) -> None:
        self.now = now
        self.dropped = 0
        """Lapsed reservations that were deleted."""
        self._counters: dict[tuple[Account, str], Counter] = {}
        self._ends: dict[tuple[Account, str], int] = {}
        self._late: dict[Account, int] = {}
        self._operations: dict[tuple[Account, str], _Operation] = {}
        self._changed: dict[tuple[Account, str], None] = {}
        """Of counters; a dict, for its order."""
        self._settled: dict[tuple[Account, str], None] = {}
        """Of operations that changed."""

    # --- Reading --------------------------------------------------------------------------------

    def put_budget(self, row: Row[Any]) -> None:
        """Take a row of ``budget_tracking``."""
        account = Account("campaign", row.campaign_id)
        self._counters[account, MONEY_KEY] = Counter(count=row.spent, held=row.reserved)
        self._late[account] = row.late

    def put_counter(self, row: Row[Any]) -> None:
        """Take a row of ``frequency_caps``."""
        key = (_account(row.account), row.key)
        self._counters[key] = Counter(row.counted, row.began, _pieces(row.pieces), row.held)
        self._ends[key] = row.expires_at

    def put_operation(self, row: Row[Any]) -> None:
        """Take a row of ``operations``."""
        key = (_account(row.account), row.operation)
        self._operations[key] = _Operation(
            row.status, json.loads(row.amounts), row.held_until, row.kept_until
        )

    def counters_of(self, holds: Sequence[Hold], lapsed: Rows) -> list[dict[str, str]]:
        """Tell which rows of ``frequency_caps`` are needed."""
        keys = {(each.account, claim.key) for each in holds for claim in each.claims}
        keys |= {
            (owner, key) for (owner, _), each in self._operations.items() for key in each.amounts
        }
        keys |= {(_account(row.account), row.key) for row in lapsed if row.key is not None}
        viewers = sorted(each for each in keys if each[0].kind == "viewer")
        return [{"account": str(account), "key": key} for account, key in viewers]

    def reap(self, lapsed: Rows) -> None:
        """Take off what *lapsed* reservations held."""
        for row in lapsed:
            if row.key is not None:
                self._take_off(_account(row.account), {row.key: row.amount})

    # --- Changing -------------------------------------------------------------------------------

    def reserve(self, hold: Hold) -> Verdict:
        """Reserve *hold*, wholly or not at all."""
        if (before := self._known(hold.account, hold.operation)) is not None:
            if before.status == HELD:
                return repeated(hold, before.amounts)
            return Verdict(granted=before.status == COUNTED)
        counters = {each.key: self._counter(hold.account, each.key) for each in hold.claims}
        verdict = judged(hold, counters, self.now)
        if verdict.granted:
            self._hold(hold, kept(hold, verdict))
        return verdict

    def _hold(self, hold: Hold, amounts: dict[str, int]) -> None:
        ends = self.now + hold.ttl_ms
        for key, amount in amounts.items():
            self._counter(hold.account, key).held += amount
            self._change(hold.account, key, ends)
        self._put(hold, _Operation(HELD, amounts, held_until=ends))

    def confirm(self, hold: Hold) -> Booking:
        """Count the claims of *hold*."""
        before = self._known(hold.account, hold.operation)
        if before is not None and before.status == COUNTED:
            return "again"
        covered = self._release(hold) or self._drawn(hold)
        for claim in hold.claims:
            counter = self._counter(hold.account, claim.key)
            counter.add(claim.window, claim.amount, self.now)
            self._change(hold.account, claim.key, counter.ends(claim.window, self.now))
        booked = sum(each.amount for each in hold.claims)
        ends = self.now + hold.keep_ms
        self._put(hold, _Operation(COUNTED, {}, 0, ends, booked, self.now))
        if hold.account.kind == "campaign" and not covered:
            self._late[hold.account] += booked
        return "booked" if covered else "late"

    def _drawn(self, hold: Hold) -> bool:
        """Take *hold* out of its lease; whether that had room for it."""
        lease = self._known(hold.account, hold.lease)
        if lease is None or lease.status != HELD:
            return False
        taken, covered = drawn(lease.amounts, hold)
        self._take_off(hold.account, taken)
        lease.amounts = {key: left - taken.get(key, 0) for key, left in lease.amounts.items()}
        self._settled[hold.account, hold.lease] = None
        return covered

    def void(self, hold: Hold) -> None:
        """Release *hold*."""
        before = self._known(hold.account, hold.operation)
        if before is None or before.status == HELD:
            self._release(hold)
            self._put(hold, _Operation(VOID, kept_until=self.now + hold.keep_ms))

    def _release(self, hold: Hold) -> bool:
        """Take off the reservation of *hold*; whether there was one."""
        before = self._known(hold.account, hold.operation)
        if before is None or before.status != HELD:
            return False
        self._take_off(hold.account, before.amounts)
        return True

    def _known(self, account: Account, operation: str) -> _Operation | None:
        """Give what is known of an operation; what was settled long ago is forgotten."""
        found = self._operations.get((account, operation))
        if found is None or (found.status != HELD and found.kept_until <= self.now):
            return None
        return found

    def _counter(self, account: Account, key: str) -> Counter:
        return self._counters.setdefault((account, key), Counter())

    def _take_off(self, account: Account, amounts: Mapping[str, int]) -> None:
        """Let *amounts* be reserved no more."""
        for key, amount in amounts.items():
            self._counter(account, key).held -= amount
            self._change(account, key, 0)

    def _change(self, account: Account, key: str, ends: int) -> None:
        """Mark a counter as changed, to be kept until *ends* at least."""
        self._changed[account, key] = None
        self._ends[account, key] = max(self._ends.get((account, key), 0), ends)

    def _put(self, hold: Hold, operation: _Operation) -> None:
        self._operations[hold.account, hold.operation] = operation
        self._settled[hold.account, hold.operation] = None

    # --- Writing --------------------------------------------------------------------------------

    def changed_operations(self) -> list[dict[str, object]]:
        """Give the rows of ``operations`` to write."""
        return [
            {
                **asdict(found := self._operations[account, operation]),
                "account": str(account),
                "operation": operation,
                "amounts": _json(found.amounts),
            }
            for account, operation in self._settled
        ]

    def changed_counters(self) -> list[dict[str, object]]:
        """Give the rows of ``frequency_caps`` to write."""
        return [
            {
                **asdict(counter := self._counters[account, key]),
                "account": str(account),
                "key": key,
                "expires_at": self._ends[account, key],
                "pieces": _json(counter.pieces),
            }
            for account, key in self._changed
            if account.kind == "viewer"
        ]

    def changed_budgets(self) -> list[dict[str, object]]:
        """Give the rows of ``budget_tracking`` to write."""
        return [
            {
                "campaign_id": account.name,
                "spent": (counter := self._counters[account, key]).count,
                "reserved": counter.held,
                "late": self._late[account],
                "timestamp": self.now,
            }
            for account, key in self._changed
            if account.kind == "campaign"
        ]


def _check(holds: Sequence[Hold]) -> None:
    for hold in holds:
        check_hold(hold)
        if hold.account.kind == "campaign" and hold.claims[0].window.kind != "lifetime":
            raise StateBackendError("a database counts a campaign's money for its lifetime")


def _is_simple(holds: Sequence[Hold]) -> bool:
    """Whether one statement may do: one campaign, and each operation once."""
    accounts = {each.account for each in holds}
    return (
        len(accounts) == 1
        and holds[0].account.kind == "campaign"
        and len({each.operation for each in holds}) == len(holds)
    )


def _amounts(hold: Hold) -> dict[str, int]:
    return {each.key: each.amount for each in hold.claims}


def _operations_of(holds: Sequence[Hold]) -> list[dict[str, str]]:
    """Tell which rows of ``operations`` *holds* need: their own, and their leases'."""
    names = {(str(each.account), each.operation) for each in holds}
    names |= {(str(each.account), each.lease) for each in holds if each.lease}
    return [{"account": account, "operation": operation} for account, operation in sorted(names)]


def _account(words: str) -> Account:
    """Read an account as ``str`` writes it."""
    kind, _, name = words.partition(" ")
    return Account("viewer" if kind == "viewer" else "campaign", name)


def _lock_of(account: Account) -> int:
    """Give the number of an account's advisory lock: 64 bits, with a sign."""
    digest = blake2b(str(account).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _read_json(words: str) -> dict[str, str]:
    items: dict[str, str] = json.loads(words)
    return items


def _pieces(words: str) -> dict[int, int]:
    return {int(piece): count for piece, count in json.loads(words).items()}


def _with_changes(items: dict[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Give *items* after *changes*, within the limits."""
    for name, value in changes.items():
        items.pop(name, None)
        if value is not None:
            items[name] = value
    while len(items) > MAX_ITEMS or _size(items) > MAX_ITEM_BYTES:
        del items[next(iter(items))]
    return items


def _size(items: Mapping[str, str]) -> int:
    return sum(len(name.encode()) + len(value.encode()) for name, value in items.items())


def _fail(done: "asyncio.Future[T]", error: BaseException) -> None:
    """Give *error* to who waits, if anybody still does."""
    if not done.done():
        done.set_exception(error)
        # Nobody may be left to look at it: that is no mistake.
        done.exception()


def _steady_time() -> Callable[[], int]:
    """
    Make a clock in Unix milliseconds that does not follow steps of the machine's.

    Monotonic time is one for all processes of a machine, so those that start together agree.
    """
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: (time.monotonic_ns() + offset) // 1_000_000
