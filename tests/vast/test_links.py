"""Relative addresses: the examples of RFC 3986 section 5.4, and bytes that nobody may touch."""

from urllib.parse import urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.vast.links import joined

BASE = "http://a/b/c/d;p?q"

# RFC 3986 section 5.4.1; "g:h" is absolute, and never comes here.
NORMAL = {
    "g": "http://a/b/c/g",
    "./g": "http://a/b/c/g",
    "g/": "http://a/b/c/g/",
    "/g": "http://a/g",
    "//g": "http://g",
    "?y": "http://a/b/c/d;p?y",
    "g?y": "http://a/b/c/g?y",
    "#s": "http://a/b/c/d;p?q#s",
    "g#s": "http://a/b/c/g#s",
    "g?y#s": "http://a/b/c/g?y#s",
    ";x": "http://a/b/c/;x",
    "g;x": "http://a/b/c/g;x",
    "g;x?y#s": "http://a/b/c/g;x?y#s",
    "": "http://a/b/c/d;p?q",
    ".": "http://a/b/c/",
    "./": "http://a/b/c/",
    "..": "http://a/b/",
    "../": "http://a/b/",
    "../g": "http://a/b/g",
    "../..": "http://a/",
    "../../": "http://a/",
    "../../g": "http://a/g",
}

# RFC 3986 section 5.4.2.
ABNORMAL = {
    "../../../g": "http://a/g",
    "../../../../g": "http://a/g",
    "/./g": "http://a/g",
    "/../g": "http://a/g",
    "g.": "http://a/b/c/g.",
    ".g": "http://a/b/c/.g",
    "g..": "http://a/b/c/g..",
    "..g": "http://a/b/c/..g",
    "./../g": "http://a/b/g",
    "./g/.": "http://a/b/c/g/",
    "g/./h": "http://a/b/c/g/h",
    "g/../h": "http://a/b/c/h",
    "g;x=1/./y": "http://a/b/c/g;x=1/y",
    "g;x=1/../y": "http://a/b/c/y",
    "g?y/./x": "http://a/b/c/g?y/./x",
    "g?y/../x": "http://a/b/c/g?y/../x",
    "g#s/./x": "http://a/b/c/g#s/./x",
    "g#s/../x": "http://a/b/c/g#s/../x",
}

SEGMENTS = st.text(alphabet="ab.%/;=:[]@ é\n", max_size=12).map(lambda text: f"/{text}")
QUERIES = st.sampled_from(("", "?", "?x=/../y", "?a=[B]&&c;d?", "#", "?x#y"))


@pytest.mark.parametrize(("reference", "url"), [*NORMAL.items(), *ABNORMAL.items()])
def test_examples_of_the_standard(reference: str, url: str) -> None:
    """Every relative reference of RFC 3986 section 5.4 leads where that section says."""
    assert url == joined(BASE, reference)


@pytest.mark.parametrize(
    ("reference", "url"),
    [
        ("g?", "http://a/b/c/g?"),
        ("?", "http://a/b/c/d;p?"),
        ("g;", "http://a/b/c/g;"),
        ("g#", "http://a/b/c/g#"),
        ("//g?", "http://g?"),
        ("//g/x//y/?", "http://g/x//y/?"),
        ("x//y", "http://a/b/c/x//y"),
        ("/x//y//", "http://a/x//y//"),
        ("x//../y", "http://a/b/c/x/y"),
        ("/..//g", "http://a//g"),
        ("%2e%2E/g", "http://a/b/c/%2e%2E/g"),
    ],
)
def test_nothing_is_dropped(reference: str, url: str) -> None:
    """Empty queries, parameters and segments stay; a dot that is encoded is no dot segment."""
    assert url == joined(BASE, reference)


@pytest.mark.parametrize(
    ("base", "reference", "url"),
    [
        ("http://a", "g", "http://a/g"),
        ("http://a", "../g", "http://a/g"),
        ("http://a?q", "g", "http://a/g"),
        ("http://a?q=/x/", "?y", "http://a/?y"),
        ("http://a/b?x=/c/d", "g", "http://a/g"),
        ("http://a/b#/c/d", "g", "http://a/g"),
        ("HTTPS://A:8443/b//c", "g", "HTTPS://A:8443/b//g"),
        ("http://[::1]/b", "/g", "http://[::1]/g"),
        ("u:entry", "g", "u:g"),
    ],
)
def test_odd_bases(base: str, reference: str, url: str) -> None:
    """A base may have no path; a slash in its query or fragment makes no directory."""
    assert url == joined(base, reference)


@pytest.mark.parametrize("base", ["", "/a/b", "//a/b", "a/b", "1:x", ":x", "?x"])
@pytest.mark.parametrize("reference", ["g", "/g?", "//g/../h", "../g", "?y", ""])
def test_no_usable_base(base: str, reference: str) -> None:
    """Without a base that is absolute, a reference stays as it is."""
    assert reference == joined(base, reference)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_two_texts_can_be_joined(base: str, reference: str) -> None:
    """Any two texts give a text, which ends as the reference does from its query on."""
    tail = reference[min((reference + "?#").index(each) for each in "?#") :]

    assert joined(base, reference).endswith(tail)


@given(SEGMENTS, QUERIES)
def test_absolute_path_stays(path: str, query: str) -> None:
    """An absolute path without dot segments stays byte for byte, whatever the base."""
    kept = "/".join(each for each in path.split("/") if each not in {".", ".."})
    reference = f"/{kept.lstrip('/')}{query}"

    assert f"http://a{reference}" == joined(BASE, reference)


@given(st.lists(st.sampled_from(("a", "b;c", "d=e", ".", "..", "...")), min_size=1).map("/".join))
def test_dots_are_removed_as_elsewhere(path: str) -> None:
    """Where no segment is empty, the standard library finds the same."""
    for reference in (path, f"/{path}", f"{path}/", f"{path}?x"):
        assert urljoin("http://a/b/c/d", reference) == joined("http://a/b/c/d", reference)
