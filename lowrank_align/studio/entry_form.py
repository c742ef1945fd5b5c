"""One entry of the store in full, and changing it: a form's texts, by side, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank_align.errors import UserError
from lowrank_align.store import Entry, Event, Judgement, Record, Store
from lowrank_align.store.encoding import last_answer
from lowrank_align.studio.collecting_view import parse_order
from lowrank_align.studio.entry_words import (
    OF_MANY,
    OF_ONE,
    OF_TWO,
    ORDERED,
    OTHERS,
    SCORED,
    SIDES,
    STRENGTHS,
    conversation,
    order_in_words,
    short,
    verdict_in_words,
    verdicts_of,
    when,
)


@dataclass(frozen=True)
class Answer:
    """One answer of an entry as it stands, by side: A was on the left."""

    side: str
    title: str
    text: str  # as mended, where it was
    original: str


@dataclass(frozen=True)
class Details:
    """Everything of one entry, in words."""

    record_id: str
    annotator: str
    version: int
    about: str
    prompt: str
    answers: list[Answer]
    verdict: str  # one of `verdicts`
    verdicts: list[str]
    order: str  # sides by number, best first, for more than two answers
    strength: str
    reason: str
    tags: str
    written: str
    score: str
    deleted: bool
    history: list[list[str]] = field(default_factory=list)

    @property
    def ordered(self) -> bool:
        """Whether an order is to be given."""
        return len(self.answers) > 2

    @property
    def scored(self) -> bool:
        return SCORED in self.verdicts


@dataclass(frozen=True)
class Change:
    """What a form says: all of it as typed, answers by side."""

    verdict: str
    order: str = ""
    strength: str | None = ""
    reason: str = ""
    tags: str = ""
    written: str = ""
    score: str = ""
    answers: Sequence[str] = ()


def details(store: Store, record_id: str, annotator: str) -> Details:
    """One entry in full; UserError where it is no more."""
    entry = store.entry(record_id, annotator)
    if entry is None:
        raise UserError("this entry has been taken back meanwhile; load the list again")
    record, judgement = entry.record, entry.judgement
    return Details(
        record_id=record_id,
        annotator=annotator,
        version=entry.version,
        about=_about(entry),
        prompt=conversation(record.prompt),
        answers=_answers(record, judgement),
        verdict=verdict_in_words(record, judgement),
        verdicts=verdicts_of(record),
        order=order_in_words(record, judgement),
        strength=STRENGTHS.get(judgement.strength or 0, ""),
        reason=judgement.reason,
        tags=", ".join(judgement.tags),
        written=judgement.written or "",
        score="" if judgement.score is None else f"{judgement.score:g}",
        deleted=judgement.deleted,
        history=[_step(event, record) for event in store.history(record_id, annotator)],
    )


def save(store: Store, record_id: str, annotator: str, version: int, change: Change) -> int:
    """Put a form's content in the entry's place; its new version. `Stale` where another page was first."""
    entry = store.entry(record_id, annotator)
    if entry is None:
        raise UserError("this entry has been taken back meanwhile; load the list again")
    changed = _judgement(entry.record, entry.judgement, change)
    if changed == entry.judgement and version == entry.version:
        return version
    return store.judge(record_id, annotator, changed, expected_version=version, kind="edit")


def _judgement(record: Record, old: Judgement, change: Change) -> Judgement:
    """The form as a judgement, on top of what the form does not show."""
    order = record.order
    edits = {}
    for index, text in zip(order, change.answers, strict=False):
        content = record.completions[index].content
        if text.strip() and text != last_answer(content):
            edits[index] = text
    shared: dict[str, Any] = {
        "edits": edits,
        "strength": next((n for n, word in STRENGTHS.items() if word == change.strength), None),
        "reason": change.reason.strip(),
        "tags": _tags(change.tags),
        "written": change.written.strip() or None,
    }
    if change.verdict not in verdicts_of(record):
        raise UserError(f"verdict: {change.verdict or 'none'}; choose one of {', '.join(verdicts_of(record))}")
    if change.verdict == SCORED:
        shared["score"] = _number(change.score)
    same_verdict = change.verdict == verdict_in_words(record, old)
    if same_verdict and (change.verdict != ORDERED or change.order.strip() == order_in_words(record, old)):
        return replace(old, **shared)
    return replace(old, preference=None, **_decided(record, change), **shared)


def _decided(record: Record, change: Change) -> dict[str, Any]:
    """Verdict and ranks by completion index, from words by side."""
    count, order = len(record.completions), record.order
    if change.verdict.endswith(" is better"):
        best = order[SIDES.index(change.verdict[0])]
        return {"verdict": "preferred", "ranks": tuple(1.0 if i == best else 2.0 for i in range(count))}
    if change.verdict == ORDERED:
        by_side = parse_order(change.order, count)
        ranks = dict(zip(order, by_side, strict=True))
        return {"verdict": "ranked", "ranks": tuple(ranks[i] for i in range(count))}
    words = OF_TWO if count == 2 else OF_MANY if count > 2 else OF_ONE | OTHERS
    verdict = next(name for name, word in words.items() if word == change.verdict)
    return {"verdict": verdict, "ranks": (1.0,) * count if verdict == "tie" else None}


def _answers(record: Record, judgement: Judgement) -> list[Answer]:
    found = []
    for side, index in enumerate(record.order):
        completion = record.completions[index]
        original = last_answer(completion.content)
        marks = [completion.source, *(f"{name} {value:g}" for name, value in _sampling(completion.sampling))]
        if judgement.ranks is not None:
            marks.append(f"place {judgement.ranks[index]:g}")
        if not completion.finished:
            marks.append("cut")
        if index in judgement.edits:
            marks.append("mended")
        name = SIDES[side % len(SIDES)]
        title = " · ".join([name, *(mark for mark in marks if mark)])
        found.append(Answer(name, title, judgement.edits.get(index, original), original))
    return found


def _sampling(sampling: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, float(sampling[name])) for name in ("temperature",) if isinstance(sampling.get(name), int | float)]


def _about(entry: Entry) -> str:
    """Where it came from, in a line."""
    record, judgement = entry.record, entry.judgement
    words = [f"{record.kind} from {record.origin}", f"judged by {entry.annotator}", when(entry.updated)]
    if judgement.seconds is not None:
        words.append(f"decided in {judgement.seconds:.1f} s")
    if judgement.preference is not None:
        words.append(f"preference {judgement.preference:g}")
    if judgement.streaming:
        words.append("while the text still came")
    if record.repeat_of:
        words.append("shown again, to see how steady the judgement is")
    base = record.versions.get("base")
    if base:
        words.append(f"base {Path(str(base)).name}")
    return " · ".join([*words, f"version {entry.version}", f"id {record.id}"])


def _step(event: Event, record: Record) -> list[str]:
    judgement = event.judgement
    what = "nothing stands" if judgement is None else verdict_in_words(record, judgement)
    more = [] if judgement is None else [judgement.reason, ", ".join(judgement.tags)]
    if judgement is not None and judgement.edits:
        more.append(f"{len(judgement.edits)} mended")
    if judgement is not None and judgement.written:
        more.append("with a written answer")
    return [str(event.version), when(event.at), event.kind, what, short("; ".join(m for m in more if m))]


def _tags(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag for part in text.split(",") if (tag := " ".join(part.split()))))


def _number(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        raise UserError(f"score: {text.strip() or 'empty'}; give a number") from None
    if found != found or found in (float("inf"), float("-inf")):
        raise UserError(f"score: {text.strip()}; give a finite number")
    return found
