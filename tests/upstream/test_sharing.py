"""Breakers of several instances: what each says, what it takes over, and a fleet of eight."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn

import pytest
from structlog.testing import capture_logs

from tests.support.valkey import Valkey, valkey_server
from vastproxy.errors import StateAwayError, UpstreamRefusedError
from vastproxy.state.redis_bus import Ballot, Standing
from vastproxy.upstream import sharing
from vastproxy.upstream.breaker import UpstreamBreaker
from vastproxy.upstream.sharing import (
    ASK_EVERY,
    NEWS_FOR,
    BreakerBus,
    RedisExtras,
    SharedBreaker,
)
from vastproxy.upstream.window import BreakerSettings

WITHIN = 10.0
"""Seconds that a test waits for what must come."""

RESET = 60.0


class Moved:
    """A clock that a test moves."""

    def __init__(self) -> None:
        """Begin anywhere."""
        self.now = 1000.0

    def __call__(self) -> float:
        """Give the time."""
        return self.now


class Instance:
    """One breaker that is shared, without anybody to share it with but the test."""

    def __init__(self, quorum: int = 1) -> None:
        self.clock = Moved()
        self.there = True
        self.woken = 0
        settings = BreakerSettings(reset_timeout=RESET, success_threshold=1)
        self.breaker = UpstreamBreaker("main", settings, clock=self.clock, random=lambda: 0.5)
        self.shared = SharedBreaker(
            self.breaker, quorum, there=lambda: self.there, wake=self.wake, clock=self.clock
        )

    def wake(self) -> None:
        """Take note that there is something to say."""
        self.woken += 1

    def call(self, outcome: Any, times: int = 1) -> None:
        """Make calls that end like that."""
        for _ in range(times):
            self.breaker.settle(self.breaker.admit(), outcome, reason="status 500")

    def fail(self) -> None:
        """Fail until the breaker opens."""
        self.call("failed", 5)

    def says(self, *, due: bool = False) -> str:
        """Take what is to be said, and give the word."""
        ballot = self.shared.ballot(due=due)
        return "" if ballot is None else ballot.says

    def tell(self, *, due: bool = False, **changes: Any) -> Ballot:
        """Say what is to be said, and answer it."""
        ballot = self.shared.ballot(due=due)
        assert ballot is not None
        self.shared.answered(ballot, a_standing(ballot.says, **changes))
        return ballot

    def refused(self) -> str:
        """Give why no call may be made; empty if one may."""
        try:
            ticket = self.breaker.admit()
        except UpstreamRefusedError as error:
            return str(error)
        self.breaker.settle(ticket, "neutral")
        return ""


def a_standing(says: Any = "open", **changes: Any) -> Standing:
    """Build how a breaker stands in the first term, with one vote, left alone for a minute."""
    standing = Standing("main", "bob", says, 1, 0, 60.0, "5 failures in a row", granted=False)
    return replace(standing, **changes)


@pytest.fixture
def ada() -> Instance:
    """Give an instance that knows how the breaker stands: closed, in the first term."""
    instance = Instance()
    instance.tell(votes=0)
    return instance


# --- What is said --------------------------------------------------------------------------------


def test_first_it_looks() -> None:
    """A new instance asks how the breaker stands, and leaves alone what others leave alone."""
    new = Instance()
    ballot = new.tell(seconds=30.0)

    assert "look" == ballot.says
    assert "open" == new.breaker.state
    assert "seen by another instance: 5 failures in a row; the next probe is in 30 s" in (
        new.refused()
    )


def test_opening_is_told(ada: Instance) -> None:
    """When it opens others are told, for how long and why; and from time to time that it is so."""
    ada.fail()
    ballot = ada.tell()

    assert 1 == ada.woken
    assert ("open", RESET, 1) == (ballot.says, ballot.seconds, ballot.quorum)
    assert "5 failures in a row" in ballot.reason
    assert ["", "stay"] == [ada.says(), ada.says(due=True)]


def test_closing_is_told(ada: Instance) -> None:
    """When it closes others are told, once."""
    ada.fail()
    ada.tell()
    ada.breaker.close("by hand")
    ballot = ada.tell(votes=0, term=1)

    assert ("closed", "by hand") == (ballot.says, ballot.reason)
    assert ["", "look"] == [ada.says(), ada.says(due=True)]


def test_only_the_last_change_is_told(ada: Instance) -> None:
    """What changed back before anybody could be told is not told."""
    ada.fail()
    ada.breaker.close("by hand")
    ada.fail()

    assert ["open", ""] == [ada.says(), ada.says()]


def test_what_could_not_be_said_is_said_later(ada: Instance) -> None:
    """An opening is told when there is somebody to tell."""
    ada.fail()
    ballot = ada.shared.ballot(due=False)
    assert ballot is not None
    ada.shared.unsaid(ballot)

    assert "open" == ada.says()


def test_old_closing_is_not_told(ada: Instance) -> None:
    """A closing that nobody could be told of for a while closes nothing any more."""
    ada.fail()
    ada.breaker.close("by hand")
    ballot = ada.shared.ballot(due=False)
    assert ballot is not None
    ada.shared.unsaid(ballot)
    ada.clock.now += NEWS_FOR + 0.1

    assert "closed" == ballot.says
    assert "look" == ada.says()


def test_what_others_asked_for_is_no_echo(ada: Instance) -> None:
    """Who opened or closed because others did says nothing of it, and does not vote."""
    ada.shared.heard(a_standing())
    assert "open" == ada.breaker.state
    assert ["", "look"] == [ada.says(), ada.says(due=True)]
    ada.shared.heard(a_standing("closed", term=1, votes=0))

    assert "closed" == ada.breaker.state
    assert ["", "look"] == [ada.says(), ada.says(due=True)]


def test_failed_probe_is_a_vote_of_its_own(ada: Instance) -> None:
    """Who opened because others did, and then saw for itself, votes."""
    ada.shared.heard(a_standing(seconds=0.0))
    assert "another instance's" in ada.refused()
    ada.tell(seconds=0.0, granted=True)
    ada.call("failed")

    assert ["open", "stay"] == [ada.says(), ada.says(due=True)]


def test_what_is_held_by_hand_is_not_shared(ada: Instance) -> None:
    """A breaker that somebody holds open neither votes, nor does what others do."""
    ada.breaker.open("by hand")
    assert "look" == ada.tell(votes=0).says
    ada.shared.heard(a_standing())
    ada.shared.heard(a_standing("closed", term=1))
    told = ada.breaker.told()

    assert ("open", True, "by hand") == (told["state"], told["held"], told["reason"])
    assert "look" == ada.says(due=True)


# --- What is taken over --------------------------------------------------------------------------


def test_quorum_is_needed() -> None:
    """Where two votes are needed one opens nothing, said or read."""
    ada = Instance(quorum=2)
    ada.tell(votes=1)
    ada.shared.heard(a_standing(votes=1))
    assert "closed" == ada.breaker.state
    ada.shared.heard(a_standing(votes=2))

    assert "open" == ada.breaker.state
    assert "seen by 2 instances" in ada.refused()


def test_lost_opening_is_read(ada: Instance) -> None:
    """An opening whose message was lost is found at the next look."""
    ada.tell(due=True)

    assert "open" == ada.breaker.state


def test_own_reason_is_kept() -> None:
    """Who has seen for itself takes from others how long, and not why."""
    ada = Instance(quorum=2)
    ada.tell(votes=0)
    ada.fail()
    own = ada.breaker.told()["reason"]
    ada.tell(votes=1, seconds=RESET)
    ada.shared.heard(a_standing(votes=2, seconds=90.0, reason="no connection"))
    told = ada.breaker.told()

    assert "5 failures in a row, the last: status 500" == own
    assert (own, 90) == (told["reason"], told["retry_in_seconds"])
    assert "stay" == ada.says(due=True)


@pytest.mark.parametrize(
    ("says", "who"), [("", "2 instances"), ("look", "3 instances"), ("closed", "3 instances")]
)
def test_own_vote_is_no_other_instance(says: str, who: str) -> None:
    """Where its own vote still counts, that is none of those others who have seen it."""
    ada = Instance(quorum=3)
    ada.tell(votes=0)
    ada.fail()
    ada.tell(votes=1)
    ada.breaker.close("by hand")
    ballot = ada.shared.ballot(due=False)
    assert ballot is not None
    if says == "closed":
        ada.shared.answered(ballot, a_standing("closed", votes=0))
    else:
        # Nobody could be told of the closing while it was news.
        ada.shared.unsaid(ballot)
        ada.clock.now += NEWS_FOR + 0.1
        ballot = ada.shared.ballot(due=False)
        assert ballot is not None
    if says == "look":
        ada.shared.answered(ballot, a_standing("look", votes=0))
    ada.shared.heard(a_standing(votes=3))

    assert f"seen by {who}: 5 failures in a row" == ada.breaker.told()["reason"]


def test_vote_ends_with_its_term() -> None:
    """A vote of an older term counts no more, and was not among those of the newer."""
    ada = Instance(quorum=2)
    ada.tell(votes=0)
    ada.fail()
    ada.tell(votes=1)
    ada.shared.heard(a_standing("closed", votes=0, term=1))
    assert "closed" == ada.breaker.state
    ada.shared.heard(a_standing(votes=2, term=1))

    assert "seen by 2 instances: 5 failures in a row" == ada.breaker.told()["reason"]


@pytest.mark.parametrize("own", [True, False])
def test_lost_closing_is_read(ada: Instance, *, own: bool) -> None:
    """A closing whose message was lost is found at the next look, since it began a new term."""
    if own:
        ada.fail()
        ada.tell()
    else:
        ada.shared.heard(a_standing())
    ada.tell(due=True, votes=0, term=1)

    assert "closed" == ada.breaker.state


def test_lost_votes_close_nothing(ada: Instance) -> None:
    """When the server has forgotten all, what is open stays so until it is probed."""
    ada.shared.heard(a_standing(term=4))
    ada.tell(due=True, votes=0, term=0)

    assert "open" == ada.breaker.state
    assert 60 == ada.breaker.told()["retry_in_seconds"]


def test_older_term_is_not_heard(ada: Instance) -> None:
    """A message that came late, from before it was closed, opens nothing; nor is one closed."""
    ada.tell(due=True, votes=0, term=3)
    ada.shared.heard(a_standing(term=2))
    assert "closed" == ada.breaker.state
    ada.fail()
    ada.tell(term=3)
    ada.shared.heard(a_standing("closed", term=3))

    assert "open" == ada.breaker.state


def test_nothing_is_heard_before_the_first_look() -> None:
    """Who does not know the term cannot tell what a message is worth, and asks."""
    new = Instance()
    new.shared.heard(a_standing())

    assert "closed" == new.breaker.state
    assert "look" == new.says()


def test_longest_time_wins(ada: Instance) -> None:
    """It is left alone for as long as anybody wants, and for no shorter time."""
    ada.fail()
    ada.tell(seconds=RESET)
    ada.shared.heard(a_standing(seconds=10.0))
    assert 60 == ada.breaker.told()["retry_in_seconds"]
    ada.shared.heard(a_standing(seconds=90.0))

    assert 90 == ada.breaker.told()["retry_in_seconds"]
    assert "stay" == ada.says(due=True)


def test_probe_under_way_is_not_disturbed(ada: Instance) -> None:
    """While a probe is under way nobody else's failure decides."""
    ada.fail()
    ada.tell(seconds=0.0)
    ada.there = False
    ada.clock.now += RESET + 1
    ticket = ada.breaker.admit()
    ada.shared.heard(a_standing())
    assert "half-open" == ada.breaker.state
    ada.breaker.settle(ticket, "ok")

    assert "closed" == ada.breaker.state


def test_newer_news_are_not_undone(ada: Instance) -> None:
    """What has happened here since is told first, before an answer is taken."""
    ada.fail()
    ballot = ada.shared.ballot(due=False)
    assert ballot is not None
    ada.breaker.close("by hand")
    ada.shared.answered(ballot, a_standing("open"))
    ada.shared.heard(a_standing())

    assert "closed" == ada.breaker.state
    assert "closed" == ada.says()


# --- Probes --------------------------------------------------------------------------------------


def test_probe_is_asked_for(ada: Instance) -> None:
    """When the time is over the first call is refused, and asks; when granted the next goes out."""
    ada.fail()
    ada.tell()
    ada.clock.now += RESET + 1
    woken = ada.woken
    assert "the next probe is another instance's" in ada.refused()
    assert "another instance's" in ada.refused()
    ballot = ada.tell(seconds=0.0, granted=True)

    assert 1 == ada.woken - woken
    assert ("probe", RESET) == (ballot.says, ballot.seconds)
    assert "" == ada.refused()
    assert "half-open" == ada.breaker.state


def test_who_is_not_granted_asks_again_later(ada: Instance) -> None:
    """While somebody else probes it is not asked at every call."""
    ada.fail()
    ada.tell()
    ada.clock.now += RESET + 1
    ada.refused()
    ada.tell(seconds=0.0)
    ada.refused()
    assert "" == ada.says()
    ada.clock.now += ASK_EVERY + 0.01
    ada.refused()

    assert "probe" == ada.says()


def test_grant_lasts_until_it_is_used(ada: Instance) -> None:
    """Where calls are rare the one that is granted goes out, however late; and only that."""
    ada.fail()
    ada.tell()
    ada.clock.now += RESET + 1
    ada.refused()
    ada.tell(seconds=0.0, granted=True)
    ada.clock.now += 3600
    ada.call("failed")
    ada.clock.now += RESET + 1

    assert "another instance's" in ada.refused()


def test_grant_ends_when_another_has_failed(ada: Instance) -> None:
    """Who was to probe, and hears that it is left alone for longer, asks anew."""
    ada.fail()
    ada.tell()
    ada.clock.now += RESET + 1
    ada.refused()
    ada.tell(seconds=0.0, granted=True)
    ada.shared.heard(a_standing(seconds=20.0))
    ada.clock.now += 21

    assert "another instance's" in ada.refused()


def test_alone_it_probes(ada: Instance) -> None:
    """While others cannot be asked, and when it is shared no more, it probes as it would alone."""
    ada.fail()
    ada.tell()
    ada.clock.now += RESET + 1
    ada.there = False
    assert "" == ada.refused()
    ada.call("failed")
    ada.there = True
    ada.clock.now += RESET + 1
    assert "another instance's" in ada.refused()
    ada.shared.leave()

    assert "" == ada.refused()


def test_who_has_left_says_nothing(ada: Instance) -> None:
    """A breaker that is shared no more wakes nobody."""
    ada.shared.leave()
    ada.fail()

    assert 0 == ada.woken
    assert "<SharedBreaker main open, others'>" == repr(ada.shared)


# --- The bus -------------------------------------------------------------------------------------


class Hall:
    """Votes without a server: a test answers, fails and speaks."""

    def __init__(self) -> None:
        self.cast_: list[list[str]] = []
        self.away = False
        self.mistake = False
        self.said = asyncio.Event()
        self.listening = asyncio.Event()
        self.heard: Callable[[Standing], None] = lambda _: None
        self.end = asyncio.Event()

    async def cast(self, ballots: Sequence[Ballot]) -> list[Standing]:
        """Answer that nobody has voted."""
        self.cast_.append([f"{each.name} {each.says}" for each in ballots])
        self.said.set()
        if self.away:
            raise StateAwayError("gone")
        if self.mistake:
            raise ZeroDivisionError
        return [a_standing(each.says, name=each.name, votes=0) for each in ballots]

    async def listen(
        self, heard: Callable[[Standing], None], began: Callable[[], None]
    ) -> NoReturn:
        """Listen until the test ends that."""
        self.heard = heard
        began()
        self.listening.set()
        await self.end.wait()
        self.end.clear()
        raise StateAwayError("gone")

    async def next(self) -> list[str]:
        """Give what is said next."""
        async with asyncio.timeout(WITHIN):
            while not self.cast_:
                self.said.clear()
                await self.said.wait()
        return self.cast_.pop(0)


def a_breaker(name: str = "main", **changes: Any) -> UpstreamBreaker:
    """Build a breaker that opens at the fifth failure."""
    return UpstreamBreaker(name, BreakerSettings(**changes))


async def test_bus_asks_nobody_for_nothing() -> None:
    """Until there is a breaker to share nobody is asked."""
    hall = Hall()
    async with BreakerBus(hall) as bus:
        for _ in range(5):
            await asyncio.sleep(0)
        assert [] == hall.cast_
        assert not hall.listening.is_set()
        bus.add(a_breaker(), 1)

        assert ["main look"] == await hall.next()
        assert "<BreakerBus there, [<SharedBreaker main closed, others'>]>" == repr(bus)


async def test_bus_says_all_at_once() -> None:
    """Several breakers are told of in one call; each change wakes it."""
    hall, one, two = Hall(), a_breaker("one"), a_breaker("two")
    async with BreakerBus(hall) as bus:
        for each in (one, two):
            bus.add(each, 1)
        first = await hall.next()
        async with asyncio.timeout(WITHIN):
            await hall.listening.wait()
        await hall.next()
        two.open("failures", 60.0)

        assert ["one look", "two look"] == first
        assert ["two open"] == await hall.next()


async def test_bus_hears_for_the_breaker_that_is_meant() -> None:
    """A message about one breaker changes no other, and one about an unknown one nothing."""
    hall, one, two = Hall(), a_breaker("one"), a_breaker("two")
    async with BreakerBus(hall) as bus:
        for each in (one, two):
            bus.add(each, 1)
        await until(lambda: bus.there and hall.listening.is_set())
        for name in ("two", "three"):
            hall.heard(a_standing(name=name))

        assert ("closed", "open") == (one.state, two.state)


async def test_bus_replaces_and_removes() -> None:
    """A breaker of the same name takes the place of the older one, whose removal comes later."""
    hall, old, new = Hall(), a_breaker(), a_breaker()
    async with BreakerBus(hall) as bus:
        bus.add(old, 1)
        bus.add(new, 1)
        bus.remove(old)
        await until(lambda: bus.there and hall.listening.is_set())
        hall.heard(a_standing())
        assert ("closed", "open") == (old.state, new.state)
        bus.remove(new)
        hall.heard(a_standing("closed", term=1))

        assert "open" == new.state
        assert "<BreakerBus there, []>" == repr(bus)


async def test_bus_that_is_alone_lets_all_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nobody answers, each probes; when somebody does, what happened here is told."""
    monkeypatch.setattr(sharing, "AGAIN_AFTER", 0.01)
    hall, breaker = Hall(), a_breaker()
    hall.away = True
    with capture_logs() as logs:
        async with BreakerBus(hall) as bus:
            bus.add(breaker, 1)
            breaker.open("failures", 0.0)
            await until(lambda: len(hall.cast_) > 3)
            assert not bus.there
            assert "<BreakerBus away: gone, " in repr(bus)
            assert breaker.may_probe()
            hall.away = False
            await until(lambda: bus.there)
            assert not breaker.may_probe()

    assert ["main open"] == hall.cast_[3]
    assert ["sharing.away", "sharing.back"] == [
        each["event"] for each in logs if each["log_level"] == "warning"
    ]
    assert breaker.may_probe()


async def test_bus_does_not_hammer(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody answers it waits a while, whatever happens meanwhile."""
    monkeypatch.setattr(sharing, "AGAIN_AFTER", 3600.0)
    hall, breaker = Hall(), a_breaker()
    hall.away = True
    async with BreakerBus(hall) as bus:
        bus.add(breaker, 1)
        await hall.next()
        for each in (breaker.open, breaker.close) * 5:
            each("by hand")
            await asyncio.sleep(0)

        assert [] == hall.cast_


async def test_bus_reads_when_it_begins_to_listen() -> None:
    """When listening begins votes are read: messages before that were lost."""
    hall = Hall()
    async with BreakerBus(hall) as bus:
        bus.add(a_breaker(), 1)

        assert [["main look"]] * 2 == [await hall.next() for _ in range(2)]
        assert hall.listening.is_set()


async def test_bus_reads_when_it_is_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """When listening ends votes are read: if the server is gone, that is known at once."""
    monkeypatch.setattr(sharing, "AGAIN_AFTER", 3600.0)
    monkeypatch.setattr(sharing, "SYNC_EVERY", 3600.0)
    hall = Hall()
    async with BreakerBus(hall) as bus:
        bus.add(a_breaker(), 1)
        for _ in range(2):
            await hall.next()
        hall.end.set()

        assert ["main look"] == await hall.next()
        assert bus.there


async def test_bus_that_fails_lets_all_probe(capsys: pytest.CaptureFixture[str]) -> None:
    """Also after a mistake of ours nobody waits for a grant that never comes."""
    hall, breaker = Hall(), a_breaker()
    async with BreakerBus(hall) as bus:
        bus.add(breaker, 1)
        await until(lambda: bus.there)
        assert not breaker.may_probe()
        hall.mistake = True
        breaker.open("failures", 0.0)
        await until(lambda: not bus.there)

        assert breaker.may_probe()
    assert "ZeroDivisionError" in "".join(capsys.readouterr())


async def test_bus_reads_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing happens votes are read again and again."""
    monkeypatch.setattr(sharing, "SYNC_EVERY", 0.01)
    hall = Hall()
    async with BreakerBus(hall) as bus:
        bus.add(a_breaker(), 1)

        assert [["main look"]] * 5 == [await hall.next() for _ in range(5)]


# --- A fleet -------------------------------------------------------------------------------------

FLEET = 8
WINDOW = 0.5
"""Seconds for which a breaker of the fleet is left alone."""


async def until(true: Callable[[], bool]) -> None:
    """Return when *true* is."""
    async with asyncio.timeout(WITHIN):
        while not true():  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.002)


class Fleet:
    """Instances that ask one ad server, each through a breaker of its own."""

    def __init__(self, extras: Sequence[RedisExtras], quorum: int = 1) -> None:
        settings = BreakerSettings(reset_timeout=WINDOW, max_reset_timeout=WINDOW)
        self.extras = extras
        self.breakers = [UpstreamBreaker("main", settings) for _ in extras]
        for each, breaker in zip(extras, self.breakers, strict=True):
            each.breakers.add(breaker, quorum)
        self.is_well = True
        self.reached = 0

    async def ask(self, breaker: UpstreamBreaker) -> None:
        """Make one call, if it may be made."""
        try:
            ticket = breaker.admit()
        except UpstreamRefusedError:
            return
        self.reached += 1
        await asyncio.sleep(0.005)
        breaker.settle(ticket, "ok" if self.is_well else "failed", reason="status 500")

    async def ask_all(self) -> None:
        """Make one call at each instance."""
        await asyncio.gather(*(self.ask(each) for each in self.breakers))
        await asyncio.sleep(0.005)

    async def ask_until(self, done: Callable[[], bool]) -> None:
        """Make calls at all instances until it is *done*."""
        async with asyncio.timeout(WITHIN):
            while not done():
                await self.ask_all()

    def are(self, *states: str) -> bool:
        """Tell whether all breakers are in one of *states*."""
        return all(each.state in states for each in self.breakers)

    async def settled(self) -> None:
        """Return when all can be asked, and know how things stand."""
        await until(lambda: all(each.breakers.there for each in self.extras))


@pytest.fixture(scope="module")
def running() -> Iterator[Valkey]:
    """Run a server."""
    with valkey_server() as valkey:
        yield valkey


@pytest.fixture
def server(running: Valkey) -> Valkey:
    """Give the server without any data."""
    running.call("FLUSHALL")
    return running


Build = Callable[..., Awaitable[Fleet]]


@asynccontextmanager
async def building(valkey: Valkey) -> AsyncIterator[Build]:
    """Build fleets that share their breakers by *valkey*, and end with the block."""
    async with AsyncExitStack() as opened:

        async def build(size: int = FLEET, quorum: int = 1) -> Fleet:
            """Build a fleet of *size*, and return when all know how things stand."""
            extras = [
                await opened.enter_async_context(RedisExtras(valkey.url)) for _ in range(size)
            ]
            fleet = Fleet(extras, quorum)
            await fleet.settled()
            return fleet

        yield build


@pytest.fixture
async def build(server: Valkey) -> AsyncIterator[Build]:
    """Build fleets over the server."""
    async with building(server) as made:
        yield made


async def test_fleet_opens_probes_and_closes_together(build: Build) -> None:
    """What one has seen all leave alone; about one probes in each window; all come back."""
    fleet = await build()
    fleet.is_well = False
    for _ in range(5):
        await fleet.ask(fleet.breakers[3])
    await until(lambda: fleet.are("open"))
    assert 5 == fleet.reached
    began, fleet.reached = time.monotonic(), 0
    await fleet.ask_until(lambda: time.monotonic() - began > 4 * WINDOW)
    windows = (time.monotonic() - began) / WINDOW
    assert 2 <= fleet.reached <= windows * 1.5
    fleet.is_well = True
    began = time.monotonic()
    await fleet.ask_until(lambda: fleet.are("closed"))

    assert time.monotonic() - began < 4 * WINDOW


async def test_fleet_without_redis_is_eight_instances() -> None:
    """When Redis is killed each opens, probes and closes by itself; then they share again."""
    with valkey_server() as valkey:
        async with building(valkey) as build:
            fleet = await build()
            valkey.kill()
            fleet.is_well = False
            await fleet.ask_until(lambda: fleet.are("open"))
            assert 5 * FLEET <= fleet.reached
            await until(lambda: not any(each.breakers.there for each in fleet.extras))
            fleet.is_well = True
            await fleet.ask_until(lambda: fleet.are("closed"))
            valkey.restart()
            await fleet.settled()
            assert fleet.are("closed")
            fleet.is_well = False
            for _ in range(5):
                await fleet.ask(fleet.breakers[0])
            await until(lambda: fleet.are("open"))


async def test_new_instance_learns_how_things_stand(build: Build) -> None:
    """Who comes later does not have to fail first."""
    fleet = await build(1)
    fleet.is_well = False
    for _ in range(5):
        await fleet.ask(fleet.breakers[0])
    new = await build(1)
    await until(lambda: new.are("open"))

    assert 0 == new.reached


async def test_quorum_opens_the_fleet(build: Build) -> None:
    """One instance with a broken network does not open the whole fleet; a second opinion does."""
    fleet = await build(4, quorum=2)
    fleet.is_well = False
    for _ in range(5):
        await fleet.ask(fleet.breakers[0])
    await asyncio.sleep(0.1)
    assert ["open", "closed", "closed", "closed"] == [each.state for each in fleet.breakers]
    for _ in range(5):
        await fleet.ask(fleet.breakers[1])

    await until(lambda: fleet.are("open"))


# --- All of it -----------------------------------------------------------------------------------


async def test_extras_without_redis_are_no_hindrance() -> None:
    """With nobody there it starts, says so once, and does as one instance would."""
    with capture_logs() as logs:
        async with RedisExtras("redis://127.0.0.1:1") as extras:
            rate = extras.rate("main", 10, 2)
            began = time.monotonic()
            turns = [await rate.take() for _ in range(3)]
            found = await extras.store.get("k")
            waited = time.monotonic() - began

    assert [True, True, False] == turns
    assert found is None
    assert waited < 0.5
    assert ["sharing.not_yet", "redis.away", "redis.away"] == [each["event"] for each in logs]


async def test_extras_keep_a_rate_as_long_as_it_is_the_same(server: Valkey) -> None:
    """Asked again for a rate it gives the same one; another height is another limiter."""
    async with RedisExtras(server.url) as extras:
        first = extras.rate("main", 10, 2)

        assert extras.rate("main", 10, 2) is first
        assert extras.rate("main", 20, 2) is not first
        assert extras.rate("house", 10, 2) is not first
        assert "<SharedRate 20/s, burst 2, refused: 0, shared>" in repr(extras)


async def test_extras_leave_nothing_running(server: Valkey) -> None:
    """With the block all tasks and connections end, also those that look for a server."""
    before = len(asyncio.all_tasks())
    async with RedisExtras(server.url) as extras:
        extras.breakers.add(a_breaker(), 1)
        await until(lambda: extras.breakers.there)
        assert await extras.rate("main", 10, 2).take()
        await extras.store.put("k", b"x", 30)
    assert await extras.rate("main", 10, 2).take()
    assert await extras.store.get("k") is None
    await extras.store.put("k", b"x", 30)
    async with RedisExtras("redis://127.0.0.1:1") as extras:
        await extras.store.get("k")

    assert before == len(asyncio.all_tasks())
    clients = server.call("CLIENT", "LIST")
    assert 0 == str(clients).count("name=vastproxy")


async def test_secrets_are_not_told() -> None:
    """The password of the URL is in no text."""
    assert "sesame" not in repr(RedisExtras("redis://:sesame@127.0.0.1:1", "ada"))
