"""What fits a card of so many GiB, and how fast: models of real shapes with random weights. Needs a CUDA GPU.

    python benchmarks/bench_gpu.py --save h100                         # 1B, 3B and 8B under caps of 6 to 24 GiB
    python benchmarks/bench_gpu.py --presets llama-3.1-8b --caps 12    # a part of it
    python benchmarks/bench_gpu.py --presets smollm2-135m --device cpu --caps 0    # the same path without a GPU

Shapes are the presets' figures; nothing is downloaded, the random weights are written once to a temporary folder and
quantised to NF4 on loading, as a user's are. A cap is `torch.cuda.set_per_process_memory_fraction`: it proves what fits
a small card, not how fast that card would be. Each measurement is a process of its own; the first step warms up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory_inputs import write_words

RESULTS = Path(__file__).parent / "results"
PRESETS, CAPS_GIB = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"), (6, 8, 12, 16, 24, 0)
LENGTHS = ((512, 512), (1024, 256))  # of a prompt and each of its two answers
NEW_TOKENS, BATCH, STEPS = 128, 4, 3
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--caps", nargs="+", type=float, default=CAPS_GIB, metavar="GIB", help="0: the whole card")
    parser.add_argument("--methods", nargs="+", default=["dpo", "ppo"])
    parser.add_argument("--lengths", nargs="+", default=[f"{p}+{c}" for p, c in LENGTHS], metavar="P+C")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/gpu_NAME.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        for preset in arguments.presets:
            folder = Path(name) / preset
            make_model(preset, folder / "model")
            for length in arguments.lengths:
                prompt, answer = map(int, length.split("+"))
                write_rows(folder, prompt, answer)
                for method in ("reward", *arguments.methods):  # a reward run first: PPO needs one
                    for cap in arguments.caps if method != "reward" else (0,):
                        found.append(apart(preset, folder, method, (prompt, answer), cap, arguments.device))
                        print(line(found[-1]), flush=True)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"gpu_{arguments.save}.json").write_text(json.dumps(found, indent=2) + "\n")


def apart(preset: str, folder: Path, method: str, length: tuple[int, int], cap: float, device: str) -> dict[str, Any]:
    """One measurement in a process of its own; what did not fit says so in `error`."""
    prompt, answer = length
    asked = {"folder": str(folder), "method": method, "prompt": prompt, "answer": answer, "cap": cap, "device": device}
    child = subprocess.run([sys.executable, __file__, "--one", json.dumps(asked)], capture_output=True, text=True)
    result = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else {}
    error = "" if child.returncode == 0 else (child.stderr.strip().splitlines() or ["?"])[-1]
    return {
        "preset": preset,
        "method": method,
        "prompt": prompt,
        "answer": answer,
        "cap_gib": cap,
        "error": error,
    } | result


def measure(*, folder: str, method: str, prompt: int, answer: int, cap: float, device: str) -> dict[str, Any]:
    """Train for a few steps at micro-batch 1 with recomputation, as one would on a small card."""
    import torch

    from lowrank_align import preflight
    from lowrank_align.loop import Loop
    from lowrank_align.memory import peak_bytes, reset_peak
    from lowrank_align.progress import Progress
    from lowrank_align.train import train

    where = torch.device(device)
    name = "CPU"
    if where.type == "cuda":
        name, whole = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / whole) if cap else 1.0)
    marks, plans, step, plan_run = [], [], Loop._step, preflight.plan_run

    def timed(loop: Loop, number: int) -> dict[str, float]:
        figures = step(loop, number)
        if where.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return figures

    def noted(*given: Any) -> Any:
        plans.append(plan_run(*given))
        return plans[-1]

    Loop._step, preflight.plan_run = timed, noted  # type: ignore[method-assign, assignment]
    rows = {"data": f"{folder}/pairs.jsonl"}
    if method == "ppo":
        rows = {"prompts": f"{folder}/pairs.jsonl", "reward": f"{folder}/reward"}
        rows |= {"max_new_tokens": NEW_TOKENS, "rollout_batch_size": BATCH, "ppo_epochs": 1, "minibatches": 1}  # type: ignore[dict-item]
    reset_peak(where)
    train(
        method,
        progress=Progress(quiet=True),
        model=f"{folder}/model",
        out=f"{folder}/{'reward' if method == 'reward' else 'run'}",
        overwrite=True,
        device=device,
        gradient_checkpointing=True,
        micro_batch_size=1,
        batch_size=BATCH,
        max_steps=STEPS,
        max_length=2 * (prompt + answer) + NEW_TOKENS,
        sample_steps=0,
        force=True,
        **rows,
    )
    seconds = statistics.median(later - earlier for earlier, later in zip(marks, marks[1:], strict=False))
    tokens = BATCH * (prompt + (NEW_TOKENS if method == "ppo" else 2 * answer))
    return {
        "device": name, "torch": torch.__version__, "seconds_a_step": seconds, "tokens_per_second": tokens / seconds,
        "peak_gib": peak_bytes(where) / GIB, "planned_gib": plans[0].prediction.total_bytes / GIB,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    card = f"{row['cap_gib']:g} GiB" if row["cap_gib"] else "all"
    what = f"{row['preset']:<14} {row['method']:<7} {row['prompt']} + {row['answer']:<5} {card:>7}  "
    if row["error"]:
        return f"{what}does not fit: {row['error'][:90]}"
    return (f"{what}{row['tokens_per_second']:9,.0f} tokens/s  peak {row['peak_gib']:.2f} GiB, "
            f"planned {row['planned_gib']:.2f}")  # fmt: skip


def make_model(preset: str, folder: Path) -> None:
    """Random 16-bit weights in the preset's shape, and a tokenizer of one token a word."""
    import torch
    from memory_inputs import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowrank_align.presets import read_preset

    figures = read_preset(preset).architecture
    if figures is None:
        sys.exit(f"--presets {preset}: has no figures of a model")
    write_tokenizer(folder, figures.vocab_size)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings")  # fmt: skip
    shape = {name: getattr(figures, name) for name in names} | figures.config
    config = AutoConfig.for_model(figures.model_type, **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_rows(folder: Path, prompt: int, answer: int) -> None:
    write_words(folder / "pairs.jsonl", rows=2 * BATCH, prompt=prompt, answers=2, answer=answer)


if __name__ == "__main__":
    main()
