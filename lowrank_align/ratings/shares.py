"""Battles, and shares of them with an interval."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959964


class Battle(NamedTuple):
    """One vote between two players' answers to one prompt, as they stood on the page."""

    left: str
    right: str
    score: float  # 1: the left one won, 0: the right one, 0.5: a tie
    prompt: str = ""  # whatever names it; "" belongs to no other battle's prompt
    annotator: str = ""


class WinRate(NamedTuple):
    """Share won, a tie counting half, with its 95 % Wilson interval. Of nothing: NaN, anywhere between 0 and 1."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    @classmethod
    def of(cls, wins: int, ties: int, losses: int) -> "WinRate":
        count = wins + ties + losses
        rate = (wins + ties / 2) / count if count else math.nan
        return cls(rate, *(wilson(rate, count) if count else (0.0, 1.0)), wins, ties, losses)

    @property
    def total(self) -> int:
        return self.wins + self.ties + self.losses


def wilson(rate: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (1927): it stays within [0, 1] and has a width also at 0 and 1."""
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate_of(battles: Sequence[Battle], player: str) -> WinRate:
    """How often `player` won its battles against others."""
    others = [b for b in battles if (b.left == player) != (b.right == player)]
    return _counted([b.score if b.left == player else 1 - b.score for b in others])


def left_side(battles: Sequence[Battle]) -> WinRate:
    """How often the left answer won: with random sides about a half, whoever plays."""
    return _counted([b.score for b in battles])


def _counted(scores: Sequence[float]) -> WinRate:
    wins, losses = sum(s > 0.5 for s in scores), sum(s < 0.5 for s in scores)
    return WinRate.of(wins, len(scores) - wins - losses, losses)
