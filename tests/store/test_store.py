"""What the store does: votes with versions, taking back, deleting, filters, the queue, notes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Enqueued, Judgement, Record, Stale, Store, new_id

Added = Callable[..., Record]

LEFT = Judgement("preferred", ranks=(1.0, 2.0))
RIGHT = Judgement("preferred", ranks=(2.0, 1.0))
TIE = Judgement("tie")


def kinds(store: Store, record: Record, annotator: str = "ann") -> list[str]:
    return [event.kind for event in store.history(record.id, annotator)]


# ---- records


def test_a_record_comes_back_as_it_was_added(store: Store) -> None:
    answers = (
        Completion(
            [{"role": "assistant", "content": "é\0\ud800"}], "dpo", "ab" * 32, {"seed": 7, "top_p": 0.9}, False, 3
        ),
        Completion("plain", tokens=2, seconds=0.25),
    )
    record = Record(
        "battle",
        [{"role": "user", "content": "Hi"}],
        answers,
        shown=(1, 0),
        origin="arena",
        queue_id=new_id(),
        repeat_of=new_id(),
        versions={"base": "tiny"},
        extra={"margin": 0.5},
    )
    store.add(record)
    assert store.record(record.id) == record


def test_adding_twice_keeps_one_and_another_content_under_its_id_is_refused(store: Store, added: Added) -> None:
    record = added()
    store.add(record)
    assert store.all_records() == [record]
    with pytest.raises(ValueError, match="there already"):
        store.add(replace(record, prompt="Another?"))
    assert store.all_records() == [record]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": "duel"}, "kind: 'duel'"),
        ({"completions": ()}, "completions: none"),
        ({"shown": (0, 0)}, "shown"),
        ({"shown": (0,)}, "shown"),
        ({"id": "7"}, "id: '7'"),
        ({"queue_id": "x" * 32}, "queue_id"),
    ],
)
def test_a_record_that_no_page_may_make_is_refused(fields: dict[str, object], problem: str) -> None:
    good: dict[str, object] = {"kind": "pair", "prompt": "p", "completions": (Completion("a"), Completion("b"))}
    with pytest.raises(ValueError, match=problem):
        Record(**good | fields)  # type: ignore[arg-type]


def test_order_is_from_left_to_right() -> None:
    answers = (Completion("a"), Completion("b"))
    assert Record("pair", "p", answers).order == (0, 1)
    assert Record("pair", "p", answers, shown=(1, 0)).order == (1, 0)


def test_an_unknown_record_is_one_line(store: Store) -> None:
    with pytest.raises(UserError, match="no record abc"):
        store.record("abc")
    assert store.find("abc") is None


# ---- votes


def test_versions_count_from_one_and_the_whole_state_is_kept(store: Store, added: Added) -> None:
    record = added()
    full = Judgement(
        "preferred",
        ranks=(1.0, 2.0),
        strength=3,
        reason="shorter",
        tags=("style", "fact"),
        edits={1: "mended"},
        written="best",
        seconds=1.5,
        streaming=True,
    )
    assert store.judge(record.id, "ann", LEFT) == 1
    assert store.judge(record.id, "ann", full, expected_version=1, kind="edit") == 2
    entry = store.entry(record.id, "ann")
    assert entry is not None
    assert (entry.record, entry.annotator, entry.judgement, entry.version) == (record, "ann", full, 2)
    assert [(e.version, e.kind, e.judgement) for e in store.history(record.id, "ann")] == [
        (1, "vote", LEFT),
        (2, "edit", full),
    ]


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_a_stale_write_is_refused_and_changes_nothing(store: Store, added: Added, expected: int) -> None:
    """Version 2 stands; whoever bases a write on another one has not seen it."""
    record = added()
    store.judge(record.id, "ann", LEFT)
    store.judge(record.id, "ann", RIGHT, expected_version=1)
    writes = [
        lambda: store.judge(record.id, "ann", TIE, expected_version=expected),
        lambda: store.undo(record.id, "ann", expected_version=expected),
        lambda: store.delete(record.id, "ann", expected_version=expected),
        lambda: store.restore(record.id, "ann", expected_version=expected),
    ]
    for write in writes:
        with pytest.raises(Stale, match=f"version 2, here {expected}"):
            write()
    entry = store.entry(record.id, "ann")
    assert entry is not None and entry.judgement == RIGHT
    assert kinds(store, record) == ["vote", "vote"]


def test_annotators_have_versions_of_their_own(store: Store, added: Added) -> None:
    record = added()
    assert [store.judge(record.id, who, LEFT) for who in ("ann", "ben")] == [1, 1]
    store.judge(record.id, "ben", TIE, expected_version=1)
    found = {e.annotator: (e.judgement.verdict, e.version) for e in store.entries()}
    assert found == {"ann": ("preferred", 1), "ben": ("tie", 2)}
    assert store.annotators() == ["ann", "ben"]


def test_the_same_event_twice_is_one(store: Store, added: Added) -> None:
    """A retry after a lost answer gets the same answer, also when others have written since."""
    record, vote, change, back, gone = added(), new_id(), new_id(), new_id(), new_id()
    for _ in range(2):
        assert store.judge(record.id, "ann", LEFT, event_id=vote) == 1
    for _ in range(2):
        assert store.judge(record.id, "ann", RIGHT, expected_version=1, event_id=change) == 2
    for _ in range(2):
        assert store.undo(record.id, "ann", expected_version=2, event_id=back) == RIGHT
    for _ in range(2):
        assert store.delete(record.id, "ann", expected_version=3, event_id=gone) == 4
    assert store.judge(record.id, "ann", LEFT, event_id=vote) == 1
    for version in (4, 5):  # the deletion, and the vote before it
        store.undo(record.id, "ann", expected_version=version)
    assert store.delete(record.id, "ann", expected_version=3, event_id=gone) == 4
    assert kinds(store, record) == ["vote", "vote", "undo", "delete", "undo", "undo"]


def test_an_event_id_belongs_to_one_record_and_annotator(store: Store, added: Added) -> None:
    record, vote = added(), new_id()
    store.judge(record.id, "ann", LEFT, event_id=vote)
    with pytest.raises(ValueError, match="another record"):
        store.judge(added("c", "d").id, "ann", LEFT, event_id=vote)
    with pytest.raises(ValueError, match="another annotator"):
        store.undo(record.id, "ben", expected_version=0, event_id=vote)
    assert store.count() == 1


def test_a_judgement_must_fit_its_record(store: Store, added: Added) -> None:
    record = added()
    with pytest.raises(ValueError, match="ranks: 3 for 2"):
        store.judge(record.id, "ann", Judgement("ranked", ranks=(1, 2, 3)))
    with pytest.raises(ValueError, match="completion 2 of 2"):
        store.judge(record.id, "ann", Judgement("bad", edits={2: "x"}))
    with pytest.raises(UserError, match="no record"):
        store.judge(new_id(), "ann", TIE)
    for name in ("", "  ", "\ud800"):
        with pytest.raises(UserError, match="annotator"):
            store.judge(record.id, name, TIE)
    assert store.count() == 0


@pytest.mark.parametrize("fields", [{"verdict": "good"}, {"verdict": "preferred"}, {"verdict": "scored"}])
def test_a_verdict_says_what_it_means(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="verdict: 'good'|missing for the verdict"):
        Judgement(**fields)  # type: ignore[arg-type]


# ---- taking back


def test_undo_goes_back_one_decision_at_a_time(store: Store, added: Added) -> None:
    record = added()
    store.judge(record.id, "ann", LEFT)
    store.judge(record.id, "ann", replace(LEFT, edits={0: "x"}), expected_version=1, kind="edit")
    assert store.undo(record.id, "ann", expected_version=2) == replace(LEFT, edits={0: "x"})
    entry = store.entry(record.id, "ann")
    assert entry is not None and (entry.judgement, entry.version) == (LEFT, 3)
    assert store.undo(record.id, "ann", expected_version=3) == LEFT
    assert store.entry(record.id, "ann") is None
    assert store.undo(record.id, "ann", expected_version=4) is None
    assert kinds(store, record) == ["vote", "edit", "undo", "undo"]
    assert (store.count(), store.undone(), store.undone("ann"), store.undone("ben")) == (0, 1, 1, 0)


def test_after_all_is_taken_back_one_votes_anew(store: Store, added: Added) -> None:
    """With 0, as a page that shows no vote does, or with the version it knows."""
    record = added()
    store.judge(record.id, "ann", LEFT)
    store.undo(record.id, "ann", expected_version=1)
    assert store.judge(record.id, "ann", RIGHT, expected_version=0) == 3
    assert store.undo(record.id, "ann", expected_version=3) == RIGHT
    assert store.judge(record.id, "ann", TIE, expected_version=4) == 5
    assert store.undo(record.id, "ann", expected_version=5) == TIE
    assert store.entry(record.id, "ann") is None


def test_undo_after_undo_and_a_new_vote_finds_the_state_before(store: Store, added: Added) -> None:
    """left, right, undo (left stands), tie, undo: left stands again, not the right that was taken back."""
    record = added()
    store.judge(record.id, "ann", LEFT)
    store.judge(record.id, "ann", RIGHT, expected_version=1)
    store.undo(record.id, "ann", expected_version=2)
    store.judge(record.id, "ann", TIE, expected_version=3)
    assert store.undo(record.id, "ann", expected_version=4) == TIE
    entry = store.entry(record.id, "ann")
    assert entry is not None and entry.judgement == LEFT


def test_what_was_imported_is_not_taken_back(store: Store, added: Added) -> None:
    record = added()
    store.judge(record.id, "ann", LEFT, kind="import")
    assert store.undo(record.id, "ann", expected_version=1) is None
    assert store.recent("ann") == []
    store.judge(record.id, "ann", TIE, expected_version=1)
    assert store.undo(record.id, "ann", expected_version=2) == TIE
    entry = store.entry(record.id, "ann")
    assert entry is not None and entry.judgement == LEFT


def test_deleted_and_restored(store: Store, added: Added) -> None:
    record = added()
    store.judge(record.id, "ann", LEFT)
    assert store.delete(record.id, "ann", expected_version=1) == 2
    assert (store.entries(), store.count()) == ([], 0)
    assert [e.judgement for e in store.entries(deleted=True)] == [replace(LEFT, deleted=True)]
    assert store.count(deleted=None) == 1
    assert store.restore(record.id, "ann", expected_version=2) == 3
    assert [e.judgement for e in store.entries()] == [LEFT]
    assert store.delete(record.id, "ann", expected_version=3) == 4
    assert store.undo(record.id, "ann", expected_version=4) == replace(LEFT, deleted=True)
    assert [e.judgement for e in store.entries()] == [LEFT]
    assert kinds(store, record) == ["vote", "delete", "restore", "delete", "undo"]


def test_nothing_to_delete_is_one_line(store: Store, added: Added) -> None:
    with pytest.raises(UserError, match="ann has no judgement"):
        store.delete(added().id, "ann", expected_version=0)


def test_recent_are_the_newest_decisions_that_undo_takes_back(store: Store, added: Added) -> None:
    """Of a, b, c, d: b was deleted, c undone, a changed last; somebody else's vote is not among them."""
    a, b, c, d = (added(f"{name}1", f"{name}2") for name in "abcd")
    for record in (a, b, c, d):
        store.judge(record.id, "ann", LEFT)
    store.judge(d.id, "ben", LEFT)
    store.delete(b.id, "ann", expected_version=1)
    store.undo(c.id, "ann", expected_version=1)
    store.judge(a.id, "ann", RIGHT, expected_version=1, kind="edit")
    assert [e.record.id for e in store.recent("ann")] == [a.id, d.id]
    assert [e.record.id for e in store.recent("ann", limit=1)] == [a.id]
    store.undo(a.id, "ann", expected_version=2)  # its first vote stands again, older than d's
    assert [e.record.id for e in store.recent("ann")] == [d.id, a.id]


# ---- filters


def test_filters_and_pages(store: Store, added: Added) -> None:
    one = added(Completion("Straße", "base"), Completion("road", "dpo"), prompt="Where?")
    two = added(Completion("x", "base"), kind="rating", origin="chat")
    three = added("p", "q", prompt=[{"role": "user", "content": "WHERE to?"}])
    store.judge(one.id, "ann", replace(LEFT, tags=("style",), reason="Because"))
    store.judge(two.id, "ann", Judgement("liked", tags=("style", "fact")))
    store.judge(three.id, "ben", Judgement("tie", edits={0: "Mended"}))

    def ids(**filters: object) -> list[str]:
        found = [e.record.id for e in store.entries(**filters)]  # type: ignore[arg-type]
        assert store.count(**filters) == len(found)
        return found

    assert ids() == [three.id, two.id, one.id]
    assert ids(annotator="ann") == [two.id, one.id]
    assert ids(kinds=("rating", "battle")) == [two.id]
    assert ids(verdicts=["tie", "preferred"]) == [three.id, one.id]
    assert ids(tag="fact") == [two.id]
    assert ids(tag="sty") == []
    assert ids(source="base") == [two.id, one.id]
    assert ids(origin="chat") == [two.id]
    assert ids(text="where") == [three.id, one.id]
    assert ids(text="STRASSE") == [one.id]
    assert ids(text="because") == [one.id]
    assert ids(text="mended") == [three.id]
    assert ids(text="role") == []  # not said by anybody
    assert ids(text="100%_") == []
    assert ids(annotator="ann", tag="style", source="dpo") == [one.id]
    assert [e.record.id for e in store.entries(newest_first=False)] == [one.id, two.id, three.id]
    assert [e.record.id for e in store.entries(limit=1, offset=1)] == [two.id]
    assert store.tags() == ["fact", "style"]


def test_a_changed_entry_keeps_its_place(store: Store, added: Added) -> None:
    """A list that one edits in must not jump."""
    first, second = added(), added("c", "d")
    for record in (first, second):
        store.judge(record.id, "ann", LEFT)
    store.judge(first.id, "ann", TIE, expected_version=1)
    assert [e.record.id for e in store.entries()] == [second.id, first.id]


def test_letters_that_sqlite_has_no_bytes_for_are_kept_and_found(store: Store, added: Added) -> None:
    record = added(Completion("half \ud800 pair and \0 end", source="\ud800"), "b")
    store.judge(record.id, "ann", replace(LEFT, tags=("\ud800",), reason="\udfff"))
    assert [e.record for e in store.entries(text="end", source="\ud800", tag="\ud800")] == [record]
    assert store.entries()[0].judgement.tags == ("\ud800",)
    assert store.tags() == ["?"]


# ---- the queue


def test_the_queue_keeps_its_order_and_knows_its_prompts(store: Store) -> None:
    chat = [{"role": "user", "content": "b"}]
    assert store.enqueue(["b", "a", "b", chat], "file.jsonl") == Enqueued(3, 1)
    assert store.enqueue(["a", "c"]) == Enqueued(1, 1)
    waiting = store.queue("ann", limit=10)
    assert [p.prompt for p in waiting] == ["b", "a", chat, "c"]
    assert [p.source for p in waiting] == ["file.jsonl"] * 3 + [""]
    assert [p.prompt for p in store.queue("ann", limit=2, without=[waiting[0].id])] == ["a", chat]
    assert (store.queue_left("ann"), store.queue_total()) == (4, 4)


def test_what_waits_follows_from_what_stands_for_each_annotator(path: Path) -> None:
    """Also after a restart. A skipped prompt is done with, so is one whose entry was deleted; an undone one waits."""
    with Store(path) as store:
        store.enqueue(list("abcd"))
        for prompt, verdict in zip(store.queue("ann", limit=4), ("skip", "tie", "bad"), strict=False):
            record = Record("pair", prompt.prompt, (Completion("x"), Completion("y")), queue_id=prompt.id)
            store.add(record)
            store.judge(record.id, "ann", Judgement(verdict))  # type: ignore[arg-type]
            if verdict == "tie":
                store.undo(record.id, "ann", expected_version=1)
            if verdict == "bad":
                store.delete(record.id, "ann", expected_version=1)
    with Store(path) as store:
        assert [p.prompt for p in store.queue("ann", limit=9)] == ["b", "d"]
        assert store.queue_left("ann") == 2
        assert (store.queue_left("ben"), store.queue_total()) == (4, 4)


# ---- notes and the pulse


def test_notes_survive_a_restart_and_are_replaced(path: Path) -> None:
    with Store(path) as store:
        assert store.noted("draft") is None
        assert store.noted("draft", 7) == 7
        store.note("draft", {"text": "é\ud800", "n": [1, None]})
        store.note("draft", {"text": "new"})
        store.note("other", False)
    with Store(path) as store:
        assert (store.noted("draft"), store.noted("other", True)) == ({"text": "new"}, False)


def test_the_pulse_grows_with_whatever_anybody_writes(store: Store, path: Path, added: Added) -> None:
    with Store(path) as other:
        beats = [store.pulse()]
        record = added()
        for write in (
            lambda: other.judge(record.id, "ann", LEFT),
            lambda: other.undo(record.id, "ann", expected_version=1),
            lambda: other.enqueue(["p"]),
        ):
            beats.append(store.pulse())
            write()
        beats.append(store.pulse())
        assert beats == sorted(set(beats))
        store.note("draft", 1)
        assert store.pulse() == beats[-1]


# ---- batches


def test_a_batch_is_all_or_nothing_and_sees_itself(store: Store, path: Path) -> None:
    answers = (Completion("a"), Completion("b"))
    with pytest.raises(RuntimeError), store.batch():
        store.add(Record("pair", "lost", answers))
        assert len(store.all_records()) == 1
        raise RuntimeError
    assert store.all_records() == []
    kept = Record("pair", "kept", answers)
    with store.batch(), Store(path) as other:
        store.add(kept)
        store.judge(kept.id, "ann", LEFT)
        assert (store.count(), other.count()) == (1, 0)
    with Store(path) as other:
        assert [e.record for e in other.entries()] == [kept]


def test_a_closed_store_says_so(path: Path) -> None:
    store = Store(path)
    store.close()
    store.close()
    for use in (store.pulse, lambda: store.note("a", 1)):
        with pytest.raises(ValueError, match="closed"):
            use()
