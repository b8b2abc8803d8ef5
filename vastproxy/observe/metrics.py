"""
Numbers for Prometheus, and for whoever uses the library alone.

Rule 1: importing this module makes no metric. A :class:`RequestMetrics` has a registry of its own.
Rule 2: labels come from the configuration, never from a request: a label of a viewer's choice
would grow without bound.
Rule 3: what an ad request costs here is a few microseconds: the children of labels are kept.

In several processes prometheus-client writes every value to a file of shared memory. Who sets
``PROMETHEUS_MULTIPROC_DIR`` does it before this module is imported, and has one object of
:class:`RequestMetrics` per process: two would write over each other.
"""

from collections import Counter as Counts
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

Outcome = Literal["ad", "no_ad", "error", "gone"]
"""``error``: a mistake in the proxy; the player got an empty VAST. ``gone``: he went before it."""
BeaconResult = Literal["counted", "late", "again", "forged", "deferred"]
CallResult = Literal["ok", "failed", "neutral", "breaker", "rate_limit", "busy"]
"""What came of a call of an ad server; the last three: the proxy did not make it."""

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0)
"""Bounds of the histogram: prometheus-client's, and more around deadlines, which are 1 to 3 s."""

DIRECTORY: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that prometheus-client looks at when it is imported."""


class Asks(Protocol):
    """What is asked for an ad: a session."""

    async def request(self) -> str:
        """Give the answer as text."""


@dataclass(frozen=True, slots=True)
class _OfRoute:
    """The counters of one route, which need not be looked up again."""

    requests: dict[str, Callable[[], None]]
    ads: Callable[[float], None]


@dataclass(frozen=True, slots=True)
class _OfUpstream:
    """The counters of one upstream, which need not be looked up again."""

    calls: dict[str, Callable[[], None]]
    seconds: Callable[[float], None]


class RequestMetrics:
    """
    Counts ad requests, ads, caps, beacons, calls of ad servers and the health of the state.

    *registry* is where the metrics are found; None makes one.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._total = self._failed = self._capped_requests = 0
        self._latency = 0.0
        self._routes: dict[str, _OfRoute] = {}
        self._upstreams: dict[str, _OfUpstream] = {}
        self._choices: dict[tuple[str, str], Callable[[], None]] = {}
        self._not_closed: Counts[str] = Counts()
        self._children: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self._requests = self._counter("requests", "Ad requests.", "route", "outcome")
        self._seconds = self._histogram(
            "request_seconds", "Seconds from an ad request to its answer."
        )
        self._ads = self._counter("ads", "Ads in answers.", "route")
        self._capped = self._counter(
            "capped", "Ads that a cap or a budget had no room for.", "route", "kind", "mode"
        )
        self._beacons = self._counter("beacons", "Impressions told to the proxy.", "result")
        self._state_errors = self._counter("state_errors", "Failed calls of the state backend.")
        self._state_up = self._gauge(
            "state_up", "1 if the state backend answers, of the worst process.", "livemin"
        )
        self._journal = self._gauge(
            "journal_pending", "Confirmations that wait for the state backend.", "livesum"
        )
        self._state_up.set(1)
        self._overload = self._counter(
            "requests_refused", "Ad requests answered empty at once.", "reason"
        ).labels("overload")
        self._make_upstream_metrics()

    def _make_upstream_metrics(self) -> None:
        self._calls = self._counter("upstream_calls", "Calls of ad servers.", "upstream", "result")
        self._call_seconds = self._histogram(
            "upstream_seconds", "Seconds that calls of ad servers took.", "upstream"
        )
        self._waterfall = self._counter(
            "waterfall", "What became of upstreams in answered ad requests.", "upstream", "what"
        )
        self._retries = self._counter("upstream_retries", "Calls that went out again.", "upstream")
        self._cache = self._counter("cache", "What caches were asked.", "upstream", "result")
        self._changes = self._counter("breaker_changes", "Breakers' new states.", "upstream", "to")
        # A sum: in how many processes that of an upstream is not closed, and how many of hops.
        self._open = self._gauge(
            "breaker_open", "Breakers that are not closed.", "livesum", "upstream"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"vastproxy_{name}_total", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"vastproxy_{name}", text, labels, buckets=SECONDS, registry=self.registry)

    def _gauge(
        self, name: str, text: str, mode: Literal["livemin", "livesum"], *labels: str
    ) -> Gauge:
        return Gauge(
            f"vastproxy_{name}", text, labels, multiprocess_mode=mode, registry=self.registry
        )

    # --- What the proxy tells -------------------------------------------------------------------

    def answered(self, route: str, outcome: Outcome, ads: int, seconds: float) -> None:
        """Count an ad request of *route* that was answered with *ads* in *seconds*."""
        self._total += 1
        self._failed += outcome == "error"
        self._latency += seconds
        known = self._routes.get(route) or self._route(route)
        known.requests[outcome]()
        if ads:
            known.ads(ads)
        self._seconds.observe(seconds)

    def _route(self, route: str) -> _OfRoute:
        outcomes: tuple[Outcome, ...] = ("ad", "no_ad", "error", "gone")
        requests: dict[str, Callable[[], None]] = {
            each: self._requests.labels(route, each).inc for each in outcomes
        }
        return self._routes.setdefault(route, _OfRoute(requests, self._ads.labels(route).inc))

    def capped(self, route: str, kind: Literal["cap", "budget"], mode: str) -> None:
        """Count an ad of *route* without room; *mode* says what was done: ``skip``, ``serve``."""
        self._capped_requests += 1
        self._child(self._capped, route, kind, mode).inc()

    def beacon(self, result: BeaconResult) -> None:
        """Count a beacon by what came of it."""
        self._child(self._beacons, result).inc()

    def state_error(self) -> None:
        """Count a call that the state backend failed."""
        self._state_errors.inc()

    def state_up(self, *, up: bool) -> None:
        """Say whether the state backend answers."""
        self._state_up.set(up)

    def journal_pending(self, number: int) -> None:
        """Say how many confirmations wait."""
        self._journal.set(number)

    def overloaded(self) -> None:
        """Count an ad request for which there were too many under way."""
        self._overload.inc()

    def upstream_called(self, upstream: str, result: CallResult, seconds: float | None) -> None:
        """
        Count a call of *upstream*, a name of the configuration, or one word for all else.

        *seconds* is what it took; None: the proxy did not make it.
        """
        known = self._upstreams.get(upstream) or self._upstream(upstream)
        known.calls[result]()
        if seconds is not None:
            known.seconds(seconds)

    def _upstream(self, name: str) -> _OfUpstream:
        results: tuple[CallResult, ...] = (
            *("ok", "failed", "neutral"),
            *("breaker", "rate_limit", "busy"),
        )
        calls: dict[str, Callable[[], None]] = {
            each: self._calls.labels(name, each).inc for each in results
        }
        # An alert needs the gauge before the first breaker opens: it is there from now on.
        self._open.labels(name).set(self._not_closed[name])
        seconds = self._call_seconds.labels(name).observe
        return self._upstreams.setdefault(name, _OfUpstream(calls, seconds))

    def chosen(self, choice: tuple[str, str]) -> None:
        """Count a step of a waterfall: an upstream of the configuration, and what became of it."""
        known = self._choices.get(choice)
        if known is None:
            known = self._choices[choice] = self._waterfall.labels(*choice).inc
        known()

    def retried(self, upstream: str) -> None:
        """Count a call of *upstream* that went out again."""
        self._child(self._retries, upstream).inc()

    def breaker_changed(self, upstream: str, old: str, new: str) -> None:
        """
        Count a breaker of *upstream* that went from the state *old* to *new*.

        One that is half-open still refuses all calls but its probes, so it counts among the open.
        """
        self._child(self._changes, upstream, new).inc()
        self._not_closed[upstream] += (new != "closed") - (old != "closed")
        # Set, not changed: in the file of a process before this one there may be a number.
        self._open.labels(upstream).set(self._not_closed[upstream])

    def cached(self, upstream: str, word: str) -> None:
        """Count what the cache of *upstream* said: a word of RFC 9211, such as ``hit``."""
        self._child(self._cache, upstream, word).inc()

    def _child(self, counter: Counter, *labels: str) -> Counter:
        key = counter, labels
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = counter.labels(*labels)
        return found

    # --- The library's face ---------------------------------------------------------------------

    async def track_request(self, session: Asks, route: str = "") -> str:
        """Ask *session*, count it and its time under *route*, and give what it answers."""
        began = perf_counter()
        outcome: Outcome = "error"
        try:
            answer = await session.request()
            outcome = "ad" if answer else "no_ad"
        finally:
            self.answered(route, outcome, int(outcome == "ad"), perf_counter() - began)
        return answer

    def get_stats(self) -> dict[str, float]:
        """Give what this object counted: numbers of requests, their rate, and seconds."""
        total = self._total
        success = total - self._failed
        return {
            "total": total,
            "success": success,
            "failed": self._failed,
            "capped": self._capped_requests,
            "success_rate": success / total if total else 0.0,
            "avg_latency": self._latency / total if total else 0.0,
        }

    def text(self) -> bytes:
        """Write the metrics of this process in Prometheus' text format."""
        return generate_latest(self.registry)

    def __repr__(self) -> str:
        return f"<RequestMetrics {self._total} requests, {self._failed} failed>"


def count_as(number: int) -> None:
    """
    Let this process be *number* among those that share a directory, in place of its pid.

    Who takes a dead process's place goes on with its files, so they do not become ever more. No
    two living processes may have one number. Called before the first metric is made.
    """
    # As prometheus-client's documentation does it for uWSGI's worker ids.
    value_class: Any = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
    values.ValueClass = value_class


def forget_process(number: int, directory: str) -> None:
    """Take the gauges of the dead process *number* out of *directory*; its counts stay."""
    mark_process_dead(number, directory)  # type: ignore[no-untyped-call]


def summed(directory: str) -> bytes:
    """Write the metrics of all processes that share *directory* in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
