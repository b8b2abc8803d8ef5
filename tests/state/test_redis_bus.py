"""What instances tell each other about breakers: votes that end, terms, and messages."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.valkey import Cluster, Valkey, valkey_cluster, valkey_server
from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.observe.tasks import Tasks
from vastproxy.state import redis_bus
from vastproxy.state.redis_bus import Ballot, RedisVotes, Says, Standing
from vastproxy.state.redis_servers import Servers

WITHIN = 10.0
"""Seconds that a test waits for what must come."""

MINUTE = 60.0


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
    return running


@pytest.fixture
async def servers(server: Valkey) -> AsyncIterator[Servers]:
    """Give the way to the server."""
    way = Servers(server.url)
    yield way
    await way.close()


@pytest.fixture
def url(server: Valkey) -> str:
    """Give where the server is."""
    return server.url


@pytest.fixture
def ada(servers: Servers, url: str) -> RedisVotes:
    """Give the votes as one instance sees them."""
    return RedisVotes(servers, url, "ada")


@pytest.fixture
def bob(servers: Servers, url: str) -> RedisVotes:
    """Give the votes as another instance sees them."""
    return RedisVotes(servers, url, "bob")


def a_ballot(says: Says, **changes: Any) -> Ballot:
    """Build what is said in the first term, where two votes are needed."""
    return Ballot(**{"name": "main", "says": says, "term": 0, "quorum": 2, **changes})


async def said(votes: RedisVotes, says: Says, **changes: Any) -> Standing:
    """Say one thing, and give how it then stands."""
    [standing] = await votes.cast([a_ballot(says, **changes)])
    return standing


# --- Votes ---------------------------------------------------------------------------------------


async def test_each_instance_has_one_vote(ada: RedisVotes, bob: RedisVotes) -> None:
    """Who votes twice counts once."""
    counts = [
        (await said(each, "open", seconds=MINUTE)).votes for each in (ada, ada, bob, bob, ada)
    ]

    assert [1, 1, 2, 2, 2] == counts


async def test_who_looks_withdraws_his_own_vote(ada: RedisVotes, bob: RedisVotes) -> None:
    """An instance that does not find it open any more takes back what it said, and no more."""
    await said(ada, "open", seconds=MINUTE)
    await said(bob, "open", seconds=MINUTE)

    assert 1 == (await said(ada, "look")).votes
    assert 2 == (await said(ada, "stay")).votes


async def test_votes_end(ada: RedisVotes, bob: RedisVotes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vote of an instance that is gone ends by the server's clock."""
    monkeypatch.setattr(redis_bus, "BEYOND", 0.05)
    standing = await said(ada, "open", seconds=0.05)
    assert 1 == standing.votes
    async with asyncio.timeout(WITHIN):
        while standing.votes:
            standing = await said(bob, "look")

    assert 0 == standing.seconds


async def test_keys_expire(server: Valkey, ada: RedisVotes) -> None:
    """Nothing is left behind for ever of a breaker that nobody shares any more."""
    await said(ada, "open", seconds=MINUTE)
    await said(ada, "probe", quorum=9, seconds=MINUTE)
    await said(ada, "closed")
    await said(ada, "open", seconds=MINUTE)

    assert {"vp:{b}:main:v", "vp:{b}:main:s"} == set(server.call("KEYS", "*"))
    assert all(server.call("PTTL", key) > 0 for key in server.call("KEYS", "*"))


async def test_longest_time_counts(ada: RedisVotes, bob: RedisVotes) -> None:
    """It is left alone for as long as the most patient wants; the reason is the last one's."""
    await said(ada, "open", seconds=MINUTE, reason="refused")
    standing = await said(bob, "open", seconds=1.0, reason="5 failures in a row")

    assert 59 < standing.seconds <= 60
    assert ("5 failures in a row", "bob", "open") == (standing.reason, standing.by, standing.says)
    assert "5 failures in a row" == (await said(ada, "look")).reason


async def test_several_breakers_in_one_call(ada: RedisVotes) -> None:
    """What is said of several breakers is kept apart, whatever their names."""
    names = ["main", "häuser {b} 1", "\udc80", "a:v"]
    standings = await ada.cast([a_ballot("open", name=each, seconds=1) for each in names])

    assert ["main", "häuser {b} 1", "a:v"] == [
        each.name for each in standings if "\ufffd" not in each.name
    ]
    assert [1, 1, 1, 1] == [each.votes for each in standings]


# --- Terms ---------------------------------------------------------------------------------------


async def test_closing_begins_a_term(ada: RedisVotes, bob: RedisVotes) -> None:
    """When one instance closes it, all votes are void, and nothing is left of the time."""
    await said(ada, "open", seconds=MINUTE)
    await said(bob, "open", seconds=MINUTE)
    closed = await said(bob, "closed", reason="2 good probes")
    looked = await said(ada, "look")

    assert (1, 0, 0, "2 good probes") == (closed.term, closed.votes, closed.seconds, closed.reason)
    assert (1, 0) == (looked.term, looked.votes)


async def test_vote_of_an_older_term_does_not_last(ada: RedisVotes, bob: RedisVotes) -> None:
    """Who has not heard that it was closed does not keep it open; who sees it anew opens it."""
    await said(ada, "open", seconds=MINUTE)
    await said(bob, "closed")

    assert 0 == (await said(ada, "stay", term=0)).votes
    assert 1 == (await said(ada, "open", term=0)).votes


# --- Probes --------------------------------------------------------------------------------------


async def test_one_instance_may_probe(ada: RedisVotes, bob: RedisVotes) -> None:
    """When the time is over one instance may probe, and nobody else until it has failed."""
    await said(ada, "open", quorum=1)
    await said(bob, "open", quorum=1)
    first = await said(bob, "probe", quorum=1, seconds=MINUTE)
    second = await said(ada, "probe", quorum=1, seconds=MINUTE)
    await said(bob, "open", quorum=1)
    third = await said(ada, "probe", quorum=1, seconds=MINUTE)

    assert [True, False, True] == [each.granted for each in (first, second, third)]


async def test_nobody_probes_before_the_time_is_over(ada: RedisVotes, bob: RedisVotes) -> None:
    """Whoever's own time is shorter waits as long as all others."""
    await said(ada, "open", quorum=1, seconds=MINUTE)

    assert not (await said(bob, "probe", quorum=1, seconds=1)).granted


async def test_who_is_alone_probes_for_himself(ada: RedisVotes) -> None:
    """As long as too few find it bad, each of those probes when it wants to."""
    await said(ada, "open", quorum=2, seconds=MINUTE)

    assert (await said(ada, "probe", quorum=2, seconds=MINUTE)).granted


async def test_nobody_probes_what_is_closed(ada: RedisVotes, bob: RedisVotes) -> None:
    """Who asks in an older term learns that it was closed, and is granted nothing."""
    await said(ada, "open", quorum=1)
    await said(bob, "closed")
    standing = await said(ada, "probe", quorum=1, term=0, seconds=MINUTE)

    assert (False, 1) == (standing.granted, standing.term)


async def test_grant_ends(ada: RedisVotes, bob: RedisVotes) -> None:
    """Another may probe when the one that was to do so has not been heard of in time."""
    await said(ada, "open", quorum=1)
    assert (await said(ada, "probe", quorum=1, seconds=0.05)).granted
    standing = await said(bob, "probe", quorum=1, seconds=MINUTE)
    async with asyncio.timeout(WITHIN):
        while not standing.granted:
            standing = await said(bob, "probe", quorum=1, seconds=MINUTE)

    assert not (await said(ada, "probe", quorum=1, seconds=MINUTE)).granted


# --- Messages ------------------------------------------------------------------------------------


class Ear:
    """Hears what others say."""

    def __init__(self) -> None:
        """Begin with nothing heard."""
        self.heard: asyncio.Queue[Standing] = asyncio.Queue()
        self.began = asyncio.Event()

    async def next(self) -> tuple[str, str, str]:
        """Give who said what of which breaker, next."""
        async with asyncio.timeout(WITHIN):
            standing = await self.heard.get()
        return standing.by, standing.says, standing.name


@asynccontextmanager
async def listening(votes: RedisVotes) -> AsyncIterator[Ear]:
    """Listen to what others say while the block runs."""
    ear = Ear()
    async with Tasks("ear") as tasks:
        tasks.spawn(votes.listen(ear.heard.put_nowait, ear.began.set), "listen")
        async with asyncio.timeout(WITHIN):
            await ear.began.wait()
        yield ear


async def test_others_hear_of_changes(ada: RedisVotes, bob: RedisVotes) -> None:
    """Others hear that it opened and closed; nobody hears himself, or that somebody looked."""
    async with listening(ada) as ear:
        await said(ada, "open", seconds=1)
        await said(bob, "look")
        await said(bob, "open", seconds=1)
        await said(bob, "stay")
        await said(bob, "closed")
        heard = [await ear.next(), await ear.next()]

        assert [("bob", "open", "main"), ("bob", "closed", "main")] == heard
        assert ear.heard.empty()


async def test_other_databases_are_not_heard(server: Valkey, ada: RedisVotes) -> None:
    """What is kept in another database is not heard of either."""
    url = f"redis://127.0.0.1:{server.port}/3"
    there = Servers(url)
    async with listening(ada) as ear:
        await said(RedisVotes(there, url, "eve"), "open", name="theirs", seconds=1)
        await said(RedisVotes(ada._servers, server.url, "bob"), "open", name="ours", seconds=1)

        assert ("bob", "open", "ours") == await ear.next()
    await there.close()


@pytest.mark.parametrize(
    "message",
    [b"", b"nonsense", b"[]", b"1", b"{}", b"\xff\xfe", b'{"says":"shout","name":"main"}'],
)
async def test_nonsense_is_not_heard(
    server: Valkey, ada: RedisVotes, bob: RedisVotes, message: bytes
) -> None:
    """What somebody else writes to the channel is passed over."""
    async with listening(ada) as ear:
        assert 1 == server.call("PUBLISH", "vp:{b}:0", message)
        await said(bob, "open", seconds=1)

        assert ("bob", "open", "main") == await ear.next()


async def test_silence_is_endured(
    ada: RedisVotes, bob: RedisVotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing happens the server is asked whether it is there, and listening goes on."""
    monkeypatch.setattr(redis_bus, "QUIET", 0.02)
    async with listening(ada) as ear:
        await asyncio.sleep(0.2)
        await said(bob, "open", seconds=1)

        assert ("bob", "open", "main") == await ear.next()


async def test_server_that_hangs_is_not_listened_to(
    server: Valkey, ada: RedisVotes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listening ends when the server does not answer any more."""
    monkeypatch.setattr(redis_bus, "QUIET", 0.05)

    def _stop() -> None:
        server.stop()

    try:
        async with asyncio.timeout(WITHIN):
            with pytest.raises(StateAwayError, match="does not answer"):
                await ada.listen(lambda _: None, _stop)
    finally:
        server.cont()


async def test_server_that_is_gone_ends_listening() -> None:
    """Listening ends when the server does, and cannot begin without."""
    with valkey_server() as own:
        votes = RedisVotes(Servers(own.url), own.url, "ada")
        for began in (own.kill, lambda: None):
            async with asyncio.timeout(WITHIN):
                with pytest.raises(StateAwayError):
                    await votes.listen(lambda _: None, began)


async def test_password_is_needed_and_not_told() -> None:
    """Messages come over a connection that gives the password; a refusal does not repeat it."""
    with valkey_server(password="open sesame") as own:  # noqa: S106 - of a test
        way = Servers(own.url.replace(" ", "%20"))
        right = RedisVotes(way, own.url.replace(" ", "%20"), "ada")
        async with listening(right):
            await said(right, "open", seconds=1)
        wrong = RedisVotes(way, own.url.replace(" ", "%20").replace("sesame", "barley"), "bob")
        with pytest.raises(StateBackendError) as refused:
            await wrong.listen(lambda _: None, lambda: None)
        await way.close()

    assert "barley" not in str(refused.value)
    assert "sesame" not in repr(right)


async def test_who_may_not_publish_may_vote(server: Valkey) -> None:
    """Votes count without a right to channels; who may not listen is told so."""
    server.call("ACL", "SETUSER", "mute", "on", ">pw", "~*", "+@all", "resetchannels")
    url = f"redis://mute:pw@127.0.0.1:{server.port}/0"
    way = Servers(url)
    votes = RedisVotes(way, url, "ada")

    assert 1 == (await said(votes, "open", seconds=1)).votes
    with pytest.raises(StateBackendError, match="channel"):
        await votes.listen(lambda _: None, lambda: None)
    await way.close()


# --- A cluster -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Run a cluster, for the last test of all."""
    with valkey_cluster() as nodes:
        yield nodes


class BeganError(Exception):
    """Listening has begun."""


def _end() -> None:
    raise BeganError


async def test_cluster_tells_all_nodes(cluster: Cluster) -> None:
    """In a cluster what is said at one node is heard at each."""
    way = Servers(cluster.url)
    bob = RedisVotes(way, cluster.url, "bob")
    for node in cluster.nodes:
        ada = RedisVotes(way, f"redis+cluster://127.0.0.1:{node.port}", "ada")
        async with listening(ada) as ear:
            await bob.cast([a_ballot("open", name=f"main{at}", seconds=1) for at in range(5)])

            assert {f"main{at}" for at in range(5)} == {(await ear.next())[2] for _ in range(5)}
    await way.close()


async def test_cluster_is_heard_without_its_first_node(cluster: Cluster) -> None:
    """When the node that the URL names is gone, another one is listened to."""
    way = Servers(cluster.url)
    ada = RedisVotes(way, cluster.url, "ada")
    with pytest.raises(BeganError):
        await ada.listen(lambda _: None, _end)
    cluster.nodes[0].kill()
    ends = []
    async with asyncio.timeout(WITHIN):
        while BeganError not in ends:
            with pytest.raises((BeganError, StateAwayError)) as end:
                await ada.listen(lambda _: None, _end)
            ends.append(end.type)

    assert len(ends) <= len(cluster.nodes)
    await way.close()
