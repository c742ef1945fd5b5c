"""`lowrank-align eval`: what is given decides what is measured; one report of all of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.config import EvalSettings, is_function
from lowrank_align.config.evaluation import is_address
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.load import Loaded, load_rows
from lowrank_align.errors import UserError
from lowrank_align.evaluate import comparing, figures, measures
from lowrank_align.evaluate.answers import (
    REFERENCE,
    WITH_REFERENCE,
    Asked,
    Side,
    draw,
    prompt_text,
    reference_of,
    references,
    scores_of,
)
from lowrank_align.evaluate.chat_judge import ChatJudge
from lowrank_align.evaluate.people import Siding, people, standing, votes
from lowrank_align.evaluate.report import FILES, Report
from lowrank_align.loading import check_device, model_folder, read_config, read_tokenizer
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.provenance import read_provenance, versions, weights_hash
from lowrank_align.rewards import RewardFunction, Rewards, load_function
from lowrank_align.roles import BARE
from lowrank_align.runs import check_place
from lowrank_align.store import Entry


@dataclass
class Inputs:
    """Everything that was named, read and checked before a model loads."""

    renderer: Renderer | None = None
    asked: list[Asked] = field(default_factory=list)
    pairs: Loaded | None = None
    texts: list[Row] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    judges: list[ChatJudge] = field(default_factory=list)
    functions: dict[str, RewardFunction] = field(default_factory=dict)  # judges of the user's own
    runs: dict[str, str] = field(default_factory=dict)  # role to the run that is put on the base


def eval(settings: EvalSettings) -> None:
    """Measure, print, and write the report."""
    out = None if settings.out is None else _check_out(settings.out, settings.overwrite)
    inputs = _read(settings)
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
    report.print(Console(highlight=False))
    if out is not None:
        print(f"{settings.out}: {', '.join(report.write(out))}")


# ---- before the model loads


def _check_out(name: str, overwrite: bool) -> Path:
    """The folder to write; UserError where it is there, EnvironmentProblem where it cannot be made."""
    out = Path(name).expanduser()
    check_place(out)
    if out.is_file():
        raise UserError(f"{name}: is a file; --out names a folder")
    there = [file.name for file in out.iterdir()] if out.is_dir() else []
    if there and not overwrite:
        raise UserError(f"{name}: exists; --overwrite replaces the report in it")
    if strange := sorted(set(there) - FILES):
        raise UserError(f"{name}: holds {strange[0]}, which is no report's; choose another --out")
    return out


def _read(settings: EvalSettings) -> Inputs:
    found = Inputs(judges=_judges(settings))
    found.functions = {judge: load_function(judge) for judge in settings.scorers if is_function(judge)}
    if settings.store:
        found.entries = standing(settings.store)
    if not settings.needs_model:
        return found
    assert settings.model is not None
    check_device(settings.device, settings.quantize, settings.attention)
    _check_adapters(settings, found)
    found.renderer = _renderer(settings)
    if settings.prompts:
        found.asked = _asked(settings, found.renderer, list(found.runs.values()))
    if settings.data:
        found.pairs = _rows(settings, settings.data, {Shape.pair, Shape.ranking})
    if settings.perplexity_data:
        found.texts = _rows(settings, settings.perplexity_data, {Shape.demonstration}).rows
    return found


def _judges(settings: EvalSettings) -> list[ChatJudge]:
    return [
        ChatJudge(address, str(settings.judge_model), settings.judge_prompt, settings.judge_timeout)
        for address in settings.judge or []
        if is_address(address)
    ]


def _check_adapters(settings: EvalSettings, found: Inputs) -> None:
    """Every run that is named fits the base; whose answers are whose."""
    if settings.against == BARE and settings.adapter is None:
        raise UserError("--against base: the bare base against itself; give --adapter")
    if settings.adapter is not None:
        found.runs["adapter"] = settings.adapter
    if settings.against not in (None, BARE, REFERENCE):
        found.runs["against"] = str(settings.against)
    if (start := _kl_start(settings)) is not None:
        found.runs["start"] = start
    name = str(settings.model)
    config, digest = read_config(name), weights_hash(model_folder(name))
    for run in found.runs.values():
        adapters.check_before_load(run, "policy", name, digest, config)
    for run in settings.reward_runs:
        adapters.check_before_load(run, "reward", name, digest, config)


def _kl_start(settings: EvalSettings) -> str | None:
    """The run that KL is measured to; None where it is the bare base, or where nothing is asked."""
    if settings.kl_to in (None, BARE) or settings.adapter is None:
        return None
    if settings.kl_to != "start":
        return settings.kl_to
    known = read_provenance(adapters.run_of(adapters.locate(settings.adapter)))
    if known is None:
        raise UserError(f"--kl-to start: {settings.adapter} does not say what it began with; name a run, or base")
    parent = known.get("parent")
    return str(parent["run"]) if parent else None


def _renderer(settings: EvalSettings) -> Renderer:
    tokenizer, context = read_tokenizer(str(settings.model))
    renderer = Renderer(
        tokenizer,
        chat_template=settings.chat_template,
        max_length=min(settings.max_length, context),
        thinking=settings.thinking,
        thinking_if_possible=from_preset(settings, "thinking"),
    )
    for line in preset_lines(settings, renderer, read_config(str(settings.model))):
        print(line)
    return renderer


def _rows(settings: EvalSettings, source: str, shapes: set[Shape]) -> Loaded:
    aside = Path(f"{Path(source).name}.bad.jsonl") if settings.skip_bad else None
    loaded = load_rows(source, expect=shapes, skip_bad=aside)
    for name, count in loaded.conversions.items():
        print(f"{source}: {count} rows read as {name}")
    if loaded.skipped:
        print(f"{source}: {loaded.skipped} bad rows left out, listed in {aside}")
    return loaded


def _asked(settings: EvalSettings, renderer: Renderer, runs: Sequence[str]) -> list[Asked]:
    """The prompts that leave room for an answer, behind the longest prefix; the others are counted and named."""
    wants_reference = settings.against == REFERENCE
    rows = _rows(settings, str(settings.prompts), set(WITH_REFERENCE) if wants_reference else {Shape.prompts}).rows
    longest = max((len(renderer.with_prefix(adapters.answer_prefix(run)).prefix_ids) for run in runs), default=0)
    found, left_out = [], []
    for row in rows:
        prompt, reference = reference_of(row) if wants_reference else (row, None)
        ids = renderer.prompt_ids(prompt)
        if len(ids) + longest + settings.max_new_tokens > renderer.max_length:
            left_out.append(row.where)
        else:
            found.append(Asked(prompt, ids, prompt_text(prompt.prompt), reference))
    room = f"no room for {settings.max_new_tokens} new tokens within max_length {renderer.max_length}"
    if not found:
        raise UserError(f"{left_out[0]}: {room}, nor for any other prompt; lower --max-new-tokens")
    if left_out:
        shown = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
        print(f"{len(left_out)} of {len(rows)} prompts left out, {room}: {shown}")
    return found


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
    if len(sides) == 2 and sides[0].name == sides[1].name:
        raise UserError(f"--against {settings.against}: the same as --adapter")
    scored = []
    for side in sides:
        with _doing(f"scores of {side.name}'s answers"):
            found = scores_of(rewards, inputs.asked, side, settings.batch_size)
            scored.append({name: found[name] for name in settings.scorers})
    comparing.report_sides(report, inputs.asked, list(zip(sides, scored, strict=True)), settings.seed)
    if len(sides) == 2:
        with _doing("the judges") as tell:
            asked = comparing.ask_judges(inputs.judges, settings.criteria or [], inputs.asked, *sides, tell)
        found = comparing.report_comparison(report, inputs.asked, *sides, *scored, asked, settings.seed)
        comparing.report_troubles(report, inputs.judges)
        report.plots["wins.png"] = partial(figures.win_bars, found, sides[0].name, sides[1].name)
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
        pairs, points, left_out = measures.scored_pairs(
            rewards, run, inputs.renderer, inputs.pairs.rows, settings.by, settings.batch_size
        )
    known = read_provenance(adapters.run_of(adapters.locate(run))) or {}
    seen = known.get("data_hash") == inputs.pairs.sha256
    notes = [f"it was trained on these very rows, so this is no measure of what it does elsewhere: {settings.data}"]
    found = measures.report_reward(report, run, pairs, left_out, settings.by, notes * seen)
    report.plots["calibration.png"] = partial(figures.calibration, found.bins, found.calibration_error)
    of_all = {"answers": ([tokens for tokens, _ in points], [score for _, score in points])}
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
    console, count = Console(stderr=True, highlight=False), 0
    if not console.is_terminal:
        yield lambda: None
        return
    with console.status(what) as status:

        def tell() -> None:
            nonlocal count
            count += 1
            status.update(f"{what}: {count}")

        yield tell
