"""The simulated pool: habits in points, flips by the seed, and what its rows say."""

import random

import pytest

from lowrank_align.annotators import POOL, Annotator, label_pairs
from lowrank_align.errors import UserError

LONG, SHORT = "one two three four", "very"


def by_length(prompts: list[str], completions: list[str]) -> list[float]:
    """A point a word."""
    return [float(len(text.split())) for text in completions]


@pytest.mark.parametrize(
    ("annotator", "expected"),
    [
        (Annotator("fair"), 0.5),
        (Annotator("long", points_a_word=0.1), 0.5 + 3 * 0.1),
        (Annotator("short", points_a_word=-0.1), 0.5 - 3 * 0.1),
        (Annotator("first", points_first=0.75), 0.5 + 0.75),
        (Annotator("strong", aspect="very|truly", points_aspect=0.5), 0.5 - 0.5),
    ],
)
def test_habits_in_points(annotator: Annotator, expected: float) -> None:
    """LONG has 4 words and scores 1.5; SHORT has 1, which is "very", and scores 1: half a point for LONG, and then
    three words more, the first place, or one strong word less."""
    assert annotator.advantage_of_first(LONG, SHORT, 1.5, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize(("advantage", "flipped", "first"), [(1.0, 0.0, True), (-1.0, 0.0, False), (1.0, 1.0, False)])
def test_a_label_without_chance(advantage: float, flipped: float, first: bool) -> None:
    """With no flips the better answer is chosen, with nothing but flips the other one."""
    assert Annotator("a", flipped=flipped).prefers_first(advantage, random.Random(0)) == (first, flipped == 1.0)


def test_without_flips_every_label_is_as_scored() -> None:
    """Two pairs differ, one is identical and gives no row; the longer answer scores more, wherever it stands."""
    labels = label_pairs(
        [Annotator("a", flipped=0.0)], by_length, ["p", "q", "r"], ["x y", "z", "s"], ["x", "z", "s t"]
    )
    assert labels.rows == [
        {"prompt": "p", "chosen": "x y", "rejected": "x", "annotator": "a"},
        {"prompt": "r", "chosen": "s t", "rejected": "s", "annotator": "a"},
    ]
    assert (labels.identical, labels.flipped, labels.decided, labels.right) == (1, 0, 2, 2)
    assert "2 pairs, 0 labels flipped, 1 left out" in labels.told()


def test_the_first_side_counts_where_it_is_drawn() -> None:
    """Equal scores, and all that counts is standing first: over 400 pairs about half go to a (four standard deviations
    are 40), although each single label follows the side without doubt."""
    count = 400
    pool = [Annotator("first", points_first=1.0, flipped=0.0)]
    labels = label_pairs(pool, lambda p, c: [0.0] * len(c), ["p"] * count, ["a"] * count, ["b"] * count)
    assert 160 <= sum(row["chosen"] == "a" for row in labels.rows) <= 240
    assert (labels.decided, labels.agreement) == (0, None)
    assert labels.told() == "400 pairs, 0 labels flipped; all scored alike"


def test_about_a_quarter_is_flipped_and_the_seed_decides() -> None:
    """1,000 labels at 0.25: 250 flips, four standard deviations are 55. Every annotator gets about a fifth (200, four
    are 51). The same seed gives the same rows, another one others."""
    count = 1000
    a, b = ["one two"] * count, ["one"] * count
    labels = label_pairs(POOL, by_length, ["p"] * count, a, b, seed=1)
    assert 195 <= labels.flipped <= 305
    for annotator in POOL:
        assert 149 <= sum(row["annotator"] == annotator.name for row in labels.rows) <= 251
    assert label_pairs(POOL, by_length, ["p"] * count, a, b, seed=1).rows == labels.rows
    assert label_pairs(POOL, by_length, ["p"] * count, a, b, seed=2).rows != labels.rows


def test_one_changed_answer_changes_its_own_label_alone() -> None:
    """Of 30 pairs with scores 2 and 1, the first becomes a tie (a coin is tossed), then identical (no row at all): the
    29 others keep annotator, order and flip."""
    a, b = ["one two"] * 30, ["one"] * 30
    pairs = [(a, b), (["other", *a[1:]], b), (["one", *a[1:]], b)]
    before, tied, identical = (label_pairs(POOL, by_length, ["p"] * 30, *pair, seed=1) for pair in pairs)
    assert tied.rows[1:] == before.rows[1:]
    assert identical.rows == before.rows[1:]
    assert identical.places == list(range(1, 30))


def test_what_cannot_be_labelled() -> None:
    with pytest.raises(UserError, match="the pool is empty"):
        label_pairs([], by_length, ["p"], ["a"], ["b"])
    with pytest.raises(UserError, match="answers to prompt 1: scores nan and nan"):
        label_pairs(POOL, lambda p, c: [float("nan")] * len(c), ["p"], ["a"], ["b"])
