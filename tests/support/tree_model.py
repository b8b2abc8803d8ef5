"""
What the levels of a tree of VAST documents say, and what must become of it.

Rule 1: the answer is computed from the plain data of the levels, by the rules of VAST 4.3
sections 2.3.5.2, 3.3.1 and 3.19, and never from XML: this is the second opinion.
Rule 2: nothing of vastproxy is used here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.ad_server import Reply
from tests.support.vast_facts import Fact

FIRST_WITH_UNIVERSAL_ID = "4.0"
FIRST_WITHOUT_ID_VALUE = "4.2"


@dataclass(frozen=True, slots=True)
class Verification:
    """A Verification of one vendor. Two that are equal are written in the same bytes."""

    vendor: str
    resource: str
    parameters: str = ""
    refused: str = ""
    """Where verificationNotExecuted is told; empty: nowhere."""

    def facts(self) -> list[Fact]:
        """Tell what one element of this kind says."""
        told = [Fact("Verification", self.vendor, "omid", self.resource)]
        if self.parameters:
            told.append(Fact("VerificationParameters", self.vendor, "", self.parameters))
        if self.refused:
            event = "verificationNotExecuted"
            told.append(Fact("Verification/Tracking", event, self.vendor, self.refused))
        return told


@dataclass(frozen=True, slots=True)
class Extension:
    """An Extension with one element in it."""

    type: str
    namespace: str
    """Of the element inside; empty: as VAST itself."""
    text: str

    def fact(self) -> Fact:
        """Tell it in the canonical form of :func:`tests.support.vast_facts.canonical`."""
        name = f"{{{self.namespace}}}Data" if self.namespace else "Data"
        inside = f"<{name} key='v'>{self.text}</>"
        return Fact("Extension", self.type, "", f"<Extension type={self.type!r}>{inside}</>")


@dataclass(frozen=True, slots=True)
class Icon:
    """An Icon of a program; an empty program is none."""

    program: str
    resource: str
    tells: tuple[tuple[str, str], ...]
    """Path below Icon, and URL."""

    def facts(self) -> list[Fact]:
        """Tell what it says."""
        label = f"Icon {self.program}"
        told = [Fact(f"{label}/StaticResource", "image/png", "", self.resource)]
        return told + [Fact(f"{label}/{path}", "", "", url) for path, url in self.tells]


@dataclass(frozen=True, slots=True)
class Companion:
    """A Companion; in a wrapper one without a resource only tracks."""

    width: str
    height: str
    slot: str = ""
    resource: str = ""
    through: str = ""
    clicks: tuple[str, ...] = ()
    views: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name what it can conflict on."""
        return f"{self.width}x{self.height} {self.slot}".rstrip()

    def fits(self, shown: "Companion") -> bool:
        """Say whether this one, which only tracks, speaks of *shown*."""
        return self.width == "0" or (self.width, self.height) == (shown.width, shown.height)

    def trackers(self, label: str) -> list[Fact]:
        """Tell its trackers as those of the companion called *label*."""
        clicks = [Fact(f"Companion {label}/CompanionClickTracking", "", "", u) for u in self.clicks]
        kind = f"Companion {label}/TrackingEvents/Tracking"
        return clicks + [Fact(kind, "creativeView", "", url) for url in self.views]

    def facts(self) -> list[Fact]:
        """Tell all that it says."""
        told = [Fact(f"Companion {self.label}/StaticResource", "image/png", "", self.resource)]
        if self.through:
            told.append(Fact(f"Companion {self.label}/CompanionClickThrough", "", "", self.through))
        return told + self.trackers(self.label)


@dataclass(slots=True)
class LinearPart:
    """One Linear: the whole one of an InLine, or a part of what a wrapper says about it."""

    facts: list[Fact] = field(default_factory=list)
    """All but the ClickThrough and the icons."""
    through: str = ""
    icons: list[Icon] = field(default_factory=list)


@dataclass(slots=True)
class NonLinearPart:
    """One NonLinearAds: its trackers, and what each NonLinear in it says."""

    tracking: list[Fact] = field(default_factory=list)
    ads: list[list[Fact]] = field(default_factory=list)


@dataclass(slots=True)
class Level:
    """One Ad of one document, without where it leads to."""

    version: str
    wrapper: bool
    id: str
    own: list[Fact] = field(default_factory=list)
    """What stays with the InLine alone; a wrapper's is lost."""
    union: list[Fact] = field(default_factory=list)
    """Impressions, Errors, and what ViewableImpression holds."""
    extensions: list[Extension] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    pricing: Fact | None = None
    linears: list[LinearPart] = field(default_factory=list)
    nonlinears: list[NonLinearPart] = field(default_factory=list)
    companions: list[Companion] = field(default_factory=list)
    litter: bool = False
    """True: a wrapper also holds empty trackers, and things that only an InLine may hold."""

    @property
    def creatives(self) -> int:
        """Count the creatives of an InLine that name a UniversalAdId."""
        if self.version < FIRST_WITH_UNIVERSAL_ID:
            return 0
        return len(self.linears) + len(self.nonlinears) + bool(self.companions)

    @property
    def universal_id(self) -> Fact:
        """Tell the UniversalAdId, one for all creatives of an InLine."""
        value = f"{self.id}-creative"
        attribute = value if self.version < FIRST_WITHOUT_ID_VALUE else ""
        return Fact("UniversalAdId", "registry.example", attribute, value)


@dataclass(slots=True)
class Ad:
    """A level with its place, and with what its VASTAdTagURI leads to."""

    level: Level
    sequence: int | None = None
    leads_to: "Response | None" = None
    multiple: str | None = None
    """The attribute allowMultipleAds as written; None: not there."""

    @property
    def takes_pod(self) -> bool:
        """Say whether this wrapper takes more than one ad; before VAST 3.0 all do."""
        return self.level.version == "2.0" or self.multiple in {"true", "1", "TRUE"}


@dataclass(slots=True)
class Response:
    """One document of an ad server."""

    version: str
    target: str
    """Path and query on the server."""
    ads: list[Ad] = field(default_factory=list)
    """In document order."""
    failure: Reply | None = None
    """Answered instead of the ads."""
    asked_at: str = ""
    """The target that redirects to *target*; empty: none does."""


Path = list[Level]
"""The levels of one ad, outermost wrapper first, InLine last."""


def paths(response: Response, *, multiple: bool) -> list[Path]:
    """Choose the ads of *response*, and give the path of each (VAST 4.3 3.3.1, 3.19)."""
    if response.failure is not None:
        return []
    spare = [ad for ad in response.ads if ad.sequence is None]
    pod = sorted(
        (ad for ad in response.ads if ad.sequence is not None), key=lambda ad: ad.sequence or 0
    )
    if not multiple:
        return _paths_of_ad((spare or pod)[0])
    if not pod:
        return _next_spare(spare)
    chosen = []
    for ad in pod:
        chosen += _paths_of_ad(ad) or _next_spare(spare)
    return chosen


def sequences(root: Response) -> tuple[int, ...]:
    """
    Number the ads that :func:`paths` chooses of *root*.

    A pod of which every ad gave one keeps its numbers; else they are counted from 1, because a
    gap tells of a lost ad, and numbers are unique (VAST 4.3 section 3.3.1).
    """
    pod = sorted(ad.sequence for ad in root.ads if ad.sequence is not None)
    each = [_paths_of_ad(ad) for ad in root.ads if ad.sequence is not None]
    if pod and all(len(found) == 1 for found in each):
        return tuple(pod)
    return tuple(range(1, len(paths(root, multiple=True)) + 1))


def _next_spare(spare: list[Ad]) -> list[Path]:
    while spare:
        if found := _paths_of_ad(spare.pop(0)):
            return found
    return []


def _paths_of_ad(ad: Ad) -> list[Path]:
    if ad.leads_to is None:
        return [[ad.level]]
    return [[ad.level, *rest] for rest in paths(ad.leads_to, multiple=ad.takes_pod)]


def merged(path: Path) -> Counter[Fact]:
    """Apply the merge rules to the levels of *path*."""
    inline = path[-1]
    facts = Counter(inline.own)
    for level in path:
        facts.update(level.union)
        facts.update(each.fact() for each in level.extensions)
    facts.update([inline.universal_id] * inline.creatives)
    facts.update(_verifications(path))
    # Pricing: only the value of the first wrapper that has one need be considered (3.4.8).
    facts.update([level.pricing for level in path if level.pricing][:1])
    facts.update(_linears(path))
    facts.update(_nonlinears(path))
    facts.update(_companions(path))
    facts.update(_icons(path))
    return facts


def _verifications(path: Path) -> Iterator[Fact]:
    for each in {each for level in path for each in level.verifications}:
        yield from each.facts()


def _linears(path: Path) -> Iterator[Fact]:
    *wrappers, inline = path
    parts = [part for wrapper in wrappers for part in wrapper.linears]
    throughs = [part.through for part in parts if part.through]
    for linear in inline.linears:
        yield from linear.facts
        for part in parts:
            yield from part.facts
        # Closest to the InLine wins: its own, else the innermost wrapper's (2.3.5.2).
        if closest := linear.through or next(reversed(throughs), ""):
            yield Fact("Linear/VideoClicks/ClickThrough", "", "", closest)


def _nonlinears(path: Path) -> Iterator[Fact]:
    *wrappers, inline = path
    parts = [part for wrapper in wrappers for part in wrapper.nonlinears]
    for here in inline.nonlinears:
        yield from here.tracking
        for part in parts:
            yield from part.tracking
        for ad in here.ads:
            yield from ad
            for part in parts:
                for clicks in part.ads:
                    yield from clicks


def _companions(path: Path) -> Iterator[Fact]:
    *wrappers, inline = path
    shown = list(inline.companions)
    for wrapper in reversed(wrappers):
        for tracking in [each for each in wrapper.companions if not each.resource]:
            for companion in shown:
                if tracking.fits(companion):
                    yield from tracking.trackers(companion.label)
        taken = {each.label for each in shown}
        shown += [each for each in wrapper.companions if each.resource and each.label not in taken]
    for companion in shown:
        yield from companion.facts()


def _icons(path: Path) -> Iterator[Fact]:
    taken: set[str] = set()
    for level in reversed(path):
        icons = [icon for part in level.linears for icon in part.icons]
        for icon in icons:
            if icon.program not in taken:
                yield from icon.facts()
        taken |= {icon.program for icon in icons if icon.program}
