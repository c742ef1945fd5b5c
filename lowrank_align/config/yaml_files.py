"""YAML files that a user may have written: safe loading, with a cap on their size and one line for what is wrong."""

import re
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml
from pydantic import ValidationError

from lowrank_align.errors import UserError, nearest

YAML_LIMIT_BYTES = 1_000_000

_short = Repr()  # a few aliases in a file can stand for billions of items
_short.maxlevel = _short.maxdict = _short.maxlist = 3
_short.maxstring = _short.maxother = 80


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping of settings from a YAML file. UserError where it cannot be read or holds anything else."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: {_no_file(file)}")
    if file.stat().st_size > YAML_LIMIT_BYTES:
        raise UserError(f"{path}: over {YAML_LIMIT_BYTES // 1_000_000} MB; a configuration is a few lines")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML (not UTF-8)") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: str | Path) -> dict[str, Any]:
    """A mapping of settings from YAML's text, which stands in `path`."""
    try:
        content = yaml.load(text, Loader=_Plain)
    except RecursionError:
        raise UserError(f"{path}: nested too deep; needs lines of `setting: value`") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 99th of May, a number of 5000 digits
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({_reason(error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: needs lines of `setting: value`")
    return content


class _Plain(yaml.SafeLoader):
    """Without aliases: no setting needs one, and a page of them can stand for more than the memory holds.

    And without keys that stand there twice, of which YAML would take the last in silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not taken", problem_mark=mark)
        return super().compose_node(parent, index)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first thing is that pydantic refuses (`methods.sft`), and what is wrong with it."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, str))  # which of a list's items: see got
    got = "" if first["type"] in ("missing", "value_error") or not place else f" (got {_short.repr(first['input'])})"
    close = ""
    if first["type"] == "literal_error" and isinstance(first["input"], str):
        close = nearest(first["input"].lower(), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    return place, message[:1].lower() + message[1:] + got + close


def _no_file(file: Path) -> str:
    if file.is_dir():
        return "is a folder, not a configuration file"
    if file.is_symlink() and not file.exists():
        return f"is a link to {file.readlink()}, which is not there"
    return "is no regular file" if file.exists() else "no such configuration file"


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or " ".join(str(error).split())[:200]
