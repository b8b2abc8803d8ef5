"""The operator's questions about budgets and viewers, as JSON."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from vastproxy.errors import StateBackendError
from vastproxy.flow.overview import Overview

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def add_api(app: web.Application, overview: Callable[[], Overview]) -> None:
    """
    Add ``/api/budgets`` and ``/api/viewers`` to *app*.

    *overview* gives that of the config which is served now.
    """

    async def budgets(_: web.Request) -> web.Response:
        return web.json_response({"budgets": await overview().budgets()})

    async def budget(request: web.Request) -> web.Response:
        campaign = request.match_info["campaign"]
        found = await overview().budget(campaign)
        if found is None:
            return _error(404, f"no route has a budget of the campaign {campaign!r}")
        return web.json_response(found)

    async def viewer(request: web.Request) -> web.Response:
        now = int(time.time() * 1000)
        return web.json_response(await overview().viewer(request.match_info["viewer"], now))

    async def forget(request: web.Request) -> web.Response:
        forgotten = await overview().forget(request.match_info["viewer"])
        return web.json_response({"forgotten": forgotten})

    app.router.add_get("/api/budgets", _told(budgets))
    app.router.add_get("/api/budgets/{campaign}", _told(budget))
    # An id may be a path of its own: whatever the application calls its viewers.
    app.router.add_get("/api/viewers/{viewer:.+}", _told(viewer))
    app.router.add_delete("/api/viewers/{viewer:.+}", _told(forget))


def _told(handler: Handler) -> Handler:
    """Answer 503 where the state is away: an operator gets a reason, and nothing made up."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except StateBackendError as error:
            return _error(503, f"the state backend does not answer: {error}")

    return answer


def _error(status: int, text: str) -> web.Response:
    body: dict[str, Any] = {"error": text}
    return web.json_response(body, status=status)
