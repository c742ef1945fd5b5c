"""SIGTERM and Ctrl-C to a real training process: it saves, says how to go on, and can be gone on with.

Both children start at once, so that their imports, which take most of the time, run side by side.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.checkpoint import sealed_steps

SIGNALS = ("SIGTERM", "SIGINT")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals for other processes")


def arguments(trained: Path, tiny_llama: Path, steps: int) -> list[str]:
    """A run that lasts, logs every step, and saves only when it is told to stop."""
    given = ["sft", "--model", str(tiny_llama), "--data", str(trained / "demonstrations.jsonl"), "--quantize", "none"]
    given += ["--rank", "2", "--batch-size", "2", "--lr-schedule", "constant", "--sample-steps", "0"]
    return [*given, "--save-steps", "1000000", "--max-steps", str(steps)]


@pytest.fixture(scope="module")
def children(trained: Path, tiny_llama: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """For each signal a folder, and in it a process that trains."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWRANK_ALIGN_CACHE": str(cache)}
    started = {}
    for name in SIGNALS:
        folder = tmp_path_factory.mktemp(name)
        argv = [sys.executable, "-m", "lowrank_align", *arguments(trained, tiny_llama, 1_000_000), "--out", "run"]
        started[name] = (
            folder,
            subprocess.Popen(
                argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ),
        )
    yield started
    for _, child in started.values():
        child.kill()
        child.communicate()


@pytest.mark.parametrize("name", SIGNALS)
def test_stopped_saved_and_gone_on_with(
    name: str,
    children: dict[str, tuple[Path, subprocess.Popen[str]]],
    trained: Path,
    tiny_llama: Path,
    command: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, child = children[name]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    assert child.stdout is not None
    while not child.stdout.readline().startswith("step "):
        assert child.poll() is None, child.communicate()

    for flags in ((), ("--resume",), ("--overwrite",)):  # while it works, nobody else may
        second = command(*arguments(trained, tiny_llama, 3), "--out", "run", *flags)
        assert second.code == 2
        assert second.err.startswith(f"error: run: in use by another process (pid {child.pid}, started ")

    child.send_signal(getattr(signal, name))
    _, errors = child.communicate()
    assert child.returncode == 75, errors
    noticed, stopped = errors.strip().splitlines()[-2:]
    assert noticed == f"{name}: saving at the end of this step (again: stop at once)"
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert stopped == (
        f"run: stopped at step {len(steps)} of 1000000 and saved; the same command with --resume goes on"
    )
    assert steps == list(range(1, len(steps) + 1))
    assert sealed_steps(Path("run/checkpoints")) == [len(steps)]
    assert "stopped (resumable)" in " ".join(command("runs", "run").out.split())

    outcome = command(*arguments(trained, tiny_llama, len(steps) + 2), "--out", "run", "--resume")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"resumed from step-{len(steps)} of {len(steps) + 2} steps" in outcome.out
    found = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert found == [*steps, len(steps) + 1, len(steps) + 2]
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_a_second_signal_stops_at_once(
    trained: Path, tiny_llama: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both arrive in one step, in which nothing is saved any more; handlers are the old ones afterwards."""
    from lowrank_align.methods.sft import SFT

    def step(*_args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SFT, "step", step)
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    outcome = command(*arguments(trained, tiny_llama, 2), "--out", tmp_path / "run")
    words = "interrupted; --resume goes on from the last checkpoint, if there is one\n"
    assert (outcome.code, outcome.err) == (75, words)
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "stopped"
    assert sealed_steps(tmp_path / "run/checkpoints") == []


def test_a_terminal_that_is_closed(trained: Path, tiny_llama: Path, cache: Path, tmp_path: Path) -> None:
    """The run learns of it by SIGHUP, and what it prints from then on would be an error: it is saved all the same."""
    import fcntl
    import termios

    ours, theirs = os.openpty()

    def in_a_terminal_of_its_own() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` would hand its own down
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    argv = [sys.executable, "-m", "lowrank_align", *arguments(trained, tiny_llama, 1_000_000), "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWRANK_ALIGN_CACHE": str(cache)}
    child = subprocess.Popen(
        argv, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=in_a_terminal_of_its_own,
    )  # fmt: skip
    try:
        os.close(theirs)
        said = b""
        while b"loss" not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        assert child.wait(60) == 75
    finally:
        child.kill()
        child.wait()
    assert sealed_steps(tmp_path / "run" / "checkpoints")
