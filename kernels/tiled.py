"""Logits that are never in memory: a tile of them is computed, looked at and forgotten in one kernel.

Of hidden states x (R, D) and a weight w (V, D), the raw outputs u of rows i and columns j, and their logits, are

    u_ij = sum_d x_id w_jd,     z = softcap * tanh(scale * (u + bias) / softcap) / temperature

A program has a tile of rows and a *span*, tiles of columns one after the other. For each of its rows it keeps what
``kernels.cross_entropy``, ``kernels.distill`` or ``kernels.logprob`` keep, with a running maximum m,

    m' = max(m, max_j z_j),     total' = total e^(m - m') + sum_j e^(z_j - m')      and so on,

and leaves it as the ``state`` of its span. Spans are then added up in their order, like the ranks of a group. What is
known of each row then makes the gradient: a tile is computed again, and its slope dloss/du written, for as many columns
as there is memory for. At the ids of a target, whose logits the first look has found, a kernel of rows writes over it.
What each op makes of a tile is in ``tiled_cross_entropy``, ``tiled_distill``, ``tiled_dense_distill`` and
``tiled_logprob``. (Class probabilities are as many as logits: there is nothing to be gained.)

Rows of tiles are worked on in groups: the programs of a moment share operands, which they then find in the L2 cache.
Where the chip has a tensor memory accelerator, and rows are aligned, operands come through it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import cross_entropy, distill, logprob
from .launch import float32_products, has_tensor_memory_accelerator, multiprocessors, tiles
from .logits import NO_ID, TRUNCATES, capped, nearest_bfloat16

NOWHERE = tl.constexpr(2**31 - 1)
ALIGNMENT = 16      # bytes, of what a descriptor names
STATES = max(op.STATE.value for op in (cross_entropy, distill, logprob))     # numbers of a row's state, at most


# -- a tile -----------------------------------------------------------------------------------------------------------


@triton.jit
def work_of(item, row_tiles, spans, rows, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row tile and span of a work item, the row tiles of a group for one span, then for the next; the tile's rows, and
    which of them are there."""
    first = item // (GROUP * spans) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = item % (GROUP * spans)
    row_tile = first + within % size
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return row_tile, within // size, row.to(tl.int64), row < rows


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
def logits(
    x_ptr, x_row, x_inner, w_ptr, w_row, w_inner, bias_ptr, row_tile, block, rows, columns, hidden, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The columns (1, BLOCK_V) of a tile, and its logits (BLOCK_N, BLOCK_V) but for the temperature."""
    u = outputs(x_ptr, x_row, x_inner, w_ptr, w_row, w_inner, row_tile * BLOCK_N, block * BLOCK_V, rows, columns,
                hidden, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    j = (block * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    return j, capped(u, bias_ptr, j, j < columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP)


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
def targets_of(ids_ptr, row, first_id, columns, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A row's ids (R, K), where they lie among them all, which are among these columns, and at what place there."""
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=NO_ID)
    inside = (ids >= first_id) & (ids < first_id + columns)
    return ids, row * K + k, inside, tl.where(inside, ids - first_id, 0)


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


# -- a head and its launches -------------------------------------------------------------------------------------------


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
    beside: Head | Logits | None = None     # of which a kernel looks at the same tiles
    narrow: bool = False        # tiles

    def part(self, columns: slice) -> Head:
        return dataclasses.replace(
            self, weight=self.weight[columns], bias=None if self.bias is None else self.bias[columns],
            first_id=self.first_id + columns.start, beside=None if self.beside is None else self.beside.part(columns))

    @property
    def columns(self) -> int:
        return max(len(self.weight), 0 if self.beside is None else self.beside.columns)

    @property
    def heads(self) -> list[Head]:
        return [self, self.beside] if isinstance(self.beside, Head) else [self]

    @property
    def by_descriptor(self) -> bool:
        return has_tensor_memory_accelerator(self.x.device) and all(
            one.x.dtype == one.weight.dtype and _aligned(one.x) and _aligned(one.weight) for one in self.heads)

    @property
    def tiles(self):
        widest = max((one.x.dtype for one in self.heads), key=lambda dtype: dtype.itemsize)
        found = tiles(self.columns, widest, self.x.device, self.by_descriptor, pairs=self.beside is not None)
        return found.narrow if self.narrow else found

    def spans(self) -> int:
        return spans(len(self.x), self.columns, self.tiles)

    def operands(self, found, by_descriptor: bool) -> tuple:
        """What a kernel is given of x, weight and bias, for tiles as ``found``."""
        given = []
        for tensor, length in ((self.x, found.rows), (self.weight, found.columns)):
            block = [length, found.terms]
            given += [TensorDescriptor.from_tensor(tensor, block) if by_descriptor else tensor, *tensor.stride()]
        return *given, self.x if self.bias is None else self.bias

    def launch(self, kernel, work: int, *arguments, **options) -> None:
        """``work`` items for each tile of rows, by as many programs as fit the chip."""
        (rows, hidden), found, by_descriptor = self.x.shape, self.tiles, self.by_descriptor
        programs = min(multiprocessors(self.x.device), triton.cdiv(rows, found.rows) * work)
        kernel[(programs,)](
            *self.operands(found, by_descriptor), *arguments, rows=rows, columns=len(self.weight), hidden=hidden,
            scale=self.scale, softcap=self.softcap, HAS_BIAS=self.bias is not None, HAS_SOFTCAP=self.softcap > 0,
            TMA=by_descriptor, PRECISION=float32_products(), BLOCK_N=found.rows, BLOCK_V=found.columns,
            BLOCK_D=found.terms, GROUP=found.group, num_warps=found.warps, num_stages=found.stages, **options)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Those that are there, (N, C), beside those of a head that are not."""

    logits: torch.Tensor

    def part(self, columns: slice) -> Logits:
        return Logits(self.logits[:, columns])

    @property
    def columns(self) -> int:
        return self.logits.shape[1]

    def operands(self, found, by_descriptor: bool) -> tuple:
        given = (self.logits, *self.logits.stride())
        return *given, *given, self.logits


def _aligned(tensor) -> bool:
    (_, length), (row, inner) = tensor.shape, tensor.stride()
    starts_aligned = all(at % ALIGNMENT == 0 for at in (tensor.data_ptr(), row * tensor.element_size()))
    return tensor.numel() > 0 and inner == 1 and row >= length and starts_aligned


def spans(rows: int, columns: int, found) -> int:
    """Parts of the vocabulary, each of whole tiles: as many as keep all programs busy, whatever the chip."""
    return min(triton.cdiv(columns, found.columns), triton.cdiv(found.items, triton.cdiv(rows, found.rows)))


def state_bytes(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of all spans, at most."""
    narrow = tiles(columns, dtype, device, by_descriptor=False).narrow
    # beside a teacher, which may be wider
    pairs = (tiles(columns, wide, device, by_descriptor=False, pairs=True) for wide in (dtype, torch.float32))
    return 4 * STATES * max(min(rows * triton.cdiv(columns, found.columns), found.items * found.rows + rows)
                            for found in (narrow, *pairs))
