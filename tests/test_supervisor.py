"""The supervisor's parts: where connections wait, when to start again, what workers are told."""

import pickle
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from signal import SIG_BLOCK, pthread_sigmask

import pytest
import yaml

from tests.support.proxy import a_config
from vastproxy.config.load import loads
from vastproxy.config.schema import Config
from vastproxy.config.units import Listen
from vastproxy.supervisor import (
    SIGNALS,
    Backoff,
    Job,
    Queues,
    _first,
    framed,
    signals_blocked,
)

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
