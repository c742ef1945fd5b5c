"""Contrastive preference learning: preferences over segments of conversations, by regret (arXiv 2310.13639).

A segment is a conversation, or the end of one: its actions are the assistant's tokens (where the mask is 1), everything
else is state. The two segments of a comparison may start from different states.

The model behind it is that people prefer the segment with less regret, p = e^{S+} / (e^{S+} + e^{S-}) with S the
discounted sum of the optimal advantage, and that A* = alpha log pi*: so pi is learnt without A, r or RL.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from lowrank_align.objectives.paired import Side
from lowrank_align.tensors import masked


def discounted_sum(per_token: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_t gamma^t x_t, (P,), t = 0, 1, ... counting the tokens that count alone.

    `per_token` (P, C), `mask` (P, C). What lies between two actions, a user's turn, does not move the clock.
    """
    clock = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return (masked(per_token, mask) * gamma**clock).sum(dim=-1)


def cpl(chosen: Side, rejected: Side, *, cpl_alpha: float, cpl_lambda: float, cpl_gamma: float) -> Tensor:
    """-log s(S_w - lambda S_l), S = sum_t gamma^t alpha log pi(a_t | s_t). Hejna et al. 2023, arXiv 2310.13639, eq. 5.

    (P,). 0 < lambda <= 1 multiplies the worse segment's sum (the conservative form of the paper's section 3.2): at
    lambda = 1 only the difference counts, below it the likelihood of the chosen segment's actions must rise too.
    Left out: the behaviour cloning with which the paper starts (`sft` does that).
    """
    better = discounted_sum(chosen.per_token_logps, chosen.mask, cpl_gamma)
    worse = discounted_sum(rejected.per_token_logps, rejected.mask, cpl_gamma)
    return -logsigmoid(cpl_alpha * (better - cpl_lambda * worse))


def cpl_kl(chosen: Side, rejected: Side, *, cpl_alpha: float, cpl_lambda: float, cpl_gamma: float) -> Tensor:
    """CPL with log pi / ref in place of log pi (its KL-constrained form, arXiv 2310.13639, appendix); (P,).

    With lambda = gamma = 1 and one answer a segment this *is* DPO with beta = alpha.
    """
    better = discounted_sum(chosen.per_token_logratios, chosen.mask, cpl_gamma)
    worse = discounted_sum(rejected.per_token_logratios, rejected.mask, cpl_gamma)
    return -logsigmoid(cpl_alpha * (better - cpl_lambda * worse))
