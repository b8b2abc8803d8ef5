"""
Three small ad servers on loopback, which make a chain worth looking at.

The exchange answers a wrapper and sets a cookie; the reseller answers a wrapper that allows a
pod; the advertiser answers a pod of two, of which the second is a wrapper once more. What the
exchange set comes back to its host, and to no other: the reseller is asked by another name.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

from aiohttp import web

EXCHANGE = "http://127.0.0.1:9101"
RESELLER = "http://localhost:9102"
ADVERTISER = "http://127.0.0.1:9103"

_EVENTS = ("start", "firstQuartile", "midpoint", "thirdQuartile", "complete")


def _trackers(base: str) -> str:
    return "".join(
        f'<Tracking event="{event}"><![CDATA[{base}/track?event={event}&cb=[CACHEBUSTING]]]>'
        "</Tracking>"
        for event in _EVENTS
    )


def wrapper(base: str, ad_id: str, name: str, target: str, attributes: str = "") -> str:
    """Write the ``<Ad>`` of a wrapper by the ad server *name* at *base* that leads to *target*."""
    return f"""
  <Ad id="{ad_id}"{attributes}>
    <Wrapper followAdditionalWrappers="true" allowMultipleAds="true">
      <AdSystem version="1.0">{name}</AdSystem>
      <Error><![CDATA[{base}/error?code=[ERRORCODE]]]></Error>
      <Impression><![CDATA[{base}/impression?cor=[CORRELATOR]]]></Impression>
      <Creatives><Creative><Linear>
        <TrackingEvents>{_trackers(base)}</TrackingEvents>
        <VideoClicks><ClickTracking><![CDATA[{base}/click]]></ClickTracking></VideoClicks>
      </Linear></Creative></Creatives>
      <VASTAdTagURI><![CDATA[{target}]]></VASTAdTagURI>
    </Wrapper>
  </Ad>"""


def inline(base: str, ad_id: str, title: str, attributes: str = "") -> str:
    """Write the ``<Ad>`` of an InLine called *title*."""
    return f"""
  <Ad id="{ad_id}"{attributes}>
    <InLine>
      <AdSystem version="1.0">Advertiser</AdSystem>
      <Error><![CDATA[{base}/error?code=[ERRORCODE]]]></Error>
      <Impression><![CDATA[{base}/impression?ad={ad_id}]]></Impression>
      <AdServingId>vastproxy-demo-{ad_id}</AdServingId>
      <AdTitle>{title}</AdTitle>
      <Creatives><Creative id="{ad_id}-c">
        <UniversalAdId idRegistry="demo">{ad_id}</UniversalAdId>
        <Linear>
          <TrackingEvents>{_trackers(base)}</TrackingEvents>
          <Duration>00:00:15</Duration>
          <MediaFiles>
            <MediaFile delivery="progressive" type="video/mp4" width="1280" height="720"><![CDATA[
              {base}/media/{ad_id}.mp4?t=[TIMESTAMP]
            ]]></MediaFile>
          </MediaFiles>
          <VideoClicks>
            <ClickThrough><![CDATA[https://example.com/{ad_id}]]></ClickThrough>
          </VideoClicks>
        </Linear>
      </Creative></Creatives>
    </InLine>
  </Ad>"""


def _document(*ads: str) -> web.Response:
    body = '<VAST version="4.2" xmlns="http://www.iab.com/VAST">' + "".join(ads) + "\n</VAST>\n"
    return web.Response(text=body, content_type="application/xml")


def exchange() -> web.Application:
    """Make the first ad server: it knows viewers by its cookie."""
    viewers = count(1)

    async def vast(request: web.Request) -> web.Response:
        target = f"{RESELLER}/vast?cor=[CORRELATOR]&cb=[CACHEBUSTING]&ip=[DEVICEIP]"
        response = _document(wrapper(EXCHANGE, "exchange-1", "Exchange", target))
        if "uid" not in request.cookies:
            response.set_cookie("uid", f"viewer-{next(viewers)}", path="/")
        return response

    async def last(request: web.Request) -> web.Response:
        known = request.cookies.get("uid", "somebody unknown")
        return _document(inline(EXCHANGE, "exchange-2", f"An ad for {known}"))

    app = web.Application()
    app.router.add_get("/vast", vast)
    app.router.add_get("/last", last)
    return app


def reseller() -> web.Application:
    """Make the second ad server, on another host: it sets a cookie of its own."""

    async def vast(_: web.Request) -> web.Response:
        target = f"{ADVERTISER}/pod?cor=[CORRELATOR]&ts=[TIMESTAMP]"
        response = _document(wrapper(RESELLER, "reseller-1", "Reseller", target))
        response.set_cookie("seen", "1", path="/")
        return response

    app = web.Application()
    app.router.add_get("/vast", vast)
    return app


def advertiser() -> web.Application:
    """Make the third ad server: a pod, and a house ad."""

    async def pod(_: web.Request) -> web.Response:
        return _document(
            inline(ADVERTISER, "advertiser-1", "The first of the pod", ' sequence="1"'),
            wrapper(
                ADVERTISER,
                "advertiser-2",
                "Advertiser",
                f"{EXCHANGE}/last?cor=[CORRELATOR]",
                ' sequence="2"',
            ),
        )

    async def house(_: web.Request) -> web.Response:
        return _document(inline(ADVERTISER, "house-1", "The house's own"))

    app = web.Application()
    app.router.add_get("/pod", pod)
    app.router.add_get("/house", house)
    return app


@asynccontextmanager
async def ad_servers() -> AsyncIterator[None]:
    """Serve all three, on loopback only. Raises OSError where a port is taken."""
    async with AsyncExitStack() as stack:
        for app, port in ((exchange(), 9101), (reseller(), 9102), (advertiser(), 9103)):
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
