"""Where the embedded base lives once it is built: the user's cache folder."""

import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from lowrank_align.errors import EnvironmentProblem
from lowrank_align.tiny.recipe import Recipe

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def tiny_path(*, progress: Callable[[int, int, float], None] | None = None, seed: int = 0) -> Path:
    """The folder of the embedded base, as transformers reads it; pretrained first (about a minute) where missing.

    `progress` receives (step, steps, loss in nats a token) after every step. Raises `EnvironmentProblem` where the
    cache folder cannot be written.
    """
    return cached(Recipe(seed=seed), cache_folder(), progress)


def cache_folder() -> Path:
    """`LOWRANK_ALIGN_CACHE`, or else `lowrank_align` in the platform's cache folder."""
    if chosen := os.environ.get("LOWRANK_ALIGN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        platform_cache = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        platform_cache = "~/Library/Caches"
    else:
        platform_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(platform_cache).expanduser() / "lowrank_align"


def cached(recipe: Recipe, folder: Path, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """`folder/<the recipe's name>`, built where missing. Of two builders at once, the first to finish is kept."""
    built = folder / recipe.name
    if _is_complete(built):
        return built
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # told now, not after a minute of pretraining
            raise PermissionError("not writable")
        _build(recipe, built, progress)
    except OSError as error:
        reason = error.strerror or error
        raise EnvironmentProblem(
            f"{folder}: cannot cache the model tiny: {reason} (set LOWRANK_ALIGN_CACHE)"
        ) from error
    return built


def _build(recipe: Recipe, built: Path, progress: Callable[[int, int, float], None] | None) -> None:
    from lowrank_align.tiny import pretrain  # here: a cached model is found without importing torch

    model = pretrain.build_model(recipe, progress)
    unfinished = built.with_name(f".{built.name}-{uuid.uuid4().hex}")
    try:
        pretrain.save(model, recipe, unfinished)
        for file in unfinished.iterdir():
            _flush_to_disk(file)
        _publish(unfinished, built)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, built: Path) -> None:
    """One rename, so that a reader sees all files or none. Whoever comes second leaves the first one's in place."""
    if built.exists() and not _is_complete(built):
        shutil.rmtree(built)  # someone deleted files out of it
    try:
        unfinished.rename(built)
    except OSError:
        if not _is_complete(built):
            raise


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _flush_to_disk(file: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
