"""The commands that use a model without training it: generate, score, logps, show."""

import json
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig

from lowrank_align import adapters
from lowrank_align.base import BARE, Base
from lowrank_align.checkpoint import write_atomic
from lowrank_align.config import (
    GenerateSettings,
    LogpsSettings,
    ModelSettings,
    RowsSettings,
    ScoreSettings,
    ShowSettings,
)
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, Shape
from lowrank_align.data.load import load_rows
from lowrank_align.data.show import print_rows
from lowrank_align.errors import EnvironmentProblem, UserError
from lowrank_align.loading import model_folder, pick_device, read_tokenizer
from lowrank_align.provenance import weights_hash
from lowrank_align.rollout import generator_for, sample
from lowrank_align.trees import TreeBatch, TreeRow

WITH_COMPLETIONS = frozenset({Shape.demonstration, Shape.pair, Shape.ranking, Shape.unpaired, Shape.scored})


def generate(settings: GenerateSettings) -> None:
    """Write `{"prompt", "completion", "finished"}`, a line a completion, in the order of the prompts."""
    _check_out(settings.out, settings.overwrite)
    rows = load_rows(settings.prompts, expect={Shape.prompts}).rows
    base = _load(settings, "policy")
    renderer = _renderer(base, settings)
    rows, prompts = _that_fit(rows, renderer, settings.max_new_tokens, base.context_tokens)
    generator = generator_for(base.device, settings.seed, "generate")
    lines: list[dict[str, Any]] = []
    with base.role(_role(settings)):
        for places in _batches(len(rows), max(1, settings.batch_size // settings.completions)):
            groups = sample(
                base,
                [prompts[i] for i in places],
                end_ids=renderer.end_ids,
                max_new_tokens=settings.max_new_tokens,
                generator=generator,
                temperature=settings.temperature,
                top_p=settings.top_p,
                completions_per_prompt=settings.completions,
                batch_size=settings.batch_size,
            )
            for i, group in zip(places, groups, strict=True):
                lines += [_answer(rows[i], renderer.decode(rollout.ids), rollout.finished) for rollout in group]
    _write(settings.out, lines)


def _that_fit(
    rows: list[Row], renderer: Renderer, max_new_tokens: int, context: int
) -> tuple[list[Row], list[list[int]]]:
    """The rows whose prompt leaves room for an answer, and their ids; the others are counted and named."""
    every = [renderer.prompt_ids(row) for row in rows]
    fits = [len(ids) + max_new_tokens <= context for ids in every]
    left_out = [row.where for row, fit in zip(rows, fits, strict=True) if not fit]
    if len(left_out) == len(rows):
        raise UserError(f"{rows[0].where}: no prompt leaves room for {max_new_tokens} new tokens in the model's context of "
                        f"{context}; lower --max-new-tokens")  # fmt: skip
    if left_out:
        print(f"{len(left_out)} of {len(rows)} prompts left out: no room for {max_new_tokens} new tokens in the model's "
              f"context of {context}: {', '.join(left_out)}")  # fmt: skip
    return list(compress(rows, fits)), list(compress(every, fits))


def score(settings: ScoreSettings) -> None:
    """Write `{"scores": [one a completion]}`, a line a row; null with the reason where a row does not fit."""
    _check_out(settings.out, settings.overwrite)
    base, batches = _prepare(settings, "reward")
    lines: list[dict[str, Any]] = []
    with base.role("adapter"), torch.no_grad():
        for batch, trees, reasons in batches:
            found = base.scores(batch, shifted=settings.shifted).tolist() if batch else []
            lines += _per_row("scores", [found], trees, reasons)
    _write(settings.out, lines)


def logps(settings: LogpsSettings) -> None:
    """Write `{"logps": [one a completion], "num_tokens": [...]}`, a line a row, in nats over the trained tokens."""
    _check_out(settings.out, settings.overwrite)
    base, batches = _prepare(settings, "policy")
    lines: list[dict[str, Any]] = []
    with base.role(_role(settings)), torch.no_grad():
        for batch, trees, reasons in batches:
            found = [base.token_scores(batch).logps.tolist(), batch.num_tokens.tolist()] if batch else [[], []]
            lines += _per_row("logps num_tokens", found, trees, reasons)
    _write(settings.out, lines)


def show(settings: ShowSettings) -> None:
    """Print rows as the model will see them."""
    rows = load_rows(settings.data, expect=WITH_COMPLETIONS).rows[: settings.rows]
    tokenizer, context = read_tokenizer(settings.model)
    renderer = Renderer(
        tokenizer,
        chat_template=settings.chat_template,
        train_on=settings.train_on,
        max_length=min(settings.max_length, context),
    )
    print_rows(renderer, rows, settings.rows, Console(highlight=False))


def _prepare(
    settings: RowsSettings, kind: adapters.Kind
) -> tuple[Base, Iterator[tuple[TreeBatch | None, list[TreeRow | None], list[str | None]]]]:
    """The base with its adapter, and the file's rows as batches; rows that do not fit keep their place, with a reason."""
    rows = load_rows(settings.data, expect=WITH_COMPLETIONS).rows
    base = _load(settings, kind)
    renderer = _renderer(base, settings, settings.train_on)
    rendered = [renderer.tree_row(row) for row in rows]

    def batches() -> Iterator[tuple[TreeBatch | None, list[TreeRow | None], list[str | None]]]:
        for places in _batches(len(rows), settings.batch_size):
            trees = [rendered[i].tree for i in places]
            present = [tree for tree in trees if tree is not None]
            yield (base.collate(present) if present else None), trees, [rendered[i].dropped for i in places]

    return base, batches()


def _per_row(
    names: str, columns: Sequence[list[float]], trees: Sequence[TreeRow | None], reasons: Sequence[str | None]
) -> Iterator[dict[str, Any]]:
    """Cut the batch's columns (N,) into the rows' completions."""
    start = 0
    for tree, reason in zip(trees, reasons, strict=True):
        if tree is None:
            yield {name: None for name in names.split()} | {"reason": reason}
            continue
        end = start + len(tree.completions)
        yield {name: column[start:end] for name, column in zip(names.split(), columns, strict=True)}
        start = end


def _load(settings: ModelSettings, kind: adapters.Kind) -> Base:
    pick_device(settings.device)
    folder = model_folder(settings.model)
    if settings.adapter is not None:
        config = AutoConfig.from_pretrained(folder)
        adapters.check_before_load(settings.adapter, kind, settings.model, weights_hash(folder), config)
    base = Base.load(
        settings.model,
        quantize=settings.quantize,
        device=settings.device,
        dtype=settings.dtype,
        attention=settings.attention,
    )
    if settings.adapter is not None:
        base.add_role("adapter", start_from=settings.adapter, trainable=False)
    base.model.eval()
    return base


def _role(settings: ModelSettings) -> str:
    return BARE if settings.adapter is None else "adapter"


def _renderer(base: Base, settings: ModelSettings, train_on: Any = "all") -> Renderer:
    return Renderer(
        base.tokenizer,
        chat_template=settings.chat_template,
        train_on=train_on,
        max_length=min(settings.max_length, base.context_tokens),
    )


def _answer(row: Row, text: str, finished: bool) -> dict[str, Any]:
    """A demonstration row, in the layout that the prompt had."""
    completion = text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
    return {"prompt": row.prompt, "completion": completion, "finished": finished}


def _batches(count: int, size: int) -> Iterator[range]:
    starts = range(0, count, size)
    for start in track(starts, description="rows", console=Console(stderr=True), transient=True):
        yield range(start, min(start + size, count))


def _check_out(out: str, overwrite: bool) -> None:
    path = Path(out)
    if path.is_dir():
        raise UserError(f"{out}: is a folder; name a .jsonl file with --out")
    if path.exists() and not overwrite:
        raise UserError(f"{out}: exists; --overwrite replaces it")


def _write(out: str, lines: Sequence[dict[str, Any]]) -> None:
    try:
        Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(out), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot be written: {error.strerror or error}") from error
    print(f"{out}: {len(lines)} lines")
