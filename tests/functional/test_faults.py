"""
Every fault of :mod:`tests.support.hostile`, at the entry, in the middle and at the end of a chain.

All chains run at the beginning, a batch at a time, through one proxy; the tests then judge what
came of each. One address stands for many ad servers here, so this proxy has no breakers; a second
one, with those that there are by default, has to keep the same promises to its players.
"""

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from lxml import etree

from tests.chaos.watched import EVENT, watched_proxy
from tests.support.ad_server import AdServer, Reply, in_thread
from tests.support.hostile import (
    ALL_FAULTS,
    DRIP,
    ENDLESS,
    EVIL_COOKIE,
    FAULTS,
    LATE_SECOND_REPLY,
    SMUGGLED,
    Fault,
    HostileServer,
    Place,
    Trap,
    a_wrapper,
    an_inline,
)
from tests.support.proxy import ROOT, Proxy, running_proxy

HOPS = 3
"""Documents of each chain: two wrappers and an InLine."""
DEADLINE = 0.5
IN_TIME = DEADLINE + 0.1 + 0.05
"""The deadline, what the proxy may take after it, and what the client of this test takes."""
TRIES = 2
"""
A chain that was late, or had no time left for its fault, has a second try: one busy moment of the
machine is no failure. The last one is judged.
"""
BATCH = 12
"""Chains at once."""
GRACE = 0.3
"""Seconds in which a ping that is sent twice would show."""
MIB = 1024
LAG = 0.05
"""Seconds for which the proxy's loop may be busy with one thing."""
LOOKED_AT = 10
"""Times that the proxy's loop must have been looked at, for the result to say something."""
SPARE_TASKS = 2
"""What a proxy may be doing for itself when its tasks are counted."""
UNNOTICED = 0.15
"""Seconds that a viewer may wait for an ad that takes 2 ms, when another ad server misbehaves."""
BYSTANDER_TRIES = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One fault at one hop."""

    fault: Fault
    hop: int

    def __str__(self) -> str:
        return f"{self.fault.name}-{self.hop}"


@dataclass(slots=True)
class Try:
    """One run of a case, and what came of it."""

    case: Case
    name: str
    status: int = 0
    body: bytes = b""
    seconds: float = 0.0
    reached: bool = False
    """Whether the fault has happened at all."""
    pings: tuple[tuple[str, ...], ...] = ()
    """By hop, the codes that the hop's Error was requested with."""

    @property
    def ad_came(self) -> bool:
        """Whether the chain's own ad is the answer."""
        return (self.name,) == ad_ids(self.body)

    @property
    def counts(self) -> bool:
        """Whether the machine was quick enough for the try to say anything."""
        ad_is_missing = self.case.fault.harmless and () == ad_ids(self.body)
        return self.reached and self.seconds <= IN_TIME and not ad_is_missing

    @property
    def expected_pings(self) -> int:
        """How many wrappers have to be told."""
        return 0 if self.ad_came else self.case.hop - 1

    @property
    def times_told(self) -> tuple[int, ...]:
        """How often each hop's Error was requested."""
        return tuple(len(queries) for queries in self.pings)

    def key(self, hop: int) -> str:
        """Give the key of the document of *hop*."""
        return f"{self.name}-{hop}"


@dataclass(slots=True)
class Trial:
    """What all the chains together left behind."""

    tries: dict[Case, list[Try]] = field(default_factory=dict)
    passed: dict[Fault, list[Try]] = field(default_factory=dict)
    """Each fault at the entry of a route that only passes documents on."""
    forbidden_connections: int = 0
    forged_headers: list[str] = field(default_factory=list)
    forged_cookies: list[str] = field(default_factory=list)
    rss: tuple[int, int] = (0, 0)
    """KiB before and after."""
    descriptors: tuple[int, int] = (0, 0)
    """Open files of the proxy before and after."""
    tasks: tuple[int, int] = (0, 0)
    """Of the proxy's loop, before and after."""
    lags: list[float] = field(default_factory=list)
    """How long the proxy's loop was busy with one thing, at the most, in each fifth of a second."""
    after_late_reply: tuple[Try, ...] = ()
    """Chains without a fault, on connections on which something came that nobody asked for."""
    last: Try | None = None
    """A chain without a fault, after all the others."""


CASES = [Case(fault, hop) for fault in FAULTS for hop in range(1, HOPS + 1)]


def ad_ids(body: bytes) -> tuple[str, ...]:
    """Give the ids of the ads of a VAST document."""
    return tuple(ad.get("id", "") for ad in etree.fromstring(body).findall("{*}Ad"))


def a_config(hostile: HostileServer, breaker: Mapping[str, object]) -> dict[str, object]:
    """
    Give a config with an upstream and a route for each place that a URL can point to.

    *breaker* is added to the upstreams and to what is for hops.
    """
    names = {place: place.name.lower() for place in Place}
    return {
        "egress": {"allow": ["127.0.0.1/32"], **breaker},
        "upstreams": {
            name: {
                "endpoint": f"{hostile.base(place)}/{{rest}}",
                "session_params": [],
                "timeout": "2s",
                **breaker,
            }
            for place, name in names.items()
        },
        "routes": [
            {
                "path": f"/{mode}/{name}/{{rest}}",
                "mode": mode,
                "upstreams": [name],
                "deadline": f"{DEADLINE * 1000:.0f}ms",
            }
            for name in names.values()
            for mode in ("resolve", "passthrough")
        ],
    }


NO_BREAKER: Mapping[str, object] = {"circuit_breaker": {"mode": "off"}}


def lay_out(run: Try, hostile: HostileServer, errors: AdServer) -> str:
    """Store the chain's documents and give what of the proxy's path comes after the mode."""
    faults = dict.fromkeys(range(1, HOPS + 1), "ok") | {run.case.hop: run.case.fault.name}
    urls = {hop: hostile.url(name, run.key(hop)) for hop, name in faults.items()}
    for hop in range(1, HOPS):
        error = errors.url(f"/{run.key(hop)}?code=[ERRORCODE]")
        hostile.documents[run.key(hop)] = a_wrapper(urls[hop + 1], errors=[error])
    error = errors.url(f"/{run.key(HOPS)}?code=[ERRORCODE]")
    hostile.documents[run.key(HOPS)] = an_inline(run.name, errors=[error])
    place = run.case.fault.place if run.case.hop == 1 else Place.PLAIN
    return f"/{place.name.lower()}/{faults[1]}/{run.key(1)}"


@dataclass(slots=True)
class Runner:
    """What a trial works with."""

    proxy: Proxy
    player: aiohttp.ClientSession
    hostile: HostileServer
    errors: AdServer
    numbers: Iterator[int] = field(default_factory=itertools.count)

    async def run(self, case: Case, mode: str = "resolve") -> Try:
        """Ask once for the chain of *case* by a route of *mode*."""
        run = Try(case, f"{case}-{next(self.numbers)}")
        path = lay_out(run, self.hostile, self.errors)
        begin = time.perf_counter()
        async with self.player.get(f"{self.proxy.base}/{mode}{path}") as response:
            run.status = response.status
            run.body = await response.read()
        run.seconds = time.perf_counter() - begin
        asked = any(each.key == run.key(case.hop) for each in self.hostile.seen)
        run.reached = asked or case.fault.place is not Place.PLAIN
        return run

    async def run_all(self, cases: list[Case], mode: str = "resolve") -> dict[Case, list[Try]]:
        """Ask for each of *cases*, and again for those that do not count."""
        tries: dict[Case, list[Try]] = {case: [] for case in cases}
        late = cases
        for _ in range(TRIES):
            for start in range(0, len(late), BATCH):
                runs = [self.run(case, mode) for case in late[start : start + BATCH]]
                for run in await asyncio.gather(*runs):
                    tries[run.case].append(run)
            late = [case for case, runs in tries.items() if not runs[-1].counts]
        return tries

    async def after_late_reply(self) -> tuple[Try, ...]:
        """Let a second reply come on an idle connection; give what is answered afterwards."""
        await self.run(Case(LATE_SECOND_REPLY, HOPS))
        await asyncio.sleep(2 * DRIP)
        return tuple([await self.run(Case(FAULTS[0], 1)) for _ in range(3)])

    async def collect_pings(self, tries: list[Try]) -> None:
        """Wait until every ping that is due has come, and note them all."""
        due = sum(run.expected_pings for run in tries)
        await asyncio.to_thread(wait_until, lambda: len(self.errors.requests) >= due)
        await asyncio.sleep(GRACE)
        for run in tries:
            run.pings = tuple(
                tuple(each.query for each in self.errors.seen(f"/{run.key(hop)}"))
                for hop in range(1, HOPS + 1)
            )


def rss(pid: int) -> int:
    """Give the resident memory of process *pid* in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def descriptors(pid: int) -> int:
    """Give the number of open files of process *pid*."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - only the number counts


def wait_until(condition: Callable[[], bool], within: float = 5.0) -> None:
    """Wait in a thread until *condition* holds, at most *within* seconds."""
    ends = time.monotonic() + within
    while not condition() and time.monotonic() < ends:
        time.sleep(0.02)


def watched(proxy: Proxy, name: str, since: int = 0) -> list[float]:
    """Give a figure of all the lines about the loop, from the one at *since*."""
    return [float(each[name]) for each in proxy.records(event=EVENT)[since:]]


def tasks(proxy: Proxy) -> int:
    """Give the number of tasks of the proxy, as the next line about the loop has it."""
    known = len(watched(proxy, "tasks"))
    wait_until(lambda: len(watched(proxy, "tasks")) > known + 1)
    return int(watched(proxy, "tasks")[-1])


@contextlib.asynccontextmanager
async def the_proxy(
    config: Mapping[str, object], directory: Path, hostile: HostileServer
) -> AsyncIterator[Proxy]:
    """
    Run the proxy without keeping the loop from the servers that it talks to.

    It trusts the authority of *hostile*, so that a certificate is wrong in one way alone.
    """
    authority = directory / "authority.pem"
    hostile.ca.cert_pem.write_to_path(str(authority))
    environment = {"SSL_CERT_FILE": str(authority)}
    with contextlib.ExitStack() as stack:
        proxy = await asyncio.to_thread(
            stack.enter_context, watched_proxy(config, directory, environment=environment)
        )
        yield proxy
        await asyncio.to_thread(stack.close)


@contextlib.asynccontextmanager
async def a_runner(
    directory: Path, hostile: HostileServer, breaker: Mapping[str, object]
) -> AsyncIterator[Runner]:
    """Run a proxy in front of *hostile*, and all that its chains need; it is warm."""
    async with contextlib.AsyncExitStack() as stack:
        errors = await stack.enter_async_context(AdServer(fallback=Reply()))
        config = a_config(hostile, breaker)
        proxy = await stack.enter_async_context(the_proxy(config, directory, hostile))
        unlimited = aiohttp.TCPConnector(limit=0)
        player = await stack.enter_async_context(aiohttp.ClientSession(connector=unlimited))
        runner = Runner(proxy, player, hostile, errors)
        await asyncio.gather(*(runner.run(Case(FAULTS[0], 1)) for _ in range(BATCH)))
        yield runner


async def try_all(directory: Path) -> Trial:
    """Run every case against one proxy."""
    trial = Trial()
    async with contextlib.AsyncExitStack() as stack:
        trap = stack.enter_context(Trap("127.0.0.2"))
        forbidden = f"http://127.0.0.2:{trap.port}/"
        hostiles = await stack.enter_async_context(contextlib.AsyncExitStack())
        hostile = await hostiles.enter_async_context(HostileServer(forbidden=forbidden))
        runner = await stack.enter_async_context(a_runner(directory, hostile, NO_BREAKER))
        proxy = runner.proxy
        before = rss(proxy.pid), descriptors(proxy.pid), await asyncio.to_thread(tasks, proxy)
        looked_at = len(watched(proxy, "lag"))

        trial.tries = await runner.run_all(CASES)
        passed = await runner.run_all([case for case in CASES if case.hop == 1], "passthrough")
        trial.passed = {case.fault: runs for case, runs in passed.items()}

        await runner.collect_pings([run for runs in trial.tries.values() for run in runs])
        trial.after_late_reply = await runner.after_late_reply()
        trial.last = await runner.run(Case(FAULTS[0], 1))
        trial.lags = watched(proxy, "lag", looked_at)
        trial.forbidden_connections = trap.reached
        trial.forged_headers = [each.name for each in hostile.seen if each.header("x-evil")]
        trial.forged_cookies = [
            each.name for each in hostile.seen if EVIL_COOKIE in (each.header("cookie") or "")
        ]
        await hostiles.aclose()
        await asyncio.to_thread(wait_until, lambda: descriptors(proxy.pid) <= before[1])
        trial.rss = before[0], rss(proxy.pid)
        trial.descriptors = before[1], descriptors(proxy.pid)
        trial.tasks = before[2], await asyncio.to_thread(tasks, proxy)
    return trial


async def try_guarded(directory: Path) -> dict[Case, list[Try]]:
    """Run every case against a proxy whose breakers are as they are by default."""
    async with HostileServer() as hostile, a_runner(directory, hostile, {}) as runner:
        return await runner.run_all(CASES)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Give what came of all the chains."""
    return asyncio.run(try_all(tmp_path_factory.mktemp("faults")))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Try]]:
    """Give what came of all the chains behind breakers."""
    return asyncio.run(try_guarded(tmp_path_factory.mktemp("guarded")))


def test_faults_are_told_apart() -> None:
    """Each fault has a name and a description of its own, and at least one outcome."""
    assert len(FAULTS) == len({each.name for each in FAULTS})
    assert len(FAULTS) == len({each.description for each in FAULTS})
    assert [] == [each.name for each in FAULTS if not each.codes]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answer(trial: Trial, case: Case) -> None:
    """Whatever an ad server does, the player is answered a VAST document with status 200."""
    for run in trial.tries[case]:
        assert 200 == run.status
        assert "VAST" == etree.QName(etree.fromstring(run.body)).localname


@pytest.mark.parametrize("case", CASES, ids=str)
def test_time(trial: Trial, case: Case) -> None:
    """Whatever an ad server does, the player waits for the deadline and no longer."""
    assert IN_TIME >= min(run.seconds for run in trial.tries[case])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ad(trial: Trial, case: Case) -> None:
    """The ad comes where the fault is harmless, none where it is fatal, and never another one."""
    last = trial.tries[case][-1]

    assert last.ad_came or not case.fault.harmless
    assert not last.ad_came or not case.fault.fatal
    for run in trial.tries[case]:
        assert run.ad_came or () == ad_ids(run.body)
        assert SMUGGLED not in run.body


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_codes(trial: Trial, case: Case) -> None:
    """Each wrapper above a fault is told its code once; nobody is told where the ad came."""
    last = trial.tries[case][-1]
    told = {query for queries in last.pings for query in queries}

    assert last.expected_pings * (1,) + (HOPS - last.expected_pings) * (0,) == last.times_told
    assert told <= {f"code={code}" for code in case.fault.codes if code}
    assert len(told) <= 1
    for run in trial.tries[case]:
        assert max(run.times_told) <= 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_passed_on(trial: Trial, fault: Fault) -> None:
    """A route that passes documents on passes no fault on: VAST, status 200, in time."""
    runs = trial.passed[fault]

    assert {200} == {run.status for run in runs}
    assert {"VAST"} == {etree.QName(etree.fromstring(run.body)).localname for run in runs}
    assert IN_TIME >= min(run.seconds for run in runs)
    assert () != ad_ids(runs[-1].body) or not fault.harmless
    assert () == ad_ids(runs[-1].body) or not fault.fatal


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_guarded(guarded: dict[Case, list[Try]], fault: Fault) -> None:
    """Behind breakers a fault harms players as little: VAST, status 200, in time, no other ad."""
    for case in (each for each in CASES if each.fault is fault):
        runs = guarded[case]

        assert {200} == {run.status for run in runs}
        assert {"VAST"} == {etree.QName(etree.fromstring(run.body)).localname for run in runs}
        assert {(), (runs[-1].name,)} >= {ad_ids(runs[-1].body)}
        assert IN_TIME >= min(run.seconds for run in runs)


def test_late_second_reply(trial: Trial) -> None:
    """What comes on an idle connection is nobody's answer."""
    for run in trial.after_late_reply:
        assert SMUGGLED not in run.body
        assert run.ad_came


def test_nothing_forged(trial: Trial) -> None:
    """No hop leads to a forbidden address, and no field or cookie is smuggled in."""
    assert 0 == trial.forbidden_connections
    assert [] == trial.forged_headers
    assert [] == trial.forged_cookies


def test_no_second_request(tmp_path: Path) -> None:
    """A request that reached an ad server is not repeated: it may have been counted."""
    with in_thread(AdServer(fallback=Reply(reset=True))) as server:
        config = {
            "upstreams": {"only": {"endpoint": server.url("/{rest}")}},
            "routes": [{"path": "/{rest}", "upstreams": ["only"]}],
        }
        with running_proxy(config, tmp_path) as proxy:
            answer = proxy.get("/ad")

        assert () == ad_ids(answer.body)
        assert 1 == len(server.requests)


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """Give a proxy in front of two programs: one that floods it, and one that does not."""
    with contextlib.ExitStack() as stack:
        bases = {name: stack.enter_context(hostile_program()) for name in ("flood", "calm")}
        config = {
            "upstreams": {
                name: {"endpoint": f"{base}/{{rest}}", "session_params": [], "timeout": "2s"}
                for name, base in bases.items()
            },
            "routes": [
                {"path": f"/{name}/{{rest}}", "upstreams": [name], "deadline": "500ms"}
                for name in bases
            ],
        }
        yield stack.enter_context(running_proxy(config, tmp_path_factory.mktemp("flood")))


@contextlib.contextmanager
def hostile_program() -> Iterator[str]:
    """Run the hostile server as a program, so that its work is not this one's; give its base."""
    command = [sys.executable, "-u", "-m", "tests.chaos", "server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:  # noqa: S603
        assert program.stdout is not None
        lines = [program.stdout.readline() for _ in ALL_FAULTS]
        yield lines[0].partition("/ok/")[0]
        program.terminate()


@pytest.mark.parametrize("fault", ENDLESS, ids=lambda fault: fault.name)
def test_bystander(flooded: Proxy, fault: Fault) -> None:
    """While one ad server floods the proxy, the viewers of another one do not wait for it."""
    waits = (slowest_bystander(flooded, fault) for _ in range(BYSTANDER_TRIES))

    assert any(UNNOTICED > each for each in waits)


def slowest_bystander(proxy: Proxy, fault: Fault) -> float:
    """Ask for *fault* three times at once, and for another ad meanwhile; give the longest wait."""
    proxy.get("/calm/ok/ad")
    with ThreadPoolExecutor(3) as pool:
        floods = [pool.submit(proxy.get, f"/flood/{fault.name}/ad") for _ in range(3)]
        waits: list[float] = []
        while not waits or not all(each.done() for each in floods):
            began = time.perf_counter()
            assert ("ad",) == ad_ids(proxy.get("/calm/ok/ad").body)
            waits.append(time.perf_counter() - began)
    return max(waits)


def test_nothing_left_behind(trial: Trial) -> None:
    """After all the faults the proxy answers as before, and holds no more memory or sockets."""
    assert trial.last is not None
    assert trial.last.ad_came
    assert trial.rss[0] + 50 * MIB > trial.rss[1]
    assert trial.descriptors[0] + 10 >= trial.descriptors[1]
    assert trial.tasks[0] + SPARE_TASKS >= trial.tasks[1]


def test_loop_is_not_kept_busy(trial: Trial) -> None:
    """Whatever ad servers do, the proxy's loop does one thing for a few milliseconds at most."""
    assert LOOKED_AT < len(trial.lags)
    assert LAG > max(trial.lags)
