"""`lowrank-align plan`: what it is asked about, its exit codes, and what is wrong in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from lowrank_align.config import METHODS, PlanSettings

Command = Callable[..., Any]


def test_every_method_can_be_planned() -> None:
    assert get_args(PlanSettings.model_fields["method"].annotation) == (*METHODS, "chat")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--preset qwen3-44b", "preset qwen3-44b: there is none of that name (did you mean qwen3-4b?); "
                               "`lowrank-align presets` lists them"),
        ("--gpu 12GiB", "model: missing; give --model, --preset or a line in the --config file"),
        ("--preset qwen3-4b --method dppo",
         "method: input should be 'sft', 'reward', 'dpo', 'kto', 'condition', 'coh', 'ppo', 'grpo', 'rloo', "
         "'online-dpo', 'expert', 'quark' or 'chat' (got 'dppo') (did you mean ppo?)"),
        ("--preset qwen3-4b --max-length 0", "max_length: input should be greater than 0 (got '0')"),
        ("--preset phi-4 --target-modules q_proj",
         "target_modules: q_proj: no such linear layer (did you mean qkv_proj?) "
         "(there are: down_proj, gate_up_proj, o_proj, qkv_proj)"),
        ("--model nowhere", "nowhere: no such model folder"),
    ],
    ids=["preset", "no model", "method", "length", "layer", "folder"],
)  # fmt: skip
def test_mistakes(words: str, line: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = command("plan", *words.split())
    assert (found.code, found.out, found.err) == (2, "", f"error: {line}\n")


def test_a_size_that_is_none(command: Command, tiny_llama: Path, trained: Path, tmp_path: Path) -> None:
    """The same line for the plan and, before a row is read, for training."""
    rows = ("--data", trained / "demonstrations.jsonl", "--out", tmp_path / "run")
    for words in (("plan", "--preset", "qwen3-4b"), ("sft", "--model", tiny_llama, *rows)):
        found = command(*words, "--gpu", "12GiBs")
        assert (found.code, found.out) == (2, "")
        assert found.err.startswith("error: gpu: '12GiBs' is no size of memory (did you mean ")
        assert found.err.endswith("; give it as 12GiB\n")
        assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize(("size", "code", "verdict"), [("48GiB", 0, "Fits into"), ("6GiB", 3, "Does not fit into")])
def test_exit_code_and_verdict(size: str, code: int, verdict: str, command: Command) -> None:
    """32.8 B parameters are 16.9 GB at 4.127 bits: in 48 GiB, not in 6."""
    words = ("plan", "--preset", "qwen3-32b", "--gpu", size)
    found = command(*words)
    assert (found.code, found.err) == (code, "")
    assert found.out.startswith("qwen3-32b, 32.8 B parameters: sft\n")
    assert f"\n{verdict} {size.removesuffix('GiB')}.0 GiB" in found.out
    shown = command(*words, "--json")
    assert shown.code == code
    report = json.loads(shown.out)
    assert (report["fits"], report["budget_bytes"]) == (code == 0, int(size.removesuffix("GiB")) * 2**30)
    assert report["cards"].keys() == {f"{gib}GiB" for gib in (6, 8, 12, 16, 24, 48)}


def test_without_a_gpu_the_table_alone(command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own GPU is asked for, and where there is none nothing is judged."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = command("plan", "--model", tiny_llama)
    assert (found.code, found.err) == (0, "")
    assert "Fits" not in found.out and "6 GiB " in found.out


def test_the_presets_settings_for_another_model(command: Command, tiny_llama: Path) -> None:
    """Its own figures (64 wide, 2 layers, 106 tokens), the preset's micro-batch and checkpointing."""
    shown = command("plan", "--preset", "qwen3-4b", "--model", tiny_llama, "--method", "ppo", "--gpu", "12GiB")
    assert " ".join(shown.out.split()).startswith(f"{tiny_llama} with preset qwen3-4b,")  # wherever the line breaks
    words = ("plan", "--preset", "qwen3-4b", "--model", tiny_llama, "--target-modules", "self_attn.q_proj")
    report = json.loads(command(*words, "--json").out)
    assert report["parameters"] == 106 * 64 * 2 + 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64) + 64
    work = report["workload"]
    assert (work["micro_batch_size"], work["gradient_checkpointing"], work["rank"]) == (2, True, 16)
    assert (work["prompt_tokens"], work["completion_tokens"]) == (128, 128)  # of the model's 256
    assert report["prediction"]["phases"]["training"]["adapters"] == 2 * 16 * (64 + 64) * 4
