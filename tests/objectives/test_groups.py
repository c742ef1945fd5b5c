"""Group advantages, and GRPO's and RLOO's losses, against values worked out by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.objectives.groups import group_advantages, leave_one_out
from lowrank_align.objectives.rollout import grpo_loss, rloo_loss
from lowrank_align.tensors import reduce

NAN, INF, LN2 = math.nan, math.inf, math.log(2)


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


# ---- advantages


def test_group_advantages_by_hand():
    """1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, std sqrt(14 / 3) = 2.160247, with 1e-4 on it 2.160347.

    So -0.925777, -0.462888, 0, 1.388665. In the second group all are 5.
    """
    result = group_advantages(tensor([1, 2, 3, 6], [5, 5, 5, 5]))
    expected = tensor([-0.925777, -0.462888, 0, 1.388665], [0, 0, 0, 0])
    torch.testing.assert_close(result.advantages, expected, rtol=0, atol=1e-6)
    assert result.without_variance.tolist() == [False, True]
    assert group_advantages(tensor([1, 2, 3, 6]), "none").advantages.tolist() == [[-2, -1, 0, 3]]


def test_leave_one_out_by_hand():
    """1 against (2 + 3 + 6) / 3, 2 against 10 / 3, 3 against 3, 6 against 2: -8/3, -4/3, 0, 4."""
    result = leave_one_out(tensor([1, 2, 3, 6], [7, 7, 7, 7]))
    torch.testing.assert_close(result.advantages, tensor([-8 / 3, -4 / 3, 0, 4], [0, 0, 0, 0]))
    assert result.without_variance.tolist() == [False, True]


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out])
def test_equal_scores_are_exactly_0(advantages):
    """Seven times 0.1 in fp32 has a mean that is not 0.1: the last digit must not be divided by a std of as little."""
    scores = torch.full((1, 7), 0.1)
    assert (scores - scores.mean()).abs().max() > 0 or (scores.sum() - scores - 6 * scores).abs().max() > 0
    result = advantages(scores)
    assert result.advantages.tolist() == [[0] * 7]
    assert result.without_variance.tolist() == [True]


@pytest.mark.parametrize("advantages", [group_advantages, leave_one_out])
@pytest.mark.parametrize("scores", [[[1.0], [2.0]], [1.0, 2.0]])
def test_a_group_of_one_has_no_baseline(advantages, scores):
    with pytest.raises(ValueError, match="answers of each, at least 2"):
        advantages(torch.tensor(scores))


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="'range' is no scale"):
        group_advantages(tensor([1, 2]), "range")
    with pytest.raises(ValueError, match="'row' is no ratio"):
        grpo_loss(*[tensor([0])] * 2, None, tensor(1), mask_of([1]), beta=0, clip_range=0.2, ratio="row")


# ---- GRPO


def test_grpo_loss_by_hand():
    """clip 0.2, high 0.5: rho held to [0.8, 1.5]; beta 0.1; ref twice as likely: k3 = 2 - ln 2 - 1 = 0.306853.

    A = 2: rho 1.4: -2.8; rho 1.6: -min(3.2, 3) = -3, clipped high; rho 0.5: -1; pad.
    A = -2: rho 1.4: 2.8; rho 0.5: -min(-1, -1.6) = 1.6, clipped low; pads, whatever stands there.
    Every token has 0.0306853 on top. Without a high one, 1.4 with A = 2 is clipped to -2.4.
    """
    ratios = [[1.4, 1.6, 0.5], [1.4, 0.5, 1]]
    old = tensor([-1, -1, -1], [-1, -1, NAN])
    new = tensor(*[[math.log(r) - 1 for r in row] for row in ratios])
    new[1, 2] = INF
    ref, mask = new + LN2, mask_of([1, 1, 1], [1, 1, 0])
    result = grpo_loss(new, old, ref, tensor(2, -2), mask, beta=0.1, clip_range=0.2, clip_range_high=0.5)
    kl = 0.3068528
    expected = tensor([-2.8, -3, -1], [2.8, 1.6, 0]) + 0.1 * kl * mask
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(result.ratio, tensor([1.4, 1.6, 0.5], [1.4, 0.5, 1]))
    assert result.clipped_high.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert result.clipped_low.tolist() == [[0, 0, 0], [0, 1, 0]]
    torch.testing.assert_close(result.kl, kl * mask.double(), rtol=0, atol=1e-6)
    plain = grpo_loss(new, old, None, tensor(2, -2), mask, beta=0.1, clip_range=0.2)
    torch.testing.assert_close(plain.loss, tensor([-2.4, -2.4, -1], [2.8, 1.6, 0]))
    assert plain.kl.abs().sum() == 0


def test_grpo_of_a_whole_sequence_by_hand():
    """Log-ratios 0.3, 0.1 and a pad: rho = e^0.2 = 1.221403 for both tokens, A = 1.

    eps 0.3: -rho each; each token's gradient is 2 x -rho / 2 = -rho. eps 0.2: -1.2 each, no gradient.
    """
    old, mask, one = tensor([-2, -2, NAN]), mask_of([1, 1, 0]), tensor(1)
    new = tensor([-1.7, -1.9, INF]).requires_grad_()
    result = grpo_loss(new, old, None, one, mask, beta=0, clip_range=0.3, ratio="sequence")
    torch.testing.assert_close(result.loss.detach(), tensor([-1.2214028, -1.2214028, 0]), rtol=0, atol=1e-6)
    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, tensor([-1.2214028, -1.2214028, 0]), rtol=0, atol=1e-6)
    held = grpo_loss(new, old, None, one, mask, beta=0, clip_range=0.2, ratio="sequence")
    torch.testing.assert_close(held.loss.detach(), tensor([-1.2, -1.2, 0]))
    assert held.clipped_high.tolist() == [[1, 1, 0]]


def test_grpo_reductions():
    """Losses -1, -1, -1 (A = 1) and 4 (A = -4): over tokens (-3 + 4) / 4, over sequences (-1 + 4) / 2."""
    logps, mask = tensor([-1, -1, -1], [-1, 0, 0]), mask_of([1, 1, 1], [1, 0, 0])
    loss = grpo_loss(logps, logps, None, tensor(1, -4), mask, beta=0, clip_range=0.2).loss
    assert reduce(loss, mask, "token_mean").item() == pytest.approx(0.25)
    assert reduce(loss, mask, "sequence_mean").item() == pytest.approx(1.5)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_grpo_gradients(ratio):
    """Away from the clip's corners; A of both signs, so clipped and free tokens of both kinds."""
    generator = torch.Generator().manual_seed(0)
    old, ref = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    new = (old + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = mask_of([1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0])
    advantages = tensor(1.5, -0.5, -2, 1)

    def loss(new):
        return grpo_loss(new, old, ref, advantages, mask, beta=0.3, clip_range=0.2, ratio=ratio).loss

    assert gradcheck(loss, (new,))


def test_at_the_first_update_it_is_the_policy_gradient():
    """new = old: the loss is -A per token and its gradient -A, what REINFORCE with a baseline has."""
    logps = tensor([-1, -2], [-3, -1]).requires_grad_()
    mask, advantages = mask_of([1, 1], [1, 0]), tensor(2, -3)
    for ratio in ("token", "sequence"):
        loss = grpo_loss(logps, logps.detach(), None, advantages, mask, beta=0, clip_range=0.2, ratio=ratio).loss
        assert loss.tolist() == [[-2, -2], [3, 0]]
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert gradient.tolist() == [[-2, -2], [3, 0]]


# ---- RLOO


def test_rloo_loss_by_hand():
    """Sums of log-ratios: 0.3 + 0.1 (A = 1), -0.5 (A = -2), 0.1 (A = 3); eps 0.2.

    rho 1.491825: -1.2, clipped high. rho 0.606531: -min(-1.213061, -1.6) = 1.6, clipped low. rho 1.105171: -3.315513.
    """
    old = tensor([-2, -2], [-1, NAN], [-1, NAN])
    new = tensor([-1.7, -1.9], [-1.5, INF], [-0.9, 7]).requires_grad_()
    result = rloo_loss(new, old, tensor(1, -2, 3), mask_of([1, 1], [1, 0], [1, 0]), clip_range=0.2)
    torch.testing.assert_close(result.loss.detach(), tensor(-1.2, 1.6, -3.3155128), rtol=0, atol=1e-6)
    assert (result.clipped_high.tolist(), result.clipped_low.tolist()) == ([1, 0, 0], [0, 1, 0])
    result.loss.sum().backward()
    torch.testing.assert_close(new.grad, tensor([0, 0], [0, 0], [-3.3155128, 0]), rtol=0, atol=1e-6)


def test_rloo_gradients():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    new = (old + 0.3 * torch.randn(5, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = mask_of([1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0])
    assert gradcheck(lambda new: rloo_loss(new, old, tensor(1, -1, 2, -2, 0.5), mask, 0.2).loss, (new,))
