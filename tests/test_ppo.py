"""PPO: where it starts, what a step is made of, whose scores it follows, and that it follows them.

The pieces of a step are recomputed from the log-probs, values and scores that it saw, in plain arithmetic.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowrank_align.errors import NumericError, UserError
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.ppo import PPO
from lowrank_align.trees import Completion, TreeRow

PROMPTS = [{"prompt": prompt} for prompt in ("Say a: ", "Write of the sea, please: ", "b ", "And then? ")]
PAIRS = [{"prompt": row["prompt"], "chosen": "aaa", "rejected": "zz top"} for row in PROMPTS]
DEMONSTRATIONS = [{"prompt": row["prompt"], "completion": "aha"} for row in PROMPTS]
MODULES = itertools.count()
SMALL = {"max_new_tokens": 8, "batch_size": 4, "ppo_epochs": 2, "minibatches": 2}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`score("...python expression of p and c...")`: the name of a reward function in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(expression: str) -> str:
        name = f"ppo_score_{next(MODULES)}"  # Python imports a name once, wherever its file is
        body = f"return [{expression} for p, c in zip(prompts, completions)]"
        (tmp_path / f"{name}.py").write_text(f"def f(prompts, completions):\n    {body}\n")
        return f"{name}:f"

    return write


@pytest.fixture
def reward_run(run: Callable[..., Path]) -> Path:
    return run("reward", PAIRS, "reward", max_steps=6, learning_rate=5e-3, shift_over="chosen")


def no_retry(function: Callable[[int], Any], knob: str) -> Any:
    return function(4)


# ---- where it starts


@pytest.mark.parametrize("start", ["bare", "adapter"])
def test_the_first_kl_is_0(start: str, run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """Within 1e-5 nats of a whole response, also from an adapter that is far from the bare base; later it is not 0."""
    knobs = {"learning_rate": 1e-2, "max_steps": 2, **SMALL}
    if start == "adapter":
        knobs["adapter"] = str(run("sft", DEMONSTRATIONS, "sft", max_steps=4, learning_rate=1e-2))
    first, second = lines_of(run("ppo", PROMPTS, "run", reward=score("len(c)"), **knobs))
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/non_score_reward"] == pytest.approx(0, abs=1e-5)
    assert abs(second["objective/kl"]) > 1e-3


def test_another_reference_is_refused(
    run: Callable[..., Path], score: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = run("sft", DEMONSTRATIONS, "sft", max_steps=4, learning_rate=1e-2)
    add_roles = PPO.add_roles

    def sabotaged(self: PPO) -> None:
        add_roles(self)
        self.base.add_role("reference")  # the bare base

    monkeypatch.setattr(PPO, "add_roles", sabotaged)
    with pytest.raises(NumericError, match="differs from its reference by .* nats a token; not training"):
        run("ppo", PROMPTS, "run", adapter=str(sft), reward=score("len(c)"), **SMALL)


def test_values_start_from_the_reward_run(
    reward_run: Path, run: Callable[..., Path], make_method: Callable[..., Any], tiny_base: Any
) -> None:
    """V before token t is the shifted score of the response cut before t: one adapter, one head, a token earlier."""
    method, _ = make_method("ppo", PROMPTS, reward=str(reward_run), untouched=True, **SMALL)
    prompt, response = (
        tiny_base.tokenizer.encode("Say a: "),
        tiny_base.tokenizer.encode("xyz a", add_special_tokens=False),
    )
    with torch.no_grad():
        with tiny_base.role("value"):
            values = tiny_base.values(tiny_base.collate([row(prompt, response)]))[0]
        with tiny_base.role("reward"):
            cut = [row(prompt, response[:t]) for t in range(1, len(response))]
            scores = [tiny_base.scores(tiny_base.collate([r]), shifted=True).item() for r in cut]
    assert values[1:].tolist() == pytest.approx(scores, abs=1e-5)
    shift = json.loads((reward_run / "reward.json").read_text())["shift"]
    assert abs(shift) > 0.05
    assert method.base.roles["value"].trainable
    assert not method.base.roles["reward"].trainable


def row(prompt: list[int], response: list[int]) -> TreeRow:
    return TreeRow(prompt, [Completion(response, [True] * len(response))])


def test_a_shift_is_taken_off_the_scores(reward_run: Path, run: Callable[..., Path]) -> None:
    """Raised by 3 in reward.json: the same first rollouts score 3 less, and so do the values that wait for it."""
    knobs = {"reward": str(reward_run), "max_steps": 1, **SMALL}
    before = lines_of(run("ppo", PROMPTS, "before", **knobs))[0]
    file = reward_run / "reward.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "shift": found["shift"] + 3.0}))
    after = lines_of(run("ppo", PROMPTS, "after", **knobs))[0]
    assert before["objective/scores"] - after["objective/scores"] == pytest.approx(3.0, abs=1e-5)
    assert before["objective/rlhf_reward"] - after["objective/rlhf_reward"] == pytest.approx(3.0, abs=1e-5)
    assert before["completions/mean_length"] == after["completions/mean_length"]
    assert before["loss/policy_avg"] == pytest.approx(after["loss/policy_avg"], abs=1e-5)


# ---- what a step is made of


@pytest.mark.parametrize("source", ["function", "run"])
def test_a_step_by_hand(
    source: str, make_method: Callable[..., Any], score: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    """From log-probs, values and scores to rewards, advantages, whitening and both losses, with policy and value moved.

    r_t = -beta (logp - ref), plus at the last token the score less the penalty; delta_t = r_t + g V_{t+1} - V_t;
    A_t = sum_l (g lambda)^l delta_{t+l}; returns A + V; A whitened over all tokens of the step with n - 1.
    """
    reward = score("float(len(c))") if source == "function" else str(request.getfixturevalue("reward_run"))
    beta, gamma, lam, penalty, clip, clip_value = 0.3, 0.9, 0.8, 0.7, 0.05, 0.1
    knobs = {"kl_coefficient": beta, "gamma": gamma, "gae_lambda": lam, "missing_eos_penalty": penalty}
    knobs |= {"clip_range": clip, "clip_range_value": clip_value, "value_coefficient": 0.25, "temperature": 0.8}
    knobs |= SMALL | {"ppo_epochs": 1, "minibatches": 1, "seed": 1}  # with one answer that ends and others that do not
    method, prompts = make_method("ppo", PROMPTS, reward=reward, **knobs)
    seen: dict[str, Any] = {}
    roll_out, said, of_trees = method.roll_out, method._said, method.rewards.of_trees
    method.roll_out = lambda *a: seen.setdefault("groups", roll_out(*a))
    method._said = lambda *a: seen.setdefault("said", said(*a))
    method.rewards.of_trees = lambda *a: seen.setdefault("scores", of_trees(*a))
    with torch.no_grad():
        (episodes,) = method.round(prompts, 1, no_retry)

    advantages, returns, scores, kls = [], [], [], []
    rollouts = [rollout for group in seen["groups"] for rollout in group]
    by_run = next(iter(seen["scores"].values())).tolist() if source == "run" else [0.0] * len(rollouts)
    columns = [[row[: len(r.ids)] for row, r in zip(c, rollouts, strict=True)] for c in seen["said"][:3]]
    finished = [rollout.finished for rollout in rollouts]
    assert len(set(finished)) == 2 or source == "run", "no rollout with and one without an end: nothing is penalised"
    for rollout, logps, ref_logps, values, from_run in zip(rollouts, *columns, by_run, strict=True):
        text = method.renderer.decode(rollout.ids)
        raw = float(len(text)) if source == "function" else from_run
        logps, ref_logps, v = logps.tolist(), ref_logps.tolist(), [*values.tolist(), 0.0]
        rewards = [-beta * (a - b) for a, b in zip(logps, ref_logps, strict=True)]
        rewards[-1] += raw - (0 if rollout.ids[-1] in method.renderer.end_ids else penalty)
        deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards)]
        own = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
        advantages += own
        returns += [a + b for a, b in zip(own, v, strict=False)]
        scores.append(raw)
        kls.append(sum(a - b for a, b in zip(logps, ref_logps, strict=True)))
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / (len(advantages) - 1))
    whitened = [(a - mean) / deviation for a in advantages]

    order = {tuple(rollout.ids): i for i, rollout in enumerate(rollouts)}
    place = [order[tuple(episode.row.completions[0].ids)] for episode in episodes]
    episodes = [episode for _, episode in sorted(zip(place, episodes, strict=True), key=lambda pair: pair[0])]
    assert torch.cat([e.advantages for e in episodes]).tolist() == pytest.approx(whitened, abs=1e-4)
    assert torch.cat([e.returns for e in episodes]).tolist() == pytest.approx(returns, abs=1e-4)
    measured = method.round_metrics()
    assert measured["objective/scores"] == pytest.approx(sum(scores) / 4, abs=1e-4)
    assert measured["objective/kl"] == pytest.approx(sum(kls) / 4, abs=1e-4)
    assert measured["objective/non_score_reward"] == pytest.approx(-beta * sum(kls) / 4, abs=1e-4)
    total = (sum(scores) - penalty * finished.count(False) - beta * sum(kls)) / 4
    assert measured["objective/rlhf_reward"] == pytest.approx(total, abs=1e-4)

    base = method.base
    for role in method.trained:
        for parameter in base.trainable_parameters(role).values():
            parameter.data.add_(0.01 * torch.randn(parameter.shape))
    policy_losses, value_losses, ratios = [], [], []
    start = 0
    for episode in episodes:
        batch = base.collate([episode.row])
        with torch.no_grad():
            with base.role("policy"):
                new = base.token_scores(batch, temperature=0.8).per_token_logps[0].tolist()
            with base.role("value"):
                new_values = base.values(batch)[0].tolist()
        for t, old in enumerate(episode.old_logps.tolist()):
            ratio, advantage = math.exp(new[t] - old), whitened[start + t]
            ratios.append(ratio)
            policy_losses.append(max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip)))
            old_value, target = episode.old_values[t].item(), returns[start + t]
            near = min(max(new_values[t], old_value - clip_value), old_value + clip_value)
            value_losses.append(0.5 * max((new_values[t] - target) ** 2, (near - target) ** 2))
        start += len(episode.old_logps)
    count, metrics = len(ratios), Metrics()
    loss = method.step(episodes, method.weight(episodes), metrics).item()
    found = metrics.results()
    assert any(abs(ratio - 1) > clip for ratio in ratios), "nothing is clipped"
    assert found["loss/policy_avg"] == pytest.approx(sum(policy_losses) / count, abs=1e-4)
    assert found["loss/value_avg"] == pytest.approx(sum(value_losses) / count, rel=1e-4)
    assert found["val/ratio"] == pytest.approx(sum(ratios) / count, abs=1e-4)
    assert found["policy/approxkl_avg"] == pytest.approx(sum(math.log(r) ** 2 / 2 for r in ratios) / count, rel=1e-3)
    assert loss == pytest.approx(sum(policy_losses) / count + 0.25 * sum(value_losses) / count, rel=1e-4)


def test_the_first_ratio_is_1(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """One epoch of one minibatch at temperature .6: the policy that is trained is still the one that sampled.

    So the ratio is 1, the approximate KL 0, and the loss is minus the mean of whitened advantages: 0.
    """
    knobs = {"temperature": 0.6, "ppo_epochs": 1, "minibatches": 1, "learning_rate": 1e-2}
    for line in lines_of(run("ppo", PROMPTS, "run", reward=score("len(c)"), **SMALL | knobs)):
        assert line["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert line["policy/approxkl_avg"] == pytest.approx(0, abs=1e-8)
        assert line["policy/clipfrac_avg"] == 0
        assert line["loss/policy_avg"] == pytest.approx(0, abs=1e-5)


def test_every_rollout_once_an_epoch(make_method: Callable[..., Any], score: Callable[[str], str]) -> None:
    """3 epochs x 2 minibatches of 4 rollouts: six batches of two, each epoch all four, in changing company."""
    knobs = {**SMALL, "ppo_epochs": 3}
    method, prompts = make_method("ppo", PROMPTS, reward=score("len(c)"), **knobs)
    with torch.no_grad():
        batches = [sorted(id(episode) for episode in batch) for batch in method.round(prompts, 1, no_retry)]
    assert method.updates_per_step == len(batches) == 6
    assert all(len(set(batches[i] + batches[i + 1])) == 4 for i in (0, 2, 4))
    assert len({tuple(sorted(map(tuple, batches[i : i + 2]))) for i in (0, 2, 4)}) > 1


def test_the_value_learns_twice_as_fast(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """One update of Adam moves every B by its rate: .002 the policy's, .004 the value's, or as asked."""
    knobs = {"ppo_epochs": 1, "minibatches": 1, "learning_rate": 2e-3, "max_steps": 1, "adam_epsilon": 1e-14}
    knobs |= {"lr_schedule": "constant", "warmup_ratio": 0.0, "reward": score("len(c)")}
    for name, given, expected in (("default", {}, 4e-3), ("asked", {"value_learning_rate": 7e-3}, 7e-3)):
        folder = run("ppo", PROMPTS, name, **SMALL | knobs | given)
        for part, rate in (("adapter", 2e-3), ("value", expected)):
            moved = load_file(folder / part / "adapter_model.safetensors")
            found = torch.cat([b.abs().flatten() for key, b in moved.items() if "lora_B" in key])
            assert found.median().item() == pytest.approx(rate, rel=1e-3)
    assert "base_model.model.score.weight" in load_file(folder / "value" / "adapter_model.safetensors")


def test_adaptive_kl(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """4 rollouts of a horizon of 8: the coefficient moves by 1 + clip(KL / target - 1, -.2, .2) / 2 after each step."""
    knobs = {"target_kl": 0.05, "kl_horizon": 8, "kl_coefficient": 0.2, "learning_rate": 5e-3, "max_steps": 5}
    lines = lines_of(run("ppo", PROMPTS, "run", reward=score("len(c)"), **SMALL, **knobs))
    coefficient = 0.2
    for line in lines:
        assert line["objective/kl_coefficient"] == pytest.approx(coefficient, rel=1e-6)
        assert line["objective/non_score_reward"] == pytest.approx(
            -coefficient * line["objective/kl"], rel=1e-4, abs=1e-7
        )
        error = max(-0.2, min(0.2, line["objective/kl"] / 0.05 - 1))
        coefficient *= 1 + error * 4 / 8
    assert lines[1]["objective/kl_coefficient"] == pytest.approx(0.2 * 0.9, rel=1e-6)  # the first KL is 0


def test_unfinished_rollouts_are_penalised(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """With one new token almost none ends: the reward is the score, 5, less 2 for each that did not."""
    knobs = {"max_new_tokens": 1, "missing_eos_penalty": 2.0, "max_steps": 1}
    line = lines_of(run("ppo", PROMPTS, "run", reward=score("5.0"), **SMALL | knobs))[0]
    assert line["completions/finished"] < 1
    assert line["objective/rlhf_reward"] == pytest.approx(5 - 2 * (1 - line["completions/finished"]), abs=1e-5)


def test_the_function_gets_prompts_and_texts(
    run: Callable[..., Path], score: Callable[[str], str], tmp_path: Path
) -> None:
    """The prompt as it stands in the file, beside the response to it without its end token."""
    name = score("(open('seen.jsonl', 'a').write(__import__('json').dumps([p, c]) + '\\n'), 1.0)[1]")
    run("ppo", PROMPTS, "run", reward=name, max_steps=1, **SMALL)
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert sorted(prompt for prompt, _ in seen) == sorted(row["prompt"] for row in PROMPTS)
    assert not any("</s>" in text or "<s>" in text for _, text in seen)
    assert any(text for _, text in seen)


def test_evaluation(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """Held-out prompts are answered and scored; that draws nothing that training would draw."""
    knobs = {"reward": score("c.count('a')"), "learning_rate": 1e-3, "max_steps": 2, **SMALL}
    held_out = Path("held_out.jsonl")
    held_out.write_text(json.dumps(PROMPTS[0]) + "\n")
    plain = run("ppo", PROMPTS, "plain", **knobs)
    watched = run("ppo", PROMPTS, "watched", eval_data=str(held_out.resolve()), eval_steps=1, **knobs)
    assert all("eval_objective/scores" in line and "eval_objective/kl" in line for line in lines_of(watched))
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (plain, watched))
    assert one == other


def test_a_policy_is_no_reward(run: Callable[..., Path]) -> None:
    sft = run("sft", DEMONSTRATIONS, "sft", max_steps=1)
    with pytest.raises(UserError, match="is a policy run, where a reward is expected") as error:
        run("ppo", PROMPTS, "run", reward=str(sft), **SMALL)
    assert error.value.exit_code == 2


def test_a_prompt_without_room_is_dropped(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """20 tokens at most, 8 of them new: of <s> and 7, 26, 2 and 10 characters (merges aside) the second is dropped."""
    folder = run("ppo", PROMPTS, "run", reward=score("1.0"), max_length=20, max_steps=1, **SMALL)
    dropped = [json.loads(line) for line in (folder / "dropped_rows.jsonl").read_text().splitlines()]
    assert [entry["where"].rsplit(":", 1)[1] for entry in dropped] == ["2"]
    assert "leaves no room for 8 new ones" in dropped[0]["reason"]


# ---- that it learns


def test_it_follows_the_score(run: Callable[..., Path], score: Callable[[str], str]) -> None:
    """A reward for the share of one letter, which a random model writes about once in a hundred characters.

    It rises sevenfold on the machine where this was written; rollouts differ from one kind of CPU to another.
    """
    knobs = {"max_new_tokens": 10, "batch_size": 16, "micro_batch_size": 16, "max_steps": 12, "learning_rate": 1e-2}
    knobs |= {"missing_eos_penalty": 0.0, "kl_coefficient": 0.01, "ppo_epochs": 2, "lr_schedule": "constant"}
    lines = lines_of(run("ppo", PROMPTS, "run", reward=score("10 * c.count('e') / (len(c) + 1)"), **knobs))
    scores = [line["objective/scores"] for line in lines]
    assert sum(scores[-3:]) > 3 * sum(scores[:3])
    assert lines[-1]["objective/kl"] > 0.5
