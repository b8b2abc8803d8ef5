"""
One server of Redis or Valkey, and the connections to it.

Rule 1: an exchange ends within FREE_WITHIN and ANSWER_WITHIN, and a cancelled one costs no more
than its connection.
Rule 2: nothing is repeated here. A reply that is lost says nothing about its command.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from redis.asyncio.connection import AbstractConnection, ConnectionPool, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from vastproxy.errors import StateAwayError, StateBackendError

ANSWER_WITHIN = 1.0
"""Seconds for one exchange with a server: opening a connection where need be, and the answer. They
pass also while this process is busy; callers have less patience with a server that is silent."""

CONNECTIONS = 32
"""To one server, from one process: at a millisecond each they carry all that one loop can ask."""

FREE_WITHIN = 1.0
"""Seconds until a connection must be free: a crowd is served a moment later, and not refused."""

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
"""Of URLs that are understood; no cluster is behind a socket of one machine."""

_AWAY = (
    RedisConnectionError,
    RedisTimeoutError,
    ClusterDownError,
    AskError,
    TryAgainError,
    ReadOnlyError,
    OutOfMemoryError,
    OSError,
)
"""Among them a cluster that sends callers around, and a primary that has become a replica: its name
is about to lead elsewhere."""
_NO_WRITES = ("MISCONF", "NOREPLICAS", "MASTERDOWN")
"""How a server begins that takes no writes now, and will when somebody has mended it."""

T = TypeVar("T")


class Node:
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
        except (RedisError, OSError, ValueError) as error:
            # ValueError: what the library could not read, such as a number that is none.
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
        away = isinstance(error, _AWAY) or text.startswith(_NO_WRITES)
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


def options_of(url: str) -> tuple[dict[str, Any], bool]:
    """Read *url*: what a connection is made with, and whether it is one to a cluster."""
    scheme, found, rest = url.partition("://")
    kind, _, extra = scheme.partition("+")
    if scheme not in SCHEMES:
        what = repr(scheme) if found else "the URL"
        raise StateBackendError(f"{what} is no Redis (write `redis://host:6379/0`)")
    try:
        options = _parsed(f"{kind}://{rest}")
        within = _within(options)
        options = {**_defaults(within), **options, "within": within}
        if "path" not in options:
            options = {"host": "127.0.0.1", "port": 6379, **options}
        Node(options).check()
    except (TypeError, ValueError, RedisError) as error:
        raise StateBackendError(
            f"the URL of Redis is wrong: {error} (write `redis://host:6379/0`)"
        ) from None
    if extra and options.get("db"):
        raise StateBackendError("a cluster has no numbered databases (leave out `/1`)")
    return options, bool(extra)


def _parsed(url: str) -> dict[str, Any]:
    try:
        return dict(parse_url(url))
    except ValueError as error:
        if str(error).startswith("Invalid value"):
            raise
        # Not repeated: of a password with a slash, what stands before it is taken for the port.
        raise ValueError("it cannot be read; in a password `/` is written as `%2F`") from None


def _within(options: dict[str, Any]) -> float:
    """Take the limit of an exchange out of *options*."""
    within = float(options.pop("socket_timeout", ANSWER_WITHIN))
    if not within > 0:
        raise ValueError("socket_timeout is a number of seconds above 0")
    return within


def _defaults(within: float) -> dict[str, Any]:
    return {
        "client_name": "vastproxy",
        # A reply that is lost says nothing about the command: only the caller may repeat it.
        "retry": Retry(NoBackoff(), 0),
        # The older protocol: no greeting before the first command, and no messages between
        # replies, so that the pool closes a connection on which anything unexpected has arrived.
        "protocol": 2,
        "socket_connect_timeout": within,
        # The limit is that of Node.send.
        "socket_timeout": None,
    }


def read(parse: Callable[[Any], T], reply: object) -> T:
    """Make of *reply* what *parse* makes of it; StateBackendError where it cannot."""
    try:
        return parse(reply)
    except (TypeError, ValueError, LookupError, AttributeError):
        # Not the reply itself: it may be a viewer's.
        raise StateBackendError(
            f"Redis answered with {type(reply).__name__} where that cannot be"
        ) from None
