"""A reward model's accuracy, calibration and what length does, on margins whose figures are known."""

import math

import numpy as np
import pytest

from lowrank_align.evaluate.reward_quality import ScoredPair, correlation, reliability, reward_quality

LOG3 = math.log(3)  # s(log 3) = 3/4


def test_accuracy_by_subset_and_by_which_answer_is_longer() -> None:
    """Right: 1st and 2nd, level: 3rd, wrong: 4th. (2 + 1/2) / 4. Longer is better in the 1st and 4th: 1 of 2 right;
    shorter in the 2nd: right; of equal length the 3rd, in neither."""
    pairs = [
        ScoredPair(1.0, 0.0, 9, 5, ("web",)),
        ScoredPair(1.0, 0.0, 2, 5, ("web", "new")),
        ScoredPair(1.0, 1.0, 5, 5, ("book",)),
        ScoredPair(0.0, 1.0, 9, 5, ("book",)),
    ]
    found = reward_quality(pairs)
    assert (found.accuracy.rate, *found.accuracy[3:]) == (0.625, 2, 1, 1)
    assert {name: rate[3:] for name, rate in found.by_group.items()} == {
        "book": (0, 1, 1),
        "new": (1, 0, 0),
        "web": (2, 0, 0),
    }
    assert found.better_longer[3:] == (1, 0, 1)
    assert found.better_shorter[3:] == (1, 0, 0)
    assert found.mean_margin == 0.25


def test_calibration_by_hand() -> None:
    """Margins log 3 three times and -log 3 once: confidence 3/4, right 3 of 4, so no calibration error. Brier: three
    times (1 - 3/4)^2 and once (1 - 1/4)^2, (3/16 + 9/16) / 4 = 3/16."""
    pairs = [ScoredPair(LOG3, 0.0, 1, 2)] * 3 + [ScoredPair(0.0, LOG3, 1, 2)]
    found = reward_quality(pairs)
    (full,) = [b for b in found.bins if b.comparisons]
    assert full == (pytest.approx(0.75), pytest.approx(0.8), 4, pytest.approx(0.75), 0.75)
    assert found.calibration_error == pytest.approx(0.0, abs=1e-12)
    assert found.brier == pytest.approx(3 / 16)


def test_overconfidence_is_an_error() -> None:
    """One right at margin 0 (confidence 1/2, half right: no error) and one wrong at 40 (confidence 1: error 1): 1/2."""
    found = reward_quality([ScoredPair(0.0, 0.0, 1, 1), ScoredPair(0.0, 40.0, 1, 1)])
    assert found.calibration_error == pytest.approx(0.5)
    assert [b.comparisons for b in found.bins] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_every_margin_has_a_bin() -> None:
    margins = np.array([0.0, -1e-9, 1e-9, 3.0, -800.0, 800.0])
    assert sum(b.comparisons for b in reliability(margins)) == 6


def test_correlation_with_length() -> None:
    """Scores that are half the tokens: 1. So are margins and differences of tokens."""
    found = reward_quality([ScoredPair(1.0, 4.0, 2, 8), ScoredPair(2.0, 3.0, 4, 6)])
    assert found.length_correlation == pytest.approx(1.0)
    assert found.margin_correlation == pytest.approx(1.0)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert math.isnan(correlation([1, 1], [1, 2]))
    assert math.isnan(correlation([1], [2]))
