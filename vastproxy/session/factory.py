"""Make sessions: the context of a new ad request, its macros, its empty jar."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import urlsplit

from vastproxy import __version__
from vastproxy.model import FrozenMapping
from vastproxy.observe.trace import Trace
from vastproxy.session.context import (
    SessionContext,
    new_cachebusting,
    new_correlator,
    new_request_id,
)
from vastproxy.session.cookies import CookieJar
from vastproxy.session.session import Request, Upstream, VastSession
from vastproxy.vast.macros import UNKNOWN, Macros

TimestampStyle = Literal["unix_ms", "iso8601"]

SERVER_AGENT = f"vastproxy/{__version__} (https://pypi.org/project/vastproxy)"
CLIENT_AGENT = f"unknown vastproxy/{__version__}"
"""``[CLIENTUA]`` where the player does not tell its own: VAST 4.3 section 6.4."""
SERVERSIDE = "1"
"""``[SERVERSIDE]``: a server asks, on behalf of a client that told it to (VAST 4.3 section 6.4)."""

MAX_VALUE = 2048
"""Characters of one macro's value: a Referer may have 8,190, and be asked for a hundred times."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_CORRELATOR = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, slots=True)
class SessionFactory:
    """
    Makes contexts and sessions.

    *now* gives Unix seconds; *is_public_suffix* keeps cookies from crossing registries.
    """

    is_public_suffix: Callable[[str], bool]
    now: Callable[[], float] = field(default=time.time)

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

    def create_session(
        self,
        context: SessionContext,
        upstream: Upstream,
        *,
        request: Request,
        jar: CookieJar | None = None,
        trace: Trace | None = None,
        timestamp: TimestampStyle = "unix_ms",
    ) -> VastSession:
        """Open a session of *context* at *upstream*."""
        return VastSession(
            context,
            upstream,
            jar=self.jar() if jar is None else jar,
            macros=macros_of(context, request, timestamp),
            request=request,
            trace=trace,
        )


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
