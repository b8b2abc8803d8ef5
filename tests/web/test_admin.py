"""The operator's side tells life from readiness."""

import pytest
from pytest_aiohttp.plugin import AiohttpClient

from vastproxy.web.admin import admin_app


@pytest.mark.parametrize(
    ("ready", "status", "word"), [(True, 200, "ready"), (False, 503, "not ready")]
)
async def test_readiness(
    aiohttp_client: AiohttpClient, *, ready: bool, status: int, word: str
) -> None:
    """While it drains the proxy is alive and not ready."""
    client = await aiohttp_client(admin_app(lambda: ready))
    readyz, healthz = await client.get("/readyz"), await client.get("/healthz")

    assert (status, {"status": word}) == (readyz.status, await readyz.json())
    assert (200, {"status": "ok"}) == (healthz.status, await healthz.json())


async def test_readiness_is_asked_each_time(aiohttp_client: AiohttpClient) -> None:
    """Readiness is what it is now, not what it was at the start."""
    states = iter([True, False])
    client = await aiohttp_client(admin_app(lambda: next(states)))

    assert [200, 503] == [(await client.get("/readyz")).status for _ in range(2)]


async def test_nothing_else_is_there(aiohttp_client: AiohttpClient) -> None:
    """Other paths are unknown, and other methods refused."""
    client = await aiohttp_client(admin_app(lambda: True))

    assert 404 == (await client.get("/")).status
    assert 405 == (await client.post("/readyz")).status


async def test_workers_are_counted(aiohttp_client: AiohttpClient) -> None:
    """With several processes readiness says how many there are."""
    workers = {"wanted": 4, "ready": 3}
    client = await aiohttp_client(admin_app(lambda: True, workers=lambda: workers))

    expected = {"status": "ready", "workers": workers}
    assert expected == await (await client.get("/readyz")).json()


async def test_metrics(aiohttp_client: AiohttpClient) -> None:
    """Metrics are written in Prometheus' text format each time they are asked for."""
    texts = iter([b"a 1\n", b"a 2\n"])
    client = await aiohttp_client(admin_app(lambda: True, metrics=lambda: next(texts)))

    first, second = await client.get("/metrics"), await client.get("/metrics")
    assert [b"a 1\n", b"a 2\n"] == [await first.read(), await second.read()]
    assert "text/plain" == first.content_type


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8081", 200),
        ("127.0.0.1:8081", 200),
        ("[::1]:8081", 200),
        ("evil.example", 421),
        ("evil.example:8081", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[evil", 421),
    ],
)
async def test_names_that_lead_here_by_trickery(
    aiohttp_client: AiohttpClient, host: str, status: int
) -> None:
    """A page whose own name leads to the listener reads nothing of it."""
    client = await aiohttp_client(admin_app(lambda: True, metrics=lambda: b""))

    answers = [await client.get(path, headers={"Host": host}) for path in ("/metrics", "/readyz")]
    assert [status, status] == [each.status for each in answers]
