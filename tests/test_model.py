"""What travels is frozen, and a query is read as the player wrote it."""

from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vastproxy.model import AdRequest, FrozenMapping, HopReply, Query

MAPPINGS = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=5)


@given(items=MAPPINGS)
def test_mapping_is_a_mapping(items: dict[str, str]) -> None:
    """A frozen mapping has the items that it was made of, in their order."""
    frozen = FrozenMapping(items)

    assert list(items.items()) == list(frozen.items())
    assert len(items) == len(frozen)
    assert frozen == items


@given(items=MAPPINGS)
def test_mapping_hash_follows_equality(items: dict[str, str]) -> None:
    """Equal frozen mappings have equal hashes, whatever the order of their items."""
    turned = FrozenMapping(dict(reversed(items.items())))

    assert FrozenMapping(items) == turned
    assert hash(FrozenMapping(items)) == hash(turned)


def test_mapping_keeps_no_tie_to_its_source() -> None:
    """What is done to the source later does not reach the frozen mapping."""
    source = {"a": "1"}
    frozen = FrozenMapping(source)
    source["a"] = "2"

    assert {"a": "1"} == frozen
    assert not hasattr(frozen, "__setitem__")


def test_mapping_differs_from_what_is_no_mapping() -> None:
    """A frozen mapping equals nothing but mappings."""
    frozen = FrozenMapping()

    assert FrozenMapping({"a": "1"}) != frozen
    assert frozen != ()
    assert repr(FrozenMapping({"a": "1"})) == "<FrozenMapping {'a': '1'}>"


def test_query_is_decoded_on_demand() -> None:
    """Names and values of a query are decoded; the raw text stays byte for byte."""
    query = Query("a=%C3%BC+x&empty=&b%5B%5D=1")

    assert {"a": "ü x", "empty": "", "b[]": "1"} == dict(query)
    assert "a=%C3%BC+x&empty=&b%5B%5D=1" == query.raw
    assert 3 == len(query)


def test_query_first_value_counts() -> None:
    """Of a name that repeats the first value counts."""
    assert "1" == Query("a=1&b=2&a=3")["a"]


@given(raw=st.text(max_size=60))
def test_query_reads_anything(raw: str) -> None:
    """Any text can be looked into as a query."""
    query = Query(raw)

    assert len(query) == len(list(query))
    assert all(isinstance(query[name], str) for name in query)


def test_requests_are_frozen() -> None:
    """An ad request cannot be changed, only copied with a change."""
    request = AdRequest("/a", query=Query("x=1"))

    with pytest.raises(FrozenInstanceError):
        request.route = "/b"  # type: ignore[misc]
    assert "/b" == replace(request, route="/b").route


def test_reply_gives_the_first_header() -> None:
    """Of a header that repeats, the first value is given; of one that is not there, None."""
    reply = HopReply(200, (("set-cookie", "a=1"), ("set-cookie", "b=2")), b"")

    assert "a=1" == reply.header("set-cookie")
    assert reply.header("location") is None
