"""Stores in a temporary folder, and small records to put into them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.store import Completion, Record, Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store's file is, or will be."""
    return tmp_path / "votes.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


@pytest.fixture
def added(store: Store) -> Callable[..., Record]:
    """Adds a record of the given answers (texts) to the store."""

    def add(*answers: Any, kind: Any = "pair", prompt: Any = "Why?", **fields: Any) -> Record:
        completions = tuple(a if isinstance(a, Completion) else Completion(a) for a in answers or ("yes", "no"))
        record = Record(kind, prompt, completions, **fields)
        store.add(record)
        return record

    return add
