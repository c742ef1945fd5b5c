"""Settings that are known to work for a model: one YAML file each, in the top-level `presets/`."""

from pathlib import Path
from typing import Any

import yaml

from lowrank_align.errors import UserError, nearest

HERE = Path(__file__).parent


def presets_folder() -> Path:
    """Where the preset files are: beside this module in a wheel, two folders up in a checkout."""
    packed = HERE / "presets"
    return packed if packed.is_dir() else HERE.parent / "presets"


def read_preset(name: str) -> dict[str, Any]:
    """The preset of that name; UserError with the nearest name where there is none."""
    file = presets_folder() / f"{name}.yaml"
    known = sorted(path.stem for path in presets_folder().glob("*.yaml"))
    if name not in known:
        raise UserError(f"{name}: no such preset{nearest(name, known)} (there are: {', '.join(known)})")
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content
