"""Win rates, what is left of them at equal length, and means with intervals."""

import math

import pytest

from lowrank_align.evaluate.outcomes import compare, length_controlled, mean_interval, outcomes_of_scores


def test_scores_become_outcomes() -> None:
    assert outcomes_of_scores([2, 1, 0], [1, 1, 3]) == [1.0, 0.5, 0.0]


def test_won_tied_lost_and_what_is_undecided() -> None:
    """3 won, 1 tied, 1 lost, one undecided: (3 + 1/2) / 5 = 0.7, and 3/5 - 1/5 = 0.4."""
    found = compare([1.0, 1.0, 1.0, 0.5, 0.0, None], [0, 0, 0, 0, 0, 9])
    assert found.win_rate[3:] == (3, 1, 1)
    assert (found.win_rate.rate, found.undecided) == (0.7, 1)
    assert found.delta.value == pytest.approx(0.4)
    assert found.delta.low == pytest.approx(2 * found.win_rate.low - 1)
    assert found.delta.low < 0.4 < found.delta.high


def test_outcomes_that_are_all_alike_say_nothing_of_length() -> None:
    """An interval by resampling would have no width there."""
    assert compare([1.0, 1.0], [3, -3]).length_controlled is None
    assert compare([1.0, 0.5], [3, -3]).length_controlled is not None


def test_nothing_decided_is_no_figure() -> None:
    found = compare([None, None], [1, 2])
    assert (found.win_rate.total, found.undecided, found.length_controlled) == (0, 2, None)
    assert math.isnan(found.delta.value)


def test_without_a_difference_of_length_nothing_is_taken_out() -> None:
    """The constant is then the log odds of the share won, 3/4; the ridge moves it by less than a thousandth."""
    found = length_controlled([1.0, 1.0, 1.0, 0.0] * 10, [0] * 40)
    assert found.rate.value == pytest.approx(0.75, abs=1e-3)
    assert found.length_weight == 0
    assert found.rate.low < 0.75 < found.rate.high


def test_what_length_alone_has_won_is_taken_out() -> None:
    """Longer (by 5 characters) 300 times, 3/4 of them won; shorter (by 5) 100 times, 1/4 of them won.

    As x takes two values, +t and -t with t = tanh(1), the fit meets both shares: constant + w t = log 3 and constant -
    w t = -log 3. So the constant is 0, a win rate of 1/2 at equal length (225 + 25 of 400, 0.625, raw), and w is log 3
    / tanh(1) = 1.4425.
    """
    outcomes = [1.0] * 225 + [0.0] * 75 + [1.0] * 25 + [0.0] * 75
    found = length_controlled(outcomes, [5] * 300 + [-5] * 100)
    assert found.rate.value == pytest.approx(0.5, abs=1e-3)
    assert found.length_weight == pytest.approx(math.log(3) / math.tanh(1), abs=2e-3)
    assert found.rate.low < 0.5 < found.rate.high


def test_a_tie_counts_half_at_equal_length_too() -> None:
    assert length_controlled([0.5] * 8, [3, -3] * 4).rate.value == pytest.approx(0.5)


def test_winning_all_stays_finite() -> None:
    """Ten won of ten, each by a longer answer: the ridge keeps log odds and weight finite."""
    found = length_controlled([1.0] * 10, list(range(1, 11)))
    assert 0.5 < found.rate.value < 1
    assert math.isfinite(found.length_weight)


@pytest.mark.parametrize(
    ("differences", "extrapolated"),
    [([9] * 40, True), ([9] * 39 + [-1], True), ([9] * 38 + [0, -1], False), ([0] * 40, False), ([-9] * 40, True)],
)
def test_where_one_side_is_always_longer_equal_length_is_extrapolated(
    differences: list[int], extrapolated: bool
) -> None:
    """1 of 40 is less than a twentieth, 2 of 40 are not."""
    assert length_controlled([1.0, 0.0] * 20, differences).extrapolated is extrapolated


def test_the_interval_of_a_mean() -> None:
    """Half zeros and half twos: mean 1. Means of 400 such draws have the standard deviation 1 / sqrt(400) = 0.05, so
    the middle 95 % is 1 +- 0.098. One value everywhere leaves no width."""
    found = mean_interval([0.0, 2.0] * 200)
    assert found.value == 1
    assert (found.low, found.high) == (pytest.approx(0.902, abs=0.012), pytest.approx(1.098, abs=0.012))
    assert mean_interval([3.0, 3.0]) == (3.0, 3.0, 3.0)
    assert math.isnan(mean_interval([]).value)
