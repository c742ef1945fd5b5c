"""The store's content as rows for trainers. The column `record`, which they ignore, brings everything back."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from lowrank_align.errors import UserError, nearest
from lowrank_align.store import rows
from lowrank_align.store.encoding import (
    canonical,
    clean,
    judgement_fields,
    judgement_of,
    record_fields,
    record_of,
    to_json,
)
from lowrank_align.store.records import TRAINERS_OWN, Entry, Judgement, QueuedPrompt, Record, Text, is_id
from lowrank_align.store.store import Store

COLUMN = "record"
EXPORTS = (*rows.KINDS, "prompts")
DELETED, UNDONE, UNJUDGED = "deleted", "taken back", "not judged yet"
REPEATED = "shown again, to measure consistency"
TEXT_ALONE = "a text without a prompt"
_ENTRYS_OWN = ("annotator", "version", "updated", "judgement")
_RECORDS, _JUDGEMENTS = TypeAdapter(Record), TypeAdapter(Judgement)


@dataclass(frozen=True)
class Export:
    """Rows in the order in which their records came, and entries that have none, counted by why."""

    lines: list[dict[str, Any]]
    left_out: dict[str, int] = field(default_factory=dict)


def export_lines(store: Store, kind: str, **filters: Any) -> Export:
    """Rows of one kind (see `EXPORTS`), of what stands and passes the filters (those of `Store.entries`).

    Repeats, and what was skipped, deleted or taken back, are left out. UserError for another kind.
    """
    if kind not in EXPORTS:
        raise UserError(
            f"{kind}: nothing that can be exported{nearest(kind, EXPORTS)} (there are: {', '.join(EXPORTS)})"
        )
    if kind == "prompts":
        return _prompts(store, filters)
    lines, left_out = [], Counter[str]()
    for entry in store.entries(newest_first=False, **({"deleted": None} | filters)):
        found = REPEATED if entry.record.repeat_of else DELETED if entry.judgement.deleted else rows_of(entry, kind)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            column = entry_fields(entry)
            lines += [{**row, COLUMN: column} for row in found]
    if not set(filters) - {"annotator"}:
        left_out[UNDONE] += store.undone(**filters)
    if not filters:
        left_out[UNJUDGED] += store.unjudged()
    return Export(lines, {reason: count for reason, count in left_out.most_common() if count})


def rows_of(entry: Entry, kind: str) -> rows.Found:
    """One entry's rows of a kind, without `record`; or why there are none."""
    return rows.SKIPPED if entry.judgement.verdict == "skip" else rows.KINDS[kind](rows.Answers(entry))


def entry_fields(entry: Entry) -> dict[str, Any]:
    """What the column `record` holds."""
    own = {"annotator": entry.annotator, "version": entry.version, "updated": entry.updated}
    return {**record_fields(entry.record), **own, "judgement": judgement_fields(entry.judgement)}


def entry_of(column: Any) -> Entry | None:
    """The entry in a column `record`, None where it holds something else or was damaged."""
    try:
        values = {name: value for name, value in column.items() if name not in _ENTRYS_OWN}
        _RECORDS.validate_python(values)  # its types; what it makes of them lets unknown fields pass
        _JUDGEMENTS.validate_python(column["judgement"])
        to_json(column)  # no number that is not finite
        record, judgement, who = record_of(values), judgement_of(column["judgement"]), column["annotator"]
        judgement.fits(record)
        if not who.strip() or clean(who) != who:
            return None
        return Entry(record, who, judgement, int(column["version"]), clean(column["updated"]))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None


def queued_of(line: dict[str, Any]) -> QueuedPrompt | None:
    """The queue's prompt in a line of the export of prompts, None where it holds none or was changed."""
    try:
        queued = line[COLUMN]["queued"]
        to_json(queued)
        if not is_id(queued["id"]):
            return None
        return QueuedPrompt(queued["id"], line["prompt"], 0, str(queued["source"]), dict(queued["extra"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _prompts(store: Store, filters: dict[str, Any]) -> Export:
    """The queue and then the prompts of all records, each once; with filters those of the entries alone."""
    found: dict[str, dict[str, Any]] = {}
    left_out = Counter[str]()
    for item in store.queued() if not filters else ():
        column = {"queued": {"id": item.id, "source": item.source, "extra": item.extra}}
        line = {"prompt": item.prompt, **_for_trainers(item.extra)}
        found.setdefault(canonical(line), {**line, COLUMN: column})
    records = [e.record for e in store.entries(newest_first=False, **filters)] if filters else store.all_records()
    for record in records:
        prompt = _prompt_of(record)
        if not prompt:
            left_out[TEXT_ALONE] += 1
            continue
        line = {"prompt": prompt, **_for_trainers(record.extra)}
        found.setdefault(canonical(line), line)
    return Export(list(found.values()), dict(left_out))


def _prompt_of(record: Record) -> Text:
    """A demonstration that is one conversation has its prompt before the last answer."""
    if record.prompt or isinstance(record.completions[0].content, str):
        return record.prompt
    messages = list(record.completions[0].content)
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    return messages


def _for_trainers(extra: dict[str, Any]) -> dict[str, Any]:
    return {name: extra[name] for name in TRAINERS_OWN if name in extra}
