"""What a policy answers, how far it went from another role, and how well a reward model tells answers apart."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from lowrank_align.base import Base
from lowrank_align.data.chat import Renderer
from lowrank_align.evaluate.answers import summed_logps, tree
from lowrank_align.rollout import Rollout, generator_for, sample
from lowrank_align.trees import TreeRow

BATCH = 16


@dataclass(frozen=True)
class Answers:
    """One answer a prompt."""

    rollouts: list[Rollout]
    texts: list[str]
    tokens_per_second: float


def answer(
    base: Base, role: str, renderer: Renderer, prompts: Sequence[list[int]], *, max_new_tokens: int, seed: int
) -> Answers:
    """Sample one answer a prompt from `role` at temperature 1."""
    began = time.perf_counter()
    with base.role(role):
        groups = sample(
            base,
            prompts,
            end_ids=renderer.end_ids,
            max_new_tokens=max_new_tokens,
            generator=generator_for(base.device, seed, role, "answers"),
            batch_size=4 * BATCH,
        )
    rollouts = [group[0] for group in groups]
    pace = sum(len(r.ids) for r in rollouts) / (time.perf_counter() - began)
    return Answers(rollouts, [renderer.decode(r.ids) for r in rollouts], pace)


def kl_to(base: Base, role: str, reference: str, rollouts: Sequence[Rollout]) -> float:
    """KL(role || reference) in nats an answer: the mean of log pi(y|x) - log ref(y|x) over answers y that `role` drew.

    The k1 estimate of whole answers: unbiased, and rarely a little below 0.
    """
    trees = [tree(r.prompt_ids, r.ids) for r in rollouts]
    return fmean(k1(base, role, reference, trees, trees, BATCH)[0])


def k1(
    base: Base, role: str, reference: str, ours: Sequence[TreeRow], theirs: Sequence[TreeRow], size: int
) -> tuple[list[float], list[int]]:
    """Of every answer log pi(y|x) - log ref(y|x) in nats, and its tokens; `size` rows at once.

    `ours` and `theirs` are the same answers, each behind what that role is asked: their prefixes may differ.
    """
    logps, tokens = summed_logps(base, role, ours, size)
    others, _ = summed_logps(base, reference, theirs, size)
    return [a - b for a, b in zip(logps, others, strict=True)], tokens


@torch.no_grad()
def reward_scores(base: Base, role: str, rollouts: Sequence[Rollout]) -> list[float]:
    """The shifted scores that the reward model `role` gives to answers."""
    found: list[float] = []
    trees = [tree(r.prompt_ids, r.ids) for r in rollouts]
    with base.role(role):
        for start in range(0, len(trees), BATCH):
            found += base.scores(base.collate(trees[start : start + BATCH]), shifted=True).tolist()
    return found


def pair_accuracy(
    scores_a: Sequence[float], scores_b: Sequence[float], true_a: Sequence[float], true_b: Sequence[float]
) -> float:
    """Share of pairs that two scorers order alike, among those that the true score does not call equal."""
    decided = [(a - b, ta - tb) for a, b, ta, tb in zip(scores_a, scores_b, true_a, true_b, strict=True) if ta != tb]
    return (
        sum((difference > 0) == (true > 0) for difference, true in decided) / len(decided) if decided else float("nan")
    )
