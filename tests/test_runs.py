"""A run's folder: what is refused, what is removed, who holds it, and what the listing tells."""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowrank_align import runs
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.listing import (
    compare_runs,
    delete_run,
    deletion_notice,
    list_runs,
    print_comparison,
    print_runs,
)
from lowrank_align.out_folders import refuse_protected
from lowrank_align.provenance import write_provenance
from lowrank_align.runs import is_running, open_run, read_metrics

ROOT = Path(__file__).resolve().parents[1]

HOLDER = """
import sys
from pathlib import Path
from lowrank_align.runs import open_run
with open_run(Path(sys.argv[1]), resume=True, overwrite=False, method="dpo") as run:
    run.write_config("beta: 0.1\\n")
    run.log_metrics(3, {"loss": 0.5})
    print("open", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the run at `path` open until it is killed."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline() == "open\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def finished_run(path: Path, method: str = "dpo", **metrics: float) -> Path:
    with open_run(path, resume=False, overwrite=False, method=method) as run:
        run.log_metrics(10, metrics)
        run.mark_finished({"loss": 0.25})
    return path


def state(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown(width: int = 120) -> Console:
    return Console(width=width, record=True, file=open(os.devnull, "w"))


def test_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with open_run(path, resume=False, overwrite=False, method="sft") as run:
        assert (run.path, run.adapter, run.value) == (path, path / "adapter", path / "value")
        assert (run.checkpoints, run.plots) == (path / "checkpoints", path / "plots")
        assert (state(path)["state"], state(path)["method"], run.finished) == ("running", "sft", False)
        run.write_config("rank: 8\n")
        run.log_metrics(4, {"loss": 1.0})
        run.mark_finished({"loss": 1.0})
        assert run.finished
    found = state(path)
    assert (found["state"], found["steps"], found["summary"]) == ("finished", 4, {"loss": 1.0})
    assert found["started"] <= found["finished"]
    assert (path / "config.yaml").read_text() == "rank: 8\n"


def test_an_occupied_folder_names_both_flags(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    with pytest.raises(UserError, match="--resume .* --overwrite") as caught:
        open_run(tmp_path / "run", resume=False, overwrite=False)
    assert caught.value.exit_code == 2
    assert state(tmp_path / "run")["state"] == "finished"


def test_empty_folders_and_a_lock_alone_are_free(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".lock").write_text("pid 1\n")
    for name in ("empty", "locked"):
        open_run(tmp_path / name, resume=False, overwrite=False).close()
        assert state(tmp_path / name)["state"] == "stopped"


def test_resume_starts_where_nothing_is_and_leaves_a_finished_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=True, overwrite=False, method="sft") as run:
        run.mark_finished({"loss": 2.0})
    before = state(tmp_path / "run")
    with open_run(tmp_path / "run", resume=True, overwrite=False, method="sft") as run:
        assert run.finished
    assert state(tmp_path / "run") == before


def test_resume_keeps_the_start_and_runs_again(tmp_path: Path) -> None:
    open_run(tmp_path, resume=True, overwrite=False, method="sft").close()
    (tmp_path / "run.json").write_text(json.dumps(state(tmp_path) | {"started": "2020-01-01T00:00:00+00:00"}))
    with open_run(tmp_path, resume=True, overwrite=False):
        assert (state(tmp_path)["state"], state(tmp_path)["started"][:4]) == ("running", "2020")
        assert state(tmp_path)["method"] == "sft"


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, flag: str) -> None:
    """Not even a lock is put there. Another project's config.yaml makes no run; nor does another program's run.json."""
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("theme: dark")
    (tmp_path / "run.json").write_text('{"state": "of the art"}')
    with pytest.raises(UserError, match="is no run"):
        open_run(tmp_path, resume=flag == "resume", overwrite=flag == "overwrite")
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "run.json", "thesis.tex"]


def test_a_file_and_both_flags_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "file", resume=False, overwrite=True)
    with pytest.raises(UserError, match="exclude each other"):
        open_run(tmp_path / "run", resume=True, overwrite=True)


def test_overwrite_replaces_a_run_and_nothing_that_it_links_to(tmp_path: Path) -> None:
    run, outside = finished_run(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("")
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "link").symlink_to(outside)
    with open_run(run, resume=False, overwrite=True, method="ppo") as opened:
        assert not opened.finished
        assert sorted(os.listdir(run)) == [".lock", "run.json"]
        assert (state(run)["method"], state(run)["steps"]) == ("ppo", 0)
    assert (outside / "keep").exists()


def test_overwrite_takes_a_run_known_by_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rank: 8")
    (tmp_path / "adapter").mkdir()
    with open_run(tmp_path, resume=False, overwrite=True):
        assert not (tmp_path / "adapter").exists()


def test_overwrite_and_delete_never_remove_a_home_a_checkout_or_where_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder below is a run by its files. Home is in tmp/home/user, we are in tmp/work/here."""
    for name in ("home/user", "work/here", "checkout/.git"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "user"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home" / "user"))
    monkeypatch.chdir(tmp_path / "work" / "here")
    (tmp_path / "link").symlink_to(tmp_path / "work")
    told = {"home/user": "home", "home": "home", "work/here": "current", "work": "current", "checkout": "git"}
    for name, reason in (told | {"link": "current"}).items():
        (tmp_path / name / "run.json").write_text('{"state": "finished"}')
        with pytest.raises(UserError, match=f"is .*{reason}.*never removed"):
            open_run(tmp_path / name, resume=False, overwrite=True)
        with pytest.raises(UserError, match=f"is .*{reason}.*never removed"):
            delete_run(tmp_path / name)
        assert (tmp_path / name / "run.json").exists()
    with pytest.raises(UserError, match="root of the disk|home|current"):
        refuse_protected(Path(tmp_path.anchor))


def test_an_interrupted_overwrite_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.json goes last: a run whose removal failed half-way is still a run."""
    run = finished_run(tmp_path / "run")
    for name in ("a.txt", "z.txt"):
        (run / name).write_text("")
    unlink = Path.unlink

    def failing(self: Path, missing_ok: bool = False) -> None:
        if self.name == "z.txt":
            raise OSError(errno.EIO, "Input/output error", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    with pytest.raises(EnvironmentProblem, match="z.txt: could not be removed: Input/output error"):
        open_run(run, resume=False, overwrite=True)
    monkeypatch.undo()
    assert sorted(os.listdir(run)) == [".lock", "run.json", "z.txt"]
    open_run(run, resume=False, overwrite=True).close()
    assert sorted(os.listdir(run)) == [".lock", "run.json"]


def test_a_second_process_is_refused_with_the_firsts_pid_and_a_killed_one_never_blocks(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with held_by_another(path) as child:
        assert is_running(path)
        (info,) = list_runs(tmp_path)
        assert (info.state, info.method, info.steps) == ("running", "dpo", 3)
        for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(UserError, match=rf"in use by another process \(pid {child.pid}, started 2"):
                open_run(path, **flags)
        with pytest.raises(UserError, match=f"pid {child.pid}"):
            delete_run(path)
        assert read_metrics(path / "metrics.jsonl") == [{"step": 3, "loss": 0.5}]
        child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        child.wait()
        assert (path / ".lock").read_text().startswith(f"pid {child.pid}\n")
        assert (state(path)["state"], list_runs(tmp_path)[0].state) == ("running", "stopped")
        with open_run(path, resume=True, overwrite=False):
            assert (path / ".lock").read_text().startswith(f"pid {os.getpid()}\n")


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=True, overwrite=False) as run:
        with pytest.raises(UserError, match=f"pid {os.getpid()}"):
            open_run(tmp_path / "run", resume=True, overwrite=False)
        assert is_running(run.path)
    assert not is_running(run.path)
    assert not is_running(tmp_path / "nowhere")


def test_overwriting_what_holds_a_running_run_is_refused(tmp_path: Path) -> None:
    """As `demo` does, a run may hold others."""
    outer = finished_run(tmp_path / "demo")
    with open_run(outer / "sft", resume=False, overwrite=False):
        with pytest.raises(UserError, match="sft: in use"):
            open_run(outer, resume=False, overwrite=True)
        with pytest.raises(UserError, match="sft: in use"):
            delete_run(outer)
    open_run(outer, resume=False, overwrite=True).close()
    assert not (outer / "sft").exists()


def test_failing_before_anything_is_written_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(RuntimeError), open_run(tmp_path / name, resume=False, overwrite=False):
            raise RuntimeError("no GPU")
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []


def test_failing_later_is_a_stopped_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_run(tmp_path, resume=False, overwrite=False) as run:
        run.log_metrics(7, {"loss": 1.0})
        raise RuntimeError
    assert (state(tmp_path)["state"], state(tmp_path)["steps"]) == ("stopped", 7)
    assert not is_running(tmp_path)


def test_a_full_disk_at_the_end_hides_no_error_and_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes | str) -> None:
        raise EnvironmentProblem(f"{path}: could not be written: No space left on device")

    with pytest.raises(ZeroDivisionError), open_run(tmp_path, resume=False, overwrite=False) as run:
        run.write_config("")
        monkeypatch.setattr(runs, "write_atomic", full)
        raise ZeroDivisionError
    assert not is_running(tmp_path)
    assert "No space left" in caplog.text


def test_metrics_are_json_lines_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    """`NaN` is no JSON: other programs' parsers stop at it. 0.5 is exact in float32 as well."""
    import numpy as np

    with open_run(tmp_path, resume=False, overwrite=False) as run:
        run.log_metrics(1, {"loss": math.nan, "kl": -math.inf, "score": np.float32(0.5), "rows": 3})
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 1, "loss": null, "kl": null, "score": 0.5, "rows": 3}\n'
        )
        run.log_samples(1, [{"prompt": "ü\n", "score": math.inf}, {"prompt": "\ud800"}])
        run.mark_finished({"loss": math.nan})
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": "ü\n", "score": None},
        {"step": 1, "prompt": "\ud800"},
    ]
    assert state(tmp_path)["summary"] == {"loss": None}


def test_a_full_disk_while_logging_is_one_line(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False, overwrite=False) as run:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(EnvironmentProblem, match="metrics.jsonl: could not be written: Is a directory"):
            run.log_metrics(1, {"loss": 1.0})


def test_resume_drops_what_was_logged_after_the_checkpoint(tmp_path: Path) -> None:
    """Logged to step 5 and killed within a line; resumed from step 3: 4 and 5 come again, once."""
    with open_run(tmp_path, resume=True, overwrite=False) as run:
        for step in range(1, 6):
            run.log_metrics(step, {"loss": step / 10})
            run.log_samples(step, [{"text": "a"}, {"text": "\ud800"}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    with open_run(tmp_path, resume=True, overwrite=False) as run:
        run.truncate_metrics(3)
        assert state(tmp_path)["steps"] == 3
        run.log_metrics(4, {"loss": 9.0})
    expected = [{"step": step, "loss": step / 10} for step in (1, 2, 3)]
    assert lines(tmp_path / "metrics.jsonl") == [*expected, {"step": 4, "loss": 9.0}]
    assert [sample["step"] for sample in lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]


def test_truncating_to_the_start_empties_the_logs_and_makes_none(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=True, overwrite=False) as run:
        run.log_metrics(1, {"loss": 1.0})
        run.truncate_metrics(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "samples.jsonl").exists()


def test_reading_the_tail_starts_at_a_whole_line(tmp_path: Path) -> None:
    r"""Four lines of 12 bytes `{"step": 1}\n`. The last 30 bytes begin within the second: two are read."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 4)))
    assert [line["step"] for line in read_metrics(file, tail_bytes=30)] == [3, 4]
    assert [line["step"] for line in read_metrics(file, tail_bytes=48)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path / "none") == []


def test_the_listing(tmp_path: Path) -> None:
    """Sizes by hand: 1000 bytes of adapter, the rest as the system tells."""
    sft = finished_run(tmp_path / "sft", "sft", loss=2.0)
    (sft / "adapter").mkdir()
    (sft / "adapter" / "weights").write_bytes(b"0" * 1000)
    dpo = tmp_path / "dpo"
    with open_run(dpo, resume=False, overwrite=False, method="dpo") as run:
        run.log_metrics(20, {"loss": 0.5, "rewards/accuracies": 0.75})
        run.log_metrics(20, {"eval_loss": 0.625})
        parent = {"run": str(sft), "adapter_hash": "ab"}
        write_provenance(dpo, base="org/base", base_hash="cd", method="dpo", parent=parent)
    finished_run(tmp_path / "demo", "demo")
    finished_run(tmp_path / "demo" / "ppo", "ppo", **{"objective/scores": 1.5, "rewards/accuracies": 0.1})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    (dpo / "checkpoints" / "step-20").mkdir(parents=True)

    found = {info.name: info for info in list_runs(tmp_path)}
    assert list(found) == ["demo", str(Path("demo") / "ppo"), "dpo", "sft"]
    info = found["dpo"]
    assert (info.method, info.state, info.steps, info.base, info.parent) == ("dpo", "stopped", 20, "org/base", str(sft))
    assert (info.metrics, info.key_metric) == (
        {"loss": 0.5, "rewards/accuracies": 0.75, "eval_loss": 0.625},
        ("accuracy", 0.75),
    )
    assert found[str(Path("demo") / "ppo")].key_metric == ("score", 1.5)
    assert (found["sft"].state, found["sft"].key_metric, found["sft"].parent) == ("finished", None, None)
    own = [sft / name for name in (".lock", "run.json", "metrics.jsonl")]
    assert found["sft"].disk_bytes == 1000 + sum(file.stat().st_size for file in own)

    narrow = Console(file=io.StringIO(), width=80)
    print_runs(tmp_path, narrow)
    assert all(f"\n{name} " in f"\n{narrow.file.getvalue()}" for name in found)  # type: ignore[attr-defined]

    (dpo / "checkpoints" / "step-20" / "manifest.json").write_text("{}")
    assert next(info.state for info in list_runs(tmp_path) if info.name == "dpo") == "stopped (resumable)"
    assert [info.name for info in list_runs(sft)] == ["sft"]


def test_the_listing_survives_damaged_files(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "sft", loss=1.0)
    (run / "provenance.json").write_text("{")
    (run / "metrics.jsonl").write_bytes(b"\xff\x00\n[1]\n{}\n")
    (info,) = list_runs(tmp_path)
    assert (info.method, info.steps, info.metrics, info.base) == ("sft", 10, {}, "")


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list_runs(tmp_path / "runs")


def test_the_table(tmp_path: Path) -> None:
    """12 345 678 bytes are 12.3 MB."""
    run = finished_run(tmp_path / "first [bold]", "dpo", loss=0.6931, **{"rewards/accuracies": 0.8})
    with open(run / "large", "wb") as file:
        file.truncate(12_345_678)
    console = shown()
    print_runs(tmp_path, console)
    text = console.export_text()
    for cell in ("first [bold]", "dpo", "finished", "10", "0.6931", "accuracy 0.8", "12.3 MB", "1 run, 12.3 MB"):
        assert cell in text
    console = shown()
    print_runs(run / "..", console)
    delete_run(run)
    print_runs(tmp_path, console)
    assert "no runs" in console.export_text()


def test_the_total_counts_a_run_within_a_run_once(tmp_path: Path) -> None:
    """The inner run's 3 MB are among the outer's."""
    outer = finished_run(tmp_path / "demo")
    with open(finished_run(outer / "sft") / "large", "wb") as file:
        file.truncate(3_000_000)
    console = shown()
    print_runs(tmp_path, console)
    assert "2 runs, 3.0 MB" in console.export_text()


def test_comparing_shows_what_differs_and_the_last_figures(tmp_path: Path) -> None:
    a = finished_run(tmp_path / "a", "dpo", loss=0.5)
    b = finished_run(tmp_path / "b", "sft", loss=0.25, entropy=1.0)
    (a / "config.yaml").write_text("method: dpo\nrank: 8\nbeta: 0.1\nseed: 0\n")
    (b / "config.yaml").write_text("method: sft\nrank: 16\nseed: 0\n")
    found = compare_runs([a, b])
    assert found.config == {"beta": [0.1, None], "method": ["dpo", "sft"], "rank": [8, 16]}
    assert found.metrics == {"entropy": [None, 1.0], "loss": [0.5, 0.25], "step": [10, 10]}
    console = shown()
    print_comparison(a, b, console)
    text = [line.split() for line in console.export_text().splitlines()]
    assert ["rank", "8", "16"] in text
    assert ["beta", "0.1", "-"] in text
    assert ["loss", "0.5", "0.25"] in text
    with pytest.raises(UserError, match="not a run's folder"):
        compare_runs([a, tmp_path])


def test_deleting_tells_what_goes_and_who_came_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent is given in full, from the current folder or from beside the run; a namesake elsewhere is no child."""
    sft = finished_run(tmp_path / "runs" / "sft", "sft", loss=1.0)
    monkeypatch.chdir(tmp_path)
    named = {"a": str(sft), "b": "runs/sft", "c": "sft", "d": "other/sft", "e": None}
    for name, parent in named.items():
        run = finished_run(tmp_path / "runs" / name, "dpo")
        given = {"run": parent, "adapter_hash": "ab"} if parent else None
        write_provenance(run, base="m", base_hash="cd", method="dpo", parent=given)
    notice = deletion_notice(sft)
    assert ": sft, finished, 10 steps, " in notice
    assert notice.endswith("bytes; a, b, c started from it")
    assert sft.exists()
    assert delete_run(sft) == notice
    assert not sft.exists()
    assert deletion_notice(tmp_path / "runs" / "e").endswith("bytes")


def test_only_runs_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.pdf").write_text("")
    for name in ("papers", "nowhere"):
        with pytest.raises(UserError, match="not a run's folder"):
            delete_run(tmp_path / name)
    assert (tmp_path / "papers" / "a.pdf").exists()


def test_the_listing_needs_no_torch() -> None:
    code = "import sys, lowrank_align.runs, lowrank_align.plots; print('torch' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout == "False\n", child.stderr
