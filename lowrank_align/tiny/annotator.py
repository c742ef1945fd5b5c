"""A simulated annotator: prefers the better score, with Bradley-Terry noise."""

import math
import random
from collections.abc import Sequence

from lowrank_align.errors import UserError


def annotate(score_a: float, score_b: float, temperature: float, rng: random.Random) -> int:
    """Which of two answers the annotator prefers: 0 for a, 1 for b.

    P(a) = sigmoid((score_a - score_b) / temperature) (Bradley and Terry 1952): at temperature 1 a point of score is a
    nat of log-odds; near 0 the better score always wins.
    """
    probability = 0.5 * (1.0 + math.tanh((score_a - score_b) / (2.0 * temperature)))  # never overflows, unlike exp
    return 0 if rng.random() < probability else 1


def simulated_pairs(
    prompts: Sequence[str],
    completions_a: Sequence[str],
    completions_b: Sequence[str],
    scores_a: Sequence[float],
    scores_b: Sequence[float],
    *,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[dict[str, str]]:
    """`{"prompt", "chosen", "rejected"}` rows as `annotate` labels them; identical answers give no row.

    All five sequences have one entry a prompt. Raises `UserError` for a score that is not finite or a temperature
    that is not positive.
    """
    if not temperature > 0:
        raise UserError(f"annotator temperature: {temperature} (must be above 0)")
    rng = random.Random(seed)
    rows = []
    answers = zip(prompts, completions_a, completions_b, scores_a, scores_b, strict=True)
    for place, (prompt, answer_a, answer_b, score_a, score_b) in enumerate(answers, start=1):
        if not (math.isfinite(score_a) and math.isfinite(score_b)):
            raise UserError(f"answers to prompt {place}: scores {score_a} and {score_b} (the score must be finite)")
        if answer_a == answer_b:
            continue
        if annotate(score_a, score_b, temperature, rng) == 0:
            rows.append({"prompt": prompt, "chosen": answer_a, "rejected": answer_b})
        else:
            rows.append({"prompt": prompt, "chosen": answer_b, "rejected": answer_a})
    return rows
