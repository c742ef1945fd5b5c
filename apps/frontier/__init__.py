"""`lowrank-align frontier`: every method from the same start, at the same budget of tokens, in one report."""

from lowrank_align.apps.frontier.frontier import run_frontier

__all__ = ["run_frontier"]
