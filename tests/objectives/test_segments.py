"""Contrastive preference learning by hand, its regulariser, and where it is DPO."""

import math

import pytest
import torch

from lowrank_align.objectives.paired import Side, by_preference, sigmoid
from lowrank_align.objectives.segments import cpl, cpl_kl, discounted_sum


def one_token(logp: float) -> Side:
    return Side(torch.tensor([[logp]], dtype=torch.float64), torch.tensor([[True]]))


def test_discounted_sum_by_hand():
    """Three of the assistant's tokens with a user's between them: 1 + 0.5 * 2 + 0.25 * 4 = 3; the 100 does not count.

    The user's token does not move the clock; a row that starts with one starts the clock behind it: 1 + 0.5 * 4 = 3.
    """
    values = torch.tensor([[1.0, 2, 100, 4], [100, 1, 100, 4]])
    mask = torch.tensor([[True, True, False, True], [False, True, False, True]])
    assert discounted_sum(values, mask, 0.5).tolist() == [3, 3]
    assert discounted_sum(values, mask, 1.0).tolist() == [7, 5]


@pytest.mark.parametrize(
    ("lam", "p", "expected"), [(1, 0.5, math.log(2)), (1, 0.01, math.log(2)), (0.5, 0.5, 0.8814), (0.5, 0.01, 2.3979)]
)
def test_the_regulariser_by_hand(lam, p, expected):
    """The same two actions of probability p preferred each way once, alpha 1: both losses are -log s((1 - lam) log p).

    lam 1: ln 2, whether p is 0.5 or 0.01. lam 1/2: log(1 + p^-1/2) = log(1 + 1.41421) = 0.8814; log(1 + 10) = 2.3979.
    So below lam = 1 actions that the data do not have cost something.
    """
    first, second = one_token(math.log(p)), one_token(math.log(p))
    knobs = {"cpl_alpha": 1.0, "cpl_lambda": lam, "cpl_gamma": 1.0}
    both = (cpl(first, second, **knobs) + cpl(second, first, **knobs)) / 2
    assert both.item() == pytest.approx(expected, abs=5e-5)


def test_cpl_by_hand():
    """alpha 2, lambda 1/2, gamma 1/2. Better: 2 (-1 - 2 / 2) = -4; worse: 2 * -3 = -6, halved -3: -log s(-1).

    A tie (mu = 1/2) is half of that and half of the other way round: -6 - (-4) / 2 = -4, -log s(-4).
    """
    better = Side(torch.tensor([[-1.0, -9, -2]]), torch.tensor([[True, False, True]]))
    worse = Side(torch.tensor([[-3.0]]), torch.tensor([[True]]))
    knobs = {"cpl_alpha": 2.0, "cpl_lambda": 0.5, "cpl_gamma": 0.5}
    forward, backward = math.log(1 + math.e), math.log(1 + math.exp(4))
    assert cpl(better, worse, **knobs).item() == pytest.approx(forward)
    tie = by_preference(lambda a, b: cpl(a, b, **knobs), better, worse, 0.5)
    assert tie.item() == pytest.approx((forward + backward) / 2)


def test_cpl_kl_is_dpo():
    """lambda = gamma = 1, alpha = beta, one answer a segment: the same loss and the same gradient, at every label."""
    generator = torch.Generator().manual_seed(5)
    logps, reference = (-3 * torch.rand(2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 6, 4, generator=generator) < 0.7
    mu = torch.rand(6, generator=generator, dtype=torch.float64)
    found = []
    for loss in (
        lambda a, b: sigmoid(a, b, beta=0.3),
        lambda a, b: cpl_kl(a, b, cpl_alpha=0.3, cpl_lambda=1.0, cpl_gamma=1.0),
    ):
        leaf = logps.clone().requires_grad_()
        value = by_preference(loss, *(Side(leaf[i], mask[i], reference[i]) for i in (0, 1)), mu)
        value.sum().backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].abs().max() > 0.05


def test_cpl_raises_the_chosen_ones_likelihood_more():
    """d loss / d log pi is -alpha s(-D) for the better and +lambda alpha s(-D) for the worse: here a quarter."""
    sides = [one_token(-1.0), one_token(-1.0)]
    leaves = [one.per_token_logps.requires_grad_() for one in sides]
    cpl(*sides, cpl_alpha=1.0, cpl_lambda=0.25, cpl_gamma=1.0).sum().backward()
    pull = 1 / (1 + math.exp(-0.75))  # D = -1 + 1/4
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[0].grad.item() == pytest.approx(-pull)
    assert leaves[1].grad.item() == pytest.approx(pull / 4)
