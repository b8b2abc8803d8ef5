"""
Resolve one tag without a server, and say what happened: ``vastproxy resolve``.

The same classes as in the proxy do the work; only the answer is told differently. With a
configuration one of its routes is asked, by its upstreams with their breakers and caches; what is
counted for viewers and campaigns is left alone, and so is the state that the proxy shares.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from vastproxy.app import offline_server, proxy
from vastproxy.config.schema import Config
from vastproxy.config.template import Template
from vastproxy.config.units import Network, StateUrl
from vastproxy.flow.ad_server import Explained
from vastproxy.flow.answer import is_told
from vastproxy.flow.routing import Route
from vastproxy.model import AdRequest, Device, FrozenMapping, Query
from vastproxy.observe.trace import AdFact, Choice, Exchange, Hop
from vastproxy.upstream.headers import PROXY_USER_AGENT
from vastproxy.upstream.upstream import UpstreamSettings
from vastproxy.vast.merge import MergeNote
from vastproxy.vast.unwrap import Policy, Report

PIPE_WIDTH = 100_000
"""Columns of output that goes into a file: lines are not folded there."""


@dataclass(frozen=True, slots=True)
class Question:
    """A tag to resolve."""

    source: str
    """Its URL, or what its document is called."""
    document: bytes | None = None
    """Its document, where it is at hand."""
    allow: tuple[Network, ...] = ()
    max_hops: int = 5
    timeout: float = 10.0
    """Seconds for the whole chain."""


@dataclass(frozen=True, slots=True)
class RouteQuestion:
    """What a player would ask of a route."""

    config: Config
    target: str
    """Path and query."""
    headers: tuple[tuple[str, str], ...] = ()
    times: int = 1
    """How often it is asked, one after the other."""


async def answered(question: RouteQuestion) -> list[Explained]:
    """
    Answer *question*, as often as it wants. Raises ValueError where no route has the path.

    Each answer finds the breakers and caches as the ones before have left them.
    """
    path, _, query = question.target.partition("?")
    headers = FrozenMapping({name.lower(): value for name, value in question.headers})
    async with proxy(_alone(question.config)) as made:
        match = made.router.find(path)
        if match is None:
            paths = ", ".join(each.path for each in question.config.routes)
            raise ValueError(f"no route has the path {path} (there are: {paths})")
        route, rest = match
        request = AdRequest(route.path, rest, Query(query), headers, _device(headers))
        return [await made.ads.explain(route, request) for _ in range(question.times)]


def _alone(config: Config) -> Config:
    """Give *config* with a state that nobody shares."""
    return config.model_copy(update={"state": StateUrl.parse("memory://"), "journal": None})


def _device(headers: FrozenMapping) -> Device:
    return Device(
        user_agent=headers.get("user-agent", PROXY_USER_AGENT),
        referer=headers.get("referer", ""),
        accept_language=headers.get("accept-language", ""),
    )


async def resolved(question: Question) -> Explained:
    """Resolve the tag of *question*."""
    settings = UpstreamSettings(
        name=question.source,
        # Taken literally: braces in a tag are the ad server's.
        endpoint=Template(question.source, (question.source,)),
        session_params=(),
        timeout=question.timeout,
        user_agent="proxy",
        max_body=2 * 1024 * 1024,
    )
    async with offline_server(settings, question.allow) as (ads, upstream):
        route = Route(
            path="/",
            upstreams=(upstream,),
            deadline=question.timeout,
            policy=Policy(max_wrappers=question.max_hops),
        )
        request = AdRequest("/", device=Device(user_agent=PROXY_USER_AGENT))
        return await ads.explain(route, request, question.document)


def print_answers(answers: Sequence[Explained], style: str) -> None:
    """Print *answers* on standard output, as *style* (vast, tree or json) says."""
    if style == "json" and len(answers) > 1:
        print(json.dumps([as_json(each) for each in answers], indent=2))  # noqa: T201 - output
        return
    for number, each in enumerate(answers, start=1):
        if style == "tree" and len(answers) > 1:
            print(f"--- {number} of {len(answers)} ---")  # noqa: T201 - output
        print_answer(each, style)


def print_answer(answer: Explained, style: str) -> None:
    """Print *answer* on standard output, as *style* (vast, tree or json) says."""
    if style == "tree":
        console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
        for each in trees(answer):
            console.print(each, overflow="fold")
        return
    if style == "json":
        print(json.dumps(as_json(answer), indent=2))  # noqa: T201 - the command's output
        return
    sys.stdout.buffer.write(answer.body + b"\n")
    sys.stdout.buffer.flush()
    if not answer.outcome.ads:
        print(f"no ad: {printable(why_not(answer))} (--format tree tells more)", file=sys.stderr)  # noqa: T201


def why_not(answer: Explained) -> str:
    """Say in a line why there is no ad."""
    reasons = [f"{each.reason} ({each.code})" for _, each in answer.outcome.reports]
    reasons += [f"{hop.problem} ({hop.code})" for hop in answer.hops if hop.code and not reasons]
    reasons = reasons or [
        f"{each.upstream}: {each.detail}" for each in answer.choices if each.detail
    ]
    return "; ".join(dict.fromkeys(reasons)) or "the ad server has none"


def as_json(answer: Explained) -> dict[str, Any]:
    """Give *answer* as values that JSON knows."""
    return {
        "ads": answer.outcome.ads,
        "last_resort": answer.outcome.last_resort is not None,
        "waterfall": [asdict(each) for each in answer.choices],
        "breakers": [asdict(each) for each in answer.changes],
        "shadowed": list(answer.shadowed),
        "hops": [asdict(each) for each in answer.hops],
        "merged": [[_note_json(note) for note in notes] for notes in answer.outcome.notes],
        "reports": [asdict(each) for _, each in answer.outcome.reports],
        "vast": answer.body.decode(),
    }


def _note_json(note: MergeNote) -> dict[str, Any]:
    return {
        "wrapper": note.wrapper_id,
        "system": note.system,
        "taken": dict(+note.taken),
        "dropped": dict(+note.dropped),
    }


# --- For people ---------------------------------------------------------------------------------


def trees(answer: Explained) -> Iterable[Tree | Text]:
    """Draw the hops of *answer*, the waterfall, what was merged, and what was reported."""
    below: dict[int | None, list[Hop]] = {}
    for hop in answer.hops:
        below.setdefault(hop.parent, []).append(hop)
    for hop in below.get(None, []):
        root = Tree(hop_text(hop))
        _grow(root, hop, below)
        yield root
    yield from _steps(answer)
    yield Text()
    yield from _ads(answer)
    for _, report in answer.outcome.reports:
        yield report_text(report)


def _steps(answer: Explained) -> Iterable[Tree | Text]:
    """Draw what became of the upstreams, and of their breakers."""
    if is_told(answer.choices):
        tree = Tree(Text("waterfall", "bold"))
        for each in answer.choices:
            tree.add(choice_text(each))
        yield tree
    for change in answer.changes:
        yield Text(printable(f"breaker {change}"), "yellow")
    for told in answer.shadowed:
        yield Text(printable(f"a breaker that only watches would have refused {told}"), "yellow")


def _ads(answer: Explained) -> Iterable[Tree | Text]:
    """Draw the ads that are answered, and what each wrapper gave to them."""
    outcome = answer.outcome
    for ad, notes in zip(
        outcome.unwrapped.ads if outcome.unwrapped else (), outcome.notes, strict=True
    ):
        place = f", {ad.sequence} in the pod" if ad.sequence else ""
        tree = Tree(
            Text(printable(f"ad {ad.inline.id or '-'} ({ad.inline.system or '-'}{place})"), "bold")
        )
        for note in notes:
            tree.add(note_text(note))
        yield tree
    if outcome.passed is not None:
        yield Text(f"the document is passed through, with {outcome.ads} ads", "bold")
    if outcome.last_resort is not None:
        yield Text("nobody has an ad: the route's fallback is answered", "bold")
    if not outcome.ads:
        yield Text(printable(f"no ad: {why_not(answer)}"), "bold red")


def _grow(tree: Tree, hop: Hop, below: dict[int | None, list[Hop]]) -> None:
    for exchange in hop.exchanges:
        tree.add(exchange_text(exchange))
    for ad in hop.ads:
        tree.add(ad_text(ad))
    for repair in hop.repairs:
        tree.add(Text(f"repaired: {repair}", "yellow"))
    if hop.code is not None:
        tree.add(Text(printable(f"{hop.code}: {hop.problem}"), "bold red"))
    elif hop.problem:
        tree.add(Text(printable(hop.problem), "yellow"))
    for each in below.get(hop.number, []):
        _grow(tree.add(hop_text(each)), each, below)


def hop_text(hop: Hop) -> Text:
    """Name a hop: its number, its URL as the ad server wrote it, its time."""
    return Text.assemble(
        (f"hop {hop.number} ", "bold"),
        (printable(hop.url), "cyan"),
        f"  {hop.milliseconds:.0f} ms",
        f"  VAST {hop.version}" if hop.version else "",
        printable(f"  cache: {hop.cache}") if hop.cache else "",
    )


def choice_text(choice: Choice) -> Text:
    """Tell what became of an upstream, when, and why."""
    text = f"{choice.milliseconds:.0f} ms  {choice.upstream}: {choice.what}"
    return Text(printable(f"{text} ({choice.detail})" if choice.detail else text))


def exchange_text(exchange: Exchange) -> Text:
    """Tell one HTTP request: URL on the wire, status, bytes, time, cookies by name."""
    status = "no answer" if exchange.status is None else str(exchange.status)
    sent = ", ".join(exchange.cookies_sent) or "-"
    got = ", ".join(exchange.cookies_set) or "-"
    text = (
        f"GET {exchange.url}  {status}  {exchange.size} bytes  {exchange.milliseconds:.0f} ms  "
        f"cookies in: {got}  out: {sent}"
    )
    return Text(printable(text))


def ad_text(ad: AdFact) -> Text:
    """Tell one ad of a hop's document."""
    place = f" sequence {ad.sequence}" if ad.sequence else ""
    return Text(printable(f"{ad.kind} {ad.id or '-'} ({ad.system or '-'}){place}"), "green")


def note_text(note: MergeNote) -> Text:
    """Tell what one wrapper gave to an ad."""
    text = f"{note.wrapper_id or '-'} ({note.system or '-'}): merged {_counted(note.taken)}"
    if +note.dropped:
        text += f"; dropped {_counted(note.dropped)}"
    return Text(printable(text))


def report_text(report: Report) -> Text:
    """Tell one failure, and how many would hear of it."""
    told = f"the proxy would tell {len(report.uris)} <Error> URIs"
    return Text(f"{report.code}: {printable(report.reason)}; {told}", "yellow")


def printable(text: str) -> str:
    """Write *text* of a third party so that it cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in (+counts).items()) or "nothing"
