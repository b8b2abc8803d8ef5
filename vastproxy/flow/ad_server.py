"""
The way of one ad request. START READING HERE.

A request has found its route. A session is opened for it; the route's upstreams are asked in
turn, each with the wrappers behind it, until one has an ad; what came is merged into one
document of InLines, or an empty one. Failures on the way are told to the ad servers afterwards.
"""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vastproxy.errors import UpstreamError, VastError
from vastproxy.flow.answer import Outcome, bounded, passed, response, to_tell, written
from vastproxy.flow.reporter import ErrorReporter, Ping
from vastproxy.flow.routing import Route, cookies, forwarded, found, macro_values, viewer_of
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.trace import Hop, Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import Request, VastSession
from vastproxy.upstream.resolver import VastChainResolver
from vastproxy.upstream.upstream import VastUpstream
from vastproxy.vast.unwrap import Report

WORTH_ASKING = 0.02
"""Seconds of the deadline below which the next upstream is not asked any more."""


@dataclass(frozen=True, slots=True)
class Explained:
    """An answer, and how it came about."""

    body: bytes
    hops: tuple[Hop, ...]
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
            body = written(route, outcome)
        self._report(route, outcome)
        return response(context, trace, outcome, body)

    async def explain(
        self, route: Route, request: AdRequest, document: bytes | None = None
    ) -> "Explained":
        """
        Answer as :meth:`answer` does, and tell all; report nothing.

        With a *document*, the chain starts there, and nobody is asked for the first one.
        """
        trace = Trace(detailed=True)
        outcome = await self._ask(route, request, self._context(route, request), trace, document)
        return Explained(written(route, outcome), tuple(trace.ordered()), outcome)

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
        deadline = (clock() if request.received is None else request.received) + route.deadline
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
            if outcome.take(session, resolution):
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
            if outcome.pass_on(session, entry.document):
                return passed(route, session, entry), outcome
        return written(route, outcome), outcome

    def _report(self, route: Route, outcome: Outcome) -> None:
        """Tell ad servers what failed, but for what the answer leaves to the player."""
        reports, cut = bounded(to_tell(route, outcome))
        pings = (ping for each in reports for ping in _pings(*each))
        self._reporter.send(pings, outcome.unreported + cut)

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
