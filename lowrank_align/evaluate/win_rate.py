"""How often one policy's answers beat another's, with an interval."""

from collections.abc import Sequence

from lowrank_align.ratings import WinRate, wilson

__all__ = ["WinRate", "wilson", "win_rate"]


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """Compare scores of answers to the same prompts, one each, in the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    return WinRate.of(wins, ties, len(pairs) - wins - ties)
