"""Plots: which files come from which metrics, and what is drawn in them."""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from lowrank_align.plots import plot_metrics, smooth


def metrics_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def axes_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved, in order."""
    seen: list[Axes] = []
    save = matplotlib.figure.Figure.savefig

    def remember(self: matplotlib.figure.Figure, *arguments: Any, **options: Any) -> None:
        seen.extend(self.axes)
        save(self, *arguments, **options)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", remember)
    return seen


def test_a_dpo_run(tmp_path: Path) -> None:
    """One small picture a group, only for the groups that the run has; pyplot's global state is not touched."""
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
    rows = [{"step": step} | {name: step * 0.1 for name in names} | {"grad_norm": 1.0} for step in (1, 2, 3)]
    written = plot_metrics(metrics_file(tmp_path / "metrics.jsonl", rows), tmp_path / "deep" / "plots")
    assert [path.name for path in written] == ["loss.png", "rewards.png", "accuracy.png", "logps.png", "optimiser.png"]
    for path in written:
        assert path.parent == tmp_path / "deep" / "plots"
        assert path.stat().st_size < 100_000
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert len(list((tmp_path / "deep" / "plots").iterdir())) == 5


def test_a_ppo_run_has_kl_and_score_side_by_side(tmp_path: Path, axes_drawn: list[Axes]) -> None:
    rows = [{"step": 1, "objective/kl": 0.0, "objective/scores": 1.0}, {"step": 2, "objective/kl": 3.0}]
    (written,) = plot_metrics(metrics_file(tmp_path / "metrics.jsonl", rows), tmp_path)
    assert written.name == "kl_and_score.png"
    kl, score = axes_drawn
    assert (kl.get_ylabel(), kl.get_xlabel()) == ("KL to the reference (nats)", "step")
    assert kl.lines[0].get_xydata().tolist() == [[1, 0], [2, 3]]
    assert score.lines[0].get_xydata().tolist() == [[1, 1]]
    assert score.lines[0].get_marker() == "."


def test_held_out_curves_are_dashed_in_the_colour_of_their_training_curve(
    tmp_path: Path, axes_drawn: list[Axes]
) -> None:
    rows = [
        {"step": 1, "rewards/chosen": 0.0, "rewards/rejected": 0.0},
        {"step": 2, "rewards/chosen": 1.0, "rewards/rejected": -1.0},
        {"step": 2, "eval_rewards/rejected": -0.5},
    ]
    plot_metrics(metrics_file(tmp_path / "metrics.jsonl", rows), tmp_path)
    (axes,) = axes_drawn
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["rewards/chosen", "rewards/rejected", "eval_rewards/rejected"]
    assert [line.get_linestyle() for line in lines.values()] == ["-", "-", "--"]
    assert lines["eval_rewards/rejected"].get_color() == lines["rewards/rejected"].get_color()
    assert lines["rewards/chosen"].get_color() != lines["rewards/rejected"].get_color()
    assert axes.get_legend() is not None


def test_a_held_out_curve_alone_is_drawn(tmp_path: Path, axes_drawn: list[Axes]) -> None:
    (written,) = plot_metrics(metrics_file(tmp_path / "metrics.jsonl", [{"step": 5, "eval_loss": 1.0}]), tmp_path)
    assert written.name == "loss.png"
    assert [line.get_label() for line in axes_drawn[0].lines] == ["eval_loss"]


def test_nulls_are_gaps_and_other_values_are_left_out(tmp_path: Path, axes_drawn: list[Axes]) -> None:
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0, "entropy": "high"}]
    plot_metrics(metrics_file(tmp_path / "metrics.jsonl", rows), tmp_path)
    (axes,) = axes_drawn
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [3, 1]]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert plot_metrics(tmp_path / "none.jsonl", tmp_path / "plots") == []
    assert plot_metrics(metrics_file(tmp_path / "m.jsonl", [{"step": 1, "other": 1.0}]), tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_long_curves_are_smoothed_over_the_raw_one_but_the_rate_is_not(tmp_path: Path, axes_drawn: list[Axes]) -> None:
    """100 points that alternate between 0 and 1: raw faint behind, and the mean over 5 points, 2/5 or 3/5, on top."""
    rows = [{"step": step, "grad_norm": step % 2, "learning_rate": step % 2} for step in range(100)]
    plot_metrics(metrics_file(tmp_path / "metrics.jsonl", rows), tmp_path)
    norm, rate = axes_drawn
    raw, mean = norm.lines
    assert raw.get_ydata().tolist() == [step % 2 for step in range(100)]
    assert raw.get_alpha() < 0.5
    assert mean.get_ydata()[2:-2].tolist() == pytest.approx([0.4, 0.6] * 48)
    assert [line.get_ydata().tolist() for line in rate.lines] == [raw.get_ydata().tolist()]


def test_smoothing_by_hand() -> None:
    """50 points: windows of 50 // 25 // 2 = 1 point to each side. At the ends two points are left, of 0, 1, ..., 49
    with means 0.5 and 48.5, while a straight line keeps its inner values. 39 points are a short curve."""
    line = np.arange(50.0)
    assert smooth(line).tolist() == pytest.approx([0.5, *range(1, 49), 48.5])
    assert smooth(line[:39]).tolist() == list(range(39))
