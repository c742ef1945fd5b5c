"""What the report says in words."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank_align.evaluate.parity import Distance
from lowrank_align.evaluate.proof import _summary

SENTENCE = "the 4-bit rounding of the base changes more than the training did; {} exports exactly what was trained"


def summary(trained_kl: float, effect_kl: float | None, **changed: Any) -> list[str]:
    """Of an export whose KL to the policy as trained, and that of the adapter to its base, are these."""
    job: Any = SimpleNamespace(
        **{"nf4": False, "is_adapter": False, "is_reward": False, "dtype": torch.bfloat16} | changed,
        source=SimpleNamespace(trained_with=changed.get("trained_with", "nf4")),
    )
    near, far = Distance(0.1, 0.01, 1e-4, 5, 5), Distance(1.0, 0.1, trained_kl, 1, 5)
    effect = None if effect_kl is None else Distance(1.0, 0.1, effect_kl, 1, 5)
    measured = {"export": near, "another_rounding": near, "adapter_effect": effect, "as_trained": far}
    return _summary(job, measured, None, None, True, 1.0)


def test_the_yardstick_is_a_figure_and_no_conclusion() -> None:
    wanted = "KL 0.0001 nats/token, log-probs within 0.1 (mean 0.01), greedy text equal on 5 of 5"
    assert summary(0.1, 0.2)[1] == f"another rounding of the same weights is off by: {wanted}"


@pytest.mark.parametrize(
    ("trained", "effect", "changed", "flags"),
    [
        (0.2, 0.1, {}, "--as-trained"),
        (0.2, 0.1, {"is_adapter": True}, "--to merged --as-trained"),  # an adapter takes no --as-trained
        (0.1, 0.2, {}, None),
        (0.2, 0.2, {}, None),
        (0.2, 0.1, {"nf4": True}, None),  # that is what was exported
        (0.2, 0.1, {"trained_with": "int8"}, None),
        (0.2, None, {"is_reward": True}, None),  # of a reward model the effect is not measured
    ],
)
def test_rounding_that_outweighs_the_training_is_said(
    trained: float, effect: float | None, changed: dict[str, Any], flags: str | None
) -> None:
    lines = summary(trained, effect, **changed)
    told = [line for line in lines if "changes more than" in line]
    assert told == ([SENTENCE.format(flags)] if flags else [])
