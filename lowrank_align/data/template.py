"""The chat template, and where in its text the assistant's turns stand.

A template only writes text; which characters are the assistant's has to be found out. Its turn i begins where the
rendering of the turns before it, with the generation prompt, ends. Some templates do not keep that prefix (DeepSeek-R1
opens `<think>` for the model, and leaves it out of earlier answers); then the template's own `{% generation %}` marks
decide, or, where it has none, the place where the text changes when the turn's content is changed. The same trick finds
the end of earlier turns, since what follows is the next turn's content; the text in between is known from a trial.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_align.data.messages import Message
from lowrank_align.data.template_room import ROOM, OverLimit, TemplateFailure
from lowrank_align.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message['content'] | trim %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- content + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- 'User: ' + content + '\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- 'Assistant: ' + content }}{{ eos_token }}{{ '\\n' }}
    {%- else %}
        {{- raise_exception('the plain template knows user, assistant and one system turn at the beginning') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}"""
"""The template for models that have none: the system text as a paragraph of its own, then a line a turn.

    You are helpful.

    User: Is the sea salt?
    Assistant: Yes.</s>

The generation prompt is `Assistant:` without a space: the space belongs to the answer's first token, in training and
in generation alike.
"""

TEMPLATE_BYTES = 1_000_000
_ASKED, _ANSWERED, _ASKED_AGAIN = "Qzxa", "Qzxb", "Qzxc"  # contents that no template writes by itself
_SWITCHES = ("enable_thinking", "thinking")  # what templates call the variable that lets the model think or not


@dataclass(frozen=True)
class Turns:
    """A rendered conversation: its text, the characters of each assistant's turn with its end, and what was odd.

    A turn that could not be told from the rest is missing in `spans`, which are keyed by the message's place.
    """

    text: str
    spans: dict[int, tuple[int, int]]
    notes: list[str] = field(default_factory=list)


class _Refusal(UserError):
    """What a template says of one conversation; it may take another."""


class ChatTemplate:
    """`text` is the template, `source` says whose it is: `the model's own`, `named by the user` or `plain`.

    `switch` is the template's variable for thinking, None where it has none.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        named: str | None,
        added: Mapping[str, int],
        thinking: bool | None = None,
    ) -> None:
        """`named` is a .jinja file, one of the tokenizer's named templates, or `plain`; `added` the added tokens.

        `thinking` is what the template's switch is set to where a row's own `chat_template_kwargs` say nothing; without
        a switch it is without effect. Raises `UserError` for a file that is not there and for a template that does not
        work.
        """
        self._tokenizer = tokenizer
        self.text, self.source = _choose(tokenizer, named)
        own = tokenizer.chat_template
        self._for_tools = own.get("tool_use") if isinstance(own, dict) and named is None else None
        self._has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None
        self._as_parts = False
        self._always: dict[str, Any] = {}
        self._try_out(added)
        self.switch = next((name for name in _SWITCHES if self._is_switch(name)), None)
        if thinking is not None and self.switch is not None:
            self._always = {self.switch: thinking}
            self._try_out(added)

    def hash(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: Sequence[Message], kwargs: Mapping[str, Any], *, open_turn: bool = False) -> str:
        """The conversation as text; with `open_turn` ready for the assistant's answer. Raises `UserError`."""
        return self._apply(messages, kwargs, open_turn=open_turn)[0]

    def turns(self, messages: Sequence[Message], kwargs: Mapping[str, Any], first: int) -> Turns:
        """Renders the conversation and finds the assistant's turns from message `first` on."""
        text = self.render(messages, kwargs)
        found = Turns(text, {}, self._left_out(text, messages))
        for i in range(first, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            if i == 0:
                found.notes.append("an answer that opens the conversation is context, not trained")
                continue
            start = self._start(text, messages, kwargs, i)
            if start is None:
                found.notes.append("the generation prompt is not what the template prints before an answer")
                mark = self._marks(messages, kwargs).get(i)
                start = mark[0] if mark else self._content_start(text, messages, kwargs, i)
            end = self._end(text, messages, kwargs, i, start or 0)
            if end is None and (mark := self._marks(messages, kwargs).get(i)):
                end = mark[0] + len(text[slice(*mark)].rstrip())
            if start is None or end is None or start >= end:
                found.notes.append("the template does not show where one of the answers stands; it is not trained")
                continue
            found.spans[i] = (start, end)
        return found

    def _apply(
        self, messages: Sequence[Message], kwargs: Mapping[str, Any], *, open_turn: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """What the template writes for this row, as `template_room` gives it; UserError where it refuses."""
        contents: list[dict[str, Any]] = [dict(message) for message in messages]
        if self._as_parts:
            contents = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in contents]
        template = self._for_tools if self._for_tools and kwargs.get("tools") else self.text
        values = {**self._tokenizer.special_tokens_map, **self._always, **kwargs, "add_generation_prompt": open_turn}
        try:
            if not contents:
                raise TemplateFailure("it is empty")
            return ROOM.render(template, contents, values, marked=marked)
        except (TemplateFailure, ValueError, TypeError, RecursionError) as error:  # RecursionError: tools nested deep
            why = " ".join(str(error).split())
            if isinstance(error, OverLimit):
                raise UserError(f"the chat template has no end ({why})") from None
            raise _Refusal(f"the chat template refuses this conversation ({why})") from None

    def _start(self, text: str, messages: Sequence[Message], kwargs: Mapping[str, Any], i: int) -> int | None:
        """Where turn i begins, if the text before it is what the model gets when it has to write that turn."""
        try:
            before = self.render(messages[:i], kwargs, open_turn=True)
        except _Refusal:  # a template may want a whole conversation
            return None
        return len(before) if text.startswith(before) else None

    def _end(self, text: str, messages: Sequence[Message], kwargs: Mapping[str, Any], i: int, start: int) -> int | None:
        """Where turn i ends, its end token included and whitespace after that excluded."""
        if i == len(messages) - 1:
            if self._tail and text.endswith(self._tail):
                return len(text) - len(self._tail) + len(self.turn_end)
            return len(text.rstrip())
        places = ((j, self._content_start(text, messages, kwargs, j)) for j in range(i + 1, len(messages)))
        j, following = next(((j, at) for j, at in places if at is not None), (i, start))  # templates may drop turns
        if j == i + 1 and messages[j]["role"] == "user" and text[:following].endswith(self._gap):
            keeps_end = self._gap.startswith(self.turn_end)
            return following - len(self._gap) + (len(self.turn_end) if keeps_end else 0)
        ended = text.rfind(self.turn_end, start, following) if self.turn_end else -1
        return ended + len(self.turn_end) if ended >= 0 else None

    def _content_start(self, text: str, messages: Sequence[Message], kwargs: Mapping[str, Any], i: int) -> int | None:
        """Where the text changes when the content of message i is changed; None if it does not."""
        other = _ASKED if not messages[i]["content"].lstrip().startswith(_ASKED[0]) else _ASKED.lower()
        changed: list[Message] = [*messages[:i], {**messages[i], "content": other}, *messages[i + 1 :]]
        try:
            changed_text = self.render(changed, kwargs)
        except _Refusal:
            return None
        if changed_text == text:
            return None
        length = min(len(text), len(changed_text))
        return next((at for at in range(length) if text[at] != changed_text[at]), length)

    def _marks(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
        """The characters inside the template's `{% generation %}` blocks, by message; none if they do not match up."""
        if not self._has_marks:
            return {}
        _, spans = self._apply(messages, kwargs, marked=True)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return dict(zip(answers, spans, strict=True)) if len(spans) == len(answers) else {}

    def _left_out(self, text: str, messages: Sequence[Message]) -> list[str]:
        """Templates that know no system or tool turns may drop them without a word."""
        roles = {m["role"] for m in messages if m["role"] != "assistant" and m["content"].strip() not in text}
        return [f"the chat template leaves out or rewrites turns of role {role}" for role in sorted(roles)]

    def _try_out(self, added: Mapping[str, int]) -> None:
        """Learns from a trial conversation what the template writes after an answer.

        `turn_end` is the text that ends a turn: up to its first added token, or all of it but whitespace at the end.
        `turn_end_id` is that token, None where there is none. `_tail` is what follows the last answer, `_gap` what
        stands between an answer and the user's next turn.
        """
        self.turn_end, self.turn_end_id, self._tail, self._gap = "", None, "", ""
        asked = [Message(role="user", content=_ASKED), Message(role="assistant", content=_ANSWERED)]
        again = [*asked, Message(role="user", content=_ASKED_AGAIN), Message(role="assistant", content=_ASKED)]
        try:
            self._as_parts = not self._prints(asked)  # made for lists of parts, as those of models that also see
            last, gap = self.render(asked, {}), self.render(again, {})
        except UserError as error:
            raise UserError(f"the chat template ({self.source}) does not work: {error}") from None
        if _ANSWERED not in last:
            raise UserError(f"the chat template ({self.source}) does not print what the assistant says")
        self._tail = last[last.rindex(_ANSWERED) + len(_ANSWERED) :]
        self._gap = gap[gap.rindex(_ANSWERED) + len(_ANSWERED) : gap.rindex(_ASKED_AGAIN)]
        places = [(self._tail.index(token), -len(token), token) for token in added if token in self._tail]
        if places:
            at, _, token = min(places)
            self.turn_end, self.turn_end_id = self._tail[: at + len(token)], added[token]
        else:
            self.turn_end = self._tail.rstrip()

    def _is_switch(self, name: str) -> bool:
        """Whether what the model gets to answer differs with the variable; that it is read somewhere does not do."""
        if name not in self.text:
            return False
        asked = [Message(role="user", content=_ASKED)]
        try:
            on, off = (self.render(asked, {name: value}, open_turn=True) for value in (True, False))
        except _Refusal:
            return False
        return on != off

    def _prints(self, asked: Sequence[Message]) -> bool:
        try:
            return _ANSWERED in self.render(asked, {})
        except _Refusal:
            return False


def _choose(tokenizer: "PreTrainedTokenizerBase", named: str | None) -> tuple[str, str]:
    """The template's text and where it comes from."""
    own = tokenizer.chat_template
    names = own if isinstance(own, dict) else {}
    if named is None:
        own = names.get("default") if names else own
        return (own, "the model's own") if own else (PLAIN_TEMPLATE, "plain")
    if named == "plain":
        return PLAIN_TEMPLATE, "plain"
    if named in names:
        return names[named], "named by the user"
    path = Path(named).expanduser()
    try:
        return read_template(path), "named by the user"
    except FileNotFoundError:
        known = [*names, "plain", *(file.name for file in path.parent.glob("*.jinja"))]
        raise UserError(
            f"chat_template: {named}: no such file, nor a template of the tokenizer{nearest(path.name, known)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template: {named}: cannot be read ({error})") from None


def read_template(file: Path) -> str:
    """A template's text. OSError, or ValueError, which says what is wrong with the file."""
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError("no regular file")
    if size > TEMPLATE_BYTES:
        raise ValueError(f"over {TEMPLATE_BYTES // 1_000_000} MB; a template is a few pages")
    return file.read_text(encoding="utf-8")
