"""Bradley-Terry, DPO, IPO and hinge against values worked out by hand, their identities, and TRL's functions."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.objectives.paired import bradley_terry, centring, dpo, mean_per_row

LN2 = math.log(2)
KINDS = ["sigmoid", "ipo", "hinge"]


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def dpo_of(logratio_first, logratio_second, *, tokens=(1, 1), **options):
    """`dpo` on log-ratios alone: the reference's log-probabilities are -5 and -6."""
    first, second = tensor(*logratio_first), tensor(*logratio_second)
    return dpo(
        logps_first=first - 5,
        logps_second=second - 6,
        ref_logps_first=torch.full_like(first, -5),
        ref_logps_second=torch.full_like(second, -6),
        num_tokens_first=torch.full_like(first, tokens[0], dtype=torch.long),
        num_tokens_second=torch.full_like(first, tokens[1], dtype=torch.long),
        **options,
    )


def test_bradley_terry_by_hand():
    """-log s(D) = log(1 + e^-D), with e^-D a simple number: D = ln 3, 0, -ln 3 give log 4/3, log 2, log 4."""
    first, second = tensor(math.log(3) + 7, 2, 0), tensor(7, 2, math.log(3))
    result = bradley_terry(first, second)
    assert result.loss.tolist() == pytest.approx([math.log(4 / 3), LN2, math.log(4)])
    assert result.chosen_scores.tolist() == first.tolist()
    assert result.rejected_scores.tolist() == second.tolist()
    assert result.margins.tolist() == pytest.approx([math.log(3), 0, -math.log(3)])
    assert result.accuracies.tolist() == [1, 0, 0]
    assert result.decided.tolist() == [True, True, True]


def test_bradley_terry_soft_labels_by_hand():
    """D = ln 3: log s(D) = -log 4/3 and log s(-D) = -log 4.

    mu = 0: log 4.  mu = 1/2: (log 4/3 + log 4) / 2.  mu = 3/4: 3/4 log 4/3 + 1/4 log 4, the entropy of (3/4, 1/4), the
    least it can be, since s(ln 3) = 3/4.
    """
    first, second = tensor(*[math.log(3)] * 3).requires_grad_(), tensor(0, 0, 0)
    result = bradley_terry(first, second, preference=tensor(0, 0.5, 0.75))
    expected = [math.log(4), (math.log(4 / 3) + math.log(4)) / 2, 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    assert result.loss.tolist() == pytest.approx(expected)
    # dloss/dD = s(D) - mu = 3/4 - mu
    result.loss.sum().backward()
    assert first.grad is not None
    assert first.grad.tolist() == pytest.approx([0.75, 0.25, 0], abs=1e-12)


def test_metrics_follow_the_preferred_one():
    """Scores 3 and 1: right where the first is preferred (0.8), wrong where the second is (0.2), undefined in a tie."""
    result = bradley_terry(tensor(3, 3, 3).requires_grad_(), tensor(1, 1, 1), preference=tensor(0.8, 0.2, 0.5))
    assert result.chosen_scores.tolist() == [3, 1, 3]
    assert result.rejected_scores.tolist() == [1, 3, 1]
    assert result.margins.tolist() == [2, -2, 2]
    assert result.accuracies.tolist() == [1, 0, 0]
    assert result.decided.tolist() == [True, True, False]
    assert result.loss.requires_grad and not any(metric.requires_grad for metric in result[1:])


def test_target_margin_by_hand():
    """D = ln 3, m = ln 6. mu = 1: D' = ln 3 - ln 6 = -ln 2, log(1 + 2) = log 3.

    mu = 0 (the second should lead by m): D' = ln 3 + ln 6 = ln 18, -log s(-ln 18) = log 19.
    mu = 3/4: D' = ln 3 - ln(6) / 2 = ln(3 / sqrt 6), so e^-D' = sqrt 6 / 3 = 0.8164966 and
    loss = 3/4 log(1.8164966) + 1/4 log(1 + 1.2247449) = 0.4476822 + 0.1999106 = 0.6475928.
    """
    first, second = tensor(*[math.log(3)] * 3), tensor(0, 0, 0)
    loss = bradley_terry(first, second, tensor(1, 0, 0.75), target_margin=math.log(6)).loss
    assert loss.tolist() == pytest.approx([math.log(3), math.log(19), 0.6475928], abs=1e-6)


def test_target_margin_does_not_push_ties():
    """mu = 1/2: 2 mu - 1 = 0, so a margin of 100 changes neither loss nor gradient, and D = 0 has gradient 0."""
    first = tensor(0, 1).requires_grad_()
    with_margin = bradley_terry(first, tensor(0, 0), 0.5, target_margin=tensor(100, 100)).loss
    assert with_margin.tolist() == bradley_terry(first, tensor(0, 0), 0.5).loss.tolist()
    with_margin.sum().backward()
    assert first.grad is not None
    assert first.grad.tolist() == pytest.approx([0, 1 / (1 + math.exp(-1)) - 0.5])  # s(1) - 1/2


def test_bradley_terry_stays_finite_at_large_differences():
    """-log s(-1000) = 1000 and -log s(1000) = 0, although s(-1000) is 0 in float64."""
    assert bradley_terry(tensor(-1000, 1000), tensor(0, 0)).loss.tolist() == [1000, 0]


def test_centring_by_hand():
    """0.01 (2 + 1)^2 = 0.09; 0.01 (2 - 2)^2 = 0; gradient 2 * 0.01 * 3 = 0.06 for both scores of the first."""
    first, second = tensor(2, 2).requires_grad_(), tensor(1, -2).requires_grad_()
    loss = centring(first, second, coefficient=0.01)
    assert loss.tolist() == pytest.approx([0.09, 0])
    loss.sum().backward()
    assert first.grad is not None and second.grad is not None
    assert first.grad.tolist() == pytest.approx([0.06, 0])
    assert second.grad.tolist() == pytest.approx([0.06, 0])


def test_dpo_sigmoid_by_hand():
    """beta = 1/2, log-ratios ln 9 and 0: beta D = ln 3, loss log 4/3; rewards ln(9) / 2 = ln 3 and 0.

    The other way round: beta D = -ln 3, loss log 4, and the chosen one's reward is the lower.
    """
    result = dpo_of([math.log(9), 0], [0, math.log(9)], beta=0.5)
    assert result.loss.tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    assert result.chosen_rewards.tolist() == pytest.approx([math.log(3), 0])
    assert result.rejected_rewards.tolist() == pytest.approx([0, math.log(3)])
    assert result.margins.tolist() == pytest.approx([math.log(3), -math.log(3)])
    assert result.accuracies.tolist() == [1, 0]


def test_dpo_label_smoothing_by_hand():
    """beta D = ln 3 throughout: -log s = log 4/3 forward, log 4 backward; mu' weighs them.

    eps 1/4, mu 1: mu' = 3/4.   eps 1/4, mu 0: mu' = 1/4.   eps 1/4, mu 1/2: mu' = 1/2.   mu 0.6: 0.45 + 0.1 = 0.55.
    """
    loss = dpo_of([math.log(9)] * 4, [0] * 4, beta=0.5, label_smoothing=0.25, preference=tensor(1, 0, 0.5, 0.6)).loss
    forward, backward = math.log(4 / 3), math.log(4)
    expected = [mu * forward + (1 - mu) * backward for mu in (0.75, 0.25, 0.5, 0.55)]
    assert loss.tolist() == pytest.approx(expected)


def test_ipo_by_hand():
    """beta = 1/4: target 1 / (2 beta) = 2. Log-ratios 6 over 2 tokens and -4 over 4: 3 - (-1) = 4.

    mu 1: (4 - 2)^2 = 4.   mu 0: target -2, 36.   tie: target 0, 16.   mu 3/4: target 1, 9.   Rewards 6/4 and -1.
    """
    preference = tensor(1, 0, 0.5, 0.75)
    result = dpo_of([6] * 4, [-4] * 4, tokens=(2, 4), beta=0.25, loss="ipo", preference=preference)
    assert result.loss.tolist() == [4, 36, 16, 9]
    assert result.chosen_rewards.tolist() == [1.5, -1, 1.5, 1.5]
    # mu 1, eps 1/4 is mu' = 3/4, the last one above
    smoothed = dpo_of([6], [-4], tokens=(2, 4), beta=0.25, loss="ipo", label_smoothing=0.25)
    assert smoothed.loss.tolist() == [9]


def test_ipo_gradient_is_that_of_the_mixed_labels():
    """h = 4, target 2: mu 2 (h - 2) + (1 - mu) 2 (h + 2) = 4 mu + 12 - 12 mu; mu = 3/4: 6 = 2 (h - 1)."""
    first, zeros, ones = tensor(4).requires_grad_(), tensor(0), torch.ones(1, dtype=torch.long)
    dpo(first, zeros, zeros, zeros, ones, ones, beta=0.25, loss="ipo", preference=0.75).loss.sum().backward()
    assert first.grad is not None
    assert first.grad.tolist() == [6]


def test_ipo_without_tokens_is_finite():
    """A completion of no tokens has log-ratio 0, so its mean is 0. beta = 1/2: (1 - 0 - 1)^2 = 0, (0 - 1 - 1)^2 = 4."""
    assert dpo_of([1], [0], tokens=(1, 0), beta=0.5, loss="ipo").loss.tolist() == [0]
    assert dpo_of([0], [1], tokens=(0, 1), beta=0.5, loss="ipo").loss.tolist() == [4]


def test_hinge_by_hand():
    """beta = 1/2, D = 1: relu(1 - 0.5) = 0.5 and backward relu(1.5) = 1.5. D = 4: relu(1 - 2) = 0 and relu(3) = 3.

    mu 1: 0.5, 0.   mu 0: 1.5, 3.   mu 3/4: 0.375 + 0.375 = 0.75, and 0 + 0.75 = 0.75.
    """
    for preference, expected in ((1.0, [0.5, 0]), (0.0, [1.5, 3]), (0.75, [0.75, 0.75])):
        assert dpo_of([1, 4], [0, 0], beta=0.5, loss="hinge", preference=preference).loss.tolist() == expected
    assert dpo_of([1, 4], [0, 0], beta=0.5, loss="hinge", label_smoothing=0.25).loss.tolist() == [0.75, 0.75]


@pytest.mark.parametrize(("kind", "expected"), [("sigmoid", LN2), ("ipo", 25.0), ("hinge", 1.0)])
def test_first_loss_at_policy_equal_to_reference(kind, expected):
    """D = 0: -log s(0) = ln 2; (0 - 1 / 0.2)^2 = 25; relu(1 - 0) = 1."""
    assert dpo_of([0], [0], beta=0.1, loss=kind).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_two_and_the_label_changes_no_loss(kind):
    """(first, second, mu) and (second, first, 1 - mu) say the same, label smoothing, margin and lengths included."""
    options = {"beta": 0.3, "loss": kind, "label_smoothing": 0.1}
    one = dpo_of([1.5, -2], [0.2, 1], tokens=(3, 5), preference=tensor(0.9, 0.4), **options)
    other = dpo_of([0.2, 1], [1.5, -2], tokens=(5, 3), preference=tensor(0.1, 0.6), **options)
    for field in one._fields:
        torch.testing.assert_close(getattr(one, field), getattr(other, field))
    one_reward = bradley_terry(tensor(1.5, -2), tensor(0.2, 1), tensor(0.9, 0.4), 0.7)
    other_reward = bradley_terry(tensor(0.2, 1), tensor(1.5, -2), tensor(0.1, 0.6), 0.7)
    torch.testing.assert_close(one_reward.loss, other_reward.loss)


def test_dpo_gradient_by_hand():
    """One-token completions over a vocabulary of three, logits (0, ln 2, 0): pi = (1/4, 1/2, 1/4); reference uniform.

    w = token 0, l = token 1, beta = 1: r_w - r_l = ln(1/4) - ln(1/2) = -ln 2, so s(r_l - r_w) = s(ln 2) = 2/3.
    grad log pi(w) - grad log pi(l) = (e_0 - pi) - (e_1 - pi) = (1, -1, 0): the gradient is (-2/3, 2/3, 0).
    """
    logits = tensor(0, LN2, 0).requires_grad_()
    logps = logits.log_softmax(-1)
    uniform, ones = tensor(-math.log(3)), torch.ones(1, dtype=torch.long)
    dpo(logps[0:1], logps[1:2], uniform, uniform, ones, ones, beta=1.0).loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-2 / 3, 2 / 3, 0], abs=1e-12)


def test_dpo_gradient_identity():
    """-beta s(r_l - r_w) [grad log pi(w) - grad log pi(l)] (arXiv 2305.18290, section 4), random, 4 tokens each.

    grad log pi(y) with respect to logits (4, 5) is one-hot(y) - pi, written out.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    reference = torch.randn(4, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    chosen, rejected, beta = torch.tensor([0, 3, 1, 4]), torch.tensor([2, 3, 0, 0]), 0.7

    def logp(table, tokens):
        return table.gather(1, tokens[:, None]).sum()[None]

    policy = logits.log_softmax(-1)
    reward_chosen = beta * (logp(policy, chosen) - logp(reference, chosen))
    reward_rejected = beta * (logp(policy, rejected) - logp(reference, rejected))
    one_hot = torch.eye(5, dtype=torch.float64)
    score_gap = (one_hot[chosen] - policy.exp()) - (one_hot[rejected] - policy.exp())
    expected = -beta * torch.sigmoid(reward_rejected - reward_chosen) * score_gap

    leaf, tokens = logits.clone().requires_grad_(), torch.full((1,), 4)
    policy = leaf.log_softmax(-1)
    references = logp(reference, chosen), logp(reference, rejected)
    dpo(logp(policy, chosen), logp(policy, rejected), *references, tokens, tokens, beta=beta).loss.sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_mean_per_row_of_a_ranking_by_hand():
    """Scores 2, 1, 0 ranked 1, 2, 3 (row 0), a pair with D = 0 (row 2), row 1 empty.

    Row 0: D = 1, 2, 1: log(1 + e^-1) = 0.313262, log(1 + e^-2) = 0.126928, 0.313262; mean 0.251151. Row 2: ln 2.
    """
    loss = bradley_terry(tensor(2, 5, 2, 1), tensor(1, 5, 0, 0)).loss
    rows = mean_per_row(loss, torch.tensor([0, 2, 0, 0]), num_rows=3)
    assert rows.tolist() == pytest.approx([0.251151, 0, LN2], abs=1e-6)


def test_a_ranking_weighs_as_much_as_a_pair():
    """Three comparisons in row 0 get weight 1/3 each, the one of row 1 weight 1."""
    per_comparison = tensor(1, 2, 3, 4).requires_grad_()
    mean_per_row(per_comparison, torch.tensor([0, 0, 0, 1]), num_rows=2).sum().backward()
    assert per_comparison.grad is not None
    assert per_comparison.grad.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preference", [1.0, 0.5, 0.3])
def test_gradcheck_dpo(kind, preference):
    """Finite differences in float64, for policy and reference alike, away from the hinge's corners."""
    inputs = [tensor(*row).requires_grad_() for row in ([-3, -5], [-4, -2], [-3.5, -4], [-4.2, -2.9])]
    tokens = torch.tensor([2, 3]), torch.tensor([4, 1])
    assert gradcheck(
        lambda *logps: dpo(*logps, *tokens, beta=0.4, loss=kind, label_smoothing=0.1, preference=preference).loss,
        inputs,
    )


def test_gradcheck_reward_losses():
    """Finite differences in float64, with soft labels and margins, and the mean per row."""
    scores = tensor(1, -0.5, 2).requires_grad_(), tensor(0.3, 0.4, 2).requires_grad_()
    preference, margin, rows = tensor(1, 0.5, 0.2), tensor(0.5, 1, 2), torch.tensor([1, 1, 0])
    assert gradcheck(lambda a, b: bradley_terry(a, b, preference, margin).loss, scores)
    assert gradcheck(lambda a, b: centring(a, b, 0.01), scores)
    assert gradcheck(lambda a, b: mean_per_row(bradley_terry(a, b, preference).loss, rows, 2), scores)


def test_mistakes_are_named():
    """An unknown loss lists the known ones; (P,) against (P, 1) is refused, not broadcast to (P, P)."""
    with pytest.raises(ValueError, match="loss: 'kto' is no DPO loss .known: sigmoid, ipo, hinge"):
        dpo_of([0], [0], beta=0.1, loss="kto")
    with pytest.raises(ValueError, match=r"shapes differ: score_first \(2,\), score_second \(2, 1\)"):
        bradley_terry(tensor(1, 2), tensor([1], [2]))


@pytest.mark.parametrize(
    ("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
)
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_trl(kind, label_smoothing):
    """TRL's `cpo_loss` is DPO's with a reference of 0 and log-ratios summed: values and rewards on random inputs.

    DPOTrainer's own losses are inside its `compute_loss`; this is the one form that TRL has as a function.
    """
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPOTrainer")
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = -10 * torch.rand(2, 16, generator=generator, dtype=torch.float64)
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=0.3,
        loss_type=kind,
        label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    zeros, ones = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.long)
    ours = dpo(chosen, rejected, zeros, zeros, ones, ones, 0.3, kind, label_smoothing)
    torch.testing.assert_close(ours.loss, theirs[0])
    torch.testing.assert_close(ours.chosen_rewards, theirs[1])
    torch.testing.assert_close(ours.rejected_rewards, theirs[2])
