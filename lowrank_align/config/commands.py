"""The knobs of the commands that do not train."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lowrank_align.config.evaluation import EvalSettings
from lowrank_align.config.knobs import Coefficient, ModelSettings, Positive, Settings
from lowrank_align.config.loops import FrontierSettings, RoundsSettings


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
    best_of: Annotated[int, Field(ge=2)] | None = None
    """Draw so many completions per prompt and keep the one that --reward scores highest."""
    reward: list[str] | None = None
    """For --best-of: reward runs, or module:function(prompts, completions) -> scores, in the current folder too."""
    reward_weights: list[float] | None = None
    """A weight for each reward, in the same order; without it, 1 each."""

    @field_validator("reward", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _best_by_a_reward(self) -> "GenerateSettings":
        if bool(self.best_of) != bool(self.reward):
            raise ValueError("best_of and reward go together: N completions are drawn, the highest score is kept")
        if self.best_of and self.completions > 1:
            raise ValueError("best_of and completions exclude each other: of best_of's completions one is kept")
        if self.best_of and self.temperature == 0:
            raise ValueError("best_of: at temperature 0 all completions are the same; raise temperature")
        if len(self.reward_weights or self.reward or []) != len(self.reward or []):
            raise ValueError(f"reward_weights: {len(self.reward_weights or [])} for {len(self.reward or [])} rewards")
        return self


class ReadingSettings(Settings):
    """What is done with rows and a tokenizer alone."""

    model: str
    """A model folder, a hub id, or `tiny`; only its tokenizer is loaded. A preset names one."""
    preset: str | None = None
    """Settings that are known to work for a model, by name or as a .yaml file (`lowrank-align presets` lists them)."""
    data: str
    """Rows: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    chat_template: str | None = None
    """A .jinja file, or the name of one of the tokenizer's templates, in place of the model's own."""
    thinking: bool | None = None
    """Let the model think before it answers, where its chat template has a switch; else as preset or template say."""
    train_on: Literal["all", "last"] = "all"
    """In conversations, train on every assistant turn or on the last one alone."""
    max_length: Positive = 1024
    """Longest prompt + completion in tokens (at most the model's context)."""


class ShowSettings(ReadingSettings):
    """Rows as a model will see them, the trained tokens marked."""

    rows: Positive = 3
    """How many rows."""


class AuditSettings(ReadingSettings):
    """Whether rows will train what they are meant to train: lengths, ends, templates, duplicates, leakage."""

    eval_data: str | None = None
    """Held-out rows; training rows among them are reported."""
    as_json: bool = False
    """Print the report as one JSON object."""


class PresetsSettings(Settings):
    """List the presets, or show one."""

    name: str | None = None
    """The one to show, by name or as a .yaml file."""
    as_json: bool = False
    """Print it as JSON."""


# every method of `config.methods`, and chat
Planned = Literal[
    "sft", "reward", "dpo", "kto", "condition", "coh", "ppo", "grpo", "rloo", "online-dpo", "expert", "quark", "chat"
]


class PlanSettings(Settings):
    """Whether training or chatting fits into a GPU's memory, and which settings would."""

    model: str
    """A model folder, a hub id, or `tiny`; only its config.json is read. A preset needs no file at all."""
    preset: str | None = None
    """Settings that are known to work for a model, by name or as a .yaml file (`lowrank-align presets` lists them)."""
    method: Planned = "sft"
    """What is to be run."""
    gpu: str | None = None
    """The memory to fit into, as 12GiB; without it, what this machine's GPU has, or the table alone."""
    quantize: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen weights are kept."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What is computed in."""
    max_length: Positive | None = None
    """Longest prompt + completion in tokens."""
    micro_batch_size: Positive | None = None
    """Rows that are in memory at once."""
    max_new_tokens: Positive | None = None
    """The longest rollout or answer in tokens."""
    rollout_batch_size: Positive | None = None
    """Rollouts that are drawn at once."""
    completions: Positive | None = None
    """Completions per prompt (a group's rollouts, a ranking's length)."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] | None = None
    """8-bit states take a quarter of the memory."""
    rank: Positive | None = None
    """LoRA's rank."""
    target_modules: list[str] | None = None
    """The linear layers that get an adapter, by name; without it, all of the decoder's."""
    lora_layers: Positive | None = None
    """Adapters on the top so many layers alone."""
    as_json: bool = False
    """Print the plan as one JSON object."""


class ExportSettings(Settings):
    """What was trained, for other programs, with a proof that it is the same: merged, adapter, Ollama, GGUF."""

    adapter: str
    """The run (or PEFT adapter folder) to export."""
    model: str | None = None
    """Its base: a model folder, a hub id, or `tiny`; without it, the one that the run names."""
    preset: str | None = None
    """The model's preset, whose template and end tokens are checked."""
    chat_template: str | None = None
    """A .jinja file, or the name of one of the tokenizer's templates; without it, the one that the run trained with."""
    thinking: bool | None = None
    """Let the model think before it answers, where its chat template has a switch; else as the run was trained."""
    to: Literal["merged", "adapter", "gguf", "ollama"] = "merged"
    """A model folder, PEFT's layout with the tokenizer, llama.cpp's file, or a model folder with a Modelfile."""
    out: str
    """The folder to write. It must not exist, unless with --overwrite."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The precision of the merged weights; auto: the base's own."""
    as_trained: bool = False
    """Merge into the dequantised 4-bit weights, those that the adapter was trained on, instead of the 16-bit ones."""
    device: str = "auto"
    """auto (first GPU, else CPU), cpu, cuda, cuda:N, xpu or mps."""
    overwrite: bool = False
    """Replace OUT, where it is an older export."""


class ChatSettings(ModelSettings):
    """Talk with a model and its adapters in the terminal."""

    system: str | None = None
    """The system prompt."""
    temperature: Coefficient = 0.7
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    max_new_tokens: Positive = 512
    """The longest answer in tokens."""
    max_length: Positive = 4096
    """Conversation and answer together in tokens (at most the model's context); the oldest turns are left out first."""


class StudioSettings(ModelSettings):
    """The local page: collect pairs, chat, train, compare."""

    model: str = "tiny"
    """The base: a model folder, a hub id, or `tiny`. A preset names one."""
    adapter: list[str] | None = None  # type: ignore[assignment]
    """Runs (or PEFT adapter folders) to offer beside those in RUNS."""
    store: str = "studio.db"
    """The SQLite file of everything that is judged; made where it is not there."""
    backups: Annotated[int, Field(ge=0)] = 7
    """How many dated copies of the store stay beside it; 0 makes none."""
    backup_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 24.0
    """The studio makes one when it starts and the newest is older than this."""
    runs: str = "runs"
    """The folder of the runs that are offered, and where Train puts new ones."""
    annotator: str = "me"
    """Who labels, unless the page says another name."""
    host: str = "127.0.0.1"
    """The address to listen on. Another than this machine's own also needs --allow-host and a password."""
    allow_host: list[str] | None = None
    """Names or addresses under which browsers may reach the page; behind a TLS proxy, NAME:443."""
    port: Annotated[int, Field(ge=1, le=65535)] = 7860
    """The port to listen on."""
    browser: bool = True
    """Open the page in the browser."""
    temperature: Coefficient = 0.8
    """At which answers are drawn to begin with; the page can change it."""
    max_new_tokens: Positive = 256
    """The longest answer in tokens to begin with."""
    max_length: Positive = 4096
    """Prompt and answer together in tokens (at most the model's context)."""


class DoctorSettings(Settings):
    """Whether this machine can do what the toolkit does, and what to do where it cannot."""

    as_json: bool = False
    """Print the findings as one JSON object."""


COMMANDS: dict[str, type[Settings]] = {
    "presets": PresetsSettings,
    "plan": PlanSettings,
    "audit": AuditSettings,
    "show": ShowSettings,
    "generate": GenerateSettings,
    "chat": ChatSettings,
    "eval": EvalSettings,
    "score": ScoreSettings,
    "logps": LogpsSettings,
    "export": ExportSettings,
    "studio": StudioSettings,
    "frontier": FrontierSettings,
    "rounds": RoundsSettings,
    "doctor": DoctorSettings,
}
