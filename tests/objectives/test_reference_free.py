"""The losses without a reference, by hand and against TRL's functions."""

import math
from types import SimpleNamespace

import pytest
import torch

from lowrank_align.objectives.paired import Side, by_preference
from lowrank_align.objectives.reference_free import (
    cpo,
    log_1_minus_exp,
    nll,
    orpo,
    simpo,
    token_unlikelihood,
    unlikelihood,
)

LN2 = math.log(2)
HALF, QUARTER = math.log(1 / 2), math.log(1 / 4)


def side(*rows) -> Side:
    """A `Side` without a reference, of a list of log-probabilities for each comparison; padding is NaN."""
    width = max(len(row) for row in rows)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    padded = [[*row, *[math.nan] * (width - len(row))] for row in rows]
    return Side(torch.tensor(padded, dtype=torch.float64), mask)


# chosen: tokens of probability 1/2 and 1/4, then one of 1/2; rejected: one of 1/4, then 1/2 and 1/2
CHOSEN, REJECTED = side([HALF, QUARTER], [HALF]), side([QUARTER], [HALF, HALF])


def test_nll_by_hand():
    """Mean per token: (ln 2 + 2 ln 2) / 2 = 1.5 ln 2, and ln 2. The rejected does not matter."""
    assert nll(CHOSEN, REJECTED).tolist() == pytest.approx([1.5 * LN2, LN2])
    assert nll(CHOSEN, CHOSEN).tolist() == nll(CHOSEN, REJECTED).tolist()
    # a tie learns from both: (1.5 ln 2 + 2 ln 2) / 2
    assert by_preference(nll, CHOSEN, REJECTED, 0.5)[0].item() == pytest.approx(1.75 * LN2)


def test_unlikelihood_by_hand():
    """Sums: chosen -3 ln 2, rejected -2 ln 2: -(-3 + 2 a) ln 2 = (3 - 2 a) ln 2; below (1 - 2 a) ln 2."""
    assert unlikelihood(CHOSEN, REJECTED).tolist() == pytest.approx([LN2, -LN2])
    assert unlikelihood(CHOSEN, REJECTED, unlikelihood_alpha=0.25).tolist() == pytest.approx([2.5 * LN2, 0.5 * LN2])


def test_unlikelihood_has_no_bound():
    """It goes on falling as the rejected answer does, however unlikely that is already; the other form does not."""
    lower = [side([-x, -x]) for x in (10.0, 100.0, 1000.0)]
    chosen = side([HALF, HALF])
    assert [unlikelihood(chosen, y).item() for y in lower] == pytest.approx([2 * LN2 - 2 * x for x in (10, 100, 1000)])
    assert [token_unlikelihood(chosen, y).item() for y in lower] == pytest.approx([LN2] * 3, abs=1e-4)


def test_token_unlikelihood_by_hand():
    """NLL 1.5 ln 2 and ln 2; -log(1 - 1/4) = ln 4/3; (-log(1 - 1/2)) twice, mean ln 2. a = 1/2 takes half of these."""
    expected = [1.5 * LN2 + math.log(4 / 3), 2 * LN2]
    assert token_unlikelihood(CHOSEN, REJECTED).tolist() == pytest.approx(expected)
    half = [1.5 * LN2 + math.log(4 / 3) / 2, 1.5 * LN2]
    assert token_unlikelihood(CHOSEN, REJECTED, unlikelihood_alpha=0.5).tolist() == pytest.approx(half)


def test_token_unlikelihood_of_a_sure_token_is_finite():
    """log(1 - 1) would be infinite, and its share of 0 in a sure label NaN."""
    sure = Side(torch.zeros(1, 1, requires_grad=True), torch.tensor([[True]]))
    other = side([HALF])
    loss = by_preference(token_unlikelihood, sure, Side(other.per_token_logps.float(), other.mask), 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(LN2)
    assert sure.per_token_logps.grad is not None
    assert sure.per_token_logps.grad.tolist() == [[-1]]


def test_log_1_minus_exp():
    """1 - 1/2 and 1 - 3/4 by hand; 1 - e^-1e-5 is 1e-5 to five places, which the plain form loses half of."""
    found = log_1_minus_exp(torch.tensor([HALF, math.log(3 / 4), -1e-5, -50.0]))
    assert found.tolist() == pytest.approx([-LN2, -2 * LN2, math.log(1e-5), -math.exp(-50)], rel=1e-4)


def test_simpo_by_hand():
    """beta 2, means -1.5 ln 2 and -2 ln 2: 2 * 0.5 ln 2 = ln 2; gamma ln 2 leaves 0: ln 2. Then 0 - ln 2: ln 3."""
    assert simpo(CHOSEN, REJECTED, beta=2.0, simpo_gamma=LN2).tolist() == pytest.approx([LN2, math.log(3)])


def test_cpo_by_hand():
    """beta 1, sums -3 ln 2 and -2 ln 2: -log s(-ln 2) = ln 3; then ln 2: ln 3/2. Plus alpha times nll."""
    expected = [math.log(3) + 0.5 * 1.5 * LN2, math.log(3 / 2) + 0.5 * LN2]
    assert cpo(CHOSEN, REJECTED, beta=1.0, cpo_alpha=0.5).tolist() == pytest.approx(expected)


def test_orpo_by_hand():
    """Means of probability 1/2 and 1/4: odds 1 and 1/3, log odds ratio ln 3, -log s(ln 3) = ln 4/3; nll ln 2."""
    loss = orpo(side([HALF, HALF]), side([QUARTER]), beta=0.1)
    assert loss.item() == pytest.approx(LN2 + 0.1 * math.log(4 / 3))


# ---- TRL's functions


def oracle_side(generator: torch.Generator) -> tuple[Side, torch.Tensor, torch.Tensor]:
    """Eight random answers of three tokens; their sums and means."""
    logps = -3 * torch.rand(8, 3, generator=generator, dtype=torch.float64)
    return Side(logps, torch.ones(8, 3, dtype=torch.bool)), logps.sum(1), logps.mean(1)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_trls_cpo_trainer():
    """SimPO, and CPO's part without the likelihood."""
    module = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPOTrainer")
    generator = torch.Generator().manual_seed(3)
    (first, sum_1, mean_1), (second, sum_2, mean_2) = oracle_side(generator), oracle_side(generator)
    trainer = SimpleNamespace(alpha=0.0, beta=0.7, label_smoothing=0.0, simpo_gamma=0.4, loss_type="simpo")
    trainer.accelerator = SimpleNamespace(device="cpu")
    theirs = module.CPOTrainer.cpo_loss(trainer, mean_1, mean_2)[0]
    torch.testing.assert_close(simpo(first, second, beta=0.7, simpo_gamma=0.4), theirs)
    trainer.loss_type = "sigmoid"
    theirs = module.CPOTrainer.cpo_loss(trainer, sum_1, sum_2)[0]
    torch.testing.assert_close(cpo(first, second, beta=0.7, cpo_alpha=0.0), theirs)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_trls_orpo_trainer():
    """The odds ratio's part, which TRL computes in fp32 and returns with the other sign."""
    module = pytest.importorskip("trl.experimental.orpo", reason="this TRL has no ORPOTrainer")
    generator = torch.Generator().manual_seed(4)
    (first, _, mean_1), (second, _, mean_2) = oracle_side(generator), oracle_side(generator)
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = -module.ORPOTrainer.odds_ratio_loss(trainer, mean_1, mean_2)[0].double()
    ours = orpo(first, second, beta=0.3) - nll(first, second)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
