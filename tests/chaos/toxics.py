"""
Toxics: what a chaos proxy does to the bytes that pass it.

Rule 1: a toxic is a value. A :class:`Lane` is one toxic at work on one direction of one connection.
Rule 2: lanes decide and never wait: bytes go in, steps come out, in the words of hostile scripts.
Rule 3: all that is random comes from a generator that a lane is given, so that a seed tells all.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

from tests.support.hostile import End, Step
from vastproxy.config.units import SECONDS, parse_duration, parse_size

Toward = Literal["server", "client"]
"""A direction, by who is to get the bytes."""

Sides = Literal["both", "server", "client"]

ARRIVES = 0.02
"""Seconds before a reset: a RST overtakes what the receiver has not read."""

FINEST = 20
"""Pieces a second that a bandwidth is cut into."""


def _setting(default: object, kind: str, about: str) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "about": about})


@dataclass(frozen=True, slots=True)
class Toxic:
    """
    One way of harming what passes; its settings work together. The default harms nothing.

    Durations are in seconds. Where bytes are counted, it is those of one direction of one
    connection, from when the toxic was put there.
    """

    latency: float = _setting(0.0, "duration", "all is passed on so much later")
    jitter: float = _setting(0.0, "duration", "up to so much earlier or later than that")
    bandwidth: int = _setting(0, "size", "bytes a second, at the most")
    slice: int = _setting(0, "size", "pieces of so many bytes, on average")
    pause: float = _setting(0.01, "duration", "between two slices")
    drip: float = _setting(0.0, "duration", "single bytes, one in so much time")
    garbage: int = _setting(0, "size", "so many random bytes ahead of what is passed on")
    chance: float = _setting(1.0, "share", "of the reads that get garbage")
    silent_after: int | None = _setting(None, "size", "then nothing comes, and nothing ends")
    reset_after: int | None = _setting(None, "size", "then the connection is reset")
    close_after: int | None = _setting(None, "size", "then the connection is closed in order")
    half_close_after: int | None = _setting(None, "size", "then this direction ends, in order")
    slow_close: float = _setting(0.0, "duration", "an end is passed on so much later")
    cut: bool = _setting(
        default=False, kind="flag", about="nothing passes, and all does when the cut is mended"
    )
    drop_replies: int = _setting(0, "number", "replies that get lost: resets in their places")
    toward: Sides = _setting("both", "side", "the direction that is harmed")  # noqa: RUF009 - a field
    share: float = _setting(1.0, "share", "of the connections that are harmed")

    def concerns(self, toward: Toward) -> bool:
        """Whether bytes that go *toward* one side are harmed."""
        return self.toward in ("both", toward)

    def __str__(self) -> str:
        changed = (each for each in dataclasses.fields(self) if each.default != self._value(each))
        return ",".join(f"{each.name}={_shown(self._value(each), each)}" for each in changed)

    def _value(self, setting: "dataclasses.Field[Any]") -> Any:
        return getattr(self, setting.name)


SETTINGS: Mapping[str, "dataclasses.Field[Any]"] = {
    each.name: each for each in dataclasses.fields(Toxic)
}
"""What a toxic is written with, by name."""


def _shown(value: object, setting: "dataclasses.Field[Any]") -> str:
    if setting.metadata["kind"] == "duration":
        return f"{value:g}s"
    return f"{value}B" if setting.metadata["kind"] == "size" else str(value).lower()


def _duration(text: str) -> float:
    return 0.0 if text in {"0", *(f"0{unit}" for unit in SECONDS)} else parse_duration(text)


def _size(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else parse_size(text.removesuffix("/s"))


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no number (write one such as 1)")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} is no share (write 25% or 0.25)")
    return share


def _side(text: str) -> str:
    if text not in get_args(Sides):
        raise ValueError(f"{text!r} is no side (write {', '.join(get_args(Sides))})")
    return text


def _flag(text: str) -> bool:
    if text not in ("", "true", "false"):
        raise ValueError(f"{text!r} is neither true nor false (write the name alone)")
    return text != "false"


READERS: Mapping[str, Callable[[str], object]] = {
    "duration": _duration,
    "size": _size,
    "number": _number,
    "share": _share,
    "side": _side,
    "flag": _flag,
}


def parse_toxic(text: str) -> Toxic:
    """Read a toxic such as ``latency=200ms,jitter=50ms,toward=client``; else raise ValueError."""
    pairs = [each.partition("=") for each in text.split(",")]
    settings: dict[str, Any] = {}
    for name, _, value in pairs:
        setting = SETTINGS.get(name.strip())
        if setting is None:
            raise ValueError(f"{name.strip()!r} is no toxic (there are: {', '.join(SETTINGS)})")
        try:
            settings[setting.name] = READERS[setting.metadata["kind"]](value.strip())
        except ValueError as error:
            raise ValueError(f"{setting.name}: {error}") from None
    return Toxic(**settings)


class Lane:
    """One *toxic* at work on one direction of one connection; draws from *random*."""

    def __init__(self, toxic: Toxic, random: Random) -> None:
        self.toxic = toxic
        self._random = random
        self._passed = 0

    def steps(self, data: bytes, waited: float) -> Iterator[Step]:
        """Say what is done with *data*, which was read *waited* seconds ago."""
        toxic = self.toxic
        delay = toxic.latency + toxic.jitter * self._random.uniform(-1, 1) - waited
        if delay > 0:
            yield delay
        if toxic.garbage and self._random.random() < toxic.chance:
            yield self._random.randbytes(toxic.garbage)
        allowed, end = self._bound()
        part = data if allowed is None else data[: allowed - self._passed]
        self._passed += len(part)
        yield from self._pieces(part)
        if end is not None and self._passed == allowed:
            yield from (ARRIVES, end) if end is End.RESET else (end,)

    def _bound(self) -> tuple[int | None, End | None]:
        """Give how many bytes may pass, and what comes then."""
        toxic = self.toxic
        bounds = (
            (toxic.reset_after, End.RESET),
            (toxic.close_after, End.CLOSE),
            (toxic.half_close_after, End.HALF_CLOSE),
            (toxic.silent_after, End.HANG),
        )
        given = [(after, end) for after, end in bounds if after is not None]
        return min(given, key=lambda each: each[0]) if given else (None, None)

    def _pieces(self, data: bytes) -> Iterator[Step]:
        toxic, at = self.toxic, 0
        while at < len(data):
            piece = data[at : at + self._size(len(data))]
            at += len(piece)
            yield piece
            pause = len(piece) / toxic.bandwidth if toxic.bandwidth else 0.0
            pause += toxic.drip or (toxic.pause if toxic.slice and at < len(data) else 0.0)
            if pause:
                yield pause

    def _size(self, whole: int) -> int:
        """Give the bytes of the next piece, of *whole* if nothing makes pieces."""
        toxic = self.toxic
        if toxic.drip:
            return 1
        size = self._random.randint(1, 2 * toxic.slice - 1) if toxic.slice else whole
        return min(size, max(1, toxic.bandwidth // FINEST)) if toxic.bandwidth else size

    def __repr__(self) -> str:
        return f"<Lane {self.toxic}, {self._passed} bytes passed>"


def through(lanes: Sequence[Lane], data: bytes, waited: float) -> Iterator[Step]:
    """Say what is done with *data* that passes all *lanes*; an End is the last step."""
    steps: Iterable[Step] = (data,)
    for lane in lanes:
        steps = _applied(lane, steps, waited)
    for step in steps:
        yield step
        if isinstance(step, End):
            return


def _applied(lane: Lane, steps: Iterable[Step], waited: float) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, bytes):
            yield from lane.steps(step, waited)
        else:
            yield step
