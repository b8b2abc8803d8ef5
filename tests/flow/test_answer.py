"""What is told about an answer: to the access log, and to whoever reads headers."""

from typing import Any

import pytest

from vastproxy.flow.answer import Outcome, response, together
from vastproxy.observe.trace import BreakerChange, Choice, Exchange, Hop, Trace
from vastproxy.session.factory import SessionFactory
from vastproxy.vast.parse import parse


def a_hop(number: int = 1, upstream: str = "one", **more: Any) -> Hop:
    """Build a hop that was asked for."""
    more = {"exchanges": (), "milliseconds": 1.0, **more}
    return Hop(number, None, 0, upstream, "http://a/", **more)


def told(trace: Trace, outcome: Outcome | None = None) -> Any:
    """Give what is told of a request without an ad."""
    return response(SessionFactory().context(), trace, outcome or Outcome(), b"")


@pytest.mark.parametrize(
    ("refused", "flag"),
    [("breaker", "breaker_open"), ("rate_limit", "rate_limited"), ("busy", "upstream_busy")],
)
def test_refused_hop(refused: str, flag: str) -> None:
    """A hop that the proxy did not make has a flag of its own, and is none that was asked for."""
    answer = told(Trace(hops=[a_hop(refused=refused, code=300), a_hop(2)]))

    assert ("no_ad", flag) == answer.flags
    assert 1 == answer.hops
    assert ["hop1", "hop2"] == [name for name, _ in answer.timings]


@pytest.mark.parametrize(
    ("cache", "flags", "hops"),
    [
        ("hit", ("no_ad", "cached"), 0),
        ("stale (revalidating)", ("no_ad", "stale"), 0),
        ("", ("no_ad",), 1),
    ],
)
def test_cache(cache: str, flags: tuple[str, ...], hops: int) -> None:
    """What a cache did is told in words; what had been kept is no hop."""
    answer = told(Trace(hops=[a_hop(cache=cache)], cache_status=["vastproxy; hit"]))

    assert flags == answer.flags
    assert ((f"one: {cache}",) if cache else ()) == answer.cache
    assert hops == answer.hops
    assert ("vastproxy; hit",) == answer.cache_status


def test_stale_for_a_failure() -> None:
    """Where a stale answer stands in, it is told for what; and who was asked was asked."""
    exchange = Exchange("http://a.example/", 1.0, 500)
    hop = a_hop(cache="stale (upstream failed: HTTP status 500)", code=301, exchanges=(exchange,))

    answer = told(Trace(hops=[hop]))

    assert ("no_ad", "upstream_failed", "stale") == answer.flags
    assert 1 == answer.hops


@pytest.mark.parametrize(
    ("choices", "steps"),
    [
        ([], ()),
        ([("a", "ad")], ()),
        ([("a", "no_ad")], ()),
        ([("a", "failed")], ()),
        ([("a", "breaker")], ("a:breaker",)),
        ([("a", "capped")], ("a:capped",)),
        ([("a", "not_asked")], ("a:not_asked",)),
        ([("a", "no_ad"), ("b", "ad")], ("a:no_ad", "b:ad")),
        ([("a", "late"), ("a", "ad"), ("b", "cancelled")], ("a:late", "a:ad", "b:cancelled")),
    ],
)
def test_waterfall(choices: list[Any], steps: tuple[str, ...]) -> None:
    """The waterfall is told where there was more to it than one upstream that was asked."""
    trace = Trace(choices=[Choice(*each, 1.0) for each in choices])

    assert steps == told(trace).waterfall
    assert tuple(choices) == told(trace).choices
    assert ("late" in dict(map(reversed, choices))) == ("soft_timeout" in told(trace).flags)


def test_breakers() -> None:
    """Breakers that changed are told, and that one would have refused if it did more than watch."""
    change = BreakerChange("a", "closed", "open", "5 failures in a row")
    answer = told(Trace(changes=[change], shadowed=["b: 5 failures in a row"]))

    assert ("a closed->open: 5 failures in a row",) == answer.breaker
    assert ("no_ad", "shadow_breaker_open") == answer.flags


def test_outcomes_together() -> None:
    """What came of several is told in their order, and the ads are the winner's."""
    document = parse(b"<VAST version='3.0'/>")
    session: Any = object()
    winner = Outcome(ads=2, what="ad", unreported=2, versions=[(4, 2)])
    empty = Outcome(no_ads=[(session, document)], unreported=1, versions=[(3, 0)])
    whole = together([empty, winner], winner)

    assert (2, 3, [(3, 0), (4, 2)]) == (whole.ads, whole.unreported, whole.versions)
    assert [(session, document)] == whole.no_ads
    assert winner is together([winner], winner)
    assert (0, [(3, 0)]) == ((none := together([empty], None)).ads, none.versions)
