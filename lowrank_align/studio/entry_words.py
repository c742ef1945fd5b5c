"""The store in the words of the page: verdicts, orders, times. A is the answer that stood on the left."""

from datetime import datetime

from lowrank_align.store import Judgement, Record, Text
from lowrank_align.store.encoding import plain

SIDES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOWN_CHARACTERS = 80
STRENGTHS = {1: "slightly", 2: "clearly", 3: "by far"}
ORDERED, SCORED = "in an order", "scored"
OF_TWO = {"tie": "a tie", "bad": "both bad", "skip": "skipped"}
OF_MANY = {"ranked": ORDERED, "bad": "all bad", "skip": "skipped"}
OF_ONE = {"liked": "liked", "disliked": "disliked", "skip": "skipped"}
OTHERS = {"demonstration": "a demonstration", "scored": SCORED}


def verdicts_of(record: Record) -> list[str]:
    """What may be said of a record, in words."""
    if record.kind in OTHERS:
        return [OTHERS[record.kind]]
    if len(record.completions) == 1:
        return list(OF_ONE.values())
    if len(record.completions) == 2:
        return ["A is better", "B is better", *OF_TWO.values()]
    return list(OF_MANY.values())


def verdict_in_words(record: Record, judgement: Judgement) -> str:
    verdict, ranks, count = judgement.verdict, judgement.ranks, len(record.completions)
    if ranks is not None and verdict in ("preferred", "ranked"):
        if count != 2:
            return ORDERED
        first, second = (ranks[i] for i in record.order)
        return "a tie" if first == second else "A is better" if first < second else "B is better"
    return {**OTHERS, **OF_ONE, **OF_TWO, **({"bad": OF_MANY["bad"]} if count > 2 else {})}.get(verdict, verdict)


def order_in_words(record: Record, judgement: Judgement) -> str:
    """`3 1=2`: sides by number, best first; as `parse_order` reads it."""
    if judgement.ranks is None or len(record.completions) < 3:
        return ""
    by_side = [judgement.ranks[i] for i in record.order]
    places = [[str(side + 1) for side, rank in enumerate(by_side) if rank == place] for place in sorted(set(by_side))]
    return " ".join("=".join(group) for group in places)


def conversation(text: Text) -> str:
    """A prompt as it reads: plain, or a turn a paragraph."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0].get("role") == "user":
        return plain(text)
    return "\n\n".join(f"{turn.get('role', '?')}: {plain([turn]).strip()}" for turn in text)


def when(at: str) -> str:
    """A time of the store (UTC) as this machine's clock shows it, to the minute."""
    try:
        return f"{datetime.fromisoformat(at).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return at


def short(text: str, characters: int = SHOWN_CHARACTERS) -> str:
    """One line of it."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 3] + "..."
