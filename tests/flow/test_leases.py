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
from vastproxy.state.base import Hold, Verdict
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
        lease = self.leases.take("spring", price)
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
    """The first lease is a hundredth of what is left, and is reserved on the backend."""
    async with a_world() as world:
        assert not world.serve()
        await world.leases.renew()

        assert (0, CHUNK) == await world.money()
        assert CHUNK // PRICE == world.serve_all()
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
        world.time.now += 60
        await world.leases.renew()
        before = await world.money()
        world.serve()
        await world.leases.renew()
        [_, second] = world.leases._campaigns["spring"].leases

        assert (0, CHUNK) == before
        assert (0, CHUNK + second.amount) == await world.money()


async def test_chunk_is_for_some_seconds() -> None:
    """A chunk is what is spent in AHEAD seconds, one ad at the least."""
    async with a_world() as world:
        await world.leases.renew()
        spent = world.serve_all() * PRICE
        world.time.now += 100
        await world.leases.renew()
        [lease] = [each for each in world.leases._campaigns["spring"].leases if each.left]

        assert max(PRICE, int(spent / 100 * AHEAD)) == lease.amount


async def test_chunk_of_a_busy_campaign() -> None:
    """However fast money goes, a chunk is no more than a hundredth of what is left."""
    async with a_world() as world:
        await world.leases.renew()
        world.serve_all()
        world.time.now += LOOK
        await world.leases.renew()

        assert (0, CHUNK + (BUDGET.limit - CHUNK) // SHARE) == await world.money()


async def test_never_more_than_the_budget() -> None:
    """Two processes that lease and serve as fast as they can never pass the budget."""
    budget = replace(BUDGET, limit=37 * PRICE + PRICE // 2)
    async with a_world(budget) as world:
        other = Leases(world.state, [budget], world.time.monotonic)
        served = 0
        for _ in range(100):
            async with asyncio.TaskGroup() as group:
                group.create_task(world.leases.renew())
                group.create_task(other.renew())
            served += world.serve_all()
            while lease := other.take("spring", PRICE):
                served += 1
                hold = Hold(budget.account, f"x{served}", (budget.claim(PRICE),), lease=lease)
                world.shown.append(hold)
        world.time.now += 1

        assert 37 == served
        assert {"booked"} == set(await world.confirm())
        assert (37 * PRICE, 0) == await world.money()


async def test_nothing_left() -> None:
    """Where less is left than an ad costs, nothing is leased."""
    async with a_world(replace(BUDGET, limit=PRICE - 1)) as world:
        await world.leases.renew()

        assert (0, 0) == await world.money()
        assert not world.leases.has("spring", 1)


async def test_dear_ads() -> None:
    """When an ad was too dear for the lease, the next lease has room for one like it."""
    async with a_world() as world:
        await world.leases.renew()
        assert not world.serve(3 * CHUNK)
        await world.leases.renew()

        assert world.leases.has("spring", 3 * CHUNK)
        assert world.serve(3 * CHUNK)


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
        assert not world.leases.has("spring", PRICE)
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
        assert world.time.now + LIFE == lease.ends


async def test_old_lease_that_was_used() -> None:
    """A lease that an ad has taken from stays until it ends, for the ad that may be shown yet."""
    async with a_world() as world:
        await world.leases.renew()
        world.serve()
        world.time.now += LIFE / 2 + 1
        await world.leases.renew()

        assert 2 == len(world.leases._campaigns["spring"].leases)
        assert ["booked"] == await world.confirm()


async def test_given_back() -> None:
    """What an ad took that was not served may be taken again."""
    async with a_world() as world:
        await world.leases.renew()
        lease = world.leases.take("spring", CHUNK)
        full = world.serve()
        world.leases.give_back("spring", lease, CHUNK)
        world.leases.give_back("spring", "unknown", CHUNK)
        world.leases.give_back("unknown", lease, CHUNK)

        assert not full
        assert CHUNK // PRICE == world.serve_all()


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


async def test_lease_that_fails() -> None:
    """A lease that could not be reserved is no lease; the next look tries again."""

    class Failing(InMemoryBackend):
        """Fails at the first reservation, after it has happened."""

        failed = False

        async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
            """Reserve, and lose the answer once."""
            verdicts = await super().reserve(holds)
            if not self.failed:
                self.failed = True
                raise StateAwayError("the answer was lost")
            return verdicts

    async with a_world(backend=Failing(clock=lambda: 0)) as world:
        await world.leases.renew()
        first = world.leases.has("spring", PRICE)
        async with asyncio.timeout(10):
            while not world.state.available:  # noqa: ASYNC110 - the guard has no event for it
                await asyncio.sleep(0.01)
        await world.leases.renew()

        assert not first
        assert world.leases.has("spring", PRICE)


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
                    while not leases.has("spring", PRICE):  # noqa: ASYNC110 - nor have these
                        await asyncio.sleep(0.01)
                if used:
                    leases.take("spring", PRICE)
            level = await world.money()

            assert level == ((0, CHUNK) if used else (0, 0))


@pytest.mark.parametrize("seed", range(20))
async def test_never_overspent(seed: int) -> None:
    """
    However leases are renewed, served from, and shown or not, in whatever order: what is spent
    and reserved stays within the budget, and in the end nothing is reserved.
    """
    luck = random.Random(seed)
    budget = replace(BUDGET, limit=luck.randint(5, 300) * PRICE)
    async with a_world(budget) as world:
        taken: list[tuple[str, int]] = []
        for _ in range(200):
            world.time.now += luck.choice([0, 0.1, 5, 60])
            match luck.randrange(4):
                case 0:
                    await world.leases.renew()
                case 1:
                    price = luck.choice([PRICE, PRICE, 7 * PRICE, 1])
                    if lease := world.leases.take("spring", price):
                        taken.append((lease, price))
                case 2 if taken:
                    lease, price = taken.pop(luck.randrange(len(taken)))
                    world.leases.give_back("spring", lease, price)
                case 3 if taken:
                    lease, price = taken.pop()
                    name = f"o{luck.random()}"
                    hold = Hold(budget.account, name, (budget.claim(price),), lease=lease)
                    if world.time.now - 1000 < LIFE:
                        assert ["booked"] == list(await world.state.confirm([hold]))
            counted, reserved = await world.money()
            assert counted + reserved <= budget.limit
        world.time.now += LIFE + 61

        assert 0 == (await world.money())[1]
