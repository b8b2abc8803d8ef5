"""
What was shown while the state backend was away, until it is written.

Rule 1: an entry is a confirmation, with the operation id that it had from the start. Writing it
twice counts once, so nothing is lost where nobody knows whether a write arrived.
Rule 2: with a directory, an entry is on disk before its beacon is answered; without, it lives as
long as the process.
Rule 3: one file for each process, locked while that runs. Files that nobody has locked were left
by a process that died; the next one takes them over.
"""

import asyncio
import errno
import fcntl
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from vastproxy.errors import StateBackendError
from vastproxy.state.base import Hold
from vastproxy.state.records import dumped, loaded

MAX_ENTRIES = 1_000_000
"""Confirmations that wait, at about 500 bytes each: an hour of outage at 270 each second."""


class Journal:
    """
    Confirmations that wait for the state backend.

    *directory* is made if need be; None: memory only. Raises OSError where it cannot be written.
    """

    def __init__(self, directory: Path | None = None, *, max_entries: int = MAX_ENTRIES) -> None:
        self._waiting: deque[Hold] = deque()
        self._max_entries = max_entries
        self._log = structlog.get_logger("vastproxy.state")
        self._file: int | None = None
        self._path: Path | None = None
        self._adopted: list[tuple[Path, int]] = []
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
                self._waiting.extend(loaded(line, int(time.time() * 1000)))
            except StateBackendError as error:
                # The last line may be half written: then its beacon was never answered.
                self._log.warning("journal.damaged", at=f"{path}:{number}", problem=str(error))

    async def add(self, holds: Sequence[Hold]) -> None:
        """Keep *holds*; return when they are as safe as can be: a full disk is told, not raised."""
        if len(self._waiting) + len(holds) > self._max_entries:
            self.dropped += len(holds)
            if self.dropped % 1000 == len(holds) % 1000:
                self._log.error("journal.full", dropped=self.dropped)
            return
        self._waiting.extend(holds)
        if self._file is not None:
            try:
                _append(self._file, f"{dumped(holds)}\n".encode())
                await asyncio.to_thread(os.fsync, self._file)
            except OSError as error:
                self._log.error("journal.not_written", at=str(self._path), problem=str(error))

    def oldest(self, count: int) -> list[Hold]:
        """Give up to *count* entries that have waited longest; they stay."""
        return [self._waiting[at] for at in range(min(count, len(self._waiting)))]

    def settled(self, count: int) -> None:
        """Remove the *count* oldest entries: they are written."""
        for _ in range(count):
            self._waiting.popleft()
        if not self._waiting:
            self._forget_files()

    def _forget_files(self) -> None:
        if self._file is not None:
            os.ftruncate(self._file, 0)
        for path, file in self._adopted:
            path.unlink(missing_ok=True)
            os.close(file)
        self._adopted.clear()

    def close(self) -> None:
        """Let go of the files; what still waits stays in them for the next process."""
        if self._waiting:
            kept = "on disk" if self._path else "nowhere: the setting `journal` names no directory"
            self._log.error("journal.left", entries=len(self._waiting), kept=kept)
        elif self._path is not None:
            self._path.unlink(missing_ok=True)
        for _, file in self._adopted:
            os.close(file)
        if self._file is not None:
            os.close(self._file)
        self._file = None
        self._adopted.clear()

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        where = self._path or "memory"
        return f"<Journal in {where}, waiting: {len(self)}, dropped: {self.dropped}>"


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
    """Open *path* for appending, for this process alone; BlockingIOError if another has it."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise
    return file
