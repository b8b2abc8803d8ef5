"""A campaign spends what its impressions cost, to the millionth, and never more than its limit."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    a_pod,
    an_ad,
    budget,
    metric,
    patience,
    wait_for,
)
from tests.support.ad_server import AdServer, Reply
from tests.support.player import Answered, Player
from tests.support.proxy import Proxy, a_config, ask

WORKERS = {"sqlite": 1, "redis": 2, "cluster": 2, "postgresql": 2}

IMPRESSIONS = 2_000
"""At $2.50 for a thousand they cost $5."""

POD = 50
"""Ads of one answer, so that many are served quickly."""


@pytest.fixture(autouse=True)
def an_ad_each(ads: AdServer) -> None:
    """Let the ad server have one ad without a price, and pods of many."""
    ads.replies["/ad"] = Reply(a_document(an_ad("plain")))
    ads.replies["/pod"] = Reply(a_pod(POD))


def priced(path: str, campaign: str, limit: str, **terms: Any) -> dict[str, Any]:
    """Build a route with a budget; *terms* may name other ``upstreams`` and what a budget has."""
    upstreams = terms.pop("upstreams", ["main"])
    return {
        "path": path,
        "upstreams": upstreams,
        "deadline": "20s",
        "reservation_ttl": terms.pop("reservation_ttl", "30s"),
        "budget": {"campaign": campaign, "limit": limit, **terms},
    }


def upstreams(ad_server: AdServer) -> dict[str, Any]:
    """Build two upstreams that wait as long as it takes."""
    paths = {"main": "/ad", "pods": "/pod"}
    return {
        name: {"endpoint": ad_server.url(path), "timeout": "15s"} for name, path in paths.items()
    }


@pytest.fixture(scope="module")
def proxy(ad_server: AdServer, start_module_proxy: StartProxy) -> Proxy:
    """Run a proxy in memory with a route for each kind of budget."""
    routes = [
        priced("/thousands", "thousands", "1000.00", cpm="2.50", upstreams=["pods"]),
        priced("/amount", "amount", "1.00", amount="0.25"),
        priced("/rest", "rest", "0.60", amount="0.25"),
        priced("/one", "shared", "0.05", cpm="2.50"),
        priced("/other", "shared", "0.05", amount="0.005"),
        priced("/own-price", "own-price", "10", cpm="2.50"),
        priced("/no-price", "no-price", "10"),
        priced("/shadow", "shadow", "0.005", cpm="2.50", mode="shadow"),
        priced("/off", "off", "0.005", amount="1", mode="off"),
        priced("/nothing", "nothing", "0.005", amount="0.01"),
        priced("/decision", "decision", "0.01", cpm="2.50", count_at="decision"),
        priced("/late", "late", "0.0025", cpm="2.50", reservation_ttl="1s"),
        priced("/cut", "cut", "0.0325", cpm="2.50", upstreams=["pods"]),
    ]
    return start_module_proxy(a_config(upstreams(ad_server), routes))


@pytest.fixture(scope="module", params=WORKERS)
def shared(
    request: pytest.FixtureRequest,
    ad_server: AdServer,
    states: States,
    start_module_proxy: StartProxy,
) -> Iterator[Proxy]:
    """Run a proxy over each kind of state that can be shared, with workers where it makes sense."""
    kind = request.param
    routes = [
        priced("/thousands", "thousands", "1000.00", cpm="2.50", upstreams=["pods"]),
        priced("/limited", "limited", "0.05", cpm="2.50"),
        priced("/dearer", "limited", "0.05", amount="0.005"),
    ]
    config = a_config(upstreams(ad_server), routes, state=states.url(kind), **patience(kind))
    proxy = start_module_proxy(config | {"server": {"secret": [SECRET], "workers": WORKERS[kind]}})
    if WORKERS[kind] > 1:
        wait_for(lambda: WORKERS[kind] == len(proxy.records(event="worker.ready")))
    yield proxy
    proxy.stop()


def beacons(answers: list[Answered]) -> list[str]:
    """Give the beacons of all *answers*."""
    return [url for each in answers for url in each.beacons]


def flags(proxy: Proxy, route: str) -> set[str]:
    """Give all flags of the access log for *route*."""
    return {flag for each in proxy.records(event="request", route=route) for flag in each["flags"]}


async def show_thousands(proxy: Proxy) -> set[int]:
    """Show IMPRESSIONS ads, and give the statuses of their beacons."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/thousands", IMPRESSIONS // POD)
        fired = await player.fire(beacons(answers))

    assert [POD] * (IMPRESSIONS // POD) == [len(each.beacons) for each in answers]
    assert all(each.is_vast for each in answers)
    return {each.status for each in fired}


async def test_thousands_of_impressions(proxy: Proxy) -> None:
    """Two thousand impressions at $2.50 CPM cost exactly $5: no float drifts, none is lost."""
    statuses = await show_thousands(proxy)

    assert {204} == statuses
    assert {
        "campaign": "thousands",
        "currency": "USD",
        "mode": "enforce",
        "spent": 5,
        "reserved": 0,
        "limit": 1000,
        "remaining": 995,
        "percentage": 0.5,
        "errors": 0,
        "routes": ["/thousands"],
    } == budget(proxy, "thousands")


async def test_thousands_over_shared_state(shared: Proxy) -> None:
    """What several processes count in one state adds up to the millionth."""
    statuses = await show_thousands(shared)
    told = budget(shared, "thousands")

    assert "state_away" not in flags(shared, "/thousands")
    assert {204} == statuses
    assert (5, 0) == (told["spent"], told["reserved"])


async def test_limit_over_shared_state(shared: Proxy) -> None:
    """200 requests at one time on two routes of two prices never pass the campaign's limit."""
    async with Player(shared.base) as player:
        answers = await asyncio.gather(
            player.ask_at_once("/limited", 140), player.ask_at_once("/dearer", 60)
        )
        reserved = budget(shared, "limited")
        await player.fire([*beacons(answers[0]), *beacons(answers[1])])
        after = await player.ask_at_once("/limited", 5)
    cheap, dear = (len(beacons(each)) for each in answers)
    told = budget(shared, "limited")

    assert "state_away" not in flags(shared, "/limited") | flags(shared, "/dearer")
    assert 0.05 == pytest.approx(cheap * 0.0025 + dear * 0.005)
    assert all(each.is_vast for each in (*answers[0], *answers[1]))
    assert (0, 0.05) == (reserved["spent"], reserved["reserved"])
    assert (0.05, 0, 0) == (told["spent"], told["reserved"], told["remaining"])
    assert [[]] * 5 == [each.ads for each in after]


@pytest.mark.parametrize(
    ("route", "served", "spent"), [("/amount", 4, 1), ("/rest", 2, 0.5), ("/nothing", 0, 0)]
)
async def test_exhausted(proxy: Proxy, route: str, served: int, spent: float) -> None:
    """Of 200 requests at one time as many get an ad as the limit pays for, and none more."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once(route, 200)
        await player.fire(beacons(answers))
    told = budget(proxy, route.removeprefix("/"))

    assert served == sum(bool(each.ads) for each in answers)
    assert all(each.is_vast for each in answers)
    assert (spent, 0) == (told["spent"], told["reserved"])


async def test_one_campaign_on_two_routes(proxy: Proxy) -> None:
    """Routes of one campaign spend from one account, each at its own price."""
    async with Player(proxy.base) as player:
        cheap = [await player.ask("/one") for _ in range(10)]
        dear = await player.ask_at_once("/other", 50)
        await player.fire(beacons(cheap) + beacons(dear))
    told = budget(proxy, "shared")

    assert (10, 5) == (len(beacons(cheap)), len(beacons(dear)))
    assert (0.05, ["/one", "/other"]) == (told["spent"], told["routes"])


@pytest.mark.parametrize(
    ("cpm", "currency", "price"),
    [("4.00", "USD", 0.004), ("0.001", "USD", 0.000001), ("4.00", "EUR", 0.0025)],
)
async def test_price_of_the_ad(
    proxy: Proxy, ads: AdServer, cpm: str, currency: str, price: float
) -> None:
    """An ad's own Pricing goes before the route's price, if it is in the budget's currency."""
    ads.replies["/ad"] = Reply(a_document(an_ad("priced", cpm=cpm, currency=currency)))
    before = budget(proxy, "own-price")["spent"]
    async with Player(proxy.base) as player:
        answers = [await player.ask("/own-price") for _ in range(3)]
        await player.fire(beacons(answers))

    assert pytest.approx(3 * price, abs=1e-9) == budget(proxy, "own-price")["spent"] - before


async def test_ad_without_a_price(proxy: Proxy) -> None:
    """An ad that nobody has a price for is served, costs nothing, and is flagged."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/no-price", 5)

    assert [["plain"]] * 5 == [each.ads for each in answers]
    assert [] == beacons(answers)
    assert "unpriced" in flags(proxy, "/no-price")
    assert 0 == budget(proxy, "no-price")["spent"]


async def test_shadow(proxy: Proxy) -> None:
    """Mode shadow serves and says what it would have left out; mode off has no account."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/shadow", 10)
        await player.fire(beacons(answers))
        unlimited = await player.ask_at_once("/off", 10)
    told = proxy.records(event="request", route="/shadow")

    assert [["plain"]] * 20 == [each.ads for each in (*answers, *unlimited)]
    assert 8 == sum("shadow_over_budget" in each["flags"] for each in told)
    assert 8 == metric(
        proxy, "vastproxy_capped_total", route="/shadow", kind="budget", mode="shadow"
    )
    assert 404 == ask(proxy.admin, "/api/budgets/off").status


async def test_count_at_decision(proxy: Proxy) -> None:
    """With count_at decision money is spent when the ad is answered, without a beacon."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/decision", 50)
    told = budget(proxy, "decision")

    assert 4 == sum(bool(each.ads) for each in answers)
    assert [] == beacons(answers)
    assert (0.01, 0) == (told["spent"], told["reserved"])


async def test_unshown_ads_give_back(proxy: Proxy) -> None:
    """Money of an ad that is not shown is free again; shown late, it counts beyond the limit."""
    async with Player(proxy.base) as player:
        first = await player.ask("/late")
        refused = await player.ask("/late")
        wait_for(lambda: 0 == budget(proxy, "late")["reserved"])
        second = await player.ask("/late")
        await player.fire([*first.beacons, *second.beacons])
        exhausted = await player.ask("/late")
    told = budget(proxy, "late")

    assert [["plain"], [], ["plain"], []] == [
        each.ads for each in (first, refused, second, exhausted)
    ]
    assert (0.005, 0, 200) == (told["spent"], told["remaining"], told["percentage"])
    assert 1 == metric(proxy, "vastproxy_beacons_total", result="late")


async def test_pod_is_cut(proxy: Proxy) -> None:
    """A pod is served as far as the money goes, and every ad of it is paid by itself."""
    async with Player(proxy.base) as player:
        answer = await player.ask("/cut")
        await player.fire(answer.beacons[:3])
    told = budget(proxy, "cut")

    assert [f"ad-{each}" for each in range(1, 14)] == answer.ads
    assert (0.0075, 0.025, 0) == (told["spent"], told["reserved"], told["remaining"])


def test_reload_keeps_leases(start_proxy: StartProxy, ads: AdServer) -> None:
    """However often the config is read anew, what is reserved beforehand is reserved once."""
    routes = [
        priced("/lease", "leased", "25", cpm="2.50", on_state_loss="lease", upstreams=["main"])
    ]
    proxy = start_proxy(a_config(upstreams(ads), routes))
    wait_for(lambda: budget(proxy, "leased")["reserved"])
    for number in range(1, 6):
        assert 200 == proxy.get("/lease").status
        proxy.reload({"routes": [*routes, priced(f"/new{number}", "other", "1", cpm="1")]})
        proxy.wait_record(event="reloaded", routes=["/lease", f"/new{number}"])

    assert 25 / 50 == budget(proxy, "leased")["reserved"]


async def test_beacon_at_any_speed(proxy: Proxy) -> None:
    """An impression that is told before its answer was read to the end counts like any other."""
    before = budget(proxy, "own-price")["spent"]
    async with Player(proxy.base) as player:
        began = time.monotonic()
        answers = await player.ask_at_once("/own-price", 100)
        await player.fire(beacons(answers)[::-1])

    assert 0.25 == pytest.approx(budget(proxy, "own-price")["spent"] - before)
    assert 20 > time.monotonic() - began
