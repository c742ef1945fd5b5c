"""What is to be in memory at once: a method's rows, adapters and settings, as far as memory is concerned."""

from dataclasses import dataclass
from typing import Literal

from lowrank_align.config import METHODS, OnlineSettings, TrainSettings


def trains(method: str) -> bool:
    """Whether it has gradients and an optimiser; `chat` has not."""
    return method in METHODS


def rolls_out(method: str) -> bool:
    """Whether it samples answers."""
    return method == "chat" or issubclass(METHODS[method], OnlineSettings)


def speaks(method: str) -> bool:
    """Whether completion tokens go through the language model's head in training."""
    return method in METHODS and METHODS[method].speaks


@dataclass(frozen=True)
class Workload:
    """What is to be run, as far as memory is concerned."""

    method: str
    quantize: str = "nf4"
    dtype: str = "bf16"
    device: Literal["gpu", "cpu"] = "gpu"
    rank: int = 16
    target_modules: tuple[str, ...] = ()  # by name; none: every linear layer
    micro_batch_size: int = 2
    prompt_tokens: int = 512  # of the longest row
    completion_tokens: int = 512  # of each of its completions
    completions: int = 1  # a row's: 1 a demonstration or rollout, 2 a pair, a group's rollouts
    group_size: int = 1  # rollouts of a prompt, which share its prefill
    max_new_tokens: int = 0
    rollout_batch_size: int = 1
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    adapters: int = 1  # all that lie in memory, frozen ones too
    trained_adapters: int = 1
    layout: Literal["tree", "flat"] = "tree"
    samples_elsewhere: bool = False  # a server draws the rollouts
    max_length: int = 0  # what rows are cut to; 0: the longest row as it is
    lora_layers: int | None = None  # adapters on the top so many layers; None: on all

    def __post_init__(self) -> None:
        if not self.max_length:
            object.__setattr__(self, "max_length", self.prompt_tokens + self.completion_tokens)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        if self.layout == "flat":
            return self.micro_batch_size * self.completions * (self.prompt_tokens + self.completion_tokens)
        return self.micro_batch_size * (self.prompt_tokens + self.completions * self.completion_tokens)

    @property
    def row_tokens(self) -> int:
        """The length of one row of the batch, whose square the attention mask has."""
        return self.tokens // (self.micro_batch_size * (self.completions if self.layout == "flat" else 1))

    @property
    def scored_tokens(self) -> int:
        return self.micro_batch_size * self.completions * self.completion_tokens


def work_of(
    settings: TrainSettings,
    *,
    device: Literal["gpu", "cpu"],
    dtype: str,
    prompt_tokens: int,
    completion_tokens: int,
    completions: int = 1,
    layout: Literal["tree", "flat"] = "tree",
) -> Workload:
    """What a run with these settings has in memory, the longest row having so many tokens."""
    judges = len(settings.reward_runs) if isinstance(settings, OnlineSettings) else 0
    has_reference = settings.needs_reference and settings.adapter is not None
    trained, group_size = settings.trained_adapters, getattr(settings, "group_size", 1)
    return Workload(
        method=settings.method,
        quantize=settings.quantize,
        dtype=dtype,
        device=device,
        rank=settings.rank,
        target_modules=tuple(name.rsplit(".", 1)[-1] for name in settings.target_modules or ()),
        lora_layers=settings.lora_layers,
        micro_batch_size=settings.micro_batch_size,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        completions=completions,
        max_new_tokens=getattr(settings, "max_new_tokens", 0),
        group_size=group_size,
        rollout_batch_size=min(getattr(settings, "rollout_batch_size", 1), settings.batch_size * group_size),
        gradient_checkpointing=settings.gradient_checkpointing,
        optimizer=settings.optimizer,
        adapters=trained + has_reference + judges,
        trained_adapters=trained,
        layout=layout,
        samples_elsewhere=getattr(settings, "rollout_server", None) is not None,
    )
