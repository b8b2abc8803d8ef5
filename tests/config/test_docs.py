"""What docs/config.md says about the settings is what the program does."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vastproxy.config.load import loads
from vastproxy.config.schema import json_schema

PAGE = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
ENVIRON = {
    "ADS_TOKEN": "abcdef",
    "TOKEN": "abcdef",
    "REDIS_PASSWORD": "abcdef",
    "VASTPROXY_SECRET": "abcdefgh",
}


def _settings(section: dict[str, Any], path: str, whole: dict[str, Any]) -> dict[str, Any]:
    """Collect the settings at and below *section*, by their paths as the page writes them."""
    # A section that may be null is one of several that it may be.
    section = next((each for each in section.get("anyOf", ()) if "$ref" in each), section)
    if "$ref" in section:
        section = whole["$defs"][section["$ref"].rpartition("/")[2]]
    found: dict[str, Any] = {}
    for name, setting in section.get("properties", {}).items():
        here = f"{path}{name}"
        inner = _settings(setting, f"{here}.", whole)
        inner |= _settings(setting.get("items", {}), f"{here}.N.", whole)
        free = setting.get("additionalProperties")
        inner |= _settings(free, f"{here}.NAME.", whole) if isinstance(free, dict) else {}
        found |= {here: setting} | inner
    return found


SETTINGS = _settings(json_schema(), "", json_schema())
# These sections have a heading of their own, not an entry.
del SETTINGS["server"], SETTINGS["log"], SETTINGS["egress"]
HOUSE = '<VAST version="4.2"><Ad id="house"><InLine><AdSystem>house</AdSystem></InLine></Ad></VAST>'
ENTRIES = dict(re.findall(r"^### `([^`]+)`\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))


def _with_example(path: str) -> str:
    """Write a small config that has the example of the entry *path* at its place."""
    found = re.search(r"^- Example: `(.*)`$", ENTRIES[path], re.MULTILINE)
    assert found is not None
    sections = ("macros", "circuit_breaker", "retry", "cache")
    main: dict[str, Any] = {"endpoint": "https://a.tv/", "timeout": "2s"}
    main |= {name: {} for name in sections}
    main |= {"rate_limit": {"rate": "1/s"}, "cache": {"scope": "shared"}}
    house = {"endpoint": "https://b.tv/"}
    cap: dict[str, Any] = {"limit": "3", "window": "1h"}
    if path.endswith("time_zone"):
        cap |= {"kind": "calendar", "window": "day"}
    budget: dict[str, Any] = {"campaign": "spring", "limit": "10"}
    route: dict[str, Any] = {"path": "/{rest}", "upstreams": ["main"], "viewer": ["query:uid"]}
    route |= {"frequency_caps": [cap], "budget": budget}
    egress: dict[str, Any] = {"circuit_breaker": {}}
    config: dict[str, Any] = {"upstreams": {"main": main, "house": house}, "routes": [route]}
    config |= {"egress": egress, "state": "redis://127.0.0.1:6379"}
    places = {
        "": config,
        "upstreams.NAME": main,
        "egress.circuit_breaker": egress["circuit_breaker"],
        **{f"upstreams.NAME.{name}": main[name] for name in (*sections, "rate_limit")},
        "routes.N": route,
        "routes.N.frequency_caps.N": cap,
        "routes.N.budget": budget,
    }
    section = path.rpartition(".")[0]
    place = places[section] if section in places else config.setdefault(section, {})
    place |= yaml.load(found[1], yaml.BaseLoader)  # noqa: S506 - it makes text of everything
    return yaml.safe_dump(config)


def test_every_setting_has_an_entry() -> None:
    """The page has an entry for every setting, and none for a setting that is not there."""
    assert sorted(SETTINGS) == sorted(ENTRIES)


@pytest.mark.parametrize("path", sorted(SETTINGS))
def test_entry_has_the_type_and_the_default(path: str) -> None:
    """Each entry has the setting's type, and its default or that it is required."""
    found = re.search(r"^- Default: `(.*)`$", ENTRIES[path], re.MULTILINE)

    assert "\n- Type: " in ENTRIES[path]
    if "default" in SETTINGS[path]:
        assert found is not None
        assert SETTINGS[path]["default"] == yaml.safe_load(found[1])
    else:
        assert "\n- Required\n" in ENTRIES[path]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Make the directory of a config, with the file that the page's examples name."""
    (tmp_path / "house.xml").write_text(HOUSE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("path", sorted(SETTINGS))
def test_entry_has_an_example(path: str, directory: Path) -> None:
    """The example of each entry is a line that can stand at its place."""
    assert loads(_with_example(path), source="config.md", environ=ENVIRON, directory=directory)


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_complete_example_is_a_config(text: str, directory: Path) -> None:
    """Each complete example of the page can be used as it is."""
    assert loads(text, source="config.md", environ=ENVIRON, directory=directory).routes


def test_every_choice_is_named() -> None:
    """Each word that a setting may be is on the page."""
    for path, setting in SETTINGS.items():
        choices = (setting, *setting.get("anyOf", ()))
        for word in (word for each in choices for word in each.get("enum", ())):
            assert f"`{word}`" in ENTRIES[path]


def test_page_has_one_sentence_per_line() -> None:
    """A line of prose ends with its sentence."""
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    lines = [each for each in prose.split("\n") if each and each[0] not in "#|-"]

    assert [] == [each for each in lines if re.search(r"[a-z)]\. [A-Z]", each)]
    assert [] == [each for each in lines if each[-1] not in ".:"]
