"""The world itself, by hand: an oracle that is wrong would pass anything."""

import math

import pytest
import torch

from lowrank_align.tensors import kl_estimate
from tests.oracle.fitting import minimise
from tests.oracle.world import END, distance, kl, make_world, two_completions

BETA = 0.5
WORLD = make_world()


def test_completions_are_all_there_once():
    """1 + 3 + 9 + 27 that end within four tokens and 3^4 = 81 that are cut: 121, from 1 + 3 + 9 + 27 = 40 prefixes."""
    completions = [tuple(row[keep].tolist()) for row, keep in zip(WORLD.tokens, WORLD.mask, strict=True)]
    assert len(set(completions)) == len(completions) == 121
    assert WORLD.ref_logits.shape == (2, 40, 4)
    ended = [completion for completion in completions if completion[-1] == END]
    assert len(ended) == 40
    assert all(END not in completion[:-1] for completion in completions)
    assert {len(completion) for completion in completions if completion[-1] != END} == {4}


def test_probabilities_add_up():
    for log_probs in (WORLD.reference, WORLD.optimum(BETA), WORLD.log_probs(torch.zeros_like(WORLD.ref_logits))):
        assert log_probs.exp().sum(-1).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_uniform_logits_by_hand():
    """Four tokens, all alike: a completion of n tokens has probability 4^-n, ended or cut."""
    log_probs = WORLD.log_probs(torch.zeros_like(WORLD.ref_logits))
    expected = [-math.log(4) * n for n in WORLD.mask.sum(-1).tolist()]
    assert log_probs[1].tolist() == pytest.approx(expected)


def test_two_completions_by_hand():
    """pi_ref = (1/2, 1/2), r = (0, beta ln 3): Z = (1 + 3) / 2 = 2 and pi* = (1/4, 3/4).

    E r = 3/4 beta ln 3;  KL = 1/4 ln 1/2 + 3/4 ln 3/2 = 3/4 ln 3 - ln 2;  so J = beta ln 2 = beta log Z.
    """
    world = two_completions(0.5, 0.0, BETA * math.log(3))
    best = world.optimum(BETA)
    assert world.log_z(BETA).item() == pytest.approx(math.log(2))
    assert best.exp().tolist() == [pytest.approx([1 / 4, 3 / 4])]
    assert world.expected_reward(best).item() == pytest.approx(0.75 * BETA * math.log(3))
    assert kl(best, world.reference).item() == pytest.approx(0.75 * math.log(3) - math.log(2))
    assert world.objective(best, BETA).item() == pytest.approx(BETA * math.log(2))
    pair = world.pairs()
    assert (pair.first.tolist(), pair.second.tolist()) == ([0], [1])
    assert pair.preference.item() == pytest.approx(1 / (1 + 3**BETA))  # s(-beta ln 3)


def test_best_policy_beats_its_neighbours():
    """J(pi) = beta log Z - beta KL(pi || pi*), so every other policy falls short by exactly beta KL(pi || pi*) >= 0."""
    best = WORLD.optimum(BETA)
    logits, highest = WORLD.logits_of(best), WORLD.objective(best, BETA)
    assert highest.tolist() == pytest.approx((BETA * WORLD.log_z(BETA)).tolist())
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0, 10.0):
        noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        other = WORLD.log_probs(logits + size * noise)
        lost = highest - WORLD.objective(other, BETA)
        assert (lost > 0).all()
        assert lost.tolist() == pytest.approx((BETA * kl(other, best)).tolist(), rel=1e-6)
        assert (kl(other, WORLD.reference) > 0).all()
    assert kl(best, best).tolist() == [0, 0]


def test_ascent_finds_the_optimum():
    """The closed form against a search that does not know it: L-BFGS on -J from the reference."""
    found = WORLD.log_probs(
        minimise(lambda logits: -WORLD.objective(WORLD.log_probs(logits), BETA).sum(), WORLD.ref_logits)
    )
    reached = distance(found, WORLD.optimum(BETA))
    assert reached.gap < 1e-6, f"{reached}"


def test_table_holds_any_distribution():
    """Logits and completions' probabilities are two names of one policy."""
    reached = distance(WORLD.log_probs(WORLD.logits_of(WORLD.optimum(BETA))), WORLD.optimum(BETA))
    assert reached.gap < 1e-12, f"{reached}"


def test_values_by_hand():
    """Uniform over {end, a} and at most 2 tokens: completions (end) 1/2, (a, end) 1/4, (a, a) 1/4.

    Rewards per token (1), (2, 4), (2, 8): before the first token 1/2 1 + 1/4 6 + 1/4 10 = 4.5, after a 4/2 + 8/2 = 6.
    """
    world = make_world(prompts=1, vocabulary=2, max_length=2)
    assert world.tokens.tolist() == [[0, 0], [1, 0], [1, 1]]
    rewards = torch.tensor([[1, 0], [2, 4], [2, 8]], dtype=torch.float64)
    values = world.values(world.log_probs(torch.zeros_like(world.ref_logits)), rewards)
    assert values.tolist() == [[4.5, 0], [4.5, 6], [4.5, 6]]


def test_kl_is_the_mean_of_the_estimators():
    """What methods estimate is what the world computes: E k1 = E k3 = KL, of completions as wholes."""
    best, reference = WORLD.optimum(BETA), WORLD.reference
    for kind in ("k1", "k3"):
        estimate = (best.exp() * kl_estimate(best, reference, kind)).sum(-1)
        assert estimate.tolist() == pytest.approx(kl(best, reference).tolist())


def test_soft_values_backward_give_the_optimum():
    """Backward induction, V(s) = beta log sum_a ref(a|s) e^{Q(s,a)/beta}: the same pi*, and beta log Z at the start."""
    seen = []

    def rule(actions, ref_logps, depth):
        scores = ref_logps + actions / BETA
        seen.append((depth, BETA * scores.logsumexp(-1)))
        return scores.log_softmax(-1), seen[-1][1]

    reached = distance(WORLD.log_probs(WORLD.backward(rule)), WORLD.optimum(BETA))
    assert reached.gap < 1e-12, f"{reached}"
    assert len(seen) == 40
    assert seen[-1][0] == 0
    assert seen[-1][1].tolist() == pytest.approx((BETA * WORLD.log_z(BETA)).tolist())
