"""
Random trees of VAST documents, to be served and resolved.

Rule 1: a tree follows from its seed and the address of its server alone.
Rule 2: an element stands only where its version of VAST has it.
Rule 3: every URL is unique in its tree, but for those that are equal on purpose.
Rule 4: an InLine has what the trackers of its wrappers need to land on; what is lost all the
same, is lost by a rule: see tree_model.py.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random

from tests.support.ad_server import EMPTY_VAST, Reply
from tests.support.tree_model import (
    Ad,
    Companion,
    Extension,
    Icon,
    Level,
    LinearPart,
    NonLinearPart,
    Response,
    Verification,
    merged,
    paths,
    sequences,
)
from tests.support.tree_writer import TreeWriter
from tests.support.vast_facts import Fact, faults, place_of_verifications, read, version

VERSIONS = ("2.0", "3.0", "4.0", "4.1", "4.2", "4.3")
"""Compared as strings."""

MOST_WRAPPERS = 5
"""How many wrappers a player must accept (VAST 4.3 section 2.4.5)."""

SHAPES = {
    "chain": 40,
    "pod": 20,
    "pod behind": 12,
    "nested pod": 10,
    "buffet": 8,
    "choice": 7,
    "lost": 3,
}
"""What the first document is like, and how often."""

NOT_FOR_TWO_PROXIES = "choice"
"""The shape of which another ad is taken where a proxy resolves the part below the root."""

SIZES = (("300", "250"), ("728", "90"), ("160", "600"))

PROGRAMS = ("AdChoices", "AdMarker", "")

QUERIES = (
    "",
    "?u=http%3A%2F%2Fx.example%2fa%2Fb&e=",
    "?a=1&b=&&c=%20d+e;f=g",
    "?x=%%PATTERN%%&y={z}&k=${KEY}&l=$LOW",
    "?q=é|'&ids[]=1",
    "?a=https://y.example//z/../w?v=1&amp=&lt;",
)
"""What a URL of any kind may end with."""

MACROS = (
    "?cb=[CACHEBUSTING]&t=[TIMESTAMP]",
    "?code=[ERRORCODE]&v=[UNKNOWN]",
    "?r=[CACHEBUSTING]%5BERRORCODE%5D",
)
"""The same for tracking URLs: these macros are left to the player."""

FAILURES = (
    Reply(status=404),
    Reply(status=204),
    Reply(EMPTY_VAST),
    Reply(b"<html><body>no ad"),
    Reply(b'<VAST version="3.0"><Error><![CDATA[about:blank]]></Error></VAST>'),
)
"""What is answered where a response fails."""

UNKNOWN = "unknown"
"""The registry of a UniversalAdId that an InLine needs and the creative of a wrapper has not."""

LINEAR_EVENTS = ("start", "firstQuartile", "midpoint", "thirdQuartile", "complete", "mute")
"""In all versions; others are in only some."""


@dataclass(frozen=True, slots=True)
class Expected:
    """One ad of the answer."""

    id: str
    version: str
    """Of its InLine."""
    facts: Counter[Fact]


@dataclass(frozen=True, slots=True)
class Tree:
    """The documents to serve, and the ads to expect."""

    seed: int
    entry: str
    """Path and query of the document to begin with."""
    pages: dict[str, Reply]
    """By path and query; by path alone where the query holds a macro."""
    ads: tuple[Expected, ...]
    """In pod order."""
    sequences: tuple[int, ...]
    """Of several ads: what they are numbered with."""


def grow(seed: int, server: str, *, first_hop: str = "") -> Tree:
    """
    Grow the tree of *seed* for the ad server at the URL *server*.

    With *first_hop* the wrappers of the first document lead there instead of to *server*: to
    the route of a proxy in front of it.
    """
    random = Random(seed)
    shapes = {each: often for each, often in SHAPES.items() if each != NOT_FOR_TWO_PROXIES}
    shapes = shapes if first_hop else SHAPES
    shape = random.choices(tuple(shapes), weights=tuple(shapes.values()))[0]
    root = _Gardener(seed, server, random).root(shape)
    pages = TreeWriter(server, first_hop, random).pages(root)
    expected = (
        Expected(path[-1].id, path[-1].version, merged(path)) for path in paths(root, multiple=True)
    )
    entry = root.asked_at or root.target
    return Tree(seed, entry, pages, tuple(expected), sequences(root))


def misfits(tree: Tree, answer: bytes) -> list[str]:
    """Say in what *answer* is not what *tree* must become; nothing where it is."""
    found = read(answer)
    if [ad.id for ad in tree.ads] != [ad.id for ad in found]:
        return [f"ads are {[ad.id for ad in found]}, not {[ad.id for ad in tree.ads]}"]
    told = faults(answer)
    if len(found) > 1 and [str(each) for each in tree.sequences] != [ad.sequence for ad in found]:
        told.append(f"sequences are {[ad.sequence for ad in found]}, not {tree.sequences}")
    for expected, ad in zip(tree.ads, found, strict=True):
        told += [f"{ad.id} lacks {fact}" for fact in (expected.facts - ad.facts).elements()]
        surplus = (ad.facts - expected.facts).elements()
        told += [f"{ad.id} has {fact}" for fact in surplus if fact.event != UNKNOWN]
    if len(found) == 1:
        told += _misfits_of_version(tree.ads[0], answer)
    return told


def _misfits_of_version(expected: Expected, answer: bytes) -> list[str]:
    if expected.version != version(answer):
        return [f"version is {version(answer)}, not {expected.version}"]
    place = place_of_verifications(answer)[0]
    wrong = "Extension" if expected.version >= "4.1" else "InLine"
    return ["AdVerifications in " + place] if place == wrong and expected.version != "4.0" else []


class _Gardener:
    """Draws the levels of one tree, and how they hang together."""

    def __init__(self, seed: int, server: str, random: Random) -> None:
        self.seed = seed
        self.server = server
        self.random = random
        self._numbers = 0
        # What all InLines of the tree have, so that all its wrappers may have trackers for it.
        self._linears = random.choices((1, 2, 0), weights=(8, 2, 1))[0]
        self._nonlinear = self._linears == 0 or self._often(0.3)
        self._companions = random.choice(("none", "inline", "inline", "wrappers"))
        self._icons = self._linears == 1 and self._often(0.5)
        self._shared = f"https://shared.example/{seed}/pixel?a=%2F"
        self._shared_verification = Verification(
            "shared.example", f"https://shared.example/{seed}/omid.js", '{"k": 1}'
        )

    def root(self, shape: str) -> Response:
        """Draw the whole tree."""
        depth = self.random.randint(1, MOST_WRAPPERS)
        if shape == "pod":
            return self._pod(deepest=3)
        if shape == "pod behind":
            return self._behind(self.random.randint(1, 3), multiple=True)
        if shape == "choice":
            return self._behind(self.random.randint(1, 3), multiple=False)
        if shape == "nested pod":
            return self._nested()
        if shape == "buffet":
            return self._buffet()
        return self._chain(0 if self._often(0.05) else depth, lost=shape == "lost")

    # -- documents --

    def _response(self) -> Response:
        number = self._number()
        folder = self.random.choice(("", "", "a/", "a/b.c/"))
        query = self.random.choice((*QUERIES, "?cb=[CACHEBUSTING]&ts=[TIMESTAMP]"))
        # What is relative to a document is quoted by who asks: that is for test_wire.py.
        target = f"/s{self.seed}/{folder}d{number}.xml{query.replace('é|', '')}"
        response = Response(self.random.choice(VERSIONS), target)
        if self._often(0.08):
            response.asked_at = f"/s{self.seed}/r{number}"
        return response

    def _failing(self) -> Response:
        response = self._response()
        response.failure = self.random.choice(FAILURES)
        return response

    def _chain(self, depth: int, *, lost: bool = False) -> Response:
        response = self._response()
        response.ads = [self._ad(response.version, depth, lost=lost)]
        if response.version >= "3.0" and self._often(0.1):
            response.ads[0].sequence = 1
        return response

    def _pod(self, deepest: int) -> Response:
        response = self._modern()
        sequences = sorted(self.random.sample(range(1, 9), self.random.randint(2, 4)))
        pod = [self._ad(response.version, self._depth(deepest)) for _ in sequences]
        if self._often(0.3):
            pod[self.random.randrange(len(pod))] = self._ad(response.version, 1, lost=True)
        wrappers = [ad for ad in pod if ad.leads_to and not ad.leads_to.failure]
        if len(wrappers) > 1 and self._often(0.2):
            # Two slots of a pod may name the same URL.
            wrappers[0].leads_to = wrappers[1].leads_to
            wrappers[0].multiple = wrappers[1].multiple
        for ad, sequence in zip(pod, sequences, strict=True):
            ad.sequence = sequence
        response.ads = [*pod, *self._spares(response.version, deepest)]
        self.random.shuffle(response.ads)
        return response

    def _nested(self) -> Response:
        response = self._pod(deepest=2)
        pod = [ad for ad in response.ads if ad.sequence is not None]
        outer = self.random.choice(pod)
        outer.level = self._level(response.version, wrapper=True)
        outer.leads_to = self._pod(deepest=3)
        outer.multiple = "true"
        return response

    def _behind(self, wrappers: int, *, multiple: bool) -> Response:
        if wrappers:
            response = self._response() if multiple else self._modern()
            ad = self._ad(response.version, 1)
            ad.leads_to = self._behind(wrappers - 1, multiple=multiple)
            ad.multiple = self._spelled(response.version, multiple=multiple)
            response.ads = [ad]
            return response
        return self._pod(deepest=2) if multiple else self._choice()

    def _choice(self) -> Response:
        if self._often(0.5):
            return self._pod_without_failures()
        response = self._response()
        response.ads = [self._ad(response.version, self._depth(2)) for _ in range(2)]
        if response.version >= "3.0":
            response.ads.insert(0, self._ad(response.version, 0))
            response.ads[0].sequence = 1
        return response

    def _pod_without_failures(self) -> Response:
        response = self._modern()
        response.ads = [self._ad(response.version, self._depth(2)) for _ in range(3)]
        for ad, sequence in zip(response.ads, (3, 1, 2), strict=True):
            ad.sequence = sequence
        return response

    def _buffet(self) -> Response:
        response = self._response()
        first = self._ad(response.version, self.random.randint(1, 3), lost=self._often(0.6))
        response.ads = [first, *(self._ad(response.version, self._depth(2)) for _ in range(2))]
        return response

    def _spares(self, version: str, deepest: int) -> list[Ad]:
        count = self.random.choice((0, 0, 1, 2))
        return [self._ad(version, self._depth(min(deepest, 1))) for _ in range(count)]

    def _modern(self) -> Response:
        # Pods, and attributes of wrappers, are there since VAST 3.0.
        response = self._response()
        response.version = self.random.choice(VERSIONS[1:])
        return response

    def _ad(self, version: str, depth: int, *, lost: bool = False) -> Ad:
        if not depth:
            return Ad(self._level(version, wrapper=False))
        ad = Ad(self._level(version, wrapper=True))
        ad.multiple = self._spelled(version, multiple=self._often(0.4))
        last = lost and depth == 1
        ad.leads_to = self._failing() if last else self._chain(depth - 1, lost=lost)
        return ad

    def _spelled(self, version: str, *, multiple: bool) -> str | None:
        if version < "3.0":
            return None
        return self.random.choice(("true", "1", "TRUE") if multiple else ("false", "0", None))

    # -- levels --

    def _level(self, version: str, *, wrapper: bool) -> Level:
        level = Level(version, wrapper, f"ad-{self.seed}-{self._number()}")
        level.own = self._wrapper_own() if wrapper else self._inline_own(version)
        level.union = self._union(version)
        level.extensions = [self._extension() for _ in range(self._few(0.4))]
        level.verifications = self._verifications()
        priced = version >= ("4.0" if wrapper else "3.0") and self._often(0.35)
        level.pricing = self._pricing() if priced else None
        self._add_linears(level)
        if self._nonlinear:
            self._add_nonlinears(level)
        self._add_companions(level)
        level.litter = wrapper and self._often(0.25)
        return level

    def _wrapper_own(self) -> list[Fact]:
        return [Fact("AdSystem", "1.0", "", f"Wrapper system {self._number()}")]

    def _inline_own(self, version: str) -> list[Fact]:
        own = [
            Fact("AdSystem", "2.0", "", f"InLine system {self._number()}"),
            Fact("AdTitle", "", "", f"Títle & <{self._number()}>"),
        ]
        optional = {
            Fact("Description", "", "", "A description"): "2.0",
            Fact("Survey", "", "", self._url("survey")): "2.0",
            Fact("Advertiser", "", "", "Advertiser"): "3.0",
            Fact("Category", "https://iabtechlab.com", "", f"IAB1-{self._number()}"): "4.0",
            Fact("Expires", "", "", "3600"): "4.1",
        }
        own += [fact for fact, since in optional.items() if version >= since and self._often(0.4)]
        if version >= "4.1":
            own.append(Fact("AdServingId", "", "", f"server-{self.seed}-{self._number()}"))
        return own

    def _union(self, version: str) -> list[Fact]:
        facts = [self._impression() for _ in range(self.random.randint(1, 3))]
        errors = self.random.randint(0, 2 if version >= "3.0" else 1)
        # The proxy tells errors of what failed: to this server, not to names that nobody has.
        facts += [Fact("Error", "", "", self._url("error", self.server)) for _ in range(errors)]
        if version >= "4.0" and self._often(0.5):
            kinds = ("Viewable", "NotViewable", "ViewUndetermined")
            for kind in self.random.choices(kinds, k=self.random.randint(1, 4)):
                facts.append(Fact(f"ViewableImpression/{kind}", "", "", self._url(kind)))
        return facts

    def _impression(self) -> Fact:
        url = self._shared if self._often(0.15) else self._url("impression")
        return Fact("Impression", self.random.choice(("", "imp")), "", url)

    def _pricing(self) -> Fact:
        return Fact("Pricing", "CPM", "USD", f"{self._number()}.25")

    def _extension(self) -> Extension:
        number = self._number()
        namespace = self.random.choice(("", f"urn:vendor:{number}"))
        return Extension(f"type-{number % 3}", namespace, f"ext {number} & <é>")

    def _verifications(self) -> list[Verification]:
        if not self._often(0.35):
            return []
        drawn = [self._verification() for _ in range(self.random.randint(1, 2))]
        return [*drawn, self._shared_verification] if self._often(0.4) else drawn

    def _verification(self) -> Verification:
        number = self._number()
        return Verification(
            f"vendor{number}.example-omid",
            self._url("omid.js"),
            self.random.choice(("", f'{{"n": {number}, "h": "<b>"}}')),
            self._tracker("refused") if self._often(0.5) else "",
        )

    # -- creatives --

    def _add_linears(self, level: Level) -> None:
        if not self._linears:
            return
        count = self.random.randint(0, 3) if level.wrapper else self._linears
        level.linears = [self._linear(level) for _ in range(count)]
        has_through = self._often(0.4) and (level.version >= "4.2" or not level.wrapper)
        if has_through:
            for part in level.linears[: 1 if level.wrapper else None]:
                part.through = self._url("landing")
        if level.linears and self._icons and level.version >= "3.0" and self._often(0.5):
            most = 1 if level.version in {"4.0", "4.1"} else 2
            programs = self.random.sample(PROGRAMS, self.random.randint(1, most))
            level.linears[-1].icons = [self._icon(program) for program in programs]

    def _linear(self, level: Level) -> LinearPart:
        facts = [] if level.wrapper else self._media(level.version)
        facts += [self._linear_event(level.version) for _ in range(self.random.randint(0, 5))]
        clicks = ["ClickTracking"] if level.version < "3.0" else ["ClickTracking", "CustomClick"]
        for kind in self.random.choices(clicks, k=self.random.randint(0, 2)):
            identity = self.random.choice(("", "c1"))
            facts.append(Fact(f"Linear/VideoClicks/{kind}", identity, "", self._tracker("click")))
        return LinearPart(facts)

    def _media(self, version: str) -> list[Fact]:
        facts = [Fact("Linear/Duration", "", "", "00:00:30")]
        if version >= "3.0" and self._often(0.4):
            facts.append(Fact("Linear@skipoffset", "", "", "00:00:05"))
        if self._often(0.2):
            facts.append(Fact("Linear/AdParameters", "", "", "a=1&b=<2>"))
        for _ in range(self.random.randint(1, 2)):
            kind = "Linear/MediaFiles/MediaFile"
            facts.append(Fact(kind, "video/mp4", "progressive", self._url("media.mp4")))
        return facts

    def _linear_event(self, version: str) -> Fact:
        events = list(LINEAR_EVENTS)
        events += ["fullscreen"] if version < "4.0" else ["playerExpand", "playerCollapse"]
        events += ["skip", "progress", "progress"] if version >= "3.0" else []
        events += ["loaded"] if version >= "4.1" else []
        event = self.random.choice(events)
        offsets = ("00:00:10", "00:00:10.000", "25%", "00:00:05")
        offset = self.random.choice(offsets) if event == "progress" else ""
        url = self._shared if self._often(0.1) else self._tracker(event)
        return Fact("Linear/TrackingEvents/Tracking", event, offset, url)

    def _icon(self, program: str) -> Icon:
        tells = {
            "IconClicks/IconClickThrough": 1,
            "IconClicks/IconClickTracking": 2,
            "IconViewTracking": 1,
        }
        drawn = [
            (path, self._tracker("icon"))
            for path, most in tells.items()
            for _ in range(self.random.randint(0, most))
        ]
        return Icon(program, self._url("icon.png"), tuple(drawn))

    def _add_nonlinears(self, level: Level) -> None:
        count = self.random.randint(0, 2) if level.wrapper else 1
        level.nonlinears = [self._nonlinear_part(level) for _ in range(count)]

    def _nonlinear_part(self, level: Level) -> NonLinearPart:
        events = self.random.choices(("creativeView", "acceptInvitation", "close"), k=2)
        kind = "NonLinearAds/TrackingEvents/Tracking"
        tracking = [Fact(kind, event, "", self._tracker(event)) for event in events]
        ads = [self._nonlinear_ad(level) for _ in range(self.random.randint(1, 2))]
        return NonLinearPart(tracking[: self.random.randint(0, 2)], ads)

    def _nonlinear_ad(self, level: Level) -> list[Fact]:
        prefix, facts = "NonLinearAds/NonLinear", []
        if not level.wrapper:
            facts.append(Fact(f"{prefix}/StaticResource", "image/png", "", self._url("over.png")))
            if self._often(0.5):
                facts.append(Fact(f"{prefix}/NonLinearClickThrough", "", "", self._url("landing")))
        # VAST 2.0 has NonLinearClickTracking in wrappers only.
        if level.wrapper or level.version >= "3.0":
            url = self._tracker("over-click")
            facts.append(Fact(f"{prefix}/NonLinearClickTracking", "", "", url))
        return facts

    def _add_companions(self, level: Level) -> None:
        if self._companions == "none" or (self._companions == "wrappers" and not level.wrapper):
            return
        for _ in range(self.random.randint(0 if level.wrapper else 1, 3)):
            tracks = level.wrapper and self._companions == "inline" and self._often(0.5)
            draw = self._tracking_companion if tracks else self._companion
            drawn = draw(level.version)
            if tracks or drawn.label not in {each.label for each in level.companions}:
                level.companions.append(drawn)

    def _companion(self, version: str) -> Companion:
        return Companion(
            *self.random.choice(SIZES),
            slot=self.random.choice(("", "", "top")) if version >= "3.0" else "",
            resource=self._url("companion.png"),
            through=self._url("landing") if self._often(0.7) else "",
            clicks=self._clicks(version),
            views=tuple(self._tracker("comp-view") for _ in range(self._few(0.5))),
        )

    def _tracking_companion(self, version: str) -> Companion:
        size = ("0", "0") if self._often(0.6) else self.random.choice(SIZES)
        return Companion(
            *size,
            clicks=self._clicks(version),
            views=tuple(self._tracker("comp-view") for _ in range(self.random.randint(1, 2))),
        )

    def _clicks(self, version: str) -> tuple[str, ...]:
        count = self._few(0.6) if version >= "3.0" else 0
        return tuple(self._tracker("comp-click") for _ in range(count))

    # -- drawing --

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _url(self, what: str, base: str = "https://cdn.example") -> str:
        return f"{base}/{self.seed}/{self._number()}/{what}{self.random.choice(QUERIES)}"

    def _tracker(self, what: str) -> str:
        queries = (*QUERIES, *MACROS)
        return f"https://t.example/{self.seed}/{self._number()}/{what}{self.random.choice(queries)}"

    def _depth(self, deepest: int) -> int:
        return self.random.randint(0, deepest)

    def _often(self, chance: float) -> bool:
        return self.random.random() < chance

    def _few(self, chance: float) -> int:
        return self.random.randint(1, 2) if self._often(chance) else 0
