"""The operator's side: is it alive, may it get traffic, and what has it done."""

from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST


def admin_app(
    is_ready: Callable[[], bool],
    *,
    metrics: Callable[[], bytes] | None = None,
    workers: Callable[[], Mapping[str, int]] | None = None,
) -> web.Application:
    """
    Make the application of the admin listener.

    ``/healthz`` answers while the process can; ``/readyz`` answers 503 before the players'
    listener is open, and from the signal to stop on, when what is in flight ends. *workers*
    counts processes, where there are several, for its body. ``/metrics`` is what *metrics*
    writes, in Prometheus' text format.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def readyz(_: web.Request) -> web.Response:
        more = {} if workers is None else {"workers": dict(workers())}
        if is_ready():
            return web.json_response({"status": "ready", **more})
        return web.json_response({"status": "not ready", **more}, status=503)

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    if metrics is not None:
        app.router.add_get("/metrics", _metrics_handler(metrics))
    return app


def _metrics_handler(
    metrics: Callable[[], bytes],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return handle
