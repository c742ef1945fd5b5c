"""Figures and messages as the page says them."""

import re

from lowrank_align.config import COMMANDS, METHODS

_FLAG = re.compile(r"--([a-z][a-z-]+)")
_NAMES = {name for kind in (*METHODS.values(), *COMMANDS.values()) for name in kind.model_fields}


def duration(seconds: float) -> str:
    """`20 seconds`, `4 minutes`, `1 h 20 min`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} second{'s' * (whole > 1)}"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"{minutes} minute{'s' * (minutes > 1)}"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def flags_as_settings(text: str) -> str:
    """A message that names the command line's flags, with the settings' names in their place: `max_length`."""

    def name(match: re.Match[str]) -> str:
        setting = match[1].replace("-", "_")
        return setting if setting in _NAMES else match[0]

    return _FLAG.sub(name, text)


def sentence(text: str) -> str:
    """A full stop at the end, and a capital at the beginning unless that is a setting's or a file's name."""
    text = text.strip()
    first = text.split(" ", 1)[0]
    begun = text if "_" in first or first.endswith(":") else text[:1].upper() + text[1:]
    return begun if not text or text[-1] in ".!?:" else f"{begun}."
