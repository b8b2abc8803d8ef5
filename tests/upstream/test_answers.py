"""A cache of what an upstream's entry answers: who may have what, for how long, and who waits."""

import asyncio
import gc
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vastproxy.errors import (
    NoAdError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamStatusError,
    UpstreamTimeoutError,
    VastError,
    VastSyntaxError,
)
from vastproxy.model import HopReply
from vastproxy.observe.tasks import Tasks
from vastproxy.session.session import Fetched
from vastproxy.upstream.answers import (
    UNSHARED_SECONDS,
    Answer,
    AnswerCache,
    Asking,
    CacheSettings,
    CacheVerdict,
    Facts,
)
from vastproxy.upstream.kept import CLOCK_TOLERANCE

URL = "https://ads.example/vast"
ANN, BOB = Asking(URL, "ann"), Asking(URL, "bob")
SHARED = CacheSettings(scope="shared")
PERSONAL = CacheSettings(scope="viewer")
PAID = CacheSettings(scope="shared", paid=True)
AN_AD = Facts(filled=True, priced=False, expires=None)
A_PRICED_AD = Facts(filled=True, priced=True, expires=None)
NO_AD = Facts(filled=False, priced=False, expires=None)


def an_answer(
    body: str = "ad", facts: Facts = AN_AD, *headers: tuple[str, str], cookies: bool = False
) -> Answer:
    """Build an answer of an ad server, as who asked gets it."""
    reply = HopReply(200, headers, body.encode())
    return Answer(Fetched(reply, URL, set_cookies=cookies), facts, object())


class Source:
    """An ad server: gives one answer after the other when it is *open*; the last for ever."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers = list(answers)
        self.count = 0
        self.open = asyncio.Event()
        self.asked = asyncio.Event()

    async def ask(self) -> Answer:
        """Give the next answer, or raise it."""
        self.count += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.asked.set()
        await self.open.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


def a_source(*answers: Answer | Exception) -> Source:
    """Build an ad server that answers at once."""
    source = Source(*answers)
    source.open.set()
    return source


@dataclass
class Store:
    """A second level: forgets by the clock of the test."""

    clock: Callable[[], float]
    kept: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    asked: int = 0

    async def get(self, key: str) -> bytes | None:
        """Give what is kept."""
        self.asked += 1
        await asyncio.sleep(0)
        value, ends = self.kept.get(key, (None, 0.0))
        return value if self.clock() < ends else None

    async def put(self, key: str, value: bytes, seconds: float) -> None:
        """Keep it."""
        await asyncio.sleep(0)
        self.kept[key] = value, self.clock() + seconds


class Bench:
    """What the tests turn: a clock, and what runs in the background."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.time = 1000.0
        self.skew = 0.0
        """Of the wall clock of what is made next."""
        self.store = Store(self.clock)

    def clock(self) -> float:
        """Give the time."""
        return self.time

    def cache(self, settings: CacheSettings = SHARED) -> AnswerCache:
        """Make a cache."""
        skew = self.skew
        return AnswerCache(
            "house",
            settings,
            clock=self.clock,
            now=lambda: 1e9 + self.time + skew,
            second=self.store,
            spawn=self.tasks.spawn,
        )

    async def idle(self) -> None:
        """Wait until nothing runs in the background."""
        async with asyncio.timeout(5):
            while len(self.tasks):  # one may have started another
                await self.tasks.wait_idle(1)
                await asyncio.sleep(0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """Give a bench; nothing is left running behind it."""
    async with Tasks("test") as tasks:
        yield Bench(tasks)


async def told(
    cache: AnswerCache, source: Source, asking: Asking = ANN, *, refresh: Source | None = None
) -> tuple[str, str]:
    """Ask once; give the body of the answer, and the cache's words."""
    answer, verdict = await cache.through(asking, source.ask, (refresh or source).ask)
    return answer.fetched.reply.body.decode(), verdict.words


# --- What is kept, and for how long -----------------------------------------------------------


async def test_answer_is_kept_until_its_time_is_over(bench: Bench) -> None:
    """What was asked for once is given until its time is over; a verdict says how long it is."""
    cache, source = bench.cache(), a_source(an_answer("one"), an_answer("two"))
    assert ("one", "miss, stored") == await told(cache, source)
    bench.time += 299
    answer, verdict = await cache.through(BOB, source.ask, source.ask)
    assert CacheVerdict("hit", age=299, ttl=1) == verdict
    assert b"one" == answer.fetched.reply.body
    bench.time += 20

    assert ("two", "miss, stored") == await told(cache, source)
    assert 2 == source.count


async def test_parsed_document_stays_with_who_asked(bench: Bench) -> None:
    """Who asked gets the answer whole; from the cache there are bytes alone."""
    cache, source = bench.cache(), a_source(an_answer("one", AN_AD, ("x-a", "b")))
    first, _ = await cache.through(ANN, source.ask, source.ask)
    second, _ = await cache.through(ANN, source.ask, source.ask)

    assert first is source.answers[0]
    assert (None, ()) == (second.live, second.fetched.reply.headers)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (an_answer(cookies=True), "set-cookie"),
        (an_answer("ad", AN_AD, ("set-cookie", "a=b")), "set-cookie"),
        (an_answer("ad", AN_AD, ("cache-control", "private")), "private"),
        (an_answer("ad", AN_AD, ("vary", "User-Agent")), "vary"),
        (an_answer("ad", replace(AN_AD, expires=0.0)), "ttl"),
    ],
)
@pytest.mark.parametrize("settings", [SHARED, PERSONAL])
async def test_what_may_not_be_kept_is_not(
    bench: Bench, answer: Answer, reason: str, settings: CacheSettings
) -> None:
    """What forbids to be kept is asked for each time, and the verdict says why."""
    cache, source = bench.cache(settings), a_source(answer)

    assert ("ad", f"miss ({reason})") == await told(cache, source)
    assert reason in (await told(cache, source))[1]
    assert (2, 0) == (source.count, len(cache))
    assert {reason: 2} == cache.told()["not_stored"]


def redirected(*headers: tuple[str, str], sent_cookies: bool = False) -> Answer:
    """Build an answer that a redirect with *headers* led to."""
    redirect = HopReply(302, (("location", "/b"), *headers), b"")
    plain = HopReply(200, (), b"ad")
    fetched = Fetched(plain, URL, sent_cookies=sent_cookies, on_the_way=(redirect,))
    return Answer(fetched, AN_AD, object())


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (("cache-control", "no-store"), "no-store"),
        (("cache-control", "private"), "private"),
        (("cache-control", "no-cache"), "no-cache"),
        (("pragma", "no-cache"), "no-cache"),
        (("vary", "*"), "vary"),
        (("vary", "Cookie"), "vary"),
        (("cache-control", "max-age=0"), "ttl"),
        (("set-cookie", "uid=1"), "set-cookie"),
    ],
)
@pytest.mark.parametrize("settings", [SHARED, PERSONAL])
async def test_redirect_may_forbid_to_keep(
    bench: Bench, header: tuple[str, str], reason: str, settings: CacheSettings
) -> None:
    """What a redirect forbids holds for what it led to: who else comes may be led elsewhere."""
    cache, source = bench.cache(settings), a_source(redirected(header))

    assert ("ad", f"miss ({reason})") == await told(cache, source)
    assert 0 == len(cache)


async def test_redirect_may_shorten(bench: Bench) -> None:
    """What a redirect led to is kept no longer than the redirect may be, stale or not."""
    header = ("cache-control", "max-age=60, stale-while-revalidate=5, stale-if-error=0")
    cache, source = bench.cache(), a_source(redirected(header))
    _, verdict = await cache.through(ANN, source.ask, source.ask)
    bench.time += 59.5
    fresh = await told(cache, source)
    bench.time += 5.4
    stale = await told(cache, a_source(UpstreamStatusError(500)))
    await bench.idle()
    bench.time += 0.2

    assert (True, 60) == (verdict.stored, verdict.ttl)
    assert ["hit", "stale (revalidating)"] == [fresh[1], stale[1]]
    with pytest.raises(UpstreamStatusError):
        await told(cache, a_source(UpstreamStatusError(500)))


async def test_redirect_without_a_word_is_no_obstacle(bench: Bench) -> None:
    """A redirect that says nothing leaves the time to the answer and the operator."""
    cache, source = bench.cache(), a_source(redirected())
    _, verdict = await cache.through(ANN, source.ask, source.ask)

    assert CacheVerdict("miss", stored=True, ttl=300) == verdict


async def test_what_somebodys_cookie_led_to_is_his(bench: Bench) -> None:
    """Where a redirect's target was sent a cookie, nobody else is given what it answered."""
    answer = redirected(sent_cookies=True)
    shared, source = bench.cache(), Source(answer)

    assert 10 == sum(words(await crowd(shared, source, 10)).values())
    assert (10, 0) == (source.count, len(shared))
    assert {"cookies": 10} == shared.told()["not_stored"]

    personal, source = bench.cache(PERSONAL), a_source(answer)
    assert ("ad", "miss, stored") == await told(personal, source)
    assert ("ad", "hit") == await told(personal, source)
    assert "miss, stored" == (await told(personal, source, BOB))[1]


async def test_expired_ads_are_not_even_given_stale(bench: Bench) -> None:
    """When an ad's ``<Expires>`` is over, counted from the request, a failure is a failure."""
    answer = an_answer("one", replace(AN_AD, expires=60.0))
    cache, source = bench.cache(), a_source(answer, UpstreamStatusError(500))
    await told(cache, source)
    bench.time += 59.5
    assert ("one", "hit") == await told(cache, source)
    bench.time += 1
    with pytest.raises(UpstreamStatusError):
        await told(cache, source)

    assert 2 == source.count


async def test_time_counts_from_the_request(bench: Bench) -> None:
    """An answer that took long is so much older when it comes."""

    async def slow() -> Answer:
        """Take some time."""
        bench.time += 100
        return an_answer()

    cache = bench.cache()
    await cache.through(ANN, slow, slow)
    bench.time += 1
    _, verdict = await cache.through(ANN, slow, slow)

    assert CacheVerdict("hit", age=101, ttl=199) == verdict


async def test_no_ad_is_kept_for_a_moment(bench: Bench) -> None:
    """That there is no ad is kept for its own short time, and not used when that is over."""
    cache = bench.cache()
    source = a_source(an_answer("none", NO_AD), UpstreamStatusError(500))
    assert ("none", "miss, stored") == await told(cache, source)
    bench.time += 4.9
    assert ("none", "hit") == await told(cache, source)
    bench.time += 0.2

    with pytest.raises(UpstreamStatusError):
        await told(cache, source)


async def test_keeping_no_ad_may_be_switched_off(bench: Bench) -> None:
    """With a time of 0, "no ad" is not kept."""
    cache = bench.cache(replace(SHARED, no_fill_ttl=0))

    assert ("none", "miss (ttl)") == await told(cache, a_source(an_answer("none", NO_AD)))


async def test_what_is_no_longer_to_be_kept_is_forgotten(bench: Bench) -> None:
    """An answer that may not be kept takes the place of the one before: that one is outdated."""
    answers = (an_answer("one"), an_answer("two", cookies=True), UpstreamStatusError(500))
    cache, source = bench.cache(replace(SHARED, redis=True)), a_source(*answers)
    await told(cache, source)
    bench.time += 320
    assert ("two", "miss (set-cookie)") == await told(cache, source)
    await bench.idle()
    bench.time += UNSHARED_SECONDS

    with pytest.raises(UpstreamStatusError):
        await told(cache, source)


async def test_cache_is_bounded_in_bytes(bench: Bench) -> None:
    """What was longest unused goes first; what takes more than an eighth is given, not kept."""
    cache = bench.cache(replace(SHARED, max_bytes=80_000))
    source = a_source(an_answer("x" * 8000))
    urls = [Asking(f"{URL}?{number}") for number in range(20)]
    for asking in urls:
        await told(cache, source, asking)
        await told(cache, source, urls[0])
    large = an_answer("x" * 10_000)

    assert "miss (size)" == (await told(cache, a_source(large), Asking(f"{URL}?large")))[1]
    assert 8 == len(cache)
    assert 72_000 < int(cache.told()["bytes"]) <= 80_000  # type: ignore[call-overload]
    assert "hit" == (await told(cache, source, urls[0]))[1]
    assert "miss, stored" == (await told(cache, source, urls[1]))[1]


# --- For whom -----------------------------------------------------------------------------------


async def test_personal_answer_is_its_viewers(bench: Bench) -> None:
    """In the class of viewers, each has an answer of his own; who is not known has none."""
    cache = bench.cache(PERSONAL)
    source = a_source(*(an_answer(each, A_PRICED_AD) for each in "abcd"))

    assert ("a", "miss, stored") == await told(cache, source, ANN)
    assert ("b", "miss, stored") == await told(cache, source, BOB)
    assert ("c", "bypass (no viewer)") == await told(cache, source, Asking(URL))
    assert ("d", "bypass (no viewer)") == await told(cache, source, Asking(URL))
    assert ("a", "hit") == await told(cache, source, ANN)


async def test_nothing_is_shared_with_who_sends_cookies(bench: Bench) -> None:
    """A request with cookies gets an answer of its own, and nobody else gets that."""
    cache, source = bench.cache(), a_source(an_answer("one"), an_answer("two"), an_answer("three"))
    known = replace(ANN, has_cookies=True)

    assert ("one", "bypass (cookies)") == await told(cache, source, known)
    assert ("two", "miss, stored") == await told(cache, source)
    assert ("three", "bypass (cookies)") == await told(cache, source, known)


@pytest.mark.parametrize(
    ("settings", "facts", "first"),
    [(PAID, AN_AD, "pass (paid)"), (SHARED, A_PRICED_AD, "miss (paid)")],
)
async def test_sold_ad_is_given_once(
    bench: Bench, settings: CacheSettings, facts: Facts, first: str
) -> None:
    """An ad that is paid for is kept for nobody, whether the operator or the ad says so."""
    cache, source = bench.cache(settings), a_source(*(an_answer(each, facts) for each in "abc"))

    assert ("a", first) == await told(cache, source, ANN)
    assert ("b", "pass (paid)") == await told(cache, source, BOB)
    assert ("c", "pass (paid)") == await told(cache, source, ANN)


async def test_no_ad_of_a_paid_upstream_is_for_everybody(bench: Bench) -> None:
    """Where nothing was sold, the answer may be shared."""
    cache, source = bench.cache(PAID), a_source(an_answer("none", NO_AD))

    assert ("none", "miss, stored") == await told(cache, source, ANN)
    assert ("none", "hit") == await told(cache, source, BOB)


# --- One asks, the others wait ------------------------------------------------------------------


Result = tuple[Answer, CacheVerdict] | UpstreamError | VastError


async def crowd(
    cache: AnswerCache, source: Source, viewers: int, *, open_after: bool = True
) -> list[Result]:
    """Ask for so many viewers at the same time; give what each gets."""

    async def one(number: int) -> Result:
        """Ask for one viewer."""
        try:
            return await cache.through(Asking(URL, f"viewer {number}"), source.ask, source.ask)
        except (UpstreamError, VastError) as error:
            return error

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(viewers)]
        await asyncio.sleep(0)
        await source.asked.wait()
        if open_after:
            source.open.set()
    return [each.result() for each in tasks]


def words(results: list[Result]) -> dict[str, int]:
    """Count what the cache said; of failures, the error."""
    counts: dict[str, int] = defaultdict(int)
    for each in results:
        counts[each[1].words if isinstance(each, tuple) else str(each)] += 1
    return dict(counts)


async def test_crowd_makes_one_request(bench: Bench) -> None:
    """A thousand who ask for the same at the same time make one request, with one document."""
    cache, source = bench.cache(), Source(an_answer("one"))
    results = await crowd(cache, source, 1000)

    assert {"miss, stored": 1, "collapsed": 999} == words(results)
    assert 1 == source.count
    assert {b"one"} == {each[0].fetched.reply.body for each in results if isinstance(each, tuple)}
    assert 1 == sum(isinstance(each, tuple) and each[0].live is not None for each in results)
    assert 0 == len(cache._flights)


async def test_crowd_of_viewers_makes_a_request_each(bench: Bench) -> None:
    """In the class of viewers nobody waits for another, not even for his own other request."""
    cache, source = bench.cache(PERSONAL), Source(an_answer())
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(told(cache, source, ANN))
        await source.asked.wait()
        source.open.set()

    assert 5 == source.count


async def test_crowd_at_a_paid_upstream_does_not_wait(bench: Bench) -> None:
    """Nearly all that a paid upstream answers is for one viewer: each asks at once."""
    cache, source = bench.cache(PAID), Source(*(an_answer(f"{each}") for each in range(51)))
    results = await crowd(cache, source, 50)

    assert {"pass (paid)": 50} == words(results)
    assert 50 == len({each[0].fetched.reply.body for each in results if isinstance(each, tuple)})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (an_answer("ad", A_PRICED_AD), "paid"),
        (an_answer(cookies=True), "set-cookie"),
        (an_answer("ad", AN_AD, ("cache-control", "private")), "private"),
        (an_answer("ad", AN_AD, ("cache-control", "max-age=0")), "ttl"),
    ],
)
async def test_who_waited_for_what_is_not_his_asks_himself(
    bench: Bench, answer: Answer, reason: str
) -> None:
    """If what came is not for sharing all who waited ask at once, and then nobody waits."""
    cache, source = bench.cache(), Source(answer)
    assert {f"miss ({reason})": 1, f"pass ({reason})": 99} == words(await crowd(cache, source, 100))
    source.open.clear()
    source.asked.clear()
    assert {f"pass ({reason})": 100} == words(await crowd(cache, source, 100))
    assert 200 == source.count
    bench.time += UNSHARED_SECONDS
    source.open.clear()
    source.asked.clear()

    assert 1 == words(await crowd(cache, source, 100))[f"miss ({reason})"]


async def test_waiting_begins_anew_when_an_answer_may_be_kept(bench: Bench) -> None:
    """The first answer that may be kept ends the time in which nobody waits."""
    answers = (an_answer(cookies=True), an_answer("one"), an_answer("two"))
    cache, source = bench.cache(), a_source(*answers)
    assert "miss (set-cookie)" == (await told(cache, source))[1]
    assert "miss, stored" == (await told(cache, source))[1]
    assert "hit" == (await told(cache, source))[1]
    bench.time += 320
    source.open.clear()
    source.asked.clear()

    assert {"miss, stored": 1, "collapsed": 9} == words(await crowd(cache, source, 10))


async def test_what_is_too_large_to_keep_is_shared_with_who_waits(bench: Bench) -> None:
    """Room is no reason to ask again for those who wait already."""
    cache, source = bench.cache(replace(SHARED, max_bytes=8000)), Source(an_answer("x" * 5000))

    assert {"miss (size)": 1, "collapsed": 9} == words(await crowd(cache, source, 10))


async def test_failure_is_told_to_all_who_wait(bench: Bench) -> None:
    """Where asking fails, those who waited are told the same, and the next one asks again."""
    cache, source = bench.cache(), Source(UpstreamStatusError(503), an_answer("one"))

    assert {"HTTP status 503": 1000} == words(await crowd(cache, source, 1000))
    assert 1 == source.count
    assert ("one", "miss, stored") == await told(cache, source)


async def test_failure_without_others_is_not_complained_of(bench: Bench) -> None:
    """A failure that nobody waited for is raised to who asked, and leaves nothing behind."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: complaints.append(each))
    cache, source = bench.cache(), a_source(UpstreamStatusError(503))
    with pytest.raises(UpstreamStatusError):
        await told(cache, source)
    gc.collect()

    assert [] == complaints


async def test_who_waits_takes_over(bench: Bench) -> None:
    """Where the one who asks goes away, one of those who wait asks in his place."""
    cache, source = bench.cache(), Source(an_answer("one"))
    async with asyncio.TaskGroup() as group:
        first = group.create_task(told(cache, source))
        await source.asked.wait()
        others = [group.create_task(told(cache, source)) for _ in range(100)]
        await asyncio.sleep(0)
        first.cancel()
        others[0].cancel()
        others[50].cancel()
        source.asked.clear()
        await source.asked.wait()
        source.open.set()

    left = [each.result()[1] for each in others if not each.cancelled()]
    assert ["miss, stored"] + ["collapsed"] * 97 == left
    assert 2 == source.count


async def test_who_had_less_time_takes_nobody_along(bench: Bench) -> None:
    """That the time of the one who asks was over says nothing to those with more."""
    late = UpstreamTimeoutError("no answer before the deadline", starved=True)
    cache, source = bench.cache(), Source(late, an_answer("one"))

    # The second answer comes at once, so that it is there when the others look.
    expected = {str(late): 1, "miss, stored": 1, "hit": 8}
    assert expected == words(await crowd(cache, source, 10))
    assert 2 == source.count


async def test_who_could_not_ask_takes_nobody_along(bench: Bench) -> None:
    """That the one who asks had no connections says nothing to others; a dead server does."""
    here = UpstreamConnectError("the proxy closes its connections", local=True)
    cache, source = bench.cache(), Source(here, an_answer("one"))

    expected = {str(here): 1, "miss, stored": 1, "hit": 8}
    assert expected == words(await crowd(cache, source, 10))
    assert 2 == source.count

    dead = UpstreamConnectError("connection refused")
    cache, source = bench.cache(), Source(dead, an_answer("one"))
    assert {str(dead): 10} == words(await crowd(cache, source, 10))


async def test_nobody_waits_beyond_his_deadline(bench: Bench) -> None:
    """Who waits gives up at his own deadline; the one who asks, and others, go on."""
    cache, source = bench.cache(), Source(an_answer("one"))
    now = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(told(cache, source))
        await source.asked.wait()
        patient = group.create_task(told(cache, source))
        with pytest.raises(UpstreamTimeoutError) as raised:
            await told(cache, source, replace(BOB, deadline=now + 0.02))
        waited = asyncio.get_running_loop().time() - now
        source.open.set()

    assert raised.value.starved
    assert 0.02 <= waited < 1
    assert ["miss, stored", "collapsed"] == [each.result()[1] for each in (first, patient)]


async def test_mistake_of_the_program_is_told_to_all(bench: Bench) -> None:
    """An error that is no upstream's comes out everywhere, and nothing stands in for it."""
    cache, source = bench.cache(), Source(LookupError("a mistake"))
    async with asyncio.TaskGroup() as group:
        work = [told(cache, source) for _ in range(3)]
        gathered = group.create_task(_outcomes(work))
        await source.asked.wait()
        source.open.set()

    assert ["a mistake"] * 3 == [str(each) for each in gathered.result()]
    assert 1 == source.count


async def _outcomes(work: list[Awaitable[object]]) -> list[object]:  # type: ignore[type-arg]
    return await asyncio.gather(*work, return_exceptions=True)


# --- Stale answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [SHARED, PERSONAL])
async def test_stale_answer_is_given_while_it_is_refreshed(
    bench: Bench, settings: CacheSettings
) -> None:
    """For a while a stale answer is given at once, and one request in the background renews it."""
    cache, source, fresh = bench.cache(settings), a_source(an_answer("one")), Source(an_answer("2"))
    await told(cache, source)
    bench.time += 305
    for _ in range(5):
        assert ("one", "stale (revalidating)") == await told(cache, source, refresh=fresh)
    await fresh.asked.wait()
    fresh.open.set()
    await bench.idle()

    assert ("2", "hit") == await told(cache, source)
    assert (1, 1) == (source.count, fresh.count)


async def test_who_comes_too_late_waits_for_the_refresh(bench: Bench) -> None:
    """Where the stale answer's time ends while it is renewed, no second request is made."""
    cache, source, fresh = bench.cache(), a_source(an_answer("one")), Source(an_answer("two"))
    await told(cache, source)
    bench.time += 309
    await told(cache, source, refresh=fresh)
    await fresh.asked.wait()
    bench.time += 2
    async with asyncio.TaskGroup() as group:
        task = group.create_task(told(cache, source))
        await asyncio.sleep(0)
        fresh.open.set()

    assert ("two", "collapsed") == task.result()
    assert 1 == source.count


async def test_refresh_ends_with_its_owner(bench: Bench) -> None:
    """A refresh is its caller's: it is cut off with him, and who waited for it asks himself."""
    cache, source = bench.cache(), a_source(an_answer("one"), an_answer("three"))
    refresh = Source(an_answer("two"))
    await told(cache, source)
    bench.time += 305
    async with Tasks("a proxy before a reload") as owner:
        _, verdict = await cache.through(ANN, source.ask, refresh.ask, owner.spawn)
        await refresh.asked.wait()
        bench.time += 10  # now even the stale answer is too old
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            others = [group.create_task(told(cache, source)) for _ in range(5)]
            await asyncio.sleep(0)
            waiting = [each.done() for each in others]
            running = (len(owner), len(bench.tasks))
            await owner.__aexit__(None, None, None)

    assert "stale (revalidating)" == verdict.words
    assert ((1, 0), [False] * 5) == (running, waiting)
    assert ["three"] * 5 == [each.result()[0] for each in others]
    assert (1, 2) == (refresh.count, source.count)


async def test_refresh_without_an_owner_is_the_caches(bench: Bench) -> None:
    """Where nobody else is named, the cache's own owner runs the refresh."""
    cache, source = bench.cache(), a_source(an_answer("one"))
    await told(cache, source)
    bench.time += 305
    await told(cache, source, refresh=Source(an_answer("two")))

    assert 1 == len(bench.tasks)


async def test_failed_refresh_leaves_the_stale_answer(bench: Bench) -> None:
    """A refresh that fails changes nothing, and is tried again with the next request."""
    cache, source = bench.cache(), a_source(an_answer("one"))
    failing = a_source(UpstreamStatusError(500), VastSyntaxError("no XML"), an_answer("two"))
    await told(cache, source)
    bench.time += 305
    for _ in range(3):
        assert ("one", "stale (revalidating)") == await told(cache, source, refresh=failing)
        await bench.idle()

    assert ("two", "hit") == await told(cache, source)


async def test_refresh_may_find_what_is_not_for_sharing(bench: Bench) -> None:
    """If the background's answer is paid for, nobody gets it, and the old one is forgotten."""
    cache, source = bench.cache(), a_source(an_answer("one"), an_answer("three"))
    await told(cache, source)
    bench.time += 305
    await told(cache, source, refresh=a_source(an_answer("two", A_PRICED_AD)))
    await bench.idle()

    assert ("three", "miss, stored") == await told(cache, source)


@pytest.mark.parametrize(
    "error",
    [
        UpstreamStatusError(500),
        UpstreamRefusedError("the breaker is open", by="breaker"),
        UpstreamTimeoutError("no answer in 1 s"),
        VastSyntaxError("no XML"),
    ],
)
@pytest.mark.parametrize("settings", [SHARED, PERSONAL])
async def test_stale_answer_stands_in_for_a_dead_upstream(
    bench: Bench, error: UpstreamError | VastError, settings: CacheSettings
) -> None:
    """While the upstream fails, or is not asked, stale answers come; until their limit."""
    cache, source = bench.cache(settings), a_source(an_answer("one"), error)
    await told(cache, source)
    for _ in range(2):
        bench.time += 150
    bench.time += 11
    answer, verdict = await cache.through(ANN, source.ask, source.ask)
    assert b"one" == answer.fetched.reply.body
    reason = f"upstream failed: {error}"
    assert CacheVerdict("stale", age=311, ttl=-11, reason=reason, error=error) == verdict
    bench.time += 288.9
    assert f"stale (upstream failed: {error})" == (await told(cache, source))[1]
    bench.time += 0.2
    with pytest.raises(type(error)):
        await told(cache, source)

    assert 4 == source.count


async def test_crowd_gets_stale_answers(bench: Bench) -> None:
    """With the upstream dead, all who waited for one failure get what is stale."""
    cache, source = bench.cache(), a_source(an_answer("one"), UpstreamStatusError(500))
    await told(cache, source)
    bench.time += 400
    source.open.clear()
    source.asked.clear()

    assert {"stale (upstream failed: HTTP status 500)": 100} == words(
        await crowd(cache, source, 100)
    )
    assert 2 == source.count


async def test_who_cannot_wait_longer_gets_what_is_stale(bench: Bench) -> None:
    """At the deadline of who waits, a stale answer is better than none."""
    cache, source = bench.cache(), a_source(an_answer("one"), an_answer("two"))
    await told(cache, source)
    bench.time += 400
    source.open.clear()
    source.asked.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(told(cache, source))
        await source.asked.wait()
        body, said = await told(cache, source, replace(BOB, deadline=0.0))
        source.open.set()

    assert "one" == body
    assert said.startswith("stale (upstream failed: another request for the same")


async def test_no_ad_is_no_failure(bench: Bench) -> None:
    """An upstream that says that it has no ad is believed: nothing stale stands in."""
    cache, source = bench.cache(), a_source(an_answer("one"), NoAdError("HTTP status 204"))
    await told(cache, source)
    bench.time += 400

    with pytest.raises(NoAdError):
        await told(cache, source)


async def test_answer_may_forbid_to_be_stale(bench: Bench) -> None:
    """What has to be validated is not used when it is stale, whatever happens."""
    answer = an_answer("one", AN_AD, ("cache-control", "must-revalidate"))
    cache, source = bench.cache(), a_source(answer, UpstreamStatusError(500))
    await told(cache, source)
    bench.time += 300.5

    with pytest.raises(UpstreamStatusError):
        await told(cache, source)


# --- The second level ---------------------------------------------------------------------------

REDIS = replace(SHARED, redis=True)


async def test_other_instances_find_what_one_was_answered(bench: Bench) -> None:
    """What one instance was answered another gives, and it grows no younger on the way."""
    source = a_source(an_answer("one", AN_AD, ("content-type", "text/xml; charset=utf-8")))
    await told(bench.cache(REDIS), source)
    await bench.idle()
    bench.time += 100
    other = bench.cache(REDIS)
    answer, verdict = await other.through(BOB, source.ask, source.ask)

    age = 100 + CLOCK_TOLERANCE
    assert CacheVerdict("hit", age=pytest.approx(age), ttl=pytest.approx(300 - age)) == verdict  # type: ignore[arg-type]
    assert (("content-type", "text/xml; charset=utf-8"),) == answer.fetched.reply.headers
    assert ("one", "hit") == await told(other, source)
    assert (1, 2) == (source.count, bench.store.asked)


async def test_second_level_is_off_unless_asked_for(bench: Bench) -> None:
    """Without ``redis``, nothing is looked up there, and nothing put."""
    await told(bench.cache(SHARED), a_source(an_answer()))
    await bench.idle()

    assert (0, {}) == (bench.store.asked, bench.store.kept)


async def test_crowd_asks_the_second_level_once(bench: Bench) -> None:
    """Who waits for one request waits for one look into the second level, too."""
    source = a_source(an_answer("one"))
    await told(bench.cache(REDIS), source)
    await bench.idle()
    other = bench.cache(REDIS)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(told(other, source)) for _ in range(100)]

    assert {("one", "hit")} == {each.result() for each in tasks}
    assert (1, 2) == (source.count, bench.store.asked)


async def test_stale_answers_come_from_the_second_level(bench: Bench) -> None:
    """A new instance with a dead upstream gives what another had, until its limit."""
    await told(bench.cache(REDIS), a_source(an_answer("one")))
    await bench.idle()
    dead = a_source(UpstreamStatusError(500))
    bench.time += 400
    stale = "stale (upstream failed: HTTP status 500)"
    assert ("one", stale) == await told(bench.cache(REDIS), dead)
    bench.time += 201

    with pytest.raises(UpstreamStatusError):
        await told(bench.cache(REDIS), dead)


async def test_what_is_here_is_not_replaced_by_what_seems_older(bench: Bench) -> None:
    """A copy from the second level counts as older than the same answer that is still here."""
    cache, source = bench.cache(REDIS), a_source(an_answer("one"), UpstreamStatusError(500))
    await told(cache, source)
    await bench.idle()
    bench.time += 400
    _, verdict = await cache.through(ANN, source.ask, source.ask)

    assert 400 == verdict.age
    assert 2 == bench.store.asked


@pytest.mark.parametrize("skew", [-1.9, 0.0, 1.9, 3600.0])
async def test_clocks_that_differ_lengthen_nothing(bench: Bench, skew: float) -> None:
    """Where the clocks of two instances differ by seconds, an answer's time grows no longer."""
    settings = replace(REDIS, ttl=100, stale_while_revalidate=0, stale_if_error=0)
    await told(bench.cache(settings), a_source(an_answer("one")))
    await bench.idle()
    bench.skew = skew
    bench.time += 50
    other, source = bench.cache(settings), a_source(an_answer("two"))
    await told(other, source)
    bench.time += 50

    assert "two" == (await told(other, source))[0]


async def test_clock_far_behind_finds_nothing(bench: Bench) -> None:
    """An answer that seems to come from the future is of no use: its age is not known."""
    await told(bench.cache(REDIS), a_source(an_answer("one")))
    await bench.idle()
    bench.skew = -60.0

    assert ("two", "miss, stored") == await told(bench.cache(REDIS), a_source(an_answer("two")))


async def test_shorter_limits_hold_for_what_is_there(bench: Bench) -> None:
    """What was put under longer limits is given for as long as the present ones allow."""
    await told(bench.cache(REDIS), a_source(an_answer("one")))
    await bench.idle()
    bench.time += 20
    short = replace(REDIS, ttl=10, stale_while_revalidate=0, stale_if_error=0)

    assert ("two", "miss, stored") == await told(bench.cache(short), a_source(an_answer("two")))


async def test_garbage_in_the_second_level_is_nothing(bench: Bench) -> None:
    """What is no answer is asked for, and replaced."""
    cache = bench.cache(REDIS)
    await told(cache, a_source(an_answer("one")))
    await bench.idle()
    bench.store.kept = dict.fromkeys(bench.store.kept, (b"\x00garbage\n\xff", 1e9))
    source = a_source(an_answer("two"))
    assert ("two", "miss, stored") == await told(bench.cache(REDIS), source)
    await bench.idle()

    assert ("two", "hit") == await told(bench.cache(REDIS), source)


@pytest.mark.parametrize("settings", [replace(REDIS, paid=True), replace(REDIS, scope="viewer")])
async def test_reload_mixes_nothing(bench: Bench, settings: CacheSettings) -> None:
    """What was shared before an upstream became paid, or personal, is nobody's afterwards."""
    await told(bench.cache(REDIS), a_source(an_answer("one")), ANN)
    await bench.idle()
    cache = bench.cache(settings)

    assert "two" == (await told(cache, a_source(an_answer("two")), ANN))[0]
    assert "three" == (await told(cache, a_source(an_answer("three")), BOB))[0]


async def test_no_viewer_is_in_the_second_level(bench: Bench) -> None:
    """Neither keys nor values have the id of a viewer that is not in an ad server's own words."""
    await told(bench.cache(replace(REDIS, scope="viewer")), a_source(an_answer("one")), ANN)
    await bench.idle()

    assert 1 == len(bench.store.kept)
    assert "ann" not in repr(bench.store.kept)


# --- For people ---------------------------------------------------------------------------------


async def test_clearing_forgets(bench: Bench) -> None:
    """After clearing, nothing is given, and what was being asked for is not kept."""
    cache, source = bench.cache(), a_source(an_answer("one"), an_answer("two"), an_answer("three"))
    await told(cache, source)
    cache.clear()
    source.open.clear()
    source.asked.clear()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(told(cache, source))
        await source.asked.wait()
        cache.clear()
        source.open.set()

    assert ("two", "miss (cleared)") == task.result()
    assert ("three", "miss, stored") == await told(cache, source)


async def test_cache_tells_what_it_did(bench: Bench) -> None:
    """Counters say what became of requests; no viewer is in what is printed."""
    cache = bench.cache()
    await told(cache, a_source(an_answer("one")))
    await told(cache, a_source(an_answer("one")))
    await told(cache, a_source(an_answer("one")), replace(ANN, has_cookies=True))
    await told(cache, a_source(an_answer("two", A_PRICED_AD)), Asking(f"{URL}?b"))
    await told(cache, a_source(an_answer("two", A_PRICED_AD)), Asking(f"{URL}?b"))
    with pytest.raises(UpstreamStatusError):
        await told(cache, a_source(UpstreamStatusError(500)), Asking(f"{URL}?c"))
    size = cache.told().pop("bytes")

    expected = {"entries": 1, "max_bytes": 64 * 1024 * 1024, "stored": 1, "not_stored": {"paid": 2}}
    expected |= {"hits": 1, "stale": 0, "misses": 2, "collapsed": 0, "passed": 1, "bypassed": 1}
    assert {**expected, "failed": 1, "bytes": size} == cache.told()
    assert repr(cache) == (
        f"<AnswerCache house, shared, unpaid, 1 answers, {size} of 67108864 bytes, "
        "hits: 1, misses: 2>"
    )


# --- Money: whatever happens --------------------------------------------------------------------

CONTROLS = ("", "", "", "max-age=5", "private", "no-store", "max-age=0", "stale-if-error=900")


@dataclass(frozen=True)
class Fate:
    """What the ad server does with one request."""

    filled: bool
    priced: bool
    fails: bool
    control: str
    turns: int
    """Of the loop, until it answers."""


FATES = st.builds(
    Fate,
    filled=st.sampled_from([True, True, False]),
    priced=st.booleans(),
    fails=st.sampled_from([False, False, False, True]),
    control=st.sampled_from(CONTROLS),
    turns=st.integers(0, 2),
)
SETTINGS = st.builds(
    CacheSettings,
    ttl=st.sampled_from([1.0, 300.0]),
    scope=st.sampled_from(["viewer", "shared"]),
    paid=st.booleans(),
    no_fill_ttl=st.sampled_from([0.0, 5.0]),
    stale_while_revalidate=st.sampled_from([0.0, 10.0, 1000.0]),
    redis=st.booleans(),
)
ASKINGS = st.builds(
    Asking,
    url=st.sampled_from([URL, URL, f"{URL}?b"]),
    viewer=st.sampled_from(["ann", "bob", "cid", ""]),
    has_cookies=st.sampled_from([False, False, False, True]),
)
STEPS = st.one_of(
    st.lists(ASKINGS, min_size=1, max_size=5),  # asked at the same time
    st.lists(ASKINGS, min_size=1, max_size=5),
    st.sampled_from([0.5, 4.0, 12.0, 301.0]),  # time passes
    SETTINGS,  # a reload
)


@dataclass
class Market:
    """An ad server that sells each impression once, and who was given which."""

    fates: list[Fate]
    asked: int = 0
    given: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    sold: set[str] = field(default_factory=set)

    async def ask(self) -> Answer:
        """Answer with an impression that was never there before."""
        self.asked += 1
        name = f"impression {self.asked}"
        fate = self.fates[self.asked % len(self.fates)]
        for _ in range(fate.turns):
            await asyncio.sleep(0)
        if fate.fails:
            raise UpstreamStatusError(500)
        facts = Facts(filled=fate.filled, priced=fate.priced and fate.filled, expires=None)
        return an_answer(name, facts, ("cache-control", fate.control))

    async def view(self, cache: AnswerCache, asking: Asking, number: int) -> None:
        """Ask for a viewer, and note which impression came; who is not known is another each."""
        try:
            answer, _ = await cache.through(asking, self.ask, self.ask)
        except UpstreamStatusError:
            return
        if answer.facts.filled:
            name = answer.fetched.reply.body.decode()
            self.given[name].add(asking.viewer or f"somebody {number}")
            if cache.settings.paid or answer.facts.priced:
                self.sold.add(name)


async def _trade(first: CacheSettings, steps: list[object], fates: list[Fate]) -> Market:
    market = Market(fates)
    async with Tasks("market") as tasks:
        bench = Bench(tasks)
        cache = bench.cache(first)
        for number, step in enumerate(steps):
            if isinstance(step, CacheSettings):
                cache = bench.cache(step)
            elif isinstance(step, float):
                await bench.idle()
                bench.time += step
            elif isinstance(step, list):
                async with asyncio.TaskGroup() as group:
                    for place, asking in enumerate(step):
                        group.create_task(market.view(cache, asking, 100 * number + place))
        await bench.idle()
    return market


@settings(max_examples=300, deadline=None)
@given(
    first=SETTINGS,
    steps=st.lists(STEPS, max_size=12),
    fates=st.lists(FATES, min_size=1, max_size=8),
)
def test_no_sold_impression_reaches_two_viewers(
    first: CacheSettings, steps: list[object], fates: list[Fate]
) -> None:
    """
    Whatever the settings, their changes, the answers and the crowd: an impression that was sold
    has one viewer.
    """
    market = asyncio.run(_trade(first, steps, fates))

    assert {} == {each: market.given[each] for each in market.sold if len(market.given[each]) > 1}
