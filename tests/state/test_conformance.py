"""
Every backend keeps the contract of ``vastproxy.state.base``: the same tests for all of them.

Most tests take a backend and its clock and nothing else, so that the tests can themselves be
tested: at the end of this file they meet backends that are wrong on purpose.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from tests.support import faulty_state as faulty
from tests.support.state_model import (
    DAY,
    Clock,
    Player,
    a_campaign,
    a_hold,
    a_script,
    a_viewer,
    confirm,
    level,
    reserve,
)
from vastproxy.errors import StateBackendError
from vastproxy.state.base import (
    BUDGET_PREFIX,
    MAX_AMOUNT,
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    Account,
    Claim,
    Hold,
    Level,
    StateBackend,
    Verdict,
    Window,
    money,
)
from vastproxy.state.memory import InMemoryBackend

HOUR = 3_600_000
GRANTED = Verdict(granted=True)
ODD_NAMES = (
    "two words",
    "{braces}",
    "}{",
    "{}",
    "a:b:c",
    "per%cent%7B",
    "quote'\"\\",
    "Ünïcødé 名前 🙂",
    "new\nline\ttab",
    "x" * 200,
    "*?[a-z]",
    "$1 :name @p",
)


# --- Reserving -----------------------------------------------------------------------------------


async def test_limit_is_the_most_that_is_granted(backend: StateBackend, clock: Clock) -> None:
    """A limit of three grants three reservations, and names the claim that refuses the fourth."""
    viewer, claim = a_viewer(), Claim("ads", limit=3)

    verdicts = [await reserve(backend, a_hold(viewer, claim)) for _ in range(4)]

    assert [GRANTED] * 3 + [Verdict(granted=False, refused=0)] == verdicts
    assert Level(0, 3) == await level(backend, viewer)
    clock.move(1)
    assert Level(0, 3) == await level(backend, viewer)


async def test_limit_of_zero_means_never(backend: StateBackend, clock: Clock) -> None:
    """A limit of zero grants nothing; no limit grants anything."""
    viewer = a_viewer()
    del clock

    assert Verdict(granted=False, refused=0) == await reserve(
        backend, a_hold(viewer, Claim("ads", limit=0))
    )
    assert GRANTED == await reserve(backend, a_hold(viewer, Claim("ads", amount=10**6)))
    assert GRANTED == await reserve(backend, a_hold(viewer, Claim("none", amount=0, limit=0)))


async def test_reserved_and_counted_share_the_limit(backend: StateBackend, clock: Clock) -> None:
    """What is reserved and what is counted never pass a limit together."""
    viewer, claim = a_viewer(), Claim("ads", limit=2)
    shown = a_hold(viewer, claim)
    del clock

    await reserve(backend, shown)
    await confirm(backend, shown)
    second = await reserve(backend, a_hold(viewer, claim))
    third = await reserve(backend, a_hold(viewer, claim))

    assert (GRANTED, Verdict(granted=False, refused=0)) == (second, third)
    assert Level(1, 1) == await level(backend, viewer)


async def test_amounts_are_weighed(backend: StateBackend, clock: Clock) -> None:
    """What fits is granted to the last unit, also after something larger was refused."""
    campaign = a_campaign()
    del clock

    assert GRANTED == await reserve(backend, a_hold(campaign, money(700, 1_000)))
    assert not (await reserve(backend, a_hold(campaign, money(301, 1_000)))).granted
    assert GRANTED == await reserve(backend, a_hold(campaign, money(300, 1_000)))
    assert Level(0, 1_000) == await level(backend, campaign)


async def test_hold_is_all_or_nothing(backend: StateBackend, clock: Clock) -> None:
    """Where one of several claims has no room, none of them is reserved."""
    viewer = a_viewer()
    claims = (Claim("a", limit=5), Claim("b", amount=2, limit=1), Claim("c", limit=0))
    del clock

    verdict = await reserve(backend, a_hold(viewer, *claims))

    assert Verdict(granted=False, refused=1) == verdict
    assert [Level()] * 3 == await backend.levels(viewer, claims)


async def test_refused_operation_may_ask_again(backend: StateBackend, clock: Clock) -> None:
    """An operation that was refused is not settled: it is granted once there is room."""
    viewer, claim = a_viewer(), Claim("ads", limit=1)
    first, second = a_hold(viewer, claim), a_hold(viewer, claim)
    del clock

    await reserve(backend, first)
    assert not (await reserve(backend, second)).granted
    await backend.void([first])

    assert GRANTED == await reserve(backend, second)


async def test_claims_not_enforced_are_left_out(backend: StateBackend, clock: Clock) -> None:
    """A full claim that is not enforced is told, and is not part of the reservation."""
    viewer = a_viewer()
    claims = (
        Claim("a", limit=0, enforced=False),
        Claim("b", limit=2),
        Claim("c", amount=3, limit=2, enforced=False),
    )
    hold = a_hold(viewer, *claims)
    expected = Verdict(granted=True, over=(0, 2))
    del clock

    assert expected == await reserve(backend, hold)
    assert [Level(), Level(0, 1), Level()] == await backend.levels(viewer, claims)
    assert expected == await reserve(backend, hold)
    assert "booked" == await confirm(backend, replace(hold, claims=claims[1:2]))
    assert [Level(), Level(1, 0), Level()] == await backend.levels(viewer, claims)


async def test_hold_of_full_claims_not_enforced_is_granted(
    backend: StateBackend, clock: Clock
) -> None:
    """Where nothing is enforced and nothing has room, the hold is granted and reserves nothing."""
    viewer = a_viewer()
    hold = a_hold(viewer, Claim("ads", limit=0, enforced=False))
    del clock

    assert Verdict(granted=True, over=(0,)) == await reserve(backend, hold)
    assert Level() == await level(backend, viewer)
    assert "booked" == await confirm(backend, hold)
    assert Level(1) == await level(backend, viewer)


async def test_enforced_claim_refuses_beside_others(backend: StateBackend, clock: Clock) -> None:
    """An enforced claim refuses the hold, and is named, also behind claims not enforced."""
    viewer = a_viewer()
    claims = (Claim("a", limit=0, enforced=False), Claim("b", limit=0), Claim("c"))
    del clock

    assert Verdict(granted=False, refused=1) == await reserve(backend, a_hold(viewer, *claims))
    assert [Level()] * 3 == await backend.levels(viewer, claims)


async def test_reserve_again_takes_nothing(backend: StateBackend, clock: Clock) -> None:
    """A reservation that is repeated is granted again, and room is taken once."""
    viewer = a_viewer()
    hold = a_hold(viewer, Claim("ads", limit=1))

    assert GRANTED == await reserve(backend, hold)
    clock.move(1)
    assert [GRANTED] * 3 == await backend.reserve([hold] * 3)
    assert Level(0, 1) == await level(backend, viewer)


async def test_reserve_again_does_not_prolong(backend: StateBackend, clock: Clock) -> None:
    """A repetition does not make a reservation last longer."""
    viewer = a_viewer()
    hold = a_hold(viewer, ttl_ms=1_000)

    await reserve(backend, hold)
    clock.move(900)
    await reserve(backend, hold)
    clock.move(100)

    assert Level() == await level(backend, viewer)


async def test_reserve_after_confirm_takes_nothing(backend: StateBackend, clock: Clock) -> None:
    """A reservation that comes after its confirmation is granted, and takes no room."""
    viewer = a_viewer()
    hold = a_hold(viewer, Claim("ads", limit=1))
    del clock

    await reserve(backend, hold)
    await confirm(backend, hold)

    assert (await reserve(backend, hold)).granted
    assert Level(1, 0) == await level(backend, viewer)


async def test_reserve_after_void_is_refused(backend: StateBackend, clock: Clock) -> None:
    """A reservation that comes after its void is refused, and no claim is to blame."""
    viewer = a_viewer()
    hold = a_hold(viewer)
    del clock

    await backend.void([hold])

    assert Verdict(granted=False) == await reserve(backend, hold)
    assert Level() == await level(backend, viewer)


async def test_reservation_lapses(backend: StateBackend, clock: Clock) -> None:
    """A reservation holds its room until its time is over, to the millisecond."""
    viewer, claim = a_viewer(), Claim("ads", limit=1)

    await reserve(backend, a_hold(viewer, claim, ttl_ms=1_000))
    clock.move(999)
    assert not (await reserve(backend, a_hold(viewer, claim))).granted
    assert Level(0, 1) == await level(backend, viewer)
    clock.move(1)

    assert Level() == await level(backend, viewer)
    assert GRANTED == await reserve(backend, a_hold(viewer, claim))
    assert Level(0, 1) == await level(backend, viewer)


async def test_reservations_lapse_each_by_itself(backend: StateBackend, clock: Clock) -> None:
    """Of several reservations those lapse whose time is over, whichever was made first."""
    campaign = a_campaign()
    await reserve(backend, a_hold(campaign, money(1), ttl_ms=3_000))
    await reserve(backend, a_hold(campaign, money(10), ttl_ms=1_000))
    await reserve(backend, a_hold(campaign, money(100), ttl_ms=2_000))

    found = []
    for _ in range(4):
        found.append((await level(backend, campaign)).reserved)
        clock.move(1_000)

    assert [111, 101, 1, 0] == found


async def test_lapsed_operation_may_reserve_again(backend: StateBackend, clock: Clock) -> None:
    """An operation whose reservation has lapsed may reserve once more."""
    viewer = a_viewer()
    hold = a_hold(viewer, Claim("ads", limit=1), ttl_ms=1_000)

    await reserve(backend, hold)
    clock.move(1_000)

    assert GRANTED == await reserve(backend, hold)
    assert Level(0, 1) == await level(backend, viewer)
    clock.move(1_000)
    assert Level() == await level(backend, viewer)


async def test_many_reservations_lapse_at_once(backend: StateBackend, clock: Clock) -> None:
    """However many reservations have lapsed, none of them takes room."""
    campaign = a_campaign()
    holds = [a_hold(campaign, money(2, 3_000), ttl_ms=1_000) for _ in range(1_500)]

    assert 1_500 == sum(each.granted for each in await backend.reserve(holds))
    assert not (await reserve(backend, a_hold(campaign, money(1, 3_000)))).granted
    clock.move(1_000)

    assert Level() == await level(backend, campaign)
    assert GRANTED == await reserve(backend, a_hold(campaign, money(3_000, 3_000)))


# --- Confirming ----------------------------------------------------------------------------------


async def test_confirm_counts_what_was_reserved(backend: StateBackend, clock: Clock) -> None:
    """A confirmation turns what was reserved into what counts."""
    viewer = a_viewer()
    claims = (Claim("a", 2, 5), Claim("b", 3, 5))
    hold = a_hold(viewer, *claims)
    del clock

    await reserve(backend, hold)
    assert "booked" == await confirm(backend, hold)
    assert [Level(2), Level(3)] == await backend.levels(viewer, claims)


async def test_confirmed_does_not_lapse(backend: StateBackend, clock: Clock) -> None:
    """What was confirmed stays counted when the time of its reservation is over."""
    viewer = a_viewer()
    hold = a_hold(viewer, Claim("ads", limit=1), ttl_ms=1_000)

    await reserve(backend, hold)
    await confirm(backend, hold)
    clock.move(2_000)

    assert Level(1) == await level(backend, viewer)
    assert not (await reserve(backend, a_hold(viewer, Claim("ads", limit=1)))).granted
    assert Level(1) == await level(backend, viewer)


async def test_confirm_again_counts_nothing(backend: StateBackend, clock: Clock) -> None:
    """A confirmation that is repeated counts nothing, in one call or in several."""
    viewer = a_viewer()
    hold = a_hold(viewer)

    await reserve(backend, hold)
    first = await backend.confirm([hold, hold])
    clock.move(1)
    second = await backend.confirm([hold])

    assert ["booked", "again", "again"] == first + second
    assert Level(1) == await level(backend, viewer)


async def test_confirm_after_expiry_counts_late(backend: StateBackend, clock: Clock) -> None:
    """A confirmation whose reservation has lapsed counts once, and passes the limit."""
    viewer, claim = a_viewer(), Claim("ads", limit=1)
    slow, quick = a_hold(viewer, claim, ttl_ms=1_000), a_hold(viewer, claim)

    await reserve(backend, slow)
    clock.move(1_000)
    await reserve(backend, quick)

    assert ["booked", "late", "again"] == await backend.confirm([quick, slow, slow])
    assert Level(2) == await level(backend, viewer)


async def test_confirm_after_void_counts_late(backend: StateBackend, clock: Clock) -> None:
    """A confirmation after a void counts, once."""
    viewer = a_viewer()
    hold = a_hold(viewer)
    del clock

    await reserve(backend, hold)
    await backend.void([hold])

    assert ["late", "again"] == [await confirm(backend, hold) for _ in range(2)]
    assert Level(1) == await level(backend, viewer)
    assert (await reserve(backend, hold)).granted


async def test_confirm_of_what_was_never_reserved(backend: StateBackend, clock: Clock) -> None:
    """A confirmation that nobody reserved counts, once, whatever the limit."""
    viewer = a_viewer()
    hold = a_hold(viewer, Claim("ads", limit=0))
    del clock

    assert ["late", "again"] == [await confirm(backend, hold) for _ in range(2)]
    assert Level(1) == await level(backend, viewer)


async def test_confirm_counts_final_amounts(backend: StateBackend, clock: Clock) -> None:
    """The amounts of the confirmation count, not those of the reservation, which is all freed."""
    cheap, dear = a_campaign(), a_campaign()
    reserved = [a_hold(each, money(100, 100)) for each in (cheap, dear)]
    del clock

    await backend.reserve(reserved)
    final = [
        replace(hold, claims=(money(amount),))
        for hold, amount in zip(reserved, (60, 140), strict=True)
    ]

    assert ["booked", "booked"] == await backend.confirm(final)
    assert Level(60) == await level(backend, cheap)
    assert Level(140) == await level(backend, dear)


async def test_confirm_frees_claims_that_do_not_count(backend: StateBackend, clock: Clock) -> None:
    """A claim that was reserved and is not confirmed is freed, and not counted."""
    viewer = a_viewer()
    claims = (Claim("a", limit=1), Claim("b", limit=1))
    hold = a_hold(viewer, *claims)
    del clock

    await reserve(backend, hold)
    await confirm(backend, replace(hold, claims=claims[:1]))

    assert [Level(1), Level()] == await backend.levels(viewer, claims)


# --- Voiding -------------------------------------------------------------------------------------


async def test_void_gives_the_room_back(backend: StateBackend, clock: Clock) -> None:
    """A void frees what was reserved, and counts nothing."""
    viewer, claim = a_viewer(), Claim("ads", limit=1)
    hold = a_hold(viewer, claim)
    del clock

    await reserve(backend, hold)
    await backend.void([hold])

    assert Level() == await level(backend, viewer)
    assert GRANTED == await reserve(backend, a_hold(viewer, claim))


async def test_void_again_frees_nothing(backend: StateBackend, clock: Clock) -> None:
    """A void that is repeated leaves other reservations alone."""
    viewer = a_viewer()
    hold, other = a_hold(viewer), a_hold(viewer)
    del clock

    await backend.reserve([hold, other])
    await backend.void([hold, hold])
    await backend.void([hold])

    assert Level(0, 1) == await level(backend, viewer)


async def test_void_after_confirm_leaves_it_counted(backend: StateBackend, clock: Clock) -> None:
    """What was confirmed stays counted, and known, whatever is voided."""
    viewer = a_viewer()
    hold = a_hold(viewer)
    del clock

    await reserve(backend, hold)
    await confirm(backend, hold)
    await backend.void([hold])

    assert Level(1) == await level(backend, viewer)
    assert "again" == await confirm(backend, hold)


# --- Remembering ---------------------------------------------------------------------------------


async def test_confirmed_operation_is_remembered(backend: StateBackend, clock: Clock) -> None:
    """A confirmed operation is remembered for its time; after that its id means a new one."""
    viewer = a_viewer()
    hold = a_hold(viewer, ttl_ms=1_000, keep_ms=5_000)

    await reserve(backend, hold)
    await confirm(backend, hold)
    clock.move(4_999)
    assert "again" == await confirm(backend, hold)
    assert Level(1) == await level(backend, viewer)
    clock.move(1)

    assert "late" == await confirm(backend, hold)
    assert Level(2) == await level(backend, viewer)


async def test_voided_operation_is_remembered(backend: StateBackend, clock: Clock) -> None:
    """A voided operation is refused as long as it could be reserved; then its id is a new one."""
    viewer = a_viewer()
    hold = a_hold(viewer, ttl_ms=5_000, keep_ms=1)

    await backend.void([hold])
    clock.move(4_999)
    assert not (await reserve(backend, hold)).granted
    clock.move(1)

    assert GRANTED == await reserve(backend, hold)
    assert Level(0, 1) == await level(backend, viewer)


async def test_void_again_does_not_prolong(backend: StateBackend, clock: Clock) -> None:
    """A void that is repeated is remembered no longer."""
    hold = a_hold(a_viewer(), ttl_ms=5_000)

    await backend.void([hold])
    clock.move(3_000)
    await backend.void([hold])
    clock.move(2_000)

    assert GRANTED == await reserve(backend, hold)


async def test_operations_of_two_accounts_are_two(backend: StateBackend, clock: Clock) -> None:
    """An operation's id is unique within its account: another account's is another operation."""
    one, two = a_hold(a_viewer(), operation="same"), a_hold(a_viewer(), operation="same")
    del clock

    assert ["late"] == await backend.confirm([one])
    assert [GRANTED] == await backend.reserve([two])
    assert [Level(1), Level(0, 1)] == [
        await level(backend, one.account),
        await level(backend, two.account),
    ]
    assert "booked" == await confirm(backend, two)


# --- Leases --------------------------------------------------------------------------------------


async def test_lease_is_drawn_from(backend: StateBackend, clock: Clock) -> None:
    """Confirming under a lease takes the amount out of the lease's reservation."""
    campaign = a_campaign()
    lease = a_hold(campaign, money(10, 10))
    ads = [a_hold(campaign, money(4), lease=lease.operation) for _ in range(2)]
    del clock

    await reserve(backend, lease)
    assert ["booked", "booked", "again"] == await backend.confirm([*ads, ads[0]])
    assert Level(8, 2) == await level(backend, campaign)


async def test_lease_without_room_counts_late(backend: StateBackend, clock: Clock) -> None:
    """What a lease has no room for counts as late, and takes what was left of the lease."""
    campaign = a_campaign()
    lease = a_hold(campaign, money(10, 10))
    ads = [a_hold(campaign, money(7), lease=lease.operation) for _ in range(2)]
    del clock

    await reserve(backend, lease)
    assert ["booked", "late"] == await backend.confirm(ads)
    assert Level(14, 0) == await level(backend, campaign)


async def test_lease_that_is_over_counts_late(backend: StateBackend, clock: Clock) -> None:
    """What is confirmed under a lease that has lapsed, or never was, counts as late."""
    campaign = a_campaign()
    lease = a_hold(campaign, money(10, 10), ttl_ms=1_000)
    ads = [a_hold(campaign, money(1), lease=name) for name in (lease.operation, "no-such-lease")]

    await reserve(backend, lease)
    clock.move(1_000)

    assert ["late", "late"] == await backend.confirm(ads)
    assert Level(2, 0) == await level(backend, campaign)


async def test_rest_of_a_lease_is_freed(backend: StateBackend, clock: Clock) -> None:
    """What a lease has left is freed by its void or its end, and what was drawn stays counted."""
    voided, lapsed = a_campaign(), a_campaign()
    leases = [a_hold(each, money(10, 10), ttl_ms=1_000) for each in (voided, lapsed)]
    ads = [a_hold(each.account, money(3), lease=each.operation) for each in leases]

    await backend.reserve(leases)
    await backend.confirm(ads)
    await backend.void(leases[:1])
    assert [Level(3, 0), Level(3, 7)] == [
        await level(backend, voided),
        await level(backend, lapsed),
    ]
    clock.move(1_000)

    assert Level(3, 0) == await level(backend, lapsed)


async def test_lease_of_several_counters(backend: StateBackend, clock: Clock) -> None:
    """A lease covers a hold only if it covers all of its claims; what it has is drawn anyway."""
    viewer = a_viewer()
    claims = (Claim("a", 1), Claim("b", 1))
    lease = a_hold(viewer, Claim("a", 5))
    del clock

    await reserve(backend, lease)
    both = await confirm(backend, a_hold(viewer, *claims, lease=lease.operation))
    one = await confirm(backend, a_hold(viewer, claims[0], lease=lease.operation))

    assert ("late", "booked") == (both, one)
    assert [Level(2, 3), Level(1, 0)] == await backend.levels(viewer, claims)


async def test_own_reservation_goes_before_the_lease(backend: StateBackend, clock: Clock) -> None:
    """An operation that has a reservation of its own takes nothing out of the lease it names."""
    campaign = a_campaign()
    lease = a_hold(campaign, money(10))
    own = a_hold(campaign, money(4), lease=lease.operation)
    del clock

    await backend.reserve([lease, own])
    assert "booked" == await confirm(backend, own)
    assert Level(4, 10) == await level(backend, campaign)


# --- Windows -------------------------------------------------------------------------------------


async def _shown(backend: StateBackend, account: Account, claim: Claim) -> None:
    hold = a_hold(account, claim)
    await reserve(backend, hold)
    await confirm(backend, hold)


async def test_rolling_window(backend: StateBackend, clock: Clock) -> None:
    """In a rolling window each confirmation counts for its own length of time."""
    viewer, claim = a_viewer(), Claim("ads", limit=2, window=Window("rolling", HOUR))

    await _shown(backend, viewer, claim)
    clock.move(HOUR // 2)
    await _shown(backend, viewer, claim)
    assert Level(2) == await level(backend, viewer, claim)
    assert not (await reserve(backend, a_hold(viewer, claim))).granted
    clock.move(HOUR // 2 - 1)
    assert Level(2) == await level(backend, viewer, claim)
    clock.move(1 + HOUR // 1_000)

    assert Level(1) == await level(backend, viewer, claim)
    assert GRANTED == await reserve(backend, a_hold(viewer, claim))
    clock.move(HOUR // 2)
    assert Level(0) == await level(backend, viewer, claim)


async def test_rolling_window_knows_no_borders(backend: StateBackend, clock: Clock) -> None:
    """Two confirmations close together count together, wherever an hour of the clock ends."""
    viewer, claim = a_viewer(), Claim("ads", limit=2, window=Window("rolling", HOUR))

    clock.move(HOUR - 1)
    await _shown(backend, viewer, claim)
    clock.move(2)
    await _shown(backend, viewer, claim)

    assert Level(2) == await level(backend, viewer, claim)
    assert not (await reserve(backend, a_hold(viewer, claim))).granted


@pytest.mark.parametrize("ms", [10_000, 999, 1_999, 100_003])
async def test_rolling_window_errs_by_a_thousandth(
    backend: StateBackend, clock: Clock, ms: int
) -> None:
    """A piece, a thousandth of the window, counts until the last of it could count no more."""
    claim, width = Claim("ads", window=Window("rolling", ms)), max(1, ms // 1_000)
    clock.move(-clock.now % width)
    first, last = a_viewer(), a_viewer()

    await confirm(backend, a_hold(first, claim))
    clock.move(width - 1)
    await confirm(backend, a_hold(last, claim))
    clock.move(ms)
    assert [Level(1)] * 2 == [await level(backend, each, claim) for each in (first, last)]
    clock.move(1)

    assert [Level(0)] * 2 == [await level(backend, each, claim) for each in (first, last)]


async def test_fixed_window(backend: StateBackend, clock: Clock) -> None:
    """A fixed window begins with the first confirmation, and all of it ends at once."""
    viewer, claim = a_viewer(), Claim("ads", limit=2, window=Window("fixed", 10_000))

    clock.move(3_333)
    await _shown(backend, viewer, claim)
    clock.move(9_000)
    await _shown(backend, viewer, claim)
    clock.move(999)
    assert Level(2) == await level(backend, viewer, claim)
    assert not (await reserve(backend, a_hold(viewer, claim))).granted
    clock.move(1)

    assert Level(0) == await level(backend, viewer, claim)
    await _shown(backend, viewer, claim)
    clock.move(9_999)
    assert Level(1) == await level(backend, viewer, claim)
    clock.move(1)
    assert Level(0) == await level(backend, viewer, claim)


async def test_calendar_window(backend: StateBackend, clock: Clock) -> None:
    """A calendar's count begins anew at each bound, however long the periods are."""
    now = clock.now
    bounds = tuple(now + each for each in (-DAY, 0, 23 * HOUR, 48 * HOUR, 72 * HOUR))
    viewer, claim = a_viewer(), Claim("ads", limit=1, window=Window("calendar", bounds=bounds))

    found = []
    for ms in (0, 23 * HOUR - 1, 1, 25 * HOUR - 1, 1):
        clock.move(ms)
        found.append((await level(backend, viewer, claim)).counted)
        await _shown(backend, viewer, claim)

    assert [0, 1, 0, 1, 0] == found


async def test_calendar_moves_on(backend: StateBackend, clock: Clock) -> None:
    """Later calls may name later bounds of the same calendar, and the count goes on."""
    viewer = a_viewer()
    days = [tuple(clock.now + DAY * each for each in range(at, at + 5)) for at in (-3, -1)]
    claims = [Claim("ads", window=Window("calendar", bounds=bounds)) for bounds in days]
    clock.move(HOUR)

    await _shown(backend, viewer, claims[0])
    await _shown(backend, viewer, claims[1])
    assert Level(2) == await level(backend, viewer, claims[1])
    clock.move(DAY)

    assert Level(0) == await level(backend, viewer, claims[1])


async def test_lifetime_does_not_end(backend: StateBackend, clock: Clock) -> None:
    """What counts for ever still counts in ten years, swept or not."""
    viewer, campaign = a_viewer(), a_campaign()

    await backend.confirm([a_hold(viewer), a_hold(campaign, money(7))])
    clock.move(3_650 * DAY)
    await backend.sweep()

    assert Level(1) == await level(backend, viewer)
    assert Level(7) == await level(backend, campaign)


async def test_reservation_outlives_a_window(backend: StateBackend, clock: Clock) -> None:
    """A reservation takes room in the period in which it is confirmed, not where it was made."""
    viewer, claim = a_viewer(), Claim("ads", limit=1, window=Window("fixed", 1_000))
    await _shown(backend, viewer, claim)
    clock.move(1_000)
    hold = a_hold(viewer, claim, ttl_ms=60_000)
    await reserve(backend, hold)
    clock.move(30_000)
    assert Level(0, 1) == await level(backend, viewer, claim)

    assert "booked" == await confirm(backend, hold)
    clock.move(999)
    assert Level(1) == await level(backend, viewer, claim)
    clock.move(1)
    assert Level() == await level(backend, viewer, claim)


async def test_windows_of_one_hold_are_counted_apart(backend: StateBackend, clock: Clock) -> None:
    """Each claim of a hold counts in its own window."""
    viewer, bounds = a_viewer(), tuple(clock.now + each for each in (-DAY, 0, 2_500, DAY))
    claims = (
        Claim("rolling", window=Window("rolling", 3_000)),
        Claim("fixed", window=Window("fixed", 2_000)),
        Claim("calendar", window=Window("calendar", bounds=bounds)),
        Claim("lifetime"),
    )

    found = []
    for _ in range(4):
        found.append([each.counted for each in await backend.levels(viewer, claims)])
        await confirm(backend, a_hold(viewer, *claims))
        clock.move(1_000)

    assert [[0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 2, 2], [3, 1, 0, 3]] == found


async def test_levels_change_nothing(backend: StateBackend, clock: Clock) -> None:
    """Looking at counters that nobody ever used finds nothing, and makes nothing."""
    viewer = a_viewer()
    claims = [Claim(each, window=Window("fixed", HOUR)) for each in ("a", "b")]
    del clock

    assert [Level(), Level()] == await backend.levels(viewer, claims)
    assert [] == await backend.levels(viewer, [])
    assert not await backend.forget(viewer)


async def test_keys_are_those_of_the_counters(backend: StateBackend, clock: Clock) -> None:
    """The keys of an account are those under which something counts or is reserved."""
    viewer, campaign = a_viewer(), a_campaign()
    counted = (Claim("a b", window=Window("rolling", HOUR)), Claim("ünï"), Claim("fixed", 2))
    del clock

    assert [] == await backend.keys(viewer)
    await confirm(backend, a_hold(viewer, *counted))
    await reserve(backend, a_hold(viewer, Claim("held"), Claim("a b")))
    await confirm(backend, a_hold(campaign, money(3)))
    await backend.write_items(viewer, {"item": "x"}, 60)

    assert ["a b", "fixed", "held", "ünï"] == sorted(await backend.keys(viewer))
    assert ["spent"] == await backend.keys(campaign)
    await backend.forget(viewer)
    assert [] == await backend.keys(viewer)


async def test_looking_for_keys_makes_nothing(backend: StateBackend, clock: Clock) -> None:
    """Of an account that was refused, or only asked for, there are no keys."""
    viewer = a_viewer()
    del clock

    await reserve(backend, a_hold(viewer, Claim("ads", limit=0)))
    await backend.levels(viewer, [Claim("ads")])

    assert [] == await backend.keys(viewer)
    assert not await backend.forget(viewer)


# --- Batches -------------------------------------------------------------------------------------


async def test_holds_are_taken_in_their_order(backend: StateBackend, clock: Clock) -> None:
    """In one call, each hold of an account finds what those before it have left."""
    campaign = a_campaign()
    holds = [a_hold(campaign, money(each, 10)) for each in (6, 5, 4, 1)]
    del clock

    verdicts = await backend.reserve(holds)

    assert [True, False, True, False] == [each.granted for each in verdicts]
    assert Level(0, 10) == await level(backend, campaign)


async def test_one_call_for_several_accounts(backend: StateBackend, clock: Clock) -> None:
    """Answers come in the order of the holds, and each account is judged by itself."""
    viewers = [a_viewer() for _ in range(10)]
    holds = [a_hold(each, Claim("ads", limit=2)) for each in [*viewers, *viewers, *viewers]]
    campaign = a_hold(a_campaign(), money(1, 0))
    del clock

    verdicts = await backend.reserve([*holds[:15], campaign, *holds[15:]])

    assert [True] * 15 + [False] + [True] * 5 + [False] * 10 == [each.granted for each in verdicts]
    mixed = [holds[0], a_hold(viewers[1]), holds[10], holds[0]]
    assert ["booked", "late", "booked", "again"] == await backend.confirm(mixed)
    await backend.void([holds[12], holds[2], holds[13]])
    levels = [await level(backend, each) for each in viewers[:5]]
    assert [Level(2, 0), Level(1, 2), Level(0, 0), Level(0, 1), Level(0, 2)] == levels


async def test_kinds_of_accounts_are_apart(backend: StateBackend, clock: Clock) -> None:
    """A viewer and a campaign of one name are two accounts."""
    viewer = a_viewer()
    campaign = Account("campaign", viewer.name)
    del clock

    await backend.confirm([a_hold(viewer, Claim("spent", 3)), a_hold(campaign, money(5))])

    assert Level(3) == await level(backend, viewer, Claim("spent"))
    assert Level(5) == await level(backend, campaign)
    assert await backend.forget(viewer)
    assert Level(5) == await level(backend, campaign)


async def test_empty_calls_do_nothing(backend: StateBackend, clock: Clock) -> None:
    """A call without holds answers with an empty list."""
    del clock

    assert [] == await backend.reserve([])
    assert [] == await backend.confirm([])
    await backend.void([])
    await backend.flush()


# --- At the same time ----------------------------------------------------------------------------


async def test_limit_holds_for_many_at_once(backend: StateBackend, clock: Clock) -> None:
    """Of two hundred reservations at the same time, a limit of three grants exactly three."""
    viewer = a_viewer()
    holds = [a_hold(viewer, Claim("ads", limit=3)) for _ in range(200)]
    del clock

    verdicts = await asyncio.gather(*[reserve(backend, each) for each in holds])

    assert 3 == sum(each.granted for each in verdicts)
    assert Level(0, 3) == await level(backend, viewer)


async def test_one_operation_many_times_at_once(backend: StateBackend, clock: Clock) -> None:
    """One operation, reserved and confirmed by many at the same time, counts once."""
    viewer, campaign = a_viewer(), a_campaign()
    holds = [a_hold(viewer, Claim("ads", limit=1)), a_hold(campaign, money(5, 5))]
    del clock

    verdicts = await asyncio.gather(*[backend.reserve(holds) for _ in range(20)])
    bookings = await asyncio.gather(*[backend.confirm(holds) for _ in range(20)])

    assert [[GRANTED, GRANTED]] * 20 == verdicts
    assert [["again", "again"]] * 19 + [["booked", "booked"]] == sorted(bookings)
    assert Level(1) == await level(backend, viewer)
    assert Level(5) == await level(backend, campaign)


async def test_everything_at_once_adds_up(backend: StateBackend, clock: Clock) -> None:
    """Confirmations, voids and plain spending at the same time are all counted, each once."""
    campaign = a_campaign()
    holds = [a_hold(campaign, money(1_000_000, 1_000_000_000)) for _ in range(60)]
    key = BUDGET_PREFIX + campaign.name
    del clock

    await asyncio.gather(*[reserve(backend, each) for each in holds])
    await asyncio.gather(
        *[confirm(backend, each) for each in holds[:20]],
        *[backend.void([each]) for each in holds[20:40]],
        *[backend.add_spend(key, "0.5") for _ in range(20)],
    )

    assert Level(30_000_000, 20_000_000) == await level(backend, campaign)
    assert Decimal(30) == await backend.get_spend(key)


async def test_accounts_in_any_order_at_once(backend: StateBackend, clock: Clock) -> None:
    """Calls that name the same accounts in different orders all come through."""
    one, two, three = (Account("campaign", a_viewer().name) for _ in range(3))
    orders = [(one, two, three), (three, two, one), (two, three, one), (three, one, two)] * 5
    calls = [[a_hold(account, money(1, 10)) for account in order] for order in orders]
    del clock

    verdicts = await asyncio.gather(*[backend.reserve(each) for each in calls])

    assert 30 == sum(each.granted for verdict in verdicts for each in verdict)
    assert [Level(0, 10)] * 3 == [await level(backend, each) for each in (one, two, three)]


async def test_limit_holds_for_two_processes(share: Callable[..., Any]) -> None:
    """Of two backends over one store, as two processes have them, each sees what the other did."""
    viewer, campaign = a_viewer(), a_campaign()
    holds = [a_hold(viewer, Claim("ads", limit=3)) for _ in range(60)]
    paid = [a_hold(campaign, money(2, 20)) for _ in range(60)]
    async with share(None) as one, share(None) as two:
        await one.ping()
        granted = await asyncio.gather(
            *[reserve((one, two)[at % 2], each) for at, each in enumerate([*holds, *paid])]
        )
        verdicts = [each.granted for each in granted]
        shown = [hold for hold, each in zip(paid, verdicts[60:], strict=True) if each]

        assert (3, 10) == (sum(verdicts[:60]), sum(verdicts[60:]))
        booked = await asyncio.gather(*[each.confirm(shown) for each in (one, two)])
        assert ["again"] * 10 + ["booked"] * 10 == sorted(booked[0] + booked[1])
        assert [Level(20)] * 2 == [await level(each, campaign) for each in (one, two)]
        assert [Level(0, 3)] * 2 == [await level(each, viewer) for each in (one, two)]


# --- Time of its own -----------------------------------------------------------------------------


async def _wait_level(
    backend: StateBackend, account: Account, claim: Claim, expected: Level
) -> None:
    """Wait until *expected* stands on a counter; TimeoutError if that does not come."""
    for _ in range(500):
        if expected == await level(backend, account, claim):
            return
        await asyncio.sleep(0.02)
    raise TimeoutError(f"{claim.key} does not come to {expected}")


async def test_time_passes_by_itself(make: Callable[..., Any]) -> None:
    """Without a clock that is given, time is Unix time, and ends what has to end."""
    now = int(time.time() * 1000)
    today = Window("calendar", bounds=(now - 2 * DAY, now - DAY, now + DAY, now + 2 * DAY))
    viewer, brief = a_viewer(), Claim("brief", window=Window("rolling", 400))
    lasting, daily = Claim("lasting", window=Window("fixed", DAY)), Claim("daily", window=today)
    async with make(None) as backend:
        await backend.ping()
        await confirm(backend, a_hold(viewer, brief, lasting, daily))
        await reserve(backend, a_hold(viewer, brief, lasting, ttl_ms=400))
        await backend.write_items(viewer, {"a": "1"}, 60)

        assert Level(1, 1) == await level(backend, viewer, lasting)
        await _wait_level(backend, viewer, brief, Level())
        await _wait_level(backend, viewer, lasting, Level(1, 0))
        assert Level(1) == await level(backend, viewer, daily)
        assert {"a": "1"} == await backend.read_items(viewer)


# --- Amounts and names ---------------------------------------------------------------------------


async def test_largest_amounts_are_exact(backend: StateBackend, clock: Clock) -> None:
    """Amounts up to the largest are weighed and counted to the last unit."""
    campaign, viewer = a_campaign(), a_viewer()
    hold = a_hold(campaign, money(MAX_AMOUNT - 1, MAX_AMOUNT))
    rolling = Claim("ads", MAX_AMOUNT, MAX_AMOUNT, Window("rolling", HOUR))
    del clock

    assert GRANTED == await reserve(backend, hold)
    assert not (await reserve(backend, a_hold(campaign, money(2, MAX_AMOUNT)))).granted
    assert GRANTED == await reserve(backend, a_hold(campaign, money(1, MAX_AMOUNT)))
    assert "booked" == await confirm(backend, hold)
    assert Level(MAX_AMOUNT - 1, 1) == await level(backend, campaign)
    assert Decimal("9007199254.740990") == await backend.get_spend(campaign.name)
    assert "late" == await confirm(backend, a_hold(viewer, rolling))
    assert Level(MAX_AMOUNT) == await level(backend, viewer, rolling)


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_odd_names_are_names(backend: StateBackend, clock: Clock, name: str) -> None:
    """Accounts, counters, plain keys and items may be named with any characters."""
    account = Account("viewer", f"{name} {a_viewer().name}")
    campaign = Account("campaign", account.name)
    claims = (Claim(name, limit=1, window=Window("fixed", HOUR)), Claim(name + "'", limit=9))
    hold, paid = a_hold(account, *claims), a_hold(campaign, money(5, 5))
    del clock

    assert [GRANTED, GRANTED] == await backend.reserve([hold, paid])
    assert ["booked", "booked"] == await backend.confirm([hold, paid])
    assert [Level(1), Level(1)] == await backend.levels(account, claims)
    assert Decimal("0.000005") == await backend.get_spend(BUDGET_PREFIX + campaign.name)
    assert 2 == await backend.increment(account.name, 2)
    assert 2 == await backend.get_count(account.name)
    await backend.write_items(account, {name: name}, 60)
    assert {name: name} == await backend.read_items(account)
    assert await backend.forget(account)
    assert Level(5) == await level(backend, campaign)


async def test_similar_names_are_different(backend: StateBackend, clock: Clock) -> None:
    """Names that differ in case, accents, blanks or escapes, or far behind, are different."""
    base = a_viewer().name + "x" * 160
    names = (
        *("a", "A", "á", "a\u0301", " a", "a ", "%61", "a%", "{a}", "{a", "a}", "a:", ":a"),
        *("a\x00", "1", "01", "1.0", "", "a\t", "a\n"),
    )
    accounts = [Account("viewer", base + each) for each in names if "\x00" not in each]
    del clock

    for amount, account in enumerate(accounts, 1):
        keys = Claim("KEY", amount), Claim("key", 2 * amount), Claim("key ", 3 * amount)
        assert "late" == await confirm(backend, a_hold(account, *keys))

    for amount, account in enumerate(accounts, 1):
        found = await backend.levels(account, [Claim("KEY"), Claim("key"), Claim("key ")])
        assert [amount, 2 * amount, 3 * amount] == [each.counted for each in found]


async def test_longest_operation_id(backend: StateBackend, clock: Clock) -> None:
    """Ids of operations may have a hundred printable characters, and differ in the last."""
    viewer = a_viewer()
    odd = "".join(chr(each) for each in range(32, 127))
    holds = [a_hold(viewer, operation=each) for each in (odd + "12345", odd + "12346", " ", "'")]
    del clock

    assert ["late"] * 4 == await backend.confirm(holds)
    assert ["again"] * 4 == await backend.confirm(holds)
    assert Level(4) == await level(backend, viewer)


WRONG_HOLDS: dict[str, dict[str, object]] = {
    "no operation": {"operation": ""},
    "operation too long": {"operation": "x" * 101},
    "operation not ASCII": {"operation": "ü"},
    "operation not printable": {"operation": "a\nb"},
    "no claims": {"claims": ()},
    "one key twice": {"claims": (Claim("a"), Claim("a"))},
    "negative": {"claims": (Claim("a", -1),)},
    "too much": {"claims": (Claim("a", MAX_AMOUNT + 1),)},
    "window of a campaign": {
        "account": Account("campaign", "wrong"),
        "claims": (replace(money(1), window=Window("fixed", HOUR)),),
    },
    "window of no length": {"claims": (Claim("a", window=Window("rolling", 0)),)},
    "calendar without periods": {"claims": (Claim("a", window=Window("calendar")),)},
    "another counter of a campaign": {
        "account": Account("campaign", "wrong"),
        "claims": (Claim("ads"),),
    },
}


async def test_wrong_hold_undoes_its_call(backend: StateBackend, clock: Clock) -> None:
    """A wrong hold late in a call keeps those before it from happening."""
    viewer = a_viewer()
    del clock

    for call in (backend.reserve, backend.confirm, backend.void):
        with pytest.raises(StateBackendError):
            await call([a_hold(viewer), a_hold(viewer, Claim("ads", -1))])

    assert not await backend.forget(viewer)


async def test_no_amount_leaves_no_campaign(backend: StateBackend, clock: Clock) -> None:
    """What is no amount of money is a ValueError, and nothing is kept of it."""
    campaign = a_campaign()
    del clock

    with pytest.raises(ValueError, match="no amount"):
        await backend.add_spend(f"budget:{campaign.name}", "much")
    assert not await backend.forget(campaign)


@pytest.mark.parametrize("wrong", WRONG_HOLDS.values(), ids=WRONG_HOLDS)
async def test_wrong_holds_are_refused(
    backend: StateBackend, clock: Clock, wrong: dict[str, object]
) -> None:
    """A hold that no backend can keep is an error of every call, and changes nothing."""
    viewer = a_viewer()
    hold = replace(Hold(viewer, "fine", (Claim("a"),)), **wrong)  # type: ignore[arg-type]
    del clock

    for call in (backend.reserve, backend.confirm, backend.void):
        with pytest.raises(StateBackendError):
            await call([hold])

    assert Level() == await level(backend, viewer, Claim("a"))


# --- Plain counters ------------------------------------------------------------------------------


async def test_plain_counter_counts(backend: StateBackend, clock: Clock) -> None:
    """A plain counter begins at zero, and gives its new value."""
    key = a_viewer().name
    del clock

    assert 0 == await backend.get_count(key)
    assert [1, 6, 4] == [await backend.increment(key, each) for each in (1, 5, -2)]
    assert 4 == await backend.get_count(key)
    assert 5 == await backend.increment(key)


async def test_plain_counter_at_once(backend: StateBackend, clock: Clock) -> None:
    """A hundred increments at the same time give a hundred different counts."""
    key = a_viewer().name
    del clock

    counts = await asyncio.gather(*[backend.increment(key) for _ in range(100)])

    assert list(range(1, 101)) == sorted(counts)


async def test_plain_counter_vanishes(backend: StateBackend, clock: Clock) -> None:
    """A plain counter vanishes when its time is over, and begins anew, without an end."""
    key = a_viewer().name

    await backend.increment(key, 3)
    await backend.set_expiry(key, 1.5)
    assert 4 == await backend.increment(key)
    clock.move(1_499)
    assert 4 == await backend.get_count(key)
    clock.move(1)
    assert 0 == await backend.get_count(key)
    assert 1 == await backend.increment(key)
    clock.move(DAY)

    assert 1 == await backend.get_count(key)


async def test_plain_counter_gets_a_new_expiry(backend: StateBackend, clock: Clock) -> None:
    """The last expiry holds, whether it is sooner or later than the one before."""
    sooner, later = a_viewer().name, a_viewer().name

    for key, seconds in ((sooner, (10, 2)), (later, (2, 10))):
        await backend.increment(key)
        for each in seconds:
            await backend.set_expiry(key, each)
    clock.move(2_000)

    assert (0, 1) == (await backend.get_count(sooner), await backend.get_count(later))


async def test_expiry_of_nothing_does_nothing(backend: StateBackend, clock: Clock) -> None:
    """An expiry for a counter that is not there, or not any more, leaves no trace."""
    never, gone = a_viewer().name, a_viewer().name

    await backend.set_expiry(never, 1)
    await backend.increment(gone, 9)
    await backend.set_expiry(gone, 1)
    clock.move(1_000)
    await backend.set_expiry(gone, 100)
    assert 0 == await backend.get_count(gone)
    await backend.increment(never)
    await backend.increment(gone)
    clock.move(DAY)

    assert (1, 1) == (await backend.get_count(never), await backend.get_count(gone))


# --- Money ---------------------------------------------------------------------------------------


async def test_money_is_exact(backend: StateBackend, clock: Clock) -> None:
    """A tenth and two tenths are three tenths, as float, text or Decimal."""
    key = a_campaign().name
    del clock

    assert Decimal("0.1") == await backend.add_spend(key, 0.1)
    assert Decimal("0.3") == await backend.add_spend(key, 0.2)
    assert Decimal("0.4") == await backend.add_spend(key, "0.1")
    assert Decimal("0.400001") == await backend.add_spend(key, Decimal("0.000001"))
    total = await backend.get_spend(key)
    assert isinstance(total, Decimal)
    assert Decimal("0.400001") == total


async def test_thousand_tenths_are_a_hundred(backend: StateBackend, clock: Clock) -> None:
    """Many small sums add up without any drift."""
    key = a_campaign().name
    del clock

    await asyncio.gather(*[backend.add_spend(key, 0.1) for _ in range(100)])

    assert "10" == str(await backend.get_spend(key))


async def test_spend_of_a_campaign_is_what_was_confirmed(
    backend: StateBackend, clock: Clock
) -> None:
    """Confirmed money and money that is added are one total, with and without the prefix."""
    campaign = a_campaign()
    keys = campaign.name, BUDGET_PREFIX + campaign.name
    hold = a_hold(campaign, money(2_500))
    del clock

    assert [Decimal(0)] * 2 == [await backend.get_spend(each) for each in keys]
    await reserve(backend, hold)
    assert Decimal(0) == await backend.get_spend(keys[0])
    await confirm(backend, hold)
    assert Decimal("0.0025") == await backend.get_spend(keys[1])
    assert Decimal("1.0025") == await backend.add_spend(keys[1], 1)
    assert Decimal("1.0025") == await backend.get_spend(keys[0])
    assert Level(1_002_500) == await level(backend, campaign)


async def test_added_money_counts_towards_the_limit(backend: StateBackend, clock: Clock) -> None:
    """Money that is added, or taken back, moves what can still be reserved."""
    campaign = a_campaign()
    del clock

    await backend.add_spend(campaign.name, "0.9")
    assert not (await reserve(backend, a_hold(campaign, money(200_000, 1_000_000)))).granted
    assert Decimal("0.8") == await backend.add_spend(campaign.name, "-0.1")

    assert GRANTED == await reserve(backend, a_hold(campaign, money(200_000, 1_000_000)))


# --- Items ---------------------------------------------------------------------------------------


async def test_items_are_kept(backend: StateBackend, clock: Clock) -> None:
    """Items are set and removed each by itself; the others stay as they are."""
    viewer = a_viewer()
    del clock

    assert {} == await backend.read_items(viewer)
    await backend.write_items(viewer, {"a": "1", "b": "2", "c": "3"}, 60)
    await backend.write_items(viewer, {"b": "4", "a": None, "never": None, "d": ""}, 60)

    assert {"c": "3", "b": "4", "d": ""} == await backend.read_items(viewer)


async def test_items_come_longest_unchanged_first(backend: StateBackend, clock: Clock) -> None:
    """Items are given in the order in which they were last written."""
    viewer = a_viewer()

    await backend.write_items(viewer, {"z": "1", "a": "1", "m": "1"}, 60)
    await backend.write_items(viewer, {"z": "2"}, 60)
    clock.move(1)
    await backend.write_items(viewer, {"b": "1", "a": "2"}, 60)

    assert ["m", "z", "b", "a"] == list(await backend.read_items(viewer))


async def test_items_vanish_together(backend: StateBackend, clock: Clock) -> None:
    """All items live as long as the last write said, and none longer."""
    viewer = a_viewer()

    await backend.write_items(viewer, {"a": "1"}, 1)
    clock.move(999)
    await backend.write_items(viewer, {"b": "2"}, 2)
    clock.move(1_999)
    assert {"a": "1", "b": "2"} == await backend.read_items(viewer)
    clock.move(1)
    assert {} == await backend.read_items(viewer)
    await backend.write_items(viewer, {"c": "3"}, 10)
    assert {"c": "3"} == await backend.read_items(viewer)
    await backend.write_items(viewer, {"d": "4"}, 1)
    clock.move(1_000)
    assert {} == await backend.read_items(viewer)


async def test_items_are_at_most_fifty(backend: StateBackend, clock: Clock) -> None:
    """Beyond fifty items the longest unchanged are dropped."""
    viewer = a_viewer()
    del clock

    await backend.write_items(viewer, {f"i{at}": "x" for at in range(MAX_ITEMS)}, 60)
    await backend.write_items(viewer, {"i0": "y"}, 60)
    await backend.write_items(viewer, {"new": "x", "newer": "x"}, 60)

    expected = [f"i{at}" for at in range(3, MAX_ITEMS)] + ["i0", "new", "newer"]
    assert expected == list(await backend.read_items(viewer))


async def test_items_of_one_write_are_at_most_fifty(backend: StateBackend, clock: Clock) -> None:
    """Of a write of more than fifty items, the last fifty are kept."""
    viewer = a_viewer()
    del clock

    await backend.write_items(viewer, {f"i{at}": "x" for at in range(120)}, 60)

    assert [f"i{at}" for at in range(70, 120)] == list(await backend.read_items(viewer))


async def test_items_have_at_most_so_many_bytes(backend: StateBackend, clock: Clock) -> None:
    """Names and values together keep to the limit in bytes, to the last of them."""
    viewer = a_viewer()
    half = MAX_ITEM_BYTES // 2 - 1
    del clock

    await backend.write_items(viewer, {"a": "x" * half, "b": "ü" * (half // 2) + "x"}, 60)
    assert ["a", "b"] == list(await backend.read_items(viewer))
    await backend.write_items(viewer, {"c": ""}, 60)
    assert ["b", "c"] == list(await backend.read_items(viewer))
    await backend.write_items(viewer, {"d": "x" * MAX_ITEM_BYTES}, 60)
    assert {} == await backend.read_items(viewer)


async def test_items_written_at_once_are_merged(backend: StateBackend, clock: Clock) -> None:
    """Of writes at the same time none undoes another."""
    viewer = a_viewer()
    del clock

    await asyncio.gather(
        *[backend.write_items(viewer, {f"i{at}": str(at)}, 60) for at in range(MAX_ITEMS)]
    )

    expected = {f"i{at}": str(at) for at in range(MAX_ITEMS)}
    assert expected == await backend.read_items(viewer)


async def test_items_and_counters_do_not_meet(backend: StateBackend, clock: Clock) -> None:
    """Items of an account may end while its counters go on, and the other way round."""
    viewer, claim = a_viewer(), Claim("ads", window=Window("fixed", 5_000))

    await backend.write_items(viewer, {"ads": "x"}, 1)
    await confirm(backend, a_hold(viewer, claim))
    clock.move(1_000)
    assert {} == await backend.read_items(viewer)
    assert Level(1) == await level(backend, viewer, claim)
    await backend.write_items(viewer, {"ads": "y"}, 60)
    clock.move(5_000)

    assert {"ads": "y"} == await backend.read_items(viewer)
    assert Level(0) == await level(backend, viewer, claim)


# --- Forgetting, sweeping ------------------------------------------------------------------------


async def test_forget_removes_everything(backend: StateBackend, clock: Clock) -> None:
    """Of a forgotten account nothing is left: counters, reservations, operations, items."""
    viewer, claim = a_viewer(), Claim("ads", limit=2)
    shown, held, voided = (a_hold(viewer, claim) for _ in range(3))
    del clock
    await backend.reserve([shown, held])
    await confirm(backend, shown)
    await backend.void([voided])
    await backend.write_items(viewer, {"a": "1"}, 60)

    assert await backend.forget(viewer)

    assert Level() == await level(backend, viewer)
    assert {} == await backend.read_items(viewer)
    assert ["late", "late"] == await backend.confirm([held, shown])
    assert await backend.forget(viewer)
    assert GRANTED == await reserve(backend, voided)


async def test_forget_says_whether_there_was_anything(backend: StateBackend, clock: Clock) -> None:
    """Forgetting tells whether there was anything: a counter, a reservation or an item."""
    counted, held, items = a_viewer(), a_viewer(), a_viewer()
    del clock

    await confirm(backend, a_hold(counted))
    await reserve(backend, a_hold(held))
    await backend.write_items(items, {"a": "1"}, 60)

    for account in (counted, held, items):
        assert [True, False] == [await backend.forget(account) for _ in range(2)]
    assert not await backend.forget(a_viewer())


async def test_refusal_leaves_nothing(backend: StateBackend, clock: Clock) -> None:
    """Of a reservation that was refused nothing is kept."""
    viewer, campaign = a_viewer(), a_campaign()
    del clock

    await reserve(backend, a_hold(viewer, Claim("ads", limit=0)))
    await reserve(backend, a_hold(campaign, money(1, 0)))

    assert not await backend.forget(viewer)
    assert not await backend.forget(campaign)


async def test_forgotten_campaign_has_spent_nothing(backend: StateBackend, clock: Clock) -> None:
    """A campaign that is forgotten begins anew."""
    campaign = a_campaign()
    del clock

    await backend.add_spend(campaign.name, 5)
    assert await backend.forget(campaign)

    assert Decimal(0) == await backend.get_spend(campaign.name)


async def test_forget_leaves_others_alone(backend: StateBackend, clock: Clock) -> None:
    """Forgetting one account changes no other, and no plain counter of its name."""
    one = a_viewer()
    two = Account("viewer", one.name + "x")
    del clock

    await backend.confirm([a_hold(one), a_hold(two)])
    await backend.increment(one.name)
    await backend.forget(one)

    assert Level(1) == await level(backend, two)
    assert 1 == await backend.get_count(one.name)


async def test_sweep_changes_nothing_that_counts(backend: StateBackend, clock: Clock) -> None:
    """Sweeping deletes what has expired, and nothing that still means something."""
    viewer, campaign = a_viewer(), a_campaign()
    claim = Claim("ads", limit=1, window=Window("rolling", 5_000))
    old, new = a_hold(viewer, claim, keep_ms=1_000), a_hold(viewer, claim, ttl_ms=2_000)
    paid = a_hold(campaign, money(5), keep_ms=1_000)
    await backend.confirm([old, paid])
    await backend.reserve([a_hold(campaign, money(9), ttl_ms=2_000)])
    await backend.increment(viewer.name)
    await backend.write_items(viewer, {"a": "1"}, 2)
    clock.move(1_999)

    await backend.sweep()

    assert [Level(1)] == await backend.levels(viewer, [claim])
    assert Level(5, 9) == await level(backend, campaign)
    assert {"a": "1"} == await backend.read_items(viewer)
    assert 1 == await backend.get_count(viewer.name)
    assert not (await reserve(backend, new)).granted
    clock.move(1)
    await backend.sweep()
    assert Level(5, 0) == await level(backend, campaign)
    assert {} == await backend.read_items(viewer)


async def test_sweep_finds_what_has_expired(backend: StateBackend, clock: Clock) -> None:
    """Sweeping again finds nothing, and never says less than nothing."""
    viewer = a_viewer()
    await confirm(backend, a_hold(viewer, Claim("a", window=Window("fixed", 1_000)), keep_ms=1))
    clock.move(DAY)
    while swept := await backend.sweep():
        assert 0 < swept

    assert 0 == await backend.sweep()
    assert Level() == await level(backend, viewer, Claim("a", window=Window("fixed", 1_000)))


async def test_backend_says_what_it_is(backend: StateBackend, clock: Clock) -> None:
    """A backend is one to a type checker and to a reader, and is pinged as often as one likes."""
    del clock

    assert isinstance(backend, StateBackend)
    assert repr(backend).startswith("<")
    await backend.ping()
    await backend.ping()


# --- Against the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
async def test_backend_says_what_the_model_says(
    backend: StateBackend, clock: Clock, seed: int
) -> None:
    """Whatever is done, in whatever order and with whatever pauses, a backend is as the model."""
    await Player(backend, clock).play(a_script(seed))


# --- These tests, tested -------------------------------------------------------------------------

Check = Callable[[StateBackend, Clock], Awaitable[None]]

FAULTS: tuple[tuple[type[InMemoryBackend], Check], ...] = (
    (faulty.ReadsThenWrites, test_limit_holds_for_many_at_once),
    (faulty.ForgetsOperations, test_confirm_again_counts_nothing),
    (faulty.ForgetsOperations, test_one_operation_many_times_at_once),
    (faulty.ReservesAgain, test_reserve_again_takes_nothing),
    (faulty.Prolongs, test_reserve_again_does_not_prolong),
    (faulty.CountsVoids, test_void_gives_the_room_back),
    (faulty.FreesTwice, test_void_again_frees_nothing),
    (faulty.UncountsAtVoid, test_void_after_confirm_leaves_it_counted),
    (faulty.ForgetsVoids, test_reserve_after_void_is_refused),
    (faulty.NeverFreesLapsed, test_reservation_lapses),
    (faulty.NeverFreesLapsed, test_many_reservations_lapse_at_once),
    (faulty.LapsesLate, test_reservation_lapses),
    (faulty.FreesConfirmed, test_confirmed_does_not_lapse),
    (faulty.DropsLateConfirmations, test_confirm_after_expiry_counts_late),
    (faulty.DropsLateConfirmations, test_confirm_after_void_counts_late),
    (faulty.DropsLateConfirmations, test_confirm_of_what_was_never_reserved),
    (faulty.CountsWhatWasReserved, test_confirm_counts_final_amounts),
    (faulty.ReservesPartially, test_hold_is_all_or_nothing),
    (faulty.BlamesTheFirst, test_enforced_claim_refuses_beside_others),
    (faulty.EnforcesEverything, test_claims_not_enforced_are_left_out),
    (faulty.HasOffByOneLimits, test_limit_is_the_most_that_is_granted),
    (faulty.TakesZeroForNone, test_limit_of_zero_means_never),
    (faulty.JudgesAllAtOnce, test_holds_are_taken_in_their_order),
    (faulty.AnswersInAnotherOrder, test_one_call_for_several_accounts),
    (faulty.IgnoresLeases, test_lease_is_drawn_from),
    (faulty.DrawsTwice, test_own_reservation_goes_before_the_lease),
    (faulty.RollsByFixedBuckets, test_rolling_window_knows_no_borders),
    (faulty.SlidesFixedWindows, test_fixed_window),
    (faulty.TakesCalendarsForDays, test_calendar_window),
    (faulty.EndsPeriodsLate, test_calendar_window),
    (faulty.SettlesForEver, test_confirmed_operation_is_remembered),
    (faulty.SettlesForEver, test_voided_operation_is_remembered),
    (faulty.MixesAccounts, test_operations_of_two_accounts_are_two),
    (faulty.CutsNames, test_similar_names_are_different),
    (faulty.HasFloatMoney, test_money_is_exact),
    (faulty.HasFloatCounts, test_largest_amounts_are_exact),
    (faulty.LosesIncrements, test_plain_counter_at_once),
    (faulty.ReplacesItems, test_items_are_kept),
    (faulty.MergesItemsSlowly, test_items_written_at_once_are_merged),
    (faulty.KeepsOldItemsFirst, test_items_are_at_most_fifty),
    (faulty.KeepsItemsForEver, test_items_vanish_together),
    (faulty.ForgetsCountersOnly, test_forget_removes_everything),
)

SLOW_FAULTS = {
    faulty.ReadsThenWrites,
    faulty.LosesIncrements,
    faulty.MergesItemsSlowly,
    faulty.CutsNames,
    faulty.HasFloatMoney,
    faulty.HasFloatCounts,
    faulty.KeepsOldItemsFirst,
    faulty.TakesCalendarsForDays,
}
"""What needs several callers at once, or names and amounts that scripts do not have."""


def _names(fault: object) -> str:
    return getattr(fault, "__name__", "").removeprefix("test_")


@pytest.mark.parametrize(("fault", "check"), FAULTS, ids=_names)
async def test_faults_are_noticed(clock: Clock, fault: type[InMemoryBackend], check: Check) -> None:
    """A backend with a single fault does not pass the test of what it does wrong."""
    with pytest.raises(AssertionError):
        await check(fault(clock=clock), clock)


@pytest.mark.parametrize("check", {check for _, check in FAULTS}, ids=_names)
async def test_no_fault_is_noticed_where_there_is_none(clock: Clock, check: Check) -> None:
    """The same tests, run in the same way, pass with the backend that has no fault."""
    await check(InMemoryBackend(clock=clock), clock)


@pytest.mark.parametrize("ms", [10_000, 1_999])
async def test_short_window_is_noticed(clock: Clock, ms: int) -> None:
    """A rolling window that is a millisecond too short does not pass."""
    with pytest.raises(AssertionError):
        await test_rolling_window_errs_by_a_thousandth(faulty.RollsExactly(clock=clock), clock, ms)


async def test_wrong_holds_taken_are_noticed(clock: Clock) -> None:
    """A backend that takes a negative amount does not pass."""
    backend = faulty.TakesAnyHold(clock=clock)

    with pytest.raises(pytest.fail.Exception):
        await test_wrong_holds_are_refused(backend, clock, WRONG_HOLDS["negative"])


@pytest.mark.parametrize("fault", sorted({fault for fault, _ in FAULTS} - SLOW_FAULTS, key=_names))
async def test_model_notices_faults(clock: Clock, fault: type[InMemoryBackend]) -> None:
    """Random operations find faults too, but for those that need a crowd or a rare name."""
    with pytest.raises(AssertionError):
        await _play_many(Player(fault(clock=clock), clock))


async def _play_many(player: Player) -> None:
    for seed in range(200):
        await player.play_once(a_script(seed))
