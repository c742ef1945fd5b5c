"""The reward that GRPO climbs on both sides: how often an answer says e."""

from typing import Any


def letters(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [float(answer.count("e")) for answer in completions]
