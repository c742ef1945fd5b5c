"""Settings that are known to work for a model: one YAML file each, in the top-level `presets/` or the user's folder.

A preset states where the model is, its figures (so that a plan needs neither network nor files), which tokens end a
turn and pad, and the settings in which it differs from the defaults, for all methods or for one. What could not be
checked when it was written is named under `unverified`, and compared with the model whenever that is loaded.
"""

import os
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowrank_align.architecture import Architecture
from lowrank_align.config.yaml_files import first_problem, read_yaml
from lowrank_align.errors import UserError, nearest

HERE = Path(__file__).parent
OWN_FOLDER = "LOWRANK_ALIGN_PRESETS"
CHECKABLE = ("licence", "gated", "architecture", "tokens", "template")


class Tokens(BaseModel):
    """Which tokens end a turn and pad; None where nobody has checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    end_of_turn: str | None = None
    pad: str | None = None


class Preset(BaseModel):
    """One model's preset."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    model: str
    """The hub id (or a folder)."""
    licence: str | None = None
    """As its card states it."""
    gated: bool | None = None
    """Whether the hub asks for an account that has accepted the licence."""
    architecture: Architecture | None = None
    layout: Literal["tree", "flat"] = "tree"
    """flat: layers with a recurrent state, found at load too."""
    tokens: Tokens = Tokens()
    template_hash: str | None = None
    """SHA-256 of the chat template's text that was checked."""
    thinking: bool | None = None
    """What is passed to the template's thinking switch; None where it has none."""
    settings: dict[str, Any] = {}
    """Settings of every command that has them (max_length, target_modules, ...)."""
    methods: dict[str, dict[str, Any]] = {}
    """Settings of one method, which win over the common ones."""
    notes: tuple[str, ...] = ()
    """What to know before using it."""
    unverified: tuple[Literal["licence", "gated", "architecture", "tokens", "template"], ...] = ()
    """What was not checked against the model's own files."""
    name: str = Field(default="", exclude=True)
    file: Path = Field(default=Path(), exclude=True)

    def knobs(self, command: str) -> dict[str, Any]:
        """The settings for one command, by the names of `config`."""
        found: dict[str, Any] = {"model": self.model}
        if self.thinking is not None:
            found["thinking"] = self.thinking
        return found | self.settings | self.methods.get(command, {})


def presets_folder() -> Path:
    """Where the project's preset files are: beside this module in a wheel, two folders up in a checkout."""
    packed = HERE / "presets"
    return packed if packed.is_dir() else HERE.parent / "presets"


def own_folder() -> Path:
    """The user's presets, which win over the project's: `LOWRANK_ALIGN_PRESETS`, or in the platform's place for it."""
    if chosen := os.environ.get(OWN_FOLDER):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        place = os.environ.get("APPDATA") or "~/AppData/Roaming"
    elif sys.platform == "darwin":
        place = "~/Library/Application Support"
    else:
        place = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(place).expanduser() / "lowrank_align" / "presets"


def preset_files() -> dict[str, Path]:
    """Every preset by name."""
    folders = [folder for folder in (presets_folder(), own_folder()) if folder.is_dir()]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def read_preset(name: str) -> Preset:
    """The preset of that name, or in that .yaml file; UserError with the nearest name where there is none."""
    files = preset_files()
    if name in files:
        file = files[name]
    elif Path(name).suffix in (".yaml", ".yml"):
        file = Path(name).expanduser()
    else:
        raise UserError(
            f"preset {name}: there is none of that name{nearest(name, files)}; `lowrank-align presets` lists them"
        )
    content = read_yaml(file)
    try:
        return Preset(**content, name=file.stem, file=file)
    except ValidationError as error:
        place, problem = first_problem(error)
        raise UserError(f"{file}: {place}: {problem}") from None
    except TypeError as error:
        raise UserError(f"{file}: {error}") from None
