"""Forked children, and clients of a store that write down what they ask and what was acknowledged."""

import os
import signal
import sqlite3
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lowrank_align.errors import EnvironmentProblem
from lowrank_align.store import Completion, Judgement, Record, Store, connections, new_id

TIE, BAD = Judgement("tie"), Judgement("bad")
WRITERS = 4
PAUSE_SECONDS = 0.005  # after a vote: people pause too, and the system gives a lock to whoever asks at once again
LONG_AGO = "2026-01-01T00:00:00.000000+00:00"


class Children:
    """Children that have everything imported already; those that still run are killed at the end."""

    def __init__(self) -> None:
        self._begun: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in self._begun:
            with suppress(ChildProcessError, ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def begin(self, work: Callable[..., Any], *given: Any) -> int:
        """The child that runs `work(*given)`; it ends with 1 where that raised, and without pytest's own endings."""
        child = os.fork()
        if child:
            self._begun.append(child)
            return child
        code = 1
        try:
            work(*given)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, child: int) -> int:
        """Its exit code, once it has ended; minus the signal where one killed it."""
        self._begun.remove(child)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def record_of(record_id: str, prompt: str = "p") -> Record:
    """The same record whenever it is asked for again."""
    completions = (Completion("a" * 500, id=f"{record_id[:31]}a"), Completion("b", id=f"{record_id[:31]}b"))
    return Record("pair", prompt, completions, created=LONG_AGO, id=record_id)


def client(path: Path, journal: Path, name: str, patience: float) -> None:
    """A vote on a new record, and another that changes it, again and again until SIGTERM.

    Ids are written down before they are sent and after they are acknowledged; what was not acknowledged is sent again,
    after a refusal as after a restart.
    """
    connections.BUSY_SECONDS = patience
    told_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told_to_end.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    lines = [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []
    acknowledged = {words[1] for words in lines if words[0] == "has"}
    waiting = [words[1:] for words in lines if words[0] == "asks" and words[3] not in acknowledged]
    log = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while waiting or not told_to_end:
        try:
            with Store(path) as store:
                while waiting or not told_to_end:
                    if not waiting:
                        waiting.append([new_id(), new_id(), new_id()])
                        os.write(log, f"asks {' '.join(waiting[0])}\n".encode())
                    record_id, *events = waiting[0]
                    store.add(record_of(record_id, name))
                    for version, (event, judgement) in enumerate(zip(events, (TIE, BAD), strict=True)):
                        if event not in acknowledged:
                            store.judge(record_id, name, judgement, expected_version=version, event_id=event)
                            acknowledged.add(event)
                            os.write(log, f"has {event}\n".encode())
                    del waiting[0]
                    time.sleep(PAUSE_SECONDS)
        except EnvironmentProblem as busy:
            os.write(log, f"told {str(busy)!r}\n".encode())


class Clients:
    """Four of them on one store, each with its journal."""

    def __init__(self, path: Path, children: Children, patience: float) -> None:
        self.path, self._children, self._patience = path, children, patience
        self.names = [f"annotator {n}" for n in range(WRITERS)]
        self.pids: dict[str, int] = {}
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> None:
        # The client asks for SIGTERM once it knows what to do with it: until then it waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        self.pids[name] = self._children.begin(client, self.path, self._journal(name), name, self._patience)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def wait_for_more(self) -> None:
        """Until one of them has written something down that was not there before."""
        before, until = self._size(), time.monotonic() + 120
        while self._size() == before:
            assert time.monotonic() < until, "nobody does anything any more"
            time.sleep(0.001)

    def kill(self, names: list[str]) -> None:
        for name in names:
            os.kill(self.pids[name], signal.SIGKILL)
        for name in names:
            assert self._children.end(self.pids[name]) == -signal.SIGKILL

    def end(self) -> bool:
        """Whether all ended well when they were asked to."""
        for child in self.pids.values():
            os.kill(child, signal.SIGTERM)
        return [self._children.end(child) for child in self.pids.values()] == [0] * WRITERS

    def lines(self, first: str) -> list[str]:
        """What the clients wrote down behind that word."""
        every = [line for name in self.names for line in self._journal(name).read_text().splitlines()]
        return [line.removeprefix(f"{first} ") for line in every if line.startswith(f"{first} ")]

    def faults(self) -> list[str]:
        """What is lost, doubled, or otherwise than was asked. Read past the store's own code."""
        asked = {}
        for record_id, first, second in (line.split() for line in self.lines("asks")):
            asked |= {first: (record_id, 1), second: (record_id, 2)}
        with closing(sqlite3.connect(self.path)) as connection:
            rows = connection.execute("SELECT id, record, version FROM events").fetchall()
            state = connection.execute("PRAGMA integrity_check").fetchone()
        found = Counter(event for event, _, _ in rows)
        wrong = [f"lost {event}" for event in {*self.lines("has"), *asked} if event not in found]
        wrong += [f"doubled {event}" for event, count in found.items() if count > 1]
        wrong += [f"not asked {event}" for event, record, version in rows if asked.get(event) != (record, version)]
        return wrong + ([] if state == ("ok",) else [str(state)])

    def _journal(self, name: str) -> Path:
        return self.path.with_name(f"{name}.journal")

    def _size(self) -> int:
        return sum(self._journal(name).stat().st_size for name in self.names if self._journal(name).exists())
