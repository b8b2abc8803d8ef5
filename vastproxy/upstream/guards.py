"""
The guards of all upstreams, and of the sites that hops lead to.

Rule 1: an upstream's own guard is for its endpoint. Everything that wrappers and redirects lead to
is guarded by site, the registrable domain, so that the blame falls on who failed.
Rule 2: guards outlive the configuration that made them, as long as their settings stay.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Literal, Protocol

from vastproxy.observe.trace import BreakerChange
from vastproxy.upstream.breaker import UpstreamBreaker
from vastproxy.upstream.guard import (
    HOPS,
    Crowd,
    Guard,
    GuardSettings,
    RateSettings,
    Silence,
    Telling,
)
from vastproxy.upstream.limiter import Rate
from vastproxy.upstream.recent import Recent
from vastproxy.upstream.urls import Target

MAX_SITES = 1000
"""Sites that are remembered: a chain's author can make up as many names as he likes."""

_USUAL = frozenset({("http", 80), ("https", 443)})


def site_of(scheme: str, host: str, port: int, is_public_suffix: Callable[[str], bool]) -> str:
    """
    Give what *host* is counted under: its registrable domain.

    An address, and a name that is none of a registry's, is taken with its port; a domain at an
    unusual port, with port and scheme: who names such a one shall not harm the usual one.
    """
    name = host.rstrip(".").lower()
    if _is_address(name) or "." not in name:
        return f"{name}:{port}"
    site = _registrable(name.split("."), is_public_suffix)
    return site if (scheme, port) in _USUAL else f"{scheme}://{site}:{port}"


def _registrable(labels: list[str], is_public_suffix: Callable[[str], bool]) -> str:
    # From the longest name down: the last one above a public suffix is what somebody registered.
    for at in range(1, len(labels)):
        if is_public_suffix(".".join(labels[at:])):
            return ".".join(labels[at - 1 :])
    return ".".join(labels)


def _is_address(name: str) -> bool:
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _of_breaker(settings: GuardSettings) -> tuple[object, ...]:
    return settings.breaker, settings.share_quorum


class Sharing(Protocol):
    """Who keeps breakers of several instances alike."""

    def add(self, breaker: UpstreamBreaker, quorum: int) -> None:
        """Share *breaker* from now on."""

    def remove(self, breaker: UpstreamBreaker) -> None:
        """Share *breaker* no more."""


class Guards:
    """
    The guards of all upstreams, and of the sites that hops lead to.

    *rate* makes limiters by name, *telling* hears of calls and changes, *changed* of changes in
    full. *is_public_suffix* tells what is nobody's own site. *sharing* is told of breakers that
    are shared: when one is there, and when it is gone.
    """

    def __init__(
        self,
        is_public_suffix: Callable[[str], bool],
        rate: Callable[[str, RateSettings], Rate],
        *,
        telling: Telling | None = None,
        changed: Callable[[BreakerChange], None] = lambda _: None,
        sharing: Sharing | None = None,
    ) -> None:
        self._rate = rate
        self._telling: Telling = Silence() if telling is None else telling
        self._changed = changed
        self._sharing = sharing
        self._upstreams: dict[str, Guard] = {}
        self._hops = GuardSettings()
        self._hearing: dict[UpstreamBreaker, Callable[[BreakerChange], None]] = {}
        self._crowd = Crowd()
        self._sites = Recent(self._site, MAX_SITES, dropped=self._retire)
        # By what decides, and not by Target, which has the whole URL.
        self._site_of = lru_cache(maxsize=MAX_SITES)(
            lambda scheme, host, port: site_of(scheme, host, port, is_public_suffix)
        )

    def use(self, upstreams: Mapping[str, GuardSettings], hops: GuardSettings) -> None:
        """Guard *upstreams*, and all else as *hops* says; what stays the same goes on as it is."""
        old = self._upstreams
        self._upstreams = {
            name: self._upstream(name, each, old.get(name)) for name, each in upstreams.items()
        }
        kept = {id(each.breaker) for each in self._upstreams.values()}
        for each in old.values():
            if each.breaker is not None and id(each.breaker) not in kept:
                self._retire(each)
        if hops != self._hops:
            for each in [guard for _, guard in self._sites.items()]:
                self._retire(each)
            self._hops = hops
            self._sites = Recent(self._site, MAX_SITES, dropped=self._retire)

    def upstream(self, name: str) -> Guard:
        """Give the guard of the upstream called *name*."""
        return self._upstreams[name]

    def site(self, place: Target) -> Guard:
        """Give the guard of the site that *place* belongs to."""
        return self._sites.of(self._site_of(place.scheme, place.host, place.port))

    def _upstream(self, name: str, settings: GuardSettings, old: Guard | None) -> Guard:
        if old is not None and old.settings == settings:
            return old
        breaker = rate = None
        if old is not None and old.settings.about == settings.about:
            if old.settings.rate == settings.rate:
                rate = old.rate
            if _of_breaker(old.settings) == _of_breaker(settings):
                breaker = old.breaker
        else:
            old = None
        if breaker is None:
            breaker = self._breaker(name, settings, name)
        if rate is None and settings.rate is not None:
            rate = self._rate(name, settings.rate)
        record = None if old is None else old.record
        return Guard(
            name, settings, rate=rate, breaker=breaker, telling=self._telling, record=record
        )

    def _site(self, name: str) -> Guard:
        breaker = self._breaker(name, self._hops, HOPS)
        return Guard(name, self._hops, breaker=breaker, telling=self._telling, hops=self._crowd)

    def _breaker(self, name: str, settings: GuardSettings, label: str) -> UpstreamBreaker | None:
        if settings.breaker is None:
            return None

        def heard(change: BreakerChange) -> None:
            self._telling.breaker_changed(label, change.old, change.new)
            self._changed(change)

        breaker = UpstreamBreaker(name, settings.breaker, listener=heard)
        self._hearing[breaker] = heard
        if settings.share_quorum and self._sharing is not None:
            self._sharing.add(breaker, settings.share_quorum)
        return breaker

    def _retire(self, guard: Guard) -> None:
        breaker = guard.breaker
        if breaker is None:
            return
        # A call that is still under way may change it yet, and nobody would close it again.
        breaker.remove_listener(self._hearing.pop(breaker))
        if guard.settings.share_quorum and self._sharing is not None:
            self._sharing.remove(breaker)
        if breaker.state != "closed":
            self._telling.breaker_changed(guard.label, breaker.state, "closed")
            if guard.label != HOPS:
                reason = "the configuration changed"
                self._changed(BreakerChange(guard.name, breaker.state, "closed", reason))

    def told(self) -> dict[str, list[dict[str, object]]]:
        """Say how upstreams and sites are."""
        return {
            "upstreams": [each.told() for each in self._upstreams.values()],
            "hosts": [each.told() for _, each in self._sites.items()],
        }

    def turn(
        self, name: str, to: Literal["open", "closed", "reset"], reason: str
    ) -> dict[str, object] | None:
        """
        Turn the breaker of the upstream called *name* by hand, and say how that is now.

        None: there is no such upstream. Raises ValueError where it has no breaker.
        """
        guard = self._upstreams.get(name)
        if guard is None:
            return None
        if guard.breaker is None:
            raise ValueError(f"the upstream {name} has no breaker (its mode is off)")
        match to:
            case "open":
                guard.breaker.open(reason)
            case "closed":
                guard.breaker.close(reason)
            case "reset":
                guard.breaker.reset()
        return guard.told()

    def __repr__(self) -> str:
        upstreams = [f"{each.name} {each.breaker!r}" for each in self._upstreams.values()]
        return f"<Guards {', '.join(upstreams)}, sites: {len(self._sites)}>"
