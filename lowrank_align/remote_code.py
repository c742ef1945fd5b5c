"""The Python files in a model's folder: they run only where somebody said so for this one start.

`--trust-remote-code` is a flag and no setting, so that no `--config` file, preset or run can give it.
"""

import json
import logging
from pathlib import Path

from lowrank_align.errors import UserError
from lowrank_align.json_files import read_json

NEEDED = (
    "it needs the Python code in its folder: read that first, then let it run with --trust-remote-code"
    " (which export, rounds, frontier and demo do not have)"
)
log = logging.getLogger(__name__)
_trusted: set[Path] = set()


def trust(model: str | Path | None) -> None:
    """Let the code in a model's folder run in this process, and say so.

    UserError where there is none, or where the folder's settings name the code of another repository.
    """
    if model is None:
        raise UserError("--trust-remote-code: whose code? give --model too")
    folder = Path(model).expanduser()
    flag = f"--trust-remote-code: {folder}"
    if not any(folder.glob("*.py")):
        raise UserError(
            f"{flag}: no folder with Python files; name one (none is fetched for a hub id), or leave the flag out"
        )
    for file in sorted(folder.glob("*config.json")):
        try:
            asked = read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from None
        if isinstance(asked, dict) and "--" in json.dumps(asked.get("auto_map")):
            raise UserError(f"{flag}: {file.name} names code of another repository; copy that into the folder")
    log.warning("%s: its Python code runs, with all that you may do on this machine", flag)
    _trusted.add(folder.resolve())


def is_trusted(folder: str | Path) -> bool:
    """Whether `trust` was called for it."""
    return Path(folder).resolve() in _trusted


def asks_for_code(error: BaseException) -> bool:
    """Whether transformers refused a model because its code may not run."""
    return "trust_remote_code" in str(error)
