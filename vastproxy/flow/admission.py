"""
Whether an ad may be served: the caps and the budget of one ad request.

The order of things: before an ad server is asked, room is reserved under the caps by viewer, and
the budget is looked at; when ads have come, each is judged by who it is and what it costs; when
the answer is made, what it holds is counted, or left to its beacon; the rest is given back.

Rule 1: what is reserved belongs to the request's :class:`Reservations`, which forget nothing.
Rule 2: where the state is away, caps count in this process alone, and budgets do as they say.
Rule 3: an ad has an operation id of its own, random, so that nobody can claim another's.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from vastproxy.errors import StateBackendError
from vastproxy.flow.budgets import Budget
from vastproxy.flow.caps import Cap, Claimed, PodCount, When, claimed
from vastproxy.flow.leases import Leases
from vastproxy.session.reservations import Reservations
from vastproxy.state.base import Account, Claim, Hold, Verdict
from vastproxy.state.guard import GuardedState
from vastproxy.vast.document import Ad
from vastproxy.vast.facts import AdFacts, facts_of
from vastproxy.vast.unwrap import ResolvedAd

OPERATION_BYTES = 12
"""Of an operation's id: 96 random bits."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a route asks of its ads."""

    caps: tuple[Cap, ...] = ()
    budget: Budget | None = None
    keep_ms: int = 86_400_000
    """How long beacons are taken, so how long a counted ad is remembered."""

    @property
    def viewer_caps(self) -> tuple[Cap, ...]:
        """Those that can be claimed before the ad is there."""
        return tuple(each for each in self.caps if not each.waits_for_ad)

    def __bool__(self) -> bool:
        return bool(self.caps or self.budget)


@dataclass(slots=True)
class Granted:
    """What one ad has been granted: to be counted when it is shown, or when it is answered."""

    shown: list[Hold] = field(default_factory=list)
    answered: list[Hold] = field(default_factory=list)
    entry: "Granted | None" = None
    """What had been reserved before the ad came."""
    leased: tuple[str, str, int] | None = None
    """Campaign, lease and price, where the money comes from a lease."""

    @property
    def own(self) -> list[Hold]:
        """What was reserved for this ad."""
        return self.shown + self.answered

    def add(self, hold: Hold, count_at: When) -> None:
        """Add *hold*."""
        (self.answered if count_at == "decision" else self.shown).append(hold)

    def join(self, other: "Granted") -> None:
        """Add what *other* was granted."""
        self.shown += other.shown
        self.answered += other.answered


class Admission:
    """
    Decides on the ads of one ad request.

    *viewer* is the viewer's name in the state, empty for nobody; *now* gives Unix milliseconds;
    from *deadline* on, on the loop's clock, ads that are not judged yet are refused.
    """

    def __init__(
        self,
        terms: Terms,
        viewer: str,
        state: GuardedState,
        leases: Leases,
        now: Callable[[], int],
        deadline: float = float("inf"),
    ) -> None:
        self._terms = terms
        self._deadline = deadline
        self._viewer = Account("viewer", viewer) if viewer else None
        self._state = state
        self._leases = leases
        self._now = now
        self._reservations = Reservations(state)
        self._operation = secrets.token_urlsafe(OPERATION_BYTES)
        self._count = 0
        self._upstream = ""
        self._entry: Granted | None = None
        """What was reserved before the ad server was asked; the first good ad takes it."""
        self._entry_claims: list[Claimed] = []
        self._entry_is_free = True
        self._pod = PodCount(())
        self._needs_facts = bool(terms.budget) or any(each.waits_for_ad for each in terms.caps)
        self._granted: dict[Ad, Granted] = {}
        self.flags: dict[str, None] = {}
        """What happened, in the access log's words."""
        self.reasons: list[str] = []
        """Why something was not served, or would not have been."""

    # --- Before an ad server is asked -----------------------------------------------------------

    async def before(self, upstream: str) -> bool:
        """Reserve what can be before *upstream* is asked; False if it need not be."""
        await self._drop_granted()
        self._upstream = upstream
        caps = [each for each in self._terms.caps if each.covers(upstream)]
        self._pod = PodCount([each for each in caps if each.pod])
        if not self._viewer_known(caps):
            return False
        return await self._reserve_entry(caps) and await self._has_money(upstream)

    def _viewer_known(self, caps: Sequence[Cap]) -> bool:
        """Tell whether the request may go on without a viewer, if there is none."""
        if self._viewer is not None:
            return True
        skipping = [each for each in caps if not each.pod and each.when_unknown == "skip"]
        for each in skipping:
            self._note(f"{each}: the viewer is not known", "capped", enforced=each.enforced)
        return not any(each.enforced for each in skipping)

    async def _drop_granted(self) -> None:
        """Give back what ads of an upstream were granted that came to nothing after all."""
        while self._granted:
            # Taken out first: who is cut off here must not give it back once more in the end.
            _, each = self._granted.popitem()
            await self._give_back(each)
        self._entry_is_free = True

    async def _reserve_entry(self, caps: Sequence[Cap]) -> bool:
        wanted = self._viewer_claims(caps)
        if wanted and wanted == self._entry_claims:
            # The same room for the next upstream; or none, and asking again gives no more.
            return self._entry is not None
        if self._entry is not None:
            await self._reservations.release(self._entry.own)
        self._entry_claims = wanted
        self._entry = await self._reserve_claims(wanted)
        return self._entry is not None

    def _viewer_claims(self, caps: Sequence[Cap]) -> list[Claimed]:
        if self._viewer is None:
            return []
        return claimed([(each, "viewer") for each in caps if not each.waits_for_ad], self._now())

    async def _has_money(self, upstream: str) -> bool:
        """Tell whether the budget is worth asking *upstream* for an ad."""
        budget = self._terms.budget
        if budget is None or not budget.covers(upstream) or not budget.enforced:
            return True
        price = max(budget.price or 0, 1)
        if budget.on_state_loss == "lease" and self._leases.has(budget, price):
            return True
        try:
            [level] = await self._state.levels(budget.account, [budget.claim(0)])
        except StateBackendError:
            return self._serves_unpaid(budget)
        if level.counted + level.reserved + price <= budget.limit:
            return True
        self._note(f"{budget} is spent", "over_budget")
        return False

    def _serves_unpaid(self, budget: Budget) -> bool:
        """Say what happens to ads whose money cannot be reserved."""
        self.flags["state_away"] = None
        if budget.on_state_loss == "serve":
            return True
        self._note(f"{budget}: the state is away", "over_budget", enforced=budget.enforced)
        return not budget.enforced

    # --- When ads are there ---------------------------------------------------------------------

    async def judge(self, ads: Sequence[ResolvedAd]) -> Mapping[ResolvedAd, str]:
        """Say which of *ads* may not be served, and why; reserve what the others need."""
        refused: dict[ResolvedAd, str] = {}
        for ad in ads:
            reason = await self._admit(ad)
            if reason:
                refused[ad] = reason
        return refused

    async def _admit(self, ad: ResolvedAd) -> str:
        """Reserve what *ad* needs; give the reason why it is refused, empty for none."""
        if asyncio.get_running_loop().time() >= self._deadline:
            self._note("no time was left to ask for an ad's room", "no_time")
            return self.reasons[-1]
        facts = facts_of(ad) if self._needs_facts else AdFacts()
        before = len(self.reasons)
        granted = Granted()
        if await self._fits_caps(facts, granted) and await self._is_paid(facts, granted):
            self._pod.take(facts)
            self._granted[ad.inline] = granted
            return ""
        await self._give_back(granted)
        return "; ".join(self.reasons[before:]) or "refused"

    async def _give_back(self, granted: Granted) -> None:
        """Undo what an ad was granted; what was reserved before it came is for the next."""
        if granted.leased:
            self._leases.give_back(*granted.leased)
        if granted.entry is not None:
            self._entry_is_free = True
        await self._reservations.release(granted.own)

    async def _fits_caps(self, facts: AdFacts, granted: Granted) -> bool:
        caps = [each for each in self._terms.caps if each.covers(self._upstream)]
        if not self._fits_pod(facts):
            return False
        if not await self._take_viewer_holds(caps, granted):
            return False
        pairs = []
        for cap in caps if self._viewer is not None else ():
            if not cap.waits_for_ad or cap.pod:
                continue
            subject = cap.subject(facts)
            if subject:
                pairs.append((cap, subject))
            elif cap.when_unknown == "skip":
                what = f"{cap}: the ad does not name its {cap.by}"
                self._note(what, "capped", enforced=cap.enforced)
                if cap.enforced:
                    return False
        more = await self._reserve_claims(claimed(pairs, self._now()))
        if more is not None:
            granted.join(more)
        return more is not None

    def _fits_pod(self, facts: AdFacts) -> bool:
        full = self._pod.full(facts)
        for each in full:
            self._note(f"{each} is full", "capped", enforced=each.enforced)
        return not any(each.enforced for each in full)

    async def _take_viewer_holds(self, caps: Sequence[Cap], granted: Granted) -> bool:
        """Give the ad what was reserved before it came; a further ad needs its own."""
        if self._entry is not None and self._entry_is_free:
            self._entry_is_free = False
            granted.entry = self._entry
            return True
        more = await self._reserve_claims(self._viewer_claims(caps))
        if more is not None:
            granted.join(more)
        return more is not None

    async def _is_paid(self, facts: AdFacts, granted: Granted) -> bool:
        budget = self._terms.budget
        if budget is None or not budget.covers(self._upstream):
            return True
        price = budget.price_of(facts)
        if price is None:
            self.flags["unpriced"] = None
        if not price:
            return True
        if budget.on_state_loss == "lease" and budget.enforced:
            lease = self._leases.take(budget, price)
            if lease:
                granted.leased = (budget.campaign, lease, price)
                hold = self._hold(budget.account, (budget.claim(price),), budget.ttl_ms, lease)
                granted.add(hold, budget.count_at)
                return True
        return await self._reserve_money(budget, price, granted)

    async def _reserve_money(self, budget: Budget, price: int, granted: Granted) -> bool:
        hold = self._hold(budget.account, (budget.claim(price),), budget.ttl_ms)
        try:
            [verdict] = await self._reservations.reserve([hold])
        except StateBackendError:
            if not self._serves_unpaid(budget):
                return False
            granted.add(hold, budget.count_at)
            return True
        if not verdict.granted or verdict.over:
            self._note(f"{budget} is spent", "over_budget", enforced=budget.enforced)
            return not budget.enforced
        granted.add(hold, budget.count_at)
        return True

    # --- Reserving ------------------------------------------------------------------------------

    def _hold(
        self, account: Account, claims: tuple[Claim, ...], ttl_ms: int, lease: str = ""
    ) -> Hold:
        self._count += 1
        operation = f"{self._operation}.{self._count}"
        return Hold(account, operation, claims, ttl_ms, self._terms.keep_ms, lease)

    async def _reserve_claims(self, wanted: Sequence[Claimed]) -> Granted | None:
        """Reserve *wanted* of the viewer; None, and noted, where there is no room."""
        granted = Granted()
        if not wanted or self._viewer is None:
            return granted
        holds = [self._hold(self._viewer, each.claims, each.ttl_ms) for each in wanted]
        try:
            verdicts = await self._reservations.reserve(holds)
        except StateBackendError:
            # Counted here meanwhile, and where it belongs when it is shown: the ids are the same.
            self.flags["state_away"] = None
            verdicts = await self._state.reserve_meanwhile(holds)
        refused = False
        for each, hold, verdict in zip(wanted, holds, verdicts, strict=True):
            refused |= not self._taken(each, hold, verdict, granted)
        if refused:
            await self._reservations.release(granted.own)
            return None
        return granted

    def _taken(self, wanted: Claimed, hold: Hold, verdict: Verdict, granted: Granted) -> bool:
        """Add *hold* to what is *granted*; False if it was refused."""
        if not verdict.granted:
            at = verdict.refused
            what = f"{wanted.caps[at]} is full" if at is not None else "given back before"
            self._note(what, "capped")
            return False
        for at in verdict.over:
            self._note(f"{wanted.caps[at]} is full", "capped", enforced=False)
        left = tuple(each for at, each in enumerate(hold.claims) if at not in verdict.over)
        if left:
            granted.add(replace(hold, claims=left), wanted.count_at)
        return True

    def _note(self, reason: str, flag: str, *, enforced: bool = True) -> None:
        self.flags[flag if enforced else f"shadow_{flag}"] = None
        self.reasons.append(reason if enforced else f"{reason} (shadow)")

    # --- When the answer is made ----------------------------------------------------------------

    async def serve(self, ads: Sequence[Ad]) -> list[list[Hold]]:
        """Take it that *ads* are answered: count what counts now; give what waits for beacons."""
        waiting: list[list[Hold]] = []
        now: list[Hold] = []
        for ad in ads:
            granted = self._granted.pop(ad, Granted())
            if granted.entry is not None:
                granted.join(granted.entry)
                self._entry = None
            waiting.append(granted.shown)
            now += granted.answered
            self._reservations.keep(granted.shown)
        await self._reservations.count(now)
        return waiting

    async def close(self) -> None:
        """Give back what was not served."""
        for each in self._granted.values():
            if each.leased:
                self._leases.give_back(*each.leased)
        self._granted.clear()
        await self._reservations.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Admission {self.reasons or 'nothing refused'}, {self._reservations!r}>"
