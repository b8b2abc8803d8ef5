"""
Where hops may not lead: every spelling of an address that is none of a third party's business.

The ad server is the operator's own and on loopback, which is trusted; what it names is not. The
addresses of the first table are listened on, so that nothing reaches them unnoticed.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from lxml import etree

from tests.support.ad_server import AdServer, Reply, in_thread, wait_seen
from tests.support.hostile import SMUGGLED, Trap, a_wrapper, an_inline
from tests.support.proxy import Answer, Proxy, running_proxy
from vastproxy.errors import EgressBlockedError
from vastproxy.model import HopRequest
from vastproxy.upstream.client import AiohttpClient
from vastproxy.upstream.egress import EgressPolicy

LISTENED = (
    "http://127.0.0.1:{port}/a",
    "http://[::1]:{port}/a",
    "http://[::ffff:127.0.0.1]:{port}/a",
    "http://[::ffff:7f00:1]:{port}/a",
    "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/a",
    "http://2130706433:{port}/a",
    "http://0x7f000001:{port}/a",
    "http://017700000001:{port}/a",
    "http://0177.0.0.1:{port}/a",
    "http://127.1:{port}/a",
    "http://127.0.1:{port}/a",
    "http://localhost:{port}/a",
    "http://localhost.:{port}/a",
    "http://LOCALHOST:{port}/a",
    "http://127.0.0.1.:{port}/a",
    "http://①②⑦.⓪.⓪.①:{port}/a",
    "http://１２７.０.０.１:{port}/a",  # noqa: RUF001 - full-width digits are the point
    "http://127。0。0。1:{port}/a",
    "http://%31%32%37.0.0.1:{port}/a",
    "http://ʟocalhost:{port}/a",
    "http://0.0.0.0:{port}/a",
    "http://0:{port}/a",
    "http://[::]:{port}/a",
    "http://[::127.0.0.1]:{port}/a",
    "http://[64:ff9b::7f00:1]:{port}/a",
    "http://[2002:7f00:1::]:{port}/a",
    "http://[::1%25lo]:{port}/a",
    "http://[fe80::1%25lo]:{port}/a",
    "http://u:p@127.0.0.1:{port}/a",
    "http://example.com@127.0.0.1:{port}/a",
    "http://127.0.0.1:{port}#@example.com/",
    "http://127.0.0.1:{port}\\@example.com/",
    "http://127.0.0.1\\@example.com:{port}/a",
    "http://127.0.0.1%00.example.com:{port}/a",
    "http://127.0.0.1 .example.com:{port}/a",
    "http://0x7f.1:{port}/a",
    "http:///127.0.0.1:{port}/a",
    "http:127.0.0.1:{port}/a",
    "http:/127.0.0.1:{port}/a",
    "http:\\\\127.0.0.1:{port}\\a",
    " http://127.0.0.1:{port}/a",
    "HTTP://127.0.0.1:{port}/a",
    "//127.0.0.1:{port}/a",
    "\\\\127.0.0.1:{port}/a",
    "https://127.0.0.1:{port}/a",
    "https://localhost:{port}/a",
)
"""Loopback as it is written by those who should not: *port* is listened on."""

ELSEWHERE = (
    "http://169.254.169.254/latest/meta-data/",
    "http://[fd00:ec2::254]/latest/meta-data/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://198.18.0.1/",
    "http://192.0.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://127.255.255.254/",
    "http://[fd00::1]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[64:ff9b::a00:1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://metadata.google.internal./",
    "http://printer.local/",
    "http://127.0.0.1:22/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:99999/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "unix:///var/run/docker.sock",
    "gopher://127.0.0.1/",
    "javascript:alert(1)",
    "data:text/xml,<VAST/>",
    "http://",
    "http://:{port}/",
)
"""What cannot be listened on here, private or no address at all."""

TARGETS = (*LISTENED, *ELSEWHERE)

NOT_FOUND = (
    # Where private networks may be allowed, only its address tells whether a name lies in one;
    # these have none, or a private one.
    "http://localhost.:{port}/a",
    "http://ʟocalhost:{port}/a",
    "http://metadata.google.internal./",
    "http://printer.local/",
    # A relative reference to those who do not follow browsers: it leads back to the ad server.
    "\\\\127.0.0.1:{port}/a",
)
"""Targets that need not be forbidden, because there is nothing to be found at them."""


@dataclass(frozen=True, slots=True)
class Field:
    """A proxy, the operator's ad server, and a listener that nobody may reach."""

    proxy: Proxy
    server: AdServer
    trap: Trap

    def by_wrapper(self, target: str) -> Answer:
        """Let the ad server answer a wrapper that leads to *target*."""
        errors = [self.server.url("/error?[ERRORCODE]")]
        wrapper = a_wrapper(target.format(port=self.trap.port), errors=errors)
        self.server.replies["/entry"] = wrapper
        return self.proxy.get("/entry")

    def by_redirect(self, target: str) -> Answer:
        """Let the ad server answer a redirect to *target*."""
        self.server.replies["/entry"] = moved(target.format(port=self.trap.port))
        return self.proxy.get("/entry")

    def by_redirected_hop(self, target: str) -> Answer:
        """Let a hop, which is asked through the guard, answer a redirect to *target*."""
        self.server.replies["/hop"] = moved(target.format(port=self.trap.port))
        return self.by_wrapper(self.server.url("/hop"))


def moved(location: str) -> Reply:
    """Give a redirect; what is not Latin-1 goes out as UTF-8, as it does in the wild."""
    sent = location.encode().decode("latin-1")
    return Reply(status=302, headers=(("Location", sent),))


def ad_ids(answer: Answer) -> tuple[str, ...]:
    """Give the ids of the ads that are answered."""
    assert 200 == answer.status
    assert SMUGGLED not in answer.body
    return tuple(ad.get("id", "") for ad in etree.fromstring(answer.body).findall("{*}Ad"))


@contextlib.contextmanager
def a_field(directory: Path, address: str, allow: list[str]) -> Iterator[Field]:
    """Run a proxy in front of an ad server on *address*, with *allow* as its ``egress.allow``."""
    with Trap("127.0.0.1", "::1") as trap, in_thread(AdServer(addresses=(address,))) as server:
        server.replies["/error"] = Reply()
        config = {
            # The trap's port is allowed: it is the addresses that have to be refused.
            "egress": {"allow": allow, "ports": [22, 80, 443, trap.port]},
            "upstreams": {"own": {"endpoint": server.url("/{rest}"), "session_params": []}},
            "routes": [{"path": "/{rest}", "upstreams": ["own"], "deadline": "1s"}],
        }
        with running_proxy(config, directory) as proxy:
            yield Field(proxy, server, trap)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Give a proxy whose hops may reach public addresses only."""
    with a_field(tmp_path_factory.mktemp("closed"), "127.0.0.1", []) as field:
        yield field


@pytest.fixture(scope="module")
def ajar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Give a proxy whose hops may reach the ad server, and nothing else on this machine."""
    with a_field(tmp_path_factory.mktemp("ajar"), "127.0.0.2", ["127.0.0.2/32"]) as field:
        yield field


def test_trap_counts() -> None:
    """A connection to the trap is counted, whatever is sent on it."""
    with Trap("127.0.0.1", "::1") as trap:
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, trap.port)).close()

        assert 2 == trap.reached


def test_entry_is_trusted(closed: Field) -> None:
    """The operator's own ad server may be on loopback."""
    closed.server.replies["/entry"] = an_inline("own")

    assert ("own",) == ad_ids(closed.proxy.get("/entry"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", [Field.by_wrapper, Field.by_redirect])
def test_refused(closed: Field, way: Callable[[Field, str], Answer], target: str) -> None:
    """No wrapper and no redirect leads to an address that is not public; there is no ad then."""
    before = closed.trap.reached

    assert () == ad_ids(way(closed, target))
    assert before == closed.trap.reached


def test_errors_are_guarded(closed: Field) -> None:
    """Error URIs of a third party are not requested where its hops would not be."""
    closed.server.replies["/entry"] = an_inline("own")
    closed.by_wrapper("http://127.0.0.1:{port}/a")
    closed.proxy.get("/entry")

    assert [] == closed.server.seen("/error")
    assert 0 == closed.trap.reached


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", [Field.by_wrapper, Field.by_redirected_hop])
def test_told(ajar: Field, way: Callable[[Field, str], Answer], target: str) -> None:
    """The wrapper above a refused target is told 300, once; one allowed network opens no other."""
    before, told = ajar.trap.reached, len(ajar.server.seen("/error"))
    answer = way(ajar, target)
    pings = wait_seen(ajar.server, "/error", told + 1)[told:]

    assert () == ad_ids(answer)
    assert before == ajar.trap.reached
    assert 1 == len(pings)
    assert pings[0].query in ({"300", "301"} if target in NOT_FOUND else {"300"})


def test_allowed(ajar: Field) -> None:
    """A network that the operator allows is reached, by hops and by redirects."""
    ajar.server.replies["/ad"] = an_inline("allowed")

    assert ("allowed",) == ad_ids(ajar.by_wrapper(ajar.server.url("/ad")))
    assert ("allowed",) == ad_ids(ajar.by_redirected_hop(ajar.server.url("/ad")))


class Names(AbstractResolver):
    """A resolver that answers what it is told to, the next list at each question."""

    def __init__(self, *answers: list[str]) -> None:
        self._answers = answers
        self.asked = 0

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,  # noqa: ARG002
    ) -> list[ResolveResult]:
        """Give the next answer; the last one stays."""
        addresses = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        return [
            ResolveResult(
                hostname=host,
                host=each,
                port=port,
                family=socket.AF_INET6 if ":" in each else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for each in addresses
        ]

    async def close(self) -> None:
        """Do nothing: there is nothing open."""


@contextlib.asynccontextmanager
async def a_client(names: Names, allow: str, port: int) -> AsyncIterator[AiohttpClient]:
    """Give the proxy's client with *names* for a name server."""
    policy = EgressPolicy(allow=(ip_network(allow),), ports=frozenset({80, port}))
    async with AiohttpClient(policy, lambda: names) as client:
        yield client


async def ask(client: AiohttpClient, url: str) -> bytes:
    """Ask for *url* as for a hop, on a connection of its own."""
    headers = (("Connection", "close"),)
    request = HopRequest(url, headers, trusted=False, max_body=10_000)
    reply = await client.get(request, asyncio.get_running_loop().time() + 1.0)
    return reply.body


PRIVATE = ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "fd00::1", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("answer", [*([each] for each in PRIVATE), PRIVATE], ids=str)
async def test_name_of_private_address(answer: list[str]) -> None:
    """A public name whose addresses are not public is not connected to."""
    with Trap("127.0.0.1", "::1") as trap:
        async with a_client(Names(answer), "127.0.0.2/32", trap.port) as client:
            with pytest.raises(EgressBlockedError):
                await ask(client, f"http://ads.example.com:{trap.port}/")

        assert 0 == trap.reached


async def test_name_of_both() -> None:
    """Of a name with private and public addresses, the public ones are used."""
    async with AdServer({"/": b"<VAST/>"}, addresses=("127.0.0.2",)) as server:
        with contextlib.closing(socket.create_server(("127.0.0.1", server.port))) as private:
            private.setblocking(False)  # noqa: FBT003 - the method has no other form
            names = Names(["127.0.0.1", "127.0.0.2"])
            async with a_client(names, "127.0.0.2/32", server.port) as client:
                body = await ask(client, f"http://ads.example.com:{server.port}/")

            assert b"<VAST/>" == body
            with pytest.raises(BlockingIOError):
                private.accept()


async def test_name_that_changes() -> None:
    """A name that turns from an allowed address to a private one is refused from then on."""
    async with AdServer({"/": b"<VAST/>"}, addresses=("127.0.0.2",)) as server:
        with contextlib.closing(socket.create_server(("127.0.0.1", server.port))) as private:
            private.setblocking(False)  # noqa: FBT003 - the method has no other form
            names = Names(["127.0.0.2"], ["127.0.0.1"])
            url = f"http://ads.example.com:{server.port}/"
            async with a_client(names, "127.0.0.2/32", server.port) as client:
                await ask(client, url)
            # A client of its own has no answer of the first one in store.
            async with a_client(names, "127.0.0.2/32", server.port) as client:
                with pytest.raises(EgressBlockedError):
                    await ask(client, url)

            assert 1 == len(server.requests)
            with pytest.raises(BlockingIOError):
                private.accept()
