"""From settings and files to a finished run: check everything, load, train, save.

base = Base.load("tiny")
train("dpo", base=base, model="tiny", data="pairs.jsonl", out="runs/dpo", max_steps=50)
"""

import json
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.batch_sizes import LESS_MEMORY
from lowrank_align.checks import (
    check_adapters,
    check_inputs_stay,
    check_machine,
    check_resumable,
    check_rollout_server,
    finished_before,
)
from lowrank_align.config import ADAPTERS_OWN, METHODS, OnlineSettings, TrainSettings, resolve, to_yaml
from lowrank_align.data.chat import Rendered, Renderer
from lowrank_align.data.formats import Row
from lowrank_align.data.training import TrainingRows, training_rows
from lowrank_align.devices import pick_device
from lowrank_align.durable import write_atomic
from lowrank_align.errors import UserError, memory_for, nearest
from lowrank_align.loading import read_config, read_tokenizer
from lowrank_align.loop import Loop
from lowrank_align.methods import method_class
from lowrank_align.methods.method import Method
from lowrank_align.plots import plot_metrics
from lowrank_align.preflight import as_the_run_began, fitted
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.progress import Progress
from lowrank_align.provenance import folder_sha256, model_card, write_provenance
from lowrank_align.runs import RunElsewhere, RunFolder, check_output, open_run, refuse_running
from lowrank_align.stopping import StopSignals
from lowrank_align.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """How a run ended: its folder, its steps and its last figures."""

    run: Path
    steps: int
    figures: dict[str, float]


def train(
    method: str | TrainSettings,
    *,
    base: Base | None = None,
    progress: Progress | None = None,
    stop: StopSignals | None = None,
    **knobs: Any,
) -> Summary:
    """Run a method ("sft", "reward", "dpo", "ppo", or its resolved settings) to the end and save the run.

    `knobs` are the settings of `config.py`. With `base`, its weights serve this run too, and the trained role stays on
    it. Everything that a user can have got wrong is checked before a model is loaded, and raises UserError.
    """
    settings = method if isinstance(method, TrainSettings) else _settings(method, base, knobs)
    workers = Workers.join(base.device if base else pick_device(settings.device))
    shown = (progress or Progress()) if workers.is_first else Progress(Console(quiet=True), quiet=True)
    with workers.alike(), tempfile.TemporaryDirectory() as scratch:
        ready = workers.in_turn(
            lambda told: _ready(settings if told is None else told, base, Path(scratch), shown, first=told is None),
            tell=_told,
        )
        if isinstance(ready, Summary):
            return ready
        settings, rows = ready.settings, ready.rows
        base = base or workers.together(lambda: Base.of(settings))
        workers.same({"data": (rows.sha256, rows.pretrain_sha256), "base": base.weights_hash})
        with base.turns.background():
            base.enable_checkpointing(settings.gradient_checkpointing)
            trainer = method_class(settings.method)(base, settings, ready.renderer)
            trainer.add_roles()
            trainer.pretrain_rows, trainer.workers = rows.pretrain_rows, workers
            out_of_memory = memory_for(
                f"in {settings.out}", f"{LESS_MEMORY}; --resume goes on from the last checkpoint"
            )
            with stop or StopSignals() as stopping, _open(settings, workers) as run, out_of_memory:
                workers.of_first(lambda: _write_down(run, settings, rows.dropped, Path(scratch)))
                return _run(trainer, rows, run, shown, stopping)


@dataclass(frozen=True)
class Ready:
    """What is known of a run before its base is loaded."""

    settings: TrainSettings
    renderer: Renderer
    rows: TrainingRows


def _told(found: Ready | Summary) -> TrainSettings | Summary:
    """What the other processes need to know of what the first found."""
    return found if isinstance(found, Summary) else found.settings


def _ready(
    told: TrainSettings | Summary, base: Base | None, scratch: Path, progress: Progress, first: bool
) -> Ready | Summary:
    """The rows, and everything checked; or that the run is finished.

    The `first` process looks at the run's folder and at the memory; the others are told its settings, or the end.
    """
    if isinstance(told, Summary):
        return told
    settings, out = told, Path(told.out).expanduser()
    if first:
        refuse_running(out)
        check_output(out, resume=settings.resume, overwrite=settings.overwrite)
    settings = as_the_run_began(settings, out, progress.note)
    finished = finished_before(settings, out)
    if finished is not None:
        progress.note(
            f"{out}: finished already at step {finished.get('steps')} (to train on: a new --out with --adapter {out})"
        )
        return Summary(out, finished.get("steps", 0), finished.get("summary", {}))
    check_machine(settings, out)
    check_inputs_stay(settings, out)
    check_adapters(settings)
    check_rollout_server(settings)
    tokenizer, context = (base.tokenizer, base.context_tokens) if base else read_tokenizer(settings.model)
    if settings.max_length > context:
        if "max_length" in settings.model_fields_set:
            progress.note(f"max_length: {settings.max_length} is over the model's context; taken as {context}")
        settings = settings.model_copy(update={"max_length": context})
    _tell_without_effect(settings, progress)
    kind = method_class(settings.method)
    if prefix := kind.answer_prefix(settings):
        progress.note(f"answers are asked for behind {prefix!r}, in this run and from it ({adapters.PROMPTING})")
    renderer, rows = _rendered(settings, tokenizer, scratch, progress.note)
    for line in preset_lines(settings, renderer, base.config if base else read_config(settings.model)):
        progress.note(line)
    fits = fitted(settings, rows.rows, base, progress.note) if first else settings
    if fits.max_length < settings.max_length:
        progress.note(f"once more, at max_length {fits.max_length}:")
        renderer, rows = _rendered(fits, tokenizer, scratch, progress.note)
    check_resumable(fits, out, rows.sha256, rows.pretrain_sha256)
    return Ready(fits, renderer, rows)


def _open(settings: TrainSettings, workers: Workers) -> RunFolder:
    """The run's folder, which the first process takes for all."""
    out, taken = Path(settings.out).expanduser(), list[RunFolder]()

    def take() -> None:
        taken.append(open_run(out, resume=settings.resume, overwrite=settings.overwrite, method=settings.method))

    workers.of_first(take)
    return taken[0] if taken else RunElsewhere(out)


def _rendered(
    settings: TrainSettings, tokenizer: Any, scratch: Path, tell: Callable[[str], None]
) -> tuple[Renderer, TrainingRows]:
    renderer = Renderer(
        tokenizer,
        chat_template=settings.chat_template,
        train_on=settings.train_on,
        max_length=settings.max_length,
        thinking=settings.thinking,
        thinking_if_possible=from_preset(settings, "thinking"),
    )
    kind = method_class(settings.method)
    renderer = renderer.with_prefix(kind.answer_prefix(settings))

    def render(row: Row) -> Rendered:
        return kind.render(row, renderer, settings)

    return renderer, training_rows(settings, kind.shapes, renderer, render, scratch / "bad_rows.jsonl", tell)


def _run(
    method: Method[Any, Any], rows: TrainingRows, run: RunFolder, progress: Progress, stop: StopSignals
) -> Summary:
    loop = Loop(method, rows.rows, rows.eval_rows, run, progress, stop)
    provenance = method.workers.of_first(lambda: _provenance(method, rows))
    method.workers.of_first(lambda: write_provenance(run.path, **provenance))
    try:
        figures = loop.run()
    finally:
        progress.close()
        method.close()
        method.base.enable_checkpointing(False)  # evaluation mode too, for whoever uses the base next
    figures |= method.finish(rows.rows, loop.sizes.retry)

    def save() -> None:
        if prefix := method.renderer.answer_prefix:  # first: an adapter without it would be asked otherwise
            adapters.write_prompting(run.path, prefix)
        record = write_provenance(run.path, **provenance, adapter_hash=method.save(run))
        plots = plot_metrics(run.path / "metrics.jsonl", run.plots)
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        write_atomic(run.path / "README.md", model_card(record, finite, run.path.name))
        run.mark_finished(figures)
        _print_end(method, run, loop, figures, plots, progress)

    method.workers.of_first(save)
    return Summary(run.path, loop.steps_done, figures)


def _settings(method: str, base: Base | None, knobs: dict[str, Any]) -> TrainSettings:
    if method not in METHODS:
        raise UserError(f"{method}: no such method{nearest(method, METHODS)} (there are: {', '.join(METHODS)})")
    if base is not None:
        for name, value in (("model", base.name), ("quantize", base.quantize)):
            if knobs.setdefault(name, value) != value:
                raise UserError(f"{name}: {knobs[name]!r} is not what the base has ({value!r}); leave it out")
    return resolve(METHODS[method], knobs)


def _tell_without_effect(settings: TrainSettings, progress: Progress) -> None:
    """Settings of a new adapter that were given although an older one is continued."""
    given = [name for name in ADAPTERS_OWN if getattr(settings, name) != type(settings).model_fields[name].default]
    given = [name for name in given if not from_preset(settings, name)]
    if settings.adapter is not None and given:
        progress.note(f"{', '.join(given)}: without effect, the adapter that is continued keeps its own")


def _write_down(run: RunFolder, settings: TrainSettings, dropped: list[tuple[str, str]], scratch: Path) -> None:
    """The resolved settings, and the lists of what is not trained on."""
    run.write_config(to_yaml(settings))
    for bad_rows in scratch.glob("*.jsonl"):
        write_atomic(run.path / bad_rows.name, bad_rows.read_bytes())
    if dropped:
        lines = [json.dumps({"where": where, "reason": reason}, ensure_ascii=False) for where, reason in dropped]
        write_atomic(run.path / "dropped_rows.jsonl", "\n".join(lines) + "\n")


def _provenance(method: Method[Any, Any], rows: TrainingRows) -> dict[str, Any]:
    base, s = method.base, method.settings
    tokenizer_files = [base.path / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")]
    parent = None
    if s.adapter is not None:
        parent = {"run": s.adapter, "adapter_hash": adapters.weights_sha256(s.adapter)}
    judges = s.reward_runs if isinstance(s, OnlineSettings) else []
    return {
        "reward_hashes": {run: adapters.weights_sha256(run) for run in judges} or None,
        "base": base.name,
        "base_hash": base.weights_hash,
        "method": s.method,
        "tokenizer_hash": folder_sha256([f for f in tokenizer_files if f.is_file()]),
        "template_hash": method.renderer.template_hash(),
        "data_hash": rows.sha256,
        "pretrain_hash": rows.pretrain_sha256,
        "parent": parent,
        "answer_prefix": method.renderer.answer_prefix or None,
        "config": s.model_dump(exclude=set(ADAPTERS_OWN) if s.adapter else None),
    }


def _print_end(
    method: Method[Any, Any],
    run: RunFolder,
    loop: Loop,
    figures: dict[str, float],
    plots: list[Path],
    progress: Progress,
) -> None:
    if progress.quiet:
        return
    shown = [name for name in figures if name not in ("seconds", "learning_rate", "skipped", "grad_norm")]
    progress.note(f"{run.path}: {method.settings.method} done, {loop.steps_done} steps; the last one:")
    for name in shown:
        progress.note(f"  {name:<28} {figures[name]:.4g}")
    progress.note(f"  adapter {run.adapter}, curves {run.plots} ({len(plots)} pictures)")
