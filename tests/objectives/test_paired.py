"""Bradley-Terry, DPO and its relatives with a reference, against values worked out by hand and their identities."""

import math
from functools import partial
from inspect import Parameter, signature
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.config.offline import LOSS_KNOBS, REFERENCE_FREE
from lowrank_align.objectives.paired import (
    Side,
    bradley_terry,
    by_preference,
    centring,
    hinge,
    ipo,
    mean_per_row,
    outcome,
    robust,
    sigmoid,
)
from lowrank_align.objectives.paired_losses import PAIRED_LOSSES, paired_loss

LN2 = math.log(2)
KNOBS = {"beta": 0.4, "label_smoothing": 0.1, "simpo_gamma": 0.3, "cpo_alpha": 0.7, "unlikelihood_alpha": 0.6}
KNOBS |= {"cpl_alpha": 0.5, "cpl_lambda": 0.5, "cpl_gamma": 0.9}


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def side(*rows, reference=None) -> Side:
    """A `Side` of a list of log-probabilities for each comparison; a reference of 0 unless given, padding is NaN."""
    width = max(len(row) for row in rows)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    padded = [
        torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in given], dtype=torch.float64)
        for given in (rows, reference or [[0.0] * len(row) for row in rows])
    ]
    return Side(padded[0], mask, padded[1])


def loss_named(name: str):
    """The loss with every knob away from its default."""
    return partial(paired_loss(name), **{knob: KNOBS[knob] for knob in LOSS_KNOBS[name]})


def test_a_side_by_hand():
    """Tokens -1, -2 against -1.5, -0.5; and a single -3 against -1, whose padding holds NaN.

    Sums -3 and -3; log-ratios per token (0.5, -1.5) and (-2, 0), summed -1 and -2; 2 and 1 tokens.
    """
    both = side([-1, -2], [-3], reference=[[-1.5, -0.5], [-1]])
    assert both.logps.tolist() == [-3, -3]
    assert both.per_token_logratios.tolist() == [[0.5, -1.5], [-2, 0]]
    assert both.logratios.tolist() == [-1, -2]
    assert both.num_tokens.tolist() == [2, 1]
    assert both.per_token_mean(both.logratios).tolist() == [-0.5, -2]
    assert both.at(torch.tensor([1, 1])).logratios.tolist() == [-2, -2]
    assert both._replace(ref_per_token_logps=None).at(torch.tensor([0])).logps.tolist() == [-3]


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
    assert [field.tolist() for field in outcome(tensor(3), tensor(1), 0.2)] == [[1], [3], [-2], [0], [True]]


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


def test_sigmoid_by_hand():
    """beta = 1/2, log-ratios ln 9 (in two tokens, ln 3 + ln 3) and 0: beta D = ln 3, loss log 4/3; else log 4.

    eps = 1/4 mixes them: 3/4 log 4/3 + 1/4 log 4, and the other way round.
    """
    high, low = side([math.log(3), math.log(3)], reference=[[0, 0]]), side([-5], reference=[[-5]])
    assert sigmoid(high, low, beta=0.5).item() == pytest.approx(math.log(4 / 3))
    assert sigmoid(low, high, beta=0.5).item() == pytest.approx(math.log(4))
    mixed = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert sigmoid(high, low, beta=0.5, label_smoothing=0.25).item() == pytest.approx(mixed)


def test_robust_by_hand():
    """beta D = ln 3, eps = 1/4: [3/4 log 4/3 - 1/4 log 4] / (1/2); the other way round [3/4 log 4 - 1/4 log 4/3] / 1/2.

    Unbiased: labels that are flipped with eps give 3/4 of the first and 1/4 of the second, DPO's log 4/3 on clean ones.
    """
    high, low = side([math.log(9)]), side([0])
    options = {"beta": 0.5, "label_smoothing": 0.25}
    right, flipped = robust(high, low, **options).item(), robust(low, high, **options).item()
    assert right == pytest.approx(2 * (0.75 * math.log(4 / 3) - 0.25 * math.log(4)))
    assert flipped == pytest.approx(2 * (0.75 * math.log(4) - 0.25 * math.log(4 / 3)))
    assert 0.75 * right + 0.25 * flipped == pytest.approx(math.log(4 / 3))


def test_ipo_by_hand():
    """beta = 1/4: target 1 / (2 beta) = 2. Log-ratios 6 over 2 tokens and -4 over 4: 3 - (-1) = 4, (4 - 2)^2 = 4.

    The other way round (-4 - 2)^2 = 36. A completion of no tokens has a mean of 0: (1 - 0 - 2)^2 = 1, (-1 - 2)^2 = 9.
    """
    two, four = side([2, 4]), side([-1, -1, -1, -1])
    assert ipo(two, four, beta=0.25).item() == 4
    assert ipo(four, two, beta=0.25).item() == 36
    one, none = side([1]), Side(tensor(5)[None], torch.tensor([[False]]), tensor(0)[None])
    assert ipo(one, none, beta=0.25).item() == 1
    assert ipo(none, one, beta=0.25).item() == 9


def test_hinge_by_hand():
    """beta = 1/2, D = 1: relu(1 - 0.5) = 0.5, backward 1.5. D = 4: relu(1 - 2) = 0, backward 3."""
    high, low = side([1], [4]), side([0], [0])
    assert hinge(high, low, beta=0.5).tolist() == [0.5, 0]
    assert hinge(low, high, beta=0.5).tolist() == [1.5, 3]


def test_by_preference_by_hand():
    """Hinge, beta = 1/2, D = 1: 0.5 forward and 1.5 backward. mu 1, 0, 1/2, 3/4: 0.5, 1.5, 1, 0.375 + 0.375 = 0.75."""
    loss = by_preference(partial(hinge, beta=0.5), side(*[[1]] * 4), side(*[[0]] * 4), tensor(1, 0, 0.5, 0.75))
    assert loss.tolist() == [0.5, 1.5, 1, 0.75]


def test_soft_labels_of_sigmoid_are_those_of_bradley_terry():
    """With r = beta log-ratio the two are one model: on the same difference the same loss at every mu."""
    first, second, mu = side([1.5], [-2], [0.3]), side([0.2], [1], [0.3]), tensor(0.9, 0.4, 0.5)
    ours = by_preference(partial(sigmoid, beta=0.3), first, second, mu)
    torch.testing.assert_close(ours, bradley_terry(0.3 * first.logratios, 0.3 * second.logratios, mu).loss)


@pytest.mark.parametrize(
    ("name", "expected"), [("sigmoid", LN2), ("robust", LN2), ("ipo", 25.0), ("hinge", 1.0), ("cpl_kl", LN2)]
)
def test_first_loss_at_policy_equal_to_reference(name, expected):
    """Log-ratios 0: -log s(0) = ln 2; (0 - 1 / 0.2)^2 = 25; relu(1 - 0) = 1. Whatever lambda, gamma and smoothing."""
    knobs = {knob: KNOBS[knob] for knob in LOSS_KNOBS[name]} | ({"beta": 0.1} if "beta" in LOSS_KNOBS[name] else {})
    first, second = side([-1, -2], reference=[[-1, -2]]), side([-3], reference=[[-3]])
    assert paired_loss(name)(first, second, **knobs).item() == pytest.approx(expected)


def test_dpo_gradient_by_hand():
    """One-token completions over a vocabulary of three, logits (0, ln 2, 0): pi = (1/4, 1/2, 1/4); reference uniform.

    w = token 0, l = token 1, beta = 1: r_w - r_l = ln(1/4) - ln(1/2) = -ln 2, so s(r_l - r_w) = s(ln 2) = 2/3.
    grad log pi(w) - grad log pi(l) = (e_0 - pi) - (e_1 - pi) = (1, -1, 0): the gradient is (-2/3, 2/3, 0).
    """
    logits = tensor(0, LN2, 0).requires_grad_()
    logps, uniform, counts = logits.log_softmax(-1), tensor(-math.log(3))[None], torch.tensor([[True]])
    sigmoid(*(Side(logps[None, i : i + 1], counts, uniform) for i in (0, 1)), beta=1.0).sum().backward()
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

    def logps(table, tokens):
        return table.gather(1, tokens[:, None]).squeeze(1)

    policy = logits.log_softmax(-1)
    reward_chosen = beta * (logps(policy, chosen) - logps(reference, chosen)).sum()
    reward_rejected = beta * (logps(policy, rejected) - logps(reference, rejected)).sum()
    one_hot = torch.eye(5, dtype=torch.float64)
    score_gap = (one_hot[chosen] - policy.exp()) - (one_hot[rejected] - policy.exp())
    expected = -beta * torch.sigmoid(reward_rejected - reward_chosen) * score_gap

    leaf, counts = logits.clone().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    policy = leaf.log_softmax(-1)
    sides = [Side(logps(policy, y)[None], counts, logps(reference, y)[None]) for y in (chosen, rejected)]
    sigmoid(*sides, beta=beta).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


# ---- all losses by name


def test_every_loss_reads_the_knobs_that_the_settings_name():
    """So that a knob given without its loss can be refused, and one that a loss reads cannot be forgotten."""
    assert list(PAIRED_LOSSES) and set(PAIRED_LOSSES) == set(LOSS_KNOBS)
    for name, loss in PAIRED_LOSSES.items():
        kinds = signature(loss).parameters.values()
        assert {p.name for p in kinds if p.kind is Parameter.KEYWORD_ONLY} == set(LOSS_KNOBS[name]), name


@pytest.mark.parametrize("name", PAIRED_LOSSES)
def test_only_those_with_a_reference_need_one(name):
    """Without a reference a loss is what it is with one, or says that it is missing."""
    first, second = side([-1.5, -0.3], reference=[[-1, -1]]), side([-0.8], reference=[[-2]])
    bare = [one._replace(ref_per_token_logps=None) for one in (first, second)]
    if name in REFERENCE_FREE:
        assert loss_named(name)(*bare).tolist() == loss_named(name)(first, second).tolist()
    else:
        with pytest.raises(ValueError, match="compares with a reference, and there is none"):
            loss_named(name)(*bare)


@pytest.mark.parametrize("preference", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("name", PAIRED_LOSSES)
def test_gradcheck(name, preference):
    """Finite differences in float64, policy and reference, padding of NaN, away from the hinge's corners."""
    first, second = side([-3, -0.1, -2], [-0.5]), side([-1.2], [-0.2, -4])
    inputs = [torch.where(one.mask, one.per_token_logps, -1.0).requires_grad_() for one in (first, second)]
    references = [torch.full_like(x, -0.9).requires_grad_() for x in inputs]

    def value(a, b, ref_a, ref_b):
        sides = [
            Side(x.masked_fill(~one.mask, math.nan), one.mask, ref.masked_fill(~one.mask, math.nan))
            for x, one, ref in ((a, first, ref_a), (b, second, ref_b))
        ]
        return by_preference(loss_named(name), *sides, preference)

    assert gradcheck(value, [*inputs, *references])


@pytest.mark.parametrize("name", PAIRED_LOSSES)
def test_swapping_the_two_and_the_label_changes_no_loss(name):
    """(first, second, mu) and (second, first, 1 - mu) say the same."""
    first, second = side([-1.5, -1], [-2]), side([-0.2], [-1, -3])
    one = by_preference(loss_named(name), first, second, tensor(0.9, 0.4))
    torch.testing.assert_close(one, by_preference(loss_named(name), second, first, tensor(0.1, 0.6)))


def test_mistakes_are_named():
    """An unknown loss lists the known ones; (P,) against (P, 1) is refused, not broadcast to (P, P)."""
    with pytest.raises(ValueError, match="loss: 'kto' is no loss on pairs .known: sigmoid, ipo, hinge"):
        paired_loss("kto")
    with pytest.raises(ValueError, match=r"shapes differ: score_first \(2,\), score_second \(2, 1\)"):
        bradley_terry(tensor(1, 2), tensor([1], [2]))
    with pytest.raises(ValueError, match=r"shapes differ: x \(1, 2\), mask \(1, 1\)"):
        _ = Side(tensor([1, 2]), torch.tensor([[True]])).logps


# ---- rows


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


def test_gradcheck_reward_losses():
    """Finite differences in float64, with soft labels and margins, and the mean per row."""
    scores = tensor(1, -0.5, 2).requires_grad_(), tensor(0.3, 0.4, 2).requires_grad_()
    preference, margin, rows = tensor(1, 0.5, 0.2), tensor(0.5, 1, 2), torch.tensor([1, 1, 0])
    assert gradcheck(lambda a, b: bradley_terry(a, b, preference, margin).loss, scores)
    assert gradcheck(lambda a, b: centring(a, b, 0.01), scores)
    assert gradcheck(lambda a, b: mean_per_row(bradley_terry(a, b, preference).loss, rows, 2), scores)


# ---- TRL's functions; DPOTrainer's losses stand inside its `compute_loss`, see test_parity_trl.py


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_agrees_with_trl(kind, label_smoothing):
    """TRL's `cpo_loss` is DPO's with a reference of 0 and log-ratios of one token, on random inputs."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPOTrainer")
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = -10 * torch.rand(2, 16, generator=generator, dtype=torch.float64)
    trainer = SimpleNamespace(alpha=0.0, beta=0.3, loss_type=kind, label_smoothing=label_smoothing)
    trainer.accelerator = SimpleNamespace(device="cpu")
    theirs = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
    knobs = {"label_smoothing": label_smoothing} if kind == "sigmoid" else {}
    first, second = side(*([x] for x in chosen.tolist())), side(*([x] for x in rejected.tolist()))
    torch.testing.assert_close(paired_loss(kind)(first, second, beta=0.3, **knobs), theirs)
