"""The arena in words: figures with their unit and interval, and nothing that tells who plays."""

from typing import Any

import pytest

from lowrank_align.errors import UserError
from lowrank_align.ratings import WinRate
from lowrank_align.store import Completion, Entry, Judgement, Record
from lowrank_align.studio.answers import Source
from lowrank_align.studio.arena import Arena, Revealed
from lowrank_align.studio.arena_view import (
    judged_in_words,
    revealed,
    setup_as_typed,
    setup_from,
    shown_now,
    summary,
    table,
)
from lowrank_align.studio.standings import Judged, key_of, standings


def battle(left: str, right: str, score: float, prompt: str, *, tags: tuple[str, ...] = ()) -> Entry:
    record = Record("battle", prompt, (Completion("L", left), Completion("R", right)))
    ranks = {1.0: (1.0, 2.0), 0.0: (2.0, 1.0), 0.5: (1.0, 1.0)}[score]
    judgement = Judgement("tie" if score == 0.5 else "preferred", ranks=ranks, tags=tags)
    return Entry(record, "ann", judgement, 1, "")


def keys(*names: str) -> list[Any]:
    return [key_of(Completion("", name)) for name in names]


def won(first: int, of: int, names: tuple[str, str] = ("new", "old")) -> Any:
    entries = [battle(*names, float(n < first), f"p{n}") for n in range(of)]
    return standings(entries, keys(*names))


def test_two_players_by_their_win_rate() -> None:
    """14 of 20 is 70 % with Wilson's 48-85 % (0.481 to 0.8545): 50 % lies within. 18 of 20 is 90 %, from 70 to 97 %."""
    lines = summary(won(14, 20)).splitlines()
    assert lines[0].startswith("new wins 70 % (48-85 %) of 20 battles against old. Who is better is not clear yet")
    assert "The left answer won 70 % (48-85 %) of 20 votes" in lines[1]
    assert summary(won(18, 20)).startswith("new wins 90 % (70-97 %) of 20 battles against old: it is better.")
    assert "old: old is better." in summary(won(2, 20)).splitlines()[0]
    shown = table(won(14, 20))
    assert shown.headers[:3] == ["player", "win rate", "95 % interval"]
    assert shown.rows[0] == ["new", "70 %", "48-85 %", 20, 14, 0, 6]


def test_a_left_side_that_wins_too_often_is_told() -> None:
    """18 of 20 on the left is more than sides explain, 11 of 20 is not."""
    assert "should not matter; read the other side first" in summary(won(18, 20))
    assert "sides do not seem to matter" in summary(won(11, 20))


def test_several_players_by_rating_and_three_rules() -> None:
    """a beats b, b beats c, a beats c, four times each: a wins by every rule, the points' mean is 1000."""
    met = [("a", "b"), ("b", "c"), ("a", "c")] * 4
    entries = [battle(*two, 1.0, f"p{n}") for n, two in enumerate(met)]
    found = standings(entries, keys("a", "b", "c"))
    assert [row[0] for row in table(found).rows] == ["a", "b", "c"]
    points = [row[1] for row in table(found).rows]
    assert points[0] > 1000 > points[2] and points[1] == 1000
    text = summary(found)
    for rule in ("(Condorcet): a.", "(Copeland): a.", "(Borda): a."):
        assert rule in text


def test_a_circle_has_nobody_at_least_even_with_every_other() -> None:
    entries = [battle(*two, 1.0, "p") for two in (("a", "b"), ("b", "c"), ("c", "a"))]
    assert "(Condorcet): nobody yet." in summary(standings(entries, keys("a", "b", "c")))


def test_before_any_vote_it_says_what_votes_are_for() -> None:
    assert summary(standings([], keys("a", "b"))).startswith("No votes yet.")
    assert summary(standings([], [])).startswith("No votes yet.")


def test_ties_of_identical_answers_are_counted_aloud() -> None:
    entries = [battle("a", "b", 0.5, "p", tags=("identical",)), battle("a", "b", 1.0, "q")]
    text = summary(standings(entries, keys("a", "b")))
    assert "1 battle was a tie because both answers were the same." in text and "of 1 vote:" in text


def test_the_battle_tells_nothing_of_who_plays(studio: Any) -> None:
    """Before the vote: prompt, texts, and whether they are still written. After it, the names by side."""
    studio.store.enqueue(["Question?"])
    arena = Arena(studio, "ann", seed=1)
    arena.start(setup_from(["base"], "0.9, 1.1", 6, ""))
    assert arena.current is not None
    for answer in arena.current.answers:
        answer.wait(60.0)
    now = shown_now(arena)
    assert now.prompt == "Question?" and not now.streaming and all(now.texts)
    assert not any(word in repr(now).lower() for word in ("base", "temperature", "seed", "0.9", "1.1"))
    told = revealed(arena.vote(now.battle_id, "b"))
    assert told.startswith("B won · A: base · temperature ")
    assert revealed(Revealed(("x", "y"), "identical")) == "x and y gave the same answer: a tie"


def test_without_a_battle_the_problem_is_a_sentence(studio: Any) -> None:
    arena = Arena(studio, "ann")
    arena.compare("base", "nobody")
    assert shown_now(arena).message.startswith("There is no adapter 'nobody'") and shown_now(arena).message.endswith(
        "."
    )


def test_players_are_every_voice_at_every_temperature_and_back() -> None:
    setup = setup_from(["base", "dpo"], "0.7; 1, 0.7", 64.0, " Why? \n\nHow?\n")
    assert setup.players == tuple(
        Source(voice, temperature=t, max_new_tokens=64) for voice in ("base", "dpo") for t in (0.7, 1.0)
    )
    assert setup.typed == ("Why?", "How?")
    assert setup_as_typed(setup, None) == (["base", "dpo"], "0.7, 1", 64, "Why?\nHow?")


@pytest.mark.parametrize(
    ("temperatures", "longest", "says"),
    [
        ("warm", 8, "must be numbers"),
        ("", 8, "at least one"),
        ("9", 8, "from 0 to 5"),
        ("nan", 8, "0 to 5"),
        ("1", 0, "1 token"),
    ],
)
def test_players_typed_wrongly_are_refused(temperatures: str, longest: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        setup_from(["base"], temperatures, longest, "")


def test_a_reward_run_in_words() -> None:
    """7 of 10 with Wilson's 40-89 % (0.3968 to 0.8922)."""
    judged = Judged(10, 10, WinRate.of(7, 0, 3), 2)
    assert judged_in_words("rm", judged) == (
        "rm scores the better answer higher in 70 % (40-89 %) of 10 votes for a side; 2 could not be scored."
    )
    assert judged_in_words("rm", Judged(10, 30, WinRate.of(7, 0, 3), 0)) == "Scoring 10 of 30 ..."
    assert "none of the 3" in judged_in_words("rm", Judged(3, 3, WinRate.of(0, 0, 0), 3))
