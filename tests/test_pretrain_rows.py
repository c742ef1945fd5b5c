"""Pretraining rows beside a method's own loss (PPO-ptx): which are drawn, what they weigh, and that they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.config import PPOSettings, resolve
from lowrank_align.errors import UserError
from lowrank_align.methods.metrics import Metrics

PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea, please: ", "b ", "And then? ")]
TEXTS = [{"text": "Red sky."}, {"prompt": "Colour? ", "completion": "blue or so"}, {"text": "Ho"}]
EXACT = "lowrank_align.tiny:exact_score"
SMALL = {"max_new_tokens": 6, "batch_size": 4, "ppo_epochs": 1, "minibatches": 1}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return str(path)


def no_retry(function: Callable[[int], Any], knob: str) -> Any:
    return function(4)


def drawn(method: Any, prompts: list[Any], texts: str) -> list[Any]:
    """The first minibatch of a method that was given the texts."""
    from lowrank_align.data.formats import Shape
    from lowrank_align.data.load import load_rows

    loaded = load_rows(texts, expect={Shape.demonstration}).rows
    method.pretrain_rows = [method.renderer.tree_row(row).tree for row in loaded]
    with torch.no_grad():
        return list(next(iter(method.round(prompts, 1, no_retry))))


def test_their_part_of_the_loss(make_method: Callable[..., Any], tiny_base: Any, texts: str) -> None:
    """Three times the mean over all trained tokens of -log p, from the model's own logits on each row alone."""
    method, prompts = make_method("ppo", PROMPTS, reward=EXACT, pretrain_data=texts, pretrain_coefficient=3.0, **SMALL)
    episodes = drawn(method, prompts, texts)
    losses: list[float] = []
    with tiny_base.role("policy"), torch.no_grad():
        for episode in episodes:
            row = episode.text.row
            answer = row.completions[0].ids
            logits = tiny_base.model(input_ids=torch.tensor([row.prompt_ids + answer])).logits[0]
            predictions = logits[len(row.prompt_ids) - 1 : -1].double().log_softmax(-1)
            losses += [-p[i].item() for p, i in zip(predictions, answer, strict=True)]
    seen = Metrics()
    with torch.no_grad():
        method.backward = lambda loss: None
        found = method.pretrain_step([episode.text for episode in episodes], seen).item()
    assert len({id(episode.text.row) for episode in episodes}) > 1, "one row drawn four times"
    assert found == pytest.approx(3 * sum(losses) / len(losses), rel=1e-5)
    assert seen.results()["loss/pretrain"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_micro_batches_add_up(make_method: Callable[..., Any], texts: str) -> None:
    """A minibatch of four in one piece, and in pieces of one and three: the same loss and the same gradient."""
    method, prompts = make_method("ppo", PROMPTS, reward=EXACT, pretrain_data=texts, **SMALL)
    episodes = drawn(method, prompts, texts)
    found = []
    for cuts in ([4], [1, 3]):
        losses, weight = [], method.weight(episodes)
        for parameter in method.base.trainable_parameters("policy").values():
            parameter.grad = None
        start = 0
        for size in cuts:
            losses.append(method.step(episodes[start : start + size], weight, Metrics()).item())
            start += size
        gradients = [p.grad.clone() for p in method.base.trainable_parameters("policy").values()]
        found.append((sum(losses), torch.cat([g.flatten() for g in gradients])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_which_rows_depends_on_the_place_alone(make_method: Callable[..., Any]) -> None:
    method, rows = make_method("ppo", PROMPTS, reward=EXACT, **SMALL)
    assert method.draw_pretrain_rows(5, 1, 0) == []
    method.pretrain_rows = rows
    first = [part.row for part in method.draw_pretrain_rows(20, 1, 0)]
    assert [part.row for part in method.draw_pretrain_rows(20, 1, 0)] == first
    assert [part.row for part in method.draw_pretrain_rows(20, 1, 1)] != first
    assert sorted(rows.index(row) for row in first) == sorted([0, 1, 2, 3] * 5)


def test_a_run_holds_to_them(run: Callable[..., Path], texts: str) -> None:
    """Their loss falls by a third within ten steps, beside a score that asks for something else."""
    knobs = {"learning_rate": 1e-2, "max_steps": 10, "reward": EXACT, "pretrain_data": texts, "lr_schedule": "constant"}
    folder = run("ppo", PROMPTS, "run", **SMALL | knobs)
    losses = [json.loads(line)["loss/pretrain"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] * 2 / 3
    assert json.loads((folder / "provenance.json").read_text())["pretrain_hash"]


def test_other_texts_are_not_resumed(run: Callable[..., Path], texts: str) -> None:
    from lowrank_align.progress import Progress

    class Killed(Progress):
        def step(self, step: int, figures: Any) -> None:
            if step == 2:
                raise ConnectionAbortedError

    knobs = {"reward": EXACT, "pretrain_data": texts, "max_steps": 3, "save_steps": 1, **SMALL}
    with pytest.raises(ConnectionAbortedError):
        run("ppo", PROMPTS, "run", progress=Killed(quiet=True), **knobs)
    Path(texts).write_text('{"text": "something else"}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl has changed since .*run began"):
        run("ppo", PROMPTS, "run", resume=True, **knobs)


def test_pairs_are_no_texts(run: Callable[..., Path], texts: str) -> None:
    Path(texts).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl:1: row: is of shape pair .*needed: demonstration"):
        run("ppo", PROMPTS, "run", reward=EXACT, pretrain_data=texts, **SMALL)


def test_a_weight_of_nothing() -> None:
    with pytest.raises(UserError, match="pretrain_coefficient: without pretrain_data"):
        resolve(PPOSettings, {"model": "x", "prompts": "x", "out": "x", "reward": "m:f", "pretrain_coefficient": 2.0})
