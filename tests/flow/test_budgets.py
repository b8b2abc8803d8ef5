"""What an ad costs, and of whose money."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.flow.budgets import Budget, per_impression
from vastproxy.state.base import Account, Claim, check_hold
from vastproxy.state.base import Hold as AHold
from vastproxy.vast.facts import MAX_PRICE, AdFacts, Pricing

BUDGET = Budget("spring", 10_000_000, price=2_500)


def priced(value: str, model: str = "cpm", currency: str = "USD") -> AdFacts:
    """Build an ad that says its price."""
    return AdFacts(pricing=Pricing(model, currency, Decimal(value)))


@pytest.mark.parametrize(
    ("cpm", "price"),
    [
        ("2.50", 2_500),
        ("3", 3_000),
        ("0.001", 1),
        ("0.0004", 1),
        ("0.0005", 1),
        ("0.0015", 2),
        ("0", 0),
        ("1000000", 1_000_000_000),
    ],
)
def test_price_of_an_impression(cpm: str, price: int) -> None:
    """A CPM costs a thousandth of itself for each impression, to the nearest micro-unit but 0."""
    assert price == per_impression(Decimal(cpm))


@given(st.decimals(0, MAX_PRICE, allow_nan=False, places=10))
def test_any_price(cpm: Decimal) -> None:
    """A price is never off by more than half a micro-unit, and none is free that is not."""
    price = per_impression(cpm)

    assert abs(price - cpm * 1000) <= Decimal("0.5") or (price == 1 and 0 < cpm < 1)
    assert bool(cpm) == bool(price)


@pytest.mark.parametrize(
    ("facts", "price"),
    [
        (priced("4"), 4_000),
        (priced("0"), 0),
        (priced("4", "cpc"), 2_500),
        (priced("4", ""), 2_500),
        (priced("4", "cpm", "EUR"), 2_500),
        (priced("4", "cpm", ""), 2_500),
        (AdFacts(), 2_500),
    ],
)
def test_whose_price(facts: AdFacts, price: int) -> None:
    """The ad's own price counts, for a thousand and in the budget's currency; else the route's."""
    assert price == BUDGET.price_of(facts)


def test_no_price() -> None:
    """Where nobody says a price there is none."""
    assert replace(BUDGET, price=None).price_of(AdFacts()) is None
    assert 4_000 == replace(BUDGET, price=None).price_of(priced("4"))


@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_claim(mode: Any) -> None:
    """A price is claimed of the campaign's one counter, and stops ads if the budget does."""
    claim = replace(BUDGET, mode=mode).claim(7)

    assert Claim("spent", 7, 10_000_000, enforced=mode == "enforce") == claim
    check_hold(AHold(BUDGET.account, "o", (claim,)))
    assert Account("campaign", "spring") == BUDGET.account


def test_upstreams() -> None:
    """A budget pays for everybody's ads, or for those of the upstreams it names."""
    named = replace(BUDGET, upstreams=frozenset({"a"}))

    assert (True, True, False) == (BUDGET.covers("b"), named.covers("a"), named.covers("b"))


def test_in_words() -> None:
    """A budget is told in units of its currency."""
    assert "campaign spring: 10 USD" == str(BUDGET)
    assert "campaign spring: 0.0025 EUR" == str(replace(BUDGET, limit=2_500, currency="EUR"))
