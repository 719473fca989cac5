"""Logits that are never in memory: a tile of them is computed, looked at and forgotten in one kernel.

Of hidden states x (R, D) and a weight w (V, D), the raw outputs u of rows i and columns j, and their logits, are

    u_ij = sum_d x_id w_jd,     z = softcap * tanh(scale * (u + bias) / softcap) / temperature

A program has a tile of rows and a *span*, tiles of columns one after the other. For each of its rows it keeps what
``kernels.cross_entropy``, ``kernels.distill`` or ``kernels.logprob`` keep, with a running maximum m,

    m' = max(m, max_j z_j),     total' = total e^(m - m') + sum_j e^(z_j - m')      and so on,

and leaves it as the ``state`` of its span. Spans are then added up in their order, like the ranks of a group. What is
known of each row then makes the gradient: a tile is computed again, and its slope dloss/du written, for as many columns
as there is memory for. At the ids of a target, whose logits the first look has found, a kernel of rows writes over it.
(Class probabilities and a teacher's logits are as many as logits: there is nothing to be gained. A teacher's hidden
states would take a second tile in registers.)

Rows of tiles are worked on in groups: the programs of a moment share operands, which they then find in the L2 cache.
Where the chip has a tensor memory accelerator, and rows are aligned, operands come through it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import cross_entropy as ce
from . import distill as ds
from . import logprob as lp
from .launch import float32_products, has_tensor_memory_accelerator, multiprocessors, tiles, unseen
from .logits import NO_ID, TRUNCATES, capped, nearest_bfloat16, store_slope

NOWHERE = tl.constexpr(2**31 - 1)
ALIGNMENT = 16      # bytes, of what a descriptor names
STATES = max(op.STATE.value for op in (ce, ds, lp))     # numbers of a row's state, at most


# -- a tile -----------------------------------------------------------------------------------------------------------


@triton.jit
def place_of(item, row_tiles, spans, GROUP: tl.constexpr):
    """Row tile and span of a work item: the row tiles of a group for one span, then for the next."""
    first = item // (GROUP * spans) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = item % (GROUP * spans)
    return first + within % size, within // size


@triton.jit
def as_operand(b, dtype: tl.constexpr):
    """In the dtype of products. The interpreter rounds to bfloat16 by cutting off, and multiplies its raw bits."""
    if not TRUNCATES:
        b = b.to(dtype)
    elif dtype == tl.bfloat16:
        b = nearest_bfloat16(b.to(tl.float32))
    else:
        b = b.to(dtype).to(tl.float32)
    return b


@triton.jit
def outputs(
    x_ptr, x_row, x_inner, w_ptr, w_row, w_inner, row, column, rows, columns, hidden, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """u (BLOCK_N, BLOCK_V) in float32 from a row and a column on; 0 behind the last."""
    u = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if TMA:
        for d in range(0, hidden, BLOCK_D):
            a = x_ptr.load([row, d])
            b = w_ptr.load([column, d])
            u = tl.dot(as_operand(a, a.dtype), as_operand(b, a.dtype).T, u, input_precision=PRECISION)
    else:
        i, j, lanes = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + i.to(tl.int64)[:, None] * x_row + lanes.to(tl.int64)[None, :] * x_inner
        w_ptrs = w_ptr + j.to(tl.int64)[:, None] * w_row + lanes.to(tl.int64)[None, :] * w_inner
        for d in range(0, hidden, BLOCK_D):
            inside = (d + lanes < hidden)[None, :]
            a = tl.load(x_ptrs, mask=(i < rows)[:, None] & inside, other=0.0)
            b = tl.load(w_ptrs, mask=(j < columns)[:, None] & inside, other=0.0)
            u = tl.dot(as_operand(a, a.dtype), as_operand(b, a.dtype).T, u, input_precision=PRECISION)
            x_ptrs += BLOCK_D * x_inner
            w_ptrs += BLOCK_D * w_inner
    return u


@triton.jit
def load_places(ids_ptr, offsets, mask, first_id, columns):
    """Where ids are among these columns; -1 for those before, NOWHERE for those behind, and where masked."""
    id = tl.load(ids_ptr + offsets, mask=mask, other=NO_ID) - first_id
    return tl.where(id < columns, tl.maximum(id, -1), NOWHERE).to(tl.int32)


@triton.jit
def next_target(ids_ptr, row, there, first_column, first_id, columns, K: tl.constexpr):
    """Which of a row's ids (R, K), in ascending order, is the first at ``first_column`` or behind it, and where."""
    next_k = tl.zeros_like(row).to(tl.int32)
    for k in range(K):
        place = load_places(ids_ptr, row * K + k, there, first_id, columns)
        next_k += (place < first_column).to(tl.int32)
    return next_k, load_places(ids_ptr, row * K + next_k, there & (next_k < K), first_id, columns)


@triton.jit
def meet_targets(
    z, j, last, ids_ptr, z_ptr, row, next_k, next_place, first_id, columns, REMOVE: tl.constexpr, K: tl.constexpr,
):
    """The logits z at columns j, all before ``last``, of ids that are there go to ``z_ptr``; with ``REMOVE`` -inf takes
    their place."""
    met = next_place < last
    while tl.max(met.to(tl.int32), 0) > 0:
        at = j == next_place[:, None]
        tl.store(z_ptr + row * K + next_k, tl.sum(tl.where(at, z, 0.0), 1), mask=met)
        if REMOVE:
            z = tl.where(at, -float("inf"), z)
        next_k += met.to(tl.int32)
        following = load_places(ids_ptr, row * K + next_k, met & (next_k < K), first_id, columns)
        next_place = tl.where(met, following, next_place)
        met = next_place < last
    return z, next_k, next_place


@triton.jit
def highest(top, z):
    """The maximum of each row so far, how much it rose, and what exponents are relative to: 0 for -inf."""
    before = top
    top = tl.maximum(top, tl.max(z, 1))
    rise = tl.where(before == -float("inf"), 0.0, top - before)
    return top, rise, tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def smoothed(below, weight, z, top, rise, class_weight_ptr, j, columns, HAS_CLASS_WEIGHT: tl.constexpr):
    """sum_j a_j (top - z_j) and sum_j a_j of each row so far, of class weights a, after the maximum's ``rise``."""
    a = tl.where(j < columns, 1.0, 0.0)
    if HAS_CLASS_WEIGHT:
        a = tl.load(class_weight_ptr + j, mask=j < columns, other=0.0)
    below += weight * rise + tl.sum(tl.where(a != 0, a * (top[:, None] - z), 0.0), 1)
    return below, weight + tl.sum(a, 1)


# -- cross-entropy ----------------------------------------------------------------------------------------------------


@triton.jit
def _cross_entropy_look(
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
        row_tile, span = place_of(item, row_tiles, spans, GROUP)
        i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there, row = i < rows, i.to(tl.int64)
        first, last = span * blocks // spans, (span + 1) * blocks // spans

        next_k, next_place = next_target(ids_ptr, row, there, first * BLOCK_V, first_id, columns, K)
        top = tl.full([BLOCK_N], NEVER, tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        peak, below, weight = top, total, total
        for block in range(first, last):
            column = block * BLOCK_V
            j = (column + tl.arange(0, BLOCK_V))[None, :]
            u = outputs(x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, row_tile * BLOCK_N, column, rows, columns,
                        hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            z = capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP) * inverse_temperature
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
def _cross_entropy_slope(
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
        row_tile, block = place_of(item, row_tiles, blocks, GROUP)
        i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        j = (block * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
        there, row = i < rows, i.to(tl.int64)
        u = outputs(x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, row_tile * BLOCK_N, block * BLOCK_V, rows,
                    columns, hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        c = capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
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
def _cross_entropy_targets(
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
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=NO_ID)
    inside = (ids >= first_id) & (ids < first_id + columns)
    place = tl.where(inside, ids - first_id, 0)
    on = tl.where(inside, 1.0, 0.0) if HARD else tl.load(weights_ptr + row * K + k, mask=inside, other=0.0)
    z = tl.load(state_ptr + row * (ce.STATE + K) + ce.STATE + k, mask=inside, other=0.0)
    at = slopes_ptr + row * ce.SLOPES
    each_k = ce.each_of(class_weight_ptr, place, inside, tl.load(at + ce.EACH), SMOOTH, HAS_CLASS_WEIGHT)
    g = ce.slope_of(z, on, each_k, tl.load(at + ce.SHIFT), tl.load(at + ce.ON_Q), tl.load(at + ce.SHARP),
                    tl.load(at + ce.OFF_SHIFT), tl.load(at + ce.OFF_SLOPE), BUCKET)
    g *= tl.load(at + ce.FACTOR) * scale
    store_slope(grad_ptr, row * grad_stride + place, g, z * temperature, softcap, inside, HAS_SOFTCAP, False)


# -- log-probability --------------------------------------------------------------------------------------------------


@triton.jit
def _logprob_look(
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
        row_tile, span = place_of(item, row_tiles, spans, GROUP)
        i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there, row = i < rows, i.to(tl.int64)
        at = state_ptr + (span.to(tl.int64) * rows + row) * lp.STATE

        top = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        below, argmax = total, total
        for block in range(span * blocks // spans, (span + 1) * blocks // spans):
            column = block * BLOCK_V
            j = (column + tl.arange(0, BLOCK_V))[None, :]
            u = outputs(x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, row_tile * BLOCK_N, column, rows, columns,
                        hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            z = capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP) * inverse_temperature
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
def _logprob_slope(
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
        row_tile, block = place_of(item, row_tiles, blocks, GROUP)
        i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        j = (block * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
        there, row = i < rows, i.to(tl.int64)
        u = outputs(x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, row_tile * BLOCK_N, block * BLOCK_V, rows,
                    columns, hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        c = capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
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


# -- distillation from a sparse teacher -------------------------------------------------------------------------------


@triton.jit
def _distill_look(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner,         # (R, D), (V, D), or descriptors
    bias_ptr, class_weight_ptr,                     # (V,)
    ids_ptr, z_ptr, labels_ptr,                     # (R, K), their logits, (R,)
    state_ptr,                                      # (S, R, STATE)
    rows, columns, hidden, spans, first_id, scale, softcap, inverse_temperature,
    SUPPORT: tl.constexpr, WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * spans, tl.num_programs(0)):
        row_tile, span = place_of(item, row_tiles, spans, GROUP)
        i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        there, row = i < rows, i.to(tl.int64)
        first, last = span * blocks // spans, (span + 1) * blocks // spans
        at = state_ptr + (span.to(tl.int64) * rows + row) * ds.STATE

        next_k, next_place = next_target(ids_ptr, row, there, first * BLOCK_V, first_id, columns, K)
        top = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        ce_top, ce_total, below, weight = top, total, total, total
        for block in range(first, last):
            column = block * BLOCK_V
            j = (column + tl.arange(0, BLOCK_V))[None, :]
            u = outputs(x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, row_tile * BLOCK_N, column, rows, columns,
                        hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            c = capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            if WITH_CE:         # at temperature 1
                if HAS_LABELS:
                    y = load_places(labels_ptr, row, there, first_id, columns)
                    c_y = tl.sum(tl.where(j == y[:, None], c, 0.0), 1)
                    tl.store(at + ds.LABEL, c_y, mask=(y >= column) & (y < column + BLOCK_V))
                ce_top, rise, shift = highest(ce_top, c)
                if SMOOTH:
                    below, weight = smoothed(
                        below, weight, c, ce_top, rise, class_weight_ptr, j, columns, HAS_CLASS_WEIGHT)
                ce_total = ce_total * tl.exp(-rise) + tl.sum(tl.exp(c - shift[:, None]), 1)
            z, next_k, next_place = meet_targets(
                c * inverse_temperature, j, column + BLOCK_V, ids_ptr, z_ptr, row, next_k, next_place, first_id,
                columns, not SUPPORT, K)
            if not SUPPORT:     # the sum is of what is off the support
                top, rise, shift = highest(top, z)
                total = total * tl.exp(-rise) + tl.sum(tl.exp(z - shift[:, None]), 1)

        if not SUPPORT:
            tl.store(at + ds.TOP, top, mask=there)
            tl.store(at + ds.TOTAL, total, mask=there)
        if WITH_CE:
            tl.store(at + ds.CE_TOP, ce_top, mask=there)
            tl.store(at + ds.CE_TOTAL, ce_total, mask=there)
            if SMOOTH:
                tl.store(at + ds.BELOW, below, mask=there)
                tl.store(at + ds.WEIGHT, weight, mask=there)


@triton.jit
def _label_slope(
    c, at, mask, class_weight_ptr, offsets, parts, there, SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
):
    """The cross-entropy's part of the slope, of rows that are ``there``."""
    each = tl.load(parts + ds.CE_EACH, mask=there, other=0.0) if SMOOTH else 0.0
    return ds.label_slope(
        c, at, mask, class_weight_ptr, offsets, tl.load(parts + ds.CE_SHIFT, mask=there, other=0.0),
        tl.load(parts + ds.CE_ON_E, mask=there, other=0.0), tl.load(parts + ds.CE_SHARP, mask=there, other=0.0), each,
        SMOOTH, HAS_CLASS_WEIGHT)


@triton.jit
def _distill_slope(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner,         # (R, D), (C, D), or descriptors
    bias_ptr, class_weight_ptr,                     # (C,)
    labels_ptr, parts_ptr,                          # (R,), (R, PARTS)
    grad_ptr, grad_stride,                          # (R, C)
    rows, columns, hidden, first_id, scale, softcap, inverse_temperature,
    SUPPORT: tl.constexpr, WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * blocks, tl.num_programs(0)):
        row_tile, block = place_of(item, row_tiles, blocks, GROUP)
        i = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        j = (block * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
        there, row = i < rows, i.to(tl.int64)
        u = outputs(x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, row_tile * BLOCK_N, block * BLOCK_V, rows,
                    columns, hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        c = capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        parts = parts_ptr + row[:, None] * ds.PARTS
        g = tl.zeros_like(c)
        if not SUPPORT:
            shift = tl.load(parts + ds.SHIFT, mask=there[:, None], other=0.0)
            g += tl.load(parts + ds.ON_TAIL, mask=there[:, None], other=0.0) * tl.exp(c * inverse_temperature - shift)
        if WITH_CE:
            y = load_places(labels_ptr, row, there, first_id, columns) if HAS_LABELS else tl.zeros_like(i) - 1
            g += _label_slope(c, j == y[:, None], j < columns, class_weight_ptr, j, parts, there[:, None], SMOOTH,
                              HAS_CLASS_WEIGHT)
        store_slope(grad_ptr, row[:, None] * grad_stride + j, g * scale, c, softcap, there[:, None] & (j < columns),
                    HAS_SOFTCAP, False)


@triton.jit
def _distill_targets(
    grad_ptr, grad_stride,                          # (R, C)
    ids_ptr, weights_ptr, slopes_ptr, labels_ptr,   # (R, K), (R, K), (R, K), (R,)
    state_ptr,                                      # (R, STATE + K)
    class_weight_ptr,                               # (C,)
    parts_ptr,                                      # (R, PARTS)
    columns, first_id, scale, softcap, temperature,
    WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The slope at the support of each row's teacher, from its logits."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=NO_ID)
    on = tl.load(weights_ptr + row * K + k, mask=k < K, other=0.0) > 0
    inside = on & (ids >= first_id) & (ids < first_id + columns)
    place = tl.where(inside, ids - first_id, 0)
    c = tl.load(state_ptr + row * (ds.STATE + K) + ds.STATE + k, mask=inside, other=0.0) * temperature
    parts = parts_ptr + row * ds.PARTS + tl.zeros_like(k)
    g = tl.load(parts + ds.SLOPE) * tl.load(slopes_ptr + row * K + k, mask=inside, other=0.0)
    if WITH_CE:
        y = tl.load(labels_ptr + row) if HAS_LABELS else tl.full([], -1, tl.int64)
        g += _label_slope(c, ids == y, inside, class_weight_ptr, place, parts, inside, SMOOTH, HAS_CLASS_WEIGHT)
    store_slope(grad_ptr, row * grad_stride + place, g * scale, c, softcap, inside, HAS_SOFTCAP, False)


# -- launchers --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Head:
    """What tiles are computed from: x (R, D) in the product's dtype, ``weight`` (V, D), ``bias`` (V,) or None. The id
    of the first column is ``first_id``."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    first_id: int
    scale: float
    softcap: float
    narrow: bool = False        # tiles

    def part(self, columns: slice) -> Head:
        return dataclasses.replace(
            self, weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns],
            first_id=self.first_id + columns.start)

    @property
    def by_descriptor(self) -> bool:
        return (has_tensor_memory_accelerator(self.x.device) and self.x.dtype == self.weight.dtype
                and _aligned(self.x) and _aligned(self.weight))

    @property
    def tiles(self):
        found = tiles(len(self.weight), self.x.dtype, self.x.device, self.by_descriptor)
        return found.narrow if self.narrow else found

    def spans(self) -> int:
        return spans(len(self.x), len(self.weight), self.tiles)

    def launch(self, kernel, work: int, *arguments, **options) -> None:
        """``work`` items for each tile of rows, by as many programs as fit the chip."""
        (rows, hidden), columns, found = self.x.shape, len(self.weight), self.tiles
        operands, blocks = (self.x, self.weight), ([found.rows, found.terms], [found.columns, found.terms])
        by_descriptor = self.by_descriptor
        given = [(TensorDescriptor.from_tensor(tensor, block) if by_descriptor else tensor, *tensor.stride())
                 for tensor, block in zip(operands, blocks, strict=True)]
        programs = min(multiprocessors(self.x.device), triton.cdiv(rows, found.rows) * work)
        kernel[(programs,)](
            *given[0], *given[1], self.x if self.bias is None else self.bias, *arguments, rows=rows, columns=columns,
            hidden=hidden, scale=self.scale, softcap=self.softcap, HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=self.softcap > 0, TMA=by_descriptor, PRECISION=float32_products(),
            BLOCK_N=found.rows, BLOCK_V=found.columns, BLOCK_D=found.terms, GROUP=found.group, num_warps=found.warps,
            num_stages=found.stages, **options)


def _aligned(tensor) -> bool:
    (_, length), (row, inner) = tensor.shape, tensor.stride()
    starts_aligned = all(at % ALIGNMENT == 0 for at in (tensor.data_ptr(), row * tensor.element_size()))
    return inner == 1 and row >= length and starts_aligned


def spans(rows: int, columns: int, found) -> int:
    """Parts of the vocabulary, each of whole tiles: as many as keep all programs busy, whatever the chip."""
    return min(triton.cdiv(columns, found.columns), triton.cdiv(found.items, triton.cdiv(rows, found.rows)))


def state_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of all spans, at most."""
    found = tiles(columns, dtype, device, by_descriptor=False).narrow   # none are smaller
    return 4 * STATES * min(rows * triton.cdiv(columns, found.columns), found.items * found.rows + rows)


def look_cross_entropy(rows: ce.CrossEntropyRows, head: Head):
    """The state of each span (S, R, STATE), and the logits (R, K) of targets that are here; NaN for others. If a
    gradient is to come, there is room for ``rows.slopes``."""
    count, k = rows.ids.shape
    state = unseen(head.spans(), count, ce.STATE.value, maxima=(ce.TOP.value, ce.PEAK.value), absent=(),
                   device=head.x.device)
    z = torch.full((count, k), torch.nan, dtype=torch.float32, device=head.x.device)
    if rows.row_scale is not None:
        rows.slopes = torch.empty(count, ce.SLOPES.value, dtype=torch.float32, device=head.x.device)
    head.launch(
        _cross_entropy_look, len(state), head.x if rows.class_weight is None else rows.class_weight, rows.ids, z, state,
        spans=len(state), first_id=head.first_id, **_of(rows), K=k)
    return state, z


def slope_cross_entropy(rows: ce.CrossEntropyRows, head: Head, columns: slice, grad) -> None:
    """dloss/du of these columns into ``grad`` (R, C), once ``rows.slopes`` are known."""
    part, (count, k) = head.part(columns), rows.ids.shape
    class_weight = head.x if rows.class_weight is None else rows.class_weight[columns]
    part.launch(_cross_entropy_slope, triton.cdiv(len(part.weight), part.tiles.columns), class_weight, rows.slopes,
                grad, grad.stride(0), **_of(rows))
    options = _of(rows)
    _cross_entropy_targets[(count,)](
        grad, grad.stride(0), rows.ids, head.x if rows.weights is None else rows.weights, rows.state, class_weight,
        rows.slopes, len(part.weight), part.first_id, scale=head.scale, softcap=head.softcap,
        temperature=1 / options.pop("inverse_temperature"), HARD=rows.weights is None, HAS_SOFTCAP=head.softcap > 0,
        **options, K=k, BLOCK_K=triton.next_power_of_2(k), num_warps=1)


def _of(rows: ce.CrossEntropyRows) -> dict:
    return {"inverse_temperature": rows.options["inverse_temperature"], "BUCKET": rows.options["BUCKET"],
            "SMOOTH": rows.smooth, "HAS_CLASS_WEIGHT": rows.class_weight is not None}


def look_logprob(rows: lp.LogprobRows, head: Head):
    """The state of each span (S, R, STATE); an id's logit is NaN where it is not."""
    shape = (head.spans(), len(rows.ids), lp.STATE.value)
    state = torch.full(shape, torch.nan, dtype=torch.float32, device=head.x.device)
    head.launch(_logprob_look, len(state), rows.ids, state, spans=len(state), first_id=head.first_id,
                inverse_temperature=1 / rows.temperature)
    return state


def slope_logprob(rows: lp.LogprobRows, head: Head, columns: slice, grad) -> None:
    part = head.part(columns)
    part.launch(_logprob_slope, triton.cdiv(len(part.weight), part.tiles.columns), rows.ids, rows.row_scale, rows.state,
                rows.results, rows.results.stride(0), grad, grad.stride(0), first_id=part.first_id,
                inverse_temperature=1 / rows.temperature)


def look_distill(rows: ds.DistillRows, head: Head):
    """As ``look_cross_entropy``: states of spans, and logits of the teacher's ids at its temperature. If a gradient is
    to come, there is room for ``rows.parts`` and ``rows.slopes``."""
    head = _narrow_where_needed(head, rows)
    count, k = rows.ids.shape
    state = unseen(head.spans(), count, ds.STATE.value, maxima=(ds.TOP.value, ds.CE_TOP.value, ds.T_TOP.value),
                   absent=(ds.LABEL.value,), device=head.x.device)
    z = torch.full((count, k), torch.nan, dtype=torch.float32, device=head.x.device)
    if rows.row_scale is not None:
        rows.parts = torch.empty(count, ds.PARTS.value, dtype=torch.float32, device=head.x.device)
        rows.slopes = torch.empty_like(rows.weights)
    head.launch(
        _distill_look, len(state), head.x if rows.class_weight is None else rows.class_weight, rows.ids, z,
        head.x if rows.labels is None else rows.labels, state, spans=len(state), first_id=head.first_id,
        SUPPORT=rows.tail == ds.SUPPORT.value, **_of_distillation(rows), K=k)
    return state, z


def slope_distill(rows: ds.DistillRows, head: Head, columns: slice, grad) -> None:
    """dloss/du of these columns into ``grad`` (R, C), once ``rows.parts`` and ``rows.slopes`` are known."""
    part, (count, k) = _narrow_where_needed(head.part(columns), rows), rows.ids.shape
    class_weight = head.x if rows.class_weight is None else rows.class_weight[columns]
    options = _of_distillation(rows)
    labels = head.x if rows.labels is None else rows.labels
    part.launch(_distill_slope, triton.cdiv(len(part.weight), part.tiles.columns), class_weight, labels, rows.parts,
                grad, grad.stride(0), first_id=part.first_id, SUPPORT=rows.tail == ds.SUPPORT.value, **options)
    _distill_targets[(count,)](
        grad, grad.stride(0), rows.ids, rows.weights, rows.slopes, labels, rows.state, class_weight, rows.parts,
        len(part.weight), part.first_id, scale=head.scale, softcap=head.softcap,
        temperature=1 / options.pop("inverse_temperature"), HAS_SOFTCAP=head.softcap > 0, **options, K=k,
        BLOCK_K=triton.next_power_of_2(k), num_warps=1)


def _narrow_where_needed(head: Head, rows: ds.DistillRows) -> Head:
    return dataclasses.replace(head, narrow=rows.options["WITH_CE"] or head.x.dtype.itemsize > 2)


def _of_distillation(rows: ds.DistillRows) -> dict:
    return {name: rows.options[name]
            for name in ("inverse_temperature", "WITH_CE", "HAS_LABELS", "SMOOTH", "HAS_CLASS_WEIGHT")}
