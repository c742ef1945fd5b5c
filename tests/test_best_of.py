"""Best-of-n at inference: of the same draws that `-n` makes, the one with the highest score."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.rollout import Rollout

ROWS = [{"prompt": "Say: "}, {"prompt": "A much longer question? "}, {"prompt": [{"role": "user", "content": "Hi"}]}]
FEW = ("--max-new-tokens", "8", "--batch-size", "8", "--quantize", "none")


@pytest.fixture
def generate(command: Callable[..., Any], trained: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    """`generate(*flags)`: the lines and what was printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").symlink_to(trained)
    (tmp_path / "best_of_score.py").write_text(
        "def length(prompts, completions):\n    return list(map(len, completions))"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run_it(*flags: object) -> tuple[list[dict[str, Any]], str]:
        argv = ("generate", "--model", tiny_llama, "--prompts", "rows.jsonl", "--out", "out.jsonl", "--overwrite")
        outcome = command(*argv, *FEW, *flags)
        assert (outcome.code, outcome.err) == (0, "")
        return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()], outcome.out

    return run_it


def text(line: dict[str, Any]) -> str:
    return line["completion"] if isinstance(line["completion"], str) else line["completion"][0]["content"]


def test_the_longest_of_four(generate: Any) -> None:
    every, _ = generate("-n", 4)
    best, said = generate("--best-of", 4, "--reward", "best_of_score:length")
    assert [line["prompt"] for line in best] == [row["prompt"] for row in ROWS]
    for i, line in enumerate(best):  # of a conversation too: the function sees what the line says
        group = every[4 * i : 4 * i + 4]
        longest = max(group, key=lambda other: len(text(other)))
        assert line == {**longest, "score": len(text(longest))}
    drawn = [len(text(line)) for line in every]
    mean = sum(line["score"] for line in best) / 3
    assert f"best of 4: score {mean:.4g} on average, of all {len(drawn)} drawn" in said


def test_a_reward_run_and_a_function_with_weights(
    generate: Any, command: Any, tiny_llama: Path, monkeypatch: Any
) -> None:
    """2 x the run's shifted score less a tenth of the length, of three known answers: what `score --shifted` says."""
    texts = ["yes", "no, or so it seems", "b"]

    def known(base: Any, prompts: list[list[int]], *, end_ids: list[int], **_: Any) -> list[list[Rollout]]:
        ids = [base.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [[Rollout(prompt, [*answer, end_ids[-1]], True) for answer in ids] for prompt in prompts]

    monkeypatch.setattr("lowrank_align.commands.rows.sample", known)
    rewards = ("--reward", "trained/reward", "best_of_score:length", "--reward-weights", "2", "-0.1")
    best, _ = generate("--best-of", 3, *rewards)
    rows = [{"prompt": row["prompt"], "completion": answer} for row in ROWS[1:2] for answer in texts]
    Path("known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ("score", "--model", tiny_llama, "--adapter", "trained/reward", "--shifted", "--quantize", "none")
    assert command(*argv, "--data", "known.jsonl", "--out", "scores.jsonl").code == 0
    scores = [json.loads(line)["scores"][0] for line in Path("scores.jsonl").read_text().splitlines()]
    totals = [2 * score - 0.1 * len(answer) for score, answer in zip(scores, texts, strict=True)]
    assert max(totals) - min(totals) > 0.1
    assert best[1]["completion"] == texts[totals.index(max(totals))]
    assert best[1]["score"] == pytest.approx(max(totals), abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--best-of", "4"), "best_of and reward go together"),
        (("--reward", "m:f"), "best_of and reward go together"),
        (("--best-of", "4", "--reward", "m:f", "-n", "2"), "best_of and completions exclude each other"),
        (("--best-of", "4", "--reward", "m:f", "--temperature", "0"), "raise temperature"),
        (("--best-of", "4", "--reward", "m:f", "--reward-weights", "1", "2"), "reward_weights: 2 for 1 rewards"),
        (("--best-of", "4", "--reward", "no_module_there:f"), "no module no_module_there"),
        (("--best-of", "4", "--reward", "trained/sft"), "is a policy run, where a reward is expected"),
    ],
)
def test_what_is_refused(
    flags: tuple[str, ...], message: str, generate: Any, command: Any, tiny_llama: Path, monkeypatch: Any
) -> None:
    """One line, before the model loads."""
    monkeypatch.setattr("lowrank_align.base.Base.load", lambda *a, **k: pytest.fail("loaded"))
    found = command("generate", "--model", tiny_llama, "--prompts", "rows.jsonl", "--out", "x.jsonl", *FEW, *flags)
    assert found.code == 2
    assert message in found.err and len(found.err.splitlines()) == 1
