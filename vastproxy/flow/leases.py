"""
Money reserved beforehand, so that a budget can be spent while the state backend is away.

A lease is a reservation of a chunk of a campaign's budget. Ads take from it without asking
anybody; their impressions are drawn from it when they are counted. So what is spent during an
outage was reserved before, and the budget is never passed.

Rule 1: a lease is used for LIFE, on the monotonic clock, from before it was asked for. On the
backend it lasts as long, and then as long again as the last ad may wait for its impression.
Rule 2: what is left of a lease when it ends frees itself there. A process that dies strands no
more than its chunk, and no longer than that.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self
from uuid import uuid4

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.flow.budgets import Budget
from vastproxy.observe.tasks import Tasks
from vastproxy.state.base import MICROS, Hold, money
from vastproxy.state.guard import GuardedState

LIFE = 600.0
"""Seconds that ads may be served from one lease: how long an outage can be bridged."""
LOOK = 0.25
"""Seconds between looks whether a lease is running out."""
AHEAD = 5.0
"""Seconds of spending that a chunk is for."""
SHARE = 100
"""A chunk is a hundredth of what is left, at the most: near its end a budget is not scattered."""


@dataclass(slots=True)
class _Lease:
    operation: str
    amount: int
    left: int
    ends: float
    """On the monotonic clock."""
    hold: Hold

    @property
    def untouched(self) -> bool:
        return self.left == self.amount


@dataclass(slots=True)
class _Campaign:
    budget: Budget
    leases: list[_Lease] = field(default_factory=list)
    spent: int = 0
    """Since the last chunk was reserved."""
    since: float = 0.0
    largest: int = 0
    """The highest price met."""


class Leases:
    """
    The leases of one process, for those of *budgets* that want them.

    *clock* gives monotonic seconds.
    """

    def __init__(
        self,
        state: GuardedState,
        budgets: Iterable[Budget],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._clock = clock
        self._campaigns = {
            each.campaign: _Campaign(each, largest=each.price or 1)
            for each in budgets
            if each.on_state_loss == "lease" and each.enforced
        }
        self._log = structlog.get_logger("vastproxy.state")
        self._tasks = Tasks("leases")

    def take(self, campaign: str, price: int) -> str:
        """Take *price* micro-units; give the lease that they come from, empty for none."""
        found = self._campaigns.get(campaign)
        if found is None:
            return ""
        found.largest = max(found.largest, price)
        now = self._clock()
        for lease in found.leases:
            if lease.left >= price and now < lease.ends:
                lease.left -= price
                found.spent += price
                return lease.operation
        return ""

    def give_back(self, campaign: str, operation: str, price: int) -> None:
        """Put back what an ad took that was not served."""
        for lease in self._campaigns[campaign].leases if campaign in self._campaigns else ():
            if lease.operation == operation:
                lease.left += price

    def has(self, campaign: str, price: int) -> bool:
        """Tell whether *price* could be taken now."""
        found, now = self._campaigns.get(campaign), self._clock()
        leases = found.leases if found else ()
        return any(each.left >= price and now < each.ends for each in leases)

    async def renew(self) -> None:
        """Reserve a new chunk for each campaign whose chunks run out."""
        for each in self._campaigns.values():
            if self._state.available and self._runs_out(each):
                try:
                    await self._reserve(each)
                except StateBackendError as error:
                    self._log.debug("lease.failed", problem=str(error))

    def _runs_out(self, campaign: _Campaign) -> bool:
        soon = self._clock() + LIFE / 2
        left = sum(each.left for each in campaign.leases if each.ends > soon)
        whole = max((each.amount for each in campaign.leases), default=0)
        return left < max(campaign.largest, whole // 2)

    async def _reserve(self, campaign: _Campaign) -> None:
        budget, began = campaign.budget, self._clock()
        [level] = await self._state.levels(budget.account, [budget.claim(0)])
        amount = self._chunk(campaign, budget.limit - level.counted - level.reserved)
        if amount < campaign.largest:
            return
        ttl = int(LIFE * 1000) + budget.ttl_ms
        operation = f"lease-{uuid4().hex}"
        hold = Hold(budget.account, operation, (money(amount, budget.limit),), ttl_ms=ttl)
        [verdict] = await self._state.reserve([hold])
        if verdict.granted:
            campaign.leases.append(_Lease(operation, amount, amount, began + LIFE, hold))
            campaign.spent, campaign.since = 0, began
        await self._drop_old(campaign)

    def _chunk(self, campaign: _Campaign, rest: int) -> int:
        """Say how much to reserve: for some seconds, and no large part of the *rest*."""
        elapsed = max(self._clock() - campaign.since, LOOK)
        rate = campaign.spent / elapsed if campaign.leases else float("inf")
        wanted = min(rest / SHARE, rate * AHEAD)
        return int(min(rest, max(wanted, campaign.largest)))

    async def _drop_old(self, campaign: _Campaign) -> None:
        """Forget leases that have ended, or are empty; give back those that nobody took from."""
        soon = self._clock() + LIFE / 2
        old = [each for each in campaign.leases if each.ends <= soon]
        unused = [each for each in old if each.untouched]
        campaign.leases = [
            each
            for each in campaign.leases
            if each not in unused and each.left and each.ends > self._clock()
        ]
        await self._state.void([each.hold for each in unused])

    async def run(self) -> None:
        """Renew for ever."""
        while True:
            await self.renew()
            await asyncio.sleep(LOOK)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        if self._campaigns:
            self._tasks.spawn(self.run(), "renew")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back leases that nobody took from; the others end by themselves."""
        await self._tasks.__aexit__(None, None, None)
        for campaign in self._campaigns.values():
            await self._state.void([each.hold for each in campaign.leases if each.untouched])
            campaign.leases.clear()

    def __bool__(self) -> bool:
        return bool(self._campaigns)

    def __repr__(self) -> str:
        left = {
            name: sum(each.left for each in found.leases) / MICROS
            for name, found in self._campaigns.items()
        }
        return f"<Leases {left}>"
