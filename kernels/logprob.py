"""Log-probability of an id, and entropy, of rows of logits, with their gradient in the logits' place or beside them.

With logits z = softcap * tanh(scale * (x + bias) / softcap) / temperature, m = max z, q = softmax(z):

    logprob = z_y - m - log(sum_j exp(z_j - m))         dlogprob/dz_j = [j = y] - q_j
    entropy = lse - sum_j q_j z_j                       dentropy/dz_j = -q_j (log q_j + entropy)

The gradient is that of ``on_logprob * logprob + on_entropy * entropy``. See ``kernels.cross_entropy`` for the passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import row_launch, unseen
from .logits import first_largest, load_logits, raised, store_slope

TOP, TOTAL, BELOW, LABEL, ARGMAX, STATE = (tl.constexpr(i) for i in range(6))


@triton.jit
def slope_of(log_q, at_label, entropy, on_logprob, on_entropy):
    q = tl.exp(log_q)
    g = -q * (on_logprob + tl.where(q > 0, on_entropy * (log_q + entropy), 0.0))
    return g + tl.where(at_label, on_logprob, 0.0)


@triton.jit
def _rows(
    x_ptr, x_stride, grad_ptr, grad_stride,         # (N, C)
    tokens_ptr, first_token,                        # (R,) int64: places of the rows; without: one after the other
    bias_ptr,                                       # (C,)
    ids_ptr, row_scale_ptr,                         # (R,), (R, 2)
    state_ptr,                                      # (R, STATE)
    results_ptr, results_stride,                    # (4, R) logprob, entropy, lse, argmax
    columns, first_id, scale, softcap, inverse_temperature,
    LOOK: tl.constexpr, FINISH: tl.constexpr, GRADIENT: tl.constexpr, CARRY: tl.constexpr, BY_TOKEN: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NARROWED: tl.constexpr,
    HELD: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row) if HAS_TOKENS else row + first_token
    place = token if BY_TOKEN else row
    x_ptr += place * x_stride
    grad_ptr += place * grad_stride
    state_ptr += row * STATE
    lanes = tl.arange(0, BLOCK_V)
    NEVER: tl.constexpr = -float("inf")

    y = tl.load(ids_ptr + row)
    top = tl.full([], NEVER, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    below, argmax = total, total
    z_y = tl.full([], float("nan"), tl.float32)             # an id that nobody has
    if CARRY:
        top = tl.load(state_ptr + TOP)
        total = tl.load(state_ptr + TOTAL)
        below = tl.load(state_ptr + BELOW)
        z_y = tl.load(state_ptr + LABEL)
        argmax = tl.load(state_ptr + ARGMAX)

    if LOOK:
        sums = tl.where(lanes == 0, total, 0.0)
        belows = tl.where(lanes == 0, below, 0.0)           # sum_j exp(z_j - max) (z_j - max)
        if HELD:
            c = sums
        for start in range(0, columns, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            z = c * inverse_temperature
            found, where = first_largest(z, lanes)
            argmax = tl.where(found > top, (first_id + start + where).to(tl.float32), argmax)
            at = (first_id + offsets == y) & mask               # behind the last column is another rank's
            z_y = tl.where(tl.max(at.to(tl.int32), 0) > 0, tl.sum(tl.where(at, z, 0.0), 0), z_y)
            before = top
            top, shift = raised(top, z)
            rise = tl.where(before == NEVER, 0.0, top - before)
            z -= shift
            e = tl.exp(z)
            fall = tl.exp(-rise)
            belows = (belows - rise * sums) * fall + tl.where(e > 0, e * z, 0.0)
            sums = sums * fall + e
        total = tl.sum(sums, 0)
        below = tl.sum(belows, 0)
        if not FINISH:
            tl.store(state_ptr + TOP, top)
            tl.store(state_ptr + TOTAL, total)
            tl.store(state_ptr + BELOW, below)
            tl.store(state_ptr + LABEL, z_y)
            tl.store(state_ptr + ARGMAX, argmax)

    if FINISH:
        log_total = tl.log(total)
        entropy = log_total - below / total
        tl.store(results_ptr + row, z_y - top - log_total)
        tl.store(results_ptr + results_stride + row, entropy)
        tl.store(results_ptr + 2 * results_stride + row, top + log_total)
        tl.store(results_ptr + 3 * results_stride + row, argmax)

    if GRADIENT:
        on_logprob = tl.load(row_scale_ptr + 2 * row) * inverse_temperature * scale
        on_entropy = tl.load(row_scale_ptr + 2 * row + 1) * inverse_temperature * scale
        for start in range(0, columns, BLOCK_V):
            offsets = start + lanes
            mask = offsets < columns
            if not (HELD and LOOK):
                c = load_logits(x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            log_q = c * inverse_temperature - top - log_total
            g = slope_of(log_q, first_id + offsets == y, entropy, on_logprob, on_entropy)
            store_slope(grad_ptr, offsets, g, c, softcap, mask, HAS_SOFTCAP, NARROWED)


class LogprobRows:
    """The rows of one chunk: ``ids`` (R,) int64, ``row_scale`` (R, 2) or None, results (4, R). ``tokens`` and ``run``
    as in ``kernels.cross_entropy.CrossEntropyRows``."""

    def __init__(self, ids, row_scale, tokens, *, temperature):
        self.ids, self.row_scale, self.tokens, self.temperature = ids, row_scale, tokens, temperature
        self.results = torch.empty(4, len(ids), dtype=torch.float32, device=ids.device)
        self.state = None

    def run(
        self, x, grad, bias=None, column=0, first_id=0, *, scale=1.0, softcap=0.0, by_token=False, look=True,
        finish=True,
        step=0,
    ):
        carry = not (look and finish)
        if carry and self.state is None:
            self.state = unseen(
                len(self.ids), STATE.value, maxima=(TOP.value,), absent=(LABEL.value,), device=x.device)
        has_tokens = torch.is_tensor(self.tokens)
        place = x if grad is None else grad
        row_launch(
            _rows, "logprob", len(self.ids), x,
            x, x.stride(0), place, place.stride(0), self.tokens if has_tokens else x, 0 if has_tokens else self.tokens,
            x if bias is None else bias, self.ids, x if self.row_scale is None else self.row_scale,
            x if self.state is None else self.state, self.results, self.results.stride(0), x.shape[1], first_id,
            scale=scale, softcap=softcap, inverse_temperature=1 / self.temperature, LOOK=look, FINISH=finish,
            GRADIENT=grad is not None, CARRY=carry, BY_TOKEN=by_token, HAS_TOKENS=has_tokens, HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap > 0, NARROWED=grad is not None and grad.dtype.itemsize < x.dtype.itemsize,
            held=4 if softcap > 0 else 2)
