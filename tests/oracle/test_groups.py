"""RLOO and GRPO with the exact reward, in expectation over every group that can be drawn.

A group of G answers is G completions, drawn independently: C^G groups with the products of the probabilities of now as
weights, 49 for two answers of the 7 completions here, 343 for three. The policy of now is the old one (one update a
rollout), and sums over tokens are divided by a constant, as in a large batch.
"""

import math

import pytest
import torch
from torch import Tensor

from lowrank_align.objectives.groups import group_advantages, leave_one_out
from lowrank_align.objectives.rollout import grpo_loss, rloo_loss
from lowrank_align.tensors import kl_estimate, masked_mean
from tests.oracle.fitting import descend
from tests.oracle.world import World, distance, make_world, two_completions

BETA = 0.5
WORLD = make_world(vocabulary=3, max_length=2, seed=3)
CLIP = 0.2


def all_groups(world: World, size: int) -> Tensor:
    """(P C^G, G) rows of the N completions."""
    prompts, completions = world.rewards.shape
    drawn = torch.cartesian_prod(*[torch.arange(completions)] * size)
    return (drawn + completions * torch.arange(prompts)[:, None, None]).flatten(0, 1)


def penalised(world: World, logps: Tensor) -> Tensor:
    """(N,) r - beta log pi/ref: the KL in the reward, k1 of the whole answer."""
    ref_logps = world.per_token_logps(world.ref_logits)
    return world.rewards.flatten() - BETA * kl_estimate(logps.sum(-1), ref_logps.sum(-1), "k1")


def rloo(world: World, size: int):
    """RLOO's loss as a function of logits: KL in the score, the others' mean as the baseline."""
    groups = all_groups(world, size)
    rows, mask = groups.flatten(), world.row_mask

    def loss(logits: Tensor) -> Tensor:
        logps = world.per_token_logps(logits)
        old = logps.detach()
        weights = old.sum(-1)[groups].sum(-1).exp()
        advantages = leave_one_out(penalised(world, old)[groups]).advantages.flatten()
        per_answer = rloo_loss(logps[rows], old[rows], advantages, mask[rows], CLIP).loss
        return (weights * per_answer.view(groups.shape).mean(-1)).sum()

    return loss


def grpo(world: World, size: int, scale="none", ratio="token", beta=BETA, kl_in="loss", reduction="token_mean"):
    """GRPO's loss likewise: KL by k3 in the loss, or by k1 in the score to compare."""
    groups = all_groups(world, size)
    rows, mask = groups.flatten(), world.row_mask
    ref_logps = world.per_token_logps(world.ref_logits) if kl_in == "loss" else None

    def loss(logits: Tensor) -> Tensor:
        logps = world.per_token_logps(logits)
        old = logps.detach()
        weights = old.sum(-1)[groups].sum(-1).exp()
        scores = world.rewards.flatten() if kl_in == "loss" else penalised(world, old)
        advantages = group_advantages(scores[groups], scale).advantages.flatten()
        reference = None if ref_logps is None else ref_logps[rows]
        per_token = grpo_loss(
            logps[rows], old[rows], reference, advantages, mask[rows], beta=beta, clip_range=CLIP, ratio=ratio
        ).loss
        per_answer = per_token.sum(-1) if reduction == "token_mean" else masked_mean(per_token, mask[rows], -1)
        return (weights * per_answer.view(groups.shape).mean(-1)).sum()

    return loss


def forward_kl_optimum(world: World, beta: float) -> Tensor:
    """(P, C) of the policy pi(a|s) = beta ref(a|s) / (beta + V(s) - Q(s,a)), backward from the last tokens.

    Q is the mean reward to come of this same policy, V = sum_a pi Q. With l = beta + V it is the l above max Q for
    which the probabilities sum to 1 (then sum_a pi (l - Q) = beta gives V = l - beta); found by bisection.
    """

    def rule(actions, ref_logps, depth):
        low, high = actions.max(-1).values, actions.max(-1).values + beta  # at the upper end every term is <= ref
        for _ in range(100):
            level = (low + high) / 2
            too_much = (beta * ref_logps.exp() / (level[:, None] - actions)).sum(-1) > 1
            low, high = torch.where(too_much, level, low), torch.where(too_much, high, level)
        return math.log(beta) + ref_logps - (high[:, None] - actions).log(), high - beta

    return world.log_probs(world.backward(rule))


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_approaches_the_optimum(size):
    """The others' mean does not depend on the answer: E A grad log pi = grad E[r - beta log pi/ref] = grad J.

    At pi* all answers are worth the same, r - beta log pi*/ref = beta log Z, so every group's advantages are 0.
    """
    found = WORLD.log_probs(descend(rloo(WORLD, size), WORLD.ref_logits, 300))
    reached = distance(found, WORLD.optimum(BETA))
    assert reached.gap < 1e-5, f"{reached}"


def test_rloo_gradient_is_the_objectives():
    by_rloo, by_objective = (WORLD.ref_logits.clone().requires_grad_() for _ in range(2))
    rloo(WORLD, 2)(by_rloo).backward()
    WORLD.objective(WORLD.log_probs(by_objective), BETA).sum().backward()
    assert torch.allclose(by_rloo.grad, -by_objective.grad, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_with_the_kl_in_the_score_approaches_the_optimum(size):
    """Without scaling its advantages are (G - 1) / G of RLOO's: a smaller step to the same place."""
    found = WORLD.log_probs(descend(grpo(WORLD, size, kl_in="score"), WORLD.ref_logits, 300))
    reached = distance(found, WORLD.optimum(BETA))
    assert reached.gap < 1e-5, f"{reached}"


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("size", [2, 3])
def test_grpo_approaches_a_forward_kl_optimum(size, ratio):
    """k3 in the loss, and the group's own mean as the baseline, make another optimum than pi*; here is which.

    The KL: grad k3 = (1 - ref/pi) grad log pi, whose mean over a ~ pi is -sum_a ref(a|s) grad log pi(a|s), that of
    KL(ref(.|s) || pi(.|s)) at the prefixes where the policy gets; earlier tokens are not told of later KL.
    The baseline: the mean contains the answer's own reward, so A is (G - 1) / G of RLOO's, the KL is not: in effect
    beta' = beta G / (G - 1). For every prefix and token then

        pi(a|s) (Q(s,a) - V(s)) + beta' (ref(a|s) - pi(a|s)) = 0,   pi(a|s) = beta' ref(a|s) / (beta' + V(s) - Q(s,a)).

    The sequence's ratio, exp of the mean log-ratio, has the sum of its tokens' gradients when summed over its tokens:
    the same update at the first step, so the same optimum.
    """
    found = WORLD.log_probs(descend(grpo(WORLD, size, ratio=ratio), WORLD.ref_logits, 250))
    reached = distance(found, forward_kl_optimum(WORLD, BETA * size / (size - 1)))
    assert reached.gap < 1e-5, f"G {size}: {reached}"
    from_best = distance(found, WORLD.optimum(BETA))
    assert from_best.gap > 1e-3, f"{from_best}"


def test_grpo_comes_near_the_optimum_at_large_beta():
    """Both KLs are half the squared log-ratio to second order: with beta' taken into account the difference falls as
    1 / beta^2, four times less for twice the beta.
    """
    gaps = [distance(forward_kl_optimum(WORLD, beta), WORLD.optimum(beta)).gap for beta in (8.0, 16.0, 32.0)]
    assert gaps[0] < 2e-3, f"{gaps}"
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2), f"{gaps}"
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.1), f"{gaps}"


@pytest.mark.parametrize("reward", [0.2, 3.0])
def test_scaled_groups_know_no_strength(reward):
    """Divided by the std a group of two has advantages +-c, c = (d / 2) / (d / sqrt 2 + 1e-4), about 0.7071 for any d.

    Two completions of a token, p of the better, rho in the reference: a mixed group comes 2 p (1 - p) of the time, and
    c p (1 - p) = beta (p - rho), so p = [(c - beta) + sqrt((c - beta)^2 + 4 c beta rho)] / (2c): 0.5500 at rho = .2.
    """
    world, rho, c = two_completions(0.2, reward, 0.0), 0.2, (reward / 2) / (reward / math.sqrt(2) + 1e-4)
    expected = ((c - BETA) + math.sqrt((c - BETA) ** 2 + 4 * c * BETA * rho)) / (2 * c)
    assert expected == pytest.approx(0.5500, abs=3e-4)
    found = world.log_probs(descend(grpo(world, 2, scale="std"), world.ref_logits, 300))
    assert found[0, 0].exp().item() == pytest.approx(expected, abs=1e-6)


def test_mean_over_each_answer_has_another_optimum():
    """sequence_mean gives an answer's tokens 1/n each. Where the prefix leaves n open that no longer cancels:

    after a prefix s the advantage is r - E r of the start, not of s. Against equal weights E r - V(s) drops out, since
    sum_a pi(a|s) grad log pi(a|s) = 0; against 1/n, which depends on a, it does not. At the start itself V(s) = E r, so
    two tokens are too few to see it, and completions of up to three tokens of {end, a} are enough.
    """
    world = make_world(prompts=1, vocabulary=2, max_length=3)
    expected = forward_kl_optimum(world, 2 * BETA)
    for reduction, moves in (("token_mean", False), ("sequence_mean", True)):
        found = world.log_probs(descend(grpo(world, 2, reduction=reduction), world.ref_logits, 200))
        reached = distance(found, expected)
        assert (reached.gap > 1e-3) == moves, f"{reduction}: {reached}"
        assert moves or reached.gap < 1e-5, f"{reduction}: {reached}"


def test_without_kl_the_best_takes_all():
    """beta = 0: nothing holds the policy, and the probability of each prompt's best completion goes to 1."""
    found = WORLD.log_probs(descend(grpo(WORLD, 2, beta=0.0), WORLD.ref_logits, 300))
    best = found.gather(-1, WORLD.rewards.argmax(-1, keepdim=True)).exp().min().item()
    assert best > 0.99, f"probability of the best {best:.4f}"
