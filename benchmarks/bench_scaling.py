"""Time and memory against length, batch, completions, vocabulary and rows: where each begins to hurt.

    python benchmarks/bench_scaling.py                 # everything, about ten minutes on two cores
    python benchmarks/bench_scaling.py --only rows     # one of the five
    python benchmarks/bench_scaling.py --save cpu      # also results/, docs/benchmarks.md and its picture

The model is that of `memory_inputs.py` (13 M parameters, one token a word), unquantised. Every point is a process of
its own, forked from one that has imported everything; the first step warms up, but for `rows`, where the time from the
command to the end of the first step is what counts. Memory is peak RSS minus RSS after imports.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench import PAGE, hardware
from memory_inputs import VOCABULARY, make_model, write_words

RESULTS = Path(__file__).parent / "results"
PICTURE = PAGE.parent / "pictures" / "scaling.png"
MARK = "<!-- what follows until the next mark is written by benchmarks/bench_scaling.py -->"
STEPS = 4


class Point(NamedTuple):
    """One measurement: DPO, or the reward model on rankings (K), or SFT (vocabulary, rows)."""

    axis: str
    value: int
    method: str = "dpo"
    prompt: int = 128
    answer: int = 64
    completions: int = 2
    batch: int = 4
    micro_batch: int = 1
    vocabulary: int = VOCABULARY
    rows: int = 16
    steps: int = STEPS

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * (self.prompt + self.completions * self.answer)


AXES: dict[str, tuple[str, list[Point]]] = {
    "length": (
        "tokens of a pair's tree row",
        [Point("length", n, prompt=n // 2, answer=n // 4) for n in (128, 256, 512, 1024, 2048)],
    ),
    "batch": ("micro-batch", [Point("batch", n, batch=8, micro_batch=n) for n in (1, 2, 4, 8)]),
    "K": ("completions of a ranking", [Point("K", k, method="reward", completions=k) for k in (2, 4, 8, 16)]),
    "vocabulary": (
        "vocabulary",
        [Point("vocabulary", n, "sft", completions=1, vocabulary=n) for n in (2048, 8192, 32768, 131072)],
    ),
    "rows": (
        "rows of the file",
        [Point("rows", n, "sft", 12, 12, 1, rows=n, steps=1) for n in (1_000, 10_000, 100_000, 1_000_000)],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", choices=["", *AXES])
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    import lowrank_align.methods.dpo
    import lowrank_align.methods.reward
    import lowrank_align.methods.sft
    import lowrank_align.train  # noqa: F401 - what is imported here counts as imports

    found = []
    for name, (_, points) in AXES.items():
        for point in points if arguments.only in ("", name) else ():
            found.append({**point._asdict(), "tokens": point.tokens, **measure_apart(point)})
            print(lines(found[-1:])[-1], flush=True)
    print("\n".join(["", *lines(found)]))
    if arguments.save:
        report = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "points": found}
        (RESULTS / f"scaling_{arguments.save}.json").write_text(json.dumps(report, indent=2) + "\n")
        draw(found)
        before, _, after = PAGE.read_text().split(MARK)
        facts = f"{report['date']}, {report['hardware']}, two threads."
        PAGE.write_text("\n".join([before + MARK, facts, "", *lines(found), "", MARK + after]))


def measure_apart(point: Point) -> dict[str, Any]:
    """In a forked process and a folder of its own; seconds and bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_words(
            folder / "rows.jsonl",
            rows=point.rows,
            prompt=point.prompt,
            answers=point.completions,
            answer=point.answer,
        )
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_measure, args=(point, folder, sender))
        child.start()
        sender.close()
        found: dict[str, Any] = receiver.recv()
        child.join()
    return found


def _measure(point: Point, folder: Path, sender: Any) -> None:
    import torch

    from lowrank_align.loop import Loop
    from lowrank_align.memory import peak_bytes, release_unused, reset_peak, resident_bytes
    from lowrank_align.progress import Progress
    from lowrank_align.train import train

    marks: list[float] = []
    step = Loop._step

    def timed(loop: Loop, number: int) -> dict[str, float]:
        found = step(loop, number)
        marks.append(time.perf_counter())
        return found

    Loop._step = timed  # type: ignore[method-assign]
    make_model(folder / "model", point.vocabulary, context=2 * 2048)
    release_unused()
    device = torch.device("cpu")
    before, began = resident_bytes(), time.perf_counter()
    reset_peak(device)
    train(
        point.method,
        progress=Progress(quiet=True),
        model=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        out=str(folder / "run"),
        quantize="none",
        device="cpu",
        max_length=2 * 2048,
        max_steps=point.steps,
        batch_size=point.batch,
        micro_batch_size=point.micro_batch,
        sample_steps=0,
        save_steps=1000,
        force=True,
    )
    steps = [later - earlier for earlier, later in zip(marks, marks[1:], strict=False)]
    seconds = statistics.median(steps) if steps else marks[0] - began
    sender.send({"seconds": seconds, "peak_bytes": peak_bytes(device) - before})


def lines(found: list[dict[str, Any]]) -> list[str]:
    table = [
        "| against | value | seconds a step | tokens a second | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        rate = f"{row['tokens'] / row['seconds']:,.0f}" if row["axis"] != "rows" else ""
        until = " to the first step" if row["axis"] == "rows" else ""
        table.append(
            f"| {AXES[row['axis']][0]} | {row['value']:,} | {row['seconds']:.2f}{until} | {rate} "
            f"| {row['peak_bytes'] / 1e6:,.0f} MB |"
        )
    return table


def draw(found: list[dict[str, Any]]) -> None:
    """Seconds and memory against each of the five."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, plots = plt.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 5.2), layout="constrained")
    for column, (name, (label, _)) in enumerate(AXES.items()):
        rows = [row for row in found if row["axis"] == name]
        values = [row["value"] for row in rows]
        for plot, key, factor in ((plots[0][column], "seconds", 1), (plots[1][column], "peak_bytes", 1e-6)):
            plot.plot(values, [row[key] * factor for row in rows], "o-")
            plot.set_xscale("log", base=2 if name != "rows" else 10)
            plot.set_xticks(
                values, [f"{value // 1000} k" if value > 9999 else f"{value}" for value in values], fontsize=8
            )
            plot.minorticks_off()
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
        plots[1][column].set_xlabel(label)
        plots[0][column].set_title("seconds to the first step" if name == "rows" else "seconds a step", fontsize=10)
        plots[1][column].set_title("peak memory, MB", fontsize=10)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
