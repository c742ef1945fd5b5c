"""Copies of a store beside it: whole or absent, and never over another file.

Before a migration, by hand (`lowrank-align data backup`), and by age when the studio opens. A dated copy is called
`mine.db.2026-01-31T180500Z.bak`; the name's time counts, not the file's, which changes when a folder is copied.
"""

import os
import re
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from lowrank_align.errors import EnvironmentProblem

ENDING = ".bak"
PART = re.compile(r"\.lowrank-backup-(\d+)-.*\.part(-journal)?")
_STAMP = "%Y-%m-%dT%H%M%SZ"


def copy(connection: sqlite3.Connection, to: Path) -> None:
    """`VACUUM INTO`, under another name until it is checked and on the disk. FileExistsError where there is a file.

    EnvironmentProblem where it cannot be written. `connection` is in autocommit mode; writers wait meanwhile.
    """
    part: Path | None = None
    try:
        _sweep(to)
        descriptor, name = tempfile.mkstemp(prefix=f".lowrank-backup-{os.getpid()}-", suffix=".part", dir=to.parent)
        os.close(descriptor)
        part = Path(name)
        connection.execute("VACUUM INTO ?", (name,))
        with closing(sqlite3.connect(part)) as copied:
            (state,) = copied.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        _name(part, to)
    except FileExistsError:
        raise
    except (OSError, sqlite3.OperationalError) as error:
        raise EnvironmentProblem(f"{to}: no backup could be written ({error}); the store is as it was") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def by_age(connection: sqlite3.Connection, store: Path, hours: float, keep: int) -> Path | None:
    """A dated copy where the newest is older than that, of which the newest `keep` stay; None where none was due.

    What is dated in the future, by a clock that was wrong, says nothing of age and is the first to go.
    """
    now = datetime.now(UTC)
    known = dated(store)
    past = [place for place in known if _when(place) <= now]
    if past and now - _when(past[-1]) < timedelta(hours=hours):
        return None
    made = store.with_name(f"{store.name}.{now:{_STAMP}}{ENDING}")
    try:
        copy(connection, made)
    except FileExistsError:  # another process was as fast
        return None
    older = [*(place for place in known if place not in past), *past]
    for place in older[: max(0, len(older) + 1 - keep)]:
        place.unlink(missing_ok=True)
    return made


def dated(store: Path) -> list[Path]:
    """The store's dated copies, oldest first."""
    form = re.compile(re.escape(store.name) + r"\.\d{4}-\d\d-\d\dT\d{6}Z" + re.escape(ENDING))
    return sorted(place for place in _beside(store) if form.fullmatch(place.name) and _is_date(place))


def newest(store: Path) -> Path | None:
    """The newest copy beside the store: a dated one, else one from before a migration; None where there is none."""
    form = re.compile(re.escape(store.name) + r"\.v\d+(-\d+)?" + re.escape(ENDING))
    old = [place for place in _beside(store) if form.fullmatch(place.name)]
    return next(iter([*dated(store)[::-1], *sorted(old, key=lambda place: place.stat().st_mtime, reverse=True)]), None)


def advice(store: Path) -> str:
    """What to do where the store cannot be read."""
    found = newest(store)
    if found is None:
        return f"copy a backup to its place, or save what `sqlite3 {store.name} .recover` still reads"
    recover = f"`sqlite3 {store.name} .recover` may read what is newer"
    return f"move it away and copy the backup {found.name} to its place; {recover}"


def _beside(store: Path) -> list[Path]:
    folder = store.absolute().parent
    return list(folder.iterdir()) if folder.is_dir() else []


def _when(place: Path) -> datetime:
    stamp = place.name.removesuffix(ENDING).rpartition(".")[2]
    return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)


def _is_date(place: Path) -> bool:
    try:
        _when(place)
    except ValueError:
        return False
    return True


def _name(part: Path, to: Path) -> None:
    """A link, unlike a renaming, never replaces a file that another process has just made."""
    try:
        os.link(part, to)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if to.exists():
            raise FileExistsError(to) from None
        part.rename(to)
    if os.name == "posix":
        folder = os.open(to.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(to: Path) -> None:
    """Remove what processes that were killed have left half written."""
    for left in to.parent.iterdir():
        if (found := PART.fullmatch(left.name)) and not psutil.pid_exists(int(found[1])):
            left.unlink(missing_ok=True)
