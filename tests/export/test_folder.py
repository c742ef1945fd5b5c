"""The export's folder: what it may replace, and what a failure leaves."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.export.folder import MARKER, ExportFolder, check_out, check_room


def older_export(folder: Path) -> Path:
    folder.mkdir()
    (folder / MARKER).write_text("{}")
    (folder / "old.txt").write_text("old")
    return folder


def test_it_appears_whole_and_lists_its_files(tmp_path: Path) -> None:
    """SHA-256 of "abc", FIPS 180-2, appendix B.1."""
    with ExportFolder(tmp_path / "out") as folder:
        (folder.path / "a.txt").write_text("abc")
        assert not (tmp_path / "out").exists()
        folder.mark(state="passed")
        folder.publish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.txt", MARKER]
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert marker["files"] == {"a.txt": abc} and marker["state"] == "passed"


def test_an_older_export_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = older_export(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), ExportFolder(out) as folder:
        (folder.path / "new.txt").write_text("half")
        raise KeyboardInterrupt
    assert (out / "old.txt").read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["out"]
    with ExportFolder(out) as folder:
        (folder.path / "new.txt").write_text("whole")
        folder.publish()
    assert [f.name for f in out.iterdir()] == ["new.txt"] and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_killed_export_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".out.exporting"
    (left / "merging").mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    with ExportFolder(tmp_path / "out") as folder:
        assert [file.name for file in folder.path.iterdir()] == [".lock"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        ExportFolder(tmp_path / "out"),
        pytest.raises(UserError, match="in use by another process"),
        ExportFolder(tmp_path / "out"),
    ):
        raise AssertionError("the second one got in")


def test_what_failed_is_kept_under_another_name(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with ExportFolder(tmp_path / "out") as folder:
            (folder.path / "a.txt").write_text(text)
            folder.mark(state="failed")
            folder.fail()
    assert [file.name for file in tmp_path.iterdir()] == ["out.failed"]
    assert (tmp_path / "out.failed" / "a.txt").read_text() == "second"


def test_places_that_are_refused(tmp_path: Path) -> None:
    inputs = {"the run": tmp_path / "runs" / "sft", "the base": tmp_path / "base"}
    for folder in inputs.values():
        folder.mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for place, problem in {
        "file": "is a file",
        "runs": "the run .* lies in it",
        "runs/sft": "the run .* lies in it",
        "runs/sft/export": "lies in the run",
        "base/export": "lies in the base",
        "full": "exists and is not empty; --overwrite replaces an older export",
    }.items():
        with pytest.raises(UserError, match=problem):
            check_out(tmp_path / place, False, inputs)
    with pytest.raises(UserError, match=f"holds files but no {MARKER}"):
        check_out(tmp_path / "full", True, inputs)
    with pytest.raises(UserError, match="the base .* lies in it"):  # an older export that is the base now
        check_out(older_export(tmp_path / "old"), True, {"the base": tmp_path / "old"})
    check_out(older_export(tmp_path / "again"), True, inputs)
    check_out(tmp_path / "new" / "deep", False, inputs)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    check_room(tmp_path / "out", 2**29)
    with pytest.raises(EnvironmentProblem, match=r"needs 2\.00 GiB \(2147483648 bytes\), its disk has 1\.00 GiB"):
        check_room(tmp_path / "out", 2**31)
