"""
Build the running proxy from a config. This module alone knows the concrete classes.

What is opened together stands on one exit stack, and is closed in reverse: listeners first, then
what they needed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import (
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from urllib.parse import urlsplit

from vastproxy.config.schema import Config
from vastproxy.config.schema import Route as RouteConfig
from vastproxy.config.schema import Upstream as UpstreamConfig
from vastproxy.config.units import Network
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.flow.accounting import Accounting
from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.leases import Leases
from vastproxy.flow.overview import Overview
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route, Router
from vastproxy.flow.terms import terms
from vastproxy.guarding import Instances, Protecting, shares, unconfigured
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
from vastproxy.upstream.upstream import Protection, UpstreamSettings, VastUpstream
from vastproxy.vast.macros import spelling
from vastproxy.vast.unwrap import Policy
from vastproxy.web.server import Player, PlayerSettings

BEACON_TTL = 21_600.0
"""Seconds that beacons are taken, where nobody says it."""

FLUSH_TIMEOUT = 5.0
"""Seconds that reports still under way get at the end."""

STATE_WITHIN = 2.0
"""Seconds that a start waits for the state."""


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
    name: str,
    config: UpstreamConfig,
    client: HopClient,
    protection: Protection | None = None,
    now: Callable[[], float] = time.time,
) -> VastUpstream:
    """Make the upstream called *name*; without *protection* nothing stands around its calls."""
    settings = UpstreamSettings(
        name=name,
        endpoint=config.endpoint,
        hosts=config.hosts,
        params=tuple(config.params.items()),
        headers=tuple(config.headers.items()),
        timeout=config.timeout,
        soft_timeout=config.soft_timeout,
        max_body=config.max_body,
        cookies=config.cookies,
        cookie_ttl=config.cookie_ttl,
        session_params=config.session_params,
        user_agent=config.user_agent,
        forwarded_for=config.x_forwarded_for,
        timestamp=config.macros.timestamp,
        spelling=spelling(config.macros.spellings, tuple(config.macros.aliases.items())),
    )
    return VastUpstream(settings, client, now, protection)


def route(
    config: RouteConfig, upstreams: dict[str, VastUpstream], beacon_ttl: float = BEACON_TTL
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
        fallback=config.fallback,
    )


@dataclass(frozen=True, slots=True)
class Keeping:
    """What outlives a reload: the state, the secrets, the numbers, the money set aside."""

    state: GuardedState
    secrets: tuple[str, ...]
    metrics: RequestMetrics
    leases: Leases
    guards: Protecting
    """What stands around the calls of upstreams, and what they answered before."""

    def __repr__(self) -> str:
        return f"<Keeping {self.state!r}, {self.guards!r}>"


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

    Raises StateBackendError where the state is there, but cannot be used, and where the journal
    cannot be written.
    """
    metrics = RequestMetrics()
    secrets = secrets_of(config)
    guarded = GuardedState(
        backend_of(config.state),
        timeout=config.state_timeout,
        journal=_journal(config),
        local=not config.state.is_shared,
        telling=Telling(
            lambda there: metrics.state_up(up=there), metrics.state_error, metrics.journal_pending
        ),
    )
    async with (
        guarded,
        Leases(guarded) as leases,
        instances(config) as others,
        Tasks("upstreams") as tasks,
    ):
        guards = Protecting(public_suffix_test(), metrics, tasks.spawn, others)
        yield Keeping(guarded, secrets or (new_secret(),), metrics, leases, guards)
        await tasks.wait_idle(FLUSH_TIMEOUT)


@asynccontextmanager
async def instances(config: Config) -> AsyncIterator[Instances | None]:
    """Open what is shared with other instances, where *config* wants anything to be."""
    if not shares(config):
        yield None
        return
    from vastproxy.upstream.sharing import RedisExtras  # noqa: PLC0415 - takes 0.1 s

    async with RedisExtras(config.state.url, timeout=config.state_timeout) as extras:
        yield extras


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
        shared.guards.use(config)
        upstreams = {
            name: upstream(name, each, client, shared.guards.of(name, tasks.spawn))
            for name, each in config.upstreams.items()
        }
        routes = [route(each, upstreams, config.server.beacon_ttl) for each in config.routes]
        accounts = accounting(config, shared)
        reporter = ErrorReporter(client, tasks)
        factory = SessionFactory(is_public_suffix=accounts.is_public_suffix)
        ads = AdServer(factory, reporter, accounts)
        router = Router(routes)
        player = Player(ads, router, player_settings(config), shared.metrics, tasks)
        shared.leases.use(each.terms.budget for each in routes if each.terms.budget)
        try:
            yield Proxy(config, ads, router, player, reporter, tasks)
        finally:
            await tasks.wait_idle(FLUSH_TIMEOUT)


def _journal(config: Config) -> Journal:
    try:
        return Journal(config.journal)
    except OSError as error:
        raise StateBackendError(f"journal {config.journal}: {error}") from None


def accounting(config: Config, kept: Keeping) -> Accounting:
    """Put together what the caps, budgets and kept cookies of *config* need."""
    beacons = Beacons(
        Seal(kept.secrets, "beacon"), kept.state, ttl=config.server.beacon_ttl, now=time.time
    )
    names = ViewerNames(kept.secrets)
    return Accounting(kept.state, beacons, kept.leases, names, public_suffix_test(), time.time)


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
async def offline_server(
    settings: UpstreamSettings, allow: tuple[Network, ...] = ()
) -> AsyncIterator[tuple[AdServer, VastUpstream]]:
    """Open what is needed to resolve single tags: one upstream, no listener, no config."""
    policy = EgressPolicy(allow=allow, own_addresses=own_addresses())
    protection = unconfigured(settings.name, public_suffix_test())
    async with AiohttpClient(policy) as client, Tasks("reports") as tasks:
        ads = AdServer(SessionFactory(), ErrorReporter(client, tasks))
        yield ads, VastUpstream(settings, client, time.time, protection)
