"""Every kind of file and folder, what is wrong with broken ones, and bad rows set aside."""
# ruff: noqa: E501 -- one case a line

import builtins
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.data.formats import Shape
from lowrank_align.data.load import load_rows, split_off
from lowrank_align.errors import EnvironmentProblem, UserError

PAIR = {Shape.pair}


def row(k: int) -> dict[str, Any]:
    return {"prompt": f"Q{k}", "chosen": "A", "rejected": "B"}


ROWS = [row(1), row(2), row(3)]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
INDENTED = json.dumps(ROWS, indent=1).encode()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def prompts(source: Any, **kwargs: Any) -> list[tuple[str, str]]:
    return [(r.where, str(r.prompt)) for r in load_rows(source, expect=PAIR, **kwargs).rows]


@pytest.mark.parametrize(
    ("content", "places"),
    [
        (LINES, ["1", "2", "3"]),
        (b"\xef\xbb\xbf" + LINES, ["1", "2", "3"]),  # as Windows editors save it
        (LINES.replace(b"\n", b"\r\n"), ["1", "2", "3"]),
        (b"\n" + LINES.replace(b"\n", b"\n\n"), ["2", "4", "6"]),
        (LINES.rstrip(), ["1", "2", "3"]),
        (gzip.compress(LINES, mtime=0), ["1", "2", "3"]),
        (ARRAY, ["1", "1, row 2", "1, row 3"]),
        (INDENTED, ["2", "7", "12"]),  # "[", then five lines a row: the brace, three fields, the closing brace
        (gzip.compress(INDENTED, mtime=0), ["2", "7", "12"]),
        (b" \n" + ARRAY + b"\n", ["2", "2, row 2", "2, row 3"]),
    ],
)
def test_files_are_known_by_content_and_rows_by_their_line(tmp_path: Path, content: bytes, places: list[str]) -> None:
    path = write(tmp_path / "rows.json", content)
    assert prompts(path) == [(f"rows.json:{place}", f"Q{k}") for k, place in enumerate(places, start=1)]


def test_an_index_counts_rows_from_zero_and_the_hash_is_of_the_files_bytes(tmp_path: Path) -> None:
    loaded = load_rows(write(tmp_path / "rows.jsonl", LINES), expect=PAIR)
    assert [r.index for r in loaded.rows] == [0, 1, 2]
    assert (loaded.sha256, loaded.skipped, loaded.conversions) == (hashlib.sha256(LINES).hexdigest(), 0, {})


def test_conversions_are_counted(tmp_path: Path) -> None:
    alpaca = b'{"instruction": "Q", "output": ["A", "B"]}\n'
    loaded = load_rows(write(tmp_path / "rows.jsonl", LINES + alpaca), expect=PAIR)
    assert loaded.conversions == {"Alpaca": 1}


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([{**row(1), "preference": None}, {**row(2), "preference": 0.25}])
    pq.write_table(table, tmp_path / "rows.bin")
    rows = load_rows(tmp_path / "rows.bin", expect=PAIR).rows
    assert [(r.where, r.preference) for r in rows] == [("rows.bin:row 1", 1.0), ("rows.bin:row 2", 0.25)]


def test_a_folder_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", LINES.splitlines()[0])
    write(tmp_path / "a.json", ARRAY)
    write(tmp_path / "notes.txt", b"not data")
    write(tmp_path / "dataset_info.json", b"{}")
    assert [where for where, _ in prompts(tmp_path)] == ["a.json:1", "a.json:1, row 2", "a.json:1, row 3", "b.jsonl:1"]
    assert load_rows(tmp_path, expect=PAIR).sha256 == hashlib.sha256(ARRAY + LINES.splitlines()[0]).hexdigest()


def test_a_folder_with_splits_in_its_names_gives_the_one_asked_for(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000.jsonl", LINES)
    write(tmp_path / "data" / "test-00000.jsonl", LINES.splitlines()[0])
    assert len(prompts(tmp_path)) == 3
    assert prompts(tmp_path, split="test") == [("data/test-00000.jsonl:1", "Q1")]
    with pytest.raises(UserError, match=r"no file of the split validation \(there are: test, train\)$"):
        prompts(tmp_path, split="validation")


def test_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert prompts(tmp_path / "saved")[1] == ("saved:row 2", "Q2")
    with pytest.raises(UserError, match=r"no split test \(there are: train\)$"):
        prompts(tmp_path / "saved", split="test")


def test_a_folder_of_rows_that_leads_outside(tmp_path: Path) -> None:
    """Within it links may lead where they like, and those of the hub's cache to its blobs."""
    for name in ("outside", "rows", "hub/blobs", "hub/snapshots/c/data"):
        (tmp_path / name).mkdir(parents=True)
    private = write(tmp_path / "outside" / "private.jsonl", LINES)
    inside = write(tmp_path / "rows" / "a.jsonl", LINES)
    (tmp_path / "rows" / "b.jsonl").symlink_to(inside)
    assert len(load_rows(tmp_path / "rows", expect=PAIR).rows) == 6
    (tmp_path / "rows" / "x.jsonl").symlink_to("../outside/private.jsonl")
    with pytest.raises(UserError, match=r"rows/x.jsonl: leads out of .*rows; put the file itself there"):
        load_rows(tmp_path / "rows", expect=PAIR)
    assert len(load_rows(tmp_path / "rows" / "x.jsonl", expect=PAIR).rows) == 3  # named by the user
    blob, snapshot = write(tmp_path / "hub" / "blobs" / "b", LINES), tmp_path / "hub" / "snapshots" / "c" / "data"
    (snapshot / "rows.jsonl").symlink_to(blob)
    assert len(load_rows(snapshot, expect=PAIR).rows) == 3
    assert private.read_bytes() == LINES


@pytest.mark.parametrize("how", ["a link", "its list of files"])
def test_a_saved_dataset_that_leads_outside(how: str, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    file = tmp_path / "saved" / state["_data_files"][0]["filename"]
    (tmp_path / "outside").mkdir()
    file.rename(tmp_path / "outside" / "private.arrow")
    if how == "a link":
        file.symlink_to(tmp_path / "outside" / "private.arrow")
    else:
        state["_data_files"][0]["filename"] = "../outside/private.arrow"
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"\.arrow: leads out of .*saved; put the file itself there"):
        load_rows(tmp_path / "saved", expect=PAIR)


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompts("someone/pairs") == [(f"someone/pairs:row {k}", f"Q{k}") for k in (1, 2, 3)]
    assert asked == [("someone/pairs", "train")]


def test_a_hub_dataset_without_network_is_a_problem_of_the_machine() -> None:
    with pytest.raises(
        EnvironmentProblem, match="^nobody/nothing: neither a file here nor a dataset in the cache, and"
    ):
        prompts("nobody/nothing")


def test_a_hub_dataset_that_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, split: str) -> None:
        raise ValueError("Unknown split\n'train'.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        prompts("someone/pairs")
    assert str(caught.value) == (
        "someone/pairs: neither a file here nor a dataset that the hub gives (Unknown split 'train')"
    )


DEEP = b"[" * 100_000
BROKEN = [
    (b"", "rows.jsonl: the file is empty"),
    (b"\n \n", "rows.jsonl: the file is empty"),
    (b"[]", "{path}: no rows"),
    (LINES + b'{"prompt" "Q"}\n', "rows.jsonl:4: not JSON: Expecting ':' delimiter (column 11)"),
    (LINES + b'{"prompt": NaN}\n', "rows.jsonl:4: not JSON: NaN is not JSON"),
    (LINES + b'{"prompt": -Infinity}\n', "rows.jsonl:4: not JSON: -Infinity is not JSON"),
    (LINES + b'{"prompt": ' + DEEP + b"}\n", "rows.jsonl:4: not JSON: nested too deep"),
    (LINES + b'{"prompt": "caf\xe9"}\n', "rows.jsonl:4: not UTF-8 (at byte 15 of the line), save it as UTF-8"),
    ("prompt".encode("utf-16"), "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8"),
    ("prompt".encode("utf-16-le"), "rows.jsonl:1: looks like UTF-16 (at byte 0), save it as UTF-8"),
    (b"{\n" + LINES[1:], "rows.jsonl:1: an object over several lines; rows are one object a line, or an array of objects"),
    (b"[\n" + LINES, "rows.jsonl:3: not JSON: Expecting ',' or ']' (column 1)"),
    (ARRAY[:-1] + b",]", f"rows.jsonl:1: not JSON: Expecting value (column {len(ARRAY) + 1})"),
    (ARRAY[:-1], f"rows.jsonl:1: not JSON: Expecting ',' or ']' (column {len(ARRAY)})"),
    (ARRAY + b"\n[]", "rows.jsonl:2: not JSON: Extra data after the array (column 1)"),
    (b'[\n{"prompt" "Q"}]', "rows.jsonl:2: not JSON: Expecting ':' delimiter (column 11)"),
    (b'[\n"caf\xe9"]', "rows.jsonl:2: not UTF-8 (at byte 6), save it as UTF-8"),
    (b"[\n" + DEEP, "rows.jsonl:2: not JSON: nested too deep"),
    (b"[\nNaN]", "rows.jsonl:2: not JSON: NaN is not JSON"),
    (b"\x1f\x8bnot gzip", "rows.jsonl: damaged gzip file (Unknown compression method)"),
    (gzip.compress(LINES, mtime=0)[:-6], "rows.jsonl: damaged gzip file (Compressed file ended before the end-of-stream marker was reached)"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(UserError) as caught:
        load_rows(path, expect=PAIR)
    assert str(caught.value) == message.replace("{path}", str(path))


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", b"PAR1 not really")
    with pytest.raises(UserError, match="^rows.parquet: damaged Parquet file"):
        load_rows(path, expect=PAIR)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", LINES)
    with pytest.raises(UserError) as caught:
        load_rows(str(tmp_path / "pair.jsonl"), expect=PAIR)
    assert str(caught.value) == f"{tmp_path}/pair.jsonl: no such file (did you mean pairs.jsonl?)"
    with pytest.raises(UserError, match=f"no such file, nor is its folder {tmp_path}/nowhere$"):
        load_rows(tmp_path / "nowhere" / "pairs.jsonl", expect=PAIR)


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data files in this folder"):
        load_rows(tmp_path, expect=PAIR)


BAD = b'{"prompt": "Q", "chosen": "A"}\n'
MISSING = "rows.jsonl:{}: rejected: missing (fields: prompt, chosen)"


@pytest.mark.parametrize(
    ("bad_rows", "more"),
    [(1, ""), (2, " (and 1 more bad row; --skip-bad sets them aside)"), (3, " (and 2 more bad rows; --skip-bad sets them aside)")],
)  # fmt: skip
def test_the_first_bad_row_is_told_and_the_others_counted(tmp_path: Path, bad_rows: int, more: str) -> None:
    path = write(tmp_path / "rows.jsonl", LINES + BAD * bad_rows)
    with pytest.raises(UserError) as caught:
        load_rows(path, expect=PAIR)
    assert str(caught.value) == MISSING.format(4) + more


def test_bad_rows_are_set_aside_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", BAD + LINES + b"{oops\n")
    aside = tmp_path / "new" / "bad.jsonl"
    loaded = load_rows(path, expect=PAIR, skip_bad=aside)
    assert ([r.index for r in loaded.rows], loaded.skipped) == ([1, 2, 3], 2)
    first, second = (json.loads(line) for line in aside.read_text().splitlines())
    assert first == {"where": "rows.jsonl:1", "error": MISSING.format(1), "row": BAD.decode().strip()}
    assert second == {
        "where": "rows.jsonl:5",
        "error": "rows.jsonl:5: not JSON: Expecting property name enclosed in double quotes (column 2)",
        "row": "{oops",
    }


def test_nothing_is_written_where_all_rows_are_good(tmp_path: Path) -> None:
    loaded = load_rows(write(tmp_path / "rows.jsonl", LINES), expect=PAIR, skip_bad=tmp_path / "bad.jsonl")
    assert (loaded.skipped, (tmp_path / "bad.jsonl").exists()) == (0, False)


def test_no_good_row_is_an_error_also_where_bad_ones_are_skipped(tmp_path: Path) -> None:
    aside = tmp_path / "bad.jsonl"
    with pytest.raises(UserError) as caught:
        load_rows(write(tmp_path / "rows.jsonl", BAD * 2), expect=PAIR, skip_bad=aside)
    assert str(caught.value) == f"no good row remains: 2 bad (the first: {MISSING.format(1)})"
    assert not aside.exists()


def test_split_off_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps(row(k)) + "\n" for k in range(50)).encode())
    rows = load_rows(path, expect=PAIR).rows
    train, held_out = split_off(rows, 10, seed=1)
    places = [[r.index for r in part] for part in (train, held_out)]
    assert [len(part) for part in places] == [40, 10]
    assert all(part == sorted(part) for part in places)
    assert sorted(places[0] + places[1]) == list(range(50))
    assert split_off(rows, 10, seed=1) == (train, held_out)
    assert split_off(rows, 10, seed=2)[1] != held_out


@pytest.mark.parametrize("eval_rows", [0, 3, 4])
def test_split_off_leaves_rows_on_both_sides(tmp_path: Path, eval_rows: int) -> None:
    rows = load_rows(write(tmp_path / "rows.jsonl", LINES), expect=PAIR).rows
    with pytest.raises(UserError, match=f"^eval_rows: {eval_rows} of 3 rows"):
        split_off(rows, eval_rows, seed=0)


@pytest.mark.parametrize(
    ("name", "expect", "count", "read_as"),
    [("dpo_en_demo.json", Shape.pair, 299, "ShareGPT"), ("alpaca_en_demo.json", Shape.demonstration, 999, "Alpaca")],
)
def test_real_files(shared: Path, name: str, expect: Shape, count: int, read_as: str) -> None:
    """The counts stand in SOURCES.md beside the files."""
    loaded = load_rows(shared / "data" / name, expect={expect})
    assert (len(loaded.rows), loaded.conversions) == (count, {read_as: count})
    assert len(load_rows(shared / "data" / name, expect={Shape.prompts}).rows) == count


def test_reading_json_needs_neither_torch_nor_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        assert name.partition(".")[0] not in ("torch", "transformers", "datasets", "pyarrow"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert len(prompts(write(tmp_path / "rows.jsonl", LINES))) == 3
