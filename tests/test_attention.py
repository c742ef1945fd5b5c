"""Attention piece by piece against the same attention under a dense mask: one prompt, several completions, padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowrank_align.attention import _InPieces, pieces_of
from lowrank_align.trees import TreeBatch, TreeRow, attention_mask, collate


@pytest.fixture
def batch(random_row: Callable[..., TreeRow]) -> TreeBatch:
    """A prompt longer than its completions, one shorter, and one with a single completion: two rows are padded."""
    return collate([random_row(6, 2, 3), random_row(2, 5, 4, 1), random_row(1, 1)])


def states(batch: TreeBatch, heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rows, tokens = batch.input_ids.shape
    generator = torch.Generator().manual_seed(heads)
    return [torch.randn(rows, heads, tokens, 4, dtype=dtype, generator=generator).requires_grad_() for _ in range(3)]


def test_it_is_attention_under_the_mask(batch: TreeBatch) -> None:
    """Outputs and all three gradients, on the tokens that are no padding."""
    real = batch.segment_ids >= 0
    results = []
    for in_pieces in (False, True):
        q, k, v = states(batch, 2)
        if in_pieces:
            out = _InPieces.apply(q, k, v, pieces_of(batch, torch.float64), 0.3)
        else:
            out = sdpa_attention_forward(torch.nn.Module(), q, k, v, attention_mask(batch), scaling=0.3)[0]
        assert out.shape == (*real.shape, 2, 4)
        weights = torch.linspace(-1, 1, out[real].numel(), dtype=torch.float64).view_as(out[real])
        (out[real] * weights).sum().backward()
        results.append((out[real], q.grad, k.grad, v.grad))
        assert not in_pieces or not out[~real].any()
    torch.testing.assert_close(results[1], results[0])


def test_gradients_in_double_precision(batch: TreeBatch) -> None:
    pieces = pieces_of(batch, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k, v: _InPieces.apply(q, k, v, pieces, None), states(batch, 1))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_base_computes_the_same_either_way(
    family: str,
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    speak: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Log-probs and gradients of padded rows; grouped keys, query norms, sliding layers whose window is not reached."""
    base = load_base(family)
    assert base.attention.in_pieces
    base.add_role("policy", rank=4)
    speak(base, "policy")
    rows = [random_row(2, 3, 2), random_row(1, 2)]
    results = []
    for in_pieces in (True, False):
        monkeypatch.setattr(base.attention, "in_pieces", in_pieces)
        assert base.attention.takes_pieces(base.collate(rows)) == in_pieces
        with base.role("policy") as role:
            scores = base.token_scores(base.collate(rows))
            scores.logps.sum().backward()
        results.append((scores.per_token_logps, {name: p.grad.clone() for name, p in role.parameters.items()}))
        for parameter in role.parameters.values():
            parameter.grad = None
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_a_window_that_cuts_needs_the_mask(load_base: Callable[..., Any], random_row: Callable[..., TreeRow]) -> None:
    """Positions from 0: a row of as many as the window sees everything, one more does not."""
    base = load_base("gemma3_text")
    window = base.config.sliding_window
    assert base.attention.takes_pieces(base.collate([random_row(window - 2, 2, 1)]))
    assert not base.attention.takes_pieces(base.collate([random_row(window - 1, 2, 1)]))


def test_a_family_that_does_not_hand_the_pieces_down_gets_the_mask(
    load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that forgets the pieces sees everything: the probe notices, and rows stay trees."""
    from transformers import AttentionInterface

    def forgetful(module: Any, q: Any, k: Any, v: Any, mask: Any, tree_pieces: Any = None, **options: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", forgetful)
    base = load_base("llama", fresh=True)
    assert (base.attention.in_pieces, base.layout) == (False, "tree")
