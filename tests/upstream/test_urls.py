"""URLs go out as ad servers wrote them, but for what cannot stand on a request line."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.ad_server import EMPTY_VAST, AdServer
from vastproxy.errors import RedirectError
from vastproxy.model import HopRequest
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.urls import MAX_AUTHORITY, extended, joined, target, with_parameter

KEPT = (
    "/a%2Fb%2f%3A?u=http%3A%2F%2Fx%2Fy%3Fz",
    "/x?a=[X]&b=%%X%%&c=${X}&d={X}&e=__X__",
    "/x;p=1;q='2'?r=a;b&s=(t)*!~,$@+",
    "/x?a={b}&c=d|e&f=g^h&i=`j`&k=l\\m",
    "/a//b/../c/./d/..",
    "/?",
    "/x?&&a=&=b&?c?",
    "/%",
    "/%zz?%u00fc",
    "/x?a=b+c&d=e/f?g:h@i",
)
"""Paths and queries of which not a byte may change."""

CHANGED = (
    ("/a b", "/a%20b"),
    ('/x?q="<>"', "/x?q=%22%3C%3E%22"),
    ("/ü?ü", "/%C3%BC?%C3%BC"),
    ("/\U0001f600", "/%F0%9F%98%80"),
    ("/\x01\x7f\x00", "/%01%7F%00"),
    ("/x?a=%20 b", "/x?a=%20%20b"),
    ("/\udc85", "/%3F"),
    ("/\u2028\xa0x", "/%E2%80%A8%C2%A0x"),
)
"""Paths and queries with what may not stand on a request line, and what goes out for it."""

_ON_THE_WIRE = re.compile("[!-~]+")
_PIECES = (
    *(
        "http://",
        "https:",
        "//",
        "/",
        "?",
        "#",
        "@",
        ":",
        "[",
        "]",
        "%",
        "%2F",
        "\\",
        ";",
        "..",
        "&",
    ),
    *(
        "a.example",
        "127.0.0.1",
        "[::1]",
        "\uff18\uff10",
        "\uff11",
        "ü",
        "\u3002",
        "\xad",
        "\u200d",
        "xn--",
    ),
    *(" ", "\t", "\n", "\x00", "\x7f", "\ud800", '"', "<", "{x}", "[X]", "99999", "0", "-"),
)
NEARLY_URLS = st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=8).map("".join)


@pytest.mark.parametrize("rest", KEPT)
def test_bytes_are_kept(rest: str) -> None:
    """Escapes, macros in any spelling, dot segments and odd characters stay as they are."""
    assert f"https://a.example{rest}" == target(f"https://a.example{rest}").url


@pytest.mark.parametrize(("rest", "sent"), CHANGED)
def test_what_cannot_be_sent_is_encoded(rest: str, sent: str) -> None:
    """Blanks, quotes, angle brackets, controls and non-ASCII are percent-encoded as UTF-8."""
    assert f"https://a.example{sent}" == target(f"https://a.example{rest}").url


def test_line_breaks_are_dropped() -> None:
    """Tabs and line breaks vanish wherever they stand, and blanks around a URL too."""
    found = target(" \n\tht\ntp://a.exa\r\nmple/x\r\n\t/y?a=\nb \n")

    assert "http://a.example/x/y?a=b" == found.url


def test_fragment_is_not_sent() -> None:
    """A fragment is cut off, with or without a path before it."""
    assert "http://a.example/x?y" == target("http://a.example/x?y#z?#").url
    assert "http://a.example/" == target("http://a.example#z").url


@pytest.mark.parametrize(
    ("url", "sent", "path"),
    [
        ("http://a.example", "http://a.example/", "/"),
        ("http://a.example?x=/y", "http://a.example/?x=/y", "/"),
        ("http://a.example/x?y/z", "http://a.example/x?y/z", "/x"),
        ("http://a.example/x;y?z", "http://a.example/x;y?z", "/x;y"),
    ],
)
def test_path_is_never_empty(url: str, sent: str, path: str) -> None:
    """An empty path becomes a slash; the path alone has no query."""
    assert (sent, path) == (target(url).url, target(url).path)


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port"),
    [
        ("http://a.example/", "http", "a.example", 80),
        ("https://a.example/", "https", "a.example", 443),
        ("HTTPS://A.Example:8443/", "https", "a.example", 8443),
        ("http://a.example:/", "http", "a.example", 80),
        ("http://127.0.0.1:1/", "http", "127.0.0.1", 1),
        ("http://[2001:DB8::1]:81/", "http", "[2001:db8::1]", 81),
        ("http://b\u00fccher.example/", "http", "xn--bcher-kva.example", 80),
        ("http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/", "http", "127.0.0.1", 80),
        ("http:a.example/x", "http", "a.example", 80),
        ("http:/a.example/x", "http", "a.example", 80),
        ("http://a.example\\@b.example/", "http", "a.example", 80),
        ("http://a.example#@b.example/", "http", "a.example", 80),
        ("http://a.example?@b.example/", "http", "a.example", 80),
    ],
)
def test_host_and_port(url: str, scheme: str, host: str, port: int) -> None:
    """The host that is asked is read as browsers read it: in ASCII, lower case, with its port."""
    found = target(url)

    assert (scheme, host, port) == (found.scheme, found.host, found.port)
    assert ("https" == scheme) == found.is_secure


def test_userinfo_is_not_the_host() -> None:
    """What stands before the last ``@`` of an authority is no host, and is still there to see."""
    found = target("http://b.example:80@c@a.example:81/x")

    assert ("a.example", 81) == (found.host, found.port)
    assert "http://b.example:80@c@a.example:81/x" == found.url


@pytest.mark.parametrize(
    "url",
    [
        *("", " ", "x", "/x", "//a.example/x", "?x", "about:blank", "javascript:alert(1)"),
        *("ftp://a.example/", "file:///etc/passwd", "unix:/run/x", "httpx://a.example/", "http"),
        *("http://", "http:///x", "http://?x", "http://#x", "http://:80/", "http://u@/x"),
        *("http://[::1/", "http://a.example:99999/", "http://a.example:x/", "http://\u200b/"),
        *(f"http://a{each}b.example/" for each in "~!$&'()*+,;=|^`{}"),
        *("http://a%41.example/", "http://a%2Fb.example/", "http://a%00.example/"),
        *(f"http://{'u' * MAX_AUTHORITY}@a.example/", "http://" + "a." * MAX_AUTHORITY),
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    """What is no http or https URL with a host is refused, in one line."""
    with pytest.raises(RedirectError) as refusal:
        target(url)

    assert "\n" not in str(refusal.value)


def test_longest_authority() -> None:
    """User, host and port may be so long together, and no longer."""
    rest = "@a_b-1.example:8080"
    user = "u" * (MAX_AUTHORITY - len(rest))

    assert "a_b-1.example" == target(f"http://{user}{rest}/x").host
    with pytest.raises(RedirectError, match=f"{MAX_AUTHORITY + 1} characters"):
        target(f"http://{user}u{rest}/x")


@given(url=NEARLY_URLS)
@example("http://a b/")
@example("http://u v@a.example/")
@example("http://a\u3000b/")
@example("http://a\x01b/")
def test_target_is_fit_for_the_wire(url: str) -> None:
    """Any text is refused, or has only characters that may stand on a request line."""
    try:
        found = target(url)
    except RedirectError:
        return

    assert _ON_THE_WIRE.fullmatch(found.url)
    assert _ON_THE_WIRE.fullmatch(found.host)
    assert found.path.startswith("/")


@given(url=NEARLY_URLS)
def test_quoting_twice_changes_nothing(url: str) -> None:
    """What is quoted once is not quoted again."""
    try:
        found = target(url)
    except RedirectError:
        return

    assert found == target(found.url)


@given(base=NEARLY_URLS, location=NEARLY_URLS)
def test_joining_gives_text_or_refuses(base: str, location: str) -> None:
    """Any redirect gives a URL, whatever it is, or is refused."""
    try:
        url = joined(f"http://a.example/{base}", location)
    except RedirectError:
        return

    assert "" != url


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://b.example/x?[Y]&%zz#f", "https://b.example/x?[Y]&%zz#f"),
        ("http://b.example", "http://b.example"),
        ("//b.example/x?a=%2F", "http://b.example/x?a=%2F"),
        ("/x?a=[X]&b=%%X%%;c", "http://a.example/x?a=[X]&b=%%X%%;c"),
        ("x;y?u=http://c/../d", "http://a.example/p/x;y?u=http://c/../d"),
        ("../../x", "http://a.example/x"),
        ("./x/.", "http://a.example/p/x/"),
        ("?y=1", "http://a.example/p/q?y=1"),
        (" /x\n", "http://a.example/x"),
        ("y//z;", "http://a.example/p/y//z;"),
        ("y?", "http://a.example/p/y?"),
        ("//b.example/x?", "http://b.example/x?"),
    ],
)
def test_locations_are_joined(location: str, url: str) -> None:
    """Relative targets are resolved by RFC 3986 section 5; absolute ones stay as they are."""
    assert url == joined("http://a.example/p/q?r=s", location)


@pytest.mark.parametrize("location", ["", "  "])
def test_location_that_leads_nowhere(location: str) -> None:
    """A redirect without a usable target is refused."""
    with pytest.raises(RedirectError):
        joined("http://a.example/", location)


def test_parameter_is_replaced_where_it_is() -> None:
    """Every value of a parameter is replaced; other names, and the other bytes, stay."""
    url = "/x?correlator=&a.correlator=1&Xcorrelator=2;correlator=[X]&b=%2f#correlator=3"

    assert (
        "/x?correlator=7&a.correlator=1&Xcorrelator=2;correlator=7&b=%2f#correlator=3"
        == with_parameter(url, "correlator", "7")
    )
    assert "/x?a=1" == with_parameter("/x?a=1", "correlator", "7")
    assert r"/x?c=\1\g<0>" == with_parameter("/x?c=1", "c", r"\1\g<0>")


@pytest.mark.parametrize(
    ("url", "result"),
    [
        ("http://a/x", "http://a/x?q=1"),
        ("http://a/x?", "http://a/x?q=1"),
        ("http://a/x?b", "http://a/x?b&q=1"),
        ("http://a/x?b&", "http://a/x?b&q=1"),
        ("http://a/x?b#c", "http://a/x?b&q=1#c"),
        ("http://a/x#c?d", "http://a/x?q=1#c?d"),
    ],
)
def test_query_is_extended(url: str, result: str) -> None:
    """A query is appended before the fragment, by the mark that is needed."""
    assert result == extended(url, "q=1")
    assert url == extended(url, "")


@pytest.mark.parametrize(
    ("rest", "sent"),
    [*((each, each) for each in KEPT), ("/p?", "/p?"), ("/p??", "/p??"), ("?", "/?"), *CHANGED],
)
async def test_wire_has_exactly_these_bytes(rest: str, sent: str) -> None:
    """What the client puts on the request line is what quoting gave, byte for byte."""
    async with AdServer(fallback=EMPTY_VAST) as server, AiohttpClient(EgressPolicy()) as client:
        url = target(server.url(rest)).url
        deadline = 5 + server.loop.time() if server.loop else 0
        await client.get(HopRequest(url, (), trusted=True, max_body=1000), deadline)

    assert [f"GET {sent} HTTP/1.1".encode()] == [each.line for each in server.requests]
