"""
Read config.yaml: the only place where configuration comes in.

Rule 1: any text gives a :class:`Config` or a :class:`ConfigError`, in bounded time and memory.
Rule 2: all mistakes are told at once, each with its line, its place, and what to write instead.
Rule 3: a scalar is taken as the text that stands there. YAML's guesses (``off`` is false, ``1:30``
is ninety) never happen; the type of the setting decides.
Rule 4: what came from an environment variable may be a secret, and is in no message; neither is
what stands under ``secret``, or as a password in a URL.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vastproxy.config.between import Fault, Place, advice, faults_between_sections
from vastproxy.config.fallback import MAX_FALLBACK, is_inline
from vastproxy.config.schema import Config, json_schema, settings_at
from vastproxy.config.units import LONGEST_SHOWN, shown
from vastproxy.errors import ConfigError

Pair = tuple[str, yaml.Node, yaml.Node]
"""The text of a key, its node, the node of its value."""

MAX_FILE: Final = 1024 * 1024
"""Bytes. A route takes about 200: this is room for thousands."""
MAX_ALIASES: Final = 100
"""Uses of YAML's ``*name``. Kubernetes bounds their share since CVE-2019-11253; this is simpler."""
MAX_DEPTH: Final = 50
"""Levels of nesting, aliases followed. The schema has six."""
MAX_VALUES: Final = 100_000
"""Values, aliases followed. Thousands of routes have fewer."""
SHORTEST_SECRET: Final = 4
"""Characters. Shorter values of variables are words such as ``on``, which messages need."""

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(
    _TAG + each for each in ("null", "bool", "int", "float", "str", "timestamp", "value", "merge")
)


_NO_TEXT = "{value} is no text (put text with braces or brackets in quotes)"
_NO_INTEGER = "{value} is no whole number (write one such as 5)"
_NO_BOOLEAN = "{value} is neither true nor false (write true or false)"
_NO_SECTION = "{value} is no section (write indented lines of `name: value`)"
# The types of errors that pydantic knows, in the words of an operator.
_WORDS: Final[Mapping[str, str]] = {
    "missing": "it is missing (add it)",
    "literal_error": "{value} is no choice here (write {expected})",
    "greater_than_equal": "{value} is too little (write {ge} or more)",
    "less_than_equal": "{value} is too much (write {le} or less)",
    "bool_parsing": _NO_BOOLEAN,
    "bool_type": _NO_BOOLEAN,
    "int_parsing": _NO_INTEGER,
    "int_parsing_size": _NO_INTEGER,
    "int_type": _NO_INTEGER,
    "tuple_type": "{value} is no list (write one such as [first, second])",
    "dict_type": _NO_SECTION,
    "mapping_type": _NO_SECTION,
    "model_type": _NO_SECTION,
    "string_type": _NO_TEXT,
    "string_unicode": _NO_TEXT,
}


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Read the file at *path*, with variables of *environ* put in; or raise ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE + 1).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(str(path), ("there is no such file (give its path with -c)",)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), (_unreadable(error),)) from None
    return loads(text, source=str(path), environ=environ, directory=path.parent)


def loads(
    text: str, *, source: str, environ: Mapping[str, str], directory: Path | None = None
) -> Config:
    """
    Read *text*, which messages call *source*; or raise ConfigError.

    Paths of files that it names begin at *directory*; None: at the current one.
    """
    try:
        root = _compose(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(source, (_syntax_problem(error, text),)) from None
    if root is None:
        raise ConfigError(source, ("it is empty (write at least `upstreams` and `routes`)",))
    if not isinstance(root, yaml.MappingNode):
        problem = "the file is one text or list (write sections such as `upstreams:`)"
        raise ConfigError(source, (f"line {_line(root)}: {problem}",))
    reader = _Reader(environ)
    data = reader.read(root, ())
    unread = list(_put_in_files(data, directory or Path()))
    config, found = _validated(data)
    faults = [*reader.faults, *unread, *(each for each in found if not reader.lost(each.place))]
    if config is None or faults:
        told = sorted({reader.told(each) for each in faults})
        raise ConfigError(source, tuple(problem for _, problem in told))
    return config


def _unreadable(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        line = error.object.count(b"\n", 0, error.start) + 1
        return f"line {line}: a byte here is no UTF-8 (save the file as UTF-8)"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"the file cannot be read: {reason} (give the path of a readable file with -c)"


# From text to nodes


class _LimitError(yaml.MarkedYAMLError):
    """YAML that is well-formed and yet refused."""


class _Loader(yaml.SafeLoader):
    """Composes nodes, within limits; constructs nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._aliases = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - as in PyYAML
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._aliases += isinstance(event, yaml.AliasEvent)
        self._depth += 1
        if self._aliases > MAX_ALIASES:
            raise _limit(
                f"more than {MAX_ALIASES} aliases", "write some of them out", event.start_mark
            )
        if self._depth > MAX_DEPTH:
            raise _limit(
                f"nested deeper than {MAX_DEPTH} levels", "look at the brackets", event.start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    if len(text) > MAX_FILE or len(text.encode("utf-8", "surrogatepass")) > MAX_FILE:
        raise _LimitError(problem="the file is longer than 1MiB (write fewer or shorter settings)")
    loader = _Loader(text)
    try:
        root: yaml.Node | None = loader.get_single_node()
    finally:
        loader.dispose()
    if root is not None:
        _weigh(root, {})
    return root


def _weigh(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count the values and levels of *node* as if its aliases were written out."""
    if id(node) in known:
        weight = known[id(node)]
        if weight is None:
            raise _limit(
                "an alias stands inside of what it repeats", "write it out", node.start_mark
            )
        return weight
    known[id(node)] = None
    weights = [_weigh(each, known) for each in _children(node)]
    size = 1 + sum(size for size, _ in weights)
    depth = 1 + max((depth for _, depth in weights), default=0)
    if size > MAX_VALUES:
        problem = f"more than {MAX_VALUES} values, with what aliases repeat"
        raise _limit(problem, "write fewer", node.start_mark)
    if depth > MAX_DEPTH:
        problem = f"nested deeper than {MAX_DEPTH} levels, with what aliases repeat"
        raise _limit(problem, "write fewer", node.start_mark)
    known[id(node)] = size, depth
    return size, depth


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _limit(problem: str, instead: str, mark: Any) -> _LimitError:  # noqa: ANN401 - PyYAML has two
    return _LimitError(problem=f"{problem} ({instead})", problem_mark=mark)


def _syntax_problem(error: Exception, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character U+{error.character:04X} may not be in YAML (remove it)"
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a number or an escape of YAML is out of range (write the character itself)"
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if isinstance(error, _LimitError):
        return f"{where}{error.problem}"
    advice = (
        "indent with spaces"
        if "'\\t'" in str(error.problem)
        else ("look at the indentation, colons and quotes here and on the line before")
    )
    return f"{where}the YAML cannot be read: {error.problem} ({advice})"


# From nodes to text, lists and mappings


class _Reader:
    """Turns nodes into plain values, puts in variables, and notes what is wrong."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.faults: list[Fault] = []
        self._environ = environ
        self._lines: dict[Place, int] = {(): 1}
        self._lost: set[Place] = set()
        # What may be secret at or below a place, and what is shown for it: messages may show a
        # list as a whole.
        self._secrets: dict[Place, list[tuple[str, str]]] = {}

    def read(self, node: yaml.Node, place: Place) -> object:
        """Give the value of *node*, which stands at *place*; note faults on the way."""
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return self._list(node, place)
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
            return None if node.tag == f"{_TAG}null" else self._text(node.value, place)
        self._lose(place, f"the tag {shown(node.tag)} means nothing here (remove it)")
        return None

    def lost(self, place: Place) -> bool:
        """Tell whether a fault at *place* only follows from one that is noted already."""
        return any(place[:length] in self._lost for length in range(len(place) + 1))

    def told(self, fault: Fault) -> tuple[int, str]:
        """Write *fault* down: its line, and the whole problem for the operator."""
        place = fault.place
        known = next(n for n in range(len(place), -1, -1) if place[:n] in self._lines)
        # A missing setting keeps its name; an index into what is no list, and pydantic's mark
        # for a wrong key, mean nothing to the reader.
        missing = known < len(place) and isinstance(place[known], str) and place[known] != "[key]"
        path = ".".join(str(step)[:LONGEST_SHOWN] for step in place[: known + missing])
        line = fault.line or self._lines[place[:known]]
        message = fault.message
        for each in (place[:known], *fault.others):
            message = _without(message, self._secrets.get(each, ()))
        return line, f"line {line}: {path}: {message}" if path else f"line {line}: {message}"

    def _list(self, node: yaml.SequenceNode, place: Place) -> list[object]:
        for index, each in enumerate(node.value):
            self._lines[*place, index] = _line(each)
        return [self.read(each, (*place, index)) for index, each in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, object]:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                message = "a key is a list or a mapping (write plain text)"
                self.faults.append(Fault(place, message, _line(key)))
            elif key.tag != f"{_TAG}merge" and first.setdefault(key.value, key) is not key:
                message = f"it is there twice, first on line {_line(first[key.value])} (keep one)"
                self.faults.append(Fault((*place, key.value), message, _line(key)))
        values: dict[str, object] = {}
        for text, key, value in _pairs(node):
            self._lines[*place, text] = _line(key)
            values[text] = self.read(value, (*place, text))
        return values

    def _text(self, text: str, place: Place) -> str | None:
        secrets: list[tuple[str, str]] = []
        missing: list[str] = []

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name is None:
                return "${"
            if name not in self._environ or not found[0].endswith("}"):
                missing.append(name)
                return ""
            secrets.append((f"${{{name}}}", self._environ[name]))
            return self._environ[name]

        filled = _VARIABLE.sub(value, text)
        secrets += _secrets_in(filled, place)
        for length in range(len(place) + 1) if secrets else ():
            self._secrets.setdefault(place[:length], []).extend(secrets)
        for name in missing:
            self._lose(place, _missing_variable(name))
        return None if missing else filled

    def _lose(self, place: Place, message: str) -> None:
        self._lost.add(place)
        self.faults.append(Fault(place, message))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _missing_variable(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return f"the environment variable {name} is not set (set it; for the text, write $${{)"
    return f"{shown(f'${{{name}')} begins no variable (write ${{NAME}}; for the text, write $${{)"


def _secrets_in(text: str, place: Place) -> Iterator[tuple[str, str]]:
    """Find what is secret in the *text* at *place* by its name, or as a password in a URL."""
    if "secret" in place:
        yield "***", text
        return
    before, at, _ = text.rpartition("@")
    _, begun, login = before.partition("://")
    user, colon, password = login.partition(":")
    if at and begun:
        yield "***", password if colon else user


def _without(message: str, secrets: Iterable[tuple[str, str]]) -> str:
    for instead, value in secrets:
        if len(value) < SHORTEST_SECRET:
            continue
        quoted = repr(value)[1:-1]
        message = message.replace(value, instead).replace(quoted, instead)
        for length in range(min(len(quoted), LONGEST_SHOWN), SHORTEST_SECRET - 1, -1):
            message = message.replace(f"{quoted[:length]}...", f"{instead}...")
    return message


def _pairs(node: yaml.MappingNode) -> list[Pair]:
    """List the keys and values of *node*: its own, then what ``<<`` adds to them."""
    own: dict[str, Pair] = {}
    merged: list[yaml.Node] = []
    for key, value in node.value:
        if key.tag == f"{_TAG}merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
        elif isinstance(key, yaml.ScalarNode):
            own.setdefault(key.value, (key.value, key, value))
    for each in merged:
        for pair in _pairs(each) if isinstance(each, yaml.MappingNode) else ():
            own.setdefault(pair[0], pair)
    return list(own.values())


# From paths to documents


def _put_in_files(data: object, directory: Path) -> Iterator[Fault]:
    """Put documents in place of the paths that routes of *data* name; tell of those not there."""
    listed = data.get("routes") if isinstance(data, dict) else None
    for index, route in enumerate(listed if isinstance(listed, list) else ()):
        text = route.get("fallback") if isinstance(route, dict) else None
        if isinstance(text, str) and not is_inline(text):
            try:
                route["fallback"] = _file(directory, text)
            except (OSError, ValueError) as error:
                route["fallback"] = None
                yield Fault(("routes", index, "fallback"), _unread(text, error))


def _file(directory: Path, text: str) -> bytes:
    """Read the file at *text*, and no further than a document may be long."""
    path = directory / text
    # Opening a pipe would wait for whoever writes into it.
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        return file.read(MAX_FALLBACK + 1)


def _unread(text: str, error: OSError | ValueError) -> str:
    instead = "write the path of a VAST file, relative to this file's directory, or VAST itself"
    if isinstance(error, FileNotFoundError):
        return f"there is no file {shown(text)} ({instead})"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{shown(text)} cannot be read: {reason} ({instead})"


# From faults to lines of text


def _validated(data: object) -> tuple[Config | None, list[Fault]]:
    between = list(faults_between_sections(data))
    try:
        return Config.model_validate(data), between
    except ValidationError as error:
        whole = json_schema()
        found = [_fault(each, whole) for each in error.errors()]
        told = {each.place for each in found}
        return None, [*found, *(each for each in between if each.place not in told)]


def _fault(error: ErrorDetails, whole: dict[str, Any]) -> Fault:
    if error["type"] == "extra_forbidden":
        *section, name = error["loc"]
        return Fault(error["loc"], _unknown_setting(str(name), settings_at(tuple(section), whole)))
    return Fault(error["loc"], _explained(error))


def _unknown_setting(name: str, names: tuple[str, ...]) -> str:
    return f"unknown setting {shown(name)} ({advice(name, names)})"


def _explained(error: ErrorDetails) -> str:
    """Put pydantic's *error* into the words of an operator."""
    value, context = error["input"], error.get("ctx", {})
    if error["type"] == "value_error":
        return str(context["error"])
    if value is None:
        return "nothing is written here (write a value, or remove this line)"
    words = _WORDS.get(error["type"])
    if words is None:
        return f"{shown(value)}: {error['msg']} (write another value)"
    return words.format_map({"value": shown(value), **context})
