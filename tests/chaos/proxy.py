"""
A TCP proxy that harms what passes: in front of ad servers, of Redis, of anything.

Rule 1: what is done is decided by :mod:`tests.chaos.toxics`; here it is only carried out.
Rule 2: no byte is changed unless a toxic says so, and no end of a connection is kept back: what one
side does to it, the other side sees.
Rule 3: toxics may change at any time. What was swallowed before stays swallowed, so that nobody is
ever given a stream with a hole in it.
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Self

from tests.chaos.toxics import Lane, Toward, Toxic, through
from tests.support.hostile import BLOCK, End

WAITING = 64
"""Reads that wait for their time in one direction; with more of them the sender has to wait."""

CONNECT_WITHIN = 5.0
"""Seconds for a connection to the server behind."""


CLOSE_WITHIN = 1.0
"""Seconds for what was sent to be read, before a connection that is closed is reset."""


class LinkOver(Exception):  # noqa: N818 - no error: a way to leave a group of tasks
    """A connection of a client is over; *end* is how."""

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.end = end


@dataclass(slots=True)
class _Side:
    """One end of a link."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def leave(self, end: End) -> None:
        """End it, in order unless *end* is a reset."""
        if end is not End.RESET:
            self.writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                async with asyncio.timeout(CLOSE_WITHIN):
                    await self.writer.wait_closed()
        self.reset()

    def reset(self) -> None:
        """End it by RST: a socket that lingers for no time."""
        link = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass(slots=True)
class Facts:
    """What has happened at a chaos proxy so far."""

    accepted: list[float] = field(default_factory=list)
    """When connections came, on the monotonic clock."""
    ends: Counter[str] = field(default_factory=Counter)
    """How they ended: close, reset, unreachable."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes that were passed on, by who got them: server, client."""
    dropped: int = 0
    """Replies that got lost."""


class ChaosProxy:
    """
    Listen on loopback *port* (0: any), and pass all on to *target*; an async context manager.

    :attr:`toxics` may be set at any time. *seed* decides all that is random, connection by
    connection.
    """

    def __init__(
        self,
        target: tuple[str, int],
        toxics: Sequence[Toxic] = (),
        *,
        port: int = 0,
        address: str = "127.0.0.1",
        seed: int = 0,
    ) -> None:
        self.target = target
        self.port = port
        self.address = address
        self.seed = seed
        self.facts = Facts()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.replies_to_drop = 0
        self._toxics: tuple[Toxic, ...] = ()
        self._changed = asyncio.Event()
        self._numbers = itertools.count(1)
        self._links: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._holder = socket.socket()
        self.toxics = tuple(toxics)

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        # Bound and never listening: the port stays ours while the proxy is down.
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((self.address, self.port))
        self.port = self._holder.getsockname()[1]
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()
        self._holder.close()

    @property
    def toxics(self) -> tuple[Toxic, ...]:
        """What harms all connections now; set it in the proxy's own thread."""
        return self._toxics

    @toxics.setter
    def toxics(self, toxics: Sequence[Toxic]) -> None:
        """Harm all connections by *toxics* from now on, and by nothing else."""
        self._toxics = tuple(toxics)
        self.replies_to_drop += sum(each.drop_replies for each in toxics)
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def base(self) -> str:
        """The scheme, host and port of its URLs."""
        return f"http://{self.address}:{self.port}"

    @property
    def links(self) -> int:
        """How many connections there are now."""
        return len(self._links)

    async def wait_links(self, count: int, within: float = 10.0) -> None:
        """Wait until there are *count* connections; TimeoutError after *within* seconds."""
        async with asyncio.timeout(within):
            while self.links != count:
                self._moved.clear()
                await self._moved.wait()

    async def up(self) -> None:
        """Take connections, as at the beginning."""
        if self._server is None:
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.address, self.port))
            self._server = await asyncio.start_server(self._serve, sock=listener, backlog=1000)

    async def down(self) -> None:
        """Refuse connections, and reset all that there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.reset()

    async def reset(self) -> None:
        """Reset all connections that there are."""
        links = list(self._links)
        for each in links:
            each.cancel()
        await asyncio.gather(*links, return_exceptions=True)
        # An aborted transport closes its socket in the next turn of the loop.
        await asyncio.sleep(0)

    async def changed(self, seconds: float | None = None) -> None:
        """Wait until the toxics change, *seconds* at the most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def drops(self) -> bool:
        """Tell whether a reply that is here now gets lost, and take note of it."""
        if not self.replies_to_drop:
            return False
        self.replies_to_drop -= 1
        self.facts.dropped += 1
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        self._moved.set()
        client, number = _Side(reader, writer), next(self._numbers)
        self.facts.accepted.append(asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                server = _Side(*await asyncio.open_connection(*self.target))
        # A connection that is cut off ends like any other: asyncio would log a cancelled one.
        except (OSError, asyncio.CancelledError):
            self.facts.ends["unreachable"] += 1
            client.reset()
        else:
            await self._pass_on(number, client, server)
        finally:
            self._links.discard(task)
            self._moved.set()

    async def _pass_on(self, number: int, client: _Side, server: _Side) -> None:
        end = End.RESET
        try:
            async with asyncio.TaskGroup() as group:
                for flow in (
                    _Flow(self, "server", number, client.reader, server.writer),
                    _Flow(self, "client", number, server.reader, client.writer),
                ):
                    group.create_task(flow.take())
                    group.create_task(flow.give())
            end = End.CLOSE
        except* LinkOver as over:
            end = _ends(over)
        except* (OSError, asyncio.CancelledError):
            end = End.RESET
        finally:
            self.facts.ends[end.value] += 1
            for side in (client, server):
                await side.leave(end)

    def __repr__(self) -> str:
        toxics = "; ".join(map(str, self.toxics)) or "no toxics"
        state = "down" if self._server is None else f"{self.links} connections"
        return f"<ChaosProxy {self.address}:{self.port} to {self.target}, {state}, {toxics}>"


def _ends(group: BaseExceptionGroup[LinkOver]) -> End:
    ends = {each.end for each in group.exceptions if isinstance(each, LinkOver)}
    return End.RESET if End.RESET in ends else End.CLOSE


class _Flow:
    """One direction of one link."""

    def __init__(
        self,
        proxy: ChaosProxy,
        toward: Toward,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._proxy = proxy
        self._toward: Toward = toward
        self._number = number
        self._reader = reader
        self._writer = writer
        self._read: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WAITING)
        self._toxics: tuple[Toxic, ...] = ()
        self._lanes: tuple[Lane, ...] = ()
        self._loop = asyncio.get_running_loop()

    async def take(self) -> None:
        """Read until the end, and note when it came."""
        while data := await self._reader.read(BLOCK):
            await self._read.put((self._loop.time(), data))
        await self._read.put((self._loop.time(), b""))

    async def give(self) -> None:
        """Pass on what was read, when and as the toxics say."""
        while True:
            at, data = await self._read.get()
            while any(each.toxic.cut for each in self._current()):
                await self._proxy.changed()
            if not data:
                await self._give_end()
                return
            if self._toward == "client" and self._proxy.drops():
                raise LinkOver(End.RESET)
            if (end := await self._perform(data, self._loop.time() - at)) is not None:
                await self._leave(end)
                return

    async def _give_end(self) -> None:
        await self._proxy.changed(sum(each.toxic.slow_close for each in self._current()))
        if self._writer.can_write_eof():
            self._writer.write_eof()

    async def _perform(self, data: bytes, waited: float) -> End | None:
        """Pass *data* on; give the end of this direction, if this was it."""
        planned = self._current()
        for step in through(planned, data, waited):
            if isinstance(step, End):
                return step
            if isinstance(step, bytes):
                self._writer.write(step)
                self._proxy.facts.sent[self._toward] += len(step)
                await self._writer.drain()
            # What was begun under toxics that are gone is brought to its end at once.
            elif self._toxics is self._proxy.toxics:
                await self._proxy.changed(step)
        return None

    async def _leave(self, end: End) -> None:
        """Pass nothing on any more; go when the sender has gone."""
        if end in (End.RESET, End.CLOSE):
            raise LinkOver(end)
        if end is End.HALF_CLOSE:
            self._writer.write_eof()
        while (await self._read.get())[1]:
            pass
        # Where nothing passes, a client that goes would never be missed.
        if end is End.HANG and self._toward == "server":
            raise LinkOver(End.CLOSE)

    def _current(self) -> tuple[Lane, ...]:
        """Give the lanes of the toxics that there are now; those that stay go on as they were."""
        if self._toxics is not self._proxy.toxics:
            self._toxics = self._proxy.toxics
            old = {each.toxic: each for each in self._lanes}
            mine = [each for each in self._toxics if self._is_harmed_by(each)]
            self._lanes = tuple(
                old.get(each) or Lane(each, self._random(f"{self._toward} {each}")) for each in mine
            )
        return self._lanes

    def _is_harmed_by(self, toxic: Toxic) -> bool:
        drawn = self._random(str(toxic)).random()
        return toxic.concerns(self._toward) and drawn < toxic.share

    def _random(self, name: str) -> Random:
        return Random(f"{self._proxy.seed} {self._number} {name}")


@dataclass(frozen=True, slots=True)
class Remote:
    """A chaos proxy in another thread, for tests that do not wait; all is done when it returns."""

    proxy: ChaosProxy

    @property
    def base(self) -> str:
        """The scheme, host and port of its URLs."""
        return self.proxy.base

    @property
    def facts(self) -> Facts:
        """What has happened so far."""
        return self.proxy.facts

    def set(self, *toxics: Toxic) -> None:
        """Harm all connections by *toxics*, and by nothing else."""

        async def change() -> None:
            """Do it in the proxy's own thread."""
            self.proxy.toxics = toxics

        self._run(change())

    def down(self) -> None:
        """Refuse connections, and reset all that there are."""
        self._run(self.proxy.down())

    def up(self) -> None:
        """Take connections again."""
        self._run(self.proxy.up())

    def reset(self) -> None:
        """Reset all connections that there are."""
        self._run(self.proxy.reset())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        assert self.proxy.loop is not None
        asyncio.run_coroutine_threadsafe(work, self.proxy.loop).result(timeout=10)


@contextlib.contextmanager
def in_thread(proxy: ChaosProxy) -> Iterator[Remote]:
    """Run *proxy* in a thread with a loop of its own."""
    started: concurrent.futures.Future[asyncio.Event] = concurrent.futures.Future()

    async def serve() -> None:
        """Serve until the block ends."""
        stop = asyncio.Event()
        async with proxy:
            started.set_result(stop)
            await stop.wait()

    def run() -> None:
        """Be the thread."""
        try:
            asyncio.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=run, name="chaos proxy")
    thread.start()
    try:
        stop = started.result(timeout=10)
        try:
            yield Remote(proxy)
        finally:
            assert proxy.loop is not None
            proxy.loop.call_soon_threadsafe(stop.set)
    finally:
        thread.join(timeout=10)
