"""The way of one ad request: who is asked, what is answered, and who is told of failures."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Any

import pytest
from lxml import etree
from structlog.testing import capture_logs

from tests.support.ad_server import AdServer as Upstreams
from tests.support.ad_server import Received, Reply
from tests.support.away_state import AwayState
from tests.support.hostile import a_wrapper, an_inline, wrapper_element
from vastproxy.config.template import Template
from vastproxy.config.units import Source
from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.reporter import ErrorReporter
from vastproxy.flow.routing import Route
from vastproxy.model import AdRequest, AdResponse, Device, FrozenMapping, Query
from vastproxy.observe.tasks import Tasks
from vastproxy.session.factory import SessionFactory
from vastproxy.state.base import Account, money
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.guard import Guard, GuardSettings
from vastproxy.upstream.upstream import Protection, UpstreamSettings, VastUpstream
from vastproxy.upstream.window import BreakerSettings
from vastproxy.vast.merge import MAX_GROWTH
from vastproxy.vast.unwrap import MAX_REPORTED, Policy

NOW = 1_800_000_000.0
LOOPBACK = EgressPolicy(allow=(ip_network("127.0.0.0/8"),))


@dataclass
class Stage:
    """An ad server of ours, and the servers that it asks."""

    ads: AdServer
    web: Upstreams
    client: AiohttpClient
    tasks: Tasks

    def route(
        self,
        *paths: str,
        timeout: float = 2.0,
        soft: float | None = None,
        guards: Mapping[str, GuardSettings] | None = None,
        **settings: Any,
    ) -> Route:
        """
        Build a route whose upstreams are named after the *paths* they are at.

        Each has the *soft* limit, and those that are named in *guards* are guarded.
        """
        guarded = guards or {}
        upstreams = [self.upstream(each, timeout, soft, guarded.get(each)) for each in paths]
        return Route("/ad", tuple(upstreams), **settings)

    def upstream(
        self,
        path: str,
        timeout: float = 2.0,
        soft: float | None = None,
        guard: GuardSettings | None = None,
    ) -> VastUpstream:
        """Build the upstream at *path*."""
        settings = UpstreamSettings(
            path,
            Template.parse(self.web.url(f"/{path}")),
            session_params=(),
            timeout=timeout,
            soft_timeout=soft,
        )
        protection = Protection.none(path)
        if guard is not None:
            protection = replace(protection, entry=Guard(path, guard))
        return VastUpstream(settings, self.client, lambda: NOW, protection)

    async def answer(self, route: Route, request: AdRequest | None = None) -> AdResponse:
        """Answer *request*, and wait for its reports."""
        response = await self.ads.answer(route, request or AdRequest("/ad", request_id="r1"))
        assert await self.tasks.wait_idle(5)
        return response

    def error(self, name: str) -> str:
        """Give an error URI called *name*."""
        return self.web.url(f"/error/{name}?c=[ERRORCODE]")

    @property
    def told(self) -> dict[str, list[str]]:
        """Give the codes that each error URI was told."""
        told: dict[str, list[str]] = {}
        for each in self.web.requests:
            if each.path.startswith("/error/"):
                told.setdefault(each.path.removeprefix("/error/"), []).append(each.query[2:])
        return told

    @property
    def asked(self) -> list[str]:
        """Give the paths of all ad requests, in order."""
        return [each.path for each in self.web.requests if not each.path.startswith("/error/")]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """Set the stage."""
    async with AsyncExitStack() as stack:
        web = await stack.enter_async_context(Upstreams())
        client = await stack.enter_async_context(AiohttpClient(LOOPBACK))
        tasks = await stack.enter_async_context(Tasks("reports"))
        factory = SessionFactory(is_public_suffix=lambda _: False, now=lambda: NOW)
        yield Stage(AdServer(factory, ErrorReporter(client, tasks)), web, client, tasks)


def ids(response: AdResponse) -> list[str]:
    """Give the ids of the ads of an answer."""
    return [each.get("id", "") for each in etree.fromstring(response.body).findall("{*}Ad")]


def root_errors(response: AdResponse) -> list[str]:
    """Give the texts of the root's errors."""
    return [each.text or "" for each in etree.fromstring(response.body).findall("{*}Error")]


def no_ad(*errors: str, version: str = "3.0") -> bytes:
    """Build a document without ads, and with *errors*."""
    texts = "".join(f"<Error><![CDATA[{each}]]></Error>" for each in errors)
    return f'<VAST version="{version}">{texts}</VAST>'.encode()


# --- The waterfall ----------------------------------------------------------------------------


async def test_first_upstream_with_an_ad_wins(stage: Stage) -> None:
    """Upstreams after the first that has an ad are not asked."""
    stage.web.replies |= {"/one": an_inline("ad1"), "/two": an_inline("ad2")}
    response = await stage.answer(stage.route("one", "two"))

    assert ["ad1"] == ids(response)
    assert ["/one"] == stage.asked
    assert ("one", 1, 1, ()) == (response.upstream, response.ads, response.hops, response.flags)
    assert "r1" == response.request_id
    assert ["hop1"] == [name for name, _ in response.timings]


@pytest.mark.parametrize(
    ("reply", "flag"),
    [
        (no_ad(), None),
        (Reply(status=204), "no_fill"),
        (Reply(status=500), "upstream_failed"),
        (b"nonsense", "bad_xml"),
        (b"<html/>", "bad_vast"),
        (b"<VideoAdServingTemplate/>", "old_vast"),
        (Reply(status=302), "wrapper_refused"),
    ],
)
async def test_next_upstream_is_asked(stage: Stage, reply: Reply | bytes, flag: str | None) -> None:
    """Where an upstream has no ad or fails, the next is asked, and the log has a word for it."""
    stage.web.replies |= {"/one": reply, "/two": an_inline("ad2")}
    response = await stage.answer(stage.route("one", "two"))

    assert ["ad2"] == ids(response)
    assert ("two", 2) == (response.upstream, response.hops)
    assert ("fallback", *((flag,) if flag else ())) == response.flags


async def test_nobody_has_an_ad(stage: Stage) -> None:
    """When nobody has an ad the answer is an empty document."""
    stage.web.replies |= {"/one": Reply(status=500), "/two": Reply(status=204)}
    response = await stage.answer(stage.route("one", "two"))

    assert [] == ids(response)
    assert b'<VAST version="3.0"/>' in response.body
    assert ("", 0) == (response.upstream, response.ads)
    assert ("no_ad", "fallback", "upstream_failed", "no_fill") == response.flags


async def test_sessions_of_a_request_share_their_cookies(stage: Stage) -> None:
    """What the first upstream sets goes to the second on the same host, with one correlator."""
    cookie = (("Set-Cookie", "uid=7; Path=/"),)
    stage.web.replies |= {"/one": Reply(no_ad(), headers=cookie), "/two": an_inline()}
    await stage.answer(stage.route("one", "two"))
    await stage.answer(stage.route("two"))

    assert [{}, {"uid": "7"}, {}] == [each.cookies for each in stage.web.requests]


async def test_deadline_ends_the_waterfall(stage: Stage) -> None:
    """When the deadline is spent nobody else is asked, and the answer comes in time."""
    stage.web.replies |= {"/one": Reply(b"", delay=30), "/two": an_inline()}
    clock = asyncio.get_running_loop().time
    began = clock()
    response = await stage.ads.answer(stage.route("one", "two", deadline=0.15), AdRequest("/ad"))

    assert [] == ids(response)
    assert ["/one"] == stage.asked
    assert 0.1 < clock() - began < 1.0
    assert ("no_ad", "upstream_failed") == response.flags


async def test_deadline_counts_from_the_arrival(stage: Stage) -> None:
    """A request that has waited too long already asks nobody."""
    late = AdRequest("/ad", received=asyncio.get_running_loop().time() - 10)
    response = await stage.answer(stage.route("one", deadline=2.5), late)

    assert [] == stage.asked
    assert ("no_ad",) == response.flags
    assert b'<VAST version="3.0"/>' in response.body


async def test_slow_upstream_leaves_time_for_the_next(stage: Stage) -> None:
    """An upstream that exceeds its own limit is left, and the next still has its time."""
    stage.web.replies |= {"/one": Reply(b"", delay=30), "/two": an_inline("ad2")}
    response = await stage.answer(stage.route("one", "two", timeout=0.1))

    assert ["ad2"] == ids(response)


async def test_limit_of_documents_is_for_the_whole_request(stage: Stage) -> None:
    """All upstreams of a route together may not ask for more documents than it allows."""
    stage.web.fallback = lambda each: a_wrapper(stage.web.url(f"{each.path}x"))
    policy = Policy(max_wrappers=10, max_fetches=4)
    await stage.answer(stage.route("one", "two", "three", policy=policy))

    assert len(stage.asked) <= 4


# --- Upstreams at one time ----------------------------------------------------------------------


async def hang(_: Received) -> bytes:
    """Answer nothing."""
    await asyncio.Event().wait()
    return b""


def own_tasks() -> set[asyncio.Task[Any]]:
    """Give the tasks that the proxy has left, but for its background."""
    return {each for each in asyncio.all_tasks() if "flow/selector" in repr(each)}


async def test_hanging_upstream_is_overtaken(stage: Stage) -> None:
    """Where one exceeds its soft limit the next one's ad is answered; the first is cut off."""
    stage.web.replies |= {"/one": hang, "/two": an_inline("ad2")}
    began = time.monotonic()
    response = await stage.answer(stage.route("one", "two", soft=0.1))

    assert 0.1 <= time.monotonic() - began < 0.4
    assert ["ad2"] == ids(response)
    assert ("one:late", "two:ad", "one:cancelled") == response.waterfall
    assert ("two", ("fallback", "soft_timeout")) == (response.upstream, response.flags)
    assert set() == own_tasks()


async def test_overtaken_upstream_may_win(stage: Stage) -> None:
    """Where the one that was overtaken has its ad first, that is answered; the next is cut off."""
    both_asked = asyncio.Event()

    async def second(request: Received) -> bytes:
        """Let the first one answer, and hang."""
        both_asked.set()
        return await hang(request)

    async def first(_: Received) -> bytes:
        """Answer when the second one is asked."""
        await both_asked.wait()
        return an_inline("ad1")

    stage.web.replies |= {"/one": first, "/two": second}
    response = await stage.answer(stage.route("one", "two", soft=0.05))

    assert ["ad1"] == ids(response)
    assert ("one:late", "one:ad", "two:cancelled") == response.waterfall
    assert set() == own_tasks()


async def test_chain_may_be_overtaken(stage: Stage) -> None:
    """The soft limit is for the whole chain: a quick wrapper to a slow ad is overtaken, too."""
    stage.web.replies |= {
        "/one": a_wrapper(stage.web.url("/end"), errors=[stage.error("w")]),
        "/end": hang,
        "/two": an_inline("ad2"),
    }
    response = await stage.answer(stage.route("one", "two", soft=0.1))

    assert ["ad2"] == ids(response)
    assert {} == stage.told


async def test_deadline_ends_all(stage: Stage) -> None:
    """When the deadline passes all end by themselves, and what failed is counted as failed."""
    stage.web.replies |= {"/one": hang, "/two": hang}
    response = await stage.answer(stage.route("one", "two", soft=0.05, deadline=0.3))

    assert [] == ids(response)
    assert "one:late" == response.waterfall[0]
    assert {"one:failed", "two:failed"} == set(response.waterfall[1:])
    assert set() == own_tasks()


async def test_player_hangs_up_while_two_are_asked(stage: Stage) -> None:
    """When the viewer goes, both go: nobody is asked for somebody who is not there."""
    stage.web.replies |= {"/one": hang, "/two": hang}
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(
            stage.ads.answer(stage.route("one", "two", soft=0.05), AdRequest("/ad"))
        )
        await stage.web.wait_seen("/two")
        asked.cancel()

    assert asked.cancelled()
    assert set() == own_tasks()


async def test_passthrough_is_overtaken_as_well(stage: Stage) -> None:
    """A route that passes documents through does not wait for one that hangs, either."""
    stage.web.replies |= {"/one": hang, "/two": an_inline("ad2")}
    response = await stage.answer(stage.route("one", "two", soft=0.05, mode="passthrough"))

    assert ["ad2"] == ids(response)
    assert ("one:late", "two:ad", "one:cancelled") == response.waterfall


# --- Upstreams that are not asked ---------------------------------------------------------------


async def test_open_breaker_is_passed_over(stage: Stage) -> None:
    """What opens a breaker is told; from then on the next one is asked, and nobody is told."""
    stage.web.replies |= {"/one": Reply(status=500), "/two": an_inline("ad2")}
    guard = GuardSettings(breaker=BreakerSettings(fail_max=1))
    route = stage.route("one", "two", guards={"one": guard})
    first, second = [await stage.answer(route) for _ in range(2)]

    assert [["ad2"], ["ad2"]] == [ids(each) for each in (first, second)]
    assert ["/one", "/two", "/two"] == stage.asked
    assert ("one:failed", "two:ad") == first.waterfall
    assert ("one:breaker", "two:ad") == second.waterfall
    assert [1, 0] == [len(each.breaker) for each in (first, second)]
    assert first.breaker[0].startswith("one closed->open: ")
    assert ("fallback", "breaker_open") == second.flags
    assert [2, 1] == [each.hops for each in (first, second)]
    assert {} == stage.told


@pytest.mark.parametrize("mode", ["resolve", "passthrough"])
async def test_one_upstream_that_is_not_asked(stage: Stage, mode: Any) -> None:
    """That the only upstream was not asked is told, too."""
    guard = GuardSettings(max_in_flight=0)
    route = stage.route("one", guards={"one": guard}, mode=mode)
    response = await stage.answer(route)

    assert ("one:busy",) == response.waterfall
    assert ("no_ad", "upstream_busy") == response.flags
    assert [] == stage.asked


async def test_plain_requests_have_no_waterfall(stage: Stage) -> None:
    """Where one upstream was asked and answered, or failed, the other fields say it all."""
    stage.web.replies |= {"/one": an_inline(), "/none": no_ad()}
    routes = [stage.route(each) for each in ("one", "none", "gone")]

    assert [(), (), ()] == [(await stage.answer(each)).waterfall for each in routes]


# --- The last resort ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["resolve", "passthrough"])
async def test_last_resort(stage: Stage, mode: Any) -> None:
    """Where nobody has an ad the route's own is answered, and failures are the proxy's to tell."""
    stage.web.replies |= {"/one": Reply(status=500), "/two": no_ad(stage.error("n"))}
    route = stage.route("one", "two", mode=mode, fallback=an_inline("own"))
    response = await stage.answer(route)

    assert ["own"] == ids(response)
    assert ("fallback", 1) == (response.upstream, response.ads)
    assert ("fallback", "last_resort", "upstream_failed") == response.flags
    assert {"n": ["303"]} == stage.told


async def test_last_resort_is_not_asked_for_without_need(stage: Stage) -> None:
    """Where an upstream has an ad the route's own is left alone."""
    stage.web.replies["/one"] = an_inline("ad1")
    response = await stage.answer(stage.route("one", fallback=an_inline("own")))

    assert ["ad1"] == ids(response)
    assert "last_resort" not in response.flags


async def test_last_resort_after_the_deadline(stage: Stage) -> None:
    """Where no time is left to ask anybody the route's own ad is answered."""
    late = AdRequest("/ad", received=asyncio.get_running_loop().time() - 10)
    response = await stage.answer(stage.route("one", fallback=an_inline("own")), late)

    assert ["own"] == ids(response)
    assert [] == stage.asked
    assert ("one:not_asked",) == response.waterfall


async def test_macros_of_the_last_resort(stage: Stage) -> None:
    """The macros of the route's own ad are filled as those of any answer."""
    own = with_macros("CORRELATOR TIMESTAMP DEVICEIP ASSETURI")
    request = AdRequest("/ad", query=Query("c=77"), device=Device(ip="192.0.2.1"))
    few = stage.route("one", fallback=own, correlator=Source.parse("query:c"))
    every = replace(few, fill_macros="all")
    tracker = filled(await stage.answer(few, request), "Impression")
    media = filled(await stage.answer(few, request), "MediaFile")
    told = filled(await stage.answer(every, request), "Impression")

    assert ("77", "[DEVICEIP]") == (tracker["CORRELATOR"], tracker["DEVICEIP"])
    assert ("77", "1800000000000") == (media["CORRELATOR"], media["TIMESTAMP"])
    assert ("192.0.2.1", "[ASSETURI]") == (told["DEVICEIP"], told["ASSETURI"])


# --- Who is told --------------------------------------------------------------------------------


async def test_answered_ad_is_the_players(stage: Stage) -> None:
    """Of an ad that is answered, all errors are the player's to call, and nobody is told."""
    stage.web.replies |= {
        "/one": a_wrapper(stage.web.url("/end"), errors=[stage.error("w")]),
        "/end": an_inline(errors=[stage.error("i")]),
    }
    response = await stage.answer(stage.route("one"))

    assert stage.error("w").encode() in response.body
    assert stage.error("i").encode() in response.body
    assert {} == stage.told


async def test_proxy_tells_of_a_dead_chain(stage: Stage) -> None:
    """A chain that gave nothing is told to its wrappers once, and not left to the player too."""
    stage.web.replies["/one"] = a_wrapper(stage.web.url("/gone"), errors=[stage.error("w")])
    response = await stage.answer(stage.route("one"))

    assert {"w": ["301"]} == stage.told
    assert [] == root_errors(response)
    assert ("no_ad", "upstream_failed") == response.flags


async def test_player_is_left_a_dead_chain(stage: Stage) -> None:
    """With the player reporting, the errors stand in the answer with their code; nobody is told."""
    stage.web.replies["/one"] = a_wrapper(stage.web.url("/gone"), errors=[stage.error("w")])
    response = await stage.answer(stage.route("one", error_reporting="player"))

    assert {} == stage.told
    assert [stage.web.url("/error/w?c=301")] == root_errors(response)


async def test_vast_2_has_no_place_for_errors(stage: Stage) -> None:
    """A dead chain of VAST 2 is told by the proxy, whatever the route says."""
    wrapper = a_wrapper(stage.web.url("/gone"), errors=[stage.error("w")])
    stage.web.replies["/one"] = wrapper.replace(b'version="3.0"', b'version="2.0"')
    response = await stage.answer(stage.route("one", error_reporting="player"))

    assert {"w": ["301"]} == stage.told
    assert [] == root_errors(response)


@pytest.mark.parametrize("reporting", ["proxy", "player"])
async def test_player_never_learns_of_the_first(stage: Stage, reporting: Any) -> None:
    """Where a later upstream has an ad, the dead chain before it is the proxy's to tell."""
    stage.web.replies |= {
        "/one": a_wrapper(stage.web.url("/gone"), errors=[stage.error("w")]),
        "/empty": no_ad(stage.error("n")),
        "/two": an_inline("ad2"),
    }
    response = await stage.answer(stage.route("one", "empty", "two", error_reporting=reporting))

    assert ["ad2"] == ids(response)
    assert {"w": ["301"], "n": ["303"]} == stage.told
    assert b"/error/" not in response.body


@pytest.mark.parametrize("reporting", ["proxy", "player"])
async def test_root_error_of_the_entry_is_passed_on(stage: Stage, reporting: Any) -> None:
    """An entry that was empty from the start is answered as it is: its errors are the player's."""
    stage.web.replies["/one"] = no_ad(stage.error("n"), version="4.2")
    response = await stage.answer(stage.route("one", error_reporting=reporting))

    assert [stage.error("n")] == root_errors(response)
    assert b'version="4.2"' in response.body
    assert {} == stage.told


async def test_root_errors_of_several_entries(stage: Stage) -> None:
    """The root errors of all empty entries stand in one answer."""
    stage.web.replies |= {"/one": no_ad(stage.error("n")), "/two": no_ad(stage.error("m"))}
    response = await stage.answer(stage.route("one", "two"))

    assert [stage.error("n"), stage.error("m")] == root_errors(response)
    assert {} == stage.told


async def test_report_carries_the_device(stage: Stage) -> None:
    """Error URIs are told with the headers of the device."""
    stage.web.replies["/one"] = a_wrapper(stage.web.url("/gone"), errors=[stage.error("w")])
    device = Device(ip="192.0.2.1", user_agent="TV")
    await stage.answer(stage.route("one"), AdRequest("/ad", device=device))
    (ping,) = stage.web.seen("/error/w")

    assert ("TV", "192.0.2.1") == (ping.header("User-Agent"), ping.header("X-Device-IP"))


def a_monster(stage: Stage, *, ads: int, errors: int) -> None:
    """Answer with a pod of *ads*, each with *errors* of its own, and a wrapper that is too big."""
    inside = [
        "".join(f"<Error>{stage.error(f'{ad}-{number}')}</Error>" for number in range(errors))
        for ad in range(ads)
    ]
    pod = "".join(
        f'<Ad sequence="{at}"><InLine>{each}<Creatives/></InLine></Ad>'
        for at, each in enumerate(inside, start=1)
    )
    huge = f"<Extensions><Extension>{'x' * (MAX_GROWTH // (ads - 1))}</Extension></Extensions>"
    stage.web.replies |= {
        "/one": a_wrapper(
            stage.web.url("/pod"),
            errors=[stage.error("w")],
            attributes='allowMultipleAds="true"',
            extra=huge,
        ).replace(b"<Ad>", f"<Error>{stage.error('r')}</Error><Ad>".encode(), 1),
        "/pod": f'<VAST version="3.0"><Error>{stage.error("s")}</Error>{pod}</VAST>'.encode(),
    }


async def test_answer_that_would_grow_too_large(stage: Stage) -> None:
    """Ads that cannot be merged are no ads: all on their paths are told 300, each once."""
    a_monster(stage, ads=12, errors=2)
    response = await stage.answer(stage.route("one"))

    assert [] == ids(response)
    assert len(response.body) < 1000
    assert ("no_ad", "wrapper_refused") == response.flags
    own = {f"{ad}-{number}" for ad in range(12) for number in range(2)}
    assert {"r", "w", "s", *own} == set(stage.told)
    assert {("300",)} == {tuple(each) for each in stage.told.values()}


async def test_next_upstream_is_asked_for_what_cannot_be_merged(stage: Stage) -> None:
    """Ads that cannot be merged are followed by the next upstream's, as if there were none."""
    a_monster(stage, ads=12, errors=1)
    stage.web.replies["/two"] = an_inline("second")
    response = await stage.answer(stage.route("one", "two"))

    assert ["second"] == ids(response)
    assert ("two", 1) == (response.upstream, response.ads)
    assert ["300"] == stage.told["w"]


async def test_bound_of_reports_is_for_the_whole_request(stage: Stage) -> None:
    """Two upstreams that fail are told no more together than one would be."""
    errors = [stage.error(f"e{number}") for number in range(MAX_REPORTED - 50)]
    for name in ("one", "two"):
        stage.web.replies[f"/{name}"] = a_wrapper(stage.web.url("/gone"), errors=errors)
    with capture_logs() as logs:
        await stage.answer(stage.route("one", "two"))

    assert MAX_REPORTED == sum(map(len, stage.told.values()))
    assert [MAX_REPORTED - 100] == [each["dropped"] for each in logs if "dropped" in each]


async def test_few_are_told_of_ads_that_are_given_up(stage: Stage) -> None:
    """However many errors they have, no more are told than for any other failure."""
    a_monster(stage, ads=12, errors=MAX_REPORTED // 10)
    with capture_logs() as logs:
        await stage.answer(stage.route("one"))

    assert MAX_REPORTED == sum(map(len, stage.told.values()))
    assert "w" in stage.told
    assert [("report.dropped", 12 * MAX_REPORTED // 10 + 3 - MAX_REPORTED)] == [
        (each["event"], each["dropped"]) for each in logs if "dropped" in each
    ]


async def test_giving_up_a_wide_pod_is_quick(stage: Stage) -> None:
    """A wrapper's thousands of errors are read once, however many ads are behind it."""
    error = f"<Error>{stage.error('w')}</Error>"
    pod = "".join(f'<Ad sequence="{n}"><InLine><Creatives/></InLine></Ad>' for n in range(1, 1001))
    stage.web.replies |= {
        "/one": a_wrapper(
            stage.web.url("/pod"), attributes='allowMultipleAds="true"', extra=error * 7_000
        ),
        "/pod": f'<VAST version="3.0">{pod}</VAST>'.encode(),
    }
    began = time.process_time()
    response = await stage.answer(stage.route("one"))

    assert [] == ids(response)
    assert {"w": ["300"]} == stage.told
    assert 1.5 > time.process_time() - began


# --- What is answered ---------------------------------------------------------------------------


def with_macros(names: str) -> bytes:
    """Build a document whose media file and impression have the macros called *names*."""
    macros = "&".join(f"{each}=[{each}]" for each in names.split())
    found = an_inline().replace(b"/impression/ad", f"/impression/ad?{macros}".encode())
    return found.replace(b"/ad.mp4", f"/ad.mp4?{macros}".encode())


def filled(response: AdResponse, element: str) -> dict[str, str]:
    """Give the macros of *element* in the answer as they were filled."""
    text = etree.fromstring(response.body).findtext(f".//{{*}}{element}") or ""
    return dict(re.findall(r"[?&](\w+)=([^&]*)", text))


async def test_standard_macros(stage: Stage) -> None:
    """Trackers get what stands for the whole request; media files what no player fills there."""
    stage.web.replies["/one"] = with_macros("CORRELATOR TRANSACTIONID TIMESTAMP DEVICEIP ASSETURI")
    request = AdRequest("/ad", query=Query("c=77"), device=Device(ip="192.0.2.1"), request_id="r1")
    route = stage.route("one", correlator=Source.parse("query:c"))
    response = await stage.answer(route, request)
    tracker, media = filled(response, "Impression"), filled(response, "MediaFile")

    assert ("77", "[TIMESTAMP]", "[DEVICEIP]", "[ASSETURI]") == (
        tracker["CORRELATOR"],
        tracker["TIMESTAMP"],
        tracker["DEVICEIP"],
        tracker["ASSETURI"],
    )
    assert tracker["TRANSACTIONID"] == str(uuid.UUID(tracker["TRANSACTIONID"]))
    assert ("77", "1800000000000") == (media["CORRELATOR"], media["TIMESTAMP"])
    assert tracker["TRANSACTIONID"] == media["TRANSACTIONID"]


async def test_all_macros(stage: Stage) -> None:
    """Asked to fill all, the proxy fills what it knows everywhere, and leaves the player's rest."""
    stage.web.replies["/one"] = with_macros("TIMESTAMP CACHEBUSTING DEVICEIP DEVICEUA ASSETURI IFA")
    request = AdRequest("/ad", device=Device(ip="192.0.2.1", user_agent="TV 1"))
    response = await stage.answer(stage.route("one", fill_macros="all"), request)
    tracker = filled(response, "Impression")

    assert ("1800000000000", "192.0.2.1", "TV%201") == (
        tracker["TIMESTAMP"],
        tracker["DEVICEIP"],
        tracker["DEVICEUA"],
    )
    assert re.fullmatch(r"\d{8}", tracker["CACHEBUSTING"])
    assert ("[ASSETURI]", "[IFA]") == (tracker["ASSETURI"], tracker["IFA"])


@pytest.mark.parametrize("agent", ["[CORRELATOR]", "]]></Impression><x>", "&amp;<", "\x01"])
async def test_value_cannot_break_the_answer(stage: Stage, agent: str) -> None:
    """What a device says of itself is a value in the answer, whatever it is."""
    stage.web.replies["/one"] = with_macros("DEVICEUA")
    request = AdRequest("/ad", device=Device(user_agent=agent))
    response = await stage.answer(stage.route("one", fill_macros="all"), request)

    assert ["ad"] == ids(response)
    assert re.fullmatch(r"[\w%.!~*'()-]+", filled(response, "Impression")["DEVICEUA"])


async def test_players_correlator_and_cookies(stage: Stage) -> None:
    """Correlator and cookies that the route names go on; other cookies do not."""
    stage.web.replies["/one"] = an_inline()
    headers = FrozenMapping({"cookie": "uid=me; secret=1", "x-cor": "77"})
    route = replace(
        stage.route("one", correlator=Source.parse("header:X-Cor"), forward_cookies=("uid",)),
        upstreams=(
            VastUpstream(
                UpstreamSettings("one", Template.parse(stage.web.url("/one"))),
                stage.client,
                lambda: NOW,
            ),
        ),
    )
    await stage.answer(route, AdRequest("/ad", headers=headers))

    assert {"uid": "me"} == stage.web.requests[0].cookies
    assert "correlator=77&timestamp=1800000000000" == stage.web.requests[0].query


async def test_players_cookies_stay_here(stage: Stage) -> None:
    """Without a list no cookie of the player goes on."""
    stage.web.replies["/one"] = an_inline()
    await stage.answer(
        stage.route("one"), AdRequest("/ad", headers=FrozenMapping({"cookie": "uid=me"}))
    )

    assert stage.web.requests[0].header("Cookie") is None


# --- Passthrough --------------------------------------------------------------------------------


@pytest.fixture
def through(stage: Stage) -> Callable[..., Route]:
    """Give a function that makes passthrough routes."""
    return lambda *paths, **more: stage.route(*paths, mode="passthrough", **more)


async def test_document_is_passed_through(stage: Stage, through: Callable[..., Route]) -> None:
    """The upstream's bytes are the answer, but for macros; its wrappers are not followed."""
    body = b"<!-- a -->\n<VAST  version='3.0' x=\"[Y]\"><Ad><Wrapper><AdSystem/>"
    body += b"<VASTAdTagURI> http://b.example/?c=[CORRELATOR]&amp;i=[IFA] </VASTAdTagURI>"
    body += b"<Impression>http://i.example/?[TIMESTAMP]</Impression></Wrapper></Ad></VAST>"
    stage.web.replies["/one"] = body
    request = AdRequest("/ad", query=Query("c=77"))
    response = await stage.answer(through("one", correlator=Source.parse("query:c")), request)

    assert body.replace(b"[CORRELATOR]", b"77") == response.body
    assert ("one", 1, 1) == (response.upstream, response.ads, response.hops)


async def test_passthrough_goes_on_to_the_next(stage: Stage, through: Callable[..., Route]) -> None:
    """Upstreams that fail or have no ad are passed over, and the empty one is told."""
    stage.web.replies |= {
        "/one": Reply(status=500),
        "/empty": no_ad(stage.error("n")),
        "/two": an_inline("ad2"),
    }
    response = await stage.answer(through("one", "empty", "two"))

    assert ["ad2"] == ids(response)
    assert {"n": ["303"]} == stage.told
    assert ("fallback", "upstream_failed") == response.flags


async def test_passthrough_without_an_ad(stage: Stage, through: Callable[..., Route]) -> None:
    """Where nobody has an ad the answer is empty, with the errors that are the player's."""
    stage.web.replies |= {"/one": Reply(status=500), "/empty": no_ad(stage.error("n"))}
    response = await stage.answer(through("one", "empty"))

    assert [stage.error("n")] == root_errors(response)
    assert {} == stage.told
    assert ("no_ad", "fallback", "upstream_failed") == response.flags


async def test_passthrough_mends_what_is_broken(
    stage: Stage, through: Callable[..., Route]
) -> None:
    """A document that had to be mended is passed through mended."""
    stage.web.replies["/one"] = b"\n " + an_inline().replace(b"/ad.mp4", b"/ad.mp4") + b"\x00"
    response = await stage.answer(through("one"))

    assert ["ad"] == ids(response)


# --- Explained ----------------------------------------------------------------------------------


async def test_explaining_tells_all_and_reports_nothing(stage: Stage) -> None:
    """Explaining gives the answer, its hops and what was merged; no error URI is told."""
    stage.web.replies |= {
        "/one": a_wrapper(stage.web.url("/gone"), errors=[stage.error("w")]),
        "/two": a_wrapper(stage.web.url("/end"), errors=[stage.error("v")]),
        "/end": an_inline("last"),
    }
    told = await stage.ads.explain(stage.route("one", "two"), AdRequest("/ad"))
    assert await stage.tasks.wait_idle(5)

    assert [1, 2, 3, 4] == [each.number for each in told.hops]
    assert [301] == [report.code for _, report in told.outcome.reports]
    assert [1] == [len(each) for each in told.outcome.notes]
    assert 1 == told.outcome.notes[0][0].taken["Error"]
    assert b'"last"' in told.body
    assert {} == stage.told


async def test_explaining_tells_the_waterfall(stage: Stage) -> None:
    """Explaining gives what became of each upstream, why, and what its breaker did."""
    stage.web.replies |= {"/one": Reply(status=500), "/two": an_inline()}
    guard = GuardSettings(breaker=BreakerSettings(fail_max=1))
    route = stage.route("one", "two", guards={"one": guard})
    first, second = [await stage.ads.explain(route, AdRequest("/ad")) for _ in range(2)]

    assert [("one", "failed", "HTTP status 500"), ("two", "ad", "")] == [
        (each.upstream, each.what, each.detail) for each in first.choices
    ]
    assert [("one", "closed", "open")] == [
        (each.breaker, each.old, each.new) for each in first.changes
    ]
    assert "breaker" == second.choices[0].what
    assert () == second.changes
    assert 0 < first.choices[0].milliseconds < first.choices[1].milliseconds


async def test_explaining_a_document_at_hand(stage: Stage) -> None:
    """With a document at hand the chain starts there."""
    stage.web.replies["/end"] = an_inline("last")
    document = f"<VAST><Ad>{wrapper_element(stage.web.url('/end'))}</Ad></VAST>".encode()
    told = await stage.ads.explain(stage.route("one"), AdRequest("/ad"), document)

    assert ["/end"] == stage.asked
    assert b'"last"' in told.body


async def test_repr_tells_of_the_reports(stage: Stage) -> None:
    """An ad server says how its reports fare."""
    assert repr(stage.ads) == (
        "<AdServer <ErrorReporter sent: 0, failed: 0, dropped: 0, waiting: 0>>"
    )


# --- For the library ------------------------------------------------------------------------------


@dataclass
class Shop:
    """An ad server of the library, its state, and the servers that it asks."""

    ads: AdServer
    state: AwayState
    web: Upstreams

    async def serve(self, user: str = "me", limit: Any = 1000.0, **more: Any) -> str | None:
        """Serve an ad as code does that uses the library."""
        return await self.ads.serve_ad(
            user_id=user, device_id="tv", campaign_id="spring", budget_limit=limit, **more
        )

    async def standing(self) -> tuple[int, int]:
        """Give what the campaign has spent, and what is reserved of it, in micro-units."""
        [level] = await self.state.levels(Account("campaign", "spring"), [money(0)])
        return level.counted, level.reserved


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    """Open a shop with two upstreams; both have a wrapper, and an ad behind it."""
    async with AsyncExitStack() as stack:
        web = await stack.enter_async_context(Upstreams())
        for name in ("one", "two"):
            web.replies |= {
                f"/{name}": a_wrapper(web.url(f"/{name}-end")),
                f"/{name}-end": an_inline(f"{name}-ad"),
            }
        one, two = [
            await stack.enter_async_context(
                VastUpstream.open(web.url(f"/{each}"), name=each, egress_allow=["127.0.0.0/8"])
            )
            for each in ("one", "two")
        ]
        state = AwayState()
        ads = await stack.enter_async_context(
            AdServer(primary_upstream=one, fallback_upstream=two, state_backend=state)
        )
        yield Shop(ads, state, web)


async def test_library_gets_the_resolved_document(shop: Shop) -> None:
    """What code is given is one document of InLine ads; the entry is sent who asks."""
    ad = await shop.serve()
    entry, end = shop.web.requests

    assert ad is not None
    assert "<InLine>" in ad
    assert "<Wrapper>" not in ad
    assert 'id="one-ad"' in ad
    assert {"uid": "me", "device_id": "tv"} == entry.cookies
    assert end.path == "/one-end"


@pytest.mark.parametrize(
    "broken", [{"/one": Reply(status=500)}, {"/one": b"<VAST/>"}, {"/one-end": Reply(status=404)}]
)
async def test_library_falls_back(shop: Shop, broken: dict[str, Reply | bytes]) -> None:
    """Where the primary upstream, or the chain behind it, gives no ad, the fallback is asked."""
    shop.web.replies |= broken
    ad = await shop.serve()

    assert ad is not None
    assert 'id="two-ad"' in ad


async def test_library_counts_what_it_serves(shop: Shop) -> None:
    """Three ads for a viewer are the default; each costs its price, and is counted at once."""
    ads = [await shop.serve(price="0.0025") for _ in range(4)]

    assert [True, True, True, False] == [each is not None for each in ads]
    assert (7500, 0) == await shop.standing()
    assert await shop.serve("you") is not None


async def test_crowd_of_the_library_passes_no_limit(shop: Shop) -> None:
    """Of fifty that ask at the same time, caps and budgets let through as many as they say."""
    async with asyncio.TaskGroup() as group:
        capped = [group.create_task(shop.serve("me", frequency_cap=3)) for _ in range(50)]
    async with asyncio.TaskGroup() as group:
        work = [shop.serve(f"u{at}", 10, price="2.5") for at in range(50)]
        paid = [group.create_task(each) for each in work]

    assert 3 == sum(each.result() is not None for each in capped)
    assert 4 == sum(each.result() is not None for each in paid)
    assert (10_000_000, 0) == await shop.standing()


async def test_no_ad_of_the_library_counts_nothing(shop: Shop) -> None:
    """Where nobody has an ad there is none, and neither place nor money is taken."""
    shop.web.replies |= {"/one": b"<VAST/>", "/two": Reply(status=500)}
    assert await shop.serve(limit=1, frequency_cap=1, price=1) is None
    shop.web.replies["/two"] = an_inline()

    assert await shop.serve(limit=1, frequency_cap=1, price=1) is not None
    assert (1_000_000, 0) == await shop.standing()


async def test_price_of_the_ad_goes_first(shop: Shop) -> None:
    """An ad that says what a thousand of it cost is charged a thousandth, whatever the price."""
    pricing = b'<Pricing model="CPM" currency="USD">5.00</Pricing></InLine>'
    shop.web.replies["/one-end"] = an_inline().replace(b"</InLine>", pricing)
    await shop.serve(price=2)

    assert (5000, 0) == await shop.standing()


async def test_library_and_sessions_share_the_cap(shop: Shop) -> None:
    """An ad that a session counted takes a place from the ad server's cap, and the reverse."""
    factory = SessionFactory(state_backend=shop.state)
    upstream = shop.ads._embedded.upstreams[0] if shop.ads._embedded else None
    assert upstream is not None
    async with factory.session_of(factory.context(), upstream) as session:
        await session.check_frequency_cap("me", 2)
        await session.request()

    assert [True, False] == [await shop.serve(frequency_cap=2) is not None for _ in range(2)]


async def test_cap_of_none_and_budget_that_is_spent(shop: Shop) -> None:
    """A cap of 0 serves nothing, as does a budget that is spent, and nobody is asked."""
    await shop.state.add_spend("budget:spring", 5)
    with capture_logs() as logs:
        assert await shop.serve(frequency_cap=0) is None
        assert await shop.serve(limit=5) is None

    assert [] == shop.web.requests
    told = [each for each in logs if each["event"] == "ad.not_served"]
    assert ["capped", "over_budget"] == [each["flags"][-1] for each in told]
    assert {"spring"} == {each["campaign"] for each in told}


async def test_library_serves_without_the_state(shop: Shop) -> None:
    """While the state is away ads are served; what they cost is counted when it is back."""
    shop.state.away |= {"reserve", "confirm", "levels", "ping"}
    with capture_logs() as logs:
        assert await shop.serve(price=1) is not None
        shop.state.away.clear()
        await shop.ads.close()

    assert "state.away" in {each["event"] for each in logs}
    assert (1_000_000, 0) == await shop.standing()


async def test_library_tells_what_it_could_not_count(shop: Shop) -> None:
    """Closed while the state is away, the ad server says how much of it was never counted."""
    shop.state.away |= {"reserve", "confirm", "levels", "ping"}
    assert await shop.serve(price=1) is not None
    with capture_logs() as logs:
        await shop.ads.close()

    # The place under the cap, and the money.
    assert [2] == [each["waiting"] for each in logs if each["event"] == "ad.not_counted"]


@pytest.mark.parametrize("amounts", [{"limit": -1}, {"price": -1}, {"price": "x"}])
async def test_library_refuses_nonsense(shop: Shop, amounts: dict[str, Any]) -> None:
    """What is no amount is the caller's mistake, and no reason to serve for nothing."""
    with pytest.raises(ValueError, match=r"money|less than nothing"):
        await shop.serve(**amounts)


async def test_library_takes_the_last_place_once(shop: Shop) -> None:
    """An upstream that hangs does not keep the next one from the last place, or the last money."""
    shop.web.replies["/one-end"] = hang
    assert shop.ads._embedded is not None
    one, _ = shop.ads._embedded.upstreams
    one.settings = replace(one.settings, soft_timeout=0.05)
    served = [await shop.serve(limit=1, frequency_cap=1, price=1) for _ in range(2)]

    assert [True, False] == [each is not None for each in served]
    assert 'id="two-ad"' in (served[0] or "")
    assert (1_000_000, 0) == await shop.standing()
    assert set() == own_tasks()


async def test_library_counts_failures(shop: Shop) -> None:
    """How often upstreams failed for a campaign is in the state when the ad server is closed."""
    shop.web.replies["/one"] = Reply(status=500)
    for _ in range(3):
        await shop.serve()
    await shop.ads.close()

    assert 3 == await shop.state.get_count("errors:spring")


async def test_library_reports_dead_chains(shop: Shop) -> None:
    """The errors of a chain that gave nothing are told, and closing waits for that."""
    error = shop.web.url("/error?c=[ERRORCODE]")
    shop.web.replies["/one"] = a_wrapper(shop.web.url("/gone"), errors=[error])
    await shop.serve()
    await shop.ads.close()

    assert ["c=301"] == [each.query for each in shop.web.seen("/error")]


async def test_state_in_memory_is_the_default() -> None:
    """Without a state the ad server counts by itself; without a fallback there is none."""
    async with Upstreams(fallback=an_inline()) as web, VastUpstream.open(web.url("/")) as upstream:
        ads = AdServer(primary_upstream=upstream)
        served = [await ads.serve_ad("me", "tv", "spring", 1, 2) for _ in range(3)]
        await ads.close()

    assert [True, True, False] == [each is not None for each in served]


async def test_ad_server_of_routes_serves_no_single_ads(stage: Stage) -> None:
    """An ad server without upstreams of its own answers routes only, and says so."""
    with pytest.raises(RuntimeError, match="make one with primary_upstream"):
        await stage.ads.serve_ad("me", "tv", "spring", 1)
    with pytest.raises(TypeError, match="needs primary_upstream"):
        AdServer()
    await stage.ads.close()
