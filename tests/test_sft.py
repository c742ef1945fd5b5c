"""SFT: which tokens it learns, what its loss is, and that it learns them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.errors import UserError
from lowrank_align.methods.metrics import Metrics

ROWS = [{"prompt": "Colour? ", "completion": "red"}, {"prompt": "Number? ", "completion": "twenty-two"}]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def last_line(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_loss_is_the_mean_over_all_trained_tokens(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """From the model's own logits on each row alone: sum of -log p over 4 + 11 tokens (letters, </s>), divided by 15.

    "the" is no part of these rows and "in", "er", " a" neither, so a letter is a token.
    """
    method, rows = make_method("sft", ROWS)
    losses, accurate = [], []
    with tiny_base.role("policy"), torch.no_grad():
        for row in rows:
            answer = row.completions[0].ids
            logits = tiny_base.model(input_ids=torch.tensor([row.prompt_ids + answer])).logits[0]
            predictions = logits[len(row.prompt_ids) - 1 : -1].double().log_softmax(-1)
            losses += [-p[i].item() for p, i in zip(predictions, answer, strict=True)]
            accurate += [p.argmax().item() == i for p, i in zip(predictions, answer, strict=True)]
    assert len(losses) == 15
    seen = Metrics()
    loss = method.step(rows, method.weight(rows), seen).item()
    assert loss == pytest.approx(sum(losses) / 15, rel=1e-5)
    assert seen.results()["num_tokens"] == 15
    assert seen.results()["mean_token_accuracy"] == pytest.approx(sum(accurate) / 15)


@pytest.mark.parametrize(("train_on", "tokens"), [("all", 6 + 8), ("last", 8)])
def test_turns_that_are_trained(train_on: str, tokens: int, run: Callable[..., Path]) -> None:
    """ "Hello" and "So long" are 5 and 7 letters, each with its end-of-turn token."""
    folder = run("sft", [{"messages": CHAT}], "run", train_on=train_on, max_steps=1, batch_size=1)
    assert last_line(folder)["num_tokens"] == tokens


def test_it_learns_to_answer(run: Callable[..., Path], tiny_base: Any) -> None:
    """Two answers by heart: greedy decoding gives them, and stops."""
    from lowrank_align.rollout import sample

    run("sft", ROWS, "run", max_steps=40, batch_size=2, learning_rate=1e-2, rank=8)
    encode = tiny_base.tokenizer.encode
    with tiny_base.role("policy"):
        answers = sample(
            tiny_base,
            [encode(row["prompt"]) for row in ROWS],
            end_ids=[tiny_base.tokenizer.eos_token_id],
            max_new_tokens=20,
            generator=torch.Generator(),
            temperature=0.0,
        )
    texts = [tiny_base.tokenizer.decode(answer[0].ids, skip_special_tokens=True) for answer in answers]
    assert texts == [row["completion"] for row in ROWS]
    assert all(answer[0].finished for answer in answers)


def test_an_adapter_goes_on(run: Callable[..., Path]) -> None:
    """The second run begins with the first one's last loss, not with the bare base's, and keeps its rank."""
    knobs = {"batch_size": 2, "learning_rate": 1e-2, "lr_schedule": "constant"}
    first = run("sft", ROWS, "first", max_steps=12, rank=3, **knobs)
    bare = json.loads((first / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    second = run("sft", ROWS, "second", max_steps=1, rank=7, adapter=str(first), **knobs)
    loss = last_line(second)["loss"]
    assert loss < 0.7 * bare
    assert math.isclose(loss, last_line(first)["loss"], rel_tol=0.3)
    assert json.loads((second / "adapter" / "adapter_config.json").read_text())["r"] == 3
    parent = json.loads((second / "provenance.json").read_text())["parent"]
    assert parent["run"] == str(first)


def test_a_reward_run_is_no_start(run: Callable[..., Path]) -> None:
    pairs = [{"prompt": "p ", "chosen": "a", "rejected": "b"}]
    reward = run("reward", pairs, "reward", max_steps=1)
    with pytest.raises(UserError, match="is a reward run, where a policy is expected") as error:
        run("sft", ROWS, "sft", adapter=str(reward))
    assert error.value.exit_code == 2
