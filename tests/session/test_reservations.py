"""What one ad request has reserved is counted, left to a beacon, or given back."""

import asyncio
from collections.abc import Sequence

import pytest

from vastproxy.errors import StateAwayError
from vastproxy.session.reservations import Reservations, State
from vastproxy.state.base import Account, Booking, Hold, Level, Verdict, money
from vastproxy.state.memory import InMemoryBackend

SPRING = Account("campaign", "spring")


class Failing(InMemoryBackend):
    """A backend whose next reservation happens, but fails, or never ends."""

    fails = False
    hangs = False

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, and lose the answer."""
        verdicts = await super().reserve(holds)
        if self.hangs:
            await asyncio.Event().wait()
        if self.fails:
            raise StateAwayError("the answer was lost")
        return verdicts

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, unless it fails."""
        if self.fails:
            raise StateAwayError("gone")
        return await super().confirm(holds)

    async def level(self) -> Level:
        """Tell what stands on the campaign's money."""
        [level] = await self.levels(SPRING, [money(0)])
        return level


def a_hold(operation: str = "o", amount: int = 1, limit: int | None = 10) -> Hold:
    """Build a hold of a campaign's money."""
    return Hold(SPRING, operation, (money(amount, limit),))


async def test_given_back_in_the_end() -> None:
    """What nobody keeps is given back when the request ends."""
    backend = Failing()
    async with Reservations(backend) as reservations:
        await reservations.reserve([a_hold("a", 3), a_hold("b", 4)])
        assert 2 == len(reservations)
        assert Level(0, 7) == await backend.level()

    assert 0 == len(reservations)
    assert Level() == await backend.level()


async def test_refused_needs_no_giving_back() -> None:
    """What was refused is not held, and nothing is done about it in the end."""
    backend = Failing()
    reservations = Reservations(backend)
    verdicts = await reservations.reserve([a_hold("a", 8), a_hold("b", 8)])

    assert [True, False] == [each.granted for each in verdicts]
    assert "<Reservations open: 1>" == repr(reservations)


async def test_left_to_a_beacon() -> None:
    """What is kept for a beacon stays reserved when the request ends."""
    backend = Failing()
    async with Reservations(backend) as reservations:
        holds = [a_hold("a", 3), a_hold("b", 4)]
        await reservations.reserve(holds)
        reservations.keep(holds[:1])

    assert Level(0, 3) == await backend.level()


async def test_counted_now() -> None:
    """What counts at once is counted, and is not given back in the end."""
    backend = Failing()
    async with Reservations(backend) as reservations:
        await reservations.reserve([a_hold("a", 3)])
        await reservations.count([a_hold("a", 3)])
        await reservations.count([])

    assert Level(3, 0) == await backend.level()


async def test_given_back_now() -> None:
    """What is released is free at once, and only that."""
    backend = Failing()
    reservations = Reservations(backend)
    await reservations.reserve([a_hold("a", 3), a_hold("b", 4)])
    await reservations.release([a_hold("b", 4)])
    await reservations.release([])

    assert Level(0, 3) == await backend.level()
    assert 1 == len(reservations)


async def test_answer_that_was_lost() -> None:
    """A reservation that may have happened is given back in the end."""
    backend = Failing()
    backend.fails = True
    async with Reservations(backend) as reservations:
        with pytest.raises(StateAwayError):
            await reservations.reserve([a_hold("a", 3)])
        assert Level(0, 3) == await backend.level()

    assert Level() == await backend.level()


async def test_cut_off_while_waiting() -> None:
    """A request that is cut off while it waits for its reservation gives it back."""
    backend = Failing()
    backend.hangs = True

    async def ask() -> None:
        """Reserve, and hang."""
        async with Reservations(backend) as reservations:
            await reservations.reserve([a_hold("a", 3)])

    async with asyncio.TaskGroup() as group:
        task = group.create_task(ask())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        held = await backend.level()
        task.cancel()

    assert Level(0, 3) == held
    assert Level() == await backend.level()


async def test_one_operation_on_two_accounts() -> None:
    """An id means an operation within its account only: two accounts may have the same."""
    backend = Failing()
    other = Hold(Account("campaign", "other"), "o", (money(1, 10),))
    async with Reservations(backend) as reservations:
        await reservations.reserve([a_hold("o", 3), other])
        reservations.keep([other])

    [level] = await backend.levels(other.account, [money(0)])
    assert (Level(), Level(0, 1)) == (await backend.level(), level)


def test_any_backend_will_do() -> None:
    """Reservations work on a backend as well as on what guards one."""
    state: State = InMemoryBackend()

    assert 0 == len(Reservations(state))
