"""The commands: what they print, where, and how they end."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from tests.support.ad_server import AdServer, in_thread
from tests.support.documents import a_wrapper, an_inline
from tests.support.proxy import ROOT, run_vastproxy
from vastproxy import __version__
from vastproxy.cli import main
from vastproxy.config.schema import json_schema, settings_at

USAGE = 2
"""The exit code for wrong arguments, as click has it."""


@pytest.fixture(scope="module")
def server() -> Iterator[AdServer]:
    """Run an ad server with a chain of two, and a dead one."""
    with in_thread(AdServer()) as running:
        running.replies |= {
            "/chain": a_wrapper(running.url("/end"), ad="w"),
            "/end": an_inline(ad="last"),
            "/dead": a_wrapper(running.url("/gone"), ad="w", errors=[running.url("/error")]),
        }
        yield running


def a_file(directory: Path, config: object) -> str:
    """Write *config* to a file, and give its name."""
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_help_names_every_command() -> None:
    """``python -m vastproxy --help`` names every command, and says what each does."""
    ended = run_vastproxy("--help")

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert ended.stdout.startswith(b"Usage: ")
    assert {"serve", "check", "migrate", "resolve", "schema", "demo"} == set(main.commands)
    assert all(f"\n  {name}  ".encode() in ended.stdout for name in main.commands)


@pytest.mark.parametrize("name", main.commands)
def test_every_command_explains_itself(name: str) -> None:
    """Each command, and each of its options, says what it is for."""
    command = main.commands[name]
    options = [each for each in command.params if isinstance(each, click.Option)]

    assert command.help
    assert [] == [each.name for each in options if not each.help]


def test_version() -> None:
    """``--version`` gives the version."""
    assert f"vastproxy, version {__version__}\n".encode() == run_vastproxy("--version").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("serve", "--port", "80"),
        ("check", "extra"),
        ("resolve",),
        ("resolve", "a", "b"),
        ("resolve", "x", "--egress-allow", "localhost"),
        ("resolve", "x", "--timeout", "5"),
        ("resolve", "x", "--max-hops", "-1"),
        ("resolve", "x", "--format", "xml"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...]) -> None:
    """Wrong arguments end with code 2 and a message, and no traceback."""
    ended = CliRunner().invoke(main, arguments)

    assert (USAGE, "") == (ended.exit_code, ended.stdout)
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_check_is_content() -> None:
    """A right configuration ends with code 0, and says how much there is."""
    ended = run_vastproxy("check", "-c", "config.yaml")

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert b"config.yaml: all is well (2 routes, 2 upstreams)\n" == ended.stdout


def test_workers_need_a_state_to_share(tmp_path: Path) -> None:
    """Several workers with memory:// are refused, with what to write instead."""
    ended = run_vastproxy("check", "-c", a_stateful_file(tmp_path, "memory://", workers=2))

    assert 1 == ended.returncode
    assert b"2 workers cannot share memory:// (write workers: 1, or a state" in ended.stderr


def a_stateful_file(directory: Path, state: str, workers: int = 1) -> str:
    """Write a small configuration with *state*, and give its path."""
    config = {
        "server": {"listen": "127.0.0.1:0", "admin": None, "workers": workers},
        "state": state,
        "upstreams": {"a": {"endpoint": "http://127.0.0.1:9/"}},
        "routes": [{"path": "/a", "upstreams": "a"}],
    }
    path = directory / "stateful.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_migrate_brings_tables_up_to_date(tmp_path: Path) -> None:
    """A new database gets its tables, and the second time there is nothing to do."""
    path = a_stateful_file(tmp_path, f"sqlite:///{tmp_path}/state.db")

    first, second = run_vastproxy("migrate", "-c", path), run_vastproxy("migrate", "-c", path)

    assert (0, b"") == (first.returncode, first.stderr)
    assert b"was brought from nothing to 0001\n" in first.stdout
    assert (0, b"") == (second.returncode, second.stderr)
    assert b"is up to date (0001)\n" in second.stdout


def test_migrate_of_what_has_no_tables(tmp_path: Path) -> None:
    """Memory and Redis have no tables; that is no mistake."""
    ended = run_vastproxy("migrate", "-c", a_stateful_file(tmp_path, "memory://"))

    assert (0, b"memory:// has no tables: nothing to do\n") == (ended.returncode, ended.stdout)


@pytest.mark.parametrize("command", ["serve", "migrate"])
@pytest.mark.parametrize("workers", [1, 2])
def test_state_that_cannot_be_used(command: str, workers: int, tmp_path: Path) -> None:
    """A database that is none ends the start with code 1 and one line that says so."""
    (tmp_path / "state.db").write_bytes(
        b"this is no database, but long enough to be looked at" * 99
    )
    path = a_stateful_file(tmp_path, f"sqlite:///{tmp_path}/state.db", workers)

    ended = run_vastproxy(command, "-c", path)

    assert 1 == ended.returncode
    assert b"Traceback" not in ended.stderr
    assert b"state.db" in ended.stderr


@pytest.mark.parametrize("command", ["check", "serve", "demo"])
def test_all_mistakes_at_once(command: str, tmp_path: Path) -> None:
    """A wrong configuration ends with code 1 and every mistake, each with its place."""
    path = a_file(
        tmp_path,
        {
            "server": {"lisen": "127.0.0.1:0"},
            "upstreams": {"one": {"endpoint": "http://a.example/", "timeout": "5"}},
            "routes": [{"path": "ad", "upstreams": ["two"]}],
        },
    )
    ended = run_vastproxy(command, "-c", path)
    told = ended.stderr.decode()

    assert (1, b"") == (ended.returncode, ended.stdout)
    assert told.startswith(f"{path}: ")
    assert "Traceback" not in told
    assert all(
        each in told
        for each in ("server.lisen", "listen", "upstreams.one.timeout", "routes.0.path", "two")
    )


@pytest.mark.parametrize("command", ["check", "serve"])
def test_no_configuration(command: str, tmp_path: Path) -> None:
    """A file that is not there is one clear message."""
    ended = run_vastproxy(command, "-c", str(tmp_path / "none.yaml"))

    assert (1, b"") == (ended.returncode, ended.stdout)
    assert b"none.yaml" in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_port_is_taken(tmp_path: Path) -> None:
    """A port that somebody else has ends the start with code 1, and names the port."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        config = {
            "server": {"listen": f"127.0.0.1:{port}", "admin": None},
            "upstreams": {"one": {"endpoint": "http://a.example/"}},
            "routes": [{"path": "/ad", "upstreams": ["one"]}],
        }
        ended = run_vastproxy("serve", "-c", a_file(tmp_path, config))

    assert 1 == ended.returncode
    assert b"vastproxy cannot listen: " in ended.stderr
    assert f"{port}".encode() in ended.stderr
    assert b"Traceback" not in ended.stderr


def test_schema_is_for_editors() -> None:
    """The schema is JSON, and names every setting that config.yaml uses."""
    ended = run_vastproxy("schema")
    whole = json.loads(ended.stdout)
    config = yaml.safe_load((ROOT / "config.yaml").read_text())

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert json_schema() == whole
    assert set(config) <= set(settings_at((), whole))
    assert set(config["routes"][0]) <= set(settings_at(("routes", 0), whole))
    assert set(config["upstreams"]["house"]) <= set(settings_at(("upstreams", "house"), whole))


ALLOW = ("--egress-allow", "127.0.0.0/8")


def test_resolve_prints_the_document(server: AdServer) -> None:
    """The resolved document, and nothing else, is on standard output."""
    ended = run_vastproxy("resolve", server.url("/chain"), *ALLOW)

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert ended.stdout.startswith(b"<?xml ")
    assert b'<Ad id="last"' in ended.stdout


@pytest.mark.parametrize("name", ["-", "chain.xml"])
def test_resolve_reads_documents(server: AdServer, tmp_path: Path, name: str) -> None:
    """A document may come from a file or from standard input."""
    document = a_wrapper(server.url("/end"))
    (tmp_path / "chain.xml").write_bytes(document)
    source = name if name == "-" else str(tmp_path / name)
    ended = run_vastproxy("resolve", source, *ALLOW, stdin=document)

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert b'<Ad id="last"' in ended.stdout


def test_resolve_without_an_ad(server: AdServer) -> None:
    """Where there is no ad, an empty document is printed, and the reason beside it."""
    ended = run_vastproxy("resolve", server.url("/dead"), *ALLOW)

    assert b"<Ad" not in ended.stdout
    assert b"no ad: " in ended.stderr
    assert b"404" in ended.stderr
    assert [] == server.seen("/error")


def test_resolve_tree(server: AdServer) -> None:
    """The tree names every hop, its requests and its ads."""
    ended = run_vastproxy("resolve", server.url("/chain"), *ALLOW, "--format", "tree")
    told = ended.stdout.decode()

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert all(
        each in told for each in (f"hop 1 {server.url('/chain')}", "hop 2 ", "InLine last", "200")
    )


def test_resolve_json(server: AdServer) -> None:
    """The JSON has the document, the hops and what was merged."""
    ended = run_vastproxy("resolve", server.url("/chain"), *ALLOW, "--format", "json")
    told = json.loads(ended.stdout)

    assert (0, b"") == (ended.returncode, ended.stderr)
    assert {"ads", "hops", "merged", "reports", "vast"} <= set(told)
    assert {"breakers", "last_resort", "shadowed", "waterfall"} <= set(told)
    assert (1, [1, 2]) == (told["ads"], [each["number"] for each in told["hops"]])
    assert '<Ad id="last"' in told["vast"]


@pytest.mark.parametrize("source", ["ftp://a.example/", "/"])
def test_resolve_of_nothing(source: str) -> None:
    """What is neither a URL nor a file that can be read is one message, and code 1."""
    ended = run_vastproxy("resolve", source)

    assert (1, b"") == (ended.returncode, ended.stdout)
    assert b"is neither a URL" in ended.stderr
    assert b"Traceback" not in ended.stderr
