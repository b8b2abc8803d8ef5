"""What the tests of the state backends share: each backend, opened, over a real server."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.postgres import postgres_server
from tests.support.state_model import Clock
from tests.support.valkey import valkey_cluster, valkey_server
from vastproxy.state.base import StateBackend
from vastproxy.state.database import DatabaseBackend
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.redis import RedisBackend

Make = Callable[[Clock | None], StateBackend]
"""Makes a backend over one store; None: with the clock that it has by itself."""

PATIENT = "?socket_timeout=10"
"""Added to the URL of a Valkey: a busy machine is no reason to fail. Outages have own tests."""

BACKENDS = ("memory", "sqlite", "postgresql", "valkey", "valkey-cluster")


@contextmanager
def _memory(_directory: Path) -> Iterator[Make]:
    yield lambda clock: InMemoryBackend(clock=clock)


@contextmanager
def _sqlite(directory: Path) -> Iterator[Make]:
    url = f"sqlite:///{directory / 'state.db'}"
    yield lambda clock: DatabaseBackend(url, clock=clock)


@contextmanager
def _postgresql(_directory: Path) -> Iterator[Make]:
    with postgres_server() as server:
        url = server.new_database()
        yield lambda clock: DatabaseBackend(url, clock=clock)


@contextmanager
def _valkey(_directory: Path) -> Iterator[Make]:
    with valkey_server() as server:
        yield lambda clock: RedisBackend(server.url + PATIENT, clock=clock)


@contextmanager
def _valkey_cluster(_directory: Path) -> Iterator[Make]:
    with valkey_cluster() as cluster:
        yield lambda clock: RedisBackend(cluster.url + PATIENT, clock=clock)


def _store(name: str, directory: Path) -> AbstractContextManager[Make]:
    stores = {
        "memory": _memory,
        "sqlite": _sqlite,
        "postgresql": _postgresql,
        "valkey": _valkey,
        "valkey-cluster": _valkey_cluster,
    }
    return stores[name](directory)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Make]]:
    """Give stores by their name; each is started when it is first asked for, and ends with all."""
    made: dict[str, Make] = {}
    with ExitStack() as stack:

        def _made(name: str) -> Make:
            if name not in made:
                directory = tmp_path_factory.mktemp(name)
                made[name] = stack.enter_context(_store(name, directory))
            return made[name]

        yield _made


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest, stores: Callable[[str], Make]) -> Make:
    """Give each store in turn, as something that makes a backend over it."""
    return stores(request.param)


@pytest.fixture(params=BACKENDS[1:])
def share(request: pytest.FixtureRequest, stores: Callable[[str], Make]) -> Make:
    """Give each store that several processes can share, in turn."""
    return stores(request.param)


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands until a test moves it."""
    return Clock()


@pytest.fixture
async def backend(make: Make, clock: Clock) -> AsyncIterator[StateBackend]:
    """Open each backend in turn; its time is that of *clock*."""
    async with make(clock) as opened:
        await opened.ping()
        yield opened
