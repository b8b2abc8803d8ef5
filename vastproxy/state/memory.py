"""
State in the memory of this process: exact while it runs, gone when it ends.

Rule 1: between looking and changing there is no ``await``: so nothing comes between.
Rule 2: it is bounded. What has expired goes first, then what was least recently used; a campaign's
money never goes.
Rule 3: its clock does not jump: it starts at the machine's time and runs with the monotonic one.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Literal, Self

import structlog

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
from vastproxy.state.ledger import FOR_EVER, Counter, drawn, judged, kept, level, repeated

MAX_ACCOUNTS = 100_000
"""Viewers, and plain counters as many. With four caps a viewer takes about 2 KB."""
MANY_COUNTERS = 32
"""Counters of one account from which those that have ended are looked for."""
FEW = 16
"""Stale entries of a queue that are not worth clearing away."""
LOOKED_AT = 100
"""Plain counters, the longest unused, among which one that has expired is looked for."""
MAX_SETTLED = 250_000
"""Confirmed operations that are remembered, and voided ones as many: 130 MB of each kind where all
are of different viewers, and half of that where each viewer has some."""


@dataclass(slots=True)
class _Held:
    amounts: dict[str, int]
    ends: int


@dataclass(slots=True)
class _Book:
    """All that is kept of one account."""

    counters: dict[str, Counter] = field(default_factory=dict)
    held: dict[str, _Held] = field(default_factory=dict)
    """Reservations, by operation."""
    due: list[tuple[int, str]] = field(default_factory=list)
    """When reservations end, the next one first; also some that have been settled since."""
    ends: int = 0
    """Unix milliseconds from which nothing in here means anything."""
    items: dict[str, str] = field(default_factory=dict)
    items_end: int = 0
    prune_from: int = MANY_COUNTERS

    def reap(self, now: int) -> None:
        """Take off the reservations whose time is over."""
        while self.due and self.due[0][0] <= now:
            _, operation = heappop(self.due)
            held = self.held.get(operation)
            if held is not None and held.ends <= now:
                self.release(operation)

    def hold(self, operation: str, amounts: dict[str, int], ends: int) -> None:
        """Reserve *amounts* until *ends*."""
        self.held[operation] = _Held(amounts, ends)
        for key, amount in amounts.items():
            self.counter(key).held += amount
        if len(self.due) > 2 * len(self.held) + FEW:
            self.due = [(each.ends, key) for key, each in self.held.items()]
            heapify(self.due)
        else:
            heappush(self.due, (ends, operation))

    def release(self, operation: str) -> bool:
        """Take off one reservation; whether there was one."""
        held = self.held.pop(operation, None)
        if held is not None:
            self.take_off(held.amounts)
        return held is not None

    def take_off(self, amounts: Mapping[str, int]) -> None:
        """Let *amounts* be reserved no more."""
        for key, amount in amounts.items():
            if amount:
                self.counters[key].held -= amount

    def prune(self, now: int) -> None:
        """Drop the counters that count nothing any more, when there are many."""
        if len(self.counters) > self.prune_from:
            self.counters = {
                key: each for key, each in self.counters.items() if each.held or each.until > now
            }
            self.prune_from = max(MANY_COUNTERS, 2 * len(self.counters))

    def counter(self, key: str) -> Counter:
        """Give the counter *key*, a new one if need be."""
        return self.counters.setdefault(key, Counter())

    def lives_until(self, ends: int) -> None:
        """Keep this account until *ends* at least."""
        self.ends = max(self.ends, ends)


class _Settled:
    """Operations that were settled in one way; at most *most*, of which the oldest go first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._ends: dict[Account, dict[str, int]] = {}
        """Until when each is remembered."""
        self._order: deque[tuple[int, Account, str]] = deque()
        """The same, the oldest first; also some that have been dropped since."""

    def knows(self, hold: Hold, now: int) -> bool:
        """Tell whether the operation of *hold* is remembered."""
        return now < self._ends.get(hold.account, {}).get(hold.operation, 0)

    def add(self, hold: Hold, ends: int, now: int) -> bool:
        """Remember that of *hold* until *ends*; whether another had to go before its time."""
        self._ends.setdefault(hold.account, {})[hold.operation] = ends
        self._order.append((ends, hold.account, hold.operation))
        # The oldest first: as a rule they are also the first to end.
        while self._order and self._order[0][0] <= now:
            self._drop_oldest()
        return len(self._order) > self._most and self._drop_oldest()

    def _drop_oldest(self) -> bool:
        ends, account, operation = self._order.popleft()
        if self._ends.get(account, {}).get(operation) != ends:
            return False
        self._drop(account, operation)
        return True

    def drop(self, hold: Hold) -> None:
        """Remember that of *hold* no more."""
        if hold.operation in self._ends.get(hold.account, {}):
            self._drop(hold.account, hold.operation)

    def _drop(self, account: Account, operation: str) -> None:
        del self._ends[account][operation]
        if not self._ends[account]:
            del self._ends[account]

    def forget(self, account: Account) -> bool:
        """Remember none of *account*; whether there was one."""
        return self._ends.pop(account, None) is not None

    def __len__(self) -> int:
        return len(self._order)


class InMemoryBackend:
    """
    The backend of ``memory://``.

    *clock* gives Unix milliseconds; None: the machine's time at the start, and the monotonic
    clock from then on.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int] | None = None,
        max_accounts: int = MAX_ACCOUNTS,
        max_settled: int = MAX_SETTLED,
    ) -> None:
        self._now = clock or steady_clock()
        self._max_accounts = max_accounts
        self._books: OrderedDict[Account, _Book] = OrderedDict()
        self._by_end: list[tuple[int, Account]] = []
        self._confirmed = _Settled(max_settled)
        # By themselves: every request without an ad makes one, and none may push out what counted.
        self._voided = _Settled(max_settled)
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._log = structlog.get_logger("vastproxy.state")
        self.forgotten = 0
        """Accounts and operations that were dropped although they still meant something."""

    # --- Plain counters -------------------------------------------------------------------------

    async def get_count(self, key: str) -> int:
        """Give the count of *key*."""
        return self._count(key)[0]

    def _count(self, key: str) -> tuple[int, int]:
        count, ends = self._counts.get(key, (0, FOR_EVER))
        return (count, ends) if self._now() < ends else (0, FOR_EVER)

    async def increment(self, key: str, amount: int = 1) -> int:
        """Add *amount* to *key*, and give the new count."""
        count, ends = self._count(key)
        self._counts[key] = (count + amount, ends)
        self._counts.move_to_end(key)
        if len(self._counts) > self._max_accounts:
            self._forget_count()
        return count + amount

    def _forget_count(self) -> None:
        now = self._now()
        oldest = islice(self._counts.items(), LOOKED_AT)
        key = next((key for key, (_, ends) in oldest if ends <= now), None)
        if key is None:
            key = next(iter(self._counts))
            self._tell_forgotten("counter")
        del self._counts[key]

    async def set_expiry(self, key: str, seconds: float) -> None:
        """Let the count of *key* vanish in *seconds*."""
        count, ends = self._counts.get(key, (0, 0))
        if ends > self._now():
            self._counts[key] = (count, self._now() + int(seconds * 1000))

    async def get_spend(self, key: str) -> Decimal:
        """Give what was spent on *key*."""
        book = self._books.get(campaign_of(key))
        counter = book.counters.get(MONEY_KEY) if book else None
        return units(counter.count if counter else 0)

    async def add_spend(self, key: str, amount: Decimal | float | str) -> Decimal:
        """Add *amount* to *key*, and give the new total."""
        campaign, more = campaign_of(key), micros(amount)
        book = self._book(campaign)
        counter = book.counter(MONEY_KEY)
        counter.count += more
        self._keep(campaign, book, FOR_EVER)
        return units(counter.count)

    # --- Operations -----------------------------------------------------------------------------

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*, wholly or not at all."""
        check_holds(holds)
        return [self._reserve(each) for each in holds]

    def _reserve(self, hold: Hold) -> Verdict:
        now = self._now()
        if settled := self._settled_as(hold, now):
            return Verdict(granted=settled == "c")
        book = self._book(hold.account)
        book.reap(now)
        if (before := book.held.get(hold.operation)) is not None:
            return repeated(hold, before.amounts)
        verdict = judged(hold, book.counters, now)
        if verdict.granted:
            book.hold(hold.operation, kept(hold, verdict), now + hold.ttl_ms)
            self._keep(hold.account, book, now + hold.ttl_ms)
        else:
            self._drop_ended(now)
        return verdict

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count the claims of each of *holds*."""
        check_holds(holds)
        return [self._confirm(each) for each in holds]

    def _confirm(self, hold: Hold) -> Booking:
        now = self._now()
        if self._settled_as(hold, now) == "c":
            return "again"
        book = self._book(hold.account)
        book.reap(now)
        covered = book.release(hold.operation) or self._drawn(book, hold)
        for claim in hold.claims:
            counter = book.counter(claim.key)
            counter.add(claim.window, claim.amount, now)
            counter.until = counter.ends(claim.window, now)
            book.lives_until(counter.until)
        book.prune(now)
        self._keep(hold.account, book, book.ends)
        self._voided.drop(hold)
        self._remember(self._confirmed, hold, now + hold.keep_ms)
        return "booked" if covered else "late"

    def _drawn(self, book: _Book, hold: Hold) -> bool:
        """Take *hold* out of its lease; whether that had room for it."""
        lease = book.held.get(hold.lease)
        if lease is None:
            return False
        taken, covered = drawn(lease.amounts, hold)
        book.take_off(taken)
        lease.amounts = {key: left - taken.get(key, 0) for key, left in lease.amounts.items()}
        return covered

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*."""
        check_holds(holds)
        for hold in holds:
            now = self._now()
            if self._settled_as(hold, now) is None:
                if (book := self._books.get(hold.account)) is not None:
                    book.release(hold.operation)
                self._remember(self._voided, hold, now + hold.ttl_ms)

    def _settled_as(self, hold: Hold, now: int) -> Literal["c", "v"] | None:
        if self._confirmed.knows(hold, now):
            return "c"
        return "v" if self._voided.knows(hold, now) else None

    def _remember(self, settled: _Settled, hold: Hold, ends: int) -> None:
        if settled.add(hold, ends, self._now()):
            self._tell_forgotten("operation")

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*."""
        now = self._now()
        book = self._books.get(account) or _Book()
        book.reap(now)
        return [level(book.counters.get(each.key), each, now) for each in claims]

    async def keys(self, account: Account) -> list[str]:
        """Give the keys of the counters of *account*."""
        book = self._books.get(account)
        return list(book.counters) if book else []

    async def forget(self, account: Account) -> bool:
        """Remove all that is kept of *account*."""
        found = [self._books.pop(account, None) is not None]
        found += [each.forget(account) for each in (self._confirmed, self._voided)]
        return any(found)

    # --- Small items ----------------------------------------------------------------------------

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""
        book = self._books.get(account)
        return dict(book.items) if book and self._now() < book.items_end else {}

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items, each by itself."""
        now = self._now()
        book = self._book(account)
        book.items = with_changes(book.items if now < book.items_end else {}, changes)
        book.items_end = now + int(seconds * 1000)
        self._keep(account, book, book.items_end)

    # --- Life -----------------------------------------------------------------------------------

    def _book(self, account: Account) -> _Book:
        """Give the book of *account*, a new one if need be, as the most recently used."""
        book = self._books.get(account)
        if book is None:
            book = self._books[account] = _Book()
            # Looked at once, and then again whenever it should have ended.
            if len(self._by_end) > 2 * len(self._books) + FEW:
                self._by_end = [(each.ends, key) for key, each in self._books.items()]
                heapify(self._by_end)
            else:
                heappush(self._by_end, (0, account))
        self._books.move_to_end(account)
        return book

    def _keep(self, account: Account, book: _Book, ends: int) -> None:
        """Keep *book* until *ends* at least; make room for it."""
        book.lives_until(ends)
        self._drop_ended(self._now())
        if len(self._books) > self._max_accounts:
            self._drop_oldest(account)

    def _drop_ended(self, now: int) -> int:
        dropped = 0
        while self._by_end and self._by_end[0][0] <= now:
            _, account = heappop(self._by_end)
            book = self._books.get(account)
            if book is None:
                continue
            if book.ends > now:
                heappush(self._by_end, (book.ends, account))
            else:
                del self._books[account]
                dropped += 1
        return dropped

    def _drop_oldest(self, spared: Account) -> None:
        viewers = (each for each in self._books if each.kind == "viewer" and each != spared)
        if (oldest := next(viewers, None)) is not None:
            del self._books[oldest]
            self._tell_forgotten("account")

    def _tell_forgotten(self, what: str) -> None:
        self.forgotten += 1
        # The first of a thousand: a full store drops something at every request.
        if self.forgotten % 1000 == 1:
            self._log.warning("state.full", dropped=what, in_all=self.forgotten)

    async def flush(self) -> None:
        """Return at once: nothing is ever pending."""

    async def sweep(self) -> int:
        """Drop accounts whose time is over."""
        return self._drop_ended(self._now())

    async def ping(self) -> None:
        """Return at once."""

    async def close(self) -> None:
        """Keep everything: it is gone with the object."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<InMemoryBackend accounts: {len(self._books)}, forgotten: {self.forgotten}>"
