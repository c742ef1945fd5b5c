"""Locks on files: who holds one is told, and a disk or a file that plays tricks is noticed."""

import errno
import os
import sys
from pathlib import Path

import pytest

from lowrank_align import locks
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.locks import FileLock, is_held


def test_a_second_lock_names_the_owner_and_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    with FileLock(path, busy="it: open already"):
        assert is_held(path)
        wanted = rf"^it: open already \(pid {os.getpid()}, started 2\S+\); choose another$"
        with pytest.raises(UserError, match=wanted):
            FileLock(path, busy="it: open already", advice="choose another")
    assert not is_held(path)
    FileLock(path, busy="it: open already").release()


def test_a_file_that_somebody_left_locks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "it.lock"
    path.write_text("pid 1\nstarted long ago\nand more\n")
    assert not is_held(path)
    with FileLock(path, busy="it"):
        assert path.read_text().startswith(f"pid {os.getpid()}\nstarted 2")
        assert "long ago" not in path.read_text()


def test_where_no_lock_can_be(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be written: No such file or directory"):
        FileLock(tmp_path / "nowhere" / "it.lock", busy="it")
    assert not is_held(tmp_path / "nowhere" / "it.lock")


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed on Windows")
def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening the file and locking it, its last owner deletes it: the lock ends up on the file there is."""
    take, removed = locks._lock_file, []

    def removed_before(descriptor: int, path: Path) -> bool:
        if not removed:
            removed.append(path)
            path.unlink()
        return take(descriptor, path)

    monkeypatch.setattr(locks, "_lock_file", removed_before)
    lock = FileLock(tmp_path / ".lock", busy="it")
    assert removed == [tmp_path / ".lock"]
    assert is_held(tmp_path / ".lock")
    lock.release(remove=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl is not on Windows")
def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with pytest.raises(EnvironmentProblem, match="this disk has no file locks"):
        FileLock(tmp_path / ".lock", busy="it")
