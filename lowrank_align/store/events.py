"""The history: one row for each thing that was said, never changed. These work on a connection of the store's."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_align.store import encoding
from lowrank_align.store.records import Event, Judgement, new_id, now

_EVENT = "seq, id, record, annotator, version, kind, judgement, at"


@dataclass(frozen=True)
class Step:
    """An event to be written. `stands`: the version whose state it leaves, its own but for an undo; 0 leaves none."""

    record_id: str
    annotator: str
    version: int
    kind: str
    stands: int
    judgement: Judgement | None
    id: str | None = None
    at: str | None = None


def append(connection: sqlite3.Connection, step: Step) -> None:
    """Write it, with what lists filter by beside the JSON."""
    judgement = step.judgement
    said = () if judgement is None else (judgement.reason, judgement.written or "", *judgement.edits.values())
    row = {
        "id": step.id or new_id(),
        "record": step.record_id,
        "annotator": step.annotator,
        "version": step.version,
        "kind": step.kind,
        "stands": step.stands,
        "verdict": judgement and judgement.verdict,
        "deleted": int(judgement is not None and judgement.deleted),
        "tags": encoding.names(judgement.tags if judgement else ()),
        "searchable": encoding.searchable(*said),
        "judgement": judgement and encoding.to_json(encoding.judgement_fields(judgement)),
        "at": step.at or now(),
    }
    names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
    connection.execute(f"INSERT INTO events ({names}) VALUES ({marks})", row)


def head(connection: sqlite3.Connection, record_id: str, annotator: str) -> tuple[int, int]:
    """The newest version and the one whose state stands; zeros where there is none."""
    query = "SELECT version, stands FROM heads WHERE record = ? AND annotator = ?"
    return connection.execute(query, (record_id, annotator)).fetchone() or (0, 0)


def stood(connection: sqlite3.Connection, event: Event) -> int:
    """The version whose state stood before the event; 0 for none."""
    query = "SELECT stands FROM events WHERE record = ? AND annotator = ? AND version = ?"
    found = connection.execute(query, (event.record_id, event.annotator, event.version - 1)).fetchone()
    return int(found[0]) if found else 0


def known(connection: sqlite3.Connection, event_id: str | None, record_id: str, annotator: str) -> Event | None:
    """The event, if it is there; ValueError where it is one of another record or annotator."""
    found = listed(connection, "id = ?", (event_id,)) if event_id is not None else []
    if found and (found[0].record_id, found[0].annotator) != (record_id, annotator):
        raise ValueError(f"event {event_id} is there already, on another record or of another annotator")
    return found[0] if found else None


def of_version(connection: sqlite3.Connection, record_id: str, annotator: str, version: int) -> Event | None:
    """The event, None for version 0."""
    where = "record = ? AND annotator = ? AND version = ?"
    return next(iter(listed(connection, where, (record_id, annotator, version))), None)


def listed(connection: sqlite3.Connection, where: str = "1", parameters: Sequence[Any] = ()) -> list[Event]:
    """Those of a condition, oldest first."""
    rows = connection.execute(f"SELECT {_EVENT} FROM events WHERE {where} ORDER BY seq", parameters).fetchall()
    return [_event(row) for row in rows]


def _event(row: Sequence[Any]) -> Event:
    seq, event_id, record_id, annotator, version, kind, judgement, at = row
    state = None if judgement is None else encoding.judgement_in(judgement)
    return Event(seq, event_id, record_id, annotator, version, kind, state, at)
