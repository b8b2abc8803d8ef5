"""One ad, served to code: cap, budget, fetch, count."""

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer, Reply
from tests.support.away_state import AwayState
from tests.support.documents import an_inline
from vastproxy.flow.operator import SessionOperator
from vastproxy.session.factory import SessionFactory
from vastproxy.state.base import Account, money
from vastproxy.state.memory import InMemoryBackend
from vastproxy.upstream.upstream import VastUpstream


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run an ad server that always has an ad."""
    async with AdServer(fallback=an_inline()) as running:
        yield running


@pytest.fixture
async def upstream(server: AdServer) -> AsyncIterator[VastUpstream]:
    """Open the upstream there."""
    async with VastUpstream.open(server.url("/")) as opened:
        yield opened


async def serve(
    upstream: VastUpstream, state: InMemoryBackend, limit: Any = 10, cap: int = 3, **more: Any
) -> str | None:
    """Serve one ad to the viewer "me", in a session of its own."""
    async with await SessionFactory(upstream, state).create_session("me") as session:
        return await SessionOperator().serve_ad(session, "spring", limit, cap, **more)


async def standing(state: InMemoryBackend) -> tuple[int, int]:
    """Give what the campaign has spent, and what is reserved of it, in micro-units."""
    [level] = await state.levels(Account("campaign", "spring"), [money(0)])
    return level.counted, level.reserved


async def test_ad_is_served_and_counted(upstream: VastUpstream) -> None:
    """An ad takes a place of the viewer's cap and its price of the campaign's money."""
    state = InMemoryBackend()
    ads = [await serve(upstream, state, price="2.5") for _ in range(4)]

    assert [True, True, True, False] == [ad is not None and "<InLine>" in ad for ad in ads]
    assert (7_500_000, 0) == await standing(state)


async def test_crowd_passes_neither_cap_nor_budget(
    upstream: VastUpstream, server: AdServer
) -> None:
    """Of fifty that ask at once, as many are served as there is room for, and nobody else asks."""
    state = InMemoryBackend()
    async with asyncio.TaskGroup() as group:
        work = [serve(upstream, state, 10, 50, price="2.5") for _ in range(50)]
        tasks = [group.create_task(each) for each in work]

    assert 4 == sum(each.result() is not None for each in tasks)
    assert 4 == len(server.requests)
    assert (10_000_000, 0) == await standing(state)


async def test_cap_is_given_back_where_the_money_is_spent(upstream: VastUpstream) -> None:
    """A viewer loses no place to an ad that there was no money for."""
    state = InMemoryBackend()

    async with await SessionFactory(upstream, state).create_session("me") as session:
        assert await SessionOperator().serve_ad(session, "spring", 1, 1, price=2) is None
        # At once, and not only when that session ends.
        assert await serve(upstream, state, 2, 1, price=2) is not None
    assert await serve(upstream, state, 9, 1, price=2) is None


async def test_budget_without_a_price_is_only_looked_at(upstream: VastUpstream) -> None:
    """Without a price an ad costs nothing, and a campaign that has spent its limit gets none."""
    state = InMemoryBackend()
    await state.add_spend("budget:spring", 9)

    assert await serve(upstream, state, 10) is not None
    assert await serve(upstream, state, Decimal(9)) is None
    assert (9_000_000, 0) == await standing(state)


@pytest.mark.parametrize("reply", [Reply(status=500), Reply(status=204), b"<VAST/>", b"nonsense"])
async def test_no_ad_costs_nothing(
    upstream: VastUpstream, server: AdServer, reply: Reply | bytes
) -> None:
    """Where the ad server fails, or has no ad, nothing is given, and nothing is counted."""
    state = InMemoryBackend()
    server.fallback = reply
    assert await serve(upstream, state, 1, 1, price=1) is None
    server.fallback = an_inline()

    assert await serve(upstream, state, 1, 1, price=1) is not None


@pytest.mark.parametrize(
    ("away", "price", "events"),
    [
        ("reserve", 1, {"session.state_away"}),
        ("get_spend", 0, {"session.state_away"}),
        ("confirm", 1, {"session.not_settled"}),
    ],
)
async def test_ad_is_served_without_the_state(
    upstream: VastUpstream, away: str, price: int, events: set[str]
) -> None:
    """Where the state is away an ad is served all the same, and the log says so."""
    state = AwayState(away)
    with capture_logs() as logs:
        ad = await serve(upstream, state, 1, 1, price=price)

    assert ad is not None
    assert events | {"session.closed"} == {each["event"] for each in logs}


async def test_ad_without_the_state_counts_when_it_is_back(upstream: VastUpstream) -> None:
    """An ad that was served while the state was away is counted if it is back in time."""
    state = AwayState("reserve")
    assert await serve(upstream, state, 1, 1, price=1) is not None
    state.away.clear()

    assert (1_000_000, 0) == await standing(state)
    assert await serve(upstream, state, 9, 1, price=1) is None


async def test_reason_is_logged(upstream: VastUpstream) -> None:
    """A line of the log says why no ad was served, and to which request."""
    with capture_logs() as logs:
        await serve(upstream, InMemoryBackend(), 10, 0)
        await serve(upstream, InMemoryBackend(), 0, 1, price=1)

    reasons = [each["reason"] for each in logs if each["event"] == "session.refused"]
    assert ["capped", "over_budget"] == reasons


async def test_several_ads_in_one_session(upstream: VastUpstream) -> None:
    """Each ad that an operator serves counts, also in one session."""
    operator = SessionOperator(window=60)
    factory = SessionFactory(upstream, InMemoryBackend())
    async with await factory.create_session("me") as session:
        ads = [await operator.serve_ad(session, "spring", 10, 2, price=1) for _ in range(3)]

        assert [True, True, False] == [each is not None for each in ads]
        assert 2 == await session.get_budget("spring")
    assert "<SessionOperator window: 60 s>" == repr(operator)


async def test_viewer_without_an_id_has_no_cap(upstream: VastUpstream) -> None:
    """Without a viewer there is nobody to count; the budget holds all the same."""
    state = InMemoryBackend()
    operator = SessionOperator()
    async with await SessionFactory(upstream, state).create_session() as session:
        ads = [await operator.serve_ad(session, "spring", 2, 1, price=1) for _ in range(3)]

    assert [True, True, False] == [each is not None for each in ads]
