"""The tables, as an append-only list of migrations, and how a file is brought to the newest of them.

Never change a migration that was released: add one. Before an older file is migrated, `VACUUM INTO` copies it beside
itself; the migration is one transaction, so a kill leaves the old schema or the new one. A file of a newer version is
refused. Events, records and prompts are only ever added; triggers refuse anything else, and what holds now is a view.
"""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.store import backup

APPLICATION_ID = 0x6C726131  # "lra1"

Migration = tuple[str, ...]  # statements; what is in one is one transaction


def _append_only(table: str) -> Migration:
    return tuple(
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} are append-only'); END"
        for verb in ("UPDATE", "DELETE")
    )


_FIRST: Migration = (
    """CREATE TABLE records (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        origin TEXT NOT NULL,
        queue_id TEXT,
        repeat_of TEXT,
        sources TEXT NOT NULL,  -- a JSON array of the completions' sources
        searchable TEXT NOT NULL,
        body TEXT NOT NULL  -- the record as JSON
    )""",
    "CREATE INDEX records_of_queue ON records (queue_id) WHERE queue_id IS NOT NULL",
    """CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        record TEXT NOT NULL REFERENCES records (id),
        annotator TEXT NOT NULL,
        version INTEGER NOT NULL CHECK (version > 0),
        kind TEXT NOT NULL CHECK (kind IN ('vote', 'edit', 'undo', 'delete', 'restore', 'import')),
        stands INTEGER NOT NULL CHECK (stands BETWEEN 0 AND version),  -- the version whose state this is; 0: none
        verdict TEXT,
        deleted INTEGER NOT NULL DEFAULT 0,
        tags TEXT NOT NULL DEFAULT '[]',
        searchable TEXT NOT NULL DEFAULT '',
        judgement TEXT,  -- JSON, NULL where none stands
        at TEXT NOT NULL,
        UNIQUE (record, annotator, version),
        CHECK ((judgement IS NULL) = (stands = 0))
    )""",
    "CREATE INDEX events_of_annotator ON events (annotator, seq)",
    """CREATE TABLE prompts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        content TEXT NOT NULL UNIQUE,  -- a hash of the prompt
        source TEXT NOT NULL,
        body TEXT NOT NULL,
        extra TEXT NOT NULL DEFAULT '{}',
        at TEXT NOT NULL
    )""",
    # Drafts and other small settings of the page: the one table that changes in place.
    "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL, at TEXT NOT NULL) WITHOUT ROWID",
    *_append_only("records"),
    *_append_only("events"),
    *_append_only("prompts"),
    # The newest event of each record and annotator, whether or not a judgement stands after it.
    """CREATE VIEW heads AS SELECT * FROM events AS e WHERE NOT EXISTS (
        SELECT 1 FROM events AS later
        WHERE later.record = e.record AND later.annotator = e.annotator AND later.version = e.version + 1)""",
    "CREATE VIEW standing AS SELECT * FROM heads WHERE judgement IS NOT NULL",
)

MIGRATIONS: list[Migration] = [_FIRST]

OBJECTS = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
ACTING = ("CREATE TRIGGER", "CREATE VIEW", "CREATE VIRTUAL", "CREATE TEMP", "CREATE UNIQUE", "CREATE INDEX")

# One statement sees one state: read one by one, they would show half of what another process makes meanwhile.
FACTS = """
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
    FROM pragma_application_id, pragma_user_version"""


def prepare(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration] | None = None) -> None:
    """Make a new file a store, or bring an old one to the newest schema; UserError where it is neither.

    `connection` is in autocommit mode. The backup is `<name>.v<old version>.bak`, numbered where there is one already.
    """
    migrations = MIGRATIONS if migrations is None else migrations
    connection.execute("BEGIN")  # so that version and schema are of one moment
    try:
        version = _version(connection, path, len(migrations))
        if version:
            _refuse_foreign(connection, path, migrations[:version])
    finally:
        if connection.in_transaction:
            connection.execute("COMMIT")
    if version == len(migrations):
        return
    copied = _back_up(connection, path, version) if version else None
    connection.execute("BEGIN IMMEDIATE")
    try:
        found = _version(connection, path, len(migrations))  # another process may have been faster
        for migration in migrations[found:]:
            for statement in migration:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    if copied is not None and found != version:
        copied.unlink()


def _version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    """The file's schema, 0 for an empty file."""
    application, version, tables = connection.execute(FACTS).fetchone()
    if application != APPLICATION_ID and (application or version or tables):
        what = "not a store but another program's database; name another file with --store"
        raise UserError(f"{path}: {what}{_if_damaged(path)}")
    if version > newest:
        what = f"written by a newer lowrank-align (schema {version}, this one knows {newest}); update this one"
        raise UserError(f"{path}: {what}{_if_damaged(path)}")
    return int(version)


def _if_damaged(path: Path) -> str:
    """One bit makes one of our stores look like somebody else's: a backup beside it tells that it was one."""
    return f"; if it is damaged, {backup.advice(path)}" if backup.newest(path) else ""


def _refuse_foreign(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration]) -> None:
    """A store from somebody else could bring views that never end, or triggers that change what is written."""
    clean = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for migration in migrations:
            for statement in migration:
                clean.execute(statement)
        ours, theirs = (dict(found.execute(OBJECTS).fetchall()) for found in (clean, connection))
    finally:
        clean.close()
    odd = [name for name, sql in ours.items() if theirs.get(name) != sql]
    odd += [
        name for name, sql in theirs.items() if name not in ours and " ".join(sql.split()).upper().startswith(ACTING)
    ]
    if odd:
        what = f"{odd[0]} is not what a store has under that name" if odd[0] in theirs else f"{odd[0]} is missing"
        what += "; it was made or changed by another program, and is not opened"
        raise UserError(f"{path}: {what}{_if_damaged(path)}")


def _back_up(connection: sqlite3.Connection, path: Path, version: int) -> Path:
    for number in ("", *(f"-{n}" for n in range(2, 1000))):
        place = path.with_name(f"{path.name}.v{version}{number}{backup.ENDING}")
        if not place.exists():
            try:
                backup.copy(connection, place)
            except FileExistsError:  # another process migrates it too, and was faster
                continue
            return place
    raise EnvironmentProblem(f"{path}: a thousand backups of it are here; move some away")
