"""The components of the Data tab, in the order in which they stand."""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from lowrank_align.store.export import EXPORTS
from lowrank_align.store.records import KINDS, VERDICTS
from lowrank_align.studio.browsing import ANY, DELETED, HEADERS, STANDING, SUFFIXES
from lowrank_align.studio.entry_words import STRENGTHS

from .manners import plain

ANSWERS = 6  # boxes for the answers of one entry
UNDECIDED = "not said"
EMPTY = (
    "Nothing here yet. Judge a few pairs in Collect, or import a file of rows below: pairs, rankings, demonstrations, "
    "rated answers or prompts."
)
CHOOSE = "Choose a row to see all of it, change it, delete it, or follow its history."


@dataclass
class Parts:
    """Every component that a handler reads or changes."""

    chosen: Any = None  # record, annotator and version of the entry that is open
    page: Any = None  # of the list, from 1
    keys: Any = None  # number, record and annotator of each row that is listed
    filters: list[Any] = field(default_factory=list)
    annotator: Any = None
    tag: Any = None
    empty: Any = None
    table: Any = None
    where: Any = None
    before: Any = None
    after: Any = None
    hint: Any = None
    entry: Any = None
    about: Any = None
    prompt: Any = None
    answers: list[Any] = field(default_factory=list)
    verdict: Any = None
    order: Any = None
    score: Any = None
    strength: Any = None
    reason: Any = None
    tags: Any = None
    written: Any = None
    save: Any = None
    delete: Any = None
    sure: Any = None
    really: Any = None
    keep: Any = None
    restore: Any = None
    history: Any = None
    figures: Any = None
    statistics: Any = None
    upload: Any = None
    imported: Any = None
    kind: Any = None
    export: Any = None
    file: Any = None
    exported: Any = None


def lay_out() -> Parts:
    """From the filters to import and export."""
    p = Parts()
    p.chosen, p.page, p.keys = gr.State([]), gr.State(1), gr.State([])
    _filters(p)
    p.empty = gr.Markdown(EMPTY, elem_id="data-empty", visible=False)
    p.table = gr.Dataframe(
        headers=HEADERS,
        datatype="str",
        type="array",
        interactive=False,
        wrap=False,
        show_label=False,
        max_height=420,
        buttons=["fullscreen"],  # none to copy: what is pasted into a spreadsheet may be a formula
        column_widths=["56px", "152px", "92px", "120px", "18%", "30%", "96px", "90px"],
        elem_id="data-table",
    )
    with gr.Row(elem_id="data-pages"):
        p.before = gr.Button("Newer", size="sm", elem_id="data-before", scale=0, min_width=90)
        p.where = plain("data-where", max_lines=4)
        p.after = gr.Button("Older", size="sm", elem_id="data-after", scale=0, min_width=90)
    p.hint = gr.Markdown(CHOOSE, elem_id="data-hint")
    with gr.Column(visible=False, elem_id="data-entry") as p.entry:
        _entry(p)
    _files(p)
    with gr.Accordion("Statistics", open=False, elem_id="data-figures") as p.figures:
        p.statistics = gr.Textbox(
            show_label=False, lines=4, max_lines=20, interactive=False, container=False, elem_id="data-statistics"
        )
    return p


def _filters(p: Parts) -> None:
    with gr.Row(elem_id="data-filters"):
        text = gr.Textbox(
            label="Search", placeholder="in prompts, answers and reasons", max_lines=1, elem_id="data-search", scale=3
        )
        verdict = gr.Dropdown([ANY, *VERDICTS], value=ANY, label="Verdict", elem_id="data-verdicts", min_width=110)
        kind = gr.Dropdown([ANY, *KINDS], value=ANY, label="Kind", elem_id="data-kinds", min_width=110)
        p.annotator = gr.Dropdown([ANY], value=ANY, label="Who", elem_id="data-annotators", min_width=110)
        p.tag = gr.Dropdown([ANY], value=ANY, label="Tag", elem_id="data-tags", min_width=110)
        kept = gr.Dropdown([STANDING, DELETED], value=STANDING, label="Rows", elem_id="data-kept", min_width=100)
    p.filters = [verdict, p.annotator, kind, p.tag, text, kept]


def _entry(p: Parts) -> None:
    p.about = plain("data-about", max_lines=4)
    p.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=12, interactive=False, elem_id="data-prompt")
    with gr.Row(elem_id="data-answers"):
        p.answers = [
            gr.Textbox(
                lines=4, max_lines=16, interactive=True, visible=False, elem_id=f"data-answer-{n}", min_width=300
            )
            for n in range(ANSWERS)
        ]
    with gr.Row():
        p.verdict = gr.Dropdown([], label="Verdict", elem_id="data-verdict", min_width=130)
        p.order = gr.Textbox(
            label="Order, best first", placeholder="2 1=3", max_lines=1, visible=False, elem_id="data-order"
        )
        p.score = gr.Textbox(label="Score", max_lines=1, visible=False, elem_id="data-score", min_width=100)
        p.strength = gr.Dropdown(
            [UNDECIDED, *STRENGTHS.values()], label="How much", elem_id="data-strength", min_width=110
        )
        p.reason = gr.Textbox(label="Reason", max_lines=3, elem_id="data-reason", scale=3)
        p.tags = gr.Textbox(label="Tags, with commas", max_lines=1, elem_id="data-entry-tags", scale=2)
    p.written = gr.Textbox(
        label="Better answer, written by hand", lines=1, max_lines=12, elem_id="data-written", visible=True
    )
    with gr.Row(elem_id="data-actions"):
        p.save = gr.Button("Save changes", variant="primary", size="sm", elem_id="data-save", scale=0, min_width=140)
        p.delete = gr.Button("Delete", size="sm", elem_id="data-delete", scale=0, min_width=100)
        p.restore = gr.Button("Restore", size="sm", elem_id="data-restore", scale=0, min_width=100, visible=False)
        with gr.Row(visible=False, elem_id="data-sure") as p.sure:
            p.really = gr.Button("Yes, delete it", variant="stop", size="sm", elem_id="data-really", scale=0)
            p.keep = gr.Button("Keep it", size="sm", elem_id="data-keep", scale=0)
    with gr.Accordion("History", open=False, elem_id="data-past"):
        p.history = gr.Dataframe(
            headers=["version", "when", "what", "then", "with"],
            datatype="str",
            type="array",
            interactive=False,
            show_label=False,
            wrap=True,
            buttons=["fullscreen"],
            elem_id="data-history",
        )


def _files(p: Parts) -> None:
    with gr.Row(elem_id="data-files"):
        p.upload = gr.UploadButton(
            "Import a file",
            file_types=[f".{suffix.rpartition('.')[2]}" for suffix in SUFFIXES],
            size="sm",
            scale=0,
            min_width=150,
            elem_id="data-import",
        )
        p.kind = gr.Dropdown(list(EXPORTS), value=EXPORTS[0], show_label=False, container=False, elem_id="data-kind")
        p.export = gr.Button("Export", size="sm", scale=0, min_width=120, elem_id="data-export")
        p.file = gr.DownloadButton("Download", visible="hidden", elem_id="data-file")
    p.imported = plain("data-imported", max_lines=12)
    p.exported = plain("data-exported", max_lines=12)
