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
CARDS_GIB = (6, 8, 12, 16, 24, 48)  # what gaming and workstation cards have

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # an 8-bit scale per 64 weights, an fp32 one per 256 scales
QUANTISED_BYTES = {"nf4": NF4_BYTES, "int8": 1.0}
LORA_BYTES = 4  # adapters are fp32 whatever the base computes in
ADAMW_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0 + 8 / 256,
    "paged_adamw_8bit": 0.0,
}  # paged ones go to the host


def size_bytes(text: str) -> int:
    """The bytes in a text like 12GiB, 12GB, 12 or 900MiB (a plain number is GiB)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2] if match else "").lower() or "gib"
    if match is None or unit not in UNITS or float(match[1]) == 0:
        raise UserError(f"gpu: {text!r} is no size of memory{nearest(unit, UNITS)}; give it as 12GiB")
    return int(float(match[1]) * UNITS[unit])


def gib(size: int) -> str:
    """Bytes as `11.2 GiB`, or `480 MiB` below one."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def parameters_in_words(count: int) -> str:
    """A number of parameters as people say it: 8.2 B, 134 M."""
    return (
        f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.2f} M"
    )


def in_one_line(plan: Plan) -> str:
    """`plan: 9.1 GiB of 11.5 GiB at the peak (training: weights 3.3 GiB, ...)`: the parts that matter, in order."""
    parts = asdict(plan.prediction.phases[plan.prediction.peak])
    total = plan.prediction.total_bytes
    largest = sorted((name for name in parts if parts[name] >= SHOWN_FROM * total), key=lambda name: -parts[name])
    shown = ", ".join(f"{name.replace('_', ' ')} {gib(parts[name])}" for name in largest)
    return f"plan: {gib(total)} of {gib(plan.budget_bytes)} at the peak ({plan.prediction.peak}: {shown})"


def as_flags(changes: Mapping[str, Any]) -> str:
    """Settings as the command line has them."""
    words = []
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join(words)
