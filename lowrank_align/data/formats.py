"""One row of a file: which shape it has by its fields, and whether it can be used.

The columns are TRL's (see `SHAPE_FIELDS`); ShareGPT, Alpaca and HH transcripts are converted to them first. Every check
on a single row is here and in `messages`; checks that need a tokenizer are in `chat`.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from lowrank_align.data.convert import Columns, to_columns
from lowrank_align.data.messages import (
    FieldError,
    Message,
    check_characters,
    clean_messages,
    clean_number,
    clean_text,
    kind_of,
)
from lowrank_align.data.shapes import SHAPE_FIELDS, Fields, Shape, Text, convert_line, recognise
from lowrank_align.errors import UserError
from lowrank_align.terminal import visible

__all__ = ["SHAPE_FIELDS", "Message", "Row", "Shape", "Text", "parse_row"]

_TEMPLATE_OWN = {
    "conversation",
    "messages",
    "tokenize",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    *(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
}
# What a row is read from.
_READ = {"prompt", "completion", "messages", "text", "chosen", "rejected", "preference", "margin", "completions"}
_READ |= {"ranks", "label", "score", "finished", "tools", "chat_template_kwargs"}


@dataclass(frozen=True)
class Row:
    """One row, checked. A `messages` or `text` demonstration has an empty prompt and itself as its one completion."""

    shape: Shape
    prompt: Text  # "" or [] where there is none
    completions: list[Text]  # pair: [chosen, rejected]
    preference: float = 1.0  # pair: that the first is better, 1 surely, 0.5 a tie
    target_margin: float = 0.0  # pair
    ranks: list[float] | None = None  # ranking: 1 is best, equal is a tie
    label: bool | None = None  # unpaired
    score: float | None = None  # scored
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # `chat_template_kwargs`, and `tools`
    finished: bool = True  # False where `generate` cut the completion: no end token follows it
    index: int = 0  # 0-based place in the file
    where: str = ""  # "pairs.jsonl:17"
    read_as: str = ""  # "ShareGPT", "Alpaca" or "HH" where the row was converted
    extra: dict[str, Any] = field(default_factory=dict, compare=False)  # columns that no shape reads: source, tags, ...


def parse_row(
    raw: Any, where: str, index: int, *, expect: Collection[Shape] = (), segments: bool = False, source: str = "FILE"
) -> Row:
    """The row that `raw` (one JSON object) holds.

    `expect` names the shapes that are wanted: another shape is an error, a row with the fields of several is read as
    the wanted one, and where only prompts are wanted every row that has a prompt gives it. With `segments` the two
    conversations of a pair may start differently: the prompt is then empty. `source` is what `data convert` can be
    given for such rows. Raises `UserError` with `where`, the field and what is wrong with it.
    """
    try:
        if not isinstance(raw, dict):
            raise FieldError("row", f"{kind_of(raw)}, must be an object with fields")
        row = _parse_columns(to_columns(raw), frozenset(expect), segments, source)
    except FieldError as error:
        raise UserError(visible(f"{where}: {error}", keep="")) from None  # one line, whatever its fields are called
    return replace(row, where=where, index=index, finished=raw.get("finished") is not False)


def _parse_columns(columns: Columns, expect: frozenset[Shape], segments: bool, source: str) -> Row:
    fields = Fields(columns)
    only_prompt = expect == {Shape.prompts}
    shape = recognise(fields, expect)
    if expect and not only_prompt and shape not in expect:
        wanted = " or ".join(f"{name} ({SHAPE_FIELDS[name]})" for name in Shape if name in expect)
        has = f"is of shape {shape} (fields: {fields.listed()}){fields.misspelt()}"
        raise FieldError("row", f"{has}, needed: {wanted}{convert_line(shape, expect, source)}")
    if only_prompt and shape is Shape.demonstration and "messages" in fields.values:
        row = Row(Shape.prompts, _before_last_answer(fields), [])
    elif shape is Shape.prompts:
        row = Row(shape, _open_prompt(fields, fields.text("prompt", fields.need("prompt"))), [])
    else:
        row = _parse_pair(fields, segments) if shape is Shape.pair else _PARSERS[shape](fields)
    if only_prompt:
        if not row.prompt:
            raise FieldError("prompt", f"missing (fields: {fields.listed()})")
        row = Row(Shape.prompts, row.prompt, [])
    extra = {name: value for name, value in fields.values.items() if name not in _READ}
    return replace(row, template_kwargs=_template_kwargs(fields.values), read_as=columns.read_as, extra=extra)


def _parse_demonstration(fields: Fields) -> Row:
    if "messages" in fields.values:
        messages = clean_messages(fields.name("messages"), fields.values["messages"])
        _check_last_turn(fields.name("messages"), messages)
        if not any(message["role"] != "assistant" for message in messages):
            raise FieldError(fields.name("messages"), "only the assistant's turns, nothing to answer")
        return Row(Shape.demonstration, [], [messages])
    if "text" in fields.values:
        return Row(Shape.demonstration, "", [clean_text("text", fields.values["text"])])
    return Row(Shape.demonstration, *_prompt_and(fields, ["completion"]))


def _parse_pair(fields: Fields, segments: bool) -> Row:
    chosen, rejected = (fields.text(side, fields.need(side)) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise FieldError(fields.name("rejected"), "the same as chosen, a pair needs two different answers")
    if "prompt" in fields.values and not (isinstance(fields.values["prompt"], str) and _begins_with_prompt(chosen)):
        prompt, sides = _prompt_and(fields, ["chosen", "rejected"])
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, sides = _shared_text(fields, chosen, rejected)
    elif not isinstance(chosen, str) and not isinstance(rejected, str):
        prompt, sides = _shared_turns(fields, chosen, rejected, segments)
    else:
        raise FieldError(fields.name("rejected"), f"{_form(rejected)}, but {fields.name('chosen')} is {_form(chosen)}")
    preference = clean_number("preference", fields.values.get("preference", 1.0))
    if not 0 <= preference <= 1:
        raise FieldError("preference", f"{preference:g}, must be from 0 to 1 (1: chosen surely better, 0.5: a tie)")
    margin = clean_number("margin", fields.values.get("margin", 0.0))
    return Row(Shape.pair, prompt, sides, preference=preference, target_margin=margin)


def _parse_ranking(fields: Fields) -> Row:
    completions, ranks = fields.need("completions"), fields.need("ranks")
    for name, value in (("completions", completions), ("ranks", ranks)):
        if not isinstance(value, list):
            raise FieldError(name, f"{kind_of(value)}, must be a list")
    if len(completions) < 2:
        raise FieldError("completions", f"{len(completions)}, a ranking needs at least 2")
    if len(ranks) != len(completions):
        raise FieldError("ranks", f"{len(ranks)} for {len(completions)} completions")
    ranks = [clean_number(f"ranks[{i}]", rank) for i, rank in enumerate(ranks)]
    items = {f"completions[{i}]": completion for i, completion in enumerate(completions)}
    prompt, cleaned = _prompt_and(Fields(replace(fields.columns, fields={**fields.values, **items})), list(items))
    for j in range(len(cleaned)):
        for i in range(j):
            if cleaned[i] == cleaned[j] and ranks[i] != ranks[j]:
                raise FieldError(f"completions[{j}]", f"the same as completions[{i}], but ranked differently")
    return Row(Shape.ranking, prompt, cleaned, ranks=ranks)


def _parse_unpaired(fields: Fields) -> Row:
    prompt, completions = _prompt_and(fields, ["completion"])
    label = fields.need("label")
    if not isinstance(label, bool):
        raise FieldError(fields.name("label"), f"{kind_of(label)}, must be true or false")
    return Row(Shape.unpaired, prompt, completions, label=label)


def _parse_scored(fields: Fields) -> Row:
    prompt, completions = _prompt_and(fields, ["completion"])
    return Row(Shape.scored, prompt, completions, score=clean_number("score", fields.need("score")))


_PARSERS = {
    Shape.demonstration: _parse_demonstration,
    Shape.ranking: _parse_ranking,
    Shape.unpaired: _parse_unpaired,
    Shape.scored: _parse_scored,
}


def _prompt_and(fields: Fields, names: list[str]) -> tuple[Text, list[Text]]:
    """The prompt and the completions in one form: all text, or all messages where any of them is."""
    prompt = fields.text("prompt", fields.need("prompt"))
    completions = [fields.text(name, fields.need(name)) for name in names]
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
        return prompt, completions
    if isinstance(prompt, str):
        prompt = [Message(role="user", content=prompt)]
    prompt = _open_prompt(fields, prompt)
    return prompt, [_answer(fields, name, prompt, c) for name, c in zip(names, completions, strict=True)]


def _answer(fields: Fields, name: str, prompt: Text, completion: Text) -> list[Message]:
    """A completion as messages that follow the prompt; one that repeats the prompt is cut down to what follows."""
    if isinstance(completion, str):
        return [Message(role="assistant", content=completion)]
    _check_last_turn(fields.name(name), completion)
    if completion[0]["role"] == "assistant":
        return completion
    if completion[: len(prompt)] == prompt and len(completion) > len(prompt):
        return completion[len(prompt) :]
    first = completion[0]["role"]
    raise FieldError(
        fields.name(name), f"begins with a turn of role {first}, but not with the prompt: prompt not shared"
    )


def _shared_text(fields: Fields, chosen: str, rejected: str) -> tuple[Text, list[Text]]:
    """The prompt that both texts begin with, as TRL's `extract_prompt` finds it."""
    shared = _common_length(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1  # the space belongs to the answer, as tokenizers have it
    if not chosen[:shared].strip():
        raise FieldError("prompt", f"chosen and rejected share no beginning (fields: {fields.listed()})")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[shared:].strip():
            raise FieldError(fields.name(name), "nothing is left after the shared beginning: give prompt as a field")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _shared_turns(
    fields: Fields, chosen: list[Message], rejected: list[Message], segments: bool
) -> tuple[Text, list[Text]]:
    """The turns that both conversations begin with; the answer of each is what follows.

    Of `segments` that start differently none, and each is a whole.
    """
    shared = min(_common_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    sides = {fields.name("chosen"): chosen, fields.name("rejected"): rejected}
    if not shared and not (segments and all(turns[0]["role"] != "assistant" for turns in sides.values())):
        raise FieldError("prompt", f"chosen and rejected share no beginning (fields: {fields.listed()})")
    for name, turns in sides.items():
        _check_last_turn(name, turns)
        if turns[shared]["role"] != "assistant":
            if segments:
                shared = 0
                continue
            raise FieldError("prompt", f"not shared: chosen and rejected part at turn {shared + 1}, before the answer")
    prompt = fields.values.get("prompt")
    if isinstance(prompt, str) and not any(turn["content"].strip() == prompt.strip() for turn in chosen[:shared]):
        raise FieldError("prompt", "not shared: not among the turns of chosen and rejected")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _begins_with_prompt(completion: Text) -> bool:
    return not isinstance(completion, str) and completion[0]["role"] != "assistant"


def _open_prompt(fields: Fields, prompt: Text) -> Text:
    """A prompt that leaves the next turn to the assistant."""
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise FieldError(fields.name("prompt"), "the last turn is the assistant's, must leave the answer to it")
    return prompt


def _before_last_answer(fields: Fields) -> list[Message]:
    name = fields.name("messages")
    messages = clean_messages(name, fields.values["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise FieldError(name, "only the assistant's turns, no prompt")
    return messages


def _check_last_turn(name: str, messages: list[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        raise FieldError(name, f"the last turn is of role {messages[-1]['role']}, must be the assistant's")


def _form(text: Text) -> str:
    return "text" if isinstance(text, str) else "messages"


def _template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs` and `tools`, the latter also as JSON text, which is how Parquet files carry it."""
    kwargs, tools = values.get("chat_template_kwargs", {}), values.get("tools")
    if not isinstance(kwargs, dict):
        raise FieldError("chat_template_kwargs", f"{kind_of(kwargs)}, must be an object")
    if clash := sorted(_TEMPLATE_OWN & set(kwargs)):
        raise FieldError(f"chat_template_kwargs.{clash[0]}", "is set by this program and cannot be given by a row")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise FieldError("tools", "not JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FieldError("tools", f"{kind_of(tools)}, must be a list of objects")
    check_characters("chat_template_kwargs", kwargs)
    check_characters("tools", tools)
    return {**kwargs, "tools": tools} if tools else dict(kwargs)
