"""
URLs as ad servers wrote them.

What an ad server put into a URL goes out byte for byte: it may be signed. Only what may not stand
on a request line is percent-encoded; no ``%`` that is there is touched, no bracket, no brace.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from yarl import URL

from vastproxy.errors import RedirectError
from vastproxy.vast import links

# RFC 3986 section 2 allows none of these; servers refuse them on the request line.
_NOT_ON_THE_WIRE = re.compile('[\x00-\x20"<>\x7f-\U0010ffff]')
# Browsers drop these wherever they stand in a URL (WHATWG URL Standard, section 4.4).
_LINE_BREAKS = re.compile("[\t\r\n]")
_PARTS = re.compile(r"(?i:(https?)):/{0,2}([^/?#\\]*)([^#]*)")
MAX_AUTHORITY = 512
"""Characters of user, host and port: a host has 253 at the most (RFC 1035 section 2.3.4)."""
# A name as it is asked for in DNS, with the underscore that some use; or an IPv6 address.
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._~-]+)?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class Target:
    """An absolute http(s) URL, cut up for the request."""

    url: str
    """Ready for the wire."""
    scheme: str
    host: str
    """Lower case; IPv6 in brackets."""
    port: int
    path: str
    """The path alone, for cookies; at least ``/``."""

    @property
    def is_secure(self) -> bool:
        """Whether it is asked by TLS."""
        return self.scheme == "https"


def target(url: str) -> Target:
    """
    Quote and cut up an absolute *url*. Raises RedirectError where it is no http(s) URL.

    >>> target("http://a.example/x y?b=%2f[C]'").url
    "http://a.example/x%20y?b=%2f[C]'"
    """
    text = _LINE_BREAKS.sub("", url).strip()
    match = _PARTS.match(text)
    if match is None:
        raise RedirectError(f"no http or https URL: {text[:80]!r}")
    scheme, rest = match[1].lower(), match[3]
    if len(match[2]) > MAX_AUTHORITY:
        raise RedirectError(f"no usable host: it has {len(match[2])} characters")
    authority, host, port = _authority(match[2], 443 if scheme == "https" else 80)
    rest = _NOT_ON_THE_WIRE.sub(_quoted, rest)
    if rest[:1] != "/":
        rest = "/" + rest
    return Target(f"{scheme}://{authority}{rest}", scheme, host, port, rest.partition("?")[0])


def _quoted(match: re.Match[str]) -> str:
    # A lone surrogate comes from bytes that were no UTF-8: it is sent as "?".
    return quote(match[0].encode("utf-8", "replace"), safe="")


@lru_cache(maxsize=4096)
def _authority(text: str, default_port: int) -> tuple[str, str, int]:
    """Give an authority as it is sent, its host, and its port; names beyond ASCII as IDNA."""
    try:
        parsed = URL(f"http://{text}/")
        host, port = parsed.raw_host, parsed.explicit_port
    except ValueError as error:
        raise RedirectError(f"no usable host in {text[:80]!r}: {error}") from None
    if not host or not _HOST.fullmatch(host):
        raise RedirectError(f"no host in {text[:80]!r}")
    bracketed = f"[{host}]" if ":" in host else host
    user, at, _ = text.rpartition("@")
    sent = f"{_NOT_ON_THE_WIRE.sub(_quoted, user)}{at}{bracketed}" + (
        f":{port}" if port is not None else ""
    )
    return sent, bracketed.lower(), port if port is not None else default_port


def joined(base: str, location: str) -> str:
    """
    Resolve a ``Location`` against the URL it came from (RFC 9110 section 10.2.2).

    An absolute one stays as it is. Raises RedirectError where nothing can be made of it.
    """
    text = location.strip()
    if not text:
        raise RedirectError("a redirect without a target")
    if _SCHEME.match(text):
        return text
    return links.joined(base, text)


@lru_cache(maxsize=256)
def _parameter(name: str) -> re.Pattern[str]:
    return re.compile(rf"([?&;]{re.escape(name)}=)[^&#;]*")


def with_parameter(url: str, name: str, value: str) -> str:
    """Replace the value of each query parameter *name* that *url* has; *value* is encoded."""
    if f"{name}=" not in url:
        return url
    return _parameter(name).sub(lambda match: match[1] + value, url)


def extended(url: str, query: str) -> str:
    """Append *query* (encoded, without a question mark) to the query of *url*."""
    if not query:
        return url
    head, hash_, fragment = url.partition("#")
    mark = "" if head.endswith(("?", "&")) else "&" if "?" in head else "?"
    return f"{head}{mark}{query}{hash_}{fragment}"
