"""The knobs of the methods that learn from rows as they are."""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from lowrank_align.config.knobs import Coefficient, Positive, Rate
from lowrank_align.config.training import TrainSettings

PairedLossName = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "simpo",
    "orpo",
    "cpo",
    "nll",
    "unlikelihood",
    "token_unlikelihood",
    "cpl",
    "cpl_kl",
]
REFERENCE_FREE: frozenset[str] = frozenset({"simpo", "orpo", "cpo", "nll", "unlikelihood", "token_unlikelihood", "cpl"})
SEGMENTS: frozenset[str] = frozenset({"cpl", "cpl_kl"})
# what each loss reads; the names are its keyword arguments' too
LOSS_KNOBS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("beta", "label_smoothing"),
    "robust": ("beta", "label_smoothing"),
    "ipo": ("beta",),
    "hinge": ("beta",),
    "simpo": ("beta", "simpo_gamma"),
    "orpo": ("beta",),
    "cpo": ("beta", "cpo_alpha"),
    "nll": (),
    "unlikelihood": ("unlikelihood_alpha",),
    "token_unlikelihood": ("unlikelihood_alpha",),
    "cpl": ("cpl_alpha", "cpl_lambda", "cpl_gamma"),
    "cpl_kl": ("cpl_alpha", "cpl_lambda", "cpl_gamma"),
}
RankingKind = Literal["pairwise", "plackett_luce"]


class SFTSettings(TrainSettings):
    """Supervised fine-tuning on demonstrations."""

    method = "sft"

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 2e-4
    """The peak learning rate."""


class RewardSettings(TrainSettings):
    """A reward model from pairs or rankings (Bradley-Terry or Plackett-Luce)."""

    method = "reward"
    speaks = False

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    ranking: RankingKind = "pairwise"
    """Of a ranking's rows: the mean over all K(K-1)/2 comparisons, or the likelihood of the whole order."""
    centering_coefficient: Coefficient = 0.01
    """Weight of the auxiliary (r_chosen + r_rejected)^2 that keeps scores near 0; 0: off."""
    shift_over: Literal["all", "chosen", "reference"] = "all"
    """Scores are shifted to a mean of 0 over these training completions; `reference`: the start adapter's answers."""
    shift_rows: Positive = 256
    """Over how many rows that mean is taken."""


class DPOSettings(TrainSettings):
    """Direct preference optimisation on pairs or rankings, and the other losses on pairs."""

    method = "dpo"
    has_reference = True

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    cache_reference: bool = False
    """Keep the reference's log-probs on disk: later rounds, and other runs from the same start, do not compute them."""
    beta: Rate = 0.1
    """Nearness to the reference: larger stays closer. SimPO wants about 2; ORPO's lambda is called beta here too."""
    loss: list[PairedLossName] = ["sigmoid"]
    """One or several of sigmoid, ipo, hinge, robust, simpo, orpo, cpo, nll (alone: Preferred-FT), unlikelihood,
    token_unlikelihood, cpl, cpl_kl; docs/methods.md says which to take."""
    loss_weights: list[Rate] | None = None
    """A weight for each loss, in the same order; without it, 1 each."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of labels taken to be wrong (sigmoid: cDPO; robust)."""
    ranking: RankingKind = "pairwise"
    """Of a ranking's rows: the mean over all comparisons, or the likelihood of the whole order (sigmoid only)."""
    simpo_gamma: Coefficient = 0.5
    """SimPO's target margin, in nats of the length-normalised reward times beta."""
    cpo_alpha: Coefficient = 1.0
    """CPO's weight of the chosen answers' likelihood."""
    unlikelihood_alpha: Coefficient = 1.0
    """Unlikelihood's weight of the rejected answers."""
    cpl_alpha: Rate = 0.1
    """CPL's temperature: S = sum of gamma^t alpha log pi over the assistant's tokens."""
    cpl_lambda: Annotated[float, Field(gt=0, le=1)] = 0.5
    """CPL multiplies the worse segment's sum by this; 1 makes no difference between them."""
    cpl_gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """CPL's discount per token of the assistant's."""
    lora_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """0: policy and reference must agree at the first step."""

    @property
    def needs_reference(self) -> bool:
        """Whether one of the losses compares with the reference."""
        return not REFERENCE_FREE.issuperset(self.loss)

    @property
    def compares_segments(self) -> bool:
        """Whether every loss takes conversations that start differently."""
        return SEGMENTS.issuperset(self.loss)

    @field_validator("loss", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _losses_fit(self) -> "DPOSettings":
        if not self.loss or len(set(self.loss)) < len(self.loss):
            known = ", ".join(get_args(PairedLossName))
            raise ValueError(f"loss: each once, and at least one of {known}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(f"loss_weights: {len(self.loss_weights)} for {len(self.loss)} losses; give one each")
        losses = ", ".join(self.loss)
        for knob in dict.fromkeys(name for knobs in LOSS_KNOBS.values() for name in knobs):
            readers = sorted(loss for loss, knobs in LOSS_KNOBS.items() if knob in knobs)
            changed = getattr(self, knob) != type(self).model_fields[knob].default
            if changed and not set(readers).intersection(self.loss):
                named = " and ".join(filter(None, [", ".join(readers[:-1]), readers[-1]]))
                raise ValueError(f"{knob} is for loss: {named}, not {losses}")
        for knob in ("label_smoothing", "loss_weights"):
            if self.ranking == "plackett_luce" and getattr(self, knob):
                raise ValueError(f"{knob} and ranking: plackett_luce exclude each other")
        if self.ranking == "plackett_luce" and self.loss != ["sigmoid"]:
            raise ValueError(f"ranking: plackett_luce is for loss: sigmoid alone, not {losses}")
        return self


class KTOSettings(TrainSettings):
    """Kahneman-Tversky optimisation on single answers, each good or bad."""

    method = "kto"
    has_reference = True

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 5e-5
    """The peak learning rate."""
    beta: Rate = 0.1
    """Nearness to the reference: larger stays closer."""
    desirable_weight: Coefficient = 1.0
    """Weight of the good answers; with unequal numbers, weight x number should be alike on both sides."""
    undesirable_weight: Coefficient = 1.0
    """Weight of the bad answers."""
    lora_dropout: Annotated[float, Field(ge=0, le=0)] = 0.0
    """0: policy and reference must agree at the first step."""

    @model_validator(mode="after")
    def _batch_mixes(self) -> "KTOSettings":
        if self.batch_size < 2:
            raise ValueError("batch_size: 1, must be at least 2: KTO's z0 pairs each prompt with another row's answer")
        if not (self.desirable_weight or self.undesirable_weight):
            raise ValueError("desirable_weight and undesirable_weight are both 0: nothing would be learnt")
        return self


class ConditionSettings(TrainSettings):
    """Reward conditioning: both answers are learned, each behind a text that says which it is; asked with `good`."""

    method = "condition"

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 2e-4
    """The peak learning rate."""
    good_text: str = "A good answer: "
    """Stands before the answers that won, and before every answer that is asked for later."""
    bad_text: str = "A bad answer: "
    """Stands before the answers that lost."""

    @model_validator(mode="after")
    def _texts_differ(self) -> "ConditionSettings":
        if self.good_text == self.bad_text:
            raise ValueError("good_text and bad_text are the same: nothing would tell the answers apart")
        return self


class CoHSettings(TrainSettings):
    """Chain of hindsight: both answers in one sequence, with words that say which is better."""

    method = "coh"

    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    learning_rate: Rate = 2e-4
    """The peak learning rate."""
    hidden_tokens: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """At most this share of a row's past tokens is hidden from attention, drawn anew each step."""
    pretrain_data: str | None = None
    """Text rows whose likelihood is kept up beside (the paper's regulariser)."""
    pretrain_coefficient: Coefficient = 1.0
    """Its weight."""


OFFLINE: tuple[type[TrainSettings], ...] = (
    SFTSettings,
    RewardSettings,
    DPOSettings,
    KTOSettings,
    ConditionSettings,
    CoHSettings,
)
