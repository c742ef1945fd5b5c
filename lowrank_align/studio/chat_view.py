"""What the page shows of a chat: its lines, how it stands, and a token map in words and numbers."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowrank_align.studio.answers import Answer
from lowrank_align.studio.asking import Pending
from lowrank_align.studio.chatting import Chat
from lowrank_align.studio.talk import WRITTEN, Exchange, Response, about
from lowrank_align.studio.token_map import Mark, TokenMap

NOTHING = "(nothing: it ended at once)"
NO_ANSWER = "(no answer yet: press Regenerate, or Undo)"
TWO_BELOW = "(two answers, below: say which one the talk goes on with)"
ZERO_WIDTH = "\u200b"
EXCERPT = 60  # characters of an answer in a list

# Per-token log-ratios in nats, by how much they are: e^0.5 is 1.6 times as likely, e^2 is 7 times.
SLIGHT, STRONG = 0.5, 2.0
MUCH_MORE, MORE = "much likelier (over +2 nats)", "likelier (+0.5 to +2)"
LESS, MUCH_LESS = "less likely (-0.5 to -2)", "much less likely (under -2)"


@dataclass(frozen=True)
class Line:
    """One message of the log. `id` is the exchange's (a question) or the response's (an answer); "" while it comes."""

    role: Literal["user", "assistant"]
    text: str
    id: str = ""
    title: str = ""  # of a thought, which is folded away
    open: bool = False  # a thought that is still being thought
    liked: bool | None = None


def lines(chat: Chat) -> list[Line]:
    """The talk from its first question, with what is on its way."""
    pending, found = chat.pending, []
    for exchange in chat.talk.exchanges:
        found.append(Line("user", exchange.question, exchange.id))
        if pending is not None and exchange.id == pending.exchange_id and not pending.scoring:
            found += _coming(pending)
        elif exchange.answer is not None:
            found += _answered(exchange.answer)
        else:
            found.append(Line("assistant", TWO_BELOW if exchange.responses else NO_ANSWER))
    return found


def as_text(line: Line) -> str:
    """The line so that the log shows it letter by letter: Gradio's Chatbot takes whatever it gets for HTML, also with
    `render_markdown=False`, and fetches the images in it.

    An answer's signs become entities. A question keeps its letters, with a mark of no width after each sign, since its
    edit field shows what the log was given; `as_typed` takes the marks out again.
    """
    if line.role == "user":
        return re.sub("[<&]", lambda sign: sign[0] + ZERO_WIDTH, line.text)
    return html.escape(line.text, quote=False)


def as_typed(text: str) -> str:
    """A question out of the log's edit field."""
    return re.sub(f"([<&]){ZERO_WIDTH}", lambda found: found[1], text)


def sides(chat: Chat) -> list[tuple[str, str]]:
    """(text, line about it) of two answers that stand side by side; empty where there is nothing to pick."""
    pending = chat.pending
    if pending is not None and pending.wish.against is not None:
        return [(answer.text, _pace(answer)) for answer in pending.answers]
    last = chat.talk.exchanges[-1] if chat.talk.exchanges else None
    if last is None or last.answer is not None:
        return []
    return [(r.text or NOTHING, about(r)) for r in last.responses[-2:]]


def standing(chat: Chat) -> str:
    """How the answer on its way stands, or what there is to know of the last one."""
    pending = chat.pending
    if pending is not None:
        return _standing(pending)
    if chat.problem:
        return chat.problem
    answer = chat.talk.exchanges[-1].answer if chat.talk.exchanges else None
    return "" if answer is None else about(answer)


def choices(chat: Chat) -> list[tuple[str, str]]:
    """(what is said in a list, id) of every answer of the talk, the newest first."""
    found = []
    for number, exchange in enumerate(chat.talk.exchanges, start=1):
        for place, response in enumerate(exchange.responses):
            found.append((_named(number, exchange, place), response.id))
    return found[::-1]


def others(chat: Chat, response_id: str) -> list[tuple[str, str]]:
    """The other answers to the same question."""
    exchange, own = chat.talk.find(response_id)
    number = chat.talk.place(exchange.id) + 1
    return [(_named(number, exchange, n), r.id) for n, r in enumerate(exchange.responses) if n != own]


def kind_of(mark: Mark) -> str | None:
    """The class of a log-ratio, as the legend has it; None: about as likely for both."""
    ratio = mark.log_ratio
    if abs(ratio) < SLIGHT:
        return None
    if ratio > 0:
        return MUCH_MORE if ratio > STRONG else MORE
    return MUCH_LESS if ratio < -STRONG else LESS


def in_numbers(mark: Mark, found: TokenMap) -> str:
    """A token with its log-ratio in nats, and where that comes from."""
    text = repr(mark.text)[1:-1]
    parts = f"{found.voice} {mark.voice_logp:.2f}, {found.reference} {mark.reference_logp:.2f}"
    return f"{mark.log_ratio:+6.2f}  “{text}”  ({parts}){'  thought' if mark.thinking else ''}"


def in_words(found: TokenMap) -> str:
    """The whole map in a sentence or two."""
    count = found.tokens
    text = (
        f"log p({found.voice}) - log p({found.reference}): {found.log_ratio:+.2f} nats in all, "
        f"{found.log_ratio / count:+.3f} a token, {count} tokens; at temperature 1, thoughts and the end among them."
    )
    if found.voice == found.reference:
        text += " It is the same voice: choose another one to see where they differ."
    if found.retrained:
        text += f" {found.voice} was trained on since it gave this answer: the map is of its weights now."
    return text


def departures(found: TokenMap, count: int = 10) -> str:
    """The tokens that differ most, a line each."""
    return "\n".join(in_numbers(mark, found) for mark in found.departures(count))


def _coming(pending: Pending) -> list[Line]:
    if pending.wish.against is not None:
        return [Line("assistant", TWO_BELOW)]
    if len(pending.answers) > 1:
        return [Line("assistant", f"({len(pending.answers)} answers are on their way; the best will stand here)")]
    (answer,) = pending.answers
    text = answer.text
    found = [_thought(answer.thought, still=not text and not answer.done)] if answer.thought else []
    return [*found, Line("assistant", text or "…")] if text or not answer.thought else found


def _answered(response: Response) -> list[Line]:
    found = [_thought(response.thought, response.id)] if response.thought else []
    return [*found, Line("assistant", response.text or NOTHING, response.id, liked=response.liked)]


def _thought(text: str, key: str = "", *, still: bool = False) -> Line:
    words = len(text.split())
    title = "Thinking" if still else f"Thought ({words} word{'s' * (words != 1)})"
    return Line("assistant", text.strip(), key, title, still)


def _standing(pending: Pending) -> str:
    if pending.scoring:
        return f"{pending.wish.reward} is scoring"
    if len(pending.answers) == 1:
        return _pace(pending.answers[0])
    done = sum(answer.done for answer in pending.answers)
    tokens = sum(answer.tokens for answer in pending.answers)
    return f"{done} of {len(pending.answers)} answers are there, {tokens} tokens so far"


def _pace(answer: Answer) -> str:
    if answer.error:
        return answer.error
    if not answer.tokens:
        return f"{answer.source.voice}: waiting for the model"
    left = f" · {answer.left_out} of the oldest turns left out, they no longer fit" if answer.left_out else ""
    return f"{answer.source.voice} · {answer.tokens} tokens · {answer.tokens_per_second:.1f} a second{left}"


def _named(number: int, exchange: Exchange, place: int) -> str:
    response = exchange.responses[place]
    text = " ".join(response.text.split()) or NOTHING
    short = text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"
    letter = f"{number}{_letters(place)}" if len(exchange.responses) > 1 else str(number)
    score = "".join(f" [{name} {value:+.2f}]" for name, value in response.scores.items())
    mark = " (shown)" if place == exchange.shown and len(exchange.responses) > 1 else ""
    return f"{letter} · {'mended' if response.voice == WRITTEN else response.voice}{score}{mark}: {short}"


def _letters(place: int) -> str:
    """a, b, ... z, then 27, 28, ..."""
    return chr(ord("a") + place) if place < 26 else f"-{place + 1}"


def marks_shown(found: TokenMap) -> Sequence[Mark]:
    """The marks of the answer itself, without those of its thoughts."""
    return [mark for mark in found.marks if not mark.thinking]
