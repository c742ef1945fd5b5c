"""What votes say: who is better and how sure that is, by battle (`Battle`), and how far those who vote agree.

numpy only. Strengths by Bradley-Terry with intervals, winners by three rules, win rates with Wilson's interval,
agreement between annotators and with a reward model.
"""

from lowrank_align.ratings.agreement import Agreement, agreement, agreement_with_scores
from lowrank_align.ratings.bradley_terry import RIDGE, Rating, bradley_terry, odds, strengths
from lowrank_align.ratings.shares import Battle, WinRate, left_side, wilson, win_rate_of
from lowrank_align.ratings.winners import (
    Winners,
    borda,
    condorcet,
    copeland,
    players_of,
    win_matrix,
    win_shares,
    winners,
)

__all__ = [
    "RIDGE",
    "Agreement",
    "Battle",
    "Rating",
    "WinRate",
    "Winners",
    "agreement",
    "agreement_with_scores",
    "borda",
    "bradley_terry",
    "condorcet",
    "copeland",
    "left_side",
    "odds",
    "players_of",
    "strengths",
    "wilson",
    "win_matrix",
    "win_rate_of",
    "win_shares",
    "winners",
]
