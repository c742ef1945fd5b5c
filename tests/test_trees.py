"""Tree rows: where every token stands, who sees whom, and that a tree gives what separate rows give."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowrank_align.base import Base
from lowrank_align.trees import Comparison, Completion, TreeRow, attention_mask, collate, collate_comparisons

TWO_ROWS = [
    TreeRow([5, 6], [Completion([7, 8, 9], [False, True, True]), Completion([4], [True])]),
    TreeRow([3], [Completion([2, 1], [True, True])]),
]


def separate_logps(model: Any, rows: list[TreeRow]) -> list[Tensor]:
    """Of each completion, the log-probs of its tokens: one plain forward pass a sequence, no code of ours."""
    found = []
    for row in rows:
        for completion in row.completions:
            ids = torch.tensor([row.prompt_ids + completion.ids])
            logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
            start = len(row.prompt_ids)
            found.append(torch.stack([logps[i - 1, ids[0, i]] for i in range(start, ids.shape[1])]))
    return found


def plain_model(folder: Any, quantize: str) -> Any:
    configs = {
        "none": None,
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=configs[quantize])
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else a bf16 kernel computes, where the CPU has one
    return model.eval()


def assert_same(ours: Tensor, separate: list[Tensor], tolerance: float) -> None:
    """(N, C) against one tensor a completion; 0 beyond each completion's end."""
    assert ours.shape == (len(separate), max(map(len, separate)))
    for mine, theirs in zip(ours, separate, strict=True):
        torch.testing.assert_close(mine[: len(theirs)], theirs, atol=tolerance, rtol=0)
        assert not mine[len(theirs) :].any()


# ---- the layout of a batch


def test_tree_batch_by_hand() -> None:
    """Row 0 is `5 6 | 7 8 9 | 4`, row 1 `3 | 2 1` and three columns of padding: T = 6, C = 3.

    Positions go on from the prompt's end, so both completions of row 0 begin at 2. The prompt's last token, at flat
    index 1 in row 0 and 6 in row 1, predicts every first token; a later one is predicted by the token before it.
    """
    batch = collate(TWO_ROWS, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4], [3, 2, 1, 99, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2], [0, 1, 2, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 1, -1, -1, -1]]
    assert batch.targets.tolist() == [[7, 8, 9], [4, 0, 0], [2, 1, 0]]
    assert batch.predict_from.tolist() == [[1, 2, 3], [1, 0, 0], [6, 7, 0]]
    assert batch.token_at.tolist() == [[2, 3, 4], [5, 0, 0], [7, 8, 0]]
    assert batch.token_mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.completion_mask.int().tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.row_of.tolist() == [0, 0, 1]
    assert batch.last_token_at.tolist() == [4, 5, 8]
    assert batch.num_tokens.tolist() == [2, 1, 2]


def test_flat_batch_by_hand() -> None:
    """Every completion has a row of its own with the prompt before it: T = 5, so row r starts at flat index 5 r."""
    batch = collate(TWO_ROWS, "flat", pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 4, 99, 99], [3, 2, 1, 99, 99]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 2, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, -1, -1], [0, 1, 1, -1, -1]]
    assert batch.targets.tolist() == [[7, 8, 9], [4, 0, 0], [2, 1, 0]]
    assert batch.predict_from.tolist() == [[1, 2, 3], [6, 0, 0], [10, 11, 0]]
    assert batch.token_at.tolist() == [[2, 3, 4], [7, 0, 0], [11, 12, 0]]
    assert batch.row_of.tolist() == [0, 0, 1]
    assert batch.last_token_at.tolist() == [4, 7, 12]


def test_comparisons_count_completions_through_the_batch() -> None:
    """Row 0 has three completions, so row 1's first one is number 3."""
    completion = Completion([1], [True])
    rows = [
        TreeRow([1], [completion] * 3, (Comparison(0, 1), Comparison(2, 0, 0.5, 1.5))),
        TreeRow([1], [completion] * 2, (Comparison(1, 0, 0.75),)),
    ]
    found = collate_comparisons(rows)
    assert found.first.tolist() == [0, 2, 4]
    assert found.second.tolist() == [1, 0, 3]
    assert found.preference.tolist() == [1.0, 0.5, 0.75]
    assert found.target_margin.tolist() == [0.0, 1.5, 0.0]
    assert found.row_of.tolist() == [0, 0, 1]


# ---- who sees whom


def test_mask_by_hand() -> None:
    """`5 6 | 7 8 9 | 4`: 4 sees the prompt and itself, none of 7 8 9. Of the padded row, padding sees itself alone."""
    mask = attention_mask(collate(TWO_ROWS)).int().squeeze(1).tolist()
    assert mask[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert mask[1] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_window_is_cut_by_position_not_by_column() -> None:
    """A window of 2 lets a token see itself and the one before it. Token 4 stands in column 5 but at position 2, right
    after the prompt's 6 (position 1, column 1): it sees that one. By columns it would see 9, or nothing of the prompt.
    """
    mask = attention_mask(collate(TWO_ROWS[:1]), window=2).int()[0, 0].tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0, 1],
    ]


# ---- log-probs and gradients


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 1e-5), ("nf4", 1e-5), ("int8", 1e-3)])
@torch.no_grad()
def test_tree_rows_equal_separate_rows(
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    family: str,
    quantize: str,
    tolerance: float,
) -> None:
    """K = 3, 1 and 2 completions of unequal lengths in one padded batch, and each row alone, unpadded."""
    # int8 layers keep columns with an activation over 6 in fp16, chosen over the whole batch: with smaller weights
    # there are none, and every token is rounded on its own.
    changes = {"initializer_range": 0.05} if quantize == "int8" else {}
    base = load_base(family, quantize, **changes)
    rows = [random_row(9, 3, 8, 5, seed=1), random_row(2, 4, seed=2), random_row(12, 7, 1, seed=3)]
    separate = separate_logps(plain_model(base.path, quantize), rows)
    assert base.layout == "tree"
    assert_same(base.token_scores(base.collate(rows)).per_token_logps, separate, tolerance)
    assert_same(base.token_scores(collate(rows, "flat")).per_token_logps, separate, tolerance)
    assert_same(base.token_scores(base.collate(rows[:1])).per_token_logps, separate[:3], tolerance)
    assert_same(base.token_scores(base.collate(rows[1:2])).per_token_logps, separate[3:4], tolerance)
    assert_same(base.token_scores(base.collate(rows[2:])).per_token_logps, separate[4:], tolerance)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_tree_gradients_equal_those_of_separate_rows(
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    speak: Callable[..., None],
    family: str,
    quantize: str,
) -> None:
    base = load_base(family, quantize)
    base.add_role("policy", rank=4)
    speak(base, "policy")
    rows = [random_row(9, 3, 8, seed=1), random_row(4, 5, seed=2)]
    gradients = []
    for layout in ("tree", "flat"):
        with base.role("policy") as role:
            scores = base.token_scores(collate(rows, layout))
            (scores.logps * torch.tensor([1.0, -0.5, 0.25])).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in role.parameters.items()})
        for parameter in role.parameters.values():
            parameter.grad = None
    tree, flat = gradients
    assert len(tree) == 2 * len([m for m in base.model.modules() if "policy" in getattr(m, "lora_A", ())])
    for name in tree:
        scale = flat[name].abs().max()
        assert scale > 0, name
        torch.testing.assert_close(tree[name] / scale, flat[name] / scale, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("family_with_window", ["mistral", "gemma3_text", "phi3"])
@torch.no_grad()
def test_sliding_window_cuts(
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    family_with_window: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window of 6 is shorter than the rows: without it, and with one cut by column, the log-probs are others."""
    base = load_base(family_with_window)
    rows = [random_row(9, 3, 8, 5, seed=1)]
    right = base.token_scores(base.collate(rows)).per_token_logps

    monkeypatch.setattr(base.attention, "window", 1000)
    without = base.token_scores(base.collate(rows)).per_token_logps
    monkeypatch.undo()
    assert all((without - right).abs().amax(dim=1) > 0.01)

    def by_column(batch: Any, window: int | None = None) -> Tensor:
        column = torch.arange(batch.input_ids.shape[1])
        return attention_mask(batch) & (column[:, None] - column[None, :] < (window or 1000))

    monkeypatch.setattr("lowrank_align.attention.attention_mask", by_column)
    columns = base.token_scores(base.collate(rows)).per_token_logps
    gap = (columns - right).abs().amax(dim=1)
    assert gap[0] < 1e-5  # the first completion stands right behind the prompt
    assert all(gap[1:] > 0.01)


@pytest.mark.parametrize("hybrid", ["falcon_h1", "qwen3_next"])
@torch.no_grad()
def test_recurrent_models_use_flat_rows(
    load_base: Callable[..., Any],
    random_row: Callable[..., TreeRow],
    caplog: pytest.LogCaptureFixture,
    hybrid: str,
) -> None:
    with caplog.at_level(logging.INFO, logger="lowrank_align"):
        base = load_base(hybrid, fresh=True)
    assert base.layout == "flat"
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lowrank_align")]
    assert len(lines) == 1
    assert lines[0].startswith(f"{base.name}: uses flat rows: the model takes no tree mask")
    rows = [random_row(9, 3, 8, 5, seed=1), random_row(2, 4, seed=2)]
    batch = base.collate(rows)
    assert batch.layout == "flat"
    assert len(batch.input_ids) == 4
    separate = separate_logps(plain_model(base.path, "none"), rows)
    assert_same(base.token_scores(batch).per_token_logps, separate, 1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@torch.no_grad()
def test_tree_rows_of_a_real_model(
    shared: Path, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWRANK_ALIGN_CACHE", str(tmp_path))
    base = Base.load(str(shared / "models" / "stories260k"), quantize=quantize, device="cpu")  # type: ignore[arg-type]
    prompt, *ends = (
        base.tokenizer(text, add_special_tokens=False).input_ids
        for text in (
            "Once upon a time, there was a girl named Lily. She",
            " loved to play outside.",
            " was sad.",
            " ran",
        )
    )
    rows = [TreeRow(prompt, [Completion(ids, [True] * len(ids)) for ids in ends])]
    rows.append(TreeRow(prompt[:3], rows[0].completions[1:]))
    assert base.layout == "tree"
    separate = separate_logps(plain_model(base.path, quantize), rows)
    assert_same(base.token_scores(base.collate(rows)).per_token_logps, separate, 1e-5)
