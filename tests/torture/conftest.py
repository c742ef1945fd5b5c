"""Faults of every kind, against what the project promises: few of each in `make test`, many in `make torture`.

The same test is both: `times(short, long)` says how many faults it makes, and `tally(...)` writes down how they ended,
from which `report.py` makes docs/reliability.md.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = os.environ.get("LOWRANK_TORTURE")  # a folder: the long form, which leaves its counts there
LONG_SECONDS = 3000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if RESULTS and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))


@pytest.fixture(scope="session")
def times() -> Callable[[int, int], int]:
    """`times(short, long)`: how many faults to make."""
    return lambda short, long: long if RESULTS else short


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`tally("Kill and resume", "SIGKILL at a random moment", "same bytes at the end", held=200, of=200, note="")`.

    Call it before the assertion on the same counts, so that a shortfall is in the table too. Sections are the
    headings of docs/reliability.md, in the order of `report.SECTIONS`.
    """
    began, lines = time.monotonic(), []

    def add(section: str, fault: str, promise: str, *, held: int, of: int, note: str = "") -> None:
        lines.append({"section": section, "fault": fault, "promise": promise, "held": held, "of": of, "note": note})

    yield add
    if RESULTS and lines:
        lines[-1]["seconds"] = round(time.monotonic() - began, 1)
        name = request.node.nodeid.rpartition("/")[2].replace("::", ".")
        kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        (Path(RESULTS) / f"{kept}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a store that is not there yet."""
    return tmp_path / "votes.db"


@pytest.fixture
def children() -> Iterator[Any]:
    """`clients.Children`, ended with the test."""
    from tests.torture.clients import Children

    with Children() as begun:
        yield begun


@pytest.fixture(scope="session")
def forge(tiny_llama: Path, cache: Path) -> Iterator[Any]:
    """The process that runs are forked from: `forge.Forge`."""
    spec = importlib.util.spec_from_file_location("forge", Path(__file__).with_name("forge.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["forge"] = module = importlib.util.module_from_spec(spec)  # its dataclasses look for it there
    spec.loader.exec_module(module)
    made = module.Forge(tiny_llama, cache)
    yield made
    made.close()
