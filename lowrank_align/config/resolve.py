"""From flags, a YAML file and a preset to checked settings, and back to the YAML that runs them again."""

import shlex
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lowrank_align.config.commands import COMMANDS
from lowrank_align.config.evaluation import is_address
from lowrank_align.config.knobs import Settings
from lowrank_align.config.online import is_function
from lowrank_align.config.training import ADAPTERS_OWN, TrainSettings
from lowrank_align.config.yaml_files import first_problem, read_yaml
from lowrank_align.errors import UserError, nearest
from lowrank_align.servers import shown_address

OUTSIDE = {"reward", "score", "judge", "rollout_server"}  # a module:function, which is imported, or an address
OF_THE_MOMENT = {"resume", "overwrite", "gpu", "auto", "force"}  # about this start of the run, not about the run

S = TypeVar("S", bound=Settings)


def resolve(settings: type[S], flags: Mapping[str, Any], config_file: str | Path | None = None) -> S:
    """Defaults, under the preset, under the YAML file, under the flags (None = not given).

    One UserError line for the first bad knob.
    """
    given = read_yaml(config_file) if config_file is not None else {}
    method = given.pop("method", None) if "method" not in settings.model_fields else None  # a run's config.yaml has it
    if method is not None and issubclass(settings, TrainSettings) and method != settings.method:
        raise UserError(f"{config_file}: method: is for {method}, not for {settings.method}; take that command")
    where = dict.fromkeys(given, f"{config_file}: ")
    known = settings.model_fields
    for key in flags:
        if key not in known:
            raise UserError(f"{key}: unknown setting{nearest(str(key), known)}")
    for key, value in flags.items():
        if value is not None:
            given[key], where[key] = value, ""
    for key in given:
        if key == "trust_remote_code":
            raise UserError(f"{where[key]}{key}: no file may let code run; give --trust-remote-code yourself")
        if key not in known:
            raise UserError(f"{where[key]}{key}: unknown setting{nearest(str(key), known)}")
    _refuse_outside(given, where)
    _refuse_unusable(given, where)
    if given.get("preset") is not None and "model" in known:
        from lowrank_align.presets import read_preset  # its settings are checked against the commands'

        preset = read_preset(str(given["preset"]))
        for key, value in preset.knobs(_command(settings, given)).items():
            if key in known and key not in given:
                given[key], where[key] = value, f"{preset.file}: "
        _refuse_unusable(given, where)
    try:
        return settings(**given)
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None


def to_yaml(settings: TrainSettings) -> str:
    """The resolved settings, so that `lowrank-align METHOD --config RUN/config.yaml` runs them again."""
    unused = set(ADAPTERS_OWN) if settings.adapter else set()
    values = settings.model_dump(exclude=OF_THE_MOMENT | unused)
    flags = _flags(values, OUTSIDE)  # which no file may set alone
    return f"# lowrank-align {settings.method} --config THIS_FILE{flags}\n" + yaml.safe_dump(
        {"method": settings.method, **values}, sort_keys=False, allow_unicode=True
    )


def _is_outside(text: object) -> bool:
    return isinstance(text, str) and (is_function(text) or is_address(text))


def _flags(values: Mapping[str, Any], names: Set[str]) -> str:
    """As they are given on the command line, where they are code or addresses."""
    found = {key: values[key] if isinstance(values[key], list) else [values[key]] for key in names & values.keys()}
    outside = {key: texts for key, texts in found.items() if any(map(_is_outside, texts))}
    return "".join(f" --{key.replace('_', '-')} {shlex.join(texts)}" for key, texts in sorted(outside.items()))


def _command(settings: type[Settings], given: Mapping[str, Any]) -> str:
    """What a preset files the settings under: a method's name (a plan's too), else the command's."""
    if issubclass(settings, TrainSettings):
        return settings.method
    if "method" in settings.model_fields:
        return str(given.get("method", settings.model_fields["method"].default))
    return next((name for name, kind in COMMANDS.items() if kind is settings), "")


def _refuse_outside(given: Mapping[str, Any], where: Mapping[str, str]) -> None:
    """Code to run and addresses to send rows to are named by the user: a file may come from somebody else."""
    for key in OUTSIDE & given.keys():
        for text in given[key] if isinstance(given[key], list) else [given[key]]:
            if where[key] and _is_outside(text):
                what, said = ("an address", shown_address(text)) if is_address(text) else ("Python code", text)
                flag = f"--{key.replace('_', '-')} {said}"
                raise UserError(f"{where[key]}{key}: {said} is {what}, which no file may name; give {flag} yourself")


def _refuse_unusable(given: Mapping[str, Any], where: Mapping[str, str]) -> None:
    for key, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (problem := _unusable(text)):
                raise UserError(f"{where[key]}{key}: {problem}")


def _unusable(text: str) -> str | None:
    """What keeps a text from being a path, a name or a number; an empty one is mostly an unset shell variable."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 (at character {error.start + 1}); rename the file"
    return None


def _one_line(error: ValidationError, where: Mapping[str, str]) -> str:
    name, problem = first_problem(error)
    if not name:
        return problem
    if error.errors()[0]["type"] == "missing":
        also = ", --preset" if name == "model" else ""
        return f"{name}: missing; give --{name.replace('_', '-')}{also} or a line in the --config file"
    return f"{where.get(name, '')}{name}: {problem}"
