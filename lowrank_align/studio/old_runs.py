"""What the folder of the runs tells: which can be resumed, which names are free, how fast a method went here."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lowrank_align.checkpoint import sealed_steps
from lowrank_align.config import METHODS, TrainSettings, read_yaml, resolve
from lowrank_align.errors import UserError
from lowrank_align.listing import TAIL_BYTES, find_runs
from lowrank_align.provenance import read_provenance
from lowrank_align.runs import CONFIG, METRICS, is_running, read_metrics, read_state
from lowrank_align.studio.run_data import ROWS

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio


@dataclass(frozen=True)
class Resumable:
    """A run that did not end: its name, and what to say of it."""

    name: str
    method: str
    step: int  # of its newest checkpoint; 0: it begins anew
    sentence: str


@dataclass(frozen=True)
class Pace:
    """How fast a method went on this base: an older run's seconds a row."""

    run: str
    seconds_a_row: float


def resumable_runs(studio: "Studio") -> list[Resumable]:
    """The runs of this base that were stopped or died, the newest first. Whoever runs now is none of them."""
    found = []
    for run in find_runs(studio.runs):
        state = read_state(run)
        if state is None or state["state"] == "finished" or is_running(run) or not (run / CONFIG).is_file():
            continue
        record = _record(run)
        method = state.get("method") or record.get("method") or ""
        if method not in METHODS or record.get("base_hash") not in (None, studio.base.weights_hash):
            continue
        name, steps = str(run.relative_to(studio.runs)), sealed_steps(run / "checkpoints")
        step = max(steps, default=0)
        how = "was stopped" if state["state"] == "stopped" else "broke off"
        where = f"goes on from step {step}" if step else "begins again: it broke off before its first checkpoint"
        found.append(
            (state.get("started") or "", Resumable(name, method, step, f"{name} ({method}) {how}; it {where}."))
        )
    return [one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True)]


def settings_to_resume(studio: "Studio", name: str) -> TrainSettings:
    """The settings with which the run goes on. UserError where it cannot on this base."""
    run = studio.runs / name
    known = [one.name for one in resumable_runs(studio)]
    if name not in known:
        raise UserError(f"{name}: nothing to resume; choose a run from the list" if known else "no run can be resumed")
    config = read_yaml(run / CONFIG)
    method = str(config.get("method") or (read_state(run) or {}).get("method"))
    settings = resolve(METHODS[method], {"out": str(run), "resume": True, "auto": True}, run / CONFIG)
    if settings.quantize != studio.base.quantize:
        raise UserError(
            f"{name}: began on a base with quantize {settings.quantize}, this one has {studio.base.quantize}; "
            "start the studio with the run's"
        )
    return settings


def fresh_name(studio: "Studio", method: str, besides: str = "") -> str:
    """`dpo-3` where dpo-1 and dpo-2 are taken, or one of them is `besides`."""
    number = 1
    while (name := f"{method}-{number}") == besides or is_taken(studio, name):
        number += 1
    return f"{method}-{number}"


def is_taken(studio: "Studio", name: str) -> bool:
    """Whether a run of that name, or its rows, are there already; rows alone are left by a run that never began."""
    folder = studio.runs / name
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def pace(studio: "Studio", method: str) -> Pace | None:
    """Of the newest run of this method on this base; None where there is none."""
    newest: tuple[str, Pace] | None = None
    for run in find_runs(studio.runs):
        state, record = read_state(run) or {}, _record(run)
        if record.get("method") != method or record.get("base_hash") != studio.base.weights_hash:
            continue
        config = record.get("config") or {}
        seconds = [
            entry["seconds"] for entry in read_metrics(run / METRICS, TAIL_BYTES) if _is_number(entry, "seconds")
        ]
        rows = config.get("batch_size")
        if not seconds or not isinstance(rows, int) or config.get("quantize") != studio.base.quantize:
            continue
        found = Pace(str(run.relative_to(studio.runs)), median(seconds) / rows)
        if newest is None or (state.get("started") or "") >= newest[0]:
            newest = (state.get("started") or "", found)
    return newest[1] if newest else None


def finished_runs(studio: "Studio", method: str) -> int:
    """How many runs of a method on this base are complete."""
    runs = (run for run in find_runs(studio.runs) if (read_state(run) or {}).get("state") == "finished")
    records = (_record(run) for run in runs)
    return sum(r.get("method") == method and r.get("base_hash") == studio.base.weights_hash for r in records)


def forget_unused_rows(studio: "Studio", name: str) -> None:
    """Take the frozen rows away where the run failed before it had a folder."""
    if not (studio.runs / name).exists():
        for file in studio.runs.glob(f"{name}{ROWS}.*"):
            file.unlink(missing_ok=True)


def _record(run: Path) -> dict[str, Any]:
    try:
        return read_provenance(run) or {}
    except UserError:
        return {}


def _is_number(entry: dict[str, Any], name: str) -> bool:
    return isinstance(entry.get(name), (int, float))
