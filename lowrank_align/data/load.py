"""The checked rows of a file, a folder or a hub dataset."""

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from lowrank_align.data.bad_rows import BadRows
from lowrank_align.data.formats import Row, Shape, parse_row
from lowrank_align.data.large import LargeFile, check_file, is_large
from lowrank_align.data.raw_rows import RawRow
from lowrank_align.data.sources import open_source
from lowrank_align.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """Good rows in their order, and what there is to tell about the others."""

    rows: list[Row]
    conversions: Counter[str]  # rows by what they were read as: "ShareGPT", "Alpaca", "HH"
    skipped: int  # bad rows set aside
    sha256: str  # of the bytes of the source; a hub dataset's fingerprint


def load_rows(
    source: str | Path,
    *,
    expect: Collection[Shape],
    skip_bad: Path | None = None,
    split: str = "train",
    segments: bool = False,
) -> Loaded:
    """Reads and checks every row of `source` (see `sources`) as one of the shapes in `expect` (see `formats`, also for
    `segments`).

    A bad row is an error that names the first and counts the others. With `skip_bad` they are written to that file
    instead (it is made anew, so give each source its own), and `UserError` is raised only where no good row remains.
    """
    raw = open_source(source, split)
    bad, rows, parse = BadRows(skip_bad), [], _parser(source, expect, segments)
    for index, record in enumerate(raw.rows):
        try:
            rows.append(parse(record, index))
        except UserError as error:
            bad.add(record.where, str(error), record.text)
    skipped = bad.settle(len(rows))
    if not rows:
        raise UserError(f"{source}: no rows")
    return Loaded(rows, Counter(row.read_as for row in rows if row.read_as), skipped, raw.sha256)


@dataclass(frozen=True)
class LoadedLarge:
    """As `Loaded`, of a file whose rows are read again when they are needed."""

    rows: LargeFile
    conversions: Counter[str]
    skipped: int
    sha256: str


def load_rows_of_any_size(
    source: str | Path, *, expect: Collection[Shape], skip_bad: Path | None = None, segments: bool = False
) -> Loaded | LoadedLarge:
    """`load_rows`, but of a large file of JSON Lines (`large.LARGE_BYTES`) the rows are checked and not kept."""
    path = Path(source).expanduser()
    if not is_large(path):
        return load_rows(source, expect=expect, skip_bad=skip_bad, segments=segments)
    bad = BadRows(skip_bad)
    rows, conversions, sha256 = check_file(path, _parser(source, expect, segments), bad)
    skipped = bad.settle(len(rows))
    if not rows:
        raise UserError(f"{source}: no rows")
    return LoadedLarge(rows, conversions, skipped, sha256)


def _parser(source: str | Path, expect: Collection[Shape], segments: bool) -> Callable[[RawRow, int], Row]:
    def parse(record: RawRow, index: int) -> Row:
        if record.error:
            raise UserError(record.error)
        return parse_row(record.value, record.where, index, expect=expect, segments=segments, source=str(source))

    return parse


def split_off(rows: list[Row], eval_rows: int, seed: int) -> tuple[list[Row], list[Row]]:
    """`(train, eval)`: `eval_rows` rows drawn by `seed` and the rest, both in their old order."""
    drawn = drawn_places(len(rows), eval_rows, seed)
    return [r for i, r in enumerate(rows) if i not in drawn], [r for i, r in enumerate(rows) if i in drawn]


def drawn_places(count: int, eval_rows: int, seed: int) -> set[int]:
    """The places of `eval_rows` of `count` rows."""
    if not 0 < eval_rows < count:
        raise UserError(f"eval_rows: {eval_rows} of {count} rows, must be at least 1 and leave some to train on")
    return set(random.Random(seed).sample(range(count), eval_rows))
