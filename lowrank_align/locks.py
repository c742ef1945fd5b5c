"""Exclusive locks on files, which the operating system gives back when their process ends, however it ends."""

import contextlib
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.links import no_link

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_BYTE = 2**30  # Windows locks bytes, not files: one far behind the text, so that the text stays readable
LOCK_TRIES, LOCK_PAUSE_SECONDS = 5, 0.02  # `is_held` holds the lock for a moment while it looks


class FileLock:
    """The lock on a file, which holds the owner's pid and start. The lock is the system's, not the file's being there:
    a file left by a killed process locks nothing."""

    def __init__(self, path: Path, *, busy: str, advice: str = "wait for it or stop it") -> None:
        """UserError where another has it: `{busy} (pid 12, started ...); {advice}`."""
        self.path = path
        for attempt in range(LOCK_TRIES):
            if self._take():
                break
            if attempt == LOCK_TRIES - 1:
                raise UserError(f"{busy} ({owner(self.path)}); {advice}")
            time.sleep(LOCK_PAUSE_SECONDS)
        try:
            self._file.truncate(0)
            self._file.write(f"pid {os.getpid()}\nstarted {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # it tries again to write
                self._file.close()
            raise EnvironmentProblem(f"{self.path}: could not be written: {error.strerror}") from error

    def _take(self) -> bool:
        if self.path.is_symlink():
            raise UserError(f"{self.path}: a link, which no lock is; remove it")
        try:
            self._file = open(self.path, "a+b", opener=no_link)  # noqa: SIM115  held until release
        except OSError as error:
            raise EnvironmentProblem(f"{self.path}: cannot be written: {error.strerror or error}") from error
        if _lock_file(self._file.fileno(), self.path):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    return True  # else its last owner removed the file between our open and our lock
        self._file.close()
        return False

    def release(self, remove: bool = False) -> None:
        """Unlock; with `remove` the file goes too (on Windows only after closing, elsewhere before)."""
        if sys.platform != "win32":
            if remove:
                with contextlib.suppress(OSError):  # a file that stays locks nothing
                    self.path.unlink(missing_ok=True)
            fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)  # closing is not enough while a forked worker has a copy
        self._file.close()
        if remove and sys.platform == "win32":
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether a process, of this machine or one that shares the disk, holds the lock on `path`."""
    try:
        with open(path, "r+b") as file:
            return not _lock_file(file.fileno(), path)
    except (OSError, EnvironmentProblem):
        return False


def owner(path: Path) -> str:
    """Who holds the lock, for a message: its pid and since when."""
    with contextlib.suppress(OSError):
        return ", ".join(path.read_text(errors="replace").split("\n")[:2]).strip(", ") or "starting"
    return "pid unknown"


def _lock_file(descriptor: int, path: Path) -> bool:
    """Take the lock if it is free."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, LOCK_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise EnvironmentProblem(f"{path}: this disk has no file locks ({error.strerror}); use a local one") from error
    return True
