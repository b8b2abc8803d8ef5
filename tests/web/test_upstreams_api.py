"""The operator's questions about upstreams, and breakers that are turned by hand."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient
from structlog.testing import capture_logs

from vastproxy.web.pictures import Picture
from vastproxy.web.upstreams_api import MAX_REASON, OwnUpstreams, Turn, add_upstreams

Client = TestClient[web.Request, web.Application]


def a_host(name: str, state: str = "closed", failures: int = 0) -> Picture:
    """Build the picture of a site."""
    return {"name": name, "breaker": {"state": state, "window": {"failures": failures}}}


@dataclass
class SomeGuards:
    """Two upstreams, one of which has no breaker, and what was turned."""

    turned: list[tuple[str, Turn, str]] = field(default_factory=list)

    def told(self) -> dict[str, list[Picture]]:
        """Say how they are."""
        hosts = [
            *(a_host("good.example"), a_host("bad.example", failures=1)),
            *(a_host("gone.example", "open"), a_host("back.example", "half-open")),
            {"name": "free.example", "breaker": None},
        ]
        return {"upstreams": [a_host("main"), {"name": "house", "breaker": None}], "hosts": hosts}

    def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
        """Take note, and tell the new state."""
        if name == "house":
            raise ValueError("the upstream house has no breaker (its mode is off)")
        if name != "main":
            return None
        self.turned.append((name, to, reason))
        return a_host(name, "closed" if to == "reset" else to)


@pytest.fixture
def guards() -> SomeGuards:
    """Give guards that nobody turned."""
    return SomeGuards()


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, guards: SomeGuards) -> Client:
    """Serve questions about the guards."""
    app = web.Application()
    add_upstreams(app, OwnUpstreams(guards))
    return await aiohttp_client(app)


async def answer(client: Client, path: str, method: str = "GET", **more: Any) -> tuple[int, Any]:
    """Ask, and give status and JSON."""
    async with client.request(method, path, **more) as reply:
        return reply.status, await reply.json()


async def turned(client: Client, name: str = "main", query: str = "", **more: Any) -> Any:
    """Turn a breaker, and give status and JSON."""
    return await answer(client, f"/api/upstreams/{name}/breaker{query}", "POST", **more)


async def test_all(client: Client, guards: SomeGuards) -> None:
    """All upstreams are told, and of the sites of hops those that have trouble."""
    status, found = await answer(client, "/api/upstreams")

    assert (200, guards.told()["upstreams"]) == (status, found["upstreams"])
    assert ["bad.example", "gone.example", "back.example"] == [
        each["name"] for each in found["hosts"]
    ]


@pytest.mark.parametrize(("query", "number"), [("?all=1", 5), ("?all", 5), ("?all=0", 3)])
async def test_all_hosts(client: Client, query: str, number: int) -> None:
    """All sites are told to who asks for them."""
    found = await answer(client, f"/api/upstreams{query}")

    assert number == len(found[1]["hosts"])


async def test_one(client: Client) -> None:
    """One upstream is told by its name."""
    assert (200, a_host("main")) == await answer(client, "/api/upstreams/main")


class Fleet(OwnUpstreams):
    """Several processes, of which the second does not answer."""

    async def told(self) -> Picture:
        """Say how they are, and who is silent."""
        return {**await super().told(), "unanswered": [2]}


async def test_one_of_several(aiohttp_client: AiohttpClient, guards: SomeGuards) -> None:
    """Of one upstream, too, it is told who did not answer."""
    app = web.Application()
    add_upstreams(app, Fleet(guards))
    found = await answer(await aiohttp_client(app), "/api/upstreams/main")

    assert (200, {**a_host("main"), "unanswered": [2]}) == found


@pytest.mark.parametrize("name", ["third", "%FF", "%00", "%22%3Cscript%3E", "gone.example"])
async def test_no_such_upstream(client: Client, name: str) -> None:
    """Where there is no such upstream the answer says which there are."""
    found = [
        await answer(client, f"/api/upstreams/{name}"),
        await turned(client, name, "?state=open"),
    ]

    assert [404, 404] == [status for status, _ in found]
    assert {True} == {body["error"].endswith("(there are: main, house)") for _, body in found}


@pytest.mark.parametrize("state", ["open", "closed", "reset"])
@pytest.mark.parametrize("way", ["json", "text", "form", "query"])
async def test_turning(client: Client, guards: SomeGuards, state: str, way: str) -> None:
    """A breaker is turned by JSON, whatever it is said to be, by a form, and by a query."""
    asked = {"state": state}
    match way:
        case "json":
            found = await turned(client, json=asked)
        case "text":
            head = {"Content-Type": "application/x-www-form-urlencoded"}
            found = await turned(client, data=f" {json.dumps(asked)}\n", headers=head)
        case "form":
            found = await turned(client, data=asked)
        case _:
            found = await turned(client, query=f"?state={state}")

    assert (200, a_host("main", "closed" if state == "reset" else state)) == found
    assert [("main", state, "by hand")] == guards.turned


async def test_reason(client: Client, guards: SomeGuards) -> None:
    """An operator may say why; it is cut and cleaned, and stands in the log."""
    with capture_logs() as logs:
        await turned(client, json={"state": "open", "reason": "billing\x1b[31m\n" + "x" * 500})
        await turned(client, query="?state=closed&reason=all%20good")
        await turned(client, json={"state": "open", "reason": ""})
        await turned(client, data=b'{"state": "open", "reason": "\\ud800"}')
    reasons = [reason for _, _, reason in guards.turned]

    assert "billing [31m x" == reasons[0][:14]
    assert MAX_REASON == len(reasons[0])
    assert ["all good", "by hand", "by hand"] == reasons[1:]
    assert [("breaker.by_hand", "main", "closed", "all good")] == [
        (each["event"], each["upstream"], each["state"], each["reason"]) for each in logs[1:2]
    ]


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"{}",
            b"opened",
            b"state=opened",
            b"state",
            b'{"state": null}',
            b'{"state": ["open"]}',
        ),
        *(
            b'{"state": "open", "reason": 3}',
            b'{"state": "open", "seconds": 60}',
            b'{"state": "open"',
        ),
        *(b'["open"]', b'{"state": "\xff\xfe"}', b'{"state": "\\ud800"}', b"state=open&x=1", b"\0"),
        b'{"a":' * 100_000,
    ],
    ids=lambda body: body[:40].decode("latin-1").encode("unicode_escape").decode(),
)
async def test_wrong_state(client: Client, guards: SomeGuards, body: bytes) -> None:
    """What cannot be understood is refused with what to write instead, and turns nothing."""
    status, found = await turned(client, data=body)

    assert (400, True) == (status, '(write {"state": "open"}, "closed" or' in found["error"])
    assert [] == guards.turned


async def test_no_breaker(client: Client) -> None:
    """An upstream without a breaker is left as it is, with the reason."""
    assert (
        409,
        {"error": "the upstream house has no breaker (its mode is off)"},
    ) == await turned(client, "house", "?state=open")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://[", "http://127.0.0.1"])
async def test_pages_of_others(client: Client, guards: SomeGuards, origin: str) -> None:
    """A page of another site cannot have the operator's browser turn a breaker."""
    found = await turned(client, query="?state=open", headers={"Origin": origin})

    assert (403, {"error": "pages of other sites turn no breaker"}) == found
    assert [] == guards.turned


async def test_own_page(client: Client, guards: SomeGuards) -> None:
    """A page of the same place may."""
    origin = f"http://{client.host}:{client.port}"
    status, _ = await turned(client, query="?state=open", headers={"Origin": origin})

    assert (200, 1) == (status, len(guards.turned))


async def test_wrong_methods(client: Client) -> None:
    """What may not be done is refused."""
    paths = ("/api/upstreams", "/api/upstreams/main")

    assert [405, 405] == [(await client.post(each)).status for each in paths]
    assert 405 == (await client.get("/api/upstreams/main/breaker")).status
    assert 404 == (await client.get("/api/upstreams/")).status


async def test_nobody_answers(aiohttp_client: AiohttpClient) -> None:
    """Where those who know do not answer, an operator is told so."""

    class Stuck:
        """Does not answer."""

        async def told(self) -> Picture:
            """Fail."""
            raise TimeoutError("no worker is ready")

        async def turn(self, name: str, to: Turn, reason: str) -> Picture | None:
            """Fail."""
            raise TimeoutError(f"no worker is ready for {name} {to} {reason}")

    app = web.Application()
    add_upstreams(app, Stuck())
    client: Client = await aiohttp_client(app)

    assert (503, {"error": "no worker is ready"}) == await answer(client, "/api/upstreams")
    assert 503 == (await answer(client, "/api/upstreams/main"))[0]
    assert 503 == (await turned(client, query="?state=open"))[0]


def test_repr(guards: SomeGuards) -> None:
    """What answers shows whom it asks."""
    assert repr(OwnUpstreams(guards)) == "<OwnUpstreams SomeGuards(turned=[])>"
