"""
The way of one ad request. START READING HERE.

A request has found its route. A session is opened for it; the route's upstreams are asked in
turn, each with the wrappers behind it, until one has an ad that caps and budget let through; what
came is merged into one document of InLines, or an empty one. Failures on the way are told to the
ad servers afterwards.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Self

from vastproxy.errors import StateBackendError, UpstreamError, VastError
from vastproxy.flow.accounting import Accounting
from vastproxy.flow.admission import Admission
from vastproxy.flow.answer import Outcome, bounded, passed, response, to_tell, written
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.embedded import Embedded
from vastproxy.flow.reporter import ErrorReporter, Ping
from vastproxy.flow.routing import Route, cookies, forwarded, found, macro_values, viewer_of
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.trace import Hop, Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.factory import UID, SessionFactory
from vastproxy.session.session import Request, VastSession
from vastproxy.session.viewer_cookies import ViewerCookies
from vastproxy.state.base import StateBackend
from vastproxy.upstream.resolver import MAX_JUDGED, VastChainResolver
from vastproxy.upstream.upstream import VastUpstream
from vastproxy.vast.beacons import add_impression, with_impressions
from vastproxy.vast.unwrap import Report, ResolvedAd

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

    *factory* makes sessions, *reporter* tells ad servers of failures, *accounting* is asked where
    a route has caps, a budget, or cookies to keep.

    Code that has no routes gives *primary_upstream* instead, and what it likes of
    *fallback_upstream*, *state_backend* (None: in memory) and *factory*; then :meth:`serve_ad`
    serves. The upstreams and the state stay its own, to be closed after the ad server.
    """

    def __init__(
        self,
        factory: SessionFactory | None = None,
        reporter: ErrorReporter | None = None,
        accounting: Accounting | None = None,
        *,
        primary_upstream: VastUpstream | None = None,
        fallback_upstream: VastUpstream | None = None,
        state_backend: StateBackend | None = None,
    ) -> None:
        self._embedded: Embedded | None = None
        if primary_upstream is not None:
            upstreams = (primary_upstream, fallback_upstream)
            asked = [each for each in upstreams if each is not None]
            self._embedded = made = Embedded(asked, state_backend, factory)
            factory, reporter, accounting = made.factory, made.reporter, made.accounting()
        if factory is None or reporter is None:
            raise TypeError("an ad server needs primary_upstream, or factory and reporter")
        self._factory = factory
        self._reporter = reporter
        self._accounting = accounting

    @property
    def beacons(self) -> Beacons | None:
        """Who takes what the ads of its answers send."""
        return self._accounting.beacons if self._accounting else None

    async def answer(self, route: Route, request: AdRequest) -> AdResponse:
        """Answer *request* by *route*: always a valid document, empty where there is no ad."""
        context = self._context(route, request)
        return await self._serve(_Asked(route, request, context, viewer_of(route, request)))

    async def serve_ad(
        self,
        user_id: str,
        device_id: str,
        campaign_id: str,
        budget_limit: Decimal | float | str,
        frequency_cap: int = 3,
        *,
        price: Decimal | float | str | None = None,
    ) -> str | None:
        """
        Give a document of InLine ads for a viewer; None where none may be shown, or none came.

        A viewer sees *frequency_cap* ads in an hour (0: none; nobody is counted without a
        *user_id*). The campaign spends *budget_limit*: for each ad what that says it costs, else
        *price*, in units of currency for this one ad (at a CPM of 2.50 it is 0.0025); None: such
        an ad costs nothing. Both are counted now, as no beacon can come back.

        Where the state is away, ads are served, and counted when it is back. Raises ValueError
        for what is no amount, and StateBackendError for a state that is there and not usable.
        """
        if self._embedded is None:
            raise RuntimeError(f"{self!r} has routes (make one with primary_upstream to call this)")
        route = self._embedded.route(campaign_id, budget_limit, frequency_cap, price)
        ids = {UID: user_id, "device_id": device_id}
        context = self._factory.context(cookies={name: each for name, each in ids.items() if each})
        await self._embedded.open()
        answer = await self._serve(_Asked(route, AdRequest(route.path), context, user_id))
        self._embedded.tell(campaign_id, answer)
        return answer.body.decode() if answer.ads else None

    async def close(self) -> None:
        """Let reports end that are on their way; whoever uses the library calls it."""
        if self._embedded is not None:
            await self._embedded.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _serve(self, asked: "_Asked") -> AdResponse:
        if self._accounting is None or not asked.route.counts:
            return await self._answer(asked)
        terms, deadline = asked.route.terms, asked.deadline
        async with self._accounting.admission(terms, asked.viewer, deadline) as asked.admission:
            await self._load_cookies(self._accounting, asked)
            answer = await self._answer(asked)
            self._save_cookies(self._accounting, asked)
        return answer

    async def _answer(self, asked: "_Asked") -> AdResponse:
        if asked.route.mode == "passthrough":
            body, outcome = await self._pass_through(asked)
        else:
            outcome = await self._ask(asked)
            await self._book(asked, outcome)
            body = written(asked.route, outcome)
        self._report(asked.route, outcome)
        told = response(asked.context, asked.trace, outcome, body)
        admission = asked.admission
        if admission is None:
            return told
        flags = (*told.flags, *admission.flags)
        return replace(told, flags=flags, refused=tuple(admission.reasons))

    async def explain(
        self, route: Route, request: AdRequest, document: bytes | None = None
    ) -> "Explained":
        """
        Answer as :meth:`answer` does, and tell all; report nothing.

        With a *document*, the chain starts there, and nobody is asked for the first one.
        """
        context, viewer = self._context(route, request), viewer_of(route, request)
        asked = _Asked(route, request, context, viewer, Trace(detailed=True))
        outcome = await self._ask(asked, document)
        return Explained(written(route, outcome), tuple(asked.trace.ordered()), outcome)

    def _context(self, route: Route, request: AdRequest) -> SessionContext:
        taken = cookies(request.header("cookie"), route.forward_cookies)
        return self._factory.context(
            request_id=request.request_id,
            correlator=found(route.correlator, request) if route.correlator else "",
            cookies=taken if route.forward_cookies else None,
        )

    def _sessions(self, asked: "_Asked") -> Iterable[VastSession]:
        """Open a session at each upstream in turn, while the deadline leaves time to ask."""
        route, jar = asked.route, self._factory.jar()
        clock, deadline = asyncio.get_running_loop().time, asked.deadline
        for upstream in route.upstreams:
            spent = asked.trace.begun >= route.policy.max_fetches
            if deadline - clock() < WORTH_ASKING or spent:
                return
            yield self._factory.open_session(
                asked.context,
                upstream,
                request=_facts(asked, upstream),
                jar=jar,
                trace=asked.trace,
                timestamp=upstream.settings.timestamp,
            )

    async def _ask(self, asked: "_Asked", document: bytes | None = None) -> Outcome:
        """Ask upstreams until one has an ad; the first answer may be a *document* at hand."""
        resolver = VastChainResolver(asked.route.policy)
        outcome = Outcome()
        judge = asked.admission.judge if asked.admission else None
        for session in self._sessions(asked):
            if not await asked.may_ask(session):
                continue
            async with session:
                resolution = await resolver.resolve(session, document=document, judge=judge)
                came = resolution.unwrapped
                session.came(None if came is None else len(came.ads))
            if outcome.take(session, resolution):
                break
        return outcome

    async def _book(self, asked: "_Asked", outcome: Outcome) -> None:
        """Take it that the ads of *outcome* are answered: count them, or give them beacons."""
        if self._accounting is None or asked.admission is None or outcome.unwrapped is None:
            return
        ads = outcome.unwrapped.ads
        waiting = await asked.admission.serve([each.inline for each in ads])
        for ad, holds in zip(ads, waiting, strict=True):
            if url := self._accounting.beacons.url(asked.request.base, holds):
                add_impression(ad, url)

    async def _pass_through(self, asked: "_Asked") -> tuple[bytes, Outcome]:
        """Give the first document that has ads, with its macros filled."""
        outcome = Outcome()
        resolver = VastChainResolver(asked.route.policy)
        for session in self._sessions(asked):
            if not await asked.may_ask(session):
                continue
            async with session:
                try:
                    entry = await resolver.enter(session)
                except (UpstreamError, VastError):
                    session.came(None)
                    continue  # it is in the trace
                session.came(len(entry.document.ads))
            ads = [ResolvedAd(each, (), None) for each in entry.document.ads]
            # What is passed through cannot be cut: one ad too many is a document too many.
            if asked.admission and not await self._all_admitted(asked.admission, ads):
                continue
            if outcome.pass_on(session, entry.document):
                body = passed(asked.route, session, entry)
                return await self._marked(asked, ads, body), outcome
        return written(asked.route, outcome), outcome

    @staticmethod
    async def _all_admitted(admission: Admission, ads: Sequence[ResolvedAd]) -> bool:
        return len(ads) <= MAX_JUDGED and not await admission.judge(ads)

    async def _marked(self, asked: "_Asked", ads: Sequence[ResolvedAd], body: bytes) -> bytes:
        """Put beacons into a document that is passed through."""
        if self._accounting is None or asked.admission is None:
            return body
        waiting = await asked.admission.serve([each.inline for each in ads])
        beacons, base = self._accounting.beacons, asked.request.base
        marked = with_impressions(body, [beacons.url(base, holds) or None for holds in waiting])
        # An ad without a place for its beacon is counted as shown: nothing is served uncounted.
        left_out = [hold for at in marked.left_out for hold in waiting[at]]
        if left_out:
            await self._accounting.state.confirm(left_out)
        return marked.body

    async def _load_cookies(self, accounting: Accounting, asked: "_Asked") -> None:
        """Fetch what is kept of the viewer's cookies; without the state there are none."""
        cookies = accounting.cookies(asked.viewer, asked.route.cookie_ttl)
        if cookies is not None:
            with suppress(StateBackendError):
                await cookies.load()
                asked.cookies = cookies

    def _save_cookies(self, accounting: Accounting, asked: "_Asked") -> None:
        """Keep, after the answer, what ad servers have set."""
        if asked.cookies is not None and asked.cookies.changes():
            accounting.state.spawn(_saved(asked.cookies), "cookies")

    def _report(self, route: Route, outcome: Outcome) -> None:
        """Tell ad servers what failed, but for what the answer leaves to the player."""
        reports, cut = bounded(to_tell(route, outcome))
        pings = (ping for each in reports for ping in _pings(*each))
        self._reporter.send(pings, outcome.unreported + cut)

    def __repr__(self) -> str:
        return f"<AdServer {self._reporter!r}>"


@dataclass(slots=True)
class _Asked:
    """One ad request on its way, and what is known of it so far."""

    route: Route
    request: AdRequest
    context: SessionContext
    viewer: str = ""
    trace: Trace = field(default_factory=Trace)
    admission: Admission | None = None
    cookies: ViewerCookies | None = None
    deadline: float = field(init=False)
    """On the loop's clock, in seconds."""

    def __post_init__(self) -> None:
        received = self.request.received
        began = asyncio.get_running_loop().time() if received is None else received
        self.deadline = began + self.route.deadline

    async def may_ask(self, session: VastSession) -> bool:
        """Tell whether caps and budget leave anything to ask the session's upstream for."""
        return self.admission is None or await self.admission.before(session.upstream.name)


async def _saved(cookies: ViewerCookies) -> None:
    """Write *cookies*; where the state went away meanwhile, they are not kept."""
    with suppress(StateBackendError):
        await cookies.save()


def _pings(session: VastSession, report: Report) -> Iterator[Ping]:
    """Fill the URIs of *report*."""
    for uri in report.uris:
        url = session.upstream.filled_error(uri, session, report.code)
        yield Ping(url, session.device_headers, session.context.request_id)


def _facts(asked: _Asked, upstream: VastUpstream) -> Request:
    route, request = asked.route, asked.request
    return Request(
        request,
        viewer=asked.viewer,
        forward_query=forwarded(route, request.query.raw, upstream.taken_parameters),
        correlator_params=route.correlator_params,
        macros=macro_values(route, request, asked.viewer) if route.macros else {},
        deadline=asked.deadline,
        viewer_jar=asked.cookies.jar if asked.cookies else None,
    )
