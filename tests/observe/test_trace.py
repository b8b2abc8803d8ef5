"""What happened is kept in the order in which it began."""

from dataclasses import FrozenInstanceError

import pytest

from vastproxy.observe.trace import AdFact, Exchange, Hop, Trace


def a_hop(number: int) -> Hop:
    """Build a hop."""
    return Hop(number, None, 0, "main", f"http://a.example/{number}", (), 1.0)


def test_hops_are_numbered_as_they_begin() -> None:
    """Numbers are given from 1 on, each once."""
    trace = Trace()

    assert [1, 2, 3] == [trace.begin() for _ in range(3)]
    assert 3 == trace.begun


def test_hops_are_ordered_by_their_beginning() -> None:
    """Hops that end in another order than they began are told as they began."""
    trace = Trace()
    for number in (3, 1, 2):
        trace.add(a_hop(number))

    assert [3, 1, 2] == [each.number for each in trace.hops]
    assert [1, 2, 3] == [each.number for each in trace.ordered()]


@pytest.mark.parametrize(
    "fact", [a_hop(1), Exchange("http://a.example/", 1.0), AdFact("1", "s", "InLine", None)]
)
def test_facts_are_frozen(fact: object) -> None:
    """What happened does not change any more."""
    with pytest.raises(FrozenInstanceError):
        fact.__setattr__(next(iter(fact.__dataclass_fields__)), "other")  # type: ignore[attr-defined]
