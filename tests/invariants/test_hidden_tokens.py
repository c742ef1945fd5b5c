"""Tokens that are hidden from the later ones: who sees whom, and that it makes no difference what stands there."""

from typing import Any

import pytest
import torch

from lowrank_align.probe import hides_tokens
from lowrank_align.trees import Completion, TreeRow, attention_mask, collate


def rows(hidden_prompt: int = 7, hidden_answer: int = 9) -> list[TreeRow]:
    """`5 H 6 | 8 H 4 3 | 2 1`: the second token of the prompt and of the first completion are hidden (H)."""
    first = Completion([8, hidden_answer, 4, 3], [True] * 4, [False, True, False, False])
    return [
        TreeRow([5, hidden_prompt, 6], [first, Completion([2, 1], [True, True])], prompt_hidden=[False, True, False]),
        TreeRow([3], [Completion([2, 1], [True, True])]),
    ]


def test_a_hidden_token_is_seen_by_itself_alone() -> None:
    """Columns are 5 H 6 | 8 H 4 3 | 2 1; columns 1 and 4 are hidden. The rows below are who each token sees."""
    batch = collate(rows())
    assert batch.hidden is not None
    assert batch.hidden.int().tolist() == [[0, 1, 0, 0, 1, 0, 0, 0, 0], [0] * 9]
    assert attention_mask(batch)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 1, 1, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 0, 1, 1],
    ]
    assert collate([TreeRow([5], [Completion([8], [True])])]).hidden is None


@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_what_is_hidden_makes_no_difference_to_later_tokens(layout: Any, tiny_base: Any) -> None:
    """Another token at both hidden places: only the log-prob of that token and of the one that it predicts change."""
    before, after = (tiny_base.token_scores(collate(rows(*ids), layout)).per_token_logps for ids in ((7, 9), (17, 19)))
    changed = (before - after).abs() > 1e-5
    assert changed.int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_tree_and_flat_rows_agree(tiny_base: Any) -> None:
    with torch.no_grad():
        tree, flat = (tiny_base.token_scores(collate(rows(), layout)).per_token_logps for layout in ("tree", "flat"))
        seen = tiny_base.token_scores(collate([TreeRow(r.prompt_ids, r.completions) for r in rows()])).per_token_logps
    torch.testing.assert_close(tree, flat, atol=3e-5, rtol=0)
    assert (tree - seen).abs().max() > 1e-2, "hiding the prompt's token changed nothing"


def test_the_probe_tells_whether_a_model_can_hide(tiny_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is given no mask sees everything, as one with a recurrent state does."""
    assert hides_tokens(tiny_base)
    monkeypatch.setattr("lowrank_align.attention.attention_mask", lambda batch, window=None: everything(batch))
    assert not hides_tokens(tiny_base)


def everything(batch: Any) -> torch.Tensor:
    size = batch.input_ids.shape[1]
    return torch.ones(size, size, dtype=torch.bool).tril().expand(len(batch.input_ids), 1, size, size)
