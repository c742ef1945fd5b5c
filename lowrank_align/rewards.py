"""What an answer is worth: reward runs and the user's own Python functions, weighted and added up.

A function is named `module:function` and called with (prompts, completions), lists of texts; it returns a score each.
"""

import importlib
import inspect
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowrank_align.base import Base
from lowrank_align.config import is_function
from lowrank_align.data.chat import Renderer
from lowrank_align.data.formats import Row
from lowrank_align.errors import NumericError, UserError, nearest
from lowrank_align.trees import TreeRow

__all__ = ["RewardFunction", "Rewards", "is_function", "load_function", "seen_answer", "seen_prompt"]

LARGEST = torch.finfo(torch.float32).max  # a larger score would be infinite in training

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
    except (Exception, SystemExit) as error:  # whatever the user's module does on import
        raise UserError(f"{reward}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise UserError(f"{reward}: module {module_name} has no function {name}{nearest(name, known)}")

    if problem := _not_callable_so(function):
        raise UserError(f"{reward}: {problem}")

    def checked(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        try:
            scores = _called(function, prompts, completions)
        except UserError as error:
            for prompt, completion in zip(prompts, completions, strict=True):  # which of them it is, each alone
                try:
                    _called(function, [prompt], [completion])
                except UserError as alone:
                    raise UserError(f"{reward}: {alone} for the prompt {prompt[:80]!r}") from error
            raise UserError(
                f"{reward}: {error}, though not for any alone (first prompt: {prompts[0][:80]!r})"
            ) from error
        for prompt, score in zip(prompts, scores, strict=True):
            if not abs(score) <= LARGEST:  # NaN too
                raise NumericError(f"{reward}: gave {score} for the prompt {prompt[:80]!r}")
        return scores

    return checked


def _not_callable_so(function: RewardFunction) -> str | None:
    """What keeps a function from being called with (prompts, completions), by its signature."""
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        return f"is called as function(prompts, completions), and that does not fit it: {error}"
    except ValueError:  # a built-in one without a signature
        pass
    return None


def _called(function: RewardFunction, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The function's scores; UserError where it raises or returns anything but a number for each completion."""
    try:
        given = function(list(prompts), list(completions))
        parts = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping) else None
    except (Exception, SystemExit) as error:  # whatever the user's function does
        raise UserError(f"raised {type(error).__name__}: {error}{_place(error)}") from error
    try:
        scores = [float(part) for part in parts]  # type: ignore[union-attr]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of more than one number in it
        raise UserError(
            f"returned {reprlib.repr(parts or given)}, which is not a list with a number for each completion,"
        ) from None
    if len(scores) != len(completions):
        plural = "" if len(completions) == 1 else "s"
        raise UserError(f"gave {len(scores)} scores for {len(completions)} completion{plural}")
    return scores


def _place(error: BaseException) -> str:
    """` (file.py:12)`: where the user's code raised."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def seen_prompt(row: Row) -> str:
    """What a reward function sees: the prompt as the row has it; of a conversation, what was said last."""
    return row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1]["content"])


def seen_answer(renderer: Renderer, ids: Sequence[int], *, chat: bool) -> str:
    """What a reward function sees of a sampled answer, in training and in every measurement: what was said.

    In a conversation without the space or newline around it: what the template puts before an answer, the model writes.
    """
    text = renderer.decode(ids)
    return text.strip() if chat else text


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

    def scores(
        self, rows: Sequence[Row], trees: Sequence[TreeRow], texts: Sequence[Sequence[str]], size: int
    ) -> Tensor:
        """(N,) the weighted scores of the completions of each row, `trees` their tokens and `texts` what they say."""
        prompts = [seen_prompt(row) for row, group in zip(rows, texts, strict=True) for _ in group]
        parts = self.of_trees(trees, size)
        if self.functions:
            parts = parts | self.of_texts(prompts, [text for group in texts for text in group])
        return self.total(parts)

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """(N,) the weighted sum of what `of_trees` and `of_texts` gave."""
        return torch.stack([w * parts[name] for name, w in zip(self.names, self.weights, strict=True)]).sum(0)
