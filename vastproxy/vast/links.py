"""
Relative addresses: RFC 3986 section 5.2, touching nothing but dot segments.

:func:`urllib.parse.urljoin` drops a ``?`` or ``;`` with nothing behind it, and empty segments: an
ad server may have signed them.
"""

import re

_BASE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)(//[^/?#]*)?([^?#]*)(\?[^#]*)?")
_REFERENCE = re.compile(r"(//[^/?#]*)?([^?#]*)(.*)", re.DOTALL)


def joined(base: str, reference: str) -> str:
    """Resolve a relative *reference* against *base*; without a usable base it stays as it is."""
    there, given = _BASE.match(base), _REFERENCE.match(reference)
    if there is None or given is None:
        return reference
    scheme, authority, path, query = there[1], there[2] or "", there[3] or "/", there[4] or ""
    host, steps, tail = given.groups()
    if host is not None:
        return scheme + host + _without_dots(steps) + tail
    if steps:
        above = "" if steps.startswith("/") else path[: path.rfind("/") + 1]
        return scheme + authority + _without_dots(above + steps) + tail
    return scheme + authority + path + (tail if tail.startswith("?") else query + tail)


def _without_dots(path: str) -> str:
    """Remove dot segments (RFC 3986 section 5.2.4); empty ones stay."""
    kept: list[str] = []
    segments = path.split("/")
    for segment in segments:
        if segment == "..":
            del kept[max(1, len(kept) - 1) :]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in {".", ".."}:
        kept.append("")
    return "/".join(kept)
