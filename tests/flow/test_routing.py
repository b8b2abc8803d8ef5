"""Which route answers, who is watching, and what of the request goes on."""

import pytest

from vastproxy.config.template import Template
from vastproxy.config.units import Source
from vastproxy.errors import VastError
from vastproxy.flow.routing import (
    Route,
    Router,
    forwarded,
    macro_values,
    viewer_of,
)
from vastproxy.model import AdRequest, Device, FrozenMapping, Query

NOBODY_TAKES: frozenset[str] = frozenset()


def a_router(*paths: str) -> Router:
    """Build a router of routes with *paths*."""
    return Router(Route(path, ()) for path in paths)


def a_request(query: str = "", **headers: str) -> AdRequest:
    """Build a request; an underscore in a header's name stands for a hyphen."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return AdRequest("/", query=Query(query), headers=FrozenMapping(named))


def where(router: Router, path: str) -> tuple[str, str] | None:
    """Give the path of the route that *path* finds, and its rest."""
    match = router.find(path)
    return (match[0].path, match[1]) if match else None


def test_exact_route_wins() -> None:
    """An exact path goes before an open one, in whatever order they are written."""
    router = a_router("/a/{rest}", "/a/b")

    assert ("/a/b", "") == where(router, "/a/b")
    assert ("/a/{rest}", "b/") == where(router, "/a/b/")


def test_longest_open_route_wins() -> None:
    """Of the open routes the longest that fits is found."""
    router = a_router("/{rest}", "/a/{rest}", "/a/b/{rest}")

    assert ("/a/b/{rest}", "c/d") == where(router, "/a/b/c/d")
    assert ("/a/{rest}", "bc") == where(router, "/a/bc")
    assert ("/{rest}", "x") == where(router, "/x")


@pytest.mark.parametrize("path", ["/A", "/a/", "/a%2F", "/%61", "/ab", "", "a", "//a", "/a;x"])
def test_paths_are_compared_byte_for_byte(path: str) -> None:
    """A path that is not the route's, byte for byte, finds nothing."""
    assert where(a_router("/a"), path) is None


def test_rest_is_what_was_sent() -> None:
    """The rest of a path is given byte for byte; it may be empty."""
    router = a_router("/a/{rest}")

    assert ("/a/{rest}", "b%2Fc//d;e=[F]") == where(router, "/a/b%2Fc//d;e=[F]")
    assert ("/a/{rest}", "") == where(router, "/a/")
    assert where(router, "/a") is None


@pytest.mark.parametrize(
    "rest",
    [
        *("..", "../x", "x/..", "x/../y", ".", "./x", "x/./y", "x/."),
        *("%2e%2E", "%2E./x", ".%2e/x", "x/%2e", "x/%2e%2e/y", "x/y/%2E%2e"),
    ],
)
def test_dot_segments_find_nothing(rest: str) -> None:
    """A rest that leaves the place the operator named finds no route, encoded or not."""
    assert where(a_router("/a/{rest}", "/{rest}"), f"/a/{rest}") is None


@pytest.mark.parametrize("rest", ["...", "a..b", "..a", "a.", ".a", "%2e%2e%2e", "x/.../y"])
def test_dots_in_names_are_fine(rest: str) -> None:
    """Dots that make no segment of their own are part of a name."""
    assert ("/a/{rest}", rest) == where(a_router("/a/{rest}"), f"/a/{rest}")


def test_router_names_its_routes() -> None:
    """A router says which paths it knows."""
    assert "<Router ['/a', '/b/{rest}']>" == repr(a_router("/b/{rest}", "/a"))


def test_first_source_that_has_a_value_is_the_viewer() -> None:
    """The viewer's id comes from the first source that is there and not empty."""
    sources = tuple(map(Source.parse, ("query:uid", "header:X-Uid", "cookie:uid")))
    route = Route("/", (), viewer=sources)

    assert "h" == viewer_of(route, a_request("uid=", x_uid="h", cookie="uid=c"))
    assert "c" == viewer_of(route, a_request("", cookie="uid=c"))
    assert "" == viewer_of(route, a_request("x=1"))
    assert "" == viewer_of(Route("/", ()), a_request("uid=1"))


@pytest.mark.parametrize(
    "nil",
    ["00000000-0000-0000-0000-000000000000", "00000000000000000000000000000000"],
)
def test_advertising_id_of_zeros_is_nobodys(nil: str) -> None:
    """The id that devices send for viewers who want no tracking is passed over, in any source."""
    route = Route("/", (), viewer=(Source.parse("query:ifa"), Source.parse("cookie:uid")))

    assert "c" == viewer_of(route, a_request(f"ifa={nil}", cookie="uid=c"))
    assert "" == viewer_of(route, a_request(f"ifa={nil}", cookie=f"uid={nil}"))
    assert "a" == viewer_of(route, a_request("ifa=a", cookie=f"uid={nil}"))


@pytest.mark.parametrize(
    "own",
    [
        "00000000-0000-0000-0000-000000000001",
        "x00000000-0000-0000-0000-000000000000",
        "00000000-0000-0000-0000-0000000000000",
        "0",
        "0000",
    ],
)
def test_id_with_zeros_is_somebodys(own: str) -> None:
    """Anything else than the id of zeros is an id."""
    assert own == viewer_of(
        Route("/", (), viewer=(Source.parse("query:ifa"),)), a_request(f"ifa={own}")
    )


RAW = "slot=a%20b&uid=%2F&&x&slot=[C]&Slot=d"


@pytest.mark.parametrize(
    ("which", "taken", "goes_on"),
    [
        ("all", NOBODY_TAKES, RAW),
        ("all", frozenset({"slot"}), "uid=%2F&&x&Slot=d"),
        ("none", NOBODY_TAKES, ""),
        (("uid", "x"), NOBODY_TAKES, "uid=%2F&x"),
        (("slot",), frozenset({"slot"}), "slot=a%20b&slot=[C]"),
        (("other",), NOBODY_TAKES, ""),
    ],
)
def test_query_goes_on(which: object, taken: frozenset[str], goes_on: str) -> None:
    """All, none or some parameters go on, byte for byte and in order; taken ones only by name."""
    assert goes_on == forwarded(Route("/", (), forward_query=which), RAW, taken)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", ["%73lot=1", "s%6Cot=1&slot=2", "slo%74", "%73%6C%6F%74=%"])
def test_encoded_name_is_the_same_name(raw: str) -> None:
    """A name is compared as an ad server reads it: encoding it brings no second copy through."""
    route = Route("/", (), forward_query="all")

    assert "a=%73lot" == forwarded(route, f"{raw}&a=%73lot", frozenset({"slot"}))
    assert f"{raw}" == forwarded(Route("/", (), forward_query=("slot",)), raw, NOBODY_TAKES)


def test_name_that_is_no_utf8() -> None:
    """A name that cannot be decoded is nobody's, and goes on."""
    assert "%ff=1&a+b=2" == forwarded(
        Route("/", ()), "%ff=1&a+b=2&c+d=3", frozenset({"slot", "c d"})
    )


def test_no_query_goes_on() -> None:
    """Without a query there is nothing to go on."""
    assert "" == forwarded(Route("/", ()), "", NOBODY_TAKES)


def test_macros_of_the_route() -> None:
    """Macros come from the request by templates, plain; an empty value is none."""
    texts = {"IFA": "{query.ifa}", "CONTENTID": "c-{header.x-c}", "PAGEURL": "{viewer}"}
    route = Route("/", (), macros=tuple((key, Template.parse(each)) for key, each in texts.items()))
    request = AdRequest(
        "/", query=Query("ifa="), headers=FrozenMapping({"x-c": "1 2"}), device=Device()
    )

    assert {"CONTENTID": "c-1 2", "PAGEURL": "me/1"} == macro_values(route, request, "me/1")


def test_fallback_that_is_none() -> None:
    """A route does not come to be with a fallback that nobody could be answered."""
    with pytest.raises(VastError):
        Route("/", (), fallback=b"<html/>")
    assert b"<VAST version='3.0'/>" == Route("/", (), fallback=b"<VAST version='3.0'/>").fallback
