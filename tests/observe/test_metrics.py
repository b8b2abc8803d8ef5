"""What is counted is told to Prometheus, and to who uses the library alone."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from timeit import repeat

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.support.proxy import ROOT
from vastproxy.observe.metrics import DIRECTORY, RequestMetrics, forget_process, summed

CHILD = """
import sys
from vastproxy.observe.metrics import RequestMetrics, count_as

count_as(int(sys.argv[1]))
metrics = RequestMetrics()
metrics.answered("/ad", "ad", 2, 0.25)
metrics.state_up(up=sys.argv[2] == "up")
metrics.journal_pending(3)
metrics.upstream_called("main", "ok", 0.2)
metrics.upstream_called("main", "breaker", None)
metrics.breaker_changed("main", "closed", "open")
metrics.breaker_changed("(hops)", "closed", "open")
metrics.breaker_changed("(hops)", "closed", "open")
"""


class Session:
    """A session that answers, or fails."""

    def __init__(self, answer: str | Exception) -> None:
        """Take the *answer*."""
        self._answer = answer

    async def request(self) -> str:
        """Give it."""
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    """Read Prometheus' text: names, with the values of their labels in order, and numbers."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_ad_requests() -> None:
    """Requests are counted by route and outcome, ads by route, and seconds fall into buckets."""
    metrics = RequestMetrics()
    metrics.answered("/a", "ad", 3, 0.02)
    metrics.answered("/a", "ad", 1, 0.2)
    metrics.answered("/b", "no_ad", 0, 0.02)
    metrics.answered("/b", "error", 0, 20.0)
    found = samples(metrics.text())

    assert 2 == found["vastproxy_requests_total", "ad", "/a"]
    assert (1, 1) == tuple(
        found["vastproxy_requests_total", each, "/b"] for each in ("no_ad", "error")
    )
    assert (4, 0) == tuple(found["vastproxy_ads_total", each] for each in ("/a", "/b"))
    assert (0, 2, 3, 4) == tuple(
        found["vastproxy_request_seconds_bucket", each]
        for each in ("0.01", "0.025", "0.25", "+Inf")
    )
    assert 20.24 == pytest.approx(found["vastproxy_request_seconds_sum",])


def test_caps_beacons_and_state() -> None:
    """Caps, beacons and the health of the state have metrics of their own."""
    metrics = RequestMetrics()
    for _ in range(2):
        metrics.capped("/a", "cap", "enforce")
        metrics.beacon("late")
    metrics.capped("/a", "budget", "shadow")
    metrics.state_error()
    metrics.state_up(up=False)
    metrics.journal_pending(7)
    found = samples(metrics.text())

    assert 2 == found["vastproxy_capped_total", "cap", "enforce", "/a"]
    assert 1 == found["vastproxy_capped_total", "budget", "shadow", "/a"]
    assert 2 == found["vastproxy_beacons_total", "late"]
    assert (1, 0, 7) == tuple(
        found[f"vastproxy_{each}",]
        for each in ("state_errors_total", "state_up", "journal_pending")
    )


def test_calls_of_ad_servers() -> None:
    """Calls are counted by upstream and result; only those that were made take time."""
    metrics = RequestMetrics()
    for seconds in (0.02, 0.2):
        metrics.upstream_called("main", "ok", seconds)
    metrics.upstream_called("main", "failed", 1.0)
    metrics.upstream_called("(hops)", "neutral", 0.3)
    for refusal in ("breaker", "rate_limit", "busy", "busy"):
        metrics.upstream_called("main", refusal, None)
    metrics.retried("main")
    found = samples(metrics.text())

    assert [2, 1, 0, 1, 1, 2] == [
        found["vastproxy_upstream_calls_total", each, "main"]
        for each in ("ok", "failed", "neutral", "breaker", "rate_limit", "busy")
    ]
    assert 1 == found["vastproxy_upstream_calls_total", "neutral", "(hops)"]
    assert (3, 1) == tuple(
        found["vastproxy_upstream_seconds_count", each] for each in ("main", "(hops)")
    )
    assert 1.22 == pytest.approx(found["vastproxy_upstream_seconds_sum", "main"])
    assert 1 == found["vastproxy_upstream_retries_total", "main"]


def test_waterfall() -> None:
    """What became of upstreams is counted by upstream and word."""
    metrics = RequestMetrics()
    for choice in (("main", "failed"), ("house", "ad"), ("main", "failed"), ("main", "late")):
        metrics.chosen(choice)
    found = samples(metrics.text())

    assert [2, 1, 1] == [
        found["vastproxy_waterfall_total", *each]
        for each in (("main", "failed"), ("main", "late"), ("house", "ad"))
    ]


def test_breakers() -> None:
    """
    A breaker counts as open until it is closed again, whatever it was between; of hops, all that
    are open count together.
    """
    metrics = RequestMetrics()
    metrics.upstream_called("main", "ok", 0.1)
    way = ("closed", "open", "half-open", "open", "half-open", "closed")
    gauges = [samples(metrics.text())["vastproxy_breaker_open", "main"]]
    for old, new in pairwise(way):
        metrics.breaker_changed("main", old, new)
        gauges.append(samples(metrics.text())["vastproxy_breaker_open", "main"])
    for _ in range(3):
        metrics.breaker_changed("(hops)", "closed", "open")
    metrics.breaker_changed("(hops)", "open", "closed")
    found = samples(metrics.text())

    assert [0, 1, 1, 1, 1, 0] == gauges
    assert 2 == found["vastproxy_breaker_open", "(hops)"]
    assert [2, 2, 1] == [
        found["vastproxy_breaker_changes_total", each, "main"]
        for each in ("open", "half-open", "closed")
    ]


def test_cache_and_overload() -> None:
    """What caches said is counted by upstream, and what was too much by its reason."""
    metrics = RequestMetrics()
    for word in ("hit", "hit", "stale"):
        metrics.cached("house", word)
    before = samples(metrics.text())
    metrics.overloaded()
    found = samples(metrics.text())

    assert (2, 1) == tuple(
        found["vastproxy_cache_total", each, "house"] for each in ("hit", "stale")
    )
    assert (0, 1) == tuple(
        each["vastproxy_requests_refused_total", "overload"] for each in (before, found)
    )


def test_calls_are_no_requests() -> None:
    """Calls of ad servers change nothing in the library's numbers of requests."""
    metrics = RequestMetrics()
    metrics.upstream_called("main", "failed", 0.1)
    metrics.breaker_changed("main", "closed", "open")
    metrics.overloaded()

    assert RequestMetrics().get_stats() == metrics.get_stats()


def test_state_is_there_until_it_is_not() -> None:
    """Before anything went wrong the state counts as up, with nothing pending."""
    found = samples(RequestMetrics().text())

    assert (1, 0, 0) == tuple(
        found[f"vastproxy_{each}",]
        for each in ("state_up", "state_errors_total", "journal_pending")
    )


def test_objects_count_for_themselves() -> None:
    """Two objects share nothing, and one may write into a registry of its user's."""
    registry = CollectorRegistry()
    one, other = RequestMetrics(registry), RequestMetrics()
    one.answered("/a", "ad", 1, 0.1)

    assert 1 == registry.get_sample_value(
        "vastproxy_requests_total", {"route": "/a", "outcome": "ad"}
    )
    assert (1, 0) == (one.get_stats()["total"], other.get_stats()["total"])


async def test_tracking_a_session() -> None:
    """A session's answer is given on; success, failure and time are counted."""
    metrics = RequestMetrics()
    answer = await metrics.track_request(Session("<VAST/>"))
    with pytest.raises(ZeroDivisionError):
        await metrics.track_request(Session(ZeroDivisionError()))
    metrics.capped("/a", "cap", "enforce")
    found = metrics.get_stats()

    assert "<VAST/>" == answer
    assert 0 < found.pop("avg_latency") < 1
    assert {"total": 2, "success": 1, "failed": 1, "capped": 1, "success_rate": 0.5} == found
    assert "<RequestMetrics 2 requests, 1 failed>" == repr(metrics)


def test_stats_of_nothing() -> None:
    """Before the first request no rate is divided by zero."""
    found = RequestMetrics().get_stats()

    assert {"total", "success", "failed", "capped", "success_rate", "avg_latency"} == set(found)
    assert {0} == set(found.values())


def test_average_latency() -> None:
    """The latency is the mean, in seconds."""
    metrics = RequestMetrics()
    for seconds in (0.1, 0.3):
        metrics.answered("/a", "no_ad", 0, seconds)

    assert 0.2 == pytest.approx(metrics.get_stats()["avg_latency"])


def count_in_process(directory: Path, number: int, state: str) -> None:
    """Count one request in a process of its own, as process *number*."""
    subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", CHILD, str(number), state],
        cwd=ROOT,
        env={DIRECTORY: str(directory)},
        check=True,
        timeout=60,
    )


def test_processes_are_summed(tmp_path: Path) -> None:
    """
    Counts of processes add up, also of dead ones, whose place a new one takes in the same files;
    the state is as bad as it is for the worst, and a breaker is open in so many processes; gauges
    of the dead are forgotten.
    """
    count_in_process(tmp_path, 1, "up")
    count_in_process(tmp_path, 2, "down")
    both = samples(summed(str(tmp_path)))
    forget_process(2, str(tmp_path))
    files = sorted(each.name for each in tmp_path.iterdir())
    count_in_process(tmp_path, 1, "up")
    later = samples(summed(str(tmp_path)))

    assert 2 == both["vastproxy_requests_total", "ad", "/ad"]
    assert 2 == both["vastproxy_request_seconds_bucket", "+Inf"]
    assert 4 == both["vastproxy_ads_total", "/ad"]
    assert (0, 6) == (both["vastproxy_state_up",], both["vastproxy_journal_pending",])
    assert (2, 4) == tuple(both["vastproxy_breaker_open", each] for each in ("main", "(hops)"))
    assert (2, 0.4) == tuple(
        both[f"vastproxy_upstream_seconds_{each}", "main"] for each in ("count", "sum")
    )
    assert 3 == later["vastproxy_requests_total", "ad", "/ad"]
    assert (1, 3) == (later["vastproxy_state_up",], later["vastproxy_journal_pending",])
    assert (1, 2) == tuple(later["vastproxy_breaker_open", each] for each in ("main", "(hops)"))
    assert 3 == later["vastproxy_upstream_calls_total", "breaker", "main"]
    assert files == sorted(each.name for each in tmp_path.iterdir())


def test_cost_of_a_request() -> None:
    """Counting an ad request takes microseconds: a hundredth of what answering it does."""
    metrics = RequestMetrics()
    best = min(repeat(lambda: metrics.answered("/a", "ad", 1, 0.1), number=2000, repeat=5)) / 2000

    assert 30e-6 > best


def test_cost_of_a_call() -> None:
    """Counting a call of an ad server takes a microsecond or a few."""
    metrics = RequestMetrics()
    best = min(repeat(lambda: metrics.upstream_called("a", "ok", 0.1), number=2000, repeat=5))

    assert 30e-6 > best / 2000
