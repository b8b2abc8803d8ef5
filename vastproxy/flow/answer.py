"""
What is answered: the outcome of asking, and the writing of it.

Everything here is decided from the outcome alone: nothing waits, and nobody is told.
"""

from dataclasses import dataclass, field, replace

from vastproxy.errors import VastError
from vastproxy.flow.routing import Route
from vastproxy.model import AdResponse
from vastproxy.observe.trace import Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.session import VastSession
from vastproxy.upstream.resolver import Entry, Resolution
from vastproxy.vast import serialise
from vastproxy.vast.codes import VastCode
from vastproxy.vast.document import VastDocument
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
    """What came of asking the route's upstreams, so far."""

    session: VastSession | None = None
    """Whose ads are answered; None: nobody has any."""
    ads: int = 0
    """How many."""
    unwrapped: Unwrapped | None = None
    """The ads, their wrappers merged into them; None also where a document is passed through."""
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

    def take(self, session: VastSession, resolution: Resolution) -> bool:
        """Add what one upstream gave; True if that is an ad, merged and ready."""
        unwrapped = resolution.unwrapped
        if unwrapped is None:
            return False
        self.reports += [(session, each) for each in unwrapped.reports]
        self.unreported += unwrapped.unreported
        self.versions.append(unwrapped.entry.version)
        if unwrapped.ads:
            return self._merge(session, unwrapped)
        if not unwrapped.entry.ads:
            self.no_ads.append((session, unwrapped.entry))
        return False

    def _merge(self, session: VastSession, unwrapped: Unwrapped) -> bool:
        try:
            self.notes = merge(unwrapped)
        except VastError as error:
            self._refuse(session, unwrapped, str(error))
            return False
        self.session, self.unwrapped, self.ads = session, unwrapped, len(unwrapped.ads)
        return True

    def _refuse(self, session: VastSession, unwrapped: Unwrapped, reason: str) -> None:
        """Give up ads that cannot be merged, and let everybody on their paths be told."""
        # Each once: a wrapper's thousands of errors are not read again for each ad of a pod.
        levels = {id(each): each for ad in unwrapped.ads for each in (*ad.wrappers, ad.inline)}
        documents = {id(each.document): each.document for each in levels.values()}
        uris = [uri for document in documents.values() for uri in document.errors]
        uris += [uri for ad in levels.values() for uri in ad.errors]
        told = tuple(dict.fromkeys(uris))
        self.reports.append((session, Report(VastCode.WRAPPER, told, reason)))

    def pass_on(self, session: VastSession, document: VastDocument) -> bool:
        """Add a document that is to be passed through; True if it has an ad."""
        ads = len(document.ads)
        if not ads:
            self.no_ads.append((session, document))
            return False
        self.session, self.ads = session, ads
        return True


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
    if outcome.unwrapped is None or outcome.session is None:
        return _without_ads(route, outcome)
    document = serialise.assemble(outcome.unwrapped)
    outcome.session.upstream.fill_media(document, outcome.session)
    return _filled(route, serialise.to_bytes(document), outcome.session.macros)


def passed(route: Route, session: VastSession, entry: Entry) -> bytes:
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
        hops=len(hops),
        upstream=outcome.session.upstream.name if outcome.session else "",
        flags=flags(trace, outcome),
        timings=tuple([(f"hop{hop.number}", hop.milliseconds) for hop in hops]),
    )


def flags(trace: Trace, outcome: Outcome) -> tuple[str, ...]:
    """Say in a few fixed words what happened to a request, for the access log."""
    words: dict[str, None] = {}
    if outcome.session is None:
        words["no_ad"] = None
    if len({hop.upstream for hop in trace.hops}) > 1:
        words["fallback"] = None
    for hop in trace.hops:
        if hop.code is not None:
            words[_FLAGS.get(VastCode(hop.code), "failed")] = None
        if hop.repairs:
            words["repaired"] = None
    for _, report in outcome.reports:
        words[_FLAGS.get(VastCode(report.code), "failed")] = None
    return tuple(words)
