"""Keys and values of a text that is still being written, in one piece with room for its end.

transformers' own cache makes all keys and values anew for every token (`torch.cat`), which on a CPU took a third of
the time of an answer, and on any device holds a layer twice for a moment.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (N, heads, T, D), where T grows to `capacity` without a copy; beyond, it doubles."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._room: tuple[Tensor, Tensor] | None = None  # (N, heads, capacity, D) that `keys` and `values` begin

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        room = self._room_for(after, key_states, value_states)
        for whole, new in zip(room, (key_states, value_states), strict=True):
            whole[:, :, before:after] = new
        self.keys, self.values = (whole[:, :, :after] for whole in room)
        return self.keys, self.values

    def _room_for(self, tokens: int, *like: Tensor) -> tuple[Tensor, Tensor]:
        """The room there is, or a new one where it is too short or the batch has changed since."""
        before, kept = self.get_seq_length(), self._room
        if kept is not None and tokens <= kept[0].shape[-2] and self.keys.data_ptr() == kept[0].data_ptr():
            return kept
        self.capacity = max(self.capacity, tokens if kept is None else 2 * tokens)
        keys, values = (new.new_empty(*new.shape[:2], self.capacity, new.shape[-1]) for new in like)
        if before:
            keys[:, :, :before], values[:, :, :before] = self.keys, self.values
        self._room = keys, values
        return self._room

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = None


def cache_for(model: Any, capacity: int) -> DynamicCache:
    """The model's own kind of cache, with room for `capacity` tokens in the layers that keep all of them."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
