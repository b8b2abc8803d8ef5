"""How far campaigns are."""

from decimal import Decimal

import pytest

from vastproxy.state.base import Account, Hold, money
from vastproxy.state.budgets import BudgetMetrics
from vastproxy.state.memory import InMemoryBackend


async def test_figures_of_a_campaign() -> None:
    """What is spent and what is reserved are told apart, exactly, and the rest of the limit."""
    state = InMemoryBackend()
    await state.add_spend("budget:spring", "2.5")
    await state.reserve([Hold(Account("campaign", "spring"), "op", (money(250_000),))])

    assert {
        "campaign_id": "spring",
        "spent": Decimal("2.5"),
        "reserved": Decimal("0.25"),
        "limit": Decimal(10),
        "remaining": Decimal("7.5"),
        "percentage_spent": Decimal(25),
    } == await BudgetMetrics(state).get_campaign_metrics("spring", 10.0)


async def test_campaign_that_nobody_knows() -> None:
    """A campaign without any spend has all of its limit left."""
    told = await BudgetMetrics(InMemoryBackend()).get_campaign_metrics("none", "10")

    assert (0, 0, 10) == (told["spent"], told["percentage_spent"], told["remaining"])


async def test_limit_of_nothing_is_no_division() -> None:
    """Of a limit of nothing, nothing is spent in per cent."""
    state = InMemoryBackend()
    await state.add_spend("budget:spring", 1)
    told = await BudgetMetrics(state).get_campaign_metrics("spring", 0)

    assert (0, -1) == (told["percentage_spent"], told["remaining"])


async def test_nonsense_is_no_limit() -> None:
    """What is no amount is refused."""
    with pytest.raises(ValueError, match="no amount"):
        await BudgetMetrics(InMemoryBackend()).get_campaign_metrics("spring", "much")


def test_repr_names_the_state() -> None:
    """It says where it reads."""
    assert repr(BudgetMetrics(InMemoryBackend())).startswith("<BudgetMetrics <InMemoryBackend")
