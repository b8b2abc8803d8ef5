"""Windows as text, and the calendars behind them, in every time zone."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, get_args
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vastproxy.errors import StateBackendError
from vastproxy.state.base import MONEY_KEY, Claim, Window
from vastproxy.state.ledger import Counter, period
from vastproxy.state.windows import (
    AHEAD,
    LONGEST_SUBJECT,
    Period,
    Span,
    claim_of,
    counter_key,
    span_of,
    told,
)

ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Santiago",
    "America/Havana",
    "America/St_Johns",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "Africa/Cairo",
    "Africa/Casablanca",
    "Atlantic/Azores",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Pacific/Kiritimati",
    "Etc/GMT+12",
)
SPANS = (
    Span("rolling", 3_600_000),
    Span("fixed", 1),
    Span("lifetime"),
    *(Span("calendar", period=each, time_zone=zone) for each in get_args(Period) for zone in ZONES),
)
zones = st.sampled_from(ZONES)
whole_hours = st.sampled_from([each for each in ZONES if each != "Australia/Lord_Howe"])
"""Where clocks change by whole hours."""
moments = st.integers(1_700_000_000_000, 2_400_000_000_000)
"""From 2023 to 2046, in Unix milliseconds."""


def calendar(period: Any, zone: str, now: int) -> tuple[int, ...]:
    """Give the bounds of a calendar around *now*."""
    return Span("calendar", period=period, time_zone=zone).at(now).bounds


def at(text: str, zone: str) -> int:
    """Give the Unix milliseconds of a local time that has an offset, or is in *zone*."""
    found = datetime.fromisoformat(text)
    return int((found if found.tzinfo else found.replace(tzinfo=ZoneInfo(zone))).timestamp() * 1000)


def local(ms: int, zone: str) -> datetime:
    """Give a moment as the clocks in *zone* show it."""
    return datetime.fromtimestamp(ms / 1000, ZoneInfo(zone))


def begins_day(ms: int, zone: str) -> bool:
    """Whether *ms* is the first moment of a local day."""
    return local(ms, zone).date() > local(ms - 1, zone).date()


# --- Calendars ----------------------------------------------------------------------------------


@given(moments, zones, st.sampled_from(["day", "week", "month"]))
@example(at("2026-03-29T01:30:00+00:00", ""), "Europe/Berlin", "day")
@example(at("2026-10-25T00:59:59+00:00", ""), "Europe/Berlin", "day")
@example(at("2026-09-06T04:00:00+00:00", ""), "America/Santiago", "day")
@example(at("2028-02-29T12:00:00+00:00", ""), "UTC", "month")
@settings(max_examples=300)
def test_bounds(now: int, zone: str, period_: str) -> None:
    """Bounds ascend, lie around now, and are each the first moment of a local day."""
    bounds = calendar(period_, zone, now)

    assert AHEAD[period_] + 2 == len(bounds)
    assert all(one < other for one, other in pairwise(bounds))
    assert bounds[2] <= now < bounds[3]
    assert [] == [each for each in bounds if not begins_day(each, zone)]


@given(moments, zones)
@settings(max_examples=100)
def test_days_follow_each_other(now: int, zone: str) -> None:
    """Each day of a calendar is the one after the day before, whatever the clocks do."""
    days = [local(each, zone).date() for each in calendar("day", zone, now)]

    assert [timedelta(days=1)] * (len(days) - 1) == [b - a for a, b in pairwise(days)]


@given(moments, zones)
@settings(max_examples=100)
def test_weeks_begin_on_monday(now: int, zone: str) -> None:
    """Weeks begin on Monday, as in ISO 8601."""
    days = [local(each, zone).date() for each in calendar("week", zone, now)]

    assert {1} == {each.isoweekday() for each in days}
    assert local(now, zone).isocalendar()[:2] == days[2].isocalendar()[:2]


@given(moments, zones)
@settings(max_examples=100)
def test_months_begin_on_the_first(now: int, zone: str) -> None:
    """Months begin on their first day, one after the other, over the end of a year as well."""
    days = [local(each, zone).date() for each in calendar("month", zone, now)]
    months = [each.year * 12 + each.month for each in days]

    assert {1} == {each.day for each in days}
    assert list(range(months[0], months[0] + len(months))) == months
    assert (local(now, zone).year, local(now, zone).month) == (days[2].year, days[2].month)


@given(moments, whole_hours)
@settings(max_examples=100)
def test_hours(now: int, zone: str) -> None:
    """Hours begin at minute 0 of the local clock, and follow each other without a gap."""
    bounds = calendar("hour", zone, now)

    assert bounds[2] <= now < bounds[3]
    assert {3_600_000} == {b - a for a, b in pairwise(bounds)}
    assert {0} == {local(each, zone).minute for each in bounds}


def test_half_an_hour() -> None:
    """Where clocks change by half an hour, the current hour is the clock's; later ones drift."""
    zone = "Australia/Lord_Howe"
    now = at("2026-04-05T01:45:00+11:00", zone)
    bounds = calendar("hour", zone, now)

    assert at("2026-04-05T01:00:00+11:00", zone) == bounds[2]
    assert at("2026-04-05T01:30:00+10:30", zone) == bounds[3]
    assert bounds[2] <= now < bounds[3]


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", 25),
        ("Europe/Berlin", "2026-06-01", 24),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("Australia/Lord_Howe", "2026-10-04", 23.5),
        ("America/Santiago", "2026-09-06", 23),
        ("America/Havana", "2026-11-01", 25),
        ("Asia/Beirut", "2026-03-29", 23),
        ("Africa/Cairo", "2026-10-29", 25),
    ],
)
def test_length_of_a_day(zone: str, day: str, hours: float) -> None:
    """A day on which the clocks change is longer or shorter, and is one day all the same."""
    noon = at(f"{day}T12:00:00", zone)
    bounds = calendar("day", zone, noon)

    assert hours * 3_600_000 == bounds[3] - bounds[2]
    assert day == local(bounds[2], zone).date().isoformat()


@pytest.mark.parametrize(
    ("zone", "first"),
    [
        ("America/Santiago", "2026-09-06T01:00:00-03:00"),
        ("Asia/Beirut", "2026-03-29T01:00:00+03:00"),
    ],
)
def test_day_without_a_midnight(zone: str, first: str) -> None:
    """A day whose clocks go from midnight to one begins at one."""
    noon = at(f"{first[:10]}T12:00:00", zone)

    assert at(first, zone) == calendar("day", zone, noon)[2]


def test_midnight_that_comes_twice() -> None:
    """A day with two midnights begins at the first of them."""
    noon = at("2026-11-01T12:00:00", "America/Havana")

    assert at("2026-11-01T00:00:00-04:00", "") == calendar("day", "America/Havana", noon)[2]


def test_one_count_for_all_hours_of_a_long_day() -> None:
    """What is counted in the two hours of the same name is counted on the same day."""
    zone = "Europe/Berlin"
    span = Span("calendar", time_zone=zone)
    moments_ = [at("2026-10-25T00:00:00+02:00", zone) + hour * 3_600_000 for hour in range(26)]
    counter = Counter()
    counts = []
    for now in moments_:
        counter.add(span.at(now), 1, now)
        counts.append(counter.live(span.at(now), now))

    assert [*range(1, 26), 1] == counts


def test_leap_year() -> None:
    """February of a leap year has its day more."""
    bounds = calendar("month", "UTC", at("2028-01-31T23:59:59+00:00", ""))

    assert [30, 31, 31, 29, 31] == [(b - a) // 86_400_000 for a, b in pairwise(bounds)]


@given(moments, st.integers(0, 3 * 86_400_000), whole_hours, st.sampled_from(get_args(Period)))
@settings(max_examples=200)
def test_late_confirmation(reserved: int, later: int, zone: str, period_: Any) -> None:
    """A window made earlier says the same of a later moment as one that is made then."""
    then = reserved + later
    old, new = (
        Span("calendar", period=period_, time_zone=zone).at(each) for each in (reserved, then)
    )

    assert period(new, then) == period(old, then)


def test_bounds_are_made_once_a_minute() -> None:
    """Requests of one minute share the bounds; they are not made for each."""
    span = Span("calendar", time_zone="Europe/Berlin")

    assert span.at(1_800_000_000_000).bounds is span.at(1_800_000_059_999).bounds


# --- As text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.code)
def test_round_trip(span: Span) -> None:
    """A window is read from its key as it was written."""
    key = counter_key(span, "/vast/preroll", "advertiser acme")

    assert span == Span.parse(span.code)
    assert span == span_of(key)
    assert (span, "/vast/preroll", "advertiser acme") == told(key)


@given(st.text(max_size=80), st.sampled_from(["", "advertiser", "ad"]), st.text(max_size=20))
@example("a|b", "advertiser", "/x|y")
@example("x" * (LONGEST_SUBJECT + 1), "creative", "cap")
@example("\udc80", "ad", "cap")
@settings(max_examples=300)
def test_keys(whose: str, by: str, scope: str) -> None:
    """Whatever an ad says of itself, its key is short, printable, and can be taken apart."""
    span = Span("rolling", 60_000)
    key = counter_key(span, f"/r{scope}", f"{by} {whose}" if by else "")
    found, of, subject = told(key)

    assert (span, f"/r{scope}") == (found, of)
    assert by == subject.partition(" ")[0]
    assert len(subject) <= len("advertiser ") + LONGEST_SUBJECT
    assert subject.isascii()
    assert subject.isprintable()


def test_long_subjects_stay_apart() -> None:
    """Of subjects that are too long, or odd, a hash is kept: each its own, and always the same."""
    span = Span()
    odd = ["x" * 41, "x" * 42, "é", "a|b", "\n", "a b" * 20]
    keys = [counter_key(span, "cap", f"ad {each}") for each in odd]

    assert len(odd) == len(set(keys))
    assert keys == [counter_key(span, "cap", f"ad {each}") for each in odd]
    assert all(each.startswith("l|cap|ad #") for each in keys)
    assert "l|cap|ad a b" == counter_key(span, "cap", "ad a b")
    assert counter_key(span, "cap", "x" * 41).startswith("l|cap|#")


def test_windows() -> None:
    """Each kind of window is what the backends know by that name."""
    now = 1_800_000_000_000

    assert Window("rolling", 5) == Span("rolling", 5).at(now)
    assert Window("fixed", 5) == Span("fixed", 5).at(now)
    assert Window() == Span().at(now)
    assert Claim("r5|x|", 3, window=Window("rolling", 5)) == claim_of("r5|x|", 3, now)
    assert Claim(MONEY_KEY, 3) == claim_of(MONEY_KEY, 3, now)


NO_WINDOWS = [
    "",
    "x",
    "r",
    "r-1",
    "r1 ",
    "r\u0661",
    "f1e3",
    "cday",
    "cyear UTC",
    "cday ",
    "l ",
    "cday ..",
    "L",
    "r9999999999999999",
]


@pytest.mark.parametrize("code", NO_WINDOWS)
def test_no_window(code: str) -> None:
    """What is no window is an error of the state, and not a window of another kind."""
    with pytest.raises(StateBackendError, match="is no window"):
        Span.parse(code)
    with pytest.raises(StateBackendError):
        span_of(f"{code}|cap|")


@pytest.mark.parametrize("zone", ["Nowhere", "America", "/etc/passwd", "+", "a//b", "Europe/"])
def test_no_time_zone(zone: str) -> None:
    """What is no time zone is told, also where a key came with it."""
    with pytest.raises(StateBackendError, match="is no time zone"):
        claim_of(f"cday {zone}|cap|", 1, 1_800_000_000_000)


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (Span("rolling", 3_600_000), "within 3600 s"),
        (Span("fixed", 1_500), "in 1.5 s from the first"),
        (Span("calendar", period="week", time_zone="Europe/Berlin"), "in a week (Europe/Berlin)"),
        (Span(), "ever"),
    ],
)
def test_in_words(span: Span, text: str) -> None:
    """A window is told as an operator says it."""
    assert text == str(span)


def test_utc_is_utc() -> None:
    """The days of UTC are those of the Unix clock."""
    now = int(datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp() * 1000)

    assert {0} == {each % 86_400_000 for each in calendar("day", "UTC", now)}
