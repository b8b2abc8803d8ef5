"""
What one transaction of the SQL backend has locked and read, and what it changes.

Rule 1: nothing here does I/O, and nothing knows a statement: rows come in, and rows go out.
Rule 2: decisions are those of :mod:`vastproxy.state.ledger`; here is which rows they are about.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Row

from vastproxy.state.base import MONEY_KEY, Account, Booking, Claim, Hold, Level, Verdict
from vastproxy.state.ledger import Counter, drawn, judged, kept, level, repeated
from vastproxy.state.tables import COUNTED, HELD, VOID, Rows


@dataclass(slots=True)
class _Operation:
    status: str
    amounts: dict[str, int] = field(default_factory=dict)
    held_until: int = 0
    kept_until: int = 0
    booked: int = 0
    booked_at: int = 0


class Page:
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
        self._touched: dict[tuple[Account, str], None] = {}
        """Of operations that changed."""

    # --- Reading --------------------------------------------------------------------------------

    def put_budget(self, row: Row[Any]) -> None:
        """Take a row of ``budget_tracking``."""
        account = Account("campaign", row.campaign_id)
        self._counters[account, MONEY_KEY] = Counter(count=row.spent, held=row.reserved)
        self._late[account] = row.late

    def put_counter(self, row: Row[Any]) -> None:
        """Take a row of ``frequency_caps``."""
        key = (account_of(row.account), row.key)
        self._counters[key] = Counter(row.counted, row.began, pieces_of(row.pieces), row.held)
        self._ends[key] = row.expires_at

    def put_operation(self, row: Row[Any]) -> None:
        """Take a row of ``operations``."""
        key = (account_of(row.account), row.operation)
        self._operations[key] = _Operation(
            row.status, json.loads(row.amounts), row.held_until, row.kept_until
        )

    def counters_of(self, holds: Sequence[Hold], lapsed: Rows) -> list[dict[str, str]]:
        """Tell which rows of ``frequency_caps`` are needed."""
        keys = {(each.account, claim.key) for each in holds for claim in each.claims}
        keys |= {
            (owner, key) for (owner, _), each in self._operations.items() for key in each.amounts
        }
        keys |= {(account_of(row.account), row.key) for row in lapsed if row.key is not None}
        viewers = sorted(each for each in keys if each[0].kind == "viewer")
        return [{"account": str(account), "key": key} for account, key in viewers]

    def reap(self, lapsed: Rows) -> None:
        """Take off what *lapsed* reservations held."""
        for row in lapsed:
            if row.key is not None:
                self._take_off(account_of(row.account), {row.key: row.amount})

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
        self._touched[hold.account, hold.lease] = None
        return covered

    def void(self, hold: Hold) -> None:
        """Release *hold*."""
        before = self._known(hold.account, hold.operation)
        if before is None or before.status == HELD:
            self._release(hold)
            self._put(hold, _Operation(VOID, kept_until=self.now + hold.ttl_ms))

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
        self._touched[hold.account, hold.operation] = None

    # --- Writing --------------------------------------------------------------------------------

    def changed_operations(self) -> list[dict[str, object]]:
        """Give the rows of ``operations`` to write."""
        return [
            {
                **asdict(found := self._operations[account, operation]),
                "account": str(account),
                "operation": operation,
                "amounts": compact(found.amounts),
            }
            for account, operation in self._touched
        ]

    def changed_counters(self) -> list[dict[str, object]]:
        """Give the rows of ``frequency_caps`` to write."""
        return [
            {
                **asdict(counter := self._counters[account, key]),
                "account": str(account),
                "key": key,
                "expires_at": self._ends[account, key],
                "pieces": compact(counter.pieces),
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


def levels_of(rows: Rows, claims: Sequence[Claim]) -> list[Level]:
    """Tell what stands on the counters of *claims*; *rows* of one counter add up."""
    counters: dict[str, Counter] = {}
    for row in rows:
        counter = counters.setdefault(row.key, Counter())
        counter.count += row.counted
        counter.began += row.began
        counter.held += row.held
        counter.pieces |= pieces_of(row.pieces)
    now = rows[0].now if rows else 0
    return [level(counters.get(each.key), each, now) for each in claims]


def operations_of(holds: Sequence[Hold]) -> list[dict[str, str]]:
    """Tell which rows of ``operations`` *holds* need: their own, and their leases'."""
    names = {(str(each.account), each.operation) for each in holds}
    names |= {(str(each.account), each.lease) for each in holds if each.lease}
    return [{"account": account, "operation": operation} for account, operation in sorted(names)]


def account_of(words: str) -> Account:
    """Read an account as ``str`` writes it."""
    kind, _, name = words.partition(" ")
    return Account("viewer" if kind == "viewer" else "campaign", name)


def pieces_of(words: str) -> dict[int, int]:
    """Read the pieces of a rolling window."""
    return {int(piece): count for piece, count in json.loads(words).items()}


def compact(value: object) -> str:
    """Write *value* as JSON, as all parameters that are lists, and some columns, have it."""
    return json.dumps(value, separators=(",", ":"))
