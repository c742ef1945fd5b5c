"""Measures of what a run achieved: win rate with an interval, score and KL of a policy, accuracy of a reward model."""
