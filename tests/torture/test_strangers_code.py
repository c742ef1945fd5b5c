"""A model that brings Python code of its own: it runs where `--trust-remote-code` is given, and nowhere else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.presets import presets_folder

SECTION = "Strangers' files"
FAULT = "a model with Python code in its folder"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
ROWS = ("--data", "rows.jsonl")
PAIRS = ("--data", "pairs.jsonl")
WHOLE = ("--quantize", "none")
FEW = (*WHOLE, "--out", "out", "--max-steps", "1", "--batch-size", "2", "--rank", "2", "--sample-steps", "0")
COMMANDS: dict[str, tuple[str, ...]] = {
    "sft": (*ROWS, *FEW),
    "reward": (*PAIRS, *FEW),
    "dpo": (*PAIRS, *FEW),
    "plan": ("--method", "sft"),
    "audit": ROWS,
    "show": ROWS,
    "generate": ("--prompts", "rows.jsonl", "--out", "out.jsonl", "--max-new-tokens", "2", *WHOLE),
    "chat": WHOLE,
    "eval": ("--perplexity-data", "rows.jsonl", "--out", "out", *WHOLE),
    "logps": (*ROWS, "--out", "out.jsonl", *WHOLE),
}
ALONE: dict[str, tuple[str, ...]] = {  # what has no such flag, or would go on
    "export": ("export", "--out", "out", "--adapter", "none"),
    "studio": ("studio", "--no-browser", *WHOLE),
    "rounds": ("rounds", "--out", "out"),
    "demo": ("demo", "--out", "out", "--quick", "--score", "code:no"),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the code writes."""
    return tmp_path / "marker"


@pytest.fixture
def model(tiny_llama: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder, of a family that is known to its own code alone."""
    from lowrank_align import remote_code

    monkeypatch.setattr(remote_code, "_trusted", set())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "Say: ", "completion": word} for word in ("a word", "another", "a third")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"{n}. Say: ", "chosen": "a word", "rejected": "no"} for n in range(3)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "own"))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    changed(folder / "config.json", model_type="own", auto_map=OWN)
    monkeypatch.setattr("sys.stdin", (tmp_path / "rows.jsonl").open())
    return folder


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", [*COMMANDS, *ALONE])
def test_without_the_flag_no_code_runs(
    name: str, model: Path, marker: Path, command: Callable[..., Any], tally: Any
) -> None:
    outcome = command(*ALONE.get(name, (name, *COMMANDS.get(name, ()))), "--model", model)
    told = outcome.err.splitlines()[-1]
    named = name not in COMMANDS or "let it run with --trust-remote-code" in told
    held = outcome.code == 2 and named and not marker.exists()
    tally(SECTION, FAULT, "without --trust-remote-code exit code 2, and nothing has run", held=int(held), of=1)
    assert held, outcome


@pytest.mark.parametrize("name", COMMANDS)
def test_with_the_flag_it_runs_and_that_is_said(
    name: str, model: Path, marker: Path, command: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    outcome = command(name, *COMMANDS[name], "--model", model, "--trust-remote-code")
    assert outcome.code == 0, outcome
    assert marker.exists()
    told = [line for line in caplog.messages if line.startswith("--trust-remote-code")]
    assert told == [f"--trust-remote-code: {model}: its Python code runs, with all that you may do on this machine"]


def test_a_run_does_not_keep_it(model: Path, marker: Path, command: Callable[..., Any]) -> None:
    assert command("sft", *COMMANDS["sft"], "--model", model, "--trust-remote-code").code == 0
    assert "trust" not in Path("out/config.yaml").read_text()
    marker.unlink()
    from lowrank_align import remote_code

    remote_code._trusted.clear()  # another process
    again = command("sft", "--config", "out/config.yaml", "--out", "again")
    assert again.code == 2 and "let it run with --trust-remote-code" in again.err
    assert not marker.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_gives_it(name: str, model: Path, marker: Path, command: Callable[..., Any], tally: Any) -> None:
    held = 0
    asking = "trust_remote_code: true\n"
    preset = (presets_folder() / "tiny.yaml").read_text().replace("methods:\n", f"settings:\n  {asking}methods:\n", 1)
    for flag, text in {"--config": asking, "--preset": preset}.items():
        Path("theirs.yaml").write_text(text)
        outcome = command(name, *COMMANDS[name], "--model", model, flag, "theirs.yaml")
        held += outcome.code == 2 and "theirs.yaml" in outcome.err and "trust_remote_code" in outcome.err
    assert not marker.exists()
    tally(SECTION, "trust_remote_code in a --config file or a preset", "exit code 2, named", held=held, of=2)
    assert held == 2


def test_a_tokenizer_s_code(model: Path, marker: Path, command: Callable[..., Any]) -> None:
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}))
    changed(model / "config.json", model_type="llama", auto_map={})
    command("show", *ROWS, "--model", model)
    assert not marker.exists()
    command("show", *ROWS, "--model", model, "--trust-remote-code")
    assert marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused(file: str, model: Path, marker: Path, command: Any) -> None:
    changed(
        model / file, auto_map={"AutoConfig": "evil/repo--code.Config", "AutoTokenizer": ["evil/repo--code.T", None]}
    )
    outcome = command("show", *ROWS, "--model", model, "--trust-remote-code")
    assert outcome.code == 2
    assert f"--trust-remote-code: {model}: {file} names code of another repository" in outcome.err
    assert not marker.exists()


def test_only_the_named_folder_is_trusted(model: Path, marker: Path, command: Any, tmp_path: Path) -> None:
    """Another model that is read in the same process stays what it was: a folder of data."""
    other = Path(shutil.copytree(model, tmp_path / "other"))
    assert command("show", *ROWS, "--model", model, "--trust-remote-code").code == 0
    marker.unlink()
    assert command("show", *ROWS, "--model", other).code == 2
    assert not marker.exists()


def test_where_there_is_no_code(model: Path, tiny_llama: Path, command: Callable[..., Any]) -> None:
    for name in (tiny_llama, "some/model", "tiny", "."):
        outcome = command("show", *ROWS, "--model", name, "--trust-remote-code")
        assert outcome.code == 2 and f"--trust-remote-code: {name}: no folder with Python files" in outcome.err
    assert "give --model too" in command("eval", "--store", "votes.db", "--trust-remote-code").err
    (model / "code.py").write_text("1 / 0\n")
    outcome = command("show", *ROWS, "--model", model, "--trust-remote-code")
    assert outcome.code == 2 and "config.json cannot be used: division by zero" in outcome.err
