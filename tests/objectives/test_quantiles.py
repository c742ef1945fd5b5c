"""Quantiles of scores by hand."""

import pytest
import torch

from lowrank_align.objectives.quantiles import quantiles


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([0.3, 0.1, 0.5, 0.2, 0.4], 5, [3, 1, 5, 2, 4]),
        ([4, 1, 3, 2, 6, 5], 3, [2, 1, 2, 1, 3, 3]),
        ([1, 0, 0, 0], 2, [2, 1, 1, 1]),  # ranks 3 and 1, 1, 1: floor(2 * 1 / 4) = 0
        ([1, 1, 0, 0], 5, [5, 5, 1, 1]),  # ranks 2.5 and 0.5: quantiles 4 and 1, but the best are in the top one
        ([7, 7, 7, 7], 4, [2, 2, 2, 2]),  # rank 1.5 of 4, and none is better than another
        ([2.0], 3, [1]),
        ([1, 2], 10, [1, 10]),  # ranks 0 and 1 of 2: quantiles 1 and 6
    ],
)
def test_quantiles_by_hand(scores: list[float], count: int, expected: list[int]) -> None:
    assert quantiles(torch.tensor(scores), count).tolist() == expected
