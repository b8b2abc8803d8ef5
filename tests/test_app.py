"""The running proxy: what is opened together is closed in reverse, also when it could not start."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer, Received, Reply
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import ROOT, a_config
from vastproxy.app import Keeping, Proxy, egress_policy, keeping, proxy
from vastproxy.config.load import loads
from vastproxy.config.schema import Config
from vastproxy.model import AdRequest, AdResponse, Query
from vastproxy.serving import served


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run an ad server with an ad."""
    async with AdServer({"/one": an_inline()}) as running:
        yield running


def a_server_config(server: AdServer, listen: object, **settings: Any) -> Config:
    """Build a config with one route that listens at *listen*."""
    found = a_config(
        {"main": server.url("/one")},
        [{"path": "/ad", "upstreams": ["main"]}],
        server={"listen": listen, "admin": None, **settings},
    )
    return loaded(found)


def loaded(config: Mapping[str, Any]) -> Config:
    """Read *config* as if it stood in a file."""
    return loads(yaml.safe_dump(dict(config)), source="config.yaml", environ={})


async def ask(socket_path: Path, path: str = "/ad") -> tuple[int, bytes]:
    """Ask for *path* over a Unix socket."""
    connector = aiohttp.UnixConnector(str(socket_path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://localhost{path}") as reply,
    ):
        return reply.status, await reply.read()


async def test_unix_socket(server: AdServer, tmp_path: Path) -> None:
    """Players may ask over a Unix socket, and operators over another."""
    config = a_server_config(server, f"unix:{tmp_path}/players", admin=f"unix:{tmp_path}/operators")
    async with served(config) as running:
        status, body = await ask(tmp_path / "players")
        ready = await ask(tmp_path / "operators", "/readyz")

    assert 200 == status
    assert b'<Ad id="ad"' in body
    assert 200 == ready[0]
    assert "<Proxy <Router ['/ad']> not ready>" == repr(running)


async def test_unix_socket_is_trusted(server: AdServer, tmp_path: Path) -> None:
    """Who may open the socket is believed: a sidecar tells of the device."""
    async with served(a_server_config(server, f"unix:{tmp_path}/s")):
        connector = aiohttp.UnixConnector(f"{tmp_path}/s")
        headers = {"X-Device-IP": "192.0.2.1"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            await session.get("http://localhost/ad")

    assert "192.0.2.1" == server.requests[0].header("X-Device-IP")


async def test_stale_socket_is_replaced(server: AdServer, tmp_path: Path) -> None:
    """A socket that a killed process left behind does not stop the start."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    async with served(a_server_config(server, f"unix:{path}")):
        assert 200 == (await ask(path))[0]


async def test_live_socket_is_not_replaced(server: AdServer, tmp_path: Path) -> None:
    """Where a process answers on a socket a second one does not start, and the first goes on."""
    path = tmp_path / "s"
    config = a_server_config(server, f"unix:{path}")
    async with served(config):
        with pytest.raises(OSError, match="in use by a running process"):
            async with served(config):
                pass
        assert 200 == (await ask(path))[0]
        assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
async def test_port_that_the_system_chose_is_told(server: AdServer, listen: str) -> None:
    """Of port 0 the log tells the real one, in an address that can be asked."""
    if listen.startswith("[") and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with capture_logs() as logs:
        async with served(a_server_config(server, [listen, listen])):
            told = [each["at"] for each in logs if each["event"] == "listening"]
            statuses = [await _status(f"{place}/ad") for place in told[0]]

    assert [200, 200] == statuses
    assert 2 == len(set(told[0]))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def _status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        return reply.status


async def test_shutdown_takes_no_longer_than_said(server: AdServer, tmp_path: Path) -> None:
    """A request that goes on for too long is cut after the configured time, and not twice that."""
    server.replies["/one"] = Reply(an_inline(), delay=30)
    found = a_config(
        {"main": {"endpoint": server.url("/one"), "timeout": "20s"}},
        [{"path": "/ad", "upstreams": ["main"], "deadline": "20s"}],
        server={"listen": f"unix:{tmp_path}/s", "admin": None, "shutdown_timeout": "1s"},
    )
    clock = asyncio.get_running_loop().time
    async with asyncio.TaskGroup() as group:
        async with served(loaded(found)):
            cut = group.create_task(_is_cut(tmp_path / "s"))
            await server.wait_seen("/one")
            began = clock()
        took = clock() - began

    assert cut.result()
    assert 0.4 < took < 1.6


async def _is_cut(path: Path) -> bool:
    try:
        await ask(path)
    except aiohttp.ClientError:
        return True
    return False


async def test_file_is_not_replaced(server: AdServer, tmp_path: Path) -> None:
    """A file that is no socket is not removed for one."""
    path = tmp_path / "data"
    path.write_text("precious")
    with pytest.raises(OSError, match=r"data|in use|exist"):
        async with served(a_server_config(server, f"unix:{path}")):
            pass

    assert "precious" == path.read_text()


async def test_failed_start_closes_what_was_open(server: AdServer, tmp_path: Path) -> None:
    """Where the second listener cannot open, the first is closed, and nothing is left running."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = [f"unix:{tmp_path}/s", f"127.0.0.1:{port}"]
        config = a_server_config(server, listen, admin=f"unix:{tmp_path}/a")
        with pytest.raises(OSError, match=str(port)):
            async with served(config):
                pass

    for name in ("s", "a"):
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(tmp_path / name)
    # What runs besides this test is the ad server's.
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert not any("report" in name for name in names)


async def test_leaving_ends_everything(server: AdServer, tmp_path: Path) -> None:
    """After leaving nobody listens, and no connection to an ad server is open."""
    async with served(a_server_config(server, f"unix:{tmp_path}/s")):
        await ask(tmp_path / "s")
        connections = list(server._open)

    _, still_open = await asyncio.wait(connections, timeout=5)
    assert 1 == len(connections)
    assert set() == still_open
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(tmp_path / "s")


async def test_reports_are_flushed(server: AdServer, tmp_path: Path) -> None:
    """A report that is under way when the proxy ends is sent to its end."""
    gate = asyncio.Event()

    async def later(_: Received) -> bytes:
        """Take a while."""
        gate.set()
        await asyncio.sleep(0.05)
        return b""

    dead = a_wrapper(server.url("/gone"), errors=[server.url("/error")])
    server.replies |= {"/one": dead, "/error": later}
    running: Proxy
    async with served(a_server_config(server, f"unix:{tmp_path}/s")) as running:
        await ask(tmp_path / "s")
        await gate.wait()

    assert (1, 0) == (running.reporter.sent, running.reporter.failed)


async def test_draining_is_not_ready(server: AdServer, tmp_path: Path) -> None:
    """While a request in flight ends, the operator's side says that no more should come."""
    server.replies["/one"] = Reply(an_inline(), delay=0.3)
    config = a_server_config(server, f"unix:{tmp_path}/s", admin=f"unix:{tmp_path}/a")
    async with asyncio.TaskGroup() as group:
        async with served(config):
            asked = group.create_task(ask(tmp_path / "s"))
            await server.wait_seen("/one")
            ready = group.create_task(_after_signal(tmp_path / "a"))
        assert asked.done()

    assert 503 == ready.result()
    assert 200 == asked.result()[0]


async def _after_signal(path: Path) -> int:
    """Give the readiness as soon as it is not 200."""
    while (status := (await ask(path, "/readyz"))[0]) == 200:
        pass
    return status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_the_process(
    server: AdServer, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGTERM, and Ctrl-C too, end the process with code 0, without a traceback."""
    path = tmp_path / "config.yaml"
    found = a_config(
        {"main": server.url("/one")},
        [{"path": "/ad", "upstreams": ["main"]}],
        server={"listen": f"unix:{tmp_path}/s", "admin": None},
        log={"format": "json"},
    )
    path.write_text(yaml.safe_dump(found))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vastproxy", "serve", "-c", str(path)),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    lines = [await process.stderr.readline()]
    answer = await ask(tmp_path / "s")
    process.send_signal(number)
    lines += (await process.stderr.read()).splitlines()

    assert 0 == await process.wait()
    assert 200 == answer[0]
    assert all(b"Traceback" not in line for line in lines)
    assert b'"event": "listening"' in lines[0]
    assert b'"event": "stopped"' in lines[-1]


# --- Upstreams, over a reload and in trouble ----------------------------------------------------

QUICK = 0.005
"""Seconds: less than the config takes for a ``ttl``, so that no test waits for answers to age."""

SLOW = 0.02
"""Seconds that an ad server takes to answer, so that what it answers is stale when it comes."""


def a_caching_config(server: AdServer, *, stale: float = 60.0, **sections: Any) -> Config:
    """Build a config whose upstream is cached for everybody, for hardly any time."""
    main = {"endpoint": server.url("/one"), "timeout": "4s", "cache": {"scope": "shared"}}
    found = a_config(
        {"main": main, "spare": server.url("/spare")},
        [{"path": "/ad", "upstreams": ["main", "spare"], "deadline": "4s"}],
        server={"admin": None},
        **sections,
    )
    config = loaded(found)
    upstream = config.upstreams["main"]
    assert upstream.cache is not None
    times = {"ttl": QUICK, "stale_while_revalidate": stale}
    upstream = upstream.model_copy(update={"cache": upstream.cache.model_copy(update=times)})
    return config.model_copy(update={"upstreams": {**config.upstreams, "main": upstream}})


async def answer(running: Proxy, number: int = 0) -> AdResponse:
    """Ask *running* for an ad in slot *number*."""
    found = running.router.find("/ad")
    assert found is not None
    return await running.ads.answer(found[0], AdRequest("/ad", query=Query(f"slot={number}")))


def calls(kept: Keeping) -> dict[str, int]:
    """Say what came of the calls of the first upstream."""
    return dict(kept.guards.guards.upstream("main").calls)


def state_of(kept: Keeping) -> str:
    """Say how the breaker of the first upstream is."""
    breaker = kept.guards.guards.upstream("main").breaker
    assert breaker is not None
    return breaker.state


async def hang(_: Received) -> bytes:
    """Answer nothing."""
    await asyncio.Event().wait()
    return b""


@pytest.mark.parametrize("reloads", [True, False])
async def test_end_while_answers_are_refreshed(
    server: AdServer, monkeypatch: pytest.MonkeyPatch, *, reloads: bool
) -> None:
    """Refreshes that a reload or a shutdown cuts off are no failures: no breaker opens."""
    monkeypatch.setattr("vastproxy.app.FLUSH_TIMEOUT", SLOW)
    server.replies["/one"] = Reply(an_inline(), delay=SLOW)
    config = a_caching_config(server)
    async with keeping(config) as kept, AsyncExitStack() as stack:
        async with proxy(config, kept) as running:
            for number in range(12):
                await answer(running, number)
            server.replies["/one"] = hang
            stale = [await answer(running, number) for number in range(12)]
            await server.wait_seen("/one", 24)
            under_way = len(running.tasks)
            if reloads:
                await stack.enter_async_context(proxy(config, kept))

        assert {("main: stale (revalidating)",)} == {each.cache for each in stale}
        assert 12 == under_way
        assert {"ok": 12, "neutral": 12} == calls(kept)
        assert "closed" == state_of(kept)


async def test_refresh_is_finished_before_the_end(server: AdServer) -> None:
    """A refresh that ends soon is waited for, with the connection that it needs."""
    server.replies["/one"] = Reply(an_inline(), delay=SLOW)
    config = a_caching_config(server)
    async with keeping(config) as kept:
        async with proxy(config, kept) as running:
            for _ in range(2):
                await answer(running)
            await server.wait_seen("/one", 2)

        assert {"ok": 2} == calls(kept)


async def test_who_waited_over_a_reload_asks_himself(
    server: AdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits at the new proxy for what the old one asks is not drawn into its end."""
    monkeypatch.setattr("vastproxy.app.FLUSH_TIMEOUT", SLOW)
    server.replies["/one"] = hang
    config = a_caching_config(server)
    async with keeping(config) as kept, asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        old = await stack.enter_async_context(proxy(config, kept))
        async with proxy(config, kept) as new:
            first = group.create_task(answer(old))
            await server.wait_seen("/one")
            server.replies["/one"] = an_inline()
            others = [group.create_task(answer(new)) for _ in range(3)]
            await asyncio.sleep(0)
            asked = len(server.requests)
            await stack.aclose()
            served = [await each for each in others]

    assert 1 == asked
    assert 0 == first.result().ads
    assert [("main", 1)] * 3 == [(each.upstream, each.ads) for each in served]
    assert {"neutral": 1, "ok": 1} == calls(kept)


@pytest.mark.parametrize(
    ("breaker", "flags", "hops"),
    [("closed", ("upstream_failed", "stale"), 1), ("open", ("breaker_open", "stale"), 0)],
)
async def test_stale_answer_is_told(
    server: AdServer, breaker: Any, flags: tuple[str, ...], hops: int
) -> None:
    """An ad that stands in is served, and flags tell for what; a player is told that it is old."""
    server.replies["/one"] = Reply(an_inline(), delay=SLOW)
    config = a_caching_config(server, stale=0.0)
    async with keeping(config) as kept, proxy(config, kept) as running:
        await answer(running)
        server.replies["/one"] = Reply(status=500)
        kept.guards.turn("main", breaker, "for a test")
        stale = await answer(running)

    assert (1, "main", hops) == (stale.ads, stale.upstream, stale.hops)
    assert flags == stale.flags
    assert ["vastproxy; hit; ttl=-"] == [
        each.partition("-")[0] + "-" for each in stale.cache_status
    ]
    assert stale.cache[0].startswith("main: stale (upstream failed: ")


async def test_refused_redirect_is_no_refused_upstream(server: AdServer) -> None:
    """Where the site of a redirect is left alone the upstream has failed, and a flag says why."""
    async with AdServer(fallback=Reply(status=500)) as dead:
        location = ("Location", dead.url("/dead"))
        server.replies |= {
            "/one": Reply(status=302, headers=(location,)),
            "/spare": an_inline(ad="spare"),
        }
        site = {"allow": ["127.0.0.0/8"], "circuit_breaker": {"fail_max": 1}}
        config = a_caching_config(server, egress=site)
        async with keeping(config) as kept, proxy(config, kept) as running:
            told = [await answer(running) for _ in range(2)]

    assert [("main:failed", "spare:ad")] * 2 == [each.waterfall for each in told]
    assert ("fallback", "upstream_failed") == told[0].flags
    assert ("fallback", "breaker_open") == told[1].flags
    assert 1 == len(dead.requests)
    assert "closed" == state_of(kept)


def test_policy_of_a_config() -> None:
    """The guard has the config's networks, ports and the proxy's own public name."""
    found = a_config(
        {"main": "http://a.example/"},
        [{"path": "/ad", "upstreams": ["main"]}],
        server={"public_url": "https://Ads.example:8443/vast"},
    )
    found["egress"] |= {"ports": [443], "nat64": True}
    policy = egress_policy(loaded(found))

    assert (ip_network("127.0.0.0/8"),) == policy.allow
    assert (frozenset({443}), True) == (policy.ports, policy.nat64)
    assert policy.url_problem("https://ads.example/") is not None
    assert policy.url_problem("https://other.example/") is None
