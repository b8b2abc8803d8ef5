"""What stands around the programs under test: ad servers, players, a look at answers."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import IO

from benchmarks.documents import KILOBYTE, LEVELS
from benchmarks.load import Plan
from benchmarks.processes import talking

_ANSWER_PATIENCE = 5.0
"""Seconds for one answer that is looked at."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The ad servers, by the *ports* of the three hops."""

    ports: tuple[int, int, int]

    def hops(self, tag: str) -> tuple[str, str, str]:
        """Give the URLs of the chain under *tag*."""
        first, second, third = (
            f"http://127.0.0.1:{port}/{tag}/{level}"
            for port, level in zip(self.ports, LEVELS, strict=True)
        )
        return first, second, third

    def connections(self) -> Mapping[str, int]:
        """Ask how many connections were opened so far, by tag."""
        stats = json.loads(fetch(self.ports[0], "/stats"))
        return {tag: count["connections"] for tag, count in stats.items()}


class Players:
    """The load generator, spoken to over its pipes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._in = _pipe(process.stdin)
        self._out = _pipe(process.stdout)

    def begin(self, plan: Plan) -> None:
        """Put the programs of *plan* under load."""
        self._say(plan.to_json())

    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Ask for the good and the bad answers so far, by program."""
        self._say("")
        counts: Mapping[str, Mapping[str, int]] = json.loads(self._out.readline())
        return counts

    def _say(self, line: str) -> None:
        self._in.write(f"{line}\n")
        self._in.flush()


@contextmanager
def serving(size: int, tags: Sequence[str], core: int | None) -> Iterator[Upstream]:
    """Serve chains of documents of *size* kilobytes under all *tags*, from *core*."""
    command = [sys.executable, "-m", "benchmarks.upstream", "--size", str(size * KILOBYTE)]
    command += [part for tag in tags for part in ("--tag", tag)]
    with talking(command, core) as process:
        first, second, third = json.loads(_pipe(process.stdout).readline())["ports"]
        yield Upstream((first, second, third))


@contextmanager
def playing(plan: Plan, core: int | None) -> Iterator[Players]:
    """Load the programs of *plan*, from *core*."""
    with talking([sys.executable, "-m", "benchmarks.load"], core) as process:
        players = Players(process)
        players.begin(plan)
        yield players


def fetch(port: int, path: str) -> bytes:
    """
    GET *path* from *port* of loopback and give the body.

    A status other than 200 is an :class:`OSError`, like a connection that breaks.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_PATIENCE)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise OSError(f"HTTP status {response.status}")
    return body


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ValueError("the process was started without this pipe")
    return pipe
