"""
Serve a config until a signal comes: listeners, draining, reloading.

A reload opens the new proxy wholly before it touches the old one, and swaps one reference; what the
old one has begun, it ends.
"""

import asyncio
import gc
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from functools import partial
from operator import attrgetter

import structlog
from aiohttp import web
from pydantic import SecretStr

from vastproxy.app import FLUSH_TIMEOUT, Proxy, keeping, overview, proxy
from vastproxy.config.schema import Config
from vastproxy.errors import ConfigError, VastproxyError
from vastproxy.observe.tasks import Tasks
from vastproxy.session.seals import new_secret
from vastproxy.web.admin import admin_app
from vastproxy.web.api import add_api
from vastproxy.web.listeners import listening
from vastproxy.web.upstreams_api import Guarding, OwnUpstreams, add_upstreams

COLLECTOR = (20_000, 20, 50)
"""Objects, and rounds, between looks of the garbage collector; Python's are 700, 10 and 10."""

MAX_LINE = 16 * 1024
"""Bytes of a request line or header of a player: consent strings fill more than the usual 8 KB."""

LINGER = 0.5
"""
Seconds at the end in which a player's idle connection is answered once more.

Who is just sending over a connection as it is closed cannot tell whether it was read: RFC 9112
section 9.6. nginx has ``keepalive_min_timeout`` for the same.
"""

WRITING = 0.2
"""Seconds that answers get to be written, when they are made."""

POLL = 0.02
"""Seconds between two looks at what is still under way."""

RESTART_ONLY = (
    *("server.listen", "server.admin", "server.workers", "server.secret"),
    *("server.shutdown_timeout", "server.keepalive_timeout"),
    *("state", "state_timeout", "journal", "log"),
)
"""Settings that a reload leaves as they are."""

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

    *opened* opens a proxy for a config. The connections of players outlive it, and *guards* too.
    """

    proxy: Proxy
    """What answers now."""

    def __init__(
        self, opened: Callable[[Config], AbstractAsyncContextManager[Proxy]], guards: Guarding
    ) -> None:
        self.guards = guards
        self._opened = opened
        self._retiring = Tasks("replaced proxies")
        self._stack = AsyncExitStack()
        self.draining = False
        self.in_flight = 0
        """Requests of players that are being answered, beacons too."""

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
        self.in_flight += 1
        try:
            response = await self.proxy.player.handle(request)
        finally:
            self.in_flight -= 1
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
        now = Serving(lambda config: proxy(config, kept), kept.guards)
        running = await stack.enter_async_context(now.open(config))
        if server.admin and not sockets:
            app = admin_app(lambda: now.proxy.ready, metrics=kept.metrics.text)
            add_api(app, lambda: overview(now.proxy.config, kept.state.backend, kept.secrets))
            add_upstreams(app, OwnUpstreams(kept.guards))
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
        # Who has gone is not waited for: what is reserved for him is free at once.
        handler_cancellation=True,
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
    # aiohttp leaves connections open that were idle already: they are no reason to wait.
    await ending.wait_for(lambda: not now.in_flight, limit - linger)
    await ending.wait_for(lambda: not server.connections, min(WRITING, limit / 2))


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
