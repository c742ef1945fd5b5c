"""Reward functions of the user's own: found in the current folder, and whatever they do wrong is one line."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.alarms import HackingWatch
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import NumericError, UserError
from lowrank_align.rewards import is_function, load_function
from lowrank_align.rollout import Rollout

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


@pytest.mark.parametrize(
    ("prompt", "seen"), [("Say: ", " so\n"), ([{"role": "user", "content": "Say"}], "so")], ids=["text", "chat"]
)
def test_training_and_measuring_show_it_the_same(
    prompt: Any,
    seen: str,
    module: Callable[[str], str],
    make_method: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer of a space, "so" and a newline to a text is just that; in a conversation it is "so". GRPO shows it
    twice, best-of-n and eval once each."""
    from lowrank_align.commands import best_of
    from lowrank_align.evaluate import answers

    name = module(
        "seen = []\ndef score(prompts, completions):\n    seen.extend(completions); return [0.0] * len(prompts)"
    )
    method, items = make_method("grpo", [{"prompt": prompt}], reward=[f"{name}:score"], group_size=2, max_new_tokens=8)
    row, renderer = parse_row({"prompt": prompt}, "f:1", 0), method.renderer
    said = Rollout(items[0].prompt_ids, method.base.tokenizer(" so\n", add_special_tokens=False)["input_ids"], True)
    method.judge(items, [[said, said]], lambda call, knob: call(1))
    best_of.scores_of(method.rewards, renderer, [row], [[said]], 1)
    monkeypatch.setattr(answers, "sample", lambda *_, **__: [[said]])
    asked = [answers.Asked(row, said.prompt_ids, "Say")]
    side = answers.draw(method.base, "policy", "p", renderer, asked, max_new_tokens=8)
    assert [*sys.modules[name].seen, *side.texts] == [seen] * 4


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
        ("raise KeyError('colour')", "raised KeyError: 'colour' ({file}:2) for the prompt 'p1'", 2),
        ("return [1.0]", "gave 1 scores for 2 completions, though not for any alone (first prompt: 'p1')", 2),
        ("return [1.0] * (len(prompts) - ('p2' in prompts))", "gave 0 scores for 1 completion for the prompt 'p2'", 2),
        (
            "return [1 / (p != 'p2') for p in prompts]",
            "raised ZeroDivisionError: division by zero ({file}:2) for the prompt 'p2'",
            2,
        ),
        ("raise SystemExit", "raised SystemExit:  ({file}:2) for the prompt 'p1'", 2),
        ("return None", "returned None, which is not a list with a number for each completion, for the prompt 'p1'", 2),
        ("return [1.0, 'good']", "returned [1.0, 'good'], which is not a list with a number for each completion", 2),
        ("return [1.0, None]", "returned [1.0, None], which is not a list with a number for each completion", 2),
        ("return dict.fromkeys(prompts, 1.0)", "returned {{'p1': 1.0}}, which is not a list with a number", 2),
        (
            "return map(float, completions)",
            "raised ValueError: could not convert string to float: 'c1' for the prompt 'p1'",
            2,
        ),
        ("return [1.0, float('nan')]", "gave nan for the prompt 'p2'", 4),
        ("return [float('-inf'), 1.0]", "gave -inf for the prompt 'p1'", 4),
    ],
)
def test_what_goes_wrong_inside(body: str, message: str, exit_code: int, module: Callable[[str], str]) -> None:
    name = f"{module(function(body))}:score"
    with pytest.raises(UserError) as error:
        load_function(name)(["p1", "p2"], ["c1", "c2"])
    assert str(error.value).startswith(f"{name}: {message.format(file=name.split(':')[0] + '.py')}")
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


# ---- several rewards, and what is taken off them


def test_rewards_add_up_with_their_weights(
    module: Callable[[str], str], run: Callable[..., Path], make_method: Callable[..., Any]
) -> None:
    """Half a run's shifted score less twice the number of letters; each is measured alone too."""
    from lowrank_align.rollout import Rollout

    pairs = [{"prompt": "Say a: ", "chosen": "aaa", "rejected": "zz top"}] * 4
    reward = run("reward", pairs, "reward", max_steps=3, learning_rate=5e-3, shift_over="chosen")
    letters = f"{module(function('return [len(c) for c in completions]'))}:score"
    method, rows = make_method(
        "grpo", [{"prompt": "Say a: "}], reward=[str(reward), letters], reward_weights=[0.5, -2.0], group_size=2,
        missing_eos_penalty=0.25, length_penalty=0.125,
    )  # fmt: skip
    ids = method.base.tokenizer.encode("ab", add_special_tokens=False)
    end = method.renderer.end_ids[0]
    group = [Rollout(rows[0].prompt_ids, [*ids, end], True), Rollout(rows[0].prompt_ids, ids[:1], False)]
    judged = method.judge(rows, [group], lambda f, knob: f(2))
    by_run = []
    for rollout in group:
        from lowrank_align.methods.online import group_row

        with method.base.role("reward"):
            by_run.append(method.base.scores(method.base.collate([group_row([rollout])]), shifted=True).item())
    raw = [0.5 * by_run[0] - 2 * 2, 0.5 * by_run[1] - 2 * 1]
    assert abs(by_run[0] - by_run[1]) > 1e-3
    assert judged.raw.tolist() == pytest.approx(raw, abs=1e-5)
    assert judged.scores.tolist() == pytest.approx([raw[0] - 3 * 0.125, raw[1] - 0.125 - 0.25], abs=1e-5)
    assert method.measured[f"rewards/{letters}"] == 1.5


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"reward": ["m:f"], "reward_weights": [1.0, 2.0]}, "reward_weights: 2 for 1 rewards; give one each"),
        ({"reward": []}, "reward: empty"),
    ],
)
def test_rewards_that_do_not_fit(knobs: dict[str, Any], message: str) -> None:
    from lowrank_align.config import METHODS, resolve

    with pytest.raises(UserError, match=message):
        resolve(METHODS["grpo"], {"model": "x", "prompts": "x", "out": "x", **knobs})


# ---- reward hacking


def test_a_climb_of_all_three_is_told_once() -> None:
    """Score, KL and length rise by 1 from 10 each step: seen and said at the 12th, and not again while it goes on."""
    watch = HackingWatch()
    said = [step for step in range(1, 31) if watch.add(10 + step, 10 + step, 10 + step)]
    assert said == [12]
    assert watch.on


def test_a_new_climb_is_told_again() -> None:
    """20 steps up, 30 level, 20 up: said at the 12th; off once fewer than half of a window's pairs climb; and again."""
    watch = HackingWatch()
    heights = [*range(20), *[20] * 30, *range(20, 40)]
    assert len([step for step, height in enumerate(heights) if watch.add(*[10 + height] * 3)]) == 2


@pytest.mark.parametrize("still", [0, 1, 2])
def test_two_of_three_are_no_climb(still: int) -> None:
    watch = HackingWatch()
    for step in range(1, 31):
        figures = [10.0 + step] * 3
        figures[still] = 10.0 + step % 2
        assert not watch.add(*figures)
    assert not watch.on


def test_lengths_that_hardly_grow_are_no_climb() -> None:
    """From 100 to 104 in twelve steps: the second half is 2 % longer than the first."""
    watch = HackingWatch()
    assert not any(watch.add(step, step, 100 + step / 3) for step in range(12))


def test_a_resumed_watch_says_what_it_would_have_said() -> None:
    whole, cut = HackingWatch(), HackingWatch()
    said = [whole.add(step, step, step) for step in range(30)]
    found = [cut.add(step, step, step) for step in range(17)]
    again = HackingWatch()
    again.load_state_dict(json.loads(json.dumps(cut.state_dict())))
    assert found + [again.add(step, step, step) for step in range(17, 30)] == said


def test_a_run_that_is_paid_by_the_letter(
    module: Callable[[str], str], run: Callable[..., Path], monkeypatch: Any, capsys: Any
) -> None:
    """Every step's figures climb, whatever it learns: one line, and the metric is 1 from then on."""
    monkeypatch.setattr("lowrank_align.alarms.WINDOW", 3)
    from lowrank_align.methods.rloo import RLOO

    measure, count = RLOO.measure, itertools.count(10)

    def climbing(self: Any, judged: Any, kl: Any) -> dict[str, float]:
        n = next(count)
        names = ("objective/scores", "objective/kl", "completions/mean_length")
        return measure(self, judged, kl) | dict.fromkeys(names, float(n))

    monkeypatch.setattr(RLOO, "measure", climbing)
    name = f"{module(function('return [len(c) for c in completions]'))}:score"
    folder = run("rloo", [{"prompt": "Say: "}], "run", reward=name, max_new_tokens=3, batch_size=1, group_size=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward_hacking"] for line in lines] == [0, 0, 1, 1]
    out = capsys.readouterr().out
    assert out.count("score, KL and length have all climbed for 3 steps") == 1 and "no KL is measured" not in out


@pytest.mark.parametrize(("method", "knobs"), [("expert", {}), ("grpo", {"beta": 0.0})])
def test_where_no_kl_is_measured_a_line_says_so(
    method: str, knobs: dict[str, Any], module: Callable[[str], str], run: Callable[..., Path], capsys: Any
) -> None:
    """Once, not at every step."""
    name = f"{module(function('return [len(c) for c in completions]'))}:score"
    small = {"max_new_tokens": 3, "batch_size": 1, "group_size": 2, "max_steps": 2, **knobs}
    run(method, [{"prompt": "Say: "}], "run", reward=name, **small)
    assert capsys.readouterr().out.count("no KL is measured, so nothing watches for an exploited reward") == 1


def test_where_no_group_has_variance_a_line_says_so(
    module: Callable[[str], str], run: Callable[..., Path], capsys: Any
) -> None:
    """Once; `frac_reward_zero_std` counts on."""
    name = f"{module(function('return [1.0 for _ in prompts]'))}:score"
    small = {"max_new_tokens": 3, "batch_size": 1, "group_size": 2, "max_steps": 2, "missing_eos_penalty": 0.0}
    folder = run("grpo", [{"prompt": "Say: "}], "run", reward=name, **small)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["frac_reward_zero_std"] for line in lines] == [1, 1]
    assert capsys.readouterr().out.count("the answers of every prompt had equal scores") == 1
