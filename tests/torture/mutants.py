"""Good rows changed at random, and files of them changed in some bytes."""

import gzip
import json
import re
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.torture.rows import GOOD, LABELLED, PAIR, RANKED, chat, packed, turns

SEEDS: list[dict[str, Any]] = [
    GOOD,
    PAIR,
    {**PAIR, "preference": 0.7, "margin": 0.5, "tags": ["a"]},
    RANKED,
    LABELLED,
    {**GOOD, "score": 1.5, "finished": False},
    {"prompt": "Say: "},
    {"text": "once upon a time"},
    chat("system", "user", "assistant", "user", "assistant"),
    {"prompt": turns("user"), "completion": turns("assistant")},
    {"prompt": turns("user"), "chosen": turns("assistant"), "rejected": [{"role": "assistant", "content": "no"}]},
    {"chosen": turns("user", "assistant"), "rejected": [*turns("user"), {"role": "assistant", "content": "no"}]},
    {"prompt": turns("user"), "completions": [turns("assistant"), "no"], "ranks": [1, 1.5]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "be good"},
    {"instruction": "add", "input": "1 1", "output": "2", "history": [["a", "b"]]},
    {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {**chat("user", "assistant"), "tools": [{"type": "function", "function": {"name": "f"}}],
     "chat_template_kwargs": {"enable_thinking": True}},
    {"messages": [*turns("user"), {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}, *turns("tool", "assistant")]},
]  # fmt: skip
FIELDS = sorted({key for row in SEEDS for key in row} | {"role", "content", "from", "value", "reasoning_content"})

ODD_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", " ", "\0", "\ud800", "\udfff", "\ufeff", "\u202e", "\x1b[2J", "<|im_start|>", "</s>", "<|im_", "{{ 1 }}",
         "Human:", "\n\nHuman: a\n\nAssistant:", "\uf8f0</s>\uf8f1", "a" * 300, "True", "null", "1e400", "[]", "{}"]
    ),
)  # fmt: skip
ODD_NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**25, -(10**400), 2**63, 0.5, -0.0, 1e308]),
    st.floats(allow_nan=False, width=32),
)
ODD_LEAVES = st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXTS, st.sampled_from(["user", "assistant", "tool"]))
ODD_VALUES = st.recursive(
    ODD_LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | ODD_TEXTS, inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "x"]), "content": inner})
    ),
    max_leaves=6,
)


def readers(row: dict[str, Any]) -> list[str]:
    """The pipelines that read a good row of this shape."""
    if "label" in row:
        return ["kto", "condition", "show", "prompts"]
    if "chosen" in row or "ranks" in row:
        pairs = ["cpl", "condition", "coh"] if "chosen" in row else []
        return ["dpo", "reward", "show", "prompts", *pairs]
    return ["prompts"] if set(row) == {"prompt"} else ["sft", "show"]


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, Any]:
    """A good row with up to three changes, each somewhere in it, and who reads it; now and then not one who should."""
    row = json.loads(json.dumps(draw(st.sampled_from(SEEDS))))
    reader = draw(st.sampled_from(readers(row) if draw(st.integers(0, 9)) else sorted({*readers(PAIR), "kto", "sft"})))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        row = draw(mutated(row))
    return reader, row


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """One change, here or further down."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(["inside", "inside", "inside", "delete", "rename", "swap", "add", "typo", "copy"]))
        rest = {name: inner for name, inner in value.items() if name != key}
        other = draw(st.sampled_from(sorted(value)))
        if kind == "inside":
            return {**value, key: draw(mutated(value[key]))}
        if kind == "swap":
            return {**value, key: value[other], other: value[key]}
        if kind == "copy":
            return {**value, draw(st.sampled_from(FIELDS)): value[key]}
        if kind == "rename":
            return {**rest, draw(st.sampled_from(FIELDS)): value[key]}
        if kind == "typo":
            return {**rest, key[:1] + key[2:]: value[key]}
        return {**value, draw(st.sampled_from(FIELDS)): draw(ODD_VALUES)} if kind == "add" else rest
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(value) - 1))
        kind = draw(st.sampled_from(["inside", "inside", "delete", "double", "reverse", "wrap", "insert"]))
        if kind == "inside":
            return [*value[:place], draw(mutated(value[place])), *value[place + 1 :]]
        if kind == "delete":
            return [*value[:place], *value[place + 1 :]]
        if kind == "double":
            return [*value[: place + 1], *value[place:]]
        if kind == "insert":
            return [*value[:place], draw(ODD_VALUES), *value[place:]]
        return value[::-1] if kind == "reverse" else [value]
    if isinstance(value, str) and draw(st.booleans()):
        cut = draw(st.integers(0, len(value)))
        return value[:cut] + draw(ODD_TEXTS) + value[cut:]
    if draw(st.integers(0, 19)) == 0:
        return f"@deep {draw(st.sampled_from([3, 60, 400, 900, 3000]))} {draw(st.sampled_from(['list', 'content']))}"
    return draw(ODD_VALUES)


def as_bytes(row: Any) -> bytes:
    """As JSON, with what only JSON can hold: half surrogate pairs stay escapes, and nesting is written out here."""

    def deep(match: re.Match[str]) -> str:
        opening, closing = ("[", "]") if match[2] == "list" else ('{"content":', "}")
        return opening * int(match[1]) + "1" + closing * int(match[1])

    return re.sub(r'"@deep (\d+) (\w+)"(?!:)', deep, json.dumps(row)).encode() + b"\n"


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of rows, its bytes changed in up to five places."""
    rows = draw(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=4))
    form = draw(st.sampled_from(["lines", "array", "gzip", "parquet"]))
    content = b"".join(map(as_bytes, rows))
    if form == "array":
        content = json.dumps(rows, indent=draw(st.sampled_from([None, 1]))).encode()
    elif form == "gzip":
        content = gzip.compress(content, mtime=0)
    elif form == "parquet":
        content = packed("parquet")
    for _ in range(draw(st.integers(1, 5))):
        assume(content)
        at, length = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 9))
        new = draw(
            st.sampled_from([b"", b"\0", b"\xff", b'"', b"{", b"]", b"\\", b"\n", b"\\u", b"\xef\xbb\xbf"])
            | st.binary(max_size=4)
        )
        content = content[:at] + new + content[at + length :]
    return content
