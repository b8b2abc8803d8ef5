"""Several worker processes are one proxy: for players, for operators, and for signals."""

import http.client
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.functional.conftest import StartProxy
from tests.support.ad_server import AdServer, Reply
from tests.support.documents import an_inline
from tests.support.proxy import Proxy, a_config, ask, run_vastproxy, running_proxy, started_proxy

WITHIN = 20.0
"""Seconds in which what is waited for must have happened: many times what it takes."""


def a_shared_config(
    ad_server: AdServer, directory: Path, *, workers: int = 2, **server: Any
) -> dict[str, Any]:
    """Build a config of several workers, with a state that they can share."""
    return a_config(
        {"main": ad_server.url("/ad")},
        [a_route("/first")],
        server={"workers": workers, **server},
        state=f"sqlite:///{directory}/state.db",
        log={"format": "json"},
    )


def a_route(path: str) -> dict[str, Any]:
    """Build a route at *path*."""
    return {"path": path, "upstreams": ["main"]}


@pytest.fixture(scope="module")
def shared(
    ad_server: AdServer, start_module_proxy: StartProxy, tmp_path_factory: pytest.TempPathFactory
) -> Proxy:
    """Run a proxy of two workers for the tests of this module."""
    proxy = start_module_proxy(a_shared_config(ad_server, tmp_path_factory.mktemp("state")))
    wait_for(lambda: 2 == ready(proxy))
    return proxy


@pytest.fixture(autouse=True)
def an_ad(ads: AdServer) -> None:
    """Let the ad server have an ad."""
    ads.fallback = Reply(an_inline())


def wait_for(happened: Callable[[], object], within: float = WITHIN) -> None:
    """Wait until something *happened*; or raise TimeoutError."""
    ends = time.monotonic() + within
    while not happened():
        if time.monotonic() > ends:
            raise TimeoutError
        time.sleep(0.02)


def ready(proxy: Proxy) -> int:
    """Give the number of workers that are ready, as operators are told."""
    return int(ask(proxy.admin, "/readyz").json()["workers"]["ready"])


def workers(proxy: Proxy) -> dict[int, int]:
    """Give the process id of the newest worker in each place."""
    return {each["worker"]: each["pid"] for each in proxy.records(event="worker.ready")}


def is_alive(pid: int) -> bool:
    """Tell whether process *pid* runs; one that has ended and was not waited for does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}


def metric(proxy: Proxy, name: str) -> float:
    """Add up all values of the metric called *name*, with labels or without."""
    lines = ask(proxy.admin, "/metrics").body.decode().splitlines()
    return sum(
        float(each.split()[-1]) for each in lines if each.startswith((f"{name} ", f"{name}{{"))
    )


@dataclass
class Traffic:
    """Players that keep their connections, and ask for *path* until they are told to stop."""

    base: str
    path: str = "/first"
    statuses: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: int = 0
    """Connections that nobody took any more: the listeners are closed."""
    ended: threading.Event = field(default_factory=threading.Event)

    def play(self) -> None:
        """Be one player."""
        where = urlsplit(self.base)
        while not self.ended.is_set():
            connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=30)
            try:
                connection.connect()
            except ConnectionRefusedError:
                self.refused += 1
                return
            try:
                self._keep_asking(connection)
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
            finally:
                connection.close()

    def _keep_asking(self, connection: http.client.HTTPConnection) -> None:
        told_to_close = False
        while not told_to_close and not self.ended.is_set():
            connection.request("GET", self.path)
            reply = connection.getresponse()
            reply.read()
            self.statuses.append(reply.status)
            told_to_close = reply.will_close


@contextmanager
def traffic(proxy: Proxy, players: int = 6, path: str = "/first") -> Iterator[Traffic]:
    """Let *players* ask *proxy* for *path* while the block runs, and have them gone behind it."""
    found = Traffic(proxy.base, path)
    threads = [threading.Thread(target=found.play) for _ in range(players)]
    for each in threads:
        each.start()
    try:
        wait_for(lambda: len(found.statuses) > players)
        yield found
    finally:
        found.ended.set()
        for each in threads:
            each.join(timeout=30)


def test_every_worker_answers(shared: Proxy) -> None:
    """All workers take part in answering on one port."""
    with traffic(shared, players=16):
        wait_for(lambda: {1, 2} == {each["worker"] for each in shared.records(event="request")})


def test_health_is_told_for_the_whole(shared: Proxy) -> None:
    """The operator's side tells how many workers there should be, and how many are ready."""
    told = ask(shared.admin, "/readyz")

    assert {"status": "ready", "workers": {"wanted": 2, "ready": 2}} == told.json()
    assert HTTPStatus.OK == ask(shared.admin, "/healthz").status


def test_metrics_are_told_for_the_whole(shared: Proxy) -> None:
    """What workers count is added up, and equals what players were answered."""
    before = metric(shared, "vastproxy_requests_total")
    with traffic(shared, players=16) as found:
        wait_for(lambda: len(found.statuses) > 60)
    asked = len(found.statuses)

    assert asked == metric(shared, "vastproxy_requests_total") - before
    assert asked <= metric(shared, "vastproxy_request_seconds_count")
    assert asked <= metric(shared, "vastproxy_ads_total")
    assert 1 == metric(shared, "vastproxy_state_up")


def test_killed_worker_is_replaced(shared: Proxy) -> None:
    """After a kill -9 of a worker the other serves on, a new one comes, and counts go on."""
    before = workers(shared)
    counted = metric(shared, "vastproxy_requests_total")
    with traffic(shared) as found:
        os.kill(before[1], signal.SIGKILL)
        told = shared.wait_record(event="worker.ended", worker=1, pid=before[1])
        wait_for(lambda: 1 == ready(shared))
        served = len(found.statuses)
        wait_for(lambda: len(found.statuses) > served)
        wait_for(lambda: 2 == ready(shared))

    assert ("SIGKILL", 0.1) == (told["signal"], told["again_in"])
    assert before[1] != workers(shared)[1]
    assert before[2] == workers(shared)[2]
    assert {200} == set(found.statuses)
    assert counted < metric(shared, "vastproxy_requests_total")


def test_rolling_restart(shared: Proxy) -> None:
    """A worker that is told to stop by itself is replaced, and no player notices."""
    before = workers(shared)
    with traffic(shared) as found:
        for number, pid in before.items():
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda number=number, pid=pid: pid != workers(shared)[number])
        wait_for(lambda: 2 == ready(shared))

    assert ([], {200}) == (found.errors, set(found.statuses))
    assert not any(is_alive(each) for each in before.values())


def test_reload_of_a_wrong_file(shared: Proxy) -> None:
    """A wrong file changes nothing, and every mistake in it is logged."""
    good = shared.path.read_text()
    shared.reload({"routes": [a_route("no-slash"), {"path": "/x", "upstreams": ["nobody"]}]})
    told = shared.wait_record(event="reload.refused", level="error")
    shared.path.write_text(good)

    assert ["routes.0.path" in told["problems"][0], "nobody" in told["problems"][1]] == [True, True]
    assert HTTPStatus.OK == shared.get("/first").status
    assert HTTPStatus.NOT_FOUND == shared.get("/x").status


def test_reload_of_a_new_route(shared: Proxy) -> None:
    """SIGHUP serves a new route in every worker, without an error for who asks meanwhile."""
    with traffic(shared) as found:
        shared.reload({"routes": [a_route("/first"), a_route("/second")]})
        for number in (1, 2):
            shared.wait_record(event="reloaded", worker=number, routes=["/first", "/second"])
        statuses = [shared.get("/second").status for _ in range(20)]

    assert [HTTPStatus.OK] * 20 == statuses
    assert ([], {200}) == (found.errors, set(found.statuses))


def test_reload_of_what_needs_a_restart(shared: Proxy) -> None:
    """What only a restart changes is named in one line, and the rest is served."""
    server = {"listen": shared.base.removeprefix("http://"), "admin": None, "workers": 3}
    shared.reload({"server": server, "routes": [a_route("/first"), a_route("/third")]})
    told = shared.wait_record(event="reload.needs_restart")
    for number in (1, 2):
        shared.wait_record(event="reloaded", worker=number, routes=["/first", "/third"])

    assert ["server.admin", "server.workers"] == told["settings"]
    assert HTTPStatus.OK == shared.get("/third").status
    assert 2 == ready(shared)


def breaker_of(proxy: Proxy, state: str = "") -> dict[str, Any]:
    """Turn the breaker of all workers, or only look at it; and give what operators are told."""
    path = "/api/upstreams/main" + (f"/breaker?state={state}" if state else "")
    told: dict[str, Any] = ask(proxy.admin, path, method="POST" if state else "GET").json()
    return told


def test_breaker_of_all_workers(ad_server: AdServer, tmp_path: Path) -> None:
    """
    A breaker that is opened by hand is open in every worker, in one that starts later too, and
    over a reload; operators are told all of them as one, and it is closed in all of them.
    """
    with running_proxy(a_shared_config(ad_server, tmp_path), tmp_path) as proxy:
        wait_for(lambda: 2 == ready(proxy))
        calm = ask(proxy.admin, "/api/upstreams").json()
        opened = breaker_of(proxy, "open")
        before = workers(proxy)
        os.kill(before[1], signal.SIGKILL)
        proxy.wait_record(event="worker.ended", pid=before[1])
        wait_for(lambda: 2 == ready(proxy))
        replaced = breaker_of(proxy)
        proxy.reload({"routes": [a_route("/second")]})
        wait_for(lambda: 2 == len(proxy.records(event="reloaded")))
        asked = len(ad_server.seen("/ad"))
        with traffic(proxy, path="/second") as found:
            wait_for(lambda: len(found.statuses) > 40)
        refused = breaker_of(proxy)
        closed = breaker_of(proxy, "closed")
        open_ones = metric(proxy, "vastproxy_breaker_open")

    assert (["main"], [], []) == (
        [each["name"] for each in calm["upstreams"]],
        calm["hosts"],
        calm["unanswered"],
    )
    assert [{"open": 2}] * 2 == [each["breaker"]["states"] for each in (opened, replaced)]
    assert [1, 2] == [each["worker"] for each in replaced["workers"]]
    assert asked == len(ad_server.seen("/ad"))
    assert len(found.statuses) == refused["calls"]["breaker"]
    assert refused["calls"]["breaker"] == sum(
        each["calls"]["breaker"] for each in refused["workers"]
    )
    assert ({"closed": 2}, 0) == (closed["breaker"]["states"], open_ones)


def test_stopped_worker_is_named(ad_server: AdServer, tmp_path: Path) -> None:
    """A worker that hangs does not keep operators waiting: the others are told, and it is named."""
    with running_proxy(a_shared_config(ad_server, tmp_path), tmp_path) as proxy:
        wait_for(lambda: 2 == ready(proxy))
        pid = workers(proxy)[2]
        os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            told = ask(proxy.admin, "/api/upstreams").json()
            took = time.monotonic() - began
            opened = breaker_of(proxy, "open")
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_for(lambda: {"open": 2} == breaker_of(proxy)["breaker"].get("states"))
        after = ask(proxy.admin, "/api/upstreams").json()

    assert ([2], [2], []) == (told["unanswered"], opened["unanswered"], after["unanswered"])
    assert [1] == [each["worker"] for each in told["upstreams"][0]["workers"]]
    assert 1 <= took < 5


def test_stop_under_traffic(ad_server: AdServer, tmp_path: Path) -> None:
    """SIGTERM ends four workers with code 0, and no request that was taken is lost."""
    with running_proxy(a_shared_config(ad_server, tmp_path, workers=4), tmp_path) as proxy:
        wait_for(lambda: 4 == ready(proxy))
        pids = workers(proxy)
        with traffic(proxy) as found:
            proxy.terminate()
            code = proxy.wait_exit()

    assert 0 == code
    assert ([], {200}) == (found.errors, set(found.statuses))
    assert 6 == found.refused
    assert not any(is_alive(each) for each in pids.values())


def test_unix_socket_and_lost_supervisor(ad_server: AdServer, tmp_path: Path) -> None:
    """Workers share a Unix socket; when their supervisor is killed they end by themselves."""
    config = a_shared_config(ad_server, tmp_path, listen=f"unix:{tmp_path}/players")
    with ExitStack() as stack:
        proxy = stack.enter_context(killable(running_proxy(config, tmp_path)))
        wait_for(lambda: 2 == ready(proxy))
        statuses = {ask_unix(tmp_path / "players", "/first") for _ in range(10)}
        pids = workers(proxy)
        proxy.process.kill()
        wait_for(lambda: not any(is_alive(each) for each in pids.values()), within=2.0)

        assert {HTTPStatus.OK} == statuses
        assert {1, 2} == set(pids)
        assert 2 == len(proxy.records(event="supervisor.gone"))


@contextmanager
def killable(running: Any) -> Iterator[Proxy]:
    """Run a proxy that need not end with exit code 0."""
    with suppress(AssertionError), running as proxy:
        yield proxy


def ask_unix(path: Path, target: str) -> int:
    """Ask over a Unix socket, and give the status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(
            f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        return int(connection.recv(100).split()[1])


def test_single_process_reloads(ads: AdServer, start_proxy: StartProxy, tmp_path: Path) -> None:
    """One process reloads too: what is in flight ends as it began, what comes is served anew."""
    config = a_shared_config(ads, tmp_path, workers=1) | {"state": "memory://"}
    proxy = start_proxy(config)
    ads.replies["/ad"] = Reply(an_inline(), delay=1.0)
    slow: list[int] = []
    asking = threading.Thread(target=lambda: slow.append(proxy.get("/first").status))
    asking.start()
    wait_for(lambda: ads.seen("/ad"))
    del ads.replies["/ad"]
    proxy.reload({"routes": [a_route("/second")]})
    proxy.wait_record(event="reloaded")

    assert ([404, 200], []) == ([proxy.get(each).status for each in ("/first", "/second")], slow)
    asking.join(timeout=10)
    assert [200] == slow
    assert {"status": "ready"} == ask(proxy.admin, "/readyz").json()
    assert 2 == metric(proxy, "vastproxy_requests_total")


def test_second_signal_hurries(ads: AdServer, tmp_path: Path) -> None:
    """A second SIGTERM does not wait for what is in flight."""
    slow = {"endpoint": ads.url("/ad"), "timeout": "25s"}
    config = a_shared_config(ads, tmp_path, shutdown_timeout="25s") | {
        "upstreams": {"main": slow},
        "routes": [a_route("/first") | {"deadline": "25s"}],
    }
    ads.replies["/ad"] = Reply(an_inline(), delay=25.0)
    with running_proxy(config, tmp_path) as proxy:
        wait_for(lambda: 2 == ready(proxy))
        with ExitStack() as stack:
            connection = stack.enter_context(
                socket.create_connection(proxy.base.removeprefix("http://").split(":"), timeout=20)
            )
            connection.sendall(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n")
            wait_for(lambda: ads.seen("/ad"))
            proxy.terminate()
            proxy.wait_record(event="draining", in_flight=1)
            began = time.monotonic()
            proxy.terminate()

            assert 0 == proxy.wait_exit()
            assert 12 > time.monotonic() - began


def test_workers_that_cannot_start(ad_server: AdServer, tmp_path: Path) -> None:
    """Workers that die at their start are started again and again; the end is clean even so."""
    (tmp_path / "file").write_text("This is no directory.")
    config = {**a_shared_config(ad_server, tmp_path), "journal": str(tmp_path / "file" / "journal")}
    with started_proxy(config, tmp_path) as proxy:
        told = [proxy.wait_record(event="worker.cannot_start", failed_starts=n) for n in (1, 2)]
        readyz = ask(proxy.admin, "/readyz")

    assert [(1, 0.1), (1, 0.2)] == [(each["code"], each["again_in"]) for each in told]
    assert HTTPStatus.SERVICE_UNAVAILABLE == readyz.status
    assert {"wanted": 2, "ready": 0} == readyz.json()["workers"]
    assert "Not a directory" in proxy.records(event="start.failed")[0]["problem"]


def test_taken_port(ad_server: AdServer, tmp_path: Path) -> None:
    """A port that another process has is one clear message and exit code 1, before any worker."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        path = tmp_path / "config.yaml"
        config = a_shared_config(ad_server, tmp_path, listen=f"127.0.0.1:{port}", admin=None)
        path.write_text(yaml.safe_dump(config))
        ended = run_vastproxy("serve", "-c", str(path))

    assert 1 == ended.returncode
    assert f"vastproxy cannot listen: [Errno 98] 127.0.0.1:{port}: Address already in use" in (
        ended.stderr.decode()
    )
    assert b"Traceback" not in ended.stderr
