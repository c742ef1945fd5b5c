"""Rounds: collect pairs of the current policy's answers, refit the reward model, train, and again from there."""

from lowrank_align.rounds.rounds import RoundResult, Rounds

__all__ = ["RoundResult", "Rounds"]
