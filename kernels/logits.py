"""What the kernels of all ops on rows of logits share."""

import triton
import triton.language as tl

from .launch import INTERPRETED

NO_ID = tl.constexpr(2**62)     # behind the last id of a row's support
TRUNCATES = tl.constexpr(INTERPRETED)   # the interpreter's bfloat16 of a float32 is cut off, not rounded


@triton.jit
def tanh(x):
    """To 2e-7 of its size: the quotient of exponentials loses the digits of small x, which the series keeps."""
    t = tl.exp(-2 * tl.abs(x))
    quotient = (1 - t) / (1 + t)
    s = x * x
    series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835 - s * 1382 / 155925))))
    return tl.where(s < 0.09, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def load_logits(
    x_ptr, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):
    """``capped`` at some columns of a row."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return capped(x, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def capped(c, bias_ptr, offsets, mask, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """``softcap * tanh(scale * (c + bias) / softcap)`` in float32, of outputs c at these columns; -inf where masked."""
    if HAS_BIAS:
        c += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    c *= scale
    if HAS_SOFTCAP:
        c = softcap * tanh(c / softcap)
    return tl.where(mask, c, -float("inf"))


@triton.jit
def nearest_bfloat16(x):
    """float32 x, rounded to a bfloat16."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, nearest.to(tl.uint32).to(tl.float32, bitcast=True), x)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x, rounded to the nearest of another dtype."""
    if TRUNCATES and dtype == tl.bfloat16:
        x = nearest_bfloat16(x)
    return x.to(dtype)


@triton.jit
def store_rounded(ptr, offsets, x, mask):
    """float32 x, in what ``ptr`` holds."""
    tl.store(ptr + offsets, rounded(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_slope(
    grad_ptr, offsets, g, c, softcap, mask, HAS_SOFTCAP: tl.constexpr, NARROWED: tl.constexpr,
):
    """The gradient with respect to c becomes that before the softcap, where tanh' = 1 - tanh^2, and is stored."""
    if HAS_SOFTCAP:
        t = c / softcap
        g *= 1 - t * t
    if NARROWED:        # in its place it reaches into what other threads have yet to read
        tl.debug_barrier()
    store_rounded(grad_ptr, offsets, g, mask)


@triton.jit
def first_largest(z, lanes):
    """The maximum of z and the first lane that has it; of NaN alone, none. (``tl.max`` with indices stops the
    interpreter there.)"""
    found = tl.max(z, 0)
    return found, tl.min(tl.where(z == found, lanes, 0x7FFFFFFF), 0)


@triton.jit
def raised(top, z):
    """The maximum so far and what exponents are relative to: 0 as long as there are none but -inf."""
    top = tl.maximum(top, tl.max(z, 0))
    return top, tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def support_until(ids_ptr, weights_ptr, place, id_there, last, columns, K: tl.constexpr):
    """The weights of a row's support at some columns (ascending ids) up to ``last``, and where the next one is.

    ``ids_ptr`` (K,) ascending, those that are not used NO_ID; ``place`` and ``id_there`` are the next of them.
    """
    on = tl.zeros_like(columns).to(tl.float32)
    while id_there < last:
        on = tl.where(columns == id_there, tl.load(weights_ptr + place), on)
        place += 1
        id_there = tl.load(ids_ptr + place, mask=place < K, other=NO_ID)
    return on, place, id_there
