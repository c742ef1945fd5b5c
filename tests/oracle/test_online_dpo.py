"""Online DPO: pairs drawn from the policy of now, weighted by its probabilities; labels with and without noise."""

import torch
from torch import Tensor

from lowrank_align.objectives.paired import by_preference, sigmoid
from tests.oracle.fitting import descend, side
from tests.oracle.world import distance, kl, make_world

BETA = 0.5
WORLD = make_world(max_length=3)
PAIRS = WORLD.pairs()


def on_own_pairs(preference: Tensor):
    """DPO's loss over two answers of the policy of now that differ, 2 pi(i) pi(j) each, summed over prompts."""

    def loss(logits: Tensor) -> Tensor:
        policy = side(WORLD, logits, torch.arange(len(WORLD.row_mask)))
        log_weights = policy.logps.detach()[PAIRS.first] + policy.logps.detach()[PAIRS.second]
        first, second = policy.at(PAIRS.first), policy.at(PAIRS.second)
        per_pair = by_preference(lambda a, b: sigmoid(a, b, beta=BETA), first, second, preference)
        return (2 * log_weights.exp() * per_pair).sum()

    return loss


def test_true_preferences_approach_the_optimum():
    """pi* fits every pair, s(beta (h_i - h_j)) = mu_ij, so the gradient is 0 there however pairs are drawn."""
    found = WORLD.log_probs(descend(on_own_pairs(PAIRS.preference), WORLD.ref_logits, 250, learning_rate=0.2))
    reached = distance(found, WORLD.optimum(BETA))
    assert reached.gap < 1e-4, f"{reached}"


def test_higher_score_wins_goes_past_the_optimum():
    """As the command does it: the higher score is chosen surely. -log s has no least value then, so margins grow for as
    long as it trains: the score passes pi*'s at a higher KL, and the best completion takes more and more.
    """
    surely = (PAIRS.preference > 0.5).double()
    stages = [WORLD.log_probs(descend(on_own_pairs(surely), WORLD.ref_logits, steps)) for steps in (20, 100, 200)]
    best = WORLD.rewards.argmax(-1, keepdim=True)
    of_best = [policy.gather(-1, best).exp().min().item() for policy in (WORLD.optimum(BETA), *stages)]
    scores = [WORLD.expected_reward(policy).min().item() for policy in (WORLD.optimum(BETA), *stages)]
    kls = [kl(policy, WORLD.reference).min().item() for policy in (WORLD.optimum(BETA), *stages)]
    seen = f"pi*, then after 20, 100, 200 steps: score {scores}, KL {kls}, probability of the best {of_best}"
    assert scores[1] < scores[2] < scores[3] and scores[0] < scores[2], seen
    assert kls[1] < kls[2] < kls[3] and kls[0] < kls[2], seen
    assert of_best[1] < of_best[2] < of_best[3], seen
