"""Rows that are wrong: the catalogue, each with the line that its user sees; and rows and files mutated at random."""
# ruff: noqa: E501 -- messages and templates are long lines

import gzip
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

Command = Callable[..., Any]

SECTION = "Rows and settings"
FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
GOOD = {"prompt": "Say: ", "completion": "a word"}
PAIR = {"prompt": "Say: ", "chosen": "a word", "rejected": "no"}
RANKED = {"prompt": "Say: ", "completions": ["a word", "two"], "ranks": [1, 2]}
LABELLED = {**GOOD, "label": True}
NEEDS_DEMONSTRATION = "needed: demonstration (messages, or prompt and completion, or text)"
NEEDS_PAIR = "needed: pair (prompt, chosen, rejected) or ranking (prompt, completions, ranks)"
NEEDS_LABEL = "needed: unpaired (prompt, completion, label)"
A_ROW_NEEDS = (
    "a row needs: messages, or prompt and completion, or text; prompt, chosen, rejected; prompt, completions, ranks; "
    "prompt, completion, label; prompt, completion, score; prompt"
)
KNOWN_ROLES = "(known: system, developer, user, assistant, tool)"


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"says the {role}"} for role in roles]


def chat(*roles: str, **last: Any) -> dict[str, Any]:
    messages = turns(*roles)
    messages[-1] |= last
    return {"messages": messages}


def packed(kind: str) -> bytes:
    """Rows in a form that is no form of rows."""
    into = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(into, "w") as archive:
            archive.writestr(zipfile.ZipInfo("rows.jsonl"), lines(GOOD))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([GOOD]), into)
    return into.getvalue()


# name: (method, the file's bytes, the whole line)
BAD: dict[str, tuple[str, bytes, str]] = {
    # --- no JSON
    "malformed on line 2": (
        "sft",
        lines(GOOD) + b'{"prompt": "a", \n',
        "rows.jsonl:2: not JSON: Expecting property name enclosed in double quotes (column 17)",
    ),
    "two objects on a line": (
        "sft",
        lines(GOOD).strip() + lines(GOOD),
        "rows.jsonl:1: not JSON: Extra data (column 44)",
    ),
    "single quotes": (
        "sft",
        b"{'prompt': 'a', 'completion': 'b'}\n",
        "rows.jsonl:1: not JSON: Expecting property name enclosed in double quotes (column 2)",
    ),
    "raw line break in a text": (
        "sft",
        b'{"prompt": "a\tb", "completion": "b"}\n',
        "rows.jsonl:1: not JSON: Invalid control character at (column 14)",
    ),
    "cut in the middle": (
        "sft",
        lines(GOOD, GOOD)[:-12],
        "rows.jsonl:2: not JSON: Expecting ':' delimiter (column 33)",
    ),
    "bad escape": (
        "sft",
        b'{"prompt": "\\x41", "completion": "b"}\n',
        "rows.jsonl:1: not JSON: Invalid \\escape (column 13)",
    ),
    "NaN": ("reward", lines({**PAIR, "margin": float("nan")}), "rows.jsonl:1: not JSON: NaN is not JSON"),
    "Infinity": ("reward", lines({**PAIR, "margin": float("inf")}), "rows.jsonl:1: not JSON: Infinity is not JSON"),
    "a number of 5,000 digits": (
        "reward",
        b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + b"1" * 5000 + b"}\n",
        "rows.jsonl:1: not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; "
        "use sys.set_int_max_str_digits() to increase the limit",
    ),
    "3,000 deep": (
        "sft",
        b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "rows.jsonl:1: not JSON: nested too deep",
    ),
    "3,000 deep in an array": ("sft", b"[" * 3000 + b"]" * 3000, "rows.jsonl:1: not JSON: nested too deep"),
    "a key twice": (
        "sft",
        b'{"prompt": "a", "completion": "b", "prompt": "c"}\n',
        "rows.jsonl:1: prompt: stands twice in one object; which of them is meant?",
    ),
    "a key twice in a turn": (
        "sft",
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n',
        "rows.jsonl:1: content: stands twice in one object; which of them is meant?",
    ),
    "pretty-printed": (
        "sft",
        json.dumps(GOOD, indent=2).encode(),
        "rows.jsonl:1: an object over several lines; rows are one object a line, or an array of objects",
    ),
    "array with a comma too many": (
        "sft",
        b"[" + lines(GOOD).strip() + b",\n]",
        "rows.jsonl:2: not JSON: Expecting value (column 1)",
    ),
    "array that is not closed": (
        "sft",
        b"[" + lines(GOOD).strip(),
        "rows.jsonl:1: not JSON: Expecting ',' or ']' (column 45)",
    ),
    "text after the array": (
        "sft",
        b"[" + lines(GOOD).strip() + b"] ok",
        "rows.jsonl:1: not JSON: Extra data after the array (column 47)",
    ),
    # --- no text, or another format
    "empty": ("sft", b"", "rows.jsonl: the file is empty"),
    "blank lines alone": ("sft", b"\n \r\n", "rows.jsonl: the file is empty"),
    "byte order mark alone": ("sft", b"\xef\xbb\xbf\n", "rows.jsonl: the file is empty"),
    "an empty array": ("sft", b"[]", "rows.jsonl: no rows"),
    "UTF-16": (
        "sft",
        lines(GOOD).decode().encode("utf-16"),
        "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8",
    ),
    "UTF-16 without a mark": (
        "sft",
        lines(GOOD).decode().encode("utf-16-le"),
        "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8",
    ),
    "Latin-1 on line 2": (
        "sft",
        lines(GOOD) + '{"prompt": "é"}\n'.encode("latin-1"),
        "rows.jsonl:2: not UTF-8 (at byte 12 of the line), save it as UTF-8",
    ),
    "Latin-1 in an array": (
        "sft",
        '[{"prompt": "é"}]'.encode("latin-1"),
        "rows.jsonl:1: not UTF-8 (at byte 13), save it as UTF-8",
    ),
    "CSV": (
        "sft",
        b"prompt,completion\na,b\n",
        "rows.jsonl:1: not JSON: Expecting value (column 1) (and 1 more bad row; --skip-bad sets them aside)",
    ),
    "zip": ("sft", packed("zip"), "rows.jsonl: a zip archive; unpack it, or compress the rows with gzip"),
    "damaged gzip": (
        "sft",
        b"\x1f\x8b\x08\0",
        "rows.jsonl: damaged gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "gzip cut short": (
        "sft",
        gzip.compress(lines(GOOD), mtime=0)[:-9],
        "rows.jsonl: damaged gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "gzip of gzip": (
        "sft",
        gzip.compress(gzip.compress(lines(GOOD), mtime=0), mtime=0),
        "rows.jsonl: gzipped twice; unpack it once",
    ),
    "Parquet cut short": (
        "sft",
        packed("parquet")[:60],
        "rows.jsonl: damaged Parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this "
        "is not a parquet file)",
    ),
    # --- no object, no known field
    "text in place of a row": ("sft", lines("text"), "rows.jsonl:1: row: text, must be an object with fields"),
    "null in place of a row": ("sft", b"null\n", "rows.jsonl:1: row: null, must be an object with fields"),
    "an object without fields": ("sft", b"{}\n", f"rows.jsonl:1: row: no known fields (fields: none); {A_ROW_NEEDS}"),
    "unknown fields": (
        "sft",
        lines({"foo": 1, "bar": 2}),
        f"rows.jsonl:1: row: no known fields (fields: foo, bar); {A_ROW_NEEDS}",
    ),
    "misspelt field": (
        "sft",
        lines({"massages": turns("user", "assistant")}),
        f"rows.jsonl:1: row: no known fields (fields: massages) (did you mean messages?); {A_ROW_NEEDS}",
    ),
    "misspelt answer": (
        "dpo",
        lines({"prompt": "a", "chosen": "b", "rejectd": "c"}),
        "rows.jsonl:1: rejected: missing (fields: prompt, chosen, rejectd) (did you mean rejectd?)",
    ),
    # --- missing, empty, of the wrong type
    "no prompt": (
        "sft",
        lines({"completion": "b"}),
        "rows.jsonl:1: prompt: missing (fields: completion)",
    ),
    "no answer": (
        "sft",
        lines({"prompt": "a"}),
        f"rows.jsonl:1: row: is of shape prompts (fields: prompt), {NEEDS_DEMONSTRATION}",
    ),
    "no rejected": (
        "dpo",
        lines(PAIR, {"prompt": "a", "chosen": "b"}),
        "rows.jsonl:2: rejected: missing (fields: prompt, chosen)",
    ),
    "no chosen": (
        "dpo",
        lines({"prompt": "a", "rejected": "b"}),
        "rows.jsonl:1: chosen: missing (fields: prompt, rejected)",
    ),
    "null chosen": ("dpo", lines({**PAIR, "chosen": None}), "rows.jsonl:1: chosen: missing (fields: prompt, rejected)"),
    "several bad rows": (
        "dpo",
        lines(PAIR, {"prompt": "a", "chosen": "b"}, PAIR, [], 3),
        "rows.jsonl:2: rejected: missing (fields: prompt, chosen) (and 2 more bad rows; --skip-bad sets them aside)",
    ),
    "empty prompt": ("sft", lines({**GOOD, "prompt": ""}), "rows.jsonl:1: prompt: empty"),
    "blank completion": ("sft", lines(GOOD, {**GOOD, "completion": " \n"}), "rows.jsonl:2: completion: empty"),
    "blank chosen": ("dpo", lines({**PAIR, "chosen": "\u00a0\t"}), "rows.jsonl:1: chosen: empty"),
    "blank rejected": ("dpo", lines({**PAIR, "rejected": ""}), "rows.jsonl:1: rejected: empty"),
    "empty text": ("sft", lines({"text": "  "}), "rows.jsonl:1: text: empty"),
    "no messages": ("sft", lines({"messages": []}), "rows.jsonl:1: messages: empty"),
    "empty turn": (
        "sft",
        lines({"messages": [{"role": "user", "content": ""}, *turns("assistant")]}),
        "rows.jsonl:1: messages[0].content: empty",
    ),
    "number for a prompt": (
        "sft",
        lines({"prompt": 3, "completion": "b"}),
        "rows.jsonl:1: prompt: a number, must be text or a list of messages",
    ),
    "object for an answer": (
        "sft",
        lines({**GOOD, "completion": {"content": "b"}}),
        "rows.jsonl:1: completion: an object, must be text or a list of messages",
    ),
    "list for a text": ("sft", lines({"text": ["a"]}), "rows.jsonl:1: text: a list, must be text"),
    "text for messages": (
        "sft",
        lines({"messages": "hello"}),
        "rows.jsonl:1: messages: text, must be a list of messages",
    ),
    "label as text": ("kto", lines({**LABELLED, "label": "true"}), "rows.jsonl:1: label: text, must be true or false"),
    "label as a number": (
        "kto",
        lines({**LABELLED, "label": 1}),
        "rows.jsonl:1: label: a number, must be true or false",
    ),
    "label as null": (
        "kto",
        lines({**LABELLED, "label": None}),
        f"rows.jsonl:1: row: is of shape demonstration (fields: prompt, completion), {NEEDS_LABEL}",
    ),
    "preference over 1": (
        "reward",
        lines({**PAIR, "preference": 1.5}),
        "rows.jsonl:1: preference: 1.5, must be from 0 to 1 (1: chosen surely better, 0.5: a tie)",
    ),
    "preference as text": (
        "dpo",
        lines({**PAIR, "preference": "1"}),
        "rows.jsonl:1: preference: text, must be a number",
    ),
    "preference as true": (
        "dpo",
        lines({**PAIR, "preference": True}),
        "rows.jsonl:1: preference: true/false, must be a number",
    ),
    "margin infinite": (
        "reward",
        lines({**PAIR, "margin": 0}).replace(b"0", b"1e400"),
        "rows.jsonl:1: margin: inf, must be finite",
    ),
    "margin of 400 digits": (
        "reward",
        lines({**PAIR, "margin": 10**400}),
        "rows.jsonl:1: margin: a number of hundreds of digits, must be finite",
    ),
    # --- characters
    "NUL": (
        "reward",
        lines({**PAIR, "rejected": "a\0b"}),
        "rows.jsonl:1: rejected: contains a NUL character (at character 2)",
    ),
    "NUL in a turn": (
        "sft",
        lines(chat("user", "assistant", content="a\0")),
        "rows.jsonl:1: messages[1].content: contains a NUL character (at character 2)",
    ),
    "half a surrogate pair": (
        "sft",
        lines({**GOOD, "prompt": "smile \ud83d"}),
        "rows.jsonl:1: prompt: contains half a surrogate pair (at character 7)",
    ),
    "half a pair in tools": (
        "sft",
        lines({**chat("user", "assistant"), "tools": [{"name": "\udc00"}]}),
        "rows.jsonl:1: tools[0].name: contains half a surrogate pair (at character 1)",
    ),
    # --- pairs
    "chosen is rejected": (
        "dpo",
        lines({**PAIR, "rejected": PAIR["chosen"]}),
        "rows.jsonl:1: rejected: the same as chosen, a pair needs two different answers",
    ),
    "no beginning shared": (
        "dpo",
        lines({"chosen": "one text", "rejected": "another"}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "nothing after the beginning": (
        "dpo",
        lines({"chosen": "one text", "rejected": "one text more"}),
        "rows.jsonl:1: chosen: nothing is left after the shared beginning: give prompt as a field",
    ),
    "text against messages": (
        "dpo",
        lines({"chosen": turns("user", "assistant"), "rejected": "no"}),
        "rows.jsonl:1: rejected: text, but chosen is messages",
    ),
    "turns not shared": (
        "reward",
        lines({"chosen": turns("user", "assistant"), "rejected": turns("system", "assistant")}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "parting before the answer": (
        "dpo",
        lines({"chosen": turns("user", "user", "assistant"), "rejected": turns("user", "tool", "assistant")}),
        "rows.jsonl:1: prompt: not shared: chosen and rejected part at turn 2, before the answer",
    ),
    "prompt not among the turns": (
        "dpo",
        lines(
            {
                "prompt": "else",
                "chosen": turns("user", "assistant"),
                "rejected": [*turns("user"), *turns("assistant")][:1] + [{"role": "assistant", "content": "no"}],
            }
        ),
        "rows.jsonl:1: prompt: not shared: not among the turns of chosen and rejected",
    ),
    "answer that begins with the user": (
        "sft",
        lines({"prompt": turns("system"), "completion": turns("user", "assistant")}),
        "rows.jsonl:1: completion: begins with a turn of role user, but not with the prompt: prompt not shared",
    ),
    # --- rankings
    "fewer ranks than answers": ("reward", lines({**RANKED, "ranks": [1]}), "rows.jsonl:1: ranks: 1 for 2 completions"),
    "one answer to rank": (
        "reward",
        lines({**RANKED, "completions": ["a"], "ranks": [1]}),
        "rows.jsonl:1: completions: 1, a ranking needs at least 2",
    ),
    "rank as text": ("dpo", lines({**RANKED, "ranks": [1, "2"]}), "rows.jsonl:1: ranks[1]: text, must be a number"),
    "rank infinite": (
        "dpo",
        lines(RANKED).replace(b"[1, 2]", b"[1, 1e999]"),
        "rows.jsonl:1: ranks[1]: inf, must be finite",
    ),
    "ranks missing": (
        "dpo",
        lines({"prompt": "a", "completions": ["a", "b"]}),
        "rows.jsonl:1: ranks: missing (fields: prompt, completions)",
    ),
    "completions as text": (
        "dpo",
        lines({**RANKED, "completions": "ab"}),
        "rows.jsonl:1: completions: text, must be a list",
    ),
    "one answer on two ranks": (
        "dpo",
        lines({**RANKED, "completions": ["a", "a"]}),
        "rows.jsonl:1: completions[1]: the same as completions[0], but ranked differently",
    ),
    "an empty ranked answer": (
        "dpo",
        lines({**RANKED, "completions": ["a", ""]}),
        "rows.jsonl:1: completions[1]: empty",
    ),
    # --- messages
    "unknown role": (
        "sft",
        lines(chat("usr", "assistant")),
        f"rows.jsonl:1: messages[0].role: unknown role 'usr' (did you mean user?) {KNOWN_ROLES}",
    ),
    "role as a number": (
        "sft",
        lines({"messages": [{"role": 1, "content": "a"}]}),
        f"rows.jsonl:1: messages[0].role: unknown role 1 {KNOWN_ROLES}",
    ),
    "role as a list": (
        "sft",
        lines({"messages": [{"role": ["user"], "content": "a"}]}),
        f"rows.jsonl:1: messages[0].role: unknown role ['user'] {KNOWN_ROLES}",
    ),
    "no role": (
        "sft",
        lines({"messages": [{"content": "a"}]}),
        "rows.jsonl:1: messages[0].role: missing (fields: content)",
    ),
    "no content": (
        "sft",
        lines({"messages": [{"role": "user"}, *turns("assistant")]}),
        "rows.jsonl:1: messages[0].content: missing (fields: role)",
    ),
    "content as a number": (
        "sft",
        lines({"messages": [{"role": "user", "content": 7}]}),
        "rows.jsonl:1: messages[0].content: a number, must be text",
    ),
    "an image": (
        "sft",
        lines({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}),
        "rows.jsonl:1: messages[0].content: has a part that is not text (only text is supported)",
    ),
    "text for a turn": (
        "sft",
        lines({"messages": ["hello"]}),
        "rows.jsonl:1: messages[0]: text, must be an object with role and content",
    ),
    "last turn the user's": (
        "sft",
        lines(chat("user", "assistant", "user")),
        "rows.jsonl:1: messages: the last turn is of role user, must be the assistant's",
    ),
    "last turn a tool's": (
        "sft",
        lines(chat("user", "assistant", "tool")),
        "rows.jsonl:1: messages: the last turn is of role tool, must be the assistant's",
    ),
    "the assistant alone": (
        "sft",
        lines(chat("assistant")),
        "rows.jsonl:1: messages: only the assistant's turns, nothing to answer",
    ),
    "prompt that answers itself": (
        "sft",
        lines({"prompt": turns("user", "assistant"), "completion": "b"}),
        "rows.jsonl:1: prompt: the last turn is the assistant's, must leave the answer to it",
    ),
    "ShareGPT of nobody": (
        "sft",
        lines({"conversations": [{"from": "humann", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        "rows.jsonl:1: conversations[0].from: unknown role 'humann' (did you mean human?) (known: system, human, user, "
        "gpt, chatgpt, assistant, bot, model, function_call, tool, observation)",
    ),
    "ShareGPT of a list": (
        "sft",
        lines({"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]}),
        "rows.jsonl:1: conversations[0].from: unknown role ['human'] (known: system, human, user, gpt, chatgpt, "
        "assistant, bot, model, function_call, tool, observation)",
    ),
    "a function call that is none": (
        "sft",
        lines({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{x"}]}),
        "rows.jsonl:1: conversations[1].value: not the JSON of a function call",
    ),
    # --- what a template reads
    "tools as text": ("sft", lines({**chat("user", "assistant"), "tools": "{x"}), "rows.jsonl:1: tools: not JSON"),
    "tools as a number": (
        "sft",
        lines({**chat("user", "assistant"), "tools": 3}),
        "rows.jsonl:1: tools: a number, must be a list of objects",
    ),
    "template arguments as a list": (
        "sft",
        lines({**chat("user", "assistant"), "chat_template_kwargs": []}),
        "rows.jsonl:1: chat_template_kwargs: a list, must be an object",
    ),
    "another template from a row": (
        "sft",
        lines({**chat("user", "assistant"), "chat_template_kwargs": {"chat_template": "{{ x }}"}}),
        "rows.jsonl:1: chat_template_kwargs.chat_template: is set by this program and cannot be given by a row",
    ),
    "another end token from a row": (
        "sft",
        lines({**chat("user", "assistant"), "chat_template_kwargs": {"eos_token": ""}}),
        "rows.jsonl:1: chat_template_kwargs.eos_token: is set by this program and cannot be given by a row",
    ),
    # --- shapes
    "a pair and a label": (
        "sft",
        lines({**PAIR, **LABELLED}),
        "rows.jsonl:1: chosen, rejected, label: fields of several shapes (pair, unpaired): keep those of one",
    ),
    "two demonstrations in one": (
        "sft",
        lines({**GOOD, "text": "abc"}),
        "rows.jsonl:1: text, completion: several forms of a demonstration: keep one",
    ),
    "a pair for sft": (
        "sft",
        lines(PAIR),
        f"rows.jsonl:1: row: is of shape pair (fields: prompt, chosen, rejected), {NEEDS_DEMONSTRATION}; "
        "`lowrank-align data convert rows.jsonl --to demonstrations --out OUT.jsonl` makes them",
    ),
    "a demonstration for dpo": (
        "dpo",
        lines(GOOD),
        f"rows.jsonl:1: row: is of shape demonstration (fields: prompt, completion), {NEEDS_PAIR}",
    ),
    "shapes mixed": (
        "dpo",
        lines(PAIR, GOOD, RANKED),
        f"rows.jsonl:2: row: is of shape demonstration (fields: prompt, completion), {NEEDS_PAIR}",
    ),
    "segments for dpo": (
        "dpo",
        lines(
            {
                "chosen": turns("user", "assistant"),
                "rejected": [{"role": "user", "content": "else"}, *turns("assistant")],
            }
        ),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "segments that begin with an answer": (
        "cpl",
        lines({"chosen": turns("assistant", "user", "assistant"), "rejected": turns("user", "assistant")}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "segments that end with the user": (
        "cpl",
        lines({"chosen": turns("user", "assistant", "user"), "rejected": turns("system", "assistant")}),
        "rows.jsonl:1: chosen: the last turn is of role user, must be the assistant's",
    ),
    # --- too long
    "all too long": (
        "sft",
        lines({**GOOD, "prompt": "a" * 999}),
        "no row is left of 1 (1: the prompt leaves no room); raise --max-length or shorten the prompts",
    ),
    "answers equal once cut": (
        "dpo",
        lines({"prompt": "a", "chosen": "b" * 400 + "c", "rejected": "b" * 400 + "d"}),
        "no row is left of 1 (1: the answers are equal after cutting); raise --max-length or shorten the prompts",
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_align.base import Base

    monkeypatch.setattr(Base, "load", lambda *_args, **_options: pytest.fail("the model was loaded"))


def trained_on(method: str, model: Path) -> tuple[object, ...]:
    """The command that trains on rows.jsonl."""
    extra = ("--loss", "cpl") if method == "cpl" else ()
    return (
        "dpo" if method == "cpl" else method,
        "--model",
        model,
        "--data",
        "rows.jsonl",
        "--out",
        "new",
        *FEW,
        *extra,
    )


def test_the_catalogue(tally: Any, no_model: None, command: Command, tiny_llama: Path) -> None:
    """One line, exit code 2, before a model is loaded, and nothing written; also where a run would be replaced."""
    wrong = []
    for name, (method, content, message) in BAD.items():
        Path("rows.jsonl").write_bytes(content)
        outcome = command(*trained_on(method, tiny_llama))
        if (outcome.code, outcome.err, os.listdir()) != (2, f"error: {message}\n", ["rows.jsonl"]):
            wrong.append(f"{name}: {outcome.code}: {outcome.err}expected {message}")
    tally(SECTION, "bad rows, each with its line", "one line that says where and what", held=len(BAD) - len(wrong),
          of=len(BAD))  # fmt: skip
    assert not wrong, "\n".join(wrong)
    assert len(BAD) >= 60


def test_the_catalogue_does_not_cost_the_run_that_is_there(
    no_model: None, command: Command, tiny_llama: Path, trained: Path, here: Path
) -> None:
    """--overwrite removes the old run only for rows that can replace it; one of each kind of the catalogue."""
    shutil.copytree(trained / "sft", "new")
    before = {path: path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()}
    for name in ("malformed on line 2", "empty", "zip", "unknown fields", "blank completion", "all too long"):
        method, content, message = BAD[name]
        Path("rows.jsonl").write_bytes(content)
        assert command(*trained_on(method, tiny_llama), "--overwrite").err == f"error: {message}\n"
        Path("rows.jsonl").unlink()
        assert {path: path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("method", ["ppo", "grpo", "quark"])
def test_no_prompt_to_answer(method: str, command: Command, no_model: None, tiny_llama: Path, trained: Path) -> None:
    Path("rows.jsonl").write_bytes(lines({"text": "abc"}))
    argv = (method, "--model", tiny_llama, "--prompts", "rows.jsonl", "--out", "new", *FEW)
    assert command(*argv, "--reward", trained / "reward").err == "error: rows.jsonl:1: prompt: missing (fields: text)\n"


PLACES: dict[str, tuple[int, Callable[[Path], object], str]] = {
    "a folder without data": (
        2,
        lambda path: path.mkdir(),
        "rows.jsonl: no data files in this folder (looked for .jsonl, .json, .ndjson, .jsonl.gz, .json.gz, .ndjson.gz, "
        ".parquet)",
    ),
    "a link to nothing": (
        2,
        lambda path: path.symlink_to("gone.jsonl"),
        "rows.jsonl: a link to gone.jsonl, which is not there",
    ),
    "a link to itself": (
        2,
        lambda path: path.symlink_to(path.name),
        "rows.jsonl: a link to rows.jsonl, which is not there",
    ),
    "a device": (
        2,
        lambda path: path.symlink_to("/dev/zero"),
        "rows.jsonl: a device, which never ends; give a file of rows",
    ),
    "nothing": (2, lambda path: None, "rows.jsonl: no such file"),
    "a file that is closed to this user": (
        2,
        lambda path: (path.write_bytes(lines(GOOD)), path.chmod(0)),
        "rows.jsonl: cannot be read (Permission denied)",
    ),
    "gzip that unpacks to gigabytes": (
        2,
        lambda path: path.write_bytes(gzip.compress(bytes(2**20), mtime=0) * 600),
        "rows.jsonl: unpacks to over 268 MB, 300 times its size; no rows are so alike: unpack it to see",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file(name: str, tally: Any, command: Command, no_model: None, tiny_llama: Path) -> None:
    code, make, message = PLACES[name]
    make(Path("rows.jsonl"))
    if "closed" in name and os.access("rows.jsonl", os.R_OK):
        pytest.skip("this user may read everything")
    outcome = command(*trained_on("sft", tiny_llama))
    held = (outcome.code, outcome.err) == (code, f"error: {message}\n")
    tally(SECTION, "bad rows, each with its line", "one line that says where and what", held=int(held), of=1)
    assert held, outcome.err


def test_rows_from_a_pipe(command: Command, tiny_llama: Path) -> None:
    """`--data <(zcat rows.gz)`: a pipe is read to its end, once."""
    read, write = os.pipe()
    os.write(write, lines(GOOD))
    os.close(write)
    with os.fdopen(read):
        outcome = command("show", "--model", tiny_llama, "--data", f"/dev/fd/{read}")
    assert outcome.code == 0 and "1 of 1 rows" in outcome.out


UNUSUAL: dict[str, tuple[bytes, str]] = {
    "byte order mark": (b"\xef\xbb\xbf" + lines(GOOD), "a word"),
    "Windows' line ends": (lines(GOOD).replace(b"\n", b"\r\n"), "a word"),
    "no newline at the end": (lines(GOOD).strip(), "a word"),
    "blank lines": (b"\n\n" + lines(GOOD) + b"\n", "a word"),
    "gzip under a plain name": (gzip.compress(lines(GOOD)), "a word"),
    "gzip in two members": (gzip.compress(lines(GOOD)[:9]) + gzip.compress(lines(GOOD)[9:]), "a word"),
    "Parquet under a plain name": (packed("parquet"), "a word"),
    "an array": (b"[" + lines(GOOD).strip() + b"]", "a word"),
    "columns that nobody reads": (lines({**GOOD, "source": {"a": [1, None]}, "": 0}), "a word"),
    "integers of 400 digits in them": (lines({**GOOD, "id": 10**400}), "a word"),
    "emoji, joiners, right-to-left": (lines({**GOOD, "completion": "\U0001f468\u200d\U0001f469 \u05d0"}), "\U0001f468"),
    "control characters": (lines({**GOOD, "completion": "a\x1b[31mb"}), "a\\x1b[31mb"),
    "900 deep in a column that nobody reads": (
        b'{"prompt": "a ", "completion": "a word", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        "a word",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_rows_that_are_only_unusual(
    name: str, tally: Any, command: Command, tiny_base_folder: Path, tiny_llama: Path
) -> None:
    """Accepted and trained on, and not a character of them changed."""
    content, shown = UNUSUAL[name]
    Path("rows.jsonl").write_bytes(content)
    outcome = command("show", "--model", tiny_base_folder, "--data", "rows.jsonl")
    held = outcome.code == 0 and "1 of 1 rows" in outcome.out and "\x1b" not in outcome.out and shown in outcome.out
    trained = command(*trained_on("sft", tiny_llama))
    held = held and trained.code == 0 and "training on 1 rows" in trained.out.splitlines()
    tally(SECTION, "rows that are only unusual", "taken as they are", held=int(held), of=1)
    assert held, outcome.err + trained.err


def test_one_prompt_too_long_is_counted_and_named(command: Command, tiny_llama: Path) -> None:
    Path("rows.jsonl").write_bytes(lines(GOOD, {**GOOD, "prompt": "a" * 999}, {**GOOD, "completion": "b" * 999}))
    outcome = command(*trained_on("sft", tiny_llama))
    assert outcome.code == 0, outcome.err
    told = outcome.out.splitlines()
    assert "rows.jsonl: 1 of 3 rows cut at max_length 256 (750 tokens)" in told
    where = "rows.jsonl:2: the prompt leaves no room"
    assert f"rows.jsonl: 1 of 3 rows dropped, listed in dropped_rows.jsonl (first: {where})" in told
    dropped = [json.loads(line) for line in Path("new/dropped_rows.jsonl").read_text().splitlines()]
    assert dropped == [{"where": "rows.jsonl:2", "reason": "the prompt leaves no room"}]


# ---- mutated at random

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


@pytest.fixture(scope="module")
def pipelines(tiny_llama: Path) -> Iterator[dict[str, Callable[[Path], int]]]:
    """By the rows wanted: from a file to token ids, as every command goes; how many rows came out or were accounted for."""
    from transformers import AutoTokenizer

    from lowrank_align.config import METHODS, resolve
    from lowrank_align.data.chat import Renderer, render_all
    from lowrank_align.data.formats import Shape
    from lowrank_align.data.load import load_rows
    from lowrank_align.data.show import print_rows
    from lowrank_align.methods import method_class
    from lowrank_align.terminal import make_console

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    renderers = [Renderer(tokenizer, chat_template=template, max_length=256) for template in (None, "plain")]

    def of(method: str, **knobs: Any) -> Callable[[Path], int]:
        kind = method_class(method)
        rows_field = METHODS[method].rows_field
        given = {"model": "m", rows_field: "rows.jsonl", "out": "o", **knobs}
        chosen = resolve(METHODS[method], given)

        def go(file: Path) -> int:
            loaded = load_rows(file, expect=kind.shapes, segments=chosen.compares_segments)
            for renderer in renderers:
                renderer = renderer.with_prefix(kind.answer_prefix(chosen))
                rendered = render_all(lambda row, to=renderer: kind.render(row, to, chosen), loaded.rows)
                assert len(rendered.tree_rows) + len(rendered.dropped) == len(loaded.rows)
                for tree in rendered.tree_rows:
                    assert all(len(tree.prompt_ids) + len(c.ids) <= 256 for c in tree.completions)
            return len(loaded.rows)

        return go

    def prompts(file: Path) -> int:
        loaded = load_rows(file, expect={Shape.prompts})
        for renderer in renderers:
            for row in loaded.rows:
                assert renderer.prompt_ids(row)
        return len(loaded.rows)

    def shown(file: Path) -> int:
        loaded = load_rows(file, expect=set(Shape) - {Shape.prompts})
        into = io.StringIO()
        print_rows(renderers[0], loaded.rows, 9, make_console(file=into))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", into.getvalue())
        return len(loaded.rows)

    yield {
        "sft": of("sft"),
        "dpo": of("dpo"),
        "cpl": of("dpo", loss="cpl"),
        "reward": of("reward"),
        "kto": of("kto"),
        "condition": of("condition"),
        "coh": of("coh"),
        "prompts": prompts,
        "show": shown,
    }


def held_by(go: Callable[[Path], int], file: Path) -> str:
    """ "rows", or the message of a UserError that says where; anything else is raised."""
    from lowrank_align.errors import UserError

    try:
        assert go(file) > 0
        return "rows"
    except UserError as error:
        message = str(error)
    assert "\n" not in message and "Traceback" not in message
    assert re.match(r"rows\.jsonl(:| )|no row is left of \d+ \(", message) or f"{file}: " in message, message
    return message


def explore(strategy: Any, check: Callable[[Any], None], count: int, seeded: int) -> None:
    """`count` examples; the failing one as small as can be."""
    phases = (Phase.generate, Phase.shrink)
    quiet = list(HealthCheck)

    @seed(seeded)
    @settings(
        max_examples=count, phases=phases, suppress_health_check=quiet, deadline=None, database=None, derandomize=False
    )
    @given(strategy)
    def every(example: Any) -> None:
        check(example)

    every()


def test_rows_mutated_at_random(pipelines: dict[str, Any], tally: Any, times: Any, here: Path) -> None:
    """Every mutant either gives rows, all of them, or one line with its place; no other exception."""
    file, count, seen = here / "rows.jsonl", times(150, 10_000), dict.fromkeys(["rows", "refused"], 0)

    def check(drawn: tuple[str, Any]) -> None:
        name, row = drawn
        file.write_bytes(as_bytes(row))
        seen["rows" if held_by(pipelines[name], file) == "rows" else "refused"] += 1

    try:
        explore(mutants(), check, count, seeded=7)
        held = count
    except BaseException:
        held = min(sum(seen.values()), count - 1)
        raise
    finally:
        tally(SECTION, "rows mutated at random", "rows, or one line with file and line", held=held, of=count,
              note=f"{seen['rows']:,} still rows, {seen['refused']:,} refused")  # fmt: skip
    assert min(seen.values()) > count / 20  # the mutants are neither all harmless nor all hopeless


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


def test_files_damaged_at_random(pipelines: dict[str, Any], tally: Any, times: Any, here: Path) -> None:
    """The same of the bytes of a whole file: JSON Lines, arrays, gzip and Parquet."""
    file, count = here / "rows.jsonl", times(60, 2_000)
    done = 0

    def check(content: bytes) -> None:
        nonlocal done
        file.write_bytes(content)
        held_by(pipelines["prompts"], file)
        done += 1

    try:
        explore(damaged(), check, count, seeded=8)
        done = count
    finally:
        tally(
            SECTION,
            "files of rows damaged at random",
            "rows, or one line with the file",
            held=min(done, count),
            of=count,
        )


if sys.platform == "win32":
    pytest.skip("places and modes of POSIX", allow_module_level=True)
