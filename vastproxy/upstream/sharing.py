"""
What instances of the proxy have in common, where the state is in Redis: breakers, rates, answers.

Rule 1: a breaker is asked and settled in memory. Nothing here keeps an ad request waiting but the
turn of a shared rate, and a look for an answer; both for a moment only.
Rule 2: while Redis is away, each instance does as it would alone.
Rule 3: an instance votes for what it has seen itself. A breaker that opened because others said so
does not vote, else the fleet would keep itself open; one that is held open by hand neither votes
nor listens.
Rule 4: closing is for all. Whoever closes a breaker, by its own rules or by hand, has more to go by
than those who only remember failures.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Literal, NoReturn, Protocol, Self

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.observe.tasks import Tasks
from vastproxy.observe.trace import BreakerChange
from vastproxy.state.redis_bus import Ballot, RedisVotes, Says, Standing
from vastproxy.state.redis_reach import Reach, RedisStore, RedisTurns
from vastproxy.state.redis_scripts import Script
from vastproxy.state.redis_servers import Servers
from vastproxy.upstream.breaker import UpstreamBreaker
from vastproxy.upstream.limiter import RateLimiter, SharedRate

SYNC_EVERY = 5.0
"""Seconds after which votes are read again in any case, as messages may be lost; up to a tenth more
or less, so that instances do not read together."""
AGAIN_AFTER = 1.0
"""Seconds until Redis is asked again when it was away; up to a half more."""
NEWS_FOR = 5.0
"""Seconds for which the closing of a breaker is told. Told later, it might close what others have
opened since."""
ASK_EVERY = 0.1
"""Seconds between two questions whether a probe may go out."""
OPEN_WITHIN = 1.0
"""Seconds that the first look at Redis may take; it goes on without."""

STORE_PAUSE = 1.0
"""Seconds in which no answer is looked for when one has not come in time: each such look would keep
an ad request waiting, and the answer may just be too large."""

UNKNOWN = -1
"""No term."""


# --- One breaker ---------------------------------------------------------------------------------


class SharedBreaker:
    """
    A breaker, and what is known of it elsewhere. Decides what to say, and never waits.

    Votes of *quorum* instances open it for all. *there* tells whether others can be asked, *wake*
    is called when there is something to say. *clock* gives seconds.
    """

    def __init__(
        self,
        breaker: UpstreamBreaker,
        quorum: int,
        *,
        there: Callable[[], bool],
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.breaker = breaker
        self._quorum = quorum
        self._there = there
        self._wake = wake
        self._clock = clock
        self._term = UNKNOWN
        self._own = False
        """Whether it is open because of what was seen here."""
        self._voted = False
        """Whether a vote of this instance counts, as far as it knows."""
        self._news: Literal["", "open", "closed"] = ""
        """What is to be said."""
        self._news_at = 0.0
        self._asks = False
        """Whether it is to be asked if a probe may go out."""
        self._ask_from = 0.0
        self._may_probe = False
        """Granted, and not yet made use of: however long that takes, as where there are few
        requests nobody would ever be in time."""
        self._applying = False
        """Whether the change that is heard of is one that others asked for."""
        breaker.add_listener(self._changed)
        breaker.may_probe = self.may_probe

    # --- What happens here ----------------------------------------------------------------------

    def may_probe(self) -> bool:
        """Tell whether a probe may go out from here; if not, have it asked."""
        if self._may_probe or not self._there():
            return True
        if not self._asks and self._clock() >= self._ask_from:
            self._asks = True
            self._wake()
        return False

    def _changed(self, change: BreakerChange) -> None:
        self._may_probe = False
        if self._applying or change.new == "half-open":
            return
        self._own = change.new == "open"
        self._news, self._news_at = change.new, self._clock()
        self._wake()

    def leave(self) -> None:
        """Let it be an ordinary breaker again."""
        self.breaker.remove_listener(self._changed)
        self.breaker.may_probe = lambda: True

    # --- What is said to others -----------------------------------------------------------------

    def ballot(self, *, due: bool) -> Ballot | None:
        """Take what is to be said; None for nothing. *due* says that it is time for a look."""
        says = self._says(due=due or self._term == UNKNOWN)
        if not says:
            return None
        news, self._news = self._news, ""
        self._asks = False
        breaker = self.breaker
        told = breaker.told()
        seconds = breaker.settings.reset_timeout if says == "probe" else _left_alone(told)
        reason = str(told["reason"]) if news else ""
        return Ballot(breaker.name, says, self._term, self._quorum, seconds, reason)

    def _says(self, *, due: bool) -> Says | None:
        state = self.breaker.state
        voting = self._own and state != "closed" and not self.breaker.held
        if self._news == "open" and voting:
            return "open"
        if self._news == "closed" and state == "closed" and self._is_news():
            return "closed"
        if self._asks and state == "open" and self._term != UNKNOWN:
            return "probe"
        if due or self._news or self._asks:
            return "stay" if voting else "look"
        return None

    def _is_news(self) -> bool:
        return self._clock() - self._news_at <= NEWS_FOR

    def unsaid(self, ballot: Ballot) -> None:
        """Learn that *ballot* did not get through."""
        if ballot.says in ("open", "closed") and not self._news:
            self._news = ballot.says

    # --- What others say ------------------------------------------------------------------------

    def answered(self, ballot: Ballot, standing: Standing) -> None:
        """Take what came of *ballot*."""
        missed = UNKNOWN < self._term < standing.term and ballot.says not in ("open", "closed")
        self._note_vote(ballot, is_older=ballot.term != standing.term)
        self._term = standing.term
        if ballot.says == "probe":
            self._may_probe = standing.granted and self.breaker.state == "open"
            self._ask_from = self._clock() + ASK_EVERY
        if self._news:
            return  # What has happened here since is about to be told.
        if standing.votes >= self._quorum:
            self._open(standing)
        elif missed:
            self._close(standing)

    def _note_vote(self, ballot: Ballot, *, is_older: bool) -> None:
        """Take note whether its own vote counts now, as ``scripts/breaker.lua`` has it."""
        match ballot.says:
            case "open":
                self._voted = True
            case "stay":
                self._voted = not is_older
            case "probe":
                self._voted = self._voted and not is_older
            case _:
                self._voted = False

    def heard(self, standing: Standing) -> None:
        """Take a message; one of an older term, or before the first answer, says nothing."""
        if self._news or not UNKNOWN < self._term <= standing.term:
            return
        newer, self._term = standing.term > self._term, standing.term
        self._voted = self._voted and not newer
        if standing.says == "closed":
            if newer:
                self._close(standing)
        elif standing.votes >= self._quorum:
            self._open(standing)

    def _open(self, standing: Standing) -> None:
        """
        Leave the ad server alone for as long as others do.

        Who has seen for itself why goes on saying that.
        """
        breaker = self.breaker
        state = breaker.state
        if state == "half-open":
            return
        told = breaker.told()
        if state == "open" and standing.seconds <= _left_alone(told):
            return
        self._own = self._own and state == "open"
        self._may_probe = False
        reason = str(told["reason"]) if self._own else self._seen_by_others(standing)
        with self._applied():
            breaker.open(reason, standing.seconds)

    def _seen_by_others(self, standing: Standing) -> str:
        others = standing.votes - self._voted
        who = "another instance" if others <= 1 else f"{others} instances"
        return f"seen by {who}: {standing.reason}"

    def _close(self, standing: Standing) -> None:
        if self.breaker.held:
            return
        self._own = self._may_probe = False
        with self._applied():
            self.breaker.close(f"seen by another instance: {standing.reason}")

    @contextmanager
    def _applied(self) -> Iterator[None]:
        self._applying = True
        try:
            yield
        finally:
            self._applying = False

    def __repr__(self) -> str:
        why = "own" if self._own else "others'"
        return f"<SharedBreaker {self.breaker.name} {self.breaker.state}, {why}>"


def _left_alone(told: dict[str, object]) -> float:
    """Give the seconds until a probe is due."""
    seconds = told["retry_in_seconds"]
    return seconds if isinstance(seconds, float) else 0.0


# --- All breakers --------------------------------------------------------------------------------


class Votes(Protocol):
    """Where instances tell each other about breakers."""

    async def cast(self, ballots: Sequence[Ballot]) -> list[Standing]:
        """Say *ballots*. Raises StateBackendError."""

    async def listen(
        self, heard: Callable[[Standing], None], began: Callable[[], None]
    ) -> NoReturn:
        """Tell of what others say. Raises StateBackendError."""


class BreakerBus:
    """Keeps the breakers that it is given like those of other instances, by *votes*."""

    def __init__(self, votes: Votes, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.there = False
        """Whether others can be asked."""
        self._votes = votes
        self._clock = clock
        self._shared: dict[str, SharedBreaker] = {}
        self._woken = asyncio.Event()
        self._wanted = asyncio.Event()
        """Set when there is a breaker to share: until then nobody is asked for anything."""
        self._problem = ""
        """Why others cannot be asked."""
        self._look_at = 0.0
        """When votes are read again."""
        self._tasks = Tasks("breakers")
        self._log = structlog.get_logger("vastproxy.upstream")

    def add(self, breaker: UpstreamBreaker, quorum: int) -> None:
        """Share *breaker*; what was shared under its name before is so no more."""
        old = self._shared.pop(breaker.name, None)
        if old is not None:
            old.leave()
        self._shared[breaker.name] = SharedBreaker(
            breaker,
            quorum,
            there=lambda: self.there,
            wake=self._woken.set,
            clock=self._clock,
        )
        self._wanted.set()
        self._woken.set()

    def remove(self, breaker: UpstreamBreaker) -> None:
        """Share *breaker* no more."""
        shared = self._shared.get(breaker.name)
        if shared is not None and shared.breaker is breaker:
            shared.leave()
            del self._shared[breaker.name]

    # --- Saying ---------------------------------------------------------------------------------

    async def _speak(self) -> None:
        try:
            await self._wanted.wait()
            while True:
                self._woken.clear()
                await self._say()
                await self._pause()
        finally:
            # Whatever ended this: nobody is kept from probing by a question that is never asked.
            self.there = False

    async def _pause(self) -> None:
        """Wait until there is something to say, or it is time for a look."""
        if self._problem:
            await asyncio.sleep(_about(AGAIN_AFTER))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._look_at - self._clock())):
                await self._woken.wait()

    async def _say(self) -> None:
        due = self._clock() >= self._look_at
        if due:
            self._look_at = self._clock() + SYNC_EVERY * random.uniform(0.9, 1.1)  # noqa: S311
        said = [
            (each, ballot)
            for each in self._shared.values()
            if (ballot := each.ballot(due=due)) is not None
        ]
        if not said:
            return
        try:
            standings = await self._votes.cast([ballot for _, ballot in said])
        except StateBackendError as error:
            self._goes_away(str(error))
            for each, ballot in said:
                each.unsaid(ballot)
            return
        self._is_back()
        for (each, ballot), standing in zip(said, standings, strict=True):
            each.answered(ballot, standing)

    def _goes_away(self, problem: str) -> None:
        self._look_at = 0.0
        if not self._problem:
            self._log.warning("sharing.away", problem=problem)
        self.there, self._problem = False, problem

    def _is_back(self) -> None:
        if self._problem:
            self._log.warning("sharing.back")
        self.there, self._problem = True, ""

    # --- Listening ------------------------------------------------------------------------------

    async def _listen(self) -> None:
        await self._wanted.wait()
        while True:
            try:
                await self._votes.listen(self._heard, self._look)
            except StateBackendError as error:
                self._log.debug("sharing.deaf", problem=str(error))
            # If the server has gone, those who speak shall know at once.
            self._look()
            await asyncio.sleep(_about(AGAIN_AFTER))

    def _heard(self, standing: Standing) -> None:
        shared = self._shared.get(standing.name)
        if shared is not None:
            shared.heard(standing)

    def _look(self) -> None:
        """Read the votes now: messages may have been lost."""
        self._look_at = 0.0
        self._woken.set()

    # --- Life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._tasks.spawn(self._speak(), "speak")
        self._tasks.spawn(self._listen(), "listen")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.__aexit__(None, None, None)
        for each in self._shared.values():
            each.leave()

    def __repr__(self) -> str:
        how = f"away: {self._problem}" if self._problem else "there" if self.there else "not asked"
        return f"<BreakerBus {how}, {list(self._shared.values())}>"


def _about(seconds: float) -> float:
    return seconds * random.uniform(1, 1.5)  # noqa: S311 - no secret


# --- All of it -----------------------------------------------------------------------------------


class RedisExtras:
    """
    What this instance has in common with others, in the Redis at *url*.

    *instance* is its name among them, None for a new one; *timeout* is how many seconds an ad
    request waits for Redis at the most.
    """

    def __init__(
        self,
        url: str,
        instance: str | None = None,
        *,
        timeout: float = 0.05,
        prefix: str = "vp:",
    ) -> None:
        self._servers = Servers(url)
        # Large answers shall not keep those waiting who ask for a turn.
        self._stores = Servers(url)
        self._timeout = timeout
        self._prefix = prefix
        self._tasks = Tasks("redis")
        self._rates: dict[str, SharedRate] = {}
        self._log = structlog.get_logger("vastproxy.upstream")
        name = instance or secrets.token_hex(8)
        self.breakers = BreakerBus(RedisVotes(self._servers, url, name, prefix=prefix))
        """Keeps breakers alike."""
        self._reach = Reach(
            "answers", self._stores, self._tasks, timeout=timeout, pause=STORE_PAUSE
        )
        self.store = RedisStore(self._reach, self._stores, prefix=prefix)
        """Keeps answers for all."""

    def rate(self, name: str, rate: float, burst: int) -> SharedRate:
        """Give the limiter *name*: *rate* calls a second of all instances, *burst* at once."""
        old = self._rates.get(name)
        if old is not None:
            if (old.rate, old.burst) == (rate, burst):
                return old
            old.close()
        limits = RateLimiter(rate, burst, max_keys=1)
        reach = Reach(f"rate of {name}", self._servers, self._tasks, timeout=self._timeout)
        turns = RedisTurns(reach, f"{self._prefix}r:{name}", limits.interval, burst)
        self._rates[name] = SharedRate(limits, turns, spawn=self._tasks.spawn)
        return self._rates[name]

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            for each in (self._stores, self._servers):
                opened.push_async_callback(each.close)
            await opened.enter_async_context(self._tasks)
            await self._open()
            await opened.enter_async_context(self.breakers)
            self._opened = opened.pop_all()
        return self

    async def _open(self) -> None:
        """Connect, and bring the scripts along, so that the first requests are in time."""
        scripts = [Script.load(each) for each in ("turns", "breaker")]
        load = [("SCRIPT", "LOAD", each.source) for each in scripts]
        try:
            async with asyncio.timeout(OPEN_WITHIN):
                await self._servers.everywhere([("PING",), *load])
                await self._stores.everywhere([("PING",)])
        except (TimeoutError, StateBackendError) as error:
            problem = str(error) or f"no answer in {OPEN_WITHIN:g} s"
            self._log.warning("sharing.not_yet", problem=problem)

    async def __aexit__(self, *_: object) -> None:
        self._reach.close()
        for each in self._rates.values():
            each.close()
        await self._opened.aclose()

    def __repr__(self) -> str:
        rates = list(self._rates.values())
        return f"<RedisExtras {self._servers!r}, {self.breakers!r}, {self.store!r}, {rates}>"
