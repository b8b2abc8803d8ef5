"""
State in Redis or Valkey: one server, or a cluster. Exact for all processes that share it.

Rule 1: a decision is one script, which the server runs alone. It takes a list of holds of one
account, so a crowd of reservations for one viewer is one call.
Rule 2: all keys of an account have its name as their hash tag: they live on one node of a cluster.
Rule 3: nothing is repeated behind the caller's back, but what was certainly not run: a script that
the server does not know, and keys that another node has. The caller repeats; ids make that safe.
Rule 4: a call ends within FREE_WITHIN and ANSWER_WITHIN, and a cancelled one costs no more than its
connection.
Rule 5: what a cluster cannot do for now is away: also accounts of a slot that is just moving key by
key, as none of a script's keys may be elsewhere. (Valkey 9 can move a slot as a whole.)

Keys, with the default prefix; ``scripts/account.lua`` says what is in them:

- ``vp:{v:<name>}:c``: counters of a viewer; of a campaign, with ``c:`` instead of ``v:``
- ``vp:{v:<name>}:h`` and ``:e``: its reservations, and when they lapse
- ``vp:{v:<name>}:s``: its settled operations, and until when they are remembered
- ``vp:{v:<name>}:i``: its items
- ``vp:k:<key>``: a plain counter

Settled operations are a sorted set of their account, and not keys of their own: so they go by the
same clock as all else, and forgetting an account removes them without a search.

The server wants ``maxmemory-policy noeviction`` (an evicted counter is a cap that begins anew) and
``appendonly yes`` (else a restart forgets what was counted). A failover may lose what had not been
replicated: Redis' documentation, "Redis replication".

The clusters of redis-py are not used: in 8.1 their ``ASKING`` may go out on another connection than
the command behind it, one answer ``CLUSTERDOWN`` closes the connections to all nodes, and one node
that is away makes every further call read the whole map, which a caller's timeout then cancels.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import quote

from redis.asyncio.connection import AbstractConnection, ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from vastproxy.errors import StateAwayError, StateBackendError
from vastproxy.state.base import (
    MAX_ITEM_BYTES,
    MAX_ITEMS,
    MONEY_KEY,
    Account,
    Booking,
    Claim,
    Hold,
    Level,
    Verdict,
    campaign_of,
    check_hold,
    micros,
    units,
)

ANSWER_WITHIN = 0.25
"""Seconds for one exchange with a server: opening a connection where need be, and the answer."""

CONNECTIONS = 32
"""To one server, from one process: at a millisecond each they carry all that one loop can ask."""

FREE_WITHIN = 1.0
"""Seconds until a connection must be free: a crowd is served a moment later, and not refused."""

HOLDS = 200
"""In one script: it keeps everybody else waiting, about two milliseconds."""

HOPS = 5
"""Exchanges for one command: it is sent on by nodes of a cluster that changes."""

LEARN_EVERY = 1.0
"""Seconds between two looks at the map of a cluster, where a node is away or has moved slots."""

SLOTS = 16_384
"""Of every cluster: Redis cluster specification, "Key distribution model"."""

_PLAIN = "!\"#$&'()*+,-./:;<=>?@[\\]^_`|~"
"""What stays as it is in names within keys: all printable ASCII but braces, which would end the
hash tag, the percent sign, and the space."""

_BOOKINGS: tuple[Booking, ...] = ("booked", "late", "again")

_AWAY = (
    RedisConnectionError,
    RedisTimeoutError,
    ClusterDownError,
    AskError,
    TryAgainError,
    ReadOnlyError,
    OSError,
)
"""Among them a cluster that sends callers around, and a primary that has become a replica: its name
is about to lead elsewhere."""

T = TypeVar("T")


class RedisBackend:
    """
    The backend of ``redis://``, ``rediss://`` and ``unix://``, and of clusters.

    A cluster's *url* begins with ``redis+cluster://`` or ``rediss+cluster://``, and names any of
    its nodes. *clock* gives Unix milliseconds, for tests; None: the server's time. *prefix* begins
    all keys.
    """

    def __init__(
        self, url: str, *, clock: Callable[[], int] | None = None, prefix: str = "vp:"
    ) -> None:
        if "{" in prefix:
            raise StateBackendError(f"prefix {prefix!r} has a brace (write one without, as `vp:`)")
        self._servers = _Servers(url)
        self._clock = clock
        self._prefix = prefix
        self._scripts = _Scripts.load()

    # --- Plain counters -------------------------------------------------------------------------

    async def get_count(self, key: str) -> int:
        """Give the count of *key*."""
        return _read(int, await self._count(key, "get", 0))

    async def increment(self, key: str, amount: int = 1) -> int:
        """Add *amount* to *key*, and give the new count."""
        return _read(int, await self._count(key, "add", amount))

    async def set_expiry(self, key: str, seconds: float) -> None:
        """Let the count of *key* vanish in *seconds*."""
        await self._count(key, "expire", int(seconds * 1000))

    async def _count(self, key: str, what: str, number: int) -> object:
        keys = [f"{self._prefix}k:{_tame(key)}"]
        return await self._ask(self._scripts.count.call(keys, self._now(), what, number))

    async def get_spend(self, key: str) -> Decimal:
        """Give what was spent on *key*."""
        counters = self._keys(campaign_of(key), "c")
        spent = await self._ask(_Call(counters[0], ("HGET", *counters, f"c|{MONEY_KEY}")))
        return units(_read(int, spent or 0))

    async def add_spend(self, key: str, amount: Decimal | float | str) -> Decimal:
        """Add *amount* to *key*, and give the new total."""
        counters = self._keys(campaign_of(key), "c")
        return units(
            _read(int, await self._ask(self._scripts.spend.call(counters, micros(amount))))
        )

    # --- Operations -----------------------------------------------------------------------------

    async def reserve(self, holds: Sequence[Hold]) -> list[Verdict]:
        """Reserve each of *holds*, wholly or not at all."""
        return [_read(_verdict, each) for each in await self._settle(self._scripts.reserve, holds)]

    async def confirm(self, holds: Sequence[Hold]) -> list[Booking]:
        """Count the claims of each of *holds*."""
        return [_read(_booking, each) for each in await self._settle(self._scripts.confirm, holds)]

    async def void(self, holds: Sequence[Hold]) -> None:
        """Release *holds*."""
        for each in holds:
            check_hold(each)
        await self._servers.ask([self._call(self._scripts.void, part) for _, part in _parts(holds)])

    async def _settle(self, script: "_Script", holds: Sequence[Hold]) -> list[object]:
        """Run *script* over *holds*, by account, and give what it says of each, in their order."""
        for each in holds:
            check_hold(each)
        told: dict[int, object] = {}
        left = _parts(holds)
        while left:
            replies = await self._servers.ask([self._call(script, part) for _, part in left])
            for (places, _), reply in zip(left, replies, strict=True):
                if reply is not None:
                    rows = _read(partial(_rows, count=len(places)), reply)
                    told.update(zip(places, rows, strict=True))
            # Nothing: so many reservations had lapsed that the script only took some of them off.
            left = [part for part, reply in zip(left, replies, strict=True) if reply is None]
        return [told[at] for at in range(len(holds))]

    def _call(self, script: "_Script", holds: Sequence[Hold]) -> "_Call":
        keys = self._keys(holds[0].account, "c", "h", "e", "s")
        return script.call(keys, self._now(), _told(holds))

    async def levels(self, account: Account, claims: Sequence[Claim]) -> list[Level]:
        """Tell what stands on the counters of *claims*."""
        if not claims:
            return []
        asked = self._call(self._scripts.levels, [Hold(account, "levels", tuple(claims))])
        while (reply := await self._ask(asked)) is None:
            pass  # As in _settle.
        rows = _read(partial(_rows, count=len(claims)), reply)
        return [_read(_level, each) for each in rows]

    async def keys(self, account: Account) -> list[str]:
        """Give the keys of the counters of *account*."""
        counters = self._keys(account, "c")
        return _read(_counter_keys, await self._ask(_Call(counters[0], ("HKEYS", *counters))))

    async def forget(self, account: Account) -> bool:
        """Remove all that is kept of *account*."""
        keys = self._keys(account, "c", "h", "e", "s", "i")
        return _read(int, await self._ask(_Call(keys[0], ("UNLINK", *keys)))) > 0

    # --- Small items ----------------------------------------------------------------------------

    async def read_items(self, account: Account) -> dict[str, str]:
        """Give the items of *account*."""
        keys = self._keys(account, "i")
        return _read(_items, await self._ask(self._scripts.read_items.call(keys, self._now())))

    async def write_items(
        self, account: Account, changes: Mapping[str, str | None], seconds: float
    ) -> None:
        """Set or remove items, each by itself."""
        told = [
            word
            for name, value in changes.items()
            for word in (name, "drop" if value is None else "set", value or "")
        ]
        await self._ask(
            self._scripts.write_items.call(
                self._keys(account, "i"),
                self._now(),
                *(int(seconds * 1000), MAX_ITEMS, MAX_ITEM_BYTES, *told),
            )
        )

    # --- Life -----------------------------------------------------------------------------------

    def _now(self) -> int | str:
        return self._clock() if self._clock else ""

    def _keys(self, account: Account, *ends: str) -> list[str]:
        tag = f"{self._prefix}{{{account.kind[0]}:{_tame(account.name)}}}"
        return [f"{tag}:{end}" for end in ends]

    async def _ask(self, call: "_Call") -> object:
        return (await self._servers.ask([call]))[0]

    async def flush(self) -> None:
        """Return at once: nothing is ever pending."""

    async def sweep(self) -> int:
        """Delete nothing: keys expire by themselves, and scripts take off what has ended."""
        return 0

    async def ping(self) -> None:
        """Return if every primary answers and one can be written to; tell them the scripts."""
        load = [("SCRIPT", "LOAD", each.source) for each in self._scripts.all()]
        await self._servers.everywhere([("PING",), *load])
        key = f"{self._prefix}ping"
        await self._ask(_Call(key, ("SET", key, 1, "PX", 1000)))

    async def close(self) -> None:
        """Release connections."""
        await self._servers.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<RedisBackend {self._servers!r}>"


# --- Holds and replies, as the scripts have them -------------------------------------------------


def _parts(holds: Sequence[Hold]) -> list[tuple[list[int], list[Hold]]]:
    """Part *holds* by account, HOLDS at a time; with each part go their places in *holds*."""
    places: dict[Account, list[int]] = {}
    for at, hold in enumerate(holds):
        places.setdefault(hold.account, []).append(at)
    cut = [each[at : at + HOLDS] for each in places.values() for at in range(0, len(each), HOLDS)]
    return [(each, [holds[at] for at in each]) for each in cut]


def _told(holds: Sequence[Hold]) -> bytes:
    """Write *holds* as ``account.lua`` reads them."""
    calendars: dict[tuple[int, ...], int] = {}
    rows = [
        (
            each.operation,
            each.ttl_ms,
            each.keep_ms,
            each.lease,
            [_claim(claim, calendars) for claim in each.claims],
        )
        for each in holds
    ]
    # Calendars are long, and mostly the same for all claims: each is told once.
    text = json.dumps([list(calendars), rows], ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def _claim(claim: Claim, calendars: dict[tuple[int, ...], int]) -> tuple[object, ...]:
    window = claim.window
    span = window.ms
    if window.kind == "calendar":
        span = calendars.setdefault(window.bounds, len(calendars) + 1)
    limit = False if claim.limit is None else claim.limit
    return (claim.key, claim.amount, limit, window.kind[0], span, claim.enforced)


def _rows(reply: object, *, count: int) -> list[object]:
    if not isinstance(reply, list) or len(reply) != count:
        raise TypeError
    return reply


def _verdict(reply: Any) -> Verdict:  # noqa: ANN401 - _read checks it
    granted, *places = (int(each) for each in reply)
    if granted:
        return Verdict(granted=True, over=tuple(places))
    return Verdict(granted=False, refused=places[0] if places else None)


def _booking(reply: Any) -> Booking:  # noqa: ANN401 - _read checks it
    booking: Booking = _BOOKINGS[reply]
    return booking


def _level(reply: Any) -> Level:  # noqa: ANN401 - _read checks it
    counted, reserved = reply
    return Level(int(counted), int(reserved))


def _counter_keys(reply: Any) -> list[str]:  # noqa: ANN401 - _read checks it
    # A counter has two fields, `c|<key>` and `r|<key>`, or one of them.
    return list(dict.fromkeys([each[2:].decode("utf-8", "surrogatepass") for each in reply]))


def _items(reply: Any) -> dict[str, str]:  # noqa: ANN401 - _read checks it
    words = [each.decode("utf-8", "surrogatepass") for each in reply]
    written = [
        (name, *text.split(" ", 1)) for name, text in zip(words[::2], words[1::2], strict=True)
    ]
    written.sort(key=lambda item: int(item[1]))
    return {name: value for name, _, value in written}


def _read(parse: Callable[[Any], T], reply: object) -> T:
    """Make of *reply* what *parse* makes of it; StateBackendError where it cannot."""
    try:
        return parse(reply)
    except (TypeError, ValueError, LookupError, AttributeError):
        # Not the reply itself: it may be a viewer's.
        raise StateBackendError(
            f"Redis answered with {type(reply).__name__} where that cannot be"
        ) from None


def _tame(name: str) -> str:
    """Write *name* so that it can stand within a hash tag."""
    return quote(name.encode("utf-8", "surrogatepass"), safe=_PLAIN)


# --- Scripts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """One command about one account."""

    key: str
    """Tells the node."""
    command: tuple[object, ...]
    otherwise: tuple[object, ...] = ()
    """The same for a server that does not know the script."""


@dataclass(frozen=True, slots=True)
class _Script:
    source: str
    digest: str

    @classmethod
    def load(cls, *names: str) -> Self:
        """Make one script of the files *names*."""
        folder = files("vastproxy.state") / "scripts"
        source = "\n".join([(folder / f"{name}.lua").read_text("utf-8") for name in names])
        # Redis names scripts by this digest; nothing is protected by it.
        return cls(source, sha1(source.encode(), usedforsecurity=False).hexdigest())

    def call(self, keys: Sequence[str], *arguments: object) -> _Call:
        """Give the command that runs this, and the one that brings it along."""
        rest = (len(keys), *keys, *arguments)
        return _Call(keys[0], ("EVALSHA", self.digest, *rest), ("EVAL", self.source, *rest))


@dataclass(frozen=True, slots=True)
class _Scripts:
    reserve: _Script
    confirm: _Script
    void: _Script
    levels: _Script
    count: _Script
    spend: _Script
    read_items: _Script
    write_items: _Script

    @classmethod
    def load(cls) -> Self:
        """Read all of them."""
        decisions = ("reserve", "confirm", "void", "levels")
        return cls(
            *[_Script.load("account", each) for each in decisions],
            *[_Script.load(each) for each in ("count", "spend", "read_items", "write_items")],
        )

    def all(self) -> list[_Script]:
        """Give all of them."""
        return [getattr(self, name) for name in self.__slots__]


# --- Servers -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sent:
    """A command on its way."""

    call: _Call
    command: tuple[object, ...]
    node: "_Node | None" = None
    """Which has been asked, or is to be; None: whichever has the key."""
    asking: bool = False
    """Whether the node is only getting the key: Redis cluster specification, "ASK redirection"."""
    reply: object = None


class _Servers:
    """The servers that a URL means, and the way of a command to the right one."""

    def __init__(self, url: str) -> None:
        options, clustered = _options(url)
        self._routes: _Routes
        if clustered:
            self._routes = _Slots(options)
        else:
            self._routes = _One(_Node(options))

    async def ask(self, calls: Sequence[_Call]) -> list[object]:
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
        by_node: dict[_Node, list[_Sent]] = {}
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

    async def _send_to(self, node: "_Node", group: Sequence[_Sent]) -> None:
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
            case NoScriptError():
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
        """Send *commands* to every primary; raise what the first of them fails with."""
        for node in await self._routes.all():
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

    async def node(self, key: str) -> "_Node":
        """Give the server that has *key*."""

    async def all(self) -> "list[_Node]":
        """Give every server that may be written to."""

    def moved(self, error: MovedError) -> "_Node":
        """Learn that a slot has another server now, and give that."""

    def at(self, error: AskError) -> "_Node":
        """Give the server that *error* names."""

    def doubt(self) -> None:
        """Learn that a server was away."""

    async def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True, slots=True, repr=False)
class _One:
    """One server for everything."""

    only: "_Node"

    async def node(self, key: str) -> "_Node":  # noqa: ARG002 - the protocol's
        return self.only

    async def all(self) -> "list[_Node]":
        return [self.only]

    def moved(self, error: AskError) -> "_Node":
        told = f"has no slot {error.slot_id}: it is part of a cluster (write `redis+cluster://`)"
        raise StateBackendError(f"Redis at {self.only.at} {told}")

    def at(self, error: AskError) -> "_Node":
        return self.moved(error)

    def doubt(self) -> None:
        """Do nothing: there is no other."""

    async def close(self) -> None:
        await self.only.close()

    def __repr__(self) -> str:
        return repr(self.only)


class _Slots:
    """
    The nodes of a cluster, and who has which slot.

    The map is read by one caller at a time and kept until somebody was sent elsewhere, or a node
    was away; and then for LEARN_EVERY at least, so that one dead node costs the others nothing.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._nodes: dict[tuple[str, int], _Node] = {}
        self._owners: list[_Node | None] = []
        self._seed = _Node(options)
        self._asked: deque[_Node] = deque([self._seed])
        """Whom to ask for the map: first who was asked longest ago. A caller that was cancelled
        because that one does not answer leaves the next one to the next caller."""
        self._learning = asyncio.Lock()
        self._doubted = False
        self._next_look = 0.0

    async def node(self, key: str) -> "_Node":
        slot = key_slot(key.encode())
        if not self._owners or self._is_due():
            await self._learn()
        owner = self._owners[slot]
        if owner is None:
            self._doubted = True
            raise StateAwayError(f"no node of the cluster at {self._seed.at} has slot {slot}")
        return owner

    async def all(self) -> "list[_Node]":
        self._doubted, self._next_look = True, 0.0
        await self._learn()
        return [each for each in dict.fromkeys(self._owners) if each is not None]

    def moved(self, error: MovedError) -> "_Node":
        owner = self.at(error)
        self._owners[error.slot_id] = owner
        self._doubted = True
        return owner

    def at(self, error: AskError) -> "_Node":
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
                await self._adopt(_read(partial(_ranges, default=node.host), reply))
            except StateBackendError as error:
                problem = error
            else:
                return
        self._must_know(problem)

    def _must_know(self, problem: StateBackendError | None) -> None:
        """Raise *problem* where there is no older map to go on with."""
        if not self._owners and problem is not None:
            raise problem

    async def _adopt(self, ranges: "Sequence[_Range]") -> None:
        owners: list[_Node | None] = [None] * SLOTS
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

    def _node_at(self, host: str, port: int) -> "_Node":
        if (host, port) not in self._nodes:
            self._nodes[host, port] = _Node({**self._options, "host": host, "port": port})
        return self._nodes[host, port]

    async def close(self) -> None:
        for each in (self._seed, *self._nodes.values()):
            await each.close()

    def __repr__(self) -> str:
        doubted = ", map in doubt" if self._doubted else ""
        return f"cluster at {self._seed.at}, nodes: {len(self._nodes)}{doubted}"


@dataclass(frozen=True, slots=True)
class _Range:
    """Slots from *first* to *last*, and the primary that has them."""

    first: int
    last: int
    host: str
    port: int


def _ranges(reply: Any, *, default: str) -> list[_Range]:  # noqa: ANN401 - _read checks it
    """Read the answer to ``CLUSTER SLOTS``; a node without a name is the one that answers."""
    return [
        _Range(int(first), int(last), (host or b"").decode() or default, int(port))
        for first, last, (host, port, *_), *_ in reply
    ]


class _Node:
    """One server, and the connections to it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        connection = {key: value for key, value in options.items() if key != "within"}
        self.host = str(options.get("host", ""))
        self.at = str(options.get("path") or f"{self.host}:{options.get('port')}")
        self.within: float = options["within"]
        self._secret = str(options.get("password") or "")
        self._pool = ConnectionPool(max_connections=CONNECTIONS, **connection)
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def send(self, commands: Sequence[tuple[object, ...]]) -> list[object]:
        """
        Send *commands* in one go, and give the replies: errors of single commands among them.

        Raises StateBackendError where there are no replies.
        """
        await self._wait_free()
        try:
            # One limit for all of it: the library's own begins anew with each step of a handshake.
            async with asyncio.timeout(self.within):
                return await self._exchange([_encoded(each) for each in commands])
        except (RedisError, OSError) as error:
            raise self.mapped(error) from None
        finally:
            self._room.release()

    async def _wait_free(self) -> None:
        try:
            async with asyncio.timeout(FREE_WITHIN):
                await self._room.acquire()
        except TimeoutError:
            raise StateAwayError(f"Redis at {self.at}: no connection was free in time") from None

    async def _exchange(self, commands: Sequence[tuple[bytes, ...]]) -> list[object]:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_packed_command(connection.pack_commands(commands))
            replies = [await _reply(connection) for _ in commands]
            if any(isinstance(each, ReadOnlyError) for each in replies):
                # No primary any more: its name may lead to another server now.
                await connection.disconnect(nowait=True)
            return replies
        finally:
            # What was interrupted has closed its connection: no reply is left to the next caller.
            await self._pool.release(connection)

    def mapped(self, error: Exception) -> StateBackendError:
        """Say in our own terms what became of a call."""
        text = str(error) or type(error).__name__
        if self._secret:
            # A server that knows no passwords repeats the command that had it.
            text = text.replace(self._secret, "***")
        if isinstance(error, AuthenticationError | AuthorizationError):
            return StateBackendError(f"Redis at {self.at} refuses the password: {text}")
        if isinstance(error, BusyLoadingError):
            return StateAwayError(f"Redis at {self.at} is loading its data")
        if isinstance(error, TimeoutError | RedisTimeoutError):
            return StateAwayError(f"Redis at {self.at}: no answer in {self.within * 1000:.0f} ms")
        away = isinstance(error, _AWAY)
        return (StateAwayError if away else StateBackendError)(f"Redis at {self.at}: {text}")

    def check(self) -> None:
        """Raise TypeError or ValueError for options that no connection can be made with."""
        self._pool.make_connection()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.disconnect()

    async def close_idle(self) -> None:
        """Close the connections that nobody uses now."""
        await self._pool.disconnect(inuse_connections=False)

    def __repr__(self) -> str:
        return f"at {self.at}{', all connections in use' if self._room.locked() else ''}"


async def _reply(connection: AbstractConnection) -> object:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def _encoded(command: Sequence[object]) -> tuple[bytes, ...]:
    """Write the words of *command*; Python's strings may have what is no Unicode."""
    return tuple(
        [
            each if isinstance(each, bytes) else str(each).encode("utf-8", "surrogatepass")
            for each in command
        ]
    )


def _options(url: str) -> tuple[dict[str, Any], bool]:
    """Read *url*: what a connection is made with, and whether it is one to a cluster."""
    scheme, _, rest = url.partition("://")
    kind, _, extra = scheme.partition("+")
    if extra not in ("", "cluster") or kind not in ("redis", "rediss", "unix"):
        raise StateBackendError(f"{scheme!r} is no Redis (write `redis://host:6379/0`)")
    try:
        options: dict[str, Any] = dict(parse_url(f"{kind}://{rest}"))
        within = float(options.pop("socket_timeout", ANSWER_WITHIN))
        options = {**_defaults(within), **options, "within": within}
        if "path" not in options:
            options = {"host": "127.0.0.1", "port": 6379, **options}
        _Node(options).check()
    except (TypeError, ValueError, RedisError) as error:
        raise StateBackendError(
            f"the URL of Redis is wrong: {error} (write `redis://host:6379/0`)"
        ) from None
    if extra and options.get("db"):
        raise StateBackendError("a cluster has no numbered databases (leave out `/1`)")
    return options, bool(extra)


def _defaults(within: float) -> dict[str, Any]:
    return {
        "client_name": "vastproxy",
        # A reply that is lost says nothing about the command: only the caller may repeat it.
        "retry": Retry(NoBackoff(), 0),
        # The older protocol: no greeting before the first command, and no messages between
        # replies, so that the pool closes a connection on which anything unexpected has arrived.
        "protocol": 2,
        "socket_connect_timeout": within,
        # The limit is that of _Node.send.
        "socket_timeout": None,
    }
