"""
What aiohttp's side of a connection does not refuse by itself.

Rule 1: an answer's head has an end. aiohttp bounds a line and a number of lines, but goes on
reading interim answers (``100 Continue``) for ever, and keeps each: a peer that floods with them
takes the loop's time from everybody (measured: 0.9 s, 140 MB).
Rule 2: an answer has an end on the wire too, whatever its chunks, extensions and trailers say.
Rule 3: bytes that nobody asked for end a connection. On a connection that is kept open they would
be taken for the answer to the next request: another viewer's.
Rule 4: what was sent is not sent again, though HTTP would allow it for a GET (RFC 9112 section
9.3.1) and aiohttp does it: whoever read it has counted it. So a kept connection is looked at before
it is used, whether its end has come by now; what crosses the request on the way is a failure.

This is the one place that touches what aiohttp does not promise to keep; the tests of hostile
upstreams hold it.
"""

import asyncio
import functools
import select
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import set_exception
from yarl import URL

MAX_HEAD = 64 * 1024
"""Bytes of status line and headers, interim answers included. nginx takes 8 KiB, curl 300 KiB."""

MAX_WIRE = 4 * 1024 * 1024
"""Bytes of a whole answer as sent: twice the largest body that config.yaml can allow."""


class HopProtocol(ResponseHandler):
    """One connection to an ad server."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._received = 0
        self._head_done = False
        self._poll: select.poll | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin a connection."""
        super().connection_made(transport)
        opened = transport.get_extra_info("socket")
        if opened is not None:
            self._poll = select.poll()
            self._poll.register(opened.fileno(), select.POLLIN)

    def is_connected(self) -> bool:
        """Whether the pool may hand this connection out: with nothing on it, not even its end."""
        if self._buffer or self._tail or not super().is_connected():
            return False
        # The loop may not have come to it yet.
        return self._poll is None or not self._poll.poll(0)

    def set_response_params(self, **params: Any) -> None:  # noqa: ANN401 - handed on as they are
        """Begin a request."""
        self._received = 0
        self._head_done = False
        super().set_response_params(**params)

    def feed_data(self, data: Any, size: int = 0) -> None:  # noqa: ANN401 - aiohttp's own type
        """Take the head of an answer; interim ones are not the end of it."""
        if data[0].code >= 200:  # noqa: PLR2004 - RFC 9110 section 15.2
            if self._head_done:
                self._end("an answer that nobody asked for")
                return
            self._head_done = True
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the peer, while they are not too many; none: decoding goes on."""
        resumed = not data
        before = self._received
        self._received += len(data)
        if not self._head_done and self._parser is not None:
            head = max(0, MAX_HEAD - before)
            super().data_received(data[:head])
            data = data[head:]
            if data and not self._head_done:
                self._end("the head of the answer does not end")
        if self._received > MAX_WIRE:
            self._end(f"the answer is larger than {MAX_WIRE} bytes on the wire")
        elif data or resumed:
            super().data_received(data)

    def _end(self, reason: str) -> None:
        """Break off, for *reason*."""
        error = aiohttp.ClientPayloadError(reason)
        payload, transport = self._payload, self.transport
        self._parser = None
        self.set_exception(error)
        if payload is not None:
            set_exception(payload, error)
        if transport is not None:
            transport.abort()


class HopConnector(aiohttp.TCPConnector):
    """A connector whose connections are :class:`HopProtocol`."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - TCPConnector's own
        super().__init__(**options)
        self._factory = functools.partial(HopProtocol, loop=self._loop)  # type: ignore[assignment]


def hop_session(connector: HopConnector, **options: Any) -> aiohttp.ClientSession:  # noqa: ANN401
    """Make a session over *connector* that repeats nothing by itself."""
    session = aiohttp.ClientSession(connector=connector, **options)
    session._retry_connection = False  # noqa: SLF001 - rule 4; there is no public switch
    return session


def wire_url(url: str) -> URL:
    """Make aiohttp's URL of *url*, byte for byte: yarl forgets a ``?`` with nothing behind it."""
    made = URL(url, encoded=True)
    if url.endswith("?") and not made.raw_query_string:
        made._cache["raw_path_qs"] = made.raw_path + "?"  # noqa: SLF001 - there is no public way
    return made
