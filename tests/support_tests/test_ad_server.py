"""What the ad server of the tests promises to those who use it."""

import asyncio
import http.client

import pytest

from tests.support.ad_server import AdServer, Received, Reply, in_thread, wait_seen
from tests.support.proxy import ask


async def talk(server: AdServer, *messages: bytes, address: str = "127.0.0.1") -> list[bytes]:
    """Send *messages* over one connection, and give what is answered to each."""
    reader, writer = await asyncio.open_connection(address, server.port)
    answers = []
    for message in messages:
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-le")]
        answers.append(head + await reader.readexactly(int(length[0].split(b":")[1])))
    writer.close()
    await writer.wait_closed()
    return answers


async def test_records_bytes() -> None:
    """The request line and the headers are kept byte for byte, in order."""
    async with AdServer({"/a": b"<VAST/>"}) as server:
        await talk(server, b"GET /a?x=%2f;[M]&y= HTTP/1.1\r\nHost: h\r\nx-B:  1 \r\nX-a: 2\r\n\r\n")
        request = server.requests[0]

        assert b"GET /a?x=%2f;[M]&y= HTTP/1.1" == request.line
        assert (("Host", "h"), ("x-B", "1"), ("X-a", "2")) == request.headers
        assert ("GET", "/a", "x=%2f;[M]&y=") == (request.method, request.path, request.query)


async def test_keep_alive() -> None:
    """Requests over one connection carry one connection id; another connection has another."""
    question = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
    async with AdServer({"/a": b"<VAST/>"}) as server:
        answers = await talk(server, question, question)
        await talk(server, question)

        assert [True, True] == [each.endswith(b"\r\n\r\n<VAST/>") for each in answers]
        assert [1, 1, 2] == [each.connection for each in server.requests]


async def test_addresses() -> None:
    """Every address is a host of its own, on one port, and a request tells where it came in."""
    hosts = ("127.0.0.2", "127.0.0.3")

    def answer(request: Received) -> bytes:
        """Tell where *request* came in."""
        return request.address.encode()

    async with AdServer(addresses=hosts, fallback=answer) as server:
        answers = [
            (await talk(server, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", address=host))[0]
            for host in hosts
        ]

        assert [host.encode() for host in hosts] == [each.rpartition(b"\n")[2] for each in answers]
        assert f"http://127.0.0.3:{server.port}/x" == server.url("/x", address="127.0.0.3")


async def test_whole_target_first() -> None:
    """A target with its query is looked up before its path."""
    async with AdServer({"/a": b"path", "/a?b": b"target"}) as server:
        answers = await talk(
            server,
            b"GET /a?b HTTP/1.1\r\nHost: h\r\n\r\n",
            b"GET /a?c HTTP/1.1\r\nHost: h\r\n\r\n",
        )

        assert [b"target", b"path"] == [each.rpartition(b"\n")[2] for each in answers]


async def test_waits_for_test() -> None:
    """An answer may wait for an event of the test, and the test for a request."""
    gate = asyncio.Event()

    async def answer(_: Received) -> Reply:
        """Answer when the gate is open."""
        await gate.wait()
        return Reply(b"late", status=503, headers=(("Retry-After", "1"),))

    async with AdServer({"/slow": answer}) as server, asyncio.TaskGroup() as group:
        told = group.create_task(talk(server, b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n"))
        await server.wait_seen("/slow")

        assert not told.done()
        gate.set()
        assert (await told)[0].startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n")


async def test_stops_in_the_middle() -> None:
    """A server ends although a request of it is not answered."""
    async with AdServer({"/slow": Reply(delay=3600)}) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /slow HTTP/1.1\r\nHost: h\r\n\r\n")
        await server.wait_seen("/slow")

    assert b"" == await reader.read()
    writer.close()
    await writer.wait_closed()


def test_raw_and_reset() -> None:
    """Raw bytes are sent as they are; a reset sends nothing."""
    raw = Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort")
    with in_thread(AdServer({"/raw": raw, "/reset": Reply(reset=True)})) as server:
        with pytest.raises(http.client.IncompleteRead):
            ask(server.url(), "/raw")
        with pytest.raises(ConnectionResetError):
            ask(server.url(), "/reset")


def test_thread() -> None:
    """In a thread it answers and records, and a test without a loop can wait for a request."""
    with in_thread(AdServer({"/a": b"x", "/none": Reply(status=204)})) as server:
        assert b"x" == ask(server.url(), "/a").body
        assert b"" == ask(server.url(), "/a", method="HEAD").body
        assert 204 == ask(server.url(), "/none").status
        assert 404 == ask(server.url(), "/b").status
        assert ["GET", "HEAD"] == [each.method for each in wait_seen(server, "/a", 2)]
