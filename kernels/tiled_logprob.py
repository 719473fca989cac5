"""Log-probability and entropy by tiles: the state of ``kernels.logprob``, and its slope, see ``kernels.tiled``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import logprob as lp
from .logits import store_slope
from .tiled import Head, highest, load_places, logits, work_of


@triton.jit
def _look(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner,         # (R, D), (V, D), or descriptors
    bias_ptr,                                       # (V,)
    ids_ptr,                                        # (R,)
    state_ptr,                                      # (S, R, STATE)
    rows, columns, hidden, spans, first_id, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * spans, tl.num_programs(0)):
        row_tile, span, row, there = work_of(item, row_tiles, spans, rows, GROUP, BLOCK_N)
        at = state_ptr + (span.to(tl.int64) * rows + row) * lp.STATE

        top = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        below, argmax = total, total
        for block in range(span * blocks // spans, (span + 1) * blocks // spans):
            column = block * BLOCK_V
            j, c = logits(
                x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, row_tile, block, rows, columns, hidden,
                scale, softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            z = c * inverse_temperature
            y = load_places(ids_ptr, row, there, first_id, columns)
            z_y = tl.sum(tl.where(j == y[:, None], z, 0.0), 1)
            tl.store(at + lp.LABEL, z_y, mask=(y >= column) & (y < column + BLOCK_V))
            before = top
            top, rise, shift = highest(top, z)
            lowest = tl.min(tl.where(z == top[:, None], j, columns), 1)         # of those that have the maximum
            argmax = tl.where(top > before, (first_id + lowest).to(tl.float32), argmax)
            z -= shift[:, None]
            e = tl.exp(z)
            fall = tl.exp(-rise)
            below = (below - rise * total) * fall + tl.sum(tl.where(e > 0, e * z, 0.0), 1)
            total = total * fall + tl.sum(e, 1)

        tl.store(at + lp.TOP, top, mask=there)
        tl.store(at + lp.TOTAL, total, mask=there)
        tl.store(at + lp.BELOW, below, mask=there)
        tl.store(at + lp.ARGMAX, argmax, mask=there)


@triton.jit
def _slope(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner,         # (R, D), (C, D), or descriptors
    bias_ptr,                                       # (C,)
    ids_ptr, row_scale_ptr,                         # (R,), (R, 2)
    state_ptr,                                      # (R, STATE)
    results_ptr, results_stride,                    # (4, R)
    grad_ptr, grad_stride,                          # (R, C)
    rows, columns, hidden, first_id, scale, softcap, inverse_temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * blocks, tl.num_programs(0)):
        row_tile, block, row, there = work_of(item, row_tiles, blocks, rows, GROUP, BLOCK_N)
        j, c = logits(
            x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, row_tile, block, rows, columns, hidden,
            scale, softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        y = load_places(ids_ptr, row, there, first_id, columns)[:, None]
        top = tl.load(state_ptr + row * lp.STATE + lp.TOP, mask=there, other=0.0)[:, None]
        log_total = tl.log(tl.load(state_ptr + row * lp.STATE + lp.TOTAL, mask=there, other=1.0))[:, None]
        entropy = tl.load(results_ptr + results_stride + row, mask=there, other=0.0)[:, None]
        factor = inverse_temperature * scale
        on_logprob = factor * tl.load(row_scale_ptr + 2 * row, mask=there, other=0.0)[:, None]
        on_entropy = factor * tl.load(row_scale_ptr + 2 * row + 1, mask=there, other=0.0)[:, None]
        g = lp.slope_of(c * inverse_temperature - top - log_total, j == y, entropy, on_logprob, on_entropy)
        store_slope(grad_ptr, row[:, None] * grad_stride + j, g, c, softcap, there[:, None] & (j < columns),
                    HAS_SOFTCAP, False)


# -- launchers


def look(rows: lp.LogprobRows, head: Head):
    """The state of each span (S, R, STATE); an id's logit is NaN where it is not."""
    shape = (head.spans(), len(rows.ids), lp.STATE.value)
    state = torch.full(shape, torch.nan, dtype=torch.float32, device=head.x.device)
    head.launch(_look, len(state), rows.ids, state, spans=len(state), first_id=head.first_id,
                inverse_temperature=1 / rows.temperature)
    return state


def slope(rows: lp.LogprobRows, head: Head, columns: slice, grad) -> None:
    part = head.part(columns)
    part.launch(_slope, triton.cdiv(len(part.weight), part.tiles.columns), rows.ids, rows.row_scale, rows.state,
                rows.results, rows.results.stride(0), grad, grad.stride(0), first_id=part.first_id,
                inverse_temperature=1 / rows.temperature)
