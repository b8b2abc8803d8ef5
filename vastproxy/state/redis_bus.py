"""
What instances tell each other about the breakers of ad servers, over Redis or Valkey.

Rule 1: votes are kept by the server, and end by its clock. What is said of a breaker, and how it
then stands with all, is one script: ``scripts/breaker.lua``.
Rule 2: messages only make it quick. Each may be lost, and then the next look at the votes says the
same.
Rule 3: each closing of a breaker begins a new term. What belongs to an older one is no longer true,
however late it comes.
Rule 4: all keys have one hash tag, so that all breakers are told of in one call. There are few.

Keys, with the default prefix; ``scripts/breaker.lua`` says what is in them:

- ``vp:{b}:<name>:v``, ``:s`` and ``:p``: the votes about a breaker, how it stands, who may probe
- ``vp:{b}:<database>``: the channel. The number is in it since channels know no databases.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast, get_args
from urllib.parse import quote

from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import RedisError

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state.redis_node import Node, options_of, read
from vastproxy.state.redis_scripts import Script
from vastproxy.state.redis_servers import Call, Servers

Says = Literal["open", "stay", "look", "closed", "probe"]
"""That it has just opened; that it is still so; nothing; that it has just closed; may I probe."""

BEYOND = 15.0
"""Seconds that a vote counts beyond the time for which the ad server is left alone: while somebody
probes, and until the voter has said it again, which he does more often than that."""

QUIET = 2.0
"""Seconds without a message after which the server is asked whether it is still there; in as many
again it must have answered."""

MAX_REASON = 200
"""Characters."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """What an instance says of the breaker called *name*."""

    name: str
    says: Says
    term: int
    """The last that it knows; a negative number: none."""
    quorum: int
    """Votes that make it open for all."""
    seconds: float = 0.0
    """How long it is left alone from now; of a ``probe``, for how long nobody else may."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """How a breaker stands with all instances, after one of them has said something."""

    name: str
    by: str
    """The instance."""
    says: Says
    votes: int
    term: int
    seconds: float
    """How long it is left alone from now."""
    reason: str
    granted: bool
    """Whether the instance that asked may probe."""


class RedisVotes:
    """
    The votes of all instances, as the one called *instance* sees them.

    They are kept by *servers*; *url* is where those are, for the messages.
    """

    def __init__(self, servers: Servers, url: str, instance: str, *, prefix: str = "vp:") -> None:
        self.instance = instance
        self._servers = servers
        self._prefix = f"{prefix}{{b}}:"
        self._script = Script.load("breaker")
        self._messages = _Messages(url, self._prefix)

    async def cast(self, ballots: Sequence[Ballot]) -> list[Standing]:
        """Say *ballots*, all in one call. Raises StateBackendError."""
        replies = await self._servers.ask([self._call(each) for each in ballots])
        return [read(_standing, each) for each in replies]

    def _call(self, ballot: Ballot) -> Call:
        name = quote(ballot.name.encode("utf-8", "surrogatepass"), safe="")
        keys = [f"{self._prefix}{name}:{end}" for end in ("v", "s", "p")]
        times = (round(each * 1000) for each in (ballot.seconds, BEYOND))
        return self._script.call(
            keys,
            *(ballot.says, self.instance, ballot.name, self._messages.channel),
            *(ballot.term, ballot.quorum, *times, ballot.reason[:MAX_REASON]),
        )

    async def listen(
        self, heard: Callable[[Standing], None], began: Callable[[], None]
    ) -> NoReturn:
        """
        Tell *heard* of what others say, and *began* when that begins.

        Ends by raising StateBackendError.
        """

        def _heard(message: object) -> None:
            # What else somebody writes to the channel is nobody's business.
            with suppress(StateBackendError):
                standing = read(_standing, message)
                if standing.by != self.instance:
                    heard(standing)

        await self._messages.listen(_heard, began)

    def __repr__(self) -> str:
        return f"<RedisVotes of {self.instance}, {self._servers!r}>"


def _standing(reply: Any) -> Standing:  # noqa: ANN401 - read() checks it
    """Read what ``breaker.lua`` says."""
    told = json.loads(reply.decode("utf-8", "replace"))
    if told["says"] not in get_args(Says):
        raise ValueError
    return Standing(
        name=str(told["name"]),
        by=str(told["by"]),
        says=cast("Says", told["says"]),
        votes=int(told["votes"]),
        term=int(told["term"]),
        seconds=max(0.0, int(told["left"]) / 1000),
        reason=str(told["reason"])[:MAX_REASON],
        granted=told["granted"] is True,
    )


class _Messages:
    """One connection for messages; in a cluster to any node, as each has all of them."""

    def __init__(self, url: str, prefix: str) -> None:
        options, self._clustered = options_of(url)
        self.channel = f"{prefix}{options.get('db', 0)}"
        self._options = options
        self._places: deque[dict[str, Any]] = deque([{}])
        """What differs at each server that may be asked: the one from the URL, and the nodes."""

    async def listen(self, heard: Callable[[object], None], began: Callable[[], None]) -> NoReturn:
        """Hand on all messages until the connection ends."""
        options = {**self._options, **self._places[0]}
        self._places.rotate(-1)
        node = Node(options)
        del options["within"]
        connection = ConnectionPool(**options).make_connection()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(node.within):
                await connection.connect()
                if self._clustered:
                    await self._learn(connection, node.host)
                await connection.send_command("SUBSCRIBE", self.channel)
                await connection.read_response()
            began()
            await _receive(connection, heard)
        except (RedisError, OSError, ValueError) as error:
            raise node.mapped(error) from None
        finally:
            await connection.disconnect(nowait=True)

    async def _learn(self, connection: AbstractConnection, host: str) -> None:
        """See which other nodes there are, for when this one is away."""
        await connection.send_command("CLUSTER", "SLOTS")
        nodes = read(_nodes, await connection.read_response())
        others = [{"host": each or host, "port": port} for each, port in dict.fromkeys(nodes)]
        self._places = deque([{}, *others])
        self._places.rotate(-1)


def _nodes(reply: Any) -> list[tuple[str, int]]:  # noqa: ANN401 - read() checks it
    return [((host or b"").decode(), int(port)) for _, _, (host, port, *_), *_ in reply]


async def _receive(connection: AbstractConnection, heard: Callable[[object], None]) -> NoReturn:
    silent = False
    while True:
        reply = await connection.read_response(timeout=QUIET)
        if reply is not None:
            silent = False
            kind, *rest = reply if isinstance(reply, list) else [reply]
            if kind == b"message":
                heard(rest[-1])
        elif silent:
            raise StateAwayError(f"Redis does not answer on {connection!r}")
        else:
            silent = True
            await connection.send_command("PING")
