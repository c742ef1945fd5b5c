"""The knobs of `data`: what goes into the store of judgements, what comes out, and what it says of itself."""

from typing import Literal

from lowrank_align.config.knobs import Settings


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


DATA_COMMANDS: dict[str, type[Settings]] = {
    "import": DataImportSettings,
    "export": DataExportSettings,
    "stats": DataStatsSettings,
}
