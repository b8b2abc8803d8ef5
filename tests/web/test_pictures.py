"""What several workers tell of an upstream becomes one picture."""

import json
from typing import Any

from vastproxy.web.pictures import Picture, added, all_merged, is_troubled, merged


def a_breaker(state: str = "closed", **more: Any) -> dict[str, Any]:
    """Build what a breaker tells of itself."""
    window = {"seconds": 10.0, "calls": 20, "failures": 2, "slow": 1}
    told = {"state": state, "since_seconds": 1.0, "reason": state, "held": False, "window": window}
    rest = {"failures_in_a_row": 1, "retry_in_seconds": None, "probing": False, "mode": "enforce"}
    return {**told, **rest, **more}


def a_picture(name: str = "main", **more: Any) -> dict[str, Any]:
    """Build the picture that one worker has of an upstream."""
    return {
        "name": name,
        "endpoint": "https://ads.example/",
        "breaker": a_breaker(),
        "rate_limit": {"rate": 50.0, "burst": 5, "shared": False, "refused": 3},
        "in_flight": 2,
        "max_in_flight": 500,
        "calls": {"ok": 10, "failed": 1},
        "latency_ms": {"p50": 10.0, "p90": 20.0, "p99": 30.0, "calls": 10},
        "cache": None,
        **more,
    }


def test_what_adds_up() -> None:
    """Calls of workers, and what they may have at once, are added up; the name is theirs all."""
    whole = merged({1: a_picture(in_flight=3), 2: a_picture(calls={"ok": 1, "retried": 2})})

    assert ("main", "https://ads.example/") == (whole["name"], whole["endpoint"])
    assert (5, 1000) == (whole["in_flight"], whole["max_in_flight"])
    assert {"ok": 11, "failed": 1, "retried": 2} == whole["calls"]
    assert whole["cache"] is None


def test_each_worker_is_told() -> None:
    """The picture of each worker stands in the whole, with its number."""
    pictures = {1: a_picture(in_flight=7), 3: a_picture()}

    assert [{"worker": number, **each} for number, each in pictures.items()] == merged(pictures)[
        "workers"
    ]


def test_worst_breaker() -> None:
    """Open is worse than half-open, and that than closed; the worst worker is named."""
    orders = [("closed", "half-open", "open"), ("open", "closed", "half-open")]
    found = [
        merged({n: a_picture(breaker=a_breaker(each)) for n, each in enumerate(states, 1)})
        for states in orders
    ]
    pair = merged(
        {n: a_picture(breaker=a_breaker(s)) for n, s in ((1, "closed"), (2, "half-open"))}
    )

    assert [("open", 3), ("open", 1)] == [
        (each["breaker"]["state"], each["breaker"]["worker"]) for each in found
    ]
    assert ("half-open", 2) == (pair["breaker"]["state"], pair["breaker"]["worker"])
    assert {"open": 1, "half-open": 1, "closed": 1} == found[0]["breaker"]["states"]


def test_longest_of_the_worst() -> None:
    """Of breakers that are equally bad, the one that has been so for longest tells why."""
    whole = merged(
        {
            1: a_picture(breaker=a_breaker("open", since_seconds=3.0, reason="late")),
            2: a_picture(breaker=a_breaker("open", since_seconds=9.0, reason="first")),
        }
    )["breaker"]

    assert (2, 9.0, "first") == (whole["worker"], whole["since_seconds"], whole["reason"])


def test_windows_and_probes() -> None:
    """
    What breakers have seen is added up over a window of one length; the next probe is the first
    of any worker, and one that is held by hand makes the whole held.
    """
    whole = merged(
        {
            1: a_picture(breaker=a_breaker("open", retry_in_seconds=40.0, failures_in_a_row=5)),
            2: a_picture(breaker=a_breaker("open", retry_in_seconds=2.5)),
            3: a_picture(breaker=a_breaker(held=True)),
        }
    )["breaker"]

    assert {"seconds": 10.0, "calls": 60, "failures": 6, "slow": 3} == whole["window"]
    assert (2.5, 5, True) == tuple(
        whole[each] for each in ("retry_in_seconds", "failures_in_a_row", "held")
    )


def test_no_breaker() -> None:
    """Where no worker has a breaker, a rate or times, the whole has none."""
    whole = merged({1: a_picture(breaker=None, rate_limit=None, latency_ms=None)})

    assert [None] * 3 == [whole[each] for each in ("breaker", "rate_limit", "latency_ms")]


def test_rates() -> None:
    """Each worker has its part of a rate; one that is shared is the same for all."""
    shared = {"rate": 50.0, "burst": 5, "shared": True, "refused": 3}
    parts = merged({1: a_picture(), 2: a_picture()})["rate_limit"]
    one = merged({n: a_picture(rate_limit=shared) for n in (1, 2)})["rate_limit"]

    assert {"rate": 100.0, "burst": 10, "shared": False, "refused": 6} == parts
    assert {"rate": 50.0, "burst": 5, "shared": True, "refused": 6} == one


def test_times_of_the_busiest() -> None:
    """Percentiles are those of the worker with most calls, which is named."""
    busy = {"p50": 1.0, "p90": 2.0, "p99": 3.0, "calls": 11}
    pictures = {1: a_picture(), 2: a_picture(latency_ms=busy), 3: a_picture(latency_ms=None)}

    assert {**busy, "worker": 2} == merged(pictures)["latency_ms"]


def test_caches() -> None:
    """What caches count is added up, at any depth."""
    caches = [
        {"hits": 1, "not_stored": {"paid": 2}},
        {"hits": 4, "not_stored": {"paid": 1, "size": 1}},
    ]
    whole = merged({n: a_picture(cache=each) for n, each in enumerate(caches, 1)})

    assert {"hits": 5, "not_stored": {"paid": 3, "size": 1}} == whole["cache"]


def test_another_version() -> None:
    """A picture that lacks things, or has more of them, is merged as far as it goes."""
    old = {"name": "main", "breaker": {"state": "ajar"}, "in_flight": 1}
    new = a_picture(breaker=a_breaker("open"), mood={"good": True})
    whole = merged({1: old, 2: new})

    assert ("open", 2) == (whole["breaker"]["state"], whole["breaker"]["worker"])
    assert (3, {"good": True}) == (whole["in_flight"], whole["mood"])
    assert {"ajar": 1} == merged({1: old})["breaker"]["states"]
    assert whole == json.loads(json.dumps(whole))


def test_what_is_no_number_is_not_added() -> None:
    """Of words and truths the first stands; nothing is made of nothing."""
    assert {"a": True, "b": "x", "c": 2, "d": None} == added(
        [{"a": True, "b": "x", "c": None}, {"a": False, "b": "y", "c": 2, "d": None}]
    )
    assert {} == added([])


def test_lists_of_workers() -> None:
    """Upstreams are found by name in what workers told, in their order, wherever they stand."""
    told: dict[int, dict[str, list[Picture]]] = {
        1: {"hosts": [a_picture("a.example"), a_picture("b.example")]},
        2: {"hosts": [a_picture("c.example"), a_picture("b.example")]},
        3: {"upstreams": []},
    }
    found = all_merged(told, "hosts")

    assert [("a.example", [1]), ("b.example", [1, 2]), ("c.example", [2])] == [
        (each["name"], [worker["worker"] for worker in each["workers"]]) for each in found
    ]
    assert [] == all_merged({}, "hosts")


def test_troubled() -> None:
    """Trouble is a breaker that is not closed, or failures of late."""
    calm = {"seconds": 10.0, "calls": 20, "failures": 0, "slow": 0}
    found = [
        is_troubled(a_picture(breaker=each))
        for each in (
            a_breaker("open", window=calm),
            a_breaker("half-open", window=calm),
            a_breaker(),
            a_breaker(window=calm),
            None,
        )
    ]

    assert [True, True, True, False, False] == found
    assert not is_troubled({"name": "a.example"})
