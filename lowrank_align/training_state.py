"""What a training run needs to go on bitwise, flat enough for safetensors and JSON, and back exactly.

Nothing is pickled. torch is imported where it is needed, as in `checkpoint`, which writes this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorRef:
    """Stands in a nested value for the tensor of that name in `State.tensors`."""

    name: str


@dataclass(eq=False)
class State:
    """What a training run needs to go on bitwise.

    `tensors`: flat names to tensors of any shape and dtype (adapters, heads, optimiser moments, RNG states as uint8).
    `values`: None, bool, int, float, str, and lists, tuples, dicts and `TensorRef`s of them; all come back exactly,
    tuples as tuples, integer keys as integers, infinities as infinities.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def update(self, other: State) -> None:
        """Take over everything of `other`; a name that is already here is a ValueError."""
        taken = (self.tensors.keys() & other.tensors.keys()) | (self.values.keys() & other.values.keys())
        if taken:
            raise ValueError(f"state holds these names already: {sorted(taken)}")
        self.tensors.update(other.tensors)
        self.values.update(other.values)


def flatten(prefix: str, nested: Any) -> State:
    """A nested structure, such as an optimiser's `state_dict()`, as a State: tensors named `prefix/key/...`, the rest
    under `values[prefix]`. Tensors are detached, not copied. `unflatten` is its exact inverse."""
    import torch

    state = State()

    def walk(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            while name in state.tensors:  # the keys 0 and "0" side by side
                name += "'"
            state.tensors[name] = value.detach()
            return TensorRef(name)
        if isinstance(value, dict):
            return {key: walk(f"{name}/{key}", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [walk(f"{name}/{place}", item) for place, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        return value

    state.values[prefix] = walk(prefix, nested)
    return state


def unflatten(prefix: str, state: State) -> Any:
    """The structure that `flatten(prefix, ...)` took apart."""

    def walk(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return state.tensors[value.name]
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(walk(item) for item in value)
        return value

    return walk(state.values[prefix])


def encode(value: Any) -> Any:
    """JSON for what JSON has no word for, as an object with one key that starts with `!`."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"!float": repr(float(value))}
    if isinstance(value, TensorRef):
        return {"!tensor": value.name}
    if isinstance(value, tuple):
        return {"!tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        looks_tagged = len(value) == 1 and str(next(iter(value))).startswith("!")
        if looks_tagged or not all(isinstance(key, str) for key in value):
            return {"!dict": [[encode(key), encode(item)] for key, item in value.items()]}
        return {key: encode(item) for key, item in value.items()}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r:.80}")


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("!float", text)]:
            return float(text)
        case [("!tensor", name)]:
            return TensorRef(name)
        case [("!tuple", items)]:
            return tuple(decode(item) for item in items)
        case [("!dict", pairs)]:
            return {decode(key): decode(item) for key, item in pairs}
    return {key: decode(item) for key, item in value.items()}
