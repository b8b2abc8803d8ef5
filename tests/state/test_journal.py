"""What waits for the state backend is lost neither with a process nor with its last line."""

import asyncio
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from vastproxy.state.base import Account, Claim, Hold, Window, money
from vastproxy.state.journal import Journal
from vastproxy.state.records import dumped

SPRING = Account("campaign", "spring")
ROOT = Path(__file__).resolve().parents[2]

WRITER = """
import asyncio, sys
from pathlib import Path
from vastproxy.state.base import Account, Hold, money
from vastproxy.state.journal import Journal

async def main() -> None:
    journal = Journal(Path(sys.argv[1]))
    for at in range(int(sys.argv[2])):
        await journal.add([Hold(Account("campaign", "spring"), f"{sys.argv[3]}{at}", (money(at),))])
        print(at, flush=True)
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
"""A process that keeps entries, tells of each when it is safe, and then waits for its end."""


def a_hold(operation: str = "o", amount: int = 1) -> Hold:
    """Build a hold of a campaign's money."""
    return Hold(SPRING, operation, (money(amount),))


def operations(journal: Journal) -> list[str]:
    """Give the operations that wait, the oldest first."""
    return [each.operation for each in journal.oldest(len(journal))]


def files(directory: Path) -> list[Path]:
    """Give the files of journals in *directory*."""
    return sorted(directory.glob("*"))


@contextmanager
def a_writer(directory: Path, count: int, name: str = "w") -> Iterator[subprocess.Popen[str]]:
    """Run a process that keeps *count* entries, until it is safe that it did; kill it then."""
    process = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-c", WRITER, str(directory), str(count), name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        try:
            for line in process.stdout:
                if line == "ready\n":
                    break
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


async def test_first_in_first_out() -> None:
    """Entries come out as they went in, and stay until they are settled."""
    journal = Journal()
    await journal.add([a_hold("a"), a_hold("b")])
    await journal.add([a_hold("c")])

    assert ["a", "b"] == [each.operation for each in journal.oldest(2)]
    assert ["a", "b", "c"] == operations(journal)
    journal.settled(2)
    assert ["c"] == operations(journal)
    assert [] == journal.oldest(0)
    assert 1 == len(journal)


async def test_next_process_takes_over(tmp_path: Path) -> None:
    """What a process left, the next one has, with accounts, windows and amounts."""
    viewer = Account("viewer", "v")
    capped = Hold(viewer, "x", (Claim("r60000|/r|", 1, 3, Window("rolling", 60_000)),), lease="")
    one = Journal(tmp_path)
    await one.add([a_hold("a", 7)])
    await one.add([capped])
    with capture_logs():
        one.close()
    with capture_logs() as logs:
        other = Journal(tmp_path)
    first, second = other.oldest(2)

    assert (SPRING, "a", (money(7),)) == (first.account, first.operation, first.claims)
    assert (viewer, "x") == (second.account, second.operation)
    assert (Claim("r60000|/r|", 1, None, Window("rolling", 60_000)),) == second.claims
    assert [("journal.found", 2)] == [(each["event"], each["entries"]) for each in logs]
    with capture_logs():
        other.close()


async def test_files_go_when_all_is_written(tmp_path: Path) -> None:
    """When nothing waits any more the files left by others go, and the own one is empty."""
    one = Journal(tmp_path)
    await one.add([a_hold()])
    with capture_logs():
        one.close()
        other = Journal(tmp_path)
    await other.add([a_hold("b")])
    sizes = [each.stat().st_size > 0 for each in files(tmp_path)]
    other.settled(1)
    kept = len(files(tmp_path))
    other.settled(1)
    left = [each.stat().st_size for each in files(tmp_path)]
    other.close()

    assert [True, True] == sizes
    assert 2 == kept
    assert [0] == left
    assert [] == files(tmp_path)


async def test_clean_end_leaves_nothing(tmp_path: Path) -> None:
    """A process that ends with nothing waiting leaves no file, and says nothing."""
    with capture_logs() as logs:
        Journal(tmp_path).close()

    assert [] == files(tmp_path)
    assert [] == logs


async def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    """While a process runs nobody takes its entries; each has a file of its own."""
    one = Journal(tmp_path)
    await one.add([a_hold("a")])
    other = Journal(tmp_path)
    await other.add([a_hold("b")])

    assert (["a"], ["b"]) == (operations(one), operations(other))
    assert 2 == len(files(tmp_path))
    one.settled(1)
    other.settled(1)
    one.close()
    other.close()
    assert [] == files(tmp_path)


def test_killed_process(tmp_path: Path) -> None:
    """What a process had kept when it was killed, the next one has; nobody takes it before."""
    with a_writer(tmp_path, 20):
        meanwhile = Journal(tmp_path)
        before = operations(meanwhile)
        meanwhile.close()
    with capture_logs():
        after = Journal(tmp_path)

    assert [] == before
    assert [f"w{at}" for at in range(20)] == operations(after)
    after.settled(20)
    after.close()
    assert [] == files(tmp_path)


def test_process_killed_with_nothing_waiting(tmp_path: Path) -> None:
    """The empty file of a process that was killed goes with the start of the next one."""
    with a_writer(tmp_path, 0):
        pass
    left = files(tmp_path)
    with capture_logs() as logs:
        after = Journal(tmp_path)

    assert 1 == len(left)
    assert left[0] not in files(tmp_path)
    assert [] == logs
    after.close()


async def test_taken_over_twice(tmp_path: Path) -> None:
    """What nobody could write goes from process to process, and is there once."""
    for _ in range(3):
        with capture_logs():
            journal = Journal(tmp_path)
            if not len(journal):
                await journal.add([a_hold("a"), a_hold("b")])
            found = operations(journal)
            journal.close()

        assert ["a", "b"] == found


@pytest.mark.parametrize(
    "damage",
    [
        b'[["c","spring","half","864',
        b"\x00" * 4096,
        b"\xff\xfe\n",
        b"[]]\n",
        b'[["c","spring","o",1,{"no window":1}]]\n',
        b'[["c","spring","o",1,{"spent":-1}]]\n',
        b'[["c","spring",7,1,{"spent":1}]]\n',
        b'[["c","spring","o",1,{"spent":1e999}]]\n',
        b'[["v","v","o",1,{"cday America||":1}]]\n',
        b"[" * 100_000,
        b"5\n",
        b"\n",
    ],
    ids=lambda each: repr(each[:30]),
)
async def test_damaged_lines(tmp_path: Path, damage: bytes) -> None:
    """Of a damaged file every line that can be read is used, and the others are told."""
    good = [f"{dumped([a_hold(each)])}\n".encode() for each in "ab"]
    lines = good[0] + (damage if damage.endswith(b"\n") else damage + b"\n") + good[1]
    (tmp_path / "1-1.jsonl").write_bytes(lines + damage)
    with capture_logs() as logs:
        journal = Journal(tmp_path)

    assert ["a", "b"] == operations(journal)
    assert {"journal.damaged", "journal.found"} == {each["event"] for each in logs}
    assert f"{tmp_path / '1-1.jsonl'}:2" == logs[0]["at"]
    journal.settled(2)
    journal.close()
    assert [] == files(tmp_path)


def test_line_written_while_killed(tmp_path: Path) -> None:
    """Every line that was told to be safe is there, wherever in the next one the end came."""
    whole = f"{dumped([a_hold('a')])}\n{dumped([a_hold('b')])}\n".encode()
    first = whole.index(b"\n") + 1
    found = []
    for end in range(first, len(whole)):
        (tmp_path / f"1-{end}.jsonl").write_bytes(whole[:end])
        with capture_logs():
            journal = Journal(tmp_path)
        found.append(operations(journal))
        journal.settled(len(journal))
        journal.close()

    # The line's end may be missing: what stands there is whole without it.
    assert [["a"]] * (len(found) - 1) + [["a", "b"]] == found


async def test_full() -> None:
    """Beyond the limit nothing is kept, and that is counted and told, now and then."""
    journal = Journal(max_entries=2)
    with capture_logs() as logs:
        await journal.add([a_hold("a"), a_hold("b")])
        for _ in range(999):
            await journal.add([a_hold("c")])
        await journal.add([a_hold("d"), a_hold("e")])

    assert ["a", "b"] == operations(journal)
    assert 1001 == journal.dropped
    assert [("journal.full", "error", 1)] == [
        (each["event"], each["log_level"], each["dropped"]) for each in logs
    ]
    assert "<Journal in memory, waiting: 2, dropped: 1001>" == repr(journal)


async def test_full_disk(tmp_path: Path) -> None:
    """A disk that is full costs the safety of an entry, and nothing else: no half line stays."""
    journal = Journal(tmp_path)
    await journal.add([a_hold("a")])
    [path] = files(tmp_path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        with capture_logs() as logs:
            await journal.add([a_hold("b")])
        torn = path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    await journal.add([a_hold("c")])

    assert ["a", "b", "c"] == operations(journal)
    assert before == torn
    assert [("journal.not_written", "error")] == [(e["event"], e["log_level"]) for e in logs]
    with capture_logs() as logs:
        journal.close()
    assert [("journal.left", 3, "on disk, but for 1")] == [
        (e["event"], e["entries"], e["kept"]) for e in logs
    ]
    with capture_logs():
        again = Journal(tmp_path)

    assert ["a", "c"] == operations(again)
    again.settled(2)
    again.close()


async def test_many_at_once(tmp_path: Path) -> None:
    """Entries that are kept at the same time are each a line of their own."""
    journal = Journal(tmp_path)
    async with asyncio.TaskGroup() as group:
        for at in range(50):
            group.create_task(journal.add([a_hold(f"{at}", at), a_hold(f"{at}b", at)]))
    with capture_logs():
        journal.close()
        again = Journal(tmp_path)

    assert {f"{at}{b}" for at in range(50) for b in ("", "b")} == set(operations(again))
    assert 100 == len(again)
    again.settled(100)
    again.close()


async def test_waits_once(tmp_path: Path) -> None:
    """However often an operation is brought, it takes one place, in memory and on disk."""
    journal = Journal(tmp_path, max_entries=3)
    for _ in range(5):
        await journal.add([a_hold("a"), a_hold("b"), a_hold("a")])
    await journal.add([a_hold("b"), a_hold("c")])
    await journal.add([Hold(Account("campaign", "other"), "a", (money(1),))])

    assert ["a", "b", "c"] == operations(journal)
    assert 1 == journal.dropped
    with capture_logs():
        journal.close()
        again = Journal(tmp_path)
    assert ["a", "b", "c"] == operations(again)
    await again.add([a_hold("c")])
    assert 3 == len(again)
    again.settled(3)
    await again.add([a_hold("c")])
    assert ["c"] == operations(again)
    with capture_logs():
        again.close()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator["Disk"]:
    """Give a disk that takes as long as the test likes."""
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    yield disk
    disk.ready.set()


class Disk:
    """Is ready when the test says so, and counts how often it was asked."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.asked = 0
        self.broken = False

    def fsync(self, _file: int) -> None:
        """Wait until the disk is ready."""
        self.asked += 1
        self.ready.wait(10)
        if self.broken:
            raise OSError("broken")


async def turns() -> None:
    """Let others run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_who_brings_it_again_waits_for_the_disk(tmp_path: Path, disk: Disk) -> None:
    """An operation that is brought again is not told to be safe before it is, whoever goes."""
    journal = Journal(tmp_path)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(journal.add([a_hold("a")]))
        await turns()
        again = group.create_task(journal.add([a_hold("a")]))
        await turns()
        found = (first.done(), again.done())
        first.cancel()
        await turns()
        waits = not again.done()
        disk.ready.set()
    await journal.add([a_hold("a")])

    assert (False, False) == found
    assert waits
    assert 1 == disk.asked
    journal.settled(1)
    journal.close()


async def test_one_fsync_for_all_who_wait(tmp_path: Path, disk: Disk) -> None:
    """While the disk is busy, others gather, and the next fsync is for all of them."""
    journal = Journal(tmp_path)
    async with asyncio.TaskGroup() as group:
        group.create_task(journal.add([a_hold("first")]))
        await turns()
        rest = [group.create_task(journal.add([a_hold(f"{at}")])) for at in range(200)]
        await turns()
        done = [each for each in rest if each.done()]
        disk.ready.set()

    assert [] == done
    assert 2 == disk.asked
    assert 201 == len(journal)
    journal.settled(201)
    journal.close()


async def test_broken_disk(tmp_path: Path, disk: Disk) -> None:
    """A disk that fails costs those who wait their safety, is told, and is asked again later."""
    journal = Journal(tmp_path)
    disk.broken = True
    disk.ready.set()
    with capture_logs() as logs:
        await journal.add([a_hold("a")])
    disk.broken = False
    await journal.add([a_hold("b")])

    assert [("journal.not_written", "broken")] == [(e["event"], e["problem"]) for e in logs]
    assert 2 == disk.asked
    assert ["a", "b"] == operations(journal)
    journal.settled(2)
    journal.close()


async def test_file_that_cannot_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files cannot be emptied or removed, that is told, and the journal goes on."""
    (tmp_path / "1-1.jsonl").write_text(f"{dumped([a_hold('a')])}\n")
    with capture_logs():
        journal = Journal(tmp_path)

    def fail(*_: object, **_named: object) -> None:
        """Fail as a disk does."""
        raise OSError("read only")

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(os, "ftruncate", fail)
        patched.setattr(Path, "unlink", fail)
        journal.settled(1)
        journal.close()
    own = [each for each in files(tmp_path) if each.name != "1-1.jsonl"]

    assert [str(own[0]), str(tmp_path / "1-1.jsonl"), str(own[0])] == [e["at"] for e in logs]
    assert {("journal.not_emptied", "error")} == {(e["event"], e["log_level"]) for e in logs}
    with capture_logs():
        again = Journal(tmp_path)
    assert ["a"] == operations(again)
    again.settled(1)
    again.close()
    assert [] == files(tmp_path)


async def test_file_that_was_removed_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process took over a file that is being made, and removed it, one is made."""
    others: list[Journal] = []
    lock = fcntl.flock

    def flock(file: int, how: int) -> None:
        """Lock; let another process start before the first time."""
        if not others:
            monkeypatch.setattr(fcntl, "flock", lock)
            others.append(Journal(tmp_path))
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    journal = Journal(tmp_path)
    await journal.add([a_hold("kept")])
    others[0].close()
    [path] = files(tmp_path)
    assert "kept" in path.read_text()
    with capture_logs():
        journal.close()
        again = Journal(tmp_path)

    assert ["kept"] == operations(again)
    again.settled(1)
    again.close()


async def test_file_that_was_taken_while_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another process has just taken over a file that is being made, another is made."""
    times = iter([1, 1, 2])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    one, other = Journal(tmp_path), Journal(tmp_path)

    assert [f"{os.getpid()}-1.jsonl", f"{os.getpid()}-2.jsonl"] == [
        each.name for each in files(tmp_path)
    ]
    one.close()
    other.close()


async def test_end_with_entries_in_memory() -> None:
    """A process without a directory says in the end what it could not write."""
    journal = Journal()
    await journal.add([a_hold()])
    with capture_logs() as logs:
        journal.close()

    assert [("journal.left", "error", 1)] == [
        (each["event"], each["log_level"], each["entries"]) for each in logs
    ]
    assert "nowhere: the setting `journal` names no directory" == logs[0]["kept"]


def test_directory(tmp_path: Path) -> None:
    """The directory is made where it is missing; what is no directory is an error at the start."""
    journal = Journal(tmp_path / "a" / "b")
    [path] = files(tmp_path / "a" / "b")

    assert f"<Journal in {path}, waiting: 0, dropped: 0>" == repr(journal)
    assert "0o600" == oct(path.stat().st_mode & 0o777)
    journal.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        Journal(tmp_path / "file")
