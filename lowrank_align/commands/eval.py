"""`lowrank-align eval`: what is given decides what is measured; one report of all of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.config import EvalSettings
from lowrank_align.errors import UserError
from lowrank_align.evaluate import comparing, figures, measures
from lowrank_align.evaluate.answers import REFERENCE, Side, draw, references, scores_of
from lowrank_align.evaluate.inputs import Inputs, check_out, read_inputs
from lowrank_align.evaluate.people import Siding, people, votes
from lowrank_align.evaluate.report import Report
from lowrank_align.provenance import read_provenance, versions
from lowrank_align.rewards import Rewards
from lowrank_align.roles import BARE
from lowrank_align.terminal import make_console, say


def eval(settings: EvalSettings) -> None:
    """Measure, print, and write the report."""
    out = None if settings.out is None else check_out(settings.out, settings.overwrite)
    inputs = read_inputs(settings)
    report = Report({"settings": settings.model_dump(exclude={"overwrite"}), "versions": versions()})
    rewards = None
    if settings.needs_model:
        base, rewards = _load(settings, inputs)
        assert inputs.renderer is not None
        if inputs.asked:
            _answers(settings, inputs, base, rewards, report)
        if inputs.pairs is not None:
            _reward(settings, inputs, rewards, report)
        if inputs.texts:
            voices = [(name, role, inputs.renderer.with_prefix(prefix)) for name, role, prefix in _voices(settings)]
            with _doing("perplexity"):
                measures.report_perplexity(report, base, voices, inputs.texts, settings.batch_size)
        if settings.tasks:
            _tasks(settings, inputs, base, report)
    if inputs.entries:
        _people(settings, inputs, rewards, report)
    report.print(make_console())
    if out is not None:
        say(f"{settings.out}: {', '.join(report.write(out))}")


# ---- with the model


def _load(settings: EvalSettings, inputs: Inputs) -> tuple[Base, Rewards]:
    base = Base.of(settings)
    for role, run in inputs.runs.items():
        base.add_role(role, start_from=run, trainable=False)
    rewards = Rewards(base, [*settings.reward_runs, *inputs.functions])
    rewards.add_roles()
    base.model.eval()
    return base, rewards


def _voices(settings: EvalSettings) -> list[tuple[str, str, str]]:
    """Name, role and prefix of those that speak: ours, and theirs unless that is the data."""
    ours = settings.adapter
    found = [(ours or BARE, "adapter" if ours else BARE, adapters.answer_prefix(ours))]
    if settings.against == BARE:
        found.append((BARE, BARE, ""))
    elif settings.against not in (None, REFERENCE):
        found.append((str(settings.against), "against", adapters.answer_prefix(settings.against)))
    return found


def _answers(settings: EvalSettings, inputs: Inputs, base: Base, rewards: Rewards, report: Report) -> None:
    """Draw, score, compare, and measure how far the answers' voice went."""
    assert inputs.renderer is not None
    sides = []
    for name, role, prefix in _voices(settings):
        with _doing(f"answers of {name}"):
            sides.append(_draw(settings, inputs, base, name, role, prefix, settings.temperature, settings.top_p))
    if settings.against == REFERENCE:
        sides.append(references(inputs.renderer, inputs.asked))
    scored = []
    for side in sides:
        with _doing(f"scores of {side.name}'s answers"):
            found = scores_of(rewards, inputs.asked, side, settings.batch_size)
            scored.append({name: found[name] for name in settings.scorers})
    comparing.report_sides(report, inputs.asked, list(zip(sides, scored, strict=True)), settings.seed)
    if len(sides) == 2:
        ours, theirs = sides
        with _doing("the judges") as tell:
            outcomes = comparing.ask_judges(inputs.judges, settings.criteria or [], inputs.asked, ours, theirs, tell)
        compared = comparing.report_comparison(
            report, inputs.asked, ours, theirs, scored[0], scored[1], outcomes, settings.seed
        )
        comparing.report_troubles(report, inputs.judges)
        report.plots["wins.png"] = partial(figures.win_bars, compared, ours.name, theirs.name)
    if settings.scorers:
        first = settings.scorers[0]
        points = {side.name: (side.tokens, of[first]) for side, of in zip(sides, scored, strict=True)}
        report.plots["answers_length.png"] = partial(figures.score_over_length, points, f"score by {first}")
    if settings.kl_to:
        _kl(settings, inputs, base, sides[0], report)


def _draw(
    settings: EvalSettings,
    inputs: Inputs,
    base: Base,
    name: str,
    role: str,
    prefix: str,
    temperature: float,
    top_p: float,
) -> Side:
    assert inputs.renderer is not None
    return draw(
        base,
        role,
        name,
        inputs.renderer.with_prefix(prefix),
        inputs.asked,
        max_new_tokens=settings.max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def _kl(settings: EvalSettings, inputs: Inputs, base: Base, ours: Side, report: Report) -> None:
    """On the answers that were drawn, or on others: the estimate holds for answers at temperature 1 alone."""
    assert inputs.renderer is not None
    start = inputs.runs.get("start")
    with _doing("KL"):
        if (settings.temperature, settings.top_p) != (1.0, 1.0):
            ours = _draw(settings, inputs, base, ours.name, "adapter", ours.prefix, 1.0, 1.0)
        prefix = inputs.renderer.with_prefix(adapters.answer_prefix(start)).prefix_ids
        role = BARE if start is None else "start"
        found = comparing.kl(base, "adapter", role, inputs.asked, ours, prefix, settings.batch_size)
    comparing.report_kl(report, found, ours.name, start or BARE)


def _reward(settings: EvalSettings, inputs: Inputs, rewards: Rewards, report: Report) -> None:
    assert inputs.renderer is not None and inputs.pairs is not None
    run = str(settings.reward)
    with _doing(f"scores by {run}"):
        scored = measures.scored_pairs(
            rewards, run, inputs.renderer, inputs.pairs.rows, settings.by, settings.batch_size
        )
    known = read_provenance(adapters.run_of(adapters.locate(run))) or {}
    seen = known.get("data_hash") == inputs.pairs.sha256
    notes = [f"it was trained on these very rows, so this is no measure of what it does elsewhere: {settings.data}"]
    found = measures.report_reward(report, run, scored, settings.by, notes * seen)
    report.plots["calibration.png"] = partial(figures.calibration, found.bins, found.calibration_error)
    of_all = {"answers": ([tokens for tokens, _ in scored.points], [score for _, score in scored.points])}
    report.plots["score_length.png"] = partial(figures.score_over_length, of_all, f"score by {run}")


def _tasks(settings: EvalSettings, inputs: Inputs, base: Base, report: Report) -> None:
    from lowrank_align.evaluate import harness

    assert inputs.renderer is not None
    voices = [(name, role, inputs.renderer.with_prefix(prefix)) for name, role, prefix in _voices(settings)]
    harness.report_tasks(report, base, voices, settings)


def _people(settings: EvalSettings, inputs: Inputs, rewards: Rewards | None, report: Report) -> None:
    measures.report_people(report, people(inputs.entries))
    runs = rewards if settings.reward_runs else None
    if runs is None and not inputs.functions and not inputs.judges:
        return
    given, left_out = votes(inputs.entries)
    if not given:
        raise UserError(f"{settings.store}: no vote for one side to hold judges against")
    found: dict[str, Siding] = {}
    with _doing("votes"):
        if runs is not None and inputs.renderer is not None:
            found |= measures.runs_and_votes(runs, inputs.renderer, given, settings.batch_size, left_out)
        found |= measures.functions_and_votes(inputs.functions, given)
        found |= measures.addresses_and_votes(inputs.judges, given, left_out)
    measures.report_siding(report, found, left_out)


@contextmanager
def _doing(what: str) -> Iterator[Callable[[], None]]:
    """A line on the terminal while something takes its time; what it yields counts up there."""
    console, count = make_console(stderr=True), 0
    if not console.is_terminal:
        yield lambda: None
        return
    with console.status(what) as status:

        def tell() -> None:
            nonlocal count
            count += 1
            status.update(f"{what}: {count}")

        yield tell
