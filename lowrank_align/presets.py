"""Settings that are known to work for a model: one YAML file each, in the top-level `presets/` or the user's folder.

A preset states where the model is, its figures (so that a plan needs neither network nor files), which tokens end a
turn and pad, and the settings in which it differs from the defaults, for all methods or for one. What could not be
checked when it was written is named under `unverified`; of that, `preset_check` compares what a model's files tell
whenever the model is loaded. No torch here.
"""

import os
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from lowrank_align.architecture import Architecture
from lowrank_align.config.commands import COMMANDS
from lowrank_align.config.knobs import Settings, kinds
from lowrank_align.config.methods import METHODS
from lowrank_align.config.yaml_files import first_problem, read_yaml
from lowrank_align.errors import UserError, nearest

HERE = Path(__file__).parent
OWN_FOLDER = "LOWRANK_ALIGN_PRESETS"
LIMIT_BYTES = 100_000
MOST_NAMES = 6  # in one line of an error

# What takes a preset. One may come from other people: it sets numbers and choices, no text that could name a file,
# code (a reward can be a Python function), a device or a tracker that sends figures out, and does not manage the run.
TAKING: dict[str, type[Settings]] = METHODS | {
    name: settings for name, settings in COMMANDS.items() if "preset" in settings.model_fields
}
ALSO_SET = {"gradient_checkpointing", "target_modules", "loss", "loss_weights"}
OF_THE_RUN = {"method", "to", "rows", "seed", "eval_rows", "log_steps", "save_steps", "keep_checkpoints"}
LINES_OF_THEIR_OWN = ("model", "thinking")

Checkable = Literal["licence", "gated", "architecture", "tokens", "template"]


class Tokens(BaseModel):
    """Which tokens end a turn and pad; None where nobody has checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    end_of_turn: str | None = None
    pad: str | None = None


class Preset(BaseModel):
    """One model's preset."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    model: str = Field(min_length=1)
    """The hub id (or a folder)."""
    licence: str | None = None
    """As its card states it."""
    gated: bool | None = None
    """Whether the hub asks for an account that has accepted the licence."""
    architecture: Architecture | None = None
    layout: Literal["tree", "flat"] = "tree"
    """flat: layers with a recurrent state, found at load too."""
    tokens: Tokens = Tokens()
    template_hash: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the chat template's text that was checked."""
    thinking: bool | None = None
    """What the template's thinking switch is set to; None where it has none."""
    settings: dict[str, Any] = {}
    """Settings of every command that has them (max_length, target_modules, ...)."""
    methods: dict[str, dict[str, Any]] = {}
    """Settings of one method or command, which win over the common ones."""
    notes: list[str] = []
    """What to know before using it."""
    unverified: list[Checkable] = []
    """What was not checked against the model's own files."""
    _file: Path = PrivateAttr(default=Path())

    @property
    def name(self) -> str:
        return self._file.stem

    @property
    def file(self) -> Path:
        return self._file

    @property
    def own(self) -> bool:
        """Whether it stands in the user's folder."""
        return self._file.parent == own_folder()

    def knobs(self, command: str) -> dict[str, Any]:
        """The settings for one command, by the names of `config`."""
        found: dict[str, Any] = {"model": self.model}
        if self.thinking is not None:
            found["thinking"] = self.thinking
        return found | self.settings | self.methods.get(command, {})

    @model_validator(mode="after")
    def _settings_exist(self) -> "Preset":
        """Every setting is one of the commands', with a value that they take."""
        known = {key for settings in TAKING.values() for key in settings.model_fields}
        _refuse_unknown("settings", self.settings, known, "no command has this setting")
        for command, values in self.methods.items():
            if command not in TAKING:
                raise ValueError(f"methods.{command}: no such method{nearest(command, TAKING)}")
            _refuse_unknown(
                f"methods.{command}", values, TAKING[command].model_fields, f"{command} has no such setting"
            )
        for command, settings in TAKING.items():
            _try_out(command, settings, self.settings, self.methods.get(command, {}))
        return self


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
    """Every preset by name, in the order of the names; the user's own win."""
    found = project_files()
    if (own := own_folder()).is_dir():
        found |= {file.stem: file for pattern in ("*.yml", "*.yaml") for file in own.glob(pattern)}
    return dict(sorted(found.items()))


def project_files() -> dict[str, Path]:
    """The project's own presets by name."""
    return {file.stem: file for file in sorted(presets_folder().glob("*.yaml"))}


def read_preset(name: str) -> Preset:
    """The preset of that name, or in that .yaml file; UserError with the nearest name where there is none."""
    files = preset_files()
    if name in files:
        return read_preset_file(files[name])
    if Path(name).suffix in (".yaml", ".yml"):
        return read_preset_file(Path(name).expanduser())
    known = name.rsplit("/", 1)[-1].lower()  # a hub id is an honest mistake
    close = nearest(known, files) if known not in files else f" (did you mean {known}?)"
    close = close or _alike(known, files)
    raise UserError(f"preset {name}: there is none of that name{close}; `lowrank-align presets` lists them")


def _alike(known: str, files: Iterable[str]) -> str:
    """`llama` is near no name, but a part of some."""
    found = sorted((name for name in files if known in name), key=lambda name: not name.startswith(known))
    return f" (there are {', '.join(found[:MOST_NAMES])})" if found else ""


def read_preset_file(file: Path) -> Preset:
    """The preset in a file. UserError, naming file and key, where it is none."""
    if file.is_file() and file.stat().st_size > LIMIT_BYTES:
        raise UserError(f"{file}: over {LIMIT_BYTES // 1000} kB; a preset is a page")
    content = read_yaml(file)
    if not content:
        raise UserError(f"{file}: empty; a preset names at least a model")
    if problem := _control(content):
        raise UserError(f"{file}: {problem}")
    try:
        preset = Preset.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{file}: {_problem(error)}") from None
    preset._file = file
    return preset


def header(file: Path) -> list[str]:
    """The comment that a preset begins with: what it is, and the commands that run it."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def _refuse_unknown(place: str, values: dict[str, Any], known: Any, problem: str) -> None:
    for key in values:
        if key in LINES_OF_THEIR_OWN:
            raise ValueError(f"{place}.{key}: belongs on a line of its own, `{key}: ...`")
        if key not in known:
            raise ValueError(f"{place}.{key}: {problem}{nearest(key, known)}")
        if not _may_set(key):
            raise ValueError(f"{place}.{key}: is said on the command line, not in a preset")


def _may_set(key: str) -> bool:
    """Whether it is a number or one of a few choices wherever it is a setting, and about the model, not the run."""
    if key in OF_THE_RUN or key in ALSO_SET:
        return key in ALSO_SET
    fields = [settings.model_fields[key] for settings in TAKING.values() if key in settings.model_fields]
    return all(
        kind in (int, float) or get_origin(kind) is Literal for info in fields for kind in kinds(info.annotation)
    )


def _control(value: Any, place: str = "") -> str | None:
    """Where a text has a character that a terminal would obey, with its number; notes may have several lines."""
    if isinstance(value, dict):
        parts = [(key, "") for key in value] + [(item, f"{place}.{key}".lstrip(".")) for key, item in value.items()]
    elif isinstance(value, list):
        parts = [(item, f"{place}.{index}") for index, item in enumerate(value)]
    else:
        allowed = "\n\t" if place.startswith("notes.") else ""
        text = value if isinstance(value, str) else ""
        bad = next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in allowed), None)
        return f"{place or 'a key'}: has a control character (U+{ord(bad):04X})" if bad else None
    return next((found for item, at in parts if (found := _control(item, at))), None)


def _try_out(command: str, settings: type[Settings], common: dict[str, Any], own: dict[str, Any]) -> None:
    """The values as the command will get them, beside the required ones that a user gives (a file, a folder)."""
    fields = settings.model_fields
    values = {key: value for key, value in (common | own).items() if key in fields}
    required = {key: "-" for key, info in fields.items() if info.is_required()}
    try:
        settings(**required | values)
    except ValidationError as error:
        key, problem = first_problem(error)
        if not key and _lacks_more(settings, required):
            return
        key = key.split(".")[0]
        place = f"settings.{key}: for {command}" if key in common and key not in own else f"methods.{command}"
        raise ValueError(f"{place}{f'.{key}' if key and key not in place else ''}: {problem}") from None


def _lacks_more(settings: type[Settings], required: dict[str, Any]) -> bool:
    """Whether the command also asks for one of several settings, which its user gives and no preset does."""
    try:
        settings(**required)
    except ValidationError:
        return True
    return False


def _problem(error: ValidationError) -> str:
    """The first thing that is wrong, with its place; pydantic's words for an unknown key lack the nearest known one."""
    first = error.errors()[0]
    place, problem = first_problem(error)
    if first["type"] == "extra_forbidden":
        *above, key = (str(part) for part in first["loc"])
        kinds: dict[str, type[BaseModel]] = {"": Preset, "architecture": Architecture, "tokens": Tokens}
        kind = kinds.get(".".join(above))
        problem = "no such key" + (nearest(key, kind.model_fields) if kind else "")
    return f"{place}: {problem}" if place else problem
