"""The player's side: whatever happens inside, a player gets a valid answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from lxml import etree
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer as Upstreams
from tests.support.hostile import a_wrapper, an_inline
from vastproxy.config.template import Template
from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route, Router
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.tasks import Tasks
from vastproxy.session.factory import SessionFactory
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.upstream import UpstreamSettings, VastUpstream
from vastproxy.web.server import Player, PlayerSettings

Flow = Callable[[Route, AdRequest], Awaitable[AdResponse]]
ANSWER = AdResponse(b"<VAST/>", "r1", ads=1, hops=2, upstream="main", flags=("repaired",))


class FakeAds(AdServer):
    """A flow of the test's own."""

    def __init__(self, flow: Flow) -> None:
        """Take what to do with a request."""
        self._flow = flow
        self.asked: list[AdRequest] = []

    async def answer(self, route: Route, request: AdRequest) -> AdResponse:
        """Remember *request*, and do what the test says."""
        self.asked.append(request)
        return await self._flow(route, request)


async def good(_: Route, __: AdRequest) -> AdResponse:
    """Answer."""
    return ANSWER


@asynccontextmanager
async def serving(player: Player) -> AsyncIterator[aiohttp.ClientSession]:
    """Serve *player* on loopback, and give a client of it."""
    runner = web.ServerRunner(web.Server(player.handle, access_log=None))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
    finally:
        await runner.cleanup()


def a_player(flow: Flow, *, max_in_flight: int = 10, path: str = "/ad") -> tuple[Player, FakeAds]:
    """Build a player with one route, answered by *flow*."""
    ads = FakeAds(flow)
    settings = PlayerSettings(max_in_flight=max_in_flight)
    return Player(ads, Router([Route(path, ())]), settings), ads


async def test_answer_and_its_line() -> None:
    """A request is answered, and one line of the log tells what came of it."""
    player, ads = a_player(good)
    async with serving(player) as client:
        with capture_logs() as logs:
            reply = await client.get("/ad?a=1")

    assert (200, b"<VAST/>") == (reply.status, await reply.read())
    assert "a=1" == ads.asked[0].query.raw
    (line,) = logs
    assert 0 <= line.pop("ms")
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "r1",
        "route": "/ad",
        "upstream": "main",
        "ads": 1,
        "hops": 2,
        "flags": ("repaired",),
        "status": 200,
        "bytes": 7,
    }


async def test_bug_inside_is_an_empty_answer() -> None:
    """A bug gives the player 200 and an empty VAST, and the log its traceback by the same id."""

    async def failing(_: Route, __: AdRequest) -> AdResponse:
        """Fail as a bug does."""
        raise ZeroDivisionError

    player, _ = a_player(failing)
    async with serving(player) as client:
        with capture_logs() as logs:
            reply = await client.get("/ad", headers={"Origin": "https://p.example"})
    failure, line = logs

    assert (200, "VAST", 0) == (
        reply.status,
        etree.fromstring(await reply.read()).tag,
        len(etree.fromstring(await reply.read())),
    )
    assert "https://p.example" == reply.headers["Access-Control-Allow-Origin"]
    assert ("request.failed", "error", True) == (
        failure["event"],
        failure["log_level"],
        failure["exc_info"],
    )
    assert ("no_ad", "internal_error") == line["flags"]
    assert {reply.headers["X-Request-Id"]} == {failure["request_id"], line["request_id"]}
    assert 0 == player.in_flight


async def test_overload_is_an_empty_answer() -> None:
    """Beyond the limit an empty VAST comes at once, and the flow hears nothing of it."""
    gate = asyncio.Event()

    async def waiting(_: Route, __: AdRequest) -> AdResponse:
        """Answer when the gate is open."""
        await gate.wait()
        return ANSWER

    player, ads = a_player(waiting, max_in_flight=2)
    async with serving(player) as client, asyncio.TaskGroup() as group:
        slow = [group.create_task(client.get("/ad")) for _ in range(2)]
        async with asyncio.timeout(5):
            while player.in_flight < 2:  # noqa: ASYNC110 - the requests are on their way
                await asyncio.sleep(0)
        with capture_logs() as logs:
            reply = await client.get("/ad")
        assert "<Player in flight: 2>" == repr(player)
        gate.set()

    assert 200 == reply.status
    assert 0 == len(etree.fromstring(await reply.read()))
    assert [("no_ad", "overload")] == [each["flags"] for each in logs]
    assert 2 == len(ads.asked)
    assert [b"<VAST/>"] * 2 == [await each.result().read() for each in slow]


async def test_head_asks_nobody() -> None:
    """A HEAD is answered without an ad request: looking must not cost an ad."""
    player, ads = a_player(good)
    async with serving(player) as client:
        reply = await client.head("/ad")

    assert (200, b"", "application/xml") == (reply.status, await reply.read(), reply.content_type)
    assert [] == ads.asked


async def test_preflight_asks_nobody() -> None:
    """A preflight is answered without an ad request."""
    player, ads = a_player(good)
    async with serving(player) as client:
        reply = await client.options("/ad", headers={"Origin": "https://p.example"})

    assert (204, "https://p.example") == (
        reply.status,
        reply.headers["Access-Control-Allow-Origin"],
    )
    assert [] == ads.asked


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
async def test_other_methods_are_refused(method: str) -> None:
    """Ads are asked for with GET; anything else is told so."""
    player, ads = a_player(good)
    async with serving(player) as client:
        reply = await client.request(method, "/ad")

    assert (405, "GET, HEAD, OPTIONS") == (reply.status, reply.headers["Allow"])
    assert [] == ads.asked


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST"])
async def test_unknown_path(method: str) -> None:
    """An unknown path is 404 by any method, and a browser may read that."""
    player, ads = a_player(good)
    async with serving(player) as client:
        reply = await client.request(method, "/other")

    assert (404, "*") == (reply.status, reply.headers["Access-Control-Allow-Origin"])
    assert [] == ads.asked


# --- With the flow that ships -------------------------------------------------------------------

BAD = b"a\x85\xff\xc3(b"
"""No UTF-8. Header values may have such bytes (RFC 9110 section 5.5, obs-text)."""


@pytest.fixture
async def upstreams() -> AsyncIterator[Upstreams]:
    """Run an ad server whose wrapper asks for every macro of the device."""
    async with Upstreams() as server:
        macros = "ua=[DEVICEUA]&page=[PAGEURL]&domain=[DOMAIN]&ip=[DEVICEIP]&ifa=[IFA]"
        server.replies |= {
            "/one": a_wrapper(server.url(f"/end?{macros}")),
            "/end": an_inline("last"),
        }
        yield server


@pytest.fixture
async def real(upstreams: Upstreams) -> AsyncIterator[int]:
    """Serve the flow that ships, and give its port."""
    policy = EgressPolicy(allow=(ip_network("127.0.0.1/32"),))
    async with AiohttpClient(policy) as client, Tasks("reports") as tasks:
        settings = UpstreamSettings(
            "main",
            Template.parse(upstreams.url("/one?q={query.q}&h={header.x-uid}&v={viewer}")),
            params=(("p", Template.parse("{header.x-uid}")),),
            headers=(("X-Out", Template.parse("{header.x-uid}")),),
        )
        found = VastUpstream(settings, client, lambda: 0.0)
        ads = AdServer(
            SessionFactory(is_public_suffix=lambda _: False), ErrorReporter(client, tasks)
        )
        more: dict[str, Any] = {"fill_macros": "all", "forward_cookies": ("uid",)}
        macros = (("IFA", Template.parse("{header.x-uid}")),)
        route = Route("/ad", (found,), macros=macros, **more)
        player = Player(ads, Router([route]), PlayerSettings((ip_network("127.0.0.0/8"),)))
        async with serving(player) as session:
            base = session._base_url
            assert base is not None
            assert base.port is not None
            yield base.port


async def raw(port: int, *lines: bytes) -> bytes:
    """Send *lines* as they are, and give the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\r\n".join([*lines, b"Host: x", b"Connection: close", b"", b""]))
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize(
    "line",
    [
        *(b"User-Agent: " + BAD, b"Referer: http://" + BAD + b"/", b"Referer: http://[::1"),
        *(b"Accept-Language: " + BAD, b"Cookie: uid=" + BAD, b"X-Uid: " + BAD),
        *(b"X-Device-User-Agent: " + BAD, b"X-Device-Referer: " + BAD, b"X-Device-IP: " + BAD),
        *(b"X-Forwarded-For: " + BAD, b"X-Request-Id: " + BAD, b"Origin: " + BAD),
        *(b"X-Device-Requested-With: " + BAD, b"X-Uid: \xe2\x80\xa8\"'<&\t[X]{y}%"),
    ],
)
async def test_no_header_costs_the_ad(real: int, line: bytes) -> None:
    """Whatever bytes a header has that HTTP lets through, the player gets its ad."""
    with capture_logs() as logs:
        answer = await raw(real, b"GET /ad?q=1 HTTP/1.1", line)

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'<Ad id="last"' in answer
    assert ["request"] == [each["event"] for each in logs if each["log_level"] != "debug"]


@pytest.mark.parametrize("query", [b"q=%85%ff", b"q=%00%0d%0aX:1", b"q=%ed%b2%85", b"q=[X]%5b{}|^"])
async def test_no_query_costs_the_ad(real: int, query: bytes) -> None:
    """Whatever a query has, encoded or not, the player gets its ad."""
    with capture_logs() as logs:
        answer = await raw(real, b"GET /ad?" + query + b" HTTP/1.1")

    assert b'<Ad id="last"' in answer
    assert ["request"] == [each["event"] for each in logs if each["log_level"] != "debug"]


async def test_absolute_form(real: int, upstreams: Upstreams) -> None:
    """A request in absolute form is answered by its path; its host leads nowhere."""
    answer = await raw(real, b"GET http://evil.example/ad?q=%2f HTTP/1.1")

    assert b'<Ad id="last"' in answer
    assert upstreams.seen("/one")[0].query.startswith("q=%2F&")
