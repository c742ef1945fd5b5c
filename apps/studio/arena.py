"""Arena: players meet blind, one key decides, and the results say how sure they are."""

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from lowrank_align.studio.arena import Arena
from lowrank_align.studio.arena_view import (
    judged_in_words,
    revealed,
    setup_as_typed,
    setup_from,
    shown_now,
    summary,
    table,
)
from lowrank_align.studio.standings import judged_by
from lowrank_align.studio.studio import Studio
from lowrank_align.studio.voices import LIVE

from .arena_parts import EVERYONE, Parts, lay_out
from .manners import QUIET, told


def build(studio: Studio, page: Any) -> None:
    """The tab's components and what they do."""
    Handlers(studio, page, lay_out(studio)).wire()


def compare(studio: Studio, annotator: str, new: str, old: str) -> dict[str, Any]:
    """For a button of another tab: set a new voice against an old one, and show them (an update of `page.tabs`)."""
    studio.arena(annotator).compare(new, old)
    update: dict[str, Any] = gr.update(selected="arena")
    return update


class Handlers:
    """What happens when something is pressed. All state is in the arena; a page holds only which battle it shows."""

    def __init__(self, studio: Studio, page: Any, parts: Parts) -> None:
        self.studio, self.page, self.parts = studio, page, parts
        p = parts
        self.setup = [p.players, p.temperatures, p.longest, p.typed]
        self.battle_view = [
            p.battle,
            p.prompt,
            p.panel,
            p.hint,
            p.message,
            p.last,
            p.timer,
            p.start,
            *p.answers,
            *p.states,
        ]
        self.results_view = [p.summary, p.table, p.seen]

    def wire(self) -> None:
        p, who, page = self.parts, self.page.annotator, self.page
        results = (told(self.results), [who, p.scope], self.results_view)

        def on(trigger: Any, handler: Any, inputs: list[Any]) -> None:
            trigger(told(handler), inputs, self.battle_view, **QUIET).success(*results, **QUIET)

        on(p.start.click, self.start, [who, *self.setup])
        for choice, button in p.votes.items():
            on(button.click, self._voter(choice), [who, p.battle])
        on(p.undo.click, self.undo, [who])
        p.timer.tick(told(self.stream), [who, p.battle], self.battle_view, **QUIET)
        p.scope.change(*results, **QUIET)
        p.score.click(told(self.score), [who, p.reward, p.scope], p.scored, **QUIET)
        everything = [*self.setup, p.reward, *self.battle_view, *self.results_view]
        for trigger in (page.tab("arena").select, who.change):
            trigger(told(self.everything), [who, p.scope], everything, **QUIET)
        page.on_load(self.everything, [who, p.scope], everything)
        elsewhere = page.watch(lambda name: self._seen(self.studio.arena(name)))
        elsewhere.change(told(self.beat), [who, p.scope, p.seen], everything, **QUIET)

    # ---- what people do

    def start(self, who: str, voices: list[str], temperatures: str, longest: float, typed: str) -> list[Any]:
        arena = self.studio.arena(who)
        arena.start(setup_from(voices or [], temperatures or "", longest, typed or ""))
        return self.view(arena)

    def _voter(self, choice: str) -> Any:
        def vote(who: str, battle: str) -> list[Any]:
            arena = self.studio.arena(who)
            arena.vote(battle, choice)
            return self.view(arena, just_decided=True)

        return vote

    def undo(self, who: str) -> list[Any]:
        arena = self.studio.arena(who)
        arena.undo()
        return self.view(arena)

    def score(self, who: str, reward: str | None, scope: str) -> Iterator[str]:
        """A reward run beside the votes, with how far it has got."""
        if not reward:
            yield "Choose a reward run first; train one in Train (method: reward)."
            return
        for judged in judged_by(self.studio, reward, self.studio.arena(who).in_question(scope == EVERYONE)):
            yield judged_in_words(reward, judged)

    # ---- what the page shows

    def stream(self, who: str, battle: str) -> list[Any]:
        """A little more of the answers; a battle that decided itself makes way for the next."""
        arena = self.studio.arena(who)
        tied = arena.look()
        now = shown_now(arena)
        if tied is not None or now.battle_id != battle:
            return self.view(arena, just_decided=tied is not None)
        keep: dict[Any, Any] = dict(zip(self.parts.answers, now.texts, strict=True))
        keep |= dict(zip(self.parts.states, now.states, strict=True))
        keep |= {self.parts.message: now.message, self.parts.timer: gr.Timer(active=now.streaming)}
        return [keep.get(part, gr.skip()) for part in self.battle_view]

    def beat(self, who: str, scope: str, seen: list[Any]) -> list[Any]:
        """What another tab, or another annotator, has changed."""
        arena = self.studio.arena(who)
        now = self._seen(arena)
        nothing = [gr.skip()] * (len(self.setup) + 1 + len(self.battle_view) + len(self.results_view))
        if seen == now:
            return nothing
        found = self.everything(who, scope)
        if seen and seen[0] == now[0]:  # the players as they were: what somebody is typing there stays
            found[: len(self.setup) + 1] = nothing[: len(self.setup) + 1]
        return found

    def everything(self, who: str, scope: str) -> list[Any]:
        """The players, the battle and the results, as the arena has them."""
        arena = self.studio.arena(who)
        self.studio.voices.refresh()
        known = [name for name in self.studio.voices.names() if name != LIVE]
        rewards = self.studio.voices.rewards()
        voices, temperatures, longest, typed = setup_as_typed(arena.setup, self.studio.settings)
        chosen = gr.update(choices=known, value=[voice for voice in voices if voice in known])
        reward = gr.update(choices=rewards, value=rewards[0] if rewards else None)
        return [chosen, temperatures, longest, typed, reward, *self.view(arena), *self.results(who, scope)]

    def view(self, arena: Arena, just_decided: bool = False) -> list[Any]:
        """The battle, in the order of `battle_view`. Names only of the one that was just decided."""
        now = shown_now(arena)
        there = bool(now.battle_id)
        return [
            now.battle_id,
            now.prompt,
            gr.update(visible=there),
            gr.update(visible=not there and not now.message),
            gr.update(value=now.message, visible=bool(now.message)),
            _fading(arena) if just_decided else gr.skip(),
            gr.Timer(active=now.streaming),
            "Start anew" if there else "Start",
            *now.texts,
            *now.states,
        ]

    def results(self, who: str, scope: str) -> list[Any]:
        arena = self.studio.arena(who)
        seen = self._seen(arena)
        found = arena.standings(scope == EVERYONE)
        shown = table(found)
        rows = gr.update(value={"headers": shown.headers, "data": shown.rows}, visible=bool(found.battles))
        return [summary(found), rows, seen]

    def _seen(self, arena: Arena) -> list[Any]:
        current = arena.current
        setup = [arena.annotator, repr(arena.setup)]
        votes = self.studio.store.pulse() if current else 0  # of others too, while battles are fought here
        return [setup, current.id if current else "", arena.problem, votes]


def _fading(arena: Arena) -> str:
    """Names are the runs' own, not a model's text."""
    now = arena.current.id if arena.current else ""
    return f'<span class="fades" data-before="{now}">{html.escape(revealed(arena.last))}</span>'
