"""What comparisons of two voices' answers say: win rate, length-controlled win rate, difference of scores.

One outcome a prompt: 1 ours is better, 0 theirs is, 0.5 a tie, None undecided (a judge that could not be read), which
is left out and counted. numpy only.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowrank_align.ratings import WinRate

Outcome = float | None
RESAMPLES = 2000
_RIDGE = 0.01  # keeps the fit finite where every comparison was won; moves a share of 100 by less than 0.001
_NEWTON_STEPS = 50


SEEN = 0.05  # with less than this share of lengths on one side, equal length was hardly seen


class Interval(NamedTuple):
    """A figure with its 95 % interval; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float


class LengthControlled(NamedTuple):
    """The win rate that answers of equal length would have."""

    rate: Interval
    length_weight: float  # log odds that a much longer answer has over one of equal length
    extrapolated: bool  # one side is nearly always the longer one


class Comparison(NamedTuple):
    """Ours against theirs, by one judge."""

    win_rate: WinRate
    delta: Interval  # wins less losses, as a share of all
    length_controlled: LengthControlled | None  # None where all outcomes are alike, or there are none
    undecided: int


def outcomes_of_scores(ours: Sequence[float], theirs: Sequence[float]) -> list[Outcome]:
    """The higher score is better, equal ones are a tie."""
    return [0.5 + 0.5 * float(np.sign(a - b)) for a, b in zip(ours, theirs, strict=True)]


def compare(outcomes: Sequence[Outcome], length_differences: Sequence[int], seed: int = 0) -> Comparison:
    """`length_differences` (N,): ours less theirs, in characters, in the order of the outcomes (N,)."""
    decided = [(o, d) for o, d in zip(outcomes, length_differences, strict=True) if o is not None]
    wins, losses = sum(o > 0.5 for o, _ in decided), sum(o < 0.5 for o, _ in decided)
    rate = WinRate.of(wins, len(decided) - wins - losses, losses)
    delta = Interval(2 * rate.rate - 1, 2 * rate.low - 1, 2 * rate.high - 1)
    varied = len({o for o, _ in decided}) > 1  # where all came out alike, nothing tells length from the rest
    controlled = length_controlled([o for o, _ in decided], [d for _, d in decided], seed) if varied else None
    return Comparison(rate, delta, controlled, len(outcomes) - len(decided))


def length_controlled(
    outcomes: Sequence[float], length_differences: Sequence[int], seed: int = 0, resamples: int = RESAMPLES
) -> LengthControlled:
    """The win rate with the effect of length taken out, as AlpacaEval 2 has it (Dubois et al. 2024, arXiv 2404.04475).

    A logistic regression of the outcome on one constant and on tanh(length difference / its standard deviation); the
    rate is what it predicts at no difference, s(constant). The interval resamples prompts. Left out of theirs: the
    term of each instruction's difficulty, which they fit over the answers of many models, and with it the choice of the
    regularisation by cross-validation: here it is a fixed small ridge.
    """
    y, x = np.asarray(outcomes, dtype=float), np.asarray(length_differences, dtype=float)
    spread = float(np.sqrt(np.mean(x * x)))
    x = np.tanh(x / spread) if spread else x
    ones = np.ones((1, len(y)))
    constant, weight = (float(found) for found in _logistic(x, y, ones)[0])
    counts = np.random.default_rng(seed).multinomial(len(y), np.full(len(y), 1 / len(y)), size=resamples)
    low, high = np.quantile(_sigmoid(_logistic(x, y, counts)[:, 0]), [0.025, 0.975])
    rate = float(_sigmoid(np.array(constant)))
    rarer = min((x >= 0).mean(), (x <= 0).mean())
    return LengthControlled(Interval(rate, min(float(low), rate), max(float(high), rate)), weight, bool(rarer < SEEN))


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of one figure a prompt, with the middle 95 % of the means of prompts drawn with replacement."""
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    figures = np.asarray(values, dtype=float)
    count = len(figures)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = np.quantile(drawn @ figures / count, [0.025, 0.975])
    return Interval(float(figures.mean()), float(low), float(high))


def _logistic(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R, 2) constant and slope of R weighted logistic regressions by Newton's method: counts (R, N), x and y (N,)."""
    design = np.stack([np.ones_like(x), x], axis=1)
    found = np.zeros((len(counts), 2))
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(found @ design.T)
        gradient = (counts * (p - y)) @ design + _RIDGE * found
        hessian = np.einsum("rn,ni,nj->rij", counts * p * (1 - p), design, design) + _RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        found = found - np.clip(step, -2.0, 2.0)  # far from the optimum a whole step may leap over it
        if np.abs(step).max() < 1e-9:
            break
    return found


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -60.0, 60.0)))
