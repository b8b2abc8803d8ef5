"""
Values as people write them: ``800ms``, ``512KiB``, ``50%``, ``100/s``, ``query:uid``, ``2.50``.

Rule 1: every reader takes text and gives a value, or raises ValueError with a whole message.
Rule 2: a number without a unit is refused; whoever writes one means a different unit than we do.
Rule 3: money is a Decimal, and never was a float.
Rule 4: the URL of a state may hold a password: no message, ``str`` or ``repr`` has it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Literal, Self

Network = IPv4Network | IPv6Network
SourceKind = Literal["query", "header", "cookie"]
StateKind = Literal["memory", "redis", "cluster", "sqlite", "postgresql"]

SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
"""Seconds in one unit of time."""
BYTES = {
    "B": 1,
    "kB": 1000,
    "KiB": 1024,
    "MB": 1000**2,
    "MiB": 1024**2,
    "GB": 1000**3,
    "GiB": 1024**3,
}
"""Bytes in one unit of size: SI prefixes count in thousands, IEC 80000-13 ones in 1024s."""
TOKEN_PATTERN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - a token of RFC 9110, no secret
"""A ``token``, which names of headers and of cookies are (RFC 9110 section 5.6.2)."""
LONGEST_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

MAX_PORT = 65535
MIN_RATE: Final = 1 / 3600
"""Calls a second: one an hour. Whoever wants fewer wants none."""
MAX_RATE: Final = 1_000_000
"""Calls a second: far more than one machine makes, and far less than a double can count."""
MAX_MONEY: Final = Decimal(9_000_000_000)
"""Units of a currency: their millionths are integers that a double holds exactly, as Lua's are."""
MONEY_DECIMALS: Final = 6
"""Digits behind the point: sums are kept in millionths of a unit."""
STATE_KINDS: Final[Mapping[str, StateKind]] = {
    "memory": "memory",
    "redis": "redis",
    "rediss": "redis",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
    "postgresql": "postgresql",
    "postgresql+asyncpg": "postgresql",
    "postgresql+psycopg": "postgresql",
    "postgres": "postgresql",
}
"""Which kind of state the scheme of a URL means."""
_EXAMPLES: Final[Mapping[StateKind, str]] = {
    "redis": "redis://127.0.0.1:6379/0",
    "cluster": "redis+cluster://127.0.0.1:6379",
    "postgresql": "postgresql://user:password@host:5432/db",
}

# Nine digits hold 30 years of seconds; without a bound, a float could become infinite.
_NUMBER_PATTERN = r"[0-9]{1,9}(\.[0-9]{1,9})?"
DURATION_PATTERN = rf"^{_NUMBER_PATTERN}(ms|s|m|h|d)$"
SIZE_PATTERN = rf"^{_NUMBER_PATTERN}(B|kB|KiB|MB|MiB|GB|GiB)$"
SHARE_PATTERN = rf"^{_NUMBER_PATTERN}%$"
RATE_PATTERN = rf"^{_NUMBER_PATTERN}/(s|m|h)$"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\.?"
_BRACKETED = r"\[[0-9A-Fa-f:.]+\]"
# RFC 3986 section 3.2: what is no part of a user or a password is percent-encoded there.
_USER = r"(?:[!$&'()*+,;=._~A-Za-z0-9-]|%[0-9A-Fa-f]{2})"
_AUTHORITY = re.compile(
    rf"(?:({_USER}*)(?::((?:{_USER}|:)*))?@)?(?:({_HOST}|{_BRACKETED})(?::([0-9]{{1,5}}))?)?"
)
_OPTIONS = re.compile(r"[A-Za-z0-9_.-]+=[!-%'-~]*(?:&[A-Za-z0-9_.-]+=[!-%'-~]*)*")
_PASSWORD_OPTION = re.compile(r"((?:^|&)[^=&]*pass[^=&]*)=[^&]*", re.IGNORECASE)
MONEY_PATTERN = rf"^[0-9]{{1,10}}(\.[0-9]{{1,{MONEY_DECIMALS}}})?$"


def parse_duration(text: str) -> float:
    """Turn *text*, such as ``1.5s``, into seconds, more than 0; else raise ValueError."""
    number, unit = _split(text)
    if number and not unit:
        raise ValueError(f"{shown(text)} has no unit (write {number}ms, {number}s or {number}m)")
    if not number or unit not in SECONDS:
        raise ValueError(f"{shown(text)} is no duration (write 800ms, 2s or 1h)")
    seconds = float(number) * SECONDS[unit]
    if seconds <= 0:
        raise ValueError(f"{shown(text)} is no time at all (write more than 0, such as 800ms)")
    return seconds


def parse_size(text: str) -> int:
    """Turn *text*, such as ``512KiB``, into bytes, at least one; else raise ValueError."""
    number, unit = _split(text)
    if number and not unit:
        raise ValueError(f"{shown(text)} has no unit (write {number}B, {number}KiB or {number}MiB)")
    if not number or unit not in BYTES:
        raise ValueError(f"{shown(text)} is no size (write 1000B, 512KiB or 2MiB)")
    size = int(float(number) * BYTES[unit])
    if size < 1:
        raise ValueError(f"{shown(text)} is less than one byte (write 1000B, 512KiB or 2MiB)")
    return size


def parse_share(text: str) -> float:
    """Turn *text*, such as ``50%`` or ``0.5``, into a part of one; else raise ValueError."""
    found = re.fullmatch(rf"({_NUMBER_PATTERN})(%?)", text)
    if not found:
        raise ValueError(f"{shown(text)} is no share (write 50%, or 0.5)")
    number, percent = float(found[1]), bool(found[3])
    share = number / 100 if percent else number
    if share <= 0:
        raise ValueError(f"{shown(text)} is no share at all (write more than 0%, such as 10%)")
    if share > 1:
        meant = "100% or less" if percent or number > 100 else f"{found[1]}%"  # noqa: PLR2004
        raise ValueError(f"{shown(text)} is more than the whole (write {meant})")
    return share


def parse_rate(text: str) -> float:
    """Turn *text*, such as ``100/s`` or ``6000/m``, into so many a second; else ValueError."""
    number, slash, unit = text.partition("/")
    if not re.fullmatch(_NUMBER_PATTERN, number) or (slash and unit not in {"s", "m", "h"}):
        raise ValueError(f"{shown(text)} is no rate (write 100/s, 6000/m or 360000/h)")
    if not slash:
        raise ValueError(f"{shown(text)} has no unit (write {number}/s, {number}/m or {number}/h)")
    rate = float(number) / SECONDS[unit]
    if rate < MIN_RATE:
        raise ValueError(f"{shown(text)} is too seldom (write 1/h or more)")
    if rate > MAX_RATE:
        raise ValueError(f"{shown(text)} is too often (write {MAX_RATE}/s or less)")
    return rate


def parse_money(text: str) -> Decimal:
    """Turn *text*, such as ``2.50``, into units of a currency, exactly; else raise ValueError."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text, re.ASCII):
        raise ValueError(f"{shown(text)} is no amount of money (write one such as 1000 or 2.50)")
    if not re.fullmatch(MONEY_PATTERN, text):
        if len(text.partition(".")[2]) > MONEY_DECIMALS:
            raise ValueError(
                f"{shown(text)} has more than {MONEY_DECIMALS} decimals (write one such as 0.0025)"
            )
        raise ValueError(f"{shown(text)} is too much (write {MAX_MONEY} or less)")
    amount = Decimal(text)
    if not amount:
        raise ValueError(f"{shown(text)} is no money at all (write more than 0, such as 2.50)")
    if amount > MAX_MONEY:
        raise ValueError(f"{shown(text)} is too much (write {MAX_MONEY} or less)")
    return amount


def shown(value: object) -> str:
    """Quote *value* for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen: a TCP port or a Unix socket."""

    host: str = ""
    """A name or an address without brackets; empty: every interface."""
    port: int = 0
    """0: any free port."""
    path: str = ""
    """Of a Unix socket; host and port mean nothing then."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``host:port``, ``:port``, ``[v6]:port`` or ``unix:/path``; else raise ValueError."""
        if text.startswith("unix:"):
            return cls._parse_path(text)
        found = re.fullmatch(rf"({_HOST}|({_BRACKETED})|):([0-9]{{1,5}})", text)
        if not found or int(found[3]) > MAX_PORT:
            raise ValueError(
                f"{shown(text)} is no address to listen on "
                "(write 127.0.0.1:8080, :8080, [::1]:8080 or unix:/run/vastproxy.sock)"
            )
        host = found[1].strip("[]")
        if found[2]:
            _check_address(host)
        return cls(host=host, port=int(found[3]))

    @classmethod
    def _parse_path(cls, text: str) -> Self:
        path = text.removeprefix("unix:")
        if not path.startswith("/") or not path.isprintable():
            raise ValueError(
                f"{shown(text)} names no absolute path (write unix:/run/vastproxy.sock)"
            )
        return cls(path=path)

    @property
    def is_local(self) -> bool:
        """Tell whether only programs on this machine can connect."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def clashes(self, other: "Listen") -> bool:
        """Tell whether *other* needs the same port or the same socket."""
        if self.path or other.path:
            return self.path == other.path
        everywhere = {self.host, other.host} & {"", "0.0.0.0", "::"}  # noqa: S104 - compared only
        same_host = self.host == other.host or bool(everywhere)
        return same_host and self.port == other.port and self.port != 0

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Source:
    """One place of the player's request where a value may be found."""

    kind: SourceKind
    name: str
    """Of a header: in lower case."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``query:NAME``, ``header:NAME`` or ``cookie:NAME``; else raise ValueError."""
        kind, _, name = text.partition(":")
        if kind == "query" and re.fullmatch(r"\S+", name):
            return cls("query", name)
        if kind == "header" and re.fullmatch(TOKEN_PATTERN, name):
            return cls("header", name.lower())
        if kind == "cookie" and re.fullmatch(TOKEN_PATTERN, name):
            return cls("cookie", name)
        raise ValueError(
            f"{shown(text)} names no part of a request "
            "(write query:uid, header:X-Uid or cookie:uid)"
        )

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True, repr=False)
class StateUrl:
    """
    Where state is kept; made by :meth:`parse`.

    Messages repeat nothing of the URL: what stands where is not known before it is understood.
    """

    kind: StateKind
    url: str
    """As the operator wrote it, with its password: for the backend alone."""
    public: str
    """The same without what is secret."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read *text*, such as ``redis://127.0.0.1:6379/0``; else raise ValueError."""
        scheme, separator, rest = text.partition("://")
        kind = STATE_KINDS.get(scheme) if separator else None
        if kind is None:
            raise ValueError(
                "this is the URL of no state (write memory://, redis://127.0.0.1:6379, "
                "rediss://..., redis+cluster://..., rediss+cluster://..., "
                "sqlite:///vastproxy.db or postgresql://user@host/db)"
            )
        if kind == "memory":
            _check_memory(rest)
            return cls(kind, text, text)
        if kind == "sqlite":
            _check_file(rest)
            return cls(kind, text, text)
        return cls(kind, text, f"{scheme}://{_checked_server(kind, rest)}")

    @property
    def is_shared(self) -> bool:
        """Tell whether several processes can have this state together."""
        return self.kind != "memory"

    def __str__(self) -> str:
        return self.public

    def __repr__(self) -> str:
        return f"StateUrl({self.public!r})"


def _check_memory(rest: str) -> None:
    if rest:
        raise ValueError("memory:// takes nothing behind it (write memory://)")


def _check_file(rest: str) -> None:
    path = rest.removeprefix("/")
    if not rest.startswith("/") or not path or path.endswith("/"):
        raise ValueError(
            "the URL names no file (write sqlite:///vastproxy.db, or with an absolute path "
            "sqlite:////var/lib/vastproxy.db)"
        )
    if path == ":memory:":
        raise ValueError("no second process could open this database (write memory://)")
    if not path.isprintable() or re.search(r"[?#]", path):
        raise ValueError(
            "the path has ?, # or a character that cannot be seen (write sqlite:///vastproxy.db)"
        )


def _checked_server(kind: StateKind, rest: str) -> str:
    """Check what follows ``scheme://``, and give it without what is secret."""
    example = _EXAMPLES[kind]
    whole, _, options = rest.partition("?")
    authority, slash, path = whole.partition("/")
    found = _AUTHORITY.fullmatch(authority)
    if not found or "@" in path or "#" in rest:
        raise ValueError(
            "what stands between :// and / is no [user:password@]host[:port] "
            f"(write {example}; in a password, write %40 for @, %2F for /, %23 for #, %25 for %)"
        )
    if options and not _OPTIONS.fullmatch(options):
        raise ValueError(f"what follows ? is no name=value&name=value (write {example})")
    _check_host_of_state(kind, found, options)
    _check_database(kind, path)
    login, at, place = authority.rpartition("@")
    user, colon, _ = login.partition(":")
    secret = "***" if colon else ""
    hidden = _PASSWORD_OPTION.sub(r"\1=***", options)
    mark = "?" if hidden else ""
    return f"{user}{colon}{secret}{at}{place}{slash}{path}{mark}{hidden}"


def _check_host_of_state(kind: StateKind, found: re.Match[str], options: str) -> None:
    user, password, host, port = found.groups()
    by_option = kind == "postgresql" and re.search(r"(?:^|&)host=.", options)
    if not host and not by_option:
        raise ValueError(f"the URL names no host (write {_EXAMPLES[kind]})")
    if host and host.startswith("[") and not _is_address(host.strip("[]")):
        raise ValueError("what stands in brackets is no IP address (write one such as [::1])")
    if port is not None and not 0 < int(port) <= MAX_PORT:
        raise ValueError(f"the port is none from 1 to {MAX_PORT} (write {_EXAMPLES[kind]})")
    if kind != "postgresql" and user and password is None:
        raise ValueError(
            "there is a user without a password (write redis://user:password@host, or, for a "
            "password alone, redis://:password@host)"
        )


def _check_database(kind: StateKind, path: str) -> None:
    if kind == "postgresql":
        if not re.fullmatch(r"[!-.0-~]+", path):
            raise ValueError(f"the URL names no database (write {_EXAMPLES[kind]})")
        return
    if not re.fullmatch(r"[0-9]{0,5}", path):
        raise ValueError(
            f"what follows the host is no number of a database (write {_EXAMPLES[kind]})"
        )
    if kind == "cluster" and path.strip("0"):
        raise ValueError(f"a cluster has the database 0 only (write {_EXAMPLES[kind]})")


def parse_network(text: str) -> Network:
    """Read a network, or an address as a network of one; else raise ValueError."""
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{shown(text)} is no network (write 10.0.0.0/8 or 192.0.2.7)") from None
    if "/" in text and ip_address(text.partition("/")[0]) != network.network_address:
        raise ValueError(f"{shown(text)} names one address of a network (write {network})")
    return network


def check_authority(url: str) -> None:
    """Raise ValueError if *url* does not begin with http(s), a host, and maybe a port."""
    found = re.match(r"https?://([^/?#]*)", url, re.IGNORECASE)
    if not found:
        raise ValueError(f"{shown(url)} is no absolute URL (begin it with https:// or http://)")
    if "@" in found[1]:
        raise ValueError(
            "a user and a password do not belong into a URL, which is logged "
            "(set the header Authorization instead)"
        )
    check_host(found[1])
    if not re.fullmatch(r"[!-~]*", url):
        raise ValueError(
            f"{shown(url)} has a character that no URL can have "
            "(percent-encode it: a space is %20; a host is written as xn--...)"
        )


def check_host(text: str) -> None:
    """Raise ValueError if *text* is neither a host nor a host with a port."""
    found = re.fullmatch(rf"(?:{_HOST}|({_BRACKETED}))(?::([0-9]{{1,5}}))?", text)
    if not found or not (found[2] is None or 0 < int(found[2]) <= MAX_PORT):
        raise ValueError(
            f"{shown(text)} is no host (write ads.example.com or ads.example.com:8443)"
        )
    if found[1]:
        _check_address(found[1].strip("[]"))


def parse_host_pattern(text: str) -> str:
    """Read ``host``, ``host:port`` or ``*.host``, and give it in lower case; or ValueError."""
    check_host(text.removeprefix("*."))
    return text.lower()


def _check_address(text: str) -> None:
    if not _is_address(text):
        raise ValueError(f"{shown(text)} is no IP address (write one such as ::1)")


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _split(text: str) -> tuple[str, str]:
    found = re.fullmatch(rf"({_NUMBER_PATTERN})([A-Za-z]*)", text)
    return (found[1], found[3]) if found else ("", "")
