"""DPO and the losses that compare with a reference, on all pairs with true preferences, each to its own optimum."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from lowrank_align.objectives.paired import hinge, ipo, robust, sigmoid
from lowrank_align.objectives.ranked import plackett_luce
from tests.oracle.fitting import descend, minimise, on_all_pairs
from tests.oracle.world import World, distance, make_world, two_completions

BETA, EPSILON = 0.5, 0.1
WORLD = make_world()
SMALL = make_world(max_length=3)  # 40 completions, 2 x 780 pairs


def test_dpo_approaches_the_optimum():
    """Least where s(beta (h_i - h_j)) = s(r_i - r_j) for every pair: beta h = r + f(x), so pi = ref e^{r/beta} / Z."""
    reached = distance(
        WORLD.log_probs(minimise(on_all_pairs(WORLD, sigmoid, beta=BETA), WORLD.ref_logits)), WORLD.optimum(BETA)
    )
    assert reached.gap < 1e-5, f"{reached}"


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_at_other_betas(beta):
    """Small beta goes far from the reference, large beta stays near; pi* in both."""
    reached = distance(
        SMALL.log_probs(minimise(on_all_pairs(SMALL, sigmoid, beta=beta), SMALL.ref_logits)), SMALL.optimum(beta)
    )
    assert reached.gap < 1e-4, f"beta {beta}: {reached}"


def test_one_sided_labels_overshoot():
    """Labels without noise (the higher reward always wins) have no finite optimum: KL grows past pi*'s."""
    pairs = SMALL.pairs()
    loss = on_all_pairs(SMALL, sigmoid, preference=(pairs.preference > 0.5).double(), beta=BETA)
    early, late = (SMALL.log_probs(descend(loss, SMALL.ref_logits, steps)) for steps in (50, 200))
    kls = [distance(found, SMALL.reference).kl for found in (SMALL.optimum(BETA), early, late)]
    assert kls[0] < kls[1] < kls[2], (
        f"KL to the reference: pi* {kls[0]:.2f}, 50 steps {kls[1]:.2f}, 200 steps {kls[2]:.2f}"
    )


def two_valued() -> World:
    """Rewards 0 and 1 only, so that preferences are s(0), s(1) and s(-1)."""
    return World(SMALL.ref_logits, (SMALL.rewards > 0).double(), SMALL.tokens, SMALL.mask, SMALL.prefixes)


def test_cdpo_shrinks_the_margin():
    """Smoothed labels mu' = mu (1 - eps) + (1 - mu) eps are fitted in mu's place: beta D = log(mu' / (1 - mu')).

    With rewards of 0 and 1 there is one margin, R = log(m / (1 - m)) with m = .9 s(1) + .1 s(-1) = 0.68485: R = 0.7761,
    and the optimum is pi* of the rewards 0 and R in place of 0 and 1.
    """
    world = two_valued()
    s = 1 / (1 + math.e**-1)
    m = (1 - EPSILON) * s + EPSILON * (1 - s)
    margin = math.log(m / (1 - m))
    assert margin == pytest.approx(0.7761, abs=1e-4)
    found = world.log_probs(
        minimise(on_all_pairs(world, sigmoid, beta=BETA, label_smoothing=EPSILON), world.ref_logits)
    )
    shrunk = World(world.ref_logits, margin * world.rewards, world.tokens, world.mask, world.prefixes)
    reached = distance(found, shrunk.optimum(BETA))
    assert reached.gap < 1e-5, f"{reached}"
    assert distance(found, world.optimum(BETA)).kl > 1e-3


def test_cdpo_fits_expected_wins():
    """With any rewards: every completion's fitted wins, sum_j s(beta (h_i - h_j)), are its smoothed ones, sum_j mu'_ij.

    That is the gradient in h_i set to 0, Zermelo's equation of a Bradley-Terry fit.
    """
    found = SMALL.log_probs(
        minimise(on_all_pairs(SMALL, sigmoid, beta=BETA, label_smoothing=EPSILON), SMALL.ref_logits)
    )
    h, r = BETA * (found - SMALL.reference), SMALL.rewards
    wins = torch.sigmoid(h[:, :, None] - h[:, None]).sum(-1)
    smoothed = (1 - 2 * EPSILON) * torch.sigmoid(r[:, :, None] - r[:, None]).sum(-1) + EPSILON * r.shape[1]
    error = (wins - smoothed).abs().max().item()
    assert error < 1e-5, f"{error:.2e} wins"


def test_robust_undoes_flipped_labels():
    """A share eps of the labels is flipped, mu' = mu (1 - eps) + (1 - mu) eps: told eps, robust approaches pi* still.

    Its loss is linear in the label and unbiased: E over flips of [(1 - eps) l(w) - eps l(l)] / (1 - 2 eps) is DPO's on
    clean labels. DPO itself, on the same labels, ends where cDPO does on clean ones.
    """
    mu = SMALL.pairs().preference
    flipped = mu * (1 - EPSILON) + (1 - mu) * EPSILON
    loss = on_all_pairs(SMALL, robust, preference=flipped, beta=BETA, label_smoothing=EPSILON)
    reached = distance(SMALL.log_probs(minimise(loss, SMALL.ref_logits)), SMALL.optimum(BETA))
    assert reached.gap < 1e-5, f"{reached}"
    told_nothing = minimise(on_all_pairs(SMALL, sigmoid, preference=flipped, beta=BETA), SMALL.ref_logits)
    conservative = minimise(on_all_pairs(SMALL, sigmoid, beta=BETA, label_smoothing=EPSILON), SMALL.ref_logits)
    assert distance(SMALL.log_probs(told_nothing), SMALL.log_probs(conservative)).gap < 1e-5
    assert distance(SMALL.log_probs(told_nothing), SMALL.optimum(BETA)).kl > 1e-3


def normalised(log_weights_at, num_prompts: int) -> Tensor:
    """log_weights_at(c) (P, C) at the c (P,) for which each prompt's probabilities sum to 1; by bisection."""
    low, high = torch.full((num_prompts,), -50.0).double(), torch.full((num_prompts,), 50.0).double()
    for _ in range(100):
        middle = (low + high) / 2
        too_much = log_weights_at(middle).logsumexp(-1) > 0
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    return log_weights_at(low)


def test_ipo_approaches_its_own_optimum():
    """Least squares on a complete graph: with g = h / n, all pairs ask g_i - g_j = (2 mu_ij - 1) / (2 beta) at best.

    They do not all agree; least is g_i = c(x) + mean_j (2 mu_ij - 1) / (2 beta), the mean over all C completions, i
    itself (0) included. So pi(y|x) = ref(y|x) exp(|y| [(p(y) - 1/2) / beta + c(x)]), p(y) the chance to win against a
    completion drawn evenly, and c(x) what makes that sum to 1. Where all completions are of one length it is Azar et
    al.'s optimum, ref exp(p / beta) / Z: preferences, not rewards, in the exponent.
    """
    r, n = SMALL.rewards, SMALL.mask.sum(-1)
    wins = torch.sigmoid(r[:, :, None] - r[:, None]).mean(-1)
    expected = normalised(lambda c: SMALL.reference + n * ((wins - 0.5) / BETA + c[:, None]), len(r))
    assert expected.exp().sum(-1).tolist() == pytest.approx([1, 1])
    reached = distance(SMALL.log_probs(minimise(on_all_pairs(SMALL, ipo, beta=BETA), SMALL.ref_logits)), expected)
    assert reached.gap < 1e-5, f"{reached}"


@pytest.mark.parametrize("reward", [0.2, 3.0])
def test_hinge_knows_no_strength(reward):
    """mu relu(1 - D) + (1 - mu) relu(1 + D), mu > 1/2, falls up to D = 1 and rises after: D = 1 for any reward.

    D is beta times the change of log-odds, so odds of 1/4 in the reference become e^{1/beta} / 4 = e^2 / 4.
    """
    world = two_completions(0.2, reward, 0.0)
    found = world.log_probs(descend(on_all_pairs(world, hinge, beta=BETA), world.ref_logits, 300))[0]
    assert (found[0] - found[1]).item() == pytest.approx(math.log(0.25) + 2, abs=5e-3)


def test_whole_orders_approach_the_optimum():
    """DPO on rankings: Plackett-Luce of beta h, all 24 orders of four completions by their true weights."""
    world = make_world(prompts=1, vocabulary=2, max_length=3)
    assert world.rewards.shape == (1, 4)
    orders = list(permutations(range(4)))
    ranks = [[order.index(i) for i in range(4)] for order in orders]
    true = torch.stack([-plackett_luce(world.rewards[0], of_order) for of_order in ranks]).exp()
    assert true.sum().item() == pytest.approx(1)

    def loss(logits: Tensor) -> Tensor:
        scores = BETA * (world.log_probs(logits) - world.reference)[0]
        return (true * torch.stack([plackett_luce(scores, of_order) for of_order in ranks])).sum()

    reached = distance(world.log_probs(minimise(loss, world.ref_logits)), world.optimum(BETA))
    assert reached.gap < 1e-5, f"{reached}"
