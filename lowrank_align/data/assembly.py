"""A row's tokens put together: what completions share, where they end, what stands before them, how they compare."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from lowrank_align.data.formats import Row, Shape
from lowrank_align.trees import Comparison, Completion

TIE = "a tie: no answer is the better one"


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def trimmed(ids: list[int], mask: list[bool]) -> Completion:
    """Without what follows the last trained token: it predicts nothing, and a score is read where the answer ends."""
    length = max((i + 1 for i, counts in enumerate(mask) if counts), default=0)
    return Completion(ids[:length], mask[:length])


def behind(prefix: list[int], completion: Completion) -> Completion:
    """With the prefix before its first trained token."""
    at = completion.mask.index(True)
    ids = [*completion.ids[:at], *prefix, *completion.ids[at:]]
    return Completion(ids, [*completion.mask[:at], *[False] * len(prefix), *completion.mask[at:]])


def comparisons_of(row: Row) -> tuple[Comparison, ...]:
    """A pair is one comparison; a ranking of K all K(K-1)/2, the better (lower) rank first, equal ranks a tie."""
    if row.shape is Shape.pair:
        return (Comparison(0, 1, row.preference, row.target_margin),)
    if row.ranks is None:
        return ()
    ranks = row.ranks
    pairs = [(i, j) if ranks[i] <= ranks[j] else (j, i) for j in range(len(ranks)) for i in range(j)]
    return tuple(Comparison(i, j, 0.5 if ranks[i] == ranks[j] else 1.0) for i, j in sorted(pairs))


def became_equal(row: Row, completions: Sequence[Completion], comparisons: Sequence[Comparison]) -> bool:
    """Whether answers of which one is better are the same, or those of a pair."""
    if any(c.preference != 0.5 and completions[c.first] == completions[c.second] for c in comparisons):
        return True
    return row.shape is Shape.pair and completions[0] == completions[1]


def best_and_worst(row: Row) -> Row | None:
    """The better and the worse answer of a pair, or the best and the worst of a ranking (of equal ones the first), as a
    sure pair; None where it is a tie."""
    if row.ranks is not None:
        best, worst = row.ranks.index(min(row.ranks)), row.ranks.index(max(row.ranks))
    else:
        best, worst = (0, 1) if row.preference > 0.5 else (1, 0)
    if best == worst or (row.ranks is None and row.preference == 0.5):
        return None
    answers = [row.completions[best], row.completions[worst]]
    return replace(row, shape=Shape.pair, completions=answers, ranks=None, preference=1.0)
