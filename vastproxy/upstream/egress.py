"""
Keep hops that third parties name away from addresses that are none of their business.

Rule 1: what counts is the address that is connected to, judged right before the socket is made, on
every hop and every redirect. No name, no spelling and no second DNS answer gets past that.
Rule 2: the URL gate comes earlier and only says clearly what the socket would refuse anyway, and
what the socket cannot see: schemes, userinfo, the proxy's own names.
Rule 3: the table of addresses is our own. ``ipaddress.is_global`` of Python 3.11 takes
``64:ff9b::7f00:1``, ``2002:7f00:1::`` and ``224.0.0.1`` for global.
Rule 4: networks that the operator allows win over everything here but the shape of a URL and the
proxy's own names.

A refusal is one line for the trace. It never goes to a player: it would tell what is behind here.
"""

import errno
import re
import socket
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

Network = IPv4Network | IPv6Network

AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]
"""What :func:`socket.getaddrinfo` gives: family, type, protocol, canonical name, address."""

WEB_PORTS: Final = frozenset({80, 443})

MAX_URL: Final = 8_190
"""Characters of a URL: the longest line that aiohttp's parser takes by default."""

MAX_HOST: Final = 253
"""Characters of a host name: the 255 octets of RFC 1035 section 2.3.4, written out."""

MAX_PORT: Final = 65_535
"""The last port: 16 bits, RFC 9293 section 3.1."""

# Registry: the IANA special-purpose address registries (RFC 6890), and the RFC named.
# No block overlaps another of its table.
_IPV4_BLOCKS: Final = (
    ("0.0.0.0/8", "this network, RFC 791"),
    ("10.0.0.0/8", "private, RFC 1918"),
    ("100.64.0.0/10", "shared by carriers, RFC 6598"),
    ("127.0.0.0/8", "loopback, RFC 1122"),
    ("169.254.0.0/16", "link-local, RFC 3927"),
    ("172.16.0.0/12", "private, RFC 1918"),
    ("192.0.0.0/24", "protocol assignments, RFC 6890"),
    ("192.0.2.0/24", "documentation, RFC 5737"),
    ("192.31.196.0/24", "AS112, RFC 7535"),
    ("192.52.193.0/24", "multicast tunnels, RFC 7450"),
    ("192.88.99.0/24", "6to4 relays, RFC 7526"),
    ("192.168.0.0/16", "private, RFC 1918"),
    ("192.175.48.0/24", "AS112, RFC 7534"),
    ("198.18.0.0/15", "benchmarks, RFC 2544"),
    ("198.51.100.0/24", "documentation, RFC 5737"),
    ("203.0.113.0/24", "documentation, RFC 5737"),
    ("224.0.0.0/4", "multicast, RFC 5771"),
    ("240.0.0.0/4", "reserved or broadcast, RFC 1112 and RFC 919"),
)
_IPV6_BLOCKS: Final = (
    ("::/127", "unspecified or loopback, RFC 4291"),
    ("64:ff9b::/96", "NAT64, RFC 6052"),
    ("64:ff9b:1::/48", "local NAT64, RFC 8215"),
    ("100::/64", "discarded, RFC 6666"),
    ("2001::/23", "protocol assignments, RFC 2928 (Teredo: RFC 4380)"),
    ("2001:db8::/32", "documentation, RFC 3849"),
    ("2002::/16", "6to4, RFC 3056"),
    ("2620:4f:8000::/48", "AS112, RFC 7534"),
    ("3fff::/20", "documentation, RFC 9637"),
    ("5f00::/16", "segment routing, RFC 9602"),
    ("fc00::/7", "unique local, RFC 4193"),
    ("fe80::/10", "link-local, RFC 4291"),
    ("fec0::/10", "site-local, RFC 3879"),
    ("ff00::/8", "multicast, RFC 4291"),
)
_UNASSIGNED: Final = "outside of global unicast 2000::/3, RFC 3587"

_IPV4_BYTES: Final = 4
_MAPPED: Final = bytes(10) + b"\xff\xff"
"""The first 96 bits of ``::ffff:0:0/96``, IPv4-mapped: RFC 4291 section 2.5.5.2."""
_NAT64: Final = bytes.fromhex("0064ff9b") + bytes(8)
"""The first 96 bits of ``64:ff9b::/96``: RFC 6052 section 2.1."""

# RFC 6762, RFC 6761, RFC 8375; .internal: ICANN board resolution 2024.07.29.06.
_LOCAL_NAMES: Final = (".local", ".localhost", ".home.arpa", ".internal")

# ASCII: without it, the long s of Unicode is an "s", too.
_URL: Final = re.compile(r"(https?)://([^/?#]*)", re.IGNORECASE | re.ASCII)
# Names as the DNS has them, with the underscore that ad servers use: narrower than RFC 3986, so
# that no two parsers disagree about what is a host.
_AUTHORITY: Final = re.compile(
    r"(\[(?=[0-9A-Fa-f.]*:)[0-9A-Fa-f:.]+\]|[0-9A-Za-z_-]{1,63}(?:\.[0-9A-Za-z_-]{1,63})*\.?)"
    r"(?::([0-9]{0,5}))?"
)
# A host that ends in a number is an address to some parsers: URL Standard, section 3.5.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_BLANK_OR_CONTROL: Final = re.compile(r"[\x00-\x20\x7f]")


class EgressRefused(OSError):  # noqa: N818  a refusal, and no fault of ours
    """
    A connection that the egress guard did not let happen; *reason* is one line for the trace.

    ``errno`` is set, as aiohttp wants it of a failed connection. The message does not tell the
    reason: where every address of a name is refused, aiohttp raises one of the errors as it is if
    their messages are equal, and else a plain ``OSError`` in place of them all.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(errno.EACCES, "refused by the egress guard")


@dataclass(frozen=True, slots=True)
class _Range:
    """Addresses of one family from *first* to *last*, as numbers, and what they are."""

    first: int
    last: int
    meaning: str


def _range(network: Network, meaning: str) -> _Range:
    first = int(network.network_address)
    return _Range(first, first + network.num_addresses - 1, meaning)


def _table(blocks: Iterable[tuple[str, str]]) -> tuple[tuple[int, ...], tuple[_Range, ...]]:
    ranges = [_range(ip_network(block), f"{meaning} ({block})") for block, meaning in blocks]
    ranges.sort(key=lambda each: each.first)
    return tuple(each.first for each in ranges), tuple(ranges)


_IPV4_TABLE: Final = _table(_IPV4_BLOCKS)
_IPV6_TABLE: Final = _table(_IPV6_BLOCKS)


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """
    Where hops named by third parties may go.

    Every question is answered with the reason for a refusal, in one line, or None.
    """

    allow: tuple[Network, ...] = ()
    """Networks that may be reached on every port although they are private, or the proxy's own."""
    ports: frozenset[int] = WEB_PORTS
    nat64: bool = False
    """True: judge the IPv4 address inside of ``64:ff9b::/96`` (IPv6-only networks with DNS64)."""
    own_hosts: frozenset[str] = frozenset()
    """Public names of the proxy, ``name`` or ``name:port``: a hop to them is a loop."""
    own_addresses: frozenset[str] = frozenset()
    """Addresses of this machine: see :func:`own_addresses`."""

    _allowed: tuple[tuple[int, _Range], ...] = field(init=False, repr=False, compare=False)
    _own: frozenset[bytes] = field(init=False, repr=False, compare=False)
    _own_names: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        allowed = tuple((each.max_prefixlen // 8, _range(each, "")) for each in self.allow)
        own = filter(None, map(_packed, self.own_addresses))
        names = frozenset(_host_name(each) for each in self.own_hosts)
        object.__setattr__(self, "_allowed", allowed)
        object.__setattr__(self, "_own", frozenset(own))
        object.__setattr__(self, "_own_names", names)

    def address_problem(self, address: str) -> str | None:
        """Judge one IP *address* in its usual spelling; a zone (``%eth0``) is passed over."""
        packed = _packed(address)
        if packed is None:
            return f"{address!r} is no IP address"
        if self._allows(packed):
            return None
        meaning = self._meaning(packed)
        return meaning and f"{address} is {meaning}"

    def endpoint_problem(self, address: str, port: int) -> str | None:
        """Judge one IP *address* with the *port* that is to be connected to."""
        problem = self.address_problem(address)
        if problem is not None or port in self.ports:
            return problem
        packed = _packed(address)
        return None if packed and self._allows(packed) else self._port_problem(port)

    def url_problem(self, url: str) -> str | None:
        """
        Judge an absolute *url*, already quoted, before a name is looked up.

        A name may lie in an allowed network: where there are such, ports and kinds of names are
        left to the socket's check, which always runs.
        """
        if len(url) > MAX_URL:
            return f"a URL of {len(url)} characters, more than {MAX_URL}"
        start = _URL.match(url)
        if start is None:
            return "no absolute URL of scheme http or https"
        if _BLANK_OR_CONTROL.search(url):
            return "a blank or a control character in the URL"
        found = _AUTHORITY.fullmatch(start[2])
        if found is None or len(found[1]) > MAX_HOST:
            return _authority_problem(start[2])
        port = int(found[2] or (443 if start[1].lower() == "https" else 80))
        if not 0 < port <= MAX_PORT:
            return f"there is no port {port}"
        return self._host_problem(_host_name(found[1]), port)

    def _host_problem(self, host: str, port: int) -> str | None:
        """Judge *host*, in lower case and without the root's dot."""
        if host in self._own_names or f"{host}:{port}" in self._own_names:
            return f"{host} is the proxy itself"
        if host.startswith("[") or _NUMBER.fullmatch(host.rpartition(".")[2]):
            return self.endpoint_problem(host.strip("[]"), port)
        if self.allow:
            return None
        if "." not in host or host.endswith(_LOCAL_NAMES):
            return f"{host} is a name of a local network"
        return self._port_problem(port)

    def _port_problem(self, port: int) -> str | None:
        return None if port in self.ports else f"port {port} is none of {sorted(self.ports)}"

    def _allows(self, packed: bytes) -> bool:
        size, number = len(packed), int.from_bytes(packed)
        if any(size == width and _in(number, each) for width, each in self._allowed):
            return True
        inner = self._inner(packed)
        return inner is not packed and self._allows(inner)

    def _meaning(self, packed: bytes) -> str | None:
        """Tell why *packed* may not be reached, whatever is allowed; None: it is public."""
        if packed in self._own:
            return "this machine's own address"
        inner = self._inner(packed)
        return self._meaning(inner) if inner is not packed else _special(packed)

    def _inner(self, packed: bytes) -> bytes:
        """Give the IPv4 address that is meant by an IPv6 one; else *packed* itself."""
        if packed.startswith(_MAPPED) or (self.nat64 and packed.startswith(_NAT64)):
            return packed[-_IPV4_BYTES:]
        return packed


def guarded_socket_factory(policy: EgressPolicy) -> Callable[[AddressInfo], socket.socket]:
    """
    Give the ``socket_factory`` of an ``aiohttp.TCPConnector`` that keeps *policy*.

    It is called once for each address tried, right before connecting: between the check and the
    connection nothing is looked up again. A refusal is an :class:`EgressRefused`, raised
    before there is a socket.
    """

    def guarded_socket(info: AddressInfo) -> socket.socket:
        family, kind, protocol, _, address = info
        if family not in {socket.AF_INET, socket.AF_INET6}:
            raise EgressRefused(f"address family {family} is not of the internet")
        problem = policy.endpoint_problem(address[0], address[1])
        if problem is not None:
            raise EgressRefused(problem)
        return socket.socket(family, kind, protocol)

    return guarded_socket


def own_addresses() -> frozenset[str]:
    """
    Find the addresses that this machine's default routes go out from; none where it has no route.

    A datagram socket "connected" to a documentation address (RFC 5737, RFC 3849) gets its own
    address from the routing table. Nothing is sent.
    """
    routes = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
    found = (_source(family, target) for family, target in routes)
    return frozenset(filter(None, found))


def _source(family: socket.AddressFamily, target: str) -> str | None:
    discard_port = 9
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, discard_port))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _packed(address: str) -> bytes | None:
    """Give *address* in network order, without its zone (RFC 4007); None where it is none."""
    bare = address.partition("%")[0]
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        return socket.inet_pton(family, bare)
    except (OSError, ValueError):  # ValueError: a NUL, or what is no text
        return None


def _special(packed: bytes) -> str | None:
    """Name the special block that *packed* lies in; None: it is a public address."""
    firsts, ranges = _IPV4_TABLE if len(packed) == _IPV4_BYTES else _IPV6_TABLE
    number = int.from_bytes(packed)
    at = bisect_right(firsts, number) - 1
    if at >= 0 and _in(number, ranges[at]):
        return ranges[at].meaning
    return _UNASSIGNED if ranges is _IPV6_TABLE[1] and packed[0] >> 5 != 1 else None


def _in(number: int, addresses: _Range) -> bool:
    return addresses.first <= number <= addresses.last


def _host_name(text: str) -> str:
    """Give one spelling to names that the DNS takes for the same: RFC 4343; the root's dot."""
    return text.lower().removesuffix(".")


def _authority_problem(authority: str) -> str:
    """Say what is wrong with an *authority* that is no host with a port."""
    if "@" in authority:
        return "a user name in the URL"
    if not authority:
        return "no host in the URL"
    return f"{authority[:MAX_HOST]!r} is no host that can be looked up"
