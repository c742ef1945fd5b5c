"""A run's folder: who may write in it, and what is logged there (`listing` shows all of them).

One process at a time holds a run, through a lock on `.lock` that the operating system gives back when the process
ends, however it ends. `run.json` tells how far the run got.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lowrank_align.durable import LEFT_OVER, write_atomic, writing
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.json_files import read_json
from lowrank_align.links import no_link, refuse_links
from lowrank_align.locks import FileLock, is_held, owner
from lowrank_align.out_folders import check_place, refuse_protected

log = logging.getLogger(__name__)

LOCK, STATE, CONFIG, METRICS, SAMPLES = ".lock", "run.json", "config.yaml", "metrics.jsonl", "samples.jsonl"
SUBFOLDERS = ("adapter", "value", "checkpoints", "plots")
SERVED = "rollout_adapters"  # what a rollout server has loaded, while it has
OTHERS = ("provenance.json", "reward.json", "README.md", "bad_rows.jsonl", "eval_bad_rows.jsonl", "dropped_rows.jsonl")
KNOWN_ENTRIES = {LOCK, STATE, CONFIG, METRICS, SAMPLES, SERVED, *OTHERS, *SUBFOLDERS}
STATES = ("running", "finished", "stopped")


def open_run(path: Path, *, resume: bool, overwrite: bool, method: str = "") -> RunFolder:
    """Take the folder `path` for a run of `method` and lock it; use the result in a `with`.

    Raises UserError where the folder holds something and neither flag says what to do with it, where `overwrite`
    would remove anything but a run, where another process has it, or where a link in it leads elsewhere.
    """
    path = Path(path)
    if resume and overwrite:
        raise UserError(f"{path}: --resume and --overwrite exclude each other; choose one")
    check_output(path, resume, overwrite)
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot make the run's folder: {error.strerror}") from error
    lock = FolderLock(path)
    try:
        check_output(path, resume, overwrite)  # again: it may have been filled before the lock was ours
        if overwrite:
            _refuse_running_inside(path)
            empty(path)
        _remove_left_overs(path)
        return RunFolder(path, lock, method, created)
    except BaseException:
        lock.release()
        raise


class RunFolder:
    """A run's folder, locked for this process until the `with` ends or `close` is called."""

    def __init__(self, path: Path, lock: FolderLock, method: str, created: bool) -> None:
        self.path = path
        self.adapter, self.value, self.checkpoints, self.plots = (path / name for name in SUBFOLDERS)
        self._lock, self._created = lock, created
        self._state = read_state(path) or {"method": method, "started": _now(), "steps": 0, "summary": {}}
        if not self.finished:
            self._write_state(state="running", finished=None)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`; NaN and infinities become null."""
        self._append(METRICS, [{"step": step, **values}])
        self._state["steps"] = step

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append one line a sample to `samples.jsonl`."""
        self._append(SAMPLES, [{"step": step, **sample} for sample in samples])

    def truncate_metrics(self, step: int) -> None:
        """On resume from `step`: drop what was logged after it, and a torn line, so that nothing is doubled."""
        for name in (METRICS, SAMPLES):
            if (self.path / name).exists():
                kept = [line for line in read_metrics(self.path / name) if line["step"] <= step]
                write_atomic(self.path / name, b"".join(_json_line(line) for line in kept))
        self._write_state(steps=step)

    def write_config(self, text: str) -> None:
        """Save the resolved configuration."""
        write_atomic(self.path / CONFIG, text)

    def mark_finished(self, summary: dict[str, Any]) -> None:
        """Note that the run is complete, with its last figures."""
        self._write_state(state="finished", finished=_now(), summary=summary)

    @property
    def finished(self) -> bool:
        """Whether the run is complete, so that `--resume` has nothing to do."""
        return self._state.get("state") == "finished"

    def close(self) -> None:
        """Note a run that is not complete as stopped, and unlock the folder."""
        try:
            if not self.finished:
                self._write_state(state="stopped")
        except EnvironmentProblem as problem:  # nothing is lost: an unlocked run that is not finished counts as stopped
            log.warning("%s", problem)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        entries = set(os.listdir(self.path)) if self.path.is_dir() else {LOCK}
        if kind is not None and entries <= {LOCK, STATE}:  # it failed before it wrote anything: leave no trace
            with contextlib.suppress(OSError):
                (self.path / STATE).unlink(missing_ok=True)
            self._lock.release(remove=True)
            if self._created:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
        else:
            self.close()

    def _write_state(self, **changes: Any) -> None:
        self._state |= changes
        write_atomic(self.path / STATE, json.dumps(_finite(self._state), indent=2) + "\n")

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        with writing(self.path / name), open(self.path / name, "ab", opener=no_link) as file:
            file.writelines(_json_line(line) for line in lines)


class RunElsewhere(RunFolder):
    """A run whose folder another process has: it can be read, and nothing is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter, self.value, self.checkpoints, self.plots = (path / name for name in SUBFOLDERS)
        self._state = {}

    def truncate_metrics(self, step: int) -> None:
        pass

    def write_config(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def _write_state(self, **changes: Any) -> None:
        pass

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        pass


class FolderLock(FileLock):
    """The lock on a run's folder: on its `.lock`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / LOCK, busy=f"{folder}: in use by another process")


def is_running(folder: Path) -> bool:
    """Whether a process, of this machine or one that shares the disk, has the run open."""
    return is_held(folder / LOCK)


def read_metrics(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl` or `samples.jsonl`, or of its last `tail_bytes`; a torn line is left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        if tail_bytes is not None and path.stat().st_size > tail_bytes:
            file.seek(-tail_bytes, os.SEEK_END)
            file.readline()
        found = []
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    found.append(entry)
    return found


def looks_like_run(path: Path) -> bool:
    """A `run.json` of ours, or a `config.yaml` among nothing but what runs hold (other projects have one too)."""
    if not path.is_dir():
        return False
    return read_state(path) is not None or ((path / CONFIG).is_file() and _entries(path) <= KNOWN_ENTRIES)


def check_output(path: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that no run may take: occupied and neither flag says what to do, no run's, or not to be made."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; name a folder with --out")
    check_place(path)
    if not path.exists() or _entries(path) <= {LOCK}:
        return
    if not resume and not overwrite:
        raise UserError(f"{path}: exists and is not empty; --resume goes on with it, --overwrite replaces it")
    if not looks_like_run(path):
        raise UserError(f"{path}: holds files but is no run, so it is left alone; choose another --out")
    if overwrite:
        refuse_protected(path)
    else:
        refuse_links(path / name for name in KNOWN_ENTRIES)
        # checkpoints pass over links, and write into new folders only
        refuse_links(
            entry for name in (*SUBFOLDERS, SERVED) if name != "checkpoints" for entry in (path / name).rglob("*")
        )


def _entries(path: Path) -> set[str]:
    """What is in a folder, but for what a kill left of a file of a run that was being written."""
    found = {name: LEFT_OVER.fullmatch(name) for name in os.listdir(path)}
    return {name for name, left in found.items() if left is None or left[1] not in KNOWN_ENTRIES}


def _remove_left_overs(path: Path) -> None:
    for folder in (path, *(path / name for name in SUBFOLDERS)):
        for entry in folder.glob(".*.tmp"):
            left = LEFT_OVER.fullmatch(entry.name)
            if left and (folder != path or left[1] in KNOWN_ENTRIES):
                with contextlib.suppress(OSError):
                    entry.unlink()


def refuse_running(path: Path) -> None:
    """UserError with the pid where a process works in `path`, or in a run that it holds."""
    _refuse_running_inside(path, own_lock=False)


def _refuse_running_inside(path: Path, own_lock: bool = True) -> None:
    """A run that holds others (as `demo` does) stays while a process works in one of them."""
    for lock in path.rglob(LOCK):
        if not (own_lock and lock.parent == path) and is_running(lock.parent):
            raise UserError(f"{lock.parent}: in use by another process ({owner(lock)}); wait for it or stop it")


def empty(path: Path) -> None:
    """Remove everything but the lock, and what shows that this is a run last, should a kill come between."""
    try:
        for entry in sorted(path.iterdir(), key=lambda entry: (entry.name == STATE, entry.name == CONFIG, entry.name)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
    except OSError as error:
        raise EnvironmentProblem(f"{error.filename or path}: could not be removed: {error.strerror}") from error


def read_state(path: Path) -> dict[str, Any] | None:
    """A run's `run.json`; None where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = read_json(path / STATE)
        if isinstance(state, dict) and state.get("state") in STATES:
            return state
    return None


def _json_line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(_finite(entry), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair becomes its JSON escape


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: non-finite floats as null, numpy's and torch's numbers as Python's."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
