"""Train: what to train on what, what is known before it starts, and how it goes while it does.

The run is the trainer's, not the page's: every page shows the same one, and a reload changes nothing. When it has
ended, `Compare with before` and `Chat with it` go to the other tabs, which find whom to show in the store's notes
(`ARENA_PLAYERS`, `CHAT_VOICE`).
"""

from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd

from lowrank_align.config import METHODS
from lowrank_align.errors import UserError
from lowrank_align.studio.curves import PANELS, points
from lowrank_align.studio.health import Level
from lowrank_align.studio.live_run import Status
from lowrank_align.studio.run_request import KNOBS, Request, View, all_settings, follows_reward
from lowrank_align.studio.studio import Studio

from .manners import QUIET, told
from .train_parts import EMPTY, Parts, lay_out, progress_bar

ARENA_PLAYERS, CHAT_VOICE = "arena-players", "chat-voice"  # notes in the store that the other tabs look for
MARKS: dict[Level, str] = {"good": "✓", "watch": "• look:", "bad": "✗"}
WORDS: dict[Level, str] = {"good": "Good", "watch": "Watch", "bad": "Bad"}
EVERYTHING, ANNOTATOR, TAG, FILE, UPLOADED = "everything", "annotator:", "tag:", "file:", "uploaded"
SAMPLES_SHOWN = 12
WIDTH = 6  # of a step, in the samples


def build(studio: Studio, page: Any) -> None:
    """The tab's components and what they do."""
    Handlers(studio, page, lay_out(studio)).wire()


class Handlers:
    """What happens when something is pressed. All state is the trainer's; a page holds only which version it shows."""

    def __init__(self, studio: Studio, page: Any, parts: Parts) -> None:
        self.studio, self.page, self.parts = studio, page, parts
        p = parts
        self.asked = [p.method, p.name, p.data, p.uploaded, p.start_from, p.reward, p.more, *p.knobs]
        self.of_method = [p.about, p.name, p.reward, p.settings, *p.knobs]
        self.choices = [p.data, p.start_from, p.reward, p.resume_row, p.resume_run]
        self.live = [
            p.seen, p.status, p.progress, p.health, p.start, p.stop, p.ended_row, p.compare, p.chat, p.samples, p.log,
            *p.plots, *self.choices,
        ]  # fmt: skip

    def wire(self) -> None:
        p, page = self.parts, self.page
        p.method.input(told(self.take_method), [p.method, p.name], self.of_method, **QUIET).then(
            told(self.check), self.asked, [p.plan], **QUIET
        )
        p.upload.upload(told(self.take_upload), [p.upload], [p.data, p.uploaded], **QUIET).then(
            told(self.check), self.asked, [p.plan], **QUIET
        )
        for changed in (p.data, p.start_from, p.reward):
            changed.input(told(self.check), self.asked, [p.plan], trigger_mode="always_last", **QUIET)
        for typed in (p.more, p.name, *p.knobs):
            typed.blur(told(self.check), self.asked, [p.plan], trigger_mode="always_last", **QUIET)
        p.check.click(told(self.check), self.asked, [p.plan], **QUIET)
        p.start.click(told(self.start), self.asked, [p.name, *self.live], **QUIET)
        p.stop.click(told(self.stop), None, self.live, **QUIET)
        p.resume.click(told(self.resume), [p.resume_run], self.live, **QUIET)
        p.compare.click(told(self.compare), None, [page.tabs], **QUIET)
        p.chat.click(told(self.chat), None, [page.tabs], **QUIET)
        page.clock.tick(told(self.tick), [p.seen, p.data, p.start_from, p.reward, p.resume_run], self.live, **QUIET)
        page.on_load(self.open, [p.method], [*self.of_method, *self.live])
        page.tab("train").select(
            told(self.refresh), [p.data, p.start_from, p.reward, p.resume_run], self.choices, **QUIET
        ).then(told(self.check), self.asked, [p.plan], **QUIET)

    # ---- what is asked for

    def take_method(self, method: str, name: str) -> list[Any]:
        """The method's own numbers and settings; a name that was proposed is proposed anew."""
        trainer = self.studio.trainer
        proposed = {trainer.fresh_name(other) for other in trainer.methods()} | {""}
        numbers = {knob.name: knob for knob in trainer.knobs(method)}
        knobs = [
            gr.update(value=numbers[each].value, precision=0 if numbers[each].whole else None, visible=True)
            if each in numbers
            else gr.update(visible=False)
            for each in KNOBS
        ]
        return [
            f"{(METHODS[method].__doc__ or method).strip()}",
            trainer.fresh_name(method) if name.strip() in proposed else gr.skip(),
            gr.update(visible=follows_reward(method)),
            [list(row) for row in all_settings(method)],
            *knobs,
        ]

    def take_upload(self, path: str | None) -> tuple[Any, Any]:
        """A file of the browser's becomes the data."""
        if not path:
            return gr.skip(), gr.skip()
        found = self.studio.trainer.file(path, self._upload_folders())
        return gr.update(choices=[*self._data(), (f"uploaded: {found.name}", UPLOADED)], value=UPLOADED), str(found)

    def request(
        self, method: str, name: str, data: str, uploaded: str | None, start: str, reward: str, more: str, *knobs: Any
    ) -> Request:
        """What the page says, as the trainer takes it."""
        numbers = dict(zip(KNOBS, knobs, strict=True))
        return Request(method, name, self._chosen(data, uploaded), start, reward or None, numbers, more)

    def check(self, *asked: Any) -> str:
        """What is known before a start."""
        found = self.studio.trainer.check(self.request(*asked))
        return "\n".join(f"{MARKS[one.level]} {one.text}" for one in found.said)

    # ---- the run

    def start(self, *asked: Any) -> list[Any]:
        request = self.request(*asked)
        self.studio.trainer.start(request)
        return [self.studio.trainer.fresh_name(request.method), *self.view(*self._kept(asked))]

    def stop(self) -> list[Any]:
        self.studio.trainer.stop()
        return self.view()

    def resume(self, name: str | None) -> list[Any]:
        if not name:
            raise UserError("choose a run to resume")
        self.studio.trainer.resume(name)
        return self.view()

    def compare(self) -> Any:
        """The Arena, with the new one against what it started from."""
        status = self.studio.trainer.status()
        self.studio.store.note(ARENA_PLAYERS, [self.studio.trainer.before() or "base", status.run])
        return gr.Tabs(selected="arena")

    def chat(self) -> Any:
        """Chat, with the new adapter."""
        self.studio.store.note(CHAT_VOICE, self.studio.trainer.status().run)
        return gr.Tabs(selected="chat")

    # ---- what is to be seen

    def open(self, method: str) -> list[Any]:
        """A page was opened or loaded again."""
        return [*self.take_method(method, ""), *self.view()]

    def tick(self, seen: int, *chosen: Any) -> list[Any]:
        """Once a second; nothing is sent while nothing has changed."""
        if seen == self.studio.trainer.status().version:
            return [gr.skip()] * len(self.live)
        shown = self.view(*chosen)
        if self.studio.trainer.status().state == "running":  # somebody may just be choosing
            shown[-len(self.choices) :] = [gr.skip()] * len(self.choices)
        return shown

    def refresh(self, *chosen: Any) -> list[Any]:
        """What can be chosen, after other tabs may have made more of it; what is chosen stays."""
        data, start, reward, resumable = (*chosen, None, None, None, None)[:4]
        trainer, voices = self.studio.trainer, self.studio.voices
        found = trainer.resumable()
        files = self._data()
        files += [("uploaded", UPLOADED)] if data == UPLOADED else []
        return [
            _dropdown(files, data),
            _dropdown([(name, name) for name in trainer.starts()], start),
            _dropdown([(name, name) for name in voices.rewards()], reward),
            gr.update(visible=bool(found) and not trainer.status().active),
            _dropdown([(one.sentence, one.name) for one in found], resumable),
        ]

    def view(self, *chosen: Any) -> list[Any]:
        """Everything about the run, as `live` has it."""
        trainer = self.studio.trainer
        status = trainer.status()
        figures = trainer.figures
        ended = status.state == "finished"
        speaks = status.run in self.studio.voices.names()
        remarks = trainer.health()
        told_health = "\n".join(f"{WORDS[one.level]}: {one.what} {one.do}".strip() for one in remarks)
        worst = remarks[0].level if remarks else "good"
        return [
            status.version,
            status.sentence if status.run else EMPTY,
            progress_bar(status.step, status.total),
            gr.update(value=told_health, visible=bool(remarks), elem_classes=[f"health-{worst}"]),
            gr.update(interactive=not status.active),
            gr.update(interactive=status.active and status.state != "stopping"),
            gr.update(visible=ended and speaks),
            gr.update(interactive=speaks),
            gr.update(interactive=speaks),
            self._samples(),
            "\n".join(trainer.log),
            *(_plot(figures, panel, status) for panel in PANELS),
            *self.refresh(*chosen),
        ]

    # ---- inside

    def _samples(self) -> list[list[str]]:
        newest = self.studio.trainer.samples[::-1][:SAMPLES_SHOWN]
        return [
            [str(one.step), one.prompt, one.text, "" if one.score is None else f"{one.score:+.2f}"] for one in newest
        ]

    def _data(self) -> list[tuple[str, str]]:
        store = self.studio.store
        people = store.annotators()
        choices = [("everything collected", EVERYTHING)]
        choices += [(f"by {name}", f"{ANNOTATOR}{name}") for name in people if len(people) > 1]
        choices += [(f"tagged {tag}", f"{TAG}{tag}") for tag in store.tags()]
        return choices + [(f"file {name}", f"{FILE}{name}") for name in self.studio.trainer.files()]

    def _chosen(self, data: str | None, uploaded: str | None) -> View | Path:
        if data == UPLOADED and uploaded:
            return self.studio.trainer.file(uploaded, self._upload_folders())
        given = data or EVERYTHING
        if given.startswith(FILE):
            return self.studio.trainer.file(given.removeprefix(FILE))
        if given.startswith(ANNOTATOR):
            return View(annotator=given.removeprefix(ANNOTATOR))
        return View(tag=given.removeprefix(TAG)) if given.startswith(TAG) else View()

    def _upload_folders(self) -> list[Path]:
        return [Path(self.parts.upload.GRADIO_CACHE)]

    def _kept(self, asked: tuple[Any, ...]) -> tuple[Any, ...]:
        """What was chosen in the lists, of everything that was asked."""
        _, _, data, _, start, reward, *_ = asked
        return data, start, reward, None


def _dropdown(choices: list[tuple[str, str]], chosen: str | None) -> Any:
    """The list with what was chosen still chosen, else its first."""
    values = [value for _, value in choices]
    return gr.update(choices=choices, value=chosen if chosen in values else next(iter(values), None))


def _plot(figures: Any, panel: Any, status: Status) -> Any:
    drawn = points(figures, panel)
    if not drawn:
        return gr.update(visible=False)
    table = pd.DataFrame(
        [(point.step, point.value, point.curve) for point in drawn], columns=["step", "value", "curve"]
    )
    return gr.update(value=table, visible=True, x_lim=[1, max(2, status.total)])
