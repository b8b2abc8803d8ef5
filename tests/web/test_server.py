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
from vastproxy.flow.admission import Terms
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.caps import Cap
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route, Router
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.metrics import RequestMetrics
from vastproxy.observe.tasks import Tasks
from vastproxy.session.factory import SessionFactory
from vastproxy.session.seals import Seal
from vastproxy.state.base import Account, Hold, money
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.windows import Span
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.upstream import UpstreamSettings, VastUpstream
from vastproxy.web.server import Player, PlayerSettings

Flow = Callable[[Route, AdRequest], Awaitable[AdResponse]]
ANSWER = AdResponse(b"<VAST/>", "r1", ads=1, hops=2, upstream="main", flags=("repaired",))


class FakeAds(AdServer):
    """A flow of the test's own."""

    def __init__(self, flow: Flow, beacons: Beacons | None = None) -> None:
        """Take what to do with a request."""
        self._flow = flow
        self._beacons = beacons
        self.asked: list[AdRequest] = []

    @property
    def beacons(self) -> Beacons | None:
        """Take beacons, if the test has any."""
        return self._beacons

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


async def test_line_of_a_request_with_trouble() -> None:
    """What the waterfall chose, breakers did and caches had is in the line where there is any."""
    fields = {
        "waterfall": ("main:breaker", "house:ad"),
        "breaker": ("main half-open->open: HTTP status 500",),
        "cache": ("house: hit",),
    }

    async def troubled(_: Route, __: AdRequest) -> AdResponse:
        """Answer after some trouble."""
        return AdResponse(b"<VAST/>", "r1", cache_status=("vastproxy; hit",), **fields)

    player, _ = a_player(troubled)
    async with serving(player) as client:
        with capture_logs() as logs:
            reply = await client.get("/ad")

    assert fields == {name: logs[0][name] for name in fields}
    assert "vastproxy; hit" == reply.headers["Cache-Status"]
    assert "cache_status" not in logs[0]


async def test_choices_are_counted() -> None:
    """What became of each upstream is counted, also where the line says nothing of it."""

    async def refused(_: Route, __: AdRequest) -> AdResponse:
        """Answer that an ad server has refused to."""
        return AdResponse(b"<VAST/>", "r1", choices=(("main", "failed"),))

    metrics = RequestMetrics()
    player = Player(FakeAds(refused), Router([Route("/ad", ())]), PlayerSettings(), metrics)
    async with serving(player) as client:
        for _ in range(2):
            await client.get("/ad")

    assert b'vastproxy_waterfall_total{upstream="main",what="failed"} 2.0' in metrics.text()


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


async def raw(port: int, *lines: bytes, host: bytes = b"x") -> bytes:
    """Send *lines* as they are, and give the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\r\n".join([*lines, b"Host: " + host, b"Connection: close", b"", b""]))
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


# --- Beacons ------------------------------------------------------------------------------------

SPRING = Account("campaign", "spring")
HOLD = Hold(SPRING, "o", (money(5),))
CAPPED = Terms((Cap("/ad", 3, Span()),))


@asynccontextmanager
async def counting() -> AsyncIterator[tuple[aiohttp.ClientSession, str, InMemoryBackend]]:
    """Serve beacons; give a client, the path of one, and what counts it."""
    backend = InMemoryBackend()
    async with GuardedState(backend, local=True) as state:
        beacons = Beacons(Seal(["a"], "beacon"), state, ttl=60, now=lambda: 1_800_000_000.0)
        player = Player(FakeAds(good, beacons), Router([]), PlayerSettings())
        async with serving(player) as client:
            yield client, beacons.url("", [HOLD]), backend


async def spent(backend: InMemoryBackend) -> int:
    """Give what is counted of the campaign."""
    [level] = await backend.levels(SPRING, [money(0)])
    return level.counted


async def test_beacon_counts() -> None:
    """A beacon is answered at once, with nothing; it counts once, and any page may send it."""
    async with counting() as (client, path, backend):
        for _ in range(2):
            reply = await client.get(path, headers={"Origin": "https://p.example"})

            assert (204, b"") == (reply.status, await reply.read())
            assert 5 == await spent(backend)
        assert "https://p.example" == reply.headers["Access-Control-Allow-Origin"]
        assert "no-store" == reply.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("suffix", "accept"), [(".gif", "*/*"), ("", "image/*"), ("?cb=1&x=/y", "image/webp,*/*")]
)
async def test_beacon_as_a_picture(suffix: str, accept: str) -> None:
    """Where a picture is wanted, the beacon is one, and counts; a query changes nothing."""
    async with counting() as (client, path, backend):
        reply = await client.get(path + suffix, headers={"Accept": accept})

        assert (200, "image/gif", b"GIF89a") == (
            reply.status,
            reply.content_type,
            (await reply.read())[:6],
        )
        assert 5 == await spent(backend)


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", 204), ("OPTIONS", 204), ("POST", 405), ("PUT", 405)]
)
async def test_beacon_by_other_methods(method: str, status: int) -> None:
    """Only a GET counts: looking at a beacon does not."""
    async with counting() as (client, path, backend):
        reply = await client.request(method, path)

        assert status == reply.status
        assert 0 == await spent(backend)


@pytest.mark.parametrize("token", ["", "x", "x.gif", "a/b", "%00%ff", "x" * 7_000, "<script>"])
async def test_forged_beacon(token: str) -> None:
    """What is no beacon of ours is refused, is no picture, and counts nothing."""
    async with counting() as (client, path, backend):
        for each in (f"/beacon/{token}", f"{path}{token or 'A'}"[:8_000]):
            reply = await client.get(each, headers={"Accept": "image/*"})

            assert 403 == reply.status
            assert "*" == reply.headers["Access-Control-Allow-Origin"]
        assert 0 == await spent(backend)


async def test_beacon_of_nobody() -> None:
    """Where nothing is counted, every beacon is a forged one."""
    player, _ = a_player(good)
    async with serving(player) as client:
        assert 403 == (await client.get("/beacon/x")).status


async def test_bug_in_a_beacon() -> None:
    """A bug while a beacon is counted gives the player its answer, and the log its traceback."""

    class Broken(Beacons):
        """Fails as a bug does."""

        async def take(self, token: str) -> Any:
            """Fail."""
            raise ZeroDivisionError(token)

    state = GuardedState(InMemoryBackend())
    beacons = Broken(Seal(["a"], "beacon"), state, ttl=60, now=lambda: 0.0)
    player = Player(FakeAds(good, beacons), Router([]), PlayerSettings())
    async with serving(player) as client:
        with capture_logs() as logs:
            reply = await client.get("/beacon/x.gif")

    assert (200, "image/gif") == (reply.status, reply.content_type)
    assert [("beacon.failed", "error")] == [(e["event"], e["log_level"]) for e in logs]


async def test_base_for_beacons() -> None:
    """A route that counts is told where the player reached us; another need not be."""
    ads = FakeAds(good)
    routes = [Route("/ad", (), terms=CAPPED), Route("/free", ())]
    async with serving(Player(ads, Router(routes), PlayerSettings())) as client:
        for path in ("/ad", "/free"):
            await client.get(path, headers={"Host": "p.example:81"})

    assert ["http://p.example:81", ""] == [each.base for each in ads.asked]


async def test_public_url() -> None:
    """Where the operator says how players reach us, no header says otherwise."""
    ads = FakeAds(good)
    settings = PlayerSettings(
        (ip_network("127.0.0.0/8"),), public_url="https://ads.example.com/vast"
    )
    player = Player(ads, Router([Route("/ad", (), terms=CAPPED)]), settings)
    async with serving(player) as client:
        await client.get("/ad", headers={"X-Forwarded-Host": "evil.example"})

    assert ["https://ads.example.com/vast"] == [each.base for each in ads.asked]


@pytest.mark.parametrize(
    "host", [b"a b", b"evil@x", b"<x>", b'"x"', b"p\x85.example", b"\xff\xfe", b"x" * 8_000]
)
async def test_hostile_host(host: bytes) -> None:
    """A Host that is none leaves the player its ad, and its beacons our own address."""
    ads = FakeAds(good)
    player = Player(ads, Router([Route("/ad", (), terms=CAPPED)]), PlayerSettings())
    async with serving(player) as client:
        base = client._base_url
        assert base is not None
        assert base.port is not None
        answer = await raw(base.port, b"GET /ad HTTP/1.1", host=host)

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [f"http://127.0.0.1:{base.port}"] == [each.base for each in ads.asked]
