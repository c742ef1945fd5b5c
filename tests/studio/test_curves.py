"""The curves that are drawn of a run's figures."""

from lowrank_align.studio.curves import MOST_POINTS, PANELS, Panel, Point, points


def test_only_what_was_logged_is_drawn() -> None:
    """A held-out loss is there at every second step; null stands for what was not finite."""
    figures = [
        {"step": 1, "loss": 0.7, "objective/kl": 0.0},
        {"step": 2, "loss": None, "objective/kl": 1.0, "eval_loss": 0.6},
    ]
    drawn = {panel.title: points(figures, panel) for panel in PANELS}
    assert drawn["Loss"] == [Point(1, 0.7, "training"), Point(2, 0.6, "held out")]
    assert drawn["KL to the reference (nats an answer)"] == [Point(1, 0.0, "training"), Point(2, 1.0, "training")]
    assert [title for title, found in drawn.items() if found] == ["Loss", "KL to the reference (nats an answer)"]


def test_a_long_curve_is_thinned_with_its_ends_kept() -> None:
    found = points([{"step": i, "x": float(i)} for i in range(1, 10_001)], Panel("X", {"x": "training"}))
    assert len(found) == MOST_POINTS
    assert (found[0].step, found[-1].step) == (1, 10_000)
    gaps = {after.step - before.step for before, after in zip(found, found[1:], strict=False)}
    assert gaps == {33, 34}  # 9,999 steps in 299 parts
