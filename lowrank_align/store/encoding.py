"""Records and judgements as JSON and back, exactly, and as text to search in."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any

from lowrank_align.store.records import Completion, Judgement, Record, Text


def to_json(value: Any) -> str:
    """Compact JSON in UTF-8's letters; half surrogate pairs, which UTF-8 has no bytes for, stay escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text if _is_utf8(text) else json.dumps(value, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> str:
    """One text for equal values: keys in order, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_id(value: Any) -> str:
    """An id, 32 hexadecimal characters, that equal values share."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


def record_fields(record: Record) -> dict[str, Any]:
    """The record as JSON's types; what has its default is left out, but for ids and times."""
    found = _without_defaults(record, keep=("kind", "prompt", "created", "id"))
    found["completions"] = [_without_defaults(c, keep=("content", "id")) for c in record.completions]
    if record.shown:
        found["shown"] = list(record.shown)
    return found


def record_of(values: Mapping[str, Any]) -> Record:
    """The record that `record_fields` took apart. ValueError, TypeError or KeyError where it is none."""
    completions = tuple(_typed(Completion, completion) for completion in values["completions"])
    shown = tuple(int(index) for index in values.get("shown", ()))
    return _typed(Record, {**values, "completions": completions, "shown": shown})


def judgement_fields(judgement: Judgement) -> dict[str, Any]:
    """The judgement as JSON's types; what has its default is left out."""
    found = _without_defaults(judgement, keep=("verdict",))
    for name in ("ranks", "tags"):
        if name in found:
            found[name] = list(found[name])
    if judgement.edits:
        found["edits"] = {str(index): text for index, text in judgement.edits.items()}
    return found


def judgement_of(values: Mapping[str, Any]) -> Judgement:
    """The judgement that `judgement_fields` took apart. ValueError, TypeError or KeyError where it is none."""
    ranks = values.get("ranks")
    return _typed(
        Judgement,
        {
            **values,
            "ranks": None if ranks is None else tuple(float(rank) for rank in ranks),
            "tags": tuple(str(tag) for tag in values.get("tags", ())),
            "edits": {int(index): str(text) for index, text in values.get("edits", {}).items()},
        },
    )


def record_in(column: str) -> Record:
    """The record in a column of the store; sqlite3.DatabaseError where damage to the file has reached it."""
    return _in(column, record_of)


def judgement_in(column: str) -> Judgement:
    """The judgement, likewise."""
    return _in(column, judgement_of)


def value_in(column: str) -> Any:
    """Any JSON value, likewise."""
    return _in(column, lambda value: value)


def plain(text: Text) -> str:
    """What is said in it, for searching and comparing."""
    return text if isinstance(text, str) else "\n".join(_said(message) for message in text)


def last_answer(text: Text) -> str:
    """The text that an edit of the completion starts from: all of it, or the last message's."""
    return text if isinstance(text, str) else str(text[-1].get("content", "")) if text else ""


def mended(text: Text, edit: str) -> Text:
    """The completion with its last answer replaced."""
    return edit if isinstance(text, str) else [*text[:-1], {**text[-1], "content": edit}]


def searchable(*texts: str) -> str:
    """For `instr` with a needle of the same treatment: without case, and with what SQLite's text cannot hold out."""
    return clean("\n".join(texts).casefold().replace("\0", " "))


def clean(text: str) -> str:
    """Half surrogate pairs as question marks, for columns of SQLite, which have no bytes for them."""
    return text.encode("utf-8", "replace").decode()


def names(found: Iterable[str]) -> str:
    """A JSON array of them for SQLite, each once, in order."""
    return json.dumps(sorted({clean(name) for name in found}))


def time_in(column: str) -> str:
    """The time, likewise."""
    try:
        datetime.fromisoformat(column)
    except (TypeError, ValueError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from error
    return column


def _in(column: str, made: Callable[[Any], Any]) -> Any:
    try:
        return made(json.loads(column))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"a row cannot be read: {error}") from error


def _said(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "" if content is None else to_json(content)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_defaults(value: Any, keep: tuple[str, ...]) -> dict[str, Any]:
    return {name: item for name, item, default in _items(value) if name in keep or item != default}


def _items(value: Any) -> Iterator[tuple[str, Any, Any]]:
    for known in fields(value):
        default = known.default_factory() if callable(known.default_factory) else known.default
        yield known.name, getattr(value, known.name), default


def _typed(kind: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass from its fields; an unknown one is a ValueError, so that nothing is lost unseen."""
    known = {known.name for known in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{unknown[0]}: unknown")
    return kind(**values)
