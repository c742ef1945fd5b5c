"""A run in several processes is the run of one: gradients, figures, adapters, files, faults and resumption."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.torture.forms import LONG
from tests.torture.herd import free_port

SECTION = "Past one GPU"
TOLERANCE = 1e-5
HERD = Path(__file__).with_name("herd.py")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the herd forks")

COMMON = [
    "--quantize",
    "none",
    "--device",
    "cpu",
    "--max-length",
    "128",
    "--batch-size",
    "5",
    "--micro-batch-size",
    "2",
]
COMMON += ["--learning-rate", "0.001", "--adam-epsilon", "1e-4", "--eval-rows", "3", "--eval-steps", "2"]
COMMON += ["--sample-steps", "2", "--sample-tokens", "4"]
ANSWERS = ["--max-new-tokens", "6", "--reward", "reward", "score:vowels", "--reward-weights", "1", "0.5"]
GROUPS = [*ANSWERS, "--group-size", "3"]
SEVERAL_UPDATES = ["--inner-epochs", "2", "--minibatches", "2", "--beta", "0.1"]
PTX = ["--pretrain-data", "demonstrations.jsonl"]
PAIRS, DEMONSTRATIONS = ["--data", "pairs.jsonl"], ["--data", "demonstrations.jsonl"]
PROMPTS = ["--prompts", "demonstrations.jsonl"]
# Every method, and with it what needs more than its own rows: a batch's z0, groups, pools, whitening, texts beside.
METHODS: dict[str, list[str]] = {
    "sft": DEMONSTRATIONS,
    "reward": [*PAIRS, "--shift-over", "reference"],
    "dpo": [*PAIRS, "--loss", "sigmoid", "nll", "--loss-weights", "1", "0.2"],
    "kto": ["--data", "thumbs.jsonl"],
    "coh": [*PAIRS, *PTX],
    "condition": PAIRS,
    "ppo": [*PROMPTS, *ANSWERS, *PTX, "--target-kl", "0.5", "--ppo-epochs", "2", "--minibatches", "2"],
    "grpo": [*PROMPTS, *GROUPS, *SEVERAL_UPDATES],
    "rloo": [*PROMPTS, *GROUPS, *SEVERAL_UPDATES],
    "online-dpo": [*PROMPTS, *GROUPS],
    "expert": [*PROMPTS, *GROUPS],
    "quark": [*PROMPTS, *ANSWERS, "--pool-steps", "1"],
}
SCORE = """
def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) / (len(text) or 1) for text in completions]

def broken(prompts, completions):
    raise ValueError("out of vowels")
"""


# ---- what the tests make of it


class Ended(NamedTuple):
    """How the processes of a run ended, what they said, and where the run lies."""

    codes: list[Any]
    errors: list[str]
    out: list[str]
    run: Path

    def gradients(self, rank: int = 0) -> dict[str, Any]:
        return load_file(f"{self.run}-{rank}.safetensors")

    def seen(self, rank: int) -> Any:
        return json.loads(Path(f"{self.run}-{rank}.json").read_text())

    def adapter(self) -> dict[str, Any]:
        files = sorted(self.run.glob("adapter/*.safetensors")) + sorted(self.run.glob("value/*.safetensors"))
        return {f"{file.parent.name}/{key}": value for file in files for key, value in load_file(file).items()}

    def samples(self) -> list[Any]:
        """The texts; a score beside them may differ in its last digits."""
        lines = [json.loads(line) for line in (self.run / "samples.jsonl").read_text().splitlines()]
        return [line.get("completion") or line.get("completions") for line in lines]

    def metrics(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ended]]:
    """`run("dpo", "name", processes=2)`: the command line in so many processes; `sft` and `reward` lie there before."""
    folder = tmp_path_factory.mktemp("herd")
    rows = [
        {"prompt": f"{i}. Say{' it' * (i % 3)}: ", "completion": f"a good word {'so ' * (i % 4)}{i}"} for i in range(11)
    ]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"bad {i}"} for i, r in enumerate(rows)]
    thumbs = [row | {"label": i % 3 > 0} for i, row in enumerate(rows)]
    for name, lines in (
        ("demonstrations", rows),
        ("pairs", pairs),
        ("thumbs", thumbs),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "score.py").write_text(SCORE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWRANK_ALIGN_CACHE": str(cache), "COLUMNS": "200"}
    child = subprocess.Popen(
        [sys.executable, str(HERD)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None and child.stdout is not None

    def train(method: str, name: str, *flags: str, processes: int = 1, **job: Any) -> Ended:
        argv = [method, "--model", str(tiny_llama), *COMMON, *METHODS.get(method, []), "--out", name]
        argv += ["--max-steps", "2", *([] if name in ("sft", "reward") else ["--adapter", "sft"]), *flags]
        said = {"faults": [], "folder": str(folder), "elsewhere": str(folder), "name": name, "processes": processes}
        said |= job
        child.stdin.write(json.dumps({"argv": argv, **said}) + "\n")
        child.stdin.flush()
        codes = json.loads(child.stdout.readline())
        texts = [
            [(folder / f"{name}-{rank}.{kind}").read_text() for rank in range(processes)] for kind in ("err", "out")
        ]
        return Ended(codes, texts[0], texts[1], folder / name)

    assert child.stdout.readline() == "ready\n"
    for method, *flags in (("sft",), ("reward", "--shift-over", "chosen")):
        first = train(method, method, "--rank", "4", "--learning-rate", "0.05", "--eval-rows", "0", *flags)
        assert first.codes == [0], first.errors
    yield train
    child.stdin.close()
    child.wait()


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between arrays of the same names."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def far_figures(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The largest difference between lines of figures, relative where they are over 1."""
    assert [line.keys() for line in one] == [line.keys() for line in other]
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs if a is not None)


# ---- the update is that of one process


@pytest.mark.parametrize("method", METHODS)
def test_several_processes_train_as_one(
    method: str, run: Callable[..., Ended], times: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    """Batches of 5 rows, so that shares differ in size; every gradient as it is before clipping."""
    if method in ("coh", "rloo", "online-dpo", "expert") and not LONG:
        pytest.skip("in the long form: its loop is that of another method here")
    alone = run(method, f"{method}-alone")
    assert alone.codes == [0], alone.errors
    assert not alone.seen(0)["group"]
    for processes in (2, 3, 4)[: times(1, 3)]:
        several = run(method, f"{method}-{processes}", processes=processes)
        assert several.codes == [0] * processes, several.errors
        updates = alone.gradients()
        apart = {key: np.abs(updates[key] - several.gradients()[key]).max() for key in updates}
        ranks_agree = all(far(several.gradients(0), several.gradients(rank)) == 0 for rank in range(processes))
        figures, adapters = far_figures(alone.metrics(), several.metrics()), far(alone.adapter(), several.adapter())
        silent = [rank for rank in range(1, processes) if not several.seen(rank)["writes"] and not several.out[rank]]
        samples = [ended.samples() for ended in (alone, several)]
        fault, kept = f"{processes} processes instead of one", sum(bool(d <= TOLERANCE) for d in apart.values())
        tally(SECTION, fault, "every update's gradient within 1e-5 of one process's", held=kept, of=len(apart))
        tally(SECTION, fault, "figures within 1e-5", held=int(figures <= TOLERANCE), of=1)
        tally(SECTION, fault, "adapter within 1e-5", held=int(adapters <= TOLERANCE), of=1)
        tally(SECTION, fault, "the others write and print nothing", held=len(silent), of=processes - 1)
        assert several.seen(0)["writes"]
        assert kept == len(apart), apart
        assert ranks_agree
        assert max(np.abs(update).max() for update in updates.values()) > 100 * TOLERANCE
        assert figures <= TOLERANCE
        assert adapters <= TOLERANCE
        assert len(silent) == processes - 1, several.out
        assert samples[0] == samples[1]


# ---- faults in one of them


def test_memory_that_runs_out_in_one(run: Callable[..., Ended], tally: Callable[..., None]) -> None:
    """The others wait for it, and take its smaller micro-batch from then on; the update is the same."""
    methods: dict[str, list[str]] = {"dpo": [], "ppo": ["--minibatches", "1"]}  # so that the second has two items
    alone = {method: run(method, f"{method}-fit", *flags) for method, flags in methods.items()}
    faults = [{"rank": 1, "step": 1, "kind": "memory"}]
    short = {m: run(m, f"{m}-memory", *flags, processes=2, faults=faults) for m, flags in methods.items()}
    good = [m for m in methods if short[m].codes == [0, 0] and far(alone[m].adapter(), short[m].adapter()) <= TOLERANCE]
    tally(SECTION, "out of memory in one process", "the same update", held=len(good), of=len(methods))
    assert good == list(methods), short
    for ended in short.values():
        assert "out of memory in another process: micro_batch_size is now 1" in ended.out[0]
        state = json.loads((ended.run / "checkpoints" / "step-2" / "state.json").read_text())
        assert state["values"]["sizes"]["micro_batch_size"] == 1


def test_numbers_that_are_not_finite_in_one(run: Callable[..., Ended], tally: Callable[..., None]) -> None:
    """All leave that step out: the adapter is that of one process with the same fault."""
    fault = {"step": 1, "kind": "nan"}
    alone = run("dpo", "dpo-nan-alone", "--max-steps", "3", faults=[{"rank": 0, **fault}])
    several = run("dpo", "dpo-nan", "--max-steps", "3", processes=2, faults=[{"rank": 1, **fault}])
    skipped = [[line["skipped"] for line in ended.metrics()] for ended in (alone, several)]
    held = several.codes == [0, 0] and skipped[0] == skipped[1] and far(alone.adapter(), several.adapter()) <= TOLERANCE
    tally(SECTION, "NaN in one process", "not stepped on by any, counted", held=int(held), of=1)
    assert skipped[1] == [1, 1, 1]
    assert held, several


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one(name: str, run: Callable[..., Ended], tally: Callable[..., None]) -> None:
    """All stop after that step, saved, with the code that says so; it is said once."""
    stopped = run("dpo", f"dpo-{name}", "--max-steps", "4", processes=2, faults=[{"rank": 1, "step": 2, "kind": name}])
    held = stopped.codes == [75, 75] and (stopped.run / "checkpoints" / "step-2" / "manifest.json").is_file()
    tally(SECTION, f"{name} to one process", "all stop at the same step, saved; exit code 75", held=int(held), of=1)
    assert held, stopped
    assert "stopped at step 2 of 4 and saved" in stopped.errors[0]
    assert stopped.errors[1] == ""


@pytest.mark.parametrize("kind", ["SIGKILL", "bug"])
@pytest.mark.parametrize("dies", [0, 1])
def test_the_end_of_one_ends_the_others(
    kind: str, dies: int, run: Callable[..., Ended], tally: Callable[..., None]
) -> None:
    """No hang, one line, and the run goes on from its last checkpoint."""
    name = f"dpo-{kind}-{dies}"
    flags = ("--max-steps", "3", "--save-steps", "1")
    ended = run("dpo", name, *flags, processes=2, faults=[{"rank": dies, "step": 3, "kind": kind}])
    own = -signal.SIGKILL if kind == "SIGKILL" else 1
    held = ended.codes == ([own, 3] if dies == 0 else [3, own])
    again = run("dpo", name, *flags, "--resume")
    goes_on = again.codes == [0] and "resumed from step-2" in again.out[0]
    fault = "a process is killed" if kind == "SIGKILL" else "a process ends with a traceback"
    tally(SECTION, fault, "the others end at once, exit code 3", held=int(held), of=1)
    tally(SECTION, fault, "--resume goes on from the last checkpoint", held=int(goes_on), of=1)
    assert held, ended
    assert "error: another process of this run has ended or is out of reach (" in ended.errors[1 - dies]
    assert goes_on, again


def test_what_is_wrong_is_said_once(run: Callable[..., Ended], tally: Callable[..., None]) -> None:
    """A mistake that all find, one that only the first can meet, and one that lies in another's files alone."""
    found = {
        "a setting": run("dpo", "wrong-a", "--data", "nowhere.jsonl", processes=2),
        "a reward function": run("expert", "wrong-b", "--reward", "reward", "score:broken", processes=2),
    }
    here = found["a setting"].run.parent
    elsewhere = here / "elsewhere"  # as another machine would have it: the same names, other rows
    elsewhere.mkdir()
    (elsewhere / "sft").symlink_to(here / "sft")
    lines = (here / "pairs.jsonl").read_text().splitlines(keepends=True)
    (elsewhere / "pairs.jsonl").write_text("".join(reversed(lines)))
    found["other rows"] = run("dpo", "wrong-c", processes=2, elsewhere=str(elsewhere))
    said = {name: "".join(ended.errors).count("error: ") for name, ended in found.items()}
    held = [name for name, ended in found.items() if ended.codes == [2, 2] and said[name] == 1]
    tally(
        SECTION, "a user's mistake", "every process ends with code 2, one line says it", held=len(held), of=len(found)
    )
    assert held == list(found), found


# ---- going on with another number of processes


@pytest.mark.parametrize("method", ["dpo", "ppo", "kto", "quark"])
def test_resumed_with_another_count(method: str, run: Callable[..., Ended], tally: Callable[..., None]) -> None:
    """One process, two, one, three, a signal after each step: the adapter of a run that was never stopped."""
    if method in ("kto", "quark") and not LONG:
        pytest.skip("only in the long form")
    whole = run(method, f"{method}-whole", "--max-steps", "4")
    for step, processes in enumerate((1, 2, 1, 3), start=1):
        flags = ["--max-steps", "4", *(["--resume"] if step > 1 else [])]
        faults = [{"rank": processes - 1, "step": step, "kind": "SIGTERM"}]
        part = run(method, f"{method}-parts", *flags, processes=processes, faults=faults)
        assert part.codes == [75 if step < 4 else 0] * processes, part.errors
    apart, figures = far(whole.adapter(), part.adapter()), far_figures(whole.metrics(), part.metrics())
    held = apart <= TOLERANCE and figures <= TOLERANCE
    promise = "adapter and figures within 1e-5 of an uninterrupted run"
    tally(SECTION, "resumed with 1, 2, 1 and 3 processes", promise, held=int(held), of=1)
    assert held, (apart, figures)


# ---- a base in 4 bits, cut up


def test_a_base_that_fsdp_shards(run: Callable[..., Ended], tally: Callable[..., None]) -> None:
    """Packed weights in floating-point tensors are the same weights; FSDP2 puts half of them into each process."""
    ended = run("shard", "sharded", processes=2)
    assert ended.codes == [0, 0], ended.errors
    for rank in range(2):
        found = ended.gradients(rank)
        kept = {name: int(found.pop(f"{name}/bytes")) for name in ("bytes", "floats", "sharded")}
        parts = {
            name: {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}
            for name in kept
        }
        stored, cut = far(parts["bytes"], parts["floats"]), far(parts["bytes"], parts["sharded"])
        promise = "the log-probs and gradients of a base in bytes"
        tally(SECTION, "4-bit weights stored as floats", promise, held=int(stored == 0), of=1)
        tally(SECTION, "such a base cut up by FSDP2", f"{promise}, within 1e-5", held=int(cut <= TOLERANCE), of=1)
        assert stored == 0
        assert cut <= TOLERANCE
        assert kept["floats"] == kept["bytes"]
        assert kept["sharded"] == kept["bytes"] / 2
        assert np.abs(parts["bytes"]["logps"]).max() > 1


# ---- the launchers themselves


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launched(
    launcher: str,
    run: Callable[..., Ended],
    tiny_llama: Path,
    cache: Path,
    tally: Callable[..., None],
) -> None:
    """The command line as docs/scaling.md has it: without GPUs too, accelerate starts several only with --multi_gpu."""
    if launcher == "torchrun" and not LONG:
        pytest.skip("only in the long form")
    alone = run("dpo", f"dpo-{launcher}-alone")
    program = Path(sys.executable).with_name(launcher)
    words = {
        "accelerate": ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no",
                       "--mixed_precision", "no", "--main_process_port", str(free_port()), "-m", "lowrank_align"],
        "torchrun": ["--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "lowrank_align"],
    }  # fmt: skip
    argv = ["dpo", "--model", str(tiny_llama), *COMMON, *METHODS["dpo"], "--adapter", "sft", "--max-steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOWRANK_ALIGN_CACHE": str(cache), "ACCELERATE_USE_CPU": "1"}
    ended = subprocess.run(
        [str(program), *words[launcher], *argv, "--out", launcher],
        cwd=alone.run.parent, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    launched = alone._replace(run=alone.run.parent / launcher)
    held = ended.returncode == 0 and far(alone.adapter(), launched.adapter()) <= TOLERANCE
    tally(SECTION, f"started by {launcher}", "the adapter of one process, within 1e-5", held=int(held), of=1)
    assert held, ended.stderr
    assert ended.stdout.count("dpo done, 2 steps") == 1


def test_other_commands_are_one_process(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = command("doctor")
    assert ended.code == 2
    assert ended.err == "error: doctor: is one process; start it without accelerate launch or torchrun\n"
