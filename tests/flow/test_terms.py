"""From the settings of a route to its terms."""

from typing import Any

import pytest

from vastproxy.config.schema import Route
from vastproxy.flow.admission import Terms
from vastproxy.flow.budgets import Budget
from vastproxy.flow.caps import Cap
from vastproxy.flow.terms import terms
from vastproxy.state.windows import Span


def a_route(**settings: Any) -> Route:
    """Read the settings of a route that knows its viewers."""
    whole = {"path": "/pre", "upstreams": ["a", "b"], "viewer": ["query:uid"], **settings}
    return Route.model_validate(whole)


def cap_of(**settings: Any) -> Cap:
    """Give the one cap of a route."""
    [cap] = terms(a_route(frequency_caps=[{"limit": 3, **settings}]), 60).caps
    return cap


def budget_of(**settings: Any) -> Budget:
    """Give the budget of a route."""
    whole = {"campaign": "spring", "limit": "1000.00", **settings}
    budget = terms(a_route(budget=whole), 60).budget
    assert budget is not None
    return budget


def test_nothing() -> None:
    """A route without caps and budget has no terms."""
    found = terms(a_route(), 60)

    assert Terms(keep_ms=3_600_000) == found
    assert not found


def test_operations_are_remembered_longer_than_their_beacons() -> None:
    """A counted ad is remembered twice as long as its beacon is taken, and an hour at least."""
    assert 3_600_000 == terms(a_route(), 60).keep_ms
    assert 2 * 604_800_000 == terms(a_route(), 604_800).keep_ms


def test_cap_by_default() -> None:
    """A cap that says no more than its limit and window is the viewer's, on its route."""
    assert Cap("/pre", 3, Span("rolling", 3_600_000)) == cap_of(window="1h")


def test_cap_with_all_settings() -> None:
    """Every setting of a cap is kept."""
    cap = cap_of(
        name="launch",
        kind="calendar",
        window="week",
        time_zone="Europe/Berlin",
        by="advertiser",
        count_at="decision",
        when_unknown="skip",
        mode="shadow",
        reservation_ttl="90s",
        upstreams=["b"],
    )

    assert cap == Cap(
        "launch",
        3,
        Span("calendar", period="week", time_zone="Europe/Berlin"),
        by="advertiser",
        count_at="decision",
        when_unknown="skip",
        mode="shadow",
        ttl_ms=90_000,
        upstreams=frozenset({"b"}),
    )


@pytest.mark.parametrize(
    ("settings", "span", "pod"),
    [
        ({"kind": "rolling", "window": "1500ms"}, Span("rolling", 1_500), False),
        ({"kind": "fixed", "window": "24h"}, Span("fixed", 86_400_000), False),
        ({"kind": "lifetime"}, Span(), False),
        ({"kind": "pod"}, Span(), True),
        ({"kind": "calendar", "window": "hour"}, Span("calendar", period="hour"), False),
    ],
)
def test_windows(settings: dict[str, Any], span: Span, pod: object) -> None:
    """Each kind of window is the span of that name; a pod has none."""
    cap = cap_of(**settings)

    assert (span, pod) == (cap.span, cap.pod)


def test_limit_of_zero() -> None:
    """A limit of 0 is kept: it means never."""
    [cap] = terms(a_route(frequency_caps=[{"limit": 0, "window": "1h"}]), 60).caps

    assert 0 == cap.limit


def test_off() -> None:
    """What is switched off is not made."""
    cap = {"limit": 3, "window": "1h", "mode": "off"}
    budget = {"campaign": "spring", "limit": "1", "mode": "off"}

    assert not terms(a_route(frequency_caps=[cap], budget=budget), 60)


def test_how_long_a_reservation_waits() -> None:
    """A reservation waits as long as its cap or budget says, else as long as the route does."""
    caps = [{"limit": 1, "window": "1h"}, {"limit": 1, "kind": "lifetime", "reservation_ttl": "5s"}]
    budget = {"campaign": "spring", "limit": "1"}
    found = terms(a_route(frequency_caps=caps, budget=budget, reservation_ttl="30s"), 60)

    assert found.budget is not None
    assert [30_000, 5_000] == [each.ttl_ms for each in found.caps]
    assert 30_000 == found.budget.ttl_ms


@pytest.mark.parametrize(
    ("settings", "price"),
    [({"cpm": "2.50"}, 2_500), ({"amount": "2.50"}, 2_500_000), ({"cpm": "0.001"}, 1), ({}, None)],
)
def test_price(settings: dict[str, Any], price: int | None) -> None:
    """A CPM is the price of a thousand ads, an amount of one; without both there is none."""
    assert price == budget_of(**settings).price


def test_budget_with_all_settings() -> None:
    """Every setting of a budget is kept."""
    budget = budget_of(
        currency="EUR",
        cpm="1",
        on_state_loss="lease",
        count_at="decision",
        mode="shadow",
        reservation_ttl="90s",
        upstreams=["a"],
    )

    assert budget == Budget(
        "spring",
        1_000_000_000,
        "EUR",
        1_000,
        on_state_loss="lease",
        count_at="decision",
        mode="shadow",
        ttl_ms=90_000,
        upstreams=frozenset({"a"}),
    )
