"""The components of the Chat tab, in the order in which they stand."""

from typing import Any, NamedTuple

import gradio as gr

from lowrank_align.studio.asking import MOST_ANSWERS
from lowrank_align.studio.chat_view import LESS, MORE, MUCH_LESS, MUCH_MORE
from lowrank_align.studio.studio import Studio
from lowrank_align.studio.voices import BASE

from .manners import plain

NOBODY, NO_REWARD, NEWEST = "nobody", "no reward", "newest"
EMPTY = (
    "Nothing said yet. Type a message below; Enter sends it, Shift+Enter makes a new line. "
    "Who answers, side by side with whom, and the system prompt stand in the panel beside it."
)
# Both read on white and on black; the words and numbers of the legend say the same.
COLOURS = {MUCH_MORE: "#2f7ed8", MORE: "#9cc4ee", LESS: "#f0b37e", MUCH_LESS: "#d9622b"}


class Controls(NamedTuple):
    """How the next answer is to come, in the order in which handlers get it."""

    voice: Any
    against: Any
    temperature: Any
    top_p: Any
    max_new_tokens: Any
    seed: Any
    best_of: Any
    reward: Any


class Parts(NamedTuple):
    """Every component that a handler reads or changes."""

    log: Any
    side_row: Any
    side_texts: list[Any]
    picks: list[Any]
    keep_picks: Any
    standing: Any
    question: Any
    send: Any
    stop: Any
    steps: dict[str, Any]
    system: Any
    controls: Controls
    which: Any
    about: Any
    thumbs: dict[str, Any]
    heat: dict[str, Any]
    pair: dict[str, Any]
    export: dict[str, Any]
    seen: Any
    following: Any
    keys: Any
    marks: Any


def lay_out(studio: Studio) -> Parts:
    """The talk on the left, who answers on the right, and what is done with an answer below."""
    states = (gr.State(-1), gr.State(False), gr.State([]), gr.State([]))
    with gr.Row(elem_id="chat-desk"):
        with gr.Column(scale=7, min_width=320, elem_id="chat-main"):
            log = _log()
            side_row, side_texts, picks, keep_picks = _sides()
            standing = plain("chat-standing", max_lines=3)
            with gr.Row(elem_id="chat-ask"):
                question = gr.Textbox(
                    show_label=False,
                    container=False,
                    placeholder="Write a message; Enter sends it",
                    lines=1,
                    max_lines=8,
                    scale=8,
                    min_width=120,
                    elem_id="chat-input",
                )
                send = gr.Button("Send", variant="primary", scale=1, min_width=64, elem_id="chat-send")
                stop = gr.Button("Stop", scale=1, min_width=64, interactive=False, elem_id="chat-stop")
            with gr.Row(elem_id="chat-steps"):
                steps = {
                    name: gr.Button(label, size="sm", min_width=90, elem_id=f"chat-{name}")
                    for name, label in (
                        ("regenerate", "Regenerate"),
                        ("undo", "Undo turn"),
                        ("back", "Bring back"),
                        ("clear", "New talk"),
                    )
                }
        with gr.Column(scale=3, min_width=260, elem_id="chat-aside"):
            controls, system = _controls(studio)
    with gr.Accordion("This answer: thumbs, score, token map, pairs", open=False, elem_id="chat-closer"):
        which = _listed("Which answer", "chat-which", [("the newest", NEWEST)], NEWEST)
        about = plain("chat-about", max_lines=4)
        thumbs = _thumbs()
        heat = _heat()
        pair = _pair()
    export = _export()
    return Parts(
        log, side_row, side_texts, picks, keep_picks, standing, question, send, stop, steps, system, controls, which,
        about, thumbs, heat, pair, export, *states,
    )  # fmt: skip


def _listed(label: str, element: str, choices: list[Any], value: Any) -> gr.Dropdown:
    """A list whose choices change with the talk: what is chosen may have gone in another tab, which handlers tell."""
    return gr.Dropdown(choices, value=value, label=label, allow_custom_value=True, elem_id=element)


def _log() -> gr.Chatbot:
    """Its handlers escape every message (`chat_view.as_text`): the switches here do not make it show text as text."""
    return gr.Chatbot(
        show_label=False,
        elem_id="chat-log",
        height=None,
        render_markdown=False,
        sanitize_html=True,
        allow_tags=False,
        latex_delimiters=[],
        allow_file_downloads=False,
        layout="bubble",
        buttons=[],  # the copy button would give entities; text that is selected is as it was said
        editable="user",
        placeholder=EMPTY,
    )


def _sides() -> tuple[Any, list[Any], list[Any], Any]:
    texts, picks = [], []
    with gr.Column(visible=False, elem_id="chat-sides") as block:
        with gr.Row():
            for letter in "ab":
                with gr.Column(min_width=260):
                    text = gr.Textbox(label="", lines=5, max_lines=12, interactive=False, elem_id=f"chat-side-{letter}")
                    texts.append(text)
                    picks.append(gr.Button("Go on with this one", size="sm", elem_id=f"chat-pick-{letter}"))
        keep = gr.Checkbox(False, label="keep what I pick as a pair", container=False, elem_id="chat-pair-picks")
    return block, texts, picks, keep


def _controls(studio: Studio) -> tuple[Controls, Any]:
    settings = studio.settings
    voices = studio.voices.names()
    voice = gr.Dropdown(voices, value=BASE, label="Who answers", elem_id="chat-adapter")
    against = gr.Dropdown([NOBODY, *voices], value=NOBODY, label="Side by side with", elem_id="chat-compare")
    system = gr.Textbox(label="System prompt", lines=2, max_lines=6, placeholder="none", elem_id="chat-system")
    with gr.Accordion("Sampling", open=False, elem_id="chat-sampling"):
        temperature = gr.Slider(
            0, 2, settings.temperature, step=0.05, label="Temperature (0: the likeliest)", elem_id="chat-temperature"
        )
        top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p", elem_id="chat-top-p")
        longest = gr.Slider(
            8, 4096, settings.max_new_tokens, step=8, label="Longest answer (tokens)", elem_id="chat-tokens"
        )
        seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1, elem_id="chat-seed")
    with gr.Accordion("Reward", open=False, elem_id="chat-reward-panel"):
        reward = gr.Dropdown(
            [NO_REWARD, *studio.voices.rewards()],
            value=NO_REWARD,
            label="Score every answer by",
            info="a trained reward run",
            elem_id="chat-reward",
        )
        best_of = gr.Slider(
            1, MOST_ANSWERS, 1, step=1, label="Best of (answers drawn)", info="the best is shown, the others are kept",
            elem_id="chat-best-of",
        )  # fmt: skip
    return Controls(voice, against, temperature, top_p, longest, seed, best_of, reward), system


def _thumbs() -> dict[str, Any]:
    with gr.Row(elem_id="chat-thumbs"):
        return {
            name: gr.Button(label, size="sm", min_width=90, elem_id=f"chat-{name}")
            for name, label in (
                ("like", "Good"),
                ("dislike", "Bad"),
                ("unrate", "No thumb"),
                ("score", "Score"),
                ("go-on", "Go on with this one"),
            )
        }


def _heat() -> dict[str, Any]:
    with gr.Row(elem_id="chat-heat-ask"):
        reference = gr.Dropdown([BASE], value=BASE, label="Token map against", elem_id="chat-reference")
        draw = gr.Button("Draw the token map", size="sm", min_width=160, scale=0, elem_id="chat-heat-draw")
    with gr.Column(visible=False, elem_id="chat-heat-panel") as panel:
        words = plain("chat-heat-words", max_lines=5)
        marks = gr.HighlightedText(
            show_label=False,
            color_map=COLOURS,
            show_legend=True,
            show_inline_category=False,
            elem_id="chat-heat",
        )
        token = gr.Textbox(
            label="One token (click it in the map), in nats",
            placeholder="click a token",
            interactive=False,
            max_lines=1,
            elem_id="chat-heat-token",
        )
        most = gr.Textbox(
            label="Where it departs most, in nats", interactive=False, lines=5, max_lines=10, elem_id="chat-heat-most"
        )
    return {"reference": reference, "draw": draw, "panel": panel, "words": words, "map": marks, "token": token,
            "most": most}  # fmt: skip


def _pair() -> dict[str, Any]:
    with gr.Row(elem_id="chat-pair-row"):
        with gr.Column(min_width=280):
            text = gr.Textbox(
                label="The answer, as it should have been", lines=4, max_lines=12, elem_id="chat-pair-text"
            )
            mend = gr.Button("Make this a pair: my text over the answer", size="sm", elem_id="chat-pair")
        with gr.Column(min_width=280):
            other = _listed("Another answer to the same question", "chat-pair-other", [], None)
            better = gr.Button("Make a pair: this answer is better", size="sm", elem_id="chat-pair-better")
            worse = gr.Button("Make a pair: the other one is better", size="sm", elem_id="chat-pair-worse")
    reason = gr.Textbox(label="Reason (kept with the pair)", max_lines=1, elem_id="chat-pair-reason")
    return {"text": text, "mend": mend, "other": other, "better": better, "worse": worse, "reason": reason}


def _export() -> dict[str, Any]:
    with gr.Accordion("Transcript", open=False, elem_id="chat-transcript"), gr.Row():
        make = gr.Button("Export the transcript", size="sm", elem_id="chat-export")
        text = gr.DownloadButton("Download as Markdown", size="sm", visible=False, elem_id="chat-export-markdown")
        row = gr.DownloadButton("Download as a training row", size="sm", visible=False, elem_id="chat-export-row")
    return {"make": make, "markdown": text, "row": row}
