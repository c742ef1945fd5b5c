"""GRPO, RLOO, online DPO and expert iteration: what a step is made of, by hand, and that each follows its score."""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_align.config import METHODS, resolve
from lowrank_align.errors import UserError
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.online_dpo import pair_of
from lowrank_align.rollout import Rollout

PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea, please: ", "b ", "And then? ")]
MODULES = itertools.count()
SMALL = {"max_new_tokens": 8, "batch_size": 4, "group_size": 3}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`score("...python expression of p and c...")`: the name of a reward function in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(expression: str) -> str:
        name = f"group_score_{next(MODULES)}"  # Python imports a name once, wherever its file is
        body = f"return [{expression} for p, c in zip(prompts, completions)]"
        (tmp_path / f"{name}.py").write_text(f"def f(prompts, completions):\n    {body}\n")
        return f"{name}:f"

    return write


def no_retry(function: Callable[[int], Any], knob: str) -> Any:
    return function(4)


def rolled(method: Any, prompts: list[Any]) -> tuple[list[Any], list[Any]]:
    """The rollouts of a step, the first of each group ended after 3 tokens, and the step's first batch of items."""
    seen: dict[str, Any] = {}
    roll_out, end = method.roll_out, method.renderer.end_ids[0]

    def ended(*arguments: Any) -> list[list[Rollout]]:
        seen["groups"] = [
            [Rollout(first.prompt_ids, [*first.ids[:3], end], True), *others] for first, *others in roll_out(*arguments)
        ]
        return seen["groups"]

    method.roll_out = ended
    with torch.no_grad():
        items = list(next(iter(method.round(prompts, 1, no_retry))))
    return seen["groups"], items


def token_logps(method: Any, role: str, prompt: list[int], answer: list[int], temperature: float) -> list[float]:
    """From the model's own logits on the answer alone behind its prompt."""
    with method.base.role(role), torch.no_grad():
        logits = method.base.model(input_ids=torch.tensor([prompt + answer])).logits[0] / temperature
    predictions = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return [p[i].item() for p, i in zip(predictions, answer, strict=True)]


def moved(method: Any) -> None:
    """The policy some way from the one that drew, so that ratios are not all 1."""
    generator = torch.Generator().manual_seed(3)
    for parameter in method.base.trainable_parameters("policy").values():
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))


# ---- a step by hand


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_step_of_grpo_by_hand(reduction: str, make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """A = (r - mean) / (std + 1e-4), std with G - 1; -min(rho A, clip(rho) A) + beta (ref/pi - log(ref/pi) - 1).

    With two passes objective/kl is that of the policy that drew, the sum of log(old/ref), whatever it has become since.

    r is the length of the text less .3 without an end and less .05 a token. Everything from each answer's own logits.
    """
    beta, clip, high, temperature = 0.3, 0.05, 0.1, 0.8
    knobs = {"beta": beta, "clip_range": clip, "clip_range_high": high, "temperature": temperature}
    knobs |= {"missing_eos_penalty": 0.3, "length_penalty": 0.05, "reduction": reduction, "inner_epochs": 2}
    method, prompts = make_method("grpo", PROMPTS, reward=score("float(len(c))"), **SMALL, **knobs)
    groups, items = rolled(method, prompts)
    of_prompt = {tuple(group[0].prompt_ids): group for group in groups}
    old = {id(r): token_logps(method, "policy", r.prompt_ids, r.ids, temperature) for group in groups for r in group}
    drawn_ref = {
        id(r): token_logps(method, "reference", r.prompt_ids, r.ids, temperature) for group in groups for r in group
    }
    moved(method)
    by_answer, kls, ratios = [], [], []
    for item in items:
        group = of_prompt[tuple(item.row.prompt_ids)]
        scores = [len(method.renderer.decode(r.ids)) - 0.3 * (not r.finished) - 0.05 * len(r.ids) for r in group]
        mean, std = statistics.mean(scores), statistics.stdev(scores)
        for rollout, r in zip(group, scores, strict=True):
            advantage = (r - mean) / (std + 1e-4)
            new = token_logps(method, "policy", rollout.prompt_ids, rollout.ids, temperature)
            ref = token_logps(method, "reference", rollout.prompt_ids, rollout.ids, temperature)
            losses = []
            for now, before, there in zip(new, old[id(rollout)], ref, strict=True):
                rho, kl = math.exp(now - before), math.exp(there - now) - (there - now) - 1
                kept = min(max(rho, 1 - clip), 1 + high)
                losses.append(-min(rho * advantage, kept * advantage) + beta * kl)
                kls.append(kl)
                ratios.append(rho)
            by_answer.append(losses)
    flat = [loss for losses in by_answer for loss in losses]
    expected = statistics.mean(flat)
    if reduction == "sequence_mean":
        expected = statistics.mean(statistics.mean(losses) for losses in by_answer)
    seen = Metrics()
    loss = method.step(items, method.weight(items), seen).item()
    assert any(rho < 1 - clip for rho in ratios) and any(rho > 1 + high for rho in ratios), "nothing is clipped"
    assert len({len(losses) for losses in by_answer}) > 1, "all answers are of one length"
    assert loss == pytest.approx(expected, rel=1e-4)
    assert seen.results()["kl"] == pytest.approx(statistics.mean(kls), rel=1e-3)
    drawn_kl = statistics.mean(sum(old[id(r)]) - sum(drawn_ref[id(r)]) for group in groups for r in group)
    assert method.round_metrics()["objective/kl"] == pytest.approx(drawn_kl, abs=1e-3)  # of the policy that drew
    assert "objective/kl" not in seen.results()
    assert seen.results()["policy/ratio"] == pytest.approx(statistics.mean(ratios), rel=1e-4)


def test_a_step_of_rloo_by_hand(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """r less beta times the sum of log pi/ref, against the mean of the two others; rho of the whole answer."""
    beta, clip = 0.4, 0.1
    method, prompts = make_method("rloo", PROMPTS, reward=score("float(len(c))"), beta=beta, clip_range=clip,
                                  missing_eos_penalty=0.0, **SMALL)  # fmt: skip
    groups, items = rolled(method, prompts)
    of_prompt = {tuple(group[0].prompt_ids): group for group in groups}

    def summed(role: str) -> dict[int, float]:
        return {id(r): sum(token_logps(method, role, r.prompt_ids, r.ids, 1.0)) for group in groups for r in group}

    old, ref = summed("policy"), summed("reference")
    moved(method)
    new = summed("policy")
    expected, clipped = [], 0
    for item in items:
        group = of_prompt[tuple(item.row.prompt_ids)]
        scores = [len(method.renderer.decode(r.ids)) - beta * (old[id(r)] - ref[id(r)]) for r in group]
        for i, rollout in enumerate(group):
            advantage = scores[i] - (sum(scores) - scores[i]) / 2
            rho = math.exp(new[id(rollout)] - old[id(rollout)])
            kept = min(max(rho, 1 - clip), 1 + clip)
            clipped += kept * advantage < rho * advantage
            expected.append(-min(rho * advantage, kept * advantage))
    seen = Metrics()
    loss = method.step(items, method.weight(items), seen).item()
    assert 0 < clipped < len(expected)
    assert loss == pytest.approx(statistics.mean(expected), rel=1e-3)
    assert seen.results()["clip_ratio/region_mean"] == pytest.approx(clipped / len(expected))
    kl = statistics.mean(old[i] - ref[i] for i in old)
    assert method.round_metrics()["objective/kl"] == pytest.approx(kl, abs=1e-4)


def test_one_update_a_step_needs_no_old_pass(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """The gradient is that of a step whose old log-probs were computed: the policy is the one that drew."""
    method, prompts = make_method("grpo", PROMPTS, reward=score("float(len(c))"), **SMALL)
    _, items = rolled(method, prompts)
    assert all(item.old_logps is None for item in items)
    again = method.as_groups(
        [item.row for item in items],
        torch.stack([item.advantages for item in items]),
        method.logps_of("policy", [item.row for item in items], no_retry),
        torch.cat([item.ref_logps for item in items]),
    )
    gradients = []
    for these in (items, again):
        for parameter in method.base.trainable_parameters("policy").values():
            parameter.grad = None
        method.step(these, method.weight(these), Metrics())
        gradients.append(torch.cat([p.grad.flatten() for p in method.base.trainable_parameters("policy").values()]))
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_step_of_online_dpo_by_hand(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """The longest text of three against the shortest: -log s(beta (h_w - h_l)); a tie has -log s(0)-like both ways."""
    method, prompts = make_method("online-dpo", PROMPTS, reward=score("float(len(c))"), beta=0.5,
                                  missing_eos_penalty=0.0, **SMALL)  # fmt: skip
    groups, items = rolled(method, prompts)
    expected = []
    for group, item in zip(groups, items, strict=True):
        lengths = [len(method.renderer.decode(r.ids)) for r in group]
        best, worst = group[lengths.index(max(lengths))], group[lengths.index(min(lengths))]
        if max(lengths) > min(lengths):
            assert [c.ids for c in item.completions] == [best.ids, worst.ids]
        mu = item.comparisons[0].preference
        assert mu == (1.0 if max(lengths) > min(lengths) else 0.5)
        ratios = [
            sum(token_logps(method, "policy", item.prompt_ids, c.ids, 1.0))
            - sum(token_logps(method, "reference", item.prompt_ids, c.ids, 1.0))
            for c in item.completions
        ]
        gap = 0.5 * (ratios[0] - ratios[1])
        expected.append(mu * math.log1p(math.exp(-gap)) + (1 - mu) * math.log1p(math.exp(gap)))
    assert len(items) == 4
    loss = method.step(items, method.weight(items), Metrics()).item()
    assert loss == pytest.approx(statistics.mean(expected), rel=1e-4)


def test_a_step_of_expert_iteration_by_hand(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """The longest text of three to each prompt: minus the mean of its tokens' log-probs, over all kept tokens.

    At the temperature at which they were drawn.
    """
    knobs = {"missing_eos_penalty": 0.0, "temperature": 0.6}
    method, prompts = make_method("expert", PROMPTS, reward=score("float(len(c))"), **knobs, **SMALL)
    groups, items = rolled(method, prompts)
    losses: list[float] = []
    best_scores = []
    for group, item in zip(groups, items, strict=True):
        lengths = [len(method.renderer.decode(r.ids)) for r in group]
        best = group[lengths.index(max(lengths))]
        best_scores.append(max(lengths))
        assert [c.ids for c in item.completions] == [best.ids]
        losses += [-p for p in token_logps(method, "policy", best.prompt_ids, best.ids, 0.6)]
    loss = method.step(items, method.weight(items), Metrics()).item()
    assert loss == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert method.round_metrics()["objective/best_scores"] == pytest.approx(statistics.mean(best_scores))
    assert "reference" not in method.base.roles or not method.settings.has_reference


def test_the_same_answer_has_one_score(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """A reward model's last digits differ with the place in the batch: 3 and 3 + 1e-5 would be advantages of about .1.

    Here the answers a a b and c c c score 1, 1 + 1e-5, 2 and 3, 3 - 1e-5, 3 + 1e-5: the first group has -1/std/3 twice
    and 2/std/3 with std = 1/sqrt 3, the second none at all. Another group's same answer keeps its own score.
    """
    method, prompts = make_method("grpo", PROMPTS[:2], reward=score("0.0"), beta=0.0, missing_eos_penalty=0.0, **SMALL)
    method.rewards.total = lambda parts: torch.tensor([1, 1 + 1e-5, 2, 3, 3 - 1e-5, 3 + 1e-5])
    answers = [[[5, 6], [5, 6], [7]], [[5], [5], [5]]]
    groups = [
        [Rollout(row.prompt_ids, ids, True) for ids in of_one] for row, of_one in zip(prompts, answers, strict=True)
    ]
    method.roll_out = lambda *arguments: groups
    items = {
        len(item.row.completions[0].ids): item.advantages for item in next(iter(method.round(prompts, 1, no_retry)))
    }
    torch.testing.assert_close(items[2], torch.tensor([-1.0, -1.0, 2.0]) * math.sqrt(1 / 3), rtol=1e-3, atol=0)
    assert items[1].tolist() == [0.0, 0.0, 0.0]
    assert method.round_metrics()["frac_reward_zero_std"] == 0.5


# ---- on a base that another run has used


@pytest.mark.parametrize(("method", "knobs"), [("expert", {}), ("grpo", {"beta": 0.0}), ("rloo", {"beta": 0.0})])
def test_another_runs_reference_is_not_asked(
    method: str, knobs: dict[str, Any], run: Callable[..., Path], tiny_base: Any, score: Callable[[str], str]
) -> None:
    """DPO leaves its reference on the base; a run that goes on from it without a KL starts, and measures none."""
    pairs = [{"prompt": row["prompt"], "chosen": "good", "rejected": "bad"} for row in PROMPTS]
    before = run("dpo", pairs, "dpo", max_steps=3, learning_rate=1e-2)
    assert "reference" in tiny_base.roles
    small = {**SMALL, **knobs, "reward": score("float(len(c))"), "eval_rows": 1, "max_steps": 1}
    (line,) = lines_of(run(method, PROMPTS, "run", adapter=str(before), **small))
    assert "eval_objective/scores" in line and "eval_objective/kl" not in line


# ---- pairs of a group


def group_of(*answers: list[int]) -> list[Rollout]:
    return [Rollout([1], answer, True) for answer in answers]


def test_pairs_of_a_group() -> None:
    """Best before worst; equal scores of different texts are a tie; the same text twice is no pair."""
    best_and_worst = pair_of(group_of([5], [6], [7]), [1.0, 3.0, 2.0])
    assert best_and_worst is not None
    assert [c.ids for c in best_and_worst.completions] == [[6], [5]]
    assert best_and_worst.comparisons[0].preference == 1.0
    tie = pair_of(group_of([5], [5], [7]), [2.0, 2.0, 2.0])
    assert tie is not None and [c.ids for c in tie.completions] == [[5], [7]]
    assert tie.comparisons[0].preference == 0.5
    assert pair_of(group_of([5], [5], [5]), [1.0, 1.0, 1.0]) is None


def test_a_step_without_any_pair(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """At a temperature near 0 all answers of a prompt are one text: counted, nothing is learned, the run goes on."""
    knobs = {"temperature": 1e-4, "max_steps": 2, "learning_rate": 1e-2, "max_new_tokens": 3}
    folder = run("online-dpo", PROMPTS, "run", reward=score("1.0"), **SMALL | knobs)
    lines = lines_of(folder)
    assert [line["pairs/identical"] for line in lines] == [4, 4]
    assert [line["loss"] for line in lines] == [0, 0]


# ---- groups without variance, reference, knobs


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_groups_without_variance_are_counted_and_teach_nothing(
    method: str, run: Callable[..., Path], score: Callable[[str], str]
) -> None:
    """Three prompts of four score the same whatever is answered; with beta 0 the gradient of such a group is 0."""
    knobs = {"beta": 0.0, "missing_eos_penalty": 0.0, "max_steps": 1, **SMALL}
    some = lines_of(run(method, PROMPTS, "some", reward=score("len(c) * p.startswith('Say')"), **knobs))[0]
    assert some["frac_reward_zero_std"] in (0.75, 1.0)
    none = lines_of(run(method, PROMPTS, "none", reward=score("0.1"), **knobs))[0]
    assert none["frac_reward_zero_std"] == 1
    assert none["grad_norm"] == 0 and none["loss"] == 0
    assert some["grad_norm"] > 0 or some["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_beta_0_has_no_reference(method: str, make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    made, prompts = make_method(method, PROMPTS, reward=score("1.0"), beta=0.0, **SMALL)
    assert not made.settings.needs_reference
    made.base.remove_role("reference")  # another test's
    _, items = rolled(made, prompts)
    made.step(items, made.weight(items), Metrics())


def test_minibatches_of_whole_groups(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """2 epochs x 2 minibatches of 4 groups: four batches of two groups, each epoch all four."""
    method, prompts = make_method("grpo", PROMPTS, reward=score("len(c)"), inner_epochs=2, minibatches=2, **SMALL)
    with torch.no_grad():
        batches = [[id(group) for group in batch] for batch in method.round(prompts, 1, no_retry)]
    assert method.updates_per_step == len(batches) == 4
    assert all(len(set(batches[i] + batches[i + 1])) == 4 for i in (0, 2))


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_knobs_that_contradict(method: str) -> None:
    given = {"model": "x", "prompts": "x", "out": "x", "reward": "m:f"}
    with pytest.raises(UserError, match="minibatches: 9 of batch_size 8 prompts; at most one each"):
        resolve(METHODS[method], given | {"minibatches": 9})
    with pytest.raises(UserError, match="group_size"):
        resolve(METHODS[method], given | {"group_size": 1})


# ---- that they learn


@pytest.mark.parametrize("method", ["grpo", "rloo", "online-dpo", "expert"])
def test_it_follows_the_score(method: str, run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """A reward for the share of one letter, which a random model writes about once in a hundred characters."""
    knobs = {"max_new_tokens": 10, "batch_size": 8, "micro_batch_size": 8, "max_steps": 10, "learning_rate": 1e-2}
    knobs |= {"missing_eos_penalty": 0.0, "lr_schedule": "constant", "group_size": 8}
    knobs |= {} if method == "expert" else {"beta": 0.05 if method == "online-dpo" else 0.01}
    lines = lines_of(run(method, PROMPTS, "run", reward=score("10 * c.count('e') / (len(c) + 1)"), **knobs))
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-3:]) > 2 * sum(scores[:3])
