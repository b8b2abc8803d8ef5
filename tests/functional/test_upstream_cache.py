"""
What upstreams answered is kept for others, and no ad that is sold is ever given twice.

Promises: two viewers never receive the same impression URL from a paid upstream, whatever cache
settings are accepted; a thousand misses for one shared key make one request; with the upstream
dead, stale answers come until their limit, each with fresh macros; every hit is capped and charged.
"""

import asyncio
import itertools
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    an_ad,
    budget,
    metric,
    viewer,
    wait_for,
)
from tests.support.ad_server import EMPTY_VAST, AdServer, Received, Reply, in_thread
from tests.support.documents import a_wrapper
from tests.support.player import Answered, Player
from tests.support.proxy import Answer, Proxy, a_config

WAYS = ("flag", "budget", "price")
"""How an upstream comes to be paid: it is said, a budget covers it, its ads say what they cost."""

CROWD = 1000
"""Viewers who ask for the same at one time."""

FRESH = 1.0
"""Seconds: the shortest ``ttl`` that is accepted."""

STALE = 1.5
"""Seconds after that in which answers stand in for an upstream that is dead."""

PRICE = 0.25
"""Of an ad."""

CAP = 3

MODES = ("resolve", "passthrough")

STRANGE = {
    "lower": "<Ad id='a'><Inline>{}</Inline></Ad>",
    "no-ad": "<ad id='a'><InLine>{}</InLine></ad>",
    "bare": "<InLine>{}</InLine>",
}
"""What is no ad to the proxy, and may be one to a player that is given it."""

AN_AD = Reply(a_document(an_ad("house")))

NOT_KEPT = {
    "cookie": replace(AN_AD, headers=(("Set-Cookie", "a=b"),)),
    "no-store": replace(AN_AD, headers=(("Cache-Control", "no-store"),)),
    "private": replace(AN_AD, headers=(("Cache-Control", "max-age=60, private"),)),
    "vary": replace(AN_AD, headers=(("Vary", "Accept-Encoding, User-Agent"),)),
    "vary-all": replace(AN_AD, headers=(("Vary", "*"),)),
    "over": replace(AN_AD, headers=(("Cache-Control", "max-age=0"),)),
    "gone": Reply(status=404),
    "moved": Reply(status=302, headers=(("Location", "/moved-here"), ("Set-Cookie", "a=b"))),
    "broken": Reply(b"<VAST><Ad>"),
}
"""Answers that are for who asked, and nobody else."""

NO_ADS = {"empty": Reply(EMPTY_VAST), "nothing": Reply(status=204)}

OUTAGES = ("failing", "fragile", "limited", "dead")
"""Upstreams that fail, whose breaker is open, whose rate is used up, that are gone."""


class Seller:
    """
    An ad server that sells each impression once: no two of its answers have the same.

    *priced* ads say what they cost; *next_url* makes them wrappers, to that place.
    """

    def __init__(self, *, priced: bool = False, next_url: str = "", delay: float = 0.0) -> None:
        self.sold = itertools.count(1)
        self.priced = priced
        self.next_url = next_url
        self.delay = delay
        self.is_dead = False

    def __call__(self, request: Received) -> Reply:
        """Answer with an ad that nobody was given before."""
        if self.is_dead:
            return Reply(status=503)
        name = f"{request.path.strip('/')}-{next(self.sold)}"
        if self.next_url:
            impressions = [f"https://t.example/{name}"]
            body = a_wrapper(self.next_url, impressions=impressions, ad=name)
        else:
            body = a_document(an_ad(name, cpm="2.50" if self.priced else ""))
        if self.next_url and self.priced:
            price = b'<Pricing model="CPM" currency="USD">2.50</Pricing><Creatives/>'
            body = body.replace(b"<Creatives/>", price)
        return Reply(body, delay=self.delay)

    def __repr__(self) -> str:
        return f"<Seller, sold: {self.sold}, {'dead' if self.is_dead else 'alive'}>"


def impressions(body: bytes) -> list[str]:
    """Give the impressions in an answer that are an ad server's."""
    return [each.decode() for each in re.findall(rb"https://t\.example/[^\]<\s]+", body)]


def cache_status(answer: Answer) -> dict[str, str]:
    """Read the only member of the header ``Cache-Status`` (RFC 9211 section 2)."""
    cache, *parameters = (answer.header("Cache-Status") or "").split("; ")
    assert "vastproxy" == cache
    return {name: value for name, _, value in (each.partition("=") for each in parameters)}


# --- What is sold is given once -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One set of settings that ``check`` accepts, of an upstream that is paid."""

    paid: str
    scope: str
    redis: bool
    mode: str
    old: bool
    """Whether stale answers are given."""
    like: str
    """How all requests come to have the same key."""

    @property
    def name(self) -> str:
        """What the upstream is called, and its path."""
        where = "redis" if self.redis else "here"
        old = "old" if self.old else "new"
        return f"{self.paid}-{self.scope}-{where}-{self.mode}-{old}-{self.like}"

    @property
    def wraps(self) -> bool:
        """Whether it answers wrappers: every other one does."""
        return (self.redis + self.old + (self.like == "ignore")) % 2 == 1

    def upstream(self, base: str) -> dict[str, Any]:
        """Build the upstream's settings."""
        cache: dict[str, Any] = {"ttl": "1s", "scope": self.scope, "redis": self.redis}
        if self.paid != "budget":
            # An ad that says what it costs is paid for, whatever the operator says.
            cache["paid"] = self.paid == "flag"
        if not self.old:
            cache |= {"stale_while_revalidate": "off", "stale_if_error": "off"}
        if self.like == "ignore":
            cache |= {"ignore": ["uid", "at"], "vary": ["query:slot", "header:Accept-Language"]}
        # Failures are a part of this, and so is what a breaker would keep from failing.
        breaker = {"fail_max": 3, "reset_timeout": "100ms"} if self.redis else {"mode": "off"}
        return {"endpoint": f"{base}/{self.name}", "cache": cache, "circuit_breaker": breaker}

    def route(self) -> dict[str, Any]:
        """Build a route that asks nobody else."""
        forward = "all" if self.like == "ignore" else "none"
        route: dict[str, Any] = {
            "path": f"/{self.name}",
            "upstreams": [self.name],
            "mode": self.mode,
            "viewer": ["query:uid"],
            "forward_query": forward,
            "deadline": "20s",
        }
        if self.paid == "budget":
            route["budget"] = {"campaign": self.name, "limit": "1000", "amount": "0.01"}
        return route


CASES = [
    Case(*each)
    for each in itertools.product(
        WAYS,
        ("viewer", "shared"),
        (False, True),
        MODES,
        (False, True),
        ("none", "ignore"),
    )
]


@dataclass
class Audience:
    """Takes note of who was given which impression; who has no name is another one each time."""

    given: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    answers: int = 0
    unknown: Iterator[int] = field(default_factory=itertools.count)

    def saw(self, uid: str, body: bytes) -> None:
        """Take note of an answer."""
        who = uid or f"unknown {next(self.unknown)}"
        found = impressions(body)
        self.answers += bool(found)
        for each in found:
            self.given[each].add(who)

    @property
    def shared(self) -> dict[str, set[str]]:
        """The impressions that more than one viewer was given."""
        return {each: who for each, who in self.given.items() if len(who) > 1}


async def ask_all(
    player: Player, cases: Sequence[Case], audience: Audience, times: int = 1
) -> None:
    """Let viewers ask for each of *cases*, several at one time; all of that so many *times*."""

    async def asked(case: Case, uid: str) -> None:
        """Ask as one viewer."""
        who = f"uid={uid}&" if uid else ""
        answer = await player.ask(f"/{case.name}?{who}slot=top&at={time.monotonic_ns()}")
        assert HTTPStatus.OK == answer.status
        audience.saw(uid, answer.body)

    for at in range(0, len(cases), 16):
        some = list(itertools.product(cases[at : at + 16], ("ann", "ann", "bob", "", "")))
        for _ in range(times):
            await asyncio.gather(*(asked(case, uid) for case, uid in some))


@pytest.fixture(scope="module")
def sellers(ad_server: AdServer) -> dict[str, Seller]:
    """Make an ad server for each of the cases."""
    end = ad_server.url("/end")
    return {
        each.name: Seller(priced=each.paid == "price", next_url=end if each.wraps else "")
        for each in CASES
    }


@pytest.fixture(scope="module")
def paid_proxy(ad_server: AdServer, states: States, start_module_proxy: StartProxy) -> Proxy:
    """Run a proxy with all of the cases."""
    upstreams = {each.name: each.upstream(ad_server.url()) for each in CASES}
    routes = [each.route() for each in CASES]
    return start_module_proxy(
        a_config(
            upstreams,
            routes,
            state=states.url("redis"),
            state_timeout="250ms",
            server={"secret": [SECRET]},
        )
    )


async def test_sold_impressions_are_given_once(
    paid_proxy: Proxy, ads: AdServer, sellers: dict[str, Seller]
) -> None:
    """
    No impression of a paid upstream reaches two viewers: whatever says that it is paid, however
    answers are kept, whoever asks at the same time; also while it fails, and when it is back.
    """
    ads.replies |= {f"/{name}": each for name, each in sellers.items()}
    ads.replies["/end"] = Seller()
    audience = Audience()
    async with Player(paid_proxy.base) as player:
        await ask_all(player, CASES, audience, times=2)
        await asyncio.sleep(FRESH)
        await ask_all(player, [each for each in CASES if each.old], audience)
        for each in sellers.values():
            each.is_dead = True
        await asyncio.sleep(FRESH)
        before = audience.answers
        await ask_all(player, CASES, audience)
        stale = audience.answers - before
        for each in sellers.values():
            each.is_dead = False
        await ask_all(player, CASES, audience)

    assert {} == audience.shared
    # It was kept, at that: for who had it before.
    hits = metric(paid_proxy, "vastproxy_cache_total", result="hit")
    assert hits > len(CASES) / 2
    assert stale > 0
    assert metric(paid_proxy, "vastproxy_cache_total", result="stale") > 0


async def test_reload_gives_nothing_to_a_second_viewer(
    ad_server: AdServer, ads: AdServer, states: States, start_proxy: StartProxy
) -> None:
    """
    What a viewer is given of an upstream that is paid is nobody else's, before a reload and after.

    The upstream is unpaid in between, and then its ads are for everybody; players ask all the time.
    """
    ads.replies["/main"] = Seller(delay=0.02)

    def section(scope: str, *, paid: bool) -> dict[str, Any]:
        """Write the upstreams with a cache of *scope*."""
        cache = {"scope": scope, "paid": paid, "redis": True}
        endpoint = ad_server.url("/main")
        return {"upstreams": {"main": {"endpoint": endpoint, "session_params": [], "cache": cache}}}

    config = a_config({}, [a_route("main")], state=states.url("redis"))
    proxy = start_proxy({**config, **section("shared", paid=False)})
    seen: list[tuple[bool, str, list[str]]] = []
    is_sold, ended = False, False

    async def watch(player: Player, name: str) -> None:
        """Ask as one viewer after the other, until the end."""
        for number in itertools.count():
            if ended:
                return
            sold_from_now = is_sold
            # Every other one comes back, and may be given what he had.
            uid = f"{name}{number // 2}"
            answer = await player.ask(f"/main?uid={uid}")
            seen.append((sold_from_now and is_sold, uid, impressions(answer.body)))

    async with Player(proxy.base) as player, asyncio.TaskGroup() as group:
        for name in "abcdef":
            group.create_task(watch(player, name))
        terms = [("shared", True), ("shared", False), ("viewer", True), ("shared", True)]
        for number, (scope, paid) in enumerate(terms, start=1):
            await asyncio.sleep(0.3)
            is_sold = False
            proxy.reload(section(scope, paid=paid))
            await asyncio.to_thread(wait_for, lambda: number == len(reloads(proxy)))  # noqa: B023
            is_sold = paid
        await asyncio.sleep(0.3)
        ended = True

    given = defaultdict(set)
    for _, uid, found in seen:
        for each in found:
            given[each].add(uid)
    sold = {each for was_sold, _, found in seen if was_sold for each in found}
    assert {1} == {len(given[each]) for each in sold}
    # While it was unpaid, ads were for all.
    assert max(map(len, given.values())) > 1


def reloads(proxy: Proxy) -> list[dict[str, Any]]:
    """Give what the log says of reloads that are done."""
    return proxy.records(event="reloaded")


# --- One upstream for each story ------------------------------------------------------------------


def a_route(name: str, *upstreams: str, **more: Any) -> dict[str, Any]:
    """Build a route whose requests are all the same to the upstreams it asks."""
    return {
        "path": f"/{name}",
        "upstreams": upstreams or (name,),
        "viewer": ["query:uid"],
        "forward_query": "none",
        "deadline": "20s",
        **more,
    }


def all_upstreams(base: str, gone: str) -> dict[str, dict[str, Any]]:
    """Build an upstream with a cache for each story; one of them is at *gone*."""
    house = {"ttl": "60s", "scope": "shared"}
    brief = {**house, "ttl": "1s", "stale_while_revalidate": "off", "stale_if_error": "1500ms"}
    caches: dict[str, dict[str, Any]] = {
        **{f"{name}-{mode}": {**house, "paid": True} for name in STRANGE for mode in MODES},
        **dict.fromkeys(("here", "starved", "raced", "capped", "bypass", "priced"), house),
        **dict.fromkeys((*NOT_KEPT, *OUTAGES), brief),
        "redis": {**house, "redis": True},
        "personal": {"ttl": "60s"},
        "renewed": {**brief, "stale_while_revalidate": "10s"},
        **{name: {**house, "no_fill_ttl": "900ms"} for name in NO_ADS},
        "empty-off": {**house, "no_fill_ttl": "off"},
        "varied": {**house, "vary": ["header:Accept-Language"]},
        "device": {**house, "vary": ["header:User-Agent"]},
    }
    off = {"circuit_breaker": {"mode": "off"}, "timeout": "15s"}
    upstreams = {
        name: {"endpoint": f"{base}/{name}", "cache": cache, **off}
        for name, cache in caches.items()
    }
    upstreams["raced"]["soft_timeout"] = "200ms"
    upstreams["fragile"]["circuit_breaker"] = {"fail_max": 1}
    upstreams["limited"]["rate_limit"] = {"rate": "1/m", "burst": 1}
    upstreams["dead"]["endpoint"] = f"{gone}/dead"
    upstreams["quick"] = {"endpoint": f"{base}/quick"}
    return upstreams


def all_routes(names: Iterable[str]) -> list[dict[str, Any]]:
    """Build a route for each of the upstreams called *names*, and what more there is of routes."""
    special: dict[str, dict[str, Any]] = {
        "bypass": {"forward_cookies": ["session"]},
        "capped": {"frequency_caps": [{"limit": CAP, "window": "1h"}]},
        "personal": {"budget": {"campaign": "personal", "limit": 4 * PRICE, "amount": PRICE}},
        **{f"{name}-{mode}": {"mode": mode} for name in STRANGE for mode in MODES},
        **{name: {"fill_macros": "all"} for name in OUTAGES},
    }
    return [
        *(a_route(each, **special.get(each, {})) for each in names),
        a_route("soon", "starved", deadline="300ms"),
        a_route("race", "raced", "quick"),
        a_route("both", "empty-off", "bypass"),
    ]


@pytest.fixture(scope="module")
def gone() -> Iterator[ExitStack]:
    """Give what ends the ad server that is gone in the end."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def proxy(
    ad_server: AdServer, gone: ExitStack, states: States, start_module_proxy: StartProxy
) -> Proxy:
    """Run a proxy with an upstream for each story."""
    dead = gone.enter_context(in_thread(AdServer(fallback=some_macros())))
    upstreams = all_upstreams(ad_server.url(), dead.url())
    config = a_config(upstreams, all_routes(upstreams), state=states.url("redis"))
    server = {"secret": [SECRET], "trusted_proxies": ["127.0.0.0/8"]}
    more = {"state_timeout": "250ms", "server": server}
    return start_module_proxy(config | more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STRANGE)
def test_no_impression_is_in_what_is_shared(
    proxy: Proxy, ads: AdServer, name: str, mode: str
) -> None:
    """A document of a paid upstream that is no ad to us, and may be one to a player, is sold."""
    sold = itertools.count(1)

    def sell(_: Received) -> Reply:
        ad = f"<AdSystem>S</AdSystem><Impression>https://t.example/{next(sold)}</Impression>"
        return Reply(f'<VAST version="3.0">{STRANGE[name].format(ad)}</VAST>'.encode())

    ads.replies[f"/{name}-{mode}"] = sell
    ann, bob = (proxy.get(f"/{name}-{mode}?uid={each}") for each in ("ann", "bob"))

    assert set() == set(impressions(ann.body)) & set(impressions(bob.body))


# --- Many at one time -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["here", "redis"])
async def test_crowd_makes_one_request(proxy: Proxy, ads: AdServer, name: str) -> None:
    """A thousand who miss the same at one time make one request, and all get the ad."""
    # For so long that all of them are there before it is answered.
    ads.replies[f"/{name}"] = replace(AN_AD, delay=1.5)
    async with Player(proxy.base) as player:
        answers = await player.ask_at_once(f"/{name}", CROWD)

    assert Counter({("house",): CROWD}) == Counter(tuple(each.ads) for each in answers)
    assert 1 == len(ads.seen(f"/{name}"))
    said = {each: told(proxy, name, each) for each in ("miss", "collapsed", "hit")}
    assert 1 == said["miss"]
    assert CROWD == sum(said.values())
    assert said["collapsed"] > CROWD / 2


def told(proxy: Proxy, name: str, result: str) -> float:
    """Say how often the cache of upstream *name* said *result*."""
    return metric(proxy, "vastproxy_cache_total", upstream=name, result=result)


@pytest.mark.parametrize(
    ("upstream", "leader", "ad"), [("starved", "/soon", []), ("raced", "/race", ["quick"])]
)
async def test_who_leads_may_go(
    proxy: Proxy, ads: AdServer, upstream: str, leader: str, ad: list[str]
) -> None:
    """
    Where the request for which all wait is cut off, one of them asks, and all get that ad.

    It had less time than they have, or another upstream was quicker for it.
    """
    first = iter([Reply(b"", delay=30)])
    ads.replies[f"/{upstream}"] = lambda _: next(first, AN_AD)
    ads.replies["/quick"] = Reply(a_document(an_ad("quick")))
    async with Player(proxy.base) as player, asyncio.TaskGroup() as group:
        leading = group.create_task(player.ask(leader))
        await asyncio.to_thread(wait_for, lambda: ads.seen(f"/{upstream}"))
        answers = await player.ask_at_once(f"/{upstream}", 50)

    assert ad == leading.result().ads
    assert [["house"]] * 50 == [each.ads for each in answers]
    assert 2 == len(ads.seen(f"/{upstream}"))


# --- Stale answers --------------------------------------------------------------------------------


def some_macros() -> Reply:
    """Build an ad whose media file and tracker are others in each answer."""
    ad = an_ad("stale").replace("a.mp4", "a.mp4?cb=[CACHEBUSTING]&amp;c=[CORRELATOR]")
    return Reply(a_document(ad.replace("t.example/stale", "t.example/[CACHEBUSTING]")))


async def test_stale_answers_stand_in(proxy: Proxy, ads: AdServer, gone: ExitStack) -> None:
    """
    While an upstream is dead, or not asked, stale answers come until their limit, and then none.

    Each has macros of its own.
    """
    ads.replies |= dict.fromkeys((f"/{each}" for each in OUTAGES), some_macros())
    first = {each: timed(proxy, each) for each in OUTAGES}
    ads.replies |= dict.fromkeys((f"/{each}" for each in OUTAGES), Reply(status=503))
    gone.close()
    later: dict[str, list[Timed]] = {each: [] for each in OUTAGES}
    ends = time.monotonic() + FRESH + STALE + 0.3
    while time.monotonic() < ends:
        for each in OUTAGES:
            later[each].append(timed(proxy, each))
        await asyncio.sleep(0.05)

    for name in OUTAGES:
        assert_in_time(first[name], later[name])
        assert_filled_anew([each.answer.body for each in later[name] if each.word != "none"])
        wait_for(lambda: has_stale_line(proxy, name))  # noqa: B023 - called at once


def assert_in_time(first: "Timed", later: Sequence["Timed"]) -> None:
    """Look whether answers *later* than the *first* are what they have to be at their time."""
    wanted = [each.word_wanted(first) for each in later]
    found = [each.word if word else "" for each, word in zip(later, wanted, strict=True)]

    assert {"hit", "stale", "none"} <= set(wanted)
    assert wanted == found


def assert_filled_anew(bodies: Sequence[bytes]) -> None:
    """Look whether the macros of each answer have values of their own, in both places."""
    media = {each.partition(b"a.mp4?")[2].partition(b"]")[0] for each in bodies}
    trackers = {each for body in bodies for each in impressions(body)}

    assert {len(bodies)} == {len(media), len(trackers)}
    assert not any(b"BUSTING]" in each or b"LATOR]" in each for each in bodies)


def has_stale_line(proxy: Proxy, name: str) -> bool:
    """Look whether the log says that an answer for *name* was stale, and why."""
    words, lines = f"{name}: stale (upstream failed: ", proxy.records(route=f"/{name}")
    caches = [(each.get("cache", [""])[0], each["flags"]) for each in lines]
    return any(cache.startswith(words) and "stale" in flags for cache, flags in caches)


@dataclass(frozen=True, slots=True)
class Timed:
    """An answer, and when it was asked for, and came."""

    answer: Answer
    asked: float
    came: float

    @property
    def word(self) -> str:
        """Whether it is fresh, stale, or without an ad."""
        if not impressions(self.answer.body):
            return "none"
        return "stale" if cache_status(self.answer)["ttl"].startswith("-") else "hit"

    def word_wanted(self, first: "Timed") -> str:
        """Say how it has to be, where *first* is what was kept; empty where it may be either."""
        if self.came < first.asked + FRESH:
            return "hit"
        if self.asked > first.came + FRESH and self.came < first.asked + FRESH + STALE:
            return "stale"
        return "none" if self.asked > first.came + FRESH + STALE else ""


def timed(proxy: Proxy, name: str) -> Timed:
    """Ask the route called *name*."""
    asked = time.monotonic()
    return Timed(proxy.get(f"/{name}"), asked, time.monotonic())


def test_stale_answer_is_renewed(proxy: Proxy, ads: AdServer) -> None:
    """An answer that is just too old is given at once, and the next one is new."""
    ads.replies["/renewed"] = Seller(delay=0.2)
    first = proxy.get("/renewed")
    time.sleep(FRESH)
    stale = proxy.get("/renewed")
    wait_for(lambda: 2 == len(ads.seen("/renewed")))
    wait_for(lambda: impressions(first.body) != impressions(proxy.get("/renewed").body))

    assert impressions(first.body) == impressions(stale.body)
    said = cache_status(stale)
    assert 0 > int(said.pop("ttl"))
    assert {"hit": "", "detail": "renewed"} == said
    assert 2 == len(ads.seen("/renewed"))


# --- Caps and money -------------------------------------------------------------------------------


async def test_hits_are_capped(proxy: Proxy, ads: AdServer) -> None:
    """A cap of three ends at three, though the ad server is asked once for everybody."""
    ads.replies["/capped"] = AN_AD
    async with Player(proxy.base) as player:
        crowd = await player.ask_at_once("/capped?uid=crowd", 20)
        ones = [await shown(player, "/capped?uid=one") for _ in range(CAP + 2)]

    assert CAP == sum(each.ads == ["house"] for each in crowd)
    assert [["house"]] * CAP + [[]] * 2 == [each.ads for each in ones]
    assert 1 == len(ads.seen("/capped"))
    assert CAP == viewer(proxy, "one")["caps"][0]["counted"]


async def shown(player: Player, target: str) -> Answered:
    """Ask for *target*, and show what comes."""
    answered = await player.ask(target)
    await player.fire(answered.beacons)
    return answered


async def test_hits_are_charged(proxy: Proxy, ads: AdServer) -> None:
    """What a viewer is given again of his own is paid for again, until the budget is spent."""
    ads.replies["/personal"] = Seller()
    async with Player(proxy.base) as player:
        answers = [await shown(player, f"/personal?uid={each}") for each in "aabaab"]

    one, two = ["personal-1"], ["personal-2"]
    assert [one, one, two, one, [], []] == [each.ads for each in answers]
    assert 2 == len(ads.seen("/personal"))
    assert 4 * PRICE == budget(proxy, "personal")["spent"]


# --- What is said, and what is kept ---------------------------------------------------------------


def test_cache_status(proxy: Proxy, ads: AdServer) -> None:
    """The header says whether the answer was kept, for how long it is fresh, and whose it is."""
    ads.replies["/bypass"] = AN_AD
    missed, hit = proxy.get("/bypass"), proxy.get("/bypass")
    passed_by = proxy.get("/bypass", [("Cookie", "session=1")])

    assert {"fwd": "uri-miss", "stored": "", "detail": "bypass"} == cache_status(missed)
    said = cache_status(hit)
    assert 50 < int(said.pop("ttl")) < 60
    assert {"hit": "", "detail": "bypass"} == said
    assert {"fwd": "bypass", "detail": "bypass"} == cache_status(passed_by)
    assert 2 == len(ads.seen("/bypass"))
    wait_for(lambda: 3 == len(proxy.records(event="request", route="/bypass")))
    lines = proxy.records(event="request", route="/bypass")
    assert [["bypass: miss, stored"], ["bypass: hit"], ["bypass: bypass (cookies)"]] == [
        each["cache"] for each in lines
    ]
    assert [1, 0, 1] == [each["hops"] for each in lines]
    assert ["cached" in each["flags"] for each in lines] == [False, True, False]


def test_cache_status_of_what_is_sold(proxy: Proxy, ads: AdServer) -> None:
    """An ad with a price is not stored, and for a while nobody waits there for others."""
    ads.replies["/priced"] = Seller(priced=True)
    one, two = proxy.get("/priced?uid=1"), proxy.get("/priced?uid=2")

    assert {"fwd": "uri-miss", "detail": "priced"} == cache_status(one)
    assert {"fwd": "miss", "detail": "priced"} == cache_status(two)
    assert (
        "priced: pass (paid)"
        == proxy.wait_record(event="request", route="/priced", cache=["priced: pass (paid)"])[
            "cache"
        ][0]
    )


def test_cache_status_of_two_upstreams(proxy: Proxy, ads: AdServer) -> None:
    """Each upstream that was asked has a member of its own, in their order."""
    ads.replies |= {"/empty-off": Reply(EMPTY_VAST), "/bypass": AN_AD}
    answer = proxy.get("/both")

    members = (answer.header("Cache-Status") or "").split(", ")
    assert ["empty-off", "bypass"] == [each.rpartition("; detail=")[2] for each in members]


@pytest.mark.parametrize("name", NO_ADS)
def test_no_ad_is_kept_for_a_moment(proxy: Proxy, ads: AdServer, name: str) -> None:
    """That there is no ad is kept for its own, shorter time."""
    ads.replies[f"/{name}"] = NO_ADS[name]
    missed = proxy.get(f"/{name}")
    ads.replies[f"/{name}"] = AN_AD
    hit = proxy.get(f"/{name}")
    wait_for(lambda: impressions(proxy.get(f"/{name}").body), within=5)

    assert {"fwd": "uri-miss", "stored": "", "detail": name} == cache_status(missed)
    assert {"hit": "", "ttl": "0", "detail": name} == cache_status(hit)
    assert [] == impressions(hit.body)
    assert 2 == len(ads.seen(f"/{name}"))


def test_no_ad_is_not_kept_where_that_is_off(proxy: Proxy, ads: AdServer) -> None:
    """Without a time for it, that there is no ad is asked each time."""
    ads.replies["/empty-off"] = Reply(EMPTY_VAST)
    answers = [proxy.get("/empty-off") for _ in range(2)]

    assert ["hit" in cache_status(each) for each in answers] == [False, False]
    assert 2 == len(ads.seen("/empty-off"))


@pytest.mark.parametrize("name", NOT_KEPT)
def test_not_kept(proxy: Proxy, ads: AdServer, name: str) -> None:
    """What sets cookies, says that it is for one, or varies with what is no key, is not kept."""
    ads.replies |= {f"/{name}": NOT_KEPT[name], "/moved-here": AN_AD}
    statuses = [
        (proxy.get(f"/{name}").header("Cache-Status") or "").split("; ")[1:2] for _ in range(3)
    ]

    assert 3 == len(ads.seen(f"/{name}"))
    assert ["hit"] not in statuses


def test_varying_answers(proxy: Proxy, ads: AdServer) -> None:
    """What varies with a header that is part of the key is kept for each of its values."""
    ads.replies["/varied"] = replace(AN_AD, headers=(("Vary", "Accept-Language"),))
    languages = ("de", "en", "de", "en", "")
    for each in languages:
        proxy.get("/varied", [("Accept-Language", each)] if each else [])

    assert ["de", "en", None] == [
        each.header("X-Device-Accept-Language") for each in ads.seen("/varied")
    ]


def test_answers_that_vary_with_the_device(proxy: Proxy, ads: AdServer) -> None:
    """What counts is what the ad server is told of the device, and not who speaks for it."""
    ads.replies["/device"] = lambda request: Reply(
        a_document(an_ad(f"for-{request.header('User-Agent')}")), headers=(("Vary", "User-Agent"),)
    )
    found = [
        impressions(proxy.get("/device", [("User-Agent", "S"), ("X-Device-User-Agent", each)]).body)
        for each in ("tv", "phone", "tv")
    ]

    tv, phone = (["https://t.example/for-tv"], ["https://t.example/for-phone"])
    assert [tv, phone, tv] == found
    assert 2 == len(ads.seen("/device"))
