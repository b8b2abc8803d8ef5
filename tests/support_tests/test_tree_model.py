"""The merge rules of the second opinion, on levels written by hand."""

from collections import Counter

from tests.support.tree_model import (
    Ad,
    Companion,
    Icon,
    Level,
    LinearPart,
    Response,
    Verification,
    merged,
    paths,
)
from tests.support.vast_facts import Fact

START = "Linear/TrackingEvents/Tracking"


def a_level(name: str, *, wrapper: bool = True, **content: object) -> Level:
    """Build a level called *name*."""
    level = Level("3.0", wrapper, name)
    for key, value in content.items():
        setattr(level, key, value)
    return level


def an_inline(name: str = "i", **content: object) -> Level:
    """Build the level of an InLine."""
    return a_level(name, wrapper=False, **content)


def texts(levels: list[Level]) -> list[str]:
    """Merge *levels*, and give the texts of the facts in alphabetical order."""
    return sorted(fact.text for fact in merged(levels).elements())


def test_trackers_of_all_levels() -> None:
    """A wrapper's trackers are added to each Linear, however many Creatives they stand in."""
    parts = [LinearPart([Fact(START, "start", "", url)]) for url in ("w1", "w2")]
    linears = [LinearPart([Fact(START, "start", "", url)]) for url in ("a", "b")]

    assert ["a", "b", "w1", "w1", "w2", "w2"] == texts(
        [a_level("w", linears=parts), an_inline(linears=linears)]
    )


def test_closest_click_through() -> None:
    """The InLine's ClickThrough wins; without one, that of the innermost wrapper."""
    wrappers = [a_level(name, linears=[LinearPart(through=name)]) for name in ("outer", "inner")]

    assert ["own"] == texts([*wrappers, an_inline(linears=[LinearPart(through="own")])])
    assert ["inner"] == texts([*wrappers, an_inline(linears=[LinearPart()])])


def test_icons_by_program() -> None:
    """One icon of a program is left, the closest to the InLine; those without program all stay."""
    outer = LinearPart(icons=[Icon("p", "outer", ()), Icon("", "none 1", ())])
    inner = LinearPart(icons=[Icon("p", "inner", ()), Icon("", "none 2", ())])
    levels = [a_level("w", linears=[outer]), a_level("x", linears=[inner])]

    assert ["inner", "none 1", "none 2"] == texts([*levels, an_inline(linears=[LinearPart()])])


def test_companions() -> None:
    """A companion yields to one of its size and slot closer in; one that only tracks is spread."""
    wrapper = a_level(
        "w",
        companions=[
            Companion("1", "1", resource="loses", views=("lost",)),
            Companion("2", "2", resource="added"),
            Companion("0", "0", views=("all",)),
            Companion("1", "1", views=("sized",)),
        ],
    )
    inline = an_inline(
        companions=[Companion("1", "1", resource="own"), Companion("3", "3", resource="other")]
    )

    assert ["added", "all", "all", "other", "own", "sized"] == texts([wrapper, inline])


def test_verifications_and_pricing() -> None:
    """Equal Verifications are one; the outermost price wins."""
    same = Verification("v", "script")
    prices = [Fact("Pricing", "CPM", "USD", text) for text in ("1", "2", "3")]
    levels = [
        a_level("w"),
        a_level("x", pricing=prices[1], verifications=[same]),
        an_inline(pricing=prices[2], verifications=[same, Verification("v", "other")]),
    ]

    assert ["2", "other", "script"] == texts(levels)


def test_pods() -> None:
    """A failed ad of a pod is replaced by a spare one; pods in pods are flattened in order."""
    failing = Response("3.0", "/x", failure=object())  # type: ignore[arg-type]
    inner = Response(
        "3.0", "/y", [Ad(an_inline(name), number) for number, name in ((2, "d"), (1, "c"))]
    )
    root = Response(
        "3.0",
        "/",
        [
            Ad(an_inline("spare")),
            Ad(a_level("w"), 5, inner, "true"),
            Ad(a_level("v"), 2, failing),
            Ad(an_inline("a"), 1),
            Ad(a_level("u"), 7, inner, "false"),
        ],
    )

    assert [["a"], ["spare"], ["w", "c"], ["w", "d"], ["u", "c"]] == [
        [level.id for level in path] for path in paths(root, multiple=True)
    ]


def test_nothing_is_counted_twice() -> None:
    """The merge of an InLine alone is what it says."""
    linear = LinearPart([Fact(START, "start", "", "a")] * 2, "through")
    expected = Counter({Fact(START, "start", "", "a"): 2})
    expected[Fact("Linear/VideoClicks/ClickThrough", "", "", "through")] = 1

    assert expected == merged([an_inline(linears=[linear])])
