"""Plackett-Luce by hand, with ties, and where it is Bradley-Terry."""

import math
from itertools import permutations

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.objectives.paired import bradley_terry
from lowrank_align.objectives.ranked import most_tied, plackett_luce, whole_orders


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_by_hand():
    """Weights e^s of 3, 2, 1. In this order p = 3/6 * 2/3 = 1/3; backwards p = 1/6 * 2/5 = 1/15."""
    scores = tensor(math.log(3), math.log(2), 0)
    assert plackett_luce(scores, [1, 2, 3]).item() == pytest.approx(math.log(3))
    assert plackett_luce(scores, [3, 2, 1]).item() == pytest.approx(math.log(15))
    # the order of the completions does not matter, and ranks need not be 1, 2, 3
    assert plackett_luce(scores[[2, 0, 1]], [9, 0.5, 4]).item() == pytest.approx(math.log(3))


def test_equal_scores_make_every_order_alike():
    """K = 4: p = 1/4!."""
    assert plackett_luce(tensor(5, 5, 5, 5), [2, 4, 1, 3]).item() == pytest.approx(math.log(24))


def test_ties_by_hand():
    """Weights 3, 2, 1, the first two tied for the best: orders 1 2 3 with p = 1/3, and 2 1 3 with p = 2/6 * 3/4 = 1/4.

    The mean of -log p: (ln 3 + ln 4) / 2. Last two tied: 1 2 3 with 1/3, 1 3 2 with 3/6 * 1/3 = 1/6: (ln 3 + ln 6) / 2.
    """
    scores = tensor(math.log(3), math.log(2), 0)
    assert plackett_luce(scores, [1, 1, 2]).item() == pytest.approx((math.log(3) + math.log(4)) / 2)
    assert plackett_luce(scores, [1, 2, 2]).item() == pytest.approx((math.log(3) + math.log(6)) / 2)


def test_a_tie_of_four_is_the_mean_over_all_orders():
    """All 24 orders of four beside one better and one worse, each by the formula of strict ranks written out here."""
    scores = [0.3, -1.0, 0.9, 0.1, 1.4, -0.2]  # ranks 2 2 2 2 1 3

    def minus_log_p(order):
        return sum(math.log(sum(math.exp(scores[j]) for j in order[k:])) - scores[i] for k, i in enumerate(order))

    expected = [minus_log_p([4, *tied, 5]) for tied in permutations(range(4))]
    found = plackett_luce(tensor(*scores), [2, 2, 2, 2, 1, 3]).item()
    assert found == pytest.approx(sum(expected) / 24)


@pytest.mark.parametrize(("ranks", "preference"), [([1, 2], 1.0), ([2, 1], 0.0), ([1, 1], 0.5)])
def test_of_two_it_is_bradley_terry(ranks, preference):
    scores = tensor(0.7, -0.4)
    expected = bradley_terry(scores[:1], scores[1:], preference).loss.item()
    assert plackett_luce(scores, ranks).item() == pytest.approx(expected)


def test_gradcheck():
    assert gradcheck(lambda s: plackett_luce(s, [2, 1, 2, 4]), [tensor(0.2, -1, 1.3, 0.5).requires_grad_()])


def test_whole_orders_leaves_pairs_as_they_are():
    """A pair (row 0) keeps its 0.25; a ranking of three equal scores (row 1) becomes ln 6."""
    scores, row_of = tensor(1, 2, 0, 0, 0), torch.tensor([0, 0, 1, 1, 1])
    rows = whole_orders(tensor(0.25, 9), scores, row_of, [[1, 2], [1, 3, 2]])
    assert rows.tolist() == pytest.approx([0.25, math.log(6)])


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="more than 12 answers of one rank"):
        plackett_luce(torch.zeros(13), [1] * 13)
    with pytest.raises(ValueError, match=r"scores \(2,\), 3 ranks"):
        plackett_luce(torch.zeros(2), [1, 2, 3])
    assert most_tied([1, 2, 2, 3]) == 2
    assert most_tied([]) == 0
