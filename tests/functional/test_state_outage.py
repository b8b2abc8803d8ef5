"""Where the state is stopped, killed or not there yet, ads are served, and all is counted later."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    a_document,
    an_ad,
    budget,
    metric,
    viewer,
    wait_for,
)
from tests.support.ad_server import AdServer, Reply
from tests.support.player import Answered, Player, percentile, traffic
from tests.support.postgres import postgres_server
from tests.support.proxy import Proxy, a_config, ask, running_proxy
from tests.support.valkey import valkey_server

RATE = 100
"""Ad requests a second."""

BEFORE, AWAY, AFTER = 1.2, 2.0, 1.0
"""Seconds of traffic until the server goes, until it is back, and until the end."""

PRICE = 0.0025

POLICIES = ("serve", "lease", "tight", "deny")
"""The routes, by what they do while the state is away; ``tight`` cannot afford a lease."""

TIGHT = 40
"""Ads that the budget of ``/tight`` pays for."""

LEASED = 20
"""
Ads of ``/lease`` that are served in an outage at the least.

A lease is a fiftieth of what is left, here of ten thousand ads, and renewed when half is gone.
"""

SLOWER = 0.25
"""
Seconds by which the slowest hundredth may become slower on a machine that has other work.

Those that wait when the server goes wait for state_timeout; on an idle machine the difference is
below 0.03.
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that keeps state, and how it goes and comes back."""

    new_state: Callable[[], str]
    stop: Callable[[], None]
    cont: Callable[[], None]
    kill: Callable[[], None] = lambda: None
    start: Callable[[], None] = lambda: None


@contextlib.contextmanager
def a_valkey() -> Iterator[Server]:
    """Run a Valkey server; each state is a database of it."""
    numbers = iter(range(1, 16))
    with valkey_server() as valkey:

        def new_state() -> str:
            return f"{valkey.url.removesuffix('/0')}/{next(numbers)}"

        yield Server(new_state, valkey.stop, valkey.cont, valkey.kill, valkey.restart)


@contextlib.contextmanager
def a_postgres() -> Iterator[Server]:
    """Run a PostgreSQL server."""
    with postgres_server() as postgres:
        yield Server(
            postgres.new_database, postgres.pause, postgres.resume, postgres.kill, postgres.restart
        )


@contextlib.contextmanager
def a_file(directory: Path) -> Iterator[Server]:
    """Keep state in files; one is away while another process keeps it locked."""
    paths = (directory / f"state-{number}.db" for number in range(100))
    current: list[Path] = []
    with contextlib.closing(_Locker()) as locker:

        def new_state() -> str:
            current[:] = [next(paths)]
            return f"sqlite:///{current[0]}"

        yield Server(new_state, lambda: locker.lock(current[0]), locker.close)


class _Locker:
    def __init__(self) -> None:
        self._connection: sqlite3.Connection | None = None

    def lock(self, path: Path) -> None:
        """Let nobody write to the database at *path*."""
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA busy_timeout = 5000")
        connection.execute("BEGIN IMMEDIATE")
        self._connection = connection

    def close(self) -> None:
        """Let it go."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Start each server when it is wanted first."""
    directory = tmp_path_factory.mktemp("files")
    makers: dict[str, Callable[[], AbstractContextManager[Server]]] = {
        "redis": a_valkey,
        "postgresql": a_postgres,
        "sqlite": lambda: a_file(directory),
    }
    started: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def server(kind: str) -> Server:
            if kind not in started:
                started[kind] = stack.enter_context(makers[kind]())
            return started[kind]

        yield server


@pytest.fixture(autouse=True)
def an_ad_each(ads: AdServer) -> None:
    """Let the ad server have an ad."""
    ads.replies["/ad"] = Reply(a_document(an_ad("main")))


def an_outage_config(ads: AdServer, state: str, **sections: Any) -> dict[str, Any]:
    """Build a config with a route for each policy; the first one is capped, too."""
    limits = {"serve": "1000", "lease": "25", "tight": f"{TIGHT * PRICE:g}", "deny": "1000"}
    routes: list[dict[str, Any]] = [
        {
            "path": f"/{each}",
            "upstreams": ["main"],
            "viewer": ["query:uid"],
            "deadline": "10s",
            "budget": {
                "campaign": each,
                "limit": limits[each],
                "cpm": "2.50",
                "on_state_loss": "lease" if each == "tight" else each,
            },
        }
        for each in POLICIES
    ]
    routes[0]["frequency_caps"] = [{"limit": 100_000, "window": "1h"}]
    upstreams = {"main": {"endpoint": ads.url("/ad"), "timeout": "5s"}}
    server = {"secret": [SECRET]}
    return a_config(upstreams, routes, state=state, server=server, **sections)


@dataclass(frozen=True, slots=True)
class Told:
    """What players got, and when the server was away, on the monotonic clock."""

    answers: list[Answered]
    since: float
    until: float
    up: tuple[float, float]
    """What the metric said during the outage, and after it."""

    def of(self, policy: str, since: float = 0.0, until: float = 2.0**60) -> list[Answered]:
        """Give the answers of a route to what was asked between two times."""
        own = self.answers[POLICIES.index(policy) :: len(POLICIES)]
        return [each for each in own if since <= each.at < until]

    def during(self, policy: str) -> list[Answered]:
        """Give the answers of a route to what was asked during the outage."""
        return self.of(policy, self.since, self.until)


async def outage(
    proxy: Proxy, go: Callable[[], None], come: Callable[[], None], *, away: float = AWAY
) -> Told:
    """Let players ask while the server goes and comes back; wait until the proxy noticed."""
    targets = [f"/{each}?uid=v" for each in POLICIES]
    async with Player(proxy.base) as player, asyncio.TaskGroup() as group:
        seconds = BEFORE + away + AFTER
        playing = group.create_task(traffic(player, targets, rate=RATE, seconds=seconds))
        await asyncio.sleep(BEFORE)
        await asyncio.to_thread(go)
        await asyncio.to_thread(wait_for, lambda: not metric(proxy, "vastproxy_state_up"))
        since = time.monotonic()
        await asyncio.sleep(away)
        during = metric(proxy, "vastproxy_state_up")
        until = time.monotonic()
        await asyncio.to_thread(come)
        await asyncio.to_thread(wait_for, lambda: metric(proxy, "vastproxy_state_up"))
        answers = await playing
    await asyncio.to_thread(wait_for, lambda: not metric(proxy, "vastproxy_journal_pending"))
    return Told(answers, since, until, (during, metric(proxy, "vastproxy_state_up")))


def shown(answers: Sequence[Answered]) -> int:
    """Count the ads."""
    return sum(len(each.ads) for each in answers)


def cost(answers: Sequence[Answered]) -> Any:
    """Give what the ads of *answers* cost, as a number to compare with."""
    return pytest.approx(shown(answers) * PRICE, abs=1e-9)


OUTAGES = [
    ("redis", "stopped"),
    ("redis", "killed"),
    ("postgresql", "stopped"),
    ("postgresql", "killed"),
    ("sqlite", "stopped"),
]


@pytest.mark.parametrize(("kind", "how"), OUTAGES)
async def test_outage(
    kind: str,
    how: str,
    servers: Callable[[str], Server],
    start_proxy: StartProxy,
    ads: AdServer,
) -> None:
    """
    While the state is away all answers are valid VAST, and not slower; after it all is counted.

    ``serve`` serves on, ``lease`` does from what it reserved and never above its limit, ``deny``
    serves nothing. One line says that the state went, and one that it is back.
    """
    server = servers(kind)
    proxy = start_proxy(an_outage_config(ads, server.new_state()))
    go, come = (server.kill, server.start) if how == "killed" else (server.stop, server.cont)
    told = await outage(proxy, go, come)
    before = [each for each in told.answers if each.at < told.answers[0].at + BEFORE - 0.1]
    during = [each for policy in POLICIES for each in told.during(policy)]
    proxy.wait_record(event="state.back")

    assert all(each.is_vast for each in told.answers)
    assert (0, 1) == told.up
    assert SLOWER > percentile(during, 0.99) - percentile(before, 0.99)
    assert len(told.of("serve")) == shown(told.of("serve"))
    assert LEASED < shown(told.during("lease"))
    assert 0 == shown(told.during("deny"))
    assert 0 < shown(told.of("deny", until=told.since))
    assert (True, 0) == (
        bool(shown(told.of("tight", until=told.since))),
        shown(told.during("tight")),
    )
    for each in POLICIES:
        assert cost(told.of(each)) == budget(proxy, each)["spent"]
    assert TIGHT * PRICE >= budget(proxy, "tight")["spent"]
    assert [shown(told.of("serve"))] == [each["counted"] for each in viewer(proxy, "v")["caps"]]
    assert (1, 1) == (
        len(proxy.records(event="state.away", level="warning")),
        len(proxy.records(event="state.back", level="warning")),
    )


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
async def test_start_without_the_state(
    kind: str, servers: Callable[[str], Server], start_proxy: StartProxy, ads: AdServer
) -> None:
    """A proxy that starts while the state is away serves, and counts when it is there."""
    server = servers(kind)
    state = server.new_state()
    server.kill()
    try:
        proxy = start_proxy(an_outage_config(ads, state))
        async with Player(proxy.base) as player:
            answers = await player.ask_at_once("/serve?uid=early", 20)
            denied = await player.ask_at_once("/deny", 5)
            fired = await player.fire(url for each in answers for url in each.beacons)
        pending = metric(proxy, "vastproxy_journal_pending")
    finally:
        server.start()
    wait_for(lambda: metric(proxy, "vastproxy_state_up"))

    assert (20, 0) == (shown(answers), shown(denied))
    assert {204} == {each.status for each in fired}
    assert 40 == pending
    assert cost(answers) == budget(proxy, "serve")["spent"]
    assert [20] == [each["counted"] for each in viewer(proxy, "early")["caps"]]


class KilledError(Exception):
    """The proxy was killed on purpose, so it has no exit code 0."""


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
async def test_journal_outlives_the_proxy(
    kind: str,
    servers: Callable[[str], Server],
    start_proxy: StartProxy,
    ads: AdServer,
    tmp_path: Path,
) -> None:
    """Impressions that were taken in an outage are booked, also if the proxy is killed in it."""
    server = servers(kind)
    config = an_outage_config(ads, server.new_state(), journal=str(tmp_path / "journal"))
    with contextlib.suppress(KilledError), running_proxy(config, tmp_path) as proxy:
        async with Player(proxy.base) as player:
            known = await player.ask_at_once("/serve?uid=j", 10)
            server.stop()
            try:
                unknown = await player.ask_at_once("/serve?uid=j", 10)
                urls = [url for each in (*known, *unknown) for url in each.beacons]
                fired = await player.fire(urls)
                again = await player.fire(urls[:5])
            finally:
                proxy.process.kill()
                proxy.wait_exit()
                server.cont()
        raise KilledError
    left = list((tmp_path / "journal").iterdir())
    text = b"".join(each.read_bytes() for each in left)
    second = start_proxy(config)
    wait_for(lambda: cost([*known, *unknown]) == budget(second, "serve")["spent"])

    assert {204} == {each.status for each in (*fired, *again)}
    assert b'"j"' not in text
    assert [20] == [each["counted"] for each in viewer(second, "j")["caps"]]
    assert 1 == len(second.records(event="journal.found"))
    assert not [each for each in left if each.exists()]


async def test_operators_in_an_outage(
    servers: Callable[[str], Server], start_proxy: StartProxy, ads: AdServer
) -> None:
    """Operators get 503 and a reason while the state is away, and health is good all the time."""
    server = servers("redis")
    proxy = start_proxy(an_outage_config(ads, server.new_state()))
    server.stop()
    try:
        told = [
            await asyncio.to_thread(_ask, proxy, path)
            for path in ("/api/budgets", "/api/budgets/serve", "/api/viewers/v")
        ]
        healthy = [_ask(proxy, path)[0] for path in ("/healthz", "/readyz")]
    finally:
        server.cont()
    wait_for(lambda: _ask(proxy, "/api/budgets")[0] == 200)

    assert [503] * 3 == [status for status, _ in told]
    assert all("state" in body["error"] for _, body in told)
    assert [200, 200] == healthy


def _ask(proxy: Proxy, path: str) -> tuple[int, Any]:
    answer = ask(proxy.admin, path)
    return answer.status, answer.json()
