"""
One run: for each document size all programs side by side, in turns.

Rule 1: a program's figures count only if its answers were right before and after.
Rule 2: counters are read while every program is stopped, so that they belong together.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from benchmarks.accounting import Sample, Usage, usage
from benchmarks.load import Plan, Target
from benchmarks.processes import ROOT, cores, free_ports, halted, started, take_turns
from benchmarks.programs import PATH, Place, Program
from benchmarks.rig import Players, Upstream, fetch, playing, serving
from benchmarks.table import Row

_START_PATIENCE = 20.0
"""Seconds for a program to answer for the first time."""
_STEP = 0.1
"""Seconds between two tries."""
_EXPLAIN_PATIENCE = 5.0
"""Seconds for a program that did not start to say why."""
_SETTLE = 0.03
"""Seconds until the players have counted what was on its way."""
_LEAST = 0.8
"""Of the looked-at answer's length, what every answer must have: filled macros differ in length."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run measures. Times are in seconds."""

    sizes: tuple[int, ...]
    """Kilobytes of each document."""
    rounds: int
    seconds: float
    """Running time of each program in a round."""
    slot: float
    """One turn."""
    connections: int
    """Of the players, to each program."""
    warm: float
    """Running time of each program before the first round."""


@dataclass(frozen=True, slots=True)
class Runner:
    """A program that runs, and the *length* of its answer in bytes."""

    program: Program
    pid: int
    port: int
    length: int

    @property
    def target(self) -> Target:
        """What the players are to ask."""
        return Target(self.program.name, self.port, int(self.length * _LEAST))


@dataclass(frozen=True, slots=True)
class Reading:
    """A program's counters at one moment."""

    usage: Usage
    good: int
    bad: int
    connections: int


class StartError(Exception):
    """A program did not come up, or answered something else than was asked for."""


def measure(size: int, programs: Sequence[Program], settings: Settings) -> list[Row]:
    """Measure all *programs* with documents of *size* kilobytes: one row for each."""
    under_test, rest = cores()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vastproxy-bench-")))
        upstream = stack.enter_context(serving(size, [each.tag for each in programs], rest))
        rows: dict[str, Row] = {}
        runners: list[Runner] = []
        for program, port in zip(programs, free_ports(len(programs)), strict=True):
            if reason := program.missing():
                rows[program.name] = Row(program.name, size, skipped=f"skipped: {reason}")
                continue
            place = Place(port, upstream.hops(program.tag), folder)
            try:
                runners.append(start(stack, program, place, under_test))
            except StartError as error:
                rows[program.name] = _broken(program, size, str(error))
        rows |= _measured(size, runners, upstream, settings)
        return [rows[program.name] for program in programs]


def start(stack: ExitStack, program: Program, place: Place, core: int | None) -> Runner:
    """Start *program*, to be ended with *stack*, and wait until it gives a right answer."""
    command = program.command(place)
    process = stack.enter_context(started(command, core))
    patience = time.monotonic() + _START_PATIENCE
    while True:
        if process.poll() is not None:
            raise StartError(f"did not start: {_explain(command)}")
        try:
            body = fetch(place.port, PATH)
            break
        except (OSError, HTTPException) as error:
            if time.monotonic() > patience:
                raise StartError(f"does not answer: {error}") from error
            time.sleep(_STEP)
    if fault := program.fault(body):
        raise StartError(f"wrong answer: {fault}")
    return Runner(program, process.pid, place.port, len(body))


def _explain(command: Sequence[str]) -> str:
    """Run *command* once more and give the last thing it said."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_EXPLAIN_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return "it ended, and did not when tried again"
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return f"{said[-1].strip() if said else 'no word'} (exit status {done.returncode})"


def _measured(
    size: int, runners: Sequence[Runner], upstream: Upstream, settings: Settings
) -> dict[str, Row]:
    samples = _rounds(runners, upstream, settings)
    rows: dict[str, Row] = {}
    for runner in runners:
        name = runner.program.name
        fault = _fault_afterwards(runner)
        rows[name] = (
            _broken(runner.program, size, f"afterwards: {fault}")
            if fault
            else Row(name, size, tuple(samples[name]))
        )
    return rows


def _rounds(
    runners: Sequence[Runner], upstream: Upstream, settings: Settings
) -> Mapping[str, list[Sample]]:
    """Load all *runners* at once, and take the samples of all rounds."""
    plan = Plan(PATH, settings.connections, tuple(runner.target for runner in runners))
    pids = [runner.pid for runner in runners]
    samples: dict[str, list[Sample]] = {runner.program.name: [] for runner in runners}
    order = random.Random()
    with halted(pids), playing(plan, cores()[1]) as players:
        take_turns(pids, settings.warm, settings.slot, order)
        before = _read(runners, upstream, players)
        for _ in range(settings.rounds):
            ran = take_turns(pids, settings.seconds, settings.slot, order)
            after = _read(runners, upstream, players)
            for runner in runners:
                name = runner.program.name
                samples[name].append(sample(before[name], after[name], ran[runner.pid]))
            before = after
            _tell()
    return samples


def sample(before: Reading, after: Reading, running: float) -> Sample:
    """Give what happened between two readings, the program *running* so many seconds."""
    return Sample(
        cpu=after.usage.cpu - before.usage.cpu,
        running=running,
        good=after.good - before.good,
        bad=after.bad - before.bad,
        connections=after.connections - before.connections,
        rss=after.usage.rss,
    )


def _read(runners: Sequence[Runner], upstream: Upstream, players: Players) -> Mapping[str, Reading]:
    time.sleep(_SETTLE)
    counts = players.counts()
    connections = upstream.connections()
    return {
        runner.program.name: Reading(
            usage(runner.pid),
            counts[runner.program.name]["good"],
            counts[runner.program.name]["bad"],
            connections[runner.program.tag],
        )
        for runner in runners
    }


def _fault_afterwards(runner: Runner) -> str:
    try:
        return runner.program.fault(fetch(runner.port, PATH))
    except (OSError, HTTPException) as error:
        return f"no answer: {error}"


def _broken(program: Program, size: int, reason: str) -> Row:
    return Row(program.name, size, skipped=reason, broken=True)


def _tell() -> None:
    """Show on standard error that a round is over; standard output is the table's."""
    sys.stderr.write(".")
    sys.stderr.flush()
