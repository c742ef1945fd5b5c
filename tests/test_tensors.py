"""Masked statistics, KL estimators, GAE and reductions against values worked out by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.tensors import gae, kl_estimate, masked_mean, masked_sum, masked_var, reduce, same_shape, whiten

NAN, INF = math.nan, math.inf


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def grad_of(function, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_masked_sum_and_mean():
    """[[1, 2, x], [4, x, x]] under the mask: sums of rows 3 and 4, of all 7; means of rows 1.5 and 4, of all 7/3.

    x is NaN and infinity, which a product with the mask would let through (0 * inf = NaN).
    """
    x, mask = tensor([1, 2, NAN], [4, INF, -INF]), mask_of([1, 1, 0], [1, 0, 0])
    assert masked_sum(x, mask).item() == 7
    assert masked_sum(x, mask, dim=1).tolist() == [3, 4]
    assert masked_sum(x, mask.long(), dim=1).tolist() == [3, 4]
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4]
    # d mean / dx = 1 / 3 at each of the three tokens that count
    torch.testing.assert_close(grad_of(lambda x: masked_mean(x, mask), x), tensor([1, 1, 0], [1, 0, 0]) / 3)


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_var, whiten])
def test_fully_masked_is_zero_with_zero_gradient(statistic):
    """No element counts: 0, and the gradient of every element is 0, not 0 / 0."""
    x, mask = tensor([1, NAN], [INF, 2]), mask_of([0, 0], [0, 0])
    assert statistic(x, mask).abs().sum().item() == 0
    assert grad_of(lambda x: statistic(x, mask), x).tolist() == [[0, 0], [0, 0]]


def test_masked_mean_of_a_fully_masked_row_is_zero():
    """Row 1 counts 2 and 4: 3. Row 2 counts nothing: 0."""
    assert masked_mean(tensor([2, 4], [8, NAN]), mask_of([1, 1], [0, 0]), dim=1).tolist() == [3, 0]


def test_masked_var_is_unbiased():
    """1, 2, 6 have mean 3 and squared deviations 4 + 1 + 9 = 14: variance 14 / (3 - 1) = 7. One value alone: 0."""
    x = tensor([1, 2, INF], [6, NAN, 50])
    assert masked_var(x, mask_of([1, 1, 0], [1, 0, 0])).item() == pytest.approx(7)
    assert masked_var(x, mask_of([1, 0, 0], [0, 0, 0])).item() == 0


def test_whiten_by_hand():
    """1, 2, 6: mean 3, variance 7 (above), so (x - 3) / sqrt(7) = -2, -1, 3 over 2.6457513; else 3 more; 0 at pads."""
    x, mask = tensor([1, 2, INF], [6, NAN, 50]), mask_of([1, 1, 0], [1, 0, 0])
    root = math.sqrt(7)
    torch.testing.assert_close(whiten(x, mask), tensor([-2, -1, 0], [3, 0, 0]) / root)
    torch.testing.assert_close(
        whiten(x, mask, center=False), tensor([3 - 2 / root, 3 - 1 / root, 0], [3 + 3 / root, 0, 0])
    )


def test_whiten_gives_mean_0_and_variance_1_under_the_mask():
    """Statistics by torch on the selected elements alone."""
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 11, generator=generator) < 0.6
    selected = whiten(x, mask)[mask]
    assert selected.mean().item() == pytest.approx(0, abs=1e-12)
    assert selected.var(unbiased=True).item() == pytest.approx(1, abs=1e-8)
    selected = whiten(x, mask, center=False)[mask]
    assert selected.mean().item() == pytest.approx(x[mask].mean().item())
    assert selected.var(unbiased=True).item() == pytest.approx(1, abs=1e-8)


def test_whiten_of_equal_values_stays_finite():
    """Variance 0: (2 - 2) / sqrt(0 + 1e-8) = 0."""
    assert whiten(tensor([2, 2, 2]), mask_of([1, 1, 1])).tolist() == [[0, 0, 0]]


def test_kl_estimators_by_hand():
    """d = ln 2 and -ln 2, from logp -1 against -1 - ln 2 and -1 + ln 2.

    k1: 0.693147, -0.693147;  k2: (ln 2)^2 / 2 = 0.240227 twice;
    k3: exp(-ln 2) - 1 + ln 2 = 0.193147 and exp(ln 2) - 1 - ln 2 = 0.306853.
    """
    logps, ref_logps = tensor(-1, -1), tensor(-1 - math.log(2), -1 + math.log(2))
    assert kl_estimate(logps, ref_logps, "k1").tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    assert kl_estimate(logps, ref_logps, "k2").tolist() == pytest.approx([0.240227, 0.240227], abs=1e-6)
    assert kl_estimate(logps, ref_logps, "k3").tolist() == pytest.approx([0.193147, 0.306853], abs=1e-6)


def test_kl_estimators_in_expectation():
    """p = (1/2, 1/2) against q = (1/4, 3/4): KL = (ln 2 + ln 2/3) / 2 = ln(4/3) / 2 = 0.143841.

    E_p k1 is KL by definition, E_p k3 = sum q - 1 + KL = KL; E_p k2 = ((ln 2)^2 + (ln 2/3)^2) / 4 = 0.161214 is not.
    """
    p, q = tensor(0.5, 0.5), tensor(0.25, 0.75)
    expected = {
        kind: (p * kl_estimate(p.log(), q.log(), kind)).sum().item()  # type: ignore[arg-type]
        for kind in ("k1", "k2", "k3")
    }
    assert expected == pytest.approx({"k1": 0.143841, "k2": 0.161214, "k3": 0.143841}, abs=1e-6)


def test_k3_keeps_its_digits_near_zero():
    """k3 = d^2 / 2 - d^3 / 6 + ... is 4.9998e-9 for d = 1e-4; float32 rounds exp(-d) by up to 3e-8, six times that."""
    d = torch.tensor([1e-4], dtype=torch.float32)
    assert kl_estimate(d, torch.zeros(1), "k3").item() == pytest.approx(4.9998e-9, rel=0.01)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_gradcheck(kind):
    """Finite differences in float64."""
    assert gradcheck(lambda a, b: kl_estimate(a, b, kind), (tensor(-1, -2).requires_grad_(), tensor(-3, -1)))


def test_gae_by_hand():
    """Three tokens and a pad with garbage in it; gamma = lambda = 0.5, so gamma * lambda = 0.25.

    delta_2 = 3 + 0 - 1.5 = 1.5 (nothing follows)       A_2 = 1.5                            return 3
    delta_1 = 2 + 0.5 * 1.5 - 1 = 1.75                  A_1 = 1.75 + 0.25 * 1.5 = 2.125      return 3.125
    delta_0 = 1 + 0.5 * 1 - 0.5 = 1                     A_0 = 1 + 0.25 * 2.125 = 1.53125     return 2.03125
    """
    rewards, values = tensor([1, 2, 3, 99]), tensor([0.5, 1, 1.5, NAN])
    result = gae(rewards, values, mask_of([1, 1, 1, 0]), gamma=0.5, lam=0.5)
    assert result.advantages.tolist() == [[1.53125, 2.125, 1.5, 0]]
    assert result.returns.tolist() == [[2.03125, 3.125, 3, 0]]


def test_gae_steps_over_masked_tokens():
    """The same three tokens with gaps before, between and after them: the same numbers at their places."""
    rewards, values = tensor([7, 1, 9, 2, 3, 99]), tensor([INF, 0.5, NAN, 1, 1.5, 77])
    result = gae(rewards, values, mask_of([0, 1, 0, 1, 1, 0]), gamma=0.5, lam=0.5)
    assert result.advantages.tolist() == [[0, 1.53125, 0, 2.125, 1.5, 0]]
    assert result.returns.tolist() == [[0, 2.03125, 0, 3.125, 3, 0]]


def test_gae_with_lambda_1_is_monte_carlo_and_with_0_one_step():
    """gamma 1, rewards 1, 2, 3, values 10, 20, 30.

    lambda 1: rewards to go 6, 5, 3 are the returns; advantages 6 - 10, 5 - 20, 3 - 30.
    lambda 0: advantages 1 + 20 - 10 = 11, 2 + 30 - 20 = 12, 3 - 30 = -27.
    """
    rewards, values, mask = tensor([1, 2, 3]), tensor([10, 20, 30]), mask_of([1, 1, 1])
    monte_carlo = gae(rewards, values, mask, gamma=1, lam=1)
    assert monte_carlo.returns.tolist() == [[6, 5, 3]]
    assert monte_carlo.advantages.tolist() == [[-4, -15, -27]]
    assert gae(rewards, values, mask, gamma=1, lam=0).advantages.tolist() == [[11, 12, -27]]


def test_gae_of_empty_rows_is_zero_and_carries_no_gradient():
    """A row without tokens gives zeros, beside a row of one: A = 5 - 2 = 3."""
    values = tensor([2, 9], [NAN, INF]).requires_grad_()
    result = gae(tensor([5, 9], [9, 9]), values, mask_of([1, 0], [0, 0]), gamma=1, lam=0.95)
    assert result.advantages.tolist() == [[3, 0], [0, 0]]
    assert result.returns.tolist() == [[5, 0], [0, 0]]
    assert not result.advantages.requires_grad and not result.returns.requires_grad


def test_reduce_by_hand():
    """[1, 2, 3], [6, -, -], [-, -, -]: sum 12; of 4 tokens 3; of the 2 sequences with any 6; over a given 24 0.5.

    Their means are 2 and 6: of the 2 sequences 4, over a given 16 0.5.
    """
    x, mask = tensor([1, 2, 3], [6, NAN, INF], [NAN, INF, 1]), mask_of([1, 1, 1], [1, 0, 0], [0, 0, 0])
    assert reduce(x, mask, "token_mean").item() == 3
    assert reduce(x, mask, "sequence_mean_token_sum").item() == 6
    assert reduce(x, mask, "sequence_mean").item() == 4
    assert reduce(x, mask, "sequence_mean", normaliser=16).item() == 0.5
    assert reduce(x, mask, "token_mean", normaliser=24).item() == 0.5
    assert reduce(x, mask, "sequence_mean_token_sum", normaliser=torch.tensor(24)).item() == 0.5


@pytest.mark.parametrize("normaliser", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_mean_token_sum"])
def test_reduce_of_nothing_is_zero_with_zero_gradient(how, normaliser):
    """No token counts: 0 / 0 is taken as 0."""
    x, mask = tensor([1, NAN]), mask_of([0, 0])
    assert reduce(x, mask, how, normaliser).item() == 0
    assert grad_of(lambda x: reduce(x, mask, how, normaliser), x).tolist() == [[0, 0]]


@pytest.mark.parametrize(("how", "normaliser"), [("token_mean", 6), ("sequence_mean_token_sum", 3)])
def test_micro_batches_add_up_to_the_batch(how, normaliser):
    """Rows of 3, 1 and 2 tokens, 6 in all: three micro-batches of one, divided by the whole count, equal the batch.

    So do the gradients; a mean of the three means, (2 + 10 + 3) / 3 = 5 against 22 / 6, would not.
    """
    x, mask = tensor([1, 2, 3], [10, 0, 0], [2, 4, 0]), mask_of([1, 1, 1], [1, 0, 0], [1, 1, 0])

    def accumulated(x):
        return sum(reduce(x[i : i + 1], mask[i : i + 1], how, normaliser) for i in range(3))

    assert accumulated(x).item() == pytest.approx(22 / normaliser)
    assert reduce(x, mask, how).item() == pytest.approx(22 / normaliser)
    torch.testing.assert_close(grad_of(accumulated, x), mask / normaliser, check_dtype=False)
    torch.testing.assert_close(grad_of(lambda x: reduce(x, mask, how), x), mask / normaliser, check_dtype=False)


@pytest.mark.parametrize(
    "function",
    [
        masked_mean,
        masked_var,
        lambda x, mask: whiten(x, mask),
        lambda x, mask: whiten(x, mask, center=False),
        lambda x, mask: reduce(x, mask, "token_mean"),
        lambda x, mask: reduce(x, mask, "sequence_mean_token_sum"),
    ],
)
def test_gradcheck_and_padding_invariance(function):
    """Finite differences in float64; two columns of padding on the right change neither value nor gradient."""
    x, mask = tensor([1, 2.5, -1], [0.5, 4, 9]), mask_of([1, 1, 1], [1, 1, 0])
    assert gradcheck(lambda x: function(x, mask), (x.clone().requires_grad_(),))

    padded_x = torch.cat([x, tensor([NAN, 5], [INF, 6])], dim=1)
    padded_mask = torch.cat([mask, mask_of([0, 0], [0, 0])], dim=1)
    plain, padded = function(x, mask), function(padded_x, padded_mask)
    torch.testing.assert_close(padded if padded.dim() == 0 else padded[:, :3], plain)
    weights = tensor(1, 2, 3, 0, 0)  # of the whitened columns: their plain sum is constant, its gradient 0
    plain_grad = grad_of(lambda x: function(x, mask) * weights[:3], x)
    padded_grad = grad_of(lambda x: function(x, padded_mask) * weights, padded_x)
    torch.testing.assert_close(padded_grad[:, :3], plain_grad)
    assert plain_grad.abs().max() > 0 and padded_grad[:, 3:].abs().max() == 0


def test_mistakes_are_named():
    """Unknown names list the known ones, differing shapes are shown instead of broadcast."""
    x, mask = tensor([1, 2]), mask_of([1, 1])
    with pytest.raises(ValueError, match="kind: 'k4' is no KL estimator .known: k1, k2, k3"):
        kl_estimate(x, x, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="how: 'mean' is no reduction .known: token_mean"):
        reduce(x, mask, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shapes differ: a \(1, 2\), b \(2,\)"):
        same_shape(a=x, b=x[0])
    with pytest.raises(ValueError, match="shapes differ"):
        masked_sum(x, mask[0])
