"""
Read a VAST document from bytes.

The sentence to hold: any bytes give a document or a :class:`~vastproxy.errors.VastError`, in
bounded time and memory.

Rule 1: the hardened parser is tried first, on the bytes as they came. Only what it refuses is
mended, and only by the repairs named here, each of which leaves a well-formed document alone.
Rule 2: libxml2's own recovery is never used: it cuts URLs at a bare ``&`` and drops text.
Rule 3: a document type is refused before libxml2 sees it: no entity is ever declared.
Rule 4: every scan is linear. Patterns with an end mark are searched with ``find``, since a lazy
regular expression is quadratic where the end never comes.
"""

import codecs
import re
from collections.abc import Callable, Iterator
from html.entities import html5
from xml.sax.saxutils import escape

from lxml import etree

from vastproxy.errors import VastSchemaError, VastSyntaxError, VastVersionError
from vastproxy.vast.document import VastDocument, local_name

MAX_TAGS = 60_000
"""
Opening angle brackets in one document. The largest pods seen have some thousands; a megabyte of
``<a/>`` would take 100 ms and 40 MB.
"""

MAX_PREFIXES = 32
"""Undeclared namespace prefixes that are declared for a document; the wild has one or two."""

_BLANK = b" \t\r\n"
_DECLARED = re.compile(rb"(?:\xef\xbb\xbf)?<\?xml[ \t\r\n]")
_WELL_DECLARED = re.compile(
    rb"(?:\xef\xbb\xbf)?<\?xml\s+version\s*=\s*(['\"])1\.[0-9]+\1"
    rb"(?:\s+encoding\s*=\s*(['\"])[A-Za-z][A-Za-z0-9._-]*\2)?"
    rb"(?:\s+standalone\s*=\s*(['\"])(?:yes|no)\3)?\s*\?>"
)
_DECLARATION = re.compile(
    rb"<\?xml[ \t\r\n][^>]{0,200}?encoding[ \t\r\n]*=[ \t\r\n]*"
    rb"[\"']([A-Za-z][A-Za-z0-9._-]{0,30})[\"']"
)
# What browsers read too, less those that can hide a "<" (UTF-7, EBCDIC, the ISO-2022 family).
_ENCODINGS = frozenset(
    [
        "utf-8",
        "utf8",
        "us-ascii",
        "ascii",
        "iso-8859-1",
        "latin-1",
        "latin1",
        "iso-8859-2",
        "iso-8859-15",
        "windows-1250",
        "windows-1251",
        "windows-1252",
        "windows-1254",
        "cp1251",
        "cp1252",
        "koi8-r",
        "shift_jis",
        "euc-jp",
        "euc-kr",
        "gb2312",
        "gbk",
        "gb18030",
        "big5",
    ]
)
_UTF8 = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
# Declared so, but read byte by byte without a NUL: the declaration is wrong.
_NOT_BYTEWISE = frozenset({"utf-16", "utf-16le", "utf-16be", "utf-16-le", "utf-16-be", "unicode"})

_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_BARE_AMPERSAND = re.compile(r"&(?!#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[A-Za-z][A-Za-z0-9]{0,31};)")
_NAMED_ENTITY = re.compile(r"&([A-Za-z][A-Za-z0-9]{0,31});")
_XML_ENTITIES = frozenset({"amp", "lt", "gt", "quot", "apos"})
_PREFIX_USED = re.compile(r"[<\s]/?([A-Za-z_][\w.-]{0,63}):[A-Za-z_]")
_PREFIX_DECLARED = re.compile(r"xmlns:([A-Za-z_][\w.-]{0,63})\s*=")
_ROOT_TAG = re.compile(
    r"<(/?)(?:[A-Za-z_][\w.-]{0,63}:)?(?:VAST|VideoAdServingTemplate)(?:\s[^<>]*?)?(/?)>"
)
_NAME = re.compile(r"<[^\s/>]{1,200}")
_KNOWN_PREFIXES = {
    "xsi": "http://www.w3.org/2001/XMLSchema-instance",
    "xlink": "http://www.w3.org/1999/xlink",
    "vmap": "http://www.iab.net/videosuite/vmap",
}


def hardened_parser() -> etree.XMLParser:
    """
    Make a parser that opens nothing, expands nothing and keeps what it does not understand.

    ``collect_ids=False`` is left out on purpose: with it libxml2 opens external subsets.
    """
    return etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        recover=False,
        strip_cdata=False,
        encoding="utf-8",
    )


# One parser for the event loop's thread: a new one for each document costs 15 percent.
_PARSER = hardened_parser()


def parse(
    data: bytes, *, charset: str | None = None, parser: etree.XMLParser | None = None
) -> VastDocument:
    """
    Read a document.

    *charset* is what HTTP said; it counts only where the bytes do not say themselves and are no
    UTF-8. *parser* is needed off the event loop's thread: :func:`hardened_parser` makes one.
    Raises VastSyntaxError (code 100), VastSchemaError (101) or VastVersionError (102).
    """
    source, repairs = _decoded(data)
    _refuse_unreadable(source)
    try:
        root = etree.fromstring(source, parser or _PARSER)
    except etree.XMLSyntaxError as error:
        root, mended = _mended(source, charset, parser or _PARSER, str(error))
        repairs += mended
    return _document(root, repairs, len(source))


def is_plain(data: bytes) -> bool:
    """
    Whether *data* is UTF-8 and says nothing else of itself: it may be passed on as it is.

    A declaration that is none by XML 1.0 section 2.8 is forgiven when reading, not when passing on.
    """
    match = _DECLARATION.match(data)
    if match is not None and match[1].decode().lower() not in _UTF8:
        return False
    if _DECLARED.match(data) and not _WELL_DECLARED.match(data):
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _document(root: etree._Element, repairs: tuple[str, ...], size: int) -> VastDocument:
    if root.getroottree().docinfo.internalDTD is not None:
        raise VastSyntaxError("a document type is not allowed")
    name = local_name(root)
    if name == "VideoAdServingTemplate":
        raise VastVersionError("VAST 1.x is not supported")
    if name != "VAST":
        raise VastSchemaError(f"the root element is <{name[:40]}>, not <VAST>")
    return VastDocument(root, repairs, size)


def _decoded(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Give the document as UTF-8 without mark and declaration, and what was wrong about it."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise VastSyntaxError("UTF-32 is not supported")
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if data.startswith(mark):
            return _without_declaration(_recoded(data[len(mark) :], encoding)), ()
    for start, encoding in ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be")):
        if data.startswith(start) and b"\0\0" not in data[:4]:
            return _without_declaration(_recoded(data, encoding)), ("UTF-16 without a mark",)
    stripped = data.lstrip(_BLANK).removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    repairs = ("blanks before the document",) if data[:1] in (b" ", b"\t", b"\r", b"\n") else ()
    return _by_declaration(stripped, repairs)


def _by_declaration(data: bytes, repairs: tuple[str, ...]) -> tuple[bytes, tuple[str, ...]]:
    match = _DECLARATION.match(data)
    encoding = match[1].decode().lower() if match else "utf-8"
    if encoding in _NOT_BYTEWISE:
        return _without_declaration(data), (*repairs, f"declared as {encoding}, but is not")
    if encoding not in _ENCODINGS:
        raise VastSyntaxError(f"the encoding {encoding} is not supported")
    if encoding in _UTF8:
        return _without_declaration(data), repairs
    return _without_declaration(_recoded(data, encoding)), repairs


def _recoded(data: bytes, encoding: str) -> bytes:
    try:
        return data.decode(encoding).lstrip().encode()
    except UnicodeError as error:
        raise VastSyntaxError(f"the text is not {encoding}: {error}") from None


def _without_declaration(source: bytes) -> bytes:
    """Cut the XML declaration: it may lie about the encoding, and a new one is written."""
    if source[:5] != b"<?xml" or source[5:6] not in (b" ", b"\t", b"\r", b"\n"):
        return source
    end = source.find(b"?>")
    return source[end + 2 :].lstrip(_BLANK) if end >= 0 else source


def _refuse_unreadable(source: bytes) -> None:
    if not source:
        raise VastSyntaxError("the document is empty")
    if source.count(b"<") > MAX_TAGS:
        raise VastSyntaxError(f"more than {MAX_TAGS} tags")
    _root_start(source)


def _root_start(source: bytes) -> int:
    """Find the root element's ``<``, past comments and instructions; refuse a document type."""
    at = 0
    while True:
        while source[at : at + 1] in (b" ", b"\t", b"\r", b"\n"):
            at += 1
        if source.startswith(b"<!--", at):
            at = _after(source, b"-->", at + 4)
        elif source.startswith(b"<?", at):
            at = _after(source, b"?>", at + 2)
        elif source.startswith(b"<!", at):
            raise VastSyntaxError("a document type is not allowed")
        elif source.startswith(b"<", at):
            return at
        else:
            raise VastSyntaxError(f"this is no XML: it begins with {source[at : at + 20]!r}")


def _after(source: bytes, mark: bytes, start: int) -> int:
    end = source.find(mark, start)
    if end < 0:
        raise VastSyntaxError("a comment or instruction does not end")
    return end + len(mark)


# --- Repairs ------------------------------------------------------------------------------------


def _mended(
    source: bytes, charset: str | None, parser: etree.XMLParser, complaint: str
) -> tuple[etree._Element, tuple[str, ...]]:
    """Try every repair, in turn, and read once more; *complaint* is what the parser first said."""
    text, repairs = _as_text(source, charset)
    for name, repair in _REPAIRS:
        changed = repair(text)
        if changed != text:
            text, repairs = changed, (*repairs, name)
    if not repairs:
        raise VastSyntaxError(complaint)
    try:
        return etree.fromstring(text.encode(), parser), repairs
    except etree.XMLSyntaxError as error:
        raise VastSyntaxError(str(error)) from None


def _as_text(source: bytes, charset: str | None) -> tuple[str, tuple[str, ...]]:
    try:
        return source.decode(), ()
    except UnicodeDecodeError:
        named = (charset or "").strip("\"' ").lower()
        encoding = named if named in _ENCODINGS - _UTF8 else "cp1252"
    try:
        return source.decode(encoding), (f"no UTF-8, read as {encoding}",)
    except UnicodeDecodeError as error:
        raise VastSyntaxError(f"the text is neither UTF-8 nor {encoding}: {error}") from None


def _segments(text: str) -> Iterator[tuple[bool, str]]:
    """Cut *text* into markup (True) and CDATA sections or comments (False), in order."""
    at = 0
    while (start := _first(text, at)) >= 0:
        mark = "]]>" if text.startswith("<![CDATA[", start) else "-->"
        end = text.find(mark, start + 4)
        if end < 0:
            break
        yield True, text[at:start]
        yield False, text[start : end + 3]
        at = end + 3
    yield True, text[at:]


_OPENING = re.compile(r"<!\[CDATA\[|<!--")


def _first(text: str, at: int) -> int:
    match = _OPENING.search(text, at)
    return match.start() if match else -1


def _in_markup(text: str, change: Callable[[str], str]) -> str:
    return "".join([change(part) if markup else part for markup, part in _segments(text)])


def _strip_forbidden(text: str) -> str:
    return _FORBIDDEN.sub("", text)


def _end_at_root(text: str) -> str:
    """Cut what follows the root element's end tag; a document inside it ends nothing."""
    at = depth = 0
    for markup, part in _segments(text):
        for match in _ROOT_TAG.finditer(part) if markup else ():
            depth += 0 if match[2] else -1 if match[1] else 1
            if match[1] and depth <= 0:
                return text[: at + match.end()]
        at += len(part)
    return text


def _escape_ampersands(text: str) -> str:
    """Write a bare ``&`` as ``&amp;``, and HTML's named characters as themselves."""
    return _in_markup(text, _escape_part)


def _escape_part(part: str) -> str:
    # In two passes: a constant is put in much faster than what a function gives, and there may
    # be half a million of them.
    return _NAMED_ENTITY.sub(_entity, _BARE_AMPERSAND.sub("&amp;", part))


def _entity(match: re.Match[str]) -> str:
    whole, name = match[0], match[1]
    if name in _XML_ENTITIES:
        return whole
    character = html5.get(name + ";")
    return "&amp;" + whole[1:] if character is None else escape(character, {'"': "&quot;"})


def _declare_prefixes(text: str) -> str:
    """Declare namespace prefixes that are used and nowhere declared (vmap-js samples: ``xsi:``)."""
    used: dict[str, None] = {}
    declared: set[str] = {"xml", "xmlns"}
    for markup, part in _segments(text):
        if markup:
            used.update(dict.fromkeys(_PREFIX_USED.findall(part)))
            declared.update(_PREFIX_DECLARED.findall(part))
    # Text may look like a prefix ("http:x"); a declaration too many does no harm.
    missing = [each for each in used if each not in declared][:MAX_PREFIXES]
    if not missing:
        return text
    encoded = text.encode()
    start = _NAME.match(text, len(encoded[: _root_start(encoded)].decode()))
    if start is None:
        return text
    added = "".join(
        f' xmlns:{each}="{_KNOWN_PREFIXES.get(each, "urn:undeclared:" + each)}"' for each in missing
    )
    return text[: start.end()] + added + text[start.end() :]


_REPAIRS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("control characters removed", _strip_forbidden),
    ("text after the end removed", _end_at_root),
    ("bare ampersands escaped", _escape_ampersands),
    ("undeclared prefixes declared", _declare_prefixes),
)
