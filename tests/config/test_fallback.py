"""The document that is answered where nobody has an ad: where it comes from, what it must be."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vastproxy.config.fallback import MAX_FALLBACK, checked, inline, is_inline
from vastproxy.config.load import load
from vastproxy.config.schema import Config, Route
from vastproxy.errors import ConfigError
from vastproxy.vast.parse import parse

HOUSE = (
    '<VAST version="4.2"><Ad id="house"><InLine><AdSystem>Häuser</AdSystem></InLine></Ad></VAST>'
)


def a_config(directory: Path, fallback: str) -> Path:
    """Write a config into *directory* that has *fallback* on its line 6, and give its path."""
    path = directory / "config.yaml"
    path.write_text(
        "upstreams:\n"
        "  main: {endpoint: https://ads.example.com/vast}\n"
        "routes:\n"
        "  - path: /vast\n"
        "    upstreams: main\n"
        f"    fallback: {fallback}\n",
        encoding="utf-8",
    )
    return path


def problem(path: Path) -> str:
    """Give the one thing that is wrong with the fallback of the config at *path*."""
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    (line,) = caught.value.problems
    return line.removeprefix("line 6: routes.0.fallback: ")


def a_route(fallback: object) -> Route:
    """Make a route with *fallback*."""
    return Route.model_validate({"path": "/vast", "upstreams": ["main"], "fallback": fallback})


def test_file_is_read_from_the_directory_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path begins where config.yaml is, wherever the program was started."""
    (tmp_path / "ads").mkdir()
    (tmp_path / "ads" / "house.xml").write_text(HOUSE, encoding="utf-8")
    monkeypatch.chdir("/")

    assert HOUSE.encode() == load(a_config(tmp_path, "ads/house.xml"), {}).routes[0].fallback


def test_absolute_path_is_one(tmp_path: Path) -> None:
    """An absolute path leads where it says, also one that a variable holds."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "house.xml").write_text(HOUSE, encoding="utf-8")
    path = a_config(tmp_path / "etc", "${HOUSE}")

    assert HOUSE.encode() == load(path, {"HOUSE": str(tmp_path / "house.xml")}).routes[0].fallback


def test_file_is_read_again(tmp_path: Path) -> None:
    """Whoever reads the config again gets what is in the file by then."""
    (tmp_path / "house.xml").write_text(HOUSE, encoding="utf-8")
    path = a_config(tmp_path, "house.xml")
    first = load(path, {})
    (tmp_path / "house.xml").write_text(HOUSE.replace("house", "other"), encoding="utf-8")

    assert HOUSE.encode() == first.routes[0].fallback
    assert HOUSE.replace("house", "other").encode() == load(path, {}).routes[0].fallback


def test_document_stands_in_the_config(tmp_path: Path) -> None:
    """Text that begins with < is the document, also over several lines and with a declaration."""
    declared = '<?xml version="1.0" encoding="ISO-8859-1"?>'
    path = a_config(tmp_path, f"|\n\n      {declared}\n      {HOUSE}\n")
    found = load(path, {}).routes[0].fallback

    assert found is not None
    assert () == parse(found).repairs
    assert "Häuser" == next(parse(found).root.iter("AdSystem")).text


def test_no_fallback_is_the_default(tmp_path: Path) -> None:
    """Where no document is named, or null is, there is none."""
    assert load(a_config(tmp_path, "null"), {}).routes[0].fallback is None
    assert Route.model_validate({"path": "/vast", "upstreams": ["main"]}).fallback is None


def test_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    """A path that leads nowhere is told, with what may stand there."""
    assert (
        "there is no file 'huose.xml' (write the path of a VAST file, relative to this file's "
        "directory, or VAST itself)"
    ) == problem(a_config(tmp_path, "huose.xml"))


@pytest.mark.parametrize("written", [".", "''", "pipe", "/dev/zero"])
def test_what_is_no_file_is_told_at_once(tmp_path: Path, written: str) -> None:
    """Directories, pipes and devices are not waited for."""
    os.mkfifo(tmp_path / "pipe")

    assert "cannot be read: it is no file" in problem(a_config(tmp_path, written))


@pytest.mark.parametrize("written", ['"a\\0b"', "x" * 5000, '"\\uD800"', "config.yaml/x"])
def test_strange_path_is_one_mistake(tmp_path: Path, written: str) -> None:
    """A path that no system takes is a mistake like any other."""
    assert "(write the path of a VAST file" in problem(a_config(tmp_path, written))


@pytest.mark.parametrize(
    ("reason", "content"),
    [
        ("the document is not well-formed: this is no XML (mend it there)", "secret: 12345678"),
        ("the document is not well-formed: the document is empty (mend it there)", ""),
        ("the document is no VAST: the root element is <html>, not <VAST>", "<html/>"),
        ("the document has no InLine ad (write one, or null", '<VAST version="4.2"/>'),
        ("the document has a Wrapper, and a fallback", HOUSE.replace("InLine", "Wrapper")),
        ("the document is not well-formed: a document type is not", f"<!DOCTYPE a>{HOUSE}"),
        ("the document is larger than 256KiB", HOUSE + " " * MAX_FALLBACK),
    ],
)
def test_wrong_file_is_explained(tmp_path: Path, reason: str, content: str) -> None:
    """A file is judged when the config is read, and no message says how a wrong one begins."""
    (tmp_path / "house.xml").write_text(content, encoding="utf-8")

    assert reason == problem(a_config(tmp_path, "house.xml"))[: len(reason)]


def test_mistake_of_a_file_hides_no_other(tmp_path: Path) -> None:
    """A file that is not there is told together with everything else."""
    path = a_config(tmp_path, "huose.xml\n    deadline: 5")

    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert ["line 6", "line 7"] == [each.partition(":")[0] for each in caught.value.problems]


def test_document_of_the_largest_size_is_taken() -> None:
    """The bound is what may be, not what may not."""
    document = HOUSE.encode()
    document += b" " * (MAX_FALLBACK - len(document))

    assert document == checked(document)


def test_route_with_a_document_goes_through_its_own_dump() -> None:
    """A dump for the program has the bytes, one for people the text."""
    config = Config.model_validate(
        {
            "upstreams": {"main": {"endpoint": "https://ads.example.com/vast"}},
            "routes": [{"path": "/vast", "upstreams": ["main"], "fallback": HOUSE}],
        }
    )

    assert config == Config.model_validate(config.model_dump())
    assert "Häuser" in config.model_dump_json()


def test_path_is_not_followed_by_the_schema() -> None:
    """Only a config that is read from a file leads to others."""
    with pytest.raises(ValidationError, match=r"'house\.xml' is no VAST"):
        a_route("house.xml")
    with pytest.raises(ValidationError, match="7 is no VAST"):
        a_route(7)


@given(st.text().map(lambda text: f"<{text}") | st.binary())
def test_any_document_is_taken_or_refused(document: str | bytes) -> None:
    """Any text and any bytes give a document with an ad, or a message."""
    try:
        message, found = "", a_route(document).fallback
    except ValidationError as error:
        message, found = str(error), None

    if found is None:
        assert "(write " in message or "(mend " in message
    else:
        assert any(each.is_inline for each in parse(found).ads)


@pytest.mark.parametrize("text", ["<VAST/>", "\n  <VAST/>", "\ufeff<?xml version='1.0'?><VAST/>"])
def test_document_begins_with_an_angle_bracket(text: str) -> None:
    """Blanks, a byte order mark and a declaration do not make a path of a document."""
    assert is_inline(text)
    assert b"<VAST/>" == inline(text)
