"""Losses on pairs that know no reference: of one `Side` for the chosen and one for the rejected completion, each (P,).

p is the policy's probability; |y| the number of y's tokens that count. Means are over the tokens of an answer, so that
every answer weighs the same whatever its length.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lowrank_align.objectives.paired import Side
from lowrank_align.tensors import masked

NEARLY_SURE = -1e-6  # a log-probability; above it log(1 - p) is rounding error in fp32, and infinite at p = 1


def nll(chosen: Side, rejected: Side) -> Tensor:
    """-log pi(y_w | x) / |y_w|: the chosen alone. `rejected` is not used.

    By itself it is Preferred-FT (arXiv 2305.18290, section 6), in a sum the term that keeps the chosen answers likely
    (arXiv 2404.19733). SFT and TRL's `sft` average over all tokens of the batch instead: the same where the
    answers are of one length.
    """
    return -chosen.per_token_mean(chosen.logps)


def unlikelihood(chosen: Side, rejected: Side, *, unlikelihood_alpha: float = 1.0) -> Tensor:
    """-[log pi(y_w | x) - alpha log pi(y_l | x)], summed over tokens: the baseline of arXiv 2305.18290, section 6.

    Without bound below and without DPO's weight s(r_l - r_w), so it degenerates; it is here to show that.
    """
    return -(chosen.logps - unlikelihood_alpha * rejected.logps)


def token_unlikelihood(chosen: Side, rejected: Side, *, unlikelihood_alpha: float = 1.0) -> Tensor:
    """-1/|y_w| sum_t log p(y_w,t) - alpha/|y_l| sum_t log(1 - p(y_l,t)): likelihood of the chosen answer's tokens and
    unlikelihood of the rejected one's, each given the true tokens before it.

    Welleck et al. 2019, arXiv 1908.04319, with the rejected tokens as negative candidates; the baseline SFT-U
    of chain of hindsight (arXiv 2302.02676). Bounded below by 0. A rejected token of p > 1 - 1e-6 has no gradient.
    """
    unlikely = log_1_minus_exp(masked(rejected.per_token_logps, rejected.mask))
    per_token = masked(unlikely, rejected.mask).sum(dim=-1)
    return nll(chosen, rejected) - unlikelihood_alpha * rejected.per_token_mean(per_token)


def simpo(chosen: Side, rejected: Side, *, beta: float, simpo_gamma: float) -> Tensor:
    """SimPO: -log s(beta log pi(y_w) / |y_w| - beta log pi(y_l) / |y_l| - gamma). Meng et al. 2024, arXiv 2405.14734.

    Its eq. 6. beta is about 2 there, gamma / beta about 0.25 to 0.5.
    """
    difference = chosen.per_token_mean(chosen.logps) - rejected.per_token_mean(rejected.logps)
    return -logsigmoid(beta * difference - simpo_gamma)


def cpo(chosen: Side, rejected: Side, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """CPO: -log s(beta log pi(y_w) - beta log pi(y_l)) + alpha nll. Xu et al. 2024, arXiv 2401.08417.

    The likelihood is a mean over the answer's tokens, as in the authors' code (there over the batch's).
    """
    return -logsigmoid(beta * (chosen.logps - rejected.logps)) + cpo_alpha * nll(chosen, rejected)


def orpo(chosen: Side, rejected: Side, *, beta: float) -> Tensor:
    """ORPO: nll - beta log s(log odds(y_w) - log odds(y_l)), odds = p / (1 - p) with p = exp(log pi(y) / |y|).

    Hong et al. 2024, arXiv 2403.07691, eq. 6-7; `beta` is the paper's lambda. Left out: the authors' likelihood covers
    the prompt's tokens too, as TRL's does; here the answer's alone.
    """
    mean_chosen, mean_rejected = chosen.per_token_mean(chosen.logps), rejected.per_token_mean(rejected.logps)
    log_odds = (mean_chosen - mean_rejected) - (log_1_minus_exp(mean_chosen) - log_1_minus_exp(mean_rejected))
    return nll(chosen, rejected) - beta * logsigmoid(log_odds)


def log_1_minus_exp(logp: Tensor) -> Tensor:
    """log(1 - e^logp) for logp <= 0 (any shape), accurate on both ends and finite at 0.

    Branches at -ln 2, after Maechler 2012 (https://cran.r-project.org/package=Rmpfr, vignette log1mexp).
    """
    logp = logp.clamp(max=NEARLY_SURE)
    return torch.where(logp < -0.6931471805599453, torch.log1p(-logp.exp()), torch.log(-torch.expm1(logp)))
