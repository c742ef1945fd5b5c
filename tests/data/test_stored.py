"""Rows into the store and out again: every shape, idempotent, and nothing lost on the way round."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_align.data.formats import Shape
from lowrank_align.data.load import load_rows
from lowrank_align.data.stored import export_rows, import_rows
from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Entry, Judgement, Record, Store, new_id
from lowrank_align.store.encoding import to_json
from lowrank_align.store.export import EXPORTS

SHAPES = {
    "pairs": Shape.pair,
    "rankings": Shape.ranking,
    "unpaired": Shape.unpaired,
    "demonstrations": Shape.demonstration,
    "scored": Shape.scored,
    "prompts": Shape.prompts,
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "votes.db") as opened:
        yield opened


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A file of rows."""

    def file(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else to_json(row)) + "\n" for row in rows))
        return path

    return file


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def exported(store: Store, kind: str) -> list[dict[str, Any]]:
    """The rows, without the column that brings them back."""
    return [{k: v for k, v in line.items() if k != "record"} for line in export_rows(store, kind).lines]


# ---- every shape, there and back

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
THERE_AND_BACK = [
    ("pairs", PAIR, PAIR),
    ("pairs", {**PAIR, "preference": 0.5}, {**PAIR, "preference": 0.5}),
    ("pairs", {**PAIR, "preference": 0.8, "margin": 2}, {**PAIR, "preference": 0.8, "margin": 2}),
    ("pairs", {**PAIR, "preference": 0.1}, {**PAIR, "preference": 0.1}),
    ("pairs", {**PAIR, "preference": 1}, PAIR),
    ("pairs", {**PAIR, "finished": False}, {**PAIR, "finished": False}),
    ("pairs", {**PAIR, "topic": "sums", "score": 3, "tools": [{"name": "f"}]}, {**PAIR, "tools": [{"name": "f"}]}),
    (
        "pairs",
        {"chosen": asked("q") + said("c"), "rejected": asked("q") + said("r")},
        {"prompt": asked("q"), "chosen": said("c"), "rejected": said("r")},
    ),
    (
        "pairs",
        {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"},
        {"prompt": asked("q"), "chosen": said("c"), "rejected": said("r")},
    ),
    ("rankings", *[{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}] * 2),
    ("unpaired", *[{"prompt": "p", "completion": "a", "label": True}] * 2),
    ("unpaired", *[{"prompt": asked("q"), "completion": said("a"), "label": False}] * 2),
    ("scored", *[{"prompt": "p", "completion": "a", "score": -1.5}] * 2),
    ("demonstrations", *[{"prompt": "p", "completion": "a"}] * 2),
    ("demonstrations", *[{"messages": asked("q") + said("a")}] * 2),
    ("demonstrations", *[{"text": "once upon a time"}] * 2),
    (
        "demonstrations",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": asked("q") + said("a")},
    ),
    (
        "demonstrations",
        {"instruction": "q", "output": "a"},
        {"prompt": asked("q"), "completion": said("a")},
    ),
    ("prompts", *[{"prompt": "p"}] * 2),
    ("prompts", *[{"prompt": asked("q"), "chat_template_kwargs": {"enable_thinking": False}}] * 2),
]


@pytest.mark.parametrize(("kind", "row", "expected"), THERE_AND_BACK)
def test_every_shape_goes_in_and_comes_out(
    kind: str, row: dict[str, Any], expected: dict[str, Any], store: Store, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Twice in adds nothing; out it is a row that the trainers take; in again elsewhere it is the same entry."""
    import_rows(store, write(row))
    before = [*store.entries(), *store.queued()]
    assert len(before) == 1
    again = import_rows(store, write(row))
    assert (again.records, again.judgements, again.prompts, again.duplicates) == (0, 0, 0, 1)
    assert exported(store, kind) == [expected]
    out = write(*export_rows(store, kind).lines, name="out.jsonl")
    (loaded,) = load_rows(out, expect={SHAPES[kind]}).rows
    assert loaded.shape is SHAPES[kind]
    with Store(tmp_path / "other.db") as other:
        done = import_rows(other, out)
        assert (done.judgements + done.prompts, done.duplicates, done.changed) == (1, 0, 0)
        assert [*other.entries(), *other.queued()] == before
    assert import_rows(store, out).duplicates == 1


def test_columns_without_a_place_are_kept(store: Store, write: Callable[..., Path]) -> None:
    import_rows(store, write({**PAIR, "topic": "sums", "n": [1, {"a": None}], "empty": None}))
    assert store.entries()[0].record.extra == {"topic": "sums", "n": [1, {"a": None}]}


def test_who_judged_is_taken_from_the_row_or_given(store: Store, write: Callable[..., Path]) -> None:
    import_rows(store, write(PAIR, {**PAIR, "prompt": "q", "annotator": "ben"}), annotator="ann")
    assert {e.annotator: e.record.prompt for e in store.entries()} == {"ann": "p", "ben": "q"}


def test_the_same_row_of_two_annotators_is_one_record(store: Store, write: Callable[..., Path]) -> None:
    done = import_rows(store, write(*({**PAIR, "annotator": who} for who in ("ann", "ben", "ann"))))
    assert (done.records, done.judgements, done.duplicates) == (1, 2, 1)


def test_contradicting_rows_are_all_kept(store: Store, write: Callable[..., Path]) -> None:
    rows = [{"prompt": "p", "completion": "a", "label": label} for label in (True, False)]
    done = import_rows(store, write(*rows, PAIR, {**PAIR, "preference": 0.5}))
    assert done.judgements == 4


def test_prompts_go_to_the_queue_with_the_files_name(store: Store, write: Callable[..., Path]) -> None:
    done = import_rows(store, write({"prompt": "a"}, {"prompt": "b", "id": 7}, {"prompt": "a", "id": 8}))
    assert (done.prompts, done.duplicates, done.records) == (2, 1, 0)
    assert [(p.prompt, p.source, p.extra) for p in store.queued()] == [
        ("a", "rows.jsonl", {}),
        ("b", "rows.jsonl", {"id": 7}),
    ]


def test_conversions_are_counted(store: Store, write: Callable[..., Path]) -> None:
    done = import_rows(store, write({"instruction": "q", "output": "a"}, {"instruction": "q", "output": "b"}, PAIR))
    assert done.conversions == Counter(Alpaca=2)


def test_dates_and_infinities_of_other_formats_become_text(store: Store, tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{**PAIR, "day": datetime.date(2026, 1, 2), "odds": float("inf")}])
    pq.write_table(table, tmp_path / "rows.parquet")
    for judgements in (1, 0):
        assert import_rows(store, tmp_path / "rows.parquet").judgements == judgements
    assert store.entries()[0].record.extra == {"day": "2026-01-02", "odds": "Infinity"}


# ---- bad rows


def test_bad_rows_are_named_and_nothing_is_imported(store: Store, write: Callable[..., Path]) -> None:
    path = write(PAIR, {"prompt": "p", "chosen": "c"}, "{", {"prompt": "p", "completion": "a", "label": 1})
    with pytest.raises(UserError, match=r"rows.jsonl:2: rejected: missing .*and 2 more bad rows"):
        import_rows(store, path)
    assert (store.count(), store.all_records()) == (0, [])


def test_skip_bad_sets_them_aside(store: Store, write: Callable[..., Path], tmp_path: Path) -> None:
    aside = tmp_path / "bad.jsonl"
    done = import_rows(store, write(PAIR, {"prompt": ""}, "{"), skip_bad=aside)
    assert (done.judgements, done.skipped) == (1, 2)
    assert [json.loads(line)["where"] for line in aside.read_text().splitlines()] == ["rows.jsonl:2", "rows.jsonl:3"]


def test_a_killed_import_leaves_nothing(
    store: Store, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the third row of four; the same import afterwards brings all of them."""
    path = write(*({**PAIR, "prompt": f"p{i}"} for i in range(4)))
    add, calls = Store.add, count()

    def stops(self: Store, record: Record) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        add(self, record)

    monkeypatch.setattr(Store, "add", stops)
    with pytest.raises(KeyboardInterrupt):
        import_rows(store, path)
    assert store.all_records() == []
    assert import_rows(store, path).judgements == 4


# ---- exports that come back


def full(store: Store) -> Entry:
    """A pair with everything that can be said of it."""
    queued = new_id()
    answers = (
        Completion("short", "base", None, {"temperature": 0.7, "seed": 1}, True, 3, 0.5),
        Completion("much longer", "dpo", "ab" * 32, {"temperature": 0.7, "seed": 2}, False, 9, 1.5),
    )
    record = Record("pair", asked("q"), answers, (1, 0), "collect", queued, None, {"base": "tiny"}, {"margin": 0.5})
    store.add(record)
    judgement = Judgement(
        "preferred",
        ranks=(1.0, 2.0),
        strength=2,
        reason="shorter",
        tags=("style",),
        edits={1: "long"},
        written="best",
        seconds=2.5,
        streaming=True,
    )
    store.judge(record.id, "ann", judgement)
    entry = store.entry(record.id, "ann")
    assert entry is not None
    return entry


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "demonstrations"])
def test_any_export_brings_the_whole_entry_back(kind: str, store: Store, write: Callable[..., Path]) -> None:
    entry = full(store)
    lines = export_rows(store, kind).lines
    out = write(*lines)
    with Store(out.with_name("other.db")) as other:
        done = import_rows(other, out)
        assert (done.records, done.judgements, done.more_lines) == (1, 1, len(lines) - 1)
        assert other.entries() == [entry]
        assert [event.kind for event in other.history(entry.record.id, "ann")] == ["import"]
        assert export_rows(other, kind) == export_rows(store, kind)


def test_lines_in_any_order_or_number_bring_it_back(store: Store, write: Callable[..., Path]) -> None:
    entry = full(store)
    lines = export_rows(store, "pairs").lines
    assert len(lines) == 4
    with Store(write(*reversed(lines[1:3])).with_name("other.db")) as other:
        import_rows(other, write(*reversed(lines[1:3])))
        assert other.entries() == [entry]


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": [{"role": "assistant", "content": "changed"}]},
        {"prompt": [{"role": "user", "content": "changed"}]},
        {"preference": 0.5},
        {"margin": 0.7},
        {"tools": [{"name": "f"}]},
        {"finished": True},
    ],
)
def test_a_line_changed_by_hand_is_taken_as_it_reads(
    change: dict[str, Any], store: Store, write: Callable[..., Path]
) -> None:
    """Otherwise the column would bring back what somebody has mended in an editor."""
    full(store)
    line = export_rows(store, "pairs").lines[0] | change
    with Store(write(line).with_name("other.db")) as other:
        done = import_rows(other, write(line))
        assert (done.changed, done.judgements) == (1, 1)
        (entry,) = other.entries()
        assert (entry.annotator, entry.record.origin) == ("import", "import")
        (row,) = exported(other, "pairs")
        assert all(row.get(name, name == "finished") == value for name, value in change.items())
        assert import_rows(other, write(line)).duplicates == 1


def test_a_column_of_other_people_makes_no_difference(store: Store, write: Callable[..., Path]) -> None:
    entry = full(store)
    line = {**export_rows(store, "pairs").lines[0], "batch": 7}
    with Store(write(line).with_name("other.db")) as other:
        import_rows(other, write(line))
        assert other.entries() == [entry]


def test_a_record_column_of_another_project_is_a_column(store: Store, write: Callable[..., Path]) -> None:
    import_rows(store, write({**PAIR, "record": {"id": 5}}))
    assert store.entries()[0].record.extra == {"record": {"id": 5}}


def test_what_was_judged_otherwise_since_is_kept(store: Store, write: Callable[..., Path]) -> None:
    """Also where it was deleted since; what was taken back comes again."""
    entry = full(store)
    out = write(*export_rows(store, "pairs").lines[:1])
    store.judge(entry.record.id, "ann", Judgement("tie"), expected_version=1)
    assert (import_rows(store, out).kept, store.entries()[0].judgement) == (1, Judgement("tie"))
    store.delete(entry.record.id, "ann", expected_version=2)
    assert (import_rows(store, out).kept, store.count()) == (1, 0)
    for version in (3, 4, 5):
        store.undo(entry.record.id, "ann", expected_version=version)
    assert store.entry(entry.record.id, "ann") is None
    assert import_rows(store, out).judgements == 1
    assert store.entries()[0].judgement == entry.judgement


def test_an_id_that_means_something_else_here_gets_another(store: Store, write: Callable[..., Path]) -> None:
    entry = full(store)
    out = write(*export_rows(store, "unpaired").lines)
    with Store(out.with_name("other.db")) as other:
        other.add(replace(entry.record, prompt="something else"))
        import_rows(other, out)
        (found,) = other.entries()
        assert replace(found.record, id=entry.record.id) == entry.record
        assert import_rows(other, out).judgements == 0


def test_the_queue_comes_back_with_its_ids_and_order(store: Store, write: Callable[..., Path]) -> None:
    store.enqueue(["c", "a", asked("b")], "list.jsonl")
    out = write(*export_rows(store, "prompts").lines)
    with Store(out.with_name("other.db")) as other:
        assert import_rows(other, out).prompts == 3
        assert other.queued() == store.queued()
    changed = write(*(line | {"prompt": f"changed {i}"} for i, line in enumerate(export_rows(store, "prompts").lines)))
    assert import_rows(store, changed).prompts == 3
    assert store.queue_total() == 6


def test_a_line_that_would_be_refused_is_left_out_and_counted(store: Store) -> None:
    record = Record("pair", "p", (Completion("a\0"), Completion("b")))
    store.add(record)
    store.judge(record.id, "ann", Judgement("preferred", ranks=(1.0, 2.0)))
    export = export_rows(store, "pairs")
    assert export.lines == []
    assert export.left_out == {"a line refused: chosen: contains a NUL character (at character 2)": 1}


# ---- whatever can be said, nothing is lost

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
ANSWERS = TEXTS | st.just(said("tea")) | st.lists(st.sampled_from([*said("a"), *said(""), *asked("q")]), min_size=1)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXTS, st.lists, max_leaves=3)
NAMES = st.sampled_from(["tools", "chat_template_kwargs", "margin", "label", "prompt", "score", "record", "é"])
COMPLETIONS = st.builds(
    Completion,
    ANSWERS,
    TEXTS,
    st.none() | st.just("ab" * 32),
    st.dictionaries(TEXTS, VALUES, max_size=2),
    st.booleans(),
    st.none() | st.integers(0, 9),
    st.none() | st.floats(0, 9),
)


@st.composite
def judged(draw: st.DrawFn) -> tuple[Record, Judgement]:
    size = draw(st.integers(1, 4))
    answers = tuple(draw(st.lists(COMPLETIONS, min_size=size, max_size=size)))
    record = Record(
        draw(st.sampled_from(["pair", "ranking", "battle", "rating", "demonstration", "scored"])),
        draw(TEXTS | st.just(asked("q")) | st.just([])),
        answers,
        draw(st.just(()) | st.permutations(range(size)).map(tuple)),
        draw(st.sampled_from(["collect", "chat", "import"])),
        queue_id=draw(st.none() | st.just("0" * 32)),
        versions=draw(st.dictionaries(TEXTS, VALUES, max_size=2)),
        extra=draw(st.dictionaries(NAMES, VALUES, max_size=2)),
    )
    verdicts = ["tie", "bad", "ranked", "preferred", "liked", "disliked", "demonstration", "scored"]
    judgement = Judgement(
        draw(st.sampled_from(verdicts)),  # type: ignore[arg-type]
        ranks=tuple(draw(st.lists(st.sampled_from([1.0, 2.0, 2.5]), min_size=size, max_size=size))),
        preference=draw(st.none() | st.floats(0, 1)),
        score=draw(st.floats(-9, 9)),
        strength=draw(st.none() | st.integers(1, 3)),
        reason=draw(TEXTS),
        tags=tuple(draw(st.lists(TEXTS, max_size=2))),
        edits=draw(st.dictionaries(st.integers(0, size - 1), TEXTS, max_size=2)),
        written=draw(st.none() | TEXTS),
        seconds=draw(st.none() | st.floats(0, 9)),
        streaming=draw(st.booleans()),
    )
    return record, judgement


@settings(max_examples=60)
@given(case=judged())
def test_whatever_is_exported_can_be_trained_on_and_comes_back_whole(
    case: tuple[Record, Judgement], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every line is read as the shape it should have, without a conversion, and brings the entry back."""
    folder = tmp_path_factory.mktemp("round")
    record, judgement = case
    with Store(folder / "one.db") as store:
        store.add(record)
        store.judge(record.id, "ann", judgement)
        (entry,) = store.entries()
        assert (entry.record, entry.judgement) == (record, judgement)
        for kind in EXPORTS[:-1]:
            export = export_rows(store, kind)
            assert export.lines or export.left_out
            if not export.lines:
                continue
            out = folder / f"{kind}.jsonl"
            out.write_text("".join(to_json(line) + "\n" for line in export.lines))
            loaded = load_rows(out, expect={SHAPES[kind]})
            assert (len(loaded.rows), loaded.conversions) == (len(export.lines), Counter())
            with Store(folder / f"{kind}.db") as other:
                import_rows(other, out)
                assert other.entries() == [entry]
