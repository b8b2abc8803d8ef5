"""What waits for the state backend is lost neither with a process nor with its last line."""

import asyncio
import os
import resource
import signal
import subprocess
import sys
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
    with capture_logs():
        journal.close()
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
