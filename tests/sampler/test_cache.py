"""The preallocated cache holds what transformers' own holds, without copying it at every token."""

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from ssd_core.checks import UsageError
from ssd_core.sampler.cache import PreallocatedLayer, new_cache


def tokens(rows, count, generator):
    """Keys and values (B, H, T, head_dim); their head sizes differ, as in some models."""
    return tuple(torch.randn(rows, 2, count, width, generator=generator) for width in (4, 6))


def test_it_equals_the_dynamic_layer_over_updates_and_selections(poisoned):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = PreallocatedLayer(room=3), DynamicLayer()     # more tokens come than were announced
    rows = 5
    script = [7, 1, 1, [3, 3, 0, 1, 2, 4, 4], 1, [0, 6, 2], 1, 4, [2, 1, 0], 1, [1], 60, 1, [0], 1, [0, 0], 1]
    for step in script:
        if isinstance(step, list):
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor(step))
            rows = len(step)
        else:
            new = tokens(rows, step, generator)
            returned = ours.update(*new), theirs.update(*new)
            for mine, other in zip(*returned, strict=True):
                assert torch.equal(mine, other)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_every_selection_of_rows_equals_indexing():
    """Also those that move rows onto rows that still have to be moved."""
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        rows = int(torch.randint(1, 6, (), generator=generator))
        chosen = torch.randint(0, rows, (int(torch.randint(1, 7, (), generator=generator)),), generator=generator)
        if case % 2:
            chosen = torch.randperm(rows, generator=generator)[: len(chosen)]
        layer = PreallocatedLayer(room=4)
        keys, values = tokens(rows, 3, generator)
        layer.update(keys, values)
        layer.batch_select_indices(chosen)
        assert torch.equal(layer.keys, keys[chosen]) and torch.equal(layer.values, values[chosen])


def test_a_token_is_written_in_place():
    """No new memory and no copy of what is there while the announced tokens come, and few copies beyond."""
    generator = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer(room=100)
    layer.update(*tokens(3, 50, generator))
    places = set()
    for _ in range(100):
        layer.update(*tokens(3, 1, generator))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1
    assert layer.keys.untyped_storage().nbytes() == 3 * 2 * 150 * 4 * 4     # and no more than was announced


def test_a_large_announcement_is_not_allocated_at_once():
    generator = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer(room=1_000_000)
    places = set()
    for _ in range(2000):
        layer.update(*tokens(1, 1, generator))
        places.add(layer.keys.data_ptr())
        assert layer._buffers[0].shape[-2] <= 2 * layer.get_seq_length() + 64
    assert len(places) < 10


def test_rows_that_stay_are_not_copied_when_the_batch_shrinks():
    generator = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer(room=5)
    layer.update(*tokens(4, 3, generator))
    place, kept = layer.keys.data_ptr(), layer.keys.clone()
    layer.batch_select_indices(torch.tensor([0, 3, 2]))
    assert layer.keys.data_ptr() == place
    assert torch.equal(layer.keys, kept[[0, 3, 2]])


def test_sliding_window_layers_stay_those_of_transformers():
    config = transformers.Gemma2Config(num_hidden_layers=4, sliding_window=16)
    kinds = [type(layer).__name__ for layer in new_cache(config, 8).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "PreallocatedLayer"] * 2
    assert {type(layer) for layer in new_cache(transformers.LlamaConfig(), 8).layers} == {PreallocatedLayer}


def test_a_layer_that_was_never_written_can_be_selected_from():
    """Layers that share another layer's keys and values stay empty."""
    cache = new_cache(transformers.LlamaConfig(num_hidden_layers=2), 8)
    cache.update(*tokens(3, 2, torch.Generator()), 0)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].keys.shape[0] == 1 and cache.layers[1].get_seq_length() == 0


def test_recurrent_models_are_refused():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(UsageError, match=r"model: expected attention layers .* got Qwen3NextConfig .*linear_attention"):
        new_cache(config, 8)


def test_no_more_is_allocated_than_the_room_asked_for():
    layer = PreallocatedLayer(room=512)
    for length in [100, *[1] * 512]:
        layer.update(*(torch.zeros(1, 1, length, 2) for _ in range(2)))
    assert layer.get_seq_length() == 612 and layer._buffers[0].shape[-2] == 612
