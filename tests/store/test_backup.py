"""Copies of a store: whole, never over another file, dated ones by age, and the one that a damaged store names."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.store import Judgement, Record, Store, backup

Added = Callable[..., Record]
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Clock:
    """The time as `backup` reads it."""

    def __init__(self) -> None:
        self.time = NOON

    def now(self, tz: tzinfo | None = None) -> datetime:
        return self.time

    def strptime(self, text: str, form: str) -> datetime:
        return datetime.strptime(text, form)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(backup, "datetime", made)
    return made


@pytest.fixture
def voted(store: Store, added: Added) -> Store:
    """With one vote."""
    store.judge(added().id, "ann", Judgement("tie"))
    return store


def votes(path: Path) -> int:
    with Store(path, create=False) as store:
        return store.count()


def test_a_copy_is_a_store_with_every_vote(voted: Store, tmp_path: Path) -> None:
    voted.back_up(tmp_path / "copy.db")
    assert votes(tmp_path / "copy.db") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"votes.db", "copy.db"}


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_never_replaces_a_file(
    links: bool, voted: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on a disk without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    (tmp_path / "copy.db").write_text("precious")
    with pytest.raises(FileExistsError):
        voted.back_up(tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_text() == "precious"
    voted.back_up(tmp_path / "other.db")
    assert votes(tmp_path / "other.db") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"votes.db", "copy.db", "other.db"}


def test_what_a_killed_process_left_half_written_is_removed(voted: Store, tmp_path: Path) -> None:
    """Process 4194305 is above Linux's highest; this process's own is left alone."""
    for pid in (4194305, os.getpid()):
        (tmp_path / f".lowrank-backup-{pid}-x.part").write_text("half")
    voted.back_up(tmp_path / "copy.db")
    assert {p.name for p in tmp_path.glob(".*")} == {f".lowrank-backup-{os.getpid()}-x.part"}


def test_a_folder_that_cannot_be_written_is_one_line(voted: Store, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no backup could be written .*; the store is as it was$"):
        voted.back_up(tmp_path / "nowhere" / "copy.db")


def test_by_age(voted: Store, clock: Clock, tmp_path: Path) -> None:
    """One at noon; none an hour later; one a day later; of three the two newest stay. None with 0 to keep."""
    assert voted.back_up_by_age(24, 0) is None
    first = voted.back_up_by_age(24, 2)
    assert first is not None and first.name == "votes.db.2026-01-31T120000Z.bak" and votes(first) == 1
    clock.time += timedelta(hours=1)
    assert voted.back_up_by_age(24, 2) is None
    clock.time += timedelta(hours=23)
    second = voted.back_up_by_age(24, 2)
    clock.time += timedelta(days=9)
    third = voted.back_up_by_age(24, 2)
    assert backup.dated(voted.path) == [second, third]
    assert backup.newest(voted.path) == third


def test_a_clock_that_was_wrong_stops_no_backups(voted: Store, clock: Clock) -> None:
    """A copy was dated a year ahead: it counts for nothing, and goes first."""
    clock.time = NOON + timedelta(days=365)
    ahead = voted.back_up_by_age(24, 2)
    clock.time = NOON
    first = voted.back_up_by_age(24, 2)
    assert first is not None and backup.dated(voted.path) == [first, ahead]
    clock.time += timedelta(hours=2)
    assert voted.back_up_by_age(24, 2) is None
    clock.time += timedelta(days=1)
    second = voted.back_up_by_age(24, 2)
    assert backup.dated(voted.path) == [first, second]


def test_an_empty_store_is_not_copied_and_other_files_are_left(store: Store, added: Added, tmp_path: Path) -> None:
    assert store.back_up_by_age(24, 7) is None
    others = [
        "votes.db.2020-01-01T000000Z.bak.txt",
        "votes.db.2020-99-99T000000Z.bak",
        "votes.db.v1.bak",
        "my votes.bak",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    added()
    made = store.back_up_by_age(24, 1)
    assert made is not None
    assert {p.name for p in tmp_path.iterdir()} == {"votes.db", made.name, *others}


def test_a_damaged_store_names_its_newest_copy(voted: Store, path: Path) -> None:
    voted.back_up(path.with_name("votes.db.v1.bak"))
    made = voted.back_up_by_age(24, 7)
    assert made is not None
    voted.close()
    whole = path.read_bytes()
    for content in (whole[:5000], b"no database" * 100, b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"move it away and copy the backup {made.name} to its place"):
            Store(path)
        assert path.read_bytes() == content
    made.unlink()
    with pytest.raises(UserError, match=r"copy the backup votes.db.v1.bak to its place"):
        Store(path)


@pytest.mark.parametrize("damage", ['{"kind"', "null", '{"kind":"pair","prompt":"p"}'])
def test_a_row_that_cannot_be_read_is_one_line(damage: str, voted: Store, path: Path) -> None:
    """A changed letter of a text is no damage to SQLite, but to us."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER records_no_update")
        connection.execute("UPDATE records SET body = ?", (damage,))
        connection.commit()
    reads: list[Callable[[], Any]] = [voted.entries, voted.all_records, lambda: voted.recent("ann")]
    for read in reads:
        with pytest.raises(UserError, match="damaged .a row cannot be read") as caught:
            read()
        assert "\n" not in str(caught.value)
