"""
The servers that a URL of Redis means, one or a cluster, and the way of a command to the right one.

Rule 1: nothing is repeated behind the caller's back, but what was certainly not run: a script that
the server does not know, and keys that another node has.
Rule 2: what a cluster cannot do for now is away: also accounts of a slot that is just moving key by
key, as none of a script's keys may be elsewhere. (Valkey 9 can move a slot as a whole.)
Rule 3: a node that is away costs the others nothing but a look at the map, now and then.

The clusters of redis-py are not used: in 8.1 their ``ASKING`` may go out on another connection than
the command behind it, one answer ``CLUSTERDOWN`` closes the connections to all nodes, and one node
that is away makes every further call read the whole map, which a caller's timeout then cancels.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, NoScriptError, RedisError

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state.redis_node import Node, options_of, read

HOPS = 5
"""Exchanges for one command: it is sent on by nodes of a cluster that changes."""

LEARN_EVERY = 1.0
"""Seconds between two looks at the map of a cluster, where a node is away or has moved slots."""

SLOTS = 16_384
"""Of every cluster: Redis cluster specification, "Key distribution model"."""


@dataclass(frozen=True, slots=True)
class Call:
    """One command about one account."""

    key: str
    """Tells the node."""
    command: tuple[object, ...]
    otherwise: tuple[object, ...] = ()
    """The same for a server that does not know the script."""


@dataclass(slots=True)
class _Sent:
    """A command on its way."""

    call: Call
    command: tuple[object, ...]
    node: Node | None = None
    """Which has been asked, or is to be; None: whichever has the key."""
    asking: bool = False
    """Whether the node is only getting the key: Redis cluster specification, "ASK redirection"."""
    reply: object = None


class Servers:
    """The servers that a URL means, and the way of a command to the right one."""

    def __init__(self, url: str) -> None:
        options, clustered = options_of(url)
        self._routes: _Routes = _Slots(options) if clustered else _One(Node(options))

    async def ask(self, calls: Sequence[Call]) -> list[object]:
        """Send *calls*: those to one server at once, and to several servers at the same time."""
        sent = [_Sent(each, each.command) for each in calls]
        left = sent
        for _ in range(HOPS):
            await self._send(left)
            left = [each for each in left if self._again(each)]
            if not left:
                break
        for each in sent:
            if each.node is not None and isinstance(each.reply, RedisError):
                raise each.node.mapped(each.reply)
        return [each.reply for each in sent]

    async def _send(self, left: Sequence[_Sent]) -> None:
        by_node: dict[Node, list[_Sent]] = {}
        for each in left:
            if each.node is None:
                each.node = await self._routes.node(each.call.key)
            by_node.setdefault(each.node, []).append(each)
        tasks = [self._send_to(node, group) for node, group in by_node.items()]
        if len(tasks) == 1:
            await tasks[0]
            return
        # All are waited for, so that none goes on when its caller has been told of a failure.
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if end is not None:
                raise end

    async def _send_to(self, node: Node, group: Sequence[_Sent]) -> None:
        commands = [
            command
            for each in group
            for command in ([("ASKING",), each.command] if each.asking else [each.command])
        ]
        try:
            replies = iter(await node.send(commands))
        except StateAwayError:
            self._routes.doubt()
            raise
        for each in group:
            if each.asking:
                next(replies)
            each.reply, each.asking = next(replies), False

    def _again(self, sent: _Sent) -> bool:
        """Whether *sent* is to be sent once more, because it was certainly not run."""
        match sent.reply:
            case NoScriptError() if sent.call.otherwise:
                sent.command = sent.call.otherwise
                return True
            case MovedError() as moved:
                sent.node = self._routes.moved(moved)
            case AskError() as ask:
                sent.node, sent.asking = self._routes.at(ask), True
            case _:
                return False
        return True

    async def everywhere(self, commands: Sequence[tuple[object, ...]]) -> None:
        """
        Send *commands* to every primary; raise unless more than half of them did them all.

        One that is away must not keep the accounts of all the others away.
        """
        nodes = await self._routes.all()
        tasks = [self._tell(node, commands) for node in nodes]
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        problems = [each for each in ends if each is not None]
        if 2 * len(problems) >= max(1, len(nodes)):
            raise problems[0]

    async def _tell(self, node: Node, commands: Sequence[tuple[object, ...]]) -> None:
        for reply in await node.send(commands):
            if isinstance(reply, RedisError):
                raise node.mapped(reply)

    async def close(self) -> None:
        """Close all connections."""
        await self._routes.close()

    def __repr__(self) -> str:
        return repr(self._routes)


class _Routes(Protocol):
    """Knows which server has which key."""

    async def node(self, key: str) -> Node:
        """Give the server that has *key*."""

    async def all(self) -> list[Node]:
        """Give every server that may be written to."""

    def moved(self, error: MovedError) -> Node:
        """Learn that a slot has another server now, and give that."""

    def at(self, error: AskError) -> Node:
        """Give the server that *error* names."""

    def doubt(self) -> None:
        """Learn that a server was away."""

    async def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True, slots=True, repr=False)
class _One:
    """One server for everything."""

    only: Node

    async def node(self, key: str) -> Node:  # noqa: ARG002 - the protocol's
        return self.only

    async def all(self) -> list[Node]:
        return [self.only]

    def moved(self, error: AskError) -> Node:
        told = f"has no slot {error.slot_id}: it is part of a cluster (write `redis+cluster://`)"
        raise StateBackendError(f"Redis at {self.only.at} {told}")

    def at(self, error: AskError) -> Node:
        return self.moved(error)

    def doubt(self) -> None:
        """Do nothing: there is no other."""

    async def close(self) -> None:
        await self.only.close()

    def __repr__(self) -> str:
        return repr(self.only)


@dataclass(frozen=True, slots=True)
class _Range:
    """Slots from *first* to *last*, and the primary that has them."""

    first: int
    last: int
    host: str
    port: int


def _ranges(reply: Any, *, default: str) -> list[_Range]:  # noqa: ANN401 - read() checks it
    """Read the answer to ``CLUSTER SLOTS``; a node without a name is the one that answers."""
    return [
        _Range(int(first), int(last), (host or b"").decode() or default, int(port))
        for first, last, (host, port, *_), *_ in reply
    ]


class _Slots:
    """
    The nodes of a cluster, and who has which slot.

    The map is read by one caller at a time and kept until somebody was sent elsewhere, or a node
    was away; and then for LEARN_EVERY at least, so that one dead node costs the others nothing.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._nodes: dict[tuple[str, int], Node] = {}
        self._owners: list[Node | None] = []
        self._seed = Node(options)
        self._asked: deque[Node] = deque([self._seed])
        """Whom to ask for the map: first who was asked longest ago. A caller that was cancelled
        because that one does not answer leaves the next one to the next caller."""
        self._learning = asyncio.Lock()
        self._doubted = False
        self._next_look = 0.0

    async def node(self, key: str) -> Node:
        slot = key_slot(key.encode())
        if not self._owners or self._is_due():
            await self._learn()
        owner = self._owners[slot]
        if owner is None:
            self._doubted = True
            raise StateAwayError(f"no node of the cluster at {self._seed.at} has slot {slot}")
        return owner

    async def all(self) -> list[Node]:
        self._doubted, self._next_look = True, 0.0
        await self._learn()
        return [each for each in dict.fromkeys(self._owners) if each is not None]

    def moved(self, error: MovedError) -> Node:
        owner = self.at(error)
        self._owners[error.slot_id] = owner
        self._doubted = True
        return owner

    def at(self, error: AskError) -> Node:
        # An empty name means the one that has been asked; who asks at the seed asks the same host.
        return self._node_at(error.host or str(self._options["host"]), error.port)

    def doubt(self) -> None:
        self._doubted = True

    def _is_due(self) -> bool:
        return self._doubted and asyncio.get_running_loop().time() >= self._next_look

    async def _learn(self) -> None:
        if self._owners and self._learning.locked():
            return
        try:
            async with asyncio.timeout(self._seed.within), self._learning:
                if not self._owners or self._is_due():
                    await self._read_map()
        except TimeoutError:
            self._must_know(StateAwayError(f"the cluster at {self._seed.at} does not answer"))

    async def _read_map(self) -> None:
        self._next_look = asyncio.get_running_loop().time() + LEARN_EVERY
        problem: StateBackendError | None = None
        for _ in range(len(self._asked)):
            self._asked.rotate(-1)
            node = self._asked[-1]
            try:
                reply = (await node.send([("CLUSTER", "SLOTS")]))[0]
                if isinstance(reply, RedisError):
                    raise node.mapped(reply)
                await self._adopt(read(partial(_ranges, default=node.host), reply))
            except StateBackendError as error:
                problem = error
            else:
                return
        self._must_know(problem)

    def _must_know(self, problem: StateBackendError | None) -> None:
        """Raise *problem* where there is no older map to go on with."""
        if not self._owners and problem is not None:
            raise problem

    async def _adopt(self, ranges: Sequence[_Range]) -> None:
        owners: list[Node | None] = [None] * SLOTS
        for each in ranges:
            node = self._node_at(each.host, each.port)
            owners[each.first : each.last + 1] = [node] * (each.last + 1 - each.first)
        self._owners, self._doubted = owners, False
        current = {each for each in owners if each is not None}
        gone = [where for where, each in self._nodes.items() if each not in current]
        left = [self._nodes.pop(where) for where in gone]
        self._asked = deque([self._seed, *self._nodes.values()])
        for former in left:
            await former.close_idle()

    def _node_at(self, host: str, port: int) -> Node:
        if (host, port) not in self._nodes:
            self._nodes[host, port] = Node({**self._options, "host": host, "port": port})
        return self._nodes[host, port]

    async def close(self) -> None:
        for each in (self._seed, *self._nodes.values()):
            await each.close()

    def __repr__(self) -> str:
        doubted = ", map in doubt" if self._doubted else ""
        return f"cluster at {self._seed.at}, nodes: {len(self._nodes)}{doubted}"
