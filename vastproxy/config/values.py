"""
The types of settings: how each value is read, checked, and described to editors.

Rule 1: what is of the type already is let through, so that a config can be read from its own dump.
Rule 2: a bound is told in the words in which the operator would write it.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    SerializationInfo,
    WithJsonSchema,
)

from vastproxy.config.template import Template
from vastproxy.config.units import (
    DURATION_PATTERN,
    MAX_MONEY,
    MAX_PORT,
    MONEY_PATTERN,
    RATE_PATTERN,
    SHARE_PATTERN,
    SIZE_PATTERN,
    Listen,
    Network,
    Source,
    StateUrl,
    parse_duration,
    parse_money,
    parse_network,
    parse_rate,
    parse_share,
    parse_size,
    shown,
)

T = TypeVar("T")

SHORTEST_KEY: Final = 8
"""Characters of a secret. Fewer are tried out within the hour; 32 random ones never are."""


class Settings(BaseModel):
    """A section of config.yaml: frozen, and strict about what it is given."""

    # A value may be a secret: pydantic's own messages leave all of them out.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def setting(default: object, about: str) -> Any:  # noqa: ANN401 - validated, whatever it is
    """Declare a setting with its *default* as it would be written, and what it is *about*."""
    return Field(default, description=about, validate_default=True)


def reading(parse: Callable[[str], T], kind: type | UnionType) -> Callable[[object], T]:
    """Make a validator that *parse*s text and lets through what is of *kind* already."""

    def read(value: object) -> T:
        if isinstance(value, kind):
            return cast("T", value)
        if isinstance(value, str):
            return parse(value)
        if value is None:
            raise ValueError("nothing is written here (write a value, or remove this line)")
        raise ValueError(f"{shown(value)} is no text (put text with braces or brackets in quotes)")

    return read


def text_schema(pattern: str | None = None) -> WithJsonSchema:
    """Describe a text to editors."""
    return WithJsonSchema({"type": "string"} | ({"pattern": pattern} if pattern else {}))


def check_duration(seconds: float, least: str, most: str) -> float:
    """Give *seconds* back if they are from *least* to *most*; else raise ValueError."""
    if seconds < parse_duration(least):
        raise ValueError(f"{seconds:g}s is too short (write {least} or more)")
    if seconds > parse_duration(most):
        raise ValueError(f"{seconds:g}s is too long (write {most} or less)")
    return seconds


def lasting(least: str, most: str) -> AfterValidator:
    """Make a validator for durations from *least* to *most*."""
    return AfterValidator(lambda seconds: check_duration(seconds, least, most))


def off_or_lasting(least: str, most: str) -> AfterValidator:
    """Make a validator for what is off, or lasts from *least* to *most*."""
    return AfterValidator(lambda seconds: seconds and check_duration(seconds, least, most))


def holding(least: str, most: str) -> AfterValidator:
    """Make a validator for sizes from *least* to *most*."""

    def check(size: int) -> int:
        if size < parse_size(least):
            raise ValueError(f"{size} bytes are too few (write {least} or more)")
        if size > parse_size(most):
            raise ValueError(f"{size} bytes are too many (write {most} or less)")
        return size

    return AfterValidator(check)


def some(values: T) -> T:
    """Raise ValueError where nothing is in *values*."""
    if values:
        return values
    raise ValueError("it is empty (write at least one)")


def listed(value: object) -> object:
    """Take one value for a list of one."""
    return (value,) if isinstance(value, (str, Listen)) else value


def listed_or_none(value: object) -> object:
    """Take one value for a list of one, and null for an empty list."""
    return () if value is None else listed(value)


def _present(text: str) -> str:
    if text.strip():
        return text
    raise ValueError("the text is empty (write a name, or remove this line)")


def _directory(text: str) -> Path:
    if text.strip() and text.isprintable():
        return Path(text)
    raise ValueError(f"{shown(text)} is no directory (write /var/lib/vastproxy or null)")


def _strong(secret: str) -> str:
    if len(secret) < SHORTEST_KEY:
        raise ValueError(
            f"a secret of {len(secret)} characters can be guessed (write {SHORTEST_KEY} or more, "
            "best 32 random ones)"
        )
    # Also what is shown in place of a secret: a dump that is read again has no secret.
    if len(set(secret)) == 1:
        raise ValueError("a secret of one character repeated can be guessed (write a random one)")
    return secret


def _secrets(value: object) -> tuple[SecretStr, ...]:
    """Read one secret or a list of them; no message repeats any."""
    given = value if isinstance(value, (list, tuple)) else (value,)
    read: list[SecretStr] = []
    for each in given:
        text = each.get_secret_value() if isinstance(each, SecretStr) else each
        if not isinstance(text, str):
            raise ValueError("it is neither a text nor a list of texts (write a text in quotes)")  # noqa: TRY004 - pydantic wants it
        read.append(SecretStr(_strong(text)))
    if len({each.get_secret_value() for each in read}) < len(read):
        raise ValueError("a secret is there twice (keep one)")
    return tuple(read)


def _money(value: object) -> Decimal:
    """Read an amount; of a float, the decimal that it is written as counts."""
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        value = f"{value:f}" if isinstance(value, Decimal) else str(value)
    return reading(parse_money, Decimal)(value)


def _share(value: object) -> float:
    """Read a part of one; a number that is none is told like the text of it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if 0 < value <= 1 else parse_share(f"{value:g}")
    return reading(parse_share, float)(value)


def _duration_or_off(text: str) -> float:
    if text == "off":
        return 0.0
    if re.fullmatch(r"0+(\.0+)?[a-z]*", text):
        raise ValueError(f"{shown(text)} is no time at all (write off, or a time such as 5s)")
    return parse_duration(text)


def _state(value: object) -> StateUrl:
    if isinstance(value, StateUrl):
        return value
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not isinstance(text, str):
        raise ValueError("it is no text (write one such as redis://127.0.0.1:6379)")  # noqa: TRY004 - pydantic wants it
    return StateUrl.parse(text)


def _state_written(value: StateUrl | str, info: SerializationInfo) -> str | SecretStr:
    if info.mode_is_json() or isinstance(value, str):
        return str(value)
    return SecretStr(value.url)


def _secrets_written(values: Sequence[object], info: SerializationInfo) -> Sequence[object]:
    return [str(each) for each in values] if info.mode_is_json() else values


_AS_TEXT = PlainSerializer(str)

Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=MAX_PORT)]
Name = Annotated[str, AfterValidator(_present)]
Names = Annotated[
    tuple[Name, ...],
    AfterValidator(some),
    BeforeValidator(listed, json_schema_input_type=str | list[str]),
]
Duration = Annotated[
    float, PlainValidator(reading(parse_duration, float)), text_schema(DURATION_PATTERN)
]
DurationOrOff = Annotated[
    float,
    PlainValidator(reading(_duration_or_off, float)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["off"]},
                {"type": "string", "pattern": DURATION_PATTERN},
            ]
        }
    ),
]
ReservationTtl = Annotated[Duration, lasting("1s", "24h")]
Size = Annotated[int, PlainValidator(reading(parse_size, int)), text_schema(SIZE_PATTERN)]
Share = Annotated[
    float,
    PlainValidator(_share),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": SHARE_PATTERN},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ]
        }
    ),
]
Rate = Annotated[float, PlainValidator(reading(parse_rate, float)), text_schema(RATE_PATTERN)]
Money = Annotated[
    Decimal,
    PlainValidator(_money),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": MONEY_PATTERN},
                {"type": "number", "exclusiveMinimum": 0, "maximum": int(MAX_MONEY)},
            ]
        }
    ),
    PlainSerializer(str, when_used="json"),
]
Text = Annotated[
    Template, PlainValidator(reading(Template.parse, Template)), text_schema(), _AS_TEXT
]
Place = Annotated[Source, PlainValidator(reading(Source.parse, Source)), text_schema(), _AS_TEXT]
Address = Annotated[Listen, PlainValidator(reading(Listen.parse, Listen)), text_schema(), _AS_TEXT]
Addresses = Annotated[
    tuple[Address, ...],
    AfterValidator(some),
    BeforeValidator(listed, json_schema_input_type=str | list[str]),
]
Cidr = Annotated[
    Network,
    PlainValidator(reading(parse_network, Network)),
    text_schema(),
    _AS_TEXT,
]
Directory = Annotated[Path, PlainValidator(reading(_directory, Path)), text_schema(), _AS_TEXT]
# A dump as JSON is for people to see; as Python it is for :class:`Config` to read again.
Secrets = Annotated[
    tuple[SecretStr, ...],
    PlainValidator(_secrets),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
    PlainSerializer(_secrets_written),
]
State = Annotated[
    StateUrl,
    PlainValidator(_state),
    text_schema(
        r"^(memory|rediss?(\+cluster)?|sqlite(\+aiosqlite)?|"
        r"postgres(ql(\+(asyncpg|psycopg))?)?)://"
    ),
    PlainSerializer(_state_written),
]
