"""Chains driven by real requests: at the same time, in time, and told hop by hop."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from tests.support.ad_server import AdServer, Received, Reply
from tests.support.hostile import a_wrapper, an_inline, wrapper_element
from vastproxy.config.template import Template
from vastproxy.errors import (
    NoAdError,
    StateBackendError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamStatusError,
    VastError,
    VastSyntaxError,
)
from vastproxy.model import AdRequest, HopReply
from vastproxy.observe.tasks import Tasks
from vastproxy.observe.trace import Hop, Trace
from vastproxy.session.cookies import CookieJar
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import Request, VastSession
from vastproxy.upstream.answers import AnswerCache, CacheSettings
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.guard import Guard, GuardSettings
from vastproxy.upstream.resolver import (
    MAX_JUDGED,
    MAX_SIZE,
    PARSE_APART,
    Resolution,
    VastChainResolver,
    read,
    refused_by,
)
from vastproxy.upstream.upstream import Protection, UpstreamSettings, VastUpstream
from vastproxy.upstream.window import BreakerSettings
from vastproxy.vast.document import VastDocument
from vastproxy.vast.unwrap import Policy, ResolvedAd

LOOPBACK = EgressPolicy(allow=(ip_network("127.0.0.0/8"),))


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run an ad server that has nothing unless it is told to."""
    async with AdServer() as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[AiohttpClient]:
    """Open a client that may reach loopback."""
    async with AiohttpClient(LOOPBACK) as opened:
        yield opened


def a_session(
    client: AiohttpClient,
    server: AdServer,
    *,
    path: str = "/entry",
    within: float = 5.0,
    timeout: float = 2.0,
    detailed: bool = False,
) -> VastSession:
    """Open a session at the upstream behind *path*."""
    url = server.url(path)
    settings = UpstreamSettings("main", Template(url, (url,)), session_params=(), timeout=timeout)
    factory = SessionFactory(is_public_suffix=lambda _: False)
    deadline = asyncio.get_running_loop().time() + within
    return factory.open_session(
        factory.context(),
        VastUpstream(settings, client, lambda: 0.0),
        request=Request(AdRequest("/"), deadline=deadline),
        trace=Trace(detailed=detailed),
    )


def a_pod(*urls: str) -> bytes:
    """Build a pod of wrappers that lead to *urls*."""
    ads = (
        f'<Ad id="slot{number}" sequence="{number}">{wrapper_element(url)}</Ad>'
        for number, url in enumerate(urls, start=1)
    )
    return f'<VAST version="3.0">{"".join(ads)}</VAST>'.encode()


def ids(resolution: Resolution) -> list[str]:
    """Give the ids of the ads that came."""
    assert resolution.unwrapped is not None
    return [ad.inline.id for ad in resolution.unwrapped.ads]


def places(session: VastSession) -> list[tuple[int, int | None, int]]:
    """Give number, parent and depth of each hop."""
    return [(hop.number, hop.parent, hop.depth) for hop in session.trace.ordered()]


def hop(session: VastSession, number: int) -> Hop:
    """Give the hop *number*."""
    return session.trace.ordered()[number - 1]


async def test_chain_is_followed(server: AdServer, client: AiohttpClient) -> None:
    """A chain of wrappers is followed to its InLine, relative addresses too."""
    server.replies |= {
        "/entry": a_wrapper(server.url("/a/one")),
        "/a/one": a_wrapper("two?x=[Y]"),
        "/a/two": an_inline("last"),
    }
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session)

    assert resolution.has_ads
    assert ["last"] == ids(resolution)
    assert [(1, None, 0), (2, 1, 1), (3, 2, 2)] == places(session)
    assert ["GET /a/two?x=[Y] HTTP/1.1"] == [each.line.decode() for each in server.seen("/a/two")]


async def test_chains_of_a_pod_run_at_the_same_time(
    server: AdServer, client: AiohttpClient
) -> None:
    """An ad server that answers the first of a pod only after the second is no obstacle."""

    async def after_the_second(_: Received) -> bytes:
        """Wait until the other chain is at its end."""
        await server.wait_seen("/two-end")
        return an_inline("one")

    server.replies |= {
        "/entry": a_pod(server.url("/one"), server.url("/two")),
        "/one": after_the_second,
        "/two": a_wrapper(server.url("/two-end")),
        "/two-end": an_inline("two"),
    }
    resolution = await VastChainResolver().resolve(a_session(client, server))

    assert ["one", "two"] == ids(resolution)


async def test_hops_know_their_parents(server: AdServer, client: AiohttpClient) -> None:
    """In a tree each hop names the hop whose wrapper led to it, numbered as they began."""
    server.replies |= {
        "/entry": a_pod(server.url("/one"), server.url("/two")),
        "/one": a_wrapper(server.url("/one-end")),
        "/one-end": an_inline("one"),
        "/two": an_inline("two"),
    }
    session = a_session(client, server)
    await VastChainResolver().resolve(session)
    paths = {each.url.removeprefix(server.url()): each for each in session.trace.hops}

    assert [1, 2, 3, 4] == [each.number for each in session.trace.ordered()]
    assert {"/entry": None, "/one": 1, "/two": 1, "/one-end": paths["/one"].number} == {
        path: each.parent for path, each in paths.items()
    }
    assert {"/entry": 0, "/one": 1, "/two": 1, "/one-end": 2} == {
        path: each.depth for path, each in paths.items()
    }


async def test_hop_tells_what_came(server: AdServer, client: AiohttpClient) -> None:
    """Told in detail, a hop has its URL as it was written, its requests, and its ads."""
    macro = server.url("/moved?c=[CORRELATOR]")
    server.replies |= {
        "/entry": a_wrapper(macro),
        "/moved": Reply(status=302, headers=(("Location", "/end"),)),
        "/end": an_inline("last"),
    }
    session = a_session(client, server, detailed=True)
    await VastChainResolver().resolve(session)
    first, second = hop(session, 1), hop(session, 2)

    assert ("main", "3.0", "Wrapper", None) == (
        first.upstream,
        first.version,
        first.ads[0].kind,
        first.code,
    )
    assert macro == second.url
    assert server.url(f"/moved?c={session.context.correlator}") == second.exchanges[0].url
    assert [302, 200] == [each.status for each in second.exchanges]
    assert [("last", "hostile", "InLine", None)] == [
        (each.id, each.system, each.kind, each.sequence) for each in second.ads
    ]
    assert 0 < second.milliseconds


@pytest.mark.parametrize(
    ("reply", "code", "problem"),
    [
        (Reply(status=204), 303, "HTTP status 204"),
        (Reply(status=205), 303, "HTTP status 205"),
        (Reply(status=404), 301, "HTTP status 404"),
        (Reply(b"", status=503), 301, "HTTP status 503"),
        (Reply(b""), 100, ""),
        (Reply(b"{}"), 100, ""),
        (Reply(b"<html/>"), 101, ""),
        (Reply(b"<VideoAdServingTemplate/>"), 102, ""),
        (Reply(status=302), 300, "redirect"),
    ],
)
async def test_entry_fails(
    server: AdServer, client: AiohttpClient, reply: Reply, code: int, problem: str
) -> None:
    """An entry that gives no document is told with its code, in the result and in the trace."""
    server.replies["/entry"] = reply
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session)

    assert (None, code) == (resolution.unwrapped, resolution.code)
    assert not resolution.has_ads
    assert problem in resolution.problem
    assert (code, resolution.problem) == (hop(session, 1).code, hop(session, 1).problem)


async def test_hop_fails(server: AdServer, client: AiohttpClient) -> None:
    """A hop that fails is a report with its code; the document above it stays."""
    server.replies["/entry"] = a_wrapper(server.url("/gone"), errors=["http://e.example/"])
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session)

    assert [] == ids(resolution)
    assert not resolution.has_ads
    assert resolution.unwrapped is not None
    assert [(301, ("http://e.example/",))] == [
        (each.code, each.uris) for each in resolution.unwrapped.reports
    ]
    assert 301 == hop(session, 2).code


async def test_empty_document_is_no_failure(server: AdServer, client: AiohttpClient) -> None:
    """An entry without ads is a document, and has none."""
    server.replies["/entry"] = b'<VAST version="3.0"/>'
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session)

    assert [] == ids(resolution)
    assert resolution.code is None
    assert hop(session, 1).code is None


async def test_late_chain_does_not_keep_the_others(server: AdServer, client: AiohttpClient) -> None:
    """When the deadline passes, the ads that have come so far are the answer."""
    server.replies |= {
        "/entry": a_pod(server.url("/late"), server.url("/two")),
        "/late": Reply(an_inline("late"), delay=30),
        "/two": an_inline("two"),
    }
    session = a_session(client, server, within=0.4, timeout=10)
    resolution = await VastChainResolver().resolve(session)

    assert ["two"] == ids(resolution)
    assert asyncio.get_running_loop().time() < session.request_facts.deadline + 0.1
    assert [301] == [each.code for each in session.trace.hops if each.code]


async def test_document_at_hand(server: AdServer, client: AiohttpClient) -> None:
    """With a document at hand the upstream is not asked, and the chain goes on from there."""
    server.replies["/one"] = an_inline("one")
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session, document=a_wrapper(server.url("/one")))

    assert ["one"] == ids(resolution)
    assert [] == server.seen("/entry")
    assert [(1, None, 0), (2, 1, 1)] == places(session)


async def test_document_at_hand_is_broken(server: AdServer, client: AiohttpClient) -> None:
    """A document at hand that is none fails as if it had been fetched."""
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session, document=b"nonsense")

    assert 100 == resolution.code
    assert 100 == hop(session, 1).code


async def test_parameters_are_added(server: AdServer, client: AiohttpClient) -> None:
    """Further parameters go into the entry's query."""
    server.replies["/entry"] = an_inline()
    await VastChainResolver().resolve(a_session(client, server), {"slot": "a&b"})

    assert "slot=a%26b" == server.requests[0].query


async def test_policy_is_kept(server: AdServer, client: AiohttpClient) -> None:
    """The route's limit of wrappers ends a chain."""
    server.fallback = lambda each: a_wrapper(f"{server.url(each.path)}x")
    resolver = VastChainResolver(Policy(max_wrappers=2))
    resolution = await resolver.resolve(a_session(client, server))

    assert 3 == len(server.requests)
    assert resolution.unwrapped is not None
    assert [302] == [each.code for each in resolution.unwrapped.reports]


async def test_documents_are_bounded_in_all(server: AdServer, client: AiohttpClient) -> None:
    """Past a size in all, what comes is refused with 300, and nothing stands in for it."""
    large = an_inline("large").ljust(500_000)
    fit = MAX_SIZE // len(large)
    pod = a_pod(*(server.url(f"/{n}") for n in range(fit + 2))).decode()
    spare = f'<Ad id="spare">{wrapper_element(server.url("/spare"))}</Ad>'
    server.replies["/entry"] = pod.replace("</VAST>", f"{spare}</VAST>").encode()
    server.fallback = large
    resolution = await VastChainResolver().resolve(a_session(client, server, within=20, timeout=15))
    assert resolution.unwrapped is not None

    assert ["large"] * fit == ids(resolution)
    assert [300, 300] == [each.code for each in resolution.unwrapped.reports]
    assert {f"more than {MAX_SIZE} bytes in all"} == {
        each.reason for each in resolution.unwrapped.reports
    }
    assert [] == server.seen("/spare")


async def test_nothing_stands_in_after_the_deadline(
    server: AdServer, client: AiohttpClient
) -> None:
    """What the deadline has ended is not replaced: there is no time to ask for anything."""
    late = a_pod(server.url("/late"), server.url("/two")).decode()
    spare = f'<Ad id="spare">{wrapper_element(server.url("/spare"))}</Ad>'
    server.replies |= {
        "/entry": late.replace("</VAST>", f"{spare}</VAST>").encode(),
        "/late": Reply(an_inline("late"), delay=30),
        "/two": an_inline("two"),
        "/spare": an_inline("spare"),
    }
    session = a_session(client, server, within=0.4, timeout=10)
    resolution = await VastChainResolver().resolve(session)

    assert ["two"] == ids(resolution)
    assert [(1, None, 0), (2, 1, 1), (3, 1, 1)] == places(session)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Keep the garbage collector away: only counts of references free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
async def test_documents_go_with_the_request(server: AdServer, client: AiohttpClient) -> None:
    """No cycle keeps a document for the garbage collector, whatever came of the others."""
    server.replies |= {
        "/entry": a_pod(*(server.url(f"/{name}") for name in ("one", "gone", "bad", "deep"))),
        "/one": an_inline("one"),
        "/bad": b"<html/>",
        "/deep": a_wrapper(server.url("/gone")),
    }
    assert ["one"] == ids(await VastChainResolver().resolve(a_session(client, server)))
    assert 0 == sum(isinstance(each, VastDocument) for each in gc.get_objects())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("reply", [b"<html/>", b"nonsense", Reply(status=404), Reply(reset=True)])
@pytest.mark.parametrize("at", ["/entry", "/one"])
async def test_failures_go_with_the_request(
    server: AdServer, client: AiohttpClient, at: str, reply: Reply | bytes
) -> None:
    """What a failed hop was answered, up to the largest body, waits for no garbage collector."""
    server.replies |= {"/entry": a_wrapper(server.url("/one")), at: reply}
    kinds = (VastDocument, UpstreamError, VastError, VastSession)
    # Other tests may have errors among their parameters.
    before = [each for each in gc.get_objects() if isinstance(each, kinds)]
    await VastChainResolver().resolve(a_session(client, server))
    await asyncio.sleep(0)  # a connection that was reset is forgotten in the next turn

    assert before == [each for each in gc.get_objects() if isinstance(each, kinds)]


# --- A judge ------------------------------------------------------------------------------------


class Judge:
    """Refuses the ads called *names*; all of them without any. Remembers what it was asked."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.asked: list[list[str]] = []

    async def __call__(self, ads: Sequence[ResolvedAd]) -> Mapping[ResolvedAd, str]:
        """Judge."""
        self.asked.append([each.inline.id for each in ads])
        refused = [each for each in ads if not self.names or each.inline.id in self.names]
        return {each: f"{each.inline.id} is over its cap" for each in refused}


def inlines(*names: str, numbered: bool = False) -> bytes:
    """Build a document of InLines called *names*."""
    ads = "".join(
        f'<Ad id="{name}"{f" sequence={chr(34)}{at}{chr(34)}" if numbered else ""}>'
        f"<InLine><Error>http://e.example/{name}</Error><Creatives/></InLine></Ad>"
        for at, name in enumerate(names, start=1)
    )
    return f'<VAST version="3.0">{ads}</VAST>'.encode()


def with_spare(document: bytes, *urls: str) -> bytes:
    """Add wrappers that lead to *urls* to a document, as stand-alone ads."""
    ads = "".join(f'<Ad id="spare">{wrapper_element(url)}</Ad>' for url in urls)
    return document.replace(b"</VAST>", ads.encode() + b"</VAST>")


async def test_judge_is_asked_when_all_is_there(server: AdServer, client: AiohttpClient) -> None:
    """A judge is asked once about all ads of a pod, in playing order; what it allows is played."""

    async def after_the_second(_: Received) -> bytes:
        """Wait until the other ad was asked for."""
        await server.wait_seen("/two")
        return an_inline("one")

    server.replies |= {
        "/entry": a_pod(server.url("/one"), server.url("/two")),
        "/one": after_the_second,
        "/two": an_inline("two"),
    }
    judge = Judge("nobody")
    resolution = await VastChainResolver().resolve(a_session(client, server), judge=judge)

    assert [["one", "two"]] == judge.asked
    assert ["one", "two"] == ids(resolution)
    assert resolution.unwrapped is not None
    assert () == resolution.unwrapped.refused


async def test_refused_ad_is_replaced(server: AdServer, client: AiohttpClient) -> None:
    """For a refused ad the next candidate is asked for, and the judge is asked about it alone."""
    server.replies |= {
        "/entry": with_spare(
            a_pod(server.url("/one"), server.url("/two")),
            *(server.url(f"/{name}") for name in ("spare1", "spare2", "spare3")),
        ),
        "/one": an_inline("one"),
        "/two": an_inline("two"),
        "/spare1": an_inline("no-good"),
        "/spare2": an_inline("good"),
    }
    judge = Judge("one", "no-good")
    session = a_session(client, server)
    resolution = await VastChainResolver().resolve(session, judge=judge)

    assert [["one", "two"], ["no-good"], ["good"]] == judge.asked
    assert ["good", "two"] == ids(resolution)
    assert resolution.unwrapped is not None
    assert [1, 2] == [each.sequence for each in resolution.unwrapped.ads]
    assert ("one is over its cap", "no-good is over its cap") == resolution.unwrapped.refused
    assert [206, 206] == [each.code for each in resolution.unwrapped.reports]
    assert [(4, 1, 1), (5, 1, 1)] == places(session)[3:]
    assert [] == server.seen("/spare3")


async def test_everything_is_refused(server: AdServer, client: AiohttpClient) -> None:
    """Where all is refused there is no ad, and each ad was judged, and told, once."""
    server.replies |= {
        "/entry": with_spare(inlines("a", "b", numbered=True), server.url("/one")),
        "/one": inlines("c", "d"),
    }
    judge = Judge()
    resolution = await VastChainResolver().resolve(a_session(client, server), judge=judge)

    assert not resolution.has_ads
    assert [["a", "b"], ["c"]] == judge.asked
    assert resolution.unwrapped is not None
    assert ["http://e.example/a", "http://e.example/b", "http://e.example/c"] == [
        uri for each in resolution.unwrapped.reports for uri in each.uris
    ]


async def test_judge_without_ads(server: AdServer, client: AiohttpClient) -> None:
    """Where nothing came, a judge is not asked."""
    server.replies["/entry"] = a_wrapper(server.url("/gone"))
    judge = Judge()
    await VastChainResolver().resolve(a_session(client, server), judge=judge)

    assert [] == judge.asked


async def test_judge_of_a_document_at_hand(server: AdServer, client: AiohttpClient) -> None:
    """A document at hand is judged as one that was fetched."""
    resolution = await VastChainResolver().resolve(
        a_session(client, server), document=inlines("a", "b"), judge=Judge("a")
    )

    assert ["b"] == ids(resolution)


async def test_nothing_stands_in_for_a_refused_ad_after_the_deadline(
    server: AdServer, client: AiohttpClient
) -> None:
    """When the deadline has passed, refused ads are gone; what stays was judged, and is played."""
    session = a_session(client, server, within=-1.0)
    judge = Judge("a")
    resolution = await VastChainResolver().resolve(
        session,
        document=with_spare(inlines("a", "b", numbered=True), server.url("/spare")),
        judge=judge,
    )

    assert ["b"] == ids(resolution)
    assert [["a", "b"]] == judge.asked
    assert [(1, None, 0)] == places(session)


async def test_judge_of_many_candidates(server: AdServer, client: AiohttpClient) -> None:
    """A judge is asked about so many candidates; then nothing stands in any more."""
    server.replies["/entry"] = inlines(*(f"a{n}" for n in range(MAX_JUDGED + 50)))
    judge = Judge()
    resolution = await VastChainResolver().resolve(a_session(client, server), judge=judge)

    assert not resolution.has_ads
    assert [[f"a{n}"] for n in range(MAX_JUDGED)] == judge.asked


async def test_judge_of_a_long_pod(server: AdServer, client: AiohttpClient) -> None:
    """What a pod has beyond that is refused unasked: an ad that nobody judged is not served."""
    names = [f"a{n}" for n in range(MAX_JUDGED + 50)]
    server.replies["/entry"] = inlines(*names, numbered=True)
    judge = Judge("a0")
    resolution = await VastChainResolver().resolve(a_session(client, server), judge=judge)

    assert [names[:MAX_JUDGED]] == judge.asked
    assert names[1:MAX_JUDGED] == ids(resolution)
    assert resolution.unwrapped is not None
    assert ("a0 is over its cap", *[f"more than {MAX_JUDGED} ads"] * 50) == (
        resolution.unwrapped.refused
    )


async def test_judge_of_the_longest_pod(server: AdServer, client: AiohttpClient) -> None:
    """Up to the bound every ad is judged."""
    names = [f"a{n}" for n in range(MAX_JUDGED)]
    server.replies["/entry"] = inlines(*names, numbered=True)
    resolution = await VastChainResolver().resolve(a_session(client, server), judge=Judge("x"))

    assert names == ids(resolution)


@pytest.mark.usefixtures("no_collector")
async def test_judge_that_fails(server: AdServer, client: AiohttpClient) -> None:
    """What a judge raises comes out, and keeps no document for the garbage collector."""
    server.replies |= {"/entry": a_wrapper(server.url("/one")), "/one": an_inline("one")}

    async def failing(_: Sequence[ResolvedAd]) -> Mapping[ResolvedAd, str]:
        """Fail as a state backend does."""
        raise StateBackendError("away")

    with pytest.raises(StateBackendError):
        await VastChainResolver().resolve(a_session(client, server), judge=failing)

    assert 0 == sum(isinstance(each, VastDocument) for each in gc.get_objects())


@pytest.mark.usefixtures("no_collector")
async def test_judged_documents_go_with_the_request(
    server: AdServer, client: AiohttpClient
) -> None:
    """Nor does a refusal."""
    server.replies["/entry"] = inlines("a", "b")
    assert ["b"] == ids(
        await VastChainResolver().resolve(a_session(client, server), judge=Judge("a"))
    )
    assert 0 == sum(isinstance(each, VastDocument) for each in gc.get_objects())


# --- Reading ------------------------------------------------------------------------------------


def a_reply(body: bytes, status: int = 200, content_type: str = "") -> HopReply:
    """Build a reply of *content_type*."""
    return HopReply(status, (("content-type", content_type),) if content_type else (), body)


@pytest.mark.parametrize(
    "content_type",
    [
        *("text/xml; charset=iso-8859-2", 'text/xml; charset="ISO-8859-2"; x=y'),
        *("text/xml;charset=iso-8859-2;q", "x; a=b; Charset=ISO-8859-2"),
    ],
)
@pytest.mark.parametrize("padding", [0, PARSE_APART])
async def test_charset_of_the_header(content_type: str, padding: int) -> None:
    """Bytes that are no UTF-8 are read by the charset that HTTP tells, in large documents too."""
    body = an_inline("Łódź").decode() + " " * padding
    document = await read(a_reply(body.encode("iso-8859-2"), content_type=content_type))

    assert "Łódź" == document.ads[0].id


async def test_utf8_wins_over_the_header() -> None:
    """What is UTF-8 is read as such, whatever HTTP says."""
    document = await read(a_reply(an_inline("Łódź"), content_type="text/xml; charset=iso-8859-2"))

    assert "Łódź" == document.ads[0].id


async def test_large_document_is_read_apart() -> None:
    """While a large document is parsed the loop goes on; many at once do not disturb each other."""
    padded = [an_inline(f"ad{number}") + b" " * PARSE_APART for number in range(8)]
    documents = await asyncio.gather(*(read(a_reply(each)) for each in padded))

    assert [f"ad{number}" for number in range(8)] == [each.ads[0].id for each in documents]


@pytest.mark.parametrize("size", [0, PARSE_APART])
async def test_broken_document_is_broken_in_any_size(size: int) -> None:
    """A document that is no XML is refused, parsed apart or not."""
    with pytest.raises(VastSyntaxError):
        await read(a_reply(b"<VAST" + b" " * size))


@pytest.mark.parametrize(
    ("status", "error"), [(204, NoAdError), (304, UpstreamStatusError), (500, UpstreamStatusError)]
)
async def test_status_without_a_document(status: int, error: type[Exception]) -> None:
    """A status that is no success carries no document, whatever its body is."""
    with pytest.raises(error):
        await read(a_reply(an_inline(), status=status))


@pytest.mark.parametrize("status", [200, 201, 203, 206])
async def test_any_success_carries_a_document(status: int) -> None:
    """Any other status of success is as good as 200."""
    assert "ad" == (await read(a_reply(an_inline(), status=status))).ads[0].id


def test_default_policy() -> None:
    """A resolver without a policy has VAST's own limits."""
    default: Any = VastChainResolver().policy

    assert Policy() == default


# --- What was kept, and what was refused --------------------------------------------------------

KEPT = CacheSettings(scope="shared", ttl=60, stale_while_revalidate=0, stale_if_error=600)
TRIPS = GuardSettings(BreakerSettings(fail_max=1))
"""One failure opens the breaker."""


class Place:
    """An upstream with a guard, a cache and a clock that a test turns."""

    def __init__(
        self,
        server: AdServer,
        client: AiohttpClient,
        owner: Tasks,
        settings: CacheSettings | None = KEPT,
        entry: GuardSettings = TRIPS,
    ) -> None:
        """Put it behind ``/entry`` of *server*; *owner* runs what nobody waits for."""
        self.time = 1000.0
        self.cache: AnswerCache | None = None
        if settings is not None:
            self.cache = AnswerCache("main", settings, clock=lambda: self.time, spawn=owner.spawn)
        self.guard = Guard("main", entry)
        self.site = Guard("site.example", TRIPS)
        url = server.url("/entry")
        self.upstream = VastUpstream(
            UpstreamSettings("main", Template(url, (url,)), session_params=()),
            client,
            lambda: 0.0,
            Protection(self.guard, lambda _: self.site, self.cache),
        )

    def session(self, viewer: str = "ann") -> VastSession:
        """Open a session with a chain of its own."""
        factory = SessionFactory(is_public_suffix=lambda _: False)
        request = Request(AdRequest("/"), viewer)
        return factory.open_session(factory.context(), self.upstream, request=request)

    async def asked(self) -> tuple[Resolution, VastSession]:
        """Ask once; give also the session, whose trace tells."""
        session = self.session()
        return await VastChainResolver().resolve(session), session


@pytest.fixture
async def owner() -> AsyncIterator[Tasks]:
    """Own what nobody waits for."""
    async with Tasks("test") as tasks:
        yield tasks


async def test_stale_answer_tells_what_it_stands_in_for(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """An ad from before is given where the upstream fails, and the hop tells what failed."""
    server.replies["/entry"] = an_inline("old")
    place = Place(server, client, owner)
    await place.asked()
    place.time += 61
    server.replies["/entry"] = Reply(status=500)
    resolution, session = await place.asked()
    told = hop(session, 1)

    assert (["old"], None) == (ids(resolution), resolution.code)
    assert (301, "HTTP status 500", "") == (told.code, told.problem, told.refused)
    assert "stale (upstream failed: HTTP status 500)" == told.cache
    assert [500] == [each.status for each in told.exchanges]
    assert ["vastproxy; hit; ttl=-1; detail=main"] == session.trace.cache_status


async def test_stale_answer_tells_who_refused(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """Where a breaker is open the stale answer's hop says so, and that nobody was asked."""
    server.replies["/entry"] = an_inline("old")
    place = Place(server, client, owner)
    await place.asked()
    place.time += 61
    server.replies["/entry"] = Reply(status=500)
    await place.asked()
    resolution, session = await place.asked()
    told = hop(session, 1)

    assert ["old"] == ids(resolution)
    assert (300, "breaker", ()) == (told.code, told.refused, told.exchanges)
    assert told.cache.startswith("stale (upstream failed: ")
    assert ["vastproxy; hit; ttl=-1; detail=main"] == session.trace.cache_status
    assert 2 == len(server.requests)


@pytest.mark.parametrize(
    ("reply", "code"), [(Reply(status=500), 301), (Reply(b"<html/>"), 101), (Reply(b"{}"), 100)]
)
async def test_failed_lookup_is_a_miss(
    server: AdServer, client: AiohttpClient, owner: Tasks, reply: Reply, code: int
) -> None:
    """Where nothing stands in, the hop says that the cache had nothing and the upstream failed."""
    server.replies["/entry"] = reply
    resolution, session = await Place(server, client, owner).asked()

    assert (code, code) == (resolution.code, hop(session, 1).code)
    assert "miss (upstream failed)" == hop(session, 1).cache
    assert [] == session.trace.cache_status


async def test_lookup_that_is_cut_off_is_no_failure(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """Of a lookup that is cut off, the hop does not say that the upstream failed."""
    server.replies["/entry"] = Reply(delay=30.0)
    session = Place(server, client, owner).session()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(VastChainResolver().resolve(session))
        await server.wait_seen("/entry")
        task.cancel()
    told = hop(session, 1)

    assert ("miss (cut off)", None) == (told.cache, told.code)
    assert told.problem.startswith("cut off: ")
    assert 1 == len(told.exchanges)


async def test_no_ad_is_no_failed_lookup(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """That there is no ad is an answer, which is kept and given like any other."""
    server.replies["/entry"] = Reply(status=204)
    place = Place(server, client, owner)
    told = [(await place.asked())[1] for _ in range(2)]

    assert ["miss, stored", "hit"] == [hop(each, 1).cache for each in told]
    assert [303, 303] == [hop(each, 1).code for each in told]
    assert 1 == len(server.requests)


async def test_cookie_of_another_chain_keeps_an_answer_private(
    client: AiohttpClient, owner: Tasks
) -> None:
    """What a redirect's target made for somebody's cookie is given to nobody else."""

    def personal(request: Received) -> bytes:
        """Answer an ad that is named after the viewer."""
        return an_inline(request.cookies.get("uid", "nobody"))

    async with AdServer(addresses=("127.0.0.1", "127.0.0.2")) as server:
        target = server.url("/ad", address="127.0.0.2")
        server.replies |= {
            "/entry": Reply(status=302, headers=(("Location", target),)),
            "/ad": personal,
        }
        place = Place(server, client, owner)
        served = []
        for viewer in ("ann", "bob"):
            session = place.session(viewer)
            # As the chain of an upstream that was asked before this one leaves it behind.
            session.jar.put("uid", viewer, "127.0.0.2")
            served += ids(await VastChainResolver().resolve(session))
        served += ids((await place.asked())[0])

    assert ["ann", "bob", "nobody"] == served
    assert place.cache is not None
    assert {"cookies": 2} == place.cache.told()["not_stored"]


async def test_refresh_of_a_viewers_answer_sends_his_cookies(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """What is kept for a viewer is refreshed as he would ask, with the cookies kept for him."""
    server.replies["/entry"] = an_inline("ad")
    place = Place(server, client, owner, replace(KEPT, scope="viewer", stale_while_revalidate=30))
    place.upstream.settings = replace(place.upstream.settings, cookies="viewer")
    jar = CookieJar(lambda _: False)
    jar.put("uid", "ann", "127.0.0.1")
    factory = SessionFactory(is_public_suffix=lambda _: False)
    request = Request(AdRequest("/"), "ann", viewer_jar=jar)
    for _ in range(2):
        session = factory.open_session(factory.context(), place.upstream, request=request)
        await VastChainResolver().resolve(session)
        place.time += 61

    assert "stale (revalidating)" == hop(session, 1).cache
    assert await owner.wait_idle(5.0)
    assert [{"uid": "ann"}] * 2 == [each.cookies for each in server.requests]


async def test_refusal_of_a_redirects_site_is_a_failure(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """A site that the upstream redirects to and that is left alone is not the upstream refused."""
    server.replies |= {
        "/entry": Reply(status=302, headers=(("Location", "/dead"),)),
        "/dead": Reply(status=500),
    }
    place = Place(server, client, owner, settings=None)
    await place.asked()
    resolution, session = await place.asked()
    told = hop(session, 1)

    assert (300, "") == (resolution.code, resolution.refused)
    assert (300, "breaker") == (told.code, told.refused)
    assert ["/entry", "/dead", "/entry"] == [each.path for each in server.requests]


async def test_refusal_of_the_upstream_is_told(
    server: AdServer, client: AiohttpClient, owner: Tasks
) -> None:
    """An upstream that is left alone itself is told as that."""
    server.replies["/entry"] = Reply(status=500)
    place = Place(server, client, owner, settings=None)
    await place.asked()
    resolution, session = await place.asked()

    assert ("breaker", "breaker") == (resolution.refused, hop(session, 1).refused)
    assert 1 == len(server.requests)


def test_refused_by_whom() -> None:
    """Who names an upstream is told of its own refusals alone; else of any."""
    error = UpstreamRefusedError("too many", by="busy", of="main")

    assert ["busy", "busy", ""] == [
        refused_by(error),
        refused_by(error, "main"),
        refused_by(error, "other"),
    ]
    assert ["", ""] == [
        refused_by(each, "main") for each in (NoAdError("none"), UpstreamConnectError("refused"))
    ]
