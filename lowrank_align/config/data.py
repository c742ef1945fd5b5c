"""The knobs of `data`: what goes into the store of judgements, what comes out, and what it says of itself."""

from typing import Annotated, Literal

from pydantic import Field

from lowrank_align.config.knobs import Coefficient, Settings


class DataSettings(Settings):
    """What is done with a store."""

    store: str
    """The store's file (SQLite)."""


class DataImportSettings(DataSettings):
    """Put the rows of a file into a store: judgements, demonstrations, prompts for the queue. It is made if need be."""

    file: str
    """Rows of any shape: a .jsonl, .json, .parquet (or gzipped) file, a folder of them, or a hub data set id."""
    annotator: str = "import"
    """Who judged the rows that name nobody in a column `annotator`."""
    skip_bad: bool = False
    """Set bad rows aside in FILE.bad.jsonl in the current folder, instead of stopping at the first."""


class DataExportSettings(DataSettings):
    """Write a store's judgements as rows to train on; what is left out is counted."""

    kind: Literal["pairs", "rankings", "unpaired", "demonstrations", "scored", "prompts"]
    """pairs, rankings, unpaired, demonstrations, scored or prompts."""
    out: str
    """The .jsonl file to write. It must not exist, unless with --overwrite."""
    annotator: str | None = None
    """Only what this one judged."""
    overwrite: bool = False
    """Replace OUT."""


class DataStatsSettings(DataSettings):
    """How many judgements there are, how fast they came, and whether sides, length or mood decide them."""

    annotator: str | None = None
    """Only what this one judged."""
    as_json: bool = False
    """Print them as one JSON object."""


class DataConvertSettings(Settings):
    """Turn rows of one shape into rows of another: scores into pairs, pairs into labels, and so on, within prompts."""

    file: str
    """Scored, ranked or unpaired rows, or pairs: a .jsonl, .json, .parquet (or gzipped) file, a folder, a hub id."""
    to: Literal["pairs", "rankings", "unpaired", "demonstrations"]
    """pairs, rankings, unpaired or demonstrations."""
    out: str
    """The .jsonl file to write. It must not exist, unless with --overwrite."""
    pairing: Literal["best-worst", "all"] = "best-worst"
    """Which pairs a prompt's answers make: the best against the worst, or every one against every other."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Answers above it are good, below it bad, at it neither: a score (a rank: the other way round). Makes the labels
    of unpaired rows, and of demonstrations all good ones instead of the best of each prompt. Of pairs: 0.5 of wins."""
    min_difference: Coefficient = 0.0
    """Pairs whose scores (or ranks) are nearer than this are left out."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs of equal answers: leave them out, or keep them with the preference 0.5."""
    skip_bad: bool = False
    """Set bad rows aside in FILE.bad.jsonl in the current folder, instead of stopping at the first."""
    overwrite: bool = False
    """Replace OUT."""


class DataBackupSettings(DataSettings):
    """Copy a store into another file, whole and checked; also while a studio has it open."""

    out: str
    """The file to write. It must not exist: a backup replaces nothing."""


DATA_COMMANDS: dict[str, type[Settings]] = {
    "import": DataImportSettings,
    "export": DataExportSettings,
    "stats": DataStatsSettings,
    "convert": DataConvertSettings,
    "backup": DataBackupSettings,
}
