"""How far annotators agree with each other, and votes with a reward model."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from lowrank_align.ratings.shares import WinRate, wilson


class Agreement(NamedTuple):
    """Between annotators who judged the same items."""

    share: float  # of two annotators' judgements on one item that are equal; NaN where nobody shares an item
    low: float  # 95 % Wilson interval of it, as if the comparisons were independent
    high: float
    alpha: float  # Krippendorff's, nominal: 1 always, 0 as by chance; NaN where only one label was ever given
    comparisons: int  # pairs of annotators on one item
    items: int  # items with two annotators or more


def agreement(items: Iterable[Mapping[str, Hashable]]) -> Agreement:
    """`items`: for each, what every annotator who judged it said. Those that one annotator alone judged count nothing.

    alpha = 1 - observed / expected disagreement (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011): any
    number of annotators, any of them missing; with few judgements it is corrected for their number.
    """
    shared = [list(labels.values()) for labels in items if len(labels) > 1]
    equal = [a == b for labels in shared for a, b in combinations(labels, 2)]
    if not equal:
        return Agreement(math.nan, 0.0, 1.0, math.nan, 0, 0)
    share = sum(equal) / len(equal)
    return Agreement(share, *wilson(share, len(equal)), _alpha(shared), len(equal), len(shared))


def _alpha(shared: Sequence[Sequence[Hashable]]) -> float:
    total = sum(len(labels) for labels in shared)
    differing = 0.0  # ordered pairs of one item's labels that differ, an item of m labels weighing 1 / (m - 1)
    for labels in shared:
        same = sum(count * (count - 1) for count in Counter(labels).values())
        differing += (len(labels) * (len(labels) - 1) - same) / (len(labels) - 1)
    counts = Counter(label for labels in shared for label in labels)
    expected = (total * total - sum(count * count for count in counts.values())) / (total - 1)
    return 1 - differing / expected if expected else math.nan


def agreement_with_scores(votes: Sequence[float], margins: Sequence[float]) -> WinRate:
    """Share of votes whose side has the higher score; a tie among the votes counts nothing, equal scores half.

    `votes`: 1 left, 0 right, 0.5 tie. `margins`: the left answer's score minus the right one's, in the same order.
    """
    decided = [(vote > 0.5, margin) for vote, margin in zip(votes, margins, strict=True) if vote != 0.5]
    right = sum((margin > 0) if left else (margin < 0) for left, margin in decided)
    level = sum(margin == 0 for _, margin in decided)
    return WinRate.of(right, level, len(decided) - right - level)
