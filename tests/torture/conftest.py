"""Faults of every kind, against what the project promises: few of each in `make test`, many in `make torture`.

The same test is both: `times(short, long)` says how many faults it makes, and `tally(...)` notes how they ended, in
pytest's own report of the run, from which `report.py` makes docs/reliability.md.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.torture import forms

LONG_SECONDS = 3000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if forms.LONG and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(LONG_SECONDS))


@pytest.fixture(scope="session")
def times() -> Callable[[int, int], int]:
    """`times(short, long)`: how many faults to make."""
    return forms.times


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`tally("Kill and resume", "SIGKILL at a random moment", "same bytes at the end", held=200, of=200, note="")`.

    Call it before the assertion on the same counts, so that a shortfall is in the table too. Sections are the
    headings of docs/reliability.md, in the order of `report.SECTIONS`.
    """

    def add(section: str, fault: str, promise: str, *, held: int, of: int, note: str = "") -> None:
        row = {"section": section, "fault": fault, "promise": promise, "held": held, "of": of, "note": note}
        request.node.user_properties.append(("counts", json.dumps(row)))

    return add


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
    from tests.torture.forge import Forge

    made = Forge(tiny_llama, cache)
    yield made
    made.close()
