"""Chain of hindsight: what a chain looks like, what of it is trained, what is hidden, and how it is asked."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align import adapters
from lowrank_align.errors import UserError
from lowrank_align.methods import coh
from lowrank_align.methods.coh import Chain
from lowrank_align.methods.metrics import Metrics

PAIR = {"prompt": "Q: ", "chosen": "fed", "rejected": "bug"}
PAIRS = [{"prompt": f"Q{i}: ", "chosen": "fed" * (i + 1), "rejected": "bug"} for i in range(8)]


def shown(method: Any, row: Any) -> str:
    """The chain with its untrained stretches in square brackets."""
    text, (chain,) = "", row.completions
    for i, counts in zip(chain.ids, chain.mask, strict=True):
        piece = method.base.tokenizer.decode([i])
        text += piece if counts else f"[{piece}]"
    return text.replace("][", "")


def only(monkeypatch: pytest.MonkeyPatch, *wording: Any) -> None:
    monkeypatch.setattr(coh, "WORDINGS", (wording,))


@pytest.mark.parametrize(
    ("wording", "expected"),
    [
        (("+ ", "; - ", True), "[+ ]fed[; - ]bug</s>"),
        (("- ", "; + ", False), "[- ]bug[; + ]fed</s>"),
    ],
)
def test_a_chain_trains_both_answers_and_its_end(
    wording: Any, expected: str, make_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, *wording)
    method, rows = make_method("coh", [PAIR, PAIR | {"preference": 0.5}])
    assert [shown(method, row) for row in rows] == [expected], "and the tie is dropped"
    encode = method.base.tokenizer.encode
    assert method.asked(rows[0]) == encode("Q: ") + encode("A good answer: ", add_special_tokens=False)


def test_a_conversation_ends_its_turn_where_the_chain_ends(
    make_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, "+ ", "; - ", True)
    row = {"prompt": [{"role": "user", "content": "Hi"}]}
    row |= {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "fed"), ("rejected", "bug"))}
    method, rows = make_method("coh", [row])
    assert shown(method, rows[0]) == "[+ ]fed[; - ]bug<|im_end|>"


def test_best_and_worst_of_a_ranking(make_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "+ ", "; - ", True)
    row = {"prompt": "Q: ", "completions": ["mud", "fly", "bug"], "ranks": [2, 1, 3]}
    method, rows = make_method("coh", [row, row | {"ranks": [1, 1, 1]}])
    assert [shown(method, row) for row in rows] == ["[+ ]fly[; - ]bug</s>"]


def test_wordings_and_orders_are_drawn_by_seed_and_row(make_method: Callable[..., Any]) -> None:
    """Eight rows, six wordings: several occur, in either order; another seed draws others, the same seed the same."""
    drawn = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        method, rows = make_method("coh", PAIRS, seed=seed)
        drawn[name] = [shown(method, row) for row in rows]
    assert drawn["first"] == drawn["again"] != drawn["other"]
    words = {text[1 : text.index("]")] for text in drawn["first"] + drawn["other"]}
    assert words <= {first for first, _, _ in coh.WORDINGS} and len(words) >= 4


def test_a_chain_is_cut_in_its_second_answer_or_dropped(
    make_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`<s>Q: ` is 4 tokens (`: ` two of them), `+ fed; - bug</s>` 2 + 3 + 4 + 4: 17 in all. Of 15, `bu` is left of the
    second answer; of 13 nothing is."""
    only(monkeypatch, "+ ", "; - ", True)
    method, rows = make_method("coh", [PAIR], max_length=15)
    assert [shown(method, row) for row in rows] == ["[+ ]fed[; - ]bu"]
    assert make_method("coh", [PAIR], max_length=13)[1] == []


def test_the_loss_is_the_mean_over_the_answers_tokens(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """From the model's own logits on prompt + chain: the tokens of the answers, by their places in the chain."""
    method, rows = make_method("coh", PAIRS[:3])
    losses = []
    with tiny_base.role("policy"), torch.no_grad():
        for row in rows:
            (chain,) = row.completions
            ids, start = row.prompt_ids + chain.ids, len(row.prompt_ids)
            logps = tiny_base.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            losses += [-logps[start + i - 1, ids[start + i]].item() for i, counts in enumerate(chain.mask) if counts]
    assert len(losses) == 3 + 6 + 9 + 3 * 3 + 3
    items = [Chain(row) for row in rows]
    assert method.step(items, method.weight(items), Metrics()).item() == pytest.approx(sum(losses) / 30, rel=1e-5)


def test_hidden_tokens_are_drawn_anew_each_step_and_never_the_first(make_method: Callable[..., Any]) -> None:
    """At 0.5, a row's share is uniform in [0, 0.5]: over many rows a quarter of the tokens is hidden."""
    method, rows = make_method("coh", PAIRS, hidden_tokens=0.5)
    drawn = {}
    for step in (1, 1, 2):
        (items,) = method.round(rows * 20, step, None)
        marks = [[*item.row.prompt_hidden, *item.row.completions[0].hidden] for item in items]
        assert drawn.setdefault(step, marks) == marks
        assert not any(mark[0] for mark in marks)
        assert all(
            len(m) == len(r.prompt_ids) + len(r.completions[0].ids) for m, r in zip(marks, rows * 20, strict=True)
        )
    assert drawn[1] != drawn[2]
    share = sum(map(sum, drawn[1])) / sum(map(len, drawn[1]))
    assert share == pytest.approx(0.25, abs=0.04)
    (items,) = make_method("coh", PAIRS, hidden_tokens=0)[0].round(rows, 1, None)
    assert not any(any(item.row.completions[0].hidden) for item in items)


def test_micro_batches_make_no_difference(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """Loss and gradient of the batch in one piece and one by one, pretraining texts and hidden tokens among them."""
    method, rows = make_method("coh", PAIRS[:4], hidden_tokens=0.5)
    method.pretrain_rows = [row for row in rows[:2]]
    (items,) = method.round(rows, 3, None)
    assert any(any(item.row.completions[0].hidden) for item in items) and all(item.text for item in items)
    parameters = tiny_base.trainable_parameters("policy")
    found = []
    for size in (4, 1):
        for parameter in parameters.values():
            parameter.grad = None
        parts = [items[i : i + size] for i in range(0, 4, size)]
        loss = sum(method.step(part, method.weight(items), Metrics()).item() for part in parts)
        found.append((loss, torch.cat([p.grad.flatten() for p in parameters.values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_pretraining_texts_are_added_with_their_weight(make_method: Callable[..., Any]) -> None:
    """Loss with texts = loss without + coefficient times the texts' own, each measured on its own."""
    method, rows = make_method("coh", PAIRS[:2], hidden_tokens=0, pretrain_coefficient=0.5)
    alone = [Chain(row) for row in rows]
    plain = method.step(alone, method.weight(alone), Metrics()).item()
    method.pretrain_rows = rows  # the same two rows, so that their own loss is `plain`
    (items,) = method.round(rows, 1, None)
    seen = Metrics()
    assert method.step(items, method.weight(items), seen).item() == pytest.approx(1.5 * plain, rel=1e-5)
    assert seen.results()["loss/pretrain"] == pytest.approx(plain, rel=1e-5)


def test_a_model_that_cannot_hide_says_so(make_method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coh, "hides_tokens", lambda base: False)
    method, rows = make_method("coh", PAIRS)
    with pytest.raises(UserError, match="--hidden-tokens 0"):
        method.check_start(rows)
    make_method("coh", PAIRS, hidden_tokens=0)[0].check_start(rows)


def test_a_run(run: Callable[..., Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "The sea is salt."}) + "\n")
    folder = run(
        "coh", PAIRS, "run", max_steps=3, learning_rate=1e-2, pretrain_data=str(texts), eval_rows=2, eval_steps=3
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/chain"] < lines[0]["loss/chain"]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["loss/chain"] + lines[-1]["loss/pretrain"], rel=1e-5)
    assert math.isfinite(lines[-1]["eval_loss"])
    assert adapters.answer_prefix(folder) == "A good answer: "
