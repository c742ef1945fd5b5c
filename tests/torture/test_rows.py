"""Rows that are wrong: the catalogue, each with the line that its user sees; and rows that are only unusual."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.torture.bad_files import BAD_FILES, PLACES
from tests.torture.bad_rows import BAD_ROWS
from tests.torture.rows import GOOD, UNUSUAL, lines

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="places and modes of POSIX")

Command = Callable[..., Any]

SECTION = "Rows and settings"
FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")
BAD = BAD_FILES | BAD_ROWS


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
