"""Methods that sample, stopped by a signal or by their own reward function: resumed, they end with the same bytes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.errors import NumericError, Stopped, UserError
from lowrank_align.progress import Progress
from lowrank_align.stopping import StopSignals

Run = Callable[..., Path]

PROMPTS = [{"prompt": f"{i}. Say: "} for i in range(6)]
STEPS = {"max_steps": 5, "batch_size": 4, "learning_rate": 5e-3, "max_new_tokens": 8, "reward": "online_reward:vowels"}
KNOBS: dict[str, dict[str, Any]] = {
    "grpo": {"group_size": 3, "inner_epochs": 2, "minibatches": 2, "ratio": "sequence", "length_penalty": 0.1},
    "rloo": {"group_size": 3, "beta": 0.0},
    "online-dpo": {"group_size": 2, "eval_rows": 2, "eval_steps": 2},
    "expert": {"group_size": 3, "temperature": 0.7},
    "ppo": {"pretrain_data": "texts.jsonl", "ppo_epochs": 1},
}
REWARD = """
from pathlib import Path

def vowels(prompts, completions):
    calls = Path("calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    scores = [sum(c in "aeiou" for c in text) for text in completions]
    broken = Path("broken").read_text() if Path("broken").exists() and len(calls.read_text()) > 2 else ""
    if broken == "raise":
        raise ValueError("the judge is ill")
    return {"count": scores[1:], "nan": [*scores[1:], float("nan")]}.get(broken, scores)
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "online_reward.py").write_text(REWARD)
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n{"text": "defghi"}\n{"text": "jk"}\n')


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must be the same, bytes where they are not measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert len({line["objective/scores"] for line in lines}) > 1
    tensors = [path.read_bytes() for path in sorted(folder.glob("*/adapter_model.safetensors"))]
    return {"tensors": tensors, "metrics": [{**line, "seconds": None} for line in lines]}


class StopAt2(Progress):
    def __init__(self, stop: StopSignals) -> None:
        super().__init__(quiet=True)
        self.stop = stop

    def step(self, step: int, figures: Any) -> None:
        self.stop.asked = step == 2


@pytest.mark.parametrize("method", KNOBS)
def test_stopped_and_resumed(method: str, run: Run) -> None:
    knobs = {**STEPS, **KNOBS[method]}
    whole = outcome(run(method, PROMPTS, "whole", **knobs))
    torch.rand(7)  # the state of the global generator must not matter
    stop = StopSignals()
    with pytest.raises(Stopped, match="stopped at step 2 of 5 and saved"):
        run(method, PROMPTS, "stopped", progress=StopAt2(stop), stop=stop, **knobs)
    assert outcome(run(method, PROMPTS, "stopped", resume=True, **knobs)) == whole


@pytest.mark.parametrize(
    ("broken", "method", "message", "error"),
    [
        (
            "raise",
            "grpo",
            r"raised ValueError: the judge is ill \(online_reward.py:\d+\) for the prompt '\d. Say: '",
            UserError,
        ),
        ("count", "ppo", r"gave 0 scores for 1 completion for the prompt '\d. Say: '", UserError),
        ("nan", "online-dpo", r"gave nan for the prompt '\d. Say: '", NumericError),
    ],
)
def test_a_reward_that_breaks_in_the_middle(
    broken: str, method: str, message: str, error: type[UserError], run: Run, tmp_path: Path, capsys: Any
) -> None:
    """At its third call, in step 3: the first two steps are saved, and mended it goes on as if nothing had been."""
    knobs = {**STEPS, **KNOBS[method], "eval_rows": 0}
    whole = outcome(run(method, PROMPTS, "whole", **knobs))
    (tmp_path / "calls").unlink()
    (tmp_path / "broken").write_text(broken)
    with pytest.raises(error, match=f"^online_reward:vowels: {message}; step 2 of 5 is saved, .*--resume goes on$"):
        run(method, PROMPTS, "run", **knobs)
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-2"]
    (tmp_path / "broken").unlink()
    assert outcome(run(method, PROMPTS, "run", resume=True, **knobs)) == whole


def test_a_reward_that_breaks_at_once(run: Run, tmp_path: Path) -> None:
    """In the first step there is nothing to save; --resume then starts anew."""
    knobs = {**STEPS, **KNOBS["grpo"], "max_steps": 5}
    (tmp_path / "calls").write_text("xx")
    (tmp_path / "broken").write_text("raise")
    with pytest.raises(
        UserError, match="the judge is ill .* for the prompt '.. Say: '; the same command with --resume begins again$"
    ):
        run("grpo", PROMPTS, "run", **knobs)
    assert not list(Path("run").glob("checkpoints/*"))
    (tmp_path / "broken").unlink()
    outcome(run("grpo", PROMPTS, "run", resume=True, **knobs))


@pytest.mark.parametrize("breaks_at", [2, 5])
def test_a_reward_that_breaks_in_an_evaluation(breaks_at: int, run: Run, tmp_path: Path) -> None:
    """Calls 3 and 8 score the held-out prompts after steps 2 and 5: the step is saved, what is resumed looks first."""
    knobs = {**STEPS, "group_size": 2, "eval_rows": 2, "eval_steps": 2, "early_stopping": 5}
    whole = outcome(run("expert", PROMPTS, "whole", **knobs))
    summary = json.loads(Path("whole/run.json").read_text())["summary"]
    (tmp_path / "calls").unlink()
    (tmp_path / "broken").write_text("nan")
    if breaks_at == 5:
        (tmp_path / "online_reward.py").write_text(REWARD.replace("> 2", "> 7"))
        sys.modules.pop("online_reward")
    with pytest.raises(NumericError, match=f"gave nan for the prompt .*; step {breaks_at} of 5 is saved"):
        run("expert", PROMPTS, "run", **knobs)
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == breaks_at
    with pytest.raises(NumericError, match=f"; step {breaks_at} of 5 is saved"):  # not mended yet
        run("expert", PROMPTS, "run", resume=True, **knobs)
    (tmp_path / "broken").unlink()
    assert outcome(run("expert", PROMPTS, "run", resume=True, **knobs)) == whole
    assert {**json.loads(Path("run/run.json").read_text())["summary"], "seconds": 0} == {**summary, "seconds": 0}
