"""KTO by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_align.objectives.unpaired import kto, reference_point


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


GOOD, BAD = torch.tensor([True]), torch.tensor([False])


def test_by_hand():
    """beta 1/2, h = ln 9 + 1, z0 = 1: beta (h - z0) = ln 3. Good: 1 - s(ln 3) = 1/4; bad: 1 - s(-ln 3) = 3/4.

    With weights 2 and 3: 1/2 and 9/4. The reward is beta h without z0.
    """
    h = tensor(math.log(9) + 1)
    options = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}
    assert kto(h, GOOD, 1.0, **options).loss.item() == pytest.approx(1 / 2)
    assert kto(h, BAD, 1.0, **options).loss.item() == pytest.approx(9 / 4)
    assert kto(h, BAD, 1.0, **options).rewards.item() == pytest.approx((math.log(9) + 1) / 2)


def test_at_policy_equal_to_reference():
    """h = z0 = 0: 1 - s(0) = 1/2 for both."""
    assert kto(tensor(0, 0), torch.tensor([True, False]), 0.0, beta=0.1).loss.tolist() == [0.5, 0.5]


def test_the_gradient_fades_far_from_the_reference_point():
    """d loss / d h = -beta s'(beta (h - z0)) for a good answer: beta / 4 at h = z0, next to nothing 20 / beta away."""
    h = tensor(3, 23).requires_grad_()
    kto(h, torch.tensor([True, True]), 3.0, beta=1.0).loss.sum().backward()
    assert h.grad is not None
    assert h.grad.tolist() == pytest.approx([-0.25, 0], abs=1e-8)


def test_reference_point():
    """The mean of 3 and -1 is 1; of -3 and 1 it is -1, and a KL is not negative. No gradient goes into it."""
    values = tensor(3, -1).requires_grad_()
    assert reference_point(values).item() == 1
    assert not reference_point(values).requires_grad
    assert reference_point(tensor(-3, 1)).item() == 0


def test_gradcheck():
    good = torch.tensor([True, False, True])
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    assert gradcheck(lambda h: kto(h, good, 0.4, **options).loss, [tensor(1, -2, 0.3).requires_grad_()])


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"shapes differ: logratios \(2,\), desirable \(1,\)"):
        kto(tensor(1, 2), GOOD, 0.0, beta=0.1)
