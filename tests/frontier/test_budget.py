"""The budget's arithmetic, by hand."""

from typing import Any

import pytest
from lowrank_align.apps.frontier.budget import (
    Spent,
    answers_per_step,
    spent_offline,
    spent_on_reward,
    spent_online,
    steps_within,
)

from lowrank_align.config import METHODS, RewardSettings, resolve
from lowrank_align.errors import UserError


def settings(method: str, **knobs: Any) -> Any:
    where = {"model": "m", "out": "o", METHODS[method].rows_field: "rows"}
    if METHODS[method].rows_field == "prompts":
        where["reward"] = "a:b"
    return resolve(METHODS[method], where | knobs)


@pytest.mark.parametrize(
    ("method", "knobs", "expected"),
    [
        ("sft", {"batch_size": 8}, (0, 8)),
        ("reward", {"batch_size": 8}, (0, 16)),
        ("dpo", {"batch_size": 8}, (0, 16)),
        ("dpo", {"batch_size": 8, "loss": "nll"}, (0, 8)),
        ("dpo", {"batch_size": 8, "loss": ["sigmoid", "nll"]}, (0, 16)),
        ("condition", {"batch_size": 8}, (0, 16)),
        ("coh", {"batch_size": 8}, (0, 16)),
        ("ppo", {"batch_size": 8, "ppo_epochs": 3}, (8, 2 * 8 * 3)),
        ("grpo", {"batch_size": 4, "group_size": 6, "inner_epochs": 2}, (24, 48)),
        ("rloo", {"batch_size": 4, "group_size": 6}, (24, 24)),
        ("online-dpo", {"batch_size": 4, "group_size": 6}, (24, 8)),
        ("expert", {"batch_size": 4, "group_size": 6}, (24, 4)),
        ("quark", {"batch_size": 8, "pool_steps": 4}, (8, 40)),
    ],
)
def test_answers_of_a_step(method: str, knobs: dict[str, Any], expected: tuple[int, int]) -> None:
    """Pairs train both answers, Preferred-FT the chosen ones alone. PPO trains each rollout in two roles, each epoch;
    a group's methods draw batch x group, of which expert iteration trains the best and online DPO a pair; Quark trains
    its pool, five steps' answers once it is full."""
    assert answers_per_step(settings(method, **knobs)) == expected


def test_steps_within_a_budget() -> None:
    """10,000 less 4,000 for pairs and reward leave 6,000. PPO at 8 prompts and one epoch draws 8 and trains 16 answers
    of 10 tokens, 240 a step: 25 steps. DPO's pairs of 8 are 160 a step: 37 of 37.5."""
    before = Spent(1000, 3000)
    assert steps_within(10_000, before, settings("ppo", batch_size=8, ppo_epochs=1), 10.0) == 25
    assert steps_within(10_000, before, settings("dpo", batch_size=8), 10.0) == 37


def test_a_budget_that_is_used_up() -> None:
    with pytest.raises(UserError, match="budget_tokens: 4100; 4000 go to pairs and .* a step of ppo takes 240"):
        steps_within(4100, Spent(1000, 3000), settings("ppo", batch_size=8, ppo_epochs=1), 10.0)


def test_what_was_spent() -> None:
    """Three DPO steps of 8 pairs at 10 tokens: 3 x 16 x 10. A reward model over 3 epochs of 10 pairs sees 30, so
    60 answers; by 4 steps of 8 it sees 32, so 64. GRPO's steps with rollouts of 9 and 11 tokens on average, 24 each:
    24 x 20 drawn, and as many trained in one epoch. Quark's pool of 8 and then 16: 8 x 9 + 16 x 11 = 248."""
    assert spent_offline(settings("dpo", batch_size=8), 3, 10.0) == Spent(0, 480)
    reward = settings("reward", epochs=3, batch_size=8)
    assert isinstance(reward, RewardSettings)
    assert spent_on_reward(reward, 10, 10.0) == Spent(0, 600)
    assert spent_on_reward(settings("reward", max_steps=4, batch_size=8), 10, 10.0) == Spent(0, 640)
    lengths = [{"completions/mean_length": 9.0}, {"completions/mean_length": 11.0}]
    assert spent_online(settings("grpo", batch_size=4, group_size=6), lengths) == Spent(480, 480)
    pools = [{**line, "quark/pool": 8.0 * (i + 1)} for i, line in enumerate(lengths)]
    assert spent_online(settings("quark", batch_size=8), pools) == Spent(160, 248)
    assert (Spent(1, 2) + Spent(3, 4)).as_json() == {"generated": 4, "trained": 6, "total": 10}
