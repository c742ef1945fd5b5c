"""Peak memory as planned and as measured, every method in a process of its own; also PPO's peak beside SFT's.

    python benchmarks/plan_measured.py                    # every method, NF4 and unquantised, several batches
    python benchmarks/plan_measured.py --only nf4-8       # the cases whose name holds this

On a machine without a GPU, measured is peak RSS minus RSS after imports; with one, `torch.cuda.max_memory_allocated`.
Processes are forked from one that has imported everything but touched no GPU. Results go to benchmarks/results/.
"""

import argparse
import json
import multiprocessing
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from memory_inputs import knobs, make_inputs

METHODS = ("reward", "sft", "dpo", "ppo")  # the reward run first: PPO needs one
STEPS, BATCH = 2, 8
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/plan_NAME.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        found = [measure_apart(case, folder) for case in cases(arguments.only)]
    for row in found:
        print(
            f"{row['name']:<24} measured {row['measured'] / 1e6:7.1f} MB  planned {row['planned'] / 1e6:7.1f} MB  "
            f"ratio {row['planned'] / row['measured']:.3f}"
        )
    peaks = {row["name"]: row["measured"] for row in found}
    for quantize in ("nf4", "none"):
        if {f"sft-{quantize}-8", f"ppo-{quantize}-8"} <= peaks.keys():
            ratio = peaks[f"ppo-{quantize}-8"] / peaks[f"sft-{quantize}-8"]
            print(f"PPO / SFT, {quantize}: {ratio:.2f} (target: at most 1.25)")
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"plan_{arguments.save}.json").write_text(json.dumps(found, indent=2) + "\n")


def cases(only: str = "") -> list[dict[str, Any]]:
    """method-quantize-rows, with -c where activations are recomputed."""
    found = []
    for quantize, (rows, checkpointing), method in product(
        ("nf4", "none"), ((8, False), (2, False), (8, True)), METHODS
    ):
        name = f"{method}-{quantize}-{rows}{'-c' * checkpointing}"
        if only in name or (method == "reward" and not only):
            found.append({"name": name, "method": method, "quantize": quantize, "rows": rows, "ck": checkpointing})
    if only and not any(case["method"] == "reward" for case in found) and any(c["method"] == "ppo" for c in found):
        found.insert(0, {"name": "reward-nf4-8", "method": "reward", "quantize": "nf4", "rows": 8, "ck": False})
    return found


def measure_apart(case: dict[str, Any], folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Train for a few steps in a forked process; bytes as planned and as measured."""
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError("a forked process cannot use a GPU that its parent has touched")
    import lowrank_align.methods.dpo
    import lowrank_align.methods.ppo
    import lowrank_align.methods.reward
    import lowrank_align.methods.sft
    import lowrank_align.train  # noqa: F401 - what is imported here counts as imports

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(case, folder, steps, sender))
    child.start()
    sender.close()  # so that a child which dies is an EOFError here, not a wait without end
    found: dict[str, Any] = receiver.recv()
    child.join()
    return {**case, **found}


def _measure(case: dict[str, Any], folder: Path, steps: int, sender: Any) -> None:
    import torch

    from lowrank_align import preflight
    from lowrank_align.memory import peak_bytes, reset_peak, resident_bytes
    from lowrank_align.progress import Progress
    from lowrank_align.train import train

    plans, plan_run = [], preflight.plan_run

    def noted(*arguments: Any) -> Any:
        plans.append(plan_run(*arguments))
        return plans[-1]

    preflight.plan_run = noted
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = 0 if device.type == "cuda" else resident_bytes()
    reset_peak(device)
    train(
        case["method"],
        progress=Progress(quiet=True),
        model=str(folder / "model"),
        quantize=case["quantize"],
        out=str(folder / (case["method"] if case["method"] == "reward" else case["name"])),
        overwrite=True,
        max_steps=steps,
        batch_size=BATCH,
        micro_batch_size=case["rows"],
        gradient_checkpointing=case["ck"],
        sample_steps=0,
        force=True,
        **knobs(case["method"], folder, BATCH),
    )
    planned = plans[0].prediction.allocated_bytes
    sender.send({"measured": peak_bytes(device) - before, "planned": planned, "device": str(device)})


if __name__ == "__main__":
    main()
