"""The figure in small: two methods on the embedded base, everything cached, a stop that loses nothing."""

import hashlib
import json
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lowrank_align.apps.frontier import entries, frontier, measuring, planning, schedule, start, worker
from lowrank_align.apps.frontier.entries import PAIRED, SAMPLED, Entry
from lowrank_align.apps.frontier.planning import chosen_rates
from lowrank_align.apps.frontier.report import over_seeds, with_error
from lowrank_align.apps.frontier.tasks import Ground, Task

from lowrank_align.cli import main
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import Stopped, UserError

SMALL = ["--quantize", "none", "--workers", "1", "--seeds", "1", "--no-tune", "--pairs", "8", "--held-out", "8",
         "--max-new-tokens", "12", "--budget-tokens", "4000"]  # fmt: skip
TWO = (
    Entry("dpo", "DPO", "dpo", 1e-3, {}, PAIRED, "beta", (0.3, 0.1), 1, watched=True, warm=True),
    Entry("ppo", "PPO", "ppo", 1e-3, {"batch_size": 8, "ppo_epochs": 1}, SAMPLED, reward="learned"),
)


class FewSteps:
    """In place of tiny's preset."""

    def knobs(self, method: str) -> dict[str, Any]:
        return {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8}


@pytest.fixture
def small(tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two entries, one temperature, one reward model beside the start's; the names of what was really worked on."""
    monkeypatch.setattr(import_module("lowrank_align.plots"), "PLOTS", {})
    monkeypatch.setattr(entries, "ENTRIES", TWO)
    monkeypatch.setattr(planning, "TEMPERATURES", (0.5,))
    monkeypatch.setattr(planning, "LOOKS", 2)
    monkeypatch.setattr(planning, "BEST_OF", (1, 2))
    monkeypatch.setattr(planning, "DATA_SHARES", (0.5, 1.0))
    monkeypatch.setattr(planning, "RANKS", ())
    monkeypatch.setattr(worker, "_bases", {})
    monkeypatch.setattr(start, "read_preset", lambda name: FewSteps())
    worked: list[str] = []
    for name in ("make_start", "make_policy", "make_reward", "make_best_of"):
        monkeypatch.setattr(worker, name, _noting(getattr(worker, name), name, worked))
    return worked


def _noting(function: Any, name: str, worked: list[str]) -> Any:
    def noting(*given: Any) -> Any:
        worked.append(name)
        return function(*given)

    return noting


def test_the_figure_in_small_and_nothing_twice(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start, two DPO points, PPO, half of the pairs for a reward model, best-of-n. Killed before PPO and called again,
    the same command does what is left; a third time, nothing at all."""
    out = tmp_path / "figure"
    command = ["frontier", *SMALL, "--out", str(out)]
    broken = worker.make_policy

    def until_ppo(world: Any, task: Task, *others: Any) -> Any:
        if task.spec["method"] == "ppo":
            raise Stopped("as a signal would")
        return broken(world, task, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "make_policy", until_ppo)
        assert main(command) == 75
    assert "stopped after 4 of 6; the same command goes on" in capsys.readouterr().err
    assert small == ["make_start", "make_best_of", "make_policy", "make_policy"]
    small.clear()
    assert main(command) == 0
    assert small == ["make_policy", "make_reward"]
    assert "4 of 6 were there from before" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    _check(report)
    page = (out / "report.md").read_text()
    assert "| DPO, beta 0.1 |" in page
    assert "Learning rates were not tuned" in page
    for name in ("frontier", "temperature", "steps", "reward"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({name}.png)" in page
    small.clear()
    assert main(command) == 0
    assert small == []
    again = json.loads((out / "report.json").read_text())
    assert again["entries"] == report["entries"]


def _check(report: dict[str, Any]) -> None:
    assert report["missing"] == report["failed"] == []
    points = {name: entry["points"] for name, entry in report["entries"].items()}
    assert [p["value"] for p in points["dpo"]] == [0.3, 0.1]
    assert len(points["ppo"]) == 1
    for point in (*points["dpo"], *points["ppo"]):
        assert -4 <= point["score"]["mean"] <= 3
        assert point["score"]["sd"] is None
        assert 0 < point["spent"]["total"] <= 1.5 * 4000  # by steps that were planned with the mean length of the pairs
        assert point["spent"]["generated"] > 0
    looks = points["dpo"][1]["way"]
    assert [look["share_of_steps"] for look in looks] == sorted(look["share_of_steps"] for look in looks)
    assert looks[-1]["share_of_steps"] == 1
    # the last checkpoint is the run's adapter, asked the same prompts with the same seed
    assert looks[-1]["score"] == points["dpo"][1]["score"]
    assert looks[-1]["kl"]["mean"] == pytest.approx(points["dpo"][1]["kl"]["mean"], abs=1e-6)
    assert [t["temperature"] for t in points["dpo"][1]["temperatures"]] == [0.5]
    assert [b["n"] for b in report["best_of_n"]] == [1, 2]
    assert report["best_of_n"][0]["kl"]["mean"] == 0
    assert [d["share"] for d in report["rewards"]["data"]] == [0.5, 1.0]


def test_a_method_that_breaks_costs_only_itself(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report names it; where nothing is left to report, the first reason is the command's error."""
    monkeypatch.setattr(worker, "make_policy", lambda *given: 1 / 0)
    out = tmp_path / "figure"
    assert main(["frontier", *SMALL, "--out", str(out), "--only", "dpo", "best_of_n"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert [f["failed"] for f in report["failed"]] == ["ZeroDivisionError: division by zero"] * 2
    assert main(["frontier", *SMALL, "--out", str(out), "--only", "dpo"]) == 2
    assert "ZeroDivisionError: division by zero (and 1 others failed" in capsys.readouterr().err


def test_best_of_a_few_by_hand(tiny_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts with three answers each. Of the first 2 the learned score likes answers 1 and 0, of all 3 answers 1
    and 2; their exact scores are 5 and 1, then 5 and 3. KL of n = 2: ln 2 - 1/2; of n = 3: ln 3 - 2/3. Against scores
    of 4 and 3: one win of two, then one win and a tie."""
    exact, learned = [0.0, 5.0, 2.0, 1.0, 9.0, 3.0], [1.0, 2.0, 1.5, 0.5, 0.1, 0.9]
    drawn = measuring.Answered([type("R", (), {"ids": [0] * 4})()] * 6, [""] * 6, exact)  # type: ignore[list-item]
    monkeypatch.setattr(measuring, "answers", lambda *given, **named: drawn)
    monkeypatch.setattr(measuring, "reward_scores", lambda *given: learned)
    world: Any = type("W", (), {"base": tiny_base})()
    two, three = measuring.best_of(world, [None, None], [4.0, 3.0], [2, 3])  # type: ignore[list-item]
    assert (two["score"], two["learned"], two["wins"], two["tokens"]) == (3.0, 1.25, 0.5, 8.0)
    assert (three["score"], three["wins"]) == (4.0, 0.75)
    assert two["kl"] == pytest.approx(math.log(2) - 1 / 2)
    assert three["kl"] == pytest.approx(math.log(3) - 2 / 3)


def test_what_decides_a_training_is_in_its_key() -> None:
    """Seed, settings, budget and start change it; the same things give the same one."""
    ground = Ground("m", "w", "none", "cpu", None, "a:b", None, None, {}, 100, 8, 8, 4, (1.0,), 2)
    task = Task("policy", "dpo", 0, {"method": "dpo", "knobs": {"beta": 0.1}}, "start")
    others = [
        Task("policy", "dpo", 1, task.spec, "start"),
        Task("policy", "dpo", 0, {"method": "dpo", "knobs": {"beta": 0.2}}, "start"),
        Task("policy", "dpo", 0, task.spec, "another"),
    ]
    again = Task("policy", "another name", 0, {"knobs": {"beta": 0.1}, "method": "dpo"}, "start")
    keys = [other.key(ground) for other in others]
    richer = Ground("m", "w", "none", "cpu", None, "a:b", None, None, {}, 101, 8, 8, 4, (1.0,), 2)
    assert again.key(ground) == task.key(ground)
    assert len({task.key(ground), task.key(richer), *keys}) == 5


def test_every_source_that_trains_is_in_the_key() -> None:
    """What decides numbers is hashed unless it is named as deciding none; a hash is of something that is there."""
    from lowrank_align.apps.frontier.tasks import OF_THE_FIGURE, SHARED_METHODS, source_sha256, sources

    assert {"config", "data", "objectives", "tiny", "train.py", "pairs.py", "adapters.py", "evaluate"} <= set(sources())
    nothing = hashlib.sha256(b"").hexdigest()
    assert nothing not in [source_sha256(name) for name in (*sources(), *SHARED_METHODS, *OF_THE_FIGURE)]


def test_no_demonstration_is_about_a_held_out_prompt(tmp_path: Path) -> None:
    """Of three rows the second asks the held-out question, the third is a conversation that does."""
    from lowrank_align.apps.frontier.start import Prompts, _demonstrations

    from lowrank_align.data.formats import parse_row

    question = [{"role": "user", "content": "Go on."}]
    rows = [
        {"prompt": "Say: ", "completion": "a"},
        {"prompt": question, "completion": [{"role": "assistant", "content": "b"}]},
        {"messages": [*question, {"role": "assistant", "content": "c"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = Prompts([], [], [parse_row({"prompt": question}, "p", 0)])
    world = SimpleNamespace(ground=SimpleNamespace(demonstrations=str(file)), seed=0)
    kept, left_out = _demonstrations(world, held_out)
    assert (kept, left_out) == ([{"prompt": "Say: ", "completion": "a"}], 2)


def test_the_learning_rate_with_the_best_validation_score() -> None:
    tried: dict[tuple[str, float], dict[str, Any]] = {
        ("a", 0.3): {"validation": {"score": 1.0}},
        ("a", 1.0): {"validation": {"score": 2.0}},
        ("a", 3.0): {"failed": "not finite"},
        ("b", 1.0): {"failed": "not finite"},
    }
    assert chosen_rates(tried) == {"a": 1.0}


def test_over_seeds() -> None:
    """1 and 3: mean 2, deviation sqrt(((-1)^2 + 1^2) / 1) = 1.414; one seed has no deviation."""
    assert over_seeds([1.0, 3.0]) == {"mean": 2.0, "sd": pytest.approx(math.sqrt(2)), "seeds": 2}
    assert with_error(over_seeds([1.0, 3.0])) == "2.00 ± 1.41"
    assert with_error(over_seeds([5.0])) == "5.00"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m"], "m needs --score module:function"),
        (["--prompts", "p.jsonl"], "prompts: needs --demonstrations too"),
        (["--score", "nonsense"], "score: nonsense: not a module:function"),
        (["--score", "lowrank_align.tiny:exact_scor"], "no function exact_scor (did you mean exact_score?)"),
        (["--only", "pp"], "only: pp: no such entry (did you mean ppo?)"),
        (["--preset", "nowhere"], "preset nowhere: there is none of that name"),
        (["--seeds", "0"], "seeds: "),
    ],
)
def test_a_users_mistakes(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", *flags, "--out", str(tmp_path / "figure")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "figure").exists()


def test_a_folder_that_no_frontier_wrote_is_left_alone(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert main(["frontier", *SMALL, "--out", str(tmp_path)]) == 2
    assert "no frontier wrote" in capsys.readouterr().err


def test_links_in_a_frontiers_folder_are_refused(tmp_path: Path) -> None:
    """Its mark is written anew at each start."""
    (tmp_path / "precious.txt").write_text("ours")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / frontier.MARKER).symlink_to(tmp_path / "precious.txt")
    with pytest.raises(UserError, match="a link or device, not written through"):
        frontier._take(tmp_path / "out")
    assert (tmp_path / "precious.txt").read_text() == "ours"


def test_what_is_left_is_told_in_time() -> None:
    assert [schedule.minutes(seconds) for seconds in (5.4, 99.0, 130.0)] == ["5 s", "99 s", "2 min"]


def test_prompts_that_end_alike_are_different_prompts(tiny_base: Any) -> None:
    """Two conversations with the same last message, one of them twice: two prompts."""
    cat, dog = ([{"role": "user", "content": text} for text in (of, "Go on.")] for of in ("Of cats.", "Of dogs."))
    rows = [parse_row({"prompt": prompt}, "f:1", i) for i, prompt in enumerate((cat, dog, cat))]
    ground: Any = type("G", (), {"max_new_tokens": 4})()
    world = start.World(tiny_base, ground, 0, lambda *_: [], Renderer(tiny_base.tokenizer, max_length=256))
    assert [row.prompt for row in world._fitting(rows)] == [cat, dog]
