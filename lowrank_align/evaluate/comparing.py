"""Two voices' answers to the same prompts, before every judge: who wins, and how much of that length alone does.

Also how far the one went from where it began.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowrank_align.base import Base
from lowrank_align.evaluate.answers import Asked, Side, conversation_text, tree
from lowrank_align.evaluate.chat_judge import ChatJudge, Question
from lowrank_align.evaluate.outcomes import (
    Comparison,
    Interval,
    Outcome,
    compare,
    mean_interval,
    outcomes_of_scores,
)
from lowrank_align.evaluate.policy import k1
from lowrank_align.evaluate.report import (
    Report,
    Table,
    comparison_table,
    figure,
    listed,
    many,
    number,
    percent,
)

Scores = Mapping[str, Sequence[float]]  # by the name of a reward run or function, one an answer


@dataclass(frozen=True)
class KL:
    """How far a policy went from another role: k1, the mean of log pi(y|x) - log ref(y|x) over its own answers."""

    nats: Interval  # an answer; the interval resamples prompts
    nats_per_token: float
    tokens: int
    answers: int


def kl(base: Base, role: str, reference: str, asked: Sequence[Asked], side: Side, prefix: list[int], size: int) -> KL:
    """KL(role || reference) of the answers that `role` drew at temperature 1, each role behind its own prefix.

    `prefix`: the token ids before the reference's answers. Unbiased, and rarely a little below 0.
    """
    assert side.rollouts is not None
    mine = [tree(rollout.prompt_ids, rollout.ids) for rollout in side.rollouts]
    theirs = [tree([*one.prompt_ids, *prefix], r.ids) for one, r in zip(asked, side.rollouts, strict=True)]
    away, counts = k1(base, role, reference, mine, theirs, size)
    return KL(mean_interval(away), sum(away) / sum(counts), sum(counts), len(away))


def report_kl(report: Report, found: KL, ours: str, reference: str) -> None:
    rows = [
        ("nats an answer", number(found.nats)),
        ("nats a token", figure(found.nats_per_token, 4)),
        ("answers", f"{found.answers} ({found.tokens} tokens)"),
    ]
    note = f"KL({ours} || {reference}), estimated on {ours}'s own answers at temperature 1; 95 % by resampling prompts"
    report.add(
        "kl", {"from": ours, "to": reference, "kl": found}, Table("How far it went", ("", "figure"), rows, (note,))
    )


def ask_judges(
    judges: Sequence[ChatJudge],
    criteria: Sequence[str],
    asked: Sequence[Asked],
    ours: Side,
    theirs: Side,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, list[Outcome]]:
    """Every address's outcomes, overall and by criterion, by the name that the report has for them.

    Of two answers that say the same it is not asked: a tie.
    """
    same = _say_the_same(ours, theirs)
    sides = zip(asked, ours.texts, theirs.texts, same, strict=True)
    questions = [Question(conversation_text(one.row.prompt), a, b) for one, a, b, alike in sides if not alike]
    found: dict[str, list[Outcome]] = {}
    for judge in judges:
        for criterion in ["", *criteria]:
            verdicts = iter(judge.compare(questions, criterion, tell))
            name = f"{judge.model} at {judge.address}" + (f": {criterion}" if criterion else "")
            found[name] = [0.5 if alike else next(verdicts) for alike in same]
    return found


def tied_where_alike(
    ours: Side, theirs: Side, our_scores: Sequence[float], their_scores: Sequence[float]
) -> list[float]:
    """Their scores (N,), with ours for answers of the same tokens: a tie, though each side was scored in its own
    batches, whose rounding differs. The same text with and without an end token is two answers to a reward run."""
    alike = (a.completions[0].ids == b.completions[0].ids for a, b in zip(ours.trees, theirs.trees, strict=True))
    return [a if one else b for a, b, one in zip(our_scores, their_scores, alike, strict=True)]


def _say_the_same(ours: Side, theirs: Side) -> list[bool]:
    """By prompt, whether both answers are the same text."""
    return [a == b for a, b in zip(ours.texts, theirs.texts, strict=True)]


def report_comparison(
    report: Report,
    asked: Sequence[Asked],
    ours: Side,
    theirs: Side,
    our_scores: Scores,
    their_scores: Scores,
    asked_judges: Mapping[str, list[Outcome]],
    seed: int,
) -> dict[str, Comparison]:
    """Win rates by every judge, and differences of scores, into the report; the comparisons by judge."""
    their_scores = {
        name: tied_where_alike(ours, theirs, found, their_scores[name]) for name, found in our_scores.items()
    }
    by_judge = {name: outcomes_of_scores(found, their_scores[name]) for name, found in our_scores.items()}
    by_judge |= asked_judges
    lengths = [len(a) - len(b) for a, b in zip(ours.texts, theirs.texts, strict=True)]
    found = {name: compare(outcomes, lengths, seed) for name, outcomes in by_judge.items()}
    differences = {
        name: mean_interval([a - b for a, b in zip(our_scores[name], their_scores[name], strict=True)], seed)
        for name in our_scores
    }
    same = sum(_say_the_same(ours, theirs))
    longer = "longer" if sum(lengths) > 0 else "shorter"
    table = comparison_table(
        f"{ours.name} against {theirs.name}, on {many(len(asked), 'prompt')}",
        found,
        f"won: the judge finds {ours.name}'s answer better; a tie counts half in the win rate; 95 % intervals",
        "at equal length: the win rate that is left when a logistic regression has taken the effect of length out",
        *[f"{ours.name}'s answers are nearly always {longer}: what they would win at equal length is extrapolated"]
        * any(one.length_controlled.extrapolated for one in found.values() if one.length_controlled),
        *["an address is asked in both orders: what both agree on is won or lost, else a tie"] * bool(asked_judges),
        *[f"{many(same, 'answer is', 'answers are')} the same on both sides"] * bool(same),
    )
    tables = [table]
    if differences:
        rows = [(name, number(difference)) for name, difference in differences.items()]
        tables.append(Table(f"Score: {ours.name} less {theirs.name}", ("judge", "mean difference (95 %)"), rows))
    figures = {
        "ours": ours.name,
        "theirs": theirs.name,
        "prompts": len(asked),
        "identical_answers": same,
        "judges": {name: {**comparison._asdict()} for name, comparison in found.items()},
        "score_differences": differences,
    }
    report.add("comparison", figures, *tables)
    for i, line in enumerate(report.answers):
        line["outcomes"] = {name: outcomes[i] for name, outcomes in by_judge.items()}
    return found


def report_sides(report: Report, asked: Sequence[Asked], sides: Sequence[tuple[Side, Scores]], seed: int) -> None:
    """What the answers are like: lengths, whether they end, scores; and every answer for `answers.jsonl`."""
    judges = list(sides[0][1])
    columns = ("whose answers", "tokens", "characters", "ended by itself", *(f"score by {name}" for name in judges))
    rows, figures = [], {}
    for side, scores in sides:
        means = {name: mean_interval(scores[name], seed) for name in judges}
        tokens, characters = (sum(x) / len(x) for x in (side.tokens, [len(text) for text in side.texts]))
        ended = "-" if side.finished is None else percent(side.finished)
        rows.append((side.name, f"{tokens:.1f}", f"{characters:.0f}", ended, *(number(m) for m in means.values())))
        figures[side.name] = {
            "mean_tokens": tokens,
            "mean_characters": characters,
            "finished": side.finished,
            "answer_prefix": side.prefix,
            "scores": means,
        }
    prefixes = [f"{s.name} was asked to go on after {s.prefix!r}, as it was trained" for s, _ in sides if s.prefix]
    report.add("answers", figures, Table("The answers, on average", columns, rows, tuple(prefixes)))
    for i, one in enumerate(asked):
        answers = [
            {
                "by": side.name,
                "answer": side.texts[i],
                "tokens": side.tokens[i],
                "scores": {name: scores[name][i] for name in judges},
            }
            for side, scores in sides
        ]
        report.answers.append({"prompt": one.row.prompt, "answers": answers})


def report_troubles(report: Report, judges: Sequence[ChatJudge]) -> None:
    """Why verdicts are missing, where any are."""
    found = {judge.address: dict(judge.troubles) for judge in judges if judge.troubles}
    if found:
        report.add(
            "judge_troubles",
            found,
            Table("Questions without a verdict", ("judge", "why"), [(name, listed(t)) for name, t in found.items()]),
        )
