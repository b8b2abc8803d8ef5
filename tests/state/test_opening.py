"""From the URL of a state to its backend, which waits for no server."""

import subprocess
import sys
from pathlib import Path

import pytest

from vastproxy.config.units import StateUrl
from vastproxy.state.base import StateBackend
from vastproxy.state.opening import backend_of

ROOT = Path(__file__).resolve().parents[2]

WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from vastproxy.config.units import StateUrl
from vastproxy.errors import StateBackendError
from vastproxy.state.opening import backend_of
try:
    print(type(backend_of(StateUrl.parse(sys.argv[2]))).__name__)
except StateBackendError as error:
    print(error)
"""
"""Opens a state where a package is not installed."""

LOADED = """
import sys
from vastproxy.config.units import StateUrl
from vastproxy.state.opening import backend_of
backend_of(StateUrl.parse("memory://"))
print([each for each in ("redis", "sqlalchemy", "alembic") if each in sys.modules])
"""


def run(program: str, *arguments: str) -> str:
    """Run *program* in an interpreter of its own; give what it prints."""
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://", "<InMemoryBackend accounts: 0, forgotten: 0>"),
        ("redis://:pass@h:1/2", "<RedisBackend at h:1"),
        ("redis+cluster://h", "<RedisBackend "),
        ("sqlite:///caps.db", "<DatabaseBackend sqlite caps.db"),
        ("postgresql://u:pass@h/d", "<DatabaseBackend postgresql h/d"),
    ],
)
async def test_backend(url: str, shown: str) -> None:
    """Each URL has its backend; it is made without a server, and shows no password."""
    backend = backend_of(StateUrl.parse(url))
    try:
        assert isinstance(backend, StateBackend)
        assert repr(backend).startswith(shown)
        assert "pass" not in repr(backend)
    finally:
        await backend.close()


def test_memory_needs_no_client() -> None:
    """A state in memory loads no client of a server."""
    assert "[]" == run(LOADED)


@pytest.mark.parametrize(
    ("package", "url"),
    [
        ("sqlalchemy", "sqlite:///caps.db"),
        ("aiosqlite", "sqlite:///caps.db"),
        ("asyncpg", "postgresql://u@h/d"),
        ("alembic", "postgresql://u@h/d"),
    ],
)
def test_what_it_needs_is_not_installed(package: str, url: str) -> None:
    """Where a package is missing, its name is told, and what to install."""
    told = run(WITHOUT, package, url)

    assert package in told
    assert "vastproxy[database]" in told
