"""One session a request: the same cookies and the same ids on every hop, and on nobody else's."""

import asyncio
import re
from collections.abc import Iterable
from random import Random
from urllib.parse import parse_qs

import aiohttp
import pytest
from yarl import URL

from tests.functional.conftest import StartProxy
from tests.support.ad_server import AdServer, Answering, Received, Reply
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import Proxy, a_config

HERE = "127.0.0.2"
THERE = "127.0.0.3"

VIEWERS = 50

LONGEST_DELAY = 0.05
"""Seconds, drawn for each answer, so that the viewers' hops are mixed."""


@pytest.fixture(scope="module")
def proxy(start_module_proxy: StartProxy, ad_server: AdServer) -> Proxy:
    """Run a proxy in front of an ad server on a host of its own."""
    endpoint = f"{ad_server.url(address=HERE)}/{{rest}}"
    upstreams = {
        "ads": {"endpoint": endpoint, "session_params": ["correlator"], "timeout": "10s"},
        "forgetful": {"endpoint": endpoint, "cookies": "off"},
    }
    routes = [
        {"path": "/ads/{rest}", "upstreams": ["ads"], "deadline": "20s"},
        {"path": "/forgetful/{rest}", "upstreams": ["forgetful"]},
        {"path": "/names/{rest}", "upstreams": ["ads"], "forward_cookies": ["uid"]},
    ]
    return start_module_proxy(a_config(upstreams, routes))


def setting(document: bytes, *cookies: str) -> Reply:
    """Build an answer that sets *cookies*."""
    return Reply(document, headers=tuple(("Set-Cookie", each) for each in cookies))


def cookies_of(requests: Iterable[Received]) -> list[dict[str, str]]:
    """Give the cookies that each request carried."""
    return [each.cookies for each in requests]


def test_cookies_return_to_their_host(proxy: Proxy, ads: AdServer) -> None:
    """What a host sets goes back to it on a later hop, and never to another host."""
    first = a_wrapper(ads.url("/2", address=THERE))
    ads.replies["/1"] = setting(first, "a=1; Path=/", "b=two words; HttpOnly")
    ads.replies["/2"] = setting(a_wrapper(ads.url("/3", address=HERE)), "c=3", "d=x=y==")
    ads.replies["/3"] = setting(a_wrapper(ads.url("/4", address=THERE)), "a=changed; Path=/")
    ads.replies["/4"] = a_wrapper(ads.url("/5", address=HERE))
    ads.replies["/5"] = an_inline()
    proxy.get("/ads/1")

    assert [
        (HERE, {}),
        (THERE, {}),
        (HERE, {"a": "1", "b": "two words"}),
        (THERE, {"c": "3", "d": "x=y=="}),
        (HERE, {"a": "changed", "b": "two words"}),
    ] == [(each.address, each.cookies) for each in ads.requests]


def test_cookies_that_stay_away(proxy: Proxy, ads: AdServer) -> None:
    """Cookies for other domains, other paths, secure ones and expired ones are not sent."""
    ads.replies["/x/1"] = setting(
        a_wrapper(ads.url("/y/2", address=HERE)),
        f"other=1; Domain={THERE}",
        "suffix=1; Domain=com",
        "path=1; Path=/x",
        "secure=1; Path=/; Secure",
        "__Host-x=1; Path=/",
        "old=1; Path=/; Max-Age=0",
        "older=1; Path=/; Expires=Thu, 01 Jan 1970 00:00:00 GMT",
        "kept=1; Path=/; Max-Age=60",
    )
    ads.replies["/y/2"] = an_inline()
    proxy.get("/ads/x/1")

    assert [{}, {"kept": "1"}] == cookies_of(ads.requests)


def test_cookies_over_redirects(proxy: Proxy, ads: AdServer) -> None:
    """A redirect sets cookies as any answer does, and what follows it carries them."""
    location = ("Location", ads.url("/to", address=HERE))
    ads.replies["/from"] = Reply(status=302, headers=(location, ("Set-Cookie", "r=1; Path=/")))
    ads.replies["/to"] = Reply(
        status=307, headers=(("Location", ads.url("/far", address=THERE)), ("Set-Cookie", "s=2"))
    )
    ads.replies["/far"] = a_wrapper(ads.url("/last", address=HERE))
    ads.replies["/last"] = an_inline()
    proxy.get("/ads/from")

    assert [{}, {"r": "1"}, {}, {"r": "1", "s": "2"}] == cookies_of(ads.requests)


def test_no_cookies_where_switched_off(proxy: Proxy, ads: AdServer) -> None:
    """An upstream with ``cookies: off`` starts chains that keep none."""
    ads.replies["/1"] = setting(a_wrapper(ads.url("/2", address=HERE)), "a=1; Path=/")
    ads.replies["/2"] = an_inline()
    proxy.get("/forgetful/1")

    assert [{}, {}] == cookies_of(ads.requests)


def test_cookies_end_with_request(proxy: Proxy, ads: AdServer) -> None:
    """The next request starts without the cookies of the one before, and the player gets none."""
    ads.replies["/1"] = setting(an_inline(), "a=1; Path=/")
    answers = [proxy.get("/ads/1") for _ in range(2)]

    assert [{}, {}] == cookies_of(ads.requests)
    assert [[], []] == [each.values("set-cookie") for each in answers]


def test_named_cookies_of_player(proxy: Proxy, ads: AdServer) -> None:
    """A route hands the player's cookies that it names to the first upstream, and to it alone."""
    ads.replies["/1"] = a_wrapper(ads.url("/2", address=THERE))
    ads.replies["/2"] = an_inline()
    proxy.get("/names/1", [("Cookie", "uid=u-1; other=2")])

    assert [{"uid": "u-1"}, {}] == cookies_of(ads.requests)


async def test_viewers_at_once(proxy: Proxy, ads: AdServer) -> None:
    """Fifty viewers at one time, their hops mixed, never see each other's cookies or ids."""
    random = Random(1)

    def hop(target: str, address: str) -> Answering:
        """Answer with a wrapper that leads to *target*, or an InLine, and a cookie."""

        def answer(request: Received) -> Reply:
            viewer = parse_qs(request.query)["v"][0]
            url = ads.url(f"{target}?v={viewer}&c=[CORRELATOR]", address=address)
            document = a_wrapper(url) if target else an_inline()
            cookie = (("Set-Cookie", f"{request.path[1:]}={viewer}; Path=/"),)
            return Reply(document, headers=cookie, delay=random.uniform(0, LONGEST_DELAY))

        return answer

    places = [("/h1", "/h2", THERE), ("/h2", "/h3", HERE), ("/h3", "/h4", THERE)]
    for path, target, address in places:
        ads.replies[path] = hop(target, address)
    ads.replies["/h4"] = hop("", "")
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(play(session, proxy, number) for number in range(VIEWERS)))
    told = {
        str(viewer): [
            (each.path, each.cookies)
            for each in ads.requests
            if parse_qs(each.query)["v"] == [str(viewer)]
        ]
        for viewer in range(VIEWERS)
    }

    assert told == {
        viewer: [
            ("/h1", {}),
            ("/h2", {}),
            ("/h3", {"h1": viewer}),
            ("/h4", {"h2": viewer}),
        ]
        for viewer in told
    }
    assert VIEWERS == len({correlators(each)[0] for each in ads.seen("/h4")})
    assert [1] * VIEWERS == [len(correlators_of(viewer, ads)) for viewer in told]


async def play(session: aiohttp.ClientSession, proxy: Proxy, viewer: int) -> None:
    """Ask for an ad as *viewer*."""
    url = URL(f"{proxy.base}/ads/h1?v={viewer}", encoded=True)
    async with session.get(url) as answer:
        assert b"<InLine>" in await answer.read()


def correlators(request: Received) -> list[str]:
    """Give the values that *request* carries as correlators."""
    query = parse_qs(request.query)
    return query.get("correlator", []) + query.get("c", [])


def correlators_of(viewer: str, ads: AdServer) -> set[str]:
    """Give all correlators that the hops of *viewer* carried."""
    own = [each for each in ads.requests if parse_qs(each.query)["v"] == [viewer]]
    return {value for each in own for value in correlators(each)}


def test_ids_are_same_on_all_hops(proxy: Proxy, ads: AdServer) -> None:
    """Correlator and transaction id are one on all hops, on all ads of a pod, and in the answer."""
    macros = "c=[CORRELATOR]&t=[TRANSACTIONID]"
    tracker = "https://t.example/?[CORRELATOR]&[TRANSACTIONID]&[CACHEBUSTING]&%%X%%"
    wrappers = [
        a_wrapper(ads.url(f"/{number}?{macros}")).replace(
            b"<Ad ", f'<Ad sequence="{number}" '.encode()
        )
        for number in (1, 2)
    ]
    ads.replies["/pod"] = wrappers[0].replace(b"</VAST>", wrappers[1].partition(b">")[2])
    ads.fallback = an_inline(impressions=[tracker])
    bodies = [proxy.get("/ads/pod").body.decode() for _ in range(2)]
    hops = [each.query for each in ads.requests if each.path != "/pod"]
    entries = [correlators(each)[0] for each in ads.seen("/pod")]

    assert 4 == len(hops)
    assert 2 == len(set(hops))
    assert {f"c={each}" for each in entries} == {each.partition("&")[0] for each in hops}
    for body, entry in zip(bodies, entries, strict=True):
        filled = re.findall(r"t\.example/\?(\d+)&([0-9a-f-]{36})&\[CACHEBUSTING\]&%%X%%", body)

        assert 2 == len(filled)
        assert {entry} == {correlator for correlator, _ in filled}
        assert all(f"c={entry}&t={transaction}" in hops for _, transaction in filled)


def test_cachebusting(proxy: Proxy, ads: AdServer) -> None:
    """[CACHEBUSTING] is eight digits, one number for a session, and drawn anew for the next."""
    ads.replies["/1"] = a_wrapper(ads.url("/2?[CACHEBUSTING]", address=HERE))
    ads.replies["/2"] = a_wrapper(ads.url("/3?[CACHEBUSTING]", address=HERE))
    ads.replies["/3"] = an_inline()
    for _ in range(20):
        proxy.get("/ads/1")
    drawn = [each.query for each in ads.seen("/2")]

    assert drawn == [each.query for each in ads.seen("/3")]
    assert all(re.fullmatch(r"\d{8}", each) for each in drawn)
    assert 19 <= len(set(drawn))


def test_media_urls_are_filled(proxy: Proxy, ads: AdServer) -> None:
    """In MediaFile URLs, which no player fills, the proxy fills what it knows."""
    media = "https://cdn.example/a.mp4?[TIMESTAMP]&[CACHEBUSTING]&[CORRELATOR]&[UNKNOWN]"
    ads.replies["/1"] = an_inline(media=media)
    body = proxy.get("/ads/1").body.decode()

    assert re.search(r"a\.mp4\?\d{13}&(amp;)?\d{8}&(amp;)?\d+&(amp;)?\[UNKNOWN\]", body)
