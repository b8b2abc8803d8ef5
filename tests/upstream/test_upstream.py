"""How a configured ad server, and the hops behind it, are asked."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from tests.support.ad_server import AdServer, Received, Reply
from vastproxy import __version__
from vastproxy.config.template import Template
from vastproxy.config.units import Source
from vastproxy.errors import (
    EgressBlockedError,
    RedirectError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamTooLargeError,
)
from vastproxy.flow.routing import Route, forwarded
from vastproxy.model import AdRequest, Device, FrozenMapping, Query
from vastproxy.observe.tasks import Tasks
from vastproxy.observe.trace import Exchange
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import Fetched, Request, VastSession
from vastproxy.state.memory import InMemoryBackend
from vastproxy.upstream.answers import AnswerCache, Asking, CacheSettings, key_of
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.upstream import MAX_REDIRECTS, UpstreamSettings, VastUpstream

NOW = 1_800_000_000.0
HOSTS = ("127.0.0.1", "127.0.0.2")

Make = Callable[..., VastUpstream]


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run an ad server on two hosts."""
    async with AdServer(addresses=HOSTS) as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[AiohttpClient]:
    """Open a client whose hops may reach 127.0.0.1, and nothing else."""
    async with AiohttpClient(EgressPolicy(allow=(ip_network("127.0.0.1/32"),))) as opened:
        yield opened


@pytest.fixture
def make(client: AiohttpClient) -> Make:
    """Give a function that makes upstreams without session parameters, from texts."""

    def made(endpoint: str, **settings: Any) -> VastUpstream:
        for name in ("params", "headers"):
            texts: Mapping[str, str] = settings.get(name, {})
            settings[name] = tuple((key, Template.parse(each)) for key, each in texts.items())
        found = UpstreamSettings("main", Template.parse(endpoint), **settings)
        if "session_params" not in settings:
            found = replace(found, session_params=())
        return VastUpstream(found, client, lambda: NOW)

    return made


def a_session(
    upstream: VastUpstream, ad_request: AdRequest | None = None, **facts: Any
) -> VastSession:
    """Open a session with fixed ids at *upstream*; *facts* are what routing found out."""
    factory = SessionFactory(is_public_suffix=lambda _: False, now=lambda: NOW)
    cookies = facts.pop("cookies", None)
    context = factory.context(request_id="r1", correlator="77", cookies=cookies)
    request = Request(ad_request or AdRequest("/"), **facts)
    return factory.open_session(context, upstream, request=request)


def entry(upstream: VastUpstream, ad_request: AdRequest | None = None, **facts: Any) -> str:
    """Give the URL that *upstream* is first asked for."""
    return upstream.entry_url(a_session(upstream, ad_request, **facts))


async def fetch(
    upstream: VastUpstream, url: str, session: VastSession | None = None, **more: Any
) -> Fetched:
    """Ask for *url* as a hop of *upstream*."""
    return await upstream.fetch(session or a_session(upstream), url, [], **more)


# --- The first URL ---------------------------------------------------------------------------


def test_endpoint_alone_stays_as_it_is(make: Make) -> None:
    """An endpoint without anything to add is the URL, byte for byte."""
    url = "http://a.example/x;y?sig=%2f%2F+a&b[]=1&c='{{d}}'"

    assert url.replace("{{d}}", "{d}") == entry(make(url))


def test_order_of_the_query(make: Make) -> None:
    """Endpoint's query, parameters, further parameters, player's query, session's parameters."""
    upstream = make(
        "http://a.example/x?own=1",
        params={"slot": "{query.slot}"},
        session_params=("correlator", "timestamp"),
    )
    session = a_session(upstream, AdRequest("/", query=Query("slot=a b")), forward_query="p=%2f")

    assert (
        "http://a.example/x?own=1&slot=a%20b&extra=%26&p=%2f&correlator=77&timestamp=1800000000000"
        == upstream.entry_url(session, {"extra": "&"})
    )


def test_values_cannot_leave_their_place(make: Make) -> None:
    """What a player sends for a placeholder is encoded, in the endpoint and in parameters."""
    upstream = make("http://a.example/x?id={query.id}", params={"h": "a-{header.x-h}"})
    request = AdRequest(
        "/",
        query=Query("id=%261%23%2F%3F%0A"),
        headers=FrozenMapping({"x-h": "b&c=d#é"}),
    )

    assert "http://a.example/x?id=%261%23%2F%3F%0A&h=a-b%26c%3Dd%23%C3%A9" == entry(
        upstream, request
    )


def test_viewer_and_address_are_placeholders(make: Make) -> None:
    """The viewer's id and address can be put into the URL."""
    upstream = make("http://a.example/{viewer}?ip={client_ip}")
    request = AdRequest("/", device=Device(ip="2001:db8::1"))

    assert "http://a.example/a%2Fb?ip=2001%3Adb8%3A%3A1" == entry(upstream, request, viewer="a/b")


def test_session_parameters_are_not_doubled(make: Make) -> None:
    """A session's parameter that the URL has already is not appended; its value is replaced."""
    upstream = make(
        "http://a.example/x?correlator=old&xtimestamp=1", session_params=("correlator", "timestamp")
    )

    assert "http://a.example/x?correlator=77&xtimestamp=1&timestamp=1800000000000" == entry(
        upstream
    )


def test_macros_of_the_endpoint_are_filled(make: Make) -> None:
    """Macros in the endpoint and in the player's query are filled; the unknown become -1."""
    upstream = make("http://a.example/x?c=[CORRELATOR]&i=[IFA]&f=[filter]")

    assert "http://a.example/x?c=77&i=-2&f=[filter]&p=-1" == entry(
        upstream, forward_query="p=[PAGEURL]"
    )


def test_rest_is_appended_to_the_path(make: Make) -> None:
    """What the route's path went on with is appended to the endpoint's path, byte for byte."""
    upstream = make("http://a.example/vast/?k=1")

    assert "http://a.example/vast/a%2Fb/c;d?k=1" == entry(
        upstream, AdRequest("/", rest="a%2Fb/c;d")
    )


def test_rest_is_put_where_the_endpoint_wants_it(make: Make) -> None:
    """An endpoint that names the rest has it there, and nowhere else."""
    upstream = make("http://a.example/{rest}/vast?k=1")

    assert "http://a.example/a%2Fb/vast?k=1" == entry(upstream, AdRequest("/", rest="a%2Fb"))


def test_rest_cannot_cut_off_the_query(make: Make) -> None:
    """A number sign in the rest does not turn the endpoint's own query into a fragment."""
    upstream = make("http://a.example/vast?key=1")
    url = entry(upstream, AdRequest("/", rest="a#b"))

    assert "?key=1" in url.partition("#")[0]


@pytest.mark.parametrize(
    "tag",
    [
        *("http://ads.example/x?y=1", "https://ads.example/", "http://ADS.example:80/x"),
        *("http://other.example:8080/x", "https://a.wild.example/"),
    ],
)
def test_player_may_name_a_listed_host(make: Make, tag: str) -> None:
    """An endpoint from the player's query may lead to the hosts that the operator lists."""
    hosts = ("ads.example", "other.example:8080", "*.wild.example")
    upstream = make("{query.tag}", hosts=hosts)

    assert tag == entry(upstream, AdRequest("/", query=Query("tag=" + tag.replace("?", "%3F"))))


@pytest.mark.parametrize(
    "tag",
    [
        *("http://evil.example/", "http://ads.example:81/", "http://other.example/"),
        *("http://ads.example.evil.example/", "http://ads.example@evil.example/"),
        *("http://evil.example/ads.example", "http://evil.example%23.wild.example/x"),
        *("http://evil.example%2F.ads.example/", "http://wild.example/", "http://169.254.169.254/"),
        *("http://evil.example%5C@ads.example/", "//ads.example/", "ftp://ads.example/", ""),
        "http://evil.example%3F.wild.example/",
    ],
)
def test_player_may_name_no_other_host(make: Make, tag: str) -> None:
    """Any other host, port or scheme is refused, whatever the URL is made to look like."""
    upstream = make("{query.tag}", hosts=("ads.example", "other.example:8080", "*.wild.example"))

    with pytest.raises(UpstreamError) as refusal:
        entry(upstream, AdRequest("/", query=Query("tag=" + tag)))
    assert 300 == refusal.value.vast_code


@pytest.mark.parametrize(
    ("tag", "url"),
    [
        ("http://x[CORRELATOR].example/a", "http://x77.example/a"),
        ("http://x%255BCORRELATOR%255D.example/a", "http://x77.example/a"),
        ("http://x77.example/?c=1", "http://x77.example/?c=77"),
    ],
)
def test_host_is_checked_as_it_is_asked(make: Make, tag: str, url: str) -> None:
    """The host that is checked is the one that is asked: macros and correlator are in it."""
    upstream = make("{query.tag}", hosts=("x77.example",))
    request = AdRequest("/", query=Query(f"tag={tag}"))

    assert url == entry(upstream, request, correlator_params=("c",))


@pytest.mark.parametrize(
    "tag",
    [
        *("http://x[CORRELATOR].example/", "http://[CORRELATOR]@evil.example/"),
        *("http://u;c=x@ads.example/", "http://u;c=x@ads.example/?c=1", "http://;c=@ads.example/"),
        *("http://[PAGEURL].ads.example/", "http://%255BPAGEURL%255D/@ads.example/"),
    ],
)
def test_nothing_filled_in_changes_the_host(make: Make, tag: str) -> None:
    """What macros and correlator put in leads to no host that the operator did not list."""
    upstream = make("{query.tag}", hosts=("ads.example", "*.ads.example"))
    device = Device(referer="http://evil.example/")
    request = AdRequest("/", query=Query(f"tag={tag}"), device=device)

    with pytest.raises(UpstreamError) as refusal:
        entry(upstream, request, correlator_params=("c",))
    assert 300 == refusal.value.vast_code


def test_taken_parameters(make: Make) -> None:
    """An upstream knows which of the player's parameters it sets itself or takes over."""
    upstream = make("http://a.example/?a={query.a}", params={"b": "{query.c}-{viewer}"})

    assert frozenset({"a", "b", "c"}) == upstream.taken_parameters
    assert "<VastUpstream main http://a.example/?a={query.a}>" == repr(upstream)


@pytest.mark.parametrize(
    ("sent", "goes_on"),
    [
        ("own=2&x=1", "x=1"),
        ("ow%6E=2&x=1", "x=1"),
        ("%6Fwn&x=1&slot=2&sl%6ft=3&Own=4", "x=1&Own=4"),
        ("a%20b=2&a+b=3&x=1", "x=1"),
        ("player=5&x=1", "x=1"),
    ],
)
def test_no_parameter_is_sent_twice(make: Make, sent: str, goes_on: str) -> None:
    """What the endpoint's query, its parameters or its placeholders say, no player says again."""
    upstream = make("http://a.example/?own=1&a%20b=1&p={query.player}", params={"slot": "{viewer}"})

    assert goes_on == forwarded(Route("/", ()), sent, upstream.taken_parameters)


# --- Hops ---------------------------------------------------------------------------------------


def test_hop_is_filled(make: Make) -> None:
    """A hop's macros are filled, its correlator is the session's, its bytes stay."""
    upstream = make("http://a.example/")
    session = a_session(upstream, correlator_params=("correlator", "ord"))

    assert "http://b.example/x?s=%2f&ord=77&t=1800000000000&b=IAB1-1,IAB2" == upstream.filled(
        "http://b.example/x?s=%2f&ord=5&t=[TIMESTAMP]&b=[BLOCKEDADCATEGORIES]",
        session,
        ("IAB1-1", "IAB2"),
    )


def test_error_uri_is_filled_with_its_code(make: Make) -> None:
    """An error URI gets its code, and -1 for what is not known."""
    upstream = make("http://a.example/")

    assert "http://b.example/?c=303&e=303&p=-1" == upstream.filled_error(
        "http://b.example/?c=[ERRORCODE]&e=%5BERRORCODE%5D&p=[ASSETURI]", a_session(upstream), 303
    )


async def test_entry_tells_of_the_device(server: AdServer, make: Make) -> None:
    """The device's headers go to every hop; the operator's own to the endpoint alone."""
    server.replies |= {"/a": Reply(status=302, headers=(("Location", "/b"),)), "/b": b"ok"}
    upstream = make(
        server.url("/a"),
        headers={"Authorization": "Bearer {query.t}", "user-agent": "Ours", "X-Key": "k"},
    )
    request = AdRequest("/", query=Query("t=abc"), device=Device("192.0.2.1", "TV"))
    session = a_session(upstream, request)
    await fetch(upstream, server.url("/a"), session, trusted=True, headers={"X-More": "m"})
    first, second = server.requests

    assert ["Bearer abc"] == first.values("Authorization")
    assert (["Ours"], ["k"], ["m"]) == (
        first.values("User-Agent"),
        first.values("X-Key"),
        first.values("X-More"),
    )
    assert ["TV"] == second.values("User-Agent")
    assert [] == [
        *second.values("Authorization"),
        *second.values("X-Key"),
        *second.values("X-More"),
    ]
    assert ["192.0.2.1"] * 2 == [each.header("X-Device-IP") for each in server.requests]


async def test_own_header_cannot_be_broken_by_a_player(server: AdServer, make: Make) -> None:
    """A line break in what a player sends does not make a header."""
    server.replies["/a"] = b"ok"
    upstream = make(server.url("/a"), headers={"X-Uid": "{query.uid}"})
    request = AdRequest("/", query=Query("uid=1%0D%0AX-Evil:%20yes"))
    await fetch(upstream, server.url("/a"), a_session(upstream, request), trusted=True)

    assert "1  X-Evil: yes" == server.requests[0].header("X-Uid")
    assert server.requests[0].header("X-Evil") is None


async def test_proxy_as_agent(server: AdServer, make: Make) -> None:
    """An upstream may be asked by the proxy's own agent, and without X-Forwarded-For."""
    server.replies["/a"] = b"ok"
    upstream = make(server.url("/a"), user_agent="proxy", forwarded_for="off")
    request = AdRequest("/", device=Device("192.0.2.1", "TV", forwarded_for="192.0.2.1"))
    await fetch(upstream, server.url("/a"), a_session(upstream, request))

    assert f"vastproxy/{__version__}" == server.requests[0].header("User-Agent")
    assert server.requests[0].header("X-Forwarded-For") is None


async def test_redirects_are_followed(server: AdServer, make: Make) -> None:
    """All kinds of redirects are followed, relative ones too; the reply knows where it is from."""
    kinds = (301, 302, 303, 307, 308)
    for number, status in enumerate(kinds):
        location = (("Location", f"{number + 1}?x=[Y]&a=%2f"),)
        server.replies[f"/r/{number}"] = Reply(status=status, headers=location)
    server.replies["/r/5"] = b"there"
    upstream = make(server.url("/r/0"))
    exchanges = list[Exchange]()
    fetched = await upstream.fetch(a_session(upstream), server.url("/r/0"), exchanges)

    assert (b"there", server.url("/r/5?x=[Y]&a=%2f")) == (fetched.reply.body, fetched.url)
    assert [*kinds, 200] == [each.status for each in exchanges]
    assert {"GET"} == {each.method for each in server.requests}


async def test_too_many_redirects(server: AdServer, make: Make) -> None:
    """A redirect to itself ends, with the code for wrappers, and every request is logged."""
    server.fallback = Reply(status=302, headers=(("Location", "/a"),))
    upstream = make(server.url("/a"))
    exchanges = list[Exchange]()
    with pytest.raises(RedirectError, match="more than 10"):
        await upstream.fetch(a_session(upstream), server.url("/a"), exchanges)

    assert MAX_REDIRECTS + 1 == len(exchanges)


@pytest.mark.parametrize(
    "headers",
    [(), (("Location", ""),), (("Location", "javascript:x"),), (("Location", "http://[x/"),)],
)
async def test_redirect_to_nowhere(
    server: AdServer, make: Make, headers: tuple[tuple[str, str], ...]
) -> None:
    """A redirect without a usable target is an error of its own."""
    server.replies["/a"] = Reply(status=302, headers=headers)
    with pytest.raises(RedirectError):
        await fetch(make(server.url("/a")), server.url("/a"))


async def test_redirect_of_a_trusted_endpoint_is_not_trusted(server: AdServer, make: Make) -> None:
    """The operator's endpoint may be private; where it redirects to may not."""
    server.replies |= {
        "/a": Reply(status=302, headers=(("Location", server.url("/b", address=HOSTS[1])),)),
        "/b": b"secret",
    }
    upstream = make(server.url("/a", address=HOSTS[1]))
    with pytest.raises(EgressBlockedError):
        await fetch(upstream, server.url("/a", address=HOSTS[1]), trusted=True)

    assert [] == server.seen("/b")


async def test_hop_may_not_reach_a_private_address(server: AdServer, make: Make) -> None:
    """A hop that was not configured passes the guard; the attempt is logged without a status."""
    upstream = make(server.url("/a"))
    exchanges = list[Exchange]()
    with pytest.raises(EgressBlockedError):
        await upstream.fetch(a_session(upstream), server.url("/a", address=HOSTS[1]), exchanges)

    assert [None] == [each.status for each in exchanges]
    assert [] == server.requests


async def test_body_is_capped(server: AdServer, make: Make) -> None:
    """The upstream's cap holds for its hops."""
    server.replies["/a"] = b"a" * 101
    with pytest.raises(UpstreamTooLargeError):
        await fetch(make(server.url("/a"), max_body=100), server.url("/a"))


async def test_own_limit(server: AdServer, make: Make) -> None:
    """A hop that exceeds its upstream's limit is late, and nobody starved it."""
    server.replies["/a"] = Reply(b"", delay=30)
    with pytest.raises(UpstreamTimeoutError) as late:
        await fetch(make(server.url("/a"), timeout=0.1), server.url("/a"))

    assert not late.value.starved


async def test_limit_is_for_all_redirects_together(server: AdServer, make: Make) -> None:
    """Redirects do not prolong a hop."""
    server.fallback = Reply(status=302, headers=(("Location", "/a"),), delay=0.06)
    with pytest.raises(UpstreamTimeoutError):
        await fetch(make(server.url("/a"), timeout=0.2), server.url("/a"))

    assert 5 > len(server.requests)


async def test_starved_by_the_deadline(server: AdServer, make: Make) -> None:
    """A hop that had less than its own limit left was starved; a reserve stays for answering."""
    server.replies["/a"] = Reply(b"", delay=30)
    upstream = make(server.url("/a"), timeout=5.0)
    now = asyncio.get_running_loop().time
    deadline = now() + 0.4
    with pytest.raises(UpstreamTimeoutError) as late:
        await fetch(upstream, server.url("/a"), a_session(upstream, deadline=deadline))

    assert late.value.starved
    assert now() < deadline + 0.1


async def test_nothing_is_asked_after_the_deadline(server: AdServer, make: Make) -> None:
    """When the deadline has passed, no request goes out, and that is no fault of the ad server."""
    server.replies["/a"] = b"ok"
    upstream = make(server.url("/a"))
    late = asyncio.get_running_loop().time() - 0.001
    with pytest.raises(UpstreamTimeoutError) as error:
        await fetch(upstream, server.url("/a"), a_session(upstream, deadline=late))
    await fetch(upstream, server.url("/b"), a_session(upstream, deadline=late + 60))

    assert error.value.starved
    assert ["/b"] == [each.path for each in server.requests]
    assert [1] == [each.connection for each in server.requests]


async def test_cookies_come_back(server: AdServer, make: Make) -> None:
    """What a redirect sets is sent to the next request, and both are logged by name."""

    def known(request: Received) -> bytes:
        """Say whom the cookie names."""
        return request.cookies.get("uid", "nobody").encode()

    cookie = ("Set-Cookie", "uid=7; Path=/")
    server.replies |= {
        "/a": Reply(status=302, headers=(cookie, ("Location", "/b"))),
        "/b": known,
    }
    upstream = make(server.url("/a"))
    exchanges = list[Exchange]()
    fetched = await upstream.fetch(a_session(upstream), server.url("/a"), exchanges)

    assert b"7" == fetched.reply.body
    assert [((), ("uid",)), (("uid",), ())] == [
        (each.cookies_sent, each.cookies_set) for each in exchanges
    ]


async def test_cookies_go_to_nobody_else(server: AdServer, make: Make) -> None:
    """Another host, on the same port, does not get the cookie."""
    server.replies |= {"/a": Reply(b"", headers=(("Set-Cookie", "uid=7; Path=/"),)), "/b": b""}
    upstream = make(server.url("/a"))
    session = a_session(upstream)
    await fetch(upstream, server.url("/a"), session)
    await fetch(upstream, server.url("/b", address=HOSTS[1]), session, trusted=True)
    await fetch(upstream, server.url("/b"), session)

    assert [{}, {"uid": "7"}] == [each.cookies for each in server.seen("/b")]


async def test_cookies_off(server: AdServer, make: Make) -> None:
    """With cookies off none is kept, none is sent, none is logged."""
    server.replies["/a"] = Reply(b"", headers=(("Set-Cookie", "uid=7; Path=/"),))
    upstream = make(server.url("/a"), cookies="off")
    session = a_session(upstream)
    exchanges = list[Exchange]()
    for _ in range(2):
        await upstream.fetch(session, server.url("/a"), exchanges)

    assert [{}, {}] == [each.cookies for each in server.requests]
    assert {((), ())} == {(each.cookies_sent, each.cookies_set) for each in exchanges}
    assert 0 == len(session.jar)


async def test_players_cookies_go_to_the_endpoint(server: AdServer, make: Make) -> None:
    """Cookies that the route forwards go to the endpoint's host, and to no hop elsewhere."""
    server.replies |= {"/a": b"", "/b": b""}
    upstream = make(server.url("/a", address=HOSTS[1]))
    session = a_session(upstream, cookies={"uid": "me"})
    await fetch(upstream, server.url("/a", address=HOSTS[1]), session, trusted=True)
    await fetch(upstream, server.url("/b"), session)

    assert {"uid": "me"} == server.seen("/a")[0].cookies
    assert {} == server.seen("/b")[0].cookies


@pytest.mark.parametrize("cookies", ["chain", "off"])
async def test_cookies_of_a_redirect_are_told(server: AdServer, make: Make, cookies: str) -> None:
    """Who fetches learns that cookies were sent or set on the way, and the redirects themselves."""
    cookie = ("Set-Cookie", "uid=7; Path=/")
    server.replies |= {
        "/a": Reply(status=302, headers=(cookie, ("Location", "/b"), ("Cache-Control", "private"))),
        "/b": Reply(status=307, headers=(("Location", "/c"),)),
        "/c": b"end",
    }
    fetched = await fetch(make(server.url("/a"), cookies=cookies), server.url("/a"))

    assert (True, cookies == "chain") == (fetched.set_cookies, fetched.sent_cookies)
    assert [(302, "private"), (307, None)] == [
        (each.status, each.header("cache-control")) for each in fetched.on_the_way
    ]


async def test_cookie_of_another_chain_is_told(server: AdServer, make: Make) -> None:
    """A cookie that the session had already is told where only the redirect's target is sent it."""
    target = server.url("/b", address=HOSTS[1])
    server.replies |= {"/a": Reply(status=302, headers=(("Location", target),)), "/b": b"end"}
    upstream = make(server.url("/a"))
    upstream.client = other = AiohttpClient(EgressPolicy(allow=(ip_network("127.0.0.0/8"),)))
    session = a_session(upstream)
    session.jar.put("uid", "ann", HOSTS[1])
    async with other:
        fetched = await fetch(upstream, server.url("/a"), session, trusted=True)

    assert {} == server.seen("/a")[0].cookies
    assert {"uid": "ann"} == server.seen("/b")[0].cookies
    assert (False, True) == (fetched.set_cookies, fetched.sent_cookies)


async def test_plain_answer_has_nothing_on_its_way(server: AdServer, make: Make) -> None:
    """An answer without redirects and cookies is told as that."""
    server.replies["/a"] = b"end"
    fetched = await fetch(make(server.url("/a")), server.url("/a"))

    assert (False, False, ()) == (fetched.set_cookies, fetched.sent_cookies, fetched.on_the_way)


# --- What an answer may depend on ---------------------------------------------------------------


def caching(upstream: VastUpstream, *vary: str, scope: Any = "viewer") -> VastUpstream:
    """Give *upstream* a cache whose answers depend on *vary*."""
    settings = CacheSettings(scope=scope, vary=tuple(map(Source.parse, vary)))
    cache = AnswerCache("main", settings, spawn=Tasks("test").spawn)
    protection = replace(upstream.protection, cache=cache)
    return VastUpstream(upstream.settings, upstream.client, upstream.now, protection)


def asked(
    upstream: VastUpstream,
    ad_request: AdRequest | None = None,
    params: Mapping[str, str] | None = None,
    **facts: Any,
) -> Asking:
    """Say what the answer to a new session's first request may depend on."""
    session = a_session(upstream, ad_request, **facts)
    return upstream.asking(session, upstream.entry_url(session, params), params)


def keyed(upstream: VastUpstream, *args: Any, **facts: Any) -> str:
    """Give the key of a new session's first request."""
    assert upstream.cache is not None
    return key_of(upstream.name, upstream.cache.settings, asked(upstream, *args, **facts))


BALANCER = FrozenMapping({"user-agent": "balancer", "x-forwarded-for": "192.0.2.200"})
"""Headers of a trusted proxy, which tells of the device in others."""


def behind(agent: str, ip: str) -> AdRequest:
    """Build the request of a device behind a trusted proxy."""
    return AdRequest("/", headers=BALANCER, device=Device(ip=ip, user_agent=agent))


async def test_key_has_what_is_told_of_the_device(make: Make) -> None:
    """Declared headers stand for what the ad server is told, not for a trusted proxy's own."""
    upstream = caching(make("http://a.example/x"), "header:User-Agent", "header:X-Forwarded-For")
    tv = behind("TV", "192.0.2.1")

    assert keyed(upstream, tv) == keyed(upstream, behind("TV", "192.0.2.1"))
    assert keyed(upstream, tv) != keyed(upstream, behind("phone", "192.0.2.1"))
    assert keyed(upstream, tv) != keyed(upstream, behind("TV", "192.0.2.2"))


@pytest.mark.parametrize("name", ["Referer", "Accept-Language"])
async def test_key_has_what_is_told_under_another_name(make: Make, name: str) -> None:
    """A declared header counts by what is told in its place, in a header for the device's."""
    upstream = caching(make("http://a.example/x"), f"header:{name}")
    fact = name.lower().replace("-", "_")
    devices = [Device(**{fact: each}) for each in ("a", "b")]
    first, second = (AdRequest("/", headers=BALANCER, device=each) for each in devices)

    assert keyed(upstream, first) == keyed(upstream, first)
    assert keyed(upstream, first) != keyed(upstream, second)


async def test_key_has_what_the_device_said(make: Make) -> None:
    """A declared header that is told in no header of its own counts by what the request had."""
    upstream = caching(make("http://a.example/x", user_agent="proxy"), "header:X-Kind")
    kinds = [AdRequest("/", headers=FrozenMapping({"x-kind": each})) for each in ("a", "b")]

    assert keyed(upstream, kinds[0]) != keyed(upstream, kinds[1])
    assert keyed(upstream, behind("TV", "192.0.2.1")) == keyed(upstream, behind("phone", "::1"))


async def test_key_has_forwarded_cookies(make: Make) -> None:
    """Answers to different forwarded cookies are kept apart: the ad server saw them."""
    upstream = caching(make("http://a.example/x"))

    assert keyed(upstream, cookies={"uid": "a"}) == keyed(upstream, cookies={"uid": "a"})
    assert keyed(upstream, cookies={"uid": "a"}) != keyed(upstream, cookies={"uid": "b"})
    assert keyed(upstream, cookies={"uid": "a"}) != keyed(upstream, cookies={"id": "a"})
    assert keyed(upstream, cookies={"uid": "a"}) != keyed(upstream)


async def test_key_has_further_parameters(make: Make) -> None:
    """Parameters that the caller adds tell requests apart."""
    upstream = caching(make("http://a.example/x"))

    assert keyed(upstream, None, {"slot": "pre"}) == keyed(upstream, None, {"slot": "pre"})
    assert keyed(upstream, None, {"slot": "pre"}) != keyed(upstream, None, {"slot": "mid"})


async def test_key_has_macros_of_the_route(make: Make) -> None:
    """Macros that the route takes from the request tell requests apart."""
    upstream = caching(make("http://a.example/x?c=[CONTENTID]"))

    assert keyed(upstream, macros={"CONTENTID": "1"}) == keyed(upstream, macros={"CONTENTID": "1"})
    assert keyed(upstream, macros={"CONTENTID": "1"}) != keyed(upstream, macros={"CONTENTID": "2"})


async def test_key_has_nothing_that_changes_each_time(make: Make) -> None:
    """Random numbers, the time, and the session's parameters are in no key."""
    upstream = caching(
        make(
            "http://a.example/x?r=[CACHEBUSTING]&c=[CORRELATOR]&t=[TIMESTAMP]&i=[TRANSACTIONID]",
            session_params=("correlator", "timestamp"),
        )
    )
    keys, urls = set(), set()
    times = iter([NOW, NOW + 1, NOW + 2])
    factory = SessionFactory(is_public_suffix=lambda _: False, now=lambda: next(times))
    for _ in range(3):
        session = factory.open_session(factory.context(), upstream, request=Request(AdRequest("/")))
        urls.add(url := upstream.entry_url(session))
        keys.add(upstream.asking(session, url).url)

    assert (3, 1) == (len(urls), len(keys))


async def test_key_has_no_correlator_of_the_player(make: Make) -> None:
    """What the proxy puts its own correlator into tells nothing apart, whatever the player sent."""
    upstream = caching(make("http://a.example/x"))

    def of(query: str) -> str:
        """Give the key of a request with *query*."""
        return keyed(upstream, forward_query=query, correlator_params=("corr",))

    assert of("corr=1&slot=a") == of("corr=2&slot=a")
    assert of("corr=1&slot=a") != of("corr=1&slot=b")


async def test_key_has_own_headers(make: Make) -> None:
    """The upstream's own headers count by value and by name: a reload may give it others."""
    one, other = (caching(make("http://a.example/x", headers={name: "{query.a}"})) for name in "AB")
    first, second = (AdRequest("/", query=Query(f"a={each}")) for each in "12")

    assert keyed(one, first) == keyed(one, first)
    assert keyed(one, first) != keyed(one, second)
    assert keyed(one, first) != keyed(other, first)


@pytest.mark.parametrize(
    ("host", "forwarded", "scope", "has"),
    [
        ("a.example", None, "chain", True),
        ("b.example", None, "chain", False),
        ("", None, "chain", False),
        ("", {"uid": "me"}, "chain", True),
        ("a.example", {"uid": "me"}, "off", False),
    ],
)
async def test_sent_cookies_are_told_beforehand(
    make: Make, host: str, forwarded: dict[str, str] | None, scope: str, *, has: bool
) -> None:
    """Before anything is asked it is known whether a Cookie header would go to the endpoint."""
    upstream = caching(make("http://a.example/x", cookies=scope))
    session = a_session(upstream, cookies=forwarded)
    session.jar.put("seen", "1", host)

    assert has == upstream.asking(session, "http://a.example/x").has_cookies


async def test_who_waits_gives_up_in_time(make: Make) -> None:
    """Who waits for another's answer has the time of a hop, or what the deadline leaves of it."""
    upstream = caching(make("http://a.example/x", timeout=2.0))
    now = asyncio.get_running_loop().time()

    assert 2.0 == pytest.approx(asked(upstream).deadline - now, abs=0.5)
    assert now + 1 > asked(upstream, deadline=now + 1).deadline


# --- Without a configuration --------------------------------------------------------------------


async def test_opened_upstream_is_asked_like_any_other(server: AdServer) -> None:
    """What is opened from a URL has parameters, headers, a name, and sessions that count."""
    server.replies["/vast"] = b'<VAST version="4.2"/>'
    state = InMemoryBackend()
    async with VastUpstream.open(
        server.url("/vast?own=1"),
        name="exchange",
        params={"slot": "pre", "v": "{viewer}"},
        headers={"X-Key": "secret"},
    ) as upstream:
        context = SessionFactory().context(correlator="77", cookies={"uid": "me"})
        async with await upstream.create_session(context, state_backend=state) as session:
            await session.request(params={"more": "a b"})
            await session.track_budget("spring", 1)
    (received,) = server.requests

    assert received.target.startswith("/vast?own=1&slot=pre&v=me&more=a%20b&correlator=77&timest")
    assert "secret" == received.header("X-Key")
    assert {"uid": "me"} == received.cookies
    assert 1 == await state.get_spend("budget:spring")
    assert "exchange" == upstream.name


async def test_opened_upstream_has_a_limit_and_an_end(server: AdServer) -> None:
    """Its time-out holds, and leaving it closes its client."""
    server.replies["/slow"] = Reply(delay=30)
    async with VastUpstream.open(server.url("/slow"), timeout=0.1) as upstream:
        session = await upstream.create_session(SessionFactory().context())
        with pytest.raises(UpstreamTimeoutError, match=r"in 0\.1 s"):
            await session.request()

    assert "<AiohttpClient closed>" == repr(upstream.client)


@pytest.mark.parametrize(
    ("allow", "reached"), [((), False), (("127.0.0.1",), True), (("127.0.0.0/8",), True)]
)
async def test_opened_upstream_guards_its_hops(
    server: AdServer, allow: tuple[str, ...], *, reached: bool
) -> None:
    """Its endpoint may be anywhere; where that leads to may be private only if it is said."""
    server.replies |= {"/in": Reply(status=302, headers=(("Location", "/end"),)), "/end": b"<x/>"}
    async with VastUpstream.open(server.url("/in"), egress_allow=allow) as upstream:
        session = await upstream.create_session(SessionFactory().context())
        with nullcontext() if reached else pytest.raises(EgressBlockedError):
            await session.request()

    assert reached == bool(server.seen("/end"))


@pytest.mark.parametrize(
    ("endpoint", "more"),
    [
        ("ads.example/vast", {}),
        ("http://ads.example/{what}", {}),
        ("http://u:p@ads.example/", {}),
        ("http://ads.example/", {"params": {"a": "{b"}}),
        ("http://ads.example/", {"egress_allow": ["here"]}),
    ],
)
async def test_what_cannot_be_asked_is_not_opened(endpoint: str, more: Any) -> None:
    """An endpoint, a parameter or a network that is none is told before anything is asked."""
    with pytest.raises(ValueError, match=r"write|begin|double|closed|header"):
        async with VastUpstream.open(endpoint, **more):
            pass
