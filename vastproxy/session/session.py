"""
The session of one ad request: its context, its cookies, its clock, and whom it asks.

In the proxy, caps and budgets are the flow's, and a session only asks. Code that uses the library
has sessions with a state backend, and asks the session for both:

Rule 1: a cap is asked and taken in one step, so that a crowd of sessions passes no limit.
Rule 2: a session stands for one ad at a time. What it has taken is counted when it is settled, if
an ad came, and given back if none did; closing settles.
Rule 3: closing raises nothing because the state is away.
"""

import asyncio
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from time import perf_counter
from typing import Literal, Protocol, Self

import structlog

from vastproxy.errors import StateBackendError, UpstreamStatusError, VastError
from vastproxy.model import AdRequest, Device, HopReply
from vastproxy.observe.trace import Exchange, Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.cookies import CookieJar
from vastproxy.session.reservations import Reservations
from vastproxy.session.seals import ViewerNames
from vastproxy.state.base import (
    BUDGET_PREFIX,
    Account,
    Claim,
    Hold,
    StateBackend,
    micros,
    money,
)
from vastproxy.state.windows import Span, counter_key
from vastproxy.vast.document import VastDocument
from vastproxy.vast.macros import Macros
from vastproxy.vast.parse import hardened_parser, parse

DEFAULT_CAP = 3
"""Ads for one viewer in a window, where nobody says how many."""

HOUR = 3600.0
"""Seconds."""

CAP_SCOPE = "ads"
"""What the library's caps are counted under, whichever way an ad is served."""

OPERATION_BYTES = 12
"""Of a session's id in the state: 96 random bits."""

PARSE_APART = 64 * 1024
"""Bytes from which a document is parsed in a thread: see :mod:`vastproxy.upstream.resolver`."""

TimestampStyle = Literal["unix_ms", "iso8601"]

Result = Literal["ad", "no_ad", "error", "unused"]
"""``error``: the upstream failed; ``unused``: it was not asked."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A hop's document, and where it finally came from."""

    reply: HopReply
    url: str
    set_cookies: bool = False
    """Whether it, or a redirect on the way, had a ``Set-Cookie``."""
    sent_cookies: bool = False
    """Whether any request on the way had a ``Cookie``."""
    on_the_way: tuple[HopReply, ...] = ()
    """The redirects, which may forbid to keep what they led to."""


class Upstream(Protocol):
    """What a session asks of its upstream."""

    @property
    def name(self) -> str:
        """What the operator calls it."""

    @property
    def timestamp(self) -> TimestampStyle:
        """How it wants ``[TIMESTAMP]``."""

    def entry_url(self, session: "VastSession", params: Mapping[str, str] | None = None) -> str:
        """Give the URL of the first request of *session*, with further *params*."""

    def filled(self, url: str, session: "VastSession", blocked: tuple[str, ...] = ()) -> str:
        """Fill the macros of a hop's *url*; *blocked* are the categories that wrappers forbid."""

    def filled_error(self, url: str, session: "VastSession", code: int) -> str:
        """Fill the macros of an ``<Error>`` URI that the proxy requests."""

    def filled_known(self, body: bytes, session: "VastSession") -> bytes:
        """Fill what is known where no player does it, in a document that is passed through."""

    def fill_media(self, document: VastDocument, session: "VastSession") -> None:
        """Fill what is known in the media files of a resolved *document*."""

    def device_headers(self, device: Device) -> tuple[tuple[str, str], ...]:
        """Give the headers that tell this upstream, and those behind it, of the device."""

    async def fetch(
        self,
        session: "VastSession",
        url: str,
        exchanges: list[Exchange],
        *,
        trusted: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Fetched:
        """Ask for *url*, following redirects; log each request into *exchanges*."""


class UpstreamSession(Protocol):
    """The narrow face of a session, for code that only asks."""

    @property
    def context(self) -> SessionContext:
        """Who this request is, on every hop."""

    async def request(
        self, *, params: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> str:
        """Ask the entry upstream, and give its answer as text."""

    async def check_frequency_cap(
        self, user_id: str, limit: int | None = None, *, window: float = HOUR
    ) -> bool:
        """Take one of the *limit* ads of a viewer in *window* seconds; False where none is left."""

    async def reserve_budget(
        self, campaign_id: str, amount: Decimal | float | str, limit: Decimal | float | str
    ) -> bool:
        """Take *amount* of a campaign's *limit*; False where there is not so much left."""

    async def track_budget(self, campaign_id: str, amount: Decimal | float | str) -> None:
        """Add *amount* to what a campaign has spent, whatever its limit."""

    async def get_budget(self, campaign_id: str) -> Decimal:
        """Give what a campaign has spent."""

    async def settle(self, *, shown: bool | None = None) -> None:
        """Count what was taken, or give it back."""

    async def close(self) -> None:
        """Release what the session holds."""

    async def __aenter__(self) -> Self:
        """Give the session itself."""

    async def __aexit__(self, *_: object) -> None:
        """Close."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a session serves, and what routing found out about it."""

    ad_request: AdRequest
    viewer: str = ""
    forward_query: str = ""
    """The part of the player's query that goes to the entry upstream, byte for byte."""
    correlator_params: tuple[str, ...] = ("correlator",)
    macros: Mapping[str, str] = field(default_factory=dict)
    """Values that the route takes from the request."""
    deadline: float = float("inf")
    """On the loop's clock, in seconds."""
    viewer_jar: CookieJar | None = None
    """The cookies that are kept for the viewer, if any are."""

    @property
    def device(self) -> Device:
        """Who asks."""
        return self.ad_request.device


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where a session of the library counts, and what it calls viewers there."""

    state: StateBackend | None
    """None: it counts nothing."""
    names: ViewerNames


class _Taken:
    """What one session has taken from caps and budgets, and not settled yet."""

    def __init__(self, state: StateBackend, names: ViewerNames) -> None:
        self.state = state
        self._names = names
        self._reservations = Reservations(state)
        self._holds: dict[tuple[Account, str], Hold] = {}
        self._operation = secrets.token_urlsafe(OPERATION_BYTES)
        self._count = 0

    def viewer(self, user_id: str) -> Account:
        """Give the account of a viewer."""
        return Account("viewer", self._names.name(user_id))

    async def take(self, account: Account, claim: Claim) -> bool:
        """Take *claim*; what was taken already is not taken twice. Raises StateBackendError."""
        place = account, claim.key
        hold = self._holds.get(place)
        if hold is not None and hold.claims != (claim,):
            # Asked again with other figures: judged anew, as if not asked before.
            await self._reservations.release([hold])
            hold = None
        if hold is None:
            self._count += 1
            hold = Hold(account, f"{self._operation}.{self._count}", (claim,))
        # Kept before asking: where the answer is lost, an ad that is shown all the same counts.
        self._holds[place] = hold
        [verdict] = await self._reservations.reserve([hold])
        if not verdict.granted:
            del self._holds[place]
        return verdict.granted

    async def settle(self, *, shown: bool) -> None:
        """Count what was taken, or give it back. Raises StateBackendError; may be repeated."""
        holds = dict(self._holds)
        if shown:
            await self._reservations.count(list(holds.values()))
        else:
            await self._reservations.release(list(holds.values()))
        for place in holds:
            self._holds.pop(place, None)

    def __repr__(self) -> str:
        return f"<_Taken {len(self._holds)}, {self.state!r}>"


class VastSession:
    """
    One ad request at one upstream.

    *context* never changes, *jar* does; where several upstreams are asked in turn, their sessions
    share both. *macros* are filled on every hop. *keeping* is given where caps and budgets are
    asked of the session.
    """

    def __init__(  # noqa: PLR0913 - all of them what a session is made of
        self,
        context: SessionContext,
        upstream: Upstream,
        *,
        jar: CookieJar,
        macros: Macros,
        request: Request,
        trace: Trace | None = None,
        keeping: Keeping | None = None,
        log: structlog.typing.FilteringBoundLogger | None = None,
    ) -> None:
        self._context = context
        self.upstream = upstream
        self.jar = jar
        self.macros = macros
        self.request_facts = request
        self.trace = trace or Trace()
        self.device_headers = upstream.device_headers(request.device)
        """What every hop of this session is told of the device."""
        self._closed = False
        self._taken: _Taken | None = None
        if keeping is not None and keeping.state is not None:
            self._taken = _Taken(keeping.state, keeping.names)
        self._is_librarys = keeping is not None
        self._log = structlog.get_logger("vastproxy.session") if log is None else log
        self._began = perf_counter()
        self._hops_before = self.trace.begun
        self.ads = 0
        """Ads that came so far."""
        self._result: Result = "unused"
        self._shown = False
        """Whether an ad came since the session was last settled."""

    @property
    def context(self) -> SessionContext:
        """Who this request is, on every hop."""
        return self._context

    async def request(
        self, *, params: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> str:
        """
        Ask the entry upstream once, and give its answer as text.

        *params* are appended to its query, *headers* to its headers. Raises UpstreamError, also
        for an HTTP status that is no success.
        """
        self._check_open()
        self.came(None)
        url = self.upstream.entry_url(self, params)
        self.trace.begin()
        fetched = await self.upstream.fetch(self, url, [], trusted=True, headers=headers)
        reply = fetched.reply
        if not 200 <= reply.status < 300:  # noqa: PLR2004 - RFC 9110 section 15.3
            raise UpstreamStatusError(reply.status)
        self.came(await _ads_in(reply.body))
        return reply.body.decode("utf-8", "replace")

    def again(self, deadline: float) -> "VastSession":
        """
        Open a session for the same ad request at the same upstream, with nothing of its own yet.

        It ends at *deadline*, on the loop's clock; what it meets is in no trace of this one, and
        what cookies it is given are not kept.
        """
        facts = self.request_facts
        kept = facts.viewer_jar
        return VastSession(
            self._context,
            self.upstream,
            jar=self.jar.emptied(),
            macros=self.macros,
            request=replace(facts, deadline=deadline, viewer_jar=kept and kept.copied()),
            log=self._log,
        )

    def came(self, ads: int | None) -> None:
        """Take note that an answer had so many *ads*; None: there was no answer."""
        if ads is None:
            self._result = "error"
            return
        self.ads += ads
        self._shown |= ads > 0
        self._result = "ad" if ads else "no_ad"

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")

    def jar_of(self, scope: Literal["chain", "viewer", "off"]) -> CookieJar | None:
        """
        Give the jar of an upstream whose cookies have *scope*; None: it keeps none.

        Without a viewer, cookies live as long as the chain.
        """
        if scope == "off":
            return None
        kept = self.request_facts.viewer_jar
        return self.jar if scope == "chain" or kept is None else kept

    # --- Caps and budgets, for the library ------------------------------------------------------

    def _kept(self) -> _Taken:
        self._check_open()
        if self._taken is None:
            raise RuntimeError(f"{self!r} counts nothing (make it with a state_backend)")
        return self._taken

    async def check_frequency_cap(
        self, user_id: str, limit: int | None = None, *, window: float = HOUR
    ) -> bool:
        """
        Take one of the *limit* ads that a viewer may see in *window* seconds.

        False, and nothing is taken, where none is left. The place is counted when an ad came, and
        given back when none did; asking again before that takes no second one. A *limit* of None
        is DEFAULT_CAP, of 0: never. Without a *user_id* there is nothing to count by: True.
        Raises StateBackendError: then it is the caller's choice to serve all the same.
        """
        taken = self._kept()
        limit = DEFAULT_CAP if limit is None else limit
        ms = _milliseconds(window)
        if limit < 0:
            raise ValueError(f"{limit} is no limit (write 0 for never)")
        if not (limit and user_id):
            return bool(limit)
        span = Span("rolling", ms)
        claim = Claim(counter_key(span, CAP_SCOPE), 1, limit, span.at(0))
        return await taken.take(taken.viewer(user_id), claim)

    async def reserve_budget(
        self, campaign_id: str, amount: Decimal | float | str, limit: Decimal | float | str
    ) -> bool:
        """
        Take *amount* of the *limit* that a campaign may spend, both in units of its currency.

        False, and nothing is taken, where there is not so much left. Like a place under a cap it
        is spent when an ad came, and given back when none did. Raises StateBackendError.
        """
        taken = self._kept()
        claim = money(spendable(amount), spendable(limit))
        return await taken.take(Account("campaign", campaign_id), claim)

    async def track_budget(self, campaign_id: str, amount: Decimal | float | str) -> None:
        """
        Add *amount*, in units of currency, to what a campaign has spent: at once, and exactly.

        No limit is looked at. Raises ValueError for what is no amount, and StateBackendError.
        """
        taken = self._kept()
        spendable(amount)
        await taken.state.add_spend(BUDGET_PREFIX + campaign_id, amount)

    async def get_budget(self, campaign_id: str) -> Decimal:
        """Give what a campaign has spent, in units of currency. Raises StateBackendError."""
        return await self._kept().state.get_spend(BUDGET_PREFIX + campaign_id)

    async def settle(self, *, shown: bool | None = None) -> None:
        """
        Count what was taken because the ad is *shown*, or give it back.

        None: it is if a request gave an ad since this was last called. What is taken from then on
        is for the next ad. Raises StateBackendError; then it may be called again, and closing does.
        """
        if self._taken is not None:
            self._shown = self._shown if shown is None else shown
            await self._taken.settle(shown=self._shown)
            self._shown = False

    # --- The end --------------------------------------------------------------------------------

    async def close(self) -> None:
        """
        End the session: it asks nobody any more, and settles what it has taken.

        Where the state is away that is logged; what was taken then frees itself in time.
        """
        if self._closed:
            return
        self._closed = True
        if self._taken is not None:
            await self._end(self._taken)
        # In the proxy, the access line says the same.
        tell = self._log.info if self._is_librarys else self._log.debug
        tell(
            "session.closed",
            request_id=self._context.request_id,
            upstream=self.upstream.name,
            hops=self.trace.begun - self._hops_before,
            ms=round((perf_counter() - self._began) * 1000, 1),
            ads=self.ads,
            outcome=self._result,
        )

    async def _end(self, taken: _Taken) -> None:
        try:
            await self.settle()
            await taken.state.flush()
        except StateBackendError as error:
            self._log.warning(
                "session.not_settled", request_id=self._context.request_id, problem=str(error)
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<VastSession {self._context.request_id} at {self.upstream.name}>"


async def _ads_in(body: bytes) -> int:
    """Count the ads of a document, wrappers as well; what is no document has none."""
    try:
        if len(body) < PARSE_APART:
            document = parse(body)
        else:
            document = await asyncio.to_thread(parse, body, parser=hardened_parser())
    except VastError:
        return 0
    return sum(each.is_inline or each.is_wrapper for each in document.ads)


def _milliseconds(window: float) -> int:
    if not (math.isfinite(window) and window >= 0.001):  # noqa: PLR2004 - a millisecond
        raise ValueError(f"{window} is no window (write seconds: 3600 for an hour)")
    return round(window * 1000)


def spendable(amount: Decimal | float | str) -> int:
    """Give *amount* of money in micro-units; ValueError where it is none, or below zero."""
    whole = micros(amount)
    if Decimal(str(amount)) < 0:
        raise ValueError(f"{amount!r} is less than nothing (write an amount from 0 on)")
    return whole
