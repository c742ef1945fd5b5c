"""The five pictures of a report; each is left out where the report has nothing for it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_align.apps.frontier.entries import ENTRIES, OVER_OPTIMISED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 110
MARKERS = "osD^v<>phX*P"
NAMES = [entry.name for entry in ENTRIES]
NATS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # where an axis of KL has ticks, as far as they have room
BEST_OF_STYLE: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": ":"}


def draw_figures(report: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw what there is; the PNGs written, in the order of the panels."""
    drawers: dict[str, Callable[[Mapping[str, Any], Path], bool]] = {
        "frontier.png": draw_frontier,
        "temperature.png": draw_temperatures,
        "steps.png": draw_steps,
        "reward.png": draw_rewards,
        "over_optimisation.png": draw_over_optimisation,
    }
    return [out / name for name, draw in drawers.items() if draw(report, out / name)]


def draw_frontier(report: Mapping[str, Any], path: Path) -> bool:
    """(a) Exact score against KL to SFT: a point for each value of a method's sweep."""
    figure, axes = _axes((9, 5.6))
    sft = report["sft"]["score"]
    axes.errorbar([0], [sft["mean"]], yerr=_errors([sft]), color="black", marker="*", markersize=13, label="SFT")
    for name, entry in report["entries"].items():
        if name in OVER_OPTIMISED:
            continue
        points = sorted(entry["points"], key=lambda point: point["kl"]["mean"])
        _line(axes, [p["kl"] for p in points], [p["score"] for p in points], label=_swept(entry), **_style(name))
    if best := report["best_of_n"]:
        label = f"best of n, n {best[0]['n']} to {best[-1]['n']}"
        _line(axes, [p["kl"] for p in best], [p["score"] for p in best], label=label, **BEST_OF_STYLE)
    axes.set(
        ylabel="exact score", title=f"What each method reaches on {report['ground']['model']}, and how far it goes"
    )
    _nats(axes)
    _legend(axes)
    return _save(figure, path)


def draw_temperatures(report: Mapping[str, Any], path: Path) -> bool:
    """(b) Wins against SFT's answers of temperature 1, over the temperature at which the policy is asked."""
    curves = [("SFT", report["sft"]["temperatures"], {"color": "black", "marker": "*"})]
    curves += [(e["label"], _middle(e)["temperatures"], _style(name)) for name, e in _with(report, "temperatures")]
    figure, axes = _axes((8, 4.6))
    for label, points, style in curves:
        places = [{"mean": p["temperature"], "sd": None} for p in points]
        _line(axes, places, [p["wins"] for p in points], label=label, **style)
    _half(axes)
    axes.set(xlabel="sampling temperature", ylabel="wins against SFT's answers", title="Wins over temperature")
    _legend(axes)
    return _save(figure, path)


def draw_steps(report: Mapping[str, Any], path: Path) -> bool:
    """(c) Wins on the way through training."""
    curves = [(name, e) for name, e in _with(report, "way") if name not in OVER_OPTIMISED]
    if not curves:
        return False
    figure, axes = _axes((8, 4.6))
    for name, entry in curves:
        way = [p for p in _middle(entry)["way"]]
        places = [{"mean": 0.0, "sd": None}, *({"mean": p["share_of_steps"], "sd": None} for p in way)]
        wins = [report["sft"]["wins"], *(p["wins"] for p in way)]
        _line(axes, places, wins, label=entry["label"], **_style(name))
    _half(axes)
    axes.set(xlabel="share of the training steps done", ylabel="wins against SFT's answers", title="Wins over training")
    _legend(axes)
    return _save(figure, path)


def draw_rewards(report: Mapping[str, Any], path: Path) -> bool:
    """(d) How often the reward model orders two answers as the exact score does."""
    from matplotlib.figure import Figure

    data, rank = report["rewards"]["data"], report["rewards"]["rank"]
    if not data and not rank:
        return False
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, points, by, label in (
        (left, data, "pairs", "training pairs"),
        (right, rank, "rank", "LoRA rank of the reward model"),
    ):
        places = [{"mean": p[by], "sd": None} for p in points]
        _line(axes, places, [p["accuracy"] for p in points], label="", color="C0", marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks([p[by] for p in points], [f"{p[by]:.0f}" for p in points])
        axes.minorticks_off()
        axes.set(xlabel=label, ylabel="pairs ordered as scored")
        axes.label_outer()
        _plain(axes)
    figure.suptitle("Reward accuracy on held-out answers")
    return _save(figure, path)


def draw_over_optimisation(report: Mapping[str, Any], path: Path) -> bool:
    """(e) Exact and learned score as KL grows: best-of-n by n, the two long trainings by their checkpoints."""
    from matplotlib.figure import Figure

    start, sft = {"mean": 0.0, "sd": None}, report["sft"]
    curves: list[tuple[str, list[Any]]] = [("best of n", report["best_of_n"])] if report["best_of_n"] else []
    for name in OVER_OPTIMISED:
        if name in report["entries"]:
            entry = report["entries"][name]
            curves.append((entry["label"], [{"kl": start, **sft}, *_middle(entry)["way"]]))
    if not curves:
        return False
    figure = Figure(figsize=(4.2 * len(curves), 4), layout="constrained")
    for axes, (label, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        kl = [p["kl"] for p in points]
        _line(axes, kl, [p["learned"] for p in points], label="learned score", color="C1", marker="s", linestyle="--")
        _line(axes, kl, [p["score"] for p in points], label="exact score", color="C0", marker="o")
        axes.set(title=label, ylabel="score")
        _nats(axes)
        _legend(axes, outside=False)
        _plain(axes)
    figure.suptitle("Going on: what the reward model says, and what is true")
    return _save(figure, path)


# ---- parts


def _axes(size: tuple[float, float]) -> tuple[Any, "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _style(name: str) -> dict[str, Any]:
    place = NAMES.index(name)
    return {
        "color": f"C{place % 10}",
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < 10 else "--",
    }


def _line(axes: "Axes", x: Sequence[Mapping[str, Any]], y: Sequence[Mapping[str, Any]], **style: Any) -> None:
    axes.errorbar(
        [point["mean"] for point in x], [point["mean"] for point in y], xerr=_errors(x), yerr=_errors(y),
        capsize=2, elinewidth=0.8, markersize=6, linewidth=1.3, **style,
    )  # fmt: skip


def _errors(points: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """None where there is but one seed."""
    return None if all(p["sd"] is None for p in points) else [p["sd"] or 0.0 for p in points]


def _nats(axes: "Axes") -> None:
    """A root's scale: most of what happens does so within a few nats, and some methods go very far."""
    most = float(axes.dataLim.x1)
    axes.set_xscale("function", functions=(lambda x: x.clip(0) ** 0.5, lambda x: x**2))
    ticks = [0.0]
    for tick in NATS:
        if tick <= max(most, 1) * 1.2 and tick**0.5 - ticks[-1] ** 0.5 > 0.06 * max(most, 1) ** 0.5:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlim(0, max(most, 1) * 1.15)
    axes.set_xlabel("KL to the SFT policy (nats an answer)")


def _half(axes: "Axes") -> None:
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")


def _legend(axes: "Axes", outside: bool = True) -> None:
    if outside:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(frameon=False, fontsize="small")


def _middle(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point that stands for an entry."""
    found: Mapping[str, Any] = next((p for p in entry["points"] if p["value"] == entry["middle"]), entry["points"][0])
    return found


def _with(report: Mapping[str, Any], series: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, entry) for name, entry in report["entries"].items() if series in _middle(entry)]


def _swept(entry: Mapping[str, Any]) -> str:
    """`DPO, beta 1 to 0.05`."""
    values = [p["value"] for p in entry["points"]]
    if entry["sweep"] is None:
        return str(entry["label"])
    return f"{entry['label']}, {entry['sweep']} {values[0]:g} to {values[-1]:g}"


def _save(figure: Any, path: Path) -> bool:
    figure.savefig(path, dpi=DPI)
    return True
