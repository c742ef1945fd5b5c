"""The curves of a run as a few small PNGs, from its `metrics.jsonl`."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowrank_align.durable import write_atomic, writing
from lowrank_align.runs import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH_FROM_POINTS = 40
WINDOWS_PER_CURVE = 25
PANEL_INCHES = (4.6, 3.2)
DPI = 100


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its y label with the unit, and the metrics drawn in it where a run has them."""

    label: str
    metrics: tuple[str, ...]
    noisy: bool = True


PLOTS: dict[str, tuple[Panel, ...]] = {
    "loss.png": (
        Panel("loss (nats)", ("loss",)),
        Panel("PPO losses", ("loss/policy_avg", "loss/value_avg")),
    ),
    "rewards.png": (
        Panel("reward of a completion", ("rewards/chosen", "rewards/rejected")),
        Panel("margin, chosen minus rejected", ("rewards/margins",)),
    ),
    "accuracy.png": (
        Panel("pairs ranked right (fraction)", ("rewards/accuracies",)),
        Panel("tokens predicted right (fraction)", ("mean_token_accuracy",)),
    ),
    "logps.png": (Panel("log-probability of a completion (nats)", ("logps/chosen", "logps/rejected")),),
    "kl_and_score.png": (
        Panel("KL to the reference (nats)", ("objective/kl",)),
        Panel("score of a completion", ("objective/scores",)),
    ),
    "entropy.png": (Panel("entropy (nats a token)", ("entropy", "objective/entropy")),),
    "optimiser.png": (
        Panel("gradient norm", ("grad_norm",)),
        Panel("learning rate", ("learning_rate",), noisy=False),
    ),
}


def plot_metrics(metrics_jsonl: Path, out: Path) -> list[Path]:
    """Draw into the folder `out` whatever of `PLOTS` the file has metrics for; returns the PNGs written.

    `eval_X` is drawn dashed in X's panel and colour. Long curves are smoothed, with the raw one faint behind.
    """
    from matplotlib.figure import Figure

    curves = _curves(metrics_jsonl)
    written = []
    for name, panels in PLOTS.items():
        present = [panel for panel in panels if any(_with_eval(metric) & curves.keys() for metric in panel.metrics)]
        if not present:
            continue
        width, height = PANEL_INCHES
        figure = Figure(figsize=(width * len(present), height), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
            _draw(axes, panel, curves)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / name, buffer.getvalue())
        written.append(out / name)
    return written


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a 25th of the curve, cut off at its ends; short curves come back as they are.

    values (N,) -> (N,).
    """
    if len(values) < SMOOTH_FROM_POINTS:
        return values
    half = max(1, len(values) // WINDOWS_PER_CURVE // 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def _draw(axes: Axes, panel: Panel, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    drawn = [metric for metric in panel.metrics if _with_eval(metric) & curves.keys()]
    for place, metric in enumerate(drawn):
        colour = f"C{place}"
        if metric in curves:
            steps, values = curves[metric]
            smoothed = smooth(values) if panel.noisy else values
            if smoothed is not values:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed, color=colour, label=metric, marker="." if len(steps) == 1 else None)
        if f"eval_{metric}" in curves:
            axes.plot(*curves[f"eval_{metric}"], color=colour, linestyle="--", marker=".", label=f"eval_{metric}")
    axes.set(xlabel="step", ylabel=panel.label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize="small")


def _curves(metrics_jsonl: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each metric's (steps, values), both (N,), without the nulls that stand for non-finite values."""
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in read_metrics(metrics_jsonl):
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                points.setdefault(name, []).append((entry["step"], value))
    return {name: (np.array([s for s, _ in found]), np.array([v for _, v in found])) for name, found in points.items()}


def _with_eval(metric: str) -> set[str]:
    return {metric, f"eval_{metric}"}
