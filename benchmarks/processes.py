"""
Programs started for a run, and their turns on the processor.

Rule 1: a signal goes to a process that was started here, by its id, and to nobody else.
Rule 2: whatever happens, every one of them is continued and ended when its block is left.
"""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
"""Where the commands run: the folder that holds the packages."""
_PATIENCE = 5.0
"""Seconds that a program has to end by itself."""


@contextmanager
def started(command: Sequence[str], core: int | None) -> Iterator[subprocess.Popen[str]]:
    """
    Start *command* on *core*, its output thrown away, and end it with the block.

    Its standard input stays open as long as the block does.
    """
    with _pinned(core):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    with _ended(process):
        yield process


@contextmanager
def talking(command: Sequence[str], core: int | None) -> Iterator[subprocess.Popen[str]]:
    """Start *command* on *core* to speak with over pipes, line by line, and end it."""
    with _pinned(core):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    with _ended(process):
        yield process


@contextmanager
def halted(pids: Sequence[int]) -> Iterator[None]:
    """Stop all *pids*; let them all run again when the block is left."""
    with ExitStack() as stack:
        for pid in pids:
            stack.callback(_signal, pid, signal.SIGCONT)
            _signal(pid, signal.SIGSTOP)
        yield


def take_turns(
    pids: Sequence[int], seconds: float, slot: float, order: random.Random
) -> dict[int, float]:
    """
    Let one of the halted *pids* run at a time, and give how many seconds each did.

    Each gets about *seconds* in turns of *slot* seconds; *order* shuffles every cycle anew, so
    that no program always follows the same other one.
    """
    ran = dict.fromkeys(pids, 0.0)
    for _ in range(max(1, round(seconds / slot))):
        for pid in order.sample(list(pids), len(pids)):
            ran[pid] += _one_turn(pid, slot)
    return ran


def free_ports(count: int) -> list[int]:
    """Give *count* ports of loopback on which nobody listens."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def cores() -> tuple[int | None, int | None]:
    """Give the core for the programs under test, and the one for all the rest."""
    known = sorted(os.sched_getaffinity(0))
    return (known[-1], known[0]) if len(known) > 1 else (None, None)


def _one_turn(pid: int, slot: float) -> float:
    begin = time.monotonic()
    _signal(pid, signal.SIGCONT)
    try:
        time.sleep(slot)
    finally:
        _signal(pid, signal.SIGSTOP)
    return time.monotonic() - begin


@contextmanager
def _pinned(core: int | None) -> Iterator[None]:
    """Run on *core* for the block: what is started there stays there."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        _signal(process.pid, signal.SIGCONT)
        _signal(process.pid, signal.SIGTERM)
        _reap(process)


def _reap(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(pid: int, number: signal.Signals) -> None:
    """Tell *pid* and its descendants: each was started as the head of a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(pid, number)
