"""The session of one ad request: its context, its cookies, its clock, and whom it asks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from vastproxy.model import AdRequest, Device, HopReply
from vastproxy.observe.trace import Exchange, Trace
from vastproxy.session.context import SessionContext
from vastproxy.session.cookies import CookieJar
from vastproxy.vast.document import VastDocument
from vastproxy.vast.macros import Macros


@dataclass(frozen=True, slots=True)
class Fetched:
    """A hop's document, and where it finally came from."""

    reply: HopReply
    url: str


class Upstream(Protocol):
    """What a session asks of its upstream."""

    @property
    def name(self) -> str:
        """What the operator calls it."""

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

    async def close(self) -> None:
        """Release what the session holds."""


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

    @property
    def device(self) -> Device:
        """Who asks."""
        return self.ad_request.device


class VastSession:
    """
    One ad request at one upstream.

    *context* never changes, *jar* does; where several upstreams are asked in turn, their sessions
    share both. *macros* are filled on every hop.
    """

    def __init__(
        self,
        context: SessionContext,
        upstream: Upstream,
        *,
        jar: CookieJar,
        macros: Macros,
        request: Request,
        trace: Trace | None = None,
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

    @property
    def context(self) -> SessionContext:
        """Who this request is, on every hop."""
        return self._context

    async def request(
        self, *, params: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
    ) -> str:
        """
        Ask the entry upstream once, and give its answer as text.

        *params* are appended to its query, *headers* to its headers. Raises UpstreamError.
        """
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")
        url = self.upstream.entry_url(self, params)
        fetched = await self.upstream.fetch(self, url, [], trusted=True, headers=headers)
        return fetched.reply.body.decode("utf-8", "replace")

    async def close(self) -> None:
        """End the session: it asks nobody any more."""
        self._closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<VastSession {self._context.request_id} at {self.upstream.name}>"
