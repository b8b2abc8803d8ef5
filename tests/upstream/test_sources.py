"""Where a request says something: parameters, headers, cookies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.config.units import Source
from vastproxy.model import AdRequest, FrozenMapping, Query
from vastproxy.upstream.sources import cookies, found


def a_request(query: str = "", **headers: str) -> AdRequest:
    """Build a request; an underscore in a header's name stands for a hyphen."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return AdRequest("/", query=Query(query), headers=FrozenMapping(named))


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("query:uid", "q"),
        ("header:X-Uid", "h"),
        ("cookie:uid", "c"),
        ("query:none", ""),
        ("header:none", ""),
        ("cookie:none", ""),
    ],
)
def test_sources(source: str, value: str) -> None:
    """A source is a query parameter, a header or a cookie; what is not there is empty."""
    request = a_request("uid=q&uid=r", x_uid="h", cookie="a=b; uid=c; uid=d")

    assert value == found(Source.parse(source), request)


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("", {}),
        ("uid=1", {"uid": "1"}),
        ("x=0;uid=1; uid=2", {"uid": "1"}),
        ('uid="a=b"; sid=', {"uid": '"a=b"', "sid": ""}),
        ("uid; Uid=1; =2; ;;", {}),
        ("  uid =1; uid= 2", {"uid": " 2"}),
    ],
)
def test_cookies(header: str, values: dict[str, str]) -> None:
    """Of the cookies that are named the first is given, as it was sent."""
    assert values == cookies(header, ("uid", "sid"))


@given(header=st.text(max_size=40))
def test_any_cookie_header_can_be_read(header: str) -> None:
    """Nothing but the names that were asked for comes out of a header, whatever it is."""
    assert set(cookies(header, ("uid",))) <= {"uid"}
