"""
What hypothesis draws for the tests of the core: bytes that are nearly documents, and chains.

Rule 1: what is drawn is small, so that a failing example can be read.
Rule 2: no two trackers of a chain are equal unless they are drawn to be.
"""

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.support.vast_facts import IAB

HOSTILE = (
    *(b"<![CDATA[", b"]]>", b"<!--", b"-->", b"<?x", b"?>", b"<!DOCTYPE a [", b"<!ENTITY a 'b'>"),
    *(b"&", b"&amp;", b"&a;", b"&nbsp;", b"&#0;", b"&#x110000;", b"&#55296;", b"&LT;", b"&QUOT;"),
    *(b"\0", b"\x01", b"\x0b", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
    *(b"</VAST>", b"<VAST>", b"<VAST", b"</vmap:VAST >", b"<Ad>", b"</Ad>", b"/>", b">", b"<"),
    *(b" a:b='c' ", b"<a:b>", b" xmlns:a=''", b" xmlns='u'", b" xml:space='preserve'", b"'", b'"'),
    *(b"\xe2\x80\xa8", b"\xef\xbf\xbf", b"\xf0\x9f\x98\x80", "é".encode("latin-1"), b"\r\n"),
    *(b"<?xml version='1.0' encoding='shift_jis'?>", b"<?xml version='1.1'?>", b"\x85", b"\x1b$B"),
)
"""Snippets that mean something to a parser of XML."""

AN_INLINE = b"""<?xml version="1.0" encoding="UTF-8"?>
<VAST version="4.2" xmlns="http://www.iab.com/VAST"><Ad id="a"><InLine><AdSystem>s</AdSystem>
<Impression id="i"><![CDATA[https://t.example/i?a=1&b=[CACHEBUSTING]]]></Impression>
<Creatives><Creative><Linear><TrackingEvents>
<Tracking event="start">https://t.example/?a&amp;b</Tracking>
</TrackingEvents></Linear></Creative></Creatives><!-- a remark --></InLine></Ad></VAST>"""

A_POD = b"""<VAST version="3.0"><Ad sequence="1"><Wrapper allowMultipleAds="true">
<VASTAdTagURI>https://t.example/a?b&c</VASTAdTagURI></Wrapper></Ad><Ad/></VAST>"""

DOCUMENTS = (
    AN_INLINE,
    A_POD,
    '<?xml version="1.0" encoding="UTF-16"?><VAST><Error>é</Error></VAST>'.encode("utf-16"),
    b"<VAST xsi:type='t'><Error>&eacute;</Error></VAST> and more",
    b'<VideoAdServingTemplate version="1.0"><Ad/></VideoAdServingTemplate>',
)
"""What mutations begin with: some are well-formed, others need a repair."""


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a document that was cut, doubled, flipped, or had something put into it."""
    data = draw(st.sampled_from(DOCUMENTS))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 60)))
        how = draw(st.sampled_from(("cut", "double", "flip", "insert", "insert", "end")))
        inside = {
            "cut": b"",
            "double": data[start:end] * 2,
            "flip": bytes(each ^ 0x20 for each in data[start:end]),
            "insert": draw(st.sampled_from(HOSTILE)) + data[start:end],
            "end": data[start:end],
        }[how]
        data = data[:start] + inside + (b"" if how == "end" else data[end:])
    return data


@dataclass(frozen=True)
class Chain:
    """Documents that lead to each other: wrappers, outermost first, and the InLine."""

    documents: tuple[str, ...]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Draw a chain of one to four wrappers of any versions before an InLine."""
    count = draw(st.integers(1, 4))
    levels = [_level(draw, f"w{number}", wrapper=True) for number in range(count)]
    return Chain((*levels, _level(draw, "i", wrapper=False)))


def _level(draw: st.DrawFn, name: str, *, wrapper: bool) -> str:
    version = draw(st.sampled_from(("2.0", "3.0", "4.0", "4.1", "4.2", "4.3")))
    spaced = version >= "4.0" and draw(st.booleans())
    body = _body(draw, name, wrapper=wrapper)
    kind = "Wrapper" if wrapper else "InLine"
    tag = f"<VASTAdTagURI>u:{name}</VASTAdTagURI>" if wrapper else "<AdTitle>t</AdTitle>"
    start = f'<VAST version="{version}"' + (f' xmlns="{IAB}">' if spaced else ">")
    root = _several(draw, f"{name}/root", "<Error>{}</Error>")
    return f'{start}{root}<Ad id="{name}"><{kind}>{tag}{body}</{kind}></Ad></VAST>'


def _body(draw: st.DrawFn, name: str, *, wrapper: bool) -> str:
    parts = [
        _several(draw, f"{name}/imp", "<Impression>{}</Impression>"),
        _several(draw, f"{name}/err", "<Error>{}</Error>"),
        _optional(draw, f'<Pricing model="CPM" currency="USD">{len(name)}.5</Pricing>'),
        _optional(draw, f"<ViewableImpression><Viewable>{name}/v</Viewable></ViewableImpression>"),
        _optional(draw, f'<Extensions><Extension type="t"><X>{name}</X></Extension></Extensions>'),
        _verifications(draw, name),
    ]
    creatives = [_linear(draw, name, wrapper=wrapper), _companions(draw, name, wrapper=wrapper)]
    inside = "".join(f"<Creative>{each}</Creative>" for each in creatives if each)
    return "".join(parts) + f"<Creatives>{inside}</Creatives>"


def _several(draw: st.DrawFn, name: str, form: str) -> str:
    return "".join(form.format(f"{name}/{n}") for n in range(draw(st.integers(0, 2))))


def _optional(draw: st.DrawFn, text: str) -> str:
    return text if draw(st.booleans()) else ""


def _verifications(draw: st.DrawFn, name: str) -> str:
    drawn = draw(st.sets(st.sampled_from(("shared", name)), max_size=2))
    inside = "".join(f'<Verification vendor="{each}"/>' for each in sorted(drawn))
    return f"<AdVerifications>{inside}</AdVerifications>" if inside else ""


def _linear(draw: st.DrawFn, name: str, *, wrapper: bool) -> str:
    if wrapper and not draw(st.booleans()):
        return ""
    programs = draw(st.sets(st.sampled_from(("p", "q")), max_size=2))
    icons = "".join(f'<Icon program="{each}"><X>{name}</X></Icon>' for each in sorted(programs))
    events = _several(draw, f"{name}/start", '<Tracking event="start">{}</Tracking>')
    clicks = _several(draw, f"{name}/click", "<ClickTracking>{}</ClickTracking>")
    clicks += _optional(draw, f"<ClickThrough>{name}/landing</ClickThrough>")
    inside = f"<Icons>{icons}</Icons>" if icons else ""
    inside += f"<TrackingEvents>{events}</TrackingEvents>" if events else ""
    inside += "" if wrapper else "<Duration>00:00:30</Duration>"
    return f"<Linear>{inside}" + (f"<VideoClicks>{clicks}</VideoClicks></Linear>")


def _companions(draw: st.DrawFn, name: str, *, wrapper: bool) -> str:
    inside = ""
    for size in sorted(draw(st.sets(st.integers(1, 3), max_size=2))):
        bare = wrapper and draw(st.booleans())
        resource = "" if bare else f"<IFrameResource>{name}/{size}</IFrameResource>"
        click = f"<CompanionClickTracking>{name}/c{size}</CompanionClickTracking>"
        inside += f'<Companion width="{size}" height="{size}">{resource}{click}</Companion>'
    return f"<CompanionAds>{inside}</CompanionAds>" if inside else ""
