"""
A VAST document: an lxml tree behind typed accessors.

The tree belongs to one request. It is moved and changed by the merge, never copied as a whole.
Elements are found by local name in any namespace: documents of VAST 2 and 3 have none, those of
VAST 4 should have the IAB's, and the wild has both, prefixes, and neighbours of the right one.
"""

import re
from collections.abc import Iterator

from lxml import etree

IAB_NAMESPACE = "http://www.iab.com/VAST"

DEFAULT_VERSION = (3, 0)
"""What a document without a readable version is taken for: attributes of VAST 3 apply."""

_VERSION = re.compile(r"\s*(\d{1,3})(?:\.(\d{1,3}))?")


def children(element: etree._Element, name: str) -> Iterator[etree._Element]:
    """Go through the children of *element* with local name *name*."""
    return element.iterchildren("{*}" + name)


def child(element: etree._Element, name: str) -> etree._Element | None:
    """Give the first child of *element* with local name *name*, or None."""
    return next(element.iterchildren("{*}" + name), None)


def local_name(element: etree._Element) -> str:
    """Give the name of *element* without its namespace; empty for comments and instructions."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def namespace_of(element: etree._Element) -> str:
    """Give the namespace of *element*; empty for none."""
    tag = element.tag
    return tag[1:].partition("}")[0] if isinstance(tag, str) and tag[0] == "{" else ""


def text_of(element: etree._Element) -> str:
    """Give the text of *element* without surrounding blanks; a comment inside does not cut it."""
    if len(element) == 0:
        return (element.text or "").strip()
    return "".join([element.text or "", *(each.tail or "" for each in element)]).strip()


def boolean(value: str | None) -> bool | None:
    """Read an ``xs:boolean``, in any case; None where there is none or it is unreadable."""
    return {"true": True, "1": True, "false": False, "0": False}.get((value or "").strip().lower())


class Ad:
    """One ``<Ad>`` of a document: an InLine, a Wrapper, or neither."""

    __slots__ = ("body", "document", "element", "is_inline", "is_wrapper", "sequence")

    def __init__(self, element: etree._Element, document: "VastDocument") -> None:
        self.element = element
        self.document = document
        body = child(element, "InLine")
        self.is_inline = body is not None
        if body is None:
            body = child(element, "Wrapper")
        self.is_wrapper = body is not None and not self.is_inline
        self.body = body if body is not None else element
        self.sequence = _sequence(element.get("sequence"))

    @property
    def id(self) -> str:
        """The ad's id; empty for none."""
        return self.element.get("id", "")

    @property
    def system(self) -> str:
        """The name of the ad server that made this ad; empty for none."""
        found = child(self.body, "AdSystem")
        return text_of(found) if found is not None else ""

    @property
    def errors(self) -> list[str]:
        """The ad's error URIs, macros as they are."""
        return _texts(children(self.body, "Error"))

    @property
    def tag_uri(self) -> str:
        """
        Where a wrapper leads to, as written; empty for nowhere.

        ``VASTAdTagURL/URL`` is the spelling of VAST 2.0's drafts, and still in use.
        """
        found = child(self.body, "VASTAdTagURI")
        if found is None:
            found = child(self.body, "VASTAdTagURL")
            inner = child(found, "URL") if found is not None else None
            found = inner if inner is not None else found
        return text_of(found) if found is not None else ""

    @property
    def follows_wrappers(self) -> bool:
        """Whether further wrappers may come (VAST 4.3 section 3.19, default true)."""
        return boolean(self.body.get("followAdditionalWrappers")) is not False

    @property
    def allows_multiple(self) -> bool:
        """
        Whether a pod or a buffet may come (VAST 4.3 section 3.19, default false).

        Before VAST 3.0 the attribute did not exist, and nothing was forbidden.
        """
        stated = boolean(self.body.get("allowMultipleAds"))
        return self.document.version < (3, 0) if stated is None else stated

    @property
    def fallback_on_no_ad(self) -> bool | None:
        """Whether a stand-alone ad of the same response may step in; None where unsaid."""
        return boolean(self.body.get("fallbackOnNoAd"))

    def __repr__(self) -> str:
        kind = "InLine" if self.is_inline else "Wrapper" if self.is_wrapper else "empty"
        return f"<Ad {self.id or '-'} {kind}>"


class VastDocument:
    """A parsed document. *repairs* says, in words, what had to be mended to read it."""

    __slots__ = ("repairs", "root", "size", "version")

    def __init__(self, root: etree._Element, repairs: tuple[str, ...] = (), size: int = 0) -> None:
        self.root = root
        self.repairs = repairs
        self.size = size
        """Bytes that it was read from."""
        match = _VERSION.match(root.get("version") or "")
        self.version = (int(match[1]), int(match[2] or 0)) if match else DEFAULT_VERSION
        """The version as numbers, for comparing."""

    @property
    def ads(self) -> list[Ad]:
        """
        Every ``<Ad>``, in the order of the document.

        Made anew each time: a document that held its ads, which hold it, would keep its tree until
        the garbage collector comes.
        """
        return [Ad(each, self) for each in children(self.root, "Ad")]

    @property
    def error_elements(self) -> list[etree._Element]:
        """The ``<Error>`` elements of the root: whom to tell that there was no ad."""
        return list(children(self.root, "Error"))

    @property
    def errors(self) -> list[str]:
        """Their URIs, macros as they are."""
        return _texts(children(self.root, "Error"))

    def __repr__(self) -> str:
        return f"<VastDocument {'.'.join(map(str, self.version))}, ads: {self.ads}>"


def _texts(elements: Iterator[etree._Element]) -> list[str]:
    return [text for each in elements if (text := text_of(each))]


def _sequence(value: str | None) -> int | None:
    """Read a place in a pod: a number from 1; anything else makes a stand-alone ad."""
    text = (value or "").strip()
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0  # noqa: PLR2004
    return number or None
