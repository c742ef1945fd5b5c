"""A round's pairs: drawn and labelled by simulated annotators, or what people judged since the last round."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_align.annotators import POOL, Annotator
from lowrank_align.base import Base
from lowrank_align.config import RoundsSettings
from lowrank_align.config.loops import POOL as THE_POOL
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row
from lowrank_align.data.stored import export_rows
from lowrank_align.durable import write_atomic
from lowrank_align.errors import Stopped, UserError
from lowrank_align.pairs import draw_pairs
from lowrank_align.rewards import load_function
from lowrank_align.store import Store

Line = dict[str, Any]  # a row as its file has it


@dataclass(frozen=True)
class Collected:
    """A round's new pairs; `told` is one line about them."""

    lines: list[Line]
    told: str
    as_scored: float | None = None  # share that the exact score agrees with, of simulated labels


def annotators_of(settings: RoundsSettings) -> tuple[Annotator, ...]:
    """The pool, or one who goes by the score and flips the share `noise`."""
    return POOL if settings.annotator == THE_POOL else (Annotator("exact", flipped=settings.noise),)


def simulate(
    settings: RoundsSettings, base: Base, role: str, renderer: Renderer, prompts: Sequence[Row], number: int
) -> Collected:
    """Two answers of `role` to each of the round's prompts, labelled; round and seed decide all of it."""
    assert settings.score is not None
    drawn = draw_pairs(
        base,
        role,
        renderer,
        of_round(prompts, settings.pairs, number, settings.seed),
        annotators_of(settings),
        load_function(settings.score),
        seed=settings.seed + number,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    return Collected(drawn.labels.rows, drawn.labels.told(), drawn.labels.agreement)


def of_round(prompts: Sequence[Row], count: int, number: int, seed: int) -> list[Row]:
    """The prompts of a round (from 1): as long as they last, others each round; then from the first again."""
    order = list(prompts)
    random.Random(seed).shuffle(order)
    start = (number - 1) * count
    return [order[(start + i) % len(order)] for i in range(min(count, len(order)))]


def judged_since(settings: RoundsSettings, earlier: Sequence[Sequence[Line]], command: str) -> Collected:
    """The store's pairs that no earlier round has, or has as they were before they were changed.

    Stopped, resumable, where they are fewer than `min_judgements`; `command` opens the studio on the current policy.
    """
    assert settings.store is not None
    with Store(settings.store, create=False) as store:
        export = export_rows(store, "pairs")
    known = {_version(line) for lines in earlier for line in lines}
    new = [line for line in export.lines if _version(line) not in known]
    judgements = len({_key(line) for line in new})
    if judgements < settings.min_judgements:
        raise Stopped(
            f"{settings.store}: {judgements} new judgements since the last round, {settings.min_judgements} wanted; "
            f"judge more with `{command}`, then the same command goes on"
        )
    left_out = ", ".join(f"{count} left out: {reason}" for reason, count in export.left_out.items())
    return Collected(new, f"{judgements} new judgements, {len(new)} pairs" + f" ({left_out})" * bool(left_out))


def together(rounds: Sequence[Sequence[Line]]) -> list[Line]:
    """The pairs of several rounds; of a judgement that was changed since, those of its last round alone."""
    last = {_key(line): number for number, lines in enumerate(rounds) for line in lines if _key(line)}
    return [
        line for number, lines in enumerate(rounds) for line in lines if not _key(line) or last[_key(line)] == number
    ]


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which judgement of a store a row is from; () for a simulated one."""
    record = line.get("record")
    return (record["id"], record["annotator"]) if record else ()


def _version(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*_key(line), line["record"]["version"]) if line.get("record") else ()


def as_unpaired(lines: Iterable[Line]) -> list[Line]:
    """Each pair as a good and a bad answer; a tie says neither."""
    found = []
    for line in lines:
        preference = line.get("preference", 1.0)
        if preference == 0.5:
            continue
        good, bad = ("chosen", "rejected") if preference > 0.5 else ("rejected", "chosen")
        common = {"prompt": line.get("prompt", "")}
        found.append({**common, "completion": line[good], "label": True})
        found.append({**common, "completion": line[bad], "label": False})
    return found


def read_lines(path: Path) -> list[Line]:
    """JSON Lines that a round wrote; UserError where they are none any more."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}); restore it, or choose another --out") from None
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path}: damaged (no object a line); restore it, or choose another --out")
    return lines


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """Whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
