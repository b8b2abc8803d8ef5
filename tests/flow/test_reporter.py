"""Reports go out once, in the background, guarded, and are counted where they cannot."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from ipaddress import ip_network

import pytest
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer, Reply
from vastproxy.errors import UpstreamError, UpstreamTooLargeError
from vastproxy.flow.reporter import (
    MAX_AT_ONCE,
    MAX_BODY,
    MAX_PENDING,
    MAX_REDIRECTS,
    TIMEOUT,
    ErrorReporter,
    Ping,
)
from vastproxy.model import HopReply, HopRequest
from vastproxy.observe.tasks import Tasks
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy

PIXEL = HopReply(200, (), b"")


@dataclass
class FakeClient:
    """Answers when its *gate* is open, and knows how many asked at the same time."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    reply: HopReply | UpstreamError = PIXEL
    asked: list[tuple[HopRequest, float]] = field(default_factory=list)
    at_once: int = 0
    most: int = 0

    async def get(self, request: HopRequest, deadline: float) -> HopReply:
        """Remember *request*, wait, and answer."""
        self.asked.append((request, deadline))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        if isinstance(self.reply, UpstreamError):
            raise self.reply
        return self.reply


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    """Own the reports of a test."""
    async with Tasks("reports") as owner:
        yield owner


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run a server that takes every report."""
    async with AdServer(fallback=b"") as running:
        yield running


@pytest.fixture
async def reporter(tasks: Tasks) -> AsyncIterator[ErrorReporter]:
    """Give a reporter that may reach 127.0.0.1."""
    policy = EgressPolicy(allow=(ip_network("127.0.0.1/32"),))
    async with AiohttpClient(policy) as client:
        yield ErrorReporter(client, tasks)


def a_ping(url: str = "http://e.example/?c=303") -> Ping:
    """Build a ping with a header."""
    return Ping(url, (("User-Agent", "TV"),), "r1")


async def test_report_is_a_get(server: AdServer, reporter: ErrorReporter, tasks: Tasks) -> None:
    """A report is one GET of its URL with the device's headers."""
    reporter.send([a_ping(server.url("/e?a=[B]&c=303"))])
    await tasks.wait_idle(5)

    assert [b"GET /e?a=[B]&c=303 HTTP/1.1"] == [each.line for each in server.requests]
    assert "TV" == server.requests[0].header("User-Agent")
    assert (1, 0, 0) == (reporter.sent, reporter.failed, reporter.dropped)


async def test_sending_waits_for_nothing(tasks: Tasks) -> None:
    """Sending returns at once; the request is made later, guarded, once, and within its time."""
    client = FakeClient()
    reporter = ErrorReporter(client, tasks)
    reporter.send([a_ping()])
    assert [] == client.asked
    client.gate.set()
    before = asyncio.get_running_loop().time()
    await tasks.wait_idle(5)
    ((request, deadline),) = client.asked

    assert (False, True, MAX_BODY) == (request.trusted, request.once, request.max_body)
    assert before <= deadline - TIMEOUT < before + 1


async def test_queue_is_bounded(tasks: Tasks) -> None:
    """Beyond the bound reports are dropped, counted and logged at once; what waits is not lost."""
    client = FakeClient()
    reporter = ErrorReporter(client, tasks)
    with capture_logs() as logs:
        reporter.send([a_ping()] * (MAX_PENDING + 3))
        reporter.send([a_ping()])
    waiting = repr(reporter)
    client.gate.set()
    await tasks.wait_idle(10)

    assert 4 == reporter.dropped
    assert [("report.dropped", 3, 3), ("report.dropped", 1, 4)] == [
        (each["event"], each["dropped"], each["in_all"]) for each in logs
    ]
    assert f"<ErrorReporter sent: 0, failed: 0, dropped: 4, waiting: {MAX_PENDING}>" == waiting
    assert (MAX_PENDING, 0) == (reporter.sent, len(tasks))


async def test_queue_has_room_again(tasks: Tasks) -> None:
    """When reports have gone, others are taken."""
    client = FakeClient()
    client.gate.set()
    reporter = ErrorReporter(client, tasks)
    for _ in range(2):
        reporter.send([a_ping()] * MAX_PENDING)
        await tasks.wait_idle(10)

    assert (2 * MAX_PENDING, 0) == (reporter.sent, reporter.dropped)


async def test_few_go_at_once(tasks: Tasks) -> None:
    """No more reports than the limit are under way at one time."""
    client = FakeClient()
    reporter = ErrorReporter(client, tasks)
    reporter.send([a_ping()] * (MAX_AT_ONCE * 3))
    client.gate.set()
    await tasks.wait_idle(10)

    assert MAX_AT_ONCE * 3 == reporter.sent
    assert 0 < client.most <= MAX_AT_ONCE


@pytest.mark.parametrize(
    "url",
    ["", "about:blank", "javascript:alert(1)", "ftp://e.example/", "/e", "//e.example/", "http:x"],
)
async def test_what_is_no_url_is_passed_over(tasks: Tasks, url: str) -> None:
    """Anything but an http or https URL is passed over without a word at usual levels."""
    reporter = ErrorReporter(FakeClient(), tasks)
    with capture_logs() as logs:
        reporter.send([a_ping(url)])

    assert 0 == len(tasks)
    assert (0, 0, 0) == (reporter.sent, reporter.failed, reporter.dropped)
    assert ["debug"] == [each["log_level"] for each in logs]


async def test_failure_is_counted_and_logged(tasks: Tasks) -> None:
    """A report that fails is counted and logged, and is not sent again."""
    client = FakeClient(reply=UpstreamError("gone"))
    client.gate.set()
    reporter = ErrorReporter(client, tasks)
    with capture_logs() as logs:
        reporter.send([a_ping()])
        await tasks.wait_idle(5)

    assert (1, 0, 1) == (reporter.failed, reporter.sent, len(client.asked))
    assert [("report.failed", "gone", "r1")] == [
        (each["event"], each["problem"], each["request_id"]) for each in logs
    ]


async def test_log_tells_nothing_of_the_viewer(reporter: ErrorReporter, tasks: Tasks) -> None:
    """The log of a failed report names its host, and nothing that was filled into its URL."""
    url = "http://secret-user@127.0.0.2:9/secret-path?ip=secret-ip#secret"
    with capture_logs() as logs:
        reporter.send([a_ping(url)])
        await tasks.wait_idle(5)
    (line,) = logs

    assert ("report.failed", "127.0.0.2", "r1") == (
        line["event"],
        line["host"],
        line["request_id"],
    )
    assert "secret" not in repr(line)


async def test_large_answer_was_a_hit(tasks: Tasks) -> None:
    """Whoever answers with more than a pixel has taken the report."""
    client = FakeClient(reply=UpstreamTooLargeError("large"))
    client.gate.set()
    reporter = ErrorReporter(client, tasks)
    reporter.send([a_ping()])
    await tasks.wait_idle(5)

    assert (1, 0) == (reporter.sent, reporter.failed)


async def test_redirects_are_followed(
    server: AdServer, reporter: ErrorReporter, tasks: Tasks
) -> None:
    """A redirect is followed to its end; one to itself is given up."""
    server.replies |= {
        "/a": Reply(status=302, headers=(("Location", "b?x=1"),)),
        "/loop": Reply(status=307, headers=(("Location", "/loop"),)),
    }
    reporter.send([a_ping(server.url("/a"))])
    reporter.send([a_ping(server.url("/loop"))])
    await tasks.wait_idle(5)

    assert ["x=1"] == [each.query for each in server.seen("/b")]
    assert MAX_REDIRECTS + 1 == len(server.seen("/loop"))


async def test_redirect_is_guarded(server: AdServer, reporter: ErrorReporter, tasks: Tasks) -> None:
    """A redirect may lead nowhere that a report may not."""
    elsewhere = f"http://127.0.0.2:{server.port}/b"
    server.replies["/a"] = Reply(status=302, headers=(("Location", elsewhere),))
    with capture_logs() as logs:
        reporter.send([a_ping(server.url("/a"))])
        await tasks.wait_idle(5)

    assert [] == server.seen("/b")
    assert (0, 1) == (reporter.sent, reporter.failed)
    assert ["report.failed"] == [each["event"] for each in logs]


@pytest.mark.parametrize(
    "reply", [Reply(status=500), Reply(raw=b""), Reply(reset=True)], ids=["500", "end", "reset"]
)
async def test_report_is_sent_once(
    server: AdServer, reporter: ErrorReporter, tasks: Tasks, reply: Reply
) -> None:
    """A server that fails on a report, or hangs up, does not hear it again."""
    server.replies["/e"] = reply
    with capture_logs():
        reporter.send([a_ping(server.url("/e"))])
        await tasks.wait_idle(5)

    assert 1 == len(server.requests)


async def test_reports_share_no_connection(
    server: AdServer, reporter: ErrorReporter, tasks: Tasks
) -> None:
    """Each report has a connection of its own."""
    for _ in range(3):
        reporter.send([a_ping(server.url("/e"))])
        await tasks.wait_idle(5)

    assert [1, 2, 3] == [each.connection for each in server.requests]
