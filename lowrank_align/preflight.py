"""Whether a run fits into this machine's memory, told before anything is loaded, and the settings that would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch

from lowrank_align import adapters
from lowrank_align.architecture import UnknownFigures
from lowrank_align.base import Base
from lowrank_align.config import TrainSettings, read_yaml
from lowrank_align.data.training import Tell
from lowrank_align.errors import EnvironmentProblem
from lowrank_align.loading import DTYPES, pick_device, pick_dtype, read_config
from lowrank_align.memory import free_bytes, steady_heap
from lowrank_align.plan import Plan, as_flags, fit, gib, has_own_pages, in_one_line, size_bytes, work_of
from lowrank_align.skeleton import measure
from lowrank_align.trees import TreeRow, longest_rows

S = TypeVar("S", bound=TrainSettings)

PLANNED = (
    "micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "optimizer", "max_length", "max_new_tokens",
)  # fmt: skip


def plan_run(settings: TrainSettings, rows: Sequence[TreeRow], base: Base | None = None) -> Plan:
    """The plan for these rows on the device that `settings` name; with `base`, its weights are in memory already."""
    device = base.device if base else pick_device(settings.device)
    config = base.model.config if base else read_config(settings.model)
    architecture = measure(config, settings.model)
    if settings.adapter is not None:  # one that is continued keeps its own
        rank, targets = adapters.size_of(settings.adapter)
        settings = settings.model_copy(update={"rank": rank, "target_modules": targets})
    longest = longest_rows(rows, 1)[0]
    new_tokens = getattr(settings, "max_new_tokens", 0)
    lengths = [len(completion.ids) for completion in longest.completions] or [new_tokens]
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
    budget = size_bytes(settings.gpu) if settings.gpu else free_bytes(device) + (base.frozen_bytes() if base else 0)
    if work.device == "cpu" and has_own_pages(architecture, work):
        steady_heap()
    return fit(architecture, work, budget)


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
    if settings.force:
        tell("the plan says that this does not fit; --force goes on")
        return settings
    if not settings.auto or plan.chosen is None or plan.chosen_prediction is None:
        raise refusal(plan)
    tell(f"--auto takes {as_flags(plan.changes)}: {gib(plan.chosen_prediction.total_bytes)}")
    return settings.model_copy(update=plan.changes)


def refusal(plan: Plan) -> EnvironmentProblem:
    """One line on what is lacking and what would fit."""
    needs = f"needs {gib(plan.prediction.total_bytes)} of {gib(plan.budget_bytes)}"
    if plan.chosen is None or plan.chosen_prediction is None:
        least = f"the smallest settings need {gib(plan.least_bytes)}; take a smaller model, or go on with --force"
        return EnvironmentProblem(f"does not fit into memory: {needs}; {least}")
    fits = f"{as_flags(plan.changes)} fits ({gib(plan.chosen_prediction.total_bytes)})"
    return EnvironmentProblem(f"does not fit into memory: {needs}; {fits}: --auto takes it, --force goes on as it is")


def as_the_run_began(settings: S, out: Path) -> S:
    """With --resume --auto: what the run's beginning chose to fit, as its config.yaml has it."""
    if not (settings.resume and settings.auto and (out / "config.yaml").is_file()):
        return settings
    before = read_yaml(out / "config.yaml")
    chosen = {name: before[name] for name in PLANNED if name in before and name in type(settings).model_fields}
    return settings.model_copy(update=chosen)


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
