"""Sparse targets as the kernels want them."""

from __future__ import annotations

import torch

from .logits import NO_ID


def merged(ids, probs):
    """Each id of a row once, ascending, with the sum of its weights: ids (R, K) int64 and weights (R, K) float32. What
    has no weight comes last, as NO_ID."""
    w = probs.float()
    if ids.shape[1] == 0:
        return ids.new_full((len(ids), 1), NO_ID.value, dtype=torch.int64), w.new_zeros(len(ids), 1)
    key, order = ids.long().masked_fill(w <= 0, NO_ID.value).sort(-1)
    w = w.clamp_min(0).gather(-1, order)
    place = torch.zeros_like(key)
    place[:, 1:] = (key[:, 1:] != key[:, :-1]).cumsum(-1)
    row = torch.arange(len(key), device=key.device).unsqueeze(-1)
    weights = torch.zeros_like(w).index_put_((row, place), w, accumulate=True)      # in order, unlike scatter_add_
    # places behind the last are not written
    return torch.full_like(key, NO_ID.value).scatter_(-1, place, key), weights
