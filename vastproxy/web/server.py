"""
The player's side of the proxy: one handler, which finds the route and answers.

This is one of the three places that catch every exception: whatever goes wrong inside, a player
gets 200 and an empty VAST, and the log gets the traceback.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPMethod
from time import perf_counter
from typing import Final, Literal

import structlog
from aiohttp import web

from vastproxy.flow.ad_server import AdServer
from vastproxy.flow.beacons import PATH
from vastproxy.flow.routing import Route, Router
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.metrics import BeaconResult, Outcome, RequestMetrics
from vastproxy.observe.tasks import Tasks
from vastproxy.session.context import new_request_id
from vastproxy.vast.serialise import empty
from vastproxy.web.handlers import (
    Networks,
    ad_request,
    answered,
    beacon_answer,
    cors,
    preflight,
    public_base,
    raw_path,
    refused,
)

REFUSALS: Final[Mapping[str, tuple[Literal["cap", "budget"], str]]] = {
    "capped": ("cap", "enforce"),
    "shadow_capped": ("cap", "shadow"),
    "over_budget": ("budget", "enforce"),
    "shadow_over_budget": ("budget", "shadow"),
}
"""What flags say of caps and budgets, for the metrics."""


@dataclass(frozen=True, slots=True)
class PlayerSettings:
    """What config.yaml says about the player's side."""

    trusted_proxies: Networks = ()
    max_in_flight: int = 2000
    public_url: str = ""
    """Where players reach the proxy; empty: as each request came in."""


class Player:
    """
    Answers players.

    *ads* answers ad requests, *router* finds their routes, *metrics* counts them; *tasks* owns what
    goes on when a player has gone.
    """

    def __init__(
        self,
        ads: AdServer,
        router: Router,
        settings: PlayerSettings,
        metrics: RequestMetrics | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        self._tasks = Tasks("beacons") if tasks is None else tasks
        self._ads = ads
        self._router = router
        self._settings = settings
        self._metrics = RequestMetrics() if metrics is None else metrics
        self._log = structlog.get_logger("vastproxy.access")
        self.in_flight = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one HTTP request."""
        path = raw_path(request)
        if path.startswith(PATH):
            return await self._beacon(request, path.removeprefix(PATH))
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

    async def _beacon(self, request: web.BaseRequest, token: str) -> web.Response:
        """Count an ad that was shown; whatever happens, the player is not kept waiting."""
        if request.method == HTTPMethod.OPTIONS:
            return preflight(request)
        if request.method == HTTPMethod.HEAD:
            return beacon_answer(request, token, 204)
        if request.method != HTTPMethod.GET:
            return refused(request, 405, "beacons are sent with GET")
        try:
            # Players send them as they close, and do not wait: they count all the same.
            result = await self._tasks.finish(self._taken(token), "beacon")
        except Exception:  # noqa: BLE001 - a mistake of ours is none of the player's
            self._log.exception("beacon.failed")
            return beacon_answer(request, token, 204)
        return beacon_answer(request, token, 403 if result == "forged" else 204)

    async def _taken(self, token: str) -> BeaconResult:
        """Count what *token* says, and that it came."""
        beacons = self._ads.beacons
        result = await beacons.take(token) if beacons else "forged"
        self._metrics.beacon(result)
        self._log.debug("beacon", result=result)
        return result

    async def _answer(self, request: web.BaseRequest, route: Route, rest: str) -> web.Response:
        began = perf_counter()
        received = asyncio.get_running_loop().time()
        self.in_flight += 1
        try:
            if self.in_flight > self._settings.max_in_flight:
                self._metrics.overloaded()
                response = AdResponse(empty(), new_request_id(), flags=("no_ad", "overload"))
            else:
                asked = self._read(request, route, rest, received)
                response = await self._ads.answer(route, asked)
        except asyncio.CancelledError:
            self._gone(route, perf_counter() - began)
            raise
        except Exception:  # noqa: BLE001 - the player gets an empty VAST, whatever it was
            response = AdResponse(empty(), new_request_id(), flags=("no_ad", "internal_error"))
            self._log.exception("request.failed", request_id=response.request_id, route=route.path)
        finally:
            self.in_flight -= 1
        took = perf_counter() - began
        self._metrics.answered(route.path, _outcome(response), response.ads, took)
        for choice in response.choices:
            self._metrics.chosen(choice)
        for each in response.flags:
            if each in REFUSALS:
                self._metrics.capped(route.path, *REFUSALS[each])
        self._log.info(
            "request",
            request_id=response.request_id,
            route=route.path,
            upstream=response.upstream,
            ads=response.ads,
            hops=response.hops,
            flags=response.flags,
            **_further(response),
            status=200,
            bytes=len(response.body),
            ms=round(took * 1000, 1),
        )
        return answered(request, response, took)

    def _gone(self, route: Route, took: float) -> None:
        """Take note of a player that went away before the answer: there is none."""
        self._metrics.answered(route.path, "gone", 0, took)
        ms = round(took * 1000, 1)
        self._log.info("request", route=route.path, ads=0, flags=("gone",), status=None, ms=ms)

    def _read(
        self, request: web.BaseRequest, route: Route, rest: str, received: float
    ) -> AdRequest:
        """Read what the flow needs; where the player reached us, only beacons need."""
        settings = self._settings
        asked = ad_request(
            request, route.path, rest, trusted=settings.trusted_proxies, received=received
        )
        if not route.terms:
            return asked
        base = settings.public_url or public_base(request, settings.trusted_proxies)
        return replace(asked, base=base)

    def __repr__(self) -> str:
        return f"<Player in flight: {self.in_flight}>"


def _further(response: AdResponse) -> dict[str, tuple[str, ...]]:
    """Give the fields of the access line that most requests do not have."""
    fields = {
        "refused": response.refused,
        "waterfall": response.waterfall,
        "breaker": response.breaker,
        "cache": response.cache,
    }
    return {name: told for name, told in fields.items() if told}


def _outcome(response: AdResponse) -> Outcome:
    if response.ads:
        return "ad"
    return "error" if "internal_error" in response.flags else "no_ad"
