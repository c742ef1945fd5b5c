"""An answer that is being drawn in the speaker's thread and can be read, and stopped, from any other."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lowrank_align.base import Base
from lowrank_align.conversation import Sampling, Spoken, context_of, fitting_prompt
from lowrank_align.data.chat import Renderer
from lowrank_align.data.messages import Message
from lowrank_align.data.stream import CLOSE, OPEN
from lowrank_align.errors import UserError, is_out_of_memory
from lowrank_align.rollout import generator_for
from lowrank_align.store import Completion, Text
from lowrank_align.studio.speaking import Speaker, Ticket
from lowrank_align.studio.voices import BASE, Voices

log = logging.getLogger(__name__)

SEEDS = 2**31


def new_seed() -> int:
    """One that nobody asked for by number."""
    return secrets.randbelow(SEEDS)


@dataclass(frozen=True)
class Source:
    """Who answers, and how the answer is drawn; temperature 0 takes the likeliest token each time."""

    voice: str = BASE
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256

    def sampling(self, seed: int) -> dict[str, Any]:
        """What a row keeps of it, to draw the same again."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "seed": seed,
        }


class Answer:
    """One answer to one prompt, growing. Everything here may be read from any thread."""

    def __init__(self, source: Source, seed: int) -> None:
        self.source, self.seed = source, seed
        self.adapter_hash: str | None = None
        self.thought = ""  # what stood between <think> and </think>, without the marks
        self.ids: list[int] = []
        self.prompt_ids: list[int] = []
        self.prefix_tokens = 0  # of the prompt's last tokens, how many are the voice's answer prefix
        self.left_out = 0  # of the oldest turns, how many did not fit
        self.finished = False  # it ended by itself
        self.stopped = False  # somebody stopped it
        self.error: str | None = None
        self.seconds = 0.0
        self._said = ""
        self._verbatim: str | None = None  # of a prompt of plain text: with the space that the text goes on with
        self._stop = threading.Event()
        self._ticket: Ticket | None = None

    @property
    def text(self) -> str:
        """What was said so far, without thoughts."""
        return self._said.strip() if self.done else self._said.lstrip()

    @property
    def done(self) -> bool:
        """Nothing more will come."""
        return self._ticket is not None and self._ticket.done.is_set()

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def stop(self) -> None:
        """Draw no further token; what is there stays."""
        self._stop.set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until nothing more comes; False where the time was over before."""
        assert self._ticket is not None
        return self._ticket.wait(timeout_seconds)

    def when_done(self, function: Callable[[], None]) -> None:
        """Call it when nothing more comes."""
        assert self._ticket is not None
        self._ticket.when_done(function)

    def hurry(self, urgency: int) -> None:
        """Let it go before less urgent work from now on."""
        assert self._ticket is not None
        self._ticket.urgency = max(self._ticket.urgency, urgency)

    def completion(self) -> Completion:
        """The answer as far as it got, as rows keep it."""
        return Completion(
            self.text if self._verbatim is None else self._verbatim,
            source=self.source.voice,
            adapter_hash=self.adapter_hash,
            sampling=self.source.sampling(self.seed),
            finished=self.finished,
            tokens=self.tokens,
            seconds=round(self.seconds, 3),
        )


def draw(
    base: Base,
    renderer: Renderer,
    voices: Voices,
    speaker: Speaker,
    prompt: Text,
    source: Source,
    seed: int,
    urgency: int,
) -> Answer:
    """Begin an answer and come back at once. What goes wrong stands in its `error`, as one sentence."""
    answer = Answer(source, seed)
    answer._ticket = speaker.start(_drawn(answer, base, renderer, voices, prompt), urgency)
    return answer


def _drawn(answer: Answer, base: Base, renderer: Renderer, voices: Voices, prompt: Text) -> Iterator[None]:
    """The speaker's work: a bit for each token."""
    try:
        voice = voices.voice(answer.source.voice)
        answer.adapter_hash = voice.adapter_hash
        yield
        yield from _tokens(answer, base, renderer.with_prefix(voice.answer_prefix), voice.role, prompt)
    except UserError as error:
        answer.error = str(error)
    except Exception as error:
        if is_out_of_memory(error):
            answer.error = "out of memory: take fewer tokens, or a shorter prompt"
        else:
            log.exception("an answer broke off")
            answer.error = "the answer broke off: an error of the studio's own, told in the terminal"


def _tokens(answer: Answer, base: Base, renderer: Renderer, role: str, prompt: Text) -> Iterator[None]:
    source = answer.source
    messages: str | list[Message] = (
        prompt if isinstance(prompt, str) else [Message(role=turn["role"], content=turn["content"]) for turn in prompt]
    )
    ids, answer.left_out = fitting_prompt(messages, renderer, source.max_new_tokens, context_of(base, renderer))
    sampling = Sampling(source.max_new_tokens, source.temperature, source.top_p)
    spoken = Spoken(base, role, renderer, ids, sampling, generator_for(base.device, answer.seed, "answer"))
    answer.prompt_ids, answer.ids = spoken.prompt_ids, spoken.ids
    answer.prefix_tokens = len(renderer.prefix_ids)
    began = time.perf_counter()
    for piece in spoken:
        if piece.thinking:
            answer.thought = (answer.thought + piece.text).replace(OPEN, "").replace(CLOSE, "").lstrip()
        else:
            answer._said += piece.text
        answer.seconds = time.perf_counter() - began
        if isinstance(prompt, str):
            answer._verbatim = _leading_space(renderer.decode(spoken.ids)) + answer._said
        if answer._stop.is_set():
            answer.stopped = True
            return
        yield
    answer.finished = spoken.finished


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]
