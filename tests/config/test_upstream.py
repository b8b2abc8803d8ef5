"""Breakers, rates, retries and caches, as an operator writes them."""

from typing import Any

import pytest
from pydantic import ValidationError

from vastproxy.config.schema import Egress, Upstream
from vastproxy.config.units import Source
from vastproxy.config.upstream import Cache, CircuitBreaker, HopBreaker, RateLimit
from vastproxy.upstream.kept import CacheSettings
from vastproxy.upstream.window import BreakerSettings


def an_upstream(**settings: object) -> Upstream:
    """Make an upstream with *settings*."""
    return Upstream.model_validate({"endpoint": "https://ads.example.com/vast", **settings})


def a_breaker(**settings: object) -> CircuitBreaker:
    """Make a breaker with *settings*."""
    return CircuitBreaker.model_validate(settings)


def a_limit(written: object) -> RateLimit | None:
    """Give the limit of an upstream that has it *written* so."""
    return an_upstream(rate_limit=written).rate_limit


def test_smallest_upstream_has_every_default() -> None:
    """An endpoint is enough: there is a breaker and one retry, and neither a limit nor a cache."""
    upstream = an_upstream()

    assert (None, None, None) == (upstream.soft_timeout, upstream.rate_limit, upstream.cache)
    assert (500, 1, 0.1) == (
        upstream.max_requests_in_flight,
        upstream.retry.attempts,
        upstream.retry.budget,
    )
    assert ("enforce", False, 1) == (
        upstream.circuit_breaker.mode,
        upstream.circuit_breaker.share,
        upstream.circuit_breaker.quorum,
    )


def test_defaults_of_a_breaker_are_those_of_the_program() -> None:
    """What is left out is the same for an upstream, for hops, and for the library."""
    config = a_breaker().model_dump(exclude={"share", "quorum"})
    program = BreakerSettings()

    assert config == Egress().circuit_breaker.model_dump()
    assert config == {name: getattr(program, name) for name in HopBreaker.model_fields}


def test_defaults_of_a_cache_are_those_of_the_program() -> None:
    """What is left out of a cache is the same for the library."""
    config, program = Cache(), CacheSettings()

    assert (config.ttl, config.scope, config.vary) == (program.ttl, program.scope, program.vary)
    assert frozenset(config.ignore) == program.ignore
    assert (config.max_size, config.redis) == (program.max_bytes, program.redis)
    assert (config.no_fill_ttl, config.stale_while_revalidate, config.stale_if_error) == (
        program.no_fill_ttl,
        program.stale_while_revalidate,
        program.stale_if_error,
    )


@pytest.mark.parametrize("mode", ["enforce", "shadow", "off"])
def test_breaker_has_a_mode(mode: str) -> None:
    """A breaker that is off is a section all the same."""
    assert mode == an_upstream(circuit_breaker={"mode": mode}).circuit_breaker.mode


@pytest.mark.parametrize(
    ("instead", "value"),
    [("off", False), ("off", "off"), ("off", "No"), ("off", None), ("enforce", True)],
)
def test_breaker_is_not_switched_by_a_word(instead: str, value: object) -> None:
    """A word or a null in place of the section is refused, and told what was meant."""
    for model in (Upstream, Egress):
        given = {"endpoint": "https://a.tv/"} if model is Upstream else {}
        with pytest.raises(ValidationError, match=rf"\(write {{mode: {instead}}}\)"):
            model.model_validate({**given, "circuit_breaker": value})


@pytest.mark.parametrize(
    ("longest", "written"),
    [
        (300.0, {}),
        (300.0, {"reset_timeout": "5m"}),
        (600.0, {"reset_timeout": "10m"}),
        (3600.0, {"reset_timeout": "1h"}),
        (10.0, {"reset_timeout": "10s", "max_reset_timeout": "10s"}),
        (900.0, {"reset_timeout": "10m", "max_reset_timeout": "15m"}),
    ],
)
def test_longest_time_follows_the_first(longest: float, written: dict[str, Any]) -> None:
    """Where only a long reset_timeout is written, the longest one is as long."""
    breaker = a_breaker(**written)

    assert longest == breaker.max_reset_timeout
    assert breaker == CircuitBreaker.model_validate(breaker.model_dump())


def test_longest_time_is_not_shorter_than_the_first() -> None:
    """A max_reset_timeout that is written and too short is an error."""
    with pytest.raises(ValidationError, match="540s is shorter than reset_timeout, 600s"):
        a_breaker(reset_timeout="10m", max_reset_timeout="9m")
    with pytest.raises(ValidationError, match="30s is shorter than reset_timeout, 60s"):
        a_breaker(max_reset_timeout="30s")


def test_wrong_first_time_is_one_mistake() -> None:
    """A reset_timeout that is none says nothing about the longest one."""
    for wrong in ("2h", "x", 7, None):
        with pytest.raises(ValidationError) as caught:
            a_breaker(reset_timeout=wrong)

        assert [("reset_timeout",)] == [each["loc"] for each in caught.value.errors()]


@pytest.mark.parametrize(
    "written",
    ["100/s", "6000/m", "360000/h", {"rate": "100/s"}, {"rate": "6000/m", "burst": None}],
)
def test_rate_stands_alone_or_in_a_section(written: object) -> None:
    """A rate alone, in any unit, means the same as a section with that rate."""
    assert RateLimit.model_validate({"rate": "100/s"}) == a_limit(written)


@pytest.mark.parametrize(
    ("calls", "written"),
    [
        (10, "100/s"),
        (10, "6000/m"),
        (1, "1/h"),
        (1, "19/s"),
        (2, "20/s"),
        (1, {"rate": "100/s", "burst": 1}),
        (500, {"rate": "1/s", "burst": 500}),
    ],
)
def test_burst_is_a_tenth_of_a_second(calls: int, written: object) -> None:
    """Where no burst is written, it is a tenth of a second's worth, and at least one call."""
    limit = a_limit(written)

    assert limit is not None
    assert calls == limit.at_once


def test_soft_timeout_is_shorter_than_the_timeout() -> None:
    """A soft_timeout that could only pass after the timeout is an error that names both."""
    assert 0.3 == an_upstream(timeout="400ms", soft_timeout="300ms").soft_timeout
    for soft in ("400ms", "1s"):
        with pytest.raises(ValidationError, match=r"s is not shorter than the timeout, 0\.4s"):
            an_upstream(timeout="400ms", soft_timeout=soft)


def test_wrong_timeout_hides_no_soft_timeout() -> None:
    """Where the timeout is wrong itself, the soft one is given the benefit of the doubt."""
    with pytest.raises(ValidationError) as caught:
        an_upstream(timeout="fast", soft_timeout="2s")

    assert [("timeout",)] == [each["loc"] for each in caught.value.errors()]


def test_cache_is_there_when_it_is_a_section() -> None:
    """An empty section is a cache with its defaults, a null is none."""
    assert Cache() == an_upstream(cache={}).cache
    assert an_upstream(cache=None).cache is None
    with pytest.raises(ValidationError, match=r"True does not switch it \(write {}"):
        an_upstream(cache=True)


def test_cache_is_read() -> None:
    """Places, sizes, names and times of a cache are ready to use; what is off is 0."""
    cache = Cache.model_validate(
        {
            "paid": "false",
            "vary": ["header:Accept-Language", "query:slot", "cookie:x"],
            "ignore": [],
            "no_fill_ttl": "off",
            "stale_while_revalidate": "off",
            "stale_if_error": "7d",
            "max_size": "4GiB",
        }
    )

    assert (False, ()) == (cache.paid, cache.ignore)
    assert (Source("header", "accept-language"), Source("query", "slot")) == cache.vary[:2]
    assert (0.0, 0.0, 604_800.0) == (
        cache.no_fill_ttl,
        cache.stale_while_revalidate,
        cache.stale_if_error,
    )
    assert 4 * 2**30 == cache.max_size


def test_whether_an_upstream_is_paid_may_be_left_open() -> None:
    """By default nobody has said whether the ad server is paid: that is not the same as no."""
    assert Cache().paid is None
    assert True is Cache.model_validate({"paid": "true"}).paid


@pytest.mark.parametrize(("share", "written"), [(0.5, "50%"), (0.5, 0.5), (1.0, "100%"), (1.0, 1)])
def test_share_is_text_or_a_number(share: float, written: object) -> None:
    """A program may give a number, which is judged like its text."""
    assert share == a_breaker(failure_rate=written).failure_rate


@pytest.mark.parametrize("wrong", [0, -0.5, 1.5, 50, True, float("nan"), float("inf"), None, []])
def test_number_that_is_no_share_is_refused(wrong: object) -> None:
    """A number that is no part of one is refused."""
    with pytest.raises(ValidationError, match=r"\((write|put)"):
        a_breaker(failure_rate=wrong)
