"""
Write the documents of a tree, in all the ways that ad servers write them.

Rule 1: what a document says is given; only its letters are drawn: CDATA or escapes, blanks and
comments around and inside URLs, prefixes, a byte order mark, several Creatives.
Rule 2: text whose blanks matter is written without any.
"""

import posixpath
from collections.abc import Iterable, Iterator
from random import Random
from urllib.parse import urlsplit
from xml.sax.saxutils import escape, quoteattr

from tests.support.ad_server import Reply
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
)
from tests.support.vast_facts import IAB, Fact

LOST = "https://lost.example/"
"""Where URLs lead that must not be in an answer."""

INLINE_ORDER = (
    *("AdSystem", "Error", "Extensions", "Impression", "Pricing", "ViewableImpression"),
    *("AdServingId", "AdTitle", "AdVerifications", "Advertiser", "Category", "Creatives"),
    *("Description", "Expires", "Survey"),
)
"""Children of an InLine, and of a Wrapper but for its VASTAdTagURI, since VAST 4."""

OLD_ORDER = (
    *("AdSystem", "AdTitle", "VASTAdTagURI", "Description", "Advertiser", "Pricing", "Survey"),
    *("Error", "Impression", "Creatives", "Extensions"),
)
"""The same before VAST 4."""


class TreeWriter:
    """Writes the documents of one tree for the server at the URL *server*."""

    def __init__(self, server: str, first_hop: str, random: Random) -> None:
        self._server = server
        self._first_hop = first_hop
        self._random = random

    def pages(self, root: Response) -> dict[str, Reply]:
        """Give what the server answers, by the target, for *root* and all that it leads to."""
        pages: dict[str, Reply] = {}
        waiting = [(root, self._first_hop)]
        while waiting:
            response, hop = waiting.pop()
            if _key(response.target) in pages:
                continue
            if response.asked_at:
                location = self._random.choice((self._server, "")) + response.target
                pages[response.asked_at] = Reply(status=302, headers=(("Location", location),))
            pages[_key(response.target)] = response.failure or self._page(response, hop)
            waiting += [(ad.leads_to, "") for ad in response.ads if ad.leads_to]
        return pages

    def _page(self, response: Response, first_hop: str) -> Reply:
        pen = _Pen(response.version, self._random)
        ads = [
            pen.ad(ad, self._tag_uri(response, ad.leads_to, first_hop) if ad.leads_to else "")
            for ad in response.ads
        ]
        return Reply(pen.document(ads))

    def _tag_uri(self, here: Response, there: Response, first_hop: str) -> str:
        target = there.asked_at or there.target
        if first_hop:
            return first_hop + target
        path, mark, query = target.partition("?")
        folder = posixpath.dirname(here.target.partition("?")[0])
        relative = posixpath.relpath(path, folder) + mark + query
        without_scheme = f"//{urlsplit(self._server).netloc}{target}"
        absolute = self._server + target
        forms = (absolute, target, relative, without_scheme)
        return self._random.choices(forms, weights=(7, 1, 1, 1))[0]


def _key(target: str) -> str:
    # What a macro is filled with is not known before: such a page is found by its path.
    return target.partition("?")[0] if "[CACHEBUSTING]" in target else target


class _Pen:
    """Writes one document."""

    def __init__(self, version: str, random: Random) -> None:
        self.version = version
        self.random = random
        style = random.choice(("default", "default", "none", "prefix"))
        self.style = style if version >= "4.0" else "none"
        self.prefix = "v:" if self.style == "prefix" else ""
        self.foreign: dict[str, str] = {}
        self.declares_at_root = random.random() < 0.5

    # -- letters --

    def document(self, ads: list[str]) -> bytes:
        """Write the whole document around *ads*."""
        attributes = {"version": self.version}
        if self.style != "none":
            attributes["xmlns" if self.style == "default" else "xmlns:v"] = IAB
        if self.declares_at_root:
            attributes |= {f"xmlns:{prefix}": uri for uri, prefix in self.foreign.items()}
        before = self.random.choice(("", "", '<?xml version="1.0" encoding="UTF-8"?>\n'))
        comment = self.random.choice(("", "<!-- served by <b> & co -->\n"))
        text = before + comment + self.element("VAST", attributes, ads)
        return self.random.choice((b"", b"", b"\xef\xbb\xbf")) + text.encode()

    def element(
        self, name: str, attributes: dict[str, str] | None = None, inside: Iterable[str] = ()
    ) -> str:
        """Write an element that holds elements."""
        gap = self.random.choice(("", "\n", "\n    ", "<!-- gap -->"))
        held = "".join(each + gap for each in inside)
        return self.leaf(name, attributes or {}, gap + held)

    def leaf(self, name: str, attributes: dict[str, str], written: str) -> str:
        """Write an element with *written* inside, as it is."""
        given = "".join(f" {key}={quoteattr(value)}" for key, value in attributes.items())
        tag = self.prefix + name
        return f"<{tag}{given}>{written}</{tag}>" if written else f"<{tag}{given}/>"

    def url(self, name: str, attributes: dict[str, str], url: str) -> str:
        """Write an element with a URL, or another text whose outer blanks do not matter."""
        attributes = {key: value for key, value in attributes.items() if value}
        if self.random.random() < 0.1:
            cut = self.random.randrange(len(url) + 1)
            written = f"{self._text(url[:cut])}<!-- cut -->{self._text(url[cut:])}"
        else:
            written = self._text(url, self.random.choice(("", "", "", "\n   ")))
        before = self.random.choice(
            ("", "", "", " ", "\n      ", "<!-- before -->", "\n<!--b-->\n")
        )
        after = self.random.choice(("", "", "", " ", "\n\t", "<!-- after -->", "\n<!--a-->"))
        return self.leaf(name, attributes, before + written + after)

    def _text(self, text: str, blank: str = "") -> str:
        if self.random.random() < 0.3:
            return escape(text)
        return f"<![CDATA[{blank}{text}{blank}]]>"

    def told(self, fact: Fact, first: str = "", second: str = "") -> str:
        """Write *fact* as the last name of its kind, with its attributes called so."""
        attributes = {first: fact.event} if first else {}
        attributes |= {second: fact.offset} if second else {}
        return self.url(fact.kind.rpartition("/")[2], attributes, fact.text)

    # -- ads --

    def ad(self, ad: Ad, tag_uri: str) -> str:
        """Write one Ad, which leads to *tag_uri* where it is a wrapper."""
        level = ad.level
        attributes = {"id": level.id}
        if ad.sequence is not None:
            attributes["sequence"] = str(ad.sequence)
        body = self._wrapper(ad, tag_uri) if level.wrapper else self._inline(level)
        return self.element("Ad", attributes, [body])

    def _inline(self, level: Level) -> str:
        return self.element("InLine", {}, self._ordered(self._children(level)))

    def _wrapper(self, ad: Ad, tag_uri: str) -> str:
        attributes = {}
        if ad.multiple is not None:
            attributes["allowMultipleAds"] = ad.multiple
        if self.version >= "3.0":
            spelled = self.random.choice(("", "true", "1", "True"))
            attributes |= {"followAdditionalWrappers": spelled} if spelled else {}
        children = self._children(ad.level)
        children.append(("VASTAdTagURI", self.url("VASTAdTagURI", {}, tag_uri)))
        if ad.level.litter:
            children += [("Impression", self.empty("Impression")), ("Error", self.empty("Error"))]
        return self.element("Wrapper", attributes, self._ordered(children))

    def empty(self, name: str, attributes: dict[str, str] | None = None) -> str:
        """Write an element that should have a URL, and has none."""
        blank = self.random.choice(("", " ", "\n", "<![CDATA[]]>", "<![CDATA[ ]]>", "<!-- x -->"))
        return self.leaf(name, attributes or {}, blank)

    def _ordered(self, children: list[tuple[str, str]]) -> list[str]:
        order = INLINE_ORDER if self.version >= "4.0" else OLD_ORDER
        places = {name: place for place, name in enumerate(order)}
        return [text for _, text in sorted(children, key=lambda each: places.get(each[0], 99))]

    def _children(self, level: Level) -> list[tuple[str, str]]:
        children = [(fact.kind, self._own(fact)) for fact in level.own]
        simple = [fact for fact in level.union if fact.kind in {"Impression", "Error"}]
        children += [(fact.kind, self.told(fact, "id")) for fact in simple]
        viewable = [self.told(fact) for fact in level.union if fact not in simple]
        if viewable:
            self.random.shuffle(viewable)
            attributes = {"id": "view"} if self.random.random() < 0.5 else {}
            text = self.element("ViewableImpression", attributes, viewable)
            children.append(("ViewableImpression", text))
        if level.pricing:
            children.append(("Pricing", self.told(level.pricing, "model", "currency")))
        children += self._extensions(level)
        creatives = [self.element("Creative", *each) for each in self._creatives(level)]
        children.append(("Creatives", self.element("Creatives", {}, creatives)))
        return children

    def _own(self, fact: Fact) -> str:
        names = {"AdSystem": "version", "Category": "authority", "Survey": "type"}
        return self.told(fact, names.get(fact.kind, ""))

    def _extensions(self, level: Level) -> Iterator[tuple[str, str]]:
        extensions = [self._extension(each) for each in level.extensions]
        if level.verifications:
            inside = [self._verification(each) for each in level.verifications]
            text = self.element("AdVerifications", {}, inside)
            direct = self.version >= "4.1" or (self.version == "4.0" and self.random.random() < 0.5)
            if direct:
                yield "AdVerifications", text
            else:
                extensions.append(self.element("Extension", {"type": "AdVerifications"}, [text]))
        if extensions:
            yield "Extensions", self.element("Extensions", {}, extensions)

    def _extension(self, extension: Extension) -> str:
        name, attributes = f"{self.prefix}Data", {"key": "v"}
        if extension.namespace:
            prefix = self.foreign.setdefault(extension.namespace, f"x{len(self.foreign)}")
            name = f"{prefix}:Data"
            if not self.declares_at_root:
                attributes[f"xmlns:{prefix}"] = extension.namespace
        given = "".join(f" {key}={quoteattr(value)}" for key, value in attributes.items())
        text = self.random.choice((escape(extension.text), f"<![CDATA[{extension.text}]]>"))
        return self.leaf("Extension", {"type": extension.type}, f"<{name}{given}>{text}</{name}>")

    def _verification(self, verification: Verification) -> str:
        # Without any drawing: equal ones must be equal in bytes.
        attributes = {"apiFramework": "omid", "browserOptional": "true"}
        resource = f"<![CDATA[{verification.resource}]]>"
        inside = [self.leaf("JavaScriptResource", attributes, resource)]
        if verification.refused:
            tracking = f"<![CDATA[{verification.refused}]]>"
            event = self.leaf("Tracking", {"event": "verificationNotExecuted"}, tracking)
            inside.append(self.leaf("TrackingEvents", {}, event))
        if verification.parameters:
            parameters = f"<![CDATA[{verification.parameters}]]>"
            inside.append(self.leaf("VerificationParameters", {}, parameters))
        return self.leaf("Verification", {"vendor": verification.vendor}, "".join(inside))

    # -- creatives --

    def _creatives(self, level: Level) -> list[tuple[dict[str, str], list[str]]]:
        bodies = [self._linear(level, part) for part in level.linears]
        bodies += [self._nonlinear(level, part) for part in level.nonlinears]
        bodies += self._companion_ads(level)
        if level.wrapper:
            self.random.shuffle(bodies)
        creatives = []
        for number, body in enumerate(bodies):
            attributes = {"id": f"{level.id}-{number}"} if self.random.random() < 0.7 else {}
            extra = self._only_of_inlines(level)
            creatives.append((attributes, [body, *extra]))
        return creatives

    def _only_of_inlines(self, level: Level) -> list[str]:
        if level.wrapper:
            if not level.litter:
                return []
            held = self.leaf("CreativeExtension", {"type": "lost"}, LOST)
            return [self.element("CreativeExtensions", {}, [held])]
        if self.version < "4.0":
            return []
        fact = level.universal_id
        attributes = {"idRegistry": fact.event, "idValue": fact.offset}
        return [self.url("UniversalAdId", attributes, fact.text)]

    def _linear(self, level: Level, part: LinearPart) -> str:
        def of(kind: str) -> list[Fact]:
            return [fact for fact in part.facts if fact.kind.startswith(f"Linear{kind}")]

        attributes = {fact.kind.partition("@")[2]: fact.text for fact in of("@")}
        tracking = [self.told(fact, "event", "offset") for fact in of("/TrackingEvents/")]
        clicks = [self.told(fact, "id") for fact in of("/VideoClicks/")]
        if part.through:
            clicks.append(self.url("ClickThrough", {}, part.through))
        media = [self._media(fact) for fact in of("/MediaFiles/")]
        if level.litter:
            attributes["skipoffset"] = "00:00:01"
            tracking.append(self.empty("Tracking", {"event": "start"}))
            clicks.append(self.empty("ClickTracking"))
            media.append(self._media(Fact("MediaFile", "video/mp4", "streaming", LOST)))
        inside = [
            *self._held("Icons", [self._icon(each) for each in part.icons]),
            *self._held("TrackingEvents", tracking),
            *[self.told(fact) for fact in of("/AdParameters")],
            *[self.told(fact) for fact in of("/Duration")],
            *self._held("MediaFiles", media),
            *self._held("VideoClicks", clicks),
        ]
        return self.element("Linear", attributes, inside)

    def _held(self, name: str, inside: list[str]) -> list[str]:
        return [self.element(name, {}, inside)] if inside else []

    def _media(self, fact: Fact) -> str:
        attributes = {"delivery": fact.offset, "type": fact.event, "width": "640", "height": "360"}
        return self.url("MediaFile", attributes, fact.text)

    def _icon(self, icon: Icon) -> str:
        attributes = {"program": icon.program} if icon.program else {}
        attributes |= {"width": "20", "height": "20", "xPosition": "right", "yPosition": "top"}
        clicks = [self._step(path, url) for path, url in icon.tells if path.startswith("IconC")]
        views = [self._step(path, url) for path, url in icon.tells if not path.startswith("IconC")]
        resource = self.url("StaticResource", {"creativeType": "image/png"}, icon.resource)
        inside = [resource, *self._held("IconClicks", clicks), *views]
        return self.element("Icon", attributes, inside)

    def _step(self, path: str, url: str) -> str:
        return self.url(path.rpartition("/")[2], {}, url)

    def _nonlinear(self, level: Level, part: NonLinearPart) -> str:
        tracking = [self.told(fact, "event") for fact in part.tracking]
        if level.litter:
            tracking.append(self.empty("Tracking", {"event": "close"}))
        ads = [self._nonlinear_ad(level, facts) for facts in part.ads]
        return self.element("NonLinearAds", {}, [*self._held("TrackingEvents", tracking), *ads])

    def _nonlinear_ad(self, level: Level, facts: list[Fact]) -> str:
        attributes = {"width": "300", "height": "60"}
        inside = [
            self.told(fact, "creativeType" if fact.kind.endswith("StaticResource") else "")
            for fact in facts
        ]
        if level.litter:
            inside.append(self.url("StaticResource", {"creativeType": "image/png"}, LOST))
        return self.element("NonLinear", attributes, inside)

    def _companion_ads(self, level: Level) -> list[str]:
        written = [self._companion(each) for each in level.companions]
        cut = self.random.randrange(len(written) + 1) if level.wrapper and written else 0
        parts = [part for part in (written[:cut], written[cut:]) if part]
        return [self.element("CompanionAds", {}, part) for part in parts]

    def _companion(self, companion: Companion) -> str:
        attributes = {"width": companion.width, "height": companion.height}
        attributes |= {"adSlotId": companion.slot} if companion.slot else {}
        inside = []
        if companion.resource:
            image = {"creativeType": "image/png"}
            inside.append(self.url("StaticResource", image, companion.resource))
        if companion.through:
            inside.append(self.url("CompanionClickThrough", {}, companion.through))
        inside += [self.url("CompanionClickTracking", {}, each) for each in companion.clicks]
        views = [self.url("Tracking", {"event": "creativeView"}, each) for each in companion.views]
        return self.element(
            "Companion", attributes, [*inside, *self._held("TrackingEvents", views)]
        )
