"""Rows of files into the store, and the store as rows of files: every shape, both ways.

A row of the store's own export brings its record, judgement, ids and all else back from its column `record`, unless the
row was changed by hand since: then it is taken as it reads, as a new one. Other rows get an id from their content, so
that the same row is known again.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_align.data.bad_rows import BadRows
from lowrank_align.data.convert import to_columns
from lowrank_align.data.formats import Row, Shape, Text, parse_row
from lowrank_align.data.raw_rows import RawRow
from lowrank_align.data.sources import open_source
from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Entry, Judgement, QueuedPrompt, Record, Store, now
from lowrank_align.store.encoding import clean, content_id, record_fields
from lowrank_align.store.export import COLUMN, Export, entry_of, export_lines, queued_of, rows_of
from lowrank_align.store.rows import KINDS

ANNOTATOR = "import"  # who is said to have judged rows that name nobody
_OWN_COLUMNS = {
    Shape.demonstration: {"messages", "prompt", "completion", "text"},
    Shape.pair: {"prompt", "chosen", "rejected", "preference"},
    Shape.ranking: {"prompt", "completions", "ranks"},
    Shape.unpaired: {"prompt", "completion", "label"},
    Shape.scored: {"prompt", "completion", "score"},
    Shape.prompts: {"prompt"},
}


@dataclass
class Imported:
    """What came of a file's rows."""

    records: int = 0  # new ones
    judgements: int = 0  # new ones, also on records that were there
    prompts: int = 0  # new in the queue
    duplicates: int = 0  # rows whose content is there already
    more_lines: int = 0  # further lines of a record of the same file, as of an edit beside its vote
    changed: int = 0  # rows of an export that were changed since, taken as new
    kept: int = 0  # rows whose record has another judgement here, which was kept
    skipped: int = 0  # bad rows set aside
    conversions: Counter[str] = field(default_factory=Counter)  # rows by what they were read as: "ShareGPT", ...


class _Item(NamedTuple):
    """A row that can be kept; `own` where the store's export brought it back."""

    content: Entry | QueuedPrompt
    own: bool


def import_rows(
    store: Store, source: str | Path, *, annotator: str = ANNOTATOR, skip_bad: Path | None = None
) -> Imported:
    """Puts every row of `source` (see `sources`) into the store; prompts go to the queue. All of it, or nothing.

    Raises `UserError` for a bad row, as `load_rows` does; `skip_bad` is the file that bad rows are set aside in.
    """
    done, bad, found = Imported(), BadRows(skip_bad), list[_Item]()
    for index, raw in enumerate(open_source(source).rows):
        try:
            found.append(_read(raw, index, annotator, done))
        except UserError as error:
            bad.add(raw.where, str(error), raw.text)
    done.skipped = bad.settle(len(found))
    if not found:
        raise UserError(f"{source}: no rows")
    written: set[tuple[str, str]] = set()
    with store.batch():
        for item in found:
            if isinstance(item.content, Entry):
                _keep(store, item.content, item.own, done, written)
        queued = store.enqueue_prompts([i.content for i in found if isinstance(i.content, QueuedPrompt)])
    done.prompts, done.duplicates = queued.added, done.duplicates + queued.duplicates
    return done


def export_rows(store: Store, kind: str, **filters: Any) -> Export:
    """`export_lines`, of which every line is sure to be read again; what is refused is left out and counted."""
    export = export_lines(store, kind, **filters)
    lines, left_out = [], Counter(export.left_out)
    for line in export.lines:
        try:
            parse_row(line, "", 0)
        except UserError as error:
            left_out[f"a line refused{error}"] += 1
        else:
            lines.append(line)
    return Export(lines, dict(left_out))


def _read(raw: RawRow, index: int, annotator: str, done: Imported) -> _Item:
    """The row as an entry or a prompt; UserError where it is bad."""
    if raw.error:
        raise UserError(raw.error)
    row = parse_row(raw.value, raw.where, index, expect=frozenset(Shape))
    own = entry_of(raw.value.get(COLUMN)) or queued_of(raw.value)
    if own is not None:
        if isinstance(own, QueuedPrompt) or _is_of(own, raw.value):
            return _Item(own, True)
        done.changed += 1
    if row.read_as:
        done.conversions[row.read_as] += 1
    columns = {name: value for name, value in to_columns(raw.value).fields.items() if name != COLUMN or own is None}
    try:
        extra = _as_json({name: value for name, value in columns.items() if name not in _OWN_COLUMNS[row.shape]})
    except RecursionError:
        raise UserError(f"{raw.where}: nested too deep") from None
    if row.shape is Shape.prompts:
        source = Path(raw.where.rpartition(":")[0]).name
        return _Item(QueuedPrompt(content_id([row.prompt, extra]), _text(row.prompt), 0, source, extra), False)
    if extra.get("finished") in (True, False):
        del extra["finished"]
    who = str(extra.pop("annotator")) if _is_name(extra.get("annotator")) else annotator
    return _Item(Entry(_record(row, extra), who, _judgement(row), 1, now()), False)


def _record(row: Row, extra: dict[str, Any]) -> Record:
    """Its ids come from what the row says, judgement included, so that the same row is the same record."""
    content = [row.shape, row.prompt, row.completions, row.finished, extra]
    completions = [
        Completion(_text(text), source="imported", finished=row.finished, id=content_id([content, i]))
        for i, text in enumerate(row.completions)
    ]
    said = [row.preference, row.ranks, row.label, row.score]
    return Record(
        kind=_KINDS[row.shape],
        prompt=_text(row.prompt),
        completions=tuple(completions),
        origin="import",
        extra=extra,
        id=content_id([content, said]),
    )


def _text(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _as_json(columns: dict[str, Any]) -> dict[str, Any]:
    """What JSON has no word for, as its text: dates of Parquet files, numbers that are not finite."""
    found: dict[str, Any] = json.loads(json.dumps(columns, default=str), parse_constant=str)
    return found


_KINDS: dict[Shape, Any] = {
    Shape.demonstration: "demonstration",
    Shape.pair: "pair",
    Shape.ranking: "ranking",
    Shape.unpaired: "rating",
    Shape.scored: "scored",
}


def _judgement(row: Row) -> Judgement:
    match row.shape:
        case Shape.pair:
            soft = None if row.preference == 1 else row.preference
            ranks = (1.0, 2.0) if row.preference > 0.5 else (2.0, 1.0) if row.preference < 0.5 else (1.0, 1.0)
            return Judgement("tie" if row.preference == 0.5 else "preferred", ranks=ranks, preference=soft)
        case Shape.ranking:
            return Judgement("ranked", ranks=tuple(row.ranks or ()))
        case Shape.unpaired:
            return Judgement("liked" if row.label else "disliked")
        case Shape.scored:
            return Judgement("scored", score=row.score)
    return Judgement("demonstration")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and clean(value) == value


def _is_of(own: Entry, line: dict[str, Any]) -> bool:
    """Whether a line still is what an export makes of the entry."""
    for kind in KINDS:
        rows = rows_of(own, kind)
        if not isinstance(rows, str) and any(_covers(line, row) for row in rows):
            return True
    return False


def _covers(line: dict[str, Any], row: dict[str, Any]) -> bool:
    """The row's columns are as they were, and none came that would change how it is read."""
    reading = {"preference", "finished", "margin", "tools", "chat_template_kwargs"} & set(line)
    return all(name in line and line[name] == value for name, value in row.items()) and reading <= set(row)


def _keep(store: Store, item: Entry, own: bool, done: Imported, written: set[tuple[str, str]]) -> None:
    """Add what is not there; what is there stays as it is."""
    record = item.record
    key = (record.id, item.annotator)
    if key in written:
        done.more_lines += own
        done.duplicates += not own
        return
    there = store.find(record.id)
    if there is not None and not _same(there, record):
        record = replace(record, id=content_id(record_fields(record)))
        done.changed += 1
        there = store.find(record.id)
    if there is None:
        store.add(record)
        done.records += 1
    standing = store.entry(record.id, item.annotator)
    if standing is None:
        version = len(store.history(record.id, item.annotator))
        store.judge(record.id, item.annotator, item.judgement, expected_version=version, kind="import", at=item.updated)
        done.judgements += 1
        written.add(key)
    elif standing.judgement == item.judgement:
        done.duplicates += 1
    else:
        done.kept += 1


def _same(there: Record, record: Record) -> bool:
    return there == record if record.origin != "import" else replace(there, created=record.created) == record
