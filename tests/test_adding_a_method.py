"""docs/adding-a-method.md is true: its one file runs as a command, and trains what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_align.config import METHODS
from lowrank_align.methods import method_class, register

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_its_file_is_a_command(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The bash line as it stands, but for the model: loss 1 at the first step, where the policy is the reference."""
    (tmp_path / "apo_zero.py").write_text(blocks("python")[0], encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_bytes((trained / "pairs.jsonl").read_bytes())
    words = blocks("bash")[0].splitlines()[0].split()
    assert words[:2] == ["python", "apo_zero.py"]
    words[words.index("tiny")] = str(tiny_llama)
    more = ["--learning-rate", "0.01", "--quantize", "none", "--sample-steps", "0", "--batch-size", "4"]
    child = subprocess.run([sys.executable, *words[1:], *more], cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/apo-zero/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1e-4
    assert lines[-1]["rewards/margins"] > 0


def test_a_name_that_is_taken_is_refused() -> None:
    class Other(METHODS["dpo"]):  # type: ignore[misc,name-defined]
        method = "dpo"

    with pytest.raises(ValueError, match="the name is taken"):
        register(Other, method_class("dpo"))
    register(METHODS["dpo"], method_class("dpo"))  # the same again is no clash


def test_what_it_names_is_there() -> None:
    for path in re.findall(r"`((?:lowrank_align|config|methods|objectives|tests|docs)/[\w./-]*)`", PAGE):
        if "NAME" not in path:
            assert (ROOT / path).exists() or (ROOT / "lowrank_align" / path).exists(), path
