"""What the judgements say of themselves. Every figure is counted by hand in the test."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from lowrank_align.ratings import WinRate
from lowrank_align.store import Completion, Judgement, Record, Store
from lowrank_align.store.stats import stats

Added = Callable[..., Record]
Vote = Callable[..., Record]

FIRST = Judgement("preferred", ranks=(1.0, 2.0))
SECOND = Judgement("preferred", ranks=(2.0, 1.0))
TIE = Judgement("tie")


@pytest.fixture
def vote(store: Store, added: Added) -> Vote:
    """A record of the answers and one judgement on it."""

    def cast(judgement: Judgement, *answers: Any, by: str = "ann", at: str | None = None, **fields: Any) -> Record:
        record = added(*answers, **fields)
        store.judge(record.id, by, judgement, at=at)
        return record

    return cast


def counted(rate: WinRate) -> tuple[int, int, int]:
    return rate.wins, rate.ties, rate.losses


def test_counts(store: Store, vote: Vote, added: Added) -> None:
    """Three stand: two of ann, one of ben; one is deleted, one taken back, one was never judged."""
    vote(FIRST, "a", "b")
    vote(Judgement("liked", edits={0: "x"}), "c", kind="rating")
    vote(Judgement("bad", written="w"), "d", "e", by="ben")
    gone, back = vote(FIRST, "f", "g"), vote(FIRST, "h", "i")
    store.delete(gone.id, "ann", expected_version=1)
    store.undo(back.id, "ann", expected_version=1)
    added("j", "k")
    store.enqueue(["p", "q"])
    found = stats(store)
    assert (found.entries, found.records, found.deleted, found.taken_back, found.not_judged) == (3, 6, 1, 1, 1)
    assert found.verdicts == {"preferred": 1, "liked": 1, "bad": 1}
    assert found.kinds == {"pair": 2, "rating": 1}
    assert found.annotators == {"ann": 2, "ben": 1}
    assert (found.edited, found.queue_total, found.queue_left) == (2, 2, None)
    mine = stats(store, "ben")
    assert (mine.entries, mine.deleted, mine.taken_back, mine.queue_left) == (1, 0, 0, 2)


def test_ties_are_counted_among_pairs_that_were_decided(store: Store, vote: Vote) -> None:
    """One tie, two preferences; bad, skipped, ranked and liked ones are no such choice."""
    for judgement in (FIRST, SECOND, TIE, Judgement("bad"), Judgement("skip")):
        vote(judgement)
    vote(Judgement("ranked", ranks=(1, 2, 3)), "a", "b", "c", kind="ranking")
    assert counted(stats(store).ties) == (1, 0, 2)


def test_the_left_side_is_where_it_was_shown(store: Store, vote: Vote) -> None:
    """Left, then right (the first answer stood on the right), then left, a tie. Imports had no sides."""
    vote(FIRST, "a", "b")
    vote(FIRST, "a", "b", shown=(1, 0))
    vote(SECOND, "a", "b", shown=(1, 0))
    vote(TIE, "a", "b", kind="battle")
    vote(FIRST, "a", "b", origin="import")
    assert counted(stats(store).left_side) == (2, 1, 1)


def test_the_longer_answer_by_its_characters(store: Store, vote: Vote) -> None:
    """A pair each for longer, shorter, equal; of the ranking 1 > 2 > 33, three comparisons: two shorter, one equal."""
    vote(FIRST, "long", "no")
    vote(SECOND, [{"role": "assistant", "content": "long"}], "no")
    vote(FIRST, "aa", "bb")
    vote(TIE, "long", "no")
    vote(Judgement("ranked", ranks=(1, 2, 3)), "1", "2", "33", kind="ranking")
    assert counted(stats(store).longer) == (1, 2, 3)


def test_pace_leaves_breaks_out(store: Store, vote: Vote) -> None:
    """Ann decides at 0, 10 and 30 s, has an hour's break, and again at 3630 and 3640: three gaps of 40 s in all, so 4.5
    a minute. Ben's decision in between is no gap of hers. Of the times to decide, 2, 4 and 9 s, 4 is in the middle."""
    for second, took in ((0, 2.0), (10, 4.0), (30, None), (3630, 9.0), (3640, None)):
        at = f"2026-01-01T{10 + second // 3600}:{second % 3600 // 60:02}:{second % 60:02}.000000+00:00"
        vote(Judgement("tie", seconds=took), at=at)
    vote(TIE, by="ben", at="2026-01-01T10:00:05.000000+00:00")
    found = stats(store).pace
    assert (found.decisions, found.per_minute, found.median_seconds) == (6, pytest.approx(4.5), 4.0)
    alone = stats(store, "ben").pace
    assert (alone.decisions, alone.per_minute, alone.median_seconds) == (1, None, None)


def test_duplicates_have_the_same_prompt_and_answers_in_any_order(store: Store, vote: Vote) -> None:
    """The second and third are the first again; another prompt, another answer, and a repeat are none."""
    first = vote(FIRST, "a", "b")
    vote(FIRST, "a", "b")
    vote(FIRST, "b", "a")
    vote(FIRST, "a", "b", prompt="other")
    vote(FIRST, "a", "c")
    vote(FIRST, "a", "b", repeat_of=first.id)
    assert stats(store).duplicates == 2


def test_a_contradiction_is_a_pair_preferred_both_ways(store: Store, vote: Vote) -> None:
    """a > b and b > a is one, however often; c > d stands alone; the ranking's 3 > 1 contradicts 1 > 3."""
    vote(FIRST, "a", "b")
    vote(SECOND, "a", "b", by="ben")
    vote(FIRST, "b", "a")
    vote(FIRST, "c", "d")
    vote(FIRST, "c", "d", prompt="other")
    vote(SECOND, "c", "d", prompt="third")
    vote(Judgement("ranked", ranks=(3, 2, 1)), "1", "2", "3", kind="ranking")
    vote(FIRST, "1", "3")
    assert stats(store).contradictions == 2


def test_consistency_compares_repeats_with_the_same_persons_first_answer(store: Store, vote: Vote) -> None:
    """Three repeats of ann: as before with the sides changed, otherwise, skipped. Ben saw one without its original.
    What a repeat contradicts is no contradiction in the data, for it is left out of that."""
    one, two, three = vote(FIRST, "a", "b"), vote(TIE, "c", "d"), vote(FIRST, "e", "f")
    vote(SECOND, "b", "a", repeat_of=one.id)
    vote(FIRST, "c", "d", repeat_of=two.id)
    vote(Judgement("skip"), "e", "f", repeat_of=three.id)
    vote(SECOND, "a", "b", repeat_of=one.id, by="ben")
    found = stats(store)
    assert counted(found.consistency) == (1, 0, 1)
    assert found.contradictions == 0


def test_agreement_is_between_those_who_judged_the_same_record(store: Store, vote: Vote) -> None:
    """On three records two annotators each: agreed, not agreed, agreed; one that ann judged alone counts nothing."""
    for mine, others in ((FIRST, FIRST), (FIRST, SECOND), (TIE, TIE)):
        record = vote(mine, "a", "b")
        store.judge(record.id, "ben", others)
    vote(FIRST, "a", "b")
    for found in (stats(store), stats(store, "ann")):
        assert (found.agreement.comparisons, found.agreement.share) == (3, pytest.approx(2 / 3))


def test_of_an_empty_store_there_is_nothing_to_say(store: Store) -> None:
    found = stats(store).as_json()
    assert (found["entries"], found["verdicts"], found["queue_left"]) == (0, {}, None)
    assert found["ties"] == {"rate": None, "low": 0.0, "high": 1.0, "wins": 0, "ties": 0, "losses": 0}
    assert found["pace"] == {"decisions": 0, "per_minute": None, "median_seconds": None}
    json.dumps(found, allow_nan=False)


def test_a_repeat_is_judged_but_says_nothing_of_the_data(store: Store, vote: Vote) -> None:
    first = vote(FIRST, Completion("a"), Completion("b"))
    vote(FIRST, "a", "b", repeat_of=first.id)
    found = stats(store)
    assert (found.entries, counted(found.left_side), counted(found.longer)) == (2, (1, 0, 0), (0, 1, 0))
