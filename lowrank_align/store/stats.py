"""What the judgements say of themselves: how many, how fast, how consistent, and whether a side or length decides."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

from lowrank_align.ratings import Agreement, WinRate, agreement
from lowrank_align.store.encoding import canonical, plain
from lowrank_align.store.records import Entry, Record
from lowrank_align.store.store import Store

PAUSE_SECONDS = 300.0  # a longer gap between two decisions is a break, not time to decide


@dataclass(frozen=True)
class Pace:
    """How fast somebody decides."""

    decisions: int  # events that are votes or edits
    per_minute: float | None  # over sittings, breaks left out; None below two decisions
    median_seconds: float | None  # to decide, as the page measured it


@dataclass(frozen=True)
class Stats:
    """All of it. Shares are in [0, 1] with 95 % intervals; NaN where there is nothing to count."""

    entries: int  # that stand, repeats among them
    records: int
    deleted: int
    taken_back: int
    not_judged: int  # records
    verdicts: dict[str, int]
    kinds: dict[str, int]
    annotators: dict[str, int]
    edited: int  # entries with an edit or an answer written by hand
    ties: WinRate  # share of pairs that are tied, among preferred and tied ones
    left_side: WinRate  # how often the answer on the left won; imported pairs, which had no sides, left out
    longer: WinRate  # how often the longer answer (in characters) was chosen, equal lengths counting half
    pace: Pace
    duplicates: int  # records with the prompt and the answers of an earlier one, repeats left out
    contradictions: int  # pairs of answers to one prompt, preferred now one way and now the other
    consistency: WinRate  # of pairs shown again, how many were decided as before
    agreement: Agreement  # between annotators on the same record
    queue_total: int
    queue_left: int | None  # for the annotator, None for all of them together

    def as_json(self) -> dict[str, Any]:
        """Nested plain values; null for NaN."""
        found = asdict(self) | {
            name: getattr(self, name)._asdict() for name in ("ties", "left_side", "longer", "consistency", "agreement")
        }
        return {name: _without_nan(value) for name, value in found.items()}


def stats(store: Store, annotator: str | None = None) -> Stats:
    """Of everybody's judgements, or one annotator's (agreement is of all of them in either case)."""
    everything = store.entries(newest_first=False, deleted=None)
    mine = [e for e in everything if annotator is None or e.annotator == annotator]
    standing = [e for e in mine if not e.judgement.deleted]
    fresh = [e for e in standing if not e.record.repeat_of]
    records = store.all_records()
    chosen = [c for entry in fresh for c in _choices(entry)]
    decisions = [(who, at) for who, at in store.decisions() if annotator is None or who == annotator]
    two = Counter(e.judgement.verdict for e in fresh if len(e.record.completions) == 2)
    return Stats(
        entries=len(standing),
        records=len(records),
        deleted=len(mine) - len(standing),
        taken_back=store.undone(annotator),
        not_judged=store.unjudged(),
        verdicts=_counted(e.judgement.verdict for e in standing),
        kinds=_counted(e.record.kind for e in standing),
        annotators=_counted(e.annotator for e in standing),
        edited=sum(bool(e.judgement.edits) or e.judgement.written is not None for e in standing),
        ties=WinRate.of(two["tie"], 0, two["preferred"]),
        left_side=_left_side(fresh),
        longer=_longer(chosen),
        pace=_pace(standing, decisions),
        duplicates=_duplicates(records),
        contradictions=_contradictions(chosen),
        consistency=_consistency(standing),
        agreement=agreement(_labels(everything)),
        queue_total=store.queue_total(),
        queue_left=None if annotator is None else store.queue_left(annotator),
    )


def summary(entry: Entry) -> str:
    """What was decided, in one word that equal decisions share whatever the sides: the verdict, or the order."""
    ranks = entry.judgement.ranks
    if entry.judgement.verdict in ("preferred", "ranked") and ranks is not None:
        order = sorted(set(ranks))
        places = zip([canonical(c.content) for c in entry.record.completions], ranks, strict=True)
        return canonical(sorted((text, order.index(rank)) for text, rank in places))
    return entry.judgement.verdict


def _choices(entry: Entry) -> Iterator[tuple[str, str, str]]:
    """(prompt, better, worse) of every decided comparison of different answers."""
    ranks = entry.judgement.ranks
    if entry.judgement.verdict not in ("preferred", "ranked") or ranks is None:
        return
    texts = [plain(completion.content) for completion in entry.record.completions]
    prompt = canonical(entry.record.prompt)
    for i, better in enumerate(texts):
        yield from ((prompt, better, worse) for j, worse in enumerate(texts) if ranks[i] < ranks[j] and better != worse)


def _left_side(entries: Iterable[Entry]) -> WinRate:
    left = ties = right = 0
    for entry in entries:
        ranks = entry.judgement.ranks
        if len(entry.record.completions) != 2 or entry.record.origin == "import":
            continue
        if entry.judgement.verdict == "tie":
            ties += 1
        elif entry.judgement.verdict in ("preferred", "ranked") and ranks is not None:
            first, second = (ranks[i] for i in entry.record.order)
            left, ties, right = left + (first < second), ties + (first == second), right + (first > second)
    return WinRate.of(left, ties, right)


def _longer(choices: Sequence[tuple[str, str, str]]) -> WinRate:
    longer = sum(len(better) > len(worse) for _, better, worse in choices)
    equal = sum(len(better) == len(worse) for _, better, worse in choices)
    return WinRate.of(longer, equal, len(choices) - longer - equal)


def _pace(entries: Sequence[Entry], decisions: Sequence[tuple[str, str]]) -> Pace:
    """Each annotator's decisions by themselves: two at once are no double pace."""
    times: dict[str, list[float]] = defaultdict(list)
    for annotator, at in decisions:
        times[annotator].append(datetime.fromisoformat(at).timestamp())
    gaps = [b - a for found in times.values() for a, b in pairwise(found) if 0 <= b - a <= PAUSE_SECONDS]
    measured = [e.judgement.seconds for e in entries if e.judgement.seconds is not None]
    per_minute = 60 * len(gaps) / sum(gaps) if sum(gaps) > 0 else None
    return Pace(sum(map(len, times.values())), per_minute, median(measured) if measured else None)


def _duplicates(records: Iterable[Record]) -> int:
    found = Counter(
        (canonical(record.prompt), tuple(sorted(canonical(completion.content) for completion in record.completions)))
        for record in records
        if not record.repeat_of
    )
    return sum(count - 1 for count in found.values())


def _contradictions(choices: Iterable[tuple[str, str, str]]) -> int:
    directions = set(choices)
    return sum((prompt, worse, better) in directions for prompt, better, worse in directions) // 2


def _consistency(entries: Sequence[Entry]) -> WinRate:
    """Repeats against the same annotator's judgement of the original; skipped ones say nothing."""
    decided = {(e.record.id, e.annotator): summary(e) for e in entries if e.judgement.verdict != "skip"}
    same = [
        decided[key] == decided[original]
        for e in entries
        if e.record.repeat_of
        and (key := (e.record.id, e.annotator)) in decided
        and (original := (e.record.repeat_of, e.annotator)) in decided
    ]
    return WinRate.of(sum(same), 0, len(same) - sum(same))


def _labels(entries: Iterable[Entry]) -> list[dict[str, str]]:
    """For each record, what everybody said."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in entries:
        if not entry.judgement.deleted and entry.judgement.verdict != "skip":
            found[entry.record.id][entry.annotator] = summary(entry)
    return list(found.values())


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
