"""Answers that are kept for a while."""

import asyncio
import gc

import pytest

from vastproxy.upstream.cache import OVERHEAD, ResponseCache


class Source:
    """What is fetched from: it counts, and answers when it is *open*."""

    def __init__(self, *answers: str | Exception | None) -> None:
        self.answers = list(answers)
        self.count = 0
        self.open = asyncio.Event()
        self.asked = asyncio.Event()

    async def fetch(self) -> str | None:
        """Give the next answer, or raise it."""
        self.count += 1
        self.asked.set()
        await self.open.wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def a_source(*answers: str | Exception | None) -> Source:
    """Build a source that answers at once."""
    source = Source(*answers)
    source.open.set()
    return source


async def test_answer_is_kept() -> None:
    """What was fetched once is given until its time is over."""
    now = [0.0]
    cache = ResponseCache[str](300, clock=lambda: now[0])
    source = a_source("one", "two")
    assert ["one", "one"] == [await cache.get_or_fetch("k", source.fetch) for _ in range(2)]
    now[0] = 299.9
    assert "one" == cache.get("k")
    now[0] = 300.1
    assert cache.get("k") is None
    assert "two" == await cache.get_or_fetch("k", source.fetch)

    assert (1, 2, 2) == (cache.hits, cache.misses, source.count)


async def test_keys_are_apart() -> None:
    """Each key has its own answer."""
    cache = ResponseCache[str]()
    source = a_source("one", "two")

    assert ["one", "two"] == [await cache.get_or_fetch(each, source.fetch) for each in "ab"]
    assert ("one", "two") == (cache.get("a"), cache.get("b"))


async def test_crowd_fetches_once() -> None:
    """However many ask at the same time, one asks the source."""
    cache, source = ResponseCache[str](), Source("one")
    async with asyncio.TaskGroup() as group:
        work = [cache.get_or_fetch("k", source.fetch) for _ in range(50)]
        tasks = [group.create_task(each) for each in work]
        await source.asked.wait()
        source.open.set()

    assert {"one"} == {each.result() for each in tasks}
    assert (1, 49, 1) == (source.count, cache.hits, cache.misses)


@pytest.mark.parametrize("empty", ["", None])
async def test_nothing_is_not_kept(empty: str | None) -> None:
    """An empty answer is given, and asked for again the next time."""
    cache, source = ResponseCache[str](), a_source(empty, "two")

    assert [empty, "two"] == [await cache.get_or_fetch("k", source.fetch) for _ in range(2)]


async def test_failure_is_not_kept() -> None:
    """Who waited for a fetch that failed is told; the next one fetches again."""
    cache, source = ResponseCache[str](), Source(LookupError("gone"), "two")
    async with asyncio.TaskGroup() as group:
        work = [cache.get_or_fetch("k", source.fetch) for _ in range(3)]
        gathered = group.create_task(_results(work))
        await source.asked.wait()
        source.open.set()

    assert ["gone"] * 3 == [str(each) for each in gathered.result()]
    assert 1 == source.count
    assert "two" == await cache.get_or_fetch("k", source.fetch)


async def _results(work: list) -> list:  # type: ignore[type-arg]
    return await asyncio.gather(*work, return_exceptions=True)


async def test_caller_that_goes_away_takes_nobody_along() -> None:
    """Where the one who fetches is cancelled, one of those who wait fetches in his place."""
    cache, source = ResponseCache[str](), Source("one")
    async with asyncio.TaskGroup() as group:
        first = group.create_task(cache.get_or_fetch("k", source.fetch))
        await source.asked.wait()
        others = [group.create_task(cache.get_or_fetch("k", source.fetch)) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        others[0].cancel()
        await asyncio.sleep(0)
        source.open.set()

    assert ["one", "one"] == [each.result() for each in others[1:]]
    assert 2 == source.count


async def test_waiting_may_be_given_up() -> None:
    """Who goes away while another fetches disturbs neither him nor the others."""
    cache, source = ResponseCache[str](), Source("one")
    async with asyncio.TaskGroup() as group:
        work = [cache.get_or_fetch("k", source.fetch) for _ in range(3)]
        first, second, third = (group.create_task(each) for each in work)
        await source.asked.wait()
        second.cancel()
        await asyncio.sleep(0)
        source.open.set()

    assert ["one", "one"] == [first.result(), third.result()]
    assert second.cancelled()
    assert 1 == source.count


async def test_failure_without_others_is_not_complained_of() -> None:
    """A fetch that fails with nobody waiting is raised to its caller, and to nobody else."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, each: complaints.append(each))
    cache, source = ResponseCache[str](), a_source(LookupError("gone"))
    with pytest.raises(LookupError):
        await cache.get_or_fetch("k", source.fetch)
    gc.collect()

    assert [] == complaints


async def test_clearing_forgets_what_is_under_way() -> None:
    """What was being fetched when the cache was cleared is given, and not kept."""
    cache, source = ResponseCache[str](), Source("old", "new")
    cache.put("other", "x")
    async with asyncio.TaskGroup() as group:
        task = group.create_task(cache.get_or_fetch("k", source.fetch))
        await source.asked.wait()
        cache.clear()
        source.open.set()

    assert "old" == task.result()
    assert 0 == len(cache)
    assert "new" == await cache.get_or_fetch("k", source.fetch)


def test_cache_is_bounded_in_bytes() -> None:
    """When it is full, what was longest unused goes; what is too large is not taken at all."""
    size = OVERHEAD + 1 + 100
    cache = ResponseCache[str | bytes](max_bytes=2 * size)
    assert cache.put("a", "x" * 100)
    assert cache.put("b", b"x" * 100)
    assert cache.get("a")
    assert cache.put("c", "ü" * 50)
    assert not cache.put("d", "x" * 2 * size)

    assert [True, False, True, False] == [cache.get(each) is not None for each in "abcd"]
    assert repr(cache) == ("<ResponseCache 2 answers, 802 of 802 bytes, 300 s, hits: 0, misses: 0>")


def test_replaced_answer_counts_once() -> None:
    """A key that is put again has the room of its newest answer."""
    cache = ResponseCache[str](max_bytes=1000)
    for each in ("x" * 600, "y" * 500, "z"):
        assert cache.put("k", each)

    assert "z" == cache.get("k")
    assert OVERHEAD + 2 == cache._kept.currsize


@pytest.mark.parametrize(("ttl", "size"), [(0, 1), (-1, 1), (1, 0)])
def test_cache_that_keeps_nothing_is_refused(ttl: float, size: int) -> None:
    """A cache without time or room is a mistake."""
    with pytest.raises(ValueError, match="keep nothing"):
        ResponseCache[str](ttl, size)
