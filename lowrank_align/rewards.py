"""What an answer is worth: reward runs and the user's own Python functions, weighted and added up.

A function is named `module:function` and called with (prompts, completions), lists of texts; it returns a score each.
"""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowrank_align.base import Base
from lowrank_align.config import is_function
from lowrank_align.errors import NumericError, UserError, nearest
from lowrank_align.trees import TreeRow

__all__ = ["RewardFunction", "Rewards", "is_function", "load_function"]

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def load_function(reward: str) -> RewardFunction:
    """Import `module:function`, looking in the current folder too; what goes wrong is one UserError line."""
    module_name, _, name = reward.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UserError(f"{reward}: no module {module_name} in the current folder or the environment") from error
        raise UserError(f"{reward}: its module imports {error.name}, which is not installed") from error
    except Exception as error:  # whatever the user's module does on import
        raise UserError(f"{reward}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UserError(f"{reward}: module {module_name} has no function {name}{nearest(name, known)}")

    def checked(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        try:
            scores = [float(score) for score in function(list(prompts), list(completions))]
        except Exception as error:  # whatever the user's function does
            what = f"raised {type(error).__name__}: {error}"
            raise UserError(f"{reward}: {what} (first prompt: {prompts[0][:80]!r})") from error
        if len(scores) != len(completions):
            raise UserError(f"{reward}: gave {len(scores)} scores for {len(completions)} completions")
        for prompt, score in zip(prompts, scores, strict=True):
            if not math.isfinite(score):
                raise NumericError(f"{reward}: gave {score} for the prompt {prompt[:80]!r}")
        return scores

    return checked


class Rewards:
    """Several rewards as one score: sum of weight * score, reward runs shifted as their `reward.json` says."""

    def __init__(self, base: Base, names: Sequence[str], weights: Sequence[float] | None = None) -> None:
        """`names`: runs or functions. The runs become frozen roles `reward`, `reward_2`, ... with `add_roles`."""
        self.base, self.names = base, list(names)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.names)
        self.functions = {name: load_function(name) for name in self.names if is_function(name)}
        runs = [name for name in self.names if name not in self.functions]
        self.roles = {run: "reward" if place == 0 else f"reward_{place + 1}" for place, run in enumerate(runs)}

    def add_roles(self) -> None:
        """Put the reward runs on the base."""
        for run, role in self.roles.items():
            self.base.add_role(role, start_from=run, trainable=False)

    @torch.no_grad()
    def of_trees(self, trees: Sequence[TreeRow], size: int) -> dict[str, Tensor]:
        """(N,) the shifted scores of the rows' completions, by each reward run; `size` rows at once."""
        found: dict[str, list[Tensor]] = {run: [] for run in self.roles}
        for start in range(0, len(trees), size) if self.roles else ():
            batch = self.base.collate(list(trees[start : start + size]))
            for run, role in self.roles.items():
                with self.base.role(role):
                    found[run].append(self.base.scores(batch, shifted=True))
            self.base.turns.give_way()
        return {run: torch.cat(parts) for run, parts in found.items()}

    def of_texts(self, prompts: Sequence[str], completions: Sequence[str]) -> dict[str, Tensor]:
        """(N,) the scores by each function. UserError or NumericError, naming the prompt, for what it does wrong."""
        device = self.base.device
        return {name: torch.tensor(f(prompts, completions), device=device) for name, f in self.functions.items()}

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """(N,) the weighted sum of what `of_trees` and `of_texts` gave."""
        return torch.stack([w * parts[name] for name, w in zip(self.names, self.weights, strict=True)]).sum(0)
