"""A pool of simulated annotators who differ among themselves and err, as people do.

One score behind every judgement would make preference data too good: over-optimisation does not show then. AlpacaFarm
(arXiv 2305.14387) gets its noise from several annotators with habits of their own and a quarter of the labels flipped;
here the habits are said in points of the exact score. Left out: annotators that are language models themselves.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_align.errors import UserError

Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (prompts, completions), one each -> a score each

FLIPPED = 0.25
STRONG_WORDS = r"\b(?:very|truly|really)\b|!"


@dataclass(frozen=True)
class Annotator:
    """Somebody who goes by the score, has one habit, and errs."""

    name: str
    points_a_word: float = 0.0  # what a word more is worth to them; negative: likes it short
    points_first: float = 0.0  # what standing first is worth
    aspect: str = ""  # a regular expression of what they look for ...
    points_aspect: float = 0.0  # ... and what each place of it is worth
    flipped: float = FLIPPED  # the share of their labels that are the other way round

    def advantage_of_first(self, first: str, second: str, score_first: float, score_second: float) -> float:
        """By how many points of the score the answer shown first is the better one to this annotator."""
        words = len(first.split()) - len(second.split())
        found = len(re.findall(self.aspect, first)) - len(re.findall(self.aspect, second)) if self.aspect else 0
        habits = self.points_a_word * words + self.points_first + self.points_aspect * found
        return score_first - score_second + habits

    def prefers_first(self, advantage: float, rng: random.Random) -> tuple[bool, bool]:
        """(whether the first answer is chosen, whether that label was flipped); a coin decides between equals.

        Both are drawn whatever the advantage, so that flips do not depend on scores.
        """
        coin, flipped = rng.random() < 0.5, rng.random() < self.flipped
        better = coin if advantage == 0 else advantage > 0
        return better != flipped, flipped


POOL: tuple[Annotator, ...] = (
    Annotator("fair"),
    Annotator("likes it long", points_a_word=0.1),
    Annotator("likes it short", points_a_word=-0.1),
    Annotator("takes the first", points_first=0.75),
    Annotator("likes strong words", aspect=STRONG_WORDS, points_aspect=0.5),
)


@dataclass
class Labels:
    """What a pool made of pairs of answers."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # prompt, chosen, rejected, annotator
    places: list[int] = field(default_factory=list)  # which pair each row is of, from 0
    identical: int = 0  # pairs without a row: both answers were the same
    refused: int = 0  # rows taken out again: an answer that no file may hold, as with a NUL character
    flipped: int = 0
    decided: int = 0  # rows between whose answers the exact score decides
    right: int = 0  # of those, rows whose chosen answer has the higher one

    @property
    def agreement(self) -> float | None:
        """Share of the decided rows that are labelled as the exact score has it; None where it decides none."""
        return self.right / self.decided if self.decided else None

    def told(self) -> str:
        """One line about them."""
        left_out = f", {self.identical} left out: both answers the same" if self.identical else ""
        left_out += f", {self.refused} left out: no text that a file may hold" if self.refused else ""
        right = "all scored alike" if self.agreement is None else f"{self.agreement:.0%} as scored"
        return f"{len(self.rows)} pairs, {self.flipped} labels flipped{left_out}; {right}"


def label_pairs(
    pool: Sequence[Annotator],
    score: Score,
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    *,
    seed: int = 0,
) -> Labels:
    """Each pair of answers to a prompt is shown to one annotator of the pool, in a drawn order.

    All three sequences have one entry a prompt. The seed and a pair's place alone draw its annotator, order, coin and
    flip, whatever the answers and scores are, its own and those of other pairs.
    UserError for an empty pool or a score that is not finite.
    """
    if not pool:
        raise UserError("annotators: the pool is empty")
    scores_a, scores_b = score(prompts, answers_a), score(prompts, answers_b)
    labels = Labels()
    columns = zip(prompts, answers_a, answers_b, scores_a, scores_b, strict=True)
    for place, (prompt, answer_a, answer_b, score_a, score_b) in enumerate(columns):
        if not (math.isfinite(score_a) and math.isfinite(score_b)):
            raise UserError(f"answers to prompt {place + 1}: scores {score_a} and {score_b} (the score must be finite)")
        rng = random.Random(f"{seed}/{place}")
        annotator, swapped = rng.choice(pool), rng.random() < 0.5
        if answer_a == answer_b:
            labels.identical += 1
            continue
        shown = [(answer_a, score_a), (answer_b, score_b)][:: -1 if swapped else 1]
        (first, score_first), (second, score_second) = shown
        advantage = annotator.advantage_of_first(first, second, score_first, score_second)
        takes_first, flipped = annotator.prefers_first(advantage, rng)
        (chosen, high), (rejected, low) = shown if takes_first else shown[::-1]
        labels.rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "annotator": annotator.name})
        labels.places.append(place)
        labels.flipped += flipped
        labels.decided += high != low
        labels.right += high > low
    return labels
