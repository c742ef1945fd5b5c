"""The knobs of the commands that do not train."""

from typing import Annotated, Literal

from pydantic import Field

from lowrank_align.config.knobs import Coefficient, ModelSettings, Positive, Settings


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
