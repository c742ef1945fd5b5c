"""A policy on prompts it has not seen: exact score, learned score, KL to SFT, wins against SFT's answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lowrank_align.apps.frontier.start import JUDGE, SFT, World

from lowrank_align import adapters
from lowrank_align.data.formats import Row
from lowrank_align.evaluate.answers import tree
from lowrank_align.evaluate.policy import k1, pair_accuracy, reward_scores
from lowrank_align.evaluate.win_rate import win_rate
from lowrank_align.rewards import seen_answer, seen_prompt
from lowrank_align.rollout import Rollout, generator_for, sample

BATCH = 64
SCORED = 16  # trees at once


@dataclass(frozen=True)
class Answered:
    """Answers to prompts, `count` each, one after the other."""

    rollouts: list[Rollout]
    texts: list[str]
    scores: list[float]  # exact


def answers(
    world: World,
    role: str,
    rows: Sequence[Row],
    purpose: str,
    *,
    prefix: str = "",
    temperature: float = 1.0,
    count: int = 1,
) -> Answered:
    """`count` answers of `role` to each prompt, behind its answer prefix; `purpose` is part of the seed."""
    renderer = world.renderer.with_prefix(prefix) if prefix else world.renderer
    with world.base.role(role):
        groups = sample(
            world.base,
            [renderer.prompt_ids(row) for row in rows],
            end_ids=renderer.end_ids,
            max_new_tokens=world.ground.max_new_tokens,
            generator=generator_for(world.base.device, world.seed, purpose, "answers"),
            temperature=temperature,
            completions_per_prompt=count,
            batch_size=BATCH,
        )
    bare = [world.renderer.prompt_ids(row) for row in rows]
    flat = [
        Rollout(ids, rollout.ids, rollout.finished)
        for ids, group in zip(bare, groups, strict=True)
        for rollout in group
    ]
    asked = [row for row in rows for _ in range(count)]
    texts = [
        seen_answer(renderer, r.ids, chat=not isinstance(row.prompt, str)) for row, r in zip(asked, flat, strict=True)
    ]
    scores = list(world.score([seen_prompt(row) for row in asked], texts))
    return Answered(flat, texts, scores)


def kl_to_sft(world: World, role: str, rollouts: Sequence[Rollout], prefix_ids: Sequence[int] = ()) -> float:
    """KL(role || SFT) in nats an answer, by the k1 estimate on answers that `role` drew.

    The role answers behind its prefix, SFT without it: what is compared is what each would say to the same prompt.
    """
    ours = [tree([*r.prompt_ids, *prefix_ids], r.ids) for r in rollouts]
    theirs = [tree(r.prompt_ids, r.ids) for r in rollouts]
    return fmean(k1(world.base, role, SFT, ours, theirs, SCORED)[0])


def figures(world: World, role: str, rows: Sequence[Row], against: Sequence[float], prefix: str = "") -> dict[str, Any]:
    """The role on these prompts; `against` are the scores of SFT's answers to them."""
    found = answers(world, role, rows, "figures", prefix=prefix)
    prefix_ids = world.renderer.with_prefix(prefix).prefix_ids if prefix else []
    return {
        "score": fmean(found.scores),
        "learned": fmean(reward_scores(world.base, JUDGE, found.rollouts)),
        "kl": kl_to_sft(world, role, found.rollouts, prefix_ids),
        "wins": win_rate(found.scores, against).rate,
        "tokens": fmean(len(r.ids) for r in found.rollouts),
        "finished": fmean(r.finished for r in found.rollouts),
    }


def baseline(world: World, rows: Sequence[Row]) -> list[float]:
    """The exact scores of SFT's answers, which every policy's are compared with."""
    return answers(world, SFT, rows, "baseline").scores


def at_temperatures(
    world: World, role: str, rows: Sequence[Row], against: Sequence[float], temperatures: Sequence[float], prefix: str
) -> list[dict[str, float]]:
    """Score and wins of the role when asked at each temperature; SFT's answers stay those of temperature 1."""
    found = []
    for temperature in temperatures:
        scores = answers(world, role, rows, "temperature", prefix=prefix, temperature=temperature).scores
        found.append({"temperature": temperature, "score": fmean(scores), "wins": win_rate(scores, against).rate})
    return found


def best_of(world: World, rows: Sequence[Row], against: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
    """Of n answers of SFT's the one with the highest learned score, for every n: the first n of the same draw.

    KL by the usual bound, log n - (n - 1)/n (arXiv 2009.01325, appendix G.3).
    """
    most = max(counts)
    drawn = answers(world, SFT, rows, "best of n", count=most)
    learned = reward_scores(world.base, JUDGE, drawn.rollouts)
    found = []
    for n in counts:
        best = [max(range(i * most, i * most + n), key=learned.__getitem__) for i in range(len(rows))]
        scores = [drawn.scores[i] for i in best]
        found.append(
            {
                "n": n,
                "score": fmean(scores),
                "learned": fmean(learned[i] for i in best),
                "kl": best_of_kl(n),
                "wins": win_rate(scores, against).rate,
                "tokens": sum(len(drawn.rollouts[i * most + k].ids) for i in range(len(rows)) for k in range(n))
                / len(rows),
            }
        )
    return found


def best_of_kl(n: int) -> float:
    """log n - (n - 1)/n, nats."""
    return math.log(n) - (n - 1) / n


def reward_accuracy(world: World, role: str, rows: Sequence[Row]) -> float:
    """Share of pairs of SFT's answers that the reward model orders as the exact score does."""
    sides = [answers(world, SFT, rows, f"accuracy {side}") for side in (1, 2)]
    learned = [reward_scores(world.base, role, side.rollouts) for side in sides]
    return pair_accuracy(learned[0], learned[1], sides[0].scores, sides[1].scores)


def answer_prefix(run: Path) -> str:
    """The text that the run's policy answers behind."""
    return adapters.answer_prefix(run)
