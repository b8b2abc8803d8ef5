"""
Schedules: which toxics come when, all drawn from a seed.

Rule 1: the same seed gives the same schedule. Rule 2: every schedule ends without toxics, so that
what was promised for afterwards can be looked at.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from tests.chaos.proxy import ChaosProxy
from tests.chaos.toxics import Toxic, parse_toxic

LONGEST, SHORTEST = 0.8, 0.1
"""Seconds that one act of a schedule lasts."""

CALM = 0.25
"""Share of the acts in which nothing happens: what has opened must be able to close again."""


@dataclass(frozen=True, slots=True)
class Act:
    """What happens for some time."""

    seconds: float
    toxics: tuple[Toxic, ...] = ()
    down: bool = False
    """Whether connections are refused, and those that there are reset at its beginning."""

    def __str__(self) -> str:
        what = "down" if self.down else "; ".join(map(str, self.toxics)) or "calm"
        return f"{self.seconds:.2f} s {what}"


ANY = (
    *("latency=20ms,jitter=20ms", "latency=150ms,jitter=100ms,toward=client", "latency=2s"),
    *("slice=40,pause=1ms", "slice=1,pause=1ms,toward=server", "drip=20ms,share=50%"),
    *("bandwidth=20kB", "bandwidth=500B,share=50%", "slow_close=200ms"),
    *("reset_after=0,share=50%", "reset_after=300,toward=client", "reset_after=5,toward=server"),
    *("close_after=100,toward=client", "close_after=0,share=30%", "drop_replies=1"),
    *("half_close_after=200,toward=client,share=50%", "half_close_after=20,toward=server"),
    *("silent_after=0,share=50%", "silent_after=150,toward=client", "silent_after=0,toward=server"),
    *("cut", "cut,toward=client", "cut,toward=server", "drop_replies=3,latency=30ms"),
)
"""What may happen to any protocol: all that a network does."""

GARBAGE = ("garbage=64,chance=20%,toward=client", "garbage=5,toward=client,share=50%")
"""What only happens to an answer that is checked: TCP itself delivers no bytes but those sent."""


def drawn(random: Random, seconds: float, menu: Sequence[str] = ANY) -> list[Act]:
    """Draw acts for *seconds*; each has one or two toxics of the *menu*, or refuses, or is calm."""
    acts: list[Act] = []
    while (left := seconds - sum(each.seconds for each in acts)) > SHORTEST:
        lasts = min(left, random.uniform(SHORTEST, LONGEST))
        acts.append(_an_act(random, lasts, menu))
    return [*acts, Act(0.0)]


def _an_act(random: Random, seconds: float, menu: Sequence[str]) -> Act:
    kind = random.random()
    if kind < CALM:
        return Act(seconds)
    if kind < CALM + 1 / (len(menu) + 1):
        return Act(seconds, down=True)
    toxics = random.sample(menu, random.choice((1, 1, 2)))
    return Act(seconds, tuple(map(parse_toxic, toxics)))


async def played(proxy: ChaosProxy, acts: Iterable[Act]) -> None:
    """Let *acts* happen at *proxy*, one after the other."""
    for act in acts:
        proxy.toxics = act.toxics
        if act.down:
            await proxy.down()
        await asyncio.sleep(act.seconds)
        await proxy.up()
