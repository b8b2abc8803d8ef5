"""
Build the running proxy from a config. This module alone knows the concrete classes.

What is opened together stands on one exit stack, and is closed in reverse: listeners first, then
what they needed.
"""

import asyncio
import errno
import gc
import os
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from vastproxy.config.schema import Config
from vastproxy.config.schema import Route as RouteConfig
from vastproxy.config.schema import Upstream as UpstreamConfig
from vastproxy.config.units import Listen, Network
from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route, Router
from vastproxy.observe.tasks import Tasks
from vastproxy.session.cookies import public_suffix_test
from vastproxy.session.factory import SessionFactory
from vastproxy.upstream.client import AiohttpClient, HopClient
from vastproxy.upstream.egress import EgressPolicy, own_addresses
from vastproxy.upstream.upstream import UpstreamSettings, VastUpstream
from vastproxy.vast.macros import spelling
from vastproxy.vast.unwrap import Policy
from vastproxy.web.admin import admin_app
from vastproxy.web.server import Player, PlayerSettings

BACKLOG = 1024
"""Connections that the kernel keeps waiting; the default of 128 drops some in a burst."""

COLLECTOR = (20_000, 20, 50)
"""Objects, and rounds, between looks of the garbage collector; Python's are 700, 10 and 10."""

MAX_LINE = 16 * 1024
"""Bytes of a request line or header of a player: consent strings fill more than the usual 8 KB."""

FLUSH_TIMEOUT = 5.0
"""Seconds that reports still under way get at the end."""


@dataclass(slots=True)
class Proxy:
    """The parts of a running proxy."""

    config: Config
    ads: AdServer
    router: Router
    player: Player
    reporter: ErrorReporter
    tasks: Tasks
    ready: bool = False
    """Whether players are answered: not before the listeners are open, nor while draining."""

    def __repr__(self) -> str:
        return f"<Proxy {self.router!r} {'ready' if self.ready else 'not ready'}>"


def egress_policy(config: Config) -> EgressPolicy:
    """Say where hops of *config* may lead."""
    own = urlsplit(config.server.public_url or "").hostname
    return EgressPolicy(
        allow=config.egress.allow,
        ports=frozenset(config.egress.ports),
        nat64=config.egress.nat64,
        own_hosts=frozenset({own} if own else ()),
        own_addresses=own_addresses(),
    )


def upstream(
    name: str, config: UpstreamConfig, client: HopClient, now: Callable[[], float] = time.time
) -> VastUpstream:
    """Make the upstream called *name*."""
    settings = UpstreamSettings(
        name=name,
        endpoint=config.endpoint,
        hosts=config.hosts,
        params=tuple(config.params.items()),
        headers=tuple(config.headers.items()),
        timeout=config.timeout,
        max_body=config.max_body,
        cookies=config.cookies,
        session_params=config.session_params,
        user_agent=config.user_agent,
        forwarded_for=config.x_forwarded_for,
        timestamp=config.macros.timestamp,
        spelling=spelling(config.macros.spellings, tuple(config.macros.aliases.items())),
    )
    return VastUpstream(settings, client, now)


def route(config: RouteConfig, upstreams: dict[str, VastUpstream]) -> Route:
    """Make a route that asks some of *upstreams*."""
    return Route(
        path=config.path,
        upstreams=tuple(upstreams[each] for each in config.upstreams),
        mode=config.mode,
        forward_query=config.forward_query,
        forward_cookies=config.forward_cookies,
        viewer=config.viewer,
        correlator=config.correlator,
        correlator_params=config.correlator_params,
        deadline=config.deadline,
        policy=Policy(
            max_wrappers=config.max_hops,
            max_fetches=config.max_fetches,
            standalone_ads=config.standalone_ads,
            strict=config.strict,
        ),
        error_reporting=config.error_reporting,
        fill_macros=config.fill_macros,
        macros=tuple(config.macros.items()),
    )


@asynccontextmanager
async def proxy(config: Config) -> AsyncIterator[Proxy]:
    """Open a proxy that listens nowhere yet; leaving ends its reports and its connections."""
    async with (
        AiohttpClient(egress_policy(config)) as client,
        Tasks("reports") as tasks,
    ):
        upstreams = {name: upstream(name, each, client) for name, each in config.upstreams.items()}
        reporter = ErrorReporter(client, tasks)
        ads = AdServer(SessionFactory(public_suffix_test()), reporter)
        router = Router(route(each, upstreams) for each in config.routes)
        settings = PlayerSettings(
            config.server.trusted_proxies, config.server.max_requests_in_flight
        )
        player = Player(ads, router, settings)
        try:
            yield Proxy(config, ads, router, player, reporter, tasks)
        finally:
            await tasks.wait_idle(FLUSH_TIMEOUT)


@asynccontextmanager
async def listening(runner: web.BaseRunner, places: Iterable[Listen]) -> AsyncIterator[list[str]]:
    """Serve *runner* at *places*; leaving stops accepting, and lets requests in flight end."""
    await runner.setup()
    try:
        yield [await _open(runner, each) for each in places]
    finally:
        await runner.cleanup()


async def _open(runner: web.BaseRunner, place: Listen) -> str:
    if place.path:
        _remove_stale_socket(place.path)
        await web.UnixSite(runner, place.path, backlog=BACKLOG).start()
        return str(place)
    site = web.TCPSite(runner, place.host or None, place.port, backlog=BACKLOG)
    await site.start()
    # Of port 0 the system chose one.
    port = place.port or runner.addresses[-1][1]
    return f"http://{replace(place, port=port)}"


def _remove_stale_socket(path: str) -> None:
    """
    Remove a socket that a killed process left at *path*; anything else there stays.

    Raises OSError where a process still answers on it.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            return
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise OSError(errno.EADDRINUSE, f"{path} is in use by a running process")
        os.unlink(path)  # noqa: PTH108


@asynccontextmanager
async def offline_server(
    settings: UpstreamSettings, allow: tuple[Network, ...] = ()
) -> AsyncIterator[tuple[AdServer, VastUpstream]]:
    """Open what is needed to resolve single tags: one upstream, no listener, no config."""
    policy = EgressPolicy(allow=allow, own_addresses=own_addresses())
    async with AiohttpClient(policy) as client, Tasks("reports") as tasks:
        ads = AdServer(SessionFactory(public_suffix_test()), ErrorReporter(client, tasks))
        yield ads, VastUpstream(settings, client, time.time)


PlayerHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(
    config: Config, extra: Callable[[Proxy], PlayerHandler] | None = None
) -> AsyncIterator[Proxy]:
    """
    Open a proxy and its listeners.

    *extra* makes a handler that stands before the proxy's own: the demo's page.
    """
    server = config.server
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(proxy(config))
        log = structlog.get_logger("vastproxy")
        if server.admin:
            admin = web.AppRunner(admin_app(lambda: running.ready), access_log=None)
            places = await stack.enter_async_context(listening(admin, server.admin))
            log.info("admin.listening", at=places)
        handler = extra(running) if extra else running.player.handle
        players = web.ServerRunner(
            web.Server(
                handler,
                keepalive_timeout=server.keepalive_timeout,
                access_log=None,
                max_line_size=MAX_LINE,
                max_field_size=MAX_LINE,
            ),
            # aiohttp waits so long for answers, and once more for connections to end.
            shutdown_timeout=server.shutdown_timeout / 2,
        )
        places = await stack.enter_async_context(listening(players, server.listen))
        running.ready = True
        log.info("listening", at=places, routes=[each.path for each in config.routes])
        try:
            yield running
        finally:
            running.ready = False
            log.info("draining", in_flight=running.player.in_flight)
    log.info("stopped")


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in flight, and return."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    async with served(config):
        _calm_collector()
        await stop.wait()


def _calm_collector() -> None:
    """
    Let the garbage collector look less often, and not at what lives as long as the process.

    A request leaves no cycles behind, so there is little to find; with Python's own thresholds
    looking for it takes a twentieth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR)
