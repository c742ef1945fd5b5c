"""From flags, a YAML file and a preset to checked settings, and back to the YAML that runs them again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from lowrank_align.config.knobs import Settings
from lowrank_align.config.training import ADAPTERS_OWN, TrainSettings
from lowrank_align.errors import UserError, nearest

YAML_LIMIT_BYTES = 1_000_000

S = TypeVar("S", bound=Settings)


def resolve(settings: type[S], flags: Mapping[str, Any], config_file: str | Path | None = None) -> S:
    """Defaults, under the YAML file, under the flags (None = not given). One UserError line for the first bad knob."""
    given = read_yaml(config_file) if config_file is not None else {}
    where = dict.fromkeys(given, f"{config_file}: ")
    for key, value in flags.items():
        if value is not None:
            given[key], where[key] = value, ""
    known = settings.model_fields
    for key in given:
        if key not in known:
            raise UserError(f"{where[key]}{key}: unknown setting{nearest(str(key), known)}")
        for text in given[key] if isinstance(given[key], list) else [given[key]]:
            if isinstance(text, str) and (problem := _unusable(text)):
                raise UserError(f"{where[key]}{key}: {problem}")
    try:
        return settings(**given)
    except ValidationError as error:
        raise UserError(_one_line(error, where)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A flat mapping of settings from a YAML file (safe loading, size-capped)."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such configuration file")
    if file.stat().st_size > YAML_LIMIT_BYTES:
        raise UserError(f"{path}: over {YAML_LIMIT_BYTES // 1_000_000} MB; a configuration is a few lines")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: nested too deep; needs lines of `setting: value`") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML (not UTF-8)") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 99th of May, a number of 5000 digits
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({_reason(error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: needs lines of `setting: value`")
    content.pop("method", None)  # a run's config.yaml names its method; the command has it already
    return content


def to_yaml(settings: TrainSettings) -> str:
    """The resolved settings, so that `lowrank-align METHOD --config RUN/config.yaml` runs them again."""
    unused = set(ADAPTERS_OWN) if settings.adapter else set()
    values = settings.model_dump(exclude={"resume", "overwrite"} | unused)
    return f"# lowrank-align {settings.method} --config THIS_FILE\n" + yaml.safe_dump(
        {"method": settings.method, **values}, sort_keys=False, allow_unicode=True
    )


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


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())[:200]


def _one_line(error: ValidationError, where: Mapping[str, str]) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{name}: missing; give --{name.replace('_', '-')} or a line in the --config file"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where.get(name, '')}{name}: {message} (got {first['input']!r})"
