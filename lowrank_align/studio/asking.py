"""How the next answer of a talk is to come, and answers on their way."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from lowrank_align.errors import UserError
from lowrank_align.studio.answers import Answer, Source, new_seed
from lowrank_align.studio.talk import Response

MOST_ANSWERS = 16  # best of n


@dataclass(frozen=True)
class Wish:
    """How the next answer is to come: from one voice, from two side by side, or the best of several by a reward."""

    source: Source = field(default_factory=Source)
    against: Source | None = None
    best_of: int = 1
    reward: str | None = None  # scores every answer, and picks the best of several
    seed: int | None = None

    def check(self) -> None:
        """Raises UserError for what cannot be meant."""
        if not 1 <= self.best_of <= MOST_ANSWERS:
            raise UserError(f"best of {self.best_of}: must be from 1 to {MOST_ANSWERS}")
        if self.best_of > 1 and self.against is not None:
            raise UserError("side by side or best of several, not both: set best of to 1, or side by side to nobody")
        if self.best_of > 1 and self.reward is None:
            raise UserError(
                "best of several needs a reward run to choose by: train a reward first, or set best of to 1"
            )

    def sources(self) -> list[Source]:
        return [self.source] * self.best_of if self.against is None else [self.source, self.against]

    def seeds(self) -> list[int | None]:
        """One for each source: side by side the same, so that the voices differ in nothing else."""
        if self.against is not None:
            return [new_seed() if self.seed is None else self.seed] * 2
        if self.seed is None:
            return [None] * self.best_of
        return [self.seed + number for number in range(self.best_of)]


@dataclass
class Pending:
    """Answers on their way. `over` is set when they are in the talk."""

    exchange_id: str
    wish: Wish
    answers: list[Answer]
    system: str = ""
    scoring: bool = False
    over: threading.Event = field(default_factory=threading.Event)


class Watched(Protocol):
    """A chat, as far as one has to look at it."""

    pending: Pending | None


def watch(
    chat: Watched, per_second: float = 8, sleep: Callable[[float], None] = time.sleep
) -> Iterator[Pending | None]:
    """Yields while an answer is on its way, and once more when it is in the talk."""
    while (pending := chat.pending) is not None:
        yield pending
        sleep(1 / per_second)
    yield None


def is_told(answer: Answer) -> bool:
    """Whether there is anything to keep: not of an answer that an error ended before it began."""
    return answer.error is None or bool(answer.text)


def response_of(answer: Answer, system: str) -> Response:
    return Response(
        text=answer.text,
        voice=answer.source.voice,
        thought=answer.thought,
        adapter_hash=answer.adapter_hash,
        sampling=answer.source.sampling(answer.seed),
        finished=answer.finished,
        stopped=answer.stopped,
        seconds=answer.seconds,
        system=system,
        prompt_ids=tuple(answer.prompt_ids),
        prefix_tokens=answer.prefix_tokens,
        ids=tuple(answer.ids),
        left_out=answer.left_out,
    )


def cleaned(text: str) -> str:
    """Typed text without what no tokenizer takes: NUL characters and half surrogate pairs."""
    return text.replace("\0", "").encode("utf-8", "replace").decode().strip()


def typed(text: str) -> str:
    """A question as tokenizers take it; UserError where nothing is left."""
    text = cleaned(text)
    if not text:
        raise UserError("type a question first")
    return text
