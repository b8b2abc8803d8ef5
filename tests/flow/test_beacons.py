"""A beacon counts its ad: once, in any process, and nobody can make one."""

import string
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from vastproxy.errors import StateAwayError
from vastproxy.flow.beacons import PATH, SUFFIX, Beacons
from vastproxy.session.seals import Seal
from vastproxy.state.base import Account, Booking, Claim, Hold, Level, Window, money
from vastproxy.state.guard import GuardedState
from vastproxy.state.memory import InMemoryBackend

START = 1_800_000_000
TTL = 3600.0
SPRING = Account("campaign", "spring")
VIEWER = Account("viewer", "v")
CAPPED = Claim("r60000|/r|", 1, 3, Window("rolling", 60_000))


class Shaky(InMemoryBackend):
    """A backend that can be away."""

    away = False

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Confirm, if it is there."""
        if self.away:
            raise StateAwayError("gone")
        return await super().confirm(holds)


@dataclass(slots=True)
class World:
    """Beacons, their state and their clock."""

    backend: Shaky
    state: GuardedState
    now: list[float]

    def beacons(self, *secrets: str, purpose: str = "beacon") -> Beacons:
        """Make the beacons of one process."""
        seal = Seal(secrets or ("a",), purpose)
        return Beacons(seal, self.state, ttl=TTL, now=lambda: self.now[0])

    async def spent(self) -> Level:
        """Tell what stands on the campaign's money."""
        [level] = await self.backend.levels(SPRING, [money(0)])
        return level


@asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    """Open a state, which is asked directly."""
    now = [float(START)]
    backend = Shaky(clock=lambda: int(now[0] * 1000))
    async with GuardedState(backend, local=True) as state:
        yield World(backend, state, now)


def a_hold(operation: str = "o", amount: int = 5) -> Hold:
    """Build a hold of a campaign's money."""
    return Hold(SPRING, operation, (money(amount, 100),), ttl_ms=600_000)


def token_of(url: str) -> str:
    """Give the token in the *url* of a beacon."""
    return url.rpartition("/")[2]


async def test_counts_once() -> None:
    """A beacon counts what was reserved, and again nothing."""
    async with a_world() as world:
        beacons = world.beacons()
        holds = [a_hold(), Hold(VIEWER, "o", (CAPPED,))]
        await world.state.reserve(holds)
        url = beacons.url("https://p.example/base", holds)
        results = [await beacons.take(token_of(url)) for _ in range(3)]
        [level] = await world.backend.levels(VIEWER, [CAPPED])

        assert url.startswith(f"https://p.example/base{PATH}")
        assert set(token_of(url)) <= set(f"{string.ascii_letters}{string.digits}-_")
        assert ["counted", "again", "again"] == results
        assert (Level(5, 0), Level(1, 0)) == (await world.spent(), level)


async def test_nothing_to_count() -> None:
    """An ad without holds has no beacon."""
    async with a_world() as world:
        assert "" == world.beacons().url("http://p", [])


async def test_picture() -> None:
    """A beacon's URL may end as a picture's does: it is the same beacon."""
    async with a_world() as world:
        beacons = world.beacons()
        token = token_of(beacons.url("", [a_hold()]))
        results = [await beacons.take(each) for each in (token + SUFFIX, token)]

        assert ["late", "again"] == results
        assert "forged" == await beacons.take(token + SUFFIX + SUFFIX)


async def test_any_process_takes_it() -> None:
    """A process with the same secrets takes it, also when another secret seals by now."""
    async with a_world() as world:
        token = token_of(world.beacons("a").url("", [a_hold()]))

        assert "forged" == await world.beacons("b").take(token)
        assert "forged" == await world.beacons("a", purpose="hop").take(token)
        assert "late" == await world.beacons("b", "a").take(token)
        assert Level(5, 0) == await world.spent()


async def test_late() -> None:
    """A beacon that comes after its reservation was over counts, and is told as late."""
    async with a_world() as world:
        beacons = world.beacons()
        await world.state.reserve([a_hold()])
        token = token_of(beacons.url("", [a_hold()]))
        world.now[0] += 601

        assert "late" == await beacons.take(token)
        assert Level(5, 0) == await world.spent()


async def test_expired() -> None:
    """To the second of its end a beacon is taken; after that it counts nothing."""
    async with a_world() as world:
        beacons = world.beacons()
        tokens = [token_of(beacons.url("", [a_hold(each)])) for each in "ab"]
        world.now[0] += TTL
        in_time = await beacons.take(tokens[0])
        world.now[0] += 1

        assert "late" == in_time
        assert "forged" == await beacons.take(tokens[1])
        assert Level(5, 0) == await world.spent()


async def test_older_than_memory() -> None:
    """A beacon is not taken any more when what it counts may have been forgotten."""
    async with a_world() as world:
        beacons = world.beacons()
        [first, second] = [
            beacons.url("", [replace(a_hold(each), keep_ms=1_800_000)]) for each in ("o", "p")
        ]
        world.now[0] += 1_800
        assert "late" == await beacons.take(token_of(first))
        world.now[0] += 1

        assert "forged" == await beacons.take(token_of(second))
        assert 5 == (await world.spent()).counted


async def test_one_of_two_is_late() -> None:
    """Of a beacon with several holds the word is told that an operator should see."""
    async with a_world() as world:
        beacons = world.beacons()
        holds = [a_hold("a"), a_hold("b"), a_hold("c")]
        await world.state.reserve(holds[:1])
        await world.state.confirm(holds[1:2])

        assert "counted" == await beacons.take(token_of(beacons.url("", holds[:2])))
        assert "late" == await beacons.take(token_of(beacons.url("", holds)))
        assert "again" == await beacons.take(token_of(beacons.url("", holds)))


async def test_without_the_state() -> None:
    """While the state is away a beacon is kept for later, and counts then."""
    async with a_world() as world:
        beacons = world.beacons()
        token = token_of(beacons.url("", [a_hold()]))
        world.state.available = False
        world.backend.away = True
        deferred = [await beacons.take(token) for _ in range(2)]
        world.backend.away = False
        world.state.available = True
        await world.state.flush()

        assert ["deferred", "deferred"] == deferred
        assert Level(5, 0) == await world.spent()
        assert "again" == await beacons.take(token)


@pytest.mark.parametrize(
    "content", [b"", b"5", b"[[]]", b'[["v","v","o",1,{"no window":1}]]', b"\xff", b"[" * 10_000]
)
async def test_sealed_nonsense(content: bytes) -> None:
    """What was sealed with the right key, and is no beacon, counts nothing."""
    async with a_world() as world:
        token = Seal(["a"], "beacon").close(content, START)
        with capture_logs() as logs:
            assert "forged" == await world.beacons().take(token)

        assert ["beacon.refused"] == [each["event"] for each in logs]


@given(
    st.text(max_size=300)
    | st.text(f"{string.ascii_letters}-_.", max_size=300)
    | st.binary(max_size=200).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_token(token: str) -> None:
    """Whatever comes as a token, nothing is raised, and nothing counted."""
    state = GuardedState(backend := Shaky(clock=lambda: START * 1000), local=True)
    with capture_logs():
        beacons = Beacons(Seal(["a"], "beacon"), state, ttl=TTL, now=lambda: float(START))

        assert "forged" == await beacons.take(token)
        assert {} == backend._books


async def test_size() -> None:
    """A beacon with many caps is a URL that servers take."""
    async with a_world() as world:
        claims = tuple(
            Claim(f"cmonth America/Argentina/Buenos_Aires|{'n' * 90}{at}|campaign {'x' * 40}")
            for at in range(20)
        )
        url = world.beacons().url("https://p.example", [Hold(VIEWER, "o" * 20, claims), a_hold()])

        assert 2_000 > len(url)


async def test_repr() -> None:
    """Beacons tell what they are sealed for, and which state they count in."""
    async with a_world() as world:
        assert repr(world.beacons()).startswith("<Beacons <Seal for beacon>, <GuardedState ")
