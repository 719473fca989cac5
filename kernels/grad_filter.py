"""Certified gradient filtering of the rows of one chunk; the definition is ``ssd_core.reference.grad_filter``.

The columns of a row's gradient G (R, C) come in the vocabulary's order, ``order[j]`` is the id of column j, and tile t
holds TILE of them. With q_it the softmax mass of row i in tile t, 0 or more, and infinite where one of its targets is:

    skipped    the lightest tiles of a row, of equal ones the first, while their summed q_it is at most delta
    M_it       sum_j G_ij over a skipped tile, else 0
    moments    M, and sum_i G_ij over the rows that skip the tile of j
    products   d_input_i = sum_j G_ij weight[order[j]] and d_weight[order[j]] += sum_i G_ij x_i over what stayed

What stayed is listed by tile, its rows in ascending order. Nothing comes back to the host, and every sum is taken in
the same order each time: d_weight's by the program that has the tile, d_input's over the tiles of a group, of which
there are as many as fill a device, and then over the groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import PROGRAMS, float32_products, products
from .logits import TRUNCATES, rounded


@triton.jit
def _select(
    masses_ptr, masses_stride,                      # (R, T)
    ids_ptr,                                        # (R, K) int64
    active_ptr, active_stride,                      # (T, R) int8
    stats_ptr, stats_stride,                        # (2, R) skipped mass, tiles that stayed
    columns, tiles, first_id, delta, K: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """One program has one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_T)
    mass = tl.load(masses_ptr + row * masses_stride + tile, mask=tile < tiles, other=float("inf"))
    for k in range(K):
        place = tl.load(ids_ptr + row * K + k) - first_id
        held = (place >= 0) & (place < columns)
        mass = tl.where(held & (tile == place // TILE), float("inf"), mass)
    mass = tl.where(mass <= delta, mass, float("inf"))          # which a NaN is not
    # masses are not negative: their bits order as they do, and then the tile
    keys = tl.sort((mass.to(tl.int32, bitcast=True).to(tl.int64) << 32) | tile.to(tl.int64))
    total = tl.cumsum((keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), 0)
    tile = keys & 0xFFFFFFFF
    skipped = total <= delta
    tl.store(active_ptr + tile * active_stride + row, tl.where(skipped, 0, 1).to(tl.int8), mask=tile < tiles)
    tl.store(stats_ptr + row, tl.max(tl.where(skipped, total, 0.0), 0))
    tl.store(stats_ptr + stats_stride + row, (tiles - tl.sum(skipped.to(tl.int32), 0)).to(tl.float32))


@triton.jit
def _moments(
    grad_ptr, grad_stride,                          # (R, C)
    active_ptr, active_stride,                      # (T, R) int8
    order_ptr,                                      # (C,) int64
    list_ptr, count_ptr,                            # (T, R) int32 like active, (T,) int32: the rows that stayed
    row_mass_ptr, row_mass_stride,                  # (R, T) M
    column_mass_ptr,                                # (V,), added to
    rows, columns, TILE: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """One program has one tile."""
    tile = tl.program_id(0).to(tl.int64)
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < columns
    active_ptr += tile * active_stride
    list_ptr += tile * active_stride
    sums = tl.zeros([TILE], tl.float32)
    count = tl.full([], 0, tl.int32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        active = tl.load(active_ptr + row, mask=row < rows, other=0).to(tl.int32)
        tl.store(list_ptr + count + tl.cumsum(active, 0) - 1, row, mask=active > 0)
        count += tl.sum(active, 0)
        skipped = (row < rows) & (active == 0)
        g = tl.load(grad_ptr + row.to(tl.int64)[:, None] * grad_stride + column[None, :],
                    mask=skipped[:, None] & inside[None, :], other=0.0).to(tl.float32)
        tl.store(row_mass_ptr + row.to(tl.int64) * row_mass_stride + tile, tl.sum(g, 1), mask=row < rows)
        sums += tl.sum(g, 0)
    tl.store(count_ptr + tile, count)
    ids = tl.load(order_ptr + column, mask=inside, other=0)
    tl.store(column_mass_ptr + ids, tl.load(column_mass_ptr + ids, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit
def _dot(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c, c float32."""
    if TRUNCATES and a.dtype == tl.bfloat16:        # whose bits the interpreter would multiply
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def _input_product(
    grad_ptr, grad_stride,                          # (R, C)
    weight_ptr, weight_stride, weight_step,         # (V, D)
    order_ptr,                                      # (C,) int64
    list_ptr, list_stride, count_ptr,               # (T, R) int32, (T,) int32
    out_ptr, group_stride, out_stride,              # (groups, R, D) float32, zeros
    columns, hidden, tiles, groups,
    TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One program has every ``groups``th tile, as the first are the fullest, and BLOCK_D coordinates."""
    group = tl.program_id(0)
    out_ptr += group.to(tl.int64) * group_stride
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = tl.full([], 0, tl.int64)
    for tile in range(group, tiles, groups):
        count = tl.load(count_ptr + tile)
        if count > 0:
            column = tile * TILE + tl.arange(0, TILE)
            inside = column < columns
            ids = tl.load(order_ptr + column, mask=inside, other=0)
            w = tl.load(weight_ptr + ids[:, None] * weight_stride + (wide + d)[None, :] * weight_step,
                        mask=inside[:, None] & (d < hidden)[None, :], other=0.0)
            if w.dtype != grad_ptr.dtype.element_ty:
                w = rounded(w.to(tl.float32), grad_ptr.dtype.element_ty)
            for start in range(0, count, BLOCK_R):
                place = start + tl.arange(0, BLOCK_R)
                there = place < count
                row = tl.load(list_ptr + (wide + tile) * list_stride + place, mask=there, other=0).to(tl.int64)
                g = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :],
                            mask=there[:, None] & inside[None, :], other=0.0)
                product = _dot(g, w, tl.zeros([BLOCK_R, BLOCK_D], tl.float32), PRECISION)
                out = out_ptr + row[:, None] * out_stride + d[None, :]
                mask = there[:, None] & (d < hidden)[None, :]
                tl.store(out, tl.load(out, mask=mask, other=0.0) + product, mask=mask)
            tl.debug_barrier()      # the next tile's threads read what those of this one wrote


@triton.jit
def _weight_product(
    grad_ptr, grad_stride,                          # (R, C)
    x_ptr, x_stride,                                # (R, D)
    order_ptr,                                      # (C,) int64
    list_ptr, list_stride, count_ptr,               # (T, R) int32, (T,) int32
    out_ptr, out_stride,                            # (V, D) float32, added to
    columns, hidden,
    TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One program has BLOCK_C columns of a tile and BLOCK_D coordinates."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_C
    tile = first // TILE
    count = tl.load(count_ptr + tile)
    if count > 0:
        column = first + tl.arange(0, BLOCK_C)
        inside = column < columns
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        sums = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        for start in range(0, count, BLOCK_R):
            place = start + tl.arange(0, BLOCK_R)
            there = place < count
            row = tl.load(list_ptr + tile * list_stride + place, mask=there, other=0).to(tl.int64)
            g = tl.load(grad_ptr + row[:, None] * grad_stride + column[None, :],
                        mask=there[:, None] & inside[None, :], other=0.0)
            x = tl.load(x_ptr + row[:, None] * x_stride + d[None, :],
                        mask=there[:, None] & (d < hidden)[None, :], other=0.0)
            sums = _dot(tl.trans(g), x, sums, PRECISION)
        ids = tl.load(order_ptr + column, mask=inside, other=0)
        out = out_ptr + ids[:, None] * out_stride + d[None, :]
        mask = inside[:, None] & (d < hidden)[None, :]
        tl.store(out, tl.load(out, mask=mask, other=0.0) + sums, mask=mask)


class FilteredRows:
    """What one bound ``delta`` filters of the gradient of a chunk. ``masses`` (R, T) float32; ``ids`` (R, K) int64 of
    the targets, of which the columns have ``first_id`` and so on; ``order`` (C,) int64; tiles of ``tile`` columns."""

    def __init__(self, masses, ids, first_id: int, order, tile: int, delta: float):
        rows, tiles = masses.shape
        self.order, self.tile = order, tile
        self.active = torch.empty(tiles, rows, dtype=torch.int8, device=masses.device)
        stats = torch.empty(2, rows, dtype=torch.float32, device=masses.device)
        self.skipped, self.stayed = stats       # (R,) softmax mass of what is skipped, tiles that are not
        _select[(rows,)](
            masses, masses.stride(0), ids, self.active, self.active.stride(0), stats, stats.stride(0), len(order),
            tiles, first_id, delta, K=ids.shape[1], TILE=tile, BLOCK_T=max(16, triton.next_power_of_2(tiles)),
            num_warps=products("select").warps)

    def moments(self, grad, row_mass, column_mass) -> None:
        """Writes M (R, T) and adds to ``column_mass`` (V,) of what is skipped of ``grad`` (R, C); lists what stayed."""
        (tiles, rows), of = self.active.shape, products("moments")
        self.rows = torch.empty(tiles, rows, dtype=torch.int32, device=grad.device)
        self.counts = torch.empty(tiles, dtype=torch.int32, device=grad.device)
        _moments[(tiles,)](
            grad, grad.stride(0), self.active, self.active.stride(0), self.order, self.rows, self.counts, row_mass,
            row_mass.stride(0), column_mass, rows, len(self.order), TILE=self.tile, BLOCK_R=of.rows, num_warps=of.warps)

    def input_product(self, grad, weight):
        """(R, D) float32: what stayed of ``grad`` (R, C) times the rows of ``weight`` (V, D)."""
        tiles, rows = self.active.shape
        hidden, of = weight.shape[1], _product("input", grad.dtype)
        groups, block = groups_of(tiles, hidden, grad.dtype), of.hidden_block(hidden)
        out = torch.zeros(groups, rows, hidden, dtype=torch.float32, device=grad.device)
        _input_product[(groups, triton.cdiv(hidden, block))](
            grad, grad.stride(0), weight, *weight.stride(), self.order, self.rows, self.rows.stride(0), self.counts,
            out, out.stride(0), out.stride(1), len(self.order), hidden, tiles, groups, TILE=self.tile,
            PRECISION=float32_products(), BLOCK_R=of.rows, BLOCK_D=block, num_warps=of.warps)
        return out.sum(0)

    def add_weight_product(self, grad, x, out) -> None:
        """To the rows of ``out`` (V, D) float32: what stayed of ``grad`` (R, C), transposed, times ``x`` (R, D)."""
        hidden, of = x.shape[1], _product("weight", grad.dtype)
        block, columns = of.hidden_block(hidden), min(of.columns, self.tile)
        _weight_product[(len(self.active) * self.tile // columns, triton.cdiv(hidden, block))](
            grad, grad.stride(0), x, x.stride(0), self.order, self.rows, self.rows.stride(0), self.counts, out,
            out.stride(0), len(self.order), hidden, TILE=self.tile, PRECISION=float32_products(), BLOCK_R=of.rows,
            BLOCK_C=columns, BLOCK_D=block, num_warps=of.warps)


def groups_of(tiles: int, hidden: int, dtype: torch.dtype) -> int:
    """Of tiles, whose parts of d_input are added up apart: as many as give each of PROGRAMS programs one."""
    blocks = triton.cdiv(hidden, _product("input", dtype).hidden_block(hidden))
    return max(1, min(tiles, PROGRAMS // blocks))


def _product(of: str, dtype: torch.dtype):
    return products(f"{of}{8 * dtype.itemsize}")
