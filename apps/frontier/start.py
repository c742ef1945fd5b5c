"""Where every method of a seed begins: an SFT policy, pairs of its answers labelled by the pool, a reward model."""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_align.apps.frontier.budget import Spent, spent_on_reward
from lowrank_align.apps.frontier.tasks import Ground, read_done
from rich.console import Console

from lowrank_align.annotators import POOL
from lowrank_align.base import Base
from lowrank_align.config import METHODS, RewardSettings, TrainSettings, resolve
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row, Shape, parse_row
from lowrank_align.data.load import load_rows
from lowrank_align.durable import write_atomic
from lowrank_align.errors import UserError
from lowrank_align.pairs import draw_pairs
from lowrank_align.presets import read_preset
from lowrank_align.progress import Progress
from lowrank_align.rewards import RewardFunction, load_function
from lowrank_align.tiny import demonstrations, prompts
from lowrank_align.train import Summary, train

DEMONSTRATIONS = 600
SFT, JUDGE = "sft", "judge"  # roles


@dataclass(frozen=True)
class Prompts:
    """A seed's prompts: no training sees those that choose the learning rates (validation) or are reported (test)."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class World:
    """What a worker has in hand for one task."""

    base: Base
    ground: Ground
    seed: int
    score: RewardFunction
    renderer: Renderer

    @classmethod
    def of(cls, base: Base, ground: Ground, seed: int) -> "World":
        renderer = Renderer(base.tokenizer, max_length=base.context_tokens)
        return cls(base, ground, seed, load_function(ground.score), renderer)

    def prompts(self) -> Prompts:
        """Drawn by the seed alone; UserError where there are too few."""
        ground = self.ground
        counts = (ground.pairs, ground.held_out // 2, ground.held_out)
        if ground.prompts is None:
            texts = prompts(sum(counts), seed=self.seed)
            rows = [parse_row({"prompt": text}, "tiny", i) for i, text in enumerate(texts)]
        else:
            rows = self._fitting(load_rows(ground.prompts, expect={Shape.prompts}).rows)
            if len(rows) < sum(counts):
                raise UserError(
                    f"{ground.prompts}: {len(rows)} different prompts that leave room for an answer, {sum(counts)} "
                    "wanted; lower --pairs or --held-out"
                )
            rows = random.Random(self.seed).sample(rows, sum(counts))
        first, second = counts[0], counts[0] + counts[1]
        return Prompts(rows[:first], rows[first:second], rows[second:])

    def _fitting(self, rows: Sequence[Row]) -> list[Row]:
        """Each prompt once, and only those that leave room."""
        room = self.base.context_tokens - self.ground.max_new_tokens
        different = {json.dumps(row.prompt): row for row in rows}
        return [row for row in different.values() if len(self.renderer.prompt_ids(row)) <= room]

    # ---- training

    def settings(self, method: str, knobs: dict[str, Any], out: Path) -> TrainSettings:
        """A method's settings: the preset's (that of tiny, where the model is) under `knobs`.

        Of a policy's preset only what all methods share is taken: its beta may be of no use to the loss compared.
        """
        ground, name = self.ground, self.ground.preset or ("tiny" if self.ground.model == "tiny" else None)
        common: dict[str, Any] = {"sample_steps": 0, "seed": self.seed, "resume": True}
        if name is not None:
            shared = METHODS[method] if method in ("sft", "reward") else TrainSettings
            own = METHODS[method].model_fields.keys() & shared.model_fields.keys()
            common |= {key: value for key, value in read_preset(name).knobs(method).items() if key in own}
        where = {"model": self.base.name, "quantize": ground.quantize, "device": ground.device, "out": str(out)}
        if method in METHODS and "max_new_tokens" in METHODS[method].model_fields:
            common["max_new_tokens"] = ground.max_new_tokens
        return resolve(METHODS[method], common | knobs | where)

    def train(self, settings: TrainSettings) -> Summary:
        """One line each for a hundred trainings is enough: the run's own lines go nowhere."""
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            return train(settings, base=self.base, progress=Progress(Console(file=nowhere), quiet=True))


@dataclass(frozen=True)
class Start:
    """A finished start, as its folder and its `done.json` hold it."""

    folder: Path
    answer_tokens: float  # mean, of SFT's answers
    pairs: Spent
    reward: Spent
    baseline: dict[str, list[float]]  # exact scores of SFT's answers to the validation and the test prompts

    @classmethod
    def read(cls, folder: Path) -> "Start":
        """UserError where it is gone."""
        done = read_done(folder)
        if done is None:
            raise UserError(f"{folder}: the start is gone; the same command makes it again")
        spent = {name: Spent(done[name]["generated"], done[name]["trained"]) for name in ("pairs", "reward")}
        return cls(folder, done["answer_tokens"], spent["pairs"], spent["reward"], done["baseline"])

    def put_on(self, base: Base) -> None:
        """SFT and the reward model as roles."""
        base.add_role(SFT, start_from=self.folder / "sft", trainable=False)
        base.add_role(JUDGE, start_from=self.folder / "reward", trainable=False)


def make_start(world: World, folder: Path) -> dict[str, Any]:
    """SFT, pairs and reward model into `folder`; what is finished there already stays."""
    found = world.prompts()
    rows, about_held_out = _demonstrations(world, found)
    write_rows(folder / "demonstrations.jsonl", rows)
    sft = world.settings("sft", {"data": str(folder / "demonstrations.jsonl")}, folder / "sft")
    world.train(sft)
    world.base.add_role(SFT, start_from=folder / "sft", trainable=False)
    ground = world.ground
    drawn = draw_pairs(
        world.base, SFT, world.renderer, found.train, POOL, world.score,
        seed=world.seed, max_new_tokens=ground.max_new_tokens,
    )  # fmt: skip
    write_rows(folder / "pairs.jsonl", drawn.labels.rows)
    write_rows(folder / "prompts.jsonl", [{"prompt": row.prompt} for row in found.train])
    reward = world.settings(
        "reward", {"data": str(folder / "pairs.jsonl"), "adapter": str(folder / "sft")}, folder / "reward"
    )
    world.train(reward)
    assert isinstance(reward, RewardSettings)
    spent = spent_on_reward(reward, len(drawn.labels.rows), drawn.mean_tokens)
    return {
        "answer_tokens": drawn.mean_tokens,
        "demonstrations": {"rows": len(rows), "about_held_out_prompts": about_held_out},
        "pairs": Spent(drawn.tokens, 0).as_json(),
        "reward": spent.as_json(),
        "labels": {
            "rows": len(drawn.labels.rows),
            "identical": drawn.labels.identical,
            "refused": drawn.labels.refused,
            "flipped": drawn.labels.flipped,
            "as_scored": drawn.labels.agreement,
        },
    }


def _demonstrations(world: World, found: Prompts) -> tuple[list[dict[str, Any]], int]:
    """What SFT learns from, without anything about a held-out prompt, and how many rows that left out."""
    held_out = {_asked(row) for row in (*found.validation, *found.test)}
    if world.ground.demonstrations is None:
        rows = [
            parse_row(row, "demonstrations", i) for i, row in enumerate(demonstrations(DEMONSTRATIONS, seed=world.seed))
        ]
    else:
        rows = load_rows(world.ground.demonstrations, expect={Shape.demonstration}).rows
    kept = [row for row in rows if _asked(row) not in held_out]
    return [_as_line(row) for row in kept], len(rows) - len(kept)


def _asked(row: Row) -> str:
    """The prompt as one text; of a conversation without a prompt, all but its last turn."""
    said = row.prompt or (
        row.completions[0][:-1] if row.completions and not isinstance(row.completions[0], str) else ""
    )
    return json.dumps(said)


def _as_line(row: Row) -> dict[str, Any]:
    if row.prompt:
        return {"prompt": row.prompt, "completion": row.completions[0]}
    return {"text" if isinstance(row.completions[0], str) else "messages": row.completions[0]}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
