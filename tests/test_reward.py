"""Reward models: which labels count how, where scores are centred, and that they are learnt."""

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_align import adapters
from lowrank_align.errors import UserError
from lowrank_align.methods.metrics import Metrics
from lowrank_align.trees import Completion, TreeRow

PAIRS = [
    {"prompt": f"{i}: ", "chosen": f"good {word}", "rejected": f"bad, very bad {word}"}
    for i, word in enumerate(["one", "two", "three", "four", "five", "six"])
]
RANKING = {"prompt": "Rank: ", "completions": ["so so", "best", "bad", "also best"], "ranks": [2, 1, 3, 1]}


def scores(base: Any, rows: list[Any]) -> list[list[float]]:
    """Raw scores of every row's completions, each row on its own."""
    with base.role("reward"), torch.no_grad():
        return [base.scores(base.collate([row])).double().tolist() for row in rows]


def step(method: Any, rows: list[Any]) -> tuple[float, dict[str, float]]:
    seen = Metrics()
    return method.step(rows, method.weight(rows), seen).item(), seen.results()


def bradley_terry(difference: float, preference: float = 1.0) -> float:
    """-[mu log s(d) + (1 - mu) log s(-d)] in plain arithmetic."""
    return preference * math.log1p(math.exp(-difference)) + (1 - preference) * math.log1p(math.exp(difference))


def test_labels(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """A sure pair, a soft one, a tie, a turned one, one with a margin, and a soft one with a margin.

    The target is the difference of the scores less (2 mu - 1) margin; the batch is the mean over its rows.
    """
    labels = [{}, {"preference": 0.7}, {"preference": 0.5}, {"preference": 0.0}, {"margin": 1.5}]
    labels.append({"preference": 0.25, "margin": 2.0})
    method, rows = make_method(
        "reward", [{**p, **label} for p, label in zip(PAIRS, labels, strict=True)], centering_coefficient=0.0
    )
    mus, margins = [1, 0.7, 0.5, 0, 1, 0.25], [0, 0, 0, 0, 1.5, 2.0]
    differences = [a - b for a, b in scores(tiny_base, rows)]
    expected = [
        bradley_terry(d - (2 * mu - 1) * margin, mu) for d, mu, margin in zip(differences, mus, margins, strict=True)
    ]
    loss, figures = step(method, rows)
    assert loss == pytest.approx(sum(expected) / 6, rel=1e-5)
    decided = [d if mu > 0.5 else -d for d, mu in zip(differences, mus, strict=True) if mu != 0.5]
    assert figures["accuracy"] == pytest.approx(sum(d > 0 for d in decided) / 5)
    assert figures["margin"] == pytest.approx(sum(decided) / 5, rel=1e-4)


def test_a_ranking_counts_as_one_row(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """Its 6 comparisons (one a tie, between the two best) have the mean; with a pair: half of the batch each."""
    method, rows = make_method("reward", [PAIRS[0], RANKING], centering_coefficient=0.0)
    (good, bad), (a, b, c, d) = scores(tiny_base, rows)
    six = [bradley_terry(x) for x in (b - a, d - a, a - c, b - c, d - c)] + [bradley_terry(b - d, 0.5)]
    loss, figures = step(method, rows)
    assert loss == pytest.approx((bradley_terry(good - bad) + sum(six) / 6) / 2, rel=1e-5)
    assert figures["mean_reward"] == pytest.approx((good + bad + a + b + c + d) / 6, rel=1e-4)
    assert figures["min_reward"] == pytest.approx(min(good, bad, a, b, c, d), rel=1e-4)
    assert figures["max_reward"] == pytest.approx(max(good, bad, a, b, c, d), rel=1e-4)


def test_a_ranking_as_a_whole_order(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """Weights e^score a, b, c, d with b and d tied for the best, then a, then c; the mean over the two orders' -log p:

    b then d: b / (a+b+c+d) * d / (a+c+d); d then b: d / (a+b+c+d) * b / (a+b+c); both times a / (a + c).
    The pair beside it counts as ever, and centring goes over all comparisons: + .3 times the mean of each row's.
    """
    method, rows = make_method("reward", [PAIRS[0], RANKING], ranking="plackett_luce", centering_coefficient=0.3)
    (good, bad), four = scores(tiny_base, rows)
    a, b, c, d = (math.exp(score) for score in four)
    total, last = a + b + c + d, math.log(a / (a + c))
    orders = [-math.log(b / total * d / (a + c + d)) - last, -math.log(d / total * b / (a + b + c)) - last]
    sums = [four[i] + four[j] for j in range(4) for i in range(j)]
    centred = 0.3 * ((good + bad) ** 2 + sum(x**2 for x in sums) / 6)
    loss, _ = step(method, rows)
    assert loss == pytest.approx((bradley_terry(good - bad) + sum(orders) / 2 + centred) / 2, rel=1e-5)


def test_centring(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """A coefficient of .3 adds .3 times the mean of (r_chosen + r_rejected)^2."""
    losses = []
    for coefficient in (0.0, 0.3):
        method, rows = make_method("reward", PAIRS, centering_coefficient=coefficient)
        losses.append(step(method, rows)[0])
    added = 0.3 * sum((a + b) ** 2 for a, b in scores(tiny_base, rows)) / 6
    assert losses[1] - losses[0] == pytest.approx(added, rel=1e-4)
    assert added > 0.01


def test_the_head_at_the_start(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """64 hidden units: drawn with a standard deviation of 1 / sqrt(65) = .124, fp32, trained with the adapter."""
    make_method("reward", PAIRS, untouched=True)
    head = tiny_base.roles["reward"].head
    assert head.weight.shape == (1, 64)
    assert head.bias is None
    assert head.weight.dtype == torch.float32
    assert head.weight.requires_grad
    assert 0.09 < head.weight.std().item() < 0.16


@pytest.mark.parametrize("over", ["all", "chosen", "reference"])
@pytest.mark.parametrize("shift_rows", [256, 4])
def test_shift(
    over: str, shift_rows: int, run: Callable[..., Path], tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean shifted score over what was asked for is 0: all completions, the best of every row, or own answers."""
    module: Any = importlib.import_module("lowrank_align.methods.reward")
    answers: list[Any] = []
    before = module.sample

    def sample(*arguments: Any, **options: Any) -> Any:
        answers.extend(before(*arguments, **options))
        return answers

    monkeypatch.setattr(module, "sample", sample)
    kept: list[Any] = []
    finish = module.Reward.finish
    monkeypatch.setattr(
        module.Reward, "finish", lambda self, rows, retry: (kept.extend(rows), finish(self, rows, retry))[1]
    )
    rows = [*PAIRS, RANKING, {**PAIRS[0], "prompt": "turned: ", "preference": 0.0}]
    knobs = {"shift_over": over, "shift_rows": shift_rows, "sample_tokens": 7, "centering_coefficient": 0.0}
    folder = run("reward", rows, "run", learning_rate=1e-2, lora_dropout=0.1, **knobs)

    kept = kept[:shift_rows]
    if over == "all":
        asked = [score for row in scores(tiny_base, kept) for score in row]
    elif over == "chosen":
        best = [1 if len(row.completions) == 4 or row.index == 7 else 0 for row in kept]
        asked = [row[i] for row, i in zip(scores(tiny_base, kept), best, strict=True)]
    else:
        assert [group[0].prompt_ids for group in answers] == [row.prompt_ids for row in kept]
        own = [TreeRow(g[0].prompt_ids, [Completion(g[0].ids, [True] * len(g[0].ids))]) for g in answers]
        asked = [row[0] for row in scores(tiny_base, own)]
    found = json.loads((folder / "reward.json").read_text())
    assert found == {"shift": pytest.approx(found["shift"]), "over": over, "rows": min(shift_rows, 8)}
    assert sum(score - found["shift"] for score in asked) / len(asked) == pytest.approx(0, abs=1e-5)
    assert abs(found["shift"]) > 0.01
    with tiny_base.role("reward"), torch.no_grad():
        batch = tiny_base.collate(kept[:2])
        shifted = tiny_base.scores(batch) - tiny_base.scores(batch, shifted=True)
    torch.testing.assert_close(shifted, torch.full_like(shifted, found["shift"]), rtol=0, atol=1e-6)


def test_own_answers_are_the_start_adapters(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`reference` answers come from the adapter that the reward model started from, without what it learnt since."""
    module: Any = importlib.import_module("lowrank_align.methods.reward")
    seen: list[bool] = []
    before = module.sample
    sft = run("sft", [{"prompt": "p", "completion": "c"}], "sft", max_steps=2, learning_rate=1e-2)
    adapter = load_file(sft / "adapter" / "adapter_model.safetensors")

    def sample(base: Any, *arguments: Any, **options: Any) -> Any:
        weights = base.active_role.parameters
        seen.append(all(torch.equal(p, adapter[f"base_model.model.{name}"]) for name, p in weights.items()))
        return before(base, *arguments, **options)

    monkeypatch.setattr(module, "sample", sample)
    run("reward", PAIRS, "run", adapter=str(sft), shift_over="reference", sample_tokens=4, learning_rate=1e-2)
    assert seen == [True]


def test_own_answers_stand_behind_the_starts_own_text(
    run: Callable[..., Path], tiny_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is asked as it was trained; its answers are scored without the text, as all others are.

    The context has 256 tokens: room for a prompt of 4 and an answer of 250, not for the text between them.
    """
    module: Any = importlib.import_module("lowrank_align.methods.reward")
    answers: list[Any] = []
    before = module.sample

    def sample(*arguments: Any, **options: Any) -> Any:
        answers.extend(before(*arguments, **options))
        return answers

    monkeypatch.setattr(module, "sample", sample)
    sft = run("sft", [{"prompt": "p", "completion": "c"}], "sft", max_steps=2, learning_rate=1e-2)
    adapters.write_prompting(sft, "Quality ")
    knobs = {"adapter": str(sft), "shift_over": "reference", "learning_rate": 1e-2, "max_steps": 1}
    folder = run("reward", PAIRS, "run", sample_tokens=4, **knobs)
    text = tiny_base.tokenizer.encode("Quality ", add_special_tokens=False)
    prompts = [group[0].prompt_ids for group in answers]
    assert len(prompts) == 6 and all(prompt[-len(text) :] == text for prompt in prompts)
    own = [TreeRow(g[0].prompt_ids[: -len(text)], [Completion(g[0].ids, [True] * len(g[0].ids))]) for g in answers]
    mean = sum(row[0] for row in scores(tiny_base, own)) / 6
    assert json.loads((folder / "reward.json").read_text())["shift"] == pytest.approx(mean, abs=1e-5)
    with pytest.raises(UserError, match="no prompt leaves room for 250 new tokens"):
        run("reward", PAIRS, "none", sample_tokens=250, max_length=64, **knobs)


def test_it_loads_with_plain_peft(run: Callable[..., Path], tiny_base: Any, tiny_llama: Path) -> None:
    """`AutoModelForSequenceClassification` + `PeftModel` on whole sequences: the same raw scores within 1e-4."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder = run("reward", PAIRS, "run", learning_rate=1e-2)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    tokenizer = tiny_base.tokenizer
    for pair in PAIRS:
        ids = tokenizer.encode(pair["prompt"] + pair["chosen"] + "</s>")
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids])).logits.item()
        assert scores(tiny_base, [TreeRow(ids[:2], [Completion(ids[2:], [True] * len(ids[2:]))])]) == [
            [pytest.approx(theirs, abs=1e-4)]
        ]


def test_it_learns_its_pairs(run: Callable[..., Path]) -> None:
    folder = run("reward", PAIRS, "run", max_steps=10, batch_size=6, micro_batch_size=6, learning_rate=5e-3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["loss"] < 0.2


def test_samples_are_scores(run: Callable[..., Path], tiny_base: Any) -> None:
    """Of the first rows, as they are at that step."""
    folder = run("reward", PAIRS, "run", sample_steps=4)
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == "0: "
    assert sample["completions"] == ["good one", "bad, very bad one"]
    assert sample["scores"] == pytest.approx(scores(tiny_base, [pair_0(tiny_base)])[0], rel=1e-4)


def pair_0(base: Any) -> Any:
    """The first pair as a row: <s>, the prompt's characters, and each answer's with </s>."""
    encode = base.tokenizer.encode
    answers = [encode(PAIRS[0][name] + "</s>", add_special_tokens=False) for name in ("chosen", "rejected")]
    return TreeRow(encode(PAIRS[0]["prompt"]), [Completion(ids, [True] * len(ids)) for ids in answers])
