"""
The real proxy as a process of its own, and a player that asks it.

A test says the upstreams and routes; addresses, readiness, output and the end are cared for here.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: where ``python -m vastproxy`` finds the package that is tested."""

START_WITHIN = 30.0
"""Seconds until a proxy must be ready: many times what it needs on an idle machine."""

STOP_WITHIN = 30.0
"""Seconds from SIGTERM until it must be gone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a player is answered."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def values(self, name: str) -> list[str]:
        """Give all values of header *name*, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        """Give the first value of header *name*, or None."""
        return next(iter(self.values(name)), None)

    def json(self) -> Any:
        """Read the body as JSON."""
        return json.loads(self.body)


def ask(
    base: str,
    target: str,
    *,
    method: str = "GET",
    headers: Sequence[tuple[str, str]] = (),
    within: float = 60.0,
) -> Answer:
    """Ask the server at *base* for *target*, which goes out byte for byte, and no header more."""
    where = urlsplit(base)
    with contextlib.closing(
        http.client.HTTPConnection(str(where.hostname), where.port, timeout=within)
    ) as connection:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        if "host" not in {name.lower() for name, _ in headers}:
            connection.putheader("Host", where.netloc)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        reply = connection.getresponse()
        return Answer(reply.status, tuple(reply.getheaders()), reply.read())


@dataclass(slots=True)
class Proxy:
    """A proxy that runs."""

    process: subprocess.Popen[bytes]
    base: str
    """Where players ask: scheme, address and port."""
    admin: str
    """The same of the operator's side."""
    path: Path = field(default=Path(), repr=False)
    """The file of its configuration."""
    lines: list[str] = field(default_factory=list, repr=False)
    """What it has written so far on standard output and standard error."""
    reader: threading.Thread | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self.process.pid

    def get(
        self,
        target: str,
        headers: Sequence[tuple[str, str]] = (),
        *,
        method: str = "GET",
        within: float = 60.0,
    ) -> Answer:
        """Ask as a player."""
        return ask(self.base, target, method=method, headers=headers, within=within)

    def records(self, **wanted: object) -> list[dict[str, Any]]:
        """Give the JSON lines written so far that have the *wanted* fields."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [each for each in found if wanted.items() <= each.items()]

    def wait_record(self, within: float = 10.0, **wanted: object) -> dict[str, Any]:
        """Wait for the first JSON line with the *wanted* fields; TimeoutError if none comes."""
        ends = time.monotonic() + within
        while not (found := self.records(**wanted)):
            if time.monotonic() > ends:
                raise TimeoutError(f"no line with {wanted}; there is:\n" + "\n".join(self.lines))
            time.sleep(0.01)
        return found[0]

    def reload(self, change: Mapping[str, Any]) -> None:
        """Write *change* over sections of the configuration, send SIGHUP, and return at once."""
        config = yaml.safe_load(self.path.read_text())
        self.path.write_text(yaml.safe_dump({**config, **change}, sort_keys=False))
        self.process.send_signal(signal.SIGHUP)

    def terminate(self) -> None:
        """Send SIGTERM, and return at once."""
        self.process.send_signal(signal.SIGTERM)

    def wait_exit(self) -> int:
        """Wait for the end, with all of the output read, and give the exit code."""
        code = self.process.wait(timeout=STOP_WITHIN)
        if self.reader is not None:
            self.reader.join(timeout=STOP_WITHIN)
        return code

    def stop(self) -> int:
        """Send SIGTERM, unless it has ended already, and give the exit code."""
        if self.process.poll() is None:
            self.terminate()
        return self.wait_exit()


@contextlib.contextmanager
def running_proxy(
    config: Mapping[str, Any], directory: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """Run the proxy as :func:`started_proxy` does, and wait until it is ready."""
    with started_proxy(config, directory, environment=environment) as proxy:
        _wait_ready(proxy)
        yield proxy


@contextlib.contextmanager
def started_proxy(
    config: Mapping[str, Any], directory: Path, *, environment: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """
    Run the proxy with *config* until the block ends; it must then end with exit code 0.

    The listeners are added to *config* where it names none; the file is written to *directory*.
    """
    with contextlib.ExitStack() as ports:
        base = ports.enter_context(_held_port())
        admin = ports.enter_context(_held_port())
        server = {"listen": base, "admin": admin, **config.get("server", {})}
        path = directory / f"config-{base.rpartition(':')[2]}.yaml"
        path.write_text(yaml.safe_dump({**config, "server": server}, sort_keys=False))
        proxy = _start(path, f"http://{server['listen']}", f"http://{server['admin']}", environment)
        try:
            yield proxy
            assert 0 == proxy.stop(), "\n".join(proxy.lines)
        finally:
            _end(proxy)


@contextlib.contextmanager
def _held_port() -> Iterator[str]:
    # Bound but not listening, with SO_REUSEADDR: the proxy may bind the same port, and nobody
    # who asks for any free port is given it.
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


def _start(path: Path, base: str, admin: str, environment: Mapping[str, str] | None) -> Proxy:
    process = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "vastproxy", "serve", "-c", str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    proxy = Proxy(process, base, admin, path)
    proxy.reader = threading.Thread(target=_read_lines, args=(proxy,), name="proxy output")
    proxy.reader.start()
    return proxy


def _read_lines(proxy: Proxy) -> None:
    assert proxy.process.stdout is not None
    with proxy.process.stdout as output:
        for line in output:
            proxy.lines.append(line.decode("utf-8", "replace").rstrip("\n"))


def _wait_ready(proxy: Proxy) -> None:
    ends = time.monotonic() + START_WITHIN
    while not _is_ready(proxy):
        if proxy.process.poll() is not None or time.monotonic() > ends:
            raise RuntimeError("the proxy did not start:\n" + "\n".join(proxy.lines))
        time.sleep(0.02)


def _is_ready(proxy: Proxy) -> bool:
    try:
        return ask(proxy.admin, "/readyz", within=5.0).status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False


def _end(proxy: Proxy) -> None:
    if proxy.process.poll() is None:
        proxy.process.kill()
        proxy.process.wait()
    if proxy.reader is not None:
        proxy.reader.join(timeout=STOP_WITHIN)


def run_vastproxy(
    *arguments: str, stdin: bytes = b"", within: float = 60.0
) -> subprocess.CompletedProcess[bytes]:
    """Run ``vastproxy`` with *arguments* to its end; its output is captured."""
    return subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "vastproxy", *arguments],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        timeout=within,
        check=False,
    )


def a_config(
    upstreams: Mapping[str, Any], routes: Sequence[Mapping[str, Any]], **sections: Any
) -> dict[str, Any]:
    """
    Build a config whose hops may reach loopback on every port.

    An upstream may be given as its endpoint alone. It has no parameters of its own unless it is
    given some, so that a test sees what it asked for; *sections* are added as they are.
    """
    named = {
        name: {"session_params": [], **({"endpoint": each} if isinstance(each, str) else each)}
        for name, each in upstreams.items()
    }
    egress = {"allow": ["127.0.0.0/8"]}
    return {"egress": egress, "upstreams": named, "routes": list(routes), **sections}
