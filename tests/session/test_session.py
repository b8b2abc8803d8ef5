"""One ad request at one upstream: what it asks, and what it does when it is closed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from vastproxy.model import AdRequest, Device, HopReply
from vastproxy.observe.trace import Exchange, Trace
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import Fetched, Request, UpstreamSession, VastSession
from vastproxy.vast.document import VastDocument


@dataclass
class FakeUpstream:
    """An upstream that answers *body*, and remembers what it was asked."""

    body: bytes = b"<VAST/>"
    name: str = "fake"
    asked: list[tuple[str, bool, Mapping[str, str] | None]] = field(default_factory=list)

    def entry_url(self, session: VastSession, params: Mapping[str, str] | None = None) -> str:
        """Write the correlator and *params* into a URL."""
        return f"http://fake/{session.context.correlator}?{params}"

    def filled(self, url: str, session: VastSession, blocked: tuple[str, ...] = ()) -> str:
        """Give *url* as it is."""
        return f"{url}{session.name if blocked else ''}"

    def filled_error(self, url: str, session: VastSession, code: int) -> str:
        """Give *url* with the code."""
        return f"{url}{session}{code}"

    def filled_known(self, body: bytes, session: VastSession) -> bytes:
        """Give *body* as it is."""
        return body + repr(session).encode()

    def fill_media(self, document: VastDocument, session: VastSession) -> None:
        """Leave *document* as it is."""

    def device_headers(self, device: Device) -> tuple[tuple[str, str], ...]:
        """Give one header."""
        return (("X-Device-IP", device.ip),)

    async def fetch(
        self,
        session: VastSession,
        url: str,
        exchanges: list[Exchange],
        *,
        trusted: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Fetched:
        """Remember *url*, and answer."""
        exchanges.append(Exchange(url, 0.0, 200, len(session.context.request_id)))
        self.asked.append((url, trusted, headers))
        return Fetched(HopReply(200, (), self.body), url)


def a_session(upstream: FakeUpstream, trace: Trace | None = None) -> VastSession:
    """Open a session with fixed ids at *upstream*."""
    factory = SessionFactory(lambda _: False, now=lambda: 1.0)
    context = factory.context(request_id="r1", correlator="7")
    request = Request(AdRequest("/", device=Device(ip="192.0.2.1")))
    return factory.create_session(context, upstream, request=request, trace=trace)


async def test_request_asks_the_entry_upstream() -> None:
    """A request goes to the entry URL with its parameters, trusted, and gives text."""
    upstream = FakeUpstream("<VAST>ü</VAST>".encode())
    async with a_session(upstream) as session:
        text = await session.request(params={"slot": "pre"}, headers={"X-A": "1"})

    assert "<VAST>ü</VAST>" == text
    assert [("http://fake/7?{'slot': 'pre'}", True, {"X-A": "1"})] == upstream.asked


async def test_answer_that_is_no_utf8_is_text_all_the_same() -> None:
    """Bytes that are no UTF-8 are replaced, not refused."""
    async with a_session(FakeUpstream(b"a\xffb")) as session:
        assert "a\ufffdb" == await session.request()


async def test_closed_session_asks_nobody() -> None:
    """A closed session raises, and its upstream hears nothing."""
    upstream = FakeUpstream()
    async with a_session(upstream) as session:
        pass

    with pytest.raises(RuntimeError, match="<VastSession r1 at fake> is closed"):
        await session.request()
    assert [] == upstream.asked


async def test_closing_twice_is_fine() -> None:
    """A session may be closed again."""
    upstream = FakeUpstream()
    session: UpstreamSession = a_session(upstream)
    await session.close()
    await session.close()

    assert [] == upstream.asked


async def test_error_leaves_the_session_closed() -> None:
    """Leaving a session by an error closes it, and lets the error through."""
    session = a_session(FakeUpstream())
    with pytest.raises(LookupError):
        async with session:
            raise LookupError

    with pytest.raises(RuntimeError):
        await session.request()


def test_session_knows_its_context_and_device() -> None:
    """The session gives the context it was made with, and the device that asks."""
    session = a_session(FakeUpstream())

    assert ("r1", "7") == (session.context.request_id, session.context.correlator)
    assert "192.0.2.1" == session.request_facts.device.ip
    assert "192.0.2.1" == session.macros.get("DEVICEIP")


def test_sessions_may_share_a_trace() -> None:
    """Sessions of one ad request write into one trace, also while it is empty."""
    trace = Trace()

    assert trace is a_session(FakeUpstream(), trace).trace
    assert trace is not a_session(FakeUpstream()).trace
