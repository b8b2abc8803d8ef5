"""
Sockets to listen on, and what is served there.

What is opened closes in order: no new connections, then the answers in flight, then the rest.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    asynccontextmanager,
    suppress,
)
from dataclasses import replace

from aiohttp import web

from vastproxy.config.units import Listen

BACKLOG = 1024
"""Connections that the kernel keeps waiting; the default of 128 drops some in a burst."""


@asynccontextmanager
async def listening(
    runner: web.BaseRunner,
    places: Sequence[Listen | socket.socket],
    drained: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[list[str]]:
    """
    Serve *runner* at *places*, of which sockets are bound already.

    Leaving stops accepting, waits for *drained*, and lets requests in flight end.
    """
    await runner.setup()
    try:
        yield [await _open(runner, each) for each in places]
    finally:
        waiting = [each for place in places for each in _waiting(place)]
        for site in tuple(runner.sites):
            await site.stop()
        for each in waiting:
            await _take(runner, each)
        if drained is not None:
            await drained()
        await runner.cleanup()


async def _open(runner: web.BaseRunner, place: Listen | socket.socket) -> str:
    if isinstance(place, socket.socket):
        await web.SockSite(runner, place, backlog=BACKLOG).start()
        return name_of(place)
    if place.path:
        remove_stale_socket(place.path)
        await web.UnixSite(runner, place.path, backlog=BACKLOG).start()
        return str(place)
    site = web.TCPSite(runner, place.host or None, place.port, backlog=BACKLOG)
    await site.start()
    # Of port 0 the system chose one.
    port = place.port or runner.addresses[-1][1]
    return f"http://{replace(place, port=port)}"


def _waiting(place: Listen | socket.socket) -> Iterator[socket.socket]:
    """Accept what waits at *place*: closing it would reset these connections."""
    if isinstance(place, socket.socket) and place.fileno() >= 0:
        with suppress(BlockingIOError):
            while True:
                yield place.accept()[0]


async def _take(runner: web.BaseRunner, connection: socket.socket) -> None:
    if runner.server is not None:
        connection.settimeout(0)
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(runner.server, connection)


def name_of(bound: socket.socket) -> str:
    """Give the address of a *bound* socket, as it is asked."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://{Listen(host, port)}"


def remove_stale_socket(path: str) -> None:
    """
    Remove a socket that a killed process left at *path*; anything else there stays.

    Raises OSError where a process still answers on it.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
            return
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                raise OSError(errno.EADDRINUSE, f"{path} is in use by a running process")
        os.unlink(path)  # noqa: PTH108
