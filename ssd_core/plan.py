"""From a byte budget to chunk sizes."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable

import torch

from ssd_core import native
from ssd_core.checks import expect, one_of
from ssd_core.chunked.grad_filter import TILE
from ssd_core.chunked.logits import block_elements, wide_dtype

MIB = 1 << 20
DEFAULT_WORKSPACE = {"cpu": 64 * MIB}  # bytes, by device type
ACCELERATOR_WORKSPACE = 512 * MIB
NARROWEST = 64                          # columns of a tile: sums over many more tiles would lose digits
LOOK = 30                               # bytes that a look at a logit moves; measured on two Zen 5 cores
BALANCE = {2: (35, 250), 4: (13, 100), 8: (6, 20)}  # FLOP in the time of a byte, by item size: CPU, accelerator
# of backend "cpu", which looks at logits in cache: the same, by the size of what is multiplied, and what computing them
# again costs, in products
COMPILED_BALANCE, COMPILED_AGAIN = {2: 35, 4: 16}, {2: 0.65, 4: 1.0}
ROUTES = ("chunked", "tiled")           # of backend "triton"
# by item size: the time of a product in a kernel of ours, in the library's (a guess, to be measured); bytes that the
# chunked route moves for a logit: looked at twice in float32, and its gradient written
TILED, CHUNKED_LOGIT = {2: 1.2, 4: 2.0}, {2: 4 + 4 + 2, 4: 4 + 4 + 4}
SPAN = 1024                             # columns of the tiled route's gradient that make a good product


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """``rows`` x ``tile`` logits are held at a time. If a tile is all of the vocabulary they are computed once, else
    once for every look at them. Products on their way into a wider sum come in ``columns`` of the vocabulary, and a
    weight of another dtype is cast in as many."""

    rows: int
    columns: int
    tile: int
    spare: int = 0      # bytes of the budget that are left
    route: str = "chunked"              # or "tiled": no logits are held, and a tile is one of the gradient


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a call asks for. ``vocab`` counts the columns of this rank that are looked at."""

    tokens: int
    hidden: int
    vocab: int
    support: int
    dtype: torch.dtype          # that products are taken in
    device: torch.device
    gathered: bool = False      # rows are dropped
    cast: bool = False          # the weight has another dtype, or its rows are not contiguous
    logits: int = 1             # (rows, vocabulary) buffers: the student's, and a teacher's that is computed
    buffers: int = 6            # float32 blocks that a row pass holds at once, measured
    wide_logits: bool = False   # logits are held in float32
    passes: int = 1             # looks at all logits before the gradient
    wide_input: bool = False    # d_input, of 16 bits, is added up in float32
    filtered: int = 0           # different bounds of the gradient filter, which needs all columns
    partial: int = 0            # sums of d_input that it adds up apart
    d_weight: bool = True       # a gradient of the weight is added up
    teacher_hidden: int = 0     # length of a teacher's hidden states
    teacher_row: int = 0        # bytes of those that are copied
    softcap: bool = False
    smoothing: bool = False
    dense: bool = False         # class probabilities, or a teacher's
    looks: int = 1              # of the tiled route before the gradient; 0: there is none
    ranks: int = 1              # that share the vocabulary
    summed: int = 0             # tokens, counting or not, whose d_input is added up over them
    held: Callable[[int, int], int] | None = None   # bytes of so many rows and columns, if the backend counts them
    tiled: Callable[[int], int] | None = None       # bytes of what is seen of so many rows, if there is a tiled route

    def fixed(self) -> int:
        """Bytes that do not depend on the plan, but for the row pass's own buffers."""
        per_token = 5 * 8       # results, row scale, row index
        if self.wide_input:
            per_token += self.hidden * 4
        if not self.filtered:
            return self.tokens * per_token
        tiles = self.vocab // TILE + 1
        # the order both ways and a bias in it; of each bound its moments, and once what is made of them
        matched = self.vocab * (2 * 8 + 4) + (1 + self.filtered) * (self.vocab + tiles * self.hidden) * 4
        return self.tokens * (per_token + self.filtered * tiles * 4) + matched

    def row(self, tile: int) -> int:
        """Bytes of one row of a chunk."""
        itemsize = self.dtype.itemsize
        # gathered or cast hidden states, their gradient, and a partial product of it
        vectors = 1 + (self.gathered or self.cast) + (1 if itemsize > 2 else 2 if tile < self.vocab else 0)
        filtered = 0
        if self.filtered:
            filtered = self.vocab // TILE * 40 + 3 * TILE * itemsize + (1 + self.partial) * self.hidden * 4
        return (tile * self.logit_bytes() + self.support * 20 + vectors * self.hidden * itemsize + self.teacher_row
                + filtered)

    def logit_bytes(self) -> int:
        return (wide_dtype(self.dtype) if self.wide_logits else self.dtype).itemsize * self.logits

    def row_pass(self, tile: int) -> int:
        return self.buffers * max(tile * wide_dtype(self.dtype).itemsize, block_elements(self.device) * 4)


def plan_chunks(demand: Demand, workspace_bytes: int | None) -> ChunkPlan:
    """Rows and columns of logits that fit ``workspace_bytes``, with all else that the call needs beyond its inputs and
    the gradients that it returns.

    All columns of as many rows as fit; or, if that is no row or so few that adding up d_weight costs more than
    computing the logits again, tiles of the vocabulary.

    Where a backend has two routes, the cheaper one that fits; SSD_CORE_ROUTE names the one to take, for tests.
    """
    if workspace_bytes is None:
        workspace_bytes = DEFAULT_WORKSPACE.get(demand.device.type, ACCELERATOR_WORKSPACE)
    if demand.held is not None:
        return _plan_panels(demand, workspace_bytes)
    routes = {"chunked": (_plan_chunks, _bytes_of_chunks)}
    if demand.tiled is not None:
        routes["tiled"] = _plan_tiles, _bytes_of_tiles
        named = os.environ.get("SSD_CORE_ROUTE")
        one_of(named or "chunked", "SSD_CORE_ROUTE", ROUTES)
        routes = {named: routes[named]} if named else routes
    least = {route: _least(demand, bytes_of) for route, (_, bytes_of) in routes.items()}
    whole_rows = f"the gradient filter, which looks at whole rows of {demand.vocab} logits"
    what = whole_rows if demand.filtered else f"{min(demand.vocab, NARROWEST)} logits"
    expect(min(least.values()) <= workspace_bytes, "workspace_bytes", f"at least {min(least.values())} for {what}",
           workspace_bytes)
    plans = [plan(demand, workspace_bytes) for route, (plan, _) in routes.items() if least[route] <= workspace_bytes]
    return plans[0] if len(plans) == 1 else min(plans, key=lambda plan: _route_cost(demand, plan))


def _least(demand: Demand, bytes_of: Callable[[Demand, int, int, int], int]) -> int:
    """Of one row and the thinnest product: of few columns, or of all, where that is less."""
    _, product = _product_columns(demand, 0)[-1]
    narrowest = demand.vocab if demand.filtered else min(demand.vocab, NARROWEST)
    return min(bytes_of(demand, product, 1, tile) for tile in (narrowest, demand.vocab))


def _plan_chunks(demand: Demand, workspace_bytes: int) -> ChunkPlan:
    vocab, tokens = demand.vocab, demand.tokens
    for columns, product in _product_columns(demand, workspace_bytes):
        free = workspace_bytes - demand.fixed() - product
        whole = min(tokens, (free - demand.row_pass(vocab)) // demand.row(vocab))
        if tokens <= max(whole, 0):
            return ChunkPlan(max(whole, 1), columns, vocab)
        rows, tile = (0, 0) if demand.filtered else _square(demand, free)
        if rows and (whole < 1 or _cost(demand, whole, 0) > _cost(demand, rows, demand.passes)):
            return ChunkPlan(rows, columns, tile)
        if whole >= 1:
            break
    return ChunkPlan(whole, columns, vocab)


def _bytes_of_chunks(demand: Demand, product: int, rows: int, tile: int) -> int:
    return demand.fixed() + product + demand.row_pass(tile) + rows * demand.row(tile)


def _product_columns(demand: Demand, workspace_bytes: int) -> list[tuple[int, int]]:
    """Of a product at a time, or of a weight that is cast, and their bytes: the most that there should be, or, if
    nothing else fits, a thin slice of the vocabulary."""
    itemsize = demand.dtype.itemsize
    if itemsize > 2 and not demand.cast:
        return [(demand.vocab, 0)]
    eighth = workspace_bytes // 8 // (demand.hidden * max(itemsize, 4 if demand.cast else 0))
    return [(columns, columns * demand.hidden * (itemsize + (4 if demand.cast else 0)))
            for columns in (min(demand.vocab, max(64, eighth)), min(demand.vocab, 64))]


def _plan_tiles(demand: Demand, workspace_bytes: int) -> ChunkPlan:
    """The tiled route: all tokens and as many columns of their gradient as fit, or as many tokens as leave room for
    ``SPAN`` of them."""
    def fit(most, bytes_of):
        return _fit(most, workspace_bytes, bytes_of)

    spans = min(demand.vocab, SPAN), min(demand.vocab, NARROWEST), demand.vocab
    attempts = itertools.product(_product_columns(demand, workspace_bytes), spans)
    rows, columns, product = next(
        (rows, columns, product) for (columns, product), span in attempts
        if (rows := fit(max(1, demand.tokens), functools.partial(_bytes_of_tiles, demand, product, tile=span))))
    tile = demand.vocab         # whose gradients need no sum
    if _bytes_of_tiles(demand, product, rows, tile) > workspace_bytes:
        tile = fit(tile - 1, functools.partial(_bytes_of_tiles, demand, product, rows))
        tile -= tile % SPAN if tile > SPAN else 0
    return ChunkPlan(rows, columns, tile, route="tiled")


def _bytes_of_tiles(demand: Demand, product: int, rows: int, tile: int) -> int:
    lean = dataclasses.replace(demand, wide_logits=False, logits=1)
    return lean.fixed() + product + demand.tiled(rows) + rows * lean.row(tile)


def _route_cost(demand: Demand, plan: ChunkPlan) -> float:
    """What differs between two routes, in products: how often logits are computed and what that moves, a teacher's like
    the student's, and d_weight added up over chunks. Whether any other gradient is wanted changes nothing."""
    itemsize = demand.dtype.itemsize
    balance = BALANCE[itemsize][demand.device.type != "cpu"]
    if plan.route == "tiled":
        logits = demand.logits * TILED[itemsize] * (demand.looks + 1)
    else:
        again = demand.passes if plan.tile < demand.vocab else 0
        logits = demand.logits * (1 + again) * (1 + CHUNKED_LOGIT[itemsize] * balance / (2 * demand.hidden))
    added_up = demand.d_weight and plan.rows < demand.tokens
    return logits + (4 * balance / plan.rows if added_up else 0)


def _fit(most: int, budget: int, bytes_of: Callable[[int], int]) -> int:
    """The largest number up to ``most`` that fits, or 0."""
    return bisect.bisect_right(range(1, most + 1), budget, key=bytes_of)


def _square(demand: Demand, free: int) -> tuple[int, int]:
    """Rows and columns of tiles, about as many of one as of the other."""
    rows = min(demand.tokens, math.isqrt(max(0, free) // demand.logit_bytes()))
    block = block_elements(demand.device) * 4 // wide_dtype(demand.dtype).itemsize
    while rows >= 1:
        left, column = free - rows * demand.row(0), rows * demand.logit_bytes()
        tile = (left - demand.row_pass(1)) // column
        if tile > block:        # the row pass works on a row at least
            tile = max(block, left // (column + demand.row_pass(1) // block))
        tile = min(demand.vocab, tile)
        if tile >= min(max(rows, NARROWEST), demand.vocab):
            return rows, tile
        rows = rows * 3 // 4
    return 0, 0


def _plan_panels(demand: Demand, workspace_bytes: int) -> ChunkPlan:
    """The same for compiled kernels, which count their bytes: rows in whole panels, columns in whole tiles or all."""
    panel, tile = native.tile_shape(demand.dtype)
    threads = max(4, torch.get_num_threads())       # as the extension counts: plans are the same on few
    panels, tiles = -(-max(1, demand.tokens) // panel), -(-demand.vocab // tile)

    def needed(p: int, t: int) -> int:
        return demand.held(p * panel, demand.vocab if t == tiles else t * tile)

    def fit(most: int, bytes_of) -> int:
        return _fit(most, budget, bytes_of)

    # what the gradient filter leaves waits in the rest
    budget = max(needed(1, 1), workspace_bytes * 7 // 8) if demand.filtered else workspace_bytes

    expected = f"at least {needed(1, 1)} for {panel * min(tile, demand.vocab)} logits"
    expect(needed(1, 1) <= workspace_bytes, "workspace_bytes", expected, workspace_bytes)
    plans = []
    whole = fit(panels, lambda p: needed(p, tiles))
    if whole:
        plans.append((_cost(demand, whole * panel, 0), whole, tiles))
    p = fit(panels, lambda p: needed(p, 1))
    while p:
        t = fit(tiles - 1, lambda t, p=p: needed(p, t))     # of which so many are kept
        idle = -(-t // threads) * threads / t if t else math.inf        # threads share the tiles
        plans.append((_cost(demand, p * panel, demand.passes * (1 - t / tiles)) * idle, p, t))
        p = p * 3 // 4
    _, p, t = min(plans)
    p = -(-panels // -(-panels // p))       # as many chunks, of equal size
    spare = max(0, workspace_bytes - needed(p, t))
    return ChunkPlan(p * panel, tile, demand.vocab if t == tiles else t * tile, spare)


def _cost(demand: Demand, rows: int, recomputed: float) -> float:
    """Of a call in products: those that any plan needs, the logits computed and looked at again, ``LOOK`` bytes for 2 D
    FLOP, and d_weight added up, 8 bytes for 2 ``rows`` FLOP."""
    itemsize = demand.dtype.itemsize
    # what the gradient filter leaves of d_weight is added up at the end
    added_up = demand.d_weight and not demand.filtered
    if demand.held is None:
        balance = BALANCE[itemsize][demand.device.type != "cpu"]
        again = recomputed * (1 + LOOK * balance / (2 * demand.hidden))
        return 3 + again + (4 * balance / rows if added_up else 0)
    multiplied = native.product_itemsize(demand.dtype)
    balance, again = COMPILED_BALANCE[multiplied], recomputed * COMPILED_AGAIN[multiplied]
    if not added_up or rows >= demand.tokens:
        return 3 + again
    # in float32: of 16 bits it is cleared before and rounded at the end, too
    return 3 + again + 4 * balance / rows + (4 * balance / demand.tokens if itemsize == 2 else 0)
