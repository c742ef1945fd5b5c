"""Contrastive preference learning on all pairs: pi* with a reference, without one a uniform one's."""

import math

import pytest
import torch

from lowrank_align.objectives.paired import by_preference
from lowrank_align.objectives.segments import cpl, cpl_kl
from tests.oracle.fitting import descend, minimise, on_all_pairs, side
from tests.oracle.world import distance, make_world, two_completions

ALPHA = 0.5
SMALL = make_world(max_length=3)
PLAIN = {"cpl_alpha": ALPHA, "cpl_lambda": 1.0, "cpl_gamma": 1.0}


def test_cpl_kl_approaches_the_optimum():
    """lambda = gamma = 1: alpha (h_i - h_j) = r_i - r_j for all pairs, DPO's equation with alpha for beta."""
    found = SMALL.log_probs(minimise(on_all_pairs(SMALL, cpl_kl, **PLAIN), SMALL.ref_logits))
    reached = distance(found, SMALL.optimum(ALPHA))
    assert reached.gap < 1e-5, f"{reached}"


def test_cpl_is_the_most_random_policy():
    """alpha (log pi_i - log pi_j) = r_i - r_j: pi = e^{r/alpha} / sum, the maximum of E r + alpha H, from any start."""
    found = SMALL.log_probs(minimise(on_all_pairs(SMALL, cpl, **PLAIN), SMALL.ref_logits))
    reached = distance(found, (SMALL.rewards / ALPHA).log_softmax(-1))
    assert reached.gap < 1e-5, f"{reached}"


@pytest.mark.parametrize("loss", [cpl, cpl_kl])
def test_discount_is_a_temperature_of_each_depth(loss):
    """gamma < 1: sum_t gamma^t alpha log pi/ref = r + c(x) has one solution, by backward induction at alpha gamma^t.

    With T = alpha gamma^t, pi(a|s) = ref(a|s) e^{(Q - V) / T} and V(s) = T log sum_a ref(a|s) e^{Q / T}, the sum of
    T log pi/ref telescopes to r - V(start): later tokens are the surer ones. Without a reference ref is 1.
    """
    gamma = 0.6

    def rule(actions, ref_logps, depth):
        temperature = ALPHA * gamma**depth
        scores = actions / temperature + (ref_logps if loss is cpl_kl else 0)
        return scores.log_softmax(-1), temperature * scores.logsumexp(-1)

    knobs = PLAIN | {"cpl_gamma": gamma}
    found = SMALL.log_probs(minimise(on_all_pairs(SMALL, loss, **knobs), SMALL.ref_logits))
    reached = distance(found, SMALL.log_probs(SMALL.backward(rule)))
    assert reached.gap < 1e-5, f"{reached}"
    assert distance(found, SMALL.optimum(ALPHA)).kl > 1e-2


@pytest.mark.parametrize("lam, at_half, at_hundredth", [(1.0, math.log(2), math.log(2)), (0.5, 0.8814, 2.3979)])
def test_lambda_by_hand(lam, at_half, at_hundredth):
    """Two actions of the same probability p, preferred each way once, alpha = 1: log(1 + p^-(1 - lambda)).

    lambda 1: ln 2 whatever p. lambda 1/2: log(1 + sqrt 2) = 0.8814 at p = 1/2 and log(1 + 10) = 2.3979 at 1/100.
    """
    world = make_world(prompts=1, vocabulary=3, max_length=1)
    rows = torch.tensor([0]), torch.tensor([1])
    for p, expected in ((0.5, at_half), (0.01, at_hundredth)):
        logits = torch.tensor([[[p, p, 1 - 2 * p]]], dtype=torch.float64).log()
        first, second = (side(world, logits, row) for row in rows)
        loss = by_preference(lambda a, b: cpl(a, b, cpl_alpha=1.0, cpl_lambda=lam, cpl_gamma=1.0), first, second, 0.5)
        assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_lambda_keeps_the_policy_on_what_was_compared():
    """Two completions out of 40 are compared, equally good. lambda = 1 asks for equal probabilities and no more, so all
    the others keep what they have; below 1 the loss log(1 + e^{-(1 - lambda) S}) falls as S does rise, up to 1/2 each.
    """
    rows = torch.tensor([0]), torch.tensor([25])

    def mass_after(lam: float) -> float:
        def loss(logits):
            first, second = (side(SMALL, logits, row) for row in rows)
            knobs = PLAIN | {"cpl_lambda": lam}
            return by_preference(lambda a, b: cpl(a, b, **knobs), first, second, 0.5).sum()

        probs = SMALL.log_probs(descend(loss, SMALL.ref_logits, 300))[0].exp()
        assert probs[0].item() == pytest.approx(probs[25].item(), rel=0.02)
        return (probs[0] + probs[25]).item()

    start = SMALL.reference[0, [0, 25]].exp().sum().item()
    indifferent, conservative = mass_after(1.0), mass_after(0.5)
    seen = f"probability of the two: start {start:.3f}, lambda 1 {indifferent:.3f}, lambda .5 {conservative:.3f}"
    assert conservative > 0.99, seen
    assert indifferent < 0.6, seen


def test_lambda_moves_the_optimum():
    """Two completions, mu = s(r): with lambda < 1 even true preferences are not fitted.

    F = mu l(S1 - lam S2) + (1 - mu) l(S2 - lam S1), l = -log s, S = alpha log p: with a = s(lam S2 - S1) and
    b = s(lam S1 - S2), the derivative in log-odds is alpha [ (1-mu) b (p + lam (1-p)) - mu a ((1-p) + lam p) ] = 0.
    alpha = 1, lam = 1/2, p = 3/4: a = 1/(1 + 3/4 / (1/2)) = 2/5, b = 1/(1 + 1/4 / sqrt(3/4)) = 0.77599, so
    mu / (1 - mu) = b (7/8) / (a (5/8)) = 2.71597, where lambda 1 has p = 0.7309 for the same preference.
    """
    odds = (1 / (1 + 0.25 / math.sqrt(0.75))) * (7 / 8) / (0.4 * (5 / 8))
    assert odds == pytest.approx(2.71597, abs=1e-4)
    world = two_completions(0.5, math.log(odds), 0.0)
    knobs = {"cpl_alpha": 1.0, "cpl_gamma": 1.0}
    for lam, expected in ((0.5, 0.75), (1.0, odds / (1 + odds))):
        found = world.log_probs(minimise(on_all_pairs(world, cpl, cpl_lambda=lam, **knobs), world.ref_logits))
        assert found[0, 0].exp().item() == pytest.approx(expected, abs=1e-6)
