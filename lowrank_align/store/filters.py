"""Which entries are wanted, as SQL."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_align.store.encoding import clean, searchable

# Every name in a query that uses a filter: `r` is the record, `e` the newest event with its standing judgement.
# CROSS JOIN has SQLite go through the records in their order, so that a page of them needs no sorting.
JOINED = "FROM records AS r CROSS JOIN standing AS e ON e.record = r.id"


@dataclass(frozen=True)
class Filters:
    """What an entry must have. Empty and None mean any; `text` is looked for without case, in answers and reasons."""

    annotator: str | None = None
    kinds: Sequence[str] = ()
    verdicts: Sequence[str] = ()
    tag: str | None = None
    source: str | None = None
    text: str | None = None
    origin: str | None = None
    deleted: bool | None = False  # True: the deleted ones alone
    repeats: bool | None = None  # False: without pairs that were shown again

    def where(self) -> tuple[str, list[Any]]:
        """The condition, and its parameters in order."""
        conditions: list[str] = []
        parameters: list[Any] = []

        def also(condition: str, *values: Any) -> None:
            conditions.append(condition)
            parameters.extend(values)

        if self.annotator is not None:
            also("e.annotator = ?", self.annotator)
        if self.kinds:
            also(f"r.kind IN ({_marks(self.kinds)})", *self.kinds)
        if self.verdicts:
            also(f"e.verdict IN ({_marks(self.verdicts)})", *self.verdicts)
        if self.tag is not None:
            also("EXISTS (SELECT 1 FROM json_each(e.tags) WHERE value = ?)", clean(self.tag))
        if self.source is not None:
            also("EXISTS (SELECT 1 FROM json_each(r.sources) WHERE value = ?)", clean(self.source))
        if self.text:
            needle = searchable(self.text)
            also("(instr(r.searchable, ?) OR instr(e.searchable, ?))", needle, needle)
        if self.origin is not None:
            also("r.origin = ?", self.origin)
        if self.repeats is not None:
            also("r.repeat_of IS NOT NULL" if self.repeats else "r.repeat_of IS NULL")
        if self.deleted is not None:
            also("e.deleted = ?", int(self.deleted))
        return " AND ".join(conditions) or "1", parameters


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
