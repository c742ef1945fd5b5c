"""The cache with room: the same keys and values as transformers' own, written into one piece of memory."""

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowrank_align.cache import RoomyLayer, cache_for


def states(tokens: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, tokens, 4), torch.randn(batch, 3, tokens, 4)


def test_it_holds_what_transformers_own_holds() -> None:
    """A prompt of 5, tokens one by one beyond the room of 8, and copies of each row on the way."""
    ours, theirs = RoomyLayer(8), DynamicLayer()
    for step, tokens in enumerate((5, 1, 1, 1, 1, 3)):
        if step == 2:
            ours.batch_repeat_interleave(2)
            theirs.batch_repeat_interleave(2)
        new = states(tokens, batch=2 if step < 2 else 4)
        for found, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    ours.batch_select_indices(torch.tensor([2, 0]))
    theirs.batch_select_indices(torch.tensor([2, 0]))
    new = states(1)
    assert all(torch.equal(a, b) for a, b in zip(ours.update(*new), theirs.update(*new), strict=True))


def test_a_token_is_written_where_there_is_room_and_nothing_moves() -> None:
    layer = RoomyLayer(8)
    layer.update(*states(5))
    place = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(3):
        layer.update(*states(1))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == place
    layer.update(*states(1))
    assert layer.keys.data_ptr() != place[0] and layer.capacity == 18  # twice the nine it has come to


def test_forgotten_and_filled_again() -> None:
    layer = RoomyLayer(4)
    layer.update(*states(3))
    layer.reset()
    new = states(2)
    assert torch.equal(layer.update(*new)[0], new[0]) and layer.get_seq_length() == 2


def test_layers_with_a_window_stay_transformers_own() -> None:
    config = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    made = cache_for(type("Model", (), {"config": config}), 9)
    assert isinstance(made, DynamicCache)
    assert [type(layer) for layer in made.layers] == [RoomyLayer, DynamicSlidingWindowLayer]
    assert made.layers[0].capacity == 9
