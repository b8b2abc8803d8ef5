"""
The ad servers: three listeners of one process, one for each hop.

Started as ``python -m benchmarks.upstream --size BYTES --tag NAME...``. It prints one line of
JSON, ``{"ports": [first, second, third]}``, and serves until its standard input ends. Every
program under test has paths of its own (``/<tag>/<level>``), so that connections can be told
apart: ``/stats`` gives, for each tag, how many connections and requests there were.

As lean as asyncio allows: answers are rendered at the start, a request costs two searches and
one write.
"""

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from typing import cast

import click
import uvloop

from benchmarks.documents import LEVELS, Document, chain

_END = b"\r\n\r\n"
_NOTHING_HERE = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


@dataclass(slots=True)
class Count:
    """What came in under one tag."""

    connections: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent for a path, and where it is counted."""

    raw: bytes
    count: Count


class Shelf:
    """All answers, by the path of the request."""

    def __init__(self, tags: tuple[str, ...]) -> None:
        self.counts = {tag: Count() for tag in tags}
        self._answers: dict[bytes, Answer] = {}

    def fill(self, size: int, ports: tuple[int, int, int]) -> None:
        """Render the chains of all tags, *size* bytes a document, served on *ports*."""
        for tag, count in self.counts.items():
            first, second, third = (
                f"http://127.0.0.1:{port}/{tag}/{level}"
                for port, level in zip(ports, LEVELS, strict=True)
            )
            documents = chain(size, (first, second, third))
            for level, document in zip(LEVELS, documents, strict=True):
                self._answers[f"/{tag}/{level}".encode()] = Answer(reply(document), count)

    def answer(self, path: bytes) -> Answer | None:
        """Give what is kept under *path*."""
        return self._answers.get(path)

    def stats(self) -> bytes:
        """Give the counts as a whole HTTP answer."""
        body = json.dumps({tag: asdict(count) for tag, count in self.counts.items()}).encode()
        return _raw(body, "application/json", "")


class Connection(asyncio.Protocol):
    """One client: GETs without bodies, answered in order (RFC 9112 section 9.3)."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._rest = b""
        self._transport: asyncio.WriteTransport | None = None
        self._counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the *transport*."""
        # uvloop's transports are none by their class.
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer every request that is whole."""
        *requests, self._rest = (self._rest + data).split(_END)
        for request in requests:
            self._serve(request)

    def _serve(self, request: bytes) -> None:
        target = request.split(b" ", 2)[1]
        raw = self._counted_answer(target.partition(b"?")[0])
        if self._transport is not None:
            self._transport.write(raw)

    def _counted_answer(self, path: bytes) -> bytes:
        answer = self._shelf.answer(path)
        if answer is None:
            return self._shelf.stats() if path == b"/stats" else _NOTHING_HERE
        if not self._counted:
            # Only the first request says whose connection this is.
            self._counted = True
            answer.count.connections += 1
        answer.count.requests += 1
        return answer.raw


def reply(document: Document) -> bytes:
    """Render the whole HTTP answer that carries *document*."""
    cookie = f"Set-Cookie: {document.cookie}\r\n" if document.cookie else ""
    return _raw(document.body, "application/xml; charset=utf-8", cookie)


def _raw(body: bytes, content_type: str, more: str) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{more}\r\n".encode() + body


async def serve(size: int, tags: tuple[str, ...]) -> None:
    """Listen on three ports of loopback, say which, and serve until standard input ends."""
    loop = asyncio.get_running_loop()
    shelf = Shelf(tags)
    servers = [
        await loop.create_server(lambda: Connection(shelf), "127.0.0.1", 0, backlog=1024)
        for _ in LEVELS
    ]
    first, second, third = (server.sockets[0].getsockname()[1] for server in servers)
    shelf.fill(size, (first, second, third))
    print(json.dumps({"ports": [first, second, third]}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for server in servers:
        server.close()


@click.command()
@click.option("--size", type=int, required=True, help="Bytes of each document.")
@click.option("--tag", "tags", multiple=True, required=True, help="A program under test.")
def main(size: int, tags: tuple[str, ...]) -> None:
    """Serve three-hop chains on loopback."""
    uvloop.run(serve(size, tags))


if __name__ == "__main__":
    main()
