"""Which caps an ad meets, and what it claims under each."""

from dataclasses import replace
from typing import Any

import pytest

from vastproxy.flow.caps import Cap, Claimed, PodCount, claimed
from vastproxy.state.base import Claim, Window
from vastproxy.state.windows import Span
from vastproxy.vast.facts import AdFacts

NOW = 1_800_000_000_000
HOUR = Span("rolling", 3_600_000)
ACME = AdFacts(ad="s/1", advertiser="acme", creative="s/c", campaign="spring")


def a_cap(limit: int = 3, **settings: Any) -> Cap:
    """Build a cap of the route ``/r`` within the last hour."""
    return replace(Cap("/r", limit, HOUR), **settings)


@pytest.mark.parametrize(
    ("by", "subject", "key"),
    [
        ("viewer", "viewer", "r3600000|/r|"),
        ("campaign", "spring", "r3600000|/r|campaign spring"),
        ("advertiser", "acme", "r3600000|/r|advertiser acme"),
        ("creative", "s/c", "r3600000|/r|creative s/c"),
        ("ad", "s/1", "r3600000|/r|ad s/1"),
    ],
)
def test_claim(by: Any, subject: str, key: str) -> None:
    """A cap claims one ad of a counter that has its window, its name, and what it counts by."""
    cap = a_cap(by=by)

    assert subject == cap.subject(ACME)
    assert Claim(key, 1, 3, Window("rolling", 3_600_000)) == cap.claim(cap.subject(ACME), NOW)
    assert "" == cap.subject(AdFacts()) or by == "viewer"


def test_shadow_is_not_enforced() -> None:
    """A cap in the shadow claims, and stops nothing."""
    assert a_cap().claim("viewer", NOW).enforced
    assert not a_cap(mode="shadow").claim("viewer", NOW).enforced


def test_kinds_of_one_name_have_their_own_counters() -> None:
    """Caps of one name with other windows, or by something else, count apart."""
    caps = [a_cap(), a_cap(span=Span()), a_cap(by="ad"), a_cap(scope="/other")]

    assert 4 == len({each.claim("x", NOW).key for each in caps})


@pytest.mark.parametrize(
    ("settings", "waits"),
    [({}, False), ({"by": "ad"}, True), ({"pod": True}, True), ({"by": "ad", "pod": True}, True)],
)
def test_what_waits_for_the_ad(settings: dict[str, Any], waits: object) -> None:
    """Only a cap by viewer alone can be judged before the ad is there."""
    assert waits == a_cap(**settings).waits_for_ad


def test_upstreams() -> None:
    """A cap is for everybody's ads, or for those of the upstreams it names."""
    named = a_cap(upstreams=frozenset({"a"}))

    assert (True, True) == (a_cap().covers("a"), a_cap().covers(""))
    assert (True, False) == (named.covers("a"), named.covers("b"))


def test_one_hold_for_each_time_of_counting() -> None:
    """Caps that count at one time are claimed together, and wait as long as the longest."""
    shown, longer = a_cap(scope="a"), a_cap(scope="b", ttl_ms=900_000)
    at_once = a_cap(scope="c", count_at="decision")
    pairs = [(each, "viewer") for each in (shown, at_once, longer)]

    assert [
        Claimed(
            (shown, longer),
            (shown.claim("viewer", NOW), longer.claim("viewer", NOW)),
            "impression",
            900_000,
        ),
        Claimed((at_once,), (at_once.claim("viewer", NOW),), "decision", 600_000),
    ] == claimed(pairs, NOW)
    assert [] == claimed([], NOW)


@pytest.mark.parametrize(
    ("caps", "chosen"),
    [
        ([a_cap(3), a_cap(2)], 1),
        ([a_cap(2), a_cap(3)], 0),
        ([a_cap(2), a_cap(2, ttl_ms=1)], 0),
        ([a_cap(0), a_cap(2)], 0),
        ([a_cap(1, mode="shadow"), a_cap(5)], 1),
        ([a_cap(5), a_cap(1, mode="shadow")], 0),
        ([a_cap(3, count_at="decision"), a_cap(2)], 1),
        ([a_cap(3), a_cap(2, count_at="decision")], 1),
    ],
)
def test_one_counter_is_claimed_once(caps: list[Cap], chosen: int) -> None:
    """Of caps that share a counter the strictest counts, and no other, whenever it does."""
    [found] = claimed([(each, "viewer") for each in caps], NOW)

    assert (caps[chosen],) == found.caps
    assert (caps[chosen].claim("viewer", NOW),) == found.claims
    assert caps[chosen].count_at == found.count_at


def test_subjects_are_claimed_apart() -> None:
    """One cap with two subjects claims two counters."""
    [found] = claimed([(a_cap(by="ad"), "s/1"), (a_cap(by="ad"), "s/2")], NOW)

    assert ["r3600000|/r|ad s/1", "r3600000|/r|ad s/2"] == [each.key for each in found.claims]


@pytest.mark.parametrize(
    ("cap", "text"),
    [
        (a_cap(), "cap of /r: 3 by viewer within 3600 s"),
        (a_cap(by="ad", span=Span()), "cap of /r: 3 by ad ever"),
        (a_cap(pod=True), "cap of /r: 3 by viewer in one answer"),
    ],
)
def test_in_words(cap: Cap, text: str) -> None:
    """A cap is told as an operator says it."""
    assert text == str(cap)


# --- Pods ---------------------------------------------------------------------------------------


def test_pod_counts_alike_ads() -> None:
    """A pod has room for as many ads of each subject as its cap says."""
    by_advertiser, by_all = a_cap(1, by="advertiser", pod=True), a_cap(3, pod=True)
    pod = PodCount([by_advertiser, by_all])
    pod.take(ACME)

    assert [by_advertiser] == pod.full(ACME)
    assert [] == pod.full(AdFacts(advertiser="other"))
    pod.take(AdFacts(advertiser="other"))
    pod.take(AdFacts())
    assert [by_all] == pod.full(AdFacts(advertiser="third"))
    assert [by_advertiser, by_all] == pod.full(ACME)


@pytest.mark.parametrize("limit", [0, 1])
def test_pod_of_who_knows_whom(limit: int) -> None:
    """An ad that does not say whose it is cannot be one too many of anybody's."""
    pod = PodCount([a_cap(limit, by="advertiser", pod=True)])
    for _ in range(3):
        assert [] == pod.full(AdFacts())
        pod.take(AdFacts())


def test_pod_of_none() -> None:
    """A limit of 0 has room for none."""
    cap = a_cap(0, pod=True)

    assert [cap] == PodCount([cap]).full(ACME)
    assert [] == PodCount(()).full(ACME)


def test_same_caps_count_apart() -> None:
    """Two caps that are equal are two: each counts for itself."""
    pod = PodCount([a_cap(1, pod=True), a_cap(1, pod=True)])
    pod.take(ACME)

    assert 2 == len(pod.full(ACME))
