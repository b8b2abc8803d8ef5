"""What a connection to an ad server refuses, over real sockets."""

import asyncio
import gzip
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import ip_network
from random import Random

import pytest
import uvloop

from vastproxy.errors import UpstreamError
from vastproxy.model import HopReply, HopRequest
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.wire import MAX_HEAD, MAX_WIRE

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ENOUGH = 5.0
"""Seconds within which each of these must end by itself, long before the deadline."""

FLOOD = 500
"""Answers that nobody asked for: far more than one turn of a loop can bring."""

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[tuple[str, list[int]]]:
    """Serve connections by *serve*, numbered from 1; give the URL, and a list of their numbers."""
    numbers: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Number a connection, and serve it to its end."""
        numbers.append(len(numbers) + 1)
        try:
            await serve(reader, writer, numbers[-1])
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", numbers


async def head(reader: asyncio.StreamReader) -> None:
    """Read one request."""
    await reader.readuntil(b"\r\n\r\n")


async def ask(client: AiohttpClient, url: str, *, once: bool = False) -> HopReply:
    """Ask *url* with time to spare."""
    request = HopRequest(url, (), trusted=False, max_body=1 << 20, once=once)
    return await client.get(request, asyncio.get_running_loop().time() + 60)


@pytest.fixture
async def client() -> AsyncIterator[AiohttpClient]:
    """Open a client that may reach loopback."""
    policy = EgressPolicy(allow=(ip_network("127.0.0.0/8"),))
    async with AiohttpClient(policy) as opened:
        yield opened


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
    ],
    ids=["interim answers", "chunk size", "chunk extension"],
)
async def test_endless_answers_end(client: AiohttpClient, start: bytes, piece: bytes) -> None:
    """An answer without an end, which never becomes a body, is broken off by its size."""
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        """Serve one connection."""
        nonlocal sent
        await head(reader)
        writer.write(start)
        many = piece * (65536 // len(piece))
        while True:
            writer.write(many)
            sent += len(many)
            await writer.drain()

    async with serving(serve) as (url, _), asyncio.timeout(ENOUGH):
        with pytest.raises(UpstreamError):
            await ask(client, url)

    assert MAX_HEAD < sent < 8 * MAX_WIRE


@contextmanager
def serving_one_each() -> Iterator[tuple[str, list[threading.Event]]]:
    """Answer one request on each connection and close it; an event for each says that it is."""
    closed: list[threading.Event] = []

    def serve(listener: socket.socket) -> None:
        """Serve until the listener is closed."""
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                closed.append(threading.Event())
                with connection:
                    while not connection.recv(65536).endswith(b"\r\n\r\n"):
                        pass
                    connection.sendall(ANSWER)
                closed[-1].set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/", closed
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def test_kept_connection_that_was_closed_is_replaced(client: AiohttpClient) -> None:
    """A kept connection whose end has come is not used, though the loop has not seen it yet."""
    with serving_one_each() as (url, closed):
        first = await ask(client, url)
        # The loop stands still meanwhile, as when it is busy with something else.
        assert closed[0].wait(ENOUGH)
        second = await ask(client, url)

    assert (b"ok", b"ok") == (first.body, second.body)
    assert 2 == len(closed)


async def test_request_on_a_kept_connection_is_not_repeated(client: AiohttpClient) -> None:
    """A request that was read, and not answered, may have been counted: it is not sent again."""
    read = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        """Serve one connection."""
        nonlocal read
        await head(reader)
        writer.write(ANSWER)
        await writer.drain()
        await head(reader)
        read += 1
        writer.transport.abort()

    async with serving(serve) as (url, numbers):
        await ask(client, url)
        with pytest.raises(UpstreamError):
            await ask(client, url)

    assert ([1], 1) == (numbers, read)


@pytest.mark.parametrize("once", [False, True])
async def test_fresh_connection_is_not_asked_twice(client: AiohttpClient, *, once: bool) -> None:
    """A request that broke off on a new connection is not repeated: it may have been counted."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        """Serve one connection."""
        await head(reader)
        writer.transport.abort()

    async with serving(serve) as (url, numbers):
        with pytest.raises(UpstreamError):
            await ask(client, url, once=once)

    assert [1] == numbers


async def test_answer_that_had_begun_is_not_asked_for_again(client: AiohttpClient) -> None:
    """A request on a kept connection whose answer had begun is not repeated."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        """Serve one connection."""
        await head(reader)
        writer.write(ANSWER)
        await head(reader)
        writer.write(b"HTTP/1.1 200")
        await writer.drain()
        writer.close()

    async with serving(serve) as (url, numbers):
        await ask(client, url)
        with pytest.raises(UpstreamError):
            await ask(client, url)

    assert [1] == numbers


async def test_unasked_bytes_end_a_connection(client: AiohttpClient) -> None:
    """What comes on an idle connection is no answer to the next request."""
    say, ended = asyncio.Event(), asyncio.Event()

    async def serve(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        """Serve one connection."""
        await head(reader)
        writer.write(ANSWER)
        await writer.drain()
        if number == 1:
            await say.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL")
            await reader.read()
            ended.set()

    async with serving(serve) as (url, numbers), asyncio.timeout(ENOUGH):
        await ask(client, url)
        say.set()
        await ended.wait()
        second = await ask(client, url)

    assert b"ok" == second.body
    assert [1, 2] == numbers


async def test_flood_on_an_idle_connection_ends_it(client: AiohttpClient) -> None:
    """Small complete answers without end are not collected: one of the first ends all."""
    say, ended = asyncio.Event(), asyncio.Event()
    sent = 0

    async def serve(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        """Answer; flood the first connection until it ends."""
        nonlocal sent
        await head(reader)
        writer.write(ANSWER)
        await writer.drain()
        if number == 1:
            await say.wait()
            while not (reader.at_eof() or reader.exception() or sent >= FLOOD):
                writer.write(ANSWER)
                sent += 1
                await asyncio.sleep(0)  # the client has its turn: both are on one loop
            ended.set()

    async with serving(serve) as (url, numbers), asyncio.timeout(ENOUGH):
        await ask(client, url)
        say.set()
        await ended.wait()
        second = await ask(client, url)

    assert b"ok" == second.body
    assert [1, 2] == numbers
    assert 0 < sent < FLOOD


LARGE = 1_900_000
"""Bytes of a body: near the most that config.yaml can allow, and many buffers of aiohttp's."""

BODIES = {
    "hardly compressed": Random(7).randbytes(LARGE // 2).hex().encode(),
    "well compressed": (b"<Impression>http://a.example/i</Impression>\n" * 50_000)[:LARGE],
}


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_large_compressed_body_on_a_kept_connection(
    loop: Callable[[], asyncio.AbstractEventLoop], body: bytes
) -> None:
    """A body that is decoded in many steps is whole, and its connection is used again."""
    packed = gzip.compress(body, mtime=0)
    fields = f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
    answers = (ANSWER, f"HTTP/1.1 200 OK\r\n{fields}".encode() + packed, ANSWER)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        """Serve one connection."""
        for each in answers:
            await head(reader)
            writer.write(each)
            await writer.drain()

    async def asked() -> tuple[list[bytes], list[int]]:
        """Ask for all three."""
        policy = EgressPolicy(allow=(ip_network("127.0.0.0/8"),))
        async with (
            asyncio.timeout(ENOUGH),
            AiohttpClient(policy) as client,
            serving(serve) as (url, numbers),
        ):
            request = HopRequest(url, (), trusted=False, max_body=2 * 1024 * 1024)
            ends = asyncio.get_running_loop().time() + 60
            return [(await client.get(request, ends)).body for _ in answers], numbers

    with asyncio.Runner(loop_factory=loop) as runner:
        bodies, numbers = runner.run(asked())

    assert [len(b"ok"), len(body), len(b"ok")] == [len(each) for each in bodies]
    assert body == bodies[1]
    assert [1] == numbers
