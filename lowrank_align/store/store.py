"""The store: what can be written. Any thread may call its methods, and several processes may share its file."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lowrank_align.errors import UserError
from lowrank_align.store import backup, encoding, events, prompts
from lowrank_align.store.connections import Connections
from lowrank_align.store.reading import Reading
from lowrank_align.store.records import (
    Enqueued,
    Judgement,
    QueuedPrompt,
    Record,
    Stale,
    Text,
    new_id,
    now,
)


class Store(Reading):
    """Records, judgements and the queue of prompts in one SQLite file. See `records` for what they are."""

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        """Opens the file, makes it where there is none (with `create`), and brings an older schema up to date.

        UserError for another program's file, a damaged one, or one of a newer version.
        """
        self.path = Path(path).expanduser()
        self._file = Connections(self.path, create=create)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits for a write under way."""
        self._file.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What is written within is durable together at the end, or not at all; others cannot write meanwhile."""
        with self._file.writing():
            yield

    # ---- what is written

    def add(self, record: Record) -> None:
        """Keep a record; the same one again changes nothing. ValueError where its id has another content."""
        body = encoding.to_json(encoding.record_fields(record))
        texts = [record.prompt, *(completion.content for completion in record.completions)]
        row = (
            record.id,
            record.kind,
            record.origin,
            record.queue_id,
            record.repeat_of,
            encoding.names(completion.source for completion in record.completions),
            encoding.searchable(*map(encoding.plain, texts)),
            body,
        )
        with self._file.writing() as connection:
            found = connection.execute("SELECT body FROM records WHERE id = ?", (record.id,)).fetchone()
            if found is None:
                names = "id, kind, origin, queue_id, repeat_of, sources, searchable, body"
                connection.execute(f"INSERT INTO records ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            elif encoding.record_in(found[0]) != encoding.record_of(json.loads(body)):
                raise ValueError(f"record {record.id} is there already, with another content")

    def judge(
        self,
        record_id: str,
        annotator: str,
        judgement: Judgement,
        *,
        expected_version: int = 0,
        event_id: str | None = None,
        kind: str = "vote",
        at: str | None = None,
    ) -> int:
        """What `annotator` says of the record now (`kind`: vote, edit or import); the new version, once durable.

        `expected_version`: the one it is based on; 0 where none stands. `Stale` where it is another by now. An event
        that is there already gives its old answer. ValueError where the judgement does not fit the record.
        """
        if not annotator.strip() or encoding.clean(annotator) != annotator:
            raise UserError("annotator: empty or unreadable; give a name")
        judgement.fits(self.record(record_id))
        return self._step(record_id, annotator, judgement, expected_version, event_id, kind, at=at)

    def undo(
        self, record_id: str, annotator: str, *, expected_version: int, event_id: str | None = None
    ) -> Judgement | None:
        """Take the last vote, edit, deletion or restoration back; the judgement that stood, None if there is none.

        The state before it stands again, or none does. What was imported is not taken back (delete it).
        """
        with self._file.writing() as connection:
            if known := events.known(connection, event_id, record_id, annotator):
                undone = events.of_version(connection, record_id, annotator, known.version - 1)
                return undone.judgement if undone else None
            version, stands = events.head(connection, record_id, annotator)
            if version != expected_version:
                raise _stale(version, expected_version)
            last = events.of_version(connection, record_id, annotator, stands)
            if last is None or last.kind == "import":
                return None
            before = events.of_version(connection, record_id, annotator, events.stood(connection, last))
            stands, judgement = (before.version, before.judgement) if before else (0, None)
            step = events.Step(record_id, annotator, version + 1, "undo", stands, judgement, event_id)
            events.append(connection, step)
            return last.judgement

    def delete(self, record_id: str, annotator: str, *, expected_version: int, event_id: str | None = None) -> int:
        """Leave the entry out of lists and exports; the new version. Its history stays; `restore` brings it back."""
        return self._mark(record_id, annotator, True, expected_version, event_id, "delete")

    def restore(self, record_id: str, annotator: str, *, expected_version: int, event_id: str | None = None) -> int:
        """Bring a deleted entry back; the new version."""
        return self._mark(record_id, annotator, False, expected_version, event_id, "restore")

    # ---- the queue, and notes

    def enqueue(self, found: Sequence[Text], source: str = "") -> Enqueued:
        """Put prompts at the end of the queue; those that it has already, by content, are only counted."""
        return self.enqueue_prompts([QueuedPrompt(new_id(), prompt, 0, source) for prompt in found])

    def enqueue_prompts(self, found: Sequence[QueuedPrompt]) -> Enqueued:
        """The same, with ids and extra columns of their own; positions are given anew."""
        with self._file.writing() as connection:
            return prompts.enqueue(connection, found)

    def note(self, key: str, value: Any) -> None:
        """Keep a small JSON value, such as a draft, in place of the key's old one."""
        with self._file.writing() as connection:
            connection.execute("REPLACE INTO notes VALUES (?, ?, ?)", (key, encoding.to_json(value), now()))

    # ---- copies

    def back_up(self, to: Path) -> None:
        """A whole, checked copy of the file. FileExistsError where there is one; EnvironmentProblem where it fails."""
        with self._file.reading() as connection:
            backup.copy(connection, to)

    def back_up_by_age(self, hours: float, keep: int) -> Path | None:
        """A dated copy beside the file where the newest is older than that, and the newest `keep` stay.

        None where none was due, none is to be kept, or there is nothing in the store yet.
        """
        if not keep or not self.pulse():
            return None
        with self._file.reading() as connection:
            return backup.by_age(connection, self.path, hours, keep)

    # ---- within

    def _mark(
        self, record_id: str, annotator: str, deleted: bool, expected: int, event_id: str | None, kind: str
    ) -> int:
        with self._file.writing() as connection:
            if known := events.known(connection, event_id, record_id, annotator):
                return known.version
            entry = self.entry(record_id, annotator)
            if entry is None:
                raise UserError(f"{annotator} has no judgement on this record")
            marked = replace(entry.judgement, deleted=deleted)
            return self._step(record_id, annotator, marked, expected, event_id, kind)

    def _step(
        self,
        record_id: str,
        annotator: str,
        judgement: Judgement,
        expected: int,
        event_id: str | None,
        kind: str,
        at: str | None = None,
    ) -> int:
        with self._file.writing() as connection:
            if known := events.known(connection, event_id, record_id, annotator):
                return known.version
            version, stands = events.head(connection, record_id, annotator)
            first = not expected and not stands  # after all was taken back, a first vote overwrites nothing
            if expected != version and not first:
                raise _stale(version, expected)
            step = events.Step(record_id, annotator, version + 1, kind, version + 1, judgement, event_id, at)
            events.append(connection, step)
            return version + 1


def _stale(version: int, expected: int) -> Stale:
    return Stale(
        f"changed elsewhere since this page showed it (version {version}, here {expected}); "
        "nothing was overwritten: load it again and repeat"
    )
