"""The components of the Arena tab, in the order in which they stand."""

from dataclasses import dataclass, field
from typing import Any, Literal

import gradio as gr

from lowrank_align.studio.studio import Studio
from lowrank_align.studio.voices import LIVE

from .manners import plain

STREAM_SECONDS = 0.2
HINT = (
    "Two players are needed: train an adapter in Train, or choose base twice at different temperatures (`0.7, 1.2`). "
    "Then press Start: two answers come without names, and one key says which is better."
)
THESE, EVERYONE = "these players", "everyone who ever played"


@dataclass
class Parts:
    """Every component that a handler reads or changes."""

    battle: Any = None
    seen: Any = None
    timer: Any = None
    players: Any = None
    temperatures: Any = None
    longest: Any = None
    typed: Any = None
    start: Any = None
    hint: Any = None
    panel: Any = None
    prompt: Any = None
    answers: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)
    votes: dict[str, Any] = field(default_factory=dict)
    undo: Any = None
    message: Any = None
    last: Any = None
    summary: Any = None
    table: Any = None
    scope: Any = None
    reward: Any = None
    score: Any = None
    scored: Any = None


def lay_out(studio: Studio) -> Parts:
    """From the players at the top to the results."""
    p = Parts()
    p.battle, p.seen = gr.State(""), gr.State([])
    p.timer = gr.Timer(STREAM_SECONDS, active=False)
    _players(p, studio)
    p.hint = gr.Markdown(HINT, elem_id="arena-hint")
    p.message = plain("arena-message", max_lines=2, visible=False)
    with gr.Column(visible=False, elem_id="arena-field") as p.panel:
        _battle(p)
    _results(p)
    return p


def _players(p: Parts, studio: Studio) -> None:
    settings = studio.settings
    with gr.Row(elem_id="arena-top"):
        p.players = gr.Dropdown(
            [name for name in studio.voices.names() if name != LIVE],
            multiselect=True,
            value=[],
            label="Players",
            elem_id="arena-players",
            scale=5,
        )
        p.temperatures = gr.Textbox(
            f"{settings.temperature:g}",
            label="At temperatures",
            placeholder="0.7, 1.2",
            max_lines=1,
            elem_id="arena-temperatures",
            scale=2,
            min_width=120,
        )
        p.longest = gr.Number(
            settings.max_new_tokens,
            label="Longest answer (tokens)",
            precision=0,
            minimum=1,
            elem_id="arena-longest",
            scale=2,
            min_width=120,
        )
        p.start = gr.Button("Start", variant="primary", elem_id="arena-start", scale=1, min_width=110)
    with gr.Accordion("Prompts of your own instead of the queue's", open=False, elem_id="arena-prompts-panel"):
        p.typed = gr.Textbox(
            show_label=False,
            container=False,
            lines=3,
            max_lines=8,
            placeholder="One a line. Left empty, the queue's prompts are played over, those not collected on first.",
            elem_id="arena-prompts",
        )


def _battle(p: Parts) -> None:
    p.prompt = gr.Textbox(label="Prompt", lines=1, max_lines=5, interactive=False, elem_id="arena-prompt")
    with gr.Row(elem_id="arena-answers"):
        for letter in "AB":
            with gr.Column(elem_classes="answer", min_width=260):
                p.answers.append(
                    gr.Textbox(
                        label=letter,
                        lines=9,
                        max_lines=9,
                        interactive=False,
                        autoscroll=False,
                        elem_id=f"arena-answer-{letter.lower()}",
                    )
                )
                p.states.append(plain(f"arena-state-{letter.lower()}", max_lines=2))
    words = {"a": "A is better", "tie": "tie", "bad": "both bad", "b": "B is better", "skip": "skip"}
    with gr.Row(elem_id="arena-votes"):
        for choice, word in words.items():
            variant: Literal["primary", "secondary"] = "primary" if choice in ("a", "b") else "secondary"
            element = "arena-skip" if choice == "skip" else f"arena-vote-{choice}"
            p.votes[choice] = gr.Button(word, variant=variant, elem_id=element, min_width=70, size="md")
        p.undo = gr.Button("undo", elem_id="arena-undo", min_width=70, size="md")
    p.last = gr.HTML("", elem_id="arena-revealed", padding=False)


def _results(p: Parts) -> None:
    with gr.Row(elem_id="arena-results-top"):
        p.summary = plain("arena-summary", lines=2, max_lines=20, scale=4)
        p.scope = gr.Radio(
            [THESE, EVERYONE], value=THESE, label="Results of", elem_id="arena-scope", scale=2, min_width=220
        )
    p.table = gr.Dataframe(
        headers=["player"], datatype="str", interactive=False, visible=False, elem_id="arena-table",
        show_label=False, buttons=["fullscreen"],
    )  # fmt: skip
    with gr.Accordion("Do the votes agree with a reward run?", open=False, elem_id="arena-reward-panel"):
        with gr.Row():
            p.reward = gr.Dropdown([], label="Reward run", elem_id="arena-reward", scale=3)
            p.score = gr.Button("Score the answers voted on", elem_id="arena-score", scale=1, min_width=160)
        p.scored = plain("arena-scored", lines=1, max_lines=3)
