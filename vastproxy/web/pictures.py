"""
What operators are told of upstreams, and how the pictures of several workers become one.

Rule 1: workers decide each for itself, so the picture of each stands in the one of all.
Rule 2: what can be added up is; of breakers the worst state is told, open before half-open; of
times, those of the worker with most calls.
Rule 3: a picture that lacks something is merged as far as it goes: a worker may be of another
version than its supervisor.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

Picture = dict[str, Any]
"""What is told of one upstream, or of one site of hops; values that JSON knows."""
Pictures = Mapping[int, Picture]
"""Those of several workers, by their numbers."""

WORST_FIRST: Final = ("open", "half-open", "closed")


def is_troubled(picture: Picture) -> bool:
    """Whether its breaker is not closed, or has seen failures of late."""
    breaker = picture.get("breaker") or {}
    window = breaker.get("window") or {}
    return breaker.get("state", "closed") != "closed" or bool(window.get("failures"))


def all_merged(told: Mapping[int, Mapping[str, Sequence[Picture]]], what: str) -> list[Picture]:
    """Make one list of the lists called *what* that workers told, by their numbers."""
    found: dict[str, dict[int, Picture]] = {}
    for number, lists in told.items():
        for each in lists.get(what, ()):
            found.setdefault(each["name"], {})[number] = each
    return [merged(each) for each in found.values()]


def merged(pictures: Pictures) -> Picture:
    """Make one picture of an upstream, of what workers told, by their numbers."""
    whole = added(list(pictures.values()))
    return {
        **whole,
        "breaker": _breaker(_those("breaker", pictures)),
        "rate_limit": _rate_limit(list(_those("rate_limit", pictures).values())),
        "latency_ms": _latency(_those("latency_ms", pictures)),
        "workers": [{"worker": number, **each} for number, each in pictures.items()],
    }


def _those(name: str, pictures: Pictures) -> Pictures:
    """Give the parts called *name*, of workers that have it."""
    found = {number: each.get(name) for number, each in pictures.items()}
    return {number: each for number, each in found.items() if isinstance(each, dict)}


def _breaker(breakers: Pictures) -> Picture | None:
    """Tell the worst, of these the longest there, and what all have seen together."""
    if not breakers:
        return None
    worst = min(breakers, key=lambda number: _badness(breakers[number]))
    windows = [window for each in breakers.values() if (window := each.get("window"))]
    retries = [each["retry_in_seconds"] for each in breakers.values() if _will_retry(each)]
    return {
        **breakers[worst],
        "held": any(each.get("held") for each in breakers.values()),
        "failures_in_a_row": max(each.get("failures_in_a_row", 0) for each in breakers.values()),
        "window": _same(windows, "seconds"),
        "retry_in_seconds": min(retries, default=None),
        "worker": worst,
        "states": Counter(each.get("state", "unknown") for each in breakers.values()),
    }


def _badness(breaker: Picture) -> tuple[int, float]:
    state = breaker.get("state")
    rank = WORST_FIRST.index(state) if state in WORST_FIRST else len(WORST_FIRST)
    return rank, -breaker.get("since_seconds", 0.0)


def _will_retry(breaker: Picture) -> bool:
    return breaker.get("retry_in_seconds") is not None


def _rate_limit(limits: Sequence[Picture]) -> Picture | None:
    """Add up the parts that workers have of a rate, or tell the one that they share."""
    if not limits:
        return None
    return _same(limits, "rate", "burst") if limits[0].get("shared") else added(limits)


def _latency(latencies: Pictures) -> Picture | None:
    """Tell the times of the worker with most calls: percentiles cannot be added up."""
    if not latencies:
        return None
    busiest = max(latencies, key=lambda number: latencies[number].get("calls", 0))
    return {**latencies[busiest], "worker": busiest}


def _same(parts: Sequence[Picture], *names: str) -> Picture:
    """Add up *parts*, but for what is called by one of *names*, which is the same in all."""
    same = {name: parts[0].get(name) for name in names} if parts else {}
    return {**added(parts), **same}


def added(parts: Sequence[Picture]) -> Picture:
    """Add up the numbers in *parts*, at any depth; of all else the first that says something."""
    names = dict.fromkeys(name for each in parts for name in each)
    return {name: _sum([each[name] for each in parts if name in each]) for name in names}


def _sum(values: Sequence[Any]) -> Any:  # noqa: ANN401 - whatever JSON knows
    said = [each for each in values if each is not None]
    if said and all(isinstance(each, dict) for each in said):
        return added(said)
    if said and all(isinstance(each, int | float) and not isinstance(each, bool) for each in said):
        return sum(said)
    return said[0] if said else None
