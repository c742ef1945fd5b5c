"""Win rates and their intervals."""

import pytest

from lowrank_align.evaluate.policy import pair_accuracy
from lowrank_align.evaluate.win_rate import wilson, win_rate


def test_win_rate_by_hand() -> None:
    """2 > 1 won, 1 = 1 tied, 0 < 3 lost, 5 > 4 won: (2 + 1/2) / 4 = 0.625."""
    found = win_rate([2, 1, 0, 5], [1, 1, 3, 4])
    assert (found.rate, found.wins, found.ties, found.losses) == (0.625, 2, 1, 1)
    assert 0 < found.low < 0.625 < found.high < 1


def test_wilson_by_hand() -> None:
    """7 of 10 at z = 2: centre (0.7 + 4/20) / (1 + 4/10) = 0.9 / 1.4; half sqrt(0.021 + 4/400) * 2 / 1.4 = 0.2515."""
    low, high = wilson(0.7, 10, z=2.0)
    assert (low, high) == pytest.approx((0.9 / 1.4 - 0.25153, 0.9 / 1.4 + 0.25153), abs=1e-4)


def test_wilson_has_a_width_at_the_ends() -> None:
    """10 of 10 at z = 2: the lower end is 1 / (1 + 4/10) = 0.714, the upper one 1."""
    assert wilson(1.0, 10, z=2.0) == pytest.approx((1 / 1.4, 1.0), abs=1e-6)


def test_pair_accuracy_leaves_ties_of_the_truth_out() -> None:
    """Pairs: ordered alike, ordered otherwise, a true tie: 1 of 2."""
    assert pair_accuracy([1, 1, 1], [0, 2, 0], [3, 3, 3], [2, 2, 3]) == 0.5
