"""One ad request at one upstream: what it asks, what it takes, and how it is closed."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.away_state import AwayState
from tests.support.documents import a_wrapper, an_inline
from vastproxy.errors import (
    StateBackendError,
    UpstreamError,
    UpstreamStatusError,
    UpstreamTimeoutError,
)
from vastproxy.model import AdRequest, Device, HopReply
from vastproxy.observe.trace import Exchange, Trace
from vastproxy.session.cookies import CookieJar
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import (
    PARSE_APART,
    Fetched,
    Request,
    TimestampStyle,
    UpstreamSession,
    VastSession,
)
from vastproxy.state.base import Account, money
from vastproxy.state.memory import InMemoryBackend
from vastproxy.vast.document import VastDocument


@dataclass
class FakeUpstream:
    """An upstream that answers *body*, or fails; it remembers what it was asked."""

    body: bytes = b"<VAST/>"
    name: str = "fake"
    status: int = 200
    error: UpstreamError | None = None
    timestamp: TimestampStyle = "unix_ms"
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
        if self.error is not None:
            raise self.error
        return Fetched(HopReply(self.status, (), self.body), url)


def a_session(upstream: FakeUpstream, trace: Trace | None = None) -> VastSession:
    """Open a session with fixed ids at *upstream*."""
    factory = SessionFactory(is_public_suffix=lambda _: False, now=lambda: 1.0)
    context = factory.context(request_id="r1", correlator="7")
    request = Request(AdRequest("/", device=Device(ip="192.0.2.1")))
    return factory.open_session(context, upstream, request=request, trace=trace)


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


# --- What an answer is ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 404, 500, 503])
async def test_status_without_success_is_an_error(status: int) -> None:
    """An answer whose status is no success is raised, so that a caller can ask another server."""
    async with a_session(FakeUpstream(status=status)) as session:
        with pytest.raises(UpstreamStatusError, match=str(status)):
            await session.request()


def a_large_one() -> bytes:
    """Build a document so large that it is parsed in a thread."""
    return an_inline() + b" " * PARSE_APART


@pytest.mark.parametrize(
    ("body", "ads", "outcome"),
    [
        (an_inline(), 1, "ad"),
        (a_wrapper("http://x.example/"), 1, "ad"),
        (a_large_one(), 1, "ad"),
        (b"<VAST/>", 0, "no_ad"),
        (b"<VAST><Ad/></VAST>", 0, "no_ad"),
        (b"", 0, "no_ad"),
        (b"nonsense", 0, "no_ad"),
    ],
    ids=["inline", "wrapper", "large", "none", "empty", "nothing", "nonsense"],
)
async def test_ads_are_counted(body: bytes, ads: int, outcome: str) -> None:
    """A session knows how many ads came, and says so when it is closed."""
    with capture_logs() as logs:
        async with a_session(FakeUpstream(body)) as session:
            await session.request()

    assert ads == session.ads
    assert [(outcome, ads, 1)] == [(e["outcome"], e["ads"], e["hops"]) for e in logs]


async def test_closing_is_told_once_under_the_request_id() -> None:
    """Closing logs one line, with the id of the request; in the proxy it is for debugging."""
    session = a_session(FakeUpstream())
    with capture_logs() as logs:
        await session.close()
        await session.close()

    assert [("session.closed", "r1", "fake", "unused", "debug")] == [
        (e["event"], e["request_id"], e["upstream"], e["outcome"], e["log_level"]) for e in logs
    ]
    assert 0 <= logs[0]["ms"] < 10_000


async def test_failure_is_told_when_closing() -> None:
    """A session whose upstream failed says so."""
    with capture_logs() as logs:
        async with a_session(FakeUpstream(error=UpstreamTimeoutError("late"))) as session:
            with pytest.raises(UpstreamTimeoutError):
                await session.request()

    assert ["error"] == [each["outcome"] for each in logs]


# --- Caps -------------------------------------------------------------------------------------

AD = an_inline()


async def opened(
    state: InMemoryBackend | None, upstream: FakeUpstream | None = None
) -> VastSession:
    """Open a session of the library that counts in *state*."""
    factory = SessionFactory(upstream or FakeUpstream(AD), state)
    return await factory.create_session("me")


async def watched(state: InMemoryBackend, limit: int | None = None, **more: Any) -> bool:
    """Ask for one ad as a session of its own; whether the cap let it through."""
    async with await opened(state) as session:
        allowed = await session.check_frequency_cap("me", limit, **more)
        if allowed:
            await session.request()
    return allowed


async def test_cap_counts_ads_that_came() -> None:
    """A viewer sees as many ads as the cap has places, and no more."""
    state = InMemoryBackend()

    assert [True, True, False, False] == [await watched(state, 2) for _ in range(4)]


@pytest.mark.parametrize(("limit", "seen"), [(None, 3), (1, 1), (0, 0)])
async def test_limits_of_a_cap(limit: int | None, seen: int) -> None:
    """No limit is three ads, and a limit of none is none: 0 is not taken for unsaid."""
    state = InMemoryBackend()

    assert seen == sum([await watched(state, limit) for _ in range(5)])


async def test_crowd_does_not_pass_a_cap() -> None:
    """Of fifty sessions of one viewer that ask at the same time, as many serve as may."""
    state = InMemoryBackend()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(watched(state, 3)) for _ in range(50)]

    assert 3 == sum(each.result() for each in tasks)
    assert not await watched(state, 3)


async def test_refused_place_is_not_counted() -> None:
    """Who serves something else where the cap is full has not taken a place of it."""
    state = InMemoryBackend()
    await watched(state, 1)
    async with await opened(state) as session:
        assert not await session.check_frequency_cap("me", 1)
        await session.request()

    assert await watched(state, 2)


async def test_ad_pays_for_one_place_only() -> None:
    """An ad that was settled does not count for what is taken after it."""
    state = InMemoryBackend()
    async with await opened(state) as session:
        await session.request()
        await session.settle()
        assert await session.check_frequency_cap("me", 1)

    assert await watched(state, 1)


async def test_place_is_given_back_without_an_ad() -> None:
    """What a session takes and does not use is free again when it is closed."""
    state = InMemoryBackend()
    for upstream in (FakeUpstream(b"<VAST/>"), FakeUpstream(status=500), FakeUpstream(AD)):
        async with await opened(state, upstream) as session:
            assert await session.check_frequency_cap("me", 1)
            if upstream.status != 200:
                with pytest.raises(UpstreamError):
                    await session.request()
            elif upstream.body != AD:
                await session.request()

    assert await watched(state, 1)
    assert not await watched(state, 1)


async def test_asking_again_takes_no_second_place() -> None:
    """Within one session a viewer's cap is taken once, however often it is asked."""
    state = InMemoryBackend()
    async with await opened(state) as session:
        assert [True] * 5 == [await session.check_frequency_cap("me", 2) for _ in range(5)]
        await session.request()

    assert [True, False] == [await watched(state, 2) for _ in range(2)]


async def test_asking_again_with_another_limit_is_judged_anew() -> None:
    """A stricter limit is not passed because a place was taken under a wider one."""
    state = InMemoryBackend()
    await watched(state, 5)
    await watched(state, 5)
    async with await opened(state) as session:
        assert await session.check_frequency_cap("me", 5)
        assert not await session.check_frequency_cap("me", 2)
        assert await session.check_frequency_cap("me", 3)


async def test_windows_are_apart() -> None:
    """Caps of different windows count by themselves, also in one session."""
    state = InMemoryBackend()
    async with await opened(state) as session:
        assert await session.check_frequency_cap("me", 1)
        assert await session.check_frequency_cap("me", 2, window=86_400)
        await session.request()

    assert not await watched(state, 1)
    assert await watched(state, 2, window=86_400)
    assert not await watched(state, 2, window=86_400)


async def test_window_ends() -> None:
    """What is older than the window counts no more."""
    now = [1_000_000_000_000]
    state = InMemoryBackend(clock=lambda: now[0])
    await watched(state, 1, window=60)
    now[0] += 59_000
    assert not await watched(state, 1, window=60)
    now[0] += 2_000

    assert await watched(state, 1, window=60)


async def test_viewers_are_apart_and_nobody_is_counted() -> None:
    """Each viewer has a count; who is not known has none."""
    async with await opened(InMemoryBackend()) as session:
        assert await session.check_frequency_cap("me", 1)
        assert await session.check_frequency_cap("you", 1)
        assert [True, True] == [await session.check_frequency_cap("", 1) for _ in range(2)]


async def test_state_has_no_ids_of_viewers() -> None:
    """The state knows a viewer by a keyed hash, and not by the id."""
    state = InMemoryBackend()
    await watched(state)

    assert [22] == [len(each.name) for each in state._books]
    assert all("me" != each.name for each in state._books)


async def test_resolver_says_that_an_ad_came() -> None:
    """Who follows the chain himself says whether an ad is shown, and it counts."""
    state = InMemoryBackend()
    for shown in (False, True):
        async with await opened(state) as session:
            assert await session.check_frequency_cap("me", 1)
            await session.settle(shown=shown)

    assert not await watched(state, 1)


async def test_settled_session_is_good_for_another_ad() -> None:
    """After settling, the next ad takes a place of its own."""
    state = InMemoryBackend()
    async with await opened(state) as session:
        for expected in (True, True, False):
            assert expected == await session.check_frequency_cap("me", 2)
            await session.request()
            await session.settle()


@pytest.mark.parametrize("window", [0, -1, float("nan"), float("inf")])
async def test_nonsense_is_no_window(window: float) -> None:
    """A window that is none is refused."""
    async with await opened(InMemoryBackend()) as session:
        with pytest.raises(ValueError, match="no window"):
            await session.check_frequency_cap("me", window=window)


async def test_negative_is_no_limit() -> None:
    """A negative limit is refused."""
    async with await opened(InMemoryBackend()) as session:
        with pytest.raises(ValueError, match="write 0 for never"):
            await session.check_frequency_cap("me", -1)


# --- Budgets ----------------------------------------------------------------------------------


async def test_budget_adds_exactly_what_it_is_given() -> None:
    """Amounts are added to the last digit, whatever number they are written as."""
    async with await opened(InMemoryBackend()) as session:
        for amount in (0.1, 0.2, "2.5", Decimal("0.000001"), 3):
            await session.track_budget("spring", amount)

        assert Decimal("5.800001") == await session.get_budget("spring")
        assert Decimal(0) == await session.get_budget("autumn")


@pytest.mark.parametrize("amount", [-1, "-0.0000001", float("nan"), float("inf"), "x", "1e30"])
async def test_nonsense_is_no_amount(amount: Any) -> None:
    """What is no amount, or less than nothing, is refused, and nothing is spent."""
    async with await opened(InMemoryBackend()) as session:
        with pytest.raises(ValueError, match=r"money|less than nothing"):
            await session.track_budget("spring", amount)

        assert 0 == await session.get_budget("spring")


async def test_budget_has_the_key_of_the_state() -> None:
    """What sessions spend is what the state tells under ``budget:`` and the campaign."""
    state = InMemoryBackend()
    async with await opened(state) as session:
        await session.track_budget("budget:x", "1.5")

    assert Decimal("1.5") == await state.get_spend("budget:budget:x")


async def spent(state: InMemoryBackend) -> bool:
    """Ask for one ad of half a unit, of ten units in all."""
    async with await opened(state) as session:
        allowed = await session.reserve_budget("spring", "0.5", 10)
        if allowed:
            await session.request()
    return allowed


async def test_crowd_does_not_pass_a_budget() -> None:
    """Of fifty sessions that ask at the same time, as many are paid as there is money for."""
    state = InMemoryBackend()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(spent(state)) for _ in range(50)]

    assert 20 == sum(each.result() for each in tasks)
    assert 10 == await state.get_spend("budget:spring")


async def test_money_is_given_back_without_an_ad() -> None:
    """What was reserved for an ad that did not come is not spent."""
    state = InMemoryBackend()
    async with await opened(state, FakeUpstream()) as session:
        assert await session.reserve_budget("spring", 10, 10)
        await session.request()

    [level] = await state.levels(Account("campaign", "spring"), [money(0)])
    assert (0, 0) == (level.counted, level.reserved)


# --- Without a state --------------------------------------------------------------------------


async def test_session_without_a_state_says_so() -> None:
    """A session that was made without a state refuses to count, loudly."""
    async with await opened(None) as session:
        with pytest.raises(RuntimeError, match="make it with a state_backend"):
            await session.check_frequency_cap("me")
        with pytest.raises(RuntimeError, match="make it with a state_backend"):
            await session.get_budget("spring")
        await session.settle()


async def test_closed_session_counts_nothing() -> None:
    """A closed session takes no places and no money."""
    session = await opened(InMemoryBackend())
    await session.close()

    with pytest.raises(RuntimeError, match="is closed"):
        await session.check_frequency_cap("me")
    with pytest.raises(RuntimeError, match="is closed"):
        await session.track_budget("spring", 1)


async def test_state_that_is_away_is_the_callers_to_judge() -> None:
    """Without the state, asking raises; an ad that is shown all the same counts in the end."""
    state = AwayState("reserve")
    async with await opened(state) as session:
        with pytest.raises(StateBackendError):
            await session.check_frequency_cap("me", 1)
        await session.request()
    state.away.clear()

    assert not await watched(state, 1)


@pytest.mark.parametrize("away", ["confirm", "flush"])
async def test_closing_does_not_fail_without_the_state(away: str) -> None:
    """Closing a session logs that the state is away, and raises nothing."""
    with capture_logs() as logs:
        async with await opened(AwayState(away)) as session:
            assert await session.check_frequency_cap("me")
            await session.request()

    assert ["session.not_settled", "session.closed"] == [each["event"] for each in logs]
    assert {session.context.request_id} == {each["request_id"] for each in logs}
    assert ["warning", "info"] == [each["log_level"] for each in logs]


async def test_settling_is_tried_again_when_closing() -> None:
    """What could not be counted when the session was settled is counted when it is closed."""
    state = AwayState("confirm")
    async with await opened(state) as session:
        assert await session.check_frequency_cap("me", 1)
        await session.request()
        with pytest.raises(StateBackendError):
            await session.settle()
        state.away.clear()

    assert 1 == state.flushes
    assert not await watched(state, 1)


async def test_cancelled_session_gives_back_what_it_took() -> None:
    """Who goes away in the middle leaves nothing reserved."""
    state = InMemoryBackend()
    taken = asyncio.Event()

    async def ask() -> None:
        """Take a place, and stay."""
        async with await opened(state) as session:
            await session.check_frequency_cap("me", 1)
            taken.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(ask())
        await taken.wait()
        assert not await watched(state, 1)
        task.cancel()

    assert await watched(state, 1)


async def test_face_of_a_session() -> None:
    """A session is what the narrow face says, and tells nothing of its viewer."""
    session: UpstreamSession = await opened(InMemoryBackend())

    assert "me" == session.context.cookies["uid"]
    assert f"<VastSession {session.context.request_id} at fake>" == repr(session)
    await session.close()


# --- Once more ----------------------------------------------------------------------------------


def a_jar(value: str) -> CookieJar:
    """Build a jar with a cookie of a viewer."""
    jar = CookieJar(lambda _: False)
    jar.put("uid", value, "fake")
    return jar


def cookies_of(session: VastSession) -> dict[str, str]:
    """Give the cookies that an upstream of scope ``viewer`` is sent."""
    jar = session.jar_of("viewer")
    assert jar is not None
    return {each.name: each.value for each in jar}


async def test_same_request_again() -> None:
    """A session opened again is the same request, with a trace, chain and deadline of its own."""
    factory = SessionFactory(is_public_suffix=lambda _: False)
    facts = Request(AdRequest("/", device=Device(ip="192.0.2.1")), viewer="ann", deadline=1.0)
    first = factory.open_session(factory.context(), FakeUpstream(), request=facts)
    first.jar.put("chain", "1", "fake")
    again = first.again(9.0)
    again.trace.begin()

    assert first.context is again.context
    assert first.macros is again.macros
    assert replace(facts, deadline=9.0) == again.request_facts
    assert (0, 1) == (first.trace.begun, again.trace.begun)
    assert (1, 0) == (len(first.jar), len(again.jar))


async def test_viewers_cookies_go_along_again() -> None:
    """A session opened again sends the viewer's cookies, and changes none that are kept."""
    factory = SessionFactory(is_public_suffix=lambda _: False)
    facts = Request(AdRequest("/"), viewer="ann", viewer_jar=a_jar("ann"))
    first = factory.open_session(factory.context(), FakeUpstream(), request=facts)
    again = first.again(9.0)
    sent = cookies_of(again)
    jar = again.jar_of("viewer")
    assert jar is not None
    jar.put("uid", "bob", "fake")

    assert {"uid": "ann"} == sent
    assert {"uid": "bob"} == cookies_of(again)
    assert {"uid": "ann"} == cookies_of(first)


async def test_nobodys_cookies_again() -> None:
    """Without a viewer's jar a session opened again has none, and its chain's is its own."""
    first = a_session(FakeUpstream())
    again = first.again(9.0)

    assert again.request_facts.viewer_jar is None
    assert again.jar is again.jar_of("viewer")
    assert again.jar is not first.jar
