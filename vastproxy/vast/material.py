"""
What a wrapper brings to the ad behind it, sorted by kind.

Nothing is moved here: the elements stay where they are until :mod:`vastproxy.vast.merge` takes
them. A tracker without a URL is left out: it could only fail.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from lxml import etree

from vastproxy.vast.document import Ad, child, children, local_name, text_of

VIEWS = ("Viewable", "NotViewable", "ViewUndetermined")
RESOURCES = ("StaticResource", "IFrameResource", "HTMLResource")
_INLINE_ONLY = ("MediaFiles", "AdParameters", "Duration", "InteractiveCreativeFile")
_VERIFICATION_EXTENSION = "adverifications"


@dataclass(slots=True)
class Material:
    """What a wrapper brings, by kind."""

    wrapper: Ad
    impressions: list[etree._Element] = field(default_factory=list)
    errors: list[etree._Element] = field(default_factory=list)
    pricing: etree._Element | None = None
    views: list[etree._Element] = field(default_factory=list)
    view_attributes: dict[str, str] = field(default_factory=dict)
    linear_events: list[etree._Element] = field(default_factory=list)
    clicks: list[etree._Element] = field(default_factory=list)
    click_through: etree._Element | None = None
    icons: list[etree._Element] = field(default_factory=list)
    nonlinear_events: list[etree._Element] = field(default_factory=list)
    nonlinear_clicks: list[etree._Element] = field(default_factory=list)
    companion_ads: list[etree._Element] = field(default_factory=list)
    bare_companions: list[etree._Element] = field(default_factory=list)
    verifications: list[etree._Element] = field(default_factory=list)
    extensions: list[etree._Element] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def with_text(elements: Iterable[etree._Element]) -> list[etree._Element]:
    """Leave out the trackers without a URL: they can only fail."""
    return [each for each in elements if _has_text(each)]


def _has_text(element: etree._Element) -> bool:
    text = element.text
    return bool(text and not text.isspace()) or (len(element) > 0 and bool(text_of(element)))


def gathered(wrapper: Ad) -> Material:
    """Sort what *wrapper* brings."""
    body = wrapper.body
    found = Material(wrapper)
    for each in body.iterchildren(etree.Element):
        collect = _COLLECTORS.get(local_name(each))
        if collect is not None:
            collect(found, each)
    # A document's own <Error>s speak for the ads in it (docs/vast.md).
    roots = [deepcopy(each) for each in with_text(wrapper.document.error_elements)]
    found.errors = roots + found.errors
    return found


def _collect_view(found: Material, element: etree._Element) -> None:
    found.view_attributes = dict(element.attrib)
    for name in VIEWS:
        found.views += with_text(children(element, name))


def _collect_verifications(found: Material, element: etree._Element) -> None:
    found.verifications += children(element, "Verification")


def _collect_extensions(found: Material, element: etree._Element) -> None:
    for each in children(element, "Extension"):
        inner = child(each, "AdVerifications")
        if inner is not None and is_verification_extension(each):
            _collect_verifications(found, inner)
        else:
            found.extensions.append(each)


def is_verification_extension(extension: etree._Element) -> bool:
    """Whether *extension* is where VAST before 4.1 keeps verifications (OMID's convention)."""
    return (extension.get("type") or "").strip().lower() == _VERIFICATION_EXTENSION


def _collect_creatives(found: Material, element: etree._Element) -> None:
    """
    Sort what creatives bring by its kind, never by the creative it stands in.

    One wrapper may spread its events and clicks over several creatives (Tremor's samples do).
    """
    for creative in children(element, "Creative"):
        for each in creative.iterchildren(etree.Element):
            collect = _CREATIVE_COLLECTORS.get(local_name(each))
            if collect is not None:
                collect(found, each)


def trackers(element: etree._Element) -> list[etree._Element]:
    """Give the ``Tracking`` elements of a creative or companion."""
    return [
        event
        for each in children(element, "TrackingEvents")
        for event in with_text(children(each, "Tracking"))
    ]


def _collect_linear(found: Material, linear: etree._Element) -> None:
    found.linear_events += trackers(linear)
    for clicks in children(linear, "VideoClicks"):
        for name in ("ClickTracking", "CustomClick"):
            found.clicks += with_text(children(clicks, name))
        through = with_text(children(clicks, "ClickThrough"))
        if through and found.click_through is None:
            found.click_through = through[0]
    for icons in children(linear, "Icons"):
        found.icons += children(icons, "Icon")
    _note_dropped(found, linear, _INLINE_ONLY)


def _collect_nonlinear(found: Material, ads: etree._Element) -> None:
    found.nonlinear_events += trackers(ads)
    for each in children(ads, "NonLinear"):
        found.nonlinear_clicks += with_text(children(each, "NonLinearClickTracking"))
        _note_dropped(found, each, (*RESOURCES, "NonLinearClickThrough"))


def _collect_companions(found: Material, ads: etree._Element) -> None:
    if any(has_resource(each) for each in children(ads, "Companion")):
        found.companion_ads.append(ads)
    found.bare_companions += [each for each in children(ads, "Companion") if not has_resource(each)]


def has_resource(companion: etree._Element) -> bool:
    """Whether *companion* shows something itself, and does not only track."""
    return any(child(companion, name) is not None for name in RESOURCES)


def _note_dropped(found: Material, element: etree._Element, names: Sequence[str]) -> None:
    for name in names:
        if child(element, name) is not None:
            found.dropped[name] += 1


def _collect_impression(found: Material, element: etree._Element) -> None:
    found.impressions += with_text([element])


def _collect_error(found: Material, element: etree._Element) -> None:
    found.errors += with_text([element])


def _collect_pricing(found: Material, element: etree._Element) -> None:
    if found.pricing is None and text_of(element):
        found.pricing = element


def _collect_creative_extensions(found: Material, _: etree._Element) -> None:
    found.dropped["CreativeExtensions"] += 1


_Collector = Callable[[Material, etree._Element], None]  # noqa: SLF001 - lxml's public type
_COLLECTORS: dict[str, _Collector] = {
    "Impression": _collect_impression,
    "Error": _collect_error,
    "Pricing": _collect_pricing,
    "ViewableImpression": _collect_view,
    "AdVerifications": _collect_verifications,
    "Extensions": _collect_extensions,
    "Creatives": _collect_creatives,
}
_CREATIVE_COLLECTORS: dict[str, _Collector] = {
    "Linear": _collect_linear,
    "NonLinearAds": _collect_nonlinear,
    "CompanionAds": _collect_companions,
    "CreativeExtensions": _collect_creative_extensions,
}
