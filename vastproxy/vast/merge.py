"""
Merge wrappers into the InLine they led to.

Rule 1: wrappers are folded in from the innermost outwards, each by the same step. What is closer
to the InLine is there first, so "closest wins" is "what is there stays", and a chain resolved by
two proxies in a row gives what one would give.
Rule 2: nodes are moved. They are copied only for a second target: another linear creative, or
another ad of the pod behind the same wrapper.
Rule 3: an added node stands before its siblings of the same name, so that in the end the
outermost wrapper's comes first. Where there is no sibling, what players meet first decides, not
the schema's order: see :data:`_INLINE_ORDER`.
Rule 4: nothing is renamed and no equal URLs are dropped: counts must not change. What is lost is
lost by a rule of the specification, and is named in the :class:`MergeNote`.

The table of rules is in ``docs/vast.md``.
"""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache

from lxml import etree

from vastproxy.errors import VastSchemaError
from vastproxy.vast.document import (
    Ad,
    VastDocument,
    child,
    children,
    local_name,
    namespace_of,
    text_of,
)
from vastproxy.vast.material import (
    VIEWS,
    Material,
    gathered,
    has_resource,
    is_verification_extension,
    trackers,
    with_text,
)
from vastproxy.vast.unwrap import ResolvedAd, Unwrapped

_INLINE_ORDER = (
    "AdSystem",
    "Error",
    "Impression",
    "Pricing",
    "ViewableImpression",
    "Creatives",
    # Players that take the first <TrackingEvents> of an ad would take a verification's, and with
    # it lose the creative's: fluid-player 3.58 fired 4 of 24 beacons. So these come last.
    "AdVerifications",
    "Extensions",
)
_LINEAR_ORDER = ("Icons", "TrackingEvents", "AdParameters", "Duration", "MediaFiles", "VideoClicks")
_CLICKS_ORDER = ("ClickTracking", "ClickThrough", "CustomClick")

MAX_GROWTH = 4 * 1024 * 1024
"""
Bytes that copies may add to an answer, 0.1 s of work. A wrapper's trackers times the creatives and
ads of a pod, each within its own limit, would make gigabytes; a pod of ten behind five wrappers of
20 KB adds less than one megabyte.
"""

FIRST_WITH_VERIFICATIONS = (4, 1)
"""From this version ``AdVerifications`` is a child of InLine; before, of an Extension (OMID)."""


@dataclass(frozen=True, slots=True)
class MergeNote:
    """What one wrapper gave to an ad, and what of it a rule dropped: element names and counts."""

    wrapper_id: str
    system: str
    taken: Counter[str]
    dropped: Counter[str]


def merge(unwrapped: Unwrapped) -> tuple[tuple[MergeNote, ...], ...]:
    """
    Merge every wrapper into every ad of *unwrapped*, in place.

    Gives the notes of each ad, outermost wrapper first. Raises VastSchemaError where copies
    would multiply beyond MAX_GROWTH; then nothing has been moved.
    """
    uses = Counter(id(wrapper) for ad in unwrapped.ads for wrapper in ad.wrappers)
    wrappers = {id(wrapper): wrapper for ad in unwrapped.ads for wrapper in ad.wrappers}
    targets = [_Target(ad) for ad in unwrapped.ads]
    if not unwrapped.is_entry_alone:
        _refuse_too_large(unwrapped, targets)
    found = {key: gathered(wrapper) for key, wrapper in wrappers.items()}
    notes = []
    for ad, target in zip(unwrapped.ads, targets, strict=True):
        if not unwrapped.is_entry_alone:
            target.take_root_errors(ad.inline.document)
        ad_notes: list[MergeNote] = []
        for wrapper in reversed(ad.wrappers):
            uses[id(wrapper)] -= 1
            last = uses[id(wrapper)] == 0
            ad_notes.append(target.take(found[id(wrapper)], last=last))
        notes.append(tuple(reversed(ad_notes)))
    return tuple(notes)


def _refuse_too_large(unwrapped: Unwrapped, targets: list["_Target"]) -> None:
    """Raise VastSchemaError, before anything is moved, where copies would make an answer huge."""
    places: Counter[int] = Counter()
    wrappers: dict[int, Ad] = {}
    roots: Counter[int] = Counter()
    documents: dict[int, VastDocument] = {}
    for ad, target in zip(unwrapped.ads, targets, strict=True):
        for level in (*ad.wrappers, ad.inline):
            roots[id(level.document)] += 1
            documents[id(level.document)] = level.document
        for wrapper in ad.wrappers:
            places[id(wrapper)] += target.places
            wrappers[id(wrapper)] = wrapper
    # What goes to one place is moved: only the others are measured.
    growth = sum(_size_of(wrappers[key].body) * (n - 1) for key, n in places.items() if n > 1)
    for key, document in documents.items():
        growth += sum(map(_size_of, document.error_elements)) * roots[key]
    if growth > MAX_GROWTH:
        raise VastSchemaError(f"merging would add {growth} bytes, more than {MAX_GROWTH}")


def _size_of(element: etree._Element) -> int:
    return len(etree.tostring(element, with_tail=False))


class _Target:
    """The InLine that wrappers are merged into, one after the other."""

    def __init__(self, ad: ResolvedAd) -> None:
        self.body = ad.inline.body
        self.version = ad.inline.document.version
        self.namespace = namespace_of(self.body)
        creatives = child(self.body, "Creatives")
        each_creative = list(children(creatives, "Creative")) if creatives is not None else []
        self.creatives = creatives if creatives is not None else self.body
        self.linears = [each for one in each_creative for each in children(one, "Linear")]
        self.nonlinears = [each for one in each_creative for each in children(one, "NonLinearAds")]
        self.companions = [
            each
            for one in each_creative
            for ads in children(one, "CompanionAds")
            for each in children(ads, "Companion")
        ]

    @property
    def places(self) -> int:
        """How often a wrapper's trackers may have to be put in, at the most."""
        nonlinears = sum(len(each) for each in self.nonlinears)
        return max(1, len(self.linears), nonlinears, len(self.companions))

    def take_root_errors(self, document: VastDocument) -> None:
        """
        Make the root errors of the InLine's own document errors of the ad.

        Beside an ad they are not allowed (VAST 4.3 section 3.2). They stay only where the entry
        document is answered as it came.
        """
        copies = [deepcopy(each) for each in with_text(document.error_elements)]
        _add(self.body, "Error", copies, _INLINE_ORDER)

    def take(self, material: Material, *, last: bool) -> MergeNote:
        """Fold one wrapper in. *last*: nobody else needs its nodes, so they may be moved."""
        give = _Giver(namespace_of(material.wrapper.body), self.namespace, last=last)
        note = MergeNote(
            material.wrapper.id,
            material.wrapper.system,
            Counter(),
            Counter(material.dropped),
        )
        self._take_ad_level(material, give, note)
        self._take_linear(material, give, note)
        self._take_nonlinear(material, give, note)
        self._take_companions(material, give, note)
        self._take_verifications(material, give, note)
        _add(self.body, "Extensions/Extension", give.nodes(material.extensions), _INLINE_ORDER)
        note.taken["Extension"] += len(material.extensions)
        return note

    def _take_ad_level(self, material: Material, give: "_Giver", note: MergeNote) -> None:
        _add(self.body, "Impression", give.nodes(material.impressions), _INLINE_ORDER)
        _add(self.body, "Error", give.nodes(material.errors), _INLINE_ORDER)
        note.taken["Impression"] += len(material.impressions)
        note.taken["Error"] += len(material.errors)
        if material.pricing is not None:
            # VAST 4.3 section 3.4.8: only the first wrapper's value need be considered.
            for each in list(children(self.body, "Pricing")):
                self.body.remove(each)
            _add(self.body, "Pricing", give.nodes([material.pricing]), _INLINE_ORDER)
            note.taken["Pricing"] += 1
        if material.views:
            self._take_views(material, give)
            note.taken.update(local_name(each) for each in material.views)

    def _take_views(self, material: Material, give: "_Giver") -> None:
        """Put the URIs into the one ViewableImpression that an ad may have; its id stays."""
        if child(self.body, "ViewableImpression") is None:
            made = _make(self.body, "ViewableImpression")
            made.attrib.update(material.view_attributes)
            _place(self.body, made, _INLINE_ORDER)
        for name in VIEWS:
            nodes = [each for each in material.views if local_name(each) == name]
            _add(self.body, f"ViewableImpression/{name}", give.nodes(nodes), VIEWS)

    def _take_linear(self, material: Material, give: "_Giver", note: MergeNote) -> None:
        taken = 0
        for at, linear in enumerate(self.linears):
            more = at < len(self.linears) - 1
            taken += self._take_clicks(linear, material, give, more=more)
            events = give.nodes(material.linear_events, more=more)
            _add(linear, "TrackingEvents/Tracking", events, _LINEAR_ORDER)
            self._take_icons(linear, material, give, note, more=more)
        kept = note.taken if self.linears else note.dropped
        kept["Tracking"] += len(material.linear_events)
        kept.update(local_name(each) for each in material.clicks)
        if not self.linears:
            kept["Icon"] += len(material.icons)
        if material.click_through is not None:
            kept = note.taken if taken else note.dropped
            kept["ClickThrough"] += 1

    def _take_clicks(
        self, linear: etree._Element, material: Material, give: "_Giver", *, more: bool
    ) -> bool:
        """Add the click trackers; true if the wrapper's landing page was needed too."""
        for name in ("ClickTracking", "CustomClick"):
            nodes = [each for each in material.clicks if local_name(each) == name]
            _add(linear, f"VideoClicks/{name}", give.nodes(nodes, more=more), _LINEAR_ORDER)
        if material.click_through is None:
            return False
        clicks = child(linear, "VideoClicks")
        present = list(children(clicks, "ClickThrough")) if clicks is not None else []
        if any(text_of(each) for each in present):
            return False
        for each in present:
            each.getparent().remove(each)  # type: ignore[union-attr]  # it was found below clicks
        nodes = give.nodes([material.click_through], more=more)
        _add(linear, "VideoClicks/ClickThrough", nodes, _LINEAR_ORDER)
        return True

    def _take_icons(
        self,
        linear: etree._Element,
        material: Material,
        give: "_Giver",
        note: MergeNote,
        *,
        more: bool,
    ) -> None:
        """Add the icons of programs that are not there yet: the one closest to the InLine wins."""
        if not material.icons:
            return
        icons = child(linear, "Icons")
        there = (
            {each.get("program") for each in children(icons, "Icon")}
            if icons is not None
            else set()
        )
        there.discard(None)
        kept = [each for each in material.icons if each.get("program") not in there]
        _add(linear, "Icons/Icon", give.nodes(kept, more=more), _LINEAR_ORDER)
        note.taken["Icon"] += len(kept)
        note.dropped["Icon"] += len(material.icons) - len(kept)

    def _take_nonlinear(self, material: Material, give: "_Giver", note: MergeNote) -> None:
        singles = [each for ads in self.nonlinears for each in children(ads, "NonLinear")]
        for at, ads in enumerate(self.nonlinears):
            more = at < len(self.nonlinears) - 1
            events = give.nodes(material.nonlinear_events, more=more)
            _add(ads, "TrackingEvents/Tracking", events, ("NonLinear", "TrackingEvents"))
        for at, each in enumerate(singles):
            nodes = give.nodes(material.nonlinear_clicks, more=at < len(singles) - 1)
            _add(each, "NonLinearClickTracking", nodes, ())
        kept = note.taken if self.nonlinears else note.dropped
        kept["Tracking"] += len(material.nonlinear_events)
        kept = note.taken if singles else note.dropped
        kept["NonLinearClickTracking"] += len(material.nonlinear_clicks)

    def _take_companions(self, material: Material, give: "_Giver", note: MergeNote) -> None:
        for bare in material.bare_companions:
            self._take_bare_companion(bare, give, note)
        there = {_conflict_key(each) for each in self.companions}
        for ads in material.companion_ads:
            full = [each for each in children(ads, "Companion") if has_resource(each)]
            kept = [each for each in full if _conflict_key(each) not in there]
            note.taken["Companion"] += len(kept)
            note.dropped["Companion"] += len(full) - len(kept)
            if kept:
                self._append_companions(ads, give.nodes(kept))

    def _take_bare_companion(self, bare: etree._Element, give: "_Giver", note: MergeNote) -> None:
        """
        Put the trackers of a companion without resource on the companions below it.

        VAST 4.3 section 3.13.4: a wrapper tracks so what the InLine shows. One with a size
        speaks of companions of that size only.
        """
        size = _size(bare)
        targets = [each for each in self.companions if size is None or _size(each) == size]
        clicks = with_text(children(bare, "CompanionClickTracking"))
        events = trackers(bare)
        for at, each in enumerate(targets):
            more = at < len(targets) - 1
            _add(each, "CompanionClickTracking", give.nodes(clicks, more=more), ())
            _add(each, "TrackingEvents/Tracking", give.nodes(events, more=more), ())
        kept = note.taken if targets else note.dropped
        kept["Tracking"] += len(events)
        kept["CompanionClickTracking"] += len(clicks)

    def _append_companions(self, ads: etree._Element, nodes: list[etree._Element]) -> None:
        """Append companions in a creative of their own: *ads* has their ``required``."""
        creative = _make(self.creatives, "Creative")
        if self.version >= (4, 0):
            # Required in an InLine's creative; "unknown" is the value of VAST 4.3 section 3.7.1.
            universal = _make(creative, "UniversalAdId")
            universal.set("idRegistry", "unknown")
            if self.version == (4, 0):
                universal.set("idValue", "unknown")
            universal.text = "unknown"
            creative.append(universal)
        container = _make(creative, "CompanionAds")
        container.attrib.update(dict(ads.attrib))
        creative.insert(0, container)
        self.creatives.append(creative)
        for each in nodes:
            _append(container, each)
        self.companions += nodes

    def _take_verifications(self, material: Material, give: "_Giver", note: MergeNote) -> None:
        if not material.verifications:
            return
        holder = self._verifications()
        there = {_meaning(each) for each in children(holder, "Verification")}
        nodes = give.nodes(material.verifications)
        fresh = [each for each in nodes if not there or _meaning(each) not in there]
        _add(holder, "Verification", fresh, ())
        note.taken["Verification"] += len(fresh)
        note.dropped["Verification"] += len(nodes) - len(fresh)

    def _verifications(self) -> etree._Element:
        """Find or make the one AdVerifications of the ad: vast-client reads only the first."""
        direct = child(self.body, "AdVerifications")
        if direct is not None:
            return direct
        extensions = child(self.body, "Extensions")
        for each in children(extensions, "Extension") if extensions is not None else ():
            inner = child(each, "AdVerifications")
            if inner is not None and is_verification_extension(each):
                return inner
        if self.version >= FIRST_WITH_VERIFICATIONS:
            made = _make(self.body, "AdVerifications")
            _place(self.body, made, _INLINE_ORDER)
            return made
        extension = _make(self.body, "Extension")
        extension.set("type", "AdVerifications")
        _add(self.body, "Extensions/Extension", [extension], _INLINE_ORDER)
        made = _make(extension, "AdVerifications")
        extension.append(made)
        return made


class _Giver:
    """Hands out a wrapper's nodes: the nodes themselves to the last taker, copies before."""

    def __init__(self, source: str, target: str, *, last: bool) -> None:
        self._source = source
        self._target = target
        self._last = last

    def nodes(self, nodes: list[etree._Element], *, more: bool = False) -> list[etree._Element]:
        """Give *nodes*, in the target's namespace; copies if *more* takers come."""
        if more or not self._last:
            nodes = [deepcopy(each) for each in nodes]
        if self._source != self._target:
            for each in nodes:
                rename(each, self._source, self._target)
        return nodes


def rename(element: etree._Element, source: str, target: str) -> None:
    """Move *element* and what is in it from namespace *source* to *target*; others stay."""
    prefix = f"{{{source}}}" if source else ""
    for each in element.iter(etree.Element):
        tag = str(each.tag)
        if tag.startswith(prefix) if prefix else tag[0] != "{":
            each.tag = _qualified(tag[len(prefix) :], target)
    # A declaration of the old namespace on the element itself would be written out again, and
    # claim it back.
    etree.cleanup_namespaces(element)


@lru_cache(maxsize=512)
def _qualified(local: str, namespace: str) -> str:
    return f"{{{namespace}}}{local}" if namespace else local


def _make(parent: etree._Element, name: str) -> etree._Element:
    """Make an element *name* in the namespace of *parent*, without putting it anywhere."""
    return parent.makeelement(_qualified(name, namespace_of(parent)))


def _append(parent: etree._Element, node: etree._Element) -> None:
    node.tail = None
    parent.append(node)


def _add(
    parent: etree._Element, path: str, nodes: list[etree._Element], order: Sequence[str]
) -> None:
    """
    Put *nodes* before their siblings below *parent*.

    *path* is their name, or ``Container/Name``; the container is made where there is none.
    *order* says where among its neighbours something new goes.
    """
    if not nodes:
        return
    container, _, name = path.rpartition("/")
    if container:
        inner = child(parent, container)
        if inner is None:
            inner = _make(parent, container)
            _place(parent, inner, order)
        parent = inner
        order = _CLICKS_ORDER if container == "VideoClicks" else order
    first = child(parent, name)
    if first is None:
        first, *after = nodes
        first.tail = None
        _place(parent, first, order)
        for each in reversed(after):
            each.tail = None
            first.addnext(each)
        return
    for each in nodes:
        each.tail = None
        first.addprevious(each)


def _place(parent: etree._Element, node: etree._Element, order: Sequence[str]) -> None:
    """Insert *node* before the first child that comes later in *order*, else at the end."""
    name = local_name(node)
    if name in order:
        later = order[order.index(name) + 1 :]
        for each in parent.iterchildren(etree.Element):
            if local_name(each) in later:
                each.addprevious(node)
                return
    parent.append(node)


def _conflict_key(companion: etree._Element) -> tuple[str | None, str | None, str | None]:
    return companion.get("width"), companion.get("height"), companion.get("adSlotId")


def _size(companion: etree._Element) -> tuple[str, str] | None:
    """Give width and height, or None where a companion has no size of its own."""
    width, height = companion.get("width", "0").strip(), companion.get("height", "0").strip()
    return None if {width, height} & {"", "0"} else (width, height)


def _meaning(element: etree._Element) -> tuple[object, ...]:
    """Give what *element* says, whatever way it is written: for finding a verification again."""
    inner = tuple([_meaning(each) for each in element.iterchildren(etree.Element)])
    text = "" if inner else text_of(element)
    return local_name(element), tuple(sorted(element.attrib.items())), text, inner


def base_of(unwrapped: Unwrapped) -> VastDocument:
    """
    Choose the document whose root holds the answer: the newest version among the ads'.

    What is newer than its document's version may be refused; what is older hardly ever is.
    """
    documents = [ad.inline.document for ad in unwrapped.ads]
    return max(documents, key=lambda each: each.version)
