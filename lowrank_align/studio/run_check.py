"""What can be known of a run before it starts: its rows and their flaws, its steps, memory and time, in sentences."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_align.architecture import UnknownFigures
from lowrank_align.config import TrainSettings
from lowrank_align.data.audit import Finding, check_rows
from lowrank_align.data.audit.findings import counted, part
from lowrank_align.data.audit.judgements import FEW_CHOICES, judgement_figures, judgement_findings, length_bias
from lowrank_align.data.audit.overlap import contradiction_findings, duplicate_findings
from lowrank_align.data.chat import RenderedRows, Renderer, render_all
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.load import load_rows
from lowrank_align.errors import UserError
from lowrank_align.methods import method_class
from lowrank_align.plan import gib
from lowrank_align.preflight import plan_run
from lowrank_align.preset_check import from_preset
from lowrank_align.studio.health import Level
from lowrank_align.studio.old_runs import Pace
from lowrank_align.studio.run_request import steps_of
from lowrank_align.studio.words import duration, flags_as_settings, sentence
from lowrank_align.trees import TreeRow

if TYPE_CHECKING:
    from lowrank_align.base import Base

FEW_ROWS, FEW_STEPS, ENOUGH_STEPS = 20, 10, 20
LEANING = 0.6  # a share of longer (or shorter) chosen answers that a model takes over
NAMES = {Shape.pair: "pair", Shape.ranking: "ranking", Shape.demonstration: "demonstration", Shape.prompts: "prompt"}


@dataclass(frozen=True)
class Said:
    """One sentence of the check: good or merely so, to look at, or in the way of a start."""

    level: Level
    text: str


@dataclass(frozen=True)
class Check:
    """What the page says before a start."""

    rows: int
    steps: int
    said: tuple[Said, ...]

    @property
    def can_start(self) -> bool:
        return all(one.level != "bad" for one in self.said)


def check_run(base: "Base", settings: TrainSettings, pace: Pace | None, left_out: dict[str, int]) -> Check:
    """Read, tokenise and audit the rows that the settings name. UserError for rows that cannot be read at all."""
    kind = method_class(settings.method)
    if settings.max_length > base.context_tokens:
        settings = settings.model_copy(update={"max_length": base.context_tokens})
    renderer = Renderer(
        base.tokenizer,
        chat_template=settings.chat_template,
        train_on=settings.train_on,
        max_length=settings.max_length,
        thinking=settings.thinking,
        thinking_if_possible=from_preset(settings, "thinking"),
    ).with_prefix(kind.answer_prefix(settings))
    with tempfile.TemporaryDirectory() as scratch:
        bad = Path(scratch) / "bad.jsonl" if settings.skip_bad else None
        rows = load_rows(settings.rows, expect=kind.shapes, skip_bad=bad, segments=settings.compares_segments).rows
        rendered = render_all(lambda row: kind.render(row, renderer, settings), rows, skip_bad=bad)
    trees, steps = rendered.tree_rows, steps_of(settings, len(rendered.tree_rows))
    said = [
        Said("good", _amount(rows, settings, steps)),
        *_few(len(trees), steps, settings),
        *_rendering(rendered, len(rows), settings.max_length),
        *_left_out(left_out),
        *_judged(rows, trees),
        *_stops(settings, renderer, rows, trees),
        _memory(settings, trees, base),
        Said("good", _time(steps, settings, pace)),
    ]
    return Check(len(rows), steps, tuple(said))


# ---- the rows


def _amount(rows: Sequence[Row], settings: TrainSettings, steps: int) -> str:
    counts = {shape: sum(row.shape is shape for row in rows) for shape in Shape}
    what = " and ".join(counted(n, NAMES.get(shape, f"{shape} row")) for shape, n in counts.items() if n)
    if settings.max_steps is not None:
        return f"{what}; {counted(steps, 'step')} in batches of {settings.batch_size}."
    rounds = f"{settings.epochs:g} round{'s' * (settings.epochs != 1)}"
    return f"{what}; {rounds} in batches of {settings.batch_size}: {counted(steps, 'step')}."


def _few(rows: int, steps: int, settings: TrainSettings) -> Iterator[Said]:
    if rows < FEW_ROWS:
        yield Said("watch", f"Only {counted(rows, 'row')}: good for a try, too few to learn a taste from.")
    smaller = settings.batch_size * max(1, steps) // ENOUGH_STEPS
    if steps < FEW_STEPS and settings.max_steps is None and 0 < smaller < settings.batch_size:
        what = f"Only {counted(steps, 'step')}: with a batch size of {smaller} there are about {ENOUGH_STEPS}."
        yield Said("watch", what)


def _rendering(rendered: RenderedRows, count: int, max_length: int) -> Iterator[Said]:
    if rendered.truncated:
        yield Said("watch", f"{part(rendered.truncated, count)} are cut at {max_length} tokens.".capitalize())
    if rendered.dropped:
        reason = rendered.dropped[0][1]
        yield Said("watch", f"{part(len(rendered.dropped), count)} are left out ({reason}).".capitalize())


def _left_out(left_out: dict[str, int]) -> Iterator[Said]:
    if left_out:
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        yield Said("good", f"Not among them: {reasons}.")


def _judged(rows: Sequence[Row], trees: Sequence[TreeRow]) -> Iterator[Said]:
    """Ties, length, duplicates and contradictions; each told also where there is none, for pairs."""
    findings = [*duplicate_findings(rows), *contradiction_findings(rows), *judgement_findings(rows)]
    of_index = {tree.index: tuple(len(c.ids) for c in tree.completions) for tree in trees}
    bias, ties = length_bias(rows, of_index), judgement_figures(rows)["ties"]
    if bias is not None:
        share = 100 * bias.longer / bias.choices
        lean = bias.choices >= FEW_CHOICES and not 1 - LEANING < bias.share < LEANING
        way = "longer" if bias.share > 0.5 else "shorter"
        lengths = f"{bias.mean_better_tokens:.0f} against {bias.mean_worse_tokens:.0f} tokens on average"
        what = f"The chosen answer is the longer one in {share:.0f} % ({lengths})."
        yield Said("watch", f"{what} Expect {way} answers.") if lean else Said("good", what)
    if ties:
        pull = "it teaches" if ties == 1 else "they teach"
        yield Said("good", f"{counted(int(ties), 'tie')}: {pull} that both answers are as good.")
    for finding in findings:
        yield _finding(finding)
    if bias is not None and not {f.code for f in findings} & {"duplicates", "near-duplicates", "contradictions"}:
        yield Said("good", "No duplicates, no contradictions.")


def _finding(finding: Finding) -> Said:
    advice = f" {sentence(finding.advice)}" if finding.advice else ""
    level: Level = "good" if finding.severity == "note" else "watch"
    return Said(level, sentence(finding.what) + advice)


def _stops(
    settings: TrainSettings, renderer: Renderer, rows: Sequence[Row], trees: Sequence[TreeRow]
) -> Iterator[Said]:
    """What training itself would refuse."""
    try:
        check_rows(settings, renderer, rows, trees, [])
    except UserError as error:
        yield Said("bad", sentence(str(error).split(" (`")[0]))


# ---- the machine


def _memory(settings: TrainSettings, trees: Sequence[TreeRow], base: "Base") -> Said:
    try:
        plan = plan_run(settings, trees, base)
    except UnknownFigures:
        return Said("good", "Memory: cannot be told for this family of models; a try comes before the first step.")
    needs, there = gib(plan.prediction.total_bytes), gib(plan.budget_bytes)
    if plan.fits:
        return Said("good", f"Memory: needs {needs} at its peak, {there} are there.")
    if plan.chosen is None or plan.chosen_prediction is None:
        what = f"Memory: needs {needs}, there are {there}, and no smaller settings fit."
        return Said("watch" if settings.force else "bad", f"{what} Take a smaller model, or set force: true.")
    changes = ", ".join(f"{name} {str(value).lower()}" for name, value in plan.changes.items())
    if settings.auto:
        what = f"Memory: needs {needs}, there are {there}; it will take {changes}"
        return Said("watch", f"{what} ({gib(plan.chosen_prediction.total_bytes)}).")
    return Said("watch" if settings.force else "bad", f"Memory: needs {needs}, there are {there}; {changes} would fit.")


def _time(steps: int, settings: TrainSettings, pace: Pace | None) -> str:
    if pace is None:
        return "Time: unknown until the first step; no run of this method was made on this model here."
    seconds = steps * settings.batch_size * pace.seconds_a_row
    return f"Time: about {duration(seconds)}, at the pace of {pace.run}."


def as_problem(error: UserError) -> Check:
    """A request that cannot even be looked at, as a check with one sentence."""
    return Check(0, 0, (Said("bad", sentence(flags_as_settings(str(error)))),))
