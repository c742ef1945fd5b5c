"""Best-of-n: of several completions of a prompt, the one with the highest score."""

from collections.abc import Sequence
from typing import Any

from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row
from lowrank_align.rewards import Rewards, seen_answer
from lowrank_align.rollout import Rollout
from lowrank_align.trees import Completion, TreeRow


def scores_of(
    rewards: Rewards, renderer: Renderer, rows: Sequence[Row], groups: Sequence[Sequence[Rollout]], size: int
) -> list[list[float]]:
    """What the rewards say of each row's completions, equally many of each; they see no answer prefix."""
    prefix = len(renderer.prefix_ids)
    trees = [
        TreeRow(g[0].prompt_ids[: len(g[0].prompt_ids) - prefix], [Completion(r.ids, [True] * len(r.ids)) for r in g])
        for g in groups
    ]
    texts = [
        [seen_answer(renderer, rollout.ids, chat=not isinstance(row.prompt, str)) for rollout in group]
        for row, group in zip(rows, groups, strict=True)
    ]
    found = rewards.scores(rows, trees, texts, max(1, size // len(groups[0])))
    return found.view(len(groups), -1).tolist()  # type: ignore[no-any-return]


def highest(answers: Sequence[dict[str, Any]], scores: Sequence[float]) -> list[dict[str, Any]]:
    """The highest score's answer alone, the first of equal ones, with its score."""
    best = max(range(len(scores)), key=lambda i: scores[i])
    return [{**answers[best], "score": scores[best]}]
