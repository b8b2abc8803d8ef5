"""What the random trees promise: that they say what they are said to say."""

from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from tests.support import trees
from tests.support.tree_model import Ad, Response, merged
from tests.support.tree_writer import TreeWriter
from tests.support.vast_facts import read

SERVER = "http://127.0.0.1:1"


def ads_of(response: Response) -> Iterator[Ad]:
    """Give all ads of a tree."""
    for ad in response.ads:
        yield ad
        if ad.leads_to:
            yield from ads_of(ad.leads_to)


@pytest.mark.parametrize("seed", range(40))
def test_documents_say_levels(seed: int) -> None:
    """A document read again says exactly what its levels were drawn to say."""
    random = Random(seed)
    root = trees._Gardener(seed, SERVER, random).root("nested pod")
    for ad in ads_of(root):
        ad.level.litter = False
    pages = TreeWriter(SERVER, "", random).pages(root)
    written = {
        ad.id: ad.facts
        for page in pages.values()
        if page.status == 200 and page.body.rstrip().endswith(b"VAST>")
        for ad in read(page.body)
    }
    for ad in ads_of(root):
        said = written[ad.level.id]
        kept = {
            fact: count
            for fact, count in merged([ad.level]).items()
            if fact.text and not (ad.level.wrapper and fact.kind == "UniversalAdId")
        }

        assert Counter(kept) == said


@pytest.mark.parametrize("seed", range(40))
def test_same_seed_same_tree(seed: int) -> None:
    """A tree follows from its seed and the address of its server."""
    assert trees.grow(seed, SERVER) == trees.grow(seed, SERVER)


def test_all_shapes_and_depths() -> None:
    """The first 500 seeds have chains of five wrappers, pods, and answers without ads."""
    grown = [trees.grow(seed, SERVER) for seed in range(500)]
    counts = Counter(len(tree.ads) for tree in grown)

    assert {0, 1, 2, 3, 4} <= counts.keys()
    assert sum(counts.values()) / 4 < sum(counts[number] for number in counts if number > 1)
    assert 5 <= max(len(tree.pages) for tree in grown)
