"""
What operators see of the state: budgets, and what is kept of one viewer.

Everything is read when it is asked for. The state is asked without the haste of an ad request;
where it is away, StateBackendError says so.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from vastproxy.errors import StateAwayError
from vastproxy.flow.admission import Terms
from vastproxy.flow.budgets import Budget
from vastproxy.flow.failures import errors_key
from vastproxy.session.seals import ViewerNames
from vastproxy.session.viewer_cookies import described
from vastproxy.state.base import Account, Level, StateBackend, units
from vastproxy.state.windows import claim_of, told

T = TypeVar("T")

PATIENCE = 2.0
"""Seconds that an operator waits for the state."""
AGAIN = 0.05
"""Seconds between two questions to a state that is away."""


@dataclass(frozen=True, slots=True)
class Overview:
    """
    Answers an operator's questions about *state*.

    *terms* are those of the routes, by path.
    """

    state: StateBackend
    names: ViewerNames
    terms: tuple[tuple[str, Terms], ...]

    def _budgets(self) -> dict[str, Budget]:
        found = [each.budget for _, each in self.terms if each.budget]
        return {each.campaign: each for each in found}

    async def budgets(self) -> list[dict[str, Any]]:
        """Tell the budgets of all campaigns that routes name."""
        return [await self._told(each) for each in self._budgets().values()]

    async def budget(self, campaign: str) -> dict[str, Any] | None:
        """Tell the budget of *campaign*; None where no route names it."""
        found = self._budgets().get(campaign)
        return await self._told(found) if found else None

    async def _told(self, budget: Budget) -> dict[str, Any]:
        [level] = await _soon(lambda: self.state.levels(budget.account, [budget.claim(0)]))
        errors = await _soon(lambda: self.state.get_count(errors_key(budget.campaign)))
        rest = max(0, budget.limit - level.counted - level.reserved)
        return {
            "campaign": budget.campaign,
            "currency": budget.currency,
            "mode": budget.mode,
            "spent": _number(units(level.counted)),
            "reserved": _number(units(level.reserved)),
            "limit": _number(units(budget.limit)),
            "remaining": _number(units(rest)),
            "percentage": round(100 * level.counted / budget.limit, 4) if budget.limit else 100.0,
            "errors": errors,
            "routes": [path for path, each in self.terms if _pays(each.budget, budget)],
        }

    async def viewer(self, viewer: str, now: int) -> dict[str, Any]:
        """Tell what is kept of the viewer with the id *viewer*, at *now* in Unix milliseconds."""
        account = Account("viewer", self.names.name(viewer))
        keys = sorted(await _soon(lambda: self.state.keys(account)))
        claims = [claim_of(each, 1, now) for each in keys]
        levels = await _soon(lambda: self.state.levels(account, claims)) if keys else []
        items = await _soon(lambda: self.state.read_items(account))
        caps = [self._cap(key, level) for key, level in zip(keys, levels, strict=True)]
        return {"caps": caps, "cookies": described(items)}

    def _cap(self, key: str, level: Level) -> dict[str, Any]:
        span, scope, subject = told(key)
        by, _, whose = subject.partition(" ")
        limit = self._limit(f"{span.code}|{scope}", by or "viewer")
        return {
            "cap": scope,
            "window": str(span),
            "by": by or "viewer",
            "subject": whose,
            "counted": level.counted,
            "reserved": level.reserved,
            "limit": limit,
        }

    def _limit(self, prefix: str, by: str) -> int | None:
        """Find the limit of a counter; None where no route has such a cap any more."""
        caps = (cap for _, each in self.terms for cap in each.caps if cap.by == by)
        same = (each for each in caps if f"{each.span.code}|{each.scope}" == prefix)
        return min((each.limit for each in same), default=None)

    async def forget(self, viewer: str) -> bool:
        """Remove all that is kept of the viewer with the id *viewer*; whether there was any."""
        return await _soon(lambda: self.state.forget(Account("viewer", self.names.name(viewer))))

    def __repr__(self) -> str:
        return f"<Overview of {self.state!r}>"


def _pays(one: Budget | None, budget: Budget) -> bool:
    """Whether they are one campaign's: routes may have prices of their own."""
    return one is not None and one.campaign == budget.campaign


async def _soon(call: Callable[[], Awaitable[T]]) -> T:
    """
    Give what *call* gives, asking again while the state is away and there is patience.

    After a restart of its server the connections kept from before are dead, and the first calls
    find that out. All that is asked here may be asked twice.
    """
    problem = f"no answer in {PATIENCE:g} s"
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await call()
                except StateAwayError as error:
                    problem = str(error)
                await asyncio.sleep(AGAIN)
    except TimeoutError:
        raise StateAwayError(problem) from None


def _number(amount: Decimal) -> int | float:
    """Write an amount as JSON has numbers."""
    return int(amount) if amount == amount.to_integral_value() else float(amount)
