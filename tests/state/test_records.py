"""What a confirmation needs is written down, and read again as it was."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vastproxy.errors import StateBackendError
from vastproxy.state.base import DAY_MS, MAX_AMOUNT, Account, Claim, Hold, Window, money
from vastproxy.state.records import dumped, loaded
from vastproxy.state.windows import Period, Span, counter_key

NOW = 1_800_000_000_000
SPRING = Account("campaign", "spring")
spans = st.one_of(
    st.builds(Span, st.sampled_from(["rolling", "fixed"]), st.integers(1, 10**12)),
    st.just(Span()),
    st.builds(
        lambda period, zone: Span("calendar", period=period, time_zone=zone),
        st.sampled_from(get_args(Period)),
        st.sampled_from(["UTC", "Europe/Berlin", "Etc/GMT+12"]),
    ),
)
ids = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=100)


@st.composite
def viewer_holds(draw: Any) -> Hold:
    """Draw what an ad takes of a viewer."""
    keys = [counter_key(draw(spans), f"/{at}", draw(st.text())) for at in range(draw(at_most_five))]
    claims = [Claim(key, draw(st.integers(0, MAX_AMOUNT)), draw(st.integers(0, 9))) for key in keys]
    account = Account("viewer", draw(st.text(max_size=30)))
    return Hold(account, draw(ids), tuple(claims), keep_ms=draw(st.integers(1, 10**10)))


at_most_five = st.integers(1, 5)
money_holds = st.builds(
    lambda name, operation, amount, lease: Hold(
        Account("campaign", name), operation, (money(amount, 9),), lease=lease
    ),
    st.text(max_size=30),
    ids,
    st.integers(0, MAX_AMOUNT),
    st.just("") | ids,
)


@given(st.lists(viewer_holds() | money_holds, max_size=4))
@settings(max_examples=100)
def test_round_trip(holds: list[Hold]) -> None:
    """Holds are read as they were written; limits are left out, and windows are those of now."""
    text = dumped(holds)
    found = loaded(text, NOW)

    assert "\n" not in text
    assert text.isascii()
    assert [(each.account, each.operation, each.keep_ms, each.lease) for each in holds] == [
        (each.account, each.operation, each.keep_ms, each.lease) for each in found
    ]
    assert [[(c.key, c.amount) for c in each.claims] for each in holds] == [
        [(c.key, c.amount) for c in each.claims] for each in found
    ]
    assert {None} >= {claim.limit for each in found for claim in each.claims}
    assert found == loaded(text.encode(), NOW)


def test_windows_are_those_of_now() -> None:
    """A calendar's window is made anew when the record is read, around that time."""
    span = Span("calendar", period="day", time_zone="Europe/Berlin")
    key = counter_key(span, "/r")
    text = dumped([Hold(Account("viewer", "v"), "o", (Claim(key, window=span.at(NOW)),))])
    [hold] = loaded(text, NOW + 9 * DAY_MS)

    assert (Claim(key, window=span.at(NOW + 9 * DAY_MS)),) == hold.claims
    assert span.at(NOW) != hold.claims[0].window


def test_short() -> None:
    """A record is short: it travels in every beacon."""
    window = Window("rolling", 3_600_000)
    viewer = Hold(Account("viewer", "v" * 22), "o.1", (Claim("r3600000|/r|", 1, 3, window),))
    paid = Hold(SPRING, "o.2", (money(2500, 10),), lease="lease-1")

    assert (
        '[["v","vvvvvvvvvvvvvvvvvvvvvv","o.1",86400000,{"r3600000|/r|":1}],'
        '["c","spring","o.2",86400000,{"spent":2500},"lease-1"]]' == dumped([viewer, paid])
    )
    assert "[]" == dumped([])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "{}]",
        "null",
        "[5]",
        "[[]]",
        '["v"]',
        '[["x","v","o",1,{"l|c|":1}]]',
        '[[["v"],"v","o",1,{"l|c|":1}]]',
        '[["v",5,"o",1,{"l|c|":1}]]',
        '[["v","v",5,1,{"l|c|":1}]]',
        '[["v","v","",1,{"l|c|":1}]]',
        '[["v","v","\\u00e9",1,{"l|c|":1}]]',
        '[["v","v","o","soon",{"l|c|":1}]]',
        '[["v","v","o",1,{}]]',
        '[["v","v","o",1,["l|c|"]]]',
        '[["v","v","o",1,{"l|c|":"x"}]]',
        '[["v","v","o",1,{"l|c|":-1}]]',
        '[["v","v","o",1,{"l|c|":NaN}]]',
        '[["v","v","o",1,{"l|c|":Infinity}]]',
        '[["v","v","o",1,{"l|c|":9007199254740992}]]',
        '[["v","v","o",1,{"no window":1}]]',
        '[["v","v","o",1,{"cday Nowhere|c|":1}]]',
        '[["c","spring","o",1,{"l|c|":1}]]',
        "[" * 100_000,
        '{"a":1}',
    ],
    ids=lambda each: each[:40],
)
def test_no_record(text: str) -> None:
    """What is no record is an error of the state, whatever it is instead."""
    with pytest.raises(StateBackendError):
        loaded(text, NOW)


@given(st.binary(max_size=100) | st.text(max_size=100))
@settings(max_examples=200)
def test_anything(text: bytes | str) -> None:
    """Any text gives holds or an error of the state."""
    try:
        found = loaded(text, NOW)
    except StateBackendError:
        return

    assert [] == found
