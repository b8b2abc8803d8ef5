"""What Redis and Valkey add to the contract: lost replies, restarts, clusters, keys that expire."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.support.valkey import Cluster, Valkey, free_port, valkey_cluster, valkey_server
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state import redis_node, redis_servers
from vastproxy.state.base import Account, Claim, Hold, Level, Verdict, Window, money
from vastproxy.state.redis import HOLDS, RedisBackend

HOUR = Window("rolling", 3_600_000)
VIEWER = Account("viewer", "ada")
NOON = 1_764_000_000_000


@pytest.fixture(scope="module")
def running() -> Iterator[Valkey]:
    """Run one server for all tests that do not harm it."""
    with valkey_server() as valkey:
        yield valkey


@pytest.fixture
def server(running: Valkey) -> Valkey:
    """Give the server without any data or scripts."""
    running.call("FLUSHALL")
    running.call("SCRIPT", "FLUSH")
    running.call("CONFIG", "RESETSTAT")
    return running


@pytest.fixture
async def backend(server: Valkey) -> AsyncIterator[RedisBackend]:
    """Open a backend on that server."""
    async with RedisBackend(server.url) as opened:
        yield opened


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Run one cluster for all tests that mend what they break."""
    with valkey_cluster() as nodes:
        yield nodes


@dataclass(slots=True)
class Meddler:
    """A proxy in front of a server that spoils replies."""

    port: int
    to: int
    instead: list[bytes | None] = field(default_factory=list)
    """What becomes of the next replies: other bytes, or, with None, nothing and the end."""

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        there, back = await asyncio.open_connection("127.0.0.1", self.to)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                group.create_task(self.carry(reader, back))
                group.create_task(self.answer(there, writer))
        for each in (writer, back):
            each.close()
            with contextlib.suppress(ConnectionError):
                await each.wait_closed()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on what comes."""
        while data := await reader.read(65_536):
            writer.write(data)
        writer.write_eof()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on replies, or what is to be there instead."""
        while data := await reader.read(65_536):
            spoiled = self.instead.pop(0) if self.instead else data
            if spoiled is None:
                writer.transport.abort()
                return
            writer.write(spoiled)
        writer.close()


@contextlib.asynccontextmanager
async def meddler(server: Valkey) -> AsyncIterator[Meddler]:
    """Run a proxy in front of *server*."""
    proxy = Meddler(free_port(), server.port)
    async with await asyncio.start_server(proxy.serve, "127.0.0.1", proxy.port):
        yield proxy


def a_hold(operation: str, account: Account = VIEWER, **changes: Any) -> Hold:
    """Build a hold of one out of three an hour."""
    return Hold(account, operation, (Claim("cap", 1, 3, HOUR),), **changes)


def calls(server: Valkey, command: str) -> int:
    """Give how often *server* was asked for *command*, since it was emptied."""
    stats = server.call("INFO", "commandstats").get(f"cmdstat_{command}", {"calls": 0})
    return int(stats["calls"])


LOSSES = pytest.mark.parametrize("lost", [None, b""], ids=["cut off", "silence"])


@LOSSES
async def test_a_reservation_whose_reply_was_lost_is_made_once(
    server: Valkey, lost: bytes | None
) -> None:
    """The same operation asked for again gets the same verdict, and takes no more room."""
    async with meddler(server) as proxy, RedisBackend(proxy.url) as backend:
        await backend.ping()
        proxy.instead.append(lost)
        with pytest.raises(StateAwayError):
            await backend.reserve([a_hold("one")])
        verdicts = await backend.reserve([a_hold("one")])
        levels = await backend.levels(VIEWER, a_hold("").claims)

    assert [Verdict(granted=True)] == verdicts
    assert [Level(0, 1)] == levels


@LOSSES
async def test_a_confirmation_whose_reply_was_lost_counts_once(
    server: Valkey, lost: bytes | None
) -> None:
    """The library does not repeat it, and the caller's repetition counts nothing."""
    async with meddler(server) as proxy, RedisBackend(proxy.url) as backend:
        await backend.reserve([a_hold("one")])
        await backend.confirm([a_hold("other")])
        proxy.instead.append(lost)
        with pytest.raises(StateAwayError):
            await backend.confirm([a_hold("one")])
        bookings = await backend.confirm([a_hold("one")])
        levels = await backend.levels(VIEWER, a_hold("").claims)

    assert ["again"] == bookings
    assert [Level(2, 0)] == levels


async def test_a_server_that_forgot_the_scripts_is_told_them(
    server: Valkey, backend: RedisBackend
) -> None:
    """After SCRIPT FLUSH, as after a failover, a call works at once, and the next needs no more."""
    await backend.ping()
    await backend.reserve([a_hold("one")])
    server.call("SCRIPT", "FLUSH")
    server.call("CONFIG", "RESETSTAT")

    assert [Verdict(granted=True)] == await backend.reserve([a_hold("two")])
    assert 1 == calls(server, "eval")
    assert [Verdict(granted=True)] == await backend.reserve([a_hold("three")])
    assert 1 == calls(server, "eval")


async def test_ping_brings_the_scripts(server: Valkey, backend: RedisBackend) -> None:
    """After a ping no call needs to send a script."""
    await backend.ping()
    await backend.reserve([a_hold("one")])
    await backend.confirm([a_hold("one")])
    await backend.void([a_hold("two")])
    await backend.levels(VIEWER, a_hold("").claims)
    await backend.write_items(VIEWER, {"a": "1"}, 60)
    await backend.read_items(VIEWER)
    await backend.increment("hits")
    await backend.add_spend("spring", 1)

    assert 0 == calls(server, "eval")


async def test_cancelled_calls_leave_the_connections_usable() -> None:
    """More calls than connections are given up while the server hangs; then all works, exactly."""
    with valkey_server() as server:
        async with RedisBackend(server.url) as backend:
            await backend.ping()
            server.stop()
            given_up = await asyncio.gather(*[_given_up(backend, f"x{at}") for at in range(120)])
            server.cont()
            counts = await asyncio.gather(*[backend.increment(f"y{at}", at) for at in range(120)])
            again = await asyncio.gather(*[backend.get_count(f"y{at}") for at in range(120)])

    assert [True] * 120 == given_up
    assert list(range(120)) == counts
    assert list(range(120)) == again


async def _given_up(backend: RedisBackend, operation: str) -> bool:
    try:
        async with asyncio.timeout(0.05):
            await backend.reserve([a_hold(operation)])
    except TimeoutError:
        return True
    return False


async def test_more_callers_than_connections_are_served(backend: RedisBackend) -> None:
    """Who finds no free connection waits for one, and is not refused."""
    holds = [a_hold("one", Account("viewer", f"v{at}")) for at in range(redis_node.CONNECTIONS * 4)]
    found = await asyncio.gather(*[backend.reserve([each]) for each in holds])

    assert [[Verdict(granted=True)]] * len(holds) == found


async def test_a_killed_server_is_away_and_back_with_its_counts() -> None:
    """While it is dead, calls fail at once; restarted on its data it goes on where it was."""
    with valkey_server("--appendfsync", "always") as server:
        async with RedisBackend(server.url) as backend:
            await backend.confirm([a_hold("one"), a_hold("two")])
            server.kill()
            with pytest.raises(StateAwayError, match=f"127.0.0.1:{server.port}"):
                await backend.reserve([a_hold("three")])
            with pytest.raises(StateAwayError):
                await backend.ping()
            server.restart()
            verdicts = await backend.reserve([a_hold("three"), a_hold("four")])
            bookings = await backend.confirm([a_hold("one")])

    assert [True, False] == [each.granted for each in verdicts]
    assert ["again"] == bookings


async def test_a_server_that_hangs_is_away_within_the_limit() -> None:
    """Neither a hanging server nor a crowd that waits for it holds a caller for longer."""
    with valkey_server() as server:
        async with RedisBackend(server.url) as backend:
            await backend.ping()
            server.stop()
            began = time.monotonic()
            ends = await asyncio.gather(
                *[backend.get_count("hits") for _ in range(200)], return_exceptions=True
            )
            took = time.monotonic() - began
            server.cont()

    assert {StateAwayError} == {type(each) for each in ends}
    assert took < (redis_node.FREE_WITHIN + redis_node.ANSWER_WITHIN) * 2


@pytest.mark.parametrize(
    ("reply", "kind", "told"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", StateAwayError, "is loading"),
        (b"-CLUSTERDOWN The cluster is down\r\n", StateAwayError, "cluster is down"),
        (b"-READONLY You can't write against a replica.\r\n", StateAwayError, "replica"),
        (b"-TRYAGAIN Multiple keys request\r\n", StateAwayError, "Multiple keys"),
        (b"-OOM command not allowed\r\n", StateAwayError, "not allowed"),
        (b"-MISCONF no disk\r\n", StateAwayError, "no disk"),
        (b"-NOREPLICAS too few\r\n", StateAwayError, "too few"),
        (b"-NOPERM no permissions\r\n", StateBackendError, "no permissions"),
        (b"-MOVED 42 127.0.0.1:1\r\n", StateBackendError, r"write `redis\+cluster://`"),
        (b"-NOSCRIPT No matching script\r\n", StateBackendError, "No matching script"),
        (b"-MOVED away\r\n", StateBackendError, "not enough values"),
        (b"+OK\r\n", StateBackendError, "answered with bytes"),
        (b"*1\r\n:7\r\n", StateBackendError, "answered with int"),
        (b"*2\r\n*1\r\n:1\r\n*1\r\n:1\r\n", StateBackendError, "answered with list"),
    ],
)
async def test_replies_that_are_none_are_errors_of_our_own(
    server: Valkey, reply: bytes, kind: type[StateBackendError], told: str
) -> None:
    """What is over soon is an absence; what an operator must mend is not. Then all works."""
    async with meddler(server) as proxy, RedisBackend(proxy.url) as backend:
        await backend.ping()
        proxy.instead += [reply] * redis_servers.HOPS
        with pytest.raises(StateBackendError, match=told) as caught:
            await backend.reserve([a_hold("one")])
        proxy.instead.clear()
        verdicts = await backend.reserve([a_hold("one")])

    assert kind is caught.type
    assert [Verdict(granted=True)] == verdicts


async def test_command_without_script_is_not_sent_as_one(server: Valkey) -> None:
    """A server that misses a script where none was named is told of, and not asked again."""
    async with meddler(server) as proxy, RedisBackend(proxy.url) as backend:
        proxy.instead.append(b"-NOSCRIPT No matching script\r\n")
        with pytest.raises(StateBackendError, match="No matching script"):
            await backend.keys(VIEWER)

        assert [] == await backend.keys(VIEWER)


async def test_window_of_money_is_refused(server: Valkey, backend: RedisBackend) -> None:
    """A campaign's money has no window, and nothing is changed for the holds beside it."""
    fine = Hold(Account("campaign", "fine"), "one", (money(1),))
    spring = Account("campaign", "spring")
    wrong = Hold(spring, "one", (replace(money(1), window=HOUR),))
    for call in (backend.reserve, backend.confirm, backend.void):
        with pytest.raises(StateBackendError, match="lifetime"):
            await call([fine, wrong])

    assert [] == server.call("KEYS", "*")


async def test_no_password_is_told() -> None:
    """A wrong password, a dead server and the backend itself name the place, and no secret."""
    with valkey_server(password="open-sesame") as server:  # noqa: S106 - of a server that ends here
        async with RedisBackend(server.url) as right:
            await right.ping()
            told = [repr(right)]
        for url in (
            server.url.replace("open", "0pen"),
            f"redis://:0pen-sesame@127.0.0.1:{free_port()}",
        ):
            async with RedisBackend(url) as wrong:
                with pytest.raises(StateBackendError) as caught:
                    await wrong.ping()
                told.append(str(caught.value))

    assert f"<RedisBackend at 127.0.0.1:{server.port}>" == told[0]
    assert "refuses the password" in told[1]
    assert all("127.0.0.1" in each and "sesame" not in each for each in told)


async def test_a_server_that_repeats_the_password_is_not_quoted(server: Valkey) -> None:
    """A server without passwords answers with the command that it does not know."""
    async with meddler(server) as proxy:
        url = f"redis://:open-sesame@127.0.0.1:{proxy.port}"
        proxy.instead.append(b"-ERR unknown command 'AUTH', with args: 'open-sesame'\r\n")
        async with RedisBackend(url) as backend:
            with pytest.raises(StateBackendError) as caught:
                await backend.get_count("hits")

    assert "with args: '***'" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1", "'http' is no Redis"),
        ("redis+sentinel://127.0.0.1", r"'redis\+sentinel' is no Redis"),
        ("redis://127.0.0.1:port", "write `redis://host:6379/0`"),
        ("redis://127.0.0.1?colour=red", "colour"),
        ("redis+cluster://127.0.0.1/3", "no numbered databases"),
        ("unix+cluster:///run/redis.sock", r"'unix\+cluster' is no Redis"),
        ("redis://127.0.0.1?socket_timeout=0", "seconds above 0"),
        ("redis://127.0.0.1?socket_timeout=fast", "socket_timeout"),
    ],
)
def test_a_wrong_url_is_refused_at_once(url: str, told: str) -> None:
    """What no connection can be made with is said before there is one."""
    with pytest.raises(StateBackendError, match=told):
        RedisBackend(url)


@pytest.mark.parametrize(
    "url",
    ["redis://:open/sesame@h", "redis://:open\u2100sesame@h", "redis:/:open-sesame@h"],
)
def test_a_password_that_spoils_the_url_is_not_told(url: str) -> None:
    """What stands before a slash looks like a port, and is a part of the password all the same."""
    with pytest.raises(StateBackendError, match="write `redis://host:6379/0`") as caught:
        RedisBackend(url)

    assert "open" not in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_a_prefix_with_a_brace_is_refused() -> None:
    """It would be the hash tag of every key, and one node would have them all."""
    with pytest.raises(StateBackendError, match="brace"):
        RedisBackend("redis://127.0.0.1", prefix="{vp}:")


async def test_a_crowd_for_one_viewer_is_one_call(server: Valkey, backend: RedisBackend) -> None:
    """Of 200 reservations in a batch, with a limit of three, exactly three are granted."""
    await backend.ping()
    verdicts = await backend.reserve([a_hold(f"op{at}") for at in range(200)])

    assert [True] * 3 + [False] * 197 == [each.granted for each in verdicts]
    assert 1 == calls(server, "evalsha")


async def test_what_is_said_of_holds_is_in_their_order(backend: RedisBackend) -> None:
    """Holds of several accounts, mixed, and more of one than a script takes."""
    names = [f"v{at % 3}" for at in range(HOLDS * 3 + 30)]
    holds = [a_hold(f"op{at}", Account("viewer", name)) for at, name in enumerate(names)]
    verdicts = await backend.reserve(holds)
    bookings = await backend.confirm([holds[4], holds[0], holds[50], holds[4]])

    assert list(range(9)) == [at for at, each in enumerate(verdicts) if each.granted]
    assert ["booked", "booked", "late", "again"] == bookings


async def test_lapsed_reservations_beyond_one_call_are_all_taken_off(server: Valkey) -> None:
    """Nobody is refused while room is taken by what has lapsed, however much that is."""
    now = [NOON]
    many = 2_500
    spring = Account("campaign", "spring")
    async with RedisBackend(server.url, clock=lambda: now[0]) as backend:
        await backend.reserve([Hold(spring, f"op{at}", (money(1, many),)) for at in range(many)])
        now[0] += 600_000
        verdicts = await backend.reserve([Hold(spring, "next", (money(many, many),))])
        levels = await backend.levels(spring, [money(0)])

    assert [Verdict(granted=True)] == verdicts
    assert [Level(0, many)] == levels


async def test_where_there_is_room_no_call_waits_for_all_that_lapsed(server: Valkey) -> None:
    """One script decides, though thousands have lapsed; and what was confirmed since is exact."""
    now = [NOON]
    many = 2_500
    spring = Account("campaign", "spring")
    lapsing = [Hold(spring, f"op{at}", (money(1),)) for at in range(many)]
    async with RedisBackend(server.url, clock=lambda: now[0]) as backend:
        await backend.reserve(lapsing)
        now[0] += 600_000
        await backend.ping()
        server.call("CONFIG", "RESETSTAT")
        verdicts = await backend.reserve([Hold(spring, "next", (money(1, 10 * many),))])
        bookings = await backend.confirm([lapsing[-1], Hold(spring, "next", (money(1),))])
        scripts = calls(server, "evalsha")
        again = await backend.reserve([lapsing[-2]])
        await backend.void([lapsing[-3]])
        levels = await backend.levels(spring, [money(0)])

    assert [Verdict(granted=True)] == verdicts == again
    assert ["late", "booked"] == bookings
    assert 2 == scripts
    assert [Level(2, 1)] == levels


async def test_lease_that_lapsed_among_thousands_is_not_drawn_from(server: Valkey) -> None:
    """Whether or not it has been taken off yet, its room is not its own any more."""
    now = [NOON]
    spring = Account("campaign", "spring")
    crowd = [Hold(spring, f"op{at}", (money(1),)) for at in range(2_500)]
    lease = Hold(spring, "lease", (money(9),))
    async with RedisBackend(server.url, clock=lambda: now[0]) as backend:
        await backend.reserve([*crowd, lease])
        now[0] += 600_000
        booking = await backend.confirm([Hold(spring, "one", (money(1),), lease="lease")])

    assert ["late"] == booking


async def test_many_counters_of_one_viewer_are_not_all_looked_through(server: Valkey) -> None:
    """What ended goes bit by bit: no call reads ten thousand counters, and few that ended stay."""
    now = [NOON]
    hour, minute = Window("fixed", 3_600_000), Window("fixed", 60_000)
    async with RedisBackend(server.url, clock=lambda: now[0]) as backend:
        for at in range(0, 5_000, 100):
            claims = tuple(Claim(f"{at + more}", window=minute) for more in range(100))
            await backend.confirm([Hold(VIEWER, f"op{at}", claims)])
        now[0] += 60_001
        server.call("CONFIG", "RESETSTAT")
        for at in range(0, 2_500, 100):
            claims = tuple(Claim(f"new {at + more}", window=hour) for more in range(100))
            await backend.confirm([Hold(VIEWER, f"new{at}", claims)])
        left = server.call("HLEN", "vp:{v:ada}:c")

    assert 0 == calls(server, "hgetall")
    assert 2_500 <= left < 4_000


async def test_keys_of_a_viewer_expire(server: Valkey, backend: RedisBackend) -> None:
    """Each lives as long as something in it means anything, and a minute."""
    await backend.reserve([a_hold("one"), a_hold("two", keep_ms=7_200_000)])
    await backend.confirm([a_hold("two", keep_ms=7_200_000)])
    await backend.write_items(VIEWER, {"a": "1"}, 90)
    left = {
        key.rpartition(":")[2]: round(server.call("PTTL", key) / 60_000)
        for key in server.call("KEYS", "*")
    }

    assert {"c": 61, "h": 11, "e": 11, "s": 121, "i": 2} | {"c": left["c"]} == left
    assert left["c"] in (61, 62)


async def test_no_later_call_shortens_the_life_of_a_key(
    server: Valkey, backend: RedisBackend
) -> None:
    """A short reservation after a long one leaves the key alone."""
    await backend.reserve([a_hold("one", ttl_ms=7_200_000)])
    await backend.reserve([a_hold("two", ttl_ms=1_000)])

    assert 121 == round(server.call("PTTL", "vp:{v:ada}:c") / 60_000)
    assert 121 == round(server.call("PTTL", "vp:{v:ada}:h") / 60_000)


async def test_what_counts_for_ever_does_not_expire(server: Valkey, backend: RedisBackend) -> None:
    """Neither a lifetime cap, nor money, though a reservation was there before."""
    spring = Account("campaign", "spring")
    await backend.reserve([Hold(spring, "one", (money(5, 10),))])
    await backend.add_spend("budget:spring", "2.5")
    await backend.confirm([Hold(VIEWER, "two", (Claim("ever"),))])
    await backend.reserve([a_hold("three")])

    assert -1 == server.call("PTTL", "vp:{c:spring}:c")
    assert -1 == server.call("PTTL", "vp:{v:ada}:c")


async def test_counters_that_have_ended_do_not_pile_up(server: Valkey) -> None:
    """A viewer that comes every day keeps the counters of this day, not those of all."""
    now = [NOON]
    async with RedisBackend(server.url, clock=lambda: now[0]) as backend:
        for day in range(200):
            now[0] += 86_400_000
            claims = (Claim(f"cap {day}", 1, 3, HOUR), Claim(f"f {day}", window=Window("fixed", 9)))
            await backend.confirm([Hold(VIEWER, f"op{day}", claims)])
        levels = await backend.levels(VIEWER, claims)

    assert [Level(1), Level(1)] == levels
    assert server.call("HLEN", "vp:{v:ada}:c") < 40
    assert server.call("ZCARD", "vp:{v:ada}:s") < 3


async def test_forgetting_leaves_no_key(server: Valkey, backend: RedisBackend) -> None:
    """All that is kept of an account goes, with the operations that are remembered."""
    await backend.reserve([a_hold("one"), a_hold("two")])
    await backend.confirm([a_hold("two")])
    await backend.void([a_hold("three")])
    await backend.write_items(VIEWER, {"a": "1"}, 60)

    assert await backend.forget(VIEWER)
    assert [] == server.call("KEYS", "*")
    assert not await backend.forget(VIEWER)


async def test_each_counter_has_its_key_once(backend: RedisBackend) -> None:
    """Whether it is counted, reserved, or both."""
    claims = tuple(Claim(key) for key in ("both", "r|x"))
    await backend.confirm([Hold(VIEWER, "one", (*claims[:1], Claim("counted \udc80")))])
    await backend.reserve([Hold(VIEWER, "two", claims)])

    assert ["both", "counted \udc80", "r|x"] == sorted(await backend.keys(VIEWER))


async def test_names_cannot_leave_their_hash_tag(server: Valkey, backend: RedisBackend) -> None:
    """Braces, percent signs, spaces, and what is no ASCII are written as in URLs."""
    await backend.confirm([a_hold("one", Account("viewer", "a}{b %é\udc80"))])
    await backend.increment("{x}")

    assert {
        "vp:{v:a%7D%7Bb%20%25%C3%A9%ED%B2%80}:c",
        "vp:{v:a%7D%7Bb%20%25%C3%A9%ED%B2%80}:s",
        "vp:k:%7Bx%7D",
    } == set(server.call("KEYS", "*"))


async def test_two_prefixes_share_nothing(server: Valkey, backend: RedisBackend) -> None:
    """So that two installations may have one server."""
    async with RedisBackend(server.url, prefix="other:") as other:
        await other.add_spend("spring", 1)
        await other.increment("hits")

        assert 0 == await backend.get_spend("spring")
        assert 0 == await backend.get_count("hits")


async def test_a_cluster_has_accounts_on_all_its_nodes(cluster: Cluster) -> None:
    """One call for accounts of many slots; each of its nodes has some, and all are counted."""
    holds = [a_hold("one", Account("viewer", f"all{at}")) for at in range(60)]
    async with RedisBackend(cluster.url) as backend:
        await backend.ping()
        verdicts = await backend.reserve([*holds, *holds])
        bookings = await backend.confirm(holds)
        sizes = [node.call("DBSIZE") for node in cluster.nodes]
        forgotten = [await backend.forget(each.account) for each in holds]
        told = repr(backend)

    assert [Verdict(granted=True)] * 120 == verdicts
    assert ["booked"] * 60 == bookings
    assert all(size > 20 for size in sizes)
    assert all(forgotten)
    assert f"<RedisBackend cluster at 127.0.0.1:{cluster.nodes[0].port}, nodes: 3>" == told


async def test_a_dead_node_does_not_hold_up_the_others(cluster: Cluster) -> None:
    """Accounts of other nodes are served at once, its own are away, and it may come back."""
    key = "vp:k:hits"
    dead = cluster.node_of(key)
    alive = next(name for name in "abcdefgh" if cluster.node_of(f"vp:k:{name}") is not dead)
    for node in cluster.nodes:
        node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
    async with RedisBackend(cluster.url) as backend:
        await backend.increment("hits")
        dead.kill()
        began = time.monotonic()
        for at in range(1, 51):
            with pytest.raises(StateAwayError, match=str(dead.port)):
                await backend.get_count("hits")
            assert at == await backend.increment(alive)
        took = time.monotonic() - began
        dead.restart()
        cluster.wait_ok()
        count = await backend.get_count("hits")
        await backend.forget(VIEWER)

    assert 1 == count
    assert took < 5


async def test_one_node_that_is_away_does_not_keep_a_cluster_away() -> None:
    """A ping is content with most primaries, whichever is dead; with one of three it is not."""
    with valkey_cluster() as nodes:
        for node in nodes.nodes:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        async with RedisBackend(nodes.url) as backend:
            await backend.ping()
            for node in nodes.nodes:
                node.kill()
                await backend.ping()
                node.restart()
                nodes.wait_ok()
            for node in nodes.nodes[:2]:
                node.kill()
            with pytest.raises(StateAwayError):
                await backend.ping()


async def test_a_server_that_takes_no_writes_is_not_back(
    server: Valkey, backend: RedisBackend
) -> None:
    """It answers, but to count is what it is for."""
    server.call("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(StateAwayError, match="maxmemory"):
            await backend.ping()
    finally:
        server.call("CONFIG", "SET", "maxmemory", "0")

    await backend.ping()


async def test_a_node_that_hangs_costs_others_one_call(cluster: Cluster) -> None:
    """Also where the map is read anew, and that node would be asked for it."""
    hung = cluster.node_of("vp:k:hits")
    alive = next(name for name in "abcdefgh" if cluster.node_of(f"vp:k:{name}") is not hung)
    async with RedisBackend(cluster.url) as backend:
        await backend.ping()
        hung.stop()
        try:
            assert await _given_up_count(backend, "hits")
            lost = [await _given_up_count(backend, alive) for _ in range(100)]
        finally:
            hung.cont()
        cluster.wait_ok()

    assert sum(lost) <= 1


async def _given_up_count(backend: RedisBackend, key: str) -> bool:
    try:
        async with asyncio.timeout(0.05):
            await backend.get_count(key)
    except (TimeoutError, StateAwayError):
        return True
    return False


async def test_a_slot_that_moved_is_followed(cluster: Cluster) -> None:
    """A node that has the slot no more says who has; while it moves, new keys are there already."""
    key = "vp:k:nomad"
    slot = cluster.nodes[0].call("CLUSTER", "KEYSLOT", key)
    old = cluster.node_of(key)
    new = next(node for node in cluster.nodes if node is not old)
    old_id, new_id = (node.call("CLUSTER", "MYID") for node in (old, new))
    async with RedisBackend(cluster.url) as backend:
        # Several connections: ASKING counts for the command behind it on the same one.
        await asyncio.gather(*[backend.get_count("nomad") for _ in range(20)])
        new.call("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
        old.call("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
        while_moving = [await backend.increment("nomad") for _ in range(5)]
        for node in (new, old):
            node.call("CLUSTER", "SETSLOT", slot, "NODE", new_id)
        after = await backend.increment("nomad")
        calls_of_old = await _redirects(backend, old)

    assert [1, 2, 3, 4, 5] == while_moving
    assert 6 == after
    assert 0 == calls_of_old


async def _redirects(backend: RedisBackend, node: Valkey) -> int:
    """Give how many further calls for the key that moved come to *node* first."""
    node.call("CONFIG", "RESETSTAT")
    for _ in range(10):
        await backend.increment("nomad")
    return calls(node, "evalsha")


async def test_a_cluster_that_is_away_is_said_to_be() -> None:
    """There is no map, and nobody to ask for one: every call fails, at once."""
    async with RedisBackend(f"redis+cluster://127.0.0.1:{free_port()}") as backend:
        with pytest.raises(StateAwayError):
            await backend.reserve([a_hold("one")])
        with pytest.raises(StateAwayError):
            await backend.ping()


async def test_a_single_server_is_no_cluster(server: Valkey) -> None:
    """Its own words are told."""
    url = server.url.replace("redis://", "redis+cluster://")
    async with RedisBackend(url) as backend:
        with pytest.raises(StateBackendError, match="cluster support disabled"):
            await backend.ping()
