"""The export's folder: written under another name beside its place, and renamed when it is whole and checked.

A kill leaves the older export as it was, or nothing. What failed its check is kept as `NAME.failed`, never as `NAME`:
a script that does not look at the exit code must not go on with it.
"""

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.links import refuse_links
from lowrank_align.out_folders import check_place, refuse_protected
from lowrank_align.provenance import file_sha256, versions
from lowrank_align.runs import FolderLock

MARKER = "export.json"
MARGIN_BYTES = 64 * 2**20


def check_out(out: Path, overwrite: bool, inputs: dict[str, Path]) -> None:
    """Refuse a place that no export may take. `inputs` are folders that must stay, by what they are called."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder with --out")
    for name, folder in inputs.items():
        ours, theirs = out.resolve(), folder.resolve()
        if ours == theirs or ours in theirs.parents:
            raise UserError(f"{out}: {name} {folder} lies in it; choose another --out")
        if theirs in ours.parents:
            raise UserError(f"{out}: lies in {name} {folder}; choose another --out")
    check_place(out)
    if not out.exists() or not os.listdir(out):
        return
    if not overwrite:
        raise UserError(f"{out}: exists and is not empty; --overwrite replaces an older export")
    if not (out / MARKER).is_file():
        raise UserError(f"{out}: holds files but no {MARKER}, so it is no export and left alone; choose another --out")
    refuse_protected(out)


def check_room(out: Path, needed_bytes: int) -> None:
    """EnvironmentProblem where the disk has no room for so many bytes."""
    free = shutil.disk_usage(check_place(out)).free
    if free < needed_bytes + MARGIN_BYTES:
        raise EnvironmentProblem(
            f"{out}: the export needs {_size(needed_bytes)}, its disk has {_size(free)} free; choose another --out"
        )


class ExportFolder:
    """The folder while it is written, at `path`; gone at the end of the `with` unless `publish` or `fail` came."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.absolute().with_name(f".{out.name}.exporting")
        refuse_links([self.path])
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(f"{out}: cannot be made: {error.strerror}") from error
        self._lock: FolderLock | None = FolderLock(self.path)
        for left in self.path.iterdir():  # by a process that was killed
            if left != self._lock.path:
                _remove(left)

    def mark(self, **facts: Any) -> None:
        """Write `export.json`: what this is, made of what, with the SHA-256 of every file."""
        files = sorted(f for f in self.path.rglob("*") if f.is_file() and f.name not in (MARKER, ".lock"))
        sums = {f.relative_to(self.path).as_posix(): file_sha256(f) for f in files}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"format": 1, **facts, "files": sums, "versions": versions(), "created": created}
        write_atomic(self.path / MARKER, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def publish(self) -> Path:
        """Put the folder in its place, an older export's included."""
        return self._move(self.out)

    def fail(self) -> Path:
        """Keep the folder as `NAME.failed`, in the place of an older failure."""
        place = self.out.absolute().with_name(f"{self.out.name}.failed")
        if place.exists() and not (place / MARKER).is_file():
            raise UserError(f"{place}: is in the way of a failed export, and none itself; move it")
        return self._move(place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release(remove=True)
            shutil.rmtree(self.path, ignore_errors=True)

    def _move(self, place: Path) -> Path:
        _sync(self.path)
        if self._lock is not None:
            self._lock.release(remove=True)
            self._lock = None
        older = place.absolute().with_name(f".{place.name}.older")
        try:
            _remove(older)
            if place.exists():
                os.replace(place, older)
            os.replace(self.path, place)
            _remove(older)
        except OSError as error:
            raise EnvironmentProblem(f"{place}: cannot be put in place: {error.strerror}; it is {self.path}") from error
        return place


def _sync(folder: Path) -> None:
    """To the disk before the renaming, so that a crash leaves no whole-looking folder of empty files."""
    for file in folder.rglob("*"):
        if file.is_file() and os.name != "nt":  # Windows cannot sync what is open for reading
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB ({count} bytes)" if count >= 2**20 else f"{count} bytes"
