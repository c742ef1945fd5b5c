"""Rows of one shape made into rows of another: what is known of a prompt's answers as pairs, rankings, labels, answers.

Rows of one prompt are put together first, except rankings, whose ranks mean something within a row alone. Every source
comes down to the same thing, answers with a worth each, and every target is made from that:

| from | an answer's worth | to |
| --- | --- | --- |
| scored | its score | pairs, rankings, unpaired, demonstrations |
| ranking | its rank, negated | pairs, unpaired, demonstrations |
| unpaired | 1 good, 0 bad | pairs, rankings, demonstrations |
| pair | the share of its comparisons that it won | unpaired, demonstrations |

An answer that comes more than once in a group counts once, with the mean of its worths.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from lowrank_align.data.formats import Row, Shape, Text
from lowrank_align.data.shapes import CONVERTIBLE, TARGETS
from lowrank_align.errors import UserError
from lowrank_align.store.export import COLUMN

Target = Literal["pairs", "rankings", "unpaired", "demonstrations"]
Pairing = Literal["best-worst", "all"]
Line = dict[str, Any]  # one row to write

_HALF = (Shape.unpaired, Shape.pair)  # their worths are shares: above a half is good

REPEATED = "the same answer once more, merged into one"
TIED = "a tie"
TOO_NEAR = "nearer than min_difference"
ALONE = "a prompt with one answer alone"
AT_THRESHOLD = "at the threshold, neither good nor bad"
NOT_GOOD = "a rejected or bad answer, or not above the threshold"
NOT_BEST = "not the best of its prompt"
BETWEEN = "neither the best nor the worst of its prompt"


@dataclass(frozen=True)
class Answer:
    """One answer, and what it is worth beside the others of its group."""

    text: Text
    worth: float
    finished: bool


@dataclass(frozen=True)
class Group:
    """What is known of one prompt's answers, in the order in which they came."""

    prompt: Text
    answers: list[Answer]
    columns: dict[str, Any]  # what every row of the group says alike: template arguments, source, tags, ...

    def line(self, answers: Sequence[Answer], **columns: Any) -> Line:
        """A row about these answers; cut ones make it unfinished, so that no end is trained behind them."""
        cut = {} if all(answer.finished for answer in answers) else {"finished": False}
        return {"prompt": self.prompt, **columns, **self.columns, **cut}


@dataclass(frozen=True)
class Conversion:
    """The new rows, and how much was left out for what reason."""

    lines: list[Line]
    groups: int
    left_out: Counter[str] = field(default_factory=Counter)


def check_convertible(rows: Sequence[Row], to: Target, source: str) -> Shape:
    """The one shape of `rows`, of which `to` can be made. UserError names what can be made of what there is."""
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise UserError(f"{source}: rows of several shapes ({', '.join(shapes)}); convert each in a file of its own")
    shape = shapes[0]
    if to in CONVERTIBLE.get(shape, ()):
        return shape
    sources = " or ".join(f"{name} rows" for name, targets in CONVERTIBLE.items() if to in targets)
    can = f"they become {' or '.join(CONVERTIBLE[shape])}; " if shape in CONVERTIBLE else ""
    if TARGETS.get(shape) == to:
        raise UserError(f"{source}: these are {to} already: {can}train with them as they are")
    raise UserError(f"{source}: rows of shape {shape} cannot become {to}; {can}{to} are made of {sources}")


def convert(
    rows: Sequence[Row],
    to: Target,
    *,
    source: str = "rows",
    pairing: Pairing = "best-worst",
    threshold: float | None = None,
    min_difference: float = 0.0,
    keep_ties: bool = False,
) -> Conversion:
    """Rows of one shape as rows of another, messages kept as they are.

    pairs: of each group the best against the worst (of equal ones the first), or all pairs; `chosen` is the better.
    rankings: all answers of a group, rank 1 the best, equal worths an equal rank. unpaired: good above `threshold`, bad
    below it; of rankings without one, the best are good and the worst bad. demonstrations: the best of each group
    (of equal ones the first), or all above `threshold`. For unpaired rows and pairs the threshold is a half unless it
    is given; for rankings it is a rank, and lower is better. UserError where `to` cannot be made of the rows.
    """
    shape = check_convertible(rows, to, source)
    if to == "unpaired" and shape is Shape.scored and threshold is None:
        raise UserError("--threshold: missing; scores above it become good answers, those below it bad ones")
    limit = 0.5 if threshold is None and shape in _HALF else threshold
    if limit is not None and shape is Shape.ranking:
        limit = -limit
    left_out: Counter[str] = Counter()
    groups = list(_groups(rows, left_out))
    lines: list[Line] = []
    for group in groups:
        match to:
            case "pairs":
                lines += _pairs(group, pairing, min_difference, keep_ties, left_out)
            case "rankings":
                lines += _ranking(group, left_out)
            case "unpaired":
                lines += _unpaired(group, limit, left_out)
            case "demonstrations":
                lines += _demonstrations(group, limit, left_out)
    return Conversion(lines, len(groups), left_out)


# ---- rows to groups


def _groups(rows: Sequence[Row], left_out: Counter[str]) -> Iterator[Group]:
    together: dict[str, list[Row]] = {}
    for number, row in enumerate(rows):
        of = number if row.shape is Shape.ranking else None
        together.setdefault(_key([row.prompt, row.template_kwargs, of]), []).append(row)
    for same in together.values():
        found: dict[str, list[Answer]] = {}
        for answer in (answer for row in same for answer in _answers(row)):
            found.setdefault(_key(answer.text), []).append(answer)
        left_out[REPEATED] += sum(len(copies) - 1 for copies in found.values()) if same[0].shape != Shape.pair else 0
        yield Group(same[0].prompt, [_merged(copies) for copies in found.values()], _shared_columns(same))


def _answers(row: Row) -> list[Answer]:
    match row.shape:
        case Shape.pair:
            worths = [row.preference, 1 - row.preference]
        case Shape.ranking:
            worths = [-rank for rank in row.ranks or ()]
        case Shape.unpaired:
            worths = [float(bool(row.label))]
        case _:
            worths = [float(row.score or 0.0)]
    return [Answer(text, worth, row.finished) for text, worth in zip(row.completions, worths, strict=True)]


def _merged(copies: Sequence[Answer]) -> Answer:
    worth = sum(answer.worth for answer in copies) / len(copies)
    return Answer(copies[0].text, worth, all(answer.finished for answer in copies))


def _shared_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """`tools` as a column of its own, as rows have it; other columns where all rows agree on them."""
    kwargs = dict(rows[0].template_kwargs)
    tools = kwargs.pop("tools", None)
    own = {"chat_template_kwargs": kwargs} if kwargs else {}
    own |= {"tools": tools} if tools else {}
    others = {name: value for name, value in rows[0].extra.items() if name != COLUMN}  # the store's, of the old row
    return own | {name: v for name, v in others.items() if all(row.extra.get(name) == v for row in rows)}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# ---- groups to rows


def _pairs(
    group: Group, pairing: Pairing, min_difference: float, keep_ties: bool, left_out: Counter[str]
) -> Iterator[Line]:
    if len(group.answers) < 2:
        left_out[ALONE] += 1
        return
    ranked = sorted(group.answers, key=lambda answer: -answer.worth)  # stable: equal ones in their order
    if pairing == "all":
        chosen = list(combinations(ranked, 2))
    else:
        worst = min(ranked[1:], key=lambda answer: answer.worth)  # of equal ones the first
        chosen = [(ranked[0], worst)]
    for better, worse in chosen:
        tied = better.worth == worse.worth
        if tied and not keep_ties:
            left_out[TIED] += 1
        elif not tied and better.worth - worse.worth < min_difference:
            left_out[TOO_NEAR] += 1
        else:
            preference = {"preference": 0.5} if tied else {}
            yield group.line([better, worse], chosen=better.text, rejected=worse.text, **preference)


def _ranking(group: Group, left_out: Counter[str]) -> Iterator[Line]:
    if len(group.answers) < 2:
        left_out[ALONE] += 1
        return
    worths = [answer.worth for answer in group.answers]
    ranks = [1 + sum(other > worth for other in worths) for worth in worths]
    yield group.line(group.answers, completions=[answer.text for answer in group.answers], ranks=ranks)


def _unpaired(group: Group, limit: float | None, left_out: Counter[str]) -> Iterator[Line]:
    worths = [answer.worth for answer in group.answers]
    for answer in group.answers:
        if limit is not None and answer.worth == limit:
            left_out[AT_THRESHOLD] += 1
        elif limit is None and min(worths) == max(worths):
            left_out[TIED] += 1
        elif limit is None and min(worths) < answer.worth < max(worths):
            left_out[BETWEEN] += 1
        else:
            label = answer.worth == max(worths) if limit is None else answer.worth > limit
            yield group.line([answer], completion=answer.text, label=label)


def _demonstrations(group: Group, limit: float | None, left_out: Counter[str]) -> Iterator[Line]:
    best = max(group.answers, key=lambda answer: answer.worth)
    for answer in group.answers:
        if answer.worth > limit if limit is not None else answer is best:
            yield group.line([answer], completion=answer.text)
        else:
            left_out[NOT_BEST if limit is None else NOT_GOOD] += 1
