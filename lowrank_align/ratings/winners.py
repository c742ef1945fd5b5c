"""The winners of an arena by three rules, from P_ij, the share that i won against j (a tie counts half).

The rules as in Dudik et al., Contextual Dueling Bandits (2015). Where every P_ij follows Bradley-Terry, all agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowrank_align.ratings.shares import Battle

Matrix = NDArray[np.float64]


class Winners(NamedTuple):
    """By name. `condorcet` may be empty or several; the others are several only where they are level."""

    condorcet: tuple[str, ...]
    copeland: tuple[str, ...]
    borda: tuple[str, ...]


def players_of(battles: Sequence[Battle]) -> list[str]:
    """Every name, in the order of appearance."""
    return list(dict.fromkeys(name for b in battles for name in (b.left, b.right)))


def win_matrix(battles: Sequence[Battle], names: Sequence[str]) -> Matrix:
    """W (n, n): W[i, j] = battles that i won against j, ties half each. A player's battles with itself say nothing."""
    place = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for b in battles:
        if b.left != b.right:
            wins[place[b.left], place[b.right]] += b.score
            wins[place[b.right], place[b.left]] += 1 - b.score
    return wins


def win_shares(wins: Matrix) -> Matrix:
    """P (n, n) = W / (W + W^T); NaN where two never met, and on the diagonal."""
    met = wins + wins.T
    return np.divide(wins, met, out=np.full_like(wins, np.nan), where=met > 0)


def condorcet(shares: Matrix) -> list[int]:
    """Who has P_ij >= .5 against every other. There may be none or several; a pair that never met is not won."""
    return [i for i in range(len(shares)) if all(shares[i, j] >= 0.5 for j in range(len(shares)) if j != i)]


def copeland(shares: Matrix) -> list[int]:
    """Who has the most opponents with P_ij > .5; all of those that share the first place."""
    beaten = (shares > 0.5).sum(axis=1)  # NaN is not above
    return [int(i) for i in np.flatnonzero(beaten == beaten.max(initial=0))]


def borda(shares: Matrix) -> list[int]:
    """Who has the highest sum of P_ij over the others, a pair that never met counting .5; all that share that sum."""
    known = np.where(np.isnan(shares), 0.5, shares)
    np.fill_diagonal(known, 0.0)
    sums = known.sum(axis=1)
    return [int(i) for i in np.flatnonzero(np.isclose(sums, sums.max(initial=0.0), rtol=0, atol=1e-9))]


def winners(battles: Sequence[Battle], names: Sequence[str] | None = None) -> Winners:
    """All three. `names` adds players that have not played yet."""
    names = list(names) if names is not None else players_of(battles)
    shares = win_shares(win_matrix(battles, names))
    named = [tuple(names[i] for i in rule(shares)) for rule in (condorcet, copeland, borda)]
    return Winners(*named)
