"""From settings to tasks: what is trained for the learning rates, and what for the figure."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lowrank_align.apps.frontier.entries import (
    BEST_OF,
    BEST_OF_NAME,
    BEST_OF_QUICK,
    DATA_SHARES,
    LOOKS,
    RANKS,
    RATE_GRID,
    TEMPERATURES,
    Entry,
    chosen_entries,
)
from lowrank_align.apps.frontier.tasks import START, Ground, Task

from lowrank_align.config import FrontierSettings
from lowrank_align.data.sources import open_source
from lowrank_align.loading import model_folder
from lowrank_align.presets import read_preset
from lowrank_align.provenance import file_sha256, weights_hash
from lowrank_align.rewards import load_function

EXACT = "lowrank_align.tiny:exact_score"
QUICK_BUDGET, QUICK_PAIRS, QUICK_HELD_OUT = 240_000, 600, 128


@dataclass(frozen=True)
class Plan:
    """What a report is to hold; `missing` are entries whose method is not in this installation."""

    ground: Ground
    out: Path
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    missing: tuple[Entry, ...]
    best_of: bool
    tuned: bool  # whether learning rates are tried
    rewards: bool
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    ranks: tuple[int, ...]
    on_tiny: bool  # tiny's own rates and batch sizes

    @classmethod
    def of(cls, settings: FrontierSettings) -> "Plan":
        """Everything that a user can have got wrong raises UserError here, before anything is trained."""
        s, quick = settings, settings.quick
        present, missing = chosen_entries(s.only, quick)
        load_function(s.score or EXACT)
        if s.preset:
            read_preset(s.preset)
        own = {name: getattr(s, name) for name in ("budget_tokens", "pairs", "held_out")}
        small = {"budget_tokens": QUICK_BUDGET, "pairs": QUICK_PAIRS, "held_out": QUICK_HELD_OUT}
        sizes = own | {name: size for name, size in small.items() if quick and name not in s.model_fields_set}
        files = {name: path for name in ("prompts", "demonstrations") if (path := getattr(s, name))}
        read = {name: open_source(path).sha256 for name, path in files.items()}
        read |= {"score": _code_sha256(s.score or EXACT)}
        read |= {"preset": file_sha256(read_preset(s.preset or "tiny").file)} if s.preset or s.model == "tiny" else {}
        ground = Ground(
            model=s.model, weights=weights_hash(model_folder(s.model)), quantize=s.quantize, device=s.device,
            preset=s.preset, score=s.score or EXACT, prompts=s.prompts, demonstrations=s.demonstrations,
            files_sha256=read,
            max_new_tokens=s.max_new_tokens, temperatures=TEMPERATURES, looks=LOOKS, **sizes,
        )  # fmt: skip
        seeds = tuple(range(s.seed, s.seed + (1 if quick and "seeds" not in s.model_fields_set else s.seeds)))
        return cls(
            ground, Path(s.out).expanduser(), seeds, tuple(present), tuple(missing),
            best_of=s.only is None or BEST_OF_NAME in s.only, tuned=s.tune and not quick, rewards=s.only is None,
            counts=BEST_OF_QUICK if quick else BEST_OF,
            shares=DATA_SHARES[1:] if quick else DATA_SHARES, ranks=RANKS[1:3] if quick else RANKS,
            on_tiny=s.model == "tiny" and s.preset is None,
        )  # fmt: skip

    # ---- tasks

    def starts(self) -> dict[int, Task]:
        """One a seed."""
        return {seed: Task("start", START, seed) for seed in self.seeds}

    def tuning(self) -> dict[tuple[str, float], Task]:
        """Every entry at its middle value on the first seed, once a learning rate of the grid."""
        if not self.tuned:
            return {}
        return {
            (entry.name, multiple): self.policy(entry, entry.middle, multiple, self.seeds[0])
            for entry in self.entries
            if entry.rate_of is None
            for multiple in RATE_GRID
        }

    def final(self, multiples: Mapping[str, float]) -> list[Task]:
        """Everything in the figure, at the learning rates that were chosen."""
        tasks = []
        for seed in self.seeds:
            if self.best_of:
                tasks.append(self._task("best_of", BEST_OF_NAME, seed, {"counts": list(self.counts)}))
            tasks += [
                self.policy(entry, value, multiple_of(entry, multiples), seed)
                for entry in self.entries
                for value in entry.values
            ]
            tasks += self.reward_tasks(seed)
        return tasks

    def policy(self, entry: Entry, value: Any, multiple: float, seed: int) -> Task:
        """An entry's training at one value of its sweep."""
        knobs = {**entry.knobs, **(entry.on_tiny if self.on_tiny else {})}
        name = entry.name
        if entry.sweep is not None:
            knobs[entry.sweep] = value
            name += f" {entry.sweep}={value:g}"
        spec = {
            "method": entry.method, "knobs": knobs, "rate": entry.rate if self.on_tiny else None, "multiple": multiple,
            "reward": entry.reward, "watched": entry.watched, "warm": entry.warm, "further": entry.further,
        }  # fmt: skip
        return self._task("policy", f"{name} rate={multiple:g}", seed, spec)

    def reward_tasks(self, seed: int) -> list[Task]:
        """Reward models on shares of the pairs, and of several ranks on all; the start's own is both at once."""
        if not self.rewards:
            return []
        shares = [self._task("reward", f"reward share={share:g}", seed, {"share": share, "rank": None})
                  for share in self.shares if share < 1]  # fmt: skip
        ranks = [self._task("reward", f"reward rank={rank}", seed, {"share": 1.0, "rank": rank}) for rank in self.ranks]
        return shares + ranks

    def _task(self, kind: Any, name: str, seed: int, spec: dict[str, Any]) -> Task:
        start = self.starts()[seed]
        return Task(kind, name, seed, spec, start.key(self.ground))


def multiple_of(entry: Entry, multiples: Mapping[str, float]) -> float:
    """What the entry's own learning rate is multiplied by."""
    return multiples.get(entry.rate_of or entry.name, 1.0)


def chosen_rates(results: Mapping[tuple[str, float], Mapping[str, Any]]) -> dict[str, float]:
    """Of each entry's tries the multiple with the best exact score on the validation prompts, failed ones left out."""
    best: dict[str, tuple[float, float]] = {}
    for (name, multiple), result in results.items():
        if "failed" in result:
            continue
        score = result["validation"]["score"]
        if name not in best or score > best[name][0]:
            best[name] = (score, multiple)
    return {name: multiple for name, (_, multiple) in best.items()}


def same(tasks: Sequence[Task], ground: Ground) -> list[Task]:
    """Each task once."""
    return list({task.key(ground): task for task in tasks}.values())


def _code_sha256(score: str) -> str:
    """Of the file in which a score function stands; it was imported already."""
    place = inspect.getsourcefile(import_module(score.partition(":")[0]))
    return file_sha256(Path(place)) if place else ""
