"""The optimiser of a run, its memory, and whether what it left are numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_align.config import TrainSettings
from lowrank_align.errors import EnvironmentProblem, memory_for
from lowrank_align.methods.method import Method


def make_optimizer(method: Method[Any, Any]) -> torch.optim.Optimizer:
    """AdamW, or one of its 8-bit kinds, over every trained role at the rate of its own."""
    s: TrainSettings = method.settings
    groups = [
        {"params": list(method.base.trainable_parameters(role).values()), "lr": rate}
        for role, rate in method.learning_rates().items()
    ]
    options: dict[str, Any] = {
        "betas": (s.adam_beta1, s.adam_beta2), "eps": s.adam_epsilon, "weight_decay": s.weight_decay,
    }  # fmt: skip
    if s.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    if method.base.device.type != "cuda":
        raise EnvironmentProblem(f"--optimizer {s.optimizer} needs a CUDA GPU; use adamw")
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kinds: dict[str, Any] = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit}
    made: torch.optim.Optimizer = kinds[s.optimizer](groups, **options)
    return made


def allocate_moments(optimizer: Any) -> None:
    """The optimiser's state before the first step, within which torch and bitsandbytes would allocate it.

    Memory that runs out there, between two parameters, leaves half an update. A step on zeros at a rate of 0 changes
    nothing. A state that is there, of a resumed run, stays. Raises EnvironmentProblem where it does not fit.
    """
    if optimizer.state:
        return
    places = [(i, j, p) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])]
    with memory_for("for the optimiser's state", "lower --rank, or use --optimizer paged_adamw_8bit on a CUDA GPU"):
        if hasattr(optimizer, "init_state"):  # bitsandbytes'
            for i, j, parameter in places:
                optimizer.init_state(optimizer.param_groups[i], parameter, i, j)
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for _, _, parameter in places:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in optimizer.state.values():
            state["step"].zero_()


def all_finite(weights: Sequence[Tensor]) -> bool:
    """Whether no weight is NaN or infinite."""
    return math.isfinite(float(torch.nn.utils.get_total_norm([weight.detach() for weight in weights])))
