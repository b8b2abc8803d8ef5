"""What the chaos proxy does to real connections."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from tests.chaos.proxy import ChaosProxy, in_thread
from tests.chaos.toxics import parse_toxic
from tests.support.ad_server import AdServer, Reply
from tests.support.ad_server import in_thread as ad_server_in_thread
from tests.support.proxy import ask


@contextlib.asynccontextmanager
async def an_echo() -> AsyncIterator[tuple[str, int]]:
    """Run a server that sends back all it gets; give its address."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send back what comes."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[:2]


@contextlib.asynccontextmanager
async def a_proxy(*toxics: str, seed: int = 0) -> AsyncIterator[ChaosProxy]:
    """Run a chaos proxy with *toxics* in front of an echo."""
    async with (
        an_echo() as target,
        ChaosProxy(target, [parse_toxic(each) for each in toxics], seed=seed) as proxy,
    ):
        yield proxy


@contextlib.asynccontextmanager
async def connected(
    proxy: ChaosProxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect to *proxy*."""
    reader, writer = await asyncio.open_connection(proxy.address, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def exchange(proxy: ChaosProxy, data: bytes = b"0123456789") -> tuple[bytes, str]:
    """Send *data* and an end; give what came back, and how it ended: closed, reset, silent."""
    async with connected(proxy) as (reader, writer):
        got = b""
        try:
            async with asyncio.timeout(0.5):
                writer.write(data)
                writer.write_eof()
                while more := await reader.read(65536):
                    got += more
        except TimeoutError:
            return got, "silent"
        except ConnectionError:
            return got, "reset"
    return got, "closed"


async def test_no_toxics() -> None:
    """Without toxics bytes pass both ways, and so do the ends."""
    async with a_proxy() as proxy:
        assert (b"0123456789", "closed") == await exchange(proxy)
        assert (bytes(1_000_000), "closed") == await exchange(proxy, bytes(1_000_000))
        await proxy.wait_links(0)

        assert {"close": 2} == proxy.facts.ends
        assert {"server": 1_000_010, "client": 1_000_010} == proxy.facts.sent
        assert 2 == len(proxy.facts.accepted)


@pytest.mark.parametrize(
    ("toxic", "expected"),
    [
        ("slice=3,pause=1ms", (b"0123456789", "closed")),
        ("drip=1ms", (b"0123456789", "closed")),
        ("reset_after=4,toward=client", (b"0123", "reset")),
        ("reset_after=4,toward=server", (b"0123", "reset")),
        ("reset_after=0", (b"", "reset")),
        ("close_after=4,toward=client", (b"0123", "closed")),
        ("half_close_after=4,toward=client", (b"0123", "closed")),
        ("half_close_after=4,toward=server", (b"0123", "closed")),
        ("cut", (b"", "silent")),
        ("cut,toward=client", (b"", "silent")),
        ("slow_close=2s,toward=client", (b"0123456789", "silent")),
        ("latency=2s", (b"", "silent")),
        ("drop_replies=1", (b"", "reset")),
    ],
)
async def test_toxic(toxic: str, expected: tuple[bytes, str]) -> None:
    """Each toxic does what it says to a connection, and no task or socket is left of it."""
    async with a_proxy(toxic) as proxy:
        assert expected == await exchange(proxy)
    assert 0 == proxy.links


@pytest.mark.parametrize(
    ("toxic", "heard"),
    [
        ("silent_after=4,toward=client", b"0123"),
        ("silent_after=4,toward=server", b"0123"),
        ("silent_after=0", b""),
    ],
)
async def test_silence(toxic: str, heard: bytes) -> None:
    """A connection that fell silent stays so, and is over when its client goes."""
    async with a_proxy(toxic) as proxy:
        async with connected(proxy) as (reader, writer):
            writer.write(b"0123456789")
            assert heard == await reader.readexactly(len(heard))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(10), 0.1)
        await proxy.wait_links(0)

        assert {"close": 1} == proxy.facts.ends


async def test_half_close_keeps_the_other_direction() -> None:
    """The end of one direction lets the other one go on."""
    async with a_proxy("half_close_after=4,toward=server") as proxy, connected(proxy) as pair:
        reader, writer = pair
        writer.write(b"0123456789")

        assert b"0123" == await reader.read()
        assert 1 == proxy.links


async def test_latency_does_not_add_up() -> None:
    """Reads that came one after the other are late by the same time, not each by the sum."""
    async with a_proxy("latency=100ms,toward=server") as proxy, connected(proxy) as pair:
        reader, writer = pair
        began = time.perf_counter()
        for _ in range(10):
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.01)
        await reader.readexactly(10)

    assert 0.1 < time.perf_counter() - began < 0.6


async def test_garbage() -> None:
    """Garbage comes ahead of what was sent, and is the same for the same seed."""
    gots = []
    for seed in (1, 1, 2):
        async with a_proxy("garbage=8,toward=client", seed=seed) as proxy:
            gots.append(await exchange(proxy))
    (first, end), again, other = gots

    assert ("closed", 18, b"0123456789") == (end, len(first), first[8:])
    assert (first, end) == again
    assert first != other[0]


async def test_one_reply_is_dropped() -> None:
    """A reply that is dropped once was asked for at the server, and the next one comes."""
    async with AdServer(fallback=Reply(b"<VAST/>")) as server:
        async with ChaosProxy(("127.0.0.1", server.port)) as proxy:
            proxy.replies_to_drop = 1
            with pytest.raises(ConnectionError):
                await asyncio.to_thread(ask, proxy.base, "/a")
            answer = await asyncio.to_thread(ask, proxy.base, "/a")

        assert (2, 1) == (len(server.requests), proxy.facts.dropped)
        assert b"<VAST/>" == answer.body


async def test_share() -> None:
    """A share of the connections is harmed, by the seed always the same ones."""

    async def ends(seed: int) -> list[str]:
        """Give how connections end with a *seed*."""
        async with a_proxy("reset_after=0,share=50%", seed=seed) as proxy:
            return [(await exchange(proxy))[1] for _ in range(40)]

    first = await ends(7)

    assert 10 < first.count("reset") < 30
    assert first == await ends(7)
    assert first != await ends(8)


async def test_toxics_change_while_a_connection_lives() -> None:
    """Toxics that come and go are for connections that there are already, too."""
    async with a_proxy() as proxy, connected(proxy) as (reader, writer):
        writer.write(b"a")
        assert b"a" == await reader.read(10)
        proxy.toxics = (parse_toxic("cut"),)
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(10), 0.1)
        proxy.toxics = ()

        assert b"b" == await reader.read(10)


async def test_pauses_end_with_their_toxic() -> None:
    """What was delayed comes at once when the toxic is taken away, in one piece or many."""
    async with a_proxy("latency=1h") as proxy, connected(proxy) as (reader, writer):
        writer.write(b"a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(10), 0.1)
        proxy.toxics = (parse_toxic("drip=1h"),)
        writer.write(b"bc")
        assert b"a" == await reader.read(10)
        proxy.toxics = ()

        assert b"bc" == await reader.readexactly(2)


async def test_silence_has_no_hole() -> None:
    """A connection whose bytes were swallowed stays silent when the toxic is gone."""
    async with a_proxy("silent_after=1,toward=client") as proxy, connected(proxy) as pair:
        reader, writer = pair
        writer.write(b"abc")
        assert b"a" == await reader.read(10)
        proxy.toxics = ()
        writer.write(b"def")

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(10), 0.1)
        assert (b"0123456789", "closed") == await exchange(proxy)


async def test_down_and_up() -> None:
    """A proxy that is down refuses, has reset what there was, and keeps its port until it is up."""
    async with a_proxy() as proxy, connected(proxy) as (reader, writer):
        writer.write(b"a")
        await reader.read(1)
        await proxy.down()
        with pytest.raises(ConnectionError):
            await reader.read(1)
        with pytest.raises(ConnectionRefusedError):
            await exchange(proxy)
        await proxy.up()

        assert (b"0123456789", "closed") == await exchange(proxy)


async def test_server_that_is_gone() -> None:
    """Where nobody listens behind the proxy, connections are reset and counted."""
    async with an_echo() as target:
        pass
    async with ChaosProxy(target) as proxy:
        assert (b"", "reset") == await exchange(proxy)
        assert {"unreachable": 1} == proxy.facts.ends


def test_in_a_thread() -> None:
    """In a thread of its own, all is done when a call returns."""
    with (
        ad_server_in_thread(AdServer(fallback=Reply(b"<VAST/>"))) as server,
        in_thread(ChaosProxy(("127.0.0.1", server.port))) as proxy,
    ):
        assert 200 == ask(proxy.base, "/a").status
        proxy.down()
        with pytest.raises(ConnectionRefusedError):
            ask(proxy.base, "/a")
        proxy.up()
        proxy.set(parse_toxic("reset_after=0"))
        with pytest.raises(ConnectionError):
            ask(proxy.base, "/a")
        proxy.set()

        assert 200 == ask(proxy.base, "/a").status


async def test_repr() -> None:
    """It says where it is, what is behind it, and what harms."""
    async with a_proxy("cut,toward=client") as proxy:
        assert repr(proxy).startswith(f"<ChaosProxy 127.0.0.1:{proxy.port} to ('127.0.0.1', ")
        assert repr(proxy).endswith("), 0 connections, cut=true,toward=client>")
        await proxy.down()
        assert "down" in repr(proxy)
