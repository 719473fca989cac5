"""Distillation from a sparse teacher by tiles: state and slope of ``kernels.distill``, see ``kernels.tiled``."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from . import distill as ds
from .launch import unseen
from .logits import store_slope
from .tiled import Head, highest, load_places, logits, meet_targets, next_target, smoothed, targets_of, work_of

# -- the cross-entropy that goes with it, at temperature 1


@triton.jit
def look_at_labels(
    c, j, column, labels_ptr, row, there, at, first_id, columns, class_weight_ptr, top, total, below, weight,
    HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """A tile's part of the statistics; the logit of a label that is there goes to the state."""
    if HAS_LABELS:
        y = load_places(labels_ptr, row, there, first_id, columns)
        c_y = tl.sum(tl.where(j == y[:, None], c, 0.0), 1)
        tl.store(at + ds.LABEL, c_y, mask=(y >= column) & (y < column + BLOCK_V))
    top, rise, shift = highest(top, c)
    if SMOOTH:
        below, weight = smoothed(below, weight, c, top, rise, class_weight_ptr, j, columns, HAS_CLASS_WEIGHT)
    return top, total * tl.exp(-rise) + tl.sum(tl.exp(c - shift[:, None]), 1), below, weight


@triton.jit
def store_labels(at, there, top, total, below, weight, SMOOTH: tl.constexpr):
    tl.store(at + ds.CE_TOP, top, mask=there)
    tl.store(at + ds.CE_TOTAL, total, mask=there)
    if SMOOTH:
        tl.store(at + ds.BELOW, below, mask=there)
        tl.store(at + ds.WEIGHT, weight, mask=there)


@triton.jit
def label_slope(
    c, at, mask, class_weight_ptr, offsets, parts, there, SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
):
    """The cross-entropy's part of the slope, of rows that are ``there``."""
    each = tl.load(parts + ds.CE_EACH, mask=there, other=0.0) if SMOOTH else 0.0
    return ds.label_slope(
        c, at, mask, class_weight_ptr, offsets, tl.load(parts + ds.CE_SHIFT, mask=there, other=0.0),
        tl.load(parts + ds.CE_ON_E, mask=there, other=0.0), tl.load(parts + ds.CE_SHARP, mask=there, other=0.0), each,
        SMOOTH, HAS_CLASS_WEIGHT)


@triton.jit
def tile_label_slope(
    c, j, labels_ptr, row, there, first_id, columns, class_weight_ptr, parts, HAS_LABELS: tl.constexpr,
    SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):
    y = tl.full([BLOCK_N], -1, tl.int32)
    if HAS_LABELS:
        y = load_places(labels_ptr, row, there, first_id, columns)
    return label_slope(c, j == y[:, None], j < columns, class_weight_ptr, j, parts, there[:, None], SMOOTH,
                       HAS_CLASS_WEIGHT)


# -- the kernels


@triton.jit
def _look(
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
        row_tile, span, row, there = work_of(item, row_tiles, spans, rows, GROUP, BLOCK_N)
        first, last = span * blocks // spans, (span + 1) * blocks // spans
        at = state_ptr + (span.to(tl.int64) * rows + row) * ds.STATE

        next_k, next_place = next_target(ids_ptr, row, there, first * BLOCK_V, first_id, columns, K)
        top = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        ce_top, ce_total, below, weight = top, total, total, total
        for block in range(first, last):
            column = block * BLOCK_V
            j, c = logits(
                x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, row_tile, block, rows, columns, hidden,
                scale, softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            if WITH_CE:
                ce_top, ce_total, below, weight = look_at_labels(
                    c, j, column, labels_ptr, row, there, at, first_id, columns, class_weight_ptr, ce_top, ce_total,
                    below, weight, HAS_LABELS, SMOOTH, HAS_CLASS_WEIGHT, BLOCK_V)
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
            store_labels(at, there, ce_top, ce_total, below, weight, SMOOTH)


@triton.jit
def _slope(
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
        row_tile, block, row, there = work_of(item, row_tiles, blocks, rows, GROUP, BLOCK_N)
        j, c = logits(
            x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, row_tile, block, rows, columns, hidden,
            scale, softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        parts = parts_ptr + row[:, None] * ds.PARTS
        g = tl.zeros_like(c)
        if not SUPPORT:
            shift = tl.load(parts + ds.SHIFT, mask=there[:, None], other=0.0)
            g += tl.load(parts + ds.ON_TAIL, mask=there[:, None], other=0.0) * tl.exp(c * inverse_temperature - shift)
        if WITH_CE:
            g += tile_label_slope(c, j, labels_ptr, row, there, first_id, columns, class_weight_ptr, parts, HAS_LABELS,
                                  SMOOTH, HAS_CLASS_WEIGHT, BLOCK_N)
        store_slope(grad_ptr, row[:, None] * grad_stride + j, g * scale, c, softcap, there[:, None] & (j < columns),
                    HAS_SOFTCAP, False)


@triton.jit
def _targets(
    grad_ptr, grad_stride,                          # (R, C)
    ids_ptr, slopes_ptr, labels_ptr,                # (R, K), (R, K), (R,)
    state_ptr,                                      # (R, STATE + K)
    class_weight_ptr,                               # (C,)
    parts_ptr,                                      # (R, PARTS)
    columns, first_id, scale, softcap, temperature,
    WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """The slope at the support of each row's teacher, from its logits."""
    row = tl.program_id(0).to(tl.int64)
    ids, target, inside, place = targets_of(ids_ptr, row, first_id, columns, K, BLOCK_K)     # unused ones are NO_ID
    c = tl.load(state_ptr + (row + 1) * ds.STATE + target, mask=inside, other=0.0) * temperature
    parts = parts_ptr + row * ds.PARTS + tl.zeros_like(place)
    g = tl.load(parts + ds.SLOPE) * tl.load(slopes_ptr + target, mask=inside, other=0.0)
    if WITH_CE:
        y = tl.load(labels_ptr + row) if HAS_LABELS else tl.full([], -1, tl.int64)
        g += label_slope(c, ids == y, inside, class_weight_ptr, place, parts, inside, SMOOTH, HAS_CLASS_WEIGHT)
    store_slope(grad_ptr, row * grad_stride + place, g * scale, c, softcap, inside, HAS_SOFTCAP, False)


# -- launchers


def look(rows: ds.DistillRows, head: Head):
    """As ``tiled_cross_entropy.look``: states of spans, and logits of the teacher's ids at its temperature. If a
    gradient is to come, there is room for ``rows.parts`` and ``rows.slopes``."""
    head = _narrow_where_needed(head, rows)
    count, k = rows.ids.shape
    state = unseen(head.spans(), count, ds.STATE.value, maxima=(ds.TOP.value, ds.CE_TOP.value, ds.T_TOP.value),
                   absent=(ds.LABEL.value,), device=head.x.device)
    z = torch.full((count, k), torch.nan, dtype=torch.float32, device=head.x.device)
    if rows.row_scale is not None:
        rows.parts = torch.empty(count, ds.PARTS.value, dtype=torch.float32, device=head.x.device)
        rows.slopes = torch.empty_like(rows.weights)
    head.launch(
        _look, len(state), head.x if rows.class_weight is None else rows.class_weight, rows.ids, z,
        head.x if rows.labels is None else rows.labels, state, spans=len(state), first_id=head.first_id,
        SUPPORT=rows.tail == ds.SUPPORT.value, **options_of(rows), K=k)
    return state, z


def slope(rows: ds.DistillRows, head: Head, columns: slice, grad) -> None:
    """dloss/du of these columns into ``grad`` (R, C), once ``rows.parts`` and ``rows.slopes`` are known."""
    part, (count, k) = _narrow_where_needed(head.part(columns), rows), rows.ids.shape
    class_weight = head.x if rows.class_weight is None else rows.class_weight[columns]
    options = options_of(rows)
    labels = head.x if rows.labels is None else rows.labels
    part.launch(_slope, triton.cdiv(len(part.weight), part.tiles.columns), class_weight, labels, rows.parts,
                grad, grad.stride(0), first_id=part.first_id, SUPPORT=rows.tail == ds.SUPPORT.value, **options)
    _targets[(count,)](
        grad, grad.stride(0), rows.ids, rows.slopes, labels, rows.state, class_weight, rows.parts,
        len(part.weight), part.first_id, scale=head.scale, softcap=head.softcap,
        temperature=1 / options.pop("inverse_temperature"), HAS_SOFTCAP=head.softcap > 0, **options, K=k,
        BLOCK_K=triton.next_power_of_2(k), num_warps=1)


def _narrow_where_needed(head: Head, rows: ds.DistillRows) -> Head:
    return dataclasses.replace(head, narrow=rows.options["WITH_CE"] or head.x.dtype.itemsize > 2)


def options_of(rows: ds.DistillRows) -> dict:
    return {name: rows.options[name]
            for name in ("inverse_temperature", "WITH_CE", "HAS_LABELS", "SMOOTH", "HAS_CLASS_WEIGHT")}
