"""What people have judged, in one SQLite file: answers, votes, their history, and the queue of prompts.

`records` are the values, `schema` the tables, `connections` how they are opened and written, `store` the operations,
`backup` the copies, `export` the rows that trainers take, `stats` what the judgements say of themselves. No torch here.
"""

from lowrank_align.store.records import (
    Completion,
    Enqueued,
    Entry,
    Event,
    Judgement,
    Kind,
    QueuedPrompt,
    Record,
    Stale,
    Text,
    Verdict,
    new_id,
    now,
)
from lowrank_align.store.store import Store

__all__ = [
    "Completion",
    "Enqueued",
    "Entry",
    "Event",
    "Judgement",
    "Kind",
    "QueuedPrompt",
    "Record",
    "Stale",
    "Store",
    "Text",
    "Verdict",
    "new_id",
    "now",
]
