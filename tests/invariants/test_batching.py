"""What a row contributes does not depend on the rows beside it, on how the batch is cut, or on the layout of its row.

Nothing is derived here: each test computes the same step in two ways that must agree.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lowrank_align.methods.metrics import Metrics

MakeMethod = Callable[..., Any]

# Eight rows: completions of 2 to 70 tokens, so that a mean over rows and one over tokens differ, and so does padding.
ANSWERS = [
    "a thin blue line",
    "b",
    "something much longer than the others, there in the winter rain, by the inner harbour",
    "no",
    "def ghi",
    "then",
    "the other one is better",
    "x y z",
]
PROMPTS = ["Write: ", "Say it to me again, and then once more, please: ", "ab ", "Q? "] * 2
# PPO with one update a step, GRPO and RLOO with several: the others' policy is the one that drew
ONLINE: dict[str, dict[str, Any]] = {
    "ppo": {"ppo_epochs": 1, "minibatches": 1},
    "grpo": {"group_size": 3, "inner_epochs": 2, "reduction": "sequence_mean"},
    "rloo": {"group_size": 3, "inner_epochs": 2},
    "online-dpo": {"group_size": 3},
    "expert": {"group_size": 3},
}


def rows_of(method: str) -> list[dict[str, Any]]:
    if method in ONLINE:
        return [{"prompt": prompt} for prompt in PROMPTS]
    if method == "sft":
        return [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    rows: list[dict[str, Any]] = [
        {"prompt": p, "chosen": a, "rejected": b}
        for p, a, b in zip(PROMPTS, ANSWERS, [*ANSWERS[3:], *ANSWERS[:3]], strict=True)
    ]
    rows[1] |= {"preference": 0.7, "margin": 0.5}
    rows[4] |= {"preference": 0.5}
    # rankings and pairs in one batch: rows with 6 comparisons and rows with 1
    rows[6] = {"prompt": "Rank: ", "completions": ANSWERS[:4], "ranks": [2, 1, 3, 1]}
    return rows


def as_items(method: Any, name: str, rows: Sequence[Any]) -> list[Any]:
    """The items of one optimiser update: the rows, or the first batch that comes of rollouts of them."""
    if name not in ONLINE:
        return list(rows)
    with torch.no_grad():
        items = next(iter(method.round(rows, 1, lambda function, knob: function(8))))
    generator = torch.Generator().manual_seed(2)
    for role in method.trained:  # away from the policy that made the rollouts, so that ratios are not all 1
        for parameter in method.base.trainable_parameters(role).values():
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return list(items)


def make(make_method: MakeMethod, name: str, **knobs: Any) -> tuple[Any, list[Any]]:
    if name in ONLINE:
        knobs |= ONLINE[name] | {
            "reward": "builtins:len_of_completions",
            "batch_size": 8,
            "max_new_tokens": 24,
            "missing_eos_penalty": 0.3,
        }
    method, rows = make_method(name, rows_of(name), **knobs)
    return method, as_items(method, name, rows)


@pytest.fixture(autouse=True)
def reward_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that the PPO settings can name without a file."""
    import builtins

    def score(prompts: list[str], completions: list[str]) -> list[float]:
        return [len(completion) / 10 for completion in completions]

    monkeypatch.setattr(builtins, "len_of_completions", score, raising=False)


def one_update(method: Any, items: Sequence[Any], sizes: Sequence[int]) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Loss, metrics and gradients of all trained roles, the items cut into micro-batches of these sizes."""
    parameters = {
        f"{role}/{name}": p for role in method.trained for name, p in method.base.trainable_parameters(role).items()
    }
    for parameter in parameters.values():
        parameter.grad = None
    assert sum(sizes) == len(items)
    seen, loss, start = Metrics(), 0.0, 0
    for size in sizes:
        loss += method.step(items[start : start + size], method.weight(items), seen).item()
        start += size
    return loss, seen.results(), {name: p.grad.clone() for name, p in parameters.items()}


def assert_same_update(one: Any, other: Any, tolerance: float) -> None:
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    assert one[1] == pytest.approx(other[1], abs=10 * tolerance)  # logps of -300 nats are sums of fp32
    assert max(gradient.abs().max() for gradient in one[2].values()) > 0.01
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name], rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)


METHODS = ["sft", "reward", "dpo", *ONLINE]


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_is_the_batch(name: str, make_method: MakeMethod) -> None:
    """8 x 1, 3 + 3 + 2 and 1 x 8: one loss, one gradient, one set of metrics."""
    method, items = make(make_method, name)
    whole = one_update(method, items, [8])
    assert_same_update(one_update(method, items, [1] * 8), whole, 2e-6)
    assert_same_update(one_update(method, items, [3, 3, 2]), whole, 2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_does_not_feel_its_neighbours(name: str, make_method: MakeMethod) -> None:
    """Beside the long third row the others are padded to its length; without it their sums are the same.

    The whole batch minus the long row alone = the seven others alone, each part divided by the whole batch's weight.
    """
    method, items = make(make_method, name)
    items = sorted(items, key=lambda item: len(getattr(item, "row", item).completions[0].ids))
    others, longest = items[:-1], items[-1:]
    weight, seen = method.weight(items), Metrics()
    alone = method.step(others, weight, seen).item()
    together = method.step(items, weight, seen).item()
    assert together - method.step(longest, weight, seen).item() == pytest.approx(alone, abs=2e-6)
    assert abs(alone) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_tree_rows_equal_flat_rows(name: str, make_method: MakeMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that share a prompt's computation and completions in rows of their own: the same whole step."""
    method, items = make(make_method, name)
    assert method.base.layout == "tree"
    tree = one_update(method, items, [8])
    monkeypatch.setattr(method.base, "layout", "flat")
    assert_same_update(one_update(method, items, [8]), tree, 1e-5)


def test_what_stands_in_the_padding_is_not_read(make_method: MakeMethod) -> None:
    """Random ids in place of the pad token: log-probs, values and scores stay as they are, bit for bit."""
    from dataclasses import replace

    method, rows = make_method("reward", rows_of("reward"))
    base = method.base
    batch = base.collate(rows)
    noise = torch.randint(base.config.vocab_size, batch.input_ids.shape)
    other = replace(batch, input_ids=torch.where(batch.segment_ids < 0, noise, batch.input_ids))
    assert not torch.equal(batch.input_ids, other.input_ids)
    with base.role("reward"), torch.no_grad():
        for read in (base.scores, base.values, lambda b: base.token_scores(b).per_token_logps):
            assert torch.equal(read(batch), read(other))


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_runs_with_micro_batches_of_1_and_8(name: str, run: Callable[..., Any]) -> None:
    """Whole runs of three steps: the adapter is the same within 3e-6 (of steps of 1e-3), and so is every figure."""
    from safetensors.torch import load_file

    from lowrank_align.runs import read_metrics

    knobs: dict[str, Any] = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3}
    if name in ONLINE:
        knobs |= {"reward": "builtins:len_of_completions", "max_new_tokens": 12}
    folders = [run(name, rows_of(name), f"micro-{size}", micro_batch_size=size, **knobs) for size in (1, 8)]
    one, eight = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders)
    assert max(tensor.abs().max() for key, tensor in one.items() if "lora_B" in key) > 5e-4, "nothing was trained"
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, eight[key], rtol=0, atol=3e-6, msg=lambda m, k=key: k + m)
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in folders), strict=True):
        assert a | {"seconds": 0} == pytest.approx(b | {"seconds": 0}, abs=1e-4)
