"""Data: what has been judged, to browse, mend, delete, bring back, import and export."""

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from lowrank_align.commands.data import import_lines, stats_lines
from lowrank_align.data.stored import export_rows, import_rows
from lowrank_align.errors import UserError
from lowrank_align.store.encoding import to_json
from lowrank_align.store.stats import stats
from lowrank_align.studio.browsing import ANY, Wanted, check_upload, choices, export_name, listing
from lowrank_align.studio.entry_form import Change, Details, details, save
from lowrank_align.studio.studio import Studio

from .data_parts import ANSWERS, UNDECIDED, Parts, lay_out
from .manners import QUIET, told

# The browser downloads what the hidden button has got by now.
DOWNLOAD = """() => { const press = (tries) => {
  const found = document.querySelector("#data-file"); const link = found && (found.closest("a") || found);
  if (link) link.click(); else if (tries) setTimeout(() => press(tries - 1), 50);
}; setTimeout(() => press(40), 50); }"""


def build(studio: Studio, page: Any) -> None:
    """The tab's components and what they do."""
    Handlers(studio, page, lay_out()).wire()


class Handlers:
    """What happens when something is pressed. A page holds its filters, its place in the list, and the open entry."""

    def __init__(self, studio: Studio, page: Any, parts: Parts) -> None:
        self.studio, self.page, self.parts = studio, page, parts
        p = parts
        self.list_view = [p.page, p.keys, p.table, p.where, p.before, p.after, p.empty, p.hint]
        self.form = [p.verdict, p.order, p.score, p.strength, p.reason, p.tags, p.written, *p.answers]
        self.entry_view = [
            p.chosen, p.entry, p.about, p.prompt, *self.form, p.save, p.delete, p.restore, p.sure, p.history,
        ]  # fmt: skip

    def wire(self) -> None:
        p = self.parts

        def on(trigger: Any, handler: Any, inputs: list[Any], outputs: list[Any]) -> Any:
            return trigger(told(handler), inputs, outputs, **QUIET)

        everything = [p.annotator, p.tag, *self.list_view]
        on(self.page.tab("data").select, self.everything, [p.page, *p.filters], everything)
        added = on(p.upload.upload, self.take_in, [p.upload], [p.imported])
        on(added.success, self.everything, [p.page, *p.filters], everything)
        for component in p.filters:
            trigger = component.submit if isinstance(component, gr.Textbox) else component.input
            on(trigger, self.first_page, p.filters, self.list_view)
        on(p.filters[4].blur, self.first_page, p.filters, self.list_view)
        on(p.before.click, self._turned(-1), [p.page, *p.filters], self.list_view)
        on(p.after.click, self._turned(1), [p.page, *p.filters], self.list_view)
        on(p.table.select, self.open, [p.keys], self.entry_view)
        for button, handler in ((p.save, self.save), (p.really, self.delete), (p.restore, self.restore)):
            done = on(button.click, handler, [p.chosen, *self.form], self.entry_view)
            on(done.success, self.everything, [p.page, *p.filters], everything)
        p.delete.click(lambda: (gr.update(visible=False), gr.update(visible=True)), None, [p.delete, p.sure], **QUIET)
        p.keep.click(lambda: (gr.update(visible=True), gr.update(visible=False)), None, [p.delete, p.sure], **QUIET)
        ready = on(p.export.click, self.export, [p.kind, *p.filters], [p.file, p.exported])
        ready.success(None, None, None, js=DOWNLOAD, **QUIET)
        on(p.figures.expand, self.figures, [], [p.statistics])
        self.page.on_load(self.everything, [p.page, *p.filters], everything)

    # ---- the list

    def everything(self, number: int, *filters: str) -> list[Any]:
        """The list, and what it may be filtered by."""
        annotators, tags = choices(self.studio.store)
        return [gr.update(choices=annotators), gr.update(choices=tags), *self.shown(number, *filters)]

    def figures(self) -> str:
        """What the judgements say of themselves; counted when it is looked at."""
        return "\n".join(f"{name}: {value}" for name, value in stats_lines(stats(self.studio.store)))

    def first_page(self, *filters: str) -> list[Any]:
        return self.shown(1, *filters)

    def _turned(self, by: int) -> Any:
        def turn(number: int, *filters: str) -> list[Any]:
            return self.shown(number + by, *filters)

        return turn

    def shown(self, number: int, *filters: str) -> list[Any]:
        found = listing(self.studio.store, _wanted(*filters), number)
        anything = bool(found.total) or self.studio.store.count(deleted=None) > 0
        return [
            found.page,
            [[row[0], *key] for row, key in zip(found.rows, found.keys, strict=True)],
            gr.update(value=found.rows, visible=anything),
            found.in_words,
            gr.update(interactive=found.page > 1),
            gr.update(interactive=found.page < found.pages),
            gr.update(visible=not anything),
            gr.update(visible=bool(found.total)),
        ]

    # ---- one entry

    def open(self, keys: list[list[str]], event: gr.SelectData) -> list[Any]:
        """The row that was pressed, whatever the table is sorted by: its first cell is its number in the list."""
        here = [key for key in keys if key[0] == event.row_value[0]]
        if not here:
            raise UserError("this row is no longer there; the list has been loaded again")
        return self.view(details(self.studio.store, here[0][1], here[0][2]))

    def save(self, chosen: list[Any], *form: Any) -> list[Any]:
        record_id, who, version = _of(chosen)
        verdict, order, score, strength, reason, tags, written, *answers = form
        change = Change(
            verdict=verdict or "",
            order=order or "",
            score=score or "",
            strength=strength,
            reason=reason or "",
            tags=tags or "",
            written=written or "",
            answers=[answer or "" for answer in answers],
        )
        save(self.studio.store, record_id, who, version, change)
        gr.Info("Saved; the history keeps what was there.", title="", duration=3)
        return self.view(details(self.studio.store, record_id, who))

    def delete(self, chosen: list[Any], *form: Any) -> list[Any]:
        record_id, who, version = _of(chosen)
        self.studio.store.delete(record_id, who, expected_version=version)
        gr.Info("Deleted; Restore, or the rows that are deleted, bring it back.", title="", duration=5)
        return self.view(details(self.studio.store, record_id, who))

    def restore(self, chosen: list[Any], *form: Any) -> list[Any]:
        record_id, who, version = _of(chosen)
        self.studio.store.restore(record_id, who, expected_version=version)
        return self.view(details(self.studio.store, record_id, who))

    def view(self, found: Details) -> list[Any]:
        """The entry, in the order of `entry_view`."""
        boxes = [gr.update(value=answer.text, label=answer.title, visible=True) for answer in found.answers[:ANSWERS]]
        boxes += [gr.update(value="", visible=False)] * (ANSWERS - len(boxes))
        return [
            [found.record_id, found.annotator, found.version],
            gr.update(visible=True),
            ("deleted · " if found.deleted else "") + found.about,
            found.prompt,
            gr.update(choices=found.verdicts, value=found.verdict),
            gr.update(value=found.order, visible=found.ordered),
            gr.update(value=found.score, visible=found.scored),
            found.strength or UNDECIDED,
            found.reason,
            found.tags,
            found.written,
            *boxes,
            gr.update(interactive=not found.deleted),
            gr.update(visible=not found.deleted),
            gr.update(visible=found.deleted),
            gr.update(visible=False),
            found.history,
        ]

    # ---- files

    def take_in(self, path: str) -> str:
        """Rows of an uploaded file, by the same way as `data import`."""
        file = check_upload(Path(path))
        done = import_rows(self.studio.store, file)
        return "\n".join(f"{file.name}: {line}" for line in import_lines(done, None))

    def export(self, kind: str, *filters: str) -> list[Any]:
        """Write what passes the filters to a file of its own, and offer it."""
        wanted = _wanted(*filters).filters() if _filtered(*filters) else {}
        found = export_rows(self.studio.store, kind, **wanted)
        left_out = [f"left out: {count} {reason}" for reason, count in found.left_out.items()]
        if not found.lines:
            raise UserError("; ".join([f"nothing to export as {kind}", *left_out]))
        folder = Path(tempfile.mkdtemp(prefix="export-", dir=os.environ.get("GRADIO_TEMP_DIR")))
        file = folder / export_name(self.studio.store, kind, datetime.now())
        file.write_text("".join(to_json(line) + "\n" for line in found.lines), encoding="utf-8")
        told_lines = [f"{file.name}: {len(found.lines)} line{'s' * (len(found.lines) != 1)}", *left_out]
        return [gr.update(value=str(file)), "\n".join(told_lines)]


def _wanted(verdict: str, annotator: str, kind: str, tag: str, text: str, kept: str) -> Wanted:
    return Wanted(verdict or ANY, annotator or ANY, kind or ANY, tag or ANY, text or "", kept)


def _filtered(*filters: str) -> bool:
    return _wanted(*filters) != Wanted()


def _of(chosen: list[Any]) -> tuple[str, str, int]:
    if not chosen:
        raise UserError("no entry is open: choose a row first")
    record_id, who, version = chosen
    return str(record_id), str(who), int(version)
