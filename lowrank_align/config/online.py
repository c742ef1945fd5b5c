"""The knobs of the methods that learn from answers of their own."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lowrank_align.config.knobs import Coefficient, Finite, Fraction, NotNegative, Positive, Rate
from lowrank_align.config.sampler import SamplerSettings
from lowrank_align.config.training import TrainSettings


def is_function(reward: str) -> bool:
    """`module:function`, as against a run's folder."""
    module, _, function = reward.partition(":")
    return bool(function) and all(part.isidentifier() for part in (*module.split("."), function))


class OnlineSettings(SamplerSettings):
    """What all methods that sample answers share."""

    rows_field = "prompts"
    has_reference = True

    prompts: str
    """Prompts: any rows that have one, in a file, a folder or a hub data set."""
    reward: list[str]
    """Reward runs, or module:function(prompts, completions) -> scores, looked up in the current folder too."""
    reward_weights: list[Finite] | None = None
    """A weight for each reward, in the same order; without it, 1 each."""
    length_penalty: Coefficient = 0.0
    """Subtracted from the score for every token of an answer."""
    missing_eos_penalty: Coefficient = 1.0
    """Subtracted from the score of a rollout that does not end by itself."""
    max_new_tokens: Positive = 64
    """The longest rollout in tokens."""
    rollout_batch_size: Positive = 32
    """Rollouts that are drawn at once; halved by itself when memory runs out."""
    temperature: Rate = 1.0
    """Rollouts are sampled, and all log-probabilities taken, at this temperature."""
    lora_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """0: dropout is off in every role."""

    @property
    def reward_runs(self) -> list[str]:
        """The rewards that are runs, not functions."""
        return [reward for reward in self.reward if not is_function(reward)]

    @property
    def trained_answers(self) -> int:
        """How many of a prompt's answers an update learns from at once."""
        return int(getattr(self, "group_size", 1))

    @field_validator("reward", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _rewards_fit(self) -> "OnlineSettings":
        if not self.reward:
            raise ValueError("reward: empty; name a reward run or module:function")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward):
            raise ValueError(
                f"reward_weights: {len(self.reward_weights)} for {len(self.reward)} rewards; give one each"
            )
        return self

    @model_validator(mode="after")
    def _a_prompt_a_minibatch(self) -> "OnlineSettings":
        minibatches = getattr(self, "minibatches", 1)
        if minibatches > self.batch_size:
            raise ValueError(f"minibatches: {minibatches} of batch_size {self.batch_size} prompts; at most one each")
        return self


class PPOSettings(OnlineSettings):
    """Proximal policy optimisation of a reward model or a Python function."""

    method = "ppo"
    trained_adapters = 2

    learning_rate: Rate = 1e-4
    """The policy's peak learning rate."""
    value_learning_rate: Rate | None = None
    """The value model's peak learning rate; without it, twice the policy's."""
    adam_epsilon: Rate = 1e-5
    """AdamW's epsilon."""
    batch_size: Positive = 32
    """Prompts per step: each gets one rollout."""
    minibatches: Positive = 2
    """Optimiser steps per pass over the rollouts."""
    ppo_epochs: Positive = 4
    """Passes over each batch of rollouts."""
    kl_coefficient: Coefficient = 0.05
    """The price of a nat of KL to the reference in the per-token reward (beta)."""
    target_kl: Rate | None = None
    """Adapt the coefficient so that a rollout's KL goes to so many nats (Ziegler et al. 2019)."""
    kl_horizon: Positive = 10_000
    """Rollouts over which the adaptive coefficient moves."""
    clip_range: Rate = 0.2
    """The policy's ratio is clipped to 1 +- this."""
    clip_range_value: Rate = 0.2
    """Values are clipped to +- this around the old ones."""
    value_coefficient: Coefficient = 0.1
    """Weight of the value loss."""
    gamma: Fraction = 1.0
    """Discount."""
    gae_lambda: Fraction = 0.95
    """Lambda of the generalised advantage estimate."""
    pretrain_data: str | None = None
    """PPO-ptx: rows of text or demonstrations whose likelihood is kept up beside the reward."""
    pretrain_coefficient: Coefficient = 1.0
    """Its weight (gamma_ptx) against the policy's loss per token."""

    @model_validator(mode="after")
    def _pretraining_has_data(self) -> "PPOSettings":
        if self.pretrain_coefficient != 1.0 and self.pretrain_data is None:
            raise ValueError("pretrain_coefficient: without pretrain_data there is nothing to weigh; name its rows")
        return self


class GRPOSettings(OnlineSettings):
    """Group-relative policy optimisation: the answers of a prompt are each other's baseline."""

    method = "grpo"

    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    batch_size: Positive = 8
    """Prompts per step: each gets a group of rollouts."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt (G)."""
    minibatches: Positive = 1
    """Optimiser steps per pass over the rollouts."""
    inner_epochs: Positive = 1
    """Passes over each batch of rollouts."""
    beta: Coefficient = 0.02
    """The price of a nat of KL to the reference (k3), in the loss; 0: no reference is asked."""
    ratio: Literal["token", "sequence"] = "token"
    """exp(new - old) of each token, or of the mean over the answer's tokens (GSPO)."""
    scale: Literal["std", "none"] = "std"
    """Advantages are divided by the standard deviation of their group, or not (Dr. GRPO)."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Every token weighs the same (DAPO), or every answer (the paper)."""
    clip_range: Rate = 0.2
    """The ratio is clipped to 1 - this below."""
    clip_range_high: Rate | None = None
    """And to 1 + this above (DAPO's clip-higher: 0.28); without it, the same as below."""

    @model_validator(mode="after")
    def _clips_higher(self) -> "GRPOSettings":
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            raise ValueError(
                f"clip_range_high: {self.clip_range_high:g} is below clip_range {self.clip_range:g}; it must be at"
                " least as much (DAPO: 0.28 above, 0.2 below)"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0


class RLOOSettings(OnlineSettings):
    """REINFORCE with the other answers of a prompt as the baseline (leave one out)."""

    method = "rloo"

    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    batch_size: Positive = 8
    """Prompts per step: each gets a group of rollouts."""
    group_size: Annotated[int, Field(ge=2)] = 4
    """Rollouts per prompt."""
    minibatches: Positive = 1
    """Optimiser steps per pass over the rollouts."""
    inner_epochs: Positive = 1
    """Passes over each batch of rollouts."""
    beta: Coefficient = 0.05
    """The price of a nat of KL to the reference (k1), in the reward; 0: no reference is asked."""
    clip_range: Rate = 0.2
    """The answer's ratio is clipped to 1 +- this."""

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0


class OnlineDPOSettings(OnlineSettings):
    """DPO on the policy's own answers, the higher score chosen, new ones each step."""

    method = "online-dpo"

    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    batch_size: Positive = 16
    """Prompts per step: each gets a group of answers, of which the best and the worst are a pair."""
    group_size: Annotated[int, Field(ge=2)] = 2
    """Answers per prompt."""
    beta: Rate = 0.1
    """Nearness to the reference: larger stays closer."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """The loss on the difference of log-ratios."""

    @property
    def trained_answers(self) -> int:
        return 2


class ExpertSettings(OnlineSettings):
    """Expert iteration: answers are sampled, the best of each prompt are learned, and again."""

    method = "expert"
    has_reference = False

    learning_rate: Rate = 1e-4
    """The peak learning rate."""
    batch_size: Positive = 16
    """Prompts per step: of each, the best answer is learned."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers per prompt."""

    @property
    def trained_answers(self) -> int:
        return 1


class QuarkSettings(OnlineSettings):
    """Quark: answers sorted into quantiles of score, each learned behind a text that names its own."""

    method = "quark"

    learning_rate: Rate = 1e-4
    """The peak learning rate."""
    batch_size: Positive = 32
    """Prompts per step: each gets one answer."""
    quantiles: Annotated[int, Field(ge=2, le=10)] = 5
    """Into how many the pool of answers is sorted."""
    beta: Coefficient = 0.05
    """The price of a nat of KL to the reference, which sees the prompt without the text."""
    pool_steps: NotNegative = 4
    """The answers of so many earlier steps stay in the pool."""
    quantile_text: str = "Quality {quantile} of {quantiles}: "
    """Stands before an answer; {quantile} is 1 for the worst."""

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def texts(self) -> list[str]:
        """The text of each quantile, the worst first."""
        numbers = range(1, self.quantiles + 1)
        return [self.quantile_text.format(quantile=number, quantiles=self.quantiles) for number in numbers]

    @model_validator(mode="after")
    def _texts_differ(self) -> "QuarkSettings":
        try:
            differ = len(set(self.texts)) == self.quantiles
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"quantile_text: {self.quantile_text!r}: of braces, only {{quantile}} and {{quantiles}} ({error})"
            ) from None
        if not differ:
            raise ValueError(f"quantile_text: {self.quantile_text!r} needs {{quantile}}, which tells the answers apart")
        return self


ONLINE: tuple[type[TrainSettings], ...] = (
    PPOSettings,
    GRPOSettings,
    RLOOSettings,
    OnlineDPOSettings,
    ExpertSettings,
    QuarkSettings,
)
