"""The queue: prompts in their order. Which of them wait is derived from what stands, so a restart loses nothing."""

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_align.store.encoding import clean, content_id, to_json, value_in
from lowrank_align.store.records import TRAINERS_OWN, Enqueued, QueuedPrompt, new_id, now

_PROMPT = "p.id, p.body, p.seq, p.source, p.extra"
_WAITS = """p.id NOT IN (SELECT r.queue_id FROM records AS r CROSS JOIN standing AS e ON e.record = r.id
    WHERE r.queue_id IS NOT NULL AND e.annotator = ?)"""  # CROSS JOIN: records first, by their index


def enqueue(connection: sqlite3.Connection, found: Iterable[QueuedPrompt]) -> Enqueued:
    """Within a transaction: add those whose content is new."""
    added = duplicates = 0
    for item in found:
        content = content_id([item.prompt, {name: item.extra[name] for name in TRAINERS_OWN if name in item.extra}])
        if connection.execute("SELECT 1 FROM prompts WHERE content = ?", (content,)).fetchone():
            duplicates += 1
            continue
        taken = connection.execute("SELECT 1 FROM prompts WHERE id = ?", (item.id,)).fetchone()
        row = (new_id() if taken else item.id, content, clean(item.source), to_json(item.prompt), to_json(item.extra))
        names = "id, content, source, body, extra, at"
        connection.execute(f"INSERT INTO prompts ({names}) VALUES (?, ?, ?, ?, ?, ?)", (*row, now()))
        added += 1
    return Enqueued(added, duplicates)


def waiting(connection: sqlite3.Connection, annotator: str, limit: int, without: Sequence[str]) -> list[QueuedPrompt]:
    """The first `limit` that wait for the annotator, but for the ids in `without`."""
    query = f"""SELECT {_PROMPT} FROM prompts AS p WHERE {_WAITS}
        AND p.id NOT IN (SELECT value FROM json_each(?)) ORDER BY p.seq LIMIT ?"""
    return [_queued(row) for row in connection.execute(query, (annotator, to_json(list(without)), limit)).fetchall()]


def left(connection: sqlite3.Connection, annotator: str) -> int:
    """How many wait for the annotator."""
    (count,) = connection.execute(f"SELECT count(*) FROM prompts AS p WHERE {_WAITS}", (annotator,)).fetchone()
    return int(count)


def every(connection: sqlite3.Connection) -> list[QueuedPrompt]:
    """All of them, in order."""
    return [_queued(row) for row in connection.execute(f"SELECT {_PROMPT} FROM prompts AS p ORDER BY p.seq").fetchall()]


def _queued(row: Sequence[Any]) -> QueuedPrompt:
    prompt_id, body, position, source, extra = row
    return QueuedPrompt(prompt_id, value_in(body), position, source, value_in(extra))
