"""Where vastproxy's time goes: a profile of it alone, under load."""

import pstats
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import Plan
from benchmarks.processes import cores, free_ports
from benchmarks.programs import PATH, Place, Vastproxy
from benchmarks.rig import playing, serving
from benchmarks.runner import Settings, start

_TOP = 40
"""Functions shown."""


@dataclass(frozen=True, slots=True)
class Profiled(Vastproxy):
    """Vastproxy under ``cProfile``, which writes into *file* when it ends."""

    file: Path = Path("profile")

    def command(self, place: Place) -> list[str]:
        """Give what starts it at *place*, with the profiler around it."""
        plain = Vastproxy.command(self, place)
        return [plain[0], "-m", "cProfile", "-o", str(self.file), *plain[1:]]


def profile(size: int, settings: Settings) -> None:
    """
    Load vastproxy for the settings' seconds, and print the functions that took most time.

    The profiler makes Python's calls dearer and C's not: shares are hints, no figures.
    """
    under_test, rest = cores()
    with tempfile.TemporaryDirectory(prefix="vastproxy-bench-") as name:
        folder = Path(name)
        program = Profiled(file=folder / "profile")
        with ExitStack() as stack:
            upstream = stack.enter_context(serving(size, [program.tag], rest))
            place = Place(free_ports(1)[0], upstream.hops(program.tag), folder)
            runner = start(stack, program, place, under_test)
            plan = Plan(PATH, settings.connections, (runner.target,))
            with playing(plan, rest):
                time.sleep(settings.seconds)
        pstats.Stats(str(program.file), stream=sys.stdout).sort_stats("tottime").print_stats(_TOP)
