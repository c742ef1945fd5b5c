"""docs/methods.md has a section for every method and a line for every loss, and the knobs that it names exist."""

import re
from pathlib import Path
from typing import get_args

import pytest

from lowrank_align.config import COMMANDS, DATA_COMMANDS, METHODS
from lowrank_align.config.offline import PairedLossName

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    """The text under a heading, up to the next of its rank."""
    found = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##? |^### |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/methods.md has no section {name}"
    return found[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_section_with_source_and_command(method: str) -> None:
    text = section(method)
    assert "arXiv" in text
    assert f"lowrank-align {method} " in text
    assert f"[{method}](#{method})" in PAGE


def test_every_loss_has_its_line() -> None:
    lines = re.findall(r"^\| `(\w+)`", section("dpo"), re.MULTILINE)
    assert set(lines) == set(get_args(PairedLossName))


def test_the_flags_that_it_names_exist() -> None:
    kinds = [*METHODS.values(), *COMMANDS.values(), *DATA_COMMANDS.values()]
    fields = {name.replace("_", "-") for kind in kinds for name in kind.model_fields}
    known = {"--help"} | {f"--{no}{name}" for name in fields for no in ("", "no-")}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)", PAGE))
    assert named <= known, named - known
