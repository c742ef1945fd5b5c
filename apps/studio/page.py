"""The page: a header, five tabs, and the manners that all of them share."""

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from lowrank_align.studio.studio import Studio

from . import arena, chat, collect, data, train
from .manners import AT_ONCE, told

TABS: dict[str, Callable[[Studio, "Page"], None]] = {
    "collect": collect.build,
    "chat": chat.build,
    "train": train.build,
    "arena": arena.build,
    "data": data.build,
}
TITLE = "lowrank studio"
PULSE_SECONDS = 1.0


class Page:
    """What the tabs share. They reach each other through `tabs` and `tab(name)` alone."""

    def __init__(self, studio: Studio, demo: gr.Blocks) -> None:
        self.studio, self.demo = studio, demo
        self.annotator: gr.Textbox
        self.tabs: gr.Tabs
        self._tabs: dict[str, gr.Tab] = {}
        self._watched: list[tuple[Callable[..., Any], list[Any], gr.Textbox]] = []

    def tab(self, name: str) -> gr.Tab:
        """The tab `name`; its `select` tells when it is shown. Of the tabs after one's own, in `on_load` and later."""
        return self._tabs[name]

    def on_load(self, function: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> None:
        """Fill components when the page is opened or loaded again."""
        self.demo.load(told(function), inputs, outputs, **AT_ONCE)

    def sign_in(self, request: gr.Request) -> list[Any]:
        """Who has signed in with a password is who labels."""
        given = getattr(request, "username", None)
        return [given, given] if given else [gr.skip(), gr.skip()]

    def watch(self, look: Callable[..., Any], *inputs: Any) -> gr.Textbox:
        """Changes when what `look(annotator, *inputs)` says changes; looked at every second, so it must be cheap.

        One request a second serves the whole page: what a tab shows is sent only after its own `change`.
        """
        state = gr.Textbox("", visible="hidden", show_label=False, container=False)  # a State tells of no changes here
        self._watched.append((look, list(inputs), state))
        return state

    def _pulse(self, facts: gr.HTML) -> None:
        states = [state for _, _, state in self._watched]
        inputs = [part for _, parts, _ in self._watched for part in parts]

        def look(who: str, header: str, *values: Any) -> list[Any]:
            known, given = values[: len(states)], iter(values[len(states) :])
            found = [json.dumps(look(who, *(next(given) for _ in parts))) for look, parts, _ in self._watched]
            now = _header(self.studio)
            changed = [gr.skip() if new == old else new for new, old in zip(found, known, strict=True)]
            return [*([gr.skip()] * 2 if now == header else [now, now]), *changed]

        told_last = gr.State("")
        gr.Timer(PULSE_SECONDS).tick(
            told(look), [self.annotator, told_last, *states, *inputs], [facts, told_last, *states], **AT_ONCE
        )


def build_page(studio: Studio) -> gr.Blocks:
    """The whole page; `launch` takes `style()` and `head()` beside it."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as demo:
        page = Page(studio, demo)
        with gr.Row(elem_id="header"):
            facts = gr.HTML(_header(studio), elem_id="header-facts", padding=False)
            typed = gr.Textbox(
                studio.settings.annotator,
                elem_id="annotator",
                show_label=False,
                container=False,
                placeholder="who labels",
                max_lines=1,
                scale=0,
                min_width=140,
            )
            # The name that counts is the whole one, not every letter of it on the way.
            page.annotator = gr.Textbox(studio.settings.annotator, visible="hidden", elem_id="annotator-name")
            gr.HTML(BUTTONS, elem_id="header-buttons", padding=False)
        with gr.Tabs(selected="collect", elem_id="tabs") as page.tabs:
            for name in TABS:
                page._tabs[name] = gr.Tab(name.capitalize(), id=name, elem_id=f"tab-{name}")
            for name, build in TABS.items():
                with page.tab(name):
                    build(studio, page)
        gr.HTML(_static("keys.html"), elem_id="keys", padding=False)
        gr.on([typed.submit, typed.blur], lambda given: given, typed, page.annotator, **AT_ONCE)
        demo.load(page.sign_in, None, [typed, page.annotator], **AT_ONCE)
        page._pulse(facts)
    return demo


def theme() -> gr.themes.Base:
    """Calm colours, the system's own fonts (nothing is fetched), and little air."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif")
    mono = ("ui-monospace", "Cascadia Mono", "DejaVu Sans Mono", "monospace")
    return gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", spacing_size="sm", radius_size="md", text_size="md", font=fonts,
        font_mono=mono,
    )  # fmt: skip


def style() -> str:
    """The page's own CSS: that of the whole, and of each tab."""
    return "\n".join(_static(f"{name}.css") for name in ("page", *TABS))


def head() -> str:
    """The page's own scripts, as they stand in its head."""
    scripts = "\n".join(_static(f"{name}.js") for name in ("page", *TABS))
    return f"<script>\n{scripts}\n</script>" if scripts.strip() else ""


BUTTONS = (
    '<button id="keys-button" title="the keys (?)" aria-label="the keys">?</button>'
    '<button id="theme-button" title="light or dark" aria-label="light or dark">&#9790;</button>'
)


def _header(studio: Studio) -> str:
    facts = studio.facts()
    used, free = facts.base_bytes / 2**30, facts.free_bytes / 2**30
    pairs = studio.store.count(kinds=("pair", "battle", "ranking"), repeats=False)
    parts = [
        f"<b>{html.escape(TITLE)}</b>",
        f"{html.escape(facts.model)} · {html.escape(facts.quantize)}",
        f"{_counted(facts.copies, 'copy', 'copies')}, {_counted(facts.adapters, 'adapter', 'adapters')}",
        f"base {_size(used)}, {_size(free)} free",
        _counted(pairs, "pair", "pairs"),
    ]
    mark = "busy" if facts.doing != "idle" else "idle"
    state = f'<span class="doing {mark}" id="doing">{html.escape(facts.doing)}</span>'
    return f'<div class="facts">{"".join(f"<span>{part}</span>" for part in parts)}{state}</div>'


def _size(gib: float) -> str:
    return f"{gib:.1f} GB" if gib >= 1 else f"{max(1, gib * 1024):.0f} MB"


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _static(name: str) -> str:
    file = Path(__file__).parent / "static" / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""
