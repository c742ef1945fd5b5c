"""Losses on single completions: supervised fine-tuning."""

from typing import NamedTuple

from torch import Tensor

from lowrank_align.tensors import masked


class CompletionLoss(NamedTuple):
    """Result of `nll`."""

    loss: Tensor  # (N, C) in nats per token, 0 where the mask is 0
    logps: Tensor  # (N,) log-probability of the whole completion
    num_tokens: Tensor  # (N,) int64, tokens that count


def nll(per_token_logps: Tensor, completion_mask: Tensor) -> CompletionLoss:
    """Negative log-likelihood, -log pi(y_t | x, y_<t), of each completion token that counts.

    `per_token_logps` (N, C), `completion_mask` (N, C). The loss of supervised fine-tuning, as in InstructGPT's first
    step (arXiv 2203.02155); divide the sum by the number of tokens of the accumulated batch.
    Left out: label smoothing, weights per token.
    """
    logps = masked(per_token_logps, completion_mask)
    return CompletionLoss(loss=-logps, logps=logps.sum(dim=-1), num_tokens=completion_mask.bool().sum(dim=-1))
