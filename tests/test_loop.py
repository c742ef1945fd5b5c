"""The loop's promises: the effective batch, memory that runs out, numbers that are not finite, what is kept."""

import json
import math
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from lowrank_align.checkpoint import verify
from lowrank_align.errors import EnvironmentProblem, NumericError, Stopped, UserError
from lowrank_align.loop import Loop
from lowrank_align.methods.method import Method
from lowrank_align.methods.sft import SFT
from lowrank_align.stopping import StopSignals
from tests.notes import Notes

Run = Callable[..., Path]
ROWS = [{"prompt": f"{i}> ", "completion": f"a word {'or two ' * (i % 3)}"} for i in range(10)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in ROWS]
FAST = {"learning_rate": 5e-3, "lr_schedule": "constant", "warmup_ratio": 0.0}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs between equal runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def saved_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The adapter in the checkpoint of a step, by PEFT's names."""
    tensors = load_file(folder / "checkpoints" / f"step-{step}" / "tensors.safetensors")
    return {name.removeprefix("policy/"): tensor for name, tensor in tensors.items() if name.startswith("policy/")}


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- which rows, in which order


@pytest.fixture
def seen_rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Fills with the places in the file of every step's rows."""
    seen: list[list[int]] = []
    before = Method.round

    def round_(self: Any, rows: Sequence[Any], step: int, retry: Any) -> Iterator[Any]:
        seen.append([row.index for row in rows])
        return before(self, rows, step, retry)

    monkeypatch.setattr(Method, "round", round_)
    return seen


def test_an_epoch_is_every_row_once(run: Run, seen_rows: list[list[int]]) -> None:
    """10 rows by 4 are batches of 4, 4 and 2."""
    run("sft", ROWS, "run", max_steps=None, batch_size=4)
    assert [len(rows) for rows in seen_rows] == [4, 4, 2]
    assert sorted(sum(seen_rows, [])) == list(range(10))
    assert sum(seen_rows, []) != list(range(10)), "not shuffled"


def test_steps_go_round_the_data(run: Run, seen_rows: list[list[int]]) -> None:
    """6 steps of 4 over 10 rows: two whole epochs, each in an order of its own, and 4 rows of a third."""
    run("sft", ROWS, "run", max_steps=6, batch_size=4)
    assert [len(rows) for rows in seen_rows] == [4] * 6
    order = sum(seen_rows, [])
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert len(set(order[20:])) == 4


def test_steps_larger_than_the_data(run: Run, seen_rows: list[list[int]]) -> None:
    """A batch of 7 from 3 rows holds every row twice and one three times."""
    run("sft", ROWS[:3], "run", max_steps=1, batch_size=7)
    assert sorted(seen_rows[0].count(i) for i in range(3)) == [2, 2, 3]


@pytest.mark.parametrize(
    ("epochs", "rows", "batch_size", "sizes"),
    [
        (2.0, 5, 4, [4, 4, 2]),  # 10 rows
        (0.5, 5, 1, [1, 1]),  # 2.5 rows, rounded to the even 2
        (1.1, 3, 1, [1, 1, 1]),  # 3.3 rows
        (0.01, 5, 4, [1]),  # never nothing
    ],
)
def test_epochs(
    epochs: float, rows: int, batch_size: int, sizes: list[int], run: Run, seen_rows: list[list[int]]
) -> None:
    folder = run("sft", ROWS[:rows], "run", max_steps=None, epochs=epochs, batch_size=batch_size)
    assert [len(rows) for rows in seen_rows] == sizes
    assert len(metrics_of(folder)) == len(sizes)


def test_the_order_is_the_seeds(run: Run, seen_rows: list[list[int]]) -> None:
    """The same seed gives the same order, whatever the micro-batch and the global generator; another gives another."""
    orders = []
    for name, knobs in {"a": {}, "b": {"micro_batch_size": 1}, "c": {"seed": 1}}.items():
        torch.rand(3)
        run("sft", ROWS, name, max_steps=3, **knobs)
        orders.append(list(seen_rows))
        seen_rows.clear()
    assert orders[0] == orders[1] != orders[2]


# ---- optimiser and schedule


def test_schedule(run: Run) -> None:
    """Linear, 4 steps, 2 of them warm-up: the rise 0, 1/3, 2/3, 1 and the fall 1, 1/2, 0 without their zeros."""
    knobs = {"learning_rate": 1e-3, "lr_schedule": "linear", "warmup_ratio": 0.5}
    rates = [line["learning_rate"] for line in metrics_of(run("sft", ROWS, "run", **knobs))]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 0.5e-3])


def test_first_step_of_adam(run: Run) -> None:
    """Adam's first step is lr * g / (|g| + eps): with a tiny eps every element of B moves by lr = .005 from 0.

    A does not move: its gradient passes through B = 0.
    """
    knobs = {"max_steps": 1, "adam_epsilon": 1e-14, **FAST}
    before = adapter_of(run("sft", ROWS, "none", **knobs | {"learning_rate": 1e-30}))
    after = adapter_of(run("sft", ROWS, "one", **knobs))
    for name, tensor in after.items():
        if "lora_A" in name:
            assert torch.equal(tensor, before[name])
        else:
            torch.testing.assert_close(tensor.abs(), torch.full_like(tensor, 5e-3), rtol=1e-3, atol=0)


def test_clipping_is_by_the_norm_of_the_whole_batch(run: Run) -> None:
    """The logged norm is the one before clipping, so the same with any limit at the first step."""
    loose, tight = (metrics_of(run("sft", ROWS, f"{m}", max_steps=1, max_grad_norm=m))[0] for m in (100.0, 1e-3))
    assert loose["grad_norm"] == tight["grad_norm"] > 0.01


def test_the_base_is_frozen(run: Run, tiny_base: Any) -> None:
    before = {name: p.clone() for name, p in tiny_base.model.named_parameters() if "lora_" not in name}
    run("dpo", PAIRS, "run", **FAST)
    now = dict(tiny_base.model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert not any(now[name].requires_grad for name in before)


def test_gradient_checkpointing_changes_nothing(run: Run) -> None:
    """Recomputed activations are the same activations, and so is the adapter within 1e-6."""
    plain, recomputed = (
        adapter_of(run("dpo", PAIRS, f"{on}", gradient_checkpointing=on, **FAST)) for on in (False, True)
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=0, atol=1e-6)


def test_global_generators_are_left_alone(run: Run) -> None:
    """With dropout, samples, new adapters and rows to shuffle: nothing is drawn from what other code draws from."""
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    run("sft", ROWS, "run", lora_dropout=0.3, sample_steps=1, sample_tokens=4, eval_rows=2, eval_steps=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_global_generators_are_left_alone_by_heads(run: Run) -> None:
    state = torch.get_rng_state()
    run("reward", PAIRS, "reward", lora_dropout=0.3, sample_steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_base_is_given_back_as_it_was(run: Run, tiny_base: Any) -> None:
    """After a run with dropout and checkpointing: evaluation mode, no recomputing, so two readings agree."""
    run("sft", ROWS, "run", lora_dropout=0.5, gradient_checkpointing=True, **FAST)
    assert not tiny_base.model.training
    assert not tiny_base.model.is_gradient_checkpointing
    assert tiny_base.active_role.name == "base"


# ---- memory that runs out


WORDINGS = [
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("HIP out of memory."),
    MemoryError(),
]


def fail_at(monkeypatch: pytest.MonkeyPatch, error: BaseException, *calls: int) -> None:
    """SFT's `step` does its work and then raises, in the calls of these numbers (the preflight's is call 0)."""
    before, count = SFT.step, iter(range(1000))

    def step(self: SFT, *arguments: Any) -> Any:
        loss = before(self, *arguments)
        if next(count) in calls:
            raise error
        return loss

    monkeypatch.setattr(SFT, "step", step)


@pytest.mark.parametrize("error", WORDINGS, ids=lambda error: str(error)[:24] or "MemoryError")
def test_out_of_memory_halves_the_micro_batch(error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second micro-batch of 4: what the first left in gradients and metrics is thrown away, the batch repeated.

    The run then is the one that had micro-batches of 2 from the start, to the byte.
    """
    clean = run("sft", ROWS, "clean", batch_size=8, micro_batch_size=2, max_steps=2)
    fail_at(monkeypatch, error, 2)
    progress = Notes()
    folder = run("sft", ROWS, "failing", batch_size=8, micro_batch_size=4, max_steps=2, progress=progress)
    assert "out of memory: micro_batch_size is now 2; the same batch again" in progress.notes
    assert adapter_bytes(folder) == adapter_bytes(clean)
    assert metrics_of(folder) == metrics_of(clean)


def test_out_of_memory_in_one_row(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """4, 2, 1, and then there is nothing to halve: one line, exit code 3, and the run can be resumed."""
    clean = run("sft", ROWS, "clean", batch_size=4, micro_batch_size=4)
    with monkeypatch.context() as patch:
        fail_at(patch, WORDINGS[0], *range(3, 1000))
        _run_out_of_memory(run)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    folder = run("sft", ROWS, "run", batch_size=4, micro_batch_size=4, save_steps=1, resume=True)
    assert adapter_bytes(folder) == adapter_bytes(clean)


def _run_out_of_memory(run: Run) -> None:
    with pytest.raises(
        EnvironmentProblem, match="out of memory with micro_batch_size 1 .*--gradient-checkpointing"
    ) as e:
        run("sft", ROWS, "run", batch_size=4, micro_batch_size=4, save_steps=1)
    assert e.value.exit_code == 3
    assert len(str(e.value).splitlines()) == 1


def test_other_errors_are_no_lack_of_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, RuntimeError("shapes cannot be multiplied"), 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run("sft", ROWS, "run")


def test_the_smaller_micro_batch_outlives_a_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved in the preflight, stopped at step 2: the resumed run, its preflight too, does not go back to 4."""
    sizes: list[int] = []
    before = SFT.step

    def step(self: SFT, items: Any, *arguments: Any) -> Any:
        sizes.append(len(items))
        if len(sizes) == 1:
            raise WORDINGS[0]
        return before(self, items, *arguments)

    monkeypatch.setattr(SFT, "step", step)
    stop, knobs = StopSignals(), {"batch_size": 4, "micro_batch_size": 4, "max_steps": 3}
    with pytest.raises(Stopped):
        run("sft", ROWS, "run", stop=stop, progress=Notes(stop, at=2), **knobs)
    run("sft", ROWS, "run", resume=True, **knobs)
    assert sizes == [4, 2, *[2] * 4, 2, *[2] * 2]


def test_out_of_memory_while_sampling(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's rollouts halve a knob of their own, and draw again what they would have drawn."""
    knobs = {"reward": "builtins:constant_reward", "max_new_tokens": 6, "batch_size": 4, "max_steps": 1}
    monkeypatch.setattr("builtins.constant_reward", lambda prompts, texts: [1.0] * len(texts), raising=False)
    clean = run("ppo", ROWS, "clean", rollout_batch_size=2, **knobs)
    calls: list[int] = []
    module = sys.modules["lowrank_align.rollout"]
    generate = module._generate

    def failing(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(*arguments)

    monkeypatch.setattr(module, "_generate", failing)
    progress = Notes()
    folder = run("ppo", ROWS, "failing", rollout_batch_size=4, progress=progress, **knobs)
    assert calls == [4, 2, 2]
    assert "out of memory: rollout_batch_size is now 2; the same batch again" in progress.notes
    assert adapter_bytes(folder) == adapter_bytes(clean)


# ---- numbers that are not finite


def poison(monkeypatch: pytest.MonkeyPatch, factor: float, *calls: int) -> None:
    """The loss, and with it every gradient, is multiplied by NaN or infinity in these calls of SFT's `step`."""
    module = sys.modules["lowrank_align.methods.sft"]
    nll, count = module.nll, iter(range(1000))  # call 0 is the preflight's

    def poisoned(*arguments: Any) -> Any:
        found = nll(*arguments)
        return found._replace(loss=found.loss * factor) if next(count) in calls else found

    monkeypatch.setattr(module, "nll", poisoned)


def assert_nothing_but_numbers(folder: Path) -> None:
    """Every file of the run: finite tensors, and JSON without the NaN and Infinity that it does not have."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} in {path}")

    for path in folder.rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)
    for path in folder.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_without_numbers_is_not_taken(factor: float, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second micro-batch of step 2: the weights stay, the figure is null, the run goes on."""
    poison(monkeypatch, factor, 4)
    knobs = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 3, "save_steps": 1, "keep_checkpoints": 9}
    progress = Notes()
    folder = run("sft", ROWS, "run", progress=progress, **knobs, **FAST)
    lines = metrics_of(folder)
    assert [line["loss"] is None for line in lines] == [False, True, False]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert [note for note in progress.notes if "step 2: " in note and "not finite, not stepped on" in note]
    assert same(saved_at(folder, 1), saved_at(folder, 2))
    assert not same(saved_at(folder, 2), saved_at(folder, 3))
    assert_nothing_but_numbers(folder)


def test_a_gradient_without_numbers_is_not_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, one element of one gradient is not."""
    before = SFT.step

    def step(self: SFT, *arguments: Any) -> Any:
        loss = before(self, *arguments)
        next(iter(self.base.trainable_parameters("policy").values())).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(SFT, "step", step)
    folder = run("sft", ROWS, "run", max_steps=2, save_steps=1, **FAST)
    assert [line["skipped"] for line in metrics_of(folder)] == [1, 2]
    assert all(not tensor.any() for name, tensor in adapter_of(folder).items() if "lora_B" in name)


def test_a_loss_without_numbers_under_a_scaler(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16's scaler looks at the gradients alone: with finite ones it would take the step that the loop counts as left
    out. In step 2 the gradients are those of a finite loss; the scaler goes on in step 3."""
    before, calls = Loop._step, SFT.step

    def scaled(loop: Loop, number: int) -> Any:
        if number == 1:
            loop.accelerator.native_amp = True
            loop.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            loop.optimizer = AcceleratedOptimizer(loop.optimizer.optimizer, scaler=loop.accelerator.scaler)
        seen.append(number)
        return before(loop, number)

    def step(self: Any, *arguments: Any) -> Any:
        return calls(self, *arguments) * (math.nan if seen[-1:] == [2] else 1)

    seen: list[int] = []
    monkeypatch.setattr(Loop, "_step", scaled)
    monkeypatch.setattr(SFT, "step", step)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    folder = run("sft", ROWS, "run", max_steps=3, save_steps=1, keep_checkpoints=9, **FAST)
    assert [line["skipped"] for line in metrics_of(folder)] == [0, 1, 1]
    assert same(saved_at(folder, 1), saved_at(folder, 2))
    assert not same(saved_at(folder, 2), saved_at(folder, 3))


def test_the_last_step_without_numbers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends well, and its summary and model card hold no NaN either."""
    poison(monkeypatch, float("nan"), 3)
    folder = run("sft", ROWS, "run", batch_size=2, max_steps=3)
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    assert_nothing_but_numbers(folder)
    assert "nan" not in (folder / "README.md").read_text().lower()


def test_five_in_a_row_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four bad steps, one good, then bad ones only: the sixth of these is never reached. Exit code 4."""
    poison(monkeypatch, float("nan"), 1, 2, 3, 4, *range(6, 1000))
    with pytest.raises(
        NumericError, match="5 steps in a row without finite numbers; begin again with a lower"
    ) as error:
        run("sft", ROWS, "run", batch_size=2, micro_batch_size=2, max_steps=30, save_steps=1, **FAST)
    assert error.value.exit_code == 4
    assert [line["skipped"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
    assert_nothing_but_numbers(tmp_path / "run")


# ---- held-out rows


def test_evaluation_does_not_disturb_training(run: Run) -> None:
    """The same rows with and without an evaluation after every step: the same adapter, to the byte."""
    held_out = Path("held_out.jsonl")
    plain = run("sft", ROWS, "plain", lora_dropout=0.2)
    (plain.parent / held_out).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    watched = run("sft", ROWS, "watched", lora_dropout=0.2, eval_data=str(plain.parent / held_out), eval_steps=1)
    assert adapter_bytes(watched) == adapter_bytes(plain)
    assert all("eval_loss" in line and "eval_mean_token_accuracy" in line for line in metrics_of(watched))


def test_evaluation_is_without_dropout_and_over_tokens(run: Run, make_method: Any, tmp_path: Path) -> None:
    """Where nothing moves (a rate of 1e-30) the held-out loss is the start adapter's: -sum of log-probs / tokens."""
    start = run("sft", ROWS, "start", max_steps=3, **FAST)
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    knobs = {"eval_data": str(tmp_path / "held_out.jsonl"), "adapter": str(start), "lora_dropout": 0.5}
    folder = run("sft", ROWS, "run", max_steps=1, **knobs, **FAST | {"learning_rate": 1e-30})
    method, items = make_method("sft", ROWS[:3], adapter=str(start), untouched=True)
    with torch.no_grad(), method.base.role("policy"):
        batch = method.base.collate(items)
        logps = method.base.token_scores(batch).per_token_logps
    expected = -logps.sum().item() / batch.num_tokens.sum().item()
    assert metrics_of(folder)[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_split_off_are_not_trained_on(run: Run, seen_rows: list[list[int]]) -> None:
    run("sft", ROWS, "run", eval_rows=4, max_steps=3, batch_size=6)
    assert all(sorted(rows) == sorted(seen_rows[0]) for rows in seen_rows)
    assert len(set(seen_rows[0])) == 6


@pytest.fixture
def eval_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The held-out losses that SFT will find, one after another."""
    losses: list[float] = []
    monkeypatch.setattr(SFT, "evaluate", lambda self, rows, retry: {"loss": losses.pop(0)})
    return losses


EARLY = {"eval_rows": 2, "eval_steps": 1, "early_stopping": 2, "save_steps": 1, "keep_checkpoints": 9, "max_steps": 8}


def test_early_stopping_keeps_the_best(run: Run, eval_losses: list[float]) -> None:
    """3, 2, 2.5, 2: twice not better than step 2, so stopped after step 4, with the adapter of step 2."""
    eval_losses += [3.0, 2.0, 2.5, 2.0, 1.0]
    progress = Notes()
    folder = run("sft", ROWS, "run", progress=progress, **EARLY, **FAST)
    assert [line["eval_loss"] for line in metrics_of(folder)] == [3.0, 2.0, 2.5, 2.0]
    assert same(adapter_of(folder), saved_at(folder, 2))
    assert not same(adapter_of(folder), saved_at(folder, 4))
    assert "stopped early at step 4: no better evaluation 2 times" in progress.notes
    assert "kept the adapter of step 2, the best on the held-out rows" in progress.notes
    state = json.loads((folder / "run.json").read_text())
    assert state["state"] == "finished"
    assert state["steps"] == 4


def test_early_stopping_at_the_natural_end(run: Run, eval_losses: list[float]) -> None:
    """Also where the steps run out first, the best adapter is kept."""
    eval_losses += [2.0, 1.0, 3.0]
    folder = run("sft", ROWS, "run", **EARLY | {"max_steps": 3}, **FAST)
    assert same(adapter_of(folder), saved_at(folder, 2))


def test_early_stopping_over_a_resume(run: Run, eval_losses: list[float], tmp_path: Path) -> None:
    """Best at step 1, stopped by a signal at step 2, not better at step 3: the best is still that of step 1."""
    eval_losses += [1.0, 2.0, 3.0, 0.5]
    stop = StopSignals()
    with pytest.raises(Stopped):
        run("sft", ROWS, "run", stop=stop, progress=Notes(stop, at=2), **EARLY, **FAST)
    first = saved_at(tmp_path / "run", 1)
    folder = run("sft", ROWS, "run", resume=True, **EARLY, **FAST)
    assert len(metrics_of(folder)) == 3
    assert same(adapter_of(folder), first)


def test_killed_after_it_stopped_early(run: Run, eval_losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """3, 2, 2.5, 2: the last look was at step 4, and the run dies before its adapter is saved: no step 5 is trained,
    and it ends with the figures of a run that lived."""
    eval_losses += [3.0, 2.0, 2.5, 2.0]
    whole = run("sft", ROWS, "whole", **EARLY, **FAST)
    eval_losses += [3.0, 2.0, 2.5, 2.0, 1.0]
    save = SFT.save
    monkeypatch.setattr(SFT, "save", lambda self, run: fail())
    with pytest.raises(ConnectionAbortedError):
        run("sft", ROWS, "run", **EARLY, **FAST)
    monkeypatch.setattr(SFT, "save", save)
    folder = run("sft", ROWS, "run", resume=True, **EARLY, **FAST)
    assert len(metrics_of(folder)) == 4
    assert same(adapter_of(folder), saved_at(folder, 2))
    ends = [json.loads((one / "run.json").read_text())["summary"] for one in (whole, folder)]
    assert ends[0].keys() == ends[1].keys() and ends[0]["loss"] == ends[1]["loss"]


def fail() -> None:
    raise ConnectionAbortedError


def test_early_stopping_begun_at_a_resume(run: Run, eval_losses: list[float]) -> None:
    """The first part kept no best adapter: the second begins its own count."""
    eval_losses += [1.0, 2.0, 5.0, 6.0, 7.0]
    stop = StopSignals()
    with pytest.raises(Stopped):
        run("sft", ROWS, "run", stop=stop, progress=Notes(stop, at=2), **EARLY | {"early_stopping": 0}, **FAST)
    folder = run("sft", ROWS, "run", resume=True, **EARLY, **FAST)
    assert len(metrics_of(folder)) == 5
    assert same(adapter_of(folder), saved_at(folder, 3))


# ---- what is written


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("sft", "loss grad_norm learning_rate entropy mean_token_accuracy num_tokens"),
        ("reward", "loss grad_norm learning_rate min_reward mean_reward max_reward accuracy margin"),
        (
            "dpo",
            "loss grad_norm learning_rate rewards/chosen rewards/rejected rewards/margins rewards/accuracies "
            "logps/chosen logps/rejected entropy mean_token_accuracy num_tokens",
        ),
        (
            "ppo",
            "loss grad_norm learning_rate objective/kl objective/entropy objective/non_score_reward "
            "objective/rlhf_reward objective/scores policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg "
            "loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio",
        ),
    ],
)
def test_figures_have_the_names_of_trl(method: str, names: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.constant_reward", lambda prompts, texts: [1.0] * len(texts), raising=False)
    knobs = {"reward": "builtins:constant_reward", "max_new_tokens": 4} if method == "ppo" else {}
    (line,) = metrics_of(run(method, ROWS if method in ("sft", "ppo") else PAIRS, "run", max_steps=1, **knobs))
    assert set(names.split()) <= line.keys()
    assert all(isinstance(value, int | float) for value in line.values())


def test_samples(run: Run) -> None:
    """Every second step and at the end, of the first held-out rows, shown and kept."""
    shown: list[int] = []
    progress = Notes()
    progress.samples = lambda step, samples: shown.append(step)  # type: ignore[method-assign]
    knobs = {"sample_steps": 2, "sample_tokens": 5, "eval_rows": 4, "max_steps": 3, "progress": progress}
    folder = run("sft", ROWS, "run", **knobs)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert shown == [2, 3]
    assert [sample["step"] for sample in samples] == [2, 2, 2, 3, 3, 3]
    assert {tuple(sample) for sample in samples} == {("step", "prompt", "completion")}
    assert [sample["prompt"] for sample in samples[:3]] == [sample["prompt"] for sample in samples[3:]]


def test_log_steps(run: Run) -> None:
    """Every third step, and the last."""
    assert [line["step"] for line in metrics_of(run("sft", ROWS, "run", max_steps=7, log_steps=3))] == [3, 6, 7]


def test_a_damaged_checkpoint_is_not_said_to_be_saved(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second step's checkpoint breaks, and a resumed run fails in the third: it writes the second's again."""
    taken = SFT.round

    def third_fails(self: Any, rows: Any, step: int, retry: Any) -> Any:
        if step == 3:
            raise UserError("the reward broke")
        return taken(self, rows, step, retry)

    monkeypatch.setattr(SFT, "round", third_fails)
    with pytest.raises(UserError, match="step 2 of 4 is saved"):
        run("sft", ROWS, "run", max_steps=4, save_steps=1, keep_checkpoints=9, **FAST)
    there = tmp_path / "run/checkpoints/step-2"
    (there / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="step 2 of 4 is saved"):
        run("sft", ROWS, "run", max_steps=4, save_steps=50, keep_checkpoints=9, resume=True, **FAST)
    assert verify(there, 2) is None


def test_where_no_checkpoint_is_whole_the_run_begins_again_and_says_so(run: Run) -> None:
    folder = run("sft", ROWS, "run", max_steps=4, save_steps=2, keep_checkpoints=9, **FAST)
    before = adapter_bytes(folder)
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"state": "running"}))
    for step in (2, 4):
        (folder / f"checkpoints/step-{step}/tensors.safetensors").write_bytes(b"")
    progress = Notes()
    run("sft", ROWS, "run", max_steps=4, save_steps=2, keep_checkpoints=9, resume=True, progress=progress, **FAST)
    assert [note for note in progress.notes if "is whole: the run begins again at step 1" in note]
    assert adapter_bytes(folder) == before


def test_checkpoints_kept(run: Run) -> None:
    """Every second of 7 steps and the last; the newest two stay."""
    folder = run("sft", ROWS, "run", max_steps=7, save_steps=2, keep_checkpoints=2)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-6", "step-7"]


def test_a_runs_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README promises to lie there, and that config.yaml runs the run again, to the byte."""
    from lowrank_align.config import read_yaml

    folder = run("sft", ROWS, "run", sample_steps=2, sample_tokens=4)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml",
        "adapter",
        "provenance.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "README.md",
    }
    knobs = read_yaml(folder / "config.yaml")
    assert knobs.pop("method") == "sft"
    again = run("sft", ROWS, "again", **{**knobs, "out": "replaced by the fixture"})
    assert adapter_bytes(again) == adapter_bytes(folder)
    assert metrics_of(again) == metrics_of(folder)


def test_an_unknown_tracker(run: Run) -> None:
    with pytest.raises(UserError, match="report_to"):
        run("sft", ROWS, "run", report_to=["tensorbord"])


# ---- signals


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_closed_terminal_stops_a_run_unless_nohup_said_otherwise() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_handlers_outside_the_main_thread() -> None:
    """Python refuses to set them there; the app trains in such a thread."""
    from concurrent.futures import ThreadPoolExecutor

    def enter() -> bool:
        with StopSignals() as stop:
            return stop.asked

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False
