"""Certified gradient filtering: products only where a token's softmax mass is, the rest by a rank-1 moment match.

The definition is ``ssd_core.reference.grad_filter``. Per token, the lightest vocabulary tiles are skipped while their
summed softmax mass stays within delta; their part G of the gradient is replaced by M_it c_j, M_it = sum_j G_ij over
tile t and c_j = sum_i G_ij / sum_i M_it over the whole call: row and column sums stay exact, and the error of a token,
in L1, is at most twice its skipped part. Tiles that hold one of the token's targets are never skipped.
"""

from __future__ import annotations

import torch

from ssd_core import groups
from ssd_core.checks import expect
from ssd_core.chunked.logits import blocks, wide_dtype

TILE = 256
ORDER_ROWS = 128    # whose mean probabilities order the vocabulary, if the caller does not
MATCH = True        # False drops what is skipped: for experiments only


class GradFilter:
    """What is skipped for d_input and for d_weight, of all M tokens of a call. A bound of 0 filters nothing there."""

    def __init__(
        self, head, order, delta_input: float, delta_weight: float, count: int, group, vocab_start: int,
        one_sign: bool = False,
    ):
        device, wide = head.input.device, wide_dtype(head.dtype)
        self.head, self.order, self.vocab_start, self.group = head, order, vocab_start, group
        self.tiles = order.split(TILE)
        self.place_of = torch.empty_like(order)
        self.place_of[order] = torch.arange(len(order), device=device)
        world = groups.size(group)
        shares = {delta: _Skipped(delta / world, head, count, len(self.tiles), wide)
                  for delta in {delta_input, delta_weight} if delta > 0}
        self.for_input, self.for_weight = shares.get(delta_input), shares.get(delta_weight)
        self.shares = list(shares.values())
        # whether there are positive and negative weights; None where all are known to have one sign
        self.signs = None if one_sign else torch.zeros(2, dtype=torch.bool, device=device)

    def open_chunk(self, part: slice, row_pass) -> None:
        """Begin with tokens ``part`` of the M."""
        self.part, self.row_pass = part, row_pass
        count = part.stop - part.start
        self.mass = self.head.input.new_zeros(count, len(self.tiles), dtype=wide_dtype(self.head.dtype))

    def weigh(self, q, block: slice) -> None:
        """Add up the probabilities (r, V) of these rows by tile."""
        ordered = q.index_select(1, self.order)
        whole = len(self.order) // TILE * TILE
        self.mass[block, : whole // TILE] = ordered[:, :whole].unflatten(1, (-1, TILE)).sum(-1) if whole else 0
        if whole < len(self.order):
            self.mass[block, -1] = ordered[:, whole:].sum(-1)

    def add(self, gradients, x, grad, scaled: bool) -> None:
        """The chunk's part of the gradients: ``grad`` (R, V) with respect to raw outputs, ``x`` (R, D)."""
        self.select()
        if not scaled:
            return
        if self.signs is not None:
            weight = self.row_pass.softmax_weight()
            self.signs |= torch.stack(((weight > 0).any(), (weight < 0).any()))
        everything = slice(0, len(self.order))
        if self.for_input is None:
            gradients.add_input(grad, everything)
        if self.for_weight is None:
            gradients.add_weight(x, grad, everything)
        gradients.add_bias(grad, everything)
        self.products(gradients, x, grad)
        if self.for_weight is not None and gradients.weight is not None:
            self.for_weight.add_directions(x, self.part)

    def select(self) -> None:
        """Of the chunk's tokens, what each bound skips."""
        protected = self._targets()
        for share in self.shares:
            share.select(self.mass, protected)

    def products(self, gradients, x, grad) -> None:
        """The products of what stayed, where a bound filters them, and the moments of what is skipped."""
        if self.for_input is not None and gradients.input is not None:
            gradients.rows = x.new_zeros(x.shape, dtype=gradients.wide)
        for t, columns in enumerate(self.tiles):
            part = grad.index_select(1, columns)
            for share in self.shares:
                share.match(part, t, columns, self.part)
                active = share.active[:, t].nonzero().squeeze(-1)
                if len(active) == 0:
                    continue
                dense = part.index_select(0, active)
                if share is self.for_input and gradients.input is not None:
                    weight = self.head.weight[columns].to(dense.dtype)
                    gradients.rows.index_add_(0, active, (dense @ weight).to(gradients.wide))
                if share is self.for_weight and gradients.weight is not None:
                    product = dense.t() @ x.index_select(0, active)
                    gradients.weight.index_add_(0, columns, product.to(gradients.weight.dtype))

    def close(self, gradients, rows) -> None:
        """Add the moment match of all that was skipped, whose parts must have one sign. To see that they have takes the
        only synchronisation with the host, and none where it is known."""
        if self.signs is not None:
            one_sign = not self.signs.all()
            expect(one_sign, "grad_filter", "token weights and upstream gradients of one sign", "both signs")
        if not MATCH:
            return
        if self.for_input is not None and gradients.input is not None:
            for part, rank_one in self.for_input.of_input(self.order):
                index = part if rows is None else rows[part]
                gradients.input[index] += rank_one.to(gradients.input.dtype)
        if self.for_weight is not None and gradients.weight is not None:
            for columns, rank_one in self.for_weight.of_weight(self.order):
                gradients.weight.index_add_(0, columns, rank_one.to(gradients.weight.dtype))

    def certificate(self) -> torch.Tensor:
        """(3,): the largest and the mean softmax mass that was skipped of a token, and the fraction of (token, tile)
        pairs that stayed; over ranks, the sums, and the mean fraction. Of the two bounds, the worse and the mean."""
        found = []
        for share in self.shares:
            skipped = groups.all_reduce(share.skipped.clone(), "sum", self.group)
            most, mean = (skipped.max(), skipped.mean()) if len(skipped) else (skipped.sum(), skipped.sum())
            pairs = max(1, len(skipped) * len(self.tiles))
            active = groups.all_reduce(share.count / pairs, "sum", self.group) / groups.size(self.group)
            found.append(torch.stack((most, mean, active)))
        found = torch.stack(found)
        return torch.stack((found[:, 0].max(), found[:, 1].max(), found[:, 2].mean()))

    def _targets(self):
        """(R, T): which tiles hold one of a token's targets."""
        ids = self.row_pass.ids - self.vocab_start
        mine = self.row_pass.used & (ids >= 0) & (ids < len(self.order))
        tiles = self.place_of[ids.where(mine, 0)] // TILE
        return torch.zeros_like(self.mass).scatter_add_(1, tiles, mine.to(self.mass.dtype)) > 0


class _Skipped:
    """What one bound skips."""

    def __init__(self, delta: float, head, count: int, tiles: int, wide):
        new = head.input.new_zeros
        self.delta, self.head = delta, head
        self.row_mass = new(count, tiles, dtype=wide)                           # M, signed
        self.column_mass = new(len(head.weight), dtype=wide)                    # sum_i G_ij
        self.directions = new(tiles, head.weight.shape[1], dtype=wide)          # M^T x
        self.skipped = new(0, dtype=wide)                                       # softmax mass of each token
        self.count = new((), dtype=wide)                                        # pairs that stayed

    def select(self, mass, protected) -> None:
        """Per token, skip the lightest tiles while their summed mass stays within the bound."""
        free = mass.masked_fill(protected, torch.inf)
        light, place = free.sort(dim=-1, stable=True)
        skip = torch.zeros_like(protected).scatter_(-1, place, light.cumsum(-1) <= self.delta)
        self.active = ~skip
        self.skipped = torch.cat((self.skipped, mass.masked_fill(self.active, 0).sum(-1)))
        self.count += self.active.sum()

    def match(self, part, t: int, columns, rows: slice) -> None:
        """Note the moments of what is skipped of tile ``t``: ``part`` (R, n) of the gradient."""
        skipped = part.to(self.row_mass.dtype).masked_fill(self.active[:, t].unsqueeze(-1), 0)
        self.row_mass[rows, t] = skipped.sum(-1)
        self.column_mass.index_add_(0, columns, skipped.sum(0))

    def add_directions(self, x, rows: slice) -> None:
        self.directions += self.row_mass[rows].t() @ x.to(self.directions.dtype)

    def of_input(self, order):
        """Slices of the tokens and their M @ (sum_j c_j weight_j)."""
        shape, hidden = self._shape(order), self.head.weight.shape[1]
        mean_rows = torch.empty_like(self.directions)
        for tiles in blocks(len(shape), TILE * hidden, self.directions):
            weight = self.head.weight[order[_places(tiles)]].to(shape.dtype)
            mean_rows[tiles] = (shape[tiles].unsqueeze(1) @ _by_tile(weight)).squeeze(1)
        for part in blocks(len(self.row_mass), hidden, mean_rows):
            yield part, self.row_mass[part] @ mean_rows

    def of_weight(self, order):
        """Ids and their c_j (M^T x)_t."""
        shape = self._shape(order)
        for tiles in blocks(len(shape), TILE * self.directions.shape[1], self.directions):
            columns = order[_places(tiles)]
            rank_one = shape[tiles].unsqueeze(2) * self.directions[tiles].unsqueeze(1)
            yield columns, rank_one.flatten(0, 1)[: len(columns)]

    def _shape(self, order):
        """(T, TILE) c_j, 0 behind the last id."""
        total = self.row_mass.sum(0).unsqueeze(1)
        return torch.where(total == 0, 0, _by_tile(self.column_mass[order]) / total)


def _places(tiles: slice) -> slice:
    """Of the ids of these tiles in the order."""
    return slice(tiles.start * TILE, tiles.stop * TILE)


def _by_tile(values):
    """(n, ...) -> (tiles, TILE, ...), with zeros behind the last."""
    short = -len(values) % TILE
    return torch.cat((values, values.new_zeros(short, *values.shape[1:])) if short else (values,)).unflatten(
        0, (-1, TILE))


def default_order(head, rows, temperature: float, chunks) -> torch.Tensor:
    """(V,) ids by descending mean probability over the first tokens; ties by id."""
    count = min(ORDER_ROWS, head.input.shape[0] if rows is None else rows.shape[0])
    everything = slice(0, len(head.weight))
    total = head.input.new_zeros(len(head.weight), dtype=wide_dtype(head.dtype))
    for start in range(0, count, chunks.rows):
        part = slice(start, min(start + chunks.rows, count))
        x = head.input[part if rows is None else rows[part]].to(head.dtype)
        u = head.outputs(x, everything, x.new_empty(len(x), len(head.weight), dtype=head.output_dtype))
        for block in blocks(len(x), len(head.weight), x):
            total += (head.logits(u[block], everything) / temperature).softmax(-1).sum(0)
    return total.argsort(descending=True, stable=True)
