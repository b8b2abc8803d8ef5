"""
The operator's questions about upstreams, as JSON, and their breakers by hand.

Rule 1: what is told is read at the moment, from whom it concerns.
Rule 2: a breaker is turned by an operator, never by a page that is open in the operator's browser.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, TypeGuard
from urllib.parse import parse_qsl, urlsplit

import structlog
from aiohttp import web

from vastproxy.model import clean
from vastproxy.web.pictures import Picture, is_troubled

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Turn = Literal["open", "closed", "reset"]
"""What a breaker can be turned to. ``reset``: closed, and all that was counted is forgotten."""

TURNS: Final = ("open", "closed", "reset")
MAX_REASON: Final = 200
"""Characters of an operator's reason: it stands in log lines and answers."""
BY_HAND: Final = "by hand"
"""The reason of an operator who gives none."""
HOW: Final = 'write {"state": "open"}, "closed" or "reset", and a "reason" if you like'


class Guarding(Protocol):
    """Who has the breakers of this process."""

    def told(self) -> Mapping[str, Sequence[Picture]]:
        """Say how ``upstreams`` and ``hosts`` are."""

    def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
        """Turn the breaker of an upstream; None: no such one. ValueError: it has no breaker."""


class Upstreams(Protocol):
    """Who can tell of upstreams, here or in other processes."""

    async def told(self) -> Picture:
        """Say how ``upstreams`` and ``hosts`` are. Raises TimeoutError where nobody answers."""

    async def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
        """
        Turn the breaker of the upstream called *name*, and say how it is now; None: no such one.

        Raises ValueError where it has no breaker, and TimeoutError where nobody answers.
        """


class OwnUpstreams:
    """Those of this process, which *guards* guards."""

    def __init__(self, guards: Guarding) -> None:
        self._guards = guards

    async def told(self) -> Picture:
        """Say how they are."""
        return dict(self._guards.told())

    async def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
        """Turn the breaker of one."""
        return self._guards.turn(name, to, reason)

    def __repr__(self) -> str:
        return f"<OwnUpstreams {self._guards!r}>"


def add_upstreams(app: web.Application, upstreams: Upstreams) -> None:
    """Add ``/api/upstreams`` to *app*, and what is below it."""

    async def every(request: web.Request) -> web.Response:
        told = await upstreams.told()
        if request.query.get("all", "0") == "0":
            told["hosts"] = [each for each in told["hosts"] if is_troubled(each)]
        return web.json_response(told)

    async def one(request: web.Request) -> web.Response:
        told = await upstreams.told()
        name = request.match_info["name"]
        for each in told["upstreams"]:
            if each["name"] == name:
                return web.json_response({**each, **_silent(told)})
        return _unknown(name, told)

    async def turn(request: web.Request) -> web.Response:
        return await _turn(upstreams, request)

    app.router.add_get("/api/upstreams", _told(every))
    app.router.add_get("/api/upstreams/{name}", _told(one))
    app.router.add_post("/api/upstreams/{name}/breaker", _told(turn))


def _told(handler: Handler) -> Handler:
    """Answer 503 where nobody can tell."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except TimeoutError as error:
            return _error(503, str(error))

    return answer


async def _turn(upstreams: Upstreams, request: web.Request) -> web.Response:
    if _is_foreign(request):
        return _error(403, "pages of other sites turn no breaker")
    asked = _read(request.query_string, await request.read())
    if isinstance(asked, str):
        return _error(400, asked)
    name = request.match_info["name"]
    try:
        found = await upstreams.turn(name, *asked)
    except ValueError as error:
        return _error(409, str(error))
    if found is None:
        return _unknown(name, await upstreams.told())
    log = structlog.get_logger("vastproxy.admin")
    log.warning("breaker.by_hand", upstream=name, state=asked[0], reason=asked[1])
    return web.json_response(found)


def _is_foreign(request: web.Request) -> bool:
    """
    Whether a page of another site has the operator's browser send this.

    Browsers send a form anywhere without asking first, but say whose page it is on: Fetch
    Standard, section 3.1 (``Origin``). curl does not send it.
    """
    origin = request.headers.get("Origin")
    return origin is not None and _place(origin) != request.headers.get("Host", "")


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _read(query: str, body: bytes) -> tuple[Turn, str] | str:
    """Read what to turn to, and why, from a query or a body; or say what is wrong with them."""
    text = body.decode("utf-8", "replace").strip()
    try:
        written = json.loads(text) if text.startswith("{") else dict(_pairs(text))
    except (ValueError, RecursionError):
        return f"the body is no JSON ({HOW})"
    asked: dict[str, Any] = {**dict(_pairs(query)), **written}
    if unknown := asked.keys() - {"state", "reason"}:
        return f"unknown: {_shown(', '.join(sorted(unknown)))} ({HOW})"
    state, reason = asked.get("state"), asked.get("reason", "")
    if not _is_turn(state):
        return f"a breaker cannot be turned to {_shown(repr(state))} ({HOW})"
    if not isinstance(reason, str):
        return f"the reason is no text ({HOW})"
    return state, _shown(reason) or BY_HAND


def _pairs(text: str) -> list[tuple[str, str]]:
    return parse_qsl(text, keep_blank_values=True)


def _shown(text: str) -> str:
    """Give *text* as it can stand in a line of the log, at a terminal too."""
    return "".join(each if each.isprintable() else " " for each in text[:MAX_REASON]).strip()


def _is_turn(state: object) -> TypeGuard[Turn]:
    return state in TURNS


def _silent(told: Picture) -> Picture:
    """Give who did not answer, where there are several to ask."""
    return {"unanswered": told["unanswered"]} if "unanswered" in told else {}


def _unknown(name: str, told: Picture) -> web.Response:
    names = ", ".join(each["name"] for each in told["upstreams"])
    return _error(404, f"no upstream is called {clean(name)!r} (there are: {names})")


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
