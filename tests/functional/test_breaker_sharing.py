"""
Instances that share breakers: what one of them has seen, all know; and none needs to be told.

Promises: a trip in one instance is seen by the other within a second; recovery is, too; with Redis
gone each goes on by itself, and no ad request waits for it.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    a_document,
    an_ad,
    metric,
    wait_for,
)
from tests.support.ad_server import AdServer, Received, Reply
from tests.support.proxy import Proxy, a_config, ask
from tests.support.valkey import Valkey, valkey_server

FAIL_MAX = 3

SEEN_WITHIN = 1.0
"""Seconds until the other instance knows."""

ALONE = 1.5
"""Seconds in which nothing may happen that would have, if there were Redis."""

QUICK = 0.5
"""Seconds that an ad request may take, whatever Redis does."""

NAMES = ("tripped", "recovered", "voted", "killed", "stopped")

OUTAGES = {"killed": (Valkey.kill, Valkey.restart), "stopped": (Valkey.stop, Valkey.cont)}
"""How Redis goes away, and comes back."""


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    """Run a server of this module's own, which may be killed."""
    with valkey_server() as server:
        yield server


@pytest.fixture(scope="module")
def proxies(
    ad_server: AdServer, valkey: Valkey, start_module_proxy: StartProxy
) -> tuple[Proxy, Proxy]:
    """Run two proxies that share the breakers of all upstreams."""
    shared = {"share": True, "fail_max": FAIL_MAX, "reset_timeout": "1m", "success_threshold": 1}
    upstreams: dict[str, dict[str, Any]] = {
        name: {"endpoint": ad_server.url(f"/{name}"), "circuit_breaker": shared} for name in NAMES
    }
    upstreams["recovered"]["circuit_breaker"] = {**shared, "reset_timeout": "700ms"}
    upstreams["voted"]["circuit_breaker"] = {**shared, "quorum": 2}
    routes = [{"path": f"/{name}", "upstreams": [name]} for name in NAMES]
    config = a_config(upstreams, routes, state=valkey.url, server={"secret": [SECRET]})
    return start_module_proxy(config), start_module_proxy(config)


@pytest.fixture(autouse=True)
def failing(ads: AdServer) -> set[str]:
    """Give the names of the instances for which the ad server fails now."""
    failing = {"one", "two"}

    def answer(request: Received) -> Reply:
        """Answer the instance that asks: its player says which it is."""
        who = request.query.partition("who=")[2]
        return Reply(status=503) if who in failing else Reply(a_document(an_ad("main")))

    ads.fallback = answer
    return failing


def play(proxy: Proxy, who: str, name: str, count: int = 1) -> list[bool]:
    """Ask the route called *name* of the instance *who*, and say which answers have an ad."""
    return [b"<Ad " in proxy.get(f"/{name}?who={who}").body for _ in range(count)]


def breaker(proxy: Proxy, name: str) -> dict[str, Any]:
    """Say how the breaker of the upstream called *name* is."""
    told: dict[str, Any] = ask(proxy.admin, f"/api/upstreams/{name}").json()["breaker"]
    return told


def wait_state(proxy: Proxy, name: str, state: str, within: float = SEEN_WITHIN) -> None:
    """Wait until a breaker is in *state*."""
    wait_for(lambda: breaker(proxy, name)["state"] == state, within)


def asked_by(ads: AdServer, name: str, who: str) -> int:
    """Count the calls of an instance to the upstream called *name*."""
    return sum(each.query.endswith(f"who={who}") for each in ads.seen(f"/{name}"))


def test_trip_is_seen_by_the_other(proxies: tuple[Proxy, Proxy], ads: AdServer) -> None:
    """Who was asked for nothing knows within a second, and leaves the ad server alone."""
    one, two = proxies
    play(one, "one", "tripped", FAIL_MAX)
    wait_state(two, "tripped", "open")
    found = play(two, "two", "tripped", 3)

    assert "open" == breaker(one, "tripped")["state"]
    assert [False] * 3 == found
    assert 0 == asked_by(ads, "tripped", "two")
    assert "seen by another instance: " in breaker(two, "tripped")["reason"]
    assert 1 == metric(two, "vastproxy_breaker_open", upstream="tripped")
    two.wait_record(event="breaker.changed", upstream="tripped", new="open")


def test_recovery_is_seen_by_the_other(
    proxies: tuple[Proxy, Proxy], ads: AdServer, failing: set[str]
) -> None:
    """One of them probes, and where that is well both ask again."""
    one, two = proxies
    play(one, "one", "recovered", FAIL_MAX)
    wait_state(two, "recovered", "open")
    failing.clear()
    wait_for(lambda: any(play(two, "two", "recovered")))
    wait_state(one, "recovered", "closed")

    assert FAIL_MAX == asked_by(ads, "recovered", "one")
    assert [True] * 3 == play(one, "one", "recovered", 3)
    assert "closed" == breaker(two, "recovered")["state"]


def test_quorum(proxies: tuple[Proxy, Proxy], failing: set[str]) -> None:
    """With a quorum of two, what one has seen is his own affair until another has seen it."""
    one, two = proxies
    play(one, "one", "voted", FAIL_MAX)
    failing.remove("two")
    ends = time.monotonic() + SEEN_WITHIN
    found = []
    while time.monotonic() < ends:
        found += play(two, "two", "voted")
        time.sleep(0.05)

    assert {True} == set(found)
    assert "open" == breaker(one, "voted")["state"]


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_alone_without_redis(
    proxies: tuple[Proxy, Proxy], valkey: Valkey, failing: set[str], name: str
) -> None:
    """With Redis gone each decides for itself, and nobody waits; when it is back they agree."""
    one, two = proxies
    away, back = OUTAGES[name]
    away(valkey)
    failing.remove("two")
    slowest, found = 0.0, list[bool]()
    play(one, "one", name, FAIL_MAX)
    ends = time.monotonic() + ALONE
    while time.monotonic() < ends:
        began = time.monotonic()
        found += play(two, "two", name)
        slowest = max(slowest, time.monotonic() - began)

    assert "open" == breaker(one, name)["state"]
    assert {True} == set(found)
    assert slowest < QUICK
    assert "closed" == breaker(two, name)["state"]

    back(valkey)
    wait_state(two, name, "open", within=10)
