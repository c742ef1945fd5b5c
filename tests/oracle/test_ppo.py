"""PPO with the exact reward approaches pi*: over all completions at once, then on rollouts as the method does it."""

import pytest
import torch
from torch import Tensor

from lowrank_align.objectives.rollout import per_token_rewards, ppo_policy_loss, ppo_value_loss
from lowrank_align.tensors import KLKind, gae, reduce, whiten
from tests.oracle.fitting import descend
from tests.oracle.world import Distance, World, distance, kl, make_world, two_completions

BETA = 0.5
WORLD = make_world()


def enumerated_loss(world: World, lam: float, kind: KLKind = "k1", center: float = 0.0):
    """PPO's loss in expectation over infinitely many rollouts of the policy of now, with exact values.

    The policy of now is the old one (ratio 1), its probabilities are the weights of the completions, and a value is the
    mean over the completions that go on from there, so nothing is estimated. `center` is added to all advantages.
    """
    scores, ref_logps, mask = world.rewards.flatten(), world.per_token_logps(world.ref_logits), world.row_mask

    def loss(logits: Tensor) -> Tensor:
        new_logps = world.per_token_logps(logits)
        old_logps = new_logps.detach()
        rewards = per_token_rewards(scores, old_logps, ref_logps, mask, BETA, kind).rewards
        values = world.values(old_logps.sum(-1).view(world.rewards.shape), rewards)
        advantages = gae(rewards, values, mask, gamma=1.0, lam=lam).advantages + center
        per_token = ppo_policy_loss(new_logps, old_logps, advantages, mask, clip_range=0.2).loss
        return (old_logps.sum(-1).exp() * per_token.sum(-1)).sum()

    return loss


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_ppo_approaches_the_optimum(lam):
    """At pi* every lambda's advantages are 0: beta log(pi*/ref) per token is exactly what the value rises by.

    The soft Bellman equation: with V(s) = beta log sum_y ref(y|s) e^{r/beta}, pi* is ref(a|s) e^{(V(s') - V(s))/beta},
    so delta = -beta log(pi*/ref) + V(s') - V(s) = 0 for every token. Away from pi* the expectation of the first
    gradient is that of J, since E grad log pi = 0 takes the derivative of -beta log pi with it.
    """
    reached = distance(
        WORLD.log_probs(descend(enumerated_loss(WORLD, lam), WORLD.ref_logits, 200)), WORLD.optimum(BETA)
    )
    assert reached.gap < 1e-5, f"lambda {lam}: {reached}"


def test_gradient_is_the_objectives():
    """At the reference, for lambda 1: the gradient of PPO's loss is minus that of J, summed over prompts."""
    by_ppo = WORLD.ref_logits.clone().requires_grad_()
    enumerated_loss(WORLD, lam=1.0)(by_ppo).backward()
    by_objective = WORLD.ref_logits.clone().requires_grad_()
    WORLD.objective(WORLD.log_probs(by_objective), BETA).sum().backward()
    assert torch.allclose(by_ppo.grad, -by_objective.grad, atol=1e-12)


def test_whitening_keeps_the_optimum():
    """Whitening takes a number off every advantage. In expectation it moves nothing: E_{a~pi} grad log pi(a|s) = 0."""
    logits = WORLD.logits_of(WORLD.optimum(BETA)).requires_grad_()
    enumerated_loss(WORLD, lam=0.95, center=0.7)(logits).backward()
    assert logits.grad.abs().max().item() < 1e-12


def test_k3_in_the_reward_misses_the_optimum():
    """Why k1 stands in the reward: k3 has the right mean but, without a gradient, leads elsewhere.

    On two completions of pi_ref = 1/2 each, r = (0, 1), beta 1/2, the policy of p for the second rests where
    r - beta KL_t is the same for both. With k1 = log 2p that is log(p / (1 - p)) = 2, pi* = s(2) = 0.8808. With
    k3 = 1/(2p) - 1 + log 2p it is f(p) = 2, f(p) = 1/(2p) - 1/(2(1-p)) + log(p / (1-p)); f(1/2) = 0 and
    f'(p) = (p - 1/2) (1/p^2 - 1/(1-p)^2) <= 0, so above 1/2 there is no such p: it goes on to 1.
    """
    world = two_completions(0.5, 0.0, 1.0)
    by_k1 = world.log_probs(descend(enumerated_loss(world, lam=1.0), world.ref_logits, 150))
    by_k3 = world.log_probs(descend(enumerated_loss(world, lam=1.0, kind="k3"), world.ref_logits, 150))
    assert by_k1[0, 1].exp().item() == pytest.approx(1 / (1 + torch.e**-2), abs=1e-6)
    assert by_k3[0, 1].exp().item() > 0.99


def sampled(world: World, steps: int, rollouts: int, seed: int = 0) -> Distance:
    """The method as methods/ppo.py runs it, tables in its models' place: rollouts, learned values, whitened advantages,
    four passes in two minibatches, both losses clipped, rates annealed. Drawn by one seeded generator.
    """
    generator = torch.Generator().manual_seed(seed)
    logits, values = world.ref_logits.clone().requires_grad_(), torch.zeros(world.ref_logits.shape[:2]).double()
    optimiser = torch.optim.Adam(
        [{"params": [logits], "lr": 0.05}, {"params": [values.requires_grad_()], "lr": 0.1}], eps=1e-5
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    ref_logps, mask = world.per_token_logps(world.ref_logits), world.row_mask

    def values_of_rows() -> Tensor:
        return values[:, world.prefixes].flatten(0, 1).masked_fill(~mask, 0.0)

    for _ in range(steps):
        with torch.no_grad():
            probs = world.log_probs(logits).exp()
            drawn = torch.multinomial(probs, rollouts, replacement=True, generator=generator)
            rows = (drawn + probs.shape[1] * torch.arange(len(probs))[:, None]).flatten()
            old_logps, old_values = world.per_token_logps(logits)[rows], values_of_rows()[rows]
            rewards = per_token_rewards(world.rewards.flatten()[rows], old_logps, ref_logps[rows], mask[rows], BETA)
            advantages, returns = gae(rewards.rewards, old_values, mask[rows], gamma=1.0, lam=0.95)
            advantages = whiten(advantages, mask[rows])
        for _ in range(4):
            for part in torch.randperm(len(rows), generator=generator).chunk(2):
                optimiser.zero_grad()
                here = mask[rows[part]]
                new_logps = world.per_token_logps(logits)[rows[part]]
                policy = ppo_policy_loss(new_logps, old_logps[part], advantages[part], here, clip_range=0.2)
                new_values = values_of_rows()[rows[part]]
                value = ppo_value_loss(new_values, old_values[part], returns[part], here, clip_range_value=0.2)
                (reduce(policy.loss, here, "token_mean") + 0.1 * reduce(value.loss, here, "token_mean")).backward()
                optimiser.step()
        schedule.step()
    return distance(world.log_probs(logits), world.optimum(BETA))


def test_ppo_on_rollouts_comes_near():
    """256 rollouts a prompt and step: what is left is noise, a hundredth of the way from the reference to pi*."""
    way = kl(WORLD.reference, WORLD.optimum(BETA)).max().item()
    reached = sampled(WORLD, steps=100, rollouts=256)
    assert reached.kl < way / 50, f"{reached}, from {way:.2f} nats at the reference"
