"""
What travels: one ad request from player to answer, one hop from URL to reply.

Everything here is frozen. A stage that changes something hands on a changed copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True)
class Device:
    """Who asks: what VAST 4.3 section 1.1.3 wants ad servers to be told about a viewer's device."""

    ip: str = ""
    """The viewer's address, as far as trusted proxies told it."""
    user_agent: str = ""
    referer: str = ""
    accept_language: str = ""
    requested_with: str = ""


@dataclass(frozen=True, slots=True)
class AdRequest:
    """One player's request, as the flow sees it: no framework, no socket."""

    route: str
    """The path of the route as written in config.yaml."""
    rest: str = ""
    """What ``/{rest}`` of the route stood for, byte for byte, without a leading slash."""
    query_string: str = ""
    """The player's query, byte for byte, without the question mark."""
    query: Mapping[str, str] = field(default_factory=FrozenMapping)
    """The same, decoded; the first value of each name."""
    headers: Mapping[str, str] = field(default_factory=FrozenMapping)
    """Header values by lower-case name; the first of each."""
    cookies: Mapping[str, str] = field(default_factory=FrozenMapping)
    """The player's cookies for the proxy."""
    device: Device = field(default_factory=Device)
    request_id: str = ""
    """The id a trusted proxy gave this request; empty: one is made."""
    received: float = 0.0
    """When it came in, on the loop's monotonic clock, in seconds."""


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
    content_type: str = "application/xml; charset=utf-8"
    timings: tuple[tuple[str, float], ...] = ()
    """Name and milliseconds of each step, for ``Server-Timing``."""
    log: Mapping[str, object] = field(default_factory=dict)
    """The facts of the access log."""
