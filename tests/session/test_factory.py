"""The context of a new ad request, and what the proxy knows of its macros."""

import uuid
from dataclasses import replace

import pytest

from vastproxy import __version__
from vastproxy.config.template import Template
from vastproxy.model import AdRequest, Device
from vastproxy.session.factory import MAX_VALUE, SessionFactory, TimestampStyle, macros_of
from vastproxy.session.seals import ViewerNames
from vastproxy.session.session import Request
from vastproxy.state.memory import InMemoryBackend
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.upstream import UpstreamSettings, VastUpstream
from vastproxy.vast.macros import Macros

NOON = 1_795_435_200.123


@pytest.fixture
def factory() -> SessionFactory:
    """Give a factory whose clock stands still, and for which no name is a public suffix."""
    return SessionFactory(is_public_suffix=lambda _: False, now=lambda: NOON)


def a_request(*, macros: dict[str, str] | None = None, **device: str) -> Request:
    """Build a request of a device that is described by *device*."""
    return Request(AdRequest("/", device=Device(**device)), macros=macros or {})


def known(
    factory: SessionFactory, request: Request | None = None, style: TimestampStyle = "unix_ms"
) -> Macros:
    """Give what is known of the macros of *request*."""
    return macros_of(factory.context(request_id="r1"), request or a_request(), style)


def test_context_has_the_time_in_milliseconds(factory: SessionFactory) -> None:
    """The timestamp is the factory's clock, in Unix milliseconds."""
    assert 1_795_435_200_123 == factory.context().timestamp


def test_context_takes_over_what_is_usable(factory: SessionFactory) -> None:
    """A usable request id and correlator are taken over as they are."""
    context = factory.context(request_id="edge:7/a+b=.-_", correlator="c&or=1")

    assert ("edge:7/a+b=.-_", "c&or=1") == (context.request_id, context.correlator)


@pytest.mark.parametrize(
    "given",
    ["", " ", "a b", "a\nb", "a\r\nX: 1", "ü", "\x00", "x" * 129, "a\u2028b", "\udc85", "a\n"],
)
def test_context_makes_what_is_not_usable(factory: SessionFactory, given: str) -> None:
    """A request id or correlator with anything odd in it, or too long, is replaced by a new one."""
    context = factory.context(request_id=given, correlator=given)

    assert 4 == uuid.UUID(context.request_id).version
    assert 0 < int(context.correlator) < 2**63


def test_contexts_are_each_new(factory: SessionFactory) -> None:
    """Two ad requests at one moment share neither id nor correlator."""
    one, two = factory.context(), factory.context()

    assert one.request_id != two.request_id
    assert one.correlator != two.correlator


def test_cookies_are_copied_into_the_context(factory: SessionFactory) -> None:
    """The player's cookies in the context are a copy, and can be hashed with it."""
    cookies = {"uid": "me"}
    context = factory.context(cookies=cookies)
    cookies["uid"] = "you"

    assert {"uid": "me"} == context.cookies
    assert isinstance(hash(context), int)


def test_jars_are_never_shared(factory: SessionFactory) -> None:
    """Each ad request has a jar of its own."""
    jar = factory.jar()
    jar.put("uid", "1", "a.example")

    assert 1 == len(jar)
    assert 0 == len(factory.jar())


def test_macros_of_the_session(factory: SessionFactory) -> None:
    """What the session knows by itself fills the macros of VAST 4.3 section 6."""
    context = factory.context(request_id="r1", correlator="77")
    macros = macros_of(context, a_request(), "unix_ms")

    assert "1795435200123" == macros.get("TIMESTAMP")
    assert context.cachebusting == macros.get("CACHEBUSTING")
    assert "77" == macros.get("CORRELATOR")
    assert context.transaction_id == macros.get("TRANSACTIONID")
    assert "1" == macros.get("SERVERSIDE")
    assert "video" == macros.get("ADTYPE")
    assert f"unknown%20vastproxy%2F{__version__}" == macros.get("CLIENTUA")
    assert (macros.get("SERVERUA") or "").startswith(f"vastproxy%2F{__version__}%20(https")


def test_timestamp_as_vast_4_has_it(factory: SessionFactory) -> None:
    """ISO 8601 timestamps have milliseconds and an offset, and are percent-encoded once."""
    macros = known(factory, style="iso8601")

    assert "2026-11-23T12%3A00%3A00.123%2B00%3A00" == macros.get("TIMESTAMP")


def test_macros_of_the_device(factory: SessionFactory) -> None:
    """Address, agent and page of the device fill their macros, encoded once."""
    request = a_request(ip="2001:db8::1", user_agent="TV 1/2", referer="https://p.example/a?b=c")
    macros = known(factory, request)

    assert "2001%3Adb8%3A%3A1" == macros.get("DEVICEIP")
    assert "TV%201%2F2" == macros.get("DEVICEUA")
    assert "https%3A%2F%2Fp.example%2Fa%3Fb%3Dc" == macros.get("PAGEURL")
    assert "p.example" == macros.get("DOMAIN")


def test_unknown_device_has_no_macros(factory: SessionFactory) -> None:
    """What is not known of the device has no value."""
    macros = known(factory)

    assert {None} == {macros.get(name) for name in ("DEVICEIP", "DEVICEUA", "PAGEURL", "DOMAIN")}


@pytest.mark.parametrize("referer", ["nonsense", "about:blank", "http://[::1", "http://[x]/", "//"])
def test_page_without_a_readable_host_has_no_domain(factory: SessionFactory, referer: str) -> None:
    """A referer that has no host, or is no URL, is an unknown domain and no failure."""
    assert "-1" == known(factory, a_request(referer=referer)).get("DOMAIN")


def test_route_knows_better(factory: SessionFactory) -> None:
    """A macro that the route sets wins over what the proxy would say."""
    request = a_request(user_agent="TV", macros={"DEVICEUA": "Phone", "IFA": "a b"})
    macros = known(factory, request)

    assert ("Phone", "a%20b") == (macros.get("DEVICEUA"), macros.get("IFA"))


def test_values_are_bounded(factory: SessionFactory) -> None:
    """Of what a player says, so much goes into a macro: page, agent, and what the route takes."""
    long = "x" * (MAX_VALUE + 1)
    request = a_request(user_agent=long, referer=f"http://p.example/{long}", macros={"IFA": long})
    macros = known(factory, request)

    assert "x" * MAX_VALUE == macros.get("DEVICEUA") == macros.get("IFA")
    assert MAX_VALUE == len((macros.get("PAGEURL") or "").replace("%2F", "/").replace("%3A", ":"))
    assert "p.example" == macros.get("DOMAIN")


def test_value_at_the_bound_is_whole(factory: SessionFactory) -> None:
    """The longest value that fits stays as it is."""
    assert "x" * MAX_VALUE == known(factory, a_request(user_agent="x" * MAX_VALUE)).get("DEVICEUA")


# --- Sessions for the library -------------------------------------------------------------------


def an_upstream(style: TimestampStyle = "unix_ms") -> VastUpstream:
    """Build an upstream that nobody asks."""
    settings = UpstreamSettings("main", Template.parse("http://x.example/{viewer}"))
    return VastUpstream(
        replace(settings, timestamp=style), AiohttpClient(EgressPolicy()), lambda: NOON
    )


async def test_ids_become_cookies() -> None:
    """Viewer, device and publisher are cookies of the context; ids that are empty are left out."""
    factory = SessionFactory(an_upstream())
    whole = await factory.create_session("u1", "d1", "p1")
    little = await factory.create_session(device_id="d1")

    assert {"uid": "u1", "device_id": "d1", "publisher_id": "p1"} == whole.context.cookies
    assert {"device_id": "d1"} == little.context.cookies
    assert "http://x.example/u1" == whole.upstream.entry_url(whole).partition("?")[0]


async def test_correlators_are_random() -> None:
    """Two sessions of one viewer at one moment have neither correlator nor request id in common."""
    factory = SessionFactory(an_upstream(), now=lambda: NOON)
    one, two = await factory.create_session("u1"), await factory.create_session("u1")

    assert one.context.timestamp == two.context.timestamp
    assert one.context.correlator != two.context.correlator
    assert one.context.request_id != two.context.request_id


async def test_factory_without_an_upstream_makes_no_session() -> None:
    """Without an upstream there is nobody to open a session at."""
    with pytest.raises(ValueError, match=r"write SessionFactory\(upstream, ...\)"):
        await SessionFactory().create_session("u1")


async def test_upstream_says_how_it_wants_the_time() -> None:
    """A session of the library fills the time as its upstream wants it."""
    factory = SessionFactory(an_upstream("iso8601"), now=lambda: NOON)
    session = await factory.create_session()

    assert "2026-11-23T12%3A00%3A00.123%2B00%3A00" == session.macros.get("TIMESTAMP")


async def test_factories_agree_on_viewers_unless_told_a_secret() -> None:
    """Two factories count one viewer as one; with secrets of their own, as two."""
    state = InMemoryBackend()
    usual = SessionFactory(an_upstream(), state), SessionFactory(an_upstream(), state)
    for each in (*usual, SessionFactory(an_upstream(), state, names=ViewerNames(["s" * 32]))):
        session = await each.create_session("u1")
        await session.check_frequency_cap("u1")
        await session.settle(shown=True)

    assert 2 == len(state._books)


def test_public_suffixes_are_known_without_being_asked_for() -> None:
    """A factory keeps cookies from crossing registries; the list is loaded when it is needed."""
    factory = SessionFactory()

    assert factory.is_public_suffix("co.uk")
    assert not factory.is_public_suffix("example.co.uk")


def test_repr_says_whom_it_asks_and_where_it_counts() -> None:
    """A factory tells its upstream and its state, and no secrets."""
    assert "<SessionFactory None, None>" == repr(SessionFactory())
