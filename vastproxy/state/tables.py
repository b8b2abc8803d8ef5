"""
The tables of the SQL backend, and the statements over them, in words of both dialects.

Rule 1: times are Unix milliseconds, money is micro-units: integers of 64 bits, on every database.
Rule 2: the text of a statement never depends on how much it is asked for. Lists go in as one
parameter, a JSON array of objects, so a statement is prepared once, and knows no bound on how many
parameters there may be.
Rule 3: what is changed by looking first is changed under the lock of its account: the row of a
campaign, an advisory lock of PostgreSQL for a viewer; SQLite has one lock for all. Campaigns'
locks come after viewers', in the order of their names, so nobody waits in a circle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ColumnClause,
    ColumnElement,
    Delete,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Subquery,
    Table,
    TableValuedAlias,
    Text,
    UniqueConstraint,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    extract,
    func,
    insert,
    literal,
    literal_column,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy import Column as Col
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql import Executable
from sqlalchemy.types import TypeEngine

from vastproxy.state.base import MONEY_KEY
from vastproxy.state.ledger import FOR_EVER

PLAIN = ""
"""The account of counters that have none; those of viewers begin with a word and a space."""

HELD, COUNTED, VOID = "held", "counted", "void"
"""How an operation stands."""

_HELD: ColumnClause[str] = literal_column("'held'")
"""Written out: a planner cannot use a partial index for a parameter."""

Upsert = postgresql.Insert | sqlite.Insert
Rows = Sequence[Row[Any]]

METADATA = MetaData()

_ID = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite numbers rows by itself only where the type is INTEGER."""


def _number(name: str, default: str = "0") -> Col[int]:
    return Col(name, BigInteger, nullable=False, server_default=default)


FREQUENCY_CAPS = Table(
    "frequency_caps",
    METADATA,
    Col("id", _ID, primary_key=True),
    Col("account", Text, nullable=False, server_default=PLAIN),
    Col("key", Text, nullable=False),
    _number("count"),
    _number("expires_at", str(FOR_EVER)),
    _number("began"),
    # A JSON object: what was confirmed in each piece of a rolling window, by its number.
    Col("pieces", Text, nullable=False, server_default="{}"),
    _number("held"),
    UniqueConstraint("account", "key", name="uq_frequency_caps_account_key"),
    CheckConstraint("held >= 0", name="ck_frequency_caps_held"),
    Index("ix_frequency_caps_expires_at", "expires_at"),
)

BUDGET_TRACKING = Table(
    "budget_tracking",
    METADATA,
    Col("id", _ID, primary_key=True),
    Col("campaign_id", Text, nullable=False),
    _number("spent"),
    _number("reserved"),
    # What of the spent money was confirmed without room having been kept.
    _number("late"),
    _number("timestamp"),
    UniqueConstraint("campaign_id", name="uq_budget_tracking_campaign_id"),
    # No limit stands here: what was shown is counted, also beyond it.
    CheckConstraint("reserved >= 0", name="ck_budget_tracking_reserved"),
    CheckConstraint("late >= 0", name="ck_budget_tracking_late"),
)

OPERATIONS = Table(
    "operations",
    METADATA,
    Col("account", Text, primary_key=True),
    Col("operation", String(100), primary_key=True),
    Col("status", String(7), nullable=False),
    # A JSON object: what is reserved on each counter.
    Col("amounts", Text, nullable=False, server_default="{}"),
    _number("held_until"),
    _number("kept_until"),
    # The sum of what was counted, and when.
    _number("booked"),
    _number("booked_at"),
    CheckConstraint("status IN ('held', 'counted', 'void')", name="ck_operations_status"),
    CheckConstraint("booked >= 0", name="ck_operations_booked"),
    CheckConstraint("booked = 0 OR status = 'counted'", name="ck_operations_booked_counted"),
)
# Partial: a campaign has a million settled operations, and a few that may lapse.
Index(
    "ix_operations_held",
    OPERATIONS.c.account,
    OPERATIONS.c.held_until,
    postgresql_where=OPERATIONS.c.status == _HELD,
    sqlite_where=OPERATIONS.c.status == _HELD,
)
Index(
    "ix_operations_held_until",
    OPERATIONS.c.held_until,
    postgresql_where=OPERATIONS.c.status == _HELD,
    sqlite_where=OPERATIONS.c.status == _HELD,
)
Index(
    "ix_operations_kept_until",
    OPERATIONS.c.kept_until,
    postgresql_where=OPERATIONS.c.status != _HELD,
    sqlite_where=OPERATIONS.c.status != _HELD,
)

VIEWER_ITEMS = Table(
    "viewer_items",
    METADATA,
    Col("account", Text, primary_key=True),
    # A JSON object, the longest unchanged item first.
    Col("items", Text, nullable=False, server_default="{}"),
    _number("expires_at"),
    Index("ix_viewer_items_expires_at", "expires_at"),
)

_COUNTER = ("account", "key", "count", "expires_at", "began", "pieces", "held")
_BUDGET = ("campaign_id", "spent", "reserved", "late", "timestamp")
_OPERATION = (
    "account",
    "operation",
    "status",
    "amounts",
    "held_until",
    "kept_until",
    "booked",
    "booked_at",
)

_PUTS: Mapping[str, tuple[Table, Sequence[str], Sequence[str]]] = {
    "operations": (OPERATIONS, _OPERATION, ("account", "operation")),
    "counters": (FREQUENCY_CAPS, _COUNTER, ("account", "key")),
    "budgets": (BUDGET_TRACKING, _BUDGET, ("campaign_id",)),
}
"""What a transaction writes: into which table which columns, of which some are its key."""


@dataclass(frozen=True, slots=True)
class Statements:
    """
    What the backend says to a database.

    Parameters: ``rows`` is a JSON array of objects; ``now`` is Unix milliseconds, or None for the
    server's own clock; none is named as a column, which would mean a value for it.
    """

    get_count: Executable
    increment: Executable
    set_expiry: Executable
    get_spend: Executable
    add_spend: Executable
    lock_viewers: Executable
    lock_campaigns: Executable
    reserve_money: Executable
    lapsed: Executable
    drop_lapsed: Executable
    load_operations: Executable
    load_counters: Executable
    puts: tuple[tuple[tuple[str, ...], Executable], ...]
    """What writes ``operations``, ``counters`` and ``budgets``, and which of these parameters, that
    are as ``rows``, each has: PostgreSQL takes all in one statement, SQLite cannot."""
    keys: Executable
    viewer_levels: Executable
    campaign_levels: Executable
    read_items: Executable
    lock_items: Executable
    put_items: Executable
    lapsing: Executable
    sweeps: tuple[Executable, ...]
    forgets: tuple[Executable, ...]


def statements(dialect: str) -> Statements:
    """Make the statements for *dialect*: ``postgresql`` or ``sqlite``."""
    words = _Words(dialect)
    return Statements(
        **_plain(words), **_locks(words), **_loads(words), **_items(words), **_cleaning(words)
    )


class _Words:
    """What the dialects say differently."""

    def __init__(self, dialect: str) -> None:
        self._is_postgres = dialect == "postgresql"

    def now(self) -> ColumnElement[int]:
        """Say the time that the caller gives, or else the server's at this very moment."""
        given = bindparam("now", type_=BigInteger())
        if not self._is_postgres:
            return given
        own = func.floor(extract("epoch", func.clock_timestamp()) * 1000)
        return func.coalesce(given, cast(own, BigInteger), type_=BigInteger())

    def rows(self, given_as: str = "rows", **columns: type[TypeEngine[Any]]) -> Subquery:
        """Say the parameter *given_as* as a table of *columns*."""
        given = bindparam(given_as, type_=Text())
        if self._is_postgres:
            typed = [column(name, kind()) for name, kind in columns.items()]
            records = func.json_to_recordset(cast(given, JSON)).table_valued(*typed, name="given")
            return select(records.render_derived(with_types=True)).subquery("rows")
        each = func.json_each(given).table_valued("value", name="given")
        found = [
            func.json_extract(each.c.value, f"$.{name}", type_=kind()).label(name)
            for name, kind in columns.items()
        ]
        return select(*found).subquery("rows")

    def parts(self, amounts: ColumnElement[str]) -> TableValuedAlias:
        """Say a JSON object of *amounts* as a table of ``key`` and ``value``."""
        if self._is_postgres:
            parts = func.json_each_text(cast(amounts, JSON))
        else:
            parts = func.json_each(amounts)
        return parts.table_valued("key", "value", name="part")

    def upsert(self, table: Table, values: Subquery | Mapping[str, Any]) -> Upsert:
        """Say INSERT INTO *table*, to which ON CONFLICT can be said."""
        into: Upsert = postgresql.insert(table) if self._is_postgres else sqlite.insert(table)
        if not isinstance(values, Subquery):
            return into.values(values)
        # WHERE: without it SQLite takes ON CONFLICT for the condition of a join.
        return into.from_select(list(values.c.keys()), select(values).where(true()))

    def puts(self) -> list[tuple[tuple[str, ...], Executable]]:
        """Say what writes all that a transaction changes, in as few statements as can be."""
        puts = {name: self._put(name, *each) for name, each in _PUTS.items()}
        if not self._is_postgres:
            return [((name,), each) for name, each in puts.items()]
        parts = [each.returning(literal(1)).cte(f"put_{name}") for name, each in puts.items()]
        return [(tuple(puts), select(literal(1)).add_cte(*parts))]

    def _put(
        self, given_as: str, table: Table, names: Sequence[str], keys: Sequence[str]
    ) -> Upsert:
        """Say that the rows *given_as* stand in *table* from now on, each under its *keys*."""
        columns = {name: _kind(table.c[name]) for name in names}
        into = self.upsert(table, self.rows(given_as, **columns))
        changed = {name: into.excluded[name] for name in names if name not in keys}
        return into.on_conflict_do_update(index_elements=list(keys), set_=changed)


def _kind(of: Col[Any]) -> type[TypeEngine[Any]]:
    return BigInteger if isinstance(of.type, BigInteger) else Text


def _plain(words: _Words) -> dict[str, Any]:
    table, now = FREQUENCY_CAPS, words.now()
    mine = (table.c.account == PLAIN) & (table.c.key == bindparam("name", type_=Text()))
    lives = table.c.expires_at > now
    into = words.upsert(
        table,
        {
            "account": PLAIN,
            "key": bindparam("name", type_=Text()),
            "count": bindparam("amount", type_=BigInteger()),
        },
    )
    added = {
        "count": case((lives, table.c["count"]), else_=0) + into.excluded.count,
        "expires_at": case((lives, table.c.expires_at), else_=FOR_EVER),
    }
    ends = now + bindparam("ms", type_=BigInteger())
    return {
        "get_count": select(table.c["count"]).where(mine, lives),
        "increment": into.on_conflict_do_update(
            index_elements=["account", "key"], set_=added
        ).returning(table.c["count"]),
        "set_expiry": update(table).where(mine, lives).values(expires_at=ends),
        **_money(words),
    }


def _money(words: _Words) -> dict[str, Any]:
    table = BUDGET_TRACKING
    campaign = bindparam("campaign", type_=Text())
    into = words.upsert(
        table,
        {
            "campaign_id": campaign,
            "spent": bindparam("amount", type_=BigInteger()),
            "timestamp": words.now(),
        },
    )
    added = {"spent": table.c.spent + into.excluded.spent, "timestamp": into.excluded.timestamp}
    return {
        "get_spend": select(table.c.spent).where(table.c.campaign_id == campaign),
        "add_spend": into.on_conflict_do_update(
            index_elements=["campaign_id"], set_=added
        ).returning(table.c.spent),
        "reserve_money": _reserve_money(words),
    }


def _reserve_money(words: _Words) -> Executable:
    """
    Say the shortest way to reserve of one campaign: in one statement, or not at all.

    It finds no room where lapsed reservations take it, and nothing to do where an operation is
    known: then the long way decides. Operations that come in meanwhile break its unique key.
    """
    table, wanted = BUDGET_TRACKING, words.rows(operation=Text, amounts=Text, ttl=BigInteger)
    account = bindparam("owner", type_=Text())
    total = bindparam("total", type_=BigInteger())
    known = exists().where(
        OPERATIONS.c.account == account,
        OPERATIONS.c.operation.in_(select(wanted.c.operation)),
    )
    taken = (
        update(table)
        .where(
            table.c.campaign_id == bindparam("campaign", type_=Text()),
            table.c.spent + table.c.reserved + total <= bindparam("room", type_=BigInteger()),
            ~known,
        )
        .values(reserved=table.c.reserved + total, timestamp=words.now())
        .returning(table.c.timestamp)
        .cte("taken")
    )
    held = select(
        account, wanted.c.operation, literal(HELD, Text()), wanted.c.amounts,
        taken.c.timestamp + wanted.c.ttl,
    ).select_from(wanted.join(taken, true()))  # fmt: skip
    names = ["account", "operation", "status", "amounts", "held_until"]
    put = insert(OPERATIONS).from_select(names, held).returning(OPERATIONS.c.operation).cte("put")
    return select(func.count()).select_from(put)


def _locks(words: _Words) -> dict[str, Any]:
    viewers = words.rows(lock=BigInteger)
    campaigns = words.rows(campaign_id=Text)
    into = words.upsert(BUDGET_TRACKING, campaigns)
    columns = [BUDGET_TRACKING.c[name] for name in _BUDGET]
    return {
        "lock_viewers": select(
            func.pg_advisory_xact_lock(viewers.c.lock), words.now().label("now")
        ),
        "lock_campaigns": into.on_conflict_do_update(
            index_elements=["campaign_id"], set_={"campaign_id": into.excluded.campaign_id}
        ).returning(*columns, words.now().label("now")),
    }


def _has_lapsed(now: ColumnElement[int]) -> ColumnElement[bool]:
    return (OPERATIONS.c.status == _HELD) & (OPERATIONS.c.held_until <= now)


def _lapsed(words: _Words, where: ColumnElement[bool]) -> Select[Any]:
    """
    Say what lapsed reservations hold, by account and counter.

    One that holds nothing, because none of its claims had room, is there without a key.
    """
    part = words.parts(OPERATIONS.c.amounts)
    amount = func.coalesce(func.sum(cast(part.c.value, BigInteger)), 0)
    return (
        select(
            OPERATIONS.c.account,
            part.c.key.label("key"),
            cast(amount, BigInteger).label("amount"),
        )
        .select_from(OPERATIONS.outerjoin(part, true()))
        .where(where, _has_lapsed(words.now()))
        .group_by(OPERATIONS.c.account, part.c.key)
    )


def _loads(words: _Words) -> dict[str, Any]:
    accounts = OPERATIONS.c.account.in_(select(words.rows(account=Text).c.account))
    operations = words.rows(account=Text, operation=Text)
    counters = words.rows(account=Text, key=Text)
    mine = OPERATIONS.c.account == bindparam("owner", type_=Text())
    return {
        "lapsed": _lapsed(words, accounts),
        "drop_lapsed": delete(OPERATIONS).where(accounts, _has_lapsed(words.now())),
        "load_operations": select(OPERATIONS).join(
            operations,
            (OPERATIONS.c.account == operations.c.account)
            & (OPERATIONS.c.operation == operations.c.operation),
        ),
        "load_counters": select(
            *FREQUENCY_CAPS.columns, FREQUENCY_CAPS.c["count"].label("counted")
        ).join(
            counters,
            (FREQUENCY_CAPS.c.account == counters.c.account)
            & (FREQUENCY_CAPS.c.key == counters.c.key),
        ),
        "puts": tuple(words.puts()),
        "keys": select(FREQUENCY_CAPS.c.key).where(
            FREQUENCY_CAPS.c.account == bindparam("owner", type_=Text())
        ),
        "viewer_levels": _levels(words, _viewer_counters(words), mine),
        "campaign_levels": _levels(words, _campaign_counters(), mine),
    }


def _levels(words: _Words, counters: Select[Any], mine: ColumnElement[bool]) -> Executable:
    """Say *counters*, and what lapsed reservations take off them, in one look."""
    lapsed = _lapsed(words, mine).subquery("lapsed")
    off = select(lapsed.c.key, literal(0), literal(0), literal("{}", Text()), -lapsed.c.amount)
    both = union_all(counters, off).subquery("levels")
    return select(both, words.now().label("now"))


def _viewer_counters(words: _Words) -> Select[Any]:
    table, keys = FREQUENCY_CAPS, words.rows(key=Text)
    return select(
        table.c.key, table.c["count"].label("counted"), table.c.began, table.c.pieces, table.c.held
    ).where(
        table.c.account == bindparam("owner", type_=Text()), table.c.key.in_(select(keys.c.key))
    )


def _campaign_counters() -> Select[Any]:
    table = BUDGET_TRACKING
    return select(
        literal(MONEY_KEY, Text()).label("key"),
        table.c.spent.label("counted"),
        literal(0).label("began"),
        literal("{}", Text()).label("pieces"),
        table.c.reserved.label("held"),
    ).where(table.c.campaign_id == bindparam("campaign", type_=Text()))


def _items(words: _Words) -> dict[str, Any]:
    table, now = VIEWER_ITEMS, words.now()
    account = bindparam("owner", type_=Text())
    into = words.upsert(table, {"account": account})
    return {
        "read_items": select(table.c["items"]).where(
            table.c.account == account, table.c.expires_at > now
        ),
        "lock_items": into.on_conflict_do_update(
            index_elements=["account"], set_={"account": into.excluded.account}
        ).returning(table.c["items"], table.c.expires_at, now.label("now")),
        "put_items": update(table)
        .where(table.c.account == account)
        .values(
            {
                "items": bindparam("changed", type_=Text()),
                "expires_at": bindparam("ends", type_=BigInteger()),
            }
        ),
    }


def _cleaning(words: _Words) -> dict[str, Any]:
    account = bindparam("owner", type_=Text())
    now = words.now()
    limit = bindparam("limit", type_=Integer())
    sweeps = (
        _sweep(OPERATIONS, (OPERATIONS.c.status != _HELD) & (OPERATIONS.c.kept_until <= now)),
        _sweep(FREQUENCY_CAPS, (FREQUENCY_CAPS.c.expires_at <= now) & (FREQUENCY_CAPS.c.held == 0)),
        _sweep(VIEWER_ITEMS, VIEWER_ITEMS.c.expires_at <= now),
    )
    campaign = bindparam("campaign", type_=Text())
    forgets: tuple[Executable, ...] = (
        # The budget first: its row is the lock of what follows. A refusal leaves a row of zeros.
        delete(BUDGET_TRACKING)
        .where(BUDGET_TRACKING.c.campaign_id == campaign)
        .returning((BUDGET_TRACKING.c.spent != 0) | (BUDGET_TRACKING.c.reserved != 0)),
        *(delete(each).where(each.c.account == account) for each in _OF_ACCOUNTS),
    )
    lapsing = select(OPERATIONS.c.account).where(_has_lapsed(now)).distinct().limit(limit)
    return {"lapsing": lapsing, "sweeps": sweeps, "forgets": forgets}


_OF_ACCOUNTS = (FREQUENCY_CAPS, OPERATIONS, VIEWER_ITEMS)


def _sweep(table: Table, expired: ColumnElement[bool]) -> Delete:
    """
    Say DELETE of what has *expired*, ``limit`` rows at most.

    The condition stands there twice: a row that got a new life while its lock was waited for stays.
    """
    key = tuple_(*table.primary_key.columns)
    some = (
        select(*table.primary_key.columns)
        .where(expired)
        .limit(bindparam("limit", type_=Integer()))
        .with_for_update(skip_locked=True)
    )
    return delete(table).where(key.in_(some), expired)
