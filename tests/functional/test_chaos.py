"""
All goes wrong at once: random toxics in front of two ad servers and of Redis, drawn from a seed.

``make test`` plays one round of a few seconds. The longer form, ``make chaos``, sets
``CHAOS_ROUNDS``, and ``CHAOS_SEED``, which the first round has; each round after it has the next.
A round that fails is played again by its seed, which its name tells.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from tests.chaos.proxy import ChaosProxy
from tests.chaos.schedule import ANY, GARBAGE, Act, drawn, played
from tests.functional.conftest import (
    StartProxy,
    States,
    a_document,
    an_ad,
    budget,
    metric,
    viewer,
    wait_for,
)
from tests.support.ad_server import AdServer
from tests.support.player import Answered, Player, traffic
from tests.support.proxy import Proxy, a_config

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))

SECONDS = 5.0
"""Of trouble in each round."""

QUIET = 1.0
"""Seconds without trouble at its end."""

RATE = 60
"""Ad requests a second."""

DEADLINE = 0.6
"""Seconds of an ad request."""

LATE = 0.1
"""Seconds that the proxy itself may take beyond it."""

STATE_TIMEOUT = 0.05
"""Seconds for an exchange with Redis, of which an ad request waits for one before and one after."""

PRICE = 0.0025
"""Of one ad."""

VIEWERS = ("ann", "ben", "cid")

PLACES = ("primary", "house", "redis")
"""What the toxics stand in front of."""


def a_chaos_config(primary: str, house: str, state: str) -> dict[str, Any]:
    """Build a config with a waterfall, caps, a budget, and breakers that soon try again."""
    common = {"timeout": "400ms", "circuit_breaker": {"reset_timeout": "300ms"}}
    upstreams = {
        "primary": {"endpoint": f"{primary}/ad", "soft_timeout": "150ms", **common},
        "house": {"endpoint": f"{house}/ad", **common},
    }
    route = {
        "path": "/ad",
        "upstreams": ["primary", "house"],
        "viewer": ["query:uid"],
        "deadline": f"{DEADLINE * 1000:.0f}ms",
        "frequency_caps": [{"limit": 100_000, "window": "1h"}],
        "budget": {
            "campaign": "chaos",
            "limit": "1000",
            "cpm": "2.50",
            "on_state_loss": "serve",
        },
    }
    return a_config(upstreams, [route], state=state)


@dataclass(slots=True)
class Round:
    """What came of a round."""

    schedules: dict[str, list[Act]]
    answers: list[Answered] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    """The proxy's own lines about the requests."""
    spent: float = 0.0
    counted: dict[str, int] = field(default_factory=dict)
    harmed: dict[str, int] = field(default_factory=dict)
    """Connections in front of each place that did not end in order."""

    def ads(self, name: str) -> int:
        """Count the ads that the viewer called *name* was given."""
        own = self.answers[VIEWERS.index(name) :: len(VIEWERS)]
        return sum(len(each.ads) for each in own)

    def __str__(self) -> str:
        acts = {name: ", ".join(map(str, each)) for name, each in self.schedules.items()}
        return "\n".join(f"{name}: {each}" for name, each in acts.items())


@asynccontextmanager
async def fronts(seed: int, redis: int) -> AsyncIterator[dict[str, ChaosProxy]]:
    """Run two ad servers, and chaos proxies in front of them and of the port of a *redis*."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(AdServer(fallback=a_document(an_ad(name))))
            for name in PLACES[:2]
        ]
        ports = (*(each.port for each in servers), redis)
        yield {
            name: await stack.enter_async_context(ChaosProxy(("127.0.0.1", port), seed=seed))
            for name, port in zip(PLACES, ports, strict=True)
        }


async def play(proxy: Proxy, places: dict[str, ChaosProxy], told: Round) -> None:
    """Let players ask while the schedules are played; then wait until all is counted."""
    targets = [f"/ad?uid={each}" for each in VIEWERS]
    async with Player(proxy.base) as player, asyncio.TaskGroup() as group:
        for name, chaos in places.items():
            group.create_task(played(chaos, told.schedules[name]))
        told.answers = await traffic(player, targets, rate=RATE, seconds=SECONDS + QUIET)
    await asyncio.to_thread(
        wait_for,
        lambda: (
            metric(proxy, "vastproxy_state_up") and not metric(proxy, "vastproxy_journal_pending")
        ),
    )


@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS), ids=lambda seed: f"seed-{seed}")
async def test_chaos(seed: int, start_proxy: StartProxy, states: States) -> None:
    """
    Whatever happens to ad servers and Redis, each request has one answer, VAST, in time.

    After it all impressions are counted and paid for, each once.
    """
    random = Random(seed)
    menus = {"redis": ANY}
    told = Round({each: drawn(random, SECONDS, menus.get(each, ANY + GARBAGE)) for each in PLACES})
    state = await asyncio.to_thread(states.url, "redis")
    async with fronts(seed, states.valkey.port) as places:
        port = f":{states.valkey.port}/"
        config = a_chaos_config(
            places["primary"].base,
            places["house"].base,
            state.replace(port, f":{places['redis'].port}/"),
        )
        proxy = await asyncio.to_thread(start_proxy, config)
        await play(proxy, places, told)
        told.records = proxy.records(event="request")
        told.spent = (await asyncio.to_thread(budget, proxy, "chaos"))["spent"]
        for each in VIEWERS:
            caps = (await asyncio.to_thread(viewer, proxy, each))["caps"]
            told.counted[each] = sum(cap["counted"] for cap in caps)
        told.harmed = {
            name: sum(chaos.facts.ends.values()) - chaos.facts.ends["close"]
            for name, chaos in places.items()
        }
        # Shown by pytest where the round fails.
        print(told)  # noqa: T201
        check(told)


def check(told: Round) -> None:
    """Hold what came of a round against what is promised."""
    asked = round(RATE * (SECONDS + QUIET))
    late = (DEADLINE + LATE + 2 * STATE_TIMEOUT) * 1000

    assert any(told.harmed.values())
    assert asked == len(told.answers)
    assert all(each.is_vast for each in told.answers)
    assert asked == len({each["request_id"] for each in told.records}) == len(told.records)
    assert late >= max(each["ms"] for each in told.records)
    assert any(each.ads for each in told.answers)
    assert {each: told.ads(each) for each in VIEWERS} == told.counted
    assert pytest.approx(sum(map(told.ads, VIEWERS)) * PRICE, abs=1e-9) == told.spent
