"""
Frequency caps: which of them an ad meets, and what it claims under each.

Rule 1: everything here is decided from the route, the viewer and the ad; nothing waits.
Rule 2: a cap by viewer alone is claimed before an ad server is asked; one that needs to know the
ad, when the ad is there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from vastproxy.state.base import Claim
from vastproxy.state.windows import Span, counter_key
from vastproxy.vast.facts import AdFacts

By = Literal["viewer", "campaign", "advertiser", "creative", "ad"]
When = Literal["impression", "decision"]
Mode = Literal["enforce", "shadow"]


@dataclass(frozen=True, slots=True)
class Cap:
    """A frequency cap, ready to be used. Those that are switched off are not made."""

    scope: str
    """Its name, or its route's path: what its counter is kept under."""
    limit: int
    span: Span
    by: By = "viewer"
    count_at: When = "impression"
    when_unknown: Literal["serve", "skip"] = "serve"
    mode: Mode = "enforce"
    pod: bool = False
    """Counts the ads of one answer, and nothing else."""
    ttl_ms: int = 600_000
    """How long a reservation waits for its impression."""
    upstreams: frozenset[str] | None = None
    """Whose ads it is for; None: everybody's."""

    @property
    def waits_for_ad(self) -> bool:
        """Whether it can be judged only when the ad is there."""
        return self.pod or self.by != "viewer"

    @property
    def enforced(self) -> bool:
        """Whether an ad above the limit is not served."""
        return self.mode == "enforce"

    def covers(self, upstream: str) -> bool:
        """Tell whether it is for the ads of *upstream*."""
        return self.upstreams is None or upstream in self.upstreams

    def subject(self, facts: AdFacts) -> str:
        """Give what of the ad it counts by; empty where the ad does not say it."""
        match self.by:
            case "viewer":
                return "viewer"
            case "campaign":
                return facts.campaign
            case "advertiser":
                return facts.advertiser
            case "creative":
                return facts.creative
            case "ad":
                return facts.ad

    def claim(self, subject: str, now: int) -> Claim:
        """Claim one ad under this cap, at *now* in Unix milliseconds."""
        named = "" if self.by == "viewer" else f"{self.by} {subject}"
        key = counter_key(self.span, self.scope, named)
        return Claim(key, 1, self.limit, self.span.at(now), enforced=self.enforced)

    def __str__(self) -> str:
        where = "in one answer" if self.pod else str(self.span)
        return f"cap of {self.scope}: {self.limit} by {self.by} {where}"


@dataclass(frozen=True, slots=True)
class Claimed:
    """
    Caps, and what is claimed under each.

    Those counted at once are apart from those shown later, and those for some upstreams from those
    for others: so what two upstreams have in common can be told, and shared.
    """

    caps: tuple[Cap, ...]
    claims: tuple[Claim, ...]
    count_at: When
    ttl_ms: int


def claimed(pairs: Iterable[tuple[Cap, str]], now: int) -> list[Claimed]:
    """
    Put caps and their subjects into as few holds as may be.

    That is one for each time of counting, and for each set of upstreams that caps cover.

    Of caps that share a counter one counts: the strictest; of those alike, the first.
    """
    found: dict[str, tuple[Cap, Claim]] = {}
    for cap, subject in pairs:
        claim = cap.claim(subject, now)
        there = found.get(claim.key)
        if there is None or _stricter(claim, there[1]):
            found[claim.key] = (cap, claim)
    groups: dict[tuple[When, frozenset[str] | None], list[tuple[Cap, Claim]]] = {}
    for cap, claim in found.values():
        groups.setdefault((cap.count_at, cap.upstreams), []).append((cap, claim))
    return [_together(when, group) for (when, _), group in groups.items()]


def _together(when: When, group: Sequence[tuple[Cap, Claim]]) -> Claimed:
    caps = tuple(cap for cap, _ in group)
    claims = tuple(claim for _, claim in group)
    return Claimed(caps, claims, when, max(each.ttl_ms for each in caps))


def _stricter(one: Claim, other: Claim) -> bool:
    if one.enforced != other.enforced:
        return one.enforced
    return (one.limit or 0) < (other.limit or 0)


class PodCount:
    """Counts the ads of one answer, for the caps of kind ``pod``."""

    def __init__(self, caps: Sequence[Cap]) -> None:
        self._caps = caps
        self._taken: dict[tuple[int, str], int] = {}

    def full(self, facts: AdFacts) -> list[Cap]:
        """Give the caps that have no room for the ad."""
        return [
            cap for at, cap in enumerate(self._caps) if self._count(at, cap, facts) >= cap.limit
        ]

    def _count(self, at: int, cap: Cap, facts: AdFacts) -> int:
        subject = cap.subject(facts)
        # An ad that does not say whose it is cannot be one too many of anybody's.
        return self._taken.get((at, subject), 0) if subject else -1

    def take(self, facts: AdFacts) -> None:
        """Count the ad."""
        for at, cap in enumerate(self._caps):
            key = (at, cap.subject(facts))
            self._taken[key] = self._taken.get(key, 0) + 1
