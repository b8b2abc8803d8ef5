"""One upstream after the other, until one has an ad."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

import pytest
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer, Received, Reply
from tests.support.documents import an_inline
from vastproxy.flow.selector import UpstreamSelector, first_with_ad
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


# --- At one time --------------------------------------------------------------------------------


@dataclass
class Asked:
    """Upstreams that answer when a test says so."""

    answers: list[asyncio.Future[bool]] = field(default_factory=list)
    """What each that was asked gives."""
    cut_off: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, at: int) -> bool:
        """Ask the one at place *at*."""
        assert at == len(self.answers)
        self.answers.append(asyncio.get_running_loop().create_future())
        self.changed.set()
        try:
            return await self.answers[at]
        except asyncio.CancelledError:
            self.cut_off.append(at)
            raise

    async def wait_asked(self, count: int) -> None:
        """Wait until so many were asked."""
        async with asyncio.timeout(10):
            while len(self.answers) < count:
                self.changed.clear()
                await self.changed.wait()


async def test_without_soft_limits_there_are_no_tasks() -> None:
    """Where nobody has a soft limit, all is done in the task of whoever asks."""
    tasks = set()

    async def ask(at: int) -> bool:
        """Take note of the task."""
        tasks.add(asyncio.current_task())
        return at == 1

    assert 1 == await first_with_ad([None, None, 0.1], ask)
    assert {asyncio.current_task()} == tasks


async def test_next_is_asked_where_one_takes_long() -> None:
    """An upstream that exceeds its soft limit goes on, while the next one is asked."""
    asked = Asked()
    async with asyncio.TaskGroup() as group:
        race = group.create_task(first_with_ad([0.01, None], asked, asked.late.append))
        await asked.wait_asked(2)
        asked.answers[0].set_result(True)

    assert 0 == race.result()
    assert ([0], [1]) == (asked.late, asked.cut_off)


async def test_loser_is_cut_off() -> None:
    """When the quicker one has an ad the other is cut off, and has ended before that is told."""
    before = asyncio.all_tasks()
    asked = Asked()

    async def answer() -> None:
        """Let the second one answer."""
        await asked.wait_asked(2)
        asked.answers[1].set_result(True)

    async with asyncio.TaskGroup() as group:
        group.create_task(answer())
        winner = await first_with_ad([0.01, None], asked)

    assert 1 == winner
    assert [0] == asked.cut_off
    assert before == asyncio.all_tasks()


async def test_who_asks_is_cut_off() -> None:
    """When the viewer hangs up, all who are under way end with the ad request."""
    before = asyncio.all_tasks()
    asked = Asked()
    async with asyncio.TaskGroup() as group:
        race = group.create_task(first_with_ad([0.01, None], asked))
        await asked.wait_asked(2)
        race.cancel()

    assert race.cancelled()
    assert [0, 1] == sorted(asked.cut_off)
    assert before == asyncio.all_tasks()


async def test_mistake_ends_the_race() -> None:
    """A mistake in one of them ends all, and comes out."""
    asked = Asked()
    with pytest.RaisesGroup(LookupError, flatten_subgroups=True):
        async with asyncio.TaskGroup() as group:
            group.create_task(first_with_ad([0.01, None], asked))
            await asked.wait_asked(2)
            asked.answers[1].set_exception(LookupError())

    assert [0] == asked.cut_off


@pytest.mark.parametrize("soft_timeouts", [[None, None], [0.01, None]])
async def test_mistake_is_told_as_it_is(soft_timeouts: list[float | None]) -> None:
    """A mistake comes out as it was raised, whether or not there was a race."""
    mistake = LookupError("lost")

    async def ask(at: int) -> bool:
        """Have nothing, then fail."""
        if at:
            raise mistake
        return False

    with pytest.raises(LookupError) as raised:
        await first_with_ad(soft_timeouts, ask)

    assert mistake is raised.value
    assert raised.value.__cause__ is None


async def test_mistake_in_a_race_is_told_as_it_is() -> None:
    """A mistake while others are asked comes out as it was raised, when they have ended."""
    asked, mistake = Asked(), LookupError("lost")

    async def fail() -> None:
        """Let the second one fail."""
        await asked.wait_asked(2)
        asked.answers[1].set_exception(mistake)

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        with pytest.raises(LookupError) as raised:
            await first_with_ad([0.01, None], asked)

    assert mistake is raised.value
    assert [0] == asked.cut_off


async def test_selector_does_not_wait_for_one_that_hangs(server: AdServer) -> None:
    """The library's selector asks the next one, too, where an upstream exceeds its soft limit."""

    async def hang(_: Received) -> bytes:
        """Answer nothing."""
        await asyncio.Event().wait()
        return b""

    server.replies |= {"/one": hang, "/two": an_inline(ad="second")}
    async with AsyncExitStack() as stack:
        opened = [VastUpstream.open(server.url(f"/{each}"), name=each) for each in ("one", "two")]
        one, two = [await stack.enter_async_context(each) for each in opened]
        one.settings = replace(one.settings, soft_timeout=0.05)
        before = asyncio.all_tasks()
        answer = await UpstreamSelector(one, two).serve_with_fallback("me")

        assert answer is not None
        assert 'id="second"' in answer
        assert [] == [each for each in asyncio.all_tasks() - before if "vastproxy/" in repr(each)]
