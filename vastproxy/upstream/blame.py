"""
Whose fault it was: what one HTTP call says about the ad server that was asked.

Rule 1: a failure is what another viewer would meet as well: no connection, a connection that
breaks, an answer that is none, a status from 500 on, no answer in a time that was fair.
Rule 2: any other whole answer is a success, 404 and "no ad" too: the server is there.
Rule 3: neutral is what tells nothing about the server: the caller went away, the deadline of the
ad request left it less than FAIR of its own time, this process was busy when its answer came, an
address that hops may not reach, sockets that this machine did not have. Where strangers name the
hosts, a name that does not exist is neutral too: anybody can make one up below another's domain.
"""

import asyncio
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

from vastproxy.errors import (
    EgressBlockedError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamTimeoutError,
)
from vastproxy.model import HopReply

FAIR = 0.5
"""Share of an upstream's own time limit: who had less has not failed by not answering."""

_SERVER_ERROR = 500
_TOO_MANY_REQUESTS = 429

Outcome = Literal["ok", "failed", "neutral"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a call says about the ad server."""

    outcome: Outcome
    reason: str = ""
    """Why it failed, in words."""
    retry_after: float | None = None
    """Seconds for which the server asked to be left alone."""


OK = Judgement("ok")
NEUTRAL = Judgement("neutral")


def of_reply(reply: HopReply, now: float) -> Judgement:
    """Judge a whole *reply*; *now* is in Unix seconds, for dates in ``Retry-After``."""
    if reply.status < _TOO_MANY_REQUESTS:
        return OK
    wait = retry_after(reply.header("retry-after"), now)
    if reply.status >= _SERVER_ERROR or (reply.status == _TOO_MANY_REQUESTS and wait is not None):
        return Judgement("failed", f"HTTP status {reply.status}", wait)
    return OK


def of_error(error: BaseException, *, fair: bool, made_up: bool = False) -> Judgement:
    """
    Judge a call that ended in *error*.

    *fair* says whether it had a fair time to answer, *made_up* whether a stranger named its host.
    """
    match error:
        case UpstreamTimeoutError():
            is_neutral = error.late or not fair
        case UpstreamConnectError():
            is_neutral = error.local or (error.unknown and made_up)
        case EgressBlockedError():
            is_neutral = True
        case _:
            # Cancelled, or a mistake of ours: neither is the server's.
            is_neutral = not isinstance(error, UpstreamError)
    return NEUTRAL if is_neutral else Judgement("failed", str(error))


def retry_after(value: str | None, now: float) -> float | None:
    """Give the seconds that ``Retry-After`` names (RFC 9110 section 10.2.3); None for none."""
    text = (value or "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def had_fair_time(limit: float, own: float) -> bool:
    """Tell whether a call that ends at *limit*, on the loop's clock, has FAIR of *own* seconds."""
    return limit - asyncio.get_running_loop().time() >= FAIR * own
