"""Masked sums and statistics, KL estimators, generalised advantage estimation and reductions with names.

Everywhere N counts sequences and T (or C) tokens; a mask is bool or 0/1 and 1 means that the token counts. Whatever
stands under a 0, infinities and NaN included, reaches neither a result nor a gradient.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]
Reduction = Literal["token_mean", "sequence_mean", "sequence_mean_token_sum"]

WHITEN_EPSILON = 1e-8


class Advantages(NamedTuple):
    """Result of `gae`; both are 0 where the mask is 0 and carry no gradient."""

    advantages: Tensor  # (N, T), not whitened
    returns: Tensor  # (N, T), advantages + values: what the value model learns


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` (any shape) where `mask` (same shape) is 1, over `dim` or over everything."""
    return masked(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` (any shape) where `mask` (same shape) is 1, over `dim` or over everything.

    Where nothing counts the mean is 0 with a gradient of 0, not NaN.
    """
    return masked_sum(x, mask, dim) / mask.bool().sum(dim=dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance (divided by n - 1) of all n elements of `x` whose `mask` (same shape) is 1; () tensor.

    0 for n < 2, where the unbiased variance is undefined (TRL raised there or divided by zero).
    """
    # masked before the mean is taken off: squaring an infinity at a pad would make its zero gradient NaN
    deviation = masked(x, mask) - masked_mean(x, mask)
    return masked_sum(deviation**2, mask) / (mask.bool().sum() - 1).clamp(min=1)


def whiten(x: Tensor, mask: Tensor, center: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all elements of `x` whose `mask` (same shape) is 1; 0 at the others.

    Without `center` the mean is added back: only the scale changes, which suits rewards. The variance is the unbiased
    one, as in TRL's `masked_whiten` (up to 1.12; later TRL has no PPO); the code of Huang et al. 2024 (arXiv
    2403.17031) takes the biased one. Unlike TRL's, the result is already 0 at the padding.
    Left out: statistics are this call's own, not gathered over processes.
    """
    mean = masked_mean(x, mask)
    whitened = (masked(x, mask) - mean) * torch.rsqrt(masked_var(x, mask) + WHITEN_EPSILON)
    return masked(whitened if center else whitened + mean, mask)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: KLKind) -> Tensor:
    """Estimate of KL(policy || reference) per token, from tokens that the policy sampled.

    With d = logps - ref_logps, both (N, T) (any equal shapes will do):
    k1 = d: unbiased, may be negative;  k2 = d^2 / 2: biased, low variance;
    k3 = exp(-d) - 1 + d: unbiased, never negative.
    Source: J. Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html. His r is exp(-d).

    Raises ValueError for an unknown `kind`.
    """
    same_shape(logps=logps, ref_logps=ref_logps)
    d = logps - ref_logps
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d  # expm1: near d = 0 exp(-d) - 1 would lose every digit
    raise ValueError(f"kind: {kind!r} is no KL estimator (known: {', '.join(get_args(KLKind))})")


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   return_t = A_t + V_t

    `rewards`, `values`, `mask`: (N, T). t + 1 is the next token that counts: a completion ends at its last one, beyond
    which V and A are 0, and tokens masked in between are stepped over.
    Left out: bootstrapping from a value after a cut completion; one that was cut ends there, as in TRL.
    """
    same_shape(rewards=rewards, values=values, mask=mask)
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_advantage = torch.where(mask[:, t], advantages[:, t], next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return Advantages(masked(advantages, mask), masked(advantages + values, mask))


def reduce(per_token: Tensor, mask: Tensor, how: Reduction, normaliser: Tensor | float | None = None) -> Tensor:
    """One number from `per_token` (N, T) under `mask` (N, T).

    token_mean: sum over all tokens / number of tokens (every token weighs the same; the losses of SFT, PPO and DAPO).
    sequence_mean: mean over each sequence's tokens, summed / number of sequences that have any (GRPO's paper).
    sequence_mean_token_sum: sum over all tokens / number of sequences that have any (KL and rewards of a completion).

    `normaliser` replaces the divisor: give the count over the whole accumulated batch, and the results of its
    micro-batches add up to what the batch in one piece gives. A count of 0 gives 0 with a gradient of 0.
    Raises ValueError for an unknown `how`.
    """
    if how not in get_args(Reduction):
        raise ValueError(f"how: {how!r} is no reduction (known: {', '.join(get_args(Reduction))})")
    if normaliser is None:
        counted = mask.bool() if how == "token_mean" else mask.bool().any(dim=-1)
        normaliser = counted.sum()
    divisor = torch.as_tensor(normaliser, device=per_token.device)
    summed = masked_mean(per_token, mask, -1).sum() if how == "sequence_mean" else masked_sum(per_token, mask)
    return summed / divisor.masked_fill(divisor == 0, 1)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (any shape) with 0 wherever `mask` (same shape) is 0; not x * mask, which turns infinities into NaN."""
    same_shape(x=x, mask=mask)
    return x.masked_fill(~mask.bool(), 0.0)


def same_shape(**tensors: Tensor) -> None:
    """ValueError unless all have one shape: (N, 1) minus (N,) would quietly broadcast to (N, N)."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {shapes}")
