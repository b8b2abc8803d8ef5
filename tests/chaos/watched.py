"""
The proxy as a process that tells, besides all else, how its event loop is.

``python -m tests.chaos.watched serve -c FILE`` is ``vastproxy serve -c FILE`` with one task more,
which writes a line of JSON now and then: the longest time that the loop was kept busy since the
line before, in seconds, and how many tasks there are. Time in which another process had the CPU is
not counted: it says something about the machine, and nothing about the proxy.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.proxy import ROOT, Proxy, _end, _held_port, _read_lines, _wait_ready

TICK = 0.005
"""Seconds between two looks at the clock."""

EVERY = 0.2
"""Seconds between two lines."""

EVENT = "watch"
"""What the lines are known by."""


class Waiting:
    """How long this thread has waited for a CPU, in seconds; as Linux knows it."""

    def __init__(self) -> None:
        self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def so_far(self) -> float:
        """Give them."""
        # Time on a CPU, time waited for one, both in ns, and turns.
        return int(os.pread(self._file, 100, 0).split()[1]) / 1e9

    def __repr__(self) -> str:
        return f"<Waiting {self.so_far():.3f} s>"


async def watch() -> None:
    """Write a line about the loop again and again."""
    waiting = Waiting()
    while True:
        longest, ends = 0.0, time.perf_counter() + EVERY
        while time.perf_counter() < ends:
            before = time.perf_counter() - waiting.so_far()
            await asyncio.sleep(TICK)
            longest = max(longest, time.perf_counter() - waiting.so_far() - before - TICK)
        facts = {"event": EVENT, "lag": round(longest, 4), "tasks": len(asyncio.all_tasks())}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def watched(
    serve: Callable[..., Coroutine[Any, Any, None]],
) -> Callable[..., Coroutine[Any, Any, None]]:
    """Give *serve* with a watch over its loop."""

    async def serve_and_watch(*arguments: object) -> None:
        """Serve, and watch as long."""
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            await serve(*arguments)
            watching.cancel()

    return serve_and_watch


def main() -> None:
    """Run the proxy's command line."""
    from vastproxy import cli, serving  # noqa: PLC0415 - the tests that start it need neither

    serving.serve = watched(serving.serve)
    cli.main()


@contextlib.contextmanager
def watched_proxy(
    config: Mapping[str, Any], directory: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """Run the proxy with a watch, else as :func:`tests.support.proxy.running_proxy` does."""
    with contextlib.ExitStack() as stack:
        base, admin = stack.enter_context(_held_port()), stack.enter_context(_held_port())
        path = directory / f"watched-{base.rpartition(':')[2]}.yaml"
        server = {"listen": base, "admin": admin, **config.get("server", {})}
        path.write_text(yaml.safe_dump({**config, "server": server}, sort_keys=False))
        process = _started(path, environment or {})
        proxy = Proxy(process, f"http://{base}", f"http://{admin}", path)
        proxy.reader = threading.Thread(target=_read_lines, args=(proxy,), name="proxy output")
        proxy.reader.start()
        stack.callback(_end, proxy)
        _wait_ready(proxy)
        yield proxy
        assert 0 == proxy.stop(), "\n".join(proxy.lines)


def _started(path: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "tests.chaos.watched", "serve", "-c", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


if __name__ == "__main__":
    main()
