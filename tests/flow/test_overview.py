"""What operators see of budgets, and of one viewer."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from vastproxy.errors import StateAwayError
from vastproxy.flow import overview as module
from vastproxy.flow.admission import Terms
from vastproxy.flow.budgets import Budget
from vastproxy.flow.caps import Cap
from vastproxy.flow.overview import Overview
from vastproxy.session.seals import ViewerNames
from vastproxy.state.base import Account, Claim, Hold, Level, money
from vastproxy.state.memory import InMemoryBackend
from vastproxy.state.windows import Span

NOW = 1_800_000_000_000
NAMES = ViewerNames(["a"])
VIEWER = Account("viewer", NAMES.name("alice"))
CAP = Cap("/pre", 3, Span("rolling", 3_600_000))
SPRING = Budget("spring", 10_000_000, price=2_500)


def a_backend() -> InMemoryBackend:
    """Build a state whose clock stands."""
    return InMemoryBackend(clock=lambda: NOW)


def an_overview(backend: InMemoryBackend, *routes: tuple[str, Terms]) -> Overview:
    """Build the overview of *routes*."""
    return Overview(backend, NAMES, routes)


async def test_budget() -> None:
    """A budget is told in units of its currency, with what is left, and how often asking failed."""
    backend = a_backend()
    await backend.confirm([Hold(SPRING.account, "a", (money(2_500_000),))])
    await backend.reserve([Hold(SPRING.account, "b", (money(500),))])
    await backend.increment("errors:spring", 3)
    overview = an_overview(backend, ("/pre", Terms(budget=SPRING)))

    assert {
        "campaign": "spring",
        "currency": "USD",
        "mode": "enforce",
        "spent": 2.5,
        "reserved": 0.0005,
        "limit": 10,
        "remaining": 7.4995,
        "percentage": 25.0,
        "errors": 3,
        "routes": ["/pre"],
    } == await overview.budget("spring")
    assert await overview.budget("summer") is None


async def test_routes_that_share_a_campaign() -> None:
    """A campaign is told once, with all its routes, whatever each says of prices."""
    other = replace(SPRING, price=9, ttl_ms=1)
    routes = [
        ("/a", Terms(budget=SPRING)),
        ("/b", Terms(budget=other)),
        ("/c", Terms(budget=replace(SPRING, campaign="c"))),
        ("/d", Terms()),
    ]
    found = await an_overview(a_backend(), *routes).budgets()

    assert [("spring", ["/a", "/b"]), ("c", ["/c"])] == [
        (each["campaign"], each["routes"]) for each in found
    ]


@pytest.mark.parametrize(
    ("limit", "spent", "remaining", "percentage"),
    [(10, 20, 0, 200.0), (0, 0, 0, 100.0), (3, 1, 0.000002, 33.3333)],
)
async def test_numbers(limit: int, spent: int, remaining: float, percentage: float) -> None:
    """A budget that is passed has nothing left; one of nothing is spent."""
    backend, budget = a_backend(), replace(SPRING, limit=limit)
    await backend.confirm([Hold(SPRING.account, "a", (money(spent),))])
    found = await an_overview(backend, ("/pre", Terms(budget=budget))).budget("spring")

    assert found is not None
    assert (remaining, percentage) == (found["remaining"], found["percentage"])


async def test_viewer() -> None:
    """Of a viewer the counters are told as caps, with their limits, and the cookies' names."""
    backend = a_backend()
    by_ad = Cap("launch", 2, Span(), by="creative")
    gone = Cap("gone", 9, Span("fixed", 1_000))
    long_id = "server/" + "x" * 60
    claims = (
        CAP.claim("viewer", NOW),
        by_ad.claim("a b|c", NOW),
        by_ad.claim(long_id, NOW),
        gone.claim("viewer", NOW),
    )
    await backend.confirm([Hold(VIEWER, "o", claims)])
    await backend.reserve([Hold(VIEWER, "p", claims[:1])])
    await backend.write_items(VIEWER, {'["uid","ads.example",1,"/"]': '["secret",1,null]'}, 60)
    terms = Terms((by_ad, CAP, replace(CAP, limit=2, mode="shadow")))
    found = await an_overview(backend, ("/pre", terms)).viewer("alice", NOW)
    caps = {each["cap"]: each for each in found["caps"]}
    launch = [each for each in found["caps"] if each["cap"] == "launch"]

    assert {
        "cap": "/pre",
        "window": "within 3600 s",
        "by": "viewer",
        "subject": "",
        "counted": 1,
        "reserved": 1,
        "limit": 2,
    } == caps["/pre"]
    assert [("creative", 2, 1)] * 2 == [(e["by"], e["limit"], e["counted"]) for e in launch]
    assert None is caps["gone"]["limit"]
    assert [{"name": "uid", "site": "ads.example", "path": "/"}] == found["cookies"]
    assert "secret" not in str(found)


async def test_nobody() -> None:
    """Of a viewer who was never there, nothing is told, and nothing kept."""
    backend = a_backend()

    assert {"caps": [], "cookies": []} == await an_overview(backend).viewer("bob", NOW)
    assert {} == backend._books


async def test_forget() -> None:
    """A viewer who is forgotten is gone, and was there once."""
    backend = a_backend()
    overview = an_overview(backend, ("/pre", Terms((CAP,))))
    await backend.confirm([Hold(VIEWER, "o", (CAP.claim("viewer", NOW),))])

    assert await overview.forget("alice")
    assert not await overview.forget("alice")
    assert {"caps": [], "cookies": []} == await overview.viewer("alice", NOW)


async def test_state_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator waits for a state that does not answer, and not for ever."""

    class Silent(InMemoryBackend):
        """Never answers."""

        async def levels(self, account: Account, claims: Any) -> list[Level]:
            """Hang."""
            await asyncio.Event().wait()
            raise StateAwayError(f"{account} {claims}")

    monkeypatch.setattr(module, "PATIENCE", 0.01)
    with pytest.raises(StateAwayError, match=r"no answer in 0\.01 s"):
        await an_overview(Silent(), ("/pre", Terms(budget=SPRING))).budgets()


def test_repr() -> None:
    """An overview shows which state it is of."""
    assert "<Overview of <InMemoryBackend accounts: 0, forgotten: 0>>" == repr(
        an_overview(a_backend())
    )


async def test_first_calls_after_a_restart() -> None:
    """Connections that a restart of the server has cut cost an operator nothing but a moment."""

    class Restarted(InMemoryBackend):
        cut = 3

        async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
            """Fail as often as there are dead connections."""
            if self.cut:
                self.cut -= 1
                raise StateAwayError("the connection was closed")
            return await super().levels(account, claims)

    [found] = await an_overview(Restarted(), ("/pre", Terms(budget=SPRING))).budgets()
    assert 0 == found["spent"]
