"""What there is stands in the documentation, and what the documentation says is so."""

import re
from pathlib import Path

import pytest

from vastproxy import errors
from vastproxy.cli import main
from vastproxy.config.schema import json_schema
from vastproxy.flow import answer, reporter
from vastproxy.web import server

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
EVERYTHING = "\n".join(TEXTS.values())

MAX_README = 150
"""Lines of a README that is read to its end."""

COMMANDS = tuple(main.commands)
OPTIONS = {
    option.opts[-1]: option.opts
    for command in main.commands.values()
    for option in command.params
    if option.param_type_name == "option"
}
ERRORS = sorted(
    name
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, errors.VastproxyError)
)
_WRITTEN_FLAGS = re.compile(r'words\["(\w+)"\]|_FLAGS\.get\([^)]*\), "(\w+)"|flags=\(([^)]*)\)')


def flags() -> list[str]:
    """Collect the words of the access log: the table's, and those written beside it."""
    found = {*answer._FLAGS.values(), *answer._REFUSAL_FLAGS.values()}
    for module in (answer, server):
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        for match in _WRITTEN_FLAGS.finditer(text):
            found |= set(re.findall(r"\w+", " ".join(filter(None, match.groups()))))
    return sorted(found)


def events() -> list[str]:
    """Collect the events that are logged, by their constant names."""
    found = set()
    for path in (ROOT / "vastproxy").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        calls = r'log\.(?:debug|info|warning|error|exception)\(\s*"([\w.]+)"'
        found |= set(re.findall(calls, text))
    return sorted(found)


def settings() -> list[str]:
    """Name every setting, in whichever section."""
    whole = json_schema()
    sections = (whole, *whole["$defs"].values())
    return sorted({name for each in sections for name in each.get("properties", {})})


def anchors(text: str) -> set[str]:
    """Give the anchors that the headings of a page make, as GitHub writes them."""
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", each.lower()) for each in headings)
    return {each.replace(" ", "-") for each in words}


def links() -> list[tuple[Path, str]]:
    """Collect the links of all pages that lead to no other site."""
    return [
        (page, link)
        for page, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"[a-z]+:", link)
    ]


def programs() -> dict[str, list[tuple[int, str]]]:
    """Collect the blocks marked python, with their lines; those of a page are one program."""
    found: dict[str, list[tuple[int, str]]] = {}
    for page, text in TEXTS.items():
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.setdefault(page.name, []).append((line, match[1]))
    return found


def test_words_are_found() -> None:
    """The collections that these tests go by hold what is known to be there."""
    assert {"bad_xml", "no_ad", "fallback", "repaired", "failed", "overload", "internal_error"} <= (
        set(flags())
    )
    assert {"request", "request.failed", "report.failed", "listening"} <= set(events())
    assert {"listen", "deadline", "endpoint", "timestamp"} <= set(settings())
    assert "ConfigError" in ERRORS
    assert reporter.__name__


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_documented(command: str) -> None:
    """Every command is named in the documentation."""
    assert f"vastproxy {command}" in EVERYTHING


@pytest.mark.parametrize("option", OPTIONS)
def test_option_is_documented(option: str) -> None:
    """Every option of a command is named in the documentation, in one of its spellings."""
    assert any(re.search(rf"(?<![\w-]){each}\b", EVERYTHING) for each in OPTIONS[option])


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_documented(name: str) -> None:
    """Every class of errors is named in the documentation."""
    assert re.search(rf"\b{name}\b", EVERYTHING)


@pytest.mark.parametrize("word", flags())
def test_flag_is_documented(word: str) -> None:
    """Every word that the access log uses is explained in the documentation."""
    assert f"`{word}`" in EVERYTHING


@pytest.mark.parametrize("event", events())
def test_event_is_documented(event: str) -> None:
    """Every event of the log is named in the documentation."""
    assert f"`{event}`" in EVERYTHING


@pytest.mark.parametrize("name", settings())
def test_setting_is_documented(name: str) -> None:
    """Every setting is named in the documentation."""
    assert re.search(rf"\b{name}\b", EVERYTHING)


def test_readme_is_short() -> None:
    """The README is there, and has fewer lines than anybody minds."""
    assert 10 < len(TEXTS[README].splitlines()) < MAX_README


@pytest.mark.parametrize(
    ("page", "link"), links(), ids=[f"{page.name}-{link}" for page, link in links()]
)
def test_link_leads_somewhere(page: Path, link: str) -> None:
    """Links between pages lead to files, and to headings, that exist."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page

    assert target.exists()
    assert not anchor or anchor in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "blocks"), programs().items(), ids=programs().keys())
def test_code_runs(page: str, blocks: list[tuple[int, str]]) -> None:
    """The blocks of Python of a page run as they are written, one after the other."""
    space = {"__name__": "__main__"}
    for line, code in blocks:
        # As many empty lines before it as the page has: a traceback then names the page's line.
        program = compile("\n" * line + code, page, "exec")
        exec(program, space)  # noqa: S102 - it is our own documentation

    assert "__builtins__" in space
