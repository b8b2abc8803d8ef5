"""
Drive an unwrapper with real requests: the chains of a pod run at the same time.

What goes on and what stops is decided in :mod:`vastproxy.vast.unwrap`, and which ads may be
served by a *judge*; here is only waiting.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from vastproxy.errors import (
    NoAdError,
    UpstreamError,
    UpstreamRefusedError,
    UpstreamStatusError,
    UpstreamTimeoutError,
    VastError,
)
from vastproxy.model import HopReply
from vastproxy.observe.trace import AdFact, Exchange, Hop
from vastproxy.session.session import VastSession
from vastproxy.upstream.answers import Answer, Facts, facts_of_document
from vastproxy.upstream.upstream import VastUpstream
from vastproxy.vast.codes import VastCode
from vastproxy.vast.document import Ad, VastDocument
from vastproxy.vast.parse import hardened_parser, parse
from vastproxy.vast.unwrap import Policy, ResolvedAd, Unwrapped, Unwrapper, Want

PARSE_APART = 64 * 1024
"""
Bytes from which a document is parsed in a thread: lxml lets the others run meanwhile. Below, the
thread costs more than it saves (40 us; a 64 KB document takes about 400).
"""

MAX_SIZE = 8 * 1024 * 1024
"""Bytes of all documents behind one ad request. A pod of ten with five wrappers each has 0.3 MB."""

MAX_JUDGED = 100
"""
Ads that a judge is asked about for one ad request: a pod of ten, and nine others to stand in for
each. A document of ten thousand ads would make a lever against the state of caps and budgets.
"""

_NO_CONTENT = frozenset({204, 205})
_FAILED = "miss (upstream failed)"
"""What a hop says of the cache until there is an answer."""

Judge = Callable[[Sequence[ResolvedAd]], Awaitable[Mapping[ResolvedAd, str]]]
"""
Says which of the ads may not be served, and why, in words.

It is given ads in playing order, whose wrappers are not yet merged into them, each ad once; all
others that come out with it were judged before. The same ad has the same ``inline`` in the end,
but not always the same ``sequence``.
"""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What came of asking one upstream."""

    unwrapped: Unwrapped | None
    """None where the entry gave no document."""
    code: int | None = None
    """Then the VAST code of the failure..."""
    problem: str = ""
    """...and the same in words."""
    refused: str = ""
    """By what the proxy was kept from asking: ``breaker``, ``rate_limit`` or ``busy``."""

    @property
    def has_ads(self) -> bool:
        """Whether there is anything to play."""
        return self.unwrapped is not None and bool(self.unwrapped.ads)


@dataclass(frozen=True, slots=True)
class Entry:
    """The first document of a chain."""

    document: VastDocument
    url: str
    """Where it finally came from."""
    body: bytes
    """Its bytes as they came."""
    number: int
    """Which hop it was."""


class VastChainResolver:
    """
    Resolves the wrapper chains of one upstream's answers.

    *policy* is the route's.
    """

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()

    async def resolve(
        self,
        session: VastSession,
        params: Mapping[str, str] | None = None,
        document: bytes | None = None,
        *,
        judge: Judge | None = None,
    ) -> Resolution:
        """
        Ask the session's upstream, and follow what comes until there are InLines or nothing.

        *params* are added to its query. With a *document* at hand it is not asked. For ads that
        *judge* refuses, others are looked for.
        """
        try:
            if document is None:
                entry = await self.enter(session, params)
            else:
                entry = _given(session, document)
        except (UpstreamError, VastError) as error:
            refused = refused_by(error, session.upstream.name)
            return Resolution(None, error.vast_code, str(error), refused)
        return await self.resolve_document(
            session, entry.document, entry.url, entry.number, judge=judge
        )

    async def enter(self, session: VastSession, params: Mapping[str, str] | None = None) -> "Entry":
        """
        Ask the session's upstream, and follow nothing.

        Raises UpstreamError or VastError; the hop is in the session's trace all the same.
        """
        place = _Place(str(session.upstream), session.trace.begin())
        try:
            place.url = session.upstream.entry_url(session, params)
        except UpstreamError as error:
            session.trace.add(_hop(session, place, _Told(), error=error))
            raise
        outcome = await _fetch(session, place, place.url, params, trusted=True)
        if not isinstance(outcome, _Document):
            try:
                raise outcome
            finally:
                del outcome  # its traceback has this frame
        return Entry(outcome.document, outcome.url, outcome.body, place.number)

    async def resolve_document(
        self,
        session: VastSession,
        document: VastDocument,
        url: str = "",
        number: int | None = None,
        *,
        judge: Judge | None = None,
    ) -> Resolution:
        """
        Follow the wrappers of a *document* that came from *url*, as hop *number*.

        *judge* is asked when all chains are at their ends. What it raises comes out of here.
        """
        left = max(0, self.policy.max_fetches - session.trace.begun)
        unwrapper = Unwrapper(document, url, replace(self.policy, max_fetches=left))
        run = _Run(session, unwrapper, number, self.policy.max_fetches)
        try:
            await run.follow()
            if judge is not None:
                await run.settle(judge)
            return Resolution(unwrapper.result())
        finally:
            unwrapper.release()


@dataclass(slots=True)
class _Place:
    """Where a hop stands in the tree."""

    url: str
    number: int = 0
    parent: int | None = None
    depth: int = 0


@dataclass(frozen=True, slots=True)
class _Document:
    document: VastDocument
    url: str
    body: bytes


@dataclass(slots=True)
class _Run:
    """One tree being followed."""

    session: VastSession
    unwrapper: Unwrapper
    entry: int | None
    most: int
    """Documents of the whole ad request: upstreams that are asked at one time share them."""
    numbers: dict[Want, int] = field(default_factory=dict)
    size: int = 0
    """Bytes of the documents so far."""

    async def follow(self) -> None:
        """Make the hops that are wanted, until none is."""
        while wanted := self.unwrapper.wanted():
            if len(wanted) == 1:
                await self._hop(wanted[0])
                continue
            async with asyncio.TaskGroup() as group:
                for want in wanted:
                    group.create_task(self._chain(want), name=f"chain {want.url[:60]}")

    async def settle(self, judge: Judge) -> None:
        """Ask *judge* about the ads that came out, and about what stands in for those refused."""
        judged: set[Ad] = set()
        while fresh := [ad for ad in self.unwrapper.result().ads if ad.inline not in judged]:
            room = MAX_JUDGED - len(judged)
            judged.update(ad.inline for ad in fresh)
            refused = dict(await judge(fresh[:room]))
            refused |= dict.fromkeys(fresh[room:], f"more than {MAX_JUDGED} ads")
            if not refused:
                return
            if len(judged) >= MAX_JUDGED or self._is_late():
                self.unwrapper.stop()
            for ad in fresh:
                if ad in refused:
                    self.unwrapper.refuse(ad, VastCode.NOT_SERVED, refused[ad])
            await self.follow()

    def _is_late(self) -> bool:
        """Whether the deadline has passed: then there is no time to ask for anything."""
        return asyncio.get_running_loop().time() >= self.session.request_facts.deadline

    async def _chain(self, want: Want) -> None:
        await self._hop(want)
        await self.follow()

    async def _hop(self, want: Want) -> None:
        session = self.session
        if session.trace.begun >= self.most:
            reason = f"more than {self.most} documents in all"
            self.unwrapper.fail(want, VastCode.WRAPPER, reason)
            return
        number = session.trace.begin()
        self.numbers[want] = number
        parent = self.numbers[want.parent] if want.parent else self.entry
        place = _Place(want.url, number, parent, want.depth)
        url = session.upstream.filled(want.url, session, want.blocked_categories)
        outcome = await _fetch(session, place, url, trusted=False)
        if isinstance(outcome, _Document):
            self.size += outcome.document.size
        else:
            self._consider_stopping(outcome)
            self.unwrapper.fail(want, outcome.vast_code, str(outcome))
            return
        if self.size > MAX_SIZE:
            self.unwrapper.stop()
            self.unwrapper.fail(want, VastCode.WRAPPER, f"more than {MAX_SIZE} bytes in all")
        else:
            self.unwrapper.feed(want, outcome.document, outcome.url)

    def _consider_stopping(self, error: UpstreamError | VastError) -> None:
        """Let nothing stand in any more when it was the deadline that passed."""
        if isinstance(error, UpstreamTimeoutError) and error.starved:
            self.unwrapper.stop()


def _given(session: VastSession, body: bytes) -> Entry:
    """Take a document at hand as the first hop. Raises VastError."""
    place = _Place(session.upstream.name, session.trace.begin())
    try:
        document = parse(body)
    except VastError as error:
        session.trace.add(_hop(session, place, _Told(), error=error))
        raise
    session.trace.add(_hop(session, place, _Told(), document))
    return Entry(document, "", body, place.number)


async def _fetch(
    session: VastSession,
    place: _Place,
    url: str,
    params: Mapping[str, str] | None = None,
    *,
    trusted: bool,
) -> "_Document | UpstreamError | VastError":
    """Make one hop: ask, read, log. Gives the document, or what stood in the way."""
    began = perf_counter()
    told = _Told()
    outcome: _Document | UpstreamError | VastError
    try:
        upstream = session.upstream
        if trusted and isinstance(upstream, VastUpstream) and upstream.cache is not None:
            outcome = await _kept(_Entrance(session, upstream, url, params), told)
        else:
            fetched = await upstream.fetch(session, url, told.exchanges, trusted=trusted)
            outcome = _Document(await read(fetched.reply), fetched.url, fetched.reply.body)
    except (UpstreamError, VastError) as raised:
        # Without its traceback, which has this frame: a cycle that would keep the whole body.
        outcome = raised.with_traceback(None)
    except asyncio.CancelledError:
        told.problem = "cut off: another ad server was quicker, or the player has gone"
        if told.cache == _FAILED:
            told.cache = "miss (cut off)"
        told.milliseconds = (perf_counter() - began) * 1000
        session.trace.add(_hop(session, place, told))
        raise
    told.milliseconds = (perf_counter() - began) * 1000
    found = outcome.document if isinstance(outcome, _Document) else None
    error = told.stood_in_for if isinstance(outcome, _Document) else outcome
    session.trace.add(_hop(session, place, told, found, error))
    return outcome


@dataclass(slots=True)
class _Told:
    """What a hop leaves behind besides its document."""

    exchanges: list[Exchange] = field(default_factory=list)
    milliseconds: float = 0.0
    cache: str = ""
    problem: str = ""
    stood_in_for: UpstreamError | VastError | None = None
    """What went wrong where a stale answer was given."""


@dataclass(frozen=True, slots=True)
class _Entrance:
    """The first request of a session."""

    session: VastSession
    upstream: VastUpstream
    url: str
    params: Mapping[str, str] | None


async def _kept(entry: _Entrance, told: _Told) -> "_Document":
    """Give what the upstream's cache has for *entry*, or what is answered now."""
    session, upstream = entry.session, entry.upstream
    cache = upstream.protection.cache
    assert cache is not None  # noqa: S101 - the caller looked
    told.cache = _FAILED
    answer, verdict = await cache.through(
        upstream.asking(session, entry.url, entry.params),
        lambda: _answered(session, entry.url, told.exchanges),
        lambda: _refreshed(entry),
        upstream.protection.spawn,
    )
    told.cache = verdict.words
    told.stood_in_for = verdict.error
    session.trace.cache_status.append(verdict.header(upstream.name))
    fetched = answer.fetched
    live = answer.live
    document = live if isinstance(live, VastDocument) else await read(fetched.reply)
    return _Document(document, fetched.url, fetched.reply.body)


async def _answered(session: VastSession, url: str, exchanges: list[Exchange]) -> Answer:
    """Ask for the entry, and say of the answer what decides whether it may be kept."""
    fetched = await session.upstream.fetch(session, url, exchanges, trusted=True)
    try:
        document = await read(fetched.reply)
    except NoAdError:
        none = Facts(filled=False, priced=False, expires=None)
        return Answer(fetched, none)
    return Answer(fetched, facts_of_document(document), document)


async def _refreshed(entry: _Entrance) -> Answer:
    """Make the first request once more, after its ad request is answered."""
    ends = asyncio.get_running_loop().time() + entry.upstream.settings.timeout
    async with entry.session.again(ends) as own:
        return await _answered(own, entry.upstream.entry_url(own, entry.params), [])


def refused_by(error: UpstreamError | VastError, upstream: str = "") -> str:
    """
    Say what kept the proxy from asking; empty where nothing did.

    With the name of an *upstream*, only its own guard counts, and not that of a site that it
    redirects to.
    """
    if not isinstance(error, UpstreamRefusedError) or (upstream and error.of != upstream):
        return ""
    return error.by


async def read(reply: HopReply) -> VastDocument:
    """
    Read the document of *reply*.

    Raises UpstreamStatusError, NoAdError (303) where the status says there is none, or VastError.
    """
    if reply.status in _NO_CONTENT:
        raise NoAdError(f"HTTP status {reply.status}: no ad")
    if not 200 <= reply.status < 300:  # noqa: PLR2004 - RFC 9110 section 15.3
        raise UpstreamStatusError(reply.status)
    if len(reply.body) < PARSE_APART:
        return parse(reply.body, charset=_charset(reply))
    return await asyncio.to_thread(
        parse, reply.body, charset=_charset(reply), parser=hardened_parser()
    )


def _charset(reply: HopReply) -> str | None:
    """Give what ``Content-Type`` says of the encoding (RFC 9110 section 8.3.2)."""
    _, found, rest = (reply.header("content-type") or "").lower().partition("charset=")
    return rest.partition(";")[0].strip() if found else None


def _hop(
    session: VastSession,
    place: _Place,
    told: _Told,
    document: VastDocument | None = None,
    error: UpstreamError | VastError | None = None,
) -> Hop:
    detailed = session.trace.detailed
    return Hop(
        number=place.number,
        parent=place.parent,
        depth=place.depth,
        upstream=session.upstream.name,
        url=place.url,
        exchanges=tuple(told.exchanges),
        milliseconds=told.milliseconds,
        version=".".join(map(str, document.version)) if detailed and document else "",
        ads=tuple([_fact(each) for each in document.ads]) if detailed and document else (),
        repairs=document.repairs if document else (),
        code=error.vast_code if error else None,
        problem=str(error) if error else told.problem,
        refused=refused_by(error) if error else "",
        cache=told.cache,
    )


def _fact(ad: Ad) -> AdFact:
    kind = "InLine" if ad.is_inline else "Wrapper" if ad.is_wrapper else "empty"
    return AdFact(ad.id, ad.system, kind, ad.sequence)
