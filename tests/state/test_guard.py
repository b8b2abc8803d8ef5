"""Between requests and a backend that is slow, away, or back; and what is never lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state.base import Account, Booking, Claim, Hold, Level, Verdict, money
from vastproxy.state.guard import TURNS, GuardedState, Telling
from vastproxy.state.journal import Journal
from vastproxy.state.lanes import MAX_BATCH, MAX_WAITING
from vastproxy.state.memory import InMemoryBackend

START = 1_800_000_000_000
SPRING = Account("campaign", "spring")


class Scripted(InMemoryBackend):
    """A backend in memory that a test slows down, breaks, and looks into."""

    def __init__(self) -> None:
        """Begin as one that answers at once."""
        super().__init__(clock=lambda: START)
        self.away = False
        self.refuses: set[str] = set()
        """Operations that it will not take."""
        self.full = False
        """Whether it takes no writes at all."""
        self.mistake = False
        """Whether it fails as a bug does."""
        self.gate = asyncio.Event()
        """Calls wait for it."""
        self.gate.set()
        self.calls: list[tuple[str, int]] = []
        """Names, and how many holds."""
        self.closed = 0
        self.flushes = 0
        self.pings = 0
        self.wrong = ""
        """What a look finds wrong that will not pass by itself."""
        self.fails: Exception | None = None
        """What a look fails with that no backend should."""

    async def _called(self, name: str, holds: Sequence[Hold]) -> None:
        self.calls.append((name, len(holds)))
        await self.gate.wait()
        if self.away:
            raise StateAwayError("gone")
        if self.mistake:
            raise ZeroDivisionError
        if self.full or self.refuses & {each.operation for each in holds}:
            raise StateBackendError("OOM" if self.full else "poison")

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve, as the test says."""
        await self._called("reserve", holds)
        return await super().reserve(holds)

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, as the test says."""
        await self._called("confirm", holds)
        return await super().confirm(holds)

    async def void(self, holds: Sequence[Hold]) -> None:
        """Void, as the test says."""
        await self._called("void", holds)
        await super().void(holds)

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell, as the test says."""
        await self._called("levels", ())
        return await super().levels(account, claims)

    async def increment(self, key: str, amount: int = 1) -> int:
        """Count, as the test says."""
        await self._called("increment", ())
        return await super().increment(key, amount)

    async def ping(self) -> None:
        """Answer, as the test says."""
        self.pings += 1
        await self.gate.wait()
        if self.away:
            raise StateAwayError("gone")
        if self.wrong:
            raise StateBackendError(self.wrong)
        if self.fails is not None:
            raise self.fails

    async def flush(self) -> None:
        """Count how often."""
        self.flushes += 1

    async def close(self) -> None:
        """Count the ends."""
        self.closed += 1

    async def spent(self) -> int:
        """Give what is counted of the campaign."""
        [level] = await InMemoryBackend.levels(self, SPRING, [money(0)])
        return level.counted

    def named(self, name: str) -> list[int]:
        """Give the sizes of the calls of *name*."""
        return [size for called, size in self.calls if called == name]


def a_hold(operation: str = "o", amount: int = 1, limit: int | None = None) -> Hold:
    """Build a hold of a campaign's money."""
    return Hold(SPRING, operation, (money(amount, limit),))


@asynccontextmanager
async def guarded(backend: Scripted, **settings: Any) -> AsyncIterator[GuardedState]:
    """Open a guard before *backend*."""
    async with GuardedState(backend, **{"timeout": 5, **settings}) as state:
        yield state


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait for *condition*."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - a condition of any kind
            await asyncio.sleep(0.005)


def files(directory: Path) -> list[str]:
    """Give the names of the files in *directory*."""
    return [each.name for each in directory.iterdir()]


async def turns(count: int = 10) -> None:
    """Let others run."""
    for _ in range(count):
        await asyncio.sleep(0)


# --- In time ------------------------------------------------------------------------------------


async def test_passes_on() -> None:
    """While the backend answers, its answers are given."""
    backend = Scripted()
    async with guarded(backend) as state:
        verdicts = await state.reserve([a_hold("a", 3, 3), a_hold("b", 1, 3)])
        bookings = await state.confirm([a_hold("a", 3), a_hold("b")])
        await state.write_items(SPRING, {"k": "v"}, 60)

        assert [Verdict(granted=True), Verdict(granted=False, refused=0)] == verdicts
        assert ["booked", "late"] == bookings
        assert [Level(4, 0)] == await state.levels(SPRING, [money(0)])
        assert {"k": "v"} == await state.read_items(SPRING)


async def test_nobody_waits_twice() -> None:
    """The first call waits as long as the timeout; who asks afterwards is told at once."""
    backend = Scripted()
    async with guarded(backend, timeout=0.05) as state:
        backend.gate.clear()
        began = time.monotonic()
        with pytest.raises(StateAwayError, match=r"^no answer in 50 ms$"):
            await state.reserve([a_hold()])
        waited = time.monotonic() - began
        calls = len(backend.calls)
        for _ in range(100):
            for ask in (state.reserve([a_hold()]), state.levels(SPRING, [money(0)])):
                with pytest.raises(StateAwayError, match=r"^the state backend is away$"):
                    await ask
            await state.void([a_hold()])

        assert 0.05 <= waited < 2
        assert calls == len(backend.calls)
        assert not state.available
        backend.gate.set()


async def test_who_waits_together_is_told_together() -> None:
    """When the timeout passes, those that waited for the next call are told as well."""
    backend = Scripted()
    failures = []

    async def ask(state: GuardedState, at: int) -> None:
        """Reserve, and remember what came of it."""
        try:
            await state.reserve([a_hold(f"o{at}")])
        except StateAwayError as error:
            failures.append(str(error))

    async with guarded(backend, timeout=0.05) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            for at in range(50):
                group.create_task(ask(state, at))

        assert 50 == len(failures)
        assert 2 >= len(backend.named("reserve"))
        backend.gate.set()


async def test_busy_loop_is_no_absence() -> None:
    """An event loop that was blocked for long does not make the backend late."""
    backend = Scripted()
    async with guarded(backend, timeout=0.05) as state:
        backend.gate.clear()

        async def block() -> None:
            """Block everything, and let the backend answer then."""
            await turns()
            time.sleep(0.2)  # noqa: ASYNC251 - a loop that is blocked is the point
            await turns(3)
            backend.gate.set()

        async with asyncio.TaskGroup() as group:
            asked = group.create_task(state.reserve([a_hold()]))
            group.create_task(block())

        assert [Verdict(granted=True)] == asked.result()
        assert state.available


async def spin(seconds: float) -> None:
    """Work for *seconds*, in small pieces, as many requests at once do."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        piece = time.monotonic() + 0.002
        while time.monotonic() < piece:
            pass
        await asyncio.sleep(0)


async def test_hard_work_is_no_absence() -> None:
    """While the process works all the time, an answer that has to wait for it is not late."""
    backend = Scripted()
    async with guarded(backend, timeout=0.05) as state:
        backend.gate.clear()

        async def work() -> None:
            """Work, and let the backend answer then."""
            await spin(0.25)
            backend.gate.set()

        async with asyncio.TaskGroup() as group:
            asked = group.create_task(state.reserve([a_hold()]))
            group.create_task(work())

        assert [Verdict(granted=True)] == asked.result()


async def test_patience_ends() -> None:
    """However hard the process works, a backend that does not answer is away in the end."""
    backend = Scripted()
    async with guarded(backend, timeout=0.01) as state:
        backend.gate.clear()

        async def ask() -> None:
            """Wait for what does not come."""
            with pytest.raises(StateAwayError):
                await state.reserve([a_hold()])

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            asked = group.create_task(ask())
            while not asked.done():
                await spin(0.01)

        assert not state.available
        backend.gate.set()


async def test_answers_no_is_no_absence() -> None:
    """A backend that refuses a call has failed, and is there all the same."""
    failed: list[None] = []
    backend = Scripted()
    backend.refuses = {"bad"}
    async with guarded(backend, telling=Telling(failed=lambda: failed.append(None))) as state:
        with capture_logs() as logs, pytest.raises(StateBackendError, match="poison"):
            await state.reserve([a_hold("bad")])

        assert state.available
        assert [("state.failed", "error")] == [(e["event"], e["log_level"]) for e in logs]
        assert 1 == len(failed)


async def test_local_backend_is_asked_directly() -> None:
    """A backend that never waits for anybody is asked without a detour."""
    backend = Scripted()
    async with guarded(backend, local=True) as state:
        await state.reserve([a_hold()])

        assert ["booked"] == await state.confirm([a_hold()])
        assert 1 == len(state._tasks)


async def test_local_backend_needs_no_turn() -> None:
    """However many other calls are under way, a backend that never waits is asked at once."""
    backend = Scripted()
    async with guarded(backend, local=True, timeout=0.01) as state:
        for _ in range(TURNS):
            await state._turns.acquire()
        await state.void([a_hold()])
        await state.write_items(SPRING, {"k": "v"}, 60)

        assert {"k": "v"} == await state.read_items(SPRING)
        assert [1] == backend.named("void")


async def test_void_that_fails_is_forgotten() -> None:
    """What cannot be given back frees itself: nobody is told, and nothing is asked for nothing."""
    backend = Scripted()
    backend.refuses = {"bad"}
    async with guarded(backend) as state:
        await state.void([a_hold("bad")])
        await state.void([])

        assert [1] == backend.named("void")
        assert state.available


# --- Together -----------------------------------------------------------------------------------


async def test_bundles() -> None:
    """What is asked while a call is under way goes out together, and all get their own answers."""
    backend = Scripted()
    async with guarded(backend) as state:
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(state.reserve([a_hold(f"{at}", 1, 120)])) for at in range(200)
            ]
        granted = [task.result()[0].granted for task in asked]

        assert [True] * 120 + [False] * 80 == granted
        assert 3 >= len(backend.named("reserve"))
        assert 200 == sum(backend.named("reserve"))


async def test_answers_keep_their_order() -> None:
    """Each caller gets the answers for its own holds, in their order."""
    backend = Scripted()
    async with guarded(backend) as state:
        await state.confirm([a_hold("again")])
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(state.confirm([a_hold("x")]))
            await turns()
            second = group.create_task(state.confirm([a_hold("again"), a_hold("new")]))
            third = group.create_task(state.confirm([]))
            fourth = group.create_task(state.confirm([a_hold("y"), a_hold("again")]))
            await turns()
            backend.gate.set()

        assert (["late"], ["again", "late"], [], ["late", "again"]) == (
            first.result(),
            second.result(),
            third.result(),
            fourth.result(),
        )
        assert [1, 1, 4] == backend.named("confirm")


async def test_largest_call() -> None:
    """No call has more than MAX_BATCH holds, but for those that one caller has together."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(state.reserve([a_hold("first")]))
            await turns()
            for at in range(3):
                some = [a_hold(f"{at}-{n}") for n in range(MAX_BATCH // 2)]
                group.create_task(state.reserve(some))
            many = [a_hold(f"m{n}") for n in range(MAX_BATCH + 1)]
            group.create_task(state.reserve(many))
            await turns()
            backend.gate.set()

        assert [1, MAX_BATCH, MAX_BATCH // 2, MAX_BATCH + 1] == backend.named("reserve")


async def test_burst_behind_a_slow_call() -> None:
    """A thousand reservations that wait for one slow call are all decided, and exactly."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(state.reserve([a_hold(f"{at}", 1, 3)])) for at in range(1000)
            ]
            await turns()
            backend.gate.set()

        assert 3 == sum(task.result()[0].granted for task in asked)
        assert state.available


async def test_too_many_wait() -> None:
    """Who finds too many before it is told at once; that says nothing against the backend."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(state.reserve([a_hold("under way")]))
            await turns()
            many = [a_hold(f"{at}") for at in range(MAX_WAITING)]
            for half in (many[: MAX_WAITING // 2], many[MAX_WAITING // 2 :]):
                group.create_task(state.reserve(half))
            await turns()
            async with asyncio.timeout(1):
                with pytest.raises(StateAwayError, match=r"^too many calls wait for the state"):
                    await state.reserve([a_hold("one too many")])
            available = state.available
            backend.gate.set()

        assert available
        assert [Verdict(granted=True)] == await state.reserve([a_hold("later")])


async def test_too_many_confirmations_wait() -> None:
    """Confirmations for which there is no room go to the journal, and count, all of them once."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(state.confirm([a_hold("under way")]))
            await turns()
            group.create_task(state.confirm([a_hold(f"{at}") for at in range(MAX_WAITING)]))
            await turns()
            async with asyncio.timeout(2):
                for at in range(300):
                    deferred = await state.confirm([a_hold(f"more {at}")])
            background = len(state._tasks)
            backend.gate.set()
        await wait_until(lambda: not len(state.journal))
        await turns()

        assert ["deferred"] == deferred
        assert 1 + MAX_WAITING + 300 == await backend.spent()
        # The sweep, the lane, who writes the journal, and who waits to do so.
        assert 4 >= background
        assert 2 >= backend.flushes


async def test_who_goes_disturbs_nobody() -> None:
    """A caller that is cut off reserves nothing, and leaves the others their answers."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            under_way = group.create_task(state.reserve([a_hold("a")]))
            await turns()
            gone = group.create_task(state.reserve([a_hold("b", 5)]))
            stays = group.create_task(state.reserve([a_hold("c")]))
            await turns()
            under_way.cancel()
            gone.cancel()
            await turns()
            backend.gate.set()

        assert [Verdict(granted=True)] == stays.result()
        assert [1, 1] == backend.named("reserve")
        assert [Level(0, 2)] == await state.levels(SPRING, [money(0)])


async def test_nobody_left() -> None:
    """Where all who waited have gone, the backend is not asked."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(state.reserve([a_hold("a")]))
            await turns()
            gone = group.create_task(state.reserve([a_hold("b")]))
            await turns()
            gone.cancel()
            await turns()
            backend.gate.set()

        assert [1] == backend.named("reserve")


async def test_mistake_of_ours_keeps_nobody_waiting() -> None:
    """A backend that fails as a bug does fails those who wait for it, and works again later."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.mistake = True
        with capture_logs() as logs:
            async with asyncio.timeout(5):
                with pytest.raises(StateBackendError, match="broken off"):
                    await state.reserve([a_hold()])
            await turns()
        backend.mistake = False

        assert ["task.failed"] == [each["event"] for each in logs]
        assert [Verdict(granted=True)] == await state.reserve([a_hold()])


async def test_end_keeps_nobody_waiting() -> None:
    """Who still waits when the state is closed is told."""
    backend = Scripted()

    async def ask(state: GuardedState) -> str:
        """Reserve, and say what came of it."""
        try:
            await state.reserve([a_hold()])
        except StateAwayError as error:
            return str(error)
        return ""

    async with asyncio.TaskGroup() as group:
        async with guarded(backend) as state:
            backend.gate.clear()
            under_way = group.create_task(ask(state))
            await turns()
            waits = group.create_task(ask(state))
            await turns()
        backend.gate.set()

    assert ["the call was broken off"] * 2 == [under_way.result(), waits.result()]


# --- What was shown -----------------------------------------------------------------------------


async def test_confirmation_waits_for_the_return() -> None:
    """A confirmation that cannot be written is deferred, and written before the state is back."""
    there: list[bool] = []
    waiting: list[int] = []
    failed: list[None] = []
    telling = Telling(there.append, lambda: failed.append(None), waiting.append)
    backend = Scripted()
    async with guarded(backend, telling=telling) as state:
        backend.away = True
        bookings = [await state.confirm([a_hold(f"{at}", 2)]) for at in range(3)]
        found = (state.available, list(there), list(waiting), len(failed))
        backend.away = False
        await wait_until(lambda: state.available)

        assert [["deferred"]] * 3 == bookings
        assert (False, [False], [1, 2, 3], 1) == found
        assert 6 == await backend.spent()
        assert ([False, True], 0, 0) == (there, waiting[-1], len(state.journal))


async def test_replayed_beacon_takes_one_place() -> None:
    """A beacon that is sent again and again during an outage leaves room for the others."""
    backend = Scripted()
    async with guarded(backend, journal=Journal(max_entries=10)) as state:
        backend.away = True
        for _ in range(50):
            await state.confirm([a_hold("replayed")])
        for at in range(9):
            await state.confirm([a_hold(f"{at}")])
        found = (len(state.journal), state.journal.dropped)
        backend.away = False
        await wait_until(lambda: state.available)

        assert (10, 0) == found
        assert 10 == await backend.spent()


async def test_false_alarm_is_short() -> None:
    """The first look is made at once; soon after a false alarm, it is not."""
    backend = Scripted()
    async with guarded(backend) as state:
        state.goes_away("late")
        await turns()
        first = state.available
        state.goes_away("late again")
        await turns()
        second = state.available
        await wait_until(lambda: state.available)

    assert (True, False) == (first, second)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("bad file"), "state.still_away"),
        (TimeoutError(), "state.still_away"),
        (StateBackendError("newer tables"), "state.still_away"),
        (ZeroDivisionError("a mistake"), "state.look_failed"),
    ],
    ids=repr,
)
async def test_look_never_ends_before_the_return(error: Exception, told: str) -> None:
    """Whatever a look fails with, it is looked again, and the state comes back."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.fails = error
        with capture_logs() as logs:
            state.goes_away("late")
            await wait_until(lambda: len(logs) > 2)
        backend.fails = None
        await wait_until(lambda: state.available)

    assert ["state.away", told, told] == [each["event"] for each in logs]


async def test_slow_backend_is_looked_at_less_and_less() -> None:
    """A backend that answers looks, and is too slow for requests, makes few of them wait."""

    class Slow(Scripted):
        """Takes longer for a reservation than requests wait."""

        async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
            """Reserve slowly."""
            await asyncio.sleep(1)
            return await super().reserve(holds)

    away: list[bool] = []
    async with guarded(Slow(), timeout=0.01, telling=Telling(away.append)) as state:
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            with suppress(StateAwayError):
                await state.reserve([a_hold()])
            await asyncio.sleep(0.002)

    assert 2 <= away.count(False) <= 5


async def test_journal_is_settled_before_the_return() -> None:
    """While the journal cannot be written, a backend that answers is not back yet."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.away = True
        await state.confirm([a_hold()])
        backend.gate.clear()
        backend.away = False
        pings = backend.pings
        await wait_until(lambda: backend.pings > pings)
        assert not state.available
        backend.gate.set()
        await wait_until(lambda: state.available)

        assert 1 == await backend.spent()


async def test_answer_that_was_lost_counts_once() -> None:
    """A confirmation that happened, and whose answer came too late, counts once."""
    backend = Scripted()
    happened = asyncio.Event()

    async def confirm_slowly(holds: Sequence[Hold]) -> list[Booking]:
        """Confirm at once, and say so much later."""
        bookings = await InMemoryBackend.confirm(backend, holds)
        happened.set()
        await asyncio.sleep(60)
        return bookings

    async with guarded(backend, timeout=0.05) as state:
        state._confirming._call = confirm_slowly
        assert ["deferred"] == await state.confirm([a_hold("o", 7)])
        assert happened.is_set()
        await wait_until(lambda: state.available)

        assert 7 == await backend.spent()


async def test_poison_keeps_nobody() -> None:
    """An entry that the backend will not take is given up, with its amounts; the others count."""
    backend = Scripted()
    backend.refuses = {"bad"}
    async with guarded(backend) as state:
        holds = [a_hold(f"o{at}") for at in range(40)]
        with capture_logs() as logs:
            assert ["deferred"] * 41 == await state.confirm(
                [*holds[:20], a_hold("bad", 5), *holds[20:]]
            )
            await wait_until(lambda: not len(state.journal))
        [refused] = [each for each in logs if each["event"] == "state.refused"]

        assert 40 == await backend.spent()
        assert ("campaign spring [('spent', 5)]", "poison") == (
            refused["entry"],
            refused["problem"],
        )
        assert state.available
        assert 20 > len(backend.named("confirm"))


async def test_full_backend_loses_nothing() -> None:
    """A backend that answers, and takes no writes, is away: no entry is given up for that."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.full = True
        with capture_logs() as logs:
            assert ["deferred"] == await state.confirm([a_hold("o", 9)])
            await wait_until(lambda: not state.available)
        assert 1 == len(state.journal)
        assert "state.refused" not in [each["event"] for each in logs]
        backend.full = False
        await wait_until(lambda: state.available)

        assert 9 == await backend.spent()


@pytest.mark.parametrize("steps", range(6))
async def test_confirmation_of_who_has_gone(steps: int) -> None:
    """What was shown counts, also where its caller is cut off before or after it is sent."""
    backend = Scripted()
    async with guarded(backend) as state:
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            group.create_task(state.confirm([a_hold("first")]))
            await turns()
            gone = group.create_task(state.confirm([a_hold("gone", 10)]))
            for _ in range(steps):
                await asyncio.sleep(0)
            if steps == 5:
                backend.gate.set()
                await asyncio.sleep(0)
            gone.cancel()
            backend.gate.set()
        await wait_until(lambda: not len(state.journal))

        # One that never began has asked for nothing.
        assert 1 + (10 if steps else 0) == await backend.spent()


async def test_two_settle_at_once() -> None:
    """However many write the journal at one time, each entry is written once."""
    backend = Scripted()
    async with guarded(backend) as state:
        await state.journal.add([a_hold(f"{at}") for at in range(1200)])
        backend.gate.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(state.flush())
            await turns()
            backend.gate.set()

        assert [500, 500, 200] == backend.named("confirm")
        assert 1200 == await backend.spent()


async def test_flush_finds_the_backend_gone() -> None:
    """A journal that cannot be written when it is flushed makes the backend away, and stays."""
    backend = Scripted()
    async with guarded(backend) as state:
        await state.journal.add([a_hold()])
        backend.away = True
        await state.flush()
        found = (state.available, len(state.journal))
        await state.flush()
        backend.away = False
        await wait_until(lambda: state.available)

        assert (False, 1) == found
        assert 1 == await backend.spent()


# --- Life ---------------------------------------------------------------------------------------


async def test_begins_without_the_backend() -> None:
    """Where the backend is away at the start, it is taken for that, and looked for."""
    backend = Scripted()
    backend.away = True
    there: list[bool] = []
    with capture_logs() as logs:
        async with guarded(backend, telling=Telling(there.append)) as state:
            assert not state.available
            backend.away = False
            await wait_until(lambda: state.available)

    assert [False, True] == there
    assert ["state.away", "state.back"] == [each["event"] for each in logs]


async def test_start_that_fails_closes() -> None:
    """A backend that is there, and cannot be used, stops the start, and is closed."""
    backend = Scripted()
    backend.wrong = "a newer version's tables"
    with pytest.raises(StateBackendError, match="newer"):
        async with guarded(backend):
            pass

    assert 1 == backend.closed


async def test_end_writes_what_waits() -> None:
    """What waits when the state is closed is written, where that can be."""
    backend = Scripted()
    async with guarded(backend) as state:
        await state.journal.add([a_hold()])

    assert 1 == await backend.spent()
    assert 1 == backend.closed


async def test_end_without_the_backend(tmp_path: Path) -> None:
    """What cannot be written in the end is in the journal's file for the next process."""
    backend = Scripted()
    with capture_logs() as logs:
        async with guarded(backend, journal=Journal(tmp_path)) as state:
            backend.away = True
            await state.confirm([a_hold("o", 3)])
    left = next(each for each in logs if each["event"] == "journal.left")
    again = Scripted()
    async with guarded(again, journal=Journal(tmp_path)) as state:
        assert 0 == len(state.journal)

    assert (1, "on disk") == (left["entries"], left["kept"])
    assert 3 == await again.spent()
    assert [] == files(tmp_path)


async def test_stop() -> None:
    """Its tasks end, and the backend stays open."""
    backend = Scripted()
    backend.away = True
    state = GuardedState(backend)
    await state.open()
    assert 1 == len(state._tasks)
    await state.stop()

    assert 0 == len(state._tasks)
    assert 0 == backend.closed


async def test_repr() -> None:
    """The state says whether it is there, what it stands before, and what waits."""
    backend = Scripted()
    state = GuardedState(backend)

    assert (
        "<GuardedState available, <InMemoryBackend accounts: 0, forgotten: 0>,"
        " <Journal in memory, waiting: 0, dropped: 0>>" == repr(state)
    )
    state.available = False
    assert repr(state).startswith("<GuardedState away, ")
    with suppress(StateAwayError):
        await state.levels(SPRING, [money(0)])
