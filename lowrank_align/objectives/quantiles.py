"""Answers sorted into quantiles of their score, as Quark does."""

import torch
from torch import Tensor


def quantiles(scores: Tensor, count: int) -> Tensor:
    """(M,) int64 in 1..`count`: the quantile of each score (M,), `count` the best (Quark, arXiv 2205.13636, step 2).

    Floor of `count` x rank / M, the rank from 0. Equal scores have one rank, the mean of theirs, so that no two texts
    contradict each other; the best ones are always in the top quantile, unless all are equal.
    """
    lower = (scores[:, None] > scores[None, :]).sum(dim=1)
    equal = (scores[:, None] == scores[None, :]).sum(dim=1)
    rank = lower + (equal - 1) / 2
    found = 1 + torch.floor(count * rank / len(scores)).long()
    is_best = scores == scores.max()
    return found if is_best.all() else found.masked_fill(is_best, count)
