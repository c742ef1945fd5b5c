"""How often one policy's answers beat another's, with an interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959964


class WinRate(NamedTuple):
    """Share of prompts won, a tie counting half, with its 95 % Wilson interval."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """Compare scores of answers to the same prompts, one each, in the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    rate = (wins + ties / 2) / len(pairs)
    return WinRate(rate, *wilson(rate, len(pairs)), wins, ties, len(pairs) - wins - ties)


def wilson(rate: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): it stays within [0, 1] and has a width also at 0 and 1."""
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
