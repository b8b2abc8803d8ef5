"""
Tell ``<Error>`` URIs what went wrong, in the background, once.

Rule 1: a report delays no answer: it is put on a bounded queue, and dropped, counted and logged
where the queue is full.
Rule 2: it is never sent twice. No retry, and no reused connection, on which aiohttp would retry.
Rule 3: it goes through the egress guard, as everything that a third party names.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog

from vastproxy.errors import (
    RedirectError,
    UpstreamError,
    UpstreamStatusError,
    UpstreamTooLargeError,
)
from vastproxy.model import HopRequest
from vastproxy.observe.tasks import Tasks
from vastproxy.upstream.client import HopClient
from vastproxy.upstream.urls import joined, target

MAX_PENDING = 1000
"""Reports that wait for their turn. At 1 KB each, a megabyte."""
MAX_AT_ONCE = 16
TIMEOUT = 2.0
"""Seconds for one report, redirects included."""
MAX_REDIRECTS = 5
MAX_BODY = 64 * 1024
"""Bytes of an answer that nobody reads: a pixel."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class Ping:
    """One URI to be requested, filled, and the headers that go with it."""

    url: str
    headers: tuple[tuple[str, str], ...]
    request_id: str


class ErrorReporter:
    """Requests ``<Error>`` URIs by *client*, as tasks of *tasks*."""

    def __init__(self, client: HopClient, tasks: Tasks) -> None:
        self._client = client
        self._tasks = tasks
        self._waiting = 0
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._log = structlog.get_logger("vastproxy.reports")
        self.sent = 0
        """Reports that an ad server took."""
        self.failed = 0
        self.dropped = 0
        """Reports that never left, because too many waited."""

    def send(self, pings: Iterable[Ping], dropped: int = 0) -> None:
        """
        Send *pings* when their turn comes; *dropped* is how many were given up before.

        Anything but http and https is passed over. What does not fit on the queue is dropped,
        and one line of the log says how much that was.
        """
        for ping in pings:
            if not ping.url.lower().startswith(("http://", "https://")):
                self._log.debug("report.skipped", url=ping.url[:40], request_id=ping.request_id)
            elif self._waiting >= MAX_PENDING:
                dropped += 1
            else:
                self._waiting += 1
                self._tasks.spawn(self._send(ping), f"report {ping.request_id}")
        if dropped:
            self.dropped += dropped
            self._log.warning("report.dropped", dropped=dropped, in_all=self.dropped)

    async def _send(self, ping: Ping) -> None:
        try:
            async with self._turns:
                await self._request(ping)
        except UpstreamTooLargeError:
            self.sent += 1
        except UpstreamError as error:
            self.failed += 1
            # The host alone: the rest of the URL is filled with what is known of the viewer.
            host = urlsplit(ping.url).hostname
            self._log.info(
                "report.failed", host=host, problem=str(error), request_id=ping.request_id
            )
        else:
            self.sent += 1
        finally:
            self._waiting -= 1

    async def _request(self, ping: Ping) -> None:
        deadline = asyncio.get_running_loop().time() + TIMEOUT
        url = ping.url
        for _ in range(MAX_REDIRECTS + 1):
            place = target(url)
            reply = await self._client.get(
                HopRequest(place.url, ping.headers, trusted=False, max_body=MAX_BODY, once=True),
                deadline,
            )
            if reply.status >= 400:  # noqa: PLR2004 - RFC 9110 section 15.5
                raise UpstreamStatusError(reply.status)
            if reply.status not in _REDIRECTS or not reply.header("location"):
                return
            url = joined(place.url, reply.header("location") or "")
        raise RedirectError(f"more than {MAX_REDIRECTS} redirects")

    def __repr__(self) -> str:
        return (
            f"<ErrorReporter sent: {self.sent}, failed: {self.failed}, dropped: {self.dropped}, "
            f"waiting: {self._waiting}>"
        )
