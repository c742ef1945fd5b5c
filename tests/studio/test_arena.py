"""The arena's battles on the small random base, and what its votes say."""

import random
import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.store import Completion, Entry, Judgement, Record, Stale
from lowrank_align.store.export import export_lines
from lowrank_align.studio.answers import Source
from lowrank_align.studio.arena import ALIKE_IN_A_ROW, SECOND_OPINION_EVERY, Arena
from lowrank_align.studio.matchmaking import Played, Prompt, Setup, next_match
from lowrank_align.studio.standings import (
    IDENTICAL,
    Key,
    battle_entries,
    judged_by,
    key_of,
    labels,
    players_in,
    score_of,
    standings,
)

WARM, HOT, COOL = (Source(temperature=t, max_new_tokens=6) for t in (1.0, 1.3, 0.8))
PLAYERS = Setup((WARM, HOT))
SECONDS = 60.0  # a hang's limit, far beyond what anything here takes


@pytest.fixture
def arena(studio: Any) -> Arena:
    studio.store.enqueue([f"Question {n}?" for n in range(6)])
    return Arena(studio, "ann", seed=1)


def drawn(arena: Arena) -> Any:
    """The battle on the page, when both its answers are there."""
    assert arena.current is not None
    for answer in arena.current.answers:
        assert answer.wait(SECONDS)
    assert arena.current.error is None
    return arena.current


def vote(arena: Arena, choice: str) -> Any:
    return arena.vote(drawn(arena).id, choice)


# Who meets next


def key(name: str) -> Key:
    return Key(name, None, 1.0)


def prompts(count: int, seen: tuple[int, ...] = ()) -> list[Prompt]:
    return [Prompt(f"p{n}", None, n not in seen, f"p{n}") for n in range(count)]


def test_those_that_met_least_meet_next() -> None:
    """a-b met twice, a-c once, b-c not at all: b and c."""
    a, b, c = map(key, "abc")
    played = [Played(frozenset((a, b)), "p0"), Played(frozenset((a, b)), "p1"), Played(frozenset((a, c)), "p2")]
    i, j, _ = next_match([a, b, c], prompts(3), played, random.Random(0))
    assert (i, j) == (1, 2)


def test_after_thirty_rounds_every_pair_of_four_has_met_five_times() -> None:
    """Six pairs, each time one of those that met least."""
    keys, played = [key(name) for name in "abcd"], []
    for _ in range(30):
        i, j, prompt = next_match(keys, prompts(40), played, random.Random(len(played)))
        played.append(Played(frozenset((keys[i], keys[j])), prompt.digest))
    assert Counter(one.two for one in played) == {one.two: 5 for one in played}
    assert len({one.digest for one in played}) == 30  # a new prompt each time, as there are enough


def test_unseen_prompts_come_first_then_seen_ones_then_again() -> None:
    """p0 and p2 were collected on: the order is p1, p3, p0, p2, and then p1 once more."""
    keys, played, order = [key("a"), key("b")], [], []
    for _ in range(5):
        _, _, prompt = next_match(keys, prompts(4, seen=(0, 2)), played, random.Random(0))
        order.append(prompt.digest)
        played.append(Played(frozenset(keys), prompt.digest))
    assert order == ["p1", "p3", "p0", "p2", "p1"]


def test_a_skipped_prompt_is_used_but_the_two_have_not_met() -> None:
    a, b, c = map(key, "abc")
    played = [Played(frozenset(two), "p0", skipped=two == (a, b)) for two in ((a, b), (a, c), (b, c))]
    i, j, prompt = next_match([a, b, c], prompts(2), played, random.Random(0))
    assert ((i, j), prompt.digest) == ((0, 1), "p1")


# Setting up


@pytest.mark.parametrize(
    ("players", "says"),
    [
        ((), "two players are needed"),
        ((WARM,), "two players are needed"),
        ((WARM, WARM), "two players are both base at temperature 1"),
        ((WARM, replace(WARM, voice="dpo")), "no adapter 'dpo'"),
        ((WARM, replace(WARM, temperature=-1.0)), "temperature 0 to 5"),
        ((WARM, replace(WARM, voice="training now")), "changes with every step"),
    ],
)
def test_players_that_cannot_play_are_refused(arena: Arena, players: tuple[Source, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        arena.start(Setup(players))
    assert arena.current is None


def test_without_prompts_it_says_what_to_do(studio: Any) -> None:
    arena = Arena(studio, "ann")
    with pytest.raises(UserError, match="type some here, or add a file"):
        arena.start(PLAYERS)
    match = arena.start(replace(PLAYERS, typed=("Why?", "  ")))
    assert match.prompt == [{"role": "user", "content": "Why?"}]


def test_prompts_that_were_collected_on_come_last(arena: Arena, studio: Any) -> None:
    first = studio.store.queued()[0]
    record = Record("demonstration", first.prompt, (Completion("So."),), queue_id=first.id)
    studio.store.add(record)
    studio.store.judge(record.id, "bob", Judgement("demonstration"))
    arena.start(PLAYERS)
    asked = []
    for _ in range(6):
        asked.append(drawn(arena).prompt)
        vote(arena, "a")
    assert asked == [*(f"Question {n}?" for n in range(1, 6)), "Question 0?"]


# Voting


def test_a_vote_is_kept_as_a_pair_of_both_players_and_the_next_is_there(arena: Arena, studio: Any) -> None:
    arena.start(PLAYERS)
    match = drawn(arena)
    texts = [match.text(i) for i in match.shown]
    revealed = arena.vote(match.id, "b")
    (entry,) = studio.store.entries()
    assert (entry.record.kind, entry.record.origin, entry.annotator) == ("battle", "arena", "ann")
    assert entry.record.queue_id == studio.store.queued()[0].id and entry.record.versions["base"]
    left, right = (entry.record.completions[i] for i in entry.record.order)
    assert [left.content.strip(), right.content.strip()] == texts
    assert score_of(entry) == 0  # the right one won, whichever completion that is
    assert revealed.names == tuple(f"base · temperature {c.sampling['temperature']:g}" for c in (left, right))
    assert arena.current is not None and arena.current.id != match.id
    assert arena.current.prompt == "Question 1?"
    (row,) = export_lines(studio.store, "pairs").lines
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Question 0?", right.content, left.content)


def test_both_sides_come_up(arena: Arena) -> None:
    """Twelve battles with fair sides: one player on the same side every time has a chance of 1 in 2048; seeded."""
    arena.start(PLAYERS)
    lefts = Counter()
    for _ in range(12):
        lefts[vote(arena, "tie").names[0]] += 1
    assert len(lefts) == 2 and min(lefts.values()) >= 2


def test_a_vote_of_an_old_tab_is_refused_and_counts_nothing(arena: Arena, studio: Any) -> None:
    arena.start(PLAYERS)
    old = drawn(arena).id
    arena.vote(old, "a")
    with pytest.raises(Stale, match="another tab"):
        arena.vote(old, "b")
    with pytest.raises(UserError, match="no such vote"):
        arena.vote(drawn(arena).id, "c")
    assert studio.store.count() == 1
    arena.finish()
    with pytest.raises(Stale, match="press Start"):
        arena.vote(old, "a")


def test_undo_brings_the_last_battle_back_and_the_other_waits(arena: Arena, studio: Any) -> None:
    arena.start(PLAYERS)
    first, _ = drawn(arena), vote(arena, "a")
    second = drawn(arena)
    texts = [first.text(i) for i in first.shown]
    again = arena.undo()
    assert again.id == first.id and [again.text(i) for i in again.shown] == texts
    assert arena.standings().battles == 0
    arena.vote(again.id, "b")
    assert studio.store.count() == 1 and score_of(studio.store.entries()[0]) == 0
    assert arena.current is second
    arena.undo()
    with pytest.raises(UserError, match="no vote in the arena"):
        arena.undo()


def test_undo_survives_a_restart_of_the_arena(arena: Arena, studio: Any) -> None:
    arena.start(PLAYERS)
    voted = drawn(arena)
    vote(arena, "tie")
    arena.finish()
    later = Arena(studio, "ann")
    assert later.setup == PLAYERS and later.standings().battles == 1
    with pytest.raises(UserError, match="press Start"):
        later.undo()
    later.start(later.setup)
    assert later.undo().id == voted.id


def test_skipping_and_both_bad(arena: Arena, studio: Any) -> None:
    """Both bad is a tie of the ratings; a skipped battle counts nothing, and its prompt does not come back at once."""
    arena.start(PLAYERS)
    vote(arena, "bad")
    vote(arena, "skip")
    assert arena.standings().battles == 1
    assert [rate.ties for rate in arena.standings().win_rates.values()] == [1, 1]
    assert {entry.judgement.verdict for entry in studio.store.entries()} == {"bad", "skip"}
    asked = [vote(arena, "tie") and drawn(arena).prompt for _ in range(3)]
    assert "Question 1?" not in asked


def test_identical_answers_are_a_tie_and_too_many_of_them_end_it(arena: Arena, studio: Any) -> None:
    """At temperature 0 the token limit does not matter for what is said before it: the same answer each time."""
    arena.start(Setup((replace(WARM, temperature=0.0), replace(WARM, temperature=0.0, top_p=0.5))))
    for _ in range(ALIKE_IN_A_ROW):
        drawn(arena)
        revealed = arena.look()
        assert revealed is not None and revealed.verdict == IDENTICAL
    assert arena.current is None and "raise a temperature" in arena.problem
    found = arena.standings()
    assert (found.battles, found.identical, found.left.total) == (ALIKE_IN_A_ROW, ALIKE_IN_A_ROW, 0)
    assert export_lines(studio.store, "pairs").lines == []  # nothing to learn from two equal answers
    with pytest.raises(UserError, match="no vote in the arena"):
        arena.undo()  # nobody has voted


def test_a_vote_before_the_answers_began_is_refused_and_one_while_they_stream_is_marked(studio: Any) -> None:
    """The speaker is kept busy, so nothing has begun; then one token each, and the rest waits again."""
    studio.store.enqueue(["Question?"])
    arena = Arena(studio, "ann", seed=1)
    hold, held = threading.Event(), threading.Event()

    def block() -> None:
        held.set()
        hold.wait(SECONDS)

    blocker = threading.Thread(target=studio.speaker.call, args=(block,))
    blocker.start()
    held.wait(SECONDS)
    try:
        match = arena.start(PLAYERS)
        with pytest.raises(UserError, match="has not begun"):
            arena.vote(match.id, "a")
        for answer in match.answers:
            answer._said = "Well"
        arena.vote(match.id, "a")
    finally:
        hold.set()
        blocker.join()
    (entry,) = studio.store.entries()
    assert entry.judgement.streaming and not any(c.finished for c in entry.record.completions)


def test_every_fifth_battle_is_one_that_somebody_else_has_judged(arena: Arena, studio: Any) -> None:
    arena.start(PLAYERS)
    seen = drawn(arena).id
    vote(arena, "a")
    bob = Arena(studio, "bob", seed=2)
    bob.start(PLAYERS)
    shown = []
    for _ in range(SECOND_OPINION_EVERY):
        shown.append(drawn(bob).id)
        vote(bob, "a")
    assert shown.count(seen) == 1 and shown[-1] == seen
    found = bob.standings()
    assert (found.agreement.share, found.agreement.comparisons) == (1, 1)
    assert found.battles == 1 + SECOND_OPINION_EVERY
    assert studio.store.entry(seen, "ann") is not None and studio.store.entry(seen, "bob") is not None


def test_comparing_begins_at_once_where_it_can(arena: Arena, studio: Any) -> None:
    arena.compare("base", "nobody")
    assert arena.current is None and "no adapter 'nobody'" in arena.problem
    assert [player.voice for player in arena.setup.players] == ["base", "nobody"]
    assert arena.standings().battles == 0


# What the votes say


def entry(
    left: str, right: str, verdict: str, *, who: str = "ann", prompt: str = "p", record: Record | None = None
) -> Entry:
    """`verdict`: left, right, tie or bad. Completion 0 stands on the right."""
    if record is None:
        record = Record("battle", prompt, (Completion("R", right), Completion("L", left)), shown=(1, 0))
    judgement = {
        "left": Judgement("preferred", ranks=(2.0, 1.0)),
        "right": Judgement("preferred", ranks=(1.0, 2.0)),
        "tie": Judgement("tie", ranks=(1.0, 1.0)),
        "bad": Judgement("bad"),
    }[verdict]
    return Entry(record, who, judgement, 1, "")


def test_standings_of_two_by_hand() -> None:
    """new won twice (once on each side), lost once, tied once: (2 + .5) / 4. Left won 2, lost 1, tied 1: the same."""
    said = [("new", "old", "left"), ("old", "new", "right"), ("old", "new", "left"), ("new", "old", "bad")]
    entries = [entry(*one, prompt=f"p{n}") for n, one in enumerate(said)]
    found = standings(entries, players_in(entries))
    assert found.names == ("old", "new") and found.battles == 4
    assert found.win_rates["new"].rate == 0.625 and found.win_rates["old"].rate == 0.375
    assert found.left[3:] == (2, 1, 1)
    assert found.winners == (("new",), ("new",), ("new",))
    assert [rating.name for rating in found.ratings] == ["new", "old"]


def test_standings_leave_other_players_out_and_know_those_without_battles() -> None:
    entries = [entry("a", "b", "left"), entry("a", "c", "right")]
    found = standings(entries, [key_of(Completion("", name)) for name in ("a", "b", "d")])
    assert found.battles == 1 and set(found.win_rates) == {"a", "b", "d"}
    assert standings([], []).names == ()


def test_annotators_agree_on_the_same_battle_only() -> None:
    """On the shared record ann says left, bob right; what each judged alone is no comparison."""
    shared = entry("a", "b", "left")
    entries = [shared, entry("a", "b", "right", who="bob", record=shared.record), entry("b", "a", "left", who="bob")]
    found = standings(entries, players_in(entries)).agreement
    assert (found.share, found.comparisons, found.items) == (0, 1, 1)


def test_players_of_one_voice_are_told_apart_by_what_differs() -> None:
    cool, hot = Key("base", None, 0.5, 0.9, 64), Key("base", None, 1.0, 0.9, 64)
    old, new = Key("dpo", "a" * 64, 1.0, 0.9, 64), Key("dpo", "b" * 64, 1.0, 0.9, 64)
    alone = Key("sft", "c" * 64, 1.0, 0.9, 64)
    assert list(labels([cool, hot, old, new, alone]).values()) == [
        "base · temperature 0.5",
        "base · temperature 1",
        "dpo · aaaaaa",
        "dpo · bbbbbb",
        "sft",
    ]


def test_votes_beside_a_reward_run_are_scored_once(studio: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The longer answer has the higher score: LL won once and lost once, the tie counts nothing: 1 of 2 agree."""
    asked = []

    def scores(reward: str, prompt: Any, completions: Any) -> list[float]:
        asked.append(prompt)
        if prompt == "too long":
            raise UserError("too long")
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(studio, "scores", scores)
    monkeypatch.setattr(studio.voices, "run_of", lambda name: tmp_path)
    monkeypatch.setattr(studio.voices, "rewards", lambda: ["reward"])
    monkeypatch.setattr("lowrank_align.adapters.weights_sha256", lambda run: "digest")
    entries = []
    for prompt, verdict in (("p", "left"), ("q", "right"), ("r", "tie"), ("too long", "left")):
        made = Record("battle", prompt, (Completion("R", "a"), Completion("LL", "b")), shown=(1, 0))
        entries.append(entry("", "", verdict, record=made))
    *_, last = judged_by(studio, "reward", entries)
    assert (last.done, last.total, last.left_out) == (3, 3, 1)
    assert (last.agreement.wins, last.agreement.losses) == (1, 1)
    *_, again = judged_by(studio, "reward", entries)
    assert again == last and asked == ["p", "q", "too long"]
    with pytest.raises(UserError, match="no vote for one side"):
        next(judged_by(studio, "reward", entries[2:3]))
    assert battle_entries(studio.store) == []
