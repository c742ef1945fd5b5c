"""Databases with views, triggers and records of their own."""

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tests.torture.attacks import BAD, DEEP, PAIR, World, attack


def _store(w: World, *statements: str) -> Path:
    from lowrank_align.cli import main

    path = w.here / "theirs.db"
    assert main(["data", "import", str(w.runs / "pairs.jsonl"), "--store", str(path)]) == 0
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
STORES = {
    "a view without end": ("DROP VIEW standing", f"CREATE VIEW standing AS {ENDLESS}"),
    "another view without end": ("DROP VIEW heads", f"CREATE VIEW heads AS {ENDLESS}"),
    "a trigger that changes what is written": (
        "CREATE TRIGGER t AFTER INSERT ON events BEGIN UPDATE notes SET value = 'x'; END",
    ),
    "a trigger on notes": ("CREATE TRIGGER t AFTER INSERT ON notes BEGIN DELETE FROM notes; END",),
    "without its own triggers": ("DROP TRIGGER events_no_delete",),
    "a view of its own": (f"CREATE VIEW v AS {ENDLESS}",),
    "a table turned into a view": ("ALTER TABLE notes RENAME TO other", f"CREATE VIEW notes AS {ENDLESS}"),
    "an index on an expression": ("CREATE INDEX i ON prompts (hex(zeroblob(9)))",),
    "a virtual table": ("CREATE VIRTUAL TABLE v USING fts5(x)",),
}


def _database(name: str, statements: tuple[str, ...]) -> None:
    @attack(f"store: {name}", 2, "changed by another program, and is not opened")
    def _(w: World) -> Sequence[object]:
        return ["data", "export", "pairs", "--store", _store(w, *statements), "--out", "new.jsonl"]

    if name == "a trigger that changes what is written":

        @attack(f"store: {name}, by an import", 2, "changed by another program, and is not opened")
        def _(w: World) -> Sequence[object]:
            return ["data", "import", w.runs / "pairs.jsonl", "--store", _store(w, *statements)]


for _name, _statements in STORES.items():
    _database(_name, _statements)


def _with_records(w: World, body: object) -> Sequence[object]:
    """An export of a store whose records were given another body behind its back."""
    path = _store(w)
    with closing(sqlite3.connect(path)) as connection, connection:
        trigger = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'records_no_update'").fetchone()
        connection.execute("DROP TRIGGER records_no_update")
        connection.execute("UPDATE records SET body = ?", (body,))
        connection.execute(trigger[0])
    return ["data", "export", "pairs", "--store", path, "--out", "new.jsonl"]


@attack("store: records 100,000 deep", 2, "damaged")
def _(w: World) -> Sequence[object]:
    return _with_records(w, DEEP)


@attack("store: records of another form", 2, "damaged")
def _(w: World) -> Sequence[object]:
    return _with_records(w, "[1, {}]")


@attack("store: annotators of control characters", 0, "")
def _(w: World) -> Sequence[object]:
    rows = [{**PAIR, "annotator": f"a{BAD}"}]
    (w.here / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from lowrank_align.cli import main

    assert main(["data", "import", "named.jsonl", "--store", "theirs.db"]) == 0
    return ["data", "stats", "--store", "theirs.db"]


@attack("store: a link to a database outside", 2, "another program's database")
def _(w: World) -> Sequence[object]:
    connection = sqlite3.connect(w.outside / "x.db")
    connection.execute("CREATE TABLE secrets (x)")
    connection.commit()
    connection.close()
    (w.here / "theirs.db").symlink_to(w.outside / "x.db")
    return ["data", "stats", "--store", "theirs.db"]
