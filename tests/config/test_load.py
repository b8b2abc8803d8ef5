"""Reading config.yaml: what is wrong is told at once, with its line."""

from collections.abc import Mapping
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
    return GOOD.replace("main: {endpoint", f"main:\n      {line}\n      endpoint").replace(
        "vast}", "vast", 1
    )


def route(line: str) -> str:
    """Write the smallest config with *line* on line 6, among the settings of its route."""
    return GOOD.replace(
        "- {path: /vast, upstreams: main}", f"- path: /vast\n    upstreams: main\n    {line}"
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
        (
            "line 1, column 5: the YAML cannot be read: mapping values are not allowed here "
            "(look at the indentation, colons and quotes here and on the line before)",
            "a: b: c",
        ),
        (
            "line 2, column 1: the YAML cannot be read: found character '\\t' that cannot start "
            "any token (indent with spaces)",
            "a:\n\tb: 1",
        ),
        (
            "line 1, column 1: the YAML cannot be read: expected '<document start>', "
            "but found '<scalar>' (look at the indentation, colons and quotes here and on the "
            "line before)",
            "%YAML 1.1\na: 1"[:0] + "%X y\na",
        ),
        ("line 2: the character U+0000 may not be in YAML (remove it)", "a: 1\nb: \0"),
        (
            "a number or an escape of YAML is out of range (write the character itself)",
            r'"\UFFFFFFFF"',
        ),
        (
            "line 1, column 4: an alias stands inside of what it repeats (write it out)",
            "a: &a [*a]",
        ),
        ("line 1, column 51: nested deeper than 50 levels (look at the brackets)", "[" * 90000),
        (
            "the file is longer than 1MiB (write fewer or shorter settings)",
            "#" * (MAX_FILE + 1),
        ),
        (
            "line 6: routes.0.mode: 'rewrite': this version has two modes only (write resolve or passthrough)",
            route("mode: rewrite"),
        ),
        (
            "line 6: routes.0.mode: 'fast' is no choice here (write 'resolve' or 'passthrough')",
            route("mode: fast"),
        ),
        ("line 6: routes.0.max_hops: '21' is too much (write 20 or less)", route("max_hops: 21")),
        (
            "line 6: routes.0.max_fetches: '0' is too little (write 1 or more)",
            route("max_fetches: 0"),
        ),
        (
            "line 6: routes.0.max_hops: 'x' is no whole number (write one such as 5)",
            route("max_hops: x"),
        ),
        (
            "line 6: routes.0.strict: 'maybe' is neither true nor false (write true or false)",
            route("strict: maybe"),
        ),
        (
            "line 6: routes.0.viewer: 'query:uid' is no list (write one such as [first, second])",
            route("viewer: query:uid"),
        ),
        (
            "line 6: routes.0.macros: 'IFA' is no section (write indented lines of `name: value`)",
            route("macros: IFA"),
        ),
        (
            "line 6: routes.0.deadline: nothing is written here (write a value, or remove this line)",
            route("deadline:"),
        ),
        (
            "line 6: routes.0.max_hops: nothing is written here (write a value, or remove this line)",
            route("max_hops:"),
        ),
        (
            "line 6: routes.0.forward_query: 'slot' is no choice here (write all, none or a list: [slot, uid])",
            route("forward_query: slot"),
        ),
        (
            "line 6: routes.0.forward_cookies.0: 'a b' is no name of a cookie (write a name such as uid)",
            route("forward_cookies: [a b]"),
        ),
        (
            "line 6: routes.0.correlator: 'cookie:c' is a cookie (write query:c or header:c)",
            route("correlator: cookie:c"),
        ),
        (
            "line 6: routes.0.correlator_params.1: the text is empty (write a name, or remove this line)",
            route("correlator_params: [a, '']"),
        ),
        (
            "line 6: routes.0.correlator_params.0: ['a'] is no text (put text with braces or brackets in quotes)",
            route("correlator_params: [[a]]"),
        ),
        (
            "line 3: upstreams.main.params.slot: {'query.slot': None} is no text (put text with braces or brackets in quotes)",
            upstream("params: {slot: {query.slot}}"),
        ),
        (
            "line 3: upstreams.main.cookies: 'viewer' is no choice here (write 'chain' or 'off')",
            upstream("cookies: viewer"),
        ),
        (
            "line 3: upstreams.main.max_body: '3MB' is no whole answer"[:34],
            upstream("max_body: big"),
        ),
        (
            "line 3: upstreams.main.macros.aliases.[x]: 'X' is no registered macro (write a name such as IFA, without brackets)",
            upstream("macros: {aliases: {'[x]': X}}"),
        ),
        (
            "line 3: upstreams.main.headers.Host: the header Host belongs to the connection (remove this line)",
            upstream("headers: {Host: a}"),
        ),
        (
            "line 2: upstreams.a b: 'a b' is no name for an upstream (write 1 to 64 letters, digits, - and _)",
            GOOD.replace("main: ", "a b: ").replace("main", "a b"),
        ),
        (
            "line 1: upstreams: it is empty (write at least one)",
            "upstreams: {}\nroutes: [{path: /a, upstreams: []}]",
        ),
        (
            "line 5: workers"[:0]
            + "line 5: server.workers: 2 workers: this version runs one process (write 1)",
            GOOD + "server: {workers: 2}",
        ),
        (
            "line 5: state: 'redis://r': this version keeps its state in memory (write memory://)",
            GOOD + "state: redis://r",
        ),
        (
            "line 5: server.admin: '127.0.0.1:8080' is taken by '127.0.0.1:8080' (write another port or path)",
            GOOD + "server: {admin: 127.0.0.1:8080}",
        ),
        (
            "line 5: server.listen: 'unix:/a' is taken by 'unix:/a' (write another port or path)",
            GOOD + "server: {listen: ['unix:/a', 'unix:/a']}",
        ),
        (
            "line 5: server.public_url: 'https://a.tv/?b' has more than a path (write it without ? and #)",
            GOOD + "server: {public_url: 'https://a.tv/?b'}",
        ),
        (
            "line 5: egress.allow.0: '10.1.1.1/8' names one address of a network (write 10.0.0.0/8)",
            GOOD + "egress: {allow: [10.1.1.1/8]}",
        ),
        ("line 5: egress.ports: it is empty (write at least one)", GOOD + "egress: {ports: []}"),
        (
            "line 5: log: 'info' is no section (write indented lines of `name: value`)",
            GOOD + "log: info",
        ),
        ("line 5: logs: unknown setting 'logs' (did you mean 'log'?)", GOOD + "logs: {}"),
        (
            "line 5: log.colour: unknown setting 'colour' (there are: level, format)",
            GOOD + "log: {colour: red}",
        ),
        (
            "line 6: state: it is there twice, first on line 5 (keep one)",
            GOOD + "state: memory://\nstate: memory://",
        ),
        ("line 5: a key is a list or a mapping (write plain text)", GOOD + "? [a]\n: b"),
        (
            "line 5: state: the tag '!secret' means nothing here (remove it)",
            GOOD + "state: !secret x",
        ),
        (
            "line 5: state: the environment variable STATE is not set (set it; for the text, write $${)",
            GOOD + "state: ${STATE}",
        ),
        (
            "line 5: state: '${a b' begins no variable (write ${NAME}; for the text, write $${)",
            GOOD + "state: ${a b}",
        ),
        (
            "line 5: routes.1.path: routes.0 has the path '/vast' already (write another)",
            GOOD + "  - {path: /vast, upstreams: main}",
        ),
        (
            "line 4: routes.0.upstreams: no upstream is called 'x' (there are: main)",
            GOOD.replace("upstreams: main", "upstreams: x"),
        ),
        (
            "line 4: routes.0.upstreams: 'main' uses {rest}, but the path has none (end it in /{rest})",
            GOOD.replace("com/vast", "com/{rest}")
            .replace("{endpoint: ", "{endpoint: '")
            .replace("{rest}}", "{rest}'}"),
        ),
        ("line 4: routes.0.path: it is missing (add it)", GOOD.replace("path: /vast, ", "")),
    ],
)
def test_mistake_is_told_with_its_line(problem: str, text: str) -> None:
    """Each kind of mistake is one line: where, what is wrong, what to write instead."""
    assert problem in [each[: len(problem)] for each in problems(text)]


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
    config = read(upstream("cookies: off").replace("/vast}", "/vast}") + "")
    params = read(upstream("params: {on: no, n: 0x10, t: 1:30, d: 2020-01-01, e: ''}"))

    assert "off" == config.upstreams["main"].cookies
    assert {"on": "no", "n": "0x10", "t": "1:30", "d": "2020-01-01", "e": ""} == {
        name: str(value) for name, value in params.upstreams["main"].params.items()
    }


def test_number_and_boolean_are_read_where_they_are_wanted() -> None:
    """The setting's type decides on what a word means."""
    config = read(route("strict: yes").replace("strict: yes", "strict: yes\n    max_hops: 0"))

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
    for line in ("max_body: ${KEY}", "endpoint: x", "headers: {Host: '${KEY}'}", "cookies: ${KEY}"):
        text = upstream(line).replace("endpoint: x\n", "hosts: ['${KEY}/']\n")
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
        "line 6, column 5: too much is repeated by aliases (write some of them out)"
    ] == problems(bomb)
    assert "too much is repeated by aliases" in problems(chain)[0]
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
        "\0": "the file cannot be read: embedded null byte (give the path of a readable file with -c)",
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

    with pytest.raises(ConfigError, match="c.yaml: 3 errors"):
        load(path, {})


def _names() -> list[str]:
    whole = json_schema()
    sections = (whole, *whole["$defs"].values())
    return sorted({name for each in sections for name in each["properties"]})


def _structures() -> st.SearchStrategy[object]:
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
        try:
            read(each)
        except ConfigError as error:
            assert error.problems


@given(_structures(), _structures(), _structures())
@settings(deadline=None)
def test_any_structure_is_a_config_or_a_config_error(*parts: object) -> None:
    """Any YAML over the names of the settings gives a config or a ConfigError."""
    names = ("upstreams", "routes", "server")
    for data in (
        parts[0],
        dict(zip(names, parts, strict=True)),
        {"routes": [parts[0]], "upstreams": {"main": parts[1]}},
    ):
        try:
            read(yaml.safe_dump(data, allow_unicode=True), {"A": "1234"})
        except ConfigError as error:
            assert all(each.endswith(")") for each in error.problems)
