"""The components of the Train tab: what is asked for on the left, the run on the right."""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from lowrank_align.data.sources import DATA_SUFFIXES
from lowrank_align.studio.curves import PANELS
from lowrank_align.studio.run_request import KNOBS, all_settings, losses_of
from lowrank_align.studio.studio import Studio

from .manners import plain

FIRST_METHOD = "dpo"  # what pairs are for
METHOD_NAMES = {
    "sft": "SFT, on demonstrations",
    "reward": "Reward model, from pairs",
    "dpo": "DPO, on pairs",
    "kto": "KTO, on thumbs",
    "condition": "Conditioning, on pairs or thumbs",
    "coh": "Chain of hindsight, on pairs",
    "ppo": "PPO, with a reward",
    "grpo": "GRPO, with a reward",
    "rloo": "RLOO, with a reward",
    "online-dpo": "Online DPO, with a reward",
    "expert": "Expert iteration, with a reward",
    "quark": "Quark, with a reward",
}
LABELS = {
    "epochs": "Rounds",
    "max_steps": "or steps",
    "learning_rate": "Learning rate",
    "beta": "Beta",
    "kl_coefficient": "KL coefficient",
    "group_size": "Answers a prompt",
    "batch_size": "Batch size",
}
EMPTY = "No run yet. Choose a method and data on the left, look at the check, and press Start."
PLOT_HEIGHT = 190


@dataclass
class Parts:
    """Every component that a handler reads or changes."""

    method: Any = None
    about: Any = None
    name: Any = None
    start_from: Any = None
    reward: Any = None
    loss: Any = None
    data: Any = None
    upload: Any = None
    uploaded: Any = None
    knobs: list[Any] = field(default_factory=list)
    more: Any = None
    settings: Any = None
    check: Any = None
    plan: Any = None
    start: Any = None
    stop: Any = None
    resume_row: Any = None
    resume_run: Any = None
    resume: Any = None
    status: Any = None
    progress: Any = None
    health: Any = None
    ended_row: Any = None
    compare: Any = None
    chat: Any = None
    plots: list[Any] = field(default_factory=list)
    plot_row: Any = None
    samples_panel: Any = None
    samples: Any = None
    log: Any = None
    seen: Any = None


def lay_out(studio: Studio) -> Parts:
    """Two columns, which stand below each other on a phone."""
    p = Parts()
    p.seen, p.uploaded = gr.State(-1), gr.State(None)
    with gr.Row(elem_id="train-columns"):
        with gr.Column(elem_id="train-asked", min_width=300):
            _resume(p)
            _asked(p, studio)
        with gr.Column(elem_id="train-seen", min_width=300):
            _before(p)
            _seen(p)
    return p


def _resume(p: Parts) -> None:
    with gr.Row(visible=False, elem_id="train-resume-row") as p.resume_row:
        p.resume_run = gr.Dropdown([], label="Not finished", elem_id="train-resume-run", scale=3)
        p.resume = gr.Button("Resume", elem_id="train-resume", size="md", scale=1, min_width=90)


def _asked(p: Parts, studio: Studio) -> None:
    names = [(METHOD_NAMES.get(method, method), method) for method in studio.trainer.methods()]
    with gr.Row():
        p.method = gr.Dropdown(names, value=FIRST_METHOD, label="Method", elem_id="train-method", scale=3)
        p.loss = gr.Dropdown(losses_of(FIRST_METHOD), label="Loss", elem_id="train-loss", scale=2)
    p.about = plain("train-about", max_lines=3)
    with gr.Row():
        p.data = gr.Dropdown([], label="Data", elem_id="train-data", scale=3)
        p.upload = gr.UploadButton(
            "Upload",
            file_types=list(DATA_SUFFIXES),
            elem_id="train-upload",
            size="md",
            scale=1,
            min_width=90,
        )
    with gr.Row():
        p.start_from = gr.Dropdown([], label="Start from", elem_id="train-adapter")
        p.reward = gr.Dropdown([], label="Reward model to follow", visible=False, elem_id="train-reward")
    with gr.Row(elem_id="train-knobs"):
        for name in KNOBS:
            p.knobs.append(gr.Number(None, label=LABELS.get(name, name), elem_id=f"train-{name}", min_width=120))
    with gr.Accordion("More settings (YAML)", open=False, elem_id="train-more"):
        p.more = gr.Textbox(
            label="Lines of setting: value",
            placeholder="rank: 16\neval_rows: 20\ngradient_checkpointing: true",
            lines=4,
            max_lines=12,
            elem_id="train-yaml",
        )
        p.settings = gr.Dataframe(
            [list(row) for row in all_settings(FIRST_METHOD)],
            headers=["setting", "default", "what it is"],
            datatype="str",
            interactive=False,
            wrap=True,
            max_height=260,
            buttons=[],
            column_widths=["30%", "18%", "52%"],
            label="Settings",
            elem_id="train-settings",
        )
    p.name = gr.Textbox(label="Name of the run", max_lines=1, elem_id="train-name")


def _before(p: Parts) -> None:
    p.plan = gr.Textbox(
        label="Before it starts", lines=4, max_lines=12, interactive=False, autoscroll=False, elem_id="train-plan"
    )
    with gr.Row(elem_id="train-buttons"):
        p.check = gr.Button("Check", elem_id="train-check", size="md", min_width=80)
        p.start = gr.Button("Start", variant="primary", elem_id="train-start", size="md", min_width=120)
        p.stop = gr.Button("Stop and save", variant="stop", elem_id="train-stop", size="md", interactive=False)


def _seen(p: Parts) -> None:
    p.status = gr.Textbox(EMPTY, label="Run", lines=1, max_lines=4, interactive=False, elem_id="train-status")
    p.progress = gr.HTML(progress_bar(0, 0), elem_id="train-progress", padding=False)
    p.health = gr.Textbox(
        "", label="How it goes", lines=2, max_lines=8, interactive=False, visible=False, elem_id="train-health"
    )
    with gr.Row(visible=False, elem_id="train-ended") as p.ended_row:
        p.compare = gr.Button("Compare with before", variant="primary", elem_id="train-compare", size="md")
        p.chat = gr.Button("Chat with it", elem_id="train-chat", size="md")
    with gr.Row(elem_id="train-plot") as p.plot_row:
        for panel in PANELS:
            p.plots.append(
                gr.LinePlot(
                    None,
                    x="step",
                    y="value",
                    color="curve" if len(set(panel.metrics.values())) > 1 else None,
                    title=panel.title,
                    x_title=" ",
                    y_title=" ",
                    color_title=" ",
                    height=PLOT_HEIGHT,
                    show_label=False,
                    visible="hidden",
                    buttons=[],
                    min_width=260,
                    elem_classes="train-panel",
                )
            )
    with gr.Accordion("Samples", open=True, visible=False, elem_id="train-samples-panel") as p.samples_panel:
        p.samples = gr.Dataframe(
            [],
            headers=["step", "prompt", "answer", "score"],
            datatype="str",
            interactive=False,
            wrap=True,
            max_height=320,
            buttons=[],
            column_widths=["60px", "38%", "46%", "70px"],
            show_label=False,
            elem_id="train-samples",
        )
    with gr.Accordion("Log", open=False, elem_id="train-log-panel"):
        p.log = gr.Textbox(
            "", show_label=False, lines=8, max_lines=8, interactive=False, autoscroll=True, elem_id="train-log"
        )


def progress_bar(step: int, total: int) -> str:
    """A bar of so many steps, from two numbers alone; nothing where there is no run."""
    if not total:
        return ""
    return f'<progress value="{int(step)}" max="{int(total)}" aria-label="steps done"></progress>'
