"""
What a cache of answers is asked, what it keeps, and what it says of it: values alone.

Rule 1: what is kept is bytes as they came, before any macro is filled, and nothing that was for who
asked: no headers but the type, no cookies, no parsed document.
Rule 2: no key and no ``repr`` has a viewer's id, or a URL that may have one.
Rule 3: what stands in the second level may be anything: it gives an answer or nothing.
"""

import json
import math
import re
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from lxml import etree

from vastproxy.config.units import Source
from vastproxy.errors import UpstreamError, VastError
from vastproxy.model import HopReply
from vastproxy.session.session import Fetched
from vastproxy.upstream.freshness import KEPT_STATUSES, Lifetime, Limits
from vastproxy.vast.document import VastDocument, child, local_name, text_of

DEFAULT_IGNORED = frozenset(
    ("cb", "cachebuster", "cachebusting", "correlator", "ord", "random", "rnd", "timestamp")
)
"""Query parameters that are another in each request, and change nothing about the answer."""

MAX_BYTES = 64 * 1024 * 1024

CLOCK_TOLERANCE = 2.0
"""
Seconds by which the clocks of instances that share a second level may differ. What comes from there
counts as so much older than it says.
"""

FORMAT = 1
"""Of what is in the second level, and of its keys."""

_MAX_HEAD = 64 * 1024
"""Bytes of what stands before a body; most of it is a URL."""
_DIGEST_BYTES = 20
# RFC 8941 section 3.3.4 (token) and 3.3.3 (string).
_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+.^_`|~0-9A-Za-z:/-]*")
_NO_STRING = re.compile(r"[^ -~]")
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,9}")

Word = Literal["hit", "stale", "miss", "collapsed", "pass", "bypass"]
"""
What the cache did: it gave what it had, fresh or stale; it had nothing; it gave what another was
just asking for; it had nothing, and nobody waits there; it had no part in it.
"""

_FORWARDED: dict[Word, str] = {
    "miss": "fwd=uri-miss",
    "collapsed": "fwd=uri-miss",
    "pass": "fwd=miss",
    "bypass": "fwd=bypass",
}


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What config.yaml says about the cache of one upstream. Times are seconds."""

    ttl: float = 300.0
    scope: Literal["viewer", "shared"] = "viewer"
    paid: bool = False
    """Whether its ads are sold one by one: then none is given to a second viewer."""
    vary: tuple[Source, ...] = ()
    """What of the player's request answers depend on."""
    ignore: frozenset[str] = DEFAULT_IGNORED
    """Query parameters of the entry URL that they do not depend on."""
    no_fill_ttl: float = 5.0
    """For "no ad"; 0: it is not kept."""
    stale_while_revalidate: float = 10.0
    stale_if_error: float = 300.0
    max_bytes: int = MAX_BYTES
    redis: bool = False
    """Whether there is a second level."""

    @property
    def is_shared(self) -> bool:
        """Whether an answer is for everybody."""
        return self.scope == "shared"

    def limits(self, *, filled: bool, expires: float | None = None) -> Limits:
        """Give how long an answer may be kept that is *filled*, and whose ads *expire*."""
        return Limits(
            ttl=self.ttl if filled else min(self.ttl, self.no_fill_ttl),
            stale_while_revalidate=self.stale_while_revalidate if filled else 0.0,
            stale_if_error=self.stale_if_error if filled else 0.0,
            expires=math.inf if expires is None else expires,
            shared=self.is_shared,
            vary=frozenset(each.name for each in self.vary if each.kind == "header"),
        )


@dataclass(frozen=True, slots=True)
class Asking:
    """What of a request its answer may depend on."""

    url: str = field(repr=False)
    """The entry URL as it would go out, without volatile macros and parameters of the session."""
    viewer: str = field(default="", repr=False)
    """Empty: not known."""
    varying: tuple[str, ...] = field(default=(), repr=False)
    """The values of the declared vary set, and of the upstream's own headers."""
    has_cookies: bool = False
    """Whether a Cookie header would be sent."""
    deadline: float = math.inf
    """On the loop's clock: then who waits for another's request gives up."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides, besides HTTP, whether an answer may be kept, and for whom."""

    filled: bool
    """Whether it has ads; wrappers count."""
    priced: bool
    """Whether any of them has a price."""
    expires: float | None
    """The least ``<Expires>`` of its ads, in seconds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the entry answered, or had answered before."""

    fetched: Fetched
    facts: Facts
    live: object | None = None
    """The parsed document, of who asked himself."""


@dataclass(frozen=True, slots=True)
class CacheVerdict:
    """What the cache did for one request."""

    word: Word
    stored: bool = False
    age: float = 0.0
    """Seconds since what is given was fetched."""
    ttl: float = 0.0
    """Seconds for which it is still fresh; negative where it is stale."""
    reason: str = ""
    """Why it is not stored, or stale, or the cache had no part in it."""
    outdated: bool = False
    """Whether there was one, but too old to be given."""
    error: UpstreamError | VastError | None = None
    """For what a stale answer stands in."""

    def header(self, upstream: str) -> str:
        """Give the member of ``Cache-Status`` (RFC 9211); players may see it, so it has no why."""
        if self.word in ("hit", "stale"):
            parts = ["hit", f"ttl={math.floor(self.ttl)}"]
        else:
            is_stale = self.word == "miss" and self.outdated
            parts = ["fwd=stale" if is_stale else _FORWARDED[self.word]]
            parts += ["stored"] if self.stored else []
            parts += ["collapsed"] if self.word == "collapsed" else []
        return "; ".join(["vastproxy", *parts, f"detail={_item(upstream)}"])

    @property
    def words(self) -> str:
        """The same for logs: ``miss, stored``, ``stale (revalidating)``."""
        stored = ", stored" if self.stored else ""
        return f"{self.word}{stored} ({self.reason})" if self.reason else f"{self.word}{stored}"


def key_of(name: str, settings: CacheSettings, asking: Asking) -> str:
    """
    Give the key under which *asking*'s answer is kept, for the upstream *name*.

    What may not be mixed is in it: classes, paid and unpaid, and the viewer of a personal answer.
    """
    viewer = "" if settings.is_shared else asking.viewer
    vary = tuple(map(str, settings.vary))
    url = _without(asking.url, settings.ignore)
    # The text of a tuple has quotes around its parts: no two tuples have the same.
    whole = repr((url, vary, asking.varying, viewer)).encode("utf-8", "surrogatepass")
    digest = blake2b(whole, digest_size=_DIGEST_BYTES).hexdigest()
    sold = "paid" if settings.paid else "free"
    return f"{FORMAT}:{name}:{settings.scope}:{sold}:{digest}"


def facts_of_document(document: VastDocument) -> Facts:
    """Read what decides whether *document* may be kept, and for whom."""
    ads = [each for each in document.ads if each.is_inline or each.is_wrapper]
    expires = [
        each
        for ad in ads
        if (found := child(ad.body, "Expires")) is not None
        for each in _seconds(text_of(found))
    ]
    return Facts(
        filled=bool(ads) or _has_impressions(document),
        # Anywhere: a price in an extension is one as well, and one in what is no ad to us.
        priced=next(document.root.iter("{*}Pricing"), None) is not None,
        expires=min(expires, default=None),
    )


def _has_impressions(document: VastDocument) -> bool:
    """Whether *document* has what a player that is less strict than we are may show and count."""
    found = (local_name(each).lower() for each in document.root.iter(etree.Element))
    return "impression" in found


def _without(url: str, ignored: frozenset[str]) -> str:
    """Take the parameters *ignored* out of the query of *url*; all else stays byte for byte."""
    path, mark, query = url.partition("#")[0].partition("?")
    kept = [each for each in query.split("&") if each.partition("=")[0] not in ignored]
    return f"{path}?{'&'.join(kept)}" if mark and any(kept) else path


def _seconds(text: str) -> tuple[float, ...]:
    """Read a number of seconds, at least 0; nothing where there is none."""
    return (max(0.0, float(text)),) if _WHOLE_NUMBER.fullmatch(text) else ()


def _item(text: str) -> str:
    """Write *text* as a token where it is one, else as a string (RFC 8941 section 3.3)."""
    if _TOKEN.fullmatch(text):
        return text
    escaped = _NO_STRING.sub("?", text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def kept_form(answer: Answer) -> Answer:
    """Give what of *answer* may be kept: what is for who asked alone is left out."""
    reply = answer.fetched.reply
    kind = reply.header("content-type")
    headers = () if kind is None else (("content-type", kind),)
    fetched = Fetched(HopReply(reply.status, headers, reply.body), answer.fetched.url)
    return Answer(fetched, answer.facts)


def encoded(answer: Answer, lifetime: Lifetime, fetched: float) -> bytes:
    """Write *answer*, fetched at *fetched* in Unix seconds, for the second level."""
    reply, facts = answer.fetched.reply, answer.facts
    head = {
        "format": FORMAT,
        "fetched": fetched,
        "ttl": lifetime.ttl,
        "revalidate": lifetime.stale_while_revalidate,
        "error": lifetime.stale_if_error,
        "status": reply.status,
        "type": reply.header("content-type"),
        "url": answer.fetched.url,
        "filled": facts.filled,
        "priced": facts.priced,
        "expires": facts.expires,
        "size": len(reply.body),
    }
    return json.dumps(head).encode() + b"\n" + reply.body


def decoded(value: bytes, now: float) -> tuple[Answer, Lifetime, float] | None:
    """
    Read what :func:`encoded` wrote: the answer, its lifetime, and how many seconds old it is.

    *now* is in Unix seconds. None for anything else, and for what comes from the future.
    """
    line, _, body = value.partition(b"\n")
    if len(line) > _MAX_HEAD:
        return None
    try:
        head = json.loads(line)
        read = _read(head, body)
        age = now - float(head["fetched"]) if read is not None else math.inf
    # Deep nesting gives the third, a number of a thousand digits the last.
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None
    if read is None or not -CLOCK_TOLERANCE <= age < math.inf:
        return None
    return *read, max(0.0, age) + CLOCK_TOLERANCE


def _read(head: Any, body: bytes) -> tuple[Answer, Lifetime] | None:  # noqa: ANN401 - any JSON
    match head:
        case {
            "format": int(form),
            "fetched": float() | int(),
            "ttl": float() | int() as ttl,
            "revalidate": float() | int() as revalidate,
            "error": float() | int() as error,
            "status": int(status),
            "type": str() | None as kind,
            "url": str(url),
            "filled": bool(filled),
            "priced": bool(priced),
            "expires": float() | int() | None as expires,
            "size": int(size),
        } if form == FORMAT and size == len(body) and status in KEPT_STATUSES:
            lifetime = Lifetime(float(ttl), float(revalidate), float(error))
            headers = () if kind is None else (("content-type", kind),)
            fetched = Fetched(HopReply(status, headers, body), url)
            answer = Answer(fetched, Facts(filled, priced, expires))
            return (answer, lifetime) if math.isfinite(lifetime.whole) else None
    return None
