"""
The floor: what three fetches and an answer cost on aiohttp if nothing looks into the XML.

The addresses of the hops are known in advance; the last body is handed out as it came. Cookies
are not kept: with aiohttp's jar the floor would rise with every cookie that a hop sets, and a
ratio to it would flatter.
"""

import asyncio
import signal
from typing import TYPE_CHECKING

import click
import uvloop
from aiohttp import ClientSession, DummyCookieJar, web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HOPS = web.AppKey("hops", tuple[str, ...])
CLIENT = web.AppKey("client", ClientSession)


async def vast(request: web.Request) -> web.Response:
    """Fetch every hop, answer the last."""
    client = request.app[CLIENT]
    body = b""
    for hop in request.app[HOPS]:
        async with client.get(hop) as reply:
            body = await reply.read()
    return web.Response(body=body, content_type="application/xml", charset="utf-8")


async def keep_client(app: web.Application) -> "AsyncIterator[None]":
    """Hold one client, with its connections, as long as *app* runs."""
    async with ClientSession(cookie_jar=DummyCookieJar()) as app[CLIENT]:
        yield


async def serve(port: int, hops: tuple[str, ...]) -> None:
    """Serve on *port* of loopback until told to end."""
    app = web.Application()
    app[HOPS] = hops
    app.cleanup_ctx.append(keep_client)
    app.router.add_get("/vast", vast)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await ended.wait()
    finally:
        await runner.cleanup()


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--hop", "hops", multiple=True, required=True, help="A URL to fetch.")
def main(port: int, hops: tuple[str, ...]) -> None:
    """Answer /vast with the last of the hops."""
    uvloop.run(serve(port, hops))


if __name__ == "__main__":
    main()
