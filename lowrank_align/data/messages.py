"""Text and messages as they come out of a file: their types, and the checks that every one of them must pass."""

import json
import math
from typing import Any, TypedDict

from lowrank_align.errors import nearest

LARGEST = 3.4e38  # training is in 32 bits, where more would be infinite
ROLES = ("system", "developer", "user", "assistant", "tool")

# Who speaks in ShareGPT's `from`. `function_call` is an assistant's turn, `observation` what the tool answered.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class Message(TypedDict):
    """One turn. Other keys that a template may read (`tool_calls`, `name`, ...) are kept beside these."""

    role: str
    content: str


class FieldError(Exception):
    """What is wrong with one field of one row; `formats.parse_row` adds where."""

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}: {what}")


def clean_text(field: str, value: Any) -> str:
    """`value` if it is text with something in it that a tokenizer can read."""
    if not isinstance(value, str):
        raise FieldError(field, f"{kind_of(value)}, must be text")
    if not value.strip():
        raise FieldError(field, "empty")
    check_characters(field, value)
    return value


def clean_number(field: str, value: Any) -> float:
    """`value` as a finite float; true and false are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FieldError(field, f"{kind_of(value)}, must be a number")
    try:
        number = float(value)
    except OverflowError:
        raise FieldError(field, "a number of hundreds of digits, must be finite") from None
    if not math.isfinite(number):
        raise FieldError(field, f"{value}, must be finite")
    if abs(number) > LARGEST:
        raise FieldError(field, f"{value}, must be at most {LARGEST:g} either way")
    return number


def clean_messages(field: str, value: Any) -> list[Message]:
    """A list of turns, each with a known role and a content; ShareGPT's `from` and `value` are read as such."""
    if not isinstance(value, list):
        raise FieldError(field, f"{kind_of(value)}, must be a list of messages")
    if not value:
        raise FieldError(field, "empty")
    return [_clean_message(f"{field}[{i}]", message) for i, message in enumerate(value)]


def is_messages(value: Any) -> bool:
    """Whether `value` looks like a conversation: a list whose first element has a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool({"role", "from"} & set(value[0]))
    )


def check_characters(field: str, value: Any) -> None:
    """NUL and half surrogate pairs pass JSON but no tokenizer; looked for in nested values too."""
    if isinstance(value, str):
        if "\0" in value:
            raise FieldError(field, f"contains a NUL character (at character {value.index(chr(0)) + 1})")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise FieldError(field, f"contains half a surrogate pair (at character {error.start + 1})") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_characters(f"{field}.{key}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_characters(f"{field}[{i}]", inner)


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, for messages: `a number`, `a list`, ..."""
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _clean_message(field: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise FieldError(field, f"{kind_of(message)}, must be an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}  # Parquet fills absent keys with null
    check_characters(field, message)
    if "from" in message and "role" not in message:
        return _from_sharegpt(field, message)
    if "role" not in message:
        raise FieldError(f"{field}.role", f"missing (fields: {', '.join(message)})")
    role = message["role"]
    if role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise FieldError(f"{field}.role", f"unknown role {role!r}{hint} (known: {', '.join(ROLES)})")
    says_otherwise = role == "assistant" and any(message.get(key) for key in ("tool_calls", "reasoning_content"))
    content = _plain_content(f"{field}.content", message.get("content", "" if says_otherwise else None), message)
    if role in ("user", "assistant") and not says_otherwise and not content.strip():
        raise FieldError(f"{field}.content", "empty")
    return {**message, "role": role, "content": content}  # type: ignore[typeddict-unknown-key]


def _plain_content(field: str, content: Any, message: dict[str, Any]) -> str:
    """Text, also where it comes as a list of text parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise FieldError(field, f"missing (fields: {', '.join(message)})")
    if not isinstance(content, list):
        raise FieldError(field, f"{kind_of(content)}, must be text")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise FieldError(field, "has a part that is not text (only text is supported)")
    return "".join(part["text"] for part in content)


def _from_sharegpt(field: str, message: dict[str, Any]) -> Message:
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        hint = nearest(speaker, SHAREGPT_ROLES) if isinstance(speaker, str) else ""
        raise FieldError(f"{field}.from", f"unknown role {speaker!r}{hint} (known: {', '.join(SHAREGPT_ROLES)})")
    if value is None:
        raise FieldError(f"{field}.value", f"missing (fields: {', '.join(message)})")
    if not isinstance(value, str):
        raise FieldError(f"{field}.value", f"{kind_of(value)}, must be text")
    role = SHAREGPT_ROLES[speaker]
    if role in ("user", "assistant") and not value.strip():
        raise FieldError(f"{field}.value", "empty")
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": _tool_calls(f"{field}.value", value)}  # type: ignore[typeddict-unknown-key]
    return {"role": role, "content": value}


def _tool_calls(field: str, value: str) -> list[dict[str, Any]]:
    """ShareGPT writes calls as JSON text, one object or a list of them: `{"name": ..., "arguments": {...}}`."""
    try:
        parsed = json.loads(value)
    except ValueError:
        raise FieldError(field, "not the JSON of a function call") from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise FieldError(field, "a function call needs a name")
    return [{"type": "function", "function": call} for call in calls]
