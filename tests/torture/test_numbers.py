"""Numbers that are not finite, put in everywhere: seen before the step, counted, five are the end, never in a file."""

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_align import checkpoint
from lowrank_align.base import Base
from lowrank_align.errors import NumericError, UserError
from lowrank_align.loop import Loop
from lowrank_align.methods import method_class
from lowrank_align.methods.sft import SFT
from lowrank_align.rewards import Rewards
from lowrank_align.row_order import RowOrder
from tests.notes import Notes
from tests.torture.forms import LONG, of

SECTION = "Numbers"
VALUES = (math.nan, math.inf, -math.inf)
HUGE = (1e30, -1e30, 3e38)  # that 32 bits hold, but not their squares or sums

PROMPTS = [{"prompt": f"{i}. Say: "} for i in range(8)]
DEMONSTRATIONS = [row | {"completion": f"a word {'or two ' * (i % 3)}"} for i, row in enumerate(PROMPTS)]
PAIRS = [row | {"chosen": DEMONSTRATIONS[i]["completion"], "rejected": f"no {i}"} for i, row in enumerate(PROMPTS)]
LABELLED = [row | {"label": i % 2 == 0} for i, row in enumerate(DEMONSTRATIONS)]
SAMPLED = {"reward": "builtins:letters", "max_new_tokens": 4, "missing_eos_penalty": 0.0}
GROUPS = SAMPLED | {"group_size": 3}
METHODS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "sft": (DEMONSTRATIONS, {}),
    "reward": (PAIRS, {}),
    "dpo": (PAIRS, {}),
    "kto": (LABELLED, {}),
    "ppo": (PROMPTS, SAMPLED | {"minibatches": 2, "ppo_epochs": 1}),
    "grpo": (PROMPTS, GROUPS),
    "rloo": (PROMPTS, GROUPS),
    "online-dpo": (PROMPTS, GROUPS),
    "expert": (PROMPTS, GROUPS),
    "quark": (PROMPTS, SAMPLED | {"pool_steps": 1, "quantiles": 2}),
}
ONLINE = [method for method, (_, knobs) in METHODS.items() if "reward" in knobs]
SEVERAL_UPDATES = ("ppo", "quark")
KNOBS = {"batch_size": 4, "micro_batch_size": 2, "rank": 2, "learning_rate": 5e-3, "lr_schedule": "constant"}
KNOBS |= {"warmup_ratio": 0.0, "save_steps": 1, "keep_checkpoints": 99}

Run = Callable[..., Path]


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(set(text))) + len(text) / 10 for text in completions]


class Poison:
    """Puts `value` in at some point of step `step`: once, or `lasting`, in every step from there on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.value, self.step, self.lasting = patch, math.nan, 0, False
        self.now, self.given = 0, 0
        before = Loop._step

        def step(it: Loop, number: int) -> Any:
            self.now = number
            try:
                return before(it, number)
            finally:
                self.now = 0

        patch.setattr(Loop, "_step", step)

    def at(self, value: float, step: int, *, lasting: bool = False) -> None:
        self.value, self.step, self.lasting, self.now, self.given = value, step, lasting, 0, 0

    def due(self) -> bool:
        """Whether it is put in here."""
        here = bool(self.now) and (self.now >= self.step if self.lasting else self.now == self.step and not self.given)
        self.given += here
        return here


def in_the_loss(poison: Poison, method: str) -> None:
    """The figure alone, the gradients are finite."""
    kind = method_class(method)
    before = kind.step
    poison.patch.setattr(kind, "step", lambda self, *a: before(self, *a) + (poison.value if poison.due() else 0.0))


def in_a_gradient(poison: Poison, method: str) -> None:
    """One element of one gradient, the loss is finite."""
    kind = method_class(method)
    before = kind.step

    def step(self: Any, *arguments: Any) -> Any:
        loss = before(self, *arguments)
        if poison.due():
            weights = self.base.trainable_parameters(self.trained[poison.given % len(self.trained)])
            gradients = [p.grad for p in weights.values() if p.grad is not None]
            gradients[len(gradients) // 2].view(-1)[0] = poison.value
        return loss

    poison.patch.setattr(kind, "step", step)


def in_a_row(poison: Poison, method: str) -> None:
    """What the model says of a batch's first row: in loss, gradients and figures of a micro-batch."""
    before = Base.hidden_states

    def hidden_states(self: Base, batch: Any) -> Any:
        found = before(self, batch)
        if torch.is_grad_enabled() and poison.due():
            factor = torch.ones_like(found)
            factor[0] = poison.value
            return found * factor
        return found

    poison.patch.setattr(Base, "hidden_states", hidden_states)


POINTS = {"the loss": in_the_loss, "a gradient": in_a_gradient, "a row's hidden states": in_a_row}


def in_the_scores(poison: Poison) -> None:
    """One answer's score by a reward model."""
    before = Rewards.of_trees

    def of_trees(self: Rewards, trees: Any, size: int) -> dict[str, torch.Tensor]:
        found = before(self, trees, size)
        if poison.due():
            for scores in found.values():
                scores[len(scores) // 2] = poison.value
        return found

    poison.patch.setattr(Rewards, "of_trees", of_trees)


def in_the_weights(poison: Poison) -> None:
    """One weight of an adapter after a step."""
    before = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Any = None) -> None:
        before(self, closure)
        if poison.due():
            weights = [p for group in self.param_groups for p in group["params"]]
            weights[len(weights) // 2].data.view(-1)[0] = poison.value

    poison.patch.setattr(torch.optim.AdamW, "step", step)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    monkeypatch.setattr("builtins.letters", letters, raising=False)
    return Poison(monkeypatch)


def go(run: Run, method: str, name: str, **knobs: Any) -> Path:
    rows, own = METHODS[method]
    return run(method, rows, name, **KNOBS | own | knobs)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Adapters, heads and moments, all but the count of steps."""
    tensors = load_file(folder / "checkpoints" / f"step-{step}" / "tensors.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("/step")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def not_finite(folder: Path) -> list[str]:
    """What is no number, or no JSON, in any file of a run."""
    found: list[str] = []

    def walk(path: Path, value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(path, item)
        elif isinstance(value, list):
            for item in value:
                walk(path, item)
        elif isinstance(value, str) and value.lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
            found.append(f"{path.name}: {value}")

    for path in folder.rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            walk(path, json.loads(text, parse_constant=lambda constant: constant))
    for path in folder.rglob("*.safetensors"):
        found += [
            f"{path.name}: {name}" for name, tensor in load_file(path).items() if not torch.isfinite(tensor).all()
        ]
    return found


def five_and_out(run: Run, method: str, name: str, step: int, tmp_path: Path, **knobs: Any) -> list[str]:
    """What is wrong with a run that is poisoned from a step on: it must end at the fifth such step, with code 4."""
    wrong = []
    try:
        go(run, method, name, max_steps=step + 9, **knobs)
        wrong.append("it went on")
    except NumericError as error:
        advice = "begin again with a lower --learning-rate" if step > 1 else "not one was taken"
        if error.exit_code != 4 or f"5 steps in a row without finite numbers; {advice}" not in str(error):
            wrong.append(str(error))
    steps = [line["step"] for line in lines_of(tmp_path / name)]
    if steps != list(range(1, step + 4)):
        wrong.append(f"logged {steps}")
    return wrong + not_finite(tmp_path / name)


# ---- once: that step is left out, the others are not


@pytest.mark.parametrize("method", METHODS)
def test_once(method: str, run: Run, poison: Poison, times: Any, tally: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In step 2 or 3 of 4. Adapters and moments are as before it, the next step moves them again, and it is counted."""
    draw, names = random.Random(method), list(METHODS)
    for i, (point, put) in enumerate(POINTS.items()):
        chosen = times(1, len(VALUES))
        if not LONG and (names.index(method) + i) % 3:
            continue  # of the three points one
        failed = []
        with monkeypatch.context() as patch:
            poison.patch = patch
            put(poison, method)
            for j in range(chosen):
                value, step = VALUES[(names.index(method) + i + j) % 3], draw.choice((2, 3))
                poison.at(value, step)
                folder = go(run, method, f"run-{i}-{j}", max_steps=4)
                lines = lines_of(folder)
                still = method in SEVERAL_UPDATES or same(saved_at(folder, step), saved_at(folder, step - 1))
                moves = not same(saved_at(folder, step + 1), saved_at(folder, step))
                counts = [line["skipped"] for line in lines] == [float(n >= step) for n in range(1, 5)]
                if poison.given != 1 or not (still and moves and counts) or not_finite(folder):
                    failed.append(
                        (value, step, poison.given, still, moves, [x["skipped"] for x in lines], not_finite(folder))
                    )
        tally(
            SECTION, f"NaN or infinity in {point}, once", "that update is left out and counted, the next one taken",
            held=chosen - len(failed), of=chosen,
        )  # fmt: skip
        assert not failed, point


@pytest.mark.parametrize("method", of(METHODS, "sft", "ppo", "expert"))
def test_lasting(
    method: str, run: Run, poison: Poison, times: Any, tally: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 1 or 2 on: four steps are left out, the fifth ends the run, and no file has heard of it."""
    points = list(POINTS.items())
    first = list(METHODS).index(method)
    for i in range(times(1, 6)):
        point, put = points[(first + i) % 3]
        with monkeypatch.context() as patch:
            poison.patch = patch
            put(poison, method)
            poison.at(VALUES[(first + i // 3) % 3], 1 + i % 2, lasting=True)
            wrong = five_and_out(run, method, f"run-{i}", 1 + i % 2, tmp_path)
        tally(SECTION, "NaN or infinity from a step on", "code 4 at the fifth step in a row", held=int(not wrong), of=1)
        assert not wrong, point


# ---- what an answer is worth


@pytest.mark.parametrize("method", of(ONLINE, "ppo", "expert"))
def test_a_reward_model(
    method: str, run: Run, poison: Poison, trained: Path, times: Any, tally: Any, tmp_path: Path
) -> None:
    """One answer's score: the whole step is left out, and only that; from a step on, the fifth ends the run."""
    failed, count = [], times(1, 3)
    in_the_scores(poison)
    progress = Notes()
    for i in range(count):
        value, reward = VALUES[(ONLINE.index(method) + i) % 3], {"reward": str(trained / "reward")}
        poison.at(value, 2)
        folder = go(run, method, f"once-{i}", max_steps=3, progress=progress, **reward)
        lines = lines_of(folder)
        still = same(saved_at(folder, 2), saved_at(folder, 1)) and not same(saved_at(folder, 3), saved_at(folder, 2))
        told = any(f"reward gave {value:.3g} for an answer to the prompt '" in note for note in progress.notes)
        counts = [line["skipped"] for line in lines] == [0, 1, 1] and lines[1]["loss"] is None
        poison.at(value, 2, lasting=True)
        wrong = five_and_out(run, method, f"lasting-{i}", 2, tmp_path, **reward)
        if wrong or not_finite(folder) or not (still and told and counts):
            failed.append((value, still, told, counts, wrong, not_finite(folder)))
    tally(
        SECTION, "NaN or infinity as a reward model's score", "that step is left out, the fifth in a row ends the run",
        held=count - len(failed), of=count,
    )  # fmt: skip
    assert not failed


@pytest.mark.parametrize("method", of(ONLINE, "quark"))
def test_a_reward_function(method: str, run: Run, poison: Poison, times: Any, tally: Any, tmp_path: Path) -> None:
    """It is the user's to mend: one line with the prompt, the steps before saved; mended, the run ends as if never."""
    clean, failed = adapter_of(go(run, method, "clean", max_steps=3)), []
    given, count = [*VALUES, 1e300], times(1, 4)
    for i in range(count):
        value = given[(ONLINE.index(method) + i) % 4]

        def score(prompts: list[str], completions: list[str], value: float = value) -> list[float]:
            found = letters(prompts, completions)
            if poison.due():
                found[-1] = value
            return found

        poison.patch.setattr("builtins.letters", score)
        poison.at(value, 3, lasting=True)
        with pytest.raises(
            NumericError, match=rf"gave {value} for the prompt .*step 2 of 3 is saved".replace("+", r"\+")
        ):
            go(run, method, f"run-{i}", max_steps=3)
        wrong = not_finite(tmp_path / f"run-{i}")
        poison.patch.setattr("builtins.letters", letters)
        resumed = adapter_of(go(run, method, f"run-{i}", max_steps=3, resume=True))
        if wrong or not same(resumed, clean):
            failed.append((value, wrong))
    tally(
        SECTION, "NaN, infinity or 1e300 from a reward function", "one line names the prompt, the step before is saved",
        held=count - len(failed), of=count,
    )  # fmt: skip
    assert not failed


# ---- weights


@pytest.mark.parametrize("method", of(METHODS, "reward", "ppo"))
def test_weights_after_a_step(method: str, run: Run, poison: Poison, times: Any, tally: Any, tmp_path: Path) -> None:
    """No way leads back but the last checkpoint: seen at once, not saved; resumed, the end is that of a clean run."""
    in_the_weights(poison)
    poison.at(0.0, 99)
    clean, failed, count = adapter_of(go(run, method, "clean", max_steps=3)), [], times(1, 3)
    for i in range(count):
        value, step = VALUES[(list(METHODS).index(method) + i) % 3], 1 + (list(METHODS).index(method) + i) % 3
        poison.at(value, step)
        with pytest.raises(NumericError, match=f"the update of step {step} left weights that are not finite"):
            go(run, method, f"run-{i}", max_steps=3)
        steps, wrong = (
            sorted(checkpoint.sealed_steps(tmp_path / f"run-{i}" / "checkpoints")),
            not_finite(tmp_path / f"run-{i}"),
        )
        poison.at(0.0, 99)
        resumed = adapter_of(go(run, method, f"run-{i}", max_steps=3, resume=True))
        if steps != list(range(1, step)) or wrong or not same(resumed, clean):
            failed.append((value, steps, wrong))
    tally(
        SECTION, "NaN or infinity in an adapter's weights", "seen in that step, not saved; resumed, the same end",
        held=count - len(failed), of=count,
    )  # fmt: skip
    assert not failed


def test_a_rate_that_overflows(run: Run, tally: Any, tmp_path: Path) -> None:
    """Loss and gradient are finite, the step is not."""
    with pytest.raises(NumericError, match="the update of step 1 left weights that are not finite"):
        go(run, "sft", "run", max_steps=2, learning_rate=1e30)
    wrong = not_finite(tmp_path / "run")
    tally(SECTION, "a learning rate that overflows", "seen in that step, not saved", held=int(not wrong), of=1)
    assert not wrong


@contextmanager
def broken(base: Any, value: float) -> Iterator[Callable[[], None]]:
    """A call that puts a value into one weight of the base; at the end it is as it was."""
    weight = next(p for name, p in base.model.named_parameters() if "q_proj" in name and "lora" not in name)
    before = weight.data.clone()
    try:
        yield lambda: weight.data.view(-1)[0:1].fill_(value)
    finally:
        weight.data.copy_(before)


@pytest.mark.parametrize("method", of(METHODS, "dpo", "online-dpo"))
def test_the_base(
    method: str, run: Run, poison: Poison, times: Any, tally: Any, tmp_path: Path, tiny_base: Any
) -> None:
    """A weight of the base breaks in step 2, for good: nothing is learned from it, the fifth step ends the run."""
    count, failed = times(1, 3), []
    for i in range(count):
        value = VALUES[(list(METHODS).index(method) + i) % 3]
        poison.at(value, 2)
        with broken(tiny_base, value) as breaks:
            before = RowOrder.of_step

            def of_step(self: RowOrder, step: int, before: Any = before, breaks: Any = breaks) -> Any:
                if poison.due():
                    breaks()
                return before(self, step)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RowOrder, "of_step", of_step)
                wrong = five_and_out(run, method, f"run-{i}", 2, tmp_path)
        failed += [(value, wrong)] if wrong else []
    tally(SECTION, "NaN or infinity in the base's weights", "code 4 at the fifth step in a row, nothing of it saved",
          held=count - len(failed), of=count)  # fmt: skip
    assert not failed


def test_the_shift_of_a_reward_model(run: Run, poison: Poison, tally: Any, tmp_path: Path) -> None:
    """The mean score over the training rows, after the last step: no model is saved with one that is no number."""
    before = Base.scores
    poison.patch.setattr(
        Base, "scores", lambda self, *a, **k: before(self, *a, **k) + (0 if self.model.training else math.nan)
    )
    with pytest.raises(NumericError, match="the mean score over 8 training rows is nan"):
        go(run, "reward", "run", max_steps=2)
    held = not not_finite(tmp_path / "run") and not (tmp_path / "run" / "reward.json").exists()
    tally(SECTION, "a reward model's mean score is NaN", "code 4, no model is saved", held=int(held), of=1)
    assert held


# ---- held-out rows


@pytest.mark.parametrize("value", of(VALUES, math.nan))
def test_an_evaluation_is_no_best_one(value: float, run: Run, tally: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first held-out loss is no number; 3, 2, 4 follow: the adapter of step 3 is kept."""
    losses = [value, 3.0, 2.0, 4.0]
    monkeypatch.setattr(SFT, "evaluate", lambda self, rows, retry: {"loss": losses.pop(0)})
    folder = go(run, "sft", "run", max_steps=4, eval_rows=2, eval_steps=1, early_stopping=3)
    kept = {name.removeprefix("base_model.model."): tensor for name, tensor in adapter_of(folder).items()}
    best = saved_at(folder, 3)
    held = all(torch.equal(best[f"policy/{name}"], tensor) for name, tensor in kept.items()) and not not_finite(folder)
    tally(SECTION, "NaN or infinity in an evaluation", "never the best one, and the run goes on", held=int(held), of=1)
    assert held


@pytest.mark.parametrize("method", of(ONLINE, "rloo"))
def test_a_reward_model_in_evaluation(
    method: str, run: Run, trained: Path, tally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 1 of 2 a held-out answer has no score: a line says so, and nothing else is left out."""
    before, calls = Loop._evaluate, []

    def evaluate(self: Loop, step: int) -> Any:
        calls.append(step)
        try:
            return before(self, step)
        finally:
            calls.clear()

    of_trees = Rewards.of_trees

    def scores(self: Rewards, *arguments: Any) -> Any:
        return {name: found * (math.nan if calls == [1] else 1) for name, found in of_trees(self, *arguments).items()}

    monkeypatch.setattr(Loop, "_evaluate", evaluate)
    monkeypatch.setattr(Rewards, "of_trees", scores)
    progress = Notes()
    knobs = {"eval_rows": 2, "eval_steps": 1, "max_steps": 2, "reward": str(trained / "reward")}
    folder = go(run, method, "run", progress=progress, **knobs)
    found = [line.get("eval_objective/scores") for line in lines_of(folder)]
    told = [note for note in progress.notes if note.startswith("step 1: ") and note.endswith(": not evaluated")]
    held = found[0] is None and found[1] is not None and len(told) == 1 and not not_finite(folder)
    tally(SECTION, "NaN or infinity in an evaluation", "never the best one, and the run goes on", held=int(held), of=1)
    assert held


# ---- one row with a number that is finite, and far from all others


@pytest.mark.parametrize("method", of(ONLINE, "ppo", "rloo"))
def test_one_huge_score(method: str, run: Run, poison: Poison, times: Any, tally: Any) -> None:
    """Whenever it is drawn, one prompt's first answer scores 1e30 and more. Steps without it go on learning."""
    count, failed = times(1, 3), []
    for i in range(count):
        value, seen = HUGE[(ONLINE.index(method) + i) % 3], []

        def score(
            prompts: list[str], completions: list[str], value: float = value, seen: list[bool] = seen
        ) -> list[float]:
            found, here = letters(prompts, completions), [prompt.startswith("3.") for prompt in prompts]
            seen.append(any(here))
            if any(here):
                found[here.index(True)] = value
            return found

        poison.patch.setattr("builtins.letters", score)
        folder = go(run, method, f"run-{i}", max_steps=6)
        moved = [not same(saved_at(folder, n), saved_at(folder, n - 1)) for n in range(2, 7)]
        free = [not here for here in seen[1:6]]
        learns = all(m for m, f in zip(moved, free, strict=True) if f) or method == "quark"
        if not (learns and sum(moved) >= 2) or not_finite(folder):
            failed.append((value, moved, free, not_finite(folder)))
    tally(
        SECTION,
        "a score of 1e30 or more for one answer",
        "the steps without it go on learning",
        held=count - len(failed),
        of=count,
    )
    assert not failed


def test_one_huge_margin(run: Run, tally: Any) -> None:
    """In a row of a reward model's pairs: what 32 bits hold is learned from, what they do not hold is a bad row."""
    held, values = 0, (1e30, -1e30, 3e38, 1e300)
    for i, value in enumerate(values):
        rows = [PAIRS[0] | {"margin": value}, *PAIRS[1:]]
        try:
            folder = run("reward", rows, f"run-{i}", **KNOBS, max_steps=4)
            moved = [not same(saved_at(folder, n), saved_at(folder, n - 1)) for n in (2, 3, 4)]
            held += all(moved) and not not_finite(folder) and value < 1e300
        except UserError as error:
            held += value == 1e300 and "rows.jsonl:1: margin: 1e+300, must be at most" in str(error)
    tally(
        SECTION,
        "a margin of 1e30 or more in one row",
        "learned from, or refused as a bad row",
        held=held,
        of=len(values),
    )
    assert held == len(values)
