"""Reading config.yaml: what is wrong is told at once, with its line."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vastproxy.config.load import MAX_ALIASES, MAX_FILE, load, loads
from vastproxy.config.schema import Config, json_schema
from vastproxy.errors import ConfigError

GOOD = """\
upstreams:
  main: {endpoint: https://ads.example.com/vast}
routes:
  - {path: /vast, upstreams: main}
"""


def read(text: str, environ: Mapping[str, str] | None = None) -> Config:
    """Read *text* as the file ``c.yaml``."""
    return loads(text, source="c.yaml", environ=environ or {})


def problems(text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """List what is wrong with *text*."""
    with pytest.raises(ConfigError) as caught:
        read(text, environ)
    return list(caught.value.problems)


def upstream(line: str) -> str:
    """Write the smallest config with *line* on line 3, among the settings of its upstream."""
    endpoint = "endpoint: https://ads.example.com/vast"
    return GOOD.replace(f"{{{endpoint}}}", f"\n    {line}\n    {endpoint}")


def route(line: str) -> str:
    """Write the smallest config with *line* on line 6, among the settings of its route."""
    return GOOD.replace(
        "{path: /vast, upstreams: main}", f"path: /vast\n    upstreams: main\n    {line}"
    )


FIVE_MISTAKES = """\
server:
  admin: 0.0.0.0:8081
upstreams:
  main:
    endpoint: https://ads.example.com/vast
    timeout: fast
    tiemout: 2s
routes:
  - path: /vast
    upstreams:
      - main
      - mian
    deadline: 5
"""


def test_all_mistakes_are_told_at_once() -> None:
    """Five mistakes of five kinds give five lines, in the order of the file."""
    with pytest.raises(ConfigError) as caught:
        loads(FIVE_MISTAKES, source="config.yaml", environ={})

    assert (
        "config.yaml: 5 errors\n"
        "  line 2: server.admin: '0.0.0.0:8081' can be reached from other machines, and this "
        "version has no password for it (write 127.0.0.1:8081, unix:/run/admin.sock or null)\n"
        "  line 6: upstreams.main.timeout: 'fast' is no duration (write 800ms, 2s or 1h)\n"
        "  line 7: upstreams.main.tiemout: unknown setting 'tiemout' (did you mean 'timeout'?)\n"
        "  line 12: routes.0.upstreams.1: no upstream is called 'mian' (did you mean 'main'?)\n"
        "  line 13: routes.0.deadline: '5' has no unit (write 5ms, 5s or 5m)"
    ) == str(caught.value)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        ("it is empty (write at least `upstreams` and `routes`)", ""),
        ("it is empty (write at least `upstreams` and `routes`)", "# nothing\n"),
        ("line 1: the file is one text or list (write sections such as `upstreams:`)", "- a"),
        ("line 2: the file is one text or list (write sections such as `upstreams:`)", "\nnull"),
        ("line 1, column 5: the YAML cannot be read: mapping values are not allowed", "a: b: c"),
        ("line 2, column 1: the YAML cannot be read: found character '\\t'", "a:\n\tb: 1"),
        ("line 2, column 1: the YAML cannot be read: expected '<document start>'", "%X y\na"),
        ("line 2: the character U+0000 may not be in YAML (remove it)", "a: 1\nb: \0"),
        ("a number or an escape of YAML is out of range (write the character", r'"\UFFFFFFFF"'),
        (
            "line 1, column 4: an alias stands inside of what it repeats (write it out)",
            "a: &a [*a]",
        ),
        ("line 1, column 51: nested deeper than 50 levels (look at the brackets)", "[" * 90000),
        ("the file is longer than 1MiB (write fewer or shorter settings)", "#" * (MAX_FILE + 1)),
        ("line 5: a key is a list or a mapping (write plain text)", GOOD + "? [a]\n: b"),
        ("line 4: routes.0.path: it is missing (add it)", GOOD.replace("path: /vast, ", "")),
    ],
)
def test_file_that_is_no_config_is_explained(problem: str, text: str) -> None:
    """What is wrong with the file as a whole is told, with line and column where there are any."""
    assert problem in [each[: len(problem)] for each in problems(text)]


# Each mistake is two lines: what is written, and what is answered.
MISTAKES_OF_A_ROUTE = """
mode: rewrite
mode: 'rewrite': this version has two modes only (write resolve or passthrough)
mode: fast
mode: 'fast' is no choice here (write 'resolve' or 'passthrough')
max_hops: 21
max_hops: '21' is too much (write 20 or less)
max_hops: x
max_hops: 'x' is no whole number (write one such as 5)
max_hops:
max_hops: nothing is written here (write a value, or remove this line)
max_fetches: 0
max_fetches: '0' is too little (write 1 or more)
strict: maybe
strict: 'maybe' is neither true nor false (write true or false)
viewer: query:uid
viewer: 'query:uid' is no list (write one such as [first, second])
viewer: [uid]
viewer.0: 'uid' names no part of a request (write query:uid, header:X-Uid or cookie:uid)
deadline:
deadline: nothing is written here (write a value, or remove this line)
deadline: 10ms
deadline: 10ms is too short for any ad server (write 50ms or more)
forward_query: slot
forward_query: 'slot' is no choice here (write all, none or a list: [slot, uid])
forward_cookies: [a b]
forward_cookies.0: 'a b' is no name of a cookie (write a name such as uid)
correlator: cookie:c
correlator: 'cookie:c' is a cookie (write query:c or header:c)
correlator_params: [a, '']
correlator_params.1: the text is empty (write a name, or remove this line)
correlator_params: [[a]]
correlator_params.0: ['a'] is no text (put text with braces or brackets in quotes)
macros: IFA
macros: 'IFA' is no section (write indented lines of `name: value`)
macros: {IFB: x}
macros.IFB: 'IFB' is no registered macro (did you mean IFA?)
macros: {CORRELATOR: x}
macros.CORRELATOR: CORRELATOR is filled by the proxy and cannot be set (remove this line)
upstream: main
upstream: unknown setting 'upstream' (did you mean 'upstreams'?)
path: /other
path: it is there twice, first on line 4 (keep one)
"""
MISTAKES_OF_AN_UPSTREAM = """
timeout: 2
timeout: '2' has no unit (write 2ms, 2s or 2m)
cookies: viewer
cookies: 'viewer' is no choice here (write 'chain' or 'off')
max_body: 3MiB
max_body: 3145728 bytes are more than one answer may have (write 2MiB or less)
max_body: ''
max_body: '' is no size (write 1000B, 512KiB or 2MiB)
hosts: [https://a.tv]
hosts.0: 'https://a.tv' is no host (write ads.example.com or ads.example.com:8443)
params: {slot: {query.slot}}
params.slot: {'query.slot': None} is no text (put text with braces or brackets in quotes)
params: {'': a}
params.: the text is empty (write a name, or remove this line)
headers: {Host: a}
headers.Host: the header Host belongs to the connection (remove this line)
headers: {a b: c}
headers.a b: 'a b' is no name of a header (write a name such as X-Api-Key)
session_params: [uid]
session_params.0: 'uid' is no choice here (write 'correlator' or 'timestamp')
macros: {timestamp: iso}
macros.timestamp: 'iso' is no choice here (write 'unix_ms' or 'iso8601')
macros: {aliases: {'[x]': XXXX}}
macros.aliases.[x]: 'XXXX' is no registered macro (write a name such as IFA, without brackets)
circuit_breaker: {}
circuit_breaker: unknown setting 'circuit_breaker' (there are: endpoint, hosts, params, headers,
"""
OTHER_MISTAKES = """
server: {workers: 2}
server.workers: 2 workers: this version runs one process (write 1)
server: {admin: 127.0.0.1:8080}
server.admin: '127.0.0.1:8080' is taken by `listen` (write admin: null, or another port)
server: {listen: ['unix:/a', 'unix:/a']}
server.listen: 'unix:/a' is taken by 'unix:/a' (write another port or path)
server: {listen: 'unix:a'}
server.listen: 'unix:a' names no absolute path (write unix:/run/vastproxy.sock)
server: {public_url: 'https://a.tv/?b'}
server.public_url: 'https://a.tv/?b' has more than a path (write it without ? and #)
state: redis://r
state: 'redis://r': this version keeps its state in memory (write memory://)
state: ${STATE}
state: the environment variable STATE is not set (set it; for the text, write $${)
state: ${a b}
state: '${a b' begins no variable (write ${NAME}; for the text, write $${)
state: !secret x
state: the tag '!secret' means nothing here (remove it)
egress: {allow: [10.1.1.1/8]}
egress.allow.0: '10.1.1.1/8' names one address of a network (write 10.0.0.0/8)
egress: {allow: [private]}
egress.allow.0: 'private' is no network (write 10.0.0.0/8 or 192.0.2.7)
egress: {ports: []}
egress.ports: it is empty (write at least one)
egress: {ports: [70000]}
egress.ports.0: '70000' is too much (write 65535 or less)
log: info
log: 'info' is no section (write indented lines of `name: value`)
log: {colour: red}
log.colour: unknown setting 'colour' (there are: level, format)
logs: {}
logs: unknown setting 'logs' (did you mean 'log'?)
upstreams: {}
upstreams: it is there twice, first on line 1 (keep one)
"""
MISTAKES_BETWEEN_SECTIONS = """
- {path: /vast, upstreams: main}
path: routes.0 has the path '/vast' already (write another)
- {path: /a, upstreams: [main, mian]}
upstreams.1: no upstream is called 'mian' (did you mean 'main'?)
- {path: /a, upstreams: other}
upstreams: no upstream is called 'other' (there are: main, deep)
- {path: /a, upstreams: [main, deep]}
upstreams.1: 'deep' uses {rest}, but the path has none (end it in /{rest})
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """Take a table of mistakes apart."""
    lines = table.strip("\n").split("\n")
    return list(zip(lines[::2], lines[1::2], strict=True))


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_OF_A_ROUTE))
def test_mistake_of_a_route_is_explained(written: str, answered: str) -> None:
    """A wrong setting of a route is one line: where, what is wrong, what to write instead."""
    assert [f"line 6: routes.0.{answered}"] == problems(route(written))


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_OF_AN_UPSTREAM))
def test_mistake_of_an_upstream_is_explained(written: str, answered: str) -> None:
    """A wrong setting of an upstream is one line: where, what is wrong, what to write instead."""
    expected = f"line 3: upstreams.main.{answered}"

    assert [expected] == [each[: len(expected)] for each in problems(upstream(written))]


@pytest.mark.parametrize(("written", "answered"), pairs(OTHER_MISTAKES))
def test_mistake_of_a_section_is_explained(written: str, answered: str) -> None:
    """A wrong setting of any other section is one line, too."""
    assert [f"line 5: {answered}"] == problems(GOOD + written)


@pytest.mark.parametrize(("written", "answered"), pairs(MISTAKES_BETWEEN_SECTIONS))
def test_mistake_between_sections_is_explained(written: str, answered: str) -> None:
    """A route that does not fit the other routes or the upstreams is told so."""
    deep = "  deep: {endpoint: 'https://a.tv/{rest}'}\n"
    text = GOOD.replace("routes:", f"{deep}routes:") + f"  {written}\n"

    assert [f"line 6: routes.1.{answered}"] == problems(text)


@pytest.mark.parametrize("name", ["a b", "", "x" * 65, "\u00e4"])
def test_name_of_an_upstream_is_short_and_plain(name: str) -> None:
    """An upstream's name is 1 to 64 letters, digits, hyphens and underscores."""
    text = (
        f"upstreams: {{'{name}': {{endpoint: https://a.tv/}}}}\nroutes: [{{path: /, upstreams: m}}]"
    )

    assert any(
        "is no name for an upstream (write 1 to 64 letters" in each for each in problems(text)
    )


def test_first_upstream_is_needed() -> None:
    """There is at least one upstream and one route, and a route has at least one upstream."""
    assert [
        "line 1: upstreams: it is empty (write at least one)",
        "line 2: routes: it is empty (write at least one)",
    ] == problems("upstreams: {}\nroutes: []")
    assert ["line 4: routes.0.upstreams: it is empty (write at least one)"] == problems(
        GOOD.replace("upstreams: main", "upstreams: []")
    )


def test_mistake_hides_no_other() -> None:
    """What needs two sections is checked although both have other mistakes."""
    text = (
        upstream("timeout: x").replace("path: /vast", "path: vast").replace(": main}", ": [mian]}")
    )

    assert [
        "line 3: upstreams.main.timeout: 'x' is no duration (write 800ms, 2s or 1h)",
        "line 6: routes.0.path: 'vast' is no path (begin it with /)",
        "line 6: routes.0.upstreams.0: no upstream is called 'mian' (did you mean 'main'?)",
    ] == problems(text)


def test_mistake_is_told_once() -> None:
    """What only follows from a mistake that is told already is not told too."""
    assert 1 == len(problems(GOOD + "server: {listen: ${LISTEN}}"))
    assert 1 == len(problems(GOOD + "server: !x {listen: a}"))
    assert 1 == len(problems(GOOD + "egress: {ports: [x]}"))


def test_words_of_yaml_stay_words() -> None:
    """``off``, ``no`` and numbers are taken as they stand, where text is wanted."""
    config = read(upstream("cookies: off"))
    params = read(upstream("params: {on: no, n: 0x10, t: 1:30, d: 2020-01-01, e: ''}"))

    assert "off" == config.upstreams["main"].cookies
    assert {"on": "no", "n": "0x10", "t": "1:30", "d": "2020-01-01", "e": ""} == {
        name: str(value) for name, value in params.upstreams["main"].params.items()
    }


def test_number_and_boolean_are_read_where_they_are_wanted() -> None:
    """The setting's type decides on what a word means."""
    config = read(route("strict: yes\n    max_hops: 0"))

    assert config.routes[0].strict is True
    assert 0 == config.routes[0].max_hops


def test_variable_is_put_in() -> None:
    """``${NAME}`` takes a variable, in part of a text too; ``$${`` is the text ``${``."""
    text = upstream('params: {a: "${A}-${B}", b: "$${CB}", c: $5, d: "$$${CB}"}')
    params = read(text, {"A": "1", "B": ""}).upstreams["main"].params

    assert {"a": "1-", "b": "${CB}", "c": "$5", "d": "$${CB}"} == {
        name: str(value) for name, value in params.items()
    }


def test_variable_may_be_a_number() -> None:
    """A variable stands for whatever the setting wants."""
    assert 3 == read(route("max_hops: ${HOPS}"), {"HOPS": "3"}).routes[0].max_hops


@pytest.mark.parametrize("value", ["s3cret-value", "s3cret'\n\\value", "s3cret" * 50])
def test_value_of_a_variable_is_in_no_message(value: str) -> None:
    """A variable may be a secret: messages have its name."""
    for line in (
        "max_body: ${KEY}",
        "hosts: ['${KEY}/']",
        "headers: {Host: '${KEY}'}",
        "cookies: ${KEY}",
    ):
        text = upstream(line)
        for problem in problems(text, {"KEY": value}):
            assert "s3cret" not in problem


def test_key_takes_no_variable() -> None:
    """Only values take variables; the names of settings do not."""
    assert "line 5: ${X}: unknown setting" in problems(GOOD + "${X}: a", {"X": "log"})[0]


def test_alias_and_merge_are_followed() -> None:
    """YAML's anchors repeat a section; what stands beside ``<<`` wins over it."""
    config = read(
        "upstreams:\n"
        "  a: &a {endpoint: https://a.tv/, timeout: 2s}\n"
        "  b: {<<: *a, timeout: 3s}\n"
        "  c: {<<: [*a, {cookies: off}]}\n"
        "routes: [{path: /a, upstreams: [a, b, c]}]\n"
    )

    assert [2.0, 3.0, 2.0] == [each.timeout for each in config.upstreams.values()]
    assert "off" == config.upstreams["c"].cookies


def test_many_aliases_are_refused() -> None:
    """A file that grows by its aliases is refused before it has grown."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
    )
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [[*a{n - 1}]]\n" for n in range(1, 60))

    assert [
        "line 5, column 5: more than 100000 values, with what aliases repeat (write fewer)"
    ] == (problems(bomb))
    assert "nested deeper than 50 levels, with what aliases repeat" in problems(chain)[0]
    many = "a: &a x\nb: [" + "*a," * (MAX_ALIASES + 1) + "]"
    assert f"more than {MAX_ALIASES} aliases" in problems(many)[0]


def test_file_is_read(tmp_path: Path) -> None:
    """A file is read as UTF-8, with or without a byte order mark."""
    (tmp_path / "a.yaml").write_bytes(GOOD.encode())
    (tmp_path / "b.yaml").write_bytes(GOOD.encode("utf-8-sig"))

    assert read(GOOD) == load(tmp_path / "a.yaml", {}) == load(tmp_path / "b.yaml", {})


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A file that is not there, no file, too long, or not UTF-8 is an error that names it."""
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe4\n")
    (tmp_path / "long.yaml").write_bytes(b"#" * (MAX_FILE + 1))
    expected = {
        "none.yaml": "there is no such file (give its path with -c)",
        "": "the file cannot be read: Is a directory (give the path of a readable file with -c)",
        "latin.yaml": "line 2: a byte here is no UTF-8 (save the file as UTF-8)",
        "long.yaml": "the file is longer than 1MiB (write fewer or shorter settings)",
        "\0": (
            "the file cannot be read: embedded null byte (give the path of a readable file with -c)"
        ),
    }

    for name, problem in expected.items():
        with pytest.raises(ConfigError) as caught:
            load(tmp_path / name, {})
        assert (problem,) == caught.value.problems
        assert str(tmp_path / name) == caught.value.source


def test_mistake_in_a_file_has_the_path_of_the_file(tmp_path: Path) -> None:
    """The first line of the message is the path as it was given."""
    path = tmp_path / "c.yaml"
    path.write_text("a: 1")

    with pytest.raises(ConfigError, match=r"c\.yaml: 3 errors"):
        load(path, {})


def _names() -> list[str]:
    """List the names of all settings."""
    whole = json_schema()
    sections = (whole, *whole["$defs"].values())
    return sorted({name for each in sections for name in each["properties"]})


def _structures() -> st.SearchStrategy[object]:
    """Make nested lists and mappings over the names of the settings."""
    words = ["/vast", "/a/{rest}", "main", "{query.a}", "https://a.tv/{rest}", "2s", "off", "${A}"]
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(words), st.text()
    )
    keys = st.one_of(
        st.sampled_from(_names()), st.sampled_from(["main", "X-A", "<<", "IFA", "[key]"])
    )
    return st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(keys, inner)),
        max_leaves=30,
    )


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    """Any text gives a config or a ConfigError, and no other exception."""
    with pytest.raises(ConfigError):
        read(text)


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>%@'\"#?,<= \n\t$\\U0x~")))
@settings(deadline=None)
def test_any_yaml_is_a_config_or_a_config_error(text: str) -> None:
    """Any text of YAML's own characters gives a ConfigError, alone and behind a good config."""
    for each in (text, GOOD + text, GOOD + "server: " + text):
        with suppress(ConfigError):
            read(each)


@given(_structures(), _structures(), _structures())
@settings(deadline=None)
def test_any_structure_is_a_config_or_a_config_error(
    first: object, second: object, third: object
) -> None:
    """Any YAML over the names of the settings gives a config or a ConfigError."""
    sections = {"upstreams": first, "routes": second, "server": third}
    entries = {"upstreams": {"main": first}, "routes": [second], "log": third}
    for data in (first, sections, entries):
        with suppress(ConfigError):
            read(yaml.safe_dump(data, allow_unicode=True), {"A": "1234"})
