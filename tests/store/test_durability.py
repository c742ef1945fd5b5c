"""What is acknowledged is kept, once, whatever happens: kills, many threads, many processes, readers meanwhile."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lowrank_align.store import Judgement, Record, Stale, Store

Added = Callable[..., Record]
TIE = Judgement("tie")

# Votes on new records for ever, or `count` of them, and says each vote's ids once it is acknowledged.
VOTER = """
import sys
from lowrank_align.store import Completion, Judgement, Record, Store, new_id
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = Store(path)
while count:
    count -= 1
    record, event = Record("pair", name, (Completion("a" * 3000), Completion("b"))), new_id()
    store.add(record)
    for again in range(2):  # as a page does that has not heard of its success
        store.judge(record.id, name, Judgement("tie"), event_id=event)
    print(record.id, event, flush=True)
"""


def voter(path: Path, name: str, count: int) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", VOTER, str(path), name, str(count)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("votes", [1, 8, 21])
def test_a_killed_process_loses_no_vote_that_it_acknowledged(path: Path, votes: int) -> None:
    child = voter(path, "ann", -1)
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(votes)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.readlines()  # what it said before the kill reached it
    child.wait()
    child.stdout.close()
    acknowledged = [tuple(line.split()) for line in said if line.endswith("\n")]
    with Store(path) as store:
        found = [(e.record.id, store.history(e.record.id, "ann")) for e in store.entries(newest_first=False)]
        assert all(len(history) == 1 for _, history in found)
        kept = [(record_id, history[0].id) for record_id, history in found]
        assert kept[: len(acknowledged)] == acknowledged
        assert len(acknowledged) >= votes and len(kept) - len(acknowledged) <= 1  # one more may be on the disk already
        store.note("works", True)


def test_eight_processes_at_once_lose_and_double_nothing(path: Path) -> None:
    Store(path).close()
    children = [voter(path, f"annotator {i}", 6) for i in range(8)]
    said = set()
    for child in children:
        out, _ = child.communicate()
        assert child.returncode == 0
        said |= {line.split()[0] for line in out.splitlines()}
    with Store(path) as store:
        assert {e.record.id for e in store.entries()} == said
        assert (store.count(), len(said), len(store.annotators())) == (48, 48, 8)
        assert {e.version for e in store.entries()} == {1}


def test_processes_that_make_the_same_file_at_once_make_one(path: Path) -> None:
    children = [voter(path, f"annotator {i}", 1) for i in range(4)]
    assert [child.communicate() and child.returncode for child in children] == [0] * 4
    with Store(path) as store:
        assert store.count() == 4
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_eight_threads_vote_while_others_read(store: Store, added: Added) -> None:
    """Each annotator votes on every record. A reader sees each record's votes grow, never shrink."""
    records = [added(f"{i}", "b") for i in range(10)]
    done = threading.Event()

    def vote(name: str) -> None:
        for record in records:
            version = store.judge(record.id, name, TIE)
            store.judge(record.id, name, Judgement("bad"), expected_version=version)

    def read() -> list[int]:
        counts = [store.count()]
        while not done.is_set():
            counts.append(store.count())
            store.entries(limit=5, text="b")
        return counts

    with ThreadPoolExecutor(10) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        votes = [pool.submit(vote, f"annotator {i}") for i in range(8)]
        try:
            for future in votes:
                future.result()
        finally:
            done.set()
        for reader in readers:
            assert reader.result() == sorted(reader.result())
    assert {(e.version, e.judgement.verdict) for e in store.entries()} == {(2, "bad")}
    assert store.count() == 80


def test_of_many_who_answer_the_same_version_one_wins(store: Store, added: Added) -> None:
    record = added()
    start = threading.Barrier(8)

    def vote(number: int) -> int:
        start.wait()
        try:
            return store.judge(record.id, "ann", Judgement("tie", reason=str(number)))
        except Stale:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(vote, range(8))) == [0] * 7 + [1]
    assert len(store.history(record.id, "ann")) == 1


def test_the_same_event_from_many_threads_is_one(store: Store, added: Added) -> None:
    record = added()
    with ThreadPoolExecutor(8) as pool:
        votes = pool.map(lambda _: store.judge(record.id, "ann", TIE, event_id="e" * 32), range(16))
        assert set(votes) == {1}
    assert len(store.history(record.id, "ann")) == 1


def test_an_open_reader_in_another_process_does_not_lose_a_vote(store: Store, path: Path, added: Added) -> None:
    """A second store reads every row again and again while this one writes."""
    record = added()
    with Store(path, create=False) as other, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: [len(other.entries()) for _ in range(50)])
        for version in range(30):
            store.judge(record.id, "ann", TIE, expected_version=version)
        assert set(reading.result()) <= {0, 1}
        assert len(other.history(record.id, "ann")) == 30


def test_a_vote_is_on_the_disk_before_it_is_acknowledged(path: Path) -> None:
    """kill -9 cannot tell: the system keeps what a killed process wrote. So its system calls are looked at: after the
    last write to the database there is a sync of it, and the journal is gone and its folder synced, before the answer.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not here to look at system calls with")
    log = path.with_name("calls")
    words = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=write,pwrite64,fsync,fdatasync,unlink"]
    run = subprocess.run(
        [*words, sys.executable, "-c", VOTER, str(path), "ann", "1"], capture_output=True, text=True, env=os.environ
    )
    if run.returncode and "ptrace" in run.stderr:
        pytest.skip(f"strace may not trace here: {run.stderr.splitlines()[0]}")
    assert run.returncode == 0, run.stderr
    calls = log.read_text().splitlines()
    answer = next(i for i, call in enumerate(calls) if "write(1" in call and call.split("write(1")[1].count('"'))
    before = calls[:answer]
    written = max(i for i, call in enumerate(before) if "pwrite64" in call and f"{path}>" in call)
    synced = [i for i, call in enumerate(before) if "sync(" in call and f"{path}>" in call]
    gone = max(i for i, call in enumerate(before) if "unlink" in call and f"{path}-journal" in call)
    folder = [i for i, call in enumerate(before) if "sync(" in call and f"{path.parent}>" in call]
    assert written < synced[-1] < gone < folder[-1]
