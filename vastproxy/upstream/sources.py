"""Where a request says something: a parameter, a header, a cookie."""

from collections.abc import Iterable, Mapping

from vastproxy.config.units import Source
from vastproxy.model import AdRequest


def found(source: Source, request: AdRequest) -> str:
    """Give what *source* names in *request*; empty for nothing."""
    if source.kind == "query":
        return request.query.get(source.name, "")
    if source.kind == "header":
        return request.header(source.name)
    return cookies(request.header("cookie"), (source.name,)).get(source.name, "")


def cookies(header: str, names: Iterable[str]) -> Mapping[str, str]:
    """Give those of *names* that a ``Cookie`` *header* has; the first of each (RFC 6265, 5.4)."""
    wanted = set(names)
    values: dict[str, str] = {}
    for part in header.split(";"):
        name, equals, value = part.strip().partition("=")
        if equals and name in wanted:
            values.setdefault(name, value)
    return values
