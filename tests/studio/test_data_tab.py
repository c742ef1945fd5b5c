"""What the Data tab's buttons do, called as the page calls them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from lowrank_align.apps.studio.data import Handlers
from lowrank_align.apps.studio.data_parts import lay_out

from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Judgement, Record, Stale, Store

ALL = ["any", "any", "any", "any", "", "kept"]  # the filters as they stand at first


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(gr, "Info", lambda *words, **options: None)  # a toast needs a page
    with gr.Blocks(analytics_enabled=False):
        parts = lay_out()
    with Store(tmp_path / "studio.db") as store:
        yield Handlers(SimpleNamespace(store=store), SimpleNamespace(), parts)  # type: ignore[arg-type]


def judged(store: Store) -> Record:
    record = Record("pair", "why?", (Completion("first"), Completion("second")))
    store.add(record)
    store.judge(record.id, "me", Judgement("preferred", ranks=(1.0, 2.0)))
    return record


def row(number: str) -> Any:
    return SimpleNamespace(row_value=[number])


def test_an_empty_store_says_what_to_do(handlers: Any) -> None:
    page, keys, table, where, newer, older, empty, hint = handlers.shown(1, *ALL)
    assert (page, keys, where, table["visible"], empty["visible"], hint["visible"]) == (
        1,
        [],
        "nothing",
        False,
        True,
        False,
    )
    assert (newer["interactive"], older["interactive"]) == (False, False)


def test_opening_changing_deleting_and_bringing_back_a_row(handlers: Any) -> None:
    record = judged(handlers.studio.store)
    _, keys, *_ = handlers.shown(1, *ALL)
    assert keys == [["1", record.id, "me"]]
    opened = handlers.open(keys, row("1"))
    assert len(opened) == len(handlers.entry_view)
    chosen = opened[0]
    assert chosen == [record.id, "me", 1]
    form = ["a tie", "", "", "not said", "the same", "x", "", "first", "second", "", "", "", ""]
    assert handlers.save(chosen, *form)[0] == [record.id, "me", 2]
    with pytest.raises(Stale, match="changed elsewhere"):
        handlers.save(chosen, *form)
    assert handlers.delete([record.id, "me", 2])[0] == [record.id, "me", 3]
    assert handlers.shown(1, *ALL)[1] == []
    assert len(handlers.shown(1, *ALL[:5], "deleted")[1]) == 1
    assert handlers.restore([record.id, "me", 3])[0] == [record.id, "me", 4]
    entry = handlers.studio.store.entry(record.id, "me")
    assert entry.judgement == Judgement("tie", ranks=(1.0, 1.0), reason="the same", tags=("x",))
    with pytest.raises(UserError, match="choose a row"):
        handlers.save([], *form)
    with pytest.raises(UserError, match="no longer there"):
        handlers.open([], row("1"))


def test_what_is_exported_can_be_uploaded_elsewhere(handlers: Any, tmp_path: Path) -> None:
    """One pair goes out with its record, comes back into an empty store, and is known when it comes again."""
    record = judged(handlers.studio.store)
    offered, told = handlers.export("pairs", *ALL)
    file = Path(offered["value"])
    assert file.name.startswith("studio-pairs-") and file.is_relative_to(tmp_path)
    assert told == f"{file.name}: 1 line"
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert (line["prompt"], line["chosen"], line["rejected"]) == ("why?", "first", "second")
    with Store(tmp_path / "other.db") as other:
        handlers.studio.store, mine = other, handlers.studio.store
        assert handlers.take_in(str(file)) == f"{file.name}: 1 judgement added"
        assert other.record(record.id) == record
        assert "1 there already" in handlers.take_in(str(file))
        handlers.studio.store = mine
    with pytest.raises(UserError, match="nothing to export as pairs"):
        handlers.export("pairs", "tie", *ALL[1:])
    (tmp_path / "code.py").write_text("print()")
    with pytest.raises(UserError, match="code.py: cannot be imported"):
        handlers.take_in(str(tmp_path / "code.py"))


def test_the_figures_are_in_words(handlers: Any) -> None:
    judged(handlers.studio.store)
    assert handlers.figures().splitlines()[0] == "judgements: 1"


def test_every_button_does_what_it_says(tmp_path: Path) -> None:
    """Which handler each component's event calls first."""
    with Store(tmp_path / "studio.db") as store, gr.Blocks(analytics_enabled=False) as demo:
        tab = gr.Tab("data")
        page = SimpleNamespace(tab=lambda name: tab, on_load=lambda *wired: None)
        parts = lay_out()
        Handlers(SimpleNamespace(store=store), page, parts).wire()  # type: ignore[arg-type]
    called: dict[tuple[Any, str], str] = {}
    for function in demo.fns.values():
        for target in function.targets:
            called.setdefault((target[0], target[1]), function.name)
    expected = [
        (tab, "select", "everything"),
        (parts.upload, "upload", "take_in"),
        (parts.export, "click", "export"),
        (parts.save, "click", "save"),
        (parts.really, "click", "delete"),
        (parts.restore, "click", "restore"),
        (parts.table, "select", "open"),
        (parts.before, "click", "turn"),
        (parts.after, "click", "turn"),
        (parts.figures, "expand", "figures"),
    ]
    assert [called.get((part._id, event)) for part, event, _ in expected] == [name for _, _, name in expected]
    assert all(called.get((part._id, "input" if part is not parts.filters[4] else "submit")) for part in parts.filters)
