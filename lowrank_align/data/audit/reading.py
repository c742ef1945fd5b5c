"""The rows of a file, whatever their shape, with the bad ones and the unread fields beside them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lowrank_align.data.audit.findings import SHOWN, Finding, Tally, counted
from lowrank_align.data.formats import Row, Shape, parse_row
from lowrank_align.data.sources import open_source
from lowrank_align.errors import UserError

# Which shape a row with the fields of several is read as: the one that says most. Commands that want another take it.
RICHEST_FIRST = (Shape.pair, Shape.ranking, Shape.unpaired, Shape.scored, Shape.demonstration)
BESIDE_A_PROMPT = {"prompt", "instruction", "input", "system", "history", "tools", "chat_template_kwargs", "finished"}


@dataclass
class ReadRows:
    """What a source holds."""

    source: str
    rows: list[Row] = field(default_factory=list)
    bad: Tally = field(default_factory=Tally)
    errors: list[str] = field(default_factory=list)  # of the first bad rows, each with its place
    several: Tally = field(default_factory=Tally)  # rows with the fields of several shapes
    unread: Counter[str] = field(default_factory=Counter)  # fields of rows that have but a prompt

    @property
    def shapes(self) -> Counter[Shape]:
        return Counter(row.shape for row in self.rows)

    @property
    def read_as(self) -> Counter[str]:
        """Rows by what they were converted from: "ShareGPT", "Alpaca", "HH"."""
        return Counter(row.read_as for row in self.rows if row.read_as)


def read_rows(source: str) -> ReadRows:
    """Every row of `source` by its fields. Raises `UserError` where the source cannot be read or has no row at all."""
    found = ReadRows(source)
    for index, record in enumerate(open_source(source).rows):
        try:
            if record.error:
                raise UserError(record.error)
            row = _parse(record.value, record.where, index, found)
        except UserError as error:
            found.bad.add(record.where)
            found.errors += [str(error)] if len(found.errors) < SHOWN else []
            continue
        found.rows.append(row)
        if row.shape is Shape.prompts:
            found.unread.update(set(record.value) - BESIDE_A_PROMPT)
    if not found.rows and not found.bad.rows:
        raise UserError(f"{source}: no rows")
    return found


def reading_findings(read: ReadRows) -> list[Finding]:
    """Bad rows, and rows that some commands would read otherwise."""
    found = []
    if read.bad.rows:
        what = f"{counted(read.bad.rows, 'row')} cannot be used"
        advice = "mend them, or let --skip-bad set them aside in the run's folder"
        found.append(read.bad.finding("error", "bad-rows", what, advice, details=read.errors, stops=True))
    if len(read.shapes) > 1:
        shapes = ", ".join(f"{count:,} {shape}" for shape, count in read.shapes.most_common())
        advice = "a method takes the shapes that it is made for and stops at the others: give each a file of its own"
        found.append(Finding("warning", "mixed-shapes", f"rows of several shapes: {shapes}", advice=advice))
    if read.several.rows:
        taken = Counter(row.shape for row in read.rows).most_common(1)[0][0]
        what = f"{counted(read.several.rows, 'row')} with the fields of several shapes, read here as {taken}"
        found.append(
            read.several.finding("note", "several-shapes", what, "a method reads them as the one that it wants")
        )
    if read.unread:
        fields = ", ".join(name for name, _ in read.unread.most_common(8))
        what = f"rows of a prompt alone, with fields that nothing reads: {fields}"
        found.append(
            Finding(
                "note",
                "unread-fields",
                what,
                read.shapes[Shape.prompts],
                advice="an answer is a field named completion",
            )
        )
    return found


def _parse(value: Any, where: str, index: int, found: ReadRows) -> Row:
    try:
        return parse_row(value, where, index)
    except UserError:
        for shape in RICHEST_FIRST:
            try:
                row = parse_row(value, where, index, expect={shape})
            except UserError:
                continue
            found.several.add(where)
            return row
        raise
