"""What a store's votes say of those who gave them, and how far judges side with them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from lowrank_align.data.formats import Row, parse_row
from lowrank_align.errors import UserError
from lowrank_align.ratings import Agreement, WinRate, agreement, agreement_with_scores
from lowrank_align.store import Entry, Store
from lowrank_align.store.encoding import canonical, content_id
from lowrank_align.store.records import TRAINERS_OWN
from lowrank_align.store.stats import summary


@dataclass(frozen=True)
class Vote:
    """One annotator preferred the first of a pair's answers."""

    row: Row  # completions: [better, worse]
    annotator: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class People:
    """How far annotators agree on the same answers, all together and two by two."""

    together: Agreement
    by_two: dict[str, Agreement]  # "ann, ben"
    judgements: dict[str, int]  # by annotator


@dataclass(frozen=True)
class Siding:
    """How often a judge sides with the votes."""

    together: WinRate
    by_annotator: dict[str, WinRate]
    by_tag: dict[str, WinRate]


def people(entries: Sequence[Entry]) -> People:
    """Agreement between all who judged the same answers: same verdict, same order. What was skipped says nothing.

    The same are those of one prompt with equal texts, also where they came from different files. Of what somebody has
    judged twice, the newer counts.
    """
    said: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in entries:
        if entry.judgement.verdict != "skip":
            said[_answers_id(entry)][entry.annotator] = summary(entry)
    names = sorted({entry.annotator for entry in entries})
    by_two = {
        f"{a}, {b}": found
        for a, b in combinations(names, 2)
        if (
            found := agreement([{n: labels[n] for n in (a, b)} for labels in said.values() if {a, b} <= set(labels)])
        ).items
    }
    return People(agreement(said.values()), by_two, dict(Counter(entry.annotator for entry in entries).most_common()))


def _answers_id(entry: Entry) -> str:
    return content_id([entry.record.prompt, sorted(canonical(c.content) for c in entry.record.completions)])


def standing(path: str) -> list[Entry]:
    """Everything that stands in a store, without pairs shown again; UserError where there is nothing."""
    with Store(path, create=False) as store:
        entries = store.entries(newest_first=False, repeats=False)
    if not entries:
        raise UserError(f"{path}: nobody has judged anything yet")
    return entries


def votes(entries: Sequence[Entry]) -> tuple[list[Vote], Counter[str]]:
    """Every decided comparison of two shown answers, and what was left out and why; a ranking of K gives up to
    K(K-1)/2."""
    found: list[Vote] = []
    left_out: Counter[str] = Counter()
    for entry in entries:
        ranks, record = entry.judgement.ranks, entry.record
        if ranks is None or entry.judgement.verdict not in ("preferred", "ranked"):
            left_out["no side was taken"] += len(record.completions) > 1
            continue
        for i, j in combinations(range(len(ranks)), 2):
            if ranks[i] == ranks[j]:
                left_out["a tie"] += 1
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            texts = [record.completions[place].content for place in (better, worse)]
            own = {name: record.extra[name] for name in TRAINERS_OWN if name in record.extra}
            raw = {"prompt": record.prompt, "chosen": texts[0], "rejected": texts[1], **own}
            try:
                found.append(Vote(parse_row(raw, record.id, len(found)), entry.annotator, entry.judgement.tags))
            except UserError:
                left_out["equal or empty answers"] += 1
    return found, left_out


def siding(found: Sequence[Vote], margins: Sequence[float]) -> Siding:
    """`margins` (N,): how much better a judge finds the voted-for answer than the other; 0 counts half."""
    both = list(zip(found, margins, strict=True))

    def of(chosen: Callable[[Vote], bool]) -> WinRate:
        mine = [margin for vote, margin in both if chosen(vote)]
        return agreement_with_scores([1.0] * len(mine), mine)

    names = sorted({vote.annotator for vote in found})
    tags = sorted({tag for vote in found for tag in vote.tags})
    return Siding(
        of(lambda _: True),
        {name: of(lambda vote, name=name: vote.annotator == name) for name in names},  # type: ignore[misc]
        {tag: of(lambda vote, tag=tag: tag in vote.tags) for tag in tags},  # type: ignore[misc]
    )
