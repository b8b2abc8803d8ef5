"""``python -m tests.chaos``, as somebody at a terminal uses it."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.ad_server import AdServer, Reply, in_thread
from tests.support.hostile import ALL_FAULTS
from tests.support.proxy import ROOT, ask

COMMAND = [sys.executable, "-u", "-m", "tests.chaos"]


@contextlib.contextmanager
def running(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run the command with *arguments* until the block ends."""
    with subprocess.Popen(  # noqa: S603 - our own program
        [*COMMAND, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            yield program
        finally:
            program.terminate()


def told(program: "subprocess.Popen[str]", line: str) -> str:
    """Write *line*, and give the one that comes back."""
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write(f"{line}\n")
    program.stdin.flush()
    return program.stdout.readline()


def test_server() -> None:
    """The server lists an address for each fault, with a word about it, and answers there."""
    with running("server") as program:
        assert program.stdout is not None
        lines = [program.stdout.readline() for _ in ALL_FAULTS]
        address = lines[0].split()[0]

        assert b"<InLine>" in ask(address.removesuffix("/ok/ad"), "/ok/ad").body
    for fault, line in zip(ALL_FAULTS, lines, strict=True):
        assert f"/{fault.name}/ad" in line.split()[0]
        assert line.endswith(f" {fault.description}\n")


def test_proxy() -> None:
    """The proxy takes toxics on its command line, and others while it runs."""
    with (
        in_thread(AdServer(fallback=Reply(b"<VAST/>"))) as server,
        running(
            *("proxy", "--to", f"127.0.0.1:{server.port}", "--seed", "7"),
            *("--toxic", "latency=1ms,jitter=1ms", "--toxic", "reset_after=0"),
        ) as program,
    ):
        assert program.stdout is not None
        first = program.stdout.readline()
        while "?" not in program.stdout.readline():
            pass
        base = f"http://{re.findall(r'127[.]0[.]0[.]1:[0-9]+', first)[0]}"
        with pytest.raises(ConnectionError):
            ask(base, "/a")

        assert "latency=0.001s,jitter=0.001s; reset_after=0B>" in first
        assert "no toxics" in told(program, "none")
        assert 200 == ask(base, "/a").status
        assert "down" in told(program, "down")
        with pytest.raises(ConnectionError):
            ask(base, "/a")
        assert "0 connections" in told(program, "up")
        assert "slice=3B; cut=true" in told(program, "slice=3 cut")
        assert "'lag' is no toxic" in told(program, "lag=3")
        assert "no toxics" in told(program, "none")
        assert "no toxics" in told(program, "?")
        assert "no toxics" in told(program, "drop 1")
        with pytest.raises(ConnectionError):
            ask(base, "/a")
        assert 200 == ask(base, "/a").status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["proxy", "--to", "nowhere"], "write a host and a port, such as 127.0.0.1:9000"),
        (["proxy", "--to", "127.0.0.1:1", "--toxic", "lag=1"], "'lag' is no toxic"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    """A mistake on the command line is told with what to write instead."""
    ended = subprocess.run(  # noqa: S603 - our own program
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert 2 == ended.returncode
    assert message in " ".join(ended.stderr.split())


def test_help() -> None:
    """Help names the commands, and `toxics` names what a toxic is made of."""
    helped, listed = (
        subprocess.run(  # noqa: S603 - our own program
            [*COMMAND, word], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for word in ("--help", "toxics")
    )

    assert {"server", "proxy", "toxics"} <= set(helped.split())
    assert {"latency", "drop_replies", "share"} <= set(listed.split())
