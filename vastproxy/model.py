"""
What travels: one ad request from player to answer, one hop from URL to reply.

Everything here is frozen. A stage that changes something hands on a changed copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl


def clean(text: str) -> str:
    """Replace lone surrogates (bytes that were no UTF-8): they cannot be encoded again."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


class FrozenMapping(Mapping[str, str]):
    """
    A mapping of strings that cannot change and can be hashed.

    :class:`types.MappingProxyType` can be read only, but has no hash.
    """

    __slots__ = ("_hash", "_items")

    def __init__(self, items: Mapping[str, str] | None = None) -> None:
        self._items = dict(items or {})
        self._hash: int | None = None

    def __getitem__(self, key: str) -> str:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._items.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenMapping):
            return self._items == other._items
        return isinstance(other, Mapping) and self._items == dict(other)

    def __repr__(self) -> str:
        return f"<FrozenMapping {self._items!r}>"


class Query(Mapping[str, str]):
    """
    A query string, decoded when somebody looks: most requests are only passed on.

    Of a name that repeats the first value counts.
    """

    __slots__ = ("_items", "raw")

    def __init__(self, raw: str = "") -> None:
        self.raw = raw
        self._items: dict[str, str] | None = None

    def _decoded(self) -> dict[str, str]:
        if self._items is None:
            pairs = parse_qsl(self.raw, keep_blank_values=True, errors="replace")
            self._items = dict(reversed(pairs))
        return self._items

    def __getitem__(self, key: str) -> str:
        return self._decoded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __len__(self) -> int:
        return len(self._decoded())

    def __repr__(self) -> str:
        return f"<Query {self.raw!r}>"


@dataclass(frozen=True, slots=True)
class Device:
    """Who asks: what VAST 4.3 section 1.1.3 wants ad servers to be told about a viewer's device."""

    ip: str = ""
    """The viewer's address, as far as trusted proxies told it."""
    user_agent: str = ""
    referer: str = ""
    accept_language: str = ""
    requested_with: str = ""
    forwarded_for: str = ""
    """The addresses the request came through so far, for ``X-Forwarded-For`` in append mode."""


@dataclass(frozen=True, slots=True)
class AdRequest:
    """One player's request, as the flow sees it: no framework, no socket."""

    route: str
    """The path of the route as written in config.yaml."""
    rest: str = ""
    """What ``/{rest}`` of the route stood for, byte for byte, without a leading slash."""
    query: Query = field(default_factory=Query)
    """The player's query; ``query.raw`` is what stood behind the question mark, byte for byte."""
    headers: Mapping[str, str] = field(default_factory=FrozenMapping)
    """Header values by lower-case name; the first of each."""
    device: Device = field(default_factory=Device)
    request_id: str = ""
    """The id a trusted proxy gave this request; empty: one is made."""
    received: float | None = None
    """When it came in, on the loop's monotonic clock, in seconds; None: just now."""
    base: str = ""
    """Where the player reaches the proxy: scheme, host and path, without a slash at the end."""

    def header(self, name: str) -> str:
        """Give the value of header *name*, as text that can be encoded; empty for none."""
        return clean(self.headers.get(name, ""))


@dataclass(frozen=True, slots=True)
class HopRequest:
    """One HTTP GET of an ad server, ready for the wire."""

    url: str
    """Absolute, quoted, sent as it is."""
    headers: tuple[tuple[str, str], ...]
    trusted: bool
    """True: the operator named this address. False: a third party did, and the guard applies."""
    max_body: int
    """Bytes after decompression."""
    once: bool = False
    """True, for what is not trusted: never sent twice, so on a connection of its own."""


@dataclass(frozen=True, slots=True)
class HopReply:
    """What an ad server answered to one GET: no redirect followed, the body whole."""

    status: int
    headers: tuple[tuple[str, str], ...]
    """Names in lower case, in the order received; repeated headers repeat."""
    body: bytes

    def header(self, name: str) -> str | None:
        """Give the first value of header *name* (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True)
class AdResponse:
    """What a player is answered."""

    body: bytes
    request_id: str
    ads: int = 0
    """How many ads are in it."""
    hops: int = 0
    """How many documents ad servers were asked for."""
    upstream: str = ""
    """Whose ads they are; empty for none."""
    flags: tuple[str, ...] = ()
    """What happened on the way, in the access log's words."""
    refused: tuple[str, ...] = ()
    """Which caps and budgets refused an ad, or would have, in words."""
    timings: tuple[tuple[str, float], ...] = ()
    """Name and milliseconds of each step, for ``Server-Timing``."""
    waterfall: tuple[str, ...] = ()
    """What became of each upstream, as ``primary:breaker``; empty where one was asked, simply."""
    choices: tuple[tuple[str, str], ...] = ()
    """The same for each that was considered, in two words, for those who count."""
    breaker: tuple[str, ...] = ()
    """Circuit breakers that changed because of this request, in words."""
    cache: tuple[str, ...] = ()
    """What upstreams' caches did, in words."""
    cache_status: tuple[str, ...] = ()
    """The same as members of the header ``Cache-Status`` (RFC 9211)."""
