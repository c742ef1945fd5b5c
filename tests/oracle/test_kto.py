"""KTO on single completions, each labelled good with its own probability: what it raises, and where that ends."""

import torch
from torch import Tensor

from lowrank_align.objectives.unpaired import kto
from tests.oracle.fitting import descend
from tests.oracle.world import distance, kl, make_world

BETA = 0.5
WORLD = make_world(max_length=3)
GOOD = torch.sigmoid(3 * WORLD.rewards)  # (P, C) how often a completion is called good


def expected_loss(logits: Tensor, desirable_weight: float = 1.0) -> Tensor:
    """KTO over completions as the reference draws them, each good GOOD of the time; z0 is the exact KL(pi || ref)."""
    log_probs = WORLD.log_probs(logits)
    logratios = log_probs - WORLD.reference
    z0 = kl(log_probs.detach(), WORLD.reference)[:, None].expand_as(logratios)
    good, bad = (
        kto(logratios, torch.full_like(GOOD, label, dtype=torch.bool), z0, beta=BETA, desirable_weight=desirable_weight)
        for label in (True, False)
    )
    return (WORLD.reference.exp() * (GOOD * good.loss + (1 - GOOD) * bad.loss)).sum()


def test_first_gradient_by_hand():
    """At pi = ref, z0 = 0: d/dh of q l_D (1 - s(beta h)) + (1 - q) l_U (1 - s(-beta h)) is

    -beta s'(0) (l_D q - l_U (1 - q)) with s'(0) = 1/4, times ref(y): a completion is raised where l_D q > l_U (1 - q).
    """
    for weight in (1.0, 0.5):
        log_probs = WORLD.reference.clone().requires_grad_()
        h = log_probs - WORLD.reference
        losses = [
            kto(h, torch.full_like(GOOD, label, dtype=torch.bool), 0.0, beta=BETA, desirable_weight=weight).loss
            for label in (True, False)
        ]
        (WORLD.reference.exp() * (GOOD * losses[0] + (1 - GOOD) * losses[1])).sum().backward()
        expected = -WORLD.reference.exp() * BETA / 4 * (weight * GOOD - (1 - GOOD))
        assert torch.allclose(log_probs.grad, expected, atol=1e-15)


def test_the_more_often_bad_dies_out():
    """The value function asks only which of good and bad is more frequent, and pushes that way for ever.

    q (1 - s(z)) + (1 - q) s(z) = q - (2q - 1) s(z) is monotone in z = beta (h - z0): for q < 1/2
    it falls as h goes to minus infinity. A proper likelihood would stop where s(z) = q. So pi* (of any reward) is not
    the end: what is bad more than half the time disappears, while the score rises.
    """
    stages = [WORLD.log_probs(descend(expected_loss, WORLD.ref_logits, steps)) for steps in (30, 300)]
    bad = [(policy.exp() * (GOOD < 0.5)).sum(-1).max().item() for policy in (WORLD.reference, *stages)]
    scores = [WORLD.expected_reward(policy).min().item() for policy in (WORLD.reference, *stages)]
    seen = f"probability of the mostly bad {bad}, score {scores}"
    assert bad[0] > 0.4, seen
    assert bad[2] < 0.01 < bad[1] < bad[0], seen
    assert scores[0] < scores[1] < scores[2], seen
    assert distance(WORLD.optimum(BETA), stages[1]).kl > 1, seen


def test_weights_move_the_threshold():
    """l_D q = l_U (1 - q): with l_D = 1/2 a completion must be good two times out of three to survive."""
    policy = WORLD.log_probs(descend(lambda logits: expected_loss(logits, 0.5), WORLD.ref_logits, 300))
    below = (policy.exp() * (GOOD < 2 / 3)).sum(-1).max().item()
    assert below < 0.01, f"probability of what is good less than 2/3 of the time {below:.3f}"
