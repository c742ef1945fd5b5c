"""Losses on pairs without a reference, on all pairs with true preferences: where each goes, and which goes astray."""

import math

import pytest
import torch

from lowrank_align.objectives.reference_free import cpo, nll, orpo, simpo, token_unlikelihood, unlikelihood
from tests.oracle.fitting import descend, minimise, on_all_pairs
from tests.oracle.world import distance, kl, make_world, two_completions

BETA = 0.5
SMALL = make_world(max_length=3)  # 40 completions, 2 x 780 pairs


def test_simpo_tilts_per_token():
    """Without a margin: beta (log pi_i / n_i - log pi_j / n_j) = r_i - r_j for all pairs: log pi = n (r / beta + c(x)).

    The reference is nowhere in it, and a longer completion is discounted by c < 0 for every token.
    """
    n, r = SMALL.mask.sum(-1), SMALL.rewards
    low, high = torch.full((2,), -50.0).double(), torch.full((2,), 50.0).double()
    for _ in range(100):
        c = (low + high) / 2
        too_much = (n * (r / BETA + c[:, None])).logsumexp(-1) > 0
        low, high = torch.where(too_much, low, c), torch.where(too_much, c, high)
    expected = n * (r / BETA + low[:, None])
    loss = on_all_pairs(SMALL, simpo, beta=BETA, simpo_gamma=0.0)
    reached = distance(SMALL.log_probs(minimise(loss, SMALL.ref_logits)), expected)
    assert reached.gap < 1e-5, f"{reached}"


def test_simpo_margin_spreads():
    """Two completions of a token, z = beta log(p / (1 - p)), margin gamma. At the optimum

    mu / (1 + e^{z - gamma}) = (1 - mu) / (1 + e^{-z - gamma}), with u = e^z and g = e^-gamma a quadratic:
    (1 - mu) g u^2 - (2 mu - 1) u - mu g = 0. gamma = ln 2, mu = 2/3 (r = ln 2): u^2 - 2u - 2 = 0, so u = 1 + sqrt 3
    in place of the 2 that the preference says.
    """
    world = two_completions(0.3, math.log(2), 0.0)
    loss = on_all_pairs(world, simpo, beta=BETA, simpo_gamma=math.log(2))
    found = world.log_probs(minimise(loss, world.ref_logits))[0]
    assert (BETA * (found[0] - found[1])).item() == pytest.approx(math.log(1 + math.sqrt(3)), abs=1e-6)


def test_cpo_takes_the_reference_to_be_uniform():
    """Without its likelihood term: beta (log pi_i - log pi_j) = r_i - r_j, so pi = e^{r/beta} / sum, ref or not."""
    expected = (SMALL.rewards / BETA).log_softmax(-1)
    loss = on_all_pairs(SMALL, cpo, beta=BETA, cpo_alpha=0.0)
    reached = distance(SMALL.log_probs(minimise(loss, SMALL.ref_logits)), expected)
    assert reached.gap < 1e-5, f"{reached}"


def test_cpo_likelihood_pulls_to_the_preference():
    """Two completions of a token, z = log(p / (1 - p)): alpha (p - mu) + beta (s(beta z) - mu) = 0.

    beta = 1/2, p = 4/5: z = ln 4, s(z / 2) = 2/3. With alpha = 1: mu = (4/5 + 1/3) / (3/2) = 34/45 has p = 4/5.
    """
    world = two_completions(0.3, math.log(34 / 11), 0.0)
    found = world.log_probs(minimise(on_all_pairs(world, cpo, beta=BETA, cpo_alpha=1.0), world.ref_logits))
    assert found[0, 0].exp().item() == pytest.approx(4 / 5, abs=1e-6)


def test_orpo_by_hand():
    """Two completions of a token: odds are p / (1 - p) and its inverse, log odds differ by 2 z, z = log(p / (1 - p)).

    (p - mu) + 2 beta (s(2 z) - mu) = 0. beta = 1, p = 2/3: s(2 ln 2) = 4/5, mu = (2/3 + 8/5) / 3 = 34/45 has p = 2/3.
    """
    world = two_completions(0.3, math.log(34 / 11), 0.0)
    found = world.log_probs(minimise(on_all_pairs(world, orpo, beta=1.0), world.ref_logits))
    assert found[0, 0].exp().item() == pytest.approx(2 / 3, abs=1e-6)


def test_nll_of_pairs_favours_short_answers():
    """The mean over each chosen answer's tokens: sum_y w(y) log pi(y) is largest at pi = w / sum w, w(y) = c(y) / |y|.

    c(y) is how often y is chosen, here out of all pairs. Neither reference nor beta is in it, and an answer
    of one token counts as much as one of three: SFT's mean over all tokens gives c itself (test_demonstrations).
    """
    r = SMALL.rewards
    chosen = torch.sigmoid(r[:, :, None] - r[:, None]).sum(-1) - 0.5  # s(0), the completion against itself, is no pair
    weights = chosen / SMALL.mask.sum(-1)
    expected = (weights / weights.sum(-1, keepdim=True)).log()
    reached = distance(SMALL.log_probs(minimise(on_all_pairs(SMALL, nll), SMALL.ref_logits)), expected)
    assert reached.gap < 1e-5, f"{reached}"


def test_unlikelihood_degenerates():
    """The mean of (2 mu - 1) (log pi_j - log pi_i) is linear in the log-probabilities, and what loses more than it wins
    has a positive coefficient: its log-probability goes to minus infinity, and the loss with it, step by step.

    KL(ref || pi) grows likewise, as pi stops saying what the reference says. KL(pi || ref) cannot in a finite world,
    where it is at most max -log ref; it goes far past pi*'s.
    """
    loss = on_all_pairs(SMALL, unlikelihood)
    stages = [descend(loss, SMALL.ref_logits, steps) for steps in (25, 100, 400)]
    policies = [SMALL.log_probs(logits) for logits in stages]
    losses = [loss(logits).item() for logits in stages]
    forward = [kl(SMALL.reference, policy).min().item() for policy in policies]
    reverse = [kl(policy, SMALL.reference).min().item() for policy in policies]
    best = kl(SMALL.optimum(BETA), SMALL.reference).min().item()
    seen = f"loss {losses}, KL(ref || pi) {forward}, KL(pi || ref) {reverse}, pi*'s {best:.2f}"
    assert losses[2] < 3 * losses[1] < 9 * losses[0] < 0, seen
    assert forward[2] > 2 * forward[1] > 4 * forward[0] > 0, seen
    assert reverse[2] > 2 * best, seen
    assert distance(SMALL.optimum(BETA), policies[2]).kl > 10, seen


def test_token_unlikelihood_is_bounded():
    """-log p and -log(1 - p) are both at least 0: there is an optimum, the same from everywhere, and not pi*.

    Two completions of a token: the loss is 2 [-mu log p - (1 - mu) log(1 - p)], least at p = mu.
    """
    two = two_completions(0.3, math.log(3), 0.0)
    found = two.log_probs(minimise(on_all_pairs(two, token_unlikelihood), two.ref_logits))
    assert found[0, 0].exp().item() == pytest.approx(3 / 4, abs=1e-6)
    loss = on_all_pairs(SMALL, token_unlikelihood)
    ends = [SMALL.log_probs(minimise(loss, start)) for start in (SMALL.ref_logits, torch.zeros_like(SMALL.ref_logits))]
    same = distance(ends[0], ends[1])
    assert same.gap < 1e-5, f"{same}"
    assert distance(ends[0], SMALL.optimum(BETA)).kl > 0.05
