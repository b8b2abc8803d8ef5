"""The commands. What they print for people goes through rich; what is for programs does not."""

import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from vastproxy import __version__
from vastproxy.config.load import load
from vastproxy.config.schema import Config, json_schema
from vastproxy.config.units import parse_duration, parse_network
from vastproxy.errors import ConfigError, StateBackendError

DEFAULT_CONFIG = "config.yaml"

_config_option = click.option(
    "-c",
    "--config",
    "path",
    default=DEFAULT_CONFIG,
    show_default=True,
    type=click.Path(path_type=Path),
    help="The configuration file.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vastproxy")
def main() -> None:
    """Put a proxy in front of video ad servers, and get one VAST InLine out of every chain."""


def _loaded(path: Path) -> Config:
    """Read the configuration, or say everything that is wrong with it and exit with 1."""
    try:
        return load(path, os.environ)
    except ConfigError as error:
        click.echo(str(error), err=True)
        raise SystemExit(1) from None


def _run(work: Coroutine[Any, Any, Any]) -> None:
    """Run *work* on uvloop where there is one."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        factory = asyncio.new_event_loop
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work)


@main.command()
@_config_option
def serve(path: Path) -> None:
    """Run the proxy until SIGTERM or SIGINT; SIGHUP reads the configuration again."""
    from vastproxy.observe import log  # noqa: PLC0415
    from vastproxy.serving import serve as serve_config  # noqa: PLC0415 - other commands start faster

    config = _loaded(path)
    log.configure(config.log.level, config.log.format)

    def reread() -> Config:
        return load(path, os.environ)

    try:
        if config.server.workers > 1:
            from vastproxy.supervisor import supervise  # noqa: PLC0415

            # uvloop would let workers start with no signal blocked.
            asyncio.run(supervise(config, reread))
        else:
            _run(serve_config(config, reread))
    except StateBackendError as error:
        click.echo(f"vastproxy cannot use its state: {error}", err=True)
        raise SystemExit(1) from None
    except OSError as error:
        click.echo(f"vastproxy cannot listen: {error}", err=True)
        raise SystemExit(1) from None


@main.command()
@_config_option
def migrate(path: Path) -> None:
    """Bring the tables of the state's database up to date; other states have none."""
    config = _loaded(path)
    if config.state.kind not in {"sqlite", "postgresql"}:
        click.echo(f"{config.state} has no tables: nothing to do")
        return
    from vastproxy.state.migrate import migrate as bring_up  # noqa: PLC0415 - an extra

    try:
        before, after = asyncio.run(bring_up(config.state.url))
    except StateBackendError as error:
        click.echo(str(error), err=True)
        raise SystemExit(1) from None
    if before == after:
        click.echo(f"{config.state} is up to date ({after})")
    else:
        click.echo(f"{config.state} was brought from {before or 'nothing'} to {after}")


@main.command()
@_config_option
def check(path: Path) -> None:
    """Check the configuration: every mistake at once, with its place and what to write instead."""
    config = _loaded(path)
    click.echo(
        f"{path}: all is well ({len(config.routes)} routes, {len(config.upstreams)} upstreams)"
    )


@main.command()
def schema() -> None:
    """Print the JSON Schema of config.yaml, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


def _network(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[Any, ...]:
    try:
        return tuple(parse_network(each) for each in values)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _duration(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _headers(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    pairs = [each.partition(":") for each in values]
    for name, colon, _rest in pairs:
        if not (colon and name.strip()):
            raise click.BadParameter(f"{name!r} is no header (write 'Name: value')")
    return tuple((name.strip(), value.strip()) for name, _colon, value in pairs)


@main.command()
@click.argument("source", metavar="URL|FILE|-|PATH")
@click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="Ask a route of this configuration: then give its path and a query, as a player would. "
    "Nothing is counted: caps and budgets are not asked, and the state is left alone.",
)
@click.option(
    "-H",
    "--header",
    "headers",
    multiple=True,
    metavar="'NAME: VALUE'",
    callback=_headers,
    help="With -c: a header of the player. May be repeated.",
)
@click.option(
    "--times",
    default=1,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="With -c: how often to ask, one after the other, so that breakers and caches are seen.",
)
@click.option(
    "--egress-allow",
    "allow",
    multiple=True,
    metavar="CIDR",
    callback=_network,
    help="A network that hops may reach although it is private. May be repeated.",
)
@click.option(
    "--max-hops",
    default=5,
    show_default=True,
    type=click.IntRange(0, 20),
    help="How many wrappers may follow one another.",
)
@click.option(
    "--timeout",
    default="10s",
    show_default=True,
    callback=_duration,
    help="For the whole chain: 800ms, 2s.",
)
@click.option(
    "--format",
    "style",
    default="vast",
    show_default=True,
    type=click.Choice(["vast", "tree", "json"]),
    help="The resolved document, the tree of hops for people, or both for programs.",
)
@click.pass_context
def resolve(context: click.Context, /, source: str, path: Path | None, **options: Any) -> None:  # noqa: ANN401 - click's
    """
    Resolve one tag without a server, and say what happened.

    Nothing is told to <Error> URIs: who debugs a tag must not raise its publisher's error counts.
    """
    from vastproxy.explain import Question, print_answers, resolved  # noqa: PLC0415
    from vastproxy.observe import log  # noqa: PLC0415

    of_route = ("headers", "times")
    _refuse_others(context, ("allow", "max_hops", "timeout") if path else of_route, path)
    log.configure("error", "console")
    if path is not None:
        _resolve_route(_loaded(path), source, options)
        return
    question = Question(
        source, _document(source), options["allow"], options["max_hops"], options["timeout"]
    )

    async def answer() -> None:
        print_answers([await resolved(question)], options["style"])

    _run(answer())


def _refuse_others(context: click.Context, names: tuple[str, ...], path: Path | None) -> None:
    """Refuse options that mean nothing, as there is a configuration at *path*, or none."""
    for each in context.command.params:
        given = context.get_parameter_source(each.name or "")
        if each.name in names and given is click.core.ParameterSource.COMMANDLINE:
            why = f"is for {path} to say" if path else "is for routes (write -c config.yaml, too)"
            raise click.UsageError(f"{each.opts[-1]} {why}")


def _resolve_route(config: Config, target: str, options: dict[str, Any]) -> None:
    """Ask a route of *config* for *target*."""
    from vastproxy.explain import RouteQuestion, answered, print_answers  # noqa: PLC0415

    question = RouteQuestion(config, target, options["headers"], options["times"])

    async def answer() -> None:
        try:
            found = await answered(question)
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        print_answers(found, options["style"])

    _run(answer())


def _document(source: str) -> bytes | None:
    """Read the document that *source* names; None for a URL."""
    if source == "-":
        return sys.stdin.buffer.read()
    if source.lower().startswith(("http://", "https://")):
        return None
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise click.ClickException(
            f"{source!r} is neither a URL (http://, https://) nor a file that can be read: {error}"
        ) from None


@main.command()
@_config_option
def demo(path: Path) -> None:
    """Start three small ad servers, the proxy, and a page that shows a chain being resolved."""
    from vastproxy.demo.run import config_path, run  # noqa: PLC0415
    from vastproxy.observe import log  # noqa: PLC0415

    config = _loaded(config_path(path))
    log.configure("warning", config.log.format)
    try:
        _run(run(config, click.echo))
    except OSError as error:
        click.echo(f"the demo cannot listen: {error}", err=True)
        raise SystemExit(1) from None
