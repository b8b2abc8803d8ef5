"""
The way of one ad request. START READING HERE.

A request has found its route. The route's upstreams are asked in their order, each in a session of
its own and with the wrappers behind it, until one has an ad that caps and budget let through; what
came is merged into one document of InLines. Where nobody has an ad, the route's own document is
answered, or an empty one. Failures on the way are told to the ad servers afterwards.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Self

from vastproxy.errors import StateBackendError, UpstreamError, VastError
from vastproxy.flow.accounting import Accounting
from vastproxy.flow.admission import Admission, Attempt
from vastproxy.flow.answer import Outcome, bounded, response, to_tell, together, written
from vastproxy.flow.beacons import Beacons
from vastproxy.flow.embedded import Embedded
from vastproxy.flow.reporter import ErrorReporter, Ping
from vastproxy.flow.routing import Route, forwarded, macro_values, viewer_of
from vastproxy.flow.selector import first_with_ad
from vastproxy.model import AdRequest, AdResponse
from vastproxy.observe.trace import BreakerChange, Choice, Hop, Trace, What
from vastproxy.session.context import SessionContext
from vastproxy.session.cookies import CookieJar
from vastproxy.session.factory import UID, SessionFactory
from vastproxy.session.session import Request, VastSession
from vastproxy.session.viewer_cookies import ViewerCookies
from vastproxy.state.base import StateBackend
from vastproxy.upstream.resolver import MAX_JUDGED, VastChainResolver, refused_by
from vastproxy.upstream.sources import cookies, found
from vastproxy.upstream.upstream import VastUpstream
from vastproxy.vast.beacons import add_impression, with_impressions
from vastproxy.vast.document import Ad
from vastproxy.vast.parse import parse
from vastproxy.vast.unwrap import Report, ResolvedAd

WORTH_ASKING = 0.02
"""Seconds of the deadline below which the next upstream is not asked any more."""


@dataclass(frozen=True, slots=True)
class Explained:
    """An answer, and how it came about."""

    body: bytes
    hops: tuple[Hop, ...]
    outcome: Outcome
    choices: tuple[Choice, ...] = ()
    """The steps of the waterfall."""
    changes: tuple[BreakerChange, ...] = ()
    """Circuit breakers that changed because of it."""
    shadowed: tuple[str, ...] = ()
    """Circuit breakers that would have refused a call, and only watch."""


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
        outcome = await self._ask(asked)
        body = await self._written(asked, outcome)
        self._report(asked.route, outcome)
        self._count_failures(asked)
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
        Answer as :meth:`answer` does, and tell all; report nothing, and count nothing.

        Caps and budgets are not asked. With a *document*, the chain starts there, and nobody is
        asked for the first one.
        """
        context, viewer = self._context(route, request), viewer_of(route, request)
        asked = _Asked(route, request, context, viewer, Trace(detailed=True), document)
        outcome = await self._ask(asked)
        trace = asked.trace
        return Explained(
            written(route, outcome),
            tuple(trace.ordered()),
            outcome,
            tuple(trace.choices),
            tuple(trace.changes),
            tuple(trace.shadowed),
        )

    def _context(self, route: Route, request: AdRequest) -> SessionContext:
        taken = cookies(request.header("cookie"), route.forward_cookies)
        return self._factory.context(
            request_id=request.request_id,
            correlator=found(route.correlator, request) if route.correlator else "",
            cookies=taken if route.forward_cookies else None,
        )

    def _session(self, asked: "_Asked", upstream: VastUpstream) -> VastSession:
        """Open a session at *upstream*."""
        if asked.jar is None:
            asked.jar = self._factory.jar()
        return self._factory.open_session(
            asked.context,
            upstream,
            request=_facts(asked, upstream),
            jar=asked.jar,
            trace=asked.trace,
            timestamp=upstream.settings.timestamp,
        )

    async def _ask(self, asked: "_Asked") -> Outcome:
        """Ask upstreams until one has an ad; where none has, there may be one of the route's."""
        outcomes: dict[int, Outcome] = {}

        async def ask(at: int) -> bool:
            outcomes[at] = outcome = await self._attempt(asked, asked.route.upstreams[at])
            return bool(outcome.ads)

        winner = await first_with_ad(asked.route.soft_timeouts, ask, asked.overtaken)
        found = None if winner is None else outcomes[winner]
        outcome = together([each for _, each in sorted(outcomes.items())], found)
        if found is None and asked.route.fallback is not None:
            outcome.last_resort = parse(asked.route.fallback)
            outcome.session = self._session(asked, asked.route.upstreams[0])
            outcome.ads = len(outcome.last_resort.ads)
        return outcome

    async def _attempt(self, asked: "_Asked", upstream: VastUpstream) -> Outcome:
        """Ask *upstream*, and take note of what came of it; what came to nothing gives all back."""
        attempt = asked.admission.attempt(upstream.name) if asked.admission else None
        try:
            outcome = await self._outcome(asked, upstream, attempt)
        except asyncio.CancelledError:
            asked.note(upstream, "cancelled")
            if attempt is not None:
                attempt.abandon()
            raise
        asked.note(upstream, outcome.what, outcome.detail)
        if attempt is not None and not outcome.ads:
            await attempt.close()
        return outcome

    async def _outcome(
        self, asked: "_Asked", upstream: VastUpstream, attempt: Attempt | None
    ) -> Outcome:
        if missing := asked.missing():
            return Outcome(what="not_asked", detail=missing)
        if attempt is not None and (refusal := await attempt.before()):
            return Outcome(what=refusal, detail="; ".join(attempt.reasons))
        async with self._session(asked, upstream) as session:
            if asked.route.mode == "passthrough":
                return await self._enter(asked, session, attempt)
            judge = attempt.judge if attempt else None
            resolver = VastChainResolver(asked.route.policy)
            resolution = await resolver.resolve(session, document=asked.document, judge=judge)
            came = resolution.unwrapped
            session.came(None if came is None else len(came.ads))
        return Outcome.of(session, resolution)

    async def _enter(
        self, asked: "_Asked", session: VastSession, attempt: Attempt | None
    ) -> Outcome:
        """Ask for a document that is to be passed through."""
        try:
            entry = await VastChainResolver(asked.route.policy).enter(session)
        except (UpstreamError, VastError) as error:
            session.came(None)
            refused = refused_by(error, session.upstream.name)
            return Outcome.failed(error.vast_code, str(error), refused)
        ads = entry.document.ads
        session.came(len(ads))
        if attempt is not None and (refused := await _refused_document(attempt, ads)):
            return Outcome(detail=refused)
        return Outcome.of_entry(session, entry, ads)

    async def _written(self, asked: "_Asked", outcome: Outcome) -> bytes:
        """Write the answer, and take it that its ads are answered."""
        if outcome.passed is not None:
            return await self._marked(asked, outcome, written(asked.route, outcome))
        await self._book(asked, outcome)
        return written(asked.route, outcome)

    async def _book(self, asked: "_Asked", outcome: Outcome) -> None:
        """Take it that the ads of *outcome* are answered: count them, or give them beacons."""
        if self._accounting is None or asked.admission is None or outcome.unwrapped is None:
            return
        ads = outcome.unwrapped.ads
        waiting = await asked.admission.serve([each.inline for each in ads])
        for ad, holds in zip(ads, waiting, strict=True):
            if url := self._accounting.beacons.url(asked.request.base, holds):
                add_impression(ad, url)

    async def _marked(self, asked: "_Asked", outcome: Outcome, body: bytes) -> bytes:
        """Put beacons into a document that is passed through."""
        if self._accounting is None or asked.admission is None:
            return body
        waiting = await asked.admission.serve(outcome.passed_ads)
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

    def _count_failures(self, asked: "_Asked") -> None:
        """Count, for the route's campaign, upstreams that failed."""
        budget = asked.route.terms.budget
        if budget is not None and self._accounting is not None:
            failed = sum(each.what == "failed" for each in asked.trace.choices)
            self._accounting.failures.add(budget.campaign, failed)

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
    document: bytes | None = None
    """What the first upstream has answered already."""
    admission: Admission | None = None
    cookies: ViewerCookies | None = None
    jar: CookieJar | None = None
    """What all sessions of the request share."""
    deadline: float = field(init=False)
    """On the loop's clock, in seconds."""

    def __post_init__(self) -> None:
        received = self.request.received
        began = asyncio.get_running_loop().time() if received is None else received
        self.deadline = began + self.route.deadline

    def missing(self) -> str:
        """Say what is missing to ask an upstream, if anything: time, or a document that is left."""
        if self.deadline - asyncio.get_running_loop().time() < WORTH_ASKING:
            return "no time is left"
        if self.trace.begun >= self.route.policy.max_fetches:
            return f"all {self.route.policy.max_fetches} documents are used up"
        return ""

    def note(self, upstream: VastUpstream, what: What, detail: str = "") -> None:
        """Take note of what became of *upstream*."""
        since = asyncio.get_running_loop().time() - self.deadline + self.route.deadline
        self.trace.choices.append(Choice(upstream.name, what, since * 1000, detail))

    def overtaken(self, at: int) -> None:
        """Take note that the next upstream is asked, as the one at place *at* takes its time."""
        upstream = self.route.upstreams[at]
        self.note(upstream, "late", f"no ad in {upstream.soft_timeout or 0:g} s")


async def _refused_document(attempt: Attempt, ads: Sequence[Ad]) -> str:
    """
    Say why a document with *ads* may not be passed through; empty: it may.

    It cannot be cut: one ad too many is a document too many. Its chains are taken to end there.
    """
    if len(ads) > MAX_JUDGED:
        return f"more than {MAX_JUDGED} ads"
    refused = await attempt.judge([ResolvedAd(each, (), None) for each in ads])
    return "; ".join(refused.values())


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
