"""Scores from the user's own Python function: `module:function(prompts, completions) -> scores`."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lowrank_align.errors import NumericError, UserError, nearest

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def is_function(reward: str) -> bool:
    """`module:function`, as against a run's folder."""
    module, _, function = reward.partition(":")
    return bool(function) and all(part.isidentifier() for part in (*module.split("."), function))


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
