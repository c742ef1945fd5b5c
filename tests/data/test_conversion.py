"""Rows of one shape as rows of another: which answers meet, what becomes of ties, and that nothing is lost unsaid."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.data.conversion import (
    ALONE,
    AT_THRESHOLD,
    BETWEEN,
    NOT_BEST,
    NOT_GOOD,
    REPEATED,
    TIED,
    TOO_NEAR,
    Conversion,
    convert,
)
from lowrank_align.data.formats import parse_row
from lowrank_align.errors import UserError

SCORES = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 3.0}
SCORED = [{"prompt": "p", "completion": text, "score": score} for text, score in SCORES.items()]


def turn(content: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def converted(rows: list[dict[str, Any]], to: Any, **options: Any) -> Conversion:
    done = convert([parse_row(row, f"rows:{i + 1}", i) for i, row in enumerate(rows)], to, **options)
    for line in done.lines:
        parse_row(line, "line", 0)  # whatever is written can be read
    return done


def pairs_of(done: Conversion) -> list[tuple[str, str, float | None]]:
    return [(line["chosen"], line["rejected"], line.get("preference")) for line in done.lines]


def reasons(done: Conversion) -> dict[str, int]:
    return {reason: count for reason, count in done.left_out.items() if count}


def test_best_against_worst() -> None:
    """b and d share the best score, 3: the first of them, b, against the worst, a."""
    done = converted([*SCORED, {"prompt": "q", "completion": "a", "score": 9.0}], "pairs")
    assert (pairs_of(done), done.groups) == ([("b", "a", None)], 2)
    assert reasons(done) == {ALONE: 1}


def test_all_pairs_with_and_without_ties() -> None:
    """Of 4 answers 6 pairs, of which b-d is a tie; sorted by score b d c a."""
    expected = [("b", "c", None), ("b", "a", None), ("d", "c", None), ("d", "a", None), ("c", "a", None)]
    done = converted(SCORED, "pairs", pairing="all")
    assert (pairs_of(done), reasons(done)) == (expected, {TIED: 1})
    kept = converted(SCORED, "pairs", pairing="all", keep_ties=True)
    assert (pairs_of(kept), reasons(kept)) == ([("b", "d", 0.5), *expected], {})


def test_pairs_that_are_too_near() -> None:
    """Only 3 - 1 is at least 2: b-a and d-a; three pairs differ by 1."""
    done = converted(SCORED, "pairs", pairing="all", min_difference=2.0)
    assert pairs_of(done) == [("b", "a", None), ("d", "a", None)]
    assert reasons(done) == {TIED: 1, TOO_NEAR: 3}


def test_a_ranking_has_all_answers_and_equal_ranks_for_equal_scores() -> None:
    """b and d are first, c third (two are better), a fourth (three are better)."""
    (line,) = converted(SCORED, "rankings").lines
    assert line == {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [4, 1, 3, 1]}


def test_labels_above_and_below_a_threshold() -> None:
    done = converted(SCORED, "unpaired", threshold=2.0)
    assert [(line["completion"], line["label"]) for line in done.lines] == [("a", False), ("b", True), ("d", True)]
    assert reasons(done) == {AT_THRESHOLD: 1}


def test_demonstrations_are_the_best_or_all_that_are_good() -> None:
    best, good = converted(SCORED, "demonstrations"), converted(SCORED, "demonstrations", threshold=1.5)
    assert (best.lines, reasons(best)) == ([{"prompt": "p", "completion": "b"}], {NOT_BEST: 3})
    assert [line["completion"] for line in good.lines] == ["b", "c", "d"]
    assert reasons(good) == {NOT_GOOD: 1}


def test_an_answer_scored_twice_counts_once_with_its_mean() -> None:
    """x has 1 and 4, so 2.5, which is less than y's 3."""
    rows = [{"prompt": "p", "completion": t, "score": s} for t, s in (("x", 1.0), ("y", 3.0), ("x", 4.0))]
    done = converted(rows, "pairs")
    assert (pairs_of(done), reasons(done)) == ([("y", "x", None)], {REPEATED: 1})


def test_rankings_of_one_prompt_are_not_mixed() -> None:
    """Rank 1 is best; a threshold is a rank, and better than rank 2 is rank 1."""
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]},
        {"prompt": "p", "completions": ["c", "d"], "ranks": [1, 2]},
    ]
    assert pairs_of(converted(rows, "pairs")) == [("b", "c", None), ("c", "d", None)]
    labels = converted(rows, "unpaired")
    assert [(line["completion"], line["label"]) for line in labels.lines] == [
        ("b", True),
        ("c", False),
        ("c", True),
        ("d", False),
    ]
    assert reasons(labels) == {BETWEEN: 1}
    good = converted(rows, "demonstrations", threshold=2)
    assert [line["completion"] for line in good.lines] == ["b", "c"]


def test_labels_of_pairs_are_the_majority_of_their_comparisons() -> None:
    """a wins both, b wins one of two (a half: neither), c and d lose; the tie says nothing of e and f."""
    compared = [("a", "b"), ("a", "c"), ("b", "d")]
    rows: list[dict[str, Any]] = [{"prompt": "p", "chosen": x, "rejected": y} for x, y in compared]
    rows.append({"prompt": "q", "chosen": "e", "rejected": "f", "preference": 0.5})
    labels = converted(rows, "unpaired")
    assert [(line["completion"], line["label"]) for line in labels.lines] == [("a", True), ("c", False), ("d", False)]
    assert reasons(labels) == {AT_THRESHOLD: 3}
    assert [line["completion"] for line in converted(rows, "demonstrations").lines] == ["a"]


def test_good_and_bad_answers_of_a_prompt_make_pairs() -> None:
    rows = [{"prompt": "p", "completion": text, "label": text in "ab"} for text in "abc"]
    assert pairs_of(converted(rows, "pairs", pairing="all")) == [("a", "c", None), ("b", "c", None)]
    assert [line["completion"] for line in converted(rows, "demonstrations").lines] == ["a", "b"]


def test_messages_columns_and_cut_answers_are_kept() -> None:
    """What both rows say alike stays; of what differs (tag) there is no one value. One answer was cut, so no end."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    common = {"prompt": turn("hi", "user"), "tools": tools, "chat_template_kwargs": {"x": 1}, "source": "web"}
    rows = [
        {**common, "completion": turn("good"), "score": 2, "tag": "u"},
        {**common, "completion": turn("bad"), "score": 1, "tag": "v", "finished": False},
    ]
    assert converted(rows, "pairs").lines == [
        {**common, "chosen": turn("good"), "rejected": turn("bad"), "finished": False}
    ]
    assert converted(rows, "demonstrations").lines == [{**common, "completion": turn("good")}]


@pytest.mark.parametrize(
    ("rows", "to", "error"),
    [
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b"}],
            "rankings",
            "f: rows of shape pair cannot become rankings; they become unpaired or demonstrations; rankings are made "
            "of scored rows or unpaired rows",
        ),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b"}],
            "pairs",
            "f: these are pairs already: they become unpaired or demonstrations; train with them as they are",
        ),
        (
            [{"prompt": "p", "completion": "a"}],
            "unpaired",
            "f: rows of shape demonstration cannot become unpaired; unpaired are made of scored rows or ranking rows "
            "or pair rows",
        ),
        (
            [SCORED[0], {"prompt": "p"}],
            "pairs",
            "f: rows of several shapes (prompts, scored); convert each in a file of its own",
        ),
        (SCORED, "unpaired", "--threshold: missing; scores above it become good answers, those below it bad ones"),
    ],
)
def test_what_cannot_be_made(rows: list[dict[str, Any]], to: str, error: str) -> None:
    with pytest.raises(UserError) as raised:
        converted(rows, to, source="f")
    assert str(raised.value) == error


def test_the_command(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*SCORED, {"prompt": "p"}]))
    argv = ("data", "convert", "scored.jsonl", "--to", "pairs", "--out", "new/pairs.jsonl")
    assert command(*argv).err == (
        "error: scored.jsonl: rows of several shapes (prompts, scored); convert each in a file of its own\n"
    )
    Path("scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SCORED) + "{\n")
    outcome = command(*argv, "--skip-bad", "--pairing", "all")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == (
        "scored.jsonl: 4 scored rows, 1 group of answers\n"
        "scored.jsonl: 1 bad, set aside in scored.jsonl.bad.jsonl\n"
        "new/pairs.jsonl: 5 lines\n"
        "  1 left out: a tie\n"
    )
    lines = [json.loads(line) for line in Path("new/pairs.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": "p", "chosen": "b", "rejected": "c"}
    again = command(*argv, "--skip-bad")
    assert (again.code, again.err) == (2, "error: new/pairs.jsonl: exists; --overwrite replaces it\n")
    nothing = command(*argv, "--skip-bad", "--overwrite", "--min-difference", "5")
    assert nothing.err == "error: scored.jsonl: nothing to write as pairs; 1 left out: nearer than min_difference\n"
