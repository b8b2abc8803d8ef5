"""
Documents that are small to send and large to read.

A bomb is refused or used, but either way soon and in little memory. Most hold a good ad in
front of the charge: a proxy that reads on answers it.
"""

import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import brotli  # type: ignore[import-untyped]
import pytest
from lxml import etree

from tests.support.ad_server import AdServer, Received, Reply, in_thread, wait_seen
from tests.support.hostile import Trap, a_wrapper, an_inline, wrapper_element
from tests.support.proxy import Answer, Proxy, running_proxy

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

AT_ONCE = 0.2
"""Seconds within which a bomb is dealt with."""
SOON = 0.4
"""The same for a document that is read, mended and answered: half a megabyte takes its time."""
TRIES = 3
"""The best of these counts: the machine is shared."""
MIB = 1 << 20
PEAK = 100 * MIB
MAX_FETCHES = 100
"""Upstream requests of one ad request, the entry aside."""

HEAD, TAIL = an_inline("bomb").removesuffix(b"</VAST>"), b"</VAST>"
BLANKS = b" " * MIB


class Compressor(Protocol):
    """What zlib and zstd agree on."""

    def compress(self, data: bytes, /) -> bytes:
        """Take *data* and give what is ready."""

    def flush(self) -> bytes:
        """Give the rest."""


@dataclass(frozen=True, slots=True)
class Bomb:
    """One document; *make* is given a URL that nobody may ask for."""

    name: str
    make: Callable[[str], Reply | bytes]
    codes: frozenset[int]
    """What a wrapper above may be told; empty: it may also be used."""

    def __str__(self) -> str:
        return self.name


def padded(*filling: bytes) -> bytes:
    """Give a document with an ad, and *filling* behind it."""
    return b"".join((HEAD, *filling, TAIL))


def squeezed(coding: str, compress: Compressor, mib: int) -> Reply:
    """Give an ad with *mib* MiB of blanks behind it, compressed."""
    parts = [compress.compress(HEAD), *(compress.compress(BLANKS) for _ in range(mib))]
    body = b"".join([*parts, compress.compress(TAIL), compress.flush()])
    return Reply(body, headers=(("Content-Encoding", coding),))


def gzip_bomb(mib: int) -> Reply:
    """Give a gzip bomb; level 1 is as deep as is needed, and makes itself in half the time."""
    return squeezed("gzip", zlib.compressobj(1 if mib > 1 else 9, zlib.DEFLATED, 31), mib)


def brotli_bomb() -> Reply:
    """Give half a gigabyte in less than a kilobyte."""
    compressor = brotli.Compressor(quality=5)
    parts = [compressor.process(HEAD), *(compressor.process(BLANKS) for _ in range(512))]
    body = b"".join([*parts, compressor.process(TAIL), compressor.finish()])
    return Reply(body, headers=(("Content-Encoding", "br"),))


def members_bomb() -> Reply:
    """Give ten thousand gzip members, each of 8 KiB."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    member = compressor.compress(b" " * 8192) + compressor.flush()
    return Reply(member * 10_000, headers=(("Content-Encoding", "gzip"),))


def entities(declarations: str, use: str = "&a;") -> bytes:
    """Give a document of a type with *declarations*, and *use* where its ad has a title."""
    document = an_inline("bomb").decode().replace("<AdTitle>", f"<AdTitle>{use}", 1)
    return f'<?xml version="1.0"?><!DOCTYPE VAST [{declarations}]>{document}'.encode()


def laughs() -> bytes:
    """Give the billion laughs."""
    nested = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    return entities('<!ENTITY l0 "ha">' + nested, "&l9;")


def as_text(encoding: str, document: bytes) -> bytes:
    """Give *document* in another *encoding*, and declared so."""
    declared = f'<?xml version="1.0" encoding="{encoding}"?>'
    return (declared + document.decode().removeprefix('<?xml version="1.0"?>')).encode(encoding)


UNPACKING = frozenset({301, 100})
"""Cut at the cap, or not unpacked at all: a coding that nobody asked for is no XML."""
TOO_LARGE = frozenset({301})
NO_XML = frozenset({100})
USABLE: frozenset[int] = frozenset()

REFUSED = (
    Bomb("gzip of 1 KiB", lambda _: gzip_bomb(1), UNPACKING),
    Bomb("gzip to 512 MiB", lambda _: gzip_bomb(512), UNPACKING),
    Bomb("gzip of many members", lambda _: members_bomb(), UNPACKING),
    Bomb("deflate of 1 KiB", lambda _: squeezed("deflate", zlib.compressobj(9), 1), UNPACKING),
    Bomb("deflate to 512 MiB", lambda _: squeezed("deflate", zlib.compressobj(1), 512), UNPACKING),
    Bomb("brotli of 1 KiB to 512 MiB", lambda _: brotli_bomb(), UNPACKING),
    Bomb("zstd of 1 KiB", lambda _: squeezed("zstd", zstd.ZstdCompressor(), 32), UNPACKING),
    Bomb("zstd to 512 MiB", lambda _: squeezed("zstd", zstd.ZstdCompressor(), 512), UNPACKING),
    Bomb("50 MB of XML", lambda _: padded(b"<a/>" * 12_500_000), TOO_LARGE),
    Bomb("1e6 deep", lambda _: padded(b"<a>" * 10**6, b"</a>" * 10**6), TOO_LARGE),
    Bomb("1e6 deep, squeezed", lambda _: gzipped(padded(b"<a>" * 10**6)), UNPACKING),
    Bomb("70,000 deep", lambda _: padded(b"<a>" * 70_000, b"</a>" * 70_000), NO_XML | TOO_LARGE),
    Bomb("20,000 deep", lambda _: padded(b"<a>" * 20_000, b"</a>" * 20_000), NO_XML),
    Bomb("billion laughs", lambda _: laughs(), NO_XML),
    Bomb(
        "quadratic blow-up",
        lambda _: entities(f'<!ENTITY a "{"x" * 100_000}">', "&a;" * 50_000),
        NO_XML,
    ),
    Bomb("entity of a file", lambda _: entities('<!ENTITY a SYSTEM "/etc/passwd">'), NO_XML),
    Bomb("entity of a URL", lambda url: entities(f'<!ENTITY a SYSTEM "{url}">'), NO_XML),
    Bomb("parameter entity", lambda url: entities(f'<!ENTITY % a SYSTEM "{url}"> %a;', ""), NO_XML),
    Bomb(
        "external document type",
        lambda url: f'<!DOCTYPE VAST SYSTEM "{url}">'.encode() + padded(),
        NO_XML,
    ),
    Bomb("hidden by a comment", lambda _: b"<!-- <VAST> -->" + laughs()[21:], NO_XML),
    Bomb("hidden by UTF-16", lambda _: as_text("utf-16", laughs()), NO_XML),
    Bomb("hidden by UTF-16 unmarked", lambda _: as_text("utf-16-be", laughs()), NO_XML),
    Bomb("hidden by UTF-32", lambda _: as_text("utf-32", laughs()), NO_XML),
    Bomb("hidden by UTF-7", lambda _: as_text("utf-7", laughs()), NO_XML),
    Bomb("hidden by EBCDIC", lambda _: as_text("cp037", laughs()), NO_XML),
)

BOUNDED = (
    Bomb("500 KB of empty elements", lambda _: padded(b"<a/>" * 120_000), USABLE),
    Bomb("50,000 empty elements", lambda _: padded(b"<a/>" * 50_000), USABLE),
    Bomb("200 deep", lambda _: padded(b"<a>" * 200, b"</a>" * 200), USABLE),
    Bomb("one long text", lambda _: padded(b"<a>" + b"x" * 500_000 + b"</a>"), USABLE),
    Bomb("one long comment", lambda _: padded(b"<!--" + b"x" * 500_000 + b"-->"), USABLE),
    Bomb("one long CDATA section", lambda _: padded(b"<![CDATA[" + b"<" * 50_000 + b"]]>"), USABLE),
    Bomb("40,000 attributes", lambda _: padded(numbered(b'a%d=""', 40_000)), USABLE),
    Bomb("20,000 namespaces", lambda _: padded(numbered(b'xmlns:a%d="a"', 20_000)), USABLE),
    Bomb("500 KB of ampersands", lambda _: padded(b"&" * 500_000), USABLE),
    Bomb("undeclared prefixes", lambda _: padded(*prefixed(30_000)), USABLE),
    Bomb("comments without an end", lambda _: padded(b"<!--" * 50_000), USABLE),
    Bomb("CDATA without an end", lambda _: padded(b"&<![CDATA[" * 50_000), USABLE),
    Bomb("tags without an end", lambda _: padded(b"&<" * 50_000), USABLE),
    Bomb("blanks in an end tag", lambda _: padded(b"&", b"</VAST" + b" " * 400_000), USABLE),
    Bomb(
        "an included URL",
        lambda url: padded(
            f'<i:include xmlns:i="http://www.w3.org/2001/XInclude" href="{url}"/>'.encode()
        ),
        USABLE,
    ),
    Bomb(
        "a style sheet", lambda url: f'<?xml-stylesheet href="{url}"?>'.encode() + padded(), USABLE
    ),
    Bomb("a target of 400 KB", lambda _: a_wrapper("http://x.example/" + "[X]" * 130_000), USABLE),
    Bomb(
        "macros by the thousand", lambda _: filled("[CORRELATOR][TRANSACTIONID]" * 10_000), USABLE
    ),
)


def gzipped(document: bytes) -> Reply:
    """Give *document* as gzip."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = compressor.compress(document) + compressor.flush()
    return Reply(body, headers=(("Content-Encoding", "gzip"),))


def numbered(attribute: bytes, count: int) -> bytes:
    """Give an element with *count* attributes."""
    return b"<a " + b" ".join(attribute % n for n in range(count)) + b"/>"


def prefixed(count: int) -> Iterable[bytes]:
    """Give elements of *count* namespaces that nobody declares."""
    return (b"<p%d:a/>" % n for n in range(count))


def filled(url: str) -> bytes:
    """Give an ad that is tracked at *url*."""
    return an_inline("bomb").replace(
        b"http://track.example/", f"http://track.example/{url}".encode()
    )


@dataclass(frozen=True, slots=True)
class Field:
    """Where the bombs are tried."""

    proxy: Proxy
    server: AdServer
    trap: Trap

    def ask(self, path: str) -> tuple[Answer, float]:
        """Ask for *path* until it is answered at once; give the answer and the best time."""
        best = float("inf")
        for _ in range(TRIES):
            began = time.perf_counter()
            answer = self.proxy.get(path, within=10.0)
            best = min(best, time.perf_counter() - began)
            if best < AT_ONCE:
                break
        return answer, best

    def growth(self, ask: Callable[[], object]) -> int:
        """Give the bytes by which the proxy's memory is larger at its peak while *ask* runs."""
        process = Path(f"/proc/{self.proxy.pid}")
        # Linux: 5 sets the peak back to what is in use now.
        (process / "clear_refs").write_text("5")
        before = memory(process, "VmRSS")
        ask()
        return memory(process, "VmHWM") - before


def memory(process: Path, name: str) -> int:
    """Give a figure of /proc/<pid>/status in bytes."""
    return int((process / "status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def ad_ids(answer: Answer) -> tuple[str, ...]:
    """Give the ids of the ads that are answered."""
    assert 200 == answer.status
    return tuple(ad.get("id", "") for ad in etree.fromstring(answer.body).findall("{*}Ad"))


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Give a proxy in front of an ad server that holds every bomb."""
    with Trap("127.0.0.2") as trap, in_thread(AdServer()) as server:
        # One server holds all the bombs: after a few of them a breaker would let none through.
        no_breaker = {"circuit_breaker": {"mode": "off"}}
        config = {
            "egress": {"allow": ["127.0.0.1/32"], **no_breaker},
            "upstreams": {
                "bombs": {
                    "endpoint": server.url("/{rest}"),
                    "session_params": [],
                    "timeout": "2s",
                    **no_breaker,
                }
            },
            "routes": [{"path": "/{rest}", "upstreams": ["bombs"], "deadline": "2500ms"}],
        }
        url = f"http://127.0.0.2:{trap.port}/"
        for bomb in (*REFUSED, *BOUNDED):
            server.replies[path_of(bomb)] = bomb.make(url)
        server.replies["/ok"] = an_inline("ok")
        with running_proxy(config, tmp_path_factory.mktemp("bombs")) as proxy:
            # Should a bomb go off, it is the proxy that ends, and not the machine.
            resource.prlimit(proxy.pid, resource.RLIMIT_AS, (4096 * MIB, 4096 * MIB))
            for _ in range(5):
                proxy.get("/ok")
            yield Field(proxy, server, trap)


def path_of(bomb: Bomb) -> str:
    """Give the path of a bomb at the ad server."""
    return "/" + bomb.name.replace(" ", "-").replace(",", "")


@pytest.mark.parametrize("bomb", REFUSED, ids=str)
def test_refused(mined: Field, bomb: Bomb) -> None:
    """A bomb is answered with an empty VAST, at once and in little memory."""
    answers: list[tuple[Answer, float]] = []
    growth = mined.growth(lambda: answers.append(mined.ask(path_of(bomb))))
    ((answer, seconds),) = answers

    assert () == ad_ids(answer)
    assert AT_ONCE > seconds
    assert PEAK > growth
    assert 0 == mined.trap.reached


@pytest.mark.parametrize("bomb", BOUNDED, ids=str)
def test_bounded(mined: Field, bomb: Bomb) -> None:
    """A document that is odd and within all limits is used or not, soon and in little memory."""
    answers: list[tuple[Answer, float]] = []
    growth = mined.growth(lambda: answers.append(mined.ask(path_of(bomb))))
    ((answer, seconds),) = answers

    assert ad_ids(answer) in {(), ("bomb",)}
    assert SOON > seconds
    assert PEAK > growth
    assert 0 == mined.trap.reached


@pytest.mark.parametrize("bomb", REFUSED, ids=str)
def test_told(mined: Field, bomb: Bomb) -> None:
    """The wrapper that led to a bomb is told that its answer was too large, or no XML."""
    server, error = mined.server, f"/error{path_of(bomb)}"
    wrapper = a_wrapper(server.url(path_of(bomb)), errors=[server.url(f"{error}?[ERRORCODE]")])
    server.replies |= {f"/to{path_of(bomb)}": wrapper, error: Reply()}

    assert () == ad_ids(mined.proxy.get(f"/to{path_of(bomb)}"))
    assert wait_seen(server, error)[0].query in {str(code) for code in bomb.codes}


def test_fan_out(mined: Field) -> None:
    """A pod of a thousand wrappers costs no more requests than one ad request may make."""
    server = mined.server
    ads = "".join(
        f'<Ad sequence="{n}">{wrapper_element(server.url(f"/fan/{n}"))}</Ad>'
        for n in range(1, 1001)
    )
    server.replies["/pod"] = f'<VAST version="3.0">{ads}</VAST>'.encode()
    begin = len(server.requests)
    answer = mined.proxy.get("/pod")

    assert () == ad_ids(answer)
    assert MAX_FETCHES >= count_hops(server.requests[begin:], "/fan/")


def test_tree_without_end(mined: Field) -> None:
    """Pods of pods of pods cost no more than that, and end with the deadline."""
    server = mined.server

    def branch(request: Received) -> bytes:
        ads = "".join(
            f'<Ad sequence="{n}">{element(server.url(f"{request.path}/{n}"))}</Ad>'
            for n in range(1, 21)
        )
        return f'<VAST version="3.0">{ads}</VAST>'.encode()

    def element(url: str) -> str:
        return wrapper_element(url, attributes='allowMultipleAds="true"')

    server.fallback = branch
    begin = len(server.requests)
    began = time.perf_counter()
    answer = mined.proxy.get("/tree")
    seconds = time.perf_counter() - began
    server.fallback = Reply(status=404)

    assert () == ad_ids(answer)
    assert 2.6 > seconds
    assert MAX_FETCHES >= count_hops(server.requests[begin:], "/tree/")


def count_hops(requests: list[Received], prefix: str) -> int:
    """Count the *requests* whose path begins with *prefix*."""
    return sum(each.path.startswith(prefix) for each in requests)


def a_tracking_wrapper(target: str) -> bytes:
    """Give a wrapper with four thousand trackers, and room for a pod behind it."""
    trackers = "".join(
        f'<Tracking event="start">http://track.example/{n:0>30}</Tracking>' for n in range(4000)
    )
    creatives = f"""<Creatives><Creative><Linear><TrackingEvents>{trackers}</TrackingEvents>\
</Linear></Creative></Creatives>"""
    wrapper = a_wrapper(target, attributes='allowMultipleAds="true"').decode()
    return wrapper.replace("<Creatives/>", creatives).encode()


def test_many_trackers(mined: Field) -> None:
    """What a wrapper brings along is merged in a time that does not grow with its square."""
    server = mined.server
    server.replies |= {"/trackers": a_tracking_wrapper(server.url("/ad")), "/ad": padded()}
    answer, seconds = mined.ask("/trackers")

    assert ("bomb",) == ad_ids(answer)
    assert 4000 == answer.body.count(b"<Tracking ")
    assert AT_ONCE > seconds


def many_linears() -> str:
    """Give an ad with two thousand creatives for a wrapper's trackers to land on."""
    linear = "<Creative><Linear><Duration>00:00:01</Duration></Linear></Creative>"
    body = an_inline("bomb").decode()
    return body.replace("<Creatives>", "<Creatives>" + linear * 2000, 1)


def many_ads() -> str:
    """Give a pod of a thousand ads, each of which takes over a wrapper's trackers."""
    ad = an_inline("bomb").decode().partition("<Ad ")[2].partition("</VAST>")[0]
    ads = "".join(f'<Ad sequence="{n}" {ad}' for n in range(1, 1001))
    return f'<VAST version="3.0">{ads}</VAST>'


@pytest.mark.parametrize("make", [many_linears, many_ads], ids=["linears", "ads"])
def test_product(mined: Field, make: Callable[[], str]) -> None:
    """Trackers times creatives, each within its limit, do not multiply into gigabytes."""
    server, name = mined.server, make.__name__
    wrapper = a_tracking_wrapper(server.url(f"/{name}"))
    server.replies |= {f"/of-{name}": wrapper, f"/{name}": make().encode()}
    answers: list[Answer] = []
    began = time.perf_counter()
    growth = mined.growth(lambda: answers.append(mined.proxy.get(f"/of-{name}", within=10.0)))
    seconds = time.perf_counter() - began

    assert 200 == answers[0].status
    assert "VAST" == etree.QName(etree.fromstring(answers[0].body)).localname
    assert 2.6 > seconds
    assert PEAK > growth


def test_answers_after_all(mined: Field) -> None:
    """After every bomb the proxy answers as before."""
    answer, seconds = mined.ask("/ok")

    assert ("ok",) == ad_ids(answer)
    assert AT_ONCE > seconds
