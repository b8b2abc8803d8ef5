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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from pydantic import SecretStr

from vastproxy.config.schema import Config
from vastproxy.config.schema import Route as RouteConfig
from vastproxy.config.schema import Upstream as UpstreamConfig
from vastproxy.config.units import Listen, Network
from vastproxy.errors import ConfigError, StateAwayError, VastproxyError
from vastproxy.flow.accounting import Accounting
from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.leases import Leases
from vastproxy.flow.overview import Overview
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route, Router
from vastproxy.flow.terms import terms
from vastproxy.observe.metrics import RequestMetrics
from vastproxy.observe.tasks import Tasks
from vastproxy.session.cookies import public_suffix_test
from vastproxy.session.factory import SessionFactory
from vastproxy.session.seals import Seal, ViewerNames, new_secret
from vastproxy.state.base import StateBackend
from vastproxy.state.guard import GuardedState, Telling
from vastproxy.state.journal import Journal
from vastproxy.state.opening import backend_of
from vastproxy.upstream.client import AiohttpClient, HopClient
from vastproxy.upstream.egress import EgressPolicy, own_addresses
from vastproxy.upstream.upstream import UpstreamSettings, VastUpstream
from vastproxy.vast.macros import spelling
from vastproxy.vast.unwrap import Policy
from vastproxy.web.admin import admin_app
from vastproxy.web.api import add_api
from vastproxy.web.server import Player, PlayerSettings

DAY = 86_400.0
"""Seconds."""

BACKLOG = 1024
"""Connections that the kernel keeps waiting; the default of 128 drops some in a burst."""

COLLECTOR = (20_000, 20, 50)
"""Objects, and rounds, between looks of the garbage collector; Python's are 700, 10 and 10."""

MAX_LINE = 16 * 1024
"""Bytes of a request line or header of a player: consent strings fill more than the usual 8 KB."""

FLUSH_TIMEOUT = 5.0
"""Seconds that reports still under way get at the end."""

LINGER = 0.5
"""
Seconds at the end in which a player's idle connection is answered once more.

Who is just sending over a connection as it is closed cannot tell whether it was read: RFC 9112
section 9.6. nginx has ``keepalive_min_timeout`` for the same.
"""

STATE_WITHIN = 2.0
"""Seconds that a start waits for the state."""

POLL = 0.02
"""Seconds between two looks at what is still under way."""

RESTART_ONLY = (
    *("server.listen", "server.admin", "server.workers", "server.secret"),
    *("server.shutdown_timeout", "server.keepalive_timeout"),
    *("state", "state_timeout", "journal", "log"),
)
"""Settings that a reload leaves as they are."""


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
        cookie_ttl=config.cookie_ttl,
        session_params=config.session_params,
        user_agent=config.user_agent,
        forwarded_for=config.x_forwarded_for,
        timestamp=config.macros.timestamp,
        spelling=spelling(config.macros.spellings, tuple(config.macros.aliases.items())),
    )
    return VastUpstream(settings, client, now)


def route(
    config: RouteConfig, upstreams: dict[str, VastUpstream], beacon_ttl: float = DAY
) -> Route:
    """Make a route that asks some of *upstreams*; its beacons are taken for *beacon_ttl* s."""
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
        terms=terms(config, beacon_ttl),
    )


@dataclass(frozen=True, slots=True)
class Keeping:
    """What outlives a reload: the state, the secrets, the numbers."""

    state: GuardedState
    secrets: tuple[str, ...]
    metrics: RequestMetrics

    def __repr__(self) -> str:
        return f"<Keeping {self.state!r}>"


@asynccontextmanager
async def usable_state(config: Config) -> AsyncIterator[StateBackend]:
    """
    Open the state of *config* for whoever is in no hurry, whether or not it is there now.

    Raises StateBackendError where it is there, but cannot be used.
    """
    async with backend_of(config.state) as backend:
        with suppress(StateAwayError, TimeoutError):
            async with asyncio.timeout(STATE_WITHIN):
                await backend.ping()
        yield backend


@asynccontextmanager
async def keeping(config: Config) -> AsyncIterator[Keeping]:
    """
    Open the state of *config*, and make what it leaves out.

    Raises StateBackendError where the state is there, but cannot be used; OSError where the
    journal cannot be written.
    """
    metrics = RequestMetrics()
    secrets = secrets_of(config)
    guarded = GuardedState(
        backend_of(config.state),
        timeout=config.state_timeout,
        journal=Journal(config.journal),
        local=not config.state.is_shared,
        telling=Telling(
            lambda there: metrics.state_up(up=there), metrics.state_error, metrics.journal_pending
        ),
    )
    async with guarded:
        yield Keeping(guarded, secrets or (new_secret(),), metrics)


@asynccontextmanager
async def proxy(config: Config, kept: Keeping | None = None) -> AsyncIterator[Proxy]:
    """
    Open a proxy that listens nowhere yet; leaving ends its reports and its connections.

    *kept* is what it shares with the proxies before and after it; None: it has its own.
    """
    async with AsyncExitStack() as stack:
        own = keeping(config) if kept is None else nullcontext(kept)
        shared = await stack.enter_async_context(own)
        client = await stack.enter_async_context(AiohttpClient(egress_policy(config)))
        tasks = await stack.enter_async_context(Tasks("reports"))
        upstreams = {name: upstream(name, each, client) for name, each in config.upstreams.items()}
        routes = [route(each, upstreams, config.server.beacon_ttl) for each in config.routes]
        accounts = accounting(config, shared, routes)
        await stack.enter_async_context(accounts.leases)
        reporter = ErrorReporter(client, tasks)
        factory = SessionFactory(is_public_suffix=accounts.is_public_suffix)
        ads = AdServer(factory, reporter, accounts)
        router = Router(routes)
        player = Player(ads, router, player_settings(config), shared.metrics)
        try:
            yield Proxy(config, ads, router, player, reporter, tasks)
        finally:
            await tasks.wait_idle(FLUSH_TIMEOUT)


def accounting(config: Config, kept: Keeping, routes: Iterable[Route]) -> Accounting:
    """Put together what the caps, budgets and kept cookies of *routes* need."""
    beacons = Beacons(
        Seal(kept.secrets, "beacon"), kept.state, ttl=config.server.beacon_ttl, now=time.time
    )
    budgets = [each.terms.budget for each in routes if each.terms.budget]
    leases = Leases(kept.state, budgets)
    names = ViewerNames(kept.secrets)
    return Accounting(kept.state, beacons, leases, names, public_suffix_test(), time.time)


def secrets_of(config: Config) -> tuple[str, ...]:
    """Give the secrets of *config* as they are."""
    return tuple(each.get_secret_value() for each in config.server.secret)


def overview(config: Config, state: StateBackend, secrets: Sequence[str]) -> Overview:
    """Make what operators see of *state*, by the routes of *config*."""
    ttl = config.server.beacon_ttl
    routes = tuple((each.path, terms(each, ttl)) for each in config.routes)
    return Overview(state, ViewerNames(secrets), routes)


def player_settings(config: Config) -> PlayerSettings:
    """Give what *config* says about the player's side."""
    server = config.server
    return PlayerSettings(
        server.trusted_proxies, server.max_requests_in_flight, server.public_url or ""
    )


@asynccontextmanager
async def listening(
    runner: web.BaseRunner,
    places: Sequence[Listen | socket.socket],
    drained: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[list[str]]:
    """
    Serve *runner* at *places*, of which sockets are bound already.

    Leaving stops accepting, waits for *drained*, and lets requests in flight end.
    """
    await runner.setup()
    try:
        yield [await _open(runner, each) for each in places]
    finally:
        waiting = [each for place in places for each in _waiting(place)]
        for site in tuple(runner.sites):
            await site.stop()
        for each in waiting:
            await _take(runner, each)
        if drained is not None:
            await drained()
        await runner.cleanup()


async def _open(runner: web.BaseRunner, place: Listen | socket.socket) -> str:
    if isinstance(place, socket.socket):
        await web.SockSite(runner, place, backlog=BACKLOG).start()
        return name_of(place)
    if place.path:
        remove_stale_socket(place.path)
        await web.UnixSite(runner, place.path, backlog=BACKLOG).start()
        return str(place)
    site = web.TCPSite(runner, place.host or None, place.port, backlog=BACKLOG)
    await site.start()
    # Of port 0 the system chose one.
    port = place.port or runner.addresses[-1][1]
    return f"http://{replace(place, port=port)}"


def _waiting(place: Listen | socket.socket) -> Iterator[socket.socket]:
    """Accept what waits at *place*: closing it would reset these connections."""
    if isinstance(place, socket.socket) and place.fileno() >= 0:
        with suppress(BlockingIOError):
            while True:
                yield place.accept()[0]


async def _take(runner: web.BaseRunner, connection: socket.socket) -> None:
    if runner.server is not None:
        connection.settimeout(0)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(runner.server, connection)


def name_of(bound: socket.socket) -> str:
    """Give the address of a *bound* socket, as it is asked."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://{Listen(host, port)}"


def remove_stale_socket(path: str) -> None:
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
        ads = AdServer(SessionFactory(), ErrorReporter(client, tasks))
        yield ads, VastUpstream(settings, client, time.time)


PlayerHandler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Ending:
    """When to stop, and when to wait no longer: the first and the second signal."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        """Take a signal to stop."""
        (self.hurried if self.asked.is_set() else self.asked).set()

    async def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until *done*, or hurried, for *seconds* at most."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        while not done() and not self.hurried.is_set() and loop.time() < ends:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await self.hurried.wait()

    def __repr__(self) -> str:
        asked, hurried = self.asked.is_set(), self.hurried.is_set()
        return f"<Ending {'hurried' if hurried else 'asked' if asked else 'not asked'}>"


class Serving:
    """
    Hands players' requests to the proxy of the newest config.

    *opened* opens a proxy for a config. The connections of players outlive it.
    """

    proxy: Proxy
    """What answers now."""

    def __init__(self, opened: Callable[[Config], AbstractAsyncContextManager[Proxy]]) -> None:
        self._opened = opened
        self._retiring = Tasks("replaced proxies")
        self._stack = AsyncExitStack()
        self.draining = False

    @asynccontextmanager
    async def open(self, config: Config) -> AsyncIterator[Proxy]:
        """Serve *config*; leaving ends its proxy, or the one in its place, and all before it."""
        try:
            await self.use(config)
            yield self.proxy
        finally:
            await self._retiring.wait_idle(config.server.shutdown_timeout + FLUSH_TIMEOUT)
            async with self._retiring:
                await self._stack.aclose()

    async def use(self, config: Config) -> None:
        """
        Open a proxy for *config* wholly, and then put it into the place of the one before.

        That one ends what it has begun, in the background. If opening fails nothing changes.
        """
        stack = AsyncExitStack()
        new = await stack.enter_async_context(self._opened(config))
        old_stack, self._stack = self._stack, stack
        if hasattr(self, "proxy"):
            old, new.ready = self.proxy, self.proxy.ready
            self._retiring.spawn(self._retire(old, old_stack), "drain")
        self.proxy = new

    async def _retire(self, old: Proxy, stack: AsyncExitStack) -> None:
        # Deadlines end every request; the time-out is for what has none.
        patience = Ending()
        await patience.wait_for(
            lambda: not old.player.in_flight, old.config.server.shutdown_timeout
        )
        await stack.aclose()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a player."""
        response = await self.proxy.player.handle(request)
        if self.draining:
            response.force_close()
        return response

    def __repr__(self) -> str:
        return f"<Serving {self.proxy!r}, replaced and not yet ended: {len(self._retiring)}>"


@asynccontextmanager
async def served(
    config: Config, extra: Callable[[Proxy], PlayerHandler] | None = None
) -> AsyncIterator[Proxy]:
    """
    Open a proxy and its listeners.

    *extra* makes a handler that stands before the proxy's own: the demo's page.
    """
    async with serving(config, Ending(), extra=extra) as now:
        yield now.proxy


@asynccontextmanager
async def serving(
    config: Config,
    ending: Ending,
    *,
    extra: Callable[[Proxy], PlayerHandler] | None = None,
    sockets: Sequence[socket.socket] = (),
) -> AsyncIterator[Serving]:
    """
    Open a proxy that can be replaced, and its listeners.

    A worker has *sockets* to accept on, and no side for operators: its supervisor has it.
    """
    server = config.server
    log = structlog.get_logger("vastproxy")
    async with AsyncExitStack() as stack:
        kept = await stack.enter_async_context(keeping(config))
        now = Serving(lambda config: proxy(config, kept))
        running = await stack.enter_async_context(now.open(config))
        if server.admin and not sockets:
            app = admin_app(lambda: now.proxy.ready, metrics=kept.metrics.text)
            add_api(app, lambda: overview(now.proxy.config, kept.state.backend, kept.secrets))
            admin = web.AppRunner(app, access_log=None)
            places = await stack.enter_async_context(listening(admin, server.admin))
            log.info("admin.listening", at=places)
        players = _players(extra(running) if extra else now.handle, server.keepalive_timeout)
        drained = partial(_drained, now, players, ending)
        places = await stack.enter_async_context(
            listening(players, sockets or server.listen, drained)
        )
        now.proxy.ready = True
        log.info("listening", at=places, routes=[each.path for each in config.routes])
        try:
            yield now
        finally:
            now.proxy.ready = False
            now.draining = True
            log.info("draining", in_flight=now.proxy.player.in_flight)
    log.info("stopped")


def _players(handler: PlayerHandler, keepalive: float) -> web.ServerRunner:
    server = web.Server(
        handler,
        keepalive_timeout=keepalive,
        access_log=None,
        max_line_size=MAX_LINE,
        max_field_size=MAX_LINE,
    )
    # What aiohttp waits for has ended by then, or was waited for long enough.
    return web.ServerRunner(server, shutdown_timeout=POLL)


async def _drained(now: Serving, players: web.ServerRunner, ending: Ending) -> None:
    """Wait for the answers in flight; idle connections get LINGER, and are closed."""
    if (server := players.server) is None:
        return
    limit = now.proxy.config.server.shutdown_timeout
    linger = min(LINGER, limit / 2)
    await ending.wait_for(lambda: not server.connections, linger)
    server.pre_shutdown()
    await ending.wait_for(lambda: not server.connections, limit - linger)


async def serve(config: Config, reread: Callable[[], Config] | None = None) -> None:
    """
    Serve until SIGTERM or SIGINT, then finish what is in flight, and return.

    SIGHUP serves the config that *reread* gives from then on; a second signal to stop hurries.
    """
    ending, hangup = Ending(), asyncio.Event()
    config = with_secret(config)
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, ending.ask)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    async with serving(config, ending) as now, Tasks("reload") as tasks:
        calm_collector()
        if reread is not None:
            tasks.spawn(_reloading(now, reread, hangup), "SIGHUP")
        await ending.asked.wait()


async def _reloading(now: Serving, reread: Callable[[], Config], hangup: asyncio.Event) -> None:
    while True:
        await hangup.wait()
        hangup.clear()
        new = await reloaded(reread, now.proxy.config)
        if new is not None:
            await swap(now, new)


async def reloaded(reread: Callable[[], Config], old: Config) -> Config | None:
    """
    Give the config to serve from now on, or None where *reread* raises ConfigError.

    What is wrong is logged, and what stays as it is in *old* until a restart.
    """
    log = structlog.get_logger("vastproxy")
    try:
        new = with_secret(await asyncio.to_thread(reread), old.server.secret)
    except ConfigError as error:
        log.error("reload.refused", source=error.source, problems=list(error.problems))  # noqa: TRY400 - the operator's mistake, no traceback
        return None
    kept, settings = settled(old, new)
    if settings:
        log.warning("reload.needs_restart", settings=list(settings))
    return kept


def with_secret(config: Config, secrets: tuple[SecretStr, ...] = ()) -> Config:
    """Give *config* with secrets: its own, or *secrets*, or one that is made now."""
    if config.server.secret:
        return config
    if config.state.is_shared and not secrets:
        # Viewers would be strangers, and their beacons forged, after the next start.
        structlog.get_logger("vastproxy").warning("secret.made", state=str(config.state))
    made = secrets or (SecretStr(new_secret()),)
    return config.model_copy(update={"server": config.server.model_copy(update={"secret": made})})


async def swap(now: Serving, config: Config) -> None:
    """Serve *config* from now on, and log that; or why it cannot be."""
    log = structlog.get_logger("vastproxy")
    try:
        await now.use(config)
    except (VastproxyError, OSError) as error:
        log.error("reload.failed", problem=str(error))  # noqa: TRY400 - the problem is outside
    else:
        log.info("reloaded", routes=[each.path for each in config.routes])


def settled(old: Config, new: Config) -> tuple[Config, tuple[str, ...]]:
    """Give *new* with what only a restart changes as it is in *old*, and the names of that."""
    changed = tuple(each for each in RESTART_ONLY if _at(old, each) != _at(new, each))
    server: dict[str, object] = {}
    whole: dict[str, object] = {}
    for name in changed:
        section, _, leaf = name.rpartition(".")
        (server if section else whole)[leaf] = _at(old, name)
    kept_server = new.server.model_copy(update=server)
    return new.model_copy(update={**whole, "server": kept_server}), changed


def _at(config: Config, name: str) -> object:
    return attrgetter(name)(config)


def calm_collector() -> None:
    """
    Let the garbage collector look less often, and not at what lives as long as the process.

    A request leaves no cycles behind, so there is little to find; with Python's own thresholds
    looking for it takes a twentieth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR)
