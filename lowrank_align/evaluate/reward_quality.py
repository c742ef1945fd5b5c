"""How far a reward model's scores can be trusted: accuracy, calibration, and what length has to do with them.

Works on scored comparisons alone; `numpy` only. Comparisons of answers that are equally good say nothing of accuracy
and are counted apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowrank_align.ratings import WinRate

BINS = 10


class ScoredPair(NamedTuple):
    """The better and the worse answer of one comparison, with the reward model's scores and their lengths in tokens."""

    better: float
    worse: float
    better_tokens: int
    worse_tokens: int
    groups: tuple[str, ...] = ()  # the subsets that it belongs to


class Bin(NamedTuple):
    """Comparisons of about the same confidence."""

    low: float
    high: float
    comparisons: int
    confidence: float  # mean of s(|margin|)
    accuracy: float  # the better answer had the higher score; equal scores count half


@dataclass(frozen=True)
class RewardQuality:
    """Accuracies are `WinRate`s: won where the better answer scores higher, tied where both score the same."""

    accuracy: WinRate
    by_group: dict[str, WinRate]
    better_longer: WinRate  # accuracy where the better answer is the longer one
    better_shorter: WinRate
    bins: list[Bin]
    calibration_error: float  # ECE
    brier: float  # mean of (1 - s(margin))^2
    length_correlation: float  # Pearson's, of a score with its answer's tokens; NaN where one of them never varies
    margin_correlation: float  # Pearson's, of the margin with the difference in tokens
    mean_margin: float


def reward_quality(pairs: Sequence[ScoredPair]) -> RewardQuality:
    """Measures `pairs`, each of which has a better answer.

    Calibration takes s(margin), s(z) = 1 / (1 + e^-z), for the probability that the first answer is better, which is
    what the Bradley-Terry loss fits. Which answer stands first is arbitrary, so the confidence max(s, 1 - s), from 0.5
    to 1, is held against the accuracy, in 10 bins of equal width; ECE is their mean distance, weighted by count (Guo et
    al. 2017, arXiv 1706.04599).
    """
    groups = sorted({group for pair in pairs for group in pair.groups})
    margins = np.array([pair.better - pair.worse for pair in pairs])
    bins = reliability(margins)
    distances = [b.comparisons * abs(b.accuracy - b.confidence) for b in bins if b.comparisons]
    scores = [score for pair in pairs for score in (pair.better, pair.worse)]
    tokens = [count for pair in pairs for count in (pair.better_tokens, pair.worse_tokens)]
    return RewardQuality(
        accuracy=_accuracy(pairs),
        by_group={group: _accuracy([pair for pair in pairs if group in pair.groups]) for group in groups},
        better_longer=_accuracy([pair for pair in pairs if pair.better_tokens > pair.worse_tokens]),
        better_shorter=_accuracy([pair for pair in pairs if pair.better_tokens < pair.worse_tokens]),
        bins=bins,
        calibration_error=sum(distances) / len(pairs),
        brier=float(np.mean((1 - _sigmoid(margins)) ** 2)),
        length_correlation=correlation(scores, tokens),
        margin_correlation=correlation(margins.tolist(), [p.better_tokens - p.worse_tokens for p in pairs]),
        mean_margin=float(margins.mean()),
    )


def reliability(margins: np.ndarray) -> list[Bin]:
    """`BINS` bins of confidence from 0.5 to 1; margins (N,) are the better answer's score less the worse one's."""
    confidence = _sigmoid(np.abs(margins))
    right = np.where(margins == 0, 0.5, margins > 0)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, BINS - 1)
    found = []
    for i in range(BINS):
        inside = place == i
        count = int(inside.sum())
        means = (float(confidence[inside].mean()), float(right[inside].mean())) if count else (math.nan, math.nan)
        found.append(Bin(float(edges[i]), float(edges[i + 1]), count, *means))
    return found


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's; NaN for fewer than two values, or where one side is always the same."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _accuracy(pairs: Sequence[ScoredPair]) -> WinRate:
    right, level = sum(p.better > p.worse for p in pairs), sum(p.better == p.worse for p in pairs)
    return WinRate.of(right, level, len(pairs) - right - level)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))
