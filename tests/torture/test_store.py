"""The store under several writers that are killed, under sixteen at once, and its system calls."""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import EnvironmentProblem
from lowrank_align.store import Store, new_id
from tests.torture.clients import TIE, WRITERS, Children, Clients, record_of

Times = Callable[[int, int], int]
Tally = Callable[..., None]
SECTION = "Store"
ONCE = "every vote is there once"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")


@needs_fork
def test_kills_among_several_writers_lose_and_double_nothing(
    path: Path, children: Children, times: Times, tally: Tally
) -> None:
    """One of four is killed, or all of them at once; the killed begin again at once, while the others go on."""
    kills, moments, journals = times(6, 500), random.Random(7), 0
    clients = Clients(path, children, patience=30.0)
    for number in range(kills):
        victims = list(clients.names) if number % 4 == 3 else [moments.choice(clients.names)]
        clients.wait_for_more()
        time.sleep(moments.uniform(0, 0.05))
        clients.kill(victims)
        journals += len(victims) == WRITERS and path.with_name(f"{path.name}-journal").exists()
        for name in victims:
            clients.start(name)
    well = clients.end()
    faults, votes = clients.faults(), len(clients.lines("has"))
    note = f"{votes:,} votes, what was not acknowledged sent again; {journals} times a journal was left to roll back"
    held = kills - min(kills, len(faults) + (not well))
    fault = "SIGKILL of one of four writers, or of all at once, at random moments"
    tally(SECTION, fault, "no acknowledged vote lost, none doubled", held=held, of=kills, note=note)
    assert (faults, well) == ([], True)
    assert votes


@needs_fork
def test_sixteen_annotators_at_once(path: Path, children: Children, times: Times, tally: Tally) -> None:
    """A process for each, all on the same records, each in an order of its own."""
    annotators, votes = [f"annotator {n}" for n in range(16)], times(12, 1000)
    ids = [new_id() for _ in range(votes)]
    with Store(path) as store, store.batch():
        for record_id in ids:
            store.add(record_of(record_id))

    def vote(number: int, name: str) -> None:
        with Store(path) as store:
            for record_id in random.Random(name).sample(ids, votes):
                event = f"{record_id[:30]}{number:02x}"
                while True:
                    try:
                        assert store.judge(record_id, name, TIE, event_id=event) == 1
                        break
                    except EnvironmentProblem as busy:  # 30 s without a turn: SQLite gives none in order
                        with path.with_name("told").open("a") as file:
                            file.write(f"{busy}\n")

    begun = [children.begin(vote, number, name) for number, name in enumerate(annotators)]
    codes = {children.end(child) for child in begun}
    with closing(sqlite3.connect(path)) as connection:
        rows = Counter(connection.execute("SELECT record, annotator, version FROM events"))
    expected = {(record_id, name, 1) for record_id in ids for name in annotators}
    held = sum(rows[key] == 1 for key in expected)
    told = path.with_name("told").read_text().splitlines() if path.with_name("told").exists() else []
    note = (
        f"without any pause between votes {len(told)} had no turn for 30 s, were told so, and repeated" if told else ""
    )
    tally(SECTION, "16 annotators voting at once, a process each", ONCE, held=held, of=16 * votes, note=note)
    assert all("another program has been writing" in line for line in told)
    assert codes == {0}
    assert rows == Counter(expected)


def test_sixteen_annotators_at_their_desks(
    tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: Times, tally: Tally
) -> None:
    """The page's own way: each takes second opinions on pairs that another has judged, from a thread."""
    from lowrank_align.config import StudioSettings
    from lowrank_align.data.chat import Renderer
    from lowrank_align.studio.pairs import Plan
    from lowrank_align.studio.studio import Studio

    monkeypatch.chdir(tmp_path)
    votes = times(3, 40)
    settings = StudioSettings(model=tiny_base.name, store="studio.db", runs="runs")
    renderer = Renderer(tiny_base.tokenizer, max_length=tiny_base.context_tokens)
    studio = Studio(tiny_base, renderer, Store("studio.db"), settings)
    ids = [new_id() for _ in range(votes)]
    for record_id in ids:
        studio.store.add(record_of(record_id))
        studio.store.judge(record_id, "first", TIE)
    start = threading.Barrier(16)

    def sit(name: str) -> None:
        desk = studio.desk(name)
        desk.change_plan(Plan(second_opinions=True, repeats=False))
        start.wait()
        for number in range(votes):
            desk.vote(desk.next().id, "ab"[number % 2])

    annotators = [f"annotator {n}" for n in range(16)]
    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(sit, annotators))
        found = Counter((entry.annotator, entry.record.id, entry.version) for entry in studio.store.entries())
    finally:
        studio.close()
    expected = {(name, record_id, 1) for name in annotators for record_id in ids}
    held = sum(found[key] == 1 for key in expected)
    tally(SECTION, "16 annotators at the studio's desks at once, a thread each", ONCE, held=held, of=16 * votes)
    assert found == Counter(expected | {("first", record_id, 1) for record_id in ids})


VOTER = """
import sys
from lowrank_align.store import Completion, Judgement, Record, Store
with Store(sys.argv[1]) as store:
    for number in range(int(sys.argv[2])):
        record = Record("pair", "p", (Completion("a" * 3000), Completion("b")))
        store.add(record)
        store.judge(record.id, "ann", Judgement("tie"))
        print("acknowledged", flush=True)
"""


def test_every_vote_is_synced_before_it_is_acknowledged(path: Path, times: Times, tally: Tally) -> None:
    """The system calls between two acknowledgements: the last write to the file, a sync of it, the journal's end, and a
    sync of the folder, in this order, before the answer is written."""
    votes, log = times(3, 200), path.with_name("calls")
    fault, promise = "system calls of each vote, by strace", "a sync between the commit and the acknowledgement"
    strace = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=write,pwrite64,fsync,fdatasync,unlink"]
    words = [*strace, sys.executable, "-c", VOTER, str(path), str(votes)]
    run = subprocess.run(words, capture_output=True, text=True) if shutil.which("strace") else None
    if run is None or (run.returncode and "ptrace" in run.stderr):
        why = "strace is not here" if run is None else "strace may not trace here"
        tally(SECTION, fault, promise, held=0, of=0, note=f"not shown: {why}")
        pytest.skip(why)
    assert run.returncode == 0, run.stderr
    held, calls = 0, []
    for call in log.read_text().splitlines():
        calls.append(call)
        if "write(1" in call and "acknowledged" in call:
            held += in_order(calls, path)
            calls = []
    tally(SECTION, fault, promise, held=held, of=votes)
    assert held == votes


def in_order(calls: list[str], path: Path) -> bool:
    """Whether the last commit among the calls was durable at their end."""
    marks = [
        ("pwrite64(", f"{path}>"),
        ("sync(", f"{path}>"),
        ("unlink(", f"{path}-journal"),
        ("sync(", f"{path.parent}>"),
    ]
    last = [max((n for n, call in enumerate(calls) if kind in call and on in call), default=-1) for kind, on in marks]
    return last[0] >= 0 and last == sorted(last)
