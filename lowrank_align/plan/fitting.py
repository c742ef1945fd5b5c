"""Whether a workload fits into a card, and the nearest one that does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lowrank_align.architecture import Architecture
from lowrank_align.plan.prediction import GIB, Prediction, predict
from lowrank_align.plan.workload import Workload, rolls_out, trains

CARDS_GIB = (6, 8, 12, 16, 24, 48)  # what gaming and workstation cards have
SHORTEST_TOKENS = 128  # the planner suggests no shorter length
TIGHT = 0.05  # of the budget

AtLength = Callable[[Workload, int], Workload | None]  # the workload of rows of at most so many tokens; None: no rows


@dataclass(frozen=True)
class Plan:
    """Whether a workload fits into a budget, and the nearest one that does."""

    asked: Workload
    prediction: Prediction
    budget_bytes: int
    chosen: Workload | None  # the same where it fits, None where nothing does
    chosen_prediction: Prediction | None
    changes: dict[str, Any] = field(default_factory=dict)  # settings in which chosen differs, by their names
    least_bytes: int = 0  # the peak of the smallest workload that was tried
    rough: bool = False  # experts or recurrent layers, which keep more of a pass than is counted

    @property
    def fits(self) -> bool:
        return self.prediction.total_bytes <= self.budget_bytes

    @property
    def is_tight(self) -> bool:
        """Whether what is chosen leaves less than a twentieth: the plan itself is good to about a tenth."""
        chosen = self.chosen_prediction
        return chosen is not None and chosen.total_bytes > (1 - TIGHT) * self.budget_bytes


def fit(architecture: Architecture, work: Workload, budget_bytes: int, at_length: AtLength | None = None) -> Plan:
    """The workload as asked where it fits, else the nearest that does: first what costs least in speed, length last.

    `at_length` knows what a shorter `max_length` makes of the rows that are really there; without it they are taken to
    become shorter in prompt and completion alike.
    """
    prediction = predict(architecture, work)
    least = prediction.total_bytes
    rough = bool(architecture.num_experts or architecture.needs_flat_rows)
    for candidate in _nearest_first(work, at_length or shortened):
        found = predict(architecture, candidate)
        least = min(least, found.total_bytes)
        if found.total_bytes <= budget_bytes:
            changes = _changes(work, candidate)
            return Plan(work, prediction, budget_bytes, candidate, found, changes, least, rough)
    return Plan(work, prediction, budget_bytes, None, None, {}, least, rough)


def cards(architecture: Architecture, work: Workload) -> dict[int, Plan]:
    """The plan for every usual size of card, by its GiB."""
    return {gib: fit(architecture, work, gib * GIB) for gib in CARDS_GIB}


def _nearest_first(work: Workload, at_length: AtLength) -> Iterator[Workload]:
    """Ever smaller workloads: rollouts at once, rows at once, recomputation, 8-bit states, and shorter rows at last."""
    yield work
    training = trains(work.method)
    lengths = [work.max_length]
    while lengths[-1] // 2 >= SHORTEST_TOKENS:
        lengths.append(lengths[-1] // 2)
    steps = [(work.gradient_checkpointing, work.optimizer)]
    steps += [(True, work.optimizer)] if training and not work.gradient_checkpointing else []
    if training and work.device == "gpu" and work.optimizer == "adamw":
        steps += [(True, "adamw_8bit")]
    for length in lengths:
        rows_there = work if length == work.max_length else at_length(work, length)
        if rows_there is None:
            return
        for checkpointing, optimizer in steps:
            for rows in _halved(work.micro_batch_size):
                for rollouts in _halved(work.rollout_batch_size) if rolls_out(work.method) else [1]:
                    yield replace(
                        rows_there, micro_batch_size=rows, gradient_checkpointing=checkpointing,
                        optimizer=optimizer, rollout_batch_size=rollouts,
                    )  # fmt: skip


def shortened(work: Workload, max_length: int) -> Workload:
    """The same with rows of at most `max_length` tokens, prompt and completion cut alike."""
    share = max_length / work.max_length
    if share >= 1:
        return work
    completion = max(1, int(work.completion_tokens * share))
    return replace(
        work,
        completion_tokens=completion,
        prompt_tokens=max(1, max_length - completion),
        max_new_tokens=min(work.max_new_tokens, completion) if work.max_new_tokens else 0,
        max_length=max_length,
    )


def _halved(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _changes(asked: Workload, chosen: Workload) -> dict[str, Any]:
    names = ("micro_batch_size", "rollout_batch_size", "gradient_checkpointing", "optimizer", "max_length")
    found = {name: getattr(chosen, name) for name in names if getattr(chosen, name) != getattr(asked, name)}
    if asked.max_new_tokens != chosen.max_new_tokens:
        found["max_new_tokens"] = chosen.max_new_tokens
    return found
