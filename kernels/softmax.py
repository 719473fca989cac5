"""Softmax and log-softmax of rows of logits z = x / temperature, and their backward.

    p = exp(z - m) / sum_j exp(z_j - m)                     d x = p (g - sum_j g_j p_j) / temperature
    l = z - m - log(sum_j exp(z_j - m)),  m = max z         d x = (g - exp(l) sum_j g_j) / temperature

One program has one row, in blocks of columns, and looks at all of them twice. A row that is one block it keeps
(``HELD``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import row_launch
from .logits import raised, store_rounded


@triton.jit
def _rows(
    x_ptr, x_stride, out_ptr, out_stride,           # (N, C)
    columns, inverse_temperature, LOG: tl.constexpr, HELD: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    lanes = tl.arange(0, BLOCK_V)
    NEVER: tl.constexpr = -float("inf")
    top = tl.full([], NEVER, tl.float32)
    sums = tl.zeros([BLOCK_V], tl.float32)
    if HELD:
        z = sums
    for start in range(0, columns, BLOCK_V):
        offsets = start + lanes
        z = tl.load(x_ptr + offsets, mask=offsets < columns, other=NEVER).to(tl.float32) * inverse_temperature
        before = top
        top, shift = raised(top, z)
        sums = sums * tl.exp(before - shift) + tl.exp(z - shift)
    total = tl.sum(sums, 0)
    log_total = tl.log(total)
    for start in range(0, columns, BLOCK_V):
        offsets = start + lanes
        mask = offsets < columns
        if not HELD:
            z = tl.load(x_ptr + offsets, mask=mask, other=NEVER).to(tl.float32) * inverse_temperature
        z -= top
        store_rounded(out_ptr, offsets, z - log_total if LOG else tl.exp(z) / total, mask)


@triton.jit
def _rows_backward(
    grad_ptr, grad_stride, out_ptr, out_stride, d_ptr, d_stride,        # (N, C)
    columns, inverse_temperature, LOG: tl.constexpr, HELD: tl.constexpr, BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    out_ptr += row * out_stride
    d_ptr += row * d_stride
    lanes = tl.arange(0, BLOCK_V)
    sums = tl.zeros([BLOCK_V], tl.float32)
    if HELD:
        g, p = sums, sums
    for start in range(0, columns, BLOCK_V):
        offsets = start + lanes
        mask = offsets < columns
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if not LOG:
            p = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        sums += g if LOG else g * p
    total = tl.sum(sums, 0)
    for start in range(0, columns, BLOCK_V):
        offsets = start + lanes
        mask = offsets < columns
        if not HELD:
            g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if LOG or not HELD:
            p = tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = g - tl.exp(p) * total if LOG else p * (g - total)
        store_rounded(d_ptr, offsets, d * inverse_temperature, mask)


def _with_rows(tensor):
    """Whose columns follow each other."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def softmax(logits, *, temperature: float, log: bool = False):
    """Of ``logits`` (N, V), rounded once to their dtype."""
    x, out = _with_rows(logits), torch.empty_like(logits, memory_format=torch.contiguous_format)
    row_launch(_rows, "softmax", len(x), x, x, x.stride(0), out, out.stride(0), x.shape[1], 1 / temperature, LOG=log,
               held=1)
    return out


def softmax_backward(grad, out, *, temperature: float, log: bool = False):
    grad, out = _with_rows(grad), _with_rows(out)
    d = torch.empty_like(out, memory_format=torch.contiguous_format)
    row_launch(_rows_backward, "softmax", len(out), out, grad, grad.stride(0), out, out.stride(0), d, d.stride(0),
               out.shape[1], 1 / temperature, LOG=log, held=2)
    return d


def log_softmax(logits, *, temperature: float):
    return softmax(logits, temperature=temperature, log=True)


def log_softmax_backward(grad, out, *, temperature: float):
    return softmax_backward(grad, out, temperature=temperature, log=True)
