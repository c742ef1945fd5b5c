"""The panels below a pair: where answers come from, which pair is next, and what is in the queue."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from lowrank_align.studio.answers import Source
from lowrank_align.studio.examples import example_prompts
from lowrank_align.studio.pairs import Plan
from lowrank_align.studio.studio import Studio

from .collect_parts import IN_ORDER


class Panels:
    """What happens in them. `show(who)` gives the desk as the page shows it."""

    def __init__(self, studio: Studio, show: Callable[[str], list[Any]]) -> None:
        self.studio, self._show = studio, show

    def add_file(self, who: str, path: str) -> list[Any]:
        found = self.studio.add_prompts_from(path)
        return self._added(who, found.added, found.duplicates)

    def add_pasted(self, who: str, text: str) -> list[Any]:
        lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
        found = self.studio.store.enqueue([[{"role": "user", "content": line}] for line in lines], "pasted")
        return [*self._added(who, found.added, found.duplicates), ""]

    def add_examples(self, who: str) -> list[Any]:
        found = self.studio.store.enqueue(example_prompts(self.studio.base.name), "examples")
        return self._added(who, found.added, found.duplicates)

    def _added(self, who: str, added: int, duplicates: int) -> list[Any]:
        known = f", {duplicates} were there already" if duplicates else ""
        gr.Info(f"{added} prompts added to the queue{known}.", title="")
        return self._show(who)

    def choices(self) -> list[Any]:
        """Who can answer and who can judge by now; runs come and go."""
        self.studio.voices.refresh()
        voices = self.studio.voices.names()
        order = [IN_ORDER, *self.studio.judges()]
        return [gr.update(choices=voices), gr.update(choices=voices), gr.update(choices=order)]

    def change_plan(self, who: str, *values: Any) -> str:
        voice_a, warm_a, voice_b, warm_b, tokens, count, order, repeats, second = values
        desk = self.studio.desk(who)
        top_p = desk.plan.sources[0].top_p
        both = ((voice_a, warm_a), (voice_b, warm_b))
        plan = Plan(
            sources=tuple(Source(voice, float(warm), top_p, int(tokens)) for voice, warm in both),
            count=int(count),
            informative=order if order in self.studio.judges() else None,
            repeats=bool(repeats),
            second_opinions=bool(second),
        )
        desk.change_plan(plan)
        return "From the next pair on."
