"""One upstream after the other, until one has an ad."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer, Reply
from tests.support.documents import an_inline
from vastproxy.flow.selector import UpstreamSelector
from vastproxy.upstream.upstream import VastUpstream

COOKIE = (("Set-Cookie", "seen=1; Path=/"),)


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run an ad server."""
    async with AdServer() as running:
        yield running


@pytest.fixture
async def selector(server: AdServer) -> AsyncIterator[UpstreamSelector]:
    """Open a waterfall of three."""
    async with AsyncExitStack() as stack:
        names = ("one", "two", "three")
        opened = [VastUpstream.open(server.url(f"/{each}"), name=each) for each in names]
        yield UpstreamSelector(*[await stack.enter_async_context(each) for each in opened])


@pytest.mark.parametrize(
    "reply", [Reply(status=500), Reply(status=204), Reply(reset=True), b"<VAST/>", b"nonsense"]
)
async def test_next_is_asked(
    server: AdServer, selector: UpstreamSelector, reply: Reply | bytes
) -> None:
    """Where an upstream fails or has no ad, the next one is asked; those behind it are not."""
    server.replies |= {"/one": reply, "/two": an_inline(ad="second"), "/three": an_inline()}
    answer = await selector.serve_with_fallback("me")

    assert answer is not None
    assert 'id="second"' in answer
    assert ["/one", "/two"] == [each.path for each in server.requests]


async def test_nobody_has_an_ad(server: AdServer, selector: UpstreamSelector) -> None:
    """Where nobody has an ad there is none, and the log says what failed."""
    server.replies |= {"/one": b"<VAST/>"}
    with capture_logs() as logs:
        assert await selector.serve_with_fallback("me") is None

    assert 3 == len(server.requests)
    failed = [each for each in logs if each["event"] == "session.upstream_failed"]
    assert [("two", "HTTP status 404"), ("three", "HTTP status 404")] == [
        (each["upstream"], each["problem"]) for each in failed
    ]


async def test_all_are_asked_as_one_request(server: AdServer, selector: UpstreamSelector) -> None:
    """Correlator, viewer and cookies are the same at each upstream."""
    server.replies |= {"/one": Reply(b"<VAST/>", headers=COOKIE), "/two": an_inline()}
    await selector.serve_with_fallback("me")
    first, second = server.requests

    assert first.query == second.query
    assert {"uid": "me"} == first.cookies
    assert {"uid": "me", "seen": "1"} == second.cookies


async def test_requests_are_apart(server: AdServer, selector: UpstreamSelector) -> None:
    """Nothing of one viewer's request is in the next one's."""
    server.replies["/one"] = Reply(an_inline(), headers=COOKIE)
    await selector.serve_with_fallback("me")
    await selector.serve_with_fallback()
    first, second = server.requests

    assert first.query != second.query
    assert {} == second.cookies
    assert "<UpstreamSelector ['one', 'two', 'three']>" == repr(selector)
