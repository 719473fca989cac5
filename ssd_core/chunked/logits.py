"""What every row pass is made of: logits from a head's raw outputs, and sums over columns that come in tiles."""

from __future__ import annotations

import torch

from ssd_core import groups


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over the vocabulary are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_elements(device: torch.device) -> int:
    """Logits worked on at a time: a few float32 buffers of this size stay in a CPU's cache, and fill an accelerator."""
    return 1 << 17 if device.type == "cpu" else 1 << 22


def blocks(count: int, columns: int, like: torch.Tensor):
    """Slices of ``count`` rows, each of about ``block_elements`` logits; of half as many in float64."""
    elements = block_elements(like.device) * 4 // wide_dtype(like.dtype).itemsize
    step = max(1, elements // max(1, columns))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def capped(u, bias, scale: float, softcap: float):
    """c = softcap * tanh(scale * (u + bias) / softcap) in float32 (float64); a softcap of 0 is none. Maybe u itself."""
    c = u.to(wide_dtype(u.dtype))
    if bias is not None:
        c = c + bias
    if scale != 1:
        c = c * scale
    if softcap:
        c = softcap * torch.tanh(c / softcap)
    return c


def uncapped_(grad, c, scale: float, softcap: float):
    """The gradient with respect to c becomes that with respect to u, in place."""
    if softcap:
        grad.mul_(1 - (c / softcap).square_())      # tanh' = 1 - tanh^2
    return grad.mul_(scale) if scale != 1 else grad


class RowPass:
    """What an op makes of its logits, for the rows of one chunk. Of these a subclass has

        update(c, first, rows, step)    statistics of a tile of logits c (r, C), columns first .. first + C; it may
                                        return exp(z - max)
        reduce(group, step)             the same over the ranks that share the vocabulary
        finish(rows)                    ``results`` (n, R) and the gradient's coefficients, once all columns are in
        probabilities(c, rows, e)       softmax of a tile, from what ``update`` returned if that was the same tile
        gradient(c, first, rows, q)     with respect to c, overwriting q

    ``passes``, how often all columns must be seen before ``finish``, and maybe ``open(tile, step)``, which is called
    before each tile. Here they are applied to raw outputs u (R, C) of a head, a few rows at a time: those of columns
    ``tile`` of this rank, whose first id is ``first``. A subclass whose kernels look at raw outputs has these instead.
    """

    passes = 1

    def open(self, tile: slice, step: int) -> None:
        """Nothing to fetch."""

    def whole(self, head, u, tile: slice, first: int, scaled: bool):
        """All of it on rows that are whole, while they are in cache; the gradient, in u's place."""
        for step in range(self.passes):
            self.open(tile, step)
        for block in _blocks(u, tile):
            c = head.logits(u[block], tile)
            for step in range(self.passes):
                e = self.update(c, first, block, step)
            self.finish(block)
            if scaled:
                grad = self.gradient(c, first, block, self.probabilities(c, block, e))
                u[block] = uncapped_(grad, c, head.scale, head.softcap)
        return u

    def look(self, head, u, tile: slice, first: int, step: int) -> None:
        """The statistics of a tile."""
        self.open(tile, step)
        for block in _blocks(u, tile):
            self.update(head.logits(u[block], tile), first, block, step)

    def slope(self, head, u, tile: slice, first: int, scaled: bool = True, grad_filter=None):
        """The gradient of a finished tile, in u's place; the filter sees the probabilities on the way."""
        self.open(tile, self.passes)
        for block in _blocks(u, tile):
            c = head.logits(u[block], tile)
            q = self.probabilities(c, block)
            if grad_filter is not None:
                grad_filter.weigh(q, block)
            if scaled:
                u[block] = uncapped_(self.gradient(c, first, block, q), c, head.scale, head.softcap)
        return u


def _blocks(u, tile: slice):
    return blocks(len(u), tile.stop - tile.start, u)


def inside_tile(ids, used, first: int, columns: int):
    """Which of the ids (r, K) lie in columns [first, first + columns), and their place there (0 for the others)."""
    inside = used & (ids >= first) & (ids < first + columns)
    return inside, (ids - first).where(inside, 0)


def marked(z, inside, place):
    """(r, C) True at the ids of a tile."""
    return torch.zeros_like(z).scatter_add_(-1, place, inside.to(z.dtype)) > 0


class LogSumExp:
    """The maximum of each row and sum(exp(z - maximum)), over tiles of columns and over ranks."""

    def __init__(self, rows: int, dtype: torch.dtype, device):
        self.max = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.sum = torch.zeros(rows, dtype=dtype, device=device)

    def add(self, z, rows: slice):
        """Take in columns (r, C) of these rows: exp(z - max) with the maximum so far, and by how much that rose."""
        before = self.max[rows].clone()
        top = torch.maximum(before, z.amax(-1)) if z.shape[-1] else before
        shift = top.masked_fill(top == -torch.inf, 0)           # rows of -inf alone: exp(-inf) = 0, not NaN
        e = torch.exp(z - shift.unsqueeze(-1))
        self.sum[rows] = self.sum[rows] * torch.exp(before - shift) + e.sum(-1)
        self.max[rows] = top
        return e, torch.where(before == -torch.inf, 0, top - before)

    def reduce(self, group) -> torch.Tensor:
        """Over the ranks of a group; by how much this rank's maximum rose."""
        before = self.max
        self.max = groups.all_reduce(before.clone(), "max", group)
        shift = self.max.masked_fill(self.max == -torch.inf, 0)
        self.sum = groups.all_reduce(self.sum * torch.exp(before - shift), "sum", group)
        return torch.where(before == -torch.inf, 0, self.max - before)

    def softmax(self, z, rows: slice):
        """exp(z - value) of columns of these rows; by the maximum first, as z - value would lose digits."""
        shift = self.max[rows].masked_fill(self.max[rows] == -torch.inf, 0)
        return torch.exp(z - shift.unsqueeze(-1)).mul_((1 / self.sum[rows]).unsqueeze(-1))

    def log_sum(self, rows: slice = slice(None)):
        return self.sum[rows].log()

    def value(self, rows: slice = slice(None)):
        return self.max[rows] + self.log_sum(rows)

    def less(self, other: LogSumExp, rows: slice = slice(None)):
        """value - other.value, of which a common offset of all logits costs no digits."""
        return (self.max[rows] - other.max[rows]) + (self.log_sum(rows) - other.log_sum(rows))


class BelowMax:
    """sum_j a_j (max - z_j) and sum_j a_j of each row, for weights a, over tiles and ranks. Relative to the running
    maximum, so that a common offset of all logits costs no digits."""

    def __init__(self, rows: int, dtype: torch.dtype, device):
        self.sum = torch.zeros(rows, dtype=dtype, device=device)
        self.weight = torch.zeros(rows, dtype=dtype, device=device)

    def add(self, below, a, rise, rows: slice) -> None:
        """``below`` = max - z (r, C); a (r, C), (C,) or None for ones; ``rise`` of the maximum (r,)."""
        self.sum[rows] += self.weight[rows] * rise
        if a is None:
            self.sum[rows] += below.sum(-1)
            self.weight[rows] += below.shape[-1]
        else:
            self.sum[rows] += torch.where(a != 0, a * below, 0).sum(-1)
            self.weight[rows] += a.sum(-1)

    def reduce(self, rise, group) -> None:
        self.sum = groups.all_reduce(self.sum + self.weight * rise, "sum", group)
        self.weight = groups.all_reduce(self.weight, "sum", group)


def run(logits, make_pass, rows, *, scaled: bool, scale: float = 1.0, softcap: float = 0.0, extent: int = 0):
    """``(results (n, M), d_logits or None)`` of a row pass over logits (N, V), in blocks of
    rows that stay in cache. ``rows`` (M,) names those that count, or None for all; the others' gradient is 0.
    ``extent`` counts the columns that the pass looks at, if there are more than V."""
    count = len(logits) if rows is None else len(rows)
    grad = torch.zeros_like(logits, memory_format=torch.contiguous_format) if scaled else None
    results = [make_pass(slice(0, 0), slice(0, 0)).results] if count == 0 else []
    everything = slice(0, max(logits.shape[1], extent))
    for part in blocks(count, logits.shape[1], logits):
        index = part if rows is None else rows[part]
        c = capped(logits[index], None, scale, softcap)
        row_pass = make_pass(index, part)
        block = slice(0, part.stop - part.start)
        for step in range(row_pass.passes):
            row_pass.open(everything, step)
            e = row_pass.update(c, 0, block, step)
        row_pass.finish(block)
        if scaled:
            d_c = row_pass.gradient(c, 0, block, row_pass.probabilities(c, block, e))
            grad[index] = uncapped_(d_c, c, scale, softcap).to(grad.dtype)
        results.append(row_pass.results)
    return torch.cat(results, -1), grad
