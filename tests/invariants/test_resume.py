"""A run that was stopped, killed or damaged and then resumed ends with the bytes of one that went through.

The oracle is always the same run without the interruption.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lowrank_align.errors import EXIT_DATA_OR_CONFIG, EXIT_RESUMABLE, Stopped, UserError
from lowrank_align.progress import Progress
from lowrank_align.stopping import StopSignals

Run = Callable[..., Path]

PAIRS = [
    {"prompt": f"{i}. Say: ", "chosen": f"a good word {'and another ' * (i % 3)}", "rejected": f"bad {i}"}
    for i in range(6)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS],
    "reward": PAIRS,
    "dpo": PAIRS,
    "coh": PAIRS,
    "condition": PAIRS,
    "kto": [
        {"prompt": pair["prompt"], "completion": pair["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, pair in enumerate(PAIRS)
    ],
    "ppo": [{"prompt": pair["prompt"]} for pair in PAIRS],
    "quark": [{"prompt": pair["prompt"]} for pair in PAIRS],
}
STEPS = {"max_steps": 5, "batch_size": 4, "learning_rate": 5e-3, "sample_steps": 2, "sample_tokens": 6}
KNOBS: dict[str, dict[str, Any]] = {
    "sft": {"lora_dropout": 0.2, "eval_rows": 2, "eval_steps": 2, "warmup_ratio": 0.4},
    "reward": {"lora_dropout": 0.2, "gradient_checkpointing": True},
    "dpo": {"lr_schedule": "cosine"},
    "coh": {"hidden_tokens": 0.3},
    "condition": {"lora_dropout": 0.2},
    "kto": {"eval_rows": 2, "eval_steps": 2},
    "ppo": {"target_kl": 0.01, "kl_horizon": 4, "max_new_tokens": 8, "minibatches": 2, "ppo_epochs": 2},
}
KNOBS["quark"] = {"max_new_tokens": 8, "pool_steps": 2, "quantiles": 3}
METHODS = list(ROWS)


class StopAt(Progress):
    """Asks for a stop, as a signal would, when a step's figures are shown; or fails there, as a crash would."""

    def __init__(self, step: int, stop: StopSignals | None = None) -> None:
        super().__init__(quiet=True)
        self.at, self.stop = step, stop

    def step(self, step: int, figures: Any) -> None:
        if step == self.at and self.stop is not None:
            self.stop.asked = True
        elif step == self.at:
            raise ConnectionAbortedError("killed")


@pytest.fixture(autouse=True)
def reward_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has a `resume_reward.py`, whose function counts letters."""
    source = "def vowels(prompts, completions):\n    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    (tmp_path / "resume_reward.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    KNOBS["quark"]["reward"] = KNOBS["ppo"]["reward"] = "resume_reward:vowels"


def stop_at(step: int, run: Run, method: str, name: str, **knobs: Any) -> None:
    """The run, up to the end of that step."""
    stop = StopSignals()
    message = (
        f"{name}: stopped at step {step} of {knobs['max_steps']} and saved; the same command with --resume goes on"
    )
    with pytest.raises(Stopped, match=message) as stopped:
        run(method, ROWS[method], name, progress=StopAt(step, stop), stop=stop, **knobs)
    assert stopped.value.exit_code == EXIT_RESUMABLE


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves and that must be the same, bytes where they are not measured times."""
    found: dict[str, Any] = {
        name: (folder / name).read_bytes()
        for name in ("adapter/adapter_model.safetensors", "value/adapter_model.safetensors", "reward.json")
        if (folder / name).is_file()
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    found["metrics.jsonl"] = [{**line, "seconds": None} for line in lines]
    found["samples.jsonl"] = (folder / "samples.jsonl").read_text()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed(method: str, run: Run) -> None:
    """With dropout, held-out rows, warm-up, checkpointing, adaptive KL: what has a state is on."""
    knobs = {**STEPS, **KNOBS[method]}
    whole = outcome(run(method, ROWS[method], "whole", **knobs))
    torch.rand(7)  # the state of the global generator must not matter
    stop_at(2, run, method, "stopped", **knobs)
    assert outcome(run(method, ROWS[method], "stopped", resume=True, **knobs)) == whole
    assert ("value/adapter_model.safetensors" in whole) == (method == "ppo")
    assert ("reward.json" in whole) == (method == "reward")
    losses = [line["loss"] for line in whole["metrics.jsonl"]]
    assert len(set(losses)) >= 4, "nothing was trained"  # the first step of a warm-up has a rate of 0
    if method == "ppo":
        coefficients = [line["objective/kl_coefficient"] for line in whole["metrics.jsonl"]]
        assert coefficients[2] != coefficients[0], "the adaptive KL did not move before the stop"


def test_nothing_to_resume_from(run: Run) -> None:
    """--resume starts where there is no run, also where there is one that was killed before its first checkpoint."""
    knobs = {**STEPS, **KNOBS["dpo"], "resume": True}
    fresh = outcome(run("dpo", PAIRS, "fresh", **knobs))
    with pytest.raises(ConnectionAbortedError):
        run("dpo", PAIRS, "killed", progress=StopAt(3), **knobs)
    assert outcome(run("dpo", PAIRS, "killed", **knobs)) == fresh


def test_stopped_at_every_step(run: Run) -> None:
    """Four stops in one run of five steps."""
    knobs = {**STEPS, **KNOBS["dpo"]}
    whole = outcome(run("dpo", PAIRS, "whole", **knobs))
    for at in (1, 2, 3, 4):
        stop_at(at, run, "dpo", "often", **knobs, resume=at > 1)
    assert outcome(run("dpo", PAIRS, "often", resume=True, **knobs)) == whole


@pytest.mark.parametrize("damaged", [1, 3])
def test_killed_and_damaged(damaged: int, run: Run) -> None:
    """Killed at step 4, logged but not saved; of the checkpoints of steps 1 to 3 the newest, or all, are damaged."""
    knobs = {**STEPS, **KNOBS["sft"], "save_steps": 1, "keep_checkpoints": 3}
    whole = outcome(run("sft", ROWS["sft"], "whole", **knobs))
    with pytest.raises(ConnectionAbortedError):
        run("sft", ROWS["sft"], "killed", progress=StopAt(4), **knobs)
    killed = Path("killed")
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]
    for step in range(3, 3 - damaged, -1):
        file = killed / "checkpoints" / f"step-{step}" / "tensors.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    assert outcome(run("sft", ROWS["sft"], "killed", resume=True, **knobs)) == whole


def test_resumed_in_another_process_state(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    """On a base that was loaded anew, through the command line, as after a real stop."""
    from lowrank_align.cli import main
    from lowrank_align.config import read_yaml

    knobs = {**STEPS, **KNOBS["dpo"], "model": str(tiny_llama), "quantize": "none"}
    whole = outcome(run("dpo", PAIRS, "whole", **knobs))
    stop_at(3, run, "dpo", "again", **knobs)
    assert read_yaml(tmp_path / "again" / "config.yaml")["learning_rate"] == STEPS["learning_rate"]
    assert main(["dpo", "--config", str(tmp_path / "again" / "config.yaml"), "--resume"]) == 0
    assert outcome(tmp_path / "again") == whole


def test_a_finished_run_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, nothing written, and the summary is the run's."""
    from lowrank_align.base import Base
    from lowrank_align.train import train

    knobs = {**STEPS, **KNOBS["dpo"]}
    folder = run("dpo", PAIRS, "done", **knobs)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(Base, "load", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    given = {"model": "no-such-model", "data": "no-such-file.jsonl", "out": str(folder), "resume": True}
    summary = train("dpo", progress=Progress(quiet=True), **given)
    assert (summary.run, summary.steps) == (folder, 5)
    assert summary.figures["loss"] == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is 0.001 here but 0.005"),
        ({"beta": 0.2}, "beta is 0.2 here but 0.1"),
        ({"seed": 1}, "seed is 1 here but 0"),
        ({"batch_size": 2}, "batch_size is 2 here but 4"),
    ],
)
def test_another_run_is_not_resumed(change: dict[str, Any], named: str, run: Run) -> None:
    knobs = {**STEPS, **KNOBS["dpo"]}
    stop_at(2, run, "dpo", "run", **knobs)
    with pytest.raises(UserError, match=named) as refused:
        run("dpo", PAIRS, "run", resume=True, **(knobs | change))
    assert refused.value.exit_code == EXIT_DATA_OR_CONFIG


def test_other_data_is_not_resumed(run: Run) -> None:
    knobs = {**STEPS, **KNOBS["dpo"]}
    stop_at(2, run, "dpo", "run", **knobs)
    with pytest.raises(UserError, match=r"rows\.jsonl has changed since .*run began") as refused:
        run("dpo", PAIRS[1:], "run", resume=True, **knobs)
    assert refused.value.exit_code == EXIT_DATA_OR_CONFIG


def test_another_start_is_not_resumed(run: Run) -> None:
    """The adapter was trained anew in the same place: DPO's reference would change half-way without a word."""
    knobs = {**STEPS, "adapter": str(run("sft", ROWS["sft"], "start", max_steps=1))}
    stop_at(2, run, "dpo", "run", **knobs)
    run("sft", ROWS["sft"], "start", max_steps=2, overwrite=True)
    with pytest.raises(UserError, match="start has changed since .*run began"):
        run("dpo", PAIRS, "run", resume=True, **knobs)


def test_another_base_is_not_resumed(run: Run, tmp_path: Path, tiny_base: Any) -> None:
    """As if the weights in the model's folder had been others when the run began."""
    stop_at(2, run, "dpo", "run", **STEPS)
    record = tmp_path / "run" / "provenance.json"
    record.write_text(record.read_text().replace(tiny_base.weights_hash, "0" * 64))
    with pytest.raises(UserError, match="tiny_llama has changed since .*run began"):
        run("dpo", PAIRS, "run", resume=True, **STEPS)


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_a_run_of_before_there_were_several_losses_and_rewards(method: str, run: Run, tmp_path: Path) -> None:
    """Its config has one name for `loss` or `reward`, its record one `reward_hash`: it goes on, still checked."""
    knobs = {**STEPS, **KNOBS[method], "max_steps": 3, "sample_steps": 0}
    if method == "ppo":
        knobs |= {"reward": str(run("reward", PAIRS, "judge", max_steps=1))}
    stop_at(2, run, method, "run", **knobs)
    config, record = tmp_path / "run" / "config.yaml", tmp_path / "run" / "provenance.json"
    values, notes = yaml.safe_load(config.read_text()), json.loads(record.read_text())
    key = "loss" if method == "dpo" else "reward"
    (values[key],) = values[key]
    if method == "ppo":
        (notes["reward_hash"],) = notes.pop("reward_hashes").values()
        record.write_text(json.dumps({**notes, "reward_hash": "0" * 64}))
    config.write_text(yaml.safe_dump({**values, "of_old": 1}))
    if method == "ppo":
        with pytest.raises(UserError, match="judge has changed since .*run began"):
            run(method, ROWS[method], "run", resume=True, **knobs)
        record.write_text(json.dumps(notes))
    with pytest.raises(UserError, match=r"is 0.2 here but 0.1 in" if method == "dpo" else "ppo_epochs is 1 here but 2"):
        other = {"beta": 0.2} if method == "dpo" else {"ppo_epochs": 1}
        run(method, ROWS[method], "run", resume=True, **{**knobs, **other})
    run(method, ROWS[method], "run", resume=True, **knobs)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"


def test_longer_than_at_first(run: Run) -> None:
    """--max-steps may grow: with a constant rate, 2 steps and then 3 are 5 steps."""
    knobs = {**STEPS, "lr_schedule": "constant", "warmup_ratio": 0.0}
    whole = outcome(run("dpo", PAIRS, "whole", **knobs))
    stop_at(2, run, "dpo", "run", **(knobs | {"max_steps": 3}))
    assert outcome(run("dpo", PAIRS, "run", resume=True, **knobs)) == whole


def test_exit_code_and_message(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A real SIGTERM in the middle of a step: saved at its end, exit code 75, one line that says how to go on."""
    import os
    import signal

    from lowrank_align.cli import main
    from lowrank_align.methods.sft import SFT

    step_before = SFT.step

    def step(self: SFT, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(SFT, "step", step_before)
        return step_before(self, *args)

    monkeypatch.setattr(SFT, "step", step)
    monkeypatch.setattr(sys.modules["lowrank_align.train"], "plot_metrics", lambda metrics, folder: [])
    Path("sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["sft"]))
    handler = signal.getsignal(signal.SIGTERM)
    command = ["sft", "--model", str(tiny_llama), "--data", "sft.jsonl", "--out", "sft", "--max-steps", "3"]
    command += ["--quantize", "none", "--rank", "4", "--batch-size", "4", "--sample-steps", "0"]
    assert main(command) == EXIT_RESUMABLE
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "sft: stopped at step 1 of 3 and saved; the same command with --resume goes on"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert main([*command, "--resume"]) == 0
