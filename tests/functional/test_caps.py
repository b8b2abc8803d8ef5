"""No viewer is shown more ads than the caps allow, however many requests come at one time."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    a_pod,
    an_ad,
    metric,
    patience,
    viewer,
    wait_for,
)
from tests.support.ad_server import AdServer, Reply
from tests.support.player import Answered, Player
from tests.support.proxy import Proxy, a_config

CAP = 3

WINDOW = 3.0
"""Seconds: long enough for what has to be asked within it on a machine that has other work."""

RESERVATION = 3.0
"""Seconds that an ad waits for its impression: 200 requests must be over by then."""

MARGIN = 0.05
"""Seconds: a rolling window counts a thousandth of it longer, and clocks have milliseconds."""

LONG = {"viewer": ["query:uid"], "deadline": "20s"}
"""Of every route here: so many requests at one time take a while."""

WORKERS = {"memory": 1, "sqlite": 1, "redis": 2, "cluster": 2, "postgresql": 2}


@pytest.fixture(autouse=True)
def some_ads(ads: AdServer) -> None:
    """Let the main ad server and the house's have an ad each."""
    ads.replies["/main"] = Reply(a_document(an_ad("main")))
    ads.replies["/house"] = Reply(a_document(an_ad("house")))


def upstreams(ad_server: AdServer) -> dict[str, Any]:
    """Build two upstreams that wait as long as it takes."""
    return {
        name: {"endpoint": ad_server.url(f"/{name}"), "timeout": "15s"}
        for name in ("main", "house")
    }


def capped(path: str, *caps: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Build a route with *caps*, to the main ad server unless told otherwise."""
    route = {"path": path, "upstreams": ["main"], "frequency_caps": list(caps), **LONG}
    return {**route, "reservation_ttl": f"{RESERVATION:g}s", **more}


def rolling(limit: int = CAP, **more: Any) -> dict[str, Any]:
    """Build a cap of *limit* ads within WINDOW."""
    return {"limit": limit, "window": f"{WINDOW:g}s", **more}


@pytest.fixture(scope="module", params=WORKERS)
def shared(
    request: pytest.FixtureRequest,
    ad_server: AdServer,
    states: States,
    start_module_proxy: StartProxy,
) -> Iterator[Proxy]:
    """Run a proxy over each kind of state, with two workers where they can share it."""
    kind = request.param
    server = {"workers": WORKERS[kind], "secret": [SECRET]}
    routes = [
        capped("/capped", rolling()),
        capped("/house", rolling(upstreams=["main"]), upstreams=["main", "house"]),
    ]
    proxy = start_module_proxy(
        a_config(
            upstreams(ad_server),
            routes,
            state=states.url(kind),
            server=server,
            **patience(kind),
        )
    )
    if WORKERS[kind] > 1:
        wait_for(lambda: WORKERS[kind] == len(proxy.records(event="worker.ready")))
    yield proxy
    proxy.stop()


def count(answers: Sequence[Answered]) -> dict[str, int]:
    """Count the answers by the ad in them."""
    found = [",".join(each.ads) for each in answers]
    return {each: found.count(each) for each in set(found)}


def flags(proxy: Proxy, route: str) -> set[str]:
    """Give all flags of the access log for *route*."""
    return {flag for each in proxy.records(event="request", route=route) for flag in each["flags"]}


async def wait_until(moment: float) -> None:
    """Wait until *moment* on the monotonic clock: here time itself is what is waited for."""
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


async def test_cap_under_concurrency(shared: Proxy) -> None:
    """
    Of 200 requests at one time exactly three get an ad, and all get valid VAST.

    Shown ads count until the window ends; those that were never shown, for the reservation's time.
    """
    async with Player(shared.base) as player:
        shown = await player.ask_at_once("/capped?uid=a", 200)
        unseen = await player.ask_at_once("/capped?uid=b", 50)
        fired = await player.fire(url for each in shown for url in each.beacons)
        over = time.monotonic() + max(WINDOW, RESERVATION) + MARGIN
        within = await player.ask_at_once("/capped?uid=a", 20)
        await wait_until(over)
        again = await player.ask_at_once("/capped?uid=a", 200)
        freed = await player.ask_at_once("/capped?uid=b", 50)

    assert not {"state_away", "internal_error"} & flags(shared, "/capped")
    assert {"main": 3, "": 197} == count(shown) == count(again)
    assert {"main": 3, "": 47} == count(unseen) == count(freed)
    assert [204] * 3 == [each.status for each in fired]
    assert {"": 20} == count(within)
    assert all(each.is_vast for each in (*shown, *unseen, *within, *again, *freed))


async def test_house_ads_fill_in(shared: Proxy) -> None:
    """What the cap has no room for is filled by an upstream that the cap does not cover."""
    async with Player(shared.base) as player:
        viewers = await asyncio.gather(
            *(player.ask_at_once(f"/house?uid={each}", 60) for each in ("b", "c", "d%20d"))
        )

    assert "state_away" not in flags(shared, "/house")
    assert [{"main": 3, "house": 57}] * 3 == [count(each) for each in viewers]
    assert {3} == {sum(len(each.beacons) for each in answers) for answers in viewers}


@pytest.fixture(scope="module")
def proxy(ad_server: AdServer, start_module_proxy: StartProxy) -> Proxy:
    """Run a proxy in memory that has a route for each kind of cap."""
    routes = [
        capped("/fixed", {"limit": 2, "kind": "fixed", "window": "2s"}),
        capped("/decision", rolling(2, count_at="decision", kind="lifetime", window=None)),
        *(capped(f"/{by}", {"limit": 1, "kind": "lifetime", "by": by}) for by in SUBJECTS),
        capped("/pod-advertiser", {"limit": 1, "kind": "pod", "by": "advertiser"}),
        capped("/pod", {"limit": 2, "kind": "pod"}),
        capped("/shadow", rolling(1, mode="shadow", count_at="decision")),
        capped("/off", rolling(1, mode="off")),
        capped("/skip", rolling(when_unknown="skip")),
        capped("/serve", rolling(1, when_unknown="serve")),
        capped("/passthrough", rolling(2), mode="passthrough"),
        capped("/never", {"limit": 0, "kind": "lifetime"}),
        capped("/one", {"limit": 2, "kind": "lifetime", "name": "together"}),
        capped("/other", {"limit": 2, "kind": "lifetime", "name": "together"}),
        capped("/both", rolling(2), {"limit": 3, "kind": "calendar", "window": "month"}),
        capped("/header", rolling(1), viewer=["header:X-Viewer", "cookie:uid"]),
        capped("/impatient", {"limit": 1, "kind": "lifetime", "reservation_ttl": "24h"}),
    ]
    return start_module_proxy(a_config(upstreams(ad_server), routes, log={"level": "debug"}))


SUBJECTS = ("advertiser", "creative", "ad")


async def show(player: Player, target: str) -> list[str]:
    """Ask for *target*, show its ads, and give their ids."""
    answered = await player.ask(target)
    await player.fire(answered.beacons)

    assert answered.is_vast
    return answered.ads


async def test_fixed_window(proxy: Proxy) -> None:
    """Kind fixed counts from the first ad on: at the end of its time all of them are over."""
    async with Player(proxy.base) as player:
        began = time.monotonic()
        first = await show(player, "/fixed?uid=v")
        await wait_until(began + 1.0)
        second = [await show(player, "/fixed?uid=v") for _ in range(2)]
        # Of a rolling window, the second ad would still count.
        await wait_until(began + 2.0 + MARGIN + RESERVATION / 10)
        anew = [await show(player, "/fixed?uid=v") for _ in range(3)]

    assert (["main"], [["main"], []]) == (first, second)
    assert [["main"], ["main"], []] == anew


async def test_count_at_decision(proxy: Proxy) -> None:
    """With count_at decision an ad has no beacon, and counts when it is answered."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/decision?uid=decided", 100)
    [cap] = viewer(proxy, "decided")["caps"]

    assert {"main": 2, "": 98} == count(answers)
    assert [] == [url for each in answers for url in each.beacons]
    assert (2, 0) == (cap["counted"], cap["reserved"])


@pytest.mark.parametrize("by", SUBJECTS)
async def test_spare_takes_the_place(proxy: Proxy, ads: AdServer, by: str) -> None:
    """An ad that is too many of its kind is left out, and a stand-alone one takes its place."""
    ads.replies["/main"] = Reply(
        a_document(
            an_ad("first", advertiser="Acme", creative="c-1"),
            an_ad("second", advertiser="Other", creative="c-2"),
        )
    )
    async with Player(proxy.base) as player:
        seen = [await show(player, f"/{by}?uid={by}") for _ in range(3)]
        somebody = await show(player, f"/{by}?uid=somebody-else")

    assert [["first"], ["second"], []] == seen
    assert ["first"] == somebody


async def test_spares_under_concurrency(proxy: Proxy, ads: AdServer) -> None:
    """Of a hundred requests at one time each of three advertisers is shown once, and no more."""
    ads.replies["/main"] = Reply(
        a_document(*(an_ad(each, advertiser=f"of {each}") for each in ("a", "b", "c")))
    )
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/advertiser?uid=crowd", 100)

    assert {"a": 1, "b": 1, "c": 1, "": 97} == count(answers)


async def test_caps_within_an_answer(proxy: Proxy, ads: AdServer) -> None:
    """Kind pod bounds one answer, by advertiser or in all, and nothing is kept of it."""
    pod = [
        an_ad(f"ad-{each}", sequence=each, advertiser="Acme" if each < 3 else "Other")
        for each in (1, 2, 3)
    ]
    ads.replies["/main"] = Reply(a_document(*pod))
    async with Player(proxy.base) as player:
        by_advertiser = [await player.ask("/pod-advertiser?uid=v") for _ in range(3)]
        in_all = [await player.ask("/pod") for _ in range(3)]

    assert [["ad-1", "ad-3"]] * 3 == [each.ads for each in by_advertiser]
    assert [["ad-1", "ad-2"]] * 3 == [each.ads for each in in_all]
    assert [[]] * 6 == [each.beacons for each in (*by_advertiser, *in_all)]


async def test_viewer_cap_cuts_a_pod(proxy: Proxy, ads: AdServer) -> None:
    """Each ad of a pod counts by itself, so a cap may cut it in the middle."""
    ads.replies["/main"] = Reply(a_pod(5))
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/both?uid=pod", 20)
    served = [each.ads for each in answers if each.ads]

    assert 2 == sum(map(len, served))
    assert 2 == sum(len(each.beacons) for each in answers)


async def test_shadow(proxy: Proxy) -> None:
    """Mode shadow serves everything, and says in log and metrics what it would have left out."""
    before = metric(proxy, "vastproxy_capped_total", route="/shadow", kind="cap", mode="shadow")
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/shadow?uid=v", 30)
        answers_of_off = await player.ask_at_once("/off?uid=v", 30)
    told = proxy.records(event="request", route="/shadow")

    assert {"main": 30} == count(answers) == count(answers_of_off)
    assert 29 == len([each for each in told if "shadow_capped" in each["flags"]])
    assert 29 == len([each for each in told if "(shadow)" in str(each.get("refused"))])
    assert before + 29 == metric(
        proxy, "vastproxy_capped_total", route="/shadow", kind="cap", mode="shadow"
    )
    assert 0 == metric(proxy, "vastproxy_capped_total", route="/off")


@pytest.mark.parametrize("unknown", ["", "?uid=", "?other=1"])
async def test_unknown_viewer(proxy: Proxy, unknown: str) -> None:
    """Nobody's ads are served uncounted, or left out without asking, as when_unknown says."""
    async with Player(proxy.base) as player:
        left_out = await player.ask_at_once(f"/skip{unknown}", 5)
        served = await player.ask_at_once(f"/serve{unknown}", 5)

    assert {"": 5} == count(left_out)
    assert {"main": 5} == count(served)
    assert [] == [url for each in served for url in each.beacons]


async def test_passthrough(proxy: Proxy) -> None:
    """A document that is passed through gets a beacon, is else unchanged, and is capped."""
    document = a_document(an_ad("main"))
    async with Player(proxy.base) as player:
        first = await player.ask("/passthrough?uid=v")
        await player.fire(first.beacons)
        answers = await player.ask_at_once("/passthrough?uid=v", 50)
    [url] = first.beacons
    beacon = f'<Impression id="vastproxy"><![CDATA[{url}]]></Impression>'.encode()

    assert document == first.body.replace(beacon, b"")
    assert {"main": 1, "": 49} == count(answers)
    assert all(each.is_vast for each in answers)


async def test_limit_of_zero(proxy: Proxy, ads: AdServer) -> None:
    """A cap of no ads serves none, and nobody is asked for any."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/never?uid=v", 5)

    assert {"": 5} == count(answers)
    assert [] == ads.seen("/main")


async def test_cap_of_two_routes(proxy: Proxy) -> None:
    """Caps of one name on two routes count together."""
    async with Player(proxy.base) as player:
        seen = await asyncio.gather(
            player.ask_at_once("/one?uid=v", 30), player.ask_at_once("/other?uid=v", 30)
        )
        for each in (*seen[0], *seen[1]):
            await player.fire(each.beacons)
        after = [await player.ask(f"{path}?uid=v") for path in ("/one", "/other")]

    assert 2 == sum(bool(each.ads) for answers in seen for each in answers)
    assert {"": 2} == count(after)


async def test_several_caps_at_once(proxy: Proxy) -> None:
    """All caps of a route hold: the shorter one frees its place, the longer one still has none."""
    async with Player(proxy.base) as player:
        first = [await show(player, "/both?uid=several") for _ in range(3)]
        shown_by = time.monotonic()
        await wait_until(shown_by + WINDOW + MARGIN)
        later = [await show(player, "/both?uid=several") for _ in range(2)]
    caps = {each["window"]: each["counted"] for each in viewer(proxy, "several")["caps"]}

    assert [["main"], ["main"], []] == first
    assert [["main"], []] == later
    assert 3 == caps["in a month (UTC)"]


async def test_viewers_by_header_and_cookie(proxy: Proxy) -> None:
    """A viewer is who the first of the route's places names, and nobody shares with another."""
    asked = [{"X-Viewer": "a"}, {"X-Viewer": "b"}, {"Cookie": "uid=c"}, {"Cookie": "uid=a"}]
    async with Player(proxy.base) as player:
        answers = [await player.ask("/header", each) for each in asked]

    assert [["main"], ["main"], ["main"], []] == [each.ads for each in answers]


async def test_room_of_what_came_to_nothing(proxy: Proxy, ads: AdServer) -> None:
    """Where the ad server has no ad after all, the place that was kept for it is free at once."""
    ads.replies["/main"] = Reply(b'<VAST version="3.0"/>')
    async with Player(proxy.base) as player:
        nothing = await player.ask_at_once("/impatient?uid=v", 20)
        ads.replies["/main"] = Reply(status=500)
        failed = await player.ask_at_once("/impatient?uid=v", 20)
        ads.replies["/main"] = Reply(a_document(an_ad("main")))
        there = await player.ask("/impatient?uid=v")

    assert {"": 20} == count(nothing) == count(failed)
    assert ["main"] == there.ads
