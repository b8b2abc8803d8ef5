"""Small VAST documents for tests that care for something else than VAST."""

from collections.abc import Sequence

INLINE = """<InLine><AdSystem>S</AdSystem><AdTitle>T</AdTitle>{trackers}<Creatives><Creative>
<Linear><Duration>00:00:10</Duration><MediaFiles><MediaFile delivery="progressive" type="video/mp4"
 width="640" height="360"><![CDATA[{media}]]></MediaFile></MediaFiles></Linear></Creative>
</Creatives></InLine>"""

WRAPPER = """<Wrapper><AdSystem>S</AdSystem><VASTAdTagURI><![CDATA[{url}]]></VASTAdTagURI>{trackers}
<Creatives/></Wrapper>"""


def an_inline(
    *, impressions: Sequence[str] = (), media: str = "https://cdn.example/a.mp4", ad: str = "ad"
) -> bytes:
    """Build a document with one InLine."""
    body = INLINE.format(trackers=_trackers("Impression", impressions), media=media)
    return _document(ad, body)


def a_wrapper(
    url: str, *, impressions: Sequence[str] = (), errors: Sequence[str] = (), ad: str = "wrapper"
) -> bytes:
    """Build a document with one Wrapper that leads to *url*."""
    trackers = _trackers("Error", errors) + _trackers("Impression", impressions)
    return _document(ad, WRAPPER.format(url=url, trackers=trackers))


def _trackers(name: str, urls: Sequence[str]) -> str:
    return "".join(f"<{name}><![CDATA[{url}]]></{name}>" for url in urls)


def _document(ad: str, body: str) -> bytes:
    return f'<VAST version="3.0"><Ad id="{ad}">{body}</Ad></VAST>'.encode()
