"""Adapters to export, made without training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def adapter_on(tmp_path: Path, load_base: Callable[..., Any], speak: Callable[..., None]) -> Callable[..., Any]:
    """`adapter_on(family, **changes)`: (base, its role "policy" with random weights, the adapter's folder)."""

    def make(family: str, *, head: bool = False, role: dict[str, Any] | None = None, **changes: Any) -> Any:
        base = load_base(family, **changes)
        base.add_role("policy", rank=4, head=head, **(role or {}))
        speak(base, "policy")
        base.save_role("policy", tmp_path / "adapter", as_reward=head)
        return base, tmp_path / "adapter"

    return make
