"""Whether an ad may be served: what is reserved, counted and given back on every way."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Self, TypeVar

import pytest

from tests.support.script import inline
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.flow.admission import Admission, Attempt, Granted, Terms
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.budgets import Budget
from vastproxy.flow.caps import Cap
from vastproxy.flow.leases import Leases
from vastproxy.session.seals import Seal
from vastproxy.state.base import Account, Booking, Claim, Hold, Level, Verdict
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.windows import Span, span_of
from vastproxy.vast.document import Ad
from vastproxy.vast.parse import parse
from vastproxy.vast.unwrap import ResolvedAd

T = TypeVar("T")

START = 1_800_000_000_000
"""Unix milliseconds."""
HOUR = Span("rolling", 3_600_000)
VIEWER = Account("viewer", "v")
CPM = Decimal("2.50")
PRICE = 2_500
"""Micro-units of one impression at CPM."""


@dataclass(slots=True)
class Clock:
    """Unix milliseconds that pass when a test says so."""

    now: int = START

    def __call__(self) -> int:
        """Tell the time."""
        return self.now


class Shaky(InMemoryBackend):
    """
    A backend in memory that can be away.

    With *luck*, a call fails now and then: half of them before it has happened, half after it.
    """

    def __init__(self, clock: Clock, luck: random.Random | None = None, share: float = 0.2) -> None:
        """Take what decides."""
        super().__init__(clock=clock)
        self.away = False
        self.luck = luck
        self.share = share

    async def _shaken(self, call: Callable[..., Awaitable[T]], *given: Any) -> T:
        await asyncio.sleep(0)
        failing = self.luck is not None and self.luck.random() < self.share
        before = failing and self.luck is not None and self.luck.random() < 0.5
        if self.away or before:
            raise StateAwayError("away")
        result = await call(*given)
        if failing:
            raise StateAwayError("the answer was lost")
        return result

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, perhaps."""
        return await self._shaken(super().reserve, holds)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, perhaps."""
        return await self._shaken(super().confirm, holds)

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void, perhaps."""
        await self._shaken(super().void, holds)

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell, perhaps."""
        return await self._shaken(super().levels, account, claims)

    async def ping(self) -> None:
        """Be there, perhaps."""
        if self.away:
            raise StateAwayError("away")


@dataclass(slots=True)
class InTurn:
    """An ad request whose upstreams are asked one after the other."""

    whole: Admission
    attempt: Attempt | None = None

    async def before(self, upstream: str) -> bool:
        """Go on to *upstream*; tell whether it may be asked."""
        if self.attempt is not None:
            await self.attempt.close()
        self.attempt = self.whole.attempt(upstream)
        return await self.attempt.before() is None

    async def judge(self, found: Sequence[ResolvedAd]) -> Mapping[ResolvedAd, str]:
        """Judge the ads that were *found*."""
        assert self.attempt is not None
        return await self.attempt.judge(found)

    async def serve(self, found: Sequence[Ad]) -> list[list[Hold]]:
        """Answer the ads that were *found*."""
        return await self.whole.serve(found)

    async def close(self) -> None:
        """End."""
        await self.whole.close()

    @property
    def flags(self) -> list[str]:
        """What happened."""
        return list(self.whole.flags)

    @property
    def reasons(self) -> list[str]:
        """Why something was not served."""
        return self.whole.reasons

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@dataclass(slots=True)
class World:
    """A state, and who speaks to it."""

    clock: Clock
    backend: Shaky
    state: GuardedState
    leases: Leases
    beacons: Beacons
    monotonic: list[float] = field(default_factory=lambda: [1000.0])

    def admission(self, *caps: Cap, budget: Budget | None = None, viewer: str = "v") -> "InTurn":
        """Begin an ad request of *viewer*."""
        return InTurn(Admission(Terms(caps, budget), viewer, self.state, self.leases, self.clock))

    async def level(self, cap: Cap, subject: str = "viewer") -> tuple[int, int]:
        """Give what is counted and reserved under *cap*."""
        [level] = await InMemoryBackend.levels(
            self.backend, VIEWER, [cap.claim(subject, self.clock.now)]
        )
        return level.counted, level.reserved

    async def money(self, budget: Budget) -> tuple[int, int]:
        """Give what of *budget* is spent and reserved."""
        [level] = await InMemoryBackend.levels(self.backend, budget.account, [budget.claim(0)])
        return level.counted, level.reserved

    def reserved(self) -> int:
        """Add up what is reserved on all counters of all accounts."""
        books = self.backend._books.values()
        for book in books:
            book.reap(self.clock.now)
        return sum(counter.held for book in books for counter in book.counters.values())

    def counted(self) -> dict[tuple[str, str], int]:
        """Give what is counted on each counter: never less than 1."""
        return {
            (str(account), key): count
            for account, book in self.backend._books.items()
            for key, counter in book.counters.items()
            if (count := counter.live(span_of(key).at(self.clock.now), self.clock.now))
        }


@asynccontextmanager
async def a_world(
    *budgets: Budget, luck: random.Random | None = None, share: float = 0.2
) -> AsyncIterator[World]:
    """Open a state in memory behind its guard, which takes it for a server."""
    clock = Clock()
    backend = Shaky(clock, luck, share)
    async with GuardedState(backend, timeout=5) as state:
        monotonic = [1000.0]
        leases = Leases(state, budgets, lambda: monotonic[0])
        seal = Seal(["s"], "beacon")
        beacons = Beacons(seal, state, ttl=86_400, now=lambda: clock.now / 1000)
        yield World(clock, backend, state, leases, beacons, monotonic)


def a_cap(limit: int = 3, **settings: Any) -> Cap:
    """Build a cap of the route ``/r`` within the last hour."""
    return replace(Cap("/r", limit, HOUR), **settings)


def a_budget(limit: int = 10 * PRICE, **settings: Any) -> Budget:
    """Build a budget whose ads cost PRICE."""
    return replace(Budget("spring", limit, price=PRICE), **settings)


def ads(*inlines: str) -> list[ResolvedAd]:
    """Make the ads of a document, as they come out of a chain."""
    document = parse(f'<VAST version="4.2">{"".join(inlines)}</VAST>'.encode())
    return [ResolvedAd(each, (), None) for each in document.ads]


def an_ad(name: str = "a", advertiser: str = "", price: str = "", currency: str = "USD") -> str:
    """Write an InLine."""
    body = f"<Advertiser>{advertiser}</Advertiser>" if advertiser else ""
    if price:
        body += f'<Pricing model="CPM" currency="{currency}">{price}</Pricing>'
    return inline(name, body=body)


async def served(admission: InTurn, found: Sequence[ResolvedAd]) -> list[list[Hold]]:
    """Judge the ads that were *found*, and answer those that may be served."""
    refused = await admission.judge(found)
    return await admission.serve([each.inline for each in found if each not in refused])


async def one_request(admission: InTurn, *inlines: str, upstream: str = "a") -> list[list[Hold]]:
    """Go the whole way of one ad request."""
    async with admission:
        if not await admission.before(upstream):
            return []
        return await served(admission, ads(*(inlines or (an_ad(),))))


# --- Caps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count_at", ["impression", "decision"])
async def test_two_hundred_at_once(count_at: Any) -> None:
    """Of 200 requests of one viewer at the same time, a cap of 3 serves exactly 3."""
    cap = a_cap(3, count_at=count_at)
    answers: list[list[list[Hold]]] = []

    async def ask(world: World) -> None:
        """Go through one request."""
        answers.append(await one_request(world.admission(cap)))

    async with a_world() as world:
        async with asyncio.TaskGroup() as group:
            for _ in range(200):
                group.create_task(ask(world))
        level = await world.level(cap)

    assert 3 == sum(len(each) for each in answers)
    assert level == ((0, 3) if count_at == "impression" else (3, 0))


async def test_what_is_not_served_is_given_back() -> None:
    """Where no ad comes, or none that may be served, nothing stays reserved."""
    cap, budget = a_cap(), a_budget()
    async with a_world() as world:
        async with world.admission(cap, budget=budget) as admission:
            assert await admission.before("a")
            assert (0, 1) == await world.level(cap)
        async with world.admission(cap, budget=budget) as admission:
            await admission.before("a")
            await admission.judge(ads(an_ad("a"), an_ad("b")))
            assert 2 + 2 * PRICE == world.reserved()

        assert 0 == world.reserved()
        assert {} == world.counted()


async def test_waits_for_its_beacon() -> None:
    """What was served waits for its beacon, and is counted when that comes."""
    cap, budget = a_cap(), a_budget()
    async with a_world() as world:
        [holds] = await one_request(world.admission(cap, budget=budget))
        waiting = (await world.level(cap), await world.money(budget))
        await world.state.confirm(holds)

        assert ((0, 1), (0, PRICE)) == waiting
        assert ((1, 0), (PRICE, 0)) == (await world.level(cap), await world.money(budget))


async def test_never_shown() -> None:
    """What is never shown frees itself when its time is over."""
    cap, budget = a_cap(ttl_ms=60_000), a_budget(ttl_ms=60_000)
    async with a_world() as world:
        await one_request(world.admission(cap, budget=budget))
        world.clock.now += 60_000

        assert 0 == world.reserved()


async def test_counted_at_the_decision() -> None:
    """What counts when it is decided needs no beacon."""
    cap, budget = a_cap(count_at="decision"), a_budget(count_at="decision")
    async with a_world() as world:
        answer = await one_request(world.admission(cap, budget=budget))

        assert [[]] == answer
        assert ((1, 0), (PRICE, 0)) == (await world.level(cap), await world.money(budget))


async def test_two_times_of_counting() -> None:
    """Two caps on one viewer count each at its own time, and one that is full frees the other."""
    at_once = a_cap(2, scope="x", count_at="decision")
    shown = a_cap(3, scope="y")
    async with a_world() as world:
        answers = [await one_request(world.admission(at_once, shown)) for _ in range(3)]
        levels = (await world.level(at_once), await world.level(shown))

        assert [1, 1, 0] == [len(each) for each in answers]
        assert ((2, 0), (0, 2)) == levels


async def test_one_counter_of_two_caps_counts_once() -> None:
    """Caps that share a counter take one place of it, whenever each of them would count."""
    one = a_cap(5, upstreams=frozenset({"a"}), count_at="decision")
    other = a_cap(4, upstreams=frozenset({"a", "b"}))
    async with a_world() as world:
        await one_request(world.admission(one, other))

        assert (0, 1) == await world.level(one)


async def test_limit_of_none_ever() -> None:
    """A limit of 0 serves nothing, and the ad server is not asked."""
    async with a_world() as world, world.admission(a_cap(0)) as admission:
        assert not await admission.before("a")
        assert ["capped"] == list(admission.flags)
        assert ["cap of /r: 0 by viewer within 3600 s is full"] == admission.reasons


async def test_second_upstream_takes_the_same_place() -> None:
    """An upstream without an ad leaves the viewer's place to the next: it is never taken twice."""
    cap = a_cap(1)
    async with a_world() as world:
        async with world.admission(cap) as admission:
            assert await admission.before("a")
            assert {} == dict(await admission.judge([]))
            assert await admission.before("b")
            assert (0, 1) == await world.level(cap)
            answer = await served(admission, ads(an_ad()))

        assert 1 == len(answer[0])
        assert (0, 1) == await world.level(cap)


async def test_cap_of_one_upstream() -> None:
    """Where a cap covers one upstream alone and is full, the next one may be asked."""
    cap = a_cap(0, upstreams=frozenset({"a"}))
    async with a_world() as world, world.admission(cap) as admission:
        assert not await admission.before("a")
        assert await admission.before("b")
        assert [[]] == await served(admission, ads(an_ad()))
        assert 0 == world.reserved()


async def test_caps_of_two_upstreams() -> None:
    """What was reserved for one upstream alone is given back before another is asked."""
    one, other = (a_cap(scope=each, upstreams=frozenset({each})) for each in "ab")
    async with a_world() as world, world.admission(one, other) as admission:
        await admission.before("a")
        first = (await world.level(one), await world.level(other))
        await admission.before("b")

        assert ((0, 1), (0, 0)) == first
        assert ((0, 0), (0, 1)) == (await world.level(one), await world.level(other))


async def test_ads_that_came_to_nothing() -> None:
    """Ads that were let through, and could not be used, give all back before the next is asked."""
    cap, budget = a_cap(2), a_budget(2 * PRICE)
    async with a_world() as world, world.admission(cap, budget=budget) as admission:
        await admission.before("a")
        assert {} == dict(await admission.judge(ads(an_ad("a"), an_ad("b"))))
        assert await admission.before("b")
        assert ((0, 1), (0, 0)) == (await world.level(cap), await world.money(budget))
        assert {} == dict(await admission.judge(ads(an_ad("c"), an_ad("d"))))
        assert ((0, 2), (0, 2 * PRICE)) == (await world.level(cap), await world.money(budget))


async def test_each_ad_of_a_pod_needs_a_place() -> None:
    """Each ad of an answer takes a place of its own, and what is beyond the cap is not served."""
    cap = a_cap(2)
    async with a_world() as world:
        answer = await one_request(world.admission(cap), an_ad("a"), an_ad("b"), an_ad("c"))
        operations = {hold.operation for holds in answer for hold in holds}

        assert [1, 1] == [len(each) for each in answer]
        assert 2 == len(operations)
        assert (0, 2) == await world.level(cap)


async def test_refused_ad_leaves_its_place() -> None:
    """The place of an ad that is refused goes to the next, also the one taken beforehand."""
    viewer, advertiser = a_cap(1), a_cap(0, by="advertiser")
    async with a_world() as world, world.admission(viewer, advertiser) as admission:
        await admission.before("a")
        found = ads(an_ad("a", "acme"), an_ad("b", "acme"), an_ad("c"))
        refused = await admission.judge(found)
        answer = await admission.serve([found[2].inline])

        assert found[:2] == list(refused)
        assert [1] == [len(each) for each in answer]
        assert (0, 1) == await world.level(viewer)


async def test_stand_in_for_a_refused_ad() -> None:
    """An ad that is judged later stands on the place that an earlier one was refused."""
    viewer, advertiser = a_cap(1), a_cap(1, by="advertiser", count_at="decision")
    async with a_world() as world:
        await one_request(
            world.admission(a_cap(1, scope="/r", by="advertiser")), an_ad("x", "acme")
        )
        async with world.admission(viewer, advertiser) as admission:
            await admission.before("a")
            assert 1 == len(await admission.judge(ads(an_ad("a", "acme"))))
            assert 0 == len(await admission.judge(ads(an_ad("b", "other"))))

        assert (0, 0) == await world.level(viewer)


@pytest.mark.parametrize(
    ("by", "same", "another"),
    [
        ("campaign", "<Campaign>c</Campaign>", "<Campaign>d</Campaign>"),
        ("advertiser", "<Advertiser>c</Advertiser>", "<Advertiser>d</Advertiser>"),
    ],
)
async def test_cap_by_what_the_ad_is(by: Any, same: str, another: str) -> None:
    """A cap by something of the ad counts ads alike, and leaves others alone."""

    def with_body(body: str) -> str:
        """Write an ad that says *body* of itself."""
        inside = f"<Extensions><Extension>{body}</Extension></Extensions>"
        return inline("a", body=body if by == "advertiser" else inside)

    cap = a_cap(1, by=by)
    async with a_world() as world:
        answers = [
            await one_request(world.admission(cap), with_body(each))
            for each in (same, same, another)
        ]

        assert [1, 0, 1] == [len(each) for each in answers]
        assert (0, 1) == await world.level(cap, "c")


@pytest.mark.parametrize("by", ["ad", "creative"])
async def test_cap_by_ad_and_creative(by: Any) -> None:
    """A cap by ad or creative counts each id apart."""

    def an_own(name: str) -> str:
        """Write an ad whose creative has its own *name*."""
        creatives = f'<Creatives><Creative id="{name}"><Linear/></Creative></Creatives>'
        return inline(name, creatives=creatives)

    cap = a_cap(1, by=by)
    async with a_world() as world:
        answers = [await one_request(world.admission(cap), an_own(each)) for each in "aab"]

        assert [1, 0, 1] == [len(each) for each in answers]
        assert (0, 1) == await world.level(cap, "/a")


@pytest.mark.parametrize(("when_unknown", "served_ads"), [("serve", 1), ("skip", 0)])
async def test_ad_does_not_say(when_unknown: Any, served_ads: int) -> None:
    """An ad that does not name what a cap counts by is served or skipped, as the cap says."""
    cap = a_cap(1, by="advertiser", when_unknown=when_unknown)
    async with a_world() as world:
        answer = await one_request(world.admission(cap))

        assert served_ads == len(answer)
        assert 0 == world.reserved()


@pytest.mark.parametrize(
    ("when_unknown", "mode", "asked", "flags"),
    [
        ("serve", "enforce", True, []),
        ("skip", "enforce", False, ["capped"]),
        ("skip", "shadow", True, ["shadow_capped"]),
    ],
)
async def test_nobody_known(when_unknown: Any, mode: Any, *, asked: bool, flags: list[str]) -> None:
    """Without a viewer a request is served uncapped, or not at all, as the cap says."""
    cap = a_cap(when_unknown=when_unknown, mode=mode)
    async with a_world() as world, world.admission(cap, viewer="") as admission:
        assert asked == await admission.before("a")
        assert flags == list(admission.flags)
        if asked:
            assert [[]] == await served(admission, ads(an_ad()))
        assert 0 == world.reserved()


async def test_refused_by_one_of_two_holds() -> None:
    """What an ad had got under one cap is free for the next ad when another cap refuses it."""
    by_advertiser, by_ad = a_cap(1, by="advertiser", count_at="decision"), a_cap(1, by="ad")
    async with a_world() as world:
        await one_request(world.admission(by_ad), an_ad("a"))
        async with world.admission(by_advertiser, by_ad) as admission:
            await admission.before("a")
            found = ads(an_ad("a", "acme"), an_ad("b", "acme"))

            assert found[:1] == list(await admission.judge(found))


async def test_pod_cap() -> None:
    """A cap of kind pod counts the ads of one answer, by what they are, and nothing else."""
    pod = a_cap(1, by="advertiser", pod=True)
    inlines = [an_ad("a", "x"), an_ad("b", "x"), an_ad("c", "y"), an_ad("d"), an_ad("e")]
    async with a_world() as world:
        answers = [await one_request(world.admission(pod), *inlines) for _ in range(2)]

        assert [4, 4] == [len(each) for each in answers]
        assert {} == world.backend._books


async def test_pod_cap_begins_anew_for_each_upstream() -> None:
    """What an upstream offered in vain does not count against the next one's pod."""
    pod = a_cap(1, pod=True)
    async with a_world() as world, world.admission(pod) as admission:
        await admission.before("a")
        assert 1 == len(await admission.judge(ads(an_ad("a"), an_ad("b"))))
        await admission.before("b")
        assert 1 == len(await admission.judge(ads(an_ad("c"), an_ad("d"))))


async def test_full_pod_takes_no_place() -> None:
    """An ad that the pod has no room for reserves nothing."""
    viewer, pod = a_cap(5), a_cap(1, pod=True)
    async with a_world() as world:
        await one_request(world.admission(viewer, pod), an_ad("a"), an_ad("b"))

        assert (0, 1) == await world.level(viewer)


async def test_shadow() -> None:
    """A cap in the shadow serves all, says what it would not have, and counts to its limit."""
    cap = a_cap(2, mode="shadow", count_at="decision")
    flags = []
    async with a_world() as world:
        for _ in range(4):
            admission = world.admission(cap)
            assert 1 == len(await one_request(admission))
            flags.append(list(admission.flags))

        assert [[], [], ["shadow_capped"], ["shadow_capped"]] == flags
        assert (2, 0) == await world.level(cap)
        assert 0 == world.reserved()


async def test_shadow_beside_an_enforced_one() -> None:
    """A full cap in the shadow leaves the others of the same viewer at work."""
    shadow, enforced = a_cap(0, scope="s", mode="shadow"), a_cap(1, scope="e")
    async with a_world() as world:
        answers = [await one_request(world.admission(shadow, enforced)) for _ in range(2)]
        [[[hold]], _] = answers

        assert [1, 0] == [len(each) for each in answers]
        assert ["r3600000|e|"] == [claim.key for claim in hold.claims]


# --- Budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("price", "currency", "spent"),
    [
        ("10.00", "USD", 10_000),
        ("10.00", "usd", 10_000),
        ("10.00", "EUR", PRICE),
        ("", "USD", PRICE),
        ("free", "USD", PRICE),
        ("0.0005", "USD", 1),
    ],
)
async def test_price(price: str, currency: str, spent: int) -> None:
    """An ad costs what it says in the budget's currency, else what the route says."""
    budget = a_budget(10**9, count_at="decision")
    async with a_world() as world:
        await one_request(world.admission(budget=budget), an_ad("a", "", price, currency))

        assert (spent, 0) == await world.money(budget)


async def test_another_model_of_price() -> None:
    """A price for a click is no price of an impression."""
    budget = a_budget(10**9, count_at="decision")
    ad = inline("a", body='<Pricing model="CPC" currency="USD">10</Pricing>')
    async with a_world() as world:
        await one_request(world.admission(budget=budget), ad)

        assert (PRICE, 0) == await world.money(budget)


async def test_nobody_says_a_price() -> None:
    """An ad whose price nobody says is served, marked, and costs nothing."""
    budget = a_budget(10, price=None)
    async with a_world() as world:
        admission = world.admission(budget=budget)

        assert [[]] == await one_request(admission)
        assert ["unpriced"] == list(admission.flags)
        assert (0, 0) == await world.money(budget)


async def test_budget_is_spent_to_the_last_ad() -> None:
    """A budget for four ads serves four of 50 requests at once, and says why not more."""
    budget = a_budget(4 * PRICE + PRICE - 1)
    admissions: list[InTurn] = []
    answers: list[list[list[Hold]]] = []

    async def ask(world: World) -> None:
        """Go through one request."""
        admissions.append(world.admission(budget=budget))
        answers.append(await one_request(admissions[-1]))

    async with a_world() as world:
        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(ask(world))

        assert 4 == sum(len(each) for each in answers)
        assert (0, 4 * PRICE) == await world.money(budget)
        assert 46 == sum("over_budget" in each.flags for each in admissions)


async def test_spent_budget_asks_nobody() -> None:
    """Where the money is gone the ad server is not asked, and the viewer's place is free again."""
    cap, budget = a_cap(), a_budget(0)
    async with a_world() as world:
        async with world.admission(cap, budget=budget) as admission:
            assert not await admission.before("a")
            assert ["campaign spring: 0 USD is spent"] == admission.reasons

        assert 0 == world.reserved()


async def test_dear_ad_leaves_the_place_to_a_cheap_one() -> None:
    """An ad that costs more than is left is refused; the next one gets its places."""
    cap, budget = a_cap(1), a_budget(PRICE)
    async with a_world() as world, world.admission(cap, budget=budget) as admission:
        await admission.before("a")
        found = ads(an_ad("a", price="99"), an_ad("b"))
        refused = await admission.judge(found)

        assert {found[0]: "campaign spring: 0.0025 USD is spent"} == dict(refused)
        assert ((0, 1), (0, PRICE)) == (await world.level(cap), await world.money(budget))


async def test_budget_of_one_upstream() -> None:
    """A budget that does not cover an upstream lets its ads through unpaid."""
    budget = a_budget(0, upstreams=frozenset({"a"}))
    async with a_world() as world, world.admission(budget=budget) as admission:
        assert not await admission.before("a")
        assert await admission.before("b")
        assert [[]] == await served(admission, ads(an_ad()))


async def test_budget_in_the_shadow() -> None:
    """A budget in the shadow serves all, marks what is beyond, and books none of that."""
    budget = a_budget(PRICE, mode="shadow", count_at="decision")
    async with a_world() as world:
        admissions = [world.admission(budget=budget) for _ in range(3)]
        answers = [await one_request(each) for each in admissions]

        assert [1, 1, 1] == [len(each) for each in answers]
        assert [[], ["shadow_over_budget"], ["shadow_over_budget"]] == [
            list(each.flags) for each in admissions
        ]
        assert (PRICE, 0) == await world.money(budget)


# --- Without the state --------------------------------------------------------------------------


async def test_caps_without_the_state() -> None:
    """Where the state is away, caps count here from nothing, and there when it is back."""
    cap = a_cap(2)
    async with a_world() as world:
        [shown] = await one_request(world.admission(cap))
        await world.state.confirm(shown)
        world.backend.away = True
        admissions = [world.admission(cap) for _ in range(4)]
        answers = [await one_request(each) for each in admissions]
        for holds in answers[:2]:
            assert ["deferred"] == await world.state.confirm(holds[0])
        late = await one_request(world.admission(cap))
        world.backend.away = False
        await settled(world)

        assert [1, 1, 0, 0] == [len(each) for each in answers]
        assert not late
        assert ["state_away"] == list(admissions[0].flags)
        assert ["state_away", "capped"] == list(admissions[3].flags)
        assert (3, 0) == await world.level(cap)
        assert not await one_request(world.admission(cap))


async def test_what_is_given_back_without_the_state() -> None:
    """What is reserved here while the state is away, and not served, is free for the next."""
    cap = a_cap(1)
    async with a_world() as world:
        world.backend.away = True
        async with world.admission(cap) as admission:
            assert await admission.before("main")
        [holds] = await one_request(world.admission(cap))

        assert 1 == len(holds)


async def settled(world: World) -> None:
    """Wait until the state is back, and has taken all."""
    async with asyncio.timeout(10):
        while not world.state.available or len(world.state.journal):
            await world.state.flush()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("on_state_loss", "mode", "asked", "flags"),
    [
        ("serve", "enforce", True, ["state_away"]),
        ("deny", "enforce", False, ["state_away", "over_budget"]),
        ("lease", "enforce", False, ["state_away", "over_budget"]),
        ("deny", "shadow", True, []),
    ],
)
async def test_budget_without_the_state(
    on_state_loss: Any, mode: Any, *, asked: bool, flags: list[str]
) -> None:
    """Where the state is away, a budget does what it says; one in the shadow serves."""
    budget = a_budget(on_state_loss=on_state_loss, mode=mode)
    async with a_world() as world:
        world.backend.away = True
        async with world.admission(budget=budget) as admission:
            assert asked == await admission.before("a")
            assert flags == list(admission.flags)
            if asked:
                [[hold]] = await served(admission, ads(an_ad()))
                await world.state.confirm([hold])
        world.backend.away = False
        await settled(world)

        assert (PRICE if asked else 0, 0) == await world.money(budget)


async def test_state_that_goes_in_the_middle() -> None:
    """A state that goes after the ad server was asked denies the ad, if the budget says so."""
    budget = a_budget(on_state_loss="deny")
    async with a_world() as world:
        async with world.admission(a_cap(), budget=budget) as admission:
            assert await admission.before("a")
            world.backend.away = True
            [ad] = ads(an_ad())

            assert {ad: "campaign spring: 0.025 USD: the state is away"} == dict(
                await admission.judge([ad])
            )
        world.backend.away = False
        await settled(world)
        world.clock.now += 600_000

        assert 0 == world.reserved()


async def test_lease_bridges_an_outage() -> None:
    """From a lease ads are served without the state, to its last, and no further."""
    budget = a_budget(100 * PRICE, on_state_loss="lease")
    async with a_world(budget) as world:
        await world.leases.renew()
        [chunk] = [lease.amount for lease in world.leases._campaigns["spring"].leases]
        world.backend.away = True
        answers = [await one_request(world.admission(budget=budget)) for _ in range(5)]
        for [[hold]] in answers[: chunk // PRICE]:
            await world.state.confirm([hold])
        world.backend.away = False
        await settled(world)

        assert 2 * PRICE == chunk
        assert [1, 1, 0, 0, 0] == [len(each) for each in answers]
        assert (2 * PRICE, 0) == await world.money(budget)


async def test_lease_takes_back() -> None:
    """What an ad took of a lease goes back once, however it came to nothing."""
    budget = a_budget(100 * PRICE, on_state_loss="lease")
    async with a_world(budget) as world:
        await world.leases.renew()
        [lease] = world.leases._campaigns["spring"].leases
        async with world.admission(budget=budget) as admission:
            await admission.before("a")
            await admission.judge(ads(an_ad("a")))
            assert PRICE == lease.left
            await admission.before("b")
            assert 2 * PRICE == lease.left
            await admission.judge(ads(an_ad("b")))

        assert 2 * PRICE == lease.left


async def test_lease_takes_back_once_where_cut_off() -> None:
    """A request that is cut off while it gives back gives a lease no more than it took."""
    budget = a_budget(100 * PRICE, on_state_loss="lease")
    async with a_world(budget) as world:
        await world.leases.renew()
        [lease] = world.leases._campaigns["spring"].leases
        admission = world.admission(budget=budget)
        await admission.before("a")
        await admission.judge(ads(an_ad("a")))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(admission.before("b"))
            await asyncio.sleep(0)
            task.cancel()
        await admission.close()

        assert task.cancelled()
        assert 2 * PRICE == lease.left


# --- Cut off ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(14))
async def test_player_that_hangs_up(steps: int) -> None:
    """Wherever a request is cut off, nothing of it stays reserved, and at most one ad counts."""
    caps = (a_cap(1), a_cap(1, scope="d", by="ad", count_at="decision"))
    budget = a_budget(count_at="decision")
    async with a_world() as world:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(one_request(world.admission(*caps[1:], budget=budget)))
            other = group.create_task(one_request(world.admission(a_cap(1, count_at="decision"))))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            other.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        await settled(world)

        assert 0 == world.reserved()
        assert set(world.counted().values()) <= {1, PRICE}


async def test_place_of_who_hung_up_is_free_at_once() -> None:
    """A viewer who hung up while the ad server was asked has the whole cap for the next time."""
    cap = a_cap(1)
    waits = asyncio.Event()

    async def hang(world: World) -> None:
        """Ask, and wait for an ad that never comes."""
        async with world.admission(cap) as admission:
            assert await admission.before("a")
            waits.set()
            await asyncio.Event().wait()

    async with a_world() as world:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(hang(world))
            await waits.wait()
            assert [] == await one_request(world.admission(cap))
            task.cancel()
        answer = await one_request(world.admission(cap))

        assert 1 == len(answer)


# --- Upstreams at one time ----------------------------------------------------------------------


async def test_one_place_for_all() -> None:
    """At a cap's last place an upstream that hangs does not keep the next one from it."""
    cap = a_cap(1)
    async with a_world() as world:
        async with world.admission(cap).whole as admission:
            hanging, next_one = admission.attempt("a"), admission.attempt("b")
            assert [None, None] == [await hanging.before(), await next_one.before()]
            assert (0, 1) == await world.level(cap)
            found = ads(an_ad())
            assert {} == dict(await next_one.judge(found))
            hanging.abandon()
            answer = await admission.serve([each.inline for each in found])

        assert [1] == [len(each) for each in answer]
        assert (0, 1) == await world.level(cap)


async def test_two_that_begin_at_one_time() -> None:
    """Two attempts that begin at the same moment reserve one place together."""
    cap = a_cap(1)
    async with a_world() as world, world.admission(cap).whole as admission:
        attempts = [admission.attempt(each) for each in "ab"]

        assert [None, None] == await asyncio.gather(*(each.before() for each in attempts))
        assert (0, 1) == await world.level(cap)


@pytest.mark.parametrize("winner", [0, 1])
async def test_two_have_ads(winner: int) -> None:
    """Where two have ads, the place is the winner's; what the other's ad was granted is free."""
    cap, by_ad = a_cap(1), a_cap(1, scope="d", by="ad")
    budget = a_budget()
    async with a_world() as world:
        async with world.admission(cap, by_ad, budget=budget).whole as admission:
            attempts = [admission.attempt(each) for each in "ab"]
            found = [ads(an_ad(each)) for each in "xy"]
            for attempt, offered in zip(attempts, found, strict=True):
                assert await attempt.before() is None
                assert {} == dict(await attempt.judge(offered))
            assert (0, 2 * PRICE) == await world.money(budget)
            [holds] = await admission.serve([each.inline for each in found[winner]])
        await world.state.confirm(holds)

        assert 0 == world.reserved()
        assert 3 == len(holds)
        assert (1, 0) == await world.level(cap)
        assert (PRICE, 0) == await world.money(budget)


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("winner", ["a", "b"])
async def test_caps_that_differ(order: str, winner: str) -> None:
    """Of the caps of two upstreams what is the same is shared; what only the loser has is free."""
    both, only_a = a_cap(1), a_cap(1, scope="only", upstreams=frozenset({"a"}))
    async with a_world() as world:
        async with world.admission(both, only_a).whole as admission:
            attempts = {each: admission.attempt(each) for each in order}
            assert [None, None] == [await each.before() for each in attempts.values()]
            assert ((0, 1), (0, 1)) == (await world.level(both), await world.level(only_a))
            found = ads(an_ad())
            assert {} == dict(await attempts[winner].judge(found))
            await admission.serve([each.inline for each in found])

        assert (0, 1) == await world.level(both)
        assert (0, 1 if winner == "a" else 0) == await world.level(only_a)


async def test_full_cap_of_one() -> None:
    """A cap of one upstream that is full leaves the place that both need to the other."""
    both, only_a = a_cap(1), a_cap(0, scope="only", upstreams=frozenset({"a"}))
    async with a_world() as world, world.admission(both, only_a).whole as admission:
        one, other = admission.attempt("a"), admission.attempt("b")

        assert ["capped", None] == [await one.before(), await other.before()]
        assert (0, 1) == await world.level(both)


async def test_limits_that_differ() -> None:
    """Where two upstreams have limits of their own on one counter, each takes by its own."""
    strict = a_cap(1, scope="s", upstreams=frozenset({"a"}))
    wide = a_cap(2, scope="s")
    async with a_world() as world, world.admission(strict, wide).whole as admission:
        attempts = [admission.attempt(each) for each in "ab"]

        assert [None, None] == [await each.before() for each in attempts]
        assert (0, 2) == await world.level(wide)


async def test_overtaken_one_that_ends() -> None:
    """An attempt that ends without an ad leaves the shared place to the one that goes on."""
    cap, budget = a_cap(1), a_budget()
    async with a_world() as world, world.admission(cap, budget=budget).whole as admission:
        overtaken, goes_on = admission.attempt("a"), admission.attempt("b")
        for each in (overtaken, goes_on):
            assert await each.before() is None
        await overtaken.judge(ads(an_ad("x")))
        await overtaken.close()
        assert ((0, 1), (0, 0)) == (await world.level(cap), await world.money(budget))
        found = ads(an_ad("y"))

        assert {} == dict(await goes_on.judge(found))
        assert [1] == [len(each) - 1 for each in await admission.serve([found[0].inline])]


async def test_loser_gives_its_lease_back() -> None:
    """What the ads of a loser took of a lease goes back once, when it is cut off."""
    budget = a_budget(100 * PRICE, on_state_loss="lease")
    async with a_world(budget) as world:
        await world.leases.renew()
        [lease] = world.leases._campaigns["spring"].leases
        async with world.admission(budget=budget).whole as admission:
            loser, winner = admission.attempt("a"), admission.attempt("b")
            for each, found in ((loser, ads(an_ad("x"))), (winner, ads(an_ad("y")))):
                assert await each.before() is None
                assert {} == dict(await each.judge(found))
            assert 0 == lease.left
            loser.abandon()
            assert PRICE == lease.left
            await admission.serve([found[0].inline])

        assert PRICE == lease.left


async def test_pods_are_counted_apart() -> None:
    """What one upstream offers at the same time is no part of the other's pod."""
    pod = a_cap(1, pod=True)
    async with a_world() as world, world.admission(pod).whole as admission:
        attempts = [admission.attempt(each) for each in "ab"]

        assert [1, 1] == [len(await each.judge(ads(an_ad(), an_ad()))) for each in attempts]
        assert [1, 1] == [len(each.granted) for each in attempts]
        assert "<Attempt at a, granted: 1 ads>" == repr(attempts[0])


# --- At random ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Books:
    """What a run answered: each ad's price, and where it is counted at its beacon."""

    tokens: list[str] = field(default_factory=list)
    fired: set[str] = field(default_factory=set)
    holds: dict[str, list[Hold]] = field(default_factory=dict)
    at_once: int = 0
    """Ads that were counted when they were answered."""


def random_terms(luck: random.Random) -> tuple[tuple[Cap, ...], Budget | None]:
    """Draw caps and a budget that count at their beacons."""
    kinds: list[Any] = ["viewer", "advertiser", "ad"]
    caps = tuple(
        a_cap(
            luck.randint(0, 4),
            scope=f"/{at}",
            by=luck.choice(kinds),
            when_unknown=luck.choice(["serve", "skip"]),
            mode=luck.choice(["enforce", "enforce", "shadow"]),
            pod=luck.random() < 0.2,
            upstreams=luck.choice([None, frozenset({"a"}), frozenset({"b"})]),
            ttl_ms=luck.choice([30_000, 600_000]),
        )
        for at in range(luck.randint(0, 3))
    )
    budget = a_budget(
        luck.randint(0, 8) * PRICE, on_state_loss=luck.choice(["serve", "deny", "lease"])
    )
    return caps, budget if luck.random() < 0.7 else None


async def random_request(
    world: World, luck: random.Random, caps: tuple[Cap, ...], budget: Budget | None, books: Books
) -> None:
    """Go through one ad request, whose upstreams have some ads, or none."""
    async with world.admission(*caps, budget=budget) as admission:
        for upstream in "ab":
            if not await admission.before(upstream):
                continue
            found = ads(
                *(
                    an_ad(luck.choice("xyz"), luck.choice(["", "acme"]), luck.choice(["", "9"]))
                    for _ in range(luck.randint(0, 3))
                )
            )
            refused = await admission.judge(found)
            good = [each.inline for each in found if each not in refused]
            if not good or luck.random() < 0.2:
                continue
            for holds in await admission.serve(good):
                if holds:
                    token = world.beacons.url("", holds).removeprefix("/beacon/")
                    books.tokens.append(token)
                    books.holds[token] = holds
            return


async def fire(world: World, luck: random.Random, books: Books) -> None:
    """Fire the beacons of a run: some never, some twice, in any order, late and early."""
    shots = [token for token in books.tokens for _ in range(luck.randint(0, 2))]
    luck.shuffle(shots)
    for token in shots:
        world.clock.now += luck.choice([0, 0, 1000, 40_000])
        assert "forged" != await world.beacons.take(token)
        books.fired.add(token)


def expected(books: Books) -> dict[tuple[str, str], int]:
    """Add up what the beacons that were fired say."""
    sums: dict[tuple[str, str], int] = {}
    for token in books.fired:
        for hold in books.holds[token]:
            for claim in hold.claims:
                key = (str(hold.account), claim.key)
                sums[key] = sums.get(key, 0) + claim.amount
    return sums


@pytest.mark.parametrize("seed", range(60))
async def test_ledger(seed: int) -> None:
    """
    Whatever ads, caps, failures and beacons there are: what was shown is counted, and once; what
    is spent is the sum of the prices; and in the end nothing stays reserved.
    """
    luck = random.Random(seed)
    caps, budget = random_terms(luck)
    share = luck.choice([0, 0.05, 0.3])
    async with a_world(*([budget] if budget else []), luck=luck, share=share) as world:
        books = Books()
        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                for _ in range(luck.randint(1, 6)):
                    group.create_task(random_request(world, luck, caps, budget, books))
            await fire(world, luck, books)
        world.backend.luck = None
        await settled(world)
        counted = world.counted()
        world.clock.now += 600_000

        assert expected(books) == counted
        assert 0 == world.reserved()


@pytest.mark.parametrize("seed", range(30))
async def test_limits_hold(seed: int) -> None:
    """While the state is there, no enforced cap and no budget is ever passed, beacons in time."""
    luck = random.Random(seed)
    caps, budget = random_terms(luck)
    async with a_world(*([budget] if budget else [])) as world:
        books = Books()
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(random_request(world, luck, caps, budget, books))
        for token in books.tokens:
            await world.beacons.take(token)
        limits = {each.scope: each.limit for each in caps if not each.pod}
        counted = world.counted()

        assert [] == [
            (key, count)
            for (_, key), count in counted.items()
            if key != "spent" and count > limits[key.split("|")[1]]
        ]
        assert counted.get(("campaign spring", "spent"), 0) <= (budget.limit if budget else 0)


async def random_race(
    world: World, luck: random.Random, caps: tuple[Cap, ...], budget: Budget | None, books: Books
) -> None:
    """Go through one ad request whose upstreams are asked at one time: the first ad wins."""

    async def attempt_at(admission: Admission, upstream: str) -> list[Ad]:
        """Ask one upstream; whoever is cut off leaves all to the end."""
        attempt = admission.attempt(upstream)
        try:
            if await attempt.before() is None:
                for _ in range(luck.randint(0, 8)):
                    await asyncio.sleep(0)
                found = ads(*(an_ad(luck.choice("xyz")) for _ in range(luck.randint(0, 3))))
                refused = await attempt.judge(found)
                if good := [each.inline for each in found if each not in refused]:
                    return good
        except asyncio.CancelledError:
            attempt.abandon()
            raise
        await attempt.close()
        return []

    async with world.admission(*caps, budget=budget).whole as admission:
        won: list[Ad] = []
        async with asyncio.TaskGroup() as group:
            running = {group.create_task(attempt_at(admission, each)) for each in "ab"}
            while running and not won:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                won = next((each.result() for each in done if each.result()), [])
            for each in running:
                each.cancel()
        for holds in await admission.serve(won):
            if holds:
                token = world.beacons.url("", holds).removeprefix("/beacon/")
                books.tokens.append(token)
                books.holds[token] = holds


@pytest.mark.parametrize("seed", range(60))
async def test_ledger_of_races(seed: int) -> None:
    """Where upstreams race, too: what was shown is counted once, and nothing stays reserved."""
    luck = random.Random(seed)
    caps, budget = random_terms(luck)
    share = luck.choice([0, 0.05, 0.3])
    async with a_world(*([budget] if budget else []), luck=luck, share=share) as world:
        books = Books()
        for _ in range(3):
            async with asyncio.TaskGroup() as group:
                for _ in range(luck.randint(1, 6)):
                    group.create_task(random_race(world, luck, caps, budget, books))
            await fire(world, luck, books)
        world.backend.luck = None
        await settled(world)
        counted = world.counted()
        world.clock.now += 600_000

        assert expected(books) == counted
        assert 0 == world.reserved()


@pytest.mark.parametrize("seed", range(40))
async def test_nothing_stays_reserved_after_a_race(seed: int) -> None:
    """When all requests are over, what is reserved is what waits for beacons, and no more."""
    luck = random.Random(seed)
    caps, budget = random_terms(luck)
    async with a_world() as world:
        books = Books()
        async with asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(random_race(world, luck, caps, budget, books))
        waiting = [hold for holds in books.holds.values() for hold in holds]

        assert sum(claim.amount for hold in waiting for claim in hold.claims) == world.reserved()


async def test_repr() -> None:
    """Who looks at a request at work sees what was refused, and what it holds."""
    async with a_world() as world, world.admission(a_cap(0)) as admission:
        await admission.before("a")

        assert (
            "<Admission ['cap of /r: 0 by viewer within 3600 s is full'], <Reservations open: 0>>"
            == repr(admission.whole)
        )


def test_terms_of_nothing() -> None:
    """A route without caps and budget has no terms, and no claims before an ad is there."""
    capped = Terms((a_cap(), a_cap(by="ad"), a_cap(pod=True)))

    assert not Terms()
    assert capped
    assert (capped.caps[0],) == capped.viewer_caps
    assert [] == Granted().own


async def test_refusal_that_is_no_absence() -> None:
    """A backend that answers, and refuses to work, is passed over as one that is away."""

    class Broken(Shaky):
        """Says no to all."""

        async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
            """Refuse."""
            raise StateBackendError(f"no room for {len(holds)}")

    clock = Clock()
    async with GuardedState(Broken(clock), timeout=5) as state:
        whole = Admission(Terms((a_cap(1),)), "v", state, Leases(state, ()), clock)
        admission = InTurn(whole)
        answer = await one_request(admission)

        assert 1 == len(answer)
        assert ["state_away"] == list(admission.flags)
        assert state.available
