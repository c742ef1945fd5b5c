"""A prompt with its answers on somebody's desk, before it is a row of the store."""

import random
import secrets
import threading
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lowrank_align.store import Completion, Record, Text
from lowrank_align.studio.answers import Answer, Source, new_seed
from lowrank_align.studio.speaking import AHEAD, COLLECT

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

REDRAWS = 3  # of an answer that says the same as another


@dataclass(frozen=True)
class Plan:
    """Where answers come from, and which pair is shown next."""

    sources: tuple[Source, ...] = (Source(), Source())  # of K answers the k-th comes from sources[k % len]
    count: int = 2
    informative: str | None = None  # a reward run, or `implicit:VOICE`; the closest pair of several comes next
    repeats: bool = True  # every tenth pair is an old one
    second_opinions: bool = False  # pairs that others have judged come first


class Pair:
    """Answers to one prompt, being drawn or there already; `shown[0]` stands on the left."""

    def __init__(
        self,
        prompt: Text,
        *,
        queue_id: str | None = None,
        record_id: str | None = None,
        shown: tuple[int, ...] = (),
        record: Record | None = None,
        repeat_of: str | None = None,
    ) -> None:
        self.prompt, self.queue_id, self.repeat_of = prompt, queue_id, repeat_of
        self.id = record_id or uuid.uuid4().hex
        self.shown = shown
        self.record = record  # of a pair that is in the store: an older one, or one that was undone
        self.answers: list[Answer] = []
        self.urgency = AHEAD  # of its answers; those drawn again have it too
        self.gap: float | None = None  # between the scores of the two answers
        self.redrawn = 0

    @property
    def count(self) -> int:
        return len(self.record.completions) if self.record else len(self.answers)

    @property
    def done(self) -> bool:
        """Every answer is there."""
        return self.record is not None or all(answer.done for answer in self.answers)

    @property
    def error(self) -> str | None:
        """What the first answer that could not be drawn says."""
        return next((answer.error for answer in self.answers if answer.error), None)

    def text(self, index: int) -> str:
        """Of completion `index`, as far as it is there."""
        if self.record is not None:
            return said(self.record.completions[index].content)
        return self.answers[index].text

    def verbatim(self, index: int) -> Text:
        """As the row keeps it; plain text begins with the space that it goes on with."""
        if self.record is not None:
            return self.record.completions[index].content
        return self.answers[index].completion().content

    def completions(self) -> tuple[Completion, ...]:
        if self.record is not None:
            return self.record.completions
        return tuple(answer.completion() for answer in self.answers)

    def hurry(self, urgency: int) -> None:
        """Somebody waits for it now."""
        self.urgency = max(self.urgency, urgency)
        for answer in self.answers:
            answer.hurry(urgency)

    def stop(self) -> None:
        for answer in self.answers:
            answer.stop()

    def same(self) -> bool:
        """Whether two of the answers say the same."""
        texts = [self.text(i).strip() for i in range(self.count)]
        return len(set(texts)) < len(texts)

    def to_record(self, studio: "Studio", origin: str = "collect") -> Record:
        """The row; the one that is in the store where there is one."""
        if self.record is not None:
            return self.record
        return Record(
            kind="pair" if self.count == 2 else "ranking",
            prompt=self.prompt,
            completions=self.completions(),
            shown=self.shown,
            origin=origin,
            queue_id=self.queue_id,
            versions=studio.versions(),
            id=self.id,
        )

    def to_note(self) -> dict[str, Any]:
        """What draws the same pair again after a restart."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "queue_id": self.queue_id,
            "shown": list(self.shown),
            "answers": [{"seed": a.seed, "source": vars(a.source)} for a in self.answers],
        }


def drawn(
    studio: "Studio",
    plan: Plan,
    prompt: Text,
    *,
    queue_id: str | None = None,
    ahead: bool = False,
    rng: random.Random | None = None,
) -> Pair:
    """A new pair (or K answers), its answers begun, its sides random. An answer that repeats another is drawn again."""
    rng = rng or random.Random(secrets.randbits(64))
    order = list(range(plan.count))
    rng.shuffle(order)
    pair = Pair(prompt, queue_id=queue_id, shown=tuple(order))
    sources = [plan.sources[k % len(plan.sources)] for k in range(plan.count)]
    asked = [(source, new_seed()) for source in sources]
    _begin(studio, pair, asked, AHEAD if ahead else COLLECT, plan.informative)
    return pair


def drawn_again(studio: "Studio", note: dict[str, Any]) -> Pair:
    """The pair that was on the desk when the studio ended: the same sources and seeds give the same answers."""
    pair = Pair(note["prompt"], queue_id=note["queue_id"], record_id=note["id"], shown=tuple(note["shown"]))
    _begin(studio, pair, [(Source(**one["source"]), int(one["seed"])) for one in note["answers"]], COLLECT)
    return pair


def repeated(old: Record, rng: random.Random) -> Pair:
    """An older pair once more, its sides random anew."""
    order = list(range(len(old.completions)))
    rng.shuffle(order)
    copies = tuple(replace(completion, id=uuid.uuid4().hex) for completion in old.completions)
    record = replace(old, completions=copies, shown=tuple(order), repeat_of=old.id, id=uuid.uuid4().hex)
    return Pair(old.prompt, record_id=record.id, shown=record.shown, record=record, repeat_of=old.id)


def from_store(record: Record) -> Pair:
    """A pair that is in the store."""
    shown = record.shown or tuple(range(len(record.completions)))
    return Pair(
        record.prompt,
        queue_id=record.queue_id,
        record_id=record.id,
        shown=shown,
        record=record,
        repeat_of=record.repeat_of,
    )


def said(text: Text) -> str:
    """A prompt or an answer for people to read."""
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:
        return text[0]["content"].strip()
    return "\n\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in text)


def _begin(
    studio: "Studio", pair: Pair, asked: list[tuple[Source, int]], urgency: int, informative: str | None = None
) -> None:
    pair.urgency, watch = urgency, _Watch(studio, pair, informative)
    pair.answers = [studio.answer(pair.prompt, source, seed=seed, urgency=urgency) for source, seed in asked]
    for answer in pair.answers:
        answer.when_done(watch.look)


@dataclass
class _Watch:
    """Looks at a pair when an answer ends, in the speaker's thread; draws again what came out the same."""

    studio: "Studio"
    pair: Pair
    informative: str | None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self) -> None:
        with self.lock:
            pair = self.pair
            if not pair.done or pair.error or any(answer.stopped for answer in pair.answers):
                return
            if not pair.same() or pair.redrawn >= REDRAWS:
                if self.informative and pair.count == 2:
                    pair.gap = self.studio.gap(self.informative, pair.prompt, [pair.verbatim(0), pair.verbatim(1)])
                return
            pair.redrawn += 1
            seen: set[str] = set()
            for k, answer in enumerate(pair.answers):
                if answer.text.strip() in seen and answer.source.temperature > 0:
                    pair.answers[k] = again = self.studio.answer(pair.prompt, answer.source, urgency=pair.urgency)
                    again.when_done(self.look)
                seen.add(answer.text.strip())
