"""The operator's questions about budgets and viewers."""

from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

from vastproxy.errors import StateAwayError
from vastproxy.flow.admission import Terms
from vastproxy.flow.budgets import Budget
from vastproxy.flow.caps import Cap
from vastproxy.flow.overview import Overview
from vastproxy.session.seals import ViewerNames
from vastproxy.state.base import Account, Hold, Level, money
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.windows import Span
from vastproxy.web.api import add_api

NAMES = ViewerNames(["a"])
CAP = Cap("/pre", 3, Span())
TERMS = Terms((CAP,), Budget("spring", 10_000_000))

Client = TestClient[web.Request, web.Application]


async def a_client(make: AiohttpClient, backend: InMemoryBackend) -> Client:
    """Serve the questions about *backend*."""
    app = web.Application()
    add_api(app, lambda: Overview(backend, NAMES, (("/pre", TERMS),)))
    return await make(app)


async def answer(client: Client, path: str, method: str = "GET") -> tuple[int, Any]:
    """Ask, and give status and JSON."""
    async with client.request(method, path) as reply:
        return reply.status, await reply.json()


async def seen(backend: InMemoryBackend, viewer: str) -> None:
    """Let *viewer* have seen an ad."""
    account = Account("viewer", NAMES.name(viewer))
    await backend.confirm([Hold(account, "o", (CAP.claim("viewer", 0),))])


async def test_budgets(aiohttp_client: AiohttpClient) -> None:
    """Budgets are told all together, and each by its campaign."""
    backend = InMemoryBackend()
    await backend.confirm([Hold(Account("campaign", "spring"), "o", (money(2_500_000),))])
    client = await a_client(aiohttp_client, backend)
    status, found = await answer(client, "/api/budgets")

    assert (200, ["spring"]) == (status, [each["campaign"] for each in found["budgets"]])
    assert (200, found["budgets"][0]) == await answer(client, "/api/budgets/spring")
    assert 2.5 == found["budgets"][0]["spent"]


@pytest.mark.parametrize("name", ["summer", "a%2Fb", "%FF", "%00", "%22%3Cscript%3E"])
async def test_no_such_campaign(aiohttp_client: AiohttpClient, name: str) -> None:
    """A campaign that no route names is not there, whatever it may be called."""
    status, found = await answer(
        await a_client(aiohttp_client, InMemoryBackend()), f"/api/budgets/{name}"
    )

    assert 404 == status
    assert found["error"].startswith("no route has a budget of the campaign ")


@pytest.mark.parametrize("viewer", ["alice", "a/b", "a b", "é", "x" * 500, "a?b#c", "%41"])
async def test_viewer(aiohttp_client: AiohttpClient, viewer: str) -> None:
    """A viewer is found by the id that the application has, and can be forgotten."""
    backend = InMemoryBackend()
    await seen(backend, viewer)
    client = await a_client(aiohttp_client, backend)
    path = f"/api/viewers/{quote(viewer, safe='')}"
    status, found = await answer(client, path)

    assert (200, [("/pre", 1, 3)]) == (
        status,
        [(each["cap"], each["counted"], each["limit"]) for each in found["caps"]],
    )
    assert (200, {"forgotten": True}) == await answer(client, path, "DELETE")
    assert (200, {"forgotten": False}) == await answer(client, path, "DELETE")
    assert (200, {"caps": [], "cookies": []}) == await answer(client, path)


async def test_no_viewer(aiohttp_client: AiohttpClient) -> None:
    """Nobody's state is not asked for, and nobody is forgotten."""
    client = await a_client(aiohttp_client, InMemoryBackend())

    assert 404 == (await client.get("/api/viewers/")).status
    assert 404 == (await client.delete("/api/viewers/")).status
    assert 405 == (await client.post("/api/viewers/alice")).status


async def test_state_is_away(aiohttp_client: AiohttpClient) -> None:
    """Where the state does not answer, an operator is told so, and given nothing made up."""

    class Away(InMemoryBackend):
        """Is not there."""

        async def levels(self, account: Account, claims: Any) -> list[Level]:
            """Fail."""
            raise StateAwayError(f"no answer about {account}, {len(claims)}")

        async def forget(self, account: Account) -> bool:
            """Fail."""
            raise StateAwayError(f"no answer about {account}")

    backend = Away()
    await seen(backend, "alice")
    client = await a_client(aiohttp_client, backend)
    found = [
        await answer(client, "/api/budgets"),
        await answer(client, "/api/budgets/spring"),
        await answer(client, "/api/viewers/alice"),
        await answer(client, "/api/viewers/alice", "DELETE"),
    ]

    assert [503] * 4 == [status for status, _ in found]
    assert {True} == {
        body["error"].startswith("the state backend does not answer: ") for _, body in found
    }
    assert "alice" not in str(found)


async def test_after_a_reload(aiohttp_client: AiohttpClient) -> None:
    """What is told is that of the config which is served now."""
    backend, terms = InMemoryBackend(), [TERMS]
    app = web.Application()
    add_api(app, lambda: Overview(backend, NAMES, (("/pre", terms[0]),)))
    client: Client = await aiohttp_client(app)
    before = await answer(client, "/api/budgets")
    terms[0] = Terms()

    assert 1 == len(before[1]["budgets"])
    assert (200, {"budgets": []}) == await answer(client, "/api/budgets")
