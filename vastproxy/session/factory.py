"""Make sessions: the context of a new ad request, its macros, its empty jar."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import structlog

from vastproxy.model import AdRequest, FrozenMapping
from vastproxy.observe.trace import Trace
from vastproxy.session.context import (
    SessionContext,
    new_cachebusting,
    new_correlator,
    new_request_id,
)
from vastproxy.session.cookies import CookieJar, public_suffix_test
from vastproxy.session.seals import ViewerNames
from vastproxy.session.session import Keeping, Request, TimestampStyle, Upstream, VastSession
from vastproxy.state.base import StateBackend
from vastproxy.vast.macros import UNKNOWN, Macros
from vastproxy.version import __version__

LIBRARY_SECRET = "vastproxy library"  # noqa: S105 - known to everybody, and said so
"""
What the names of viewers hang on where nobody gives a secret.

It is the same in all processes, so that they count the same viewer as one. It keeps nobody who
reads the state from trying ids: for that, give a secret of your own.
"""

UID = "uid"
"""The cookie that says who the viewer is, to the entry upstream and to the library."""

SERVER_AGENT = f"vastproxy/{__version__} (https://pypi.org/project/vastproxy)"
CLIENT_AGENT = f"unknown vastproxy/{__version__}"
"""``[CLIENTUA]`` where the player does not tell its own: VAST 4.3 section 6.4."""
SERVERSIDE = "1"
"""``[SERVERSIDE]``: a server asks, on behalf of a client that told it to (VAST 4.3 section 6.4)."""

MAX_VALUE = 2048
"""Characters of one macro's value: a Referer may have 8,190, and be asked for a hundred times."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CORRELATOR = re.compile(r"[!-~]{1,128}")


def _suffixes_when_asked() -> Callable[[str], bool]:
    """Give a test for public suffixes that loads their list when it is first needed: 60 ms."""
    loaded = cache(public_suffix_test)

    def is_public_suffix(name: str) -> bool:
        return loaded()(name)

    return is_public_suffix


def _library_names() -> ViewerNames:
    return ViewerNames((LIBRARY_SECRET,))


def _log() -> Any:  # noqa: ANN401 - structlog's loggers have no one type
    return structlog.get_logger("vastproxy.session")


@dataclass(frozen=True, slots=True)
class SessionFactory:
    """
    Makes contexts and sessions.

    The library's sessions ask *upstream*, and count in *state_backend*; the proxy's are opened at
    upstreams of its choice, and count nothing. *is_public_suffix* keeps cookies from crossing
    registries; *names* makes the names that viewers have in the state (processes that share a
    state need the same secret); *now* gives Unix seconds.
    """

    upstream: Upstream | None = None
    state_backend: StateBackend | None = None
    is_public_suffix: Callable[[str], bool] = field(
        default_factory=_suffixes_when_asked, kw_only=True, repr=False
    )
    names: ViewerNames = field(default_factory=_library_names, kw_only=True, repr=False)
    now: Callable[[], float] = field(default=time.time, kw_only=True, repr=False)
    log: Any = field(default_factory=_log, kw_only=True, repr=False, compare=False)

    def context(
        self,
        *,
        request_id: str = "",
        correlator: str = "",
        cookies: Mapping[str, str] | None = None,
    ) -> SessionContext:
        """
        Make the context of a new ad request.

        *request_id* and *correlator* are taken over where they are usable, else made.
        """
        return SessionContext(
            timestamp=int(self.now() * 1000),
            correlator=correlator if _CORRELATOR.fullmatch(correlator) else new_correlator(),
            cachebusting=new_cachebusting(),
            cookies=FrozenMapping(cookies),
            request_id=request_id if _REQUEST_ID.fullmatch(request_id) else new_request_id(),
        )

    def jar(self) -> CookieJar:
        """Make an empty jar."""
        return CookieJar(self.is_public_suffix)

    async def create_session(
        self, user_id: str = "", device_id: str = "", publisher_id: str = ""
    ) -> VastSession:
        """
        Open a session at the factory's upstream, for code that has no player's request.

        The ids become the cookies ``uid``, ``device_id`` and ``publisher_id`` that the upstream is
        sent; those that are empty are left out.
        """
        if self.upstream is None:
            raise ValueError("this factory has no upstream (write SessionFactory(upstream, ...))")
        ids = {UID: user_id, "device_id": device_id, "publisher_id": publisher_id}
        context = self.context(cookies={name: each for name, each in ids.items() if each})
        return self.session_of(context, self.upstream)

    def session_of(
        self, context: SessionContext, upstream: Upstream, jar: CookieJar | None = None
    ) -> VastSession:
        """Open a session of the library at *upstream*; its cookie ``uid`` says who watches."""
        return VastSession(
            context,
            upstream,
            jar=self.jar() if jar is None else jar,
            request=(request := Request(AdRequest(""), viewer=context.cookies.get(UID, ""))),
            macros=macros_of(context, request, upstream.timestamp),
            keeping=Keeping(self.state_backend, self.names),
            log=self.log,
        )

    def open_session(
        self,
        context: SessionContext,
        upstream: Upstream,
        *,
        request: Request,
        jar: CookieJar | None = None,
        trace: Trace | None = None,
        timestamp: TimestampStyle = "unix_ms",
    ) -> VastSession:
        """Open a session of the proxy, for a player's *request*, at *upstream*."""
        return VastSession(
            context,
            upstream,
            jar=self.jar() if jar is None else jar,
            macros=macros_of(context, request, timestamp),
            request=request,
            trace=trace,
            log=self.log,
        )

    def __repr__(self) -> str:
        return f"<SessionFactory {self.upstream!r}, {self.state_backend!r}>"


def macros_of(context: SessionContext, request: Request, timestamp: TimestampStyle) -> Macros:
    """Say what the proxy knows of the macros of one ad request (docs/vast.md)."""
    device = request.device
    values: dict[str, str | Callable[[], str]] = {
        "TIMESTAMP": str(context.timestamp) if timestamp == "unix_ms" else _iso(context.timestamp),
        "CACHEBUSTING": context.cachebusting,
        "CORRELATOR": context.correlator,
        "TRANSACTIONID": lambda: context.transaction_id,
        "CLIENTUA": CLIENT_AGENT,
        "SERVERUA": SERVER_AGENT,
        "SERVERSIDE": SERVERSIDE,
        "ADTYPE": "video",
    }
    if device.ip:
        values["DEVICEIP"] = device.ip
    if device.user_agent:
        values["DEVICEUA"] = device.user_agent
    if device.referer:
        values["PAGEURL"] = device.referer
        values["DOMAIN"] = lambda: _host(device.referer) or UNKNOWN
    values.update(request.macros)
    return Macros({name: _bounded(each) for name, each in values.items()})


def _bounded(value: str | Callable[[], str]) -> str | Callable[[], str]:
    return value[:MAX_VALUE] if isinstance(value, str) else value


def _host(url: str) -> str:
    """Give the host of *url*; empty where it is no URL."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _iso(timestamp: int) -> str:
    """Write Unix milliseconds as VAST 4.3 section 6.2 wants ``[TIMESTAMP]``."""
    return datetime.fromtimestamp(timestamp / 1000, UTC).isoformat(timespec="milliseconds")
