"""
Budgets: what an ad costs, and whether there is money for it.

Rule 1: money is in integer micro-units of the budget's currency.
Rule 2: the price is the ad's own where it names one for each thousand impressions, in the
budget's currency; else the route's.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from vastproxy.flow.caps import Mode, When
from vastproxy.state.base import MICROS, Account, Claim, micros, money
from vastproxy.vast.facts import AdFacts

PER_THOUSAND = 1000
"""Impressions that a CPM is the price of."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A campaign's budget, ready to be used. One that is switched off is not made."""

    campaign: str
    limit: int
    """Micro-units."""
    currency: str = "USD"
    price: int | None = None
    """What an ad costs that does not say it, in micro-units; None: such an ad costs nothing."""
    on_state_loss: Literal["serve", "lease", "deny"] = "serve"
    count_at: When = "impression"
    mode: Mode = "enforce"
    ttl_ms: int = 600_000
    upstreams: frozenset[str] | None = None

    @property
    def account(self) -> Account:
        """Where its money is counted."""
        return Account("campaign", self.campaign)

    @property
    def enforced(self) -> bool:
        """Whether an ad that is not paid for is not served."""
        return self.mode == "enforce"

    def covers(self, upstream: str) -> bool:
        """Tell whether it pays for the ads of *upstream*."""
        return self.upstreams is None or upstream in self.upstreams

    def claim(self, price: int) -> Claim:
        """Claim *price* micro-units."""
        claim = money(price, self.limit)
        return claim if self.enforced else Claim(claim.key, price, self.limit, enforced=False)

    def price_of(self, facts: AdFacts) -> int | None:
        """Give the price of one impression of an ad, in micro-units; None: nobody says it."""
        named = facts.pricing
        if named is not None and named.model == "cpm" and named.currency == self.currency:
            return per_impression(named.value)
        return self.price

    def __str__(self) -> str:
        return f"campaign {self.campaign}: {self.limit / MICROS:g} {self.currency}"


def per_impression(cpm: Decimal) -> int:
    """
    Give the price of one impression at *cpm* units of currency a thousand, in micro-units.

    What costs anything costs one at the least: nothing that has a price is free.
    """
    return max(1, micros(cpm / PER_THOUSAND)) if cpm else 0
