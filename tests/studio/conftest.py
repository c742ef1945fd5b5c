"""A studio on the small random base, with a store and a runs folder of the test's own."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def studio(tiny_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Studio on `tiny_base`; its roles are taken off again at the end."""
    from lowrank_align.config import StudioSettings
    from lowrank_align.data.chat import Renderer
    from lowrank_align.store import Store
    from lowrank_align.studio.studio import Studio

    monkeypatch.chdir(tmp_path)
    settings = StudioSettings(model=tiny_base.name, store="studio.db", runs="runs", max_new_tokens=8, temperature=1.0)
    renderer = Renderer(tiny_base.tokenizer, max_length=tiny_base.context_tokens)
    made = Studio(tiny_base, renderer, Store(Path("studio.db")), settings)
    yield made
    made.close()
    for name in [name for name in tiny_base.roles if name != "base"]:
        tiny_base.remove_role(name)


@pytest.fixture
def free_the_base(studio: Any) -> Iterator[Callable[[], None]]:
    """The base is taken, so that nothing is drawn, until this is called."""
    taken, gate = threading.Event(), threading.Event()

    def hold() -> None:
        taken.set()
        gate.wait()

    holding = threading.Thread(target=lambda: studio.speaker.call(hold))
    holding.start()
    assert taken.wait(60)

    def give_back() -> None:
        gate.set()
        holding.join()

    yield give_back
    give_back()
