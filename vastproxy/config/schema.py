"""
Every setting of config.yaml: its type, its default, what it means.

Rule 1: a setting that does not exist is an error, never ignored.
Rule 2: a message says what is wrong and, in parentheses, what to write instead.
Rule 3: defaults stand here as an operator would write them.
Rule 4: what can be read off one section is checked here; what needs two is in ``load.py``.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
)

from vastproxy.config.fallback import Fallback
from vastproxy.config.state import Budget, FrequencyCap, check_cap, check_each_once
from vastproxy.config.template import Template
from vastproxy.config.units import (
    TOKEN_PATTERN,
    Listen,
    Network,
    Source,
    StateUrl,
    check_authority,
    parse_host_pattern,
    shown,
)
from vastproxy.config.upstream import (
    Cache,
    CircuitBreaker,
    HopBreaker,
    MaybeCache,
    MaybeRateLimit,
    RateLimit,
    Retry,
)
from vastproxy.config.values import (
    Address,
    Addresses,
    Cidr,
    Count,
    Directory,
    Duration,
    Name,
    Names,
    Place,
    Port,
    ReservationTtl,
    Secrets,
    Settings,
    Size,
    State,
    Text,
    lasting,
    listed_or_none,
    setting,
    some,
)

__all__ = [
    "Budget",
    "Cache",
    "CircuitBreaker",
    "Config",
    "Egress",
    "FrequencyCap",
    "HopBreaker",
    "Listen",
    "Log",
    "Network",
    "RateLimit",
    "Retry",
    "Route",
    "Server",
    "Source",
    "StateUrl",
    "Template",
    "Upstream",
    "UpstreamMacros",
    "json_schema",
    "known_macro",
    "settings_at",
]

Spelling = Literal["encoded", "lowercase", "percent", "braces", "brace", "dollar", "underscore"]

MAX_BODY: Final = 2 * 1024 * 1024
"""Bytes of one ad server's answer. The largest of the IAB's samples has 22 KiB."""
MIN_DEADLINE: Final = 0.05
"""Seconds. One round trip between continents takes longer: less can never give an ad."""
MAX_WORKERS: Final = 256
"""Processes. Machines with more cores are rare, and are better cut up."""
MAX_HOPS: Final = 20
"""Wrappers. VAST 4.3 section 2.4.5 recommends five; 20 leaves room and still ends."""
RESERVED_PATHS: Final = ("/hop", "/beacon")
"""Where the proxy's own URLs are, with all that is below them."""
UNSETTABLE_HEADERS: Final = frozenset(
    "connection content-length host keep-alive proxy-authenticate proxy-authorization "  # noqa: SIM905 - a table
    "proxy-connection te trailer transfer-encoding upgrade".split()
)
"""Headers of the connection (RFC 9110 section 7.6.1) or of the message itself."""
REGISTERED_MACROS: Final = frozenset(
    "ADCATEGORIES ADCOUNT ADPLAYHEAD ADSERVINGID ADTYPE APIFRAMEWORKS APPBUNDLE ASSETURI "  # noqa: SIM905 - a table
    "BLOCKEDADCATEGORIES BREAKMAXADLENGTH BREAKMAXADS BREAKMAXDURATION BREAKMINADLENGTH "
    "BREAKPOSITION CACHEBUSTING CLICKPOS CLICKTYPE CLIENTUA CONTENTCAT CONTENTID "
    "CONTENTPLAYHEAD CONTENTURI DEVICEIP DEVICEUA DOMAIN DSAPARAMS DSAPUBRENDER DSAREQUIRED "
    "ERRORCODE EXTENSIONS GDPRCONSENT GPPSECTIONID GPPSTRING IFA IFATYPE INVENTORYSTATE "
    "LATLONG LIMITADTRACKING MEDIAMIME MEDIAPLAYHEAD OMIDPARTNER PAGEURL PLACEMENTTYPE "
    "PLAYBACKMETHODS PLAYERCAPABILITIES PLAYERSIZE PLAYERSTATE PODSEQUENCE REASON REGULATIONS "
    "SERVERSIDE SERVERUA STOREID STOREURL TIMESTAMP TRANSACTIONID UNIVERSALADID VASTVERSIONS "
    "VERIFICATIONVENDORS".split()
)
"""The macros of VAST 4.3 section 6 and of the IAB's list since."""
KNOWN_MACROS: Final = REGISTERED_MACROS | {"BREAKMINDURATION", "CORRELATOR"}
"""Also a name that only early drafts of VAST 4 and players have, and the proxy's own."""
PROXY_MACROS: Final = frozenset(
    "CACHEBUSTING CORRELATOR DEVICEIP DEVICEUA ERRORCODE "  # noqa: SIM905 - a table
    "SERVERSIDE TIMESTAMP TRANSACTIONID".split()
)
"""What the proxy alone knows; no config can set these."""


def known_macro(name: str) -> str:
    """Give *name* back if it is a known macro's; raise ValueError with the nearest if not."""
    if name in KNOWN_MACROS:
        return name
    near = get_close_matches(name.strip("[]{}%$_").upper(), sorted(KNOWN_MACROS), n=1)
    advice = f"did you mean {near[0]}?" if near else "write a name such as IFA, without brackets"
    raise ValueError(f"{shown(name)} is no registered macro ({advice})")


def _settable_macro(name: str) -> str:
    if known_macro(name) in PROXY_MACROS:
        raise ValueError(f"{name} is filled by the proxy and cannot be set (remove this line)")
    return name


def _upstream_name(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return name
    raise ValueError(
        f"{shown(name)} is no name for an upstream (write 1 to 64 letters, digits, - and _)"
    )


def _header_name(name: str) -> str:
    if not re.fullmatch(TOKEN_PATTERN, name):
        raise ValueError(f"{shown(name)} is no name of a header (write a name such as X-Api-Key)")
    if name.lower() in UNSETTABLE_HEADERS:
        raise ValueError(f"the header {name} belongs to the connection (remove this line)")
    return name


def _each_header_once(headers: Mapping[str, Template]) -> Mapping[str, Template]:
    seen: set[str] = set()
    for name in headers:
        if name.lower() in seen:
            raise ValueError(f"the header {name} is there twice, in two cases (keep one of them)")
        seen.add(name.lower())
    return headers


def _check_clashes(listeners: tuple[Listen, ...]) -> None:
    for index, one in enumerate(listeners):
        for other in listeners[:index]:
            if one.clashes(other):
                raise ValueError(f"'{one}' is taken by '{other}' (write another port or path)")


def _header_value(value: Template) -> Template:
    literal = "".join(part for part in value.parts if isinstance(part, str))
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", literal):
        raise ValueError(
            f"{shown(value.text)} has a line break or another control character, which no header "
            "may have (write it on one line)"
        )
    return value


def _cookie_name(name: str) -> str:
    if re.fullmatch(TOKEN_PATTERN, name):
        return name
    raise ValueError(f"{shown(name)} is no name of a cookie (write a name such as uid)")


def _public_url(url: str) -> str:
    check_authority(url)
    if re.search(r"[?#]", url):
        raise ValueError(f"{shown(url)} has more than a path (write it without ? and #)")
    return url.rstrip("/")


def _endpoint(value: Template) -> Template:
    """Raise ValueError if a request could decide on a part of the host."""
    if value.starts_with_placeholder:
        return value
    first = value.parts[0] if value.parts else ""
    url = "".join("x" if not isinstance(part, str) else part for part in value.parts)
    if len(value.parts) > 1 and not re.match(r"https?://[^/?#]*[/?#]", str(first), re.IGNORECASE):
        raise ValueError(
            f"{shown(value.text)} has a placeholder in its host "
            "(write the host itself, or begin with the placeholder and list the hosts in `hosts`)"
        )
    check_authority(url)
    if "#" in url:
        raise ValueError(f"{shown(value.text)} has a fragment, which is never sent (write %23)")
    return value


def _mode(mode: object) -> object:
    if mode == "rewrite":
        raise ValueError(
            "'rewrite': this version has two modes only (write resolve or passthrough)"
        )
    return mode


def _route_path(path: str) -> str:
    stem = path.removesuffix("/{rest}")
    if not path.startswith("/"):
        raise ValueError(f"{shown(path)} is no path (begin it with /)")
    if stem.endswith("/{rest}") or re.search(r"[{}]", stem):
        raise ValueError(f"{shown(path)} has a brace (only /{{rest}} at the end is possible)")
    if not re.fullmatch(r"[!-~]*", stem) or re.search(r"[?#]", stem):
        raise ValueError(
            f"{shown(path)} has a character that no path can have (percent-encode it, "
            "and leave ? and what follows to the player)"
        )
    if {".", ".."} & set(stem.split("/")):
        raise ValueError(f"{shown(path)} has a dot segment (write the path that is meant)")
    for reserved in RESERVED_PATHS:
        if stem == reserved or stem.startswith(f"{reserved}/"):
            raise ValueError(f"{reserved} is kept for the proxy's own URLs (write another path)")
    return path


def _deadline(seconds: float) -> float:
    if seconds >= MIN_DEADLINE:
        return seconds
    raise ValueError(f"{seconds * 1000:g}ms is too short for any ad server (write 50ms or more)")


def _max_body(size: int) -> int:
    if size <= MAX_BODY:
        return size
    raise ValueError(f"{size} bytes are more than one answer may have (write 2MiB or less)")


def _correlator_source(value: Source) -> Source:
    if value.kind != "cookie":
        return value
    raise ValueError(f"'{value}' is a cookie (write query:{value.name} or header:{value.name})")


def _cap_of_route(cap: FrequencyCap, info: ValidationInfo) -> FrequencyCap:
    # A setting that is wrong itself is not there; then this one is given the benefit of the doubt.
    has_viewer = bool(info.data.get("viewer", True))
    check_cap(cap, mode=info.data.get("mode", "resolve"), has_viewer=has_viewer)
    return cap


def _forward_query(value: object) -> Literal["all", "none"] | tuple[str, ...]:
    if value == "all":
        return "all"
    if value == "none":
        return "none"
    if isinstance(value, (list, tuple)) and all(isinstance(each, str) and each for each in value):
        return tuple(value)
    raise ValueError(f"{shown(value)} is no choice here (write all, none or a list: [slot, uid])")


HostPattern = Annotated[str, AfterValidator(parse_host_pattern)]
Headers = Annotated[
    Mapping[
        Annotated[str, AfterValidator(_header_name)], Annotated[Text, AfterValidator(_header_value)]
    ],
    AfterValidator(_each_header_once),
]
SettableMacro = Annotated[str, AfterValidator(_settable_macro)]


class Server(Settings):
    """The listeners, and what is true for all routes."""

    listen: Addresses = setting(
        "127.0.0.1:8080",
        "Where players are answered: host:port, :port, [v6]:port unix:/path or a list of these.",
    )
    admin: Annotated[
        tuple[Address, ...],
        BeforeValidator(listed_or_none, json_schema_input_type=str | list[str] | None),
    ] = setting(
        "127.0.0.1:8081",
        "Where /healthz and /readyz are served: written like `listen`, on a loopback "
        "address or a Unix socket only; null switches it off.",
    )
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] = setting(
        1, "How many processes serve; 1 to 256. Several need a state that they can share."
    )
    secret: Secrets = setting(
        [],
        "What seals the proxy's own URLs: a text of 8 characters or more, or a list of which the "
        "first seals and all open; []: one is made at start.",
    )
    beacon_ttl: Annotated[Duration, lasting("1m", "7d")] = setting(
        "6h", "How long the URL that says that an ad was shown is taken; 1m to 7d."
    )
    public_url: Annotated[str, AfterValidator(_public_url)] | None = setting(
        None, "The URL under which players reach the proxy; null: as each request came in."
    )
    trusted_proxies: tuple[Cidr, ...] = setting(
        [], "Networks whose X-Forwarded-For, X-Device-* and X-Request-Id headers are believed."
    )
    shutdown_timeout: Duration = setting(
        "10s", "How long requests in flight may go on after the signal to stop."
    )
    keepalive_timeout: Duration = setting(
        "75s", "How long an idle connection of a player is kept open."
    )
    max_requests_in_flight: Count = setting(
        2000, "Ad requests served at one time; beyond it, an empty VAST is answered at once."
    )

    @field_validator("listen")
    @classmethod
    def _listen_once(cls, value: tuple[Listen, ...]) -> tuple[Listen, ...]:
        _check_clashes(value)
        return value

    @field_validator("admin")
    @classmethod
    def _admin_is_local(cls, value: tuple[Listen, ...], info: ValidationInfo) -> tuple[Listen, ...]:
        for each in value:
            if not each.is_local:
                raise ValueError(
                    f"'{each}' can be reached from other machines, and this version has no "
                    "password for it (write 127.0.0.1:8081, unix:/run/admin.sock or null)"
                )
        for each in value:
            if any(each.clashes(other) for other in info.data.get("listen", ())):
                raise ValueError(
                    f"'{each}' is taken by `listen` (write admin: null, or another port)"
                )
        _check_clashes(value)
        return value


class Log(Settings):
    """What is written to standard error, and how."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "The least important events that are written."
    )
    format: Literal["auto", "json", "console"] = setting(
        "auto", "json: a line of JSON for each event; console: for people; auto: by the terminal."
    )


class Egress(Settings):
    """Where URLs that third parties name may lead. Endpoints of upstreams are always allowed."""

    allow: tuple[Cidr, ...] = setting(
        [], "Networks that hops may reach although their addresses are not public."
    )
    ports: Annotated[tuple[Port, ...], AfterValidator(some)] = setting(
        [80, 443], "The ports that hops may use."
    )
    nat64: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether hops may use NAT64 addresses (RFC 6052) for IPv4 addresses that are allowed.",
    )
    circuit_breaker: HopBreaker = setting(
        {}, "When a site that hops lead to is left alone because it fails: for each site by itself."
    )
    max_requests_in_flight: Count = setting(
        500, "How many calls to one such site may be under way at one time; more fail at once."
    )


class UpstreamMacros(Settings):
    """How macros are written in the URLs of an upstream and of the chains it starts."""

    timestamp: Literal["unix_ms", "iso8601"] = setting(
        "unix_ms",
        "What [TIMESTAMP] becomes: milliseconds since 1970, or ISO 8601 as VAST 4 asks.",
    )
    spellings: tuple[Spelling, ...] = setting(
        ["encoded", "lowercase"],
        "Spellings that are filled besides [NAME]: encoded %5BNAME%5D, lowercase [name], "
        "percent %%NAME%%, braces {{NAME}}, brace {NAME}, dollar ${NAME}, underscore __NAME__.",
    )
    aliases: Mapping[Name, Annotated[str, AfterValidator(known_macro)]] = setting(
        {}, "Spellings of an ad server's own: the exact text, and the macro it stands for."
    )


class Upstream(Settings):
    """One ad server that the operator names."""

    endpoint: Annotated[Text, AfterValidator(_endpoint)] = Field(
        description="Its URL, a template. If it begins with a placeholder, `hosts` is needed."
    )
    hosts: tuple[HostPattern, ...] = setting(
        [],
        "For an endpoint that the player names: the only hosts it may lead to, each as host, "
        "host:port or *.host.",
    )
    params: Mapping[Name, Text] = setting(
        {}, "Query parameters that are added to the endpoint: names and templates."
    )
    headers: Headers = setting(
        {}, "Request headers that are sent to the endpoint: names and templates."
    )
    timeout: Duration = setting("1s", "The longest that one answer of this ad server may take.")
    soft_timeout: Annotated[Duration, lasting("1ms", "1h")] | None = setting(
        None,
        "After which time the route's next upstream is started, while this one goes on; null: not "
        "before this one has ended.",
    )
    max_body: Annotated[Size, AfterValidator(_max_body)] = setting(
        "512KiB", "The longest body, counted after decompression; at most 2MiB."
    )
    cookies: Literal["chain", "viewer", "off"] = setting(
        "chain",
        "chain: cookies live for one ad request, each for its own site; viewer: they are kept for "
        "the viewer's next requests; off: none are kept.",
    )
    cookie_ttl: Annotated[Duration, lasting("1s", "400d")] = setting(
        "30d", "How long cookies are kept for a viewer, from the last change on; 1s to 400d."
    )
    session_params: tuple[Literal["correlator", "timestamp"], ...] = setting(
        ["correlator", "timestamp"],
        "Parameters of the session that are added to the endpoint; [] for a tag that is signed.",
    )
    user_agent: Literal["device", "proxy"] = setting(
        "device", "Whose User-Agent is sent: the viewer's device's, or the proxy's own."
    )
    x_forwarded_for: Literal["set", "append", "off"] = setting(
        "set",
        "set: the viewer's address alone; append: added to what a trusted proxy sent; off: none.",
    )
    macros: UpstreamMacros = setting({}, "How macros are written in this upstream's URLs.")
    circuit_breaker: CircuitBreaker = setting(
        {}, "When this ad server is left alone because it fails, and for how long."
    )
    rate_limit: MaybeRateLimit = setting(
        None, "How often it is asked: 100/s, or a section; null: without a limit."
    )
    max_requests_in_flight: Count = setting(
        500, "How many calls to it may be under way at one time; more are not made."
    )
    retry: Retry = setting({}, "How often a call goes out again, of which nothing was sent.")
    cache: MaybeCache = setting(
        None, "What it answered, kept for the next request; null: nothing is kept."
    )

    @field_validator("soft_timeout")
    @classmethod
    def _soft_is_shorter(cls, value: float | None, info: ValidationInfo) -> float | None:
        whole: float | None = info.data.get("timeout")
        if value is not None and whole is not None and value >= whole:
            raise ValueError(
                f"{value:g}s is not shorter than the timeout, {whole:g}s, after which the next one "
                "is asked anyway (write less, or null)"
            )
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts_where_needed(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        endpoint: Template | None = info.data.get("endpoint")
        if endpoint and endpoint.starts_with_placeholder and not value:
            raise ValueError(
                f"the endpoint begins with a placeholder, {endpoint.parts[0]}, so that the player "
                "decides on the host (list the hosts it may choose: [ads.example.com])"
            )
        return value

    @property
    def uses_rest(self) -> bool:
        """Tell whether ``{rest}`` of the route is needed to ask this ad server."""
        templates = (self.endpoint, *self.params.values(), *self.headers.values())
        return any(each.uses_rest for each in templates)


class Route(Settings):
    """One path that players ask, and how it is answered."""

    path: Annotated[str, AfterValidator(_route_path)] = Field(
        description="Where players ask: a path, which may end in /{rest} to take all below it."
    )
    mode: Annotated[
        Literal["resolve", "passthrough"],
        BeforeValidator(_mode, json_schema_input_type=Literal["resolve", "passthrough"]),
    ] = setting(
        "resolve",
        "resolve: the chain is followed and merged; passthrough: the upstream's document is "
        "answered with its macros filled.",
    )
    upstreams: Names = Field(
        description="The names of the ad servers to ask, in this order until one has an ad."
    )
    forward_query: Annotated[
        Literal["all", "none"] | tuple[str, ...],
        PlainValidator(_forward_query, json_schema_input_type=Literal["all", "none"] | list[str]),
    ] = setting(
        "all", "Which of the player's query parameters go on to the upstream: all, none or a list."
    )
    forward_cookies: tuple[Annotated[str, AfterValidator(_cookie_name)], ...] = setting(
        [], "Names of the player's cookies that are handed to the upstreams of this route."
    )
    viewer: tuple[Place, ...] = setting(
        [], "Where the viewer's id is found: query:NAME, header:NAME, cookie:NAME; the first wins."
    )
    correlator: Annotated[Place, AfterValidator(_correlator_source)] | None = setting(
        None, "Where the request may bring its own correlator: query:NAME or header:NAME."
    )
    correlator_params: tuple[Name, ...] = setting(
        ["correlator"],
        "Query parameters whose value becomes the correlator in every URL that has them.",
    )
    deadline: Annotated[Duration, AfterValidator(_deadline)] = setting(
        "2500ms", "How long one ad request may take as a whole; at least 50ms."
    )
    max_hops: Annotated[int, Field(ge=0, le=MAX_HOPS)] = setting(
        5, "How many wrappers may follow one another; 0 to 20."
    )
    max_fetches: Count = setting(
        100, "How many documents one ad request may fetch, those of all its upstreams together."
    )
    standalone_ads: Count = setting(
        1, "How many ads are wanted of a document that offers several without a sequence."
    )
    strict: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether allowMultipleAds=false refuses every ad with a sequence, as the text of VAST has "
        "it; otherwise the lowest sequence is taken.",
    )
    error_reporting: Literal["proxy", "player"] = setting(
        "proxy", "Who calls the <Error> URLs of a chain that gave no ad."
    )
    fill_macros: Literal["standard", "all"] = setting(
        "standard",
        "Macros in the answer. standard: those that players do not fill; all: whatever is known.",
    )
    macros: Mapping[SettableMacro, Text] = setting(
        {}, "Values for macros that only the player or the operator knows: names and templates."
    )
    reservation_ttl: ReservationTtl = setting(
        "10m", "How long an ad that was answered waits for its impression; 1s to 24h."
    )
    frequency_caps: tuple[Annotated[FrequencyCap, AfterValidator(_cap_of_route)], ...] = setting(
        [], "How many ads a viewer is shown: a list of limits, all of which hold."
    )
    budget: Budget | None = setting(None, "What the ads of this route may cost in all.")
    fallback: Fallback | None = setting(
        None,
        "What is answered where nobody has an ad: the path of a VAST file, or VAST itself, which "
        "begins with <; null: an empty VAST.",
    )

    @field_validator("frequency_caps")
    @classmethod
    def _each_cap_once(
        cls, value: tuple[FrequencyCap, ...], info: ValidationInfo
    ) -> tuple[FrequencyCap, ...]:
        check_each_once(value, info.data.get("upstreams", ()))
        return value

    @field_validator("macros")
    @classmethod
    def _rest_where_taken(
        cls, value: Mapping[str, Template], info: ValidationInfo
    ) -> Mapping[str, Template]:
        path: str = info.data.get("path", "/{rest}")
        for name, template in value.items():
            if template.uses_rest and not path.endswith("/{rest}"):
                raise ValueError(
                    f"{name} uses {{rest}}, but the path has none (end the path in /{{rest}})"
                )
        return value

    @property
    def takes_rest(self) -> bool:
        """Tell whether the route has everything below its path."""
        return self.path.endswith("/{rest}")


class Config(Settings):
    """The whole of config.yaml. Made by :func:`vastproxy.config.load.load`."""

    server: Server = setting({}, "Listeners, limits, and what is true for all routes.")
    state: State = setting(
        "memory://",
        "Where state is kept that outlives a request: memory://, redis://, rediss://, "
        "redis+cluster://, rediss+cluster://, sqlite:///file or postgresql://.",
    )
    state_timeout: Annotated[Duration, lasting("1ms", "5s")] = setting(
        "50ms", "The longest that an ad request waits for an answer of the state; 1ms to 5s."
    )
    journal: Directory | None = setting(
        None,
        "A directory for what was served while the state was away, until it is written there; "
        "null: that is kept in memory only.",
    )
    log: Log = setting({}, "How much is logged, and in which form.")
    egress: Egress = setting({}, "Where URLs that third parties name may lead.")
    upstreams: Annotated[
        Mapping[Annotated[str, AfterValidator(_upstream_name)], Upstream], AfterValidator(some)
    ] = Field(description="The ad servers, each under a name of its own.")
    routes: Annotated[tuple[Route, ...], AfterValidator(some)] = Field(
        description="The paths that players ask."
    )


def json_schema() -> dict[str, Any]:
    """Describe config.yaml for editors, as JSON Schema 2020-12."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "config.yaml of vastproxy",
    }


def settings_at(path: tuple[str | int, ...], whole: dict[str, Any]) -> tuple[str, ...]:
    """
    Name the settings of the section at *path*, going by *whole*, which is :func:`json_schema`.

    There are none where names are free (parameters, say), or where *path* leads nowhere.
    """
    section = whole
    for step in path:
        named = section.get("properties", {}).get(step)
        section = _resolved(
            named or section.get("items") or section.get("additionalProperties") or {}, whole
        )
    return tuple(section.get("properties", {}))


def _resolved(section: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    # A section that may be null is one of several that it may be.
    choices = section.get("anyOf", ())
    section = next((each for each in choices if "$ref" in each), section)
    name: str = section.get("$ref", "").rpartition("/")[2]
    return whole["$defs"][name] if name else section
