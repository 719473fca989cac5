"""Cross-entropy by tiles: the state of ``kernels.cross_entropy``, and its slope, see ``kernels.tiled``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import cross_entropy as ce
from .launch import unseen
from .logits import store_slope
from .tiled import Head, highest, logits, meet_targets, next_target, smoothed, targets_of, work_of


@triton.jit
def _look(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner,         # (R, D), (V, D), or descriptors
    bias_ptr, class_weight_ptr,                     # (V,)
    ids_ptr, z_ptr,                                 # (R, K), their logits
    state_ptr,                                      # (S, R, STATE)
    rows, columns, hidden, spans, first_id, scale, softcap, inverse_temperature,
    BUCKET: tl.constexpr, SMOOTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    NEVER: tl.constexpr = -float("inf")
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * spans, tl.num_programs(0)):
        row_tile, span, row, there = work_of(item, row_tiles, spans, rows, GROUP, BLOCK_N)
        first, last = span * blocks // spans, (span + 1) * blocks // spans

        next_k, next_place = next_target(ids_ptr, row, there, first * BLOCK_V, first_id, columns, K)
        top = tl.full([BLOCK_N], NEVER, tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        peak, below, weight = top, total, total
        for block in range(first, last):
            column = block * BLOCK_V
            j, c = logits(
                x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, row_tile, block, rows, columns, hidden,
                scale, softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            z = c * inverse_temperature
            if SMOOTH:
                peak, rise, _ = highest(peak, z)
                below, weight = smoothed(below, weight, z, peak, rise, class_weight_ptr, j, columns, HAS_CLASS_WEIGHT)
            # with a bucket, the sum is of what is off the support
            z, next_k, next_place = meet_targets(
                z, j, column + BLOCK_V, ids_ptr, z_ptr, row, next_k, next_place, first_id, columns, BUCKET, K)
            top, rise, shift = highest(top, z)
            total = total * tl.exp(-rise) + tl.sum(tl.exp(z - shift[:, None]), 1)

        at = state_ptr + (span.to(tl.int64) * rows + row) * ce.STATE
        tl.store(at + ce.TOP, top, mask=there)
        tl.store(at + ce.TOTAL, total, mask=there)
        if SMOOTH:
            tl.store(at + ce.PEAK, peak, mask=there)
            tl.store(at + ce.BELOW, below, mask=there)
            tl.store(at + ce.WEIGHT, weight, mask=there)


@triton.jit
def _slope(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner,         # (R, D), (C, D), or descriptors
    bias_ptr, class_weight_ptr,                     # (C,)
    slopes_ptr,                                     # (R, SLOPES)
    grad_ptr, grad_stride,                          # (R, C)
    rows, columns, hidden, scale, softcap, inverse_temperature,
    BUCKET: tl.constexpr, SMOOTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * blocks, tl.num_programs(0)):
        row_tile, block, row, there = work_of(item, row_tiles, blocks, rows, GROUP, BLOCK_N)
        j, c = logits(
            x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, row_tile, block, rows, columns, hidden,
            scale, softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        at = slopes_ptr + row * ce.SLOPES
        shift = tl.load(at + ce.SHIFT, mask=there, other=0.0)[:, None]
        on_q = tl.load(at + ce.ON_Q, mask=there, other=0.0)[:, None]
        each = tl.load(at + ce.EACH, mask=there, other=0.0)[:, None]
        off_shift = tl.load(at + ce.OFF_SHIFT, mask=there, other=0.0)[:, None]
        off_slope = tl.load(at + ce.OFF_SLOPE, mask=there, other=0.0)[:, None]
        factor = tl.load(at + ce.FACTOR, mask=there, other=0.0)[:, None]
        each_j = ce.each_of(class_weight_ptr, j, j < columns, each, SMOOTH, HAS_CLASS_WEIGHT)
        g = ce.slope_of(c * inverse_temperature, 0.0, each_j, shift, on_q, 0.0, off_shift, off_slope, BUCKET)
        g *= factor * scale
        store_slope(grad_ptr, row[:, None] * grad_stride + j, g, c, softcap, there[:, None] & (j < columns),
                    HAS_SOFTCAP, False)


@triton.jit
def _targets(
    grad_ptr, grad_stride,                          # (R, C)
    ids_ptr, weights_ptr, state_ptr,                # (R, K), (R, K), (R, STATE + K)
    class_weight_ptr,                               # (C,)
    slopes_ptr,                                     # (R, SLOPES)
    columns, first_id, scale, softcap, temperature,
    HARD: tl.constexpr, BUCKET: tl.constexpr, SMOOTH: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The slope at the ids of each row's target, from their logits."""
    row = tl.program_id(0).to(tl.int64)
    _, target, inside, place = targets_of(ids_ptr, row, first_id, columns, K, BLOCK_K)
    on = tl.where(inside, 1.0, 0.0) if HARD else tl.load(weights_ptr + target, mask=inside, other=0.0)
    z = tl.load(state_ptr + (row + 1) * ce.STATE + target, mask=inside, other=0.0)
    at = slopes_ptr + row * ce.SLOPES
    each_k = ce.each_of(class_weight_ptr, place, inside, tl.load(at + ce.EACH), SMOOTH, HAS_CLASS_WEIGHT)
    g = ce.slope_of(z, on, each_k, tl.load(at + ce.SHIFT), tl.load(at + ce.ON_Q), tl.load(at + ce.SHARP),
                    tl.load(at + ce.OFF_SHIFT), tl.load(at + ce.OFF_SLOPE), BUCKET)
    g *= tl.load(at + ce.FACTOR) * scale
    store_slope(grad_ptr, row * grad_stride + place, g, z * temperature, softcap, inside, HAS_SOFTCAP, False)


# -- launchers


def look(rows: ce.CrossEntropyRows, head: Head):
    """The state of each span (S, R, STATE), and the logits (R, K) of targets that are here; NaN for others. If a
    gradient is to come, there is room for ``rows.slopes``."""
    count, k = rows.ids.shape
    state = unseen(head.spans(), count, ce.STATE.value, maxima=(ce.TOP.value, ce.PEAK.value), absent=(),
                   device=head.x.device)
    z = torch.full((count, k), torch.nan, dtype=torch.float32, device=head.x.device)
    if rows.row_scale is not None:
        rows.slopes = torch.empty(count, ce.SLOPES.value, dtype=torch.float32, device=head.x.device)
    head.launch(
        _look, len(state), head.x if rows.class_weight is None else rows.class_weight, rows.ids, z, state,
        spans=len(state), first_id=head.first_id, **_of(rows), K=k)
    return state, z


def slope(rows: ce.CrossEntropyRows, head: Head, columns: slice, grad) -> None:
    """dloss/du of these columns into ``grad`` (R, C), once ``rows.slopes`` are known."""
    part, (count, k) = head.part(columns), rows.ids.shape
    class_weight = head.x if rows.class_weight is None else rows.class_weight[columns]
    part.launch(_slope, triton.cdiv(len(part.weight), part.tiles.columns), class_weight, rows.slopes,
                grad, grad.stride(0), **_of(rows))
    options = _of(rows)
    _targets[(count,)](
        grad, grad.stride(0), rows.ids, head.x if rows.weights is None else rows.weights, rows.state, class_weight,
        rows.slopes, len(part.weight), part.first_id, scale=head.scale, softcap=head.softcap,
        temperature=1 / options.pop("inverse_temperature"), HARD=rows.weights is None, HAS_SOFTCAP=head.softcap > 0,
        **options, K=k, BLOCK_K=triton.next_power_of_2(k), num_warps=1)


def _of(rows: ce.CrossEntropyRows) -> dict:
    return {"inverse_temperature": rows.options["inverse_temperature"], "BUCKET": rows.options["BUCKET"],
            "SMOOTH": rows.smooth, "HAS_CLASS_WEIGHT": rows.class_weight is not None}
