"""`lowrank-align data`: rows into the store, rows out of it, and its figures, as one gives the commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.config import DATA_COMMANDS
from lowrank_align.store import Completion, Judgement, Record, Store

Command = Callable[..., Any]

ROWS = [
    {"prompt": "p1", "chosen": "good", "rejected": "bad"},
    {"prompt": "p1", "chosen": "bad", "rejected": "good"},
    {"prompt": "p2", "chosen": "good", "rejected": "bad", "preference": 0.5, "annotator": "ben"},
    {"prompt": "p3", "completion": "fine", "label": True},
    {"instruction": "q", "output": "a"},
    {"prompt": "p4"},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `rows.jsonl`."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture
def imported(command: Command) -> None:
    assert command("data", "import", "rows.jsonl", "--store", "votes.db").code == 0


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", DATA_COMMANDS)
def test_help_documents_every_setting(name: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    outcome = command("data", name, "--help")
    said = " ".join(outcome.out.split())
    for field, info in DATA_COMMANDS[name].model_fields.items():
        positional = field in ("file", "kind")
        flag = field if positional else f"--{'json' if field == 'as_json' else field.replace('_', '-')}"
        assert flag in said
        assert " ".join(str(info.description).split()) in said


def test_import_says_what_came_of_the_rows(command: Command) -> None:
    assert command("data", "import", "rows.jsonl", "--store", "new/votes.db") == (
        0,
        "rows.jsonl: 1 rows read as Alpaca\n"
        "rows.jsonl: 5 judgements and 1 prompt added\n"
        "new/votes.db: 5 judgements, 1 prompt\n",
        "",
    )
    assert command("data", "import", "rows.jsonl", "--store", "new/votes.db").out == (
        "rows.jsonl: 1 rows read as Alpaca\n"
        "rows.jsonl: nothing added\n"
        "rows.jsonl: 6 there already\n"
        "new/votes.db: 5 judgements, 1 prompt\n"
    )


def test_bad_rows_stop_it_or_are_set_aside(command: Command) -> None:
    with Path("rows.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": "c"}\n')
    outcome = command("data", "import", "rows.jsonl", "--store", "votes.db")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: rows.jsonl:7: rejected: missing (fields: prompt, chosen)\n"
    outcome = command("data", "import", "rows.jsonl", "--store", "votes.db", "--skip-bad", "--annotator", "ann")
    assert outcome.code == 0
    assert "rows.jsonl: 1 bad, set aside in rows.jsonl.bad.jsonl\n" in outcome.out
    assert lines("rows.jsonl.bad.jsonl")[0]["where"] == "rows.jsonl:7"
    with Store("votes.db") as store:
        assert store.annotators() == ["ann", "ben"]


def test_export_writes_rows_and_says_what_is_left_out(imported: None, command: Command) -> None:
    outcome = command("data", "export", "pairs", "--store", "votes.db", "--out", "out/pairs.jsonl")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        "out/pairs.jsonl: 3 lines\n"
        "  1 left out: liked or disliked (in unpaired)\n"
        "  1 left out: a demonstration (in demonstrations)\n"
    )
    assert [row["chosen"] for row in lines("out/pairs.jsonl")] == ["good", "bad", "good"]
    assert [row.get("preference") for row in lines("out/pairs.jsonl")] == [None, None, 0.5]


def test_every_export_comes_back_into_another_store(imported: None, command: Command) -> None:
    for kind in ("pairs", "unpaired", "demonstrations", "prompts"):
        assert command("data", "export", kind, "--store", "votes.db", "--out", f"{kind}.jsonl").code == 0
        assert command("data", "import", f"{kind}.jsonl", "--store", "other.db").code == 0
    with Store("votes.db") as store, Store("other.db") as other:
        assert {e.record.id: e for e in other.entries()} == {e.record.id: e for e in store.entries()}
        assert [p.prompt for p in other.queued()][:4] == ["p4", "p1", "p2", "p3"]  # the queue, then the records


def test_export_of_one_annotator(imported: None, command: Command) -> None:
    words = ("data", "export", "pairs", "--store", "votes.db", "--out", "pairs.jsonl", "--annotator", "ben")
    assert command(*words).out == "pairs.jsonl: 1 line\n"


def test_an_older_file_is_replaced_only_when_asked(imported: None, command: Command) -> None:
    Path("pairs.jsonl").write_text("precious")
    words = ("data", "export", "pairs", "--store", "votes.db", "--out", "pairs.jsonl")
    assert command(*words) == (2, "", "error: pairs.jsonl: exists; --overwrite replaces it\n")
    assert Path("pairs.jsonl").read_text() == "precious"
    assert command(*words, "--overwrite").code == 0
    assert len(lines("pairs.jsonl")) == 3


def test_nothing_to_export_writes_no_file(imported: None, command: Command) -> None:
    outcome = command("data", "export", "rankings", "--store", "votes.db", "--out", "rankings.jsonl")
    assert outcome.code == 2
    assert outcome.err == (
        "error: votes.db: nothing to write as rankings; "
        "2 left out: a preference (in pairs); 1 left out: a tie (in pairs); "
        "1 left out: liked or disliked (in unpaired); 1 left out: a demonstration (in demonstrations)\n"
    )
    assert not Path("rankings.jsonl").exists()


def test_export_while_another_process_has_the_store_open(imported: None, command: Command) -> None:
    with Store("votes.db") as store:
        store.note("open", True)
        assert command("data", "export", "pairs", "--store", "votes.db", "--out", "pairs.jsonl").code == 0
        record = Record("pair", "p", (Completion("a"), Completion("b")))
        store.add(record)
        assert store.judge(record.id, "ann", Judgement("tie")) == 1


def test_backup_copies_the_store_and_replaces_nothing(imported: None, command: Command) -> None:
    words = ("data", "backup", "--store", "votes.db", "--out", "safe/votes.db")
    assert command(*words) == (0, "safe/votes.db: 5 judgements, 1 prompt\n", "")
    with Store("votes.db") as store, Store("safe/votes.db", create=False) as copied:
        assert copied.entries() == store.entries()
    refused = "error: safe/votes.db: exists, and a backup replaces nothing; name another file with --out\n"
    assert command(*words) == (2, "", refused)
    assert command("data", "backup", "--store", "votes.db", "--out", "safe").code == 2
    assert command("data", "backup", "--store", "vote.db", "--out", "x").err.startswith("error: vote.db: no such store")
    assert not Path("x").exists()


def test_stats_as_a_table(imported: None, command: Command) -> None:
    """Of five: three preferred or tied (one of them a tie), one contradiction, which is a duplicate too; the longer
    answer won once of twice."""
    outcome = command("data", "stats", "--store", "votes.db")
    table = {line[:27].strip(): line[27:].strip() for line in outcome.out.splitlines()}
    assert outcome.code == 0
    assert table == {
        "judgements": "5",
        "by verdict": "2 preferred, 1 tie, 1 liked, 1 demonstration",
        "by kind": "3 pair, 1 rating, 1 demonstration",
        "by annotator": "4 import, 1 ben",
        "ties": "33 % of 3 (6-79 %)",
        "the longer one was chosen": "50 % of 2 (9-91 %)",
        "duplicates": "1",
        "contradictions": "1",
        "prompts in the queue": "1",
    }


def test_stats_as_json_and_of_one_annotator(imported: None, command: Command) -> None:
    found = json.loads(command("data", "stats", "--store", "votes.db", "--json").out)
    assert (found["entries"], found["contradictions"], found["left_side"]["rate"]) == (5, 1, None)
    found = json.loads(command("data", "stats", "--store", "votes.db", "--json", "--annotator", "ben").out)
    assert (found["entries"], found["queue_left"]) == (1, 1)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["data"], "required: WHAT"),
        (["data", "import", "--store", "s.db"], "required: file"),
        (["data", "import", "rows.jsonl"], "store: missing; give --store"),
        (["data", "import", "rows.json", "--store", "s.db"], "no such file (did you mean rows.jsonl?)"),
        (["data", "export", "pears", "--store", "s.db", "--out", "x"], "kind: input should be 'pairs'"),
        (["data", "export", "pairs", "--store", "s.db"], "out: missing; give --out"),
        (["data", "export", "pairs", "--store", "s.db", "--out", "x"], "s.db: no such store"),
        (["data", "export", "pairs", "--store", "s.db", "--out", "."], "is a folder"),
        (["data", "stats", "--store", "s.db"], "s.db: no such store"),
        (["data", "stats", "--store", "rows.jsonl"], "rows.jsonl: not a store"),
        (["data", "stats", "--stores", "s.db"], "--stores: no such flag (did you mean --store?)"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], problem: str, command: Command) -> None:
    outcome = command(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert problem in outcome.err and outcome.err.count("\n") == 1
    assert not Path("x").exists()


def test_a_failed_import_leaves_no_store_that_looks_full(command: Command) -> None:
    Path("rows.jsonl").write_text("{\n")
    assert command("data", "import", "rows.jsonl", "--store", "votes.db").code == 2
    with Store("votes.db") as store:
        assert (store.count(), store.queue_total()) == (0, 0)
