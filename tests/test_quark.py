"""Quark: what the pool holds, behind which text each answer is learned, its loss by hand, and that the score rises."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align import adapters
from lowrank_align.config import QuarkSettings
from lowrank_align.errors import UserError
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.quark import Pooled

PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea: ", "b ", "And then? ")]
SMALL = {
    "max_new_tokens": 6,
    "batch_size": 4,
    "quantiles": 3,
    "pool_steps": 1,
    "quantile_text": "{quantile}/{quantiles} ",
}
MODULES = itertools.count()


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The number of letters `a` in an answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"quark_score_{next(MODULES)}"
    (tmp_path / f"{name}.py").write_text(
        "def f(prompts, completions):\n    return [c.count('a') for c in completions]\n"
    )
    return f"{name}:f"


def no_retry(function: Callable[[int], Any], knob: str) -> Any:
    return function(2)


def tokens(method: Any, text: str) -> list[int]:
    return method.base.tokenizer.encode(text, add_special_tokens=False)


def test_prompts_are_asked_with_the_best_text(make_method: Callable[..., Any], reward: str) -> None:
    method, rows = make_method("quark", PROMPTS, reward=reward, **SMALL)
    encode = method.base.tokenizer.encode
    assert [method.asked(row) for row in rows] == [encode(row["prompt"]) + tokens(method, "3/3 ") for row in PROMPTS]


def test_the_pool_and_its_texts(make_method: Callable[..., Any], reward: str) -> None:
    """Until the pool is full answers are drawn without a text, then behind the best one's; the third step drops the
    first's.

    Every answer stands behind its quantile's text, and in the reference's row behind the prompt alone.
    """
    method, rows = make_method("quark", PROMPTS, reward=reward, **SMALL)
    encode, drawn = method.base.tokenizer.encode, []
    roll_out = method.roll_out
    method.roll_out = lambda rows, step, retry: (
        drawn.append([r.prompt_ids for r in rows]) or roll_out(rows, step, retry)
    )
    sizes = []
    for step in (1, 2, 3):
        parts = list(method.round(rows, step, no_retry))
        assert len(parts) == method.updates_per_step == 2
        items = [item for part in parts for item in part]
        sizes.append(len(items))
        pool = {tuple(one.prompt_ids + one.ids): one for one in method.pool}
        for item in items:
            one = pool[tuple(item.plain.prompt_ids + item.plain.completions[0].ids)]
            assert item.row.prompt_ids == one.prompt_ids + tokens(method, f"{item.quantile}/3 ")
            assert item.plain.prompt_ids == one.prompt_ids
            assert item.row.completions[0].ids == item.plain.completions[0].ids == one.ids
            assert one.score == method.renderer.decode(one.ids).count("a") - (
                one.ids[-1] not in method.renderer.end_ids
            )
    assert sizes == [4, 8, 8] and [one.step for one in method.pool] == [2] * 4 + [3] * 4
    plain = [encode(row["prompt"]) for row in PROMPTS]
    assert drawn == [plain, plain, [ids + tokens(method, "3/3 ") for ids in plain]]


def test_the_loss_by_hand(make_method: Callable[..., Any], reward: str, tiny_base: Any) -> None:
    """From the model's own logits: -log p of each answer's tokens behind its text, and beta times the sum over the
    vocabulary of ref (log ref - log p), the reference (the bare base) behind the prompt alone; over 3 + 2 tokens."""
    method, _ = make_method("quark", PROMPTS, reward=reward, beta=0.3, **SMALL)
    pool = [
        Pooled(1, tokens(method, "Q: "), tokens(method, "fed"), 1.0),
        Pooled(1, tokens(method, "Z"), tokens(method, "up"), 0.0),
    ]
    items = [method._sorted(pool[0], 3), method._sorted(pool[1], 1)]

    def logps(role: str, row: Any) -> torch.Tensor:
        ids = row.prompt_ids + row.completions[0].ids
        with tiny_base.role(role), torch.no_grad():
            said = tiny_base.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return said[len(row.prompt_ids) - 1 : -1]

    total = 0.0
    for item in items:
        ours, theirs = logps("policy", item.row), logps("base", item.plain)
        total -= ours.gather(1, torch.tensor(item.row.completions[0].ids)[:, None]).sum().item()
        total += 0.3 * (theirs.exp() * (theirs - ours)).sum().item()
    assert method.step(items, method.weight(items), Metrics()).item() == pytest.approx(total / 5, rel=1e-5)


def test_the_kls_gradient_is_that_of_the_whole_vocabulary(
    make_method: Callable[..., Any], tiny_base: Any, monkeypatch: pytest.MonkeyPatch, reward: str
) -> None:
    """In chunks with recompute as in one piece: the gradient of (with beta) - (without) is beta times the KL's own."""
    from lowrank_align import scoring

    method, _ = make_method("quark", PROMPTS, reward=reward, **SMALL)
    item = method._sorted(
        Pooled(1, tokens(method, "Q: "), tokens(method, "a long answer, of more than sixteen"), 1.0), 2
    )
    parameters = tiny_base.trainable_parameters("policy")
    found = []
    for chunk_bytes in (64 * 2**20, 1):
        monkeypatch.setattr(scoring, "CHUNK_BYTES", chunk_bytes)
        for parameter in parameters.values():
            parameter.grad = None
        method.step([item], 1.0, Metrics())
        found.append(torch.cat([p.grad.flatten() for p in parameters.values()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_micro_batches_make_no_difference(make_method: Callable[..., Any], tiny_base: Any, reward: str) -> None:
    method, rows = make_method("quark", PROMPTS, reward=reward, **SMALL)
    items = [item for part in method.round(rows, 1, no_retry) for item in part]
    parameters, found = tiny_base.trainable_parameters("policy"), []
    for size in (4, 1):
        for parameter in parameters.values():
            parameter.grad = None
        loss = sum(method.step(items[i : i + size], method.weight(items), Metrics()).item() for i in range(0, 4, size))
        found.append((loss, torch.cat([p.grad.flatten() for p in parameters.values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_a_reward_model_judges_answers_without_the_text(
    make_method: Callable[..., Any], run: Callable[..., Path]
) -> None:
    """What it gets for a rollout is prompt + answer."""
    pairs = [{"prompt": "Q: ", "chosen": "aaa", "rejected": "zz"}]
    method, rows = make_method("quark", PROMPTS, reward=str(run("reward", pairs, "reward", max_steps=1)), **SMALL)
    seen: list[Any] = []
    method.rewards.of_trees = lambda trees, size: (
        seen.extend(trees) or {next(iter(method.rewards.roles)): torch.zeros(len(trees))}
    )
    for step in (1, 2):
        list(method.round(rows, step, no_retry))
    encode = method.base.tokenizer.encode
    assert [tree.prompt_ids for tree in seen] == [encode(row["prompt"]) for row in PROMPTS] * 2


def test_a_run(run: Callable[..., Path], reward: str) -> None:
    """The first KL is 0, for the first answers are the reference's; what is best in the pool is above the average."""
    folder = run("quark", PROMPTS, "run", reward=reward, max_steps=3, learning_rate=1e-2, **SMALL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["loss/kl"] > 0 and abs(lines[-1]["objective/kl"]) > 1e-3
    assert [line["quark/pool"] for line in lines] == [4, 8, 8]
    assert adapters.answer_prefix(folder) == "3/3 "


def test_a_run_that_goes_on_has_its_parent_for_reference_behind_its_own_text(
    make_method: Callable[..., Any], run: Callable[..., Path], reward: str
) -> None:
    parent = run("condition", [{"prompt": "Q: ", "chosen": "a", "rejected": "b"}], "parent", good_text="+ ")
    method, rows = make_method("quark", PROMPTS, reward=reward, adapter=str(parent), untouched=True, **SMALL)
    items = [item for part in method.round(rows, 1, no_retry) for item in part]
    plain = [method.base.tokenizer.encode(row["prompt"]) + tokens(method, "+ ") for row in PROMPTS]
    assert sorted(item.plain.prompt_ids for item in items) == sorted(plain)
    assert items[0].row.prompt_ids[-4:] == tokens(method, f"{items[0].quantile}/3 ")


def test_without_beta_no_reference_is_asked(make_method: Callable[..., Any], reward: str) -> None:
    method, rows = make_method("quark", PROMPTS, reward=reward, beta=0, **SMALL)
    items = [item for part in method.round(rows, 1, no_retry) for item in part]
    assert "objective/kl" not in method.measured
    seen = Metrics()
    loss = method.step(items, method.weight(items), seen).item()
    assert loss == pytest.approx(seen.results()["loss/nll"], rel=1e-5) and "loss/kl" not in seen.results()


def test_an_adapter_on_the_output_layer_is_refused(
    make_method: Callable[..., Any], run: Callable[..., Path], reward: str
) -> None:
    """A new one, and one that is continued; that another role's sits on it is no matter."""
    targets = {"target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(UserError, match="^target_modules: adapts the output layer"):
        make_method("quark", PROMPTS, reward=reward, **targets, **SMALL)
    parent = run("sft", [{"prompt": "Q: ", "completion": "a"}], "parent", max_steps=1, **targets)
    with pytest.raises(UserError, match="^adapter: .*parent: adapts the output layer"):
        make_method("quark", PROMPTS, reward=reward, adapter=str(parent), **SMALL)
    method, _ = make_method("quark", PROMPTS, reward=reward, **SMALL)
    method.base.add_role("other", start_from=str(parent))
    method.add_roles()
    method.base.remove_role("other")


@pytest.mark.parametrize("text", ["the same", "{quantile", "{other}", "{0}", "{quantiles}"])
def test_texts_that_tell_nothing_apart_are_refused(text: str) -> None:
    from lowrank_align.config import resolve

    with pytest.raises(UserError, match="quantile_text"):
        resolve(QuarkSettings, {"model": "m", "prompts": "p", "reward": "r", "out": "o", "quantile_text": text})
