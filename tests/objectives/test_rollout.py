"""PPO's rewards, losses and KL controller against values worked out by hand."""

import json
import math

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.objectives.rollout import (
    AdaptiveKL,
    penalise_unfinished,
    per_token_rewards,
    ppo_policy_loss,
    ppo_value_loss,
)

NAN, INF, LN2 = math.nan, math.inf, math.log(2)


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def test_per_token_rewards_by_hand():
    """Coefficient 0.1, log-ratios (1, -2, pad) and (0.5, 0, 3), scores 7 and -4.

    Row 0 ends at its second token: -0.1, 0.2 + 7, 0. Row 1 at its third: -0.05, 0, -0.3 - 4.
    """
    logps, ref_logps = tensor([-1, -3, INF], [-1, -1, -1]), tensor([-2, -1, NAN], [-1.5, -1, -4])
    result = per_token_rewards(tensor(7, -4), logps, ref_logps, mask_of([1, 1, 0], [1, 1, 1]), kl_coefficient=0.1)
    torch.testing.assert_close(result.rewards, tensor([-0.1, 7.2, 0], [-0.05, 0, -4.3]))
    torch.testing.assert_close(result.kl, tensor([1, -2, 0], [0.5, 0, 3]))


def test_per_token_rewards_with_k3():
    """d = ln 2: k3 = 1/2 - 1 + ln 2 = 0.193147; coefficient 2: -0.386294, and the score 1 on top: 0.613706."""
    result = per_token_rewards(tensor(1), tensor([-1]), tensor([-1 - LN2]), mask_of([1]), kl_coefficient=2, kl="k3")
    assert result.kl.item() == pytest.approx(0.193147, abs=1e-6)
    assert result.rewards.item() == pytest.approx(0.613706, abs=1e-6)


def test_per_token_rewards_of_a_row_without_tokens():
    """No token to put the score on: zeros, even for a score that is NaN; the other row keeps its 3."""
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    result = per_token_rewards(tensor(NAN, 3), zeros, zeros, mask_of([0, 0], [1, 0]), kl_coefficient=0.1)
    assert result.rewards.tolist() == [[0, 0], [3, 0]]
    assert result.kl.abs().sum() == 0


def test_per_token_rewards_carry_no_gradient():
    """Rewards are constants to PPO, also when the log-probabilities were computed with gradients."""
    logps = tensor([-1, -2]).requires_grad_()
    result = per_token_rewards(tensor(1), logps, tensor([-1, -1]), mask_of([1, 1]), kl_coefficient=0.1)
    assert not result.rewards.requires_grad and not result.kl.requires_grad


def test_policy_loss_by_hand():
    """clip 0.2, so the ratio is held to [0.8, 1.2]; ratios 1.5, 1.5, 0.5, 0.5, 1.1 and a pad.

    A = 2, rho = 1.5: max(-3, -2.4) = -2.4, clipped.      A = -2, rho = 1.5: max(3, 2.4) = 3.
    A = 2, rho = 0.5: max(-1, -1.6) = -1.                 A = -2, rho = 0.5: max(1, 1.6) = 1.6, clipped.
    A = 2, rho = 1.1: -2.2.                               pad: 0, ratio 1.
    Gradient with respect to log rho: -A rho where not clipped, else 0. approx_kl = (log rho)^2 / 2.
    """
    ratios = [1.5, 1.5, 0.5, 0.5, 1.1]
    new = tensor([math.log(ratio) - 1 for ratio in ratios] + [INF]).requires_grad_()
    old, advantages = tensor([-1, -1, -1, -1, -1, NAN]), tensor([2, -2, 2, -2, 2, INF])
    result = ppo_policy_loss(new, old, advantages, mask_of([1, 1, 1, 1, 1, 0]), clip_range=0.2)
    torch.testing.assert_close(result.loss, tensor([-2.4, 3, -1, 1.6, -2.2, 0]))
    torch.testing.assert_close(result.ratio, tensor([*ratios, 1]))
    assert result.clipped.tolist() == [[1, 0, 0, 1, 0, 0]]
    torch.testing.assert_close(result.approx_kl, tensor([math.log(ratio) ** 2 / 2 for ratio in ratios] + [0]))
    assert not any(metric.requires_grad for metric in result[1:])

    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, tensor([0, 3, -1, 0, -2.2, 0]))


def test_policy_loss_at_the_old_policy_is_minus_the_advantage():
    """rho = 1: loss -A, its gradient -A (the policy gradient), nothing clipped, KL 0."""
    new, advantages = tensor([-1, -2]).requires_grad_(), tensor([0.5, -3])
    result = ppo_policy_loss(new, new.detach().clone(), advantages, mask_of([1, 1]), clip_range=0.2)
    result.loss.sum().backward()
    assert result.loss.tolist() == [[-0.5, 3]]
    torch.testing.assert_close(new.grad, tensor([-0.5, 3]))
    assert result.clipped.sum() == 0 and result.approx_kl.sum() == 0


def test_value_loss_by_hand():
    """clip 0.2, old value 1, so the new one is held to [0.8, 1.2].

    V = 2, R = 3: 0.5 max(1, (1.2 - 3)^2 = 3.24) = 1.62, clipped, gradient 0.
    V = 2, R = 0: 0.5 max(4, 1.44) = 2, gradient V - R = 2.
    V = 1.1, R = 3: inside, 0.5 * 1.9^2 = 1.805, gradient -1.9.
    V = 0, R = 0: 0.5 max(0, 0.64) = 0.32, clipped, gradient 0.          pad: 0.
    """
    new = tensor([2, 2, 1.1, 0, NAN]).requires_grad_()
    old, returns = tensor([1, 1, 1, 1, INF]), tensor([3, 0, 3, 0, NAN])
    result = ppo_value_loss(new, old, returns, mask_of([1, 1, 1, 1, 0]), clip_range_value=0.2)
    torch.testing.assert_close(result.loss, tensor([1.62, 2, 1.805, 0.32, 0]))
    assert result.clipped.tolist() == [[1, 0, 0, 1, 0]]
    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, tensor([0, 2, -1.9, 0, 0]))


def test_infinite_value_clip_is_the_plain_squared_error():
    """V = 2, R = 3: 0.5; V = -5, R = 1: 18."""
    result = ppo_value_loss(tensor([2, -5]), tensor([0, 0]), tensor([3, 1]), mask_of([1, 1]), clip_range_value=INF)
    assert result.loss.tolist() == [[0.5, 18]]
    assert result.clipped.sum() == 0


@pytest.mark.parametrize("mask", [mask_of([1, 1, 1], [1, 0, 0]), mask_of([1, 1, 0], [0, 0, 0])])
def test_gradcheck_with_padding_and_empty_rows(mask):
    """Finite differences in float64, away from the corners of the clips; garbage under the mask."""
    new = tensor([-1, -2.4, -3], [-0.5, -1, -2]).requires_grad_()
    old = tensor([-1.1, -1.8, -3.5], [-1.3, -1, -2]).masked_fill(~mask, NAN)
    advantages = tensor([1, -1, 0.5], [-2, 1, 1]).masked_fill(~mask, INF)
    assert gradcheck(lambda new: ppo_policy_loss(new, old, advantages, mask, 0.2).loss, (new,))
    assert gradcheck(lambda new: ppo_value_loss(new, old, advantages, mask, 0.2).loss, (new,))


def test_padding_columns_change_nothing():
    """Two columns of infinities and NaN under a mask of 0: values and gradients stay as they were, and are 0 there."""
    generator = torch.Generator().manual_seed(3)
    new, old, other = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    mask, scores = mask_of([1, 1, 1, 1], [1, 1, 0, 0]), tensor(1, 2)
    garbage, empty = tensor([NAN, INF], [-INF, 1]), mask_of([0, 0], [0, 0])

    def pad(x, filler=garbage):
        return torch.cat([x, filler], dim=1)

    def outcomes(new, old, other, mask):
        new = new.clone().requires_grad_()
        policy, value = ppo_policy_loss(new, old, other, mask, 0.2), ppo_value_loss(new, old, other, mask, 0.2)
        (policy.loss.sum() + value.loss.sum()).backward()
        rewards = per_token_rewards(scores, new, other, mask, kl_coefficient=0.1)
        return [new.grad, policy.loss, value.loss, policy.clipped, policy.approx_kl, value.clipped, *rewards]

    plain = outcomes(new, old, other, mask)
    padded = outcomes(pad(new), pad(old), pad(other), pad(mask, empty))
    for before, after in zip(plain, padded, strict=True):
        torch.testing.assert_close(after[:, :4], before)
        assert after[:, 4:].abs().sum() == 0


def test_penalise_unfinished():
    """Penalty 1.5: the finished 2 stays, the unfinished 3 becomes 1.5."""
    assert penalise_unfinished(tensor(2, 3), mask_of(1, 0), penalty=1.5).tolist() == [2, 1.5]


def test_adaptive_kl_by_hand():
    """Target 4 nats, horizon 100, 10 responses, so n / horizon = 0.1; from 0.5.

    KL 4.4: error 0.1, factor 1.01: 0.505.    KL 40: error clipped to 0.2, factor 1.02: 0.5151.
    KL 0 and KL -3 (k1 may be negative): error clipped to -0.2, factor 0.98 each: 0.504798, 0.49470204.
    """
    controller = AdaptiveKL(0.5, target_nats=4, horizon=100)
    updates = [controller.update(kl, num_responses=10) for kl in (4.4, 40, 0, -3)]
    assert updates == pytest.approx([0.505, 0.5151, 0.504798, 0.49470204])
    assert controller.coefficient == updates[-1]


def test_adaptive_kl_ignores_what_is_not_finite_and_never_changes_sign():
    """NaN and infinity leave 0.5. 1000 responses at horizon 100 count as 100: factor 0.8, where 1 - 0.2 * 10 is -1."""
    controller = AdaptiveKL(0.5, target_nats=4, horizon=100)
    assert controller.update(NAN, 10) == 0.5
    assert controller.update(INF, 10) == 0.5
    assert controller.update(0, 1000) == pytest.approx(0.4)


def test_adaptive_kl_resumes_from_json():
    """0.5 * 1.02 (above) goes through JSON and comes back the same bits."""
    controller = AdaptiveKL(0.5, target_nats=4, horizon=100)
    controller.update(40, 10)
    resumed = AdaptiveKL(0.1, target_nats=4, horizon=100)
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert resumed.coefficient == controller.coefficient == pytest.approx(0.51)


def test_shapes_are_checked():
    """Scores (2, 1) for two responses would broadcast: refused."""
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"shapes differ: scores \(2, 1\), responses \(2,\)"):
        per_token_rewards(torch.zeros(2, 1), zeros, zeros, mask, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        ppo_policy_loss(zeros, zeros, zeros[:1], mask, clip_range=0.2)
