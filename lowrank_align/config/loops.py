"""The knobs of the commands that train more than once: the figure that compares the methods, and rounds of them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowrank_align.config.knobs import Coefficient, Fraction, ModelSettings, NotNegative, Positive, Seed, Settings
from lowrank_align.config.online import is_function

POOL = "pool"  # the simulated annotators of `annotators.POOL`


class FrontierSettings(Settings):
    """The figure that compares the methods: exact score against KL, at one budget of tokens for each."""

    model: str = "tiny"
    """A model folder, a hub id, or `tiny`."""
    preset: str | None = None
    """Settings of the methods for a model, by name or as a .yaml file (without it: those of tiny, or the defaults)."""
    score: str | None = None
    """module:function(prompts, completions) -> the exact score of each; needed with another model than tiny."""
    prompts: str | None = None
    """Prompts: any rows that have one. Without it, the beginnings of reviews that tiny knows."""
    demonstrations: str | None = None
    """What SFT learns from; needed with --prompts."""
    quantize: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen weights are kept."""
    device: str = "auto"
    """auto (first GPU, else CPU), cpu, cuda, cuda:N, xpu or mps."""
    out: str = "runs/frontier"
    """The folder of the trainings and the report. What is finished in there is not trained again."""
    quick: bool = False
    """One seed, four methods, a smaller budget, no tuning: shows the way, not the results."""
    seeds: Positive = 3
    """How often everything is done, from SFT on, each with a seed of its own."""
    seed: Seed = 0
    """The first of the seeds."""
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    """Processes that train beside each other, one thread each; 1 trains in this one."""
    budget_tokens: Positive = 400_000
    """Generated and trained tokens of every method together, pairs and reward model among them."""
    pairs: Annotated[int, Field(ge=8)] = 1200
    """Training prompts: each gets a pair of answers, and what samples by itself uses the same ones."""
    held_out: Annotated[int, Field(ge=8)] = 256
    """Prompts that no training sees; half as many more choose the learning rates."""
    max_new_tokens: Positive = 40
    """The longest answer in tokens."""
    tune: bool = True
    """Try three learning rates for every method on the first seed, and take the best."""
    only: list[str] | None = None
    """Some of the methods, by their names in the report; without it, all."""

    @model_validator(mode="after")
    def _whole(self) -> "FrontierSettings":
        if self.model != "tiny" and self.score is None:
            raise ValueError(f"score: missing; {self.model} needs --score module:function, tiny has one of its own")
        if self.score is not None and not is_function(self.score):
            raise ValueError(f"score: {self.score}: not a module:function")
        if self.prompts is not None and self.demonstrations is None:
            raise ValueError("prompts: needs --demonstrations too, rows of the same kind that SFT learns from")
        return self


class RoundsSettings(ModelSettings):
    """Rounds of collecting, refitting and training: each starts from the policy of the one before."""

    out: str
    """The folder of the rounds. What is finished in there is not done again: the same command goes on."""
    method: str = "dpo"
    """What trains the policy: a method that learns from pairs (dpo, ...) or samples by itself (ppo, grpo, ...)."""
    rounds: Positive = 3
    """How many."""
    prompts: str | None = None
    """Prompts: any rows that have one. Needed unless people judge (--store)."""
    annotator: str | None = None
    """`pool` (simulated people who differ and err), or `exact` (the score, with --noise). Needs --score."""
    score: str | None = None
    """module:function(prompts, completions) -> the exact score of each, behind the simulated annotator."""
    noise: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The share of its labels that `exact` flips; the pool has its own."""
    store: str | None = None
    """In place of a simulated annotator: the studio's file. A round takes the judgements new since the last one."""
    min_judgements: Positive = 50
    """With fewer new judgements, a round waits for more."""
    pairs: Positive = 400
    """Prompts a round: each gets a pair of answers by the current policy."""
    held_out: NotNegative = 100
    """Prompts on which the rounds are compared, split off first."""
    all_rounds: bool = True
    """Train on the pairs of all rounds so far, not on the last one's alone."""
    refit: bool | None = None
    """Train a reward model on the pairs each round; without it, where the method needs one."""
    policy_config: str | None = None
    """A YAML file with the method's settings."""
    reward_config: str | None = None
    """A YAML file with the reward model's settings."""
    temperature: Coefficient = 1.0
    """At which answers are drawn for the pairs."""
    top_p: Annotated[Fraction, Field(gt=0)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: Positive = 64
    """The longest answer in tokens."""

    @model_validator(mode="after")
    def _who_judges(self) -> "RoundsSettings":
        if (self.annotator is None) == (self.store is None):
            raise ValueError("annotator: give --annotator (simulated) or --store (people), one of the two")
        if self.annotator not in (None, POOL, "exact"):
            raise ValueError(f"annotator: {self.annotator}, must be {POOL} or exact")
        if self.annotator is not None and (self.score is None or self.prompts is None):
            raise ValueError(f"annotator: {self.annotator} needs --score module:function and --prompts")
        if self.noise and self.annotator != "exact":
            raise ValueError("noise: is for --annotator exact; the pool has its own, and people theirs")
        if self.score is not None and not is_function(self.score):
            raise ValueError(f"score: {self.score}: not a module:function")
        return self
