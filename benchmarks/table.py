"""The table that a run prints, in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.accounting import Sample, Spread, paired_ratios, spread

HEADINGS = (
    "program",
    "document",
    "CPU us/request [min-max]",
    "ratio to the floor [min-max]",
    "requests/s",
    "upstream connections/request",
    "RSS MiB",
    "errors",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One program at one document size; *skipped* says why there are no *samples*."""

    program: str
    size: int
    """Kilobytes of each document."""
    samples: tuple[Sample, ...] = ()
    skipped: str = ""
    broken: bool = False
    """True: it is there, but did not start or did not answer rightly."""


def render(rows: Sequence[Row], floor: str) -> str:
    """Render *rows*; ratios are to the program named *floor*, where it ran at that size."""
    bases = {row.size: row.samples for row in rows if row.program == floor}
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    lines += [_line(_cells(row, bases.get(row.size, ()))) for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row, base: Sequence[Sample]) -> list[str]:
    name = [row.program, f"{row.size} KB"]
    if not row.samples:
        return [*name, row.skipped.replace("|", "\\|"), *[""] * (len(HEADINGS) - len(name) - 1)]
    samples = row.samples
    return [
        *name,
        _spread(spread([each.micros for each in samples]), digits=0),
        _spread(paired_ratios(samples, base), digits=2) if base else "-",
        f"{spread([each.rate for each in samples]).middle:.0f}",
        f"{spread([each.connections_per_request for each in samples]).middle:.4f}",
        f"{samples[-1].rss / 2**20:.0f}",
        str(sum(each.bad for each in samples)),
    ]


def _spread(figures: Spread, digits: int) -> str:
    middle, least, most = (
        f"{each:.{digits}f}" for each in (figures.middle, figures.least, figures.most)
    )
    return f"{middle} [{least}-{most}]"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
