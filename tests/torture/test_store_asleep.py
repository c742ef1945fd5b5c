"""A machine that sleeps in the middle, and clocks that jump: the store goes on and keeps the order of things."""

import math
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import EnvironmentProblem
from lowrank_align.store import Judgement, Store, connections, new_id, records
from lowrank_align.store.export import export_lines
from lowrank_align.store.stats import stats
from tests.torture.clients import TIE, Children, Clients, record_of

Times = Callable[[int, int], int]
Tally = Callable[..., None]
SECTION = "Store"
STOPPED_SECONDS, IMPATIENT_SECONDS, PATIENT_SECONDS = 0.25, 0.05, 30.0
BUSY = "another program has been writing"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGSTOP")


@needs_fork
def test_writers_that_are_stopped_in_the_middle_go_on(
    path: Path, children: Children, times: Times, tally: Tally
) -> None:
    """One of four is stopped at a random moment for longer than the others wait for it, and continued."""
    stops, moments = times(4, 150), random.Random(3)
    clients = Clients(path, children, patience=IMPATIENT_SECONDS)
    for _ in range(stops):
        victim = moments.choice(clients.names)
        clients.wait_for_more()
        time.sleep(moments.uniform(0, 0.01))
        os.kill(clients.pids[victim], signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS)
        os.kill(clients.pids[victim], signal.SIGCONT)
    well = clients.end()
    told = clients.lines("told")
    faults = clients.faults() + [line for line in told if BUSY not in line or "\\n" in line]
    note = f"{len(clients.lines('has')):,} votes; {len(told)} times a writer was told in one line, and repeated"
    held = stops - min(stops, len(faults) + (not well))
    fault = "a writer stopped for longer than the others wait, and continued (SIGSTOP, SIGCONT)"
    tally(SECTION, fault, "no vote lost or doubled; the others go on, or say one line", held=held, of=stops, note=note)
    assert (faults, well) == ([], True)


@needs_fork
def test_a_transaction_that_slept_is_finished(path: Path, children: Children, times: Times, tally: Tally) -> None:
    """It is stopped while it holds the lock: the impatient are told in one line, the patient wait, all votes count."""
    rounds = times(1, 25)
    held = sum(sleeps(path.with_name(f"{number}.db"), children) for number in range(rounds))
    fault = "a transaction asleep beyond the patience of two others"
    promise = "it is finished, they are told in one line, and their repeats count once"
    tally(SECTION, fault, promise, held=held, of=rounds)
    assert held == rounds


def sleeps(path: Path, children: Children) -> bool:
    """One round of that on a new store; whether all was kept."""
    ids = [new_id() for _ in range(5)]
    with Store(path) as store:
        for record_id in ids:
            store.add(record_of(record_id))
    told = [path.with_name(f"{path.name}.{n}") for n in range(3)]
    sleeper = children.begin(sleep, path, ids[:2])
    assert os.WIFSTOPPED(os.waitpid(sleeper, os.WUNTRACED)[1])
    impatient = [children.begin(wait, path, ids[2 + n], IMPATIENT_SECONDS, told[n]) for n in range(2)]
    well = [children.end(child) for child in impatient]
    patient = children.begin(wait, path, ids[4], PATIENT_SECONDS, told[2])
    while not told[2].exists():
        time.sleep(0.001)
    os.kill(sleeper, signal.SIGCONT)
    well += [children.end(sleeper), children.end(patient)]
    with Store(path) as store:
        kept = {entry.record.id for entry in store.entries()}
        for record_id in ids[2:4]:  # those who were told repeat
            store.judge(record_id, "ann", TIE, event_id=record_id)
        whole = sorted((entry.record.id, entry.version) for entry in store.entries())
    one_line = all(BUSY in note.read_text() and "\n" not in note.read_text() for note in told[:2])
    in_time = kept == {*ids[:2], ids[4]} and whole == sorted((record_id, 1) for record_id in ids)
    return one_line and in_time and well == [0] * 4


def sleep(path: Path, ids: list[str]) -> None:
    with Store(path) as store, store.batch():
        store.judge(ids[0], "ann", TIE)
        os.kill(os.getpid(), signal.SIGSTOP)
        store.judge(ids[1], "ann", TIE)


def wait(path: Path, record_id: str, patience: float, told: Path) -> None:
    connections.BUSY_SECONDS = patience
    with Store(path) as store:
        told.write_text("waits")
        try:
            store.judge(record_id, "ann", TIE, event_id=record_id)
        except EnvironmentProblem as busy:
            told.write_text(str(busy))


def test_clocks_that_jump_change_no_order(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: Times, tally: Tally
) -> None:
    """The wall clock goes back an hour or a year, and forward a week: history, undo, lists, figures and exports follow
    the order in which things happened."""
    shift = timedelta()

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + shift

    monkeypatch.setattr(records, "datetime", Clock)
    jumps, moments, held = times(10, 300), random.Random(1), 0
    shifts = [timedelta(), timedelta(hours=-1), timedelta(days=7), timedelta(days=-400)]
    with Store(path) as store:
        for number in range(jumps):
            record_id, shift = new_id(), moments.choice(shifts)
            store.add(record_of(record_id))
            store.judge(record_id, "ann", TIE)
            shift = moments.choice(shifts)
            store.judge(record_id, "ann", Judgement("preferred", ranks=(1.0, 2.0)), expected_version=1)
            newest, shift = store.recent("ann", 1)[0], moments.choice(shifts)
            store.undo(record_id, "ann", expected_version=2)
            entry, pace = store.entry(record_id, "ann"), stats(store).pace.per_minute
            steps = [(event.version, event.kind) for event in store.history(record_id, "ann")]
            held += (
                steps == [(1, "vote"), (2, "vote"), (3, "undo")]
                and (newest.record.id, newest.version) == (record_id, 2)
                and entry is not None
                and entry.judgement == TIE
                and (pace is None or (math.isfinite(pace) and pace >= 0))
                and len(export_lines(store, "pairs").lines) == number + 1
            )
    fault = "the wall clock goes back an hour or a year, and forward a week"
    tally(SECTION, fault, "history, undo, figures and exports as they happened", held=held, of=jumps)
    assert held == jumps
