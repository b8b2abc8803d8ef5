"""How long an answer may be kept, by HTTP and by its ads."""

import math
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.model import HopReply
from vastproxy.upstream.freshness import Lifetime, Limits, lifetime_of

NOW = 1_800_000_000.0
OPERATORS = Limits(300, 10, 200)
SHARED = Limits(300, 10, 200, shared=True)


def a_reply(*headers: tuple[str, str], status: int = 200) -> HopReply:
    """Build a reply with some headers."""
    return HopReply(status, headers, b"")


def date(seconds: float) -> str:
    """Write a date of HTTP, so many seconds from now."""
    return formatdate(NOW + seconds, usegmt=True)


def control(value: str) -> HopReply:
    """Build a reply with a Cache-Control."""
    return a_reply(("cache-control", value))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (a_reply(status=500), "status"),
        (a_reply(status=302), "status"),
        (a_reply(status=206), "status"),
        (a_reply(("set-cookie", "a=b")), "set-cookie"),
        (control("no-store"), "no-store"),
        (control("max-age=60, No-Store"), "no-store"),
        (control("private"), "private"),
        (control('private="x-a, x-b", max-age=60'), "private"),
        (control("no-cache"), "no-cache"),
        (control('no-cache="set-cookie"'), "no-cache"),
        (a_reply(("cache-control", "max-age=60"), ("cache-control", "no-store")), "no-store"),
        (a_reply(("pragma", "no-cache")), "no-cache"),
        (a_reply(("vary", "*")), "vary"),
        (a_reply(("vary", "Accept-Encoding, User-Agent")), "vary"),
        (a_reply(("vary", "Origin"), ("vary", "Cookie")), "vary"),
        (control("max-age=0"), "ttl"),
        (control("max-age=soon"), "ttl"),
        (control("max-age=-5"), "ttl"),
        (control("max-age"), "ttl"),
        (control("max-age=60, max-age=0"), "ttl"),
        (a_reply(("cache-control", "max-age=60"), ("age", "60")), "ttl"),
        (a_reply(("expires", date(-1)), ("date", date(0))), "ttl"),
        (a_reply(("expires", date(-1))), "ttl"),
        (a_reply(("expires", "0")), "ttl"),
        (a_reply(("expires", date(30)), ("date", date(30))), "ttl"),
    ],
)
def test_answer_may_forbid_to_be_kept(reply: HopReply, reason: str) -> None:
    """What an answer forbids is not done, whoever would get it; the reason is a word."""
    assert reason == lifetime_of(reply, OPERATORS, NOW)
    assert reason == lifetime_of(reply, SHARED, NOW)
    of_redirect = lifetime_of(reply, OPERATORS, NOW, redirect=True)
    assert (reason == "status") == (of_redirect != reason)


@pytest.mark.parametrize(
    ("reply", "ttl"),
    [
        (a_reply(), 300),
        (a_reply(status=204), 300),
        (a_reply(status=205), 300),
        (a_reply(("vary", "Accept-Encoding"), ("vary", "origin, ")), 300),
        (control("public, max-age=60"), 60),
        (control('MAX-AGE="60"'), 60),
        (control("max-age=60, max-age=90"), 60),
        (control("max-age=" + "9" * 500), 300),
        (control(", ,="), 300),
        (a_reply(("cache-control", "max-age=60"), ("age", "20")), 40),
        (a_reply(("cache-control", "max-age=60"), ("age", "20, 50")), 40),
        (a_reply(("cache-control", "max-age=60"), ("age", "old")), 60),
        (a_reply(("expires", date(50)), ("date", date(0))), 50),
        # Its clock is an hour ahead; what counts is how long it says.
        (a_reply(("expires", date(3650)), ("date", date(3600))), 50),
        (a_reply(("expires", date(50)), ("date", date(0)), ("age", "20")), 30),
        (a_reply(("expires", date(50))), 50),
        (a_reply(("expires", "0"), ("cache-control", "max-age=60")), 60),
        (a_reply(("pragma", "no-cache"), ("cache-control", "max-age=60")), 60),
    ],
)
def test_answer_may_shorten_its_time(reply: HopReply, ttl: float) -> None:
    """An answer is fresh for as long as it says, less its age, and no longer than configured."""
    found = lifetime_of(reply, OPERATORS, NOW)

    assert isinstance(found, Lifetime)
    assert ttl == found.ttl


def test_time_of_shared_caches_is_for_what_is_shared() -> None:
    """``s-maxage`` goes before ``max-age`` where an answer is for everybody, and there alone."""
    reply = control("max-age=0, s-maxage=60")

    assert Lifetime(60) == lifetime_of(reply, SHARED, NOW)
    assert "ttl" == lifetime_of(reply, OPERATORS, NOW)


def test_header_of_the_vary_set_may_be_named() -> None:
    """An answer that depends on a header that is in the key may be kept."""
    reply = a_reply(("vary", "Accept-Language, Accept-Encoding"))
    limits = Limits(300, vary=frozenset({"accept-language"}))

    assert Lifetime(300) == lifetime_of(reply, limits, NOW)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("max-age=60", Lifetime(60, 10, 200)),
        ("stale-while-revalidate=3, stale-if-error=50", Lifetime(300, 3, 50)),
        ("stale-while-revalidate=300, stale-if-error=5000", Lifetime(300, 10, 200)),
        ("stale-if-error=0", Lifetime(300, 10, 0)),
        ("must-revalidate", Lifetime(300)),
        ("proxy-revalidate, stale-if-error=50", Lifetime(300)),
        # RFC 9111 section 5.2.2.10: s-maxage is proxy-revalidate as well, unless it is allowed.
        ("s-maxage=60", Lifetime(60)),
        ("s-maxage=60, stale-if-error=50", Lifetime(60, 0, 50)),
    ],
)
def test_stale_time_is_shortened_only(value: str, expected: Lifetime) -> None:
    """An answer may say for how long it may be used when stale: less than configured, not more."""
    assert expected == lifetime_of(control(value), SHARED, NOW)


def test_ads_end_when_they_say() -> None:
    """No answer is used, fresh or stale, when its ads have expired, counted from its making."""
    assert Lifetime(60) == lifetime_of(a_reply(), Limits(300, 10, 200, expires=60), NOW)
    assert Lifetime(300, 10, 50) == lifetime_of(a_reply(), Limits(300, 10, 200, expires=350), NOW)
    old = a_reply(("age", "20"))
    assert Lifetime(40) == lifetime_of(old, Limits(300, 10, 200, expires=60), NOW)
    assert "ttl" == lifetime_of(a_reply(), Limits(300, expires=0), NOW)


def test_newer_limits_shorten() -> None:
    """A lifetime that was given under longer limits is cut to shorter ones."""
    assert Lifetime(5, 2, 1) == Lifetime(300, 10, 200).within(Limits(5, 2, 1))
    assert Lifetime(5, 2, 1) == Lifetime(5, 2, 1).within(OPERATORS)


WORDS = st.sampled_from(
    ["max-age", "s-maxage", "stale-if-error", "stale-while-revalidate", "must-revalidate", "public"]
)
VALUES = st.one_of(st.integers(0, 1000).map(str), st.sampled_from(["", "x", "-1", "1e9", '"7"']))
CONTROLS = st.lists(st.tuples(WORDS, VALUES).map("=".join), max_size=5).map(", ".join)


@given(
    control=st.one_of(CONTROLS, st.text(max_size=30)),
    age=st.one_of(st.none(), st.text(max_size=5), st.integers(0, 500).map(str)),
    expires=st.one_of(st.just(math.inf), st.floats(0, 1000)),
    shared=st.booleans(),
)
def test_nothing_lengthens(control: str, age: str | None, expires: float, *, shared: bool) -> None:
    """Whatever an answer says, it is kept no longer than the operator and its ads allow."""
    headers = [("cache-control", control), *([("age", age)] if age is not None else [])]
    limits = Limits(300, 10, 200, expires=expires, shared=shared)
    found = lifetime_of(a_reply(*headers), limits, NOW)

    if isinstance(found, Lifetime):
        assert 0 < found.ttl <= min(300, expires)
        assert 0 <= found.stale_while_revalidate <= 10
        assert 0 <= found.stale_if_error <= 200
        assert found.whole <= expires + 1e-9


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_judged_by_its_words(status: int) -> None:
    """For how long a redirect's target may be kept, its headers say, and not its status."""
    words = ("cache-control", "max-age=60, stale-if-error=5")

    assert Lifetime(300, 10, 200) == lifetime_of(
        a_reply(status=status), OPERATORS, NOW, redirect=True
    )
    assert Lifetime(60, 10, 5) == lifetime_of(
        a_reply(words, status=status), OPERATORS, NOW, redirect=True
    )
    assert "status" == lifetime_of(a_reply(words, status=status), OPERATORS, NOW)
