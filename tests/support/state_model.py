"""
An independent model of what a state backend promises: slow, and plain to see through.

Rule 1: it keeps what happened, in order, and answers every question by going through all of it.
Rule 2: it takes nothing from the backends but the words of the contract, ``state/base.py``.
"""

import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vastproxy.errors import StateBackendError
from vastproxy.state.base import (
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    Account,
    Booking,
    Claim,
    Hold,
    Level,
    StateBackend,
    Verdict,
    Window,
    money,
)

DAY = 86_400_000
"""Milliseconds."""


WRONG = (AssertionError, StateBackendError, LookupError, TypeError, ValueError, ArithmeticError)
"""What comes of a backend that is wrong: other answers, or errors."""


class Clock:
    """
    Unix milliseconds that pass when a test says so.

    It begins at the next midnight (UTC): a round number, and not in a server's past, where what is
    written would be deleted at once.
    """

    def __init__(self) -> None:
        self.now = (int(time.time() * 1000) // DAY + 1) * DAY

    def __call__(self) -> int:
        """Tell the time."""
        return self.now

    def __repr__(self) -> str:
        return f"<Clock {self.now}>"

    def move(self, ms: int) -> None:
        """Let *ms* milliseconds pass."""
        self.now += ms


# --- Builders ------------------------------------------------------------------------------------


def a_viewer() -> Account:
    """Build a viewer that no other test knows."""
    return Account("viewer", uuid.uuid4().hex)


def a_campaign() -> Account:
    """Build a campaign that no other test knows."""
    return Account("campaign", uuid.uuid4().hex)


def a_hold(account: Account, *claims: Claim, operation: str = "", **settings: Any) -> Hold:
    """Build a hold; of one ad with no limit unless *claims* say else, under an id of its own."""
    usual = money(1) if account.kind == "campaign" else Claim("ads")
    return Hold(account, operation or uuid.uuid4().hex, claims or (usual,), **settings)


async def reserve(backend: StateBackend, hold: Hold) -> Verdict:
    """Reserve one hold."""
    (verdict,) = await backend.reserve([hold])
    return verdict


async def confirm(backend: StateBackend, hold: Hold) -> Booking:
    """Confirm one hold."""
    (booking,) = await backend.confirm([hold])
    return booking


async def level(backend: StateBackend, account: Account, claim: Claim | None = None) -> Level:
    """Look at one counter; at the usual one unless *claim* says else."""
    usual = money(1) if account.kind == "campaign" else Claim("ads")
    (found,) = await backend.levels(account, [claim or usual])
    return found


# --- The model -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation was granted, of these amounts."""

    at: int
    hold: Hold
    amounts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A confirmation counted."""

    at: int
    hold: Hold


@dataclass(frozen=True, slots=True)
class Voided:
    """A hold that was not settled before was released."""

    at: int
    hold: Hold


@dataclass(frozen=True, slots=True)
class Wrote:
    """Items were written."""

    at: int
    changes: Mapping[str, str | None]
    seconds: float


Event = Reserved | Confirmed | Voided | Wrote


@dataclass(slots=True)
class Model:
    """What a backend is compared with."""

    clock: Clock
    events: dict[Account, list[Event]] = field(default_factory=dict)

    def reserve(self, hold: Hold) -> Verdict:
        """Say what a backend must answer, and keep what happened."""
        events = self.events.get(hold.account, [])
        if settled := _settled(events, hold.operation, self.clock.now):
            return Verdict(granted=settled == "confirmed")
        if hold.operation in (standing := _standing(events, self.clock.now)):
            amounts = standing[hold.operation]
            left_out = [at for at, each in enumerate(hold.claims) if each.key not in amounts]
            return Verdict(granted=True, over=tuple(left_out))
        verdict = self._judge(hold)
        if verdict.granted:
            inside = [each for at, each in enumerate(hold.claims) if at not in verdict.over]
            self._keep(Reserved(self.clock.now, hold, {each.key: each.amount for each in inside}))
        return verdict

    def _judge(self, hold: Hold) -> Verdict:
        full = [at for at, each in enumerate(hold.claims) if not self._fits(hold.account, each)]
        for at in full:
            if hold.claims[at].enforced:
                return Verdict(granted=False, refused=at)
        return Verdict(granted=True, over=tuple(full))

    def _fits(self, account: Account, claim: Claim) -> bool:
        stands = self.level(account, claim)
        return claim.limit is None or stands.counted + stands.reserved + claim.amount <= claim.limit

    def confirm(self, hold: Hold) -> Booking:
        """Say what a backend must answer, and keep what happened."""
        events = self.events.get(hold.account, [])
        if "confirmed" == _settled(events, hold.operation, self.clock.now):
            return "again"
        standing = _standing(events, self.clock.now)
        self._keep(Confirmed(self.clock.now, hold))
        if hold.operation in standing:
            return "booked"
        lease = standing.get(hold.lease)
        covered = lease is not None and all(
            each.amount <= lease.get(each.key, 0) for each in hold.claims
        )
        return "booked" if covered else "late"

    def void(self, hold: Hold) -> None:
        """Keep that *hold* was released, where that means something."""
        events = self.events.get(hold.account, [])
        if _settled(events, hold.operation, self.clock.now) is None:
            self._keep(Voided(self.clock.now, hold))

    def level(self, account: Account, claim: Claim) -> Level:
        """Say what stands on a counter."""
        events = self.events.get(account, [])
        confirmed = [
            (event.at, each.amount)
            for event in events
            if isinstance(event, Confirmed)
            for each in event.hold.claims
            if each.key == claim.key
        ]
        standing = _standing(events, self.clock.now).values()
        return Level(
            _counted(confirmed, claim.window, self.clock.now),
            sum(amounts.get(claim.key, 0) for amounts in standing),
        )

    def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Keep what was written."""
        self.events.setdefault(account, []).append(Wrote(self.clock.now, dict(changes), seconds))

    def items(self, account: Account) -> list[tuple[str, str]]:
        """Say which items there are, the longest unchanged first."""
        items: list[tuple[str, str]] = []
        ends = 0
        for event in self.events.get(account, []):
            if isinstance(event, Wrote):
                items = _written([] if ends <= event.at else items, event.changes)
                ends = event.at + int(event.seconds * 1000)
        return items if self.clock.now < ends else []

    def forget(self, account: Account) -> None:
        """Drop all events of *account*."""
        self.events.pop(account, None)

    def _keep(self, event: Reserved | Confirmed | Voided) -> None:
        self.events.setdefault(event.hold.account, []).append(event)


def _settled(events: Sequence[Event], operation: str, now: int) -> str | None:
    """Say how *operation* was settled last, if that is still remembered."""
    said = None
    for event in events:
        if isinstance(event, Confirmed | Voided) and event.hold.operation == operation:
            is_confirmed = isinstance(event, Confirmed)
            time = event.hold.keep_ms if is_confirmed else event.hold.ttl_ms
            word = "confirmed" if is_confirmed else "voided"
            said = word if now < event.at + time else None
    return said


def _standing(events: Sequence[Event], now: int) -> dict[str, dict[str, int]]:
    """Give what is reserved at *now*, by operation."""
    open_: dict[str, tuple[int, dict[str, int]]] = {}
    for event in events:
        open_ = {key: each for key, each in open_.items() if event.at < each[0]}
        match event:
            case Reserved(at, hold, amounts):
                open_[hold.operation] = (at + hold.ttl_ms, dict(amounts))
            case Confirmed(_, hold) if hold.operation not in open_ and hold.lease in open_:
                _draw(open_[hold.lease][1], hold)
            case Confirmed(_, hold) | Voided(_, hold):
                open_.pop(hold.operation, None)
    return {key: amounts for key, (ends, amounts) in open_.items() if now < ends}


def _draw(lease: dict[str, int], hold: Hold) -> None:
    for each in hold.claims:
        if each.key in lease:
            lease[each.key] = max(0, lease[each.key] - each.amount)


def _counted(confirmed: Sequence[tuple[int, int]], window: Window, now: int) -> int:
    """Add up those of *confirmed* (when, how much; in order) that count at *now*."""
    match window.kind:
        case "lifetime":
            return sum(amount for _, amount in confirmed)
        case "rolling":
            # All of a piece counts as if it had happened in the last millisecond of the piece.
            width = max(1, window.ms // 1_000)
            last = [(at - at % width + width - 1, amount) for at, amount in confirmed]
            return sum(amount for at, amount in last if now - at <= window.ms)
        case "calendar":
            begins = max(each for each in window.bounds if each <= now)
            return sum(amount for at, amount in confirmed if begins <= at)
        case "fixed":
            return _counted_from_the_first(confirmed, window.ms, now)


def _counted_from_the_first(confirmed: Sequence[tuple[int, int]], ms: int, now: int) -> int:
    first, total = -ms, 0
    for at, amount in confirmed:
        if first + ms <= at:
            first, total = at, 0
        total += amount
    return total if now < first + ms else 0


def _written(
    items: list[tuple[str, str]], changes: Mapping[str, str | None]
) -> list[tuple[str, str]]:
    for name, value in changes.items():
        items = [each for each in items if each[0] != name]
        if value is not None:
            items = [*items, (name, value)]
    while len(items) > MAX_ITEMS or len("".join(map("".join, items)).encode()) > MAX_ITEM_BYTES:
        items = items[1:]
    return items


# --- Scripts of operations that are played to a backend and to the model -------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do; *picks* say with which of the script's holds, and how."""

    does: str
    picks: tuple[tuple[int, int], ...] = ()
    ms: int = 0


@dataclass(frozen=True, slots=True)
class Script:
    """Holds, and what is done with them."""

    holds: tuple[Hold, ...]
    steps: tuple[Step, ...]


ACTIONS = ("reserve", "confirm", "void", "write", "move", "forget")
WEIGHTS = (8, 6, 3, 2, 8, 1)

_MOVES = (
    *(1, 9, 10, 99, 499, 500, 501, 999, 1_000, 2_999, 3_000, 6_999, 7_000, 9_990, 9_999),
    *(10_000, 10_009, 10_010, 20_000, 60_000),
)
"""Milliseconds that pass at once: lengths of what there is, and a little less or more."""

WINDOWS = {
    "hour": Window("rolling", 10_000),
    "odd": Window("rolling", 1_999),
    "first": Window("fixed", 7_000),
    "day": Window("calendar", bounds=tuple(range(-40_000, 2_600_000, 20_000))),
    "life": Window(),
}
"""By key; the calendar's bounds are relative to the begin of the script."""


def a_script(seed: int, length: int = 40) -> Script:
    """Draw a script: the same for the same *seed*."""
    chance = random.Random(seed)
    holds = tuple(_a_drawn_hold(chance, at) for at in range(8))
    return Script(holds, tuple(_a_step(chance) for _ in range(length)))


def _a_drawn_hold(chance: random.Random, at: int) -> Hold:
    """Draw the hold at place *at*: two viewers and a campaign share them; ids go by the place."""
    kind, name = chance.choice([("viewer", "one"), ("viewer", "two"), ("campaign", "one")])
    campaign = kind == "campaign"
    keys = ["spent"] if campaign else chance.sample(sorted(WINDOWS), chance.randint(1, 4))
    return Hold(
        Account("campaign" if campaign else "viewer", name),
        f"operation-{at}",
        tuple(_a_claim(chance, key) for key in keys),
        chance.choice([500, 3_000, 60_000]),
        chance.choice([1_000, 20_000, 600_000]),
        chance.choice(["", "", "operation-0", "operation-1"]),
    )


def _a_claim(chance: random.Random, key: str) -> Claim:
    return Claim(
        key,
        chance.randint(0, 3),
        chance.choice([None, 0, 1, 2, 3, 5, 8]),
        WINDOWS.get(key, Window()),
        enforced=chance.random() < 0.7,
    )


def _a_step(chance: random.Random) -> Step:
    picks = tuple((chance.randrange(8), chance.randrange(8)) for _ in range(chance.randint(1, 4)))
    match does := chance.choices(ACTIONS, WEIGHTS)[0]:
        case "move":
            return Step(does, ms=chance.choice(_MOVES))
        case "write":
            return Step(does, picks, chance.choice([0, 1, 1_000, 5_000]))
        case _:
            return Step(does, picks)


def _as_drawn(hold: Hold, names: str, began: int) -> Hold:
    """Give *hold* accounts of its own, and a calendar that goes with the clock."""
    claims = [
        replace(
            each,
            window=replace(
                each.window, bounds=tuple(bound + began for bound in each.window.bounds)
            ),
        )
        for each in hold.claims
    ]
    account = Account(hold.account.kind, f"{hold.account.name} {names}")
    return replace(hold, account=account, claims=tuple(claims))


def _as_shown(hold: Hold, how: int) -> Hold:
    """Give what *hold* is confirmed with: some claims are left out, or end with other amounts."""
    claims = hold.claims[: 1 + how % 4]
    if how > 3:
        claims = tuple(replace(each, amount=(each.amount + how) % 4) for each in claims)
    return replace(hold, claims=claims)


@dataclass(slots=True)
class Player:
    """Plays scripts to a backend and to the model, and compares all that they say."""

    backend: StateBackend
    clock: Clock

    async def play(self, script: Script) -> None:
        """Play *script*; where a backend differs, AssertionError with the least that shows it."""
        try:
            await self.play_once(script)
        except WRONG as error:
            short = await self._shortened(script)
            raise AssertionError(f"{error!r}, or for short:\n{_told(short)}") from error

    async def play_once(self, script: Script) -> None:
        """Play *script*, and let pass what a wrong backend raises."""
        self.clock.move(DAY - self.clock.now % DAY)
        model, names = Model(self.clock), uuid.uuid4().hex
        holds = [_as_drawn(each, names, self.clock.now) for each in script.holds]
        for step in script.steps:
            await self._do(step, holds, model)
        await self._compare({each.account for each in holds}, model)

    async def _shortened(self, script: Script) -> Script:
        """Leave out steps, and holds of steps, as long as *script* still fails."""
        for shorter in _a_bit_shorter(script):
            if await self._fails(shorter):
                return await self._shortened(shorter)
        return script

    async def _fails(self, script: Script) -> bool:
        try:
            await self.play_once(script)
        except WRONG:
            return True
        return False

    async def _do(self, step: Step, holds: Sequence[Hold], model: Model) -> None:
        picked = [holds[at] for at, _ in step.picks]
        match step.does:
            case "reserve":
                expected = [model.reserve(each) for each in picked]
                _same(expected, await self.backend.reserve(picked))
            case "confirm":
                shown = [_as_shown(holds[at], how) for at, how in step.picks]
                booked = [model.confirm(each) for each in shown]
                _same(booked, await self.backend.confirm(shown))
            case "void":
                for each in picked:
                    model.void(each)
                await self.backend.void(picked)
            case "write":
                await self._write(step, picked[0].account, model)
            case "move":
                self.clock.move(step.ms)
            case _:
                await self._forget(picked[0].account, model)
        await self._compare({each.account for each in picked}, model)

    async def _write(self, step: Step, account: Account, model: Model) -> None:
        changes = {f"item {at}": None if how == 0 else "x" * how for at, how in step.picks}
        model.write_items(account, changes, step.ms / 1000)
        await self.backend.write_items(account, changes, step.ms / 1000)

    async def _forget(self, account: Account, model: Model) -> None:
        known = account in model.events
        counts = any(model.level(account, Claim(key)).counted for key in ("life", "spent"))
        there = await self.backend.forget(account)
        if counts or not known:
            # Of what has lapsed, it may or may not say that it was there.
            _same(counts, there)
        model.forget(account)

    async def _compare(self, accounts: set[Account], model: Model) -> None:
        for account in sorted(accounts):
            claims = self._looked_at(account)
            expected = [model.level(account, each) for each in claims]
            _same(expected, await self.backend.levels(account, claims))
            items = await self.backend.read_items(account)
            _same(model.items(account), list(items.items()))

    def _looked_at(self, account: Account) -> list[Claim]:
        if account.kind == "campaign":
            return [money(1)]
        began = self.clock.now - self.clock.now % DAY
        claims = tuple(Claim(key, window=window) for key, window in sorted(WINDOWS.items()))
        return list(_as_drawn(a_hold(account, *claims), "", began).claims)


def _a_bit_shorter(script: Script) -> Iterator[Script]:
    """Give *script* without one step, the last first; then without one hold of a step."""
    steps = script.steps
    for at in reversed(range(len(steps))):
        yield replace(script, steps=(*steps[:at], *steps[at + 1 :]))
    for at, step in enumerate(steps):
        for pick in range(len(step.picks) if len(step.picks) > 1 else 0):
            less = replace(step, picks=(*step.picks[:pick], *step.picks[pick + 1 :]))
            yield replace(script, steps=(*steps[:at], less, *steps[at + 1 :]))


def _same(expected: object, found: object) -> None:
    """Raise AssertionError with both, unless they are equal."""
    if expected != found:
        raise AssertionError(f"the model says {expected}, the backend {found}")


def _told(script: Script) -> str:
    used = sorted({at for step in script.steps for at, _ in step.picks})
    holds = [f"  {at}: {_without_bounds(script.holds[at])}" for at in used]
    return "\n".join([*holds, *(f"  {each}" for each in script.steps)])


def _without_bounds(hold: Hold) -> Hold:
    return replace(
        hold,
        claims=tuple(replace(each, window=replace(each.window, bounds=())) for each in hold.claims),
    )
