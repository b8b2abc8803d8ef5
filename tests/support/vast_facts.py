"""
What a VAST document says, ad by ad, as counted facts.

Rule 1: nothing of vastproxy is used here: this is the second opinion.
Rule 2: elements are found by local name; an ad is read in document order.
Rule 3: a text is the XPath string value of its element, without the blanks around it, so that
a comment inside an element does not cut it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lxml import etree

IAB = "http://www.iab.com/VAST"
"""The namespace of VAST 4; earlier versions have none (VAST 4.3 section 2.2)."""

VERIFICATIONS = "AdVerifications"
"""Name of the element, and type of the Extension that holds it before VAST 4.1."""


class Fact(NamedTuple):
    """One thing an ad says: where it stands, two attributes that matter, and its text."""

    kind: str
    event: str = ""
    offset: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class AdFacts:
    """One Ad element, told as facts."""

    id: str
    sequence: str | None
    inline: bool
    """False: it is a Wrapper."""
    facts: Counter[Fact]


SIMPLE = (
    ("AdSystem", "version", ""),
    ("AdTitle", "", ""),
    ("AdServingId", "", ""),
    ("Description", "", ""),
    ("Advertiser", "", ""),
    ("Survey", "type", ""),
    ("Expires", "", ""),
    ("Category", "authority", ""),
    ("Pricing", "model", "currency"),
    ("Impression", "id", ""),
    ("Error", "", ""),
    ("ViewableImpression/Viewable", "", ""),
    ("ViewableImpression/NotViewable", "", ""),
    ("ViewableImpression/ViewUndetermined", "", ""),
    ("Creatives/Creative/UniversalAdId", "idRegistry", "idValue"),
    ("Creatives/Creative/Linear/Duration", "", ""),
    ("Creatives/Creative/Linear/AdParameters", "xmlEncoded", ""),
    ("Creatives/Creative/Linear/MediaFiles/MediaFile", "type", "delivery"),
    ("Creatives/Creative/Linear/MediaFiles/Mezzanine", "type", "delivery"),
    ("Creatives/Creative/Linear/MediaFiles/InteractiveCreativeFile", "apiFramework", "type"),
    ("Creatives/Creative/Linear/TrackingEvents/Tracking", "event", "offset"),
    ("Creatives/Creative/Linear/VideoClicks/ClickThrough", "id", ""),
    ("Creatives/Creative/Linear/VideoClicks/ClickTracking", "id", ""),
    ("Creatives/Creative/Linear/VideoClicks/CustomClick", "id", ""),
    ("Creatives/Creative/NonLinearAds/TrackingEvents/Tracking", "event", "offset"),
    ("Creatives/Creative/NonLinearAds/NonLinear/StaticResource", "creativeType", ""),
    ("Creatives/Creative/NonLinearAds/NonLinear/IFrameResource", "", ""),
    ("Creatives/Creative/NonLinearAds/NonLinear/HTMLResource", "", ""),
    ("Creatives/Creative/NonLinearAds/NonLinear/NonLinearClickThrough", "", ""),
    ("Creatives/Creative/NonLinearAds/NonLinear/NonLinearClickTracking", "id", ""),
)
"""Path below InLine or Wrapper, and the attributes that a fact keeps."""

COMPANION = (
    ("StaticResource", "creativeType", ""),
    ("IFrameResource", "", ""),
    ("HTMLResource", "", ""),
    ("AltText", "", ""),
    ("CompanionClickThrough", "", ""),
    ("CompanionClickTracking", "id", ""),
    ("TrackingEvents/Tracking", "event", "offset"),
)
"""The same below Companion."""

ICON = (
    ("StaticResource", "creativeType", ""),
    ("IFrameResource", "", ""),
    ("HTMLResource", "", ""),
    ("IconClicks/IconClickThrough", "", ""),
    ("IconClicks/IconClickTracking", "id", ""),
    ("IconViewTracking", "", ""),
)
"""The same below Icon."""

AT_MOST_ONE = (
    "AdSystem",
    "AdTitle",
    "AdServingId",
    "Creatives",
    "Extensions",
    "Pricing",
    "ViewableImpression",
)
"""What an InLine must not have twice (VAST 4.3 section 3.4 and the schemas)."""

AT_MOST_ONE_BELOW = {
    "Creative": ("Linear", "NonLinearAds", "CompanionAds"),
    "Linear": ("Icons", "TrackingEvents", "VideoClicks", "MediaFiles", "Duration"),
    "VideoClicks": ("ClickThrough",),
    "NonLinearAds": ("TrackingEvents",),
    "Companion": ("TrackingEvents", "CompanionClickThrough"),
}
"""The same further down, by the element that holds it."""


def read(document: bytes) -> list[AdFacts]:
    """Tell the ads of *document* in document order."""
    return [_ad(each) for each in _children(_parse(document), "Ad")]


def version(document: bytes) -> str:
    """Give the version that *document* names."""
    return _parse(document).get("version", "")


def faults(document: bytes) -> list[str]:
    """
    Say what is wrong with the shape of *document* as an answer of the proxy.

    Facts cannot tell this: they are the same for one ViewableImpression with two URLs and for
    two with one each.
    """
    root = _parse(document)
    found = [] if _name(root) == "VAST" else [f"the root is {_name(root)}"]
    for ad in _children(root, "Ad"):
        found += [f"{ad.get('id')}: {fault}" for fault in _faults_of_ad(ad, root)]
    return found


def _faults_of_ad(ad: etree._Element, root: etree._Element) -> Iterator[str]:
    bodies = [_name(each) for each in ad if _name(each) in {"InLine", "Wrapper"}]
    if bodies != ["InLine"]:
        yield f"holds {bodies}"
        return
    (inline,) = _children(ad, "InLine")
    yield from _repeated(inline, AT_MOST_ONE)
    for element in _vast_elements(inline):
        yield from _repeated(element, AT_MOST_ONE_BELOW.get(_name(element), ()))
        if etree.QName(element).namespace != etree.QName(root).namespace:
            yield f"{_name(element)} is not in the namespace of the root"
    for name in ("Impression", "Error"):
        if not _stand_together(inline, name):
            yield f"{name} elements do not stand together"
    direct = _children(inline, VERIFICATIONS)
    extended = _at(inline, f"Extensions/Extension/{VERIFICATIONS}")
    if len(direct) + len(extended) > 1:
        yield f"{len(direct)} + {len(extended)} AdVerifications"


def place_of_verifications(document: bytes) -> list[str]:
    """Say what holds the AdVerifications of each ad: InLine, Extension, or an empty string."""
    places = []
    for inline in _at(_parse(document), "Ad/InLine"):
        direct = bool(_children(inline, VERIFICATIONS))
        extended = bool(_at(inline, f"Extensions/Extension/{VERIFICATIONS}"))
        places.append("InLine" * direct + "Extension" * extended)
    return places


def _repeated(parent: etree._Element, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if (count := len(_children(parent, name))) > 1:
            yield f"{count} {name} in {_name(parent)}"


def _stand_together(parent: etree._Element, name: str) -> bool:
    names = [_name(each) for each in parent if _name(each)]
    places = [place for place, each in enumerate(names) if each == name]
    return not places or places[-1] - places[0] == len(places) - 1


def _vast_elements(inline: etree._Element) -> Iterator[etree._Element]:
    for element in inline:
        if _name(element) in {"Extensions", ""}:
            continue
        yield element
        if _name(element) != "CreativeExtensions":
            yield from _vast_elements(element)


def _parse(document: bytes) -> etree._Element:
    return etree.fromstring(document, etree.XMLParser(resolve_entities=False, no_network=True))


def _ad(ad: etree._Element) -> AdFacts:
    body = next(each for each in ad if _name(each) in {"InLine", "Wrapper"})
    facts = Counter(_facts(body))
    return AdFacts(ad.get("id", ""), ad.get("sequence"), _name(body) == "InLine", facts)


def _facts(body: etree._Element) -> Iterator[Fact]:
    for path, event, offset in SIMPLE:
        kind = path.removeprefix("Creatives/Creative/")
        yield from _told(body, path, event, offset, kind)
    for linear in _at(body, "Creatives/Creative/Linear"):
        if (skipping := linear.get("skipoffset")) is not None:
            yield Fact("Linear@skipoffset", text=skipping)
    for companion in _at(body, "Creatives/Creative/CompanionAds/Companion"):
        yield from _labelled(companion, f"Companion {companion_label(companion)}", COMPANION)
    for icon in _at(body, "Creatives/Creative/Linear/Icons/Icon"):
        yield from _labelled(icon, f"Icon {icon.get('program', '')}", ICON)
    for each in _at(body, "Creatives/Creative/CreativeExtensions/CreativeExtension"):
        yield Fact("CreativeExtension", each.get("type", ""), text=canonical(each))
    yield from _extensions(body)


def companion_label(companion: etree._Element) -> str:
    """Name a Companion by what it can conflict on: size and slot (VAST 4.3 section 3.13)."""
    width, height = companion.get("width", ""), companion.get("height", "")
    return f"{width}x{height} {companion.get('adSlotId', '')}".rstrip()


def _extensions(body: etree._Element) -> Iterator[Fact]:
    for verification in _at(body, f"{VERIFICATIONS}/Verification"):
        yield from _verification(verification)
    for extension in _at(body, "Extensions/Extension"):
        inside = _at(extension, f"{VERIFICATIONS}/Verification")
        for verification in inside:
            yield from _verification(verification)
        if not inside:
            yield Fact("Extension", extension.get("type", ""), text=canonical(extension))


def _verification(verification: etree._Element) -> Iterator[Fact]:
    vendor = verification.get("vendor", "")
    for name in ("JavaScriptResource", "ExecutableResource"):
        for each in _children(verification, name):
            yield Fact("Verification", vendor, each.get("apiFramework", ""), _text(each))
    for each in _children(verification, "VerificationParameters"):
        yield Fact("VerificationParameters", vendor, text=_text(each))
    for each in _at(verification, "TrackingEvents/Tracking"):
        yield Fact("Verification/Tracking", each.get("event", ""), vendor, _text(each))


def _labelled(
    element: etree._Element, label: str, table: tuple[tuple[str, str, str], ...]
) -> Iterator[Fact]:
    for path, event, offset in table:
        yield from _told(element, path, event, offset, f"{label}/{path}")


def _told(element: etree._Element, path: str, event: str, offset: str, kind: str) -> Iterator[Fact]:
    for each in _at(element, path):
        # lxml takes no empty name for an attribute.
        first, second = (each.get(name, "") if name else "" for name in (event, offset))
        yield Fact(kind, first, second, _text(each))


def canonical(element: etree._Element) -> str:
    """
    Write *element* so that two of equal meaning are written equally.

    The namespace of VAST 4 counts as none, prefixes and comments do not count, CDATA is text.
    """
    attributes = "".join(
        f" {_foreign(str(name))}={value!r}" for name, value in sorted(element.attrib.items())
    )
    inside = [element.text or ""]
    for child in element:
        inside += [canonical(child) if isinstance(child.tag, str) else "", child.tail or ""]
    return f"<{_foreign(str(element.tag))}{attributes}>{''.join(inside)}</>"


def _foreign(tag: str) -> str:
    return tag.removeprefix(f"{{{IAB}}}")


def _text(element: etree._Element) -> str:
    return str(element.xpath("string()")).strip()


def _name(element: etree._Element) -> str:
    # Comments and processing instructions have functions for tags.
    return etree.QName(element).localname if isinstance(element.tag, str) else ""


def _children(element: etree._Element, name: str) -> list[etree._Element]:
    return [each for each in element if _name(each) == name]


def _at(element: etree._Element, path: str) -> list[etree._Element]:
    found = [element]
    for name in path.split("/"):
        found = [child for each in found for child in _children(each, name)]
    return found
