"""``python -m tests.chaos``: the hostile ad server and the chaos proxy, started by hand."""

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TextIO

import click

from tests.chaos.proxy import ChaosProxy
from tests.chaos.toxics import SETTINGS, Toxic, parse_toxic
from tests.support.hostile import ALL_FAULTS, HostileServer, Trap

HELP = {"help_option_names": ["-h", "--help"]}

COMMANDS = """\
While it runs, write a line to change it:
  latency=1s,share=50%   in place of all toxics; more than one with blanks in between
  none                   no toxics
  down | up              refuse connections, and take them again
  reset                  reset all connections
  drop 3                 lose the next three replies
  ?                      how it is"""


@click.group(context_settings=HELP)
def main() -> None:
    """
    Make trouble on loopback, to see how a proxy or a player takes it.

    \b
    python -m tests.chaos server --port 9000
    python -m tests.chaos proxy --listen 9001 --to 127.0.0.1:9000 \\
        --toxic latency=200ms,jitter=50ms --toxic reset_after=1000,share=10% --seed 7
    """  # noqa: D301 - click's own mark for lines that stay as they are


@main.command()
@click.option("--port", default=0, show_default="any", help="Of the plain listener.")
def server(port: int) -> None:
    """Run an ad server with every fault there is, and list their addresses."""
    _run(_serve(port))


async def _serve(port: int) -> None:
    with Trap("127.0.0.2") as trap:
        forbidden = f"http://127.0.0.2:{trap.port}/"
        async with HostileServer(port=port, forbidden=forbidden) as hostile:
            for fault in ALL_FAULTS:
                click.echo(f"{hostile.url(fault, 'ad'):64} {fault.description}")
            sys.stdout.flush()
            await asyncio.Event().wait()


def _target(_context: click.Context, _option: click.Parameter, value: str) -> tuple[str, int]:
    host, _, port = value.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise click.BadParameter("write a host and a port, such as 127.0.0.1:9000")
    return host.strip("[]"), int(port)


def _toxics(
    _context: click.Context, _option: click.Parameter, values: Sequence[str]
) -> list[Toxic]:
    try:
        return [parse_toxic(each) for each in values]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@main.command()
@click.option("--listen", "port", default=0, show_default="any", help="The port to listen on.")
@click.option("--to", "target", required=True, callback=_target, help="The server, HOST:PORT.")
@click.option(
    "--toxic",
    "toxics",
    multiple=True,
    callback=_toxics,
    metavar="NAME=VALUE,...",
    help="What harms connections; may be given more than once. `toxics` lists them.",
)
@click.option("--seed", default=0, show_default=True, help="Decides all that is random.")
def proxy(port: int, target: tuple[str, int], toxics: list[Toxic], seed: int) -> None:
    """Run a TCP proxy in front of any server, and harm what passes."""
    _run(_pass_on(ChaosProxy(target, toxics, port=port, seed=seed)))


async def _pass_on(chaos: ChaosProxy) -> None:
    commands: asyncio.Queue[str] = asyncio.Queue()
    async with chaos:
        click.echo(f"{chaos!r}\n{COMMANDS}")
        sys.stdout.flush()
        _listen_to(sys.__stdin__, commands.put_nowait)
        while True:
            click.echo(await obeyed(chaos, await commands.get()))
            sys.stdout.flush()


def _listen_to(source: TextIO | None, heard: Callable[[str], None]) -> None:
    """Hand on each line of *source*; what is a file, or closed, says nothing."""
    if source is None:
        return
    loop, descriptor = asyncio.get_running_loop(), source.fileno()
    begun = b""

    def readable() -> None:
        nonlocal begun
        data = os.read(descriptor, 4096)
        *lines, begun = (begun + data).split(b"\n")
        for line in lines:
            heard(line.decode("utf-8", "replace").strip())
        if not data:
            loop.remove_reader(descriptor)

    with contextlib.suppress(PermissionError):
        loop.add_reader(descriptor, readable)


async def obeyed(chaos: ChaosProxy, line: str) -> str:
    """Do what a *line* says, and say what came of it."""
    match line.split():
        case [] | ["?"]:
            pass
        case ["none"]:
            chaos.toxics = ()
        case ["down"]:
            await chaos.down()
        case ["up"]:
            await chaos.up()
        case ["reset"]:
            await chaos.reset()
        case ["drop", number] if number.isdigit():
            chaos.replies_to_drop += int(number)
        case words:
            try:
                chaos.toxics = tuple(map(parse_toxic, words))
            except ValueError as error:
                return str(error)
    return f"{chaos!r} {dataclasses.asdict(chaos.facts)['ends']}"


@main.command()
def toxics() -> None:
    """List what a toxic may be made of."""
    for name, setting in SETTINGS.items():
        kind = setting.metadata["kind"]
        click.echo(f"  {name:18} {EXAMPLES[kind]:10} {setting.metadata['about']}")
    click.echo("Several may stand together: --toxic latency=200ms,jitter=50ms,toward=client")


EXAMPLES = {
    "duration": "200ms",
    "size": "64KiB",
    "number": "3",
    "share": "25%",
    "side": "client",
    "flag": "",
}


def _run(work: Coroutine[Any, Any, None]) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(work)


if __name__ == "__main__":
    main(prog_name="python -m tests.chaos")
