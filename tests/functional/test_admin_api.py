"""Operators are told budgets, viewers and upstreams as JSON; a wrong question gets a reason."""

from typing import Any

import pytest

from tests.functional.conftest import (
    HOSTS,
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
from tests.support.documents import a_wrapper
from tests.support.player import Player
from tests.support.proxy import Answer, Proxy, a_config, ask


@pytest.fixture(scope="module")
def proxy(ad_server: AdServer, start_module_proxy: StartProxy) -> Proxy:
    """Run a proxy in memory with caps of each kind and two campaigns."""
    caps = [
        {"limit": 2, "window": "1h", "name": "hourly"},
        {"limit": 5, "kind": "calendar", "window": "day", "time_zone": "Europe/Berlin"},
        {"limit": 9, "kind": "lifetime", "by": "advertiser", "name": "acme:ever"},
        {"limit": 3, "kind": "fixed", "window": "1m", "by": "creative"},
    ]
    routes: list[dict[str, Any]] = [
        {"path": "/capped", "upstreams": ["main"], "viewer": ["query:uid"], "frequency_caps": caps},
        {
            "path": "/spring",
            "upstreams": ["main"],
            "budget": {"campaign": "spring:2026", "limit": "0.30", "amount": "0.10"},
        },
        {
            "path": "/autumn",
            "upstreams": ["main"],
            "budget": {
                "campaign": "autumn",
                "limit": "9000000000",
                "amount": "0.000001",
                "currency": "EUR",
                "mode": "shadow",
            },
        },
    ]
    config = a_config({"main": ad_server.url("/ad")}, routes)
    return start_module_proxy(config | {"server": {"secret": [SECRET]}})


@pytest.fixture(autouse=True)
def an_ad_of_acme(ads: AdServer) -> None:
    """Let the ad server have an ad that says whose it is."""
    ads.replies["/ad"] = Reply(
        a_document(an_ad("main", advertiser="Acme Inc. | 50% off / é", creative="c" * 60))
    )


async def show(proxy: Proxy, target: str, *, fire: bool = True) -> None:
    """Ask for an ad, and show it if told to."""
    async with Player(proxy.base) as player:
        answered = await player.ask(target)
        await player.fire(answered.beacons if fire else [])

    assert ["main"] == answered.ads


async def test_budgets(proxy: Proxy) -> None:
    """All campaigns are told, with what is spent, reserved and left, in units of currency."""
    await show(proxy, "/spring")
    await show(proxy, "/spring", fire=False)
    await show(proxy, "/autumn")
    told = ask(proxy.admin, "/api/budgets")
    spring = {
        "campaign": "spring:2026",
        "currency": "USD",
        "mode": "enforce",
        "spent": 0.1,
        "reserved": 0.1,
        "limit": 0.3,
        "remaining": 0.1,
        "percentage": 33.3333,
        "routes": ["/spring"],
        "errors": 0,
    }

    assert ["application/json; charset=utf-8"] == told.values("Content-Type")
    assert spring == budget(proxy, "spring:2026")
    assert [spring, budget(proxy, "autumn")] == told.json()["budgets"]
    assert (1e-06, 9_000_000_000, "EUR", "shadow") == tuple(
        budget(proxy, "autumn")[each] for each in ("spent", "limit", "currency", "mode")
    )


async def test_caps_of_a_viewer(proxy: Proxy) -> None:
    """Every counter of a viewer is told, with its window, and what it counts by."""
    await show(proxy, "/capped?uid=v")
    await show(proxy, "/capped?uid=v", fire=False)
    told = viewer(proxy, "v")
    caps = {each["by"] + " " + each["window"]: each for each in told["caps"]}

    assert {
        "viewer within 3600 s": ("hourly", 2, 1, 1),
        "viewer in a day (Europe/Berlin)": ("/capped", 5, 1, 1),
        "advertiser ever": ("acme:ever", 9, 1, 1),
        "creative in 60 s from the first": ("/capped", 3, 1, 1),
    } == {
        name: (each["cap"], each["limit"], each["counted"], each["reserved"])
        for name, each in caps.items()
    }
    assert [] == told["cookies"]
    assert "|" not in caps["advertiser ever"]["subject"]


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "%20", "%C3%A9", "a%3Fb", "a+b"])
async def test_names_of_viewers(proxy: Proxy, name: str) -> None:
    """A viewer's id may hold anything, as it stands in the player's query."""
    await show(proxy, f"/capped?uid={name.replace('+', '%2B')}")
    counted = [each["counted"] for each in viewer(proxy, name)["caps"]]
    forgotten = ask(proxy.admin, f"/api/viewers/{name}", method="DELETE").json()

    assert [1, 1, 1, 1] == counted
    assert {"forgotten": True} == forgotten
    assert {"caps": [], "cookies": []} == viewer(proxy, name)


async def test_forgotten_viewer_may_see_ads_again(proxy: Proxy) -> None:
    """Who is forgotten has all places free, and a beacon from before counts as it came."""
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/capped?uid=f", 4)
        ask(proxy.admin, "/api/viewers/f", method="DELETE")
        await player.fire(url for each in answers for url in each.beacons)
        again = await player.ask_at_once("/capped?uid=f", 4)

    assert 2 == sum(bool(each.ads) for each in answers)
    assert [2] == [each["counted"] for each in viewer(proxy, "f")["caps"] if each["limit"] == 2]
    assert 0 == sum(bool(each.ads) for each in again)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/budgets/winter", 404),
        ("GET", "/api/budgets/", 404),
        ("GET", "/api/viewers", 404),
        ("GET", "/api/viewers/", 404),
        ("POST", "/api/budgets", 405),
        ("DELETE", "/api/budgets/autumn", 405),
        ("POST", "/api/viewers/v", 405),
    ],
)
def test_wrong_questions(proxy: Proxy, method: str, path: str, status: int) -> None:
    """What is not there is 404, what may not be done is 405, and nothing is 500."""
    assert status == ask(proxy.admin, path, method=method).status


def test_unknown_campaign_says_so(proxy: Proxy) -> None:
    """The answer about a campaign that no route has names it."""
    assert {"error": "no route has a budget of the campaign 'winter'"} == ask(
        proxy.admin, "/api/budgets/winter"
    ).json()


def test_not_for_players(proxy: Proxy) -> None:
    """The player's side knows nothing of the operators'."""
    statuses = {proxy.get(each).status for each in ("/api/budgets", "/api/viewers/v", "/metrics")}

    assert {404} == statuses


async def test_metrics(proxy: Proxy) -> None:
    """Caps, budgets and beacons are counted for Prometheus."""
    before = [metric(proxy, name, **labels) for name, labels in METRICS]
    await show(proxy, "/capped?uid=m")
    await show(proxy, "/capped?uid=m")
    async with Player(proxy.base) as player:
        await player.ask("/capped?uid=m")
    after = [metric(proxy, name, **labels) for name, labels in METRICS]

    assert [2, 1, 2] == [now - then for now, then in zip(after, before, strict=True)]
    assert (1, 0) == (
        metric(proxy, "vastproxy_state_up"),
        metric(proxy, "vastproxy_journal_pending"),
    )


METRICS: list[tuple[str, dict[str, str]]] = [
    ("vastproxy_ads_total", {"route": "/capped"}),
    ("vastproxy_capped_total", {"route": "/capped", "kind": "cap", "mode": "enforce"}),
    ("vastproxy_beacons_total", {"result": "counted"}),
]


async def test_reload_keeps_what_was_counted(proxy: Proxy) -> None:
    """A reload of the config changes no counter, and the new limits hold at once."""
    spent = budget(proxy, "autumn")["spent"]
    await show(proxy, "/capped?uid=reload")
    text = proxy.path.read_text()
    proxy.path.write_text(text.replace("limit: 2\n", "limit: 1\n"))
    proxy.reload({})
    proxy.wait_record(event="reloaded")
    async with Player(proxy.base) as player:
        capped = await player.ask("/capped?uid=reload")
    hourly = [each for each in viewer(proxy, "reload")["caps"] if each["cap"] == "hourly"]

    assert [] == capped.ads
    assert [(1, 1)] == [(each["counted"], each["limit"]) for each in hourly]
    assert spent == budget(proxy, "autumn")["spent"]


async def test_several_workers(ads: AdServer, states: States, start_proxy: StartProxy) -> None:
    """Of several workers, operators are told what all of them counted, and can forget it."""
    route = {
        "path": "/both",
        "upstreams": ["main"],
        "viewer": ["query:uid"],
        "frequency_caps": [{"limit": 30, "window": "1h"}],
        "budget": {"campaign": "both", "limit": "1", "amount": "0.01"},
    }
    proxy = start_proxy(
        a_config(
            {"main": ads.url("/ad")},
            [route],
            state=states.url("redis"),
            server={"workers": 2, "secret": [SECRET]},
        )
    )
    wait_for(lambda: 2 == len(proxy.records(event="worker.ready")))
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once("/both?uid=v", 60)
        await player.fire(url for each in answers for url in each.beacons)
    told = budget(proxy, "both"), viewer(proxy, "v")["caps"]
    forgotten = ask(proxy.admin, "/api/viewers/v", method="DELETE").json()

    assert {1, 2} == {each["worker"] for each in proxy.records(event="request")}
    assert (0.3, 0.7, 0) == tuple(told[0][each] for each in ("spent", "remaining", "reserved"))
    assert [(30, 0)] == [(each["counted"], each["reserved"]) for each in told[1]]
    assert {"forgotten": True} == forgotten
    assert [] == viewer(proxy, "v")["caps"]
    assert 404 == ask(proxy.admin, "/api/budgets/nobody's").status


# --- Upstreams ----------------------------------------------------------------------------------


@pytest.fixture
def guarded(ads: AdServer, start_proxy: StartProxy) -> Proxy:
    """Run a proxy of two upstreams, of which the second has no breaker."""
    upstreams = {
        "main": {"endpoint": ads.url("/ad"), "circuit_breaker": {"fail_max": 3}},
        "house": {"endpoint": ads.url("/house"), "circuit_breaker": {"mode": "off"}},
    }
    routes = [
        {"path": "/one", "upstreams": ["main"]},
        {"path": "/two", "upstreams": ["main", "house"]},
    ]
    ads.replies["/house"] = Reply(a_document(an_ad("house")))
    return start_proxy(a_config(upstreams, routes, server={"secret": [SECRET]}))


def breaker(proxy: Proxy, name: str = "main") -> dict[str, Any]:
    """Give what operators are told about the breaker of an upstream."""
    told: dict[str, Any] = ask(proxy.admin, f"/api/upstreams/{name}").json()["breaker"]
    return told


def turn(proxy: Proxy, name: str, state: str) -> Answer:
    """Turn a breaker."""
    return ask(proxy.admin, f"/api/upstreams/{name}/breaker?state={state}", method="POST")


async def shown(proxy: Proxy, path: str) -> list[str]:
    """Ask for ads, and give their names."""
    async with Player(proxy.base) as player:
        return (await player.ask(path)).ads


async def test_upstreams(guarded: Proxy, ads: AdServer) -> None:
    """Upstreams are told as they stand in the configuration, with what they were asked."""
    found = await shown(guarded, "/two")
    told = ask(guarded.admin, "/api/upstreams").json()
    main, house = told["upstreams"]

    assert ["main"] == found
    assert [("main", ads.url("/ad")), ("house", ads.url("/house"))] == [
        (each["name"], each["endpoint"]) for each in told["upstreams"]
    ]
    assert ("closed", None) == (main["breaker"]["state"], house["breaker"])
    assert (1, 1, 0) == (main["calls"]["ok"], main["latency_ms"]["calls"], main["in_flight"])
    assert (0, None, []) == (house["calls"]["ok"], house["latency_ms"], told["hosts"])
    assert house == ask(guarded.admin, "/api/upstreams/house").json()


async def test_upstream_that_fails(guarded: Proxy, ads: AdServer) -> None:
    """An upstream that fails is told as such, to people and to Prometheus; others serve on."""
    ads.replies["/ad"] = Reply(status=500)
    found = [await shown(guarded, "/two") for _ in range(5)]
    told = ask(guarded.admin, "/api/upstreams/main").json()

    assert [["house"]] * 5 == found
    assert ("open", False) == tuple(told["breaker"][each] for each in ("state", "held"))
    assert "3 failures in a row" in told["breaker"]["reason"]
    assert 0 < told["breaker"]["retry_in_seconds"] < 70
    assert (3, 2) == (told["calls"]["failed"], told["calls"]["breaker"])
    assert 3 == len(ads.seen("/ad"))
    assert [3, 2, 3, 1, 1] == [
        metric(guarded, f"vastproxy_{name}", upstream="main", **labels)
        for name, labels in (
            ("upstream_calls_total", {"result": "failed"}),
            ("upstream_calls_total", {"result": "breaker"}),
            ("upstream_seconds_count", {}),
            ("breaker_open", {}),
            ("breaker_changes_total", {"to": "open"}),
        )
    ]


async def test_host_that_fails(guarded: Proxy, ads: AdServer) -> None:
    """
    Where a wrapper leads to a host that fails, the host is told, and not who sent the wrapper;
    hosts without trouble are told to who asks for all.
    """
    bad, good = (ads.url("/hop", address=each) for each in HOSTS[1:])
    ads.replies["/ad"] = Reply(a_wrapper(bad))
    ads.replies["/house"] = Reply(a_wrapper(good))
    ads.replies["/hop"] = lambda asked: (
        Reply(status=503) if asked.address == HOSTS[1] else Reply(a_document(an_ad("hop")))
    )
    found = [await shown(guarded, "/two") for _ in range(6)]
    told = ask(guarded.admin, "/api/upstreams").json()
    every = ask(guarded.admin, "/api/upstreams?all=1").json()
    metrics = [
        metric(guarded, f"vastproxy_{name}", upstream="(hops)")
        for name in ("breaker_open", "upstream_seconds_count")
    ]

    assert [["hop"]] * 6 == found
    assert [(f"{HOSTS[1]}:{ads.port}", "open", 5, 1)] == [
        (each["name"], each["breaker"]["state"], each["calls"]["failed"], each["calls"]["breaker"])
        for each in told["hosts"]
    ]
    assert {f"{each}:{ads.port}" for each in HOSTS[1:]} == {each["name"] for each in every["hosts"]}
    assert "closed" == breaker(guarded)["state"]
    assert [1, 11] == metrics


async def test_breaker_by_hand(guarded: Proxy, ads: AdServer) -> None:
    """An operator opens a breaker, and nobody is asked until it is closed again."""
    opened = turn(guarded, "main", "open")
    without = await shown(guarded, "/one"), await shown(guarded, "/two")
    asked = len(ads.seen("/ad"))
    closed = turn(guarded, "main", "closed")

    assert ("open", True, "by hand") == tuple(
        opened.json()["breaker"][each] for each in ("state", "held", "reason")
    )
    assert (([], ["house"]), 0) == (without, asked)
    assert ("closed", False) == tuple(closed.json()["breaker"][each] for each in ("state", "held"))
    assert ["main"] == await shown(guarded, "/one")
    assert ["open", "closed"] == [
        each["state"] for each in guarded.records(event="breaker.by_hand", upstream="main")
    ]


def test_wrong_turns(guarded: Proxy) -> None:
    """What cannot be turned says why."""
    found = [
        turn(guarded, *each) for each in (("main", "ajar"), ("third", "open"), ("house", "open"))
    ]

    assert [400, 404, 409] == [each.status for each in found]
    assert "(there are: main, house)" in found[1].json()["error"]
    assert "closed" == breaker(guarded)["state"]


async def test_breaker_outlives_a_reload(guarded: Proxy, ads: AdServer) -> None:
    """
    A breaker stays open over a reload that changes nothing of its upstream, whether it failed or
    was opened by hand; an upstream with another breaker begins anew.
    """
    ads.replies["/ad"] = Reply(status=500)
    for _ in range(3):
        await shown(guarded, "/one")
    before = breaker(guarded)
    third = {"path": "/third", "upstreams": ["main"]}
    guarded.reload({"routes": [third]})
    guarded.wait_record(event="reloaded", routes=["/third"])
    after = breaker(guarded)
    ads.replies["/ad"] = Reply(a_document(an_ad("main")))
    found = await shown(guarded, "/third")
    turn(guarded, "main", "open")
    guarded.reload({"routes": [{"path": "/fourth", "upstreams": ["main"]}]})
    guarded.wait_record(event="reloaded", routes=["/fourth"])
    held = breaker(guarded)["held"]
    patient = {"endpoint": ads.url("/ad"), "circuit_breaker": {"fail_max": 9}, "session_params": []}
    guarded.reload({"upstreams": {"main": patient}, "routes": [third]})
    wait_for(lambda: 3 == len(guarded.records(event="reloaded")))

    assert ("open", before["reason"]) == (after["state"], after["reason"])
    assert before["since_seconds"] <= after["since_seconds"]
    assert ([], True) == (found, held)
    assert "closed" == breaker(guarded)["state"]
    assert ["main"] == await shown(guarded, "/third")
    assert 0 == metric(guarded, "vastproxy_breaker_open", upstream="main")
