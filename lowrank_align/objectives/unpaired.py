"""The loss on single completions that are good or bad."""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_align.tensors import same_shape


class UnpairedLoss(NamedTuple):
    """Result of `kto`."""

    loss: Tensor  # (N,)
    rewards: Tensor  # (N,) beta times the log-ratio, without gradient


def kto(
    logratios: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLoss:
    """Kahneman-Tversky optimisation, per completion. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7-8.

        good: lambda_D (1 - s(beta (h - z0))),   bad: lambda_U (1 - s(beta (z0 - h)))

    `logratios` (N,) h = log pi / ref, `desirable` (N,) bool, `kl` z0 >= 0 in nats, from `reference_point`. At policy =
    reference with z0 = 0 every loss is half its weight. The value function's constant lambda_y is added, so that a loss
    is between 0 and its weight, as in the authors' code and TRL 1.16.
    """
    same_shape(logratios=logratios, desirable=desirable)
    signs = torch.where(desirable, 1.0, -1.0).to(logratios.dtype)
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(logratios.dtype)
    return UnpairedLoss(weights * torch.sigmoid(-beta * signs * (logratios - kl)), beta * logratios.detach())


def reference_point(mismatched_logratios: Tensor) -> Tensor:
    """z0 = max(0, mean of log pi(y' | x) / ref(y' | x)), () tensor without gradient: how far the policy has gone.

    `mismatched_logratios` (N,) of completions y' under prompts x that they do not belong to (arXiv 2402.01306, section
    4.2): a biased estimate of KL(policy || reference) that needs no sampling.
    """
    return mismatched_logratios.detach().mean().clamp(min=0)
