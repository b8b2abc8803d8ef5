"""An ad server as the operator configured it, and how it and the hops behind it are asked."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, Self

from vastproxy.config.template import Placeholder, Template
from vastproxy.config.units import Source, check_authority, parse_network
from vastproxy.errors import EgressBlockedError, RedirectError, UpstreamTimeoutError
from vastproxy.model import AdRequest, Device, HopReply, HopRequest, Query
from vastproxy.observe.trace import Exchange, Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.cookies import CookieJar
from vastproxy.session.factory import SessionFactory
from vastproxy.session.session import Fetched, TimestampStyle, VastSession
from vastproxy.state.base import StateBackend
from vastproxy.upstream.answers import AnswerCache, Asking, Spawn
from vastproxy.upstream.blame import had_fair_time
from vastproxy.upstream.client import AiohttpClient, HopClient
from vastproxy.upstream.egress import EgressPolicy, own_addresses
from vastproxy.upstream.guard import Call, Guard, GuardSettings, local_rate
from vastproxy.upstream.headers import device_headers, safe
from vastproxy.upstream.sources import found
from vastproxy.upstream.urls import Target, extended, joined, target, with_parameter
from vastproxy.vast.document import VastDocument
from vastproxy.vast.macros import Spelling, encode, spelling
from vastproxy.vast.serialise import fill_media, fill_spans

MAX_REDIRECTS = 10
"""HTTP redirects of one hop. Cookie matching takes three or four; browsers stop at 20."""

RESERVE = 0.05
"""Seconds of the deadline that are kept for merging and answering..."""
RESERVE_SHARE = 0.1
"""...but never more than this share of it."""

_VOLATILE = dict.fromkeys(("CACHEBUSTING", "CORRELATOR", "TIMESTAMP", "TRANSACTIONID"), "0")
"""Macros that are another in each ad request, and so in no key of a cache."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """What config.yaml says about one upstream."""

    name: str
    endpoint: Template
    hosts: tuple[str, ...] = ()
    params: tuple[tuple[str, Template], ...] = ()
    headers: tuple[tuple[str, Template], ...] = ()
    timeout: float = 1.0
    """Seconds for one hop, redirects included."""
    soft_timeout: float | None = None
    """Seconds after which the next upstream of a waterfall is started; None: it is not."""
    max_body: int = 512 * 1024
    cookies: Literal["chain", "viewer", "off"] = "chain"
    cookie_ttl: float = 30 * 86_400.0
    """Seconds that cookies of scope ``viewer`` are kept from the last change."""
    session_params: tuple[str, ...] = ("correlator", "timestamp")
    user_agent: Literal["device", "proxy"] = "device"
    forwarded_for: Literal["set", "append", "off"] = "set"
    timestamp: TimestampStyle = "unix_ms"
    spelling: Spelling = field(default_factory=spelling)


_UNGUARDED = GuardSettings()


@dataclass(frozen=True, slots=True)
class Protection:
    """What stands around the calls of one upstream."""

    entry: Guard
    """Around those of its endpoint."""
    site: Callable[[Target], Guard]
    """Gives what is around all others."""
    cache: AnswerCache | None = None
    """What its endpoint answered before."""
    spawn: Spawn | None = None
    """Starts what nobody waits for, as long as there are connections; None: as the cache does."""

    @classmethod
    def none(cls, name: str) -> Self:
        """Let everything through."""
        return cls.of(name, _UNGUARDED)

    @classmethod
    def of(cls, name: str, settings: GuardSettings) -> Self:
        """Guard the endpoint of the upstream *name* as *settings* say, and nothing behind it."""
        rate = None if settings.rate is None else local_rate(name, settings.rate)
        guard = Guard(name, settings, rate=rate)
        hops = Guard(f"hops of {name}", _UNGUARDED)
        return cls(guard, lambda _: hops)

    def __repr__(self) -> str:
        return f"<Protection {self.entry!r}, {self.cache!r}>"


class VastUpstream:
    """
    One configured ad server.

    It also asks the hops that its wrappers lead to, with the same limits and headers; only the
    entry is trusted, everything else passes the egress guard. *client* makes the requests, *now*
    gives Unix seconds (cookies expire by it). *protection* stands around them; None: nothing does.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        client: HopClient,
        now: Callable[[], float],
        protection: Protection | None = None,
    ) -> None:
        self.settings = settings
        self.client = client
        """What makes the requests."""
        self.protection = protection or Protection.none(settings.name)
        self.now = now
        """Unix seconds."""
        self._taken = frozenset().union(
            settings.endpoint.query_names,
            *(each.query_names | {name} for name, each in settings.params),
            Query(settings.endpoint.text.partition("?")[2]),
        )

    @classmethod
    @asynccontextmanager
    async def open(  # noqa: PLR0913 - all with defaults, and by name
        cls,
        endpoint: str,
        *,
        name: str = "primary",
        timeout: float = 1.0,  # noqa: ASYNC109 - of a hop, and kept for later
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        egress_allow: Iterable[str] = (),
        soft_timeout: float | None = None,
        guard: GuardSettings | None = None,
    ) -> AsyncIterator[Self]:
        """
        Open an upstream without a configuration, with an HTTP client of its own.

        *endpoint* is its URL; *params* and *headers* are added to its requests. They are templates
        as in the configuration: ``{viewer}`` is the viewer's id, and a brace is doubled. *timeout*
        is in seconds, for one hop. Hops that wrappers lead to may reach private networks only if
        *egress_allow* names them (``10.0.0.0/8``). After *soft_timeout* seconds a selector starts
        the next upstream. *guard* stands around its calls, with a breaker, say; None: nothing
        does. Raises ValueError for what cannot be used.
        """
        check_authority(endpoint)
        policy = EgressPolicy(
            allow=tuple(map(parse_network, egress_allow)), own_addresses=own_addresses()
        )
        settings = UpstreamSettings(
            name,
            Template.parse(endpoint),
            params=_templates(params or {}),
            headers=_templates(headers or {}),
            timeout=timeout,
            soft_timeout=soft_timeout,
        )
        protection = Protection.none(name) if guard is None else Protection.of(name, guard)
        async with AiohttpClient(policy) as client:
            yield cls(settings, client, time.time, protection)

    async def create_session(
        self, context: SessionContext, state_backend: StateBackend | None = None
    ) -> VastSession:
        """
        Open a session of *context* here, for code that has no player's request.

        It counts caps and budgets in *state_backend*. A factory is for who opens many.
        """
        return SessionFactory(self, state_backend, now=self.now).session_of(context, self)

    @property
    def name(self) -> str:
        """What the operator calls it."""
        return self.settings.name

    @property
    def soft_timeout(self) -> float | None:
        """Seconds after which the next upstream of a waterfall is started; None: it is not."""
        return self.settings.soft_timeout

    @property
    def cache(self) -> AnswerCache | None:
        """What its endpoint answered before; None: nothing is kept."""
        return self.protection.cache

    @property
    def timestamp(self) -> TimestampStyle:
        """How it wants ``[TIMESTAMP]``."""
        return self.settings.timestamp

    @property
    def taken_parameters(self) -> frozenset[str]:
        """
        Query parameters that it sets or takes over.

        Of the player's own, these need no second copy; and what the operator sets, no player sets.
        """
        return self._taken

    def entry_url(self, session: VastSession, params: Mapping[str, str] | None = None) -> str:
        """
        Write the URL of the first request of *session*.

        The order is: the endpoint's own query, configured parameters, *params*, the player's
        query, the session's parameters. Raises EgressBlockedError where the request named the
        host, and the operator did not list it.
        """
        url = self._with_session(self._unfilled(session, params), session)
        url = self.filled(url, session)
        if self.settings.endpoint.starts_with_placeholder:
            # Last: what macros and correlator put in may not change the host unseen.
            self._check_host(url)
        return url

    def _unfilled(self, session: VastSession, params: Mapping[str, str] | None = None) -> str:
        """Write the URL of the first request, before its macros and the session's parameters."""
        settings, facts = self.settings, session.request_facts
        look = lookup(facts.ad_request, facts.viewer)
        url = settings.endpoint.render(look, encode)
        if facts.ad_request.rest and not settings.endpoint.uses_rest:
            url = _with_rest(url, _safe_rest(facts.ad_request.rest))
        pairs = [f"{encode(k)}={encode(each.render(look, str))}" for k, each in settings.params]
        pairs += [f"{encode(k)}={encode(str(v))}" for k, v in (params or {}).items()]
        return extended(
            url, "&".join([*pairs, facts.forward_query] if facts.forward_query else pairs)
        )

    def asking(
        self, session: VastSession, url: str, params: Mapping[str, str] | None = None
    ) -> Asking:
        """Say what of *session*'s first request, to *url*, an answer may depend on."""
        facts = session.request_facts
        macros = session.macros.having(_VOLATILE)
        same = macros.fill_request(self._unfilled(session, params), self.settings.spelling)
        for name in facts.correlator_params:
            same = with_parameter(same, name, "")
        look = lookup(facts.ad_request, facts.viewer)
        own = [f"{name}: {each.render(look, str)}" for name, each in self.settings.headers]
        vary = self.cache.settings.vary if self.cache is not None else ()
        forwarded = [f"{name}={value}" for name, value in session.context.cookies.items()]
        place = target(url)
        jar = session.jar_of(self.settings.cookies)
        sent = jar is not None and jar.header_for(
            host=place.host, path=place.path, secure=place.is_secure, now=self.now()
        )
        return Asking(
            url=same,
            viewer=facts.viewer,
            varying=(*(_said(each, session) for each in vary), *own, *forwarded),
            has_cookies=bool(sent or (jar is not None and session.context.cookies)),
            deadline=self._limit(session)[0],
        )

    def _check_host(self, url: str) -> None:
        found = target(url)
        usual = found.port == _DEFAULT_PORTS[found.scheme]
        names = (f"{found.host}:{found.port}", *((found.host,) if usual else ()))
        if not any(_is_listed(name, each) for name in names for each in self.settings.hosts):
            raise EgressBlockedError(f"the host {names[0]} is not among the upstream's hosts")

    def _with_session(self, url: str, session: VastSession) -> str:
        """Append the session's parameters, but for those that the URL has already."""
        values = {
            "correlator": session.context.correlator,
            "timestamp": str(session.context.timestamp),
        }
        added = [
            f"{name}={encode(values[name])}"
            for name in self.settings.session_params
            if f"?{name}=" not in url and f"&{name}=" not in url
        ]
        return extended(url, "&".join(added))

    def filled(self, url: str, session: VastSession, blocked: tuple[str, ...] = ()) -> str:
        """Fill a hop's *url*: macros, correlator; *blocked* are the wrappers' categories."""
        macros = session.macros
        if blocked and "BLOCKEDADCATEGORIES" in url:
            macros = macros.having({"BLOCKEDADCATEGORIES": ",".join(map(encode, blocked))})
        url = macros.fill_request(url, self.settings.spelling)
        for name in session.request_facts.correlator_params:
            url = with_parameter(url, name, encode(session.context.correlator))
        return url

    def filled_error(self, url: str, session: VastSession, code: int) -> str:
        """Fill the macros of an ``<Error>`` URI that the proxy requests itself."""
        return session.macros.fill_error(url, code, self.settings.spelling)

    def filled_known(self, body: bytes, session: VastSession) -> bytes:
        """Fill what is known where no player does it, in a document that is passed through."""
        return fill_spans(body, session.macros, self.settings.spelling)

    def fill_media(self, document: VastDocument, session: VastSession) -> None:
        """Fill what is known in the media files of a resolved *document*."""
        fill_media(document, session.macros, self.settings.spelling)

    def device_headers(self, device: Device) -> tuple[tuple[str, str], ...]:
        """Give the headers that tell this upstream, and those behind it, of the *device*."""
        return device_headers(
            device,
            user_agent=self.settings.user_agent,
            forwarded_for=self.settings.forwarded_for,
        )

    async def fetch(
        self,
        session: VastSession,
        url: str,
        exchanges: list[Exchange],
        *,
        trusted: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Fetched:
        """
        Ask for *url* and follow its redirects, within this upstream's limit and the deadline.

        Each request is logged into *exchanges*. Redirects are never *trusted*: what an ad server
        names is not what the operator named. Raises UpstreamError.
        """
        limit, starved = self._limit(session)
        jar = session.jar_of(self.settings.cookies)
        hop = _Hop(self, session.trace, jar, limit, exchanges)
        sent = self._headers(session, trusted=trusted, further=headers or {})
        on_the_way: list[HopReply] = []
        for _ in range(MAX_REDIRECTS + 1):
            place = target(url)
            if trusted and jar is not None:
                for name, value in session.context.cookies.items():
                    jar.put(name, value, place.host)
            try:
                reply = await hop.ask(place, sent, trusted=trusted)
            except UpstreamTimeoutError as error:
                when = "before the deadline" if starved else f"in {self.settings.timeout:g} s"
                raise UpstreamTimeoutError(f"{error.reason} {when}", starved=starved) from None
            if reply.status not in _REDIRECTS:
                told = hop.set_cookies, hop.sent_cookies
                return Fetched(reply, place.url, *told, tuple(on_the_way))
            on_the_way.append(reply)
            url = joined(place.url, reply.header("location") or "")
            if trusted:
                trusted, sent = False, self._headers(session, trusted=False, further={})
        raise RedirectError(f"more than {MAX_REDIRECTS} redirects")

    def _limit(self, session: VastSession) -> tuple[float, bool]:
        """Give the point in time at which a hop ends, and whether the deadline cut it short."""
        now = asyncio.get_running_loop().time()
        own = now + self.settings.timeout
        deadline = session.request_facts.deadline
        rest = deadline - min(RESERVE, RESERVE_SHARE * (deadline - now))
        if rest <= now:
            raise UpstreamTimeoutError("the deadline has passed", starved=True)
        return min(own, rest), rest < own

    def _headers(
        self, session: VastSession, *, trusted: bool, further: Mapping[str, str]
    ) -> tuple[tuple[str, str], ...]:
        """Give the headers of a request; the operator's own go to the operator's address only."""
        headers = session.device_headers
        if not trusted:
            return headers
        look = lookup(session.request_facts.ad_request, session.request_facts.viewer)
        own = {name.lower(): (name, each.render(look, str)) for name, each in self.settings.headers}
        own |= {name.lower(): (name, value) for name, value in further.items()}
        kept = [each for each in headers if each[0].lower() not in own]
        return (*kept, *((name, safe(value)) for name, value in own.values()))

    def __repr__(self) -> str:
        return f"<VastUpstream {self.name} {self.settings.endpoint}>"


@dataclass(slots=True)
class _Hop:
    """One hop on its way: the requests of it share a jar, a time limit and a log."""

    upstream: VastUpstream
    trace: Trace
    jar: CookieJar | None
    limit: float
    exchanges: list[Exchange]
    set_cookies: bool = False
    """Whether an answer wanted any kept."""
    sent_cookies: bool = False
    """Whether any were sent."""

    async def ask(
        self, place: Target, headers: tuple[tuple[str, str], ...], *, trusted: bool
    ) -> HopReply:
        """Ask through the guard of who is asked. Raises UpstreamError."""
        protection = self.upstream.protection
        guard = protection.entry if trusted else protection.site(place)
        settings = self.upstream.settings
        return await guard.ask(
            Call(
                lambda: self._once(place, headers, trusted=trusted),
                self.trace,
                lambda: had_fair_time(self.limit, settings.timeout),
                made_up=not trusted or settings.endpoint.starts_with_placeholder,
            )
        )

    async def _once(
        self, place: Target, headers: tuple[tuple[str, str], ...], *, trusted: bool
    ) -> HopReply:
        """Ask once; log it, whatever comes of it."""
        cookie, sent = self._cookies(place)
        if cookie:
            self.sent_cookies = True
            headers = (*headers, ("Cookie", cookie))
        began = perf_counter()
        status: int | None = None
        size, taken = 0, tuple[str, ...]()
        settings = self.upstream.settings
        try:
            reply = await self.upstream.client.get(
                HopRequest(place.url, headers, trusted, settings.max_body), self.limit
            )
            status, size, taken = reply.status, len(reply.body), self._store(place, reply)
        finally:
            took = (perf_counter() - began) * 1000
            self.exchanges.append(Exchange(place.url, took, status, size, sent, taken))
        return reply

    def _cookies(self, place: Target) -> tuple[str, tuple[str, ...]]:
        """Give the Cookie header for *place*, and the names in it."""
        if self.jar is None or not len(self.jar):
            return "", ()
        host, path, secure, now = place.host, place.path, place.is_secure, self.upstream.now()
        header = self.jar.header_for(host=host, path=path, secure=secure, now=now)
        if not header:
            return "", ()
        return header, self.jar.names_for(host=host, path=path, secure=secure, now=now)

    def _store(self, place: Target, reply: HopReply) -> tuple[str, ...]:
        """Keep what *reply* sets, and name it."""
        set_cookies = [value for name, value in reply.headers if name == "set-cookie"]
        if not set_cookies:
            return ()
        self.set_cookies = True
        if self.jar is None:
            return ()
        return self.jar.store(
            set_cookies,
            host=place.host,
            path=place.path,
            secure=place.is_secure,
            now=self.upstream.now(),
        )


def lookup(request: AdRequest, viewer: str) -> Callable[[Placeholder], str]:
    """Make the function that finds what a template's placeholders stand for in *request*."""

    def look(placeholder: Placeholder) -> str:
        match placeholder.kind:
            case "query":
                return request.query.get(placeholder.name, "")
            case "header":
                return request.header(placeholder.name)
            case "viewer":
                return viewer
            case "client_ip":
                return request.device.ip
            case "rest":
                return _safe_rest(request.rest)

    return look


def _said(source: Source, session: VastSession) -> str:
    """Give what *source* names, and what an ad server is told in its place."""
    said = found(source, session.request_facts.ad_request)
    if source.kind != "header":
        return said
    # A device behind a trusted proxy: its own headers are what ad servers see.
    names = (source.name.lower(), f"x-device-{source.name.lower()}")
    told = [value for key, value in session.device_headers if key.lower() in names]
    return "\n".join([said, *told])


def _templates(texts: Mapping[str, str]) -> tuple[tuple[str, Template], ...]:
    return tuple((name, Template.parse(each)) for name, each in texts.items())


def _is_listed(name: str, pattern: str) -> bool:
    """Whether a host is the one of *pattern*, or below it (``*.example.com``)."""
    wanted = pattern.lower()
    return name.endswith(wanted[1:]) if wanted.startswith("*.") else name == wanted


def _safe_rest(rest: str) -> str:
    """Keep *rest* in the path: what would begin a query or a fragment is encoded."""
    return rest.replace("?", "%3F").replace("#", "%23")


def _with_rest(url: str, rest: str) -> str:
    """Append the *rest* of a route's path to the path of *url*, as reverse proxies do."""
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}/{rest}{mark}{query}"
