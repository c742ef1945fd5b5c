"""The layers below every adapter, computed once for all roles.

Where adapters sit on the top layers alone (`--lora-layers`), what a batch is below them is the same under every role:
the first role's pass leaves it here, and the others begin where the adapters begin. DPO then takes
(2 (L - k) + 8 k) / L instead of 8 FLOPs a weight and token with k of L layers adapted, and keeps no activations below.
"""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_align.roles import Role
from lowrank_align.trees import TreeBatch

LAYER = re.compile(r"\.(\d+)\.")


class Trunk:
    """What the lower `depth` layers of a decoder make of the newest batch; at depth 0 it does nothing."""

    def __init__(self, backbone: Any, num_hidden_layers: int) -> None:
        self.depth = 0
        self.layers = next(
            (m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == num_hidden_layers), None
        )
        self._batch: weakref.ref[TreeBatch] | None = None
        self._found: tuple[Tensor, bool] | None = None  # what enters layer `depth`; whether layers answer with tuples

    def settle(self, roles: list[Role]) -> None:
        """Take the depth that the trained roles leave free."""
        adapted = [first_layer(role) for role in roles if role.trainable and role.adapter is not None]
        self.depth = min(adapted, default=0) if self.layers is not None else 0
        self._forget()

    def serves(self, role: Role) -> bool:
        """Whether the role's own layers all lie above."""
        return self.depth > 0 and (role.adapter is None or first_layer(role) >= self.depth)

    def run(self, batch: TreeBatch, forward: Callable[[], Tensor]) -> Tensor:
        """`forward()` of the whole decoder, its lower layers from the last time where that was the same batch."""
        if self._batch is not None and self._batch() is batch and self._found is not None:
            with self._passed_over(*self._found):
                return forward()
        with self._kept():
            hidden = forward()
        # The batch's end is the trunk's: rows of the next one begin anew.
        self._batch = weakref.ref(batch, lambda gone: self._forget() if gone is self._batch else None)
        return hidden

    def _forget(self) -> None:
        self._batch = self._found = None

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep what enters the first layer above."""
        assert self.layers is not None
        layer, below = self.layers[self.depth], self.layers[self.depth - 1]
        tuples: list[bool] = []

        def keep(_layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            states: Tensor = arguments[0] if arguments else named["hidden_states"]
            self._found = states.detach(), tuples[0]

        handles = [
            below.register_forward_hook(lambda _layer, _inputs, output: tuples.append(isinstance(output, tuple))),
            layer.register_forward_pre_hook(keep, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _passed_over(self, states: Tensor, tuples: bool) -> Iterator[None]:
        """Let the lower layers answer with what is known, whatever they are given."""
        assert self.layers is not None
        lower = self.layers[: self.depth]
        for layer in lower:
            layer.forward = lambda *_arguments, **_named: (states,) if tuples else states
        try:
            yield
        finally:
            for layer in lower:
                del layer.forward


def first_layer(role: Role) -> int:
    """The lowest decoder layer that the role's adapter sits on; 0 where its weights' names do not say."""
    places = [LAYER.search(name) for name in role.parameters if ".lora_" in name]
    return min((int(place[1]) if place else 0 for place in places), default=0)


def top_layers(count: int, of: int) -> list[int]:
    """The places of the top `count` layers, as PEFT's `layers_to_transform` takes them."""
    return list(range(of - count, of))
