"""Train: what to train on what, what is known before it starts, and how it goes while it does.

The run is the trainer's, not the page's: every page shows the same one, and a reload changes nothing.
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
from lowrank_align.studio.old_runs import Resumable
from lowrank_align.studio.run_request import KNOBS, Request, View, all_settings, follows_reward, losses_of
from lowrank_align.studio.studio import Studio

from .arena import compare
from .manners import QUIET, told
from .train_parts import EMPTY, Parts, lay_out, progress_bar

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
        self.speakers = [one for one in page.demo.blocks.values() if one.elem_id == "chat-adapter"]  # chat's own choice
        self.asked = [p.method, p.name, p.data, p.uploaded, p.start_from, p.reward, p.loss, p.more, *p.knobs]
        self.of_method = [p.about, p.name, p.reward, p.loss, p.settings, *p.knobs]
        self.choices = [p.data, p.start_from, p.reward, p.resume_row, p.resume_run]
        self.live = [
            p.seen, p.plan, p.status, p.progress, p.health, p.start, p.stop, p.ended_row, p.compare, p.chat,
            p.samples_panel, p.samples, p.log, *p.plots,
        ]  # fmt: skip

    def wire(self) -> None:
        p, page = self.parts, self.page
        p.method.input(told(self.take_method), [p.method, p.name], self.of_method, **QUIET).then(
            told(self.check), self.asked, [p.plan], **QUIET
        )
        p.upload.upload(told(self.take_upload), [p.upload], [p.data, p.uploaded], **QUIET).then(
            told(self.check), self.asked, [p.plan], **QUIET
        )
        for changed in (p.data, p.start_from, p.reward, p.loss):
            changed.input(told(self.check), self.asked, [p.plan], trigger_mode="always_last", **QUIET)
        for typed in (p.more, p.name, *p.knobs):
            typed.blur(told(self.check), self.asked, [p.plan], trigger_mode="always_last", **QUIET)
        p.check.click(told(self.check), self.asked, [p.plan], **QUIET)
        p.start.click(told(self.start), self.asked, [p.name, *self.live, *self.choices], **QUIET)
        p.stop.click(told(self.stop), None, self.live, **QUIET)
        p.resume.click(told(self.resume), [p.resume_run], [*self.live, *self.choices], **QUIET)
        p.compare.click(told(self.compare), [page.annotator], [page.tabs], **QUIET)
        p.chat.click(told(self.chat), None, [page.tabs, *self.speakers], **QUIET)
        page.watch(lambda _: self.studio.trainer.status().version).change(
            told(self.tick), [p.seen], [*self.live, *self.choices], **QUIET
        )
        page.on_load(self.open, [p.method], [*self.of_method, *self.live, *self.choices])
        page.tab("train").select(told(self.refresh), [p.data, p.start_from, p.reward], self.choices, **QUIET).then(
            told(self.check), self.asked, [p.plan], **QUIET
        )

    # ---- what is asked for

    def take_method(self, method: str, name: str | None) -> list[Any]:
        """The method's own numbers and settings; a name that was proposed is proposed anew."""
        trainer = self.studio.trainer
        losses = losses_of(method)
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
            trainer.fresh_name(method) if (name or "").strip() in proposed else gr.skip(),
            gr.update(visible=follows_reward(method)),
            gr.update(choices=losses, value=losses[0] if losses else None, visible=bool(losses)),
            [list(row) for row in all_settings(method)],
            *knobs,
        ]

    def take_upload(self, path: str | None) -> tuple[Any, Any]:
        """A file of the browser's becomes the data."""
        if not path:
            return gr.skip(), gr.skip()
        found = self.studio.trainer.file(path, self._upload_folders())
        gr.Info(f"{found.name} is there.", title="")
        return UPLOADED, str(found)

    def request(
        self,
        method: str,
        name: str | None,
        data: str | None,
        uploaded: str | None,
        start: str,
        reward: str | None,
        loss: str | None,
        more: str | None,
        *knobs: Any,
    ) -> Request:
        """What the page says, as the trainer takes it."""
        numbers = dict(zip(KNOBS, knobs, strict=True))
        rows = self._chosen(data, uploaded)
        return Request(method, name or "", rows, start, reward or None, loss or None, numbers, more or "")

    def check(self, *asked: Any) -> str:
        """What is known before a start."""
        found = self.studio.trainer.check(self.request(*asked))
        return "\n".join(f"{MARKS[one.level]} {one.text}" for one in found.said)

    # ---- the run

    def start(self, *asked: Any) -> list[Any]:
        request = self.request(*asked)
        self.studio.trainer.start(request)
        return [self.studio.trainer.fresh_name(request.method), *self.view(), *self._lists()]

    def stop(self) -> list[Any]:
        self.studio.trainer.stop()
        return self.view()

    def resume(self, name: str | None) -> list[Any]:
        if not name:
            raise UserError("choose a run to resume")
        self.studio.trainer.resume(name)
        return [*self.view(), *self._lists()]

    def compare(self, who: str) -> Any:
        """The Arena, with the new one against what it started from."""
        trainer = self.studio.trainer
        return compare(self.studio, who, trainer.status().run, trainer.before())

    def chat(self) -> list[Any]:
        """Chat, with the new adapter."""
        chosen = gr.update(choices=self.studio.voices.names(), value=self.studio.trainer.status().run)
        return [gr.update(selected="chat"), *[chosen] * len(self.speakers)]

    # ---- what is to be seen

    def open(self, method: str) -> list[Any]:
        """A page was opened or loaded again."""
        return [*self.take_method(method, ""), *self.view(), *self.refresh(None, None, None)]

    def tick(self, seen: int) -> list[Any]:
        """Once a second; nothing is sent while nothing has changed."""
        status = self.studio.trainer.status()
        if seen == status.version:
            return [gr.skip()] * (len(self.live) + len(self.choices))
        return [*self.view(), *(self._lists() if status.state != "running" else [gr.skip()] * len(self.choices))]

    def refresh(self, *chosen: str | None) -> list[Any]:
        """What can be chosen, after other tabs may have made more of it; what is chosen stays, else it is the first."""
        lists = self._lists()
        for update, value in zip(lists, chosen, strict=False):
            values = [one for _, one in update["choices"]]
            update["value"] = value if value in values else next(iter(values), None)
        return lists

    def _lists(self) -> list[Any]:
        """Data, adapters, rewards and what can be resumed, as they are by now; what is chosen is left to the page."""
        trainer = self.studio.trainer
        found = trainer.resumable()
        return [
            gr.update(choices=self._data()),
            gr.update(choices=[(name, name) for name in trainer.starts()]),
            gr.update(choices=[(name, name) for name in self.studio.voices.rewards()]),
            gr.update(visible=bool(found) and not trainer.status().active),
            gr.update(choices=[(_from_where(one), one.name) for one in found], value=found[0].name if found else None),
        ]

    def view(self) -> list[Any]:
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
            gr.update(visible=not status.active),
            status.sentence if status.run else EMPTY,
            progress_bar(status.step, status.total),
            gr.update(value=told_health, visible=bool(remarks), elem_classes=[f"health-{worst}"]),
            gr.update(interactive=not status.active),
            gr.update(interactive=status.active and status.state != "stopping"),
            gr.update(visible=ended and speaks),
            gr.update(interactive=speaks),
            gr.update(interactive=speaks),
            gr.update(visible=bool(trainer.samples)),
            self._samples(),
            "\n".join(trainer.log),
            *(_plot(figures, panel, status) for panel in PANELS),
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
        choices += [(f"file {name}", f"{FILE}{name}") for name in self.studio.trainer.files()]
        return [*choices, ("an uploaded file", UPLOADED)]

    def _chosen(self, data: str | None, uploaded: str | None) -> View | Path:
        if data == UPLOADED:
            if not uploaded:
                raise UserError("no file is uploaded yet; press Upload and choose one")
            return self.studio.trainer.file(uploaded, self._upload_folders())
        given = data or EVERYTHING
        if given.startswith(FILE):
            return self.studio.trainer.file(given.removeprefix(FILE))
        if given.startswith(ANNOTATOR):
            return View(annotator=given.removeprefix(ANNOTATOR))
        return View(tag=given.removeprefix(TAG)) if given.startswith(TAG) else View()

    def _upload_folders(self) -> list[Path]:
        return [Path(self.parts.upload.GRADIO_CACHE)]


def _from_where(run: Resumable) -> str:
    return f"{run.name}, {f'from step {run.step}' if run.step else 'from its beginning'}"


def _plot(figures: Any, panel: Any, status: Status) -> Any:
    drawn = points(figures, panel)
    if not drawn:
        return gr.update(visible="hidden")  # taken out of the page, it could not be measured when it comes back
    table = pd.DataFrame(
        [(point.step, point.value, point.curve) for point in drawn], columns=["step", "value", "curve"]
    )
    return gr.update(value=table, visible=True, x_lim=[1, max(2, status.total)])
