"""What ad servers see on the wire: the bytes of request lines, and the headers about the device."""

import re
import time
from urllib.parse import parse_qs

import pytest

from tests.functional.conftest import StartProxy
from tests.support.ad_server import AdServer, Received
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import Proxy, a_config

DEVICE_HEADERS = (
    "X-Device-IP",
    "X-Device-User-Agent",
    "X-Device-Referer",
    "X-Device-Accept-Language",
    "X-Forwarded-For",
    "User-Agent",
)

AGENT = "Player/1.0 (TV; de) [x]"

FORGED = (
    ("X-Device-IP", "203.0.113.1"),
    ("X-Device-User-Agent", "Other/2"),
    ("X-Device-Referer", "https://other.example/"),
    ("X-Device-Accept-Language", "fr"),
    ("X-Forwarded-For", "203.0.113.2"),
    ("User-Agent", AGENT),
    ("Referer", "https://page.example/watch?v=1"),
    ("Accept-Language", "de-DE, en;q=0.5"),
)
"""What a peer says of a device, besides its own headers."""


def wire_config(ads: AdServer, **server: object) -> dict[str, object]:
    """Build a config with a route for each way of making the entry's URL."""
    endpoint = f"{ads.url()}/{{rest}}"
    upstreams = {
        "plain": endpoint,
        "session": {"endpoint": endpoint, "session_params": ["correlator", "timestamp"]},
        "params": {"endpoint": f"{endpoint}?fixed=a%2Fb", "params": {"slot": "{query.s}"}},
        "iso": {"endpoint": endpoint, "macros": {"timestamp": "iso8601"}},
    }
    routes = [{"path": f"/{name}/{{rest}}", "upstreams": [name]} for name in upstreams]
    routes += [
        {"path": "/none/{rest}", "upstreams": ["plain"], "forward_query": "none"},
        {"path": "/some/{rest}", "upstreams": ["plain"], "forward_query": ["a", "c"]},
        {
            "path": "/own/{rest}",
            "upstreams": ["plain"],
            "correlator": "query:correlator",
            "correlator_params": ["correlator", "c"],
        },
    ]
    return a_config(upstreams, routes, server=server)


@pytest.fixture(scope="module")
def proxy(start_module_proxy: StartProxy, ad_server: AdServer) -> Proxy:
    """Run a proxy that believes nobody."""
    return start_module_proxy(wire_config(ad_server))


@pytest.fixture(scope="module")
def believing(start_module_proxy: StartProxy, ad_server: AdServer) -> Proxy:
    """Run a proxy behind a proxy on this machine."""
    return start_module_proxy(wire_config(ad_server, trusted_proxies=["127.0.0.0/8"]))


def second_hop(proxy: Proxy, ads: AdServer, url: str, entry: str = "/plain/entry") -> Received:
    """Let the entry be a wrapper that leads to *url*, and give the request that it caused."""
    ads.replies["/entry"] = a_wrapper(url)
    ads.fallback = an_inline()
    answer = proxy.get(entry)

    assert 200 == answer.status
    assert b"<InLine>" in answer.body
    assert 2 == len(ads.requests)
    return ads.requests[1]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("/a%2Fb/%2f%3A?u=http%3A%2F%2Fx%2fy", None),
        ("/p?x=[UNKNOWN]&y=%%PATTERN%%&z={x}&w=${Y}", None),
        ("/p;a=b?c;d='e'|f!*()@,$~^`\\", None),
        ("/p?ids[]=1&filter[brand]=x", None),
        ("/p?a=&b&=c&&d=%20+%2B&", None),
        ("//two//slashes//?x=//", None),
        ("/dots/./a/../b/%2e%2E/c?d=./..", None),
        ("/p?broken=%zz%1&end=%", None),
        ("/Case%aB?x=%c3%A9", None),
        ("/é?ü=💿", "/%C3%A9?%C3%BC=%F0%9F%92%BF"),
        ("/a b?c d", "/a%20b?c%20d"),
        ('/p?q="<>"', "/p?q=%22%3C%3E%22"),
        ("/p?x=1#fragment", "/p?x=1"),
        ("/p?", None),
        ("/p;?", None),
        ("/p?#fragment", "/p?"),
        ("?", "/?"),
        ("?only=query", "/?only=query"),
        ("", "/"),
        ("/p?a=http://y/?b=c?d", None),
    ],
)
def test_url_of_hop(written: str, sent: str | None, proxy: Proxy, ads: AdServer) -> None:
    """A hop's URL goes out byte for byte, but for what may not stand on a request line."""
    request = second_hop(proxy, ads, ads.url(written))

    assert f"GET {sent or written} HTTP/1.1".encode() == request.line
    assert [f"127.0.0.1:{ads.port}"] == request.values("host")


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("?cb=[CACHEBUSTING]&x=%2F", r"cb=\d{8}&x=%2F"),
        ("?cb=%5BCACHEBUSTING%5D&d=%5bCACHEBUSTING%5d", r"cb=\d{8}&d=\d{8}"),
        ("?c=[CORRELATOR]", r"c=[1-9]\d{0,18}"),
        ("?t=[TRANSACTIONID]", r"t=[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("?ip=[DEVICEIP]", r"ip=127\.0\.0\.1"),
        ("?ua=[DEVICEUA]", r"ua=Player%2F1\.0%20\(TV%3B%20de\)%20%5Bx%5D"),
        ("?s=[SERVERSIDE]&u=[NOBODYKNOWS]", r"s=[12]&u=\[NOBODYKNOWS\]"),
        ("?nested=http%3A%2F%2Fx%2F[CORRELATOR]%2F", r"nested=http%3A%2F%2Fx%2F\d+%2F"),
    ],
)
def test_macros_of_hop(written: str, sent: str, proxy: Proxy, ads: AdServer) -> None:
    """Macros that the proxy knows are filled, percent-encoded; all others stay as they are."""
    ads.replies["/entry"] = a_wrapper(ads.url(f"/hop{written}"))
    ads.replies["/hop"] = an_inline()
    proxy.get("/plain/entry", [("User-Agent", AGENT)])
    (request,) = ads.seen("/hop")

    assert re.fullmatch(sent, request.query), request.query


def test_timestamp_in_milliseconds(proxy: Proxy, ads: AdServer) -> None:
    """[TIMESTAMP] is Unix time in milliseconds."""
    before = time.time_ns() // 1_000_000
    request = second_hop(proxy, ads, ads.url("/hop?t=[TIMESTAMP]"))

    assert before <= int(request.query[2:]) <= time.time_ns() // 1_000_000


def test_timestamp_of_vast_4(proxy: Proxy, ads: AdServer) -> None:
    """[TIMESTAMP] is ISO 8601 with a zone, percent-encoded, where the upstream asks for it."""
    request = second_hop(proxy, ads, ads.url("/hop?t=[TIMESTAMP]"), "/iso/entry")

    assert re.fullmatch(r"t=\d{4}-\d\d-\d\dT\d\d%3A\d\d%3A\d\d\.\d{3}(Z|%2B00%3A00)", request.query)


@pytest.mark.parametrize(
    "query",
    [
        "a=%2F%2f&b=&&c;d='{x}|!&e",
        "u=http%3A%2F%2Fx%2F%3Fy%3D1&[UNKNOWN]=%%X%%",
        "a=%zz&b=%&c=+%2B%20",
        "%C3%A9=%c3%a9",
        "a=1?b=2",
    ],
)
def test_query_of_entry(query: str, proxy: Proxy, ads: AdServer) -> None:
    """The player's query goes to the upstream byte for byte."""
    ads.replies["/entry"] = an_inline()
    proxy.get(f"/plain/entry?{query}")

    assert [f"GET /entry?{query} HTTP/1.1".encode()] == [each.line for each in ads.requests]


def test_rest_of_entry(proxy: Proxy, ads: AdServer) -> None:
    """What ``{rest}`` stands for goes to the upstream byte for byte."""
    ads.fallback = an_inline()
    proxy.get("/plain/a%2Fb//c;d=[x]'{y}%C3%A9")

    assert [b"GET /a%2Fb//c;d=[x]'{y}%C3%A9 HTTP/1.1"] == [each.line for each in ads.requests]


def test_forward_query(proxy: Proxy, ads: AdServer) -> None:
    """A route forwards no parameter, or only those it names, in their order and bytes."""
    ads.replies["/entry"] = an_inline()
    proxy.get("/none/entry?a=1")
    proxy.get("/some/entry?c=[X]%2f&b=2&a=%2F&aa=3")

    assert ["", "c=[X]%2f&a=%2F"] == [each.query for each in ads.requests]


def test_params(proxy: Proxy, ads: AdServer) -> None:
    """An upstream's own query and parameters stand before the player's; values are encoded."""
    ads.replies["/entry"] = an_inline()
    proxy.get("/params/entry?x=%2f&s=a%20b%26c")
    (request,) = ads.requests

    assert request.query.startswith("fixed=a%2Fb&slot=a%20b%26c")
    assert "x=%2f" in request.query.split("&")


def test_session_params(proxy: Proxy, ads: AdServer) -> None:
    """The entry gets the session's correlator and time, where its upstream wants them."""
    ads.replies["/entry"] = an_inline()
    before = time.time_ns() // 1_000_000
    proxy.get("/session/entry?x=%2f")
    (request,) = ads.requests
    values = {name: value for name, (value,) in parse_qs(request.query).items()}

    assert request.query.startswith("x=%2f&")
    assert {"x", "correlator", "timestamp"} == values.keys()
    assert 0 < int(values["correlator"]) < 2**63
    assert before <= int(values["timestamp"]) <= time.time_ns() // 1_000_000


def test_session_params_are_not_doubled(proxy: Proxy, ads: AdServer) -> None:
    """A tag that has a correlator already is given no second one."""
    ads.replies["/entry"] = an_inline()
    proxy.get("/session/entry?correlator=&x=1")
    (request,) = ads.requests

    assert 1 == len(re.findall(r"(?:^|&)correlator=", request.query))
    assert re.search(r"(?:^|&)correlator=[1-9]\d*", request.query)


def test_correlator_params(proxy: Proxy, ads: AdServer) -> None:
    """A parameter that a route calls a correlator is replaced on each hop that has it."""
    ads.replies["/entry"] = a_wrapper(ads.url("/b?a=%2F&correlator=1&c=&cc=2"))
    ads.replies["/b"] = a_wrapper(ads.url("/c?nothing=here"))
    ads.replies["/c"] = an_inline()
    proxy.get("/own/entry?correlator=777&c=5")

    assert [
        "correlator=777&c=777",
        "a=%2F&correlator=777&c=777&cc=2",
        "nothing=here",
    ] == [each.query for each in ads.requests]


def device(request: Received) -> list[str | None]:
    """Give what *request* says of the device, in the order of DEVICE_HEADERS."""
    return [", ".join(request.values(name)) or None for name in DEVICE_HEADERS]


def test_device_of_stranger(proxy: Proxy, ads: AdServer) -> None:
    """Every hop is told of the device as the proxy sees it; a stranger is not believed."""
    ads.replies["/entry"] = a_wrapper(ads.url("/hop?ip=[DEVICEIP]"))
    ads.replies["/hop"] = an_inline()
    proxy.get("/plain/entry", FORGED)
    seen = [
        "127.0.0.1",
        AGENT,
        "https://page.example/watch?v=1",
        "de-DE, en;q=0.5",
        "127.0.0.1",
        AGENT,
    ]

    assert [seen, seen] == [device(each) for each in ads.requests]
    assert "ip=127.0.0.1" == ads.requests[1].query


def test_device_told_by_trusted_proxy(believing: Proxy, ads: AdServer) -> None:
    """What a trusted proxy says of a device is believed, and told to every hop."""
    ads.replies["/entry"] = a_wrapper(ads.url("/hop?ip=[DEVICEIP]&ua=[DEVICEUA]"))
    ads.replies["/hop"] = an_inline()
    believing.get("/plain/entry", FORGED)
    seen = ["203.0.113.1", "Other/2", "https://other.example/", "fr", "203.0.113.1", "Other/2"]

    assert [seen, seen] == [device(each) for each in ads.requests]
    assert "ip=203.0.113.1&ua=Other%2F2" == ads.requests[1].query


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("1.1.1.1, 203.0.113.7", "203.0.113.7"),
        ("203.0.113.7, 127.0.0.9", "203.0.113.7"),
        ("2001:db8::7", "2001:db8::7"),
        ("unknown", "127.0.0.1"),
        ("", "127.0.0.1"),
    ],
)
def test_forwarded_for(chain: str, address: str, believing: Proxy, ads: AdServer) -> None:
    """The viewer is the last address of X-Forwarded-For that is none of ours."""
    ads.replies["/entry"] = an_inline()
    believing.get("/plain/entry", [("X-Forwarded-For", chain)] if chain else ())
    (request,) = ads.requests

    assert address == request.header("x-device-ip")
    assert address == request.header("x-forwarded-for")


def test_players_headers_stay(proxy: Proxy, ads: AdServer) -> None:
    """The player's cookies, origin and authorisation are the proxy's: they go no further."""
    ads.replies["/entry"] = an_inline()
    private = [
        ("Cookie", "uid=1"),
        ("Origin", "https://page.example"),
        ("Authorization", "Bearer x"),
        ("X-Own", "1"),
    ]
    proxy.get("/plain/entry", private)
    (request,) = ads.requests

    assert [None] * 4 == [request.header(name) for name, _ in private]
