"""A stranger's tokenizer.json whose pattern the tokenizers library gives up: its panic is no `Exception`."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SECTION = "Strangers' files"
FAULT = "tokenizer.json: a pattern that takes steps without end"
TEXT = "a" * 30  # at which every letter doubles the steps
ENDLESS = {"type": "Split", "pattern": {"Regex": r"(?:(a|a)+)+\d"}, "behavior": "Isolated", "invert": False}
COMMANDS: dict[str, tuple[str, ...]] = {
    "show": ("show", "--data", "rows.jsonl"),
    "audit": ("audit", "--data", "rows.jsonl"),
    "sft": ("sft", "--data", "rows.jsonl", "--out", "out", "--quantize", "none"),
    "logps": ("logps", "--data", "rows.jsonl", "--out", "out.jsonl", "--quantize", "none"),
    "generate": ("generate", "--prompts", "rows.jsonl", "--out", "out.jsonl", "--quantize", "none"),
}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder, with rows that its tokenizer breaks off at."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"prompt": TEXT, "completion": "a word"}) + "\n")
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text())
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [ENDLESS, made["pre_tokenizer"]]}
    file.write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pattern_without_end_is_one_line(name: str, model: Path, command: Callable[..., Any], tally: Any) -> None:
    words = COMMANDS[name]
    outcome = command(*words, "--model", model)
    told = " ".join((outcome.out if name == "audit" else outcome.err.splitlines()[-1]).split())
    held = outcome.code == 2 and f"rows.jsonl:1: prompt: {model}: its tokenizer breaks off" in told
    tally(SECTION, FAULT, "exit code 2 and one line that names row and model", held=int(held), of=1)
    assert held, outcome


def test_a_chat_goes_on_after_it(model: Path, command: Callable[..., Any], tally: Any, monkeypatch: Any) -> None:
    """A question that it breaks off at is taken back, and the next one is answered."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\nb\n"))
    outcome = command("chat", "--model", model, "--quantize", "none", "--max-new-tokens", "2")
    held = outcome.code == 0 and outcome.err.count(f"error: chat: prompt: {model}: its tokenizer breaks off") == 1
    tally(SECTION, FAULT, "the chat says so in one line and goes on", held=int(held), of=1)
    assert held, outcome


def test_ctrl_c_is_no_panic(model: Path) -> None:
    from lowrank_align.data.encoder import panics_told
    from lowrank_align.loading import read_tokenizer

    with pytest.raises(KeyboardInterrupt), panics_told(read_tokenizer(str(model))[0]):
        raise KeyboardInterrupt
