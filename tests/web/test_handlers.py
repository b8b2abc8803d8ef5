"""What is believed of a request, and what every answer says to browsers."""

import socket
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from vastproxy.model import AdRequest, AdResponse, Device, clean
from vastproxy.web.handlers import (
    PIXEL,
    Networks,
    ad_request,
    answered,
    beacon_answer,
    cors,
    preflight,
    public_base,
    raw_path,
    refused,
)

UNIX = "unix"
TRUSTED: Networks = (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))
FORGED = (
    ("X-Forwarded-For", "6.6.6.6"),
    ("X-Device-IP", "6.6.6.6"),
    ("X-Device-User-Agent", "Forged"),
    ("X-Device-Referer", "http://forged/"),
    ("X-Device-Accept-Language", "xx"),
    ("X-Device-Requested-With", "forged"),
    ("X-Request-Id", "forged"),
)
OWN = (("User-Agent", "TV"), ("Referer", "http://p.example/"), ("Accept-Language", "de"))


class FakeTransport:
    """Says which address a request came from."""

    def __init__(self, peer: str, own: object = None) -> None:
        """Take the peer's address, and our *own* as a socket tells it."""
        self._peer = peer
        self._own = own

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Give the peer's address; for a Unix socket, the socket."""
        if name == "socket" and self._peer == UNIX:
            return SimpleNamespace(family=socket.AF_UNIX)
        if name == "sockname":
            return self._own
        known = name == "peername" and self._peer not in {"", UNIX}
        return (self._peer, 5000) if known else default

    def is_closing(self) -> bool:
        """Stay open."""
        return False


def a_request(
    path: str = "/ad", headers: Sequence[tuple[str, str]] = (), peer: str = "10.0.0.1"
) -> web.Request:
    """Build a request for *path* from *peer*; empty for one that is gone already."""
    transport: Any = FakeTransport(peer)
    return make_mocked_request("GET", path, headers=CIMultiDict(headers), transport=transport)


def read(
    path: str = "/ad", headers: Sequence[tuple[str, str]] = (), peer: str = "10.0.0.1"
) -> AdRequest:
    """Read a request as the proxy with ``TRUSTED`` does."""
    return ad_request(a_request(path, headers, peer), "/ad", "", trusted=TRUSTED, received=1.0)


@pytest.mark.parametrize("peer", ["192.0.2.1", "2001:db9::1", "11.0.0.1"])
def test_strangers_are_not_believed(peer: str) -> None:
    """Of what a stranger says about somebody else, nothing is believed."""
    request = read(headers=(*OWN, *FORGED), peer=peer)

    assert Device(peer, "TV", "http://p.example/", "de", forwarded_for=peer) == request.device
    assert "" == request.request_id


@pytest.mark.parametrize("peer", ["10.0.0.1", "2001:db8::1", "2001:db8::1%eth0", UNIX])
def test_trusted_are_believed(peer: str) -> None:
    """What a trusted proxy, or a Unix socket, says of the device is believed."""
    request = read(headers=(*OWN, *FORGED), peer=peer)

    assert ("6.6.6.6", "Forged", "http://forged/", "xx", "forged") == (
        request.device.ip,
        request.device.user_agent,
        request.device.referer,
        request.device.accept_language,
        request.device.requested_with,
    )
    assert "forged" == request.request_id


def test_nobody_there_is_not_believed() -> None:
    """A connection that is gone has no address, and is no Unix socket for that."""
    request = read(headers=(*OWN, *FORGED), peer="")

    assert Device("", "TV", "http://p.example/", "de") == request.device
    assert "" == request.request_id


def test_trusted_that_tell_nothing() -> None:
    """Where a trusted proxy tells nothing of the device, its own headers count."""
    request = read(headers=OWN)

    assert ("10.0.0.1", "TV", "http://p.example/", "de") == (
        request.device.ip,
        request.device.user_agent,
        request.device.referer,
        request.device.accept_language,
    )


@pytest.mark.parametrize(
    ("chain", "ip"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("6.6.6.6, 198.51.100.7", "198.51.100.7"),
        ("6.6.6.6, 198.51.100.7, 10.1.1.1", "198.51.100.7"),
        ("6.6.6.6,198.51.100.7,10.1.1.1,2001:db8::7", "198.51.100.7"),
        ("10.1.1.1, 10.2.2.2", "10.1.1.1"),
        ("198.51.100.7:5555", "198.51.100.7"),
        ("[2001:db9::1]:5555", "2001:db9::1"),
        ("2001:DB9::1", "2001:db9::1"),
        (" , 198.51.100.7 ,, ", "198.51.100.7"),
        ("198.51.100.7, unknown", "10.0.0.1"),
        ("unknown", "10.0.0.1"),
        ("198.51.100.7, _hidden, 10.1.1.1", "10.0.0.1"),
        ("", "10.0.0.1"),
        (",", "10.0.0.1"),
    ],
)
def test_forwarded_for(chain: str, ip: str) -> None:
    """The device is the last address of the chain that is none of ours; before it may be forged."""
    assert ip == read(headers=(("X-Forwarded-For", chain),)).device.ip


def test_forwarded_for_in_several_lines() -> None:
    """Several lines are one chain (RFC 9110 section 5.3): the proxy's own line is the last."""
    lines = (("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "198.51.100.7"))
    device = read(headers=lines).device

    assert "198.51.100.7" == device.ip
    assert "6.6.6.6, 198.51.100.7, 10.0.0.1" == device.forwarded_for


@pytest.mark.parametrize("address", ["", "unknown", "1.2.3", "6.6.6.6, 7.7.7.7", "x:1", "[::x]"])
def test_device_ip_that_is_none(address: str) -> None:
    """An X-Device-IP that is no address is passed over."""
    headers = (("X-Device-IP", address), ("X-Forwarded-For", "198.51.100.7"))

    assert "198.51.100.7" == read(headers=headers).device.ip


def test_way_here_is_kept() -> None:
    """The chain so far, and the peer at its end, are there to be appended to."""
    chain = (("X-Forwarded-For", "6.6.6.6,198.51.100.7"),)

    assert "6.6.6.6, 198.51.100.7, 10.0.0.1" == read(headers=chain).device.forwarded_for
    assert "6.6.6.6, 198.51.100.7" == read(headers=chain, peer=UNIX).device.forwarded_for


def test_nobody_is_trusted_by_default() -> None:
    """Without trusted proxies not even loopback is believed."""
    request = ad_request(
        a_request(headers=FORGED, peer="127.0.0.1"), "/ad", "", trusted=(), received=0.0
    )

    assert ("127.0.0.1", "") == (request.device.ip, request.request_id)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a%2Fb/../c;d?x", "/a%2Fb/../c;d"),
        ("/?", "/"),
        ("http://other.example/a/b?c=/d", "/a/b"),
        ("http://other.example", "/"),
        ("http://other.example?x=/y", "/"),
        ("HTTPS://other.example//a", "//a"),
    ],
)
def test_raw_path(path: str, expected: str) -> None:
    """The path is given as it was sent; of a request in absolute form, what is behind the host."""
    assert expected == raw_path(a_request(path))


def test_query_and_rest_are_as_sent() -> None:
    """The query is given byte for byte, as are the rest of the path and the time."""
    request = ad_request(
        a_request("/ad/x?a=%2f&b=[C]&&=?d#e"), "/ad", "x%2F", trusted=(), received=7.5
    )

    assert ("/ad", "x%2F", "a=%2f&b=[C]&&=?d", 7.5) == (
        request.route,
        request.rest,
        request.query.raw,
        request.received,
    )


@given(text=st.text(alphabet=st.characters(), max_size=20))
def test_clean_text_can_be_encoded(text: str) -> None:
    """Any text is made one that can be encoded, and ASCII is not touched."""
    assert clean(text) == clean(text).encode().decode()
    assert not text.isascii() or text == clean(text)


@pytest.mark.parametrize(
    ("origin", "allowed", "credentials"),
    [
        (None, "*", None),
        ("", "*", None),
        ("null", "*", None),
        ("https://p.example", "https://p.example", "true"),
        ("http://p.example:8080", "http://p.example:8080", "true"),
        ("app://tv", "app://tv", "true"),
    ],
)
def test_cors(origin: str | None, allowed: str, credentials: str | None) -> None:
    """An origin is echoed with credentials; without one anybody may read, without credentials."""
    headers = cors(a_request(headers=(("Origin", origin),) if origin is not None else ()))

    assert [allowed] == headers.getall("Access-Control-Allow-Origin")
    assert credentials == headers.get("Access-Control-Allow-Credentials")
    assert "Origin" == headers["Vary"]
    exposed = headers["Access-Control-Expose-Headers"]
    assert "X-Request-Id, Server-Timing, Cache-Status" == exposed


def browser_headers(headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Give what lets a browser read an answer."""
    names = ("Access-Control-Allow-Origin", "Access-Control-Allow-Credentials")
    return headers.get(names[0]), headers.get(names[1])


def test_every_answer_can_be_read() -> None:
    """An answer, an error and the answer to a preflight all carry the headers of CORS."""
    request = a_request(headers=(("Origin", "https://p.example"),))
    answers = (
        answered(request, AdResponse(b"<VAST/>", "r1"), 0.1),
        refused(request, 404, "no"),
        preflight(request),
    )

    assert {("https://p.example", "true")} == {browser_headers(each.headers) for each in answers}


def test_answer() -> None:
    """An ad response is XML in UTF-8 that nobody stores, with its id and its timings."""
    response = AdResponse(b"<VAST/>", "r1", timings=(("hop1", 12.34), ("hop2", 5.0)))
    reply = answered(a_request(), response, 0.02)

    assert (200, b"<VAST/>") == (reply.status, reply.body)
    assert "application/xml; charset=utf-8" == reply.headers["Content-Type"]
    assert "no-store" == reply.headers["Cache-Control"]
    assert "r1" == reply.headers["X-Request-Id"]
    assert "hop1;dur=12.3, hop2;dur=5.0, total;dur=20.0" == reply.headers["Server-Timing"]


def test_cache_status() -> None:
    """What caches did stands in a header, one member for each; without any there is none."""
    members = ("vastproxy; hit; ttl=9; detail=a", "vastproxy; fwd=uri-miss; detail=b")
    reply = answered(a_request(), AdResponse(b"", "r1", cache_status=members), 0.02)

    assert ", ".join(members) == reply.headers["Cache-Status"]
    assert "Cache-Status" not in answered(a_request(), AdResponse(b"", "r1"), 0.02).headers


def test_preflight() -> None:
    """A preflight is told the methods, and the headers that it asked for."""
    reply = preflight(a_request(headers=(("Access-Control-Request-Headers", "x-a, x-b"),)))

    assert 204 == reply.status
    assert "GET, HEAD, OPTIONS" == reply.headers["Access-Control-Allow-Methods"]
    assert "x-a, x-b" == reply.headers["Access-Control-Allow-Headers"]
    assert "86400" == reply.headers["Access-Control-Max-Age"]
    assert "Access-Control-Allow-Headers" not in preflight(a_request()).headers


def test_refusals() -> None:
    """A refusal says why in a line of text; for a wrong method, which are right."""
    missing, wrong = refused(a_request(), 404, "no route"), refused(a_request(), 405, "use GET")

    assert (404, "no route\n") == (missing.status, missing.text)
    assert (405, "GET, HEAD, OPTIONS") == (wrong.status, wrong.headers["Allow"])
    assert "Allow" not in missing.headers


# --- Where the player reached the proxy ---------------------------------------------------------

OWN_ADDRESS = ("192.0.2.80", 8080)


def base(
    *headers: tuple[str, str],
    peer: str = "192.0.2.1",
    own: object = OWN_ADDRESS,
    tls: bool = False,
) -> str:
    """Give the base of a request with *headers* from *peer*, a stranger."""
    transport: Any = FakeTransport(peer, own)
    context: Any = tls or None
    request = make_mocked_request(
        "GET", "/ad", headers=CIMultiDict(headers), transport=transport, sslcontext=context
    )
    return public_base(request, TRUSTED)


FORWARDED = (("X-Forwarded-Proto", "https"), ("X-Forwarded-Host", "ads.example.com"))


@pytest.mark.parametrize(
    "host",
    [
        "p.example",
        "p.example:8080",
        "P.Example",
        "localhost",
        "10.0.0.1:1",
        "[::1]",
        "[2001:db8::1]:8080",
        "a_b.example",
        "xn--e1afmkfd.example",
        "p.example.",
    ],
)
def test_base_is_the_host(host: str) -> None:
    """A player reached the proxy where its Host says."""
    assert f"http://{host}" == base(("Host", host))


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "a b",
        "evil@p.example",
        "p.example/path",
        "p.example?q",
        "p.example#f",
        "p.example\\x",
        "<script>",
        '"onload="',
        "p.example:",
        "p.example:port",
        "p.example:123456",
        "p.example:80:80",
        "p.example\r\nX: 1",
        "p.example\n",
        "\x00",
        "-p.example",
        ".p.example",
        "é.example",
        "\u0661.example",
        "[::1",
        "::1",
        "[::1]x",
        "[fe80::1%25eth0]",
        "[]",
        "a" * 255,
        "a" * 100_000,
        "javascript:alert(1)",
        "]]>",
    ],
    ids=lambda host: repr(host[:30]),
)
def test_host_that_is_none(host: str) -> None:
    """A Host that is none is passed over: it is the address that the connection came to."""
    assert "http://192.0.2.80:8080" == base(("Host", host))


@given(host=st.text(max_size=300))
def test_any_host(host: str) -> None:
    """Whatever a Host is, the base is one that can stand in a document, and holds no path."""
    found = base(("Host", host))

    assert found.startswith("http://")
    assert found.isascii()
    assert found.isprintable()
    assert set("/<>\"' @?#\\").isdisjoint(found.removeprefix("http://"))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (("127.0.0.1", 80), "http://127.0.0.1:80"),
        (("::1", 8080, 0, 0), "http://[::1]:8080"),
        ("/run/vastproxy.sock", "http://localhost"),
        ("", "http://localhost"),
        (None, "http://localhost"),
    ],
)
def test_own_address(own: object, expected: str) -> None:
    """Without a Host it is our own address; of a Unix socket there is none."""
    assert expected == base(own=own)


def test_no_host() -> None:
    """A request of HTTP/1.0 has no Host, and a base all the same."""
    assert "http://192.0.2.80:8080" == base()


def test_strangers_forward_nothing() -> None:
    """What a stranger says of another host is not believed."""
    assert "http://p.example" == base(("Host", "p.example"), *FORWARDED)
    assert "http://p.example" == base(("Host", "p.example"), *FORWARDED, peer="")


@pytest.mark.parametrize("peer", ["10.0.0.1", "2001:db8::1", UNIX])
def test_trusted_proxy_says_where(peer: str) -> None:
    """What a trusted proxy, or a Unix socket, says of host and scheme is believed."""
    assert "https://ads.example.com" == base(("Host", "inner:8080"), *FORWARDED, peer=peer)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("X-Forwarded-Proto", "https")], "https://inner"),
        ([("X-Forwarded-Proto", "HTTPS")], "https://inner"),
        ([("X-Forwarded-Proto", " https , http")], "https://inner"),
        ([("X-Forwarded-Proto", "http,https")], "http://inner"),
        ([("X-Forwarded-Proto", "javascript")], "http://inner"),
        ([("X-Forwarded-Proto", "")], "http://inner"),
        ([("X-Forwarded-Host", "a.example:1, b.example")], "http://a.example:1"),
        ([("X-Forwarded-Host", "")], "http://inner"),
        ([("X-Forwarded-Host", "evil@x")], "http://192.0.2.80:8080"),
    ],
)
def test_what_trusted_proxies_may_say(headers: list[tuple[str, str]], expected: str) -> None:
    """The outermost of several proxies counts; what is no host, or no scheme, is passed over."""
    assert expected == base(("Host", "inner"), *headers, peer="10.0.0.1")


def test_connection_by_tls() -> None:
    """What came encrypted goes back so, unless a trusted proxy knows better."""
    plain = ("X-Forwarded-Proto", "http")

    assert "https://p.example" == base(("Host", "p.example"), tls=True)
    assert "https://p.example" == base(("Host", "p.example"), plain, tls=True)
    assert "http://p.example" == base(("Host", "p.example"), plain, tls=True, peer="10.0.0.1")


# --- Beacons ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "accept", "status", "body"),
    [
        ("t", "", 204, None),
        ("t", "*/*", 204, None),
        ("t", "text/html,image/webp", 204, None),
        ("t.gif", "", 200, PIXEL),
        ("t", "image/*", 200, PIXEL),
        ("t", "image/avif,image/webp,*/*;q=0.8", 200, PIXEL),
    ],
)
def test_picture(token: str, accept: str, status: int, body: bytes | None) -> None:
    """A beacon is answered with nothing, or with a picture where one is wanted."""
    headers = (("Accept", accept), ("Origin", "https://p.example"))
    reply = beacon_answer(a_request(headers=headers), token, 204)

    assert (status, body) == (reply.status, reply.body)
    assert ("image/gif" if body else None) == reply.headers.get("Content-Type")
    assert "no-store" == reply.headers["Cache-Control"]
    assert ("https://p.example", "true") == browser_headers(reply.headers)


def test_refused_beacon_is_no_picture() -> None:
    """A beacon that is refused has no picture: nobody should take it for counted."""
    reply = beacon_answer(a_request(headers=(("Accept", "image/*"),)), "t.gif", 403)

    assert (403, None) == (reply.status, reply.body)


def test_pixel() -> None:
    """The picture is a GIF of one point."""
    assert b"GIF89a\x01\x00\x01\x00" == PIXEL[:10]
    assert b";" == PIXEL[-1:]
