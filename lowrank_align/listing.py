"""All runs of a folder: listed, compared, deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_align.checkpoint import sealed_steps
from lowrank_align.errors import UserError
from lowrank_align.out_folders import refuse_protected
from lowrank_align.provenance import read_provenance
from lowrank_align.runs import (
    CONFIG,
    METRICS,
    STATE,
    SUBFOLDERS,
    FolderLock,
    empty,
    is_running,
    looks_like_run,
    read_metrics,
    read_state,
    refuse_running,
)

if TYPE_CHECKING:
    from rich.console import Console

LISTING_DEPTH = 3
TAIL_BYTES = 2**16
KEY_METRICS = {"objective/scores": "score", "rewards/accuracies": "accuracy", "eval_loss": "eval loss"}


@dataclass
class RunInfo:
    """One line of the listing. `state` is running, finished, stopped, or stopped (resumable)."""

    path: Path
    name: str
    method: str
    state: str
    steps: int
    created: str
    disk_bytes: int
    base: str
    parent: str | None
    metrics: dict[str, float]  # the last value of each

    @property
    def key_metric(self) -> tuple[str, float] | None:
        """The one figure beside the loss that tells how such a run went."""
        return next(((short, self.metrics[name]) for name, short in KEY_METRICS.items() if name in self.metrics), None)


@dataclass
class Comparison:
    """What differs between runs: for each key, or metric, one value a run (None where a run has none)."""

    names: list[str]
    config: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)


def list_runs(folder: Path) -> list[RunInfo]:
    """The runs in `folder`, and in runs that hold others, by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; runs are where --out put them")
    return [_info(path, folder) for path in sorted(find_runs(folder))]


def compare_runs(paths: list[Path]) -> Comparison:
    """The configuration keys in which the runs differ, and the last value of every metric."""
    from lowrank_align.config import read_yaml

    for path in paths:
        if not looks_like_run(path):
            raise UserError(f"{path}: not a run's folder (no {STATE} or {CONFIG})")
    configs = [read_yaml(path / CONFIG) if (path / CONFIG).exists() else {} for path in paths]
    configs = [{"method": _info(path, path).method, **config} for path, config in zip(paths, configs, strict=True)]
    metrics = [_last_metrics(path) for path in paths]
    keys = sorted(set().union(*configs))
    columns = {key: [config.get(key) for config in configs] for key in keys}
    return Comparison(
        [str(path) for path in paths],
        {key: values for key, values in columns.items() if any(value != values[0] for value in values)},
        {name: [one.get(name) for one in metrics] for name in sorted(set().union(*metrics))},
    )


def deletion_notice(path: Path) -> str:
    """One line on what `delete_run` would remove and which runs started from it, to ask with; the same refusals."""
    from rich.filesize import decimal

    path = Path(path)
    if not looks_like_run(path):
        raise UserError(f"{path}: not a run's folder (no {STATE} or {CONFIG}); nothing is deleted")
    refuse_protected(path)
    refuse_running(path)
    info = _info(path, path.parent)
    children = [run.name for run in list_runs(path.parent) if run.parent and _same_run(run.parent, path)]
    heirs = f"; {', '.join(children)} started from it" if children else ""
    return f"{path}: {info.method or 'run'}, {info.state}, {info.steps} steps, {decimal(info.disk_bytes)}{heirs}"


def delete_run(path: Path) -> str:
    """Remove a run that no process has open. Returns the `deletion_notice` of what is gone."""
    notice, path = deletion_notice(path), Path(path).resolve()
    lock = FolderLock(path)
    try:
        empty(path)
    except BaseException:
        lock.release()
        raise
    lock.release(remove=True)
    path.rmdir()
    return notice


def print_runs(folder: Path, console: Console) -> None:
    """The listing as a table."""
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("run", "method", "state", "steps", "loss", "metric", "disk", "created", "from"):
        numbers, whole = heading in ("steps", "loss", "disk"), heading not in ("run", "from")
        table.add_column(
            heading,
            justify="right" if numbers else "left",
            overflow="fold",
            no_wrap=whole,
            min_width=12 if heading == "run" else None,
        )
    runs = list_runs(folder)
    for run in runs:
        metric = f"{run.key_metric[0]} {run.key_metric[1]:.3g}" if run.key_metric else ""
        loss = f"{run.metrics['loss']:.4g}" if "loss" in run.metrics else ""
        created, origin = run.created[5:10], Path(run.parent or run.base).name
        cells = (
            run.name,
            run.method,
            run.state,
            str(run.steps),
            loss,
            metric,
            decimal(run.disk_bytes),
            created,
            origin,
        )
        table.add_row(*map(escape, cells))
    total = decimal(sum(run.disk_bytes for run in runs if not any(other.path in run.path.parents for other in runs)))
    console.print(table if runs else f"{escape(str(folder))}: no runs")
    if runs:
        console.print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}, {total}")


def print_comparison(a: Path, b: Path, console: Console) -> None:
    """Two runs side by side: differing configuration, then the last metrics."""
    from rich.markup import escape
    from rich.table import Table

    comparison = compare_runs([Path(a), Path(b)])
    for title, rows in (("configuration that differs", comparison.config), ("last metrics", comparison.metrics)):
        table = Table("", *map(escape, comparison.names), title=title, title_justify="left", box=None, pad_edge=False)
        for key, values in rows.items():
            shown = ("-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)
            table.add_row(escape(key), *map(escape, shown))
        console.print(table if rows else f"{title}: none")


def find_runs(folder: Path, depth: int = LISTING_DEPTH) -> Iterator[Path]:
    """The folders of runs in `folder`, and in runs that hold others; none where the folder is not there."""
    if not folder.is_dir():
        return
    is_run = looks_like_run(folder)
    if is_run:
        yield folder
    if depth:
        for entry in folder.iterdir():
            hidden = entry.name.startswith(".") or (is_run and entry.name in SUBFOLDERS)
            if entry.is_dir() and not entry.is_symlink() and not hidden:
                yield from find_runs(entry, depth - 1)


def _info(path: Path, folder: Path) -> RunInfo:
    state, provenance, metrics = read_state(path) or {}, {}, _last_metrics(path)
    with contextlib.suppress(UserError):
        provenance = read_provenance(path) or {}
    if is_running(path):
        shown = "running"
    elif state.get("state") == "finished":
        shown = "finished"
    else:
        shown = "stopped (resumable)" if sealed_steps(path / "checkpoints") else "stopped"
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    created = _text(state.get("started")) or datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat("T", "seconds")
    parent = provenance.get("parent")
    steps = state.get("steps")
    return RunInfo(
        path=path,
        name=path.name if path == folder else str(path.relative_to(folder)),
        method=_text(state.get("method")) or _text(provenance.get("method")),
        state=shown,
        steps=max(steps if isinstance(steps, int) else 0, int(metrics.pop("step", 0))),
        created=created,
        disk_bytes=sum(file.stat().st_size for file in files),
        base=_text(provenance.get("base")),
        parent=_text(parent.get("run")) or None if isinstance(parent, dict) else None,
        metrics=metrics,
    )


def _last_metrics(path: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    for line in read_metrics(path / METRICS, TAIL_BYTES):
        last |= {name: float(value) for name, value in line.items() if _is_figure(value)}
    return last


def _text(value: Any) -> str:
    """A text of a file that anybody may have written."""
    return value if isinstance(value, str) else ""


def _is_figure(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _same_run(named: str, path: Path) -> bool:
    """Whether a provenance's parent, given from the current folder or from beside the run, is `path`."""
    return path.resolve() in (Path(named).resolve(), (path.parent / named).resolve())
