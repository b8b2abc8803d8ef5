"""What happened to one ad request: facts for the log, for ``Server-Timing`` and for people."""

from dataclasses import dataclass, field
from typing import Literal

What = Literal[
    "ad",
    "no_ad",
    "failed",
    "breaker",
    "rate_limit",
    "busy",
    "capped",
    "over_budget",
    "late",
    "cancelled",
    "not_asked",
]
"""
What became of an upstream in the waterfall: it gave an ad, or none; it failed; the proxy did not
ask it (open breaker, rate, too many calls, cap, budget, no time left); it passed its soft limit and
the next was started; another was quicker.
"""

BreakerState = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One step of the waterfall."""

    upstream: str
    what: What
    milliseconds: float
    """From the beginning of the ad request."""
    detail: str = ""
    """Why, in words."""


@dataclass(frozen=True, slots=True)
class BreakerChange:
    """A circuit breaker that changed its state."""

    breaker: str
    """The upstream's name, or the site of a hop."""
    old: BreakerState
    new: BreakerState
    reason: str
    """In words."""

    def __str__(self) -> str:
        return f"{self.breaker} {self.old}->{self.new}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request of a hop. A hop has more than one where it was redirected."""

    url: str
    """As it went out."""
    milliseconds: float
    status: int | None = None
    """None: no whole answer came."""
    size: int = 0
    """Bytes of the body, unpacked."""
    cookies_sent: tuple[str, ...] = ()
    """Names."""
    cookies_set: tuple[str, ...] = ()
    """Names."""


@dataclass(frozen=True, slots=True)
class AdFact:
    """An ad that a hop's document held."""

    id: str
    system: str
    kind: str
    """``InLine``, ``Wrapper`` or ``empty``."""
    sequence: int | None


@dataclass(frozen=True, slots=True)
class Hop:
    """One document asked for, and what came."""

    number: int
    """In the order in which hops began, from 1."""
    parent: int | None
    """The hop whose wrapper led here; None for the entry."""
    depth: int
    """Wrappers above: 0 for the entry."""
    upstream: str
    url: str
    """As the ad server wrote it, macros and all."""
    exchanges: tuple[Exchange, ...]
    milliseconds: float
    version: str = ""
    ads: tuple[AdFact, ...] = ()
    repairs: tuple[str, ...] = ()
    code: int | None = None
    """The VAST code of what went wrong."""
    problem: str = ""
    """The same in words."""
    refused: str = ""
    """By what the proxy was kept from asking: ``breaker``, ``rate_limit`` or ``busy``."""
    cache: str = ""
    """What the cache did, in words; empty where there is none."""


@dataclass(slots=True)
class Trace:
    """The hops of one ad request. Grows while it is served."""

    detailed: bool = False
    """Whether hops also tell the ads of their documents: for people who ask why."""
    hops: list[Hop] = field(default_factory=list)
    begun: int = 0
    choices: list[Choice] = field(default_factory=list)
    """The steps of the waterfall."""
    changes: list[BreakerChange] = field(default_factory=list)
    """Breakers that changed because of this request."""
    shadowed: list[str] = field(default_factory=list)
    """Breakers that would have refused a call, and only watch."""
    blamed: set[str] = field(default_factory=set)
    """Sites of hops that have failed once: a pod that names one often is one failure of it."""
    cache_status: list[str] = field(default_factory=list)
    """Members of the header ``Cache-Status`` (RFC 9211)."""

    def begin(self) -> int:
        """Give the number of a hop that begins."""
        self.begun += 1
        return self.begun

    def add(self, hop: Hop) -> None:
        """Keep a hop that has ended."""
        self.hops.append(hop)

    def ordered(self) -> list[Hop]:
        """Give the hops in the order in which they began."""
        return sorted(self.hops, key=lambda each: each.number)
