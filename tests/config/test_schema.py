"""The settings: their defaults, their types, what each refuses."""

import re
from collections.abc import Mapping
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from vastproxy.config.load import load
from vastproxy.config.schema import (
    KNOWN_MACROS,
    PROXY_MACROS,
    REGISTERED_MACROS,
    Config,
    Listen,
    Route,
    Server,
    Source,
    Template,
    Upstream,
    json_schema,
    known_macro,
    settings_at,
)

SMALLEST = """
upstreams:
  main: {endpoint: https://ads.example.com/vast}
routes:
  - {path: /vast, upstreams: main}
"""

ROUTE = """
upstreams:
  main: {endpoint: https://ads.example.com/vast}
routes:
  - path: /vast
    upstreams: main
    viewer: ["query:uid"]
    """
"""The smallest config with room for one more setting of its route."""


def a_config(**sections: object) -> Config:
    """Make the smallest config, with *sections* beside or instead of its own."""
    return Config.model_validate({**yaml.safe_load(SMALLEST), **sections})


def an_upstream(**settings: object) -> Upstream:
    """Make an upstream with *settings*."""
    return Upstream.model_validate({"endpoint": "https://ads.example.com/vast", **settings})


def a_route(**settings: object) -> Route:
    """Make a route with *settings*."""
    return Route.model_validate({"path": "/vast", "upstreams": ["main"], **settings})


def a_counting_route() -> dict[str, Any]:
    """Write a route that has caps and a budget."""
    caps = [
        {"limit": 3, "window": "1h"},
        {"limit": 1, "kind": "calendar", "window": "day", "time_zone": "Asia/Tokyo", "by": "ad"},
    ]
    budget = {"campaign": "spring", "limit": "1000.5", "cpm": "2.50"}
    route = {"path": "/vast", "upstreams": "main", "viewer": ["query:uid"]}
    return {**route, "frequency_caps": caps, "budget": budget}


def test_smallest_config_has_every_default() -> None:
    """One upstream with an endpoint and one route with a path are enough."""
    config = a_config()

    assert (Listen("127.0.0.1", 8080),) == config.server.listen
    assert (Listen("127.0.0.1", 8081),) == config.server.admin
    assert "memory://" == str(config.state)
    assert (80, 443) == config.egress.ports
    assert 1.0 == config.upstreams["main"].timeout
    assert 512 * 1024 == config.upstreams["main"].max_body
    assert ("correlator", "timestamp") == config.upstreams["main"].session_params
    assert ("main",) == config.routes[0].upstreams
    assert 2.5 == config.routes[0].deadline
    assert "all" == config.routes[0].forward_query


def test_default_state_is_the_memory_of_one_process() -> None:
    """Without a word about state there is one process, which counts in its memory."""
    config = a_config()

    assert ("memory", 1, ()) == (config.state.kind, config.server.workers, config.server.secret)
    assert (0.05, None) == (config.state_timeout, config.journal)
    assert ((), None) == (config.routes[0].frequency_caps, config.routes[0].budget)
    assert (600.0, 21_600.0) == (config.routes[0].reservation_ttl, config.server.beacon_ttl)


def test_config_cannot_be_changed() -> None:
    """Settings are frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        a_config().log.level = "debug"  # type: ignore[misc]


def test_config_goes_through_its_own_dump() -> None:
    """What a config is dumped as is read as the same config."""
    config = a_config(egress={"allow": ["10.0.0.0/8"]}, server={"listen": [":80", "unix:/x"]})

    assert config == Config.model_validate(config.model_dump())


def test_everything_that_is_counted_goes_through_its_own_dump() -> None:
    """A dump keeps caps, budgets, secrets and the state's password, for the program alone."""
    config = a_config(
        server={"secret": ["correct-horse", "battery-staple"]},
        state="redis://:pass-word@h/1",
        journal="/var/lib/vastproxy",
        routes=[a_counting_route()],
    )

    assert config == Config.model_validate(config.model_dump())
    assert "redis://:pass-word@h/1" == Config.model_validate(config.model_dump()).state.url


def test_secrets_are_shown_nowhere() -> None:
    """Neither a repr nor JSON has a secret or the password of the state."""
    config = a_config(server={"secret": "correct-horse"}, state="redis://:pass-word@h/1")

    for text in (repr(config), str(config), config.model_dump_json(), str(config.model_dump())):
        assert "correct-horse" not in text
        assert "pass-word" not in text
    assert ["correct-horse"] == [each.get_secret_value() for each in config.server.secret]


def test_dump_as_json_has_no_secret_to_be_used() -> None:
    """What stands in JSON in place of a secret is refused as a secret."""
    text = a_config(server={"secret": "correct-horse"}).server.model_dump_json()

    with pytest.raises(ValidationError, match="can be guessed"):
        Server.model_validate_json(text)


def test_value_that_is_wrong_is_left_out_of_errors() -> None:
    """An error of a section does not repeat the values that were given to it."""
    with pytest.raises(ValidationError) as caught:
        a_config(server={"secret": ["correct-horse", 7]}, state=["redis://:pass-word@h"])

    assert "neither a text nor a list of texts" in str(caught.value)
    assert "correct-horse" not in str(caught.value)
    assert "pass-word" not in str(caught.value)


def test_config_is_written_as_json() -> None:
    """Templates, addresses and networks are text in JSON."""
    text = a_config(egress={"allow": ["10.0.0.0/8"]}).model_dump_json()

    assert '"endpoint":"https://ads.example.com/vast"' in text
    assert '"listen":["127.0.0.1:8080"]' in text
    assert '"allow":["10.0.0.0/8"]' in text


def test_values_are_ready_to_use() -> None:
    """Templates, networks and places of a request are parsed."""
    upstream = an_upstream(params={"slot": "{query.slot}"})
    route = a_route(viewer=["query:uid", "header:X-Uid"], correlator="query:c")
    server = Server.model_validate({"trusted_proxies": ["10.0.0.0/8"]})

    assert {"slot": Template.parse("{query.slot}")} == upstream.params
    assert (Source("query", "uid"), Source("header", "x-uid")) == route.viewer
    assert Source("query", "c") == route.correlator
    assert (IPv4Network("10.0.0.0/8"),) == server.trusted_proxies


def test_admin_may_be_off() -> None:
    """A null for the admin listener means that there is none."""
    assert () == Server.model_validate({"admin": None}).admin


def test_public_url_has_no_slash_at_its_end() -> None:
    """The public URL is a base for paths, which begin with a slash."""
    server = Server.model_validate({"public_url": "https://ads.example.com/"})

    assert "https://ads.example.com" == server.public_url


def test_upstream_and_route_tell_of_rest() -> None:
    """An upstream tells whether it needs the rest of the path, a route whether it has one."""
    assert an_upstream(params={"p": "{rest}"}).uses_rest
    assert not an_upstream().uses_rest
    assert a_route(path="/vast/{rest}").takes_rest
    assert not a_route().takes_rest


def test_endpoint_of_the_player_needs_hosts() -> None:
    """An endpoint that begins with a placeholder is accepted with a list of hosts."""
    upstream = an_upstream(endpoint="{query.tag}", hosts=["*.Example.com", "ads.tv:8443"])

    assert ("*.example.com", "ads.tv:8443") == upstream.hosts
    with pytest.raises(ValidationError, match="list the hosts it may choose"):
        an_upstream(endpoint="{query.tag}")


def test_null_is_no_section_but_where_it_may_be() -> None:
    """The settings of a section that may be null are known by their names."""
    whole = json_schema()

    assert "cpm" in settings_at(("routes", 0, "budget"), whole)
    assert "window" in settings_at(("routes", 0, "frequency_caps", 1), whole)


@pytest.mark.parametrize(
    ("message", "endpoint"),
    [
        ("is no absolute URL", ""),
        ("is no absolute URL", "/vast"),
        ("is no absolute URL", "[TAG]"),
        ("a placeholder in its host", "https://{query.host}/vast"),
        ("a placeholder in its host", "https://ads.example.com{rest}"),
        ("a placeholder in its host", "https://ads.example.com:{query.port}/"),
        ("a placeholder in its host", "http{query.s}://ads.example.com/"),
        ("a placeholder in its host", "https://{query.user}@ads.example.com/"),
        ("a user and a password", "https://user:secret@ads.example.com/{rest}"),
        ("is no host", "https://[CACHEBUSTING].example.com/"),
        ("has a fragment", "https://ads.example.com/vast#top"),
        ("no URL can have", "https://ads.example.com/v\u00e4st"),
    ],
)
def test_endpoint_names_its_host(message: str, endpoint: str) -> None:
    """A request cannot choose any part of the host of an ordinary endpoint."""
    with pytest.raises(ValidationError, match=message):
        an_upstream(endpoint=endpoint)


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://ads.example.com",
        "http://192.0.2.1:8080/vast?cb=[CACHEBUSTING]&x=%%X%%",
        "https://[2001:db8::1]/{rest}",
        "https://ads.example.com?slot={query.slot}",
        "HTTPS://ADS.example.com/{query.a}{header.b}",
    ],
)
def test_endpoint_is_an_absolute_url(endpoint: str) -> None:
    """An absolute http or https URL is an endpoint, with macros and placeholders after its host."""
    assert endpoint == str(an_upstream(endpoint=endpoint).endpoint)


@pytest.mark.parametrize(
    "name", ["Host", "content-length", "Connection", "TE", "Upgrade", "a b", ""]
)
def test_header_of_the_connection_cannot_be_set(name: str) -> None:
    """Headers that belong to the connection, and names that are no tokens, are refused."""
    with pytest.raises(ValidationError):
        an_upstream(headers={name: "x"})


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\x00", "{query.a}\n", "a\x7f"])
def test_header_value_is_one_line(value: str) -> None:
    """A header's value cannot have line breaks or other control characters."""
    with pytest.raises(ValidationError, match="no header may have"):
        an_upstream(headers={"X-A": value})


def test_header_stands_once() -> None:
    """One header in two cases is one header too many."""
    with pytest.raises(ValidationError, match="the header x-a is there twice"):
        an_upstream(headers={"X-A": "1", "x-a": "2"})


@pytest.mark.parametrize(
    "path",
    [
        "vast",
        "/a?b",
        "/a#b",
        "/a b",
        "/\u00e4",
        "/a/../b",
        "/{query.a}",
        "/{rest}/a",
        "/a{rest}",
        "/{rest}/{rest}",
        "/hop",
        "/hop/x",
        "/beacon/{rest}",
    ],
)
def test_bad_path_is_refused(path: str) -> None:
    """A path that no player could ask, or that the proxy keeps for itself, is refused."""
    with pytest.raises(ValidationError, match=r"\((write|begin|only|percent-encode) "):
        a_route(path=path)


@pytest.mark.parametrize(
    "path", ["/", "/{rest}", "/vast/pre-roll.xml", "/a/{rest}", "/hops", "/%20"]
)
def test_path_is_accepted(path: str) -> None:
    """A path may be short, may end in ``/{rest}``, and may begin like a reserved one."""
    assert path == a_route(path=path).path


def test_macros_are_the_registered_ones() -> None:
    """There are 59 registered macros, two more that are known, and the proxy's own among them."""
    assert 59 == len(REGISTERED_MACROS)
    assert {"BREAKMINDURATION", "CORRELATOR"} == KNOWN_MACROS - REGISTERED_MACROS
    assert PROXY_MACROS < KNOWN_MACROS


@pytest.mark.parametrize("name", sorted(PROXY_MACROS))
def test_macro_of_the_proxy_cannot_be_set(name: str) -> None:
    """What the proxy alone knows is in no route's macros, but may be what an alias stands for."""
    with pytest.raises(ValidationError, match=f"{name} is filled by the proxy"):
        a_route(macros={name: "1"})
    assert name == an_upstream(macros={"aliases": {"[x]": name}}).macros.aliases["[x]"]


def test_unknown_macro_is_answered_with_the_nearest() -> None:
    """A misspelt macro is answered with the one that it is most like."""
    with pytest.raises(ValueError, match="did you mean GDPRCONSENT"):
        known_macro("[GDPR_CONSENT]")
    with pytest.raises(ValueError, match="without brackets"):
        known_macro("qqqq")


def test_macro_may_use_rest_where_there_is_one() -> None:
    """A route's macro can take ``{rest}`` only if the path has it."""
    assert "{rest}" == str(
        a_route(path="/a/{rest}", macros={"CONTENTID": "{rest}"}).macros["CONTENTID"]
    )
    with pytest.raises(ValidationError, match="end the path in"):
        a_route(macros={"CONTENTID": "{rest}"})


def test_body_is_bounded() -> None:
    """The largest body that can be set is 2 MiB."""
    assert 2 * 1024 * 1024 == an_upstream(max_body="2MiB").max_body
    with pytest.raises(ValidationError, match="write 2MiB or less"):
        an_upstream(max_body="2.1MiB")


def test_deadline_is_long_enough() -> None:
    """The shortest deadline that can be set is 50 ms."""
    assert 0.05 == a_route(deadline="50ms").deadline
    with pytest.raises(ValidationError, match="49ms is too short"):
        a_route(deadline="49ms")


def _fits(value: object, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Judge *value* by those keywords of JSON Schema that the schema of the config has."""
    if "$ref" in schema:
        return _fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return any(_fits(value, each, whole) for each in schema["anyOf"])
    if not isinstance(value, _TYPES[schema["type"]]):
        return False
    if isinstance(value, dict):
        return _section_fits(value, schema, whole)
    if isinstance(value, list):
        return all(_fits(each, schema["items"], whole) for each in value)
    in_range = not isinstance(value, (int, float)) or (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and schema.get("exclusiveMinimum", value - 1) < value
    )
    found = not isinstance(value, str) or re.search(schema.get("pattern", ""), value) is not None
    return in_range and found and value in schema.get("enum", [value])


_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def _section_fits(
    section: dict[str, object], schema: Mapping[str, Any], whole: Mapping[str, Any]
) -> bool:
    """Judge a mapping: its names, and the value of each."""
    named, free = schema.get("properties", {}), schema["additionalProperties"]
    if set(schema.get("required", ())) - set(section) or (not free and set(section) - set(named)):
        return False
    return all(_fits(each, named.get(key, free), whole) for key, each in section.items())


@pytest.mark.parametrize(
    ("fits", "text"),
    [
        (True, SMALLEST),
        (True, SMALLEST + "server: {listen: [':80', 'unix:/x'], admin: null}"),
        (True, SMALLEST + "log: {level: debug}\negress: {ports: [443], nat64: true}"),
        (False, SMALLEST + "log: {level: loud}"),
        (False, SMALLEST + "egress: {ports: [70000]}"),
        (False, SMALLEST + "server: {shutdown_timeout: 10}"),
        (False, SMALLEST + "sever: {}"),
        (True, SMALLEST + "server: {workers: 4, secret: [abcdefgh]}\nstate: rediss+cluster://h"),
        (True, SMALLEST + "state: postgres://u:p@h/db\nstate_timeout: 1s\njournal: /var/lib/x"),
        (False, SMALLEST + "server: {workers: 257}"),
        (False, SMALLEST + "state: mysql://h/db"),
        (True, ROUTE + "frequency_caps: [{limit: 0, window: 1h}, {limit: 1, kind: pod}]"),
        (True, ROUTE + "frequency_caps: [{limit: 1, kind: calendar, window: day, by: [ad]}]"),
        (True, ROUTE + "frequency_caps: [{limit: 1, window: 1h, by: viewer+ad}]"),
        (False, ROUTE + "frequency_caps: [{limit: -1, window: 1h}]"),
        (False, ROUTE + "frequency_caps: [{limit: 1, window: year}]"),
        (False, ROUTE + "frequency_caps: [{limit: 1, window: 1h, by: ad+viewer+ad}]"),
        (True, ROUTE + "budget: {campaign: a, limit: 1000.50, cpm: '2.50'}"),
        (True, ROUTE + "budget: null"),
        (False, ROUTE + "budget: {campaign: a, limit: 0}"),
        (False, ROUTE + "budget: {campaign: a, limit: 1, currency: Euro}"),
        (False, ROUTE + "budget: {campaign: a}"),
        (False, ROUTE + "budget: {campaign: a b, limit: 1}"),
        (True, ROUTE + "frequency_caps: [{limit: 1, window: 1h, name: null}]"),
        (False, SMALLEST + "state: postgres+asyncpg://h/db"),
        (False, "routes: []"),
    ],
)
def test_json_schema_judges_like_the_program(fits: bool, text: str) -> None:  # noqa: FBT001
    """An editor that knows the JSON Schema accepts a good config and marks a wrong one."""
    whole = json_schema()

    assert fits is _fits(yaml.safe_load(text), whole, whole)


def test_config_that_ships_fits() -> None:
    """The config.yaml at the top of the project is good, by the program and by the JSON Schema."""
    path, whole = Path(__file__).parents[2] / "config.yaml", json_schema()

    assert load(path, {}).routes
    assert _fits(yaml.safe_load(path.read_text(encoding="utf-8")), whole, whole)


def test_json_schema_describes_every_setting() -> None:
    """Every setting has a description, and every default in the schema fits the schema."""
    whole = json_schema()

    assert "https://json-schema.org/draft/2020-12/schema" == whole["$schema"]
    for section in (whole, *whole["$defs"].values()):
        for setting in section["properties"].values():
            assert setting["description"].endswith(".")
            assert "default" not in setting or _fits(setting["default"], setting, whole)


def test_settings_of_a_section_are_found() -> None:
    """The names that are valid at a place follow lists and free names; elsewhere there are none."""
    whole = json_schema()

    assert "routes" in settings_at((), whole)
    assert "endpoint" in settings_at(("upstreams", "macros"), whole)
    assert ("timestamp", "spellings", "aliases") == settings_at(("upstreams", "a", "macros"), whole)
    assert "deadline" in settings_at(("routes", 3), whole)
    assert () == settings_at(("routes", 3, "macros"), whole)
    assert () == settings_at(("nothing", "here"), whole)
