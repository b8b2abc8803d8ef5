"""``python -m benchmarks``: measure, print the table; what ``make bench`` runs."""

import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType
from typing import NoReturn

import click

from benchmarks.documents import SMALLEST
from benchmarks.processes import cores
from benchmarks.profiling import profile
from benchmarks.programs import Floor, programs
from benchmarks.runner import Settings, StartError, measure
from benchmarks.table import Row, render

_WARM = 4.0
"""Seconds of each program before the first round: Node's compiler is still at work after two."""
_LONGEST_SLOT = 250
"""
Milliseconds of a turn. With four programs one can wait six turns for its own, and a wait
beyond the deadline of two seconds would be counted as the upstream's.
"""


def _sizes(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(each) for each in value.split(","))
    except ValueError:
        raise click.BadParameter("write kilobytes and commas, such as 2,6,15") from None
    if min(sizes) < SMALLEST:
        raise click.BadParameter(f"a document has {SMALLEST} KB at least")
    return sizes


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--seconds",
    default=3.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="Running time of each program in a round.",
)
@click.option(
    "--sizes",
    default="2,6,15",
    show_default=True,
    callback=_sizes,
    help="Kilobytes of each document.",
)
@click.option(
    "--slot-ms",
    default=120,
    show_default=True,
    type=click.IntRange(10, _LONGEST_SLOT),
    help="One turn of a program.",
)
@click.option(
    "--connections",
    default=16,
    show_default=True,
    type=click.IntRange(1),
    help="Of the players, to each program.",
)
@click.option("--quick", is_flag=True, help="Two short rounds at 6 KB: to see that it works.")
@click.option(
    "--profile", "profiled", is_flag=True, help="Profile vastproxy instead, at the middle size."
)
def main(  # noqa: PLR0913 - one argument for each option
    *,
    rounds: int,
    seconds: float,
    sizes: tuple[int, ...],
    slot_ms: int,
    connections: int,
    quick: bool,
    profiled: bool,
) -> None:
    """Measure the CPU that one ad request costs: vastproxy, a floor and a peer."""
    settings = Settings(sizes, rounds, seconds, slot_ms / 1000, connections, warm=_WARM)
    if quick:
        settings = Settings((6,), 2, 0.6, slot_ms / 1000, connections, warm=0.6)
    # Ended from outside, everything that was started is ended too.
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    if profiled:
        _profile(settings)
    else:
        _measure(settings)


def _measure(settings: Settings) -> None:
    print(describe(settings), end="\n\n", flush=True)
    rows = [row for size in settings.sizes for row in measure(size, programs(), settings)]
    sys.stderr.write("\n")
    print(render(rows, Floor().name), end="\n")
    print(busy(rows))
    sys.exit(int(failed(rows)))


def _profile(settings: Settings) -> None:
    try:
        profile(settings.sizes[len(settings.sizes) // 2], settings)
    except StartError as error:
        raise click.ClickException(f"vastproxy {error}") from error


def describe(settings: Settings) -> str:
    """Say on what, and how, is measured."""
    pinned = "programs on one core, the rest on another" if cores()[0] is not None else "one core"
    turns = f"{settings.rounds} rounds of {settings.seconds:g} s for each program"
    return (
        f"Python {platform.python_version()}, aiohttp {version('aiohttp')}, "
        f"lxml {version('lxml')}, Node {_node()}; {pinned}; {turns} in turns of "
        f"{settings.slot * 1000:.0f} ms, {settings.connections} connections each."
    )


def busy(rows: Sequence[Row]) -> str:
    """Say how much of their turns the programs worked: a low figure tells of an idle wait."""
    shares = [each.busy for row in rows for each in row.samples]
    if not shares:
        return "Nothing was measured."
    return f"On the processor for {min(shares):.0%} to {max(shares):.0%} of their turns."


def failed(rows: Sequence[Row]) -> bool:
    """Say whether a program that a run cannot do without is broken."""
    needed = {program.name for program in programs() if program.required}
    return any(row.broken and row.program in needed for row in rows)


def _node() -> str:
    if shutil.which("node") is None:
        return "none"
    done = subprocess.run(["node", "--version"], check=False, text=True, capture_output=True)
    return done.stdout.strip().removeprefix("v") or "none"


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
