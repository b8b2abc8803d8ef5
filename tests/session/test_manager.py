"""A session for the length of a block."""

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer
from tests.support.documents import an_inline
from vastproxy.errors import StateAwayError
from vastproxy.session.factory import SessionFactory
from vastproxy.session.manager import SessionManager
from vastproxy.session.session import VastSession
from vastproxy.state.memory import InMemoryBackend
from vastproxy.upstream.upstream import VastUpstream


@pytest.fixture
async def upstream() -> AsyncIterator[VastUpstream]:
    """Open an upstream that always has an ad."""
    async with AdServer(fallback=an_inline()) as server, VastUpstream.open(server.url("/")) as main:
        yield main


class Unlucky(VastSession):
    """A session that cannot be closed."""

    async def close(self) -> None:
        """Fail."""
        raise StateAwayError("nobody there")


class Unluckies:
    """A factory of such sessions at *upstream*."""

    def __init__(self, upstream: VastUpstream) -> None:
        self.factory = SessionFactory(upstream)

    async def create_session(self, *ids: str) -> VastSession:
        """Make one."""
        session = await self.factory.create_session(*ids)
        session.__class__ = Unlucky
        return session


async def test_block_has_a_session(upstream: VastUpstream) -> None:
    """The session is opened for the ids, and closed with the block."""
    manager = SessionManager(
        SessionFactory(upstream, InMemoryBackend()), user_id="u", device_id="d", publisher_id="p"
    )
    async with manager as session:
        assert {"uid": "u", "device_id": "d", "publisher_id": "p"} == session.context.cookies
        assert b"<InLine>" in (await session.request()).encode()

    with pytest.raises(RuntimeError, match="is closed"):
        await session.request()
    assert "<SessionManager None>" == repr(manager)


async def test_manager_may_be_used_again(upstream: VastUpstream) -> None:
    """Each block has a session of its own; two at once are refused."""
    manager = SessionManager(SessionFactory(upstream))
    async with manager as first:
        with pytest.raises(RuntimeError, match="one manager for each session"):
            await manager.__aenter__()
    async with manager as second:
        assert first is not second


async def test_closing_that_fails_is_logged(upstream: VastUpstream) -> None:
    """A session that cannot be closed fails no block, and a line of the log says which it was."""
    with capture_logs() as logs:
        async with SessionManager(Unluckies(upstream)) as session:
            pass

    assert [("session.not_closed", session.context.request_id, "nobody there")] == [
        (each["event"], each["request_id"], each["problem"]) for each in logs
    ]


async def test_error_of_the_block_is_not_hidden(upstream: VastUpstream) -> None:
    """What the block raises comes out, also where closing fails as well."""
    with pytest.raises(LookupError):
        async with SessionManager(Unluckies(upstream)):
            raise LookupError
