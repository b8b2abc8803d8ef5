"""What an ad server is made of that no configuration made."""

import asyncio

import pytest

from tests.support.away_state import AwayState
from vastproxy.config.template import Template
from vastproxy.errors import StateBackendError
from vastproxy.flow.embedded import WINDOW, Embedded
from vastproxy.state.windows import counter_key
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.upstream import UpstreamSettings, VastUpstream


class Unusable(AwayState):
    """A state that is there, and of another version; it counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.pings = 0
        self.broken = True

    async def ping(self) -> None:
        """Refuse, or answer."""
        self.pings += 1
        await asyncio.sleep(0)
        if self.broken:
            raise StateBackendError("tables of another version")


def an_upstream() -> VastUpstream:
    """Build an upstream that nobody asks."""
    settings = UpstreamSettings("main", Template.parse("http://x.example/"))
    return VastUpstream(settings, AiohttpClient(EgressPolicy()), lambda: 0.0)


def test_route_counts_when_it_answers() -> None:
    """Cap and budget of one ad are counted at the decision: no beacon can come back."""
    route = Embedded([an_upstream()], None, None).route("spring", "10", 2, "0.5")
    (cap,), budget = route.terms.caps, route.terms.budget

    assert budget is not None
    assert ("decision", "decision") == (cap.count_at, budget.count_at)
    assert (10_000_000, 500_000, 2) == (budget.limit, budget.price, cap.limit)


def test_cap_has_the_counter_of_sessions() -> None:
    """The cap of a route and that of a session are one counter."""
    (cap,) = Embedded([an_upstream()], None, None).route("spring", 1, 2, None).terms.caps

    assert counter_key(WINDOW, "ads") == cap.claim("viewer", 0).key == "r3600000|ads|"


async def test_state_is_looked_at_once() -> None:
    """Many first calls at the same time look at the state once; later ones not at all."""
    state = Unusable()
    state.broken = False
    made = Embedded([an_upstream()], state, None)
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(made.open())
    await made.open()

    assert 1 == state.pings
    assert repr(made).startswith("<Embedded ['main'], <GuardedState available")


async def test_state_that_cannot_be_used_is_told_each_time() -> None:
    """A state of another version is a mistake of the operator's, and not passed over."""
    state = Unusable()
    made = Embedded([an_upstream()], state, None)
    for _ in range(2):
        with pytest.raises(StateBackendError, match="another version"):
            await made.open()
    state.broken = False
    await made.open()

    assert 3 == state.pings


async def test_end_leaves_nothing_behind() -> None:
    """After the end nobody looks for a state that is away, and the state is the caller's still."""
    state = AwayState("ping")
    made = Embedded([an_upstream()], state, None)
    before = asyncio.all_tasks()
    await made.open()
    looking = [each.get_name() for each in asyncio.all_tasks() - before]
    await made.close()

    assert ["state: look"] == looking
    assert set() == asyncio.all_tasks() - before
