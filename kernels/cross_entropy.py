"""Cross-entropy of rows of logits, with its gradient in their place or beside them.

With logits z = softcap * tanh(scale * (x + bias) / softcap) / temperature, a row's targets w on ids a, S = sum(w), and
class weights c:

    nll  = sum_k w_k (m - z[a_k]) + S log(sum_j exp(z_j - m))        m = max z: right under a large common offset
    loss = factor * (c_y (1 - eps) nll + eps / V sum_j c_j (lse - z_j)) + z_loss lse^2
    dloss/dz_j = q_j on_q - factor * (c_y (1 - eps) w_j + eps / V c_j),   q = softmax(z)

A bucket adds p_tail = 1 - S on all other ids together: p_tail (lse - lse_off) to nll, -p_tail exp(z_j - lse_off) off
the support. Class probabilities d take the place of w: c_j ((1 - eps) d_j + eps / V), not c_y w_j and eps / V c_j.

One program has one row, in blocks of columns: it looks at all of them, and once more for the gradient, and for the
softmax mass of each tile if that is filtered. Of a row that is one block it keeps the logits (``HELD``). If the columns
come in tiles, or from several ranks, what was seen so far waits in ``state``. ``kernels.tiled`` makes the same state
without logits in memory, and wants to know of each row what its slope is made of: ``slopes``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import row_launch, unseen
from .logits import NO_ID, load_logits, raised, store_slope, support_until

TOP, TOTAL, PEAK, BELOW, WEIGHT, PLAIN, PLAIN_WEIGHT, STATE = (tl.constexpr(i) for i in range(8))
SHIFT, ON_Q, SHARP, EACH, OFF_SHIFT, OFF_SLOPE, FACTOR, SLOPES = (tl.constexpr(i) for i in range(8))


@triton.jit
def _target_weights(dense_ptr, class_weight_ptr, offsets, mask, sharp, each, HAS_CLASS_WEIGHT: tl.constexpr):
    """c_j (sharp d_j + each)."""
    a = sharp * tl.load(dense_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + each
    if HAS_CLASS_WEIGHT:
        a *= tl.load(class_weight_ptr + offsets, mask=mask, other=0.0)
    return a


@triton.jit
def each_of(class_weight_ptr, offsets, mask, each, SMOOTH: tl.constexpr, HAS_CLASS_WEIGHT: tl.constexpr):
    """What smoothing takes off the slope of some columns."""
    if not SMOOTH:
        each_j = 0.0
    elif HAS_CLASS_WEIGHT:
        each_j = each * tl.load(class_weight_ptr + offsets, mask=mask, other=0.0)
    else:
        each_j = each
    return each_j


@triton.jit
def loss_of(
    nll, mass, lse, spread, weight, label_weight, label_smoothing, vocab, z_loss, factor, SMOOTH: tl.constexpr,
):
    """The loss, what q_j is multiplied by in its slope, and what targets and class weights are that come off. With
    smoothing, ``spread`` is sum_j c_j (lse - z_j) and ``weight`` sum_j c_j."""
    sharp = (1 - label_smoothing) * label_weight
    loss = sharp * nll
    on_q = sharp * mass
    each = 0.0
    if SMOOTH:
        each = label_smoothing / vocab
        loss += each * spread
        on_q += each * weight
    return factor * loss + z_loss * lse * lse, factor * on_q + 2 * z_loss * lse, factor * sharp, factor * each


@triton.jit
def slope_of(z, on, each, shift, on_q, sharp, off_shift, off_slope, BUCKET: tl.constexpr):
    """``on_q e^(z - shift) - sharp on - each``, dloss/dz before the factor of its row: ``on`` are the targets' weights,
    and with a bucket what is off the support has ``- off_slope e^(z - off_shift)``."""
    g = on_q * tl.exp(z - shift) - sharp * on - each
    if BUCKET:
        g -= tl.where(on > 0, 0.0, off_slope * tl.exp(z - off_shift))
    return g


@triton.jit
def _store_masses(masses_ptr, start, columns, q, TILE: tl.constexpr, BLOCK_V: tl.constexpr):
    """The sums of q (BLOCK_V,) over tiles; of a block that is smaller than a tile, there is one."""
    WIDTH: tl.constexpr = TILE if TILE < BLOCK_V else BLOCK_V
    tile = start // TILE + tl.arange(0, BLOCK_V // WIDTH)
    mass = tl.sum(tl.reshape(q, [BLOCK_V // WIDTH, WIDTH]), 1)
    tl.store(masses_ptr + tile, mass, mask=tile * TILE < columns)


@triton.jit
def _rows(
    x_ptr, x_stride, grad_ptr, grad_stride,         # (N, C)
    tokens_ptr, first_token,                        # (R,) int64: places of the rows; without: one after the other
    bias_ptr, class_weight_ptr,                     # (C,)
    dense_ptr, dense_stride,                        # (N, C) class probabilities, by token
    ids_ptr, weights_ptr, label_weight_ptr, row_scale_ptr,      # (R, K), (R, K), (R,), (R,)
    state_ptr,                                      # (R, STATE + K)
    slopes_ptr,                                     # (R, SLOPES)
    results_ptr, results_stride,                    # (3, R) loss, nll, lse
    masses_ptr, masses_stride,                      # (R, tiles) sums of q over TILE columns; without: TILE is 0
    columns, first_id, vocab, scale, softcap, inverse_temperature, label_smoothing, z_loss, factor,
    LOOK: tl.constexpr, FINISH: tl.constexpr, GRADIENT: tl.constexpr, CARRY: tl.constexpr, HAS_SLOPES: tl.constexpr,
    BY_TOKEN: tl.constexpr, HAS_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_LABEL_WEIGHT: tl.constexpr, DENSE: tl.constexpr, HARD: tl.constexpr,
    BUCKET: tl.constexpr, SMOOTH: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NARROWED: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row) if HAS_TOKENS else row + first_token
    place = token if BY_TOKEN else row
    x_ptr += place * x_stride
    grad_ptr += place * grad_stride
    dense_ptr += token * dense_stride
    ids_ptr += row * K
    weights_ptr += row * K
    state_ptr += row * (STATE + K)
    lanes = tl.arange(0, BLOCK_V)
    NEVER: tl.constexpr = -float("inf")

    # the targets' logits, which a block may not know before it is overwritten
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + k, mask=k < K, other=NO_ID)
    if HARD:
        w = tl.where(k < K, 1.0, 0.0)
    elif DENSE:
        w = tl.where(k < K, 0.0, 0.0)
    else:
        w = tl.load(weights_ptr + k, mask=k < K, other=0.0)
    used = w > 0
    z_k = tl.full([BLOCK_K], float("nan"), tl.float32)         # an id that nobody has makes the loss NaN
    if CARRY:
        z_k = tl.load(state_ptr + STATE + k, mask=k < K, other=0.0)
    if LOOK:
        inside = used & (ids >= first_id) & (ids < first_id + columns)
        at = tl.where(inside, ids - first_id, 0)
        found = load_logits(x_ptr, bias_ptr, at, inside, scale, softcap, HAS_BIAS, HAS_SOFTCAP) * inverse_temperature
        z_k = tl.where(inside, found, z_k)

    top = tl.full([], NEVER, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    peak, below, weight, plain, plain_weight = top, total, total, total, total
    if CARRY:
        top = tl.load(state_ptr + TOP)
        total = tl.load(state_ptr + TOTAL)
        if SMOOTH:
            peak = tl.load(state_ptr + PEAK)
            below = tl.load(state_ptr + BELOW)
            weight = tl.load(state_ptr + WEIGHT)
            plain = tl.load(state_ptr + PLAIN)
            plain_weight = tl.load(state_ptr + PLAIN_WEIGHT)

    if LOOK:
        top_before, peak_before = top, peak
        sums = tl.zeros([BLOCK_V], tl.float32)
        below_sums, weights, plain_sums, plain_weights = sums, sums, sums, sums
        if HELD:
            c = sums
        next_k, next_id = 0, tl.load(ids_ptr)
        for start in range(0, columns, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            z = c * inverse_temperature
            if SMOOTH:
                before = peak
                peak, shift = raised(peak, z)
                rise = tl.where(before == NEVER, 0.0, peak - before)
                below_sums += weights * rise
                a = tl.where(mask, 1.0, 0.0)
                if DENSE:
                    d = tl.load(dense_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                    plain_sums += plain_weights * rise + tl.where(d != 0, d * (peak - z), 0.0)
                    plain_weights += d
                    a = tl.where(mask, (1 - label_smoothing) * d + label_smoothing / vocab, 0.0)
                if HAS_CLASS_WEIGHT:
                    a *= tl.load(class_weight_ptr + offsets, mask=mask, other=0.0)
                below_sums += tl.where(a != 0, a * (peak - z), 0.0)
                weights += a
            if BUCKET:          # the sum is of what is off the support
                on, next_k, next_id = support_until(
                    ids_ptr, weights_ptr, next_k, next_id, first_id + start + BLOCK_V, first_id + offsets, K)
                z = tl.where(on > 0, NEVER, z)
            before = top
            top, shift = raised(top, z)
            sums = sums * tl.exp(before - shift) + tl.exp(z - shift)
        _, shift = raised(top, tl.full([1], NEVER, tl.float32))
        total = total * tl.exp(top_before - shift) + tl.sum(sums, 0)
        if SMOOTH:
            rise = tl.where(peak_before == NEVER, 0.0, peak - peak_before)
            below += weight * rise + tl.sum(below_sums, 0)
            weight += tl.sum(weights, 0)
            plain += plain_weight * rise + tl.sum(plain_sums, 0)
            plain_weight += tl.sum(plain_weights, 0)
        if not FINISH:
            tl.store(state_ptr + TOP, top)
            tl.store(state_ptr + TOTAL, total)
            tl.store(state_ptr + STATE + k, z_k, mask=k < K)
            if SMOOTH:
                tl.store(state_ptr + PEAK, peak)
                tl.store(state_ptr + BELOW, below)
                tl.store(state_ptr + WEIGHT, weight)
                tl.store(state_ptr + PLAIN, plain)
                tl.store(state_ptr + PLAIN_WEIGHT, plain_weight)

    if FINISH:
        mass = tl.sum(tl.where(used, w, 0.0), 0)
        off_top, off_total = top, total
        p_tail = tl.full([], 0.0, tl.float32)
        if BUCKET:
            z_used = tl.where(used, z_k, NEVER)
            top, shift = raised(top, z_used)
            total = total * tl.exp(off_top - shift) + tl.sum(tl.exp(z_used - shift), 0)
            some_off = tl.sum(used.to(tl.int32), 0) < vocab
            p_tail = tl.where(some_off, tl.maximum(1 - mass, 0.0), 0.0)
        log_total = tl.log(total)
        lse = top + log_total
        if DENSE:
            nll = plain + plain_weight * log_total
            loss = factor * (below + weight * log_total) + z_loss * lse * lse
            on_q = factor * weight + 2 * z_loss * lse
            sharp = factor * (1 - label_smoothing)
            each = factor * label_smoothing / vocab
        else:
            nll = tl.sum(tl.where(used, w * (top - z_k), 0.0), 0) + mass * log_total
            if BUCKET:
                nll += tl.where(p_tail > 0, p_tail * (top - off_top + (log_total - tl.log(off_total))), 0.0)
            label_weight = tl.load(label_weight_ptr + row) if HAS_LABEL_WEIGHT else 1.0
            loss, on_q, sharp, each = loss_of(
                nll, mass + p_tail, lse, below + weight * (top - peak) + weight * log_total, weight, label_weight,
                label_smoothing, vocab, z_loss, factor, SMOOTH)
        tl.store(results_ptr + row, loss)
        tl.store(results_ptr + results_stride + row, nll)
        tl.store(results_ptr + 2 * results_stride + row, lse)

    if GRADIENT or HAS_SLOPES or TILE > 0:
        _, shift = raised(top, tl.full([1], NEVER, tl.float32))
        masses_ptr += row * masses_stride
        on_e = on_q / total
        slope = (tl.load(row_scale_ptr + row) if GRADIENT or HAS_SLOPES else 0.0) * inverse_temperature
        off_shift, off_slope = 0.0, 0.0
        if BUCKET:
            _, off_shift = raised(off_top, tl.full([1], NEVER, tl.float32))
            off_slope = tl.where(p_tail > 0, sharp * p_tail / off_total, 0.0)
        if HAS_SLOPES:
            slopes_ptr += row * SLOPES
            tl.store(slopes_ptr + SHIFT, shift)
            tl.store(slopes_ptr + ON_Q, on_e)
            tl.store(slopes_ptr + SHARP, sharp)
            tl.store(slopes_ptr + EACH, each)
            tl.store(slopes_ptr + OFF_SHIFT, off_shift)
            tl.store(slopes_ptr + OFF_SLOPE, off_slope)
            tl.store(slopes_ptr + FACTOR, slope)
        next_k, next_id = 0, tl.load(ids_ptr)
        for start in range(0, columns, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            if not (HELD and LOOK):
                c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            z = c * inverse_temperature
            if TILE > 0:
                _store_masses(masses_ptr, start, columns, tl.exp(z - shift) / total, TILE, BLOCK_V)
            if GRADIENT:
                if DENSE:
                    g = on_e * tl.exp(z - shift) - _target_weights(
                        dense_ptr, class_weight_ptr, offsets, mask, sharp, each, HAS_CLASS_WEIGHT)
                else:
                    if HARD:
                        on = tl.where(first_id + offsets == next_id, 1.0, 0.0)
                    else:
                        on, next_k, next_id = support_until(
                            ids_ptr, weights_ptr, next_k, next_id, first_id + start + BLOCK_V, first_id + offsets, K)
                    each_j = each_of(class_weight_ptr, offsets, mask, each, SMOOTH, HAS_CLASS_WEIGHT)
                    g = slope_of(z, on, each_j, shift, on_e, sharp, off_shift, off_slope, BUCKET)
                g *= slope * scale
                store_slope(grad_ptr, offsets, g, c, softcap, mask, HAS_SOFTCAP, NARROWED)


class CrossEntropyRows:
    """The rows of one chunk: what is known of their targets, their results (3, R), and what has been seen of them.

    ``ids`` (R, K) int64 with ``weights`` (R, K) float32 as ``support.merged`` has them, or hard labels (R, 1) with
    None; or ``dense`` (N, C) class probabilities. ``class_weight`` (C,) float32, ``label_weight`` and ``row_scale``
    (R,) float32. ``tokens`` (R,) int64 are the places of the rows among all N, or the first of R that follow each
    other. The gradient is that of ``(row_scale * loss).sum()``. ``vocab`` counts the ids of all ranks.
    """

    def __init__(
        self, ids, weights, dense, class_weight, label_weight, row_scale, tokens, *, vocab, temperature=1.0,
        label_smoothing=0.0, z_loss=0.0, bucket=False, factor=1.0,
    ):
        self.ids, self.weights, self.dense, self.class_weight = ids, weights, dense, class_weight
        self.label_weight, self.row_scale, self.tokens = label_weight, row_scale, tokens
        self.options = {"vocab": vocab, "inverse_temperature": 1 / temperature, "label_smoothing": label_smoothing,
                        "z_loss": z_loss, "factor": factor, "BUCKET": bucket}
        self.results = torch.empty(3, len(ids), dtype=torch.float32, device=ids.device)
        self.state = self.slopes = None

    @property
    def smooth(self) -> bool:
        return self.options["label_smoothing"] > 0 or self.dense is not None

    def run(
        self, x, grad, bias=None, column=0, first_id=0, *, scale=1.0, softcap=0.0, by_token=False, look=True,
        finish=True, step=0, masses=None, width=0,
    ):
        """Look at raw outputs ``x`` (R, C), of this rank's columns ``column`` and so on, whose ids are ``first_id`` and
        so on; write results; write the gradient with respect to x into ``grad``, unless it is None: x itself, or what
        begins where x begins. ``by_token``: x and grad are (N, C). Without ``look`` or ``finish``, other calls do that.
        """
        count, k = self.ids.shape
        carry = not (look and finish)
        if carry and self.state is None:
            self.state = unseen(count, STATE.value + k, maxima=(TOP.value, PEAK.value), device=x.device,
                                absent=(slice(STATE.value, None),))
        has_tokens = torch.is_tensor(self.tokens)
        class_weight = x if self.class_weight is None else self.class_weight[column:]
        dense = x if self.dense is None else self.dense[:, column:]
        place = x if grad is None else grad
        plain = self.weights is None and not self.smooth and softcap == 0 and width == 0
        row_launch(
            _rows, "cross_entropy" if self.dense is None else "class_probabilities", count, x,
            x, x.stride(0), place, place.stride(0), self.tokens if has_tokens else x, 0 if has_tokens else self.tokens,
            x if bias is None else bias, class_weight, dense, dense.stride(0),
            self.ids, x if self.weights is None else self.weights,
            x if self.label_weight is None else self.label_weight, x if self.row_scale is None else self.row_scale,
            x if self.state is None else self.state, x if self.slopes is None else self.slopes, self.results,
            self.results.stride(0), x if masses is None else masses, 0 if masses is None else masses.stride(0),
            x.shape[1], first_id, scale=scale, softcap=softcap, **self.options, LOOK=look, FINISH=finish,
            GRADIENT=grad is not None, CARRY=carry, HAS_SLOPES=self.slopes is not None, BY_TOKEN=by_token,
            HAS_TOKENS=has_tokens, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0,
            HAS_CLASS_WEIGHT=self.class_weight is not None, HAS_LABEL_WEIGHT=self.label_weight is not None,
            DENSE=self.dense is not None, HARD=self.weights is None and self.dense is None, SMOOTH=self.smooth, K=k,
            BLOCK_K=triton.next_power_of_2(k), NARROWED=grad is not None and grad.dtype.itemsize < x.dtype.itemsize,
            TILE=width, held=1 if plain else 4)

    def softmax_weight(self):
        """(R,) what the softmax enters the gradient with: on_q times row_scale."""
        of = self.options
        on_q = of["factor"] * (1 if self.weights is None else self.weights.sum(-1))
        if self.label_weight is not None:
            on_q = on_q * self.label_weight
        return (on_q + 2 * of["z_loss"] * self.results[2]) * self.row_scale
