"""
The player's side of the proxy: one handler, which finds the route and answers.

This is one of the three places that catch every exception: whatever goes wrong inside, a player
gets 200 and an empty VAST, and the log gets the traceback.
"""

import asyncio
from dataclasses import dataclass
from http import HTTPMethod
from time import perf_counter

import structlog
from aiohttp import web

from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.routing import Route, Router
from vastproxy.model import AdResponse
from vastproxy.session.context import new_request_id
from vastproxy.vast.serialise import empty
from vastproxy.web.handlers import (
    Networks,
    ad_request,
    answered,
    cors,
    preflight,
    raw_path,
    refused,
)


@dataclass(frozen=True, slots=True)
class PlayerSettings:
    """What config.yaml says about the player's side."""

    trusted_proxies: Networks = ()
    max_in_flight: int = 2000


class Player:
    """
    Answers players.

    *ads* answers ad requests, *router* finds their routes.
    """

    def __init__(self, ads: AdServer, router: Router, settings: PlayerSettings) -> None:
        self._ads = ads
        self._router = router
        self._settings = settings
        self._log = structlog.get_logger("vastproxy.access")
        self.in_flight = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one HTTP request."""
        path = raw_path(request)
        match = self._router.find(path)
        if match is None:
            return refused(request, 404, "no route has this path")
        if request.method == HTTPMethod.OPTIONS:
            return preflight(request)
        if request.method == HTTPMethod.HEAD:
            # An ad request is not free: a monitor that only looks must not cause one.
            return web.Response(headers=cors(request), content_type="application/xml")
        if request.method != HTTPMethod.GET:
            return refused(request, 405, "ads are asked for with GET")
        return await self._answer(request, *match)

    async def _answer(self, request: web.BaseRequest, route: Route, rest: str) -> web.Response:
        began = perf_counter()
        received = asyncio.get_running_loop().time()
        self.in_flight += 1
        try:
            if self.in_flight > self._settings.max_in_flight:
                response = AdResponse(empty(), new_request_id(), flags=("no_ad", "overload"))
            else:
                trusted = self._settings.trusted_proxies
                asked = ad_request(request, route.path, rest, trusted=trusted, received=received)
                response = await self._ads.answer(route, asked)
        except Exception:  # noqa: BLE001 - the player gets an empty VAST, whatever it was
            response = AdResponse(empty(), new_request_id(), flags=("no_ad", "internal_error"))
            self._log.exception("request.failed", request_id=response.request_id, route=route.path)
        finally:
            self.in_flight -= 1
        took = perf_counter() - began
        self._log.info(
            "request",
            request_id=response.request_id,
            route=route.path,
            upstream=response.upstream,
            ads=response.ads,
            hops=response.hops,
            flags=response.flags,
            status=200,
            bytes=len(response.body),
            ms=round(took * 1000, 1),
        )
        return answered(request, response, took)

    def __repr__(self) -> str:
        return f"<Player in flight: {self.in_flight}>"
