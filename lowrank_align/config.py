"""Every knob, validated, documented under its field. No torch here: `--help` and bad settings answer at once.

The command line's flags are made from these fields (`learning_rate` is `--learning-rate`), a YAML file has the same
names, flags win, and the resolved settings are saved in the run as `config.yaml`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowrank_align.errors import UserError, nearest

YAML_LIMIT_BYTES = 1_000_000

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch's generators take


class Settings(BaseModel):
    """A group of knobs. Unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


class ModelSettings(Settings):
    """Which base, and how it lies in memory."""

    model: str
    """The base: a model folder, a hub id, or `tiny`."""
    adapter: str | None = None
    """The run (or PEFT adapter folder) to start from; without it, the bare base."""
    quantize: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen weights are kept: 4-bit NF4 with double quantisation, 8-bit, or as they are."""
    device: str = "auto"
    """auto (first GPU, else CPU), cpu, cuda, cuda:N, xpu or mps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What to compute in. auto: bf16 where the GPU has it, fp16 on older ones, fp32 on CPU."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"
    """The attention implementation of transformers."""
    chat_template: str | None = None
    """A .jinja file, or the name of one of the tokenizer's templates, in place of the model's own."""
    max_length: Positive = 1024
    """Longest prompt + completion in tokens (at most the model's context); longer completions are cut."""
    seed: Seed = 0
    """Seeds the order of rows, new adapters, rollouts and samples."""


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


class RowsSettings(ModelSettings):
    """Going through the rows of a file with a model."""

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    out: str
    """The .jsonl file to write, a line a row, in the order of the rows. It must not exist, unless with --overwrite."""
    overwrite: bool = False
    """Replace OUT."""
    skip_bad: bool = False
    """Bad rows get null with the reason in their line, instead of stopping at the first."""
    train_on: Literal["all", "last"] = "all"
    """In conversations, count every assistant turn or the last one alone."""
    batch_size: Positive = 8
    """Rows at once."""


class LogpsSettings(RowsSettings):
    """Log-probabilities of the completions, summed over their tokens."""


class ScoreSettings(RowsSettings):
    """A reward model's scores of the completions."""

    adapter: str
    """The reward run."""
    shifted: bool = False
    """Subtract the shift in the run's reward.json."""


class GenerateSettings(ModelSettings):
    """Completions of prompts."""

    prompts: str
    """Any rows that have a prompt."""
    out: str
    """The .jsonl file to write, one line a completion. It must not exist, unless with --overwrite."""
    overwrite: bool = False
    """Replace OUT."""
    completions: Positive = 1
    """Completions per prompt."""
    temperature: Coefficient = 1.0
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: Positive = 128
    """The longest completion in tokens."""
    batch_size: Positive = 16
    """Completions at once."""


class ShowSettings(Settings):
    """Rows as a model will see them, the trained tokens marked."""

    model: str
    """A model folder, a hub id, or `tiny`; only its tokenizer is loaded."""
    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    rows: Positive = 3
    """How many rows."""
    chat_template: str | None = None
    """A .jinja file, or the name of one of the tokenizer's templates, in place of the model's own."""
    train_on: Literal["all", "last"] = "all"
    """In conversations, train on every assistant turn or on the last one alone."""
    max_length: Positive = 1024
    """Longest prompt + completion in tokens (at most the model's context)."""


METHODS: dict[str, type[TrainSettings]] = {c.method: c for c in (SFTSettings, RewardSettings, DPOSettings, PPOSettings)}


S = TypeVar("S", bound=Settings)


def resolve(settings: type[S], flags: Mapping[str, Any], config_file: str | Path | None = None) -> S:
    """Defaults, under the YAML file, under the flags (None = not given). One UserError line for the first bad knob."""
    given = read_yaml(config_file) if config_file is not None else {}
    where = dict.fromkeys(given, f"{config_file}: ")
    for key, value in flags.items():
        if value is not None:
            given[key], where[key] = value, ""
    known = settings.model_fields
    for key in given:
        if key not in known:
            raise UserError(f"{where[key]}{key}: unknown setting{nearest(str(key), known)}")
        for text in given[key] if isinstance(given[key], list) else [given[key]]:
            if isinstance(text, str) and (problem := _unusable(text)):
                raise UserError(f"{where[key]}{key}: {problem}")
    try:
        return settings(**given)
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A flat mapping of settings from a YAML file (safe loading, size-capped)."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such configuration file")
    if file.stat().st_size > YAML_LIMIT_BYTES:
        raise UserError(f"{path}: over {YAML_LIMIT_BYTES // 1_000_000} MB; a configuration is a few lines")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: nested too deep; needs lines of `setting: value`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML (not UTF-8)") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 99th of May, a number of 5000 digits
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({_reason(error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: needs lines of `setting: value`")
    content.pop("method", None)  # a run's config.yaml names its method; the command has it already
    return content


def to_yaml(settings: TrainSettings) -> str:
    """The resolved settings, so that `lowrank-align METHOD --config RUN/config.yaml` runs them again."""
    unused = set(ADAPTERS_OWN) if settings.adapter else set()
    values = settings.model_dump(exclude={"resume", "overwrite"} | unused)
    return f"# lowrank-align {settings.method} --config THIS_FILE\n" + yaml.safe_dump(
        {"method": settings.method, **values}, sort_keys=False, allow_unicode=True
    )


def _unusable(text: str) -> str | None:
    """What keeps a text from being a path, a name or a number; an empty one is mostly an unset shell variable."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 (at character {error.start + 1}); rename the file"
    return None


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())[:200]


def _one_line(error: ValidationError, where: Mapping[str, str]) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{name}: missing; give --{name.replace('_', '-')} or a line in the --config file"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where.get(name, '')}{name}: {message} (got {first['input']!r})"
