"""What came out, over the seeds: `report.json`, `report.md` and a table."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lowrank_align.apps.frontier.entries import RATE_GRID, Entry
from lowrank_align.apps.frontier.planning import Plan, multiple_of
from lowrank_align.apps.frontier.tasks import LIBRARIES
from rich.console import Console
from rich.table import Table

from lowrank_align import __version__
from lowrank_align.durable import write_atomic

if TYPE_CHECKING:
    from lowrank_align.apps.frontier.frontier import Results

FIGURES = ("score", "learned", "kl", "wins", "tokens")


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and standard deviation (n - 1) over the seeds; of one seed there is none."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def gather(plan: Plan, results: "Results") -> dict[str, Any]:
    """The whole report as JSON holds it."""
    starts = [found for task in plan.starts().values() if (found := results.of(task)) is not None]
    entries, failed = {}, []
    for entry in plan.entries:
        points = []
        for value in entry.values:
            multiple = multiple_of(entry, results.multiples)
            tasks = [plan.policy(entry, value, multiple, seed) for seed in plan.seeds]
            found = [result for task in tasks if (result := results.of(task)) is not None]
            failed += [result for result in found if "failed" in result]
            good = [result for result in found if "failed" not in result]
            if good:
                points.append({"value": value, **_point(entry, good)})
        if points:
            entries[entry.name] = {"label": entry.label, "sweep": entry.sweep, "middle": entry.middle, "points": points}
    rewards = [r for seed in plan.seeds for task in plan.reward_tasks(seed) if (r := results.of(task)) is not None]
    failed += [result for result in rewards if "failed" in result]
    tasks = [task for task in plan.final(results.multiples) if task.kind == "best_of"]
    best = [r for task in tasks if (r := results.of(task)) is not None and "failed" not in r]
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"lowrank-align": __version__, **{name: version(name) for name in LIBRARIES}},
        "hardware": {"machine": platform.machine(), "system": platform.system()},
        "ground": asdict(plan.ground),
        "seeds": list(plan.seeds),
        "tuned": plan.tuned,
        "rate_grid": list(RATE_GRID) if plan.tuned else [1.0],
        "rates_taken": results.multiples,
        "rates_tried": {name: _tried(result) for name, result in results.tried.items()},
        "sft": _start(starts),
        "entries": entries,
        "best_of_n": _best_of(best),
        "rewards": _rewards(plan, rewards, starts),
        "missing": [entry.label for entry in plan.missing],
        "failed": [{name: result[name] for name in ("name", "seed", "failed")} for result in failed],
    }


def _tried(result: Mapping[str, Any]) -> Any:
    return result["failed"] if "failed" in result else result["validation"]["score"]


def _point(entry: Entry, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    point: dict[str, Any] = {name: over_seeds([r["test"][name] for r in results]) for name in FIGURES}
    point |= {
        "learning_rate": results[0]["learning_rate"],
        "steps": [r["steps"] for r in results],
        "spent": {kind: round(fmean(r["spent"][kind] for r in results)) for kind in ("generated", "trained", "total")},
        "train_seconds": [round(r["seconds"], 1) for r in results],
    }
    if entry.warm:
        point["temperatures"] = _series(results, "temperatures", "temperature", ("score", "wins"))
    if entry.watched:
        point["way"] = _series(results, "way", None, FIGURES)
    return point


def _series(
    results: Sequence[Mapping[str, Any]], name: str, by: str | None, what: Sequence[str]
) -> list[dict[str, Any]]:
    """Curves of several seeds as one: the points in their order (of checkpoints), the mean of their places."""
    length = min(len(r[name]) for r in results)
    found = []
    for i in range(length):
        at = [r[name][i] for r in results]
        shares = [p["step"] / r["steps"] for p, r in zip(at, results, strict=True)] if by is None else []
        place = {by: at[0][by]} if by else {"share_of_steps": fmean(shares)}
        found.append({**place, **{figure: over_seeds([p[figure] for p in at]) for figure in what}})
    return found


def _start(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        **{name: over_seeds([s["test"][name] for s in starts]) for name in ("score", "learned", "wins", "tokens")},
        "temperatures": _series(starts, "temperatures", "temperature", ("score", "wins")),
        "labels": [s["labels"] for s in starts],
        "spent": {what: round(fmean(s[what]["total"] for s in starts)) for what in ("pairs", "reward")},
        "answer_tokens": fmean(s["answer_tokens"] for s in starts),
    }


def _best_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not results:
        return []
    columns = zip(*(r["counts"] for r in results), strict=True)
    return [{"n": at[0]["n"], **{name: over_seeds([p[name] for p in at]) for name in FIGURES}} for at in columns]


def _rewards(plan: Plan, found: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy over the share of pairs (the start's own reward model has them all), and over LoRA's rank."""
    good = [r for r in found if "failed" not in r]
    shares = []
    for share in plan.shares if good else ():
        of = [r for r in good if r["share"] == share and r["rank"] is None]
        accuracies = [r["accuracy"] for r in of] if share < 1 else [s["reward_accuracy"] for s in starts]
        pairs = [r["pairs"] for r in of] if share < 1 else [s["labels"]["rows"] for s in starts]
        if accuracies:
            shares.append({"share": share, "pairs": fmean(pairs), "accuracy": over_seeds(accuracies)})
    ranks = [
        {"rank": rank, "accuracy": over_seeds([r["accuracy"] for r in good if r["rank"] == rank])}
        for rank in plan.ranks
        if any(r["rank"] == rank for r in good)
    ]
    return {"data": shares, "rank": ranks}


# ---- for people

SHOWN = 5  # of the columns, on a terminal
COLUMNS = ("", "score", "KL (nats)", "wins", "learned", "rate", "generated", "trained")


def rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The table: each entry at the value that stands for it, best score first after SFT."""
    sft = report["sft"]
    found = []
    for entry in report["entries"].values():
        middle = [p for p in entry["points"] if p["value"] == entry["middle"]] or entry["points"]
        point = middle[0]
        label = entry["label"] + (f", {entry['sweep']} {point['value']:g}" if entry["sweep"] else "")
        spent = point["spent"]
        rate, tokens = f"{point['learning_rate']:.1g}", [f"{spent[kind]:,}" for kind in ("generated", "trained")]
        found.append((point["score"]["mean"], [label, *_figures(point), rate, *tokens]))
    if report["best_of_n"]:
        best = report["best_of_n"][-1]
        tokens = [f"{best['tokens']['mean']:,.0f} an answer", f"{report['sft']['spent']['reward']:,}"]
        found.append((best["score"]["mean"], [f"best of {best['n']}", *_figures(best), "", *tokens]))
    ordered = [row for _, row in sorted(found, key=lambda pair: -pair[0])]
    first = ["SFT", with_error(sft["score"]), "0", with_error(sft["wins"]), with_error(sft["learned"]), "", "", ""]
    return [first, *ordered]


def _figures(point: Mapping[str, Any]) -> list[str]:
    return [with_error(point[name]) for name in ("score", "kl", "wins", "learned")]


def with_error(value: Mapping[str, Any]) -> str:
    """`1.31 ± 0.08`; without an error of one seed."""
    mean, sd = value["mean"], value["sd"]
    digits = 2 if abs(mean) < 100 else 0
    return f"{mean:.{digits}f}" + ("" if sd is None or math.isnan(sd) else f" ± {sd:.{digits}f}")


def print_table(report: Mapping[str, Any], console: Console) -> None:
    """The table, and what is not in it."""
    table = Table(*COLUMNS[:SHOWN], box=None, title=f"{report['ground']['model']}, {many_seeds(report)}")
    for place, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if place else "left", place > 0
    for row in rows(report):
        table.add_row(*row[:SHOWN])
    console.print(table)
    for line in left_out(report):
        console.print(line, markup=False, soft_wrap=True)


def left_out(report: Mapping[str, Any]) -> list[str]:
    """What the figure does not show, a line each."""
    lines = [f"not in this installation: {', '.join(report['missing'])}"] if report["missing"] else []
    return lines + [f"failed: {f['name']}, seed {f['seed']}: {f['failed']}" for f in report["failed"]]


def write_markdown(report: Mapping[str, Any], pictures: Sequence[str], path: Path) -> None:
    """The report as a page."""
    ground, labels = report["ground"], _labels(report["sft"]["labels"])
    grid = ", ".join(f"{m:g}" for m in report["rate_grid"])
    tuning = (
        f"Learning rates: {grid} times an entry's own, tried on the first seed; the best exact score on validation "
        "prompts was taken." if report["tuned"] else "Learning rates were not tuned."
    )  # fmt: skip
    lines = [
        f"# What each method reaches on {ground['model']}, and how far it goes",
        "",
        f"{many_seeds(report).capitalize()}, each from its own SFT policy. {labels} "
        f"{ground['held_out']} held-out prompts. "
        f"Every method may generate and train {ground['budget_tokens']:,} tokens of answers, pairs and reward model "
        f"among them (the two that go on for over-optimisation three times as many). {tuning} "
        "± is the standard deviation over seeds.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(report)),
        "",
        LEGEND,
        "",
        *(f"- {line}" for line in left_out(report)),
        "",
        *(line for name in pictures for line in (f"![{name}]({name})", "")),
        f"Made {report['made'][:10]} with " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
        "",
    ]
    write_atomic(path, "\n".join(lines))


LEGEND = (
    "Score: exact, by program. KL: to the SFT policy, in nats an answer (of best-of-n its bound, log n - (n - 1)/n). "
    "Wins: share of held-out prompts where the exact score is above that of SFT's own answer, a tie half. Learned: the "
    "score of the reward model. Rate: the learning rate taken. Generated and trained: tokens of answers that the entry "
    "spent in all, of a token trained by two roles both."
)


def many_seeds(report: Mapping[str, Any]) -> str:
    """`1 seed`, `3 seeds`."""
    count = len(report["seeds"])
    return f"{count} seed" + "s" * (count != 1)


def _labels(labels: Sequence[Mapping[str, Any]]) -> str:
    rows = sum(one["rows"] for one in labels)
    flipped = sum(one["flipped"] for one in labels) / rows
    right = [one["as_scored"] for one in labels if one["as_scored"] is not None]
    agreed = f", so that {fmean(right):.0%} are as the exact score has them" if right else ""
    return (
        f"{rows / len(labels):.0f} pairs of its answers, labelled by five annotators with habits of their own and "
        f"{flipped:.0%} of the labels flipped{agreed}."
    )
