"""Reward models on true preferences recover the reward up to a number of each prompt, f(x), and no further."""

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from lowrank_align.objectives.paired import bradley_terry, centring
from lowrank_align.objectives.ranked import plackett_luce
from tests.oracle.fitting import minimise
from tests.oracle.world import make_world

WORLD = make_world()


def off_by_more_than_a_constant(scores: Tensor) -> float:
    """max |(score - r) - its mean over the prompt's completions|."""
    error = scores - WORLD.rewards
    return (error - error.mean(-1, keepdim=True)).abs().max().item()


def test_bradley_terry_recovers_the_reward():
    """-[mu log s(D) + (1 - mu) log s(-D)] is least at s(D) = mu = s(r_i - r_j): D = r_i - r_j for all pairs at once."""
    pairs = WORLD.pairs()

    def loss(scores: Tensor) -> Tensor:
        flat = scores.flatten()
        return bradley_terry(flat[pairs.first], flat[pairs.second], pairs.preference).loss.mean()

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(WORLD.rewards.shape, generator=generator, dtype=torch.float64)
    scores = minimise(loss, start)
    error = off_by_more_than_a_constant(scores)
    assert error < 1e-6, f"max |score - r - f(x)| {error:.2e}"
    # f(x) is where it began: no comparison of one prompt's completions moves the prompt's mean
    assert torch.allclose(scores.mean(-1), start.mean(-1), atol=1e-9)


def test_centring_fixes_the_constant():
    """The auxiliary loss c (r_i + r_j)^2 takes the prompt's mean to 0, and pulls every score a little towards it.

    Over all pairs of C completions with mean 0 it is c (C - 2) sum r_i^2. Against the curvature s' <= 1/4 of the
    comparisons, C s' per score, a score gives way by about r 2c / s': 8 to 10 times c for |D| < 2, so 1e-3 at c = 1e-4.
    """
    pairs = WORLD.pairs()

    def loss(scores: Tensor) -> Tensor:
        first, second = scores.flatten()[pairs.first], scores.flatten()[pairs.second]
        return (bradley_terry(first, second, pairs.preference).loss + centring(first, second, 1e-4)).mean()

    scores = minimise(loss, torch.ones_like(WORLD.rewards))
    error = (scores - (WORLD.rewards - WORLD.rewards.mean(-1, keepdim=True))).abs().max().item()
    assert scores.mean(-1).abs().max().item() < 1e-6
    assert 5e-4 < error < 2e-3, f"max |score - (r - mean r)| {error:.2e}"


def test_plackett_luce_recovers_the_reward():
    """Every order of every three of five completions, weighted by its true probability: the likelihood is greatest at
    the true scores (Gibbs), and threes that overlap leave one constant for all.

    The probability of an order is worked out as it is drawn: the best of three by softmax, then the better of two.
    """
    rewards = WORLD.rewards[0, :5]
    rankings = []
    for three in combinations(range(5), 3):
        for order in permutations(range(3)):
            r = rewards[list(three)][list(order)]
            rankings.append((list(three), [order.index(i) for i in range(3)], r.softmax(0)[0] * r[1:].softmax(0)[0]))
    assert len(rankings) == 60
    assert sum(weight.item() for *_, weight in rankings) == pytest.approx(10)

    def loss(scores: Tensor) -> Tensor:
        return sum(weight * plackett_luce(scores[three], ranks) for three, ranks, weight in rankings)

    error = minimise(loss, torch.zeros(5).double()) - rewards
    assert error.std().item() < 1e-6, f"score - r is {error.tolist()}, not one number"
