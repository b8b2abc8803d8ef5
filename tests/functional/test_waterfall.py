"""
An ad server that hangs costs no ad and no second: the next one is asked meanwhile.

Promises: where the primary hangs, and has a soft limit of 300 ms, the house ad is there before 400;
if the primary answers first after all, its ad wins; nothing stays reserved of the one that lost.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    an_ad,
    budget,
    viewer,
    wait_for,
)
from tests.support.ad_server import AdServer, Reply
from tests.support.player import Player
from tests.support.proxy import Proxy, a_config

SOFT = 0.3
PROMISED = 0.4
"""Seconds until the house ad has to be there."""

PRICE = 0.25
"""Of an ad."""


def a_route(path: str, *upstreams: str, limit: int = 1, **more: Any) -> dict[str, Any]:
    """Build a route with a cap of *limit* ads, and money for as many."""
    return {
        "path": path,
        "upstreams": upstreams,
        "deadline": "2s",
        "viewer": ["query:uid"],
        "frequency_caps": [{"limit": limit, "window": "1h"}],
        "budget": {"campaign": path.strip("/"), "limit": limit * PRICE, "amount": PRICE},
        **more,
    }


@pytest.fixture(scope="module", params=["memory", "redis"])
def proxy(
    request: pytest.FixtureRequest,
    ad_server: AdServer,
    states: States,
    start_module_proxy: StartProxy,
) -> Iterator[Proxy]:
    """Run a proxy over a state, with a route for each story."""
    upstreams = {
        "primary": {
            "endpoint": ad_server.url("/primary"),
            "soft_timeout": f"{SOFT * 1000:g}ms",
            # The breaker's own tests are elsewhere: here the primary hangs often.
            "circuit_breaker": {"mode": "off"},
        },
        "house": {"endpoint": ad_server.url("/house"), "circuit_breaker": {"mode": "off"}},
        "fragile": {"endpoint": ad_server.url("/fragile"), "circuit_breaker": {"fail_max": 2}},
    }
    own_cap = {"limit": 1, "window": "1h", "name": "own", "upstreams": ["primary"]}
    own = a_route("/own", "primary", "house")
    routes = [
        a_route("/last", "primary", "house"),
        a_route("/quick", "primary", "house", limit=10),
        a_route("/passed", "primary", "house", mode="passthrough"),
        {**own, "frequency_caps": [*own["frequency_caps"], own_cap]},
        a_route("/slow", "primary", "house"),
        a_route("/gone", "primary", "house"),
        a_route("/none", "primary", "house", deadline="700ms"),
        a_route("/resort", "primary", "house", deadline="700ms", fallback=resort()),
        a_route("/fragile", "fragile", "house", limit=10),
    ]
    config = a_config(upstreams, routes, state=states.url(request.param), state_timeout="250ms")
    running = start_module_proxy(config | {"server": {"secret": [SECRET]}})
    yield running
    running.stop()


def resort() -> str:
    """Write the ad that is answered where nobody has one."""
    return a_document(an_ad("resort")).decode()


@pytest.fixture(autouse=True)
def primary_hangs(ads: AdServer) -> None:
    """Let the primary hang, and the house have an ad."""
    ads.replies |= {
        "/primary": Reply(a_document(an_ad("primary")), delay=30),
        "/house": a_document(an_ad("house")),
        "/fragile": Reply(status=503),
    }


def standing(proxy: Proxy, route: str, uid: str) -> dict[str, Any]:
    """Give what is counted and reserved for the viewer *uid*, and of the route's campaign."""
    money = budget(proxy, route.strip("/"))
    found = {
        each["cap"]: (each["counted"], each["reserved"]) for each in viewer(proxy, uid)["caps"]
    }
    caps = {name: counts for name, counts in found.items() if any(counts)}
    return {"caps": caps, "spent": money["spent"], "reserved": money["reserved"]}


def wait_standing(proxy: Proxy, route: str, uid: str, wanted: dict[str, Any]) -> None:
    """Wait until that is as *wanted*: what is given back is given back after the answer."""
    wait_for(lambda: wanted == standing(proxy, route, uid))


def line(proxy: Proxy, route: str) -> dict[str, Any]:
    """Give the last line of the access log for *route*."""
    proxy.wait_record(event="request", route=route)
    return proxy.records(event="request", route=route)[-1]


@pytest.mark.parametrize("route", ["/last", "/passed", "/own"])
async def test_last_place_and_last_money(proxy: Proxy, ads: AdServer, route: str) -> None:
    """
    At the cap's last place and the budget's last money the house ad is served, and counted once.

    What only the primary's cap had reserved is free again.
    """
    async with Player(proxy.base) as player:
        answer = await player.ask(f"{route}?uid=v{route[1:]}")
        caps = {route: (0, 1)}
        waiting = {"caps": caps, "spent": 0, "reserved": PRICE}
        wait_standing(proxy, route, f"v{route[1:]}", waiting)
        await player.fire(answer.beacons)
        await player.fire(answer.beacons)
        again = await player.ask(f"{route}?uid=v{route[1:]}")

    assert ["house"] == answer.ads
    assert 1 == len(answer.beacons)
    assert [] == again.ads
    assert 1 == len(ads.seen("/primary"))
    counted = {"caps": {route: (1, 0)}, "spent": PRICE, "reserved": 0}
    wait_standing(proxy, route, f"v{route[1:]}", counted)


async def test_house_ad_is_there_in_time(proxy: Proxy) -> None:
    """The house ad is there before 400 ms have passed, and the log says how it came to that."""
    async with Player(proxy.base) as player:
        answers = [await player.ask(f"/quick?uid=quick{each}") for each in range(4)]

    assert [["house"]] * 4 == [each.ads for each in answers]
    assert all(each.seconds >= SOFT for each in answers)
    # The machine may be busy with something else, for a moment.
    assert min(each.seconds for each in answers) < PROMISED
    told = line(proxy, "/quick")
    assert ["primary:late", "house:ad", "primary:cancelled"] == told["waterfall"]
    assert ["fallback", "soft_timeout"] == told["flags"]


async def test_primary_wins_after_all(proxy: Proxy, ads: AdServer) -> None:
    """Where the primary is late, and still first to have an ad, that is answered and counted."""
    ads.replies |= {
        "/primary": Reply(a_document(an_ad("primary")), delay=SOFT + 0.2),
        "/house": Reply(a_document(an_ad("house")), delay=30),
    }
    async with Player(proxy.base) as player:
        answer = await player.ask("/slow?uid=slow")

    assert ["primary"] == answer.ads
    assert ["primary:late", "primary:ad", "house:cancelled"] == line(proxy, "/slow")["waterfall"]
    waiting = {"caps": {"/slow": (0, 1)}, "spent": 0, "reserved": PRICE}
    wait_standing(proxy, "/slow", "slow", waiting)


async def test_nothing_stays_reserved_where_nobody_has_an_ad(proxy: Proxy, ads: AdServer) -> None:
    """Where both hang until the deadline there is no ad, and nothing stays reserved."""
    ads.replies["/house"] = Reply(b"", delay=30)
    async with Player(proxy.base) as player:
        answer = await player.ask("/none?uid=none")

    assert [] == answer.ads
    assert answer.seconds < 1.5
    wait_standing(proxy, "/none", "none", {"caps": {}, "spent": 0, "reserved": 0})
    wait_for(lambda: 2 == budget(proxy, "none")["errors"])


async def test_nothing_stays_reserved_of_who_hangs_up(proxy: Proxy, ads: AdServer) -> None:
    """Where the viewer goes while both are asked, nothing stays reserved."""
    ads.replies["/house"] = Reply(b"", delay=30)
    async with Player(proxy.base) as player, asyncio.TaskGroup() as group:
        asking = group.create_task(player.ask("/gone?uid=gone"))
        await asyncio.to_thread(wait_for, lambda: ads.seen("/house"))
        asking.cancel()

    wait_for(lambda: {} == standing(proxy, "/gone", "gone")["caps"])


async def test_last_resort(proxy: Proxy, ads: AdServer) -> None:
    """Where nobody has an ad the route's own is answered, free, and without a beacon."""
    ads.replies["/house"] = Reply(b"", delay=30)
    async with Player(proxy.base) as player:
        answer = await player.ask("/resort?uid=resort")

    assert (["resort"], []) == (answer.ads, answer.beacons)
    told = line(proxy, "/resort")
    assert ("fallback", 1) == (told["upstream"], told["ads"])
    assert "last_resort" in told["flags"]
    wait_standing(proxy, "/resort", "resort", {"caps": {}, "spent": 0, "reserved": 0})


async def test_breaker_in_the_log(proxy: Proxy, ads: AdServer) -> None:
    """What opens a breaker is in the log, and how often asking failed is in the budget."""
    async with Player(proxy.base) as player:
        answers = [await player.ask(f"/fragile?uid=f{each}") for each in range(4)]

    assert [["house"]] * 4 == [each.ads for each in answers]
    assert 2 == len(ads.seen("/fragile"))
    proxy.wait_record(event="request", route="/fragile", waterfall=["fragile:breaker", "house:ad"])
    lines = proxy.records(event="request", route="/fragile")
    assert [0, 1, 0, 0] == [len(each.get("breaker", ())) for each in lines]
    assert lines[1]["breaker"][0].startswith("fragile closed->open: ")
    assert ["fallback", "breaker_open"] == lines[3]["flags"]
    wait_for(lambda: 2 == budget(proxy, "fragile")["errors"])
