"""A KV cache that is written in place and reads only the live length."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ssd_core.checks import UsageError

RECURRENT = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}     # layer types of transformers


class PreallocatedLayer(DynamicLayer):
    """transformers' DynamicLayer without its copy of all keys and values at every token.

    ``keys`` and ``values`` (B, H, T, head_dim) are views of buffers with room for more tokens. Only ``update`` and
    ``batch_select_indices`` may change them.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room            # tokens after the first update, at most
        self._length = 0
        self._buffers = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self._length + key_states.shape[-2]
        if self._buffers is None or length > self._buffers[0].shape[-2]:
            self._grow(key_states, value_states, length)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : length] = new
        self._length = length
        self._expose()
        return self.keys, self.values

    def _grow(self, key_states, value_states, length):
        """Room for all tokens to come, but at most about twice what is needed now."""
        if self._buffers is None:
            self._most = length + self.room
        capacity = max(length, min(self._most, 2 * length + 64))
        old, self._buffers = self._buffers, []
        for i, new in enumerate((key_states, value_states)):
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[-1])
            if old is not None:
                buffer[:, :, : self._length] = old[i][:, :, : self._length]
            self._buffers.append(buffer)

    def _expose(self):
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order. Rows that stay in place are not copied when the batch only shrinks."""
        if self._buffers is None:       # a layer that shares another one's keys
            return
        rows = indices.tolist()
        moves = [(new, old) for new, old in enumerate(rows) if new != old]
        shrinks = len(rows) <= self.keys.shape[0] and all(old >= len(rows) for _, old in moves)
        for i, buffer in enumerate(self._buffers):
            if shrinks:
                for new, old in moves:
                    buffer[new, :, : self._length] = buffer[old, :, : self._length]
                self._buffers[i] = buffer[: len(rows)]
            else:
                self._buffers[i] = buffer[indices]
        self._expose()


def new_cache(config, room: int) -> DynamicCache:
    """transformers' cache for this model, its full-attention layers preallocated; ``room``: tokens after the prompt."""
    cache = DynamicCache(config=config)
    other = RECURRENT & set(getattr(config.get_text_config(), "layer_types", None) or ())
    if other or not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):
        raise UsageError(
            f"model: expected attention layers that keep keys and values, got {type(config).__name__} with a recurrent "
            f"state ({', '.join(sorted(other)) or 'some layers'}), which the sampler cannot handle")
    cache.layers = [PreallocatedLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
