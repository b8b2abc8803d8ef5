"""
What is answered: the outcome of asking, and the writing of it.

Everything here is decided from the outcome alone: nothing waits, and nobody is told.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from vastproxy.errors import VastError
from vastproxy.flow.routing import Route
from vastproxy.model import AdResponse
from vastproxy.observe.trace import Choice, Hop, Trace, What
from vastproxy.session.context import SessionContext
from vastproxy.session.session import VastSession
from vastproxy.upstream.resolver import Entry, Resolution
from vastproxy.vast import serialise
from vastproxy.vast.codes import VastCode
from vastproxy.vast.document import Ad, VastDocument
from vastproxy.vast.macros import MACROS, Context, Macros, fill_everywhere, replace_few
from vastproxy.vast.merge import MergeNote, merge
from vastproxy.vast.parse import is_plain
from vastproxy.vast.unwrap import MAX_REPORTED, Report, Unwrapped

FIRST_WITH_ROOT_ERRORS = (3, 0)
"""From this version ``<Error>`` may stand in a document without ads."""

_FLAGS = {
    VastCode.XML_PARSE: "bad_xml",
    VastCode.SCHEMA: "bad_vast",
    VastCode.VERSION: "old_vast",
    VastCode.CATEGORY_BLOCKED: "blocked_category",
    VastCode.NOT_SERVED: "not_served",
    VastCode.WRAPPER: "wrapper_refused",
    VastCode.WRAPPER_TIMEOUT: "upstream_failed",
    VastCode.WRAPPER_LIMIT: "wrapper_limit",
    VastCode.NO_AD: "no_fill",
}

_REFUSALS: Mapping[str, What] = {
    "breaker": "breaker",
    "rate_limit": "rate_limit",
    "busy": "busy",
}
"""What the proxy's own guards say."""

_REFUSAL_FLAGS = {
    "breaker": "breaker_open",
    "rate_limit": "rate_limited",
    "busy": "upstream_busy",
}

_PLAIN: frozenset[What] = frozenset({"ad", "no_ad", "failed"})
"""What the rest of the access line tells of a single upstream."""

LAST_RESORT = "fallback"
"""Whose ads they are called where nobody had any, and the route's own are answered."""

# What fill_macros: all puts into trackers. Playheads and the like only the player knows.
_TOLD_TO_TRACKERS = (
    "TIMESTAMP",
    "CACHEBUSTING",
    "CORRELATOR",
    "TRANSACTIONID",
    "DEVICEIP",
    "DEVICEUA",
    "PAGEURL",
    "DOMAIN",
)


@dataclass(slots=True)
class Outcome:
    """What came of asking one upstream, or all of a route's."""

    session: VastSession | None = None
    """Whose ads are answered; None: nobody has any."""
    ads: int = 0
    """How many."""
    unwrapped: Unwrapped | None = None
    """The ads, their wrappers merged into them; None also where a document is passed through."""
    passed: Entry | None = None
    """The document that is passed through..."""
    passed_ads: Sequence[Ad] = ()
    """...and its ads, the same that were judged."""
    last_resort: VastDocument | None = None
    """The route's own document, where nobody else had an ad."""
    notes: tuple[tuple[MergeNote, ...], ...] = ()
    """What each wrapper gave to each ad, outermost wrapper first."""
    reports: "Telling" = field(default_factory=list)
    """Failures on the way, and whose they were."""
    unreported: int = 0
    """<Error> URIs beyond what is told of one ad request."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """Of the entry documents."""
    no_ads: list[tuple[VastSession, VastDocument]] = field(default_factory=list)
    """Entry documents that were empty from the start: their <Error>s are the player's to call."""
    what: What = "no_ad"
    """What it is called in the waterfall..."""
    detail: str = ""
    """...and why it came to that, in words."""

    @classmethod
    def of(cls, session: VastSession, resolution: Resolution) -> Self:
        """Say what one upstream gave: its ads are merged, and ready."""
        unwrapped = resolution.unwrapped
        if unwrapped is None:
            return cls.failed(resolution.code, resolution.problem, resolution.refused)
        outcome = cls(
            reports=[(session, each) for each in unwrapped.reports],
            unreported=unwrapped.unreported,
            versions=[unwrapped.entry.version],
        )
        if unwrapped.ads:
            outcome._merge(session, unwrapped)
        else:
            outcome.detail = "; ".join(dict.fromkeys(each.reason for each in unwrapped.reports))
            if not unwrapped.entry.ads:
                outcome.no_ads.append((session, unwrapped.entry))
        return outcome

    @classmethod
    def of_entry(cls, session: VastSession, entry: Entry, ads: Sequence[Ad]) -> Self:
        """Say what a document with *ads* is, that is to be passed through."""
        if ads:
            return cls(session, len(ads), passed=entry, passed_ads=ads, what="ad")
        return cls(no_ads=[(session, entry.document)])

    @classmethod
    def failed(cls, code: int | None, problem: str, refused: str) -> Self:
        """Say what it is that an upstream gave no document; *refused* is what kept us from it."""
        failed: What = "no_ad" if code == VastCode.NO_AD else "failed"
        return cls(what=_REFUSALS.get(refused, failed), detail=problem)

    def _merge(self, session: VastSession, unwrapped: Unwrapped) -> None:
        try:
            self.notes = merge(unwrapped)
        except VastError as error:
            self._refuse(session, unwrapped, str(error))
            return
        self.session, self.unwrapped, self.ads = session, unwrapped, len(unwrapped.ads)
        self.what = "ad"

    def _refuse(self, session: VastSession, unwrapped: Unwrapped, reason: str) -> None:
        """Give up ads that cannot be merged, and let everybody on their paths be told."""
        # Each once: a wrapper's thousands of errors are not read again for each ad of a pod.
        levels = {id(each): each for ad in unwrapped.ads for each in (*ad.wrappers, ad.inline)}
        documents = {id(each.document): each.document for each in levels.values()}
        uris = [uri for document in documents.values() for uri in document.errors]
        uris += [uri for ad in levels.values() for uri in ad.errors]
        told = tuple(dict.fromkeys(uris))
        self.reports.append((session, Report(VastCode.WRAPPER, told, reason)))
        self.what, self.detail = "failed", reason

    def add(self, other: "Outcome") -> None:
        """Add what came to nothing at another upstream: failures, and empty documents."""
        self.reports += other.reports
        self.unreported += other.unreported
        self.versions += other.versions
        self.no_ads += other.no_ads


def together(outcomes: Iterable[Outcome], winner: Outcome | None) -> Outcome:
    """Put *outcomes* into one, in their order; the ads are those of the *winner*."""
    parts = list(outcomes)
    if parts == [winner]:
        return parts[0]
    whole = Outcome() if winner is None else replace(winner, reports=[], versions=[], no_ads=[])
    whole.unreported = 0
    for each in parts:
        whole.add(each)
    return whole


Telling = list[tuple[VastSession, Report]]
"""Failures, and the sessions whose they are."""


def bounded(reports: Telling) -> tuple[Telling, int]:
    """Cut *reports* to MAX_REPORTED URIs in all; give also how many were cut."""
    kept: Telling = []
    room, cut = MAX_REPORTED, 0
    for session, report in reports:
        uris = report.uris[:room]
        room -= len(uris)
        cut += len(report.uris) - len(uris)
        kept.append((session, replace(report, uris=uris)))
    return kept, cut


def to_tell(route: Route, outcome: Outcome) -> Telling:
    """Give the failures that the proxy reports, and not the player."""
    if outcome.session is not None:
        # Of the upstreams that had nothing, the player never hears.
        return outcome.reports + [
            (session, Report(VastCode.NO_AD, tuple(document.errors), "no ad"))
            for session, document in outcome.no_ads
        ]
    return [] if left_to_player(route, outcome) else outcome.reports


def left_to_player(route: Route, outcome: Outcome) -> bool:
    """
    Whether the player is handed the ``<Error>`` URIs of chains that gave nothing.

    VAST 2.0 has no place for them: then the proxy calls them whatever the route says.
    """
    return (
        route.error_reporting == "player"
        and outcome.session is None
        and all(each >= FIRST_WITH_ROOT_ERRORS for each in outcome.versions)
    )


def written(route: Route, outcome: Outcome) -> bytes:
    """Write the answer."""
    session = outcome.session
    if session is None:
        return _without_ads(route, outcome)
    if outcome.passed is not None:
        return _passed(route, session, outcome.passed)
    document = outcome.last_resort
    if document is None:
        assert outcome.unwrapped is not None  # noqa: S101 - ads are resolved, or passed through
        document = serialise.assemble(outcome.unwrapped)
    session.upstream.fill_media(document, session)
    return _filled(route, serialise.to_bytes(document), session.macros)


def _passed(route: Route, session: VastSession, entry: Entry) -> bytes:
    """Write what an upstream answered, byte for byte but for macros."""
    faithful = not entry.document.repairs and is_plain(entry.body)
    body = entry.body if faithful else serialise.to_bytes(entry.document)
    return _filled(route, session.upstream.filled_known(body, session), session.macros)


def _without_ads(route: Route, outcome: Outcome) -> bytes:
    """Write an empty document, with the errors that are the player's to call."""
    if len(outcome.no_ads) == 1 and not outcome.reports:
        session, document = outcome.no_ads[0]
        return _filled(route, serialise.to_bytes(document), session.macros)
    errors = [uri for _, document in outcome.no_ads for uri in document.errors]
    if left_to_player(route, outcome):
        errors += [
            session.macros.fill_code(uri, report.code)
            for session, report in outcome.reports
            for uri in report.uris
        ]
    body = serialise.empty(errors=errors)
    known = [session for session, _ in (*outcome.no_ads, *outcome.reports)]
    return _filled(route, body, known[0].macros) if known else body


def _filled(route: Route, body: bytes, macros: Macros) -> bytes:
    """Fill what stands for the whole ad request, wherever it is; all that is known if asked."""
    if b"[" not in body:
        return body
    if route.fill_macros == "all":
        own = [name for name, _ in route.macros if MACROS[name].context & Context.TRACKING]
        names = [name for name in (*_TOLD_TO_TRACKERS, *own) if macros.get(name) is not None]
        return fill_everywhere(body, {each.encode(): _bytes(macros, each) for each in names})
    few = [(f"[{name}]".encode(), name) for name in ("CORRELATOR", "TRANSACTIONID")]
    return replace_few(body, [(key, _bytes(macros, name)) for key, name in few if key in body])


def _bytes(macros: Macros, name: str) -> bytes:
    return (macros.get(name) or "").encode()


def response(context: SessionContext, trace: Trace, outcome: Outcome, body: bytes) -> AdResponse:
    """Put the answer's bytes together with what is told about it."""
    hops = trace.ordered()
    return AdResponse(
        body=body,
        request_id=context.request_id,
        ads=outcome.ads,
        hops=sum(bool(each.exchanges) or not (each.refused or each.cache) for each in hops),
        upstream=_whose(outcome),
        flags=flags(trace, outcome),
        timings=tuple([(f"hop{hop.number}", hop.milliseconds) for hop in hops]),
        waterfall=_steps(trace),
        choices=tuple([(each.upstream, each.what) for each in trace.choices]),
        breaker=tuple([str(each) for each in trace.changes]),
        cache=tuple([f"{each.upstream}: {each.cache}" for each in hops if each.cache]),
        cache_status=tuple(trace.cache_status),
    )


def _whose(outcome: Outcome) -> str:
    if outcome.last_resort is not None:
        return LAST_RESORT
    return outcome.session.upstream.name if outcome.session else ""


def _steps(trace: Trace) -> tuple[str, ...]:
    if not is_told(trace.choices):
        return ()
    return tuple([f"{each.upstream}:{each.what}" for each in trace.choices])


def is_told(choices: Sequence[Choice]) -> bool:
    """Whether there was more to a waterfall than one upstream that was asked, and answered."""
    return len(choices) > 1 or any(each.what not in _PLAIN for each in choices)


def _is_kept(hop: Hop) -> bool:
    """Whether the hop's document had been kept, and nobody was asked for it."""
    return hop.cache.startswith("hit")


def flags(trace: Trace, outcome: Outcome) -> tuple[str, ...]:
    """Say in a few fixed words what happened to a request, for the access log."""
    words: dict[str, None] = {}
    if outcome.session is None:
        words["no_ad"] = None
    if len({hop.upstream for hop in trace.hops}) > 1:
        words["fallback"] = None
    if outcome.last_resort is not None:
        words["last_resort"] = None
    for hop in trace.hops:
        _add_flags(words, hop)
    for _, report in outcome.reports:
        words[_FLAGS.get(VastCode(report.code), "failed")] = None
    if any(each.what == "late" for each in trace.choices):
        words["soft_timeout"] = None
    if trace.shadowed:
        words["shadow_breaker_open"] = None
    return tuple(words)


def _add_flags(words: dict[str, None], hop: Hop) -> None:
    if hop.refused:
        words[_REFUSAL_FLAGS.get(hop.refused, "failed")] = None
    elif hop.code is not None:
        words[_FLAGS.get(VastCode(hop.code), "failed")] = None
    if hop.repairs:
        words["repaired"] = None
    if _is_kept(hop):
        words["cached"] = None
    elif hop.cache.startswith("stale"):
        words["stale"] = None
