"""One measurement of this project, in a process of its own: bench_ours.py CASE FOLDER [MICRO_BATCH]; JSON on stdout."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_cases import BETA, GROUP, GRPO_BETA, LEARNING_RATE, NEW_TOKENS, PPO_EPOCHS, TOP_LAYERS, Case, result
from bench_inputs import RANK

import lowrank_align.methods.dpo
import lowrank_align.methods.grpo
import lowrank_align.methods.kto
import lowrank_align.methods.ppo
import lowrank_align.methods.reward
import lowrank_align.methods.sft  # noqa: F401 - what is imported here counts as imports
from lowrank_align.loop import Loop
from lowrank_align.memory import peak_bytes, reset_peak, resident_bytes
from lowrank_align.progress import Progress
from lowrank_align.train import train


def measure(case: Case, folder: Path, micro_batch: int) -> dict[str, Any]:
    device = torch.device("cpu")
    marks: list[float] = []
    step = Loop._step

    def timed(loop: Loop, number: int) -> dict[str, float]:
        found = step(loop, number)
        marks.append(time.perf_counter())
        return found

    Loop._step = timed
    out = Path(tempfile.mkdtemp()) / "run"
    before = resident_bytes()
    reset_peak(device)
    train(
        case.method.partition("_")[0], progress=Progress(quiet=True),
        model=str(folder / "model"), quantize=case.quantize, device="cpu",
        out=str(out), rank=RANK, batch_size=case.batch, max_steps=case.steps, micro_batch_size=micro_batch, force=True,
        learning_rate=LEARNING_RATE, lr_schedule="constant", warmup_ratio=0.0, sample_steps=0, save_steps=1000,
        seed=0, **knobs(case, folder),
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(int(line["num_tokens"]) for line in lines[1:]) if case.method == "sft_packed" else 0
    return result(case, marks, [line["loss"] for line in lines], peak_bytes(device) - before, tokens)


def knobs(case: Case, folder: Path) -> dict[str, Any]:
    rows = str(folder / f"{case.rows}.jsonl")
    if case.method == "grpo":
        return {"prompts": rows, "reward": "bench_reward:letters", "group_size": GROUP, "beta": GRPO_BETA,
                "max_new_tokens": NEW_TOKENS, "missing_eos_penalty": 0.0}  # fmt: skip
    if case.method == "ppo":
        return {"prompts": rows, "reward": str(folder / "start"), "max_new_tokens": NEW_TOKENS, "minibatches": 1,
                "ppo_epochs": PPO_EPOCHS, "missing_eos_penalty": 0.0}  # fmt: skip
    if case.method == "reward":
        return {"data": rows, "centering_coefficient": 0.0}  # as TRL by default
    if case.method == "dpo_top":
        return {"data": rows, "beta": BETA, "lora_layers": TOP_LAYERS}
    return {"data": rows, **({"beta": BETA} if case.method in ("dpo", "kto") else {})}


if __name__ == "__main__":
    wanted = Case.named(sys.argv[1])
    size = int(sys.argv[3]) if len(sys.argv) > 3 else wanted.micro_batch["ours"]
    torch.set_num_threads(wanted.threads)
    print(json.dumps(measure(wanted, Path(sys.argv[2]), size)))
