"""What is importable from the package, and at what price."""

import subprocess
import sys

import pytest

import vastproxy
from vastproxy.version import __version__

NAMES = (
    *("SessionContext", "UpstreamSession", "VastSession", "SessionFactory", "SessionManager"),
    *("SessionOperator", "VastUpstream", "VastChainResolver", "UpstreamSelector"),
    *("StateBackend", "InMemoryBackend", "RedisBackend", "DatabaseBackend"),
    *("RateLimiter", "ResponseCache", "RequestMetrics", "BudgetMetrics", "AdServer"),
    *("UpstreamError", "UpstreamTimeoutError", "StateBackendError"),
)


def imported(code: str) -> set[str]:
    """Run *code* in a new process, and name the modules that are there afterwards."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", NAMES)
def test_name_is_importable(name: str) -> None:
    """The names of the library are found in the package, and are the classes themselves."""
    found = getattr(vastproxy, name)

    assert name == found.__name__
    assert found is getattr(sys.modules[found.__module__], name)


def test_names_are_listed() -> None:
    """``__all__`` and ``dir()`` have every name, and nothing that is not there."""
    assert {*NAMES, "__version__"} == set(vastproxy.__all__)
    assert set(vastproxy.__all__) <= set(dir(vastproxy))
    assert all(hasattr(vastproxy, each) for each in vastproxy.__all__)
    assert set(vastproxy._HOMES) == set(NAMES)


def test_version_is_there() -> None:
    """The package knows its version."""
    assert __version__ == vastproxy.__version__


def test_name_that_is_not_there() -> None:
    """A misspelt name is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="has no attribute 'SessionFactroy'"):
        _ = vastproxy.SessionFactroy


def test_package_alone_imports_nothing() -> None:
    """Importing the package is quick: no client of anything comes along."""
    modules = imported("import vastproxy")
    ours = {each for each in modules if each.startswith("vastproxy")}

    assert {"vastproxy", "vastproxy.version"} == ours
    assert set() == modules & {"aiohttp", "redis", "sqlalchemy", "pydantic", "lxml", "structlog"}


def test_sessions_need_no_servers() -> None:
    """Who uses sessions in memory imports no other backend, and not SQLAlchemy."""
    modules = imported("from vastproxy import AdServer, InMemoryBackend, SessionFactory")

    # Redis' client is there all the same: pybreaker imports it where it is installed.
    others = {"vastproxy.state.redis", "vastproxy.state.database"}
    assert set() == modules & {*others, "sqlalchemy", "alembic", "asyncpg"}


def test_backends_keep_the_contract() -> None:
    """Each backend has every method that the contract names."""
    methods = {
        name
        for name, each in vars(vastproxy.StateBackend).items()
        if callable(each) and not name.startswith("_")
    }
    backends = (vastproxy.InMemoryBackend, vastproxy.RedisBackend, vastproxy.DatabaseBackend)

    assert {"get_count", "reserve", "flush"} < methods
    assert all(hasattr(each, name) for each in backends for name in methods)


def test_session_keeps_the_contract() -> None:
    """A session has every method of the narrow face."""
    methods = {name for name in vars(vastproxy.UpstreamSession) if not name.startswith("_")}

    assert {"check_frequency_cap", "close", "context", "get_budget"} < methods
    assert all(hasattr(vastproxy.VastSession, each) for each in methods)
