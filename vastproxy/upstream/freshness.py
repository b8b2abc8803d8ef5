"""
How long an answer may be kept: by its own words, by its ads', and by the operator's.

Rule 1: these are plain functions. They know no clock; the time is an argument.
Rule 2: the operator's limits are the longest there are. What the answer says (RFC 9111, RFC 5861)
and what its ads say (``<Expires>``, VAST 4.3 section 3.4.10) shortens them, and never lengthens.
Rule 3: what cannot be read forbids: a number that is none is 0, a date that is none has passed.
Rule 4: the proxy is a shared cache in the sense of RFC 9111, for whomever it keeps an answer. What
is ``private`` is not kept for its viewer either.
"""

from dataclasses import dataclass
from math import inf

from vastproxy.model import HopReply
from vastproxy.session.cookies import parse_date

KEPT_STATUSES = frozenset({200, 204, 205})
"""An ad or none. All others are failures, or say nothing that is worth keeping."""

_ALWAYS_ALIKE = frozenset({"", "accept-encoding", "origin"})
"""Request headers that may stand in ``Vary``: bodies are kept unpacked, and no Origin is sent."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an answer may be kept at the most. Times are seconds."""

    ttl: float
    stale_while_revalidate: float = 0.0
    """From the end of the *ttl* on, while a new one is fetched."""
    stale_if_error: float = 0.0
    """From the end of the *ttl* on, where none can be fetched."""
    expires: float = inf
    """For how long its ads may be shown, from when it was made."""
    shared: bool = False
    """Whether it is kept for everybody: then ``s-maxage`` counts."""
    vary: frozenset[str] = frozenset()
    """Request headers, in lower case, that the key has."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long one answer is fresh, and for how long it may be used after that. In seconds."""

    ttl: float
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0

    @property
    def whole(self) -> float:
        """After so long it is of no use to anybody."""
        return self.ttl + max(self.stale_while_revalidate, self.stale_if_error)

    def within(self, limits: Limits) -> "Lifetime":
        """Shorten it to *limits*, which may be newer than it is."""
        return Lifetime(
            min(self.ttl, limits.ttl),
            min(self.stale_while_revalidate, limits.stale_while_revalidate),
            min(self.stale_if_error, limits.stale_if_error),
        )


def lifetime_of(
    reply: HopReply, limits: Limits, now: float, *, redirect: bool = False
) -> Lifetime | str:
    """
    Give how long *reply* may be kept; or, in a word, why it may not be.

    *now* is in Unix seconds: when it came. Of a *redirect*: how long what it leads to may be.
    """
    said = _directives(reply)
    if not redirect and reply.status not in KEPT_STATUSES:
        return "status"
    if reason := _forbidden(reply, said, limits.vary):
        return reason
    age = _age(reply)
    stated = _stated(reply, said, now, shared=limits.shared)
    ttl = min(limits.ttl, limits.expires - age, stated - age)
    if not ttl > 0:
        return "ttl"
    return Lifetime(
        ttl,
        _stale("stale-while-revalidate", said, limits, limits.expires - age - ttl),
        _stale("stale-if-error", said, limits, limits.expires - age - ttl),
    )


def _directives(reply: HopReply) -> dict[str, float]:
    """
    Read ``Cache-Control``: names in lower case, and the numbers that they have.

    Of a name that repeats the least counts. A comma in a quoted value cuts it, which makes more of
    it than there is, and so forbids more.
    """
    said: dict[str, float] = {}
    for part in ",".join(_all(reply, "cache-control")).split(","):
        name, _, value = part.partition("=")
        name = name.strip().lower()
        if name:
            said[name] = min(_number(value.strip().strip('"')), said.get(name, inf))
    return said


def _forbidden(reply: HopReply, said: dict[str, float], vary: frozenset[str]) -> str:
    """Say what forbids to keep *reply* for any time; empty where nothing does."""
    if reply.header("set-cookie") is not None:
        return "set-cookie"
    for each in ("no-store", "private", "no-cache"):
        if each in said:
            return each
    if not said and "no-cache" in (reply.header("pragma") or "").lower():
        return "no-cache"
    named = {each.strip().lower() for each in ",".join(_all(reply, "vary")).split(",")}
    return "vary" if named - vary - _ALWAYS_ALIKE else ""


def _stated(reply: HopReply, said: dict[str, float], now: float, *, shared: bool) -> float:
    """Give the freshness lifetime that *reply* states (RFC 9111 section 4.2.1); inf for none."""
    if shared and "s-maxage" in said:
        return said["s-maxage"]
    if "max-age" in said:
        return said["max-age"]
    expires = reply.header("expires")
    if expires is None:
        return inf
    end, date = parse_date(expires), parse_date(reply.header("date") or "")
    return 0.0 if end is None else end - (now if date is None else date)


def _stale(name: str, said: dict[str, float], limits: Limits, room: float) -> float:
    """Give for how long *reply* may be used when it is stale, if for the reason *name*."""
    if "must-revalidate" in said or "proxy-revalidate" in said:
        return 0.0
    limit = limits.stale_if_error if name == "stale-if-error" else limits.stale_while_revalidate
    # RFC 9111 section 5.2.2.10: s-maxage forbids it as well, unless it is explicitly allowed.
    unsaid = 0.0 if limits.shared and "s-maxage" in said else inf
    return max(0.0, min(limit, said.get(name, unsaid), room))


def _age(reply: HopReply) -> float:
    """Give how old *reply* was already (RFC 9111 section 5.1), where a cache stands before us."""
    text = (reply.header("age") or "").partition(",")[0]
    return _number(text.strip())


def _all(reply: HopReply, name: str) -> list[str]:
    return [value for key, value in reply.headers if key == name]


def _number(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() else 0.0
