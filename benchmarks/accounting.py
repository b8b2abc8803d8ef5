"""
What a program used, and what that makes per ad request.

Rule 1: time is the processor's, as the kernel books it on the program (proc(5), ``utime`` and
``stime`` of ``/proc/<pid>/stat``), never the wall clock's.
Rule 2: ratios are made within a round, of programs that ran in turns of milliseconds; their
median is taken afterwards. Absolute figures of two rounds are not compared.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_MICROS = 1_000_000
_UTIME = 11
"""Place in ``/proc/<pid>/stat`` after the command's closing parenthesis; proc(5) field 14."""
_STIME = 12
_RSS = 21


@dataclass(frozen=True, slots=True)
class Clock:
    """The units that the kernel counts in."""

    ticks: int = 100
    """Per second."""
    page: int = 4096
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process used since it started: *cpu* in seconds, *rss* in bytes now."""

    cpu: float = 0.0
    rss: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.cpu + other.cpu, self.rss + other.rss)


@dataclass(frozen=True, slots=True)
class Sample:
    """One program in one round."""

    cpu: float
    """Seconds of processor time."""
    running: float
    """Seconds of wall time in which it was allowed to run."""
    good: int
    """Ad requests answered well."""
    bad: int
    connections: int
    """That it opened to the upstream."""
    rss: int
    """Bytes, at the end of the round."""

    @property
    def micros(self) -> float:
        """Processor microseconds per ad request; infinite where none was answered."""
        return self.cpu * _MICROS / self.good if self.good else float("inf")

    @property
    def rate(self) -> float:
        """Ad requests per second of the time in which it ran."""
        return self.good / self.running if self.running else 0.0

    @property
    def busy(self) -> float:
        """The part of its turns that it was on the processor for, 0 to 1."""
        return self.cpu / self.running if self.running else 0.0

    @property
    def connections_per_request(self) -> float:
        """New upstream connections per ad request."""
        return self.connections / self.good if self.good else float("inf")


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several figures, and how far they lie apart."""

    middle: float
    least: float
    most: float


def spread(figures: Sequence[float]) -> Spread:
    """Give median, minimum and maximum of *figures*."""
    return Spread(median(figures), min(figures), max(figures))


def paired_ratios(samples: Sequence[Sample], floor: Sequence[Sample]) -> Spread:
    """Give the spread of the ratios between *samples* and the *floor* of the same rounds."""
    pairs = zip(samples, floor, strict=True)
    return spread([mine.micros / base.micros for mine, base in pairs])


def parse_stat(line: str, clock: Clock) -> Usage:
    """
    Read one *line* of ``/proc/<pid>/stat`` (proc(5)).

    The command's name may itself hold blanks and parentheses; the last one closes it.
    """
    fields = line.rpartition(")")[2].split()
    cpu = int(fields[_UTIME]) + int(fields[_STIME])
    return Usage(cpu / clock.ticks, int(fields[_RSS]) * clock.page)


def usage(pid: int) -> Usage:
    """Give what *pid* and its descendants used; a process that ended counts nothing."""
    clock = Clock(os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE"))
    total = Usage()
    for each in family(pid):
        try:
            total += parse_stat(Path(f"/proc/{each}/stat").read_text(), clock)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def family(pid: int) -> Iterator[int]:
    """Give *pid* and its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            known = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in known:
            yield from family(int(child))
