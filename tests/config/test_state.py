"""Frequency caps and budgets, as an operator writes them."""

from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vastproxy.config.schema import Route
from vastproxy.config.state import Budget, FrequencyCap


def a_cap(**settings: object) -> FrequencyCap:
    """Make a cap with *settings*."""
    return FrequencyCap.model_validate({"limit": 3, "window": "1h", **settings})


def a_budget(**settings: object) -> Budget:
    """Make a budget with *settings*."""
    return Budget.model_validate({"campaign": "spring", "limit": "1000", **settings})


def a_route(*caps: dict[str, Any], **settings: object) -> Route:
    """Make a route with *caps* and *settings*, of which the viewer is known."""
    route = {"path": "/vast", "upstreams": ["main", "house"], "viewer": ["query:uid"]}
    return Route.model_validate({**route, "frequency_caps": caps, **settings})


def test_smallest_cap_has_every_default() -> None:
    """A limit and a window are enough: so many ads per viewer, in any stretch of that length."""
    cap = a_cap()

    assert (3, "rolling", 3_600_000, None) == (cap.limit, cap.kind, cap.window_ms, cap.period)
    assert ("viewer", "UTC", "impression") == (cap.by, cap.time_zone, cap.count_at)
    assert ("serve", "enforce") == (cap.when_unknown, cap.mode)
    assert (None, None, None) == (cap.name, cap.reservation_ttl, cap.upstreams)


def test_smallest_budget_has_every_default() -> None:
    """A campaign and a limit are enough: what ads say that they cost, until it is spent."""
    budget = a_budget()

    assert ("spring", Decimal(1000), "USD") == (budget.campaign, budget.limit, budget.currency)
    assert (None, None) == (budget.cpm, budget.amount)
    assert ("serve", "impression", "enforce") == (
        budget.on_state_loss,
        budget.count_at,
        budget.mode,
    )
    assert (None, None) == (budget.reservation_ttl, budget.upstreams)


def test_limit_of_nothing_is_a_limit() -> None:
    """A limit of 0 stays 0: no ad, ever."""
    assert 0 == a_cap(limit=0).limit


@pytest.mark.parametrize(
    ("milliseconds", "window"),
    [(1000, "1s"), (1000, "1000ms"), (86_400_000, "24h"), (34_560_000_000, "400d"), (1500, "1.5s")],
)
def test_window_is_milliseconds(milliseconds: int, window: str) -> None:
    """The window of a rolling or fixed cap is counted in whole milliseconds."""
    assert milliseconds == a_cap(window=window).window_ms
    assert milliseconds == a_cap(window=window, kind="fixed").window_ms


@pytest.mark.parametrize("period", ["hour", "day", "week", "month"])
def test_calendar_has_a_period(period: str) -> None:
    """The window of a calendar's cap is a word, and has no length of its own."""
    cap = a_cap(kind="calendar", window=period, time_zone="America/Argentina/Buenos_Aires")

    assert (period, 0) == (cap.period, cap.window_ms)


@pytest.mark.parametrize("kind", ["lifetime", "pod"])
def test_kind_without_window_has_none(kind: str) -> None:
    """What counts for ever, or within one answer, has no window."""
    cap = a_cap(kind=kind, window=None)

    assert (None, 0) == (cap.period, cap.window_ms)


@pytest.mark.parametrize(
    ("by", "written"),
    [
        ("viewer", "viewer"),
        ("viewer", ["viewer"]),
        ("campaign", "campaign"),
        ("campaign", "viewer+campaign"),
        ("campaign", "campaign + viewer"),
        ("campaign", ["viewer", "campaign"]),
        ("advertiser", ["advertiser"]),
        ("creative", "viewer+creative"),
        ("ad", ["ad", "viewer"]),
    ],
)
def test_subject_is_one_word(by: str, written: object) -> None:
    """However the subject is written, one of five words says it."""
    assert by == a_cap(by=written).by


@pytest.mark.parametrize(
    "written",
    ["", "+", "viewer+", "viewer+viewer", "campaign+ad", "Viewer", [], ["ad", "ad"], [3], None, 3],
)
def test_bad_subject_is_refused(written: object) -> None:
    """Two things beside the viewer, the same thing twice, or another word are no subject."""
    with pytest.raises(ValidationError, match=r"nothing to count by \(write viewer, campaign"):
        a_cap(by=written)


@pytest.mark.parametrize("name", ["UTC", "Europe/Berlin", "Etc/GMT+5", "Asia/Kolkata"])
def test_time_zone_is_found(name: str) -> None:
    """A name of the IANA database is a time zone."""
    assert name == a_cap(kind="calendar", window="day", time_zone=name).time_zone


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Berlin",
        "europe/berlin",
        "Europe",
        "localtime",
        "posix/UTC",
        "right/UTC",
        "posixrules",
        "../UTC",
        "/etc/localtime",
        "zone.tab",
        "a\0b",
        "x" * 300,
        "\u00e4",
    ],
)
def test_bad_time_zone_is_refused(name: str) -> None:
    """A name that is in no database, or means another zone on another machine, is refused."""
    with pytest.raises(ValidationError, match=r"is no time zone \(write UTC, or"):
        a_cap(kind="calendar", window="day", time_zone=name)


@pytest.mark.parametrize("value", [2.5, "2.5", "2.50", Decimal("2.5")])
def test_money_is_a_decimal(value: object) -> None:
    """An amount is the decimal that is written, as text or as a number."""
    assert Decimal("2.5") == a_budget(cpm=value).cpm


@pytest.mark.parametrize(
    "value", [0, -1, "-1", "", "1,5", "1_000", "1e3", True, 1e-7, 1e300, [], "\u0663", "nan"]
)
def test_bad_money_is_refused(value: object) -> None:
    """What is no amount, or none that is counted exactly, is refused."""
    with pytest.raises(ValidationError, match=r"\((write|put) "):
        a_budget(limit=value)


def test_caps_of_a_route_may_look_alike() -> None:
    """Caps that differ in one of kind, window, subject, time zone or upstreams are two caps."""
    day = {"limit": 1, "kind": "calendar", "window": "day"}
    route = a_route(
        {"limit": 1, "window": "1h"},
        {"limit": 1, "window": "2h"},
        {"limit": 1, "window": "1h", "kind": "fixed"},
        {"limit": 1, "window": "1h", "by": "ad"},
        {"limit": 1, "window": "1h", "upstreams": "main"},
        day,
        {**day, "time_zone": "Europe/Berlin"},
    )

    assert 7 == len(route.frequency_caps)


@pytest.mark.parametrize(
    "second",
    [
        {"window": "60m"},
        {"window": "1h", "limit": 9, "mode": "off"},
        {"window": "1h", "upstreams": ["house", "main"]},
        {"window": "1h", "by": ["viewer"], "name": "another", "count_at": "decision"},
    ],
)
def test_caps_that_mean_the_same_are_refused(second: dict[str, Any]) -> None:
    """Two caps over the same counter are refused, whatever else they say."""
    with pytest.raises(ValidationError, match="1 counts the same as 0"):
        a_route({"limit": 3, "window": "1h"}, {"limit": 3, **second})


def test_pod_needs_no_viewer() -> None:
    """What one answer may have is known without knowing who is watching."""
    route = a_route({"limit": 2, "kind": "pod"}, {"limit": 1, "kind": "pod", "by": "ad"}, viewer=[])

    assert ["viewer", "ad"] == [each.by for each in route.frequency_caps]


def test_ads_that_pass_through_are_capped_by_viewer() -> None:
    """Where documents are not looked at, a viewer's ads can be counted, and nothing else."""
    route = a_route({"limit": 2, "kind": "lifetime"}, mode="passthrough")

    assert "lifetime" == route.frequency_caps[0].kind
    with pytest.raises(ValidationError, match="by: campaign needs to know the ads"):
        a_route({"limit": 2, "window": "1h", "by": "campaign"}, mode="passthrough")


@given(
    st.dictionaries(
        st.sampled_from([*FrequencyCap.model_fields, *Budget.model_fields]),
        st.one_of(
            st.text(),
            st.integers(),
            st.floats(),
            st.none(),
            st.booleans(),
            st.lists(st.text()),
            st.sampled_from(["calendar", "day", "1h", "viewer+ad", "spring", "2.5", "Europe"]),
        ),
    )
)
def test_any_settings_are_a_section_or_a_validation_error(settings: dict[str, object]) -> None:
    """Any values give a cap and a budget, or ValidationError and nothing else."""
    for section in (FrequencyCap, Budget):
        with suppress(ValidationError):
            section.model_validate(
                {name: each for name, each in settings.items() if name in section.model_fields}
            )
