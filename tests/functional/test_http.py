"""HTTP with players and operators: methods, headers, the waterfall, the log, and the end."""

import asyncio
import re
import uuid

import aiohttp
import pytest

from tests.functional.conftest import StartProxy
from tests.support.ad_server import EMPTY_VAST, AdServer, Received, Reply, wait_seen
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import Answer, Proxy, a_config, ask
from tests.support.vast_facts import read, version

ORIGIN = "https://page.example"

FAULTS = {
    "not found": Reply(status=404),
    "server error": Reply(status=500),
    "no content": Reply(status=204),
    "empty body": Reply(b""),
    "no ad": Reply(EMPTY_VAST),
    "json": Reply(b'{"no": "ad"}'),
    "half a document": Reply(b"<VAST><Ad>"),
    "reset": Reply(reset=True),
    "half a body": Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n<VAST"),
    "no HTTP": Reply(raw=b"hello\r\n\r\n"),
    "silence": Reply(delay=30),
}
"""Ways to give no ad."""


def http_config(ads: AdServer) -> dict[str, object]:
    """Build a config with two upstreams, each on a host of its own, and a route for each use."""
    upstreams = {
        "first": {"endpoint": f"{ads.url()}/first/{{rest}}", "timeout": "500ms"},
        "second": {"endpoint": f"{ads.url(address='127.0.0.2')}/second/{{rest}}"},
        "exact": ads.url("/exact"),
    }
    routes = [
        {"path": "/ads/{rest}", "upstreams": ["first"]},
        {"path": "/both/{rest}", "upstreams": ["first", "second"]},
        {"path": "/exact", "upstreams": ["exact"]},
        {"path": "/through/{rest}", "upstreams": ["first"], "mode": "passthrough"},
    ]
    return a_config(upstreams, routes)


@pytest.fixture(scope="module")
def proxy(start_module_proxy: StartProxy, ad_server: AdServer) -> Proxy:
    """Run the proxy that most tests ask."""
    return start_module_proxy(http_config(ad_server))


def ids(answer: Answer) -> list[str]:
    """Give the ids of the ads of *answer*, which must be a VAST document."""
    assert re.fullmatch(r"[2-4]\.\d", version(answer.body))
    return [ad.id for ad in read(answer.body)]


def test_answer(proxy: Proxy, ads: AdServer) -> None:
    """An answer is XML in UTF-8 that no cache keeps, and names its request."""
    ads.replies["/first/a"] = an_inline()
    answers = [proxy.get("/ads/a") for _ in range(2)]
    named = {each.header("x-request-id") for each in answers}

    for answer in answers:
        assert 200 == answer.status
        assert ["application/xml; charset=utf-8"] == answer.values("content-type")
        assert ["no-store"] == answer.values("cache-control")
        assert [str(len(answer.body))] == answer.values("content-length")
        assert answer.body.startswith(b"<?xml")
        assert ["ad"] == ids(answer)
    assert 2 == len(named)
    assert all(named)


@pytest.mark.parametrize("size", [8_500, 12_000])
def test_long_request(proxy: Proxy, ads: AdServer, size: int) -> None:
    """Consent strings fill long request lines and headers: they are read, and go on."""
    ads.replies["/first/a"] = an_inline()
    target = f"/ads/a?gdpr_consent={'C' * size}"
    answer = proxy.get(target, [("X-Long", "h" * size)])

    assert 200 == answer.status
    assert ["ad"] == ids(answer)
    assert target.partition("?")[2] == ads.requests[0].query


def test_request_id_of_stranger(proxy: Proxy, ads: AdServer) -> None:
    """The id that a stranger gives a request is not taken over."""
    ads.replies["/first/a"] = an_inline()
    answer = proxy.get("/ads/a", [("X-Request-Id", "mine")])

    assert "mine" != answer.header("x-request-id")


def test_server_timing(proxy: Proxy, ads: AdServer) -> None:
    """Server-Timing has the milliseconds of each hop, and of the whole."""
    ads.replies["/first/a"] = a_wrapper(ads.url("/b"))
    ads.replies["/b"] = Reply(a_wrapper(ads.url("/c")), delay=0.1)
    ads.replies["/c"] = an_inline()
    (header,) = proxy.get("/ads/a").values("server-timing")
    steps = [re.fullmatch(r"(\w+);dur=(\d+(?:\.\d+)?)", each) for each in header.split(", ")]
    times = {step[1]: float(step[2]) for step in steps if step}

    assert len(steps) == len(times)
    assert {"hop1", "hop2", "hop3", "total"} == times.keys()
    assert 100 <= times["hop2"] <= times["total"]


@pytest.mark.parametrize("path", ["/ads/a", "/exact", "/through/a"])
def test_head(path: str, proxy: Proxy, ads: AdServer) -> None:
    """HEAD is answered without a body, and without asking anybody for an ad."""
    answer = proxy.get(path, [("Origin", ORIGIN)], method="HEAD")

    assert 200 == answer.status
    assert b"" == answer.body
    assert (answer.header("content-type") or "").startswith("application/xml")
    assert ORIGIN == answer.header("access-control-allow-origin")
    assert [] == ads.requests


def test_options(proxy: Proxy, ads: AdServer) -> None:
    """A preflight request is answered with what a player may do, and asks nobody for an ad."""
    asked = [
        ("Origin", ORIGIN),
        ("Access-Control-Request-Method", "GET"),
        ("Access-Control-Request-Headers", "x-own, range"),
    ]
    answer = proxy.get("/ads/a", asked, method="OPTIONS")

    assert 204 == answer.status
    assert ORIGIN == answer.header("access-control-allow-origin")
    assert "true" == answer.header("access-control-allow-credentials")
    assert "GET" in (answer.header("access-control-allow-methods") or "")
    assert "x-own, range" == answer.header("access-control-allow-headers")
    assert [] == ads.requests


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods(method: str, proxy: Proxy, ads: AdServer) -> None:
    """Ads are asked for with GET; another method is told so."""
    answer = proxy.get("/ads/a", [("Content-Length", "0")], method=method)

    assert 405 == answer.status
    assert "GET, HEAD, OPTIONS" == answer.header("allow")
    assert [] == ads.requests


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/exact/more", "/adsx", "/exact%2F", "/ads/../exact", "/ads/%2e%2e/x"]
)
def test_unknown_path(path: str, proxy: Proxy, ads: AdServer) -> None:
    """A path without a route is 404, readable for a page's script, and asks nobody for an ad."""
    answer = proxy.get(path, [("Origin", ORIGIN)])

    assert 404 == answer.status
    assert ORIGIN == answer.header("access-control-allow-origin")
    assert [] == ads.requests


@pytest.mark.parametrize("reply", [Reply(an_inline()), Reply(status=500)])
@pytest.mark.parametrize(
    ("origin", "allowed", "credentials"),
    [
        (ORIGIN, [ORIGIN], ["true"]),
        ("null", ["*"], []),
        (None, ["*"], []),
        ("capacitor://localhost", ["capacitor://localhost"], ["true"]),
    ],
)
def test_cors(
    origin: str | None,
    allowed: list[str],
    credentials: list[str],
    reply: Reply,
    proxy: Proxy,
    ads: AdServer,
) -> None:
    """The origin is echoed with credentials; without one, all are allowed, without credentials."""
    own = (("Access-Control-Allow-Origin", "https://other.example"),)
    ads.replies["/first/a"] = Reply(reply.body, reply.status, own)
    answer = proxy.get("/ads/a", [("Origin", origin)] if origin else ())

    assert allowed == answer.values("access-control-allow-origin")
    assert credentials == answer.values("access-control-allow-credentials")
    assert "Origin" in answer.values("vary")


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_every_upstream_fails(fault: Reply, proxy: Proxy, ads: AdServer) -> None:
    """A player gets 200 and an empty VAST document, whatever its upstream does."""
    ads.replies["/first/a"] = fault
    answer = proxy.get("/ads/a", [("Origin", ORIGIN)])

    assert 200 == answer.status
    assert "application/xml; charset=utf-8" == answer.header("content-type")
    assert "no-store" == answer.header("cache-control")
    assert ORIGIN == answer.header("access-control-allow-origin")
    assert [] == ids(answer)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_waterfall(fault: Reply, proxy: Proxy, ads: AdServer) -> None:
    """The second upstream is asked, once, when the first fails or has no ad."""
    ads.replies["/first/a"] = fault
    ads.replies["/second/a"] = an_inline(ad="from-second")
    answer = proxy.get("/both/a?x=%2F")

    assert ["from-second"] == ids(answer)
    assert [b"GET /second/a?x=%2F HTTP/1.1"] == [each.line for each in ads.seen("/second/a")]


def test_waterfall_ends_at_first_ad(proxy: Proxy, ads: AdServer) -> None:
    """The second upstream is not asked when the first has an ad."""
    ads.replies["/first/a"] = an_inline(ad="from-first")

    assert ["from-first"] == ids(proxy.get("/both/a"))
    assert [] == ads.seen("/second/a")


def test_waterfall_after_failed_chain(proxy: Proxy, ads: AdServer) -> None:
    """The second upstream is asked when the first one's wrapper leads to nothing."""
    ads.replies["/first/a"] = a_wrapper(ads.url("/gone"))
    ads.replies["/second/a"] = an_inline(ad="from-second")

    assert ["from-second"] == ids(proxy.get("/both/a"))


def test_access_log(proxy: Proxy, ads: AdServer) -> None:
    """Each ad request is one line of JSON: its id, route, ads, hops and time."""
    ads.replies["/first/a"] = a_wrapper(ads.url("/b"))
    ads.replies["/b"] = an_inline()
    answer = proxy.get("/ads/a", [("User-Agent", 'evil"\u00e9{}')])
    line = proxy.wait_record(request_id=answer.header("x-request-id"))

    assert 1 == len(proxy.records(request_id=answer.header("x-request-id")))
    assert {
        "event": "request",
        "route": "/ads/{rest}",
        "upstream": "first",
        "ads": 1,
        "hops": 2,
        "status": 200,
    }.items() <= line.items()
    assert 0 < line["ms"] < 60_000


def test_access_log_of_fallback(proxy: Proxy, ads: AdServer) -> None:
    """The line of a request that got no ad, or one from elsewhere, says so."""
    ads.replies["/first/a"] = Reply(status=500)
    ads.replies["/second/b"] = an_inline()
    answers = [proxy.get(path) for path in ("/ads/a", "/both/b")]
    lines = [proxy.wait_record(request_id=each.header("x-request-id")) for each in answers]

    assert [(0, 1, ""), (1, 2, "second")] == [
        (each["ads"], each["hops"], each["upstream"]) for each in lines
    ]
    assert "no_ad" in lines[0]["flags"]
    assert "fallback" in lines[1]["flags"]


def test_health(proxy: Proxy) -> None:
    """The admin listener says that the process lives and may get traffic; players cannot ask."""
    for path in ("/healthz", "/readyz"):
        assert 200 == ask(proxy.admin, path).status
        assert 404 == proxy.get(path).status
    assert 404 == ask(proxy.admin, "/ads/a").status


PASSED = (
    """<?xml version='1.0' encoding='UTF-8' ?>\r\n<!-- é & <b> -->\n<VAST  version = "3.0"
 xmlns:x='urn:x'><Ad id='1' x:own="&#65;"><Wrapper><AdSystem/><VASTAdTagURI>\n<![CDATA["""
    "{url}]]><!-- c --></VASTAdTagURI><Impression>https://t.example/?a=1&amp;b=[TIMESTAMP]{more}"
    "</Impression ><Creatives  /><Extensions><x:e a='1'   b='2'/></Extensions></Wrapper></Ad>"
    "</VAST>\n<!-- end -->\n"
)


def test_passthrough_is_faithful(proxy: Proxy, ads: AdServer) -> None:
    """In ``passthrough`` mode the upstream's document comes byte for byte; nothing is followed."""
    document = PASSED.format(url="https://a.example/?x=%2F&y=[NOBODYKNOWS]", more="").encode()
    ads.replies["/first/a"] = document

    assert document == proxy.get("/through/a").body
    assert 1 == len(ads.requests)


def test_passthrough_fills_macros(proxy: Proxy, ads: AdServer) -> None:
    """What the proxy knows is filled in the next address; in trackers only the request's ids."""
    url = "https://a.example/?cb={cb}&ip=127.0.0.1&x=[NOBODYKNOWS]"
    more = "&amp;c={c}&amp;e=[ERRORCODE]"
    written = PASSED.format(
        url=url.format(cb="[CACHEBUSTING]").replace("127.0.0.1", "[DEVICEIP]"),
        more=more.format(c="[CORRELATOR]"),
    )
    ads.replies["/first/a"] = written.encode()
    body = proxy.get("/through/a").body.decode()
    filled = re.search(r"cb=(\d{8})&ip.*&amp;c=(\d+)&amp;", body, re.DOTALL)

    assert filled
    assert PASSED.format(url=url.format(cb=filled[1]), more=more.format(c=filled[2])) == body


@pytest.mark.parametrize("fault", [Reply(status=500), Reply(b"<VAST"), Reply(EMPTY_VAST)])
def test_passthrough_without_ad(fault: Reply, proxy: Proxy, ads: AdServer) -> None:
    """In ``passthrough`` mode, too, no ad is an empty VAST document."""
    ads.replies["/first/a"] = fault
    answer = proxy.get("/through/a")

    assert 200 == answer.status
    assert [] == ids(answer)


async def test_stop_in_the_middle(start_proxy: StartProxy, ads: AdServer) -> None:
    """After SIGTERM requests in flight are answered, with their ads, and the exit code is 0."""
    gate = asyncio.Event()

    async def slow(_: Received) -> bytes:
        """Answer when the gate is open."""
        await gate.wait()
        return an_inline()

    ads.replies["/first/slow"] = a_wrapper(ads.url("/hop"))
    ads.replies["/hop"] = slow
    proxy = await asyncio.to_thread(start_proxy, http_config(ads))
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        players = [group.create_task(play(session, f"{proxy.base}/ads/slow")) for _ in range(10)]
        await asyncio.to_thread(wait_seen, ads, "/hop", 10)
        proxy.terminate()
        await asyncio.to_thread(proxy.wait_record, event="draining")
        assert ads.loop is not None
        ads.loop.call_soon_threadsafe(gate.set)
    answers = [each.result() for each in players]

    assert [200] * 10 == [status for status, _ in answers]
    assert all(b"<InLine>" in body for _, body in answers)
    assert 0 == await asyncio.to_thread(proxy.wait_exit)


async def play(session: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    """Ask for an ad; give the status and the body of the answer."""
    async with session.get(url) as answer:
        return answer.status, await answer.read()


def test_reports_are_sent_before_the_end(start_proxy: StartProxy, ads: AdServer) -> None:
    """Reports to <Error> URIs that wait at SIGTERM are sent before the process ends."""
    paths = [f"/error/{number}" for number in range(40)]
    errors = [ads.url(f"{path}?code=[ERRORCODE]") for path in paths]
    ads.replies["/first/a"] = a_wrapper(ads.url("/gone"), errors=errors)
    ads.replies.update({path: Reply(delay=0.1) for path in paths})
    proxy = start_proxy(http_config(ads))
    answer = proxy.get("/ads/a")

    assert [] == ids(answer)
    assert 0 == proxy.stop()
    assert [["code=301"]] * 40 == [[each.query for each in ads.seen(path)] for path in paths]


def test_request_id_is_unique(proxy: Proxy) -> None:
    """Request ids are UUIDs, so that they can be looked for in the logs of many proxies."""
    answer = proxy.get("/ads/nothing")

    assert uuid.UUID(answer.header("x-request-id"))
