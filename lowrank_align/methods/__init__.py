"""One file a method, each with the same sections: data, roles, step."""

from importlib import import_module

from lowrank_align.methods.method import Method

_CLASSES = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "ppo": "PPO"}


def method_class(name: str) -> type[Method]:
    """The method of that name; its module is imported only now."""
    found: type[Method] = getattr(import_module(f"lowrank_align.methods.{name}"), _CLASSES[name])
    return found
