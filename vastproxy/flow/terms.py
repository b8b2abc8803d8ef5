"""From the settings of a route to its terms: caps and budget, ready to be used."""

from vastproxy.config.schema import Budget as BudgetConfig
from vastproxy.config.schema import FrequencyCap
from vastproxy.config.schema import Route as RouteConfig
from vastproxy.flow.admission import Terms
from vastproxy.flow.budgets import Budget, per_impression
from vastproxy.flow.caps import Cap
from vastproxy.state.base import micros
from vastproxy.state.windows import Span

LEAST_KEPT_MS = 3_600_000
"""How long at least an ad that was counted is remembered."""


def terms(route: RouteConfig, beacon_ttl: float) -> Terms:
    """Give the terms of *route*, whose beacons are taken for *beacon_ttl* seconds."""
    caps = tuple(_cap(route, each) for each in route.frequency_caps if each.mode != "off")
    budget = route.budget
    has_budget = budget is not None and budget.mode != "off"
    return Terms(
        caps=caps,
        budget=_budget(route, budget) if budget is not None and has_budget else None,
        # A token expires first, and is forgotten later: its last confirmation may have waited in
        # the journal for an outage to end.
        keep_ms=max(2 * _ms(beacon_ttl), LEAST_KEPT_MS),
    )


def _cap(route: RouteConfig, cap: FrequencyCap) -> Cap:
    return Cap(
        # Without a name it counts for itself: not for another route, nor for other upstreams.
        scope=cap.name or " ".join((route.path, *sorted(cap.upstreams or ()))),
        limit=cap.limit,
        span=_span(cap),
        by=cap.by,
        count_at=cap.count_at,
        when_unknown=cap.when_unknown,
        mode="shadow" if cap.mode == "shadow" else "enforce",
        pod=cap.kind == "pod",
        ttl_ms=_ms(cap.reservation_ttl or route.reservation_ttl),
        upstreams=None if cap.upstreams is None else frozenset(cap.upstreams),
    )


def _span(cap: FrequencyCap) -> Span:
    match cap.kind:
        case "pod" | "lifetime":
            return Span()
        case "calendar":
            return Span("calendar", period=cap.period or "day", time_zone=cap.time_zone)
        case "rolling" | "fixed":
            return Span(cap.kind, cap.window_ms)


def _budget(route: RouteConfig, budget: BudgetConfig) -> Budget:
    price = None if budget.amount is None else micros(budget.amount)
    return Budget(
        campaign=budget.campaign,
        limit=micros(budget.limit),
        currency=budget.currency,
        price=price if budget.cpm is None else per_impression(budget.cpm),
        on_state_loss=budget.on_state_loss,
        count_at=budget.count_at,
        mode="shadow" if budget.mode == "shadow" else "enforce",
        ttl_ms=_ms(budget.reservation_ttl or route.reservation_ttl),
        upstreams=None if budget.upstreams is None else frozenset(budget.upstreams),
    )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
