"""
The settings of what is counted: how often an ad is shown, and what it costs.

Rule 1: what is off is checked like what is on.
Rule 2: a setting that would mean nothing where it stands is refused.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, cast, get_args
from zoneinfo import ZoneInfo

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from vastproxy.config.units import DURATION_PATTERN, parse_duration, shown
from vastproxy.config.values import (
    Money,
    Names,
    ReservationTtl,
    Settings,
    check_duration,
    reading,
    setting,
)

Kind = Literal["rolling", "fixed", "calendar", "lifetime", "pod"]
Period = Literal["hour", "day", "week", "month"]
Subject = Literal["viewer", "campaign", "advertiser", "creative", "ad"]
CountAt = Literal["impression", "decision"]
Mode = Literal["enforce", "shadow", "off"]

MAX_LIMIT: Final = 1_000_000_000
"""Ads. Nobody sees so many; the sum of all reservations stays exact in a double."""
MAX_CAPS: Final = 20
"""Caps of one route: a beacon names their counters, and players take URLs of 2,000 characters."""
LEAST_CPM: Final = Decimal("0.001")
"""Units of a currency: a thousandth of it is a millionth, the smallest amount that is counted."""
NAME_PATTERN = r"^[A-Za-z0-9_.:-]{1,100}$"
CURRENCY_PATTERN = r"^[A-Z]{3}$"
"""As ISO 4217 writes them. The list changes every few years and is not repeated here."""

_PERIODS: Final = get_args(Period)
_SUBJECTS: Final = get_args(Subject)


def _name(text: str) -> str:
    if re.fullmatch(NAME_PATTERN, text):
        return text
    raise ValueError(f"{shown(text)} is no name (write 1 to 100 letters, digits, _ . : and -)")


def _currency(text: str) -> str:
    if re.fullmatch(CURRENCY_PATTERN, text):
        return text
    instead = text.upper() if re.fullmatch(r"[A-Za-z]{3}", text) else "USD"
    raise ValueError(f"{shown(text)} is no currency of ISO 4217 (write {instead})")


def _time_zone(name: str) -> str:
    """Raise ValueError where *name* is in no time zone database, or is another one elsewhere."""
    if re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", name) and not re.match(
        r"localtime$|posix|right/", name
    ):
        try:
            ZoneInfo(name)
        except (KeyError, ValueError, OSError):
            pass
        else:
            return name
    raise ValueError(f"{shown(name)} is no time zone (write UTC, or a name such as Europe/Berlin)")


def _window(value: object) -> float | Period | None:
    if value is None or value in _PERIODS:
        return cast("Period | None", value)
    return reading(parse_duration, float)(value)


def _subject(value: object) -> Subject:
    """Read ``campaign``, ``viewer+campaign`` or ``[viewer, campaign]``: all are of one viewer."""
    parts = value.split("+") if isinstance(value, str) else value
    if isinstance(parts, (list, tuple)) and all(isinstance(each, str) for each in parts):
        words = [each.strip() for each in parts]
        named = [each for each in words if each != "viewer"] or words[:1]
        if len(words) == len(set(words)) and len(named) == 1 and named[0] in _SUBJECTS:
            return cast("Subject", named[0])
    raise ValueError(
        f"{shown(value)} is nothing to count by (write viewer, campaign, advertiser, creative or "
        "ad; the last four mean: for one viewer)"
    )


def _cpm(value: Decimal) -> Decimal:
    if value >= LEAST_CPM:
        return value
    raise ValueError(f"{value:f} for a thousand ads is nothing for one (write 0.001 or more)")


_WINDOW_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string", "enum": list(_PERIODS)},
        {"type": "string", "pattern": DURATION_PATTERN},
        {"type": "null"},
    ]
}
_SUBJECT_WORDS: Final = [*_SUBJECTS, *(f"viewer+{each}" for each in _SUBJECTS[1:])]
_SUBJECT_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string", "enum": _SUBJECT_WORDS},
        {"type": "array", "items": {"type": "string", "enum": list(_SUBJECTS)}},
    ]
}
ItemName = Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": NAME_PATTERN})]
_ABOUT_TTL = "How long a reservation waits for its impression; null: as long as the route says."
_ABOUT_UPSTREAMS = "To which of the route's upstreams it applies, by name; null: to all of them."
_ABOUT_COUNT_AT = "impression: counted when the ad is shown; decision: when it is answered."
_ABOUT_MODE = "enforce: ads are left out; shadow: counted and told, never left out; off: nothing."


class FrequencyCap(Settings):
    """How many ads one viewer is shown in a stretch of time."""

    name: ItemName | None = setting(
        None,
        "What logs call it, and what its counter is kept under: caps of one name on several routes "
        "count together; null: the route's path.",
    )
    limit: Annotated[int, Field(ge=0, le=MAX_LIMIT)] = Field(
        description="How many ads may be shown; 0 means none, ever."
    )
    kind: Kind = setting(
        "rolling",
        "rolling: within the last window; fixed: from the first ad on; calendar: in an hour, day, "
        "week or month; lifetime: ever; pod: in one answer.",
    )
    window: Annotated[
        float | Period | None, PlainValidator(_window), WithJsonSchema(_WINDOW_SCHEMA)
    ] = setting(
        None,
        "How long ads count: a duration of 1s to 400d, or for kind calendar hour, day, week or "
        "month. For lifetime and pod there is none.",
    )
    time_zone: Annotated[str, AfterValidator(_time_zone)] = setting(
        "UTC", "Where the days of kind calendar begin at midnight: a name of the IANA database."
    )
    by: Annotated[Subject, PlainValidator(_subject), WithJsonSchema(_SUBJECT_SCHEMA)] = setting(
        "viewer",
        "Which ads are counted together: all of the viewer, or those of one campaign, advertiser "
        "or creative, or one ad, each for one viewer.",
    )
    count_at: CountAt = setting("impression", _ABOUT_COUNT_AT)
    when_unknown: Literal["serve", "skip"] = setting(
        "serve",
        "Where the request names no viewer, or the ad not what is counted by: serve or skip it.",
    )
    mode: Mode = setting("enforce", _ABOUT_MODE)
    reservation_ttl: ReservationTtl | None = setting(None, _ABOUT_TTL)
    upstreams: Names | None = setting(None, _ABOUT_UPSTREAMS)

    @field_validator("window")
    @classmethod
    def _window_fits(cls, value: float | str | None, info: ValidationInfo) -> float | str | None:
        kind: Kind | None = info.data.get("kind")
        return value if kind is None else _fitting_window(kind, value)

    @field_validator("time_zone")
    @classmethod
    def _zone_where_it_counts(cls, value: str, info: ValidationInfo) -> str:
        kind: Kind = info.data.get("kind", "calendar")
        if value == "UTC" or kind == "calendar":
            return value
        raise ValueError(
            f"a time zone means nothing for kind {kind} (write kind: calendar, or remove this line)"
        )

    @property
    def window_ms(self) -> int:
        """Give the length of the window in milliseconds; 0 where it has none of its own."""
        return round(self.window * 1000) if isinstance(self.window, float) else 0

    @property
    def period(self) -> Period | None:
        """Give the stretch of the calendar that is the window; None for the other kinds."""
        return None if isinstance(self.window, float) else self.window


def _fitting_window(kind: Kind, value: float | str | None) -> float | str | None:
    """Give the window *value* back if a cap of this *kind* can have it; else raise ValueError."""
    if kind in {"lifetime", "pod"}:
        if value is None:
            return None
        raise ValueError(f"kind {kind} has no window (remove this line, or write kind: rolling)")
    if kind == "calendar":
        if value in _PERIODS:
            return value
        raise ValueError(
            "kind calendar needs a stretch of the calendar (write hour, day, week or month)"
        )
    if value is None:
        raise ValueError(f"kind {kind} needs a window (write window: 1h)")
    if isinstance(value, float):
        return check_duration(value, "1s", "400d")
    raise ValueError(
        f"'{value}' is a stretch of the calendar (write kind: calendar, or a duration: 24h)"
    )


class Budget(Settings):
    """How much money a campaign may spend, and what an ad of it costs."""

    campaign: ItemName = Field(
        description="The name of the account; routes with one name share what there is to spend."
    )
    limit: Money = Field(
        description="The most that may be spent, in units of the currency, up to 6 decimals."
    )
    currency: Annotated[
        str, AfterValidator(_currency), Field(json_schema_extra={"pattern": CURRENCY_PATTERN})
    ] = setting("USD", "The currency of all amounts: three letters of ISO 4217.")
    cpm: Annotated[Money, AfterValidator(_cpm)] | None = setting(
        None, "What a thousand ads cost that name no price of their own in <Pricing>."
    )
    amount: Money | None = setting(
        None, "What one ad costs that names no price of its own; instead of `cpm`."
    )
    on_state_loss: Literal["serve", "lease", "deny"] = setting(
        "serve",
        "While the state cannot be reached. serve: ads are shown and booked later; lease: only "
        "from what was reserved beforehand; deny: no ads.",
    )
    count_at: CountAt = setting("impression", _ABOUT_COUNT_AT)
    mode: Mode = setting("enforce", _ABOUT_MODE)
    reservation_ttl: ReservationTtl | None = setting(None, _ABOUT_TTL)
    upstreams: Names | None = setting(None, _ABOUT_UPSTREAMS)

    @field_validator("amount")
    @classmethod
    def _one_price(cls, value: Decimal | None, info: ValidationInfo) -> Decimal | None:
        if value is not None and info.data.get("cpm") is not None:
            raise ValueError("`cpm` says already what an ad costs (keep one of the two)")
        return value


def check_cap(cap: FrequencyCap, *, mode: str, has_viewer: bool) -> None:
    """Raise ValueError if a route of this *mode* cannot keep *cap*."""
    if mode == "passthrough" and (cap.by != "viewer" or cap.kind == "pod"):
        what = "kind pod" if cap.kind == "pod" else f"by: {cap.by}"
        raise ValueError(
            f"{what} needs to know the ads, and mode passthrough does not look at them "
            "(write by: viewer with another kind, or mode: resolve)"
        )
    if cap.kind != "pod" and not has_viewer:
        raise ValueError(
            "it counts for each viewer, and the route does not say where a request names one "
            '(add viewer: ["query:uid"] to the route)'
        )


def check_each_once(caps: Sequence[FrequencyCap], upstreams: Iterable[str]) -> None:
    """Raise ValueError if a route has too many *caps*, or two of one name or one meaning."""
    if len(caps) > MAX_CAPS:
        raise ValueError(
            f"{len(caps)} caps are more than fit into an address (write {MAX_CAPS} or fewer)"
        )
    everywhere = frozenset(upstreams)
    names: dict[str, int] = {}
    meanings: dict[object, int] = {}
    for index, cap in enumerate(caps):
        where = everywhere if cap.upstreams is None else frozenset(cap.upstreams)
        meaning = (cap.kind, cap.window, cap.by, cap.time_zone, where)
        if (first := meanings.setdefault(meaning, index)) != index:
            raise ValueError(
                f"{index} counts the same as {first} (remove one of them, or write other upstreams)"
            )
        if cap.name and (first := names.setdefault(cap.name, index)) != index:
            raise ValueError(f"{index} has the name of {first}, '{cap.name}' (write another)")
