"""What campaigns have spent, for people and for dashboards."""

from decimal import Decimal
from typing import TypedDict

from vastproxy.state.base import Account, StateBackend, micros, money, units


class CampaignMetrics(TypedDict):
    """What stands on a campaign's account; amounts are in units of its currency."""

    campaign_id: str
    spent: Decimal
    reserved: Decimal
    """For ads that were decided on and not shown yet."""
    limit: Decimal
    remaining: Decimal
    """Not spent; what is reserved is in it. Below 0 where ads were counted that came late."""
    percentage_spent: Decimal


class BudgetMetrics:
    """Reads the accounts of campaigns in *state_backend*."""

    def __init__(self, state_backend: StateBackend) -> None:
        self._state = state_backend

    async def get_campaign_metrics(
        self, campaign_id: str, budget_limit: Decimal | float | str
    ) -> CampaignMetrics:
        """
        Tell how far a campaign is, of *budget_limit* units of currency.

        Raises StateBackendError, and ValueError for what is no amount.
        """
        limit = micros(budget_limit)
        [level] = await self._state.levels(Account("campaign", campaign_id), [money(0)])
        percentage = Decimal(level.counted) / limit * 100 if limit > 0 else Decimal(0)
        return CampaignMetrics(
            campaign_id=campaign_id,
            spent=units(level.counted),
            reserved=units(level.reserved),
            limit=units(limit),
            remaining=units(limit - level.counted),
            percentage_spent=percentage,
        )

    def __repr__(self) -> str:
        return f"<BudgetMetrics {self._state!r}>"
