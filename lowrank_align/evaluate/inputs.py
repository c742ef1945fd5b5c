"""Everything that an evaluation is given, read and checked before a model loads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_align import adapters
from lowrank_align.config import EvalSettings, is_function
from lowrank_align.config.evaluation import is_address
from lowrank_align.data.chat import Renderer, notes_on
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.load import Loaded, load_rows
from lowrank_align.devices import check_device
from lowrank_align.errors import UserError
from lowrank_align.evaluate.answers import REFERENCE, WITH_REFERENCE, Asked, reference_of
from lowrank_align.evaluate.chat_judge import ChatJudge
from lowrank_align.evaluate.harness import check_installed
from lowrank_align.evaluate.people import standing
from lowrank_align.evaluate.report import FILES
from lowrank_align.loading import model_folder, read_config, read_tokenizer
from lowrank_align.out_folders import check_place
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.provenance import read_provenance, weights_hash
from lowrank_align.rewards import RewardFunction, load_function, seen_prompt
from lowrank_align.roles import BARE
from lowrank_align.store import Entry
from lowrank_align.terminal import say


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


def check_out(name: str, overwrite: bool) -> Path:
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


def read_inputs(settings: EvalSettings) -> Inputs:
    found = Inputs(judges=_judges(settings))
    found.functions = {judge: load_function(judge) for judge in settings.scorers if is_function(judge)}
    if settings.tasks:
        check_installed()
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
        if settings.adapter is not None and adapters.locate(settings.adapter) == adapters.locate(str(settings.against)):
            raise UserError(f"--against {settings.against}: the same as --adapter")
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
    if not parent:
        return None
    run = str(parent["run"])
    if adapters.weights_sha256(run) != parent.get("adapter_hash"):
        raise UserError(f"--kl-to start: {run}: not what {settings.adapter} began with (trained anew?); name a run")
    return run


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
        say(line)
    return renderer


def _rows(settings: EvalSettings, source: str, shapes: set[Shape]) -> Loaded:
    aside = Path(f"{Path(source).name}.bad.jsonl") if settings.skip_bad else None
    loaded = load_rows(source, expect=shapes, skip_bad=aside)
    for name, count in loaded.conversions.items():
        say(f"{source}: {count} rows read as {name}")
    if loaded.skipped:
        say(f"{source}: {loaded.skipped} bad rows left out, listed in {aside}")
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
            found.append(Asked(prompt, ids, seen_prompt(prompt), reference))
    for note, count in notes_on(rows, renderer).items():
        say(f"{settings.prompts}: {count} rows: {note}")
    room = f"no room for {settings.max_new_tokens} new tokens within max_length {renderer.max_length}"
    if not found:
        raise UserError(f"{left_out[0]}: {room}, nor for any other prompt; lower --max-new-tokens")
    if left_out:
        shown = ", ".join(left_out[:5]) + ", ..." * (len(left_out) > 5)
        say(f"{len(left_out)} of {len(rows)} prompts left out, {room}: {shown}")
    return found
