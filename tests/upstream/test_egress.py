"""Hops that third parties name reach public addresses on web ports, and nothing else."""

import asyncio
import errno
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import FrozenInstanceError, dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from vastproxy.upstream.egress import (
    MAX_URL,
    EgressPolicy,
    EgressRefused,
    guarded_socket_factory,
    own_addresses,
)

LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
PRIVATE = (ip_network("10.0.0.0/8"),)

# Every spelling of "this machine" that some HTTP client has fallen for; PORT is the listener's.
SPELLINGS = (
    "http://127.0.0.1:PORT/",
    "http://[::1]:PORT/",
    "http://[::ffff:127.0.0.1]:PORT/",
    "http://[::ffff:7f00:1]:PORT/",
    "http://2130706433:PORT/",
    "http://0x7f000001:PORT/",
    "http://0177.0.0.1:PORT/",
    "http://127.1:PORT/",
    "http://localhost:PORT/",
    "http://localhost.:PORT/",
    "http://127.0.0.1.:PORT/",
    "http://①②⑦.⓪.⓪.①:PORT/",
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:PORT/",
    "http://127。0。0。1:PORT/",
    "http://0.0.0.0:PORT/",
    "http://0:PORT/",
    "http://[::]:PORT/",
    "http://[::127.0.0.1]:PORT/",
    "http://[fe80::1%25lo]:PORT/",
    "http://[64:ff9b::7f00:1]:PORT/",
    "http://u:p@127.0.0.1:PORT/",
    "http://127.0.0.1:PORT#@example.com/",
    "http://example.com@127.0.0.1:PORT/",
    "http://127.0.0.1\\@example.com:PORT/",
    "http://127.0.0.1%00.example.com:PORT/",
    "http://0x7f.1:PORT/",
    "http://LOCALHOST:PORT/",
    "http://[::1%25eth0]:PORT/",
    "http://127.0.0.2:PORT/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "unix:///x",
    "gopher://127.0.0.1/",
    "http:///127.0.0.1:PORT/",
    "http:127.0.0.1:PORT/",
    " http://127.0.0.1:PORT/",
    "HTTP://127.0.0.1:PORT/",
    "//127.0.0.1:PORT/",
)

# What aiohttp raises for a URL it will not take, and for one it cannot connect to.
FAILURES = (aiohttp.ClientError, OSError, ValueError)


@dataclass
class Listener:
    """A server on loopback that keeps account of every connection, whatever is said on it."""

    answer: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    port: int = 0
    accepted: list[str] = field(default_factory=list)
    """The addresses that were connected to."""

    async def serve(self, stack: AsyncExitStack, address: str) -> None:
        """Listen on *address* until *stack* is closed, on one port for all addresses."""
        server = await asyncio.start_server(self._reply, address, self.port)
        await stack.enter_async_context(server)
        self.port = server.sockets[0].getsockname()[1]

    async def _reply(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Count a connection, and answer what is asked on it."""
        self.accepted.append(writer.get_extra_info("sockname")[0])
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            await writer.drain()
        writer.close()


@dataclass
class Answers(AbstractResolver):
    """A name server that gives the next of its answers at each question, round and round."""

    answers: Iterator[tuple[str, ...]]

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Give the next answer, whatever *host* and *family* are."""
        del family
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in next(self.answers)
        ]

    async def close(self) -> None:
        """Close nothing."""


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    """Listen on one port of 127.0.0.1, of 127.0.0.2, and of ::1 where there is IPv6."""
    listener = Listener()
    async with AsyncExitStack() as stack:
        await listener.serve(stack, "127.0.0.1")
        await listener.serve(stack, "127.0.0.2")
        with suppress(OSError):
            await listener.serve(stack, "::1")
        yield listener


async def fetch(
    url: str, policy: EgressPolicy, resolver: AbstractResolver | None = None
) -> tuple[int, str]:
    """Get *url* through the guard, as a hop does; give the status and the redirect's target."""
    connector = aiohttp.TCPConnector(
        socket_factory=guarded_socket_factory(policy), resolver=resolver, use_dns_cache=False
    )
    timeout = aiohttp.ClientTimeout(total=3)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
        session.get(url, allow_redirects=False) as response,
    ):
        return response.status, response.headers.get("Location", "")


def guard_of(listener: Listener) -> EgressPolicy:
    """Give a policy that has nothing against the listener's port."""
    return EgressPolicy(ports=frozenset({listener.port}))


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_spelling_of_this_machine_is_connected_to(
    listener: Listener, spelling: str
) -> None:
    """However loopback is written, no connection arrives there."""
    url = spelling.replace("PORT", str(listener.port))

    with pytest.raises(FAILURES):
        await fetch(url, guard_of(listener))

    assert [] == listener.accepted


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_redirect_leads_to_this_machine(listener: Listener, spelling: str) -> None:
    """A ``Location`` that is followed by hand is judged like any other URL."""
    target = spelling.replace("PORT", str(listener.port)).encode()
    head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + target + b"\r\n\r\n"
    redirecting = Listener(answer=head)
    async with AsyncExitStack() as stack:
        await redirecting.serve(stack, "127.0.0.1")
        start = f"http://127.0.0.1:{redirecting.port}/"
        status, location = await fetch(start, EgressPolicy(allow=LOOPBACK))

    assert 302 == status
    with pytest.raises(FAILURES):
        await fetch(str(URL(start).join(URL(location))), guard_of(listener))
    assert [] == listener.accepted


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.0.0.2", "0.0.0.0", "10.0.0.1", "169.254.169.254", "192.168.0.1"),
        *("::1", "::", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::1"),
        *("fe80::1%lo", "fc00::1", "fec0::1", "ff02::1"),
    ],
)
async def test_no_name_leads_to_this_machine(listener: Listener, address: str) -> None:
    """Whatever address a name has, it is judged, and the error says so by its type."""
    answers = Answers(iter([(address,)]))

    with pytest.raises(aiohttp.ClientConnectorError) as caught:
        await fetch(f"http://ads.example.com:{listener.port}/", guard_of(listener), answers)

    assert isinstance(caught.value.os_error, EgressRefused)
    assert [] == listener.accepted


async def test_a_refusal_keeps_its_type_for_many_addresses(listener: Listener) -> None:
    """Where all addresses of a name are refused, for different reasons, the error says so."""
    answers = Answers(iter([("127.0.0.1", "::1", "10.0.0.1")]))

    with pytest.raises(aiohttp.ClientConnectorError) as caught:
        await fetch(f"http://ads.example.com:{listener.port}/", guard_of(listener), answers)

    assert isinstance(caught.value.os_error, EgressRefused)
    assert [] == listener.accepted


async def test_a_name_with_one_good_address_is_reached_there(listener: Listener) -> None:
    """Of a name's addresses, those that are refused are passed over."""
    policy = EgressPolicy(allow=(ip_network("127.0.0.1/32"),))
    answers = Answers(iter([("127.0.0.2", "127.0.0.1")]))

    status, _ = await fetch(f"http://ads.example.com:{listener.port}/", policy, answers)

    assert 200 == status
    assert ["127.0.0.1"] == listener.accepted


async def test_a_name_that_changes_its_address_is_judged_anew(listener: Listener) -> None:
    """A name that was good once is refused when it points elsewhere (DNS rebinding)."""
    policy = EgressPolicy(allow=(ip_network("127.0.0.1/32"),))
    answers = Answers(iter([("127.0.0.1",), ("127.0.0.2",)] * 2))
    url = f"http://ads.example.com:{listener.port}/"
    for _ in range(2):
        await fetch(url, policy, answers)
        with pytest.raises(aiohttp.ClientConnectorError):
            await fetch(url, policy, answers)

    assert ["127.0.0.1"] * 2 == listener.accepted


@pytest.mark.parametrize("spelling", ["http://127.0.0.1:PORT/", "http://127.0.0.2:PORT/"])
async def test_an_allowed_network_is_reached_on_any_port(listener: Listener, spelling: str) -> None:
    """What the operator allows is reached, on ports that others may not use, too."""
    url = spelling.replace("PORT", str(listener.port))
    policy = EgressPolicy(allow=LOOPBACK)

    assert policy.url_problem(url) is None
    assert (200, "") == await fetch(url, policy)
    assert 1 == len(listener.accepted)


def test_a_refusal_is_an_os_error_with_a_number() -> None:
    """A refusal looks like a failed connection; the reason is kept for the trace alone."""
    refused = EgressRefused("127.0.0.1 is loopback")

    assert errno.EACCES == refused.errno
    assert "127.0.0.1 is loopback" == refused.reason
    assert "[Errno 13] refused by the egress guard" == str(refused)


@pytest.mark.parametrize(
    ("family", "address", "reason"),
    [
        (socket.AF_INET, ("127.0.0.1", 80), "127.0.0.1 is loopback, RFC 1122 (127.0.0.0/8)"),
        (socket.AF_INET, ("8.8.8.8", 22), "port 22 is none of [80, 443]"),
        (socket.AF_INET6, ("::1", 80, 0, 0), "::1 is unspecified or loopback, RFC 4291 (::/127)"),
        (socket.AF_UNIX, ("/run/x.sock", 80), "address family 1 is not of the internet"),
    ],
)
def test_no_socket_is_made_for_a_refused_address(
    family: int, address: tuple[str, int], reason: str
) -> None:
    """The factory refuses with the reason, and only the internet's families are known to it."""
    factory = guarded_socket_factory(EgressPolicy())

    with pytest.raises(EgressRefused) as caught:
        factory((family, socket.SOCK_STREAM, 0, "", address))

    assert reason == caught.value.reason


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, ("8.8.8.8", 443)), (socket.AF_INET6, ("2606:4700::1", 443, 0, 0))],
)
def test_a_socket_is_made_for_a_public_address(family: int, address: tuple[str, int]) -> None:
    """The factory makes the socket that was asked for."""
    factory = guarded_socket_factory(EgressPolicy())
    with factory((family, socket.SOCK_STREAM, 0, "", address)) as made:
        assert (family, socket.SOCK_STREAM) == (made.family, made.type)


PUBLIC = (
    *("1.1.1.1", "8.8.8.8", "93.184.216.34", "9.255.255.255", "11.0.0.0", "100.63.255.255"),
    *("100.128.0.0", "126.255.255.255", "128.0.0.0", "172.15.255.255", "172.32.0.0"),
    *("192.0.1.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0"),
    *("223.255.255.255", "2000::", "2001:200::", "2001:4860:4860::8888", "2606:4700::1111"),
    *("2003::", "2a00::1", "3ffe::1", "::ffff:8.8.8.8", "::FFFF:0808:0808", "2606:4700::1%eth0"),
)
SPECIAL = (
    *("0.0.0.0", "0.255.255.255", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.127.255.255"),
    *("127.0.0.1", "127.255.255.255", "169.254.169.254", "172.16.0.0", "172.31.255.255"),
    *("192.0.0.8", "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.168.1.1"),
    *("192.175.48.6", "198.18.0.0", "198.19.255.255", "198.51.100.1", "203.0.113.9"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::2", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1"),
    *("64:ff9b::8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1", "100::1", "1fff::1", "4000::1"),
    *("2001::1", "2001:1ff:ffff::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1"),
    *("2620:4f:8000::1", "3fff::1", "3fff:fff:ffff::", "5f00::1", "fc00::1", "fdff::1"),
    *("fe80::1", "fe80::1%lo", "febf::1", "fec0::1", "ff02::1", "ffff::"),
)
NO_ADDRESS = (
    *("", "localhost", "127.1", "0177.0.0.1", "0x7f.0.0.1", "2130706433", "1.2.3.4.", "1.2.3.256"),
    *("[::1]", ":::", "1::2::3", "12345::", "::ffff:1.2.3", "1.2.3.4\x00", "\udc85", "①.1.1.1"),
)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_pass(address: str) -> None:
    """Addresses around and outside the special blocks may be reached."""
    assert EgressPolicy().address_problem(address) is None


@pytest.mark.parametrize("address", SPECIAL)
def test_special_addresses_are_refused(address: str) -> None:
    """Every special block is refused, first address to last, and whatever is wrapped in IPv6."""
    problem = EgressPolicy().address_problem(address)

    assert problem is not None
    assert problem.startswith(f"{address} is ")
    assert "RFC" in problem


@pytest.mark.parametrize("address", NO_ADDRESS)
def test_what_is_no_address_is_refused(address: str) -> None:
    """Spellings that only some parsers take for an address are none."""
    assert f"{address!r} is no IP address" == EgressPolicy().address_problem(address)


@pytest.mark.parametrize(
    ("address", "reached"),
    [
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b:0:0:1::808:808", False),
        ("64:ff9b:1::808:808", False),
    ],
)
def test_nat64_is_judged_by_what_it_leads_to(address: str, *, reached: bool) -> None:
    """Where DNS64 is in use, the IPv4 address inside decides; elsewhere such addresses are none."""
    assert reached == (EgressPolicy(nat64=True).address_problem(address) is None)
    assert EgressPolicy().address_problem(address) is not None


@pytest.mark.parametrize(
    ("address", "port", "problem"),
    [
        ("10.1.2.3", 8080, None),
        ("::ffff:10.1.2.3", 8080, None),
        ("fd00::1", 5000, None),
        ("10.1.2.3", 80, None),
        ("11.1.2.3", 8080, "port 8080 is none of [80, 443]"),
        ("11.1.2.3", 80, None),
        ("192.168.1.1", 80, "192.168.1.1 is private, RFC 1918 (192.168.0.0/16)"),
        ("fd01::1", 80, "fd01::1 is unique local, RFC 4193 (fc00::/7)"),
        ("::10.1.2.3", 80, "::10.1.2.3 is outside of global unicast 2000::/3, RFC 3587"),
        ("nonsense", 80, "'nonsense' is no IP address"),
    ],
)
def test_an_allowed_network_wins_over_table_and_ports(
    address: str, port: int, problem: str | None
) -> None:
    """An operator who allows a network means its ports, too, and its addresses inside IPv6."""
    policy = EgressPolicy(allow=(*PRIVATE, ip_network("fd00::/32")))

    assert problem == policy.endpoint_problem(address, port)


def test_allowed_ports_replace_the_usual_ones() -> None:
    """The list of ports is the whole list."""
    policy = EgressPolicy(ports=frozenset({8443}))

    assert policy.endpoint_problem("8.8.8.8", 8443) is None
    assert "port 443 is none of [8443]" == policy.endpoint_problem("8.8.8.8", 443)


def test_this_machines_addresses_are_refused() -> None:
    """The machine's own addresses are refused though public, unless the operator allows them."""
    mine = frozenset({"8.8.8.8", "2606:4700::1"})
    policy = EgressPolicy(own_addresses=mine)

    assert "8.8.8.8 is this machine's own address" == policy.address_problem("8.8.8.8")
    assert policy.address_problem("::ffff:8.8.8.8") is not None
    assert policy.address_problem("2606:4700:0::1") is not None
    assert policy.address_problem("8.8.4.4") is None
    allowing = EgressPolicy(own_addresses=mine, allow=(ip_network("8.8.8.8/32"),))
    assert allowing.address_problem("8.8.8.8") is None


def test_found_addresses_are_this_machines() -> None:
    """What is found as an own address can be bound to, and is refused by the policy."""
    found = own_addresses()
    policy = EgressPolicy(own_addresses=found)

    assert 2 >= len(found)
    for address in found:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
        assert f"{address} is this machine's own address" == policy.address_problem(address)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://ads.example.com/vast", None),
        ("https://ads.example.com", None),
        ("HTTPS://ADS.Example.COM.:443/?a=[CACHEBUSTING]#x", None),
        ("http://ads.example.com:/vast", None),
        ("http://ads.example.com:443/vast", None),
        ("http://my_ads.example.com?u=http://u@127.0.0.1/", None),
        ("http://8.8.8.8/", None),
        ("http://[2606:4700::1]/", None),
        ("http://xn--bcher-kva.example/", None),
        ("", "no absolute URL of scheme http or https"),
        ("/vast", "no absolute URL of scheme http or https"),
        ("//ads.example.com/", "no absolute URL of scheme http or https"),
        ("ftp://ads.example.com/", "no absolute URL of scheme http or https"),
        ("javascript:alert(1)", "no absolute URL of scheme http or https"),
        ("http\u017f://ads.example.com/", "no absolute URL of scheme http or https"),
        ("http:///vast", "no host in the URL"),
        ("http://user@ads.example.com/", "a user name in the URL"),
        ("http://@ads.example.com/", "a user name in the URL"),
        ("http://ads.example.com\\.evil.net/", r"'ads.example.com\\.evil.net' is no host"),
        ("http://ads.example.com\t/", "a blank or a control character in the URL"),
        ("http://ads .example.com/", "a blank or a control character in the URL"),
        ("http://ads.example.com/\r\nX: y", "a blank or a control character in the URL"),
        ("http://ads%2eexample.com/", "'ads%2eexample.com' is no host"),
        ("http://b\u00fccher.example/", "'b\u00fccher.example' is no host"),
        ("http://[CACHEBUSTING].example.com/", "'[CACHEBUSTING].example.com' is no host"),
        ("http://ads..example.com/", "'ads..example.com' is no host"),
        ("http://.example.com/", "'.example.com' is no host"),
        ("http://[::1%25lo]/", "'[::1%25lo]' is no host"),
        ("http://[::1/", "'[::1' is no host"),
        ("http://[]/", "'[]' is no host"),
        (f"http://{'a' * 64}.example.com/", f"'{'a' * 64}.example.com' is no host"),
        (f"http://{'a.' * 126}com/", f"'{('a.' * 126 + 'com')[:253]}' is no host"),
        ("http://ads.example.com:8080/", "port 8080 is none of [80, 443]"),
        ("http://ads.example.com:0/", "there is no port 0"),
        ("http://ads.example.com:99999/", "there is no port 99999"),
        ("http://ads.example.com:x/", "'ads.example.com:x' is no host"),
        ("http://intranet/", "intranet is a name of a local network"),
        ("http://localhost/", "localhost is a name of a local network"),
        ("http://a.localhost./", "a.localhost is a name of a local network"),
        ("http://printer.LOCAL/", "printer.local is a name of a local network"),
        ("http://metadata.google.internal/", "metadata.google.internal is a name of a local"),
        ("http://nas.home.arpa/", "nas.home.arpa is a name of a local network"),
        ("http://127.0.0.1/", "127.0.0.1 is loopback"),
        ("http://127.0.0.1./", "127.0.0.1 is loopback"),
        ("http://[::1]/", "::1 is unspecified or loopback"),
        ("http://[8.8.8.8]/", "'[8.8.8.8]' is no host"),
        ("http://[:::]/", "':::' is no IP address"),
        ("http://8.8.8.8:22/", "port 22 is none of [80, 443]"),
        ("http://2130706433/", "'2130706433' is no IP address"),
        ("http://127.1/", "'127.1' is no IP address"),
        ("http://0x7F.1/", "'0x7f.1' is no IP address"),
        ("http://0x/", "'0x' is no IP address"),
        ("http://example.0x7f000001/", "'example.0x7f000001' is no IP address"),
        ("http://proxy.example.com/hop/x", "proxy.example.com is the proxy itself"),
        ("https://PROXY.example.com.:443/", "proxy.example.com is the proxy itself"),
        ("http://edge.example.com:443/", "edge.example.com is the proxy itself"),
        ("http://edge.example.com/", None),
        ("http://ads.example.com/" + "x" * MAX_URL, "a URL of 8213 characters, more than 8190"),
    ],
)
def test_the_gate_judges_a_url_by_its_look(url: str, problem: str | None) -> None:
    """Before any name is looked up, a URL is refused for its scheme, its host or its port."""
    own = frozenset({"Proxy.example.com", "edge.example.com:443"})
    found = EgressPolicy(own_hosts=own).url_problem(url)

    assert problem == (problem and found and found[: len(problem)])
    assert (problem is None) == (found is None)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_gate_alone_refuses_every_spelling(spelling: str) -> None:
    """No spelling of this machine passes the gate, even on a port that is allowed."""
    policy = EgressPolicy(ports=frozenset({8080}))

    assert policy.url_problem(spelling.replace("PORT", "8080")) is not None


@pytest.mark.parametrize(
    ("url", "passes"),
    [
        ("http://adserver:8080/", True),
        ("http://ads.cluster.local:8080/", True),
        ("http://localhost:8080/", True),
        ("http://10.1.2.3:8080/", True),
        ("http://127.0.0.1:8080/", False),
        ("http://127.0.0.1/", False),
        ("http://8.8.8.8:8080/", False),
        ("http://u@adserver/", False),
        ("http://adserver:0/", False),
        ("http://2130706433/", False),
        ("http://proxy.example.com/", False),
        ("ftp://adserver/", False),
    ],
)
def test_with_allowed_networks_names_are_left_to_the_socket(url: str, *, passes: bool) -> None:
    """A name may lie in an allowed network: only its socket can tell. Literals are judged now."""
    policy = EgressPolicy(allow=PRIVATE, own_hosts=frozenset({"proxy.example.com"}))

    assert passes == (policy.url_problem(url) is None)


def test_a_policy_is_a_value() -> None:
    """Equal policies are equal and hash alike; a policy does not change."""
    policy = EgressPolicy(allow=PRIVATE)

    assert EgressPolicy(allow=PRIVATE) == policy
    assert 1 == len({policy, EgressPolicy(allow=PRIVATE)})
    with pytest.raises(FrozenInstanceError):
        policy.nat64 = True  # type: ignore[misc]


PIECES = st.sampled_from(
    (
        *("http://", "https://", "HTTP://", "//", "/", "@", ":", "\\", "?", "#", "%", "%2e", " "),
        *("a", "example.com", ".", "127.0.0.1", "8.8.8.8", "[", "]", "[2606:4700::1]", "0x7f", "1"),
        *("80", "443", "localhost", "\t", "\n", "\x00", "。", "①", "é", "\udc85", "_", "-", "xn--"),
    )
)


@given(
    url=st.text()
    | st.lists(PIECES, max_size=8).map("".join)
    | st.lists(PIECES, max_size=8).map(lambda pieces: "http://" + "".join(pieces)),
    allow=st.sampled_from([(), PRIVATE]),
)
def test_what_passes_the_gate_is_read_alike_by_yarl(url: str, allow: tuple) -> None:  # type: ignore[type-arg]
    """Any text is judged without raising; host and port of what passes are yarl's host and port."""
    if EgressPolicy(allow=allow).url_problem(url) is None:
        read = URL(url, encoded=True)
        authority = url.split("://", 1)[1].replace("?", "/").replace("#", "/").split("/")[0]
        host = authority.lower().removesuffix(f":{read.explicit_port or ''}").strip("[]")

        assert read.scheme in {"http", "https"}
        assert read.user is None
        assert host == (read.raw_host or "").lower()
        assert allow or read.port in {80, 443}


@given(address=st.ip_addresses(v=4) | st.ip_addresses(v=6))
def test_every_address_is_judged_alike_in_both_families(address: IPv4Address | IPv6Address) -> None:
    """An IPv4 address and its IPv6 form are one; what is private for Python is never public."""
    problem = EgressPolicy().address_problem(str(address))
    if isinstance(address, IPv4Address):
        mapped = EgressPolicy().address_problem(f"::ffff:{address}")
        translated = EgressPolicy(nat64=True).address_problem(f"64:ff9b::{address}")
        assert {problem is None} == {mapped is None, translated is None}
    assert problem or not (address.is_private or address.is_multicast or address.is_loopback)


def borders() -> Iterator[str]:
    """Give the first and the last address of every known block, and their neighbours."""
    known = (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
        *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
        *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "::/96"),
        *("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64"),
        *("2000::/3", "2001::/23", "2001::/32", "2001:1::/32", "2001:2::/48", "2001:20::/28"),
        *("2001:30::/28", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3ffe::/16"),
        *("3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
    for network in map(ip_network, known):
        for edge in (network.network_address, network.broadcast_address):
            for step in (-1, 0, 1):
                with suppress(ValueError):  # past the end of all addresses
                    yield str(type(edge)(int(edge) + step))
        for _ in range(100):
            yield str(network.network_address + random.randrange(network.num_addresses))


def test_nothing_passes_that_another_guard_refuses() -> None:
    """Of 30,000 addresses, none passes that the IANA registries as ssrfguard reads them deny."""
    ssrfguard = pytest.importorskip(
        "ssrfguard", reason="ssrfguard, an oracle for development only, is not installed"
    )
    random.seed(3)
    addresses = [
        *borders(),
        *(str(IPv4Address(random.getrandbits(32))) for _ in range(20_000)),
        *(f"64:ff9b::{IPv4Address(random.getrandbits(32))}" for _ in range(3_000)),
        *(str(IPv6Address((0x2002 << 112) + random.getrandbits(112))) for _ in range(1_000)),
        *(str(IPv6Address((1 << 125) + random.getrandbits(125))) for _ in range(3_000)),
    ]
    theirs, ours = ssrfguard.Policy(), EgressPolicy()
    passed = [each for each in addresses if ours.address_problem(each) is None]

    assert 30_000 < len(addresses)
    assert [] == [each for each in passed if not theirs.permits_address(ip_address(each))]
