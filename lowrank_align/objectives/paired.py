"""Losses on comparisons of two completions: reward models (Bradley-Terry) and DPO with its relatives.

P counts comparisons. Each is between a `first` and a `second` completion, with a `preference` mu in [0, 1] that the
first is better: 1 surely, 0.5 a tie, 0 surely not. Swapping the two and taking 1 - mu changes no loss. A single number
for `preference` or `target_margin` holds for every comparison.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowrank_align.tensors import masked, same_shape

DPOKind = Literal["sigmoid", "ipo", "hinge"]


class PairedLoss(NamedTuple):
    """Result of `bradley_terry`; only `loss` carries a gradient, the rest are metrics to average over `decided`."""

    loss: Tensor  # (P,)
    chosen_scores: Tensor  # (P,) of the preferred completion; of the first in a tie
    rejected_scores: Tensor  # (P,) of the other
    margins: Tensor  # (P,) chosen minus rejected
    accuracies: Tensor  # (P,) 1.0 where the margin is above 0, else 0.0; 0.0 in a tie
    decided: Tensor  # (P,) bool, False for ties: nobody is chosen there, so accuracy is undefined


class DPOLoss(NamedTuple):
    """Result of `dpo`; only `loss` carries a gradient, the rest are metrics to average over `decided`."""

    loss: Tensor  # (P,)
    chosen_rewards: Tensor  # (P,) implicit reward beta * logratio of the preferred completion; of the first in a tie
    rejected_rewards: Tensor  # (P,) of the other
    margins: Tensor  # (P,) chosen minus rejected
    accuracies: Tensor  # (P,) 1.0 where the margin is above 0, else 0.0; 0.0 in a tie
    decided: Tensor  # (P,) bool, False for ties: nobody is chosen there, so accuracy is undefined


def bradley_terry(
    score_first: Tensor,
    score_second: Tensor,
    preference: Tensor | float = 1.0,
    target_margin: Tensor | float = 0.0,
) -> PairedLoss:
    """Negative log-likelihood of the preferences under a Bradley-Terry model of the scores, per comparison.

    With D = score_first - score_second and m the target margin:

        D' = D - (2 mu - 1) m,   loss = -[mu log s(D') + (1 - mu) log s(-D')]

    All arguments are (P,). mu = 1 gives -log s(r_w - r_l - m) exactly (Llama 2, arXiv 2307.09288, eq. 2; without m
    InstructGPT, arXiv 2203.02155). A soft label asks for a part of the margin in its preferred direction: the loss is
    least at D = log(mu / (1 - mu)) + (2 mu - 1) m. A tie asks for none: m has no effect and the loss is least at D = 0.
    Left out: Llama 2's fixed margins by rating (a margin is data here); models of ties with a parameter of their own
    (Rao-Kupper, Davidson).
    """
    same_shape(score_first=score_first, score_second=score_second)
    difference = score_first - score_second - (2 * preference - 1) * target_margin
    return PairedLoss(_cross_entropy(difference, preference), *_outcome(score_first, score_second, preference))


def centring(score_first: Tensor, score_second: Tensor, coefficient: float) -> Tensor:
    """Auxiliary loss coefficient * (r_first + r_second)^2 (P,), which pulls scores towards a mean of 0.

    `score_first`, `score_second` (P,). Bradley-Terry leaves a constant of every prompt free; this fixes it
    (Eisenstein et al. 2023, arXiv 2312.09244). TRL's `center_rewards_coefficient`, 0.01 recommended.
    """
    same_shape(score_first=score_first, score_second=score_second)
    return coefficient * (score_first + score_second) ** 2


def dpo(
    logps_first: Tensor,
    logps_second: Tensor,
    ref_logps_first: Tensor,
    ref_logps_second: Tensor,
    num_tokens_first: Tensor,
    num_tokens_second: Tensor,
    beta: float,
    loss: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
    preference: Tensor | float = 1.0,
) -> DPOLoss:
    """Direct preference optimisation and two relatives, per comparison; all tensors (P,), `logps` summed over tokens.

    With the log-ratios h = logps - ref_logps, D = h_first - h_second, and mu' = mu (1 - eps) + (1 - mu) eps, where
    eps is `label_smoothing`, the share of labels taken to be flipped (below 0.5):

    sigmoid: -[mu' log s(beta D) + (1 - mu') log s(-beta D)]. Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with eps
        the conservative DPO of E. Mitchell's note, https://ericmitchell.ai/cdpo.pdf.
    ipo: (h_first / n_first - h_second / n_second - (2 mu' - 1) / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036,
        eq. 17, with log-ratios averaged over the n tokens, as TRL 1.16 has it after asking the authors. For mu' < 1 the
        gradient is that of the two labels' losses weighted by mu' and 1 - mu', and the loss can still reach 0.
    hinge: mu' relu(1 - beta D) + (1 - mu') relu(1 + beta D). The form of Liu et al. 2023, arXiv 2309.06657 (after
        SLiC-HF, arXiv 2305.10425).

    At policy = reference: ln 2, ((2 mu' - 1) / (2 beta))^2 and 1. Rewards are beta h for all three.
    Left out: other divergences than the reverse KL, SLiC's own term for staying near the reference, losses without one.
    Raises ValueError for an unknown `loss`.
    """
    same_shape(
        logps_first=logps_first,
        logps_second=logps_second,
        ref_logps_first=ref_logps_first,
        ref_logps_second=ref_logps_second,
        num_tokens_first=num_tokens_first,
        num_tokens_second=num_tokens_second,
    )
    logratio_first, logratio_second = logps_first - ref_logps_first, logps_second - ref_logps_second
    scaled = beta * (logratio_first - logratio_second)
    smoothed = preference * (1 - label_smoothing) + (1 - preference) * label_smoothing
    if loss == "sigmoid":
        per_comparison = _cross_entropy(scaled, smoothed)
    elif loss == "hinge":
        per_comparison = smoothed * torch.relu(1 - scaled) + (1 - smoothed) * torch.relu(1 + scaled)
    elif loss == "ipo":
        # a completion without a token has a log-ratio of 0: any divisor but 0 will do
        mean_first = logratio_first / num_tokens_first.clamp(min=1)
        mean_second = logratio_second / num_tokens_second.clamp(min=1)
        per_comparison = (mean_first - mean_second - (2 * smoothed - 1) / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss: {loss!r} is no DPO loss (known: {', '.join(get_args(DPOKind))})")
    return DPOLoss(per_comparison, *_outcome(beta * logratio_first, beta * logratio_second, preference))


def mean_per_row(per_comparison: Tensor, row_of_comparison: Tensor, num_rows: int) -> Tensor:
    """Mean over the comparisons of each row: (num_rows,), 0 for a row without any.

    `per_comparison` (P,), `row_of_comparison` (P,) int64 in [0, num_rows). A ranking of K completions is K (K - 1) / 2
    comparisons but one element of the batch (InstructGPT, arXiv 2203.02155, section 3.5): else large K dominates.
    """
    same_shape(per_comparison=per_comparison, row_of_comparison=row_of_comparison)
    sums = per_comparison.new_zeros(num_rows).index_add(0, row_of_comparison, per_comparison)
    return sums / torch.bincount(row_of_comparison, minlength=num_rows).clamp(min=1)


def _cross_entropy(difference: Tensor, preference: Tensor | float) -> Tensor:
    """-[mu log s(difference) + (1 - mu) log s(-difference)], (P,)."""
    return -(preference * logsigmoid(difference) + (1 - preference) * logsigmoid(-difference))


def _outcome(
    first: Tensor, second: Tensor, preference: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """chosen, rejected, margins, accuracies, decided (P,) each: the last five fields of both results."""
    first, second = first.detach(), second.detach()
    preference = torch.as_tensor(preference, device=first.device).expand_as(first)
    chosen = torch.where(preference >= 0.5, first, second)
    rejected = torch.where(preference >= 0.5, second, first)
    decided = preference != 0.5
    return chosen, rejected, chosen - rejected, masked((chosen > rejected).to(first.dtype), decided), decided
