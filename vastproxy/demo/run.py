"""``vastproxy demo``: ad servers, the proxy and a page, in one process on loopback."""

import asyncio
import signal
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from aiohttp import web

from vastproxy.app import Proxy
from vastproxy.config.schema import Config
from vastproxy.demo.ad_servers import ad_servers
from vastproxy.explain import as_json
from vastproxy.serving import PlayerHandler, served
from vastproxy.web.handlers import ad_request, raw_path

PAGE = "/"
CHAIN = "/demo/chain"


def config_path(asked: Path) -> Path:
    """Give the config to use: the one that was asked for, or the one in the package."""
    packaged = Path(str(files("vastproxy.demo").joinpath("config.yaml")))
    return asked if asked.exists() or not packaged.exists() else packaged


def page(proxy: Proxy) -> PlayerHandler:
    """Make a handler that serves the demo's page, and leaves the rest to *proxy*."""
    html = files("vastproxy.demo").joinpath("page.html").read_text(encoding="utf-8")

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        path = raw_path(request)
        if path == PAGE and request.method == "GET":
            return web.Response(text=html, content_type="text/html")
        if path == CHAIN and request.method == "GET":
            return await chain(proxy, request)
        return await proxy.player.handle(request)

    return handle


async def chain(proxy: Proxy, request: web.BaseRequest) -> web.Response:
    """Resolve the first route once more, and tell every hop as JSON."""
    path = proxy.config.routes[0].path
    found = proxy.router.find(path)
    if found is None:
        return web.json_response({"error": f"{path} has no fixed path to ask"}, status=404)
    now = asyncio.get_running_loop().time()
    asked = ad_request(request, path, "", trusted=(), received=now)
    answer = await proxy.ads.explain(found[0], asked)
    return web.json_response({"route": path, **as_json(answer)})


async def run(config: Config, say: Callable[[str], object]) -> None:
    """Run until SIGINT or SIGTERM; *say* prints where to look."""
    stop = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    async with ad_servers(), served(config, page):
        base = f"http://{config.server.listen[0]}"
        say(f"vastproxy demo: open {base}/ in a browser")
        say(f"  a player asks:   curl '{base}{config.routes[0].path}?slot=pre&uid=me'")
        if config.server.admin:
            say(f"  an operator asks: curl http://{config.server.admin[0]}/readyz")
        say("  Ctrl-C ends it")
        await stop.wait()
