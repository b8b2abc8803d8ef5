"""
What a mistake is, and those that two sections make together.

Rule 1: this works on plain values, so that one wrong setting does not hide what else is wrong.
Rule 2: what is no value of its setting is passed over here; the schema tells of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, TypeVar

from vastproxy.config.schema import Budget, Route, Upstream
from vastproxy.config.template import Template
from vastproxy.config.units import (
    LONGEST_SHOWN,
    Source,
    StateUrl,
    parse_duration,
    parse_money,
    shown,
)

Place = tuple[str | int, ...]
"""Where something stands: names of settings, and indexes of lists."""
Section = Mapping[str, object]
"""Plain values, by the names of the settings."""
Routes = Sequence[tuple[int, Section]]
"""Routes with their places in the list."""
T = TypeVar("T")

NEAR: Final = 0.7
"""How alike two names must be for one to be proposed for the other: 'deadline' is no 'admin'."""
MOST_COMPARED: Final = 200
"""Names among which the nearest to a misspelt one is looked for."""
MOST_LISTED: Final = 24
"""Names in one message. No section has more settings."""
OVER_REDIS: Final = (("circuit_breaker", "share"), ("rate_limit", "share"), ("cache", "redis"))
"""What instances have together in Redis only, by section and setting of an upstream."""
TRUE: Final = frozenset({"1", "on", "t", "true", "y", "yes"})
"""What pydantic reads as true, in lower case."""
_NO: Final = frozenset({"false", "no", "off", "n", "f", "0"})
"""What is read as false."""
SHARED_BY_ROUTES: Final = ("limit", "currency", "mode", "on_state_loss")
"""What all routes that name one campaign must say alike: there is one account."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake, not yet tied to a line."""

    place: Place
    message: str
    line: int | None = None
    """Where it is not the line of *place*."""
    others: tuple[Place, ...] = ()
    """Other places of which the message repeats something."""


def advice(name: str, names: tuple[str, ...]) -> str:
    """Say which of *names* may be meant by *name*, or which there are."""
    near = get_close_matches(name[:LONGEST_SHOWN], names[:MOST_COMPARED], n=1, cutoff=NEAR)
    if near:
        return f"did you mean '{near[0]}'?"
    more = ", ..." if len(names) > MOST_LISTED else ""
    return f"there are: {', '.join(names[:MOST_LISTED])}{more}"


def faults_between_sections(data: object) -> Iterator[Fault]:
    """Compare sections of *data*, which is the whole file, with each other."""
    whole = _section(data)
    server, upstreams = _section(whole.get("server")), _section(whole.get("upstreams"))
    listed = whole.get("routes")
    entries = enumerate(listed if isinstance(listed, list) else ())
    routes = [(index, each) for index, each in entries if isinstance(each, dict)]
    yield from _unshared_state(server, whole.get("state", "memory://"))
    yield from _repeated_paths(routes)
    yield from _short_beacons(server, routes)
    yield from _quarrels_over_campaigns(routes)
    deep = {name for name, each in upstreams.items() if _takes_rest(each)}
    for index, route in routes:
        if isinstance(whole.get("upstreams"), dict):
            yield from _faults_of_upstreams(index, route, tuple(upstreams), deep)
        yield from _viewers_wanted(index, route, upstreams)
        yield from _strange_upstreams(index, route)
    yield from _not_over_redis(upstreams, whole.get("state", "memory://"))
    for name, each in upstreams.items():
        yield from _personal_for_all(name, _section(each))
        yield from _kept_for_nobody(name, _section(each), routes)
        yield from _never_shared(name, _section(each), routes)
        yield from _never_soft(name, _section(each), routes)
        yield from _never_slow(name, _section(each))
        yield from _sold_for_nothing(name, _section(each), routes)


def _section(value: object) -> Section:
    return value if isinstance(value, dict) else {}


def _read(parse: Callable[[str], T], value: object) -> T | None:
    """*Parse* what the operator wrote; None where that is no value of the setting."""
    try:
        return parse(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _unshared_state(server: Section, state: object) -> Iterator[Fault]:
    workers, url = _read(int, server.get("workers")), _read(StateUrl.parse, state)
    if workers and workers > 1 and url and not url.is_shared:
        message = (
            f"{workers} workers cannot share memory:// (write workers: 1, or a state that they can "
            "share: redis://127.0.0.1:6379, postgresql://user@host/db or sqlite:///vastproxy.db)"
        )
        yield Fault(("server", "workers"), message)


def _short_beacons(server: Section, routes: Routes) -> Iterator[Fault]:
    """Compare how long beacons are taken with how long reservations wait for them."""
    beacons = _read(parse_duration, server.get("beacon_ttl"))
    waits = [each for index, route in routes for each in _waits(index, route)]
    if beacons is None or not waits:
        return
    longest, text, place = max(waits, key=lambda wait: wait[0])
    if longest > beacons:
        where = ".".join(str(step) for step in place)
        message = (
            f"{shown(server['beacon_ttl'])} is shorter than the reservation_ttl of {where}, {text} "
            f"(write {text} or more here, or less there)"
        )
        yield Fault(("server", "beacon_ttl"), message, others=(place,))


def _waits(index: int, route: Section) -> Iterator[tuple[float, str, Place]]:
    """List each reservation_ttl of *route*: its seconds, its text, its place."""
    default = Route.model_fields["reservation_ttl"].default
    sections = {(): {"reservation_ttl": default, **route}, **_counting(route)}
    for place, section in sections.items():
        text = section.get("reservation_ttl")
        if seconds := _read(parse_duration, text):
            yield seconds, str(text), ("routes", index, *place)


def _counting(route: Section) -> dict[Place, Section]:
    """Give the budget and the caps of *route*, by their places in it."""
    caps = route.get("frequency_caps")
    listed = enumerate(caps if isinstance(caps, list) else ())
    sections: dict[Place, Section] = {("budget",): _section(route.get("budget"))}
    return sections | {("frequency_caps", at): _section(cap) for at, cap in listed}


def _quarrels_over_campaigns(routes: Routes) -> Iterator[Fault]:
    first: dict[str, tuple[int, Section]] = {}
    for index, route in routes:
        budget = _section(route.get("budget"))
        campaign = budget.get("campaign")
        if not isinstance(campaign, str):
            continue
        other, before = first.setdefault(campaign, (index, budget))
        for name in SHARED_BY_ROUTES:
            one, two = _said(before, name), _said(budget, name)
            if one is not None and two is not None and one != two:
                message = (
                    f"the campaign {shown(campaign)} has {name}: {one} in routes.{other}, and "
                    f"{name}: {two} in routes.{index} (write the same in both)"
                )
                others = (("routes", other, "budget"), ("routes", index, "budget"))
                yield Fault(("routes", index, "budget", name), message, others=others)


def _said(budget: Section, name: str) -> str | None:
    """Give what *budget* says of *name*, in a form that can be compared; None: nothing usable."""
    value = budget.get(name, Budget.model_fields[name].default)
    if name != "limit":
        return value if isinstance(value, str) else None
    amount = _read(parse_money, value)
    return None if amount is None else f"{amount.normalize():f}"


def _viewers_wanted(index: int, route: Section, upstreams: Section) -> Iterator[Fault]:
    """Tell of upstreams that keep cookies for viewers, where the route knows none."""
    if route.get("viewer", []) != []:
        return
    for name in _names(route.get("upstreams")):
        if _section(upstreams.get(name)).get("cookies") == "viewer":
            message = (
                f"the upstream {shown(name)} keeps cookies for each viewer, and the route does not "
                'say where a request names one (add viewer: ["query:uid"])'
            )
            others = (("routes", index, "upstreams"),)
            yield Fault(("routes", index, "viewer"), message, others=others)


def _strange_upstreams(index: int, route: Section) -> Iterator[Fault]:
    """Tell of upstreams that caps and the budget name, and the route does not."""
    known = tuple(_names(route.get("upstreams")))
    asked, others = frozenset(known), (("routes", index, "upstreams"),)
    for place, section in _counting(route).items():
        for position, name in enumerate(_names(section.get("upstreams"))):
            if asked and name not in asked:
                message = f"the route asks no upstream {shown(name)} ({advice(name, known)})"
                where = ("routes", index, *place, "upstreams", position)
                yield Fault(where, message, others=others)


def _not_over_redis(upstreams: Section, state: object) -> Iterator[Fault]:
    """Tell of what goes over Redis, where the state is something else."""
    url = _read(StateUrl.parse, state)
    if url is None or url.kind in {"redis", "cluster"}:
        return
    for name, each in upstreams.items():
        for section, key in OVER_REDIS:
            value = _section(_section(each).get(section)).get(key)
            if str(value).lower() in TRUE:
                message = (
                    f"this goes over Redis, and the state is {url.kind} (write state: "
                    f"redis://127.0.0.1:6379, or {key}: false)"
                )
                yield Fault(("upstreams", name, section, key), message)


def _personal_for_all(name: str, upstream: Section) -> Iterator[Fault]:
    """Tell of an upstream whose answers are for one viewer, and kept for everybody."""
    cache = _section(upstream.get("cache"))
    if cache.get("scope") == "shared" and upstream.get("cookies") == "viewer":
        message = (
            "with cookies: viewer each viewer sends his own, and what they are answered is for him "
            "alone (write scope: viewer, or cookies: chain)"
        )
        yield Fault(("upstreams", name, "cache", "scope"), message)


def _kept_for_nobody(name: str, upstream: Section, routes: Routes) -> Iterator[Fault]:
    """Tell of an upstream whose answers are kept for viewers, whom no route knows."""
    cache = upstream.get("cache")
    if not isinstance(cache, dict) or cache.get("scope", "viewer") != "viewer":
        return
    asking = [(index, each) for index, each in routes if name in _names(each.get("upstreams"))]
    if asking and all(each.get("viewer", []) == [] for _, each in asking):
        message = (
            "answers are kept for each viewer, and no route that asks this upstream says where a "
            f'request names one (add viewer: ["query:uid"] to routes.{asking[0][0]}, or write '
            "scope: shared)"
        )
        yield Fault(("upstreams", name, "cache"), message)


def _never_shared(name: str, upstream: Section, routes: Routes) -> Iterator[Fault]:
    """Tell of answers that are shared by a cookie with which none are."""
    cache = _section(upstream.get("cache"))
    vary = cache.get("vary")
    is_sent = str(upstream.get("cookies")).lower() not in _NO
    if cache.get("scope") != "shared" or not isinstance(vary, list) or not is_sent:
        return
    for position, text in enumerate(vary):
        source = _read(Source.parse, text)
        if source is None or source.kind != "cookie":
            continue
        for index, route in routes:
            if name in _names(route.get("upstreams")) and source.name in _forwarded(route):
                message = (
                    f"routes.{index} forwards the cookie {shown(source.name)}, and what is "
                    f"answered to a cookie is never shared (write scope: viewer, or take "
                    f"{source.name} out of the forward_cookies of routes.{index})"
                )
                others = (("routes", index, "forward_cookies"),)
                yield Fault(("upstreams", name, "cache", "vary", position), message, others=others)
                break


def _forwarded(route: Section) -> list[object]:
    listed = route.get("forward_cookies")
    return listed if isinstance(listed, list) else []


def _never_soft(name: str, upstream: Section, routes: Routes) -> Iterator[Fault]:
    """Tell of a soft_timeout that passes when all routes have been answered already."""
    text = upstream.get("soft_timeout")
    soft = _read(parse_duration, text)
    default = Route.model_fields["deadline"].default
    ends = [
        (_read(parse_duration, each.get("deadline", default)), index)
        for index, each in routes
        if name in _names(each.get("upstreams"))
    ]
    known = [(seconds, index) for seconds, index in ends if seconds is not None]
    if soft is None or not known or len(known) < len(ends) or soft < max(known)[0]:
        return
    longest, index = max(known)
    message = (
        f"{shown(text)} is not shorter than the deadline of any route that asks this upstream, so "
        f"that no other is ever started (write less than {longest:g}s, or null)"
    )
    yield Fault(
        ("upstreams", name, "soft_timeout"), message, others=(("routes", index, "deadline"),)
    )


def _never_slow(name: str, upstream: Section) -> Iterator[Fault]:
    """Tell of calls that are slow from a time on when all have been cut off."""
    text = _section(upstream.get("circuit_breaker")).get("slow_call")
    slow = _read(parse_duration, text)
    whole = _read(parse_duration, upstream.get("timeout", Upstream.model_fields["timeout"].default))
    if slow is not None and whole is not None and slow > whole:
        message = (
            f"{shown(text)} is longer than the timeout, {whole:g}s, so that no call is ever slow "
            "(write less than the timeout, or null)"
        )
        yield Fault(("upstreams", name, "circuit_breaker", "slow_call"), message)


def _sold_for_nothing(name: str, upstream: Section, routes: Routes) -> Iterator[Fault]:
    """Tell of an upstream that is said not to be paid, and whose ads a budget pays for."""
    if str(_section(upstream.get("cache")).get("paid")).lower() not in _NO:
        return
    for index, route in routes:
        budget = _section(route.get("budget"))
        covered = _names(budget.get("upstreams")) or _names(route.get("upstreams"))
        if budget and budget.get("mode") != "off" and name in covered:
            message = (
                f"the budget of routes.{index} pays for each of its ads, so none may be shown to "
                "two viewers (remove this line, or write the budget's other upstreams into its "
                "`upstreams`)"
            )
            others = (("routes", index, "budget"),)
            yield Fault(("upstreams", name, "cache", "paid"), message, others=others)
            return


def _names(value: object) -> list[str]:
    """List the names of upstreams that *value* has: it may be one, or a list."""
    names = value if isinstance(value, list) else [value]
    return [each for each in names if isinstance(each, str) and each.strip()]


def _repeated_paths(routes: Routes) -> Iterator[Fault]:
    first: dict[str, int] = {}
    for index, route in routes:
        path = route.get("path")
        if isinstance(path, str) and first.setdefault(path, index) != index:
            message = f"routes.{first[path]} has the path {shown(path)} already (write another)"
            yield Fault(("routes", index, "path"), message)


def _faults_of_upstreams(
    index: int, route: Section, known: tuple[str, ...], deep: set[str]
) -> Iterator[Fault]:
    """Judge the upstreams that *route* names; those in *deep* need the rest of its path."""
    names, path = route.get("upstreams"), route.get("path")
    flat = isinstance(path, str) and not path.endswith("/{rest}")
    for position, name in enumerate(names if isinstance(names, list) else [names]):
        place = ("routes", index, "upstreams", position)
        if not isinstance(name, str) or not name.strip():
            continue
        if name not in known:
            yield Fault(place, _unknown_upstream(name, known))
        elif flat and name in deep:
            message = f"{shown(name)} uses {{rest}}, but the path has none (end it in /{{rest}})"
            yield Fault(place, message)


def _unknown_upstream(name: str, names: tuple[str, ...]) -> str:
    return f"no upstream is called {shown(name)} ({advice(name, names)})"


def _takes_rest(upstream: object) -> bool:
    if not isinstance(upstream, dict):
        return False
    texts = [upstream.get("endpoint")]
    for section in (upstream.get("params"), upstream.get("headers")):
        texts += section.values() if isinstance(section, dict) else ()
    return any(_uses_rest(text) for text in texts if isinstance(text, str))


def _uses_rest(text: str) -> bool:
    try:
        return Template.parse(text).uses_rest
    except ValueError:
        return False
