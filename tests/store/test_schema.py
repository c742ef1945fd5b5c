"""Opening: new files, what is no store, damaged and newer files, migrations with a backup, append-only tables."""

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.store import Completion, Judgement, Record, Store, backup, connections, schema

Added = Callable[..., Record]

ANOTHER = (
    "CREATE TABLE colours (name TEXT PRIMARY KEY)",
    "INSERT INTO colours SELECT annotator FROM events",
)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> int:
    """One more migration than there is; the schema that it leads to."""
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, ANOTHER])
    return len(schema.MIGRATIONS)


@pytest.fixture
def old(path: Path) -> Path:
    """A store of the schema before `newer`'s (name this fixture first), with one vote in it."""
    with Store(path) as store:
        record = Record("pair", "p", (Completion("a"), Completion("b")))
        store.add(record)
        store.judge(record.id, "ann", Judgement("tie"))
    return path


def ask(path: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_a_new_file_says_what_it_is(path: Path) -> None:
    Store(path).close()
    assert ask(path, "PRAGMA application_id") == [(0x6C726131,)]
    assert ask(path, "PRAGMA user_version") == [(len(schema.MIGRATIONS),)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_its_folder_is_made_and_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Store("~/deep/er/votes.db").close()
    assert (tmp_path / "deep" / "er" / "votes.db").is_file()


def test_durable_and_without_a_write_ahead_log(store: Store) -> None:
    """synchronous 3 is EXTRA: what is committed is on the disk, the removal of the journal too."""
    for connection in (store._file._writer, store._file._open()):
        with closing(connection):
            assert connection.execute("PRAGMA synchronous").fetchone() == (3,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_a_file_that_was_put_into_wal_mode_is_taken_out_of_it(path: Path) -> None:
    Store(path).close()
    assert ask(path, "PRAGMA journal_mode = WAL") == [("wal",)]
    Store(path).close()
    assert ask(path, "PRAGMA journal_mode") == [("delete",)]


# ---- what is no store


def of_text(path: Path) -> None:
    path.write_text('{"prompt": "p"}\n' * 100)


def of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (name)")
        connection.commit()


def of_a_newer_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 99")
        connection.commit()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (of_text, "not a store"),
        (of_another_program, "not a store but another program's database"),
        (of_a_newer_version, r"newer lowrank-align \(schema 99"),
        (Path.mkdir, "is a folder"),
    ],
)
def test_what_is_no_store_is_left_as_it_is(make: Callable[[Path], None], problem: str, path: Path) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(UserError, match=problem) as caught:
        Store(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


# the version's first and last byte, the application's last, and a letter of what the tables are
@pytest.mark.parametrize("place", [60, 63, 71, b"searchable TEXT"], ids=str)
def test_a_bit_that_makes_a_store_look_like_another_s_names_its_backup(place: int | bytes, old: Path) -> None:
    with Store(old) as store:
        kept = store.back_up_by_age(24.0, 7)
    assert kept is not None
    content = bytearray(old.read_bytes())
    content[content.index(place) if isinstance(place, bytes) else place] ^= 4
    old.write_bytes(content)
    with pytest.raises(UserError, match=f"move it away and copy the backup {re.escape(kept.name)} to its place"):
        Store(old)
    kept.unlink()
    with pytest.raises(UserError) as caught:
        Store(old)
    assert "backup" not in str(caught.value)
    assert old.read_bytes() == content


def test_without_create_a_missing_file_is_not_made(tmp_path: Path) -> None:
    Store(tmp_path / "votes.db").close()
    with pytest.raises(UserError, match=r"votse.db: no such store \(did you mean votes.db\?\)"):
        Store(tmp_path / "votse.db", create=False)
    with pytest.raises(UserError, match="no such store"):
        Store(tmp_path / "no" / "where.db", create=False)
    (tmp_path / "empty.db").touch()
    with pytest.raises(UserError, match="empty"):
        Store(tmp_path / "empty.db", create=False)
    assert {p.name for p in tmp_path.iterdir()} == {"votes.db", "empty.db"}


def test_a_damaged_file_is_one_line(old: Path) -> None:
    """Its pages behind the first are overwritten: the header still looks right."""
    content = bytearray(old.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    old.write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        Store(old)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_one_line(old: Path) -> None:
    old.write_bytes(old.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        Store(old)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="folder cannot be made"):
        Store(tmp_path / "file" / "votes.db")


def test_somebody_who_does_not_stop_writing_is_told_of(
    store: Store, path: Path, added: Added, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "BUSY_SECONDS", 0.01)
    record = added()
    with Store(path) as other, store.batch():
        store.note("draft", 1)
        with pytest.raises(EnvironmentProblem, match="another program has been writing"):
            other.judge(record.id, "ann", Judgement("tie"))
    store.judge(record.id, "ann", Judgement("tie"))


# ---- migrations


def test_an_old_file_is_copied_and_brought_up_to_date(old: Path, newer: int) -> None:
    with Store(old) as store:
        assert store.count() == 1
    assert ask(old, "SELECT name FROM colours") == [("ann",)]
    assert ask(old, "PRAGMA user_version") == [(newer,)]
    backup = old.with_name(f"votes.db.v{newer - 1}.bak")
    assert ask(backup, "PRAGMA user_version") == [(newer - 1,)]
    assert ask(backup, "SELECT count(*) FROM events") == [(1,)]
    assert [name for (name,) in ask(backup, "SELECT name FROM sqlite_schema WHERE name = 'colours'")] == []
    Store(old).close()  # nothing to do, so no other backup
    assert {p.name for p in old.parent.iterdir()} == {old.name, backup.name}


def test_an_older_backup_is_not_overwritten(old: Path, newer: int) -> None:
    old.with_name(f"votes.db.v{newer - 1}.bak").write_text("precious")
    Store(old).close()
    assert old.with_name(f"votes.db.v{newer - 1}.bak").read_text() == "precious"
    assert ask(old.with_name(f"votes.db.v{newer - 1}-2.bak"), "SELECT count(*) FROM events") == [(1,)]


def test_a_migration_that_fails_leaves_the_old_schema(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ask(old, "SELECT sql FROM sqlite_schema ORDER BY name")
    version = ask(old, "PRAGMA user_version")
    monkeypatch.setattr(schema, "MIGRATIONS", [*schema.MIGRATIONS, (*ANOTHER, "INSERT INTO nowhere VALUES (1)")])
    with pytest.raises(UserError, match="nowhere"):
        Store(old)
    assert ask(old, "SELECT sql FROM sqlite_schema ORDER BY name") == before
    assert ask(old, "PRAGMA user_version") == version


def test_without_a_backup_nothing_is_migrated(old: Path, newer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = old.read_bytes()
    monkeypatch.setattr(backup.os, "fsync", full_disk)
    with pytest.raises(EnvironmentProblem, match="no backup could be written"):
        Store(old)
    assert old.read_bytes() == before
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def full_disk(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_that_a_newer_version_has_migrated_is_refused(
    old: Path, newer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(old).close()
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:-1])
    with pytest.raises(UserError, match="newer lowrank-align"):
        Store(old)


def test_a_backup_opens_as_a_store(old: Path, newer: int, tmp_path: Path) -> None:
    Store(old).close()
    shutil.copy(old.with_name(f"votes.db.v{newer - 1}.bak"), tmp_path / "back.db")
    with Store(tmp_path / "back.db") as store:
        assert store.count() == 1


# ---- append-only


@pytest.mark.parametrize("table", ["records", "events", "prompts"])
@pytest.mark.parametrize("query", ["DELETE FROM {}", "UPDATE {} SET id = 'x'"])
def test_the_tables_refuse_to_forget(query: str, table: str, old: Path) -> None:
    with Store(old) as store:
        store.enqueue(["p"])
    with (
        closing(sqlite3.connect(old)) as connection,
        pytest.raises(sqlite3.IntegrityError, match=f"{table} are append-only"),
    ):
        connection.execute(query.format(table))


def test_a_version_is_written_once(old: Path) -> None:
    """Even past the store's own check."""
    with (
        closing(sqlite3.connect(old)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="events.record, events.annotator, events.version"),
    ):
        connection.execute(
            "INSERT INTO events (id, record, annotator, version, kind, stands, judgement, at) "
            "SELECT 'x', record, annotator, version, kind, stands, judgement, at FROM events"
        )
