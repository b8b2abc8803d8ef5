"""Merging wrappers into an InLine: the table of rules, row by row, and what holds for all of it."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from tests.support.script import ENTRY, chained, served, unwrapped, written
from tests.support.trees import grow, misfits
from tests.support.vast_facts import IAB, faults
from tests.support.vast_strategies import Chain, chains
from vastproxy.errors import VastSchemaError
from vastproxy.vast.document import text_of
from vastproxy.vast.merge import MAX_GROWTH, base_of, merge
from vastproxy.vast.parse import parse
from vastproxy.vast.unwrap import Unwrapper

SERVER = "http://ads.example"
MEDIA = "<Duration>00:00:30</Duration><MediaFiles/>"


def linear(inside: str = "") -> str:
    """Write a creative with a Linear that holds *inside*."""
    return f"<Creatives><Creative><Linear>{inside}</Linear></Creative></Creatives>"


def document(
    kind: str, inside: str, *, version: str = "4.2", root: str = "", errors: str = ""
) -> str:
    """Write a document whose one ad is a *kind* that holds *inside*."""
    tag = "<VASTAdTagURI>u:next</VASTAdTagURI>" if kind == "Wrapper" else ""
    body = f"<Ad><{kind}>{tag}{inside}</{kind}></Ad>"
    return f'<VAST version="{version}"{root}>{errors}{body}</VAST>'


def merged(*levels: str, version: str = "4.2") -> etree._Element:
    """Merge *levels*, outermost wrapper's inside first; the last is the InLine's."""
    *wrappers, inline = levels
    # Each hop has an address of its own, so that the chain is no loop.
    documents = [
        document("Wrapper", each).replace("u:next", f"u:{n}") for n, each in enumerate(wrappers)
    ]
    return inline_of(chained(*documents, document("InLine", inline, version=version)))


def inline_of(answer: bytes) -> etree._Element:
    """Give the one InLine of *answer*."""
    (inline,) = etree.fromstring(answer).iterfind("{*}Ad/{*}InLine")
    return inline


def texts(inline: etree._Element, path: str) -> list[str]:
    """Give the texts at *path*, in document order."""
    return [text_of(each) for each in inline.iterfind(path)]


def names(element: etree._Element | None) -> list[str]:
    """Give the names of the children."""
    return [] if element is None else [str(each.tag) for each in element]


# --- The table, row by row ----------------------------------------------------------------------


def test_impressions() -> None:
    """Impressions of all levels stand together, the outermost first, each with its id."""
    inline = merged(
        "<Impression id='1'>o1</Impression><Impression>o2</Impression>",
        "<Impression>m</Impression>",
        f"<AdSystem/><Impression id='2'>i</Impression><AdTitle/>{linear(MEDIA)}",
    )

    assert ["o1", "o2", "m", "i"] == texts(inline, "Impression")
    assert ["1", None, None, "2"] == [each.get("id") for each in inline.iterfind("Impression")]
    assert ["AdSystem", *["Impression"] * 4, "AdTitle", "Creatives"] == names(inline)


def test_empty_trackers() -> None:
    """A wrapper's tracker without a URL is dropped; the InLine's own stays as it is."""
    inline = merged(
        "<Impression/><Impression> </Impression><Error/>"
        + linear("<TrackingEvents><Tracking event='start'> </Tracking></TrackingEvents>"),
        f"<Impression/>{linear(MEDIA)}",
    )

    assert ["Impression", "Creatives"] == names(inline)
    assert [] == texts(inline, ".//Tracking")


def test_equal_urls() -> None:
    """Equal URLs are counted as often as they stand there."""
    inline = merged("<Impression>a</Impression>" * 2, f"<Impression>a</Impression>{linear(MEDIA)}")

    assert ["a"] * 3 == texts(inline, "Impression")


def test_errors() -> None:
    """Errors of all levels stand together; those of a document's root come with its ad's."""
    outer = document("Wrapper", "<Error>o</Error>", errors="<Error>root</Error>")
    inner = document("InLine", f"<Error>i</Error>{linear(MEDIA)}")

    assert ["root", "o", "i"] == texts(inline_of(chained(outer, inner)), "Error")


def test_errors_of_a_shared_root() -> None:
    """The root's errors speak for every ad of the document: each of a pod has them."""
    ads = "".join(
        f'<Ad id="{n}" sequence="{n}"><Wrapper><VASTAdTagURI>u:{n}</VASTAdTagURI></Wrapper></Ad>'
        for n in (1, 2, 3)
    )
    entry = f'<VAST version="4.2"><Error>root</Error>{ads}</VAST>'.encode()
    inner = document("InLine", linear(MEDIA)).encode()
    answer = etree.fromstring(written(unwrapped(entry, ENTRY, lambda url: (inner, url))))

    assert [["root"]] * 3 == [texts(each, "Error") for each in answer.iterfind("Ad/InLine")]


def test_errors_of_the_last_root() -> None:
    """The root's errors of the document with the InLine are the ad's too: none is lost."""
    inner = document("InLine", linear(MEDIA), errors="<Error>root</Error>")
    answer = chained(document("Wrapper", "<Error>o</Error>"), inner)

    assert ["o", "root"] == texts(inline_of(answer), "Error")
    assert [] == texts(etree.fromstring(answer), "Error")


def test_errors_of_a_mixed_root() -> None:
    """So do an InLine and a wrapper of one document; told of each ad, they leave the root."""
    ads = (
        '<Ad sequence="1"><Wrapper><VASTAdTagURI>u:1</VASTAdTagURI></Wrapper></Ad>'
        f'<Ad sequence="2"><InLine>{linear(MEDIA)}</InLine></Ad>'
    )
    entry = f'<VAST version="4.2"><Error>root</Error>{ads}</VAST>'.encode()
    inner = document("InLine", linear(MEDIA)).encode()
    answer = etree.fromstring(written(unwrapped(entry, ENTRY, lambda url: (inner, url))))

    assert [["root"]] * 2 == [texts(each, "Error") for each in answer.iterfind("Ad/InLine")]
    assert [] == texts(answer, "Error")


def test_viewable_impression() -> None:
    """The URIs of all levels stand in one ViewableImpression, which keeps the InLine's id."""
    view = (
        "<ViewableImpression id='{0}'><Viewable>{0}</Viewable><{1}>{0}</{1}></ViewableImpression>"
    )
    inline = merged(
        view.format("o", "NotViewable"),
        view.format("i", "ViewUndetermined") + linear(MEDIA),
    )
    (views,) = inline.iterfind("ViewableImpression")

    assert "i" == views.get("id")
    assert ["Viewable", "Viewable", "NotViewable", "ViewUndetermined"] == names(views)
    assert ["o", "i"] == texts(views, "Viewable")


def test_viewable_impression_of_a_wrapper() -> None:
    """Where the InLine has none, the wrapper's is there, with its id."""
    view = "<ViewableImpression id='o'><Viewable>v</Viewable></ViewableImpression>"
    (views,) = merged(view, linear(MEDIA)).iterfind("ViewableImpression")

    assert "o" == views.get("id")
    assert ["v"] == texts(views, "Viewable")


def test_tracking_events() -> None:
    """Events are collected from all creatives of a wrapper; offsets stay as they are written."""
    part = "<Creative><Linear><TrackingEvents>{}</TrackingEvents></Linear></Creative>"
    one = part.format("<Tracking event='progress' offset='00:00:10'>o1</Tracking>")
    two = part.format("<Tracking event='progress' offset='00:00:10.000'>o2</Tracking>")
    own = "<TrackingEvents><Tracking event='progress' offset='25%'>i</Tracking></TrackingEvents>"
    inline = merged(f"<Creatives>{one}{two}</Creatives>", linear(own + MEDIA))
    (events,) = inline.iterfind(".//TrackingEvents")

    assert ["o1", "o2", "i"] == [text_of(each) for each in events]
    assert ["00:00:10", "00:00:10.000", "25%"] == [each.get("offset") for each in events]


def test_every_linear() -> None:
    """What a wrapper tracks of a Linear is added to every Linear of the InLine."""
    track = "<TrackingEvents><Tracking event='start'>o</Tracking></TrackingEvents>"
    clicks = "<VideoClicks><ClickTracking>c</ClickTracking></VideoClicks>"
    both = f"<Creative><Linear>{MEDIA}</Linear></Creative>" * 2
    inline = merged(linear(track + clicks), f"<Creatives>{both}</Creatives>")

    assert [["o"], ["o"]] == [texts(each, ".//Tracking") for each in inline.iter("Linear")]
    assert [["c"], ["c"]] == [texts(each, ".//ClickTracking") for each in inline.iter("Linear")]


def test_place_in_linear() -> None:
    """What is new in a Linear stands where the schema wants it."""
    inline = merged(
        linear(
            "<Icons><Icon program='p'/></Icons>"
            "<TrackingEvents><Tracking event='start'>o</Tracking></TrackingEvents>"
            "<VideoClicks><CustomClick>u</CustomClick><ClickTracking>c</ClickTracking>"
            "<ClickThrough>t</ClickThrough></VideoClicks>"
        ),
        linear(MEDIA),
    )

    assert ["Icons", "TrackingEvents", "Duration", "MediaFiles", "VideoClicks"] == names(
        inline.find(".//Linear")
    )
    assert ["ClickTracking", "ClickThrough", "CustomClick"] == names(inline.find(".//VideoClicks"))


def clicks_of(kind: str, *urls: str) -> str:
    """Write a creative with clicks of one *kind*."""
    inside = "".join(f"<{kind}>{each}</{kind}>" for each in urls)
    return linear(f"<VideoClicks>{inside}</VideoClicks>")


@pytest.mark.parametrize("kind", ["ClickTracking", "CustomClick"])
def test_clicks(kind: str) -> None:
    """Clicks of all levels are tracked."""
    inline = merged(clicks_of(kind, "o1", "o2"), clicks_of(kind, "m"), clicks_of(kind, "i"))

    assert ["o1", "o2", "m", "i"] == texts(inline, f".//{kind}")


@pytest.mark.parametrize(
    ("kept", "levels"),
    [
        ("i", ("o", "m", "i")),
        ("m", ("o", "m", None)),
        ("m", ("o", "m", " ")),
        ("o", ("o", None, None)),
        ("i", (None, None, "i")),
        ("o", ("o", " ", None)),
    ],
)
def test_click_through(kept: str, levels: tuple[str | None, ...]) -> None:
    """One landing page is left: the one closest to the InLine that says where it is."""
    written_ = [
        linear(MEDIA) if each is None else clicks_of("ClickThrough", each) for each in levels
    ]

    assert [kept] == texts(merged(*written_), ".//ClickThrough")


def test_click_through_of_several_linears() -> None:
    """Each Linear without a landing page gets the wrapper's; the others keep their own."""
    own = "<VideoClicks><ClickThrough>i</ClickThrough></VideoClicks>"
    for first, second in ((own, ""), ("", own), ("", "")):
        creatives = [f"<Creative><Linear>{each}</Linear></Creative>" for each in (first, second)]
        inline = merged(
            clicks_of("ClickThrough", "o"), f"<Creatives>{''.join(creatives)}</Creatives>"
        )
        expected = [["i" if each else "o"] for each in (first, second)]

        assert expected == [texts(each, ".//ClickThrough") for each in inline.iter("Linear")]


def test_what_only_an_inline_has() -> None:
    """A wrapper's media, parameters, duration and skip offset are dropped."""
    theirs = (
        "<Duration>00:00:01</Duration><AdParameters>o</AdParameters><MediaFiles><o/></MediaFiles>"
    )
    wrapper_ = linear(theirs).replace("<Linear>", "<Linear skipoffset='00:00:01'>")
    inline = merged(wrapper_, linear(MEDIA))

    assert inline.find(".//Linear").get("skipoffset") is None
    assert ["Duration", "MediaFiles"] == names(inline.find(".//Linear"))
    assert ["00:00:30"] == texts(inline, ".//Duration")
    assert [] == names(inline.find(".//MediaFiles"))


@pytest.mark.parametrize(
    "name",
    [
        "AdSystem", "AdTitle", "AdServingId", "Description", "Advertiser", "Survey", "Expires",
        "Category",
    ],
)  # fmt: skip
def test_what_stays_the_inlines(name: str) -> None:
    """Who made the ad and what it is stays the InLine's word, and is not made up without one."""
    theirs, own = f"<{name}>o</{name}>", f"<{name}>i</{name}>"

    assert ["i"] == texts(merged(theirs, own + linear(MEDIA)), name)
    assert [] == texts(merged(theirs, linear(MEDIA)), name)


def test_attributes_of_the_ad() -> None:
    """The attributes of Ad and Creative are the InLine's."""
    outer = document("Wrapper", linear()).replace("<Ad>", '<Ad id="o" adType="audio">')
    inner = document("InLine", linear(MEDIA)).replace("<Ad>", '<Ad id="i" x="y">')
    ad = inline_of(chained(outer, inner)).getparent()

    assert ad is not None
    assert {"id": "i", "x": "y"} == dict(ad.attrib)


def test_icons() -> None:
    """Of a program the icon closest to the InLine is left; icons without program all stay."""
    of_programs = "<Icon program='p'>{0}p</Icon><Icon program='{0}'>{0}</Icon>"
    icons = f"<Icons>{of_programs}<Icon>{{0}}n</Icon></Icons>"
    inline = merged(*(linear(icons.format(each)) for each in "omi"))

    assert ["o", "on", "m", "mn", "ip", "i", "in"] == texts(inline, ".//Icons/Icon")
    assert 1 == len(list(inline.iter("Icons")))


def test_nonlinear_tracking() -> None:
    """Events of NonLinearAds are united; they stand below NonLinearAds, after the ads."""

    def ads(url: str, inside: str = "") -> str:
        events = f"<TrackingEvents><Tracking event='close'>{url}</Tracking></TrackingEvents>"
        body = f"<NonLinearAds>{inside}{events}</NonLinearAds>"
        return f"<Creatives><Creative>{body}</Creative></Creatives>"

    inline = merged(ads("o"), ads("i", "<NonLinear/>"))
    without = merged(ads("o"), ads("", "<NonLinear/>").replace("<Tracking event='close'/>", ""))

    assert ["o", "i"] == texts(inline, ".//NonLinearAds/TrackingEvents/Tracking")
    assert ["NonLinear", "TrackingEvents"] == names(without.find(".//NonLinearAds"))


def test_nonlinear_clicks() -> None:
    """A wrapper's click trackers go to every NonLinear; its resources are dropped."""

    def ads(*inside: str) -> str:
        body = "".join(f"<NonLinear>{each}</NonLinear>" for each in inside)
        return f"<Creatives><Creative><NonLinearAds>{body}</NonLinearAds></Creative></Creatives>"

    click = "<NonLinearClickTracking>{}</NonLinearClickTracking>"
    inline = merged(
        ads(click.format("o") + "<StaticResource>lost</StaticResource>"),
        ads(f"<StaticResource>1</StaticResource>{click.format('i')}", ""),
    )
    singles = list(inline.iter("NonLinear"))

    assert [["o", "i"], ["o"]] == [texts(each, "NonLinearClickTracking") for each in singles]
    assert ["1"] == texts(inline, ".//StaticResource")


def companions(*inside: str, required: str = "") -> str:
    """Write a creative with companions."""
    by = f' required="{required}"' if required else ""
    body = f"<CompanionAds{by}>{''.join(inside)}</CompanionAds>"
    return f"<Creatives><Creative>{body}</Creative></Creatives>"


def companion(size: str, inside: str = "", *, slot: str = "") -> str:
    """Write a companion of a *size*; with ``=text`` inside it shows that text."""
    shown = f"<HTMLResource>{inside[1:]}</HTMLResource>" if inside.startswith("=") else inside
    at = f' adSlotId="{slot}"' if slot else ""
    return f'<Companion width="{size}" height="{size}"{at}>{shown}</Companion>'


def test_companions_with_a_resource() -> None:
    """They are offered after the InLine's, innermost first, unless size and slot are taken."""
    inline = merged(
        companions(companion("1", "=o1"), companion("3", "=o3"), companion("1", "=os", slot="s")),
        companions(companion("2", "=m2"), companion("3", "=m3"), required="all"),
        companions(companion("1", "=i1"), companion("9", "=i9")),
    )

    assert ["i1", "i9", "m2", "m3", "os"] == texts(inline, ".//HTMLResource")
    assert [None, "all", None] == [each.get("required") for each in inline.iter("CompanionAds")]


@pytest.mark.parametrize(
    ("ids", "version"),
    [([], "3.0"), ([("unknown", "unknown")], "4.0"), ([("unknown", None)], "4.2")],
)
def test_creative_of_companions(ids: list[tuple[str, str | None]], version: str) -> None:
    """The creative they stand in has the UniversalAdId that its version requires."""
    inline = merged(companions(companion("1", "=o")), linear(MEDIA), version=version)
    found = [(each.get("idRegistry"), each.get("idValue")) for each in inline.iter("UniversalAdId")]

    assert ids == found


@pytest.mark.parametrize(
    ("size", "told"), [("0", [1, 1]), ("", [1, 1]), ("2", [0, 1]), ("7", [0, 0])]
)
def test_companions_without_a_resource(size: str, told: list[int]) -> None:
    """Their trackers go to the companions of their size; to all where they have none."""
    click = "<CompanionClickTracking>o</CompanionClickTracking>"
    view = "<TrackingEvents><Tracking event='creativeView'>v</Tracking></TrackingEvents>"
    inline = merged(
        companions(companion(size, click + view)),
        companions(companion("1", "=a"), companion("2", "=b")),
    )
    shown = list(inline.iter("Companion"))

    assert told == [len(texts(each, "CompanionClickTracking")) for each in shown]
    assert told == [len(texts(each, "TrackingEvents/Tracking")) for each in shown]


VENDOR = '<Verification vendor="{}"><JavaScriptResource>{}</JavaScriptResource></Verification>'
VERIFIED = "<AdVerifications>{}</AdVerifications>"
EXTENDED = f'<Extensions><Extension type="AdVerifications">{VERIFIED}</Extension></Extensions>'


@pytest.mark.parametrize("outer", [VERIFIED, EXTENDED, EXTENDED.replace('"Ad', '"ad')])
@pytest.mark.parametrize("inner", [VERIFIED, EXTENDED])
@pytest.mark.parametrize("version", ["3.0", "4.0", "4.1"])
def test_verifications(outer: str, inner: str, version: str) -> None:
    """All Verifications stand in the one AdVerifications of the InLine, wherever that is."""
    inline = merged(
        outer.format(VENDOR.format("v", "o")),
        inner.format(VENDOR.format("v", "i")) + linear(MEDIA),
        version=version,
    )
    (holder,) = inline.iter("AdVerifications")
    parent = holder.getparent()

    assert ["o", "i"] == texts(holder, "Verification/JavaScriptResource")
    assert parent is not None
    assert ("InLine" if inner == VERIFIED else "Extension") == parent.tag


@pytest.mark.parametrize(
    ("place", "version"),
    [("Extension", "2.0"), ("Extension", "3.0"), ("Extension", "4.0"), ("InLine", "4.1"),
     ("InLine", "4.3")],
)  # fmt: skip
def test_place_of_verifications(place: str, version: str) -> None:
    """Before VAST 4.1 they are made an Extension; since then a child after the Creatives."""
    inline = merged(VERIFIED.format(VENDOR.format("v", "o")), linear(MEDIA), version=version)
    (holder,) = inline.iter("AdVerifications")
    parent = holder.getparent()

    assert parent is not None
    assert place == parent.tag
    assert ["Creatives", "AdVerifications" if place == "InLine" else "Extensions"] == names(inline)
    assert place == "InLine" or parent.get("type") == "AdVerifications"


@pytest.mark.parametrize(
    ("left", "other"),
    [
        (1, VENDOR.format("v", "r")),
        (2, VENDOR.format("v", "other")),
        (2, VENDOR.format("other", "r")),
        (
            2,
            VENDOR.format("v", "r").replace(
                "</Ver", "<VerificationParameters>p</VerificationParameters></Ver"
            ),
        ),
    ],
)
def test_equal_verifications(left: int, other: str) -> None:
    """Only a Verification that is the same to the letter is dropped."""
    own = VERIFIED.format(VENDOR.format("v", "r"))
    inline = merged(VERIFIED.format(other), own + linear(MEDIA))

    assert left == len(list(inline.iter("Verification")))


@pytest.mark.parametrize(
    "outer", ["", ' xmlns:xs="http://www.w3.org/2001/XMLSchema"', f' xmlns="{IAB}"']
)
@pytest.mark.parametrize("inner", ["", ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'])
def test_equal_verifications_of_unlike_roots(outer: str, inner: str) -> None:
    """What prefixes the roots declare makes no difference between equal Verifications."""
    body = VERIFIED.format(VENDOR.format("v", "r"))
    answer = chained(
        document("Wrapper", body, root=outer), document("InLine", body + linear(MEDIA), root=inner)
    )

    assert 1 == len(list(inline_of(answer).iter("{*}Verification")))


def test_extensions() -> None:
    """Extensions of all levels stand in one Extensions element, each as it was."""
    extension = '<Extension type="t" a="b">x<y z="1"><![CDATA[<&>]]></y></Extension>'
    outer = f"<Extensions>{extension}</Extensions>"
    inline = merged(outer, outer.replace('"t"', '"m"'), f"{outer}{linear(MEDIA)}")
    (all_of_them,) = inline.iter("Extensions")

    assert ["t", "m", "t"] == [each.get("type") for each in all_of_them]
    assert ["<&>"] * 3 == texts(all_of_them, "Extension/y")


def test_creative_extensions() -> None:
    """A wrapper's CreativeExtensions are dropped: they speak of a creative of its own."""
    theirs = (
        "<Creatives><Creative><CreativeExtensions><o/></CreativeExtensions></Creative></Creatives>"
    )
    own = linear(MEDIA).replace(
        "</Linear>", "</Linear><CreativeExtensions><i/></CreativeExtensions>"
    )
    (left,) = merged(theirs, own).iter("CreativeExtensions")

    assert ["i"] == names(left)


@pytest.mark.parametrize(
    ("price", "levels"),
    [("o", "omi"), ("m", " mi"), ("i", "  i"), ("o", "o i"), ("o", "om "), ("o", "o  ")],
)
def test_pricing(price: str, levels: str) -> None:
    """The price of the outermost wrapper that has one replaces all others."""
    told = [
        f"<Pricing>{each}</Pricing>" if each != " " else "<Pricing> </Pricing>" for each in levels
    ]
    told[-1] = told[-1].replace("<Pricing> </Pricing>", "") + linear(MEDIA)

    assert [price] == texts(merged(*told), "Pricing")


def test_blocked_categories() -> None:
    """What a wrapper forbids is no part of the answer."""
    inline = merged("<BlockedAdCategories>IAB1</BlockedAdCategories>", linear(MEDIA))

    assert ["Creatives"] == names(inline)


def test_comments_and_unknown_things() -> None:
    """The InLine keeps what nobody understands: comments, attributes, elements."""
    own = f"<!-- c --><Odd a='b'>x</Odd><?p q?>{linear(MEDIA)}"
    inline = merged("<Impression>o</Impression><Odd>lost</Odd>", own)

    assert ["x"] == texts(inline, "Odd")
    assert b"<!-- c -->" in etree.tostring(inline)
    assert b"<?p q?>" in etree.tostring(inline)


# --- Namespaces ---------------------------------------------------------------------------------

SPACES = {"none": "", "default": f' xmlns="{IAB}"', "prefix": f' xmlns:v="{IAB}"'}


def spaced(text: str, style: str) -> str:
    """Write *text* in the namespace of VAST: as the default, with a prefix, or not at all."""
    text = text.replace("<VAST", "<VAST" + SPACES[style], 1)
    if style != "prefix":
        return text
    return text.replace("</", "\0").replace("<", "<v:").replace("\0", "</v:")


@pytest.mark.parametrize("outer", SPACES)
@pytest.mark.parametrize("inner", SPACES)
def test_namespaces(outer: str, inner: str) -> None:
    """What a wrapper adds moves into the namespace of the InLine."""
    body = "<Impression>{0}</Impression><Extensions><Extension><X>{0}</X></Extension></Extensions>"
    wrapper_ = document("Wrapper", body.format("o") + clicks_of("ClickTracking", "o"))
    inline = document("InLine", body.format("i") + linear(MEDIA))
    answer = chained(spaced(wrapper_, outer), spaced(inline, inner))
    spaces = {etree.QName(each).namespace for each in etree.fromstring(answer).iter()}

    assert {None if inner == "none" else IAB} == spaces
    assert [] == faults(answer)
    assert ["o", "i"] == texts(inline_of(answer), "{*}Extensions/{*}Extension/{*}X")


@pytest.mark.parametrize("outer", SPACES)
def test_foreign_namespaces(outer: str) -> None:
    """A foreign namespace stays, wherever its prefix was declared, also in a second copy."""
    extension = '<Extensions><Extension f:a="1"><f:X/></Extension></Extensions>'
    text = spaced(document("Wrapper", extension).replace("<f:X/>", "<F/>"), outer)
    text = text.replace("<v:F/>", "<f:X/>").replace("<F/>", "<f:X/>")
    text = text.replace("<VAST", '<VAST xmlns:f="urn:f"', 1)
    text = text.replace("<v:VAST", '<v:VAST xmlns:f="urn:f"', 1)
    inline = inline_of(chained(text, document("InLine", linear(MEDIA))))
    (extension_,) = inline.iterfind("Extensions/Extension")

    assert "1" == extension_.get("{urn:f}a")
    assert ["{urn:f}X"] == names(extension_)


# --- Pods ---------------------------------------------------------------------------------------


def test_pod_behind_a_wrapper() -> None:
    """Each ad of a pod gets all that the wrapper brings, and none shares it with another."""
    entry = document("Wrapper", f"<Impression>o</Impression>{clicks_of('ClickTracking', 'o')}")
    entry = entry.replace("<Wrapper>", '<Wrapper allowMultipleAds="true">')
    ads = "".join(f'<Ad sequence="{n}"><InLine>{linear(MEDIA)}</InLine></Ad>' for n in (1, 2, 3))
    answer = chained(entry, f'<VAST version="4.2">{ads}</VAST>')
    found = [
        (texts(each, "Impression"), texts(each, ".//ClickTracking"))
        for each in etree.fromstring(answer).iterfind("Ad/InLine")
    ]

    assert [(["o"], ["o"])] * 3 == found


def test_notes() -> None:
    """A note says what a wrapper gave to an ad, and what of it a rule dropped."""
    own = linear("<VideoClicks><ClickThrough>i</ClickThrough></VideoClicks>")
    theirs = "<AdSystem>S</AdSystem><Impression>o</Impression>" + linear(
        "<MediaFiles/><VideoClicks><ClickThrough>o</ClickThrough></VideoClicks>"
    )
    entry = parse(document("Wrapper", theirs).replace("<Ad>", '<Ad id="w">').encode())
    unwrapper = Unwrapper(entry, ENTRY)
    (want,) = unwrapper.wanted()
    unwrapper.feed(want, parse(document("InLine", own).encode()), "u:next")
    ((note,),) = merge(unwrapper.result())

    assert ("w", "S") == (note.wrapper_id, note.system)
    assert Counter({"Impression": 1}) == +note.taken
    assert Counter({"MediaFiles": 1, "ClickThrough": 1}) == +note.dropped


def test_too_many_trackers() -> None:
    """Trackers times creatives are counted first, and past a limit it is an error."""
    creatives = "<Creative><Linear/></Creative>" * 100
    inner = document("InLine", f"<Creatives>{creatives}</Creatives>")
    event = "<Tracking event='start'>o</Tracking>"

    def outer(count: int) -> str:
        return document("Wrapper", linear(f"<TrackingEvents>{event * count}</TrackingEvents>"))

    too_many = MAX_GROWTH // (99 * len(event)) + 1

    assert 10_000 == len(list(inline_of(chained(outer(100), inner)).iter("Tracking")))
    with pytest.raises(VastSchemaError, match=str(MAX_GROWTH)):
        chained(outer(too_many), inner)


def a_pod(count: int, *, root: str = "") -> str:
    """Write a pod of *count* InLines."""
    ads = "".join(
        f'<Ad sequence="{n}"><InLine>{linear(MEDIA)}</InLine></Ad>' for n in range(1, count + 1)
    )
    return f'<VAST version="4.2">{root}{ads}</VAST>'


def before_a_pod(inside: str) -> str:
    """Write a wrapper that a pod may follow, and that brings what is *inside*."""
    return document("Wrapper", inside).replace("<Wrapper>", '<Wrapper allowMultipleAds="true">')


HUGE = 500_000
"""Bytes of one element: ten of it are beyond MAX_GROWTH, and five are not."""


@pytest.mark.parametrize(
    "inside",
    [
        "<Extensions><Extension>{}</Extension></Extensions>",
        "<Impression>{}</Impression>",
        "<Error>{}</Error>",
    ],
)
def test_one_huge_element(inside: str) -> None:
    """One element is enough: it is weighed by its bytes, times the ads of the pod."""
    entry = before_a_pod(inside.format("x" * HUGE))

    assert 5 * HUGE < len(chained(entry, a_pod(5))) < 6 * HUGE
    with pytest.raises(VastSchemaError, match=str(MAX_GROWTH)):
        chained(entry, a_pod(10))


@pytest.mark.parametrize("at", ["wrapper", "pod"])
def test_huge_root_errors(at: str) -> None:
    """Errors of a root, the wrapper's or the InLines' own, are weighed times the ads too."""
    root = f"<Error>{'x' * HUGE}</Error>"
    entry = before_a_pod("")
    if at == "wrapper":
        entry = entry.replace("<Ad>", f"{root}<Ad>")
    own = root if at == "pod" else ""

    assert 5 == chained(entry, a_pod(5, root=own)).count(b"x" * HUGE)
    with pytest.raises(VastSchemaError, match=str(MAX_GROWTH)):
        chained(entry, a_pod(10, root=own))


def test_entry_alone_is_never_refused() -> None:
    """An entry document without wrappers grows by nothing, whatever stands in its root."""
    root = f"<Error>{'x' * HUGE}</Error>"
    answer = chained(a_pod(50, root=root))

    assert 1 == answer.count(b"x" * HUGE)
    assert 50 == len(etree.fromstring(answer).findall("Ad"))


def test_what_is_refused_is_left_whole() -> None:
    """When a merge is refused, every element is still where it was."""
    inside = f"<Impression>i</Impression><Error>{'x' * HUGE}</Error>{linear(MEDIA)}"
    entry = parse(before_a_pod(inside).encode())
    pod = parse(a_pod(10, root="<Error>root</Error>").encode())
    unwrapper = Unwrapper(entry, ENTRY)
    (want,) = unwrapper.wanted()
    unwrapper.feed(want, pod, want.url)
    before = [etree.tostring(each.root) for each in (entry, pod)]
    with pytest.raises(VastSchemaError):
        merge(unwrapper.result())

    assert before == [etree.tostring(each.root) for each in (entry, pod)]


def test_large_pod_of_wrappers_is_no_growth() -> None:
    """Wrappers of one large document that lead to an ad each are moved, and refused for nothing."""
    trackers = "<Tracking event='start'>o</Tracking>" * 300
    events = linear(f"<TrackingEvents>{trackers}</TrackingEvents>")
    ads = "".join(
        f'<Ad sequence="{n}"><Wrapper>{events}<VASTAdTagURI>u:{n}</VASTAdTagURI></Wrapper></Ad>'
        for n in range(1, 31)
    )
    entry = f'<VAST version="4.2">{ads}</VAST>'.encode()
    inner = document("InLine", linear(MEDIA)).encode()
    answer = etree.fromstring(written(unwrapped(entry, ENTRY, lambda url: (inner, url))))

    assert MAX_GROWTH < len(entry) * 29
    assert [300] * 30 == [len(list(ad.iter("Tracking"))) for ad in answer.iterfind("Ad")]


def test_base() -> None:
    """The answer's root is that of the newest InLine."""
    ads = "".join(
        f'<Ad sequence="{n}"><Wrapper><VASTAdTagURI>u:{n}</VASTAdTagURI></Wrapper></Ad>'
        for n in (1, 2)
    )
    result = unwrapped(
        f"<VAST>{ads}</VAST>".encode(),
        ENTRY,
        lambda url: (
            document("InLine", linear(), version={"u:1": "4.1", "u:2": "4.2"}[url]).encode(),
            url,
        ),
    )

    assert (4, 2) == base_of(result).version


# --- What holds for any tree --------------------------------------------------------------------


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_conservation(seed: int) -> None:
    """What goes in comes out, ad by ad, as often as it went in, but for the documented losers."""
    tree = grow(seed, SERVER)
    fetch = served(tree.pages, SERVER)
    entry = fetch(SERVER + tree.entry)
    assert entry is not None
    result = unwrapped(entry[0], entry[1], fetch)

    assert len(tree.ads) == len(result.ads)
    assert not tree.ads or [] == misfits(tree, written(result))


@given(st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_idempotence(seed: int) -> None:
    """Resolving what is resolved changes nothing."""
    tree = grow(seed, SERVER)
    fetch = served(tree.pages, SERVER)
    entry = fetch(SERVER + tree.entry)
    assert entry is not None
    result = unwrapped(entry[0], entry[1], fetch)
    if len(result.ads) != 1 and not any(ad.sequence for ad in result.ads):
        return  # of a buffet only the first is wanted
    once = written(result)

    assert once == written(unwrapped(once, ENTRY, fetch))


@given(chains())
@settings(max_examples=200, deadline=None)
def test_two_proxies_are_one(chain: Chain) -> None:
    """Wherever a chain is cut between two proxies, the answer says the same in the same order."""
    whole = chained(*chain.documents)
    for cut in range(1, len(chain.documents)):
        inner = chained(*chain.documents[cut:])

        assert _told(whole) == _told(chained(*chain.documents[:cut], inner))


def _told(answer: bytes) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Tell each element with its attributes and text; prefixes do not count."""
    return [
        (etree.QName(each).localname, sorted(dict(each.attrib).items()), text_of(each))
        for each in etree.fromstring(answer).iter(etree.Element)
    ]
