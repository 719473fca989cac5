"""Divergence of rows of logits from a teacher, and its gradient in their place or beside them; a cross-entropy with
hard labels at temperature 1 may go with it.

With the student's and the teacher's log-probabilities log q and log p at the divergence's temperature, the terms and
slopes of ``kernels.divergences``, summed over the vocabulary, or from a sparse teacher over K + 1 buckets: its ids, and
everything else, whose masses are p_tail = 1 - sum(p) and q_tail, the sum of what is off the support. With r = q g:

    dvalue/dz_j = r_j - q_j sum(r)                                          on the support, or anywhere
    dvalue/dz_j = q_j / q_tail r_tail - q_j sum(r)                          off it
    loss = factor * value + cross-entropy, whose weight is ce_factor (see ``kernels.cross_entropy``)

See ``kernels.cross_entropy`` for the passes; a dense teacher's needs two looks, normalisers and terms. Of a forward KL,
sum(r) = -1 is known before: its terms are looked at together with the gradient, if one call does both.

``kernels.tiled`` makes the same state without logits in memory, and wants to know what the slope of each row is made
of: ``parts``, and of a sparse teacher ``slopes`` on the support.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .cross_entropy import loss_of
from .divergences import FORWARD, JSD, KINDS, divergence_terms
from .launch import row_launch, unseen
from .logits import NO_ID, load_logits, raised, store_slope, support_until

BUCKET, RENORMALISE, SUPPORT = (tl.constexpr(tail) for tail in range(3))
TAILS = {"bucket": BUCKET, "renormalise": RENORMALISE, "support": SUPPORT}
# of the state: the student (of a sparse teacher: off the support), cross-entropy, a dense teacher, its terms
TOP, TOTAL, CE_TOP, CE_TOTAL, LABEL, BELOW, WEIGHT, T_TOP, T_TOTAL, VALUE, OWN, STATE = (
    tl.constexpr(i) for i in range(12))
# of the parts that a row's slope is made of, beside those on its support
SHIFT, ON_TAIL, SLOPE, CE_SHIFT, CE_ON_E, CE_SHARP, CE_EACH, PARTS = (tl.constexpr(i) for i in range(8))


# -- the cross-entropy that goes with it


@triton.jit
def _look_at_labels(
    c, at, mask, class_weight_ptr, offsets, top, sums, c_y, belows, weights, SMOOTH: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
):
    """A block's part of the statistics."""
    before = top
    top, shift = raised(top, c)
    if SMOOTH:
        rise = tl.where(before == -float("inf"), 0.0, top - before)
        a = tl.where(mask, 1.0, 0.0)
        if HAS_CLASS_WEIGHT:
            a *= tl.load(class_weight_ptr + offsets, mask=mask, other=0.0)
        belows += weights * rise + tl.where(a != 0, a * (top - c), 0.0)
        weights += a
    sums = sums * tl.exp(before - shift) + tl.exp(c - shift)
    c_y = tl.where(tl.max(at.to(tl.int32), 0) > 0, tl.sum(tl.where(at, c, 0.0), 0), c_y)
    return top, sums, c_y, belows, weights


@triton.jit
def _label_loss(
    row, top, total, c_y, below, weight, label_weight_ptr, label_smoothing, vocab, z_loss, factor,
    HAS_LABELS: tl.constexpr, HAS_LABEL_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr,
):
    log_total = tl.log(total)
    lse = top + log_total
    nll = top - c_y + log_total if HAS_LABELS else 0.0
    label_weight = tl.load(label_weight_ptr + row) if HAS_LABEL_WEIGHT else 1.0
    mass = 1.0 if HAS_LABELS else 0.0
    loss, on_q, sharp, each = loss_of(
        nll, mass, lse, below + weight * log_total, weight, label_weight, label_smoothing, vocab, z_loss, factor,
        SMOOTH)
    return loss, nll, lse, on_q, sharp * mass, each


@triton.jit
def label_slope(
    c, at, mask, class_weight_ptr, offsets, top, on_e, sharp, each, SMOOTH: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
):
    """``on_e e^(c - top)``, at a label less ``sharp``, with smoothing less ``each`` of the class weights."""
    g = on_e * tl.exp(c - top) - tl.where(at, sharp, 0.0)
    if SMOOTH:
        g -= each * (tl.load(class_weight_ptr + offsets, mask=mask, other=0.0) if HAS_CLASS_WEIGHT else 1.0)
    return g


@triton.jit
def _store_label_parts(parts_ptr, row_scale, top, total, on_q, sharp, each):
    tl.store(parts_ptr + CE_SHIFT, top)
    tl.store(parts_ptr + CE_ON_E, row_scale * (on_q / total))
    tl.store(parts_ptr + CE_SHARP, row_scale * sharp)
    tl.store(parts_ptr + CE_EACH, row_scale * each)


# -- a sparse teacher


@triton.jit
def _sparse_rows(
    x_ptr, x_stride, grad_ptr, grad_stride,         # (N, C)
    tokens_ptr, first_token,                        # (R,) int64: places of the rows; without: one after the other
    bias_ptr, class_weight_ptr,                     # (C,)
    ids_ptr, weights_ptr, slopes_ptr,               # (R, K); the slopes are made here
    parts_ptr,                                      # (R, PARTS); made here
    labels_ptr, label_weight_ptr, row_scale_ptr,    # (R,)
    state_ptr,                                      # (R, STATE + K)
    results_ptr, results_stride,                    # (4, R) loss, divergence, nll, lse
    columns, first_id, vocab, scale, softcap, inverse_temperature, beta, factor, reported, label_smoothing, z_loss,
    ce_factor,
    KIND: tl.constexpr, TAIL: tl.constexpr, LOOK: tl.constexpr, FINISH: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_PARTS: tl.constexpr, CARRY: tl.constexpr, BY_TOKEN: tl.constexpr, HAS_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_LABEL_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, NARROWED: tl.constexpr, HELD: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row) if HAS_TOKENS else row + first_token
    place = token if BY_TOKEN else row
    x_ptr += place * x_stride
    grad_ptr += place * grad_stride
    ids_ptr += row * K
    weights_ptr += row * K
    slopes_ptr += row * K
    state_ptr += row * (STATE + K)
    lanes = tl.arange(0, BLOCK_V)
    NEVER: tl.constexpr = -float("inf")

    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + k, mask=k < K, other=NO_ID)
    w = tl.load(weights_ptr + k, mask=k < K, other=0.0)
    used = w > 0
    y = tl.load(labels_ptr + row) if HAS_LABELS else tl.full([], -1, tl.int64)
    z_k = tl.full([BLOCK_K], float("nan"), tl.float32)         # an id that nobody has makes the loss NaN
    top = tl.full([], NEVER, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    ce_top, ce_total, below, weight = top, total, total, total
    c_y = tl.full([], float("nan"), tl.float32)
    if CARRY:
        z_k = tl.load(state_ptr + STATE + k, mask=k < K, other=0.0)
        top = tl.load(state_ptr + TOP)
        total = tl.load(state_ptr + TOTAL)
        if WITH_CE:
            ce_top = tl.load(state_ptr + CE_TOP)
            ce_total = tl.load(state_ptr + CE_TOTAL)
            c_y = tl.load(state_ptr + LABEL)
            below = tl.load(state_ptr + BELOW)
            weight = tl.load(state_ptr + WEIGHT)

    if LOOK:
        inside = used & (ids >= first_id) & (ids < first_id + columns)
        at_k = tl.where(inside, ids - first_id, 0)
        found = load_logits(x_ptr, bias_ptr, at_k, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP) * inverse_temperature
        z_k = tl.where(inside, found, z_k)
        sums = tl.where(lanes == 0, total, 0.0)
        ce_sums = tl.where(lanes == 0, ce_total, 0.0)
        belows = tl.where(lanes == 0, below, 0.0)
        weights = tl.where(lanes == 0, weight, 0.0)
        next_k, next_id = 0, tl.load(ids_ptr)
        if HELD:
            c = sums
        for start in range(0, columns, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            if WITH_CE:
                ce_top, ce_sums, c_y, belows, weights = _look_at_labels(
                    c, (first_id + offsets == y) & mask, mask, class_weight_ptr, offsets, ce_top, ce_sums, c_y, belows,
                    weights, SMOOTH, HAS_CLASS_WEIGHT)
            if TAIL != SUPPORT:     # the sum is of what is off the support
                on, next_k, next_id = support_until(
                    ids_ptr, weights_ptr, next_k, next_id, first_id + start + BLOCK_V, first_id + offsets, K)
                z = tl.where(on > 0, NEVER, c * inverse_temperature)
                before = top
                top, shift = raised(top, z)
                sums = sums * tl.exp(before - shift) + tl.exp(z - shift)
        total = tl.sum(sums, 0)
        if WITH_CE:
            ce_total = tl.sum(ce_sums, 0)
            below = tl.sum(belows, 0)
            weight = tl.sum(weights, 0)
        if not FINISH:
            tl.store(state_ptr + STATE + k, z_k, mask=k < K)
            tl.store(state_ptr + TOP, top)
            tl.store(state_ptr + TOTAL, total)
            if WITH_CE:
                tl.store(state_ptr + CE_TOP, ce_top)
                tl.store(state_ptr + CE_TOTAL, ce_total)
                tl.store(state_ptr + LABEL, c_y)
                tl.store(state_ptr + BELOW, below)
                tl.store(state_ptr + WEIGHT, weight)

    if FINISH:
        mass = tl.sum(w, 0)
        p_tail = total * 0.0
        if TAIL == BUCKET:
            p = w
            some_off = tl.sum(used.to(tl.int32), 0) < vocab
            p_tail = tl.where(some_off, tl.maximum(1 - mass, 0.0), 0.0)
        else:
            p = w / tl.where(mass > 0, mass, 1.0)
        z_used = tl.where(used, z_k, NEVER)
        if TAIL == SUPPORT:
            whole_top, shift = raised(tl.full([], NEVER, tl.float32), z_used)
            whole_total = tl.sum(tl.exp(z_used - shift), 0)
            log_q_tail = tl.full([], NEVER, tl.float32)
        else:
            whole_top, shift = raised(top, z_used)
            whole_total = total * tl.exp(top - shift) + tl.sum(tl.exp(z_used - shift), 0)
            log_q_tail = tl.where(
                tl.sum(used.to(tl.int32), 0) < vocab, top - whole_top + (tl.log(total) - tl.log(whole_total)), NEVER)
        log_q = tl.where(used, z_k - whole_top - tl.log(whole_total), NEVER)
        values, pulls = divergence_terms(tl.log(p), log_q, beta, KIND)
        value, pull_tail = divergence_terms(tl.log(p_tail), log_q_tail, beta, KIND)
        value += tl.sum(values, 0)
        own = tl.sum(pulls, 0) + pull_tail
        ignored = mass == 0
        value = tl.where(ignored, 0.0, value)
        own = tl.where(ignored, 0.0, own)
        pull_tail = tl.where(ignored, 0.0, pull_tail)
        loss = factor * value
        tl.store(results_ptr + results_stride + row, reported * value)
        if WITH_CE:
            ce_loss, nll, lse, on_q, sharp, each = _label_loss(
                row, ce_top, ce_total, c_y, below, weight, label_weight_ptr, label_smoothing, vocab, z_loss, ce_factor,
                HAS_LABELS, HAS_LABEL_WEIGHT, SMOOTH)
            loss += ce_loss
            tl.store(results_ptr + 2 * results_stride + row, nll)
            tl.store(results_ptr + 3 * results_stride + row, lse)
        tl.store(results_ptr + row, loss)

    if GRADIENT or HAS_PARTS:
        slopes = tl.where(ignored, 0.0, pulls - tl.exp(log_q) * own)
        tl.store(slopes_ptr + k, slopes, mask=k < K)
        tl.debug_barrier()          # all threads read all of them
        row_scale = tl.load(row_scale_ptr + row)
        slope = row_scale * factor * inverse_temperature
        # q_j / q_tail r_tail - q_j sum(r), of exponentials relative to the largest off the support
        _, shift = raised(top, tl.full([1], NEVER, tl.float32))
        q_tail = tl.exp(log_q_tail)
        on_tail = tl.where(total > 0, (pull_tail - q_tail * own) / total, 0.0) if TAIL != SUPPORT else 0.0
        if HAS_PARTS:
            parts_ptr += row * PARTS
            tl.store(parts_ptr + SHIFT, shift)
            tl.store(parts_ptr + ON_TAIL, slope * on_tail)
            tl.store(parts_ptr + SLOPE, slope)
            if WITH_CE:
                _store_label_parts(parts_ptr, row_scale, ce_top, ce_total, on_q, sharp, each)
    if GRADIENT:
        next_k, next_id = 0, tl.load(ids_ptr)
        for start in range(0, columns, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            if not (HELD and LOOK):
                c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            last = first_id + start + BLOCK_V
            before_k, before_id = next_k, next_id
            on, _k, _id = support_until(ids_ptr, weights_ptr, before_k, before_id, last, first_id + offsets, K)
            g, next_k, next_id = support_until(ids_ptr, slopes_ptr, next_k, next_id, last, first_id + offsets, K)
            if TAIL != SUPPORT:
                g = tl.where(on > 0, g, on_tail * tl.exp(c * inverse_temperature - shift))
            g *= slope
            if WITH_CE:
                g += row_scale * label_slope(
                    c, first_id + offsets == y, mask, class_weight_ptr, offsets, ce_top, on_q / ce_total, sharp, each,
                    SMOOTH, HAS_CLASS_WEIGHT)
            g *= scale
            store_slope(grad_ptr, offsets, g, c, softcap, mask, HAS_SOFTCAP, NARROWED)


# -- a dense teacher


@triton.jit
def _dense_rows(
    x_ptr, x_stride, grad_ptr, grad_stride,         # (N, C)
    t_ptr, t_stride,                                # (N, C') the teacher's
    tokens_ptr, first_token,                        # (R,) int64: places of the rows; without: one after the other
    bias_ptr, class_weight_ptr, t_bias_ptr,         # (C,), (C,), (C',)
    parts_ptr,                                      # (R, PARTS); made here
    labels_ptr, label_weight_ptr, row_scale_ptr,    # (R,)
    state_ptr,                                      # (R, STATE)
    results_ptr, results_stride,                    # (4, R) loss, divergence, nll, lse
    columns, t_columns, first_id, vocab, scale, softcap, t_scale, t_softcap, inverse_temperature, beta, factor,
    reported, label_smoothing, z_loss, ce_factor,
    KIND: tl.constexpr, LOOK: tl.constexpr, TERMS: tl.constexpr, FINISH: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_PARTS: tl.constexpr, CARRY: tl.constexpr, BY_TOKEN: tl.constexpr, T_BY_TOKEN: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, T_HAS_BIAS: tl.constexpr,
    T_HAS_SOFTCAP: tl.constexpr, WITH_CE: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_LABEL_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, NARROWED: tl.constexpr, HELD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row) if HAS_TOKENS else row + first_token
    place = token if BY_TOKEN else row
    x_ptr += place * x_stride
    grad_ptr += place * grad_stride
    t_ptr += (token if T_BY_TOKEN else row) * t_stride
    state_ptr += row * STATE
    lanes = tl.arange(0, BLOCK_V)
    NEVER: tl.constexpr = -float("inf")
    extent = tl.maximum(columns, t_columns)
    TOGETHER: tl.constexpr = TERMS and FINISH and GRADIENT and KIND == FORWARD

    y = tl.load(labels_ptr + row) if HAS_LABELS else tl.full([], -1, tl.int64)
    top = tl.full([], NEVER, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    t_top, ce_top, t_total, ce_total, below, weight, value, own = top, top, total, total, total, total, total, total
    c_y = tl.full([], float("nan"), tl.float32)
    if CARRY:
        top = tl.load(state_ptr + TOP)
        total = tl.load(state_ptr + TOTAL)
        t_top = tl.load(state_ptr + T_TOP)
        t_total = tl.load(state_ptr + T_TOTAL)
        value = tl.load(state_ptr + VALUE)
        own = tl.load(state_ptr + OWN)
        if WITH_CE:
            ce_top = tl.load(state_ptr + CE_TOP)
            ce_total = tl.load(state_ptr + CE_TOTAL)
            c_y = tl.load(state_ptr + LABEL)
            below = tl.load(state_ptr + BELOW)
            weight = tl.load(state_ptr + WEIGHT)

    if LOOK:
        sums = tl.where(lanes == 0, total, 0.0)
        t_sums = tl.where(lanes == 0, t_total, 0.0)
        ce_sums = tl.where(lanes == 0, ce_total, 0.0)
        belows = tl.where(lanes == 0, below, 0.0)
        weights = tl.where(lanes == 0, weight, 0.0)
        if HELD:
            c, t = sums, sums
        for start in range(0, extent, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            if WITH_CE:
                ce_top, ce_sums, c_y, belows, weights = _look_at_labels(
                    c, (first_id + offsets == y) & mask, mask, class_weight_ptr, offsets, ce_top, ce_sums, c_y, belows,
                    weights, SMOOTH, HAS_CLASS_WEIGHT)
            z = c * inverse_temperature
            before = top
            top, shift = raised(top, z)
            sums = sums * tl.exp(before - shift) + tl.exp(z - shift)
            t_mask = offsets < t_columns
            t = load_logits(t_ptr, t_bias_ptr, offsets, t_mask, t_scale, t_softcap, T_HAS_BIAS, T_HAS_SOFTCAP)
            t_z = t * inverse_temperature
            before = t_top
            t_top, shift = raised(t_top, t_z)
            t_sums = t_sums * tl.exp(before - shift) + tl.exp(t_z - shift)
        total = tl.sum(sums, 0)
        t_total = tl.sum(t_sums, 0)
        if WITH_CE:
            ce_total = tl.sum(ce_sums, 0)
            below = tl.sum(belows, 0)
            weight = tl.sum(weights, 0)
        if not FINISH:
            tl.store(state_ptr + TOP, top)
            tl.store(state_ptr + TOTAL, total)
            tl.store(state_ptr + T_TOP, t_top)
            tl.store(state_ptr + T_TOTAL, t_total)
            if WITH_CE:
                tl.store(state_ptr + CE_TOP, ce_top)
                tl.store(state_ptr + CE_TOTAL, ce_total)
                tl.store(state_ptr + LABEL, c_y)
                tl.store(state_ptr + BELOW, below)
                tl.store(state_ptr + WEIGHT, weight)

    log_total, t_log_total = tl.log(total), tl.log(t_total)
    values = tl.where(lanes == 0, value, 0.0)
    if TERMS and not TOGETHER:
        owns = tl.where(lanes == 0, own, 0.0)
        for start in range(0, extent, BLOCK_V):
            offsets = start + lanes
            mask, t_mask = offsets < columns, offsets < t_columns
            if not (HELD and LOOK):
                c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
                t = load_logits(t_ptr, t_bias_ptr, offsets, t_mask, t_scale, t_softcap, T_HAS_BIAS, T_HAS_SOFTCAP)
            found, pulls = divergence_terms(
                t * inverse_temperature - t_top - t_log_total, c * inverse_temperature - top - log_total, beta, KIND)
            values += tl.where(offsets < extent, found, 0.0)
            owns += tl.where(offsets < extent, pulls, 0.0)
        value = tl.sum(values, 0)
        own = tl.sum(owns, 0)
        if not FINISH:
            tl.store(state_ptr + VALUE, value)
            tl.store(state_ptr + OWN, own)

    ce_loss = 0.0
    if FINISH:
        if WITH_CE:
            ce_loss, nll, lse, on_q, sharp, each = _label_loss(
                row, ce_top, ce_total, c_y, below, weight, label_weight_ptr, label_smoothing, vocab, z_loss, ce_factor,
                HAS_LABELS, HAS_LABEL_WEIGHT, SMOOTH)
            tl.store(results_ptr + 2 * results_stride + row, nll)
            tl.store(results_ptr + 3 * results_stride + row, lse)

    if GRADIENT or HAS_PARTS:
        row_scale = tl.load(row_scale_ptr + row)
        slope = row_scale * factor * inverse_temperature
    if HAS_PARTS:
        parts_ptr += row * PARTS
        tl.store(parts_ptr + SLOPE, slope)
        if WITH_CE:
            _store_label_parts(parts_ptr, row_scale, ce_top, ce_total, on_q, sharp, each)
    if GRADIENT:
        if TOGETHER:
            own = -1.0
        for start in range(0, extent if TOGETHER else columns, BLOCK_V):
            offsets = start + lanes
            mask, t_mask = offsets < columns, offsets < t_columns
            if not (HELD and LOOK):
                c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
                t = load_logits(t_ptr, t_bias_ptr, offsets, t_mask, t_scale, t_softcap, T_HAS_BIAS, T_HAS_SOFTCAP)
            log_q = c * inverse_temperature - top - log_total
            found, pulls = divergence_terms(t * inverse_temperature - t_top - t_log_total, log_q, beta, KIND)
            if TOGETHER:
                values += tl.where(offsets < extent, found, 0.0)
            g = slope * (pulls - tl.exp(log_q) * own)
            if WITH_CE:
                g += row_scale * label_slope(
                    c, first_id + offsets == y, mask, class_weight_ptr, offsets, ce_top, on_q / ce_total, sharp, each,
                    SMOOTH, HAS_CLASS_WEIGHT)
            g *= scale
            store_slope(grad_ptr, offsets, g, c, softcap, mask, HAS_SOFTCAP, NARROWED)

    if FINISH:
        if TOGETHER:
            value = tl.sum(values, 0)
        tl.store(results_ptr + results_stride + row, reported * value)
        tl.store(results_ptr + row, factor * value + ce_loss)


class DistillRows:
    """The rows of one chunk: results (4, R). ``ids`` and ``weights`` (R, K) of a sparse teacher, as ``support.merged``
    has them, or None: then ``run`` is given the teacher's outputs. ``labels`` (R,) int64 or None; without ``with_ce``
    there is no cross-entropy, nll and lse are 0. The rest as in ``kernels.cross_entropy.CrossEntropyRows``."""

    def __init__(
        self, count, ids, weights, labels, class_weight, label_weight, row_scale, tokens, device, *, vocab, divergence,
        beta, temperature, temperature_squared, tail, ce_weight, with_ce, label_smoothing=0.0, z_loss=0.0,
    ):
        if divergence == "jsd" and beta in (0, 1):
            divergence = "reverse_kl" if beta else "forward_kl"
        reported = temperature**2 if temperature_squared else 1.0
        self.count, self.ids, self.weights, self.labels, self.class_weight = count, ids, weights, labels, class_weight
        self.label_weight, self.row_scale, self.tokens = label_weight, row_scale, tokens
        self.tail = TAILS[tail].value
        self.options = {
            "vocab": vocab, "inverse_temperature": 1 / temperature, "beta": float(beta), "reported": float(reported),
            "factor": float((1 - ce_weight) * reported), "label_smoothing": label_smoothing, "z_loss": z_loss,
            "ce_factor": ce_weight, "KIND": KINDS[divergence].value, "WITH_CE": with_ce,
            "HAS_LABELS": labels is not None, "HAS_CLASS_WEIGHT": class_weight is not None,
            "HAS_LABEL_WEIGHT": label_weight is not None, "SMOOTH": with_ce and label_smoothing > 0}
        self.results = torch.zeros(4, count, dtype=torch.float32, device=device)
        self.state = self.parts = self.slopes = None

    @property
    def forward(self) -> bool:
        return self.options["KIND"] == FORWARD.value

    @property
    def looks(self) -> int:
        """At a dense teacher's tiles, before the gradient: the terms of a JSD want to know both normalisers."""
        return 2 if self.options["KIND"] == JSD.value else 1

    def run(
        self, x, grad, bias=None, column=0, first_id=0, *, scale=1.0, softcap=0.0, by_token=False, look=True,
        finish=True, step=0, teacher=None,
    ):
        """``teacher``: keyword arguments of a dense one, see ``_dense``. Two looks, ``step`` 0 and 1, then."""
        carry = not (look and finish)
        k = 0 if self.ids is None else self.ids.shape[1]
        if carry and self.state is None:
            self.state = unseen(
                self.count, STATE.value + k, maxima=(TOP.value, CE_TOP.value, T_TOP.value),
                absent=(LABEL.value, slice(STATE.value, None)), device=x.device)
        has_tokens = torch.is_tensor(self.tokens)
        place = x if grad is None else grad

        def given(tensor):
            return x if tensor is None else tensor

        outputs = (x, x.stride(0), place, place.stride(0))
        tokens = (self.tokens, 0) if has_tokens else (x, self.tokens)
        class_weight = given(self.class_weight)[column:] if self.class_weight is not None else x
        rows = (given(self.parts), given(self.labels), given(self.label_weight), given(self.row_scale),
                given(self.state), self.results, self.results.stride(0))
        common = {
            **self.options, "scale": scale, "softcap": softcap, "FINISH": finish, "GRADIENT": grad is not None,
            "HAS_PARTS": self.parts is not None, "CARRY": carry, "BY_TOKEN": by_token, "HAS_TOKENS": has_tokens,
            "HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap > 0,
            "NARROWED": grad is not None and grad.dtype.itemsize < x.dtype.itemsize}
        held = 4 if softcap > 0 or self.options["WITH_CE"] else 2
        if teacher is None:
            slopes = torch.empty_like(self.weights) if grad is not None else given(self.slopes)
            row_launch(
                _sparse_rows, "distill", self.count, x, *outputs, *tokens, given(bias), class_weight, self.ids,
                self.weights, slopes, *rows, x.shape[1], first_id, **common, TAIL=self.tail, LOOK=look, K=k,
                BLOCK_K=triton.next_power_of_2(k), held=held)
        else:
            self._dense(outputs, tokens, given(bias), class_weight, rows, x, first_id, look, finish, step, common, held,
                        **teacher)

    def _dense(
        self, outputs, tokens, bias, class_weight, rows, x, first_id, look, finish, step, common, held, *, t, t_bias,
        t_scale, t_softcap, t_by_token,
    ):
        """Of the teacher's raw outputs ``t``: (R, C') of the same columns, or by token (N, C')."""
        row_launch(
            _dense_rows, "distill_dense_labels" if self.options["WITH_CE"] else "distill_dense", self.count,
            t if t.shape[1] > x.shape[1] else x, *outputs, t, t.stride(0),
            *tokens, bias, class_weight, t if t_bias is None else t_bias, *rows, x.shape[1], t.shape[1], first_id,
            **common,
            t_scale=t_scale, t_softcap=t_softcap, LOOK=look and (finish or step == 0),
            TERMS=look and (finish or step == 1), T_BY_TOKEN=t_by_token, T_HAS_BIAS=t_bias is not None,
            T_HAS_SOFTCAP=t_softcap > 0, held=4 if t_softcap > 0 else held)
