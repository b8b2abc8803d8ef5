"""
Run several workers on the same listeners, and keep them running.

Rule 1: all is bound before the first worker starts, so a port that is taken ends the start.
Rule 2: the supervisor holds the sockets. While a worker is replaced, who has connected waits for
the next one and is not refused; where that takes too long, the other workers get what comes.
Rule 3: a worker ends when its supervisor is gone, however it went.
Rule 4: a worker is a new interpreter, never a fork of this one: that has threads and a loop.
Rule 5: a worker that is signalled by itself finishes what it has begun, and is replaced.

A worker is told what to do over a socket pair, in frames: four bytes of length, then a pickle. The
first is its job; of the others a config is to be served, and a mapping is a question. It says
words, each on a line, and answers: a line with the question's number and a length, and so much
JSON. Questions are made of plain values, and what is not understood is passed over: a worker that
was started after an upgrade of the program may be newer than its supervisor.
"""

import asyncio
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import tempfile
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

import structlog
from aiohttp import web

from vastproxy.app import FLUSH_TIMEOUT, overview, secrets_of, usable_state
from vastproxy.config.schema import Config
from vastproxy.config.units import Listen
from vastproxy.errors import VastproxyError
from vastproxy.observe import log
from vastproxy.observe.metrics import DIRECTORY, count_as, forget_process, summed
from vastproxy.observe.tasks import Tasks
from vastproxy.serving import (
    Ending,
    Serving,
    calm_collector,
    reloaded,
    serving,
    swap,
    with_secret,
)
from vastproxy.web.admin import admin_app
from vastproxy.web.api import add_api
from vastproxy.web.listeners import BACKLOG, listening, name_of, remove_stale_socket
from vastproxy.web.pictures import Picture, all_merged, merged
from vastproxy.web.upstreams_api import Guarding, Turn, add_upstreams

FIRST_PAUSE: Final = 0.1
"""Seconds before the first new start of a worker; they double with each that does not last."""
LONGEST_PAUSE: Final = 10.0
"""Seconds between two starts at most."""
LASTED: Final = 30.0
"""Seconds after which a worker is taken to run well, and pauses begin anew."""
HOLD: Final = 0.5
"""Seconds of a pause up to which connections wait for the next worker."""
MARGIN: Final = 5.0
"""Seconds that a worker may take beyond its time-outs before it is killed."""
PATIENCE: Final = 1.0
"""Seconds that a worker has for an answer."""
MOST_UNANSWERED: Final = 32
"""Questions without an answer after which a worker is asked no more: it is stopped, or stuck."""
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

READY: Final = b"ready\n"
DRAINING: Final = b"draining\n"
ANSWER: Final = b"answer "
_LENGTH: Final = struct.Struct("!I")

Bound = tuple[socket.AddressFamily, Any]
"""A family of addresses, and an address as that family has it."""
Question = Mapping[str, object]
"""What a worker is asked: ``ask`` says what, and ``number`` which question it is."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to do."""

    config: Config
    number: int
    """Its place among the workers, from 1."""
    identity: int
    """Under which it counts: no other process has it while this one lives."""
    sockets: tuple[int, ...]
    """File descriptors to accept on."""


# --- Sockets ------------------------------------------------------------------------------------


class Queues:
    """
    The sockets on which connections wait: of TCP, one for each of *workers*; of Unix, one for all.

    The kernel spreads connections over the sockets of one port (SO_REUSEPORT, Linux 3.9).
    """

    def __init__(self, places: Sequence[Listen], workers: int) -> None:
        self._stack = AsyncExitStack()
        self._open: dict[int, tuple[socket.socket, ...]] = {}
        self._places: list[Bound] = []
        self._shared: list[socket.socket] = []
        # Bound and never listening: they keep the ports while no worker has a socket.
        self._holders: list[socket.socket] = []
        try:
            for each in places:
                self._hold(each)
        except OSError:
            self.close()
            raise
        self.workers = workers

    def _hold(self, place: Listen) -> None:
        if place.path:
            self._shared.append(_bound_path(place.path))
            return
        port = place.port
        for family, (host, _, *scope) in _addresses(place):
            # Without SO_REUSEPORT: another program's listener must not pass for one of ours.
            with _bound(family, (host, port, *scope), place, share=False) as probe:
                found = family, probe.getsockname()
            # Of port 0 the system chose one, which is that of the other family too.
            port = found[1][1]
            self._places.append(found)
            self._holders.append(_bound(*found, place, share=True))

    def names(self) -> list[str]:
        """Give the addresses, as they are asked."""
        return [name_of(each) for each in (*self._holders, *self._shared)]

    def of(self, number: int) -> tuple[socket.socket, ...]:
        """Give the sockets of worker *number*."""
        if number not in self._open:
            self._open[number] = tuple(
                _bound(family, address, None, share=True) for family, address in self._places
            )
        return (*self._open[number], *self._shared)

    def drop(self, number: int) -> None:
        """Close what only worker *number* accepts on: the kernel asks the others then."""
        for each in self._open.pop(number, ()):
            each.close()

    def close(self) -> None:
        """Close all; workers still have theirs."""
        for number in tuple(self._open):
            self.drop(number)
        for each in (*self._holders, *self._shared):
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Queues {self.names()} of workers {sorted(self._open)}>"


def _addresses(place: Listen) -> list[Bound]:
    found = socket.getaddrinfo(
        place.host or None, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    unique = dict.fromkeys((family, address) for family, _, _, _, address in found)
    # Every interface means those of both families, where there are both.
    return [each for each in unique if place.host or _is_there(each[0])]


def _is_there(family: socket.AddressFamily) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.bind(("", 0))
    except OSError:
        return False
    return True


def _bound(
    family: socket.AddressFamily,
    address: Any,  # noqa: ANN401 - each family has its own
    place: Listen | None,
    *,
    share: bool,
) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        shown = place or Listen(*address[:2])
        raise OSError(error.errno, f"{shown}: {error.strerror}") from None
    return made


def _bound_path(path: str) -> socket.socket:
    remove_stale_socket(path)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(path)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise OSError(error.errno, f"unix:{path}: {error.strerror}") from None
    return made


# --- The supervisor's side ----------------------------------------------------------------------


class Backoff:
    """Says how long to wait before a worker is started again."""

    def __init__(self) -> None:
        self._pause = 0.0
        self.failed = 0
        """Starts in a row that came to nothing."""

    def after(self, lived: float, *, was_ready: bool = True) -> float:
        """Give the seconds to wait after a worker that *lived* so many, and whether it served."""
        self.failed = 0 if was_ready else self.failed + 1
        begin_anew = lived >= LASTED or not self._pause
        self._pause = FIRST_PAUSE if begin_anew else min(self._pause * 2, LONGEST_PAUSE)
        return self._pause

    def __repr__(self) -> str:
        return f"<Backoff, last pause: {self._pause:g} s>"


@dataclass(slots=True, eq=False)
class Worker:
    """A process that serves, as its supervisor sees it."""

    number: int
    identity: int
    process: Process
    reader: StreamReader = field(repr=False)
    writer: StreamWriter = field(repr=False)
    began: float = field(default_factory=monotonic, repr=False)
    was_ready: bool = False
    draining: bool = False
    told: bool = False
    """Whether it was told to stop."""
    asked: int = field(default=0, repr=False)
    answered: int = field(default=0, repr=False)
    """The number of the last question that was asked, and of the last that was answered."""
    waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict, repr=False)
    """Those who wait for an answer, by its number."""

    @property
    def ready(self) -> bool:
        """Whether it answers players."""
        return self.was_ready and not self.draining and self.process.returncode is None

    async def wait_ready(self) -> bool:
        """Wait until it is ready, and tell whether it came to that."""
        self.was_ready = await self._word() == READY
        return self.was_ready

    async def wait_leaving(self) -> bool:
        """Wait until it drains, or has ended; and tell whether it drains."""
        self.draining = await self._word() == DRAINING
        for each in self.waiting.values():
            each.cancel()
        return self.draining

    async def _word(self) -> bytes:
        """
        Read its next word, and the answers before that.

        Nothing if it has ended, also with orders that it had not read, or if it talks nonsense.
        """
        with suppress(ConnectionError, asyncio.IncompleteReadError, ValueError):
            while line := await self.reader.readline():
                if line in {READY, DRAINING}:
                    return line
                if line.startswith(ANSWER):
                    await self._take_answer(line.removeprefix(ANSWER))
        return b""

    async def _take_answer(self, head: bytes) -> None:
        number, length = map(int, head.split())
        body = await self.reader.readexactly(length)
        self.answered = max(self.answered, number)
        if (waiting := self.waiting.get(number)) is not None and not waiting.done():
            waiting.set_result(json.loads(body))

    def order(self, content: Config | Question) -> None:
        """Let it serve a config from now on, or be asked what it need not answer."""
        self.writer.write(framed(content))

    async def ask(self, question: Question, seconds: float = PATIENCE) -> Picture | None:
        """Give its answer to *question*; None if it leaves, or none comes within *seconds*."""
        if self.asked - self.answered >= MOST_UNANSWERED:
            return None
        self.asked += 1
        number = self.asked
        answer: asyncio.Future[Picture] = asyncio.get_running_loop().create_future()
        self.waiting[number] = answer
        self.order({**question, "number": number})
        try:
            await asyncio.wait((answer,), timeout=seconds)
        finally:
            del self.waiting[number]
        return answer.result() if answer.done() and not answer.cancelled() else None

    def stop(self, *, hurry: bool = False) -> None:
        """Let it finish what it has begun, and end; or, in a *hurry*, end."""
        if hurry or not (self.told or self.draining):
            self.told = True
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        with suppress(ProcessLookupError):
            self.process.kill()

    async def wait_end(self) -> int:
        """Wait until it has ended; a negative code is a signal's number."""
        code = await self.process.wait()
        self.writer.close()
        return code


class AllUpstreams:
    """
    What all workers know of upstreams, as one.

    *ready* gives the workers to ask, which have *patience* seconds to answer. A breaker that was
    opened by hand is open in workers that start later too, until it is turned again, or the config
    has another in its place.
    """

    def __init__(self, ready: Callable[[], Sequence[Worker]], patience: float = PATIENCE) -> None:
        self._ready = ready
        self._patience = patience
        self._held: dict[str, str] = {}

    async def told(self) -> Picture:
        """Say how upstreams and hosts are, and which workers did not answer."""
        answers, silent = await self._ask({"ask": "upstreams"})
        told = {number: each["value"] for number, each in answers.items() if "value" in each}
        return {
            "upstreams": all_merged(told, "upstreams"),
            "hosts": all_merged(told, "hosts"),
            "unanswered": sorted({*silent, *(answers.keys() - told.keys())}),
        }

    async def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
        """Turn the breaker of the upstream called *name* in all workers."""
        # Before anybody is asked: a worker that gets ready meanwhile must not miss it.
        self._held.pop(name, None)
        if to == "open":
            self._held[name] = reason
        found: dict[int, Picture] = {}
        try:
            answers, silent = await self._ask(_turning(name, to, reason))
            found = {n: each["value"] for n, each in answers.items() if each.get("value")}
        finally:
            if not found:
                self._held.pop(name, None)
        if found:
            return {**merged(found), "unanswered": silent}
        if problems := [each["problem"] for each in answers.values() if "problem" in each]:
            raise ValueError(problems[0])
        return None

    async def _ask(self, question: Question) -> tuple[dict[int, Picture], list[int]]:
        """Give the answers of workers by their numbers, and the numbers of those that gave none."""
        workers = self._ready()
        async with asyncio.TaskGroup() as group:
            asked = {
                each.number: group.create_task(each.ask(question, self._patience))
                for each in workers
            }
        found = {number: each.result() for number, each in asked.items()}
        answers = {number: each for number, each in found.items() if each is not None}
        if not answers:
            problem = f"none of {len(workers)} workers answered within {self._patience:g} s"
            raise TimeoutError(problem if workers else "no worker is ready")
        return answers, [number for number in found if number not in answers]

    def tell(self, worker: Worker) -> None:
        """Let *worker*, which is new, know what was opened by hand."""
        for name, reason in self._held.items():
            worker.order({**_turning(name, "open", reason), "number": 0})

    def forget(self, names: Iterable[str]) -> None:
        """Let those upstreams that are called by one of *names* begin anew."""
        for each in names:
            self._held.pop(each, None)

    def __repr__(self) -> str:
        return f"<AllUpstreams, opened by hand: {sorted(self._held)}>"


def _turning(name: str, to: Turn, reason: str) -> Question:
    return {"ask": "turn", "name": name, "to": to, "reason": reason}


class Supervisor:
    """
    Starts workers for *config* on *queues*, and starts them again.

    *directory* is where they count together.
    """

    def __init__(self, config: Config, queues: Queues, directory: str) -> None:
        self._config = config
        self._queues = queues
        self._directory = directory
        self._workers: set[Worker] = set()
        self._upstreams = AllUpstreams(self._serving)
        self._ending = Ending()
        self._hangup = asyncio.Event()
        self._starting = asyncio.Lock()
        self._log = structlog.get_logger("vastproxy.supervisor")

    async def run(self, reread: Callable[[], Config]) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP serves what *reread* gives."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self._ending.ask)
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        async with AsyncExitStack() as stack:
            # Before the first worker: a state that cannot be used ends the start.
            state = await stack.enter_async_context(usable_state(self._config))
            if self._config.server.admin:
                app = admin_app(
                    lambda: bool(self._ready()), metrics=self._metrics, workers=self._counts
                )
                add_api(app, lambda: overview(self._config, state, secrets_of(self._config)))
                add_upstreams(app, self._upstreams)
                admin = web.AppRunner(app, access_log=None)
                places = await stack.enter_async_context(
                    listening(admin, self._config.server.admin)
                )
                self._log.info("admin.listening", at=places)
            workers = self._config.server.workers
            self._log.info("supervising", workers=workers, at=self._queues.names())
            async with Tasks("reload") as tasks, asyncio.TaskGroup() as group:
                tasks.spawn(self._reload(reread), "SIGHUP")
                for number in range(1, workers + 1):
                    group.create_task(self._keep(number, group), name=f"worker {number}")
                group.create_task(self._stop(), name="stop")
        self._log.info("stopped")

    def _ready(self) -> int:
        if self._ending.asked.is_set():
            return 0
        return len(self._serving())

    def _serving(self) -> list[Worker]:
        found = (each for each in self._workers if each.ready)
        return sorted(found, key=lambda each: each.number)

    def _counts(self) -> dict[str, int]:
        return {"wanted": self._config.server.workers, "ready": self._ready()}

    def _metrics(self) -> bytes:
        return summed(self._directory)

    async def _reload(self, reread: Callable[[], Config]) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            new = await reloaded(reread, self._config)
            if new is None:
                continue
            self._upstreams.forget(rebuilt(self._config, new))
            self._config = new
            for each in self._workers:
                each.order(new)

    async def _keep(self, number: int, group: asyncio.TaskGroup) -> None:
        """Let there be a worker *number* until all are to stop."""
        backoff = Backoff()
        while not self._ending.asked.is_set():
            try:
                pause = await self._life(number, backoff, group)
            except OSError as error:
                pause = backoff.after(0.0, was_ready=False)
                problem = {"problem": str(error), "again_in": pause}
                self._log.error("worker.cannot_start", worker=number, **problem)
            if pause > HOLD:
                self._queues.drop(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ending.asked.wait()

    async def _life(self, number: int, backoff: Backoff, group: asyncio.TaskGroup) -> float:
        """See one worker from its start to its end, and give the seconds until the next."""
        worker = await self._start(number)
        if worker is None:
            return 0.0
        if await worker.wait_ready():
            self._upstreams.tell(worker)
            self._log.info("worker.ready", worker=number, pid=worker.process.pid)
        if await worker.wait_leaving():
            group.create_task(self._see_off(worker), name=f"worker {number} drains")
            return 0.0
        code = await self._see_off(worker)
        pause = backoff.after(monotonic() - worker.began, was_ready=worker.was_ready)
        if not self._ending.asked.is_set():
            self._tell_end(worker, code, pause, backoff.failed)
        return pause

    def _tell_end(self, worker: Worker, code: int, pause: float, failed: int) -> None:
        how = {"signal": signal.Signals(-code).name} if code < 0 else {"code": code}
        who = {"worker": worker.number, "pid": worker.process.pid, "again_in": pause}
        if worker.was_ready:
            self._log.error("worker.ended", **who, **how)
        else:
            self._log.error("worker.cannot_start", **who, **how, failed_starts=failed)

    async def _start(self, number: int) -> Worker | None:
        """Start a worker; None if all are to stop by now."""
        # One at a time: of two that overlap, one would restore the signals that the other blocked,
        # and both could find the same identity free.
        async with self._starting:
            if self._ending.asked.is_set():
                return None
            taken = {each.identity for each in self._workers}
            identity = next(each for each in count(1) if each not in taken)
            sockets = tuple(each.fileno() for each in self._queues.of(number))
            process, channel = await self._process(sockets)
            worker = Worker(number, identity, process, *channel)
            self._workers.add(worker)
        worker.writer.write(framed(Job(self._config, number, identity, sockets)))
        if self._ending.asked.is_set():
            worker.stop()
        return worker

    async def _process(
        self, sockets: tuple[int, ...]
    ) -> tuple[Process, tuple[StreamReader, StreamWriter]]:
        ours, theirs = socket.socketpair()
        try:
            with theirs, signals_blocked():
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "vastproxy.supervisor", str(theirs.fileno())),
                    stdin=DEVNULL,
                    pass_fds=(theirs.fileno(), *sockets),
                    env=self._environment(),
                )
        except OSError:
            ours.close()
            raise
        return process, await asyncio.open_unix_connection(sock=ours)

    def _environment(self) -> dict[str, str]:
        # The same modules as here, and none that lies about in the current directory.
        path = os.pathsep.join(sys.path)
        return {**os.environ, "PYTHONPATH": path, DIRECTORY: self._directory}

    async def _see_off(self, worker: Worker) -> int:
        code = await worker.wait_end()
        self._workers.discard(worker)
        forget_process(worker.identity, self._directory)
        return code

    async def _stop(self) -> None:
        await self._ending.asked.wait()
        self._log.info("draining", workers=len(self._workers))
        self._queues.close()
        for each in self._workers:
            each.stop()
        limit = self._config.server.shutdown_timeout + FLUSH_TIMEOUT + MARGIN
        await self._ending.wait_for(lambda: not self._workers, limit)
        for each in self._workers:
            each.stop(hurry=True)
        await Ending().wait_for(lambda: not self._workers, FLUSH_TIMEOUT + MARGIN)
        for each in self._workers:
            self._log.warning("worker.killed", worker=each.number, pid=each.process.pid)
            each.kill()

    def __repr__(self) -> str:
        counts = self._counts()
        return f"<Supervisor {counts['ready']} of {counts['wanted']} ready, {self._ending!r}>"


async def supervise(config: Config, reread: Callable[[], Config]) -> None:
    """
    Serve *config* with several workers until SIGTERM or SIGINT.

    Raises OSError where what to listen on is taken.
    """
    # In memory where there is such a directory: nothing of this is worth a disk.
    memory = "/dev/shm"  # noqa: S108 - the directory in it is new, and ours alone
    where = memory if os.access(memory, os.W_OK) else None
    with (
        Queues(config.server.listen, config.server.workers) as queues,
        tempfile.TemporaryDirectory(
            prefix="vastproxy-", dir=where, ignore_cleanup_errors=True
        ) as directory,
    ):
        await Supervisor(with_secret(config), queues, directory).run(reread)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Let processes that are started begin with signals blocked, until they know what to do."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def rebuilt(old: Config, new: Config) -> list[str]:
    """Name the upstreams of *old* whose breaker is none of *new*'s: what was known of it is not."""
    return [name for name in old.upstreams if _watched(old, name) != _watched(new, name)]


def _watched(config: Config, name: str) -> object:
    """Give what makes a breaker another one; None where there is no such upstream."""
    found = config.upstreams.get(name)
    return found and (found.endpoint, found.circuit_breaker)


def framed(content: Job | Config | Question) -> bytes:
    """Write *content* as a frame."""
    body = pickle.dumps(content)
    return _LENGTH.pack(len(body)) + body


# --- The worker's side --------------------------------------------------------------------------


def main() -> None:
    """Do the job that comes over the socket whose number is the first argument."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    job = _first(channel)
    if job is None:
        return
    # Ctrl-C goes to every process of a terminal; what follows from it is the supervisor's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.configure(job.config.log.level, job.config.log.format)
    structlog.contextvars.bind_contextvars(worker=job.number)
    count_as(job.identity)
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        factory = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_work(job, channel))
    except (VastproxyError, OSError) as error:
        structlog.get_logger("vastproxy").error("start.failed", problem=str(error))
        raise SystemExit(1) from None


def _first(channel: socket.socket) -> Job | None:
    """Read the job; None if the supervisor is gone already."""
    head = channel.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = channel.recv(length, socket.MSG_WAITALL)
    return _read(body) if len(body) == length else None


def _read(body: bytes) -> Any:  # noqa: ANN401 - what the supervisor wrote
    return pickle.loads(body)  # noqa: S301 - our supervisor wrote it, and nobody else could


async def _work(job: Job, channel: socket.socket) -> None:
    ending = Ending()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    sockets = [socket.socket(fileno=each) for each in job.sockets]
    reader, writer = await asyncio.open_unix_connection(sock=channel)
    async with serving(job.config, ending, sockets=sockets) as now, asyncio.TaskGroup() as group:
        calm_collector()
        orders = group.create_task(_obey((reader, writer), now, ending), name="orders")
        writer.write(READY)
        await ending.asked.wait()
        writer.write(DRAINING)
        orders.cancel()


async def _obey(channel: tuple[StreamReader, StreamWriter], now: Serving, ending: Ending) -> None:
    """Serve each config that comes; without a supervisor, finish what was begun and end."""
    reader, writer = channel
    async with Tasks("answers") as answers:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                match _read(await reader.readexactly(length)):
                    case Config() as config:
                        await swap(now, config)
                    case {"number": int(number)} as question:
                        # A mistake in an answer must not end the worker.
                        answers.spawn(_answer(writer, number, now.guards, question), "answer")
    if not ending.asked.is_set():
        structlog.get_logger("vastproxy").error("supervisor.gone")
        # It would have done so. Files that are open go on as if they were there.
        shutil.rmtree(os.environ[DIRECTORY], ignore_errors=True)
        ending.ask()


async def _answer(writer: StreamWriter, number: int, guards: Guarding, question: Question) -> None:
    body = json.dumps(answer(guards, question)).encode()
    writer.write(b"%s%d %d\n%s" % (ANSWER, number, len(body), body))


def answer(guards: Guarding, question: Question) -> Picture:
    """Give what *guards* say to *question* as a ``value``, or a ``problem``."""
    match question:
        case {"ask": "upstreams"}:
            return {"value": guards.told()}
        case {
            "ask": "turn",
            "name": str(name),
            "to": "open" | "closed" | "reset" as to,
            "reason": str(reason),
        }:
            try:
                return {"value": guards.turn(name, to, reason)}
            except ValueError as error:
                return {"problem": str(error)}
    return {"problem": "this worker does not know what it is asked"}


if __name__ == "__main__":
    # Not this copy, which is called __main__: the supervisor's is pickled under its own name.
    import_module("vastproxy.supervisor").main()
