"""
Text with placeholders for what only the player's request knows.

Rule 1: a placeholder is ``{query.NAME}``, ``{header.NAME}``, ``{viewer}``, ``{client_ip}`` or
``{rest}``; ``{{`` and ``}}`` are literal braces.
Rule 2: macros of ad servers (``[MACRO]``, ``%%MACRO%%``, ``${MACRO}``) are literal text here.
Rule 3: any other brace is an error. A misspelt placeholder must not reach an ad server as text.
Rule 4: values are put in once. A value that looks like a placeholder stays what it is.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, Self

from vastproxy.config.units import TOKEN_PATTERN, shown

PlaceholderKind = Literal["query", "header", "viewer", "client_ip", "rest"]

_NAMED: dict[str, PlaceholderKind] = {"query": "query", "header": "header"}
_ALONE: dict[str, PlaceholderKind] = {"viewer": "viewer", "client_ip": "client_ip", "rest": "rest"}
# In this order: ${...} before braces, doubled braces before single ones.
_TOKENS = re.compile(r"\$\{[^{}]*\}?|\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """One thing to look up in the player's request."""

    kind: PlaceholderKind
    name: str = ""
    """Of the query parameter or (in lower case) of the header; empty for the other kinds."""

    def __str__(self) -> str:
        return f"{{{self.kind}.{self.name}}}" if self.name else f"{{{self.kind}}}"


@dataclass(frozen=True, slots=True)
class Template:
    """
    A parsed text; made by :meth:`parse`.

    Where the text is a URL, render it with a percent-encoder. Where it is not (the value of a
    parameter, of a header, of a macro), render it with ``str`` as *encode*, and encode the
    result as a whole: a value that begins the text is never encoded here.
    """

    text: str
    """As the operator wrote it."""
    parts: tuple[str | Placeholder, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read *text*; raise ValueError, with a message for the operator, if braces are wrong."""
        parts: list[str | Placeholder] = []
        for part in _parts(text):
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part:
                parts.append(part)
        return cls(text, tuple(parts))

    @property
    def query_names(self) -> frozenset[str]:
        """Name the query parameters that the text takes over."""
        return frozenset(each.name for each in self._placeholders() if each.kind == "query")

    @property
    def uses_rest(self) -> bool:
        """Tell whether the text needs what ``/{rest}`` of a route stands for."""
        return any(each.kind == "rest" for each in self._placeholders())

    @property
    def starts_with_placeholder(self) -> bool:
        """Tell whether a URL made of this text has its scheme and host from the request."""
        return bool(self.parts) and isinstance(self.parts[0], Placeholder)

    @property
    def is_static(self) -> bool:
        """Tell whether the text is the same for every request."""
        return not any(self._placeholders())

    def render(self, lookup: Callable[[Placeholder], str], encode: Callable[[str], str]) -> str:
        """
        Give the text with each value that *lookup* finds, as *encode* writes it.

        Two values are put in as they are: one that begins the text, for it is the URL itself;
        and ``{rest}``, for it is a piece of the player's URL, encoded already.
        """
        return "".join(
            part if isinstance(part, str) else _value(index, part, lookup, encode)
            for index, part in enumerate(self.parts)
        )

    def __str__(self) -> str:
        return self.text

    def _placeholders(self) -> Iterator[Placeholder]:
        return (part for part in self.parts if isinstance(part, Placeholder))


def _value(
    index: int,
    placeholder: Placeholder,
    lookup: Callable[[Placeholder], str],
    encode: Callable[[str], str],
) -> str:
    value = lookup(placeholder)
    return value if index == 0 or placeholder.kind == "rest" else encode(value)


def _parts(text: str) -> Iterator[str | Placeholder]:
    position = 0
    for found in _TOKENS.finditer(text):
        yield text[position : found.start()]
        yield _part(found[0])
        position = found.end()
    yield text[position:]


def _part(token: str) -> str | Placeholder:
    if token.startswith("$"):
        return token
    if token in {"{{", "}}"}:
        return token[0]
    if token in {"{", "}"}:
        raise ValueError(
            f"a single '{token}' belongs to no placeholder (for the character itself, "
            f"write '{token * 2}')"
        )
    return _placeholder(token[1:-1])


def _placeholder(inner: str) -> Placeholder:
    if kind := _ALONE.get(inner):
        return Placeholder(kind)
    prefix, _, name = inner.partition(".")
    if prefix == "header" and re.fullmatch(TOKEN_PATTERN, name):
        return Placeholder("header", name.lower())
    if prefix == "query" and re.fullmatch(r"[^\s{}]+", name):
        return Placeholder("query", name)
    raise ValueError(
        f"{shown(f'{{{inner}}}')} is no placeholder "
        f"({_advice(prefix, name)} For braces that mean themselves, write '{{{{' and '}}}}'.)"
    )


def _advice(prefix: str, name: str) -> str:
    near = get_close_matches(prefix, [*_NAMED, *_ALONE], n=1)
    if near and near[0] in _ALONE:
        return f"Did you mean {{{near[0]}}}?"
    if near and name and name.isascii() and name.isprintable():
        return f"Did you mean {{{near[0]}.{name}}}?"
    if re.fullmatch(r"[A-Za-z0-9_-]{1,40}", prefix) and not name and not near:
        return f"Did you mean {{query.{prefix}}}?"
    return "Write {query.NAME}, {header.NAME}, {viewer}, {client_ip} or {rest}."
