"""What is tried when a model is loaded: whether tree rows are right for it. (Its logits: test_scoring.)"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank_align import probe
from lowrank_align.base import Base
from lowrank_align.probe import choose_layout
from lowrank_align.trees import TreeBatch, TreeRow, attention_mask


def probe_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "lowrank_align.probe"]


@pytest.mark.parametrize("hybrid", ["falcon_h1", "qwen3_next"])
def test_state_that_runs_through_is_seen(
    load_base: Callable[..., Any], caplog: pytest.LogCaptureFixture, hybrid: str
) -> None:
    """These two refuse the dict of masks. Given a plain mask, which they take, only the log-probs tell."""
    base = load_base(hybrid)
    base.attention.masks_by_kind = False
    caplog.clear()
    try:
        assert choose_layout(base) == "flat"
    finally:
        base.attention.masks_by_kind = True
    (line,) = probe_lines(caplog)
    assert line.startswith(f"{base.name}: uses flat rows: its layers carry state from one completion to the next")


@pytest.mark.parametrize(
    ("fault", "leaks"),
    [("completions see each other", True), ("completions do not see the prompt", False)],
)
def test_wrong_masks_are_seen(
    load_base: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    leaks: bool,
) -> None:
    """The first fault shows as a leak, the second only as a gap between tree and separate rows."""
    base = load_base("llama")

    def faulty(batch: TreeBatch, window: int | None = None) -> torch.Tensor:
        mask = attention_mask(batch, window)
        if leaks:
            return torch.ones_like(mask).tril()
        segment = batch.segment_ids
        return mask & (segment[:, :, None] == segment[:, None, :])[:, None]

    monkeypatch.setattr("lowrank_align.attention.attention_mask", faulty)
    monkeypatch.setattr(base.attention, "in_pieces", False)
    assert choose_layout(base) == "flat"
    (line,) = probe_lines(caplog)
    assert ("leak 0.0e+00" not in line) == leaks
    assert "gap 0.0e+00" not in line
    monkeypatch.setitem(probe.TOLERANCE, torch.float32, 100.0)  # lets any gap pass, but no leak
    assert (choose_layout(base) == "flat") == leaks
    monkeypatch.undo()
    assert choose_layout(base) == "tree"


@torch.no_grad()
def test_int8_rounding_is_not_taken_for_a_leak(
    load_base: Callable[..., Any], random_row: Callable[..., TreeRow]
) -> None:
    """With weights as large as these, activations pass int8's threshold of 6. Its layers then leave whole columns in
    fp16, for all tokens of a batch alike, so a completion does change another one's log-probs a little: by rounding.
    """
    base = load_base("llama", "int8", initializer_range=0.2)
    assert base.layout == "tree"
    states = [module.state for module in base.model.modules() if hasattr(module, "state")]
    assert {state.threshold for state in states} == {6.0}  # put back after the probe
    first, second = random_row(6, 6, 6, seed=1), random_row(6, 6, 6, seed=2)
    other = TreeRow(first.prompt_ids, [second.completions[0], first.completions[1]])
    one, two = (base.token_scores(base.collate([row])).per_token_logps[1] for row in (first, other))
    assert 1e-3 < (one - two).abs().max() < 0.2


def test_loading_leaves_no_trace(load_base: Callable[..., Any]) -> None:
    """The probe's forwards leave the random state, the flags and the roles as they were."""
    before = torch.get_rng_state()
    base: Base = load_base("llama", "nf4", fresh=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not base.model.training
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    assert list(base.roles) == ["base"]
    assert base.active_role.name == "base"
