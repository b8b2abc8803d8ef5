"""
Put the proxy's own ``<Impression>`` into ads: the beacon that says that an ad was shown.

Rule 1: it stands behind the ad's own. A player that calls only the first calls the ad server's.
Rule 2: a document that is passed through is not written anew: bytes are put in, none is changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.parsers import expat

from lxml import etree

from vastproxy.vast.document import children, local_name, namespace_of
from vastproxy.vast.unwrap import ResolvedAd

IMPRESSION_ID = "vastproxy"
"""The ``id`` of our Impressions: whose they are (VAST 4.3 section 3.4.4)."""

_BEHIND = frozenset({"Pricing", "ViewableImpression", "Creatives", "AdVerifications", "Extensions"})
"""Children of an InLine before which the merge would put an Impression, where it has none."""

_AD_DEPTH, _BODY_DEPTH, _IMPRESSION_DEPTH = 2, 3, 4
"""How deep in a document they stand; the root is 1."""


def add_impression(ad: ResolvedAd, url: str, id: str = IMPRESSION_ID) -> None:  # noqa: A002 - the attribute's name
    """
    Add an Impression of *url* to *ad*, into which its wrappers have been merged.

    It goes behind the last Impression; where there is none, where the merge would have put one.
    """
    body = ad.inline.body
    namespace = namespace_of(body)
    made = body.makeelement(f"{{{namespace}}}Impression" if namespace else "Impression", id=id)
    made.text = etree.CDATA(url)
    present = list(children(body, "Impression"))
    if present:
        present[-1].addnext(made)
        return
    for each in body.iterchildren(etree.Element):
        if local_name(each) in _BEHIND:
            each.addprevious(made)
            return
    body.append(made)


@dataclass(frozen=True, slots=True)
class Marked:
    """A document with Impressions put in."""

    body: bytes
    left_out: tuple[int, ...] = ()
    """Which of the URLs found no place in it, by their places in the sequence."""


def with_impressions(body: bytes, urls: Sequence[str | None]) -> Marked:
    """
    Put an Impression of the i-th of *urls* into the i-th ad of *body*, an InLine or a Wrapper.

    *body* is a document in UTF-8. It goes behind the ad's last Impression; where there is none,
    it is the last child. None is for an ad that gets none, and so is what *urls* has too few of.
    A document that cannot be read stays as it is, and all the URLs are left out.
    """
    places = _places(body)
    parts: list[bytes] = []
    left_out: list[int] = []
    done = 0
    for at, url in enumerate(urls):
        place = places[at] if at < len(places) else None
        if url is not None and place is not None:
            parts += [body[done : place.start], place.filled(url)]
            done = place.end
        elif url is not None:
            left_out.append(at)
    return Marked(b"".join([*parts, body[done:]]), tuple(left_out))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an Impression goes: instead of the bytes from *start* to *end*, mostly none."""

    name: str
    """Of the InLine or Wrapper, with its prefix."""
    start: int
    end: int

    def filled(self, url: str) -> bytes:
        """Write what goes there."""
        prefix, colon, _ = self.name.rpartition(":")
        tag = f"{prefix}{colon}Impression"
        inside = url.replace("]]>", "]]]]><![CDATA[>")
        text = f'<{tag} id="{IMPRESSION_ID}"><![CDATA[{inside}]]></{tag}>'
        if self.start < self.end:
            text = f">{text}</{self.name}>"
        return text.encode()


def _places(body: bytes) -> list[_Place | None]:
    """Find the place in each ad of *body*; none where the document cannot be read."""
    finder = _Finder(body)
    try:
        finder.read()
    except expat.ExpatError:
        return []
    return finder.found


class _Finder:
    """Reads a document once, and remembers where in its ads something can be put in."""

    def __init__(self, body: bytes) -> None:
        self.found: list[_Place | None] = []
        self._body = body
        self._depth = 0
        self._in_ad = False
        self._bodies: dict[str, _Place] = {}
        """Of the ad that is being read: the first InLine and the first Wrapper."""
        self._impression = 0
        """The byte behind the last Impression of the body that is being read; 0: there is none."""
        # Whatever it declares, the document was read as UTF-8.
        self._parser = expat.ParserCreate("utf-8")

    def read(self) -> None:
        """Read the document. Raises ExpatError."""
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._parser.Parse(self._body, True)  # noqa: FBT003 - expat's own signature

    def _start(self, name: str, _: object) -> None:
        self._depth += 1
        if self._depth == _AD_DEPTH:
            self._in_ad = name.rpartition(":")[2] == "Ad"
            self._bodies = {}
        elif self._depth == _BODY_DEPTH:
            self._impression = 0

    def _end(self, name: str) -> None:
        depth = self._depth
        self._depth -= 1
        if not self._in_ad or not _AD_DEPTH <= depth <= _IMPRESSION_DEPTH:
            return
        local = name.rpartition(":")[2]
        if depth == _IMPRESSION_DEPTH and local == "Impression":
            self._impression = self._behind(name)
        elif depth == _BODY_DEPTH and local in {"InLine", "Wrapper"}:
            self._bodies.setdefault(local, self._place(name))
        elif depth == _AD_DEPTH:
            self.found.append(self._bodies.get("InLine") or self._bodies.get("Wrapper"))
            self._in_ad = False

    def _place(self, name: str) -> _Place:
        at = self._parser.CurrentByteIndex
        if not self._has_end_tag(name):
            return _Place(name, at - len("/>"), at)
        return _Place(name, self._impression or at, self._impression or at)

    def _behind(self, name: str) -> int:
        """Give the byte behind the element that ends here."""
        at = self._parser.CurrentByteIndex
        return self._body.index(b">", at) + 1 if self._has_end_tag(name) else at

    def _has_end_tag(self, name: str) -> bool:
        """
        Whether the element that ends here is written with an end tag.

        Behind ``<InLine/>`` expat stands at what follows it. That is never an end tag of the same
        name: it would be the parent's, and that is an Ad, or, of an Impression, an InLine.
        """
        at = self._parser.CurrentByteIndex
        tag = f"</{name}".encode()
        behind = self._body[at + len(tag) : at + len(tag) + 1]
        return self._body.startswith(tag, at) and behind in b"> \t\r\n"

    def _refuse_doctype(self, *_: object) -> None:
        # An entity may hold elements, and those stand nowhere in the bytes.
        raise expat.ExpatError("a document type")
