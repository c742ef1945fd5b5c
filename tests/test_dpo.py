"""DPO: it starts at its reference, its labels come through, and it learns."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.config.offline import LOSS_KNOBS
from lowrank_align.errors import NumericError, UserError
from lowrank_align.methods.dpo import DPO
from lowrank_align.methods.metrics import Metrics
from lowrank_align.objectives.paired_losses import PAIRED_LOSSES
from lowrank_align.trees import Completion, TreeRow

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
@pytest.mark.parametrize(
    ("loss", "first", "knobs"),
    [
        ("sigmoid", math.log(2), {"beta": 0.2}),
        ("robust", math.log(2), {"beta": 0.2, "label_smoothing": 0.2}),
        ("hinge", 1.0, {"beta": 0.2}),
        ("ipo", (1 / 0.4) ** 2, {"beta": 0.2}),
        ("cpl_kl", math.log(2), {}),
    ],
)
def test_the_first_loss(
    loss: str, first: float, knobs: dict[str, Any], start: str, run: Callable[..., Path], request: Any
) -> None:
    """With both log-ratios 0 and beta .2: -log s(0) = ln 2, relu(1 - 0) = 1, (0 - 1 / (2 * .2))^2 = 6.25."""
    knobs = knobs | ({"adapter": request.getfixturevalue("sft")} if start == "adapter" else {})
    folder = run("dpo", PAIRS, "run", loss=loss, learning_rate=1e-2, max_steps=3, **knobs)
    first_line, *others = lines_of(folder)
    assert first_line["loss"] == pytest.approx(first, abs=1e-4)
    assert first_line["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(others[-1]["loss"] - first) > 0.01


def softplus(x: float) -> float:
    """-log s(-x)."""
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def log_odds(w: list[float]) -> float:
    return mean(w) - math.log1p(-math.exp(mean(w)))


# of one pair's log-probabilities by token, in plain arithmetic
REFERENCE_FREE: dict[str, Callable[[list[float], list[float]], float]] = {
    "simpo": lambda w, r: softplus(0.5 - 2 * (mean(w) - mean(r))),
    "orpo": lambda w, r: -mean(w) + 2 * softplus(log_odds(r) - log_odds(w)),
    "cpo": lambda w, r: softplus(2 * (sum(r) - sum(w))) - 0.5 * mean(w),
    "nll": lambda w, r: -mean(w),
    "unlikelihood": lambda w, r: 0.5 * sum(r) - sum(w),
    "token_unlikelihood": lambda w, r: -mean(w) - 0.5 * mean([math.log1p(-math.exp(x)) for x in r]),
    "cpl": lambda w, r: softplus(
        0.2 * (0.25 * sum(0.9**t * x for t, x in enumerate(r)) - sum(0.9**t * x for t, x in enumerate(w)))
    ),
}
KNOBS = {"beta": 2.0, "cpo_alpha": 0.5, "unlikelihood_alpha": 0.5}
KNOBS |= {"cpl_alpha": 0.2, "cpl_lambda": 0.25, "cpl_gamma": 0.9}


@pytest.mark.parametrize("loss", REFERENCE_FREE)
def test_the_first_loss_without_a_reference(loss: str, run: Callable[..., Path], tiny_base: Any) -> None:
    """It is the start model's own loss on the pairs, goes down in two steps, and there is no reference on the base."""
    tiny_base.remove_role("reference")
    knobs = {knob: KNOBS[knob] for knob in LOSS_KNOBS[loss] if knob in KNOBS}
    folder = run("dpo", PAIRS, "run", loss=loss, learning_rate=5e-3, max_steps=3, batch_size=8, **knobs)
    assert "reference" not in tiny_base.roles
    encode = tiny_base.tokenizer.encode
    expected = []
    for pair in PAIRS:
        ids = [encode(pair[name] + "</s>", add_special_tokens=False) for name in ("chosen", "rejected")]
        row = TreeRow(encode(pair["prompt"]), [Completion(one, [True] * len(one)) for one in ids])
        with tiny_base.role("base"), torch.no_grad():
            found = tiny_base.token_scores(tiny_base.collate([row])).per_token_logps.double().tolist()
        expected.append(REFERENCE_FREE[loss](*(logps[: len(one)] for logps, one in zip(found, ids, strict=True))))
    first, *_, last = lines_of(folder)
    assert first["loss"] == pytest.approx(mean(expected), rel=1e-4)
    assert last["loss"] < first["loss"] - 0.01


def test_several_losses_and_pieces_of_a_batch(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """All twelve at once: the loss is their weighted sum, and the same whether the batch comes whole or in pieces."""
    names = list(PAIRED_LOSSES)
    weights = [1 + i / 10 for i in range(len(names))]
    rows = [{**pair, "preference": mu} for pair, mu in zip(PAIRS, [1, 0.7, 0.5, 0, 1, 1, 0.2, 0.5], strict=True)]
    method, items = make_method("dpo", rows, loss=names, loss_weights=weights, label_smoothing=0.1)
    results = []
    for size in (8, 3):
        seen, loss = Metrics(), 0.0
        for parameter in tiny_base.trainable_parameters("policy").values():
            parameter.grad = None
        for start in range(0, 8, size):
            loss += method.step(items[start : start + size], method.weight(items), seen).item()
        gradients = [p.grad.clone() for p in tiny_base.trainable_parameters("policy").values()]
        results.append((loss, seen.results(), gradients))
    (loss, figures, gradients), (other_loss, other_figures, other_gradients) = results
    parts = [figures[f"loss/{name}"] for name in names]
    assert loss == pytest.approx(sum(a * b for a, b in zip(weights, parts, strict=True)), rel=1e-5)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert figures == pytest.approx(other_figures, rel=1e-3)
    largest = max(g.abs().max().item() for g in gradients)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest)


def test_a_ranking_as_a_whole_order(make_method: Callable[..., Any], tiny_base: Any) -> None:
    """Weights e^(beta log-ratio) a, b, c ranked b first, then a and c tied: the mean over the two orders of

    -log [b / (a + b + c) * a / (a + c)] and -log [b / (a + b + c) * c / (a + c)]. A pair beside it counts as ever.
    """
    ranking = {"prompt": "Rank: ", "completions": ["middling", "the best one", "bad"], "ranks": [2, 1, 2]}
    method, items = make_method("dpo", [ranking, PAIRS[0]], ranking="plackett_luce", beta=0.3)
    policy, reference = (logps(tiny_base, role, items).tolist() for role in ("policy", "reference"))
    a, b, c, chosen, rejected = (math.exp(0.3 * (p - q)) for p, q in zip(policy, reference, strict=True))
    order = -math.log(b / (a + b + c)) - (math.log(a / (a + c)) + math.log(c / (a + c))) / 2
    pair = -math.log(chosen / (chosen + rejected))
    loss = method.step(items, method.weight(items), Metrics()).item()
    assert loss == pytest.approx((order + pair) / 2, rel=1e-4)


def test_too_many_ties_are_dropped_and_listed(run: Callable[..., Path]) -> None:
    """13 answers of one rank; `dropped_rows.jsonl` says so."""
    tied = {"prompt": "p", "completions": [f"answer {i}" for i in range(13)], "ranks": [1] * 13}
    folder = run("dpo", [*PAIRS, tied], "run", ranking="plackett_luce", max_steps=1)
    dropped = json.loads((folder / "dropped_rows.jsonl").read_text().splitlines()[0])
    assert "more than 12 answers of one rank" in dropped.values()


def test_conversations_that_start_differently(run: Callable[..., Path]) -> None:
    """cpl trains on the assistant's turns of both, each after its own beginning; a loss of answers refuses the row."""

    def talk(*turns: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]

    rows = [{"chosen": talk("Hello", "Hi you", "Go on", "No more"), "rejected": talk("What?", "Nobody")}] * 2
    folder = run("dpo", rows, "run", loss="cpl", max_steps=2, batch_size=2, learning_rate=1e-2)
    first, last = lines_of(folder)
    assert last["loss"] < first["loss"] - 0.01
    assert first["num_tokens"] == 2 * len("Hi you^No more^Nobody^")  # ^ ends a turn; a token a character
    with pytest.raises(UserError, match=r"rows.jsonl:1: prompt: chosen and rejected share no beginning"):
        run("dpo", rows, "other", loss="sigmoid")


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
    lengths = [len(row.completions[0].ids) for row in rows]
    assert found["nll_loss"] == pytest.approx(mean([-p[0] / n for p, n in zip(policy, lengths, strict=True)]), rel=1e-5)
    assert not [name for name in found if name.startswith("loss/")]  # of a single loss that is the loss


@pytest.mark.parametrize("loss", ["cpl", "cpl_kl"])
def test_the_rewards_of_contrastive_preference_learning(
    loss: str, make_method: Callable[..., Any], tiny_base: Any
) -> None:
    """It reads no beta: at lambda = gamma = 1 the loss is -log s of the margin, S = alpha log pi, or alpha log pi/ref.

    With gamma .9 the reward is its discounted sum: the chosen answer's first token counts whole, its second .9, ...
    """
    method, rows = make_method("dpo", PAIRS[:1], loss=loss, cpl_alpha=0.2, cpl_lambda=1.0)
    seen = Metrics()
    value = method.step(rows, 1.0, seen).item()
    found = seen.results()
    assert value == pytest.approx(math.log1p(math.exp(-found["rewards/margins"])), rel=1e-4)
    policy = logps(tiny_base, "policy", rows).tolist()
    less = logps(tiny_base, "reference", rows).tolist() if loss == "cpl_kl" else [0.0, 0.0]
    assert found["rewards/chosen"] == pytest.approx(0.2 * (policy[0] - less[0]), rel=1e-3)
    assert found["rewards/rejected"] == pytest.approx(0.2 * (policy[1] - less[1]), rel=1e-3)
    method.settings = method.settings.model_copy(update={"cpl_gamma": 0.9, "cpl_lambda": 0.5})
    with tiny_base.role("policy"), torch.no_grad():
        batch = tiny_base.collate(rows)
        per_token = tiny_base.token_scores(batch).per_token_logps
    if loss == "cpl_kl":
        with tiny_base.role("reference"), torch.no_grad():
            per_token = per_token - tiny_base.token_scores(batch).per_token_logps
    tokens = per_token[0, : len(rows[0].completions[0].ids)].tolist()
    again = Metrics()
    method.step(rows, 1.0, again)
    expected = 0.2 * sum(0.9**t * x for t, x in enumerate(tokens))
    assert again.results()["rewards/chosen"] == pytest.approx(expected, rel=1e-4)


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
