"""The loss on whole rankings: the likelihood of an order of K completions."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, groupby

import torch
from torch import Tensor

MOST_TIED = 12  # of m tied completions all 2^m subsets are looked at
TOO_MANY_TIES = f"more than {MOST_TIED} answers of one rank"


def plackett_luce(scores: Tensor, ranks: Sequence[float]) -> Tensor:
    """Negative log-likelihood of one ranking under a Plackett-Luce model of its scores; () tensor.

        -log p = sum_k [ log sum_{j >= k} e^{s_j} - s_k ],   1, 2, ... the completions from best to worst

    `scores` (K,); `ranks` K numbers, 1 is best. For K = 2 it is Bradley-Terry. InstructGPT-style reward models with it:
    arXiv 2305.18290, appendix A.3, which also has DPO's form: s = beta log pi / ref.

    Equal ranks are ties: the loss is the mean of -log p over all orders that the ranks allow, so that a tie of two is
    Bradley-Terry's at a preference of 1/2. Raises ValueError for more than 12 completions of one rank.
    Left out: Breslow's and Efron's approximations of ties, which count a tie of two more than once.
    """
    if scores.shape != (len(ranks),):
        raise ValueError(f"shapes differ: scores {tuple(scores.shape)}, {len(ranks)} ranks")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    groups = [list(group) for _, group in groupby(order, key=lambda i: ranks[i])]
    if most_tied(ranks) > MOST_TIED:
        raise ValueError(f"ranks: {TOO_MANY_TIES}")
    loss, worse = -scores.sum(), list[int]()
    for tied in reversed(groups):
        for left in range(1, len(tied) + 1):  # so many of them are still to be placed: each such subset is as likely
            at_stake = torch.tensor([[*some, *worse] for some in combinations(tied, left)], device=scores.device)
            loss = loss + scores[at_stake].logsumexp(dim=1).mean()
        worse += tied
    return loss


def most_tied(ranks: Sequence[float]) -> int:
    """How many completions have the commonest rank; 0 where there are none."""
    return max(Counter(ranks).values(), default=0)


def whole_orders(per_row: Tensor, scores: Tensor, row_of: Tensor, ranks: Sequence[Sequence[float]]) -> Tensor:
    """`per_row` (R,) with the loss of every ranking of more than two completions replaced by `plackett_luce`'s.

    A pair keeps its loss, which is the same but for soft labels and margins. `scores` (N,) of all completions, `row_of`
    (N,) their rows, `ranks` of each row.
    """
    rows = [
        plackett_luce(scores[row_of == r], of_row) if len(of_row) > 2 else per_row[r] for r, of_row in enumerate(ranks)
    ]
    return torch.stack(rows)
