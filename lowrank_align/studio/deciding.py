"""From a vote on the page to a judgement in the store, and from a judgement to the best answer."""

from dataclasses import dataclass, field

from lowrank_align.errors import UserError
from lowrank_align.store import Entry, Judgement, Text
from lowrank_align.studio.pairs import Pair


@dataclass
class Draft:
    """What was said of the pair on the desk before the vote."""

    strength: int | None = None
    reason: str = ""
    tags: tuple[str, ...] = ()
    edits: dict[int, str] = field(default_factory=dict)  # by completion


def judgement_of(
    pair: Pair,
    choice: str,
    ranks: tuple[float, ...] | None,
    draft: Draft,
    handed_out: dict[int, str],
    seconds: float,
    streaming: bool,
) -> Judgement:
    """What a vote by side says by completion. UserError where it does not fit the pair.

    `ranks`: by side, left first, for the choice "rank"; `handed_out`: by completion, the text that the annotator began
    to mend: left as it was, it is no edit.
    """
    sides = pair.shown or tuple(range(pair.count))
    by_side: dict[str, tuple[str, tuple[float, ...] | None]] = {
        "a": ("preferred", (1.0, 2.0)),
        "b": ("preferred", (2.0, 1.0)),
        "tie": ("tie", (1.0,) * pair.count),
        "bad": ("bad", None),
        "skip": ("skip", None),
        "rank": ("ranked", ranks),
    }
    if choice not in by_side:
        raise UserError(f"{choice}: no such vote (a, b, tie, bad, skip, rank)")
    if choice in ("a", "b") and pair.count != 2:
        raise UserError(f"{pair.count} answers are ranked: give their order, best first")
    verdict, shown_ranks = by_side[choice]
    if choice == "rank" and (shown_ranks is None or len(shown_ranks) != pair.count):
        raise UserError(f"give every one of the {pair.count} answers its place, best first")
    found = None
    if shown_ranks is not None:
        rank_of = dict(zip(sides, shown_ranks, strict=True))
        found = tuple(rank_of[i] for i in range(pair.count))
    edits = {
        i: as_before(pair.verbatim(i), text)
        for i, text in draft.edits.items()
        if text.strip() and text.strip() not in (pair.text(i).strip(), handed_out.get(i, "").strip())
    }
    return Judgement(
        verdict=verdict,  # type: ignore[arg-type]
        ranks=found,
        strength=draft.strength if choice in ("a", "b", "rank") else None,
        reason=draft.reason.strip(),
        tags=draft.tags,
        edits=edits,
        seconds=round(seconds, 2),
        streaming=streaming,
    )


def can_go_on(entry: Entry) -> bool:
    """Whether a next question can follow: something was chosen, and the prompt is a conversation."""
    return not isinstance(entry.record.prompt, str) and best_answer(entry) is not None


def best_answer(entry: Entry) -> Text | None:
    """What the annotator thinks is the best answer to the prompt: written, mended or chosen; None where none is."""
    said = entry.judgement
    if said.written:
        return said.written
    if not said.ranks or said.verdict not in ("preferred", "ranked"):
        return None
    best = min(range(len(said.ranks)), key=lambda i: said.ranks[i] if said.ranks else 0.0)
    return said.edits.get(best) or entry.record.completions[best].content


def as_before(original: Text, text: str) -> str:
    """A mended text with the space before it that the original had: plain text goes on where the prompt ends."""
    if not isinstance(original, str):
        return text.strip()
    return original[: len(original) - len(original.lstrip())] + text.strip()
