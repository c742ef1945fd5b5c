"""Migrations and backups that are killed at every statement, and store files that were damaged."""

import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store import Store, backup, new_id, schema
from lowrank_align.store.export import EXPORTS, export_lines
from lowrank_align.store.stats import stats
from lowrank_align.studio.browsing import Wanted, listing
from tests.torture.clients import BAD, TIE, Children, record_of

Times = Callable[[int, int], int]
Tally = Callable[..., None]
SECTION = "Store"
VOTES = 12
# What the next versions may do: a table filled from another, a column, an index, a view made anew.
LATER: list[schema.Migration] = [
    ("CREATE TABLE colours (name TEXT)", "INSERT INTO colours SELECT annotator FROM events"),
    (
        "ALTER TABLE notes ADD COLUMN colour TEXT",
        "CREATE INDEX colours_by_name ON colours (name)",
        "DROP VIEW standing",
        "CREATE VIEW standing AS SELECT * FROM heads WHERE judgement IS NOT NULL AND stands > 0",
    ),
]
ALL = [*schema.MIGRATIONS, *LATER]
STEPS = [(old, new) for old in range(len(ALL)) for new in range(old + 1, len(ALL) + 1) if new >= len(schema.MIGRATIONS)]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL")


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`version(2)`: from now on this program knows the schema up to 2."""
    return lambda newest: monkeypatch.setattr(schema, "MIGRATIONS", ALL[:newest])


def fill(path: Path) -> None:
    with Store(path) as store, store.batch():
        for number in range(VOTES):
            record_id = new_id()
            store.add(record_of(record_id, f"prompt {number} " + "p" * 300))
            store.judge(record_id, "ann", TIE)
            store.judge(record_id, "ben", BAD)
        store.enqueue([f"prompt {number} of the queue" for number in range(VOTES)])


def ask(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def tables(path: Path) -> list[Any]:
    return [*ask(path, "SELECT sql FROM sqlite_schema ORDER BY name"), *ask(path, "PRAGMA user_version")]


def whole(path: Path) -> bool:
    """Sound, and with every vote."""
    return ask(path, "PRAGMA integrity_check") == [("ok",)] and ask(path, "SELECT count(*) FROM events") == [
        (2 * VOTES,)
    ]


def killed(work: Callable[..., Any], given: tuple[Any, ...], at: int, unit: str, counted: Path) -> None:
    """For a child: `work(*given)`, killed at the `at`-th statement or instruction of SQLite's; how many there were."""
    count, connect = 0, sqlite3.connect

    def step(*said: Any) -> int:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def watched(*places: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*places, **options)
        if unit == "statement":
            connection.set_trace_callback(step)
        else:
            connection.set_progress_handler(step, 1)
        return connection

    sqlite3.connect = watched  # type: ignore[assignment]
    work(*given)
    counted.write_text(str(count))


def every_kill(
    children: Children,
    make: Callable[[], None],
    work: Callable[..., Any],
    given: tuple[Any, ...],
    instructions: int,
    each: int,
) -> Iterator[None]:
    """Makes things anew, and kills `work` on them: at each (`each`-th) statement, and at random instructions."""
    place, moments = Path("count"), random.Random(5)
    for unit, most in (("statement", 10**6), ("instruction", instructions)):
        make()
        assert children.end(children.begin(killed, work, given, 0, unit, place)) == 0
        total = int(place.read_text())
        for at in range(1, total + 1, each) if unit == "statement" else moments.sample(range(1, total + 1), most):
            make()
            assert children.end(children.begin(killed, work, given, at, unit, place)) == -signal.SIGKILL
            yield


def opened(path: Path) -> None:
    Store(path).close()


@needs_fork
@pytest.mark.parametrize(("old", "new"), STEPS)
def test_a_migration_killed_anywhere_is_whole_or_not_begun(
    old: int, new: int, path: Path, children: Children, version: Any, times: Times, tally: Tally,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From a new file or an older schema: what is there after the kill is one of the two, and opening ends it."""
    monkeypatch.chdir(path.parent)
    folder, old_file, new_file = path.parent / "here", path.with_name("old.db"), path.with_name("new.db")
    here, reference = folder / path.name, {}
    version(old)
    if old:
        fill(old_file)
        reference[old] = tables(old_file)
    version(new)
    opened(new_file)
    reference[new] = tables(new_file)

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if old:
            shutil.copy(old_file, here)

    held = of = 0
    for _ in every_kill(children, make, opened, (here,), times(1, 120), times(8, 1)):
        of += 1
        backups = list(folder.glob("*.bak"))
        sound = all(whole(place) and tables(place) == reference[old] for place in backups)
        begun = tables(here) if here.exists() and here.stat().st_size else None
        sound &= begun in ([reference[old], reference[new]] if old else [None, [(0,)], reference[new]])
        with Store(here) as store:
            sound &= store.count() == (2 * VOTES if old else 0)
        held += sound and tables(here) == reference[new]
    fault = "a migration, its backup and a new file killed at each statement and between"
    promise = "whole or not begun, every vote there, a backup whole or absent; opening it again ends it"
    tally(SECTION, fault, promise, held=held, of=of)
    assert held == of


@needs_fork
def test_a_backup_killed_anywhere_is_whole_or_absent(
    path: Path, children: Children, times: Times, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand and by age."""
    monkeypatch.chdir(path.parent)
    original, folder = path.with_name("original.db"), path.parent / "here"
    here, out = folder / path.name, folder / "copy.db"
    fill(original)

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(original, here)

    def back_up() -> None:
        with Store(here) as store:
            store.back_up(out)
            store.back_up_by_age(24.0, 7)

    held = of = 0
    for _ in every_kill(children, make, back_up, (), times(3, 200), times(3, 1)):
        of += 1
        sound = all(whole(place) for place in (here, out, *backup.dated(here)) if place.exists())
        with Store(here) as store:
            store.back_up(folder / "again.db")
        left = [place.name for place in folder.iterdir() if place.name.endswith(".part")]
        held += sound and whole(folder / "again.db") and left == []
    fault = "a backup killed at each statement and between"
    tally(SECTION, fault, "the store as it was, the backup whole or absent, the next one works", held=held, of=of)
    assert held == of


@needs_fork
def test_a_backup_that_finds_no_room_leaves_nothing(path: Path, children: Children, times: Times, tally: Tally) -> None:
    """The disk is full after each of several numbers of bytes."""
    import resource

    fill(path)
    size, rounds, out, told = path.stat().st_size, times(3, 60), path.with_name("copy.db"), path.with_name("told")

    def back_up(most: int) -> None:
        with Store(path) as store:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            try:
                store.back_up(out)
            except UserError as problem:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                told.write_text(f"{problem.exit_code} {problem}")

    held = 0
    for number in range(rounds):
        told.unlink(missing_ok=True)
        code = children.end(children.begin(back_up, number * (size - 4096) // rounds))
        line = told.read_text() if told.exists() else ""
        clear = line.startswith(f"3 {out}: no backup could be written") and "\n" not in line
        left = {place.name for place in path.parent.iterdir()} - {path.name, "told"}
        held += code == 0 and clear and not left and whole(path)
    fault = "a disk that is full in the middle of a backup"
    tally(SECTION, fault, "one line, no half copy, the store as it was", held=held, of=rounds)
    assert held == rounds


# ---- damage


def use(path: Path) -> int:
    """Everything that reads a store; how many votes were found."""
    with Store(path) as store:
        stats(store)
        for kind in EXPORTS:
            export_lines(store, kind)
        listing(store, Wanted())
        for record in store.all_records():
            store.history(record.id, "ann")
        store.queue("ann", limit=5)
        store.recent("ann")
        return store.count()


def damaged(content: bytes, moments: random.Random) -> bytes:
    """A bit changed, a page or a sector overwritten, or the end cut off."""
    place, kind = moments.randrange(len(content)), moments.choice(["bit", "bit", "bit", "sector", "cut"])
    if kind == "cut":
        return content[:place]
    changed = bytearray(content)
    if kind == "bit":
        changed[place] ^= 1 << moments.randrange(8)
    else:
        start = place // 512 * 512
        changed[start : start + 512] = moments.choice([bytes(512), moments.randbytes(512)])
    return bytes(changed)


def test_damage_is_told_in_one_line_and_nothing_is_overwritten(path: Path, times: Times, tally: Tally) -> None:
    """And what the line advises brings the votes back."""
    fill(path)
    with Store(path) as store:
        kept = store.back_up_by_age(24.0, 7)
    assert kept is not None
    content, moments, of = path.read_bytes(), random.Random(2), times(12, 400)
    held = unseen = 0
    wrong = []
    for number in range(of):
        broken = damaged(content, moments)
        path.write_bytes(broken)
        try:
            found = use(path)
        except UserError as problem:
            line = str(problem)
            clear = line.startswith(f"{path}: ") and "\n" not in line
            clear &= f"copy the backup {kept.name} to its place" in line
        else:
            unseen, clear = unseen + 1, found == 2 * VOTES
        sound = clear and path.read_bytes() == broken
        path.rename(path.with_name("moved away"))
        shutil.copy(kept, path)
        sound &= use(path) == 2 * VOTES and not list(path.parent.glob("*-journal"))
        held += sound
        wrong += [] if sound else [number]
    note = f"{unseen} changed bits that SQLite has no sum of (letters of a text, free space): they are not seen"
    fault = "bits changed, sectors overwritten, the end cut off"
    promise = "one line that names the backup, which brings all back; nothing is overwritten"
    tally(SECTION, fault, promise, held=held, of=of, note=note)
    assert wrong == []
