"""How many steps a method gets for its tokens, and what it spent.

A budget is a number of generated plus trained tokens of answers, from the SFT policy on: the pairs that were drawn, the
reward model that was trained on them, the rollouts, and every token that went through a backward pass (of PPO's two
roles, through two). Not counted: prompts, and passes without a gradient (reference, scores, old log-probs).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowrank_align.config import DPOSettings, OnlineSettings, PPOSettings, RewardSettings, TrainSettings
from lowrank_align.errors import UserError


@dataclass(frozen=True)
class Spent:
    """Tokens of answers."""

    generated: int = 0
    trained: int = 0

    @property
    def total(self) -> int:
        return self.generated + self.trained

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.generated + other.generated, self.trained + other.trained)

    def as_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def answers_per_step(settings: TrainSettings) -> tuple[int, int]:
    """(answers generated, answers trained on) in one step of the loop; an answer counts once a backward pass."""
    s: Any = settings
    size = settings.batch_size
    if isinstance(settings, PPOSettings):
        return size, 2 * size * settings.ppo_epochs  # the policy's pass and the value model's
    if isinstance(settings, OnlineSettings):
        drawn = size * getattr(s, "group_size", 1)
        if s.method == "quark":
            return drawn, drawn * (s.pool_steps + 1)  # the whole pool, once it is full
        return drawn, {"expert": size, "online-dpo": 2 * size}.get(s.method, drawn * getattr(s, "inner_epochs", 1))
    if settings.method == "sft" or (isinstance(settings, DPOSettings) and settings.loss == ["nll"]):
        return 0, size
    return 0, 2 * size


def steps_within(budget: int, before: Spent, settings: TrainSettings, answer_tokens: float) -> int:
    """Steps that a budget allows after what was spent before, at so many tokens an answer. UserError for none."""
    left = budget - before.total
    price = sum(answers_per_step(settings)) * answer_tokens
    if left < price:
        raise UserError(
            f"budget_tokens: {budget}; {before.total} go to pairs and reward model, a step of {settings.method} takes "
            f"{price:.0f}: raise --budget-tokens or lower --pairs"
        )
    return int(left // price)


def spent_offline(settings: TrainSettings, steps: int, answer_tokens: float) -> Spent:
    """By steps on rows whose answers have so many tokens on average."""
    return Spent(0, round(steps * answers_per_step(settings)[1] * answer_tokens))


def spent_online(settings: TrainSettings, metrics: Sequence[Mapping[str, Any]]) -> Spent:
    """By the steps of a `metrics.jsonl`, each with the mean length of its rollouts (and the size of Quark's pool)."""
    generated, trained = answers_per_step(settings)
    lengths = [line["completions/mean_length"] for line in metrics]
    learned = [line.get("quark/pool", trained) for line in metrics]
    return Spent(
        round(generated * sum(lengths)), round(sum(n * length for n, length in zip(learned, lengths, strict=True)))
    )


def spent_on_reward(settings: RewardSettings, rows: int, answer_tokens: float) -> Spent:
    """By a reward model on so many pairs, both answers of each; by epochs, a last batch may be smaller."""
    seen = settings.max_steps * settings.batch_size if settings.max_steps else max(1, round(settings.epochs * rows))
    return Spent(0, round(2 * seen * answer_tokens))
