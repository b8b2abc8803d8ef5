"""Which route answers, who is watching, and what of the request goes on."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote_plus

from vastproxy.config.template import Template
from vastproxy.config.units import Source
from vastproxy.flow.admission import Terms
from vastproxy.model import AdRequest
from vastproxy.upstream.sources import found
from vastproxy.upstream.upstream import VastUpstream, lookup
from vastproxy.vast.parse import parse
from vastproxy.vast.unwrap import Policy

_NIL_ID = re.compile(r"0{8}-?0{4}-?0{4}-?0{4}-?0{12}")
_REST = "/{rest}"
# Also in spellings that some servers take for a slash, or for the end of a segment.
_SLASH = r"/|\\|%2f|%5c"
_DOT_SEGMENT = re.compile(rf"(?:^|{_SLASH})(?:\.|%2e){{1,2}}(?:{_SLASH}|;|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Route:
    """What config.yaml says about one path, ready to be used."""

    path: str
    upstreams: tuple[VastUpstream, ...]
    mode: Literal["resolve", "passthrough"] = "resolve"
    forward_query: Literal["all", "none"] | tuple[str, ...] = "all"
    forward_cookies: tuple[str, ...] = ()
    viewer: tuple[Source, ...] = ()
    correlator: Source | None = None
    correlator_params: tuple[str, ...] = ("correlator",)
    deadline: float = 2.5
    """Seconds."""
    policy: Policy = field(default_factory=Policy)
    error_reporting: Literal["proxy", "player"] = "proxy"
    fill_macros: Literal["standard", "all"] = "standard"
    macros: tuple[tuple[str, Template], ...] = ()
    terms: Terms = field(default_factory=Terms)
    """What its ads have to keep to."""
    fallback: bytes | None = None
    """What is answered where nobody has an ad: a document of its own; None: an empty one."""
    cookie_ttl: float = field(init=False, default=0.0)
    """Seconds that viewers' cookies are kept; 0: no upstream wants them kept."""
    counts: bool = field(init=False, default=False)
    """Whether anything of its requests is kept in the state."""
    soft_timeouts: tuple[float | None, ...] = field(init=False, default=())
    """Of its upstreams: seconds after which the next one is asked, too."""

    def __post_init__(self) -> None:
        kept = [each.settings for each in self.upstreams if each.settings.cookies == "viewer"]
        ttl = max((each.cookie_ttl for each in kept), default=0.0)
        object.__setattr__(self, "cookie_ttl", ttl)
        object.__setattr__(self, "counts", bool(self.terms or ttl))
        soft = tuple([each.soft_timeout for each in self.upstreams])
        object.__setattr__(self, "soft_timeouts", soft)
        if self.fallback is not None:
            # Now rather than when nobody else has an ad. Raises VastError.
            parse(self.fallback)


class Router:
    """Finds the route of a path: an exact one first, then the longest that ends in ``/{rest}``."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._exact: dict[str, Route] = {}
        self._open: list[tuple[str, Route]] = []
        for route in routes:
            if route.path.endswith(_REST):
                self._open.append((route.path.removesuffix("{rest}"), route))
            else:
                self._exact[route.path] = route
        self._open.sort(key=lambda each: len(each[0]), reverse=True)

    def find(self, path: str) -> tuple[Route, str] | None:
        """
        Give the route of *path* and what its ``/{rest}`` stands for, both as they were sent.

        A rest with dot segments finds nothing: it would leave the place that the operator named.
        """
        exact = self._exact.get(path)
        if exact is not None:
            return exact, ""
        for prefix, route in self._open:
            if path.startswith(prefix):
                rest = path[len(prefix) :]
                return None if _DOT_SEGMENT.search(rest) else (route, rest)
        return None

    def __repr__(self) -> str:
        return f"<Router {[*self._exact, *(route.path for _, route in self._open)]}>"


def viewer_of(route: Route, request: AdRequest) -> str:
    """
    Give the viewer's id: what the first of the route's sources has. Empty: nobody known.

    An advertising id of zeros is nobody's: devices send it for viewers who want no tracking.
    """
    values = (found(each, request) for each in route.viewer)
    return next((each for each in values if each and not _NIL_ID.fullmatch(each)), "")


def forwarded(route: Route, raw: str, taken: frozenset[str]) -> str:
    """
    Give the part of the player's *raw* query that goes on, byte for byte.

    Of everything (``all``), what the upstream's templates have *taken* over is left out; a list
    names what goes on.
    """
    if route.forward_query == "none" or not raw:
        return ""
    if route.forward_query == "all":
        if not taken:
            return raw
        return "&".join([each for each in raw.split("&") if _name(each) not in taken])
    return "&".join([each for each in raw.split("&") if _name(each) in route.forward_query])


def _name(parameter: str) -> str:
    """Give the name of a query parameter as an ad server reads it: decoded."""
    return unquote_plus(parameter.partition("=")[0], errors="replace")


def macro_values(route: Route, request: AdRequest, viewer: str) -> Mapping[str, str]:
    """Give the macros that the route takes from the request; an empty value is none."""
    look = lookup(request, viewer)
    rendered = ((name, each.render(look, str)) for name, each in route.macros)
    return {name: value for name, value in rendered if value}
