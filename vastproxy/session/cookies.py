"""
Keep what ad servers set on one hop, and give it back on the next: to its own site, to nobody else.

The rules are those of RFC 6265, tightened where browsers have tightened them since ("6265bis"
stands for its revision, draft-ietf-httpbis-rfc6265bis).

Rule 1: a cookie goes to the host that set it, or below the ``Domain`` it named; a ``Domain`` that
would cross a public suffix makes the whole cookie void.
Rule 2: a value goes back as it came, character for character: ad servers sign theirs.
Rule 3: nothing here has a clock or does I/O; the time is an argument, in Unix seconds.
Rule 4: any text as ``Set-Cookie`` gives a :class:`Cookie` or None, in time linear in its length.

``SameSite``, ``HttpOnly`` and ``Partitioned`` tell pages and scripts apart. Here are none, so they
are passed over.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from publicsuffixlist import PublicSuffixList

MAX_HEADER_BYTES: Final = 8_000
"""Of the ``Cookie`` header: most servers refuse lines beyond 8 KB."""

MAX_COOKIES: Final = 50
"""Cookies in one jar: what RFC 6265 section 6.1 wants kept for each domain at the least."""

MAX_COOKIE_BYTES: Final = 4_096
"""Octets of name and value together: 6265bis section 5.6, RFC 6265 section 6.1."""

MAX_ATTRIBUTE_BYTES: Final = 1_024
"""Octets of one attribute's value; a longer attribute is passed over: 6265bis section 5.6."""

MAX_AGE: Final = 400 * 86_400
"""Seconds that a cookie may live, whatever it asks for (400 days): 6265bis section 5.5."""

KEPT_SUFFIXES: Final = 4_096
"""Answers of the public suffix list that are remembered: one takes 4 microseconds to find."""

BLANKS: Final = " \t"

# 6265bis section 5.6: controls void a cookie, but for the tab. A lone surrogate stands for
# a byte that was no UTF-8; it could not be sent back as it came.
_UNSENDABLE: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
_WHOLE_NUMBER: Final = re.compile("-?[0-9]+")

# RFC 6265 section 5.1.1. A field may have a tail that does not begin with a digit.
_DATE_TOKEN: Final = re.compile(r"[^\t\x20-\x2f\x3b-\x40\x5b-\x60\x7b-\x7e]+")
_TIME: Final = re.compile(r"([0-9]{1,2}):([0-9]{1,2}):([0-9]{1,2})(?![0-9])")
_DAY: Final = re.compile(r"([0-9]{1,2})(?![0-9])")
_YEAR: Final = re.compile(r"([0-9]{2,4})(?![0-9])")
_MONTH: Final = re.compile(
    "(jan)|(feb)|(mar)|(apr)|(may)|(jun)|(jul)|(aug)|(sep)|(oct)|(nov)|(dec)",
    re.IGNORECASE | re.ASCII,
)
_FIRST_YEAR: Final = 1601
_THIS_CENTURY: Final = 70
"""Two-digit years below this are 20xx, those from it on 19xx: RFC 6265 section 5.1.1."""


@dataclass(frozen=True, slots=True)
class Cookie:
    """One cookie as an ad server set it: a plain value, made to be stored and compared."""

    name: str
    value: str
    domain: str
    """In lower case; the very host where *host_only*."""
    host_only: bool
    """True: for this host alone. False: for the hosts below it, too."""
    path: str
    secure: bool
    """True: goes over https alone."""
    expires: float | None
    """Unix seconds; None: lives as long as its jar."""

    def expired(self, now: float) -> bool:
        """Tell whether it is dead at *now*, in Unix seconds."""
        return self.expires is not None and self.expires <= now

    def meant_for(self, host: str, path: str) -> bool:
        """Tell whether *host* (lower case) and *path* may see it: RFC 6265 section 5.4, step 1."""
        if self.domain != host and (self.host_only or not host.endswith(f".{self.domain}")):
            return False
        return _path_matches(path, self.path)


@dataclass(slots=True)
class _Attributes:
    """What follows a cookie's name and value; of two alike, the last that can be read holds."""

    domain: str = ""
    path: str = ""
    secure: bool = False
    max_age: int | None = None
    expires: float | None = None

    def take(self, key: str, value: str) -> None:
        """Read one attribute: RFC 6265 section 5.2; unknown ones are passed over."""
        if key == "path":
            self.path = value if value.startswith("/") else ""
        elif key == "domain":
            self.domain = value.removeprefix(".").lower() if value.isascii() else value
        elif key == "secure":
            self.secure = True
        elif key == "max-age" and _WHOLE_NUMBER.fullmatch(value):
            self.max_age = int(value)
        elif key == "expires" and (date := parse_date(value)) is not None:
            self.expires = date

    def end(self, now: float) -> float | None:
        """Give the time of death; ``Max-Age`` goes before ``Expires``: RFC 6265 section 4.1.2.2."""
        if self.max_age is not None:
            return now + max(0, min(self.max_age, MAX_AGE))
        return None if self.expires is None else min(self.expires, now + MAX_AGE)


def parse_set_cookie(
    header: str,
    *,
    host: str,
    path: str,
    secure: bool,
    now: float,
    is_public_suffix: Callable[[str], bool],
) -> Cookie | None:
    """
    Read one ``Set-Cookie`` header that *host* sent for *path*; None where it has to be refused.

    *secure* says that it came over https, *path* is the URL's without its query, *now* is in Unix
    seconds. A cookie that is already dead is given, too: it removes an older one.

    RFC 6265 sections 5.2 and 5.3; prefixes, sizes and controls by 6265bis sections 5.4 to 5.7.
    """
    pair, _, rest = header.partition(";")
    name, equals, value = (each.strip(BLANKS) for each in pair.partition("="))
    if not (equals and _storable(name, value)) or _UNSENDABLE.search(rest):
        return None
    attributes = _attributes(rest)
    scope = _scope(attributes.domain, host.lower(), is_public_suffix)
    if scope is None:
        return None
    cookie = Cookie(
        name,
        value,
        *scope,
        path=attributes.path or _default_path(path),
        secure=attributes.secure,
        expires=attributes.end(now),
    )
    whole_host = scope[1] and attributes.path == "/"
    return cookie if _trustworthy(cookie, secure=secure, whole_host=whole_host) else None


def parse_date(text: str) -> float | None:
    """
    Read the date of ``Expires`` in any of its forms; give Unix seconds, None where it is no date.

    The algorithm of RFC 6265 section 5.1.1: every field is the first token that looks like it.
    """
    clock: tuple[int, ...] = ()
    day = month = year = 0
    for token in _DATE_TOKEN.findall(text):
        if not clock and (found := _TIME.match(token)):
            clock = tuple(map(int, found.groups()))
        elif not day and (found := _DAY.match(token)):
            day = int(found[1]) or -1
        elif not month and (found := _MONTH.match(token)):
            month = found.lastindex or 0
        elif not year and (found := _YEAR.match(token)):
            year = _full_year(int(found[1]))
    if not clock or year < _FIRST_YEAR:
        return None
    try:
        midnight = datetime(year, month, day, tzinfo=UTC)
        return midnight.replace(hour=clock[0], minute=clock[1], second=clock[2]).timestamp()
    except ValueError:  # no such day, or no such time
        return None


class CookieJar:
    """
    The cookies of one session: what was set on its hops, and who may have it back.

    *is_public_suffix* is the predicate of :func:`public_suffix_test`; *cookies* are those of an
    earlier session, the oldest first. The jar has no clock: every question brings the time.
    """

    __slots__ = ("_cookies", "_is_public_suffix")

    def __init__(
        self, is_public_suffix: Callable[[str], bool], cookies: Iterable[Cookie] = ()
    ) -> None:
        self._is_public_suffix = is_public_suffix
        # In the order of creation, which a changed value does not alter: RFC 6265 section 5.3.
        self._cookies = {_identity(each): each for each in cookies}

    def emptied(self) -> "CookieJar":
        """Give an empty jar that judges as this one does."""
        return CookieJar(self._is_public_suffix)

    def copied(self) -> "CookieJar":
        """Give a jar with the same cookies, which goes its own way."""
        return CookieJar(self._is_public_suffix, self)

    def __len__(self) -> int:
        return len(self._cookies)

    def __iter__(self) -> Iterator[Cookie]:
        return iter(tuple(self._cookies.values()))

    def __repr__(self) -> str:
        # No values: they name people.
        shown = [f"{'' if each.host_only else '*.'}{each.domain} {each.name}" for each in self]
        return f"<CookieJar {', '.join(shown) or 'empty'}>"

    def store(
        self, headers: Iterable[str], *, host: str, path: str, secure: bool, now: float
    ) -> tuple[str, ...]:
        """
        Take the ``Set-Cookie`` *headers* of one answer; give the names of what changed.

        What may not be set is dropped in silence, as in browsers. *host*, *path*, *secure* and
        *now* are those of :func:`parse_set_cookie`.
        """
        changed = []
        for header in headers:
            cookie = parse_set_cookie(
                header,
                host=host,
                path=path,
                secure=secure,
                now=now,
                is_public_suffix=self._is_public_suffix,
            )
            if cookie and (secure or not self._hides_secure(cookie)) and self._take(cookie, now):
                changed.append(cookie.name)
        return tuple(changed)

    def put(self, name: str, value: str, host: str) -> bool:
        """
        Seed a cookie for *host* alone that lives as long as the jar.

        False where *name* and *value* cannot stand in a header; then nothing is kept.
        """
        clean = name.strip(BLANKS) == name and value.strip(BLANKS) == value
        if not clean or "=" in name or ";" in name + value or not _storable(name, value):
            return False
        host = host.lower()
        cookie = Cookie(name, value, host, host_only=True, path="/", secure=False, expires=None)
        return self._take(cookie, now=float("-inf"))

    def header_for(self, *, host: str, path: str, secure: bool, now: float) -> str:
        """
        Give the value of the ``Cookie`` header for one request; empty where there is none to send.

        Longer paths go first, then what is older: RFC 6265 section 5.4.
        """
        if not self._cookies:
            return ""
        sent = self._matching(host, path, secure=secure, now=now)
        return "; ".join([f"{each.name}={each.value}" for each in sent])

    def names_for(self, *, host: str, path: str, secure: bool, now: float) -> tuple[str, ...]:
        """Name what :meth:`header_for` sends, in the same order: for the trace, without values."""
        return tuple(each.name for each in self._matching(host, path, secure=secure, now=now))

    def _matching(self, host: str, path: str, *, secure: bool, now: float) -> list[Cookie]:
        host, path = host.lower(), path or "/"
        found = [
            each
            for each in self._cookies.values()
            if (secure or not each.secure) and not each.expired(now) and each.meant_for(host, path)
        ]
        found.sort(key=lambda each: -len(each.path))
        return _fitting(found)

    def _take(self, cookie: Cookie, now: float) -> bool:
        """Keep *cookie*, or remove its forerunner if it is dead; tell whether the jar changed."""
        if cookie.expired(now):
            return self._cookies.pop(_identity(cookie), None) is not None
        self._cookies[_identity(cookie)] = cookie
        if len(self._cookies) > MAX_COOKIES:
            del self._cookies[self._least_missed(now)]
        return True

    def _least_missed(self, now: float) -> tuple[str, str, bool, str]:
        """Choose what leaves a full jar: an expired cookie, or the oldest of the fullest site."""
        kept = self._cookies
        expired = next((key for key in kept if kept[key].expired(now)), None)
        if expired is not None:
            return expired
        # Not simply the oldest: then one hop could drive out what another set.
        fullest, _ = Counter(each.domain for each in kept.values()).most_common(1)[0]
        return next(key for key in kept if kept[key].domain == fullest)

    def _hides_secure(self, cookie: Cookie) -> bool:
        """
        Tell whether *cookie*, which came in the clear, would stand in for a secure one.

        "Leave Secure Cookies Alone": 6265bis section 5.7. Chains often mix http and https hops.
        """
        return any(
            each.secure
            and each.name == cookie.name
            and _domains_meet(cookie.domain, each.domain)
            and _path_matches(cookie.path, each.path)
            for each in self._cookies.values()
        )


def _fitting(cookies: list[Cookie]) -> list[Cookie]:
    """Leave out what would make a header longer than servers take."""
    room = MAX_HEADER_BYTES
    fitting = []
    for each in cookies:
        room -= len(each.name.encode()) + len(each.value.encode()) + 3
        if room < 0:
            break
        fitting.append(each)
    return fitting


def public_suffix_test() -> Callable[[str], bool]:
    """
    Load the public suffix list; give the test for names under which anyone may have a site.

    Both halves of the list count: ``co.uk``, and ``github.io``. Under a top-level domain that is
    not listed, the single label is the suffix. Loading takes some 60 ms: call it once, at start.
    """
    listed = PublicSuffixList()

    @lru_cache(maxsize=KEPT_SUFFIXES)
    def is_public_suffix(domain: str) -> bool:
        return bool(listed.is_public(domain))

    return is_public_suffix


def _storable(name: str, value: str) -> bool:
    """Tell whether *name* and *value* may be kept, and can be sent back as they are."""
    # Text has at most as many characters as octets: the second count is for what is not ASCII.
    if not name or len(name) + len(value) > MAX_COOKIE_BYTES or _UNSENDABLE.search(name + value):
        return False
    return len(name.encode()) + len(value.encode()) <= MAX_COOKIE_BYTES


def _attributes(text: str) -> _Attributes:
    found = _Attributes()
    for part in text.split(";") if text else ():
        key, _, value = part.partition("=")
        value = value.strip(BLANKS)
        if len(value.encode()) <= MAX_ATTRIBUTE_BYTES:
            found.take(key.strip(BLANKS).lower(), value)
    return found


def _scope(
    domain: str, host: str, is_public_suffix: Callable[[str], bool]
) -> tuple[str, bool] | None:
    """
    Give the domain a cookie is kept under, and whether it is for *host* alone; None: refuse it.

    RFC 6265 section 5.3, steps 4 to 6; section 5.1.3: an address has no subdomains.
    """
    if not domain:
        return host, True
    # 6265bis section 5.7. And an empty label would blind the public suffix list.
    if not domain.isascii() or ".." in f".{domain}":
        return None
    if domain == host:
        return host, _is_address(host) or is_public_suffix(host)
    if _is_address(host) or not host.endswith(f".{domain}"):
        return None
    return None if _crosses_suffix(domain, host, is_public_suffix) else (domain, False)


def _crosses_suffix(domain: str, host: str, is_public_suffix: Callable[[str], bool]) -> bool:
    """
    Tell whether there is a public suffix anywhere from *domain* down to *host*.

    RFC 6265 asks for *domain* alone. That lets ``a.s3.amazonaws.com`` set a cookie for
    ``amazonaws.com``, past a suffix that lies between; browsers compare registrable domains.
    """
    below = host.removesuffix(f".{domain}").split(".")
    names = (".".join((*below[at:], domain)) for at in range(len(below), -1, -1))
    return any(map(is_public_suffix, names))


def _trustworthy(cookie: Cookie, *, secure: bool, whole_host: bool) -> bool:
    """
    Tell whether *cookie* may claim what it claims, *secure* being how it came.

    What is set in the clear may not call itself secure. Names that begin with ``__Secure-`` and
    ``__Host-`` (in any case) promise how they were set: 6265bis sections 4.1.3 and 5.4.
    *whole_host*: set for this host alone, with ``Path=/`` written out.
    """
    if cookie.secure and not secure:
        return False
    name = cookie.name[: len("__secure-")].lower()
    if name.startswith("__host-"):
        return cookie.secure and whole_host
    return cookie.secure or name != "__secure-"


def _default_path(path: str) -> str:
    """Give the directory of the URL's *path*: RFC 6265 section 5.1.4."""
    return path[: path.rfind("/")] or "/" if path.startswith("/") else "/"


def _domains_meet(one: str, other: str) -> bool:
    """Tell whether one of two domains is the other, or lies below it."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _path_matches(path: str, wanted: str) -> bool:
    """Tell whether *path* is *wanted*, or lies below it: RFC 6265 section 5.1.4."""
    if not path.startswith(wanted):
        return False
    return len(path) == len(wanted) or wanted.endswith("/") or path[len(wanted)] == "/"


def _is_address(host: str) -> bool:
    """Tell an IP address from a name: no top-level domain is a number, no name has a colon."""
    return ":" in host or host.rstrip(".").rpartition(".")[2].isdigit()


def _full_year(year: int) -> int:
    if year < _THIS_CENTURY:
        return year + 2000
    return year + 1900 if year < 100 else year  # noqa: PLR2004  a century


def _identity(cookie: Cookie) -> tuple[str, str, bool, str]:
    """Give what tells two cookies of one jar apart: 6265bis section 5.7."""
    return cookie.name, cookie.domain, cookie.host_only, cookie.path
