"""
Players that disconnect: nobody waits for them, and nobody is blamed.

Promises: an ad server that hangs while players leave is no failing one; what was reserved for them
is free at once; beacons count, whether or not anybody waits for their answers.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    an_ad,
    budget,
    metric,
    viewer,
    wait_for,
)
from tests.support.ad_server import AdServer, Reply
from tests.support.player import Player
from tests.support.proxy import Proxy, a_config, ask

PLAYERS = 300
"""Far more than the failures that open a breaker."""

PRICE = 0.25
"""Of an ad."""

HANGS = Reply(b"", delay=60)

POD = """<VAST version="3.0">{ads}<Ad id="stand-in"><Wrapper><AdSystem>S</AdSystem>
<VASTAdTagURI>{url}</VASTAdTagURI><Impression>http://127.0.0.1/</Impression></Wrapper></Ad></VAST>"""


def a_route(path: str, **more: Any) -> dict[str, Any]:
    """Build a route that counts, and waits for longer than any test."""
    return {
        "path": path,
        "upstreams": [path.strip("/")],
        "deadline": "50s",
        "viewer": ["query:uid"],
        "frequency_caps": [{"limit": 5, "window": "1h"}],
        "budget": {"campaign": path.strip("/"), "limit": PLAYERS, "amount": PRICE},
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
    names = ("hanging", "pod", "shown")
    upstreams = {each: {"endpoint": ad_server.url(f"/{each}"), "timeout": "50s"} for each in names}
    both = [{"limit": 5, "window": "1h"}, {"limit": 1, "kind": "pod", "by": "advertiser"}]
    routes = [a_route("/hanging"), a_route("/pod", frequency_caps=both), a_route("/shown")]
    state = {"state": states.url(request.param), "state_timeout": "1s"}
    running = start_module_proxy(
        a_config(upstreams, routes, **state) | {"server": {"secret": [SECRET]}}
    )
    yield running
    running.stop()


@contextlib.asynccontextmanager
async def leaving(proxy: Proxy, route: str, count: int) -> AsyncIterator[None]:
    """Let *count* viewers ask for an ad of *route*, and disconnect where the block ends."""
    async with Player(proxy.base) as player, asyncio.TaskGroup() as group:
        asking = [group.create_task(player.ask(f"{route}?uid=v{each}")) for each in range(count)]
        yield
        for each in asking:
            each.cancel()


def seen(ads: AdServer, path: str, count: int) -> None:
    """Wait until *path* was asked for *count* times."""
    wait_for(lambda: count == len(ads.seen(path)))


def upstream(proxy: Proxy, name: str) -> dict[str, Any]:
    """Give what operators are told of an upstream."""
    told: dict[str, Any] = ask(proxy.admin, f"/api/upstreams/{name}").json()
    return told


def reserved(proxy: Proxy, route: str, uid: str) -> tuple[float, float]:
    """Give how much is reserved: places of the viewer *uid*, and money of the route's campaign."""
    caps = viewer(proxy, uid)["caps"]
    places = sum(each["reserved"] for each in caps if each["cap"] == route)
    return places, budget(proxy, route.strip("/"))["reserved"]


async def test_nobody_is_blamed(proxy: Proxy, ads: AdServer) -> None:
    """Hundreds of players leave an ad server that hangs: its breaker has nothing against it."""
    ads.replies["/hanging"] = HANGS
    async with leaving(proxy, "/hanging", PLAYERS):
        await asyncio.to_thread(seen, ads, "/hanging", PLAYERS)
        during = upstream(proxy, "hanging")["in_flight"], reserved(proxy, "/hanging", "v7")
    wait_for(lambda: 0 == upstream(proxy, "hanging")["in_flight"])
    told = upstream(proxy, "hanging")
    ads.replies["/hanging"] = a_document(an_ad("back"))
    async with Player(proxy.base) as player:
        after = await player.ask("/hanging?uid=after")

    assert (PLAYERS, (1, 0)) == during
    assert ("closed", 0) == (told["breaker"]["state"], told["breaker"]["failures_in_a_row"])
    assert {0} == {told["breaker"]["window"][each] for each in ("calls", "failures", "slow")}
    assert (0, 0, PLAYERS) == tuple(told["calls"][each] for each in ("ok", "failed", "neutral"))
    assert ["back"] == after.ads


async def test_nothing_stays_reserved(proxy: Proxy, ads: AdServer) -> None:
    """What was reserved for players that leave is free at once, also the money for ads they had."""
    ads.replies["/stand-in"] = HANGS
    pair = [an_ad(f"ad-{each}", sequence=each, advertiser="acme") for each in (1, 2)]
    ads.replies["/pod"] = POD.format(ads="".join(pair), url=ads.url("/stand-in")).encode()
    async with leaving(proxy, "/pod", PLAYERS):
        # The first ad has its place and its money when something else than the second is wanted.
        await asyncio.to_thread(seen, ads, "/stand-in", PLAYERS)
        during = reserved(proxy, "/pod", "v7")
    wait_for(lambda: (0, 0) == reserved(proxy, "/pod", "v7"))
    wait_for(lambda: not any(reserved(proxy, "/pod", f"v{each}")[0] for each in range(PLAYERS)))
    told = ask(proxy.admin, "/api/upstreams?all=1").json()
    [host] = [each for each in told["hosts"] if each["name"] == f"127.0.0.1:{ads.port}"]

    assert (1, PLAYERS * PRICE) == during
    assert (0, "closed", 0) == (
        host["in_flight"],
        host["breaker"]["state"],
        host["breaker"]["window"]["failures"],
    )
    assert 0 == budget(proxy, "pod")["spent"]


async def test_lines_and_numbers(proxy: Proxy, ads: AdServer) -> None:
    """Each request that nobody waited for has a line of its own, and is counted as one."""
    ads.replies["/shown"] = HANGS
    async with leaving(proxy, "/shown", 20):
        await asyncio.to_thread(seen, ads, "/shown", 20)
    wait_for(lambda: 20 == len(proxy.records(event="request", route="/shown")))
    lines = proxy.records(event="request", route="/shown")

    assert {("gone",)} == {tuple(each["flags"]) for each in lines}
    assert {(None, 0)} == {(each["status"], each["ads"]) for each in lines}
    assert 20 == metric(proxy, "vastproxy_requests_total", route="/shown", outcome="gone")
    assert [] == proxy.records(level="error")


async def leave_at_once(url: str) -> None:
    """Send a beacon, and close the connection without waiting for anything."""
    where = urlsplit(url)
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(f"GET {where.path} HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
    writer.close()
    await writer.wait_closed()


async def test_beacons_count_all_the_same(proxy: Proxy, ads: AdServer) -> None:
    """A beacon counts whose player has gone before it is answered, once, and is told as counted."""
    ads.replies["/shown"] = a_document(an_ad("shown"))
    before = metric(proxy, "vastproxy_beacons_total", result="counted")
    async with Player(proxy.base) as player:
        answers = [await player.ask(f"/shown?uid=shown{each}") for each in range(50)]
    urls = [url for each in answers for url in each.beacons]
    await asyncio.gather(*(leave_at_once(each) for each in urls))
    wait_for(lambda: 0 == budget(proxy, "shown")["reserved"])
    counted = {reserved_and_counted(proxy, f"shown{each}") for each in range(50)}
    wait_for(lambda: 50 == metric(proxy, "vastproxy_beacons_total", result="counted") - before)

    assert 50 == len(urls)
    assert 50 * PRICE == budget(proxy, "shown")["spent"]
    assert {(0, 1)} == counted


def reserved_and_counted(proxy: Proxy, uid: str) -> tuple[int, int]:
    """Give how many ads of the route /shown are reserved and counted for the viewer *uid*."""
    [cap] = [each for each in viewer(proxy, uid)["caps"] if each["cap"] == "/shown"]
    return cap["reserved"], cap["counted"]
