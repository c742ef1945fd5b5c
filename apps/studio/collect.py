"""Collect: a prompt, its answers side by side, one key that decides, and the next pair is there."""

import html
import time
from typing import Any

import gradio as gr

from lowrank_align.store import Stale
from lowrank_align.studio.collecting import WRITTEN, Desk, Voted
from lowrank_align.studio.collecting_view import SIDES, Shown, decisions, parse_order, shown_now, told_in_words
from lowrank_align.studio.deciding import Draft, can_go_on
from lowrank_align.studio.studio import Studio

from .collect_panels import Panels
from .collect_parts import EMPTY, Parts, lay_out
from .manners import AT_ONCE, QUIET, told, told_in

STRENGTHS = {"slightly": 1, "clearly": 2, "by far": 3}


def build(studio: Studio, page: Any) -> None:
    """The tab's components and what they do."""
    parts = lay_out(studio)
    Handlers(studio, page, parts).wire()


class Handlers:
    """What happens when something is pressed. All state is on the desk; a page holds only which pair it shows."""

    def __init__(self, studio: Studio, page: Any, parts: Parts) -> None:
        self.studio, self.page, self.parts = studio, page, parts
        p = parts
        self.said = [p.strength, p.reason, p.tags, p.editing, *p.answers]  # what a draft is made of
        self.desk_view = [
            p.pair, p.last_pair, p.editing, p.prompt, p.before, p.strength, p.reason, p.tags, p.written_row, p.written,
            p.order, p.rank_row, p.vote_a, p.vote_b, p.last, p.message, p.count, p.queue, p.empty, p.recent, p.timer,
            p.draw, p.typed, p.go_on_row, *p.columns, *p.answers, *p.states,
        ]  # fmt: skip
        # What people, or the stream, change on the page: sent each time. The rest only where it is new.
        self.always = [
            p.prompt, p.typed, p.strength, p.reason, p.tags, p.written, p.order, p.editing, p.message, p.timer,
            *p.answers, *p.states,
        ]  # fmt: skip
        self.streaming_view = [p.message, p.timer, *p.answers, *p.states]

    def wire(self) -> None:
        p, who = self.parts, self.page.annotator
        view = self.desk_view

        def on(trigger: Any, handler: Any, inputs: list[Any], outputs: Any = None) -> None:
            """An event that shows the desk, unless with `outputs` of its own."""
            if outputs is None or outputs[: len(view)] == view:
                inputs, outputs = [p.sent, p.pair, *inputs], [p.sent, *(outputs or view)]
                handler = self.only_new(handler)
            handler = told_in(p.message, outputs, handler) if p.message in outputs else told(handler)
            trigger(handler, inputs, outputs, **AT_ONCE)

        for trigger in (p.draw.click, p.prompt.submit):
            on(trigger, self.draw, [who, p.pair, p.prompt, p.system, p.typed])
        for choice, button in p.votes.items():
            on(button.click, self._voter(choice), [who, p.pair, p.order, *self.said])
        on(p.undo.click, self.undo, [who, p.pair])
        p.prompt.input(lambda: True, None, p.typed, trigger_mode="always_last", **AT_ONCE)
        on(p.write.click, self.write, [who, p.pair, p.written])
        on(p.written.submit, self.write, [who, p.pair, p.written])
        for trigger in (p.go_on.click, p.question.submit):
            on(trigger, self.go_on, [who, p.last_pair, p.question], [*view, p.question])
        for side, button in enumerate(p.edits):
            on(button.click, self._editor(side), [who, p.pair, p.editing, *p.answers],
               [p.editing, p.written, p.timer, *p.answers])  # fmt: skip
        on(p.timer.tick, self.stream, [who, p.pair, p.editing], self.streaming_view)
        on(self.page.watch(self.moved, p.pair).change, self.beat, [who, p.pair, p.seen, p.editing], [*view, p.seen])
        for field in (p.strength, p.reason, p.tags, *p.answers):  # what is typed survives a reload
            field.input(told(self.keep), [who, p.pair, *self.said], None, trigger_mode="always_last", **AT_ONCE)
        panels = Panels(self.studio, self.take_seat)
        on(p.plan_changed, panels.change_plan, [who, *p.plan_inputs], [p.message])
        on(p.upload.upload, panels.add_file, [who, p.upload])
        on(p.paste_add.click, panels.add_pasted, [who, p.paste], [*view, p.paste])
        on(p.examples.click, panels.add_examples, [who])
        on(who.change, self.take_seat, [who])
        self.page.on_load(self.only_new(self.take_seat), [p.sent, p.pair, who], [p.sent, *view])
        self.page.on_load(panels.choices, [], p.voice_choices)
        self.page.tab("collect").select(told(panels.choices), [], p.voice_choices, **QUIET)

    def only_new(self, handler: Any) -> Any:
        """The handler without what the page shows already: it remembers what it was sent (`sent`, first in and out).

        Answers may overtake each other: where the page shows another pair than it was last sent, all is sent.
        """

        def trimmed(sent: list[Any], shown_pair: str | None, *values: Any) -> list[Any]:
            found = handler(*values)
            before = sent if sent and sent[0] == shown_pair else [None] * len(self.desk_view)
            now, shown = [], []
            for part, old, value in zip(self.desk_view, before, found, strict=False):
                same = part not in self.always and value == old
                shown.append(gr.skip() if same else value)
                now.append(old if value == gr.skip() else value)
            return [now, *shown, *found[len(self.desk_view) :]]

        return trimmed

    # ---- what people do

    def draw(self, who: str, pair: str | None, prompt: str | None, system: str | None, typed: bool) -> list[Any]:
        """G: a typed prompt; the same prompt once more while the pair is undecided; else the next one."""
        desk = self.studio.desk(who)
        now = shown_now(desk)
        stale = (pair or "") != now.pair_id
        text = (prompt or "").strip()
        if text and (typed or not stale) and text != now.prompt.strip():
            desk.ask(text, system)
        elif stale:
            raise Stale("the desk has changed in another tab; it is shown in a moment as it is")
        elif desk.current is not None and not desk.held and desk.current.record is None:
            desk.draw_again()
        else:
            desk.next()
        return self.view(desk)

    def _voter(self, choice: str) -> Any:
        def vote(who: str, pair: str, order: str, *said: Any) -> list[Any]:
            desk = self.studio.desk(who)
            ranks = parse_order(order or "", shown_now(desk).count) if choice == "rank" else None
            voted = desk.vote(pair, choice, draft=self._draft(desk, *said), ranks=ranks)
            if not desk.held:
                desk.bring_next()
            return self.view(desk, voted)

        return vote

    def undo(self, who: str, pair: str | None) -> list[Any]:
        desk = self.studio.desk(who)
        desk.undo(pair or "")
        return self.view(desk)

    def write(self, who: str, pair: str, text: str) -> list[Any]:
        desk = self.studio.desk(who)
        voted = desk.write(pair, text or "")
        desk.bring_next()
        return self.view(desk, voted)

    def go_on(self, who: str, last_pair: str, question: str) -> list[Any]:
        desk = self.studio.desk(who)
        desk.go_on(question or "", last_pair)
        return [*self.view(desk), ""]

    def _editor(self, side: int) -> Any:
        def edit(who: str, pair: str, editing: list[int], *answers: str) -> list[Any]:
            """E: the answer's box can be written in; of a held pair, the better answer begins as this one."""
            desk = self.studio.desk(who)
            same: list[Any] = [gr.skip()] * len(answers)
            if desk.held:
                return [editing, gr.update(value=answers[side]), gr.skip(), *same]
            text = desk.open_side(pair, side)
            box = gr.skip() if side in editing else gr.update(value=text, interactive=True)
            boxes = [box if k == side else gr.skip() for k in range(len(answers))]
            return [sorted({*editing, side}), gr.skip(), gr.skip(), *boxes]

        return edit

    def take_seat(self, who: str) -> list[Any]:
        """A page was opened, or somebody else sits down: what is on their desk."""
        desk = self.studio.desk(who)
        if desk.current is None:
            desk.bring_next()
        return self.view(desk)

    # ---- what the page shows

    def stream(self, who: str, pair: str, editing: list[int]) -> list[Any]:
        """A little more of the answers, while they come."""
        desk = self.studio.desk(who)
        now = shown_now(desk)
        if now.pair_id != pair:
            return [gr.skip()] * len(self.streaming_view)
        return [now.message, gr.update(active=now.streaming), *self._texts(now, editing), *self._states(now)]

    def keep(self, who: str, pair: str, *said: Any) -> None:
        """The draft, while it is written."""
        desk = self.studio.desk(who)
        desk.keep_draft(pair, self._draft(desk, *said))

    def moved(self, who: str, pair: str | None) -> list[Any]:
        """Changes with what is on the desk and in the store, and each second while answers come."""
        desk = self.studio.desk(who)
        current = desk.current
        streaming = int(time.monotonic()) if current is not None and not current.done else 0
        on_desk = current.id if current else ""
        return [desk.annotator, on_desk, (pair or "") == on_desk, desk.held, streaming, self.studio.store.pulse()]

    def beat(self, who: str, pair: str, seen: list[Any], editing: list[int]) -> list[Any]:
        """What changed, here or elsewhere: another tab's pair, the counter, the last decisions."""
        desk = self.studio.desk(who)
        now, p = shown_now(desk), self.parts
        pulse = [desk.annotator, self.studio.store.pulse(), now.streaming]
        if now.pair_id != (pair or ""):
            return [*self.view(desk), seen]
        found: dict[Any, Any] = {}
        if pulse[:2] != seen[:2]:
            line, queue = told_in_words(self.studio, desk)
            found = {p.count: line, p.queue: queue, p.recent: decisions(self.studio, desk) or EMPTY}
        if now.streaming or pulse != seen:
            # A look at the stream that began before a vote may have stopped the stream's timer after it.
            found |= {p.timer: gr.update(active=now.streaming), p.message: now.message}
            found |= dict(zip(p.answers, self._texts(now, editing), strict=True))
            found |= dict(zip(p.states, self._states(now), strict=True))
        return [*(found.get(part, gr.skip()) for part in self.desk_view), pulse]

    def view(self, desk: Desk, voted: Voted | None = None) -> list[Any]:
        """Everything on the desk, in the order of `desk_view`."""
        now = shown_now(desk)
        editing = sorted(now.edited)
        strength = next((word for word, number in STRENGTHS.items() if number == desk.draft.strength), None)
        tags = gr.update(value=list(desk.draft.tags), choices=self.studio.store.tags())
        ranking = now.count > 2
        return [
            now.pair_id,
            gr.skip() if voted is None else voted.entry.record.id,
            editing,
            now.prompt,
            gr.update(value=now.before, visible=bool(now.before)),
            strength,
            desk.draft.reason,
            tags,
            gr.update(visible=desk.held),
            "",
            "",
            gr.update(visible=ranking),
            gr.update(visible=not ranking),
            gr.update(visible=not ranking),
            "" if voted is None else _revealed(voted),
            now.message,
            gr.skip(),  # the counter, the queue and the last decisions follow with the next beat: a vote waits for none
            gr.skip(),
            gr.update(visible=now.pair_id == "" and self.studio.store.queue_total() == 0),
            gr.skip(),
            gr.update(active=now.streaming),
            gr.update(value=now.next_label),
            False,
            gr.skip() if voted is None else gr.update(visible=can_go_on(voted.entry)),
            *(gr.update(visible=side < max(2, now.count)) for side in range(SIDES)),
            *self._texts(now, [], fresh=True),
            *self._states(now),
        ]

    def _texts(self, now: Shown, editing: list[int], *, fresh: bool = False) -> list[Any]:
        """The answers by side; a box that is written in is left alone, but for a fresh view."""
        found: list[Any] = []
        for side in range(SIDES):
            text = now.texts[side] if side < now.count else ""
            if fresh:
                found.append(gr.update(value=now.edited.get(side, text), interactive=side in now.edited))
            else:
                found.append(gr.skip() if side in editing or side >= now.count else text)
        return found

    def _states(self, now: Shown) -> list[str]:
        return [now.states[side] if side < now.count else "" for side in range(SIDES)]

    def _draft(self, desk: Desk, *said: Any) -> Draft:
        strength, reason, tags, editing, *texts = said
        now = shown_now(desk)
        edits = {now.sides[side]: texts[side] or "" for side in editing if side < now.count}
        return Draft(STRENGTHS.get(strength), reason or "", tuple(tags or ()), edits)


def _revealed(voted: Voted) -> str:
    """Who said what, for a moment after the vote."""
    if voted.sources == WRITTEN:
        return '<span class="fades">your answer is kept</span>'
    names = " · ".join(f"{chr(65 + k)}: {html.escape(name)}" for k, name in enumerate(voted.sources))
    return f'<span class="fades" data-of="{voted.entry.record.id}-{voted.entry.version}">{names}</span>'
