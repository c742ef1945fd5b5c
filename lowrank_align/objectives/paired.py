"""Losses on comparisons of two completions: reward models (Bradley-Terry), and DPO's, which compare with a reference.

P counts comparisons. Each is between a `first` and a `second` completion, with a `preference` mu in [0, 1] that the
first is better: 1 surely, 0.5 a tie, 0 surely not. Swapping the two and taking 1 - mu changes no loss. A single number
for `preference` or `target_margin` holds for every comparison.

A policy's loss is a function of two `Side`s, the chosen and the rejected, and of its knobs; `by_preference` brings the
labels in. Those without a reference are in `reference_free`, contrastive preference learning in `segments`, and the
table of all of them by name in `paired_losses`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowrank_align.tensors import masked, same_shape


class Outcome(NamedTuple):
    """What the scores of two completions say about a comparison, without gradient; to average over `decided`."""

    chosen: Tensor  # (P,) score of the preferred completion; of the first in a tie
    rejected: Tensor  # (P,) of the other
    margins: Tensor  # (P,) chosen minus rejected
    accuracies: Tensor  # (P,) 1.0 where the margin is above 0, else 0.0; 0.0 in a tie
    decided: Tensor  # (P,) bool, False for ties: nobody is chosen there, so accuracy is undefined


class PairedLoss(NamedTuple):
    """Result of `bradley_terry`; only `loss` carries a gradient, the rest are metrics to average over `decided`."""

    loss: Tensor  # (P,)
    chosen_scores: Tensor  # (P,) of the preferred completion; of the first in a tie
    rejected_scores: Tensor  # (P,) of the other
    margins: Tensor  # (P,) chosen minus rejected
    accuracies: Tensor  # (P,) 1.0 where the margin is above 0, else 0.0; 0.0 in a tie
    decided: Tensor  # (P,) bool, False for ties: nobody is chosen there, so accuracy is undefined


class Side(NamedTuple):
    """What policy and reference say about one completion of each of P comparisons, of at most C tokens."""

    per_token_logps: Tensor  # (P, C) log pi(y_t | x, y_<t)
    mask: Tensor  # (P, C) 1 = the token counts
    ref_per_token_logps: Tensor | None = None  # (P, C) the reference's; None for losses without one

    @property
    def logps(self) -> Tensor:
        """(P,) log pi(y | x), summed over the tokens that count."""
        return masked(self.per_token_logps, self.mask).sum(dim=-1)

    @property
    def per_token_logratios(self) -> Tensor:
        """(P, C) log pi / ref, 0 where the mask is 0. Raises ValueError without a reference."""
        if self.ref_per_token_logps is None:
            raise ValueError("this loss compares with a reference, and there is none (ref_per_token_logps)")
        same_shape(per_token_logps=self.per_token_logps, ref_per_token_logps=self.ref_per_token_logps)
        return masked(self.per_token_logps, self.mask) - masked(self.ref_per_token_logps, self.mask)

    @property
    def logratios(self) -> Tensor:
        """(P,) h = log pi(y | x) / ref(y | x). Raises ValueError without a reference."""
        return self.per_token_logratios.sum(dim=-1)

    @property
    def num_tokens(self) -> Tensor:
        """(P,) int64, tokens that count."""
        return self.mask.bool().sum(dim=-1)

    def per_token_mean(self, sums: Tensor) -> Tensor:
        """(P,) `sums` (P,) over the completion's tokens, divided by their number; 0 for a completion without any."""
        return sums / self.num_tokens.clamp(min=1)

    def at(self, index: Tensor) -> "Side":
        """The completions at `index` (P,), int64."""
        reference = None if self.ref_per_token_logps is None else self.ref_per_token_logps[index]
        return Side(self.per_token_logps[index], self.mask[index], reference)


# ---- reward models


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
    loss = -(preference * logsigmoid(difference) + (1 - preference) * logsigmoid(-difference))
    return PairedLoss(loss, *outcome(score_first, score_second, preference))


def centring(score_first: Tensor, score_second: Tensor, coefficient: float) -> Tensor:
    """Auxiliary loss coefficient * (r_first + r_second)^2 (P,), which pulls scores towards a mean of 0.

    `score_first`, `score_second` (P,). Bradley-Terry leaves a constant of every prompt free; this fixes it
    (Eisenstein et al. 2023, arXiv 2312.09244). TRL's `center_rewards_coefficient`, 0.01 recommended.
    """
    same_shape(score_first=score_first, score_second=score_second)
    return coefficient * (score_first + score_second) ** 2


# ---- policies against a reference; h is the log-ratio, s the logistic function, all results (P,)


def sigmoid(chosen: Side, rejected: Side, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log s(beta (h_w - h_l)). Rafailov et al. 2023, arXiv 2305.18290, eq. 7. ln 2 at policy = reference.

    With `label_smoothing` eps, the share of labels taken to be flipped (below 0.5), the conservative DPO of E.
    Mitchell's note, https://ericmitchell.ai/cdpo.pdf: -(1 - eps) log s(D) - eps log s(-D), D = beta (h_w - h_l); its
    optimum is a finite margin. Left out: divergences other than the reverse KL.
    """
    scaled = beta * (chosen.logratios - rejected.logratios)
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def robust(chosen: Side, rejected: Side, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: [-(1 - eps) log s(D) + eps log s(-D)] / (1 - 2 eps), D = beta (h_w - h_l). May be negative.

    An unbiased estimate of DPO's loss on clean labels, where a share eps (`label_smoothing`, below 0.5) is flipped at
    random. Ray Chowdhury et al. 2024, arXiv 2403.00409. ln 2 at policy = reference.
    """
    scaled = beta * (chosen.logratios - rejected.logratios)
    kept, flipped = (1 - label_smoothing) * logsigmoid(scaled), label_smoothing * logsigmoid(-scaled)
    return -(kept - flipped) / (1 - 2 * label_smoothing)


def ipo(chosen: Side, rejected: Side, *, beta: float) -> Tensor:
    """IPO: (h_w / n_w - h_l / n_l - 1 / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17.

    Log-ratios are averaged over the n tokens, as TRL 1.16 has it after asking the authors. 1 / (4 beta^2) at
    policy = reference.
    """
    difference = chosen.per_token_mean(chosen.logratios) - rejected.per_token_mean(rejected.logratios)
    return (difference - 1 / (2 * beta)) ** 2


def hinge(chosen: Side, rejected: Side, *, beta: float) -> Tensor:
    """relu(1 - beta (h_w - h_l)): the form of Liu et al. 2023, arXiv 2309.06657, after SLiC-HF, arXiv 2305.10425.

    1 at policy = reference. Left out: SLiC's own term for staying near the reference.
    """
    return torch.relu(1 - beta * (chosen.logratios - rejected.logratios))


# ---- labels and rows


def by_preference(
    loss: Callable[[Side, Side], Tensor], first: Side, second: Side, preference: Tensor | float = 1.0
) -> Tensor:
    """mu loss(first, second) + (1 - mu) loss(second, first), (P,): the expected loss if mu is the chance of the label.

    For `sigmoid` the negative log-likelihood of soft labels. A tie (0.5) gives equal shares of both ways round.
    """
    return preference * loss(first, second) + (1 - preference) * loss(second, first)


def outcome(first: Tensor, second: Tensor, preference: Tensor | float = 1.0) -> Outcome:
    """Which of two scores (P,) is of the preferred completion, and whether it is the higher."""
    first, second = first.detach(), second.detach()
    preference = torch.as_tensor(preference, device=first.device).expand_as(first)
    chosen = torch.where(preference >= 0.5, first, second)
    rejected = torch.where(preference >= 0.5, second, first)
    decided = preference != 0.5
    right = masked((chosen > rejected).to(first.dtype), decided)
    return Outcome(chosen, rejected, chosen - rejected, right, decided)


def mean_per_row(per_comparison: Tensor, row_of_comparison: Tensor, num_rows: int) -> Tensor:
    """Mean over the comparisons of each row: (num_rows,), 0 for a row without any.

    `per_comparison` (P,), `row_of_comparison` (P,) int64 in [0, num_rows). A ranking of K completions is K (K - 1) / 2
    comparisons but one element of the batch (InstructGPT, arXiv 2203.02155, section 3.5): else large K dominates.
    """
    same_shape(per_comparison=per_comparison, row_of_comparison=row_of_comparison)
    sums = per_comparison.new_zeros(num_rows).index_add(0, row_of_comparison, per_comparison)
    return sums / torch.bincount(row_of_comparison, minlength=num_rows).clamp(min=1)
