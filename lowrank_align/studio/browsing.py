"""Looking through the store, a page at a time, and what may be put into it by upload."""

import gzip
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lowrank_align.errors import UserError
from lowrank_align.store import Entry, Store, Text
from lowrank_align.store.encoding import last_answer, plain
from lowrank_align.studio.entry_words import (
    ORDERED,
    SHOWN_CHARACTERS,
    SIDES,
    order_in_words,
    short,
    verdict_in_words,
    when,
)

PAGE_ROWS = 50
ANY = "any"
STANDING, DELETED = "kept", "deleted"
HEADERS = ["no.", "when", "kind", "verdict", "prompt", "answers", "tags", "who"]
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
UNPACKED_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Wanted:
    """What is to be listed; `any` and empty texts leave nothing out."""

    verdict: str = ANY
    annotator: str = ANY
    kind: str = ANY
    tag: str = ANY
    text: str = ""
    kept: str = STANDING

    def filters(self) -> dict[str, Any]:
        """As the store takes them."""
        return {
            "verdicts": () if self.verdict == ANY else (self.verdict,),
            "kinds": () if self.kind == ANY else (self.kind,),
            "annotator": None if self.annotator == ANY else self.annotator,
            "tag": None if self.tag == ANY else self.tag,
            "text": self.text.strip() or None,
            "deleted": self.kept == DELETED,
        }


@dataclass(frozen=True)
class Listing:
    """One page of entries, newest first; `keys` are record and annotator of each row."""

    rows: list[list[str]]
    keys: list[tuple[str, str]]
    page: int  # from 1
    pages: int
    total: int

    @property
    def in_words(self) -> str:
        """Which rows these are."""
        if not self.total:
            return "nothing"
        first = (self.page - 1) * PAGE_ROWS + 1
        return f"{first:,}-{first + len(self.rows) - 1:,} of {self.total:,}"


def listing(store: Store, wanted: Wanted, page: int = 1) -> Listing:
    """The page of that number, or the last one there is."""
    filters = wanted.filters()
    total = store.count(**filters)
    pages = max(1, -(-total // PAGE_ROWS))
    page = min(max(1, page), pages)
    before = (page - 1) * PAGE_ROWS
    entries = store.entries(limit=PAGE_ROWS, offset=before, **filters)
    rows = [[str(before + n), *_row(entry)] for n, entry in enumerate(entries, 1)]
    return Listing(rows, [(entry.record.id, entry.annotator) for entry in entries], page, pages, total)


def choices(store: Store) -> tuple[list[str], list[str]]:
    """Annotators and tags to filter by."""
    return [ANY, *store.annotators()], [ANY, *store.tags()]


def check_upload(file: Path) -> Path:
    """The file, if it is of a kind that is only data and not too large unpacked; UserError otherwise."""
    name = file.name.lower()
    if not name.endswith(SUFFIXES):
        raise UserError(f"{file.name}: cannot be imported; upload one of {', '.join(SUFFIXES)}")
    if name.endswith(".gz"):
        unpacked = 0
        try:
            with gzip.open(file) as stream:
                while block := stream.read(2**20):
                    unpacked += len(block)
                    if unpacked > UNPACKED_BYTES:
                        limit = UNPACKED_BYTES // 2**20
                        raise UserError(f"{file.name}: more than {limit} MB unpacked; use `lowrank-align data import`")
        except (OSError, EOFError) as error:
            raise UserError(f"{file.name}: cannot be unpacked ({error})") from None
    return file


def export_name(store: Store, kind: str, now: datetime) -> str:
    """What an export's file is called: `studio-pairs-2026-01-31-1805.jsonl`."""
    return f"{store.path.stem}-{kind}-{now:%Y-%m-%d-%H%M}.jsonl"


def _row(entry: Entry) -> list[str]:
    record, judgement = entry.record, entry.judgement
    texts = [judgement.edits.get(i, last_answer(record.completions[i].content)) for i in record.order]
    marks = " (mended)" if judgement.edits else " (written)" if judgement.written else ""
    verdict = verdict_in_words(record, judgement)
    return [
        when(entry.updated),
        record.kind,
        (f"order {order_in_words(record, judgement)}" if verdict == ORDERED else verdict) + marks,
        short(_asked(record.prompt)),
        short(" | ".join(f"{SIDES[k % len(SIDES)]}: {text}" for k, text in enumerate(texts)), 2 * SHOWN_CHARACTERS),
        ", ".join(judgement.tags),
        entry.annotator,
    ]


def _asked(prompt: Text) -> str:
    """The last thing that was asked."""
    return prompt if isinstance(prompt, str) else plain(prompt[-1:])
