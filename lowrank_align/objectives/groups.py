"""Advantages within a group: the answers of one prompt are each other's baseline, so no value model is needed.

B counts prompts, G the answers of each; scores are (B, G).
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

ScaleKind = Literal["std", "none"]

STD_EPSILON = 1e-4


class GroupAdvantages(NamedTuple):
    """Result of `group_advantages` and `leave_one_out`; no gradient."""

    advantages: Tensor  # (B, G), exactly 0 in a group whose scores are all equal
    without_variance: Tensor  # (B,) bool: such a group teaches nothing


@torch.no_grad()
def group_advantages(scores: Tensor, scale: ScaleKind = "std") -> GroupAdvantages:
    """A_i = (r_i - mean r) / (std r + 1e-4) over the G answers of a prompt; `scale` none: r_i - mean r.

    `scores` (B, G), G at least 2. Shao et al. 2024, arXiv 2402.03300, section 4.1.2; std with G - 1, as in TRL 1.16.
    Without the division (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783) groups that hardly differ weigh less.
    Left out: the std of the whole batch in place of the group's.
    Raises ValueError for an unknown `scale` or a group of one.
    """
    if scale not in get_args(ScaleKind):
        raise ValueError(f"scale: {scale!r} is no scale (known: {', '.join(get_args(ScaleKind))})")
    _check(scores)
    advantages = scores - scores.mean(dim=1, keepdim=True)
    if scale == "std":
        advantages = advantages / (scores.std(dim=1, keepdim=True) + STD_EPSILON)
    return _without_noise(advantages, scores)


@torch.no_grad()
def leave_one_out(scores: Tensor) -> GroupAdvantages:
    """A_i = r_i - mean of the other G - 1 answers' scores = G / (G - 1) (r_i - mean r).

    `scores` (B, G), G at least 2. Ahmadian et al. 2024, arXiv 2402.14740, eq. 8: an unbiased baseline, since it does
    not depend on the answer itself. Raises ValueError for a group of one.
    """
    _check(scores)
    others = (scores.sum(dim=1, keepdim=True) - scores) / (scores.shape[1] - 1)
    return _without_noise(scores - others, scores)


def _check(scores: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: {tuple(scores.shape)}, must be (prompts, answers of each, at least 2)")


def _without_noise(advantages: Tensor, scores: Tensor) -> GroupAdvantages:
    # equal scores less their mean may leave a last digit, which the division would blow up
    equal = scores.max(dim=1).values == scores.min(dim=1).values
    return GroupAdvantages(advantages.masked_fill(equal[:, None], 0.0), equal)
