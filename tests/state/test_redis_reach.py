"""Asking Redis in passing: turns and answers, in time or not at all."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
from structlog.testing import capture_logs

from tests.support.valkey import Cluster, Valkey, free_port, valkey_cluster, valkey_server
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.observe.tasks import Tasks
from vastproxy.state import redis_reach
from vastproxy.state.redis_reach import MAX_PUTS, MAX_VALUE, Reach, RedisStore, RedisTurns
from vastproxy.state.redis_servers import Call, Servers

WITHIN = 5.0
"""Seconds that a test waits for what must come."""

TENTH = 100_000_000
"""Nanoseconds."""

HOUR = 3_600 * 10 * TENTH


@pytest.fixture(scope="module")
def running() -> Iterator[Valkey]:
    """Run one server for all tests."""
    with valkey_server() as valkey:
        yield valkey


@pytest.fixture
def server(running: Valkey) -> Valkey:
    """Give the server without any data or scripts."""
    running.call("FLUSHALL")
    running.call("SCRIPT", "FLUSH")
    return running


@pytest.fixture
async def servers(server: Valkey) -> AsyncIterator[Servers]:
    """Give the way to the server."""
    way = Servers(server.url)
    yield way
    await way.close()


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    """Give an owner of tasks."""
    async with Tasks("test") as owner:
        yield owner


def some_turns(servers: Servers, tasks: Tasks, interval: int, burst: int) -> RedisTurns:
    """Build turns of a rate that waits as long as a busy machine may take."""
    reach = Reach("turns", servers, tasks, timeout=WITHIN)
    return RedisTurns(reach, "vp:r:main", interval, burst)


def a_store(servers: Servers, tasks: Tasks, *, timeout: float = WITHIN) -> RedisStore:
    """Build a store that asks again after a tenth of a second."""
    return RedisStore(Reach("answers", servers, tasks, timeout=timeout, pause=0.1), servers)


async def until_there(reach: Reach) -> None:
    """Return when *reach* is there again."""
    async with asyncio.timeout(WITHIN):
        while not reach.there:  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.005)


# --- Turns ---------------------------------------------------------------------------------------


async def test_burst_and_then_none(servers: Servers, tasks: Tasks) -> None:
    """After a pause a burst may be taken, and then it is told when the next turn is due."""
    turns = some_turns(servers, tasks, HOUR, 3)
    first, second, third = [await turns.take(2) for _ in range(3)]

    assert (2, 1, 0) == (first.turns, second.turns, third.turns)
    assert 0 == first.wait
    assert 3590 < third.wait <= second.wait <= 3600


async def test_turns_come_one_by_one(servers: Servers, tasks: Tasks) -> None:
    """From then on one turn comes in each interval, and those that were not taken add up."""
    turns = some_turns(servers, tasks, TENTH // 10, 5)
    assert 5 == (await turns.take(9)).turns
    taken, began = 0, time.monotonic()
    while taken < 5:
        taken += (await turns.take(9)).turns

    assert 0.04 < time.monotonic() - began < WITHIN


async def test_asking_for_none_takes_none(server: Valkey, servers: Servers, tasks: Tasks) -> None:
    """A look takes no turn, and leaves nothing behind."""
    turns = some_turns(servers, tasks, HOUR, 1)
    looked = await turns.take(0)

    assert (0, 0) == (looked.turns, looked.wait)
    assert [] == server.call("KEYS", "*")
    assert 1 == (await turns.take(1)).turns


async def test_quicker_rate_waits_for_no_slower_one(servers: Servers, tasks: Tasks) -> None:
    """What a slower rate has left behind does not keep a quicker one for longer than its own."""
    await some_turns(servers, tasks, HOUR, 10).take(10)
    quick = await some_turns(servers, tasks, TENTH, 2).take(1)

    assert 0 == quick.turns
    assert 0 < quick.wait <= 0.1


async def test_intervals_are_exact(server: Valkey, servers: Servers, tasks: Tasks) -> None:
    """A third of a millisecond is counted to the nanosecond."""
    turns = some_turns(servers, tasks, 333_333, 1_000_000)
    await turns.take(50_000)
    before = server.call("GET", "vp:r:main").split()
    await turns.take(900_000)
    after = server.call("GET", "vp:r:main").split()
    seconds, nanoseconds = (int(b) - int(a) for a, b in zip(before, after, strict=True))

    assert 900_000 * 333_333 == seconds * 10**9 + nanoseconds


async def test_key_of_turns_expires(server: Valkey, servers: Servers, tasks: Tasks) -> None:
    """A rate that is not used leaves nothing behind, a moment after all its turns are back."""
    await some_turns(servers, tasks, TENTH, 50).take(20)

    assert 2000 < server.call("PTTL", "vp:r:main") <= 3000


async def test_nonsense_under_the_key_is_nothing(
    server: Valkey, servers: Servers, tasks: Tasks
) -> None:
    """What is no point in time is overwritten."""
    server.call("SET", "vp:r:main", "tomorrow")

    assert 1 == (await some_turns(servers, tasks, HOUR, 1).take(1)).turns


# --- In time, or not at all ----------------------------------------------------------------------


async def test_server_that_hangs_is_asked_once(servers: Servers, tasks: Tasks) -> None:
    """Who asks first waits for the timeout, and nobody after that; a line in the log says so."""
    reach = Reach("turns", servers, tasks, timeout=0.05)
    turns = RedisTurns(reach, "vp:r:main", TENTH, 5)
    await turns.take(0)
    with capture_logs() as logs:
        # A script, which the server runs alone: nobody is answered meanwhile.
        tasks.spawn(servers.ask([Call("x", ("DEBUG", "SLEEP", "0.5"))]), "sleep")
        await asyncio.sleep(0.02)
        began = time.monotonic()
        for _ in range(200):
            with pytest.raises(StateAwayError):
                await turns.take(1)
        waited = time.monotonic() - began
        assert not turns.there
        await until_there(reach)

    assert 0.045 < waited < 0.45
    assert ["redis.away", "redis.back"] == [each["event"] for each in logs]
    assert "no answer in 50 ms" == logs[0]["problem"]
    assert 5 == (await turns.take(5)).turns


async def test_flapping_is_told_once(
    servers: Servers, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes again soon after it has come back fills no log, and is not looked at at once."""
    monkeypatch.setattr(redis_reach, "STEADY", 60.0)
    reach = Reach("turns", servers, tasks, timeout=WITHIN)
    wrong, right = Call("x", ("NO SUCH",)), Call("x", ("PING",))
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(StateBackendError):
                await reach.ask(wrong, right)
            await until_there(reach)

    assert ["redis.away", "redis.back"] == [each["event"] for each in logs]


async def test_it_is_back_when_it_does_what_it_should(servers: Servers, tasks: Tasks) -> None:
    """A server that answers with errors is as good as away, until the look is answered."""
    reach = Reach("turns", servers, tasks, timeout=WITHIN)
    turns = RedisTurns(reach, "vp:r:main", TENTH, 5)
    await servers.ask([Call("x", ("HSET", "vp:r:main", "a", "b"))])
    with pytest.raises(StateBackendError, match="WRONGTYPE"):
        await turns.take(1)
    assert "<RedisTurns vp:r:main, <Reach turns, away>>" == repr(turns)
    await servers.ask([Call("x", ("DEL", "vp:r:main"))])
    await until_there(reach)

    assert 1 == (await turns.take(1)).turns


@asynccontextmanager
async def late_server(server: Valkey, seconds: float) -> AsyncIterator[str]:
    """Stand before *server*, and take some *seconds* for each new connection; give the URL."""

    async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()

    async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        there, back = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.TaskGroup() as group:
            group.create_task(_carry(reader, back))
            group.create_task(_carry(there, writer))

    port = free_port()
    async with await asyncio.start_server(_serve, "127.0.0.1", port):
        yield f"redis://127.0.0.1:{port}"


async def test_slow_connection_is_made_in_the_background(server: Valkey, tasks: Tasks) -> None:
    """Where connecting takes longer than a request would wait, a look does it for all."""
    async with late_server(server, 0.3) as url:
        servers = Servers(url)
        reach = Reach("turns", servers, tasks, timeout=0.1)
        turns = RedisTurns(reach, "vp:r:main", TENTH, 5)
        with pytest.raises(StateAwayError):
            await turns.take(1)
        await until_there(reach)

        assert 1 == (await turns.take(1)).turns
        await servers.close()


async def test_what_is_closed_looks_no_more(tasks: Tasks) -> None:
    """A rate that is no longer in use does not look for a server that will never come."""
    gone = Servers("redis://127.0.0.1:1")
    reach = Reach("turns", gone, tasks, timeout=0.05)
    with pytest.raises(StateAwayError):
        await reach.ask(Call("x", ("PING",)), Call("x", ("PING",)))
    reach.close()

    assert await tasks.wait_idle(WITHIN)
    assert not reach.there
    await gone.close()


# --- Answers -------------------------------------------------------------------------------------


async def test_what_was_put_is_there(server: Valkey, servers: Servers, tasks: Tasks) -> None:
    """Bytes come back as they were, under a key of our own, until their time is over."""
    store = a_store(servers, tasks)
    value = bytes(range(256)) * 4
    await store.put("k", value, 30.0)

    assert value == await store.get("k")
    assert ["vp:a:k"] == server.call("KEYS", "*")
    assert 29_000 < server.call("PTTL", "vp:a:k") <= 30_000
    assert await store.get("other") is None


async def test_largest_answer_is_kept(servers: Servers, tasks: Tasks) -> None:
    """An answer of 2 MiB is kept whole, and one that is larger is not."""
    store = a_store(servers, tasks)
    await store.put("large", b"x" * MAX_VALUE, 30)
    await store.put("larger", b"x" * (MAX_VALUE + 1), 30)

    assert MAX_VALUE > 2 * 1024 * 1024
    assert b"x" * MAX_VALUE == await store.get("large")
    assert await store.get("larger") is None


async def test_what_lasts_no_time_is_not_kept(
    server: Valkey, servers: Servers, tasks: Tasks
) -> None:
    """An answer without a future is not written."""
    store = a_store(servers, tasks)
    for seconds in (0, -1, 0.0001):
        await store.put("k", b"x", seconds)

    assert [] == server.call("KEYS", "*")


async def test_store_without_a_server_is_empty(tasks: Tasks) -> None:
    """Without a server nothing is found or kept, and nobody hears an error."""
    gone = Servers("redis://127.0.0.1:1")
    store = a_store(gone, tasks)
    await store.put("k", b"x", 30)

    assert await store.get("k") is None
    assert "<RedisStore <Reach answers, away>, being written: 0>" == repr(store)
    await store.put("k", b"x", 30)
    await gone.close()


async def test_store_that_hangs_keeps_nobody_waiting(
    server: Valkey, servers: Servers, tasks: Tasks
) -> None:
    """One look waits for the timeout, and those after it not at all, until it is back."""
    reach = Reach("answers", servers, tasks, timeout=0.05, pause=0.1)
    store = RedisStore(reach, servers)
    await store.put("k", b"x", 30)
    server.stop()
    try:
        began = time.monotonic()
        found = [await store.get("k") for _ in range(200)]
        waited = time.monotonic() - began
    finally:
        server.cont()
    await until_there(reach)

    assert [None] * 200 == found
    assert 0.045 < waited < 0.5
    assert b"x" == await store.get("k")


async def test_killed_server_that_is_back_is_used(tasks: Tasks) -> None:
    """After a crash and a restart answers are found and kept as before."""
    with valkey_server() as own:
        way = Servers(own.url)
        reach = Reach("answers", way, tasks, timeout=WITHIN, pause=0.1)
        store = RedisStore(reach, way)
        await store.put("k", b"x", 30)
        own.kill()
        assert await store.get("k") is None
        own.restart()
        await until_there(reach)

        assert b"x" == await store.get("k")
        await way.close()


async def test_crowd_of_writers_is_bounded(server: Valkey, servers: Servers, tasks: Tasks) -> None:
    """Of more answers than may wait for their turn, the rest is not written."""
    store = a_store(servers, tasks)
    await asyncio.gather(*(store.put(f"k{at}", b"x", 30) for at in range(MAX_PUTS + 20)))

    assert MAX_PUTS == server.call("DBSIZE")


async def test_writing_that_fails_is_no_proof_of_absence(
    server: Valkey, servers: Servers, tasks: Tasks
) -> None:
    """A server that is full and takes nothing more still tells what it has."""
    store = a_store(servers, tasks)
    await store.put("k", b"x", 30)
    server.call("CONFIG", "SET", "maxmemory", 1)
    try:
        await store.put("other", b"x", 30)

        assert b"x" == await store.get("k")
        assert await store.get("other") is None
    finally:
        server.call("CONFIG", "SET", "maxmemory", 0)


# --- A cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Run a cluster."""
    with valkey_cluster() as nodes:
        yield nodes


async def test_cluster_counts_and_keeps(cluster: Cluster, tasks: Tasks) -> None:
    """In a cluster turns are counted, and answers kept, each by the node that has the key."""
    way = Servers(cluster.url)
    store = a_store(way, tasks)
    for at in range(20):
        await store.put(f"k{at}", str(at).encode(), 30)
    turns = some_turns(way, tasks, HOUR, 3)

    assert 3 == (await turns.take(5)).turns
    assert [str(at).encode() for at in range(20)] == [await store.get(f"k{at}") for at in range(20)]
    assert all(node.call("DBSIZE") for node in cluster.nodes)
    await way.close()
