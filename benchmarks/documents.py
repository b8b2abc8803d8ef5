"""
The chain that every program resolves: two wrappers and an InLine ad of a chosen size.

The elements are those of VAST 3.0. What fills a document up to its size is what fills it in the
field: tracking events with long URLs in CDATA, macros among their parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

KILOBYTE = 1_000
"""Bytes."""
SMALLEST = 2
"""Kilobytes that each document of a chain can have at least: the InLine's own elements take 1.8."""
LEVELS = ("first", "second", "third")
"""The hops of a chain, outermost first."""

_EVENTS = (
    "creativeView",
    "start",
    "firstQuartile",
    "midpoint",
    "thirdQuartile",
    "complete",
    "mute",
    "unmute",
    "pause",
    "resume",
    "fullscreen",
    "closeLinear",
)
_FILLER = "9f3b2c71d80e4a65"

_WRAPPER = """\
<?xml version="1.0" encoding="UTF-8"?>
<VAST version="3.0">
  <Ad id="{level}-1001">
    <Wrapper>
      <AdSystem version="2.1">{level} exchange</AdSystem>
      <VASTAdTagURI><![CDATA[{tag}]]></VASTAdTagURI>
      <Error><![CDATA[{error}]]></Error>
      <Impression id="{level}"><![CDATA[{impression}]]></Impression>
      <Creatives>
        <Creative AdID="{level}-c1">
          <Linear>
            <TrackingEvents>
{events}            </TrackingEvents>
            <VideoClicks>
              <ClickTracking><![CDATA[https://{level}.ads.example/click?cb=[CACHEBUSTING]]]></ClickTracking>
            </VideoClicks>
          </Linear>
        </Creative>
      </Creatives>
    </Wrapper>
  </Ad>
</VAST>
"""

_INLINE = """\
<?xml version="1.0" encoding="UTF-8"?>
<VAST version="3.0">
  <Ad id="{level}-1001">
    <InLine>
      <AdSystem version="2.1">{level} server</AdSystem>
      <AdTitle>Thirty seconds</AdTitle>
      <Error><![CDATA[{error}]]></Error>
      <Impression id="{level}"><![CDATA[{impression}]]></Impression>
      <Creatives>
        <Creative id="c7" sequence="1" AdID="{level}-c1">
          <Linear skipoffset="00:00:05">
            <Duration>00:00:30</Duration>
            <TrackingEvents>
{events}            </TrackingEvents>
            <VideoClicks>
              <ClickThrough><![CDATA[https://shop.example/spring?c=7]]></ClickThrough>
              <ClickTracking><![CDATA[https://{level}.ads.example/click?cb=[CACHEBUSTING]]]></ClickTracking>
            </VideoClicks>
            <MediaFiles>
              <MediaFile delivery="progressive" type="video/mp4" width="640" height="360" \
bitrate="800"><![CDATA[https://cdn.example/c7/360.mp4]]></MediaFile>
              <MediaFile delivery="progressive" type="video/mp4" width="1920" height="1080" \
bitrate="4500"><![CDATA[https://cdn.example/c7/1080.mp4]]></MediaFile>
            </MediaFiles>
          </Linear>
        </Creative>
      </Creatives>
    </InLine>
  </Ad>
</VAST>
"""


@dataclass(frozen=True, slots=True)
class Document:
    """One hop's answer: *body* in UTF-8, and the *cookie* it sets, as ``Set-Cookie`` has it."""

    body: bytes
    cookie: str = ""


def chain(size: int, addresses: tuple[str, str, str]) -> tuple[Document, Document, Document]:
    """
    Build the three documents, each of *size* bytes.

    *addresses* are the URLs that the documents are fetched from, first to third. The first two
    hops set a cookie each.
    """
    first, second, third = LEVELS
    return (
        Document(_wrapper(first, size, addresses[0], addresses[1]), _cookie(first)),
        Document(_wrapper(second, size, addresses[1], addresses[2]), _cookie(second)),
        Document(_inline(third, size, addresses[2])),
    )


def impression_prefix(level: str) -> str:
    """Give how the impression URL of *level* begins: what an answer is recognised by."""
    return f"https://{level}.ads.example/imp?"


def _cookie(level: str) -> str:
    return f"{level}_uid={_FILLER}; Path=/; Max-Age=86400; HttpOnly"


def _wrapper(level: str, size: int, own: str, following: str) -> bytes:
    tag = f"{following}?slot=preroll&cb=[CACHEBUSTING]&w=640&h=360"

    def render(events: str, context: str) -> str:
        parts = _parts(level, own, context)
        return _WRAPPER.format(events=events, tag=tag, level=level, **parts)

    return _sized(render, level, size)


def _inline(level: str, size: int, own: str) -> bytes:
    def render(events: str, context: str) -> str:
        return _INLINE.format(events=events, level=level, **_parts(level, own, context))

    return _sized(render, level, size)


def _parts(level: str, own: str, context: str) -> dict[str, str]:
    # Error URIs stay on loopback: a program that reports one reaches nobody.
    return {
        "error": f"{own}/error?code=[ERRORCODE]",
        "impression": f"{impression_prefix(level)}id=1001&cb=[CACHEBUSTING]&ctx={context}",
    }


def _sized(render: Callable[[str, str], str], level: str, size: int) -> bytes:
    """Render with as many tracking events as fit into *size* bytes, and fill up what is left."""
    if len(render("", "")) > size:
        raise ValueError(f"a document has {len(render('', ''))} bytes at least, {size} asked for")
    room = size - len(render("", ""))
    lines: list[str] = []
    for line in _tracking(level):
        if len(line) > room:
            break
        lines.append(line)
        room -= len(line)
    context = "".join(islice(cycle(_FILLER), room))
    return render("".join(lines), context).encode()


def _tracking(level: str) -> Iterator[str]:
    for number, event in enumerate(cycle(_EVENTS)):
        url = (
            f"https://{level}.ads.example/track?event={event}&n={number}&cb=[CACHEBUSTING]"
            f"&ts=[TIMESTAMP]&creative=c7&line=88213&sig={_FILLER}"
        )
        yield f'              <Tracking event="{event}"><![CDATA[{url}]]></Tracking>\n'
