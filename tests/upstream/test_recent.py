"""The things that were asked for last."""

from vastproxy.upstream.breaker import UpstreamBreaker
from vastproxy.upstream.recent import Recent
from vastproxy.upstream.window import BreakerSettings


def test_recent_makes_once() -> None:
    """What is asked for again is the same."""
    recent = Recent(lambda key: [key])

    assert recent.of("a") is recent.of("a")
    assert ["b"] == recent.of("b")
    assert (("a", ["a"]), ("b", ["b"])) == recent.items()


def test_recent_is_bounded() -> None:
    """The longest unused has to go, and is made anew when it is asked for again."""
    dropped: list[list[str]] = []
    recent = Recent(lambda key: [key], 2, dropped=dropped.append)
    first = recent.of("a")
    recent.of("b")
    recent.of("a")
    recent.of("c")

    assert ["a", "c"] == [key for key, _ in recent.items()]
    assert [["b"]] == dropped
    assert first is recent.of("a")
    assert 2 == len(recent)
    assert "<Recent 2 of 2>" == repr(recent)


def test_recent_of_breakers() -> None:
    """A million made-up names make no million breakers, and one that is open may go with them."""
    recent = Recent(lambda key: UpstreamBreaker(key, BreakerSettings(fail_max=1)), 10)
    breaker = recent.of("bad.example")
    breaker.settle(breaker.admit(), "failed")
    for number in range(1000):
        recent.of(f"{number}.example")

    assert 10 == len(recent)
    assert "closed" == recent.of("bad.example").state
