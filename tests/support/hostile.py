"""
An ad server that does what no ad server should: a table of faults, each a script of bytes.

Rule 1: a fault is a value: a name, one line that describes it, the VAST codes it may be reported
with, and a script. Rule 2: scripts decide what goes over the wire and never wait; only
:class:`HostileServer` does. Rule 3: a path is ``/<fault>/<key>``; the key says which document the
fault happens to, so that any fault can happen at any hop of any chain.

``python -m tests.chaos server --port 9000`` starts it by hand and lists every address.
"""

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from itertools import repeat
from typing import Self

import trustme

AD_TITLE = "The ad behind the faults"
BLOCK = 64 * 1024
"""Bytes an endless script sends at a time."""
DRIP = 0.05
"""Seconds between two bytes of a dripping script: each is in time, the whole never is."""
SMUGGLED = b"smuggled"
"""Stands in every response that was never asked for. No player may ever see it."""
EVIL_COOKIE = "evil"
"""Name of a cookie that is only ever set by a forged header line."""


class End(Enum):
    """How a script leaves its connection."""

    CLOSE = "close"
    """In order, as after any script that names no other end."""
    KEEP = "keep"
    """Open for the next request."""
    HALF_CLOSE = "half close"
    """Nothing more comes, and all that the other side sends is still taken."""
    RESET = "reset"
    """With a TCP RST: what was not yet read is lost."""
    HANG = "hang"
    """Silent, until the other side gives up."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a script may know about the request that it answers."""

    document: bytes
    """What would be right to answer."""
    key: str
    path: str
    """The request's own path, for redirects that lead nowhere."""
    base: str
    """``http://host:port`` of the plain listener."""
    forbidden: str
    """The URL of a listener that is outside every allowed network."""
    number: int
    """How many requests the server had seen before this one."""
    times: int = 0
    """How often this fault had been asked for with this key before."""

    @property
    def good(self) -> str:
        """The path under which the same document comes without a fault."""
        return f"/ok/{self.key}"


Step = bytes | float | End
"""Bytes are sent, a number is a pause in seconds, an End is the last step."""
Script = Callable[[Scene], Iterable[Step]]


class Place(Enum):
    """Where a URL of a fault points to."""

    PLAIN = "plain"
    CLOSED_PORT = "closed port"
    FULL_BACKLOG = "full backlog"
    UNKNOWN_NAME = "unknown name"
    TLS_TO_PLAIN = "TLS to a plain port"
    PLAIN_TO_TLS = "plain to a TLS port"
    UNTRUSTED = "untrusted certificate"
    EXPIRED = "expired certificate"
    OTHER_NAME = "certificate of another name"


_TLS = (Place.TLS_TO_PLAIN, Place.UNTRUSTED, Place.EXPIRED, Place.OTHER_NAME)


@dataclass(frozen=True, slots=True)
class Fault:
    """One way of going wrong."""

    name: str
    description: str
    codes: frozenset[int | None]
    """
    The VAST codes it may be reported with. None among them: the ad may be used all the same;
    None alone: it must be.
    """
    script: Script
    place: Place = Place.PLAIN

    @property
    def harmless(self) -> bool:
        """Whether the ad has to come in spite of it."""
        return self.codes == {None}

    @property
    def fatal(self) -> bool:
        """Whether no ad may come of it."""
        return None not in self.codes


def reply(body: bytes, *headers: bytes, status: bytes = b"200 OK") -> bytes:
    """Give a whole HTTP/1.1 response of *status* with *headers* (no line ends) and *body*."""
    lines = (
        b"HTTP/1.1 " + status,
        b"Content-Type: application/xml",
        b"Content-Length: %d" % len(body),
        *headers,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """Give a response in *chunks*; *end* is what follows the last."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + end


def moved(location: bytes, *headers: bytes, status: bytes = b"302 Found") -> bytes:
    """Give a redirect to *location*."""
    return reply(b"", b"Location: " + location, *headers, status=status)


def _drip(data: Iterable[int]) -> Iterator[Step]:
    for byte in data:
        yield bytes([byte])
        yield DRIP


def _slices(data: bytes, size: int, pause: float) -> Iterator[Step]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
        yield pause


def _after(head: bytes, steps: Iterable[Step]) -> Iterator[Step]:
    yield head
    yield from steps


_USED: frozenset[int | None] = frozenset({None})
_NO_XML: frozenset[int | None] = frozenset({100})
_UNAVAILABLE: frozenset[int | None] = frozenset({301})
_NO_WAY: frozenset[int | None] = frozenset({300})
_NO_AD: frozenset[int | None] = frozenset({303})
_OK = b"HTTP/1.1 200 OK\r\n"
_CLOSING = b"Connection: close"


def _one_of(*codes: int | None) -> frozenset[int | None]:
    """Codes of a fault on which honest clients differ; the comment beside it says why."""
    return frozenset(codes)


CONNECTIONS = (
    Fault("ok", "no fault at all", _USED, lambda s: (reply(s.document), End.KEEP)),
    Fault("reset_at_once", "RST before the first byte", _UNAVAILABLE, lambda _: (End.RESET,)),
    Fault(
        "reset_in_body",
        "half of the body, then RST",
        _UNAVAILABLE,
        # The pause lets the first half arrive: a RST overtakes what the receiver has not read.
        lambda s: (reply(s.document)[: -len(s.document) // 2], 0.02, End.RESET),
    ),
    Fault("closed_at_once", "FIN before the first byte", _UNAVAILABLE, lambda _: ()),
    Fault(
        "closed_in_headers",
        "FIN in the middle of a header's name",
        _UNAVAILABLE,
        lambda _: (_OK + b"Content-",),
    ),
    Fault(
        "closed_in_body",
        "FIN before the announced length",
        _UNAVAILABLE,
        lambda s: (reply(s.document)[:-9],),
    ),
    Fault("silent", "takes the request and never answers", _UNAVAILABLE, lambda _: (End.HANG,)),
    Fault(
        "silent_in_headers",
        "a status line, then nothing",
        _UNAVAILABLE,
        lambda _: (_OK, End.HANG),
    ),
    Fault(
        "silent_in_body",
        "half of the body, then nothing",
        _UNAVAILABLE,
        lambda s: (reply(s.document)[: -len(s.document) // 2], End.HANG),
    ),
    Fault(
        "dripping_headers",
        "one byte of the headers every 50 ms",
        _UNAVAILABLE,
        lambda s: _drip(reply(s.document)),
    ),
    Fault(
        "dripping_body",
        "one byte of the body every 50 ms",
        _UNAVAILABLE,
        lambda _: _after(_OK + b"Content-Length: 10000\r\n\r\n", _drip(repeat(120))),
    ),
    Fault(
        "late",
        "a good reply a tenth of a second late",
        _USED,
        lambda s: (0.1, reply(s.document), End.KEEP),
    ),
    Fault(
        "sliced",
        "a good reply in pieces of 50 bytes, one every 5 ms",
        _USED,
        lambda s: (*_slices(reply(s.document), 50, 0.005), End.KEEP),
    ),
    Fault(
        "half_closed",
        "a good reply without a length, FIN behind it, and a connection that is read on",
        _USED,
        lambda s: (_OK + b"\r\n" + s.document, End.HALF_CLOSE),
    ),
    Fault(
        "half_closed_in_body",
        "FIN before the announced length, on a connection that is read on",
        _UNAVAILABLE,
        lambda s: (reply(s.document)[:-9], End.HALF_CLOSE),
    ),
    Fault(
        "dropped_once",
        "takes the first request and loses its reply; the next one is answered",
        _one_of(301),
        lambda s: (reply(s.document), End.KEEP) if s.times else (End.RESET,),
    ),
    Fault(
        "closed_after_reply",
        "a good reply on a connection that seems to be kept, and is closed",
        _USED,
        lambda s: (reply(s.document),),
    ),
    Fault(
        "second_reply",
        "a second response that nobody asked for, on a connection that is kept",
        _USED,
        lambda s: (reply(s.document) + reply(an_inline(SMUGGLED.decode())), End.KEEP),
    ),
    Fault(
        "garbage_behind_reply",
        "bytes that are no HTTP behind a good reply, on a connection that is kept",
        # The reply is whole; who reads on before it is used meets an error.
        _one_of(301, None),
        lambda s: (reply(s.document) + bytes(range(256)), End.KEEP),
    ),
)

ENDLESS = (
    Fault(
        "endless_body",
        "a body without a length or an end",
        _UNAVAILABLE,
        lambda _: _after(_OK + b"\r\n", repeat(b"x" * BLOCK)),
    ),
    Fault(
        "endless_chunks",
        "chunk after chunk",
        _UNAVAILABLE,
        lambda _: _after(chunked(end=b""), repeat(b"%x\r\n%b\r\n" % (BLOCK, b"x" * BLOCK))),
    ),
    Fault(
        "endless_headers",
        "header after header",
        _UNAVAILABLE,
        lambda _: _after(_OK, repeat((b"X-A: " + b"a" * 1000 + b"\r\n") * 16)),
    ),
    Fault(
        "endless_continues",
        "100 Continue again and again",
        _UNAVAILABLE,
        lambda _: repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    ),
    Fault(
        "endless_chunk_size",
        "one chunk size line that never ends",
        _UNAVAILABLE,
        lambda _: _after(chunked(end=b""), repeat(b"0" * BLOCK)),
    ),
    Fault(
        "endless_trailers",
        "trailer after trailer, behind a whole document",
        _UNAVAILABLE,
        lambda s: _after(chunked(s.document, end=b"0\r\n"), repeat(b"X-A: a\r\n" * 1000)),
    ),
)

HEADERS = (
    Fault(
        "header_of_16k",
        "one field of 16,000 bytes",
        # RFC 9110 5.4 sets no limit; 8 KiB is the usual one.
        _one_of(301, None),
        lambda s: (reply(s.document, b"X-A: " + b"a" * 16_000), End.KEEP),
    ),
    Fault(
        "headers_200",
        "two hundred fields",
        # As above; 100 and 128 are usual limits.
        _one_of(301, None),
        lambda s: (reply(s.document, *(b"X-%d: a" % n for n in range(200))), End.KEEP),
    ),
    Fault(
        "early_hints",
        "a 103 before the answer",
        _USED,
        lambda s: (
            b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + reply(s.document),
            End.KEEP,
        ),
    ),
    Fault(
        "switching_protocols",
        "a 101 that nobody asked for",
        _UNAVAILABLE,
        lambda _: (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            End.HANG,
        ),
    ),
    Fault("garbage", "bytes that are no HTTP", _UNAVAILABLE, lambda _: (bytes(range(256)) * 20,)),
    Fault("http_0_9", "the document without a head", _UNAVAILABLE, lambda s: (s.document,)),
    Fault(
        "status_999999",
        "a status of six digits",
        _UNAVAILABLE,
        lambda _: (b"HTTP/1.1 999999 OK\r\n\r\n",),
    ),
    Fault(
        "status_negative",
        "a status below zero",
        _UNAVAILABLE,
        lambda _: (b"HTTP/1.1 -1 OK\r\nContent-Length: 0\r\n\r\n",),
    ),
    Fault(
        "http_2_in_words",
        "a status line that claims HTTP/2.0",
        # RFC 9110 2.5: a higher major version is an error, or read as the highest one known.
        _one_of(301, None),
        lambda s: (reply(s.document, _CLOSING).replace(b"HTTP/1.1", b"HTTP/2.0", 1),),
    ),
    Fault(
        "bare_lf",
        "lines that end in LF alone",
        _USED,
        lambda s: (
            reply(b"", _CLOSING).replace(b"\r\n", b"\n").replace(b": 0", b": %d" % len(s.document))
            + s.document,
        ),
    ),
    Fault(
        "nul_in_header",
        "a NUL in a field's value",
        # RFC 9110 5.5: reject the message, or replace the character.
        _one_of(301, None),
        lambda s: (reply(s.document, b"X-A: a\0b", _CLOSING),),
    ),
    Fault(
        "cr_in_header",
        "a bare CR in a field's value, with a forged field behind it",
        # As above.
        _one_of(301, None),
        lambda s: (
            reply(s.document, b"X-A: a\rSet-Cookie: " + EVIL_COOKIE.encode() + b"=1", _CLOSING),
        ),
    ),
    Fault(
        "folded_header",
        "a field over two lines",
        _USED,
        lambda s: (reply(s.document, b"X-A: a\r\n  folded"), End.KEEP),
    ),
    Fault(
        "header_without_colon",
        "a line that is no field",
        # Llhttp refuses it; browsers pass it over.
        _one_of(301, None),
        lambda s: (reply(s.document, b"nonsense", _CLOSING),),
    ),
    Fault(
        "non_ascii_header",
        "bytes above 127 in a field's value",
        _USED,
        lambda s: (reply(s.document, b"X-A: \xe9\xff\x85"), End.KEEP),
    ),
    Fault(
        "cookies_100",
        "a hundred cookies",
        _USED,
        lambda s: (
            reply(s.document, *(b"Set-Cookie: c%d=" % n + b"v" * 60 for n in range(100))),
            End.KEEP,
        ),
    ),
    Fault(
        "cookie_of_8000",
        "one cookie of 8,000 bytes",
        _USED,
        lambda s: (reply(s.document, b"Set-Cookie: c=" + b"v" * 8000), End.KEEP),
    ),
    Fault(
        "cookie_of_nonsense",
        "Set-Cookie fields that hold none",
        _USED,
        lambda s: (
            reply(s.document, b"Set-Cookie: ;;==\xe9;", b"Set-Cookie:", b"Set-Cookie: ="),
            End.KEEP,
        ),
    ),
)

LENGTHS = (
    Fault(
        "length_too_long",
        "a Content-Length of more than comes",
        _UNAVAILABLE,
        lambda s: (_OK + b"Content-Length: 5000\r\n\r\n" + s.document,),
    ),
    Fault(
        "length_too_short",
        "a Content-Length of five",
        # What is within the length is no XML; what is behind it shows that the framing is broken.
        _one_of(100, 301),
        lambda s: (_OK + b"Content-Length: 5\r\nConnection: close\r\n\r\n" + s.document,),
    ),
    Fault(
        "lengths_differ",
        "two Content-Lengths",
        _UNAVAILABLE,
        lambda s: (reply(s.document, b"Content-Length: 5", _CLOSING),),
    ),
    Fault(
        "length_and_chunked",
        "a Content-Length and chunks",
        # RFC 9112 6.3: chunks win, "ought to be handled as an error".
        _one_of(301, None),
        lambda s: (
            chunked(s.document).replace(
                b"\r\n", b"\r\nContent-Length: 5\r\n" + _CLOSING + b"\r\n", 1
            ),
        ),
    ),
    Fault(
        "length_negative",
        "a Content-Length of -5",
        _UNAVAILABLE,
        lambda s: (_OK + b"Content-Length: -5\r\n\r\n" + s.document,),
    ),
    Fault(
        "length_of_20_digits",
        "a Content-Length that fits no integer",
        _UNAVAILABLE,
        lambda s: (_OK + b"Content-Length: 99999999999999999999\r\n\r\n" + s.document,),
    ),
    Fault(
        "chunk_size_of_letters",
        "a chunk size that is no number",
        _UNAVAILABLE,
        lambda s: (chunked(end=b"zz\r\n") + s.document,),
    ),
    Fault(
        "chunks_without_end",
        "FIN before the last chunk",
        _UNAVAILABLE,
        lambda s: (chunked(s.document, end=b""),),
    ),
    Fault(
        "chunk_extension_of_64k",
        "an extension of 64 KiB behind the chunk size",
        # RFC 9112 7.1.1: unknown extensions are ignored, and their length ought to be limited.
        _one_of(301, None),
        lambda s: (
            chunked(s.document).replace(b"\r\n<", b";" + b"a" * BLOCK + b"\r\n<", 1),
            End.KEEP,
        ),
    ),
    Fault(
        "chunks_of_one_byte",
        "each byte in a chunk of its own",
        _USED,
        lambda s: (chunked(*(bytes([byte]) for byte in s.document)), End.KEEP),
    ),
    Fault(
        "body_of_3_mb",
        "a well-formed document above any cap",
        _UNAVAILABLE,
        lambda s: (reply(s.document + b"<!--" + b"x" * 3_000_000 + b"-->", _CLOSING),),
    ),
)

CODINGS = (
    Fault(
        "gzip_in_name_only",
        "a plain document that is said to be gzip",
        # A coding that cannot be undone is a broken transfer, or a body that is no XML.
        _one_of(301, 100),
        lambda s: (reply(s.document, b"Content-Encoding: gzip", _CLOSING),),
    ),
    Fault(
        "gzip_cut",
        "the first half of a gzip member",
        # As above. Zlib by itself takes a cut stream without a word.
        _one_of(301, 100),
        lambda s: (reply(_half(gzip.compress(s.document)), b"Content-Encoding: gzip", _CLOSING),),
    ),
    Fault(
        "gzip_without_checksum",
        "gzip without its last eight bytes",
        # The document is whole, the member is not.
        _one_of(301, None),
        lambda s: (reply(gzip.compress(s.document)[:-8], b"Content-Encoding: gzip", _CLOSING),),
    ),
    Fault(
        "unknown_coding",
        "a plain document with an unknown Content-Encoding",
        _USED,
        lambda s: (reply(s.document, b"Content-Encoding: x-weird"), End.KEEP),
    ),
    Fault(
        "gzip_twice_in_name_only",
        "a plain document that is said to be gzip twice",
        # Not undone, it is a document; undone, it is none.
        _one_of(301, 100, None),
        lambda s: (reply(s.document, b"Content-Encoding: gzip, gzip", _CLOSING),),
    ),
    Fault(
        "gzip_twice",
        "gzip within gzip",
        # Legal by RFC 9110 8.4, and undone by few.
        _one_of(301, 100, None),
        lambda s: (
            reply(
                gzip.compress(gzip.compress(s.document)),
                b"Content-Encoding: gzip, gzip",
                _CLOSING,
            ),
        ),
    ),
    Fault(
        "unknown_charset",
        "a charset that does not exist",
        _USED,
        lambda s: (reply(s.document).replace(b"/xml", b"/xml; charset=x-nope", 1), End.KEEP),
    ),
    Fault(
        "false_type",
        "a document that is said to be a picture",
        _USED,
        lambda s: (reply(s.document).replace(b"application/xml", b"image/png", 1), End.KEEP),
    ),
)

STATUSES = (
    Fault(
        "status_204",
        "no content: the ad server's plainest no",
        _NO_AD,
        lambda _: (b"HTTP/1.1 204 No Content\r\n\r\n", End.KEEP),
    ),
    Fault(
        "status_204_with_body",
        "no content, and content",
        # The status says that there is no ad; the bytes behind it break the framing.
        _one_of(303, 301),
        lambda s: (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n" + s.document,),
    ),
    Fault(
        "status_304",
        "not modified, though nothing was asked about",
        _UNAVAILABLE,
        lambda _: (b"HTTP/1.1 304 Not Modified\r\n\r\n", End.KEEP),
    ),
    Fault(
        "status_403",
        "forbidden",
        _UNAVAILABLE,
        lambda s: (reply(s.document, status=b"403 Forbidden"), End.KEEP),
    ),
    Fault(
        "status_404",
        "not found",
        _UNAVAILABLE,
        lambda _: (reply(b"", status=b"404 Not Found"), End.KEEP),
    ),
    Fault(
        "status_500",
        "an error with a document in it",
        _UNAVAILABLE,
        lambda s: (reply(s.document, status=b"500 Oops"), End.KEEP),
    ),
    Fault(
        "status_503",
        "unavailable, to be asked again in an hour",
        _UNAVAILABLE,
        lambda _: (reply(b"", b"Retry-After: 3600", status=b"503 Later"), End.KEEP),
    ),
)

REDIRECTS = (
    Fault("moved", "an honest redirect", _USED, lambda s: (moved(s.good.encode()), End.KEEP)),
    Fault(
        "moved_for_good",
        "a 308 to an absolute URL with a fragment",
        _USED,
        lambda s: (
            moved(f"{s.base}{s.good}#top".encode(), status=b"308 Permanent Redirect"),
            End.KEEP,
        ),
    ),
    Fault(
        "moved_to_itself",
        "a redirect to its own address",
        _NO_WAY,
        lambda s: (moved(s.path.encode()), End.KEEP),
    ),
    Fault(
        "moved_in_circle",
        "two addresses that lead to each other",
        _NO_WAY,
        lambda s: (moved(_opposite(s.path).encode()), End.KEEP),
    ),
    Fault(
        "moved_on_and_on",
        "redirects to ever new addresses",
        _NO_WAY,
        lambda s: (moved(f"{s.path}?{s.number}".encode()), End.KEEP),
    ),
    Fault(
        "moved_with_crlf",
        "a Location with a percent-encoded line end and a forged field",
        # Followed byte for byte it is harmless; a client may also refuse it.
        _one_of(300, None),
        lambda s: (moved(f"{s.good}/%0d%0aX-Evil: y".encode()), End.KEEP),
    ),
    Fault(
        "moved_with_latin_1",
        "a Location with bytes that are no UTF-8",
        # RFC 3986 knows no such bytes; most clients encode and follow.
        _one_of(300, None),
        lambda s: (moved(s.good.encode() + b"?\xe9\xff"), End.KEEP),
    ),
    Fault("moved_to_empty", "an empty Location", _NO_WAY, lambda _: (moved(b""), End.KEEP)),
    Fault(
        "moved_without_location",
        "a 302 that does not say where to",
        # No redirect without a target, so a status without a document; or a redirect to nowhere.
        _one_of(300, 301),
        lambda _: (reply(b"", status=b"302 Found"), End.KEEP),
    ),
    Fault(
        "moved_to_script",
        "a Location that is a script",
        _NO_WAY,
        lambda _: (moved(b"javascript:alert(1)"), End.KEEP),
    ),
    Fault(
        "moved_to_file",
        "a Location that is a file",
        _NO_WAY,
        lambda _: (moved(b"file:///etc/passwd"), End.KEEP),
    ),
    Fault(
        "moved_to_broken_host",
        "a Location that is no URL",
        _NO_WAY,
        lambda _: (moved(b"http://[bad/"), End.KEEP),
    ),
    Fault(
        "moved_to_broken_port",
        "a Location with a port above 65,535",
        _NO_WAY,
        lambda _: (moved(b"http://127.0.0.1:99999/"), End.KEEP),
    ),
    Fault(
        "moved_to_forbidden",
        "a Location outside the allowed networks",
        _NO_WAY,
        lambda s: (moved(s.forbidden.encode()), End.KEEP),
    ),
    Fault(
        "moved_with_password",
        "a Location with a user and a password",
        # RFC 9110 4.2.4 asks to treat user information in a received URL as an error.
        _NO_WAY,
        lambda s: (moved(f"{s.base}{s.good}".replace("//", "//u:p@", 1).encode()), End.KEEP),
    ),
    Fault(
        "moved_with_endless_body",
        "a redirect with a body that never ends",
        # Its body is of no interest; a client that reads it all the same stops at the cap.
        _one_of(301, None),
        lambda s: _after(
            b"HTTP/1.1 302 Found\r\nLocation: " + s.good.encode() + b"\r\n\r\n",
            repeat(b"x" * BLOCK),
        ),
    ),
)

BODIES = (
    Fault("empty_body", "nothing at all", _NO_XML, lambda _: (reply(b""), End.KEEP)),
    Fault("json", "JSON", _NO_XML, lambda _: (reply(b'{"ads": []}'), End.KEEP)),
    Fault(
        "html",
        "an error page with status 200",
        # Some pages happen to be XML: then they are XML that is no VAST.
        _one_of(100, 101),
        lambda _: (reply(b"<!DOCTYPE html><html><br><p>Oops</html>"), End.KEEP),
    ),
    Fault(
        "zeros",
        "a page of zero bytes",
        _NO_XML,
        lambda _: (reply(bytes(4096)), End.KEEP),
    ),
    Fault(
        "cut_xml",
        "the first half of the document, with a right length",
        _NO_XML,
        lambda s: (reply(_half(s.document)), End.KEEP),
    ),
    Fault(
        "other_xml",
        "XML that is no VAST",
        _one_of(101),
        lambda _: (reply(b"<rss version='2.0'><channel/></rss>"), End.KEEP),
    ),
    Fault("no_ad", "an empty VAST", _NO_AD, lambda _: (reply(b'<VAST version="4.2"/>'), End.KEEP)),
    Fault(
        "document_type",
        "the document with a DOCTYPE before it",
        _NO_XML,
        lambda s: (reply(b'<!DOCTYPE VAST [<!ENTITY a "b">]>' + s.document), End.KEEP),
    ),
    Fault(
        "blank_before_declaration",
        "line ends before the XML declaration",
        _USED,
        lambda s: (reply(b'\r\n\n <?xml version="1.0"?>' + s.document), End.KEEP),
    ),
    Fault(
        "false_utf_16",
        "UTF-8 that is declared as UTF-16",
        _USED,
        lambda s: (reply(b'<?xml version="1.0" encoding="utf-16"?>' + s.document), End.KEEP),
    ),
    Fault(
        "true_utf_16",
        "UTF-16 with a byte order mark",
        _USED,
        lambda s: (reply(s.document.decode().encode("utf-16")), End.KEEP),
    ),
    Fault(
        "junk_behind_root",
        "a tracking script behind the document's end",
        # A repair that is safe, and that nobody has to make.
        _one_of(100, None),
        lambda s: (reply(s.document + b"<script>x</script>"), End.KEEP),
    ),
)

PLACES = (
    Fault(
        "closed_port",
        "nobody listens",
        _UNAVAILABLE,
        lambda _: (),
        Place.CLOSED_PORT,
    ),
    Fault(
        "full_backlog",
        "a listener that takes no more connections and refuses none",
        _UNAVAILABLE,
        lambda _: (),
        Place.FULL_BACKLOG,
    ),
    Fault(
        "unknown_name",
        "a name that does not exist",
        _UNAVAILABLE,
        lambda _: (),
        Place.UNKNOWN_NAME,
    ),
    Fault(
        "tls_to_plain",
        "an https URL of a port without TLS",
        _UNAVAILABLE,
        lambda s: (reply(s.document),),
        Place.TLS_TO_PLAIN,
    ),
    Fault(
        "plain_to_tls",
        "an http URL of a port with TLS",
        _UNAVAILABLE,
        lambda s: (reply(s.document),),
        Place.PLAIN_TO_TLS,
    ),
    Fault(
        "untrusted_certificate",
        "a certificate of an authority that nobody knows",
        _UNAVAILABLE,
        lambda s: (reply(s.document),),
        Place.UNTRUSTED,
    ),
    Fault(
        "expired_certificate",
        "a certificate that was good until yesterday",
        _UNAVAILABLE,
        lambda s: (reply(s.document),),
        Place.EXPIRED,
    ),
    Fault(
        "certificate_of_another_name",
        "a good certificate of somebody else",
        _UNAVAILABLE,
        lambda s: (reply(s.document),),
        Place.OTHER_NAME,
    ),
)

FAULTS: tuple[Fault, ...] = (
    *CONNECTIONS,
    *ENDLESS,
    *HEADERS,
    *LENGTHS,
    *CODINGS,
    *STATUSES,
    *REDIRECTS,
    *BODIES,
    *PLACES,
)

LATE_SECOND_REPLY = Fault(
    "late_second_reply",
    "a second response that nobody asked for, while the connection lies idle",
    _USED,
    lambda s: (reply(s.document), DRIP, reply(an_inline(SMUGGLED.decode())), End.KEEP),
)
"""
Not among the others: what else is asked on the same connection meanwhile is harmed by right.
"""


ALL_FAULTS = (*FAULTS, LATE_SECOND_REPLY)
"""What a hostile server knows, by the names in its addresses."""


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _opposite(path: str) -> str:
    return path.removesuffix("/there") if path.endswith("/there") else f"{path}/there"


def an_inline(ad_id: str = "ad", *, errors: Iterable[str] = ()) -> bytes:
    """Give a VAST document with one InLine ad whose id is *ad_id*."""
    return f"""<VAST version="3.0"><Ad id="{ad_id}"><InLine><AdSystem>hostile</AdSystem>\
<AdTitle>{AD_TITLE}</AdTitle>{_error_elements(errors)}<Impression id="{ad_id}">\
<![CDATA[http://track.example/impression/{ad_id}]]></Impression><Creatives><Creative><Linear>\
<Duration>00:00:15</Duration><MediaFiles><MediaFile delivery="progressive" type="video/mp4" \
width="640" height="360"><![CDATA[http://media.example/{ad_id}.mp4]]></MediaFile></MediaFiles>\
</Linear></Creative></Creatives></InLine></Ad></VAST>""".encode()


def a_wrapper(
    target: str, *, errors: Iterable[str] = (), attributes: str = "", extra: str = ""
) -> bytes:
    """
    Give a VAST document with one Wrapper that leads to *target*.

    *attributes* stand in the Wrapper's start tag, *extra* is XML before its VASTAdTagURI.
    """
    return f"""<VAST version="3.0"><Ad>{
        wrapper_element(target, errors=errors, attributes=attributes, extra=extra)
    }</Ad></VAST>""".encode()


def wrapper_element(
    target: str, *, errors: Iterable[str] = (), attributes: str = "", extra: str = ""
) -> str:
    """Give the Wrapper of :func:`a_wrapper` alone."""
    return f"""<Wrapper {attributes}><AdSystem>hostile</AdSystem>{extra}\
<VASTAdTagURI><![CDATA[{target}]]></VASTAdTagURI>{_error_elements(errors)}\
<Impression><![CDATA[http://track.example/impression/wrapper]]></Impression>\
<Creatives/></Wrapper>"""


def _error_elements(errors: Iterable[str]) -> str:
    return "".join(f"<Error><![CDATA[{each}]]></Error>" for each in errors)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that the server was sent."""

    name: str
    """The fault that was asked for."""
    key: str
    query: str
    """Byte for byte, as Latin-1."""
    headers: tuple[tuple[str, str], ...]
    """Names in lower case."""

    def header(self, name: str) -> str | None:
        """Give the first value of header *name* (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


async def _read_request(reader: asyncio.StreamReader) -> tuple[str, Seen]:
    """Read one request; give its path with the record of it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    request_line, *lines = head.split("\r\n")[:-2]
    path, _, query = request_line.split(" ")[1].partition("?")
    fields = (line.partition(":") for line in lines)
    headers = tuple((name.lower(), value.strip()) for name, _, value in fields)
    name, key = [*path.removeprefix("/").split("/"), ""][:2]
    return path, Seen(name, key, query, headers)


class Trap:
    """
    A port on all of the loopback *addresses* that nobody may reach; a context manager.

    It takes no connection, so it needs neither a loop nor a thread: the kernel completes and
    keeps the connections of those who come, and :attr:`reached` counts them.
    """

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses
        self._listeners: list[socket.socket] = []
        self._reached = 0
        self._open = contextlib.ExitStack()
        self.port = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for address in self._addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                listener = stack.enter_context(socket.socket(family))
                listener.bind((address, self.port))
                listener.listen(socket.SOMAXCONN)
                listener.setblocking(False)  # noqa: FBT003 - the method has no other form
                self._listeners.append(listener)
                self.port = listener.getsockname()[1]
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def reached(self) -> int:
        """How many connections have come so far."""
        for listener in self._listeners:
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    self._reached += 1
        return self._reached

    def __repr__(self) -> str:
        return f"<Trap on port {self.port}, reached {self.reached} times>"


@dataclass(slots=True)
class _Listeners:
    """The sockets of a hostile server, by what a URL is made of."""

    plain: int = 0
    tls: dict[Place, int] = field(default_factory=dict)
    closed: int = 0
    full: int = 0
    sockets: list[socket.socket] = field(default_factory=list)


class HostileServer:
    """
    Answer ``/<fault>/<key>`` on loopback *address* as the fault does.

    *port* is that of the plain listener; 0 takes a free one. *forbidden* is where redirects out
    of bounds lead to. ``documents`` holds by key what would be right to answer; a key without one
    gets an InLine ad. Every request is kept in ``seen``. A client that trusts the authority
    :attr:`ca` tells the certificates that are only expired, or of another name, by what is wrong
    with them.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int = 0,
        *,
        forbidden: str = "http://127.0.0.2:9/",
    ) -> None:
        self.address = address
        self.forbidden = forbidden
        self.documents: dict[str, bytes] = {}
        self.seen: list[Seen] = []
        self.ca = trustme.CA()
        self._times: Counter[tuple[str, str]] = Counter()
        self._faults: Mapping[str, Fault] = {each.name: each for each in ALL_FAULTS}
        self._ports = _Listeners(plain=port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._ports.plain = await self._listen(stack, self._ports.plain, None)
            for place, context in self._contexts().items():
                self._ports.tls[place] = await self._listen(stack, 0, context)
            self._ports.closed = self._bound(stack).getsockname()[1]
            self._ports.full = self._full_backlog(stack)
            stack.push_async_callback(self._stop_tasks)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    def url(self, fault: Fault | str, key: str, query: str = "") -> str:
        """Give the URL under which *fault* happens to the document *key*."""
        name = fault if isinstance(fault, str) else fault.name
        place = self._faults[name].place if name in self._faults else Place.PLAIN
        return f"{self.base(place)}/{name}/{key}" + (f"?{query}" if query else "")

    def base(self, place: Place = Place.PLAIN) -> str:
        """Give the scheme, host and port of URLs that point to *place*."""
        scheme = "https" if place in _TLS else "http"
        host = "no-such-name.invalid" if place is Place.UNKNOWN_NAME else self.address
        port = {
            Place.CLOSED_PORT: self._ports.closed,
            Place.FULL_BACKLOG: self._ports.full,
            Place.PLAIN_TO_TLS: self._ports.tls.get(Place.UNTRUSTED, 0),
            **self._ports.tls,
        }.get(place, self._ports.plain)
        return f"{scheme}://{host}:{port}"

    async def _listen(
        self, stack: contextlib.AsyncExitStack, port: int, context: ssl.SSLContext | None
    ) -> int:
        server = await asyncio.start_server(self._converse, self.address, port, ssl=context)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    def _contexts(self) -> dict[Place, ssl.SSLContext]:
        yesterday = datetime.now(UTC) - timedelta(days=1)
        certificates = {
            Place.UNTRUSTED: trustme.CA().issue_cert(self.address),
            Place.EXPIRED: self.ca.issue_cert(self.address, not_after=yesterday),
            Place.OTHER_NAME: self.ca.issue_cert("other.example"),
        }
        return {place: _context(each) for place, each in certificates.items()}

    def _bound(self, stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> socket.socket:
        """Give a socket that holds a port and does not listen on it."""
        holder = stack.enter_context(socket.socket())
        holder.bind((self.address, 0))
        return holder

    def _full_backlog(self, stack: contextlib.AsyncExitStack) -> int:
        """Give a port where Linux drops every further SYN: a queue of one, and it is taken."""
        listener = self._bound(stack)
        listener.listen(0)
        port: int = listener.getsockname()[1]
        stack.enter_context(socket.create_connection((self.address, port)))
        return port

    async def _stop_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # One turn of the loop for the transports to close behind their tasks.
        await asyncio.sleep(0)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer) is End.KEEP:
                pass
            writer.close()
            await writer.wait_closed()
        # A task that is ended by its server ends well: asyncio would log a cancelled one.
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> End:
        path, seen = await _read_request(reader)
        script = self._script(seen)
        scene = Scene(
            document=self.documents.get(seen.key, an_inline(seen.key)),
            key=seen.key,
            path=path,
            base=self.base(),
            forbidden=self.forbidden,
            number=len(self.seen),
            times=self._times[seen.name, seen.key],
        )
        self.seen.append(seen)
        self._times[seen.name, seen.key] += 1
        return await _perform(script(scene), reader, writer)

    def _script(self, seen: Seen) -> Script:
        if seen.name in self._faults:
            return self._faults[seen.name].script
        return lambda _: (reply(b"", status=b"404 Not Found"), End.KEEP)

    def __repr__(self) -> str:
        return f"<HostileServer {self.base()}, {len(self.seen)} requests>"


def _context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def _perform(
    steps: Iterable[Step], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> End:
    """Send a script's *steps*; give the end that the connection is left in."""
    for step in steps:
        if isinstance(step, End):
            return await _leave(step, reader, writer)
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            writer.write(step)
            await writer.drain()
            # A peer that reads fast must not keep the loop from everybody else.
            await asyncio.sleep(0)
    return End.CLOSE


async def _leave(end: End, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> End:
    if end is End.HALF_CLOSE:
        writer.write_eof()
    if end in (End.HANG, End.HALF_CLOSE):
        while await reader.read(BLOCK):
            pass
    if end is End.RESET:
        handle = writer.get_extra_info("socket")
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    return end
