"""
What an upstream's entry answered, kept for others: a cache for HTTP that knows of money.

Rule 1: there are two classes. A personal answer (scope ``viewer``) is kept for its viewer, and is
nobody else's; without a viewer nothing is kept. A shared one is for everybody, and nothing is
shared with who sends cookies.
Rule 2: who pays sells each impression once. An ad of a paid upstream, or one with a price, is never
given to a second viewer: neither from what is kept, nor to who waited for it. "No ad" may be.
Rule 3: what is kept is bytes. A hit is parsed and filled anew, capped and charged like any other
answer; the parsed document stays with who asked.
Rule 4: for the shared class, one asks and the others wait: never beyond their own deadline, and if
what came is not for sharing they ask for themselves at once, and for a while nobody waits.
Rule 5: "no ad" is kept for a short time, and never used when it is stale: then it says nothing.

How long an answer may be kept is decided in :mod:`vastproxy.upstream.freshness`; what it is, and
under which key, in :mod:`vastproxy.upstream.kept`.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cachetools import TLRUCache, TTLCache

from vastproxy.errors import (
    NoAdError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamTimeoutError,
    VastError,
)
from vastproxy.upstream.cache import Flights
from vastproxy.upstream.freshness import Lifetime, lifetime_of
from vastproxy.upstream.kept import (
    DEFAULT_IGNORED,
    Answer,
    Asking,
    CacheSettings,
    CacheVerdict,
    Facts,
    Word,
    decoded,
    encoded,
    facts_of_document,
    kept_form,
    key_of,
)

__all__ = [
    "DEFAULT_IGNORED",
    "Answer",
    "AnswerCache",
    "Asking",
    "CacheSettings",
    "CacheVerdict",
    "Facts",
    "SecondLevel",
    "facts_of_document",
    "key_of",
]

LARGEST_SHARE = 8
"""One answer may take so great a part of the room: an eighth."""

OVERHEAD = 1000
"""Bytes that an entry takes besides its body, its URL and its key, about."""

UNSHARED_SECONDS = 10.0
"""For so long nobody waits for others under a key whose answer was not for sharing."""

MAX_UNSHARED = 10_000
"""Keys of which that is remembered: about two megabytes."""

FORGET_SECONDS = 1.0
"""For so long the second level keeps the nothing that takes an answer's place."""


class SecondLevel(Protocol):
    """Where other instances find what this one was answered. None of its calls fails."""

    async def get(self, key: str) -> bytes | None:
        """Give what is kept under *key*; None for nothing, or where it cannot be asked now."""

    async def put(self, key: str, value: bytes, seconds: float) -> None:
        """Keep *value* under *key* for some *seconds*."""


Ask = Callable[[], Awaitable[Answer]]
Found = tuple[Answer, CacheVerdict]
Spawn = Callable[[Coroutine[Any, Any, None], str], object]


@dataclass(frozen=True, slots=True)
class _Entry:
    """An answer that is kept."""

    answer: Answer
    lifetime: Lifetime
    fetched: float
    """When it was asked for, on the cache's clock: it is no younger than that."""
    size: int

    @property
    def ends(self) -> float:
        return self.fetched + self.lifetime.whole


@dataclass(frozen=True, slots=True)
class _Landed:
    """What came of a request, for those who wait for it."""

    answer: Answer
    """Without what is only for who asked."""
    verdict: CacheVerdict
    """Of who asked."""
    is_for_others: bool


@dataclass(eq=False, slots=True)
class _Call:
    """One request to the cache."""

    key: str
    ask: Ask
    refresh: Ask
    spawn: Spawn
    own: Answer | None = None
    """What it was answered itself, whole."""


class AnswerCache:
    """
    Keeps what the entry of upstream *name* answered.

    *clock* gives seconds and only goes forward, *now* gives Unix seconds; *second* is asked for
    what is not here; *spawn* starts what nobody waits for; *heard* is told of each verdict.
    """

    def __init__(  # noqa: PLR0913 - all of them what a cache is made of
        self,
        name: str,
        settings: CacheSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        second: SecondLevel | None = None,
        spawn: Spawn,
        heard: Callable[[CacheVerdict], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.settings = settings
        self._clock = clock
        self._now = now
        self._second = second if settings.redis else None
        self._spawn = spawn
        self._heard = heard
        self._kept: TLRUCache[str, _Entry] = TLRUCache(
            settings.max_bytes, _last_use, timer=clock, getsizeof=_size
        )
        self._unshared: TTLCache[str, str] = TTLCache(MAX_UNSHARED, UNSHARED_SECONDS, timer=clock)
        self._flights = Flights[_Landed]()
        self._refreshing: set[str] = set()
        self._cleared = 0
        self._words: Counter[Word] = Counter()
        self._not_stored: Counter[str] = Counter()
        self._stored = self._failed = 0
        # Of a paid upstream hardly anything is for others: to wait for it would cost time only.
        self._waits = settings.is_shared and not settings.paid

    async def through(
        self, asking: Asking, ask: Ask, refresh: Ask, spawn: Spawn | None = None
    ) -> Found:
        """
        Give what is kept for *asking*, or what *ask* gives; and say which.

        *refresh* asks as well, but in the background, started by *spawn* (None: the cache's own).
        What *ask* raises is raised, unless a stale answer may stand in; UpstreamTimeoutError where
        waiting for another took too long.
        """
        if reason := self._bypassed(asking):
            found = await ask(), CacheVerdict("bypass", reason=reason)
        else:
            key = key_of(self.name, self.settings, asking)
            call = _Call(key, ask, refresh, spawn or self._spawn)
            found = await self._given(call, asking.deadline)
        self._words[found[1].word] += 1
        self._heard(found[1])
        return found

    def _bypassed(self, asking: Asking) -> str:
        """Say why *asking* has nothing to do with this cache; empty where it has."""
        if self.settings.is_shared:
            return "cookies" if asking.has_cookies else ""
        return "" if asking.viewer else "no viewer"

    async def _given(self, call: _Call, deadline: float) -> Found:
        try:
            return await self._answered(call, deadline)
        except (UpstreamError, VastError) as error:
            self._failed += 1
            stale = self._standing_in(call.key, error)
            if stale is None:
                raise
            return stale

    async def _answered(self, call: _Call, deadline: float) -> Found:
        """Give what is kept, what another is asking for, or what asking gives."""
        while True:
            if (found := self._look(call)) is not None:
                return found
            if not self._waits or call.key in self._unshared:
                return await self._alone(call)
            if self._flights.under_way(call.key) is None:
                landed = await self._flights.lead(call.key, lambda: self._fetch(call))
                return call.own or landed.answer, landed.verdict
            others = await self._wait_landed(call.key, deadline)
            if others is not None and others.is_for_others:
                return others.answer, _of_follower(others.verdict)
            if others is not None:
                return await self._alone(call)

    def _look(self, call: _Call) -> Found | None:
        """Give what is kept, if it may be given as it is; where it is stale, have it refreshed."""
        entry = self._entry(call.key)
        if entry is None:
            return None
        age = self._clock() - entry.fetched
        left = entry.lifetime.ttl - age
        if left > 0:
            return entry.answer, CacheVerdict("hit", age=age, ttl=left)
        if left + entry.lifetime.stale_while_revalidate <= 0:
            return None
        self._start_refresh(call)
        return entry.answer, CacheVerdict("stale", age=age, ttl=left, reason="revalidating")

    def _standing_in(self, key: str, error: UpstreamError | VastError) -> Found | None:
        """Give what is kept, if it may be given although stale, because of *error*."""
        entry = self._entry(key)
        if entry is None or isinstance(error, NoAdError):
            return None
        age = self._clock() - entry.fetched
        left = entry.lifetime.ttl - age
        if left > 0:  # another was luckier meanwhile
            return entry.answer, CacheVerdict("hit", age=age, ttl=left)
        if left + entry.lifetime.stale_if_error <= 0:
            return None
        reason = f"upstream failed: {error}"
        # Without its traceback, whose frames have this request's documents.
        told = error.with_traceback(None)
        return entry.answer, CacheVerdict("stale", age=age, ttl=left, reason=reason, error=told)

    def _entry(self, key: str) -> _Entry | None:
        entry = self._kept.get(key)
        return entry if entry is not None and not self._is_sold(entry.answer.facts) else None

    def _is_sold(self, facts: Facts) -> bool:
        """Whether an answer belongs to one viewer, and under a key of this cache is for several."""
        return self.settings.is_shared and facts.filled and (self.settings.paid or facts.priced)

    async def _wait_landed(self, key: str, deadline: float) -> _Landed | None:
        """
        Wait until *deadline* for what another is asking for; None where it says nothing to others.

        Raises what he was told, or UpstreamTimeoutError.
        """
        left = deadline - asyncio.get_running_loop().time()
        flight = self._flights.under_way(key)
        if flight is None:
            return None
        try:
            await asyncio.wait([flight], timeout=None if left == math.inf else max(0.0, left))
            if not flight.done():
                reason = "another request for the same was not answered before the deadline"
                raise UpstreamTimeoutError(reason, starved=True)
            # He went away, or had less time than there was: one of those who waited asks.
            if flight.cancelled() or _is_his_own(flight.exception()):
                return None
            return flight.result()
        finally:
            del flight  # what it may hold has a traceback, and that has this frame

    # --- Asking -------------------------------------------------------------------------------

    async def _alone(self, call: _Call) -> Found:
        """Ask, and wait for nobody."""
        landed = await self._fetch(call)
        verdict = landed.verdict
        if self.settings.is_shared and verdict.word == "miss" and not verdict.stored:
            verdict = replace(verdict, word="pass")
        return call.own or landed.answer, verdict

    async def _fetch(self, call: _Call) -> _Landed:
        """Look into the second level, and ask."""
        if self._second is not None and call.key not in self._unshared:
            await self._recall(call.key, self._second)
            if (found := self._look(call)) is not None:
                return _Landed(*found, is_for_others=True)
        return await self._asked(call)

    async def _asked(self, call: _Call) -> _Landed:
        began, cleared = self._clock(), self._cleared
        outdated = call.key in self._kept
        call.own = await call.ask()
        kept = kept_form(call.own)
        lifetime = self._lifetime(call.own)
        if isinstance(lifetime, str):
            self._not_kept(call.key, lifetime)
            verdict = CacheVerdict("miss", reason=lifetime, outdated=outdated)
            return _Landed(kept, verdict, is_for_others=False)
        self._unshared.pop(call.key, None)
        entry = _Entry(kept, lifetime, began, _size_of(call.key, kept))
        reason = "cleared" if cleared != self._cleared else self._store(call.key, entry)
        verdict = CacheVerdict(
            "miss", stored=not reason, ttl=lifetime.ttl, reason=reason, outdated=outdated
        )
        return _Landed(kept, verdict, is_for_others=reason != "ttl")

    def _lifetime(self, answer: Answer) -> Lifetime | str:
        """Give how long *answer* may be kept; or, in a word, why it may not be."""
        facts = answer.facts
        fetched = answer.fetched
        if fetched.set_cookies:
            return "set-cookie"
        if self.settings.is_shared and fetched.sent_cookies:
            return "cookies"
        if self._is_sold(facts):
            return "paid"
        limits = self.settings.limits(filled=facts.filled, expires=facts.expires)
        for each in fetched.on_the_way:
            lifetime = lifetime_of(each, limits, self._now(), redirect=True)
            if isinstance(lifetime, str):
                return lifetime
            limits = replace(
                limits,
                ttl=lifetime.ttl,
                stale_while_revalidate=lifetime.stale_while_revalidate,
                stale_if_error=lifetime.stale_if_error,
            )
        return lifetime_of(fetched.reply, limits, self._now())

    def _store(self, key: str, entry: _Entry) -> str:
        """Keep *entry*; give why not, or nothing."""
        if self._clock() >= entry.ends:
            self._not_kept(key, "ttl")
            return "ttl"
        if entry.size * LARGEST_SHARE > self.settings.max_bytes:
            self._drop(key)
            self._not_stored["size"] += 1
            return "size"
        self._kept[key] = entry
        self._stored += 1
        if self._second is not None:
            age = self._clock() - entry.fetched
            value = encoded(entry.answer, entry.lifetime, self._now() - age)
            self._put(self._second, key, value, entry.lifetime.whole - age)
        return ""

    def _not_kept(self, key: str, reason: str) -> None:
        """Take note that what comes under *key* is not to be kept: what is there is outdated."""
        self._drop(key)
        self._not_stored[reason] += 1
        if self.settings.is_shared:
            self._unshared[key] = reason

    def _drop(self, key: str) -> None:
        if self._kept.pop(key, None) is not None and self._second is not None:
            # Else it would come back from there, and be used when it is stale.
            self._put(self._second, key, b"", FORGET_SECONDS)

    # --- In the background ----------------------------------------------------------------------

    def _start_refresh(self, call: _Call) -> None:
        """Have the answer of *call* fetched anew, unless that is being done."""
        if call.key not in self._refreshing:
            self._refreshing.add(call.key)
            call.spawn(self._refreshed(call), f"refresh {self.name}")

    async def _refreshed(self, call: _Call) -> None:
        again = _Call(call.key, call.refresh, call.refresh, call.spawn)
        try:
            if not self._waits:
                await self._asked(again)
            elif self._flights.under_way(call.key) is None:
                # Who comes when even the stale answer is too old waits for this one.
                await self._flights.lead(call.key, lambda: self._asked(again))
        except (UpstreamError, VastError):
            self._failed += 1
        finally:
            self._refreshing.discard(call.key)

    def _put(self, second: SecondLevel, key: str, value: bytes, seconds: float) -> None:
        self._spawn(second.put(key, value, seconds), f"second level of {self.name}")

    async def _recall(self, key: str, second: SecondLevel) -> None:
        """Take what the second level has under *key*, as far as it is of any use."""
        cleared = self._cleared
        value = await second.get(key)
        recalled = decoded(value, self._now()) if value else None
        if recalled is None or cleared != self._cleared:
            return
        answer, lifetime, age = recalled
        limits = self.settings.limits(filled=answer.facts.filled)
        size = _size_of(key, answer)
        entry = _Entry(answer, lifetime.within(limits), self._clock() - age, size)
        fits = size * LARGEST_SHARE <= self.settings.max_bytes
        known = self._kept.get(key)
        newer = known is None or known.fetched < entry.fetched
        if fits and newer and age < entry.lifetime.whole and not self._is_sold(answer.facts):
            self._kept[key] = entry

    # --- For people -----------------------------------------------------------------------------

    def told(self) -> dict[str, object]:
        """Say what is in it, and what it did."""
        words = self._words
        return {
            "entries": len(self._kept),
            "bytes": int(self._kept.currsize),
            "max_bytes": self.settings.max_bytes,
            "hits": words["hit"],
            "stale": words["stale"],
            "misses": words["miss"],
            "collapsed": words["collapsed"],
            "passed": words["pass"],
            "bypassed": words["bypass"],
            "failed": self._failed,
            "stored": self._stored,
            "not_stored": dict(self._not_stored),
        }

    def clear(self) -> None:
        """Forget everything here, and do not keep what is being fetched just now."""
        self._kept.clear()
        self._unshared.clear()
        self._flights.clear()
        self._cleared += 1

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        sold = "paid" if self.settings.paid else "unpaid"
        return (
            f"<AnswerCache {self.name}, {self.settings.scope}, {sold}, {len(self)} answers, "
            f"{int(self._kept.currsize)} of {self.settings.max_bytes} bytes, "
            f"hits: {self._words['hit']}, misses: {self._words['miss']}>"
        )


def _of_follower(verdict: CacheVerdict) -> CacheVerdict:
    """Give the verdict of who waited for one that got *verdict*."""
    if verdict.word in ("hit", "stale"):
        return verdict
    return CacheVerdict("collapsed", ttl=verdict.ttl)


def _is_his_own(error: BaseException | None) -> bool:
    """Whether *error* says nothing to others: there was no time for him, or nothing to ask with."""
    if isinstance(error, UpstreamConnectError):
        return error.local
    return isinstance(error, UpstreamTimeoutError) and error.starved


def _last_use(_: str, entry: _Entry, now: float) -> float:
    # What has ended already is not taken by cachetools, which time may make of any.
    return max(entry.ends, math.nextafter(now, math.inf))


def _size(entry: _Entry) -> int:
    return entry.size


def _size_of(key: str, answer: Answer) -> int:
    return OVERHEAD + len(key) + len(answer.fetched.url) + len(answer.fetched.reply.body)
