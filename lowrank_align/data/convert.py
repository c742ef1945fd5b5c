"""Rows of other projects turned into TRL's columns: ShareGPT, Alpaca and HH transcripts.

A converter changes names and nesting only; `formats.parse_row` checks what comes out. `names` maps a column of ours to
the name that the user's file has for it, so that an error points to what the user can see.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from lowrank_align.data.messages import FieldError, Message, clean_messages, clean_text, is_messages, kind_of


@dataclass(frozen=True)
class Columns:
    """One row in TRL's columns. `read_as` names the conversion, or is empty where none was needed."""

    fields: dict[str, Any]
    read_as: str = ""
    names: dict[str, str] = field(default_factory=dict)


def to_columns(raw: dict[str, Any]) -> Columns:
    """The row in TRL's columns. Null counts as absent: Parquet fills the columns of mixed rows with it."""
    fields = {name: value for name, value in raw.items() if value is not None}
    for turns in ("conversations", "messages"):
        if is_messages(fields.get(turns)) and (turns == "conversations" or "from" in fields[turns][0]):
            return _sharegpt(fields, turns)
    if "instruction" in fields and not {"prompt", "messages"} & set(fields):
        return _alpaca(fields)
    return _hh(fields) or Columns(fields)


def _sharegpt(fields: dict[str, Any], turns: str) -> Columns:
    """`conversations` of `from` and `value`; with `chosen` and `rejected` a pair, with `kto_tag` an unpaired answer."""
    rest = {name: value for name, value in fields.items() if name not in (turns, "system", "kto_tag")}
    conversation = clean_messages(turns, fields[turns])
    if conversation[0]["role"] != "system":
        conversation = [*_system(fields), *conversation]
    for side in {"chosen", "rejected"} & set(rest):
        if isinstance(rest[side], dict):
            rest[side] = clean_messages(side, [rest[side]])
    if {"chosen", "rejected"} & set(rest):
        return Columns({"prompt": conversation, **rest}, "ShareGPT", {"prompt": turns})
    if "kto_tag" in fields:
        answer = {"prompt": conversation[:-1], "completion": conversation[-1:], "label": fields["kto_tag"]}
        return Columns({**rest, **answer}, "ShareGPT", {"prompt": turns, "completion": turns, "label": "kto_tag"})
    return Columns({**rest, "messages": conversation}, "ShareGPT", {"messages": turns})


def _alpaca(fields: dict[str, Any]) -> Columns:
    """`instruction`, `input` and `output`; a list of two outputs is the old form of a pair, better one first."""
    consumed = ("instruction", "input", "output", "history", "system", "kto_tag")
    rest = {name: value for name, value in fields.items() if name not in consumed}
    names = {"prompt": "instruction", "completion": "output"}
    question = clean_text("instruction", fields["instruction"])
    context = fields.get("input", "")
    if not isinstance(context, str):
        raise FieldError("input", f"{kind_of(context)}, must be text")
    asked = f"{question}\n{context}" if context.strip() else question
    prompt = [*_system(fields), *_alpaca_history(fields.get("history") or []), Message(role="user", content=asked)]
    rest["prompt"] = clean_messages("instruction", prompt)
    output = fields.get("output")
    if isinstance(output, list):
        if len(output) != 2:
            raise FieldError("output", f"a list of {len(output)}, must be text or a list of two (better one first)")
        rest |= {"chosen": output[0], "rejected": output[1]}
        names |= {"chosen": "output[0]", "rejected": "output[1]"}
    elif "output" in fields and not {"chosen", "rejected"} & set(rest):
        rest["completion"] = clean_text("output", output)
    if "kto_tag" in fields:
        rest["label"], names["label"] = fields["kto_tag"], "kto_tag"
    return Columns(rest, "Alpaca", names)


def _alpaca_history(history: Any) -> list[Message]:
    """Earlier rounds: a list of `[question, answer]`."""
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise FieldError("history", "must be a list of [question, answer]")
    return [
        Message(role=role, content=clean_text(f"history[{i}]", text))
        for i, turn in enumerate(history)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _system(fields: dict[str, Any]) -> list[Message]:
    system = fields.get("system", "")
    if not isinstance(system, str):
        raise FieldError("system", f"{kind_of(system)}, must be text")
    return [Message(role="system", content=clean_text("system", system))] if system.strip() else []


_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _hh(fields: dict[str, Any]) -> Columns | None:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ...": whole in both sides, or a prompt that ends openly."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and _is_transcript(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        opened = prompt.rstrip().removesuffix("Assistant:").rstrip()
        answers = {
            name: [Message(role="assistant", content=clean_text(name, fields[name]).strip())]
            for name in ("chosen", "rejected", "completion")
            if isinstance(fields.get(name), str)
        }
        return Columns({**fields, "prompt": _hh_turns("prompt", opened), **answers}, "HH")
    sides = {name: fields.get(name) for name in ("chosen", "rejected")}
    if "prompt" in fields or not all(isinstance(text, str) and _is_transcript(text) for text in sides.values()):
        return None
    return Columns({**fields, **{name: _hh_turns(name, str(text)) for name, text in sides.items()}}, "HH")


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _hh_turns(field: str, transcript: str) -> list[Message]:
    _, *parts = _HH_TURN.split(transcript.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
    return clean_messages(field, turns)
