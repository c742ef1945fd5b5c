"""A run that does not fit: told before anything is loaded, with what would fit; and the longest rows first."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch

from lowrank_align import preflight
from lowrank_align.config import PPOSettings, SFTSettings
from lowrank_align.errors import EnvironmentProblem
from lowrank_align.methods.metrics import Metrics
from lowrank_align.methods.sft import SFT
from lowrank_align.plan import Workload
from lowrank_align.rollout import fill_cache
from lowrank_align.trees import Completion, TreeRow, longest_rows

Run = Callable[..., Path]
MIB = 2**20

ROWS = [{"prompt": "Say: ", "completion": "word " * n} for n in (3, 30, 9, 20, 2, 25)]


def rows(*lengths: tuple[int, int]) -> list[TreeRow]:
    return [TreeRow([1] * p, [Completion([5] * c, [True] * c)], index=i) for i, (p, c) in enumerate(lengths)]


# ---- the plan of a run


def test_the_longest_rows_are_those_with_most_tokens() -> None:
    """5 + 9 = 14, 1 + 20 = 21, 10 + 1 = 11."""
    found = longest_rows(rows((5, 9), (1, 20), (10, 1)), 2)
    assert [row.index for row in found] == [1, 0]


def test_the_plan_counts_the_longest_row_of_the_data(tiny_base: Any) -> None:
    settings = SFTSettings(model="x", data="x", out="x", micro_batch_size=3)
    work = preflight.plan_run(settings, rows((5, 9), (1, 20)), tiny_base).asked
    assert (work.prompt_tokens, work.completion_tokens, work.micro_batch_size) == (1, 20, 3)
    assert (work.device, work.dtype, work.layout) == ("cpu", "fp32", "tree")


def test_ppo_counts_the_answers_that_it_will_make(tiny_base: Any) -> None:
    """Prompts have no completion; policy and value are trained, a reward function takes no adapter."""
    settings = PPOSettings(model="x", prompts="x", out="x", reward="m:f", max_new_tokens=7, batch_size=4)
    work = preflight.plan_run(settings, [TreeRow([1] * 5, [])], tiny_base).asked
    assert (work.prompt_tokens, work.completion_tokens, work.max_new_tokens) == (5, 7, 7)
    assert (work.adapters, work.trained_adapters, work.rollout_batch_size) == (2, 2, 4)
    judged = settings.model_copy(update={"reward": ["runs/reward"]})
    assert preflight.plan_run(judged, [TreeRow([1] * 5, [])], tiny_base).asked.adapters == 3


@pytest.mark.parametrize(("method", "trained", "drawn"), [("grpo", 6, 24), ("online-dpo", 2, 24), ("expert", 1, 24)])
def test_groups_count_with_the_answers_they_draw_and_those_they_learn(
    method: str, trained: int, drawn: int, tiny_base: Any
) -> None:
    """4 prompts of 6 answers: 24 rollouts at once, of which an update sees all of a prompt's, two or one."""
    from lowrank_align.config import METHODS, resolve

    given = {"model": "x", "prompts": "x", "out": "x", "reward": "m:f", "max_new_tokens": 7, "batch_size": 4}
    settings = resolve(METHODS[method], given | {"group_size": 6})
    work = preflight.plan_run(settings, [TreeRow([1] * 5, [])], tiny_base).asked
    assert (work.completions, work.completion_tokens, work.group_size) == (trained, 7, 6)
    assert work.rollout_batch_size == drawn
    shorter = preflight.rows_at([TreeRow([1] * 5, [])], work, work.max_length)
    assert shorter is not None and shorter.completions == trained


def test_an_adapter_that_is_continued_counts_with_its_own_rank(trained: Path, tiny_llama: Path) -> None:
    """The run `sft` has rank 2; DPO from it keeps a frozen copy as the reference."""
    from lowrank_align.config import DPOSettings

    settings = DPOSettings(
        model=str(tiny_llama), adapter=str(trained / "sft"), data="x", out="x", quantize="none", device="cpu"
    )
    work = preflight.plan_run(settings, rows((5, 9))).asked
    assert (work.rank, work.adapters, work.trained_adapters) == (2, 2, 1)
    assert set(work.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_shorter_length_cuts_answers_and_drops_prompts() -> None:
    """At 40 tokens a prompt of 60 is gone, and 10 + (30, 50) becomes 10 + (30, 30): 70 tokens."""
    pairs = [
        TreeRow([1] * 10, [Completion([5] * 30, [True] * 30), Completion([5] * 50, [True] * 50)]),
        TreeRow([1] * 60, [Completion([5] * 5, [True] * 5)] * 2),
    ]
    work = Workload("dpo", prompt_tokens=10, completion_tokens=40, completions=2)
    found = preflight.rows_at(pairs, work, 40)
    assert found is not None
    assert (found.prompt_tokens, found.completion_tokens, found.completions) == (10, 30, 2)
    assert (found.max_length, found.tokens) == (40, 2 * 70)
    assert preflight.rows_at(pairs, work, 10) is None


def test_rollouts_shorten_with_the_length() -> None:
    """Of 100 tokens 20 are the answer's, of 50 therefore 10: a prompt of 41 leaves no room, one of 40 does."""
    prompts = [TreeRow([1] * n, []) for n in (80, 41, 40)]
    work = Workload("ppo", prompt_tokens=80, completion_tokens=20, max_new_tokens=20)
    found = preflight.rows_at(prompts, work, 50)
    assert found is not None
    assert (found.prompt_tokens, found.completion_tokens, found.max_new_tokens) == (40, 10, 10)


def test_what_is_its_own_already_is_not_counted_as_taken(tiny_base: Any, monkeypatch: MonkeyPatch) -> None:
    """The loaded base is in the plan and in memory; asking a GPU what is free has made the context, half a GiB."""
    small_machine(monkeypatch, 1000)
    assert preflight.budget_of(torch.device("cpu")) == 1000
    assert preflight.budget_of(torch.device("cpu"), tiny_base) == 1000 + tiny_base.frozen_bytes()
    assert preflight.budget_of(torch.device("cuda")) == 1000 + 2**29


# ---- what a user sees


def small_machine(patch: MonkeyPatch, free: int) -> None:
    patch.setattr(preflight, "free_bytes", lambda device: free)


def test_every_run_prints_its_plan_in_one_line(command: Callable[..., Any], tiny_llama: Path, tmp_path: Path) -> None:
    data = write(tmp_path, ROWS)
    done = command("sft", "--model", tiny_llama, "--data", data, "--out", tmp_path / "run", *FEW)
    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("plan: "))
    assert line.startswith("plan: needs ") and "(training on cpu: " in line


def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    command: Callable[..., Any], tiny_llama: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Exit code 3, one line with the settings that fit, no folder left; they fit indeed; --force goes on without."""
    data, out = write(tmp_path, ROWS), tmp_path / "run"
    words = ["sft", "--model", tiny_llama, "--data", data, "--out", out, *FEW]
    small_machine(monkeypatch, 66 * 10**6)
    monkeypatch.setattr("lowrank_align.base.Base.load", lambda *a, **k: pytest.fail("loaded"))
    refused = command(*words, "--micro-batch-size", "8")
    assert (refused.code, out.exists()) == (3, False)
    assert len(refused.err.splitlines()) == 1
    assert "does not fit into memory: needs " in refused.err
    assert "--micro-batch-size " in refused.err and "--auto takes it, --force goes on" in refused.err
    monkeypatch.undo()


def test_auto_takes_what_fits_and_a_resumed_run_keeps_it(
    run: Run, monkeypatch: MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """The nearest fit is saved in config.yaml, so that the same command resumes, also where more is free then."""
    from lowrank_align.config import read_yaml
    from lowrank_align.errors import Stopped
    from lowrank_align.progress import Progress
    from lowrank_align.stopping import StopSignals

    class StopAt2(Progress):
        def step(self, step: int, figures: Any) -> None:
            stop.asked = "test" if step == 2 else stop.asked  # type: ignore[assignment]

    stop = StopSignals()
    knobs = {"batch_size": 6, "micro_batch_size": 6, "auto": True, "max_steps": 3}
    small_machine(monkeypatch, 66 * 10**6)
    with pytest.raises(Stopped):
        run("sft", ROWS, "run", progress=StopAt2(quiet=True), stop=stop, **knobs)
    chosen = read_yaml(tmp_path / "run" / "config.yaml")
    assert chosen["micro_batch_size"] < 6
    assert not {"auto", "gpu", "force"} & chosen.keys()
    assert "--auto takes --micro-batch-size" in capsys.readouterr().out
    small_machine(monkeypatch, 2**40)
    run("sft", ROWS, "run", resume=True, **knobs)
    again = read_yaml(tmp_path / "run" / "config.yaml")
    assert again["micro_batch_size"] == chosen["micro_batch_size"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"


def test_auto_shortens_rows_at_last(run: Run, monkeypatch: MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """A byte less than one checkpointed row of the data needs: the rows are rendered again, and cut."""
    from lowrank_align.config import read_yaml
    from lowrank_align.plan import predict

    knobs = {"max_steps": 1, "micro_batch_size": 1, "gradient_checkpointing": True}
    long = [{"prompt": "Say: ", "completion": "word " * 40}] * 2 + [{"prompt": "Say: ", "completion": "so"}]
    plans = []
    real = preflight.fit

    def noted(*arguments: Any) -> Any:
        plans.append((arguments, real(*arguments)))
        return plans[-1][1]

    monkeypatch.setattr(preflight, "fit", noted)
    run("sft", long, "whole", **knobs)
    (architecture, work, *_), _ = plans[0]
    monkeypatch.setattr("lowrank_align.plan.fitting.SHORTEST_TOKENS", 16)
    small_machine(monkeypatch, predict(architecture, work).total_bytes - base_of(run).frozen_bytes() - 1)
    run("sft", long, "run", auto=True, **knobs)
    assert read_yaml(tmp_path / "run" / "config.yaml")["max_length"] == work.max_length // 2
    assert "rows cut at max_length" in capsys.readouterr().out


def test_force_goes_on(run: Run, monkeypatch: MonkeyPatch, capsys: Any) -> None:
    small_machine(monkeypatch, 1000)
    assert (run("sft", ROWS, "run", force=True, max_steps=1) / "adapter").is_dir()
    assert "the plan says that this does not fit" in capsys.readouterr().out


def test_nothing_fits(run: Run, monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    small_machine(monkeypatch, -(2**30))
    with pytest.raises(EnvironmentProblem, match="the smallest settings need .*; take a smaller model") as refused:
        run("sft", ROWS, "run", auto=True)
    assert refused.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_gpu_names_the_memory_to_plan_for(run: Run, tmp_path: Path) -> None:
    """With 1 MiB nothing fits, whatever the machine has."""
    with pytest.raises(EnvironmentProblem, match=r"there are 1 MiB;"):
        run("sft", ROWS, "run", gpu="1MiB")


# ---- the longest rows first


def test_the_longest_rows_go_through_before_the_first_step(run: Run, monkeypatch: MonkeyPatch) -> None:
    """The first micro-batch that SFT sees are the two longest rows of six; then the steps begin. Nothing is learnt."""
    seen: list[list[int]] = []
    before = SFT.step

    def step(self: SFT, items: Any, weight: float, metrics: Metrics) -> torch.Tensor:
        seen.append([item.index for item in items])
        return before(self, items, weight, metrics)

    monkeypatch.setattr(SFT, "step", step)
    run("sft", ROWS, "run", batch_size=2, micro_batch_size=2, max_steps=1)
    assert seen[0] == [1, 5]
    assert len(seen) == 2


def test_it_leaves_the_run_as_it_was(run: Run, monkeypatch: MonkeyPatch) -> None:
    """The same bytes with it and without it, dropout included."""
    files = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(SFT, "preflight", lambda self, rows: None)
        folder = run("sft", ROWS, name, lora_dropout=0.2, micro_batch_size=2)
        files.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_out_of_memory_is_known_before_the_first_step(run: Run, monkeypatch: MonkeyPatch, capsys: Any) -> None:
    """Rows of 100 tokens and more do not fit four at once: halved in the preflight, and the steps go as they are."""
    before, tried = SFT.step, []

    def step(self: SFT, items: Any, weight: float, metrics: Metrics) -> torch.Tensor:
        tried.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return before(self, items, weight, metrics)

    monkeypatch.setattr(SFT, "step", step)
    run("sft", ROWS, "run", batch_size=4, micro_batch_size=4, max_steps=1)
    assert tried == [4, 2, 2, 2]
    assert capsys.readouterr().out.count("out of memory: micro_batch_size is now 2") == 1


def test_rollouts_are_tried_with_the_longest_prompts(run: Run, monkeypatch: MonkeyPatch) -> None:
    """Prompts of 7, 8 and 9 characters and a BOS, two rollouts at once: the two longest, answers of 5 tokens."""
    module = import_module("lowrank_align.methods.online")
    asked: list[Any] = []

    def noted(base: Any, prompts: list[list[int]], new_tokens: int) -> None:
        asked.append(([len(prompt) for prompt in prompts], new_tokens))
        fill_cache(base, prompts, new_tokens)

    monkeypatch.setattr(module, "fill_cache", noted)
    prompts = [{"prompt": "x" * n} for n in (7, 9, 8)]
    run(
        "ppo", prompts, "run", reward="lowrank_align.tiny:exact_score", max_new_tokens=5, rollout_batch_size=2,
        batch_size=3, max_steps=1,
    )  # fmt: skip
    assert asked == [([10, 9], 5)]


def test_the_cache_is_filled_to_the_last_token(tiny_base: Any, monkeypatch: MonkeyPatch) -> None:
    """Prompts of 4 and 3 tokens, 6 new ones: pieces of 4, 4 and 2 tokens make 10."""
    lengths = []
    forward = tiny_base.model.forward

    def noted(*arguments: Any, **options: Any) -> Any:
        out = forward(*arguments, **options)
        lengths.append((options["input_ids"].shape[1], out.past_key_values.get_seq_length()))
        return out

    monkeypatch.setattr(tiny_base.model, "forward", noted)
    monkeypatch.setattr("lowrank_align.rollout._last_logits", lambda base: {"logits_to_keep": 1})
    fill_cache(tiny_base, [[1, 2, 3, 4], [1, 2, 3]], 6)
    assert lengths == [(4, 4), (4, 8), (2, 10)]


FEW = ("--max-steps", "1", "--batch-size", "2", "--rank", "2", "--quantize", "none", "--sample-steps", "0")


def write(folder: Path, content: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def base_of(run: Any) -> Any:
    """The base that the fixture trains on."""
    return next(cell.cell_contents for cell in run.__closure__ if hasattr(cell.cell_contents, "frozen_bytes"))
