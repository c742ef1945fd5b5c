"""What can be read from a store, from any thread, also while others write."""

from collections.abc import Callable, Sequence
from typing import Any

from lowrank_align.errors import UserError
from lowrank_align.store import encoding, events, prompts
from lowrank_align.store.connections import Connections
from lowrank_align.store.filters import JOINED, Filters
from lowrank_align.store.records import Entry, Event, QueuedPrompt, Record

_ENTRY = "r.body, e.annotator, e.judgement, e.version, e.at"
_DECISIONS = ("vote", "edit")  # what `recent` lists


class Reading:
    """The reading half of `Store`."""

    _file: Connections

    def record(self, record_id: str) -> Record:
        """UserError where there is none of that id."""
        record = self.find(record_id)
        if record is None:
            raise UserError(f"{self._file.path}: no record {record_id}")
        return record

    def find(self, record_id: str) -> Record | None:
        """The record, or None."""
        found = self._rows("SELECT body FROM records WHERE id = ?", (record_id,), _record)
        return found[0] if found else None

    def entry(self, record_id: str, annotator: str) -> Entry | None:
        """What stands, deleted or not; None where the annotator has said nothing or taken it all back."""
        query = f"SELECT {_ENTRY} {JOINED} WHERE r.id = ? AND e.annotator = ?"
        found = self._rows(query, (record_id, annotator), _entry)
        return found[0] if found else None

    def history(self, record_id: str, annotator: str) -> list[Event]:
        """Everything that happened, oldest first."""
        where = "record = ? AND annotator = ?"
        with self._file.reading() as connection:
            return events.listed(connection, where, (record_id, annotator))

    def entries(
        self, *, limit: int | None = None, offset: int = 0, newest_first: bool = True, **filters: Any
    ) -> list[Entry]:
        """What stands, in the order in which the records came, filtered as `Filters` says: by annotator, kinds,
        verdicts, tag, source, text, origin, deleted (False: without the deleted, True: those alone, None: all)."""
        where, parameters = Filters(**filters).where()
        way = "DESC" if newest_first else "ASC"
        query = f"SELECT {_ENTRY} {JOINED} WHERE {where} ORDER BY r.seq {way}, e.annotator LIMIT ? OFFSET ?"
        return self._rows(query, (*parameters, -1 if limit is None else limit, offset), _entry)

    def count(self, **filters: Any) -> int:
        """How many entries there are of those."""
        where, parameters = Filters(**filters).where()
        return int(self._rows(f"SELECT count(*) {JOINED} WHERE {where}", parameters)[0][0])

    def recent(
        self,
        annotator: str,
        limit: int = 10,
        *,
        kinds: Sequence[str] = (),
        origins: Sequence[str] = (),
        events: Sequence[str] = _DECISIONS,
    ) -> list[Entry]:
        """The newest decisions that `undo` would take back, newest first; not what was undone, deleted or imported.

        `kinds` and `origins` of the records, and the `events` (vote, edit) by which what stands was made.
        """
        among = [("made.kind", events), ("r.kind", kinds), ("r.origin", origins)]
        more = " AND ".join(f"{name} IN ({', '.join('?' * len(values))})" for name, values in among if values)
        query = f"""SELECT {_ENTRY} FROM events AS made CROSS JOIN standing AS e
            ON e.record = made.record AND e.annotator = made.annotator AND e.stands = made.version
            JOIN records AS r ON r.id = e.record
            WHERE made.annotator = ? AND {more} AND NOT e.deleted ORDER BY made.seq DESC LIMIT ?"""
        return self._rows(query, (annotator, *events, *kinds, *origins, limit), _entry)

    def annotators(self) -> list[str]:
        """Everybody who has ever judged something here, by name."""
        return [name for (name,) in self._rows("SELECT DISTINCT annotator FROM events ORDER BY annotator")]

    def tags(self) -> list[str]:
        """The tags in use, by name."""
        query = "SELECT DISTINCT t.value FROM standing AS e, json_each(e.tags) AS t WHERE NOT e.deleted ORDER BY 1"
        return [tag for (tag,) in self._rows(query)]

    def decisions(self) -> list[tuple[str, str]]:
        """(annotator, time) of every vote and edit, undone or not, oldest first."""
        query = f"SELECT annotator, at FROM events WHERE kind IN {_DECISIONS} ORDER BY seq"
        return self._rows(query, (), lambda row: (row[0], encoding.time_in(row[1])))

    def all_records(self) -> list[Record]:
        """Every record, judged or not, oldest first."""
        return self._rows("SELECT body FROM records ORDER BY seq", (), _record)

    def undone(self, annotator: str | None = None) -> int:
        """How many judgements were taken back and not made again."""
        query = "SELECT count(*) FROM heads WHERE stands = 0 AND annotator = coalesce(?, annotator)"
        return int(self._rows(query, (annotator,))[0][0])

    def unjudged(self) -> int:
        """How many records nobody has ever judged."""
        query = "SELECT count(*) FROM records AS r WHERE NOT EXISTS (SELECT 1 FROM events WHERE record = r.id)"
        return int(self._rows(query)[0][0])

    def pulse(self) -> int:
        """Grows with every record, judgement and queued prompt, by whatever process; cheap. Notes do not count."""
        tables = " + ".join(f"coalesce((SELECT max(seq) FROM {name}), 0)" for name in ("records", "events", "prompts"))
        return int(self._rows(f"SELECT {tables}")[0][0])

    def queue(self, annotator: str, *, limit: int, without: Sequence[str] = ()) -> list[QueuedPrompt]:
        """The first prompts on which the annotator has no standing judgement, in order; `without` those ids."""
        with self._file.reading() as connection:
            return prompts.waiting(connection, annotator, limit, without)

    def queue_left(self, annotator: str) -> int:
        """How many prompts wait for the annotator. One whose entry was deleted is done with; an undone one waits."""
        with self._file.reading() as connection:
            return prompts.left(connection, annotator)

    def queue_total(self) -> int:
        """How many prompts were ever put into the queue."""
        return int(self._rows("SELECT count(*) FROM prompts")[0][0])

    def queued(self) -> list[QueuedPrompt]:
        """The whole queue, done or not, in order."""
        with self._file.reading() as connection:
            return prompts.every(connection)

    def noted(self, key: str, default: Any = None) -> Any:
        """The key's value."""
        found = self._rows("SELECT value FROM notes WHERE key = ?", (key,), lambda row: encoding.value_in(row[0]))
        return found[0] if found else default

    def _rows(
        self, query: str, parameters: Sequence[Any] = (), made: Callable[[Any], Any] = lambda row: row
    ) -> list[Any]:
        """Each row as `made` makes it; what it finds damaged is told like other damage."""
        with self._file.reading() as connection:
            rows = connection.execute(query, parameters).fetchall()
            return [made(row) for row in rows]


def _record(row: Sequence[Any]) -> Record:
    return encoding.record_in(row[0])


def _entry(row: Sequence[Any]) -> Entry:
    body, annotator, judgement, version, at = row
    return Entry(encoding.record_in(body), annotator, encoding.judgement_in(judgement), version, at)
