"""Cookies of ad servers are kept for a viewer, each for its own site."""

import pytest

from vastproxy.errors import StateAwayError
from vastproxy.session.cookies import Cookie
from vastproxy.session.viewer_cookies import ViewerCookies, described
from vastproxy.state.base import Account
from vastproxy.state.memory import InMemoryBackend

VIEWER = Account("viewer", "v")
NOW = 1_800_000_000.0
TTL = 3600.0


def is_public_suffix(name: str) -> bool:
    """Know one suffix."""
    return name == "example"


def a_backend(now: float = NOW) -> InMemoryBackend:
    """Build a state whose clock stands at *now*."""
    return InMemoryBackend(clock=lambda: int(now * 1000))


def cookies(
    state: InMemoryBackend, now: float = NOW, viewer: Account = VIEWER, ttl: float = TTL
) -> ViewerCookies:
    """Build the kept cookies of one ad request."""
    return ViewerCookies(state, viewer, is_public_suffix, ttl=ttl, now=lambda: now)


def set_by(kept: ViewerCookies, *headers: str, host: str = "ads.example", now: float = NOW) -> None:
    """Let *host* set cookies."""
    kept.jar.store(headers, host=host, path="/vast", secure=True, now=now)


async def loaded(
    state: InMemoryBackend, now: float = NOW, viewer: Account = VIEWER
) -> ViewerCookies:
    """Begin an ad request: load what is kept."""
    kept = cookies(state, now, viewer)
    await kept.load()
    return kept


def named(kept: ViewerCookies) -> dict[str, str]:
    """Give the names and values in the jar."""
    return {each.name: each.value for each in kept.jar}


async def test_kept_for_the_next_request() -> None:
    """What is set in one request is there in the next one, with all that it is bound to."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "uid=é 1; Domain=ads.example; Max-Age=60; Secure", "s=x; Path=/p")
    await first.save()
    second = await loaded(state)

    assert list(first.jar) == list(second.jar)
    assert [
        Cookie("uid", "é 1", "ads.example", False, "/", True, NOW + 60),  # noqa: FBT003 - a row
        Cookie("s", "x", "ads.example", True, "/p", False, None),  # noqa: FBT003 - a row
    ] == list(second.jar)


async def test_only_changes_are_written() -> None:
    """What stays as it was is not written; what goes is removed."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "a=1", "b=1", "c=1")
    await first.save()
    second = await loaded(state)
    nothing = second.changes()
    set_by(second, "a=2", "b=; Max-Age=0")

    assert {} == nothing
    assert ['["a"', '["b"'] == sorted(name[:4] for name in second.changes())
    assert [None] == [value for name, value in second.changes().items() if name.startswith('["b"')]
    await second.save()
    assert {"a": "2", "c": "1"} == named(await loaded(state))


async def test_two_requests_at_one_time() -> None:
    """Two requests of one viewer lose nothing of each other's; of one cookie the later counts."""
    state = a_backend()
    one, other = await loaded(state), await loaded(state)
    set_by(one, "a=one", "both=one")
    set_by(other, "b=other", "both=other")
    await other.save()
    await one.save()

    assert {"a": "one", "b": "other", "both": "one"} == named(await loaded(state))


async def test_each_viewer_has_its_own() -> None:
    """What is kept for one viewer is there for nobody else."""
    state = a_backend()
    mine = await loaded(state)
    set_by(mine, "uid=me")
    await mine.save()

    assert {} == named(await loaded(state, viewer=Account("viewer", "other")))


async def test_expired() -> None:
    """A cookie that has expired is not given back, and is removed at the next writing."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "short=1; Max-Age=10", "long=1; Max-Age=1000")
    await first.save()
    later = await loaded(state, NOW + 10)

    assert {"long": "1"} == named(later)
    assert [None] == list(later.changes().values())


async def test_whole_jar_expires() -> None:
    """Without a change all that is kept of a viewer is gone in the end."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "uid=me")
    await first.save()
    state._now = lambda: int((NOW + TTL) * 1000)

    assert {} == named(await loaded(state))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("", ""),
        ("x", "[]"),
        ("[]", "[]"),
        ("5", "5"),
        ('["a","h",1]', '["v",0,null]'),
        ('["a","h",1,"/"]', '["v",0]'),
        ('["a","h",1,"/"]', '["v",0,"soon"]'),
        ('["a","h",1,"/"]', '["v",0,[]]'),
        ('["a","h",1,"/"]', "null"),
    ],
)
async def test_of_another_version(name: str, value: str) -> None:
    """What cannot be read is passed over, and the others are there."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "uid=me")
    await first.save()
    await state.write_items(VIEWER, {name: value}, TTL)
    again = await loaded(state)

    assert {"uid": "me"} == named(again)
    assert [{"name": "uid", "site": "ads.example", "path": "/"}] == described(
        await state.read_items(VIEWER)
    )


async def test_too_large_to_be_kept() -> None:
    """A cookie that fills all the room is not kept, and drives no other out."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "uid=me", host="one.example")
    await first.save()
    second = await loaded(state)
    set_by(second, "huge=" + "x" * 4_080, host="two.example")
    await second.save()

    assert {"uid", "huge"} == set(named(second))
    assert {"uid": "me"} == named(await loaded(state))


async def test_grown_too_large() -> None:
    """A kept cookie that has grown too large is removed: an old value would be wrong."""
    state = a_backend()
    first = await loaded(state)
    set_by(first, "uid=me")
    await first.save()
    second = await loaded(state)
    set_by(second, "uid=" + "x" * 4_080)
    await second.save()

    assert {} == named(await loaded(state))


async def test_without_the_state() -> None:
    """Where the state cannot be read the jar is empty, and works."""

    class Away(InMemoryBackend):
        """Is not there."""

        async def read_items(self, account: Account) -> dict[str, str]:
            """Fail."""
            raise StateAwayError(str(account))

    kept = cookies(Away())
    with pytest.raises(StateAwayError):
        await kept.load()
    set_by(kept, "uid=me")

    assert {"uid": "me"} == named(kept)


async def test_nothing_private_is_printed() -> None:
    """What is printed, and shown to operators, names cookies and sites, and no value."""
    state = a_backend()
    kept = await loaded(state)
    set_by(kept, "uid=secret")
    await kept.save()

    assert "<ViewerCookies <CookieJar ads.example uid>>" == repr(kept)
    assert "secret" not in str(described(await state.read_items(VIEWER)))
