"""Ours beside TRL: the same rows, weights, LoRA, precision, lengths and effective batch. Usually by `make bench`.

    python benchmarks/bench.py --data ../shared/data --peers .venv-peers
    python benchmarks/bench.py ... --only dpo --repeats 1   # a part of it, once
    python benchmarks/bench.py ... --save cpu               # also writes results/bench_cpu.json and docs/benchmarks.md

Every measurement is a process of its own, ours and theirs in turn (A B A B); figures are medians. The first step warms
up and is not counted. Peak memory is peak RSS minus RSS after imports.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_cases import Case, cases
from bench_inputs import RANK, make_inputs

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARK = "<!-- what follows until the next mark is written by benchmarks/bench.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="LLaMA-Factory's data folder")
    parser.add_argument("--peers", type=Path, required=True, help="the environment that has TRL")
    parser.add_argument("--only", default="", help="part of a case's name, as dpo or none-2")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    arguments.peers = arguments.peers.absolute()
    wanted = [case for case in cases() if arguments.only in case.name]
    if not wanted:
        sys.exit(f"--only {arguments.only}: no such case; there are {', '.join(case.name for case in cases())}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(arguments.data, folder)
        report = {
            "hardware": hardware(), "versions": versions(arguments.peers), "date": f"{datetime.date.today()}",
            "gemm_gflops": {threads: gemm_rate(threads) for threads in sorted({case.threads for case in wanted})},
            "cases": [],
        }  # fmt: skip
        for case in wanted:
            row = compare(case, folder, arguments.peers, arguments.repeats, report["gemm_gflops"][case.threads])
            report["cases"].append(row)
            print(lines([row])[-1], flush=True)
    print("\n".join(["", *lines(report["cases"])]))
    if arguments.save:
        path = HERE / "results" / f"bench_{arguments.save}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        write_page(report)


def compare(case: Case, folder: Path, peers: Path, repeats: int, gflops: float) -> dict[str, Any]:
    """Both sides in turn; medians, ratios, the fraction of the floor, and how far the losses are apart."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        found["ours"].append(measured(case, folder, Path(sys.executable), "ours"))
        found["theirs"].append(measured(case, folder, peers / "bin" / "python", "theirs"))
    middle = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "per_second", "peak_bytes")}
        for side, runs in found.items()
    }
    tokens, flops = work(case, folder)
    apart = [abs(a - b) for a, b in zip(found["ours"][0]["losses"], found["theirs"][0]["losses"], strict=False)]
    return {
        "case": case.name, "unit": case.unit, "micro_batch": case.micro_batch, "batch": case.batch, "steps": case.steps,
        **middle, "runs": found, "faster": middle["ours"]["per_second"] / middle["theirs"]["per_second"],
        "memory": middle["ours"]["peak_bytes"] / middle["theirs"]["peak_bytes"],
        "tokens_per_second": tokens / middle["ours"]["seconds"] if tokens else None,
        "of_floor": flops / (gflops * 1e9) / middle["ours"]["seconds"] if flops else None,
        "losses_apart": max(apart) if apart and case.method in ("dpo", "reward", "sft") else None,
    }  # fmt: skip


def measured(case: Case, folder: Path, python: Path, side: str) -> dict[str, Any]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(case.threads), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if side == "theirs" and case.method == "ppo":
        environment["PYTHONPATH"] = str(python.parents[1] / "trl-ppo")
        environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
    began = time.monotonic()
    child = subprocess.run(
        [python, HERE / f"bench_{side}.py", case.name, folder],
        env=environment,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        sys.exit(f"{case.name}, {side}: exit code {child.returncode}\n{child.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    print(f"  {case.name} {side}: {found['per_second']:.3g} {case.unit}/s, {found['peak_bytes'] / 1e6:.0f} MB "
          f"({time.monotonic() - began:.0f} s with imports)", file=sys.stderr, flush=True)  # fmt: skip
    return found


# ---- the floor


def work(case: Case, folder: Path) -> tuple[int, float]:
    """Tokens (P + C + R) and least FLOPs of the counted steps of methods that do not sample; 0 for the others.

    A pass is 2 FLOPs a weight and token; the gradient of a frozen layer's input another, of an adapter's weights too.
    Attention counts the scores that are not masked, the head completion tokens alone.
    """
    if case.method in ("dpo_top", "kto", "grpo", "ppo"):
        return 0, 0.0
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(folder / "model"), AutoConfig.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / f"{case.rows}.jsonl").read_text().splitlines()]
    order = json.loads((folder / "order.json").read_text())[case.rows]
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linear, adapter = layers * (4 * h * h + 3 * h * i), layers * RANK * (4 * 2 * h + 3 * (h + i))
    scored, frozen = {"dpo": (True, 1), "sft": (True, 0), "sft_packed": (True, 0), "reward": (False, 0)}[case.method]
    tokens, flops = 0, 0.0
    for row in (rows[i] for i in order[case.batch : case.batch * case.steps]):
        prompt, *answers = (len(tokenizer(text)["input_ids"]) for text in row.values())
        answers = [n + 1 for n in answers]  # the end token
        here = prompt + sum(answers)
        scores = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in answers)
        tokens += here
        flops += here * (2 * linear * (2 + frozen) + 2 * adapter * 3)
        flops += 4 * h * layers * scores * (3 + frozen)
        flops += 2 * config.vocab_size * h * sum(answers) * (2 + frozen) * scored
    return tokens, flops


def gemm_rate(threads: int) -> float:
    """GFLOP/s of fp32 products of the model's shapes, the best of some."""
    import torch

    torch.set_num_threads(threads)
    x, weight = torch.randn(1024, 384), torch.randn(1024, 384)
    best = math.inf
    for _ in range(50):
        began = time.perf_counter()
        x @ weight.T
        best = min(best, time.perf_counter() - began)
    return 2 * 1024 * 384 * 1024 / best / 1e9


# ---- what is printed and kept


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table in markdown."""
    table = [
        "| method, base, threads | ours | TRL | ratio | our memory | TRL's | ratio | of the floor | losses apart |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        method, quantize, threads = row["case"].rsplit("-", 2)
        ours, theirs = row["ours"], row["theirs"]
        floor = "" if row["of_floor"] is None else f"{row['of_floor']:.0%}"
        apart = "" if row["losses_apart"] is None else f"{row['losses_apart']:.1e}"
        table.append(
            f"| {method}, {quantize}, {threads} | {ours['per_second']:.2f} {row['unit']}/s "
            f"| {theirs['per_second']:.2f} "
            f"| **{row['faster']:.2f}** | {ours['peak_bytes'] / 1e6:.0f} MB | {theirs['peak_bytes'] / 1e6:.0f} MB "
            f"| **{row['memory']:.2f}** | {floor} | {apart} |"
        )
    return table


def write_page(report: dict[str, Any]) -> None:
    """Put the table between the page's two marks."""
    rates = ", ".join(f"{rate:.0f} GFLOP/s with {threads}" for threads, rate in report["gemm_gflops"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    facts = f"{report['date']}, {report['hardware']}; fp32 products of the model's shapes: {rates} threads. {versions}."
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text("\n".join([before + MARK, facts, "", *lines(report["cases"]), "", MARK + after]))


def hardware() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16") if kind in text]
    return f"{name[1] if name else platform.processor()}, {os.cpu_count()} cores, {' '.join(kinds)}"


def versions(peers: Path) -> dict[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "trl")
    code = f"from importlib.metadata import version; print(*(version(n) for n in {names!r}))"
    found = subprocess.run([peers / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, found.stdout.split(), strict=True)) | {"trl for PPO": "1.12.0"}


if __name__ == "__main__":
    main()
