"""Talking with a model and its adapters, without a terminal: the turns so far, the voices, an answer as it comes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.data.chat import Renderer
from lowrank_align.data.encoder import panics_told
from lowrank_align.data.formats import Message, Row, Shape
from lowrank_align.data.stream import OPEN, Piece, TextStream, Thoughts
from lowrank_align.errors import UserError
from lowrank_align.roles import BARE
from lowrank_align.rollout import stream

THOUGHT_OPENED_WITHIN = 8  # tokens at the prompt's end in which a template opens a thought for the model


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `finished` is False where it was stopped or ran out of tokens."""

    question: str
    answer: str
    finished: bool = True


@dataclass
class Conversation:
    """The turns so far, under a system prompt or none."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str | None = None, *, skip: int = 0) -> list[Message]:
        """The messages from turn `skip` on, with a new question at the end."""
        found = [Message(role="system", content=self.system)] if self.system else []
        for turn in self.turns[skip:]:
            found += [Message(role="user", content=turn.question), Message(role="assistant", content=turn.answer)]
        return [*found, Message(role="user", content=question)] if question is not None else found

    def row(self) -> dict[str, Any]:
        """The conversation as a demonstration; UserError where nothing has been said."""
        if not self.turns:
            raise UserError("nothing has been said yet")
        row: dict[str, Any] = {"messages": self.messages()}
        return row if self.turns[-1].finished else row | {"finished": False}  # then no end token is trained


class Voices:
    """The bare base and the adapters that were put on it, by the names people gave; one of them speaks."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._roles = {BARE: BARE}
        self._prefixes = {BARE: ""}
        self._folders: dict[Path, str] = {}
        self.active = BARE

    @property
    def names(self) -> list[str]:
        return list(self._roles)

    @property
    def role(self) -> str:
        """The base's role that speaks."""
        return self._roles[self.active]

    @property
    def answer_prefix(self) -> str:
        """The text before its answers that it was trained with, "" without."""
        return self._prefixes[self.active]

    def use(self, name: str) -> None:
        """Let another voice speak: `base`, one that is there (its last name will do), or a run or adapter to load.

        UserError where it cannot be (no policy, another base, damaged); the old one goes on then.
        """
        known = [voice for voice in self._roles if voice == name] or [
            voice for voice in self._roles if Path(voice).name == name and not Path(name).exists()
        ]
        if not known:
            folder = adapters.locate(name, "policy").resolve()
            if folder not in self._folders:
                role, prefix = f"voice_{len(self._roles)}", adapters.answer_prefix(name)
                self._base.add_role(role, start_from=name, trainable=False)
                self._prefixes[name] = prefix
                self._roles[name], self._folders[folder] = role, name
            known = [self._folders[folder]]
        self.active = known[-1]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float


class Spoken:
    """One answer as it is drawn: go through it for its pieces. Stop going, and `text` holds what there is."""

    def __init__(
        self,
        base: Base,
        role: str,
        renderer: Renderer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        """`generator` lives on the base's device."""
        self._base, self._role, self._renderer, self._sampling = base, role, renderer, sampling
        self._generator = generator
        self.context_tokens = context_of(base, renderer)
        self.prompt_ids = list(prompt_ids)
        self.ids: list[int] = []  # drawn so far, an end token among them
        self.finished = False

    def __iter__(self) -> Iterator[Piece]:
        """The answer in pieces, without the whitespace that templates put before it."""
        room = min(self._sampling.max_new_tokens, self.context_tokens - len(self.prompt_ids))
        with self._base.role(self._role):
            tokens = stream(
                self._base,
                self.prompt_ids,
                end_ids=self._renderer.end_ids,
                max_new_tokens=room,
                generator=self._generator,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
            )
        begun, thoughts = False, Thoughts(self._thought_is_open())
        for text in self._texts(tokens):
            text = text if begun else text.lstrip()
            begun = begun or bool(text)
            yield from thoughts.push(text)
        yield from thoughts.flush()

    @property
    def text(self) -> str:
        """The answer as far as it got, thoughts among it."""
        text = self._renderer.decode(self.ids[:-1] if self.finished else self.ids)
        return (text if self.finished else text.rstrip("\ufffd")).strip()

    def _texts(self, tokens: Iterator[int]) -> Iterator[str]:
        text = TextStream(self._renderer.decode)
        for token in tokens:
            self.ids.append(token)
            self.finished = token in self._renderer.end_ids
            if not self.finished:
                yield text.push(token)
        yield text.flush()

    def _thought_is_open(self) -> bool:
        return thought_is_open(self._renderer, self.prompt_ids, len(self._renderer.prefix_ids))


class Reply(Spoken):
    """The answer to a question in a conversation."""

    def __init__(
        self,
        base: Base,
        role: str,
        renderer: Renderer,
        conversation: Conversation,
        question: str,
        sampling: Sampling,
        generator: torch.Generator,
    ) -> None:
        """Raises UserError where the template refuses the conversation, or the question alone is too long.

        `left_out`: how many of the oldest turns do not fit beside the answer.
        """
        self._question = question
        ids, self.left_out = fitting_prompt(
            conversation.messages(question), renderer, sampling.max_new_tokens, context_of(base, renderer)
        )
        super().__init__(base, role, renderer, ids, sampling, generator)

    @property
    def turn(self) -> Turn:
        """Question and answer as far as it got."""
        return Turn(self._question, self.text, self.finished)


def thought_is_open(renderer: Renderer, prompt_ids: Sequence[int], prefix_tokens: int) -> bool:
    """Whether a template opened a thought for the model; an answer prefix of so many tokens stands at the end."""
    end = list(prompt_ids)[: len(prompt_ids) - prefix_tokens][-THOUGHT_OPENED_WITHIN:]
    with panics_told(renderer.tokenizer):
        return str(renderer.tokenizer.decode(end)).rstrip().endswith(OPEN)


def context_of(base: Base, renderer: Renderer) -> int:
    """Tokens that prompt and answer may have together."""
    return min(renderer.max_length, base.context_tokens)


def fitting_prompt(
    prompt: str | list[Message], renderer: Renderer, max_new_tokens: int, context_tokens: int
) -> tuple[list[int], int]:
    """The ids of a prompt with as many of its turns as leave room for the answer, and how many were left out.

    The oldest turns go first; what stands before the first question (a system prompt) stays. UserError where the
    template refuses the prompt, or where the last question alone is too long.
    """
    room = min(max_new_tokens, context_tokens // 2)
    kept, turns = _turns(prompt)
    ids: list[int] = []
    for skip in range(len(turns)):
        shortened = prompt if isinstance(prompt, str) else [*kept, *(m for turn in turns[skip:] for m in turn)]
        ids = list(renderer.prompt_ids(Row(Shape.prompts, shortened, [], where="chat")))
        if len(ids) + room <= context_tokens:
            return ids, skip
    if len(ids) >= context_tokens:
        raise UserError(
            f"too long: {len(ids)} tokens with the system prompt, where prompt and answer may have "
            f"{context_tokens} together"
        )
    return ids, len(turns) - 1


def _turns(prompt: str | list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What stands before the first question, and the turns from there on, each beginning with a question."""
    if isinstance(prompt, str):
        return [], [[]]
    starts = [i for i, message in enumerate(prompt) if message["role"] == "user"] or [0]
    ends = [*starts[1:], len(prompt)]
    return prompt[: starts[0]], [prompt[start:end] for start, end in zip(starts, ends, strict=True)]
