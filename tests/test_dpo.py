"""DPO: it starts at its reference, its labels come through, and it learns."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.errors import NumericError
from lowrank_align.methods.dpo import DPO
from lowrank_align.methods.method import Metrics

PAIRS = [
    {"prompt": f"{i}: ", "chosen": f"yes {word}", "rejected": f"no, not {word} at all"}
    for i, word in enumerate(["one", "two", "three", "four", "five", "six", "seven", "eight"])
]
DEMONSTRATIONS = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in PAIRS]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def sft(run: Callable[..., Path]) -> str:
    """A run whose adapter is far from the bare base."""
    return str(run("sft", DEMONSTRATIONS, "sft", max_steps=6, batch_size=8, learning_rate=1e-2))


def logps(base: Any, role: str, rows: list[Any]) -> torch.Tensor:
    """(N,) of the rows' completions, in float64."""
    with base.role(role), torch.no_grad():
        return base.token_scores(base.collate(rows)).per_token_logps.double().sum(1)


@pytest.mark.parametrize("start", ["bare", "adapter"])
@pytest.mark.parametrize(("loss", "first"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", (1 / 0.4) ** 2)])
def test_the_first_loss(loss: str, first: float, start: str, run: Callable[..., Path], request: Any) -> None:
    """With both log-ratios 0 and beta .2: -log s(0) = ln 2, relu(1 - 0) = 1, (0 - 1 / (2 * .2))^2 = 6.25."""
    knobs = {"adapter": request.getfixturevalue("sft")} if start == "adapter" else {}
    folder = run("dpo", PAIRS, "run", loss=loss, beta=0.2, learning_rate=1e-2, max_steps=3, **knobs)
    first_line, *others = lines_of(folder)
    assert first_line["loss"] == pytest.approx(first, abs=1e-4)
    assert first_line["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(others[-1]["loss"] - first) > 0.01


def test_the_reference_is_the_start_adapter(sft: str, make_method: Callable[..., Any], tiny_base: Any) -> None:
    """Not the bare base, from which it is nats away; and it stays what it was while the policy moves."""
    method, rows = make_method("dpo", PAIRS, adapter=sft, untouched=True)
    start = logps(tiny_base, "policy", rows)
    torch.testing.assert_close(logps(tiny_base, "reference", rows), start, rtol=0, atol=1e-5)
    assert (logps(tiny_base, "base", rows) - start).abs().max() > 10
    for parameter in tiny_base.trainable_parameters("policy").values():
        parameter.data.add_(0.05)
    assert (logps(tiny_base, "policy", rows) - start).abs().max() > 10
    torch.testing.assert_close(logps(tiny_base, "reference", rows), start, rtol=0, atol=1e-5)


def test_another_reference_is_refused(
    sft: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The silent fault of others: the bare base as the reference of a policy that starts from an adapter."""

    def add_roles(self: DPO) -> None:
        self.policy_from_settings()
        self.base.add_role("reference")

    monkeypatch.setattr(DPO, "add_roles", add_roles)
    with pytest.raises(NumericError, match="differs from its reference by .* nats a token; not training") as error:
        run("dpo", PAIRS, "run", adapter=sft)
    assert error.value.exit_code == 4
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_loss_and_figures(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """With log-ratios c and r of every pair: loss = mean of ln(1 + exp(-beta (c - r))), rewards beta c and beta r."""
    method, rows = make_method("dpo", PAIRS, beta=0.3)
    policy, reference = (logps(tiny_base, role, rows).view(8, 2).tolist() for role in ("policy", "reference"))
    ratios = [(p[0] - q[0], p[1] - q[1]) for p, q in zip(policy, reference, strict=True)]
    seen = Metrics()
    loss = method.step(rows, method.weight(rows), seen).item()
    assert loss == pytest.approx(sum(math.log1p(math.exp(-0.3 * (c - r))) for c, r in ratios) / 8, rel=1e-4)
    found = seen.results()
    assert found["rewards/chosen"] == pytest.approx(0.3 * sum(c for c, _ in ratios) / 8, rel=1e-3)
    assert found["rewards/rejected"] == pytest.approx(0.3 * sum(r for _, r in ratios) / 8, rel=1e-3)
    assert found["rewards/accuracies"] == pytest.approx(sum(c > r for c, r in ratios) / 8)
    assert found["logps/chosen"] == pytest.approx(sum(p[0] for p in policy) / 8, rel=1e-5)
    assert found["logps/rejected"] == pytest.approx(sum(p[1] for p in policy) / 8, rel=1e-5)


def test_a_preference_of_0_is_the_pair_turned_round(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """Also its figures: chosen is the better one, whatever its column is called."""
    turned = [{**p, "chosen": p["rejected"], "rejected": p["chosen"], "preference": 0.0} for p in PAIRS]
    results = []
    for rows in (PAIRS, turned):
        method, items = make_method("dpo", rows)
        seen = Metrics()
        loss = method.step(items, method.weight(items), seen).item()
        gradients = [p.grad.clone() for p in tiny_base.trainable_parameters("policy").values()]
        results.append((loss, seen.results(), gradients))
    (loss, figures, gradients), (other_loss, other_figures, other_gradients) = results
    assert loss == pytest.approx(other_loss, abs=1e-6)
    assert figures == pytest.approx(other_figures, abs=1e-4)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_ties_pull_together(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """At the start a tie has the loss ln 2 like any pair, but no gradient, and no place in accuracies and margins."""
    method, rows = make_method("dpo", [{**pair, "preference": 0.5} for pair in PAIRS], untouched=True)
    seen = Metrics()
    assert method.step(rows, method.weight(rows), seen).item() == pytest.approx(math.log(2), abs=1e-5)
    assert all(p.grad.abs().max() < 1e-6 for p in tiny_base.trainable_parameters("policy").values())
    assert not [name for name in seen.results() if name.startswith(("rewards/", "logps/"))]


def test_a_ranking_is_the_mean_of_its_pairs(make_method: Callable[..., Any]) -> None:
    """Three answers ranked 2, 1, 3 are the pairs (1 over 0), (0 over 2), (1 over 2), together one row."""
    answers = ["middling", "the best one", "bad"]
    ranking = [{"prompt": "Rank: ", "completions": answers, "ranks": [2, 1, 3]}]
    pairs = [{"prompt": "Rank: ", "chosen": answers[i], "rejected": answers[j]} for i, j in ((1, 0), (0, 2), (1, 2))]
    losses = []
    for rows in (ranking, pairs):
        method, items = make_method("dpo", rows)
        losses.append(method.step(items, method.weight(items), Metrics()).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - math.log(2)) > 1e-3


def test_it_learns_eight_pairs(run: Callable[..., Path]) -> None:
    folder = run("dpo", PAIRS, "run", max_steps=12, batch_size=8, micro_batch_size=8, learning_rate=5e-3)
    first, *_, last = lines_of(folder)
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 1.0
    assert last["loss"] < 0.35 < first["loss"]
