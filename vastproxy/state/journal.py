"""
What was shown while the state backend was away, until it is written.

Rule 1: an entry is a confirmation, with the operation id that it had from the start. Writing it
twice counts once, so nothing is lost where nobody knows whether a write arrived.
Rule 2: with a directory, an entry is on disk before its beacon is answered; without, it lives as
long as the process.
Rule 3: an operation waits once, however often its beacon comes. Who brings it again is told when it
is as safe as for the first time.
Rule 4: one file for each process, locked while that runs. Files that nobody has locked were left
by a process that died; the next one takes them over.
"""

import asyncio
import errno
import fcntl
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.state.base import Account, Hold
from vastproxy.state.records import dumped, loaded

MAX_ENTRIES = 1_000_000
"""Confirmations that wait, at about 700 bytes each: an hour of outage at 270 each second."""


class Journal:
    """
    Confirmations that wait for the state backend.

    *directory* is made if need be; None: memory only. Raises OSError where it cannot be written.
    """

    def __init__(self, directory: Path | None = None, *, max_entries: int = MAX_ENTRIES) -> None:
        self._waiting: OrderedDict[tuple[Account, str], Hold] = OrderedDict()
        self._max_entries = max_entries
        self._log = structlog.get_logger("vastproxy.state")
        self._file: int | None = None
        self._path: Path | None = None
        self._adopted: list[tuple[Path, int]] = []
        self._written = 0
        """Lines that were written to the file; so many of them are on disk:"""
        self._safe = 0
        self._syncing: asyncio.Future[None] | None = None
        self._unwritten = 0
        """Entries that wait, and are not on disk."""
        self.dropped = 0
        """Entries that were lost because too many waited."""
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._adopt(directory)
            self._path, self._file = _own_file(directory)

    def _adopt(self, directory: Path) -> None:
        """Take over what processes that died have left."""
        for path in sorted(directory.glob("*.jsonl")):
            with suppress(BlockingIOError, FileNotFoundError):
                file = _locked(path)
                self._adopted.append((path, file))
                self._read(path)
        if self._waiting:
            self._log.warning("journal.found", entries=len(self._waiting), at=str(directory))
        else:
            # A process that was killed while nothing waited leaves an empty file.
            self._forget_files()

    def _read(self, path: Path) -> None:
        # A disk that lost its power may hold anything: it costs the line, never the start.
        text = path.read_text("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                self._waiting.update(_by_operation(loaded(line, int(time.time() * 1000))))
            except StateBackendError as error:
                # The last line may be half written: then its beacon was never answered.
                self._log.warning("journal.damaged", at=f"{path}:{number}", problem=str(error))

    async def add(self, holds: Sequence[Hold]) -> None:
        """Keep *holds*; return when they are as safe as can be: a full disk is told, not raised."""
        new = {key: each for key, each in _by_operation(holds).items() if key not in self._waiting}
        if new and len(self._waiting) + len(new) > self._max_entries:
            self.dropped += len(new)
            if self.dropped % 1000 == len(new) % 1000:
                self._log.error("journal.full", dropped=self.dropped)
        elif new:
            self._waiting.update(new)
            self._write(tuple(new.values()))
        await self._synced()

    def _write(self, holds: Sequence[Hold]) -> None:
        if self._file is not None:
            try:
                _append(self._file, f"{dumped(holds)}\n".encode())
                self._written += 1
            except OSError as error:
                self._tell_unwritten(len(holds), error)

    def _tell_unwritten(self, count: int, error: BaseException) -> None:
        """Tell the first of a thousand: a disk that is full refuses every beacon."""
        before, self._unwritten = self._unwritten, self._unwritten + count
        if before // 1000 < self._unwritten // 1000 or not before:
            self._log.error(
                "journal.not_written",
                at=str(self._path),
                problem=str(error),
                entries=self._unwritten,
            )

    async def _synced(self) -> None:
        """Return when what is written by now is on disk."""
        due = self._written
        while self._file is not None and self._safe < due:
            if self._syncing is None:
                self._syncing = self._sync(self._file)
            # Not awaited itself: who is cut off must not cut off the others.
            await asyncio.wait([self._syncing])

    def _sync(self, file: int) -> asyncio.Future[None]:
        """Put *file* on disk, once for all who wait: an outage has hundreds of them in a second."""
        written = self._written

        def ended(syncing: asyncio.Future[None]) -> None:
            self._syncing = None
            # Also where it failed: the next one would say that all is well, and it is not.
            self._safe = written
            if error := syncing.exception():
                self._tell_unwritten(1, error)

        syncing = asyncio.get_running_loop().run_in_executor(None, os.fsync, file)
        syncing.add_done_callback(ended)
        return syncing

    def oldest(self, count: int) -> list[Hold]:
        """Give up to *count* entries that have waited longest; they stay."""
        return list(islice(self._waiting.values(), count))

    def settled(self, count: int) -> None:
        """Remove the *count* oldest entries: they are written."""
        for _ in range(count):
            self._waiting.popitem(last=False)
        if not self._waiting:
            self._forget_files()

    def _forget_files(self) -> None:
        """Empty the files. Where that fails, the next process writes again what counts once."""
        self._unwritten = 0
        if self._file is not None:
            with self._told(self._path):
                os.ftruncate(self._file, 0)
        for path, file in self._adopted:
            with self._told(path):
                path.unlink(missing_ok=True)
            os.close(file)
        self._adopted.clear()

    @contextmanager
    def _told(self, path: Path | None) -> Iterator[None]:
        """Tell that a file could not be emptied, and go on."""
        try:
            yield
        except OSError as error:
            self._log.error("journal.not_emptied", at=str(path), problem=str(error))

    def close(self) -> None:
        """Let go of the files; what still waits stays in them for the next process."""
        if self._waiting:
            self._log.error("journal.left", entries=len(self._waiting), kept=self._kept())
        elif self._path is not None:
            with self._told(self._path):
                self._path.unlink(missing_ok=True)
        for _, file in self._adopted:
            os.close(file)
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._adopted.clear()

    def _kept(self) -> str:
        """Say where what still waits is kept."""
        if self._path is None:
            return "nowhere: the setting `journal` names no directory"
        return f"on disk, but for {self._unwritten}" if self._unwritten else "on disk"

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        where = self._path or "memory"
        return f"<Journal in {where}, waiting: {len(self)}, dropped: {self.dropped}>"


def _by_operation(holds: Sequence[Hold]) -> dict[tuple[Account, str], Hold]:
    return {(each.account, each.operation): each for each in holds}


def _own_file(directory: Path) -> tuple[Path, int]:
    """Make a file of this process."""
    while True:
        path = directory / f"{os.getpid()}-{time.time_ns()}.jsonl"
        # Between its making and its locking, a process that starts as well may have taken it over.
        with suppress(BlockingIOError):
            return path, _locked(path)


def _append(file: int, line: bytes) -> None:
    """Write *line* wholly or not at all: half a line would spoil the next."""
    end = os.fstat(file).st_size
    if os.write(file, line) < len(line):
        os.ftruncate(file, end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _locked(path: Path) -> int:
    """
    Open *path* for appending, for this process alone.

    Raises BlockingIOError if another has it, or has just had it, and removed it.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What is written to a file without a name ends with the process.
        ours = os.path.samestat(os.fstat(file), path.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        os.close(file)
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
    return file
