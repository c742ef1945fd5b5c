"""Where `--out` may lead: a place that can be written in, and none that must never be removed."""

import os
from pathlib import Path

from lowrank_align.errors import EnvironmentProblem, UserError


def check_place(path: Path) -> Path:
    """The nearest folder above `path` (or itself) that is there, in which it can be made; an error where it cannot."""
    found = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if found != path.absolute() and not found.is_dir():
        raise UserError(f"{path}: {found} is a file, so nothing can be made in it; choose another --out")
    if not os.access(found, os.W_OK):
        raise EnvironmentProblem(f"{path}: no permission to write in {found}; choose another --out")
    return found


def refuse_protected(path: Path) -> None:
    """UserError for a folder that nobody means to have emptied."""
    real, here, home = path.resolve(), Path.cwd().resolve(), Path.home().resolve()
    what = {
        "the home folder or one above it": real == home or real in home.parents,
        "the root of the disk": real == Path(real.anchor),
        "the current folder or one above it": real == here or real in here.parents,
        "a git checkout": (real / ".git").exists(),
    }
    for name, holds in what.items():
        if holds:
            raise UserError(f"{path}: is {name}, which is never removed; choose another folder")
