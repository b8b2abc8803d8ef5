"""A beacon counts its ad once, whoever takes it; what is none counts nothing and does no harm."""

import asyncio
import secrets
import time
from http import HTTPStatus

import pytest

from tests.functional.conftest import (
    SECRET,
    StartProxy,
    States,
    a_document,
    an_ad,
    budget,
    metric,
    wait_for,
)
from tests.support.ad_server import AdServer, Reply
from tests.support.player import Player
from tests.support.proxy import Proxy, a_config, ask
from vastproxy.flow.beacons import Beacons
from vastproxy.session.seals import Seal
from vastproxy.state.base import Account, Hold, money
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend

PRICE = 0.0025

TTL = 60
"""Seconds that beacons are taken: the least that may be set."""


@pytest.fixture(scope="module")
def proxies(
    ad_server: AdServer, states: States, start_module_proxy: StartProxy
) -> tuple[Proxy, Proxy]:
    """Run two proxies with one secret over one Valkey; the first has two workers."""
    route = {
        "path": "/ad",
        "upstreams": ["main"],
        "viewer": ["query:uid"],
        "reservation_ttl": "1s",
        "frequency_caps": [{"limit": 1000, "window": "1h"}],
        "budget": {"campaign": "spring", "limit": "1000", "cpm": "2.50"},
    }
    config = a_config({"main": ad_server.url("/ad")}, [route], state=states.url("redis"))
    server = {"secret": [SECRET], "beacon_ttl": f"{TTL}s"}
    both = (
        start_module_proxy(config | {"server": {**server, "workers": 2}}),
        start_module_proxy(config | {"server": server}),
    )
    wait_for(lambda: 2 == len(both[0].records(event="worker.ready")))
    return both


@pytest.fixture
def players(proxies: tuple[Proxy, Proxy], ads: AdServer) -> Proxy:
    """Give the proxy that players ask, with an ad to answer."""
    ads.replies["/ad"] = Reply(a_document(an_ad("main")))
    return proxies[0]


@pytest.fixture
def operators(proxies: tuple[Proxy, Proxy]) -> Proxy:
    """Give the proxy that operators ask, which is another one."""
    return proxies[1]


def spent(proxy: Proxy) -> float:
    """Give what the campaign has spent."""
    return float(budget(proxy, "spring")["spent"])


async def test_beacon_twice(players: Proxy, operators: Proxy) -> None:
    """A beacon counts once: the second time, and twenty times at one time on all workers."""
    before = spent(operators)
    again = metric(players, "vastproxy_beacons_total", result="again")
    async with Player(players.base) as player:
        [first], [second] = [(await player.ask("/ad?uid=v")).beacons for _ in range(2)]
        elsewhere = first.replace(players.base, operators.base)
        statuses = [
            [each.status for each in await player.fire(urls)]
            for urls in ([first], [first, elsewhere], [second] * 20)
        ]

    assert [[204], [204] * 2, [204] * 20] == statuses
    assert 2 * PRICE == pytest.approx(spent(operators) - before)
    assert 20 == metric(players, "vastproxy_beacons_total", result="again") - again


async def test_same_time_on_two_workers(players: Proxy, operators: Proxy) -> None:
    """Fifty beacons, each told to both proxies at one time, count fifty times."""
    before = spent(operators)
    async with Player(players.base) as player:
        answers = await player.ask_at_once("/ad?uid=w", 50)
        urls = [url for each in answers for url in each.beacons]
        fired = await asyncio.gather(
            player.fire(urls),
            player.fire([each.replace(players.base, operators.base) for each in urls]),
            player.fire(urls[::-1]),
        )

    assert {204} == {each.status for answers in fired for each in answers}
    assert 50 == len(set(urls))
    assert 50 * PRICE == pytest.approx(spent(operators) - before)


def sealed(
    campaign: str, *, secret: str = SECRET, age: float = 0.0, purpose: str = "beacon"
) -> str:
    """Make a beacon of $1, *age* seconds ago; give its path."""
    state = GuardedState(InMemoryBackend())
    beacons = Beacons(Seal((secret,), purpose), state, ttl=TTL, now=lambda: time.time() - age)
    hold = Hold(Account("campaign", campaign), secrets.token_urlsafe(12), (money(1_000_000),))
    return beacons.url("", [hold])


def test_sealed_with_the_secret(players: Proxy, operators: Proxy) -> None:
    """Whoever has the secret can make a beacon, so what the next tests refuse is refused for it."""
    before = spent(operators)
    statuses = [ask(players.base, sealed("spring", age=age)).status for age in (0, TTL - 20, -30)]

    assert [204] * 3 == statuses
    assert 3 == pytest.approx(spent(operators) - before)


def forged() -> dict[str, str]:
    """Give paths that look like beacons, and are none."""
    good = sealed("spring")
    middle = len(good) // 2
    other = "A" if good[middle] != "A" else "B"
    return {
        "changed": good[:middle] + other + good[middle + 1 :],
        "cut": good[:-4],
        "longer": good + "AAAA",
        "padded": good + "==",
        "of another deployment": sealed("spring", secret="another secret"),  # noqa: S106
        "of another purpose": sealed("spring", purpose="hop"),
        "expired": sealed("spring", age=TTL + 2),
        "random": f"/beacon/{secrets.token_urlsafe(60)}",
        "empty": "/beacon/",
        "a picture of nothing": "/beacon/.gif",
        "a word": "/beacon/x",
        "long": f"/beacon/{'A' * 7000}",
        "encoded": "/beacon/%00%ff%F0%9F%92%A9",
        "a path": "/beacon/../../etc/passwd",
    }


@pytest.mark.parametrize("kind", forged())
def test_forged(players: Proxy, operators: Proxy, kind: str) -> None:
    """What was not sealed here, for this and lately, is refused, counts nothing, and is told."""
    before = spent(operators)
    told = metric(players, "vastproxy_beacons_total", result="forged")
    answer = ask(players.base, forged()[kind])

    assert HTTPStatus.FORBIDDEN == answer.status
    assert ["*"] == answer.values("Access-Control-Allow-Origin")
    assert before == spent(operators)
    assert told + 1 == metric(players, "vastproxy_beacons_total", result="forged")


def test_random_tokens(players: Proxy, operators: Proxy) -> None:
    """However a token is changed, nothing is counted, and nothing fails."""
    before = spent(operators)
    good = sealed("spring").removeprefix("/beacon/")
    places = range(0, len(good), max(1, len(good) // 100))
    changed = [good[:at] + chr(ord(good[at]) ^ 1) + good[at + 1 :] for at in places]
    statuses = {ask(players.base, f"/beacon/{each}").status for each in changed}

    assert {403} >= statuses - {404}
    assert before == spent(operators)
    assert not players.records(event="beacon.failed")


async def test_picture(players: Proxy, operators: Proxy) -> None:
    """Who wants a picture gets one, by the URL's end or by Accept; others get no body."""
    before = spent(operators)
    async with Player(players.base) as player:
        urls = [(await player.ask("/ad?uid=p")).beacons[0] for _ in range(3)]
    paths = [each.removeprefix(players.base) for each in urls]
    ended = ask(players.base, f"{paths[0]}.gif")
    accepted = ask(players.base, paths[1], headers=[("Accept", "image/avif,image/*;q=0.8")])
    plain = ask(players.base, paths[2], headers=[("Accept", "*/*")])

    for each in (ended, accepted):
        assert (200, ["image/gif"]) == (each.status, each.values("Content-Type"))
        assert each.body.startswith(b"GIF89a")
    assert (204, b"") == (plain.status, plain.body)
    assert {"no-store"} == {each.header("Cache-Control") for each in (ended, accepted, plain)}
    assert 3 * PRICE == pytest.approx(spent(operators) - before)


async def test_only_get_counts(players: Proxy, operators: Proxy) -> None:
    """Who only looks (HEAD), asks whether it may (OPTIONS), or posts counts nothing."""
    before = spent(operators)
    async with Player(players.base) as player:
        [url] = (await player.ask("/ad?uid=m")).beacons
    path = url.removeprefix(players.base)
    looked = [ask(players.base, path, method=each).status for each in ("HEAD", "OPTIONS", "POST")]
    uncounted = spent(operators)
    got = ask(players.base, path).status

    assert ([204, 204, 405], 204) == (looked, got)
    assert before == uncounted
    assert PRICE == pytest.approx(spent(operators) - before)


async def test_late_beacon(players: Proxy, operators: Proxy) -> None:
    """A beacon that comes when its reservation is over counts, once, and is told as late."""
    before = spent(operators)
    late = metric(players, "vastproxy_beacons_total", result="late")
    async with Player(players.base) as player:
        [url] = (await player.ask("/ad?uid=l")).beacons
        wait_for(lambda: 0 == budget(operators, "spring")["reserved"])
        await player.fire([url, url])

    assert PRICE == pytest.approx(spent(operators) - before)
    assert late + 1 == metric(players, "vastproxy_beacons_total", result="late")


async def test_url_of_a_beacon(players: Proxy) -> None:
    """A beacon's URL is where the player reached the proxy, and short enough for any player."""
    async with Player(players.base) as player:
        [here] = (await player.ask("/ad?uid=u")).beacons
        [there] = (await player.ask("/ad?uid=u", {"Host": "ads.example.com"})).beacons

    assert here.startswith(f"{players.base}/beacon/")
    assert there.startswith("http://ads.example.com/beacon/")
    assert 2000 > len(there)


@pytest.mark.usefixtures("players")
async def test_beacon_outlives_a_restart(
    operators: Proxy, start_proxy: StartProxy, ads: AdServer
) -> None:
    """A beacon of a proxy that has ended is taken by the next, whose secret may be a newer one."""
    config = {key: value for key, value in a_config({"main": ads.url("/ad")}, []).items() if value}
    before = spent(operators)
    route = {
        "path": "/ad",
        "upstreams": ["main"],
        "budget": {"campaign": "spring", "limit": "1000", "cpm": "2.50"},
    }
    state = operators.path.read_text().partition("\nstate: ")[2].partition("\n")[0]
    rotated = {"secret": ["a new secret of the tests", SECRET]}
    old = start_proxy(config | {"routes": [route], "state": state, "server": {"secret": [SECRET]}})
    async with Player(old.base) as player:
        [url] = (await player.ask("/ad")).beacons
    old.stop()
    new = start_proxy(config | {"routes": [route], "state": state, "server": rotated})
    async with Player(new.base) as player:
        [fired] = await player.fire([url.replace(old.base, new.base)])

    assert 204 == fired.status
    assert PRICE == pytest.approx(spent(operators) - before)
