"""Reward functions of the user's own: found in the current folder, and whatever they do wrong is one line."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import NumericError, UserError
from lowrank_align.rewards import is_function, load_function

MODULES = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`module(source)`: the name of a new module in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])

    def write(source: str) -> str:
        name = f"own_rewards_{next(MODULES)}"  # Python imports a name once, wherever its file is
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def function(body: str) -> str:
    return f"def score(prompts, completions):\n    {body}\n"


@pytest.mark.parametrize("name", ["rewards:score", "package.rewards:score", "_r1:_s2"])
def test_a_function(name: str) -> None:
    assert is_function(name)


@pytest.mark.parametrize(
    "name", ["runs/reward", "reward", "C:\\runs\\reward", "C:/runs/reward", "a:b:c", ":f", "m:", "m:1"]
)
def test_no_function(name: str) -> None:
    """A run's folder, also on Windows."""
    assert not is_function(name)


def test_found_in_the_current_folder(module: Callable[[str], str]) -> None:
    name = module(function("return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]"))
    assert load_function(f"{name}:score")(["ab", "abc"], ["x", "yz"]) == [12.0, 23.0]


def test_found_in_a_package(module: Callable[[str], str], tmp_path: Path) -> None:
    name = module(function("return [1] * len(prompts)"))
    package = tmp_path / f"package_{name}"
    package.mkdir()
    (tmp_path / f"{name}.py").rename(package / "inner.py")
    assert load_function(f"{package.name}.inner:score")(["p"], ["c"]) == [1.0]


def test_it_may_return_numbers_of_any_kind(module: Callable[[str], str]) -> None:
    import numpy as np
    import torch

    for body, kind in (("return np.arange(2)", "numpy as np"), ("return torch.tensor([0, 1.])", "torch")):
        score = load_function(f"{module(f'import {kind}' + chr(10) + function(body))}:score")
        assert score(["p", "q"], ["c", "d"]) == [0.0, 1.0]
    assert np and torch


def test_it_cannot_change_what_it_is_given(module: Callable[[str], str]) -> None:
    name = module(function("prompts.clear(); completions[0] = ''; return [1.0]"))
    prompts, completions = ["p"], ["c"]
    load_function(f"{name}:score")(prompts, completions)
    assert (prompts, completions) == (["p"], ["c"])


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "score", "no module {m} in the current folder or the environment"),
        ("import no_such_library_here", "score", "its module imports no_such_library_here, which is not installed"),
        ("1 / 0", "score", "importing {m} failed: ZeroDivisionError: division by zero"),
        ("def score(:", "score", "importing {m} failed: SyntaxError"),
        (function("return []"), "scores", "module {m} has no function scores (did you mean score?)"),
        ("score = 3", "score", "module {m} has no function score"),
    ],
)
def test_what_cannot_be_loaded(source: str | None, name: str, message: str, module: Callable[[str], str]) -> None:
    name_of_module = module(source) if source is not None else "no_such_module_anywhere"
    with pytest.raises(UserError) as error:
        load_function(f"{name_of_module}:{name}")
    text = str(error.value)
    assert text.startswith(f"{name_of_module}:{name}: {message.format(m=name_of_module)}")
    assert error.value.exit_code == 2
    assert "\n" not in text


@pytest.mark.parametrize(
    ("body", "message", "exit_code"),
    [
        ("raise KeyError('colour')", "raised KeyError: 'colour' for the prompt 'p1'", 2),
        ("return [1.0]", "gave 1 scores for 2 completions, though not for any alone (first prompt: 'p1')", 2),
        ("return [1.0] * (len(prompts) - ('p2' in prompts))", "gave 0 scores for 1 completion for the prompt 'p2'", 2),
        (
            "return [1 / (p != 'p2') for p in prompts]",
            "raised ZeroDivisionError: division by zero for the prompt 'p2'",
            2,
        ),
        ("return None", "raised TypeError: 'NoneType' object is not iterable", 2),
        ("return [1.0, 'good']", "raised ValueError: could not convert string to float: 'good'", 2),
        ("return [1.0, None]", "raised TypeError: float() argument must be", 2),
        ("return [1.0, float('nan')]", "gave nan for the prompt 'p2'", 4),
        ("return [float('-inf'), 1.0]", "gave -inf for the prompt 'p1'", 4),
    ],
)
def test_what_goes_wrong_inside(body: str, message: str, exit_code: int, module: Callable[[str], str]) -> None:
    name = f"{module(function(body))}:score"
    with pytest.raises(UserError) as error:
        load_function(name)(["p1", "p2"], ["c1", "c2"])
    assert str(error.value).startswith(f"{name}: {message}")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == exit_code
    assert isinstance(error.value, NumericError) == (exit_code == 4)


@pytest.mark.parametrize(
    ("body", "exit_code", "message"),
    [
        ("raise KeyError('colour')", 2, "raised KeyError: 'colour'"),
        ("raise ValueError('one\\ntwo')", 2, "raised ValueError: one two"),
        ("return [0.5]", 2, "gave 1 scores for 2 completions"),
        ("return [float('nan')] * len(prompts)", 4, "gave nan for the prompt 'Say it: '"),
    ],
)
def test_on_the_command_line(
    body: str, exit_code: int, message: str, module: Callable[[str], str], tiny_llama: Path, capsys: Any
) -> None:
    """One line, no traceback, the right exit code; the run can be taken up again when the function is mended."""
    from lowrank_align.cli import main

    Path("prompts.jsonl").write_text(json.dumps({"prompt": "Say it: "}) + "\n")
    command = ["ppo", "--model", str(tiny_llama), "--quantize", "none", "--prompts", "prompts.jsonl", "--out", "run"]
    command += ["--batch-size", "2", "--max-steps", "1", "--max-new-tokens", "3", "--rank", "2"]
    assert main([*command, "--reward", f"{module(function(body))}:score"]) == exit_code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("error: own_rewards_")
    assert message in line


def test_checked_before_the_model_loads(tiny_llama: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from lowrank_align.base import Base
    from lowrank_align.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Base, "load", lambda *_a, **_k: pytest.fail("the model was loaded"))
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "Say it: "}) + "\n")
    command = ["ppo", "--model", str(tiny_llama), "--prompts", "prompts.jsonl", "--out", "run"]
    assert main([*command, "--reward", "no_such_module_anywhere:score"]) == 2
    assert "no module no_such_module_anywhere" in capsys.readouterr().err
    assert not Path("run").exists()
