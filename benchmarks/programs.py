"""The programs under test, all answering ``GET /vast`` for the same upstream."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from benchmarks.checks import fault_of_json, fault_of_last, fault_of_merged

PATH = "/vast?slot=preroll&w=640&h=360&uid=viewer-1"
"""What players ask for."""
_NODE = Path(__file__).parent / "node"
_INSTALL_PATIENCE = 180.0
"""Seconds for npm to fetch one small package."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program is to work."""

    port: int
    """To listen on, on loopback."""
    hops: tuple[str, str, str]
    """The URLs of the chain."""
    folder: Path
    """For files of its own."""


class Program(Protocol):
    """A program under test."""

    @property
    def name(self) -> str:
        """As the table has it."""

    @property
    def tag(self) -> str:
        """Its part of the upstream's paths."""

    @property
    def required(self) -> bool:
        """True: a run without it has failed."""

    def missing(self) -> str:
        """Say why it cannot be started on this machine, or nothing."""

    def command(self, place: Place) -> list[str]:
        """Give what starts it at *place*."""

    def fault(self, body: bytes) -> str:
        """Say what is wrong with one of its answers, or nothing."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Three fetches and an answer on aiohttp, no XML."""

    name: str = "floor"
    tag: str = "floor"
    required: bool = True

    def missing(self) -> str:
        """Say nothing: it is part of the benchmark."""
        return ""

    def command(self, place: Place) -> list[str]:
        """Give what starts it at *place*."""
        hops = [part for hop in place.hops for part in ("--hop", f"{hop}?cb=1")]
        port = ["--port", str(place.port)]
        return [sys.executable, "-m", "benchmarks.floor", *port, *hops]

    def fault(self, body: bytes) -> str:
        """Ask for the last document of the chain."""
        return fault_of_last(body)


@dataclass(frozen=True, slots=True)
class Vastproxy:
    """The proxy as its users start it, with one route in mode ``resolve``."""

    name: str = "vastproxy"
    tag: str = "vastproxy"
    required: bool = True

    def missing(self) -> str:
        """Say nothing: it is what the benchmark is for."""
        return ""

    def command(self, place: Place) -> list[str]:
        """Write its config.yaml into the folder, and give what starts it with that."""
        file = place.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config(place), sort_keys=False), encoding="utf-8")
        return [sys.executable, "-m", "vastproxy", "serve", "-c", str(file)]

    def fault(self, body: bytes) -> str:
        """Ask for the merged ad."""
        return fault_of_merged(body)


@dataclass(frozen=True, slots=True)
class Peer:
    """npm's ``@dailymotion/vast-client`` in a service on Node."""

    name: str
    tag: str
    fetching: str
    """``shipped`` or ``agent``; see peer.js."""
    required: bool = False

    def missing(self) -> str:
        """Install the package on first use; say what is not there."""
        for tool in ("node", "npm"):
            if shutil.which(tool) is None:
                return f"{tool} is not installed"
        return "" if installed(_NODE) else "npm install failed"

    def command(self, place: Place) -> list[str]:
        """Give what starts it at *place*."""
        tag = f"{place.hops[0]}?cb=1"
        return ["node", str(_NODE / "peer.js"), str(place.port), tag, self.fetching]

    def fault(self, body: bytes) -> str:
        """Ask for the resolved ad in JSON."""
        return fault_of_json(body)


def programs() -> tuple[Program, ...]:
    """Give all programs, the floor first."""
    return (
        Floor(),
        Vastproxy(),
        Peer("vast-client on Node, as shipped", "node-shipped", "shipped"),
        Peer("vast-client on Node, keep-alive agent", "node-agent", "agent"),
    )


def config(place: Place) -> dict[str, object]:
    """Give vastproxy's configuration for *place*."""
    return {
        "server": {"listen": f"127.0.0.1:{place.port}", "admin": None},
        "egress": {"allow": ["127.0.0.0/8"], "ports": [_port(hop) for hop in place.hops]},
        # As long as the deadline: a program that waits for its turn is not to blame its upstream.
        "upstreams": {"primary": {"endpoint": place.hops[0], "timeout": "2s"}},
        "routes": [
            {"path": "/vast", "mode": "resolve", "upstreams": ["primary"], "deadline": "2s"}
        ],
    }


def installed(folder: Path) -> bool:
    """Install what the package.json in *folder* asks for, unless it is there."""
    if (folder / "node_modules").is_dir():
        return True
    # Without a lock file: it would hold the address of wherever it came from.
    command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(
            command, cwd=folder, check=False, capture_output=True, timeout=_INSTALL_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _port(url: str) -> int:
    return int(url.split("/")[2].rpartition(":")[2])
