"""
The players: keep-alive connections that ask each program again as soon as it has answered.

Started as ``python -m benchmarks.load`` with one line of JSON on standard input, a
:class:`Plan`. For every further line it prints the counts so far as one line of JSON,
``{name: {"good": n, "bad": n}}``; it ends with its standard input.

Cheap on purpose: a head is searched once for its status and its length, bodies are counted and
not kept. An answer is good if its status is 200 and its body has at least the bytes that the
plan asks for; an empty VAST is therefore bad.
"""

import asyncio
import json
import re
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_RETRY = 0.1
"""Seconds until a connection that could not be made is tried again."""


@dataclass(frozen=True, slots=True)
class Target:
    """A program under load: its *port* on loopback, and the bytes a good answer has *least*."""

    name: str
    port: int
    least: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What to ask, and over how many connections to each program."""

    path: str
    connections: int
    targets: tuple[Target, ...]

    def to_json(self) -> str:
        """Give the plan as one line."""
        return json.dumps(asdict(self))


def plan_from_json(line: str) -> Plan:
    """Read what :meth:`Plan.to_json` wrote."""
    raw = json.loads(line)
    targets = tuple(Target(**each) for each in raw["targets"])
    return Plan(raw["path"], raw["connections"], targets)


@dataclass(slots=True)
class Score:
    """How one program answered."""

    good: int = 0
    bad: int = 0


@dataclass(frozen=True, slots=True)
class Head:
    """What is to be known of an answer's head: its status, and the bytes of its body."""

    status: int
    length: int


def parse_head(head: bytes) -> Head | None:
    """
    Read the *head* of an answer, without the empty line that ends it.

    None stands for one without a ``Content-Length``: its end cannot be told cheaply.
    """
    length = _LENGTH.search(head)
    return Head(int(head[9:12]), int(length[1])) if length else None


class Player(asyncio.Protocol):
    """One connection: asks, counts the answer, asks again."""

    def __init__(self, request: bytes, least: int, score: Score) -> None:
        self._request = request
        self._least = least
        self._score = score
        self._head = b""
        self._missing = 0
        """Bytes of the body that are still to come."""
        self._good = False
        self._transport: asyncio.WriteTransport | None = None
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        # uvloop's transports are none by their class.
        self._transport = cast("asyncio.WriteTransport", transport)
        self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the answer that does not come any more."""
        del exc
        self._score.bad += 1
        self.lost.set()

    def data_received(self, data: bytes) -> None:
        """Take in a part of an answer."""
        if self._missing:
            self._missing -= len(data)
        elif not self._begin(data):
            return
        if self._missing < 0:
            # More than the head promised: nobody knows where the next answer begins.
            self._close()
        elif not self._missing:
            self._finish()

    def _begin(self, data: bytes) -> bool:
        """Read the head, and say whether an answer is on its way."""
        head, end, body = (self._head + data).partition(_END)
        if not end:
            self._head = head
            return False
        self._head = b""
        known = parse_head(head)
        if known is None:
            self._close()
            return False
        self._good = known.status == 200 and known.length >= self._least
        self._missing = known.length - len(body)
        return True

    def _finish(self) -> None:
        if self._good:
            self._score.good += 1
        else:
            self._score.bad += 1
        if self._transport is not None:
            self._transport.write(self._request)

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def play(target: Target, path: str, score: Score) -> None:
    """Keep one connection to *target* busy, for ever; connect again when it is lost."""
    loop = asyncio.get_running_loop()
    request = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n"
        "User-Agent: Mozilla/5.0 (SMART-TV; Linux) player/1.0\r\nAccept: */*\r\n\r\n"
    ).encode()
    while True:
        with suppress(OSError):
            _, player = await loop.create_connection(
                lambda: Player(request, target.least, score), "127.0.0.1", target.port
            )
            await player.lost.wait()
        await asyncio.sleep(_RETRY)


async def run() -> None:
    """Read the plan, load all targets, and tell the counts whenever a line comes in."""
    loop = asyncio.get_running_loop()
    plan = plan_from_json(await loop.run_in_executor(None, sys.stdin.readline))
    scores = {target.name: Score() for target in plan.targets}
    async with asyncio.TaskGroup() as group:
        players = [
            group.create_task(play(target, plan.path, scores[target.name]))
            for target in plan.targets
            for _ in range(plan.connections)
        ]
        while await loop.run_in_executor(None, sys.stdin.readline):
            counts = {name: asdict(score) for name, score in scores.items()}
            print(json.dumps(counts), flush=True)
        for player in players:
            player.cancel()


def main() -> None:
    """Load the programs that the plan on standard input names."""
    uvloop.run(run())


if __name__ == "__main__":
    main()
