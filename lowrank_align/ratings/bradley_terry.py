"""Strengths by Bradley-Terry: p(i beats j) = s(theta_i - theta_j), s(z) = 1 / (1 + e^-z).

Ties are half a win each. A small ridge (the prior N(0, 1 / ridge) on every strength) keeps a 10-0 record finite, gives
a player without battles the strength 0, and makes the strengths sum to 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowrank_align.ratings.shares import Battle, win_rate_of
from lowrank_align.ratings.winners import players_of, win_matrix

Array = NDArray[np.float64]

RIDGE = 0.1
_TOLERANCE = 1e-9
_MOST_STEPS = 200
_RESAMPLED_AT_ONCE = 2_000_000  # counts, so that many prompts do not fill the memory


class Rating(NamedTuple):
    """One player's strength in nats of log-odds, 0 being the field's mean, with its 95 % interval."""

    name: str
    strength: float
    low: float
    high: float
    battles: int
    wins: int
    ties: int
    losses: int


def odds(strength: float, other: float) -> float:
    """p / (1 - p) that a player of `strength` beats one of `other`. They multiply: odds_ik = odds_ij * odds_jk."""
    return float(np.exp(strength - other))


def strengths(wins: Array, ridge: float = RIDGE, centre: Array | None = None) -> Array:
    """Maximise sum_ij W_ij log s(theta_i - theta_j) - ridge / 2 * |theta - centre|^2. W (..., n, n) -> theta (..., n).

    Newton's method; a step changes no difference of two strengths by more than 1, within which it always gains (the
    logistic loss is self-concordant in Bach's sense, Electronic Journal of Statistics 2010, proposition 1).
    """
    met = wins + np.swapaxes(wins, -1, -2)
    centre = np.zeros(wins.shape[:-1]) if centre is None else centre
    theta = centre.copy()
    diagonal = np.eye(wins.shape[-1])
    for _ in range(_MOST_STEPS):
        p = 0.5 * (1 + np.tanh((theta[..., :, None] - theta[..., None, :]) / 2))
        gradient = (wins - met * p).sum(-1) - ridge * (theta - centre)
        curvature = met * p * (1 - p)
        hessian = diagonal * (curvature.sum(-1) + ridge)[..., None] - curvature
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        spread = step.max(-1, keepdims=True) - step.min(-1, keepdims=True)
        theta = theta + step / np.maximum(1.0, spread)
        if np.abs(step).max(initial=0.0) < _TOLERANCE:
            break
    return theta


def bradley_terry(
    battles: Sequence[Battle],
    names: Sequence[str] | None = None,
    *,
    ridge: float = RIDGE,
    resamples: int = 400,
    seed: int = 0,
) -> list[Rating]:
    """Every player's rating, the strongest first. `names` adds players that have not played yet.

    Intervals: prompts are drawn with replacement (votes on one prompt are not independent), strengths fitted to each
    draw, and the middle 95 % taken. Each draw also takes the ridge's centre from the ridge's own prior: resampling
    alone would give a 10-0 record, or a player without battles, an interval of no width.
    """
    names = list(names) if names is not None else players_of(battles)
    if not names:
        return []
    fitted = strengths(win_matrix(battles, names), ridge)
    low, high = _interval(battles, names, ridge, resamples, seed)
    ratings = []
    for i, name in enumerate(names):
        record = win_rate_of(battles, name)
        # The fit itself always lies inside what is shown, also where few draws put the quantiles beside it.
        within = (float(min(low[i], fitted[i])), float(max(high[i], fitted[i])))
        ratings.append(Rating(name, float(fitted[i]), *within, record.total, *record[3:]))
    return sorted(ratings, key=lambda rating: -rating.strength)


def _interval(
    battles: Sequence[Battle], names: list[str], ridge: float, resamples: int, seed: int
) -> tuple[Array, Array]:
    """(n,) lower and (n,) upper ends."""
    by_prompt: dict[object, list[Battle]] = {}
    for number, battle in enumerate(battles):
        by_prompt.setdefault(battle.prompt or number, []).append(battle)
    n, prompts = len(names), len(by_prompt)
    counts = np.array([win_matrix(group, names).ravel() for group in by_prompt.values()]).reshape(prompts, n * n)
    rng = np.random.default_rng(seed)
    drawn = []
    at_once = max(1, _RESAMPLED_AT_ONCE // max(1, prompts))
    for start in range(0, resamples, at_once):
        many = min(at_once, resamples - start)
        times = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=many) if prompts else np.zeros((many, 0))
        centre = rng.normal(scale=1 / np.sqrt(ridge), size=(many, n))
        centre -= centre.mean(axis=1, keepdims=True)  # strengths are relative: 0 stays the field's mean
        drawn.append(strengths((times @ counts).reshape(many, n, n), ridge, centre))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975], axis=0)
    return low, high
