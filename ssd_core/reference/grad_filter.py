"""Certified filtering of the logits' gradient, on the whole (N, V) matrix: what every backend must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ORDER_ROWS = 128    # tokens that the default order looks at


def grad_filter(grad, probs, protected, *, delta, tile, order):
    """The filtered gradient (N, V), each token's skipped mass (N,) and the active pairs (N, T) bool.

    ``grad`` (N, V) is d loss / d u: softmax mass times a weight of one sign, plus the corrections at target ids, which
    ``protected`` (N, V) bool marks. ``probs`` (N, V) is the softmax at the loss's temperature. The T tiles are runs of
    ``tile`` ids of ``order`` (V,), a permutation; the last may be shorter.

    Each token skips its lightest tiles without a target (of equal ones the first) while their summed mass is at most
    ``delta``. The skipped entries G_ij of tile t become ``M_it * c_j`` with ``M_it = sum_j G_ij`` over the tile and
    ``c_j = sum_i G_ij / sum_i M_it`` over all tokens that skip it: row and column sums stay, and no token's gradient is
    off by more than twice its skipped mass times its weight, in L1.
    """
    count, vocab = grad.shape
    tiles = -(-vocab // tile)

    def tiled(matrix):
        return F.pad(matrix[:, order], (0, tiles * tile - vocab)).view(count, tiles, tile)

    mass = tiled(probs).sum(-1).masked_fill(tiled(protected).any(-1), torch.inf)
    mass, lightest = mass.sort(dim=-1, stable=True)
    total = mass.cumsum(-1)
    within = total <= delta
    skipped = total.where(within, 0).amax(-1)
    active = torch.ones_like(within).scatter(-1, lightest, ~within)

    g = tiled(grad)
    left_out = g.masked_fill(active.unsqueeze(-1), 0)                               # G (N, T, tile)
    m = left_out.sum(-1)                                                            # M (N, T)
    m_total = m.sum(0).unsqueeze(-1)                                                # (T, 1)
    c = torch.where(m_total != 0, left_out.sum(0) / m_total, 0)                     # (T, tile)
    matched = torch.where(active.unsqueeze(-1), g, m.unsqueeze(-1) * c)
    filtered = torch.empty_like(grad)
    filtered[:, order] = matched.view(count, tiles * tile)[:, :vocab]
    return filtered, skipped, active


def default_order(probs):
    """(V,) ids by descending mean probability over the first rows of ``probs`` (N, V), ties by id."""
    return probs[:ORDER_ROWS].mean(0).argsort(descending=True, stable=True)
