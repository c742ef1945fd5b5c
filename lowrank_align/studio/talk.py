"""A talk with the studio's voices as it is kept: every question, with every answer that was drawn for it.

Nothing here changes in place: an edit makes another `Talk`, so that a step can be taken back by keeping the old one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from lowrank_align.conversation import Conversation, Turn
from lowrank_align.data.messages import Message
from lowrank_align.errors import UserError
from lowrank_align.store import Completion, new_id

WRITTEN = "written"  # the source of an answer that a person mended


@dataclass(frozen=True)
class Response:
    """An answer as it ended. `text` is without thoughts; `ids` are all tokens drawn, an end token among them."""

    text: str
    voice: str
    thought: str = ""
    adapter_hash: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, top_p, max_new_tokens, seed
    finished: bool = True  # False: stopped, or out of tokens
    stopped: bool = False
    seconds: float = 0.0
    system: str = ""  # the system prompt it was drawn under
    prompt_ids: tuple[int, ...] = ()
    prefix_tokens: int = 0  # of these, how many at the end are the voice's answer prefix
    ids: tuple[int, ...] = ()
    left_out: int = 0  # oldest turns that did not fit beside it
    scores: dict[str, float] = field(default_factory=dict)  # by reward run
    liked: bool | None = None
    id: str = field(default_factory=new_id)

    @property
    def tokens_per_second(self) -> float:
        """0 where nothing was drawn."""
        return len(self.ids) / self.seconds if self.ids and self.seconds > 0 else 0.0

    @property
    def content(self) -> list[dict[str, Any]]:
        """The answer as a completion of messages."""
        return [{"role": "assistant", "content": self.text}]

    def completion(self) -> Completion:
        """The answer as the store keeps it."""
        return Completion(
            content=self.content,
            source=self.voice,
            adapter_hash=self.adapter_hash,
            sampling=self.sampling,
            finished=self.finished,
            tokens=len(self.ids) or None,
            seconds=round(self.seconds, 3) or None,
            id=self.id,
        )


@dataclass(frozen=True)
class Exchange:
    """A question and the answers drawn for it. `shown` goes on with the talk; None: nobody has picked one yet."""

    question: str
    responses: tuple[Response, ...] = ()
    shown: int | None = None
    id: str = field(default_factory=new_id)

    @property
    def answer(self) -> Response | None:
        """The answer that later turns see."""
        return None if self.shown is None else self.responses[self.shown]

    def having(self, responses: Sequence[Response], shown: int | None) -> "Exchange":
        return replace(self, responses=tuple(responses), shown=shown)


@dataclass(frozen=True)
class Talk:
    """The turns so far, under a system prompt or none."""

    system: str = ""
    exchanges: tuple[Exchange, ...] = ()

    def place(self, exchange_id: str) -> int:
        """Where an exchange stands; UserError where another tab has taken it away."""
        for number, exchange in enumerate(self.exchanges):
            if exchange.id == exchange_id:
                return number
        raise UserError("this turn is no longer part of the talk; reload the page")

    def find(self, response_id: str) -> tuple[Exchange, int]:
        """The exchange that holds an answer, and the answer's place in it; UserError where there is none."""
        for exchange in self.exchanges:
            for number, response in enumerate(exchange.responses):
                if response.id == response_id:
                    return exchange, number
        raise UserError("this answer is no longer part of the talk; reload the page")

    def before(self, exchange_id: str) -> "Talk":
        """The talk up to a question, without it."""
        return replace(self, exchanges=self.exchanges[: self.place(exchange_id)])

    def put(self, exchange: Exchange) -> "Talk":
        """With this state of an exchange, at its old place or as the newest."""
        ids = [known.id for known in self.exchanges]
        if exchange.id not in ids:
            return replace(self, exchanges=(*self.exchanges, exchange))
        at = ids.index(exchange.id)
        return replace(self, exchanges=(*self.exchanges[:at], exchange, *self.exchanges[at + 1 :]))

    def change(self, response_id: str, **changes: Any) -> "Talk":
        """With an answer changed."""
        exchange, number = self.find(response_id)
        responses = list(exchange.responses)
        responses[number] = replace(responses[number], **changes)
        return self.put(replace(exchange, responses=tuple(responses)))

    def prompt(self, exchange_id: str) -> list[Message]:
        """The messages that a question's next answer is drawn from; UserError where a turn before has no answer."""
        question = self.exchanges[self.place(exchange_id)].question
        return self.before(exchange_id).conversation().messages(question)

    def prompt_of(self, *responses: Response) -> list[dict[str, Any]]:
        """The messages that answers to one question were drawn from, less the turns that did not fit.

        UserError where they answer different questions, or were drawn under different system prompts.
        """
        places = {self.find(response.id)[0].id for response in responses}
        if len(places) > 1:
            raise UserError("the two answers are to different questions: a pair needs two answers to the same one")
        systems = {response.system for response in responses}
        if len(systems) > 1:
            raise UserError("the system prompt was another one for the other answer: regenerate it first")
        talk = replace(self, system=systems.pop())
        (place,) = places
        question = self.exchanges[self.place(place)].question
        skip = max(response.left_out for response in responses)
        return [dict(message) for message in talk.before(place).conversation().messages(question, skip=skip)]

    def conversation(self) -> Conversation:
        """Questions and the answers that go on; UserError where one is missing."""
        turns = []
        for number, exchange in enumerate(self.exchanges, start=1):
            answer = exchange.answer
            if answer is None and exchange.responses:
                raise UserError("two answers stand side by side: say which one the talk goes on with")
            if answer is None:
                raise UserError(f"question {number} has no answer: regenerate it, or undo the turn")
            turns.append(Turn(exchange.question, answer.text, answer.finished))
        return Conversation(self.system or None, turns)

    def row(self) -> dict[str, Any]:
        """The talk as a demonstration that the trainers take; UserError where they would refuse it."""
        row = self.conversation().row()
        for number, exchange in enumerate(self.exchanges, start=1):
            if exchange.answer is not None and not exchange.answer.text.strip():
                raise UserError(f"answer {number} is empty, and no trainer takes that: regenerate it, or undo the turn")
        return row

    def markdown(self) -> str:
        """The transcript for people, with each answer's voice, sampling and scores."""
        parts = ["# Transcript"]
        if self.system:
            parts.append(f"**System**\n\n{self.system}")
        for exchange in self.exchanges:
            parts.append(f"**User**\n\n{exchange.question}")
            for number, response in enumerate(exchange.responses):
                beside = "" if number == exchange.shown else " (not gone on with)"
                parts.append(f"**{response.voice}**{beside}\n\n{response.text or '(nothing)'}\n\n*{about(response)}*")
        return "\n\n".join(parts) + "\n"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Talk":
        """The talk that `as_json` wrote; unknown fields (of a newer version) are left out."""
        if not isinstance(value, dict):
            return cls()
        exchanges = []
        for item in value.get("exchanges", ()):
            given = [_known(Response, r) for r in item.get("responses", ())]
            lists = [r | {name: tuple(r[name]) for name in ("prompt_ids", "ids") if name in r} for r in given]
            exchanges.append(Exchange(**_known(Exchange, item) | {"responses": tuple(Response(**r) for r in lists)}))
        return cls(str(value.get("system", "")), tuple(exchanges))


def about(response: Response) -> str:
    """What there is to know about an answer, in one line."""
    if response.voice == WRITTEN:
        return "mended by hand"
    parts = [f"{response.voice}, {len(response.ids)} tokens"]
    if response.tokens_per_second:
        parts[0] += f" at {response.tokens_per_second:.1f} a second"
    parts += [
        f"{name.replace('_', ' ')} {_number(value)}" for name, value in response.sampling.items() if _is_number(value)
    ]
    if not response.finished:
        parts.append("stopped" if response.stopped else "cut at the token limit")
    if response.left_out:
        parts.append(f"{response.left_out} oldest turn{'s' * (response.left_out > 1)} left out, they no longer fit")
    parts += [f"score by {name} {score:+.2f}" for name, score in response.scores.items()]
    return " · ".join(parts)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _known(kind: type, value: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {name: inner for name, inner in value.items() if name in names}
