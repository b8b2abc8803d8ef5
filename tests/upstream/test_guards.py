"""The guards of upstreams and of sites, over reloads, and in the hands of an operator."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from tests.support.calls import BAD, GOOD, Scripted, Told, by, failures
from vastproxy.observe.trace import BreakerChange
from vastproxy.upstream.breaker import UpstreamBreaker
from vastproxy.upstream.guard import HOPS, GuardSettings, RateSettings
from vastproxy.upstream.guards import MAX_SITES, Guards, site_of
from vastproxy.upstream.limiter import LocalRate, Rate
from vastproxy.upstream.urls import target
from vastproxy.upstream.window import BreakerSettings


def local(_: str, settings: RateSettings) -> Rate:
    """Make a limiter that stays in this process."""
    return LocalRate(settings.rate, settings.burst)


def some_guards(told: Told | None = None, **more: object) -> Guards:
    """Give guards whose only public suffixes are com and co.uk."""
    return Guards(
        lambda name: name in {"com", "co.uk", "uk"},
        local,
        telling=told,
        **more,  # type: ignore[arg-type]
    )


# --- Sites ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "site"),
    [
        ("https://example.com/x", "example.com"),
        ("http://example.com/x", "example.com"),
        ("https://Ads.Example.com./", "example.com"),
        ("https://a.b.c.example.co.uk/", "example.co.uk"),
        ("https://co.uk/", "co.uk"),
        ("http://ads.example.com:443/", "http://example.com:443"),
        ("https://ads.example.com:8443/", "https://example.com:8443"),
        ("https://com/", "com:443"),
        ("http://localhost/", "localhost:80"),
        ("http://192.0.2.1:81/", "192.0.2.1:81"),
        ("https://[2001:db8::1]/", "[2001:db8::1]:443"),
    ],
)
def test_site(url: str, site: str) -> None:
    """A host is counted under what somebody registered; at an unusual port, by itself."""
    place = target(url)
    suffixes = {"com", "co.uk", "uk"}

    assert site == site_of(place.scheme, place.host, place.port, suffixes.__contains__)


async def test_blame() -> None:
    """A hop's failures are its site's: other sites, and the upstream, go on."""
    guards = some_guards(told := Told())
    settings = GuardSettings(BreakerSettings(fail_max=2))
    guards.use({"main": settings}, settings)
    bad, good = target("https://a.bad.com/x"), target("https://good.com/x")

    await failures(guards.site(bad), Scripted([BAD]), 2)

    other = target("https://b.bad.com/y")
    assert "breaker" == await by(lambda: guards.site(other).ask(Scripted([GOOD]).call()))
    assert GOOD == await guards.site(good).ask(Scripted([GOOD]).call())
    assert GOOD == await guards.upstream("main").ask(Scripted([GOOD]).call())
    assert [(HOPS, "closed", "open")] == told.changes


async def test_many_sites() -> None:
    """However many names a chain makes up, no more than so many sites are remembered."""
    guards = some_guards()
    for number in range(MAX_SITES + 50):
        guards.site(target(f"https://x{number}.com/"))

    assert MAX_SITES == len(guards.told()["hosts"])


# --- Reloads --------------------------------------------------------------------------------------


async def test_reload_keeps() -> None:
    """What is written as before goes on as before: an open breaker stays open."""
    guards = some_guards()
    settings = GuardSettings(BreakerSettings(fail_max=1), about="https://ads.example/")
    guards.use({"main": settings}, GuardSettings())
    await failures(guards.upstream("main"), Scripted([BAD]), 1)

    guards.use({"other": GuardSettings(), "main": settings}, GuardSettings())

    assert "breaker" == await by(lambda: guards.upstream("main").ask(Scripted([GOOD]).call()))


async def test_reload_keeps_breaker() -> None:
    """Another bound leaves the breaker as it is."""
    guards = some_guards()
    breaker = BreakerSettings(fail_max=1)
    guards.use({"main": GuardSettings(breaker)}, GuardSettings())
    await failures(guards.upstream("main"), Scripted([BAD]), 1)

    guards.use({"main": GuardSettings(breaker, max_in_flight=7)}, GuardSettings())

    assert "breaker" == await by(lambda: guards.upstream("main").ask(Scripted([GOOD]).call()))


async def test_reload_keeps_what_is_under_way() -> None:
    """A reload forgets neither the calls under way nor the turns that were taken."""
    guards = some_guards()
    settings = GuardSettings(rate=RateSettings(0.001, 3), max_in_flight=2)
    server = Scripted([GOOD], go=asyncio.Event())
    async with asyncio.TaskGroup() as group:
        for attempts in range(2):
            guards.use({"main": replace(settings, attempts=attempts)}, GuardSettings())
            group.create_task(guards.upstream("main").ask(server.call()))
            await asyncio.sleep(0)
        busy = await by(lambda: guards.upstream("main").ask(server.call()))
        assert server.go is not None
        server.go.set()
    await guards.upstream("main").ask(server.call())

    assert "busy" == busy
    assert "rate_limit" == await by(lambda: guards.upstream("main").ask(server.call()))


async def test_reload_begins_anew() -> None:
    """Another endpoint is another ad server: its breaker is closed."""
    guards = some_guards(told := Told())
    breaker = BreakerSettings(fail_max=1)
    guards.use({"main": GuardSettings(breaker, about="https://one.example/")}, GuardSettings())
    await failures(guards.upstream("main"), Scripted([BAD]), 1)

    guards.use({"main": GuardSettings(breaker, about="https://two.example/")}, GuardSettings())

    assert GOOD == await guards.upstream("main").ask(Scripted([GOOD]).call())
    assert [("main", "closed", "open"), ("main", "open", "closed")] == told.changes


@dataclass
class Shared:
    """Takes note of the breakers that are shared."""

    names: list[str] = field(default_factory=list)

    def add(self, breaker: UpstreamBreaker, quorum: int) -> None:
        """Share *breaker*."""
        self.names.append(f"{breaker.name}/{quorum}")

    def remove(self, breaker: UpstreamBreaker) -> None:
        """Share it no more."""
        self.names.append(f"-{breaker.name}")


async def test_sharing() -> None:
    """Whoever shares breakers is told of those that come and go."""
    shared = Shared()
    guards = some_guards(sharing=shared)
    settings = GuardSettings(BreakerSettings(), share_quorum=2)

    guards.use({"main": settings, "own": GuardSettings(BreakerSettings())}, GuardSettings())
    guards.use({"main": settings}, GuardSettings())
    guards.use({}, GuardSettings())

    assert ["main/2", "-main"] == shared.names


# --- For operators --------------------------------------------------------------------------------


async def test_told() -> None:
    """An operator sees what became of the calls, and how long they took."""
    guards = some_guards()
    guards.use(
        {
            "main": GuardSettings(
                BreakerSettings(), RateSettings(50.0, 5), about="https://a.example/"
            )
        },
        GuardSettings(),
    )
    await failures(guards.upstream("main"), Scripted([GOOD, BAD, GOOD]), 3)

    [told] = guards.told()["upstreams"]

    assert ("main", "https://a.example/", 0) == (told["name"], told["endpoint"], told["in_flight"])
    assert {"rate": 50.0, "burst": 5, "shared": False, "refused": 0} == told["rate_limit"]
    calls, breaker, times = told["calls"], told["breaker"], told["latency_ms"]
    assert isinstance(calls, dict)
    assert isinstance(breaker, dict)
    assert isinstance(times, dict)
    assert (2, 1) == (calls["ok"], calls["failed"])
    assert "closed" == breaker["state"]
    assert 3 == times["calls"]


async def test_by_hand() -> None:
    """An operator opens, closes and resets a breaker; what has none cannot be turned."""
    heard: list[BreakerChange] = list[BreakerChange]()
    guards = some_guards(changed=heard.append)
    guards.use({"main": GuardSettings(BreakerSettings()), "bare": GuardSettings()}, GuardSettings())

    guards.turn("main", "open", "maintenance")
    refused = await by(lambda: guards.upstream("main").ask(Scripted([GOOD]).call()))
    guards.turn("main", "closed", "done")

    assert "breaker" == refused
    assert GOOD == await guards.upstream("main").ask(Scripted([GOOD]).call())
    assert ["maintenance", "done"] == [each.reason for each in heard]
    assert None is guards.turn("nobody", "open", "")
    with pytest.raises(ValueError, match="mode is off"):
        guards.turn("bare", "reset", "")
