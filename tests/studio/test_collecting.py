"""A desk: what is decided is in the store, blind and in order; a reload, another tab or a restart loses nothing."""

from pathlib import Path
from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store import Stale, Store
from lowrank_align.studio.answers import Source
from lowrank_align.studio.collecting import Desk
from lowrank_align.studio.collecting_view import decisions, parse_order, shown_now, told_in_words
from lowrank_align.studio.deciding import Draft, as_before, best_answer
from lowrank_align.studio.examples import example_prompts
from lowrank_align.studio.pairs import Pair, Plan, said
from lowrank_align.studio.studio import Studio
from lowrank_align.studio.tally import Tally

PROMPTS = [[{"role": "user", "content": f"question {i}"}] for i in range(8)]


@pytest.fixture(autouse=True)
def talkative(studio: Any) -> None:
    """The random model ends no answer by itself, so that none is empty by chance."""
    studio.renderer.end_ids = [10**9]


@pytest.fixture
def desk(studio: Any) -> Desk:
    """With a queue of eight prompts and one pair in front."""
    studio.store.enqueue(PROMPTS)
    desk: Desk = studio.desk("ann")
    desk.change_plan(Plan(sources=(Source(max_new_tokens=6, temperature=1.0),) * 2, repeats=False))
    wait(desk.next())
    return desk


def wait(pair: Pair) -> Pair:
    for answer in pair.answers:
        assert answer.wait(60)
    return pair


def vote(desk: Desk, choice: str, **options: Any) -> Any:
    assert desk.current is not None
    wait(desk.current)
    return desk.vote(desk.current.id, choice, **options)


@pytest.mark.parametrize(
    ("choice", "verdict"), [("a", "preferred"), ("b", "preferred"), ("tie", "tie"), ("skip", "skip")]
)
def test_a_vote_is_in_the_store_by_completion_not_by_side(desk: Desk, choice: str, verdict: str) -> None:
    """Left (a) is the completion that `shown` names first: it has rank 1 after a vote for it."""
    pair = desk.current
    assert pair is not None
    voted = vote(desk, choice)
    stored = Store(Path("studio.db")).entry(pair.id, "ann")
    assert stored == voted.entry and stored is not None
    assert (stored.judgement.verdict, stored.version) == (verdict, 1)
    left, right = stored.record.shown
    ranks = stored.judgement.ranks
    expected = {"a": (1.0, 2.0), "b": (2.0, 1.0), "tie": (1.0, 1.0), "skip": None}[choice]
    assert (ranks and (ranks[left], ranks[right])) == expected
    assert desk.current is None


def test_a_row_keeps_what_made_it(desk: Desk, studio: Any) -> None:
    pair = desk.current
    assert pair is not None
    draft = Draft(strength=3, reason=" clearer ", tags=("short",))
    record = vote(desk, "a", draft=draft).entry.record
    assert record.prompt == PROMPTS[0] and record.queue_id is not None
    assert record.versions["base_hash"] == studio.base.weights_hash
    for completion, answer in zip(record.completions, pair.answers, strict=True):
        assert completion.sampling == {
            "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 6, "seed": answer.seed,
        }  # fmt: skip
        assert (completion.source, completion.adapter_hash, completion.tokens) == ("base", None, len(answer.ids))
    judgement = studio.store.entry(record.id, "ann").judgement
    assert (judgement.strength, judgement.reason, judgement.tags) == (3, "clearer", ("short",))
    assert judgement.seconds is not None and judgement.seconds >= 0 and not judgement.streaming


def test_the_same_seeds_draw_the_same_answer(desk: Desk, studio: Any) -> None:
    pair = desk.current
    assert pair is not None
    wait(pair)
    again = studio.answer(pair.prompt, pair.answers[0].source, seed=pair.answers[0].seed)
    assert again.wait(60) and again.ids == pair.answers[0].ids and again.text == pair.answers[0].text


def test_the_next_pair_is_drawn_while_one_decides(desk: Desk) -> None:
    assert [pair.prompt for pair in desk.upcoming.waiting] == [PROMPTS[1]]
    wait(desk.upcoming.waiting[0])
    vote(desk, "a")
    nxt = desk.next()
    assert nxt.prompt == PROMPTS[1] and nxt.done
    assert [pair.prompt for pair in desk.upcoming.waiting] == [PROMPTS[2]]


def test_both_bad_holds_the_pair_until_a_better_answer_is_written(desk: Desk, studio: Any) -> None:
    pair = desk.current
    assert pair is not None
    with pytest.raises(UserError, match="first say that both are bad"):
        desk.write(pair.id, "better")
    vote(desk, "bad")
    assert desk.current is pair and desk.held
    with pytest.raises(UserError, match="decided"):
        desk.vote(pair.id, "a")
    voted = desk.write(pair.id, " better ")
    assert voted.entry.judgement.written == "better" and voted.entry.judgement.verdict == "bad"
    assert [event.kind for event in studio.store.history(pair.id, "ann")] == ["vote", "vote"]
    assert desk.current is None and best_answer(voted.entry) == "better"


def test_a_mended_answer_is_kept_beside_its_original(desk: Desk) -> None:
    pair = desk.current
    assert pair is not None
    wait(pair)
    left = pair.shown[0]
    entry = vote(desk, "a", draft=Draft(edits={left: "mended", 1 - left: pair.text(1 - left)})).entry
    assert entry.judgement.edits == {left: "mended"}  # the other box was opened, but nothing changed in it
    assert entry.record.completions[left].content != "mended" and best_answer(entry) == "mended"


def test_plain_text_goes_on_with_the_space_it_began_with() -> None:
    assert as_before(" a film", "the film ") == " the film"
    assert as_before("film", " other ") == "other"


def test_ten_votes_can_be_taken_back_as_they_were(desk: Desk, studio: Any) -> None:
    """Newest first; what was on the desk meanwhile comes back after it."""
    first = desk.current
    assert first is not None
    vote(desk, "a", draft=Draft(strength=2, reason="one"))
    second = desk.next()
    vote(desk, "tie", draft=Draft(reason="two"))
    third = desk.next()
    desk.undo()
    assert (shown_now(desk).pair_id, desk.draft.reason) == (second.id, "two")
    desk.undo()
    assert (shown_now(desk).pair_id, desk.draft.strength, desk.draft.reason) == (first.id, 2, "one")
    assert studio.store.count(annotator="ann") == 0
    with pytest.raises(UserError, match="nothing to undo"):
        desk.undo()
    assert desk.vote(first.id, "b").entry.version == 3  # vote, undo, vote
    assert [desk.next().id, desk.next().id] == [second.id, third.id]


def test_both_bad_can_be_taken_back_in_two_steps(desk: Desk) -> None:
    pair = desk.current
    assert pair is not None
    vote(desk, "bad")
    desk.write(pair.id, "better")
    desk.undo()
    assert desk.held and shown_now(desk).pair_id == pair.id  # the written answer is gone, both bad stands
    desk.undo()
    assert not desk.held and desk.vote(pair.id, "a").entry.judgement.verdict == "preferred"


def test_a_stale_tab_cannot_decide_what_another_has(desk: Desk, studio: Any) -> None:
    pair = desk.current
    assert pair is not None
    vote(desk, "a")
    desk.next()
    with pytest.raises(Stale, match="another tab"):
        desk.vote(pair.id, "b")
    assert studio.store.count() == 1
    desk._clear()
    with pytest.raises(Stale, match="nothing is on the desk"):
        desk.vote(pair.id, "b")


def test_voting_while_the_text_streams_stops_it_and_is_recorded(desk: Desk, studio: Any) -> None:
    desk.change_plan(Plan(sources=(Source(max_new_tokens=200, temperature=1.0),) * 2, repeats=False))
    pair = desk.ask("how long?")
    while not all(answer.ids and answer.text for answer in pair.answers):
        pair.answers[0].wait(0.005)
    streamed = not pair.done
    entry = desk.vote(pair.id, "a").entry
    assert entry.judgement.streaming == streamed
    wait(pair)
    assert all(answer.stopped or answer.finished for answer in pair.answers)


def test_identical_answers_are_drawn_again(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seeds 1 and 1 the answers are the same; the third draw, of another seed, takes the second's place."""
    from lowrank_align.studio import pairs

    seeds = iter([1, 1, 2, 3, 4])
    monkeypatch.setattr("lowrank_align.studio.answers.secrets.randbelow", lambda below: next(seeds))
    pair = pairs.drawn(studio, Plan(sources=(Source(max_new_tokens=8, temperature=1.5),) * 2), PROMPTS[0])
    first = list(pair.answers)
    for answer in first:
        assert answer.wait(60)
    studio.speaker.call(lambda: None)  # what follows an answer's end has run
    wait(pair)
    assert first[0].ids == first[1].ids and pair.redrawn == 1
    assert not pair.same() and pair.answers[0] is first[0] and pair.answers[1].seed == 2


def test_answers_that_must_be_the_same_are_told(studio: Any) -> None:
    desk = studio.desk("ann")
    desk.change_plan(Plan(sources=(Source(max_new_tokens=4, temperature=0.0),) * 2))
    wait(desk.ask("same?"))
    assert "temperature 0" in shown_now(desk).message


def test_the_desk_is_there_after_a_restart(desk: Desk, studio: Any) -> None:
    """Same pair, same sides, same answers, same draft; and the queue goes on where it was."""
    vote(desk, "a")
    pair = wait(desk.next())
    texts = [pair.text(i) for i in (0, 1)]
    desk.keep_draft(pair.id, Draft(reason="half a though", tags=("x",)))
    other = Studio(studio.base, studio.renderer, Store(Path("studio.db")), studio.settings)
    try:
        again = other.desk("ann")
        assert again.current is not None and again.current.id == pair.id
        wait(again.current)
        assert [again.current.text(i) for i in (0, 1)] == texts and again.current.shown == pair.shown
        assert again.draft.reason == "half a though" and again.draft.tags == ("x",)
        assert other.store.queue_left("ann") == 7
    finally:
        other.speaker.close()
        other.store.close()


def test_asking_for_a_desk_again_draws_nothing(desk: Desk, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making a desk takes up the pair that was on it, which draws its answers; that happens once."""
    wait(desk.upcoming.waiting[0])
    monkeypatch.setattr(studio, "answer", lambda *given, **options: pytest.fail("an answer was begun"))
    assert studio.desk("ann") is desk and studio.arena("ann") is studio.arena(" ann ")


def test_annotators_have_desks_and_queues_of_their_own(desk: Desk, studio: Any) -> None:
    vote(desk, "a")
    other = studio.desk("  ben ")
    assert other.annotator == "ben" and studio.desk("ben") is other
    assert other.next().prompt == PROMPTS[0]
    assert (studio.store.queue_left("ann"), studio.store.queue_left("ben")) == (7, 8)
    assert studio.desk(" ").annotator == studio.settings.annotator


def test_second_opinions_show_the_very_same_answers(desk: Desk, studio: Any) -> None:
    record = vote(desk, "a").entry.record
    other = studio.desk("ben")
    other.change_plan(Plan(second_opinions=True))
    pair = other.next()
    assert pair.id == record.id and [pair.text(i) for i in (0, 1)] == [said(c.content) for c in record.completions]
    other.vote(pair.id, "b")
    assert {entry.annotator for entry in studio.store.entries()} == {"ann", "ben"}
    assert other.next().id != record.id


def test_every_tenth_pair_is_an_old_one(desk: Desk, studio: Any) -> None:
    studio.store.enqueue([[{"role": "user", "content": f"more {i}"}] for i in range(9)])
    desk.change_plan(Plan(sources=(Source(max_new_tokens=4, temperature=1.0),) * 2, repeats=True))
    desk.next()
    for _ in range(9):
        vote(desk, "a")
        desk.next()
    pair = desk.current
    assert pair is not None and pair.repeat_of is not None
    old = studio.store.record(pair.repeat_of)
    assert [pair.text(i) for i in (0, 1)] == [said(c.content) for c in old.completions]
    assert vote(desk, "b").entry.record.repeat_of == old.id
    assert desk.next().repeat_of is None


def test_several_answers_are_ranked(studio: Any) -> None:
    desk = studio.desk("ann")
    desk.change_plan(Plan(sources=(Source(max_new_tokens=6, temperature=1.2),), count=4))
    pair = wait(desk.ask("four?"))
    with pytest.raises(UserError, match="ranked"):
        desk.vote(pair.id, "a")
    entry = desk.vote(pair.id, "rank", ranks=parse_order("3 1=2 4", 4)).entry
    by_side = [entry.judgement.ranks[i] for i in pair.shown]
    assert (entry.record.kind, by_side) == ("ranking", [2.0, 2.0, 1.0, 3.0])


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("3 1 2", (2.0, 3.0, 1.0)), ("312", None), ("1=2=3", (1.0, 1.0, 1.0)), ("2, 1 = 3", (2.0, 1.0, 2.0))],
)
def test_orders(text: str, ranks: tuple[float, ...] | None) -> None:
    """Best first; `=` shares a place. `312` without spaces would be one group of three: they share the first place."""
    assert parse_order(text, 3) == (ranks or (1.0, 1.0, 1.0))


@pytest.mark.parametrize("text", ["", "1 2", "1 2 2", "1 2 4", "a b c", "1 2 3 4"])
def test_orders_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="name each answer from 1 to 3 once"):
        parse_order(text, 3)


def test_going_on_from_the_chosen_answer(desk: Desk, studio: Any) -> None:
    """The conversation so far is the prompt, with the chosen answer as its last turn; the queue's pair waits."""
    entry = vote(desk, "b").entry
    waiting = desk.next()
    pair = desk.go_on("and then?", entry.record.id)
    chosen = best_answer(entry)
    assert pair.prompt == [
        *PROMPTS[0], {"role": "assistant", "content": chosen}, {"role": "user", "content": "and then?"},
    ]  # fmt: skip
    now = shown_now(desk)
    assert now.prompt == "and then?" and f"assistant: {chosen}" in now.before
    vote(desk, "a")
    assert desk.next().id == waiting.id
    tie = vote(desk, "tie").entry
    with pytest.raises(UserError, match="Decide the pair first"):
        desk.go_on("and?", tie.record.id)


def test_the_most_informative_pair_comes_next(desk: Desk, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps of 4, 3, 1 and 2 between the scores of the pairs drawn ahead: the third comes first, then the fourth."""
    gaps = {f"question {i}": gap for i, gap in zip(range(1, 8), (4.0, 3.0, 1.0, 2.0, 9.0, 9.0, 9.0), strict=True)}
    monkeypatch.setattr(studio, "gap", lambda judge, prompt, completions: gaps[prompt[0]["content"]])
    desk.change_plan(
        Plan(sources=(Source(max_new_tokens=6, temperature=1.0),) * 2, informative="a reward", repeats=False)
    )
    order = []
    for _ in range(2):
        for pair in desk.upcoming.waiting:
            wait(pair)
            studio.speaker.call(lambda: None)  # what follows an answer's end has run
        vote(desk, "a")
        order.append(desk.next().prompt[0]["content"])  # type: ignore[index]
    assert order == ["question 3", "question 4"]


def test_a_source_that_is_none_is_refused(desk: Desk) -> None:
    with pytest.raises(UserError, match="bse: no such adapter"):
        desk.change_plan(Plan(sources=(Source("bse"), Source())))
    with pytest.raises(UserError, match="7 answers: must be 2 to 6"):
        desk.change_plan(Plan(count=7))


def test_what_goes_wrong_with_an_answer_is_one_sentence(desk: Desk) -> None:
    pair = wait(desk.ask("x" * 400))
    assert shown_now(desk).message.startswith("Too long: 418 tokens") and pair.error is not None
    with pytest.raises(UserError, match=r"too long.*skip this prompt"):
        desk.vote(pair.id, "a")
    assert desk.vote(pair.id, "skip").entry.judgement.verdict == "skip"


def test_an_empty_prompt_and_an_empty_queue_say_what_to_do(studio: Any) -> None:
    desk = studio.desk("ann")
    with pytest.raises(UserError, match="the prompt is empty"):
        desk.ask("  ")
    with pytest.raises(UserError, match="add a file of prompts"):
        desk.next()
    assert "Type a prompt" in shown_now(desk).message


def test_the_counter_and_the_last_decisions(desk: Desk, studio: Any) -> None:
    vote(desk, "tie", draft=Draft(reason="equal"))
    desk.next()
    vote(desk, "bad")
    line, queue = told_in_words(studio, desk)
    assert line.startswith("1 pair\n") and queue == "6 in queue"
    assert decisions(studio, desk).splitlines() == ["both bad - question 1", "tie - question 0"]


def test_a_tally_by_hand(studio: Any) -> None:
    """Twelve pairs, the left one always the longer and always chosen: 12 of 12 left, 12 of 12 longer. Wilson's interval
    of 12 of 12 begins at 12 / (12 + 3.8415) = 0.7575."""
    from lowrank_align.store import Completion, Judgement, Record

    for i in range(12):
        order = (0, 1) if i % 2 else (1, 0)
        long, short = Completion("a longer answer"), Completion(f"short {i}")
        texts = (long, short) if order == (0, 1) else (short, long)
        record = Record("pair", f"p{i}", texts, shown=order)
        studio.store.add(record)
        ranks = (1.0, 2.0) if order == (0, 1) else (2.0, 1.0)
        studio.store.judge(record.id, "ann", Judgement("preferred", ranks=ranks))
    tally = Tally.of(studio.store.entries(annotator="ann"))
    assert (tally.pairs, tally.left.rate, tally.longer.rate) == (12, 1.0, 1.0)
    assert round(tally.left.low, 4) == 0.7575
    assert "left side 100 % (76-100 %)" in tally.in_words(None)
    assert len(tally.warnings()) == 2


def test_example_prompts_are_prompts(studio: Any) -> None:
    assert len(example_prompts("Qwen/Qwen3-4B")) == len(set(map(str, example_prompts("other")))) == 40
    assert str(example_prompts("tiny")[0]).startswith("Review: ")


def test_prompts_from_files(studio: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\none\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "plain"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    assert vars(studio.add_prompts_from("p.txt")) == {"added": 2, "duplicates": 1}
    assert vars(studio.add_prompts_from("p.jsonl")) == {"added": 1, "duplicates": 1}
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="none.txt: no prompts"):
        studio.add_prompts_from("none.txt")


# ---- what went wrong once


def test_opening_an_answer_while_it_streams_is_no_edit(desk: Desk) -> None:
    """E stops the answer and hands out what stands; unchanged, it is no mended answer, whatever the page showed."""
    desk.change_plan(Plan(sources=(Source(max_new_tokens=200, temperature=1.0),) * 2, repeats=False))
    pair = desk.ask("how long?")
    while not all(answer.text for answer in pair.answers):
        pair.answers[0].wait(0.005)
    handed = desk.open_side(pair.id, 0)
    left = pair.shown[0]
    assert pair.answers[left].done and handed == pair.text(left)
    assert desk.vote(pair.id, "a", draft=Draft(edits={left: handed})).entry.judgement.edits == {}


def test_an_answer_that_breaks_off_says_so_and_is_not_voted_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr("lowrank_align.studio.answers.fitting_prompt", broken)
    pair = wait(desk.ask("anything"))
    assert "told in the terminal" in str(pair.error)
    with pytest.raises(UserError, match="told in the terminal"):
        desk.vote(pair.id, "a")


def test_nothing_is_preferred_over_an_empty_answer(desk: Desk, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lowrank_align.conversation.stream", lambda *given, **options: iter(studio.renderer.end_ids[:1])
    )
    pair = wait(desk.ask("say nothing"))
    with pytest.raises(UserError, match="says nothing"):
        desk.vote(pair.id, "tie")
    assert desk.vote(pair.id, "skip").entry.judgement.verdict == "skip"


def test_a_stale_tab_takes_nothing_back(desk: Desk, studio: Any) -> None:
    pair = desk.current
    assert pair is not None
    vote(desk, "a")
    desk.next()
    with pytest.raises(Stale, match="another tab"):
        desk.undo(pair.id)
    assert studio.store.count() == 1
    assert desk.undo(desk.current.id).id == pair.id


def test_undo_leaves_what_was_changed_elsewhere(desk: Desk, studio: Any) -> None:
    """Two votes, then the first one's reason is mended in a list: undo takes the second vote back."""
    from dataclasses import replace

    first = vote(desk, "a").entry
    desk.next()
    second = vote(desk, "b").entry
    mended = replace(first.judgement, reason="on second thoughts")
    studio.store.judge(first.record.id, "ann", mended, expected_version=1, kind="edit")
    assert desk.undo().id == second.record.id
    assert studio.store.entry(first.record.id, "ann").judgement.reason == "on second thoughts"


def test_adapters_not_in_use_for_long_leave_the_base(studio: Any, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank_align.studio import voices

    monkeypatch.setattr(voices, "KEPT_LOADED", 1)
    rows = [{"prompt": "Say: ", "chosen": "good", "rejected": "bad"}]
    for name in ("one", "two"):
        run("dpo", rows, f"runs/{name}", max_steps=1)
    studio.voices.refresh()
    one = studio.speaker.call(lambda: studio.voices.voice("one"))
    two = studio.speaker.call(lambda: studio.voices.voice("two"))
    assert one.role not in studio.base.roles and two.role in studio.base.roles
    assert studio.speaker.call(lambda: studio.voices.voice("one")).role in studio.base.roles
