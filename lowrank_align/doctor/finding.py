"""What a check of the doctor gives back, and what all checks need."""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `problem`: training as it is by default cannot run."""

    topic: str
    level: Level
    found: str
    advice: str = ""


def can_train(findings: Sequence[Finding]) -> bool:
    """Whether training with the defaults can run here."""
    return all(finding.level != "problem" for finding in findings)


def imports(name: str) -> bool:
    """Whether a package can be imported."""
    return import_error(name) is None


def import_error(name: str) -> str | None:
    """Why a package cannot be imported; None where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a library that is not whole raises anything
        return first_line(error)
    return None


def first_line(error: object) -> str:
    """An error in one line."""
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return (text or type(error).__name__)[:200]
