"""What the functional tests share: servers, ads, and proxies as real processes."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.support.ad_server import AdServer, Reply, in_thread
from tests.support.postgres import Postgres, postgres_server
from tests.support.proxy import Proxy, ask, running_proxy
from tests.support.valkey import Cluster, Valkey, valkey_cluster, valkey_server

StartProxy = Callable[[dict[str, Any]], Proxy]

SECRET = "a secret of the functional tests"  # noqa: S105 - of nothing but these tests
"""What seals, where two proxies of a test, or a proxy and the test, have to agree."""

AD = """<Ad id="{id}"{sequence}><InLine><AdSystem>S</AdSystem><AdTitle>T</AdTitle>{more}
<Impression><![CDATA[https://t.example/{id}]]></Impression><Creatives><Creative id="{creative}">
<Linear><Duration>00:00:10</Duration><MediaFiles><MediaFile delivery="progressive" type="video/mp4"
 width="640" height="360"><![CDATA[https://cdn.example/a.mp4]]></MediaFile></MediaFiles></Linear>
</Creative></Creatives></InLine></Ad>"""

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""Loopback addresses, each of which is a host of its own to a cookie jar."""


@pytest.fixture(scope="module")
def ad_server() -> Iterator[AdServer]:
    """Run an ad server for the tests of a module, in a thread, on three hosts."""
    with in_thread(AdServer(addresses=HOSTS)) as server:
        yield server


@pytest.fixture
def ads(ad_server: AdServer) -> AdServer:
    """Give the module's ad server as if new: it knows no answer, and was asked for nothing."""
    ad_server.requests.clear()
    ad_server.replies.clear()
    ad_server.fallback = Reply(status=404)
    return ad_server


@pytest.fixture(scope="module")
def start_module_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProxy]:
    """Start proxies that live as long as the tests of a module; all must end with exit code 0."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("proxies")
        yield lambda config: stack.enter_context(running_proxy(config, directory))


@pytest.fixture
def start_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartProxy]:
    """Start proxies that live as long as one test; all must end with exit code 0."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("proxies")
        yield lambda config: stack.enter_context(running_proxy(config, directory))


def an_ad(
    id: str,  # noqa: A002 - the attribute's name
    *,
    sequence: int | None = None,
    advertiser: str = "",
    creative: str = "",
    cpm: str = "",
    currency: str = "USD",
) -> str:
    """Build an InLine ad, whose *advertiser*, *creative* and *cpm* are left out where empty."""
    more = f"<Advertiser>{advertiser}</Advertiser>" if advertiser else ""
    if cpm:
        more += f'<Pricing model="CPM" currency="{currency}">{cpm}</Pricing>'
    place = "" if sequence is None else f' sequence="{sequence}"'
    return AD.format(id=id, sequence=place, more=more, creative=creative)


def a_document(*ads: str) -> bytes:
    """Build a document of *ads*."""
    return f'<VAST version="3.0">{"".join(ads)}</VAST>'.encode()


def a_pod(size: int) -> bytes:
    """Build a document of *size* ads to be shown one after the other."""
    return a_document(*(an_ad(f"ad-{each}", sequence=each) for each in range(1, size + 1)))


def budget(proxy: Proxy, campaign: str) -> dict[str, Any]:
    """Give what operators of *proxy* are told about *campaign*."""
    told: dict[str, Any] = ask(proxy.admin, f"/api/budgets/{campaign}").json()
    return told


def viewer(proxy: Proxy, name: str) -> dict[str, Any]:
    """Give what operators of *proxy* are told about the viewer called *name*."""
    told: dict[str, Any] = ask(proxy.admin, f"/api/viewers/{name}").json()
    return told


def patience(kind: str) -> dict[str, str]:
    """
    Give settings of a state of a *kind* for tests that ask much at one time on a busy machine.

    A transaction in PostgreSQL is eight exchanges under a viewer's lock. Where another worker that
    waits for a CPU has the lock, the usual 50 ms are over now and then, and caps fail open.
    """
    return {"state_timeout": "250ms"} if kind == "postgresql" else {}


def metric(proxy: Proxy, name: str, **labels: str) -> float:
    """Add up the values of the metric called *name* that have the *labels*."""
    lines = ask(proxy.admin, "/metrics").body.decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(each.split()[-1])
        for each in lines
        if each.startswith((f"{name} ", f"{name}{{")) and all(pair in each for pair in wanted)
    )


def wait_for(happened: Callable[[], object], within: float = 20.0) -> None:
    """Wait until something *happened*; or raise TimeoutError."""
    ends = time.monotonic() + within
    while not happened():
        if time.monotonic() > ends:
            raise TimeoutError
        time.sleep(0.02)


class States:
    """Real servers that keep state, each started when it is wanted first; *stack* ends them."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._numbers = itertools.count(1)

    @cached_property
    def valkey(self) -> Valkey:
        """A server that has all databases of this session."""
        return self._stack.enter_context(valkey_server("--databases", "1000"))

    @cached_property
    def cluster(self) -> Cluster:
        """A cluster; it has one database, so tests name their viewers and campaigns apart."""
        return self._stack.enter_context(valkey_cluster())

    @cached_property
    def postgres(self) -> Postgres:
        """A server that makes databases as they are wanted."""
        return self._stack.enter_context(postgres_server())

    def url(self, kind: str) -> str:
        """Give the URL of an empty state of a *kind*, as the setting ``state`` has it."""
        match kind:
            case "redis":
                return f"{self.valkey.url.removesuffix('/0')}/{next(self._numbers)}"
            case "cluster":
                return self.cluster.url
            case "postgresql":
                return self.postgres.new_database()
            case "sqlite":
                return f"sqlite:///{self._directory}/state-{next(self._numbers)}.db"
        return "memory://"

    def __repr__(self) -> str:
        return f"<States in {self._directory}>"


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[States]:
    """Start servers for the state as tests want them; they end with the session."""
    with ExitStack() as stack:
        yield States(stack, tmp_path_factory.mktemp("states"))
