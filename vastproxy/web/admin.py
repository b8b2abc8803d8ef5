"""The operator's side: is it alive, and may it get traffic."""

from collections.abc import Callable

from aiohttp import web


def admin_app(is_ready: Callable[[], bool]) -> web.Application:
    """
    Make the application of the admin listener.

    ``/healthz`` answers while the process can; ``/readyz`` answers 503 before the players'
    listener is open, and from the signal to stop on, when what is in flight ends.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        if is_ready():
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready"}, status=503)

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app
