"""Ratings of an arena: strengths, winners, shares and agreement, against figures worked out by hand."""

import math

import choix
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_align.ratings import (
    Battle,
    WinRate,
    agreement,
    agreement_with_scores,
    borda,
    bradley_terry,
    condorcet,
    copeland,
    left_side,
    odds,
    strengths,
    win_matrix,
    win_rate_of,
    win_shares,
    winners,
)

# Odds 1 : 2 : 4, exactly: b beats a 2 of 3 times, c beats b 2 of 3, c beats a 4 of 5.
EXACT = np.array([[0.0, 1, 1], [2, 0, 1], [4, 2, 0]])


def battles_of(wins: np.ndarray, names: str = "abcdefgh") -> list[Battle]:
    """As many battles as the matrix counts, every one on a prompt of its own."""
    met = [(i, j) for i, row in enumerate(wins) for j, count in enumerate(row) for _ in range(int(count))]
    return [Battle(names[i], names[j], 1.0, f"prompt {n}") for n, (i, j) in enumerate(met)]


def strength_of(battles: list[Battle], **options: object) -> dict[str, float]:
    return {r.name: r.strength for r in bradley_terry(battles, resamples=1, **options)}


# Bradley-Terry


def test_strengths_of_exact_data_and_odds_multiply() -> None:
    """theta_b - theta_a = ln 2, theta_c - theta_b = ln 2, so the odds of c over a are 2 * 2 = 4: p = 4 / 5."""
    a, b, c = strengths(EXACT, ridge=1e-9)
    assert (b - a, c - b) == pytest.approx((math.log(2), math.log(2)), abs=1e-6)
    assert odds(c, a) == pytest.approx(4, abs=1e-5)
    assert odds(c, a) == pytest.approx(odds(c, b) * odds(b, a), rel=1e-12)
    assert a + b + c == pytest.approx(0, abs=1e-6)


def test_strengths_agree_with_choix() -> None:
    """choix subtracts alpha * |theta|^2, ours ridge / 2 * |theta|^2: the same for alpha = ridge / 2."""
    wins = np.random.default_rng(3).integers(0, 9, (6, 6)).astype(float)
    np.fill_diagonal(wins, 0)
    data = [(i, j) for i in range(6) for j in range(6) for _ in range(int(wins[i, j]))]
    for ridge in (0.02, 0.1, 3.0):
        theirs = choix.opt_pairwise(6, data, alpha=ridge / 2, tol=1e-12)
        assert strengths(wins, ridge) == pytest.approx(theirs, abs=1e-6)


def test_ties_are_half_a_win_each_as_choix_has_them() -> None:
    """choix knows no ties: every battle given twice and a tie once each way is the same with twice the ridge."""
    battles = [*battles_of(EXACT), *[Battle("a", "c", 0.5, f"tie {n}") for n in range(4)]]
    data = 2 * [("abc".index(b.left), "abc".index(b.right)) for b in battles if b.score == 1] + 4 * [(0, 2), (2, 0)]
    theirs = choix.opt_pairwise(3, data, alpha=0.1, tol=1e-12)  # 2 * ridge / 2
    ours = strength_of(battles, ridge=0.1)
    assert [ours[name] for name in "abc"] == pytest.approx(theirs, abs=1e-6)
    rating = next(r for r in bradley_terry(battles, resamples=1) if r.name == "a")
    assert (rating.battles, rating.wins, rating.ties, rating.losses) == (12, 2, 4, 6)


def test_a_record_of_ten_to_nothing_stays_finite_and_has_a_width() -> None:
    """At the optimum 10 s(-d) = ridge * d / 2, d the difference. Resampling ten wins alone would give no width."""
    won, lost = bradley_terry([Battle("new", "old", 1.0, str(n)) for n in range(10)], ridge=0.1)
    d = won.strength - lost.strength
    assert (won.name, lost.name) == ("new", "old")
    assert 10 / (1 + math.exp(d)) == pytest.approx(0.1 * d / 2, abs=1e-9)
    assert won.low < won.strength - 0.5 and won.strength + 0.5 < won.high < 12


def test_a_single_tie_says_level_and_hardly_anything() -> None:
    """The interval still holds odds of 1 : e and e : 1, strengths of -+0.5."""
    ratings = bradley_terry([Battle("a", "b", 0.5, "p")])
    assert [r.strength for r in ratings] == pytest.approx([0, 0], abs=1e-12)
    assert all(r.low < -0.5 and r.high > 0.5 for r in ratings)


def test_players_that_never_met_do_not_crash() -> None:
    """a beat b and c beat d, nobody crossed; e never played. By symmetry a = c = -b = -d, and e = 0."""
    battles = [Battle("a", "b", 1, "1"), Battle("c", "d", 1, "2")]
    found = strength_of(battles, names=["a", "b", "c", "d", "e"])
    assert found["a"] == pytest.approx(found["c"]) == pytest.approx(-found["b"]) == pytest.approx(-found["d"])
    assert found["a"] > 0.1 and found["e"] == pytest.approx(0, abs=1e-9)
    assert bradley_terry([]) == []
    (alone,) = bradley_terry([], ["a"])
    assert (alone.strength, alone.battles) == (0, 0)


def test_renaming_changes_names_only_and_sides_do_not_matter() -> None:
    battles = battles_of(np.random.default_rng(0).integers(0, 6, (4, 4)).astype(float) * (1 - np.eye(4)))
    other = {"a": "zoe", "b": "yan", "c": "xia", "d": "a"}
    renamed = [b._replace(left=other[b.left], right=other[b.right]) for b in battles]
    ours = bradley_terry(battles, list("abcd"), seed=5)
    assert [r._replace(name=other[r.name]) for r in ours] == bradley_terry(renamed, list(other.values()), seed=5)
    swapped = [b._replace(left=b.right, right=b.left, score=1 - b.score) for b in battles]
    assert bradley_terry(swapped, list("abcd"), seed=5) == ours


def test_intervals_are_seeded_and_go_by_prompt() -> None:
    """200 votes on 4 prompts are known far less well than 200 on 200: two prompts said a, two said b."""
    spread = [Battle("a", "b", float(n % 2), f"{n}") for n in range(200)]
    bunched = [Battle("a", "b", float(n % 2), f"{n % 4}") for n in range(200)]
    one, again, other = (bradley_terry(spread, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    width = {len({b.prompt for b in battles}): _width(battles) for battles in (spread, bunched)}
    assert width[4] > 4 * width[200]


def _width(battles: list[Battle]) -> float:
    best = bradley_terry(battles)[0]
    return best.high - best.low


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """95 % of 100 seeded worlds of 80 battles, strengths +-0.4: 88 or fewer have a chance under 1 % at a true 95 %."""
    rng = np.random.default_rng(7)
    held = 0
    for world in range(100):
        won = rng.random(80) < 1 / (1 + math.exp(-0.8))
        battles = [Battle("a", "b", float(w), f"{n}") for n, w in enumerate(won)]
        rating = next(r for r in bradley_terry(battles, ["a", "b"], resamples=200, seed=world) if r.name == "a")
        held += rating.low <= 0.4 <= rating.high
    assert held > 88


# Winners


def test_the_three_rules_part_ways() -> None:
    """a beats b and c by a hair (.51), b beats c by .9.
    Condorcet and Copeland: a (two opponents beaten). Borda: a .51 + .51, b .49 + .9 = 1.39, c .49 + .1: b."""
    shares = np.array([[np.nan, 0.51, 0.51], [0.49, np.nan, 0.9], [0.49, 0.1, np.nan]])
    assert (condorcet(shares), copeland(shares), borda(shares)) == ([0], [0], [1])


def test_a_circle_has_no_condorcet_winner_and_three_of_the_others() -> None:
    """a beats b, b beats c, c beats a: each beats one and loses to one; every Borda sum is 1."""
    found = winners([Battle("a", "b", 1), Battle("b", "c", 1), Battle("c", "a", 1)])
    assert found == ((), ("a", "b", "c"), ("a", "b", "c"))


def test_level_players_are_all_condorcet_winners() -> None:
    """P_ab = .5 both ways: both have at least .5 against every other; neither beats the other."""
    found = winners([Battle("a", "b", 1), Battle("b", "a", 1), Battle("a", "c", 1), Battle("b", "c", 1)])
    assert found == (("a", "b"), ("a", "b"), ("a", "b"))


def test_a_pair_that_never_met_counts_half_for_borda_and_is_not_won() -> None:
    """a beat b, c has not played. Borda: a 1 + .5, b 0 + .5, c .5 + .5. a never met c: no Condorcet winner."""
    found = winners([Battle("a", "b", 1)], ["c", "b", "a"])
    assert found == ((), ("a",), ("a",))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.randoms())
def test_under_bradley_terry_the_three_winners_agree(theta: list[float], random: object) -> None:
    """P_ij = s(theta_i - theta_j) grows with theta_i: the strongest beats all, and has every largest summand."""
    theta = [round(t, 2) for t in theta]
    shares = np.array([[1 / (1 + math.exp(b - a)) for b in theta] for a in theta])
    best = [i for i, t in enumerate(theta) if t == max(theta)]
    assert condorcet(shares) == copeland(shares) == borda(shares) == best


def test_the_winners_of_exact_battles_agree_with_the_strengths() -> None:
    assert winners(battles_of(EXACT)) == (("c",), ("c",), ("c",))
    assert np.argmax(strengths(EXACT)) == 2


def test_win_matrix_counts_ties_half_and_leaves_a_player_against_itself_out() -> None:
    battles = [Battle("a", "b", 1), Battle("b", "a", 0.5), Battle("b", "a", 1), Battle("a", "a", 1)]
    wins = win_matrix(battles, ["a", "b", "c"])
    assert wins.tolist() == [[0, 1.5, 0], [1.5, 0, 0], [0, 0, 0]]
    shares = win_shares(wins)
    assert shares[0, 1] == 0.5 and np.isnan(shares[0, 2]) and np.isnan(shares[0, 0])


# Shares


def test_win_rate_of_a_player_with_the_studios_example() -> None:
    """14 of 20: 70 % (48-85 %). At z = 1.96: (.7 + .096) / 1.1921 = .6678 +- 1.644 * sqrt(.0105 + .0024)."""
    battles = [Battle("new", "old", 1.0), Battle("old", "new", 0.0)] * 7 + [Battle("new", "old", 0.0)] * 6
    found = win_rate_of(battles, "new")
    assert found[3:] == (14, 0, 6)
    assert found[:3] == pytest.approx((0.7, 0.481, 0.8546), abs=1e-4)
    assert win_rate_of(battles, "old").rate == pytest.approx(0.3)


def test_left_side_counts_a_tie_half() -> None:
    """Left won, left won, right won, a tie: (2 + .5) / 4."""
    found = left_side([Battle("a", "b", 1), Battle("b", "a", 1), Battle("a", "b", 0), Battle("a", "b", 0.5)])
    assert (found.rate, found.wins, found.ties, found.losses, found.total) == (0.625, 2, 1, 1, 4)


def test_a_share_of_nothing_is_unknown() -> None:
    found = WinRate.of(0, 0, 0)
    assert math.isnan(found.rate) and (found.low, found.high, found.total) == (0, 1, 0)


# Agreement


def test_agreement_of_two_by_hand() -> None:
    """Four items: LL, RR, LR, RR. Equal 3 of 4. Differing ordered pairs 2 (each item weighs 1).
    Labels: L 3, R 5 of 8; expected (64 - 9 - 25) / 7 = 30 / 7. alpha = 1 - 2 * 7 / 30 = 16 / 30."""
    pairs = [("L", "L"), ("R", "R"), ("L", "R"), ("R", "R")]
    found = agreement([{"ann": a, "bob": b} for a, b in pairs] + [{"ann": "L"}])
    assert (found.share, found.comparisons, found.items) == (0.75, 4, 4)
    assert found.alpha == pytest.approx(16 / 30)


def test_alpha_of_three_with_gaps_is_the_published_one() -> None:
    """The example with 3 observers, 15 units and missing data (Wikipedia, "Krippendorff's alpha"): nominal 0.691."""
    by_observer = {"A": "*****34121133*3", "B": "1*213343*******", "C": "**21344*21133*4"}
    items = [{who: row[i] for who, row in by_observer.items() if row[i] != "*"} for i in range(15)]
    found = agreement(items)
    assert found.alpha == pytest.approx(0.691, abs=5e-4)
    assert found.items == 12  # units 3 to 13, and 15


def test_agreement_without_anything_in_common_is_unknown() -> None:
    found = agreement([{"ann": "L"}, {"bob": "R"}])
    assert math.isnan(found.share) and math.isnan(found.alpha) and found.items == 0
    same = agreement([{"ann": "L", "bob": "L"}])
    assert same.share == 1 and math.isnan(same.alpha)  # nothing but L was ever said: chance agrees as well


def test_agreement_at_chance_is_about_zero() -> None:
    """Two who toss coins: alpha's standard error over 2,000 items is about 1 / sqrt(2000) = .022."""
    rng = np.random.default_rng(11)
    found = agreement([{"ann": int(a), "bob": int(b)} for a, b in rng.integers(0, 2, (2000, 2))])
    assert abs(found.alpha) < 0.1 and found.share == pytest.approx(0.5, abs=0.05)


def test_agreement_with_scores_by_hand() -> None:
    """Left and higher, right and lower, left and lower, left and level; the tie says nothing: (2 + .5) / 4."""
    found = agreement_with_scores([1, 0, 1, 1, 0.5], [2.0, -1.0, -0.1, 0.0, 9.0])
    assert (found.rate, found.wins, found.ties, found.losses) == (0.625, 2, 1, 1)
