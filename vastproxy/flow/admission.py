"""
Whether an ad may be served: the caps and the budget of one ad request.

The order of things: before an ad server is asked, room is reserved under the caps by viewer, and
the budget is looked at; when ads have come, each is judged by who it is and what it costs; when
the answer is made, what it holds is counted, or left to its beacon; the rest is given back.

An :class:`Admission` is one ad request's; an :class:`Attempt` is one ad server's that is asked for
it. Several attempts may be under way at one time.

Rule 1: what is reserved belongs to the request's :class:`Reservations`, which forget nothing.
Rule 2: where the state is away, caps count in this process alone, and budgets do as they say.
Rule 3: an ad has an operation id of its own, random, so that nobody can claim another's.
Rule 4: what is reserved before ads are there is one place for all attempts, as only one of them is
answered: at a cap's last place, an ad server that hangs does not keep the next one from it.
Rule 5: an attempt that comes to nothing gives back at once what its ads were granted. What one that
is cut off holds is given back with the rest, when the ad request is over.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

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


@dataclass(slots=True, eq=False)
class Place:
    """Room under caps by viewer, reserved before an ad server was asked."""

    wanted: Claimed
    hold: Hold | None
    """None: there was no room."""
    users: int = 0
    """Attempts under way that count on it."""


@dataclass(slots=True)
class Granted:
    """What one ad has been granted: to be counted when it is shown, or when it is answered."""

    shown: list[Hold] = field(default_factory=list)
    answered: list[Hold] = field(default_factory=list)
    places: Sequence[Place] | None = None
    """What had been reserved before the ad came, where it takes that."""
    leased: tuple[str, str, int] | None = None
    """Campaign, lease and price, where the money comes from a lease."""

    @property
    def own(self) -> list[Hold]:
        """What was reserved for this ad."""
        return self.shown + self.answered

    def add(self, hold: Hold, count_at: When) -> None:
        """Add *hold*, unless nothing is left of it."""
        if hold.claims:
            (self.answered if count_at == "decision" else self.shown).append(hold)

    def join(self, other: "Granted") -> None:
        """Add what *other* was granted."""
        self.shown += other.shown
        self.answered += other.answered


Note = Callable[..., None]
"""Takes a reason, a flag, and whether it decided."""

Refusal = Literal["capped", "over_budget"]


class Admission:
    """
    Holds what one ad request has reserved, and counts what of it is answered.

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
        self.terms = terms
        self.deadline = deadline
        self.viewer = Account("viewer", viewer) if viewer else None
        self.state = state
        self.leases = leases
        self.now = now
        self.reservations = Reservations(state)
        self._operation = secrets.token_urlsafe(OPERATION_BYTES)
        self._count = 0
        self._places: list[Place] = []
        self._taking_places = asyncio.Lock()
        self._attempts: list[Attempt] = []
        self.flags: dict[str, None] = {}
        """What happened, in the access log's words."""
        self.reasons: list[str] = []
        """Why something was not served, or would not have been."""

    def attempt(self, upstream: str) -> "Attempt":
        """Begin to decide on the ads of *upstream*."""
        attempt = Attempt(self, upstream)
        self._attempts.append(attempt)
        return attempt

    # --- Reserving, for attempts ----------------------------------------------------------------

    def hold(
        self, account: Account, claims: tuple[Claim, ...], ttl_ms: int, lease: str = ""
    ) -> Hold:
        """Make a hold with an operation of its own."""
        self._count += 1
        operation = f"{self._operation}.{self._count}"
        return Hold(account, operation, claims, ttl_ms, self.terms.keep_ms, lease)

    async def places(self, wanted: Sequence[Claimed], note: Note) -> list[Place] | None:
        """
        Give the places that are *wanted* before ads are there; None, and noted, for no room.

        What another attempt has reserved is shared with it. What none needs any more goes first:
        it may be room under a counter that is wanted in another way.
        """
        # Two that begin at one time would otherwise reserve the same place twice.
        async with self._taking_places:
            await self._leave(wanted)
            known = [each.wanted for each in self._places]
            fresh = [each for each in wanted if each not in known]
            for each, hold in zip(fresh, await self.reserved(fresh, note), strict=True):
                self._places.append(Place(each, hold))
            found = [place for place in self._places if place.wanted in wanted]
            # Where there was no room before, asking again gives no more.
            if any(each.hold is None for each in found):
                return None
            for place in found:
                place.users += 1
            return found

    async def _leave(self, wanted: Sequence[Claimed]) -> None:
        """Give back places that no attempt under way uses, and that are not *wanted*."""
        unused = [each for each in self._places if not each.users and each.wanted not in wanted]
        if unused:
            self._places = [each for each in self._places if each not in unused]
            holds = [each.hold for each in unused if each.hold is not None]
            await self.reservations.release([each for each in holds if each.claims])

    async def reserved(self, wanted: Sequence[Claimed], note: Note) -> list[Hold | None]:
        """Reserve each of *wanted* of the viewer; None, and noted, for one without room."""
        viewer = self.viewer
        if not wanted or viewer is None:
            return []
        holds = [self.hold(viewer, each.claims, each.ttl_ms) for each in wanted]
        try:
            verdicts = await self.reservations.reserve(holds)
        except StateBackendError:
            # Counted here meanwhile, and where it belongs when it is shown: the ids are the same.
            self.flags["state_away"] = None
            verdicts = await self.state.reserve_meanwhile(holds)
        return [_taken(*each, note) for each in zip(wanted, holds, verdicts, strict=True)]

    # --- When the answer is made ----------------------------------------------------------------

    async def serve(self, ads: Sequence[Ad]) -> list[list[Hold]]:
        """Take it that *ads* are answered: count what counts now; give what waits for beacons."""
        waiting: list[list[Hold]] = []
        now: list[Hold] = []
        for ad in ads:
            granted = self._granted(ad)
            for place in granted.places or ():
                if place.hold is not None:
                    granted.add(place.hold, place.wanted.count_at)
                self._places.remove(place)
            waiting.append(granted.shown)
            now += granted.answered
            self.reservations.keep(granted.shown)
        await self.reservations.count(now)
        return waiting

    def _granted(self, ad: Ad) -> Granted:
        """Take what *ad* was granted by whichever attempt."""
        found = (each.granted.pop(ad) for each in self._attempts if ad in each.granted)
        return next(found, Granted())

    async def close(self) -> None:
        """Give back what was not served."""
        for each in self._attempts:
            each.abandon()
        # They know this object: a cycle that would keep both until the garbage collector comes.
        self._attempts.clear()
        await self.reservations.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Admission {self.reasons or 'nothing refused'}, {self.reservations!r}>"


def _taken(wanted: Claimed, hold: Hold, verdict: Verdict, note: Note) -> Hold | None:
    """Give what of *hold* was granted; None if it was refused."""
    if not verdict.granted:
        at = verdict.refused
        what = f"{wanted.caps[at]} is full" if at is not None else "given back before"
        note(what, "capped")
        return None
    for at in verdict.over:
        note(f"{wanted.caps[at]} is full", "capped", enforced=False)
    left = tuple(each for at, each in enumerate(hold.claims) if at not in verdict.over)
    return replace(hold, claims=left) if verdict.over else hold


class Attempt:
    """
    Decides on the ads of one upstream that is asked for an ad request.

    *admission* is the ad request's.
    """

    def __init__(self, admission: Admission, upstream: str) -> None:
        terms = admission.terms
        self._admission = admission
        self._upstream = upstream
        self._caps = [each for each in terms.caps if each.covers(upstream)]
        budget = terms.budget
        self._budget = budget if budget is not None and budget.covers(upstream) else None
        self._needs_facts = bool(terms.budget) or any(each.waits_for_ad for each in terms.caps)
        self._pod = PodCount([each for each in self._caps if each.pod])
        self._places: list[Place] | None = None
        """What was reserved before the ad server was asked; the first good ad takes it."""
        self._places_are_free = True
        self.granted: dict[Ad, Granted] = {}
        """What ads were granted that have not been answered."""
        self.reasons: list[str] = []
        """Why something was not served, or would not have been."""

    # --- Before the ad server is asked ----------------------------------------------------------

    async def before(self) -> Refusal | None:
        """Reserve what can be before the ad server is asked; say what forbids it, if anything."""
        if not self._viewer_known():
            return "capped"
        self._places = await self._admission.places(self._viewer_claims(), self._note)
        if self._places is None:
            return "capped"
        return None if await self._has_money() else "over_budget"

    def _viewer_known(self) -> bool:
        """Tell whether the request may go on without a viewer, if there is none."""
        if self._admission.viewer is not None:
            return True
        skipping = [each for each in self._caps if not each.pod and each.when_unknown == "skip"]
        for each in skipping:
            self._note(f"{each}: the viewer is not known", "capped", enforced=each.enforced)
        return not any(each.enforced for each in skipping)

    def _viewer_claims(self) -> list[Claimed]:
        if self._admission.viewer is None:
            return []
        pairs = [(each, "viewer") for each in self._caps if not each.waits_for_ad]
        return claimed(pairs, self._admission.now())

    async def _has_money(self) -> bool:
        """Tell whether the budget is worth asking for an ad."""
        budget = self._budget
        if budget is None or not budget.enforced:
            return True
        price = max(budget.price or 0, 1)
        if budget.on_state_loss == "lease" and self._admission.leases.has(budget, price):
            return True
        try:
            [level] = await self._admission.state.levels(budget.account, [budget.claim(0)])
        except StateBackendError:
            return self._serves_unpaid(budget)
        if level.counted + level.reserved + price <= budget.limit:
            return True
        self._note(f"{budget} is spent", "over_budget")
        return False

    def _serves_unpaid(self, budget: Budget) -> bool:
        """Say what happens to ads whose money cannot be reserved."""
        self._admission.flags["state_away"] = None
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
        if asyncio.get_running_loop().time() >= self._admission.deadline:
            self._note("no time was left to ask for an ad's room", "no_time")
            return self.reasons[-1]
        facts = facts_of(ad) if self._needs_facts else AdFacts()
        before = len(self.reasons)
        granted = Granted()
        if await self._fits_caps(facts, granted) and await self._is_paid(facts, granted):
            self._pod.take(facts)
            self.granted[ad.inline] = granted
            return ""
        await self._give_back(granted)
        return "; ".join(self.reasons[before:]) or "refused"

    def _return_lease(self, granted: Granted) -> None:
        if granted.leased:
            self._admission.leases.give_back(*granted.leased)
            granted.leased = None

    async def _give_back(self, granted: Granted) -> None:
        """Undo what an ad was granted; what was reserved before it came is for the next."""
        self._return_lease(granted)
        if granted.places is not None:
            self._places_are_free = True
        await self._admission.reservations.release(granted.own)

    async def _fits_caps(self, facts: AdFacts, granted: Granted) -> bool:
        if not self._fits_pod(facts):
            return False
        if not await self._take_viewer_holds(granted):
            return False
        pairs = []
        for cap in self._caps if self._admission.viewer is not None else ():
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
        return await self._reserve_claims(claimed(pairs, self._admission.now()), granted)

    def _fits_pod(self, facts: AdFacts) -> bool:
        full = self._pod.full(facts)
        for each in full:
            self._note(f"{each} is full", "capped", enforced=each.enforced)
        return not any(each.enforced for each in full)

    async def _take_viewer_holds(self, granted: Granted) -> bool:
        """Give the ad what was reserved before it came; a further ad needs its own."""
        if self._places is not None and self._places_are_free:
            self._places_are_free = False
            granted.places = self._places
            return True
        return await self._reserve_claims(self._viewer_claims(), granted)

    async def _reserve_claims(self, wanted: Sequence[Claimed], granted: Granted) -> bool:
        """Reserve *wanted* for an ad, wholly or not at all."""
        holds = await self._admission.reserved(wanted, self._note)
        more = Granted()
        for each, hold in zip(wanted, holds, strict=False):
            if hold is not None:
                more.add(hold, each.count_at)
        if None in holds:
            await self._admission.reservations.release(more.own)
            return False
        granted.join(more)
        return True

    async def _is_paid(self, facts: AdFacts, granted: Granted) -> bool:
        budget = self._budget
        if budget is None:
            return True
        price = budget.price_of(facts)
        if price is None:
            self._admission.flags["unpriced"] = None
        if not price:
            return True
        if budget.on_state_loss == "lease" and budget.enforced:
            lease = self._admission.leases.take(budget, price)
            if lease:
                granted.leased = (budget.campaign, lease, price)
                granted.add(self._money(budget, price, lease), budget.count_at)
                return True
        return await self._reserve_money(budget, price, granted)

    def _money(self, budget: Budget, price: int, lease: str = "") -> Hold:
        claims = (budget.claim(price),)
        return self._admission.hold(budget.account, claims, budget.ttl_ms, lease)

    async def _reserve_money(self, budget: Budget, price: int, granted: Granted) -> bool:
        hold = self._money(budget, price)
        try:
            [verdict] = await self._admission.reservations.reserve([hold])
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

    def _note(self, reason: str, flag: str, *, enforced: bool = True) -> None:
        self._admission.flags[flag if enforced else f"shadow_{flag}"] = None
        reason = reason if enforced else f"{reason} (shadow)"
        self.reasons.append(reason)
        self._admission.reasons.append(reason)

    # --- The end --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give back now what ads were granted that came to nothing after all."""
        holds = [hold for each in self.granted.values() for hold in each.own]
        self.abandon()
        await self._admission.reservations.release(holds)

    def abandon(self) -> None:
        """End, and leave what was reserved to the end of the ad request."""
        granted = list(self.granted.values())
        # Forgotten first: who is cut off while giving back must not do it once more in the end.
        self.granted.clear()
        for each in granted:
            self._return_lease(each)
        for place in self._places or ():
            place.users -= 1
        self._places = None

    def __repr__(self) -> str:
        return f"<Attempt at {self._upstream}, granted: {len(self.granted)} ads>"
