"""
The way of one ad request. START READING HERE.

A request has found its route. A session is opened for it; the route's upstreams are asked in
turn, each with the wrappers behind it, until one has an ad; what came is merged into one
document of InLines, or an empty one. Failures on the way are told to the ad servers afterwards.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vastproxy.errors import UpstreamError, VastError
from vastproxy.flow.reporter import ErrorReporter, Ping
from vastproxy.flow.routing import Route, cookies, forwarded, found, macro_values, viewer_of
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.trace import Hop, Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import Request, VastSession
from vastproxy.upstream.resolver import Entry, Resolution, VastChainResolver
from vastproxy.upstream.upstream import VastUpstream
from vastproxy.vast import serialise
from vastproxy.vast.codes import VastCode
from vastproxy.vast.document import VastDocument
from vastproxy.vast.macros import MACROS, Context, Macros, fill_everywhere, replace_few
from vastproxy.vast.merge import MergeNote, merge
from vastproxy.vast.parse import is_plain
from vastproxy.vast.unwrap import MAX_REPORTED, Report, Unwrapped

WORTH_ASKING = 0.02
"""Seconds of the deadline below which the next upstream is not asked any more."""

FIRST_WITH_ROOT_ERRORS = (3, 0)
"""From this version ``<Error>`` may stand in a document without ads."""

_FLAGS = {
    VastCode.XML_PARSE: "bad_xml",
    VastCode.SCHEMA: "bad_vast",
    VastCode.VERSION: "old_vast",
    VastCode.CATEGORY_BLOCKED: "blocked_category",
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
    """What came of asking the route's upstreams."""

    unwrapped: Unwrapped | None = None
    """The first that has ads, merged into no document yet."""
    session: VastSession | None = None
    """The session that it came from."""
    reports: list[tuple[VastSession, Report]] = field(default_factory=list)
    """Failures on the way, and whose they were."""
    unreported: int = 0
    """<Error> URIs beyond what is told of one ad request."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """Of the entry documents."""
    no_ads: list[tuple[VastSession, VastDocument]] = field(default_factory=list)
    """Entry documents that were empty from the start: their <Error>s are the player's to call."""


@dataclass(frozen=True, slots=True)
class Explained:
    """An answer, and how it came about."""

    body: bytes
    hops: tuple[Hop, ...]
    notes: tuple[tuple[MergeNote, ...], ...]
    """What each wrapper gave to each ad, outermost wrapper first."""
    outcome: Outcome


class AdServer:
    """
    Answers ad requests.

    *factory* makes sessions, *reporter* tells ad servers of failures.
    """

    def __init__(self, factory: SessionFactory, reporter: ErrorReporter) -> None:
        self._factory = factory
        self._reporter = reporter

    async def answer(self, route: Route, request: AdRequest) -> AdResponse:
        """Answer *request* by *route*: always a valid document, empty where there is no ad."""
        context = self._context(route, request)
        trace = Trace()
        if route.mode == "passthrough":
            body, outcome = await self._pass_through(route, request, context, trace)
        else:
            outcome = await self._ask(route, request, context, trace)
            body, _ = written(route, outcome)
        self._report(route, outcome)
        return _response(context, trace, outcome, body)

    async def explain(
        self, route: Route, request: AdRequest, document: bytes | None = None
    ) -> "Explained":
        """
        Answer as :meth:`answer` does, and tell all; report nothing.

        With a *document*, the chain starts there, and nobody is asked for the first one.
        """
        trace = Trace(detailed=True)
        outcome = await self._ask(route, request, self._context(route, request), trace, document)
        body, notes = written(route, outcome)
        return Explained(body, tuple(trace.ordered()), notes, outcome)

    def _context(self, route: Route, request: AdRequest) -> SessionContext:
        taken = cookies(request.header("cookie"), route.forward_cookies)
        return self._factory.context(
            request_id=request.request_id,
            correlator=found(route.correlator, request) if route.correlator else "",
            cookies=taken if route.forward_cookies else None,
        )

    def _sessions(
        self, route: Route, request: AdRequest, context: SessionContext, trace: Trace
    ) -> Iterable[VastSession]:
        """Open a session at each upstream in turn, while the deadline leaves time to ask."""
        jar = self._factory.jar()
        clock = asyncio.get_running_loop().time
        deadline = (request.received or clock()) + route.deadline
        viewer = viewer_of(route, request)
        for upstream in route.upstreams:
            if deadline - clock() < WORTH_ASKING or trace.begun >= route.policy.max_fetches:
                return
            facts = _facts(route, request, viewer, upstream, deadline)
            yield self._factory.create_session(
                context,
                upstream,
                request=facts,
                jar=jar,
                trace=trace,
                timestamp=upstream.settings.timestamp,
            )

    async def _ask(
        self,
        route: Route,
        request: AdRequest,
        context: SessionContext,
        trace: Trace,
        document: bytes | None = None,
    ) -> Outcome:
        """Ask upstreams until one has an ad; the first answer may be a *document* at hand."""
        resolver = VastChainResolver(route.policy)
        outcome = Outcome()
        for session in self._sessions(route, request, context, trace):
            async with session:
                resolution = await resolver.resolve(session, document=document)
            if _take(outcome, session, resolution):
                break
        return outcome

    async def _pass_through(
        self, route: Route, request: AdRequest, context: SessionContext, trace: Trace
    ) -> tuple[bytes, Outcome]:
        """Give the first document that has ads, with its macros filled."""
        outcome = Outcome()
        resolver = VastChainResolver(route.policy)
        for session in self._sessions(route, request, context, trace):
            async with session:
                try:
                    entry = await resolver.enter(session)
                except (UpstreamError, VastError):
                    continue  # it is in the trace
            if entry.document.ads:
                outcome.session = session
                outcome.unwrapped = Unwrapped(entry.document, (), ())
                return passed(route, session, entry), outcome
            outcome.no_ads.append((session, entry.document))
        return written(route, outcome)[0], outcome

    def _report(self, route: Route, outcome: Outcome) -> None:
        """Tell ad servers what failed, but for what the answer leaves to the player."""
        if outcome.unwrapped is None and left_to_player(route, outcome):
            return
        reports = list(outcome.reports)
        if outcome.unwrapped is not None:
            reports += [
                (session, Report(VastCode.NO_AD, tuple(document.errors), "no ad"))
                for session, document in outcome.no_ads
            ]
        pings = (ping for each in reports for ping in _pings(*each))
        self._reporter.send(pings, outcome.unreported)

    def __repr__(self) -> str:
        return f"<AdServer {self._reporter!r}>"


def _pings(session: VastSession, report: Report) -> Iterator[Ping]:
    """Fill the URIs of *report*."""
    for uri in report.uris:
        url = session.upstream.filled_error(uri, session, report.code)
        yield Ping(url, session.device_headers, session.context.request_id)


def _facts(
    route: Route, request: AdRequest, viewer: str, upstream: VastUpstream, deadline: float
) -> Request:
    return Request(
        request,
        viewer=viewer,
        forward_query=forwarded(route, request.query.raw, upstream.taken_parameters),
        correlator_params=route.correlator_params,
        macros=macro_values(route, request, viewer) if route.macros else {},
        deadline=deadline,
    )


def _take(outcome: Outcome, session: VastSession, resolution: Resolution) -> bool:
    """Add what one upstream gave to *outcome*; True if that is an ad."""
    unwrapped = resolution.unwrapped
    if unwrapped is None:
        return False
    outcome.reports += [(session, each) for each in unwrapped.reports]
    outcome.unreported += unwrapped.unreported
    outcome.versions.append(unwrapped.entry.version)
    if unwrapped.ads:
        outcome.unwrapped, outcome.session = unwrapped, session
        return True
    if not unwrapped.entry.ads:
        outcome.no_ads.append((session, unwrapped.entry))
    return False


def left_to_player(route: Route, outcome: Outcome) -> bool:
    """
    Whether the player is handed the ``<Error>`` URIs of chains that gave nothing.

    VAST 2.0 has no place for them: then the proxy calls them whatever the route says.
    """
    return (
        route.error_reporting == "player"
        and outcome.unwrapped is None
        and all(each >= FIRST_WITH_ROOT_ERRORS for each in outcome.versions)
    )


def written(route: Route, outcome: Outcome) -> tuple[bytes, tuple[tuple[MergeNote, ...], ...]]:
    """Write the answer, and say what was merged into each ad."""
    if outcome.unwrapped is None or outcome.session is None:
        return _without_ads(route, outcome), ()
    try:
        notes = merge(outcome.unwrapped)
    except VastError as error:
        _drop_ads(outcome, str(error))
        return _without_ads(route, outcome), ()
    document = serialise.assemble(outcome.unwrapped)
    outcome.session.upstream.fill_media(document, outcome.session)
    return _filled(route, serialise.to_bytes(document), outcome.session.macros), notes


def _drop_ads(outcome: Outcome, reason: str) -> None:
    """Give up the ads of *outcome*, for *reason*, and let everybody on their paths be told."""
    if outcome.unwrapped is not None and outcome.session is not None:
        uris = [
            uri
            for ad in outcome.unwrapped.ads
            for each in (*ad.wrappers, ad.inline)
            for uri in each.errors
        ]
        told = tuple(dict.fromkeys(uris))
        outcome.unreported += len(told[MAX_REPORTED:])
        report = Report(VastCode.WRAPPER, told[:MAX_REPORTED], reason)
        outcome.reports.append((outcome.session, report))
    outcome.unwrapped = outcome.session = None


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


def _response(context: SessionContext, trace: Trace, outcome: Outcome, body: bytes) -> AdResponse:
    unwrapped = outcome.unwrapped
    hops = trace.ordered()
    return AdResponse(
        body=body,
        request_id=context.request_id,
        ads=len(unwrapped.ads or unwrapped.entry.ads) if unwrapped else 0,
        hops=len(hops),
        upstream=outcome.session.upstream.name if outcome.session else "",
        flags=flags(trace, outcome),
        timings=tuple([(f"hop{hop.number}", hop.milliseconds) for hop in hops]),
    )


def flags(trace: Trace, outcome: Outcome) -> tuple[str, ...]:
    """Say in a few fixed words what happened to a request, for the access log."""
    words: dict[str, None] = {}
    if outcome.unwrapped is None:
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
