"""The plan against peak memory as the system counts it: a process for each method, 13 M parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_within_a_tenth_of_the_measured_peak(tmp_path: Path) -> None:
    """Peak RSS minus RSS after imports, of the four methods on the NF4 base, eight rows at once (benchmarks/).

    With pages of their own from 1 MiB on, where the heap has no say: its gaps differ from machine to machine, by 11 %
    between the two that this has run on.
    """
    script = (
        "import json, sys; from pathlib import Path; from memory_inputs import make_inputs;"
        "from plan_measured import cases, measure_apart;"
        "import lowrank_align.plan.prediction as prediction; prediction.OWN_PAGES_FROM_BYTES = 2**20;"
        "folder = Path(sys.argv[1]); make_inputs(folder);"
        "print(json.dumps([measure_apart(case, folder, steps=1) for case in cases('-nf4-8')[:4]]))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT / "benchmarks",
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert {row["method"] for row in found} == {"sft", "reward", "dpo", "ppo"}
    for row in found:
        print(row["method"], row["planned"] / row["measured"])
        assert row["planned"] == pytest.approx(row["measured"], rel=0.10), row
