"""Money reserved beforehand is spent without the state, and never twice."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from vastproxy.errors import StateAwayError
from vastproxy.flow.budgets import Budget
from vastproxy.flow.leases import AHEAD, LIFE, LOOK, SHARE, Leases
from vastproxy.state.base import Hold, Verdict, money
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend

PRICE = 1_000
BUDGET = Budget("spring", 1_000 * PRICE, price=PRICE, on_state_loss="lease", ttl_ms=60_000)
CHUNK = BUDGET.limit // SHARE
"""Of the first lease of a budget that nothing is spent of."""


@dataclass(slots=True)
class Time:
    """Seconds that pass when a test says so, for all clocks at once."""

    now: float = 1000.0

    def monotonic(self) -> float:
        """Tell the seconds."""
        return self.now

    def unix_ms(self) -> int:
        """Tell the milliseconds."""
        return int(self.now * 1000)


@dataclass(slots=True)
class World:
    """Leases of one process, and the state that they are of."""

    time: Time
    backend: InMemoryBackend
    state: GuardedState
    leases: Leases
    shown: list[Hold] = field(default_factory=list)

    def serve(self, price: int = PRICE) -> bool:
        """Serve an ad from a lease, if there is one."""
        lease = self.leases.take(BUDGET, price)
        if lease:
            operation = f"o{len(self.shown)}"
            self.shown.append(
                Hold(BUDGET.account, operation, (BUDGET.claim(price),), BUDGET.ttl_ms, lease=lease)
            )
        return bool(lease)

    def serve_all(self, price: int = PRICE) -> int:
        """Serve ads while there are leases; give how many that were."""
        count = 0
        while self.serve(price):
            count += 1
        return count

    async def confirm(self) -> list[str]:
        """Count what was shown."""
        return list(await self.state.confirm(self.shown))

    def chunks(self) -> list[int]:
        """Give what is left in each lease, the oldest first."""
        return [each.left for each in self.leases._campaigns["spring"].leases if each.there]

    async def money(self) -> tuple[int, int]:
        """Give what is spent and reserved."""
        [level] = await self.backend.levels(BUDGET.account, [BUDGET.claim(0)])
        return level.counted, level.reserved


@asynccontextmanager
async def a_world(*budgets: Budget, backend: InMemoryBackend | None = None) -> AsyncIterator[World]:
    """Open a state, and make leases that a test renews by hand."""
    time = Time()
    backend = backend or InMemoryBackend(clock=time.unix_ms)
    async with GuardedState(backend, timeout=5) as state:
        leases = Leases(state, budgets or (BUDGET,), time.monotonic)
        yield World(time, backend, state, leases)


async def test_first_chunk() -> None:
    """Of 1,000 ads that are left the first lease is for 20; they are reserved on the backend."""
    async with a_world() as world:
        assert not world.serve()
        await world.leases.renew()

        assert (0, 20 * PRICE) == await world.money()
        assert 20 == world.serve_all()
        assert f"<Leases {{'spring': {0.0}}}>" == repr(world.leases)


async def test_ads_are_drawn_from_their_lease() -> None:
    """What is shown is taken out of the reservation: it is never counted on top of it."""
    async with a_world() as world:
        await world.leases.renew()
        world.serve()
        world.serve()

        assert ["booked", "booked"] == await world.confirm()
        assert (2 * PRICE, CHUNK - 2 * PRICE) == await world.money()


async def test_renewed_before_it_runs_out() -> None:
    """When less than half of a lease is left the next one is reserved, and not before."""
    async with a_world() as world:
        await world.leases.renew()
        for _ in range(CHUNK // PRICE // 2):
            world.serve()
        world.time.now += LOOK
        await world.leases.renew()
        before = world.chunks()
        world.serve()
        await world.leases.renew()

        assert [CHUNK // 2] == before
        left = CHUNK // 2 - PRICE
        assert [left, (BUDGET.limit - CHUNK + left) // SHARE - left] == world.chunks()


async def test_chunk_is_for_some_seconds() -> None:
    """A chunk is what is spent in AHEAD seconds."""
    budget = replace(BUDGET, limit=10_000 * PRICE)
    async with a_world(budget) as world:
        await world.leases.renew()
        spent = world.serve_all() * PRICE
        world.time.now += 100
        await world.leases.renew()

        assert [0, int(spent / 100 * AHEAD)] == world.chunks()


async def test_what_is_there_lasts_for_half_of_it() -> None:
    """However long ads are served at one pace: there is always money for half of AHEAD."""
    budget = replace(BUDGET, limit=100_000 * PRICE)
    async with a_world(budget) as world:
        least = budget.limit
        for turn in range(4_000):
            await world.leases.renew()
            if turn * LOOK > AHEAD:
                least = min(least, sum(world.chunks()))
            assert world.serve()
            assert world.serve()
            world.time.now += LOOK
            await world.confirm()
            world.shown.clear()

        assert AHEAD / 2 <= least / PRICE / (2 / LOOK) <= AHEAD


async def test_slow_campaign() -> None:
    """Where hardly anything is spent a chunk is for one ad."""
    async with a_world() as world:
        await world.leases.renew()
        world.time.now += LIFE / 2
        await world.leases.renew()
        world.serve()
        world.time.now += AHEAD
        await world.leases.renew()

        assert [0, PRICE] == world.chunks()


async def test_chunk_of_a_busy_campaign() -> None:
    """However fast money goes, a chunk is no more than a fiftieth of what is left."""
    async with a_world() as world:
        await world.leases.renew()
        world.serve_all()
        world.time.now += LOOK
        await world.leases.renew()

        assert [0, (BUDGET.limit - CHUNK) // SHARE] == world.chunks()


async def test_old_lease_is_part_of_what_may_be_held() -> None:
    """A lease that takes the place of one in use makes both no more than a fiftieth."""
    async with a_world() as world:
        await world.leases.renew()
        for _ in range(5):
            world.serve()
        await world.confirm()
        for _ in range(10):
            world.time.now += LIFE / 20 + 1
            world.leases._campaigns["spring"].spent = BUDGET.limit
            await world.leases.renew()
            most = (BUDGET.limit - 5 * PRICE) // SHARE
            assert sum(world.chunks()) <= most

        assert [CHUNK - 5 * PRICE, most - (CHUNK - 5 * PRICE)] == world.chunks()


async def test_never_more_than_the_budget() -> None:
    """Two processes that lease and serve as fast as they can never pass the budget."""
    budget = replace(BUDGET, limit=137 * PRICE + PRICE // 2)
    async with a_world(budget) as world:
        other = Leases(world.state, [budget], world.time.monotonic)
        served = 0
        for _ in range(100):
            async with asyncio.TaskGroup() as group:
                group.create_task(world.leases.renew())
                group.create_task(other.renew())
            served += world.serve_all()
            while lease := other.take(budget, PRICE):
                served += 1
                hold = Hold(budget.account, f"x{served}", (budget.claim(PRICE),), lease=lease)
                world.shown.append(hold)
        world.time.now += 1

        assert 137 - SHARE < served <= 137
        assert {"booked"} == set(await world.confirm())
        assert served * PRICE == (await world.money())[0]


async def test_scattered_less_towards_the_end() -> None:
    """
    A process that is not asked for ads gives back what has become more than a fiftieth, and of
    fewer than fifty ads all.
    """
    async with a_world() as world:
        await world.leases.renew()
        held = []
        for amount in (500 * PRICE, 451 * PRICE):
            await world.backend.confirm([Hold(BUDGET.account, f"o{amount}", (money(amount),))])
            world.time.now += AHEAD
            await world.leases.renew()
            held.append(await world.money())

        assert [(500 * PRICE, PRICE), (951 * PRICE, 0)] == held


async def test_looks_while_nothing_is_left() -> None:
    """Of a campaign that is spent the state is looked at every AHEAD seconds, not at each look."""

    class Counting(InMemoryBackend):
        """Counts the looks."""

        looks = 0

        async def levels(self, account: Any, claims: Any) -> Any:
            """Look."""
            self.looks += 1
            return await super().levels(account, claims)

    backend = Counting(clock=lambda: 0)
    async with a_world(replace(BUDGET, limit=SHARE * PRICE - 1), backend=backend) as world:
        for _ in range(int(2 * AHEAD / LOOK)):
            await world.leases.renew()
            world.time.now += LOOK

        assert 2 == backend.looks


async def test_nothing_left() -> None:
    """Where a fiftieth of what is left does not pay for an ad, nothing is leased."""
    async with a_world(replace(BUDGET, limit=SHARE * PRICE - 1)) as world:
        await world.leases.renew()

        assert (0, 0) == await world.money()
        assert not world.leases.has(BUDGET, 1)


@pytest.mark.parametrize("price", [CHUNK + 1, 61 * CHUNK, 10**15])
async def test_dear_ads(price: int) -> None:
    """An ad that costs more than may be leased takes nothing, and leases stay as they are."""
    async with a_world() as world:
        await world.leases.renew()
        assert not world.serve(price)
        world.time.now += LIFE
        assert not world.serve(price)
        await world.leases.renew()

        assert [PRICE] == world.chunks()
        assert not world.leases.has(BUDGET, price)
        assert world.serve()


async def test_dear_ads_towards_the_end() -> None:
    """What could be leased, and cannot be any more, leaves leases to the ads of the usual price."""
    async with a_world() as world:
        await world.leases.renew()
        assert world.serve(CHUNK)
        world.time.now += LOOK
        await world.leases.renew()

        assert world.serve()


async def test_dear_ad_that_a_lease_could_be_for() -> None:
    """The price of one dear ad does not stay: a chunk is for the last ad that could be leased."""
    async with a_world() as world:
        await world.leases.renew()
        assert world.serve(2 * PRICE)
        assert world.serve()
        world.time.now += LIFE
        await world.leases.renew()

        assert [PRICE] == world.chunks()


async def test_ads_that_name_their_prices() -> None:
    """A chunk is for one ad at the least also where only the ads say what they cost."""
    budget = replace(BUDGET, price=None)
    async with a_world(budget) as world:
        await world.leases.renew()
        world.time.now += LIFE / 2
        await world.leases.renew()
        [without] = world.chunks()
        assert not world.leases.take(budget, 3 * PRICE)
        world.time.now += AHEAD
        await world.leases.renew()

        assert 1 == without
        assert world.leases.take(budget, 3 * PRICE)


@pytest.mark.parametrize("swapped", [False, True])
async def test_routes_that_wait_differently(*, swapped: bool) -> None:
    """A lease lasts for the ads of the route that waits longest for impressions."""
    day = replace(BUDGET, ttl_ms=86_400_000)
    budgets = [BUDGET, day] if swapped else [day, BUDGET]
    async with a_world(*budgets) as world:
        await world.leases.renew()
        world.serve_all()
        world.time.now += 86_400
        rest = Hold(BUDGET.account, "rest", (money(BUDGET.limit - CHUNK + 1, BUDGET.limit),))

        assert [False] == [each.granted for each in await world.backend.reserve([rest])]
        assert {"booked"} == set(await world.confirm())


async def test_end_of_a_lease() -> None:
    """A lease serves for LIFE; on the backend it lasts until its last ad could be shown."""
    async with a_world() as world:
        await world.leases.renew()
        world.time.now += LIFE - 0.001
        in_time = world.serve()
        world.time.now += 0.001
        too_late = world.serve()
        world.time.now += BUDGET.ttl_ms / 1000 - 0.002

        assert (True, False) == (in_time, too_late)
        assert not world.leases.has(BUDGET, PRICE)
        assert ["booked"] == await world.confirm()
        world.time.now += 1
        assert (PRICE, 0) == await world.money()


async def test_old_lease_that_nobody_used() -> None:
    """A lease in the second half of its life is replaced; if untouched, it is given back."""
    async with a_world() as world:
        await world.leases.renew()
        world.time.now += LIFE / 2 + 1
        await world.leases.renew()
        [lease] = world.leases._campaigns["spring"].leases

        assert (0, lease.amount) == await world.money()
        assert world.time.now == lease.began


async def test_old_lease_that_was_used() -> None:
    """A lease that an ad has taken from stays until it ends, for the ad that may be shown yet."""
    async with a_world() as world:
        await world.leases.renew()
        world.serve()
        world.time.now += LIFE / 2 + 1
        await world.leases.renew()

        assert [CHUNK - PRICE, PRICE] == world.chunks()
        assert ["booked"] == await world.confirm()


async def test_given_back() -> None:
    """What an ad took that was not served may be taken again."""
    async with a_world() as world:
        await world.leases.renew()
        lease = world.leases.take(BUDGET, CHUNK)
        full = world.serve()
        world.leases.give_back("spring", lease, CHUNK)
        world.leases.give_back("spring", "unknown", CHUNK)
        world.leases.give_back("unknown", lease, CHUNK)

        assert not full
        assert CHUNK // PRICE == world.serve_all()


async def test_given_back_late() -> None:
    """What was taken can be put back into a lease that was emptied; not into one that ended."""
    async with a_world() as world:
        await world.leases.renew()
        first = world.leases.take(BUDGET, CHUNK)
        world.time.now += LOOK
        await world.leases.renew()
        world.leases.give_back("spring", first, CHUNK)
        again = world.leases.take(BUDGET, CHUNK)
        world.time.now += LIFE
        await world.leases.renew()
        world.leases.give_back("spring", first, CHUNK)

        assert first == again
        assert [PRICE] == world.chunks()


async def test_without_the_state() -> None:
    """While the state is away nothing is renewed, and what was leased is served."""
    async with a_world() as world:
        await world.leases.renew()
        world.state.available = False
        world.time.now += 10
        served = world.serve_all()
        await world.leases.renew()
        world.state.available = True

        assert CHUNK // PRICE == served
        assert (0, CHUNK) == await world.money()


class Lossy(InMemoryBackend):
    """Reserves, and loses the answers while there are some to lose."""

    answers_to_lose = 1

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, and lose the answer."""
        verdicts = await super().reserve(holds)
        if self.answers_to_lose:
            self.answers_to_lose -= 1
            raise StateAwayError("the answer was lost")
        return verdicts


async def back(state: GuardedState) -> None:
    """Wait until *state* is found back."""
    async with asyncio.timeout(10):
        while not state.available:  # noqa: ASYNC110 - the guard has no event for it
            await asyncio.sleep(0.01)


async def test_lease_whose_answer_was_lost() -> None:
    """A lease that was not answered is no lease; it is asked for again, and counts once."""
    backend = Lossy(clock=lambda: 0)
    backend.answers_to_lose = 2
    async with a_world(backend=backend) as world:
        for _ in range(2):
            await world.leases.renew()
            assert not world.leases.has(BUDGET, PRICE)
            await back(world.state)
        await world.leases.renew()

        assert [CHUNK] == world.chunks()
        assert (0, CHUNK) == await world.money()


@pytest.mark.parametrize("how", ["old", "reloaded", "ended"])
async def test_lost_lease_that_is_wanted_no_more(how: str) -> None:
    """A lease that was not answered, and is not wanted when the state is back, is given back."""
    time = Time()
    async with a_world(backend=Lossy(clock=time.unix_ms)) as world:
        await world.leases.renew()
        await back(world.state)
        before = await world.money()
        if how == "old":
            time.now += LIFE / 2 + 1
            world.time.now += LIFE / 2 + 1
            await world.leases.renew()
        elif how == "reloaded":
            world.leases.use([])
            await world.leases.renew()
        else:
            async with world.leases:
                pass

        assert (0, CHUNK) == before
        assert (0, PRICE if how == "old" else 0) == await world.money()


async def test_reload() -> None:
    """Leases outlive twenty reloads: nothing is reserved anew, and what is there is served."""
    async with a_world() as world:
        for _ in range(CHUNK // PRICE // 2):
            await world.leases.renew()
            assert world.serve()
            world.leases.use([BUDGET])
        await world.leases.renew()

        assert [CHUNK // 2] == world.chunks()
        assert (0, CHUNK) == await world.money()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("limit", [None, BUDGET.limit - 1, BUDGET.limit + 1])
async def test_reload_with_another_limit(limit: int | None, *, used: bool) -> None:
    """
    A campaign that is gone, or may spend less, uses no lease from before: one that is untouched is
    given back. What was served from it is drawn from it. One that may spend more goes on.
    """
    async with a_world() as world:
        await world.leases.renew()
        if used:
            world.serve()
        world.leases.use([] if limit is None else [replace(BUDGET, limit=limit)])
        goes_on = world.leases.has(BUDGET, PRICE)
        world.leases.use([])
        await world.leases.renew()
        reserved = (await world.money())[1]

        assert (limit == BUDGET.limit + 1) == goes_on
        assert (CHUNK if used else 0) == reserved
        assert {"booked"} >= set(await world.confirm())


async def test_reload_that_lets_ads_wait_longer() -> None:
    """An ad that may wait longer than its lease lasts takes nothing; the next lease is for it."""
    longer = replace(BUDGET, ttl_ms=2 * BUDGET.ttl_ms)
    async with a_world() as world:
        await world.leases.renew()
        world.serve()
        world.leases.use([longer])
        early = world.leases.has(longer, PRICE)
        world.time.now += LIFE - BUDGET.ttl_ms / 1000
        late = (world.leases.has(longer, PRICE), world.leases.has(BUDGET, PRICE))
        await world.leases.renew()

        assert (True, (False, True)) == (early, late)
        assert world.leases.has(longer, PRICE)


class Slow(InMemoryBackend):
    """Answers one turn later."""

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, and wait."""
        verdicts = await super().reserve(holds)
        await asyncio.sleep(0)
        return verdicts

    async def levels(self, account: Any, claims: Any) -> Any:
        """Look, and wait."""
        levels = await super().levels(account, claims)
        await asyncio.sleep(0)
        return levels


@pytest.mark.parametrize("how", ["reloaded", "ended"])
async def test_end_while_a_lease_is_asked_for(how: str) -> None:
    """A lease that comes when its campaign, or the process, has gone is given back."""
    left, asked = [], 0
    for turns in range(12):
        async with a_world(backend=Slow(clock=lambda: 0)) as world:
            async with world.leases:
                for _ in range(turns):
                    await asyncio.sleep(0)
                asked += bool((await world.money())[1])
                if how == "reloaded":
                    world.leases.use([])
                    await asyncio.sleep(3 * LOOK if turns == 11 else 0.02)
            left.append(await world.money())

    assert asked
    assert [(0, 0)] * 12 == left


async def test_served_while_the_next_lease_is_asked_for() -> None:
    """A lease that is taken from while another is to take its place is not given back."""
    async with a_world() as world:
        slow = world.backend = Slow(clock=world.time.unix_ms)
        async with GuardedState(slow, timeout=5) as state:
            world.leases = Leases(state, [BUDGET], world.time.monotonic)
            await world.leases.renew()
            world.time.now += LIFE / 2
            async with asyncio.TaskGroup() as group:
                task = group.create_task(world.leases.renew())
                while len(world.leases._campaigns["spring"].leases) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0)
                world.serve()
                await task
            world.state = state

            assert [CHUNK - PRICE, PRICE] == world.chunks()
            assert ["booked"] == await world.confirm()


@pytest.mark.parametrize(
    "settings", [{"on_state_loss": "serve"}, {"on_state_loss": "deny"}, {"mode": "shadow"}]
)
async def test_who_wants_no_lease(settings: dict[str, Any]) -> None:
    """Budgets that do not want leases, or stop nothing, have none."""
    async with a_world(replace(BUDGET, **settings)) as world:
        await world.leases.renew()

        assert not world.leases
        assert not world.serve()
        assert (0, 0) == await world.money()


async def test_clean_end() -> None:
    """In the end a lease that nobody took from is given back; another stays for its ads."""
    async with a_world() as world:
        for used in (False, True):
            async with Leases(world.state, [BUDGET], world.time.monotonic) as leases:
                async with asyncio.timeout(10):
                    while not leases.has(BUDGET, PRICE):  # noqa: ASYNC110 - nor have these
                        await asyncio.sleep(0.01)
                if used:
                    leases.take(BUDGET, PRICE)
            level = await world.money()

            assert level == ((0, CHUNK) if used else (0, 0))


# --- Whatever happens ---------------------------------------------------------------------------


class Unsteady(InMemoryBackend):
    """Fails before or after it does what it was asked, and loses voids, as *luck* has it."""

    def __init__(self, clock: Time, luck: random.Random) -> None:
        super().__init__(clock=clock.unix_ms)
        self.luck = luck

    def _fails(self) -> bool:
        return self.luck.random() < 0.2

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, or not, or do and lose the answer."""
        if self._fails():
            raise StateAwayError("the question was lost")
        verdicts = await super().reserve(holds)
        if self._fails():
            raise StateAwayError("the answer was lost")
        return verdicts

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void, or not: the guard tells nobody."""
        if not self._fails():
            await super().void(holds)


@dataclass(slots=True)
class Process:
    """One proxy: its leases, and what it has served."""

    state: GuardedState
    leases: Leases
    budgets: list[Budget]
    """Of its routes now, and of one before them, whose requests are under way."""
    seen: list[tuple[float, Hold]] = field(default_factory=list)
    """Ads that wait for their impressions, and until when these are in time."""


@dataclass(slots=True)
class Chaos:
    """Two processes over one state, and what happens to them."""

    time: Time
    luck: random.Random
    backend: Unsteady
    processes: list[Process]
    served: int = 0
    leased: int = 0
    late: int = 0
    """Micro-units of impressions that came when nothing was reserved for them any more."""
    limit: int = 0
    """The highest that there was."""

    async def step(self, *, punctual: bool) -> None:
        """Let one thing happen; *punctual* beacons come before their time is over, or never."""
        each = self.luck.choice(self.processes)
        match self.luck.randrange(10):
            case 0 | 1:
                await each.leases.renew()
            case 2 | 3 | 4:
                await self.serve(each, self.luck.choice([PRICE, PRICE, 7 * PRICE, 1, 10**12]))
            case 5 | 6 | 7 if each.seen:
                ends, hold = each.seen.pop(self.luck.randrange(len(each.seen)))
                if self.time.now < ends or not punctual:
                    [booking] = await self.backend.confirm([hold])
                    self.late += hold.claims[0].amount if booking == "late" else 0
            case 8:
                each.state.available = self.luck.random() < 0.7
            case 9 if self.luck.random() < 0.2:
                self.reload(each)
        self.time.now += self.luck.choice([0, 0, 0.1, 1, 5, 40, 200])

    async def serve(self, process: Process, price: int) -> None:
        """Serve an ad, from a lease or by itself; some come to nothing after all."""
        budget = self.luck.choice(process.budgets)
        lease = process.leases.take(budget, price)
        if lease and self.luck.random() < 0.2:
            process.leases.give_back("spring", lease, price)
            return
        self.served += 1
        self.leased += bool(lease)
        hold = Hold(
            BUDGET.account, f"o{self.served}", (budget.claim(price),), budget.ttl_ms, lease=lease
        )
        if lease or await self.granted(process, hold):
            process.seen.append((self.time.now + budget.ttl_ms / 1000, hold))

    async def granted(self, process: Process, hold: Hold) -> bool:
        """Reserve *hold* by itself, if the state is there."""
        try:
            [verdict] = await process.state.reserve([hold] if process.state.available else [])
        except (StateAwayError, ValueError):
            return False
        return verdict.granted

    def reload(self, process: Process) -> None:
        """Give *process* other routes, or none; requests under way know an old one."""
        limit = self.luck.choice([200, 300, 400]) * PRICE
        waits = self.luck.sample([1_000, 60_000, 3_600_000], 2)
        routes = [replace(BUDGET, limit=limit, ttl_ms=each) for each in waits]
        routes = routes[: self.luck.choice([0, 1, 2, 2])]
        process.leases.use(routes)
        process.budgets = [self.luck.choice(process.budgets), *routes]
        self.limit = max(self.limit, limit)


@pytest.mark.parametrize("punctual", [True, False])
@pytest.mark.parametrize("seed", range(30))
async def test_never_overspent(seed: int, *, punctual: bool) -> None:
    """
    Whatever two processes lease, serve and lose: what is spent and reserved passes the limit by no
    more than came late, and nothing comes late where impressions come in time.
    """
    luck, time = random.Random(seed), Time()
    backend = Unsteady(time, luck)
    states = [GuardedState(backend, local=True) for _ in range(2)]
    processes = [Process(each, Leases(each, (), time.monotonic), [BUDGET]) for each in states]
    world = Chaos(time, luck, backend, processes, limit=BUDGET.limit)
    for each in processes:
        each.leases.use([BUDGET])
    for _ in range(600):
        await world.step(punctual=punctual)
        [level] = await backend.levels(BUDGET.account, [money(0)])
        assert level.counted + level.reserved <= world.limit + world.late
    time.now += LIFE + 3_601
    [level] = await backend.levels(BUDGET.account, [money(0)])

    assert world.leased
    assert not (punctual and world.late)
    assert 0 == level.reserved
