"""One entry as rows that trainers take, without the column that brings it back.

An edit is better than the answer that it mends, a written answer better than every shown one; beyond that nothing is
concluded. Each kind of row has its function, which gives the rows or says why there are none.
"""

from collections.abc import Callable, Iterator
from typing import Any

from lowrank_align.store.encoding import mended, plain
from lowrank_align.store.records import TRAINERS_OWN, Entry, Text

Row = dict[str, Any]
Found = list[Row] | str  # rows, or why there are none

EQUAL = "the answers are equal"
EMPTY = "an answer is empty"
NO_PROMPT = "no prompt"
SKIPPED = "skipped"
_ELSEWHERE = {
    "bad": "all bad (in unpaired)",
    "liked": "liked or disliked (in unpaired)",
    "disliked": "liked or disliked (in unpaired)",
    "demonstration": "a demonstration (in demonstrations)",
    "scored": "scored (in scored)",
}


class Answers:
    """An entry's answers by what was said of them. Answers are texts or messages, as they stand in the record."""

    def __init__(self, entry: Entry) -> None:
        self.record, self.judgement = entry.record, entry.judgement
        self.shown: list[Text] = [completion.content for completion in entry.record.completions]
        self.edits = {
            i: mended(self.shown[i], text)
            for i, text in sorted(entry.judgement.edits.items())
            if text.strip() and mended(self.shown[i], text) != self.shown[i]
        }
        self.written = self._written()
        self.verdict = entry.judgement.verdict
        self.ranks = self._ranks()

    @property
    def is_pair(self) -> bool:
        return len(self.shown) == 2

    @property
    def best(self) -> list[int]:
        """The answers ranked first, where any is ranked behind them."""
        if self.ranks is None or len(set(self.ranks)) == 1:
            return []
        return [i for i, rank in enumerate(self.ranks) if rank == min(self.ranks)]

    @property
    def elsewhere(self) -> str:
        """Which export has what another one leaves out."""
        if self.ranks is None:
            return _ELSEWHERE[self.verdict]
        if not self.is_pair:
            return "a ranking (in rankings)"
        return "a preference (in pairs)" if self.best else "a tie (in pairs)"

    def new(self) -> list[Text]:
        """What people wrote: edits, and the answer of their own."""
        return [*self.edits.values(), *([self.written] if self.written is not None else [])]

    def row(self, of: list[int], **columns: Any) -> Row:
        """A row about the shown answers `of`, with what trainers read beside the columns."""
        found = {"prompt": self.record.prompt, **columns}
        found |= {name: self.record.extra[name] for name in TRAINERS_OWN if name in self.record.extra}
        if not all(self.record.completions[i].finished for i in of):  # then no end token is trained
            found["finished"] = False
        return found

    def _written(self) -> Text | None:
        written = self.judgement.written
        if written is None or not written.strip():
            return None
        return written if isinstance(self.shown[0], str) else [{"role": "assistant", "content": written}]

    def _ranks(self) -> tuple[float, ...] | None:
        """By completion, 1 is best; a tie has them equal, an answer alone or one that is bad has none."""
        if self.verdict == "tie":
            return (1.0,) * len(self.shown)
        return self.judgement.ranks if self.verdict in ("preferred", "ranked") else None


def pairs(answers: Answers) -> Found:
    """The vote, then each edit over its original, then the written answer over each shown one."""
    if len(answers.shown) > 2:
        return "a ranking (in rankings)" if answers.new() else answers.elsewhere
    found = list(_compared(answers))
    if answers.is_pair and answers.ranks:
        found = [_voted(answers, answers.ranks), *found]
    return _usable(found, ("chosen", "rejected"), answers.elsewhere)


def _voted(answers: Answers, ranks: tuple[float, ...]) -> Row:
    """A soft label is kept where it still says what the ranks say."""
    soft = answers.judgement.preference
    if ranks[0] == ranks[1]:
        better, preference = 0, 0.5
    elif soft is not None and (soft - 0.5) * (ranks[1] - ranks[0]) > 0:
        better, preference = 0, soft
    else:
        better, preference = int(ranks[1] < ranks[0]), 1.0
    row = answers.row([0, 1], chosen=answers.shown[better], rejected=answers.shown[1 - better])
    if preference != 1 or soft is not None:
        row["preference"] = preference
    if "margin" in answers.record.extra:
        row["margin"] = answers.record.extra["margin"]
    return row


def _compared(answers: Answers) -> Iterator[Row]:
    for i, edit in answers.edits.items():
        yield answers.row([i], chosen=edit, rejected=answers.shown[i])
    if answers.written is not None:
        for i, shown in enumerate(answers.shown):
            yield answers.row([i], chosen=answers.written, rejected=shown)


def rankings(answers: Answers) -> Found:
    """All answers of a ranking in one row; edits just above what they mend, the written one above all."""
    if len(answers.shown) < 3:
        return answers.elsewhere
    if answers.ranks is None and not answers.new():
        return answers.elsewhere
    ranks = answers.ranks or (1.0,) * len(answers.shown)
    placed = [((rank, 1.0), shown) for rank, shown in zip(ranks, answers.shown, strict=True)]
    placed += [((ranks[i], 0.0), edit) for i, edit in answers.edits.items() if edit not in answers.shown]
    if answers.written is not None and answers.written not in answers.shown:
        placed.append(((min(ranks), -1.0), answers.written))
    if len(placed) > len(ranks):
        order = sorted({place for place, _ in placed})
        new_ranks = [float(order.index(place) + 1) for place, _ in placed]
    else:
        new_ranks = list(ranks)
    texts = [text for _, text in placed]
    if any(texts[i] == texts[j] and new_ranks[i] != new_ranks[j] for j in range(len(texts)) for i in range(j)):
        return "equal answers, ranked differently"
    row = answers.row(list(range(len(answers.shown))), completions=texts, ranks=[_plain_number(r) for r in new_ranks])
    return _usable([row], ("completions",), EMPTY)


def unpaired(answers: Answers) -> Found:
    """A label for each answer on which something was decided; what people wrote is good."""
    labels: dict[int, bool] = {}
    if answers.verdict in ("liked", "disliked", "bad"):
        labels = dict.fromkeys(range(len(answers.shown)), answers.verdict == "liked")
    elif answers.is_pair and answers.best and answers.shown[0] != answers.shown[1]:
        labels = {i: i in answers.best for i in range(2)}
    found = [answers.row([i], completion=answers.shown[i], label=label) for i, label in labels.items()]
    found += [answers.row([], completion=text, label=True) for text in answers.new()]
    return _usable(found, ("completion",), EQUAL if answers.is_pair and answers.best else answers.elsewhere)


def demonstrations(answers: Answers) -> Found:
    """The chosen, liked or given answers, an edit in the place of what it mends, and what people wrote."""
    given = answers.verdict in ("liked", "demonstration")
    good = list(range(len(answers.shown))) if given else answers.best
    found = [_demonstration(answers, [i], answers.shown[i]) for i in good if i not in answers.edits]
    found += [_demonstration(answers, [], text) for text in answers.new()]
    return _usable(found, ("completion", "messages", "text"), answers.elsewhere, needs_prompt=False)


def _demonstration(answers: Answers, of: list[int], text: Text) -> Row:
    if answers.record.prompt:
        return answers.row(of, completion=text)
    row = answers.row(of, **({"text": text} if isinstance(text, str) else {"messages": text}))
    del row["prompt"]
    return row


def scored(answers: Answers) -> Found:
    """The score of an answer."""
    if answers.verdict != "scored":
        return answers.elsewhere
    row = answers.row([0], completion=answers.shown[0], score=answers.judgement.score)
    return _usable([row], ("completion",), EMPTY)


def _usable(rows: list[Row], names: tuple[str, ...], otherwise: str, *, needs_prompt: bool = True) -> Found:
    """The rows that can be trained on; else what is wrong with the first, and where there was none, `otherwise`."""
    problems = [_problem(row, names, needs_prompt) for row in rows]
    good = [row for row, problem in zip(rows, problems, strict=True) if not problem]
    return good or next((problem for problem in problems if problem), otherwise)


def _problem(row: Row, names: tuple[str, ...], needs_prompt: bool) -> str:
    if needs_prompt and not (row["prompt"] and plain(row["prompt"]).strip()):
        return NO_PROMPT
    texts = [text for name in names if name in row for text in (row[name] if name == "completions" else [row[name]])]
    if not all(_said_something(text) for text in texts):
        return EMPTY
    return EQUAL if "chosen" in row and row["chosen"] == row["rejected"] else ""


def _said_something(text: Text) -> bool:
    """A message may call a tool or think instead of speaking."""
    if isinstance(text, str):
        return bool(text.strip())
    return all(
        any(message.get(name) for name in ("tool_calls", "reasoning_content")) or plain([message]).strip()
        for message in text
        if message.get("role") == "assistant"
    )


def _plain_number(rank: float) -> float | int:
    return int(rank) if rank == int(rank) else rank


KINDS: dict[str, Callable[[Answers], Found]] = {
    "pairs": pairs,
    "rankings": rankings,
    "unpaired": unpaired,
    "demonstrations": demonstrations,
    "scored": scored,
}
