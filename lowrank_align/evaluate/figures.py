"""The pictures of an evaluation: win bars, a reliability diagram, scores against length."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowrank_align.durable import write_atomic
from lowrank_align.evaluate.outcomes import Comparison
from lowrank_align.evaluate.reward_quality import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
WON, TIED, LOST = "#2f7d5b", "#b9bec4", "#b5533c"
LABEL_CHARACTERS = 32


def win_bars(comparisons: Mapping[str, Comparison], ours: str, theirs: str, file: Path) -> None:
    """A bar a judge: won, tied, lost as shares, with the win rate and its interval marked on it."""
    figure, axes = _figure(7.2, 1.5 + 0.55 * len(comparisons))
    for place, comparison in enumerate(comparisons.values()):
        rate = comparison.win_rate
        left = 0.0
        for count, colour, word in ((rate.wins, WON, "won"), (rate.ties, TIED, "tied"), (rate.losses, LOST, "lost")):
            share = count / rate.total if rate.total else 0.0
            axes.barh(place, share, left=left, color=colour, height=0.6, label=None if place else word)
            if share > 0.05:
                axes.text(
                    left + share / 2, place, str(count), ha="center", va="center", color="white", fontsize="small"
                )
            left += share
        if rate.total:
            error = [[max(0.0, rate.rate - rate.low)], [max(0.0, rate.high - rate.rate)]]  # rounding, at 0 and 1
            axes.errorbar(rate.rate, place - 0.38, xerr=error, fmt="o", color="black", markersize=3.5, capsize=3, lw=1)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(comparisons)), [_short(name) for name in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.65)
    axes.set(
        xlim=(0, 1), xlabel="share of prompts; the dot is the win rate with its 95 % interval, a tie counting half"
    )
    axes.set_title(f"{_short(ours)} against {_short(theirs)}", fontsize="medium", loc="left")
    axes.legend(frameon=False, fontsize="small", ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.99), borderpad=0)
    _save(figure, file)


def calibration(bins: Sequence[Bin], error: float, file: Path) -> None:
    """Accuracy over confidence, the bars as wide as their bins; below, how many comparisons each has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    there = [b for b in bins if b.comparisons]
    above.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, linestyle=":", label="perfectly calibrated")
    above.bar([b.low for b in there], [b.accuracy for b in there], 0.05, align="edge", color=WON, alpha=0.35)
    above.plot(
        [b.confidence for b in there],
        [b.accuracy for b in there],
        "o",
        color=WON,
        label="comparisons of a bin",
        clip_on=False,
    )
    above.set(ylabel="share ordered right", ylim=(0, 1.03))
    above.set_title(f"calibration error {error:.3f}", fontsize="medium", loc="left")
    above.legend(frameon=False, fontsize="small", loc="upper left")
    below.bar([b.low for b in bins], [b.comparisons for b in bins], 0.05, align="edge", color=TIED)
    below.set(xlabel="confidence, s(|margin|)", ylabel="comparisons", xlim=(0.5, 1))
    for axes in (above, below):
        _clean(axes)
    _save(figure, file)


def score_over_length(points: Mapping[str, tuple[Sequence[int], Sequence[float]]], label: str, file: Path) -> None:
    """A dot an answer: tokens across, score up; the correlation of each kind in the legend."""
    from lowrank_align.evaluate.reward_quality import correlation

    figure, axes = _figure(5.6, 4.0)
    colours = (WON, LOST, "#4a6fa5")
    for (name, (tokens, scores)), colour in zip(points.items(), colours, strict=False):
        found = correlation(list(tokens), list(scores))
        shown = "no correlation: nothing varies" if math.isnan(found) else f"correlation {found:+.2f}"
        axes.scatter(tokens, scores, s=14, alpha=0.6, color=colour, label=f"{_short(name)}, {shown}", linewidths=0)
        if not math.isnan(found):
            slope, at = np.polyfit(np.asarray(tokens, dtype=float), np.asarray(scores, dtype=float), 1)
            ends = np.array([min(tokens), max(tokens)])
            axes.plot(ends, slope * ends + at, color=colour, linewidth=1)
    axes.set(xlabel="length (tokens)", ylabel=label)
    axes.legend(frameon=False, fontsize="small")
    _save(figure, file)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _short(name: str) -> str:
    """Its end: paths differ there."""
    name = name.replace("$", r"\$")
    return name if len(name) <= LABEL_CHARACTERS else f"…{name[1 - LABEL_CHARACTERS :]}"


def _save(figure: Figure, file: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(file, buffer.getvalue())
