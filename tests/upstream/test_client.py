"""One GET, one reply: what comes back, what is refused, and which connections are used."""

import asyncio
import gc
import gzip
import socket
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_network
from typing import Any

import brotli
import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from backports import zstd

from tests.support.ad_server import AdServer, Reply
from tests.support.hostile import FAULTS, Fault, HostileServer, Trap
from vastproxy.errors import (
    EgressBlockedError,
    RedirectError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamTooLargeError,
)
from vastproxy.model import HopReply, HopRequest
from vastproxy.upstream.client import AiohttpClient, default_resolver
from vastproxy.upstream.egress import EgressPolicy
from vastproxy.upstream.urls import target

LOOPBACK = EgressPolicy(allow=(ip_network("127.0.0.1/32"),))
PLAIN = b"<VAST>" + b"a" * 5000 + b"</VAST>"
MIB = 1024 * 1024

PACKED = {
    "gzip": gzip.compress(PLAIN),
    "deflate": zlib.compress(PLAIN),
    "br": brotli.compress(PLAIN),
    "zstd": zstd.compress(PLAIN),
}
ZEROS = bytes(8 * MIB)
BOMBS = {
    "gzip": gzip.compress(ZEROS),
    "deflate": zlib.compress(ZEROS),
    "br": brotli.compress(ZEROS, quality=1),
    "zstd": zstd.compress(ZEROS),
}


class FakeResolver(AbstractResolver):
    """Gives the same *addresses* for every name, and says when it was closed."""

    def __init__(self, *addresses: str) -> None:
        """Take the addresses."""
        self.addresses = addresses
        self.names: list[str] = []
        self.closed = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Remember *host*, and give the addresses."""
        self.names.append(host)
        return [
            ResolveResult(hostname=host, host=each, port=port, family=family, proto=0, flags=0)
            for each in self.addresses
        ]

    async def close(self) -> None:
        """Remember that."""
        self.closed = True


@pytest.fixture
async def server() -> AsyncIterator[AdServer]:
    """Run an ad server that has nothing unless it is told to."""
    async with AdServer() as running:
        yield running


@pytest.fixture
async def client() -> AsyncIterator[AiohttpClient]:
    """Open a client whose guarded requests may reach 127.0.0.1."""
    async with AiohttpClient(LOOPBACK) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def no_leaks() -> Iterator[None]:
    """A socket or transport that was left open warns when it is collected; warnings are errors."""
    yield
    gc.collect()


async def ask(
    client: AiohttpClient, url: str, *, within: float = 5.0, max_body: int = MIB, **more: Any
) -> HopReply:
    """Ask for *url* as a guarded hop, unless *more* says something else."""
    request = HopRequest(url, more.pop("headers", ()), more.pop("trusted", False), max_body, **more)
    return await client.get(request, asyncio.get_running_loop().time() + within)


def encoded(coding: str, body: bytes) -> Reply:
    """Answer *body*, which is said to be packed by *coding*."""
    return Reply(body, headers=(("Content-Encoding", coding),))


async def test_reply_is_whole(server: AdServer, client: AiohttpClient) -> None:
    """Status, headers in lower case and in order, and the body come back as they were sent."""
    server.replies["/x"] = Reply(b"body", 418, (("X-A", "1"), ("SET-cookie", "a=1"), ("X-a", "2")))
    reply = await ask(client, server.url("/x"))

    assert (418, b"body") == (reply.status, reply.body)
    assert (("x-a", "1"), ("set-cookie", "a=1"), ("x-a", "2")) == reply.headers[:3]


async def test_request_has_the_headers_it_was_given(
    server: AdServer, client: AiohttpClient
) -> None:
    """The given headers go out in order; the client adds only Host and Accept-Encoding."""
    server.replies["/x"] = b""
    await ask(client, server.url("/x"), headers=(("User-Agent", "TV"), ("X-B", "1"), ("X-B", "2")))
    sent = [each for each in server.requests[0].headers if each[0] != "Host"]

    assert [("User-Agent", "TV"), ("X-B", "1"), ("X-B", "2")] == [
        each for each in sent if each[0] != "Accept-Encoding"
    ]
    assert ["gzip, deflate, br, zstd"] == server.requests[0].values("Accept-Encoding")


async def test_redirects_are_given_back(server: AdServer, client: AiohttpClient) -> None:
    """A redirect is a reply like any other."""
    server.replies["/x"] = Reply(status=302, headers=(("Location", "/y"),))
    reply = await ask(client, server.url("/x"))

    assert (302, "/y") == (reply.status, reply.header("location"))
    assert 1 == len(server.requests)


async def test_cookies_are_not_kept(server: AdServer, client: AiohttpClient) -> None:
    """The client has no memory for cookies: that is the session's."""
    server.replies["/x"] = Reply(b"", headers=(("Set-Cookie", "a=1; Path=/"),))
    await ask(client, server.url("/x"))
    await ask(client, server.url("/x"))

    assert [{}, {}] == [each.cookies for each in server.requests]


@pytest.mark.parametrize("coding", PACKED)
async def test_packed_body_is_unpacked(
    server: AdServer, client: AiohttpClient, coding: str
) -> None:
    """A body in any coding that is asked for comes back unpacked."""
    server.replies["/x"] = encoded(coding, PACKED[coding])

    assert PLAIN == (await ask(client, server.url("/x"))).body


@pytest.mark.parametrize("coding", PACKED)
async def test_body_that_is_not_what_it_says(
    server: AdServer, client: AiohttpClient, coding: str
) -> None:
    """A body that cannot be unpacked is a failure of the ad server, and of nothing else."""
    server.replies["/x"] = encoded(coding, b"<VAST version='3.0'/> in the clear")
    with pytest.raises(UpstreamError) as raised:
        await ask(client, server.url("/x"))

    assert 301 == raised.value.vast_code


@pytest.mark.parametrize("coding", BOMBS)
async def test_bomb_is_refused(server: AdServer, client: AiohttpClient, coding: str) -> None:
    """The cap counts what comes out, not what goes in."""
    server.replies["/x"] = encoded(coding, BOMBS[coding])
    assert len(BOMBS[coding]) < 64 * 1024
    with pytest.raises(UpstreamTooLargeError, match="larger than 65536 bytes"):
        await ask(client, server.url("/x"), max_body=64 * 1024)


async def test_body_may_have_exactly_the_cap(server: AdServer, client: AiohttpClient) -> None:
    """A body of the cap's size passes; one byte more does not."""
    server.replies["/x"] = b"a" * 1000

    assert 1000 == len((await ask(client, server.url("/x"), max_body=1000)).body)
    with pytest.raises(UpstreamTooLargeError):
        await ask(client, server.url("/x"), max_body=999)


async def test_deadline_is_a_point_in_time(server: AdServer, client: AiohttpClient) -> None:
    """A server that is silent beyond the deadline is a timeout, not starved by anybody."""
    server.replies["/x"] = Reply(b"", delay=30.0)
    with pytest.raises(UpstreamTimeoutError) as raised:
        await ask(client, server.url("/x"), within=0.1)

    assert not raised.value.starved


async def test_past_deadline(server: AdServer, client: AiohttpClient) -> None:
    """A deadline that has passed already is a timeout."""
    with pytest.raises(UpstreamTimeoutError):
        await ask(client, server.url("/x"), within=-1.0)


async def test_cancelled_request_is_no_timeout(server: AdServer, client: AiohttpClient) -> None:
    """Who is cancelled while waiting gets the cancellation, not an error of ours."""
    server.replies["/x"] = Reply(b"", delay=30.0)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(ask(client, server.url("/x")))
        await server.wait_seen("/x")
        task.cancel()

    assert task.cancelled()


@pytest.fixture(scope="module")
def faults() -> dict[str, Fault]:
    """Give the faults by name."""
    return {each.name: each for each in FAULTS}


async def outcome_of(client: AiohttpClient, url: str) -> HopReply | UpstreamError:
    """Ask for *url*, and give what came of it."""
    try:
        return await ask(client, target(url).url, within=0.4)
    except UpstreamError as error:
        return error


@pytest.mark.parametrize("name", [each.name for each in FAULTS])
async def test_faults_end_in_our_words(faults: dict[str, Fault], name: str) -> None:
    """Whatever a server does wrong, there is a reply within the cap, or an UpstreamError."""
    fault = faults[name]
    async with HostileServer() as hostile, AiohttpClient(LOOPBACK) as client:
        outcome = await outcome_of(client, hostile.url(fault, "k"))

    if isinstance(outcome, UpstreamError):
        assert not fault.harmless
        assert outcome.vast_code in {300, 301}
        assert "\n" not in outcome.reason
    else:
        assert len(outcome.body) <= MIB
        assert outcome.status != 200 or not fault.codes <= {301}


async def test_nobody_listens(client: AiohttpClient) -> None:
    """A refused connection is an unavailable ad server."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(UpstreamError, match="ClientConnectorError") as raised:
            await ask(client, f"http://127.0.0.1:{holder.getsockname()[1]}/")

    assert not isinstance(raised.value, EgressBlockedError | RedirectError)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"nonsense\r\n\r\n", "ClientResponseError: 400, "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "ClientResponseError: 400, "),
    ],
)
async def test_reason_has_no_url(
    server: AdServer, client: AiohttpClient, raw: bytes, words: str
) -> None:
    """What went wrong is said without the URL, which may name a viewer."""
    server.replies["/x"] = Reply(raw=raw)
    with pytest.raises(UpstreamError) as raised:
        await ask(client, server.url("/x?uid=somebody"))

    assert raised.value.reason.startswith(words)
    assert "somebody" not in str(raised.value)
    assert "http" not in raised.value.reason.removeprefix(words).lower().replace("http/", "")


async def test_reason_has_no_unusable_url(client: AiohttpClient) -> None:
    """Of a URL that cannot be asked no more is said than that."""
    with pytest.raises(UpstreamError) as raised:
        await ask(client, "http:///x?uid=somebody", trusted=True)

    assert "InvalidUrlClientError: no usable URL" == raised.value.reason


class DeadResolver(FakeResolver):
    """Finds nothing, and says so in its *words*."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Fail."""
        raise OSError(None, f"{' '.join(self.addresses)}: {host} ({family}, {port})")


@pytest.mark.parametrize(
    ("words", "local"),
    [
        ("Domain name not found", False),
        ("Timeout while contacting DNS servers", False),
        ("Could not contact DNS servers", True),
        ("Error reading file", True),
    ],
)
async def test_unknown_name(words: str, *, local: bool) -> None:
    """A name that is not found is told from a server that is away, and from our own resolver's."""
    async with AiohttpClient(EgressPolicy(), lambda: DeadResolver(words)) as client:
        with pytest.raises(UpstreamConnectError) as raised:
            await ask(client, "http://ads.example/x?uid=somebody")

    assert (True, local) == (raised.value.unknown, raised.value.local)
    assert "somebody" not in str(raised.value)


async def test_refused_connection_is_no_unknown_name(client: AiohttpClient) -> None:
    """Where nobody listens the name is known, and the fault not ours."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(UpstreamConnectError) as raised:
            await ask(client, f"http://127.0.0.1:{holder.getsockname()[1]}/")

    assert (False, False) == (raised.value.unknown, raised.value.local)


@pytest.mark.parametrize(("on_time", "late"), [(0.02, True), (30.0, False)])
async def test_busy_process_is_late(
    server: AdServer,
    client: AiohttpClient,
    monkeypatch: pytest.MonkeyPatch,
    *,
    on_time: float,
    late: bool,
) -> None:
    """A time-out that is noticed long after the deadline says that this process was busy."""
    monkeypatch.setattr("vastproxy.upstream.client.ON_TIME", on_time)
    server.replies["/x"] = Reply(b"", delay=30.0)
    # What keeps the loop from noticing is no waiting.
    asyncio.get_running_loop().call_later(0.05, time.sleep, 0.15)
    with pytest.raises(UpstreamTimeoutError) as raised:
        await ask(client, server.url("/x"), within=0.1)

    assert (late, False) == (raised.value.late, raised.value.starved)


async def test_header_that_cannot_be_sent(server: AdServer, client: AiohttpClient) -> None:
    """A header that would break the request is an UpstreamError, and nothing goes out."""
    with pytest.raises(UpstreamError):
        await ask(client, server.url("/x"), headers=(("X-A", "1\r\nX-B: 2"),))

    assert [] == server.requests


async def test_guarded_request_is_refused_early() -> None:
    """A URL that the gate refuses is never looked up, nor connected to."""
    resolver = FakeResolver("127.0.0.1")
    async with AiohttpClient(EgressPolicy(), lambda: resolver) as client:
        with pytest.raises(EgressBlockedError):
            await ask(client, "http://user@ads.example/")

    assert [] == resolver.names


async def test_guarded_request_is_refused_at_the_socket() -> None:
    """A public name that resolves to a private address reaches nobody."""
    with Trap("127.0.0.1") as trap:
        policy = EgressPolicy(ports=frozenset({trap.port}))
        async with AiohttpClient(policy, lambda: FakeResolver("127.0.0.1")) as client:
            with pytest.raises(EgressBlockedError, match="loopback"):
                await ask(client, f"http://ads.example:{trap.port}/")

        assert 0 == trap.reached


async def test_unlike_refusals_are_a_refusal() -> None:
    """A name all of whose addresses are refused, for different reasons, is refused as such."""
    resolver = FakeResolver("127.0.0.1", "10.0.0.1", "169.254.169.254")
    async with AiohttpClient(EgressPolicy(), lambda: resolver) as client:
        with pytest.raises(EgressBlockedError):
            await ask(client, "http://ads.example/")


async def test_resolver_may_be_another(server: AdServer) -> None:
    """Names are looked up by the resolver that was given, which is closed with the client."""
    server.replies["/x"] = b"found"
    resolver = FakeResolver("127.0.0.1")
    async with AiohttpClient(LOOPBACK, lambda: resolver) as client:
        reply = await ask(client, f"http://ads.example:{server.port}/x")

    assert b"found" == reply.body
    assert ["ads.example"] == resolver.names
    assert resolver.closed
    assert f"ads.example:{server.port}" == server.requests[0].header("Host")


async def test_default_resolver_can_be_closed() -> None:
    """The default resolver needs a running loop, and is gone after closing."""
    resolver = default_resolver()
    await resolver.close()

    assert isinstance(resolver, AbstractResolver)


async def test_connections_are_reused(server: AdServer, client: AiohttpClient) -> None:
    """Hops to one server go over one connection."""
    server.replies["/x"] = b"ok"
    for _ in range(3):
        await ask(client, server.url("/x"))

    assert [1, 1, 1] == [each.connection for each in server.requests]


async def test_trusted_and_guarded_never_share(server: AdServer, client: AiohttpClient) -> None:
    """A guarded request does not ride on a connection that nobody checked."""
    server.replies["/x"] = b"ok"
    for trusted in (True, False, True, False):
        await ask(client, server.url("/x"), trusted=trusted)

    assert [1, 2, 1, 2] == [each.connection for each in server.requests]


async def test_once_has_a_connection_of_its_own(server: AdServer, client: AiohttpClient) -> None:
    """What must not be sent twice goes over a new connection each time."""
    server.replies["/x"] = b"ok"
    await ask(client, server.url("/x"))
    for _ in range(2):
        await ask(client, server.url("/x"), once=True)
    await ask(client, server.url("/x"))

    assert [1, 2, 3, 1] == [each.connection for each in server.requests]


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("reply", [Reply(raw=b""), Reply(reset=True)], ids=["end", "reset"])
async def test_request_that_was_sent_is_never_repeated(
    server: AdServer, client: AiohttpClient, reply: Reply, *, once: bool, trusted: bool
) -> None:
    """A server that hangs up on a request hears it once: it may have been counted."""
    server.replies["/x"] = reply
    with pytest.raises(UpstreamError):
        await ask(client, server.url("/x"), once=once, trusted=trusted)

    assert 1 == len(server.requests)


async def test_connection_is_not_reused_after_a_large_body(
    server: AdServer, client: AiohttpClient
) -> None:
    """What is left of a body that was too large is not waited for."""
    server.replies |= {"/big": b"a" * 200_000, "/x": b"ok"}
    with pytest.raises(UpstreamTooLargeError):
        await ask(client, server.url("/big"), max_body=10)

    assert b"ok" == (await ask(client, server.url("/x"))).body
    assert [1, 2] == [each.connection for each in server.requests]


async def test_closing_ends_all_connections(server: AdServer) -> None:
    """Leaving the client closes its idle connections, and it says that it is closed."""
    server.replies["/x"] = b"ok"
    async with AiohttpClient(LOOPBACK) as client:
        assert "<AiohttpClient open>" == repr(client)
        await ask(client, server.url("/x"))
        await ask(client, server.url("/x"), trusted=True)
        connections = list(server._open)

    _, still_open = await asyncio.wait(connections, timeout=5)
    assert 2 == len(connections)
    assert set() == still_open
    assert "<AiohttpClient closed>" == repr(client)


@pytest.mark.parametrize("trusted", [False, True])
async def test_request_that_closing_cuts_off_is_nobodys_fault(
    server: AdServer, *, trusted: bool
) -> None:
    """What is under way when the client closes breaks off for want of something here."""
    server.replies["/x"] = Reply(b"", delay=30.0)
    client = AiohttpClient(LOOPBACK)
    async with asyncio.TaskGroup() as group:
        async with client:
            under_way = group.create_task(_failure(client, server.url("/x"), trusted=trusted))
            await server.wait_seen("/x")
        after = await _failure(client, server.url("/x"), trusted=trusted)

    assert 1 == len(server.requests)
    assert ["the proxy closes its connections"] * 2 == [
        each.reason for each in (under_way.result(), after)
    ]
    assert under_way.result().local
    assert after.local
    assert not after.unknown


async def _failure(client: AiohttpClient, url: str, *, trusted: bool) -> UpstreamConnectError:
    with pytest.raises(UpstreamConnectError) as raised:
        await ask(client, url, trusted=trusted)
    return raised.value


async def test_closed_client_may_be_opened_again(server: AdServer) -> None:
    """A client that was closed asks again when it is opened again."""
    server.replies["/x"] = b"found"
    client = AiohttpClient(LOOPBACK)
    async with client:
        pass
    async with client:
        reply = await ask(client, server.url("/x"))

    assert b"found" == reply.body
