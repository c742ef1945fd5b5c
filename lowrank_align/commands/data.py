"""`lowrank-align data`: rows into the store, rows out of it, and what it says of itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lowrank_align.config import (
    DataBackupSettings,
    DataConvertSettings,
    DataExportSettings,
    DataImportSettings,
    DataStatsSettings,
)
from lowrank_align.data.conversion import convert
from lowrank_align.data.formats import Shape
from lowrank_align.data.load import load_rows
from lowrank_align.data.stored import Imported, export_rows, import_rows
from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.ratings import WinRate
from lowrank_align.store import Store
from lowrank_align.store.encoding import to_json
from lowrank_align.store.stats import Stats, stats
from lowrank_align.terminal import make_console, say


def data_import(settings: DataImportSettings) -> None:
    """Put the rows of a file into a store."""
    aside = Path(f"{Path(settings.file).name}.bad.jsonl") if settings.skip_bad else None
    with Store(settings.store) as store:
        done = import_rows(store, settings.file, annotator=settings.annotator, skip_bad=aside)
        for line in import_lines(done, aside):
            say(f"{settings.file}: {line}")
        say(f"{settings.store}: {_many(store.count(), 'judgement')}, {_many(store.queue_total(), 'prompt')}")


def data_export(settings: DataExportSettings) -> None:
    """Write one kind of row."""
    out = _free(settings.out, settings.overwrite)
    with Store(settings.store, create=False) as store:
        filters = {} if settings.annotator is None else {"annotator": settings.annotator}
        export = export_rows(store, settings.kind, **filters)
    _write(settings.store, settings.kind, out, export.lines, export.left_out)


def data_convert(settings: DataConvertSettings) -> None:
    """Write the rows of a file in another shape."""
    out = _free(settings.out, settings.overwrite)
    aside = Path(f"{Path(settings.file).name}.bad.jsonl") if settings.skip_bad else None
    loaded = load_rows(settings.file, expect=frozenset(Shape), skip_bad=aside)
    done = convert(
        loaded.rows,
        settings.to,
        source=settings.file,
        pairing=settings.pairing,
        threshold=settings.threshold,
        min_difference=settings.min_difference,
        keep_ties=settings.ties == "keep",
    )
    for name, count in loaded.conversions.items():
        say(f"{settings.file}: {count} rows read as {name}")
    shape = loaded.rows[0].shape
    say(f"{settings.file}: {_many(len(loaded.rows), f'{shape} row')}, {_many(done.groups, 'group')} of answers")
    if loaded.skipped:
        say(f"{settings.file}: {loaded.skipped} bad, set aside in {aside}")
    _write(settings.file, settings.to, out, done.lines, {reason: n for reason, n in done.left_out.items() if n})


def _free(name: str, overwrite: bool) -> Path:
    """The file to write, which may be written."""
    out = Path(name).expanduser()
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a .jsonl file with --out")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists; --overwrite replaces it")
    return out


def _write(source: str, kind: str, out: Path, lines: Sequence[Mapping[str, Any]], left_out: Mapping[str, int]) -> None:
    told = [f"{count} left out: {reason}" for reason, count in left_out.items()]
    if not lines:
        raise UserError("; ".join([f"{source}: nothing to write as {kind}", *told]))
    _make_folder(out)
    write_atomic(out, "".join(to_json(line) + "\n" for line in lines))
    say(f"{out}: {_many(len(lines), 'line')}")
    for line in told:
        say(f"  {line}")


def _make_folder(out: Path) -> None:
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot be written: {error.strerror or error}") from None


def data_stats(settings: DataStatsSettings) -> None:
    """Print the figures."""
    with Store(settings.store, create=False) as store:
        found = stats(store, settings.annotator)
    if settings.as_json:
        say(json.dumps(found.as_json(), ensure_ascii=False, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in stats_lines(found):
        table.add_row(name, value)
    make_console(markup=False).print(table)


def data_backup(settings: DataBackupSettings) -> None:
    """Copy the store."""
    out = Path(settings.out).expanduser()
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file with --out")
    if out.exists():
        raise UserError(f"{out}: exists, and a backup replaces nothing; name another file with --out")
    with Store(settings.store, create=False) as store:
        _make_folder(out)
        try:
            store.back_up(out)
        except FileExistsError:
            raise UserError(f"{out}: another process has just made it; name another file with --out") from None
    with Store(out, create=False) as copied:
        found = f"{_many(copied.count(deleted=None), 'judgement')}, {_many(copied.queue_total(), 'prompt')}"
    print(f"{out}: {found}")


def import_lines(done: Imported, aside: Path | None = None) -> list[str]:
    """What came of a file's rows, a line each."""
    lines = [f"{count} rows read as {name}" for name, count in done.conversions.items()]
    added = [_many(done.judgements, "judgement")] * bool(done.judgements)
    added += [_many(done.prompts, "prompt")] * bool(done.prompts)
    lines.append(f"{' and '.join(added) or 'nothing'} added")
    told = {
        "there already": done.duplicates,
        "further lines of the same records": done.more_lines,
        "changed since they were exported, taken as new": done.changed,
        "judged otherwise here since, kept as they are here": done.kept,
        f"bad, set aside in {aside}": done.skipped,
    }
    return [*lines, *(f"{count} {what}" for what, count in told.items() if count)]


def stats_lines(found: Stats) -> list[tuple[str, str]]:
    """A name and its figures in words, a line each; what there is nothing to say of is left out."""
    gone = {"deleted": found.deleted, "taken back": found.taken_back, "shown but not judged": found.not_judged}
    pace = [
        f"{found.pace.per_minute:.1f} a minute" if found.pace.per_minute is not None else "",
        f"{found.pace.median_seconds:.1f} s for half of them" if found.pace.median_seconds is not None else "",
    ]
    left = "" if found.queue_left is None else f", {found.queue_left} left"
    kappa = found.agreement
    agreed = f"{100 * kappa.share:.0f} % of {kappa.comparisons} ({100 * kappa.low:.0f}-{100 * kappa.high:.0f} %)"
    lines = {
        "judgements": str(found.entries),
        "  by verdict": _listed(found.verdicts),
        "  by kind": _listed(found.kinds),
        "  by annotator": _listed(found.annotators) if len(found.annotators) > 1 else "",
        "  not among them": _listed({name: count for name, count in gone.items() if count}),
        "with an edit or written": str(found.edited) if found.edited else "",
        "ties": _share(found.ties),
        "the left side won": _share(found.left_side),
        "the longer one was chosen": _share(found.longer),
        "pace": ", ".join(filter(None, pace)),
        "duplicates": str(found.duplicates) if found.duplicates else "",
        "contradictions": str(found.contradictions) if found.contradictions else "",
        "decided as before when shown again": _share(found.consistency),
        "annotators agree": agreed if kappa.comparisons else "",
        "prompts in the queue": f"{found.queue_total}{left}" if found.queue_total else "",
    }
    return [(name, value) for name, value in lines.items() if value]


def _share(found: WinRate) -> str:
    if not found.total:
        return ""
    return f"{100 * found.rate:.0f} % of {found.total} ({100 * found.low:.0f}-{100 * found.high:.0f} %)"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
