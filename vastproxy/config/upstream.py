"""
The settings of what stands around the calls of an upstream: breaker, rate, retry, cache.

Rule 1: what is off is checked like what is on.
Rule 2: a word or a null that is no section is answered with how to write what was meant.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vastproxy.config.units import parse_duration, parse_rate, shown
from vastproxy.config.values import (
    Duration,
    DurationOrOff,
    Place,
    Rate,
    Settings,
    Share,
    Size,
    holding,
    lasting,
    off_or_lasting,
    reading,
    setting,
)

LONGEST_RESET: Final = "5m"
"""How long a breaker stays open at the most, where nobody says it."""
BURST_SECONDS: Final = 0.1
"""Seconds of calls that may go out at one moment, where nobody says how many."""
MAX_BURST: Final = 1_000_000
"""Calls: a second of the highest rate."""
MAX_ATTEMPTS: Final = 5
"""Times that a call goes out again. Who refuses five connections refuses the sixth."""

_ON: Final = frozenset({"on", "true", "yes"})
_OFF: Final = frozenset({"off", "false", "no", "none", "null"})


def _check_switch(value: object, *, on: str, off: str) -> None:
    """Raise ValueError if *value* switches something, which is written as *on* or *off*."""
    # YAML reads some of these words as true and false.
    word = str(value).lower()
    if word in _ON | _OFF:
        named = "null" if value is None else shown(value)
        raise ValueError(f"{named} does not switch it (write {on if word in _ON else off})")


def _parameter(name: str) -> str:
    if re.fullmatch(r"[^\s=&?#]+", name):
        return name
    raise ValueError(f"{shown(name)} is no name of a query parameter (write one such as cb)")


class HopBreaker(Settings):
    """When an ad server that fails is left alone, and for how long."""

    mode: Literal["enforce", "shadow", "off"] = setting(
        "enforce", "enforce: who fails is not asked; shadow: only counted and told; off: nothing."
    )
    fail_max: Annotated[int, Field(ge=1, le=10_000)] = setting(
        5, "How many failures in a row open the breaker; 1 to 10000."
    )
    failure_rate: Share = setting(
        "50%", "Which share of failures within `window` opens it, from `min_calls` calls on."
    )
    min_calls: Annotated[int, Field(ge=1, le=100_000)] = setting(
        20, "How many calls within `window` are enough to judge by their share; 1 to 100000."
    )
    window: Annotated[Duration, lasting("1s", "10m")] = setting(
        "10s", "How far back calls count for the shares; 1s to 10m."
    )
    slow_call: Annotated[Duration, lasting("1ms", "1m")] | None = setting(
        None, "From when on a call counts as slow; 1ms to 1m; null: none is."
    )
    slow_call_rate: Share = setting(
        "50%", "Which share of slow calls within `window` opens it, from `min_calls` calls on."
    )
    reset_timeout: Annotated[Duration, lasting("100ms", "1h")] = setting(
        "60s", "How long it stays open before one call probes the ad server; 100ms to 1h."
    )
    max_reset_timeout: Annotated[Duration, lasting("100ms", "24h")] = setting(
        LONGEST_RESET,
        "What that time grows to while probes fail; 100ms to 24h; where it is left out, never "
        "less than `reset_timeout`.",
    )
    success_threshold: Annotated[int, Field(ge=1, le=100)] = setting(
        2, "How many good probes in a row close it; 1 to 100."
    )

    @model_validator(mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:  # noqa: ANN401 - whatever was written
        _check_switch(value, on="{mode: enforce}", off="{mode: off}")
        return _with_longest_reset(value) if isinstance(value, Mapping) else value

    @field_validator("max_reset_timeout")
    @classmethod
    def _grows(cls, value: float, info: ValidationInfo) -> float:
        first: float = info.data.get("reset_timeout", value)
        if value < first:
            raise ValueError(
                f"{value:g}s is shorter than reset_timeout, {first:g}s (write {first:g}s or more, "
                "or remove this line)"
            )
        return value


class CircuitBreaker(HopBreaker):
    """The breaker of one upstream, which instances may share."""

    share: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether instances tell each other over Redis that it opened or closed.",
    )
    quorum: Annotated[int, Field(ge=1, le=1000)] = setting(
        1, "How many instances must find the ad server bad before all leave it alone; 1 to 1000."
    )


class RateLimit(Settings):
    """How often an upstream is asked."""

    rate: Rate = Field(description="How many calls go out: 100/s, 6000/m or 360000/h.")
    burst: Annotated[int, Field(ge=1, le=MAX_BURST)] | None = setting(
        None,
        "How many calls may go out at one moment; null: what the rate gives in a tenth of a "
        "second, at least 1.",
    )
    share: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether the rate is for all instances together, which count in Redis.",
    )

    @property
    def at_once(self) -> int:
        """Give how many calls may go out at one moment, whether or not the operator says it."""
        return self.burst or max(1, int(self.rate * BURST_SECONDS))


class Retry(Settings):
    """What happens with a call of which nothing was sent."""

    attempts: Annotated[int, Field(ge=0, le=MAX_ATTEMPTS)] = setting(
        1, "How often a call goes out again where no connection could be made; 0 to 5."
    )
    budget: Share = setting("10%", "How many of all calls may be such repetitions.")

    @model_validator(mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:  # noqa: ANN401 - whatever was written
        _check_switch(value, on="{attempts: 1}", off="{attempts: 0}")
        return value


class Cache(Settings):
    """What an upstream's endpoint answered, kept for the next request."""

    ttl: Annotated[Duration, lasting("1s", "7d")] = setting(
        "300s", "How long an answer is fresh, unless it says less itself; 1s to 7d."
    )
    scope: Literal["viewer", "shared"] = setting(
        "viewer", "viewer: kept for each viewer by itself; shared: the same for everybody."
    )
    paid: bool | None = setting(
        None,
        "Whether it sells each impression once, so that no ad is given to a second viewer; null: "
        "it does if a budget covers it.",
    )
    vary: tuple[Place, ...] = setting(
        [], "What of the request answers depend on: query:NAME, header:NAME, cookie:NAME."
    )
    ignore: tuple[Annotated[str, AfterValidator(_parameter)], ...] = setting(
        ["cb", "cachebuster", "cachebusting", "correlator", "ord", "random", "rnd", "timestamp"],
        "Query parameters of the endpoint's URL that answers do not depend on.",
    )
    no_fill_ttl: Annotated[DurationOrOff, off_or_lasting("100ms", "1h")] = setting(
        "5s", "How long it is kept that there is no ad; 100ms to 1h; off: not at all."
    )
    stale_while_revalidate: Annotated[DurationOrOff, off_or_lasting("100ms", "1h")] = setting(
        "10s", "How long an old answer is given while a new one is fetched; 100ms to 1h, or off."
    )
    stale_if_error: Annotated[DurationOrOff, off_or_lasting("100ms", "7d")] = setting(
        "5m", "How long an old answer is given while the ad server fails; 100ms to 7d, or off."
    )
    max_size: Annotated[Size, holding("64KiB", "4GiB")] = setting(
        "64MiB", "How much memory the answers may take in each process; 64KiB to 4GiB."
    )
    redis: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether answers are kept in Redis, too, for all instances.",
    )


def _rate_limit(value: object) -> object:
    """Take a rate alone for a section that has nothing else; a null stays one."""
    if value is not None:
        _check_switch(value, on="a rate such as 100/s", off="null")
    return {"rate": parse_rate(value)} if isinstance(value, str) else value


def _cache(value: object) -> object:
    """Say how a cache is switched, where that is tried with a word."""
    if value is not None:
        _check_switch(value, on="{}, which has its defaults", off="null")
    return value


def _with_longest_reset(section: Mapping[str, object]) -> Mapping[str, object]:
    """Let the longest time that a breaker is open follow the first, where only that is written."""
    first = section.get("reset_timeout")
    if "max_reset_timeout" in section or first is None:
        return section
    # What is no duration is told where it stands.
    with suppress(ValueError):
        if reading(parse_duration, float)(first) > parse_duration(LONGEST_RESET):
            return {**section, "max_reset_timeout": first}
    return section


MaybeRateLimit = Annotated[
    RateLimit | None,
    BeforeValidator(_rate_limit, json_schema_input_type=Rate | RateLimit | None),
]
MaybeCache = Annotated[Cache | None, BeforeValidator(_cache)]
