"""Pairs of a role's own answers, labelled by simulated annotators: what `frontier` and `rounds` collect."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_align.annotators import Annotator, Labels, Score, label_pairs
from lowrank_align.base import Base
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, parse_row
from lowrank_align.errors import UserError
from lowrank_align.rewards import seen_answer, seen_prompt
from lowrank_align.rollout import generator_for, sample

BATCH = 64


@dataclass(frozen=True)
class Drawn:
    """The labelled pairs, and what they cost."""

    labels: Labels  # rows as files have them: prompt, chosen, rejected, annotator
    answers: int
    tokens: int  # of all answers, end tokens among them

    @property
    def mean_tokens(self) -> float:
        """Of an answer."""
        return self.tokens / self.answers


def answer_as(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt: text, or a message of the assistant's."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def draw_pairs(
    base: Base,
    role: str,
    renderer: Renderer,
    rows: Sequence[Row],
    pool: Sequence[Annotator],
    score: Score,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Drawn:
    """Two answers of `role` to every row's prompt, drawn together, each pair labelled by one of the pool.

    `renderer` has the role's answer prefix, if it has one. Prompts without room for an answer must be gone.
    """
    with base.role(role):
        groups = sample(
            base,
            [renderer.prompt_ids(row) for row in rows],
            end_ids=renderer.end_ids,
            max_new_tokens=max_new_tokens,
            generator=generator_for(base.device, seed, "pairs"),
            temperature=temperature,
            top_p=top_p,
            completions_per_prompt=2,
            batch_size=BATCH,
        )
    texts = [seen_prompt(row) for row in rows]
    chats = [not isinstance(row.prompt, str) for row in rows]
    sides = [
        [seen_answer(renderer, group[side].ids, chat=chat) for group, chat in zip(groups, chats, strict=True)]
        for side in (0, 1)
    ]
    labels = label_pairs(pool, score, texts, *sides, seed=seed)
    for place, line in zip(labels.places, labels.rows, strict=True):  # by place: two conversations may end alike
        prompt = rows[place].prompt
        line |= {"prompt": prompt} | {side: answer_as(prompt, line[side]) for side in ("chosen", "rejected")}
    readable = [line for line in labels.rows if _can_be_read(line)]
    labels.refused, labels.rows = len(labels.rows) - len(readable), readable
    tokens = sum(len(rollout.ids) for group in groups for rollout in group)
    return Drawn(labels, 2 * len(groups), tokens)


def _can_be_read(line: dict[str, Any]) -> bool:
    """A policy may say any bytes; a row with some of them would end the training that reads it."""
    try:
        parse_row(line, "", 0)
    except UserError:
        return False
    return True
