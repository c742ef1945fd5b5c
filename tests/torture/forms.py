"""Short forms for `make test`, long ones for `make torture`."""

import os
from collections.abc import Sequence
from typing import Any

LONG = "LOWRANK_TORTURE" in os.environ


def times(short: int, long: int) -> int:
    """How many faults to make."""
    return long if LONG else short


def of(cases: Sequence[Any] | dict[str, Any], *few: Any) -> list[Any]:
    """All of the cases, or a few of them."""
    return list(cases if LONG else few)
