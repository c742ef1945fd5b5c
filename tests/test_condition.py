"""Reward conditioning: which text stands before which answer, its loss, and that it is asked with the good one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align import adapters
from lowrank_align.methods.metrics import Metrics

PAIRS = [
    {"prompt": "Q1: ", "chosen": "fed", "rejected": "bug"},
    {"prompt": "Q2: ", "chosen": "lad", "rejected": "cow", "preference": 0.2},  # the second is better
    {"prompt": "Q3: ", "chosen": "up", "rejected": "go", "preference": 0.5},
]
KNOBS = {"good_text": "+ ", "bad_text": "- - "}


def texts(method: Any, row: Any) -> list[str]:
    return [method.base.tokenizer.decode(c.ids) for c in row.completions]


def test_each_side_stands_behind_its_text_and_ties_are_dropped(make_method: Callable[..., Any]) -> None:
    """The winner first; the third row is a tie. `+ ` is 2 tokens, `- - ` 4, an answer 3 letters and its end."""
    method, rows = make_method("condition", PAIRS, **KNOBS)
    assert [texts(method, row) for row in rows] == [["+ fed</s>", "- - bug</s>"], ["+ cow</s>", "- - lad</s>"]]
    assert [c.mask for c in rows[0].completions] == [[False] * 2 + [True] * 4, [False] * 4 + [True] * 4]
    encode = method.base.tokenizer.encode
    assert method.asked(rows[0]) == encode("Q1: ") + encode("+ ", add_special_tokens=False)


def test_rankings_give_best_and_worst_and_labels_choose_the_text(make_method: Callable[..., Any]) -> None:
    ranking = {"prompt": "Q: ", "completions": ["mid", "fly", "bug", "zoo"], "ranks": [2, 1, 3, 3]}
    equal = {"prompt": "Q: ", "completions": ["a", "b"], "ranks": [1, 1]}
    method, rows = make_method("condition", [ranking, equal], **KNOBS)
    assert [texts(method, row) for row in rows] == [["+ fly</s>", "- - bug</s>"]]
    labelled = [
        {"prompt": "Q: ", "completion": "fly", "label": True},
        {"prompt": "Q: ", "completion": "x", "label": False},
    ]
    method, rows = make_method("condition", labelled, **KNOBS)
    assert [texts(method, row) for row in rows] == [["+ fly</s>"], ["- - x</s>"]]


def test_the_loss_is_the_mean_over_the_answers_tokens(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """From the model's own logits on prompt + text + answer alone: 16 tokens of four answers, 8 good and 8 bad ones."""
    method, rows = make_method("condition", PAIRS, **KNOBS)
    losses: dict[bool, list[float]] = {True: [], False: []}
    with tiny_base.role("policy"), torch.no_grad():
        for row in rows:
            for good, completion in zip((True, False), row.completions, strict=True):
                ids = row.prompt_ids + completion.ids
                logps = tiny_base.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                losses[good] += [-logps[i - 1, ids[i]].item() for i in range(len(ids) - 4, len(ids))]
    seen = Metrics()
    loss = method.step(rows, method.weight(rows), seen).item()
    assert loss == pytest.approx(sum(losses[True] + losses[False]) / 16, rel=1e-5)
    assert seen.results()["loss/good"] == pytest.approx(sum(losses[True]) / 8, rel=1e-5)
    assert seen.results()["loss/bad"] == pytest.approx(sum(losses[False]) / 8, rel=1e-5)


def test_it_learns_both_and_is_asked_with_the_good_text(run: Callable[..., Path], tiny_base: Any) -> None:
    """The same prompt behind either text gets either answer."""
    from lowrank_align.rollout import sample

    row = {"prompt": "Colour? ", "chosen": "red", "rejected": "mud"}
    folder = run(
        "condition", [row], "run", max_steps=25, batch_size=1, learning_rate=1e-2, rank=8, sample_steps=25, **KNOBS
    )
    encode = tiny_base.tokenizer.encode
    asked = [encode("Colour? ") + encode(text, add_special_tokens=False) for text in ("+ ", "- - ")]
    with tiny_base.role("policy"):
        answers = sample(
            tiny_base, asked, end_ids=[tiny_base.tokenizer.eos_token_id], max_new_tokens=6,
            generator=torch.Generator(), temperature=0.0,
        )  # fmt: skip
    assert [tiny_base.tokenizer.decode(a[0].ids, skip_special_tokens=True) for a in answers] == ["red", "mud"]
    shown = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    assert shown["prompt"] == "Colour? "
    assert adapters.answer_prefix(folder) == "+ "
    assert json.loads((folder / "provenance.json").read_text())["answer_prefix"] == "+ "
    assert '`"+ "`' in (folder / "README.md").read_text()


def test_a_run_that_goes_on_takes_the_text_over_and_a_reward_model_does_not(run: Callable[..., Path]) -> None:
    first = run("condition", PAIRS, "first", **KNOBS)
    on = run("sft", [{"prompt": "Q: ", "completion": "A"}], "on", adapter=str(first))
    reward = run("reward", PAIRS, "reward", adapter=str(first))
    assert adapters.answer_prefix(on) == "+ "
    assert adapters.answer_prefix(reward) == ""
