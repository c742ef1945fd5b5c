"""How the file is opened, read and written: one serialised writer, a few readers, errors in one line.

A rollback journal, not the write-ahead log: see docs/decisions/0007. A write returns after its commit is durable.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_align.errors import EnvironmentProblem, UserError, nearest
from lowrank_align.store import backup, schema

BUSY_SECONDS = 30.0  # how long one waits for another process's write


class Connections:
    """The connections of one process to one file; its methods may be called from any thread."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self._closed = False
        self._turn = threading.RLock()  # whose turn it is to write
        self._owner: int | None = None  # the thread with an open transaction
        self._guard = threading.Lock()  # of the list of idle readers
        self._idle: list[sqlite3.Connection] = []
        _check_place(path, create)
        with self._one_line():
            self._writer = self._open()
            try:
                schema.prepare(self._writer, path)
                # The quick one does not compare indices with tables, and what stands is found by one.
                (state,) = self._writer.execute("PRAGMA integrity_check(1)").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(state)
            except BaseException:
                self._writer.close()
                raise

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, durable when this ends, undone by an exception. Within it, another joins the outer one."""
        with self._turn:
            if self._owner is not None:
                yield self._writer
                return
            self._refuse_closed()
            with self._one_line():
                self._writer.execute("BEGIN IMMEDIATE")
                self._owner = threading.get_ident()
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    if self._writer.in_transaction:
                        self._writer.execute("ROLLBACK")
                    raise
                finally:
                    self._owner = None

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with. Take all rows at once: an open cursor keeps writers waiting."""
        if self._owner == threading.get_ident():  # what this thread has written but not committed is seen
            yield self._writer
            return
        with self._one_line():
            with self._guard:
                self._refuse_closed()
                connection = self._idle.pop() if self._idle else None
            connection = connection or self._open()
            try:
                yield connection
            finally:
                with self._guard:
                    if self._closed:
                        connection.close()
                    else:
                        self._idle.append(connection)

    def close(self) -> None:
        """Waits for a write under way; closing twice does nothing."""
        with self._turn, self._guard:
            self._closed = True
            self._writer.close()
            while self._idle:
                self._idle.pop().close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            # Only a file in WAL mode needs the change; asking for it anew would wait for readers.
            if connection.execute("PRAGMA journal_mode").fetchone() != ("delete",):
                connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA trusted_schema = OFF")  # the file may be somebody else's
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path}: the store is closed")

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a defect of ours, not of the file
        except sqlite3.OperationalError as error:
            raise self._problem(error) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(error) from error

    def _problem(self, error: sqlite3.OperationalError) -> UserError:
        name = getattr(error, "sqlite_errorname", "").split("_")[1:2]
        match name:
            case ["BUSY"] | ["LOCKED"]:
                return EnvironmentProblem(
                    f"{self.path}: another program has been writing to it for {BUSY_SECONDS:.0f} s; close it and repeat"
                )
            case ["FULL"]:
                return EnvironmentProblem(f"{self.path}: the disk is full; nothing is lost, free some space and repeat")
            case ["READONLY"] | ["CANTOPEN"] | ["PERM"]:
                return EnvironmentProblem(f"{self.path}: cannot be written ({error}); check its permissions")
            case ["IOERR"]:
                return EnvironmentProblem(f"{self.path}: the disk refuses ({error})")
            case ["ERROR"] | []:  # a table that is missing, say, or text that is no UTF-8
                return self._damaged(error)
        return EnvironmentProblem(f"{self.path}: {error}")

    def _damaged(self, error: sqlite3.DatabaseError) -> UserError:
        what = " ".join(str(error).split())[:120]
        if "not a database" in what and backup.newest(self.path) is None:
            return UserError(f"{self.path}: not a store (nor any SQLite file); name another file with --store")
        return UserError(f"{self.path}: damaged ({what}); {backup.advice(self.path)}")


def _check_place(path: Path, create: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file with --store")
    if path.exists():
        if not path.stat().st_size and backup.newest(path) is not None:
            raise UserError(f"{path}: empty; {backup.advice(path)}")
        if not path.stat().st_size and not create:
            raise UserError(f"{path}: empty, not a store")
        return
    if not create:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such store{nearest(path.name, siblings)}")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: its folder cannot be made ({error.strerror})") from None
