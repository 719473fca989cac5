"""Distillation from a dense teacher by tiles: state and slope of ``kernels.distill``, see ``kernels.tiled``.

Beside a tile of the student's logits z, that of the teacher's t at the same rows and columns is computed from its
hidden states, or read where its logits are given. Of a KL one look is enough: with running maxima m of t and m' of z,
and T and Z the sums of e^(t - m) and e^(z - m'),

    KL(p | q) = A / T - log(T / Z),     A = sum_j e^(t_j - m) ((t_j - m) - (z_j - m'))

A is the state's VALUE until it is known of all columns. When the maxima rise by r and r', A becomes e^-r (A + T (r' -
r)): no offset of a side enters it. KL(q | p) is the same with both exchanged. A JSD has to know T and Z first, and
looks again.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from . import distill as ds
from .divergences import FORWARD, REVERSE, divergence_terms
from .launch import unseen
from .logits import load_logits, store_slope
from .tiled import Head, highest, logits, work_of
from .tiled_distill import look_at_labels, options_of, store_labels, tile_label_slope


@triton.jit
def _both_logits(
    x_ptr, x_row, x_inner, w_ptr, w_row, w_inner, bias_ptr, t_ptr, t_row, t_inner, v_ptr, v_row, v_inner,
    t_bias_ptr, tokens_ptr, first_token, row_tile, row, there, block, rows, columns, t_columns, hidden, t_hidden, scale,
    softcap, t_scale, t_softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, T_HEAD: tl.constexpr,
    T_HAS_BIAS: tl.constexpr, T_HAS_SOFTCAP: tl.constexpr, HAS_TOKENS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The columns of a tile, and its logits but for the temperature, the student's and the teacher's."""
    j, c = logits(
        x_ptr, x_row, x_inner, w_ptr, w_row, w_inner, bias_ptr, row_tile, block, rows, columns, hidden, scale,
        softcap, HAS_BIAS, HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    if T_HEAD:
        j, t = logits(
            t_ptr, t_row, t_inner, v_ptr, v_row, v_inner, t_bias_ptr, row_tile, block, rows, t_columns, t_hidden,
            t_scale, t_softcap, T_HAS_BIAS, T_HAS_SOFTCAP, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    else:
        token = tl.load(tokens_ptr + row, mask=there, other=0) if HAS_TOKENS else row + first_token
        t = load_logits(t_ptr + token[:, None] * t_row, t_bias_ptr, j, there[:, None] & (j < t_columns), t_scale,
                        t_softcap, T_HAS_BIAS, T_HAS_SOFTCAP)
    return j, c, t


@triton.jit
def _weighted(e, a, b):
    """sum_j e_j (a_j - b_j) with 0 log 0 = 0."""
    return tl.sum(tl.where(e == 0, 0.0, e * (a - b)), 1)


@triton.jit
def _fallen(total, rise):
    """What was summed, relative to a maximum that has risen; what no longer counts is 0, were it infinite before."""
    fall = tl.exp(-rise)
    return tl.where(fall == 0, 0.0, total * fall)


@triton.jit
def _look(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr,           # (R, D), (V, D), or descriptors; (V,)
    t_ptr, t_stride, t_inner, v_ptr, v_stride, v_inner, t_bias_ptr,         # the teacher's, or its logits (N, V')
    tokens_ptr, first_token,                        # (R,) int64: places of the rows; without: one after the other
    class_weight_ptr, labels_ptr,                   # (V,), (R,)
    state_ptr,                                      # (S, R, STATE)
    rows, columns, t_columns, hidden, t_hidden, spans, first_id, scale, softcap, t_scale, t_softcap,
    inverse_temperature,
    KIND: tl.constexpr, WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, T_HEAD: tl.constexpr,
    T_HAS_BIAS: tl.constexpr, T_HAS_SOFTCAP: tl.constexpr, HAS_TOKENS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(tl.maximum(columns, t_columns), BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * spans, tl.num_programs(0)):
        row_tile, span, row, there = work_of(item, row_tiles, spans, rows, GROUP, BLOCK_N)
        at = state_ptr + (span.to(tl.int64) * rows + row) * ds.STATE

        top = tl.full([BLOCK_N], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        t_top, ce_top = top, top
        t_total, apart, ce_total, below, weight = total, total, total, total, total
        for block in range(span * blocks // spans, (span + 1) * blocks // spans):
            j, c, t = _both_logits(
                x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, t_ptr, t_stride, t_inner, v_ptr,
                v_stride, v_inner, t_bias_ptr, tokens_ptr, first_token, row_tile, row, there, block, rows, columns,
                t_columns, hidden, t_hidden, scale, softcap, t_scale, t_softcap, HAS_BIAS, HAS_SOFTCAP, T_HEAD,
                T_HAS_BIAS, T_HAS_SOFTCAP, HAS_TOKENS, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            if WITH_CE:
                ce_top, ce_total, below, weight = look_at_labels(
                    c, j, block * BLOCK_V, labels_ptr, row, there, at, first_id, columns, class_weight_ptr, ce_top,
                    ce_total, below, weight, HAS_LABELS, SMOOTH, HAS_CLASS_WEIGHT, BLOCK_V)
            z = c * inverse_temperature
            t *= inverse_temperature
            top, rise, shift = highest(top, z)
            t_top, t_rise, t_shift = highest(t_top, t)
            z -= shift[:, None]
            t -= t_shift[:, None]
            e, t_e = tl.exp(z), tl.exp(t)
            if KIND == FORWARD:
                apart = _fallen(apart + t_total * (rise - t_rise), t_rise) + _weighted(t_e, t, z)
            if KIND == REVERSE:
                apart = _fallen(apart + total * (t_rise - rise), rise) + _weighted(e, z, t)
            total = total * tl.exp(-rise) + tl.sum(e, 1)
            t_total = t_total * tl.exp(-t_rise) + tl.sum(t_e, 1)

        tl.store(at + ds.TOP, top, mask=there)
        tl.store(at + ds.TOTAL, total, mask=there)
        tl.store(at + ds.T_TOP, t_top, mask=there)
        tl.store(at + ds.T_TOTAL, t_total, mask=there)
        tl.store(at + ds.VALUE, apart, mask=there)
        if WITH_CE:
            store_labels(at, there, ce_top, ce_total, below, weight, SMOOTH)


@triton.jit
def _normalisers(at, there):
    """Of each row: maxima and logarithms of sums, the student's and the teacher's."""
    top = tl.load(at + ds.TOP, mask=there, other=0.0)
    t_top = tl.load(at + ds.T_TOP, mask=there, other=0.0)
    log_total = tl.log(tl.load(at + ds.TOTAL, mask=there, other=1.0))
    t_log_total = tl.log(tl.load(at + ds.T_TOTAL, mask=there, other=1.0))
    return top[:, None], log_total[:, None], t_top[:, None], t_log_total[:, None]


@triton.jit
def _terms(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr,
    t_ptr, t_stride, t_inner, v_ptr, v_stride, v_inner, t_bias_ptr,
    tokens_ptr, first_token,
    state_ptr,                                      # (R, STATE)
    terms_ptr,                                      # (S, R, 2) value and sum of q g, see ``divergences``
    rows, columns, t_columns, hidden, t_hidden, spans, scale, softcap, t_scale, t_softcap, inverse_temperature, beta,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, T_HEAD: tl.constexpr,
    T_HAS_BIAS: tl.constexpr, T_HAS_SOFTCAP: tl.constexpr, HAS_TOKENS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(tl.maximum(columns, t_columns), BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * spans, tl.num_programs(0)):
        row_tile, span, row, there = work_of(item, row_tiles, spans, rows, GROUP, BLOCK_N)
        top, log_total, t_top, t_log_total = _normalisers(state_ptr + row * ds.STATE, there)
        value = tl.zeros([BLOCK_N], tl.float32)
        own = value
        for block in range(span * blocks // spans, (span + 1) * blocks // spans):
            _, c, t = _both_logits(
                x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, t_ptr, t_stride, t_inner, v_ptr,
                v_stride, v_inner, t_bias_ptr, tokens_ptr, first_token, row_tile, row, there, block, rows, columns,
                t_columns, hidden, t_hidden, scale, softcap, t_scale, t_softcap, HAS_BIAS, HAS_SOFTCAP, T_HEAD,
                T_HAS_BIAS, T_HAS_SOFTCAP, HAS_TOKENS, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
            values, pulls = divergence_terms(
                t * inverse_temperature - t_top - t_log_total, c * inverse_temperature - top - log_total, beta, KIND)
            value += tl.sum(values, 1)
            own += tl.sum(pulls, 1)

        at = terms_ptr + 2 * (span.to(tl.int64) * rows + row)
        tl.store(at, value, mask=there)
        tl.store(at + 1, own, mask=there)


@triton.jit
def _slope(
    x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr,           # of C columns
    t_ptr, t_stride, t_inner, v_ptr, v_stride, v_inner, t_bias_ptr,
    tokens_ptr, first_token,
    class_weight_ptr, labels_ptr,                   # (C,), (R,)
    state_ptr, parts_ptr,                           # (R, STATE), (R, PARTS)
    grad_ptr, grad_stride,                          # (R, C)
    rows, columns, t_columns, hidden, t_hidden, first_id, scale, softcap, t_scale, t_softcap, inverse_temperature,
    beta,
    KIND: tl.constexpr, WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, SMOOTH: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, T_HEAD: tl.constexpr,
    T_HAS_BIAS: tl.constexpr, T_HAS_SOFTCAP: tl.constexpr, HAS_TOKENS: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):
    row_tiles, blocks = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_V)
    for item in range(tl.program_id(0), row_tiles * blocks, tl.num_programs(0)):
        row_tile, block, row, there = work_of(item, row_tiles, blocks, rows, GROUP, BLOCK_N)
        j, c, t = _both_logits(
            x_ptr, x_stride, x_inner, w_ptr, w_stride, w_inner, bias_ptr, t_ptr, t_stride, t_inner, v_ptr,
            v_stride, v_inner, t_bias_ptr, tokens_ptr, first_token, row_tile, row, there, block, rows, columns,
            t_columns, hidden, t_hidden, scale, softcap, t_scale, t_softcap, HAS_BIAS, HAS_SOFTCAP, T_HEAD,
            T_HAS_BIAS, T_HAS_SOFTCAP, HAS_TOKENS, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
        at, parts = state_ptr + row * ds.STATE, parts_ptr + row[:, None] * ds.PARTS
        top, log_total, t_top, t_log_total = _normalisers(at, there)
        log_q = c * inverse_temperature - top - log_total
        _, pulls = divergence_terms(t * inverse_temperature - t_top - t_log_total, log_q, beta, KIND)
        g = pulls - tl.exp(log_q) * tl.load(at + ds.OWN, mask=there, other=0.0)[:, None]
        g *= tl.load(parts + ds.SLOPE, mask=there[:, None], other=0.0)
        if WITH_CE:
            g += tile_label_slope(c, j, labels_ptr, row, there, first_id, columns, class_weight_ptr, parts, HAS_LABELS,
                                  SMOOTH, HAS_CLASS_WEIGHT, BLOCK_N)
        store_slope(grad_ptr, row[:, None] * grad_stride + j, g * scale, c, softcap, there[:, None] & (j < columns),
                    HAS_SOFTCAP, False)


# -- launchers: the teacher is ``head.beside``


def look(rows: ds.DistillRows, head: Head):
    """The state of each span (S, R, STATE). If a gradient is to come, there is room for ``rows.parts``."""
    head = _narrow_where_needed(head, rows)
    state = unseen(head.spans(), rows.count, ds.STATE.value, maxima=(ds.TOP.value, ds.CE_TOP.value, ds.T_TOP.value),
                   absent=(ds.LABEL.value,), device=head.x.device)
    if rows.row_scale is not None:
        rows.parts = torch.empty(rows.count, ds.PARTS.value, dtype=torch.float32, device=head.x.device)
    _launch(_look, len(state), rows, head, *_labels(rows, head), state, spans=len(state), first_id=head.first_id,
            **options_of(rows))
    return state


def terms(rows: ds.DistillRows, head: Head):
    """VALUE and OWN of the state of each span (S, R, 2), once its normalisers are known: for a JSD."""
    found = torch.empty(head.spans(), rows.count, 2, dtype=torch.float32, device=head.x.device)
    _launch(_terms, len(found), rows, head, rows.state, found, spans=len(found), beta=rows.options["beta"],
            inverse_temperature=rows.options["inverse_temperature"])
    return found


def finish_divergence(rows: ds.DistillRows) -> None:
    """VALUE and OWN of a KL, from what the state of all spans holds; those of a JSD are there."""
    if rows.looks > 1:
        return
    total, t_total, apart = (rows.state[:, place.value] for place in (ds.TOTAL, ds.T_TOTAL, ds.VALUE))
    weighing, other = (t_total, total) if rows.forward else (total, t_total)
    value = apart / weighing - (weighing.log() - other.log())
    rows.state[:, ds.OWN.value] = -1.0 if rows.forward else value
    rows.state[:, ds.VALUE.value] = value


def slope(rows: ds.DistillRows, head: Head, columns: slice, grad) -> None:
    """dloss/du of these columns into ``grad`` (R, C), once the state and ``rows.parts`` are known."""
    part = _narrow_where_needed(head.part(columns), rows)
    _launch(_slope, triton.cdiv(len(part.weight), part.tiles.columns), rows, part, *_labels(rows, head, columns),
            rows.state, rows.parts, grad, grad.stride(0), first_id=part.first_id, beta=rows.options["beta"],
            **options_of(rows))


def _narrow_where_needed(head: Head, rows: ds.DistillRows) -> Head:
    return dataclasses.replace(head, narrow=rows.options["WITH_CE"] and head.by_descriptor)


def _labels(rows: ds.DistillRows, head: Head, columns: slice = slice(None)) -> tuple:
    return (head.x if rows.class_weight is None else rows.class_weight[columns],
            head.x if rows.labels is None else rows.labels)


def _launch(kernel, work: int, rows: ds.DistillRows, head: Head, *arguments, **options) -> None:
    teacher, has_head = head.beside, isinstance(head.beside, Head)
    has_tokens = not has_head and torch.is_tensor(rows.tokens)
    tokens = (rows.tokens, 0) if has_tokens else (head.x, 0 if has_head else rows.tokens)
    head.launch(
        kernel, work, *teacher.operands(head.tiles, head.by_descriptor), *tokens, *arguments,
        t_columns=len(teacher.weight) if has_head else teacher.columns, t_hidden=teacher.x.shape[1] if has_head else 0,
        t_scale=teacher.scale if has_head else 1.0, t_softcap=teacher.softcap if has_head else 0.0, T_HEAD=has_head,
        T_HAS_BIAS=has_head and teacher.bias is not None, T_HAS_SOFTCAP=has_head and teacher.softcap > 0,
        HAS_TOKENS=has_tokens, KIND=rows.options["KIND"], **options)
