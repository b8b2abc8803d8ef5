"""
Keeps books beside a state backend while processes are killed, and compares the two.

Rule 1: a worker writes what it is about to confirm before it asks, and what it was told after it
has been told: each a line of a file that it appends to, which outlives ``kill -9``.
Rule 2: afterwards ``acknowledged <= spent <= attempted`` must hold, nothing acknowledged may be
missing, and no limit passed: the counter checks of Jepsen, https://jepsen.io.

Workers are processes of many tasks that reserve, confirm and void on two campaigns, one of which
is small, so that its limit is always near. By hand, for longer, on any server::

    python -m tests.support.ledger_check --url redis://localhost --directory /tmp/books --seconds 20
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

from vastproxy.errors import StateBackendError
from vastproxy.state.base import (
    BUDGET_PREFIX,
    DAY_MS,
    MICROS,
    Account,
    Hold,
    StateBackend,
    money,
)
from vastproxy.state.database import DatabaseBackend
from vastproxy.state.redis import RedisBackend

T = TypeVar("T")

TTL_MS = 60_000
"""Longer than any run: a confirmation of a run that is late is a fault."""

PATIENCE = 5.0
"""Seconds for which a worker repeats a call after the end of the run."""

BATCH = 200
"""Holds of one call of the audit."""

VOIDED = 0.15
"""The share of reservations that are given back."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is run, and against what."""

    url: str
    directory: str
    seconds: float = 6.0
    limit: int = 300
    """Of the small campaign, in ads."""
    processes: int = 4
    tasks: int = 8
    kill_every: float = 0.0
    """Seconds between two kills of a worker; 0: none is killed."""
    pause: float = 0.0
    """Seconds that a task rests after each ad."""
    impatient: bool = False
    """Give up on many calls after two to eight milliseconds, and repeat them."""
    naive: bool = False
    """Look what was spent, and then add to it: what a backend is for, done wrong."""

    @property
    def small(self) -> Account:
        """The campaign with a limit."""
        return Account("campaign", "small")

    @property
    def open(self) -> Account:
        """The campaign without one."""
        return Account("campaign", "open")


def open_backend(url: str, clock: Callable[[], int] | None = None) -> StateBackend:
    """Make the backend of *url*."""
    if url.startswith("redis"):
        return RedisBackend(url, clock=clock)
    return DatabaseBackend(url, clock=clock)


# --- Workers -------------------------------------------------------------------------------------


class Book:
    """A file of a worker: what it is about to do, and what it was told."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __repr__(self) -> str:
        return f"<Book {self._file}>"

    def note(self, word: str, account: Account, operation: str) -> None:
        """Append a line, by one call of the system: it is there wholly or not at all."""
        os.write(self._file, f"{word} {account.name} {operation}\n".encode())


class Worker:
    """Serves ads as fast as it can."""

    def __init__(self, run: Run, name: str, ends: float) -> None:
        self._run = run
        self._name = name
        self._ends = ends
        self._book = Book(Path(run.directory) / f"{name}.book")
        self._chance = random.Random(name)

    def __repr__(self) -> str:
        return f"<Worker {self._name}>"

    async def work(self) -> None:
        """Serve until the end of the run."""
        async with open_backend(self._run.url) as backend, asyncio.TaskGroup() as group:
            for task in range(self._run.tasks):
                group.create_task(self._serve(backend, f"{self._name}.{task}"))

    async def _serve(self, backend: StateBackend, name: str) -> None:
        number = 0
        while time.monotonic() < self._ends:
            number += 1
            account = self._chance.choice([self._run.small, self._run.open])
            limit = self._run.limit if account == self._run.small else None
            hold = Hold(account, f"{name}.{number}", (money(1, limit),), TTL_MS, DAY_MS)
            await (self._show_naively if self._run.naive else self._show)(backend, hold)
            await asyncio.sleep(self._run.pause)

    async def _show(self, backend: StateBackend, hold: Hold) -> None:
        verdicts = await self._insist(lambda: backend.reserve([hold]))
        if verdicts is None:
            return
        if not verdicts[0].granted:
            self._book.note("refused", hold.account, hold.operation)
        elif self._chance.random() < VOIDED:
            await self._insist(lambda: backend.void([hold]))
        else:
            self._book.note("intent", hold.account, hold.operation)
            if await self._insist(lambda: backend.confirm([hold])) is not None:
                self._book.note("ack", hold.account, hold.operation)

    async def _show_naively(self, backend: StateBackend, hold: Hold) -> None:
        key, (claim,) = BUDGET_PREFIX + hold.account.name, hold.claims
        spent = await backend.get_spend(key) * MICROS
        if claim.limit is None or spent + claim.amount <= claim.limit:
            self._book.note("intent", hold.account, hold.operation)
            await backend.add_spend(key, Decimal(claim.amount) / MICROS)
            self._book.note("ack", hold.account, hold.operation)

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Repeat *call* until it is answered; None where that does not happen in time."""
        while time.monotonic() < self._ends + PATIENCE:
            try:
                async with asyncio.timeout(self._patience()):
                    return await call()
            except TimeoutError:
                await asyncio.sleep(0.02 * self._chance.random())
            except StateBackendError:
                # A server that starts is kept busy by those who ask whether it has.
                await asyncio.sleep(0.2 * self._chance.random())
        return None

    def _patience(self) -> float:
        return self._chance.choice([0.002, 0.004, 0.008, 1, 1]) if self._run.impatient else 5


# --- Processes -----------------------------------------------------------------------------------


def run_workers(run: Run) -> int:
    """Run workers to their end, killing and replacing some; how many ended with an error."""
    ends = time.monotonic() + run.seconds
    running = {_fork(run, f"{at}.0", ends): at for at in range(run.processes)}
    generation = 0
    while run.kill_every and time.monotonic() + run.kill_every < ends:
        time.sleep(run.kill_every)
        generation += 1
        victim = random.choice(list(running))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        at = running.pop(victim)
        running[_fork(run, f"{at}.{generation}", ends)] = at
    return sum(os.waitpid(each, 0)[1] != 0 for each in running)


def _fork(run: Run, name: str, ends: float) -> int:
    """Start a worker; forked, it need not import anything, and works at once."""
    if child := os.fork():
        return child
    code = 1
    try:
        asyncio.run(Worker(run, name, ends).work())
        code = 0
    except BaseException:  # noqa: BLE001 - a child that goes on here would be a second parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# --- The audit -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Findings:
    """What the books say of one campaign, and what the backend says."""

    limit: int | None
    refused: int
    intents: int
    """Confirmations that were begun."""
    acks: int
    """Confirmations that were acknowledged."""
    spent: int
    counted: int
    """Operations that the backend knows as confirmed."""
    lost: int
    """Operations that were acknowledged, and that it does not know."""
    reserved: int
    """What is still reserved after the time of all reservations."""

    @property
    def over_serve(self) -> int:
        """Ads beyond the limit."""
        return 0 if self.limit is None else max(0, self.spent - self.limit)

    @property
    def faults(self) -> list[str]:
        """Everything that does not add up."""
        said = {
            f"over-serve {self.over_serve}": self.over_serve == 0,
            f"spent {self.spent}, of {self.acks} acknowledged": self.acks <= self.spent,
            f"spent {self.spent}, of {self.intents} attempted": self.spent <= self.intents,
            f"spent {self.spent}, in {self.counted} operations": self.spent == self.counted,
            f"acknowledged and lost {self.lost}": self.lost == 0,
            f"reserved for ever {self.reserved}": self.reserved == 0,
        }
        return [each for each, holds in said.items() if not holds]


async def audit(run: Run) -> dict[str, Findings]:
    """Compare the books of *run* with the backend, campaign by campaign."""
    later = int(time.time() * 1000) + TTL_MS + 1_000
    books = _read_books(Path(run.directory))
    async with open_backend(run.url, clock=lambda: later) as backend:
        return {
            account.name: await _audit(backend, account, limit, books)
            for account, limit in ((run.small, run.limit), (run.open, None))
        }


def _read_books(directory: Path) -> list[tuple[str, str, str]]:
    lines = [
        line
        for path in sorted(directory.glob("*.book"))
        for line in path.read_text("ascii").splitlines()
    ]
    return [(word, name, operation) for word, name, operation in map(str.split, lines)]


async def _audit(
    backend: StateBackend,
    account: Account,
    limit: int | None,
    books: Sequence[tuple[str, str, str]],
) -> Findings:
    said = {
        word: {operation for each, name, operation in books if (each, name) == (word, account.name)}
        for word in ("refused", "intent", "ack")
    }
    (stands,) = await backend.levels(account, [money(1)])
    known = await _known(backend, account, sorted(said["intent"]))
    return Findings(
        limit=limit,
        refused=len(said["refused"]),
        intents=len(said["intent"]),
        acks=len(said["ack"]),
        spent=stands.counted,
        counted=len(known),
        lost=len(said["ack"] - known),
        reserved=stands.reserved,
    )


async def _known(backend: StateBackend, account: Account, operations: Sequence[str]) -> set[str]:
    """Give those *operations* that are confirmed: which is asked by confirming them again."""
    known = set()
    for at in range(0, len(operations), BATCH):
        some = operations[at : at + BATCH]
        bookings = await backend.confirm([Hold(account, each, (money(1),)) for each in some])
        known |= {each for each, how in zip(some, bookings, strict=True) if how == "again"}
    return known


async def wait_most(run: Run, backend: StateBackend, ends: float) -> int:
    """Watch the small campaign until *ends*; give the most that was counted and reserved."""
    most = 0
    while time.monotonic() < ends:
        try:
            (stands,) = await backend.levels(run.small, [money(1)])
            most = max(most, stands.counted + stands.reserved)
        except StateBackendError:
            # The server is being killed; that is what the run is for.
            pass
        await asyncio.sleep(0.05)
    return most


# --- The whole -----------------------------------------------------------------------------------


async def run_and_audit(
    run: Run, meanwhile: Callable[[], None] | None = None
) -> tuple[int, dict[str, Findings]]:
    """
    Run the workers in a process of their own, and do the audit.

    *meanwhile* is called in a thread. Gives the most that was taken of the small campaign at any
    time, and the findings, by the name of the campaign.
    """
    async with open_backend(run.url) as backend:
        await backend.ping()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.support.ledger_check", *_arguments(run)
        )
        ends = time.monotonic() + run.seconds
        async with asyncio.TaskGroup() as group:
            if meanwhile:
                group.create_task(asyncio.to_thread(meanwhile))
            watching = group.create_task(wait_most(run, backend, ends))
        if code := await process.wait():
            raise RuntimeError(f"{code} workers ended with an error")
    return watching.result(), await audit(run)


def _arguments(run: Run) -> Iterator[str]:
    yield from ("--json", json.dumps(dataclasses.asdict(run)), "--workers-only")


def _run_of(arguments: argparse.Namespace) -> Run:
    if arguments.json:
        return Run(**json.loads(arguments.json))
    return Run(
        arguments.url,
        arguments.directory,
        arguments.seconds,
        limit=arguments.limit,
        kill_every=arguments.kill_every,
    )


def main() -> int:
    """Run from a command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.ledger_check")
    parser.add_argument("--url")
    parser.add_argument("--directory", help="an empty one")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--limit", type=int, default=2_000)
    parser.add_argument("--kill-every", type=float, default=0.7)
    parser.add_argument("--json", help=argparse.SUPPRESS)
    parser.add_argument("--workers-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run = _run_of(arguments)
    if arguments.workers_only:
        return run_workers(run)
    most, findings = asyncio.run(run_and_audit(run))
    sys.stdout.write(f"most taken of the small campaign: {most} of {run.limit}\n")
    for name, each in findings.items():
        sys.stdout.write(f"{name}: {each}\n  {each.faults or 'adds up'}\n")
    return 1 if any(each.faults for each in findings.values()) else 0


@contextmanager
def stepped_clock(seconds: float) -> Iterator[None]:
    """Let this process' wall clock be *seconds* off; its monotonic clock runs on."""
    time_, time_ns = time.time, time.time_ns
    time.time = lambda: time_() + seconds
    time.time_ns = lambda: time_ns() + int(seconds * 1e9)
    try:
        yield
    finally:
        time.time, time.time_ns = time_, time_ns


if __name__ == "__main__":
    sys.exit(main())
