"""Whether a run fits into this machine's memory, told before anything is loaded, and the settings that would."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from lowrank_align import adapters
from lowrank_align.architecture import UnknownFigures
from lowrank_align.base import Base
from lowrank_align.config import OnlineSettings, TrainSettings, read_yaml
from lowrank_align.data.training import Tell
from lowrank_align.devices import DTYPES, pick_device, pick_dtype
from lowrank_align.errors import EnvironmentProblem
from lowrank_align.loading import read_config
from lowrank_align.memory import free_bytes, steady_heap
from lowrank_align.plan import (
    GPU_CONTEXT_BYTES,
    Plan,
    Workload,
    as_flags,
    fit,
    gib,
    in_one_line,
    size_bytes,
    work_of,
)
from lowrank_align.skeleton import measure
from lowrank_align.trees import TreeRow, longest_rows
from lowrank_align.workers import launched_processes

S = TypeVar("S", bound=TrainSettings)
LONGEST_OF_LARGE = 256

PLANNED = (
    "micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "optimizer", "max_length", "max_new_tokens",
)  # fmt: skip


def plan_run(settings: TrainSettings, rows: Sequence[TreeRow], base: Base | None = None) -> Plan:
    """The plan for these rows on the device that `settings` name; with `base`, its weights are in memory already."""
    device = base.device if base else pick_device(settings.device)
    config = base.model.config if base else read_config(settings.model)
    architecture = measure(config, settings.model)
    if settings.adapter is not None:  # one that is continued keeps its own
        settings = settings.model_copy(update=adapters.size_of(settings.adapter))
    longest = longest_rows(rows, 1)[0]
    lengths = [len(completion.ids) for completion in longest.completions]
    if isinstance(settings, OnlineSettings):
        lengths = [settings.max_new_tokens] * settings.trained_answers
    layout: Literal["tree", "flat"] = "flat" if architecture.needs_flat_rows else "tree"
    work = work_of(
        settings,
        device="cpu" if device.type == "cpu" else "gpu",
        dtype=_dtype_name(base.compute_dtype if base else pick_dtype(settings.dtype, device)),
        prompt_tokens=len(longest.prompt_ids),
        completion_tokens=-(-sum(lengths) // len(lengths)),
        completions=len(lengths),
        layout=base.layout if base else layout,
    )
    budget = size_bytes(settings.gpu) if settings.gpu else budget_of(device, base)
    if work.device == "cpu":
        steady_heap()

    def at_length(work: Workload, max_length: int) -> Workload | None:
        return rows_at(rows, work, max_length)

    return fit(architecture, work, budget, at_length)


def budget_of(device: torch.device, base: Base | None = None) -> int:
    """What a run may take on the device: what is free, and what is its own already (the base, a GPU's context)."""
    context = 0 if device.type == "cpu" else GPU_CONTEXT_BYTES  # asking what is free has made one
    sharing = launched_processes(here=True) if device.type == "cpu" else 1  # each loads a base of its own
    return free_bytes(device) // sharing + context + (base.frozen_bytes() if base else 0)


def rows_at(rows: Sequence[TreeRow], work: Workload, max_length: int) -> Workload | None:
    """The workload after `max_length` has cut completions and dropped rows whose prompt leaves no room; None: no row.

    Rollouts become shorter in proportion. Of a large file the longest rows are looked at.
    """
    new_tokens = work.max_new_tokens * max_length // work.max_length
    sizes = []
    for row in rows if isinstance(rows, list) else longest_rows(rows, LONGEST_OF_LARGE):
        room = max_length - len(row.prompt_ids)
        if room > 0 and (not work.max_new_tokens or 0 < new_tokens <= room):
            completions = [min(len(completion.ids), room) for completion in row.completions]
            completions = completions or [new_tokens] * work.completions
            sizes.append((len(row.prompt_ids) + sum(completions), len(row.prompt_ids), completions))
    if not sizes:
        return None
    _, prompt_tokens, completions = max(sizes, key=lambda size: size[0])
    return replace(
        work,
        prompt_tokens=prompt_tokens,
        completion_tokens=-(-sum(completions) // len(completions)),
        completions=len(completions),
        max_new_tokens=new_tokens,
        max_length=max_length,
    )


def fitted(settings: S, rows: Sequence[TreeRow], base: Base | None, tell: Tell) -> S:
    """The settings, told in one line what they need: as they are where they fit, or with --force.

    With --auto the nearest that fit. EnvironmentProblem naming those otherwise. What cannot be planned goes on.
    """
    try:
        plan = plan_run(settings, rows, base)
    except UnknownFigures as error:  # the planner's limit, not the run's
        tell(f"plan: none ({error}); going on")
        return settings
    tell(in_one_line(plan))
    if plan.fits:
        return settings
    if settings.force or (settings.resume and settings.auto):  # a resumed run keeps what it began with
        tell("the plan says that this does not fit; going on all the same")
        return settings
    if not settings.auto or plan.chosen is None or plan.chosen_prediction is None:
        raise refusal(plan, rows)
    tell(f"--auto takes {as_flags(plan.changes)}: {gib(plan.chosen_prediction.total_bytes)}{_lost(plan, rows)}")
    return settings.model_copy(update=plan.changes)


def refusal(plan: Plan, rows: Sequence[TreeRow]) -> EnvironmentProblem:
    """One line on what is lacking and what would fit."""
    needs = f"needs {gib(plan.prediction.total_bytes)}, there are {gib(plan.budget_bytes)}"
    if plan.chosen is None or plan.chosen_prediction is None:
        least = f"the smallest settings need {gib(plan.least_bytes)}; take a smaller model, or go on with --force"
        return EnvironmentProblem(f"does not fit into memory: {needs}; {least}")
    fits = f"{as_flags(plan.changes)} fits ({gib(plan.chosen_prediction.total_bytes)}{_lost(plan, rows)})"
    return EnvironmentProblem(f"does not fit into memory: {needs}; {fits}: --auto takes it, --force goes on as it is")


def _lost(plan: Plan, rows: Sequence[TreeRow]) -> str:
    """What a shorter length costs in rows."""
    length = plan.changes.get("max_length")
    if length is None:
        return ""
    new_tokens = max(1, plan.changes.get("max_new_tokens", plan.asked.max_new_tokens))
    if not isinstance(rows, list):
        return "; longer rows are cut, or give way to others"
    dropped = sum(len(row.prompt_ids) + new_tokens > length for row in rows)
    return f"; drops {dropped} of {len(rows)} rows and cuts others" if dropped else "; longer rows are cut"


def as_the_run_began(settings: S, out: Path, tell: Tell) -> S:
    """With --resume --auto: what the run's beginning chose to fit, as its config.yaml has it; what differs is told."""
    if not (settings.resume and settings.auto and (out / "config.yaml").is_file()):
        return settings
    before = read_yaml(out / "config.yaml")
    chosen = {name: before[name] for name in PLANNED if name in before and name in type(settings).model_fields}
    chosen = {name: value for name, value in chosen.items() if value != getattr(settings, name)}
    if chosen:
        tell(f"--resume --auto: {', '.join(f'{name} {value}' for name, value in chosen.items())}, as the run began")
    return settings.model_copy(update=chosen)


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
