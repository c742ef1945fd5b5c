"""Which rows an entry becomes, and what is said of those that become none. Expected rows are written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Judgement, Record, Store
from lowrank_align.store.export import COLUMN, EXPORTS, entry_of, export_lines

Added = Callable[..., Record]

FIRST = (1.0, 2.0)
SECOND = (2.0, 1.0)


@pytest.fixture
def rows(store: Store, added: Added) -> Callable[..., Any]:
    """The rows of one record, `yes` and `no` after `Why?`, under one judgement, without `record`; or why none."""

    def rows_of(shape: str, judgement: Judgement, *answers: Any, **fields: Any) -> Any:
        record = added(*answers, **fields)
        store.judge(record.id, "ann", judgement)
        export = export_lines(store, shape)
        assert all(entry_of(line[COLUMN]) == store.entry(record.id, "ann") for line in export.lines)
        if not export.lines:
            (reason,) = export.left_out
            assert export.left_out[reason] == 1
            return reason
        assert export.left_out == {}
        return [{name: value for name, value in line.items() if name != COLUMN} for line in export.lines]

    return rows_of


def pair(chosen: Any, rejected: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "chosen": chosen, "rejected": rejected, **columns}


def labelled(completion: Any, label: bool) -> dict[str, Any]:
    return {"prompt": "Why?", "completion": completion, "label": label}


# ---- pairs


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        (Judgement("preferred", ranks=FIRST), [pair("yes", "no")]),
        (Judgement("preferred", ranks=SECOND), [pair("no", "yes")]),
        (Judgement("tie"), [pair("yes", "no", preference=0.5)]),
        (Judgement("ranked", ranks=(2.0, 2.0)), [pair("yes", "no", preference=0.5)]),
        (Judgement("preferred", ranks=FIRST, preference=0.8), [pair("yes", "no", preference=0.8)]),
        (Judgement("preferred", ranks=SECOND, preference=0.2), [pair("yes", "no", preference=0.2)]),
        # A soft label that the vote has overruled since says nothing any more.
        (Judgement("preferred", ranks=SECOND, preference=0.8), [pair("no", "yes", preference=1.0)]),
        (Judgement("tie", preference=0.8), [pair("yes", "no", preference=0.5)]),
        # Each edit is better than what it mends; the vote stays as it was.
        (Judgement("preferred", ranks=FIRST, edits={0: "yes!"}), [pair("yes", "no"), pair("yes!", "yes")]),
        (
            Judgement("tie", edits={1: "no!", 0: "yes!"}),
            [pair("yes", "no", preference=0.5), pair("yes!", "yes"), pair("no!", "no")],
        ),
        (Judgement("bad", edits={1: "no!"}), [pair("no!", "no")]),
        # A written answer is better than every shown one.
        (Judgement("bad", written="so"), [pair("so", "yes"), pair("so", "no")]),
        (
            Judgement("preferred", ranks=SECOND, edits={1: "no!"}, written="so"),
            [pair("no", "yes"), pair("no!", "no"), pair("so", "yes"), pair("so", "no")],
        ),
        # What changes nothing is no edit, what says nothing no answer.
        (Judgement("preferred", ranks=FIRST, edits={0: "yes", 1: " "}, written=" "), [pair("yes", "no")]),
        (Judgement("bad", written="yes"), [pair("yes", "no")]),
        (Judgement("bad"), "all bad (in unpaired)"),
        (Judgement("skip", edits={0: "yes!"}), "skipped"),
    ],
)
def test_pairs(judgement: Judgement, expected: Any, rows: Callable[..., Any]) -> None:
    assert rows("pairs", judgement) == expected


def test_a_battle_is_a_pair(rows: Callable[..., Any]) -> None:
    assert rows("pairs", Judgement("preferred", ranks=SECOND), kind="battle", shown=(1, 0)) == [pair("no", "yes")]


def test_the_side_an_answer_was_shown_on_changes_no_row(rows: Callable[..., Any]) -> None:
    assert rows("pairs", Judgement("preferred", ranks=FIRST), shown=(1, 0)) == [pair("yes", "no")]


def test_equal_and_empty_answers_cannot_be_trained(rows: Callable[..., Any]) -> None:
    assert rows("pairs", Judgement("preferred", ranks=FIRST), "same", "same") == "the answers are equal"


@pytest.mark.parametrize("empty", ["", " \n", [{"role": "assistant", "content": ""}]])
def test_an_empty_answer_cannot_be_trained(empty: Any, rows: Callable[..., Any]) -> None:
    assert rows("pairs", Judgement("preferred", ranks=FIRST), "yes", empty) == "an answer is empty"


def test_without_a_prompt_there_is_no_pair(rows: Callable[..., Any]) -> None:
    assert rows("pairs", Judgement("preferred", ranks=FIRST), prompt="") == "no prompt"


def test_messages_stay_messages_and_an_edit_mends_the_last(rows: Callable[..., Any]) -> None:
    asked = [{"role": "user", "content": "Why?"}]
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    told = {"role": "tool", "content": "42"}
    long, short = ([called, told, {"role": "assistant", "content": text}] for text in ("It is 42.", "42"))
    mended = [called, told, {"role": "assistant", "content": "42!"}]
    written = [{"role": "assistant", "content": "Forty-two."}]
    judgement = Judgement("preferred", ranks=SECOND, edits={1: "42!"}, written="Forty-two.")
    found = rows("pairs", judgement, long, short, prompt=asked, extra={"tools": [{"name": "f"}], "topic": "sums"})
    expected = [(short, long), (mended, short), (written, long), (written, short)]
    tools = {"tools": [{"name": "f"}]}
    assert found == [{"prompt": asked, "chosen": a, "rejected": b, **tools} for a, b in expected]


def test_a_cut_answer_trains_no_end(rows: Callable[..., Any]) -> None:
    """`finished` is false where one of the two was cut: then neither gets an end token."""
    judgement = Judgement("preferred", ranks=FIRST, edits={0: "yes!"})
    cut = Completion("no", finished=False)
    assert rows("pairs", judgement, "yes", cut) == [pair("yes", "no", finished=False), pair("yes!", "yes")]


def test_a_margin_belongs_to_the_vote(rows: Callable[..., Any]) -> None:
    judgement = Judgement("preferred", ranks=FIRST, edits={0: "yes!"})
    assert rows("pairs", judgement, extra={"margin": 0.5}) == [pair("yes", "no", margin=0.5), pair("yes!", "yes")]


# ---- rankings


@pytest.mark.parametrize(
    ("judgement", "completions", "ranks"),
    [
        (Judgement("ranked", ranks=(2.0, 1.0, 3.0)), ["a", "b", "c"], [2, 1, 3]),
        (Judgement("ranked", ranks=(1.0, 2.5, 2.5)), ["a", "b", "c"], [1, 2.5, 2.5]),
        (Judgement("tie"), ["a", "b", "c"], [1, 1, 1]),
        # Best first: b, then the edit of a, then a, then c.
        (Judgement("ranked", ranks=(2.0, 1.0, 3.0), edits={0: "a!"}), ["a", "b", "c", "a!"], [3, 1, 4, 2]),
        # The written one, the edit of b, then a and b, which are level, then c.
        (
            Judgement("ranked", ranks=(1.0, 1.0, 2.0), edits={1: "b!"}, written="w"),
            ["a", "b", "c", "b!", "w"],
            [3, 3, 4, 2, 1],
        ),
        (Judgement("bad", written="w"), ["a", "b", "c", "w"], [2, 2, 2, 1]),
        (Judgement("ranked", ranks=(2.0, 1.0, 3.0), edits={0: "b"}, written="c"), ["a", "b", "c"], [2, 1, 3]),
    ],
)
def test_rankings(judgement: Judgement, completions: list[str], ranks: list[float], rows: Callable[..., Any]) -> None:
    found = rows("rankings", judgement, "a", "b", "c", kind="ranking")
    assert found == [{"prompt": "Why?", "completions": completions, "ranks": ranks}]


def test_equal_answers_that_are_ranked_differently_are_left_out(rows: Callable[..., Any]) -> None:
    judgement = Judgement("ranked", ranks=(1.0, 2.0, 3.0))
    assert rows("rankings", judgement, "a", "b", "a", kind="ranking") == "equal answers, ranked differently"


def test_a_ranking_of_two_is_a_pair(rows: Callable[..., Any]) -> None:
    assert rows("rankings", Judgement("ranked", ranks=FIRST), kind="ranking") == "a preference (in pairs)"


def test_a_ranking_of_two_comes_out_as_a_pair(rows: Callable[..., Any]) -> None:
    assert rows("pairs", Judgement("ranked", ranks=SECOND), kind="ranking") == [pair("no", "yes")]


# ---- unpaired, demonstrations, scored


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        (Judgement("preferred", ranks=SECOND), [labelled("yes", False), labelled("no", True)]),
        (Judgement("bad"), [labelled("yes", False), labelled("no", False)]),
        (
            Judgement("bad", edits={0: "yes!"}, written="so"),
            [labelled("yes", False), labelled("no", False), labelled("yes!", True), labelled("so", True)],
        ),
        (Judgement("tie", edits={1: "no!"}), [labelled("no!", True)]),
        (Judgement("tie"), "a tie (in pairs)"),
        (Judgement("ranked", ranks=(1.0, 1.0)), "a tie (in pairs)"),
        (Judgement("skip"), "skipped"),
    ],
)
def test_unpaired(judgement: Judgement, expected: Any, rows: Callable[..., Any]) -> None:
    assert rows("unpaired", judgement) == expected


@pytest.mark.parametrize(("verdict", "label"), [("liked", True), ("disliked", False)])
def test_a_thumb_is_a_label(verdict: Any, label: bool, rows: Callable[..., Any]) -> None:
    assert rows("unpaired", Judgement(verdict), "yes", kind="rating") == [labelled("yes", label)]


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        (Judgement("preferred", ranks=SECOND), ["no"]),
        (Judgement("preferred", ranks=SECOND, edits={1: "no!"}), ["no!"]),  # in the place of what it mends
        (Judgement("preferred", ranks=SECOND, edits={0: "yes!"}), ["no", "yes!"]),
        (Judgement("bad", written="so"), ["so"]),
        (Judgement("tie"), "a tie (in pairs)"),
        (Judgement("bad"), "all bad (in unpaired)"),
    ],
)
def test_demonstrations(judgement: Judgement, expected: Any, rows: Callable[..., Any]) -> None:
    found = rows("demonstrations", judgement)
    assert found == (
        [{"prompt": "Why?", "completion": t} for t in expected] if isinstance(expected, list) else expected
    )


@pytest.mark.parametrize(
    ("judgement", "answers", "fields", "expected"),
    [
        (Judgement("liked"), ["yes"], {"kind": "rating"}, [{"prompt": "Why?", "completion": "yes"}]),
        (Judgement("disliked"), ["yes"], {"kind": "rating"}, "liked or disliked (in unpaired)"),
        (Judgement("demonstration"), ["yes"], {"prompt": ""}, [{"text": "yes"}]),
        (
            Judgement("demonstration"),
            [Completion("yes", finished=False)],
            {},
            [{"prompt": "Why?", "completion": "yes", "finished": False}],
        ),
        (
            Judgement("ranked", ranks=(2.0, 1.0, 1.0)),
            ["a", "b", "c"],
            {"kind": "ranking"},
            [{"prompt": "Why?", "completion": "b"}, {"prompt": "Why?", "completion": "c"}],
        ),
        (Judgement("scored", score=2.0), ["yes"], {"kind": "scored"}, "scored (in scored)"),
    ],
)
def test_demonstrations_of_other_records(
    judgement: Judgement, answers: list[Any], fields: dict[str, Any], expected: Any, rows: Callable[..., Any]
) -> None:
    fields = {"kind": "demonstration"} | fields
    assert rows("demonstrations", judgement, *answers, **fields) == expected


def test_a_whole_conversation_is_a_demonstration(rows: Callable[..., Any]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    found = rows("demonstrations", Judgement("demonstration"), turns, kind="demonstration", prompt=[])
    assert found == [{"messages": turns}]


def test_scores(rows: Callable[..., Any]) -> None:
    found = rows("scored", Judgement("scored", score=-1.5), "yes", kind="scored")
    assert found == [{"prompt": "Why?", "completion": "yes", "score": -1.5}]


# ---- prompts


def test_prompts_are_the_queue_and_those_of_all_records_each_once(store: Store, added: Added) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    store.enqueue(["a", "Why?"], "list.jsonl")
    added(prompt="Why?")
    record = added(prompt="b")
    store.judge(record.id, "ann", Judgement("skip"))
    added(talk, kind="demonstration", prompt=[])
    added("a text", kind="demonstration", prompt="")
    export = export_lines(store, "prompts")
    assert [line["prompt"] for line in export.lines] == ["a", "Why?", "b", talk[:1]]
    first = store.queued()[0]
    assert export.lines[0][COLUMN] == {"queued": {"id": first.id, "source": "list.jsonl", "extra": {}}}
    assert [COLUMN in line for line in export.lines] == [True, True, False, False]
    assert export.left_out == {"a text without a prompt": 1}
    assert [line["prompt"] for line in export_lines(store, "prompts", annotator="ann").lines] == ["b"]


# ---- what is left out


def test_everything_left_out_is_counted_by_why(store: Store, added: Added) -> None:
    """Nine records: one row; repeats, deleted, taken back, skipped, unjudged, and four that other exports have."""
    vote = Judgement("preferred", ranks=FIRST)
    judged = {
        name: added(f"{name}1", f"{name}2", **fields)
        for name, fields in {"kept": {}, "gone": {}, "back": {}, "skip": {}, "bad": {}, "never": {}}.items()
    }
    again = added("kept1", "kept2", repeat_of=judged["kept"].id)
    for record in (*(judged[name] for name in ("kept", "gone", "back")), again):
        store.judge(record.id, "ann", vote)
    store.delete(judged["gone"].id, "ann", expected_version=1)
    store.undo(judged["back"].id, "ann", expected_version=1)
    store.judge(judged["skip"].id, "ann", Judgement("skip"))
    store.judge(judged["bad"].id, "ann", Judgement("bad"))
    for kind, verdict in (("ranking", "ranked"), ("rating", "liked"), ("demonstration", "demonstration")):
        answers = ("1", "2", "3") if kind == "ranking" else ("1",)
        ranks = (1.0, 2.0, 3.0) if kind == "ranking" else None
        record = added(*answers, kind=kind)
        store.judge(record.id, "ann", Judgement(verdict, ranks=ranks))  # type: ignore[arg-type]
    export = export_lines(store, "pairs")
    assert [line["chosen"] for line in export.lines] == ["kept1"]
    assert export.left_out == {
        "shown again, to measure consistency": 1,
        "deleted": 1,
        "taken back": 1,
        "skipped": 1,
        "not judged yet": 1,
        "all bad (in unpaired)": 1,
        "a ranking (in rankings)": 1,
        "liked or disliked (in unpaired)": 1,
        "a demonstration (in demonstrations)": 1,
    }


def test_every_standing_judgement_is_in_the_export_that_is_named(store: Store, added: Added) -> None:
    """Follow the reasons: whatever pairs leave out with `(in X)`, X has."""
    for verdict, answers in (
        ("tie", ("a", "b")),
        ("bad", ("a", "b")),
        ("liked", ("a",)),
        ("disliked", ("a",)),
        ("demonstration", ("a",)),
        ("scored", ("a",)),
        ("ranked", ("a", "b", "c")),
        ("tie", ("a", "b", "c")),
        ("bad", ("a", "b", "c")),
    ):
        ranks = (1.0, 2.0, 3.0) if verdict == "ranked" else None
        record = added(*answers, kind="ranking")
        store.judge(record.id, verdict + str(len(answers)), Judgement(verdict, ranks=ranks, score=1.0))  # type: ignore[arg-type]
    for who in store.annotators():
        for kind in EXPORTS[:-1]:
            export = export_lines(store, kind, annotator=who)
            for reason in export.left_out:
                named = reason.rpartition("(in ")[2].removesuffix(")")
                assert export_lines(store, named, annotator=who).lines, (who, kind, reason)


def test_filters_choose_the_entries(store: Store, added: Added) -> None:
    record = added()
    store.judge(record.id, "ann", Judgement("preferred", ranks=FIRST, tags=("good",)))
    store.judge(record.id, "ben", Judgement("preferred", ranks=SECOND))
    assert [line["chosen"] for line in export_lines(store, "pairs").lines] == ["yes", "no"]
    assert [line["chosen"] for line in export_lines(store, "pairs", annotator="ben").lines] == ["no"]
    assert [line["chosen"] for line in export_lines(store, "pairs", tag="good").lines] == ["yes"]


def test_another_kind_is_one_line(store: Store) -> None:
    with pytest.raises(UserError, match=r"pair: nothing that can be exported \(did you mean pairs\?\)"):
        export_lines(store, "pair")


# ---- the column


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "duel"},
        {"annotator": " "},
        {"annotator": 3},
        {"judgement": {"verdict": "preferred"}},
        {"judgement": {"verdict": "tie", "edits": {"5": "x"}}},
        {"judgement": {"verdict": "tie", "reason": 3}},
        {"judgement": {"verdict": "tie", "mood": "good"}},
        {"completions": [{"content": 3}]},
        {"completions": "no"},
        {"id": "../../x"},
        {"mood": "good"},
        {"version": "x"},
        {"extra": {"n": float("inf")}},
    ],
)
def test_a_damaged_column_is_not_believed(change: dict[str, Any], store: Store, added: Added) -> None:
    record = added()
    store.judge(record.id, "ann", Judgement("tie"))
    (line,) = export_lines(store, "pairs").lines
    assert entry_of(line[COLUMN]) is not None
    assert entry_of(line[COLUMN] | change) is None


@pytest.mark.parametrize("column", [None, 3, "text", [], {}])
def test_another_projects_column_of_that_name_is_no_entry(column: Any) -> None:
    assert entry_of(column) is None
