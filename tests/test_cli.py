"""The command line around the commands: help, precedence, runs, resuming, and what it prints where."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align import __version__
from lowrank_align.cli import OTHER_COMMANDS, command_names, main
from lowrank_align.config import METHODS, read_yaml
from lowrank_align.runs import FolderLock

Command = Callable[..., Any]

FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with rows and, under `runs`, the two runs of `trained`."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs").mkdir()
    for name in ("sft", "reward"):
        (tmp_path / name).rename(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_run_that_nobody_reads_goes_on(here: Path, tiny_llama: Path) -> None:
    """As in `lowrank-align sft ... | head -1`: rich would end the process there, and nothing would be saved."""
    argv = [sys.executable, "-m", "lowrank_align", "sft", "--model", str(tiny_llama), "--data", "demonstrations.jsonl"]
    with subprocess.Popen([*argv, *FEW, "--out", "unread"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.wait() == 0
    assert json.loads((here / "unread/run.json").read_text())["state"] == "finished"


@pytest.fixture
def sft(tiny_llama: Path) -> tuple[object, ...]:
    return ("sft", "--model", tiny_llama, "--data", "demonstrations.jsonl", *FEW)


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what it says about itself


def test_version(command: Command) -> None:
    assert command("--version") == (0, f"lowrank-align {__version__}\n", "")


@pytest.mark.parametrize("name", [*METHODS, *OTHER_COMMANDS])
def test_help_documents_every_setting_with_its_default(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flag's paragraph holds its description and, unless the description says what is without it, the default."""
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken
    outcome = command(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    paragraphs = {}
    for paragraph in outcome.out.split("\n  -")[1:]:
        words = " ".join(f"-{paragraph}".split())
        paragraphs |= {flag.split()[0].rstrip(","): words for flag in words.split(", ") if flag.startswith("--")}
    settings = (METHODS | OTHER_COMMANDS)[name]
    for field, info in settings.model_fields.items():
        if (name, field) == ("presets", "name"):  # the one that needs no flag
            assert f" name {info.description}" in " ".join(outcome.out.split())
            continue
        said = paragraphs[f"--{'json' if field == 'as_json' else field.replace('_', '-')}"]
        assert " ".join(str(info.description).split()) in said
        shown = {True: "yes", False: "no"}[info.default] if isinstance(info.default, bool) else info.default
        shown = " ".join(shown) if isinstance(shown, list) else shown
        if not info.is_required() and info.default not in (None, []):
            assert f"(default: {shown})" in said, said
    assert "--config" in paragraphs


def test_nothing_heavy_is_loaded_before_it_is_needed() -> None:
    """In a fresh Python, without torch: all help, mistakes in flags and settings, listing and comparing runs, the
    presets, and a preset's plan where the GPU is named (16 GiB of weights are too much for 6)."""
    heavy = ["accelerate", "bitsandbytes", "datasets", "matplotlib", "peft", "torch", "transformers"]
    code = f"""
import contextlib, io, sys
from lowrank_align.cli import command_names, main
codes = []
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for argv in (["--version"], ["--help"], *([name, "--help"] for name in command_names()), ["sft", "--no-such-flag"]):
        try:
            main(argv)
        except SystemExit as stopped:
            codes.append(stopped.code)
    plan = ["plan", "--preset", "qwen3-0.6b", "--gpu", "12GiB"]
    for argv in (["sft", "--rank", "0"], ["runs"], ["runs", "--compare", "runs/sft", "runs/reward"],
                 ["presets"], ["presets", "qwen3-4b"], plan, [*plan, "--json"],
                 ["plan", "--preset", "qwen3-32b", "--gpu", "6GiB"]):
        codes.append(main(argv))
print(codes, [name for name in {heavy} if name in sys.modules])
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == f"{[0] * (2 + len(command_names())) + [2, 2, 0, 0, 0, 0, 0, 0, 3]} []\n"


def test_what_the_terminal_cannot_show_is_escaped(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 7 bits, a template that writes an 8th one, and a file's name with such a letter."""
    Path("rows.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    Path("t.jinja").write_text("{% for m in messages %}\u00e9{{ m['content'] }}</s>{% endfor %}", encoding="utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["show", "--model", str(tiny_llama), "--data", "rows.jsonl", "--chat-template", "t.jinja"]) == 0
    assert main(["runs", "--delete", "caf\u00e9"]) == 2
    assert main(["runs", "caf\u00e9"]) == 2
    out.flush(), err.flush()
    assert b"rows.jsonl:1" in out.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"error: caf\\xe9: no such folder" in err.buffer.getvalue()  # type: ignore[attr-defined]


# ---- settings


def test_flags_over_file_over_defaults(sft: tuple[object, ...], command: Command) -> None:
    """rank is in both, seed in the file alone, batch_size in neither; over a yes of the file there is a --no- flag."""
    Path("c.yaml").write_text("rank: 8\nseed: 7\ngradient_checkpointing: yes\nskip_bad: yes\nlearning_rate: 1e-3\n")
    base = [word for word in sft if word not in ("--batch-size",)]
    base.remove("2")  # the batch size's; the rank's stays
    argv = (*base, "--out", "new", "--config", "c.yaml", "--no-gradient-checkpointing")
    assert command(*argv).code == 0
    found = read_yaml("new/config.yaml")
    expected = {"rank": 2, "seed": 7, "batch_size": 16, "gradient_checkpointing": False, "skip_bad": True}
    assert {name: found[name] for name in expected} == expected
    assert found["learning_rate"] == 1e-3
    assert "resume" not in found


def test_a_runs_file_runs_it_again(sft: tuple[object, ...], command: Command) -> None:
    """The same bytes; `--out` is the one flag that is needed."""
    assert command(*sft, "--out", "new", "--seed", 3, "--learning-rate", 0.01).code == 0
    assert command("sft", "--config", "new/config.yaml", "--out", "again").code == 0
    assert Path("again", WEIGHTS).read_bytes() == Path("new", WEIGHTS).read_bytes()
    assert Path("again", WEIGHTS).read_bytes() != Path("runs/sft", WEIGHTS).read_bytes()


def test_a_reward_function_in_the_current_folder(
    tiny_llama: Path, here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path(f"{here.name}.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    argv = ("ppo", "--model", tiny_llama, "--prompts", "pairs.jsonl", "--out", "new", "--max-new-tokens", 4, *FEW)
    assert command(*argv, "--reward", f"{here.name}:length").code == 0
    (metrics,) = [json.loads(line) for line in Path("new/metrics.jsonl").read_text().splitlines()]
    assert 0 <= metrics["objective/scores"] <= 4 * 3  # the longest token has three letters


# ---- runs


def test_runs_are_listed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = command("runs")
    assert outcome.code == 0
    rows = {line.split()[0]: line.split()[1:5] for line in outcome.out.splitlines()[1:3]}
    assert rows.keys() == {"sft", "reward"}
    assert rows["sft"][:3] == ["sft", "finished", "2"]
    assert rows["reward"][:3] == ["reward", "finished", "2"]
    assert outcome.out.splitlines()[-1].startswith("2 runs, ")
    assert command("runs", "no-folder").err == "error: no-folder: no such folder; runs are where --out put them\n"


def test_runs_are_compared(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = command("runs", "--compare", "runs/sft", "runs/reward")
    assert outcome.code == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["method", "sft", "reward"] in lines
    assert not any(line[:1] == ["rank"] for line in lines)  # both have 2
    loss = json.loads(Path("runs/sft/metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert any(line[:2] == ["loss", f"{loss:.6g}"] for line in lines)
    assert command("runs", "--compare", "runs/sft", "runs").err.startswith("error: runs: not a run's folder")


def test_runs_are_deleted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a yes, or with --yes; without anybody to answer, nothing goes."""
    for answer, kept in (("n\n", True), ("", True), ("whatever\n", True), ("Yes\n", False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        outcome = command("runs", "--delete", "runs/sft")
        assert outcome.code == 0
        assert outcome.out.startswith("runs/sft: sft, finished, 2 steps, ")
        assert Path("runs/sft").exists() == kept
        assert ("kept" in outcome.out) == kept
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert command("runs", "--delete", "runs/reward", "--yes").code == 0
    assert os.listdir("runs") == []
    assert command("runs", "--delete", "runs", "--yes").code == 2


def test_a_running_run_is_listed_and_not_deleted(command: Command) -> None:
    lock = FolderLock(Path("runs/sft"))
    try:
        assert "running" in command("runs").out
        outcome = command("runs", "--delete", "runs/sft", "--yes")
    finally:
        lock.release()
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: runs/sft: in use by another process (pid {os.getpid()}, started ")
    assert Path("runs/sft", WEIGHTS).is_file()


# ---- output folders


def test_resuming_a_finished_run_does_nothing(
    sft: tuple[object, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_align.base import Base

    monkeypatch.setattr(Base, "load", lambda *_args, **_options: pytest.fail("the model was loaded"))
    before = content_of(Path("runs"))
    told = "runs/sft: finished already at step 2 (to train on: a new --out with --adapter runs/sft)\n"
    assert command(*sft, "--out", "runs/sft", "--resume") == (0, told, "")
    assert content_of(Path("runs")) == before


def test_resume_starts_where_nothing_is(sft: tuple[object, ...], command: Command) -> None:
    assert command(*sft, "--out", "new", "--resume").code == 0
    assert Path("new", WEIGHTS).is_file()


def test_overwrite_replaces(sft: tuple[object, ...], command: Command) -> None:
    """Nothing of the older run stays, and the new one is as if the folder had been empty."""
    Path("runs/sft/bad_rows.jsonl").touch()
    assert command(*sft, "--out", "runs/sft", "--overwrite").code == 0
    assert command(*sft, "--out", "fresh").code == 0
    assert {path for path in content_of(Path("runs/sft"))} == {path for path in content_of(Path("fresh"))}
    assert Path("runs/sft", WEIGHTS).read_bytes() == Path("fresh", WEIGHTS).read_bytes()


def test_folders_of_the_home(sft: tuple[object, ...], command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a configuration file no shell replaces the ~."""
    home = Path("home")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home.resolve()))
    Path("c.yaml").write_text("out: ~/deep/run\n")
    assert command(*sft, "--config", "c.yaml").code == 0
    assert (home / "deep/run" / WEIGHTS).is_file()
    assert not Path("~").exists()


# ---- what ends a command


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
)
def test_no_memory(
    error: Exception, sft: tuple[object, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model is loaded; the training loop has its own answer. Other errors are ours and show themselves."""
    from lowrank_align.base import Base

    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(Base, "load", fail)
    line = "error: out of memory; take a smaller model, --batch-size, --max-length or --rank\n"
    outcome = command(*sft, "--out", "new")
    assert (outcome.code, outcome.err) == (3, line)
    assert not Path("new").exists()
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        command(*sft, "--out", "new")


def test_ctrl_c_while_the_model_loads(
    sft: tuple[object, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_align.base import Base

    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Base, "load", interrupt)
    outcome = command(*sft, "--out", "new")
    assert (outcome.code, outcome.err) == (
        75,
        "interrupted; --resume goes on from the last checkpoint, if there is one\n",
    )
    assert not Path("new").exists()


@pytest.mark.parametrize("argv", [["runs"], ["--help"]])
def test_a_reader_that_has_seen_enough(argv: list[str]) -> None:
    """As `lowrank-align runs | true` has it: no complaint."""
    child = subprocess.Popen(
        [sys.executable, "-m", "lowrank_align", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout
    child.stdout.close()
    assert child.communicate()[1] == ""
