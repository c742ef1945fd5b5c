"""What a user can get wrong: one line on stderr, an exit code, nothing written, and no model loaded for it.

Every message is written out here as the user has to see it.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]
Change = Callable[[Path], object]

FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
GOOD = {"prompt": "Say: ", "completion": "a word"}
PAIR = {"prompt": "Say: ", "chosen": "a word", "rejected": "no"}
NEEDS_DEMONSTRATION = "needed: demonstration (messages, or prompt and completion, or text)"
NEEDS_PAIR = "needed: pair (prompt, chosen, rejected) or ranking (prompt, completions, ranks)"


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"says the {role}"} for role in roles]}


def pair(**changes: Any) -> bytes:
    return lines({**PAIR, **changes})


@pytest.fixture(autouse=True)
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with good rows, a run `old` that must survive, and the runs of `trained` to start from."""
    shutil.copytree(trained / "sft", tmp_path / "old")
    (tmp_path / "trained").symlink_to(trained)
    for name in ("demonstrations.jsonl", "pairs.jsonl"):
        shutil.copyfile(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of reward functions, beside them
    return tmp_path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_align.base import Base

    monkeypatch.setattr(Base, "load", lambda *_args, **_options: pytest.fail("the model was loaded"))


@pytest.fixture
def refused(here: Path, no_model: None, command: Command) -> Callable[..., None]:
    """`refused(code, message, *argv)`: the command ends so, with this one line, and every file is as it was."""

    def check(code: int, message: str, *argv: object) -> None:
        before = content_of(here)
        outcome = command(*argv)
        assert outcome.err == f"error: {message}\n"
        assert outcome.code == code
        assert content_of(here) == before

    return check


def content_of(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ---- rows

ROWS: dict[str, tuple[str, bytes, str]] = {
    "malformed": (
        "sft",
        lines(GOOD) + b'{"prompt": "a", \n',
        "rows.jsonl:2: not JSON: Expecting property name enclosed in double quotes (column 17)",
    ),
    "missing": (
        "dpo",
        lines(PAIR, {"prompt": "a", "chosen": "b"}),
        "rows.jsonl:2: rejected: missing (fields: prompt, chosen)",
    ),
    "misspelt": (
        "dpo",
        lines({"prompt": "a", "chosen": "b", "rejectd": "c"}),
        "rows.jsonl:1: rejected: missing (fields: prompt, chosen, rejectd) (did you mean rejectd?)",
    ),
    "several": (
        "dpo",
        lines(PAIR, {"prompt": "a", "chosen": "b"}, PAIR, [], 3),
        "rows.jsonl:2: rejected: missing (fields: prompt, chosen) (and 2 more bad rows; --skip-bad sets them aside)",
    ),
    "wrong type": (
        "sft",
        lines({"prompt": 3, "completion": "b"}),
        "rows.jsonl:1: prompt: a number, must be text or a list of messages",
    ),
    "no object": ("sft", lines("text"), "rows.jsonl:1: row: text, must be an object with fields"),
    "empty field": ("sft", lines(GOOD, {**GOOD, "completion": " \n"}), "rows.jsonl:2: completion: empty"),
    "empty turn": (
        "sft",
        lines({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}),
        "rows.jsonl:1: messages[0].content: empty",
    ),
    "NUL": (
        "reward",
        pair(rejected="a\0b"),
        "rows.jsonl:1: rejected: contains a NUL character (at character 2)",
    ),
    "half a surrogate pair": (
        "sft",
        lines({**GOOD, "prompt": "smile \ud83d"}),
        "rows.jsonl:1: prompt: contains half a surrogate pair (at character 7)",
    ),
    "equal": (
        "dpo",
        pair(rejected=PAIR["chosen"]),
        "rows.jsonl:1: rejected: the same as chosen, a pair needs two different answers",
    ),
    "prompt not shared": (
        "dpo",
        lines({"chosen": "one text", "rejected": "another"}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "turns not shared": (
        "reward",
        lines({"chosen": chat("user", "assistant")["messages"], "rejected": chat("system", "assistant")["messages"]}),
        "rows.jsonl:1: prompt: chosen and rejected share no beginning (fields: chosen, rejected)",
    ),
    "last turn the user's": (
        "sft",
        lines(chat("user", "assistant", "user")),
        "rows.jsonl:1: messages: the last turn is of role user, must be the assistant's",
    ),
    "unknown role": (
        "sft",
        lines(chat("usr", "assistant")),
        "rows.jsonl:1: messages[0].role: unknown role 'usr' (did you mean user?) "
        "(known: system, developer, user, assistant, tool)",
    ),
    "preference": (
        "reward",
        pair(preference=1.5),
        "rows.jsonl:1: preference: 1.5, must be from 0 to 1 (1: chosen surely better, 0.5: a tie)",
    ),
    "margin infinite": ("reward", pair(margin=0).replace(b"0", b"1e400"), "rows.jsonl:1: margin: inf, must be finite"),
    "margin of 400 digits": (
        "reward",
        pair(margin=10**400),
        "rows.jsonl:1: margin: a number of hundreds of digits, must be finite",
    ),
    "NaN": ("reward", pair(margin=float("nan")), "rows.jsonl:1: not JSON: NaN is not JSON"),
    "nested too deep": ("sft", b'{"prompt": ' + b"[" * 100_000 + b"\n", "rows.jsonl:1: not JSON: nested too deep"),
    "empty file": ("sft", b"", "rows.jsonl: the file is empty"),
    "blank file": ("sft", b"\n \r\n", "rows.jsonl: the file is empty"),
    "no rows": ("sft", b"[]", "rows.jsonl: no rows"),
    "not UTF-8": (
        "sft",
        lines(GOOD) + '{"prompt": "é"}\n'.encode("latin-1"),
        "rows.jsonl:2: not UTF-8 (at byte 12 of the line), save it as UTF-8",
    ),
    "UTF-16": (
        "sft",
        lines(GOOD).decode().encode("utf-16"),
        "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8",
    ),
    "CSV": (
        "sft",
        b"prompt,completion\n",
        "rows.jsonl:1: not JSON: Expecting value (column 1)",
    ),
    "pretty-printed": (
        "sft",
        json.dumps(GOOD, indent=2).encode(),
        "rows.jsonl:1: an object over several lines; rows are one object a line, or an array of objects",
    ),
    "damaged gzip": (
        "sft",
        b"\x1f\x8b\x08\0",
        "rows.jsonl: damaged gzip file (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "a pair for sft": (
        "sft",
        lines(PAIR),
        f"rows.jsonl:1: row: is of shape pair (fields: prompt, chosen, rejected), {NEEDS_DEMONSTRATION}",
    ),
    "a demonstration for dpo": (
        "dpo",
        lines(GOOD),
        f"rows.jsonl:1: row: is of shape demonstration (fields: prompt, completion), {NEEDS_PAIR}",
    ),
    "no prompt for ppo": ("ppo", lines({"text": "abc"}), "rows.jsonl:1: prompt: missing (fields: text)"),
    "all too long": (
        "sft",
        lines({**GOOD, "prompt": "a" * 999}),
        "no row is left of 1 (1: the prompt leaves no room); raise --max-length or shorten the prompts",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, refused: Callable[..., None], tiny_llama: Path) -> None:
    """Also with --overwrite: the run that is there is not removed for rows that cannot replace it."""
    method, content, message = ROWS[name]
    Path("rows.jsonl").write_bytes(content)
    rows = "--prompts" if method == "ppo" else "--data"
    reward = ("--reward", "trained/reward") if method == "ppo" else ()
    argv = (method, "--model", tiny_llama, rows, "rows.jsonl", *FEW, *reward)
    refused(2, message, *argv, "--out", "new")
    refused(2, message, *argv, "--out", "old", "--overwrite")


@pytest.mark.parametrize("name", ["malformed", "wrong type", "empty field", "not UTF-8", "last turn the user's"])
def test_rows_of_other_commands(name: str, refused: Callable[..., None], tiny_llama: Path) -> None:
    """The file that is there is not replaced either."""
    _, content, message = ROWS[name]
    Path("rows.jsonl").write_bytes(content)
    Path("old.jsonl").write_text("precious\n")
    common = ("--model", tiny_llama, "--data", "rows.jsonl")
    refused(2, message, "show", *common)
    refused(2, message, "logps", *common, "--quantize", "none", "--out", "old.jsonl", "--overwrite")
    refused(2, message, "score", *common, "--quantize", "none", "--out", "new.jsonl", "--adapter", "trained/reward")


def test_a_role_that_the_template_refuses(refused: Callable[..., None], tiny_llama: Path) -> None:
    """The plain template raises for turns of role tool; the row is named, in every command."""
    Path("rows.jsonl").write_bytes(lines(chat("tool", "assistant")))
    Path("prompts.jsonl").write_bytes(lines({"prompt": chat("user", "tool")["messages"]}))
    why = "the plain template knows user, assistant and one system turn at the beginning"
    refusal = f"the chat template refuses this conversation ({why})"
    common = ("--model", tiny_llama, "--chat-template", "plain", "--out", "new", "--quantize", "none")
    refused(2, f"rows.jsonl:1: messages: {refusal}", "sft", "--data", "rows.jsonl", *common)
    refused(2, f"rows.jsonl:1: messages: {refusal}", "logps", "--data", "rows.jsonl", *common)
    refused(2, f"prompts.jsonl:1: prompt: {refusal}", "generate", "--prompts", "prompts.jsonl", *common)
    ppo = ("ppo", "--reward", "trained/reward", "--prompts", "prompts.jsonl", "--max-new-tokens", 4)
    refused(2, f"prompts.jsonl:1: prompt: {refusal}", *ppo, *common)


def test_tools_nested_deep(refused: Callable[..., None], tiny_llama: Path) -> None:
    """Deep enough for the template's recursion, though not for the JSON reader's."""
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"a": deep}
    Path("rows.jsonl").write_bytes(lines({**chat("user", "assistant"), "tools": [deep]}))
    Path("t.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tools | tojson if tools }}")
    argv = ("sft", "--model", tiny_llama, "--data", "rows.jsonl", "--out", "new", "--chat-template", "t.jinja")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len_of_stack() + 350)
    try:
        refused(
            2,
            "rows.jsonl:1: messages: the chat template refuses this conversation (maximum recursion depth exceeded "
            "while encoding a JSON object)",
            *argv,
        )
    finally:
        sys.setrecursionlimit(limit)
