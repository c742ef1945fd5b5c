"""KTO: labels of single answers, a reference point of the whole batch, and that it learns."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.config import KTOSettings
from lowrank_align.methods.kto import imbalance, mismatch
from lowrank_align.methods.metrics import Metrics
from lowrank_align.trees import Completion, TreeRow

ROWS = [
    {"prompt": f"{i}: ", "completion": f"yes {word}" if good else f"no, not {word} at all", "label": good}
    for i, (word, good) in enumerate(
        [("one", True), ("two", False), ("three", True), ("four", False), ("five", True), ("six", True)]
    )
]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logratios(base: Any, rows: list[TreeRow]) -> list[float]:
    """Policy minus reference of each row's completion, each row on its own."""
    found = []
    for row in rows:
        batch, values = base.collate([row]), []
        for role in ("policy", "reference"):
            with base.role(role), torch.no_grad():
                values.append(base.token_scores(batch).per_token_logps.double().sum().item())
        found.append(values[0] - values[1])
    return found


def step(method: Any, rows: list[TreeRow], size: int) -> tuple[float, dict[str, float]]:
    """One update as the loop makes it, in micro-batches of `size`."""
    seen, total = Metrics(), 0.0
    (items,) = list(method.round(rows, 1, lambda function, knob: function(size)))
    for start in range(0, len(items), size):
        total += method.step(items[start : start + size], method.weight(items), seen).item()
    return total, seen.results()


def test_mismatched_answers() -> None:
    """Each prompt with the answer of the row before; cut to 4 tokens in all. One row has no other answer."""
    rows = [TreeRow([1] * n, [Completion([10 * n] * 3, [False, True, True])]) for n in (1, 2, 3)]
    turned = mismatch(rows, 4)
    assert [row.prompt_ids for row in turned] == [[1], [1, 1], [1, 1, 1]]
    assert [row.completions[0].ids for row in turned] == [[30, 30, 30], [10, 10], [20]]
    assert [row.completions[0].mask for row in turned] == [[False, True, True], [False, True], [False]]
    assert mismatch(rows[:1], 4) == []


@pytest.mark.parametrize("towards", [1, -1])
def test_loss_and_figures(towards: int, make_method: Callable[..., Any], tiny_base: Any) -> None:
    """z0 = max(0, mean of the mismatched log-ratios); good 2 (1 - s(beta (h - z0))), bad 1 - s(beta (z0 - h)).

    Once with a policy whose mismatched log-ratios are above 0 on average, once with one where z0 is 0.
    """
    method, rows = make_method("kto", ROWS, beta=0.3, desirable_weight=2.0)
    answers = mismatch(rows, 256)
    if (sum(logratios(tiny_base, answers)) > 0) != (towards > 0):
        for name, parameter in tiny_base.trainable_parameters("policy").items():
            if "lora_B" in name:
                parameter.data.neg_()
    z0 = max(0.0, sum(logratios(tiny_base, answers)) / 6)
    assert (z0 > 0) == (towards > 0)

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    h, labels = logratios(tiny_base, rows), [row["label"] for row in ROWS]
    expected = [
        2 * (1 - s(0.3 * (x - z0))) if good else 1 - s(0.3 * (z0 - x)) for x, good in zip(h, labels, strict=True)
    ]
    loss, found = step(method, rows, 6)
    assert loss == pytest.approx(sum(expected) / 6, rel=1e-4)
    assert found["kl"] == pytest.approx(z0, rel=1e-3)
    good, bad = ([0.3 * x for x, y in zip(h, labels, strict=True) if y is wanted] for wanted in (True, False))
    assert found["rewards/chosen"] == pytest.approx(sum(good) / 4, rel=1e-3)
    assert found["rewards/rejected"] == pytest.approx(sum(bad) / 2, rel=1e-3)
    assert found["rewards/margins"] == pytest.approx(sum(good) / 4 - sum(bad) / 2, rel=1e-3)


def test_pieces_of_a_batch(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """z0 is the batch's, so micro-batches of 6, 4 (all good rows but one in the first) and 1 are the same step."""
    method, rows = make_method("kto", ROWS, beta=0.3)
    rows = sorted(rows, key=lambda row: not row.label)
    results = []
    for size in (6, 4, 1):
        for parameter in tiny_base.trainable_parameters("policy").values():
            parameter.grad = None
        loss, figures = step(method, rows, size)
        results.append((loss, figures, [p.grad.clone() for p in tiny_base.trainable_parameters("policy").values()]))
    for loss, figures, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert figures == pytest.approx(results[0][1], rel=1e-3)
        for one, other in zip(results[0][2], gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("good", "bad", "weights", "line"),
    [
        (6, 4, (1, 1), None),  # 1.5
        (8, 2, (1, 1), "8 good rows and 2 bad ones do not weigh alike; --undesirable-weight 4 would make them"),
        (8, 2, (1, 4), None),
        (2, 8, (1, 0.5), "2 good rows and 8 bad ones do not weigh alike; --desirable-weight 2 would make them"),
        (8, 2, (1, 0), None),  # on purpose
        (3, 0, (1, 1), "all 3 rows are good: nothing holds against it; rows of both kinds teach what differs"),
    ],
)
def test_uneven_labels(good: int, bad: int, weights: tuple[float, float], line: str | None) -> None:
    rows = [TreeRow([1], [Completion([2], [True])], label=label) for label in [True] * good + [False] * bad]
    knobs = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    assert imbalance(rows, KTOSettings(model="m", data="d", out="o", **knobs)) == line


def test_the_first_loss_and_what_is_learnt(run: Callable[..., Path]) -> None:
    """At policy = reference every loss is 1/2; then good answers gain and bad ones lose. Held-out rows have a z0."""
    folder = run("kto", ROWS, "run", max_steps=12, batch_size=6, learning_rate=5e-3, eval_rows=2, eval_steps=12)
    first, *_, last = lines_of(folder)
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert last["rewards/margins"] > 0.5
    assert last["loss"] < 0.45
    assert 0 < last["eval_loss"] < 1 and last["eval_kl"] >= 0
