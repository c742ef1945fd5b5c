"""A run's figures as the few curves that people look at while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_align.studio.series import Figures

MOST_POINTS = 300  # of one curve; a long one is thinned evenly, its ends kept


@dataclass(frozen=True)
class Panel:
    """One small plot: its title with the unit, and the metrics drawn in it by the names people see."""

    title: str
    metrics: Mapping[str, str]


PANELS = (
    Panel("Loss", {"loss": "training", "eval_loss": "held out"}),
    Panel(
        "Accuracy (share of pairs ranked right)",
        {
            "rewards/accuracies": "training",
            "accuracy": "training",
            "eval_rewards/accuracies": "held out",
            "eval_accuracy": "held out",
        },
    ),
    Panel("Margin, chosen minus rejected", {"rewards/margins": "training", "margin": "training"}),
    Panel("Implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    Panel("Log-probability of an answer (nats)", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    Panel("Score", {"objective/scores": "training", "eval_objective/scores": "held out", "mean_reward": "mean"}),
    Panel("KL to the reference (nats an answer)", {"objective/kl": "training"}),
    Panel("Length (tokens)", {"completions/mean_length": "training"}),
    Panel("Entropy (nats a token)", {"policy/entropy_avg": "training", "entropy": "training"}),
)


@dataclass(frozen=True)
class Point:
    """One dot of a curve."""

    step: int
    value: float
    curve: str


def points(figures: Figures, panel: Panel) -> list[Point]:
    """The panel's curves one after the other; empty where the run has none of its metrics."""
    found: list[Point] = []
    for metric, curve in panel.metrics.items():
        values = [(entry["step"], entry.get(metric)) for entry in figures]
        finite = [Point(int(step or 0), value, curve) for step, value in values if value is not None]
        found += thinned(finite)
    return found


def thinned(curve: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` of the points, evenly, with the first and the last."""
    if len(curve) <= MOST_POINTS:
        return list(curve)
    last = len(curve) - 1
    return [curve[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
