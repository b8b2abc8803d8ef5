"""
Backends that are wrong on purpose, each in one way: what the conformance tests must notice.

Every one is the backend of ``memory://`` but for the fault that its name and first line say.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal

from vastproxy.state.base import (
    MAX_AMOUNT,
    MAX_ITEMS,
    Account,
    Booking,
    Claim,
    Hold,
    Level,
    Verdict,
    Window,
)
from vastproxy.state.memory import InMemoryBackend

LONG = 10**9
"""Milliseconds; longer than any test."""

WAITS = 2
"""Turns of the event loop that a slow backend waits: enough for others to come in between."""


class ReadsThenWrites(InMemoryBackend):
    """Looks whether there is room, waits, and then takes it."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Judge, and take without looking again."""
        verdicts = await super().reserve(holds)
        granted = [hold for hold, each in zip(holds, verdicts, strict=True) if each.granted]
        await self._give_back(granted)
        for _ in range(WAITS):
            await asyncio.sleep(0)
        await super().reserve([_without_limits(each) for each in granted])
        return verdicts

    async def _give_back(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            if self._settled_as(hold, self._now()) is None:
                self._book(hold.account).release(hold.operation)


def _without_limits(hold: Hold) -> Hold:
    return replace(hold, claims=tuple(replace(each, limit=None) for each in hold.claims))


class ForgetsOperations(InMemoryBackend):
    """Counts every confirmation, also a repeated one."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm each as if it were a new one."""
        bookings = await super().confirm(holds)
        for each in holds:
            self._confirmed.drop(each)
        return bookings


class ReservesAgain(InMemoryBackend):
    """Takes room at every repetition of a reservation."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve under an id that nobody had."""
        for hold in holds:
            held = self._book(hold.account).held
            if hold.operation in held:
                held[f"{hold.operation} {len(held)}"] = held.pop(hold.operation)
        return await super().reserve(holds)


class Prolongs(InMemoryBackend):
    """Lets a reservation begin anew when it is repeated."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, and set the time of all to the full."""
        verdicts = await super().reserve(holds)
        for hold in holds:
            if (held := self._book(hold.account).held.get(hold.operation)) is not None:
                held.ends = self._now() + hold.ttl_ms
        return verdicts


class CountsVoids(InMemoryBackend):
    """Counts what is voided."""

    async def void(self, holds: Sequence[Hold]) -> None:
        """Confirm instead."""
        await self.confirm(holds)


class FreesTwice(InMemoryBackend):
    """Frees something at every void, whether or not it still has a reservation."""

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void; for want of the operation, take another one."""
        for hold in holds:
            held = self._book(hold.account).held
            other = next(iter(held), "none")
            gone = hold.operation not in held
            await super().void([replace(hold, operation=other) if gone else hold])


class UncountsAtVoid(InMemoryBackend):
    """Takes a confirmation back when the operation is voided afterwards."""

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void; what was confirmed is counted off."""
        for hold in holds:
            if self._settled_as(hold, self._now()) == "c":
                for claim in hold.claims:
                    self._book(hold.account).counter(claim.key).count -= claim.amount
        await super().void(holds)


class ForgetsVoids(InMemoryBackend):
    """Grants a reservation that arrives after its void."""

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void, and remember nothing."""
        await super().void(holds)
        for hold in holds:
            self._voided.drop(hold)


class NeverFreesLapsed(InMemoryBackend):
    """Keeps room for a reservation whose time is over."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve for a very long time."""
        return await super().reserve([replace(each, ttl_ms=LONG) for each in holds])


class LapsesLate(InMemoryBackend):
    """Lets a reservation lapse a millisecond late."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve for a millisecond more."""
        return await super().reserve([replace(each, ttl_ms=each.ttl_ms + 1) for each in holds])


class FreesConfirmed(InMemoryBackend):
    """Lets what was confirmed lapse with the time of its reservation."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count in a window as long as a reservation lasts."""
        return await super().confirm([_in_a_window(each, each.ttl_ms) for each in holds])

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Look at the windows of the shortest reservations that tests make."""
        hold = _in_a_window(Hold(account, "none", tuple(claims)), 1_000)
        return await super().levels(account, hold.claims)


def _in_a_window(hold: Hold, ms: int) -> Hold:
    if hold.account.kind == "campaign":
        return hold  # Money has no window.
    window = Window("fixed", ms)
    return replace(hold, claims=tuple(replace(each, window=window) for each in hold.claims))


class DropsLateConfirmations(InMemoryBackend):
    """Does not count what has no reservation any more."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm nothing of what is late."""
        bookings: list[Booking] = []
        for hold in holds:
            book = self._book(hold.account)
            book.reap(self._now())
            known = hold.operation in book.held or hold.lease in book.held
            settled = self._settled_as(hold, self._now()) == "c"
            bookings += await super().confirm([hold]) if known or settled else ["late"]
        return bookings


class CountsWhatWasReserved(InMemoryBackend):
    """Counts the amounts of the reservation instead of the final ones."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Put the reserved amounts in place of those that are told."""
        return await super().confirm([self._as_reserved(each) for each in holds])

    def _as_reserved(self, hold: Hold) -> Hold:
        held = self._book(hold.account).held.get(hold.operation)
        amounts = held.amounts if held else {}
        claims = [replace(each, amount=amounts.get(each.key, each.amount)) for each in hold.claims]
        return replace(hold, claims=tuple(claims))


class ReservesPartially(InMemoryBackend):
    """Keeps what it had reserved of a hold before a claim refused it."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve; of a refused hold the claims before the one to blame."""
        verdicts = []
        for hold in holds:
            (verdict,) = await super().reserve([hold])
            if verdict.refused:
                await super().reserve([replace(hold, claims=hold.claims[: verdict.refused])])
            verdicts.append(verdict)
        return verdicts


class BlamesTheFirst(InMemoryBackend):
    """Names the first claim whichever refused."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, and blame the first."""
        found = await super().reserve(holds)
        return [each if each.granted else replace(each, refused=0) for each in found]


class EnforcesEverything(InMemoryBackend):
    """Refuses for want of room under a claim that is not enforced."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Enforce all claims."""
        return await super().reserve(
            [
                replace(hold, claims=tuple(replace(each, enforced=True) for each in hold.claims))
                for hold in holds
            ]
        )


class HasOffByOneLimits(InMemoryBackend):
    """Grants one more than the limit."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Raise all limits by one."""
        return await super().reserve([_with_more_room(each) for each in holds])


def _with_more_room(hold: Hold) -> Hold:
    claims = [
        each if each.limit is None else replace(each, limit=each.limit + 1) for each in hold.claims
    ]
    return replace(hold, claims=tuple(claims))


class TakesZeroForNone(InMemoryBackend):
    """Takes a limit of zero for no limit at all."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Drop limits that are zero."""
        return await super().reserve(
            [
                replace(
                    hold,
                    claims=tuple(replace(each, limit=each.limit or None) for each in hold.claims),
                )
                for hold in holds
            ]
        )


class JudgesAllAtOnce(InMemoryBackend):
    """Judges all holds of a call by what there was before the call."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Judge each, give it back, and take all in the end."""
        verdicts = []
        for hold in holds:
            known = hold.operation in self._book(hold.account).held
            verdicts += await super().reserve([hold])
            if not known:
                self._book(hold.account).release(hold.operation)
        taken = [hold for hold, each in zip(holds, verdicts, strict=True) if each.granted]
        await super().reserve([_without_limits(each) for each in taken])
        return verdicts


class AnswersInAnotherOrder(InMemoryBackend):
    """Answers by account instead of in the order of the holds."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve account by account."""
        return await super().reserve(sorted(holds, key=lambda each: each.account))


class IgnoresLeases(InMemoryBackend):
    """Counts beside the lease what should be taken out of it."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm without a lease."""
        return await super().confirm([replace(each, lease="") for each in holds])


class DrawsTwice(InMemoryBackend):
    """Takes out of the lease also what has a reservation of its own."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Draw first."""
        for hold in holds:
            if self._settled_as(hold, self._now()) != "c":
                self._drawn(self._book(hold.account), hold)
        return await super().confirm([replace(each, lease="") for each in holds])


class HasOtherWindows(InMemoryBackend):
    """Counts in other windows than it is told: :meth:`_window` says in which."""

    def _window(self, window: Window) -> Window:
        return window

    def _moved(self, claims: Sequence[Claim]) -> tuple[Claim, ...]:
        return tuple(replace(each, window=self._window(each.window)) for each in claims)

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve in those."""
        moved = [replace(each, claims=self._moved(each.claims)) for each in holds]
        return await super().reserve(moved)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count in those."""
        moved = [replace(each, claims=self._moved(each.claims)) for each in holds]
        return await super().confirm(moved)

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Look at those."""
        return await super().levels(account, self._moved(claims))


class RollsByFixedBuckets(HasOtherWindows):
    """Takes whole hours of the clock for a rolling hour."""

    def _window(self, window: Window) -> Window:
        if window.kind != "rolling":
            return window
        begins = self._now() - self._now() % window.ms
        return Window("calendar", bounds=(begins - window.ms, begins, begins + window.ms))


class RollsExactly(HasOtherWindows):
    """Ends a piece of a rolling window before the last of it ends."""

    def _window(self, window: Window) -> Window:
        return replace(window, ms=window.ms - 1) if window.kind == "rolling" else window


class SlidesFixedWindows(HasOtherWindows):
    """Lets a fixed window begin anew with every confirmation."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, and begin anew."""
        bookings = await super().confirm(holds)
        for hold in holds:
            for claim in hold.claims:
                if claim.window.kind == "fixed":
                    self._book(hold.account).counter(claim.key).began = self._now()
        return bookings


class TakesCalendarsForDays(HasOtherWindows):
    """Takes every period of a calendar for a day."""

    def _window(self, window: Window) -> Window:
        if window.kind != "calendar":
            return window
        day = 86_400_000
        begins = self._now() - self._now() % day
        return replace(window, bounds=(begins - day, begins, begins + day))


class EndsPeriodsLate(HasOtherWindows):
    """Begins a calendar's period a millisecond late."""

    def _window(self, window: Window) -> Window:
        return replace(window, bounds=tuple(each + 1 for each in window.bounds))


class SettlesForEver(InMemoryBackend):
    """Never forgets an operation."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, and keep it for very long."""
        return await super().confirm([replace(each, keep_ms=LONG) for each in holds])

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void, and keep it for very long."""
        await super().void([replace(each, ttl_ms=LONG) for each in holds])


class MixesAccounts(InMemoryBackend):
    """Takes an operation of one account for that of another."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Look for the operation everywhere."""
        known = {operation for each in self._confirmed._ends.values() for operation in each}
        new = [each for each in holds if each.operation not in known]
        bookings = iter(await super().confirm(new))
        return ["again" if each.operation in known else next(bookings) for each in holds]


class CutsNames(InMemoryBackend):
    """Keeps names of accounts without blanks around them, and not in all their length."""

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm under the shorter name."""
        return await super().confirm(
            [replace(each, account=_with_a_short_name(each.account)) for each in holds]
        )

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Look under the shorter name."""
        return await super().levels(_with_a_short_name(account), claims)


def _with_a_short_name(account: Account) -> Account:
    return replace(account, name=account.name.strip()[:190])


class HasFloatMoney(InMemoryBackend):
    """Adds money as floats."""

    async def add_spend(self, key: str, amount: Decimal | float | str) -> Decimal:
        """Add as floats do, and give what comes out."""
        before = float(await self.get_spend(key))
        await super().add_spend(key, amount)
        return Decimal(str(before + float(amount)))


class HasFloatCounts(InMemoryBackend):
    """Counts in single precision, as a column of the wrong type does."""

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Give seven digits of each count."""
        found = await super().levels(account, claims)
        return [replace(each, counted=int(float(f"{each.counted:.7g}"))) for each in found]


class TakesAnyHold(InMemoryBackend):
    """Takes amounts that are negative, or too large to be counted."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Put amounts right that are not."""
        return await super().reserve([_put_right(each) for each in holds])


def _put_right(hold: Hold) -> Hold:
    claims = [replace(each, amount=min(abs(each.amount), MAX_AMOUNT)) for each in hold.claims]
    return replace(hold, claims=tuple(claims))


class LosesIncrements(InMemoryBackend):
    """Reads a plain counter, waits, and writes it."""

    async def increment(self, key: str, amount: int = 1) -> int:
        """Add to what there was a moment ago."""
        count = await self.get_count(key)
        await asyncio.sleep(0)
        now = await self.get_count(key)
        return await super().increment(key, count + amount - now)


class ReplacesItems(InMemoryBackend):
    """Replaces all items by those that are written."""

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Remove what is not among *changes*."""
        gone = dict.fromkeys(await self.read_items(account))
        await super().write_items(account, {**gone, **changes}, seconds)


class MergesItemsSlowly(InMemoryBackend):
    """Reads all items, waits, and writes all of them back with the changes."""

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Write back what there was a moment ago."""
        before = await self.read_items(account)
        await asyncio.sleep(0)
        gone = dict.fromkeys(await self.read_items(account))
        await super().write_items(account, {**gone, **before, **changes}, seconds)


class KeepsOldItemsFirst(InMemoryBackend):
    """Drops the newest of too many items."""

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Leave out what is new once there are enough."""
        before = await self.read_items(account)
        room = MAX_ITEMS - len(before)
        new = [name for name in changes if name not in before]
        late = set(new[max(0, room) :])
        taken = {name: value for name, value in changes.items() if name not in late}
        await super().write_items(account, taken, seconds)


class KeepsItemsForEver(InMemoryBackend):
    """Keeps items beyond their time."""

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Write for very long."""
        del seconds
        await super().write_items(account, changes, LONG)


class ForgetsCountersOnly(InMemoryBackend):
    """Leaves the operations of an account that is forgotten."""

    async def forget(self, account: Account) -> bool:
        """Forget, but for what was settled."""
        confirmed = dict(self._confirmed._ends)
        there = await super().forget(account)
        self._confirmed._ends = confirmed
        return there
