"""What all training methods share; the knobs of each are in `offline` and `online`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lowrank_align.config.knobs import Coefficient, Fraction, ModelSettings, NotNegative, Positive, Rate

ADAPTERS_OWN = ("rank", "alpha", "target_modules", "lora_layers")  # a new adapter's; a continued one has its own


class TrainSettings(ModelSettings):
    """What all training methods share."""

    method: ClassVar[str]
    rows_field: ClassVar[str] = "data"
    # what the memory planner has to know of a method
    speaks: ClassVar[bool] = True  # it puts completion tokens through the language model's head
    has_reference: ClassVar[bool] = False  # a frozen copy of the policy lies beside it
    trained_adapters: ClassVar[int] = 1

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
    lora_layers: Positive | None = None
    """Adapters on the top so many layers alone: what lies below is computed once for policy, reference and all."""

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
    def needs_reference(self) -> bool:
        """Whether this run has a frozen copy of the policy beside it."""
        return self.has_reference

    @property
    def compares_segments(self) -> bool:
        """Whether the two conversations of a pair may start differently."""
        return False

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
