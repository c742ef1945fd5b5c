"""What was measured, in words: the same tables on the terminal and in `report.md`, the figures in `report.json`."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem
from lowrank_align.evaluate.outcomes import Comparison, Interval
from lowrank_align.ratings import Agreement, WinRate

JSON, MARKDOWN, ANSWERS = "report.json", "report.md", "answers.jsonl"
PLOTS = ("wins.png", "calibration.png", "score_length.png", "answers_length.png")
FILES = {JSON, MARKDOWN, ANSWERS, *PLOTS}


@dataclass(frozen=True)
class Table:
    """One thing that was measured; cells are words, notes say how to read them."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()


@dataclass
class Report:
    """All of it. `figures` is what `report.json` holds, a section for each thing that was asked for."""

    figures: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)  # by file name, what draws it
    answers: list[dict[str, Any]] = field(default_factory=list)

    def add(self, section: str, figures: Any, *tables: Table) -> None:
        self.figures[section] = figures
        self.tables += tables

    def print(self, console: Console) -> None:
        """The tables, on a terminal."""
        for table in self.tables:
            drawn = RichTable(
                title=escape(table.title), title_justify="left", title_style="bold", box=None, pad_edge=False
            )
            for place, name in enumerate(table.columns):
                drawn.add_column(escape(name), justify="left" if place == 0 else "right", overflow="fold")
            for row in table.rows:
                drawn.add_row(*map(escape, row))
            console.print(drawn)
            for note in table.notes:
                console.print(f"  {note}", style="dim", markup=False)
            console.print()

    def write(self, folder: Path) -> list[str]:
        """Everything into a folder, in place of an older report there; the files' names. EnvironmentProblem where it
        cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
            text = json.dumps(plain(self.figures), indent=2, ensure_ascii=False)
            write_atomic(folder / JSON, text + "\n")
            write_atomic(folder / MARKDOWN, "\n".join(self._markdown()) + "\n")
            if self.answers:
                lines = (json.dumps(plain(line), ensure_ascii=False) + "\n" for line in self.answers)
                write_atomic(folder / ANSWERS, "".join(lines))
            for name, draw in self.plots.items():
                draw(folder / name)
        except OSError as error:
            raise EnvironmentProblem(f"{folder}: cannot be written: {error.strerror or error}") from error
        return sorted(name for name in FILES if (folder / name).exists())

    def _markdown(self) -> Iterator[str]:
        yield "# Evaluation"
        for table in self.tables:
            yield f"\n## {table.title}\n"
            yield f"| {' | '.join(map(_cell, table.columns))} |"
            yield f"|{' --- |' * len(table.columns)}"
            for row in table.rows:
                yield f"| {' | '.join(map(_cell, row))} |"
            for note in table.notes:
                yield f"\n{note}"
        for name in self.plots:
            yield f"\n![{name.removesuffix('.png').replace('_', ' ')}]({name})"


def plain(value: Any) -> Any:
    """Dataclasses and named tuples as objects, numbers that are not finite as null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in asdict(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- figures as words


def percent(value: float) -> str:
    """A share in percent; "-" where there was nothing to count."""
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def between(low: float, high: float) -> str:
    return f"({100 * low:.0f}-{100 * high:.0f} %)"


def share(found: WinRate) -> str:
    """A share with its interval, and of how many."""
    return f"{percent(found.rate)} {between(found.low, found.high)} of {found.total}" if found.total else "-"


def number(found: Interval, digits: int = 3) -> str:
    """A figure with its interval."""
    if math.isnan(found.value):
        return "-"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def figure(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def agreed(found: Agreement) -> str:
    return (
        f"{percent(found.share)} {between(found.low, found.high)} of {found.comparisons}" if found.comparisons else "-"
    )


def comparison_table(title: str, by_judge: Mapping[str, Comparison], *notes: str) -> Table:
    """A column a judge, which fits a narrow terminal."""
    columns = [_comparison_cells(found) for found in by_judge.values()]
    return Table(title, ("judge", *by_judge), list(zip(COMPARISON_ROWS, *columns, strict=True)), notes)


COMPARISON_ROWS = ("won", "tied", "lost", "win rate", "won - lost, points", "at equal length", "undecided")


def _comparison_cells(found: Comparison) -> tuple[str, ...]:
    """What stands beside `COMPARISON_ROWS`."""
    rate, controlled = found.win_rate, found.length_controlled
    delta = (
        "-"
        if not rate.total
        else f"{100 * found.delta.value:+.0f} ({100 * found.delta.low:+.0f} to {100 * found.delta.high:+.0f})"
    )
    return (
        str(rate.wins),
        str(rate.ties),
        str(rate.losses),
        f"{percent(rate.rate)} {between(rate.low, rate.high)}" if rate.total else "-",
        delta,
        "-" if controlled is None else f"{percent(controlled.rate.value)} {between(*controlled.rate[1:])}",
        str(found.undecided),
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def listed(counts: Mapping[str, int]) -> str:
    """`3 a tie, 1 too long`."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def many(count: int, what: str, plural: str = "") -> str:
    return f"{count} {what if count == 1 else plural or what + 's'}"


def all_rows(title: str, rows: Sequence[tuple[str, str]], *notes: str) -> Table:
    """A table of two columns: what, and the figure."""
    return Table(title, ("", "figure"), list(rows), notes)
