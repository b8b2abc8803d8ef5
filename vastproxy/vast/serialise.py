"""
Write the answer: one document of InLine ads, or an empty one.

CDATA sections, comments, foreign namespaces and unknown attributes are written as they were
read. The XML declaration says UTF-8, and there is no byte order mark (docs/vast.md).
"""

from collections.abc import Iterable
from contextlib import suppress
from xml.parsers import expat
from xml.sax.saxutils import escape

from lxml import etree

from vastproxy.vast.document import (
    VastDocument,
    children,
    namespace_of,
    text_of,
)
from vastproxy.vast.macros import Macros, Spelling
from vastproxy.vast.merge import base_of, rename
from vastproxy.vast.unwrap import Unwrapped

DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>\n'

EMPTY_VERSION = "3.0"
"""For a player's sake: some refuse ``version="4.x"``, none refuses this one (docs/vast.md)."""


def assemble(unwrapped: Unwrapped) -> VastDocument:
    """
    Put the ads of *unwrapped* into one document, in playing order, numbered.

    The root is that of the newest InLine. An entry document whose ads all stay is not touched.
    """
    base = base_of(unwrapped)
    root = base.root
    chosen = [ad.inline.element for ad in unwrapped.ads]
    if [each.element for each in base.ads] != chosen:
        _replace_ads(base, unwrapped)
    for ad in unwrapped.ads:
        _number(ad.inline.element, ad.sequence)
    if not unwrapped.is_entry_alone:
        # Allowed only in place of an ad (VAST 4.3 section 3.2): the ads have them already.
        for each in base.error_elements:
            root.remove(each)
    return base


def _replace_ads(base: VastDocument, unwrapped: Unwrapped) -> None:
    root = base.root
    present = list(children(root, "Ad"))
    at = root.index(present[0])
    for each in present:
        root.remove(each)
    namespace = namespace_of(root)
    for place, ad in enumerate(unwrapped.ads, start=at):
        element = ad.inline.element
        source = namespace_of(element)
        root.insert(place, element)
        if source != namespace:
            rename(element, source, namespace)


def _number(element: etree._Element, sequence: int | None) -> None:
    if sequence is not None:
        if element.get("sequence", "").strip() != str(sequence):
            element.set("sequence", str(sequence))
    elif "sequence" in element.attrib:
        del element.attrib["sequence"]


MEDIA_MACROS = frozenset({"TIMESTAMP", "CACHEBUSTING", "CORRELATOR", "TRANSACTIONID"})
"""What is filled in the URLs of media files: no player does it there."""


_FILLED = frozenset({"MediaFile", "VASTAdTagURI"})


def fill_media(document: VastDocument, macros: Macros, how: Spelling) -> None:
    """Fill :data:`MEDIA_MACROS` in the media files of *document*."""
    for each in document.root.iter("{*}MediaFile"):
        url = text_of(each)
        if (filled := macros.fill_known(url, how, MEDIA_MACROS)) != url:
            for inner in list(each):
                each.remove(inner)
            each.text = etree.CDATA(filled)


def fill_spans(body: bytes, macros: Macros, how: Spelling) -> bytes:
    """
    Fill what is known in the media files and next addresses of *body*, and touch nothing else.

    *body* is a well-formed document in UTF-8. Values are percent-encoded, so they mean the same
    inside CDATA and outside.
    """
    if b"[" not in body and b"%" not in body and not how.aliases:
        return body
    parts = []
    done = 0
    for name, start, end in _spans(body):
        only = MEDIA_MACROS if name == "MediaFile" else None
        filled = macros.fill_known(body[start:end].decode(), how, only)
        parts += [body[done:start], filled.encode()]
        done = end
    return b"".join([*parts, body[done:]])


def _spans(body: bytes) -> list[tuple[str, int, int]]:
    """Find the contents of the elements whose URLs are filled: name, first byte, byte behind."""
    found: list[tuple[str, int, int]] = []
    begun: list[str] = []
    first: list[int] = []
    # Whatever it declares, the document was read as UTF-8.
    parser = expat.ParserCreate("utf-8")

    def inside(*_: object) -> None:
        if begun and not first:
            first.append(parser.CurrentByteIndex)

    def start(name: str, _: object) -> None:
        inside()
        if not begun and name.rpartition(":")[2] in _FILLED:
            begun.append(name)

    def end(name: str) -> None:
        inside()
        if begun and name == begun[0]:
            found.append((name.rpartition(":")[2], first[0], parser.CurrentByteIndex))
            begun.clear()
            first.clear()

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = parser.CommentHandler = inside
    parser.StartCdataSectionHandler = parser.ProcessingInstructionHandler = inside
    with suppress(expat.ExpatError):  # then what was found so far is filled
        parser.Parse(body, True)  # noqa: FBT003 - expat's own signature
    return [each for each in found if each[1] < each[2]]


def to_bytes(document: VastDocument) -> bytes:
    """Write *document*."""
    return DECLARATION + etree.tostring(document.root.getroottree(), encoding="utf-8")


def empty(version: str = EMPTY_VERSION, errors: Iterable[str] = ()) -> bytes:
    """Write a document without ads; *errors* are URIs that the player is to tell of it."""
    body = "".join(f"<Error>{_cdata(uri)}</Error>" for uri in errors)
    start = f'<VAST version="{escape(version, {chr(34): "&quot;"})}"'
    text = f"{start}>{body}</VAST>" if body else f"{start}/>"
    return DECLARATION + text.encode()


def _cdata(text: str) -> str:
    return "<![CDATA[" + text.replace("]]>", "]]]]><![CDATA[>") + "]]>"
