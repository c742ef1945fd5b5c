"""A plan in words, and sizes of memory to and from them."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lowrank_align.errors import UserError, nearest
from lowrank_align.plan.fitting import Plan
from lowrank_align.plan.prediction import GIB

SHOWN_FROM = 0.03  # of the peak: smaller parts are left out of the line
UNITS = {"gib": 2**30, "gb": 10**9, "g": 2**30, "mib": 2**20, "mb": 10**6, "m": 2**20, "b": 1}


def size_bytes(text: str) -> int:
    """The bytes in a text like 12GiB, 12GB, 12 or 900MiB (a plain number is GiB)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2] if match else "").lower() or "gib"
    if match is None or unit not in UNITS:
        raise UserError(f"gpu: {text!r} is no size of memory{nearest(unit, UNITS) if match else ''}; give it as 12GiB")
    if not (size := int(float(match[1]) * UNITS[unit])):
        raise UserError(f"gpu: {text!r} is no memory at all; give what the card has, as 12GiB")
    return size


def gib(size: int) -> str:
    """Bytes as `11.2 GiB`, or `480 MiB` below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def parameters_in_words(count: int) -> str:
    """A number of parameters as people say it: 8.2 B, 134 M."""
    return (
        f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.2f} M"
    )


def in_one_line(plan: Plan) -> str:
    """`plan: needs 9.1 GiB, 11.5 GiB there (training on gpu: weights 3.3 GiB, ...)`: what matters of it."""
    parts = asdict(plan.prediction.phases[plan.prediction.peak])
    total = plan.prediction.total_bytes
    largest = sorted((name for name in parts if parts[name] >= SHOWN_FROM * total), key=lambda name: -parts[name])
    shown = ", ".join(f"{name.replace('_', ' ')} {gib(parts[name])}" for name in largest)
    rough = "; rough for a family with experts or recurrent layers" if plan.rough else ""
    where = f"{plan.prediction.peak} on {plan.asked.device}: {shown}{rough}"
    return f"plan: needs {gib(total)}, {gib(plan.budget_bytes)} there ({where})"


def as_flags(changes: Mapping[str, Any]) -> str:
    """Settings as the command line has them."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)
