"""What schedules promise to those who run them."""

from random import Random

import pytest

from tests.chaos.schedule import ANY, GARBAGE, LONGEST, Act, drawn
from tests.chaos.toxics import parse_toxic


def test_seed() -> None:
    """The same seed gives the same schedule, another one another."""
    assert drawn(Random(1), 10.0) == drawn(Random(1), 10.0)
    assert drawn(Random(1), 10.0) != drawn(Random(2), 10.0)


@pytest.mark.parametrize("seed", range(20))
def test_length(seed: int) -> None:
    """A schedule lasts as long as was asked for, in short acts, and ends in calm."""
    acts = drawn(Random(seed), 5.0)

    assert 4.9 <= sum(each.seconds for each in acts) <= 5.0 + 1e-9
    assert LONGEST >= max(each.seconds for each in acts)
    assert Act(0.0) == acts[-1]


def test_all_happens() -> None:
    """Everything on the menu happens sooner or later, and so do calm and refusals."""
    acts = drawn(Random(0), 400.0, (*ANY, *GARBAGE))

    assert {toxic for each in acts for toxic in each.toxics} == {
        parse_toxic(each) for each in (*ANY, *GARBAGE)
    }
    assert {True, False} == {each.down for each in acts}
    assert any(not each.toxics and not each.down for each in acts[:-1])


def test_shown() -> None:
    """An act is shown as what happens in it."""
    acts = (Act(0.5), Act(1.0, down=True), Act(0.25, (parse_toxic("cut"), parse_toxic("slice=3"))))

    assert ["0.50 s calm", "1.00 s down", "0.25 s cut=true; slice=3B"] == [str(e) for e in acts]
