"""`lowrank-align frontier`: every method from the same start, at the same budget of tokens, in one report."""

from lowrank_align.config import FrontierSettings


def run_frontier(settings: FrontierSettings) -> int:
    """The command. Imported only now: a worker that begins comes by here, and is to set itself up before torch."""
    from lowrank_align.apps.frontier.frontier import run_frontier as run

    return run(settings)


__all__ = ["run_frontier"]
