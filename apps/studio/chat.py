"""Chat: talk with any adapter while it is there, compare two, and teach from what they say."""

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from lowrank_align.errors import UserError
from lowrank_align.studio import chat_view
from lowrank_align.studio.answers import Source
from lowrank_align.studio.asking import Wish, watch
from lowrank_align.studio.chatting import Chat
from lowrank_align.studio.studio import Studio
from lowrank_align.studio.verdicts import prefer
from lowrank_align.studio.voices import BASE

from .chat_answer import Closer
from .chat_parts import NO_REWARD, NOBODY, Controls, lay_out
from .manners import QUIET, told

FOLLOWERS = 16  # pages that may watch an answer come at the same time


def build(studio: Studio, page: Any) -> None:
    """The tab's components and what they do."""
    Handlers(studio, page).wire()


class Handlers:
    """What happens when something is pressed. The talk is on the server; a page holds only what it shows of it."""

    def __init__(self, studio: Studio, page: Any) -> None:
        self.studio, self.page, self.chats = studio, page, studio.chats
        self.parts = p = lay_out(studio)
        self.closer = Closer(studio, self.chats, p)
        self.whole_view = [
            p.log, p.keys, p.side_row, *p.side_texts, *p.picks, p.standing, p.send, p.stop, p.seen, p.following,
            *self.closer.view_parts,
        ]  # fmt: skip
        self.kept = [p.system, *p.controls]

    def wire(self) -> None:
        p, who, view = self.parts, self.page.annotator, self.whole_view
        asking: dict[str, Any] = {"concurrency_limit": FOLLOWERS, "concurrency_id": "chat-follow", **QUIET}
        at_once: dict[str, Any] = {"concurrency_limit": FOLLOWERS, **QUIET}  # never behind an answer on its way
        controls = [p.system, *p.controls]
        for trigger in (p.send.click, p.question.submit):
            trigger(told(self.send), [who, p.question, *controls], [p.question, *view], **asking)
        p.steps["regenerate"].click(told(self.regenerate), [who, *controls], view, **asking)
        p.log.retry(told(self.retry), [who, p.keys, *controls], view, **asking)
        p.log.edit(told(self.edit), [who, p.keys, *controls], view, **asking)
        p.stop.click(told(self.stop), [who], None, concurrency_id="chat-stop", **at_once)
        p.steps["undo"].click(told(self.undo), [who, p.question], [p.question, *view], **at_once)
        p.log.undo(told(self.undo), [who, p.question], [p.question, *view], **at_once)
        for trigger in (p.steps["clear"].click, p.log.clear):
            trigger(told(self._step(Chat.clear)), [who], view, **at_once)
        p.steps["back"].click(told(self._step(Chat.bring_back)), [who], view, **at_once)
        for side, button in enumerate(p.picks):
            button.click(told(self._picker(side)), [who, p.keep_picks], view, **at_once)
        p.export["make"].click(told(self.export), [who], [p.export["markdown"], p.export["row"]], **at_once)
        self.closer.wire(who, view, self.view, at_once)
        self.page.watch(self.moved).change(told(self.beat), [who, p.seen, p.following], view, **at_once)
        self.page.on_load(self.open, [who], [*self.kept, *view])
        who.change(told(self.open), [who], [*self.kept, *view], **at_once)
        self.page.tab("chat").select(told(self.names), list(p.controls), list(p.controls), **at_once)

    # ---- asking

    def send(self, who: str, question: str, system: str, *controls: Any) -> Iterator[list[Any]]:
        chat = self._ready(who, system, controls)
        chat.send(question, wish_of(controls))
        yield ["", *self._stream(chat, following=True)]
        for values in self._follow(chat):
            yield [gr.skip(), *values]  # the next question may be typed already

    def regenerate(self, who: str, system: str, *controls: Any) -> Iterator[list[Any]]:
        chat = self._ready(who, system, controls)
        chat.regenerate(wish_of(controls))
        yield from self._follow(chat)

    def retry(self, event: gr.RetryData, who: str, keys: list[str], system: str, *controls: Any) -> Iterator[list[Any]]:
        chat = self._ready(who, system, controls)
        chat.regenerate(wish_of(controls), exchange_at(chat, keys, event.index))
        yield from self._follow(chat)

    def edit(self, event: gr.EditData, who: str, keys: list[str], system: str, *controls: Any) -> Iterator[list[Any]]:
        chat = self._ready(who, system, controls)
        chat.edit(exchange_at(chat, keys, event.index), chat_view.as_typed(str(event.value)), wish_of(controls))
        yield from self._follow(chat)

    def stop(self, who: str) -> None:
        self.chats.of(who).stop()

    # ---- the talk

    def undo(self, who: str, typed: str) -> list[Any]:
        chat = self.chats.of(who)
        question = chat.undo()
        return [typed or question, *self.view(chat)]

    def _step(self, step: Callable[[Chat], None]) -> Callable[[str], list[Any]]:
        def take(who: str) -> list[Any]:
            chat = self.chats.of(who)
            step(chat)
            return self.view(chat)

        return take

    def _picker(self, side: int) -> Callable[[str, bool], list[Any]]:
        def pick(who: str, keep: bool) -> list[Any]:
            chat = self.chats.of(who)
            last = chat.talk.exchanges[-1] if chat.talk.exchanges else None
            if last is None or last.answer is not None or len(last.responses) < 2:
                raise UserError("nothing stands side by side any more; reload the page")
            pair = last.responses[-2:]
            chat.pick(pair[side].id)
            if keep:
                prefer(self.studio, chat, pair[side].id, pair[1 - side].id)
                gr.Info("Kept as a pair.", title="")
            return self.view(chat)

        return pick

    def export(self, who: str) -> list[Any]:
        """The transcript as two files to download; where no trainer would take it, as text alone, and why."""
        talk = self.chats.of(who).talk
        if not talk.exchanges:
            raise UserError("nothing has been said yet")
        folder = Path(tempfile.mkdtemp(prefix="transcript-", dir=os.environ.get("GRADIO_TEMP_DIR")))
        text, row = folder / "transcript.md", folder / "transcript.jsonl"
        text.write_text(talk.markdown(), encoding="utf-8")
        try:
            row.write_text(json.dumps(talk.row(), ensure_ascii=False) + "\n", encoding="utf-8")
        except UserError as error:
            gr.Warning(f"As Markdown only: {error}.", title="")
        return [gr.update(value=str(p), visible=True) if p.exists() else gr.update(visible=False) for p in (text, row)]

    # ---- what the page shows

    def open(self, who: str) -> list[Any]:
        """A page was opened, or somebody else sits down: their talk, and the controls as they were."""
        chat = self.chats.of(who)
        self.studio.voices.refresh()
        kept = [chat.preferences.get(name) for name in Controls._fields]
        return [chat.talk.system, *self._choosable(kept), *self.view(chat)]

    def names(self, *controls: Any) -> list[Any]:
        """The tab is shown: who can answer and who can score by now; runs come and go."""
        self.studio.voices.refresh()
        return self._choosable(list(controls))

    def _choosable(self, values: list[Any]) -> list[Any]:
        """The controls with these values (None: as it is); a choice that has gone falls back."""
        found, voices = [], self.studio.voices.names()
        lists = {
            "voice": (voices, BASE),
            "against": ([NOBODY, *voices], NOBODY),
            "reward": ([NO_REWARD, *self.studio.voices.rewards()], NO_REWARD),
        }
        for name, value in zip(Controls._fields, values, strict=True):
            if name in lists:
                choices, always = lists[name]
                found.append(gr.update(choices=choices, value=value if value in choices else always))
            else:
                found.append(gr.skip() if value is None else value)
        return found

    def moved(self, who: str) -> list[Any]:
        """Changes with the talk, and each second while an answer is on its way."""
        chat = self.chats.of(who)
        return [chat.revision, int(time.monotonic()) if chat.busy else 0]

    def beat(self, who: str, seen: int, following: bool) -> list[Any]:
        """Every second: what another tab did, or an answer that was on its way when the page was loaded again."""
        chat = self.chats.of(who)
        if chat.busy:
            return [gr.skip()] * len(self.whole_view) if following else self._stream(chat, following=False)
        return [gr.skip()] * len(self.whole_view) if chat.revision == seen else self.view(chat)

    def view(self, chat: Chat) -> list[Any]:
        """Everything that a page shows of a talk."""
        return [*self._talk(chat, following=False), *self.closer.view(chat)]

    def _stream(self, chat: Chat, *, following: bool) -> list[Any]:
        """What changes while an answer comes. `following`: this page watches it, and the clock need not."""
        return [*self._talk(chat, following=following), *[gr.skip()] * len(self.closer.view_parts)]

    def _talk(self, chat: Chat, *, following: bool) -> list[Any]:
        revision, busy = chat.revision, chat.busy
        shown = chat_view.lines(chat)
        sides = chat_view.sides(chat)
        boxes: list[Any] = [gr.skip()] * 4
        if len(sides) == 2:
            boxes = [gr.update(value=text, label=line) for text, line in sides]
            boxes += [gr.update(interactive=not busy)] * 2
        return [
            gr.update(value=[message(line) for line in shown], feedback_value=thumbs(shown)),
            [line.id for line in shown],
            gr.update(visible=len(sides) == 2),
            *boxes,
            chat_view.standing(chat),
            gr.update(interactive=not busy),
            gr.update(interactive=busy),
            revision,
            following,
        ]

    def _follow(self, chat: Chat) -> Iterator[list[Any]]:
        for pending in watch(chat):
            yield self.view(chat) if pending is None else self._stream(chat, following=True)

    def _ready(self, who: str, system: str, controls: tuple[Any, ...]) -> Chat:
        """The chat, under this system prompt and with these controls kept."""
        chat = self.chats.of(who)
        wish_of(controls)  # what is wrong with them is told before anything changes
        if not chat.busy:
            chat.set_system(system)
        chat.prefer(**Controls(*controls)._asdict())
        return chat


def wish_of(controls: tuple[Any, ...]) -> Wish:
    """What the controls ask for; UserError where a seed is no number."""
    c = Controls(*controls)
    seed = str(c.seed or "").strip()
    if seed and not seed.isdecimal():
        raise UserError(f"seed: {seed!r} is no whole number from 0 on; leave it empty for a new one each time")

    def source(voice: str) -> Source:
        return Source(voice, float(c.temperature), float(c.top_p), int(c.max_new_tokens))

    return Wish(
        source(c.voice),
        None if c.against in (None, NOBODY) else source(c.against),
        int(c.best_of),
        None if c.reward in (None, NO_REWARD) else c.reward,
        int(seed) % 2**31 if seed else None,
    )


def exchange_at(chat: Chat, keys: list[str], index: Any) -> str:
    """The exchange that a message of the log belongs to, by what the page showed when it was pressed."""
    place = index[0] if isinstance(index, list | tuple) else int(index)
    for key in reversed(keys[: place + 1]):
        for exchange in chat.talk.exchanges:
            if key and (exchange.id == key or key in [response.id for response in exchange.responses]):
                return exchange.id
    raise UserError("this message is no longer part of the talk; reload the page")


def message(line: chat_view.Line) -> dict[str, Any]:
    """A line as the log takes it: text, never markup; thoughts folded."""
    found: dict[str, Any] = {"role": line.role, "content": chat_view.as_text(line)}
    if line.title:
        found["metadata"] = {"title": line.title, "status": "pending" if line.open else "done"}
    return found


def thumbs(lines: list[chat_view.Line]) -> list[str | None]:
    """One for each bubble: a thought and its answer stand in the same one, so the answer's is the last."""
    named = {None: None, True: "Like", False: "Dislike"}
    return [
        named[[line.liked for line in bubble][-1]]
        for role, bubble in itertools.groupby(lines, key=lambda line: line.role)
        if role == "assistant"
    ]
