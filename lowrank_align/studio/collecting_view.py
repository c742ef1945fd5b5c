"""A desk as a page shows it: texts by side, words for what goes on, nothing of who said what."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lowrank_align.errors import UserError
from lowrank_align.store import Text
from lowrank_align.studio.collecting import Desk
from lowrank_align.studio.pairs import said
from lowrank_align.studio.tally import Tally

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

SIDES = 6
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Shown:
    """What stands on the desk. All by side, left first; `sides[k]` is the completion that stands k-th."""

    pair_id: str = ""
    prompt: str = ""  # the last question, or the whole of a plain text
    before: str = ""  # the turns before it
    sides: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    edited: dict[int, str] = field(default_factory=dict)  # side -> the mended text
    streaming: bool = False
    message: str = ""
    next_label: str = "Next (G)"

    @property
    def count(self) -> int:
        return len(self.texts)


def shown_now(desk: Desk) -> Shown:
    """The desk at this moment."""
    with desk.locked():
        pair, held, draft = desk.current, desk.held, desk.draft
        if pair is None:
            return Shown(message="Type a prompt and press Enter, or take the next one from the queue (G).")
        sides = pair.shown or tuple(range(pair.count))
        texts = tuple(pair.text(i) for i in sides)
        states = tuple(_state(desk, i) for i in sides)
        edited = {k: draft.edits[i] for k, i in enumerate(sides) if i in draft.edits}
        streaming = not pair.done and not held
        decided = held or pair.record is not None
        before, prompt = _asked(pair.prompt)
        return Shown(
            pair_id=pair.id,
            prompt=prompt,
            before=before,
            sides=sides,
            texts=texts,
            states=states,
            edited=edited,
            streaming=streaming,
            message=_message(desk),
            next_label="Next (G)" if decided else "Draw again (G)",
        )


def _message(desk: Desk) -> str:
    pair = desk.current
    assert pair is not None
    if desk.held:
        return "Both bad: kept. E writes the better answer, G goes on, U takes it back."
    if pair.error:
        return f"{pair.error[:1].upper()}{pair.error[1:]}. S skips this prompt, G tries again."
    if not pair.done:
        return "The answers are coming; you may decide before their end."
    if pair.same():
        sources = {answer.source for answer in pair.answers}
        cause = "at temperature 0 they always are" if all(s.temperature == 0 for s in sources) else "even drawn again"
        return f"Two answers are the same ({cause}): skip (S), or choose other sources below."
    if pair.repeat_of:
        return "You have seen this pair before: once in a while an old one comes back, to see how steady you are."
    return "Which is better? A, B, T tie, X both bad. E mends an answer, S skips."


def _state(desk: Desk, index: int) -> str:
    """Below an answer: how far it is."""
    pair = desk.current
    assert pair is not None
    if pair.record is not None:
        return "" if pair.record.completions[index].finished else "cut"
    answer = pair.answers[index]
    if answer.error:
        return "could not be drawn"
    if not answer.done:
        return f"{answer.tokens} tokens ..." if answer.tokens else "waiting for its turn ..."
    return "" if answer.finished else f"cut at {answer.tokens} tokens"


def _asked(prompt: Text) -> tuple[str, str]:
    """The turns before the last question, and that question."""
    if isinstance(prompt, str):
        return "", prompt
    before = "\n\n".join(f"{turn['role']}: {turn['content'].strip()}" for turn in prompt[:-1])
    return before, prompt[-1]["content"]


def told_in_words(studio: "Studio", desk: Desk) -> tuple[str, str]:
    """The counter's line with what it warns of, and how many prompts wait."""
    tally = Tally.of_annotator(studio.store, desk.annotator)
    lines = [tally.in_words(desk.pace()), *tally.warnings()]
    if hint := studio.trainer.enough(tally.pairs):
        lines.append(hint)
    left = studio.store.queue_left(desk.annotator)
    queue = f"{left} in queue" if left else "queue empty"
    return "\n".join(line for line in lines if line), queue


def decisions(studio: "Studio", desk: Desk) -> str:
    """The last ten decisions, newest first, a line each."""
    lines = []
    for entry in desk.decisions():
        judgement, record = entry.judgement, entry.record
        what = {"preferred": "better", "tie": "tie", "bad": "both bad", "skip": "skipped"}.get(judgement.verdict)
        if judgement.verdict == "preferred" and judgement.ranks:
            best = min(range(len(judgement.ranks)), key=lambda i: (judgement.ranks or ())[i])
            side = (record.shown or (0, 1)).index(best)
            what = f"{'AB'[side]} better: {record.completions[best].source}"
        marks = " (edited)" if judgement.edits else " (written)" if judgement.written else ""
        question = " ".join(said(record.prompt).split())
        short = question if len(question) <= SHOWN_CHARACTERS else question[: SHOWN_CHARACTERS - 3] + "..."
        lines.append(f"{what or judgement.verdict}{marks} - {short}")
    return "\n".join(lines)


def parse_order(text: str, count: int) -> tuple[float, ...]:
    """`3 1=2` -> the ranks by side: the third is best, the first and second share the next place.

    UserError unless every answer from 1 to `count` is named once.
    """
    groups = [
        re.findall(r"\d", group) for group in re.split(r"[\s,;>]+", re.sub(r"\s*=\s*", "=", text.strip())) if group
    ]
    named = [int(digit) for group in groups for digit in group]
    if sorted(named) != list(range(1, count + 1)):
        example = " ".join(map(str, range(count, 0, -1)))
        raise UserError(f"order {text.strip()!r}: name each answer from 1 to {count} once, best first, as {example}")
    ranks = [0.0] * count
    place = 1.0
    for group in groups:
        for digit in group:
            ranks[int(digit) - 1] = place
        place += 1.0
    return tuple(ranks)
