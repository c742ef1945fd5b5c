"""The rows of a run: a view of the store, or a file, frozen beside the run so that it can be resumed and repeated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_align.data.shapes import Shape
from lowrank_align.data.sources import DATA_SUFFIXES
from lowrank_align.durable import write_atomic
from lowrank_align.errors import UserError
from lowrank_align.methods import method_class
from lowrank_align.store.export import COLUMN, export_lines
from lowrank_align.studio.run_request import View

if TYPE_CHECKING:
    from lowrank_align.studio.studio import Studio

ROWS = ".data"  # runs/dpo-1.data.jsonl stands beside runs/dpo-1
SUFFIX = f"{ROWS}.jsonl"  # of a frozen view
EXPORTS = {  # what the store calls the rows of a shape, what people call them, and where they come from
    Shape.pair: ("pairs", "judged pairs", "Collect some first: every choice, tie or edit in Collect and Arena is one."),
    Shape.demonstration: ("demonstrations", "demonstrations", "Write or mend a few answers in Collect first."),
    Shape.unpaired: ("unpaired", "rated answers", "Give a few thumbs in Chat first."),
    Shape.ranking: ("rankings", "rankings", "Rank a few answers in Collect first."),
    Shape.prompts: ("prompts", "prompts", "Import a file of prompts in Data first."),
}


def frozen_file(studio: "Studio", name: str) -> Path:
    """Where the rows of the run `name` are kept."""
    return studio.runs / f"{name}{SUFFIX}"


def rows_of_view(studio: "Studio", method: str, view: View) -> tuple[list[str], dict[str, int]]:
    """The view's rows for a method as JSON lines, and what was left out by reason. UserError where there are none."""
    wanted = [shape for shape in EXPORTS if shape in method_class(method).shapes]
    if not wanted:
        raise UserError(f"{method}: the store has no rows of its shape; give a file")
    filters = {"annotator": view.annotator, "tag": view.tag}
    filters = {name: value for name, value in filters.items() if value is not None}
    exports = [export_lines(studio.store, EXPORTS[shape][0], **filters) for shape in wanted]
    rows = [{name: value for name, value in line.items() if name != COLUMN} for e in exports for line in e.lines]
    if not rows:
        _, what, remedy = EXPORTS[wanted[0]]
        whose = f" by {view.annotator}" if view.annotator else ""
        tagged = f" with the tag {view.tag}" if view.tag else ""
        raise UserError(
            f"nothing to learn from: {method} takes {what}, and there are none{whose}{tagged} yet. {remedy}"
        )
    # what one export leaves out another may hold: a ranking is no pair
    left_out = {why: min(e.left_out.get(why, 0) for e in exports) for why in exports[0].left_out}
    return [json.dumps(row, ensure_ascii=False) for row in rows], {why: n for why, n in left_out.items() if n}


def freeze(studio: "Studio", method: str, data: View | Path, into: Path) -> tuple[Path, int]:
    """Write the rows to the file `into` (an upload with its own suffix); the file, and how many lines it has.

    A file that is beside the runs already is taken as it is. UserError for a file that is not under one of the folders
    that belong to the studio.
    """
    if isinstance(data, View):
        lines, _ = rows_of_view(studio, method, data)
        into.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(into, "\n".join(lines) + "\n")
        return into, len(lines)
    source = data.resolve()
    if source.is_relative_to(studio.runs.resolve()):
        return data, 0
    into = into.with_name(into.name.removesuffix(SUFFIX) + ROWS + "".join(source.suffixes[-2:]))
    into.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(into, source.read_bytes())  # also in the place of a link
    return into, 0


def files_beside(studio: "Studio") -> list[Path]:
    """The data files in the folder of the runs, which the page offers by name."""
    if not studio.runs.is_dir():
        return []
    return sorted(file for file in studio.runs.iterdir() if file.is_file() and file.name.endswith(DATA_SUFFIXES))


def allowed(studio: "Studio", given: str | Path, uploads: Sequence[Path] = ()) -> Path:
    """A file that the page may read: in the folder of the runs, or uploaded. UserError for any other."""
    path = Path(given)
    found = (path if path.is_absolute() else studio.runs / path).resolve()
    folders = [studio.runs.resolve(), *(upload.resolve() for upload in uploads)]
    if not any(found.is_relative_to(folder) for folder in folders):
        raise UserError(f"{path.name}: not in the folder of the runs ({studio.runs}); put it there, or upload it")
    if not found.is_file():
        raise UserError(f"{path.name}: no such file in {studio.runs}; put it there, or upload it")
    return found
