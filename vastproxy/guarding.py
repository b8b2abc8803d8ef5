"""
From the words of config.yaml to what stands around the calls of ad servers.

Rule 1: what is here outlives a reload. A breaker that is open stays open, and what a cache has
stays there, while their own settings stay.
Rule 2: a rate that is not shared is the whole proxy's: each worker has its part.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import structlog

from vastproxy.config.schema import Config, HopBreaker, Route
from vastproxy.config.schema import Upstream as UpstreamConfig
from vastproxy.observe.metrics import RequestMetrics
from vastproxy.observe.trace import BreakerChange
from vastproxy.upstream.answers import AnswerCache, CacheSettings, SecondLevel, Spawn
from vastproxy.upstream.guard import GuardSettings, RateSettings, local_rate
from vastproxy.upstream.guards import Guards, Sharing
from vastproxy.upstream.limiter import Rate
from vastproxy.upstream.upstream import Protection
from vastproxy.upstream.window import BreakerSettings


class Instances(Protocol):
    """What is shared with other instances, where the state is in Redis."""

    @property
    def breakers(self) -> Sharing:
        """Keeps breakers alike."""

    @property
    def store(self) -> SecondLevel:
        """Keeps answers for all."""

    def rate(self, name: str, rate: float, burst: int) -> Rate:
        """Make the limiter *name*: *rate* calls a second in all."""


class Protecting:
    """
    Puts guards and caches around upstreams.

    *instances* is what is shared with others; None: nothing is. *spawn* starts what nobody waits
    for.
    """

    def __init__(
        self,
        is_public_suffix: Callable[[str], bool],
        metrics: RequestMetrics,
        spawn: Spawn,
        instances: Instances | None = None,
    ) -> None:
        self._metrics = metrics
        self._spawn = spawn
        self._instances = instances
        self._log = structlog.get_logger("vastproxy.upstream")
        self._caches: dict[str, AnswerCache] = {}
        self.guards = Guards(
            is_public_suffix,
            self._rate,
            telling=metrics,
            changed=self._changed,
            sharing=None if instances is None else instances.breakers,
        )

    def use(self, config: Config) -> None:
        """Protect the upstreams of *config*; what stays the same goes on as it is."""
        if self._instances is None and shares(config):
            self._log.warning("sharing.needs_restart")
        workers = config.server.workers
        self.guards.use(
            {name: guard_settings(each, workers) for name, each in config.upstreams.items()},
            GuardSettings(
                breaker=breaker_settings(config.egress.circuit_breaker),
                max_in_flight=config.egress.max_requests_in_flight,
            ),
        )
        caches = {}
        for name, each in config.upstreams.items():
            settings = cache_settings(name, each, config.routes)
            if settings is not None:
                caches[name] = self._cache(name, settings)
        self._caches = caches

    def of(self, name: str, spawn: Spawn | None = None) -> Protection:
        """
        Give what stands around the upstream called *name*.

        *spawn* starts what asks ad servers and nobody waits for: while there are connections.
        """
        guards = self.guards
        return Protection(guards.upstream(name), guards.site, self._caches.get(name), spawn)

    def _cache(self, name: str, settings: CacheSettings) -> AnswerCache:
        old = self._caches.get(name)
        if old is not None and old.settings == settings:
            return old
        second = self._instances.store if settings.redis and self._instances else None
        return AnswerCache(
            name,
            settings,
            second=second,
            spawn=self._spawn,
            heard=lambda verdict: self._metrics.cached(name, verdict.word),
        )

    def _rate(self, name: str, settings: RateSettings) -> Rate:
        if settings.shared and self._instances is not None:
            return self._instances.rate(name, settings.rate, settings.burst)
        return local_rate(name, settings)

    def _changed(self, change: BreakerChange) -> None:
        facts = {"upstream": change.breaker, "old": change.old, "new": change.new}
        if change.new == "open":
            self._log.warning("breaker.changed", **facts, reason=change.reason)
        else:
            self._log.info("breaker.changed", **facts, reason=change.reason)

    def told(self) -> dict[str, list[dict[str, object]]]:
        """Say how upstreams and sites are, with their caches."""
        told = self.guards.told()
        for each in told["upstreams"]:
            cache = self._caches.get(str(each["name"]))
            each["cache"] = None if cache is None else cache.told()
        return told

    def turn(
        self, name: str, to: Literal["open", "closed", "reset"], reason: str
    ) -> dict[str, object] | None:
        """Turn a breaker by hand, as :meth:`Guards.turn` does."""
        told = self.guards.turn(name, to, reason)
        if told is not None:
            cache = self._caches.get(name)
            told["cache"] = None if cache is None else cache.told()
        return told

    def __repr__(self) -> str:
        return f"<Protecting {self.guards!r}, caches: {list(self._caches.values())}>"


def unconfigured(name: str, is_public_suffix: Callable[[str], bool]) -> Protection:
    """Leave the upstream called *name* alone, and guard the sites that its hops lead to."""
    guards = Guards(is_public_suffix, local_rate)
    guards.use({name: GuardSettings()}, GuardSettings(BreakerSettings()))
    return Protection(guards.upstream(name), guards.site)


def shares(config: Config) -> bool:
    """Tell whether anything of *config* is shared with other instances over Redis."""
    return config.state.kind in {"redis", "cluster"} and any(
        each.circuit_breaker.share
        or (each.rate_limit is not None and each.rate_limit.share)
        or (each.cache is not None and each.cache.redis)
        for each in config.upstreams.values()
    )


def breaker_settings(config: HopBreaker) -> BreakerSettings | None:
    """Give the settings of a breaker; None where it is switched off."""
    if config.mode == "off":
        return None
    return BreakerSettings(
        mode=config.mode,
        fail_max=config.fail_max,
        failure_rate=config.failure_rate,
        min_calls=config.min_calls,
        window=config.window,
        slow_call=config.slow_call,
        slow_call_rate=config.slow_call_rate,
        reset_timeout=config.reset_timeout,
        max_reset_timeout=config.max_reset_timeout,
        success_threshold=config.success_threshold,
    )


def guard_settings(config: UpstreamConfig, workers: int = 1) -> GuardSettings:
    """Give what stands around the calls of an upstream's endpoint, in one of *workers*."""
    breaker, rate = config.circuit_breaker, config.rate_limit
    part = None
    if rate is not None:
        processes = 1 if rate.share else workers
        burst = max(1, round(rate.at_once / processes))
        part = RateSettings(rate.rate / processes, burst, rate.share)
    return GuardSettings(
        breaker=breaker_settings(breaker),
        rate=part,
        max_in_flight=config.max_requests_in_flight,
        attempts=config.retry.attempts,
        retry_share=config.retry.budget,
        about=config.endpoint.text,
        share_quorum=breaker.quorum if breaker.share and breaker.mode != "off" else 0,
    )


def cache_settings(
    name: str, config: UpstreamConfig, routes: tuple[Route, ...]
) -> CacheSettings | None:
    """Give the settings of the cache of the upstream *name*, which *routes* ask; None: no cache."""
    cache = config.cache
    if cache is None:
        return None
    return CacheSettings(
        ttl=cache.ttl,
        scope=cache.scope,
        paid=is_paid(name, routes) if cache.paid is None else cache.paid,
        vary=cache.vary,
        ignore=frozenset(cache.ignore),
        no_fill_ttl=cache.no_fill_ttl,
        stale_while_revalidate=cache.stale_while_revalidate,
        stale_if_error=cache.stale_if_error,
        max_bytes=cache.max_size,
        redis=cache.redis,
    )


def is_paid(name: str, routes: tuple[Route, ...]) -> bool:
    """Tell whether a budget of *routes* covers the ads of the upstream *name*."""
    return any(
        each.budget is not None
        and name in each.upstreams
        and (each.budget.upstreams is None or name in each.budget.upstreams)
        for each in routes
    )
