"""
A call goes out again only where nothing was sent: no ad server ever counts one request twice.

What an ad server has read, or may have read, is a failure, however it ends.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import trustme

from tests.functional.conftest import StartProxy, a_document, an_ad, metric
from tests.support.ad_server import AdServer, Reply
from tests.support.proxy import Proxy, a_config, ask, running_proxy

AN_AD = Reply(a_document(an_ad("main")))

BUDGET = 0.1
"""Share of calls that may be repetitions, where nobody says it."""

SPOILT = {
    "reset": Reply(reset=True),
    "closed": Reply(raw=b""),
    "head": Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Le", reset=True),
    "part": Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n<VAST"),
    "garbage": Reply(raw=b"\x00\x01\x02\r\n\r\n"),
    "500": Reply(status=500),
    "503": Reply(status=503, headers=(("Retry-After", "1"),)),
    "late": Reply(AN_AD.body, delay=1.0),
}
"""What comes of a request that an ad server has read."""


class Doorman:
    """
    Stands before an ad server with TLS, and resets the first *unwelcome* connections.

    It has read how those began, and no request was in that: TLS was not agreed on yet.
    """

    def __init__(self, behind: AdServer) -> None:
        self.behind = behind
        self.unwelcome = 0
        self.accepted = 0
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._met, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _met(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        hello = await reader.read(1 << 16)
        if self.accepted <= self.unwelcome:
            _reset(writer)
            return
        inside, outside = await asyncio.open_connection("127.0.0.1", self.behind.port)
        outside.write(hello)
        async with asyncio.TaskGroup() as group:
            group.create_task(_poured(reader, outside))
            group.create_task(_poured(inside, writer))

    def __repr__(self) -> str:
        return f"<Doorman port {self.port}, {self.accepted} connections>"


def _reset(writer: asyncio.StreamWriter) -> None:
    # A socket that lingers for no time is ended by RST instead of FIN.
    link = writer.get_extra_info("socket")
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _poured(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    sink.close()


@pytest.fixture(scope="module")
def proxy(ad_server: AdServer, closed_port: socket.socket, start_module_proxy: StartProxy) -> Proxy:
    """Run a proxy whose upstreams may all be asked three times, where nothing was sent."""
    off = {"circuit_breaker": {"mode": "off"}, "timeout": "500ms"}
    often = {"attempts": 2, "budget": "100%"}
    gone = f"http://127.0.0.1:{closed_port.getsockname()[1]}/ad"
    upstreams: dict[str, dict[str, Any]] = {
        **{name: {"endpoint": ad_server.url(f"/{name}"), "retry": often, **off} for name in SPOILT},
        "kept": {"endpoint": ad_server.url("/kept"), "retry": often, **off},
        "often": {"endpoint": gone, "retry": often, **off},
        "usual": {"endpoint": gone, **off},
        "never": {"endpoint": gone, "retry": {"attempts": 0}, **off},
        "fragile": {"endpoint": gone, "circuit_breaker": {"fail_max": 1}},
    }
    routes = [{"path": f"/{name}", "upstreams": [name]} for name in upstreams]
    return start_module_proxy(a_config(upstreams, routes))


@pytest.fixture(scope="module")
def closed_port() -> Iterator[socket.socket]:
    """Give a port on which nobody listens, and which nobody else is given."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder


def calls(proxy: Proxy, name: str) -> dict[str, int]:
    """Give what came of the calls of the upstream called *name*, but for what never did."""
    found: dict[str, int] = ask(proxy.admin, f"/api/upstreams/{name}").json()["calls"]
    return {each: count for each, count in found.items() if count}


def has_ad(proxy: Proxy, name: str) -> bool:
    """Ask the route called *name*."""
    return b"<Ad " in proxy.get(f"/{name}").body


# --- What was sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPOILT)
def test_what_was_read_is_not_sent_again(proxy: Proxy, ads: AdServer, name: str) -> None:
    """An ad server that has read a request gets it once, however that ends."""
    ads.replies[f"/{name}"] = SPOILT[name]
    found = [has_ad(proxy, name) for _ in range(3)]

    assert [False] * 3 == found
    assert 3 == len(ads.seen(f"/{name}"))
    assert {"failed": 3} == calls(proxy, name)


def test_what_was_read_on_a_kept_connection(proxy: Proxy, ads: AdServer) -> None:
    """That it worked over this connection before is no reason to send a request again."""
    ads.replies["/kept"] = AN_AD
    first = has_ad(proxy, "kept")
    used = ads.requests[0].connection
    ads.replies["/kept"] = Reply(reset=True)
    second = has_ad(proxy, "kept")

    assert (True, False) == (first, second)
    assert [True, True] == [each.connection == used for each in ads.seen("/kept")]
    assert {"ok": 1, "failed": 1} == calls(proxy, "kept")


async def test_what_was_read_in_part(start_proxy: StartProxy) -> None:
    """Of a request that went out nobody knows how much was read: it does not go out again."""
    came = 0

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read the beginning, and reset."""
        nonlocal came
        came += 1
        await reader.readexactly(1)
        _reset(writer)

    async with await asyncio.start_server(reset, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        retry = {"attempts": 2, "budget": "100%"}
        upstreams = {"main": {"endpoint": f"http://127.0.0.1:{port}/ad", "retry": retry}}
        proxy = start_proxy(a_config(upstreams, [{"path": "/ad", "upstreams": ["main"]}]))
        found = [await asyncio.to_thread(has_ad, proxy, "ad") for _ in range(3)]

    assert [False] * 3 == found
    assert 3 == came
    assert {"failed": 3} == calls(proxy, "main")


# --- What was not ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "unwelcome", "sent", "came"),
    [(1, 1, True, 2), (2, 2, True, 3), (1, 2, False, 2), (0, 1, False, 1)],
)
async def test_what_was_not_sent_is_sent_again(
    tmp_path: Path, attempts: int, unwelcome: int, came: int, *, sent: bool
) -> None:
    """A connection that ends before a request could go out is no answer: another one is made."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(tls)
    async with AdServer({"/ad": AN_AD}, tls=tls) as server, Doorman(server) as doorman:
        doorman.unwelcome = unwelcome
        endpoint = f"https://127.0.0.1:{doorman.port}/ad"
        retry = {"attempts": attempts, "budget": "100%"}
        config = a_config(
            {"main": {"endpoint": endpoint, "retry": retry, "timeout": "5s"}},
            [{"path": "/ad", "upstreams": ["main"], "deadline": "10s"}],
        )
        trusted = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        with running_proxy(config, tmp_path, environment=trusted) as proxy:
            found = await asyncio.to_thread(has_ad, proxy, "ad")
            told = calls(proxy, "main")
            again = metric(proxy, "vastproxy_upstream_retries_total", upstream="main")

    assert sent == found
    assert came == doorman.accepted
    assert int(sent) == len(server.requests)
    assert came - 1 == told.get("retried", 0) == again
    assert came - sent == told["failed"]


def test_repetitions_have_a_budget(proxy: Proxy) -> None:
    """Of an ad server that is gone, only a part of the calls is repeated."""
    count = 100
    found = [has_ad(proxy, "usual") for _ in range(count)]

    told = calls(proxy, "usual")
    assert {False} == set(found)
    assert count + told["retried"] == told["failed"]
    # One is there from the start; tenths do not add up to the last.
    assert told["retried"] in {count * BUDGET, count * BUDGET + 1}


def test_repetitions_have_an_end(proxy: Proxy) -> None:
    """A call goes out again so often and no more; or not at all, where that is off."""
    found = [has_ad(proxy, each) for each in ("often", "never")]

    assert [False, False] == found
    assert {"failed": 3, "retried": 2} == calls(proxy, "often")
    assert {"failed": 1} == calls(proxy, "never")


def test_open_breaker_is_not_asked_again(proxy: Proxy) -> None:
    """Where a failure opens the breaker nothing goes out again, and nothing is said to have."""
    found = [has_ad(proxy, "fragile") for _ in range(2)]

    assert [False, False] == found
    assert {"failed": 1, "breaker": 1} == calls(proxy, "fragile")
