"""One file a method, each with the same sections: data, roles, step. `register` adds one from outside."""

from importlib import import_module
from typing import Any

from lowrank_align.config import METHODS, TrainSettings
from lowrank_align.methods.method import Method

_CLASSES: dict[str, str | type[Method[Any, Any]]] = {
    "sft": "SFT",
    "reward": "Reward",
    "dpo": "DPO",
    "kto": "KTO",
    "condition": "Condition",
    "coh": "CoH",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "online-dpo": "OnlineDPO",
    "expert": "Expert",
    "quark": "Quark",
}


def method_class(name: str) -> type[Method[Any, Any]]:
    """The method of that name; its module (`online_dpo` for online-dpo) is imported only now."""
    known = _CLASSES[name]
    if not isinstance(known, str):
        return known
    found: type[Method[Any, Any]] = getattr(import_module(f"lowrank_align.methods.{name.replace('-', '_')}"), known)
    return found


def register(settings: type[TrainSettings], method: type[Method[Any, Any]]) -> None:
    """Add a method from outside: from then on `train` and the command line know it (docs/adding-a-method.md).

    Raises ValueError where its name is taken by another.
    """
    name = settings.method
    if name in METHODS and METHODS[name] is not settings:
        raise ValueError(f"method {name!r}: the name is taken")
    METHODS[name], _CLASSES[name] = settings, method
