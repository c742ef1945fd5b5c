"""A reward run on held-out comparisons, perplexity on held-out text, and people beside judges."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_align.base import Base
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row
from lowrank_align.errors import UserError
from lowrank_align.evaluate.answers import answer_text, conversation_text, summed_logps
from lowrank_align.evaluate.chat_judge import ChatJudge, Question
from lowrank_align.evaluate.people import People, Siding, Vote, siding
from lowrank_align.evaluate.report import Report, Table, agreed, all_rows, figure, listed, many, share
from lowrank_align.evaluate.reward_quality import RewardQuality, ScoredPair, reward_quality
from lowrank_align.rewards import RewardFunction, Rewards, seen_prompt
from lowrank_align.trees import TreeRow

# ---- a reward run on pairs


@dataclass
class Scored:
    """Comparisons with a reward run's scores."""

    pairs: list[ScoredPair] = field(default_factory=list)
    points: list[tuple[int, float]] = field(default_factory=list)  # (tokens, score) of every answer
    left_out: Counter[str] = field(default_factory=Counter)
    cut: int = 0  # rows with an answer that was cut


def scored_pairs(
    rewards: Rewards, run: str, renderer: Renderer, rows: Sequence[Row], by: str | None, size: int
) -> Scored:
    """Every comparison of pairs and rankings.

    UserError where nothing is left, or where no row has the column `by`.
    """
    if by is not None and not any(by in row.extra for row in rows):
        there = sorted({name for row in rows for name in row.extra})
        raise UserError(f"--by {by}: no row has this column (others: {', '.join(there) or 'none'})")
    found = Scored()
    kept: list[tuple[Row, TreeRow]] = []
    for row in rows:
        rendered = renderer.tree_row(row)
        found.left_out[str(rendered.dropped)] += rendered.tree is None
        found.cut += rendered.tree is not None and rendered.truncated_tokens > 0
        if rendered.tree is not None:
            kept.append((row, rendered.tree))
    scores = iter(rewards.of_trees([tree for _, tree in kept], size)[run].tolist() if kept else [])
    for row, tree in kept:
        mine = [(len(completion.ids), next(scores)) for completion in tree.completions]
        found.points += mine
        for comparison in tree.comparisons:
            if comparison.preference == 0.5:
                found.left_out["a tie"] += 1
                continue
            sides = (comparison.first, comparison.second)
            better, worse = sides if comparison.preference > 0.5 else reversed(sides)
            groups = _groups(row.extra.get(by)) if by is not None else ()
            found.pairs.append(ScoredPair(mine[better][1], mine[worse][1], mine[better][0], mine[worse][0], groups))
    if not found.pairs:
        raise UserError(f"--data: nothing to compare is left: {listed(found.left_out)}")
    return found


def report_reward(
    report: Report,
    run: str,
    scored: Scored,
    by: str | None = None,
    notes: Sequence[str] = (),
) -> RewardQuality:
    """Accuracy, calibration and what length does, into the report."""
    found = reward_quality(scored.pairs)
    rows = [
        ("right order", share(found.accuracy)),
        ("  where the better answer is longer", share(found.better_longer)),
        ("  where it is shorter", share(found.better_shorter)),
        *((f"  {by}: {name}", share(rate)) for name, rate in found.by_group.items()),
        ("mean margin, better less worse", figure(found.mean_margin)),
        ("calibration error (ECE)", figure(found.calibration_error)),
        ("Brier score (0.25 is a coin)", figure(found.brier)),
        ("correlation of score and length", figure(found.length_correlation, 2)),
        ("correlation of margin and length difference", figure(found.margin_correlation, 2)),
    ]
    said = [f"left out: {listed(scored.left_out)}"] * bool(listed(scored.left_out))
    said += [f"{many(scored.cut, 'row')} with an answer cut at max_length"] * bool(scored.cut)
    said += ["right order: the better answer has the higher score; calibration is of s(margin)", *notes]
    confidences = [
        (f"{b.low:.2f}-{b.high:.2f}", str(b.comparisons), figure(b.confidence), figure(b.accuracy))
        for b in found.bins
        if b.comparisons
    ]
    report.add(
        "reward",
        {
            "run": run,
            "comparisons": len(scored.pairs),
            "left_out": dict(+scored.left_out),
            "rows_cut": scored.cut,
            "quality": found,
        },
        all_rows(f"Reward run {run}, on {many(len(scored.pairs), 'comparison')}", rows, *said),
        Table("How sure it is, and how often right", ("confidence", "comparisons", "mean", "right"), confidences),
    )
    return found


def _groups(value: Any) -> tuple[str, ...]:
    if value is None:
        return ("(without)",)
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


# ---- perplexity


def report_perplexity(
    report: Report,
    base: Base,
    voices: Sequence[tuple[str, str, Renderer]],
    rows: Sequence[Row],
    size: int,
) -> None:
    """exp of the mean nats a token over all trained tokens of `rows`; `voices`: name, role, renderer of each.

    Only rows of which every voice reads the same: a longer prefix drops or cuts rows that another voice has whole.
    """
    by_voice = [[renderer.tree_row(row) for row in rows] for _, _, renderer in voices]
    left_out = Counter(reason for row in zip(*by_voice, strict=True) if (reason := _not_comparable(row)))
    kept = [[r for r in row if r.tree is not None] for row in zip(*by_voice, strict=True) if not _not_comparable(row)]
    if not kept:
        raise UserError(f"--perplexity-data: no row is left: {listed(left_out)}")
    cut = sum(row[0].truncated_tokens > 0 for row in kept)
    figures: dict[str, Any] = {}
    lines = []
    for (name, role, _), rendered in zip(voices, zip(*kept, strict=True), strict=True):
        logps, tokens = summed_logps(base, role, [r.tree for r in rendered if r.tree is not None], size)
        nats = -sum(logps) / sum(tokens)
        perplexity = math.exp(nats) if nats < 700 else math.inf
        figures[name] = {"perplexity": perplexity, "nats_per_token": nats, "tokens": sum(tokens), "rows": len(kept),
                         "left_out": dict(left_out), "rows_cut": cut}  # fmt: skip
        lines.append((name, figure(perplexity, 2), figure(nats), str(sum(tokens))))
    notes = [f"left out: {listed(left_out)}"] * bool(left_out)
    notes += [f"{many(cut, 'row')} cut at max_length"] * bool(cut)
    report.add("perplexity", figures, Table("Perplexity", ("", "perplexity", "nats a token", "tokens"), lines,
                                            tuple(notes)))  # fmt: skip


def _not_comparable(row: Sequence[Rendered]) -> str | None:
    """Why a row, as each voice reads it, says nothing of which voice is better; None where it does."""
    if dropped := next((r.dropped for r in row if r.tree is None), None):
        return dropped
    if not any(r.truncated_tokens for r in row):
        return None
    trained = [
        [i for c in r.tree.completions for i, counts in zip(c.ids, c.mask, strict=True) if counts]
        for r in row
        if r.tree is not None
    ]
    return None if all(ids == trained[0] for ids in trained) else "cut, and not alike behind every voice's prefix"


# ---- people


def report_people(report: Report, found: People) -> None:
    """How far people agree with each other."""
    alpha = figure(found.together.alpha, 2)
    rows = [("all who judged the same", agreed(found.together)), ("Krippendorff's alpha", alpha)]
    rows += [(f"  {names}", agreed(two)) for names, two in found.by_two.items()] if len(found.by_two) > 1 else []
    said = ", ".join(f"{count} by {name}" for name, count in found.judgements.items())
    notes = [f"judgements: {said}; alpha: 1 always, 0 as by chance"]
    notes += ["nobody has judged what another has judged"] * (not found.together.comparisons)
    report.add("people", found, all_rows("People with each other", rows, *notes))


def runs_and_votes(
    rewards: Rewards, renderer: Renderer, votes: Sequence[Vote], size: int, left_out: Counter[str]
) -> dict[str, Siding]:
    """By reward run, how often it sides with the votes; those that cannot be tokenised are left out and counted."""
    kept, trees = [], []
    for vote in votes:
        try:
            tree = renderer.tree_row(vote.row).tree
        except UserError:  # what this model's template refuses
            tree = None
        left_out["not to be read by the reward run"] += tree is None
        if tree is not None:
            kept.append(vote)
            trees.append(tree)
    if not trees:
        raise UserError("--store: no vote can be read by the reward run; raise --max-length")
    scored = rewards.of_trees(trees, size)
    return {run: siding(kept, (scores[0::2] - scores[1::2]).tolist()) for run, scores in scored.items()}


def functions_and_votes(functions: Mapping[str, RewardFunction], votes: Sequence[Vote]) -> dict[str, Siding]:
    """By function of the user's, how often it sides with the votes."""
    prompts = [seen_prompt(vote.row) for vote in votes]
    better, worse = ([answer_text(vote.row.completions[side]) for vote in votes] for side in (0, 1))
    return {
        name: siding(votes, [a - b for a, b in zip(of(prompts, better), of(prompts, worse), strict=True)])
        for name, of in functions.items()
    }


def addresses_and_votes(
    judges: Sequence[ChatJudge], votes: Sequence[Vote], left_out: Counter[str]
) -> dict[str, Siding]:
    """By judge behind an address, how often it sides with the votes; a tie of its own counts half."""
    found = {}
    asked = [Question(conversation_text(vote.row.prompt), *map(answer_text, vote.row.completions)) for vote in votes]
    for judge in judges:
        outcomes = judge.compare(asked)
        sided = [(vote, outcome - 0.5) for vote, outcome in zip(votes, outcomes, strict=True) if outcome is not None]
        left_out["without a verdict"] += len(votes) - len(sided)
        found[f"{judge.model} at {judge.address}"] = siding([v for v, _ in sided], [m for _, m in sided])
    return found


def report_siding(report: Report, found: Mapping[str, Siding], left_out: Mapping[str, int]) -> None:
    """How often judges side with people: all votes, by annotator, by the tags that votes carry."""
    rows: list[tuple[str, str]] = []
    for name, sided in found.items():
        rows.append((name, share(sided.together)))
        rows += [(f"  with {who}", share(rate)) for who, rate in sided.by_annotator.items()]
        rows += [(f"  on votes tagged {tag}", share(rate)) for tag, rate in sided.by_tag.items()]
    notes = [f"left out: {listed(left_out)}"] * bool(listed(left_out))
    notes.append("share of votes whose side the judge finds better, too; where it finds none better, a half")
    report.add("judges_and_people", {"judges": found, "left_out": dict(+Counter(left_out))},
               all_rows("Judges with people", rows, *notes))  # fmt: skip
