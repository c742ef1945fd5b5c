"""Looking through the store and changing entries, as the Data tab does, without a browser."""

import gzip
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Judgement, Record, Stale, Store
from lowrank_align.studio import browsing
from lowrank_align.studio.browsing import DELETED, Wanted, check_upload, choices, export_name, listing
from lowrank_align.studio.entry_form import Change, details, save
from lowrank_align.studio.entry_words import conversation, short, verdicts_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "studio.db") as found:
        yield found


def kept(store: Store, judgement: Judgement, *texts: str, who: str = "me", **fields: Any) -> Record:
    """A record with those answers, and what `who` says of it."""
    given: dict[str, Any] = {"kind": "pair", "prompt": "why?", "completions": tuple(map(Completion, texts))}
    record = Record(**(given | fields))
    store.add(record)
    store.judge(record.id, who, judgement)
    return record


FIRST = Judgement("preferred", ranks=(1.0, 2.0))


def test_a_thousand_entries_are_listed_fifty_at_a_time_newest_first(store: Store) -> None:
    """1,003 entries are 20 full pages and one of 3, whose last row is the oldest entry."""
    with store.batch():
        for n in range(1003):
            kept(store, FIRST, "yes", "no", prompt=f"question {n}")
    first = listing(store, Wanted())
    assert (len(first.rows), first.page, first.pages, first.total) == (50, 1, 21, 1003)
    assert (first.in_words, first.rows[0][4], first.rows[49][4]) == ("1-50 of 1,003", "question 1002", "question 953")
    last = listing(store, Wanted(), page=99)
    assert (last.page, len(last.rows), last.in_words) == (21, 3, "1,001-1,003 of 1,003")
    assert (last.rows[-1][0], last.rows[-1][4]) == ("1003", "question 0")
    assert listing(store, Wanted(), page=-5).page == 1
    assert listing(store, Wanted(text="QUESTION 77")).total == 11  # 77 and 770 to 779


def test_rows_say_what_was_decided_by_the_sides_that_were_shown(store: Store) -> None:
    """Completion 0 is the better one and stood on the right: B."""
    record = kept(
        store,
        Judgement("preferred", ranks=(1.0, 2.0), tags=("short", "kind"), edits={0: "mended"}),
        "first",
        "second\nline",
        shown=(1, 0),
        prompt=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}],
    )
    found = listing(store, Wanted())
    (row,) = found.rows
    assert row[:1] + row[2:] == [
        "1",
        "pair",
        "B is better (mended)",
        "why?",
        "A: second line | B: mended",
        "short, kind",
        "me",
    ]
    assert found.keys == [(record.id, "me")]


def test_filters(store: Store) -> None:
    tie = kept(store, Judgement("tie", ranks=(1.0, 1.0), tags=("dull",)), "a", "b")
    other = kept(store, FIRST, "a", "b", who="ada", kind="battle")
    gone = kept(store, Judgement("bad", reason="both wrong"), "a", "b")
    store.delete(gone.id, "me", expected_version=1)

    def ids(**wanted: str) -> set[str]:
        return {record_id for record_id, _ in listing(store, Wanted(**wanted)).keys}

    assert ids() == {tie.id, other.id}
    assert ids(verdict="tie") == ids(tag="dull") == ids(annotator="me") == {tie.id}
    assert ids(kind="battle") == ids(annotator="ada") == {other.id}
    assert ids(kept=DELETED) == ids(kept=DELETED, text="WRONG") == {gone.id}
    assert ids(annotator="ada", verdict="tie") == set()
    assert listing(store, Wanted(text="nowhere")).in_words == "nothing"
    assert choices(store) == (["any", "ada", "me"], ["any", "dull"])


def test_details_tell_everything(store: Store) -> None:
    record = kept(
        store,
        Judgement("preferred", ranks=(2.0, 1.0), strength=3, reason="clearer", seconds=2.5),
        "first",
        "second",
        shown=(1, 0),
        completions=(Completion("first", "base", sampling={"temperature": 0.7}), Completion("second", "dpo")),
        versions={"base": "org/model"},
    )
    found = details(store, record.id, "me")
    assert [(answer.side, answer.title, answer.text) for answer in found.answers] == [
        ("A", "A · dpo · place 1", "second"),
        ("B", "B · base · temperature 0.7 · place 2", "first"),
    ]
    assert (found.verdict, found.strength, found.reason, found.version) == ("A is better", "by far", "clearer", 1)
    assert found.verdicts == ["A is better", "B is better", "a tie", "both bad", "skipped"]
    assert "decided in 2.5 s" in found.about and "base model" in found.about and record.id in found.about
    assert [step[:1] + step[2:] for step in found.history] == [["1", "vote", "A is better", "clearer"]]
    assert (found.ordered, found.scored, found.deleted) == (False, False, False)
    store.undo(record.id, "me", expected_version=1)
    with pytest.raises(UserError, match="taken back meanwhile"):
        details(store, record.id, "me")


def test_saving_a_form_keeps_the_history_and_what_the_form_does_not_show(store: Store) -> None:
    """B stood for completion 0; its text is mended, and it becomes the better one."""
    record = kept(
        store, Judgement("preferred", ranks=(2.0, 1.0), seconds=4.0, preference=0.2), "first", "second", shown=(1, 0)
    )
    change = Change("B is better", strength="slightly", reason=" nicer ", tags="a, b,a ,", answers=["second", "First!"])
    assert save(store, record.id, "me", 1, change) == 2
    entry = store.entry(record.id, "me")
    assert entry is not None
    assert entry.judgement == Judgement(
        "preferred", ranks=(1.0, 2.0), strength=1, reason="nicer", tags=("a", "b"), edits={0: "First!"}, seconds=4.0
    )
    assert [event.kind for event in store.history(record.id, "me")] == ["vote", "edit"]
    with pytest.raises(Stale):  # another page still shows version 1
        save(store, record.id, "me", 1, Change("a tie"))
    assert save(store, record.id, "me", 2, change) == 2  # nothing has changed: no new version
    assert save(store, record.id, "me", 2, Change("B is better", answers=["second", "first"])) == 3
    entry = store.entry(record.id, "me")
    assert entry is not None and entry.judgement == Judgement("preferred", ranks=(1.0, 2.0), seconds=4.0)


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("A is better", Judgement("preferred", ranks=(1.0, 2.0))),
        ("a tie", Judgement("tie", ranks=(1.0, 1.0))),
        ("both bad", Judgement("bad")),
        ("skipped", Judgement("skip")),
    ],
)
def test_every_verdict_of_a_pair(store: Store, verdict: str, expected: Judgement) -> None:
    record = kept(store, Judgement("preferred", ranks=(2.0, 1.0)), "first", "second")
    save(store, record.id, "me", 1, Change(verdict))
    entry = store.entry(record.id, "me")
    assert entry is not None and entry.judgement == expected
    assert details(store, record.id, "me").verdict == verdict


def test_an_unchanged_soft_label_stays(store: Store) -> None:
    record = kept(store, Judgement("preferred", ranks=(1.0, 2.0), preference=0.8), "first", "second")
    save(store, record.id, "me", 1, Change("A is better", reason="why not"))
    entry = store.entry(record.id, "me")
    assert entry is not None and entry.judgement.preference == 0.8


def test_an_order_of_three(store: Store) -> None:
    """Shown as c, a, b; ranks by completion a 2, b 2, c 1 are `1 2=3` by side. `3 1=2` makes b the best."""
    given = Judgement("ranked", ranks=(2.0, 2.0, 1.0))
    record = kept(store, given, "a", "b", "c", kind="ranking", shown=(2, 0, 1))
    found = details(store, record.id, "me")
    assert (found.order, found.ordered, found.verdict) == ("1 2=3", True, "in an order")
    assert found.verdicts == ["in an order", "all bad", "skipped"]
    assert listing(store, Wanted()).rows[0][3] == "order 1 2=3"
    save(store, record.id, "me", 1, Change("in an order", order="3 1=2"))
    entry = store.entry(record.id, "me")
    assert entry is not None and entry.judgement.ranks == (2.0, 1.0, 2.0)
    with pytest.raises(UserError, match="name each answer"):
        save(store, record.id, "me", 2, Change("in an order", order="1 2"))
    save(store, record.id, "me", 2, Change("all bad"))
    assert details(store, record.id, "me").verdict == "all bad"


def test_thumbs_scores_and_demonstrations(store: Store) -> None:
    thumb = kept(store, Judgement("liked"), "answer", kind="rating")
    assert verdicts_of(thumb) == ["liked", "disliked", "skipped"]
    save(store, thumb.id, "me", 1, Change("disliked"))
    assert listing(store, Wanted(verdict="disliked")).total == 1
    scored = kept(store, Judgement("scored", score=1.5), "answer", kind="scored")
    assert (details(store, scored.id, "me").score, details(store, scored.id, "me").scored) == ("1.5", True)
    save(store, scored.id, "me", 1, Change("scored", score="-2"))
    entry = store.entry(scored.id, "me")
    assert entry is not None and entry.judgement.score == -2.0
    for wrong in ("", "high", "nan", "inf"):
        with pytest.raises(UserError, match="^score: "):
            save(store, scored.id, "me", 2, Change("scored", score=wrong))
    shown = kept(store, Judgement("demonstration"), "answer", kind="demonstration")
    assert details(store, shown.id, "me").verdict == "a demonstration"
    with pytest.raises(UserError, match="verdict: liked; choose one of a demonstration"):
        save(store, shown.id, "me", 1, Change("liked"))
    save(store, shown.id, "me", 1, Change("a demonstration", answers=["better answer"]))
    assert details(store, shown.id, "me").answers[0].text == "better answer"


def test_conversations_as_they_read() -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": " hi "}]
    assert conversation(turns) == "system: be kind\n\nuser: hi"
    assert conversation(turns[1:]) == " hi "
    assert conversation("plain") == "plain"
    assert (short("a  b\nc"), short("x" * 81), len(short("x" * 81))) == ("a b c", "x" * 77 + "...", 80)


def test_uploads_are_data_and_not_too_large_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "UNPACKED_BYTES", 2**20)
    for name in ("rows.jsonl", "ROWS.JSON", "rows.parquet"):
        assert check_upload(tmp_path / name) == tmp_path / name
    for name in ("rows.pkl", "rows.py", "rows.csv", "rows.jsonl.exe", "rows"):
        with pytest.raises(UserError, match=f"^{name}: cannot be imported"):
            check_upload(tmp_path / name)
    fits, bomb, broken = (tmp_path / f"{name}.jsonl.gz" for name in ("fits", "bomb", "broken"))
    fits.write_bytes(gzip.compress(b"0" * 2**20))
    bomb.write_bytes(gzip.compress(b"0" * (2**20 + 1)))
    broken.write_bytes(b"\x1f\x8b nothing")
    assert check_upload(fits) == fits
    with pytest.raises(UserError, match="bomb.jsonl.gz: more than 1 MB unpacked"):
        check_upload(bomb)
    with pytest.raises(UserError, match="broken.jsonl.gz: cannot be unpacked"):
        check_upload(broken)


def test_an_export_is_called_after_its_store_kind_and_time(store: Store) -> None:
    assert export_name(store, "pairs", datetime(2026, 1, 31, 18, 5)) == "studio-pairs-2026-01-31-1805.jsonl"
