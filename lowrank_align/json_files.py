"""JSON files that other people may have written: a cap on their size, and no surprise when they are nested deep."""

import json
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64_000_000  # the largest that we read is the index of a sharded model: a few megabytes


def read_json(file: Path, limit_bytes: int = LIMIT_BYTES) -> Any:
    """What the file holds. FileNotFoundError, another OSError, or ValueError, which says what is wrong with it."""
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError("no regular file")
    if size > limit_bytes:
        raise ValueError(f"over {limit_bytes // 1_000_000} MB")
    try:
        return json.loads(file.read_bytes())
    except RecursionError:
        raise ValueError("nested too deep") from None
