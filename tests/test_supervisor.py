"""The supervisor's parts: where connections wait, when to start again, what workers are told."""

import asyncio
import json
import pickle
import socket
import stat
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIG_BLOCK, pthread_sigmask
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from tests.support.proxy import a_config
from vastproxy.config.load import loads
from vastproxy.config.schema import Config
from vastproxy.config.units import Listen
from vastproxy.serving import Ending
from vastproxy.supervisor import (
    DRAINING,
    MOST_UNANSWERED,
    READY,
    SIGNALS,
    AllUpstreams,
    Backoff,
    Job,
    Queues,
    Worker,
    _first,
    _obey,
    answer,
    framed,
    rebuilt,
    signals_blocked,
)
from vastproxy.web.pictures import Picture
from vastproxy.web.upstreams_api import Turn

ANY = Listen("127.0.0.1", 0)


def a_parsed_config() -> Config:
    """Build a config with a secret and with what is parsed from text."""
    upstream = {"endpoint": "http://a.example/", "params": {"slot": "{query.slot}"}}
    route = {"path": "/ad", "upstreams": ["main"], "viewer": ["query:uid"]}
    found = a_config({"main": upstream}, [route], server={"secret": ["correct horse battery"]})
    return loads(yaml.safe_dump(found), source="config.yaml", environ={})


@pytest.fixture
def queues() -> Iterator[Queues]:
    """Give the queues of two workers on a port that the system chose."""
    with Queues([ANY], 2) as found:
        yield found


def test_pauses_double() -> None:
    """A worker that dies at once is started after pauses that double, up to ten seconds."""
    backoff = Backoff()

    assert [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10] == [backoff.after(1) for _ in range(9)]
    assert "<Backoff, last pause: 10 s>" == repr(backoff)


def test_pauses_begin_anew() -> None:
    """After a worker that lived for thirty seconds, pauses begin anew."""
    backoff = Backoff()

    assert [0.1, 0.2, 0.1, 0.2] == [backoff.after(lived) for lived in (0, 29.9, 30, 0)]


def test_failed_starts_are_counted() -> None:
    """Starts that came to nothing are counted, until a worker was ready."""
    backoff = Backoff()
    counts = []
    for was_ready in (False, False, True, False):
        backoff.after(1, was_ready=was_ready)
        counts.append(backoff.failed)

    assert [1, 2, 0, 1] == counts


def test_workers_share_a_port(queues: Queues) -> None:
    """Each worker has a socket of its own, on one port; connections reach all of them."""
    sockets = {number: queues.of(number)[0] for number in (1, 2)}
    for each in sockets.values():
        each.listen(100)
        each.settimeout(0)
    (address,) = {each.getsockname() for each in sockets.values()}
    players = [socket.create_connection(address) for _ in range(64)]
    reached = Counter(number for number, each in sockets.items() for _ in _accepted(each))
    for each in players:
        each.close()

    assert [f"http://127.0.0.1:{address[1]}"] == queues.names()
    assert 64 == reached.total()
    assert 5 < min(reached[1], reached[2])


def _accepted(listener: socket.socket) -> Iterator[None]:
    try:
        while True:
            listener.accept()[0].close()
            yield None
    except BlockingIOError:
        return


def test_dropped_queue(queues: Queues) -> None:
    """Where a worker's socket is dropped, the others get all; later it has one again."""
    (gone,), (stays,) = queues.of(1), queues.of(2)
    for each in (gone, stays):
        each.listen(100)
    stays.settimeout(0)
    queues.drop(1)
    players = [socket.create_connection(stays.getsockname()) for _ in range(20)]
    found = len(list(_accepted(stays)))
    for each in players:
        each.close()

    assert (20, -1) == (found, gone.fileno())
    assert stays.getsockname() == queues.of(1)[0].getsockname()
    assert queues.of(1) == queues.of(1)


def test_connections_wait_for_the_next_worker(queues: Queues) -> None:
    """A worker that ends closes its copy only: who has connected is answered by the next."""
    (kept,) = queues.of(1)
    worker = kept.dup()
    worker.listen(10)
    with socket.create_connection(kept.getsockname()) as player:
        worker.close()
        with kept.dup() as other, other.accept()[0] as taken:
            taken.sendall(b"x")
            assert b"x" == player.recv(1)


def test_ports_are_kept_without_workers(queues: Queues) -> None:
    """While no worker has a socket the port stays taken, and nobody is answered there."""
    address = queues.of(1)[0].getsockname()
    queues.drop(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)


@pytest.mark.parametrize("share", [False, True])
def test_taken_port(*, share: bool) -> None:
    """A port where somebody listens is refused, also if that program would share it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(share))
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            Queues([ANY, Listen("127.0.0.1", port)], 2)


def test_every_interface() -> None:
    """Without a host, one port of every interface is bound, of IPv4 and of IPv6 alike."""
    with Queues([Listen("", 0)], 2) as queues:
        families = [each.family for each in queues.of(1)]
        names = queues.names()

    assert socket.AF_INET in families
    assert len(families) == len(set(families)) == len(names)
    assert 1 == len({each.rpartition(":")[2] for each in names})


def test_ipv6() -> None:
    """An address of IPv6 is bound, and told in brackets."""
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with Queues([Listen("::1", 0)], 2) as queues:
        (name,) = queues.names()
        port = queues.of(2)[0].getsockname()[1]

    assert f"http://[::1]:{port}" == name


def test_unix_socket_is_one_for_all(tmp_path: Path) -> None:
    """All workers accept on the same Unix socket, which listens at once."""
    path = tmp_path / "players"
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(str(path))
    with Queues([Listen(path=str(path))], 2) as queues:
        shared = queues.of(1)
        with socket.socket(socket.AF_UNIX) as player:
            player.connect(str(path))
        queues.drop(1)

        assert shared == queues.of(2)
        assert 0 <= shared[0].fileno()
        assert [f"unix:{path}"] == queues.names()
    assert stat.S_ISSOCK(path.stat().st_mode)


def test_file_in_place_of_a_socket(tmp_path: Path) -> None:
    """A file that is no socket is not removed, and the message names it."""
    path = tmp_path / "data"
    path.write_text("precious")
    with pytest.raises(OSError, match=f"unix:{path}: Address already in use"):
        Queues([Listen(path=str(path))], 2)

    assert "precious" == path.read_text()


def test_job_arrives_whole() -> None:
    """A worker gets its job as it was sent, with its secrets, which no message shows."""
    job = Job(a_parsed_config(), 2, 3, (7, 8))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(framed(job))
        found = _first(theirs)

    assert job == found
    assert "correct horse" not in repr(job)


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x09abc"])
def test_job_that_does_not_come(sent: bytes) -> None:
    """Where the supervisor is gone before the job is there, there is none."""
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(sent)
        assert _first(theirs) is None


def test_config_is_told_again() -> None:
    """A config survives the way to a worker."""
    config = a_parsed_config()

    assert config == pickle.loads(framed(config)[4:])  # noqa: S301 - written here


def test_signals_are_blocked_for_a_while() -> None:
    """Processes start with signals blocked; afterwards all is as it was."""
    before = pthread_sigmask(SIG_BLOCK, ())
    with signals_blocked():
        inside = pthread_sigmask(SIG_BLOCK, ())

    assert set(SIGNALS) <= inside
    assert before == pthread_sigmask(SIG_BLOCK, ())


# --- Questions and answers ----------------------------------------------------------------------


@dataclass
class SomeGuards:
    """The guards of a worker: two upstreams, of which one has no breaker."""

    state: str = "closed"
    hosts: int = 0
    turned: list[tuple[str, Turn, str]] = field(default_factory=list)

    def told(self) -> dict[str, list[Picture]]:
        """Say how they are."""
        hosts = [{"name": f"{each}.example", "endpoint": "x" * 1000} for each in range(self.hosts)]
        return {"upstreams": [self.main(), {"name": "house", "breaker": None}], "hosts": hosts}

    def main(self) -> Picture:
        """Say how one is."""
        return {"name": "main", "breaker": {"state": self.state}, "in_flight": 1}

    def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
        """Turn one."""
        self.turned.append((name, to, reason))
        if name == "house":
            raise ValueError("the upstream house has no breaker (its mode is off)")
        if name != "main":
            return None
        self.state = to
        return self.main()


Channel = tuple[StreamReader, StreamWriter]


@asynccontextmanager
async def a_channel() -> AsyncIterator[tuple[Channel, Channel]]:
    """Open a socket pair: the supervisor's end, and the worker's."""
    ends = [await asyncio.open_unix_connection(sock=each) for each in socket.socketpair()]
    try:
        yield ends[0], ends[1]
    finally:
        for _, writer in ends:
            writer.close()
            await writer.wait_closed()


class Fleet:
    """Workers that are tasks here; *stack* ends them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.workers: list[Worker] = []
        self.ends: list[Channel] = []
        self._stack = stack

    async def silent(self) -> Worker:
        """Add a worker that is ready, and of which nobody sees to the other end."""
        ours, theirs = await self._stack.enter_async_context(a_channel())
        number = len(self.workers) + 1
        process: Any = SimpleNamespace(returncode=None)
        worker = Worker(number, number, process, *ours, was_ready=True)
        self.workers.append(worker)
        self.ends.append(theirs)
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        leaving = group.create_task(worker.wait_leaving())
        self._stack.callback(leaving.cancel)
        return worker

    async def add(self, guards: SomeGuards) -> Worker:
        """Add a worker that answers by its *guards*."""
        worker = await self.silent()
        group = await self._stack.enter_async_context(asyncio.TaskGroup())
        now: Any = SimpleNamespace(guards=guards)
        obeying = group.create_task(_obey(self.ends[-1], now, Ending()))
        self._stack.callback(obeying.cancel)
        return worker

    def ready(self) -> list[Worker]:
        """Give those that are ready."""
        return [each for each in self.workers if each.ready]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """Give workers that are none yet."""
    async with AsyncExitStack() as stack:
        yield Fleet(stack)


async def asked(end: Channel) -> Any:
    """Read what a worker is told next, at its *end*."""
    length = int.from_bytes(await end[0].readexactly(4))
    return pickle.loads(await end[0].readexactly(length))  # noqa: S301 - written here


def an_answer(number: int, value: Any) -> bytes:
    """Build an answer as a worker writes it."""
    body = json.dumps(value).encode()
    return b"answer %d %d\n" % (number, len(body)) + body


async def test_question(fleet: Fleet) -> None:
    """A worker answers what it is asked, also with a megabyte, and several at one time."""
    worker = await fleet.add(SomeGuards(hosts=1000))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(worker.ask({"ask": "upstreams"})) for _ in range(5)]
    found = [each.result() for each in tasks]

    assert [{"value": SomeGuards(hosts=1000).told()}] * 5 == found
    assert {} == worker.waiting


async def test_no_answer(fleet: Fleet) -> None:
    """A worker that does not answer in time is waited for no longer; a late answer is no harm."""
    worker = await fleet.silent()
    silence = await worker.ask({"ask": "upstreams"}, 0.01)
    end = fleet.ends[0]
    end[1].write(an_answer(1, "late") + an_answer(99, "nobody asked"))
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(worker.ask({"ask": "upstreams"}))
        numbers = [(await asked(end))["number"] for _ in range(2)]
        end[1].write(an_answer(2, {"value": "in time"}))

    assert (None, {"value": "in time"}) == (silence, asking.result())
    assert [1, 2] == numbers


async def test_words_between_answers(fleet: Fleet) -> None:
    """Words that are not known are passed over; a worker that drains answers no more."""
    worker = await fleet.silent()
    fleet.ends[0][1].write(b"hello\n" + an_answer(1, {"value": 1}) + b"what else\n" + DRAINING)
    found = await worker.ask({"ask": "upstreams"}), await worker.ask({"ask": "upstreams"})

    assert ({"value": 1}, None) == found
    assert worker.draining


@pytest.mark.parametrize("sent", [DRAINING, b"answer x y\n", b"answer 1 3\n]]]", b"x" * 100_000])
async def test_worker_leaves(fleet: Fleet, sent: bytes) -> None:
    """Who asks a worker that drains, or talks nonsense, waits no longer than it may."""
    worker = await fleet.silent()
    fleet.ends[0][1].write(sent)

    assert await worker.ask({"ask": "upstreams"}, 5.0) is None


async def test_ready_after_answers(fleet: Fleet) -> None:
    """A worker is ready by its word, whatever it says before; one that ends never is."""
    worker, other = await fleet.silent(), await fleet.silent()
    for each in fleet.workers:
        each.was_ready = False
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"a new word\n" + an_answer(0, None) + READY)
        worker.reader, writer = await asyncio.open_unix_connection(sock=ours)
        assert await worker.wait_ready()
        writer.close()
    fleet.ends[1][1].write(b"answer 1 100\nshort")
    fleet.ends[1][1].write_eof()

    assert not other.was_ready


async def test_stuck_worker_is_asked_no_more(fleet: Fleet) -> None:
    """What a stuck worker is to answer does not grow without bound; it may come back."""
    worker = await fleet.silent()
    for _ in range(MOST_UNANSWERED + 5):
        await worker.ask({"ask": "upstreams"}, 0.0)
    number = worker.asked
    seen = worker.waiting[1] = asyncio.get_running_loop().create_future()
    fleet.ends[0][1].write(an_answer(1, None))
    await seen
    await worker.ask({"ask": "upstreams"}, 0.0)

    assert (MOST_UNANSWERED, MOST_UNANSWERED + 1) == (number, worker.asked)


def test_answers() -> None:
    """A worker answers what it knows; a wrong turn is a problem, and so is a new question."""
    guards = SomeGuards()
    turning = {"ask": "turn", "name": "main", "to": "open", "reason": "by hand"}

    assert {"value": guards.told()} == answer(guards, {"ask": "upstreams", "since": "later"})
    assert {"value": {**guards.main(), "breaker": {"state": "open"}}} == answer(guards, turning)
    assert {"value": None} == answer(guards, {**turning, "name": "nobody"})
    assert "has no breaker" in answer(guards, {**turning, "name": "house"})["problem"]
    assert {"this worker does not know what it is asked"} == {
        answer(guards, each)["problem"]
        for each in ({}, {"ask": "weather"}, {**turning, "to": "ajar"}, {"ask": "turn"})
    }


async def test_mistake_in_an_answer(fleet: Fleet) -> None:
    """A worker whose answer fails goes on, and answers the next question."""
    guards = SomeGuards()
    worker = await fleet.add(guards)
    guards.told = lambda: {"upstreams": [{"name": object()}]}  # type: ignore[method-assign]
    failed = await worker.ask({"ask": "upstreams"}, 0.05)
    del guards.told

    assert failed is None
    assert {"value": guards.told()} == await worker.ask({"ask": "upstreams"})


async def test_what_is_no_question(fleet: Fleet) -> None:
    """A worker passes over what it does not understand."""
    worker = await fleet.add(SomeGuards())
    for each in ({}, {"number": "x"}, [1], "word"):
        worker.order(cast("dict[str, object]", each))

    assert await worker.ask({"ask": "upstreams"}) is not None


async def test_all_workers(fleet: Fleet) -> None:
    """Operators are told what all ready workers know, as one, and by each."""
    for state in ("closed", "open"):
        await fleet.add(SomeGuards(state))
    told = await AllUpstreams(fleet.ready).told()
    main, house = told["upstreams"]

    assert ("open", 2, 2) == (
        main["breaker"]["state"],
        main["breaker"]["worker"],
        main["in_flight"],
    )
    assert ["closed", "open"] == [each["breaker"]["state"] for each in main["workers"]]
    assert (None, [], []) == (house["breaker"], told["hosts"], told["unanswered"])


async def test_silent_worker_is_named(fleet: Fleet) -> None:
    """A worker that does not answer is left out, and named; a draining one is not asked."""
    guards = SomeGuards()
    await fleet.add(guards)
    await fleet.silent()
    (await fleet.silent()).draining = True
    whole = AllUpstreams(fleet.ready, 0.2)
    told = await whole.told()
    turned = await whole.turn("main", "open", "by hand")

    assert [2] == told["unanswered"]
    assert [1] == [each["worker"] for each in told["upstreams"][0]["workers"]]
    assert turned is not None
    assert ([2], "open") == (turned["unanswered"], turned["breaker"]["state"])


async def test_worker_that_does_not_know(fleet: Fleet) -> None:
    """A worker that does not understand the question counts as one that did not answer."""
    await fleet.add(SomeGuards())
    await fleet.silent()
    fleet.ends[1][1].write(an_answer(1, {"problem": "what?"}))

    assert [2] == (await AllUpstreams(fleet.ready).told())["unanswered"]


async def test_nobody_answers(fleet: Fleet) -> None:
    """Where no worker answers that is said, and how many there are."""
    whole = AllUpstreams(fleet.ready, 0.05)
    with pytest.raises(TimeoutError, match="no worker is ready"):
        await whole.told()
    await fleet.silent()
    with pytest.raises(TimeoutError, match=r"none of 1 workers answered within 0\.05 s"):
        await whole.turn("main", "open", "by hand")

    assert "<AllUpstreams, opened by hand: []>" == repr(whole)


async def test_turning_in_all_workers(fleet: Fleet) -> None:
    """A breaker is turned in every worker; no such upstream and no breaker are told apart."""
    guards = [SomeGuards(), SomeGuards()]
    for each in guards:
        await fleet.add(each)
    whole = AllUpstreams(fleet.ready)
    found = await whole.turn("main", "reset", "new machine")

    assert found is not None
    assert ([], {"reset": 2}) == (found["unanswered"], found["breaker"]["states"])
    assert [[("main", "reset", "new machine")]] * 2 == [each.turned for each in guards]
    assert await whole.turn("nobody", "open", "by hand") is None
    with pytest.raises(ValueError, match="has no breaker"):
        await whole.turn("house", "open", "by hand")
    assert "<AllUpstreams, opened by hand: []>" == repr(whole)


async def test_new_worker_is_told(fleet: Fleet) -> None:
    """What was opened by hand is open in a worker that starts later, until it is turned back."""
    first, later, last = SomeGuards(), SomeGuards(), SomeGuards()
    await fleet.add(first)
    whole = AllUpstreams(fleet.ready)
    await whole.turn("main", "open", "no contract")
    whole.tell(await fleet.add(later))
    held = repr(whole)
    told = await whole.told()
    await whole.turn("main", "closed", "a contract")
    whole.tell(await fleet.add(last))
    await whole.told()

    assert "<AllUpstreams, opened by hand: ['main']>" == held
    assert {"open": 2} == told["upstreams"][0]["breaker"]["states"]
    assert ("main", "open", "no contract") == later.turned[0]
    assert [] == last.turned


async def test_new_breaker_is_not_held(fleet: Fleet) -> None:
    """An upstream that a reload changes begins anew, in workers that start later too."""
    await fleet.add(SomeGuards())
    whole = AllUpstreams(fleet.ready)
    await whole.turn("main", "open", "no contract")
    whole.forget(["main", "nobody"])
    later = SomeGuards()
    whole.tell(await fleet.add(later))
    await whole.told()

    assert [] == later.turned


def test_rebuilt_upstreams() -> None:
    """An upstream begins anew with another endpoint, or when it is gone."""
    old = a_parsed_config()
    main = old.upstreams["main"]
    moved = main.model_copy(update={"endpoint": "http://b.example/"})
    patient = main.model_copy(update={"max_body": 1_000_000})

    assert [[], ["main"], ["main"], []] == [
        rebuilt(old, old.model_copy(update={"upstreams": each}))
        for each in ({"main": main}, {"main": moved}, {"other": main}, {"main": patient})
    ]
