"""
Fill macros: VAST 4.3 section 6 and the IAB's list of 59, plus ``[CORRELATOR]``.

Rule 1: one pass. A value that looks like a macro is never expanded again.
Rule 2: a value is percent-encoded once, when :class:`Macros` is made.
Rule 3: only known names are replaced: brackets are legal elsewhere in URLs (``filter[brand]=x``,
``ids[]=1``, IPv6 hosts).
Rule 4: in a URL that the proxy requests, a registered macro without a value becomes ``-1``
(unknown) or ``-2`` (known, not shared), as section 6.1 says. In a document that is answered,
what is not the proxy's to fill stays for the player.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import lru_cache
from urllib.parse import quote


class Context(Flag):
    """Where a macro has a meaning."""

    REQUEST = auto()
    """URLs of ad requests."""
    TRACKING = auto()
    """URLs of trackers."""
    ERROR = auto()
    CLICK = auto()
    VERIFICATION = auto()


_R, _T = Context.REQUEST, Context.TRACKING
_RT = _R | _T

MAX_URL = 8_190
"""Characters of a URL that is looked into: the longest line that aiohttp's parser takes."""

MAX_FILLED = 64 * 1024
"""Characters of a URL with its macros filled; one that would be longer is left as it is."""

MAX_ADDED = 1024 * 1024
"""Bytes that filling macros everywhere may add to a document."""

UNKNOWN = "-1"
NOT_SHARED = "-2"


@dataclass(frozen=True, slots=True)
class Macro:
    """A registered macro: where it counts, and what stands for a missing value in requests."""

    context: Context
    missing: str = UNKNOWN


MACROS: Mapping[str, Macro] = {
    # Generic
    "TIMESTAMP": Macro(_RT),
    "CACHEBUSTING": Macro(_RT),
    # Ad break
    "CONTENTPLAYHEAD": Macro(_RT),
    "MEDIAPLAYHEAD": Macro(_RT),
    "BREAKPOSITION": Macro(_RT),
    "BLOCKEDADCATEGORIES": Macro(_R),
    "ADCATEGORIES": Macro(_R),
    "ADCOUNT": Macro(_RT),
    "TRANSACTIONID": Macro(_RT),
    "PLACEMENTTYPE": Macro(_RT),
    "ADTYPE": Macro(_RT),
    "UNIVERSALADID": Macro(_T),
    "BREAKMINDURATION": Macro(_RT),
    "BREAKMAXDURATION": Macro(_RT),
    "BREAKMAXADS": Macro(_RT),
    "BREAKMINADLENGTH": Macro(_RT),
    "BREAKMAXADLENGTH": Macro(_RT),
    # Client
    "IFA": Macro(_RT, NOT_SHARED),
    "IFATYPE": Macro(_RT),
    "CLIENTUA": Macro(_RT),
    "SERVERUA": Macro(_RT),
    "DEVICEUA": Macro(_RT),
    "SERVERSIDE": Macro(_RT),
    "DEVICEIP": Macro(_RT),
    "LATLONG": Macro(_RT, NOT_SHARED),
    # Publisher
    "DOMAIN": Macro(_RT),
    "PAGEURL": Macro(_RT),
    "APPBUNDLE": Macro(_RT),
    # Capabilities
    "VASTVERSIONS": Macro(_R),
    "APIFRAMEWORKS": Macro(_R),
    "EXTENSIONS": Macro(_R),
    "VERIFICATIONVENDORS": Macro(_R),
    "OMIDPARTNER": Macro(_RT),
    "MEDIAMIME": Macro(_R),
    "PLAYERCAPABILITIES": Macro(_RT),
    # Player state
    "CLICKTYPE": Macro(_RT),
    "PLAYERSTATE": Macro(_T),
    "INVENTORYSTATE": Macro(_RT),
    "PLAYERSIZE": Macro(_RT),
    "ADPLAYHEAD": Macro(_T),
    "ASSETURI": Macro(_T),
    "CONTENTID": Macro(_RT),
    "CONTENTURI": Macro(_RT),
    "PODSEQUENCE": Macro(_T),
    "ADSERVINGID": Macro(_T),
    "CLICKPOS": Macro(Context.CLICK),
    # Errors and verification
    "ERRORCODE": Macro(Context.ERROR),
    "REASON": Macro(Context.VERIFICATION),
    # Regulation
    "LIMITADTRACKING": Macro(_RT),
    "REGULATIONS": Macro(_RT),
    "GDPRCONSENT": Macro(_RT),
    # VAST 4.x additions
    "STOREID": Macro(_RT),
    "STOREURL": Macro(_RT),
    "PLAYBACKMETHODS": Macro(_RT),
    "CONTENTCAT": Macro(_R),
    "GPPSTRING": Macro(_RT),
    "GPPSECTIONID": Macro(_RT),
    # Next release
    "DSAREQUIRED": Macro(_R),
    "DSAPARAMS": Macro(_R),
    "DSAPUBRENDER": Macro(_R),
    # Not registered: what Google's ad server, and the session, call one ad request
    "CORRELATOR": Macro(_RT),
}
"""
The IAB's macro list (macros-data.json of the VAST repository), BREAKMINDURATION of older clients,
and the correlator.
"""

SPELLINGS: Mapping[str, Mapping[str, str]] = {
    # Any case, a few names only: these stood in tags before there was a standard.
    "lowercase": {
        "[timestamp]": "TIMESTAMP",
        "[random]": "CACHEBUSTING",
        "[cachebuster]": "CACHEBUSTING",
        "[cachebusting]": "CACHEBUSTING",
        "[cache_buster]": "CACHEBUSTING",
        "[cache_breaker]": "CACHEBUSTING",
        "[correlator]": "CORRELATOR",
    },
    "percent": {
        "%%TIMESTAMP%%": "TIMESTAMP",
        "%%CACHEBUSTER%%": "CACHEBUSTING",
        "%%CACHEBUSTING%%": "CACHEBUSTING",
        "%%CORRELATOR%%": "CORRELATOR",
        "%%PAGEURL%%": "PAGEURL",
    },
    "braces": {
        "{{TIMESTAMP}}": "TIMESTAMP",
        "{{CACHEBUSTER}}": "CACHEBUSTING",
        "{{IP}}": "DEVICEIP",
        "{{USER_AGENT}}": "DEVICEUA",
        "{{APP_BUNDLE}}": "APPBUNDLE",
        "{{DEVICE_ID}}": "IFA",
    },
    "brace": {
        "{timestamp}": "TIMESTAMP",
        "{random}": "CACHEBUSTING",
        "{cb}": "CACHEBUSTING",
        "{window.location.href}": "PAGEURL",
    },
    "dollar": {
        "${TIMESTAMP}": "TIMESTAMP",
        "${CACHEBUSTER}": "CACHEBUSTING",
        "${CACHEBUSTING}": "CACHEBUSTING",
        "{$timestamp$}": "TIMESTAMP",
        "${GDPR_CONSENT}": "GDPRCONSENT",
    },
    "underscore": {
        "__timestamp__": "TIMESTAMP",
        "__random-number__": "CACHEBUSTING",
        "__page-url__": "PAGEURL",
    },
}
"""
Spellings met in the field, by the name that switches them on (docs/vast.md). ``encoded`` is no
table: it means ``%5BNAME%5D`` for every known name.
"""

DEFAULT_SPELLINGS = ("encoded", "lowercase")

_BRACKETED = r"\[([A-Z][A-Z0-9_]{2,31})\]"
_ENCODED = r"%5[Bb]([A-Z][A-Z0-9_]{2,31})%5[Dd]"
_NESTED = re.compile(r"%3a%2f%2f|://", re.IGNORECASE)


def encode(value: str) -> str:
    """Percent-encode *value* as ``encodeURIComponent`` does (VAST 4.3 section 6.1)."""
    # Characters that no encoding has (lone surrogates) become "?": this is no place to fail.
    return quote(value.encode("utf-8", "replace"), safe="!~*'()")


def encode_list(values: Iterable[str]) -> str:
    """Encode each of *values*, and join them by bare commas."""
    return ",".join(encode(each) for each in values)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How an upstream writes macros: a compiled pattern and what its extra spellings mean."""

    pattern: re.Pattern[str]
    aliases: Mapping[str, str]


@lru_cache(maxsize=256)
def spelling(
    names: tuple[str, ...] = DEFAULT_SPELLINGS, aliases: tuple[tuple[str, str], ...] = ()
) -> Spelling:
    """
    Compile the spellings called *names*, and an operator's own *aliases* (spelling, macro name).

    ``[NAME]`` is always among them.
    """
    table: dict[str, str] = {}
    parts = [_BRACKETED]
    if "encoded" in names:
        parts.append(_ENCODED)
    for name in names:
        fixed = SPELLINGS.get(name, {})
        table.update(fixed)
        flags = "(?i:%s)" if name == "lowercase" else "(?:%s)"
        if fixed:
            parts.append(flags % "|".join(re.escape(each) for each in fixed))
    table.update(aliases)
    parts += [re.escape(each) for each, _ in aliases]
    # What an operator wrote goes first: it may be a spelling that a rule would read otherwise.
    parts.reverse()
    return Spelling(re.compile("|".join(f"(?:{each})" for each in parts)), table)


_STANDARD = spelling()


class Macros:
    """
    The values of one ad request, each encoded once, when it is first needed.

    *values* are plain texts by macro name, or functions that give one. *encoded* are encoded
    already (lists, joined by commas).
    """

    __slots__ = ("_encoded", "_values")

    def __init__(
        self,
        values: Mapping[str, str | Callable[[], str]],
        encoded: Mapping[str, str] | None = None,
    ) -> None:
        self._values = values
        self._encoded = dict(encoded or {})

    def having(self, encoded: Mapping[str, str]) -> "Macros":
        """Give a copy with further values, already *encoded*."""
        return Macros(self._values, {**self._encoded, **encoded})

    def get(self, name: str) -> str | None:
        """Give the encoded value of macro *name*, or None."""
        known = self._encoded.get(name)
        if known is None and (value := self._values.get(name)) is not None:
            known = encode(value if isinstance(value, str) else value())
            self._encoded[name] = known
        return known

    def fill_request(self, url: str, how: Spelling = _STANDARD) -> str:
        """Fill *url* for a request by the proxy: what it does not know becomes -1 or -2."""
        return self._fill(url, how, _R, missing=True)

    def fill_error(self, url: str, code: int, how: Spelling = _STANDARD) -> str:
        """Fill an ``<Error>`` URI that the proxy requests, with *code*."""
        told = self.having({"ERRORCODE": str(code)})
        return told._fill(url, how, _T | Context.ERROR, missing=True)  # noqa: SLF001

    def fill_code(self, url: str, code: int, how: Spelling = _STANDARD) -> str:
        """Fill nothing but ``[ERRORCODE]`` in a *url* that the player will request."""
        told = self.having({"ERRORCODE": str(code)})
        return told._fill(url, how, Context.ERROR, missing=False)  # noqa: SLF001

    def fill_known(
        self, url: str, how: Spelling = _STANDARD, only: Container[str] | None = None
    ) -> str:
        """Fill what is known in *url*, or *only* some of it; the rest is for who requests it."""
        return self._fill(url, how, _RT, missing=False, only=only)

    def _fill(
        self,
        url: str,
        how: Spelling,
        context: Context,
        *,
        missing: bool,
        only: Container[str] | None = None,
    ) -> str:
        if len(url) > MAX_URL or ("[" not in url and "%" not in url and not how.aliases):
            return url

        def replaced(match: re.Match[str]) -> str:
            whole = match[0]
            name = (
                how.aliases.get(whole)
                or how.aliases.get(whole.lower())
                or match[match.lastindex or 0]
            )
            macro = MACROS.get(name)
            if macro is None or not macro.context & context or (only and name not in only):
                return whole
            if whole[0] == "%" and whole[1] == "5" and _is_nested(url, match.start()):
                return whole
            value = self.get(name)
            if value is None:
                return macro.missing if missing else whole
            return value

        filled = how.pattern.sub(replaced, url)
        return filled if len(filled) <= MAX_FILLED else url


def _is_nested(url: str, at: int) -> bool:
    """
    Whether position *at* is inside a URL that is a parameter's value.

    Its server decodes once and hands on: a value put in here would have to be encoded once more.
    So it is left alone (docs/vast.md).
    """
    start = max(url.find("?", 0, at), url.rfind("&", 0, at), url.rfind(";", 0, at))
    return start >= 0 and _NESTED.search(url, start, at) is not None


_TEXT_MACRO = re.compile(rb"\[([A-Z][A-Z0-9_]{2,31})\]")


def fill_everywhere(document: bytes, values: Mapping[bytes, bytes]) -> bytes:
    """
    Fill macros in a serialised document: *values* by name, without brackets.

    One pass. Values must be encoded: then no character of theirs means anything to XML. A document
    that would grow by more than :data:`MAX_ADDED` is left as it is.
    """
    longest = max(map(len, values.values()), default=0)
    if document.count(b"[") * longest > MAX_ADDED:
        return document

    def replaced(match: re.Match[bytes]) -> bytes:
        return values.get(match[1], match[0])

    return _TEXT_MACRO.sub(replaced, document)


def replace_few(document: bytes, values: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Fill a few macros by plain search: cheaper than a pattern while they are few."""
    for macro, value in values:
        document = document.replace(macro, value)
    return document
