"""
An ad server of the tests: raw HTTP/1.1 on loopback, and every request kept as it came in.

Rule 1: a request is recorded before anything of it is decoded.
Rule 2: what is answered is what the test says, to the byte.
"""

import asyncio
import concurrent.futures
import contextlib
import inspect
import itertools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

EMPTY_VAST = b'<VAST version="4.2"/>'
"""What an ad server without an ad answers."""

PORT_ATTEMPTS = 20
"""How often a port is drawn until it is free on all addresses."""


@dataclass(frozen=True, slots=True)
class Received:
    """One request, as it came in."""

    line: bytes
    """The request line, without its end."""
    headers: tuple[tuple[str, str], ...]
    """Names and values as sent, in order, decoded as Latin-1."""
    connection: int
    """Which connection of the server it came over; the first is 1."""
    address: str
    """The address of ours that was asked."""
    at: float
    """When it was read, on the monotonic clock, in seconds."""
    body: bytes = b""

    @property
    def method(self) -> str:
        """The first word of the request line."""
        return self.line.split(b" ")[0].decode("latin-1")

    @property
    def target(self) -> str:
        """What stands between the method and the version, byte for byte."""
        return self.line.split(b" ", 1)[1].rpartition(b" ")[0].decode("latin-1")

    @property
    def path(self) -> str:
        """The target up to its question mark."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        """The target after its first question mark."""
        return self.target.partition("?")[2]

    def values(self, name: str) -> list[str]:
        """Give all values of header *name*, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """Give the first value of header *name*, or None."""
        return next(iter(self.values(name)), None)

    @property
    def cookies(self) -> dict[str, str]:
        """The pairs of the ``Cookie`` headers."""
        pairs = (pair.partition("=") for pair in "; ".join(self.values("cookie")).split("; "))
        return {name: value for name, _, value in pairs if name}


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered to one request."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    """Sent in this order; Content-Type and Content-Length are added where they are missing."""
    delay: float = 0.0
    """Seconds before the first byte."""
    raw: bytes | None = None
    """Sent instead of all the others, as it is; the connection ends after it."""
    reset: bool = False
    """True: end the connection by a reset, after *raw* or at once."""

    def encode(self, *, head: bool) -> bytes:
        """Give the bytes of the answer; *head* leaves the body out."""
        if self.raw is not None:
            return self.raw
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in (*self.headers, *self._missing())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head else self.body)

    def _missing(self) -> Iterator[tuple[str, str]]:
        given = {name.lower() for name, _ in self.headers}
        if self.status in {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}:
            return
        if "content-type" not in given:
            yield "Content-Type", "application/xml"
        if not given & {"content-length", "transfer-encoding"}:
            yield "Content-Length", str(len(self.body))


Answering = Callable[[Received], Reply | bytes | Awaitable[Reply | bytes]]
"""Decides on a request; may wait, for example for an event that the test sets."""


class AdServer:
    """
    An ad server on loopback; an async context manager.

    *replies* says what a target is answered: by the whole target where it has such an entry,
    else by its path; it may be changed while the server runs. What it does not name is
    answered by *fallback*. All *addresses* share one port, so that each is a host of its own.
    """

    def __init__(
        self,
        replies: Mapping[str, Reply | bytes | Answering] | None = None,
        *,
        addresses: tuple[str, ...] = ("127.0.0.1",),
        fallback: Reply | bytes | Answering = Reply(status=404),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.replies = dict(replies or {})
        self.addresses = addresses
        self.fallback = fallback
        self.requests: list[Received] = []
        self.port = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self._tls = tls
        self._servers: list[asyncio.Server] = []
        self._connections = itertools.count(1)
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<AdServer port {self.port}, {len(self.requests)} requests>"

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        for attempt in range(1, PORT_ATTEMPTS + 1):
            try:
                await self._listen()
            except OSError:
                await self._stop_listening()
                if attempt == PORT_ATTEMPTS:
                    raise
            else:
                break
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop_listening()
        connections = list(self._open.items())
        for task, writer in connections:
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*(task for task, _ in connections), return_exceptions=True)
        # An aborted transport closes its socket in the next turn of the loop.
        await asyncio.sleep(0)

    def url(self, path: str = "", *, address: str = "") -> str:
        """Give the URL of *path* on *address*, the first one where it is empty."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{address or self.addresses[0]}:{self.port}{path}"

    def seen(self, path: str, *, address: str = "") -> list[Received]:
        """Give the requests for *path* so far; with *address* only those that came there."""
        return [
            each
            for each in list(self.requests)
            if each.path == path and address in {"", each.address}
        ]

    async def wait_seen(self, path: str, count: int = 1, within: float = 10.0) -> list[Received]:
        """Wait until *path* was asked for *count* times; TimeoutError after *within* seconds."""
        async with asyncio.timeout(within):
            while len(self.seen(path)) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.seen(path)

    async def _listen(self) -> None:
        self.port = 0
        for address in self.addresses:
            server = await asyncio.start_server(
                self._serve, host=address, port=self.port, ssl=self._tls
            )
            self._servers.append(server)
            self.port = server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        # A cancelled connection ends like any other: asyncio would report it as an error.
        with contextlib.suppress(
            asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError, ssl.SSLError
        ):
            await self._converse(reader, writer, next(self._connections))
        del self._open[task]
        writer.close()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> None:
        address = str(writer.get_extra_info("sockname")[0])
        goes_on = True
        while goes_on:
            request = await _read(reader, connection, address)
            self.requests.append(request)
            self._changed.set()
            goes_on = await self._answer(request, writer)

    async def _answer(self, request: Received, writer: asyncio.StreamWriter) -> bool:
        reply = await self._decide(request)
        if reply.delay:
            await asyncio.sleep(reply.delay)
        if reply.raw is not None or not reply.reset:
            writer.write(reply.encode(head=request.method == "HEAD"))
            await writer.drain()
        if reply.reset:
            _reset(writer)
        wanted = (request.header("connection") or "").lower()
        return wanted != "close" and reply.raw is None and not reply.reset

    async def _decide(self, request: Received) -> Reply:
        answer = self.replies.get(request.target, self.replies.get(request.path, self.fallback))
        if not isinstance(answer, Reply | bytes):
            given = answer(request)
            answer = await given if inspect.isawaitable(given) else given
        return answer if isinstance(answer, Reply) else Reply(answer)


def _reset(writer: asyncio.StreamWriter) -> None:
    # A socket that lingers for no time is ended by RST instead of FIN.
    link = writer.get_extra_info("socket")
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _read(reader: asyncio.StreamReader, connection: int, address: str) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
    line, *fields = head.split(b"\r\n")
    pairs = (field.decode("latin-1").partition(":") for field in fields)
    headers = tuple((name, value.strip(" \t")) for name, _, value in pairs)
    received = Received(line, headers, connection, address, time.monotonic())
    length = int(received.header("content-length") or 0)
    if not length:
        return received
    return Received(
        line, headers, connection, address, received.at, await reader.readexactly(length)
    )


@contextlib.contextmanager
def in_thread(server: AdServer) -> Iterator[AdServer]:
    """Run *server* in a thread with a loop of its own, for tests that do not wait."""
    started: concurrent.futures.Future[asyncio.Event] = concurrent.futures.Future()

    async def serve() -> None:
        """Serve until the block ends."""
        stop = asyncio.Event()
        async with server:
            started.set_result(stop)
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="ad server")
    thread.start()
    try:
        stop = started.result(timeout=10)
        try:
            yield server
        finally:
            assert server.loop is not None
            server.loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(timeout=10)


def wait_seen(server: AdServer, path: str, count: int = 1, within: float = 10.0) -> list[Received]:
    """Wait, outside the loop of *server*, until *path* was asked for *count* times."""
    assert server.loop is not None
    waiting = asyncio.run_coroutine_threadsafe(server.wait_seen(path, count, within), server.loop)
    return waiting.result(timeout=within + 5)
