"""
Money reserved beforehand, so that a budget can be spent while the state backend is away.

A lease is a reservation of a chunk of a campaign's budget. Ads take from it without asking
anybody; their impressions are drawn from it when they are counted. So what is spent during an
outage was reserved before, and the budget is never passed.

Rule 1: a lease is used for LIFE, on the monotonic clock, from before it was asked for. On the
backend it lasts as long, and then as long again as the last ad may wait for its impression. An ad
that may wait for longer than that takes nothing.
Rule 2: what one process holds is no more than a SHARE-th of what is left, and one ad where that is
in leases that end soon. An ad that costs more than a lease has is no business of the leases: its
money is reserved by itself.
Rule 3: a lease that was asked for and not answered is asked for again under its id, before any
other: one chunk is in doubt at the most.
Rule 4: a lease that nobody took from is given back when it is not wanted any more. Another one
ends by itself. A process that dies strands no more than its leases, and no longer than that.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Self
from uuid import uuid4

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.flow.budgets import Budget
from vastproxy.observe.tasks import Tasks
from vastproxy.state.base import MICROS, Account, Hold, money
from vastproxy.state.guard import GuardedState

LIFE = 600.0
"""Seconds that ads may be served from one lease. In the second half the next one is there, too."""
LOOK = 0.25
"""Seconds between looks whether a lease is running out."""
AHEAD = 30.0
"""Seconds of spending that a chunk is for, and after which the state is looked at in any case."""
SHARE = 50
"""A process holds a fiftieth of what is left, at the most: near its end no budget is scattered."""


@dataclass(slots=True, eq=False)
class _Lease:
    hold: Hold
    amount: int
    left: int
    began: float
    """On the monotonic clock."""
    there: bool = False
    """Whether the backend has said so; until then it may or may not be."""

    @property
    def untouched(self) -> bool:
        return self.left == self.amount

    def until(self, ttl_ms: int) -> float:
        """Say until when ads may be served that may wait *ttl_ms* for their impressions."""
        return self.began + min(LIFE, (self.hold.ttl_ms - ttl_ms) / 1000)

    def serves(self, budget: Budget, price: int, now: float) -> bool:
        """Tell whether an ad of *budget* can be taken from it."""
        return self.there and self.left >= price and now < self.until(budget.ttl_ms)


@dataclass(slots=True, eq=False)
class _Campaign:
    account: Account
    began: float
    limit: int = 0
    ttl_ms: int = 0
    """The longest that ads of any of its routes may wait."""
    usual: int = 1
    """The price that its routes say, in micro-units."""
    price: int = 1
    """Of the last ad that a lease could have been for: each is for one at the least."""
    leases: list[_Lease] = field(default_factory=list)
    most: int = 0
    """What may be held, when the state was looked at last."""
    chunk: int = 0
    """What is wanted; 0 where there was too little left, and at first."""
    looked: float = float("-inf")
    spent: int = 0
    """Since the pace was measured last."""
    pace: float = 0.0
    """Micro-units in AHEAD seconds, on the average of about as long."""
    measured: float = 0.0

    def use(self, budgets: list[Budget]) -> None:
        """Go on under the terms of *budgets*, those of all routes."""
        self.limit = min(each.limit for each in budgets)
        self.ttl_ms = max(each.ttl_ms for each in budgets)
        self.usual = self.price = max(each.price or 1 for each in budgets)
        self.looked = float("-inf")

    def measure(self, now: float) -> None:
        """Measure how fast money goes."""
        elapsed = now - max(self.measured, self.began)
        if elapsed > 0:
            weight = min(1.0, elapsed / min(AHEAD, now - self.began))
            self.pace += (self.spent * AHEAD / elapsed - self.pace) * weight
            self.spent, self.measured = 0, now

    def held(self, leases: Iterable[_Lease], now: float) -> int:
        """Add up what is in *leases*."""
        return sum(each.left for each in leases if each.there and each.until(self.ttl_ms) > now)

    def lacking(self, leases: Iterable[_Lease], now: float) -> int:
        """Say what *leases* lack, where less than half of what is wanted is in them for long."""
        fresh = sum(
            each.left
            for each in leases
            if each.there and each.left >= self.price and each.until(self.ttl_ms) > now + LIFE / 2
        )
        return max(self.chunk - fresh, self.price) if 2 * fresh < self.chunk else 0

    def is_due(self, now: float) -> bool:
        """Tell whether the state should be looked at."""
        if now - self.looked >= AHEAD or self.lacking(self.leases, now):
            return True
        return any(not each.there for each in self.leases)

    def plan(self, free: int, now: float) -> tuple[int, list[_Lease]]:
        """
        Say how much to reserve where *free* is neither spent nor reserved; 0: nothing.

        Also gives the leases that are not wanted any more, if nobody takes from them meanwhile.
        """
        held = self.held(self.leases, now)
        self.most, self.looked = max(0, free + held) // SHARE, now
        self.price = self.price if self.price <= self.most else self.usual
        wanted = min(self.most, max(self.price, int(self.pace))) if self.chunk else self.most
        self.chunk = wanted if wanted >= self.price else 0
        old = [
            each
            for each in self.leases
            if each.untouched and (held > self.most or each.until(self.ttl_ms) <= now + LIFE / 2)
        ]
        kept = [each for each in self.leases if each not in old]
        lacking = self.lacking(kept, now)
        amount = min(lacking, self.most - self.held(kept, now))
        if lacking and lacking == self.chunk:
            # There is none for long: one ad, though what an older lease has left may be enough.
            amount = max(amount, self.price)
        return (amount if amount >= self.price else 0), old

    def drop(self, old: list[_Lease], now: float) -> list[Hold]:
        """Forget what has ended, and what of *old* nobody took from: give the holds of that."""
        unused = [each for each in old if each.untouched]
        self.leases = [each for each in self.leases if each not in unused and each.until(0) > now]
        return [each.hold for each in unused]

    def untouched(self) -> list[Hold]:
        """Give the holds of all that nobody took from, or that may be there."""
        return [each.hold for each in self.leases if each.untouched]


class Leases:
    """
    The leases of one process, for those of *budgets* that want them.

    *clock* gives monotonic seconds.
    """

    def __init__(
        self,
        state: GuardedState,
        budgets: Iterable[Budget] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._clock = clock
        self._campaigns: dict[str, _Campaign] = {}
        self._unused: list[Hold] = []
        """To be given back."""
        self._in_use = asyncio.Event()
        self._log = structlog.get_logger("vastproxy.state")
        self._tasks = Tasks("leases")
        self.use(budgets)

    def use(self, budgets: Iterable[Budget]) -> None:
        """
        Lease for *budgets* from now on; a campaign that was there before keeps its leases.

        Those of one that is gone, or may spend less than before, are used no more.
        """
        wanted: dict[str, list[Budget]] = {}
        for each in budgets:
            if each.on_state_loss == "lease" and each.enforced:
                wanted.setdefault(each.campaign, []).append(each)
        before, self._campaigns = self._campaigns, {}
        for name, alike in wanted.items():
            found = before.get(name)
            if found is None or found.limit > min(each.limit for each in alike):
                found = _Campaign(alike[0].account, self._clock())
            else:
                del before[name]
            found.use(alike)
            self._campaigns[name] = found
        self._unused += [hold for gone in before.values() for hold in gone.untouched()]
        self._in_use.set()

    def take(self, budget: Budget, price: int) -> str:
        """Take *price* micro-units; give the lease that they come from, empty for none."""
        found = self._campaigns.get(budget.campaign)
        if found is None:
            return ""
        if price <= found.most:
            found.price = price
        lease = self._serving(budget, price)
        if lease is None:
            return ""
        lease.left -= price
        found.spent += price
        return lease.hold.operation

    def has(self, budget: Budget, price: int) -> bool:
        """Tell whether *price* could be taken now."""
        return self._serving(budget, price) is not None

    def _serving(self, budget: Budget, price: int) -> _Lease | None:
        found, now = self._campaigns.get(budget.campaign), self._clock()
        leases = found.leases if found else ()
        return next((each for each in leases if each.serves(budget, price, now)), None)

    def give_back(self, campaign: str, operation: str, price: int) -> None:
        """Put back what an ad took that was not served."""
        found = self._campaigns.get(campaign)
        for lease in found.leases if found else ():
            if found and lease.hold.operation == operation:
                lease.left += price
                found.spent -= price

    async def renew(self) -> None:
        """Reserve a new chunk for each campaign whose chunks run out."""
        for each in self._campaigns.values():
            each.measure(self._clock())
        if not self._state.available:
            return
        for each in list(self._campaigns.values()):
            if self._state.available and each.is_due(self._clock()):
                try:
                    await self._renew(each)
                except StateBackendError as error:
                    self._log.debug("lease.failed", problem=str(error))
        await self._give_up()

    async def _give_up(self) -> None:
        """Give back what is not wanted, while the state is there."""
        if self._state.available:
            unused = self._unused.copy()
            await self._state.void(unused)
            del self._unused[: len(unused)]

    async def _renew(self, campaign: _Campaign) -> None:
        for lease in [each for each in campaign.leases if not each.there]:
            await self._ask(campaign, lease)
        [level] = await self._state.levels(campaign.account, [money(0, campaign.limit)])
        if self._campaigns.get(campaign.account.name) is not campaign:
            return  # A reload came between, and has given back what there was.
        now = self._clock()
        amount, old = campaign.plan(campaign.limit - level.counted - level.reserved, now)
        if amount:
            operation, ttl_ms = f"lease-{uuid4().hex}", int(LIFE * 1000) + campaign.ttl_ms
            hold = Hold(campaign.account, operation, (money(amount),), ttl_ms)
            lease = _Lease(hold, amount, amount, now)
            campaign.leases.append(lease)
            await self._ask(campaign, lease)
        self._unused += campaign.drop(old, now)

    async def _ask(self, campaign: _Campaign, lease: _Lease) -> None:
        """Reserve *lease* under the limit of today."""
        claims = (money(lease.amount, campaign.limit),)
        [verdict] = await self._state.reserve([replace(lease.hold, claims=claims)])
        lease.there = verdict.granted
        if not verdict.granted:
            campaign.leases.remove(lease)

    async def run(self) -> None:
        """Renew for ever."""
        while True:
            await self._in_use.wait()
            await self.renew()
            if not self._campaigns and not self._unused:
                self._in_use.clear()
            await asyncio.sleep(LOOK)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tasks.spawn(self.run(), "renew")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back leases that nobody took from; the others end by themselves."""
        await self._tasks.__aexit__(None, None, None)
        self.use(())
        await self._give_up()

    def __bool__(self) -> bool:
        return bool(self._campaigns)

    def __repr__(self) -> str:
        left = {
            name: found.held(found.leases, self._clock()) / MICROS
            for name, found in self._campaigns.items()
        }
        return f"<Leases {left}>"
