"""Doing one task: a start, a policy that is trained and measured, a reward model, best-of-n."""

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lowrank_align.apps.frontier import measuring
from lowrank_align.apps.frontier.budget import Spent, spent_offline, spent_online, steps_within
from lowrank_align.apps.frontier.start import JUDGE, SFT, Prompts, Start, World, make_start, write_rows
from lowrank_align.apps.frontier.tasks import Ground, Task, read_done, write_done

from lowrank_align import checkpoint
from lowrank_align.base import Base
from lowrank_align.config import OnlineSettings, TrainSettings
from lowrank_align.data.formats import Shape
from lowrank_align.data.load import load_rows
from lowrank_align.runs import read_metrics

MEASURED = "measured"  # the role that is looked at
_bases: dict[tuple[str, str, str], Base] = {}


def run_task(task: Task, ground: Ground, out: Path) -> dict[str, Any]:
    """The task's result, from its folder where it is finished; `done.json` is written last."""
    folder = task.folder(out, ground)
    if (done := read_done(folder)) is not None:
        return done
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    world = World.of(_base(ground), ground, task.seed)
    if task.kind == "start":
        result = make_start(world, folder)
        measure_start(world, folder, result)
    else:
        start_folder = task.start_folder(out)
        start = Start.read(start_folder)
        work = {"policy": make_policy, "reward": make_reward, "best_of": make_best_of}[task.kind]
        result = work(world, task, folder, start)
    result |= {"name": task.name, "seed": task.seed, "seconds": time.perf_counter() - began}
    write_done(folder, result)
    return result


def _base(ground: Ground) -> Base:
    """Loaded once a process."""
    name = (ground.model, ground.quantize, ground.device)
    if name not in _bases:
        _bases[name] = Base.load(ground.model, quantize=ground.quantize, device=ground.device)
    return _bases[name]


def measure_start(world: World, folder: Path, result: dict[str, Any]) -> None:
    """SFT's own figures, the scores that others are compared with, and how well the reward model orders answers."""
    world.base.add_role(JUDGE, start_from=folder / "reward", trainable=False)
    found = world.prompts()
    result["baseline"] = {
        "validation": measuring.baseline(world, found.validation),
        "test": measuring.baseline(world, found.test),
    }
    against = result["baseline"]["test"]
    result["test"] = measuring.figures(world, SFT, found.test, against)
    result["temperatures"] = measuring.at_temperatures(world, SFT, found.test, against, world.ground.temperatures, "")
    result["reward_accuracy"] = measuring.reward_accuracy(world, JUDGE, found.test)


# ---- a policy


def make_policy(world: World, task: Task, folder: Path, start: Start) -> dict[str, Any]:
    """Train an entry's method at one point of its sweep and one learning rate, within the budget; then measure it."""
    settings, before = policy_settings(world, task.spec, folder / "run", start)
    summary = world.train(settings)
    spent = spent_by(settings, summary.run, start.answer_tokens)
    start.put_on(world.base)
    prefix = measuring.answer_prefix(summary.run)
    world.base.add_role(MEASURED, start_from=summary.run, trainable=False)
    found, baseline = world.prompts(), start.baseline
    result = {
        "learning_rate": settings.learning_rate,
        "steps": summary.steps,
        "spent": (before + spent).as_json(),
        "validation": measuring.figures(world, MEASURED, found.validation, baseline["validation"], prefix),
        "test": measuring.figures(world, MEASURED, found.test, baseline["test"], prefix),
    }
    if task.spec["warm"]:
        result["temperatures"] = measuring.at_temperatures(
            world, MEASURED, found.test, baseline["test"], world.ground.temperatures, prefix
        )
    if task.spec["watched"]:
        result["way"] = _way(world, summary.run, found, baseline["test"], prefix)
    world.base.remove_role(MEASURED)
    for path in (summary.run / "checkpoints").glob("step-*"):  # what they were kept for is measured
        _remove(path)
    return result


def policy_settings(world: World, spec: Mapping[str, Any], out: Path, start: Start) -> tuple[TrainSettings, Spent]:
    """The run's settings with as many steps as the budget allows, and what was spent before it."""
    knobs: dict[str, Any] = {"adapter": str(start.folder / "sft"), **spec["knobs"]}
    before = start.pairs
    if spec["reward"] is None:
        knobs["data"] = str(start.folder / "pairs.jsonl")
    else:
        knobs["prompts"] = str(start.folder / "prompts.jsonl")
        knobs["reward"] = str(start.folder / "reward") if spec["reward"] == "learned" else world.ground.score
        before = start.pairs + start.reward if spec["reward"] == "learned" else Spent()
    settings = world.settings(spec["method"], knobs, out)
    middle = spec["rate"] if spec["rate"] is not None else settings.learning_rate
    budget = world.ground.budget_tokens * spec["further"]
    steps = steps_within(budget, before, settings, start.answer_tokens)
    every = max(1, steps // world.ground.looks)
    changed = {"max_steps": steps, "learning_rate": middle * spec["multiple"]}
    if spec["watched"]:
        changed |= {"save_steps": every, "keep_checkpoints": world.ground.looks + 2}
    return world.settings(spec["method"], knobs | changed, out), before


def spent_by(settings: TrainSettings, run: Path, answer_tokens: float) -> Spent:
    """The tokens of a finished run: counted where its rollouts were, else by the mean length of the pairs' answers."""
    metrics = read_metrics(run / "metrics.jsonl")
    if isinstance(settings, OnlineSettings):
        return spent_online(settings, metrics)
    return spent_offline(settings, len(metrics), answer_tokens)


def _way(world: World, run: Path, found: Prompts, against: list[float], prefix: str) -> list[dict[str, Any]]:
    """The policy as each checkpoint has it, from SFT (step 0) on; the optimiser's state is of no interest here."""
    way = []
    role = world.base.trainable_parameters(MEASURED)
    for step in sorted(checkpoint.sealed_steps(run / "checkpoints")):
        tensors = checkpoint.read(run / "checkpoints" / f"step-{step}", step).tensors
        with torch.no_grad():
            for key, parameter in role.items():
                parameter.copy_(tensors[f"policy/{key}"])
        way.append({"step": step, **measuring.figures(world, MEASURED, found.test, against, prefix)})
    return way


# ---- what is no policy


def make_reward(world: World, task: Task, folder: Path, start: Start) -> dict[str, Any]:
    """A reward model on a share of the pairs, or with another LoRA rank (its SFT start has the same)."""
    rows = load_rows(start.folder / "pairs.jsonl", expect={Shape.pair}).rows
    count = max(1, round(task.spec["share"] * len(rows)))
    kept = random.Random(world.seed).sample(rows, count)
    write_rows(
        folder / "pairs.jsonl",
        [{"prompt": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1]} for r in kept],
    )
    adapter = start.folder / "sft"
    if (rank := task.spec["rank"]) is not None:
        adapter = folder / "sft"
        data = str(start.folder / "demonstrations.jsonl")
        world.train(world.settings("sft", {"data": data, "rank": rank}, adapter))
    knobs = {"data": str(folder / "pairs.jsonl"), "adapter": str(adapter)}
    world.train(world.settings("reward", knobs, folder / "reward"))
    start.put_on(world.base)
    world.base.add_role(MEASURED, start_from=folder / "reward", trainable=False)
    accuracy = measuring.reward_accuracy(world, MEASURED, world.prompts().test)
    world.base.remove_role(MEASURED)
    return {"pairs": count, "rank": rank, "share": task.spec["share"], "accuracy": accuracy}


def make_best_of(world: World, task: Task, folder: Path, start: Start) -> dict[str, Any]:
    """Best-of-n by the learned reward: nothing is trained, n answers are drawn where one is asked for."""
    start.put_on(world.base)
    against = start.baseline["test"]
    found = measuring.best_of(world, world.prompts().test, against, task.spec["counts"])
    return {"counts": found, "spent": (start.pairs + start.reward).as_json()}


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
