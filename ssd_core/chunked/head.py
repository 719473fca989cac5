"""From hidden states to a loss over a vocabulary and its gradients, in chunks: the loop that ``linear_*`` ops share.

What an op makes of its logits is a row pass: see ``chunked.logits.RowPass``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ssd_core import groups
from ssd_core.chunked.logits import capped, wide_dtype

SUM_LENGTH = 1 << 14    # terms that a float32 product may add up in one go; shorter ones cost time


def wide_product(a, b, *, out, add: bool = False) -> None:
    """``out`` float32 = [out +] a @ b of 16-bit operands, which are never upcast where the library multiplies them."""
    if a.device.type == "cpu":      # there is no such product: for tests
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if add else out.copy_(product)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class Head(NamedTuple):
    """What makes raw outputs u of hidden states, and logits c of those."""

    input: torch.Tensor             # (N, D)
    weight: torch.Tensor            # (V, D), this rank's part of the vocabulary
    bias: torch.Tensor | None       # (V,)
    scale: float
    softcap: float                  # 0: none
    dtype: torch.dtype              # that products are taken in
    columns: int                    # of a weight of another dtype, as many are cast at a time
    wide: bool = False              # outputs are float32, whatever the dtype
    order: torch.Tensor | None = None   # (V,): outputs are those of these ids, one after the other, as is the bias

    @property
    def output_dtype(self) -> torch.dtype:
        return wide_dtype(self.dtype) if self.wide else self.dtype

    @property
    def early_bias(self) -> bool:
        """Whether the product adds the bias, as ``F.linear`` does, and 16-bit outputs are rounded once. A wider one is
        added to the logits."""
        return self.bias is not None and self.bias.dtype == self.dtype == self.output_dtype

    def ordered(self, order) -> Head:
        """The head whose outputs come in this order; rows of the weight are copied together ``columns`` at a time."""
        return self._replace(order=order, bias=None if self.bias is None else self.bias[order])

    def rows(self, columns: slice) -> torch.Tensor:
        """The weight's, of these outputs, as products take them."""
        return self.weight[columns if self.order is None else self.order[columns]].to(self.dtype)

    def in_place(self, u) -> torch.Tensor:
        """Where the gradient takes the place of outputs u (R, C): in ``dtype``, each row where its outputs begin."""
        return u if u.dtype == self.dtype else u.view(self.dtype)[:, : u.shape[1]]

    def outputs(self, x, tile: slice, out: torch.Tensor) -> torch.Tensor:
        as_it_is = self.weight.dtype == self.dtype and self.order is None
        step = out.shape[1] if as_it_is else self.columns
        for start in range(0, out.shape[1], step):
            some = out[:, start : start + step]
            first = tile.start + start
            columns = slice(first, first + some.shape[1])
            weight = self.rows(columns).t()
            if self.output_dtype != self.dtype:
                wide_product(x, weight, out=some)
            elif self.early_bias:
                torch.addmm(self.bias[columns], x, weight, out=some)
            else:
                torch.mm(x, weight, out=some)
        return out

    def logits(self, u, tile: slice) -> torch.Tensor:
        late = self.bias is not None and not self.early_bias
        bias = self.bias[tile].to(wide_dtype(self.dtype)) if late else None
        return capped(u, bias, self.scale, self.softcap)


class Chunk:
    """The rows of one chunk: raw outputs in a buffer, where the gradient takes their place."""

    def __init__(self, head, row_pass, x, buffer, vocab_start):
        self.head, self.row_pass, self.x, self.buffer, self.vocab_start = head, row_pass, x, buffer, vocab_start
        self.held = None        # the tile whose outputs are in the buffer

    @staticmethod
    def buffer_for(head, rows: int, columns: int, scaled: bool) -> torch.Tensor:
        return head.input.new_empty(rows, columns, dtype=head.output_dtype)

    def outputs(self, tile: slice):
        """u of the tile; of columns beyond V, which only a teacher has, there are none."""
        vocab = self.head.weight.shape[0]
        u = self.buffer[: len(self.x), : max(0, min(tile.stop, vocab) - tile.start)]
        if self.held != tile and u.shape[1]:
            self.head.outputs(self.x, tile, u)
        self.held = tile
        return u

    def whole(self, tile: slice, scaled: bool):
        """All of the row pass at once; the gradient, which may be in the outputs' place."""
        return self.row_pass.whole(self.head, self.outputs(tile), tile, self.vocab_start + tile.start, scaled)

    def statistics(self, tiles, group) -> None:
        """Column tiles one after the other, as often as the row pass asks for; then over the ranks."""
        for step in range(self.row_pass.passes):
            for tile in tiles:
                self.row_pass.look(self.head, self.outputs(tile), tile, self.vocab_start + tile.start, step)
            if group is not None:
                self.row_pass.reduce(group, step)

    def gradient(self, tile: slice, scaled: bool = True, grad_filter=None):
        first = self.vocab_start + tile.start
        grad = self.row_pass.slope(self.head, self.outputs(tile), tile, first, scaled, grad_filter)
        self.held = None
        return grad


def run(
    head: Head, make_pass: Callable, rows, *, scaled: bool, needs, chunks, keep_float32: bool = False, group=None,
    vocab_start: int = 0, extent: int = 0, grad_filter=None, kind: type[Chunk] = Chunk,
):
    """``(results (n, M), d_input, d_weight, d_bias)``, the results those of the row passes over M tokens.

    ``rows`` (M,) int64 names the tokens that count, or None for all N: the others meet no product.
    ``make_pass(index, part)`` is the row pass of tokens ``index``, which are ``part`` of the M. ``scaled``: whether
    gradients are wanted at all; then of input, weight and bias as ``needs`` says, those of weight and bias left in
    float32 by ``keep_float32``. ``chunks`` is a ``plan.ChunkPlan``; ``extent`` counts the columns that the pass looks
    at, if there are more than V. ``grad_filter`` is a ``GradFilter``, for chunks that hold all columns, and ``kind``
    makes the chunks.
    """
    count = head.input.shape[0] if rows is None else rows.shape[0]
    vocab = head.weight.shape[0]
    columns = max(vocab, extent)
    tiles = [slice(first, min(first + chunks.tile, columns)) for first in range(0, columns, chunks.tile)]
    gradients = Gradients(
        head, needs if scaled else (False, False, False), chunks, one_chunk=0 < count <= chunks.rows,
        keep_float32=keep_float32, summed=group is not None or grad_filter is not None)
    buffer = kind.buffer_for(head, min(chunks.rows, count), min(chunks.tile, vocab), scaled)
    results = [make_pass(slice(0, 0), slice(0, 0)).results] if count == 0 else []
    for start in range(0, count, chunks.rows):
        part = slice(start, min(start + chunks.rows, count))
        index = part if rows is None else rows[part]
        x = head.input[index].to(head.dtype)
        row_pass = make_pass(index, part)
        chunk = kind(head, row_pass, x, buffer, vocab_start)
        if len(tiles) == 1 and group is None and grad_filter is None:
            grad = chunk.whole(tiles[0], scaled)
            if scaled:
                gradients.add(x, grad, tiles[0])
        else:
            chunk.statistics(tiles, group)
            row_pass.finish()
            if grad_filter is not None:
                grad_filter.open_chunk(part, row_pass)
                grad = chunk.gradient(tiles[0], scaled, grad_filter)
                grad_filter.add(gradients, x, grad, scaled)
            elif scaled:
                for tile in tiles:
                    gradients.add(x, chunk.gradient(tile), tile)
        gradients.end_chunk(index)
        results.append(row_pass.results)
    if grad_filter is not None and scaled:
        grad_filter.close(gradients, rows)
    return torch.cat(results, -1), *gradients.close(group)


class Gradients:
    """Of a head's input, weight and bias, added up tile by tile and chunk by chunk.

    d_weight needs no float32 accumulator if it is float32 itself, or if a single product makes each part of it.
    """

    def __init__(self, head: Head, needs, chunks, *, one_chunk: bool, keep_float32: bool, summed: bool):
        self.head, self.chunks, self.keep_float32 = head, chunks, keep_float32
        self.wide = wide_dtype(head.dtype)
        self.once = one_chunk and not summed            # each part of d_weight comes from one product
        same = head.weight.dtype == head.dtype
        self.direct = same and (head.dtype == self.wide or (self.once and not keep_float32))
        self.input = self.rows = self.weight = self.bias = None
        if needs[0]:
            self.input = torch.zeros_like(head.input, dtype=self.wide if summed else None)
        if needs[1]:
            make = torch.empty_like if self.direct and self.once else torch.zeros_like
            self.weight = make(head.weight, dtype=head.weight.dtype if self.direct else self.wide,
                               memory_format=torch.contiguous_format)
        if needs[2]:
            self.bias = torch.zeros_like(head.bias, dtype=self.wide)

    def add(self, x, grad, tile: slice) -> None:
        """``grad`` (R, C) with respect to the raw outputs of the rows ``x`` (R, D)."""
        if grad.shape[1]:
            self.add_input(grad, tile)
            self.add_weight(x, grad, tile)
            self.add_bias(grad, tile)

    def add_input(self, grad, tile: slice) -> None:
        """To ``rows``: grad @ weight[tile], (R, C) by (C, D).

        Of few rows, libraries add up all terms in one running float32 sum, which at V = 262,144 costs two digits: sums
        over blocks of the vocabulary, added up, do not. (``addmm`` onto ``rows`` would go on with the running sum.)
        One product of 16-bit numbers is rounded once; several are added up in float32, rounded or (``wide``) not.
        """
        if self.input is None:
            return
        head, columns = self.head, grad.shape[1]
        copied = head.weight.dtype != head.dtype or head.order is not None
        length = self.chunks.columns if copied else SUM_LENGTH if grad.dtype.itemsize > 2 else columns
        if self.rows is None and grad.dtype != self.wide and length < len(head.weight):
            self.rows = grad.new_zeros(len(grad), head.weight.shape[1], dtype=self.wide)
        for start in range(0, columns, length):
            stop = min(start + length, columns)
            weight = head.rows(slice(tile.start + start, tile.start + stop))
            if head.wide and self.rows is not None and grad.dtype != self.wide:
                wide_product(grad[:, start:stop], weight, out=self.rows, add=True)
                continue
            product = grad[:, start:stop] @ weight
            self.rows = product if self.rows is None else self.rows.add_(product)

    def add_weight(self, x, grad, tile: slice) -> None:
        if self.weight is None:
            return
        out, order = self.weight[tile], self.head.order
        wide = self.head.wide and grad.dtype != out.dtype
        if self.direct and order is None:
            torch.addmm(out, grad.t(), x, beta=0 if self.once else 1, out=out)
            return
        if wide and order is None:
            wide_product(grad.t(), x, out=out, add=True)
            return
        for start in range(0, len(out), self.chunks.columns):
            columns = slice(start, min(start + self.chunks.columns, len(out)))
            some = grad[:, columns].t()
            if order is None:
                out[columns] += some @ x
                continue
            product = out.new_empty(len(some), x.shape[1])
            wide_product(some, x, out=product) if wide else torch.mm(some, x, out=product)
            self.weight.index_add_(0, order[tile][columns], product)

    def add_bias(self, grad, tile: slice) -> None:
        if self.bias is not None:
            total = grad.sum(0, dtype=self.wide)
            if self.head.order is None:
                self.bias[tile] += total
            else:
                self.bias.index_add_(0, self.head.order[tile], total)

    def end_chunk(self, index) -> None:
        if self.rows is not None:
            self.input[index] = self.rows.to(self.input.dtype)
            self.rows = None

    def close(self, group):
        d_input, d_weight, d_bias = self.input, self.weight, self.bias
        if d_input is not None:
            d_input = groups.all_reduce(d_input, "sum", group).to(self.head.input.dtype)
        if not self.keep_float32:
            d_weight = None if d_weight is None else d_weight.to(self.head.weight.dtype)
            d_bias = None if d_bias is None else d_bias.to(self.head.bias.dtype)
        return d_input, d_weight, d_bias
