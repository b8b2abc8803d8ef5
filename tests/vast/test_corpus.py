"""The IAB's samples: every one is read, and every wrapper is merged into every InLine beside it."""

from collections import Counter
from pathlib import Path

import pytest
import vastlint
from lxml import etree

from tests.support.script import chained
from tests.support.vast_facts import Fact, faults, read
from tests.support.vast_schema import CORPUS, violations
from vastproxy.errors import VastVersionError
from vastproxy.vast.parse import parse
from vastproxy.vast.serialise import to_bytes

SAMPLES = CORPUS / "iab-samples"
FILES = sorted(SAMPLES.rglob("*.xml"))
ADDED_BY_MERGE = {"UniversalAdId"}
"""A creative of a wrapper's companions needs one where the InLine's version requires it."""

INVALID = {"vast2Nonlinear", "vast2VPAIDLinear"}
"""Samples that their own schema refuses."""

BY_DESIGN = {"VAST-2.0-duplicate-impression"}
"""What vastlint warns of, and is wanted: equal URLs of two levels are two impressions."""

UNION = (
    "Impression",
    "Error",
    "ViewableImpression/",
    "Extension",
    "Verification",
)
"""Kinds of facts, by their beginnings, that all levels give once."""

SPREAD = ("Linear/TrackingEvents", "Linear/VideoClicks/ClickTracking", "Linear/VideoClicks/Custom")
"""Kinds that a wrapper gives to every Linear."""

pytestmark = pytest.mark.skipif(not FILES, reason="the IAB's samples are not beside the project")


def name_of(path: Path) -> str:
    """Name a sample in a test's id."""
    return f"{path.parent.name} {path.stem}"


def is_of_vast_1(path: Path) -> bool:
    """Say whether a sample is of VAST 1."""
    return b"<VideoAdServingTemplate" in path.read_bytes()


def is_wrapper(path: Path) -> bool:
    """Say whether a sample's ads are wrappers."""
    return b"<Wrapper" in path.read_bytes()


READABLE = [each for each in FILES if not is_of_vast_1(each)]
WRAPPERS = [each for each in READABLE if is_wrapper(each)]
PAIRS = [
    (wrapper, inline)
    for wrapper in WRAPPERS
    for inline in READABLE
    if inline.parent == wrapper.parent and not is_wrapper(inline)
]


def pairs() -> pytest.MarkDecorator:
    """Run a test for each wrapper with each InLine of its folder."""
    ids = [f"{name_of(wrapper)} + {inline.stem}" for wrapper, inline in PAIRS]
    return pytest.mark.parametrize(("wrapper", "inline"), PAIRS, ids=ids)


@pytest.mark.parametrize("path", READABLE, ids=name_of)
def test_samples_are_read(path: Path) -> None:
    """A sample is read without a repair, and written with the same meaning."""
    data = path.read_bytes()
    document = parse(data)
    repairs = [each for each in document.repairs if each != "blanks before the document"]

    assert [] == repairs
    assert document.ads
    assert all(each.is_inline or each.is_wrapper for each in document.ads)
    assert etree.canonicalize(data.decode("utf-8-sig").strip()) == etree.canonicalize(
        to_bytes(document).decode()
    )


@pytest.mark.parametrize("path", [each for each in FILES if is_of_vast_1(each)], ids=name_of)
def test_samples_of_vast_1(path: Path) -> None:
    """A sample of VAST 1 has code 102."""
    with pytest.raises(VastVersionError) as caught:
        parse(path.read_bytes())

    assert 102 == caught.value.vast_code


def test_corpus_is_whole() -> None:
    """The corpus has all of its samples, with wrappers of all versions but the first."""
    assert 75 == len(FILES)
    assert 69 == len(READABLE)
    assert 5 == len({each.parent for each in WRAPPERS})
    assert len(PAIRS) > 60


@pytest.mark.parametrize("path", READABLE, ids=name_of)
def test_schema_of_samples(path: Path) -> None:
    """All samples are valid but two of Tremor's, whose ads have no Impression."""
    assert (path.stem not in INVALID) is (violations(path.read_bytes()) == [])


@pairs()
def test_schema(wrapper: Path, inline: Path) -> None:
    """Where all levels are valid, so is the answer, up to the order of children."""
    answer = chained(wrapper.read_bytes(), inline.read_bytes())

    assert inline.stem in INVALID or violations(answer) == []


@pairs()
def test_vastlint(wrapper: Path, inline: Path) -> None:
    """Vastlint finds no rule broken in the answer that is not broken in a document of the chain."""
    documents = [wrapper.read_bytes(), inline.read_bytes()]
    known = {issue.id for each in documents for issue in vastlint.validate(each).issues}
    found = {issue.id for issue in vastlint.validate(chained(*documents)).issues}

    assert set() == found - known - BY_DESIGN


@pairs()
def test_conservation(wrapper: Path, inline: Path) -> None:
    """Every fact of the InLine, and every tracker of the wrapper, is in the answer."""
    answer = chained(wrapper.read_bytes(), inline.read_bytes())
    (above,) = read(wrapper.read_bytes())
    below, found = read(inline.read_bytes()), read(answer)
    for ad, expected in zip(found, below, strict=False):
        linears = Counter(fact.kind for fact in expected.facts.elements())["Linear/Duration"]

        assert Counter() == _losable(expected.facts) - ad.facts
        for fact, count in _given(above.facts, linears).items():
            assert count + expected.facts[fact] == ad.facts[fact]
    assert [] == faults(answer)


@pairs()
def test_nothing_is_made_up(wrapper: Path, inline: Path) -> None:
    """Every fact of the answer was said by the InLine or by the wrapper."""
    found = read(chained(wrapper.read_bytes(), inline.read_bytes()))
    said = {
        fact for path in (wrapper, inline) for ad in read(path.read_bytes()) for fact in ad.facts
    }
    told = {
        fact
        for ad in found
        for fact in ad.facts
        if fact.kind not in ADDED_BY_MERGE and not fact.kind.startswith("Companion")
    }

    assert set() == told - said


@pytest.mark.parametrize("path", [each for each in READABLE if not is_wrapper(each)], ids=name_of)
def test_depth_none(path: Path) -> None:
    """An InLine that is answered at once keeps all that it says."""
    answer = chained(path.read_bytes())

    assert read(path.read_bytes())[0].facts == read(answer)[0].facts


def _losable(facts: Counter[Fact]) -> Counter[Fact]:
    """Leave out what a rule may replace: the price, by the wrapper's."""
    return Counter({fact: count for fact, count in facts.items() if fact.kind != "Pricing"})


def _given(facts: Counter[Fact], linears: int) -> Counter[Fact]:
    """Tell what a wrapper gives to an InLine that has so many Linears."""
    given: Counter[Fact] = Counter()
    for fact, count in facts.items():
        if not fact.text:
            continue
        if fact.kind.startswith(UNION):
            given[fact] += count
        elif fact.kind.startswith(SPREAD):
            given[fact] += count * linears
    return given
