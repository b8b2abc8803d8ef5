"""
An upstream is asked as often as the operator says, and no more; who is refused asks the next one.

Promise: of 1,000 ad requests a second, a limit of 100/s lets 500 in five seconds reach the ad
server, within 5 %, and evenly; for one process, for two workers, and for two proxies together.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    an_ad,
    metric,
    wait_for,
)
from tests.support.ad_server import AdServer, Received, Reply
from tests.support.player import Answered, Player, traffic
from tests.support.proxy import Proxy, a_config, ask

LIMIT = 100
"""Calls a second."""

ASKED = 1000
"""Ad requests a second."""

SECONDS = 5.0

WITHIN = 0.05
"""Share by which the rate of calls may differ from the limit."""

SLOT = 0.5
"""Seconds in which calls are counted, to see whether they come evenly."""

UNEVEN = 0.5
"""Share by which the calls in one slot may differ, on a machine with other work. A limit that
counted whole seconds would let all of them through in the first, and none in the second."""

TRIES = 3
"""One of them has to be even: the machine has other work, and may not ask so often."""

CONNECTIONS = 64
"""So many that each of two workers has a part."""

BOUND = 10
"""Calls under way at one time."""

AN_AD = Reply(a_document(an_ad("main")))


def a_limited_config(ad_server: AdServer, **more: Any) -> dict[str, Any]:
    """Build a config with an upstream of LIMIT, and one that has everything at hand."""
    share = more.pop("share", False)
    off = {"circuit_breaker": {"mode": "off"}, "timeout": "10s"}
    limit = {"rate": f"{LIMIT}/s", "share": share}
    upstreams = {
        "main": {"endpoint": ad_server.url("/main"), "rate_limit": limit, **off},
        "house": {"endpoint": ad_server.url("/house"), "cache": {"scope": "shared"}, **off},
        "bound": {
            "endpoint": ad_server.url("/bound"),
            "rate_limit": {"rate": "1000/s", "burst": 1000, "share": share},
            "max_requests_in_flight": BOUND,
            **off,
        },
    }
    routes = [
        {"path": "/ad", "upstreams": ["main", "house"], "deadline": "10s"},
        {"path": "/bound", "upstreams": ["bound", "house"], "deadline": "10s"},
    ]
    return a_config(upstreams, routes, **more)


@pytest.fixture(autouse=True)
def some_ads(ads: AdServer) -> None:
    """Let both ad servers have an ad."""
    ads.replies |= {"/main": AN_AD, "/house": Reply(a_document(an_ad("house")))}


@pytest.fixture(params=["alone", "workers", "shared"])
def proxies(
    request: pytest.FixtureRequest, ad_server: AdServer, states: States, start_proxy: StartProxy
) -> list[Proxy]:
    """Run one proxy, one with two workers, or two proxies that share the rate."""
    if request.param == "alone":
        return [start_proxy(a_limited_config(ad_server))]
    config = a_limited_config(ad_server, state=states.url("redis"), state_timeout="250ms")
    if request.param == "workers":
        proxy = start_proxy({**config, "server": {"workers": 2, "secret": [SECRET]}})
        wait_for(lambda: 2 == len(proxy.records(event="worker.ready")))
        return [proxy]
    more = {"state": config["state"], "server": {"secret": [SECRET]}}
    shared = a_limited_config(ad_server, share=True, **more)
    return [start_proxy(shared) for _ in range(2)]


async def ask_for(proxies: Sequence[Proxy], seconds: float) -> list[Answered]:
    """Ask *proxies* for ads, ASKED times a second in all, whether or not answers come."""
    async with AsyncExitStack() as stack:
        players = [await stack.enter_async_context(Player(each.base)) for each in proxies]
        # First as many connections as there shall be, with what is answered at once.
        warm = (each.ask_at_once("/ad", CONNECTIONS) for each in players)
        await asyncio.gather(*warm)
        await asyncio.sleep(SLOT)
        rate = ASKED / len(proxies)
        asking = (traffic(each, ["/ad"], rate=rate, seconds=seconds) for each in players)
        return list(chain.from_iterable(await asyncio.gather(*asking)))


@dataclass(frozen=True, slots=True)
class Seen:
    """The calls that an ad server has *seen* since asking *began*."""

    calls: Sequence[Received]
    began: float

    @property
    def seconds(self) -> float:
        """How long that took: on a machine with other work, longer than it was meant to."""
        return self.calls[-1].at - self.began

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.calls) / self.seconds

    @property
    def slots(self) -> list[int]:
        """How many calls came in each slot."""
        counted = Counter(int((each.at - self.began) / SLOT) for each in self.calls)
        return [counted[at] for at in range(int(self.seconds / SLOT))]

    @property
    def is_even(self) -> bool:
        """Whether there are as many calls as there may be, and in each slot."""
        least, most = (share * LIMIT * SLOT for share in (1 - UNEVEN, 1 + UNEVEN))
        return self.rate >= (1 - WITHIN) * LIMIT and all(least <= n <= most for n in self.slots)


async def test_rate(proxies: list[Proxy], ads: AdServer) -> None:
    """Ten times too many requests make as many calls as there may be, evenly; all have an ad."""
    for _ in range(TRIES):
        answers = await ask_for(proxies, SECONDS)
        began = min(each.at for each in answers)
        seen = Seen([each for each in ads.seen("/main") if each.at >= began], began)
        if seen.is_even:
            break

    assert seen.is_even
    assert seen.rate <= (1 + WITHIN) * LIMIT
    ad = Counter(each.ads[0] for each in answers)
    assert {"main": len(seen.calls), "house": len(answers) - len(seen.calls)} == ad


async def test_refused_calls_are_told(
    ad_server: AdServer, ads: AdServer, start_proxy: StartProxy
) -> None:
    """Operators see how many calls were refused, and the log says it of each request."""
    proxy = start_proxy(a_limited_config(ad_server))
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/ad", 2 * LIMIT)

    refused = sum(each.ads == ["house"] for each in answers)
    assert 2 * LIMIT == refused + len(ads.seen("/main"))
    assert refused > LIMIT
    main = ask(proxy.admin, "/api/upstreams/main").json()
    assert {"rate": LIMIT, "burst": LIMIT // 10, "shared": False, "refused": refused} == (
        main["rate_limit"]
    )
    assert refused == main["calls"]["rate_limit"]
    name = "vastproxy_upstream_calls_total"
    assert refused == metric(proxy, name, upstream="main", result="rate_limit")
    wait_for(lambda: 2 * LIMIT == len(proxy.records(event="request")))
    lines = proxy.records(event="request", waterfall=["main:rate_limit", "house:ad"])
    assert refused == len(lines)
    assert {True} == {"rate_limited" in each["flags"] for each in lines}


@pytest.mark.parametrize("share", [False, True])
async def test_bound_holds_beside_a_rate(
    ad_server: AdServer, ads: AdServer, states: States, start_proxy: StartProxy, *, share: bool
) -> None:
    """No more calls are under way than there may be, also where each asks Redis for its turn."""
    under_way = most = 0

    async def answered(_: Received) -> Reply:
        """Answer after a while, and count who waits."""
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.3)
        under_way -= 1
        return AN_AD

    ads.replies["/bound"] = answered
    more = {"state": states.url("redis"), "server": {"secret": [SECRET]}}
    proxy = start_proxy(a_limited_config(ad_server, share=share, **more))
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/bound", 10 * BOUND)

    assert BOUND == most
    assert 10 * BOUND == sum(len(each.ads) for each in answers)
