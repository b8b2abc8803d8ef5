"""The operator's side: is it alive, may it get traffic, and what has it done."""

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from vastproxy.model import clean
from vastproxy.web.handlers import is_local

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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

    app = web.Application(middlewares=[_known_host])
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    if metrics is not None:
        app.router.add_get("/metrics", _metrics_handler(metrics))
    return app


@web.middleware
async def _known_host(request: web.Request, handler: Handler) -> web.StreamResponse:
    """
    Refuse requests that name a host which no operator uses for this listener.

    A page in the operator's browser could have its own name lead here (DNS rebinding), and then
    read and delete as the operator can. By an address, or as ``localhost``, none can.
    """
    host = clean(request.headers.get("Host", ""))
    if is_local(request) or _is_plain(host):
        return await handler(request)
    return web.json_response(
        {"error": f"{host!r} is no name for this listener (ask it as localhost, or by IP)"},
        status=HTTPStatus.MISDIRECTED_REQUEST,
    )


def _is_plain(host: str) -> bool:
    """Whether *host* (and maybe a port) is an address, ``localhost``, or nothing at all."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in {"", "localhost"} or bool(ip_address(name))
    except ValueError:
        return False


def _metrics_handler(
    metrics: Callable[[], bytes],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return handle
