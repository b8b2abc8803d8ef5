"""Cookies that ad servers set for a viewer come back to them, and nothing names the viewer."""

import asyncio
import sqlite3
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    an_ad,
    viewer,
    wait_for,
)
from tests.support.ad_server import AdServer, Received, Reply
from tests.support.documents import a_wrapper
from tests.support.player import Player
from tests.support.proxy import Proxy, a_config, ask

HERE = "127.0.0.2"
THERE = "127.0.0.3"

RAW = "Viewer-4711@example.com"
"""An id that nobody but the player and the ad server may see."""


def a_kept_config(ads: AdServer, state: str) -> dict[str, Any]:
    """Build a config whose main upstream keeps cookies for viewers, and that caps and counts."""
    upstreams = {
        "main": {"endpoint": ads.url("/main", address=HERE), "cookies": "viewer"},
        "chain": {"endpoint": ads.url("/main", address=HERE), "cookies": "chain"},
        "short": {
            "endpoint": ads.url("/main", address=HERE),
            "cookies": "viewer",
            "cookie_ttl": "1s",
        },
    }
    terms: dict[str, Any] = {
        "frequency_caps": [
            {"limit": 1000, "window": "1h"},
            {"limit": 1000, "kind": "lifetime", "by": "ad"},
        ],
        "budget": {"campaign": "cookies", "limit": "1000", "cpm": "2.50"},
    }
    routes: list[dict[str, Any]] = [
        {"path": f"/{each}", "upstreams": [each], "viewer": ["query:uid"], "forward_query": "none"}
        for each in upstreams
    ]
    server = {"secret": [SECRET]}
    log = {"level": "debug"}
    routes[0] |= terms
    return a_config(upstreams, routes, state=state, server=server, log=log)


@pytest.fixture(scope="module", params=["memory", "sqlite", "redis"])
def kept(
    request: pytest.FixtureRequest,
    ad_server: AdServer,
    states: States,
    start_module_proxy: StartProxy,
) -> Iterator[Proxy]:
    """Run a proxy over each kind of state."""
    proxy = start_module_proxy(a_kept_config(ad_server, states.url(request.param)))
    yield proxy
    proxy.stop()


@pytest.fixture(autouse=True)
def an_ad_server_that_counts_viewers(ads: AdServer) -> None:
    """Let the ad server give each viewer that it does not know a number, as a cookie."""

    def answer(request: Received) -> Reply:
        """Set a cookie where there is none."""
        known = "uid" in request.cookies
        number = len(ads.requests)
        new = () if known else (("Set-Cookie", f"uid=number-{number}; Path=/; Max-Age=600"),)
        return Reply(a_document(an_ad("main")), headers=new)

    ads.replies["/main"] = answer


def last_cookies(ads: AdServer) -> dict[str, str]:
    """Give the cookies of the last request."""
    return ads.requests[-1].cookies


def wait_cookies(proxy: Proxy, name: str, count: int = 1) -> list[dict[str, str]]:
    """Wait until *count* cookies of the viewer called *name* are kept: it is after the answer."""
    wait_for(lambda: len(viewer(proxy, name)["cookies"]) >= count)
    cookies: list[dict[str, str]] = viewer(proxy, name)["cookies"]
    return cookies


def test_same_cookie_next_time(kept: Proxy, ads: AdServer) -> None:
    """What an ad server sets it gets back with the viewer's next request, and the player never."""
    answer = kept.get("/main?uid=a")
    cookies = wait_cookies(kept, "a")
    kept.get("/main?uid=a")

    assert [{"name": "uid", "site": HERE, "path": "/"}] == cookies
    assert [{}, {"uid": "number-1"}] == [each.cookies for each in ads.requests]
    assert [] == answer.values("Set-Cookie")


def test_not_for_others(kept: Proxy, ads: AdServer) -> None:
    """Another viewer, nobody, and an upstream that keeps nothing do not get it."""
    kept.get("/main?uid=b")
    wait_cookies(kept, "b")
    for target in ("/main?uid=c", "/main?uid=B", "/main", "/chain?uid=b"):
        kept.get(target)

    assert [{}] * 5 == [each.cookies for each in ads.requests]
    assert [] == viewer(kept, "nobody")["cookies"]


def test_not_at_another_site(kept: Proxy, ads: AdServer) -> None:
    """A cookie of one site goes to that site, on whatever hop it is, and to no other."""
    ads.replies["/main"] = Reply(
        a_wrapper(ads.url("/far", address=THERE)), headers=(("Set-Cookie", "here=1; Path=/"),)
    )
    ads.replies["/far"] = Reply(
        a_document(an_ad("far")), headers=(("Set-Cookie", "there=2; Path=/"),)
    )
    kept.get("/main?uid=d")
    cookies = wait_cookies(kept, "d", 2)
    kept.get("/main?uid=d")

    assert [{}, {}, {"here": "1"}, {"there": "2"}] == [each.cookies for each in ads.requests]
    assert {HERE, THERE} == {each["site"] for each in cookies}


async def test_two_at_once(kept: Proxy, ads: AdServer) -> None:
    """Requests of one viewer at one time that are set different cookies lose none of them."""
    together = asyncio.Event()
    arrived: list[str] = []

    async def answer(_: Received) -> Reply:
        """Answer when all have asked, with a cookie for each."""
        name = f"c{len(arrived)}"
        arrived.append(name)
        if len(arrived) == 4:
            together.set()
        async with asyncio.timeout(10):
            await together.wait()
        return Reply(a_document(an_ad("main")), headers=(("Set-Cookie", f"{name}=1; Path=/"),))

    ads.replies["/main"] = answer
    async with Player(kept.base) as player:
        await player.ask_at_once("/main?uid=e", 4)
    await asyncio.to_thread(wait_cookies, kept, "e", 4)
    ads.replies["/main"] = Reply(a_document(an_ad("main")))
    kept.get("/main?uid=e")

    assert {"c0": "1", "c1": "1", "c2": "1", "c3": "1"} == last_cookies(ads)


def test_removed_cookie(kept: Proxy, ads: AdServer) -> None:
    """A cookie that its ad server removes is not kept any more, and its neighbours are."""
    first = ("a=1; Path=/", "b=2; Path=/")
    ads.replies["/main"] = Reply(
        a_document(an_ad("main")), headers=tuple(("Set-Cookie", each) for each in first)
    )
    kept.get("/main?uid=f")
    wait_cookies(kept, "f", 2)
    ads.replies["/main"] = Reply(
        a_document(an_ad("main")), headers=(("Set-Cookie", "a=; Path=/; Max-Age=0"),)
    )
    kept.get("/main?uid=f")
    wait_for(lambda: len(viewer(kept, "f")["cookies"]) == 1)
    kept.get("/main?uid=f")

    assert {"b": "2"} == last_cookies(ads)


def test_forgotten(kept: Proxy, ads: AdServer) -> None:
    """DELETE of a viewer forgets cookies and caps; the second time there is nothing to forget."""
    kept.get("/main?uid=g")
    told = viewer(kept, "g") | {"cookies": wait_cookies(kept, "g")}
    forgotten = [ask(kept.admin, "/api/viewers/g", method="DELETE").json() for _ in range(2)]
    kept.get("/main?uid=g")

    assert 2 == len(told["caps"])
    assert [{"forgotten": True}, {"forgotten": False}] == forgotten
    assert {} == last_cookies(ads)
    assert "number-" not in str(told)


def test_time_to_live(kept: Proxy, ads: AdServer) -> None:
    """What is kept is gone cookie_ttl after the last change."""
    kept.get("/short?uid=h")
    wait_cookies(kept, "h")
    wait_for(lambda: not viewer(kept, "h")["cookies"])
    kept.get("/short?uid=h")

    assert {} == last_cookies(ads)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_over_a_restart(kind: str, ads: AdServer, states: States, start_proxy: StartProxy) -> None:
    """After a restart of the proxy the ad server knows its viewer, and caps know what was shown."""
    config = a_kept_config(ads, states.url(kind))
    first = start_proxy(config)
    first.get("/main?uid=r")
    wait_cookies(first, "r")
    caps = viewer(first, "r")["caps"]
    first.stop()
    second = start_proxy(config)
    second.get("/main?uid=r")

    assert {"uid": "number-1"} == last_cookies(ads)
    assert [1, 1] == [each["reserved"] for each in caps]
    assert [2, 2] == [each["reserved"] for each in viewer(second, "r")["caps"]]


async def test_no_raw_ids(
    ads: AdServer, states: States, start_proxy: StartProxy, tmp_path: Path
) -> None:
    """A viewer's own id is not in the log, not in Redis, not in SQLite's file, not in beacons."""
    quoted = "/main?uid=Viewer-4711%40example.com"
    for kind in ("redis", "sqlite"):
        url = states.url(kind)
        proxy = start_proxy(a_kept_config(ads, url) | {"journal": str(tmp_path / kind)})
        async with Player(proxy.base) as player:
            answers = await player.ask_at_once(quoted, 5)
            await player.fire(beacon for each in answers[:3] for beacon in each.beacons)
        wait_cookies(proxy, RAW.replace("@", "%40"))
        kept_there = everything(states, url)

        assert 2 == len(viewer(proxy, RAW.replace("@", "%40"))["caps"])
        assert b"number-" in kept_there
        for text in (*(each.body for each in answers), kept_there, *written(proxy)):
            assert not [each for each in (b"4711", b"Viewer-", b"example.com") if each in text]


def written(proxy: Proxy) -> list[bytes]:
    """Give the lines of the log."""
    return [each.encode() for each in proxy.lines]


def everything(states: States, url: str) -> bytes:
    """Give all bytes of the state at *url*."""
    if url.startswith("sqlite"):
        path = Path(url.removeprefix("sqlite:///"))
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        database.close()
        return b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))
    number = url.rpartition("/")[2]
    dumped: str = states.valkey.call("EVAL", DUMP, 0, number)
    return dumped.encode()


DUMP = """
redis.call('SELECT', ARGV[1])
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
    found[#found + 1] = key
    local kind = redis.call('TYPE', key).ok
    if kind == 'string' then
        found[#found + 1] = redis.call('GET', key)
    elseif kind == 'hash' then
        for _, each in ipairs(redis.call('HGETALL', key)) do found[#found + 1] = each end
    elseif kind == 'zset' then
        for _, each in ipairs(redis.call('ZRANGE', key, 0, -1)) do found[#found + 1] = each end
    elseif kind == 'list' then
        for _, each in ipairs(redis.call('LRANGE', key, 0, -1)) do found[#found + 1] = each end
    elseif kind == 'set' then
        for _, each in ipairs(redis.call('SMEMBERS', key)) do found[#found + 1] = each end
    end
end
return table.concat(found, '\\n')
"""
"""Gives keys and values of one database."""


def test_state_of_an_unknown_viewer(kept: Proxy) -> None:
    """Of a viewer that never asked, there is nothing, and no error."""
    told = ask(kept.admin, "/api/viewers/never-seen")

    assert (HTTPStatus.OK, {"caps": [], "cookies": []}) == (told.status, told.json())
