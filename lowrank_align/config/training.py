"""The knobs of the training methods."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lowrank_align.config.knobs import Coefficient, Fraction, ModelSettings, NotNegative, Positive, Rate

ADAPTERS_OWN = ("rank", "alpha", "target_modules")  # settings of a new adapter; a continued one has its own


class TrainSettings(ModelSettings):
    """What all training methods share."""

    method: ClassVar[str]
    rows_field: ClassVar[str] = "data"

    out: str
    """The run's folder. It must not exist, unless with --resume or --overwrite."""
    eval_data: str | None = None
    """Held-out rows, of the same shape as the data."""
    eval_rows: NotNegative = 0
    """Without --eval-data: so many rows are split off by the seed and held out."""
    train_on: Literal["all", "last"] = "all"
    """In conversations, train on every assistant turn or on the last one alone."""
    skip_bad: bool = False
    """Set bad rows aside in OUT/bad_rows.jsonl and go on, instead of stopping at the first."""

    epochs: Rate = 1.0
    """Rounds through the data (may be a fraction)."""
    max_steps: Positive | None = None
    """Stop after so many steps, going round the data as often as it takes. Wins over --epochs."""
    batch_size: Positive = 16
    """Rows per step."""
    micro_batch_size: Positive = 2
    """Rows that are in memory at once; halved by itself when memory runs out. The step is the same either way."""
    learning_rate: Rate = 1e-4
    """The peak learning rate."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up: to 0 along a line or a cosine, or not at all."""
    warmup_ratio: Fraction = 0.05
    """The share of steps in which the rate rises from 0."""
    weight_decay: Coefficient = 0.0
    """AdamW's weight decay."""
    adam_beta1: Fraction = 0.9
    """AdamW's decay of the gradient's mean."""
    adam_beta2: Fraction = 0.999
    """AdamW's decay of the gradient's square."""
    adam_epsilon: Rate = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Rate = 1.0
    """Gradients are clipped to this norm."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """8-bit states take a quarter of the memory, paged ones move to the host when the card is full (both need CUDA)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: far less memory, about a third more time."""

    rank: Positive = 16
    """LoRA's rank, for a new adapter (one that is continued keeps its own)."""
    alpha: Rate | None = None
    """LoRA's alpha; without it, twice the rank."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: list[str] | None = None
    """The linear layers that get an adapter, by name; without it, all of the decoder's."""

    log_steps: Positive = 1
    """A line in metrics.jsonl every so many steps."""
    eval_steps: Positive = 50
    """Held-out rows are scored every so many steps, and at the end."""
    early_stopping: NotNegative = 0
    """Stop when so many evaluations brought no better eval_loss (PPO: score), and keep the best adapter; 0: never."""
    sample_steps: NotNegative = 50
    """Samples are printed and kept every so many steps; 0: never."""
    sample_tokens: Positive = 48
    """How long those samples may be."""
    save_steps: Positive = 50
    """A checkpoint every so many steps, and at the end."""
    keep_checkpoints: Positive = 2
    """How many of them are kept."""
    report_to: list[str] = []
    """Trackers of accelerate to report to, as tensorboard or wandb."""
    resume: bool = False
    """Go on from the newest checkpoint that verifies; start where there is none."""
    overwrite: bool = False
    """Replace the run that is in OUT."""
    gpu: str | None = None
    """The memory to plan for, as 12GiB; without it, what the device has."""
    auto: bool = False
    """Where the run does not fit into memory, take the nearest settings that do."""
    force: bool = False
    """Start although the plan says that the run does not fit."""

    @property
    def rows(self) -> str:
        """Where the training rows are: the field is `data`, or `prompts` for methods that make their own answers."""
        return str(getattr(self, self.rows_field))

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if self.eval_data and self.eval_rows:
            raise ValueError("eval_data and eval_rows exclude each other")
        if self.auto and self.force:
            raise ValueError("auto and force exclude each other")
        if self.early_stopping and not (self.eval_data or self.eval_rows):
            raise ValueError("early_stopping needs held-out rows (eval_data or eval_rows)")
        return self


class SFTSettings(TrainSettings):
    """Supervised fine-tuning on demonstrations."""

    method = "sft"

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 2e-4
    """The peak learning rate."""


class RewardSettings(TrainSettings):
    """A reward model from pairs or rankings (Bradley-Terry)."""

    method = "reward"

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    centering_coefficient: Coefficient = 0.01
    """Weight of the auxiliary (r_chosen + r_rejected)^2 that keeps scores near 0; 0: off."""
    shift_over: Literal["all", "chosen", "reference"] = "all"
    """Scores are shifted to a mean of 0 over these training completions; `reference`: the start adapter's answers."""
    shift_rows: Positive = 256
    """Over how many rows that mean is taken."""


class DPOSettings(TrainSettings):
    """Direct preference optimisation on pairs."""

    method = "dpo"

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    beta: Rate = 0.1
    """Nearness to the reference: larger stays closer."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """The loss on the difference of log-ratios."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of labels taken to be wrong (cDPO; sigmoid only)."""
    lora_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """0: policy and reference must agree at the first step."""

    @model_validator(mode="after")
    def _smoothing_is_sigmoids(self) -> "DPOSettings":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for loss: sigmoid, not {self.loss}")
        return self


class PPOSettings(TrainSettings):
    """Proximal policy optimisation of a reward model or a Python function."""

    method = "ppo"
    rows_field = "prompts"

    prompts: str
    """Prompts: any rows that have one, in a file, a folder or a hub data set."""
    reward: str
    """A reward run, or module:function(prompts, completions) -> scores, looked up in the current folder too."""
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
    max_new_tokens: Positive = 64
    """The longest rollout in tokens."""
    rollout_batch_size: Positive = 32
    """Rollouts that are drawn at once; halved by itself when memory runs out."""
    temperature: Rate = 1.0
    """Rollouts are sampled, and all log-probabilities taken, at this temperature."""
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
    missing_eos_penalty: Coefficient = 1.0
    """Subtracted from the score of a rollout that does not end by itself."""
    lora_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """0: dropout is off in every role."""


METHODS: dict[str, type[TrainSettings]] = {c.method: c for c in (SFTSettings, RewardSettings, DPOSettings, PPOSettings)}
