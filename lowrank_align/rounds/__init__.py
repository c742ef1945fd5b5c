"""Rounds: collect pairs of the current policy's answers, refit the reward model, train, and again from there."""

from lowrank_align.rounds.record import RoundResult
from lowrank_align.rounds.rounds import Rounds

__all__ = ["RoundResult", "Rounds"]
