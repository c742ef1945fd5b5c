"""Supervised fine-tuning's loss against values worked out by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.objectives.completion import nll
from lowrank_align.tensors import reduce

HALF, QUARTER, EIGHTH = math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)
LOGPS = torch.tensor([[HALF, QUARTER, EIGHTH], [QUARTER, -math.inf, math.nan]], dtype=torch.float64)
MASK = torch.tensor([[1, 0, 1], [1, 0, 0]], dtype=torch.bool)


def test_nll_by_hand():
    """Probabilities 1/2, (1/4 masked), 1/8 and 1/4, (pads): losses ln 2, 0, 3 ln 2 and 2 ln 2, 0, 0.

    logps -4 ln 2 of 2 tokens and -2 ln 2 of 1; mean over the 3 tokens 6 ln 2 / 3 = 2 ln 2.
    """
    result = nll(LOGPS, MASK)
    ln2 = math.log(2)
    torch.testing.assert_close(result.loss, torch.tensor([[1, 0, 3], [2, 0, 0]], dtype=torch.float64) * ln2)
    assert result.logps.tolist() == pytest.approx([-4 * ln2, -2 * ln2])
    assert result.num_tokens.tolist() == [2, 1]
    assert reduce(result.loss, MASK, "token_mean").item() == pytest.approx(2 * ln2)


def test_gradient_is_minus_one_on_counted_tokens_only():
    """d(-logp)/dlogp = -1 where the mask is 1; exactly 0 elsewhere, also at infinite and NaN padding."""
    leaf = LOGPS.clone().requires_grad_()
    nll(leaf, MASK).loss.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[-1, 0, -1], [-1, 0, 0]]


def test_gradcheck():
    """Finite differences in float64, through a log-softmax so that the loss is not linear."""
    logits = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1], [1, 0]])
    assert gradcheck(lambda x: nll(x.log_softmax(-1), mask).loss, (logits,))


def test_padding_and_empty_rows_change_nothing():
    """Two more columns and one more row, all padding: the old numbers, and for the new row 0 nats of 0 tokens."""
    logps = torch.full((3, 5), -math.inf, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    logps[:2, :3], mask[:2, :3] = LOGPS, MASK
    plain, padded = nll(LOGPS, MASK), nll(logps, mask)
    torch.testing.assert_close(padded.loss[:2, :3], plain.loss)
    assert padded.loss[:, 3:].abs().sum() == 0 and padded.loss[2].abs().sum() == 0
    assert padded.logps.tolist() == [*plain.logps.tolist(), 0]
    assert padded.num_tokens.tolist() == [2, 1, 0]
