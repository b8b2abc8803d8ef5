"""From config.yaml to guards and caches, and what of them outlives a reload."""

from collections.abc import Coroutine
from typing import Any

import pytest
import yaml
from structlog.testing import capture_logs

from tests.support.calls import BAD, GOOD, Scripted, failures
from tests.support.proxy import a_config
from vastproxy.config.load import loads
from vastproxy.config.schema import Config
from vastproxy.guarding import (
    Protecting,
    breaker_settings,
    cache_settings,
    guard_settings,
    is_paid,
    shares,
)
from vastproxy.model import HopReply
from vastproxy.observe.metrics import RequestMetrics
from vastproxy.session.session import Fetched
from vastproxy.upstream.answers import Answer, Asking, CacheSettings, Facts
from vastproxy.upstream.breaker import UpstreamBreaker
from vastproxy.upstream.guard import GuardSettings, RateSettings
from vastproxy.upstream.limiter import LocalRate
from vastproxy.upstream.urls import target
from vastproxy.upstream.window import BreakerSettings

HOUSE = {"cache": {"scope": "shared"}}


def config_of(*routes: dict[str, Any], state: str = "", **upstreams: dict[str, Any]) -> Config:
    """Read a config of *upstreams*, each with an endpoint, that *routes* ask; or one does all."""
    made = {
        name: {"endpoint": f"https://{name}.example/ad", **each} for name, each in upstreams.items()
    }
    asked = routes or ({"path": "/ad", "upstreams": list(made), "viewer": ["query:uid"]},)
    more = {"state": state} if state else {}
    found = a_config(made, asked, **more)
    return loads(yaml.safe_dump(found), source="config.yaml", environ={})


def main_of(**settings: Any) -> Any:
    """Read the settings of one upstream."""
    state = "redis://127.0.0.1:6379" if "share: true" in yaml.safe_dump(settings) else ""
    return config_of(state=state, main=settings).upstreams["main"]


def a_route(path: str, *upstreams: str, **more: Any) -> dict[str, Any]:
    """Build a route that knows its viewers."""
    return {"path": path, "upstreams": list(upstreams), "viewer": ["query:uid"], **more}


def a_budget(**more: Any) -> dict[str, Any]:
    """Build a budget."""
    return {"campaign": "spring", "limit": 100, "amount": 1, **more}


class Store:
    """A second level that has nothing."""

    async def get(self, _: str) -> bytes | None:
        """Give nothing."""
        return None

    async def put(self, key: str, value: bytes, seconds: float) -> None:
        """Forget it."""


class Shared:
    """What is shared with other instances: takes note of it."""

    def __init__(self) -> None:
        self.store = Store()
        self.rates: list[tuple[str, float, int]] = []
        self.added: list[tuple[str, int]] = []
        self.removed: list[str] = []

    @property
    def breakers(self) -> "Shared":
        """Keep breakers alike."""
        return self

    def rate(self, name: str, rate: float, burst: int) -> LocalRate:
        """Make a limiter."""
        self.rates.append((name, rate, burst))
        return LocalRate(rate, burst)

    def add(self, breaker: UpstreamBreaker, quorum: int) -> None:
        """Take a breaker."""
        self.added.append((breaker.name, quorum))

    def remove(self, breaker: UpstreamBreaker) -> None:
        """Take it no more."""
        self.removed.append(breaker.name)


def spawn(work: Coroutine[Any, Any, None], _: str) -> None:
    """Do nothing in the background."""
    work.close()


def protecting(
    config: Config, shared: Shared | None = None, metrics: RequestMetrics | None = None
) -> Protecting:
    """Protect the upstreams of *config*."""
    made = Protecting(lambda _: False, metrics or RequestMetrics(), spawn, shared)
    made.use(config)
    return made


# --- Settings -------------------------------------------------------------------------------------


def test_defaults() -> None:
    """What nobody writes is a breaker, a bound, and one repetition; no rate, and no cache."""
    assert GuardSettings(
        breaker=BreakerSettings(),
        max_in_flight=500,
        attempts=1,
        retry_share=0.1,
        about="https://main.example/ad",
    ) == guard_settings(main_of())
    assert None is cache_settings("main", main_of(), ())


def test_breaker_settings() -> None:
    """Every setting of a breaker arrives."""
    written = {
        "mode": "shadow",
        "fail_max": 2,
        "failure_rate": "30%",
        "min_calls": 3,
        "window": "4s",
        "slow_call": "500ms",
        "slow_call_rate": "60%",
        "reset_timeout": "7s",
        "max_reset_timeout": "8s",
        "success_threshold": 9,
    }
    settings = BreakerSettings("shadow", 2, 0.3, 3, 4.0, 0.5, 0.6, 7.0, 8.0, 9)

    assert settings == breaker_settings(main_of(circuit_breaker=written).circuit_breaker)
    assert settings == guard_settings(main_of(circuit_breaker=written)).breaker


def test_no_breaker() -> None:
    """A breaker that is off is none, and is not shared either."""
    off = guard_settings(main_of(circuit_breaker={"mode": "off", "share": True, "quorum": 3}))

    assert (None, 0) == (off.breaker, off.share_quorum)


def test_shared_breaker() -> None:
    """A breaker that is shared says how many must agree."""
    on = guard_settings(main_of(circuit_breaker={"share": True, "quorum": 3}))

    assert 3 == on.share_quorum


@pytest.mark.parametrize(
    ("written", "workers", "settings"),
    [
        ("100/s", 1, RateSettings(100, 10)),
        ("6000/m", 2, RateSettings(50, 5)),
        ({"rate": "100/s", "burst": 30}, 4, RateSettings(25, 8)),
        ({"rate": "1/s"}, 8, RateSettings(0.125, 1)),
        ({"rate": "100/s", "share": True}, 4, RateSettings(100, 10, shared=True)),
    ],
)
def test_rate(written: object, workers: int, settings: RateSettings) -> None:
    """A rate is the whole proxy's: each worker has a part, unless they count together."""
    assert settings == guard_settings(main_of(rate_limit=written), workers).rate


def test_retry() -> None:
    """How often a call goes out again is the operator's to say."""
    found = guard_settings(
        main_of(retry={"attempts": 3, "budget": "20%"}, max_requests_in_flight=7)
    )

    assert (3, 0.2, 7) == (found.attempts, found.retry_share, found.max_in_flight)


def test_cache_settings() -> None:
    """Every setting of a cache arrives."""
    cache = {
        "ttl": "1m",
        "scope": "shared",
        "paid": True,
        "vary": ["query:slot", "header:Accept-Language"],
        "ignore": ["x"],
        "no_fill_ttl": "off",
        "stale_while_revalidate": "2s",
        "stale_if_error": "3s",
        "max_size": "1MiB",
    }
    config = config_of(main={"cache": cache})
    found = cache_settings("main", config.upstreams["main"], config.routes)

    assert found is not None
    assert (
        CacheSettings(60.0, "shared", True, found.vary, frozenset("x"), 0.0, 2.0, 3.0, 1 << 20)  # noqa: FBT003 - in their order
        == found
    )
    assert ["slot", "accept-language"] == [each.name.lower() for each in found.vary]


def test_cache_in_redis() -> None:
    """Whether there is a second level is the operator's to say."""
    config = config_of(state="redis://127.0.0.1:6379", main={"cache": {"redis": True}})
    found = cache_settings("main", config.upstreams["main"], config.routes)

    assert found is not None
    assert found.redis


@pytest.mark.parametrize(
    ("budget", "sold"),
    [
        (None, {"main": False, "house": False}),
        (a_budget(), {"main": True, "house": True}),
        (a_budget(upstreams=["main"]), {"main": True, "house": False}),
    ],
)
def test_budget_makes_paid(budget: dict[str, Any] | None, sold: dict[str, bool]) -> None:
    """An upstream is paid if a budget of any route that asks it covers it."""
    more = {} if budget is None else {"budget": budget}
    config = config_of(
        a_route("/free", "main", "house", "other"),
        a_route("/ad", "main", "house", **more),
        main=HOUSE,
        house=HOUSE,
        other=HOUSE,
    )

    for name, is_sold in {**sold, "other": False}.items():
        settings = cache_settings(name, config.upstreams[name], config.routes)
        assert is_sold == is_paid(name, config.routes)
        assert settings is not None
        assert is_sold == settings.paid


def test_paid_by_word() -> None:
    """What the operator says counts without a budget."""
    config = config_of(main={"cache": {"scope": "shared", "paid": True}})
    found = cache_settings("main", config.upstreams["main"], config.routes)

    assert found is not None
    assert found.paid


@pytest.mark.parametrize(
    ("written", "goes_over"),
    [
        ({}, False),
        (HOUSE, False),
        ({"rate_limit": "100/s"}, False),
        ({"rate_limit": {"rate": "100/s", "share": True}}, True),
        ({"circuit_breaker": {"share": True}}, True),
        ({"cache": {"redis": True}}, True),
    ],
)
def test_shares(written: dict[str, Any], goes_over: bool) -> None:  # noqa: FBT001 - of the table
    """Redis is opened for what goes over it, and not for anything else."""
    config = config_of(state="redis://127.0.0.1:6379", house={}, main=written)

    assert goes_over == shares(config)


# --- What is shared -------------------------------------------------------------------------------


def test_instances() -> None:
    """Breakers, rates and answers are shared with other instances where they are told to be."""
    shared = Shared()
    config = config_of(
        state="redis://127.0.0.1:6379",
        main={
            "circuit_breaker": {"share": True, "quorum": 2},
            "rate_limit": {"rate": "100/s", "share": True},
        },
        own={"rate_limit": "50/s"},
    )
    guards = protecting(config, shared)
    guards.use(config_of(own={"rate_limit": "50/s"}))

    assert [("main", 2)] == shared.added
    assert ["main"] == shared.removed
    assert [("main", 100.0, 10)] == shared.rates


def test_share_that_is_new() -> None:
    """Where a reload brings the first thing to share, the log says what it takes."""
    guards = protecting(config_of(main={}))
    shared = {"rate_limit": {"rate": "100/s", "share": True}}
    with capture_logs() as logs:
        guards.use(config_of(state="redis://127.0.0.1:6379", main=shared))

    assert ["sharing.needs_restart"] == [each["event"] for each in logs]
    rate = guards.of("main").entry.rate
    assert rate is not None
    assert (100, False) == (rate.rate, rate.shared)


# --- What outlives a reload -----------------------------------------------------------------------


async def answered(guards: Protecting, name: str, body: str) -> str:
    """Ask the cache of the upstream called *name*, behind which is *body*; say what came."""
    cache = guards.of(name).cache
    assert cache is not None

    async def ask() -> Answer:
        """Answer *body*."""
        fetched = Fetched(HopReply(200, (), body.encode()), "https://main.example/ad")
        return Answer(fetched, Facts(filled=True, priced=False, expires=None))

    answer, _ = await cache.through(Asking("https://main.example/ad", "ann"), ask, ask)
    return answer.fetched.reply.body.decode()


async def test_cache_outlives_a_reload() -> None:
    """What a cache has stays there while its own settings stay, whatever else changes."""
    guards = protecting(config_of(main=HOUSE))
    await answered(guards, "main", "first")
    guards.use(config_of(main={**HOUSE, "timeout": "2s", "rate_limit": "10/s"}, more=HOUSE))
    kept = await answered(guards, "main", "second")
    guards.use(config_of(main={"cache": {"scope": "shared", "ttl": "1m"}}))
    anew = await answered(guards, "main", "third")

    assert ("first", "third") == (kept, anew)


async def test_cache_ends_with_its_settings() -> None:
    """A cache that is taken away and comes back has nothing of what it had."""
    guards = protecting(config_of(main=HOUSE))
    await answered(guards, "main", "first")
    guards.use(config_of(main={}))
    without = guards.of("main").cache
    guards.use(config_of(main=HOUSE))

    assert None is without
    assert "second" == await answered(guards, "main", "second")


async def test_cache_of_another_ad_server() -> None:
    """What one endpoint answered is nothing that another one has said."""
    guards = protecting(config_of(main=HOUSE))
    asked = Asking("https://main.example/ad"), Asking("https://other.example/ad")
    cache = guards.of("main").cache
    assert cache is not None
    bodies = iter([b"main", b"other"])

    async def ask() -> Answer:
        """Answer what is next."""
        fetched = Fetched(HopReply(200, (), next(bodies)), "")
        return Answer(fetched, Facts(filled=True, priced=False, expires=None))

    guards.use(config_of(main={**HOUSE, "endpoint": "https://other.example/ad"}))
    assert cache is guards.of("main").cache
    found = [(await cache.through(each, ask, ask))[0].fetched.reply.body for each in asked]

    assert [b"main", b"other"] == found


async def test_budget_in_a_reload_begins_anew() -> None:
    """When a budget makes an upstream paid, what was for everybody is nobody's."""
    guards = protecting(config_of(a_route("/ad", "main"), main=HOUSE))
    await answered(guards, "main", "first")
    guards.use(config_of(a_route("/ad", "main", budget=a_budget()), main=HOUSE))

    assert ["second", "third"] == [
        await answered(guards, "main", each) for each in ("second", "third")
    ]


async def test_open_breaker_outlives_a_reload() -> None:
    """An open breaker stays open, unless it is another one; the log has each change."""
    broken = {"circuit_breaker": {"fail_max": 1}}
    guards = protecting(config_of(main=broken))
    with capture_logs() as logs:
        await failures(guards.of("main").entry, Scripted([BAD]), 1)
        guards.use(config_of(main={**broken, "timeout": "2s"}, more={}))
        breaker = guards.of("main").entry.breaker
        assert breaker is not None
        stays = breaker.state
        breaker.close("their word")
    guards.use(config_of(main={"circuit_breaker": {"fail_max": 2}}))

    assert "open" == stays
    assert breaker is not guards.of("main").entry.breaker
    assert [("warning", "open"), ("info", "closed")] == [
        (each["log_level"], each["new"]) for each in logs
    ]
    assert "HTTP status 500" in logs[0]["reason"]
    assert {"breaker.changed"} == {each["event"] for each in logs}


async def test_hops_have_the_breaker_of_egress() -> None:
    """What wrappers lead to is guarded as ``egress`` says, site by site."""
    written = a_config({"main": "https://main.example/ad"}, [a_route("/ad", "main")])
    written["egress"] |= {"circuit_breaker": {"fail_max": 7}, "max_requests_in_flight": 3}
    guards = protecting(loads(yaml.safe_dump(written), source="config.yaml", environ={}))

    hop = guards.of("main").site(target("https://ads.vendor.example/x"))
    assert hop.breaker is not None
    assert (7, 3) == (hop.breaker.settings.fail_max, hop.settings.max_in_flight)
    assert (None, 0) == (hop.rate, hop.settings.attempts)


# --- For people -----------------------------------------------------------------------------------


async def test_told() -> None:
    """Operators are told of each upstream, with its cache where it has one."""
    metrics = RequestMetrics()
    guards = protecting(config_of(main=HOUSE, other={}), metrics=metrics)
    for _ in range(2):
        await answered(guards, "main", "ad")
    main, other = guards.told()["upstreams"]
    cache: Any = main["cache"]

    assert ("main", "other", None) == (main["name"], other["name"], other["cache"])
    assert (1, 1, 1) == (cache["entries"], cache["hits"], cache["misses"])
    text = metrics.text().decode()
    assert 'vastproxy_cache_total{result="hit",upstream="main"} 1.0' in text


async def test_turn() -> None:
    """An operator turns a breaker by its upstream's name, and is told of that upstream."""
    guards = protecting(config_of(main=HOUSE, other={}))
    told, other = (guards.turn(each, "open", "by hand") for each in ("main", "other"))

    assert None is guards.turn("nobody", "open", "")
    assert told is not None
    assert other is not None
    assert ("open", True) == (told["breaker"]["state"], told["cache"] is not None)  # type: ignore[index]
    assert None is other["cache"]


async def test_repr() -> None:
    """A person at three in the morning sees breakers and caches."""
    guards = protecting(config_of(main=HOUSE))
    reply = await guards.of("main").entry.ask(Scripted([GOOD]).call())

    assert GOOD == reply
    assert "<AnswerCache main, shared, unpaid" in repr(guards)
    assert "<Protecting <Guards main " in repr(guards)
