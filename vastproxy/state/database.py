"""
State in PostgreSQL, or in a file of SQLite.

Rule 1: a call is one transaction, and says a number of statements that does not grow with its list.
Rule 2: what is decided from what was read is decided under the locks of all its accounts, which
are taken first, in one order. The arithmetic is that of :mod:`vastproxy.state.ledger`.
Rule 3: a caller may give up at any moment, and its transaction goes on to its end: see
:mod:`vastproxy.state.transactions`.
Rule 4: what has been acknowledged survives the end of any process; of PostgreSQL (with its
synchronous_commit) also the loss of power.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from hashlib import blake2b
from typing import Any, Self, TypeVar
from uuid import uuid4

from vastproxy.state.base import (
    MONEY_KEY,
    Account,
    Booking,
    Claim,
    Hold,
    Level,
    Verdict,
    campaign_of,
    check_holds,
    micros,
    units,
)
from vastproxy.state.clock import steady_clock
from vastproxy.state.items import with_changes

# First of these: it says what to install where SQLAlchemy is missing.
from vastproxy.state.migrate import check_standing, migrate, place_of, standing  # isort: split

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import Executable

from vastproxy.state.page import Page, account_of, compact, levels_of, operations_of
from vastproxy.state.tables import Rows, statements
from vastproxy.state.transactions import Transactions

SWEEP_ROWS = 1_000
"""Rows that one statement of a sweep deletes at most, so that none holds locks for long."""

SWEEP_ACCOUNTS = 100
"""Accounts whose lapsed reservations are taken off in one transaction."""

SWEEP_WITHIN = 30.0
"""Seconds after which a sweep leaves the rest to the next one."""

SWEEP_PAUSE = 0.01
"""Seconds between two of its statements: requests go first."""

T = TypeVar("T")


class DatabaseBackend:
    """
    The backend of ``postgresql://`` and ``sqlite:///``.

    *url* is written as operators do. *clock* gives Unix milliseconds; None: the server's clock,
    and for SQLite the machine's at the start, and the monotonic one from then on.
    """

    def __init__(self, url: str, *, clock: Callable[[], int] | None = None) -> None:
        self._url = url
        self._place = place_of(url)
        self._place.check()
        self._clock = clock or (None if self._place.is_postgres else steady_clock())
        self._transactions = Transactions(self._place)
        self._says = statements(self._place.url.get_backend_name())
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
        check_holds(holds)
        if self._place.is_postgres and _is_simple(holds) and await self._reserve_money(holds):
            return [Verdict(granted=True) for _ in holds]
        return await self._changed(holds, lambda page: [page.reserve(each) for each in holds])

    async def _reserve_money(self, holds: Sequence[Hold]) -> bool:
        """Reserve *holds* of one campaign in one statement; False if that cannot decide."""
        account = holds[0].account
        limits = [each.limit for hold in holds for each in hold.claims if each.limit is not None]
        rows = [
            {"operation": each.operation, "ttl": each.ttl_ms, "amounts": compact(_amounts(each))}
            for each in holds
        ]
        asked = {
            "owner": str(account),
            "campaign": account.name,
            "total": sum(each.amount for hold in holds for each in hold.claims),
            "room": min(limits, default=2**63 - 1),
            "rows": compact(rows),
            "now": self._now(),
        }

        async def work() -> bool:
            try:
                return bool((await self._transactions.say(self._says.reserve_money, asked))[0][0])
            except IntegrityError:
                # Somebody reserved under one of these ids while the row's lock was waited for.
                return False

        return await self._transactions.job(work)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count the claims of each of *holds*."""
        check_holds(holds)
        return await self._changed(holds, lambda page: [page.confirm(each) for each in holds])

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*."""
        check_holds(holds)

        def change(page: Page) -> None:
            for each in holds:
                page.void(each)

        await self._changed(holds, change)

    async def _changed(self, holds: Sequence[Hold], change: Callable[[Page], T]) -> T:
        """Make a *change* under the locks of the accounts of *holds*."""
        accounts = {each.account for each in holds}

        async def work(connection: AsyncConnection) -> T:
            page = await self._read(connection, accounts, holds)
            made = change(page)
            await self._write(connection, page)
            return made

        return await self._transactions.transact(work)

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*."""
        asked: dict[str, Any] = {"owner": str(account), "now": self._now()}
        if account.kind == "campaign":
            rows = await self._ask(self._says.campaign_levels, campaign=account.name, **asked)
        else:
            keys = compact([{"key": each.key} for each in claims])
            rows = await self._ask(self._says.viewer_levels, rows=keys, **asked)
        return levels_of(rows, claims)

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
                found = await connection.execute(each, names)
                removed += sum(found.scalars()) if found.returns_rows else found.rowcount
            return removed > 0

        return await self._transactions.transact(work)

    # --- Small items ----------------------------------------------------------------------------

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""
        rows = await self._ask(self._says.read_items, owner=str(account), now=self._now())
        return _items_of(rows[0][0]) if rows else {}

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items, each by itself."""

        async def work(connection: AsyncConnection) -> None:
            asked = {"owner": str(account), "now": self._now()}
            row = (await connection.execute(self._says.lock_items, asked)).one()
            items = _items_of(row[0]) if row.expires_at > row.now else {}
            changed = {
                "owner": str(account),
                "changed": compact(with_changes(items, changes)),
                "ends": row.now + int(seconds * 1000),
            }
            await connection.execute(self._says.put_items, changed)

        await self._transactions.transact(work)

    # --- One transaction ------------------------------------------------------------------------

    async def _read(
        self, connection: AsyncConnection, accounts: set[Account], holds: Sequence[Hold]
    ) -> Page:
        """Lock *accounts*, and read what *holds* need of them."""
        now, budgets = await self._lock(connection, accounts)
        page = Page(now)
        for row in budgets:
            page.put_budget(row)
        lapsed, page.dropped = await self._take_lapsed(connection, accounts, now)
        operations = await connection.execute(
            self._says.load_operations, {"rows": compact(operations_of(holds))}
        )
        for row in operations:
            page.put_operation(row)
        if keys := page.counters_of(holds, lapsed):
            counters = await connection.execute(self._says.load_counters, {"rows": compact(keys)})
            for row in counters:
                page.put_counter(row)
        page.reap(lapsed)
        return page

    async def _lock(self, connection: AsyncConnection, accounts: set[Account]) -> tuple[int, Rows]:
        """Lock *accounts*; give the time from then on, and the rows of those that are campaigns."""
        now = self._now()
        locks = sorted(_lock_of(each) for each in accounts if each.kind == "viewer")
        names = sorted(each.name for each in accounts if each.kind == "campaign")
        locked: list[Any] = []
        if locks and self._place.is_postgres:
            asked = {"rows": compact([{"lock": each} for each in locks]), "now": now}
            locked += await connection.execute(self._says.lock_viewers, asked)
        if names:
            asked = {"rows": compact([{"campaign_id": each} for each in names]), "now": now}
            locked += await connection.execute(self._says.lock_campaigns, asked)
        times = [row.now for row in locked]
        return max(times, default=now or 0), locked[len(locked) - len(names) :]

    async def _take_lapsed(
        self, connection: AsyncConnection, accounts: set[Account], now: int
    ) -> tuple[Rows, int]:
        """Delete what lapsed of *accounts*; give what it held, and how many operations it was."""
        asked = {"rows": compact([{"account": str(each)} for each in accounts]), "now": now}
        lapsed = (await connection.execute(self._says.lapsed, asked)).all()
        if not lapsed:
            return lapsed, 0
        return lapsed, (await connection.execute(self._says.drop_lapsed, asked)).rowcount

    async def _write(self, connection: AsyncConnection, page: Page) -> None:
        changed = {
            "operations": page.changed_operations(),
            "counters": page.changed_counters(),
            "budgets": page.changed_budgets(),
        }
        for names, statement in self._says.puts:
            if any(changed[name] for name in names):
                rows = {name: compact(changed[name]) for name in names}
                await connection.execute(statement, rows)

    # --- Ways to the database -------------------------------------------------------------------

    def _now(self) -> int | None:
        """Give the time of the clock; None where it is the server's, which is asked by it."""
        return None if self._clock is None else self._clock()

    async def _number(self, statement: Executable, **asked: object) -> int:
        rows = await self._ask(statement, **asked)
        return int(rows[0][0]) if rows else 0

    async def _ask(self, statement: Executable, **asked: object) -> Rows:
        """Say one *statement*, a transaction by itself; give its rows."""
        return await self._transactions.ask(statement, asked)

    # --- Life -----------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Return when no transaction is under way."""
        await self._transactions.wait_idle()

    async def sweep(self) -> int:
        """Delete what has expired, in small steps; tell how many rows."""
        until, deleted = time.monotonic() + SWEEP_WITHIN, 0
        # First the reservations: a counter stays as long as something is reserved on it.
        for each in (None, *self._says.sweeps):
            more = True
            while more:
                rows, more = await (self._sweep_lapsed() if each is None else self._sweep(each))
                deleted += rows
                more = more and time.monotonic() < until
                await asyncio.sleep(SWEEP_PAUSE if more else 0)
        return deleted

    async def _sweep(self, statement: Executable) -> tuple[int, bool]:
        """Say one *statement*; give how many rows it deleted, and whether there may be more."""

        async def work(connection: AsyncConnection) -> int:
            asked = {"limit": SWEEP_ROWS, "now": self._now()}
            return (await connection.execute(statement, asked)).rowcount

        rows = await self._transactions.transact(work)
        return rows, rows >= SWEEP_ROWS

    async def _sweep_lapsed(self) -> tuple[int, bool]:
        """Take off lapsed reservations of some viewers who do not come back; as _sweep."""
        found = await self._ask(self._says.lapsing, limit=SWEEP_ACCOUNTS, now=self._now())
        rows = await self._reap({account_of(row.account) for row in found}) if found else 0
        return rows, len(found) >= SWEEP_ACCOUNTS

    async def _reap(self, accounts: set[Account]) -> int:
        async def work(connection: AsyncConnection) -> int:
            page = await self._read(connection, accounts, ())
            await self._write(connection, page)
            return page.dropped

        return await self._transactions.transact(work)

    async def ping(self) -> None:
        """Return if the database can be used now; create its tables where it is empty."""
        if not self._is_ready:
            found = await self._transactions.job(lambda: standing(self._transactions.engine))
            check_standing(found, self._place)
            if found == "empty":
                await migrate(self._url)
            self._is_ready = True
        await self._transactions.warm(self._rehearse)

    async def _rehearse(self, connection: AsyncConnection) -> None:
        """
        Say all that requests say, about nothing.

        A statement that is new to a connection takes ten times as long: it is made, sent, parsed
        and planned. The first request should not be the one that waits for that.
        """
        now, nobody = self._now(), uuid4().hex
        owned: dict[str, object] = {"owner": nobody, "now": now}
        says, listed, timed = self._says, {"rows": "[]"}, {"rows": "[]", "now": now}
        money = {"campaign": nobody, "total": 0, "room": 0}
        said: list[tuple[Executable, Mapping[str, object]]] = [
            (says.lock_campaigns, timed),
            (says.lapsed, timed),
            (says.drop_lapsed, timed),
            (says.load_operations, listed),
            (says.load_counters, listed),
            *[(each, dict.fromkeys(names, "[]")) for names, each in says.puts],
            (says.viewer_levels, owned | listed),
            (says.campaign_levels, owned | {"campaign": nobody}),
            (says.read_items, owned),
            (says.lock_items, owned),
            (says.put_items, {"owner": nobody, "changed": "{}", "ends": 0}),
        ]
        if self._place.is_postgres:
            said += [(says.lock_viewers, timed), (says.reserve_money, owned | timed | money)]
        for statement, asked in said:
            await connection.execute(statement, asked)

    async def close(self) -> None:
        """Let calls that are under way end, and release the connections."""
        await self._transactions.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        ready = "ready" if self._is_ready else "not looked at yet"
        under_way = self._transactions.under_way
        return f"<DatabaseBackend {self._place} {ready}, calls under way: {under_way}>"


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


def _lock_of(account: Account) -> int:
    """Give the number of an account's advisory lock: 64 bits, with a sign."""
    digest = blake2b(str(account).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _items_of(words: str) -> dict[str, str]:
    items: dict[str, str] = json.loads(words)
    return items
