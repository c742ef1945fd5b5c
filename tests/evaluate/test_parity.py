"""Distances between policies by hand, and fp32 arithmetic on 16-bit weights."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_align.data.chat import Renderer
from lowrank_align.errors import UserError
from lowrank_align.evaluate.parity import (
    ARITHMETIC_NATS,
    Distance,
    Probe,
    answered,
    policy_distance,
    questions,
    read_policy,
    score_distance,
)
from lowrank_align.evaluate.precision import fp32_arithmetic


def test_policy_distance() -> None:
    """Two tokens; the answer is token 0 twice. Truth: (1/2, 1/2) and (3/4, 1/4); the other: (1/4, 3/4) and (3/4, 1/4).
    |difference| of the answer's log-probs: ln 2 and 0. KL(truth || other) at the first place:
    1/2 ln((1/2)/(1/4)) + 1/2 ln((1/2)/(3/4)) = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3); the mean is half of that.
    At the second answer the likeliest token differs, in the first (0.6 against 0.9) it does not.
    """
    probes = [Probe([7, 0, 0], 1), Probe([7, 7, 0], 2)]
    truth = [torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log(), torch.tensor([[0.6, 0.4]]).log()]
    other = [torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log(), torch.tensor([[0.6, 0.4]]).log()]
    found = policy_distance(truth, other, probes)
    assert found.largest == pytest.approx(math.log(2)) and found.mean == pytest.approx(math.log(2) / 3)
    assert found.kl_nats == pytest.approx(0.5 * math.log(4 / 3) / 3)
    assert (found.greedy_equal, found.answers) == (1, 2)


def test_score_distance() -> None:
    found = score_distance([torch.tensor([1.0]), torch.tensor([2.0])], [torch.tensor([1.5]), torch.tensor([2.0])])
    assert (found.largest, found.mean, found.kl_nats) == (0.5, 0.25, None)


def test_within_rounding() -> None:
    """Four times as far as another rounding, sixteen times the KL, and what fp32 adds."""
    floor = Distance(0.01, 0.001, 1e-4, 5, 5)
    assert Distance(0.039, 0.001, 1.5e-3, 4, 5).within(floor)
    assert not Distance(0.05, 0.001, 1e-4, 5, 5).within(floor)
    assert not Distance(0.01, 0.001, 2e-3, 5, 5).within(floor)
    exact = Distance(0.0, 0.0, 0.0, 5, 5)
    assert Distance(0.9 * ARITHMETIC_NATS, 0.0, 0.0, 5, 5).within(exact)
    for broken in (Distance(math.inf, math.nan, 0.0), Distance(0.0, 0.0, math.nan)):
        assert not broken.within(exact)


def test_a_nan_is_the_largest_difference() -> None:
    found = policy_distance([torch.zeros(1, 2)], [torch.full((1, 2), math.nan)], [Probe([1, 0], 1)])
    assert found.largest == math.inf and not found.within(Distance(1.0, 1.0, 1.0))


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_fp32_arithmetic_is_that_of_a_model_in_fp32(family: str, model_folder: Callable[..., Path]) -> None:
    """The same bf16 weights, once widened block by block and once as a whole; afterwards they are as they were."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.bfloat16).eval()
    whole = copy.deepcopy(model).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(4, 99, (2, 9))
    with torch.no_grad(), fp32_arithmetic(model):
        assert torch.equal(model(input_ids=ids).logits, whole(input_ids=ids).logits)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    with torch.no_grad():
        assert model(input_ids=ids).logits.dtype == torch.bfloat16  # the hooks are gone


def test_another_rounding_moves_every_weight_by_at_most_half_a_unit(model_folder: Callable[..., Path]) -> None:
    """bf16: relative to the weight at most 2^-8; the same both times; and a forward that breaks leaves nothing wide."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.bfloat16).eval()
    layer, seen = model.model.layers[0].mlp.up_proj, []
    own = layer.weight.data.clone().float()
    hook = layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.data.clone()))
    ids = torch.randint(4, 99, (1, 5))
    with torch.no_grad(), fp32_arithmetic(model, torch.bfloat16):
        model(input_ids=ids)
        model(input_ids=ids)
    hook.remove()
    moved = (seen[0] - own).abs() / own.abs()
    assert torch.equal(seen[0], seen[1]) and 2.0**-9 < moved.max() <= 2.0**-8
    with pytest.raises(TypeError), fp32_arithmetic(model):
        model(input_ids="no tensor")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_reading_a_policy_pads_to_the_right(model_folder: Callable[..., Path]) -> None:
    """The same numbers for each prompt alone, from transformers' logits."""
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    probes = [Probe([5, 6, 7, 8, 9], 3), Probe([5, 9, 10, 11], 1), Probe([20, 21, 22, 23, 24, 25], 5)]
    found = read_policy(model, probes, 0)
    for reading, probe in zip(found, probes, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([probe.ids])).logits[0]
        alone = logits[probe.start - 1 : -1].log_softmax(-1)
        assert reading.shape == alone.shape and (reading - alone).abs().max() < 1e-5


def test_questions_fit_into_the_context(tiny_base: Any) -> None:
    renderer = Renderer(tiny_base.tokenizer, max_length=256)
    asked = questions(renderer, ["Once upon a time"], 256)
    assert len(asked) == 8 and asked[-1][0] == "" and all(len(ids) + 24 <= 256 for _, ids in asked)
    assert len(questions(renderer, ["Once"], 50)) == 1
    with pytest.raises(UserError, match="no prompt leaves room for 24 tokens in a context of 20"):
        questions(renderer, [], 20)
    assert len(answered(renderer, 256)) == 12
    with pytest.raises(UserError, match="fits into a context of 20"):
        answered(renderer, 20)
