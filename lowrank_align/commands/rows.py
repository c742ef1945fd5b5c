"""The commands that go through the rows of a file with a model: generate, score, logps, show."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track

from lowrank_align import adapters
from lowrank_align.base import Base
from lowrank_align.commands.best_of import highest, scores_of
from lowrank_align.config import (
    GenerateSettings,
    LogpsSettings,
    ModelSettings,
    RowsSettings,
    ScoreSettings,
    ShowSettings,
)
from lowrank_align.data.chat import Renderer, notes_on
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.load import Loaded, load_rows
from lowrank_align.data.show import print_rows
from lowrank_align.devices import check_device
from lowrank_align.durable import write_atomic
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.loading import model_folder, read_config, read_tokenizer
from lowrank_align.out_folders import check_place
from lowrank_align.preset_check import from_preset, preset_lines
from lowrank_align.provenance import weights_hash
from lowrank_align.rewards import Rewards, is_function, load_function, seen_answer
from lowrank_align.roles import BARE
from lowrank_align.rollout import Rollout, generator_for, sample
from lowrank_align.terminal import make_console, say
from lowrank_align.trees import TreeBatch, TreeRow

WITH_COMPLETIONS = frozenset({Shape.demonstration, Shape.pair, Shape.ranking, Shape.unpaired, Shape.scored})

Line = TreeRow | str  # a row's tokens, or why it has none


def generate(settings: GenerateSettings) -> None:
    """Write `{"prompt", "completion", "finished"}`, a line a completion, in the order of the prompts.

    With `best_of` a line a prompt, the completion with the highest score, and that `score`.
    """
    _check_before(settings, "policy")
    loaded = load_rows(settings.prompts, expect={Shape.prompts})
    _tell_conversions(loaded, settings.prompts)
    renderer = _behind_prefix(settings, _renderer(settings))
    rows, prompts = _that_fit(loaded.rows, renderer, settings.max_new_tokens)
    for note, count in notes_on(loaded.rows, renderer).items():
        say(f"{settings.prompts}: {count} rows: {note}")
    base = _load(settings)
    rewards = Rewards(base, settings.reward or [], settings.reward_weights)
    rewards.add_roles()
    generator = generator_for(base.device, settings.seed, "generate")
    lines: list[dict[str, Any]] = []
    drawn, every_score = settings.best_of or settings.completions, list[float]()
    with base.role(_role(settings)):
        for places in _batches(len(rows), max(1, settings.batch_size // drawn)):
            groups = sample(
                base,
                [prompts[i] for i in places],
                end_ids=renderer.end_ids,
                max_new_tokens=settings.max_new_tokens,
                generator=generator,
                temperature=settings.temperature,
                top_p=settings.top_p,
                completions_per_prompt=drawn,
                batch_size=settings.batch_size,
            )
            here = [rows[i] for i in places]
            answers = [
                [_answer(row, renderer, rollout) for rollout in group] for row, group in zip(here, groups, strict=True)
            ]
            if settings.best_of:
                scores = scores_of(rewards, renderer, here, groups, settings.batch_size)
                every_score += [score for group in scores for score in group]
                answers = [highest(*pair) for pair in zip(answers, scores, strict=True)]
            lines += [line for group in answers for line in group]
    _write(settings.out, lines)
    if every_score:
        means = fmean(line["score"] for line in lines), fmean(every_score)
        say(f"  best of {drawn}: score {means[0]:.4g} on average, of all {len(every_score)} drawn {means[1]:.4g}")


def _that_fit(rows: list[Row], renderer: Renderer, max_new_tokens: int) -> tuple[list[Row], list[list[int]]]:
    """The rows whose prompt leaves room for an answer, and their ids; the others are counted and named."""
    every = [renderer.prompt_ids(row) for row in rows]
    fits = [len(ids) + max_new_tokens <= renderer.max_length for ids in every]
    left_out = [row.where for row, fit in zip(rows, fits, strict=True) if not fit]
    room = f"no room for {max_new_tokens} new tokens within max_length {renderer.max_length}"
    if len(left_out) == len(rows):
        raise UserError(f"{left_out[0]}: {room}, nor for any other prompt; lower --max-new-tokens")
    if left_out:
        say(f"{len(left_out)} of {len(rows)} prompts left out, {room}: {', '.join(left_out)}")
    return list(compress(rows, fits)), list(compress(every, fits))


def score(settings: ScoreSettings) -> None:
    """Write `{"scores": [one a completion]}`, a line a row; null with the reason where a row does not fit."""
    _check_before(settings, "reward")
    if settings.shifted and not (adapters.run_of(adapters.locate(settings.adapter)) / adapters.REWARD).is_file():
        raise UserError(f"--shifted: {settings.adapter} has no {adapters.REWARD}, so no shift; leave --shifted out")
    rows = _rows(settings, _renderer(settings))
    base = _load(settings)
    lines: list[dict[str, Any]] = []
    with base.role("adapter"), torch.no_grad():
        for part, batch in _collated(base, rows, settings.batch_size):
            found = base.scores(batch, shifted=settings.shifted).tolist() if batch else []
            lines += _per_row("scores", [found], part)
    _write(settings.out, lines)


def logps(settings: LogpsSettings) -> None:
    """Write `{"logps": [one a completion], "num_tokens": [...]}`, a line a row, in nats over the trained tokens.

    Of a run with an answer prefix: behind it, as its answers are asked for.
    """
    _check_before(settings, "policy")
    rows = _rows(settings, _behind_prefix(settings, _renderer(settings)))
    base = _load(settings)
    lines: list[dict[str, Any]] = []
    with base.role(_role(settings)), torch.no_grad():
        for part, batch in _collated(base, rows, settings.batch_size):
            found = [base.token_scores(batch).logps.tolist(), batch.num_tokens.tolist()] if batch else [[], []]
            lines += _per_row("logps num_tokens", found, part)
    _write(settings.out, lines)


def show(settings: ShowSettings) -> None:
    """Print rows as the model will see them."""
    rows = load_rows(settings.data, expect=WITH_COMPLETIONS).rows[: settings.rows]
    print_rows(_renderer(settings), rows, settings.rows, make_console())


# ---- before the model loads


def _check_before(settings: RowsSettings | GenerateSettings, kind: adapters.Kind) -> None:
    """The file to write, the machine, the model's folder and the adapter."""
    out = Path(settings.out).expanduser()
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a .jsonl file with --out")
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out}: exists; --overwrite replaces it")
    check_place(out)
    check_device(settings.device, settings.quantize, settings.attention)
    if settings.adapter is not None:
        config, folder = read_config(settings.model), model_folder(settings.model)
        adapters.check_before_load(settings.adapter, kind, settings.model, weights_hash(folder), config)
    for reward in getattr(settings, "reward", None) or ():
        if is_function(reward):
            load_function(reward)
        else:
            config, folder = read_config(settings.model), model_folder(settings.model)
            adapters.check_before_load(reward, "reward", settings.model, weights_hash(folder), config)


def _renderer(settings: ModelSettings | ShowSettings) -> Renderer:
    tokenizer, context = read_tokenizer(settings.model)
    renderer = Renderer(
        tokenizer,
        chat_template=settings.chat_template,
        train_on=getattr(settings, "train_on", "all"),
        max_length=min(settings.max_length, context),
        thinking=settings.thinking,
        thinking_if_possible=from_preset(settings, "thinking"),
    )
    for line in preset_lines(settings, renderer, read_config(settings.model)):
        say(line)
    return renderer


def _behind_prefix(settings: ModelSettings, renderer: Renderer) -> Renderer:
    """With the text before the answer that the adapter was trained with, if any."""
    prefix = adapters.answer_prefix(settings.adapter)
    if prefix:
        say(f"{settings.adapter}: answers stand behind {prefix!r}, as in training")
    return renderer.with_prefix(prefix)


def _rows(settings: RowsSettings, renderer: Renderer) -> list[Line]:
    """Every row of the file in its place. With --skip-bad, bad ones too have a place, and their error."""
    with tempfile.TemporaryDirectory() as scratch:
        aside = Path(scratch) / "bad_rows.jsonl"
        loaded = load_rows(settings.data, expect=WITH_COMPLETIONS, skip_bad=aside if settings.skip_bad else None)
        bad = [json.loads(line)["error"] for line in aside.read_text().splitlines()] if loaded.skipped else []
    _tell_conversions(loaded, settings.data)
    cut, notes = 0, Counter[str]()
    good, errors = {row.index: row for row in loaded.rows}, iter(bad)
    lines: list[Line] = []
    for place in range(len(loaded.rows) + loaded.skipped):
        if place not in good:
            lines.append(next(errors))
            continue
        try:
            rendered = renderer.tree_row(good[place])
        except UserError as error:
            if not settings.skip_bad:
                raise
            lines.append(str(error))
            continue
        cut += rendered.truncated_tokens > 0
        notes.update(set(rendered.notes))
        lines.append(rendered.tree or str(rendered.dropped))
    if cut:
        say(f"{settings.data}: {cut} of {len(lines)} rows cut at max_length {renderer.max_length}")
    for note, count in notes.items():
        say(f"{settings.data}: {count} rows: {note}")
    return lines


def _tell_conversions(loaded: Loaded, source: str) -> None:
    for name, count in loaded.conversions.items():
        say(f"{source}: {count} rows read as {name}")


# ---- with the model


def _load(settings: ModelSettings) -> Base:
    base = Base.of(settings)
    if settings.adapter is not None:
        base.add_role("adapter", start_from=settings.adapter, trainable=False)
    base.model.eval()
    return base


def _role(settings: ModelSettings) -> str:
    return BARE if settings.adapter is None else "adapter"


def _collated(base: Base, lines: Sequence[Line], size: int) -> Iterator[tuple[Sequence[Line], TreeBatch | None]]:
    """The lines, `size` at a time, with the batch of those that have tokens."""
    for places in _batches(len(lines), size):
        part = lines[places.start : places.stop]
        trees = [line for line in part if isinstance(line, TreeRow)]
        yield part, base.collate(trees) if trees else None


def _per_row(names: str, columns: Sequence[list[float]], lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
    """Cut the batch's columns (N,) into the rows' completions."""
    start = 0
    for line in lines:
        if isinstance(line, str):
            yield {name: None for name in names.split()} | {"reason": line}
            continue
        end = start + len(line.completions)
        yield {name: column[start:end] for name, column in zip(names.split(), columns, strict=True)}
        start = end


def _answer(row: Row, renderer: Renderer, rollout: Rollout) -> dict[str, Any]:
    """A demonstration row, in the layout that the prompt had."""
    chat = not isinstance(row.prompt, str)
    text = seen_answer(renderer, rollout.ids, chat=chat)
    completion = [{"role": "assistant", "content": text}] if chat else text
    return {"prompt": row.prompt, "completion": completion, "finished": rollout.finished}


def _batches(count: int, size: int) -> Iterator[range]:
    starts, console = range(0, count, size), make_console(stderr=True)
    for start in track(starts, "rows", console=console, transient=True, disable=not console.is_terminal):
        yield range(start, min(start + size, count))


def _write(out: str, lines: Sequence[dict[str, Any]]) -> None:
    path = Path(out).expanduser()
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot be written: {error.strerror or error}") from error
    say(f"{out}: {len(lines)} lines")
    if reasons := [line["reason"] for line in lines if "reason" in line]:
        say(f"  {len(reasons)} of them without figures (first: {reasons[0]})")
    if empty := sum(_is_empty(line["completion"]) for line in lines if "completion" in line):
        say(f"  {empty} of them empty: score and logps take them with --skip-bad")


def _is_empty(completion: Any) -> bool:
    return not (completion if isinstance(completion, str) else completion[0]["content"]).strip()
