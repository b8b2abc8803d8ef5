"""
Ask an ad server over HTTP: one GET, one reply, nothing followed.

:class:`HopClient` is the seam: a leaner client may take the place of aiohttp's. Every exception
of aiohttp ends here, as one of :mod:`vastproxy.errors`.
"""

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack
from enum import Enum, auto
from types import TracebackType
from typing import Protocol, Self

import aiohttp
from aiohappyeyeballs import AddrInfoType
from aiohttp.abc import AbstractResolver

from vastproxy.errors import (
    EgressBlockedError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamTooLargeError,
)
from vastproxy.model import HopReply, HopRequest
from vastproxy.upstream.egress import EgressPolicy, EgressRefused, guarded_socket_factory
from vastproxy.upstream.wire import (
    HopConnector,
    hop_session,
    wire_url,
)

MAX_REPORTS = 1000
"""Connections for reports; what is beyond waits. Those of ad requests are bounded by guards, which
refuse at once: who waits for a connection would be taken for somebody who waits for an answer."""

KEEPALIVE = 30.0
"""Seconds an idle connection is kept: below the 60 s at which common balancers drop it."""

_OWN_FAULT = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}
)
"""Of the system: no sockets, no memory, no ports on this side."""

ON_TIME = 0.02
"""Seconds after a deadline at which it is noticed, if the loop is on time. Later, the process was
busy with something else, and the answer may have waited to be read."""

_NO_RESOLVER = ("Could not contact DNS servers", "Error reading file")
"""c-ares' words for a resolver that is not there, or no sockets to ask it with."""

_CLOSING = "the proxy closes its connections"

DNS_TTL = 30
DNS_TIMEOUT = 0.5
"""Seconds for one try of a name server; aiodns' default waits 12 s for a silent one."""
DNS_TRIES = 2


class HopClient(Protocol):
    """Makes one HTTP request for a hop."""

    async def get(self, request: HopRequest, deadline: float) -> HopReply:
        """
        Ask once, and give the whole reply.

        *deadline* is a point on the loop's clock, in seconds. Redirects are given back as they
        are. Raises UpstreamError.
        """


class _Pool(Enum):
    TRUSTED = auto()
    GUARDED = auto()
    ONCE = auto()


class AiohttpClient:
    """
    The client on aiohttp: an async context manager over its pools of connections.

    Trusted requests (the operator's endpoints) and guarded ones (URLs that third parties named)
    never share a connection, so nothing guarded can ride on a socket that was not checked.
    *policy* guards the second; *resolver* makes a resolver of names, for tests and other tastes.
    """

    def __init__(
        self, policy: EgressPolicy, resolver: Callable[[], AbstractResolver] | None = None
    ) -> None:
        self._policy = policy
        self._resolver = resolver or default_resolver
        self._stack = AsyncExitStack()
        self._is_closing = False
        self._sessions: dict[_Pool, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            resolver = self._resolver()
            stack.push_async_callback(resolver.close)
            guard = guarded_socket_factory(self._policy)
            self._sessions = {
                _Pool.TRUSTED: _session(resolver, None),
                _Pool.GUARDED: _session(resolver, guard),
                _Pool.ONCE: _session(resolver, guard, reuse=False),
            }
            for session in self._sessions.values():
                await stack.enter_async_context(session)
            self._stack = stack.pop_all()
        self._is_closing = False
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What is still under way breaks off now, and nobody out there is to blame for it.
        self._is_closing = True
        self._sessions = {}
        await self._stack.aclose()

    async def get(self, request: HopRequest, deadline: float) -> HopReply:
        """Ask once, as :meth:`HopClient.get` says."""
        if not request.trusted and (problem := self._policy.url_problem(request.url)):
            raise EgressBlockedError(problem)
        if self._is_closing:
            raise UpstreamConnectError(_CLOSING, local=True)
        try:
            async with asyncio.timeout_at(deadline):
                return await self._ask(request)
        except TimeoutError:
            late = asyncio.get_running_loop().time() - deadline > ON_TIME
            raise UpstreamTimeoutError("no whole answer", late=late) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if self._is_closing:
                raise UpstreamConnectError(_CLOSING, local=True) from error
            raise _mapped(error) from error

    async def _ask(self, request: HopRequest) -> HopReply:
        pool = _Pool.ONCE if request.once else _Pool.GUARDED
        session = self._sessions[_Pool.TRUSTED if request.trusted else pool]
        async with session.get(
            wire_url(request.url), headers=request.headers, allow_redirects=False
        ) as response:
            return HopReply(
                response.status,
                tuple([(name.lower(), value) for name, value in response.headers.items()]),
                await _body(response, request.max_body),
            )

    def __repr__(self) -> str:
        return f"<AiohttpClient {'open' if self._sessions else 'closed'}>"


class _NoCookies(aiohttp.DummyCookieJar):
    """Each session of ours has a jar of its own; aiohttp's is never asked, nor made to parse."""

    def update_cookies_from_headers(self, headers: object, response_url: object) -> None:
        """Leave the headers unread: the session reads them itself."""


_Factory = Callable[[AddrInfoType], socket.socket]


def _session(
    resolver: AbstractResolver, factory: _Factory | None, *, reuse: bool = True
) -> aiohttp.ClientSession:
    connector = HopConnector(
        resolver=resolver,
        socket_factory=factory,
        limit=0 if reuse else MAX_REPORTS,
        keepalive_timeout=KEEPALIVE if reuse else None,
        force_close=not reuse,
        ttl_dns_cache=DNS_TTL,
    )
    return hop_session(
        connector,
        cookie_jar=_NoCookies(),
        # The hop's deadline is the only clock: aiohttp's total would be a second one.
        timeout=aiohttp.ClientTimeout(total=None),
        skip_auto_headers=("User-Agent", "Accept"),
    )


def _mapped(error: Exception) -> UpstreamError:
    """Say in our words what aiohttp or the system raised."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    # Where several addresses of a name are refused, aiohappyeyeballs folds them into one error.
    if isinstance(cause, EgressRefused):
        return EgressBlockedError(cause.reason)
    # Addresses refused for unlike reasons arrive as one error that has lost its type.
    if str(EgressRefused("")) in str(cause):
        return EgressBlockedError(str(cause))
    words = f"{type(error).__name__}: {' '.join(_said(error).split())}"[:300]
    unknown = isinstance(error, aiohttp.ClientConnectorDNSError)
    local = isinstance(cause, OSError) and (
        cause.errno in _OWN_FAULT or (unknown and any(each in words for each in _NO_RESOLVER))
    )
    # Where TLS failed it would fail again.
    is_tls = isinstance(error, aiohttp.ClientSSLError)
    if local or (isinstance(error, aiohttp.ClientConnectorError) and not is_tls):
        return UpstreamConnectError(words, local=local, unknown=unknown)
    return UpstreamError(words)


def _said(error: Exception) -> str:
    """Give what *error* says, without the URL: it may name a viewer, or hold a key."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{error.status}, {error.message}"
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError)):
        return "no usable URL"
    return str(error)


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read a body piece by piece: ``read()`` would unpack a bomb before anybody counts."""
    size = 0
    parts = []
    async for part in response.content.iter_any():
        size += len(part)
        if size > limit:
            response.close()
            raise UpstreamTooLargeError(f"the body is larger than {limit} bytes")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def default_resolver() -> AbstractResolver:
    """Make a resolver that does not wait for long, and needs no threads."""
    return aiohttp.AsyncResolver(timeout=DNS_TIMEOUT, tries=DNS_TRIES)
