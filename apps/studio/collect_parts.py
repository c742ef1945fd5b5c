"""The components of the Collect tab, in the order in which they stand."""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from lowrank_align.studio.collecting_view import SIDES
from lowrank_align.studio.studio import Studio

from .manners import plain

STREAM_SECONDS = 0.2
EMPTY = "nothing decided yet"
IN_ORDER = "as in the queue"
NO_PROMPTS = (
    "No prompts yet. Type one above and press Enter; or open **Queue** below and add a file of prompts, paste some, "
    "or take the examples."
)
LETTERS = "ABCDEF"


@dataclass
class Parts:
    """Every component that a handler reads or changes."""

    pair: Any = None
    last_pair: Any = None
    editing: Any = None
    seen: Any = None
    sent: Any = None
    typed: Any = None
    go_on_row: Any = None
    prompt: Any = None
    before: Any = None
    draw: Any = None
    columns: list[Any] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    edits: list[Any] = field(default_factory=list)
    vote_a: Any = None
    vote_b: Any = None
    votes: dict[str, Any] = field(default_factory=dict)
    undo: Any = None
    rank_row: Any = None
    order: Any = None
    written_row: Any = None
    written: Any = None
    write: Any = None
    strength: Any = None
    reason: Any = None
    tags: Any = None
    last: Any = None
    message: Any = None
    count: Any = None
    queue: Any = None
    empty: Any = None
    recent: Any = None
    question: Any = None
    go_on: Any = None
    system: Any = None
    plan_inputs: list[Any] = field(default_factory=list)
    voice_choices: list[Any] = field(default_factory=list)
    plan_changed: Any = None
    upload: Any = None
    paste: Any = None
    paste_add: Any = None
    examples: Any = None
    timer: Any = None


def lay_out(studio: Studio) -> Parts:
    """From the prompt at the top to the panels that are a glance away."""
    p = Parts()
    p.last_pair, p.editing, p.seen = gr.State(""), gr.State([]), gr.State([])
    p.pair = gr.Textbox("", visible="hidden", elem_id="collect-pair")  # in the page, so that it is what the page shows
    p.sent, p.typed = gr.State([]), gr.State(False)
    p.timer = gr.Timer(STREAM_SECONDS, active=False)
    _prompt(p)
    _answers(p)
    _votes(p)
    _words(p)
    with gr.Row(elem_id="collect-panels"):
        _sources(p, studio)
        _queue(p)
        with gr.Accordion("Last ten decisions", open=False, elem_id="collect-recent-panel"):
            p.recent = plain("collect-recent", lines=10)
    return p


def _prompt(p: Parts) -> None:
    p.before = gr.Textbox(
        label="So far", lines=2, max_lines=6, interactive=False, visible=False, elem_id="collect-before"
    )
    with gr.Row(elem_id="collect-top"):
        p.prompt = gr.Textbox(
            label="Prompt",
            placeholder="Write a prompt and press Enter (Shift+Enter makes a new line), or press G for the next one",
            lines=1,  # with more, Enter would make a line instead of sending
            max_lines=4,
            elem_id="collect-prompt",
            scale=8,
        )
        with gr.Column(scale=1, min_width=150):
            p.queue = plain("collect-queue", lines=2)
            p.draw = gr.Button("Next (G)", elem_id="collect-generate", size="md")


def _answers(p: Parts) -> None:
    with gr.Row(elem_id="collect-answers"):
        for side in range(SIDES):
            letter = LETTERS[side]
            with gr.Column(
                visible=side < 2, elem_id=f"collect-column-{letter.lower()}", elem_classes="answer", min_width=260
            ) as column:
                p.answers.append(
                    gr.Textbox(
                        label=f"{letter}" if side < 2 else f"{side + 1}",
                        lines=9,
                        max_lines=9,
                        interactive=False,
                        autoscroll=False,
                        elem_id=f"collect-answer-{letter.lower()}",
                    )
                )
                with gr.Row(elem_classes="below"):
                    p.states.append(plain(f"collect-state-{letter.lower()}", lines=1))
                    p.edits.append(
                        gr.Button("edit", elem_id=f"collect-edit-{letter.lower()}", size="sm", scale=0, min_width=70)
                    )
            p.columns.append(column)


def _votes(p: Parts) -> None:
    with gr.Row(elem_id="collect-votes"):
        p.vote_a = gr.Button("A is better", elem_id="vote-a", variant="primary", min_width=110, size="md")
        tie = gr.Button("tie", elem_id="vote-tie", min_width=70, size="md")
        bad = gr.Button("both bad", elem_id="vote-bad", min_width=90, size="md")
        p.vote_b = gr.Button("B is better", elem_id="vote-b", variant="primary", min_width=110, size="md")
        skip = gr.Button("skip", elem_id="vote-skip", min_width=70, size="md")
        p.undo = gr.Button("undo", elem_id="vote-undo", min_width=70, size="md")
    with gr.Row(visible=False, elem_id="collect-rank-row") as p.rank_row:
        p.order = gr.Textbox(
            label="Order, best first (type the numbers, or drag the answers; = for equal)",
            placeholder="3 1 2",
            elem_id="collect-ranks",
            max_lines=1,
            scale=4,
        )
        rank = gr.Button("Keep this order (Enter)", elem_id="vote-rank", variant="primary", scale=1)
    p.votes = {"a": p.vote_a, "b": p.vote_b, "tie": tie, "bad": bad, "skip": skip, "rank": rank}
    with gr.Row(elem_id="collect-said"):
        p.message = plain("collect-message", lines=1, scale=4)
        p.last = gr.HTML("", elem_id="collect-sources", padding=False)
    p.empty = gr.Markdown(NO_PROMPTS, visible=False, elem_id="collect-empty")
    with gr.Row(visible=False, elem_id="collect-written-row") as p.written_row:
        p.written = gr.Textbox(
            label="A better answer than both (E takes over the answer under the pointer)",
            lines=4,
            max_lines=10,
            elem_id="collect-written",
            scale=6,
        )
        p.write = gr.Button("Keep it and go on", elem_id="collect-write", variant="primary", scale=1)


def _words(p: Parts) -> None:
    with gr.Row(elem_id="collect-words"):
        p.strength = gr.Radio(
            ["slightly", "clearly", "by far"], label="How much (1-3)", elem_id="collect-strength", scale=2
        )
        p.reason = gr.Textbox(
            label="Reason", placeholder="what decided, if you like", max_lines=1, elem_id="collect-reason", scale=3
        )
        p.tags = gr.Dropdown(
            [], multiselect=True, allow_custom_value=True, label="Tags", elem_id="collect-tags", scale=2
        )
    p.count = plain("collect-count", lines=1, max_lines=4)
    with gr.Row(visible=False, elem_id="collect-go-on-row") as p.go_on_row:
        p.question = gr.Textbox(
            placeholder="Go on from the answer you chose last: the next question",
            show_label=False,
            container=False,
            max_lines=2,
            elem_id="collect-question",
            scale=6,
        )
        p.go_on = gr.Button("Go on", elem_id="collect-go-on", size="sm", scale=0, min_width=90)


def _sources(p: Parts, studio: Studio) -> None:
    voices, s = studio.voices.names(), studio.settings
    with gr.Accordion("Sources and sampling", open=False, elem_id="collect-sources-panel"):
        with gr.Row():
            voice_a = gr.Dropdown(voices, value=voices[0], label="One answer by", elem_id="collect-voice-a")
            warm_a = gr.Slider(0, 2, s.temperature, step=0.05, label="at temperature", elem_id="collect-temperature-a")
        with gr.Row():
            voice_b = gr.Dropdown(voices, value=voices[0], label="the other by", elem_id="collect-voice-b")
            warm_b = gr.Slider(0, 2, s.temperature, step=0.05, label="at temperature", elem_id="collect-temperature-b")
        with gr.Row():
            tokens = gr.Slider(8, 2048, s.max_new_tokens, step=8, label="Longest answer (tokens)")
            count = gr.Slider(2, SIDES, 2, step=1, label="Answers (more than two are ranked)", elem_id="collect-k")
        order = gr.Dropdown(
            [IN_ORDER], value=IN_ORDER, label="Which pair next", elem_id="collect-order",
            info="by a judge: of several pairs, the one whose answers it sees closest comes first",
        )  # fmt: skip
        repeats = gr.Checkbox(True, label="every tenth pair is an old one, to measure how steady I am")
        second = gr.Checkbox(False, label="show me pairs that others have judged (agreement is then told)")
        p.system = gr.Textbox(label="System prompt for typed prompts", lines=2, elem_id="collect-system")
    p.plan_inputs = [voice_a, warm_a, voice_b, warm_b, tokens, count, order, repeats, second]
    p.voice_choices = [voice_a, voice_b, order]

    def plan_changed(handler: Any, inputs: Any, outputs: Any, **options: Any) -> None:
        for slider in (warm_a, warm_b, tokens, count):
            slider.release(handler, inputs, outputs, **options)
        for choice in (voice_a, voice_b, order, repeats, second):
            choice.input(handler, inputs, outputs, **options)

    p.plan_changed = plan_changed


def _queue(p: Parts) -> None:
    with gr.Accordion("Queue", open=False, elem_id="collect-queue-panel"):
        p.upload = gr.UploadButton(
            "Add a file of prompts (.jsonl, .json, .parquet, .txt)",
            file_types=[".jsonl", ".json", ".parquet", ".gz", ".txt"],
            elem_id="collect-upload",
            size="sm",
        )
        p.paste = gr.Textbox(label="Or paste some, one a line", lines=3, max_lines=8, elem_id="collect-paste")
        with gr.Row():
            p.paste_add = gr.Button("Add these", elem_id="collect-paste-add", size="sm")
            p.examples = gr.Button("Add example prompts", elem_id="collect-examples", size="sm")
